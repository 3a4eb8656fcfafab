"""Accuracy of a checkpoint as its memory grows.

    python eval.py --task niah_multikey --lengths 16k,64k,256k,1m --questions 200 --seed 1 --json FILE --plot FILE.png

Tasks (keys that were never seen in training as a pair; documents as in prepare_data.py):

    niah_single     one needle among distinct noise documents
    niah_multikey   every document a needle with a key of its own
    two_hop         chains: the first document names the key of the second; all documents look alike

Lengths are nested prefixes of one memory (k = 1,024 tokens, numbers and punctuation of documents counted), encoded once;
the same questions are asked at every length. recall@k: gold documents among the first k of the ranking by mean routing
score, nothing forced, union over rounds. top-1: gold documents that ranked first, among those not yet appended, in some round.
"""
import dataclasses
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import UserError, atomic_file, autocast, command_line, detect_device, main, write_json
from model import Memory
from prepare_data import TASKS, Words, make_memory
from sample import InterleaveConfig, answer_question, encode_texts, load_checkpoint


@dataclass
class EvalConfig:
    checkpoint: str = "checkpoints/demo"    # folder that train.py wrote
    task: Literal["niah_single", "niah_multikey", "two_hop"] = "niah_multikey"
    lengths: str = "16k,64k,256k,1m"        # tokens of memory, comma-separated, k or m behind a number
    questions: int = 200                    # asked at every length; their documents lie in the shortest memory
    seed: int = 1                           # of documents and questions
    json: str = ""                          # write the rows to this file
    plot: str = ""                          # draw them to this .png
    top_k: int = 0                          # documents that a layer selects; 0: the checkpoint's own
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    interleave: tyro.conf.OmitArgPrefixes[InterleaveConfig] = field(default_factory=InterleaveConfig)

    def __post_init__(self):
        parse_lengths(self.lengths)
        if self.questions < 1:
            raise UserError(f"--questions is {self.questions}; it must be at least 1")
        if self.top_k < 0:
            raise UserError(f"--top-k is {self.top_k}; it must be at least 1 (or 0 for the checkpoint's own)")


def parse_lengths(text):
    """"16k,1m" -> [16384, 1048576]. Raises UserError."""
    lengths = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)([km]?)", part.strip().lower())
        if not match or int(match[1]) == 0:
            raise UserError(f"--lengths {text}: '{part}' is not a length; write tokens as 500, 16k or 1m, with commas between")
        lengths.append(int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2]])
    return sorted(set(lengths))


def document_lengths(tokenizer, texts, numbers):
    """Tokens of each spelled document, without spelling it."""
    empty = [len(tokenizer.document(n, [])) for n in numbers]
    return np.array([len(text) for text in texts]) + np.array(empty)


