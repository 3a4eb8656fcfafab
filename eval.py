"""Accuracy of a checkpoint as its memory grows: on synthetic tasks, or on a set of real questions.

    python eval.py --task niah_multikey --lengths 16k,64k,256k,1m --json rows.json --plot curve.png
    python eval.py --data SET --checkpoint C --questions 200 --distractors SET,SET --json rows.json
    python eval.py --data questions.jsonl --documents notes --checkpoint C

**Sets.** SET is a folder in BEIR's layout or SQuAD's .json file, of whose articles every fourth is asked
about (--split all: all); questions.jsonl has one's own, in lines of {"question": "...", "answers": ["..."],
"documents": ["a.md:12"]}. Where one names a whole file that was split, recall is of files. "documents": []
without answers says that nothing answers, and the question should be refused, as should those of a set's
impossible.jsonl, and SQuAD's. What the table says: answers.py. A chat backbone that does not look twice finds
its 16 documents in two rounds of 8 with --max-rounds 2.

**Tasks** (keys that were never seen in training as a pair; documents as in tasks.py):

    niah_single     one needle among distinct noise documents
    niah_multikey   every document a needle with a key of its own
    two_hop         chains: the first document names the key of the second; all documents look alike
    read_pooled     every document states one of 16 colours; with --max-rounds 0 nothing is named or appended,
                    and the answer can only come from pooled values (chance 1/16)

Baselines, same questions, same table (`--baseline`): no_memory: the question alone; oracle: its documents
appended, in order; bm25: as many documents as the question needs, found by BM25, each search extended by the
text found before. `--zero-values` zeroes the pooled values: memory attention brings nothing.

With `--memory BANK` the documents lie in a bank on disk, which is made or completed first; under torchrun
they, and their encoding, are spread over the ranks:

    torchrun --nproc_per_node=2 eval.py --memory bank --task niah_multikey --lengths 16k,1m,10m

Lengths are nested prefixes of one memory (k = 1,024 tokens, numbers and punctuation of documents counted),
encoded once; the same questions are asked at every length. recall@k: gold documents among the first k of the
ranking by mean routing score, union over rounds. top-1: gold documents that ranked first, among those not yet
appended, in some round. named: gold documents that the model named first in the round that wants them.
"""
import contextlib
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from answers import (
    AT,
    draw,
    measure,
    plot_set,
    ranked,
    reader,
    refused,
    rounds_asked,
    table,
    told_not_found,
)
from common import (
    UserError,
    check_drawing,
    check_least,
    check_output,
    check_outside,
    command_line,
    drawing,
    keep_freed_memory,
    main,
    parts_of,
    proc_bytes,
    read_text,
    return_freed_memory,
    timed,
    write_json,
)
from documents import Document, list_documents, passages, spelled_texts
from interleave import (
    InterleaveConfig,
    Round,
    answer_questions,
    answers_from_texts,
    documents_of,
    most_tokens,
    rounds_of,
    too_long,
)
from memory_bank import Bank, is_bank, read_manifest
from memory_parallel import ParallelMemory, Ranks
from model import compile_blocks
from prompts import NOT_FOUND, open_checkpoint
from question_sets import (
    SetQuestion,
    bm25_search,
    choose_split,
    is_questions,
    read_questions,
    read_set,
    read_texts,
    set_files,
    tell_odd,
)
from routers import chance, make_routers
from sync import bank_routers, check_fingerprint, encode_texts, hash64, sync
from tasks import TASKS, Words, grow_memory, parse_lengths

IMPOSSIBLE = 100  # of a set's questions that nothing answers, at most


