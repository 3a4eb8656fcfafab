"""Speed of a memory layer's three operations and of a training step, each beside its peers and its limit, in one run.

    python bench.py route|attend|pool|train|memory|load|all [--json FILE] [--device cuda]

The limit of an operation on this machine is floor = max(bytes / bandwidth, operations / rate). Bandwidth is what summing a large tensor
reads per second, rate what a large matrix product of the same type does; both take turns with the operation and its peers, so that
other work on the machine slows all alike. `floor/time` is 1 for a perfect kernel. Multiplying and adding are 2 operations; W = G * D:

    route     bytes: C * W keys, read once.  operations: 2 * T * W * C.  Peers: the authors' form (keys copied to every query head,
              heads x tokens x chunks stored) and the form that scores each head by itself and shares the keys. `same 16`: how many
              of the 16 documents found are those of the authors' form in float32 on the same keys (for int8: before rounding)
    attend    bytes: queries, outputs, local keys and values, the memory rows that the questions selected, each once.
              operations: 4 * D for each head of a token and key that it sees; with gradients 14 * D, and bytes three times.
              Peer, and the reference itself: gather the rows, then PyTorch's scaled_dot_product_attention with a mask
    pool      bytes: three inputs read, three outputs written; with gradients twice. Peer: the reference
    train     one optimizer step at the demo's and at Qwen3-0.6B's shape. Peer: the same with MSA_KERNEL=torch. `loss within`: the largest
              relative difference of the two losses over 20 steps on one seed

    memory    banks. The demo checkpoint's on disk (not where only torch, triton and numpy are installed): opening and asking it, cold (its
              files dropped from the page cache) and warm, one document added and removed. Qwen3-4B's shape with random contents, made in
              memory as large as it fits: what a question costs beside one reading of all routing keys. `bytes` of 100M tokens as designed

    load      not part of `all`: a checkpoint of Qwen3-4B's shape with routers and random weights (8.5 GB, written shard by shard into a
              temporary folder) is loaded in bfloat16 by a process of its own, which then answers. Limit: the size of its weights

On a CPU the reference does the work, and the rows of the others have no peer but themselves.
"""
import argparse  # not tyro: this runs where only torch, triton and numpy are installed
import dataclasses
import importlib.util
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import msa_kernel as K
from common import autocast, detect_device, keep_freed_memory, main, write_json
from memory_bank import Bank, Layout, Writer
from memory_parallel import ParallelMemory, Ranks, to_records
from model import MSA, ModelConfig

H, G, D = 32, 8, 128  # Qwen3-4B's heads


def take_turns(runs, device, turns=7):
    """The median seconds of each of several calls, one after another, `turns` times over: fewer for those that take seconds."""
    if device.type == "cuda":
        from triton.testing import do_bench
        return {name: do_bench(run, warmup=50, rep=200, return_mode="median") / 1e3 for name, run in runs.items()}
    times = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            if turn < 3 or sum(times[name]) < 2:
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # the first call does not count


class Bench:
    """What all measurements share: the device, the probes of its limits, the rows found so far."""

    SIZES = {"cuda": (2 ** 29, 8192), "cpu": (2 ** 26, 2048)}  # numbers that are read and copied, side of the matrices

    def __init__(self, device):
        self.device, self.rows, self.cuda = device, [], device.type == "cuda"
        size, self.side = self.SIZES[device.type]
        self.large = torch.randn(size, device=device)
        self.other = torch.empty_like(self.large)

    def measure(self, title, ours, peers, bytes, operations, dtype, note=""):
        """Time `ours` and `peers` (name -> call) in turns with the probes; print and keep a row."""
        a = torch.randn(self.side, self.side, device=self.device).to(dtype)
        probes = {"read": lambda: self.large.sum(), "copy": lambda: self.other.copy_(self.large), "product": lambda: a @ a}
        times = take_turns({"ours": ours, **peers, **probes}, self.device)
        read, copy, rate = self.large.nbytes / times["read"], 2 * self.large.nbytes / times["copy"], 2 * self.side ** 3 / times["product"]
        floor = max(bytes / read, operations / rate)
        ratios = {name: times[name] / times["ours"] for name in peers}
        print(f"{title:38} {1e3 * times['ours']:9.3f} ms   floor/time {floor / times['ours']:.2f} "
              f"({'bytes' if bytes / read > operations / rate else 'operations'})   "
              f"{'  '.join(f'{name} {ratio:.2f}x' for name, ratio in ratios.items())}  {note}", flush=True)
        self.rows.append(dict(what=title, seconds=times["ours"], floor_over_time=floor / times["ours"], peers_over_ours=ratios,
                              bytes=bytes, operations=operations, of_read_bandwidth=bytes / times["ours"] / read, read=read, copy=copy,
                              rate=rate, note=note))


