"""Ask a memory: encode documents, then answer questions and name the sources.

    python sample.py --documents texts "Who built the lighthouse?"
    python sample.py --checkpoint checkpoints/demo --documents examples     # no question: asks for them
    python sample.py --documents examples --trace "..."             # what was routed to, named, appended
    python sample.py --memory bank --documents examples "..."       # bring a bank in line first
    python sample.py --memory bank "..."                            # ask the bank as it is
    python sample.py --memory bank --questions questions.jsonl --json answers.json     # many, side by side
    torchrun --nproc_per_node=2 sample.py --memory bank "..."       # its documents spread over two processes

A checkpoint is a folder (of train.py, a Llama or Qwen3 backbone, the authors' MSA-4B), a .gguf file or a
name on the Hugging Face Hub.
"""
import contextlib
import importlib
import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from checkpoint import SMOLLM2, packaged
from common import (
    UserError,
    check_least,
    check_output,
    check_outside,
    command_line,
    encoding_of,
    keep_freed_memory,
    main,
    parts_of,
    printable,
    read_rows,
    write_json,
)
from documents import check_documents, documents_size, list_documents, read_documents, tell_skipped
from interleave import (
    InterleaveConfig,
    answer_questions,
    check_lengths,
    context_of,
    interleave,
    most_tokens,
)
from memory_bank import Bank, Writer
from memory_parallel import ParallelMemory, Ranks
from model import compile_blocks
from prompts import NOT_FOUND, open_checkpoint
from question_sets import question_text
from routers import chance, make_routers
from sync import bank_routers, check_fingerprint, describe, encode_texts, sync

TRACED = 16  # documents that --trace prints of a round's ranking
# Words that say nothing about where an answer comes from
COMMON_WORDS = frozenset("""a about all also an and any are as at be been both but by can could did do does
    for from had has have he her his how i if in into is it its may more no not of on one or our she should so
    some than that the their them then there these they this to was we were what when where which who why will
    with would yes you your""".split())


@dataclass
class SampleConfig:
    # without one, they are read from the terminal
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[QUESTION]")] = ""
    # a folder, a .gguf file, or "owner/name" on the Hugging Face Hub; empty: checkpoints/smollm2 where `make
    # ask` has installed what it was trained from, else checkpoints/demo
    checkpoint: str = ""
    documents: str = ""                   # a folder of texts, pages and PDFs, or one; or a .jsonl file
    max_document_tokens: int = 0          # longer files are split at paragraphs; 0: as in training
    memory: str = ""                      # folder of a memory bank: documents are encoded once for all runs
    info: bool = False                    # print what the bank holds
    verify: bool = False                  # check every checksum of the bank
    remove: bool = False                  # more than half of the bank may go where --documents lacks it
    compact: bool = False                 # rewrite the bank without its deleted documents
    content: Literal["bfloat16", "int8"] = "bfloat16"       # how a new bank stores keys and values
    content_in: Literal["disk", "host"] = "disk"            # where they are: read when needed, or held in RAM
    routing_keys: Literal["bfloat16", "int8"] = "bfloat16"  # as the device holds them
    questions: str = ""                   # .jsonl file: asks the "question" of every line, for --json
    json: str = ""                        # writes here a list of question, answer, documents
    batch: int = 8                        # questions of the file that are asked side by side
    timeout: float = 60                   # seconds that ranks wait for each other
    trace: bool = False                   # print each round: routed to, named, appended
    seed: int = 1337                      # of sampling
    compile: bool = False                 # blocks by torch.compile, answers by CUDA graphs: fewer launches
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and matrix products
    interleave: tyro.conf.OmitArgPrefixes[InterleaveConfig] = field(default_factory=InterleaveConfig)

    def __post_init__(self):
        check_least(self, ("timeout",), max_document_tokens=0, seed=0, batch=1)
        if self.max_document_tokens and not self.documents:
            raise UserError("--max-document-tokens is about --documents; give them, or leave it out")
        if bool(self.questions) != bool(self.json):
            raise UserError("--questions FILE.jsonl and --json OUT belong together; give both or neither")
        if self.question and not self.question.strip():
            raise UserError("QUESTION is blank; ask something, or leave it out to type questions")
        if self.questions and self.question:
            raise UserError("--questions has the questions; leave out the one that is not in the file")
        for name in ("info", "verify", "compact", "remove", "content", "content_in", "routing_keys"):
            if getattr(self, name) != getattr(type(self), name) and not self.memory:
                raise UserError(f"--{name.replace('_', '-')} is about a bank on disk; name it with --memory")
        if self.remove and not self.documents:
            raise UserError("--remove is about what --documents lacks; give --documents, or leave it out")
        if self.trace and self.questions:
            raise UserError("--trace is about questions that are answered one by one; leave out --questions, "
                            "or --trace")


