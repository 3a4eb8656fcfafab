"""What `encode` makes and `read` consumes: a memory as tensors, and what routing selected of it; and what
training measures of it.

    B questions   T question tokens   M documents   C chunks   K documents selected
    S memory slots of a question   G key/value heads   D head size; of routing keys and queries they are
    config.routing_shape[1:]: attention's, or 1 and routing_dim
"""

from dataclasses import dataclass, replace
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from common import to_device
from msa_kernel import ranges
from routing import document_queries, document_slots, mean_scores, quantize, route, top_documents

FOUND = 3           # documents of a first round that route in the second
FOUND_WEIGHT = 0.5  # of the best of them, beside the question; the others' is less, as their scores are


@dataclass
class Output:
    logits: torch.Tensor               # (B, T, V) fp32; or (N, V) for the N positions asked for
    selections: list                   # of Selection: one per memory layer, or one that all of them read


@dataclass
class Selection:
    """What routing chose for B questions. Document indices count in the order of numbers."""
    keys: list     # of (C', G, D), one per layer that reads it: chunk keys; a question reads its own rows
    values: list                       # of (C', G, D)
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

    @staticmethod
    def join(parts):
        """The Selection of B questions out of B of one question each. Keys and values that all of them share
        are not copied."""
        width, owner, rows, index = max(part.index.size(1) for part in parts), {}, 0, []
        pad = lambda x: F.pad(x, (0, width - x.size(1)))
        for part in parts:
            shared = tuple(map(id, part.keys))
            if shared not in owner:
                owner[shared] = part, rows
                rows += len(part.keys[0]) if part.keys else 0
            index.append(pad(part.index + owner[shared][1]))
        stored = [part for part, _ in owner.values()]
        join = lambda xs: xs[0] if len(xs) == 1 else torch.cat(xs)
        keys, values = ([join(xs) for xs in zip(*(getattr(part, name) for part in stored))]
                        for name in ("keys", "values"))
        of_all = lambda name: [getattr(part, name) for part in parts]
        return Selection(keys, values, join(index), join(of_all("slots")),
                         join([pad(scores) for scores in of_all("slot_scores")]),
                         join(of_all("documents")), join(of_all("scores")), None)


