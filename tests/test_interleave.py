"""The interleave loop, with a model that follows a script and with a real tiny one."""
import math
from types import SimpleNamespace

import pytest
import torch

from batches import choose, number_log_probabilities, rankings
from cache import Cache, Rows
from common import UserError
from interleave import InterleaveConfig, Round, answer_question, interleave, run
from memory import Memory, Selection
from model import MSA, ModelConfig

NUMBERS = [3, 12, 45, 123, 4071]  # of the five documents in memory


def test_rows_are_those_of_questions(monkeypatch):
    """A large --batch would take the memory of as many questions, where there are few."""
    made = []
    server = lambda model, rows, *_: made.append(rows) or SimpleNamespace(rows=rows)
    monkeypatch.setattr("interleave.Server", server)
    for questions, batch in ((3, 100_000), (3, 2), (0, 8)):
        loops = ((one for one in ()) for _ in range(questions))
        assert list(run(None, None, loops, InterleaveConfig(), batch)) == []
    assert made == [3, 2, 0]


def selection(documents, scores=None):
    """What a memory layer selected for one question: document indices and scores, best first."""
    scores = [1 - 0.125 * i for i in range(len(documents))] if scores is None else scores
    empty, whole = [torch.zeros(0, 1, 2)], torch.tensor
    return Selection(empty, empty, torch.zeros(1, 0, dtype=torch.long), whole([0]), torch.zeros(1, 0),
                     whole([documents]).long().view(1, -1), whole([scores]).float().view(1, -1),
                     torch.zeros(1, 5))


