"""The bank on disk against an oracle, a dict of what it must hold; tests/torture.py kills and damages it."""
import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import torture
from torture import CHANGES, LAYOUTS, after, contents, expected, make, start

import memory_bank
from common import UserError
from memory_bank import Bank, Writer, add_sums, join, pick, write_segment

LAYOUT = LAYOUTS["bfloat16"]


@pytest.fixture
def bank(tmp_path):
    """A folder with a bank of documents 0 to 5 in three segments, number 2 deleted, 4 changed."""
    with Writer(tmp_path / "bank", LAYOUT) as writer:
        for numbers in ([0, 1, 2], [5, 3], [4]):
            writer.add(join([make(number, 0, LAYOUT) for number in numbers]))
        writer.remove([2])
        writer.add(make(4, 1, LAYOUT), removed=[4])
    return tmp_path / "bank"


HELD = {0: 0, 1: 0, 3: 0, 4: 1, 5: 0}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_changes(tmp_path, kind, seed):
    """What was added would be missing, changed or found after it went; numbers would move; a rewritten bank
    would hold something else."""
    rng, versions, following = random.Random(seed), {}, 0
    with torture.small_segments(), Writer(tmp_path / "bank", LAYOUTS[kind]) as writer:
        before = None
        for _ in range(25):
            change, draw = rng.choice(list(CHANGES)), rng.random()
            CHANGES[change](writer, versions, random.Random(draw))
            versions, following = after(change, versions, following, draw)
            assert contents(writer.bank) == expected(versions, LAYOUTS[kind])
            assert writer.bank.next_number == following and writer.bank.numbers.tolist() == sorted(versions)
            before = Bank(tmp_path / "bank", before)  # a reader that follows
            assert contents(before) == contents(Bank(tmp_path / "bank")) == expected(versions, LAYOUTS[kind])
    Bank(tmp_path / "bank").verify()


def test_merge_leaves_few_segments(tmp_path):
    """A bank of many small changes would need a file for each for ever; or every change would rewrite a large
    bank."""
    with Writer(tmp_path / "bank", LAYOUT) as writer:
        for number in range(memory_bank.MANY):
            writer.add(make(number, 0, LAYOUT))
        writer.merge()
        assert len(writer.bank.segments) == memory_bank.MANY
        writer.add(make(99, 0, LAYOUT))
        writer.merge()
        assert len(writer.bank.segments) == 1 and len(writer.bank) == memory_bank.MANY + 1


def test_compact_forgets(bank):
    """What was deleted would stay on disk after --compact."""
    gone = make(2, 0, LAYOUT)["source"].tobytes()
    holds = lambda: any(gone in path.read_bytes() for path in (bank / "segments").iterdir())
    assert holds()
    with Writer(bank) as writer:
        writer.compact()
        assert len(writer.bank.segments) == 1
    assert not holds() and contents(Bank(bank)) == expected(HELD, LAYOUT)


def test_full_segments(tmp_path):
    """Compacting would hold the whole bank in memory, or write one file of it."""
    with torture.small_segments():
        start(tmp_path / "bank", LAYOUT, segments=30)
        with Writer(tmp_path / "bank") as writer:
            writer.compact()
            sizes = [memory_bank.size_of(s.load(np.ones(s.entry["documents"], bool)))
                     for s in writer.bank.segments]
    assert len(sizes) > 2 and all(2048 <= size < 4096 for size in sizes[:-1])


def test_a_reader_keeps_its_snapshot(bank):
    """A question that is being answered would lose its documents when the bank is rewritten under it."""
    reader = Bank(bank)
    with Writer(bank) as writer:
        writer.remove([0, 1])
        writer.compact()
        assert contents(reader) == expected(HELD, LAYOUT)
    assert contents(reader) == expected(HELD, LAYOUT)
    now = reader.refresh()
    assert now is not reader and sorted(contents(now)) == [3, 4, 5] and now.refresh() is now