@dataclass
class EvalConfig:
    checkpoint: str = "checkpoints/demo"  # a folder, a .gguf file, or "owner/name" on the Hub
    data: str = ""                    # a set of questions in place of a task; see above
    documents: str = ""               # what --data FILE.jsonl asks about: a folder or a file
    distractors: str = ""             # sets, with commas between, whose documents are added one set at a time
    split: str = ""                   # of --data; "": test, else dev, else the only one; "all"
    k: str = ""                       # of --data: documents in the prompt, commas between; "": as sample.py
    task: Literal[tuple(TASKS)] = "niah_multikey"  # what is asked
    filler: int = 0                   # noise sentences around every document's own; 2: about 64 tokens each
    baseline: Literal["none", "no_memory", "oracle", "bm25"] = "none"  # what answers in place of the memory
    zero_values: bool = False         # pooled values become zero
    routing_keys: Literal["float32", "bfloat16", "int8"] = "float32"  # as held; int8: one scale per chunk
    lengths: str = "16k,64k,256k,1m"  # tokens of memory, comma-separated, k or m behind a number
    questions: int = 200              # answered; recall without a second look is of all of a set's
    seed: int = 1                     # of documents, questions and sampling
    batch: int = 8                    # questions that are asked side by side
    memory: str = ""                  # folder of a bank for the documents; without one they lie in RAM
    timeout: float = 600              # seconds that ranks wait for each other
    json: str = ""                    # write the rows to this file
    plot: str = ""                    # draw them to this .png
    beside: str = ""                  # files of other runs' rows, with commas between; drawn with ours
    top_k: int = 0                    # documents that a layer selects; 0: its own; --data: at least 16
    compile: bool = False             # blocks by torch.compile, answers by CUDA graphs: fewer launches
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and matrix products
    interleave: tyro.conf.OmitArgPrefixes[InterleaveConfig] = field(default_factory=InterleaveConfig)

    def __post_init__(self):
        parse_lengths(self.lengths)
        of_tasks = ("task", "filler", "baseline", "zero_values", "lengths", "beside")
        of_sets = ("documents", "distractors", "split", "k")
        rule = "is not for --data; leave it out" if self.data else "is about a set; give its --data"
        for name in of_tasks if self.data else of_sets:
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name.replace('_', '-')} {rule}")
        if self.documents and self.split:
            raise UserError("--split is about a set; questions of your own have none: leave it out")
        if self.data and is_questions(self.data) != bool(self.documents):
            raise UserError(f"--data {self.data}: a .jsonl file of questions and --documents belong together")
        if self.top_k > 1000:
            raise UserError(f"--top-k is {self.top_k:,}; it must be at most 1,000")
        if self.k and not all(k.isdecimal() and 0 < int(k) <= 1000 for k in self.k.split(",")):
            raise UserError(f"--k {self.k}: not counts of documents, 1 to 1000, with commas between")
        if self.k and self.interleave.max_documents > 0:
            raise UserError("--k says how many documents are read; leave out --max-documents")
        if self.data and self.interleave.max_rounds == 0:
            raise UserError("--max-rounds 0 is about tasks: of a set documents are read; leave it out")
        check_least(self, ("timeout",), seed=0, questions=0 if self.data else 1, filler=0, batch=1, top_k=0)
        for flag, given in (("zero-values", self.zero_values),
                            ("routing-keys", self.routing_keys != "float32")):
            if given and self.baseline != "none":
                raise UserError(f"--{flag} is about the memory, --baseline {self.baseline} has none; "
                                "leave one of them out")
        if self.baseline == "bm25" and self.task == "niah_single":
            raise UserError(f"--baseline {self.baseline}: not for niah_single, where every question has a "
                            "memory of its own; choose another --task")
        if self.memory and (self.task == "niah_single" or self.zero_values or self.baseline != "none"):
            raise UserError("--memory: a bank holds one memory as it is; leave out niah_single, "
                            "--zero-values and --baseline")
        if self.memory and self.routing_keys == "float32":
            self.routing_keys = "bfloat16"  # as a bank stores them


