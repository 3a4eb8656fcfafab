"""Routers that are made of statistics, against the formulas worked out one by one."""
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from test_prompts import write

import eval as evaluation
import routers
import sample
import sync
from cache import Cache
from common import UserError
from memory import rank_documents
from model import MSA, ModelConfig
from prompts import ChatTokenizer, load_tokenizer

TEXTS = [f"The {thing} of {town} is {colour} and stands near the {place}." for thing, town, colour,
         place in zip(
    ("tower", "bridge", "mill", "church", "school", "harbour"),
             ("Ulm", "Bonn", "Kiel", "Trier", "Jena", "Emden"),
    ("red", "green", "white", "grey", "blue", "black"), ("river", "wood", "lake", "hill", "moor", "sea"))]


@pytest.fixture
def backbone(tmp_path):
    """A folder with a tiny Llama without routers, whose inputs have one direction that is alike
    everywhere."""
    write(tmp_path)
    tokenizer = ChatTokenizer(tmp_path)
    torch.manual_seed(3)
    config = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                  hidden_size=32)
    model = MSA(ModelConfig(vocab_size=tokenizer.vocab_size, attend_memory=False, prompts="chat", **config))
    model.model.embed_tokens.weight.data += 3 * torch.randn(32)
    plain = {name: tensor for name, tensor in model.state_dict().items() if "router" not in name}
    model.state_dict = lambda *_, **__: plain
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    del about["msa_config"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    return tmp_path


def test_defaults(backbone):
    """A backbone would route late, by each token, or store keys and values that it does not read; routers of
    another width would be a traceback."""
    with pytest.raises(UserError, match="model.routing_dim is 8; it must be 32, the backbone's width, or 0"):
        routers.fit_routers(MSA.from_pretrained(backbone, routing_dim=8), [[1, 2]], [[3]])
    config = MSA.from_pretrained(backbone).config
    assert config.router_layers == [0, 1] and config.routing_dim == 32 and config.query_reduction == "mean"
    assert config.reading_layers == [] and config.chunk_size == 32


@torch.no_grad()
def test_formulas(backbone):
    """Keys would not be whitened by their own statistics, or queries not by both kinds', or not centred."""
    model = MSA.from_pretrained(backbone, chunk_size=4)
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()
    documents, questions = [draw(n) for n in (9, 4, 7, 12) * 12], [draw(n) for n in (5, 3, 8) * 9]
    routers.fit_routers(model, documents, questions, head=[7, 3])
    inputs = lambda text, places: routers.layer_inputs(model, torch.tensor([text]), torch.tensor(places),
                                                       Cache())
    for place, layer in enumerate(model.config.router_layers):
        chunks, tokens = [], []
        for document in documents:
            h = inputs(document, [*range(len(document))])[place][0].double()
            chunks += [part.mean(0) for part in h.split(4)]
        for question in questions:
            behind = [2 + model.config.top_k + i for i in range(len(question))]
            h = inputs([7, 3, *question], [0, 1, *behind])[place][0].double()
            tokens += list(h[2:])
        chunks, tokens = torch.stack(chunks), torch.stack(tokens)
        shape = lambda x: torch.cov(x.T, correction=0) / torch.cov(x.T, correction=0).trace()
        attention = model.model.layers[layer].self_attn
        for router, x, moments in ((attention.router_k_proj[0], chunks, shape(chunks)),
                                   (attention.router_q_proj[0], tokens, shape(chunks) + shape(tokens))):
            ridge = max(0.01, 0.1 * 32 / len(chunks)) * moments.trace() / 32
            weight = router.weight.double()
            identity = weight @ (moments + ridge * torch.eye(32)) @ weight
            assert torch.allclose(identity, torch.eye(32, dtype=torch.float64), atol=2e-3)
            assert torch.allclose(weight, weight.T, atol=1e-3)
            assert torch.allclose(router(x.float()).mean(0), torch.zeros(32), atol=1e-2)
    seen = [sum(token in document for document in documents) for token in range(model.config.vocab_size)]
    rarity = np.log((len(documents) + 1) / (np.array(seen) + 0.5)).clip(0) / np.log(len(documents) + 1)
    assert torch.allclose(model.model.token_weights, torch.tensor(rarity ** 0.5).float(), atol=1e-5)


@torch.no_grad()
def test_words_that_no_document_has(backbone):
    """In lists of numbers, of which all documents share the digits, the words of a question that stand in
    none of them would outweigh those that do."""
    model, common = MSA.from_pretrained(backbone, chunk_size=4), list(range(10, 16))
    documents = [[*common, 20 + i % 2, 30 + i] for i in range(24)]
    routers.fit_routers(model, documents, [[1, *common, 40], [2, 21, 50]])
    weigh = lambda count: max(np.log(25 / (count + 0.5)), 0) / np.log(25)
    mean = sum(weigh(count) ** 0.5 for count in (24,) * 6 + (12, 1)) / 8  # of a document's tokens
    found = model.model.token_weights
    assert weigh(0) ** 0.5 > 2 * mean > weigh(12) ** 0.5
    for token, expected in ((10, weigh(24) ** 0.5), (20, weigh(12) ** 0.5), (31, weigh(1) ** 0.5),
                            (99, 2 * mean)):
        assert found[token] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_it_finds(backbone):
    """A question would not find the document whose words it has; or the routers not survive a bank's file."""
    model = MSA.from_pretrained(backbone)
    tokenizer = load_tokenizer(backbone, model.config)
    routers.make_routers(model, tokenizer, TEXTS)
    assert model.trained_routers
    memory = model.encode([torch.tensor(tokenizer.document(n, tokenizer.encode(text)))
                           for n, text in enumerate(TEXTS)])
    assert memory.keys == [] and len(memory.routing_keys) == 2
    first = []
    for text in TEXTS:
        tokens, routes = tokenizer.routed("Where is the " + " ".join(text.split()[1:4]) + "?")
        found = model.find(torch.tensor([tokens]), memory, torch.tensor([routes]), len(tokenizer.head))
        first.append(int(rank_documents([found])[0][0, 0]))
    assert sum(place == n for n, place in enumerate(first)) >= 5


@torch.no_grad()
def test_chance(backbone):
    """What chance reaches would be of questions with a meaning, or with the template's head; it would change
    from run to run, or be said of a memory or a model of which it is not known."""
    model = MSA.from_pretrained(backbone)
    tokenizer = load_tokenizer(backbone, model.config)
    routers.make_routers(model, tokenizer, TEXTS)
    memory = model.encode([torch.tensor(tokenizer.document(n, tokenizer.encode(text)))
                           for n, text in enumerate(TEXTS)])
    assert routers.chance(model, tokenizer, memory) == -np.inf  # fewer documents than a key has numbers
    model.config.routing_dim = len(TEXTS)
    asked, spelled = [], tokenizer.routed
    tokenizer.routed = lambda text: asked.append(text) or spelled(text)
    reaches = routers.chance(model, tokenizer, memory)
    tokenizer.encoding.n_vocab += 50  # ids may have gaps
    tokenizer.vocab_size += 50
    assert reaches == routers.chance(model, tokenizer, memory) != routers.chance(model, tokenizer, memory, 1)
    best = []
    for text in asked[:routers.RANDOM]:  # one by one, without padding
        tokens, routes = (torch.tensor([row]) for row in spelled(text))
        scores = model.find(tokens, memory, routes, len(tokenizer.head)).all_scores
        best.append(float(scores.max()))
    assert len({*best}) == 100 and reaches == pytest.approx(np.mean(best) + 2 * np.std(best), abs=1e-5)
    assert routers.chance(model, tokenizer, memory.subset([])) == -np.inf
    model.config.prompts = "nanomsa"
    assert routers.chance(model, tokenizer, memory) == -np.inf


def test_another_bank(backbone, checkpoint, run, tmp_path):
    """A bank of another kind of model would be told to have lost its routers; or one that has, to be of
    another model."""
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"id": "{n}", "text": "{text}"}}\n'
                                                  for n, text in enumerate(TEXTS)))
    ask = lambda folder, *flags: run(sample, "--checkpoint", folder, "--memory", tmp_path / "bank",
                                     "--device", "cpu", "--max-answer-tokens", 1, *flags, "Where is it?")
    for folder, other, lost in ((checkpoint, backbone, None), (backbone, checkpoint, "routers.safetensors")):
        assert ask(folder, "--documents", tmp_path / "texts.jsonl").code == 0
        found = ask(other)
        assert found.code == 2 and "bank: made by another" in found.error, found
        assert ask(folder).code == 0
        if lost:
            (tmp_path / "bank" / lost).unlink()
            found = ask(folder)
            assert found.code == 2 and f"{lost}: missing; restore it from a copy" in found.error, found
        shutil.rmtree(tmp_path / "bank")


