"""Pooling, routing and sparse attention against tests/reference.py and against values worked out by hand."""
import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_checks
import pytest
import reference
import torch
from kernel_checks import attention_by_hand, pool_by_hand

import msa_kernel
import routing
from common import UserError
from msa_kernel import chunk_offsets, pool_chunks, sparse_attention
from routing import (
    document_slots,
    group_queries,
    quantize,
    route,
    select_documents,
    split_query,
    top_documents,
)

INF = float("inf")
# H, G, D: ratios 1, 3 and 4, head sizes that are no power of two.
HEADS = [(1, 1, 4), (2, 2, 6), (3, 1, 10), (8, 2, 6), (6, 2, 2)]


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=tolerance,
                               atol=tolerance)


@pytest.fixture(autouse=True)
def bfloat16_first(monkeypatch):
    """Where a CPU has no such products, the tests of `select_documents` would compare `route` with itself."""
    monkeypatch.setattr(routing, "has_bfloat16", lambda: True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(output, inputs):
    """Gradients of a fixed random projection of the output; zero for an input that it does not depend on."""
    projection = (output.double() * random(*output.shape, seed=99)).sum()
    found = torch.autograd.grad(projection, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, inputs)]


def unit_keys(*shape, seed=0):
    keys = random(*shape, seed=seed)
    return keys / keys.norm(dim=-1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------
# Pooling

@pytest.mark.parametrize("lengths, size, last, expected", [
    ([1], 64, 0, [0, 1]),
    ([1, 63, 64, 65, 128, 129], 64, 0, [0, 1, 2, 3, 5, 7, 10]),
    ([3, 1, 4], 1, 0, [0, 3, 4, 8]),
    ([5, 6, 69, 70], 64, 5, [0, 1, 3, 5, 8]),
])
def test_chunk_offsets(lengths, size, last, expected):
    """A document would own too few or too many chunks at a boundary of the chunk size."""
    offsets = chunk_offsets(torch.tensor(lengths), size, last)
    assert offsets.tolist() == expected and offsets.dtype == torch.int64


@pytest.mark.parametrize("lengths, size, last", [
    ([1], 4, 0), ([5, 1, 4, 3, 8, 9], 4, 0), ([7, 2], 1, 0), ([1, 63, 64, 65], 64, 0), ([3, 7, 5], 3, 0),
    ([1], 4, 1), ([5, 2, 6, 3, 8, 9], 4, 2), ([7, 5], 1, 5), ([5, 68, 69, 70], 64, 5)])
def test_pool_chunks(lengths, size, last):
    """A chunk's mean would count padding, divide by the wrong length, or stand in the wrong place;
    or its gradient would."""
    inputs = [random(len(lengths), max(lengths), 2, 3, seed=seed) for seed in range(3)]
    for x in inputs:
        for m, length in enumerate(lengths):
            x[m, length:] = 1e6  # what stands in the padding must not matter
        x.requires_grad_()
    expected = pool_by_hand(inputs, lengths, size, last)
    found = pool_chunks(*inputs, torch.tensor(lengths), size, last)
    for i, (pooled, wanted) in enumerate(zip(found, expected)):
        tolerance = 1e-12 if i < 2 else 1e-6  # unit length is found in float32
        close(pooled, wanted, tolerance)
        for actual, right in zip(gradients(pooled, inputs), gradients(wanted, inputs)):
            close(actual, right, tolerance)


def test_pool_chunks_padding_beyond_the_longest():
    """Padding wider than the longest document would add chunks."""
    inputs = [random(2, 13, 1, 2, seed=seed) for seed in range(3)]
    wide, narrow = (pool_chunks(*xs, torch.tensor([5, 2]), 4) for xs in (inputs, [x[:, :5] for x in inputs]))
    for a, b in zip(wide, narrow):
        close(a, b)
        assert len(a) == 3


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_pool_chunks_of_some(kernel, monkeypatch):
    """A layer that only reads or only routes would pool what nobody asked for; or the kernel, which is for
    all three at once, would be started for less, for another width, or for too wide a head."""
    if kernel == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(msa_kernel, "KERNEL", kernel)
    lengths, inputs = torch.tensor([5, 2]), [random(2, 5, 2, 3, seed=i).float() for i in range(3)]
    keys, values, routing_keys = pool_chunks(*inputs, lengths, 4)
    assert pool_chunks(None, None, None, lengths, 4) == (None, None, None)
    found = pool_chunks(inputs[0], inputs[1], None, lengths, 4)
    assert found[2] is None
    close(found[0], keys)
    close(found[1], values)
    found = pool_chunks(None, None, inputs[2], lengths, 4)
    assert found[:2] == (None, None)
    close(found[2], routing_keys)
    wide = random(2, 5, 1, 300, seed=3).float()
    found = pool_chunks(inputs[0], inputs[1], wide, lengths, 4)
    close(found[0], keys)
    close(found[2][1, 0], wide[0, 4, 0] / wide[0, 4, 0].norm())
    close(pool_chunks(wide, wide, wide, lengths, 4)[2], found[2])


def test_pool_chunks_of_zero_is_zero():
    """A chunk whose routing keys cancel would poison the memory with NaN, or its gradient the model."""
    inputs = [torch.zeros(1, 3, 2, 4, requires_grad=True) for _ in range(3)]
    pooled = pool_chunks(*inputs, torch.tensor([3]), 4)
    assert all(x.eq(0).all() for x in pooled)
    assert all(x.isfinite().all() for x in torch.autograd.grad(sum(x.sum() for x in pooled), inputs))


# ------------------------------------------------------------------------------------------------------------
# Routing

@pytest.mark.parametrize("H, G, D", HEADS)
def test_group_queries_is_the_mean_cosine(H, G, D):
    """The grouped inner product would not be the mean over heads of the cosine,
    or query heads would meet another group's key."""
    queries, keys = random(2, 3, H, D), unit_keys(4, G, D)
    grouped = group_queries(queries, G)
    assert grouped.shape == (2, 3, G * D)
    expected = [[[reference.chunk_score(queries[b, t], key) for key in keys] for t in range(3)]
                for b in range(2)]
    close(grouped.double() @ keys.flatten(1).T, torch.tensor(expected))
    close(group_queries(1000 * queries, G), grouped)


def test_group_queries_of_zero_is_zero():
    """A token whose routing query vanishes would poison the scores with NaN."""
    assert group_queries(torch.zeros(1, 1, 4, 6), 2).eq(0).all()


@pytest.mark.parametrize("H, G, D", HEADS)
@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [2, 1, 4, 3, 1]])
def test_route(H, G, D, counts, monkeypatch):
    """Document scores, or their gradients, would be wrong; or depend on how the chunks are cut into tiles."""
    offsets = torch.tensor([0, *counts]).cumsum(0)
    queries = random(3, 4, H, D).requires_grad_()
    free_keys = random(sum(counts), G, D, seed=1).requires_grad_()
    keys = free_keys / free_keys.norm(dim=-1, keepdim=True)
    mask = torch.tensor([[True] * 4, [False, True, True, False], [False, False, False, True]])
    documents = [list(keys[offsets[m]:offsets[m + 1]]) for m in range(len(counts))]
    expected = torch.stack([
        torch.stack([reference.document_score(list(queries[b, mask[b]]), document) for document in documents])
        for b in range(3)])
    scores = route(group_queries(queries, G), mask, keys, offsets)
    assert scores.dtype == torch.float32
    close(scores, expected)
    inputs = queries, free_keys
    for actual, wanted in zip(gradients(scores, inputs), gradients(expected, inputs)):
        close(actual, wanted)
    for tile in (1, 3, 16384):  # with gradients it is 64
        monkeypatch.setattr(routing, "ROUTE_TILE", tile)
        with torch.no_grad():
            close(route(group_queries(queries, G), mask, keys, offsets), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("counts", [[63], [64], [1] * 65, [60, 9, 1, 60, 5]])
def test_route_over_several_tiles(training, counts, monkeypatch):
    """A document whose chunks lie in two tiles, or the last tile's padding, would be scored wrongly."""
    monkeypatch.setattr(routing, "ROUTE_TILE", 64)
    # Cosines below 0, which would be the score of padding.
    queries, keys = random(1, 2, 2, 6), -unit_keys(sum(counts), 1, 6).abs()
    queries, offsets = queries.abs(), torch.tensor([0, *counts]).cumsum(0)
    expected = [reference.document_score(list(queries[0]), list(keys[offsets[m]:offsets[m + 1]]))
                for m in range(len(counts))]
    assert max(expected) < 0
    with torch.set_grad_enabled(training):
        scores = route(group_queries(queries, 1), torch.ones(1, 2, dtype=torch.bool), keys, offsets)
        close(scores[0], torch.stack(expected))


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 3]])
def test_route_without_routing_tokens(counts):
    """A question that does not route would get scores, or NaN gradients for its neighbours in the batch."""
    query, keys = random(2, 3, 4, 6).requires_grad_(), unit_keys(sum(counts), 2, 6).requires_grad_()
    mask = torch.tensor([[False] * 3, [True] * 3])
    scores = route(group_queries(query, 2), mask, keys, torch.tensor([0, *counts]).cumsum(0))
    assert scores[0].eq(-INF).all() and scores[1].isfinite().all()
    for gradient in torch.autograd.grad(scores[1].sum(), (query, keys)):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("H, G, D", HEADS + [(4, 2, 32)])
