"""What `encode` makes and `read` consumes: a memory as tensors, what routing selected of it, a question's
cache.

    B questions   T question tokens   M documents   C chunks   K documents selected
    S memory slots of a question   G key/value heads   D head size
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from msa_kernel import ranges
from routing import document_slots, quantize, route, top_documents


@dataclass
class Selection:
    """What one memory layer's routing chose for B questions. Document indices count in the order of
    numbers."""
    keys: torch.Tensor                 # (C', G, D) chunk keys; every question reads its own rows of them
    values: torch.Tensor               # (C', G, D)
    index: torch.Tensor                # (B, S) int64, rows of keys and values, in document order
    slots: torch.Tensor                # (B,) how many of the S count
    slot_scores: torch.Tensor          # (B, S) fp32, the score of each slot's document
    documents: torch.Tensor            # (B, K) int64, best first; -1: fewer than K
    scores: torch.Tensor               # (B, K) fp32, descending; -inf where documents is -1
    all_scores: torch.Tensor           # (B, M) fp32, for Eq. 5; None from a bank

    def map(self, pick):
        """A copy of which every tensor of B rows is what `pick` makes of it."""
        names = ("index", "slots", "slot_scores", "documents", "scores")
        all_scores = None if self.all_scores is None else pick(self.all_scores)
        return replace(self, all_scores=all_scores, **{name: pick(getattr(self, name)) for name in names})


@dataclass
class Memory:
    """A memory held as tensors, one entry per memory layer; documents in the order of their numbers."""
    keys: list  # of (C, G, D): attention keys after QK-norm and RoPE, mean of each chunk
    values: list                       # of (C, G, D): attention values, mean of each chunk
    routing_keys: list                 # of (C, G, D): unit length per head; int8 with scales
    offsets: torch.Tensor              # (M + 1,) int64: document m's chunks are offsets[m]:offsets[m + 1]
    numbers: list                      # M document numbers, increasing
    scales: list = None                # of (C,) fp32, with int8 routing keys

    def __len__(self):
        return len(self.numbers)

    def select(self, layer, routing_query, routing_mask, top_k):
        """Route (section 3.2) and point at what was found; nothing is copied. Returns a Selection.

        layer: counts memory layers from 0; routing_query: (B, T, G * D) from `group_queries`; routing_mask:
        (B, T) bool, the tokens that route; top_k: documents that a question selects.
        """
        scales = None if self.scales is None else self.scales[layer]
        scores = route(routing_query, routing_mask, self.routing_keys[layer], self.offsets, scales)
        documents, best = top_documents(scores.detach(), top_k)
        index, slots, owner = document_slots(documents, self.offsets)
        return Selection(self.keys[layer], self.values[layer], index, slots, best.gather(1, owner), documents,
                         best, scores)

    def subset(self, documents):
        """The memory of these documents only: a copy. documents: increasing indices, else ValueError."""
        documents = torch.as_tensor(documents, dtype=torch.long, device=self.offsets.device)
        if (documents.diff() <= 0).any():
            raise ValueError("the documents of a subset must be increasing indices")
        counts = self.offsets.diff()[documents]
        rows = ranges(self.offsets[documents], counts)
        part = {name: [x[rows] for x in getattr(self, name)] for name in ("keys", "values", "routing_keys")}
        scales = self.scales and [x[rows] for x in self.scales]
        numbers = [self.numbers[d] for d in documents.tolist()]
        return Memory(**part, offsets=F.pad(counts.cumsum(0), (1, 0)), numbers=numbers, scales=scales)

    def round_routing_keys(self, dtype):
        """The same memory with routing keys in float32, bfloat16 or int8."""
        if dtype != torch.int8:
            return replace(self, routing_keys=[x.to(dtype) for x in self.routing_keys])
        keys, scales = zip(*map(quantize, self.routing_keys))
        return replace(self, routing_keys=list(keys), scales=list(scales))

    @staticmethod
    def cat(memories):
        """One memory of several whose numbers follow each other, else ValueError."""
        numbers = [n for memory in memories for n in memory.numbers]
        if any(a >= b for a, b in zip(numbers, numbers[1:])):
            raise ValueError("document numbers must be increasing")
        counts = torch.cat([memory.offsets.diff() for memory in memories])
        joined = {}
        for name in ["keys", "values", "routing_keys"] + ["scales"] * bool(memories[0].scales):
            joined[name] = [torch.cat(xs) for xs in zip(*(getattr(memory, name) for memory in memories))]
        return Memory(**joined, offsets=F.pad(counts.cumsum(0), (1, 0)), numbers=numbers)


class Cache:
    """A question's local keys and values and its Selections; a read that is given a filled one does not
    route."""

    def __init__(self):
        self.keys, self.values = {}, {}        # layer -> (B, T', G, D)
        self.selections = []                   # one per memory layer; empty without a memory
        self.length, self.prefix_length = 0, 0
        self.last = {}                         # what an `embed` needs of the tokens before, name -> (B, ...)

    def extended(self, layer, keys, values):
        """The layer's keys and values with these behind them."""
        if self.length:
            keys = torch.cat([self.keys[layer], keys], 1)
            values = torch.cat([self.values[layer], values], 1)
        return keys, values

    def map(self, pick):
        """A copy of which every tensor of B rows is what `pick` makes of it; the original stays as it is."""
        copy = Cache()
        for name in ("keys", "values", "last"):
            setattr(copy, name, {key: pick(x) for key, x in getattr(self, name).items()})
        copy.selections = [selection.map(pick) for selection in self.selections]
        copy.length, copy.prefix_length = self.length, self.prefix_length
        return copy

    def rows(self, index):
        """A copy that holds these rows, index (B,) int64."""
        return self.map(lambda x: x[index])

    def expand(self, n):
        """One question's cache for n continuations, without a copy of its tensors."""
        return self.map(lambda x: x.expand(n, *x.shape[1:]))