def sources_of(answer, question, texts):
    """Of documents, the best first, those that the words of an answer come from.

    texts: number -> text, the best first. A document counts that holds at least half as many of the answer's
    words as the one that holds most: without COMMON_WORDS, and without the question's unless the answer has
    no others. Where no document holds any, all of them are returned.
    """
    words_of = lambda text: {*re.findall(r"\w+", text.lower())} - COMMON_WORDS
    words = words_of(answer) - words_of(question) or words_of(answer)
    held = {number: len(words & words_of(text)) for number, text in texts.items()}
    most = max(held.values(), default=0)
    return sorted((n for n in held if 2 * held[n] >= most), key=lambda n: -held[n])


def position_of(memory, number):
    """The place in a memory of the document with this number."""
    return int(np.searchsorted(memory.numbers, number))


def shown(text):
    """Lines of a text as a terminal may show them."""
    return "\n".join(map(printable, text.split("\n")))


def show(model, tokenizer, memory, texts, where, question, config, reaches, say=print):
    """Stream one answer to the terminal, then its sources; or say that there is none, where the best score is
    not above what chance reaches. where(position): where a document comes from."""
    place = lambda number: position_of(memory, number)
    appended, ranked, answer = [], [], ""  # ranked: the first round's documents, the best first
    for event in interleave(model, tokenizer, memory, texts, question, config.interleave):
        if isinstance(event, str):
            say(shown(event), end="", flush=True)
            answer += event
            continue
        appended += event.appended
        if not ranked:
            best, ranked = best_score(event.routed), [n for n, _ in event.routed]
        if config.trace:
            say("round: routed to " + ", ".join(f"[{n}] {score:.3f}" for n, score in event.routed[:TRACED]))
            say("       named " + (", ".join(f"[{n}]" for n in event.named) or "nothing: end of retrieval"))
            for n in event.appended:
                say(f"       appended [{n}] {where(place(n))}: {shown(tokenizer.decode(texts[place(n)]))}")
        if best <= reaches:
            say(f"Nothing in these documents answers this (best score {best:.2f}, chance reaches "
                f"{reaches:.2f}).\n  [{ranked[0]}] {where(place(ranked[0]))} is the nearest")
            return
    say("" if answer else "(no answer)")
    if answer.strip() == NOT_FOUND:
        return
    how = "" if appended else " (read in the memory; no text was appended)"
    for n in cited(model, tokenizer, memory, texts, question, answer, appended, ranked):
        say(f"  [{n}] {where(place(n))}{how}")


def best_score(routed):
    """The best routing score of a round; a second look may have put another document first."""
    return max((score for _, score in routed), default=float("inf"))


def cited(model, tokenizer, memory, texts, question, answer, appended, ranked):
    """The numbers of the documents that an answer rests on: of the appended ones, or, where none is and the
    memory was read, the best of `ranked`, the first round's, the best first."""
    if not appended and model.config.attend_memory:
        return ranked[:1]
    if model.config.prompts != "chat":  # it names what it wants, perhaps in two rounds
        return [*dict.fromkeys(appended)]
    order = [n for n in ranked if n in appended] + [n for n in appended if n not in ranked]
    return sources_of(answer, question, {n: tokenizer.decode(texts[position_of(memory, n)]) for n in order})


