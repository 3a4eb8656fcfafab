"""The Triton kernels against an oracle in double precision, forward and gradients: cases and comparison.

    python tests/kernel_checks.py      # on a GPU: all cases and types; exit code 1 if one is wrong

tests/test_msa_kernel.py runs the same cases in Triton's interpreter on a CPU (float32 and float16: it has no
bfloat16). Imports torch and triton only. Oracle and kernel get the same inputs, rounded to the type under
test; errors are ||found - expected|| / ||expected||.
"""
import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import reference  # noqa: E402

import msa_kernel as K  # noqa: E402
import routing as R  # noqa: E402

# forward, gradients
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.float16: (2e-3, 1e-2), torch.bfloat16: (1e-2, 4e-2)}
# H, G, D: ratios 1, 2, 3 and 4
HEADS = [(1, 1, 16), (3, 1, 64), (8, 2, 96), (6, 2, 16), (4, 4, 128), (4, 2, 128)]

# lengths, chunk size, closing tokens, G, D
POOL = [([1], 64, 0, 1, 16), ([5, 1, 4, 3, 8, 9], 4, 0, 2, 96), ([1, 63, 64, 65, 129], 64, 0, 1, 128),
        ([7, 2, 5], 1, 0, 3, 10), ([5, 2, 6, 3, 8, 9], 4, 2, 2, 64), ([5, 68, 69, 70], 64, 5, 1, 16)]
# chunks of each document, questions, tokens, which of these route, (H, G, D): one or many questions in a tile
# of rows, or a question in several; more questions than one tile holds; an odd width
ROUTE = [([1], 1, 1, "all", HEADS[0]), ([1, 1, 1], 8, 3, "all", HEADS[1]),
         ([2, 1, 4, 3, 1], 3, 17, "some", HEADS[2]), ([3, 129, 2], 5, 16, "some", (1, 1, 27)),
         ([2, 1], 70, 1, "all", HEADS[0]), ([2, 2], 1, 130, "late", HEADS[0]),
         ([1, 1], 2, 65, "some", HEADS[0]), ([1, 2], 3, 20, "none", HEADS[3]),
         ([2, 70, 1], 2, 130, "some", HEADS[5])]
# tokens, past, slots of 3 questions (None: no memory), prefix, bias, (H, G, D)
ATTEND = [(1, 0, [3, 0, 1], 0, False, HEADS[0]), (1, 4, [1, 2, 3], 0, True, HEADS[1]),
          (5, 0, [0, 0, 0], 0, False, HEADS[2]), (5, 2, [3, 3, 2], 4, True, HEADS[3]),
          (3, 2, [1, 3, 2], 9, True, HEADS[4]), (70, 3, [70, 1, 65], 0, True, HEADS[0]),
          (23, 50, [3, 67, 0], 60, False, HEADS[3]), (6, 3, None, 0, False, HEADS[1]),
          (2, 70, [40, 33, 32], 0, False, HEADS[4]),
          # the largest tile, of training and prefill, at the head size of Qwen3
          (70, 3, [70, 1, 65], 5, True, HEADS[5]), (70, 0, None, 0, False, HEADS[5])]

# parts of a question's keys, tokens of a branch, memory, bias, rows in any order, D, R: rows of a cache
ROWS = [(1, 5, False, False, True, 24, 3), (2, 1, True, False, True, 24, 3), (4, 2, True, True, True, 24, 3),
        (None, 1, True, False, False, 128, 4)]  # decoding, as a whole batch does


def random(*shape, seed, dtype, device):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def compare(kernel, oracle, inputs):
    """Errors of a kernel's outputs and of its gradients of a fixed random projection, the worst of each:
    (forward, gradient)."""
    fast = [x.detach().clone().requires_grad_() for x in inputs]
    slow = [x.detach().cpu().double().requires_grad_() for x in inputs]
    found, expected = kernel(*fast), oracle(*slow)
    gradients, worst = [], []
    for outputs, inputs in ((found, fast), (expected, slow)):
        total = 0
        for i, x in enumerate(outputs):
            weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            total = total + (x.double().cpu() * weights).sum()
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else ())
    for pairs in (zip(found, expected), zip(*gradients)):
        errors = torch.tensor([error(a, b) for a, b in pairs] or [0.0])
        worst.append(float(errors.max()))  # not Python's max, which can lose a NaN
    return tuple(worst)


