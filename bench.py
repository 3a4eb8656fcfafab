"""Speed of a memory layer's operations, training and banks, each beside its peers and its limit, in one run.

    python bench.py route|attend|pool|train|memory|load|all [--json FILE] [--device cuda]
    python bench.py plan config/qwen3-4b.toml [--gpus 8] [--mfu 0.4] [--max-steps 500 ...]
    python bench.py linear [--shape demo|smollm2] [--json FILE] [--plot FILE.png]

The limit of an operation is floor = max(bytes / bandwidth, operations / rate). Bandwidth is what summing a
large tensor reads per second, rate what a large matrix product of the same type does. Both take turns with
the operation and its peers, so that other work slows all alike. `floor/time` is 1 for a perfect kernel.
Multiplying and adding are 2 operations; W = G * D:

    route     bytes: C * W keys, read once. Operations: 2 * B * T * W * C. Peers: the authors' form (keys
              copied to every query head, heads x tokens x chunks stored), and each head by itself, keys
              shared. `same 16`: how many of the first question's 16 documents the authors' form finds too,
              with float32 keys. On a CPU many questions of many tokens meet fewer chunks
    attend    bytes: queries, outputs, local keys and values, memory rows that were selected, each once.
              Operations: 4 * D for each head of a token and key that it sees; with gradients 14 * D, thrice
              the bytes. Peer, the reference: gather the rows, then scaled_dot_product_attention with a mask
    pool      bytes: three inputs read, three outputs written; with gradients twice. Peer: the reference
    train     an optimizer step at the demo's and at Qwen3-0.6B's shape. Bytes: what AdamW reads and writes,
              28 a weight. Operations: costs.operations. Peer: the same with MSA_KERNEL=torch.
              `loss within`: the largest relative difference of the two losses over 20 steps on one seed
    memory    the demo's bank on disk (not where only torch, triton and numpy are installed): opening, asking,
              cold (not in the page cache) and warm; a document added and removed. Then random contents of
              Qwen3-4B's shape, as much as fits: a question beside one reading of all routing keys; and,
              of SmolLM2's shape too, the paper's mode, where each memory layer selects, beside shared mode:
              4 layers route once for all
    load      not part of `all`: a random checkpoint of Qwen3-4B's shape (8.5 GB, in a temporary folder) is
              loaded in bfloat16 by a process of its own, which then answers. Limit: the size of its weights
    plan      not part of `all`: nothing is measured. Bytes and hours of a configuration of train.py on H100
              GPUs of 80 GB, term by term; the formulas: costs.plan. Its settings are flags here, too
    linear    not part of `all`: one training step, and one question, of MSA beside full attention by the
              same model over the same documents, 2K tokens and doubling while a step takes under two
              minutes, on a GPU five seconds: time, and memory beside weights and gradients; fitted exponents,
              crossing, ratios

On a CPU the reference does the work, and has no peer but itself. `memory`, `load` and, on a CPU, `linear`
need Linux.
"""
import argparse  # not tyro: this runs where only torch, triton and numpy are installed
import dataclasses
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import costs
import msa_kernel as K
import routing as R
from cache import Cache
from checkpoint import INDEX, find_base
from common import (
    UserError,
    autocast,
    check_drawing,
    check_output,
    command_line,
    detect_device,
    keep_freed_memory,
    main,
    peak_memory,
    proc_bytes,
    timed,
    write_json,
)
from costs import PEAK, compare, linear, plan, plot, print_plan, random_pool
from memory_bank import Bank, Layout, Writer
from memory_parallel import ParallelMemory, Ranks, to_numpy, to_records
from model import MSA, ModelConfig

H, G, D = 32, 8, 128  # Qwen3-4B's heads


def take_turns(runs, device, turns=7):
    """Median seconds of several calls (name -> call) that take turns; fewer for those that take seconds."""
    if device.type == "cuda":
        from triton.testing import do_bench
        median = lambda run: do_bench(run, warmup=50, rep=200, return_mode="median") / 1e3
        return {name: median(run) for name, run in runs.items()}
    times = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            if turn < 3 or sum(times[name]) < 2:
                times[name].append(timed(run)[0])
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first is a warm-up