class Scripted:
    """Behaves like a model that wants to name the numbers `rounds[i]` in round i, then to say `answer` (ids).

    selected: for each read of a question, the Selections of its layers (the last serves the reads
    behind it). strength: how much it wants what it wants; every token that the script does not
    want and the loop must not offer is wanted far more.
    """

    replays = False

    def __init__(self, tokenizer, rounds=(), answer=(), selected=None, strength=20.0, padding=0):
        self.tokenizer, self.rounds, self.answer, self.strength = tokenizer, rounds, list(answer), strength
        self.selected = [[selection(range(5), [0.5] * 5)]] if selected is None else selected
        self.size = tokenizer.vocab_size + padding
        self.config = SimpleNamespace(top_k=5, second_look=0, router_temperature=0.125, vocab_size=self.size,
                                      prompts="nanomsa")
        self.device, self.prompts, self.read_so_far = torch.device("cpu"), [], 0

    def read(self, tokens, memory=None, routing_mask=None, cache=None, prefix_length=0, positions=None,
             vocabulary=None):
        if memory is not None:
            assert cache.length == 0 and not cache.selections and tokens.shape == routing_mask.shape
            self.prompts.append((self.tokenizer.decode(tokens[0][routing_mask[0] > 0].tolist()),
                                 self.tokenizer.decode(tokens[0].tolist())))
            cache.selections.extend(self.selected[min(self.read_so_far, len(self.selected) - 1)])
            self.read_so_far += 1
        assert (cache.length > 0) == (memory is None)
        ids = tokens[:, :, None, None]
        context, values = cache.extended(0, ids, ids)
        start, branch = (int(cache.starts[0]), cache.branch) if memory is None else (0, tokens.size(1))
        cache.keep([context], [values], [])
        (row,), (own,) = context.flatten(1).tolist(), tokens.tolist()
        assert row[start:start + len(own)] == own and positions is not None
        logits = torch.stack([self.wants(row[:start] + own[t // branch * branch:t + 1])
                              for t in range(len(own))])[None, :]
        logits = logits[positions]
        return SimpleNamespace(logits=logits if vocabulary is None else logits[:, vocabulary])

    def wants(self, context):
        """The logits behind `context`."""
        spell, logits = self.tokenizer, torch.zeros(self.size)
        said = []
        if spell.retrieve in context:
            said = context[len(context) - context[::-1].index(spell.retrieve):]
        if spell.end_of_retrieval in said:
            at = len(said) - 1 - said.index(spell.end_of_retrieval)
            logits[self.answer[at] if at < len(self.answer) else spell.end] = 100
            logits[spell.vocab_size:] = 200
            return logits
        wanted = self.rounds[self.read_so_far - 1] if self.read_so_far <= len(self.rounds) else ()
        named, closed = said.count(spell.number(0)[-1]), not said or said[-1] == spell.number(0)[-1]
        if closed:
            after = spell.stop if named else spell.end_of_retrieval
            if named < len(wanted):
                after = spell.open_bracket
            logits[after] = self.strength
        elif named < len(wanted):
            begun = said[len(said) - 1 - said[::-1].index(spell.open_bracket):]
            number = spell.number(wanted[named])
            if begun == number[:len(begun)]:
                logits[number[len(begun)]] = self.strength
        # The loop must never offer these.
        logits[[spell.question_start, spell.retrieve, spell.end, spell.encode("x")[0]]] = 1000.0
        return logits


@pytest.fixture
def ask(tokenizer):
    """Run the loop over five documents; returns (answer, rounds, model)."""
    memory = Memory([], [], [], torch.arange(6), NUMBERS)
    texts = [tokenizer.encode(f"text {n}.") for n in NUMBERS]

    def ask(rounds=(), answer="ok", model=None, **options):
        fake = model or Scripted(tokenizer, rounds, tokenizer.encode(answer))
        said, found = answer_question(fake, tokenizer, memory, texts, "why?", InterleaveConfig(**options))
        assert all(set(r.named) <= {n for n, _ in r.routed} and sorted(r.named) == r.appended for r in found)
        names = [n for r in found for n in r.named]
        assert len(names) == len(set(names))
        return said, found, fake
    return ask


def named(rounds):
    return [r.named for r in rounds]


def prompt(*numbers):
    return "<|question|>why?\n" + "".join(f"[{n}]. text {n}.\n" for n in numbers)


# ------------------------------------------------------------------------------------------------------------
# The loop

@pytest.mark.parametrize("script,prompts", [
    ([], [[]]),
    ([[12]], [[], [12]]),
    ([[45, 3, 123]], [[], [3, 45, 123]]),
    ([[45], [3], [4071]], [[], [45], [45, 3], [45, 3, 4071]]),
    ([[4071, 12], [45, 3]], [[], [12, 4071], [12, 4071, 3, 45]]),
])
def test_rounds(ask, script, prompts):
    """Documents would be named, appended or read in another way than the model was trained.

    Each round routes again, with the appended texts in the order of their numbers, and with nothing that
    the model itself wrote.
    """
    answer, rounds, model = ask(script)
    assert answer == "ok" and named(rounds) == script + [[]]
    assert model.prompts == [(prompt(*numbers), prompt(*numbers) + "<|retrieve|>") for numbers in prompts]
    assert rounds[0].routed == [(n, 0.5) for n in NUMBERS]


def test_events_come_in_order(tokenizer):
    """The terminal would show the answer before the documents that it rests on."""
    memory, texts = Memory([], [], [], torch.arange(6), NUMBERS), [tokenizer.encode("t")] * 5
    model = Scripted(tokenizer, [[12]], tokenizer.encode("ok"))
    events = list(interleave(model, tokenizer, memory, texts, "why?", InterleaveConfig()))
    assert [type(event) for event in events[:2]] == [Round, Round]
    assert all(isinstance(event, str) for event in events[2:])


@pytest.mark.parametrize("cap", [0, 1, 2, 3])
def test_cap_on_rounds(ask, cap):
    """A model that never stops retrieving would retrieve for ever, or would not be made to answer;
    without rounds, nothing would be known of the routing."""
    answer, rounds, model = ask([[12], [45], [3], [123], [4071]], max_rounds=cap)
    assert answer == "ok" and named(rounds) == ([[12], [45], [3], [123]][:cap] or [[]])
    assert len(model.prompts) == cap + 1 and model.prompts[-1][0] == prompt(*[12, 45, 3][:cap])
    assert all(r.routed == [(n, 0.5) for n in NUMBERS] for r in rounds)


@pytest.mark.parametrize("cap", [1, 2, 3, 5])
def test_cap_on_documents(ask, cap):
    """A model that never stops naming would name the whole memory in one round."""
    answer, rounds, _ = ask([[12, 45, 123], [3]], max_documents=cap)
    assert answer == "ok" and named(rounds) == [[12, 45, 123][:cap], [3], []]


@pytest.mark.parametrize("wanted", [123, 777, 4, 1, 31, 9_999_999])
def test_only_candidates_are_named(tokenizer, ask, wanted):
    """The model could cite a document that no layer selected, or that does not exist."""
    model = Scripted(tokenizer, [[wanted]], tokenizer.encode("ok"), [[selection([4, 0])]])
    answer, rounds, _ = ask(model=model)
    assert answer == "ok" and len(rounds) == 2 and len(rounds[0].named) == 1
    assert rounds[0].named[0] in (3, 4071)


@pytest.mark.parametrize("nothing", [[], [selection([-1, -1], [-math.inf] * 2)] * 2])
def test_nothing_is_routed(tokenizer, ask, nothing):
    """A question for which nothing is found would fail, or name what was not found."""
    answer, rounds, model = ask(model=Scripted(tokenizer, [[12], [3]], tokenizer.encode("ok"), [nothing]))
    assert answer == "ok" and rounds == [Round([], [])] and len(model.prompts) == 1


def test_a_document_is_named_once(tokenizer, ask):
    """A document would be named or appended twice, in one round or in a later one."""
    model = Scripted(tokenizer, [[12, 12, 12], [3, 12]], tokenizer.encode("ok"),
                     [[selection([1, 2])], [selection([1, 2, 0])]])
    answer, rounds, _ = ask(model=model)
    assert answer == "ok" and named(rounds) == [[12, 45], [3], []]
    assert [n for n, _ in rounds[1].routed] == [12, 45, 3]  # routed to again, but no candidate


def test_each_round_has_its_own_candidates(tokenizer, ask):
    """A round would choose among the documents that an earlier round had routed to."""
    selected = [[selection([0, 1])], [selection([2]), selection([3, 2])]]
    answer, rounds, _ = ask(model=Scripted(tokenizer, [[12], [3]], tokenizer.encode("ok"), selected))
    assert named(rounds)[0] == [12] and named(rounds)[1][0] in (45, 123)
    assert [n for n, _ in rounds[1].routed] == [123, 45]


@pytest.mark.parametrize("weight,expected", [(0.0, 12), (0.7, 12), (0.8, 45), (10.0, 45)])
def test_router_weight(tokenizer, ask, weight, expected):
    """Naming would not follow log p(number | candidates) + router_weight * score / tau."""
    # The model prefers 12 by 3 nats and the router prefers 45 by (0.75 - 0.25) / 0.125 = 4:
    # they are even at a weight of 0.75.
    model = Scripted(tokenizer, [[12]], tokenizer.encode("ok"), [[selection([2, 1, 0], [0.75, 0.25, -1.0])]],
                     strength=3.0)
    assert named(ask(model=model, router_weight=weight)[1])[0] == [expected]


@pytest.mark.parametrize("limit,expected", [(1, "a"), (3, "a-b"), (5, "a-b-c"), (64, "a-b-c")])
def test_length_of_an_answer(tokenizer, ask, limit, expected):
    """An answer would not stop at <|end|>, or at the limit."""
    ids = [tokenizer.encode(letter)[0] for letter in "a-b-c"]
    answer, _, _ = ask(model=Scripted(tokenizer, [[12]], ids), max_answer_tokens=limit)
    assert answer == expected


@pytest.mark.parametrize("text,pieces", [
    ("é", ["é"]), ("aé😀b", ["a", "é", "😀", "b"]), ("日本", ["日", "本"]), ("", [])])
def test_characters_stream_whole(tokenizer, text, pieces):
    """The terminal would show broken characters where one is spread over several tokens."""
    memory, texts = Memory([], [], [], torch.arange(6), NUMBERS), [tokenizer.encode("t")] * 5
    ids = [tokenizer.encoding.encode_single_token(bytes([byte])) for byte in text.encode()]
    model = Scripted(tokenizer, [], ids)
    events = list(interleave(model, tokenizer, memory, texts, "why?", InterleaveConfig()))
    assert [event for event in events if isinstance(event, str)] == pieces
    # An answer that ends inside a character.
    model = Scripted(tokenizer, [], ids + [tokenizer.encoding.encode_single_token(b"\xf0")])
    events = list(interleave(model, tokenizer, memory, texts, "why?", InterleaveConfig()))
    assert "".join(event for event in events if isinstance(event, str)) == text + "\ufffd"


def test_a_vocabulary_larger_than_the_tokenizers(tokenizer, ask):
    """A model whose vocabulary is rounded up would generate ids that the tokenizer cannot decode,
    and end in an error."""
    model = Scripted(tokenizer, [[12]], tokenizer.encode("ok"), padding=7)
    assert ask(model=model)[0] == "ok"


# ------------------------------------------------------------------------------------------------------------
# Its steps

def test_ranking():
    """Documents would be ranked by other scores than the mean over layers,
    a layer's k-th standing for what it did not select."""
    none = -math.inf
    layers = [selection([5, 2, 9], [0.875, 0.625, 0.5]), selection([2, 7, -1], [0.75, 0.375, none]),
              selection([-1] * 3, [none] * 3)]
    # By hand, over the two layers that selected:
    # 5: (.875 + .375) / 2;  2: (.625 + .75) / 2;  9: (.5 + .375) / 2;  7: (.5 + .375) / 2.
    assert rankings(layers) == [[(2, 0.6875), (5, 0.625), (7, 0.4375), (9, 0.4375)]]
    assert rankings([selection([4, 1], [0.5, 0.5])]) == [[(1, 0.5), (4, 0.5)]]
    assert rankings([]) == [] and rankings(layers[2:]) == rankings([selection([-1], [-math.inf])]) == [[]]


def test_choose_is_greedy_at_temperature_0():
    """Answers at temperature 0 would not be the most likely ones."""
    assert choose(torch.tensor([[0.1, 3.0, -2.0, 2.9], [0.1, 0.0, 0.2, 0.0]]), 0.0, 1.0).tolist() == [1, 2]
    assert choose(torch.tensor([[-math.inf, -5.0]]), 0.0, 0.1).tolist() == [1]


@pytest.mark.parametrize("temperature,top_p,expected", [
    (1.0, 1.0, [0.25, 0.5, 0.2, 0.05]),
    (0.5, 1.0, [0.0625 / 0.355, 0.25 / 0.355, 0.04 / 0.355, 0.0025 / 0.355]),
    (1.0, 0.9, [0.25 / 0.95, 0.5 / 0.95, 0.2 / 0.95, 0.0]),
    (1.0, 0.6, [1 / 3, 2 / 3, 0.0, 0.0]),
    (1.0, 0.4, [0.0, 1.0, 0.0, 0.0]),
    (5.0, 0.001, [0.0, 1.0, 0.0, 0.0]),
])
def test_choose_samples(temperature, top_p, expected):
    """Sampling would not follow temperature and top_p."""
    torch.manual_seed(1)
    logits = torch.tensor([0.25, 0.5, 0.2, 0.05]).log() + 7
    chosen = choose(logits.expand(2000, -1), temperature, top_p)
    counts = torch.bincount(chosen, minlength=4) / 2000
    for found, share in zip(counts.tolist(), expected):
        assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize("options,message", [
    ({"temperature": -1.0}, "temperature is -1.0"), ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"router_weight": -0.5}, "router_weight is -0.5"), ({"max_rounds": -2}, "max_rounds is -2"),
    ({"max_documents": 0}, "max_documents is 0"), ({"max_answer_tokens": 0}, "max_answer_tokens is 0"),
])
def test_settings_are_checked(options, message):
    """A setting that makes no sense would be accepted."""
    with pytest.raises(UserError, match=message):
        InterleaveConfig(**options)


