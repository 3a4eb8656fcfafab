"""RULER's eight needle tasks: how well a checkpoint answers as its memory grows, beside baselines.

    python ruler.py --checkpoint checkpoints/smollm2 --json rows.json
    python ruler.py --checkpoint checkpoints/demo --lengths 32k,128k,512k,1m,10m --tasks single_1,multikey_2

The tasks, and how they become documents: needles.py. A haystack is encoded once, for all lengths, questions
and tasks that it serves; the documents with a question's needles are encoded alone, and when it is asked they
stand in place of as many documents of the haystack, within the shortest length. Methods:

    none      the question alone
    oracle    the documents with the needles that answer
    bm25      --max-documents that BM25 finds; of a tiny model, which reads no more, as many as answer
    memory    what the model finds and names in its memory, at most --max-documents, in one round: a question
              tells all that it wants

recall@k: the share of the documents that answer among the first k of a round's ranking; of the other methods,
among those that they show. named: the share that was named, and so read. score: RULER's, the share of the
values that the answer contains. These are per cent. rounds: how many named something, on average.
"""
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro

from common import (
    UserError,
    check_least,
    check_output,
    command_line,
    keep_freed_memory,
    main,
    read_text,
    timed,
    write_json,
)
from interleave import (
    InterleaveConfig,
    answers_from_texts,
    documents_of,
    gather,
    loop_of,
    rounds_of,
    run,
)
from needles import RULER, Draw, Haystack, draw_question, essays
from prompts import open_checkpoint
from question_sets import bm25_search
from routers import make_routers
from sync import encode_texts, fingerprint
from tasks import Words, count_tokens, frame_tokens, parse_lengths

METHODS = ("none", "oracle", "bm25", "memory")
ENDING = " mentioned in the provided text"  # of RULER's questions; our tiny models do not know these words
COPIES = 4e9  # bytes, at most, of a batch's memories: each question has its needles in one of its own


@dataclass
class RulerConfig:
    checkpoint: str = "checkpoints/smollm2"  # a folder, a .gguf file, or "owner/name" on the Hub
    tasks: str = ",".join(RULER)      # commas between
    methods: str = ",".join(METHODS)  # commas between
    lengths: str = "32k,128k,512k,1m"  # tokens of memory, comma-separated, k or m behind a number
    questions: int = 100              # of each task, the same at every length
    seed: int = 1                     # of documents, questions and sampling
    batch: int = 8                    # questions that are asked side by side
    essays: str = ""                  # folder of .txt and .md files; "": docstrings, see needles.py
    json: str = ""                    # write the rows here; those that are there are not measured again
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and matrix products
    interleave: tyro.conf.OmitArgPrefixes[InterleaveConfig] = field(
        default_factory=lambda: InterleaveConfig(max_documents=4, max_rounds=1))  # as many as may answer

    def __post_init__(self):
        parse_lengths(self.lengths)
        for flag, given, known in (("tasks", self.tasks, RULER), ("methods", self.methods, METHODS)):
            if not {*given.split(",")} <= {*known}:
                raise UserError(f"--{flag} {given}: not some of {', '.join(known)}, with commas between")
        check_least(self, questions=1, batch=1, seed=0)


class Asked(NamedTuple):
    """A question, and the documents with its needles: texts, increasing places in the haystack, and which of
    the places answer."""
    text: str
    answers: list
    texts: list
    places: list
    gold: set


def lay_out(needles, haystack, within, rng):
    """The Asked of a Needles, whose documents take random places among the first `within` of a haystack."""
    places = rng.choice(within, len(needles.needles), replace=False).tolist()
    texts = [haystack.hide(needle, place, rng) for needle, place in zip(needles.needles, places)]
    gold = set(places[:len(needles.answers)])
    places, texts = zip(*sorted(zip(places, texts)))
    return Asked(needles.text, needles.answers, list(texts), list(places), gold)


def haystack_of(name):
    """The name of a task's haystack, which is that of other tasks of the same name, too."""
    task = RULER[name]
    return f"needles {task.key} {task.value}" if task.haystack == "needles" else task.haystack


