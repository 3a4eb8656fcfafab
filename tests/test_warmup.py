"""Routers of a frozen backbone: what is computed once is what the model sees when it is asked,
and what is measured is what it finds."""
import json

import pytest
import torch
from test_prompts import write

import sample
import train
import warmup
from checkpoint import Weights
from interleave import rank_documents
from model import MSA, ModelConfig
from prompts import load_tokenizer
from question_sets import read_beir
from warmup import (
    Inputs,
    batch_of,
    document_inputs,
    document_scores,
    first_maps,
    question_inputs,
    recalls,
    shape_of,
    start_routers,
    train_maps,
    whiten,
)


def retrieval_set(folder):
    """24 documents, each of a letter of its own, and two questions about each.

    Every third document is tested, and has a training question that must be left out; of the others the
    second question stands in a split of another name. Letters that all have in common would match in all of
    them, and hide the others behind the maximum over tokens.
    """
    (folder / "qrels").mkdir(parents=True)
    letters = [chr(ord("A") + i) for i in range(24)]
    documents = [{"_id": f"d{i}", "title": "Place 1" if i == 1 else "", "text": letter * (5 + 7 * (i % 4))}
                 for i, letter in enumerate(letters)]
    queries, lines = [], {"train": [], "test": [], "more": []}
    for i, letter in enumerate(letters):
        second = ("more", letter * 9) if i % 3 else ("test", letter * 3)
        for split, text in (("train", letter * 4), second):
            queries.append({"_id": f"{split}-{i}", "text": text})
            lines[split].append(f"{split}-{i}\td{i}\t1")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(x) + "\n" for x in documents))
    (folder / "queries.jsonl").write_text("".join(json.dumps(x) + "\n" for x in queries))
    for split, rows in lines.items():
        table = ["query-id\tcorpus-id\tscore", *rows]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(row + "\n" for row in table))
    return folder