@pytest.mark.parametrize("training", [True, False])
def test_route_of_equal_chunks_is_equal(H, G, D, training):
    """Rounding would depend on where a chunk lies and on how many there are: ties would not be ties,
    and a memory that is split or grows would select other documents."""
    query, key = group_queries(random(2, 3, H, D), G), unit_keys(1, G, D).float()
    mask = torch.ones(2, 3, dtype=torch.bool)
    with torch.set_grad_enabled(training):
        alone = route(query, mask, key, torch.tensor([0, 1]))
        for chunks in (2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65, 100, 4097):
            scores = route(query, mask, key.repeat(chunks, 1, 1), torch.arange(chunks + 1))
            assert scores.equal(alone.expand(2, chunks)), f"{chunks} chunks"


def test_route_heads_before_tokens():
    """The max over tokens would be taken before the mean over heads:
    two tokens would each supply the head they are good at."""
    # In each token one head agrees and the other opposes.
    queries = torch.tensor([[[[1., 0.], [-1., 0.]], [[-1., 0.], [1., 0.]]]])
    keys = torch.tensor([[[1., 0.]]])
    mask, offsets = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0, 1])
    assert route(group_queries(queries, 1), mask, keys, offsets).tolist() == [[0.]]


@pytest.mark.parametrize("scores, k, indices, values", [
    ([[.1, .3, .2]], 2, [[1, 2]], [[.3, .2]]),
    ([[.5, .5, .5]], 2, [[0, 1]], [[.5, .5]]),
    ([[.1, .7, .1, .7]], 3, [[1, 3, 0]], [[.7, .7, .1]]),
    ([[.4]], 3, [[0, -1, -1]], [[.4, -INF, -INF]]),
    ([[-INF, .2, -INF], [-INF] * 3], 2, [[1, -1], [-1, -1]], [[.2, -INF], [-INF, -INF]]),
    ([[0., 1, 2, 2, 0, 0, 0, 0, 2], [5, 5, 0, 0, 0, 0, 0, 0, 0]], 2, [[2, 3], [0, 1]], [[2, 2], [5, 5]]),
    ([[3., 0, 0, 0, 0, 0, 0, 0, 0], [-INF] * 9], 2, [[0, 1], [-1, -1]], [[3, 0], [-INF, -INF]]),
])
def test_top_documents(scores, k, indices, values):
    """Ties would not go to the lower number, or places that nothing fills would not hold -1."""
    found, best = top_documents(torch.tensor(scores), k)
    assert found.tolist() == indices and found.dtype == torch.int64
    close(best, torch.tensor(values))


