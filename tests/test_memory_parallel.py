"""A bank in use: against the same documents in one Memory, over ranks, while it changes; and sample.py."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rank_answers
import torch
import torch.distributed.nn  # before processes are forked: each would need seconds for it
from conftest import on_ranks, run_as_rank
from test_prompts import write

import memory_bank
import memory_parallel
import routing
import sample
import sync as syncing
from common import UserError
from documents import Document
from interleave import InterleaveConfig, answer_question
from memory_bank import Bank, Layout, Writer, join
from memory_parallel import KeyBlock, ParallelMemory, Ranks, best_of, deal, to_records
from model import MSA, Memory
from prompts import ChatTokenizer, load_checkpoint
from routing import top_documents
from sync import bank_layout, fingerprint, hash64, sync
from tasks import count_tokens, make_memory

TESTS = Path(__file__).parent
CPU = torch.device("cpu")
ALONE = Ranks(CPU)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint, CPU)


def documents_of(texts, prefix="d"):
    return [Document(text, f"{prefix}{i}.txt", 1, 1, f"{prefix}{i}#0") for i, text in enumerate(texts)]


TREES = "ash birch cedar elm fir hazel larch maple oak pine yew".split()
TEXTS = [f"The number of {name} is {i}." * (1 + i % 3) for i, name in enumerate(TREES)]


@pytest.mark.parametrize("changes", [dict(normalize_routing=False), dict(decouple_router=False)])
def test_select_by_other_routers(loaded, tmp_path, monkeypatch, changes):
    """A bank of a model whose routing keys have no unit length would be asked as if they had; or the bank
    would not say so."""
    model, tokenizer = MSA(dataclasses.replace(loaded[0].config, **changes)).eval(), loaded[1]
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS), ALONE)
    bank = Bank(tmp_path / "bank")
    assert bank.layout.unit_keys == model.config.normalize_routing
    memory, (expected, _) = ParallelMemory(bank, CPU, ALONE), in_memory((model, tokenizer), bank, "bfloat16")
    tokens = torch.tensor([tokenizer.encode("The number of fir is")])
    with torch.no_grad():
        found, wanted = (model.read(tokens, m, torch.ones_like(tokens, dtype=torch.bool)).selections
                         for m in (memory, expected))
    for a, b in zip(found, wanted):
        same_selection(a, b, atol=1e-5)
    asked, select = [], memory_parallel.select_documents
    monkeypatch.setattr(memory_parallel, "select_documents",
                        lambda *args: asked.append(args[-1]) or select(*args))
    memory.select({0: torch.ones(1, 1, 8)}, torch.ones(1, 1, dtype=torch.bool), 2, [0])
    assert asked == [bank.layout.unit_keys]


def count_as_rank(rank, tokenizer, texts):
    ranks = Ranks(CPU)
    counts = count_tokens(tokenizer, texts, ranks, batch=2).tolist()
    ranks.end()
    return counts


@pytest.mark.parametrize("documents", [1, 11])
def test_counting(loaded, documents):
    """Ranks that count a share of the documents would lose some, or put them in another order."""
    _, tokenizer = loaded
    expected = [len(tokenizer.encode(text)) for text in TEXTS[:documents]]
    assert len(set(expected)) > 1 or documents == 1
    assert on_ranks(3, count_as_rank, tokenizer, TEXTS[:documents]) == [expected] * 3
    assert count_as_rank(0, tokenizer, TEXTS[:documents]) == expected


def in_memory(loaded, bank, kind):
    """What the bank holds, encoded at once and rounded in the same way, as a model.Memory."""
    model, tokenizer = loaded
    texts = [bank.document(position)[0].tolist() for position in range(len(bank))]
    numbers = bank.numbers.tolist()
    memory = model.encode([torch.tensor(tokenizer.document(n, text)) for n, text in zip(numbers, texts)],
                          numbers)
    rounded = memory.round_routing_keys(torch.bfloat16)
    if kind == "int8":
        rounded = rounded.round_routing_keys(torch.int8)
    if bank.layout.content == "bfloat16":
        rounded.keys, rounded.values = ([x.bfloat16().float() for x in xs]
                                        for xs in (memory.keys, memory.values))
    return rounded, texts


def same_selection(found, expected, atol=1e-6):
    """Of every question the same documents, scores, keys and values in the same order."""
    assert found.documents.equal(expected.documents) and found.slots.equal(expected.slots)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=atol)
    for b, slots in enumerate(found.slots.tolist()):
        torch.testing.assert_close(found.slot_scores[b, :slots], expected.slot_scores[b, :slots], rtol=0,
                                   atol=atol)
        assert len(found.keys) == len(found.values) == len(expected.keys) == len(expected.values)
        for layer in range(len(found.keys)):
            for name in ("keys", "values"):
                rows = [getattr(s, name)[layer][s.index[b, :slots]].float() for s in (found, expected)]
                torch.testing.assert_close(*rows, rtol=0, atol=2e-2 if atol > 1e-5 else 1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("place", ["disk", "host"])
@pytest.mark.parametrize("documents", [1, 3, 11])
def test_select(loaded, tmp_path, kind, place, documents):
    """A bank would find other documents than a memory does, or bring the content of others; with fewer than
    k, or with blind questions."""
    model, tokenizer = loaded
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS[:documents]), ALONE)
    memory = ParallelMemory(Bank(tmp_path / "bank"), CPU, ALONE, kind, place)
    wanted, _ = in_memory(loaded, memory.bank, kind)
    query = routing.group_queries(torch.randn(3, 5, 2, 8, generator=torch.Generator().manual_seed(1)), 1)
    for mask in (torch.ones(3, 5, dtype=torch.bool),
                 torch.tensor([[True] * 5, [False] * 5, [False, True] * 2 + [False]]),
                 torch.zeros(3, 5, dtype=torch.bool)):
        for k in (1, 2, 20):
            same_selection(memory.select({0: query}, mask, k, [0]), wanted.select({0: query}, mask, k, [0]))
    assert len(memory) == documents and memory.texts[documents - 1] == tokenizer.encode(TEXTS[documents - 1])


SHARED = {
    "means": dict(num_hidden_layers=4, routing_layers="0,1", routing_dim=12, query_reduction="mean",
                  document_share=0.5),
    "above": dict(num_hidden_layers=4, routing_layers="0,2,3", num_attention_heads=4, router_layer_idx="1,2"),
    "no reading": dict(num_hidden_layers=3, routing_layers="0,1", attend_memory=False),
}


def model_of(loaded, changes):
    """An untrained model and the tokenizer; its weights are large enough to tell documents apart."""
    torch.manual_seed(2)
    model = MSA(dataclasses.replace(loaded[0].config, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    return model, loaded[1]


def count_reads(monkeypatch):
    """The documents whose content was read from the disk since."""
    reads, content = [], Bank.content
    monkeypatch.setattr(Bank, "content",
                        lambda bank, position: reads.append(int(position)) or content(bank, position))
    return reads


@torch.no_grad()
@pytest.mark.parametrize("kind, place", [("bfloat16", "disk"), ("int8", "host"), ("int8", "disk")])
@pytest.mark.parametrize("changes", SHARED)
def test_shared_mode(loaded, tmp_path, monkeypatch, kind, place, changes):
    """In shared mode a bank would be asked otherwise than a memory; or a document be read more than once; or
    the scores would depend on the blocks in which a bank is held."""
    model, tokenizer = model_of(loaded, SHARED[changes])
    for count in (4, 5, 11):
        sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS[:count]), ALONE)
        if count == 4:
            grown = ParallelMemory(Bank(tmp_path / "bank"), CPU, ALONE, kind, place)
        grown.refresh()
    assert len(grown.blocks) == 3
    memory = ParallelMemory(Bank(tmp_path / "bank"), CPU, ALONE, kind, place)
    wanted, _ = in_memory((model, tokenizer), memory.bank, kind)
    spelled = tokenizer.encode("The number of fir is unknown, that of ash")
    tokens = torch.tensor([spelled, spelled[::-1], spelled])
    mask = torch.ones_like(tokens)
    mask[0, len(spelled) // 2:], mask[2] = 2, 0
    reads = count_reads(monkeypatch)
    found = [model.read(tokens, m, mask) for m in (memory, grown, wanted)]
    selected = found[0].selections[0].documents
    selected = selected[selected >= 0].unique().tolist()
    stored = memory.bank.layout.layers > 0
    assert sorted(reads) == (sorted(2 * selected) if place == "disk" and stored else [])
    assert all(len(output.selections) == 1 for output in found)
    for output in found[:2]:
        same_selection(output.selections[0], found[2].selections[0], atol=1e-5)
        torch.testing.assert_close(output.logits, found[2].logits, rtol=0, atol=1e-3)
    assert len(found[0].selections[0].keys) == memory.bank.layout.layers == len(model.config.reading_layers)
    assert found[0].selections[0].scores.equal(found[1].selections[0].scores)
    assert found[0].selections[0].documents[2].eq(-1).all() and len(selected) > 2
    first, wanted_first = model.find(tokens, memory, mask), model.find(tokens, wanted, mask)
    assert first.scores.equal(found[0].selections[0].scores)
    second = [model.find(tokens, m, mask, first=first) for m in (memory, grown)]
    same_selection(second[0], model.find(tokens, wanted, mask, first=wanted_first), atol=1e-5)
    assert second[0].scores.equal(second[1].scores) and not second[0].scores.equal(first.scores)


@torch.no_grad()
def test_a_document_is_read_once_a_question(loaded, tmp_path, monkeypatch):
    """In the paper's mode every layer would read a document's content of all layers anew, and every round
    what the last one has brought to the device; or what is left there would be another document's."""
    model, tokenizer = model_of(loaded, dict(num_hidden_layers=4, router_layer_idx="all"))
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS[:3]), ALONE)
    memory, reads = ParallelMemory(Bank(tmp_path / "bank"), CPU, ALONE), count_reads(monkeypatch)
    tokens = torch.tensor([tokenizer.encode("The number of fir is")])
    ask = lambda: model.read(tokens, memory, torch.ones_like(tokens)).selections
    selections = ask()
    chosen = torch.cat([selection.documents for selection in selections])
    assert chosen.numel() == 8 > len(chosen.unique())
    assert sorted(reads) == chosen.unique().tolist()
    keys = lambda selections: torch.cat([selection.keys[0] for selection in selections])
    assert keys(ask()).equal(keys(selections)) and len(reads) == 3
    monkeypatch.setattr(memory_parallel, "KEPT", 1)  # what a selection needs stays, the others go
    ask()
    kept = [position for _, position in memory.kept]
    assert len(reads) == 6 and len(kept) == 2 and set(kept) == set(selections[-1].documents[0].tolist())
    assert keys(ask()).equal(keys(selections)) and len(reads) == 9
    with Writer(tmp_path / "bank") as writer:
        writer.remove([0])
    monkeypatch.setattr(memory_parallel, "KEPT", 1 << 20)
    memory.refresh()
    whole, _ = in_memory((model, tokenizer), memory.bank, "bfloat16")
    expected = model.read(tokens, whole, torch.ones_like(tokens)).selections
    torch.testing.assert_close(keys(ask()), torch.cat([x.keys[0] for x in expected]).bfloat16(), atol=1e-2,
                               rtol=1e-2)


