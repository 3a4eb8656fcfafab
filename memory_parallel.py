"""A memory bank in use: routing keys on the device, content on the host or on disk, documents over ranks.

    memory = ParallelMemory(Bank(folder), device, ranks)     # what `model.read` reads, like memory.Memory
    memory.refresh()                                         # after documents have come or gone

Every rank runs the model on the same tokens and holds the routing keys of its own documents, about C / world
chunks of them. For a selection it scores them. A first collective brings the (score, number) of every rank's
best k, of which all ranks choose the same best k. A second one brings their content, each row from the rank
that owns it. The paper's mode selects in every memory layer, shared mode once. One process is the plain case,
without a process group.

    B questions   K documents selected   M documents   C chunks   G key/value heads   D head size
    L layers that read
"""
import contextlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import memory_bank
from common import UserError, end_process_group, is_of_a_lost_rank, start_process_group, to_device
from memory import Selection
from routing import document_queries, document_slots, quantize, select_documents

READERS = min(8, os.cpu_count() or 1)  # threads that open a bank
KEPT = 1 << 28  # bytes of selected documents' content that stay on the device


def to_numpy(x):
    """A tensor as an array, on the host; bfloat16, which numpy lacks, is held as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).cpu().numpy()


def to_tensor(array):
    """The inverse: uint16 holds bfloat16."""
    x = torch.from_numpy(array)
    return x.view(torch.bfloat16) if x.dtype == torch.uint16 else x


def to_records(memory, texts, sources, id_hashes, digests, layout):
    """What `model.encode` made of documents, rounded as a bank stores it (memory_bank.Layout): its `records`.

    texts: token ids of each document's text; sources: where each comes from, as text; id_hashes, digests:
    unsigned 64-bit numbers; layout: the bank's.
    """
    chunks = int(memory.offsets[-1])
    layers = [torch.stack(pair, 1) for pair in zip(memory.keys, memory.values)]
    pairs = torch.zeros(chunks, 0, 2, layout.kv_heads, layout.head_dim)
    if layers:
        pairs = torch.stack(layers, 1)  # (C, L, 2, G, D)
    scales = torch.zeros(0, pairs.size(1), 2)
    if layout.content == "int8":
        rounded, scales = quantize(pairs.flatten(0, 2))
        pairs, scales = rounded.view(pairs.shape), scales.view(pairs.shape[:3])
    else:
        pairs = pairs.bfloat16()
    sources = [source.encode() for source in sources]
    return dict(
        numbers=np.array(memory.numbers, np.int64), chunks=to_numpy(memory.offsets.diff().int()),
        tokens=np.array([len(text) for text in texts], np.int32),
        sources=np.array([len(source) for source in sources], np.int32),
        id_hashes=np.array(id_hashes, np.uint64), digests=np.array(digests, np.uint64),
        routing_keys=to_numpy(torch.stack(memory.routing_keys).bfloat16()),
        content=to_numpy(pairs), scales=to_numpy(scales),
        text=np.concatenate([np.array(text, np.int32) for text in texts]),
        source=np.frombuffer(b"".join(sources), np.uint8))


# ------------------------------------------------------------------------------------------------------------

class Ranks:
    """The processes that share a memory: torchrun's, or this one alone."""

    def __init__(self, device, timeout=60):
        """timeout: seconds that a collective waits for the slowest rank."""
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.timeout = device, min(timeout, 1e7)  # longer ones are no timedelta
        self.steps = self.turns = 0  # collectives and calls of `wait` until now
        if self.world > 1:
            self.store = start_process_group(device, self.timeout)
            self.store.set_timeout(timedelta(seconds=self.timeout))

    def collective(self, run, *args, **kwargs):
        """One collective; where it fails, UserError names the ranks that did not come.

        On GPUs it is queued behind what the device has to do, and the host does not wait here: NCCL's
        watchdog notices a rank that does not come, and ends the process.
        """
        if self.device.type == "cuda":
            work = run(*args, **kwargs)
            return None if work is None else work.wait()
        self.steps += 1
        self.store.set(f"memory/{self.rank}", str(self.steps))
        try:
            work = run(*args, **kwargs)
            if work is not None:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            if not is_of_a_lost_rank(error):
                raise
            late = [str(r) for r in range(self.world) if r != self.rank and self.steps_of(r) < self.steps]
            who = f"rank {', '.join(late)}" if late else "a rank"
            raise UserError(f"rank {self.rank}: {who} did not answer within --timeout {self.timeout} s "
                            "or has ended; the memory bank is whole") from None

    def steps_of(self, rank):
        """How many collectives a rank has begun."""
        key = f"memory/{rank}"
        with contextlib.suppress(RuntimeError, ValueError):
            return int(self.store.get(key)) if self.store.check([key]) else 0
        return 0

    def gather(self, x):
        """(world, ...) of every rank's x."""
        if self.world == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.world)]
        self.collective(dist.all_gather, parts, x, async_op=True)
        return torch.stack(parts)

    def sum(self, x):
        """Every rank's x added up, in place."""
        if self.world > 1:
            self.collective(dist.all_reduce, x, async_op=True)
        return x

    def agree(self, choices):
        """Rank 0's choices, a tensor, on every rank."""
        if self.world > 1:
            self.collective(dist.broadcast, choices, 0, async_op=True)
        return choices

    def same(self, bank):
        """The same snapshot of a bank on every rank, however busy a writer is."""
        for _ in range(1000):
            states = self.gather(torch.tensor([bank.state], device=self.device))
            if (states == states[0]).all():
                return bank
            bank = bank.refresh()
        raise UserError(f"{bank.folder}: the ranks see different banks there; it must be one folder for all")

    def tell(self, key, text):
        """Rank 0's text, or None, on every rank, however long it takes: this is no collective."""
        if self.world == 1:
            return text
        if self.rank == 0:
            self.store.set(key, json.dumps(text))
        else:
            self.store.wait([key], timedelta(days=365))
        return json.loads(self.store.get(key))

    def wait(self, what):
        """Wait for all ranks, however long it takes."""
        if self.world == 1:
            return
        self.turns += 1
        turn = [f"{what}/{self.turns}/{rank}" for rank in range(self.world)]
        self.store.set(turn[self.rank], "")
        self.store.wait(turn, timedelta(days=365))

    def gather_objects(self, x):
        """Every rank's x, anything that can be pickled between processes that trust each other, as a list."""
        if self.world == 1:
            return [x]
        parts = [None] * self.world
        self.collective(dist.all_gather_object, parts, x)
        return parts

    def end(self):
        end_process_group()