@dataclass
class Memory:
    """A memory held as tensors; documents in the order of their numbers."""
    keys: list  # of (C, G, D), one per reading layer: attention keys after QK-norm and RoPE, chunks' means
    values: list                       # of (C, G, D): attention values, mean of each chunk
    routing_keys: list  # of (C, G, D), one per routing layer: unit length per head; int8 with scales
    offsets: torch.Tensor              # (M + 1,) int64: document m's chunks are offsets[m]:offsets[m + 1]
    numbers: list                      # M document numbers, increasing
    scales: list = None                # of (C,) fp32, with int8 routing keys

    def __len__(self):
        return len(self.numbers)

    def select(self, queries, mask, top_k, readers):
        """Route (section 3.2) and point at what was found; nothing is copied. Returns a Selection.

        queries: place of a routing layer, counted from 0 -> (B, T, W) from `group_queries`; behind the last
        layer the count begins again. A document's score is the mean over queries. mask: (B, T) bool, the
        tokens that route; top_k: documents that a question selects; readers: places of the reading layers
        whose keys and values are wanted.
        """
        layers, scales = len(self.routing_keys), self.layer_scales()
        scores = mean_scores([route(query, mask, self.routing_keys[place % layers], self.offsets,
                                    scales[place % layers]) for place, query in queries.items()])
        documents, best = top_documents(scores.detach(), top_k)
        index, slots, owner = document_slots(documents, self.offsets)
        keys, values = ([xs[place] for place in readers] for xs in (self.keys, self.values))
        return Selection(keys, values, index, slots, best.gather(1, owner), documents, best, scores)

    def document_queries(self, documents):
        """As `routing.document_queries`."""
        return document_queries(documents, self.routing_keys, self.offsets, self.layer_scales())

    def layer_scales(self):
        """The scales of every routing layer, None where keys are not int8."""
        return self.scales or [None] * len(self.routing_keys)

    @staticmethod
    def in_order(parts, encoded, offsets, numbers, device):
        """The Memory of documents that were encoded in another order: parts, what was made of batch after
        batch, (keys, values, routing keys), lists of (C, G, D) on the device; encoded: documents' indices in
        that order; offsets: on the host, where the order is worked out: nothing waits for the device."""
        counts, encoded = offsets.diff(), torch.tensor(encoded)
        rows = ranges(F.pad(counts[encoded].cumsum(0), (1, 0))[encoded.argsort()], counts)
        stored = [[torch.cat(xs) for xs in zip(*kind)] for kind in zip(*parts)]
        for x in [x for kind in stored for x in kind]:
            assert len(x) == len(rows), "what was encoded is not what was given"
        rows = to_device(rows, device)
        keys, values, routing_keys = ([x[rows] for x in kind] for kind in stored)
        return Memory(keys, values, routing_keys, to_device(offsets, device), numbers)

    def subset(self, documents):
        """The memory of these documents only: a copy. documents: increasing indices, else ValueError."""
        documents = torch.as_tensor(documents, dtype=torch.long, device=self.offsets.device)
        if (documents.diff() <= 0).any():
            raise ValueError("the documents of a subset must be increasing indices")
        counts = self.offsets.diff()[documents]
        rows = ranges(self.offsets[documents], counts)
        numbers = [self.numbers[d] for d in documents.tolist()]
        return Memory(**self.chunks(rows), offsets=F.pad(counts.cumsum(0), (1, 0)), numbers=numbers)

    def span(self, first, last):
        """The documents from `first` up to `last`: views of this memory's tensors."""
        offsets = self.offsets[first:last + 1]
        part = self.chunks(slice(int(offsets[0]), int(offsets[-1])))
        return Memory(**part, offsets=offsets - offsets[0], numbers=self.numbers[first:last])

    def chunks(self, rows):
        """What is held of some chunks, by the names of the fields; rows: an index or a slice."""
        names = ("keys", "values", "routing_keys") + ("scales",) * bool(self.scales)
        return {name: [x[rows] for x in getattr(self, name)] for name in names}

    def with_documents(self, places, own):
        """A copy with those of the Memory `own`, one after another, in place of the documents at increasing
        `places`."""
        parts, begin = [], 0
        for i, place in enumerate(places):
            parts += [self.span(begin, place), own.span(i, i + 1)]
            begin = place + 1
        return Memory.cat([*parts, self.span(begin, len(self))])

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
        parts = [memory.chunks(slice(None)) for memory in memories]
        joined = {name: [torch.cat(xs) for xs in zip(*(part[name] for part in parts))] for name in parts[0]}
        return Memory(**joined, offsets=F.pad(counts.cumsum(0), (1, 0)), numbers=numbers)


BATCH_TOKENS = 2048  # of documents that are encoded together, padding included


def at_once(tokens, device):
    """Tokens that a device works on at once: as many as given on a CPU, eight times as many on a GPU."""
    return tokens if device.type == "cpu" else 8 * tokens


def by_length(lengths, batch_tokens):
    """Indices of `lengths`, a list, in batches of similar length, the longest first, of at most
    `batch_tokens` tokens with their padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        batch = order[-max(1, batch_tokens // lengths[order[-1]]):]
        del order[-len(batch):]
        yield batch


def shared_length(rows):
    """How many tokens all rows, lists of ids, begin with."""
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, zip(*rows)))


def padded_batches(documents, batch_tokens):
    """Documents (L,), or (L, n), as the batches of `by_length`, with padding on the right: yields (indices,
    tokens (M, L)), or (M, L, n)."""
    for batch in by_length([*map(len, documents)], batch_tokens):
        rows = [torch.as_tensor(documents[i], dtype=torch.long) for i in batch]
        yield batch, pad_sequence(rows, batch_first=True)


def rank_documents(selections):
    """The one ranking of training curves, evaluation and naming: the mean over memory layers of a document's
    score.

    A layer that did not select a document counts its own k-th score for it. selections: as in Output.
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


