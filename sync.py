"""Bring a memory bank in line with documents: add the new, encode the changed again, remove the missing.

    done = sync(model, tokenizer, folder, documents, ranks)  # "5 added; 420 tokens encoded at 9,000 tokens/s"

A bank belongs to the model and tokenizer that made it: it holds their fingerprints, and others are refused.
"""
import collections
import contextlib
import hashlib
import itertools
import json
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

import memory_bank
from checkpoint import is_router
from common import UserError
from memory import at_once
from memory_bank import ROUTERS, Bank, Layout, Writer, checksum, is_bank, write_segment
from memory_parallel import to_records
from routers import make_routers

ENCODE_TOKENS = 16384   # that a rank encodes between two looks at the others; on a GPU eight times as many
COMMIT_SECONDS = 60     # at most so long is what an interruption loses, where so many tokens take less


@torch.no_grad()
def encode_texts(model, tokenizer, texts, numbers=None):
    """Encode documents, token ids of their texts, with a progress bar: (Memory, tokens per second)."""
    numbers = range(len(texts)) if numbers is None else numbers
    spelled = [tokenizer.document(number, text) for number, text in zip(numbers, texts)]
    with tqdm(desc="encoding", total=sum(map(len, spelled)), unit=" tokens", unit_scale=True, delay=1) as bar:
        memory = model.encode(spelled, numbers, progress=bar.update)
        return memory, bar.n / max(bar.format_dict["elapsed"], 1e-9)


def fingerprint(model, tokenizer):
    """16 hexadecimal digits of the model and as many of the tokenizer, as a bank stores them."""
    return f"{model.fingerprint()}-{tokenizer.fingerprint()}"


def bank_layout(model, tokenizer, content="bfloat16"):
    """What a bank of this model holds; content: bfloat16 or int8, the type of its keys and values."""
    config = model.config
    _, routing_heads, routing_dim = config.routing_shape
    return Layout(fingerprint(model, tokenizer), len(config.reading_layers), config.num_key_value_heads,
                  config.head_dim, len(config.router_layers), routing_heads, routing_dim, content,
                  config.normalize_routing)


def check_fingerprint(layout, folder, model, tokenizer):
    """Raises UserError for a bank that another model or tokenizer has made."""
    own = fingerprint(model, tokenizer)
    if layout.fingerprint != own:
        part = "model or chunk size" if layout.fingerprint[:16] != own[:16] else "tokenizer"
        raise UserError(f"{folder}: made by another {part} ({layout.fingerprint}) than this checkpoint "
                        f"({own}); give its checkpoint, or another --memory to encode the documents again")


def bank_routers(model, tokenizer, folder, texts, ranks, content="bfloat16"):
    """Give a backbone whose routers nobody has trained those of the bank `folder`. Where there is none they
    are made of its documents, and an empty bank with them. texts: a call that returns the documents' texts,
    or None: no bank is made. Collective. Raises UserError for a bank that has lost its routers."""
    path, held = Path(folder) / ROUTERS, is_bank(folder)
    if not held and texts is None:
        return  # there is no bank, which will be told
    if ranks.rank == 0 and not (held and path.exists()):  # without a bank: of a making that ended
        if held:
            layout = Bank(folder).layout  # without routers the model has no fingerprint to compare
            if not layout.fingerprint.endswith(tokenizer.fingerprint()):
                check_fingerprint(layout, folder, model, tokenizer)
            raise UserError(f"{path}: missing; {memory_bank.REPAIR}")
        memory_bank.check_free(folder)  # before the work
        make_routers(model, tokenizer, texts())
        routers = {name: x.contiguous() for name, x in model.state_dict().items() if is_router(name)}
        layout, sums = bank_layout(model, tokenizer, content), {"sum": sum_of(routers)}
        with Writer(folder, layout, safetensors.torch.save(routers, sums)):  # another's, if it was faster
            pass
    ranks.wait("routers")
    try:
        data = path.read_bytes()
        routers = safetensors.torch.load(data)
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        if header.get("__metadata__", {}).get("sum") not in (None, sum_of(routers)):  # None: of an older bank
            raise ValueError("its checksum is wrong")
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); {memory_bank.REPAIR}") from None
    model.load_routers(routers, path)


def sum_of(routers):
    """The checksum of routers, name -> tensor, as safetensors stores text."""
    numbers = (routers[name].cpu().reshape(-1).view(torch.uint8).numpy() for name in sorted(routers))
    return str(checksum(*numbers))


