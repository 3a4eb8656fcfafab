"""Speed of routing, beside its peers and its limit, in one run.

    python bench.py route [--json out/bench.json]

The limit on this machine is floor = max(bytes / bandwidth, operations / rate): the bytes that must be read once (C * W routing keys), the
multiplications and additions that must be done (2 * T * W * C); bandwidth is what summing a large tensor reads per second, rate what
a large matrix product of the same type does, both measured in this run. `floor/time` is 1 for a perfect kernel. `same 16`: how many of the
16 documents found are those of the authors' form in float32 on the same keys (for int8 on the keys before rounding).
"""
import argparse  # not tyro: this runs where only torch, triton and numpy are installed
import statistics
import time

import torch
import torch.nn.functional as F

import msa_kernel as K
from common import detect_device, main, write_json


def seconds(run, device, repeats=7):
    """The median time of a call, after one that does not count."""
    run()
    if device.type == "cuda":
        from triton.testing import do_bench
        return do_bench(run, warmup=50, rep=300, return_mode="median") / 1e3
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ceilings(device, dtypes):
    """What this machine reaches: bytes/s read and copied, operations/s of a matrix product in each type."""
    big = torch.randn(2 ** (29 if device.type == "cuda" else 27), device=device)
    other, size = torch.empty_like(big), 8192 if device.type == "cuda" else 2048
    found = {"read": big.nbytes / seconds(lambda: big.sum(), device), "copy": 2 * big.nbytes / seconds(lambda: other.copy_(big), device)}
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(dtype)
        found[str(dtype)] = 2 * size ** 3 / seconds(lambda: a @ a, device)
    return found


def report(rows, title, ours, peers, floor, note=""):
    """Print one operation: our time, the share of the limit, how many times as long each peer takes."""
    ratios = {name: peer / ours for name, peer in peers.items()}
    print(f"{title:44} {1e3 * ours:9.2f} ms  floor/time {floor / ours:.2f}  "
          f"{'  '.join(f'{name} {ratio:.2f}x' for name, ratio in ratios.items())}  {note}", flush=True)
    rows.append(dict(what=title, seconds=ours, floor=floor, peers_over_ours=ratios, note=note))


# ---------------------------------------------------------------------------------------------------------------------

def scores_as_published(queries, keys):
    """The authors' engine: keys copied to every query head, (heads, tokens, chunks) stored. queries (T, H, D), keys (C, G, D) -> (C,)."""
    copied = keys.repeat_interleave(queries.size(1) // keys.size(1), 1)                  # (C, H, D)
    scores = torch.einsum("thd,chd->htc", queries, copied)
    return scores.float().mean(0).amax(0)


def scores_per_head(queries, keys):
    """Each head by itself, the heads of a group sharing keys: (G, R * T, D) @ (G, D, C)."""
    T, H, D = queries.shape
    C, G, _ = keys.shape
    grouped = queries.view(T, G, H // G, D).permute(1, 2, 0, 3).reshape(G, -1, D)
    return (grouped @ keys.permute(1, 2, 0)).float().view(H, T, C).mean(0).amax(0)


def bench_route(device, chunks, rows):
    """Qwen3-4B's routing: 32 query heads, 8 key heads of 128; one question."""
    H, G, D = 32, 8, 128
    limits = ceilings(device, (torch.float32, torch.bfloat16))
    print(f"route: {chunks:,} chunks x {G} heads x {D}; " + ", ".join(f"{k} {v / 1e9:,.0f} G/s" for k, v in limits.items()))
    full = F.normalize(torch.randn(chunks, G, D, device=device), dim=-1)
    for T in (16, 64) if device.type == "cuda" else (16,):
        queries = torch.randn(1, T, H, D, device=device)
        grouped, unit = K.group_queries(queries, G), F.normalize(queries[0], dim=-1)
        mask, offsets = torch.ones(1, T, dtype=torch.bool, device=device), torch.arange(chunks + 1, device=device)
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            keys, scales = K.quantize(full) if dtype == torch.int8 else (full.to(dtype), None)
            run = lambda: K.select_documents(grouped, mask, keys, offsets, 16, scales)
            with torch.no_grad():
                ours, found = seconds(run, device), run()[0][0].tolist()
                peers = {}
                if scales is None:
                    for name, peer in (("authors", scores_as_published), ("per-head", scores_per_head)):
                        peers[name] = seconds(lambda: peer(unit.to(dtype), keys).topk(16), device, repeats=3)
                published = scores_as_published(unit, full if scales is not None else keys.float()).topk(16).indices.tolist()
            rate = limits[str(torch.bfloat16 if dtype == torch.int8 else dtype)]
            floor = max(keys.nbytes / limits["read"], 2 * T * G * D * chunks / rate)
            report(rows, f"route {str(dtype)[6:]}, {T} tokens", ours, peers, floor,
                   f"same 16: {len(set(found) & set(published))}; {keys.nbytes / ours / limits['read']:.2f} of read bandwidth")


def script():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("route",))
    parser.add_argument("--json", default="", help="write the numbers here")
    parser.add_argument("--chunks", type=int, default=0, help="of the memory that is routed; default 200,000, on a GPU 1,048,576")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    device, _, reason = detect_device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    kernels = "Triton" if K.use_triton(torch.empty(0, device=device)) else "PyTorch"
    print(f"device: {name} ({reason}); torch {torch.__version__}; kernels: {kernels}")
    torch.manual_seed(1)
    rows = []
    bench_route(device, args.chunks or (2 ** 20 if device.type == "cuda" else 200_000), rows)
    if args.json:
        write_json(args.json, dict(device=name, torch=torch.__version__, rows=rows))


if __name__ == "__main__":
    main(script)