def test_int8_content(loaded, tmp_path):
    """Keys and values in int8 would be off by more than half a step of their scale."""
    model, tokenizer = loaded
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS), ALONE, content="int8")
    for place in ("disk", "host"):
        memory = ParallelMemory(Bank(tmp_path / "bank"), CPU, ALONE, "bfloat16", place)
        wanted, _ = in_memory(loaded, memory.bank, "bfloat16")
        found = memory.select({0: torch.ones(1, 1, 8)}, torch.ones(1, 1, dtype=torch.bool), 20, [0])
        for a, b in ((found.keys[0], wanted.keys[0]), (found.values[0], wanted.values[0])):
            step = b.abs().amax((1, 2), keepdim=True) / 127
            assert a.dtype == torch.float32 and ((a - b).abs() <= step * 0.501).all() and not a.equal(b)


@pytest.mark.parametrize("chunks, world",
                         [([1] * 8, 2), ([5, 1, 1, 1], 2), ([1], 4), ([], 3), ([1, 9, 1], 3), ([2] * 7, 4)])
def test_deal(chunks, world):
    """A rank would hold much more than its share, or a document lie nowhere."""
    owner = deal(np.array(chunks, np.int32), world)
    assert len(owner) == len(chunks) and (np.diff(owner) >= 0).all()
    if chunks:
        assert 0 <= owner.min() and owner.max() < world
        held = np.bincount(owner, chunks, world)
        assert held.max() <= sum(chunks) / world + max(chunks)