# ------------------------------------------------------------------------------------------------------------
# With a real model

SMALL = {  # seeds of models that name several documents in several rounds
    "plain": ("tokenizer", 4, {}),
    "qk norm": ("tokenizer", 5, dict(qk_norm=True)),
    "number tokens": ("number_tokenizer", 5,
                      dict(qk_norm=True, number_chunk=5, normalize_values=True, score_bias=True)),
}


@pytest.fixture(scope="module", params=SMALL)
def small(request):
    """A model with weights large enough to have opinions, its memory, its texts, and their tokenizer."""
    kind, seed, options = SMALL[request.param]
    tokenizer = request.getfixturevalue(kind)
    torch.manual_seed(seed)
    model = MSA(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32,
                            num_hidden_layers=4, head_dim=8, num_attention_heads=4, num_key_value_heads=2,
                            chunk_size=8, top_k=2, **options)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(12)
    texts = [tokenizer.encode(f"The magic number of {word} is {i}.")
             for i, word in enumerate(("river", "lamp", "otter", "castle", "road"))]
    with torch.no_grad():
        documents = [torch.tensor(tokenizer.document(n, text)) for n, text in zip(NUMBERS, texts)]
        memory = model.encode(documents, NUMBERS)
    return model, memory, texts, tokenizer


