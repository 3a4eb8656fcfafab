"""Many questions at once: the answers of each must be those that it has alone."""
import re
from pathlib import Path

import pytest
import torch
from test_low_rank import backbone  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import batches
from batches import Pick, Prompt, Read, Server, number_log_probabilities, serve
from cache import Cache, Rows
from costs import Held
from interleave import InterleaveConfig, answer_questions, answers_from_texts
from memory import Selection
from model import MSA, ModelConfig
from prompts import ChatTokenizer, load_checkpoint
from sync import encode_texts
from tasks import make_memory

DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"


@pytest.fixture
def sizes(monkeypatch):
    """How many questions each read of the server was for: {kind: [number]}."""
    seen, serve_kind = {}, {}
    for kind in ("find", "likelihood", "prompt", "name", "read", "pick"):
        def observed(server, asked, kind=kind):
            seen.setdefault(kind, []).append(len(asked))
            return serve_kind[kind](server, asked)
        serve_kind[kind] = getattr(Server, kind)
        monkeypatch.setattr(Server, kind, observed)
    return seen


@pytest.fixture
def graphs(monkeypatch):
    """In the place of CUDA graphs: what was called is called again, with the host's numbers and the tensors
    of that time. Returns how often each graph ran."""
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            self.calls.append((function, args, kwargs or {}, made))
            return made

    ran = []

    def capture(step, x):
        recorder, nth, own = Recorder(), len(ran), x.clone()
        recorder.calls = []
        with recorder:
            result = step(own)
        assert not {"aten::_local_scalar_dense", "aten::nonzero"} & {
            function._schema.name for function, *_ in recorder.calls}  # nothing waits
        ran.append(0)

        def again(x):
            own.copy_(x)
            ran[nth] += 1
            new = {}
            now = lambda x: new.get(id(x), x)
            for function, args, kwargs, made in recorder.calls:
                found = function(*tree_map(now, args), **tree_map(now, kwargs))
                new.update(zip(map(id, tree_leaves(made)), tree_leaves(found)))
            return now(result)
        return again
    monkeypatch.setattr(batches, "capture", capture)
    return ran


def told(found):
    return [(answer, [(r.named, r.appended, [n for n, _ in r.routed]) for r in rounds])
            for answer, rounds in found]


