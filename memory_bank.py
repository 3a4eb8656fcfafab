"""A memory on disk: it outlives the process, grows and shrinks while in use, and survives crashes.

    BANK/manifest.json              the live segments, the deleted documents, the model that made them
    BANK/segments/*.safetensors     immutable: routing keys, content and texts of documents, a table of them
    BANK/lock                       held by the one writer
    BANK/routers.safetensors        of a backbone without any: made of the bank's first documents (sync.py)

Adding writes a segment, then a new manifest by rename: a crash leaves the old bank or the new one. Removing
sets a bit in the manifest. Files that no manifest names are left from a crash; the next writer deletes them.
Readers keep the snapshot that they opened: its files stay readable to them when they are deleted. Every byte
that is read has been summed (CRC-32): the manifest, each segment's header and table, each document's text and
content, each tile of routing keys.

    M documents   C chunks   N tokens of text   G key/value heads   D head size
    L layers that read: all of a document's lie side by side, it is one read   R layers that route

All arrays are NumPy's. Numbers are stored as the model made them, rounded to bfloat16 (held as uint16: NumPy
has none) or to int8 with one scale for each vector of G * D.
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
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from common import UserError, atomic_file, make_folder, naming

FORMAT = 2
SEGMENT_BYTES = 256 << 20   # of a full segment: what a writer holds in memory, what merging rewrites
SMALL, MANY = 8, 8          # more than MANY segments below SEGMENT_BYTES / SMALL are merged
TILE = 1024                 # chunks of routing keys that share a checksum
CONTENT = {"bfloat16": np.uint16, "int8": np.int8}
TYPES = {np.uint8: "U8", np.int8: "I8", np.uint16: "U16", np.int32: "I32", np.uint32: "U32", np.int64: "I64",
         np.uint64: "U64", np.float32: "F32"}  # as safetensors calls them
TABLE = {"numbers": np.int64, "chunks": np.int32, "tokens": np.int32, "sources": np.int32,
         "id_hashes": np.uint64, "digests": np.uint64}
SUMS = ("record_sums", "content_sums", "routing_sums")
BY_CHUNK = ("routing_keys", "content", "scales")
AXIS = {**dict.fromkeys([*TABLE, "text", "source", "content", "scales"], 0), "routing_keys": 1}
COUNTS = ("documents", "chunks", "tokens", "source_bytes")  # of a segment, in the manifest
ON_DISK = {"id_hashes": "keys"}  # what a segment calls them
ROUTERS = "routers.safetensors"
REPAIR = "restore it from a copy or encode the bank anew"


@dataclass(frozen=True)
class Layout:
    """What a bank stores of a chunk. Fixed when it is created."""
    fingerprint: str            # of the model and tokenizer that encoded it
    layers: int                 # L, that read; 0: neither keys nor values are stored
    kv_heads: int               # G
    head_dim: int               # D
    routing_layers: int         # R, that route
    routing_heads: int          # of a routing key
    routing_dim: int            # numbers of such a head
    content: str = "bfloat16"   # type of keys and values: bfloat16 or int8; routing keys are bfloat16
    unit_keys: bool = True      # routing keys have unit length per head

    def chunk_bytes(self, routing_keys="bfloat16"):
        """Bytes of a chunk in all layers: (routing keys held in this type, content)."""
        size = lambda numbers, kind: 2 * numbers if kind == "bfloat16" else numbers + 4  # 4: its scale
        return (self.routing_layers * size(self.routing_heads * self.routing_dim, routing_keys),
                2 * self.layers * size(self.kv_heads * self.head_dim, self.content))

    def shapes(self, documents, chunks, tokens, source_bytes):
        """The tensors of a segment: name -> (dtype, shape)."""
        G, D, L, M, R = self.kv_heads, self.head_dim, self.layers, documents, self.routing_layers
        scaled = chunks if self.content == "int8" else 0
        return {**{name: (dtype, (M,)) for name, dtype in TABLE.items()},
                "record_sums": (np.uint32, (M,)), "content_sums": (np.uint32, (M,)),
                "routing_sums": (np.uint32, (R, -(-chunks // TILE))),
                "routing_keys": (np.uint16, (R, chunks, self.routing_heads, self.routing_dim)),
                "content": (CONTENT[self.content], (chunks, L, 2, G, D)),
                "scales": (np.float32, (scaled, L, 2)),
                "text": (np.int32, (tokens,)), "source": (np.uint8, (source_bytes,))}


# Encoded documents are `records`: a dict of numpy arrays, joined along AXIS.
#   numbers, chunks, tokens, sources (bytes), id_hashes, digests (hash of id, place and text): (M,), the table
#   routing_keys (R, C, ., .)   content (C, L, 2, G, D): keys and values   scales (C, L, 2): of int8 content
#   text (N,) token ids   source (bytes,) UTF-8: where each document comes from

def join(parts):
    """Several records as one."""
    return {name: np.concatenate([part[name] for part in parts], axis) for name, axis in AXIS.items()}


def pick(records, rows):
    """The documents of `rows` (M,) bool."""
    units = {"text": "tokens", "source": "sources", **dict.fromkeys(BY_CHUNK, "chunks")}
    picked = {}
    for name, axis in AXIS.items():
        keep = np.repeat(rows, records[units[name]]) if name in units else rows
        if records[name].shape[axis] == 0:  # no scales
            keep = keep[:0]
        picked[name] = np.compress(keep, records[name], axis)
    return picked


def size_of(records):
    """Bytes of records, arrays by name."""
    return sum(x.nbytes for x in records.values())


def checksum(*arrays):
    """CRC-32 of the bytes of arrays, one after the other."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1), value)
    return value