def score(question, gold, rounds, answer, top_k):
    """(recall@k, top-1, named, exact match) of one answered question.

    gold: the numbers of its documents, hop by hop: a document counts as named when it is among the first that
    its own round named, as many as the hop has documents.
    """
    ranked, first, seen = set(), set(), set()
    for r in rounds:
        ranked |= {n for n, _ in r.routed[:top_k]}
        first |= {*[n for n, _ in r.routed if n not in seen][:1]}
        seen |= {*r.appended}
    named = sum(len({*hop} & {*r.named[:len(hop)]}) for hop, r in zip(gold, rounds))
    documents = {n for hop in gold for n in hop}
    count, exact = len(documents), float(answer.strip() == question.answer)
    return len(documents & ranked) / count, len(documents & first) / count, named / count, exact


def ask_all(ask, numbers, questions, top_k, label, batch):
    """Ask every question; returns the measures of a row, means, and the seconds of the first question.

    ask(places of questions) -> [(answer, rounds)]; numbers: of the documents that gold indices mean.
    """
    first, found = timed(lambda: ask(range(1)))  # alone: it reads what is cold
    parts = parts_of(range(1, len(questions)), 8 * batch, label, "question")
    seconds, others = timed(lambda: [one for places in parts for one in ask(places)])
    scores = []
    for question, (answer, rounds) in zip(questions, found + others):
        gold = [[numbers[document] for document in hop] for hop in question.gold]
        scores.append(score(question, gold, rounds, answer, top_k))
    names = ("recall_at_k", "router_top1", "named", "exact_match")
    row = dict(zip(names, np.mean(scores, 0).tolist()))
    return row | {"seconds_per_question": round((first + seconds) / len(questions), 5)}, first


# ------------------------------------------------------------------------------------------------------------
# Who is asked: at_length(count) returns ask(places) -> [(answer, rounds)] of the questions at these places,
# over the first `count` documents

def memory_asker(model, tokenizer, texts, numbers, needles, questions, config):
    """The model with its memory, encoded once. Also returns the tokens encoded per second."""
    texts, needles = tokenizer.encode_batch(texts), tokenizer.encode_batch(needles)
    order = np.argsort(numbers)  # a memory is in the order of its numbers
    memory, speed = encode_texts(model, tokenizer, [texts[d] for d in order], [numbers[d] for d in order])
    own = [encode_texts(model, tokenizer, [needle], numbers[:1])[0] for needle in needles]
    memory, *own = (part.round_routing_keys(getattr(torch, config.routing_keys)) for part in (memory, *own))
    if config.zero_values:
        for part in (memory, *own):
            part.values = [torch.zeros_like(values) for values in part.values]

    def at_length(count):
        held = np.flatnonzero(order < count)  # where the first `count` documents stand in the memory
        part, part_texts = memory.subset(held), [texts[order[d]] for d in held]
        if needles:
            at = part.numbers.index(numbers[0])

        def ask(places):
            asked, found = [questions[i].text for i in places], []
            if not needles:
                return answer_questions(model, tokenizer, part, part_texts, asked, config.interleave,
                                        config.batch)
            for i, text in zip(places, asked):  # its memory has its own needle in place of document 0
                memory = part.with_documents([at], own[i])
                texts = part_texts[:at] + [needles[i]] + part_texts[at + 1:]
                found += answer_questions(model, tokenizer, memory, texts, [text], config.interleave, 1)
            return found
        return ask
    return at_length, speed


def own_routers(model, tokenizer, texts, config, ranks):
    """Give a backbone whose routers nobody has trained those of its bank, or new ones of its documents."""
    if model.trained_routers:
        return
    if config.memory:
        bank_routers(model, tokenizer, config.memory, lambda: texts, ranks)
    else:
        make_routers(model, tokenizer, texts)