def rank_documents(selections):
    """The one ranking of training curves, evaluation and naming: the mean over memory layers of a document's
    score.

    A layer that did not select a document counts its own k-th score for it. selections: one per memory layer.
    Returns documents (B, n) int64 and scores (B, n) fp32: what some layer selected, best first, ties to the
    lower number; -1 and -inf where a question has fewer.
    """
    documents = torch.cat([selection.documents for selection in selections], 1)             # with repetitions
    total, layers = torch.zeros(documents.shape, device=documents.device), 0
    for selection in selections:
        same = documents[:, :, None] == selection.documents[:, None]                        # (B, n, K)
        own = selection.scores[:, None].masked_fill(~same, float("-inf")).amax(2)
        kth = selection.scores.masked_fill(selection.documents < 0, float("inf")).amin(1, keepdim=True)
        chose = (selection.documents >= 0).any(1, keepdim=True)
        total, layers = total + torch.maximum(own, kth).masked_fill(~chose, 0), layers + chose.int()
    documents, order = documents.sort(1)
    repeated = F.pad(documents[:, 1:] == documents[:, :-1], (1, 0))
    scores = (total / layers).gather(1, order).masked_fill(repeated | (documents < 0), float("-inf"))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return documents.gather(1, order).masked_fill(scores == float("-inf"), -1), scores


def leave_out(documents, excluded):
    """Rankings (B, n) without the excluded (B, M) documents: the others move up, -1 behind them."""
    gone = (documents < 0) | excluded.gather(1, documents.clamp(min=0))
    order = gone.int().argsort(dim=1, stable=True)
    return documents.masked_fill(gone, -1).gather(1, order)


def hit_rate(documents, positive):
    """The share of each question's positives among its documents: (B, n) indices, -1 for none, (B, M) bool ->
    (B,)."""
    found = torch.zeros(len(positive), positive.size(1) + 1, dtype=torch.bool, device=positive.device)
    found.scatter_(1, documents.masked_fill(documents < 0, positive.size(1)), True)  # the last column: none
    return (found[:, :-1] & positive).sum(1) / positive.sum(1)