# ------------------------------------------------------------------------------------------------------------

def deal(chunks, world):
    """The rank of each document, (M,) from chunk counts (M,): consecutive documents, chunks dealt evenly."""
    ends = memory_bank.ends_of(chunks)
    middles = ends[1:] - (chunks + 1) // 2
    return np.minimum(middles * world // max(ends[-1], 1), world - 1)


class KeyBlock:
    """Routing keys of some of this rank's documents, by number; and their content where the host holds it."""

    def __init__(self, bank, positions, device, routing_keys, host, progress=None):
        """positions: (m,) increasing; routing_keys: bfloat16 or int8; progress: called with bytes read."""
        self.numbers, self.digests = bank.numbers[positions], bank.digests[positions]
        self.alive = np.ones(len(positions), bool)      # False: no longer in the bank
        self.alive_on_device = None                     # None: all are
        self.ends = memory_bank.ends_of(bank.chunks[positions])
        self.offsets = torch.from_numpy(self.ends).to(device)
        self.numbers_on_device = torch.from_numpy(self.numbers).to(device)
        self.content = None
        self.load_routing_keys(bank, positions, device, routing_keys, progress)
        if host:
            content, scales = zip(*(bank.content(position) for position in positions))
            scales = None if scales[0] is None else torch.from_numpy(np.concatenate(scales))
            self.content = to_tensor(np.concatenate(content)), scales

    def load_routing_keys(self, bank, positions, device, kind, progress):
        """Threads read tiles, verify them, bring them to the device and quantise them there."""
        shape = self.ends[-1], bank.layout.routing_heads, bank.layout.routing_dim
        plan = bank.plan(positions)
        int8, layers, local = kind == "int8", range(bank.layout.routing_layers), threading.local()
        self.routing_keys = [torch.empty(shape, dtype=getattr(torch, kind), device=device) for _ in layers]
        self.scales = [torch.empty(shape[0], device=device) if int8 else None for _ in layers]
        size = memory_bank.TILE * 2 * int(np.prod(shape[1:]))

        def load(layer, rows, read):
            if not hasattr(local, "buffer"):
                local.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda").numpy()
            tile = to_tensor(read(local.buffer))
            x = tile.to(device)  # waits: the next tile of this thread goes into the same buffer
            if int8:
                self.routing_keys[layer][rows], self.scales[layer][rows] = quantize(x)
            else:
                self.routing_keys[layer][rows] = x
            return tile.nbytes

        jobs = [(layer, *job) for layer in layers for job in bank.routing_keys(layer, plan)]
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(READERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for loaded in pool.map(load, *zip(*jobs)):
                if progress:
                    progress(loaded)
        torch.set_num_threads(threads)  # what a thread sets holds for those that begin later

    def keep(self, bank):
        """Let the documents go that are no longer in the bank, or have another text there."""
        self.alive &= held_by(bank, self.numbers, self.digests)
        self.alive_on_device = None
        if not self.alive.all():
            self.alive_on_device = torch.from_numpy(self.alive).to(self.offsets.device)


def held_by(bank, numbers, digests):
    """(M,) bool: which documents a bank holds with the same text."""
    if not len(bank):
        return np.zeros(len(numbers), bool)
    place = np.minimum(np.searchsorted(bank.numbers, numbers), len(bank) - 1)
    return (bank.numbers[place] == numbers) & (bank.digests[place] == digests)


class ParallelMemory:
    """A bank as a model reads it: what memory.Memory is for memories that fit into one tensor and one device.

    Documents are positions in the order of numbers, as in Memory; `numbers` and `texts` say what they are.
    The device holds C / world * G * D bytes of routing keys a layer (int8; twice that in bfloat16), the host
    the bank's table (about 150 bytes a document) and, with content="host", content of the rank's documents.
    Scoring adds 4 * B bytes a chunk, and a tile.
    """

    def __init__(self, bank, device, ranks, routing_keys="bfloat16", content="disk", progress=None):
        """routing_keys: bfloat16 or int8, on the device; progress: called with bytes read.

        content: "disk", read when a document is selected, or "host", held in RAM.
        """
        self.device, self.ranks, self.progress = device, ranks, progress
        self.routing_keys, self.host = routing_keys, content == "host"
        self.bank, self.blocks = ranks.same(bank), []
        self.load(np.arange(len(self.bank)))
        ranks.wait("opened")  # a rank with a slower disk may take minutes more

    def __len__(self):
        return len(self.bank)

    @property
    def numbers(self):
        return self.bank.numbers

    @property
    def texts(self):
        """texts[position]: the token ids of a document's text."""
        return Texts(self)

    def load(self, positions):
        """Hold this rank's share of the documents at `positions`: one more block."""
        order = np.lexsort((self.bank.row_of[positions], self.bank.segment_of[positions]))
        stored = positions[order]  # neighbours on disk stay together
        turn = len(self.bank)  # documents that come one at a time go to one rank after another
        owner = (deal(self.bank.chunks[stored], self.ranks.world) + turn) % self.ranks.world
        self.hold(np.sort(stored[owner == self.ranks.rank]))

    def hold(self, positions):
        """Read routing keys of these positions in the bank, which become this rank's."""
        if len(positions):
            block = KeyBlock(self.bank, positions, self.device, self.routing_keys, self.host, self.progress)
            self.blocks.append(block)
        self.index()

    def index(self):
        """Where this rank's documents are: block and row of every position, -1 for other ranks'."""
        self.block_of, self.row_of = np.full(len(self.bank), -1, np.int32), np.zeros(len(self.bank), np.int64)
        for i, block in enumerate(self.blocks):
            place = np.searchsorted(self.bank.numbers, block.numbers[block.alive])
            self.block_of[place], self.row_of[place] = i, np.flatnonzero(block.alive)
        self.numbers_on_device = torch.from_numpy(self.bank.numbers).to(self.device)
        self.recent = {}  # what this rank has read of the disk for the question at hand: position -> content
        self.kept = {}    # on the device: (reading layers, position) -> content, as stored, and scales

    def refresh(self):
        """Follow the bank: load documents that came, find those that went no longer. Collective. Where it
        fails, or is interrupted, nothing is held, and the next call loads all."""
        before, bank = self.bank, self.ranks.same(self.bank.refresh())
        if bank is before:
            return
        try:
            self.follow(before, bank)
        except BaseException:
            self.bank, self.blocks = before.only([]), []  # a snapshot that is not the newest one
            self.index()
            raise

    def follow(self, before, bank):
        """Hold what `bank` does, where until now it was what `before` does."""
        for block in self.blocks:
            block.keep(bank)
        self.bank = bank
        self.load(np.flatnonzero(~held_by(before, bank.numbers, bank.digests)))
        first = 1  # the first block is the large one: it stays unless it is mostly dead
        if self.blocks and self.blocks[0].alive.sum() < len(self.blocks[0].alive) // 2:
            first = 0
        if first == 0 or len(self.blocks) > 8:  # join the others
            numbers = np.concatenate([block.numbers[block.alive] for block in self.blocks[first:]])
            self.blocks = self.blocks[:first]
            self.hold(np.searchsorted(bank.numbers, np.sort(numbers)))

    # --------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def select(self, queries, mask, top_k, readers):
        """As Memory.select: the best documents of every question, and their content. Collective."""
        if 0 in queries:  # the first routing layer: a new question
            self.recent = {}
        B, places = len(mask), [place % self.bank.layout.routing_layers for place in queries]
        found = [torch.full((B, top_k), float("-inf"), device=self.device)]
        numbers = [torch.full((B, top_k), -1, device=self.device)]
        for block in self.blocks:
            keys, scales = ([xs[place] for place in places] for xs in (block.routing_keys, block.scales))
            documents, best = select_documents(
                list(queries.values()), mask, keys, block.offsets, top_k, scales, block.alive_on_device,
                self.bank.layout.unit_keys)
            found.append(best)
            numbers.append(block.numbers_on_device[documents].masked_fill(documents < 0, -1))
        scores, numbers = best_of(torch.cat(found, 1), torch.cat(numbers, 1), top_k)
        if self.ranks.world > 1:
            both = torch.stack([scores.double(), numbers.double()])         # exact: numbers are below 2^53
            everyone = self.ranks.gather(both).permute(1, 2, 0, 3).flatten(2)   # (2, B, world * top_k)
            scores, numbers = best_of(*everyone, top_k)
            scores, numbers = scores.float(), numbers.long()
        documents = torch.searchsorted(self.numbers_on_device, numbers).masked_fill(numbers < 0, -1)
        chosen = documents.cpu()                                            # the one wait
        union = chosen[chosen >= 0].unique()                                # in the order of numbers
        positions = union.numpy()
        chunks = self.bank.chunks[positions] if len(positions) else [0]     # none: one without chunks
        local = torch.searchsorted(union, chosen).masked_fill(chosen < 0, -1)
        placed = document_slots(local, torch.from_numpy(memory_bank.ends_of(chunks)))
        index, slots, owner = (to_device(x, self.device) for x in placed)
        keys, values = self.fetch(readers, positions)
        return Selection(keys, values, index, slots, scores.gather(1, owner), documents, scores, None)

    def document_queries(self, documents):
        """As `routing.document_queries`: every rank brings its own. Collective."""
        layout, positions = self.bank.layout, np.array(documents)
        shape = len(positions), layout.routing_layers, layout.routing_heads * layout.routing_dim
        queries = torch.zeros(shape, device=self.device)
        for i, block in enumerate(self.blocks):
            rows = np.where((positions >= 0) & (self.block_of[positions] == i), self.row_of[positions], -1)
            queries += document_queries(rows, block.routing_keys, block.offsets, block.scales)
        return self.ranks.sum(queries)  # what other blocks and ranks own is zero here: the sum is exact

    def fetch(self, readers, positions):
        """Keys and values of these documents in the reading layers at these places, lists of (C', G, D).

        What earlier rounds and questions have brought lies on the device still, up to KEPT bytes of it, and
        on all ranks alike.
        """
        readers, layout, used = tuple(readers), self.bank.layout, []
        if not readers:
            return [], []
        new = [position for position in positions if (readers, position) not in self.kept]
        brought = self.bring(readers, new if len(positions) else None)
        self.kept.update(((readers, position), content) for position, content in zip(new, brought))
        for position in positions:
            used.append(self.kept.pop((readers, position)))
            self.kept[readers, position] = used[-1]  # the latest are the last
        rows, scales = map(torch.cat, zip(*(used or brought)))
        if layout.content == "int8":
            rows = rows * scales[..., None, None]
        size = sum(content.nbytes for content, _ in self.kept.values())
        for key in list(self.kept)[:-max(len(positions), 1)]:
            if size <= KEPT:
                break
            size -= self.kept.pop(key)[0].nbytes
        layers = range(len(readers))
        return [rows[:, i, 0].contiguous() for i in layers], [rows[:, i, 1].contiguous() for i in layers]

    def bring(self, readers, positions):
        """The content of these documents on the device, as it is stored: pairs of (chunks, L, 2, G, D) and
        the scales of int8 (chunks, L, 2). Every rank brings its own. None: an empty one."""
        layout = self.bank.layout
        ends = [0, 0] if positions is None else memory_bank.ends_of(self.bank.chunks[positions])
        int8, pinned = layout.content == "int8", dict(pin_memory=self.device.type == "cuda")
        shape = int(ends[-1]), len(readers), 2
        dtype = torch.int8 if int8 else torch.bfloat16
        rows = torch.zeros(*shape, layout.kv_heads, layout.head_dim, dtype=dtype, **pinned)
        scales = torch.zeros(shape if int8 else (shape[0], 0), **pinned)
        for start, stop, position in zip(ends, ends[1:], positions or ()):
            if self.block_of[position] >= 0:
                content, own_scales = self.content(position)
                rows[start:stop] = content[:, readers]
                if int8:
                    scales[start:stop] = own_scales[:, readers]
        rows, scales = rows.to(self.device, non_blocking=True), scales.to(self.device, non_blocking=True)
        for x in (rows, scales) if int8 else (rows,):
            if x.numel():  # else all is on the devices already
                self.ranks.sum(x)  # what other ranks own is zero here: the sum is exact
        counts = np.diff(ends).tolist()
        if len(counts) == 1:
            return [(rows, scales)]
        # Each by itself: a part of one tensor would keep all of it
        return [(x.clone(), scale.clone()) for x, scale in zip(rows.split(counts), scales.split(counts))]

    def content(self, position):
        """A document's keys and values (chunks, L, 2, G, D), scales or None, from the host or the disk."""
        block = self.blocks[self.block_of[position]]
        if block.content is not None:
            rows = slice(*block.ends[self.row_of[position]:self.row_of[position] + 2])
            content, scales = block.content
            return content[rows], None if scales is None else scales[rows]
        if position not in self.recent:
            content, scales = self.bank.content(position)
            self.recent[position] = to_tensor(content), None if scales is None else torch.from_numpy(scales)
        return self.recent[position]


class Texts:
    """The texts of a ParallelMemory, read from the disk when asked for; they follow its `refresh`."""

    def __init__(self, memory):
        self.memory = memory

    def __getitem__(self, position):
        return self.memory.bank.document(position)[0].tolist()


def best_of(scores, numbers, k):
    """The k best of each row in the order of (-score, number): (B, n), (B, n) -> (B, k), (B, k)."""
    by_number = numbers.argsort(dim=1, stable=True)
    scores, numbers = scores.gather(1, by_number), numbers.gather(1, by_number)
    by_score = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, by_score), numbers.gather(1, by_score)
