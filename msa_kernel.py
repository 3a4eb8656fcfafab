"""The three operations of a memory layer: pooling, routing, sparse attention.

    pool_chunks         keys, values, routing keys of documents -> one of each per chunk
    route               a question's routing queries against every chunk's routing key -> a score per document
    sparse_attention    question tokens over [the chunks of their selected documents | their own causal past]

Each is a reference in PyTorch, which is the definition, and a Triton kernel with its backward, behind one function. CUDA tensors go
to Triton, others to PyTorch; MSA_KERNEL=torch or MSA_KERNEL=triton forces one (on a CPU, `triton` is its slow interpreter).

    B questions   T question tokens   M documents   L tokens of a document (padded)   C chunks   K documents selected
    S memory slots of a question (chunks of its selected documents)   N local tokens, the past's and the T   H query heads
    G key/value heads   D head size   W = G * D   R = H / G
"""
from __future__ import annotations  # `tl.constexpr` stays a word where triton is not installed

import os

import torch
import torch.nn.functional as F

from common import UserError

KERNEL = os.environ.get("MSA_KERNEL", "auto")
if KERNEL == "triton" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton looks at it when it is imported
try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton = None

jit = triton.jit if triton else lambda kernel: kernel
LOG2E = tl.constexpr(1.4426950408889634) if triton else None  # kernels may read a global only as a constexpr
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUTE_TILE = 2048     # chunks that the reference scores at a time: B * T * ROUTE_TILE * 4 bytes is its largest intermediate
PRECISION = "tf32x3"  # of float32 products on tensor cores: three TF32 products, within 1e-6 of float32


def use_triton(x):
    """Whether the kernels take over. Raises UserError where MSA_KERNEL asks for something that is not there."""
    if KERNEL not in ("auto", "torch", "triton"):
        raise UserError(f"MSA_KERNEL is {KERNEL!r}; it must be auto, torch or triton")
    if KERNEL == "triton" and not triton:
        raise UserError("MSA_KERNEL is triton, but triton is not installed; install it or set MSA_KERNEL=torch")
    return KERNEL == "triton" or KERNEL == "auto" and x.is_cuda and triton is not None


def check(name, x, shape, dtypes=FLOATS):
    """Refuse what a kernel would misread: raises ValueError. Kernels see an address and trust the rest."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}; a Triton kernel takes {', '.join(map(str, dtypes))} (MSA_KERNEL=torch takes all)")
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous, its strides are {x.stride()}; call .contiguous()")


def check_head_size(D):
    """Pooling and attention hold whole heads in registers: raises ValueError above 256."""
    if D > 256:
        raise ValueError(f"the head size is {D}; the Triton kernels take at most 256 (MSA_KERNEL=torch takes all)")


def power_of_two(n, low=16, high=1 << 30):
    """The least power of two that is at least n, between low and high: tiles have such sides, and tl.dot wants 16."""
    return min(max(low, 1 << max(n - 1, 0).bit_length()), high)


# ---------------------------------------------------------------------------------------------------------------------
# Pooling (section 3.2)

def chunk_offsets(lengths, chunk_size, last=0):
    """Where each document's chunks begin: (M,) token counts -> (M + 1,) int64, ceil(length / chunk_size) chunks each.

    last: so many tokens at a document's end (all of its tokens at most) have a chunk of their own.
    """
    chunks = (lengths - last + chunk_size - 1) // chunk_size + (last > 0)
    return F.pad(chunks.cumsum(0), (1, 0))


def chunk_owners(offsets, chunks):
    """The document of each of the `chunks` chunks: (M + 1,) offsets -> (C,) int64."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff(), output_size=chunks)


def ranges(starts, counts):
    """The numbers starts[i], starts[i] + 1, ... (counts[i] of them), for all i one after another."""
    ends = counts.cumsum(0)
    return torch.repeat_interleave(starts - ends + counts, counts) + torch.arange(int(counts.sum()), device=counts.device)


def pool_chunks(keys, values, routing_keys, lengths, chunk_size, last=0, normalize=True):
    """Means over each chunk's tokens (section 3.2); a last short chunk is averaged over what it has.

    keys, values, routing_keys: (M, L, G, D), right-padded; lengths: (M,) tokens of each document, at least 1; last: as for
    `chunk_offsets`. Returns three (C, G, D), documents one after another; routing keys are brought to unit length per head
    after pooling (Eq. 1), or left as they are without `normalize` (which has no kernel).
    """
    if use_triton(keys) and normalize:
        return Pool.apply(keys, values, routing_keys, *chunk_spans(lengths, keys.size(1), chunk_size, last))
    keys, values, routing_keys = (chunk_means(x, lengths, chunk_size, last) for x in (keys, values, routing_keys))
    return keys, values, F.normalize(routing_keys.float(), dim=-1).to(routing_keys.dtype) if normalize else routing_keys


def chunk_means(x, lengths, chunk_size, last=0):
    """(M, L, G, D) -> (C, G, D), the mean of each chunk's tokens."""
    if last:
        body, ends = chunk_means(x, lengths - last, chunk_size), chunk_offsets(lengths, chunk_size, last)[1:] - 1
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