def error(found, expected):
    """||found - expected|| / ||expected||; an input that does not matter has no gradient or zero."""
    found, expected = (torch.zeros(1, dtype=torch.float64) if x is None else x.detach().double().cpu()
                       for x in (found, expected))
    norm = float(expected.norm())
    return float((found - expected).norm()) / (norm or 1.0)


def pool_by_hand(inputs, lengths, size, last):
    """What pool_chunks returns: means over slices, the third of unit length per head."""
    pooled = [torch.stack([reference.mean(chunk) for m, length in enumerate(lengths)
                           for chunk in reference.spans(list(x[m, :length]), size, last)]) for x in inputs]
    return *pooled[:2], pooled[2] / pooled[2].norm(dim=-1, keepdim=True)


def attention_by_hand(query, keys, values, memory_keys=None, memory_values=None, index=None, slots=None,
                      prefix_length=0, bias=None):
    """What sparse_attention returns, token by token."""
    rows, past = [], keys.size(1) - query.size(1)
    for b in range(len(query)):
        for t in range(query.size(1)):
            chunks = [] if index is None or past + t < prefix_length else index[b, :slots[b]].tolist()
            seen_keys = [memory_keys[c] for c in chunks] + list(keys[b, :past + t + 1])
            seen_values = [memory_values[c] for c in chunks] + list(values[b, :past + t + 1])
            rows.append(reference.attend(query[b, t], seen_keys, seen_values,
                                         [] if bias is None else bias[b, :len(chunks)].tolist()))
    return torch.stack(rows).view(query.shape)


def check_pool(case, dtype, device="cpu"):
    lengths, size, last, G, D = case
    inputs = [random(len(lengths), max(lengths) + 1, G, D, seed=i, dtype=dtype, device=device)
              for i in range(3)]
    for x in inputs:
        for m, length in enumerate(lengths):
            x[m, length:] = 100  # padding must not matter
    return compare(lambda *xs: K.pool_chunks(*xs, torch.tensor(lengths, device=device), size, last),
                   lambda *xs: pool_by_hand(xs, lengths, size, last), inputs)