class Bench:
    """What all measurements share: the device, the probes of its limits, the rows until now."""

    SIZES = {"cuda": (2 ** 29, 8192), "cpu": (2 ** 26, 2048)}  # numbers to read, side of matrices

    def __init__(self, device):
        self.device, self.rows, self.cuda = device, [], device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32  # of attention, pooling and training
        size, self.side = self.SIZES[device.type]
        self.large = torch.randn(size, device=device)

    def measure(self, title, ours, peers, bytes, operations, dtype, note=""):
        """Time `ours` and `peers` (name -> call) in turns with the probes; print and keep a row."""
        a = torch.randn(self.side, self.side, device=self.device).to(dtype)
        probes = dict(read=self.large.sum, product=lambda: a @ a)
        times = take_turns({"ours": ours, **peers, **probes}, self.device)
        read, rate = self.large.nbytes / times["read"], 2 * self.side ** 3 / times["product"]
        seconds = times["ours"]
        floor = max(bytes / read, operations / rate) / seconds
        limit = "bytes" if bytes / read > operations / rate else "operations"
        ratios = {name: times[name] / seconds for name in peers}
        beside = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        print(f"{title:38} {1e3 * seconds:9.3f} ms   floor/time {floor:.2f} ({limit})   {beside}  {note}",
              flush=True)
        self.rows.append(dict(
            what=title, seconds=seconds, floor_over_time=floor, peers_over_ours=ratios, bytes=bytes,
            operations=operations, of_read_bandwidth=bytes / seconds / read, read=read, rate=rate, note=note))

    def reference(self, run):
        """A peer: the same call by the PyTorch reference, without kernels; none where that runs anyway."""
        def by_reference():
            before, K.KERNEL = K.KERNEL, "torch"
            try:
                return run()
            finally:
                K.KERNEL = before
        return {"reference": by_reference} if K.use_triton(torch.empty(0, device=self.device)) else {}


# ------------------------------------------------------------------------------------------------------------

