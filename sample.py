"""Ask a memory: encode documents, then answer questions and name the sources.

    python sample.py --documents examples "What is the special magic number for gentle-otter?"
    python sample.py --checkpoint out/demo --documents examples          # no question: asks for them
    python sample.py --documents examples --trace "..."                  # what was routed to, named, appended
    python sample.py --memory bank --documents examples "..."            # bring a bank on disk in line with the folder, then ask it
    python sample.py --memory bank "..."                                 # ask the bank as it is
    torchrun --nproc_per_node=2 sample.py --memory bank "..."            # its documents spread over two processes

A checkpoint is a folder: of train.py, a Llama or Qwen3 backbone, the authors' MSA-4B; or a name on the Hugging Face Hub.
"""
import collections
import contextlib
import hashlib
import itertools
import time
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import memory_bank
from checkpoint import find
from common import UserError, command_line, detect_device, keep_freed_memory, main
from documents import documents_size, read_documents
from interleave import InterleaveConfig, interleave
from memory_bank import Bank, Layout, Writer, write_segment
from memory_parallel import ParallelMemory, Ranks, to_records
from model import MSA
from prompts import load_tokenizer


@dataclass
class SampleConfig:
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[QUESTION]")] = ""  # without one, they are read from the terminal
    checkpoint: str = "checkpoints/demo"                 # folder of a checkpoint, or "owner/name" on the Hugging Face Hub
    documents: str = ""                                  # folder of .txt and .md files, or a .jsonl file of id, title, text
    max_document_tokens: int = 128                       # longer files are split at paragraphs; the demo model knows short ones
    memory: str = ""                                     # folder of a memory bank: documents are encoded once, not by every run
    info: bool = False                                   # print what the bank holds
    verify: bool = False                                 # check every sum of the bank
    compact: bool = False                                # rewrite the bank without its deleted documents
    content: Literal["bfloat16", "int8"] = "bfloat16"    # how a new bank stores keys and values
    content_in: Literal["disk", "host"] = "disk"         # where they are while the bank is asked: read when needed, or held in RAM
    routing_keys: Literal["bfloat16", "int8"] = "bfloat16"  # as the device holds them
    timeout: float = 60                                  # seconds that ranks wait for each other
    trace: bool = False                                  # print each round: routed to, named, appended
    seed: int = 1337                                     # of sampling
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and matrix products
    interleave: tyro.conf.OmitArgPrefixes[InterleaveConfig] = field(default_factory=InterleaveConfig)

    def __post_init__(self):
        if self.max_document_tokens < 1:
            raise UserError(f"max_document_tokens is {self.max_document_tokens}; it must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be at least 0")
        if not self.timeout > 0:
            raise UserError(f"timeout is {self.timeout}; it must be positive")
        for name in ("info", "verify", "compact"):
            if getattr(self, name) and not self.memory:
                raise UserError(f"--{name} is about a bank on disk; name it with --memory")


@torch.no_grad()
def encode_texts(model, tokenizer, texts, numbers=None):
    """Encode documents given as token ids of their texts, with a progress bar. Returns (Memory, tokens per second)."""
    numbers = range(len(texts)) if numbers is None else numbers
    spelled = [torch.tensor(tokenizer.document(n, text)) for n, text in zip(numbers, texts)]
    with tqdm(desc="encoding", total=sum(map(len, spelled)), unit=" tokens", unit_scale=True, delay=1) as bar:
        memory = model.encode(spelled, numbers, progress=bar.update)
        return memory, bar.n / max(bar.format_dict["elapsed"], 1e-9)


def load_checkpoint(name, device, dtype=torch.float32):
    """(model, tokenizer) of a checkpoint, weights in `dtype`. Raises UserError when they do not belong together."""
    folder = find(name)
    model = MSA.from_pretrained(folder, device, dtype)
    return model, load_tokenizer(folder, model.config)


# ---------------------------------------------------------------------------------------------------------------------
# A bank on disk

ENCODE_TOKENS = 65536   # that a rank encodes between two looks at the others
COMMIT_SECONDS = 60     # at most so long is what an interruption loses