@pytest.mark.parametrize("documents", [1, 2, 11, 12, 13, 50, 300])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_top_documents_of_many(documents, levels):
    """The short cut for many documents would lose a tie or reorder one; levels = 1: all are equal."""
    scores = torch.randint(levels, (4, documents), generator=torch.Generator().manual_seed(documents)).float()
    scores[1, ::2] = -INF
    found, best = top_documents(scores, 3)
    for b, row in enumerate(scores.tolist()):
        ranking = [m for m in sorted(range(documents), key=lambda m: (-row[m], m)) if row[m] > -INF][:3]
        missing = 3 - len(ranking)
        assert found[b].tolist() == ranking + [-1] * missing
        assert best[b].tolist() == [row[m] for m in ranking] + [-INF] * missing


@pytest.mark.parametrize("documents", [3, 100])
def test_top_documents_of_no_question(documents):
    """A batch of questions none of which asks for a document would crash the measures of training."""
    found, best = top_documents(torch.zeros(0, documents), 2)
    assert found.shape == best.shape == (0, 2)


@pytest.mark.parametrize("counts", [[1], [1] * 700, [2, 1, 4, 3, 1] * 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_select_documents(counts, dtype, monkeypatch):
    """Rounded products would decide which documents are found, or in what order;
    or a question that routes nothing would find some."""
    monkeypatch.setattr(routing, "ROUTE_TILE", 64)
    offsets, keys = torch.tensor([0, *counts]).cumsum(0), unit_keys(sum(counts), 2, 16, seed=4)
    keys[-1] = keys[0]  # a tie
    keys, scales = quantize(keys) if dtype == torch.int8 else (keys.to(dtype), None)
    query = group_queries(random(3, 5, 4, 16, seed=5), 2)
    mask = torch.tensor([[True] * 5, [False] * 5, [True, False] * 2 + [True]])
    tied = keys[:1, :, None].double().expand(-1, -1, 2, -1).flatten(1, 2)[None]
    query[0, 2] = group_queries(tied, 2)[0, 0]  # finds the tie
    documents, scores = select_documents([query], mask, [keys], offsets, 6, [scales])
    wanted, values = top_documents(route(query, mask, keys, offsets, scales), 6)
    assert documents.equal(wanted) and documents[1].eq(-1).all()
    close(scores, values)


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_select_documents_by_several_layers(layers, dtype):
    """Another score than the mean over layers would decide, or one that is rounded in some layer; ties would
    go to a higher number; a document that is gone would be found."""
    counts = torch.tensor([2, 1, 4, 3, 1] * 400)
    offsets, rows = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), int(counts.sum())
    keys = [unit_keys(rows, 2, 16, seed=10 + layer) for layer in range(layers)]
    for x in keys:
        x[-1] = x[2]  # the last document and the second, of one chunk each, are the same
    queries = [group_queries(random(3, 5, 4, 16, seed=20 + layer), 2) for layer in range(layers)]
    for query, x in zip(queries, keys):
        query[0, 1] = x[2].flatten() / 2
    mask, alive = torch.tensor([[True] * 5, [False] * 5, [True, False] * 2 + [True]]), counts != 3
    rounded = [quantize(x) if dtype == torch.int8 else (x.to(dtype), None) for x in keys]
    stored, scales = [list(xs) for xs in zip(*rounded)]
    documents, scores = select_documents(queries, mask, stored, offsets, 20, scales, alive)
    total = 0
    for query, x, scale in zip(queries, stored, scales):
        exact = torch.einsum("btw,cw->btc", query.double(), x.flatten(1).double())
        exact = exact if scale is None else exact * scale
        exact = exact.masked_fill(~mask[:, :, None], -INF).amax(1)
        total = total + torch.stack([part.amax(1) for part in exact.split(counts.tolist(), 1)], 1) / layers
    wanted, values = top_documents(total.masked_fill(~alive, -INF), 20)
    assert documents.equal(wanted) and documents[1].eq(-1).all() and documents[0, :2].tolist() == [1, 1999]
    assert torch.allclose(scores.double(), values, rtol=0, atol=1e-6)


def test_select_documents_where_a_small_error_crosses_a_step():
    """Scores near the middle between two bfloat16 numbers would be a whole step apart, and the margin half of
    one: the first document, which is the better one, would not be looked at again."""
    step = 2.0 ** -16
    query, mask = torch.tensor([[[1.0, 148.4 * step]]]), torch.ones(1, 1, dtype=torch.bool)
    keys = torch.tensor([[[0.5, 0.86328125]], [[0.50390625, -0.86328125]]]).bfloat16()
    assert (query[0].bfloat16() @ keys.flatten(1).T).tolist() == [[0.5, 0.50390625]]
    exact = keys.flatten(1).double() @ query[0, 0].double()
    assert exact[0] > exact[1]
    documents, _ = select_documents([query], mask, [keys], torch.arange(3), 1)
    assert documents.tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_documents_where_rounding_misleads(dtype):
    """The rough score would decide: the second document has .50129, its rounded products say .5039;
    the first has .5019 and .5."""
    query, mask = torch.tensor([[[0.5019, 0.3545, 0.3545]]]), torch.ones(1, 1, dtype=torch.bool)
    keys = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.5 ** 0.5, 0.5 ** 0.5]]]).bfloat16()
    assert (query[0].bfloat16() @ keys.flatten(1).T).tolist() == [[0.5, 0.50390625]]
    documents, scores = select_documents([query], mask, [keys.to(dtype)], torch.arange(3), 1)
    assert documents.tolist() == [[0]]
    close(scores, torch.tensor([[0.5019]]))


