"""A memory on disk: it outlives the process, grows and shrinks while in use, and survives crashes.

    BANK/manifest.json              the live segments, the deleted documents, the model that made them; replaced by rename
    BANK/segments/*.safetensors     immutable: routing keys, content, texts of some documents, and a table of them
    BANK/lock                       held by the one writer

Adding writes a segment, then a new manifest: a crash leaves the old bank or the new one. Removing sets a bit in the manifest. Files that no
manifest names are left from a crash, and the next writer deletes them. Readers keep the snapshot that they opened: its files stay
readable to them when they are deleted. Every byte that is read has been summed (CRC-32): the manifest, each segment's header and table,
each document's text and content, each tile of routing keys.

    M documents   C chunks   N tokens of text   G key/value heads   D head size

Numpy only. Numbers are stored as the model made them, rounded to bfloat16 (held as uint16, numpy has none) or to int8 with one scale for
each vector of G * D.
"""
import base64
import contextlib
import copy
import errno
import hashlib
import json
import os
import re
import secrets
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from common import UserError, atomic_file

FORMAT = 1
SEGMENT_BYTES = 256 << 20   # of a full segment: what a writer holds in memory, what merging rewrites
SMALL, MANY = 8, 8          # a writer merges segments of less than SEGMENT_BYTES / SMALL when there are more than MANY
TILE = 1024                 # chunks of routing keys that share a checksum
CONTENT = {"bfloat16": np.uint16, "int8": np.int8}
TYPES = {"U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
         "F32": np.float32}  # as safetensors calls them
TABLE = {"numbers": np.int64, "chunks": np.int32, "tokens": np.int32, "sources": np.int32, "keys": np.uint64, "digests": np.uint64}
SUMS = ("record_sums", "content_sums", "routing_sums")
AXIS = {**dict.fromkeys([*TABLE, "text", "source"], 0), "routing_keys": 1, "content": 1, "scales": 1}  # along which documents are joined


@dataclass(frozen=True)
class Layout:
    """What a bank stores of a chunk. Fixed when it is created."""
    fingerprint: str            # of the model and tokenizer that encoded it
    layers: int                 # memory layers
    kv_heads: int               # G
    head_dim: int               # D
    content: str = "bfloat16"   # type of keys and values: bfloat16 or int8; routing keys are bfloat16
    unit_keys: bool = True      # routing keys have unit length per head

    def chunk_bytes(self, routing_keys="bfloat16"):
        """Bytes of a chunk in all layers: (routing keys held in this type, content). int8 has a scale of 4 bytes for each vector."""
        size = lambda kind: (2 if kind == "bfloat16" else 1) * self.kv_heads * self.head_dim + 4 * (kind == "int8")
        return self.layers * size(routing_keys), 2 * self.layers * size(self.content)

    def shapes(self, documents, chunks, tokens, source_bytes):
        """The tensors of a segment: name -> (dtype, shape)."""
        G, D, L, M = self.kv_heads, self.head_dim, self.layers, documents
        return {**{name: (dtype, (M,)) for name, dtype in TABLE.items()},
                "record_sums": (np.uint32, (M,)), "content_sums": (np.uint32, (L, M)), "routing_sums": (np.uint32, (L, -(-chunks // TILE))),
                "routing_keys": (np.uint16, (L, chunks, G, D)), "content": (CONTENT[self.content], (L, chunks, 2, G, D)),
                "scales": (np.float32, (L, chunks * (self.content == "int8"), 2)),
                "text": (np.int32, (tokens,)), "source": (np.uint8, (source_bytes,))}


# Encoded documents are `records`: a dict of numpy arrays.
#   numbers, chunks, tokens, sources (bytes), keys (hash of the id), digests (hash of id and text): (M,), the table
#   routing_keys (layers, C, G, D)   content (layers, C, 2, G, D), keys and values side by side   scales (layers, C, 2), int8 only
#   text (N,) token ids   source (bytes,) UTF-8: where each document comes from

def join(parts):
    """Several records as one."""
    return {name: np.concatenate([part[name] for part in parts], axis) for name, axis in AXIS.items()}


def pick(records, rows):
    """The documents of `rows` (M,) bool."""
    units = {"text": "tokens", "source": "sources", "routing_keys": "chunks", "content": "chunks", "scales": "chunks"}
    picked = {}
    for name, axis in AXIS.items():
        x = records[name]
        keep = np.repeat(rows, records[units[name]]) if name in units and x.shape[axis] else rows[:x.shape[axis]]
        picked[name] = np.compress(keep, x, axis)
    return picked


def size_of(records):
    return sum(x.nbytes for x in records.values())


def checksum(*arrays):
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1), value)
    return value


def ends_of(counts):
    """(M,) counts -> (M + 1,) int64, where each begins and the last one ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def add_sums(records):
    """Checksums of every record, content and tile of routing keys, as stored beside them."""
    text, source, chunk = (ends_of(records[name]) for name in ("tokens", "sources", "chunks"))
    M, (L, C) = len(records["numbers"]), records["routing_keys"].shape[:2]
    scaled = records["scales"].shape[1] > 0
    return {**records, "record_sums": np.array([checksum(records["text"][text[m]:text[m + 1]], records["source"][source[m]:source[m + 1]])
                                                for m in range(M)], np.uint32),
            "content_sums": np.array([[checksum(records["content"][i, chunk[m]:chunk[m + 1]],
                                                *[records["scales"][i, chunk[m]:chunk[m + 1]]] * scaled) for m in range(M)]
                                      for i in range(L)], np.uint32).reshape(L, M),
            "routing_sums": np.array([[checksum(records["routing_keys"][i, c:c + TILE]) for c in range(0, C, TILE)]
                                      for i in range(L)], np.uint32).reshape(L, -(-C // TILE))}


# ---------------------------------------------------------------------------------------------------------------------
# Files

def sync_folder(folder):
    """Make what was renamed in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path, data):
    """Write `data` so that `path` holds all of it or what it held before, even after a power cut."""
    with atomic_file(path, "wb") as file:
        view = memoryview(data)
        while view:  # os.write, not file.write: tests/torture.py interrupts it
            view = view[os.write(file.fileno(), view[:1 << 26]):]
    sync_folder(path.parent)


