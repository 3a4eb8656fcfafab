"""On a pretended CUDA device: the CPU's answers, and what the host waits for. tests/pretend_cuda.py"""
from pathlib import Path

import pytest
import torch
from pretend_cuda import PretendCuda

import memory_parallel
import msa_kernel
from bench import BesideAnEmptyRank
from common import to_device
from costs import random_pool
from documents import Document
from interleave import InterleaveConfig, answer_questions
from memory_bank import Bank
from memory_parallel import ParallelMemory, Ranks
from prompts import load_checkpoint
from routing import document_queries, quantize, select_documents
from sync import encode_texts, sync
from tasks import make_memory
from train import TrainConfig, flatten_metrics, make_optimizer

DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
# Questions of two hops, side by side: three rounds, in the first two a document is named, then nothing; an
# answer of four tokens, and its end. A step waits once for what was picked.
ROUNDS, NAMES, PICKS = 3, 2, 3 + 2 + 5


@pytest.fixture
def pretended(monkeypatch):
    class OneAfterAnother:
        """An executor without threads, which do not know what is pretended here."""

        def __init__(self, *_, **__):
            self.map = map

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass
    monkeypatch.setattr(memory_parallel, "ThreadPoolExecutor", OneAfterAnother)
    monkeypatch.setattr(msa_kernel, "KERNEL", "torch")
    with PretendCuda() as cuda:
        yield cuda


@torch.no_grad()
def test_int8_keys(pretended, monkeypatch):
    """The kernels would find others by int8 keys than the reference does, or wait."""
    pytest.importorskip("triton")
    keys = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(1))
    query, offsets = keys[:6].flatten(1).view(2, 3, 32) / 2, torch.tensor([0, 1, 3, *range(4, 41)])
    (keys, scales), mask, found = quantize(keys), torch.ones(2, 3, dtype=torch.bool), []
    for kernel, device in (("torch", "cpu"), ("auto", "cuda:0")):
        monkeypatch.setattr(msa_kernel, "KERNEL", kernel)
        on = [to_device(x, torch.device(device)) for x in (query, mask, keys, offsets, scales)]
        pretended.reset()
        found.append(select_documents([on[0]], on[1], [on[2]], on[3], 8, [on[4]]))
    waits = dict(pretended.waits)
    assert found[0][0].equal(found[1][0].cpu()) and torch.allclose(found[0][1], found[1][1].cpu(), rtol=1e-4)
    assert not waits, pretended.where


@torch.no_grad()
def test_second_round(pretended):
    """Where a document's routing keys lie would be waited for document by document."""
    keys, offsets = torch.randn(9, 2, 8), torch.tensor([0, 2, 3, 7, 9])
    found = {}
    for device in ("cpu", "cuda:0"):
        on_device = to_device(keys, torch.device(device)), to_device(offsets, torch.device(device))
        pretended.reset()
        found[device] = document_queries([2, -1, 0, 3], [on_device[0]], on_device[1], [None]).cpu()
    assert found["cpu"].equal(found["cuda:0"]) and pretended.waits["tolist"] == 1, pretended.waits