def test_int8_products(kernels):
    """A query's rest would be lost: the first of its two int8 numbers says .5019 and .5030 of the same two
    documents, and prefers the second."""
    query, mask = torch.tensor([[[0.5019, 0.3545, 0.3545]]]), torch.ones(1, 1, dtype=torch.bool)
    keys, scales = quantize(torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.5 ** 0.5, 0.5 ** 0.5]]]))
    scores = route(query, mask, keys, torch.arange(3), scales)
    assert torch.allclose(scores, torch.tensor([[0.5019, 0.50134]]), rtol=0, atol=2e-5)


def test_split_query():
    """The two int8 numbers would be off by more than half a step of the second, or a query of zeros NaN."""
    query = torch.cat([random(50, 2, 16, seed=6), torch.zeros(1, 2, 16)]).float()
    (first, second), scales = split_query(query)
    assert first.dtype == second.dtype == torch.int8
    found = (first + second / 254) * scales[:, None, None]
    assert ((found - query).abs() <= 1.01 / 508 * scales[:, None, None]).all()


def test_select_documents_where_rounded_keys_mislead():
    """float32 keys would be found by what bfloat16 leaves of them: 1 - 2^-10 and 1 - 2^-12 are alike there,
    and the first would win."""
    keys = torch.tensor([[[1 - 2 ** -10]], [[1 - 2 ** -12]], [[0.5]]])
    assert keys[0].bfloat16().equal(keys[1].bfloat16())
    query, mask = torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)
    documents, _ = select_documents([query], mask, [keys], torch.arange(4), 1)
    assert documents.tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_documents_of_products(dtype):
    """Keys of any length, as a router without normalisation has them,
    would be looked at with an error bound that is for unit keys."""
    keys = (random(4000, 1, 8, seed=6) * 100).to(dtype)
    query, mask = random(2, 3, 8, seed=7).float(), torch.ones(2, 3, dtype=torch.bool)
    exact = torch.einsum("btw,cgw->btc", query.double(), keys.double()).amax(1)
    documents, scores = select_documents([query], mask, [keys], torch.arange(4001), 20, unit=False)
    values, wanted = exact.topk(20)
    assert documents.equal(wanted) and torch.allclose(scores.double(), values, rtol=1e-5)


