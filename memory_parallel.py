"""A memory bank in use: routing keys on the device, content on the host or on disk, documents spread over ranks.

    memory = ParallelMemory(Bank(folder), device, ranks)     # what `model.read` reads, like model.Memory
    memory.refresh()                                         # after documents have come or gone

Every rank runs the model on the same tokens and holds the routing keys of its own documents, about C / world chunks of them. Per memory
layer: it scores its shard; first collective: the (score, number) of every rank's best k; all agree on the best k of these; second
collective: their content, each row from the rank that owns it. One process is the plain case, without a process group.

    B questions   K documents selected   C chunks   G key/value heads   D head size
"""
import atexit
import contextlib
import json
import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

# Whatever imports this while a group exists keeps that group in default arguments: its threads outlive `Ranks.end` and may abort at exit
import torch.distributed.nn

import memory_bank
from common import UserError
from memory import Selection
from msa_kernel import document_slots, quantize, select_documents


def to_numpy(x, dtype):
    """A tensor rounded to bfloat16, held as uint16, or as it is."""
    return x.to(torch.bfloat16).view(torch.uint16).cpu().numpy() if dtype == "bfloat16" else x.cpu().numpy()


def to_tensor(array):
    """The inverse: uint16 holds bfloat16."""
    x = torch.from_numpy(array)
    return x.view(torch.bfloat16) if x.dtype == torch.uint16 else x


def to_records(memory, texts, sources, ids, content):
    """What `model.encode` made of documents, rounded as a bank stores it (memory_bank.Layout); see memory_bank's `records`.

    texts: token ids of each document's text; sources: where each comes from; ids: unsigned 64-bit (key, digest) of each.
    """
    pairs = torch.stack([torch.stack([k, v], 1) for k, v in zip(memory.keys, memory.values)])      # (layers, C, 2, G, D)
    if content == "int8":
        whole, scales = quantize(pairs.flatten(0, 2))
        pairs, scales = whole.view(pairs.shape), scales.view(pairs.shape[:3])
    else:
        scales = torch.zeros(len(pairs), 0, 2)
    spelled = [source.encode() for source in sources]
    keys, digests = np.array(ids, np.uint64).reshape(-1, 2).T
    return dict(numbers=np.array(memory.numbers, np.int64), chunks=memory.offsets.diff().cpu().numpy().astype(np.int32),
                tokens=np.array([len(text) for text in texts], np.int32), sources=np.array([len(s) for s in spelled], np.int32),
                keys=np.ascontiguousarray(keys), digests=np.ascontiguousarray(digests),
                routing_keys=to_numpy(torch.stack(memory.routing_keys), "bfloat16"), content=to_numpy(pairs, content),
                scales=to_numpy(scales, "float32"), text=np.concatenate([np.array(text, np.int32) for text in texts]),
                source=np.frombuffer(b"".join(spelled), np.uint8))


# ---------------------------------------------------------------------------------------------------------------------

class Ranks:
    """The processes that share a memory: torchrun's, or this one alone."""

    def __init__(self, device, timeout=60):
        """timeout: seconds that a collective waits for the slowest rank."""
        self.rank, self.world, self.timeout = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), timeout
        self.device, self.steps, self.turns = device, 0, 0
        if self.world > 1:
            limit = timedelta(seconds=timeout)
            self.store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
            self.store.set_timeout(limit)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=self.store, rank=self.rank,
                                    world_size=self.world, timeout=limit + timedelta(seconds=30 * (device.type == "cuda")))  # ours first
            if device.type == "cpu":
                atexit.register(self.end)  # after an error too: gloo's threads abort if they free a tensor in a dying interpreter

    def collective(self, run, *args, **kwargs):
        """One collective; where it fails, UserError names the ranks that did not come."""
        self.steps += 1
        self.store.set(f"memory/{self.rank}", str(self.steps))
        try:
            work = run(*args, **kwargs)
            if work is not None:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "imed out" not in str(error) and "onnection" not in str(error):
                raise
            late = [r for r in range(self.world) if r != self.rank and self.steps_of(r) < self.steps]
            who = f"rank {', '.join(map(str, late))}" if late else "a rank"
            raise UserError(f"rank {self.rank}: {who} did not answer within --timeout {self.timeout} s or has ended; "
                            "the memory bank is whole") from None

    def steps_of(self, rank):
        with contextlib.suppress(RuntimeError, ValueError):
            return int(self.store.get(f"memory/{rank}")) if self.store.check([f"memory/{rank}"]) else 0
        return 0

    def gather(self, x):
        """(world, ...) of every rank's x."""
        if self.world == 1:
            return x[None]
        found = [torch.empty_like(x) for _ in range(self.world)]
        self.collective(dist.all_gather, found, x, async_op=True)
        return torch.stack(found)

    def sum(self, x):
        """Every rank's x added up, in place."""
        if self.world > 1:
            self.collective(dist.all_reduce, x, async_op=True)
        return x

    def agree(self, choice):
        """Rank 0's integer, on every rank."""
        if self.world == 1:
            return choice
        shared = torch.tensor([choice], device=self.device)
        self.collective(dist.broadcast, shared, 0, async_op=True)
        return int(shared)

    def same(self, bank):
        """The same snapshot of a bank on every rank, however busy a writer is."""
        for _ in range(1000):
            states = self.gather(torch.tensor([bank.state], device=self.device))
            if (states == states[0]).all():
                return bank
            bank = bank.refresh()
        raise UserError(f"{bank.folder}: the ranks see different banks there; it must be one folder for all of them")

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
        """Wait for rank 0, however long it takes."""
        self.turns += 1
        self.tell(f"{what}/{self.turns}", None)

    def gather_objects(self, x):
        """Every rank's x, anything that can be pickled between processes that trust each other, as a list."""
        if self.world == 1:
            return [x]
        found = [None] * self.world
        self.collective(dist.all_gather_object, found, x)
        return found

    def end(self):
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------