def test_readers_of_a_busy_bank(bank):
    """Opening would fail when a writer replaces the segments between the reading of the manifest and of its
    segments."""
    def write():
        with Writer(bank) as writer:
            for number in range(100, 140):
                writer.add(make(number, 0, LAYOUT))
                writer.compact()
    thread = threading.Thread(target=write)
    thread.start()
    opened = 0
    while thread.is_alive():
        numbers = Bank(bank).numbers.tolist()
        assert numbers == sorted(HELD) + list(range(100, 100 + len(numbers) - len(HELD)))
        opened += 1
    thread.join()
    assert opened > 5


def test_one_writer(bank):
    """Two writers would lose each other's documents; or a writer that died would lock the bank for ever."""
    code = f"""
import sys
sys.path[:0] = ["."]
from memory_bank import Writer
with Writer({str(bank)!r}):
    print(flush=True)
    input()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=os.path.dirname(memory_bank.__file__),
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    message = rf"bank: another process is writing to this bank \(process {holder.pid}\); wait"
    with pytest.raises(UserError, match=message):
        with Writer(bank):
            pass
    assert contents(Bank(bank)) == expected(HELD, LAYOUT)  # readers do not wait
    holder.kill()
    holder.wait()
    with Writer(bank) as writer:
        writer.remove([0])
    holder.stdin.close()
    holder.stdout.close()


def test_numbers(bank):
    """A number would be given twice, or a document removed that is not there."""
    with Writer(bank) as writer:
        with pytest.raises(UserError,
                           match=r"two documents would have the same number \[3\]; nothing was added"):
            writer.add(make(3, 0, LAYOUT))
        with pytest.raises(UserError, match=r"two documents would have the same number \[7\]"):
            writer.add(join([make(7, 0, LAYOUT), make(7, 1, LAYOUT)]))
        with pytest.raises(UserError, match="two documents would have the same id"):
            writer.add({**make(8, 0, LAYOUT), "id_hashes": make(3, 0, LAYOUT)["id_hashes"]})
        with pytest.raises(UserError, match=r"bank: no document \[2\]"):
            writer.remove([2])
        writer.add(make(2, 5, LAYOUT))
        assert writer.bank.next_number == 6
        writer.remove([5])
        assert writer.bank.next_number == 6  # never given again
    assert contents(Bank(bank)) == expected({0: 0, 1: 0, 2: 5, 3: 0, 4: 1}, LAYOUT)


@pytest.mark.parametrize("change", [
    dict(routing_keys=np.zeros((3, 1, 2, 4), np.float32)), dict(chunks=np.array([9], np.int32)),
    dict(content=np.zeros((7, 2, 2, 1, 4), np.uint16)), dict(text=np.zeros(40, np.int32))])
def test_wrong_records(tmp_path, change):
    """Records that do not fit the bank would be written and not be readable."""
    (tmp_path / "segments").mkdir()
    with pytest.raises(ValueError, match="a segment needs|add up to"):
        write_segment(tmp_path, LAYOUT, {**make(1, 0, LAYOUT), **change})
    assert not list((tmp_path / "segments").iterdir())


@pytest.mark.parametrize("rows", [[True, False, True], [False] * 3, [True] * 3])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_pick(kind, rows):
    """Merging would mix up documents of unequal length."""
    parts = [make(number, 0, LAYOUTS[kind]) for number in range(3)]
    found = pick(join(parts), np.array(rows))
    wanted = [part for part, row in zip(parts, rows) if row]
    for name, x in found.items():
        assert len(wanted) == 0 and x.size == 0 or np.array_equal(x, join(wanted)[name]), name


def test_sums_cover_every_byte():
    """A damaged byte would be believed: of every record all bytes stand under one of its sums."""
    records = join([make(number, 0, LAYOUTS["int8"]) for number in range(3)])
    before = add_sums(records)
    for name in ("text", "source", "content", "scales", "routing_keys"):
        for i in np.linspace(0, records[name].nbytes - 1, 40).astype(int):
            changed = {**records, name: records[name].copy()}
            changed[name].view(np.uint8).reshape(-1)[i] ^= 16
            after = add_sums(changed)
            assert any(not np.array_equal(before[sums], after[sums]) for sums in memory_bank.SUMS), (name, i)


@pytest.mark.parametrize("name, read, message", [
    ("text", lambda s: s.document(1), "the text of document [1] has a wrong checksum"),
    ("source", lambda s: s.document(1), "the text of document [1] has a wrong checksum"),
    ("content", lambda s: s.content(1), "the content of document [1] has a wrong checksum"),
    ("scales", lambda s: s.content(1), "the content of document [1] has a wrong checksum"),
    ("routing_keys", lambda s: s.tile(0, 0),
     "its routing keys have a wrong checksum (layer 0, chunks from 0)"),
    ("digests", None, "the checksum of its header and table is wrong"),
])
def test_every_reader_checks(tmp_path, name, read, message):
    """A damaged byte would be found by --verify alone, and until then answer questions."""
    with Writer(tmp_path / "bank", LAYOUTS["int8"]) as writer:
        writer.add(join([make(number, 0, LAYOUTS["int8"]) for number in (0, 1, 3)]))
    segment, = Bank(tmp_path / "bank").segments
    unit = {"text": "tokens", "source": "sources"}.get(name, "chunks")
    row, (_, shape) = int(segment.ends[unit][1]), segment.shapes[name]
    item = segment.read(name, slice(0, 1), *[0] * (name == "routing_keys")).nbytes
    assert shape[0] and item
    data = bytearray(segment.path.read_bytes())
    data[segment.begins[name] + row * item] ^= 1
    segment.path.write_bytes(data)
    with pytest.raises(UserError) as error:
        found, = Bank(tmp_path / "bank").segments
        read(found)
    assert message in str(error.value) and str(segment.path) in str(error.value)
    with pytest.raises(UserError, match="checksum"):
        Bank(tmp_path / "bank").verify()


def test_tiles(tmp_path, monkeypatch):
    """Routing keys of documents that begin or end within a tile would be another document's."""
    monkeypatch.setattr(memory_bank, "TILE", 4)
    with Writer(tmp_path / "bank", LAYOUT) as writer:
        writer.add(join([make(number, 0, LAYOUT) for number in (3, 9, 1, 4)]))
        writer.add(join([make(number, 0, LAYOUT) for number in (8, 2, 7, 5, 6, 0)]))
        writer.remove([4, 5])
    bank = Bank(tmp_path / "bank")
    wanted = {number: make(number, 0, LAYOUT)["routing_keys"] for number in bank.numbers.tolist()}
    for positions in (np.arange(8), np.array([1]), np.array([7, 0, 3]), np.array([6, 5])):
        numbers, found = bank.numbers[positions].tolist(), {}
        for layer in range(3):
            ends = memory_bank.ends_of(bank.chunks[positions])
            keys, filled = np.zeros((ends[-1], 2, 4), np.uint16), np.zeros(ends[-1], int)
            for rows, read in bank.routing_keys(layer, bank.plan(positions)):
                keys[rows] = read()
                filled[rows] += 1
            assert (filled == 1).all()
            found[layer] = [keys[a:b] for a, b in zip(ends, ends[1:])]
        for i, number in enumerate(numbers):
            assert all(np.array_equal(found[layer][i], wanted[number][layer]) for layer in range(3))