def ask_all(model, tokenizer, memory, texts, where, questions, config, reaches):
    """What --json holds of questions: the answer to each, None where the best score is not above what chance
    reaches, and the documents that it rests on."""
    rows = []
    answers = answer_questions(model, tokenizer, memory, texts, questions, config.interleave, config.batch)
    for question, (answer, rounds) in zip(questions, answers):
        routed = rounds[0].routed if rounds else []
        appended = [n for one in rounds for n in one.appended]
        documents = cited(model, tokenizer, memory, texts, question, answer, appended, [n for n, _ in routed])
        if best_score(routed) <= reaches:
            answer, documents = None, []
        elif answer.strip() == NOT_FOUND:
            documents = []
        sources = [dict(number=n, source=where(position_of(memory, n))) for n in documents]
        rows.append(dict(question=question, answer=answer, documents=sources))
    return rows


def open_bank(model, tokenizer, config, ranks, say, on):
    """Do to the bank what the flags ask for. Returns a ParallelMemory, or None where nothing is asked of it.

    say: print, of rank 0 only; on: the device and why it was chosen, as text.
    """
    if config.documents:
        check_documents(config.documents)
        check_outside("--memory", config.memory, config.documents)
        skipped, longest = {}, config.max_document_tokens
        if not model.trained_routers:
            texts = lambda: [document.spelled() for document in list_documents(
                config.documents, tokenizer.count, longest, lambda _: None)]
            bank_routers(model, tokenizer, config.memory, texts, ranks, config.content)
        size = documents_size(config.documents)
        try:
            documents = read_documents(config.documents, tokenizer.count, longest, skipped)
            done = sync(model, tokenizer, config.memory, documents, ranks, config.content, size, skipped,
                        config.remove)
        finally:
            tell_skipped(skipped, say)
        say(f"{config.memory}: {done} on {on}")
    if not model.trained_routers:
        bank_routers(model, tokenizer, config.memory, None, ranks)
    bank = Bank(config.memory)
    check_fingerprint(bank.layout, config.memory, model, tokenizer)
    progress = dict(unit="B", unit_scale=True, delay=1)
    if config.compact and ranks.rank == 0:
        with Writer(config.memory) as writer, tqdm(desc="compacting", **progress) as bar:
            writer.compact(bar.update)
            bank = writer.bank
    if config.verify and ranks.rank == 0:
        total = sum(segment.entry["bytes"] for segment in bank.segments)
        with tqdm(desc="verifying", total=total, **progress) as bar:
            bank.verify(bar.update)
        say(f"{config.memory}: {total:,} bytes, every checksum is right")
    ranks.wait("checked")
    if config.info:
        say(describe(bank))
    asks = config.question or config.questions
    if not asks and (config.info or config.verify or config.compact):
        return None
    if not len(bank):
        raise UserError(f"{config.memory}: holds no documents; bring some with --documents")
    total = int(bank.chunks.sum()) * bank.layout.chunk_bytes()[0] // ranks.world
    with tqdm(desc="opening", total=total, disable=ranks.rank > 0, **progress) as bar:
        return ParallelMemory(bank, model.device, ranks, config.routing_keys, config.content_in, bar.update)


def hold_in_ram(model, tokenizer, config, say, on):
    """The documents, encoded: (memory, texts, where), as for `show`. say, on: as for `open_bank`."""
    documents = list_documents(config.documents, tokenizer.count, config.max_document_tokens, say)
    spelled = [document.spelled() for document in documents]
    if not model.trained_routers:
        make_routers(model, tokenizer, spelled)
    texts = tokenizer.encode_batch(spelled)
    memory, speed = encode_texts(model, tokenizer, texts)
    tokens = sum(map(len, texts))
    say(f"{len(documents)} documents, {tokens:,} tokens, encoded at {speed:,.0f} tokens/s on {on}")
    return memory, texts, lambda position: documents[position].where()


def questions_of(config):
    """The questions of --questions, and file and line of each. Raises UserError."""
    questions, where = [], []
    for line, row in read_rows(Path(config.questions)):
        where.append(f"{config.questions}:{line}")
        questions.append(question_text(row, "question", where[-1]))
    if not questions:
        raise UserError(f"{config.questions}: no question in it")
    return questions, where


