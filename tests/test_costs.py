"""What training costs, counted and measured."""
import dataclasses
import sys

import pytest
import torch

import bench
import costs
from common import main
from costs import Held, compare, kept_per_token, linear, plan, training_step
from model import MSA, ModelConfig
from train import TrainConfig

SMALL = ModelConfig(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=4, top_k=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=12)


def test_held_by_hand():
    """Bytes would be counted twice for a view, not at all for a gradient, or for ever."""
    weight = torch.ones(100, requires_grad=True)
    with Held([weight]) as held:
        a = torch.zeros(1000)
        b = a.view(10, 100) * weight  # saves a's view and the weight
        assert held.now == held.peak == 8000
        del a
        assert held.now == 8000       # still saved
        b.sum().backward()
        assert held.peak >= 8000 + 4000
        del b
        assert held.now == 400        # the gradient
    assert weight.grad.nbytes == 400 and held.peak < 20000


def test_a_token_keeps_what_was_counted():
    """A plan would say another number of bytes than training holds, or the activations computed again grow
    with the memory: slopes of measured peaks, with and without."""
    torch.manual_seed(0)
    model, peaks = MSA(SMALL), {}
    for kind in ("MSA", "MSA, computed again"):
        for tokens in (2048, 4096):
            with Held(model.parameters()) as held:
                training_step(model, tokens, kind)()
            peaks[kind, tokens] = held.peak
            model.zero_grad()
    per_token = (peaks["MSA", 4096] - peaks["MSA", 2048]) / 2048
    assert per_token == pytest.approx(kept_per_token(SMALL, torch.float32) * 3, rel=0.1)
    again = (peaks["MSA, computed again", 4096] - peaks["MSA, computed again", 2048]) / 2048
    assert again < per_token / 30


def test_plan_by_hand():
    """A term would be of another size than its formula, the sharing be decided otherwise than in training, or
    a pool's tokens be miscounted."""
    config = TrainConfig(model=SMALL, max_steps=10, accumulate=2)
    config.data.documents = config.data.questions = "x"
    config.data.documents_per_pool, config.data.questions_per_pool = 6, 4
    config.data.max_document_tokens = 100
    P = sum(p.numel() for p in MSA(SMALL).parameters())
    alone, two = (plan(config, gpus, 1e9, 0.5, 1e12) for gpus in (1, 2))
    assert alone["parameters"] == alone["learns"] == P and not alone["shared"] and not two["shared"]
    assert alone["state"] == dict(weights=4 * P, gradients=4 * P, moments=8 * P, buckets=0, casts=2 * P)
    assert two["state"]["buckets"] == 4 * P
    shared = plan(config, 4, 20 * P, 0.5, 1e12)  # 20 P do not fit 3/4 of it
    assert shared["shared"] and shared["state"] == dict(weights=P, gradients=P, moments=2 * P,
                                                        all_weights=2 * P, all_gradients=10 * P)
    assert alone["pool_tokens"] == 600 and alone["asked"] == 4 * 56 + 4 * 156
    low = plan(dataclasses.replace(config, rank=2, init_from="x"), 1, 1e9, 0.5, 1e12)
    L = low["learns"]
    assert low["parameters"] == P + L and low["state"]["weights"] == 2 * P + 4 * L > 2 * P
    K = alone["per_token_and_layer"]
    assert alone["activations"]["documents"] == 600 * 3 * K
    assert alone["activations"]["logits"] == 12 * 300 * 8 * 24
    pooled = 12 * 12 * (2 * 2 * 24 + 2 * 24)  # 2 chunks a document; keys, values, routing keys of 2 layers
    assert alone["computed_again"]["documents"] == 600 * 3 * K + pooled
    assert two["hours"] == alone["hours"] == 20 * alone["operations"] / 5e11 / 3600
    assert two["tokens_per_second"] == 2 * alone["tokens_per_second"]


@pytest.mark.parametrize("name,gpus,parameters,shared", [
    ("qwen3-0.6b", 1, "640,090,112", "whole on each"), ("qwen3-4b", 8, "4,258,397,696", "shared out"),
    ("smollm2", 1, "", "whole on each"), ("demo", 1, "", "whole on each")])