def reference(run):
    """The same call with the PyTorch reference in place of the kernels."""
    def by_reference(*args):
        before, K.KERNEL = K.KERNEL, "torch"
        try:
            return run(*args)
        finally:
            K.KERNEL = before
    return by_reference


def reference_peer(bench, run):
    """The reference as a peer, where it is not what runs anyway."""
    return {"reference": reference(run)} if K.use_triton(torch.empty(0, device=bench.device)) else {}


# ---------------------------------------------------------------------------------------------------------------------

def scores_as_published(queries, keys):
    """The authors' engine: keys copied to every query head, (heads, tokens, chunks) stored. queries (T, H, D), keys (C, G, D) -> (C,)."""
    copied = keys.repeat_interleave(queries.size(1) // keys.size(1), 1)                  # (C, H, D)
    scores = torch.einsum("thd,chd->htc", queries, copied)
    return scores.float().mean(0).amax(0)


def scores_per_head(queries, keys):
    """Each head by itself, the heads of a group sharing keys: (G, R * T, D) @ (G, D, C)."""
    T, heads, _ = queries.shape
    C, groups, size = keys.shape
    grouped = queries.view(T, groups, heads // groups, size).permute(1, 2, 0, 3).reshape(groups, -1, size)
    return (grouped @ keys.permute(1, 2, 0)).float().view(heads, T, C).mean(0).amax(0)


@torch.no_grad()
def bench_route(bench, chunks, tokens):
    """One question against every chunk, each a document of its own, with fp32, bf16 and int8 keys."""
    device, offsets = bench.device, torch.arange(chunks + 1, device=bench.device)
    print(f"route: {chunks:,} chunks x {G} heads x {D}, {H} query heads")
    full = torch.empty(chunks, G, D, device=device)
    for part in full.split(2 ** 16):
        part.copy_(F.normalize(torch.randn(part.shape, device=device), dim=-1))
    for T in tokens:
        queries, mask = torch.randn(1, T, H, D, device=device), torch.ones(1, T, dtype=torch.bool, device=device)
        grouped, unit = K.group_queries(queries, G), F.normalize(queries[0], dim=-1)
        published = torch.cat([scores_as_published(unit, part) for part in full.split(2 ** 16)]).topk(16).indices.tolist()
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            keys, scales = K.quantize(full) if dtype == torch.int8 else (full.to(dtype), None)
            run, peers = lambda: K.select_documents(grouped, mask, keys, offsets, 16, scales), {}
            if scales is None:
                peers = {name: lambda peer=peer: peer(unit.to(dtype), keys).topk(16)
                         for name, peer in (("authors", scores_as_published), ("per-head", scores_per_head))}
            same = len(set(run()[0][0].tolist()) & set(published))
            bench.measure(f"route {str(dtype)[6:]}, {T} tokens", run, peers, keys.nbytes, 2 * T * G * D * chunks,
                          torch.bfloat16 if dtype == torch.int8 else dtype, f"same 16: {same}")


# name, questions, tokens, past, with gradients
ATTEND = [("prefill", 1, 1024, 0, False), ("prefill", 16, 64, 0, False), ("decode", 1, 1, 1024, False), ("decode", 32, 1, 1024, False),
          ("training", 32, 128, 0, True)]


def bench_attend(bench, cases, slots=128, chunks=1024):
    """Questions over 128 slots each (16 documents of 8 chunks) of 1,024 chunks that they share, and their own tokens."""
    device, dtype = bench.device, torch.bfloat16 if bench.cuda else torch.float32
    print(f"attend: {H} query heads, {G} key heads x {D}, {slots} memory slots, {str(dtype)[6:]}")
    for name, B, T, past, training in cases:
        new = lambda *shape: torch.randn(*shape, device=device).to(dtype).requires_grad_(training)
        inputs = [new(B, T, H, D), new(B, past + T, G, D), new(B, past + T, G, D), new(chunks, G, D), new(chunks, G, D)]
        index = torch.stack([torch.randperm(chunks, device=device)[:slots].sort().values for _ in range(B)])
        full, gradient = torch.full((B,), slots, device=device), torch.randn(B, T, H, D, device=device).to(dtype)

        def run():
            output = K.sparse_attention(*inputs, index, full)
            return torch.autograd.grad(output, inputs, gradient) if training else output

        seen = T * slots + T * past + T * (T + 1) // 2                                   # keys that a question's tokens see, of a head
        rows = index.unique().numel()
        bytes = (2 * inputs[0].numel() + 2 * inputs[1].numel() + 2 * rows * G * D) * dtype.itemsize * (3 if training else 1)
        bench.measure(f"attend {name}, {B} x {T} tokens, past {past}", run, reference_peer(bench, run), bytes,
                      (14 if training else 4) * D * H * B * seen, dtype)


def bench_pool(bench, documents, length=1024):
    """Keys, values and routing keys of full documents into chunks of 64."""
    device, dtype = bench.device, torch.bfloat16 if bench.cuda else torch.float32
    print(f"pool: {documents} documents x {length} tokens, {G} heads x {D}, {str(dtype)[6:]}")
    for training in (False, True):
        inputs = [torch.randn(documents, length, G, D, device=device).to(dtype).requires_grad_(training) for _ in range(3)]
        lengths = torch.full((documents,), length, device=device)
        gradients = [torch.randn(documents * -(-length // 64), G, D, device=device).to(dtype) for _ in range(3)]

        def run():
            pooled = K.pool_chunks(*inputs, lengths, 64)
            return torch.autograd.grad(pooled, inputs, gradients) if training else pooled

        bytes = 3 * (inputs[0].nbytes + gradients[0].nbytes) * (2 if training else 1)
        bench.measure(f"pool {'with gradients' if training else 'forward'}", run, reference_peer(bench, run), bytes, 0, dtype)


# ---------------------------------------------------------------------------------------------------------------------

DEMO = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            qk_norm=True, top_k=8, score_bias=True)
QWEN3_06B = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=128, qk_norm=True, rope_theta=1e6)
# name, configuration, documents x tokens, questions x tokens
TRAIN = [("demo", DEMO, 32, 40, 48, 32), ("Qwen3-0.6B", QWEN3_06B, 64, 128, 32, 64)]


def random_pool(config, documents, length, questions, tokens, device):
    """One pool for MSA.forward: documents and questions of random tokens, each about one document."""
    ids = lambda *shape: torch.randint(0, config.vocab_size, shape, device=device)
    target = torch.zeros(questions, tokens, dtype=torch.bool, device=device)
    target[:, tokens // 2:] = True
    positive = torch.zeros(questions, documents, dtype=torch.bool, device=device)
    positive[torch.arange(questions), torch.arange(questions) % documents] = True
    batch = dict(tokens=ids(questions, tokens), routing_mask=~target, target_mask=target, positive=positive,
                 answers=torch.zeros(questions, dtype=torch.bool, device=device), appended=torch.zeros_like(positive))
    return list(ids(documents, length).cpu()), list(range(documents)), [batch]


def bench_train(bench, cases, steps=20):
    """An optimizer step over one pool: forward, backward, AdamW."""
    device, dtype = bench.device, torch.bfloat16 if bench.cuda else torch.float32
    print(f"train: {str(dtype)[6:]} products, float32 weights")
    for name, options, *sizes in cases:
        config = ModelConfig(**options)

        def start():
            torch.manual_seed(1)
            model = MSA(config).to(device)
            pool, optimizer = random_pool(config, *sizes, device), torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

            def step():
                with autocast(device, dtype):
                    losses = model(*pool)
                (losses["lm"] + losses["aux"]).backward()
                optimizer.step()
                optimizer.zero_grad()
                return float((losses["lm"] + losses["aux"]).detach())
            return step

        step, other = start(), reference_peer(bench, start())
        curves = [[run() for _ in range(steps)] for run in (step, *other.values())]
        apart = max(abs(a - b) / b for a, b in zip(*curves)) if other else 0.0
        weights = sum(p.numel() for p in MSA(config).parameters())
        tokens = sizes[0] * sizes[1] + sizes[2] * sizes[3]
        bench.measure(f"train {name}, {tokens:,} tokens", step, other, 28 * weights, 6 * weights * tokens, dtype,
                      f"loss within {apart:.0e} over {steps} steps" if other else "")


# ---------------------------------------------------------------------------------------------------------------------

SHAPE = Layout("random", 18, G, D)  # Qwen3-4B: the upper half of 36 layers
CHUNKS_PER_TOKEN = {"full chunks": 1 / 64, "75-token passages": 2 / 75}


class RandomBank:
    """A bank in the host's memory whose contents are random: what memory_parallel needs of one, without documents."""

    def __init__(self, layout, chunks, chunks_per_document):
        documents = chunks // chunks_per_document
        self.layout, self.state, self.numbers, self.digests = layout, 0, np.arange(documents), np.zeros(documents, np.uint64)
        self.chunks = np.full(documents, chunks_per_document, np.int32)
        self.segment_of, self.row_of, self.tile = np.zeros(documents, np.int32), np.arange(documents), None
        size = (layout.layers, chunks, 2, layout.kv_heads, layout.head_dim)
        self.held = torch.empty(size, dtype=torch.bfloat16 if layout.content == "bfloat16" else torch.int8)
        for part in self.held.flatten(0, 1).split(4096):
            part.copy_(torch.randn(part.shape, dtype=torch.bfloat16) * (1 if layout.content == "bfloat16" else 40))
        self.scales = np.full((chunks_per_document, 2), 0.03, np.float32) if layout.content == "int8" else None

    def __len__(self):
        return len(self.numbers)

    def plan(self, positions):
        return np.arange(self.chunks[positions].sum())

    def routing_keys(self, layer, rows):
        for start in range(0, len(rows), 4096):
            keys = F.normalize(torch.randn(min(4096, len(rows) - start), self.layout.kv_heads, self.layout.head_dim), dim=-1)
            yield rows[start:start + 4096], keys.bfloat16().view(torch.uint16).numpy()

    def content(self, layer, position):
        rows = slice(position * self.chunks[0], (position + 1) * self.chunks[0])
        found = self.held[layer, rows]
        return (found.view(torch.uint16) if found.dtype == torch.bfloat16 else found).numpy(), self.scales


def bench_random_memory(bench, fraction=0.5, tokens=16, top_k=16):
    """Qwen3-4B's shape: a question's routing and fetching in all 18 memory layers, for as many chunks as fit."""
    device, free = bench.device, fraction * free_bytes()
    query = K.group_queries(torch.randn(1, tokens, H, D, device=device), G)
    mask, vector = torch.ones(1, tokens, dtype=torch.bool, device=device), SHAPE.layers * G * D
    for kind in ("bfloat16", "int8"):
        layout = dataclasses.replace(SHAPE, content=kind)
        keys, content = layout.chunk_bytes(kind)
        if bench.cuda:
            torch.cuda.empty_cache()
            on_device = fraction * 1.6 * torch.cuda.mem_get_info()[0]
            chunks = int(min(on_device / keys, free / content))
        else:
            chunks = int(free / (keys + content))
        for name, each in CHUNKS_PER_TOKEN.items():
            M = chunks // 2 if name != "full chunks" else chunks
            bank = RandomBank(layout, M * (chunks // M), chunks // M)
            memory = ParallelMemory(bank, device, Ranks(device), kind, "disk")          # its "disk" is the host's memory
            run = lambda memory=memory: [memory.select(layer, query, mask, top_k) for layer in range(SHAPE.layers)]
            held = int(bank.chunks.sum())
            bench.measure(f"memory {kind}, {held / each / 1e6:,.1f}M tokens, {name}", run, {}, keys * held,
                          2 * tokens * vector * held, torch.bfloat16,
                          f"random contents; keys {keys * held / 1e9:.1f} GB, content {content * held / 1e9:.1f} GB, peak {peak(device)}; "
                          f"100M tokens: keys {keys * each / 10:.1f} GB, content {content * each / 10:.1f} GB")
            del memory, bank, run


def free_bytes():
    """Memory that a new program can have without swapping."""
    return 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])


def peak(device):
    """The most memory that this process has held."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = f" and {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the device" if device.type == "cuda" else ""
    return f"{host / 1e9:.1f} GB{device}"


def drop_caches(folder):
    """Ask the kernel to forget what it has of the files below a folder: the next read comes from the disk."""
    for path in filter(Path.is_file, Path(folder).rglob("*")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


TIMES = ("open cold", "open warm", "ask cold", "ask warm", "add one", "follow", "remove")


def bench_bank(bench, lengths=(1 << 16, 1 << 18, 1 << 20), questions=20):
    """The demo checkpoint over banks on disk: a table of times against tokens."""
    from documents import Document
    from interleave import InterleaveConfig, answer_question
    from sample import load_checkpoint, sync
    from tasks import Words, make_memory
    device = bench.device
    model, tokenizer = load_checkpoint(Path(__file__).parent / "checkpoints/demo", device)
    ranks, words = Ranks(device), Words()
    texts, asked = make_memory(words, "niah_multikey", lengths[-1] // 20, questions, 1)
    ends = np.cumsum([len(tokenizer.document(10000, text)) for text in tokenizer.encode_batch(texts)])
    counts = np.searchsorted(ends, lengths, side="right")
    documents = [Document(text, f"d{i}", 1, 1, f"d{i}") for i, text in enumerate(texts)]
    seconds = lambda run: (time.perf_counter(), run(), time.perf_counter())
    print(f"{'bank: tokens':>12} {'documents':>9} {'encode t/s':>10} " + " ".join(f"{name:>9}" for name in TIMES) + "   (ms)")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        def opened():
            return ParallelMemory(Bank(folder), device, ranks)

        def answer(memory, question):
            return answer_question(model, tokenizer, memory, memory.texts, question.text, InterleaveConfig())

        before = 0
        sync(model, tokenizer, folder, documents[:20], ranks)
        answer(opened(), asked[0])  # kernels are compiled once
        for count in counts:
            began, _, ended = seconds(lambda: sync(model, tokenizer, folder, documents[:count], ranks))
            speed = (ends[count - 1] - before) / (ended - began)
            before, times = ends[count - 1], {}
            for name in ("cold", "warm"):
                if name == "cold":
                    drop_caches(folder)
                began, memory, ended = seconds(opened)
                times[f"open {name}"] = ended - began
                if name == "cold":
                    drop_caches(folder)
                found = [seconds(lambda: answer(memory, question)) for question in asked]
                times[f"ask {name}"] = found[0][2] - found[0][0] if name == "cold" else statistics.median(e - b for b, _, e in found)
            number = int(memory.bank.next_number)
            encoded = model.encode([torch.tensor(tokenizer.document(number, tokenizer.encode(texts[-1])))], [number])
            with Writer(folder) as writer:
                records = to_records(encoded, [tokenizer.encode(texts[-1])], ["new"], [(1, 1)], "bfloat16")
                began, _, ended = seconds(lambda: writer.add(records))
                times["add one"] = ended - began
                began, _, ended = seconds(memory.refresh)
                times["follow"] = ended - began
                assert len(memory) == count + 1
                began, _, ended = seconds(lambda: writer.remove([number]))
                times["remove"] = ended - began
            memory.refresh()
            assert len(memory) == count
            cells = " ".join(f"{1e3 * times[name]:>9.1f}" for name in TIMES)
            print(f"{ends[count - 1]:>12,} {count:>9,} {speed:>10,.0f} {cells}", flush=True)
            disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            bench.rows.append(dict(what="bank", tokens=int(ends[count - 1]), documents=int(count), encode_tokens_per_second=float(speed),
                                   disk_bytes=disk, peak=peak(device), seconds=times))


LOAD = dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=H, num_key_value_heads=G,
            head_dim=D, rope_theta=5e6, qk_norm=True)
LOADER = """
import json, re, sys, time, torch
from pathlib import Path
from model import MSA, Cache
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
device, began, before = torch.device(sys.argv[2]), time.perf_counter(), peak()
model = MSA.from_pretrained(sys.argv[1], device, torch.bfloat16)
loaded, peaked = time.perf_counter(), peak() if device.type == "cpu" else torch.cuda.max_memory_allocated()
with torch.no_grad():
    memory = model.encode([torch.arange(100 * i, 100 * i + 90) for i in range(1, 5)])
    tokens, cache, said = torch.arange(50, 70, device=device)[None], Cache(), []
    logits = model.read(tokens, memory, torch.ones_like(tokens, dtype=torch.bool), cache).logits
    for _ in range(4):
        said.append(int(logits[0, -1].argmax()))
        logits = model.read(torch.tensor([said[-1:]], device=device), cache=cache).logits
    assert logits.isfinite().all()
print(json.dumps(dict(peak=peaked, before=before, bytes=sum(p.nbytes for p in model.parameters()), seconds=loaded - began,
                      answer_seconds=time.perf_counter() - loaded)))
"""


def bench_load(bench, shape=LOAD):
    """Loading a large checkpoint beside the size of its weights, in a process of its own."""
    import subprocess

    from safetensors.torch import save_file

    import checkpoint
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        model, folder, shards, files = MSA(ModelConfig(**shape)), Path(folder), {}, {}
        for name in model.state_dict():  # a shard for each layer
            shards.setdefault(re.match(r"model\.layers\.\d+|", name)[0], []).append(name)
        for i, part in enumerate(shards.values()):
            files |= dict.fromkeys(part, f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors")
            draw = lambda x: torch.ones(x.shape, device="cpu") if x.ndim == 1 else torch.randn(x.shape, device="cpu") * x.shape[-1] ** -0.5
            save_file({name: draw(model.state_dict()[name]).bfloat16() for name in part}, folder / files[part[0]])
        write_json(folder / checkpoint.INDEX, {"weight_map": files})
        model.bfloat16().save_config(folder)
        done = subprocess.run([sys.executable, "-c", LOADER, str(folder), str(bench.device)], capture_output=True, text=True,
                              cwd=Path(__file__).parent)
        if done.returncode:
            raise RuntimeError(done.stderr)
        row = json.loads(done.stdout)
    print(f"load: {row['bytes'] / 1e9:.2f} GB of weights in {len(shards)} shards, {row['seconds']:.1f} s; peak {row['peak'] / 1e9:.2f} GB "
          f"({row['peak'] / row['bytes']:.3f} of them, {row['before'] / 1e9:.2f} GB before); a question over 4 documents and 4 tokens "
          f"{row['answer_seconds']:.1f} s", flush=True)
    bench.rows.append(dict(what="load", shards=len(shards), **row))


def script():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("route", "attend", "pool", "train", "memory", "load", "all"))
    parser.add_argument("--json", default="", help="write the numbers to this file, or into this folder under the device's name")
    parser.add_argument("--chunks", type=int, default=0, help="of the memory that is routed; default 200,000, on a GPU 1,048,576")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    keep_freed_memory()
    device, _, reason = detect_device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    kernels = "Triton" if K.use_triton(torch.empty(0, device=device)) else "PyTorch"
    print(f"device: {name} ({reason}); torch {torch.__version__}; kernels: {kernels}")
    torch.manual_seed(1)
    bench = Bench(device)
    if args.what in ("route", "all"):
        bench_route(bench, args.chunks or (2 ** 20 if bench.cuda else 200_000), (1, 16, 64) if bench.cuda else (16,))
    if args.what in ("attend", "all"):
        bench_attend(bench, ATTEND)
    if args.what in ("pool", "all"):
        bench_pool(bench, 64 if bench.cuda else 8)
    if args.what in ("train", "all"):
        bench_train(bench, TRAIN if bench.cuda else TRAIN[:1])
    if args.what in ("memory", "all"):
        if importlib.util.find_spec("safetensors") and importlib.util.find_spec("wonderwords"):
            bench_bank(bench)
        bench_random_memory(bench)
    if args.what == "load":
        bench_load(bench)
    if args.json:
        path = Path(args.json)
        if path.is_dir():
            path /= f"{'gpu' if bench.cuda else 'bench'}-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
        write_json(path, dict(device=name, torch=torch.__version__, kernels=kernels, rows=bench.rows))
        print(f"wrote {path}")


if __name__ == "__main__":
    main(script)