def routes(kind, B, T):
    """(B, T): the tokens that route; of "none" only the first question has any, and those of "late" lie in
    the second tile."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.6
    mask[:, -1] = True
    if kind == "late":
        mask[:, :-2] = False
    if kind == "none":
        mask[1:] = False
    return mask | (kind == "all")


def check_route(case, dtype, device="cpu", int8=False):
    counts, B, T, kind, (_, G, D) = case
    offsets, mask = torch.tensor([0, *counts]).cumsum(0), routes(kind, B, T)
    query = random(B, T, G * D, seed=1, dtype=dtype, device=device).float()  # the kernels round it
    keys, scales = random(sum(counts), G, D, seed=2, dtype=dtype, device=device), None
    if int8:
        keys, scales = R.quantize(keys.float())
        (first, second), steps = R.split_query(query.view(B * T, G, D))
        query = ((first + second / 254) * steps[:, None, None]).view_as(query)

    def oracle(query, keys):
        best = [(query[b, mask[b]] @ keys.flatten(1).T).amax(0) for b in range(B) if mask[b].any()]
        return [torch.stack([torch.stack([part.amax() for part in row.split(counts)]) for row in best])]

    def kernel(query, keys=keys):
        scores = R.route(query, mask.to(device), keys, offsets.to(device), scales)
        assert scores[~mask.any(1).to(device)].eq(float("-inf")).all() and scores.dtype == torch.float32
        return [scores[mask.any(1).to(device)]]

    if int8:  # no gradients
        values = (keys.double() * scales[:, None, None]).cpu()
        return error(torch.cat(kernel(query)), torch.cat(oracle(query.double().cpu(), values))), 0.0
    return compare(kernel, oracle, [query, keys])


def check_attention(case, dtype, device="cpu"):
    T, past, slots, prefix, biased, (H, G, D) = case
    shapes = [(3, T, H, D), (3, T + past, G, D), (3, T + past, G, D)] + [(80, G, D)] * 2 * (slots is not None)
    inputs = [random(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes)]
    chosen = []
    if slots is not None:
        index = torch.stack([torch.randperm(79, generator=torch.Generator().manual_seed(b))[:max(slots)] + 1
                             for b in range(3)])
        beyond = torch.arange(max(slots)) >= torch.tensor(slots)[:, None]
        index = index.masked_fill(beyond, 0)
        bias = None
        if biased:
            bias = 4 * torch.randn(3, max(slots), generator=torch.Generator().manual_seed(9))
            bias = bias.masked_fill(beyond, torch.nan)
        with torch.no_grad():
            inputs[3][0] += 10  # what unused slots point at: it must not be read through them
        chosen = [index, torch.tensor(slots), prefix, bias]
    on_device = [x.to(device) if isinstance(x, torch.Tensor) else x for x in chosen]
    return compare(lambda *xs: [K.sparse_attention(*xs, *on_device)],
                   lambda *xs: [attention_by_hand(*xs, *chosen)], inputs)


def check_rows(case, dtype, device="cpu"):
    """Three questions of different lengths, in the first rows or anywhere; five tokens each, in branches."""
    parts, branch, memory, biased, anywhere, D, R = case
    rows, starts, slots, T = [3, 0, 1] if anywhere else [0, 1, 2], [0, 69, 30], [3, 70, 0], 5
    N, G, prefix = 90 if anywhere else 128, 2, 3
    H = G * R
    shapes = [(3, T, H, D), (4, N, G, D), (4, N, G, D), (90, G, D), (90, G, D)]
    inputs = [random(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes)]
    index = torch.randint(90, (3, 70), generator=torch.Generator().manual_seed(6))
    bias = torch.randn(3, 70, generator=torch.Generator().manual_seed(7)) if biased else None
    query, keys, values, memory_keys, memory_values = (x.double().cpu() for x in inputs)
    expected = []
    for b, (row, start) in enumerate(zip(rows, starts)):
        for t in range(T):
            sees = memory and start + t % branch >= prefix
            chunks = index[b, :slots[b]].tolist() if sees else []
            seen = [n for n in range(start + t + 1) if n < start or (n - start) // branch == t // branch]
            expected.append(reference.attend(
                query[b, t], [*memory_keys[chunks], *keys[row, seen]],
                [*memory_values[chunks], *values[row, seen]],
                bias[b, :len(chunks)].tolist() if biased else []))
    on_device = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x
    about = map(on_device, (torch.tensor(rows) if anywhere else None, torch.tensor(starts), 74, branch))
    chosen = map(on_device, (*inputs[3:], index, torch.tensor(slots), prefix, bias) if memory
                 else (None, None, None, None, 0, None))
    found = K.attend_split(*inputs[:3], *about, *chosen, parts=parts)
    return error(found, torch.stack(expected).view(found.shape)), 0.0


def judged(name, case, dtype, int8=False):
    """(whether a check is passed on a GPU, a line about it)."""
    check, options = globals()[name], dict(int8=True) if int8 else {}
    limits = (1e-4, 0.0) if int8 else TOLERANCE[dtype]
    try:
        errors = check(case, dtype, "cuda", **options)
    except Exception as error:  # the other checks are of use all the same
        return False, f"WRONG {name} {case} {dtype}: {type(error).__name__}: {error}"
    right = all(e <= limit for e, limit in zip(errors, limits))  # NaN is wrong
    kind = "int8" if int8 else dtype
    return right, (f"{'right' if right else 'WRONG'} {name} {case} {kind}: {errors[0]:.1e}, "
                   f"gradients {errors[1]:.1e}")


def script():
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device here; `make test` runs the same cases in Triton's interpreter")
    jobs = [(check.__name__, case, dtype)
            for check, cases in ((check_pool, POOL), (check_route, ROUTE), (check_attention, ATTEND),
                                 (check_rows, ROWS))
            for case in cases for dtype in TOLERANCE]
    jobs += [("check_route", case, torch.float32, True) for case in ROUTE]
    # Most of the time goes into compiling: several processes share it
    workers = max(1, min(12, (os.cpu_count() or 1) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(judged, *itertools.zip_longest(*jobs, fillvalue=False)))
    print("\n".join(line for _, line in results))
    failures = sum(not right for right, _ in results)
    print(f"{failures} of {len(results)} wrong on {torch.cuda.get_device_name()}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    script()