def build(words, tokenizer, config, lengths):
    """The longest memory and its questions: (texts as ids, questions, documents of each length).

    For `niah_single`, texts begin with the needles; otherwise the documents that answer are shuffled into the shortest memory.
    """
    average = len(tokenizer.document(100_000, tokenizer.encode(make_memory(words, config.task, 64, 1, config.seed)[0][1])))
    count = config.questions * 2 + lengths[-1] // average
    while True:
        documents, questions = make_memory(words, config.task, count, config.questions, config.seed)
        texts = tokenizer.encode_batch(documents)
        ends = document_lengths(tokenizer, texts, range(len(texts))).cumsum()
        first = config.questions if config.task == "niah_single" else 0
        if ends[-1] - (ends[first - 1] if first else 0) >= lengths[-1]:
            break
        count += count // 10 + 1
    if config.task != "niah_single":
        shortest = int(lengths[0] // (ends[:4096].max() // min(len(ends), 4096) + 2))  # documents that are surely in it
        gold = max(max(q.gold) for q in questions) + 1
        if gold > shortest:
            raise UserError(f"--lengths {config.lengths}: the shortest memory holds about {shortest} documents, but {config.questions} "
                            f"questions of {config.task} need {gold}; ask fewer --questions or begin with a longer memory")
        place = np.random.default_rng(config.seed).permutation(shortest)  # document i moves to place[i]
        shuffled = list(texts)
        for i, to in enumerate(place):
            shuffled[to] = texts[i]
        texts = shuffled
        questions = [dataclasses.replace(q, gold=tuple(int(place[i]) for i in q.gold)) for q in questions]
    return texts, questions


def prefixes(tokenizer, texts, lengths):
    """How many first documents fit into each length, and their tokens."""
    ends = document_lengths(tokenizer, texts, range(len(texts))).cumsum()
    counts = [max(1, int(np.searchsorted(ends, length, side="right"))) for length in lengths]
    return counts, [int(ends[count - 1]) for count in counts]


def score(question, rounds, answer, place, top_k):
    """(recall@k, top-1, exact match) of one answered question; `place`: gold documents by number."""
    ranked, first, seen = set(), set(), set()
    for r in rounds:
        ranked |= {n for n, _ in r.routed[:top_k]}
        first |= {n for n, _ in [pair for pair in r.routed if pair[0] not in seen][:1]}
        seen |= set(r.appended)
    gold = set(place)
    return len(gold & ranked) / len(gold), len(gold & first) / len(gold), float(answer.strip() == question.answer)


def ask_all(model, tokenizer, memory_of, texts_of, questions, golds, config, label):
    """Ask every question of its memory; returns mean (recall@k, top-1, exact match) and seconds per question."""
    scores, seconds = [], 0.0
    for i, question in enumerate(tqdm(questions, desc=label, unit="question", leave=False, delay=1)):
        memory, texts = memory_of(i), texts_of(i)
        began = time.perf_counter()
        answer, rounds = answer_question(model, tokenizer, memory, texts, question.text, config.interleave)
        seconds += time.perf_counter() - began
        scores.append(score(question, rounds, answer, golds[i], model.config.top_k))
    return *np.mean(scores, 0).tolist(), seconds / len(questions)


def plot(rows, path):
    """Accuracy against memory tokens."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install -e '.[plot]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("exact_match", "exact match"), ("recall_at_k", f"router recall@{rows[0]['top_k']}"), ("router_top1", "router top-1")):
        axes.plot([row["memory_tokens"] for row in rows], [row[name] for row in rows], "o-", label=label)
    axes.plot([row["memory_tokens"] for row in rows], [min(1, row["top_k"] / row["documents"]) for row in rows], "k:", label="recall@k by chance")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="tokens of memory", ylabel="share of questions",
             title=f"{rows[0]['task']}, {rows[0]['questions']} questions, seed {rows[0]['seed']}")
    axes.legend()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


def script():
    config = command_line(EvalConfig, __doc__)
    device, dtype, reason = detect_device(config.device, config.dtype)
    model, tokenizer = load_checkpoint(config.checkpoint, device)
    model.config.top_k = config.top_k or model.config.top_k
    lengths, words = parse_lengths(config.lengths), Words()
    texts, questions = build(words, tokenizer, config, lengths)
    needles = []
    if config.task == "niah_single":  # a question's memory is the noise with its own needle in the middle of the shortest
        needles, texts = texts[:config.questions], texts[config.questions:]
        hole = prefixes(tokenizer, texts, lengths[:1])[0][0] // 2
        texts.insert(hole, needles[0])
    counts, tokens = prefixes(tokenizer, texts, lengths)
    texts = texts[:counts[-1]]
    print(f"{config.task}: {len(texts):,} documents, {tokens[-1]:,} tokens; device: {device} ({reason})")
    rows = []
    with torch.no_grad(), autocast(device, dtype):
        memory, speed = encode_texts(model, tokenizer, texts)
        if needles:
            needle_memories = [model.encode([torch.tensor(tokenizer.document(hole, needle))], [hole]) for needle in needles]
            behind = memory.suffix(hole + 1)
        print(f"{'tokens':>10} {'documents':>9} {'recall@' + str(model.config.top_k):>9} {'top-1':>6} {'exact':>6} {'s/question':>10}")
        for length, count, size in zip(lengths, counts, tokens):
            if needles:
                part = behind.prefix(count - hole - 1)
                def memory_of(i): return Memory.cat([memory.prefix(hole), needle_memories[i], part])
                def texts_of(i): return texts[:hole] + [needles[i]] + texts[hole + 1:count]
                golds = [(hole,)] * len(questions)
            else:
                whole = memory.prefix(count)
                def memory_of(i): return whole
                def texts_of(i): return texts
                golds = [q.gold for q in questions]
            recall, top1, exact, seconds = ask_all(model, tokenizer, memory_of, texts_of, questions, golds, config, f"{size:,} tokens")
            rows.append(dict(task=config.task, memory_tokens=size, documents=count, questions=len(questions), top_k=model.config.top_k,
                             recall_at_k=recall, router_top1=top1, exact_match=exact, seconds_per_question=round(seconds, 5),
                             encode_tokens_per_second=round(speed), seed=config.seed, max_rounds=config.interleave.max_rounds,
                             router_weight=config.interleave.router_weight, checkpoint=config.checkpoint, device=str(device)))
            print(f"{size:>10,} {count:>9,} {recall:>9.3f} {top1:>6.3f} {exact:>6.3f} {seconds:>10.3f}", flush=True)
            if config.json:
                write_json(config.json, rows)  # after every length: long runs end early
    print(f"{len(questions)} questions, seed {config.seed}; encoded {speed:,.0f} tokens/s")
    if config.plot:
        plot(rows, config.plot)


if __name__ == "__main__":
    main(script)