def ends_of(counts):
    """(M,) counts -> (M + 1,) int64, where each begins and the last one ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def add_sums(records):
    """Records with the checksums of every text, content and tile of routing keys, as stored beside them."""
    def spans(name):
        ends = ends_of(records[name])
        return [slice(start, stop) for start, stop in zip(ends, ends[1:])]

    R, C = records["routing_keys"].shape[:2]
    tiles = [slice(start, start + TILE) for start in range(0, C, TILE)]
    text, source, routing_keys = records["text"], records["source"], records["routing_keys"]
    content = [records["content"], records["scales"]] if records["scales"].size else [records["content"]]
    sums = {"record_sums": [checksum(text[a], source[b]) for a, b in zip(spans("tokens"), spans("sources"))],
            "content_sums": [checksum(*(x[rows] for x in content)) for rows in spans("chunks")],
            "routing_sums": [[checksum(routing_keys[layer, rows]) for rows in tiles] for layer in range(R)]}
    return {**records, **{name: np.array(values, np.uint32) for name, values in sums.items()}}


# ------------------------------------------------------------------------------------------------------------
# Files

def write_file(path, data):
    """Write `data` so that `path` holds all of it or what it held before, even after a power cut."""
    with atomic_file(path, "wb") as file:
        view = memoryview(data)
        while view:  # os.write, not file.write: tests/torture.py interrupts it
            view = view[os.write(file.fileno(), view[:1 << 26]):]


def write_segment(folder, layout, records):
    """Write records as a new segment. Returns its entry for the manifest, which does not name it yet."""
    from safetensors.numpy import save  # here: bench.py runs where only torch, triton and numpy are installed

    counts = dict(documents=len(records["numbers"]), chunks=records["routing_keys"].shape[1],
                  tokens=len(records["text"]), source_bytes=len(records["source"]))
    for name, (dtype, shape) in layout.shapes(**counts).items():
        x = records.get(name)  # None: a sum
        if x is not None and (x.dtype != dtype or x.shape != shape):
            raise ValueError(f"{name} is {x.dtype} {x.shape}; a segment needs {np.dtype(dtype)} {shape}")
    for name, count in zip(("chunks", "tokens", "sources"), COUNTS[1:]):
        if records[name].sum() != counts[count]:
            raise ValueError(f"{name} add up to {records[name].sum()}; there are {counts[count]}")
    tensors = add_sums(records)
    data = save({ON_DISK.get(name, name): x for name, x in tensors.items()})
    file = f"{secrets.token_hex(8)}.safetensors"
    write_file(Path(folder) / "segments" / file, data)
    header = np.frombuffer(data[:8 + int.from_bytes(data[:8], "little")], np.uint8)
    table = [tensors[name] for name in (*TABLE, *SUMS)]
    return {"file": file, "bytes": len(data), "sum": checksum(header, *table), **counts}


class Segment:
    """An open segment: its table in memory, the rest read when asked for."""

    def __init__(self, folder, layout, entry):
        """entry: the manifest's, see read_manifest. Raises UserError for a file that is something else."""
        self.path = Path(folder) / "segments" / entry["file"]
        self.layout, self.entry = layout, entry
        self.handle = os.open(self.path, os.O_RDONLY)
        size = os.fstat(self.handle).st_size
        if size != entry["bytes"]:
            raise self.damaged(f"it has {size:,} bytes; the manifest says {entry['bytes']:,}")
        length = int.from_bytes(self.bytes(0, 8).tobytes(), "little")
        if not 2 <= length <= min(1 << 16, size - 8):
            raise self.damaged(f"its header says that it has {length:,} bytes")
        header = self.bytes(0, 8 + length)
        self.shapes = layout.shapes(**{name: entry[name] for name in COUNTS})
        self.begins = {}  # where each tensor begins in the file
        try:
            tensors = json.loads(header[8:].tobytes())
            for name, (dtype, shape) in self.shapes.items():
                about = tensors[ON_DISK.get(name, name)]
                begin = int(about["data_offsets"][0])
                span = [begin, begin + row_bytes(dtype, shape) * shape[0]]
                if about != {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": span}:
                    raise ValueError
                if not 0 <= begin <= span[1] <= size - 8 - length:
                    raise ValueError
                self.begins[name] = 8 + length + begin
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
            raise self.damaged("its header does not describe the tensors of the manifest's counts") from None
        self.table = {name: self.read(name, slice(None)) for name in (*TABLE, *SUMS)}
        if checksum(header, *self.table.values()) != entry["sum"]:
            raise self.damaged("the checksum of its header and table is wrong")
        for name, count in zip(("chunks", "tokens", "sources"), COUNTS[1:]):
            column, least = self.table[name], 1 if name == "chunks" else 0
            if column.sum(dtype=np.int64) != entry[count] or column.min() < least:
                raise self.damaged(f"its {name} do not add up to {entry[count]:,}")

    def __del__(self):
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.handle)

    def damaged(self, what):
        return UserError(f"{self.path}: damaged, {what}; {REPAIR}")

    def bytes(self, at, size, buffer=None):
        """`size` bytes of the file, from byte `at`: in a buffer, at least as large, or a new one."""
        data = np.empty(size, np.uint8) if buffer is None else buffer[:size]
        view, done = memoryview(data), 0
        while done < size:
            with naming(self.path):
                n = os.preadv(self.handle, [view[done:done + (1 << 30)]], at + done)
            if n == 0:
                raise self.damaged(f"it ends at byte {at + done:,}")
            done += n
        return data

    def read(self, name, rows, layer=None, buffer=None):
        """Rows [start, stop) of a tensor, of one layer's where it has layers: not yet verified."""
        dtype, shape = self.shapes[name]
        begin = self.begins[name]
        if layer is not None:
            begin += layer * row_bytes(dtype, shape)
            shape = shape[1:]
        start, stop, _ = rows.indices(shape[0])
        size = row_bytes(dtype, shape)
        data = self.bytes(begin + start * size, (stop - start) * size, buffer)
        return data.view(dtype).reshape(stop - start, *shape[1:])

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

    def content(self, row):
        """A document's keys and values (chunks, L, 2, G, D), scales (chunks, L, 2) or None; verified."""
        rows = slice(*self.ends["chunks"][row:row + 2])
        parts = [self.read("content", rows)]
        if self.layout.content == "int8":
            parts.append(self.read("scales", rows))
        if checksum(*parts) != self.table["content_sums"][row]:
            raise self.damaged(f"the content of document [{self.table['numbers'][row]}] has a wrong checksum")
        return parts[0], parts[1] if len(parts) > 1 else None

    def tile(self, layer, tile, buffer=None):
        """The routing keys (at most TILE, routing_heads, routing_dim) of a tile, verified."""
        keys = self.read("routing_keys", slice(tile * TILE, (tile + 1) * TILE), layer, buffer)
        if checksum(keys) != self.table["routing_sums"][layer, tile]:
            raise self.damaged(f"its routing keys have a wrong checksum (layer {layer}, "
                               f"chunks from {tile * TILE:,})")
        return keys

    def load(self, rows):
        """Records of the documents of `rows` (M,) bool; verified, and all routing keys with them."""
        records = {name: self.read(name, slice(None)) for name in AXIS}
        sums = add_sums(records)
        for name in ("record_sums", "content_sums"):
            for row in np.flatnonzero((sums[name] != self.table[name]) & rows):
                where = f"document [{self.table['numbers'][row]}]"
                raise self.damaged(f"a checksum is wrong ({name}, {where})")
        for layer, tile in np.argwhere(sums["routing_sums"] != self.table["routing_sums"]):
            where = f"layer {layer}, chunks from {tile * TILE:,}"
            raise self.damaged(f"a checksum is wrong (routing_sums, {where})")
        return pick(records, rows)