def write_segment(folder, layout, records):
    """Write records as a new segment. Returns its entry for the manifest, which does not name it yet."""
    from safetensors.numpy import save  # here: bench.py runs where only torch, triton and numpy are installed

    counts = dict(documents=len(records["numbers"]), chunks=records["routing_keys"].shape[1], tokens=len(records["text"]),
                  source_bytes=len(records["source"]))
    for name, (dtype, shape) in layout.shapes(**counts).items():
        if name in records and (records[name].dtype != dtype or records[name].shape != shape):
            raise ValueError(f"{name} is {records[name].dtype} {records[name].shape}; a segment needs {np.dtype(dtype)} {shape}")
    for unit, name in (("chunks", "chunks"), ("tokens", "tokens"), ("source_bytes", "sources")):
        if records[name].sum() != counts[unit]:
            raise ValueError(f"{name} add up to {records[name].sum()}; there are {counts[unit]}")
    tensors = add_sums(records)
    data = save(tensors)
    file = f"{secrets.token_hex(8)}.safetensors"
    write_file(Path(folder) / "segments" / file, data)
    header = np.frombuffer(data[:8 + int.from_bytes(data[:8], "little")], np.uint8)
    return {"file": file, "bytes": len(data), "sum": checksum(header, *(tensors[name] for name in (*TABLE, *SUMS))), **counts}