def test_tasks_of_a_backbone(backbone, run, tmp_path):
    """Routers that nobody has made would be measured, and stand in a bank that nobody else can ask."""
    asks = ("--checkpoint", backbone, "--device", "cpu", "--questions", 2, "--max-answer-tokens", 1)
    made, make = [], routers.make_routers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "make_routers", lambda *args: made.append(args) or make(*args))
        assert run(evaluation, *asks, "--task", "two_hop", "--lengths", "2k").code == 0
        assert run(evaluation, *asks, "--lengths", "2k", "--baseline", "oracle").code == 0
    assert len(made) == 1
    for _ in range(2):
        assert run(evaluation, *asks, "--lengths", "2k", "--memory", tmp_path / "bank").code == 0
    asks = ("--checkpoint", backbone, "--device", "cpu", "--memory", tmp_path / "bank")
    assert run(sample, *asks, "--info").code == 0


def test_documents_longer_than_the_context(backbone, run, tmp_path):
    """No document would fit a message, and each question be answered from nothing."""
    about = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(about | {"max_position_embeddings": 400}))
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "Ada is here."}')
    ask = lambda most: run(sample, "--checkpoint", backbone, "--documents", tmp_path / "a.jsonl", "--device",
                           "cpu", "--max-document-tokens", most, "--max-answer-tokens", 1, "Who?")
    assert ask(200).code == 0
    assert ask(201).error == ("error: --max-document-tokens is 201; this model reads 400 tokens at once, and "
                              "takes documents of half as many at most")


