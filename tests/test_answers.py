"""How answers and rankings are scored, and the table of four methods."""
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import answers
import batches
from answers import (
    draw,
    f1,
    interval,
    measure,
    plot_set,
    ranked,
    reader,
    score_answer,
    score_ranking,
    table,
    words_of,
)
from interleave import InterleaveConfig
from memory import rank_documents
from model import MSA
from question_sets import SetQuestion
from tokenizer import Tokenizer


@pytest.mark.parametrize("text,words", [
    ("The Cat sat.", "cat sat"), ("A man, an ox; and another!", "man ox and another"),
    ("U.S.A.", "usa"), ("theatre an-d", "theatre and"), ("  two\n lines ", "two lines"), ("the", "")])
def test_words_of(text, words):
    """Answers would be compared otherwise than by SQuAD's script: articles inside words would go, or
    punctuation part words."""
    assert words_of(text) == words.split()


@pytest.mark.parametrize("answer,accepted,value", [
    ("a b c d", "c d e", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
    ("x x y", "x y y", 2 / 3),      # a word counts as often as both have it
    ("x", "y", 0.0), ("", "", 1.0), ("", "x", 0.0), ("x", "", 0.0)])
def test_f1(answer, accepted, value):
    """F1 would count a repeated word too often, or divide by nothing."""
    assert f1(answer.split(), accepted.split()) == pytest.approx(value)


@pytest.mark.parametrize("answer,accepted,scores", [
    ("The Panthers.", ["Denver", "panthers"], (1, 1, 1, 0, 0)),                    # the best of the answers
    ("It was the Carolina Panthers", ["Carolina Panthers"], (0, 2 / 3, 1, 0, 0)),  # 2 of 4 words, 2 of 2
    ("13 points", ["3"], (0, 0, 0, 0, 0)),                                         # no word of its own
    ("b a", ["a b", "b c"], (1, 1, 1, 0, 0)),                                      # "a" is an article
    ("c b", ["b c"], (0, 1, 0, 0, 0)),                                             # not side by side
    ("Not in these documents.", ["x"], (0, 0, 0, 0, 1)),
    (" \n", ["x"], (0, 0, 0, 1, 0)), ("of", ["the"], (0, 0, 0, 0, 0))])
def test_score_answer(answer, accepted, scores):
    """Exact match, F1, contained, empty or not found would be another measure than it says."""
    assert score_answer(answer, accepted) == pytest.approx(scores)


def test_score_ranking():
    """Recall would count documents beyond the first n, or one gold document of two as all."""
    ranking = list(range(100, 120))
    assert score_ranking(ranking, (100, 104)) == (0.5, 1, 1, 1)
    assert score_ranking(ranking, (105, 115)) == (0, 0, 1, 1)
    assert score_ranking(ranking, (101, 116)) == (0, 0.5, 0.5, 0)
    assert score_ranking([], (3,)) == (0, 0, 0, 0)


def test_interval():
    """The interval would be another than the binomial's of a coin, be of unpaired differences, or change
    from run to run."""
    coin = [1.0] * 30 + [0.0] * 70
    mean, low, high = interval(coin, seed=3)
    assert mean == pytest.approx(0.3) and interval(coin, 3) == [mean, low, high] != interval(coin, 4)
    deviation = np.sqrt(0.3 * 0.7 / 100)    # quantiles of the binomial lie 1.96 of it away
    assert low == pytest.approx(0.3 - 1.96 * deviation, abs=0.015)
    assert high == pytest.approx(0.3 + 1.96 * deviation, abs=0.015)
    assert interval([0.25] * 7, 1) == [0.25] * 3


def test_draw():
    """Questions would change from run to run, be doubled, or be some that nothing is known to answer."""
    some = [i for i in range(60) if i % 3]
    chosen = draw(some, 20, 1)
    assert chosen == draw(some, 20, 1) != draw(some, 20, 2)
    assert chosen == sorted({*chosen}) and len(chosen) == 20 and {*chosen} <= {*some}
    assert draw(some, 1000, 1) == some


TEXTS = [f"document {i}" for i in range(40)]


@pytest.fixture
def scripted(monkeypatch):
    """A reader that answers with the last word of the last gold document that it is given; `seen` is what it
    was asked."""
    seen = []

    def answer(question, appended):
        seen.append((question, [number for number, _ in appended]))
        assert all(text == TEXTS[number] for number, text in appended)
        gold = [number for number, _ in appended if str(number) in question.split()[1:]]
        return f"The {gold[-1]}." if gold else ""
    monkeypatch.setattr(answers, "answers_from_texts",
                        lambda model, tokenizer, asked, config, batch, cut: [answer(*one) for one in asked])
    return reader(None, None, TEXTS, None, 2), seen


def rankings():
    """Questions about one or two documents; finders that have known places for them."""
    questions = [SetQuestion(f"q{i} {i} {i + 1}", (i, i + 1), (str(i + 1),)) for i in range(4)]
    place = {"bm25": [(0, 1), (0, 7), (3, 18), (18, 19)], "memory": [(0, 1), (0, 1), (4, 5), (1, 0)]}

    def finder(method):
        def find(text):
            i = int(text[1])
            ranking = [n for n in range(20, 40)]
            for gold, at in zip(questions[i].gold, place[method][i]):
                ranking[at] = gold
            return ranking, 20
        return lambda texts: list(map(find, texts))
    return questions, {method: finder(method) for method in place}


of_documents = partial(measure, owner=range(40), texts=["so"] * 40)  # each of them is one passage


def test_measure(scripted):
    """A method would read other documents than it found or in another order, be asked with another number of
    documents, or be credited with another's recall; what does not apply would look like a measurement."""
    read, seen = scripted
    questions, finders = rankings()
    rows = of_documents(questions, [0, 1, 2], finders, read, [1, 5], seed=1)
    assert [(row["k"], row["method"]) for row in rows] == [
        (k, method) for k in (1, 5) for method in ("none", "oracle", "bm25", "memory")]
    recalls = {"bm25": ((0.5 + 0.5) / 4, (1 + 0.5 + 0.5) / 4, (1 + 1 + 0.5) / 4, 2 / 4),
               "memory": ((0.5 + 0.5 + 0 + 0.5) / 4, (1 + 1 + 0.5 + 1) / 4, 1.0, 1.0)}
    # an answer is right when the second gold document was read: F1 is 1, else that of another number, 0
    right = {("none", 1): 0, ("oracle", 1): 3, ("bm25", 1): 0, ("memory", 1): 0,
             ("none", 5): 0, ("oracle", 5): 3, ("bm25", 5): 1, ("memory", 5): 2}
    empty = {("none", 1): 3, ("oracle", 1): 0, ("bm25", 1): 1, ("memory", 1): 1,
             ("none", 5): 3, ("oracle", 5): 0, ("bm25", 5): 0, ("memory", 5): 0}
    for row in rows:
        key, found = (row["method"], row["k"]), recalls.get(row["method"], (None,) * 4)
        names = ("recall_at_1", "recall_at_5", "recall_at_16", "all_gold_at_16")
        assert tuple(row[name] for name in names) == found
        scores = [row[name] for name in ("exact_match", "f1", "contained")]
        assert scores == pytest.approx([right[key] / 3] * 3)
        assert row["empty"] == pytest.approx(empty[key] / 3) and row["seconds_per_question"] >= 0
    # the order of finding; no prompt is read twice
    asked = dict((tuple(documents), question) for question, documents in seen if question.startswith("q1"))
    assert asked == {(): "q1 1 2", (1, 2): "q1 1 2", (1,): "q1 1 2", (1, 21, 22, 23, 24): "q1 1 2",
                     (1, 2, 22, 23, 24): "q1 1 2"}
    assert len(seen) == len({(question, *documents) for question, documents in seen})
    assert rows[3]["recall_at_1_over_bm25"] == interval([0, 0, 0, 0.5], 1)
    assert rows[7]["f1_over_bm25"] == interval([0, 1, 0], 1)
    lines = table(rows)
    assert len(lines) == 1 + 8 + 4 and lines[1].split()[:3] == ["1", "none", "-"]
    assert "k 5: memory - bm25 in F1: +0.333" in lines[-1]


def test_measure_of_passages(scripted):
    """A passage would be taken for a document: other recalls, and an oracle that shows the wrong ones."""
    read, seen = scripted
    questions = [SetQuestion("q0 1 2", (1, 2), ("1 2",))]
    finders = dict(bm25=lambda texts: [([0, 1, 2, 3, 4], 5)], memory=lambda texts: [([3, 2, 4, 1, 0], 5)])
    rows = measure(questions, [0], finders, read, [2], 1, [0, 1, 1, 1, 2], ["so"] * 5)
    found = {row["method"]: (row["recall_at_1"], row["recall_at_5"], row["all_gold_at_16"]) for row in rows}
    assert found["bm25"] == (0, 1, 1) and found["memory"] == (0.5, 1, 1)
    assert {tuple(documents) for _, documents in seen} == {(), (1, 2, 3, 4), (0, 1), (3, 2)}
    both, owner = SetQuestion("q", (0, 1), ("The End",)), [0] * 20 + [1]
    assert answers.shown(both, owner, ["so"] * 21) == [0, 1, 2, 3, 20]
    texts = ["so"] * 17 + ["the end", "so", "THE END."] + ["so"]
    assert answers.shown(both, owner, texts) == [0, 1, 17, 19, 20]
    assert answers.shown(both._replace(gold=(0,)), owner, texts) == [*range(6), 17, 19]


def test_measure_of_a_second_look(scripted):
    """Second looks, which take seconds, would be taken at all questions, or recalls of some pass for all."""
    questions, finders = rankings()
    asked, read = {method: [] for method in ("routing", "memory")}, scripted[0]

    def noting(method, find=finders["memory"]):
        return lambda texts: asked[method].extend(texts) or find(texts)
    both = dict(bm25=finders["bm25"], memory=noting("memory"), routing=noting("routing"))
    rows = of_documents(questions, [1, 3], both, scripted[0], [1], seed=1, looked=[1, 3])
    found = {row["method"]: row for row in rows}
    assert [*found] == ["none", "oracle", "bm25", "routing", "memory"]
    assert len(asked["routing"]) == 4 and asked["memory"] == [questions[i].text for i in (1, 3)]
    assert found["routing"]["recall_at_1"] == 0.375 and found["memory"]["recall_at_1"] == 0.5
    assert [found[name]["questions_of_recall"] for name in ("bm25", "routing", "memory")] == [4, 4, 2]
    assert found["routing"]["f1"] is None
    assert found["memory"]["recall_at_1_over_bm25"] == interval([0, 0.5], 1)
    assert of_documents(questions, [], both, scripted[0], [1], 1)[-1]["questions_of_recall"] == 4
    enough = dict(finders, memory=lambda texts: [(found, 1) for found, _ in finders["memory"](texts)])
    rows = of_documents(questions, [1], enough, read, [5], seed=1)  # it reads one of two
    assert [row["exact_match"] for row in rows] == [0, 1, 0, 0] and rows[3]["recall_at_5"] == 0.875


def test_measure_without_answers_or_judgements(scripted):
    """A set without answers would print exact matches of 0, or one without judgements recalls of 0."""
    read, seen = scripted
    questions, finders = rankings()
    rows = of_documents([question._replace(answers=()) for question in questions], [], finders, read, [1, 5],
                        1)
    assert [(row["method"], row["k"], row["f1"], row["empty"]) for row in rows] == [
        ("bm25", None, None, None), ("memory", None, None, None)]
    assert rows[1]["recall_at_16"] == 1 and seen == [] and "f1_over_bm25" not in rows[1]
    rows = of_documents([question._replace(gold=()) for question in questions], [0, 1], finders, read, [5],
                        1)
    assert [(row["method"], row["recall_at_1"], row["exact_match"]) for row in rows] == [
        ("none", None, 0), ("bm25", None, 0.5), ("memory", None, 1)]
    assert "recall_at_1_over_bm25" not in rows[2] and rows[2]["f1_over_bm25"] == interval([0, 1], 1)


def test_told_not_found(scripted):
    """A question that nothing answers would be told so by another number of documents, or not be counted."""
    read = lambda asked: [("Not in these documents." if len(places) < int(text) else "x", 0)
                          for text, places in asked]
    find = lambda texts: [([1, 2, 3, 4], 4) for _ in texts]
    questions = [SetQuestion(str(n), (), (), n != 9) for n in (1, 2, 4, 9)]
    assert answers.told_not_found(questions, find, read, [1, 3]) == {1: 2 / 3, 3: 1 / 3}
    assert answers.told_not_found(questions[3:], find, read, [1]) == {}
    find = lambda texts: [([1, 2, 3, 4], 2) for _ in texts]
    assert answers.told_not_found(questions, find, read, [3]) == {3: 1 / 3}


@torch.no_grad()
def test_ranked(checkpoint):
    """The ranking would be of other tokens than a question's, or in another order than naming's."""
    model, tokenizer = MSA.from_pretrained(checkpoint), Tokenizer.load(checkpoint)
    model.config.top_k = 4
    words = random.Random(1).choices(["river", "amber", "otter", "teal", "magic"], k=60)
    texts = [tokenizer.encode(" ".join(words[i:i + 6])) for i in range(0, 60, 6)]
    memory = model.encode([torch.tensor(tokenizer.document(n, text)) for n, text in enumerate(texts)])
    (found, most, best), = ranked(model, tokenizer, memory, texts, ["Which amber otter?"], InterleaveConfig(),
                                  1, 0)
    tokens = torch.tensor([tokenizer.question(tokenizer.encode("Which amber otter?"))])
    expected, scores = rank_documents(model.read(tokens, memory, torch.ones_like(tokens).bool()).selections)
    assert best == pytest.approx(float(scores[0, 0]), abs=1e-6)
    assert found == [d for d in expected[0].tolist() if d >= 0] and 4 <= len(found) == most <= 10


@pytest.mark.parametrize("rounds,most,expected", [
    (2, 16, [7, 3, 5, 4, 1]), (2, 4, [7, 3, 1, 5, 4]), (2, 5, [7, 3, 5, 1, 4]), (1, 4, [7, 3, 5, 4]),
    (0, 16, [7, 3, 5, 4]), (-1, 16, [7, 3, 5, 4])])
def test_ranked_in_two_rounds(monkeypatch, rounds, most, expected):
    """What the second round finds would be put before the first's best, be counted twice, or not at all."""
    found = [[(7, 0.9), (3, 0.8), (5, 0.2), (4, 0.1)], [(1, 1.3), (7, 1.1), (5, 1.0), (3, 0.9)]]
    find = lambda server, asked: [found[:request.count] for request in asked.values()]
    monkeypatch.setattr(batches.Server, "find", find)
    model = SimpleNamespace(config=SimpleNamespace(prompts="chat", second_look=0), device=torch.device("cpu"))
    tokenizer = SimpleNamespace(routed=lambda text: ([1, 2], [False, True]), head=[1])
    config = InterleaveConfig(max_rounds=rounds)
    monkeypatch.setattr(answers, "AT", (1, most))
    assert ranked(model, tokenizer, None, [], ["?"], config, 2, 0) == [(expected, len(expected), 0.9)]


@pytest.mark.parametrize("named,expected", [(1, [7, 5, 1, 4, 3]), (0, [7, 3, 5, 1, 4])])
def test_ranked_by_a_second_look(monkeypatch, named, expected):
    """Where nothing is read behind the first document, what was read there to no end would come before what
    the first round had put second."""
    first, second = ([(document, 0.5) for document in ranking] for ranking in ([7, 3, 5, 4], [5, 1, 4, 3]))

    def looked(*_):
        return [(first, 1), (second, named)]
        yield
    monkeypatch.setattr(answers, "look_again", looked)
    monkeypatch.setattr(batches.Server, "find", lambda server, asked: [[first, second]])
    model = SimpleNamespace(config=SimpleNamespace(prompts="chat", second_look=3), device=torch.device("cpu"))
    tokenizer = SimpleNamespace(routed=lambda text: ([1, 2], [False, True]), head=[1])
    found = ranked(model, tokenizer, None, [], ["?"], InterleaveConfig(), 2, 3)
    assert found == [(expected, 1 + named, 0.5)]


@torch.no_grad()
def test_reader(checkpoint):
    """Documents would not stand in the prompt in the order in which they were found."""
    model, tokenizer = MSA.from_pretrained(checkpoint), Tokenizer.load(checkpoint)
    for parameter in model.parameters():
        parameter.data.mul_(20)  # answers differ by what is read
    texts = [tokenizer.encode(text) for text in ("amber", "teal", "otter")]
    config = InterleaveConfig(max_answer_tokens=4)
    read = reader(model, tokenizer, texts, config, 2)
    (answer, seconds), other = read([("Which?", (2, 0)), ("Which?", (0, 2))])
    asked = [("Which?", [(d, texts[d]) for d in documents]) for documents in ((2, 0), (0, 2))]
    assert [answer, other[0]] == answers.answers_from_texts(model, tokenizer, asked, config, 1)
    assert seconds > 0 and read([("Which?", (2, 0))]) == [(answer, seconds)] and answer != other[0]


def test_plot_set(scripted, tmp_path):
    """A drawing would fail for sets without answers, for one size of memory, or for several."""
    pytest.importorskip("matplotlib")
    questions, finders = rankings()
    for sizes, chosen in (([10], [0, 1]), ([10, 20], [0, 1]), ([10], [])):
        rows = [dict(row, set="set", memory_tokens=size) for size in sizes
                for row in of_documents(questions, chosen, finders, scripted[0], [1, 5], 1)]
        plot_set(rows, tmp_path / "rows.png")
        assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "rows.png").unlink()