def fill_bank(model, tokenizer, texts, numbers, name, config, ranks, say):
    """The bank --memory, which holds the documents when this returns; name: what they are, for their ids."""
    id_of = lambda i: f"{name} #{i}"
    if is_bank(config.memory):
        held = Bank(config.memory).id_hashes
        if not np.isin(held, np.array([hash64(id_of(i)) for i in range(len(texts))], np.uint64)).all():
            raise UserError(f"{config.memory}: holds other documents than this evaluation's; "
                            "give another --memory")
    documents = (Document(text, id=id_of(i), number=numbers[i]) for i, text in enumerate(texts))
    size = sum(len(text.encode(errors="replace")) for text in texts)
    say(f"{config.memory}: " + sync(model, tokenizer, config.memory, documents, ranks, size=size))
    return ranks.same(Bank(config.memory))


def bank_asker(model, tokenizer, texts, numbers, questions, config, ranks, say):
    """The model with a bank on disk, over the ranks."""
    name = f"{config.task} seed {config.seed} filler {config.filler}"
    bank = fill_bank(model, tokenizer, texts, numbers, name, config, ranks, say)

    def at_length(count):
        memory = ParallelMemory(bank.only(numbers[:count]), model.device, ranks, config.routing_keys)
        return lambda places: answer_questions(model, tokenizer, memory, memory.texts,
                                               [questions[i].text for i in places], config.interleave,
                                               config.batch)
    return at_length


def resident_bytes():
    """What this process holds in RAM now; None where no /proc tells it."""
    with contextlib.suppress(OSError):
        return proc_bytes("self/status", "VmRSS")


def baseline_asker(model, tokenizer, texts, numbers, needles, questions, config):
    """What answers in place of the memory, from the texts of the documents that it finds."""
    def at_length(count):
        search = bm25_search(texts[:count]) if config.baseline == "bm25" else None

        def find(i, question):
            """What is appended to a question, pairs (number, ids), and the rounds that found it."""
            found, rounds = [], []
            for hop in question.gold if config.baseline != "no_memory" else ():
                best = hop  # the oracle's
                if search:
                    query = " ".join([question.text, *(texts[d] for d in found)])
                    ranked = search(query, max(model.config.top_k, len(hop)) + len(found))
                    best = [d for d, _ in ranked if d not in found][:len(hop)]
                    named = [numbers[d] for d in best]
                    rounds.append(Round([(numbers[d], s) for d, s in ranked], named))
                found += sorted(best, key=lambda d: numbers[d])
            text_of = lambda d: tokenizer.encode(needles[i] if needles else texts[d])
            return [(numbers[d], text_of(d)) for d in found], rounds

        def ask(places):
            appended, rounds = zip(*(find(i, questions[i]) for i in places))
            asked = [(questions[i].text, given) for i, given in zip(places, appended)]
            return list(zip(answers_from_texts(model, tokenizer, asked, config.interleave, config.batch),
                            rounds))
        return ask
    return at_length