def test_best_of():
    """The order of equal scores would depend on the rank that brings them."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (5, 30), generator=generator).float()
    shuffled = torch.randperm(30, generator=generator).expand(5, -1)
    found, numbers = best_of(scores, shuffled, 7)
    for b in range(5):
        assert (found[b].diff() <= 0).all() and ((found[b].diff() < 0) | (numbers[b].diff() > 0)).all()
    order = torch.randperm(30, generator=generator)
    documents, best = top_documents(scores, 7)
    again, numbers = best_of(scores[:, order], order.expand(5, -1), 7)
    assert numbers.equal(documents) and again.equal(best)


def test_tie(loaded, tmp_path):
    """Of equal documents one of a higher number would be found first, because it was added first or lies
    elsewhere."""
    layout = Layout("x", 1, 1, 4, 1, 1, 4)
    one = torch.ones(1, 1, 4) / 2
    def records(numbers):
        n = len(numbers)
        memory = Memory([one.expand(n, -1, -1)], [one.expand(n, -1, -1)], [one.expand(n, -1, -1)],
                        torch.arange(n + 1), numbers)
        return to_records(memory, [[1]] * n, [""] * n, numbers, [0] * n, layout)
    with Writer(tmp_path / "bank", layout) as writer:
        for numbers in ([40, 50], [3, 9], [7], [1, 60]):
            writer.add(join([records(numbers)]))
    memory = ParallelMemory(Bank(tmp_path / "bank"), CPU, ALONE)
    found = memory.select({0: torch.ones(2, 3, 4)}, torch.ones(2, 3, dtype=torch.bool), 4, [0])
    assert memory.numbers[found.documents[1]].tolist() == [1, 3, 7, 9]


def test_refresh(loaded, tmp_path):
    """A question would not see what came, or still see what went, or an old text under a number that
    stayed."""
    model, tokenizer = loaded
    folder = tmp_path / "bank"
    query = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 4).bool()
    sync(model, tokenizer, folder, documents_of(TEXTS[:5]), ALONE)
    memories = [ParallelMemory(Bank(folder), CPU, ALONE, kind, place)
                for kind, place in (("bfloat16", "disk"), ("int8", "host"))]

    def check(*blocks):
        for memory, kind in zip(memories, ("bfloat16", "int8")):
            memory.refresh()
            wanted, texts = in_memory(loaded, memory.bank, kind)
            assert not blocks or len(memory.blocks) == blocks[0]
            assert memory.numbers.tolist() == wanted.numbers
            for k in (1, 3, 30):
                same_selection(*(m.select({0: query}, mask, k, [0]) for m in (memory, wanted)))
            assert [memory.texts[d] for d in range(len(memory))] == texts

    check(1)
    changed = documents_of(TEXTS)
    sync(model, tokenizer, folder, changed, ALONE)
    check(2)
    blocks = [id(block) for block in memories[0].blocks]
    del changed[3:5]
    sync(model, tokenizer, folder, changed, ALONE)
    check(2)
    changed[1] = Document("Now it is another text. " * 5, "d1.txt", 1, 1, "d1#0")
    sync(model, tokenizer, folder, changed, ALONE)
    check(3)
    with Writer(folder) as writer:
        writer.compact()
    check(3)
    assert [id(block) for block in memories[0].blocks][:2] == blocks  # nothing was loaded twice
    blocks = []
    for i in range(7):  # one more at a time
        sync(model, tokenizer, folder, changed + documents_of([f"More of {j}." for j in range(i + 1)], "m"),
             ALONE)
        check()
        blocks.append(len(memories[0].blocks))
    assert blocks == [4, 5, 6, 7, 8, 2, 3]  # too many: the small ones are joined
    with Writer(folder) as writer:
        writer.remove(writer.bank.numbers)
    for memory in memories:
        memory.refresh()
        assert len(memory) == 0
    sync(model, tokenizer, folder, documents_of(TEXTS[:2]), ALONE)
    check(1)
    sync(model, tokenizer, folder, documents_of(TEXTS[1:4]), ALONE)
    with pytest.MonkeyPatch.context() as patch:  # Ctrl-C: the old places would mean other documents
        patch.setattr(ParallelMemory, "load", lambda *_: sys.exit(9))
        for memory in memories:
            with pytest.raises(SystemExit):
                memory.refresh()
            assert len(memory) == 0
    check(1)


def test_independence(loaded, tmp_path):
    """What a bank stores of a document would depend on what was added with it, before it or after it; or on
    merging."""
    model, tokenizer = loaded
    documents, rng = documents_of(TEXTS), np.random.default_rng(0)
    for trial in range(3):
        folder = tmp_path / f"bank{trial}"
        for _ in range(6):
            chosen = sorted(rng.choice(len(documents), rng.integers(1, len(documents)), replace=False))
            sync(model, tokenizer, folder, [documents[i] for i in chosen], ALONE, remove=True)
        sync(model, tokenizer, folder, documents, ALONE)
        if trial == 1:
            with Writer(folder) as writer:
                writer.compact()
        bank = Bank(folder)
        ids = {hash64(document.id): document for document in documents}
        order = [dataclasses.replace(ids[int(id_hash)], number=int(number))
                 for id_hash, number in zip(bank.id_hashes, bank.numbers)]
        sync(model, tokenizer, tmp_path / f"once{trial}", order[::-1], ALONE)
        once = Bank(tmp_path / f"once{trial}")
        assert once.numbers.tolist() == bank.numbers.tolist()
        assert once.id_hashes.tolist() == bank.id_hashes.tolist()
        for position in range(len(bank)):
            assert all(np.array_equal(a, b) for a, b in zip(bank.document(position), once.document(position)))
            assert ulps(bank.content(position)[0], once.content(position)[0]) <= 1
        assert ulps(*map(routing_keys_of, (bank, once))) <= 1 and routing_keys_of(bank).any(2).all()


def ulps(a, b):
    """The largest distance of bfloat16 numbers, held as uint16, in units in the last place; tiny ones count
    as equal."""
    ordered = lambda x: np.where(x & 0x8000, 0x8000 - (x & 0x7fff).astype(int), 0x8000 + x.astype(int))
    values = [(x.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
    return int((np.abs(ordered(a) - ordered(b)) * (np.abs(values[0] - values[1]) > 1e-5)).max(initial=0))


# ------------------------------------------------------------------------------------------------------------
# Bringing a bank in line

def held(folder):
    bank = Bank(folder)
    return {bank.document(position)[1]: int(bank.numbers[position]) for position in range(len(bank))}


@pytest.fixture
def encoded(loaded, monkeypatch):
    """The numbers of the documents that were encoded, in the order of encoding."""
    numbers, real = [], loaded[0].encode
    encode = lambda documents, given: numbers.extend(given) or real(documents, given)
    monkeypatch.setattr(loaded[0], "encode", encode, raising=False)
    return numbers


def test_sync(loaded, tmp_path, encoded):
    """A change of one file would encode others again, move their numbers, or leave the old text; a number
    would be given twice."""
    model, tokenizer = loaded
    folder, documents = tmp_path / "bank", documents_of(TEXTS[:5])
    assert sync(model, tokenizer, folder, documents, ALONE).startswith("5 added; ")
    assert encoded == [0, 1, 2, 3, 4]
    state = Bank(folder).state
    assert sync(model, tokenizer, folder, documents, ALONE) == "0 added, 5 unchanged"
    assert Bank(folder).state == state
    encoded.clear()
    documents[2] = Document("It has changed.", "d2.txt", 1, 1, "d2#0")
    gone = documents.pop(0)
    assert sync(model, tokenizer, folder, [documents_of(["new"], "n")[0], *documents], ALONE).startswith(
        "1 added, 1 updated, 1 removed, 3 unchanged; ")
    assert encoded == [2, 5]
    assert held(folder) == {f"d{i}.txt:1-1": i for i in (1, 2, 3, 4)} | {"n0.txt:1-1": 5}
    assert tokenizer.decode(Bank(folder).document(1)[0].tolist()) == "It has changed."
    sync(model, tokenizer, folder, [*documents, gone], ALONE)
    assert held(folder) == {f"d{i}.txt:1-1": i for i in (1, 2, 3, 4)} | {"d0.txt:1-1": 6}


def test_numbers_of_their_own(loaded, tmp_path):
    """A document would not get the number that it must have, or another than it has."""
    model, tokenizer = loaded
    documents = [dataclasses.replace(document, number=n)
                 for document, n in zip(documents_of(TEXTS[:3]), (70, 5, 600))]
    sync(model, tokenizer, tmp_path / "bank", documents, ALONE)
    assert held(tmp_path / "bank") == {"d0.txt:1-1": 70, "d1.txt:1-1": 5, "d2.txt:1-1": 600}
    sync(model, tokenizer, tmp_path / "bank", [*documents, *documents_of(["new"], "n")], ALONE)
    assert held(tmp_path / "bank")["n0.txt:1-1"] == 601
    with pytest.raises(UserError, match=r"bank: holds 'd1#0' as \[5\], not \[6\]; give another --memory"):
        sync(model, tokenizer, tmp_path / "bank", [dataclasses.replace(documents[1], number=6)], ALONE)
    with pytest.raises(UserError, match="two documents would have the same number"):
        sync(model, tokenizer, tmp_path / "bank",
             [*documents, dataclasses.replace(documents_of(["x"], "o")[0], number=5)], ALONE)


def test_only(loaded, tmp_path):
    """A part of a bank would find documents outside of it."""
    model, tokenizer = loaded
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS), ALONE)
    bank, kept = Bank(tmp_path / "bank"), [7, 2, 9, 3]
    part = ParallelMemory(bank.only(kept), CPU, ALONE)
    wanted, texts = in_memory(loaded, part.bank, "bfloat16")
    query = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(5))
    same_selection(part.select({0: query}, torch.ones(2, 4).bool(), 3, [0]),
                   wanted.select({0: query}, torch.ones(2, 4).bool(), 3, [0]))
    assert part.numbers.tolist() == sorted(kept)
    assert [part.texts[d] for d in range(4)] == [tokenizer.encode(TEXTS[n]) for n in sorted(kept)]
    assert len(bank) == 11


def test_sync_of_moved_lines(loaded, tmp_path, encoded):
    """A text that stands elsewhere in its file would be cited where it was."""
    model, tokenizer = loaded
    sync(model, tokenizer, tmp_path / "bank", [Document("Text.", "a.txt", 1, 1, "a#0")], ALONE)
    sync(model, tokenizer, tmp_path / "bank", [Document("Text.", "a.txt", 5, 5, "a#0")], ALONE)
    assert held(tmp_path / "bank") == {"a.txt:5-5": 0}


def test_interrupted_sync(loaded, tmp_path, encoded, monkeypatch):
    """An interruption would cost what was encoded before it, or be taken for the end of the documents: the
    rest would be removed."""
    model, tokenizer = loaded
    monkeypatch.setattr(syncing, "ENCODE_TOKENS", 10)
    monkeypatch.setattr(syncing, "COMMIT_SECONDS", -1)
    documents = documents_of(TEXTS)
    sync(model, tokenizer, tmp_path / "bank", documents[5:7], ALONE)
    encoded.clear()

    def interrupted():
        yield from documents[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sync(model, tokenizer, tmp_path / "bank", interrupted(), ALONE)
    before = held(tmp_path / "bank")
    assert {"d5.txt:1-1", "d6.txt:1-1"} < set(before) and len(before) >= 4
    done = len(encoded)
    sync(model, tokenizer, tmp_path / "bank", documents, ALONE)
    assert len(encoded) <= 11 and len(encoded) - done == 11 - len(before)
    after = held(tmp_path / "bank")
    assert set(after) == {f"d{i}.txt:1-1" for i in range(11)} and after.items() > before.items()


def test_what_an_interruption_costs(loaded, tmp_path, monkeypatch):
    """More than a minute of encoding would be lost, where a look at the clock comes too early to save it."""
    clock, saved, commit, encode = [0.0], [0.0], Writer.commit, syncing.encode_records
    monkeypatch.setattr(syncing, "ENCODE_TOKENS", 10)
    monkeypatch.setattr(syncing.time, "monotonic", lambda: clock[0])

    def committed(writer, *args):
        commit(writer, *args)
        saved.append(clock[0])

    def slow(*args):
        clock[0] += 25  # seconds of a group
        assert clock[0] - saved[-1] <= syncing.COMMIT_SECONDS
        return encode(*args)
    monkeypatch.setattr(Writer, "commit", committed)
    monkeypatch.setattr(syncing, "encode_records", slow)
    sync(*loaded, tmp_path / "bank", documents_of(TEXTS), ALONE)
    assert len(saved) > 3


def sync_until_killed(rank, model, tokenizer, folder):
    """Ends at the fourth call of encode."""
    syncing.ENCODE_TOKENS, syncing.COMMIT_SECONDS = 10, -1
    encode, calls = model.encode, []

    def counted(*args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*args)
    model.encode = counted
    sync(model, tokenizer, folder, documents_of(TEXTS), ALONE)


def test_killed_while_encoding(loaded, tmp_path):
    """A bank whose encoding was killed, twice, would hold something else in the end than one that was not."""
    model, tokenizer = loaded
    found, started = [], []
    for _ in range(2):
        on_ranks(1, sync_until_killed, model, tokenizer, tmp_path / "killed", kill=started.extend)
        assert started[-1].exitcode == -signal.SIGKILL
        found.append(len(Bank(tmp_path / "killed")))
    assert 0 < found[0] < found[1] < len(TEXTS)
    for name in ("killed", "whole"):
        sync(model, tokenizer, tmp_path / name, documents_of(TEXTS), ALONE)
    killed, whole = (Bank(tmp_path / name) for name in ("killed", "whole"))
    assert killed.numbers.tolist() == whole.numbers.tolist()
    assert killed.digests.tolist() == whole.digests.tolist()
    for position in range(len(whole)):
        assert all(np.array_equal(a, b) for a, b in zip(killed.document(position), whole.document(position)))
        assert ulps(killed.content(position)[0], whole.content(position)[0]) <= 1
    assert ulps(*map(routing_keys_of, (killed, whole))) <= 1


def routing_keys_of(bank):
    """(C, G, D) of the one memory layer, documents in the order of their numbers."""
    found = np.zeros((bank.chunks.sum(), 1, 8), np.uint16)
    for rows, read in bank.routing_keys(0, bank.plan(np.arange(len(bank)))):
        found[rows] = read()
    return found


def test_full_segments_are_committed(loaded, tmp_path, monkeypatch):
    """A corpus larger than memory would be held until its end."""
    model, tokenizer = loaded
    monkeypatch.setattr(syncing, "ENCODE_TOKENS", 10)
    monkeypatch.setattr(memory_bank, "SEGMENT_BYTES", 300)
    monkeypatch.setattr(memory_bank, "MANY", 100)
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS), ALONE)
    assert len(Bank(tmp_path / "bank").segments) > 3


def test_same_id_twice(loaded, tmp_path, monkeypatch):
    """One of two documents of the same id would be lost without a word."""
    model, tokenizer = loaded
    twice = documents_of(TEXTS[:3]) + documents_of(TEXTS[:2])[1:]
    # as new documents, as documents that are held, as new ones far apart
    for folder in ("new", "held"):
        with pytest.raises(UserError, match="two documents have the id 'd1'; ids must differ"):
            sync(model, tokenizer, tmp_path / folder, twice, ALONE)
        sync(model, tokenizer, tmp_path / folder, documents_of(TEXTS[:3]), ALONE)
        with pytest.raises(UserError, match="two documents have the id 'd1'; ids must differ"):
            sync(model, tokenizer, tmp_path / folder, twice, ALONE)
    monkeypatch.setattr(syncing, "ENCODE_TOKENS", 1)
    with pytest.raises(UserError, match="two documents have the id 'd1'; ids must differ"):
        sync(model, tokenizer, tmp_path / "other", twice, ALONE)
    assert len(Bank(tmp_path / "other")) == 3  # what came before is kept
    same = [dataclasses.replace(document, number=5) for document in documents_of(TEXTS[:2])]
    monkeypatch.undo()
    with pytest.raises(UserError, match="two documents have the number '5'; numbers must differ"):
        sync(model, tokenizer, tmp_path / "numbers", same, ALONE)


@pytest.mark.parametrize("other", ["weights", "chunk_size", "tokenizer"])
def test_another_model(loaded, tmp_path, other):
    """A bank would be asked with a model that did not make it, and answer with garbage."""
    model, tokenizer = loaded
    folder = tmp_path / "bank"
    sync(model, tokenizer, folder, documents_of(TEXTS[:2]), ALONE)
    made_by, state = Bank(folder).layout.fingerprint, model.state_dict()
    if other == "weights":
        changed = type(model)(model.config)
        state = {name: x.clone() for name, x in state.items()}
        state["model.layers.1.self_attn.router_k_proj.0.weight"][3, 5] += 1e-3
        changed.load_state_dict(state)
    elif other == "chunk_size":
        changed = type(model)(dataclasses.replace(model.config, chunk_size=8))
        changed.load_state_dict(state)
    else:
        changed = model
        encoding = tokenizer.encoding
        tokenizer = type(tokenizer)(type(encoding)("x", pat_str=r"\S+|\s+",
                                                   mergeable_ranks=encoding._mergeable_ranks,
                                                   special_tokens=encoding._special_tokens))
    with pytest.raises(UserError) as error:
        sync(changed, tokenizer, folder, documents_of(TEXTS[:2]), ALONE)
    own = fingerprint(changed, tokenizer)
    part = "tokenizer" if other == "tokenizer" else "model or chunk size"
    assert f"made by another {part} ({made_by}) than this checkpoint ({own})" in str(error.value)
    assert made_by != own


def test_fingerprint_survives_saving(loaded, tmp_path):
    """A checkpoint that is copied, or loaded again, would no longer fit its bank."""
    model, tokenizer = loaded
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert fingerprint(*load_checkpoint(tmp_path, CPU)) == fingerprint(model, tokenizer)


# ------------------------------------------------------------------------------------------------------------
# sample.py --memory

@pytest.fixture
def here(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    os.symlink(checkpoint, "good")
    docs = tmp_path / "docs"
    docs.mkdir()
    for i, text in enumerate(TEXTS[:4]):
        (docs / f"{i}.txt").write_text(text)
    return tmp_path


def test_sample(run, here):
    """The command line would not do what its help says."""
    def ask(*flags):
        result = run(sample, "--checkpoint", "good", "--memory", "bank", *flags)
        assert result.code == 0, result.err
        return result.out
    assert ask("--documents", "docs", "What?").startswith("bank: 4 added; ")
    assert "bank" not in ask("What?")
    (here / "docs" / "1.txt").unlink()
    (here / "docs" / "9.txt").write_text("A new one.")
    assert ask("--documents", "docs", "What?").startswith("bank: 1 added, 1 removed, 3 unchanged; ")
    out = ask("--info", "--verify")
    assert "4 live, 1 deleted; the next number is 5" in out and "every checksum is right" in out
    assert Bank("bank").layout.fingerprint in out and "in 2 segments" in out
    assert "4 live, 0 deleted; the next number is 5" in ask("--compact", "--info")
    lines = [{"id": f"{i}", "title": f"Title {i}", "text": text} for i, text in enumerate(TEXTS)]
    (here / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = ask("--documents", "lines.jsonl", "What?", "--content-in", "host", "--routing-keys", "int8",
              "--remove")
    assert out.startswith("bank: 11 added, 4 removed")
    assert sorted(held("bank"))[:2] == ["0:1-1 (Title 0)", "10:1-1 (Title 10)"]


def test_a_name_that_is_not_utf8(run, here):
    """One file with an old name would end it all in a traceback."""
    (here / "docs" / os.fsdecode(b"caf\xe9.txt")).write_text("An old name.")
    result = run(sample, "--checkpoint", "good", "--memory", "bank", "--documents", "docs", "What?")
    assert result.code == 0 and "5 added" in result.out and "caf\\xe9.txt:1-1" in held("bank")


def test_chat_follows_the_bank(run, here, monkeypatch):
    """A question at the terminal would be answered from the bank as it was when the program began, be refused
    by what chance reached there, or, where it has become empty, be answered from nothing."""
    run(sample, "--checkpoint", "good", "--memory", "bank", "--documents", "docs", "What?")
    seen, lines, refresh = [], iter(["What?", "", "And now?", "And?"]), ParallelMemory.refresh

    def type_line(_):
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line.startswith("And"):
            with Writer("bank") as writer:
                writer.remove([0, 2] if line == "And now?" else [1, 3])
        return line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(ParallelMemory, "refresh",
                        lambda memory: refresh(memory) or seen.append(memory.numbers.tolist()))
    reached = []
    monkeypatch.setattr(sample, "chance", lambda *about: reached.append(len(about[2])) or float("-inf"))
    result = run(sample, "--checkpoint", "good", "--memory", "bank")
    assert result.code == 0 and seen == [[0, 1, 2, 3], [1, 3], []] and reached == [4, 2, 0]
    assert result.out.splitlines()[-2] == ("error: bank: holds no documents any more; bring some with "
                                           "--documents"), result.out


@pytest.mark.parametrize("flags, message", [
    ("--memory none q", "error: none: no memory bank here (no manifest.json); give --documents to make one"),
    ("--memory docs --documents docs q", "error: --memory docs: lies in --documents docs, and would be"),
    ("--memory good --documents docs q", "error: good: exists and is not a memory bank"),
    ("--info", "--info is about a bank on disk; name it with --memory"),
    ("--documents docs --content-in host q", "--content-in is about a bank on disk; name it with --memory"),
    ("--documents docs --routing-keys int8 q", "--routing-keys is about a bank on disk"),
    ("--documents docs --remove q", "--remove is about a bank on disk; name it with --memory"),
    ("--memory bank --remove q", "--remove is about what --documents lacks; give --documents, or leave it"),
    ("--memory bank --documents bad.jsonl q", "error: bad.jsonl:2: not an object"),
    ("--memory bank --documents half.jsonl q", "error: half.jsonl:1: not an object"),
    ("--memory bank --documents twice.jsonl q", "error: two documents have the id 'a'; ids must differ"),
    ("--memory bank --documents none.jsonl q",
     "error: none.jsonl: no such folder of documents, nor a file"),
    ("--memory bank --documents empty.jsonl q", "error: empty.jsonl: no text in it"),
    ("--memory bank --timeout 0 q", "timeout is 0.0; it must be above 0"),
])
def test_mistakes(run, here, flags, message):
    """A mistake would end in a traceback, or cost what the bank holds."""
    run(sample, "--checkpoint", "good", "--memory", "bank", "--documents", "docs", "What?")
    before = held("bank")
    (here / "bad.jsonl").write_text('{"id": "a", "text": "b"}\n{"id": 1.5, "text": "b"}\n')
    (here / "twice.jsonl").write_text('{"id": "a", "text": "b"}\n{"id": "a", "text": "c"}\n')
    (here / "empty.jsonl").write_text("\n")
    (here / "half.jsonl").write_text('{"id": "a", "text": "\\ud83d"}')
    result = run(sample, "--checkpoint", "good", *flags.split())
    assert result.code == 2 and message in result.error, result.error
    assert held("bank") == before | ({"a:1-1": 4} if "bad" in flags else {})  # what came before it is kept
    assert sorted(path.name for path in (here / "docs").iterdir()) == [f"{i}.txt" for i in range(4)]


# ------------------------------------------------------------------------------------------------------------
# Ranks

def torchrun(world, *args, timeout=120):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}",
                           "--master_port=0",
                           "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *map(str, args)],
                          capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def asked(words, tmp_path_factory):
    """The demo checkpoint's bank of 60 documents, some of them twice, made by two ranks, and questions about
    them."""
    folder, demo = tmp_path_factory.mktemp("ranks"), TESTS.parent / "checkpoints" / "demo"
    texts, questions = make_memory(words(), "two_hop", 40, 6, 1)
    lines = [json.dumps({"id": f"{i}", "text": text}) + "\n" for i, text in enumerate(texts + texts[:20])]
    (folder / "lines.jsonl").write_text("".join(lines))
    (folder / "questions.json").write_text(json.dumps([q.text for q in questions]))
    made = torchrun(2, TESTS.parent / "sample.py", "--checkpoint", demo, "--memory", folder / "bank",
                    "--documents", folder / "lines.jsonl", "--info")
    assert made.returncode == 0, made.stderr[-3000:]
    assert made.stdout.count("60 added") == 1
    assert "in 2 segments" in made.stdout
    return demo, folder


def names(told):
    """Without scores, whose last bits depend on the size of a batch."""
    return [[answer, [[[n for n, _ in routed], *others] for routed, *others in rounds]]
            for answer, rounds in told]


def test_ranks_answer_alike(asked):
    """The answer would depend on how many ranks hold the memory; a bank made by two ranks could not be read
    by one or by four."""
    demo, folder = asked
    model, tokenizer = load_checkpoint(demo, CPU)
    memory = ParallelMemory(Bank(folder / "bank"), CPU, ALONE)
    questions = json.loads((folder / "questions.json").read_text())
    alone = [answer_question(model, tokenizer, memory, memory.texts, question, InterleaveConfig())
             for question in questions]
    told = [[answer, [[[list(pair) for pair in r.routed], r.named, r.appended] for r in rounds]]
            for answer, rounds in alone]
    for world, batch in ((2, 0), (4, 4)):
        out = folder / f"{world}.json"
        done = on_ranks(world, run_as_rank, rank_answers, demo, folder / "bank", folder / "questions.json",
                        out, "--batch", batch)
        assert [code for code, *_ in done] == [0] * world, done
        found = json.loads(out.read_text())
        assert found == told if not batch else names(found) == names(told)
    # and as one Memory answers: the same documents and texts
    whole, texts = in_memory((model, tokenizer), memory.bank, "bfloat16")
    for question, (answer, rounds) in zip(questions, alone):
        wanted, wanted_rounds = answer_question(model, tokenizer, whole, texts, question, InterleaveConfig())
        assert answer == wanted and [r.appended for r in rounds] == [r.appended for r in wanted_rounds]


@pytest.mark.parametrize("changes", ["means", "above", "chat"])
def test_ranks_answer_alike_in_shared_mode(loaded, tmp_path, changes):
    """A mean over layers, or what routes in a chat model's second round, would depend, if only in its last
    bit, on how many ranks hold the memory."""
    if changes == "chat":
        tokenizer = ChatTokenizer(write(tmp_path / "tokenizer"))
        shape = SHARED["no reading"] | dict(prompts="chat", vocab_size=tokenizer.vocab_size, number_chunk=0)
        loaded = loaded[0], tokenizer
    model, tokenizer = model_of(loaded, shape if changes == "chat" else SHARED[changes])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS + TEXTS[:4]), ALONE)
    questions = ["The number of elm is", "Which number is it, of oak or of pine?", "What?"]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    memory, told = ParallelMemory(Bank(tmp_path / "bank"), CPU, ALONE), []
    for question in questions:
        answer, rounds = answer_question(model, tokenizer, memory, memory.texts, question,
                                         InterleaveConfig(max_rounds=4))
        told.append([answer, [[[list(pair) for pair in r.routed], r.named, r.appended] for r in rounds]])
    assert all(len(rounds) >= 1 + (changes == "chat") and rounds[0][0] for _, rounds in told)
    done = on_ranks(2, run_as_rank, rank_answers, tmp_path / "model", tmp_path / "bank",
                    tmp_path / "questions.json", tmp_path / "out.json")
    assert [code for code, *_ in done] == [0, 0], done
    assert json.loads((tmp_path / "out.json").read_text()) == told


def test_a_dead_rank(asked, files_of):
    """A rank that is dead would leave the others waiting for ever."""
    demo, folder = asked
    before = files_of(folder / "bank")
    done = torchrun(2, TESTS / "rank_answers.py", demo, folder / "bank", folder / "questions.json",
                    folder / "none.json", "--timeout", 5, "--kill", 1, timeout=60)
    assert done.returncode == 1 and "exitcode  : -9" in done.stderr, done.stderr[-3000:]
    assert files_of(folder / "bank") == before and not (folder / "none.json").exists()


def test_a_stuck_rank(asked, files_of):
    """A rank that is stuck would leave the others waiting for ever, without a word about which."""
    demo, folder = asked
    before = files_of(folder / "bank")

    def kill(started):
        started[0].join(60)
        started[1].kill()
    (code, _, error), stuck = on_ranks(2, run_as_rank, rank_answers, demo, folder / "bank",
                                       folder / "questions.json", folder / "none.json", "--timeout", 5,
                                       "--stall", 1, kill=kill)
    assert (code, stuck) == (2, None) and "rank 1 did not answer within --timeout 5.0 s" in error, error
    assert files_of(folder / "bank") == before and not (folder / "none.json").exists()


def test_ranks_that_read_different_documents(loaded, tmp_path):
    """Documents that one rank does not see would be missing without a word."""
    model, tokenizer = loaded
    ranks = Ranks(CPU)
    ranks.gather = lambda x: x[None] if len(x) == 1 else torch.stack([x, x + torch.tensor([0, 0, 0, 1])])
    message = "the ranks read different documents; --documents must be the same for all of them"
    with pytest.raises(UserError, match=message):
        sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS[:2]), ranks)


def test_single_documents_are_dealt(loaded, tmp_path):
    """Documents that come one at a time would all lie with the same rank."""
    model, tokenizer = loaded
    all_ranks = [Ranks(CPU) for _ in range(3)]
    for i, ranks in enumerate(all_ranks):
        ranks.world, ranks.rank = 3, i
        ranks.gather, ranks.wait = lambda x: x[None], lambda what: None
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS[:1]), ALONE)
    memories = [ParallelMemory(Bank(tmp_path / "bank"), CPU, ranks) for ranks in all_ranks]
    for n in range(2, 7):
        sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS[:n]), ALONE)
        for memory in memories:
            memory.refresh()
    assert [sum(len(block.numbers) for block in memory.blocks) for memory in memories] == [2, 2, 2]


def test_scores_under_autocast(loaded, tmp_path):
    """With --dtype bfloat16 scores would be rounded, and documents that differ would tie."""
    model, tokenizer = loaded
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS), ALONE)
    memory = ParallelMemory(Bank(tmp_path / "bank"), CPU, ALONE)
    query = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2))
    plain = memory.select({0: query}, torch.ones(1, 4).bool(), 5, [0]).scores
    with torch.autocast("cpu", torch.bfloat16):
        assert memory.select({0: query}, torch.ones(1, 4).bool(), 5, [0]).scores.equal(plain)


def test_more_ranks_than_documents(loaded, tmp_path, monkeypatch):
    """A rank without a document would crash, or keep others' documents from being found."""
    model, tokenizer = loaded
    sync(model, tokenizer, tmp_path / "bank", documents_of(TEXTS[:2]), ALONE)
    bank = Bank(tmp_path / "bank")
    ranks = Ranks(CPU)
    ranks.world, ranks.rank = 5, 0
    ranks.gather = lambda x: x[None].expand(5, *x.shape)
    ranks.sum = ranks.agree = ranks.wait = lambda x: x
    held = []
    for ranks.rank in range(5):
        held.append([int(n) for block in ParallelMemory(bank, CPU, ranks).blocks for n in block.numbers])
    assert sorted(sum(held, [])) == [0, 1]
    ranks.rank = held.index([])
    memory = ParallelMemory(bank, CPU, ranks)
    found = memory.select({0: torch.ones(1, 1, 8)}, torch.ones(1, 1, dtype=torch.bool), 3, [0])
    assert found.documents.eq(-1).all() and found.slots.eq(0).all() and found.keys[0].shape == (0, 1, 8)
    assert KeyBlock(bank, np.array([1]), CPU, "int8", True).routing_keys[0].dtype == torch.int8
    assert bank_layout(model, tokenizer) == bank.layout