def lay_out_tasks(names, words, tokenizer, lengths, config):
    """(texts, numbers, ends, counts) of `grow`, and by their names the lists of Asked, of tasks with the same
    haystack. Raises UserError for one that is too short."""
    rng = lambda name, *rest: np.random.default_rng([config.seed, list(RULER).index(name), *rest])
    first = next(name for name in RULER if haystack_of(name) == haystack_of(names[0]))
    draw, needles, hidden = Draw(words, "test", rng(first, 1)), {}, {}
    for name in names:
        own = Draw(words, "test", rng(name))
        needles[name] = [draw_question(RULER[name], own) for _ in range(config.questions)]
        draw.used |= own.used
    haystack = Haystack(RULER[first], draw, config.essays)
    grown = grow(haystack, tokenizer, lengths, config.seed)
    within = grown[-1][0]
    if within < 8:
        raise UserError(f"--lengths: {lengths[0]:,} tokens hold {within} documents; begin with more")
    for name in names:
        places = rng(name, 2)
        hidden[name] = [lay_out(question, haystack, within, places) for question in needles[name]]
    return *grown, hidden


def grow(haystack, tokenizer, lengths, seed):
    """Let a haystack grow to the longest of `lengths`, in tokens: (texts, numbers, ends, counts).

    numbers: a random permutation; ends: tokens up to the end of each document, numbers and punctuation
    counted; counts: documents that each length holds.
    """
    count = 64
    while True:
        haystack.grow(count)
        texts = [" ".join(sentences) for sentences in haystack.sentences]
        numbers = np.random.default_rng(seed).permutation(len(texts)).tolist()
        ends = np.cumsum(count_tokens(tokenizer, texts) + frame_tokens(tokenizer, numbers))
        if ends[-1] >= lengths[-1]:
            counts = np.searchsorted(ends, lengths, side="right").tolist()
            texts, numbers = texts[:counts[-1]], np.argsort(np.argsort(numbers[:counts[-1]])).tolist()
            return texts, numbers, ends, counts
        count = int(count * min(lengths[-1] / ends[-1] * 1.02, 64)) + 8


# ------------------------------------------------------------------------------------------------------------
# Methods: each is ask(questions) -> [(answer, places found, places named, rounds)]

def wording(model, text):
    """RULER's question, for a tiny model without the words that it does not know."""
    return text.replace(ENDING, "") if model.config.prompts == "nanomsa" else text


def text_asker(model, tokenizer, config, find):
    """Answers from the texts of the documents that find(question) returns, triples (number, place, text)."""
    def ask(questions):
        found = [sorted(find(question)) for question in questions]
        asked = [(wording(model, question.text), [(n, tokenizer.encode(text)) for n, _, text in documents])
                 for question, documents in zip(questions, found)]
        answers = answers_from_texts(model, tokenizer, asked, config.interleave, config.batch)
        places = [[place for _, place, _ in documents] for documents in found]
        return [(answer, shown, shown, 0) for answer, shown in zip(answers, places)]
    return ask


def own_documents(question, numbers, places):
    """Those of a question's documents that stand at `places`, triples (number, place, text)."""
    return [(numbers[place], place, text) for place, text in zip(question.places, question.texts)
            if place in places]


def bm25_finder(model, texts, numbers, questions, most):
    """find(question) by BM25. One index holds the needles of all questions, of which those of the question
    at hand count; a haystack's document in whose place a needle stands does not."""
    shown = [(None, place, text) for place, text in enumerate(texts)]
    shown += [(question, place, text) for question in questions
              for place, text in zip(question.places, question.texts)]
    search = bm25_search([text for *_, text in shown])

    def find(question):
        count = most if model.config.prompts != "nanomsa" else len(question.gold)
        best = search(wording(model, question.text), len(shown) - len(texts) + most)
        found = [(numbers[place], place, text) for asker, place, text in (shown[at] for at, _ in best)
                 if asker is question or not asker and place not in question.places]
        return found[:count]
    return find