@pytest.mark.parametrize("where", ["memory", "bank"])
@torch.no_grad()
def test_demo(words, pretended, tmp_path, where):
    """Questions would fail on a GPU, where a CPU tensor is met, be answered otherwise, or wait for the device
    more than once for a token of all of them."""
    texts, questions = make_memory(words(), "two_hop", 40, 5, 3)
    asked = [question.text for question in questions]
    config, found = InterleaveConfig(), {}
    for device in map(torch.device, ("cpu", "cuda:0")):
        model, tokenizer = load_checkpoint(DEMO, device)
        ids = tokenizer.encode_batch(texts)
        memory, _ = encode_texts(model, tokenizer, ids)
        if where == "bank":
            if device.type == "cpu":
                documents = [Document(text, id=str(i)) for i, text in enumerate(texts)]
                sync(model, tokenizer, tmp_path / "bank", documents, Ranks(device))
            memory = ParallelMemory(Bank(tmp_path / "bank"), device, Ranks(device))
            ids = memory.texts
            if device.type == "cuda":
                memory.ranks = beside = BesideAnEmptyRank(device)
                beside.world = 2
        pretended.reset()
        answers = answer_questions(model, tokenizer, memory, ids, asked, config, 5)
        found[device.type] = [(answer, [(r.named, r.appended) for r in rounds]) for answer, rounds in answers]
    assert found["cuda"] == found["cpu"]
    assert [answer for answer, _ in found["cpu"]] == [question.answer for question in questions]
    # A token is picked, a document named, a round's ranking read: one wait each. A selection: one more for
    # its size, or which documents to fetch.
    layers = len(model.config.memory_layers)
    assert sum(pretended.waits.values()) == PICKS + NAMES + ROUNDS * (1 + layers), pretended.where
    assert pretended.to_host < 10_000 and pretended.launches < 5_000
    assert "host to device" not in pretended.waits
    # As one of two ranks it waits no more often. Both agree on what was picked and named; a selection gathers
    # the best and adds up their content, which for one of the last round lies on the devices already.
    if where == "bank":
        assert beside.collectives == PICKS + NAMES + ROUNDS * 2 * layers - 1


def test_training(pretended, monkeypatch):
    """Training would fail on a GPU, the kernels' losses be others than the reference's, or the host wait for
    the device wherever something is measured. torch's backward wants a device: gradients are the CPU's."""
    pytest.importorskip("triton")
    monkeypatch.setattr(msa_kernel, "KERNEL", "auto")
    found, gradients = {"cpu": [], "cuda": []}, []
    for device in map(torch.device, ("cpu", "cuda:0")):
        model, _ = load_checkpoint(DEMO, device)
        optimizer, learns = make_optimizer(model, TrainConfig()), list(model.parameters())
        for step in range(2):
            torch.manual_seed(step)
            documents, numbers, (batch,) = random_pool(model.config, 3, 9, 2, 8, torch.device("cpu"))
            batch = {name: to_device(x, device) for name, x in batch.items()}
            pretended.reset()
            losses = model(documents, numbers, [batch])
            if device.type == "cpu":
                (losses["lm"] + losses["aux"]).backward()
                gradients.append([p.grad.clone() for p in learns])
            for p, gradient in zip(learns, gradients[step]):
                p.grad = to_device(gradient, device)
            torch.nn.utils.clip_grad_norm_(learns, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            waits = dict(pretended.waits)
            found[device.type].append(flatten_metrics(losses).cpu())
    assert torch.allclose(*map(torch.stack, found.values()), rtol=1e-4)
    assert not torch.allclose(*found["cpu"], rtol=1e-3)
    # How many tokens are predicted, and which questions ask; in a memory layer the chunks of what is pooled,
    # and those of the longest selection; and a batch of documents and their lengths come from the host.
    layers = len(model.config.memory_layers)
    assert waits == {"nonzero": 2, "_local_scalar_dense": 2 * layers, "host to device": 2}, pretended.where
    assert pretended.launches < 1_500


@torch.no_grad()
def test_it_pretends(pretended):
    """What a GPU refuses or waits for would pass unseen."""
    x = torch.arange(6.0).to("cuda:0")
    assert x.device.type == "cuda" and pretended.waits == {"host to device": 1}
    with pytest.raises(RuntimeError, match="are on the CPU"):
        x + torch.ones(6)
    assert (x + 1).sum().item() == 21 and pretended.waits["_local_scalar_dense"] == 1
    assert len(x[x > 2]) == 3 and pretended.waits["a mask as an index"] == 1
    assert x[3:].tolist() == [3, 4, 5] and pretended.waits["tolist"] == 1 and pretended.to_host == 12
    pretended.reset()
    assert torch.arange(3).to("cuda:0", non_blocking=True).add(1).cpu().equal(torch.arange(1, 4))
    assert pretended.waits == {"device to host": 1} and pretended.launches == 1