def hash64(*parts):
    """Strings -> an unsigned 64-bit number."""
    data = "\0".join(parts).encode(errors="replace")  # a set may hold unpaired surrogates
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Changes:
    """What a stream of documents changes in a bank."""

    def __init__(self, bank):
        self.bank = bank
        self.by_hash = np.argsort(bank.id_hashes)   # positions in the bank, in the order of their hashes
        self.seen = np.zeros(len(bank), bool)       # by position: whether the document has come
        self.added = set()                          # hashes of ids that the bank did not hold
        self.next_number = bank.next_number
        self.counts = {"added": 0, "updated": 0, "removed": 0, "unchanged": 0, "kept unread": 0}

    def position_of(self, id_hash):
        """Where the bank holds the document with this hash of its id; None where it holds none."""
        hashes = self.bank.id_hashes
        place = hashes.searchsorted(np.uint64(id_hash), sorter=self.by_hash)
        if place < len(hashes) and hashes[self.by_hash[place]] == id_hash:
            return self.by_hash[place]
        return None

    def compare(self, group):
        """Take the next Documents of the stream. Returns (due, replaced).

        due: what must be encoded, a list of (number, document, hash of its id, digest of id, place and text).
        replaced: the numbers among them that the bank holds with another text or place.
        Raises UserError for ids or numbers given twice, and for a number that is not the bank's.
        """
        due, replaced = [], []
        for document in group:
            number, id_hash = document.number, hash64(document.id)
            digest = hash64(document.id, document.where(), document.spelled())
            position = self.position_of(id_hash)
            if position is None:
                if id_hash in self.added:
                    raise UserError(given_twice("id", document.id))
                self.added.add(id_hash)
                self.counts["added"] += 1
                if number is None:
                    number = self.next_number
                    self.next_number += 1
            else:
                held = int(self.bank.numbers[position])
                if number not in (None, held):
                    raise UserError(f"{self.bank.folder}: holds {document.id!r} as [{held}], not [{number}]; "
                                    "give another --memory")
                if self.seen[position]:
                    raise UserError(given_twice("id", document.id))
                self.seen[position] = True
                if self.bank.digests[position] == digest:
                    self.counts["unchanged"] += 1
                    continue
                self.counts["updated"] += 1
                number = held
                replaced.append(held)
            due.append((number, document, id_hash, digest))
        for number, count in collections.Counter(number for number, *_ in due).most_common(1):
            if count > 1:
                raise UserError(given_twice("number", number))
        return due, replaced

    def next(self, groups):
        """(group, due, replaced, error): the next Documents, and what they change (`compare`). An error ends
        the stream; what is encoded until then is kept."""
        try:
            group = next(groups)
            return group, *self.compare(group), None
        except (UserError, OSError) as error:
            return [], [], [], error

    def missing(self, skipped):
        """The numbers of the documents that have not come; asked at the end of the stream.

        skipped: names of files that could not be read, or of links to folders. What the bank holds of them
        stays: what cannot be read now is not deleted.
        """
        kept = tuple(f"{name}{behind}" for name in skipped for behind in ":/")
        for position in np.flatnonzero(~self.seen) if kept else ():
            if self.bank.document(position)[1].startswith(kept):
                self.seen[position] = True
                self.counts["kept unread"] += 1
        self.counts["removed"] = int((~self.seen).sum())
        return self.bank.numbers[~self.seen].tolist()


def given_twice(what, value):
    return f"two documents have the {what} {str(value).rsplit('#', 1)[0]!r}; {what}s must differ"