def as_slice(rows):
    """Numbers that follow each other as a slice, which makes no copy; others as they are."""
    return slice(rows[0], rows[-1] + 1) if (np.diff(rows) == 1).all() else rows


def row_bytes(dtype, shape):
    """Bytes of a tensor's row: of what stands at one index of its first axis."""
    return int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize


# ------------------------------------------------------------------------------------------------------------
# The manifest

def is_bank(folder):
    """Whether there is a bank, whole or damaged."""
    return (Path(folder) / "manifest.json").exists()


def read_manifest(folder):
    """(Layout, entries, next number, state, stat) of a bank. Raises UserError.

    An entry is a dict of what the manifest says of a segment: file, bytes, sum, COUNTS, deleted (M,) bool.
    state: a hash of the manifest; stat: as of `stat_manifest`.
    """
    path = Path(folder) / "manifest.json"
    try:
        with path.open("rb") as file:
            stat, data = stat_manifest(file.fileno()), file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no memory bank here (no manifest.json); "
                        "give --documents to make one") from None
    try:
        file = json.loads(data)
        body = file["bank"]
        if file["sum"] != zlib.crc32(json.dumps(body).encode()):
            raise ValueError("its checksum is wrong")
        if body["format"] != FORMAT:
            raise UserError(f"{folder}: made by another version (format {body['format']!r}, here {FORMAT}); "
                            "encode the documents again into another --memory")
        layout, next_number = read_layout(body["layout"]), body["next_number"]
        if type(next_number) is not int or next_number < 0:
            raise ValueError("its next number is invalid")
        entries = [read_entry(entry) for entry in body["segments"]]
        if len({entry["file"] for entry in entries}) < len(entries):
            raise ValueError("it names a segment twice")
        state = int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")
        return layout, entries, next_number, state, stat
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); {REPAIR}") from None