@pytest.mark.parametrize("documents", [
    [[2, 0]], [[-1, -1]], [[4, 1, -1], [-1, -1, -1], [0, 3, 2]], [[1], [3]], [[4, 3, 2, 1, 0, -1, -1]],
])
def test_document_slots(documents):
    """A question would read another document's chunks, miss a chunk,
    or read them out of the order of their documents."""
    offsets = [0, 1, 3, 4, 8, 10]
    index, slots, owner = document_slots(torch.tensor(documents), torch.tensor(offsets))
    assert index.shape == owner.shape == (len(documents), slots.max()) and index.dtype == torch.int64
    for b, row in enumerate(documents):
        expected = [chunk for m in sorted(row) if m >= 0 for chunk in range(offsets[m], offsets[m + 1])]
        assert index[b, :slots[b]].tolist() == expected
        owners = [m for m in sorted(row) if m >= 0 for _ in range(offsets[m], offsets[m + 1])]
        assert [row[k] for k in owner[b, :slots[b]]] == owners
        assert owner[b].ge(0).all()
        assert index[b].ge(0).all() and index[b].lt(10).all()  # what is not read must still be a row


# ------------------------------------------------------------------------------------------------------------
# Attention

@pytest.mark.parametrize("H, G, D", HEADS)
@pytest.mark.parametrize("T, past", [(1, 0), (5, 0), (1, 4), (3, 2)])
@pytest.mark.parametrize("slots, prefix_length",
                         [(None, 0), ([0, 0, 0], 0), ([3, 0, 1], 0), ([3, 3, 2], 2), ([1, 2, 3], 9)])