def fingerprint(model, tokenizer):
    return f"{model.fingerprint()}-{tokenizer.fingerprint()}"


def bank_layout(model, tokenizer, content="bfloat16"):
    """What a bank of this model holds."""
    config = model.config
    return Layout(fingerprint(model, tokenizer), len(config.memory_layers), config.num_key_value_heads, config.head_dim, content,
                  config.normalize_routing)


def check_fingerprint(layout, folder, model, tokenizer):
    """Raises UserError for a bank that another model or tokenizer has made."""
    own = fingerprint(model, tokenizer)
    if layout.fingerprint != own:
        part = "model or chunk size" if layout.fingerprint[:16] != own[:16] else "tokenizer"
        raise UserError(f"{folder}: made by another {part} ({layout.fingerprint}) than this checkpoint ({own}); give its checkpoint, "
                        "or another --memory to encode the documents again")


def hash64(*parts):
    """Strings -> an unsigned 64-bit number."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


class Changes:
    """What a stream of documents changes in a bank."""

    def __init__(self, bank):
        self.bank, self.order, self.seen = bank, np.argsort(bank.keys), np.zeros(len(bank), bool)
        self.keys, self.following = bank.keys[self.order], itertools.count(bank.next_number)
        self.counts = dict(added=0, updated=0, removed=0, unchanged=0)

    def compare(self, group):
        """The next documents: what must be encoded, a list of (number, document, (key, digest)); and the numbers of those that are held."""
        keys, due, replaced = np.array([hash64(document.id) for document in group], np.uint64), [], []
        for document, key, at in zip(group, keys, np.searchsorted(self.keys, keys)):
            number, digest = document.number, hash64(document.id, document.where(), document.text)
            held = at < len(self.keys) and self.keys[at] == key
            if held:
                position = self.order[at]
                if number not in (None, int(self.bank.numbers[position])):
                    raise UserError(f"{self.bank.folder}: holds {document.id!r} as [{self.bank.numbers[position]}], not [{number}]; "
                                    "give another --memory")
                if self.seen[position]:
                    raise UserError(f"two documents have the id {document.id.partition('#')[0]!r}; ids must differ")
                number, self.seen[position] = int(self.bank.numbers[position]), True
                if int(self.bank.digests[position]) == digest:
                    self.counts["unchanged"] += 1
                    continue
                replaced.append(number)
            self.counts["updated" if held else "added"] += 1
            due.append((next(self.following) if number is None else number, document, (int(key), digest)))
        for what, of in (("number", lambda entry: entry[0]), ("id", lambda entry: entry[1].id)):
            for twice in [value for value, n in collections.Counter(map(of, due)).items() if n > 1]:
                raise UserError(f"two documents have the {what} {str(twice).partition('#')[0]!r}; {what}s must differ")
        return due, replaced

    def gone(self):
        """The numbers of documents that have not come."""
        self.counts["removed"] = int((~self.seen).sum())
        return self.bank.numbers[~self.seen].tolist()


@torch.no_grad()
def sync(model, tokenizer, folder, documents, ranks, content="bfloat16", size=0):
    """Bring the bank `folder` in line with a stream of Documents: new ones are added, changed ones encoded again under their old number,
    those that do not come are removed; nothing else is touched. A bank that is not there is made. Collective.

    Documents are the same when their `id` is, unchanged when text and place are too. The ranks share the encoding; what is done is
    committed when a segment is full or a minute has passed, and is not done again after an interruption. size: bytes of all texts,
    for the time left. Returns a sentence that says what was done. Raises UserError, among others for ids or numbers given twice.
    """
    first, began = ranks.rank == 0, time.monotonic()
    with (Writer(folder, bank_layout(model, tokenizer, content)) if first else contextlib.nullcontext()) as writer:
        ranks.wait("made")  # the others, until there is a bank
        bank = ranks.same(Bank(folder))
        check_fingerprint(bank.layout, folder, model, tokenizer)
        changes, stream, committed = Changes(bank), groups(documents, ENCODE_TOKENS * ranks.world), began
        pieces, replaced, encoded = [], [], 0

        def commit(removed):
            entries = [write_segment(folder, bank.layout, memory_bank.join(pieces))] if pieces else []
            entries = [entry for part in ranks.gather_objects(entries) for entry in part]
            if first and (entries or removed):
                writer.commit(entries, removed)
                writer.merge()
            pieces.clear()

        with tqdm(desc="encoding", total=size or None, unit="B", unit_scale=True, delay=1, disable=not first) as bar:
            while True:
                group = next(stream, [])
                due, held = changes.compare(group)
                late = sum(map(memory_bank.size_of, pieces)) >= memory_bank.SEGMENT_BYTES or time.monotonic() - committed > COMMIT_SECONDS
                seen = hash64(*(f"{number} {ids}" for number, _, ids in due)) >> 1
                reports = ranks.gather(torch.tensor([late, len(group), seen], device=ranks.device))
                if (reports[:, 1:] != reports[0, 1:]).any():
                    raise UserError("the ranks read different documents; --documents must be the same for all of them")
                if reports[:, 0].any() or not group:
                    commit(replaced + (changes.gone() if not group else []))
                    replaced, committed = [], time.monotonic()
                if not group:
                    break
                replaced += held  # with what is encoded now, in one change
                due = sorted(due[ranks.rank::ranks.world], key=lambda x: x[0])
                if due:
                    numbers, changed, ids = zip(*due)
                    texts = tokenizer.encode_batch([document.text for document in changed])
                    memory = model.encode([torch.tensor(tokenizer.document(n, text)) for n, text in zip(numbers, texts)], numbers)
                    pieces.append(to_records(memory, texts, [document.where() for document in changed], ids, bank.layout.content))
                    encoded += sum(map(len, texts))
                bar.update(sum(len(document.text.encode()) for document in group))
                bar.set_postfix_str(f"{encoded * ranks.world / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
    ranks.wait("written")
    encoded, spent = int(ranks.sum(torch.tensor(encoded, device=ranks.device))), time.monotonic() - began
    return (", ".join(f"{n:,} {what}" for what, n in changes.counts.items() if n or what == "added")
            + (f"; {encoded:,} tokens encoded at {encoded / spent:,.0f} tokens/s" if encoded else ""))


def groups(documents, size):
    """Lists of documents of about `size` tokens each, four characters to a token."""
    batch, total = [], 0
    for document in documents:
        batch.append(document)
        total += len(document.text) // 4 + 1
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def describe(bank):
    """What a bank holds, in a few lines."""
    scales = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
    size = lambda n: next(f"{n / scale:,.1f} {unit}" for scale, unit in scales if n >= scale or scale == 1)
    layout, chunks = bank.layout, int(bank.chunks.sum())
    (whole, content), (rounded, _) = layout.chunk_bytes(), layout.chunk_bytes("int8")
    on_disk = sum(segment.entry["bytes"] for segment in bank.segments)
    return "\n".join([
        f"documents     {len(bank):,} live, {sum(int(d.sum()) for d in bank.deleted):,} deleted; the next number is {bank.next_number:,}",
        f"tokens        {int(bank.tokens.sum()):,} of text in {chunks:,} chunks",
        f"routing keys  {size(whole * chunks)} in bfloat16 on the devices, {size(rounded * chunks)} in int8",
        f"content       {size(content * chunks)} in {layout.content}, on disk or on the hosts",
        f"on disk       {size(on_disk)} in {len(bank.segments):,} segments",
        f"made by       {layout.fingerprint} (model-tokenizer)",
        f"of a chunk    {layout.layers} memory layers, {layout.kv_heads} heads of {layout.head_dim}"])


# ---------------------------------------------------------------------------------------------------------------------

TRACED = 16  # documents that --trace prints of a round's ranking


def show(model, tokenizer, memory, texts, where, question, config, say=print):
    """Stream one answer to the terminal, then its sources. where(position) says where a document comes from."""
    place = lambda number: int(np.searchsorted(memory.numbers, number))
    used, first, answering = [], None, False
    for event in interleave(model, tokenizer, memory, texts, question, config.interleave):
        if isinstance(event, str):
            say(event, end="", flush=True)
            answering = True
            continue
        used += event.appended
        first = next((n for n, _ in event.routed), None) if first is None else first
        if config.trace:
            say("round: routed to " + ", ".join(f"[{n}] {score:.3f}" for n, score in event.routed[:TRACED]))
            say("       named " + (", ".join(f"[{n}]" for n in event.named) or "nothing: end of retrieval"))
            for n in event.appended:
                say(f"       appended [{n}] {where(place(n))}: {tokenizer.decode(texts[place(n)])}")
    say("" if answering else "(no answer)")
    for n in used:
        say(f"  [{n}] {where(place(n))}")
    if not used and first is not None:
        say(f"  [{first}] {where(place(first))} (read in the memory; no text was appended)")


def open_bank(model, tokenizer, config, device, count_tokens, ranks, say, reason):
    """Do to the bank what the flags ask for. Returns it as a ParallelMemory, or None where nothing is asked of it."""
    if config.documents:
        documents = read_documents(config.documents, count_tokens, config.max_document_tokens)
        done = sync(model, tokenizer, config.memory, documents, ranks, config.content, size=documents_size(config.documents))
        say(f"{config.memory}: {done} on {device} ({reason})")
    bank = Bank(config.memory)
    check_fingerprint(bank.layout, config.memory, model, tokenizer)
    if config.compact and ranks.rank == 0:
        with Writer(config.memory) as writer, tqdm(desc="compacting", unit="B", unit_scale=True, delay=1) as bar:
            writer.compact(bar.update)
            bank = writer.bank
    if config.verify and ranks.rank == 0:
        total = sum(segment.entry["bytes"] for segment in bank.segments)
        with tqdm(desc="verifying", total=total, unit="B", unit_scale=True, delay=1) as bar:
            bank.verify(bar.update)
        say(f"{config.memory}: {total:,} bytes, every sum is right")
    ranks.wait("checked")
    if config.info:
        say(describe(bank))
    if not config.question and (config.info or config.verify or config.compact):
        return None
    total = int(bank.chunks.sum()) * bank.layout.chunk_bytes()[0]
    with tqdm(desc="opening", total=total // ranks.world, unit="B", unit_scale=True, delay=1, disable=ranks.rank > 0) as bar:
        return ParallelMemory(bank, device, ranks, config.routing_keys, config.content_in, bar.update)


def script():
    config = command_line(SampleConfig, __doc__, takes_file=False)
    if not config.documents and not config.memory:
        raise UserError("--documents is missing; give a folder of .txt or .md files, such as --documents examples, or a bank (--memory)")
    keep_freed_memory()
    device, dtype, reason = detect_device(config.device, config.dtype)
    torch.manual_seed(config.seed)
    model, tokenizer = load_checkpoint(config.checkpoint, device, dtype)
    count_tokens, ranks = lambda text: len(tokenizer.encode(text)), Ranks(device, config.timeout)
    say = print if ranks.rank == 0 else lambda *_, **__: None
    if config.memory:
        memory = open_bank(model, tokenizer, config, device, count_tokens, ranks, say, reason)
        if memory is None:
            return ranks.end()

        def ask(question):
            memory.refresh()  # it may have changed since the last question
            show(model, tokenizer, memory, memory.texts, lambda d: memory.bank.document(d)[1], question, config, say)
    else:
        documents = list(read_documents(config.documents, count_tokens, config.max_document_tokens))
        texts = tokenizer.encode_batch([document.text for document in documents])
        memory, speed = encode_texts(model, tokenizer, texts)
        say(f"{len(documents)} documents, {sum(map(len, texts)):,} tokens, encoded at {speed:,.0f} tokens/s on {device} ({reason})")
        ask = lambda question: show(model, tokenizer, memory, texts, lambda d: documents[d].where(), question, config, say)
    if config.question:
        ask(config.question)
    else:
        for turn in itertools.count():
            question = ranks.tell(f"question/{turn}", read_question() if ranks.rank == 0 else None)
            if question is None:
                break
            ask(question)
    ranks.end()


def read_question():
    """The next question from the terminal; None when there are no more."""
    question = ""
    while not question:
        try:
            question = input("question> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
    return question


if __name__ == "__main__":
    main(script)
