"""Pooling and sparse attention, two of the three operations of a memory layer; routing.py has the third.

    pool_chunks         keys, values, routing keys of documents -> one of each per chunk
    sparse_attention    question tokens over [the chunks of their selected documents | their own causal past]
    attend_rows         the same of questions of any lengths, whose keys lie in a cache; without gradients

Each is a reference in PyTorch, which is the definition, and a Triton kernel with its backward, behind one
function. CUDA tensors go to Triton, others to PyTorch; MSA_KERNEL=torch or MSA_KERNEL=triton forces one (on a
CPU, `triton` is its slow interpreter).

    B questions   T question tokens   M documents   L tokens of a document, padded   C chunks
    S memory slots of a question (chunks of its selected documents)   N local tokens, the past's and the T
    H query heads   G key/value heads   D head size   R = H / G
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

# Counts that differ from call to call: Triton would compile anew for those that are 1, or 16 times something
COUNTS = ("B", "T", "N", "S", "M", "C", "prefix_length")
jit = triton.jit(do_not_specialize=COUNTS) if triton else lambda kernel: kernel
LOG2E = tl.constexpr(1.4426950408889634) if triton else None  # kernels may read a global only as a constexpr
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256  # of pooling and attention in the kernels
PRECISION = "tf32x3"  # of float32 products on tensor cores: three TF32 products, within 1e-6 of float32


def use_triton(x):
    """Whether the kernels take over. Raises UserError where MSA_KERNEL asks for what is not there."""
    if KERNEL not in ("auto", "torch", "triton"):
        raise UserError(f"MSA_KERNEL is {KERNEL!r}; it must be auto, torch or triton")
    if KERNEL == "triton" and not triton:
        raise UserError("MSA_KERNEL is triton, but triton is not installed; install it, "
                        "or set MSA_KERNEL=torch")
    return KERNEL == "triton" or KERNEL == "auto" and x.is_cuda and triton is not None


def check(name, x, shape, dtypes=FLOATS):
    """Refuse what a kernel would misread: raises ValueError. Kernels see an address and trust the rest."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}; a Triton kernel takes {', '.join(map(str, dtypes))} "
                         "(MSA_KERNEL=torch takes all)")
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous, its strides are {x.stride()}; call .contiguous()")


def check_head_size(D):
    """Attention holds whole heads in registers: raises ValueError above MAX_HEAD_SIZE."""
    if D > MAX_HEAD_SIZE:
        raise ValueError(f"the head size is {D}; the Triton kernels take at most {MAX_HEAD_SIZE} "
                         "(MSA_KERNEL=torch takes all)")


def power_of_two(n, low=16, high=1 << 30):
    """The least power of two that is at least n, between low and high: sides of tiles (tl.dot wants 16)."""
    return min(max(low, 1 << max(n - 1, 0).bit_length()), high)


# ------------------------------------------------------------------------------------------------------------
# Pooling (section 3.2)

def chunk_offsets(lengths, chunk_size, last=0):
    """Where each document's chunks begin: (M,) token counts -> (M + 1,) int64.

    A document has ceil(length / chunk_size) chunks; its `last` tokens, all of them at most, have another.
    """
    chunks = (lengths - last + chunk_size - 1) // chunk_size + (last > 0)
    return F.pad(chunks.cumsum(0), (1, 0))


def owners(offsets, chunks):
    """The document of each of C = `chunks` chunks: (M + 1,) offsets -> (C,) int64."""
    return torch.repeat_interleave(offsets.diff(), output_size=chunks)


def ranges(starts, counts):
    """The numbers starts[i], starts[i] + 1, ... (counts[i] of them), for all i one after another."""
    shift = torch.repeat_interleave(starts - counts.cumsum(0) + counts, counts)
    return shift + torch.arange(len(shift), device=counts.device)