def evaluate_task(model, tokenizer, config, ranks, say, on):
    """Yields a row, in a list, for one length of memory after another. on: the device, as text."""
    lengths, words = parse_lengths(config.lengths), Words()
    grown = grow_memory(words, tokenizer, config.task, lengths, config.questions, config.seed, config.filler,
                        ranks)
    texts, numbers, questions = grown.texts, grown.numbers, grown.questions
    say(f"{config.task}: {len(texts):,} documents, {grown.ends[-1]:,} tokens; device: {on}")
    k, speed = model.config.top_k, 0
    if config.baseline == "none":
        own_routers(model, tokenizer, texts, config, ranks)
    if config.memory:
        at_length = bank_asker(model, tokenizer, texts, numbers, questions, config, ranks, say)
        texts = grown.texts = None  # they lie in the bank
        return_freed_memory()
    elif config.baseline == "none":
        at_length, speed = memory_asker(model, tokenizer, texts, numbers, grown.needles, questions, config)
        say(f"encoded {speed:,.0f} tokens/s")
    else:
        at_length = baseline_asker(model, tokenizer, texts, numbers, grown.needles, questions, config)
    columns = f"{f'recall@{k}':>9} {'top-1':>6} {'named':>6} {'exact':>6} {'s/question':>10}"
    say(f"{'tokens':>10} {'documents':>9} {columns}")
    batch = 1 if grown.needles and config.baseline == "none" else config.batch  # each has a memory of its own
    for count in grown.counts:
        ask = None  # the last memory goes before the next one is opened
        opened, ask = timed(lambda: at_length(count))
        measured, first = ask_all(ask, numbers, questions, k, f"{count:,} documents", batch)
        tokens = int(grown.ends[count - 1])
        row = dict(task=config.task, baseline=config.baseline, memory_tokens=tokens, documents=count,
                   questions=len(questions), seed=config.seed, top_k=k, **measured,
                   encode_tokens_per_second=round(speed), filler=config.filler,
                   routing_keys=config.routing_keys, zero_values=config.zero_values, batch=batch,
                   max_rounds=rounds_of(model, config.interleave),
                   router_weight=config.interleave.router_weight,
                   checkpoint=config.checkpoint, device=str(model.device))
        if config.memory:
            row |= dict(ranks=ranks.world, open_seconds=round(opened, 5),
                        first_question_seconds=round(first, 4),
                        resident_bytes_per_rank=ranks.gather_objects(resident_bytes()))
        say(f"{tokens:>10,} {count:>9,} {row['recall_at_k']:>9.3f} {row['router_top1']:>6.3f} "
            f"{row['named']:>6.3f} {row['exact_match']:>6.3f} {row['seconds_per_question']:>10.3f}",
            flush=True)
        yield [row]


def plot(rows, path, beside=()):
    """Accuracy against memory tokens; the exact match of other runs' rows (name -> rows) with it."""
    tokens, k = [row["memory_tokens"] for row in rows], rows[0]["top_k"]
    with drawing(path) as axes:
        for name, label in (("exact_match", "exact match"), ("recall_at_k", f"router recall@{k}"),
                            ("router_top1", "router top-1")):
            axes.plot(tokens, [row[name] for row in rows], "o-", label=label)
        axes.plot(tokens, [min(1, k / row["documents"]) for row in rows], "k:", label=f"recall@{k} by chance")
        for name, others in dict(beside).items():
            axes.plot([row["memory_tokens"] for row in others], [row["exact_match"] for row in others], "s--",
                      lw=1, ms=4, label=f"exact match, {name}")
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="tokens of memory", ylabel="share of questions",
                 title=f"{rows[0]['task']}, {rows[0]['questions']} questions, seed {rows[0]['seed']}")
        axes.legend(loc="center left")


def read_results(path):
    """What `--json` wrote. Raises UserError."""
    try:
        rows = json.loads(read_text(path))
        [(row["memory_tokens"] + 0, row["exact_match"] + 0) for row in rows]  # numbers, or it raises
        return rows
    except OSError as error:
        raise UserError(f"--beside {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--beside {path}: not a file that --json wrote") from None


# ------------------------------------------------------------------------------------------------------------
# Sets of questions