class Segment:
    """An open segment: its table in memory, the rest read when asked for."""

    def __init__(self, folder, layout, entry):
        self.path, self.layout, self.entry = Path(folder) / "segments" / entry["file"], layout, entry
        self.handle = os.open(self.path, os.O_RDONLY)
        if os.fstat(self.handle).st_size != entry["bytes"]:
            raise self.damaged(f"it has {os.fstat(self.handle).st_size:,} bytes; the manifest says {entry['bytes']:,}")
        length = int.from_bytes(self.bytes(0, 8).tobytes(), "little")
        if not 2 <= length <= min(1 << 16, entry["bytes"] - 8):
            raise self.damaged(f"its header says that it has {length:,} bytes")
        header = self.bytes(0, 8 + length)
        self.shapes = layout.shapes(**{name: entry[name] for name in ("documents", "chunks", "tokens", "source_bytes")})
        self.at, found = {}, self.parse(header[8:].tobytes())
        for name, (dtype, shape) in self.shapes.items():
            about = found.get(name, {})
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            begin, end = about.get("data_offsets", (0, -1))
            if (TYPES.get(about.get("dtype")), tuple(about.get("shape", ()))) != (dtype, shape) or end - begin != size \
                    or not 0 <= begin <= end <= entry["bytes"] - 8 - length:
                raise self.damaged(f"its tensor {name} is {about or 'missing'}; the manifest says {np.dtype(dtype)} {shape}")
            self.at[name] = 8 + length + begin
        tables = {name: self.read(name, slice(None)) for name in (*TABLE, *SUMS)}
        if checksum(header, *tables.values()) != entry["sum"]:
            raise self.damaged("the checksum of its header and table is wrong")
        self.table = tables
        for name, unit in (("chunks", "chunks"), ("tokens", "tokens"), ("sources", "source_bytes")):
            if tables[name].sum(dtype=np.int64) != entry[unit] or (tables[name] < (name == "chunks")).any():
                raise self.damaged(f"its {name} do not add up to {entry[unit]:,}")

    def __del__(self):
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.handle)

    def damaged(self, what):
        return UserError(f"{self.path}: damaged, {what}; restore it from a copy or encode the bank anew")

    def parse(self, header):
        try:
            found = json.loads(header)
            if {type(x) for x in found.values()} - {dict}:
                raise ValueError
            for about in found.values():
                begin, end = about["data_offsets"]
                if {type(x) for x in (begin, end, *about["shape"])} - {int} or type(about["dtype"]) is not str:
                    raise ValueError
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self.damaged("its header is not one of safetensors") from None

    def bytes(self, at, size):
        """`size` bytes of the file."""
        found = np.empty(size, np.uint8)
        view, done = memoryview(found), 0
        while done < size:
            n = os.preadv(self.handle, [view[done:done + (1 << 30)]], at + done)
            if n == 0:
                raise self.damaged(f"it ends at byte {at + done:,}")
            done += n
        return found

    def read(self, name, rows, layer=None):
        """Rows [start, stop) of a tensor, of one layer's where it has layers: not yet verified."""
        dtype, shape = self.shapes[name]
        at = self.at[name]
        if layer is not None:
            at, shape = at + layer * int(np.prod(shape[1:])) * np.dtype(dtype).itemsize, shape[1:]
        start, stop, _ = rows.indices(shape[0])
        step = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
        return self.bytes(at + start * step, (stop - start) * step).view(dtype).reshape(stop - start, *shape[1:])

    @cached_property
    def ends(self):
        """Where each document's chunks, tokens and source begin: name -> (M + 1,)."""
        return {name: ends_of(self.table[name]) for name in ("chunks", "tokens", "sources")}

    def document(self, row):
        """A document's text as token ids (N,) and its source, verified."""
        (a, b), (c, d) = (self.ends[name][row:row + 2] for name in ("tokens", "sources"))
        text, source = self.read("text", slice(a, b)), self.read("source", slice(c, d))
        if checksum(text, source) != self.table["record_sums"][row]:
            raise self.damaged(f"the text of document [{self.table['numbers'][row]}] has a wrong checksum")
        return text, source.tobytes().decode()

    def content(self, layer, row):
        """A document's keys and values in one memory layer, (chunks, 2, G, D), and their scales (chunks, 2) or None; verified."""
        rows = slice(*self.ends["chunks"][row:row + 2])
        found = [self.read("content", rows, layer)]
        if self.layout.content == "int8":
            found.append(self.read("scales", rows, layer))
        if checksum(*found) != self.table["content_sums"][layer, row]:
            raise self.damaged(f"the content of document [{self.table['numbers'][row]}] has a wrong checksum")
        return found[0], found[1] if found[1:] else None

    def routing_keys(self, layer, start=0, stop=None):
        """Yields (first chunk, keys (at most TILE, G, D)) of the tiles that hold chunks [start, stop), verified."""
        for tile in range(start // TILE, -(-(self.entry["chunks"] if stop is None else stop) // TILE)):
            keys = self.read("routing_keys", slice(tile * TILE, (tile + 1) * TILE), layer)
            if checksum(keys) != self.table["routing_sums"][layer, tile]:
                raise self.damaged(f"its routing keys have a wrong checksum (layer {layer}, chunks from {tile * TILE:,})")
            yield tile * TILE, keys

    def load(self, rows):
        """Records of the documents of `rows` (M,) bool, every sum of theirs verified."""
        records = {name: self.read(name, slice(None)) for name in AXIS}
        sums = add_sums(records)
        for name in SUMS:
            wrong = np.argwhere(sums[name] != self.table[name])
            wrong = wrong if name == "routing_sums" else wrong[rows[wrong[:, -1]]]
            if len(wrong):
                what = f"layer {wrong[0][0]}, chunks from {wrong[0][1] * TILE:,}" if name == "routing_sums" else \
                    f"document [{self.table['numbers'][wrong[0][-1]]}]"
                raise self.damaged(f"a checksum is wrong ({name}, {what})")
        return pick(records, rows)


# ---------------------------------------------------------------------------------------------------------------------
# The manifest

def read_manifest(folder):
    """(Layout, entries, next number, state, stat) of a bank. An entry says of one segment: file, bytes, sum, documents, chunks, tokens,
    source_bytes, deleted (M,) bool. state: a number that differs for another manifest; stat: as of `stat_manifest`. Raises UserError."""
    path = Path(folder) / "manifest.json"
    try:
        with path.open("rb") as file:
            stat, data = stat_manifest(file.fileno()), file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no memory bank here (no manifest.json); give --documents to make one") from None
    try:
        file = json.loads(data)
        body = file["bank"]
        if file["sum"] != zlib.crc32(json.dumps(body).encode()):
            raise ValueError("its checksum is wrong")
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r} is not {FORMAT}; this is another version's bank")
        layout = Layout(**body["layout"])
        numbers = (layout.layers, layout.kv_heads, layout.head_dim, body["next_number"])
        if {type(n) for n in numbers} != {int} or min(numbers[:3]) < 1 or max(numbers[:3]) > 1 << 16 or numbers[3] < 0 \
                or layout.content not in CONTENT or type(layout.fingerprint) is not str or type(layout.unit_keys) is not bool:
            raise ValueError("its layout is none")
        entries = [read_entry(entry) for entry in body["segments"]]
        if len({entry["file"] for entry in entries}) < len(entries):
            raise ValueError("it names a segment twice")
        return layout, entries, body["next_number"], int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little"), stat
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); restore it from a copy or encode the bank anew") from None