def memory_asker(model, tokenizer, memory, encoded, numbers, config):
    """The model with its memory. memory, encoded: of the haystack, in the order of numbers; token ids."""
    order = np.argsort(numbers).tolist()
    rank = np.argsort(order).tolist()  # place in the haystack -> place in the memory
    place_of = dict(zip(memory.numbers, order))
    size = sum(x.nbytes for xs in memory.chunks(slice(None)).values() for x in xs)
    batch = max(1, min(config.batch, int(COPIES / size)))

    def loop(question):
        own = sorted(own_documents(question, numbers, question.places))
        new, texts = tokenizer.encode_batch([text for *_, text in own]), list(encoded)
        for (_, place, _), text in zip(own, new):
            texts[rank[place]] = text
        owned, _ = encode_texts(model, tokenizer, new, [number for number, *_ in own])
        asked = memory.with_documents([rank[place] for _, place, _ in own], owned)
        yield from loop_of(model, tokenizer, asked, texts, wording(model, question.text), config.interleave)

    def ask(questions):
        events = run(model, tokenizer, map(loop, questions), config.interleave, batch)
        return [(answer, [place_of[n] for r in rounds for n, _ in r.routed[:model.config.top_k]],
                 [place_of[n] for r in rounds for n in r.named], sum(bool(r.named) for r in rounds))
                for answer, rounds in gather(events, len(questions))]
    return ask


def ask_all(ask, questions):
    """The measures of a row: means, shares in per cent."""
    (seconds, asked), scores = timed(lambda: ask(questions)), []
    for question, (answer, found, named, rounds) in zip(questions, asked):
        share = lambda places: 100 * len(question.gold & {*places}) / len(question.gold)
        right = [value.lower() in answer.lower() for value in question.answers]
        scores.append((share(found), share(named), 100 * np.mean(right), rounds))
    names = ("recall_at_k", "named", "score", "rounds")
    row = {name: round(float(x), 3) for name, x in zip(names, np.mean(scores, 0))}
    return row | dict(seconds_per_question=round(seconds / len(questions), 4))


# ------------------------------------------------------------------------------------------------------------

def evaluate(model, tokenizer, config, done):
    """Yields rows. done: the (task, method, length) of those that are there."""
    lengths, words, tasks = parse_lengths(config.lengths), Words(), dict.fromkeys(config.tasks.split(","))
    methods = dict.fromkeys(config.methods.split(","))
    trained, shared = model.trained_routers, {}  # tasks by their haystack
    for name in tasks:
        shared.setdefault(haystack_of(name), []).append(name)
    for kind, names in shared.items():
        wanted = [(name, method, length) for name in names for method in methods
                  for length in (lengths if method in ("bm25", "memory") else [0])
                  if (name, method, length) not in done]
        if not wanted:
            continue
        texts, numbers, ends, counts, asked = lay_out_tasks(names, words, tokenizer, lengths, config)
        order = np.argsort(numbers)  # a memory is in the order of its numbers, which count from 0
        encoded = memory = ask = None  # the last haystack's are not held while this one is encoded
        speed = seconds = 0
        print(f"{kind}: {len(texts):,} documents, {len({*texts}):,} of them different, "
              f"{ends[len(texts) - 1]:,} tokens", flush=True)
        for name, method, length in wanted:
            questions, count = asked[name], counts[lengths.index(length)] if length else 0
            if method == "none":
                ask = text_asker(model, tokenizer, config, lambda question: [])
            elif method == "oracle":
                ask = text_asker(model, tokenizer, config,
                                 lambda question: own_documents(question, numbers, question.gold))
            elif method == "bm25":
                ask = text_asker(model, tokenizer, config, bm25_finder(
                    model, texts[:count], numbers, questions, documents_of(model, config.interleave)))
            else:
                if encoded is None:
                    began = time.perf_counter()
                    if not trained:  # a backbone: its routers are made of the haystack
                        make_routers(model, tokenizer, texts)
                    encoded = tokenizer.encode_batch(texts)
                    memory, speed = encode_texts(model, tokenizer, [encoded[i] for i in order])
                    seconds = time.perf_counter() - began
                    print(f"encoded {speed:,.0f} tokens/s; {seconds:,.0f} s", flush=True)
                held = np.flatnonzero(order < count)
                ask = memory_asker(model, tokenizer, memory if count == len(texts) else memory.subset(held),
                                   [encoded[i] for i in order[held]], numbers[:count], config)
            measured = ask_all(ask, questions)
            tokens = int(ends[count - 1]) if count else 0
            row = dict(task=name, method=method, length=length, memory_tokens=tokens, documents=count,
                       distinct=len({*texts[:count]}), **measured,
                       encode_tokens_per_second=round(speed), encode_seconds=round(seconds, 1))
            print(f"{name:<11} {method:<7} {tokens:>10,} {row['recall_at_k']:>7.1f} {row['named']:>6.1f} "
                  f"{row['score']:>6.1f} {row['rounds']:>6.2f} {row['seconds_per_question']:>8.2f}",
                  flush=True)
            yield row
            seconds = 0  # the haystack's are counted once