def deal(chunks, world):
    """Which rank holds each document: (M,) chunk counts -> (M,); consecutive documents, about as many chunks for each rank."""
    ends = np.cumsum(chunks, dtype=np.int64)
    return np.minimum((ends - (chunks + 1) // 2) * world // max(int(ends[-1]) if len(ends) else 0, 1), world - 1)


class Block:
    """Routing keys of some of this rank's documents, in the order of their numbers; content too where the host holds it."""

    def __init__(self, bank, positions, device, routing_keys, host, progress=None):
        self.numbers, self.digests = bank.numbers[positions], bank.digests[positions]
        self.alive, self.alive_on_device = np.ones(len(positions), bool), None          # None: all
        self.ends, plan = memory_bank.ends_of(bank.chunks[positions]), bank.plan(positions)
        self.offsets, self.numbers_on_device = (torch.from_numpy(x).to(device) for x in (self.ends, self.numbers))
        self.keys, self.scales, self.content = [], [], []
        G, D = bank.layout.kv_heads, bank.layout.head_dim
        for layer in range(bank.layout.layers):
            keys = torch.empty(self.ends[-1], G, D, dtype=getattr(torch, routing_keys))
            scales = torch.empty(self.ends[-1] if routing_keys == "int8" else 0)
            for rows, found in bank.routing_keys(layer, plan):
                if routing_keys == "int8":
                    keys[rows], scales[rows] = quantize(to_tensor(found))
                else:
                    keys[rows] = to_tensor(found)
                if progress:
                    progress(found.nbytes)
            self.keys.append(keys.to(device))
            self.scales.append(scales.to(device) if routing_keys == "int8" else None)
            if host:
                parts = [bank.content(layer, position) for position in positions]
                content = to_tensor(np.concatenate([part for part, _ in parts]))
                scales = torch.from_numpy(np.concatenate([scale for _, scale in parts])) if parts[0][1] is not None else None
                self.content.append((content, scales))

    def keep(self, bank):
        """Let the documents go that are no longer in the bank, or have another text there."""
        self.alive &= held_by(bank, self.numbers, self.digests)
        self.alive_on_device = None if self.alive.all() else torch.from_numpy(self.alive).to(self.offsets.device)


def held_by(bank, numbers, digests):
    """(M,) bool: which documents a bank holds with the same text."""
    if not len(bank):
        return np.zeros(len(numbers), bool)
    place = np.minimum(np.searchsorted(bank.numbers, numbers), len(bank) - 1)
    return (bank.numbers[place] == numbers) & (bank.digests[place] == digests)


class ParallelMemory:
    """A bank as a model reads it: the counterpart of model.Memory for memories that are too large for one tensor, or one device.

    Documents are positions in the order of their numbers, as in Memory; `numbers` and `texts` say what they are.
    Memory: on the device C / world * W bytes of routing keys a layer (int8; twice that in bfloat16), on the host the bank's table (about 60
    bytes a document) and, with content="host", the content of the rank's own documents. Scoring adds 4 * B bytes a chunk, and a tile.
    """

    def __init__(self, bank, device, ranks, routing_keys="bfloat16", content="disk", progress=None):
        """routing_keys: bfloat16 or int8, on the device; content: "disk", read when a document is selected, or "host", held in RAM."""
        self.device, self.ranks, self.kind, self.host, self.progress = device, ranks, routing_keys, content == "host", progress
        self.bank, self.blocks = ranks.same(bank), []
        self.load(np.arange(len(self.bank)))

    def __len__(self):
        return len(self.bank)

    @property
    def numbers(self):
        return self.bank.numbers

    @property
    def texts(self):
        """texts[position]: the token ids of a document's text."""
        return Texts(self.bank)

    def load(self, positions):
        """Hold this rank's share of the documents at `positions`: one more block."""
        stored = positions[np.lexsort((self.bank.row_of[positions], self.bank.segment_of[positions]))]  # neighbours on disk stay together
        owner = (deal(self.bank.chunks[stored], self.ranks.world) + len(self.bank)) % self.ranks.world  # else rank 0 gets every single one
        self.hold(np.sort(stored[owner == self.ranks.rank]))

    def hold(self, positions):
        if len(positions):
            self.blocks.append(Block(self.bank, positions, self.device, self.kind, self.host, self.progress))
        self.index()

    def index(self):
        """Where this rank's documents are: block and row of every position, -1 for other ranks'."""
        self.block_of, self.row_of = np.full(len(self.bank), -1, np.int32), np.zeros(len(self.bank), np.int64)
        for i, block in enumerate(self.blocks):
            place = np.searchsorted(self.bank.numbers, block.numbers[block.alive])
            self.block_of[place], self.row_of[place] = i, np.flatnonzero(block.alive)
        self.numbers_on_device = torch.from_numpy(self.bank.numbers).to(self.device)

    def refresh(self):
        """Follow the bank: documents that came are loaded, those that went are no longer found. Collective."""
        before, bank = self.bank, self.ranks.same(self.bank.refresh())
        if bank is before:
            return
        for block in self.blocks:
            block.keep(bank)
        self.bank = bank
        self.load(np.flatnonzero(~held_by(before, bank.numbers, bank.digests)))
        alive = [int(block.alive.sum()) for block in self.blocks]
        first = 0 if alive and alive[0] < len(self.blocks[0].alive) // 2 else 1         # the first is the large one
        if first == 0 or len(self.blocks) > 8:  # mostly dead, or in many pieces: join them
            joined = np.concatenate([block.numbers[block.alive] for block in self.blocks[first:]])
            self.blocks = self.blocks[:first]
            self.hold(np.searchsorted(bank.numbers, np.sort(joined)))

    # -----------------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def select(self, layer, routing_query, routing_mask, top_k, force=None):
        """As Memory.select: the layer's own best documents of every question, and their content. Collective; no gradients."""
        B = len(routing_query)
        scores, numbers = [torch.full((B, top_k), float("-inf"), device=self.device)], [torch.full((B, top_k), -1, device=self.device)]
        for block in self.blocks:
            documents, best = select_documents(routing_query, routing_mask, block.keys[layer], block.offsets, top_k, block.scales[layer],
                                               block.alive_on_device, self.bank.layout.unit_keys)
            scores.append(best)
            numbers.append(block.numbers_on_device[documents].masked_fill(documents < 0, -1))
        scores, numbers = best_of(torch.cat(scores, 1), torch.cat(numbers, 1), top_k)
        if self.ranks.world > 1:
            found = self.ranks.gather(torch.stack([scores.double(), numbers.double()]))                 # exact: numbers are below 2^53
            scores, numbers = best_of(*found.permute(1, 2, 0, 3).flatten(2), top_k)
            scores, numbers = scores.float(), numbers.long()
        documents = torch.searchsorted(self.numbers_on_device, numbers).masked_fill(numbers < 0, -1)
        union = documents[documents >= 0].unique()                                      # in the order of numbers
        positions = union.cpu().numpy()
        ends = memory_bank.ends_of(self.bank.chunks[positions] if len(positions) else np.zeros(1, np.int64))  # none: one without chunks
        local = torch.searchsorted(union, documents).masked_fill(documents < 0, -1)
        index, slots, owner = document_slots(local, torch.from_numpy(ends).to(self.device))
        keys, values = self.fetch(layer, positions, ends)
        return Selection(keys, values, index, slots, scores.gather(1, owner), documents, scores, None)

    def fetch(self, layer, positions, ends):
        """Keys and values of these documents, (C', G, D) each: every rank brings its own."""
        G, D = self.bank.layout.kv_heads, self.bank.layout.head_dim
        found = torch.zeros(ends[-1], 2, G, D, dtype=torch.bfloat16 if self.bank.layout.content == "bfloat16" else torch.float32,
                            pin_memory=self.device.type == "cuda")
        for i, position in enumerate(positions):
            if self.block_of[position] >= 0:
                content, scales = self.content(layer, position)
                found[ends[i]:ends[i + 1]] = content if scales is None else content * scales[:, :, None, None]
        found = self.ranks.sum(found.to(self.device))                                   # others' rows are zero: the sum is exact
        return found[:, 0].contiguous(), found[:, 1].contiguous()

    def content(self, layer, position):
        block = self.blocks[self.block_of[position]]
        if not block.content:
            content, scales = self.bank.content(layer, position)
            return to_tensor(content), None if scales is None else torch.from_numpy(scales)
        rows = slice(*block.ends[self.row_of[position]:self.row_of[position] + 2])
        content, scales = block.content[layer]
        return content[rows], None if scales is None else scales[rows]


class Texts:
    def __init__(self, bank):
        self.bank = bank

    def __getitem__(self, position):
        return self.bank.document(position)[0].tolist()


def best_of(scores, numbers, k):
    """The k best of each row in the order of (-score, number): (B, n), (B, n) -> (B, k), (B, k)."""
    by_number = numbers.argsort(dim=1, stable=True)
    scores, numbers = scores.gather(1, by_number), numbers.gather(1, by_number)
    by_score = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, by_score), numbers.gather(1, by_score)