@pytest.mark.parametrize("biased", [False, True])
def test_sparse_attention(H, G, D, T, past, slots, prefix_length, biased):
    """Attention, or a gradient of it, would see the wrong memory slots, the future, the wrong head,
    or memory from the prefix."""
    inputs = [random(3, T, H, D, seed=1)]
    inputs += [random(3, T + past, G, D, seed=2), random(3, T + past, G, D, seed=3)]
    chosen = []
    if slots is not None:
        inputs += [random(5, G, D, seed=4), random(5, G, D, seed=5)]
        inputs[3][0] += 10  # row 0 is what unused slots point at: it must not be read through them
        inputs[4][0] += 10
        index = torch.tensor([[2, 4, 1], [4, 2, 3], [3, 1, 4]])[:, :max(slots)]
        beyond = torch.arange(max(slots)) >= torch.tensor(slots)[:, None]
        chosen = [index.masked_fill(beyond, 0), torch.tensor(slots), prefix_length]
        if biased:  # what stands beyond a question's slots must not matter
            chosen.append((4 * random(3, max(slots), seed=6)).masked_fill(beyond, torch.nan))
    inputs = [x.requires_grad_() for x in inputs]
    output, expected = sparse_attention(*inputs, *chosen), attention_by_hand(*inputs, *chosen)
    close(output, expected, 1e-10)
    for actual, wanted in zip(gradients(output, inputs), gradients(expected, inputs)):
        close(actual, wanted, 1e-10)


def test_sparse_attention_fp32():
    """Single precision would not reach the usual 1e-5."""
    shapes = [(2, 3, 6, 10), (2, 3, 2, 10), (2, 3, 2, 10), (4, 2, 10), (4, 2, 10)]
    inputs = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    chosen = [torch.tensor([[0, 3], [1, 0]]), torch.tensor([2, 1]), 1]
    output = sparse_attention(*(x.float() for x in inputs), *chosen)
    assert output.dtype == torch.float32
    close(output, attention_by_hand(*inputs, *chosen), 1e-5)


