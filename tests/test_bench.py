"""The benchmarks at toy sizes, on the reference and on the kernels: that they run, count what they claim and
need few packages."""
import json
import re
import subprocess
import sys

import pytest
import torch

import bench
import msa_kernel
from common import UserError

TRAIN = ("toy",
         dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, chunk_size=4, top_k=2, score_bias=True), 4, 6, 3, 8)


@pytest.fixture
def toy(monkeypatch):
    """A Bench whose probes and turns are small."""
    for name, value in (("H", 4), ("G", 2), ("D", 16)):
        monkeypatch.setattr(bench, name, value)
    take_turns = bench.take_turns
    monkeypatch.setattr(bench, "take_turns", lambda runs, device: take_turns(runs, device, turns=1))
    monkeypatch.setattr(bench.Bench, "SIZES", {"cpu": (1000, 64)})
    return bench.Bench(torch.device("cpu"))


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_all_benchmarks(toy, kernel, monkeypatch):
    """A GPU's half hour would end in a typing error; the kernels would race against themselves; training
    would follow another curve."""
    if kernel == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(msa_kernel, "KERNEL", kernel)
    bench.bench_route(toy, 100, [(3, 5), (1, 5)])
    bench.bench_attend(toy,
                       [("prefill", 2, 3, 1, False), ("decode", 2, 1, 4, False), ("training", 2, 5, 0, True)],
                       slots=3, chunks=8)
    bench.bench_pool(toy, 2, 70)
    bench.bench_train(toy, [TRAIN], steps=3)
    rows = list(toy.rows)
    assert len(rows) == 2 * 3 + 3 + 2 + 1
    assert all(row["seconds"] > 0 and row["floor_over_time"] > 0 for row in rows)
    assert rows[0]["note"] == rows[3]["note"] == "same 16: 16"
    assert [row["bytes"] for row in rows[:3]] == [100 * 32 * size for size in (4, 2, 1)]
    assert rows[0]["operations"] == 2 * 3 * 5 * 32 * 100
    # one token each sees 3 slots, 4 of the past and itself
    assert rows[7]["operations"] == 4 * 16 * 4 * 2 * (3 + 5)
    peers = {"reference"} if kernel == "triton" else set()
    assert [set(row["peers_over_ours"]) for row in rows[4:]] == [{"authors", "per-head"}, set()] + [peers] * 6
    assert msa_kernel.KERNEL == kernel
    if kernel == "triton":
        assert float(rows[-1]["note"].split()[2]) < 1e-5, rows[-1]["note"]


def test_memory_benchmarks(toy, monkeypatch):
    """Bytes of 100M tokens would be counted wrongly; a bank's times would be those of another."""
    monkeypatch.setattr(bench, "SHAPE",
                        bench.dataclasses.replace(bench.SHAPE, layers=2, kv_heads=2, head_dim=16,
                                                  routing_layers=2, routing_heads=2, routing_dim=16))
    bench.bench_random_memory(toy, fraction=1e6 / bench.proc_bytes("meminfo", "MemAvailable"))
    kinds = [row["what"].split(",")[0].split()[1] for row in toy.rows]
    assert kinds == ["bfloat16", "bfloat16", "int8", "int8"]
    # bytes of a chunk; int8 with scales
    for row, (keys, content) in zip(toy.rows, ((128, 256), (128, 256), (72, 144), (72, 144))):
        full = "full" in row["what"]
        assert row["bytes"] % keys == 0 and (row["bytes"] / keys + full) * (keys + content) >= 0.9e6 / 2
        each = 1 / 64 if full else 2 / 75
        sizes = f"100M tokens: keys {keys * each / 10:.1f} GB, content {content * each / 10:.1f} GB"
        assert sizes in row["note"]
    bench.bench_modes(toy, "toy", bench.SHAPE, fraction=1e6 / bench.proc_bytes("meminfo", "MemAvailable"),
                      top_k=3)
    paper, shared = toy.rows[4:]
    assert "paper's mode" in paper["what"] and "shared mode" in shared["what"]
    assert [row["collectives"] for row in (paper, shared)] == [2 * 2, 2]
    assert 3 <= paper["content_reads"] <= 2 * 3 and shared["content_reads"] == 3
    assert shared["routing_key_bytes"] == 2 * paper["routing_key_bytes"] == shared["bytes"]  # 4 layers and 2
    bench.bench_bank(toy, lengths=(2000, 4000), questions=2)
    for row, tokens in zip(toy.rows[6:], (2000, 4000)):
        assert tokens - 60 < row["tokens"] <= tokens
        assert set(row["seconds"]) == set(bench.TIMES)
        assert min(row["seconds"].values()) > 0


def test_command(monkeypatch, tmp_path, capsys):
    """`--json FOLDER` would not leave a file under the device's name."""
    monkeypatch.setattr(bench, "bench_pool", lambda made, documents: made.rows.append({"what": "pool"}))
    monkeypatch.setattr(sys, "argv", ["bench.py", "pool", "--device", "cpu", "--json", str(tmp_path)])
    bench.script()
    file, = tmp_path.iterdir()
    assert file.name == f"bench-{torch.get_num_threads()}-cpu-threads.json"
    assert json.loads(file.read_text())["rows"] == [{"what": "pool"}]
    assert f"wrote {file}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, error, message", [
    (["plan", "config/demo.toml", "--json", "p.json"], UserError, "plan measures nothing that --json"),
    (["linear", "--shortest", "100"], UserError, "--shortest is 100 and .*; the first must be a multiple"),
    (["train", "--plot", "curve.png"], SystemExit, "--plot is not about train; leave it out"),
    (["train", "--gpus", "2"], SystemExit, "--gpus is not about train; leave it out"),
    (["plan", "config/demo.toml", "--dtype", "float32"], SystemExit, "--dtype is not about plan"),
    (["route", "--questions", "1,,2"], SystemExit, "--questions: '1,,2'; give whole numbers with commas")])
def test_wrong_flags(monkeypatch, capsys, flags, error, message):
    """A file would not be written and nobody say so; or a length be another than the row says."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(error) as raised:
        bench.arguments()
    assert re.search(message, f"{raised.value}{capsys.readouterr().err}")


@pytest.mark.parametrize("module", ["bench", "tests/kernel_checks"])
def test_needs_only_torch(module):
    """`make gpu` would fail on a machine that has torch, triton and numpy only."""
    blocked = ("tyro", "safetensors", "tqdm", "tiktoken", "rustbpe", "wonderwords", "matplotlib", "bm25s",
               "pytest")
    path, name = ("tests", module.split("/")[1]) if "/" in module else (".", module)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
sys.path.insert(0, {path!r})
import {name}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=bench.__file__.rsplit("/", 1)[0],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