@pytest.mark.parametrize("task", ["two_hop", "read_pooled"])
@torch.no_grad()
def test_demo(words, sizes, graphs, task):
    """Questions of other lengths and rounds would see each other's texts, selections or padding, or a row's
    last question; one that ends early would hold up the others."""
    model, tokenizer = load_checkpoint(DEMO, torch.device("cpu"))
    texts, questions = make_memory(words(), task, 60, 13, 3)
    asked = [question.text for question in questions]
    if task == "two_hop":  # two that take a round less
        direct = [found[1] for text in texts if (found := re.search(r"for (\S+) is: ", text))]
        asked[2], asked[7] = (f"What is the special magic number for {key}?" for key in direct[:2])
    texts = tokenizer.encode_batch(texts)
    memory, _ = encode_texts(model, tokenizer, texts)
    config = InterleaveConfig()
    ask = lambda batch: told(answer_questions(model, tokenizer, memory, texts, asked, config, batch))
    alone = ask(1)
    assert {*map(max, sizes.values())} == {1}
    sizes.clear()
    assert ask(5) == alone
    assert max(sizes["read"]) == max(sizes["prompt"]) == 5
    model.replays = True
    assert ask(5) == ask(1) == alone and len(graphs) > 13 and min(graphs) >= 1 and max(graphs) >= 3
    assert sum(answer == question.answer for (answer, _), question in zip(alone, questions)) >= 11
    assert {len(rounds) for _, rounds in alone} == {2, 3} or task == "read_pooled"


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_chat(backbone, sizes, graphs, shared):  # noqa: F811
    """A chat backbone's routing in two rounds, its second look or its answers would depend on the other
    questions; documents would be judged by another question."""
    model, tokenizer = MSA.from_pretrained(backbone), ChatTokenizer(backbone)
    if shared:
        torch.manual_seed(1)
        model = MSA(ModelConfig(**{**vars(model.config), "routing_layers": "0,1", "query_reduction": "mean"}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(40)
    model.config.second_look, model.config.top_k = 5, 5
    texts = [tokenizer.encode(f"The {word} of the town is " + "very " * i + f"old, {7 * i}.")
             for i, word in enumerate("mill inn well gate wall moat tower".split())]
    memory, _ = encode_texts(model, tokenizer, texts)
    asked = ["Who?", "How old is the gate of the town?", "Mill", "What is the wall, or the inn?", "Is it?"]
    config = InterleaveConfig(max_rounds=2, max_documents=4, max_answer_tokens=9)
    ask = lambda batch: told(answer_questions(model, tokenizer, memory, texts, asked, config, batch))
    alone = ask(1)
    sizes.clear()
    assert ask(3) == alone and max(sizes["find"]) == max(sizes["read"]) == max(sizes["likelihood"]) == 3
    model.replays = True
    assert ask(3) == ask(1) == alone and max(graphs) == 7  # of nine tokens two are not
    asked, whole, config.max_answer_tokens, ran = asked[:1], asked, 260, len(graphs)
    long = ask(1)
    model.replays = False
    assert ask(1) == long and len(graphs) == ran + 2  # it needed more space
    asked, config.max_answer_tokens = whole, 9
    assert len({answer for answer, _ in alone}) == 5 and all(len(rounds) == 1 + shared for _, rounds in alone)
    given = [(question, [(d, texts[d]) for d in (i, 0)]) for i, question in enumerate(asked)]
    assert answers_from_texts(model, tokenizer, given, config, 4) == [
        answers_from_texts(model, tokenizer, [one], config, 1)[0] for one in given]


@torch.no_grad()
def test_rows_of_a_cache():
    """A read behind rows of different lengths, some of them left out, in space that had to grow, would differ
    from reads of the whole texts; branches would see each other."""
    torch.manual_seed(2)
    model = MSA(ModelConfig(vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=8, chunk_size=4, top_k=2))
    memory = model.encode([torch.randint(97, (n,)) for n in (9, 3, 14, 6)])
    texts = [torch.randint(97, (n,)).tolist() for n in (58, 7, 21)]
    cache, routes, head = Rows(4), 5, 2

    def whole(row):
        tokens = torch.tensor([texts[row]])
        mask = torch.arange(tokens.size(1))[None] < routes
        return model.read(tokens, memory, mask, prefix_length=head).logits[0]

    for row, text in enumerate(texts):
        one, tokens = Cache(), torch.tensor([text])
        model.read(tokens, memory, torch.arange(len(text))[None] < routes, one, head)
        cache.put([row], one, [len(text)])
    for rows, counts in (([0, 1, 2], [3, 1, 2]), ([1], [4]), ([0, 2], [2, 9]), ([0, 1, 2], [1, 1, 1])):
        more = [torch.randint(97, (count,)).tolist() for count in counts]
        tokens = torch.tensor([own + [5] * (max(counts) - len(own)) for own in more])
        found = model.read(tokens, cache=cache.take(rows, max(counts))).logits
        cache.advance(counts)
        for b, (row, own) in enumerate(zip(rows, more)):
            texts[row] += own
            torch.testing.assert_close(found[b, :len(own)], whole(row)[-len(own):], atol=2e-5, rtol=1e-4)
    assert cache.space == 128 and cache.lengths == [*map(len, texts), 0]
    branches = torch.randint(97, (2, 3, 2))  # two rows, three branches of two tokens
    found = model.read(branches.flatten(1), cache=cache.take([0, 2], 6, branch=2)).logits.view(2, 3, 2, 97)
    for b, row in enumerate((0, 2)):
        for i in range(3):
            texts[row] += branches[b, i].tolist()
            torch.testing.assert_close(found[b, i], whole(row)[-2:], atol=2e-5, rtol=1e-4)
            del texts[row][-2:]


@torch.no_grad()
def test_bytes_of_naming():
    """Naming would copy a question's cache for every candidate, and need 66 GB of a 4B model's device."""
    config = ModelConfig(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=128, qk_norm=True)
    numbers = [[0, *(1 + int(digit) for digit in str(n)), 11] for n in range(7, 288 * 3449, 3449)]
    with torch.device("meta"):
        model, one, cache = MSA(config).bfloat16(), Cache(), Rows(1)
        rows = lambda *shape: torch.empty(*shape, 8, 128, dtype=torch.bfloat16)
        one.keys, one.values = ({layer: rows(1, 1000) for layer in range(36)} for _ in range(2))
        one.length = 1000
        whole = lambda *shape: torch.empty(*shape, dtype=torch.long)
        one.selections = [Selection([rows(256)], [rows(256)], whole(1, 256), whole(1), torch.empty(1, 256),
                                    whole(1, 16), torch.empty(1, 16), None) for _ in range(18)]
    cache.put([0], one, [1000])
    with Held(model.parameters()) as held:
        assert len(number_log_probabilities(model, cache, {0: numbers})) == 288
    assert 0.1e9 < held.peak < 1e9


def test_loops_enter_and_leave():
    """A loop that ends would hold its row, an event be given to another question, or a loop that asks for
    nothing end the others."""
    def loop(name, steps):
        yield f"{name} begins"
        for _ in range(steps):
            yield Prompt([1])
            yield Read([1])
            yield f"{name}{(yield Pick())}"

    class Counting:
        rows, live = 2, []
        prompt = read = lambda self, asked: [None] * len(asked)

        def pick(self, asked):
            self.live.append(len(asked))
            return [10 * row + len(self.live) for row in asked]
    server = Counting()
    found = list(serve((loop(name, steps) for name, steps in zip("abcde", (1, 3, 0, 2, 1))), server))
    events = [[event for place, event in found if place == i] for i in range(5)]
    assert events == [["a begins", "a1"], ["b begins", "b11", "b12", "b13"], ["c begins"],
                      ["d begins", "d2", "d3"], ["e begins", "e4"]]
    assert server.live == [2, 2, 2, 1]