def script():
    config = command_line(SampleConfig, __doc__, takes_file=False)
    if not config.documents and not config.memory:
        raise UserError("--documents is missing; give a folder of texts, such as --documents examples, "
                        "or a bank (--memory)")
    keep_freed_memory()
    check_outside("--questions", config.questions, config.documents)
    questions, lines = questions_of(config) if config.questions else ([], None)
    check_output("--json", config.json, config.questions, config.documents)
    check_outside("--json", config.json, config.documents)
    check_outside("--json", config.json, config.memory, "--memory")
    default = "checkpoints/smollm2" if packaged(SMOLLM2) else "checkpoints/demo"
    torch.manual_seed(config.seed)
    model, tokenizer, on = open_checkpoint(config.checkpoint or default, config.device, config.dtype)
    if config.compile:
        compile_blocks(model)
    config.max_document_tokens = config.max_document_tokens or model.config.max_document_tokens
    if model.config.prompts == "chat" and config.max_document_tokens > most_tokens(model):
        raise UserError(f"--max-document-tokens is {config.max_document_tokens:,}; this model reads "
                        f"{context_of(model):,} tokens at once, and takes documents of half as many at most")
    ranks = Ranks(model.device, config.timeout)
    check_lengths(model, tokenizer, questions or [config.question], lines)
    say = print if ranks.rank == 0 else lambda *_, **__: None
    if not config.checkpoint and default == "checkpoints/demo":
        say("asking checkpoints/demo, which knows synthetic sentences alone; `make ask` brings a real model")
    if config.memory:
        memory = open_bank(model, tokenizer, config, ranks, say, on)
        if memory is None:
            return ranks.end()
        texts = memory.texts
        where = lambda position: printable(memory.bank.document(position)[1])  # others may have made the bank
    else:
        memory, texts, where = hold_in_ram(model, tokenizer, config, say, on)
    about, reaches = (model, tokenizer, memory, texts, where), chance(model, tokenizer, memory)

    def ask(question):
        nonlocal reaches
        if config.memory:
            bank = memory.bank
            memory.refresh()  # it may have changed since the last question
            if memory.bank is not bank:
                reaches = chance(model, tokenizer, memory)
            if not len(memory):
                raise UserError(f"{config.memory}: holds no documents any more; bring some with --documents")
        show(*about, question, config, reaches, say)

    if config.questions:
        rows = []
        for part in parts_of(questions, 2 * config.batch, "answering", "question"):
            rows += ask_all(*about, part, config, reaches)
            if ranks.rank == 0:
                write_json(config.json, rows)  # each time: long runs end early
        say(f"{config.json}: {len(rows):,} answers")
    elif config.question:
        ask(config.question)
    else:
        ask_typed(model, tokenizer, ranks, ask, say)
    ranks.end()


def ask_typed(model, tokenizer, ranks, ask, say):
    """Ask what is typed, one question after another; an error ends its question only, so that what is in RAM
    is not lost. With several ranks an error of `ask` is raised: one may have failed where others did not."""
    for question in typed_questions(ranks):
        asking = False
        try:
            check_lengths(model, tokenizer, [question])
            asking = True
            ask(question)
        except (UserError, KeyboardInterrupt) as error:
            if asking and ranks.world > 1:
                raise
            say(f"error: {printable(str(error)) or 'interrupted'}")


def typed_questions(ranks):
    """Yields on every rank what is typed at rank 0's terminal, until its end."""
    if sys.stdin is None:
        raise UserError("nothing can be typed here: give a QUESTION, or --questions FILE.jsonl --json OUT")
    if ranks.rank == 0 and hasattr(sys.stdin, "reconfigure"):
        if sys.stdin.isatty():
            typed = {}
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # `input` then knows arrow keys and what was typed before
        else:
            typed = dict(encoding=encoding_of(sys.stdin.buffer.peek(), "stdin"))
        sys.stdin.reconfigure(errors="replace", **typed)
    for turn in itertools.count():
        question = ""
        try:
            while ranks.rank == 0 and not question:
                question = input("question> ").strip()
                if "\ufffd" in question or "\0" in question:
                    print(f"not a text: {question!a}; ask again")
                    question = ""
        except (EOFError, KeyboardInterrupt):
            print()
            question = None
        question = ranks.tell(f"question/{turn}", question)
        if question is None:
            return
        yield question


if __name__ == "__main__":
    main(script)