# ------------------------------------------------------------------------------------------------------------
# The Triton kernels: numbers in the interpreter, machine code by the compiler, on any machine

TESTS = Path(__file__).resolve().parent
DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(msa_kernel, "KERNEL", "triton")


def within(errors, dtype):
    forward, gradient = kernel_checks.TOLERANCE[dtype]
    assert errors[0] <= forward and errors[1] <= gradient, errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", kernel_checks.POOL)
def test_pool_kernel(case, dtype, kernels):
    """Pooled chunks, or their gradients, would differ from means over slices in double precision."""
    within(kernel_checks.check_pool(case, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", kernel_checks.ROUTE)
def test_route_kernel(case, dtype, kernels):
    """Scores would miss a token, a tile or a document's chunk, count a masked token,
    or send a gradient to a pair that did not win."""
    within(kernel_checks.check_route(case, dtype), dtype)


@pytest.mark.parametrize("case", kernel_checks.ROUTE)
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_route_of_int8_keys(case, kernel, monkeypatch):
    """A chunk's scale would be forgotten, or applied to another chunk."""
    if kernel == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(msa_kernel, "KERNEL", kernel)
    assert kernel_checks.check_route(case, torch.float32, int8=True)[0] <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", kernel_checks.ATTEND)
def test_attention_kernel(case, dtype, kernels):
    """Attention, or a gradient of it, would see wrong slots, the future, the wrong head,
    memory from the prefix; or lose a shared chunk."""
    within(kernel_checks.check_attention(case, dtype), dtype)


@pytest.mark.parametrize("case", kernel_checks.ROWS)
def test_attention_of_rows(case, kernels):
    """Rows of different lengths would see what lies behind them, another row, another branch, or another
    question's slots; a part of the keys would be lost, or one that nobody sees be counted."""
    within(kernel_checks.check_rows(case, torch.float32), torch.float32)


def test_kernels_of_zero_are_zero(kernels):
    """The unit length of a zero vector would be NaN where the reference has zero."""
    test_pool_chunks_of_zero_is_zero()


def test_route_kernel_of_equal_chunks_is_equal(kernels):
    """Ties would not be ties: a chunk's score would depend on the tile it lies in."""
    query, key = group_queries(random(2, 3, 4, 16), 2), unit_keys(1, 2, 16).float()
    mask = torch.ones(2, 3, dtype=torch.bool)
    alone = route(query, mask, key, torch.tensor([0, 1]))
    for chunks in (3, 64, 65):
        scores = route(query, mask, key.repeat(chunks, 1, 1), torch.arange(chunks + 1))
        assert scores.equal(alone.expand(2, chunks))


def test_quantize():
    """int8 keys would be off by more than half a step, or a zero chunk would divide by zero."""
    keys = unit_keys(5, 2, 6).float()
    keys[3] = 0
    quantized, scales = quantize(keys)
    assert quantized.dtype == torch.int8 and scales.shape == (5,)
    assert quantized.abs().amax((1, 2)).tolist() == [127, 127, 127, 0, 127]
    assert ((quantized * scales[:, None, None] - keys).abs() <= scales[:, None, None] * 0.5001).all()


def launch(**changes):
    """A launch of attention in which one argument is wrong."""
    x = dict(query=torch.zeros(1, 2, 4, 16), keys=torch.zeros(1, 2, 2, 16), values=torch.zeros(1, 2, 2, 16),
             memory_keys=torch.zeros(3, 2, 16), memory_values=torch.zeros(3, 2, 16),
             index=torch.tensor([[0, 2]]), slots=torch.tensor([2]))
    return sparse_attention(**(x | changes))


@pytest.mark.parametrize("wrong, message", [
    (dict(query=torch.zeros(1, 2, 3, 16)), "query has 3 heads and 2 tokens, keys 2 and 2"),
    (dict(query=torch.zeros(1, 3, 4, 16)), "query has 4 heads and 3 tokens, keys 2 and 2"),
    (dict(query=torch.zeros(1, 2, 4, 16).double()), "query is torch.float64; a Triton kernel takes"),
    (dict(query=torch.zeros(1, 2, 4, 512), keys=torch.zeros(1, 2, 2, 512)),
     "the head size is 512; the Triton kernels take at most 256"),
    (dict(keys=torch.zeros(1, 2, 16, 2).transpose(2, 3)),
     r"keys is not contiguous, its strides are \(64, 32, 1, 2\)"),
    (dict(values=torch.zeros(1, 3, 2, 16)), r"values has shape \(1, 3, 2, 16\); it must be \(1, 2, 2, 16\)"),
    (dict(memory_values=torch.zeros(2, 2, 16)),
     r"memory_values has shape \(2, 2, 16\); it must be \(3, 2, 16\)"),
    (dict(index=torch.tensor([[0, 2]], dtype=torch.int32)), "index is torch.int32"),
    (dict(bias=torch.zeros(1, 3)), r"bias has shape \(1, 3\); it must be \(1, 2\)"),
])
def test_launchers_refuse(wrong, message, kernels):
    """A kernel would read what is not there: an address says nothing about shapes, types and strides."""
    launch()
    with pytest.raises(ValueError, match=message):
        launch(**wrong)


@pytest.mark.parametrize("keys, scales, message", [
    (torch.zeros(3, 2, 16, dtype=torch.int8), torch.zeros(2), r"scales has shape \(2,\); it must be \(3,\)"),
    (torch.zeros(3, 2, 16), torch.zeros(3), "scales belong to int8 routing keys; these are torch.float32"),
    (torch.zeros(3, 2, 8), None, r"query has shape \(1, 2, 32\); it must be \(1, 2, 16\)"),
])
def test_route_refuses(keys, scales, message, kernels):
    """Scales that do not belong to the keys would be read as if they did."""
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.bool), keys, torch.arange(4), scales)