def alone(model, tokenizer, memory, start, route, number, numbers):
    """log p of one number, each of its tokens from a read of its own without a cache."""
    spelled, total = tokenizer.number(number), 0.0
    for t in range(1, len(spelled)):
        tokens = torch.tensor([[*start, *spelled[:t]]])
        mask = torch.arange(tokens.size(1))[None] < route
        logits = model.read(tokens, memory, mask).logits[0, -1].double()
        allowed = {other[t] for other in map(tokenizer.number, numbers) if other[:t] == spelled[:t]}
        total += float(logits[spelled[t]] - logits[sorted(allowed)].logsumexp(0))
    return total


def begun(small, questions, rows):
    """A Rows cache of so many rows in which each question, {row: text}, has been read up to its retrieval."""
    model, memory, _, tokenizer = small
    cache = Rows(rows)
    for row, text in questions.items():
        prompt, one = tokenizer.question(tokenizer.encode(text)), Cache()
        tokens = torch.tensor([[*prompt, tokenizer.retrieve]])
        model.read(tokens, memory, torch.arange(tokens.size(1))[None] < len(prompt), one)
        cache.put([row], one, [tokens.size(1)])
    return cache


@pytest.mark.parametrize("numbers", [[3, 12, 45, 123, 4071], [12, 123, 1234, 12345, 13], [45], [4071, 3]])
@torch.no_grad()
def test_number_log_probabilities(small, numbers):
    """Scoring the beginnings of all numbers as branches of one read, of several questions of different
    lengths, would differ from scoring each number alone, from the start."""
    model, memory, _, tokenizer = small
    questions = {2: "What is the magic number of otter?", 0: "Which?"}
    cache, spelled = begun(small, questions, 3), [tokenizer.number(n) for n in numbers]
    asked = {row: spelled[row:] or spelled for row in questions}
    found = number_log_probabilities(model, cache, asked)
    expected = []
    for row, text in questions.items():
        prompt, own = tokenizer.question(tokenizer.encode(text)), numbers[row:] or numbers
        expected += [alone(model, tokenizer, memory, [*prompt, tokenizer.retrieve], len(prompt), number, own)
                     for number in own]
        assert cache.lengths[row] == len(prompt) + 1
    assert found.tolist() == pytest.approx(expected, abs=2e-5)
    # The cache is as it was.
    assert torch.equal(found, number_log_probabilities(model, cache, asked))
    if len(numbers) > 1:
        assert float(found.max() - found.min()) > 0.1