@pytest.mark.parametrize("wrong, message", [
    ("none", r"none: no memory bank here \(no manifest.json\); give --documents to make one"),
    ("file", "file: no memory bank here"),
])
def test_no_bank(tmp_path, wrong, message):
    """A folder that is no bank would end in a traceback."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=message):
        Bank(tmp_path / wrong)
    with pytest.raises(UserError, match=message):
        Writer(tmp_path / wrong).__enter__()


def test_a_folder_of_something_else(tmp_path):
    """A bank would be made among a user's files."""
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is not a memory bank"):
        Writer(tmp_path, LAYOUT).__enter__()
    with pytest.raises(UserError, match="exists and is not a memory bank"):
        Writer(tmp_path / "thesis.txt", LAYOUT).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "song.wav").write_text("x")
    with pytest.raises(UserError,
                       match="exists and is not a memory bank, or one that has lost its manifest.json"):
        Writer(tmp_path, LAYOUT).__enter__()
    assert (tmp_path / "segments" / "song.wav").exists()


def test_a_lost_manifest(bank):
    """A bank whose manifest is gone would be made anew, and its segments deleted."""
    segments = files_below(bank)
    (bank / "manifest.json").unlink()
    with pytest.raises(UserError, match="one that has lost its manifest.json"):
        Writer(bank, LAYOUT).__enter__()
    assert files_below(bank) == segments - {"manifest.json"}


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_files_of_others(bank):
    """A writer would delete what is not its own, or stumble over it; or leave what a kill has left."""
    (bank / "segments" / "notes").mkdir()
    (bank / ".routers.safetensors.abc.tmp").write_bytes(b"x")
    (bank / "segments" / ".nfs00001").write_text("an open file of another machine")
    with Writer(bank) as writer:
        writer.add(make(9, 0, LAYOUT))
    assert (bank / "segments" / "notes").is_dir() and (bank / "segments" / ".nfs00001").exists()
    assert not [*bank.rglob("*.tmp")]
    assert contents(Bank(bank)) == expected(HELD | {9: 0}, LAYOUT)