def spelled(tokenizer, texts):
    return [tokenizer.document(n, tokenizer.encode(text)) for n, text in enumerate(texts)]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    model = MSA(ModelConfig(vocab_size=261, hidden_size=24, intermediate_size=32, num_hidden_layers=4,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                            qk_norm=request.param == "qwen3", chunk_size=16, attend_memory=False,
                            prompts="chat"))
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.ndim == 2 else 1  # layers that do something
    model.model.embed_tokens.weight.data *= 10
    model.bfloat16()
    plain = {name: tensor for name, tensor in model.state_dict().items() if "router" not in name}
    model.state_dict = lambda *_, **__: plain
    model.save(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["msa_config"]
    (folder / "config.json").write_text(json.dumps({**values, "eos_token_id": 258}))
    return write(folder)


@pytest.fixture(params=["float32", "bfloat16"])
def warmed(request, run, backbone, tmp_path):
    """A checkpoint that `--router-data` wrote, and the set it was trained on."""
    data = retrieval_set(tmp_path / "set")
    result = run(train, "--init-from", backbone, "--router-data", data, "--out", tmp_path / "out",
                 "--max-steps", 12, "--evaluate-every", 4, "--learning-rate", 1e-2, "--routing-dropout", 0.2,
                 "--model.chunk-size", 16, "--model.top-k", 3, "--device", "cpu", "--dtype", request.param)
    assert result.code == 0, result.err
    return tmp_path / "out", data, backbone, result


@torch.no_grad()
def test_measured_is_what_the_model_finds(warmed):
    """What is computed once would be other inputs than those that route when the model is asked: at other
    positions, of other tokens, of chunks cut elsewhere; or the whitening would not be in the maps."""
    out, data, backbone, _ = warmed
    measured = json.loads((out / "router.json").read_text())
    model = MSA.from_pretrained(out)
    tokenizer = load_tokenizer(out, model.config)
    texts, questions = read_beir(data)
    memory = model.encode(list(map(torch.tensor, spelled(tokenizer, texts))))
    inputs = document_inputs(model, spelled(tokenizer, texts))
    spoken = [tokenizer.question(row.text)[0] for row in questions["test"]]
    asked = question_inputs(model, spoken, len(tokenizer.head))
    found, layers = [], []
    for i, (question, gold, _) in enumerate(questions["test"]):
        tokens, routes = tokenizer.question(question)
        selections = model.read(torch.tensor([tokens]), memory, torch.tensor([routes]),
                                prefix_length=len(tokenizer.head)).selections
        at, mask = batch_of(asked, torch.tensor([i]))
        for layer, selection in enumerate(selections):
            attention = model.model.layers[model.config.memory_layers[layer]].self_attn
            maps = attention.router_q_proj[0].weight, attention.router_k_proj[0].weight
            scores = document_scores(maps, (4, 2, 8), asked.rows[layer][at], mask,
                                     inputs.rows[layer], inputs.offsets)
            assert torch.allclose(scores, selection.all_scores, atol=0.03)
        ranked, _ = rank_documents(selections)
        found.append(gold[0] in ranked[0, :3].tolist())
        layers.append([gold[0] in selection.documents[0].tolist() for selection in selections])
    share = lambda rows: torch.tensor(rows).float().mean(0)
    assert len(found) == measured["test_questions"] == 8 and measured["chance"] == 3 / 24
    assert measured["train_questions"] + measured["held_out"] == 2 * 16
    # Inputs were rounded to bfloat16, so that few ranks may differ.
    assert abs(float(share(found)) - measured["trained"]["recall_at_k"]) < 0.05
    assert torch.allclose(share(layers), torch.tensor(measured["trained"]["layers"]), atol=0.1)
    assert measured["trained"]["recall_at_k"] > 4 * measured["chance"]


def test_training_learns(tmp_path):
    """Maps would be trained that nothing reads, as under autocast, which keeps what it has rounded;
    or the best be lost."""
    torch.manual_seed(2)
    config = ModelConfig(vocab_size=9, hidden_size=12, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=4, top_k=2)
    offsets = torch.arange(31)
    documents, hidden = Inputs([torch.randn(30, 12)], offsets), torch.linalg.qr(torch.randn(12, 12))[0]
    questions = Inputs([documents.rows[0] @ hidden], offsets)  # a rotation, which maps must undo
    gold, rows, maps = [(i,) for i in range(30)], torch.arange(30), first_maps(config)
    before, _ = recalls(maps, shape_of(config), questions, documents, rows, gold, 2)
    run = train.TrainConfig(max_steps=60, evaluate_every=20, learning_rate=3e-2, model=config)
    trained = train_maps(maps, shape_of(config), questions, documents, rows, rows, gold, run, lambda _: None)
    after, first = recalls(trained, shape_of(config), questions, documents, rows, gold, 2)
    assert before[-1] < 0.5 < 0.9 < after[-1] and first > 0.8


def test_the_best_maps_are_kept(monkeypatch):
    """What training unlearned would be written; the held-out questions say 0.2, 0.9, 0.4."""
    torch.manual_seed(2)
    config = ModelConfig(vocab_size=9, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=4, top_k=2)
    inputs, seen, said = Inputs([torch.randn(30, 12)], torch.arange(31)), [], [0.2, 0.9, 0.4]

    def scripted(maps, *_):
        seen.append([x.detach().clone() for x in maps[0]])
        return [0.5, said[len(seen) - 1]], 0.0
    monkeypatch.setattr(warmup, "recalls", scripted)
    run = train.TrainConfig(max_steps=4, evaluate_every=2, learning_rate=1e-2, model=config)
    rows = torch.arange(30)
    best = train_maps(first_maps(config), shape_of(config), inputs, inputs, rows, rows,
                      [(i,) for i in range(30)], run, lambda _: None)
    assert len(seen) == 3 and not seen[1][0].equal(seen[2][0])
    assert all(a.equal(b) for a, b in zip(best[0], seen[1]))


def test_recalls_rank_as_the_model_is_asked(monkeypatch):
    """A layer that did not select a document would count its own low score for it, and not the k-th."""
    scores = [torch.tensor([[0.9, 0.8, 0.0, 0.1]]), torch.tensor([[0.1, 0.7, 0.9, 0.0]])]
    monkeypatch.setattr(warmup, "document_scores", lambda maps, *_: scores[maps])
    inputs = Inputs([torch.zeros(1, 3), torch.zeros(1, 3)], torch.tensor([0, 1]))
    documents = Inputs(inputs.rows, torch.arange(5))
    for gold, by_layer, together in ((1, [0.0, 0.0], 0.0), (0, [1.0, 0.0], 1.0), (2, [0.0, 1.0], 0.0)):
        # k = 1: .9 and .9 are all that count, so that all four tie at .9: the lowest number is first
        found, first = recalls([0, 1], None, inputs, documents, torch.tensor([0]), [(gold,)], 1)
        assert (found, first) == ([*by_layer, together], together)


def test_routing_dropout(monkeypatch, backbone):
    """The setting would be ignored: every token of a question would route in training."""
    torch.manual_seed(2)
    config = ModelConfig(vocab_size=9, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=4, top_k=2)
    inputs, real, seen = Inputs([torch.randn(90, 12)], torch.arange(0, 91, 3)), warmup.document_scores, []
    monkeypatch.setattr(warmup, "document_scores", lambda *args: seen.append(args[3]) or real(*args))
    run = train.TrainConfig(max_steps=2, evaluate_every=9, routing_dropout=0.6, model=config)
    rows = torch.arange(30)
    train_maps(first_maps(config), shape_of(config), inputs, inputs, rows, rows, [(i,) for i in range(30)],
               run, lambda _: None)
    share = torch.cat([mask for mask in seen if not mask.all()]).float().mean()
    assert 0.3 < share < 0.75 and all(mask.any(1).all() for mask in seen)


def test_the_backbone_is_untouched(warmed):
    """Warming up would change what the backbone says; or leave out what makes it a checkpoint."""
    out, _, backbone, _ = warmed
    before, after = MSA.from_pretrained(backbone), MSA.from_pretrained(out)
    assert after.config.prompts == "chat" and not after.config.attend_memory
    assert (after.config.chunk_size, after.config.top_k) == (16, 3)
    changed = [name for name, tensor in before.state_dict().items()
               if not tensor.equal(after.state_dict()[name])]
    assert changed and all("router" in name for name in changed) and len(changed) == 4
    assert set(Weights(out).dtypes.values()) == set(Weights(backbone).dtypes.values()) == {torch.bfloat16}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (backbone / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 258


def test_it_can_be_asked(run, warmed, tmp_path):
    """A warmed-up backbone would not be asked, from a folder or from a bank."""
    out, *_ = warmed
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The amber birch lies by the sea.")
    (tmp_path / "texts" / "b.txt").write_text("The grove heron lies inland.")
    flags = ("--checkpoint", out, "--documents", tmp_path / "texts", "--max-documents", 1,
             "--max-answer-tokens", 4, "--device", "cpu")
    for where in ((), ("--memory", tmp_path / "bank"), ("--dtype", "bfloat16")):
        result = run(sample, *flags, *where, "Where is amber birch?")
        assert result.code == 0, result.err
        sources = [source for source in (" [0] a.txt:1-1", " [1] b.txt:1-1") if source in result.out]
        assert len(sources) == 1, result.out


@torch.no_grad()
def test_inputs(backbone):
    """Inputs would depend on what they are computed beside, or come back in another order."""
    model = MSA.from_pretrained(backbone, chunk_size=16)
    tokenizer = load_tokenizer(backbone, model.config)
    texts = ["a", "some more text than that, over several chunks of it", "short", "a middling one, of two"]
    asked, head = [tokenizer.question(text)[0] for text in texts], len(tokenizer.head)
    for compute, rows in ((document_inputs, spelled(tokenizer, texts)),
                          (lambda *args: question_inputs(*args, head), asked)):
        whole = compute(model, rows)
        for i, row in enumerate(rows):
            for a, b in zip(compute(model, [row]).rows, whole.rows):
                assert torch.allclose(a.float(), b[whole.offsets[i]:whole.offsets[i + 1]].float(), atol=0.05)
    assert whole.offsets.diff().tolist() == [len(tokenizer.encode(text)) for text in texts]
    assert document_inputs(model, spelled(tokenizer, texts)).offsets.diff().tolist() == [
        -(-len(row) // 16) for row in spelled(tokenizer, texts)]


def test_whitening():
    """Long directions would still hide the others."""
    torch.manual_seed(0)
    scale = torch.tensor([100.0, 1, 1, 1, 1, 1]).sqrt()
    inputs = Inputs([(torch.randn(5000, 6) * scale).bfloat16()], torch.tensor([0, 5000]))
    before = inputs.rows[0].float()
    (white,) = whiten(inputs)
    after = inputs.rows[0].float()
    assert torch.allclose(before @ white, after, atol=0.05) and torch.allclose(white, white.T)
    spread = after.pow(2).mean(0)
    assert spread.max() / spread.min() < 2.5 < (before.pow(2).mean(0).max() / before.pow(2).mean(0).min())


def test_whitening_does_not_look_at_what_is_tested():
    """Test questions would shape the routers that are measured by them."""
    torch.manual_seed(0)
    rows = torch.randn(100, 4)
    tested = (torch.zeros(20, 4), 9 + torch.randn(20, 4))
    found = [whiten(Inputs([torch.cat([rows, last])], torch.arange(0, 121, 10)), 10)[0] for last in tested]
    assert torch.allclose(*found, atol=1e-5)
    with_tested = whiten(Inputs([torch.cat([rows, tested[1]])], torch.arange(0, 121, 10)))[0]
    assert not torch.allclose(found[0], with_tested, atol=1e-2)


@pytest.mark.parametrize("flags,message", [
    ((), "name the backbone with --init-from"),
    (("--init-from", "checkpoint"), "is a model with a memory already"),
    (("--init-from", "backbone", "--resume"), "leave --resume out"),
    (("--init-from", "backbone", "--out", "backbone"), "which --init-from reads"),
    (("--init-from", "backbone", "--out", "checkpoint"), "holds a checkpoint"),
    (("--init-from", "backbone", "--model.score-bias"), "model.score_bias is True, but --init-from"),
    (("--init-from", "backbone", "--router-data", "nowhere"), "nowhere"),
    (("--init-from", "backbone", "--model.top-k", "0"), "top_k is 0")])
def test_mistakes(run, backbone, checkpoint, tmp_path, flags, message):
    """What cannot be warmed up would end in a traceback, or in a folder with half a checkpoint."""
    flags = [{"checkpoint": checkpoint, "backbone": backbone}.get(flag, flag) for flag in flags]
    result = run(train, "--router-data", retrieval_set(tmp_path / "set"), "--out", tmp_path / "out",
                 "--device", "cpu", *flags)
    assert result.code == 2 and message in result.error, result.error
    assert not (tmp_path / "out" / "config.json").exists()


@torch.no_grad()
def test_start_routers(backbone):
    """Routers to train from would be attention's own, in which a few long directions make all alike."""
    model = MSA.from_pretrained(backbone, chunk_size=16)
    assert not model.trained_routers
    torch.manual_seed(1)
    documents = [torch.randint(32, 127, (40,)).tolist() for _ in range(60)]
    spread = lambda rows: (values := torch.linalg.svdvals(rows.double())).max() / values.min()
    inputs = document_inputs(model, documents)
    before = [spread(rows.float() @ model.model.layers[i].self_attn.router_k_proj[0].weight.T)
              for i, rows in zip(model.config.memory_layers, inputs.rows)]
    start_routers(model, documents, documents[:20])
    for i, rows, old in zip(model.config.memory_layers, inputs.rows, before):
        attention = model.model.layers[i].self_attn
        assert spread(rows.float() @ attention.router_k_proj[0].weight.T) < min(4, old / 2)
        query, key = attention.router_q_proj[0].weight, attention.router_k_proj[0].weight
        assert query[:8].equal(query[8:16]) and query[16:24].equal(query[24:])  # two heads share a key
        cosine = torch.nn.functional.cosine_similarity(query[:8].flatten(), key[:8].flatten(), dim=0)
        assert cosine > 0.5  # alike but for the whitening