def load_set(config, model, tokenizer, say):
    """What --data names: (texts, owner, counts, questions, split); memories hold the first `count` of the
    texts, which are documents or passages of them. owner: the document of each, which questions ask for: of
    one's own files a piece, or the whole file where a question names one that has several."""
    if config.documents:
        documents = list_documents(config.documents, tokenizer.count, model.config.max_document_tokens, say)
        texts, split = spelled_texts(documents), ""
        questions, group = read_questions(config.data, documents, say), [*range(len(texts))]
        if any(question.whole for question in questions):
            files = [document.source for document in documents]
            place = {file: i for i, file in enumerate(dict.fromkeys(files))}
            group = [place[file] for file in files]
            questions = [question._replace(gold=tuple(dict.fromkeys(group[i] for i in question.gold)))
                         for question in questions]
    else:
        texts, questions, none = read_set(config.data, say)
        group = [*range(len(texts))]
        questions, none, split = choose_split(questions, none, config.split, config.data)
        if model.config.second_look:  # one that has learned to say NOT_FOUND
            drawn = draw(none, min(config.questions, IMPOSSIBLE), config.seed)
            questions = questions + [SetQuestion(text, (), nothing=True) for text, _ in drawn]
        elif none and not questions:
            raise UserError(f"{config.data}: nothing answers any question of {split}, which this checkpoint "
                            "has not learned to say; give one that has, such as checkpoints/smollm2")
    long = too_long(model, tokenizer, [question.text for question in questions])
    tell_odd(config.data, {f"questions left out: of more than {most_tokens(model):,} tokens": len(long)}, say)
    questions = [question for i, question in enumerate(questions) if i not in long]
    if not any(question.gold or question.answers or question.nothing for question in questions):
        raise UserError(f"{config.data}: no question is left of which an answer or a document is known; "
                        "sample.py --questions FILE.jsonl answers what nobody has judged")
    bare = sum(bool(question.answers and not question.gold) for question in questions)
    tell_odd(config.data, {"answered, but no document is named; so none is given as the oracle's": bare}, say)
    counts = [len(texts)]
    for path in filter(None, config.distractors.split(",")):
        own = {*texts}  # what two sets hold is one document
        texts += [text for text in read_texts(path, say) if text not in own]
        group += range(group[-1] + 1, group[-1] + 1 + len(texts) - counts[-1])
        counts.append(len(texts))
    whole = counts[0] if config.documents else 0  # one's own are cut already, as sample.py cuts them
    texts, text_of = passages(texts, tokenizer.count, whole)
    owner, counts = [group[i] for i in text_of], np.searchsorted(text_of, counts).tolist()
    return texts, owner, counts, questions, split


def set_memories(model, tokenizer, texts, encoded, name, config, ranks, say, on):
    """A function: count -> the memory of the first `count` documents, numbered from 0."""
    own_routers(model, tokenizer, texts, config, ranks)
    if config.memory:
        bank = fill_bank(model, tokenizer, texts, range(len(texts)), name, config, ranks, say)
        return lambda count: ParallelMemory(bank.only(range(count)), model.device, ranks, config.routing_keys)
    memory, speed = encode_texts(model, tokenizer, encoded)
    say(f"encoded {speed:,.0f} tokens/s on {on}")
    memory = memory.round_routing_keys(getattr(torch, config.routing_keys))
    return lambda count: memory if count == len(texts) else memory.subset(range(count))