def test_plan_of_a_configuration(name, gpus, parameters, shared, monkeypatch, capsys):
    """A configuration would not be read, or what its comment promises not fit."""
    path = f"{bench.__file__.rsplit('/', 1)[0]}/config/{name}.toml"
    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", path, "--gpus", str(gpus), "--max-steps", "100"])
    main(bench.script)
    said = capsys.readouterr().out
    assert said.startswith(parameters) and f"{gpus} x 80 GB; weights {shared}" in said
    assert said.splitlines()[-2].split()[-1] == "fits" and "TFLOP a pool" in said


def test_plan_of_a_backbone_by_name(tmp_path, monkeypatch, capsys):
    """A backbone whose sizes the configuration does not repeat would be counted as one that does not read the
    memory, and what the configuration says of it not at all."""
    MSA(dataclasses.replace(SMALL, prompts="chat")).save_pretrained(tmp_path)
    seen, count = [], bench.plan
    noting = lambda config, *more: seen.append(config.model) or count(config, *more)
    monkeypatch.setattr(bench, "plan", noting)
    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", "--init-from", str(tmp_path), "--model.top-k", "5"])
    main(bench.script)
    model, = seen
    assert model.attend_memory and model.prompts == "nanomsa" and model.top_k == 5
    assert model.hidden_size == SMALL.hidden_size


@pytest.mark.parametrize("flags,message", [
    (["nowhere.toml"], "nowhere.toml: no such configuration file"), (["--gpus", "0"], "--gpus is 0")])
def test_plan_mistakes(flags, message, monkeypatch, capsys):
    """A mistake would end in a traceback."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", *flags])
    with pytest.raises(SystemExit) as stop:
        main(bench.script)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_compare_by_hand():
    """An exponent, the crossing or a ratio would be another than that of known curves."""
    rows = []
    for tokens in (2048, 4096, 8192, 16384, 32768, 65536):
        n = tokens / 2048
        for what in ("training step", "question"):
            rows.append(dict(what=what, kind="MSA", tokens=tokens, seconds=2 * n, bytes=100 * n))
            if n < 32:
                full = n * n / 2 + n if what == "training step" else n
                rows.append(dict(rows[-1], kind="full attention", seconds=full, bytes=300 * n))
    lines = {line.split(": ")[0]: line for line in compare(rows)}
    assert "exponent 1.00 from 16,384 tokens on; ahead of full attention from 8,192; ratio 4.50 at 32,768; " \
        f"fitted at 393,216: {(192 ** 2 / 2 + 192) / 384:.1f}" in lines["training step, MSA, seconds"]
    assert "ratio 3.00 at 32,768; fitted at 393,216: 3.0" in lines["training step, MSA, bytes"]
    assert "ahead of full attention from no length measured; ratio 0.50" in lines["question, MSA, seconds"]
    assert "exponent 1.79 from 8,192" in lines["training step, full attention, seconds"]


def test_linear(capsys, tmp_path):
    """The measurement would end in a typing error, or full attention read something else."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    rows = linear(MSA(SMALL), 100, 256, 1e9, shortest=128)
    assert [row["tokens"] for row in rows] == [128, 256] * 5
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in rows)
    assert len(compare(rows)) == 10
    costs.plot(rows, "small", tmp_path / "linear.png")
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")
    assert len(linear(MSA(SMALL), 0, 256, 1e9, 128)) == 5 == len(linear(MSA(SMALL), 100, 256, 1, 128))


def test_pools_together():
    """The bytes of a step would be those of one pool, whose questions share their documents, where those of
    several are read each with its own."""
    config = TrainConfig(init_from="backbone", rank=4)
    config.data.questions_per_pool, config.data.max_document_tokens, config.data.data = 5, 100, "set"
    (_, ((rows, tokens, shared, predicted),)) = costs.pool_of(config)
    assert (rows, shared) == (5, 400)
    config.pools_together = 3
    assert costs.pool_of(config) == ([], [(15, 400 + tokens, 0, 3 * predicted)])
