"""What a question, or many, have read until now: local keys and values, and what routing selected for them.

    B questions   T tokens of a read   N tokens of the longest row   H query heads   G key/value heads
    D head size   S memory slots
"""
import torch

from common import to_device
from memory import Selection
from msa_kernel import attend_rows, sparse_attention


class Cache:
    """Local keys and values of B questions of one length, and their Selections; a read that is given a filled
    one does not route."""

    def __init__(self):
        self.keys, self.values = {}, {}        # layer -> (B, T', G, D)
        self.selections = []                   # as in Output; empty without a memory
        self.length, self.prefix_length = 0, 0

    def places(self, tokens):
        """Where the next T tokens stand: (T,), or (B, T) where rows differ. tokens: (B, T)."""
        return self.length + torch.arange(tokens.size(1), device=tokens.device)

    def extended(self, layer, keys, values):
        """The layer's keys and values with these behind them."""
        if self.length:
            keys = torch.cat([self.keys[layer], keys], 1)
            values = torch.cat([self.values[layer], values], 1)
        return keys, values

    def attend(self, query, keys, values, *memory):
        """`sparse_attention` of the next tokens, over what `extended` has returned."""
        return sparse_attention(query, keys, values, *memory)

    def keep(self, keys, values, selections):
        """Hold what `extended` has returned and what was selected, or None, layer by layer, after a read."""
        self.keys, self.values = dict(enumerate(keys)), dict(enumerate(values))
        self.selections = self.selections or [selection for selection in selections if selection is not None]
        self.length = keys[0].size(1)

    def map(self, pick):
        """A copy of which every tensor of B rows is what `pick` makes of it; the original stays as it is."""
        copy = Cache()
        for name in ("keys", "values"):
            setattr(copy, name, {key: pick(x) for key, x in getattr(self, name).items()})
        copy.selections = [selection.map(pick) for selection in self.selections]
        copy.length, copy.prefix_length = self.length, self.prefix_length
        return copy

    def expand(self, n):
        """One question's cache for n continuations, without a copy of its tensors."""
        return self.map(lambda x: x.expand(n, *x.shape[1:]))


class Rows(Cache):
    """Caches of several questions, of any lengths, in space that is allocated once and written in place.

    `put` begins rows anew, `take` chooses those that the next read continues, and `advance` says how many of
    its tokens count: what lies behind a row's length is never seen. A read may continue each row by branches,
    runs of `branch` tokens that do not see each other; without `advance` it leaves nothing behind.
    """

    def __init__(self, rows):
        super().__init__()
        self.lengths, self.selected = [0] * rows, [[] for _ in range(rows)]  # tokens, Selections of each row
        self.taken, self.space = None, 0       # rows of the next read; tokens that a row has room for

    def put(self, rows, cache, lengths):
        """These rows hold what a Cache of B rows does, of which the first lengths[b] tokens count; lists."""
        self.make_room(max(cache.length, 1), cache)
        index = to_device(rows, cache.keys[0].device)
        for layer in cache.keys:
            self.keys[layer][index, :cache.length] = cache.keys[layer]
            self.values[layer][index, :cache.length] = cache.values[layer]
        for b, row in enumerate(rows):
            self.lengths[row] = lengths[b]
            self.selected[row] = [part.map(lambda x: x[b:b + 1]) for part in cache.selections]
        self.taken, self.length, self.prefix_length = None, 1, cache.prefix_length  # 1: nothing routes again

    def make_room(self, tokens, like=None):
        """Rows of `tokens` tokens and more, of layers and types as in the Cache `like`, or as until now."""
        if tokens <= self.space:
            return
        self.space = 1 << max(tokens - 1, 63).bit_length()
        for name in ("keys", "values"):
            held = getattr(self, name)
            for layer, x in getattr(like or self, name).items():
                space = x.new_zeros(len(self.lengths), self.space, *x.shape[2:])  # never NaN: all is read
                if layer in held:
                    space[:, :held[layer].size(1)] = held[layer]
                held[layer] = space

    def take(self, rows, tokens, branch=None):
        """The next read continues these rows, an increasing list, with so many tokens each."""
        self.longest = max(self.lengths[row] for row in rows) + tokens
        self.make_room(self.longest)
        self.branch = branch or tokens
        if rows != self.taken:
            device = self.keys[0].device
            index = to_device([rows, [self.lengths[row] for row in rows]], device)
            self.taken, self.index, self.starts = rows, index[0], index[1].clone()
            parts = zip(*(self.selected[row] for row in rows), strict=True)  # all have a memory, or none has
            self.selections = [Selection.join(part) for part in parts]
        self.own = torch.arange(tokens, device=self.starts.device)
        self.at = self.starts[:, None] + self.own  # (B, T): where they are written, in all layers
        return self

    def advance(self, counts):
        """Of the tokens of the last read so many of each row count: a list."""
        for row, count in zip(self.taken, counts):
            self.lengths[row] += count
        if len({*counts}) > 1:
            self.starts += to_device(counts, self.starts.device)
        else:
            self.starts += counts[0]

    def places(self, tokens):
        return self.starts[:, None] + self.own % self.branch

    def extended(self, layer, keys, values):
        """Writes these behind each row's; returns the space of all rows."""
        spaces = self.keys[layer], self.values[layer]
        for space, new in zip(spaces, (keys, values)):
            space[self.index[:, None], self.at] = new
        return spaces

    def attend(self, query, keys, values, *memory):
        rows = None if self.taken == [*range(len(self.taken))] else self.index  # of the first no copy
        return attend_rows(query, keys, values, rows, self.starts, self.longest, self.branch, *memory)

    def keep(self, keys, values, selections):
        """Nothing to do: `extended` has written it."""