@pytest.mark.parametrize("options", [{}, {"router_weight": 0.0}, {"max_documents": 1, "max_rounds": 2}])
@torch.no_grad()
def test_the_loop_without_caches(small, options):
    """With its caches the loop would decide otherwise than when each decision reads all from the start."""
    model, memory, texts, tokenizer = small
    config = InterleaveConfig(**dict(max_answer_tokens=6, max_rounds=4) | options)
    answer, rounds = answer_question(model, tokenizer, memory, texts,
                                     "What is the magic number of lamp?", config)
    prompt, seen, expected = tokenizer.question(tokenizer.encode("What is the magic number of lamp?")), [], []

    def logits_behind(said):
        tokens = torch.tensor([[*prompt, tokenizer.retrieve, *said]])
        output = model.read(tokens, memory, torch.arange(tokens.size(1))[None] < len(prompt))
        return output.logits[0, -1], rankings(output.selections)[0]

    while len(expected) < config.max_rounds:
        chosen, said = [], []
        while True:
            logits, ranked = logits_behind(said)
            left = [(d, s) for d, s in ranked if d not in seen + chosen]
            rest = logits[tokenizer.stop if chosen else tokenizer.end_of_retrieval]
            if not left or len(chosen) == config.max_documents or rest >= logits[tokenizer.open_bracket]:
                break
            start, numbers = [*prompt, tokenizer.retrieve, *said], [NUMBERS[d] for d, _ in left]
            log_p = [alone(model, tokenizer, memory, start, len(prompt), number, numbers)
                     for number in numbers]
            weight = config.router_weight / model.config.router_temperature
            best = max(range(len(left)), key=lambda i: log_p[i] + weight * left[i][1])
            chosen.append(left[best][0])
            said += tokenizer.number(NUMBERS[chosen[-1]])
        expected.append([NUMBERS[d] for d in chosen])
        if not chosen:
            break
        seen += chosen
        for d in sorted(chosen):
            prompt = prompt + tokenizer.appended(NUMBERS[d], texts[d])
    assert named(rounds) == expected and sum(map(len, expected)) > 1
    said = [tokenizer.end_of_retrieval]
    while len(said) <= config.max_answer_tokens and said[-1] != tokenizer.end:
        said.append(int(logits_behind(said)[0].argmax()))
    assert answer == tokenizer.decode([token for token in said[1:] if token != tokenizer.end])


