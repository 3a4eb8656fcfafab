"""The training loop: resuming, ranks, the schedule, and checkpoints that survive what goes wrong."""
import dataclasses
import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed.fsdp  # before processes are forked: each would need seconds for it
import torch.distributed.nn
from conftest import on_ranks, run_as_rank
from safetensors.torch import load, load_file, save_file
from test_prompts import write
from torch.utils.flop_counter import FlopCounterMode

import msa_kernel
import pools
import prepare_data
import sample
import train
from costs import Held
from model import MSA, ModelConfig
from pools import Pools, collate
from train import TrainConfig, learning_rate, next_pool
from training_state import Log, read_state, write_state

ABOUT = "training_state/about.json"


def files_at(step, shards=1):
    """The names of a checkpoint's files."""
    return {"config.json", "model.safetensors", "tokenizer.tiktoken", "tokenizer_msa.json", "log.jsonl",
            ABOUT, *(f"training_state/{step:08d}-{i}-of-{shards}.safetensors" for i in range(shards))}


def put(files, folder):
    """Write what `files_of` read."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def draw(monkeypatch):
    """The real `plot`, which is left out otherwise: drawing takes longer than a training here."""
    real = train.plot
    monkeypatch.setattr(train, "plot", lambda *_: None)
    return lambda: monkeypatch.setattr(train, "plot", real)


@pytest.fixture
def fit(run, tiny, draw):
    """Train with the tiny configuration and these flags."""
    return lambda *flags: run(train, tiny / "tiny.toml", *flags)


@pytest.fixture(scope="module")
def whole(run, tiny, tmp_path_factory, files_of):
    """The files of a run that nothing interrupted: 8 steps over 4 pools, evaluated at steps 3, 6 and 8."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "plot", lambda *_: None)
        assert run(train, tiny / "tiny.toml", "--out", out).code == 0
    return files_of(out)


def read_log(files):
    return [json.loads(line) for line in files["log.jsonl"].splitlines()]


class Killed(BaseException):
    """Stands for what gives a program no time to save."""


def at_position(monkeypatch, position, action):
    """Do `action` when training asks for its pool at this position."""
    def observed(pools, at, *rest):
        if at == position and pools.folder.name == "train":
            action()
        return next_pool(pools, at, *rest)
    monkeypatch.setattr(train, "next_pool", observed)


# ------------------------------------------------------------------------------------------------------------
# A run

def test_what_a_run_writes(fit, tmp_path, draw, tokenizer, files_of):
    """A run would not leave the checkpoint, the log and the curves that its documentation names."""
    draw()
    result = fit("--out", tmp_path / "run", "--max-steps", 2)
    assert result.code == 0 and "done at step 2" in result.out and "Traceback" not in result.err
    tokens, held = re.search(r" s, ([\d,]+) tokens; a rank held ([\d.]+) GB at most", result.out).groups()
    assert int(tokens.replace(",", "")) > 100 and 0.05 < float(held) < 30  # not KiB as bytes
    files = files_of(tmp_path / "run")
    assert files.keys() == files_at(2) | {"curves.png"} and files["curves.png"].startswith(b"\x89PNG")
    model = MSA.from_pretrained(tmp_path / "run")
    assert (model.config.vocab_size, model.config.hidden_size, model.config.top_k) == (608, 16, 2)
    rows = read_log(files)
    assert [(row["step"], row["split"]) for row in rows] == [(1, "train"), (2, "train"), (2, "validation")]
    for row in rows:
        assert set(row) - {"norm"} == {"step", "split", "lm", "naming", "answer", "named", "answered", "aux",
                                       "top1", "chance", "recall"}
        # Recall of one memory layer and of the mean score; chance is 2 of 5 documents.
        assert len(row["recall"]) == 2 and row["chance"] == 0.4
        assert min(row["naming"], row["answer"]) < row["lm"] < max(row["naming"], row["answer"])
        # 4 samples name and 3 answer.
        assert {row["named"], row["answered"]} <= {0, 0.25, 0.5, 0.75, 1, 0.333333, 0.666667}
    assert "| naming " in result.out and f" {rows[0]['naming']:.3f} {rows[0]['named']:.2f} |" in result.out
    assert rows[0]["lm"] == pytest.approx(np.log(608), abs=0.1)  # an untrained model knows nothing