def scores_as_published(queries, keys):
    """The authors' engine: keys copied to every head, all scores stored: (T, H, D), (C, G, D) -> (C,)."""
    copied = keys.repeat_interleave(queries.size(1) // keys.size(1), 1)  # (C, H, D)
    scores = torch.einsum("thd,chd->htc", queries, copied)
    return scores.float().mean(0).amax(0)


def scores_per_head(queries, keys):
    """Each head by itself, the heads of a group sharing keys: (G, R * T, D) @ (G, D, C)."""
    T, heads, _ = queries.shape
    C, groups, size = keys.shape
    grouped = queries.view(T, groups, heads // groups, size).permute(1, 2, 0, 3).reshape(groups, -1, size)
    return (grouped @ keys.permute(1, 2, 0)).float().view(heads, T, C).mean(0).amax(0)


@torch.no_grad()
def bench_route(bench, most, cases):
    """B questions of T tokens (cases: pairs) against chunks that are documents of their own, at most `most`;
    keys are fp32, bf16 and int8."""
    device = bench.device
    print(f"route: {most:,} chunks x {G} heads x {D}, {H} query heads")
    full = torch.empty(most, G, D, device=device)
    for part in full.split(2 ** 16):
        part.copy_(F.normalize(torch.randn(part.shape, device=device), dim=-1))
    for B, T in cases:
        chunks = most if bench.cuda else min(most, 2 ** 24 // (B * T))
        stored = B == 1 and T <= 64  # the peers store H * T scores of every chunk
        offsets, held = torch.arange(chunks + 1, device=device), full[:chunks]
        queries = torch.randn(B, T, H, D, device=device)
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        grouped, unit = R.group_queries(queries, G), F.normalize(queries[0], dim=-1)
        scores = torch.cat([scores_as_published(unit, part) for part in held.split(2 ** 16)])
        published = set(scores.topk(16).indices.tolist())
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            keys, scales = R.quantize(held) if dtype == torch.int8 else (held.to(dtype), None)
            peers = {"authors": lambda: scores_as_published(unit.to(dtype), keys).topk(16),
                     "per-head": lambda: scores_per_head(unit.to(dtype), keys).topk(16)}
            run = lambda: R.select_documents([grouped], mask, [keys], offsets, 16, [scales])
            documents, _ = run()
            same = len(published & set(documents[0].tolist()))
            product = torch.bfloat16 if dtype == torch.int8 else dtype
            bench.measure(f"route {str(dtype)[6:]}, {B} x {T} tokens, {chunks:,} chunks", run,
                          peers if stored and dtype != torch.int8 else {}, keys.nbytes,
                          2 * B * T * G * D * chunks, product, f"same 16: {same}")


# name, questions, tokens, past, with gradients
ATTEND = [("prefill", 1, 1024, 0, False), ("prefill", 16, 64, 0, False), ("decode", 1, 1, 1024, False),
          ("decode", 32, 1, 1024, False), ("training", 32, 128, 0, True)]


def bench_attend(bench, cases, slots=128, chunks=1024):
    """Questions over 128 slots each (16 documents of 8 chunks) of 1,024 shared chunks, and own tokens."""
    device, dtype = bench.device, bench.dtype
    print(f"attend: {H} query heads, {G} key heads x {D}, {slots} memory slots, {str(dtype)[6:]}")
    for name, B, T, past, training in cases:
        shapes = [(B, T, H, D), (B, past + T, G, D), (B, past + T, G, D), (chunks, G, D), (chunks, G, D)]
        inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_(training) for shape in shapes]
        index = torch.stack([torch.randperm(chunks, device=device)[:slots].sort().values for _ in range(B)])
        filled = torch.full((B,), slots, device=device)
        gradient, starts = torch.randn(B, T, H, D, device=device).to(dtype), filled * 0 + past

        def run():
            if name == "decode":  # of rows that lie in a cache, as interleave decodes
                return K.attend_rows(*inputs[:3], None, starts, past + T, T, *inputs[3:], index, filled)
            output = K.sparse_attention(*inputs, index, filled)
            return torch.autograd.grad(output, inputs, gradient) if training else output

        seen = T * slots + T * past + T * (T + 1) // 2  # keys that a question's tokens see, of a head
        numbers = 2 * inputs[0].numel() + 2 * inputs[1].numel() + 2 * index.unique().numel() * G * D
        bench.measure(f"attend {name}, {B} x {T} tokens, past {past}", run, bench.reference(run),
                      numbers * dtype.itemsize * (3 if training else 1),
                      (14 if training else 4) * D * H * B * seen, dtype)


def bench_pool(bench, documents, length=1024):
    """Keys, values and routing keys of full documents into chunks of 64."""
    device, dtype = bench.device, bench.dtype
    print(f"pool: {documents} documents x {length} tokens, {G} heads x {D}, {str(dtype)[6:]}")
    new = lambda *shape: [torch.randn(*shape, G, D, device=device).to(dtype) for _ in range(3)]
    for training in (False, True):
        inputs = [x.requires_grad_(training) for x in new(documents, length)]
        gradients = new(documents * -(-length // 64))
        lengths = torch.full((documents,), length, device=device)

        def run():
            pooled = K.pool_chunks(*inputs, lengths, 64)
            return torch.autograd.grad(pooled, inputs, gradients) if training else pooled

        title = "pool with gradients" if training else "pool forward"
        bytes = 3 * (inputs[0].nbytes + gradients[0].nbytes) * (2 if training else 1)
        bench.measure(title, run, bench.reference(run), bytes, 0, dtype)


# ------------------------------------------------------------------------------------------------------------

DEMO = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, qk_norm=True, top_k=8, score_bias=True)
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3, head_dim=64, rope_theta=1e5)
QWEN3_06B = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                 num_attention_heads=16, num_key_value_heads=8, head_dim=128, qk_norm=True, rope_theta=1e6)
QWEN3_4B = dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                num_attention_heads=H, num_key_value_heads=G, head_dim=D, qk_norm=True, rope_theta=5e6)
# name, configuration, documents x tokens, questions x tokens
TRAIN = [("demo", DEMO, 32, 40, 48, 32), ("Qwen3-0.6B", QWEN3_06B, 64, 128, 32, 64)]