def test_dispatch(monkeypatch):
    """A CPU would be sent to Triton without being asked, or a misspelled wish be taken for none."""
    pytest.importorskip("triton")
    x = torch.zeros(1)
    monkeypatch.setattr(msa_kernel, "KERNEL", "auto")
    assert not msa_kernel.use_triton(x)
    monkeypatch.setattr(msa_kernel, "KERNEL", "tritn")
    with pytest.raises(UserError, match="MSA_KERNEL is 'tritn'; it must be auto, torch or triton"):
        msa_kernel.use_triton(x)
    monkeypatch.setattr(msa_kernel, "KERNEL", "triton")
    assert msa_kernel.use_triton(x)
    monkeypatch.setattr(msa_kernel, "triton", None)
    with pytest.raises(UserError, match="triton is not installed"):
        msa_kernel.use_triton(x)


@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_compile(arch):
    """A kernel would not compile for an A100 or an H100, spill registers, ask for more shared memory than
    there is; or routing would spend its instructions on other things than loading and multiplying."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    ran = subprocess.run([sys.executable, script, arch, "--json"], env=environment, capture_output=True,
                         text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)
    assert len({row["kernel"] for row in rows}) == 11 and all(row["registers"] <= 255 for row in rows)
    loops = {(row["keys"], row["tile"]): row["loop"] for row in rows if row["kernel"] == "route_chunks"}
    tiles = [loop for (keys, tile), loop in loops.items() if keys in ("bf16", "i8")]
    assert len(tiles) == 15 and 0 < min(tiles) and max(tiles) < 200, loops
    assert max(loops["bf16", "16x1x128x64"], loops["i8", "16x1x64x128"]) < 100, loops