def stat_manifest(path):
    """What changes when the file is replaced, None where there is none."""
    try:
        stat = os.stat(path)
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    except OSError:
        return None


def read_layout(values):
    """A Layout of a manifest's values. Raises TypeError or ValueError for others."""
    layout = Layout(**values)
    values = [*asdict(layout).values()]
    if [*map(type, values)] != [field.type for field in fields(Layout)] or layout.content not in CONTENT:
        raise ValueError("its layout has values of wrong types")
    sizes = [value for value in values if type(value) is int]
    if layout.layers < 0 or min(sizes[1:]) < 1 or max(sizes) > 1 << 16:
        raise ValueError("its layout has invalid sizes")
    return layout


def read_entry(entry):
    """A manifest's entry of a segment, with its deleted documents as bools. Raises ValueError, KeyError or
    TypeError for what cannot be one."""
    sizes, file = [entry[name] for name in ("bytes", "sum", *COUNTS)], entry["file"]
    valid = re.fullmatch(r"[0-9a-f]{16}\.safetensors", file) and {type(n) for n in sizes} == {int}
    if not valid or min(sizes) < 0 or max(sizes) >= 1 << 62:
        raise ValueError(f"its entry of segment {file!r} is invalid")
    if not 0 < entry["documents"] <= entry["chunks"] <= entry["bytes"]:
        raise ValueError(f"its entry of segment {file!r} has invalid counts")
    packed = np.frombuffer(base64.b64decode(entry["deleted"], validate=True), np.uint8)
    if len(packed) != -(-entry["documents"] // 8):
        raise ValueError(f"its entry of segment {file!r} marks another number of documents")
    return {**entry, "deleted": np.unpackbits(packed, count=entry["documents"]).astype(bool)}


def write_manifest(folder, layout, entries, next_number):
    """The bank's one file that says what belongs to it, atomically: a commit."""
    pack = lambda deleted: base64.b64encode(np.packbits(deleted).tobytes()).decode()
    segments = [{**entry, "deleted": pack(entry["deleted"])} for entry in entries]
    body = {"format": FORMAT, "layout": asdict(layout), "next_number": next_number, "segments": segments}
    data = json.dumps({"sum": zlib.crc32(json.dumps(body).encode()), "bank": body}, indent=1)
    write_file(Path(folder) / "manifest.json", data.encode())


# ------------------------------------------------------------------------------------------------------------
# Reading

class Bank:
    """A snapshot of a bank: what it held when it was opened.

    A document's position is its place in the order of numbers. COLUMNS, what the segments' tables say of the
    live documents, and `segment_of` and `row_of`, where each is, are arrays (M,) by position.
    """

    COLUMNS = ("numbers", "chunks", "tokens", "id_hashes", "digests")

    def __init__(self, folder, before=None):
        """Open `folder`, but read nothing again that the snapshot `before` has open. Raises UserError."""
        self.folder = Path(folder)
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource  # a large bank has more files than the usual limit of open ones
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        known = {segment.entry["file"]: segment for segment in before.segments} if before else {}
        for attempt in range(10):
            self.layout, entries, self.next_number, self.state, self.stat = read_manifest(folder)
            if before and self.layout != before.layout:
                maker = self.layout.fingerprint
                raise UserError(f"{folder}: is another bank now, made by {maker}; open it anew")
            try:
                self.segments = [self.open(entry, known.get(entry["file"])) for entry in entries]
                break
            except FileNotFoundError as error:
                if self.is_current() or attempt == 9:  # else a writer has just replaced the manifest
                    raise UserError(f"{error.filename}: missing; {REPAIR}") from None
        self.deleted = [entry["deleted"] for entry in entries]
        live = [np.flatnonzero(~deleted).astype(np.int32) for deleted in self.deleted]  # rows of each segment
        for name in self.COLUMNS:
            parts = [segment.table[name][rows] for segment, rows in zip(self.segments, live)]
            setattr(self, name, np.concatenate([*parts, np.zeros(0, TABLE[name])]))
        self.segment_of = np.repeat(np.arange(len(live), dtype=np.int32), [len(rows) for rows in live])
        self.row_of = np.concatenate([*live, np.zeros(0, np.int32)])
        self.take(np.argsort(self.numbers, kind="stable"))
        if len(self) and (self.numbers[0] < 0 or (np.diff(self.numbers) <= 0).any()):
            raise UserError(f"{self.folder}: damaged, two documents have the same number; {REPAIR}")

    def open(self, entry, segment):
        """The Segment of a manifest's entry; segment: the one that is open already, or None."""
        if segment is None:
            return Segment(self.folder, self.layout, entry)
        if {**segment.entry, "deleted": 0} != {**entry, "deleted": 0}:
            raise segment.damaged("the manifest says something else of it than before")
        return segment

    def take(self, positions):
        """Keep the documents of these positions, in this order."""
        for name in (*self.COLUMNS, "segment_of", "row_of"):
            setattr(self, name, getattr(self, name)[positions])

    def only(self, numbers):
        """The same snapshot with the documents of these numbers only."""
        part = copy.copy(self)
        part.take(np.isin(self.numbers, numbers))
        return part

    def __len__(self):
        return len(self.numbers)

    def is_current(self):
        return self.stat == stat_manifest(self.folder / "manifest.json")

    def refresh(self):
        """The bank as it is now: this snapshot itself where nothing has changed."""
        return self if self.is_current() else Bank(self.folder, self)

    def document(self, position):
        """A document's text as token ids, and its source."""
        return self.segments[self.segment_of[position]].document(self.row_of[position])

    def content(self, position):
        """See Segment.content."""
        return self.segments[self.segment_of[position]].content(self.row_of[position])

    def plan(self, positions):
        """Where the chunks of these documents lie: (segment, source, rows) for each segment that holds some.

        source: (n,) increasing, chunks of the segment; rows: (n,), their places among the documents' chunks.
        """
        starts, plan = ends_of(self.chunks[positions]), []
        order = np.lexsort((self.row_of[positions], self.segment_of[positions]))
        cuts = np.searchsorted(self.segment_of[positions[order]], np.arange(len(self.segments) + 1))
        for segment, a, b in zip(self.segments, cuts, cuts[1:]):
            if a < b:
                mine = order[a:b]
                counts = self.chunks[positions[mine]].astype(np.int64)
                nth = np.arange(counts.sum()) - np.repeat(ends_of(counts)[:-1], counts)  # in its document
                source = np.repeat(segment.ends["chunks"][self.row_of[positions[mine]]], counts) + nth
                plan.append((segment, source, np.repeat(starts[mine], counts) + nth))
        return plan

    def routing_keys(self, layer, plan):
        """Yields (rows, read), tile by tile, of a `plan`: read(buffer) returns the verified keys (n,
        routing_heads, routing_dim) of these rows. Tiles may be read side by side, in threads, each with a
        buffer of uint8 or None."""
        for segment, source, rows in plan:
            for tile in range(source[0] // TILE, source[-1] // TILE + 1):
                low, high = np.searchsorted(source, [tile * TILE, (tile + 1) * TILE])
                if low < high:
                    places = as_slice(source[low:high] - tile * TILE)
                    read = lambda buffer=None, segment=segment, tile=tile, places=places: (
                        segment.tile(layer, tile, buffer)[places])
                    yield as_slice(rows[low:high]), read

    def verify(self, progress=None):
        """Check every sum; raises UserError for the first that is wrong. progress: called with bytes read."""
        for segment, deleted in zip(self.segments, self.deleted):
            segment.load(~deleted)
            if progress:
                progress(segment.entry["bytes"])


# ------------------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def locked(folder):
    """Hold the writer's lock, which dies with the process. Raises UserError when another process holds it, or
    where there are no locks: two writers would undo each other's changes."""
    import fcntl  # not on Windows
    path = Path(folder) / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"{path}: its file system has no locks ({error.strerror}), which keep two "
                                "writers apart; put the bank on another one, such as a local one") from None
            holder = os.pread(handle, 64, 0).decode(errors="replace").strip() or "unknown"
            raise UserError(f"{folder}: another process is writing to this bank ({holder}); "
                            "wait until it is done, or ask without --documents") from None
        with naming(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(handle)


def check_free(folder):
    """Raises UserError where no bank can be made: something is there that no interrupted making leaves."""
    def ours(path):
        empty = path.name == "segments" and path.is_dir() and not any(path.iterdir())
        return empty or path.name in ("lock", ROUTERS) or path.name.startswith(
            (".manifest.json.", f".{ROUTERS}."))

    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and all(map(ours, folder.iterdir()))):
        raise UserError(f"{folder}: exists and is not a memory bank, or one that has lost its manifest.json; "
                        "give another --memory")


class Writer:
    """The one writer of a bank while it is open:  with Writer(folder) as writer: writer.add(records)."""

    def __init__(self, folder, layout=None, routers=b""):
        """layout: of a bank to create where there is none; routers: what its ROUTERS holds then."""
        self.folder, self.layout, self.routers = Path(folder), layout, routers

    def __enter__(self):
        if not is_bank(self.folder):
            if not self.layout:
                read_manifest(self.folder)  # raises
            check_free(self.folder)
            make_folder(self.folder / "segments")
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            if self.layout and not is_bank(self.folder):
                if self.routers:
                    write_file(self.folder / ROUTERS, self.routers)
                write_manifest(self.folder, self.layout, [], 0)
            self.bank = Bank(self.folder)
            self.clean()
            self.lock = stack.pop_all()  # nothing has failed: it is held until __exit__
        return self

    def __exit__(self, *_):
        with self.lock, contextlib.suppress(OSError):
            if self.bank.is_current():  # else `commit` was interrupted behind a manifest that names new files
                self.clean()  # after a full disk: what was written and is not named

    def clean(self):
        """Delete what a crash has left: our own files that no manifest names."""
        named = {segment.path.name for segment in self.bank.segments}
        left = [path for name in ("manifest.json", ROUTERS) for path in self.folder.glob(f".{name}.*.tmp")]
        for path in [*(self.folder / "segments").iterdir(), *left]:
            if path.name not in named and re.fullmatch(r"[0-9a-f]{16}\.safetensors|\..*\.tmp", path.name):
                path.unlink()

    def commit(self, entries=(), removed=(), dropped=()):
        """One change, whole or not at all: entries of new segments; numbers and files of segments that go.

        A number may go and come back with an entry in the same change: a document's new text.
        """
        removed = np.asarray(list(removed), np.int64)
        unknown = removed[~np.isin(removed, self.bank.numbers)]
        if len(unknown):
            raise UserError(f"{self.folder}: no document [{unknown[0]}]")
        kept = []
        for segment, deleted in zip(self.bank.segments, self.bank.deleted):
            deleted = deleted | np.isin(segment.table["numbers"], removed)
            if segment.entry["file"] not in dropped and not deleted.all():
                kept.append({**segment.entry, "deleted": deleted})
        kept += [{**entry, "deleted": np.zeros(entry["documents"], bool)} for entry in entries]
        tables = [Segment(self.folder, self.bank.layout, entry).table for entry in entries]
        stay = ~np.isin(self.bank.numbers, removed)
        for name, what in (("numbers", "number"), ("id_hashes", "id")):
            new = [] if dropped else [table[name] for table in tables]  # what is rewritten is not new
            live = np.concatenate([getattr(self.bank, name)[stay], *new])
            values, counts = np.unique(live, return_counts=True)
            if (counts > 1).any():
                twice = f" [{values[counts.argmax()]}]" if what == "number" else ""
                raise UserError(f"{self.folder}: two documents would have the same {what}{twice}; "
                                "nothing was added")
        next_number = max([self.bank.next_number, *(int(table["numbers"].max()) + 1 for table in tables)])
        write_manifest(self.folder, self.bank.layout, kept, next_number)
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
            segment, live = self.bank.segments[i], ~self.bank.deleted[i]
            if live.any():
                parts.append(segment.load(live))
            if progress:
                progress(segment.entry["bytes"])
            if parts and (i == segments[-1] or sum(map(size_of, parts)) >= SEGMENT_BYTES):
                entries.append(write_segment(self.folder, self.bank.layout, join(parts)))
                parts = []
        self.commit(entries, dropped={self.bank.segments[i].entry["file"] for i in segments})

    def merge(self):
        """Join small segments when there are many: opening a bank costs a file for each."""
        sizes = [segment.entry["bytes"] for segment in self.bank.segments]
        small = [i for i, size in enumerate(sizes) if size < SEGMENT_BYTES / SMALL]
        if len(small) > MANY:
            self.rewrite(small)

    def compact(self, progress=None):
        """Rewrite all segments, without the deleted documents."""
        self.rewrite(range(len(self.bank.segments)), progress)