def test_another_bank_in_its_place(bank):
    """A reader that follows would read another model's documents as if they were its own."""
    import shutil
    reader = Bank(bank)
    shutil.rmtree(bank)
    with Writer(bank, dataclasses.replace(LAYOUT, fingerprint="other")) as writer:
        writer.add(make(0, 0, LAYOUT))
    with pytest.raises(UserError, match="is another bank now, made by other; open it anew"):
        reader.refresh()


def test_state(bank):
    """Ranks would take different snapshots for the same one: the state belongs to what was read, not to what
    lies there now."""
    reader = Bank(bank)
    assert reader.state == Bank(bank).state
    with Writer(bank) as writer:
        writer.remove([0])
        first = writer.bank.state
        writer.add(make(0, 0, LAYOUT))
    assert len({reader.state, first, Bank(bank).state}) == 3


def edit_manifest(folder, edit):
    """Change a manifest under a checksum that is right."""
    body = json.loads((folder / "manifest.json").read_text())["bank"]
    edit(body)
    file = {"sum": zlib.crc32(json.dumps(body).encode()), "bank": body}
    (folder / "manifest.json").write_text(json.dumps(file))


def test_another_format(bank):
    """A bank of another version would be misread, or called damaged."""
    for other in (1, 3, None):
        edit_manifest(bank, lambda body: body.update(format=other))
        with pytest.raises(UserError, match=rf"bank: made by another version \(format {other}, here 2\); "
                                            "encode the documents again into another --memory$"):
            Bank(bank)


@pytest.mark.parametrize("changes", [
    dict(documents=0), dict(documents=-1), dict(documents=1 << 40), dict(documents=True), dict(documents="3"),
    dict(chunks=1 << 62), dict(chunks=1), dict(bytes=1), dict(bytes=1 << 70), dict(sum=-5), dict(tokens=None),
    dict(source_bytes=1.0), dict(deleted=""), dict(deleted="!!!"), dict(deleted="AAAA"), dict(deleted=[]),
    dict(file="../manifest.json"), dict(file="x"), dict(file=7), "twice", "not an object", dict(layers=0),
    dict(layers=1 << 20), dict(head_dim="x"), dict(kv_heads=2.0), dict(layers=-1), dict(routing_layers=0),
    dict(routing_heads=3), dict(routing_dim=1 << 20), dict(routing_dim=True), dict(content="float32"),
    dict(content=[]),
    dict(fingerprint=None), dict(more=1)])