def pool_chunks(keys, values, routing_keys, lengths, chunk_size, last=0, normalize=True):
    """Means over each chunk's tokens (section 3.2); a last short chunk is averaged over what it has.

    keys, values, routing_keys: (M, L, G, D), right-padded, or None for what is not wanted; lengths: (M,)
    tokens of each document, at least 1; last: as for `chunk_offsets`. Returns three (C, G, D), or None,
    documents one after another; routing keys are brought to unit length per head after pooling (Eq. 1), or
    left as they are without `normalize`. The kernel is for all three, equally shaped and normalised.
    """
    inputs = keys, values, routing_keys
    if normalize and all(x is not None and x.shape == inputs[0].shape for x in inputs):
        if use_triton(keys) and keys.size(3) <= MAX_HEAD_SIZE:
            return Pool.apply(*inputs, *chunk_spans(lengths, keys.size(1), chunk_size, last))
    keys, values, pooled = [None if x is None else chunk_means(x, lengths, chunk_size, last) for x in inputs]
    if normalize and pooled is not None:
        pooled = F.normalize(pooled.float(), dim=-1).to(pooled.dtype)
    return keys, values, pooled


def chunk_means(x, lengths, chunk_size, last=0):
    """(M, L, G, D) -> (C, G, D), the mean of each chunk's tokens."""
    if last:
        body = chunk_means(x, lengths - last, chunk_size)
        place = (lengths - last)[:, None] + torch.arange(last, device=x.device)          # (M, last)
        own = x.gather(1, place[:, :, None, None].expand(-1, -1, *x.shape[2:])).mean(1)  # (M, G, D)
        owner = owners(chunk_offsets(lengths - last, chunk_size), len(body))
        owner = torch.cat([owner, torch.arange(len(own), device=x.device)])
        return torch.cat([body, own])[owner.argsort(stable=True)]  # a document's last chunk behind its others
    M, L, G, D = x.shape
    valid = torch.arange(L, device=x.device) < lengths[:, None]  # (M, L)
    x = F.pad(x * valid[:, :, None, None], (0, 0, 0, 0, 0, -L % chunk_size))
    sums = x.view(M, -1, chunk_size, G, D).sum(2)                # (M, chunks, G, D)
    start = torch.arange(sums.size(1), device=x.device) * chunk_size
    counts = (lengths[:, None] - start).clamp(max=chunk_size)  # (M, chunks); <= 0: no such chunk
    return sums[counts > 0] / counts[counts > 0][:, None, None].to(x.dtype)


def chunk_spans(lengths, width, chunk_size, last):
    """Which of the M * `width` padded tokens each chunk holds: first (C,) int64 and count (C,) int32."""
    offsets = chunk_offsets(lengths, chunk_size, last)
    owner = owners(offsets, int(offsets[-1]))
    nth = torch.arange(len(owner), device=owner.device) - offsets[owner]
    body = (lengths - last)[owner]
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
        inside = (l < count)[:, None] & (d < D)[None, :]
        total += tl.sum(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), 0)
    return total / count