def chunk_spans(lengths, width, chunk_size, last):
    """Which of the M * `width` padded tokens each chunk holds: first (C,) int64 and count (C,) int32."""
    offsets = chunk_offsets(lengths, chunk_size, last)
    owner = chunk_owners(offsets, int(offsets[-1]))
    nth, body = torch.arange(len(owner), device=owner.device) - offsets[owner], (lengths - last)[owner]
    closing = (nth == offsets.diff()[owner] - 1) & (last > 0)
    first = torch.where(closing, body, nth * chunk_size)
    end = torch.where(closing, lengths[owner], torch.minimum(first + chunk_size, body))
    return owner * width + first, (end - first).int()


@jit
def chunk_mean(x_ptr, first, count, g, d, G, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mean of `count` tokens of head g: (BLOCK_D,) fp32."""
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        at = ((first + l) * G + g)[:, None] * D + d[None, :]
        total += tl.sum(tl.load(x_ptr + at, mask=(l < count)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32), 0)
    return total / count


@jit
def pool_forward(
    keys_ptr, values_ptr, routing_ptr,          # (M * L, G, D)
    first_ptr, count_ptr,                       # (C,)
    pooled_keys_ptr, pooled_values_ptr, unit_ptr,  # (C, G, D)
    norm_ptr,                                   # (C, G) fp32: what unit was divided by
    G, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (c, g): one head of one chunk. For each of the three inputs: for BLOCK_L tokens at a time: add; divide; store.

    Every input is read once, every output written once; nothing is padded. Tile: (BLOCK_L tokens, BLOCK_D >= D).
    """
    c, g, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    first, count = tl.load(first_ptr + c), tl.load(count_ptr + c)
    at = (c * G + g) * D + d
    key = chunk_mean(keys_ptr, first, count, g, d, G, D, BLOCK_L, BLOCK_D)
    tl.store(pooled_keys_ptr + at, key, mask=d < D)
    value = chunk_mean(values_ptr, first, count, g, d, G, D, BLOCK_L, BLOCK_D)
    tl.store(pooled_values_ptr + at, value, mask=d < D)
    routing = chunk_mean(routing_ptr, first, count, g, d, G, D, BLOCK_L, BLOCK_D)
    norm = tl.maximum(tl.sqrt(tl.sum(routing * routing, 0)), 1e-12)  # as F.normalize
    tl.store(unit_ptr + at, routing / norm, mask=d < D)
    tl.store(norm_ptr + c * G + g, norm)


@jit
def spread(x_ptr, gradient, first, count, g, d, G, D, BLOCK_L: tl.constexpr):
    """Each of a chunk's tokens gets the same share of the mean's gradient."""
    for start in range(0, count, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        at = ((first + l) * G + g)[:, None] * D + d[None, :]
        tl.store(x_ptr + at, tl.broadcast_to((gradient / count)[None, :], at.shape), mask=(l < count)[:, None] & (d < D)[None, :])


@jit
def pool_backward(
    d_pooled_keys_ptr, d_pooled_values_ptr, d_unit_ptr,  # (C, G, D)
    unit_ptr, norm_ptr, first_ptr, count_ptr,   # as in pool_forward
    d_keys_ptr, d_values_ptr, d_routing_ptr,    # (M * L, G, D), zero where there is padding
    G, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (c, g), as in pool_forward. Through u = r / |r|: dr = (du - u <u, du>) / |r|."""
    c, g, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    first, count = tl.load(first_ptr + c), tl.load(count_ptr + c)
    at = (c * G + g) * D + d
    spread(d_keys_ptr, tl.load(d_pooled_keys_ptr + at, mask=d < D, other=0.0).to(tl.float32), first, count, g, d, G, D, BLOCK_L)
    spread(d_values_ptr, tl.load(d_pooled_values_ptr + at, mask=d < D, other=0.0).to(tl.float32), first, count, g, d, G, D, BLOCK_L)
    unit = tl.load(unit_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    d_unit = tl.load(d_unit_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    d_routing = (d_unit - unit * tl.sum(unit * d_unit, 0)) / tl.load(norm_ptr + c * G + g)
    spread(d_routing_ptr, d_routing, first, count, g, d, G, D, BLOCK_L)


class Pool(torch.autograd.Function):
    """Launches of pool_forward and pool_backward."""

    @staticmethod
    def forward(ctx, keys, values, routing_keys, first, count):
        M, L, G, D = keys.shape
        check_head_size(D)
        for name, x in (("keys", keys), ("values", values), ("routing_keys", routing_keys)):
            check(name, x, (M, L, G, D))
        pooled = [x.new_empty(len(first), G, D) for x in (keys, values, routing_keys)]
        norm = torch.empty(len(first), G, device=keys.device)
        pool_forward[len(first), G](keys, values, routing_keys, first, count, *pooled, norm, G, D, **Pool.tiles(D))
        ctx.save_for_backward(pooled[2], norm, first, count)
        ctx.inputs = [(x.shape, x.dtype) for x in (keys, values, routing_keys)]
        return tuple(pooled)

    @staticmethod
    def backward(ctx, *gradients):
        unit, norm, first, count = ctx.saved_tensors
        C, G, D = unit.shape
        found = [torch.zeros(shape, dtype=dtype, device=unit.device) for shape, dtype in ctx.inputs]
        pool_backward[C, G](*(x.contiguous() for x in gradients), unit, norm, first, count, *found, G, D, **Pool.tiles(D))
        return *found, None, None

    @staticmethod
    def tiles(D):
        return dict(BLOCK_L=max(1, 2048 // power_of_two(D)), BLOCK_D=power_of_two(D), num_warps=4)


# ---------------------------------------------------------------------------------------------------------------------
# Routing (section 3.2, Eq. 2)

def group_queries(routing_query, kv_heads, normalize=True):
    """L2-normalise routing queries per head, sum them within each KV group, divide by H: (B, T, H, D) -> (B, T, G * D).

    Heads are averaged before anything else and the query heads of a group share a key, so that the mean over heads of the
    cosine is one inner product: <(1 / H) * sum of the group's queries, key>. The sum is not normalised again. Without `normalize`
    queries keep their length.
    """
    B, T, H, D = routing_query.shape
    unit = F.normalize(routing_query.float(), dim=-1) if normalize else routing_query.float()
    return unit.view(B, T, kv_heads, H // kv_heads, D).sum(3).flatten(2) / H


def quantize(routing_keys):
    """(C, G, D) -> (int8 of the same shape, scales (C,) fp32): one scale per chunk, |error| <= scale / 2 in each number."""
    scales = routing_keys.float().abs().amax((1, 2)).clamp(min=1e-12) / 127
    return (routing_keys / scales[:, None, None]).round().to(torch.int8), scales


def route(query, mask, routing_keys, offsets, scales=None):
    """Document scores (section 3.2, Eq. 2): mean over heads of the cosine, max over tokens, max over chunks.

    query: (B, T, G * D) fp32 from `group_queries`; mask: (B, T) bool, the tokens that route; routing_keys: (C, G, D), unit
    length per head, fp32, bf16, fp16, or int8 with scales (C,) fp32 from `quantize`; offsets: (M + 1,). Returns (B, M) fp32; -inf
    for a question without routing tokens. Nothing of size tokens x chunks is stored.
    A chunk's score does not depend, even in its last bit, on where it lies: equal documents tie. (The gradient of a tie within a
    document goes to the first of the kernels' tokens and chunks; the reference shares it out.)
    The kernels round the query to the keys' 16 bits, or to bf16 for int8 keys, and sum in fp32; the reference keeps it in fp32.
    """
    if use_triton(query):
        winners = torch.is_grad_enabled() and (query.requires_grad or routing_keys.requires_grad)
        return Route.apply(query, mask, routing_keys, offsets, scales, winners)
    tile = 64 if torch.is_grad_enabled() else ROUTE_TILE  # in training a pool has few chunks
    return document_max(chunk_scores(query, mask, routing_keys.flatten(1), scales, tile), offsets)


def reduce_tokens(scores, blind, dim):
    """A question's tokens become one score: the best of those that route (section 3.2), -inf where none does.

    scores: with the tokens along `dim`; blind: tokens that do not route, broadcast to scores, or None. Training, banks and their second
    look come here; the kernel `route_chunks` has the same in its loop, and the tests of the kernels fail where they differ.
    """
    return (scores if blind is None else scores.masked_fill(blind, float("-inf"))).amax(dim)


def chunk_scores(query, mask, keys, scales, tile):
    """The reference's chunk scores: (B, T, W), (B, T), (C, W) -> (B, C), in padded tiles of `tile` chunks."""
    (B, T, W), best = query.shape, []
    queries, blind = query.reshape(B * T, W).T, None if mask.all() else ~mask
    with torch.autocast(query.device.type, enabled=False):  # scores stay float32
        for start in range(0, max(len(keys), 1), tile):
            part = keys[start:start + tile].float()
            part = part if len(part) == tile else F.pad(part, (0, 0, 0, tile - len(part)))
            scores = (part @ queries).view(tile, B, T)                                  # keys first: the faster order on a CPU
            best.append(reduce_tokens(scores, blind, 2))
    best = torch.cat(best)[:len(keys)].T                                                # (B, C)
    return best if scales is None else best * scales


def document_max(best, offsets):
    """The best of each document's chunks: (B, C) -> (B, M)."""
    documents, chunks = len(offsets) - 1, best.size(1)
    if documents == chunks:                                                             # one chunk each
        return best
    if best.is_cpu:                                                                     # much the faster there
        return torch.segment_reduce(best.T.contiguous(), "max", offsets=offsets, axis=0).T
    empty = best.new_full((len(best), documents), float("-inf"))
    return empty.scatter_reduce(1, chunk_owners(offsets, chunks).expand(len(best), -1), best, "amax")


@torch.no_grad()
def select_documents(query, mask, routing_keys, offsets, top_k, scales=None, alive=None, unit=True):
    """The first top_k of `route`'s ranking, without gradients: indices (B, top_k) int64, scores (B, top_k), as `top_documents`.

    alive: optional (M,) bool; the others are not found. unit: routing keys have unit length per head.

    Some CPUs multiply bf16 at more than twice the rate of fp32, but round the score to bf16 as well as what is multiplied. How far this
    moves a score is known: by the length of the query's rounding error, summed over groups (keys have unit length), by 2^-9 of the query's
    own where keys are rounded, and by half a unit in the score's last place. Documents that could still be among the first k by their
    rough scores are scored again in fp32: the result is exact.
    """
    if not (query.is_cpu and unit) or use_triton(query) or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        scores = route(query, mask, routing_keys, offsets, scales)
        return top_documents(scores if alive is None else scores.masked_fill(~alive, float("-inf")), top_k)
    (B, T, W), (_, G, D), rough = query.shape, routing_keys.shape, []
    queries, blind = query.reshape(B * T, W).bfloat16(), None if mask.all() else ~mask[:, :, None]
    for part in routing_keys.flatten(1).split(8 * ROUTE_TILE // max(routing_keys.element_size(), 2)):
        scores = (queries @ part.bfloat16().T).view(B, T, -1)                           # int8 is exact in bf16
        rough.append(reduce_tokens(scores, blind, 1))
    rough = torch.cat(rough, 1).float()
    rough = document_max(rough if scales is None else rough * scales, offsets)          # (B, M)
    rough = rough if alive is None else rough.masked_fill(~alive, float("-inf"))
    kth = rough.topk(min(top_k, rough.size(1)), sorted=False).values.amin(1, keepdim=True)
    length = lambda x: x.unflatten(2, (G, D)).norm(dim=3).sum(2).amax(1, keepdim=True)
    error = length(query - queries.view(B, T, W)) + 2 ** -9 * length(query) * (routing_keys.dtype not in (torch.bfloat16, torch.int8))
    margin = 1.1 * (2 * error + 2 ** -8 * kth.abs().nan_to_num(posinf=0))               # twice: the k-th score may be off as well
    kept = ((rough >= kth - margin) & (rough > float("-inf"))).any(0).nonzero().squeeze(1)
    counts = offsets.diff()[kept]
    rows = ranges(offsets[kept], counts)
    exact = chunk_scores(query, mask, routing_keys[rows].flatten(1), None if scales is None else scales[rows], tile=64)
    documents, scores = top_documents(document_max(exact, F.pad(counts.cumsum(0), (1, 0))), top_k)
    return torch.cat([kept, kept.new_tensor([-1])])[documents], scores                  # -1 stays -1


@jit
def route_chunks(
    query_ptr, mask_ptr,                        # (B, T, W) in the type of the products, (B, T) bool as int8
    keys_ptr, scales_ptr,                       # (C, W); (C,) fp32, with INT8 only
    best_ptr, token_ptr,                        # (B, C) fp32; (B, C) int32, with WINNERS only
    T, C, W,
    INT8: tl.constexpr, WINNERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Program (b, i): question b against the i-th BLOCK_C chunks.

        for BLOCK_T tokens at a time:       once, where the question is no longer than BLOCK_T
            for BLOCK_W of the width:       scores (BLOCK_T, BLOCK_C) += query (BLOCK_T, BLOCK_W) @ keys (BLOCK_C, BLOCK_W)^T
            best (BLOCK_C,) = max(best, max over tokens of scores)

    b counts fastest, so that the questions of a batch find the tile in the L2 cache: memory is read once.
    """
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    best, winner = tl.full([BLOCK_C], float("-inf"), tl.float32), tl.full([BLOCK_C], -1, tl.int32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        scores = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for w0 in range(0, W, BLOCK_W):
            w = w0 + tl.arange(0, BLOCK_W)
            query = tl.load(query_ptr + (b * T + t)[:, None] * W + w[None, :], mask=(t < T)[:, None] & (w < W)[None, :], other=0.0)
            keys = tl.load(keys_ptr + c[:, None] * W + w[None, :], mask=(c < C)[:, None] & (w < W)[None, :], other=0)
            scores = tl.dot(query, tl.trans(keys.to(query.dtype)), scores, input_precision=PRECISION)
        routes = tl.load(mask_ptr + b * T + t, mask=t < T, other=0) != 0
        scores = tl.where(routes[:, None], scores, float("-inf"))
        top = tl.max(scores, 0)
        if WINNERS:
            winner = tl.where(top > best, start + tl.argmax(scores, 0), winner)
        best = tl.maximum(best, top)
    if INT8:
        best = best * tl.load(scales_ptr + c, mask=c < C, other=1.0)
    tl.store(best_ptr + b * C + c, best, mask=c < C)
    if WINNERS:
        tl.store(token_ptr + b * C + c, winner, mask=c < C)


@jit
def route_documents(
    best_ptr, token_ptr, offsets_ptr,           # (B, C), (B, C), (M + 1,)
    scores_ptr, document_token_ptr, document_chunk_ptr,  # (B, M) fp32; (B, M) int32, with WINNERS only
    C, M, WINNERS: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Program (b, i): for the first, second, ... chunk of each of BLOCK_M documents: score = max(score, best)."""
    b, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    start, end = tl.load(offsets_ptr + m, mask=m < M, other=0), tl.load(offsets_ptr + m + 1, mask=m < M, other=0)
    score, chunk = tl.full([BLOCK_M], float("-inf"), tl.float32), start
    for i in range(0, tl.max(end - start, 0).to(tl.int32)):
        best = tl.load(best_ptr + b * C + start + i, mask=start + i < end, other=float("-inf"))
        chunk = tl.where(best > score, start + i, chunk)
        score = tl.maximum(score, best)
    tl.store(scores_ptr + b * M + m, score, mask=m < M)
    if WINNERS:
        token = tl.load(token_ptr + b * C + chunk, mask=(m < M) & (score > float("-inf")), other=-1)  # -1: nothing routed
        tl.store(document_token_ptr + b * M + m, token, mask=m < M)
        tl.store(document_chunk_ptr + b * M + m, chunk.to(tl.int32), mask=m < M)


@jit
def route_backward_query(
    d_scores_ptr, token_ptr, chunk_ptr,         # (B, M)
    keys_ptr, d_query_ptr,                      # (C, W), (B, T, W) fp32
    T, M, W, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Program (t, b, i): d_query = sum over the documents that token t won of d_score * the chunk that won; BLOCK_W numbers of it."""
    t, b, w = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros([BLOCK_W], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        won = tl.load(token_ptr + b * M + m, mask=m < M, other=-1) == t
        d_score = tl.load(d_scores_ptr + b * M + m, mask=won, other=0.0)
        chunk = tl.load(chunk_ptr + b * M + m, mask=won, other=0).to(tl.int64)
        keys = tl.load(keys_ptr + chunk[:, None] * W + w[None, :], mask=won[:, None] & (w < W)[None, :], other=0.0)
        total += tl.sum(d_score[:, None] * keys.to(tl.float32), 0)
    tl.store(d_query_ptr + (b * T + t) * W + w, total, mask=w < W)


@jit
def route_backward_keys(
    d_scores_ptr, token_ptr, chunk_ptr,         # (B, M)
    owner_ptr, query_ptr, d_keys_ptr,           # (C,) int64, (B, T, W), (C, W)
    B, T, M, W, BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr,
):
    """Program (c, i): d_key = sum over the questions for which chunk c won its document of d_score * the token that won."""
    c, w = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m, total = tl.load(owner_ptr + c), tl.zeros([BLOCK_W], tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
        token = tl.load(token_ptr + b * M + m, mask=b < B, other=-1)
        won = (token >= 0) & (tl.load(chunk_ptr + b * M + m, mask=b < B, other=-1) == c)
        d_score = tl.load(d_scores_ptr + b * M + m, mask=won, other=0.0)
        query = tl.load(query_ptr + (b * T + token)[:, None] * W + w[None, :], mask=won[:, None] & (w < W)[None, :], other=0.0)
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
        products = (torch.bfloat16 if query.is_cuda else torch.float32) if int8 else routing_keys.dtype  # the interpreter has no bfloat16
        if int8 and winners:
            raise ValueError("int8 routing keys are for questions, they have no gradient; use torch.no_grad()")
        best = torch.empty(B, C, device=device)
        token = torch.empty(B, C, dtype=torch.int32, device=device) if winners else best
        query = query.to(products)
        tiles = Route.tiles(T, W, routing_keys.element_size())
        route_chunks[B, triton.cdiv(C, tiles["BLOCK_C"])](
            query, mask.view(torch.int8), routing_keys, scales if int8 else best, best, token, T, C, W, int8, winners, PRECISION, **tiles)
        scores = best
        if M < C or winners:  # else one chunk each: nothing is left to do
            scores = torch.empty(B, M, device=device)
            found = torch.empty(2, B, M, dtype=torch.int32, device=device) if winners else (scores, scores)
            route_documents[B, triton.cdiv(M, 256)](best, token, offsets, scores, *found, C, M, winners, BLOCK_M=256)
            if winners:
                ctx.save_for_backward(query, routing_keys, offsets, *found)
        return scores

    @staticmethod
    def backward(ctx, d_scores):
        query, keys, offsets, token, chunk = ctx.saved_tensors
        (B, T, W), C, M = query.shape, len(keys), d_scores.size(1)
        d_scores, d_query, d_keys = d_scores.contiguous(), None, None
        block = power_of_two(W, high=128)
        if ctx.needs_input_grad[0]:
            d_query = torch.empty(B, T, W, device=query.device)
            route_backward_query[T, B, triton.cdiv(W, block)](d_scores, token, chunk, keys, d_query, T, M, W, BLOCK_M=32, BLOCK_W=block)
        if ctx.needs_input_grad[2]:
            d_keys = torch.empty_like(keys)
            route_backward_keys[C, triton.cdiv(W, block)](
                d_scores, token, chunk, chunk_owners(offsets, C), query, d_keys, B, T, M, W, BLOCK_B=16, BLOCK_W=block)
        return d_query, None, d_keys, None, None, None

    @staticmethod
    def tiles(T, W, size):
        """The largest that neither spill nor leave the memory idle (tests/compile_kernels.py): 8 to 32 KB of keys are on their way."""
        block_t = power_of_two(T, high=64)
        block_w = 64 if size == 2 or size == 1 and block_t < 64 else 32
        return dict(BLOCK_T=block_t, BLOCK_C=64 if size == 4 else 128, BLOCK_W=min(block_w, power_of_two(W)), num_warps=8,
                    num_stages=3 if size == 4 else 4)


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


# ---------------------------------------------------------------------------------------------------------------------
# Sparse attention (section 3.3)

def sparse_attention(query, keys, values, memory_keys=None, memory_values=None, index=None, slots=None, prefix_length=0, bias=None):
    """A question's attention (section 3.3): [the chunks of its selected documents | its own causal past].

    query: (B, T, H, D), the last T of N tokens; keys, values: (B, N, G, D), local; memory_keys, memory_values: (C', G, D), read in
    place; index: (B, S) int64 rows of these, of which the first slots[b] count, each row once. The first `prefix_length` of the
    N tokens do not see the memory. bias: optional (B, S) fp32, added to the memory's logits, alike in all heads; it gets no gradient from
    the kernels. Returns (B, T, H, D). Gradients of memory rows that several questions selected are summed (by the kernels in
    fp32 and in no fixed order).
    """
    T, past = query.size(1), keys.size(1) - query.size(1)
    if index is None or index.size(1) == 0:
        index = bias = None
        if past == 0 or T == 1:  # the fast path: no mask in memory
            q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True).transpose(1, 2)
    if use_triton(query):
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype  # as autocast treats SDPA
        query, keys, values = (x.to(dtype) for x in (query, keys, values))
        return Attend.apply(query, keys, values, memory_keys, memory_values, index, slots, prefix_length, bias)
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    position = torch.arange(past, past + T, device=q.device)[:, None]                   # (T, 1) among the N tokens
    mask = (position >= torch.arange(past + T, device=q.device)).expand(len(q), -1, -1)  # (B, T, N)
    if index is not None:
        visible = torch.arange(index.size(1), device=q.device) < slots[:, None]         # (B, S)
        mask = torch.cat([visible[:, None] & (position >= prefix_length), mask], 2)     # (B, T, S + N)
        k = torch.cat([memory_keys[index].to(k.dtype).transpose(1, 2), k], 2)
        v = torch.cat([memory_values[index].to(v.dtype).transpose(1, 2), v], 2)
        if bias is not None:
            added = F.pad(bias.to(q.dtype), (0, mask.size(2) - bias.size(1)))[:, None]  # (B, 1, S + N)
            mask = added.expand_as(mask).masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True).transpose(1, 2)


# In the kernels, the R query heads that share a key are rows of one tile: row r is token r // R, head g * R + r % R. A key is loaded
# once for all of them, and a single token of decoding still fills R rows. Logits are in powers of two: exp2 is one instruction.

@jit
def query_rows(r, b, g, T, G, R: tl.constexpr):
    """Where rows r of question b and group g lie in (B, T, H)."""
    return ((b * T + r // R) * G + g) * R + r % R


@jit
def memory_slots(index_ptr, bias_ptr, b, s, count, S, BIAS: tl.constexpr):
    """Rows of the memory that slots s point at, and what is added to their logits: -inf beyond the question's count."""
    row = tl.load(index_ptr + b * S + s, mask=s < count, other=0)
    added = tl.where(s < count, 0.0, float("-inf"))
    if BIAS:
        added += tl.load(bias_ptr + b * S + s, mask=s < count, other=0.0) * LOG2E
    return row, added


@jit
def load_rows(x_ptr, row, exists, d, D):
    """Rows of (., D): a tile (rows, BLOCK_D), zero where there is nothing."""
    return tl.load(x_ptr + row[:, None] * D + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)


@jit
def memory_tile(
    query, place, memory_keys_ptr, memory_values_ptr, index_ptr, bias_ptr, b, g, s, d, count, S, prefix_length, G, D, scale,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Keys and values of memory slots s, gathered through the index, and the logits of rows at `place`: -inf where they do not see them."""
    at, added = memory_slots(index_ptr, bias_ptr, b, s, count, S, BIAS)
    keys = load_rows(memory_keys_ptr, at * G + g, s < count, d, D).to(query.dtype)
    values = load_rows(memory_values_ptr, at * G + g, s < count, d, D).to(query.dtype)
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E) + added[None, :]
    return keys, values, tl.where((place >= prefix_length)[:, None], logits, float("-inf"))


@jit
def local_tile(query, place, keys_ptr, values_ptr, b, g, n, d, N, G, D, scale, PRECISION: tl.constexpr):
    """Keys and values of local tokens n, and the logits of rows at `place`: -inf for what comes after them."""
    keys = load_rows(keys_ptr, (b * N + n) * G + g, n < N, d, D)
    values = load_rows(values_ptr, (b * N + n) * G + g, n < N, d, D)
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
    return keys, values, tl.where(n[None, :] <= place[:, None], logits, float("-inf"))


@jit
def softmax_step(logits, values, top, total, output, PRECISION: tl.constexpr):
    """One more tile of keys in the running softmax: row maxima, sums and outputs, rescaled when the maximum grows."""
    new = tl.maximum(top, tl.max(logits, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p, shrink = tl.exp2(logits - finite[:, None]), tl.exp2(top - finite)
    output = tl.dot(p.to(values.dtype), values, output * shrink[:, None], input_precision=PRECISION)
    return new, total * shrink + tl.sum(p, 1), output


@jit
def attend_forward(
    query_ptr, keys_ptr, values_ptr,            # (B, T, H, D), (B, N, G, D), (B, N, G, D)
    memory_keys_ptr, memory_values_ptr,         # (C', G, D), any type
    index_ptr, slots_ptr, bias_ptr,             # (B, S) int64, (B,) int64, (B, S) fp32
    output_ptr, lse_ptr,                        # (B, T, H, D), (B, T, H) fp32: log2 of the softmax's sum, for the backward
    T, N, S, prefix_length, G, D, scale,        # scale: 1 / sqrt(D)
    R: tl.constexpr, MEMORY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (i, b, g): the i-th BLOCK_R rows (tokens x heads of the group) of a question.

        for BLOCK_N slots of the question's memory at a time:  gather their keys and values through the index; softmax_step
        for BLOCK_N local tokens, up to the rows' last token:   softmax_step, causal
    """
    tile, b, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    r, d = tile * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    exists, row, place = r < T * R, query_rows(r, b, g, T, G, R), N - T + r // R
    query = load_rows(query_ptr, row, exists, d, D)
    top, total = tl.full([BLOCK_R], float("-inf"), tl.float32), tl.zeros([BLOCK_R], tl.float32)
    output = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if MEMORY:
        count = tl.load(slots_ptr + b).to(tl.int32)
        for s0 in range(0, count, BLOCK_N):
            _, values, logits = memory_tile(query, place, memory_keys_ptr, memory_values_ptr, index_ptr, bias_ptr, b, g,
                                            s0 + tl.arange(0, BLOCK_N), d, count, S, prefix_length, G, D, scale, BIAS, PRECISION)
            top, total, output = softmax_step(logits, values, top, total, output, PRECISION)
    for n0 in range(0, tl.minimum(N, N - T + (tile * BLOCK_R + BLOCK_R - 1) // R + 1), BLOCK_N):
        _, values, logits = local_tile(query, place, keys_ptr, values_ptr, b, g, n0 + tl.arange(0, BLOCK_N), d, N, G, D, scale, PRECISION)
        top, total, output = softmax_step(logits, values, top, total, output, PRECISION)
    tl.store(output_ptr + row[:, None] * D + d[None, :], output / total[:, None], mask=exists[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + row, top + tl.log2(total), mask=exists)


@jit
def query_step(logits, keys, values, d_output, lse, delta, d_query, PRECISION: tl.constexpr):
    """One more tile of keys in the query's gradient: + d_logits @ keys, where d_logits = p * (d_output @ values^T - delta)."""
    d_logits = tl.exp2(logits - lse[:, None]) * (tl.dot(d_output, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    return tl.dot(d_logits.to(keys.dtype), keys, d_query, input_precision=PRECISION)


@jit
def attend_backward_query(
    query_ptr, keys_ptr, values_ptr, memory_keys_ptr, memory_values_ptr, index_ptr, slots_ptr, bias_ptr,  # as in attend_forward
    d_output_ptr, lse_ptr, delta_ptr,           # (B, T, H, D), (B, T, H), (B, T, H): <d_output, output>
    d_query_ptr,                                # (B, T, H, D)
    T, N, S, prefix_length, G, D, scale,
    R: tl.constexpr, MEMORY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (i, b, g), the loops of attend_forward with query_step in the place of softmax_step."""
    tile, b, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    r, d = tile * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    exists, row, place = r < T * R, query_rows(r, b, g, T, G, R), N - T + r // R
    query, d_output = load_rows(query_ptr, row, exists, d, D), load_rows(d_output_ptr, row, exists, d, D)
    lse, delta = tl.load(lse_ptr + row, mask=exists, other=0.0), tl.load(delta_ptr + row, mask=exists, other=0.0)
    d_query = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if MEMORY:
        count = tl.load(slots_ptr + b).to(tl.int32)
        for s0 in range(0, count, BLOCK_N):
            keys, values, logits = memory_tile(query, place, memory_keys_ptr, memory_values_ptr, index_ptr, bias_ptr, b, g,
                                               s0 + tl.arange(0, BLOCK_N), d, count, S, prefix_length, G, D, scale, BIAS, PRECISION)
            d_query = query_step(logits, keys, values, d_output, lse, delta, d_query, PRECISION)
    for n0 in range(0, tl.minimum(N, N - T + (tile * BLOCK_R + BLOCK_R - 1) // R + 1), BLOCK_N):
        keys, values, logits = local_tile(query, place, keys_ptr, values_ptr, b, g,
                                          n0 + tl.arange(0, BLOCK_N), d, N, G, D, scale, PRECISION)
        d_query = query_step(logits, keys, values, d_output, lse, delta, d_query, PRECISION)
    d_query *= scale
    tl.store(d_query_ptr + row[:, None] * D + d[None, :], d_query, mask=exists[:, None] & (d < D)[None, :])


@jit
def attend_backward_keys(
    query_ptr, keys_ptr, values_ptr, index_ptr, slots_ptr, bias_ptr,  # keys, values: (C', G, D) with MEMORY, else (B, N, G, D)
    d_output_ptr, lse_ptr, delta_ptr,           # as in attend_backward_query
    d_keys_ptr, d_values_ptr,                   # as keys, values; with MEMORY fp32, to which is added
    T, N, S, prefix_length, G, D, scale,
    R: tl.constexpr, MEMORY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (i, b, g): the i-th BLOCK_N memory slots of a question, or without MEMORY its i-th BLOCK_N local tokens.

        for BLOCK_R rows that may see them at a time:   d_values += p^T @ d_output; d_keys += d_logits^T @ query

    Other questions may have selected the same chunks: their gradients meet in atomic additions.
    """
    tile, b, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    n, d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if MEMORY:
        count = tl.load(slots_ptr + b).to(tl.int32)
        at, added = memory_slots(index_ptr, bias_ptr, b, n, count, S, BIAS)
        at, seen_from = at * G + g, tl.zeros([BLOCK_N], tl.int32) + prefix_length
        first, end = 0, tl.where(tile * BLOCK_N < count, T * R, 0)
    else:
        count, at, seen_from, added = N, (b * N + n) * G + g, n, tl.zeros([BLOCK_N], tl.float32)
        first, end = tl.maximum(tile * BLOCK_N - (N - T), 0) * R // BLOCK_R * BLOCK_R, T * R
    query_type = query_ptr.dtype.element_ty
    keys, values = load_rows(keys_ptr, at, n < count, d, D).to(query_type), load_rows(values_ptr, at, n < count, d, D).to(query_type)
    d_keys, d_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for r0 in range(first, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        exists, row, place = r < T * R, query_rows(r, b, g, T, G, R), N - T + r // R
        query, d_output = load_rows(query_ptr, row, exists, d, D), load_rows(d_output_ptr, row, exists, d, D)
        lse, delta = tl.load(lse_ptr + row, mask=exists, other=0.0), tl.load(delta_ptr + row, mask=exists, other=0.0)
        logits = tl.dot(keys, tl.trans(query), input_precision=PRECISION) * (scale * LOG2E) + added[:, None]  # (BLOCK_N, BLOCK_R)
        seen = (seen_from[:, None] <= place[None, :]) & exists[None, :]
        p = tl.where(seen, tl.exp2(logits - lse[None, :]), 0.0)
        d_values = tl.dot(p.to(query_type), d_output, d_values, input_precision=PRECISION)
        d_logits = p * (tl.dot(values, tl.trans(d_output), input_precision=PRECISION) - delta[None, :])
        d_keys = tl.dot(d_logits.to(query_type), query, d_keys, input_precision=PRECISION)
    d_keys *= scale
    to, inside = at[:, None] * D + d[None, :], (n < count)[:, None] & (d < D)[None, :]
    if MEMORY:
        tl.atomic_add(d_keys_ptr + to, d_keys, mask=inside, sem="relaxed")
        tl.atomic_add(d_values_ptr + to, d_values, mask=inside, sem="relaxed")
    else:
        tl.store(d_keys_ptr + to, d_keys, mask=inside)
        tl.store(d_values_ptr + to, d_values, mask=inside)


class Attend(torch.autograd.Function):
    """Launches of the attention kernels."""

    @staticmethod
    def forward(ctx, query, keys, values, memory_keys, memory_values, index, slots, prefix_length, bias):
        (B, T, H, D), (_, N, G, _) = query.shape, keys.shape
        if H % G or N < T:
            raise ValueError(f"query has {H} heads and {T} tokens, keys {G} and {N}; heads must be a multiple, tokens no more")
        check_head_size(D)
        check("query", query, (B, T, H, D))
        check("keys", keys, (B, N, G, D), (query.dtype,))
        check("values", values, (B, N, G, D), (query.dtype,))
        memory = index is not None
        if memory:
            for name, x in (("memory_keys", memory_keys), ("memory_values", memory_values)):
                check(name, x, (len(memory_keys), G, D))
            index, slots = index.contiguous(), slots.contiguous()
            check("index", index, (B, index.size(-1)), (torch.int64,))
            check("slots", slots, (B,), (torch.int64,))
        if bias is not None:
            bias = bias.contiguous()
            check("bias", bias, index.shape, (torch.float32,))
        S = index.size(1) if memory else 0
        tensors = (query, keys, values, memory_keys, memory_values, index, slots, bias)
        tensors = [query if x is None else x for x in tensors]  # in the place of None: an address that is not read
        sizes, options = (T, N, S, prefix_length, G, D, D ** -0.5), (H // G, memory, bias is not None, PRECISION)
        output, lse = torch.empty_like(query), torch.empty(B, T, H, device=query.device)
        tiles = Attend.tiles(T * H // G, D, query.element_size())
        attend_forward[triton.cdiv(T * H // G, tiles["BLOCK_R"]), B, G](*tensors, output, lse, *sizes, *options, **tiles)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*tensors, output, lse)
            ctx.sizes, ctx.options = sizes, options
        return output

    @staticmethod
    def backward(ctx, d_output):
        *tensors, output, lse = ctx.saved_tensors
        query, keys, values, memory_keys, memory_values, *selection = tensors
        (T, N, S, _, G, D, _), (R, memory, bias, _) = ctx.sizes, ctx.options
        d_output, delta = d_output.contiguous(), (d_output.float() * output).sum(-1)
        d_query, d_keys, d_values = (torch.empty_like(x) for x in (query, keys, values))
        tiles, B = Attend.backward_tiles(T * R, D, query.element_size()), len(query)
        attend_backward_query[triton.cdiv(T * R, tiles["BLOCK_R"]), B, G](
            *tensors, d_output, lse, delta, d_query, *ctx.sizes, *ctx.options, **tiles)
        attend_backward_keys[triton.cdiv(N, tiles["BLOCK_N"]), B, G](
            query, keys, values, *selection, d_output, lse, delta, d_keys, d_values, *ctx.sizes, R, False, False, PRECISION, **tiles)
        if not (memory and any(ctx.needs_input_grad[3:5])):
            return d_query, d_keys, d_values, *[None] * 6
        d_memory = [torch.zeros(x.shape, device=x.device) for x in (memory_keys, memory_values)]
        attend_backward_keys[triton.cdiv(S, tiles["BLOCK_N"]), B, G](
            query, memory_keys, memory_values, *selection, d_output, lse, delta, *d_memory, *ctx.sizes, R, True, bias, PRECISION, **tiles)
        return d_query, d_keys, d_values, *(x.to(like.dtype) for x, like in zip(d_memory, (memory_keys, memory_values))), *[None] * 4

    @staticmethod
    def tiles(rows, D, size):
        """The largest that do not spill (tests/compile_kernels.py). The three TF32 products of float32 take many registers."""
        small = power_of_two(D) * size > (128 if size == 4 else 256)
        return dict(BLOCK_R=power_of_two(rows, high=16 if small else 64), BLOCK_N=32 if small or size == 4 else 64,
                    BLOCK_D=power_of_two(D), num_warps=4, num_stages=2)

    @staticmethod
    def backward_tiles(rows, D, size):
        small, large = power_of_two(D) * size > 256, size == 2
        return dict(BLOCK_R=power_of_two(rows, high=64 if large and not small else 16), BLOCK_N=16 if small else 64 if large else 32,
                    BLOCK_D=power_of_two(D), num_warps=8 if large and not small else 4, num_stages=2)