def stat_manifest(path):
    """What changes when the file is replaced, None where there is none."""
    try:
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    except OSError:
        return None


def read_entry(entry):
    counts = [entry[name] for name in ("bytes", "sum", "documents", "chunks", "tokens", "source_bytes")]
    if not re.fullmatch(r"[0-9a-f]{16}\.safetensors", entry["file"]) or {type(n) for n in counts} != {int} or min(counts) < 0 \
            or max(counts) >= 1 << 62 or not 0 < entry["documents"] <= entry["chunks"] <= entry["bytes"]:
        raise ValueError(f"its entry of segment {entry['file']!r} is none")
    packed, M = np.frombuffer(base64.b64decode(entry["deleted"], validate=True), np.uint8), entry["documents"]
    if len(packed) != -(-M // 8):
        raise ValueError(f"its entry of segment {entry['file']!r} marks another number of documents")
    return {**entry, "deleted": np.unpackbits(packed, count=M).astype(bool)}


def write_manifest(folder, layout, entries, next_number):
    entries = [{**entry, "deleted": base64.b64encode(np.packbits(entry["deleted"]).tobytes()).decode()} for entry in entries]
    body = {"format": FORMAT, "layout": asdict(layout), "next_number": next_number, "segments": entries}
    write_file(Path(folder) / "manifest.json", json.dumps({"sum": zlib.crc32(json.dumps(body).encode()), "bank": body}, indent=1).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Reading

class Bank:
    """A snapshot of a bank: what it held when it was opened.

    numbers: (M,) int64, of the live documents, increasing; a document's place in it is its position. chunks: (M,) of each.
    """

    def __init__(self, folder, before=None):
        """Open `folder`; segments that the snapshot `before` has open are not read again. Raises UserError."""
        self.folder = Path(folder)
        with contextlib.suppress(ImportError, ValueError, OSError):  # a large bank has more segments than 1,024, the usual limit
            import resource
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
        known = {segment.entry["file"]: segment for segment in before.segments} if before else {}
        for attempt in range(10):
            self.layout, entries, self.next_number, self.state, self.stat = read_manifest(folder)
            if before and self.layout != before.layout:
                raise UserError(f"{folder}: is another bank now, made by {self.layout.fingerprint}; open it anew")
            try:
                self.segments = [self.again(known[entry["file"]], entry) if entry["file"] in known else Segment(folder, self.layout, entry)
                                 for entry in entries]
                break
            except FileNotFoundError as error:
                if self.stat == stat_manifest(self.folder / "manifest.json") or attempt == 9:  # else a writer has just replaced it
                    raise UserError(f"{error.filename}: missing; restore it from a copy or encode the bank anew") from None
        self.deleted = [entry["deleted"] for entry in entries]
        rows = [np.flatnonzero(~deleted) for deleted in self.deleted]
        segment_of = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
        row_of = np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int32)
        column = lambda name: np.concatenate([*(s.table[name][r] for s, r in zip(self.segments, rows)), np.zeros(0, TABLE[name])])
        numbers = column("numbers")
        order = np.argsort(numbers, kind="stable")
        self.numbers, self.chunks, self.keys, self.digests = (column(name)[order] for name in ("numbers", "chunks", "keys", "digests"))
        self.tokens, self.segment_of, self.row_of = column("tokens")[order], segment_of[order], row_of[order]
        if len(self.numbers) and (self.numbers[0] < 0 or (np.diff(self.numbers) <= 0).any()):
            raise UserError(f"{self.folder}: damaged, two documents have the same number; restore it from a copy or encode the bank anew")

    def again(self, segment, entry):
        if {**segment.entry, "deleted": 0} != {**entry, "deleted": 0}:
            raise segment.damaged("the manifest says something else of it than before")
        return segment

    def only(self, numbers):
        """The same snapshot with the documents of these numbers only."""
        part, kept = copy.copy(self), np.isin(self.numbers, numbers)
        for name in ("numbers", "chunks", "keys", "digests", "tokens", "segment_of", "row_of"):
            setattr(part, name, getattr(self, name)[kept])
        return part

    def __len__(self):
        return len(self.numbers)

    def refresh(self):
        """The bank as it is now: this snapshot itself where nothing has changed."""
        return self if self.stat == stat_manifest(self.folder / "manifest.json") else Bank(self.folder, self)

    def document(self, position):
        """A document's text as token ids, and its source."""
        return self.segments[self.segment_of[position]].document(self.row_of[position])

    def content(self, layer, position):
        """See Segment.content."""
        return self.segments[self.segment_of[position]].content(layer, self.row_of[position])

    def plan(self, positions):
        """Where the chunks of these documents lie: for each segment that has some, (segment, its chunks (n,) increasing, the rows (n,) that
        they fill among all chunks of the documents, in the order of `positions`)."""
        to, found = ends_of(self.chunks[positions]), []
        order = np.lexsort((self.row_of[positions], self.segment_of[positions]))
        cuts = np.searchsorted(self.segment_of[positions[order]], np.arange(len(self.segments) + 1))
        for segment, a, b in zip(self.segments, cuts, cuts[1:]):
            if a < b:
                mine = order[a:b]
                counts = self.chunks[positions[mine]].astype(np.int64)
                nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
                found.append((segment, np.repeat(segment.ends["chunks"][self.row_of[positions[mine]]], counts) + nth,
                              np.repeat(to[mine], counts) + nth))
        return found

    def routing_keys(self, layer, plan):
        """Yields (rows, keys (n, G, D)): tile by tile, the verified routing keys of a `plan` and the rows that they fill."""
        for segment, source, rows in plan:
            for first, keys in segment.routing_keys(layer, int(source[0]), int(source[-1]) + 1):
                low, high = np.searchsorted(source, [first, first + len(keys)])
                if low < high:
                    yield rows[low:high], keys[source[low:high] - first]

    def verify(self, progress=None):
        """Check every sum of every segment; raises UserError for the first that is wrong. progress: called with bytes read."""
        for segment, deleted in zip(self.segments, self.deleted):
            segment.load(~deleted)
            if progress:
                progress(segment.entry["bytes"])


# ---------------------------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def locked(folder):
    """Hold the writer's lock; the kernel takes it back from a process that dies. Raises UserError when another process holds it."""
    import fcntl  # not on Windows
    path = Path(folder) / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            holder = os.pread(handle, 64, 0).decode(errors="replace").strip() or "unknown"
            raise UserError(f"{folder}: another process is writing to this bank ({holder}); wait until it is done, or ask without "
                            "--documents") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(handle)


class Writer:
    """The one writer of a bank, for as long as it is open:  with Writer(folder) as writer: writer.add(records)."""

    def __init__(self, folder, layout=None):
        """layout: of a bank to create where there is none."""
        self.folder, self.new = Path(folder), layout

    def __enter__(self):
        if self.new and not (self.folder / "manifest.json").exists():
            if not self.is_free():
                raise UserError(f"{self.folder}: exists and is not a memory bank, or one that has lost its manifest.json; "
                                "give another --memory")
            (self.folder / "segments").mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
        elif not (self.folder / "manifest.json").exists():
            read_manifest(self.folder)  # raises
        self.lock = locked(self.folder)
        self.lock.__enter__()
        try:
            if self.new and not (self.folder / "manifest.json").exists():
                write_manifest(self.folder, self.new, [], 0)
            self.bank = Bank(self.folder)
            self.clean()
        except BaseException:
            self.lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.clean()  # after a full disk: what was written and is not named
        self.lock.__exit__(None, None, None)

    def is_free(self):
        """Whether a bank can be made here: nothing is in the way but what an interrupted making has left."""
        if not self.folder.exists():
            return True
        return self.folder.is_dir() and all(path.name == "lock" or path.name == "segments" and path.is_dir() and not any(path.iterdir())
                                            or path.name.startswith(".manifest.json.") for path in self.folder.iterdir())

    def clean(self):
        """Delete what a crash has left: our own files that no manifest names."""
        named = {segment.path.name for segment in self.bank.segments}
        for path in [*(self.folder / "segments").iterdir(), *self.folder.glob(".manifest.json.*.tmp")]:
            if path.name not in named and re.fullmatch(r"[0-9a-f]{16}\.safetensors|\..*\.tmp", path.name):
                path.unlink()

    def commit(self, entries=(), removed=(), dropped=()):
        """One change, whole or not at all: segments that were written, numbers that go, files of segments that go.

        A number may go and come back with an entry in the same change: a document's new text.
        """
        removed = np.asarray(list(removed), np.int64)
        missing = removed[~np.isin(removed, self.bank.numbers)]
        if len(missing):
            raise UserError(f"{self.folder}: no document [{missing[0]}]")
        kept = []
        for segment, deleted in zip(self.bank.segments, self.bank.deleted):
            deleted = deleted | np.isin(segment.table["numbers"], removed)
            if segment.entry["file"] not in dropped and not deleted.all():
                kept.append({**segment.entry, "deleted": deleted})
        kept += [{**entry, "deleted": np.zeros(entry["documents"], bool)} for entry in entries]
        added, stay = [Segment(self.folder, self.bank.layout, entry).table for entry in entries], ~np.isin(self.bank.numbers, removed)
        for name, what in (("numbers", "number"), ("keys", "id")):
            live = np.concatenate([getattr(self.bank, name)[stay], *([] if dropped else [table[name] for table in added])])
            values, counts = np.unique(live, return_counts=True)
            if (counts > 1).any():
                twice = f" [{values[counts.argmax()]}]" if what == "number" else ""
                raise UserError(f"{self.folder}: two documents would have the same {what}{twice}; nothing was added")
        following = max([self.bank.next_number, *(int(table["numbers"].max()) + 1 for table in added)])
        write_manifest(self.folder, self.bank.layout, kept, following)
        self.bank = Bank(self.folder, self.bank)
        self.clean()

    def add(self, records, removed=()):
        """Add documents, and let `removed` go in the same change."""
        self.commit([write_segment(self.folder, self.bank.layout, records)], removed)

    def remove(self, numbers):
        self.commit(removed=numbers)

    def rewrite(self, segments, progress=None):
        """Write the live documents of these segments (indices) into full ones, and let the old ones go."""
        entries, parts = [], []
        for i in segments:
            rows = ~self.bank.deleted[i]
            if rows.any():
                parts.append(self.bank.segments[i].load(rows))
            if progress:
                progress(self.bank.segments[i].entry["bytes"])
            if parts and sum(map(size_of, parts)) >= SEGMENT_BYTES:
                entries.append(write_segment(self.folder, self.bank.layout, join(parts)))
                parts = []
        if parts:
            entries.append(write_segment(self.folder, self.bank.layout, join(parts)))
        self.commit(entries, dropped={self.bank.segments[i].entry["file"] for i in segments})

    def merge(self):
        """Join small segments when there are many: opening a bank costs a file for each."""
        small = [i for i, segment in enumerate(self.bank.segments) if segment.entry["bytes"] < SEGMENT_BYTES / SMALL]
        if len(small) > MANY:
            self.rewrite(small)

    def compact(self, progress=None):
        """Rewrite all segments, without the deleted documents."""
        self.rewrite(range(len(self.bank.segments)), progress)