@pytest.mark.parametrize("with_memory", [False, True])
@torch.no_grad()
def test_no_rounds(small, with_memory):
    """Where nothing may be named the model would still retrieve, lose what it was routed to,
    or answer from something else than the memory; and without a memory it would fail."""
    model, memory, texts, tokenizer = small
    config = InterleaveConfig(max_answer_tokens=6, max_rounds=0)
    question = tokenizer.question(tokenizer.encode("Who?"))
    if not with_memory:
        memory, texts, config.max_rounds = None, [], 3
    start, said = [*question, tokenizer.retrieve], [tokenizer.end_of_retrieval]
    while len(said) <= 6 and said[-1] != tokenizer.end:
        tokens = torch.tensor([[*start, *said]])
        output = model.read(tokens, memory, torch.arange(tokens.size(1))[None] < len(question))
        said.append(int(output.logits[0, -1, :tokenizer.vocab_size].argmax()))
    expected = tokenizer.decode([token for token in said[1:] if token != tokenizer.end])
    answer, rounds = answer_question(model, tokenizer, memory, texts, "Who?", config)
    assert answer == expected
    assert [(r.named, r.appended) for r in rounds] == [([], [])]
    routed = [(NUMBERS[d], score) for d, score in (rankings(output.selections) or [[]])[0]]
    assert [n for n, _ in rounds[0].routed] == [n for n, _ in routed] and len(routed) >= 2 * with_memory
    assert [score for _, score in rounds[0].routed] == pytest.approx([score for _, score in routed], abs=1e-5)