def test_training_with_kernels(fit, whole, tmp_path, monkeypatch, files_of):
    """The Triton kernels would train another model than the reference: the same seed must give
    the same losses, within 1e-4."""
    pytest.importorskip("triton")
    monkeypatch.setattr(msa_kernel, "KERNEL", "triton")
    calls, attend = [], msa_kernel.Attend.apply
    monkeypatch.setattr(msa_kernel.Attend, "apply", lambda *args: calls.append(1) or attend(*args))
    assert fit("--out", tmp_path, "--max-steps", 3).code == 0
    by_kernels, by_reference = read_log(files_of(tmp_path)), read_log(whole)
    assert calls and [row["step"] for row in by_kernels] == [1, 2, 3, 3]
    for found, expected in zip(by_kernels, by_reference):
        for name in ("lm", "naming", "answer", "aux", "recall", "top1"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_training_learns(fit, tmp_path, files_of):
    """Steps would not lower the loss: gradients would be lost, or samples not be what they say."""
    flags = ("--max-steps", 40, "--learning-rate", 0.02, "--evaluate-every", 100)
    assert fit("--out", tmp_path, *flags).code == 0
    losses = [row["lm"] for row in read_log(files_of(tmp_path)) if row["split"] == "train"]
    assert np.mean(losses[-4:]) < 0.6 * losses[0]


def test_shared_mode(run, fit, tmp_path, draw, files_of):
    """A model whose layers share a selection could not be trained, resumed, drawn, saved or asked; or its
    tokens' weights be lost on the way."""
    draw()
    model = ["--model.routing-layers", "0", "--model.query-reduction", "mean", "--model.routing-dim", 6,
             "--model.document-share", 0.5]
    assert fit("--out", tmp_path / "out", *model, "--max-steps", 5).code == 0
    state, = (tmp_path / "out" / "training_state").glob("*.safetensors")
    tensors = load_file(state)
    assert tensors["model.token_weights"].eq(1).all()
    tensors["model.token_weights"][3] = 0.25
    save_file(tensors, state)
    assert fit("--out", tmp_path / "out", *model, "--resume").code == 0
    rows = read_log(files_of(tmp_path / "out"))
    assert all(len(row["recall"]) == 2 and row["recall"][0] == row["recall"][1] for row in rows)
    trained = MSA.from_pretrained(tmp_path / "out")
    assert trained.model.token_weights[3] == 0.25 and trained.config.rankings == 1
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(("The amber birch lies by the sea.", "The grove heron lies inland.")):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    ask = ["--checkpoint", tmp_path / "out", "--documents", tmp_path / "texts", "--trace", "Where is it?"]
    in_bank, in_memory = run(sample, *ask, "--memory", tmp_path / "bank"), run(sample, *ask)
    assert in_bank.code == in_memory.code == 0, (in_bank.err, in_memory.err)
    assert "2 added" in in_bank.out and "round: routed to [" in in_bank.out
    assert in_bank.out.splitlines()[-1] == in_memory.out.splitlines()[-1]


@pytest.mark.parametrize("router_steps,flags,lm_weight,aux_weight", [
    (1, [], 0.1, 1.0), (1, ["--router-lm-weight", 0.75], 0.75, 1.0), (1, ["--router-lm-weight", 0], 0.0, 1.0),
    (0, [], 1.0, 0.1), (0, ["--router-lm-weight", 0.75], 1.0, 0.1)])
def test_two_phases(fit, tiny, tmp_path, tokenizer, files_of, router_steps, flags, lm_weight, aux_weight):
    """The first phase would not be router_lm_weight * LM + aux, 0.1 by default,
    or the second not LM + 0.1 * aux."""
    assert fit("--out", tmp_path, "--max-steps", 1, "--router-steps", router_steps, *flags).code == 0
    row = read_log(files_of(tmp_path))[0]
    config = MSA.from_pretrained(tmp_path).config
    torch.manual_seed(1337)
    model = MSA(config)
    pools = Pools(tiny / "data" / "train", 608)
    losses = model(*next_pool(pools, 0, tokenizer, TrainConfig(), torch.device("cpu")))
    (lm_weight * losses["lm"] + aux_weight * losses["aux"]).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert row["norm"] == pytest.approx(float(norm), abs=1e-4)
    # Each must stand under its own name.
    for name in ("lm", "naming", "answer", "named", "answered", "aux", "top1", "chance"):
        assert row[name] == pytest.approx(losses[name].item(), abs=1e-5)
    assert row["recall"] == pytest.approx(losses["recall"].tolist(), abs=1e-5)


def test_routing_dropout(fit, tiny, tmp_path, tokenizer, monkeypatch):
    """Dropped tokens would route, a question would route with none,
    the second phase or validation would drop, or a run not repeat."""
    pools, config = Pools(tiny / "data" / "train", 608), TrainConfig()
    whole = next_pool(pools, 0, tokenizer, config, torch.device("cpu"))
    half, again, most = (next_pool(pools, 0, tokenizer, config, torch.device("cpu"), dropout)
                         for dropout in (0.5, 0.5, 1 - 1e-9))
    for a, b, c, d in zip(whole[2], half[2], again[2], most[2]):
        assert all(torch.equal(a[name], b[name]) for name in a if name != "routing_mask")
        assert torch.equal(b["routing_mask"], c["routing_mask"])
        assert ((b["routing_mask"] == 0) | (b["routing_mask"] == a["routing_mask"])).all()
        assert b["routing_mask"].any(1).all() and d["routing_mask"].any(1).all()
        assert torch.equal(a["routing_mask"], d["routing_mask"])  # where none was left, all are kept
    count = lambda pool: sum(int((batch["routing_mask"] > 0).sum()) for batch in pool[2])
    assert 0.3 < count(half) / count(whole) < 0.7
    asked = []
    def observed(pools, at, *rest):
        asked.append((pools.folder.name, at, rest[3:4]))
        return next_pool(pools, at, *rest)
    monkeypatch.setattr(train, "next_pool", observed)
    assert fit("--out", tmp_path, "--max-steps", 3, "--router-steps", 2, "--routing-dropout", 0.25).code == 0
    assert asked[:3] == [("train", 0, (0.25,)), ("train", 1, (0.25,)), ("train", 2, (0.0,))]
    assert {rest for name, _, rest in asked[3:] if name == "validation"} == {()}


@pytest.mark.parametrize("step,expected", [
    (0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (39, 1.0), (40, 1.0), (55, 0.2 + 0.8 * (2 + 2 ** 0.5) / 4),
    (70, 0.6), (85, 0.2 + 0.8 * (2 - 2 ** 0.5) / 4), (100, 0.2), (500, 0.2)])
def test_learning_rate(step, expected):
    """The rate would not rise linearly, stay through the router phase, and fall by a cosine to its end."""
    config = TrainConfig(warmup_steps=10, router_steps=40, max_steps=100, learning_rate=1.0,
                         final_learning_rate=0.2)
    assert learning_rate(step, config) == pytest.approx(expected)


@pytest.mark.parametrize("warmup_steps,router_steps,max_steps,rates", [
    (0, 0, 2, [1.0, 0.5, 0.0]), (2, 0, 4, [0.5, 1.0, 1.0, 0.5, 0.0]),
    (0, 9, 2, [1.0, 1.0, 1.0]), (4, 2, 4, [0.25, 0.5, 0.75, 1.0, 1.0])])
def test_learning_rate_of_odd_schedules(warmup_steps, router_steps, max_steps, rates):
    """A phase of no steps, or one that is longer than the run, would divide by zero or leave the range."""
    config = TrainConfig(warmup_steps=warmup_steps, router_steps=router_steps, max_steps=max_steps,
                         learning_rate=1.0, final_learning_rate=0.0)
    assert [learning_rate(step, config) for step in range(len(rates))] == pytest.approx(rates)


# ------------------------------------------------------------------------------------------------------------
# Stopping and resuming

@pytest.mark.parametrize("number,position,step", [
    (signal.SIGINT, 4, 5), (signal.SIGTERM, 5, 6), (signal.SIGINT, 0, 1), (signal.SIGINT, 7, 8)])
def test_interrupt_and_resume(fit, tmp_path, whole, files_of, monkeypatch, number, position, step):
    """A run that was stopped and resumed would not be the run that nobody stopped: log and weights,
    bit for bit."""
    at_position(monkeypatch, position, lambda: signal.raise_signal(number))
    stopped = fit("--out", tmp_path)
    assert stopped.code == 128 + number and f"stopped at step {step}" in stopped.out
    assert "--resume" in stopped.out
    assert files_of(tmp_path).keys() == files_at(step)
    steps = [row["step"] for row in read_log(files_of(tmp_path)) if row["split"] == "train"]
    assert steps == list(range(1, step + 1))
    monkeypatch.setattr(train, "next_pool", next_pool)
    resumed = fit("--out", tmp_path, "--resume")
    assert resumed.code == 0 and f"resumed from {tmp_path} at step {step}" in resumed.out
    files = files_of(tmp_path)
    assert read_log(files) == read_log(whole)
    assert files["model.safetensors"] == whole["model.safetensors"] and files.keys() == whole.keys()


def test_kill_and_resume(fit, tmp_path, whole, files_of, monkeypatch):
    """A run that was killed between two checkpoints would not continue from the last one as if it had not."""
    def kill():
        raise Killed
    at_position(monkeypatch, 4, kill)
    with pytest.raises(Killed):
        fit("--out", tmp_path)
    monkeypatch.setattr(train, "next_pool", next_pool)
    resumed = fit("--out", tmp_path, "--resume")
    assert resumed.code == 0 and "at step 3" in resumed.out
    files = files_of(tmp_path)
    assert files["model.safetensors"] == whole["model.safetensors"]
    assert read_log(files) == read_log(whole)


def test_the_checkpoint_is_written_before_the_evaluation(fit, tmp_path, whole, files_of, monkeypatch):
    """An evaluation that fails would cost the steps before it."""
    def fail(pools, at, *rest):
        if pools.folder.name == "validation":
            raise Killed
        return next_pool(pools, at, *rest)
    monkeypatch.setattr(train, "next_pool", fail)
    with pytest.raises(Killed):
        fit("--out", tmp_path)
    assert files_of(tmp_path).keys() == files_at(3)
    monkeypatch.setattr(train, "next_pool", next_pool)
    assert fit("--out", tmp_path, "--resume").code == 0
    assert read_log(files_of(tmp_path)) == read_log(whole)  # what was not evaluated is, when it goes on


def test_no_second_copy(tmp_path):
    """Saving or resuming would hold weights and moments twice: 51 GB at 4B."""
    torch.manual_seed(0)
    config = TrainConfig(model=ModelConfig(hidden_size=256))
    model = MSA(config.model)
    optimizer = train.make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    about = dict(step=1, position=1, ranks=1, settings={}, files=["00000001-0-of-1.safetensors"])
    state = {name: {kind: x + 0 for kind, x in (*optimizer.state[parameter].items(), ("weight", parameter))}
             for name, parameter in model.named_parameters()}
    largest = model.model.embed_tokens.weight.nbytes
    held = [*model.parameters(), *(x for values in optimizer.state.values() for x in values.values())]
    tracemalloc.start()
    with Held(held) as saving:
        write_state(tmp_path, model, optimizer, about)
        model.save_pretrained(tmp_path)
    assert saving.peak + tracemalloc.get_traced_memory()[1] < largest / 4
    tracemalloc.stop()
    other = MSA(config.model)
    optimizer = train.make_optimizer(other, config)
    with Held(other.parameters()) as loading:
        read_state(tmp_path, other, optimizer, about)
    moments = 2 * sum(parameter.nbytes for parameter in other.parameters())
    assert moments < loading.peak < moments + 2.1 * largest
    for name, parameter in other.named_parameters():
        found = {**optimizer.state[parameter], "weight": parameter}
        assert found.keys() == state[name].keys()
        assert all(torch.equal(found[kind], x) for kind, x in state[name].items()), name


def test_resume_an_older_checkpoint(fit, tmp_path, whole, files_of, monkeypatch):
    """A log that goes on behind the checkpoint would keep rows of steps that are taken again."""
    at_position(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    assert "stopped at step 3" in fit("--out", tmp_path).out
    monkeypatch.setattr(train, "next_pool", next_pool)
    (tmp_path / "log.jsonl").write_bytes(whole["log.jsonl"])
    assert fit("--out", tmp_path, "--resume").code == 0
    assert read_log(files_of(tmp_path)) == read_log(whole)


def test_resume_with_a_broken_log(fit, tmp_path, whole, files_of):
    """A log without some step's row would end in a traceback, or be lost; a row that was being written when
    the run was killed would stop it."""
    for damage in (lambda log: log[300:], lambda log: b"",
                   lambda log: log[:-900]):
        put(whole, tmp_path)
        (tmp_path / "log.jsonl").write_bytes(damage(whole["log.jsonl"]))
        before = files_of(tmp_path)
        result = fit("--out", tmp_path, "--resume")
        assert result.code == 2 and f"error: {tmp_path / 'log.jsonl'}: " in result.error
        assert files_of(tmp_path) == before
    put(whole, tmp_path)
    (tmp_path / "log.jsonl").write_bytes(whole["log.jsonl"] + b'{"step": 9, "sp')
    assert fit("--out", tmp_path, "--resume").code == 0 and files_of(tmp_path) == whole


def test_resume_a_finished_run(fit, tmp_path, whole, files_of):
    """Resuming what is done would train on, or change it."""
    put(whole, tmp_path)
    result = fit("--out", tmp_path, "--resume")
    assert result.code == 0 and "done at step 8" in result.out
    assert files_of(tmp_path) == whole
    (tmp_path / "model.safetensors").write_bytes(b"of step 6")  # the run was killed before it wrote this
    (tmp_path / "config.json").unlink()
    assert fit("--out", tmp_path, "--resume").code == 0 and files_of(tmp_path) == whole


def test_an_existing_checkpoint_is_refused(fit, tmp_path, whole, files_of):
    """Starting a second run would overwrite the first."""
    put(whole, tmp_path)
    refused = fit("--out", tmp_path, "--seed", 1)
    assert refused.code == 2 and files_of(tmp_path) == whole
    assert f"error: {tmp_path}: holds a checkpoint; continue it with --resume, replace it with --overwrite" \
        in refused.error
    nameless = fit("--out", tmp_path / "d\udcff", "--seed", 1)  # nobody could read what it trains
    assert nameless.code == 2 and "its name is not UTF-8, and could not be read again" in nameless.error
    shutil.rmtree(tmp_path / "training_state")
    refused = fit("--out", tmp_path, "--seed", 1)  # --resume would find nothing
    assert refused.code == 2 and f"error: {tmp_path}: holds a checkpoint; replace it" in refused.error
    assert fit("--out", tmp_path, "--overwrite", "--seed", 1, "--max-steps", 1).code == 0
    assert files_of(tmp_path)["model.safetensors"] != whole["model.safetensors"]
    assert len(read_log(files_of(tmp_path))) == 2


def test_overwriting_that_fails(fit, tmp_path, whole, files_of, monkeypatch):
    """A disk that is full when the new weights are written would leave the new state beside the old log,
    and so neither run to go on with."""
    put(whole, tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x")
    with monkeypatch.context() as patch:
        patch.setattr(MSA, "save_pretrained", full)
        assert fit("--out", tmp_path, "--overwrite", "--seed", 1, "--max-steps", 2).code == 2
    resumed = fit("--out", tmp_path, "--resume", "--seed", 1, "--max-steps", 3)
    assert resumed.code == 0 and "resumed" in resumed.out, resumed.error
    rows = [row["lm"] for row in read_log(files_of(tmp_path)) if row["split"] == "train"]
    old = [row["lm"] for row in read_log(whole) if row["split"] == "train"]
    assert len(rows) == 3 and rows[0] != old[0]


def test_overwriting_that_is_killed(fit, tmp_path, whole, files_of, monkeypatch):
    """Killed between its first state and its log, a run would go on under the rows of the one before; what a
    kill leaves of a file would stay for ever."""
    put(whole, tmp_path)
    for name in ("training_state/.00000001-0-of-1.safetensors.abc.tmp", ".model.safetensors.abc.tmp"):
        (tmp_path / name).write_bytes(b"x")

    def killed(log):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Log, "begin", killed)
        fit("--out", tmp_path, "--overwrite", "--seed", 1, "--evaluate-every", 1)
    assert fit("--out", tmp_path, "--resume", "--seed", 1, "--evaluate-every", 1).code == 0
    assert fit("--out", tmp_path / "fresh", "--seed", 1, "--evaluate-every", 1).code == 0
    losses = lambda folder: [row["lm"] for row in read_log(files_of(folder)) if row["split"] == "train"]
    assert losses(tmp_path) == losses(tmp_path / "fresh") and not [*tmp_path.rglob("*.tmp")]


def test_nothing_to_resume(fit, tmp_path, files_of):
    """Resuming a run that never was would end in a traceback."""
    result = fit("--out", tmp_path, "--resume")
    state = tmp_path / "training_state"
    assert result.code == 2
    assert result.error == f"error: {state}: nothing to resume; leave --resume out to start"
    assert files_of(tmp_path) == {}


class Dangerous:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("damage", [
    lambda data, _: data[:len(data) // 2], lambda data, _: data[:-2], lambda data, _: b"",
    lambda data, _: b"not a state", lambda data, path: pickle.dumps(Dangerous(path), protocol=2),
    lambda data, _: b"[1, 2]", lambda data, _: b'{"step": 3}'])
@pytest.mark.parametrize("file", [ABOUT, "training_state/00000008-0-of-1.safetensors"])
def test_broken_training_states(fit, tmp_path, whole, files_of, damage, file):
    """A broken state would end in a traceback or lose the checkpoint,
    or a stranger's file would run a command."""
    put(whole, tmp_path)
    made = tmp_path / "made"
    state = tmp_path / file
    state.write_bytes(damage(whole[file], made))
    before = files_of(tmp_path)
    result = fit("--out", tmp_path, "--resume")
    assert not made.exists() and files_of(tmp_path) == before
    assert result.code == 2 and re.search(f"error: {state}: (not|holds NULs)", result.error)
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("flags,said", [
    (["--model.hidden-size", 24], "a run with model.hidden_size = 16 cannot go on with 24; leave it as it"),
    (["--model.qk-norm"], "model.qk_norm = False cannot go on with True"),
    (["--model.chunk-size", 8], "model.chunk_size = 16 cannot go on with 8")])
def test_resume_another_model(fit, tmp_path, whole, files_of, flags, said):
    """A run would be resumed with another model, of another shape or of the same."""
    put(whole, tmp_path)
    result = fit("--out", tmp_path, "--resume", *flags)
    assert result.code == 2 and f"error: {tmp_path / 'training_state'}: " in result.error
    assert said in result.error and files_of(tmp_path) == whole


def test_resume_tells_what_changed(fit, tmp_path, whole, monkeypatch):
    """A run would go on with another learning rate, more pools a step, or other data, and nobody would know
    why its curve bends."""
    put(whole, tmp_path)
    result = fit("--out", tmp_path, "--resume", "--max-steps", 9, "--learning-rate", 0.5, "--accumulate", 2,
                 "--model.top-k", 3)
    assert result.code == 0, result.err
    assert (f"resumed from {tmp_path} at step 8; max_steps 8 -> 9; learning_rate 0.002 -> 0.5; "
            "accumulate 1 -> 2; model.top_k 2 -> 3\n") in result.out
    again = fit("--out", tmp_path, "--resume", "--max-steps", 9, "--learning-rate", 0.5, "--accumulate", 2,
                "--model.top-k", 3)
    assert f"resumed from {tmp_path} at step 9\n" in again.out
    read = pools.read_prepared
    monkeypatch.setattr(pools, "read_prepared", lambda folder: read(folder) | {"digest": "other"})
    again = fit("--out", tmp_path, "--resume", "--max-steps", 10)
    assert re.search(r"at step 9; .*data [0-9a-f]{16} -> other", again.out)


def test_resume_with_another_tokenizer(fit, run, tiny, tmp_path, whole, files_of):
    """Weights would go on with tokens that are other words to them."""
    assert run(prepare_data, tiny / "tiny.toml", "--out", tmp_path / "data", "--vocab-size", 500).code == 0
    put(whole, tmp_path / "out")
    other = ("--data.out", tmp_path / "data", "--data.vocab-size", 500)
    result = fit("--out", tmp_path / "out", "--resume", *other)
    assert result.code == 2 and "a run with tokenizer = " in result.error, result.error
    assert files_of(tmp_path / "out") == whole


def test_a_state_of_another_model(fit, tmp_path, whole, files_of):
    """Weights of another shape under the right settings would be taken in part, or end in a traceback."""
    put(whole, tmp_path)
    state, = (tmp_path / "training_state").glob("*.safetensors")
    tensors = load_file(state)
    tensors["model.norm.weight.exp_avg"] = torch.zeros(17)
    save_file(tensors, state)
    before, result = files_of(tmp_path), fit("--out", tmp_path, "--resume")
    assert result.code == 2 and f"{state}: tensor model.norm.weight.exp_avg is (17,)" in result.error
    assert files_of(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------
# What goes wrong

@pytest.fixture
def full_disk(monkeypatch):
    """Makes files fail: "fsync" when they are made durable, or beyond a number of bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(how):
        if how == "fsync":
            def fail(_):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            monkeypatch.setattr(os, "fsync", fail)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (how, old[1]))
    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("how", ["fsync", 1000, 100_000])
def test_full_disk(fit, tmp_path, whole, files_of, full_disk, how):
    """A disk that fills up would leave a broken checkpoint in the place of a whole one, rubbish beside it,
    or a traceback."""
    put(whole, tmp_path)
    state = "training_state/00000008-0-of-1.safetensors"
    assert len(whole[state]) > 150_000
    full_disk(how)
    try:
        result = fit("--out", tmp_path, "--overwrite", "--seed", 1)
    finally:
        full_disk(resource.RLIM_INFINITY)
        after = files_of(tmp_path)
    assert after == whole
    assert result.code == 2 and result.err.count("\n") == 1 and "Traceback" not in result.err
    assert result.err.startswith(f"error: {tmp_path / 'training_state' / '00000003-0-of-1.safetensors'}: ")
    if how == "fsync":
        assert "No space left on device; free some space and run again (what was saved before is intact)" \
            in result.err


def test_losses_that_are_not_numbers(fit, tmp_path, whole, files_of):
    """Training would go on with weights that are not numbers and replace the last good checkpoint by them."""
    put(whole, tmp_path)
    result = fit("--out", tmp_path, "--overwrite", "--learning-rate", 1e30, "--gradient-clip", 1e30,
                 "--evaluate-every", 100)
    assert result.code == 2 and "the loss is not a number at step" in result.error
    assert result.error.endswith("lower --learning-rate")  # what is there is another run's
    assert files_of(tmp_path) == whole
    result = fit("--out", tmp_path / "new", "--learning-rate", 1e30, "--gradient-clip", 1e30,
                 "--evaluate-every", 1)
    assert result.code == 2 and "--learning-rate (the last checkpoint in" in result.error


# ------------------------------------------------------------------------------------------------------------
# Speed

@pytest.mark.parametrize("routing_layers", ["", "0,2"])
def test_operations_are_those_that_are_computed(routing_layers):
    """The share of a device's peak would be of other operations than the model's."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=500, hidden_size=96, intermediate_size=256, num_hidden_layers=6, top_k=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=24, chunk_size=8,
                         routing_layers=routing_layers)
    documents, shape = [torch.randint(500, (24,)) for _ in range(8)], (6, 20)
    target = torch.zeros(shape, dtype=torch.bool)
    target[:, 15:] = True
    positive = torch.eye(6, 8, dtype=torch.bool)
    batch = dict(tokens=torch.randint(500, shape), routing_mask=~target, target_mask=target,
                 positive=positive, answers=torch.zeros(6, dtype=torch.bool), appended=positive & False)
    model = MSA(config)
    with FlopCounterMode(display=False) as counted:
        losses = model(documents, [*range(8)], [batch])
        (losses["lm"] + losses["aux"]).backward()
    expected = train.operations(config, [24] * 8, train.sizes([batch]))
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.08)
    without = train.operations(config, [24] * 8, [])
    assert 0 < without < train.operations(config, [25] * 8, []) < train.operations(config, [24] * 9, [])
    message = dict(lengths=[], batches=[(5, 40, 100, 60)])  # it routes nothing
    assert train.operations(config, **message) == train.operations(
        dataclasses.replace(config, decouple_router=False, routing_layers=""), **message)


def test_samples_ahead(monkeypatch):
    """For a GPU pools would be made in another order or with other dropout than for a CPU, or not ahead."""
    config = TrainConfig(max_steps=7, router_steps=4, accumulate=2, routing_dropout=0.5)
    made = []
    monkeypatch.setattr(train, "next_pool", lambda *args: made.append(args[1]) or (args[1], args[5]))
    arguments = (config, torch.device("cuda"), 3, 18, 1, 3)  # rank 1 of 3, from step 3 on
    found = list(train.taken_pools(None, None, *arguments))
    assert found == list(train.taken_pools(None, None, config, torch.device("cpu"), 3, 18, 1, 3))
    assert found == [(18 + 3 * i + 1, 0.5 if i < 2 else 0.0) for i in range(8)]
    made.clear()
    taken = train.taken_pools(None, None, *arguments)
    assert next(taken)[0] == 19
    taken.close()
    assert made == [19, 22]


def test_compiled(fit, whole, tmp_path, eager_compile, files_of):
    """Compiled blocks would compute something else, or weights be saved under other names."""
    assert fit("--out", tmp_path, "--compile", "--max-steps", 2).code == 0
    for found, expected in zip(read_log(files_of(tmp_path))[:2], read_log(whole)):
        assert found["lm"] == pytest.approx(expected["lm"], rel=1e-4)
    assert load_file(tmp_path / "model.safetensors").keys() == load(whole["model.safetensors"]).keys()


# ------------------------------------------------------------------------------------------------------------
# Several pools

def test_position_decides(tiny, tokenizer):
    """Pools or document numbers would depend on what was read before: a resumed run would see other data."""
    pools, config = Pools(tiny / "data" / "train", 608), TrainConfig()
    def take(position):
        documents, numbers, batches = next_pool(pools, position, tokenizer, config, torch.device("cpu"))
        batches = [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]
        return [document.tolist() for document in documents], numbers, batches
    assert take(1) == take(1)
    def texts(position):
        return [tokenizer.decode(document).split("]")[1].split("[")[0] for document in take(position)[0]]
    assert texts(1) == texts(5) != texts(2)  # four pools, read again
    assert take(1)[1] != take(5)[1]          # with new numbers


@pytest.fixture
def ranks(tiny, draw):
    """Train with these flags on several ranks: (code, output, errors) of each."""
    def train_on(count, *flags, kill=None):
        found = on_ranks(count, run_as_rank, train, tiny / "tiny.toml", *flags, kill=kill)
        return [told or (None, "", "") for told in found]
    return train_on


STEPS = ("--max-steps", 3, "--evaluate-every", 3, "--learning-rate", 1e-3, "--number-limit", 1000)


def unequal(pool, *rest):
    """`collate`, but every other pool has a batch for each sample."""
    return collate(pool, *rest, batch_tokens=2048 if len(pool[0][0]) % 2 else 1)


@pytest.fixture
def unequal_pools(monkeypatch):
    monkeypatch.setattr(train, "collate", unequal)


@pytest.fixture(scope="module")
def four_pools_a_step(run, tiny, tmp_path_factory, files_of):
    """The files of one process that takes four pools a step, for three steps."""
    out = tmp_path_factory.mktemp("accumulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "plot", lambda *_: None)
        patch.setattr(train, "collate", unequal)
        assert run(train, tiny / "tiny.toml", "--out", out, "--accumulate", 4, *STEPS).code == 0
    return files_of(out)


def check_same_run(one, other, tolerance=1e-5):
    """Logs and weights of two checkpoints."""
    assert len(read_log(one)) == len(read_log(other))
    for a, b in zip(read_log(one), read_log(other)):
        assert a.pop("recall") == pytest.approx(b.pop("recall"), abs=tolerance)
        # The norm has four decimals.
        assert a.pop("norm", 0) == pytest.approx(b.pop("norm", 0), abs=2e-4)
        assert a.pop("split") == b.pop("split") and a == pytest.approx(b, abs=tolerance)
    one, other = (load(files["model.safetensors"]) for files in (one, other))
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < tolerance


@pytest.mark.parametrize("count,shard,more", [
    (2, "auto", ["--checkpoint-activations"]), (2, "on", ["--checkpoint-activations"]), (4, "on", [])])
def test_ranks_are_one_that_accumulates(ranks, unequal_pools, tmp_path, tiny, four_pools_a_step, files_of,
                                        count, shard, more):
    """Ranks would average losses or gradients wrongly, read the same pools, log what one of them saw, or wait
    for ever where their pools or their numbers of them differ: the same weights, whether each rank holds all
    of the model (DDP) or a part (FSDP2)."""
    pools = Pools(tiny / "data" / "train", 608)
    assert {len(pools[i][0][0]) % 2 for i in range(4)} == {0, 1}
    flags = ("--out", tmp_path / "out", "--accumulate", 4 // count, "--shard", shard, *STEPS)
    found = ranks(count, *flags, *more)
    assert [code for code, _, _ in found] == [0] * count, found
    assert [out.count("done at step 3") for _, out, _ in found] == [1] + [0] * (count - 1)  # one rank speaks
    assert ("shared out" in found[0][1]) == (shard == "on")
    files = files_of(tmp_path / "out")
    assert files.keys() == files_at(3, count if shard == "on" else 1)
    assert json.loads(files[ABOUT])["position"] == 12
    check_same_run(four_pools_a_step, files)
    assert files["config.json"] == four_pools_a_step["config.json"]


def test_shared_bfloat16(ranks, unequal_pools, tmp_path, four_pools_a_step, files_of):
    """Products in bfloat16 would change the type of what is saved, or gradients be added up in bfloat16."""
    flags = ("--accumulate", 2, "--shard", "on", "--dtype", "bfloat16", *STEPS)
    found = ranks(2, "--out", tmp_path / "out", *flags)
    assert [code for code, _, _ in found] == [0, 0], found
    files = files_of(tmp_path / "out")
    for one, other in zip(read_log(four_pools_a_step), read_log(files)):
        for name in ("lm", "naming", "answer", "aux"):
            assert one[name] == pytest.approx(other[name], rel=0.02), name
    assert {tensor.dtype for tensor in load(files["model.safetensors"]).values()} == {torch.float32}
    state = load(files["training_state/00000003-1-of-2.safetensors"])
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert len(state["model.embed_tokens.weight"]) == 304  # of 608 rows


def test_resume_on_another_number_of_ranks(ranks, fit, unequal_pools, tmp_path, four_pools_a_step, files_of):
    """A run that goes on with more or fewer ranks would mix up rows of weights or of moments, or take other
    pools: 4 ranks, then 2, then 1, or 1, then 2 that hold it all, then 4, are the run of one process."""
    def go(out, count, shard, step):
        flags = ("--out", tmp_path / out, "--accumulate", 4 // count, *STEPS, "--max-steps", step,
                 *["--resume"] * (step > 1))
        if count == 1:
            result = fit(*flags)
            return result.code, result.out, result.err
        found = ranks(count, *flags, "--shard", shard)
        assert all(code == 0 for code, _, _ in found), found
        return found[0]
    for out, runs in (("down", [(4, "on"), (2, "on"), (1, "")]), ("up", [(1, ""), (2, "off"), (4, "on")])):
        for step, (count, shard) in enumerate(runs, start=1):
            code, said, err = go(out, count, shard, step)
            assert code == 0, err
            if step > 1:
                assert f"; ranks {runs[step - 2][0]} -> {count}" in said
                assert f"; accumulate {4 // runs[step - 2][0]} -> {4 // count}" in said
        one, other = four_pools_a_step, files_of(tmp_path / out)
        assert other.keys() == files_at(3, runs[-1][0])
        rows = [row for row in read_log(other) if row["split"] == "train"]
        assert [row["step"] for row in rows] == [1, 2, 3]
        one, other = (load(files["model.safetensors"]) for files in (one, other))
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5


def test_a_killed_rank(ranks, unequal_pools, tmp_path, files_of):
    """A rank that is killed at any moment would cost more than the steps since the checkpoint, the others
    would wait for it or end in a traceback, and nobody would say how to go on."""
    flags = ("--max-steps", 6, "--evaluate-every", 1, "--shard", "on")
    assert [code for code, _, _ in ranks(2, "--out", tmp_path / "whole", *flags)] == [0, 0]
    log, turns = tmp_path / "out" / "log.jsonl", np.random.default_rng()

    def kill(started):
        step, wait = int(turns.integers(1, 5)), float(turns.uniform(0, 0.1))
        until = time.time() + 50
        while time.time() < until and not (log.exists() and f'"step": {step}, ' in log.read_text()):
            time.sleep(0.005)
        time.sleep(wait)
        started[1].kill()
    survivor, _ = ranks(2, "--out", tmp_path / "out", *flags, kill=kill)
    assert survivor[0] == 2 and survivor[2].count("\n") == 1, survivor
    assert survivor[2] == ("error: another rank has ended or does not answer; the same command with --resume "
                           f"goes on from the last checkpoint in {tmp_path / 'out'}\n")
    found = ranks(2, "--out", tmp_path / "out", *flags, "--resume")
    assert [code for code, _, _ in found] == [0, 0] and "resumed from" in found[0][1], found
    one, other = (files_of(tmp_path / name) for name in ("whole", "out"))
    assert one["model.safetensors"] == other["model.safetensors"] and read_log(one) == read_log(other)


# ------------------------------------------------------------------------------------------------------------
# From a backbone

@pytest.fixture
def backbone(tmp_path):
    """A tiny Llama folder: weights of a model without helpers, and a tokenizer.json."""
    torch.manual_seed(3)
    model = MSA(ModelConfig(vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                            num_attention_heads=2, num_key_value_heads=1, head_dim=8, attend_memory=False,
                            prompts="chat"))
    model.init_routers()
    model.save_pretrained(tmp_path / "backbone")
    write(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_init_from_a_backbone(run, tmp_path, backbone):
    """A backbone would be trained from noise, with other sizes, without tokens to name documents with,
    or be asked in other prompts."""
    data = ("--data.out", tmp_path / "data", "--data.encoding", backbone, "--data.pools", 4,
            "--data.validation-pools", 2, "--data.needles", 2, "--data.chains", 1, "--data.noise", 1,
            "--data.number-tokens")
    assert run(prepare_data, *[str(flag).replace("--data.", "--") for flag in data]).code == 0
    flags = (*data, "--init-from", backbone, "--out", tmp_path / "run", "--device", "cpu", "--model.top-k", 2,
             "--model.number-chunk", 5, "--router-steps", 1, "--log-every", 1, "--evaluate-every", 2)
    first, second = MSA.from_pretrained(backbone), None
    result = run(train, *flags, "--max-steps", 2, "--learning-rate", 1e-9, "--final-learning-rate", 1e-9,
                 "--weight-decay", 0)
    assert result.code == 0, result.err
    second = MSA.from_pretrained(tmp_path / "run")
    config = second.config
    assert config.prompts == "nanomsa" and config.attend_memory
    assert config.number_chunk == 5 and config.top_k == 2
    assert config.hidden_size == 16 and config.num_hidden_layers == 4 and config.vocab_size == 261 + 5 + 768
    for name, tensor in first.state_dict().items():
        # This holds for its routers too, since the backbone has some.
        assert torch.allclose(second.state_dict()[name][:len(tensor)], tensor, atol=1e-6), name
    grown = second.model.embed_tokens.weight[261:]
    assert torch.allclose(grown.mean(0), first.model.embed_tokens.weight.mean(0), atol=2e-3)
    assert (grown.std(0) > 0).all()
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("One of the special magic numbers for calm-meadow is: 3391874.")
    asked = run(sample, "--checkpoint", tmp_path / "run", "--documents", documents, "--device", "cpu",
                "--max-answer-tokens", 3, "Why?")
    assert asked.code == 0, asked.err
    again = run(train, *flags, "--max-steps", 3, "--resume")
    assert again.code == 0 and "resumed" in again.out, again.err
    # A checkpoint of its own goes on as it is.
    tuned = run(train, *data, "--init-from", tmp_path / "run", "--out", tmp_path / "tuned",
                "--device", "cpu", "--router-steps", 1, "--max-steps", 1)
    assert tuned.code == 0, tuned.err
    assert MSA.from_pretrained(tmp_path / "tuned").config == config


@pytest.mark.parametrize("flags,message", [
    (("--model.equal-routers",), "model.equal_routers is True, but --init-from"),
    (("--model.hidden-size", "64"), "model.hidden_size is 64, but --init-from"),
    (("--init-from", "nowhere"), "nowhere/config.json: no such file"),
    ((), "prepared with another tokenizer than that of --init-from"),
    (("--out", "backbone"), "which --init-from reads; give another"),
])
def test_init_from_mistakes(run, tmp_path, backbone, tiny, flags, message):
    """What cannot be would be ignored, or end in a traceback."""
    flags = [backbone if flag == "backbone" else flag for flag in flags]
    if "--init-from" not in flags:
        flags += ["--init-from", backbone]
    result = run(train, tiny / "tiny.toml", "--out", tmp_path / "run", "--model.num-hidden-layers", 4, *flags)
    assert result.code == 2 and message in result.error, result.error
    assert not (tmp_path / "run").exists()


def test_a_backbone_without_routers(run, tmp_path, backbone):
    """Its routers would start as attention's own maps, through which everything looks alike;
    or be made anew when it is resumed."""
    weights = {name: tensor for name, tensor in load_file(backbone / "model.safetensors").items()
               if "router" not in name}
    save_file(weights, backbone / "model.safetensors")
    own = MSA.from_pretrained(backbone).state_dict()
    data = ("--data.out", tmp_path / "data", "--data.encoding", backbone, "--data.pools", 2,
            "--data.validation-pools", 1, "--data.needles", 2, "--data.chains", 1, "--data.noise", 1)
    assert run(prepare_data, *[str(flag).replace("--data.", "--") for flag in data]).code == 0
    flags = (*data, "--init-from", backbone, "--out", tmp_path / "run", "--device", "cpu", "--router-steps",
             1, "--learning-rate", 1e-9, "--final-learning-rate", 1e-9, "--weight-decay", 0)
    assert run(train, *flags, "--max-steps", 1).code == 0
    first = load_file(tmp_path / "run" / "model.safetensors")
    routers = [name for name in first if "router" in name]
    assert len(routers) == 4
    assert not any(torch.allclose(first[name], own[name], atol=1e-3) for name in routers)
    assert run(train, *flags, "--max-steps", 2, "--resume").code == 0
    second = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in routers)