def follow(queries, mask, memory, found):
    """Pseudo-relevance feedback: what routes in a second round, where the best documents of the first one
    route beside the question: (queries, mask) for `select`.

    queries, mask: of the first round; found: its Selection. In every layer a document is scored by the
    question, as before, and by the FOUND best documents, of which the best counts, with its weight.
    """
    documents, scores = found.documents[:, :FOUND], found.scores[:, :FOUND]
    (B, n), T = documents.shape, mask.size(1)
    weights = FOUND_WEIGHT * (scores / scores[:, :1]).nan_to_num().clamp(0, 1)              # (B, n)
    own = memory.document_queries(documents.flatten().tolist()).unflatten(0, (B, n))        # (B, n, R, W)
    own = (weights[..., None, None] * own).repeat(1, T, 1, 1)                               # (B, T * n, R, W)
    both = {place: query.repeat_interleave(n, 1) for place, query in queries.items()}
    both |= {own.size(2) + place: own[:, :, place].contiguous() for place in queries}
    return both, mask.repeat_interleave(n, 1)


def leave_out(documents, excluded):
    """Rankings (B, n) without the excluded (B, M) documents: the others move up, -1 behind them."""
    gone = (documents < 0) | excluded.gather(1, documents.clamp(min=0))
    order = gone.int().argsort(dim=1, stable=True)
    return documents.masked_fill(gone, -1).gather(1, order)


def recall(documents, positive):
    """The share of each question's positives among its documents: (B, n) indices, -1 for none, (B, M) bool ->
    (B,)."""
    found = torch.zeros(len(positive), positive.size(1) + 1, dtype=torch.bool, device=positive.device)
    found.scatter_(1, documents.masked_fill(documents < 0, positive.size(1)), True)  # the last column: none
    return (found[:, :-1] & positive).sum(1) / positive.sum(1)


class Tally:
    """What training prints of a pool, added up over its batches; nothing here has a gradient.

    naming, answer: the parts of the loss in samples that name documents and in those that answer; named and
    answered: the shares of these samples whose every token is the likeliest. recall (rankings + 1,): the
    share of positives among what each Selection holds, then among the first top_k of `rank_documents`,
    documents in the sample left out; top1: the same of the first alone.
    """

    def __init__(self, rankings, device):
        """rankings: how many Selections a question has."""
        self.losses, self.predicted, self.right, self.samples = torch.zeros(4, 2, device=device)
        self.recall = torch.zeros(rankings + 1, device=device)
        self.top1, self.asked = torch.zeros((), device=device), 0

    @torch.no_grad()
    def add_tokens(self, batch, places, logits, token_losses):
        """batch: as for `MSA.forward`; places: rows and columns (N,) of its predicted tokens, logits (N, V)
        and losses (N,) of these. Sums by index, where bincount would wait for how many there are."""
        answers, losses, row = batch["answers"].long(), token_losses.float(), places[0]
        wrong = (logits.argmax(-1) != batch["tokens"][places]).float()
        wrong = torch.zeros_like(answers, dtype=torch.float32).index_add_(0, row, wrong)
        self.losses.index_add_(0, answers[row], losses)
        self.predicted.index_add_(0, answers[row], torch.ones_like(losses))
        self.samples.index_add_(0, answers, torch.ones_like(wrong))
        self.right.index_add_(0, answers, (wrong == 0).float())

    @torch.no_grad()
    def add_rankings(self, selections, positive, appended, top_k):
        """Selections of questions that have positives (B, M) bool; appended: documents in the question."""
        first = leave_out(rank_documents(selections)[0], appended)
        found = [selection.documents for selection in selections] + [first[:, :top_k]]
        self.recall += torch.stack([recall(documents, positive).sum() for documents in found])
        self.top1 += recall(first[:, :1], positive).sum()
        self.asked += len(positive)

    def means(self):
        """A dict of these, each a mean over what was added; NaN where no sample names, or none answers."""
        naming, answer = self.losses / self.predicted
        named, answered = self.right / self.samples
        asked = max(self.asked, 1)
        return dict(naming=naming, answer=answer, named=named, answered=answered, recall=self.recall / asked,
                    top1=self.top1 / asked)