def averages(rows):
    """The lines of a table of scores: tasks and their mean, by method and length."""
    columns = dict.fromkeys((row["method"], row["length"]) for row in rows)
    score = {(row["task"], row["method"], row["length"]): row["score"] for row in rows}
    lines = []
    for method, length in columns:
        own = [score.get((task, method, length)) for task in RULER]
        whole = f"{np.mean(own):7.1f}" if None not in own else f"{'-':>7}"
        cells = "".join(f"{'-' if x is None else f'{x:.1f}':>12}" for x in own)
        lines.append(f"{method:<7} {length or '-':>9}{whole}{cells}")
    return [f"{'':17}{'mean':>7}" + "".join(f"{task:>12}" for task in RULER), *lines]


def rows_before(path, about):
    """The rows of a file of --json, which must be about the same, and their scores by (task, method, length).
    Raises UserError."""
    try:
        rows = json.loads(read_text(path)) if Path(path).exists() else []
        if not isinstance(rows, list):
            raise ValueError("no list")
        other = [row for row in rows if about.items() - row.items()]
        scores = {(row["task"], row["method"], row["length"]): row["score"] + 0 for row in rows}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"--json {path}: not a file that this script wrote ({error})") from None
    if other:
        name, value = min(about.items() - other[0].items())
        raise UserError(f"--json {path}: measured with {name} {other[0].get(name)!r}, not {value!r}; "
                        "give another file")
    return rows, scores


def script():
    config = command_line(RulerConfig, __doc__)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    check_output("--json", config.json)
    if config.essays:
        next(essays(config.essays))  # raises where there are none
    model, tokenizer, on = open_checkpoint(config.checkpoint, config.device, config.dtype)
    about = dict(checkpoint=config.checkpoint, essays=config.essays, questions=config.questions,
                 seed=config.seed, top_k=model.config.top_k, device=str(model.device),
                 dtype=str(model.model.embed_tokens.weight.dtype), **asdict(config.interleave))
    about |= dict(model=fingerprint(model, tokenizer), max_rounds=rounds_of(model, config.interleave),
                  max_documents=documents_of(model, config.interleave),
                  shortest=min(parse_lengths(config.lengths)))  # in which the needles stand
    rows, done = rows_before(config.json, about) if config.json else ([], {})
    print(f"{config.checkpoint} on {on}")
    print(f"{'task':<11} {'method':<7} {'tokens':>10} {f'rec@{model.config.top_k}':>7} {'named':>6} "
          f"{'score':>6} {'rounds':>6} {'s/quest.':>8}")
    began = time.perf_counter()
    with torch.no_grad():
        for row in evaluate(model, tokenizer, config, done):
            rows.append(row | about)
            if config.json:
                write_json(config.json, rows)  # after every row: long runs end early
    print("\n".join(averages(rows)))
    encoding = sum(row["encode_seconds"] for row in rows[len(done):])
    print(f"{time.perf_counter() - began:,.0f} s, of which {encoding:,.0f} s went into encoding haystacks")


if __name__ == "__main__":
    main(script)