@torch.no_grad()
def sync(model, tokenizer, folder, documents, ranks, content="bfloat16", size=0, skipped=(), remove=False):
    """Bring the bank `folder` in line with a stream of Documents. Collective: every rank has the same stream.

    New documents are added, changed ones encoded again under their old number, those that do not come are
    removed. A bank that is not there is made. Documents are the same when their `id` is, unchanged when text
    and place are too. The ranks share the encoding. What is done is committed when a segment is full, when a
    minute has passed or the stream fails, and is not done again. size: bytes of all texts, for progress;
    skipped: names of files that the stream could not read by its end, whose documents stay as they are;
    remove: whether more than half of the bank may go. Returns a sentence that says what was done. Raises
    UserError, among others for ids or numbers given twice.
    """
    first = ranks.rank == 0
    began = committed = looked = time.monotonic()
    layout = bank_layout(model, tokenizer, content)
    with Writer(folder, layout) if first else contextlib.nullcontext() as writer:
        ranks.wait("made")  # the other ranks, until there is a bank
        bank = ranks.same(Bank(folder))
        check_fingerprint(bank.layout, folder, model, tokenizer)
        changes = Changes(bank)
        pieces = []     # records that this rank has encoded and not yet committed
        replaced = []   # numbers whose old texts all ranks' pieces replace
        encoded = 0     # tokens

        def commit(removed):
            """Write this rank's pieces as a segment; rank 0 names all ranks' segments in the manifest."""
            own = [write_segment(folder, bank.layout, memory_bank.join(pieces))] if pieces else []
            entries = list(itertools.chain(*ranks.gather_objects(own)))
            if first and (entries or removed):
                writer.commit(entries, removed)
                writer.merge()
            pieces.clear()

        stream = itertools.chain(groups(documents, ranks.world * at_once(ENCODE_TOKENS, model.device)),
                                 [[]])  # an empty one at last
        progress = dict(desc="encoding", total=size or None, unit="B", unit_scale=True, delay=1)
        with tqdm(**progress, disable=not first) as bar:
            group = True
            while group:
                group, due, held, failed = changes.next(stream)
                full = sum(map(memory_bank.size_of, pieces)) >= memory_bank.SEGMENT_BYTES
                now = time.monotonic()
                late = now - committed + now - looked > COMMIT_SECONDS  # the next group may take as long
                looked = now
                commits, failed = compare_ranks(ranks, full or late, failed, group, due)
                missing = [] if group or failed else changes.missing(skipped)
                if 2 * len(missing) > len(bank) and not remove:
                    failed = UserError(f"{folder}: {len(missing):,} of its {len(bank):,} documents are not "
                                       "in --documents; if they shall go, give --remove (new ones are added)")
                if commits or failed or not group:
                    commit(replaced + ([] if failed else missing))
                    replaced, committed = [], time.monotonic()
                if failed:
                    raise failed
                replaced += held  # with what is encoded now, in one change
                share = sorted(due[ranks.rank::ranks.world], key=lambda entry: entry[0])
                if share:
                    records, tokens = encode_records(model, tokenizer, share, bank.layout)
                    pieces.append(records)
                    encoded += tokens
                bar.update(sum(len(document.text.encode(errors="replace")) for document in group))
                speed = encoded * ranks.world / (time.monotonic() - began)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
    ranks.wait("written")
    encoded = int(ranks.sum(torch.tensor(encoded, device=ranks.device)))
    done = ", ".join(f"{n:,} {what}" for what, n in changes.counts.items() if n or what == "added")
    if encoded:
        done += f"; {encoded:,} tokens encoded at {encoded / (time.monotonic() - began):,.0f} tokens/s"
    return done


def compare_ranks(ranks, commits, failed, group, due):
    """(whether some rank commits now or has failed, this rank's error): all must have read the same."""
    work = hash64(*(f"{number} {id_hash} {digest}" for number, _, id_hash, digest in due)) >> 1
    reports = ranks.gather(torch.tensor([commits, failed is not None, len(group), work], device=ranks.device))
    if not failed and (reports[:, 1:] != reports[0, 1:]).any():
        failed = UserError("the ranks read different documents; --documents must be the same for all of them")
    return bool(reports[:, :2].any()), failed


def encode_records(model, tokenizer, due, layout):
    """Encode what is `due` (see Changes.compare), in the order of numbers: (records, tokens of the texts)."""
    numbers, documents, id_hashes, digests = zip(*due)
    texts = tokenizer.encode_batch([document.spelled() for document in documents])
    spelled = [tokenizer.document(number, text) for number, text in zip(numbers, texts)]
    sources = [document.where() for document in documents]
    records = to_records(model.encode(spelled, numbers), texts, sources, id_hashes, digests, layout)
    return records, sum(map(len, texts))


def groups(documents, size):
    """Lists of documents of about `size` tokens each, four characters to a token."""
    group, total, failed = [], 0, None
    try:
        for document in documents:
            group.append(document)
            total += len(document.text) // 4 + 1
            if total >= size:
                yield group
                group, total = [], 0
    except (UserError, OSError) as error:  # what came before it comes first
        failed = error
    if group:
        yield group
    if failed:
        raise failed


def describe(bank):
    """What a bank holds, in a few lines."""
    layout, chunks = bank.layout, int(bank.chunks.sum())
    size = lambda n: tqdm.format_sizeof(n, "B")
    routing, content = (size(n * chunks) for n in layout.chunk_bytes())
    rounded, _ = layout.chunk_bytes("int8")
    deleted = sum(int(rows.sum()) for rows in bank.deleted)
    on_disk = size(sum(segment.entry["bytes"] for segment in bank.segments))
    return "\n".join([
        f"documents     {len(bank):,} live, {deleted:,} deleted; the next number is {bank.next_number:,}",
        f"tokens        {int(bank.tokens.sum()):,} of text in {chunks:,} chunks",
        f"routing keys  {routing} in bfloat16 on the devices, {size(rounded * chunks)} in int8",
        f"content       {content} in {layout.content}, on disk or on the hosts",
        f"on disk       {on_disk} in {len(bank.segments):,} segments",
        f"made by       {layout.fingerprint} (model-tokenizer)",
        f"of a chunk    routing keys of {layout.routing_layers} layers, {layout.routing_heads} x "
        f"{layout.routing_dim}; keys and values of {layout.layers}, {layout.kv_heads} x {layout.head_dim}"])
