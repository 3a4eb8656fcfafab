"""The three operations of a memory layer: pooling, routing, sparse attention. Here in PyTorch: this is the definition.

    B questions   T question tokens   M documents   L tokens of a document (padded)   C chunks   K documents selected
    S memory slots of a question (chunks of its selected documents)   H query heads   G key/value heads   D head size
"""
import torch
import torch.nn.functional as F

ROUTE_TILE = 4096  # chunks scored at a time: B * T * ROUTE_TILE * 4 bytes is the largest intermediate


def chunk_offsets(lengths, chunk_size, last=0):
    """Where each document's chunks begin: (M,) token counts -> (M + 1,) int64, ceil(length / chunk_size) chunks each.

    last: so many tokens at a document's end (all of its tokens at most) have a chunk of their own.
    """
    chunks = (lengths - last + chunk_size - 1) // chunk_size + (last > 0)
    return F.pad(chunks.cumsum(0), (1, 0))


def pool_chunks(x, lengths, chunk_size, last=0):
    """Mean over each chunk's tokens (section 3.2); a last short chunk is averaged over what it has.

    x: (M, L, G, D), right-padded; lengths: (M,) tokens of each document, at least 1; last: as for `chunk_offsets`.
    Returns (C, G, D), documents one after another.
    """
    if last:
        body, ends = pool_chunks(x, lengths - last, chunk_size), chunk_offsets(lengths, chunk_size, last)[1:] - 1
        place = (lengths - last)[:, None] + torch.arange(last, device=x.device)         # (M, last)
        own = x.gather(1, place[:, :, None, None].expand(-1, -1, *x.shape[2:])).mean(1)  # (M, G, D)
        is_end = torch.zeros(len(body) + len(own), dtype=torch.bool, device=x.device)
        is_end[ends] = True
        return body.new_empty(is_end.numel(), *x.shape[2:]).index_copy(0, ends, own).index_copy(0, (~is_end).nonzero().squeeze(1), body)
    M, L, G, D = x.shape
    valid = torch.arange(L, device=x.device) < lengths[:, None]                         # (M, L)
    x = F.pad(x * valid[:, :, None, None], (0, 0, 0, 0, 0, -L % chunk_size))
    sums = x.view(M, -1, chunk_size, G, D).sum(2)                                       # (M, chunks, G, D)
    start = torch.arange(sums.size(1), device=x.device) * chunk_size
    counts = (lengths[:, None] - start).clamp(max=chunk_size)                           # (M, chunks); <= 0: no such chunk
    return sums[counts > 0] / counts[counts > 0][:, None, None].to(x.dtype)


