"""Routing, the first operation of a memory layer: scores of documents, and what they select (section 3.2).

    group_queries       routing queries per head -> one vector a token, such that heads need no loop
    route               a question's routing queries against every chunk's routing key -> a score per document
    select_documents    a bank's best documents; some CPUs look in bf16 first, and it is exact all the same

`route` is a reference in PyTorch, which is the definition, and a Triton kernel with its backward, behind one
function; see msa_kernel.py for which of them runs.

    B questions   T question tokens   M documents   C chunks   K documents selected   H query heads
    G key/value heads   D head size   W = G * D   S memory slots of a question; of routing keys and queries
    G, D are config.routing_shape[1:]: attention's, or 1 and routing_dim
"""
from __future__ import annotations  # `tl.constexpr` stays a word where triton is not installed

import torch
import torch.nn.functional as F

from common import has_bfloat16
from msa_kernel import (
    FLOATS,
    PRECISION,
    check,
    jit,
    owners,
    power_of_two,
    ranges,
    tl,
    triton,
    use_triton,
)

ROUTE_TILE = 2048  # chunks that the reference scores at a time: B * T * ROUTE_TILE * 4 bytes at most


def group_queries(routing_query, kv_heads, normalize=True):
    """Unit length per head, the sum within each KV group, divided by H: (B, T, H, D) -> (B, T, G * D).

    Heads are averaged before anything else and the query heads of a group share a key, so that the mean over
    heads of the cosine is one inner product: <(1 / H) * sum of the group's queries, key>. The sum is not
    normalised again. Without `normalize` queries keep their length.
    """
    B, T, H, D = routing_query.shape
    query = routing_query.float()
    if normalize:
        query = F.normalize(query, dim=-1)
    return query.view(B, T, kv_heads, H // kv_heads, D).sum(3).flatten(2) / H


def quantize(routing_keys):
    """(C, G, D) -> (int8 of that shape, scales (C,) fp32): one scale a chunk, every |error| <= scale / 2."""
    scales = routing_keys.float().abs().amax((1, 2)).clamp(min=1e-12) / 127
    return (routing_keys / scales[:, None, None]).round().to(torch.int8), scales


def split_query(query):
    """(N, G, D) fp32 -> (int8 (2, N, G, D), scales (N,) fp32): query = (first + second / 254) * scale, every
    |error| <= scale / 508. Two int8 products with int8 keys take the place of one that converts the keys."""
    first, scales = quantize(query)
    rest = query / scales[:, None, None] - first
    return torch.stack([first, (254 * rest).round().to(torch.int8)]), scales


def share_document(routing_keys, offsets, share):
    """Adds to each routing key (C, G, D) `share` of its document's mean key, and then of its first chunk's,
    where the title is; each time all are brought to unit length, per head."""
    owner = owners(offsets, len(routing_keys))
    sums = torch.zeros(len(offsets) - 1, *routing_keys.shape[1:], device=routing_keys.device)
    means = F.normalize(sums.index_add(0, owner, routing_keys.float()), dim=-1)  # of sums: the same direction
    keys = F.normalize(routing_keys.float() + share * means[owner], dim=-1)
    first = keys[offsets[:-1]]
    return F.normalize(keys + share * first[owner], dim=-1).to(routing_keys.dtype)


def document_queries(documents, routing_keys, offsets, scales):
    """Documents as routing queries: for indices (n,), -1 for none, (n, R, G * D) fp32, 0 where there is none.

    A document's query is the mean of its routing keys, of unit length per head. routing_keys: R layers of
    (C, G, D); offsets: (M + 1,); scales: of int8 keys, (C,) each, else None, for every layer.
    """
    _, G, D = routing_keys[0].shape
    queries = torch.zeros(len(documents), len(routing_keys), G, D, device=offsets.device)
    documents = torch.as_tensor(documents)
    ends = offsets[torch.stack([documents, documents + 1]).clamp(min=0).to(offsets.device)].T.tolist()
    for i, (document, (begin, end)) in enumerate(zip(documents.tolist(), ends)):
        if document >= 0:
            rows = slice(begin, end)
            for layer, (keys, scale) in enumerate(zip(routing_keys, scales)):
                own = keys[rows].float() if scale is None else keys[rows] * scale[rows, None, None]
                queries[i, layer] = F.normalize(own.mean(0), dim=-1) / G
    return queries.flatten(2)


def mean_scores(scores):
    """The mean over routing layers, [(B, M)] -> (B, M), added up in their order."""
    return sum(scores) / len(scores)


def route(query, mask, routing_keys, offsets, scales=None):
    """Document scores (section 3.2, Eq. 2): mean over heads of the cosine, max over tokens, max over chunks.

    query: (B, T, G * D) fp32 from `group_queries`; mask: (B, T) bool, the tokens that route; routing_keys:
    (C, G, D), unit length per head, fp32, bf16, fp16, or int8 with scales (C,) fp32 from `quantize`; offsets:
    (M + 1,). Returns (B, M) fp32; -inf for a question without routing tokens. Nothing of size tokens x chunks
    is stored, but by the reference for its backward. A chunk's score does not depend, even in its last bit,
    on where it lies: equal documents tie. The gradient of a tie within a document goes to its first token and
    chunk (kernels) or is shared out (reference). The kernels round the query to the keys' 16 bits and sum in
    fp32, or to two int8 numbers each for int8 keys (`split_query`), and sum exactly; the reference keeps it
    in fp32.
    """
    if use_triton(query):
        winners = torch.is_grad_enabled() and (query.requires_grad or routing_keys.requires_grad)
        return Route.apply(query, mask, routing_keys, offsets, scales, winners)
    tile = 64 if torch.is_grad_enabled() else ROUTE_TILE  # in training a pool has few chunks
    return document_max(chunk_scores(query, mask, routing_keys.flatten(1), scales, tile), offsets)


def reduce_tokens(scores, blind, dim):
    """A question's tokens become one score: the best of those that route (section 3.2), -inf where none does.

    scores: with the tokens along `dim`; blind: tokens that do not route, broadcast to scores, or None.
    Training, banks and what they score again in fp32 come here; `route_chunks` does the same in its loop.
    """
    if blind is not None:
        scores = scores.masked_fill(blind, float("-inf"))
    return scores.amax(dim)


def chunk_scores(query, mask, keys, scales, tile):
    """The reference's chunk scores: (B, T, W), (B, T), (C, W) -> (B, C), in padded tiles of `tile` chunks."""
    B, T, W = query.shape
    queries, best = query.reshape(B * T, W).T, []
    blind = None if mask.is_cpu and mask.all() else ~mask  # a GPU would be waited for
    with torch.autocast(query.device.type, enabled=False):  # scores stay float32
        for start in range(0, max(len(keys), 1), tile):
            part = keys[start:start + tile].float()
            if len(part) < tile:
                part = F.pad(part, (0, 0, 0, tile - len(part)))
            scores = (part @ queries).view(tile, B, T)  # keys first: the faster order on a CPU
            best.append(reduce_tokens(scores, blind, 2))
    best = torch.cat(best)[:len(keys)].T                # (B, C)
    return best if scales is None else best * scales


def document_max(best, offsets):
    """The best of each document's chunks: (B, C) -> (B, M)."""
    documents, chunks = len(offsets) - 1, best.size(1)
    if documents == chunks:  # one chunk each
        return best
    if best.is_cpu:  # much the faster there
        return torch.segment_reduce(best.T.contiguous(), "max", offsets=offsets, axis=0).T
    empty = best.new_full((len(best), documents), float("-inf"))
    return empty.scatter_reduce(1, owners(offsets, chunks).expand(len(best), -1), best, "amax")


@torch.no_grad()
def select_documents(queries, mask, routing_keys, offsets, top_k, scales=None, alive=None, unit=True):
    """The first top_k by the mean over layers of `route`'s scores, without gradients: indices (B, top_k)
    int64, scores (B, top_k), as `top_documents`.

    queries, routing_keys, scales: lists, one of `route`'s per layer. alive: optional (M,) bool; the others
    are not found. unit: routing keys have unit length per head.

    Some CPUs multiply bf16 at more than twice the rate of fp32, but round the score to bf16 as well as what
    is multiplied. How far this moves a score is known: by the length of the query's rounding error, summed
    over groups (keys have unit length), by 2^-8 of the query's own where keys are rounded, and by half a unit
    in the score's last place, 2^-8 of it. Documents that could still be among the first k by their rough
    scores are scored again in fp32, in all layers: the result is exact.
    """
    query, scales = queries[0], scales or [None] * len(queries)
    layers = list(zip(queries, routing_keys, scales))
    if not (query.is_cpu and unit and has_bfloat16()) or use_triton(query):
        scores = mean_scores([route(query, mask, keys, offsets, scale) for query, keys, scale in layers])
        if alive is not None:
            scores = scores.masked_fill(~alive, float("-inf"))
        return top_documents(scores, top_k)
    rough = error = rounding = 0  # sums over layers
    length = lambda x: x.unflatten(2, routing_keys[0].shape[1:]).norm(dim=3).sum(2).amax(1, keepdim=True)
    for query, keys, scale in layers:
        rough = rough + document_max(rough_scores(query, mask, keys, scale), offsets)       # (B, M)
        error = error + length(query - query.bfloat16())
        error = error + 2 ** -8 * length(query) * (keys.dtype not in (torch.bfloat16, torch.int8))
        rounding = rounding + 2 ** -8 * length(query)
    if alive is not None:
        rough = rough.masked_fill(~alive, float("-inf"))
    kth = rough.topk(min(top_k, rough.size(1)), sorted=False).values.amin(1, keepdim=True)
    if len(layers) == 1:  # tighter: what counts is near the k-th score
        rounding = 2 ** -8 * kth.abs().nan_to_num(posinf=0)
    margin = 1.1 * 2 * (error + rounding)  # twice: the k-th score may be off as well
    kept = ((rough >= kth - margin) & (rough > float("-inf"))).any(0).nonzero().squeeze(1)
    counts = offsets.diff()[kept]
    rows, ends = ranges(offsets[kept], counts), F.pad(counts.cumsum(0), (1, 0))
    exact = [chunk_scores(query, mask, keys[rows].flatten(1), None if scale is None else scale[rows], tile=64)
             for query, keys, scale in layers]
    documents, scores = top_documents(mean_scores([document_max(x, ends) for x in exact]), top_k)
    return F.pad(kept, (0, 1), value=-1)[documents], scores                             # -1 stays -1


def rough_scores(query, mask, keys, scales):
    """`chunk_scores` by bf16 products: (B, T, W), (B, T), (C, G, D) -> (B, C)."""
    B, T, W = query.shape
    queries, best = query.reshape(B * T, W).bfloat16(), []
    blind = None if mask.all() else ~mask[:, :, None]
    for part in keys.flatten(1).split(8 * ROUTE_TILE // max(keys.element_size(), 2)):
        scores = (queries @ part.bfloat16().T).view(B, T, -1)  # int8 is exact in bf16
        best.append(reduce_tokens(scores, blind, 1))
    best = torch.cat(best, 1).float()
    return best if scales is None else best * scales


@jit
def route_chunks(
    query_ptr, mask_ptr, keys_ptr,              # (B, T, W) and (C, W) of one type, (B, T) bool as int8
    rest_ptr, query_scales_ptr, scales_ptr,     # with INT8 only: (B, T, W) int8, (B, T) and (C,) fp32
    best_ptr, token_ptr,                        # (B, C) fp32; (B, C) int32, with WINNERS only
    B, T, C, W,
    INT8: tl.constexpr, WINNERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Program i: BLOCK_B questions, whose tokens are the rows of one tile, against BLOCK_C chunks.

        for BLOCK_T tokens of each at a time:   once, or BLOCK_B is 1
            for BLOCK_W of the width:           products (rows, BLOCK_C) += query tile @ keys tile^T
            best (BLOCK_B, BLOCK_C) = max(best, max over a question's rows of products * scales)

    Programs of the same chunks follow each other and find them in the L2 cache: memory is read once.
    """
    groups, row = tl.cdiv(B, BLOCK_B), tl.arange(0, BLOCK_B * BLOCK_T)
    first = tl.program_id(0) % groups * BLOCK_B
    c = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    best = tl.full([BLOCK_B, BLOCK_C], float("-inf"), tl.float32)
    winner = tl.full([BLOCK_B, BLOCK_C], -1, tl.int32)
    for start in range(0, T, BLOCK_T):
        question, t = first + row // BLOCK_T, start + row % BLOCK_T
        token, exists = question.to(tl.int64) * T + t, (question < B) & (t < T)
        products = tl.zeros([BLOCK_B * BLOCK_T, BLOCK_C], tl.int32 if INT8 else tl.float32)
        if INT8:
            low = products
        for w0 in range(0, W, BLOCK_W):
            w = w0 + tl.arange(0, BLOCK_W)
            query = tl.load(query_ptr + token[:, None] * W + w[None, :],
                            mask=exists[:, None] & (w < W)[None, :], other=0)
            keys = tl.load(keys_ptr + c[:, None] * W + w[None, :],
                           mask=(c < C)[:, None] & (w < W)[None, :], other=0)
            products = tl.dot(query, tl.trans(keys), products, PRECISION, out_dtype=products.dtype)
            if INT8:
                rest = tl.load(rest_ptr + token[:, None] * W + w[None, :],
                               mask=exists[:, None] & (w < W)[None, :], other=0)
                low = tl.dot(rest, tl.trans(keys), low, out_dtype=tl.int32)
        scores = products.to(tl.float32)
        if INT8:
            scale = tl.load(query_scales_ptr + token, mask=exists, other=1.0)
            scores = (scores + low.to(tl.float32) * (1 / 254)) * scale[:, None]
        routes = tl.load(mask_ptr + token, mask=exists, other=0) != 0
        scores = tl.where(routes[:, None], scores, float("-inf")).reshape(BLOCK_B, BLOCK_T, BLOCK_C)
        top = tl.max(scores, 1)
        if WINNERS:
            winner = tl.where(top > best, start + tl.argmax(scores, 1), winner)
        best = tl.maximum(best, top)
    if INT8:
        best = best * tl.load(scales_ptr + c, mask=c < C, other=1.0)[None, :]
    b = first + tl.arange(0, BLOCK_B)
    at, exists = b.to(tl.int64)[:, None] * C + c[None, :], (b < B)[:, None] & (c < C)[None, :]
    tl.store(best_ptr + at, best, mask=exists)
    if WINNERS:
        tl.store(token_ptr + at, winner, mask=exists)


@jit
def route_documents(
    best_ptr, token_ptr, offsets_ptr,           # (B, C), (B, C), (M + 1,)
    scores_ptr, document_token_ptr, document_chunk_ptr,  # (B, M) fp32; (B, M) int32, with WINNERS only
    C, M, WINNERS: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Program (i, b): for the first, second, ... chunk of BLOCK_M documents: score = max(score, best)."""
    m, b = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + m, mask=m < M, other=0)
    end = tl.load(offsets_ptr + m + 1, mask=m < M, other=0)
    score, chunk = tl.full([BLOCK_M], float("-inf"), tl.float32), start
    for i in range(0, tl.max(end - start, 0).to(tl.int32)):
        best = tl.load(best_ptr + b * C + start + i, mask=start + i < end, other=float("-inf"))
        chunk = tl.where(best > score, start + i, chunk)
        score = tl.maximum(score, best)
    tl.store(scores_ptr + b * M + m, score, mask=m < M)
    if WINNERS:
        routed = (m < M) & (score > float("-inf"))
        token = tl.load(token_ptr + b * C + chunk, mask=routed, other=-1)
        tl.store(document_token_ptr + b * M + m, token, mask=m < M)
        tl.store(document_chunk_ptr + b * M + m, chunk.to(tl.int32), mask=m < M)


@jit
def route_backward_query(
    d_scores_ptr, token_ptr, chunk_ptr,         # (B, M)
    keys_ptr, d_query_ptr,                      # (C, W), (B, T, W) fp32
    T, M, W, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Program (t, b, i): d_query = sum over documents that token t won of d_score * the chunk that won."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_W], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        won = tl.load(token_ptr + b * M + m, mask=m < M, other=-1) == t
        d_score = tl.load(d_scores_ptr + b * M + m, mask=won, other=0.0)
        chunk = tl.load(chunk_ptr + b * M + m, mask=won, other=0).to(tl.int64)
        keys = tl.load(keys_ptr + chunk[:, None] * W + w[None, :],
                       mask=won[:, None] & (w < W)[None, :], other=0.0)
        total += tl.sum(d_score[:, None] * keys.to(tl.float32), 0)
    tl.store(d_query_ptr + (b * T + t) * W + w, total, mask=w < W)


@jit
def route_backward_keys(
    d_scores_ptr, token_ptr, chunk_ptr,         # (B, M)
    owner_ptr, query_ptr, d_keys_ptr,           # (C,) int64, (B, T, W), (C, W)
    B, T, M, W, BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Program (c, i): d_key = sum over questions where c won its document of d_score * the token that won."""
    c, w = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m, total = tl.load(owner_ptr + c), tl.zeros([BLOCK_W], tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
        token = tl.load(token_ptr + b * M + m, mask=b < B, other=-1)
        won = (token >= 0) & (tl.load(chunk_ptr + b * M + m, mask=b < B, other=-1) == c)
        d_score = tl.load(d_scores_ptr + b * M + m, mask=won, other=0.0)
        query = tl.load(query_ptr + (b * T + token)[:, None] * W + w[None, :],
                        mask=won[:, None] & (w < W)[None, :], other=0.0)
        total += tl.sum(d_score[:, None] * query.to(tl.float32), 0)
    tl.store(d_keys_ptr + c * W + w, total, mask=w < W)


class Route(torch.autograd.Function):
    """Launches of the route kernels."""

    @staticmethod
    def forward(ctx, query, mask, routing_keys, offsets, scales, winners):
        """winners: note for the backward which token and chunk won each document."""
        B, T, W = query.shape
        C, G, D = routing_keys.shape
        M, int8, device = len(offsets) - 1, routing_keys.dtype == torch.int8, query.device
        check("query", query, (B, T, G * D), (torch.float32,))
        check("mask", mask, (B, T), (torch.bool,))
        check("routing_keys", routing_keys, (C, G, D), (*FLOATS, torch.int8))
        check("offsets", offsets, (M + 1,), (torch.int64,))
        if int8:
            check("scales", scales, (C,), (torch.float32,))
        elif scales is not None:
            raise ValueError(f"scales belong to int8 routing keys; these are {routing_keys.dtype}")
        if int8 and winners:
            raise ValueError("int8 routing keys are for questions, without gradients; use torch.no_grad()")
        best = torch.empty(B, C, device=device)
        token = torch.empty(B, C, dtype=torch.int32, device=device) if winners else best
        if int8:
            (query, rest), query_scales = split_query(query.view(B * T, G, D))
        else:
            query, rest, query_scales, scales = query.to(routing_keys.dtype), best, best, best
        tiles = Route.tiles(B, T, W, routing_keys.element_size())
        programs = triton.cdiv(B, tiles["BLOCK_B"]) * triton.cdiv(C, tiles["BLOCK_C"])
        route_chunks[programs,](
            query, mask.view(torch.int8), routing_keys, rest, query_scales, scales, best, token, B, T, C, W,
            int8, winners, PRECISION, **tiles)
        scores = best
        if M < C or winners:  # else one chunk each: nothing is left to do
            scores = torch.empty(B, M, device=device)
            won = torch.empty(2, B, M, dtype=torch.int32, device=device) if winners else (scores, scores)
            route_documents[triton.cdiv(M, 256), B](best, token, offsets, scores, *won, C, M, winners,
                                                    BLOCK_M=256)
            if winners:
                ctx.save_for_backward(query, routing_keys, offsets, *won)
        return scores

    @staticmethod
    def backward(ctx, d_scores):
        query, keys, offsets, token, chunk = ctx.saved_tensors
        (B, T, W), C, M = query.shape, len(keys), d_scores.size(1)
        d_scores, block = d_scores.contiguous(), power_of_two(W, high=128)
        d_query = d_keys = None
        if ctx.needs_input_grad[0]:
            d_query = torch.empty(B, T, W, device=query.device)
            route_backward_query[T, B, triton.cdiv(W, block)](d_scores, token, chunk, keys, d_query, T, M, W,
                                                              BLOCK_M=32, BLOCK_W=block)
        if ctx.needs_input_grad[2]:
            d_keys = torch.empty_like(keys)
            route_backward_keys[C, triton.cdiv(W, block)](
                d_scores, token, chunk, owners(offsets, C), query, d_keys, B, T, M, W,
                BLOCK_B=16, BLOCK_W=block)
        return d_query, None, d_keys, None, None, None

    @staticmethod
    def tiles(B, T, W, size):
        """The largest that do not spill (tests/compile_kernels.py); 8 to 32 KB of keys are on their way."""
        rows = (128 if T > 32 else 64) // (2 if size == 4 else 1)
        block_t = power_of_two(T, low=1, high=rows)
        block_b = power_of_two(B, low=max(1, 16 // block_t), high=rows // block_t)
        return dict(BLOCK_B=block_b, BLOCK_T=block_t, BLOCK_C=128 if size == 2 else 64,
                    BLOCK_W=power_of_two(W, 32 if size == 1 else 16, 128 // size),
                    num_warps=8, num_stages=4 if size == 2 else 3)


def top_documents(scores, k):
    """The k best documents of each question, in the order of (-score, number).

    scores: (B, M), documents in the order of their numbers. Returns (indices (B, k) int64, scores (B, k));
    places that no document fills (fewer than k, or score -inf) hold index -1 and score -inf.
    """
    B, M = scores.shape
    if B and M > 4 * k:  # sorting millions is slow
        best = best_of_each if scores.is_cpu else best_by_key
        return best(scores, k)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    missing = k - min(k, M)
    values = F.pad(values[:, :k], (0, missing), value=float("-inf"))
    indices = F.pad(order[:, :k], (0, missing), value=-1)
    return indices.masked_fill(values == float("-inf"), -1), values


def best_of_each(scores, k):
    """`top_documents` on a CPU: what reaches a question's k-th score, ties included, is sorted."""
    indices = torch.full((len(scores), k), -1)
    values = scores.new_full((len(scores), k), float("-inf"))
    for b, kth in enumerate(scores.topk(k, sorted=False).values.amin(1)):
        kept = (scores[b] >= kth.clamp(min=torch.finfo(kth.dtype).min)).nonzero()[:, 0]  # -inf does not count
        best, order = scores[b, kept].sort(descending=True, stable=True)
        n = min(k, len(best))
        values[b, :n], indices[b, :n] = best[:k], kept[order[:k]]
    return indices, values


def best_by_key(scores, k):
    """`top_documents` without waiting for the device: integers that are ordered as (score, -number) are, and
    of which no two are equal."""
    M = scores.size(1)
    bits = (scores + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (ordered << 32) + torch.arange(M - 1, -1, -1, device=scores.device)
    indices = M - 1 - (keys.topk(k).values & 0xFFFFFFFF)
    values = scores.gather(1, indices)
    return indices.masked_fill(values == float("-inf"), -1), values


def document_slots(documents, offsets):
    """The chunks of each question's documents, in document order.

    documents: (B, K) indices, -1: none. Returns index (B, S), rows of the chunks; slots (B,), how many of the
    S count; owner (B, S), the column of `documents` that a slot belongs to. Slots that do not count hold 0.
    """
    ordered, column = documents.masked_fill(documents < 0, len(offsets)).sort(1)  # -1 last
    exists = ordered < len(offsets)
    ordered = ordered.clamp(max=len(offsets) - 2)
    starts = offsets[ordered]
    counts = (offsets[ordered + 1] - starts) * exists
    ends = counts.cumsum(1)  # (B, K) slots used so far
    slots = ends[:, -1]
    s = torch.arange(int(slots.max()), device=documents.device).expand(len(documents), -1)
    owner = torch.searchsorted(ends, s.contiguous(), right=True).clamp(max=documents.size(1) - 1)
    index = starts.gather(1, owner) + s - (ends - counts).gather(1, owner)
    none = s >= slots[:, None]
    return index.masked_fill(none, 0), slots, column.gather(1, owner).masked_fill(none, 0)