def bench_train(bench, cases, steps=20):
    """An optimizer step over one pool: forward, backward, AdamW."""
    device, dtype = bench.device, bench.dtype
    print(f"train: {str(dtype)[6:]} products, float32 weights")
    for name, options, *shape in cases:
        config = ModelConfig(**options)
        documents, _, batches = pool = random_pool(config, *shape, device)

        def start():
            torch.manual_seed(1)
            with device:
                model = MSA(config)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

            def step():
                with autocast(device, dtype):
                    losses = model(*pool)
                loss = losses["lm"] + losses["aux"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return float(loss.detach())
            return step

        step, other, note = start(), bench.reference(start()), ""
        curve = [step() for _ in range(steps)]
        if other:
            apart = max(abs(loss - other["reference"]()) / loss for loss in curve)
            note = f"loss within {apart:.0e} over {steps} steps"
        with torch.device("meta"):
            weights = sum(p.numel() for p in MSA(config).parameters())
        lengths = [*map(len, documents)]
        tokens = sum(lengths) + sum(batch["tokens"].numel() for batch in batches)
        # Bytes: AdamW reads a weight, its gradient and two moments, and writes all but the gradient
        bench.measure(f"train {name}, {tokens:,} tokens", step, other, 28 * weights,
                      costs.operations(config, lengths, costs.sizes(batches)), dtype, note)


# ------------------------------------------------------------------------------------------------------------

SHAPE = Layout("random", 18, G, D, 18, G, D)  # Qwen3-4B: the upper half of 36 layers
SMALL = Layout("random", 15, 3, 64, 15, 3, 64)  # SmolLM2-135M
GPU_KEYS = 10e9  # bytes of routing keys on a GPU: far more than its cache, and opened in seconds
DOCUMENTS = (("full chunks", 64, 1), ("75-token passages", 75, 2))  # kind; tokens, chunks of one


class RandomBank:
    """A bank in the host's memory with random contents: what memory_parallel needs of one, without texts."""

    def __init__(self, layout, documents, chunks_per_document):
        self.layout, self.state, self.numbers = layout, 0, np.arange(documents)
        self.chunks = np.full(documents, chunks_per_document, np.int32)
        self.digests, self.segment_of, self.row_of = np.zeros((3, documents), np.int32)
        dtype, size = (torch.bfloat16, 1) if layout.content == "bfloat16" else (torch.int8, 40)
        shape = (documents * chunks_per_document, layout.layers, 2, layout.kv_heads, layout.head_dim)
        self.held, self.reads = torch.empty(shape, dtype=dtype), 0
        parts = self.held.flatten(0, 1).split(4096)
        block = (size * torch.randn(parts[0].shape)).to(dtype)  # again and again: drawing takes longest
        for part in parts:
            part.copy_(block[:len(part)])
        keys = torch.randn(4096, layout.routing_heads, layout.routing_dim)
        self.keys = F.normalize(keys, dim=-1).bfloat16()
        int8_scales = np.full((chunks_per_document, layout.layers, 2), 0.03, np.float32)
        self.scales = int8_scales if layout.content == "int8" else None

    def __len__(self):
        return len(self.numbers)

    def plan(self, positions):
        return np.arange(self.chunks[positions].sum())

    def routing_keys(self, layer, plan):
        for rows in np.split(plan, range(4096, len(plan), 4096)):
            yield rows, lambda _, rows=rows: to_numpy(self.keys[:len(rows)])

    def content(self, position):
        self.reads += 1
        rows = slice(position * self.chunks[0], (position + 1) * self.chunks[0])
        return to_numpy(self.held[rows]), self.scales


def bench_random_memory(bench, fraction=0.5):
    """Qwen3-4B's shape: a question's routing and fetching in 18 memory layers, for as many chunks as fit."""
    device, tokens, top_k = bench.device, 16, 16
    query = R.group_queries(torch.randn(1, tokens, H, D, device=device), G)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    for kind in ("bfloat16", "int8"):
        layout = dataclasses.replace(SHAPE, content=kind)
        keys, content = layout.chunk_bytes(kind)  # bytes of a chunk
        free = fraction * proc_bytes("meminfo", "MemAvailable")
        chunks = int(free / (content if bench.cuda else keys + content))
        if bench.cuda:
            torch.cuda.empty_cache()
            chunks = min(chunks, int(GPU_KEYS / keys))
        for name, length, each in DOCUMENTS:
            bank = RandomBank(layout, chunks // each, each)
            memory = ParallelMemory(bank, device, Ranks(device), kind)
            run = lambda memory=memory: ask(memory, query, mask, top_k, shared=False)
            held = int(bank.chunks.sum())
            sizes = lambda n: f"keys {keys * n / 1e9:.1f} GB, content {content * n / 1e9:.1f} GB"
            title = f"memory {kind}, {held / each * length / 1e6:,.1f}M tokens, {name}"
            note = f"random contents; {sizes(held)}, peak {peak_memory(device)}; "
            note += f"100M tokens: {sizes(1e8 / length * each)}"
            operations = 2 * tokens * SHAPE.layers * G * D * held
            bench.measure(title, run, {}, keys * held, operations, torch.bfloat16, note)
            del memory, bank, run


def ask(memory, query, mask, top_k, shared):
    """What a question asks of a memory: one selection for all layers, or one in each."""
    memory.kept.clear()  # what another question brought is of no use
    layout = memory.bank.layout
    if shared:
        queries = dict.fromkeys(range(layout.routing_layers), query)
        memory.select(queries, mask, top_k, range(layout.layers))
    else:
        for i in range(layout.layers):
            memory.select({i: query}, mask, top_k, [i])


class BesideAnEmptyRank(Ranks):
    """This process as one of two, of which the other holds no document: collectives are counted."""

    collectives = 0

    def gather(self, x):
        self.collectives += 1
        return torch.stack([x, torch.full_like(x, float("-inf"))])  # no score, and no number from 0 on

    def sum(self, x):
        self.collectives += 1
        return x

    agree = sum


def bench_modes(bench, name, shape, fraction=0.25, top_k=16):
    """A question in the paper's mode and in shared mode: what it reads, asks and costs. shape: a Layout."""
    device = bench.device
    keys, content = shape.chunk_bytes()
    chunks = int(fraction * proc_bytes("meminfo", "MemAvailable") / (keys + content))
    if bench.cuda:
        chunks = min(chunks, int(GPU_KEYS / keys))
    for mode, layers, tokens in (("paper's mode", shape.routing_layers, 16), ("shared mode", 4, 1)):
        layout = dataclasses.replace(shape, routing_layers=layers)
        query = torch.randn(1, tokens, 4 * layout.routing_heads, layout.routing_dim, device=device)
        query = R.group_queries(query, layout.routing_heads)
        mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
        bank = RandomBank(layout, chunks // 16, 16)  # 1,024 tokens a document
        memory, shared = ParallelMemory(bank, device, Ranks(device)), mode == "shared mode"
        run = lambda memory=memory: ask(memory, query, mask, top_k, shared)
        alone, beside = memory.ranks, BesideAnEmptyRank(device)
        beside.world, memory.ranks = 2, beside
        run()
        memory.ranks, counted, reads = alone, beside.collectives, bank.reads
        held, keys = int(bank.chunks.sum()), layout.chunk_bytes()[0]
        note = (f"{layers} routing layers, {tokens} routing tokens; {counted} collectives, {reads} content "
                f"reads; keys {keys * held / 1e9:.2f} GB; 100M tokens: {keys * 1e8 / 64 / 1e9:.1f} GB")
        operations = 2 * tokens * layers * layout.routing_heads * layout.routing_dim * held
        title = f"memory {name}, {mode}, {held * 64 / 1e6:,.1f}M tokens"
        bench.measure(title, run, {}, keys * held, operations, torch.bfloat16, note)
        bench.rows[-1] |= dict(collectives=counted, content_reads=reads, routing_key_bytes=keys * held)
        del memory, bank, run


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
    from prompts import load_checkpoint
    from sync import sync
    from tasks import Words, make_memory
    device = bench.device
    model, tokenizer = load_checkpoint(Path(__file__).parent / "checkpoints/demo", device)
    ranks = Ranks(device)
    texts, asked = make_memory(Words(), "niah_multikey", lengths[-1] // 20, questions, 1)
    ends = np.cumsum([len(tokenizer.document(10000, text)) for text in tokenizer.encode_batch(texts)])
    documents = [Document(text, f"d{i}", 1, 1, f"d{i}") for i, text in enumerate(texts)]
    last = tokenizer.encode(texts[-1])
    names = " ".join(f"{name:>9}" for name in TIMES)
    print(f"{'bank: tokens':>12} {'documents':>9} {'encode t/s':>10} {names}   (ms)")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        fill = lambda count: sync(model, tokenizer, folder, documents[:count], ranks)
        open_bank = lambda: ParallelMemory(Bank(folder), device, ranks)
        answer = lambda memory, question: answer_question(
            model, tokenizer, memory, memory.texts, question.text, InterleaveConfig())
        fill(20)
        answer(open_bank(), asked[0])  # kernels are compiled once
        before = 0
        for count in np.searchsorted(ends, lengths, side="right").tolist():
            tokens, times = int(ends[count - 1]), {}
            seconds, _ = timed(lambda: fill(count))
            speed, before = (tokens - before) / seconds, tokens
            drop_caches(folder)
            times["open cold"], memory = timed(open_bank)
            drop_caches(folder)
            times["ask cold"], _ = timed(lambda: answer(memory, asked[0]))
            times["open warm"], memory = timed(open_bank)
            answers = [timed(lambda: answer(memory, question)) for question in asked]
            times["ask warm"] = statistics.median(seconds for seconds, _ in answers)
            number = int(memory.bank.next_number)
            encoded = model.encode([tokenizer.document(number, last)], [number])
            records = to_records(encoded, [last], ["new"], [1], [1], memory.bank.layout)
            with Writer(folder) as writer:
                times["add one"], _ = timed(lambda: writer.add(records))
                times["follow"], _ = timed(memory.refresh)
                assert len(memory) == count + 1
                times["remove"], _ = timed(lambda: writer.remove([number]))
            memory.refresh()
            assert len(memory) == count
            cells = " ".join(f"{1e3 * times[name]:>9.1f}" for name in TIMES)
            print(f"{tokens:>12,} {count:>9,} {speed:>10,.0f} {cells}", flush=True)
            disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            bench.rows.append(dict(what="bank", tokens=tokens, documents=count, disk_bytes=disk,
                                   encode_tokens_per_second=speed, peak=peak_memory(device), seconds=times))


def bench_load(bench):
    """Loading a large checkpoint beside the size of its weights, in a process of its own."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        model, folder, files = MSA(ModelConfig(**QWEN3_4B)).bfloat16(), Path(folder), {}
        layer_of = lambda name: re.match(r"model\.layers\.\d+|", name)[0]
        shards = dict.fromkeys(map(layer_of, model.state_dict()))  # one for each layer and one for the rest
        for i, layer in enumerate(shards):
            tensors = {name: torch.randn(x.shape, dtype=x.dtype, device="cpu") * x.shape[-1] ** -0.5
                       for name, x in model.state_dict().items() if layer_of(name) == layer}
            save_file(tensors, folder / f"model-{i}.safetensors")
            files |= dict.fromkeys(tensors, f"model-{i}.safetensors")
        write_json(folder / INDEX, {"weight_map": files})
        model.save_config(folder)
        code = f"import bench; bench.load_and_answer({str(folder)!r}, {str(bench.device)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              cwd=Path(__file__).parent)
        if done.returncode:
            raise RuntimeError(done.stderr)
        row = json.loads(done.stdout)
    print(f"load: {row['bytes'] / 1e9:.2f} GB of weights in {len(shards)} shards, {row['seconds']:.1f} s; "
          f"peak {row['peak'] / 1e9:.2f} GB ({row['peak'] / row['bytes']:.3f} of them, "
          f"{row['before'] / 1e9:.2f} GB before); 4 tokens over 4 documents {row['answer_seconds']:.1f} s",
          flush=True)
    bench.rows.append(dict(what="load", shards=len(shards), **row))


@torch.no_grad()
def load_and_answer(folder, device):
    """What bench_load runs in a process of its own: load, answer, print a row."""
    device, before = torch.device(device), proc_bytes("self/status", "VmHWM")
    seconds, model = timed(lambda: MSA.from_pretrained(folder, device, torch.bfloat16))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else proc_bytes("self/status", "VmHWM")
    began = time.perf_counter()
    memory = model.encode([torch.arange(100 * i, 100 * i + 90) for i in range(1, 5)])
    tokens, cache = torch.arange(50, 70, device=device)[None], Cache()
    logits = model.read(tokens, memory, torch.ones_like(tokens, dtype=torch.bool), cache).logits
    for _ in range(4):
        logits = model.read(logits[:, -1:].argmax(-1), cache=cache).logits
    assert logits.isfinite().all()
    print(json.dumps(dict(peak=peak, before=before, bytes=sum(p.nbytes for p in model.parameters()),
                          seconds=seconds, answer_seconds=time.perf_counter() - began)))


GPU_BYTES = 80e9  # of an H100


def bench_linear(bench, shape, shortest, longest, path):
    """Training steps and questions against full attention: a table, and what it says."""
    torch.manual_seed(1)
    config = ModelConfig(**(SMOLLM2 if shape == "smollm2" else DEMO))
    model = MSA(config).to(bench.device)
    free = 0.8 * (torch.cuda.mem_get_info()[0] if bench.cuda else proc_bytes("meminfo", "MemAvailable"))
    with autocast(bench.device, bench.dtype):
        bench.rows = linear(model, 5 if bench.cuda else 120, longest, free, shortest)
    bench.rows += [dict(what="compared", text=line) for line in compare(bench.rows)]
    print("\n".join(row["text"] for row in bench.rows if row["what"] == "compared"))
    if path:
        plot([row for row in bench.rows if "kind" in row], f"{shape}'s shape", path)


def bench_memory(bench):
    """Memories: banks on disk, where there is what they need, and of random contents."""
    if importlib.util.find_spec("safetensors") and importlib.util.find_spec("wonderwords"):
        bench_bank(bench)
    bench_random_memory(bench)
    bench_modes(bench, "Qwen3-4B", SHAPE)
    bench_modes(bench, "SmolLM2-135M", SMALL)


def whole_numbers(text):
    """What a flag lists."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}; give whole numbers with commas between, such as 1,8,64")
    return [int(number) for number in text.split(",")]


def arguments():
    """The flags, and what is left of them for train.py's configuration. Raises UserError."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("route", "attend", "pool", "train", "memory", "load", "plan",
                                         "linear", "all"))
    parser.add_argument("config", nargs="?", help="to plan: a configuration of train.py")
    parser.add_argument("--gpus", type=int, default=8, help="to plan")
    parser.add_argument("--mfu", type=float, default=0.4, help="to plan: share of the peak that is reached")
    parser.add_argument("--shape", default="demo", choices=("demo", "smollm2"), help="of linear's model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of linear's products; on a GPU "
                        "bfloat16, else float32")
    parser.add_argument("--shortest", type=int, default=2048, help="tokens, of linear, a multiple of 64")
    parser.add_argument("--longest", type=int, default=2 ** 20, help="tokens, of linear")
    parser.add_argument("--plot", default="", type=os.path.expanduser, help="of linear: a .png file")
    parser.add_argument("--json", default="", type=os.path.expanduser,
                        help="write a file, or into a folder, named by the device")
    parser.add_argument("--chunks", type=int, default=0, help="to route; default 200,000, on a GPU 1,048,576")
    parser.add_argument("--questions", type=whole_numbers, help="to route; default 1, on a GPU 1,8,64")
    parser.add_argument("--tokens", type=whole_numbers,
                        help="of a question to route; default 16, on a GPU 1,16,64,512")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args, settings = parser.parse_known_args()
    if (settings or args.config) and args.what != "plan":
        parser.error(f"unknown here: {' '.join([args.config or '', *settings])}")
    for what, names in (("linear", "shape dtype plot shortest longest"), ("plan", "gpus mfu"),
                        ("route all", "chunks questions tokens")):
        for name in names.split():
            if args.what not in what.split() and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} is not about {args.what}; leave it out")
    check_drawing(args.plot)
    check_output("--plot", args.plot)
    if not Path(args.json).is_dir():
        check_output("--json", args.json, args.plot)
    if args.chunks and args.chunks < 1000 or min([*(args.questions or [1]), *(args.tokens or [1])]) < 1:
        raise UserError("--chunks is at least 1000, --questions and --tokens are at least 1")
    if args.what == "plan" and args.json:
        raise UserError("plan measures nothing that --json could hold; leave it out")
    if args.shortest < 64 or args.shortest % 64 or args.longest < args.shortest:
        raise UserError(f"--shortest is {args.shortest} and --longest {args.longest}; the first must be a "
                        "multiple of 64, the second not less")
    return args, settings


def print_plan_of(args, settings):
    """`plan` of a configuration of train.py. Raises UserError."""
    from train import TrainConfig, changes_of  # here: they need more than torch, triton and numpy

    if not (args.gpus > 0 and 0 < args.mfu <= 1):
        raise UserError(f"--gpus is {args.gpus} and --mfu {args.mfu}; at least 1, and above 0 up to 1")
    config = command_line(TrainConfig, __doc__, [*([args.config] if args.config else []), *settings])
    if config.init_from and config.model.vocab_size == ModelConfig().vocab_size:  # it has no sizes
        loaded = MSA.read_config(find_base(config.init_from))[0]
        config.model = dataclasses.replace(loaded, **changes_of(config, loaded))
    peak = PEAK["H100"]
    print_plan(plan(config, args.gpus, GPU_BYTES, args.mfu, peak), GPU_BYTES, args.mfu, peak)


def script():
    args, settings = arguments()
    if args.what == "plan":
        return print_plan_of(args, settings)
    keep_freed_memory()
    device, _, reason = detect_device(args.device)
    if device.type == "mps":
        device, reason = torch.device("cpu"), f"{reason}, which is not timed here"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    kernels = "Triton" if K.use_triton(torch.empty(0, device=device)) else "PyTorch"
    print(f"device: {name} ({reason}); torch {torch.__version__}; kernels: {kernels}")
    torch.manual_seed(1)
    bench, path = Bench(device), Path(args.json)
    if args.what == "linear" and args.dtype:
        bench.dtype = getattr(torch, args.dtype)
    if path.is_dir():
        path /= f"{'gpu' if bench.cuda else 'bench'}-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    chunks, questions = (2 ** 20, (1, 8, 64)) if bench.cuda else (200_000, (1,))
    tokens = (1, 16, 64, 512) if bench.cuda else (16,)
    cases = [(B, T) for B in args.questions or questions for T in args.tokens or tokens]
    runs = dict(route=lambda: bench_route(bench, args.chunks or chunks, cases),
                attend=lambda: bench_attend(bench, ATTEND),
                pool=lambda: bench_pool(bench, 64 if bench.cuda else 8),
                train=lambda: bench_train(bench, TRAIN if bench.cuda else TRAIN[:1]),
                memory=lambda: bench_memory(bench), load=lambda: bench_load(bench),
                linear=lambda: bench_linear(bench, args.shape, args.shortest, args.longest, args.plot))
    for what, run in runs.items():
        if args.what == what or args.what == "all" and what not in ("load", "linear"):
            run()
            if args.json:  # after each: what a later one cannot do does not lose it
                write_json(path, dict(device=name, torch=torch.__version__, kernels=kernels, rows=bench.rows))
                print(f"wrote {path}")
            if bench.cuda:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main(script)