def group_queries(routing_query, kv_heads):
    """L2-normalise routing queries per head, sum them within each KV group, divide by H: (B, T, H, D) -> (B, T, G * D).

    Heads are averaged before anything else and the query heads of a group share a key, so that the mean over heads of the
    cosine is one inner product: <(1 / H) * sum of the group's queries, key>. The sum is not normalised again.
    """
    B, T, H, D = routing_query.shape
    unit = F.normalize(routing_query.float(), dim=-1)
    return unit.view(B, T, kv_heads, H // kv_heads, D).sum(3).flatten(2) / H


def route(query, mask, routing_keys, offsets):
    """Document scores (section 3.2, Eq. 2): mean over heads of the cosine, max over tokens, max over chunks.

    query: (B, T, G * D) from `group_queries`; mask: (B, T) bool, the tokens that route; routing_keys: (C, G, D), unit
    length per head; offsets: (M + 1,). Returns (B, M) fp32; -inf for a question without routing tokens.
    Chunks are scored in padded tiles of one shape, so that a chunk's score does not depend, even in its last bit, on where it
    lies: equal documents tie. (In training the tiles are small: a pool has few chunks.)
    """
    keys, best = routing_keys.flatten(1), []
    tile = 64 if torch.is_grad_enabled() else ROUTE_TILE
    for start in range(0, len(keys), tile):
        part = keys[start:start + tile].float()
        scores = query @ F.pad(part, (0, 0, 0, tile - len(part))).T                     # (B, T, tile)
        best.append(scores.masked_fill(~mask[:, :, None], float("-inf")).amax(1))
    best = torch.cat(best, 1)[:, :len(keys)]                                            # (B, C)
    documents = len(offsets) - 1
    if documents == len(keys):                                                          # one chunk each
        return best
    owner = torch.repeat_interleave(torch.arange(documents, device=best.device), offsets.diff(), output_size=len(keys))
    empty = best.new_full((len(query), documents), float("-inf"))
    return empty.scatter_reduce(1, owner.expand(len(query), -1), best, "amax")


def top_documents(scores, k):
    """The k best documents of each question, in the order of (-score, number).

    scores: (B, M), documents in the order of their numbers. Returns (indices (B, k) int64, scores (B, k)); places that no
    document fills (fewer than k, or score -inf) hold index -1 and score -inf.
    """
    B, M = scores.shape
    if B and M > 4 * k:  # a full sort of millions is slow: keep those that reach the k-th score, ties included
        kth = scores.topk(k, sorted=False).values.amin()  # over the batch: one threshold keeps the candidates rectangular
        kept = (scores >= kth).any(0).nonzero().squeeze(1)
        values, order = scores[:, kept].sort(dim=1, descending=True, stable=True)
        values, order = values[:, :k], kept[order[:, :k]]
    else:
        values, order = scores.sort(dim=1, descending=True, stable=True)
        values, order = values[:, :k], order[:, :k]
    order = order.masked_fill(values == float("-inf"), -1)
    return F.pad(order, (0, k - order.size(1)), value=-1), F.pad(values, (0, k - values.size(1)), value=float("-inf"))


def document_slots(documents, offsets):
    """The chunks of each question's documents, in document order.

    documents: (B, K) indices, -1: none. Returns index (B, S), rows of the chunks; slots (B,), how many of the S count;
    owner (B, S), the column of `documents` that a slot belongs to. Slots that do not count hold 0.
    """
    ordered, column = documents.masked_fill(documents < 0, len(offsets)).sort(1)        # -1 last
    exists = ordered < len(offsets)
    ordered = ordered.clamp(max=len(offsets) - 2)
    starts, counts = offsets[ordered], (offsets[ordered + 1] - offsets[ordered]) * exists
    ends = counts.cumsum(1)                                                             # (B, K) slots used so far
    slots = ends[:, -1]
    s = torch.arange(int(slots.max()), device=documents.device).expand(len(documents), -1)
    owner = torch.searchsorted(ends, s.contiguous(), right=True).clamp(max=documents.size(1) - 1)
    index = starts.gather(1, owner) + s - (ends - counts).gather(1, owner)
    none = s >= slots[:, None]
    return index.masked_fill(none, 0), slots, column.gather(1, owner).masked_fill(none, 0)


def sparse_attention(query, keys, values, memory_keys=None, memory_values=None, index=None, slots=None, prefix_length=0, bias=None):
    """A question's attention (section 3.3): [the chunks of its selected documents | its own causal past].

    query: (B, T, H, D), the last T of T' tokens; keys, values: (B, T', G, D), local; memory_keys, memory_values: (C', G, D);
    index: (B, S) rows of these, of which the first slots[b] count. The first `prefix_length` of the T' tokens do not see the memory.
    bias: optional (B, S) fp32, added to the memory's logits, alike in all heads.
    Returns (B, T, H, D).
    """
    T, past = query.size(1), keys.size(1) - query.size(1)
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    if index is None or index.size(1) == 0:
        index = None
        if past == 0 or T == 1:  # the fast path: no mask in memory
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True).transpose(1, 2)
    position = torch.arange(past, past + T, device=q.device)[:, None]                   # (T, 1) among the T' tokens
    mask = (position >= torch.arange(past + T, device=q.device)).expand(len(q), -1, -1)  # (B, T, T')
    if index is not None:
        visible = torch.arange(index.size(1), device=q.device) < slots[:, None]         # (B, S)
        mask = torch.cat([visible[:, None] & (position >= prefix_length), mask], 2)     # (B, T, S + T')
        k = torch.cat([memory_keys[index].to(k.dtype).transpose(1, 2), k], 2)
        v = torch.cat([memory_values[index].to(v.dtype).transpose(1, 2), v], 2)
        if bias is not None:
            added = F.pad(bias.to(q.dtype), (0, mask.size(2) - bias.size(1)))[:, None]  # (B, 1, S + T')
            mask = added.expand_as(mask).masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True).transpose(1, 2)