@jit
def pool_forward(
    keys_ptr, values_ptr, routing_ptr,          # (M * L, G, D)
    first_ptr, count_ptr,                       # (C,)
    pooled_keys_ptr, pooled_values_ptr, unit_ptr,  # (C, G, D)
    norm_ptr,                                   # (C, G) fp32: what unit was divided by
    G, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (c, g): one head of one chunk. Each input: for BLOCK_L tokens at a time: add; divide; store.

    Every input is read once, every output written once. Tile: (BLOCK_L tokens, BLOCK_D >= D).
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
        tl.store(x_ptr + at, tl.broadcast_to((gradient / count)[None, :], at.shape),
                 mask=(l < count)[:, None] & (d < D)[None, :])


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
    d_key = tl.load(d_pooled_keys_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    spread(d_keys_ptr, d_key, first, count, g, d, G, D, BLOCK_L)
    d_value = tl.load(d_pooled_values_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    spread(d_values_ptr, d_value, first, count, g, d, G, D, BLOCK_L)
    unit = tl.load(unit_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    d_unit = tl.load(d_unit_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    d_routing = (d_unit - unit * tl.sum(unit * d_unit, 0)) / tl.load(norm_ptr + c * G + g)
    spread(d_routing_ptr, d_routing, first, count, g, d, G, D, BLOCK_L)


class Pool(torch.autograd.Function):
    """Launches of pool_forward and pool_backward."""

    @staticmethod
    def forward(ctx, keys, values, routing_keys, first, count):
        M, L, G, D = keys.shape
        for name, x in (("keys", keys), ("values", values), ("routing_keys", routing_keys)):
            check(name, x, (M, L, G, D))
        pooled = [x.new_empty(len(first), G, D) for x in (keys, values, routing_keys)]
        norm = torch.empty(len(first), G, device=keys.device)
        ctx.tiles = dict(BLOCK_L=max(1, 2048 // power_of_two(D)), BLOCK_D=power_of_two(D), num_warps=4)
        pool_forward[len(first), G](
            keys, values, routing_keys, first, count, *pooled, norm, G, D, **ctx.tiles)
        ctx.save_for_backward(pooled[2], norm, first, count)
        ctx.inputs = [(x.shape, x.dtype) for x in (keys, values, routing_keys)]
        return tuple(pooled)

    @staticmethod
    def backward(ctx, *gradients):
        unit, norm, first, count = ctx.saved_tensors
        C, G, D = unit.shape
        gradients = [x.contiguous() for x in gradients]
        d_inputs = [torch.zeros(shape, dtype=dtype, device=unit.device) for shape, dtype in ctx.inputs]
        pool_backward[C, G](*gradients, unit, norm, first, count, *d_inputs, G, D, **ctx.tiles)
        return *d_inputs, None, None


# ------------------------------------------------------------------------------------------------------------
# Sparse attention (section 3.3)

def sparse_attention(query, keys, values, memory_keys=None, memory_values=None, index=None, slots=None,
                     prefix_length=0, bias=None):
    """A question's attention (section 3.3): [the chunks of its selected documents | its own causal past].

    query: (B, T, H, D), the last T of N tokens; keys, values: (B, N, G, D), local; memory_keys and
    memory_values: (C', G, D), read in place; index: (B, S) int64 rows of these, of which the first slots[b]
    count, each row once. The first `prefix_length` of the N tokens do not see the memory. bias: optional
    (B, S) fp32, added to the memory's logits, alike in all heads; it gets no gradient from the kernels.
    Returns (B, T, H, D). Gradients of memory rows that several questions selected are summed, by the kernels
    in fp32 and in no fixed order.
    """
    T, past = query.size(1), keys.size(1) - query.size(1)
    if index is None or index.size(1) == 0:
        index = bias = None
        if past == 0 or T == 1:  # the fast path: no mask in memory
            q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True).transpose(1, 2)
    if use_triton(query):
        dtype, device = query.dtype, query.device.type
        if torch.is_autocast_enabled(device):  # it casts what SDPA is given, but not what we are
            dtype = torch.get_autocast_dtype(device)
        local = [x.to(dtype) for x in (query, keys, values)]
        return Attend.apply(*local, memory_keys, memory_values, index, slots, prefix_length, bias)
    starts = torch.full((len(query),), past, device=query.device)
    return attend_rows(query, keys, values, None, starts, past + T, T, memory_keys, memory_values, index,
                       slots, prefix_length, bias)


def attend_rows(query, keys, values, rows, starts, longest, branch, memory_keys=None, memory_values=None,
                index=None, slots=None, prefix_length=0, bias=None):
    """`sparse_attention` of questions of any lengths, whose keys lie in rows of one space; the kernels
    have no gradients of it.

    query: (B, T, H, D); keys, values: (P, N, G, D); rows: (B,) int64, which of the P is whose, None: the
    first B. Question b's T tokens are starts[b], starts[b] + 1, ... of its row. They see what lies before
    starts[b], and of the T those of their own run of `branch` tokens that are not behind them. longest: no
    row's last token lies behind it. The rest as there. Returns (B, T, H, D).
    """
    B, T, H, D = query.shape
    if use_triton(query):
        return attend_split(query, keys, values, rows, starts, longest, branch, memory_keys, memory_values,
                            index, slots, prefix_length, bias)
    k, v = (x[:B, :longest] if rows is None else x[rows, :longest] for x in (keys, values))
    G, t = k.size(2), torch.arange(T, device=query.device)[:, None]                         # (T, 1)
    own = torch.arange(longest, device=query.device) - starts[:, None, None]                # (B, 1, N)
    mask = (own < 0) | (own <= t) & (own // branch == t // branch)                          # (B, T, N)
    if index is not None and index.size(1):
        place = starts[:, None] + t[:, 0] % branch                                          # (B, T)
        visible = torch.arange(index.size(1), device=index.device) < slots[:, None]         # (B, S)
        mask = torch.cat([visible[:, None] & (place >= prefix_length)[..., None], mask], 2)
        k = torch.cat([memory_keys[index].to(k.dtype), k], 1)
        v = torch.cat([memory_values[index].to(v.dtype), v], 1)
        if bias is not None:
            added = F.pad(bias.to(k.dtype), (0, longest))[:, None]                          # (B, 1, S + N)
            mask = added.expand_as(mask).masked_fill(~mask, float("-inf"))
    grouped = query.view(B, T, G, H // G, D).transpose(1, 2).flatten(2, 3)                  # (B, G, T * R, D)
    mask = mask[:, None].repeat_interleave(H // G, 2) if T > 1 else mask[:, None]
    found = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return found.view(B, G, T, H // G, D).transpose(1, 2).reshape(B, T, H, D)


# In the kernels, the R query heads that share a key are rows of one tile: row r is token r // R, head
# g * R + r % R. A key is loaded once for all of them, and a single token of decoding still fills R rows.
# Logits are in powers of two: exp2 is one instruction.

@jit
def query_rows(r, b, g, T, G, R: tl.constexpr):
    """Where rows r of question b and group g lie in (B, T, H)."""
    return ((b * T + r // R) * G + g) * R + r % R


@jit
def memory_slots(index_ptr, bias_ptr, b, s, count, S, BIAS: tl.constexpr):
    """Rows of the memory that slots s point at, and what is added to their logits: -inf beyond the count."""
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
    query, place, memory_keys_ptr, memory_values_ptr, index_ptr, bias_ptr, b, g, s, d, count, S,
    prefix_length, G, D, scale, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):
    """Keys and values of memory slots s, and the logits of rows at `place`: -inf where they cannot see."""
    at, added = memory_slots(index_ptr, bias_ptr, b, s, count, S, BIAS)
    keys = load_rows(memory_keys_ptr, at * G + g, s < count, d, D).to(query.dtype)
    values = load_rows(memory_values_ptr, at * G + g, s < count, d, D).to(query.dtype)
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E) + added[None, :]
    return keys, values, tl.where((place >= prefix_length)[:, None], logits, float("-inf"))


@jit
def local_tile(query, place, keys_ptr, values_ptr, b, g, n, d, N, G, D, scale, PRECISION: tl.constexpr):
    """Keys and values of local tokens n, and the logits of rows at `place`: -inf for later tokens."""
    keys = load_rows(keys_ptr, (b * N + n) * G + g, n < N, d, D)
    values = load_rows(values_ptr, (b * N + n) * G + g, n < N, d, D)
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
    return keys, values, tl.where(n[None, :] <= place[:, None], logits, float("-inf"))


@jit
def softmax_step(logits, values, top, total, output, PRECISION: tl.constexpr):
    """One more tile of keys in the running softmax: maxima, sums, outputs, rescaled when a maximum grows."""
    new = tl.maximum(top, tl.max(logits, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p = tl.exp2(logits - finite[:, None])
    shrink = tl.exp2(top - finite)
    output = tl.dot(p.to(values.dtype), values, output * shrink[:, None], input_precision=PRECISION)
    return new, total * shrink + tl.sum(p, 1), output


@jit
def attend_forward(
    query_ptr, keys_ptr, values_ptr,            # (B, T, H, D), (B, N, G, D), (B, N, G, D)
    memory_keys_ptr, memory_values_ptr,         # (C', G, D), any type
    index_ptr, slots_ptr, bias_ptr,             # (B, S) int64, (B,) int64, (B, S) fp32
    output_ptr, lse_ptr,                        # (B, T, H, D), (B, T, H) fp32: log2 of the softmax's sum
    T, N, S, prefix_length, G, D, scale,        # scale: 1 / sqrt(D)
    R: tl.constexpr, MEMORY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (i, b, g): the i-th BLOCK_R rows (tokens x heads of the group) of a question.

        for BLOCK_N slots of the question's memory at a time:  gather them through the index; softmax_step
        for BLOCK_N local tokens, up to the rows' last token:  softmax_step, causal
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
            s = s0 + tl.arange(0, BLOCK_N)
            _, values, logits = memory_tile(
                query, place, memory_keys_ptr, memory_values_ptr, index_ptr, bias_ptr, b, g, s, d, count, S,
                prefix_length, G, D, scale, BIAS, PRECISION)
            top, total, output = softmax_step(logits, values, top, total, output, PRECISION)
    for n0 in range(0, tl.minimum(N, N - T + (tile * BLOCK_R + BLOCK_R - 1) // R + 1), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        _, values, logits = local_tile(
            query, place, keys_ptr, values_ptr, b, g, n, d, N, G, D, scale, PRECISION)
        top, total, output = softmax_step(logits, values, top, total, output, PRECISION)
    tl.store(output_ptr + row[:, None] * D + d[None, :], output / total[:, None],
             mask=exists[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + row, top + tl.log2(total), mask=exists)


@jit
def query_step(logits, keys, values, d_output, lse, delta, d_query, PRECISION: tl.constexpr):
    """One more tile of keys in the query's gradient: d_logits = p * (d_output @ values^T - delta)."""
    d_p = tl.dot(d_output, tl.trans(values), input_precision=PRECISION)
    d_logits = tl.exp2(logits - lse[:, None]) * (d_p - delta[:, None])
    return tl.dot(d_logits.to(keys.dtype), keys, d_query, input_precision=PRECISION)


@jit
def attend_backward_query(
    query_ptr, keys_ptr, values_ptr, memory_keys_ptr, memory_values_ptr,  # as in attend_forward
    index_ptr, slots_ptr, bias_ptr,
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
    query = load_rows(query_ptr, row, exists, d, D)
    d_output = load_rows(d_output_ptr, row, exists, d, D)
    lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
    delta = tl.load(delta_ptr + row, mask=exists, other=0.0)
    d_query = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if MEMORY:
        count = tl.load(slots_ptr + b).to(tl.int32)
        for s0 in range(0, count, BLOCK_N):
            s = s0 + tl.arange(0, BLOCK_N)
            keys, values, logits = memory_tile(
                query, place, memory_keys_ptr, memory_values_ptr, index_ptr, bias_ptr, b, g, s, d, count, S,
                prefix_length, G, D, scale, BIAS, PRECISION)
            d_query = query_step(logits, keys, values, d_output, lse, delta, d_query, PRECISION)
    for n0 in range(0, tl.minimum(N, N - T + (tile * BLOCK_R + BLOCK_R - 1) // R + 1), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys, values, logits = local_tile(
            query, place, keys_ptr, values_ptr, b, g, n, d, N, G, D, scale, PRECISION)
        d_query = query_step(logits, keys, values, d_output, lse, delta, d_query, PRECISION)
    d_query *= scale
    tl.store(d_query_ptr + row[:, None] * D + d[None, :], d_query, mask=exists[:, None] & (d < D)[None, :])


@jit
def attend_backward_keys(
    query_ptr, keys_ptr, values_ptr,            # keys, values: (C', G, D) with MEMORY, else (B, N, G, D)
    index_ptr, slots_ptr, bias_ptr,
    d_output_ptr, lse_ptr, delta_ptr,           # as in attend_backward_query
    d_keys_ptr, d_values_ptr,                   # as keys, values; with MEMORY fp32, to which is added
    T, N, S, prefix_length, G, D, scale,
    R: tl.constexpr, MEMORY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (i, b, g): the i-th BLOCK_N memory slots of a question, or without MEMORY local tokens of it.

        for BLOCK_R rows that may see them:  d_values += p^T @ d_output; d_keys += d_logits^T @ query

    Other questions may have selected the same chunks: their gradients meet in atomic additions.
    """
    tile, b, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    n, d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if MEMORY:
        count = tl.load(slots_ptr + b).to(tl.int32)
        at, added = memory_slots(index_ptr, bias_ptr, b, n, count, S, BIAS)
        at = at * G + g
        seen_from = tl.zeros([BLOCK_N], tl.int32) + prefix_length
        first, end = 0, tl.where(tile * BLOCK_N < count, T * R, 0)
    else:
        count, seen_from, added = N, n, tl.zeros([BLOCK_N], tl.float32)
        at = (b * N + n) * G + g
        first, end = tl.maximum(tile * BLOCK_N - (N - T), 0) * R // BLOCK_R * BLOCK_R, T * R
    query_type = query_ptr.dtype.element_ty
    keys = load_rows(keys_ptr, at, n < count, d, D).to(query_type)
    values = load_rows(values_ptr, at, n < count, d, D).to(query_type)
    d_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for r0 in range(first, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        exists, row, place = r < T * R, query_rows(r, b, g, T, G, R), N - T + r // R
        query = load_rows(query_ptr, row, exists, d, D)
        d_output = load_rows(d_output_ptr, row, exists, d, D)
        lse = tl.load(lse_ptr + row, mask=exists, other=0.0)
        delta = tl.load(delta_ptr + row, mask=exists, other=0.0)
        logits = tl.dot(keys, tl.trans(query), input_precision=PRECISION)  # (BLOCK_N, BLOCK_R)
        logits = logits * (scale * LOG2E) + added[:, None]
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


def check_memory(B, G, D, memory_keys, memory_values, index, slots, bias):
    """`check` of a memory and of what B questions selected; returns (index, slots, bias), contiguous."""
    for name, x in (("memory_keys", memory_keys), ("memory_values", memory_values)):
        check(name, x, (len(memory_keys), G, D))
    index, slots = index.contiguous(), slots.contiguous()
    check("index", index, (B, index.size(-1)), (torch.int64,))
    check("slots", slots, (B,), (torch.int64,))
    if bias is not None:
        bias = bias.contiguous()
        check("bias", bias, index.shape, (torch.float32,))
    return index, slots, bias


class Attend(torch.autograd.Function):
    """Launches of the attention kernels."""

    @staticmethod
    def forward(ctx, query, keys, values, memory_keys, memory_values, index, slots, prefix_length, bias):
        (B, T, H, D), (_, N, G, _) = query.shape, keys.shape
        if H % G or N < T:
            raise ValueError(f"query has {H} heads and {T} tokens, keys {G} and {N}; "
                             "heads must be a multiple, tokens no more")
        check_head_size(D)
        check("query", query, (B, T, H, D))
        check("keys", keys, (B, N, G, D), (query.dtype,))
        check("values", values, (B, N, G, D), (query.dtype,))
        memory = index is not None
        if memory:
            index, slots, bias = check_memory(B, G, D, memory_keys, memory_values, index, slots, bias)
        S = index.size(1) if memory else 0
        tensors = (query, keys, values, memory_keys, memory_values, index, slots, bias)
        tensors = [query if x is None else x for x in tensors]  # in the place of None: what is not read
        sizes = (T, N, S, prefix_length, G, D, D ** -0.5)
        options = (H // G, memory, bias is not None, PRECISION)
        output = torch.empty_like(query)
        lse = torch.empty(B, T, H, device=query.device)
        tiles = Attend.tiles(T * H // G, D, query.element_size())
        grid = triton.cdiv(T * H // G, tiles["BLOCK_R"]), B, G
        attend_forward[grid](*tensors, output, lse, *sizes, *options, **tiles)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*tensors, output, lse)
            ctx.sizes, ctx.options = sizes, options
        return output

    @staticmethod
    def backward(ctx, d_output):
        *tensors, output, lse = ctx.saved_tensors
        query, keys, values, memory_keys, memory_values, *selection = tensors
        (T, N, S, _, G, D, _), (R, memory, bias, _) = ctx.sizes, ctx.options
        B, d_output = len(query), d_output.contiguous()
        delta = (d_output.float() * output).sum(-1)
        d_query, d_keys, d_values = (torch.empty_like(x) for x in (query, keys, values))
        tiles = Attend.backward_tiles(T * R, D, query.element_size())
        attend_backward_query[triton.cdiv(T * R, tiles["BLOCK_R"]), B, G](
            *tensors, d_output, lse, delta, d_query, *ctx.sizes, *ctx.options, **tiles)
        attend_backward_keys[triton.cdiv(N, tiles["BLOCK_N"]), B, G](
            query, keys, values, *selection, d_output, lse, delta, d_keys, d_values, *ctx.sizes,
            R, False, False, PRECISION, **tiles)
        if not (memory and any(ctx.needs_input_grad[3:5])):
            return d_query, d_keys, d_values, *[None] * 6
        stored = memory_keys, memory_values
        d_memory = [torch.zeros(x.shape, device=x.device) for x in stored]
        attend_backward_keys[triton.cdiv(S, tiles["BLOCK_N"]), B, G](
            query, *stored, *selection, d_output, lse, delta, *d_memory, *ctx.sizes,
            R, True, bias, PRECISION, **tiles)
        d_memory = [gradient.to(x.dtype) for gradient, x in zip(d_memory, stored)]
        return d_query, d_keys, d_values, *d_memory, *[None] * 4

    @staticmethod
    def tiles(rows, D, size):
        """For bfloat16 heads of 128 the fastest of eight on an H200 (results/README.md), for others the
        largest that do not spill (tests/compile_kernels.py): TF32 products take many registers."""
        small = power_of_two(D) * size > (128 if size == 4 else 256)
        block_r = power_of_two(rows, high=16 if small else 64)
        stages = 3 if size == 2 and not small else 2
        return dict(BLOCK_R=block_r, BLOCK_N=32, BLOCK_D=power_of_two(D), num_warps=4, num_stages=stages)

    @staticmethod
    def backward_tiles(rows, D, size):
        block_r, block_n, warps = 16, 32, 4
        if power_of_two(D) * size > 256:
            block_n = 16
        elif size == 2:
            block_r, block_n, warps = 64, 64, 8
        return dict(BLOCK_R=power_of_two(rows, high=block_r), BLOCK_N=block_n, BLOCK_D=power_of_two(D),
                    num_warps=warps, num_stages=2)


# ------------------------------------------------------------------------------------------------------------
# Attention of rows: decoding, where a question has too few rows to fill a GPU

@jit
def attend_part(
    query_ptr, keys_ptr, values_ptr,            # (B, T, H, D), (rows, space, G, D) twice
    rows_ptr, starts_ptr,                       # (B,) int64 each
    memory_keys_ptr, memory_values_ptr, index_ptr, slots_ptr, bias_ptr,  # as in attend_forward
    output_ptr, lse_ptr,                        # (parts, B, T, H, D), (parts, B, T, H), fp32
    B, T, space, S, prefix_length, branch, G, D, scale,
    R: tl.constexpr, ROWS: tl.constexpr, MEMORY: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (i, b * G + g, part): the i-th BLOCK_R rows of a question over one part of its keys.

        for BLOCK_N slots of this part of its memory:        gather them through the index; softmax_step
        for BLOCK_N local tokens of this part of its row:    softmax_step, causal, branch by branch
    """
    b, g = tl.program_id(1).to(tl.int64) // G, tl.program_id(1) % G
    part, parts = tl.program_id(2), tl.num_programs(2)
    r, d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    exists, row, t = r < T * R, query_rows(r, b, g, T, G, R), r // R
    start, mine = tl.load(starts_ptr + b).to(tl.int32), b
    if ROWS:
        mine = tl.load(rows_ptr + b)
    query = load_rows(query_ptr, row, exists, d, D)
    top, total = tl.full([BLOCK_R], float("-inf"), tl.float32), tl.zeros([BLOCK_R], tl.float32)
    output = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if MEMORY:
        count = tl.load(slots_ptr + b).to(tl.int32)
        width = tl.cdiv(tl.cdiv(count, parts), BLOCK_N) * BLOCK_N
        for s0 in range(part * width, tl.minimum(count, (part + 1) * width), BLOCK_N):
            s = s0 + tl.arange(0, BLOCK_N)
            _, values, logits = memory_tile(
                query, start + t % branch, memory_keys_ptr, memory_values_ptr, index_ptr, bias_ptr, b, g, s,
                d, count, S, prefix_length, G, D, scale, BIAS, PRECISION)
            top, total, output = softmax_step(logits, values, top, total, output, PRECISION)
    end = start + T
    width = tl.cdiv(tl.cdiv(end, parts), BLOCK_N) * BLOCK_N
    for n0 in range(part * width, tl.minimum(end, (part + 1) * width), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keys = load_rows(keys_ptr, (mine * space + n) * G + g, n < end, d, D)
        values = load_rows(values_ptr, (mine * space + n) * G + g, n < end, d, D)
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        own = (n - start)[None, :]
        seen = (own <= t[:, None]) & (own // branch == t[:, None] // branch) | (own < 0)
        logits = tl.where(seen, logits, float("-inf"))
        top, total, output = softmax_step(logits, values, top, total, output, PRECISION)
    row += part * B * T * G * R
    total = tl.where(total == 0, 1.0, total)  # nothing was seen: top is -inf
    output = output / total[:, None]
    tl.store(output_ptr + row[:, None] * D + d[None, :], output, mask=exists[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + row, top + tl.log2(total), mask=exists)


@jit
def merge_parts(output_ptr, lse_ptr, merged_ptr, rows, D, parts, BLOCK_D: tl.constexpr):
    """Program (row): the mean of a row's parts, weighed by the sums of their softmaxes."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    top, total = float("-inf"), 0.0
    merged = tl.zeros([BLOCK_D], tl.float32)
    for part in range(0, parts):
        at = part * rows + row
        lse = tl.load(lse_ptr + at)
        output = tl.load(output_ptr + at * D + d, mask=d < D, other=0.0)
        new = tl.maximum(top, lse)
        finite = tl.where(new == float("-inf"), 0.0, new)
        weight, shrink = tl.exp2(lse - finite), tl.exp2(top - finite)
        merged = merged * shrink + output * weight
        total = total * shrink + weight
        top = new
    tl.store(merged_ptr + row * D + d, merged / total, mask=d < D)


def attend_split(query, keys, values, rows, starts, longest, branch, memory_keys, memory_values, index, slots,
                 prefix_length, bias, parts=None):
    """Launches of attend_part and merge_parts; as attend_rows. parts: of a question's keys, by default as
    many as fill a large GPU twice, of 128 keys and more."""
    (B, T, H, D), (_, space, G, _) = query.shape, keys.shape
    check_head_size(D)
    query, memory = query.contiguous(), index is not None and index.size(1) > 0
    for name, x in (("keys", keys), ("values", values)):
        check(name, x, (len(keys), space, G, D), (query.dtype,))
    check("starts", starts, (B,), (torch.int64,))
    if rows is not None:
        check("rows", rows, (B,), (torch.int64,))
    if memory:
        index, slots, bias = check_memory(B, G, D, memory_keys, memory_values, index, slots, bias)
    else:
        memory_keys = memory_values = index = slots = bias = None
    S, tiles = index.size(1) if memory else 0, Attend.tiles(T * H // G, D, query.element_size())
    programs = triton.cdiv(T * H // G, tiles["BLOCK_R"]) * B * G
    parts = parts or max(1, min(264 // programs, (S + longest) // 128))
    tensors = (keys, values, rows, starts, memory_keys, memory_values, index, slots, bias)
    tensors = [query if x is None else x for x in tensors]  # in the place of None: what is not read
    output = torch.empty(parts, B, T, H, D, device=query.device)
    lse = torch.empty(parts, B, T, H, device=query.device)
    attend_part[triton.cdiv(T * H // G, tiles["BLOCK_R"]), B * G, parts](
        query, *tensors, output, lse, B, T, space, S, prefix_length, branch, G, D, D ** -0.5, H // G,
        rows is not None, memory, bias is not None, PRECISION, **tiles)
    if parts == 1:
        return output[0].to(query.dtype)
    merged = torch.empty_like(query)
    merge_parts[B * T * H,](output, lse, merged, B * T * H, D, parts, BLOCK_D=tiles["BLOCK_D"], num_warps=1)
    return merged