def test_a_hostile_manifest(bank, changes):
    """Sizes in a manifest would be believed because its checksum is right: huge allocations, files elsewhere,
    documents twice."""
    def edit(body):
        if changes == "twice":
            body["segments"].append(body["segments"][0])
        elif changes == "not an object":
            body["segments"][0] = 5
        else:
            of_layout = set(changes) & {*body["layout"], "more"}
            (body["layout"] if of_layout else body["segments"][0]).update(changes)
    edit_manifest(bank, edit)
    with pytest.raises(UserError, match=r"manifest.json: damaged|safetensors: (damaged|missing)"):
        Bank(bank)


def test_every_byte_of_the_manifest(bank):
    """A damaged byte of the manifest would bring documents back or hide others."""
    path, wanted = bank / "manifest.json", contents(Bank(bank))
    data, refused = path.read_bytes(), 0
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
        try:
            assert contents(Bank(bank)) == wanted
        except UserError as error:
            assert str(path) in str(error) or "no memory bank" in str(error)
            refused += 1
    assert refused > len(data) // 2


@pytest.mark.parametrize("change, message", [
    (lambda data: data + b"x", "the manifest says"), (lambda data: data[:-1], "the manifest says"),
    (lambda data: b"", "0 bytes")])
def test_a_segment_of_another_size(bank, change, message):
    """A segment that was cut or has grown would be read as it is."""
    path = sorted((bank / "segments").iterdir())[0]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path.name}: damaged, it has .*{message}"):
        Bank(bank)


def test_a_missing_segment(bank):
    """A segment that is gone would be looked for for ever, or left out."""
    next((bank / "segments").iterdir()).unlink()
    with pytest.raises(UserError,
                       match="safetensors: missing; restore it from a copy or encode the bank anew"):
        Bank(bank)


@pytest.mark.parametrize("length", [0, 1, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_hostile_header(bank, length):
    """A header that says it is huge would be believed."""
    path = sorted((bank / "segments").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[:8] = length.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(UserError,
                       match=f"{path.name}: damaged, its header says that it has {length:,} bytes"):
        Bank(bank)


def test_the_order_of_calls(tmp_path, monkeypatch):
    """After a power cut a name could stand for a file whose bytes never reached the disk: fsync comes before
    rename, the folder's after."""
    calls = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        def call(*args, name=name, real=real):
            folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")
            calls.append(name + " of the folder" * folder)
            return real(*args)
        monkeypatch.setattr(os, name, call)
    memory_bank.write_file(tmp_path / "file", b"x" * 10)
    assert calls == ["write", "fsync", "replace", "fsync of the folder"]
    assert (tmp_path / "file").read_bytes() == b"x" * 10


# ------------------------------------------------------------------------------------------------------------
# A sample of tests/torture.py

@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_every_call(change):
    """A SIGKILL at some write, fsync or rename would lose documents, half of a change would be found, or
    stray files would stay."""
    calls, new = torture.kill_at_every_call(change, "halfway", LAYOUT)
    assert calls > 15 and (0 < new < calls or change in ("merge", "compact"))


@pytest.mark.parametrize("change", CHANGES)
def test_full_disk(change):
    """A full disk would cost what the bank held."""
    torture.kill_at_every_call(change, "full", LAYOUT, stride=3)


def test_interrupted_behind_its_commit(bank, monkeypatch):
    """Ctrl-C between the new manifest and its reading would delete the segments that it names."""
    def interrupted(*_):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Writer(bank, LAYOUT) as writer:
        monkeypatch.setattr(memory_bank, "Bank", interrupted)
        writer.add(make(7, 0, LAYOUT))
    monkeypatch.undo()
    assert contents(Bank(bank)) == expected(HELD | {7: 0}, LAYOUT)


def test_killed_while_it_is_made():
    """A bank whose making was interrupted could neither be opened nor made again."""
    assert torture.kill_creation("halfway") > 5


def test_killed_at_random():
    """As above, at moments that no one has thought of."""
    assert torture.kill_at_random(8, 3, LAYOUT) > 0


@pytest.mark.parametrize("kind", LAYOUTS)
def test_damaged_files(kind):
    """A damaged file would end in a traceback, a hang, a huge allocation or another answer."""
    refused, unchanged = torture.damage(25, 5, LAYOUTS[kind])
    assert refused > 15