def evaluate_set(model, tokenizer, config, ranks, say, on):
    """Yields the rows of the table of answers.py, for one size of memory after another."""
    texts, owner, counts, questions, split = load_set(config, model, tokenizer, say)
    name = Path(config.data).resolve().name
    ks = [*dict.fromkeys(map(int, config.k.split(",")))] if config.k else [
        documents_of(model, config.interleave)]
    interleave = replace(config.interleave, max_documents=max(ks))
    parts = np.bincount(owner).max().item()  # of the longest document: of several only one may be found
    # A chat backbone only ranks passages; the layers of others attend to all that are selected
    most = max(model.config.top_k, *AT, *ks) * min(parts, 16 if model.config.prompts == "chat" else 4)
    most = model.config.top_k = min(most, max(*AT, len(texts)))
    searches, encoded = [bm25_search(texts[:count]) for count in counts], tokenizer.encode_batch(texts)
    those = lambda field: [i for i, question in enumerate(questions) if getattr(question, field)]
    chosen = draw(those("answers"), config.questions, config.seed)
    looked = chosen or draw(those("gold"), config.questions, config.seed)
    at_length = set_memories(model, tokenizer, texts, encoded, name, config, ranks, say, on)
    read = reader(model, tokenizer, encoded, config.interleave, config.batch, say)
    for count, search in zip(counts, searches):
        memory = None  # the last one goes before the next one is opened
        memory, tokens = at_length(count), sum(map(len, encoded[:count]))
        by_words = lambda asked: [([place for place, score in search(text, most) if score], most)
                                  for text in asked]
        best, reaches = {}, chance(model, tokenizer, memory)

        def by_memory(asked, look):
            found = ranked(model, tokenizer, memory, encoded, asked, interleave, config.batch, look)
            best.update((text, score) for text, (*_, score) in zip(asked, found))
            return [pair for *pair, _ in found]
        documents = owner[count - 1] + 1
        say(f"{name} {split}: {documents:,} documents" + f" in {count:,} passages" * (documents < count)
            + f", {tokens:,} tokens; {len(questions):,} questions, of which {len(chosen):,} are answered")
        finders = dict(bm25=by_words, memory=partial(by_memory, look=model.config.second_look))
        if model.config.second_look:
            finders["routing"] = partial(by_memory, look=0)
        measured = measure(questions, chosen, finders, read, ks, config.seed, owner, texts, config.batch,
                           looked)
        say("\n".join(table(measured)), flush=True)
        told = told_not_found(questions, finders["memory"], read, ks, config.batch)
        for k, share in told.items():
            say(f"k {k}: told \"{NOT_FOUND}\" of the questions that nothing answers: {share:.3f}")
        shares = refused(questions, best, reaches)
        for share, what in zip(shares, ("have an answer", "nothing answers")):
            if share is not None:
                say(f"refused of the questions that {what}: {share:.3f} (chance reaches {reaches:.3f})")
        about = dict(set=name, split=split, memory_tokens=tokens, documents=documents, questions=len(chosen),
                     questions_of_recall=sum(question.gold != () for question in questions))
        yield [about | row | dict(seed=config.seed, top_k=most, routing_keys=config.routing_keys,
                                  max_rounds=rounds_asked(model, interleave, model.config.second_look),
                                  checkpoint=config.checkpoint, device=str(model.device),
                                  refused=shares[0], refused_rightly=shares[1],
                                  not_found_rightly=told.get(row["k"] or ks[0])
                                  if row["method"] == "memory" else None)
               for row in measured]


def script():
    config = command_line(EvalConfig, __doc__)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    given = [path for path in config.beside.split(",") if path]
    sets = [config.data, *filter(None, config.distractors.split(","))]
    inputs = [*sets, *given, *(file for path in sets for file in set_files(path))]
    check_output("--json", config.json, *inputs)
    check_output("--plot", config.plot, config.json, *inputs)
    for flag in ("json", "plot", "memory", "data"):
        check_outside(f"--{flag}", getattr(config, flag), config.documents)
    for flag in ("json", "plot"):
        check_outside(f"--{flag}", getattr(config, flag), config.memory, "--memory")
    check_drawing(config.plot)
    names = [Path(path).stem for path in given]
    beside = {name if names.count(name) == 1 else path: read_results(path)
              for name, path in zip(names, given)}
    if beside and not config.plot:
        raise UserError("--beside is drawn by --plot; give --plot curve.png, or leave it out")
    model, tokenizer, on = open_checkpoint(config.checkpoint, config.device, config.dtype)
    if config.compile:
        compile_blocks(model)
    model.config.top_k = config.top_k or model.config.top_k
    if config.memory and is_bank(config.memory) and model.trained_routers:
        # better known before minutes of counting tokens
        check_fingerprint(read_manifest(config.memory)[0], config.memory, model, tokenizer)
    ranks = Ranks(model.device, config.timeout)
    say = print if ranks.rank == 0 else lambda *_, **__: None
    evaluate, rows = evaluate_set if config.data else evaluate_task, []
    with torch.no_grad():
        for measured in evaluate(model, tokenizer, config, ranks, say, on):
            rows += measured
            if config.json and ranks.rank == 0:
                write_json(config.json, rows)  # after every length: long runs end early
    ranks.end()
    if config.plot and ranks.rank == 0:
        plot_set(rows, config.plot) if config.data else plot(rows, config.plot, beside)


if __name__ == "__main__":
    main(script)