def test_routers_of_a_new_bank(backbone, run, tmp_path, monkeypatch):
    """A bank that another process has made meanwhile would get other routers, and be lost; or a file of the
    same name be replaced in a folder that is no bank."""
    def ask(count, bank="bank"):
        rows = [json.dumps({"id": str(n), "text": text}) for n, text in enumerate(TEXTS[:count])]
        (tmp_path / f"{count}.jsonl").write_text("\n".join(rows))
        return run(sample, "--checkpoint", backbone, "--memory", tmp_path / bank, "--device", "cpu",
                   "--documents", tmp_path / f"{count}.jsonl", "--max-answer-tokens", 1, "Where is it?")

    def slow(*args):
        monkeypatch.undo()
        assert ask(3).code == 0  # another process is faster
        routers.make_routers(*args)
    monkeypatch.setattr(sync, "make_routers", slow)
    found = ask(6)
    assert found.code == 0 and "3 added, 3 unchanged;" in found.out, found
    assert ask(6).code == 0
    (tmp_path / "mine").mkdir()
    for name in ("thesis.txt", "routers.safetensors"):
        (tmp_path / "mine" / name).write_text("mine")
    found = ask(3, "mine")
    assert found.code == 2 and "mine: exists and is not a memory bank" in found.error, found
    assert (tmp_path / "mine" / "routers.safetensors").read_text() == "mine"
    (tmp_path / "bank" / "manifest.json").rename(tmp_path / "manifest.json")
    assert ask(3).code == 2
    (tmp_path / "manifest.json").rename(tmp_path / "bank" / "manifest.json")
    assert ask(6).code == 0  # a manifest that was brought back still belongs to its routers
    path = tmp_path / "bank" / "routers.safetensors"
    whole = path.read_bytes()
    for at in range(len(whole) - 1, len(whole) - 9_000, -997):  # a fingerprint takes samples
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:])
        found = ask(6)
        assert found.code == 2 and "routers.safetensors: damaged (its checksum is wrong" in found.error
    path.write_bytes(safetensors.torch.save(safetensors.torch.load(whole)))  # an older bank has none
    assert ask(6).code == 0
    found = safetensors.torch.load(whole)
    path.write_bytes(safetensors.torch.save({name: x.int() for name, x in found.items()}))
    found = ask(6)
    assert found.code == 2 and "is of type torch.int32" in found.error, found


@pytest.mark.parametrize("texts", [["a"], ["one two"], [TEXTS[0]], ["", "b c"]])
def test_tiny_corpora(backbone, texts):
    """One note, or one word, would end in a division by zero or in keys that are not numbers."""
    model = MSA.from_pretrained(backbone)
    routers.make_routers(model, load_tokenizer(backbone, model.config), texts)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name


def test_questions():
    """Questions would not be pieces of the texts, or end the program where texts are short."""
    questions = routers.make_questions(TEXTS, 50, np.random.default_rng(0))
    assert len(questions) == 50
    for question in questions:
        asking = next(words for words in routers.ASKING if question.startswith(words))
        piece = question[len(asking) + 1:-1]
        assert any(piece in text for text in TEXTS) and 3 <= len(piece.split()) <= 9
    assert routers.make_questions([""], 5, np.random.default_rng(0)) == []
