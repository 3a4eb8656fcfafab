"""What eval.py asks of which memory, and how it counts."""
import json
import re
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from common import UserError
from eval import parse_lengths, score
from sample import Round
from tasks import Question

NEEDLE = re.compile(r"One of the special magic numbers for (\S+) is: (\d{7})\.")
LINK = re.compile(r"One of the special magic numbers for (\S+) is the one for (\S+)\.")
TASKS = ("niah_single", "niah_multikey", "two_hop")


@pytest.mark.parametrize("text,lengths", [
    ("500", [500]), ("16k,1m", [16_384, 1_048_576]), (" 2K, 1k ,1024,3", [3, 1024, 2048]), ("100m", [104_857_600])])
def test_parse_lengths(text, lengths):
    """Memory lengths would be other numbers of tokens than they say, in a wrong order, or doubled."""
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "16q", "0", "0k", "k", "1k,", "-5", "1.5k", "1 k", "1k;2k"])
def test_lengths_that_are_none(text):
    """A mistake in --lengths would be another length, or a traceback."""
    with pytest.raises(UserError, match=re.escape(f"--lengths {text}: ")):
        parse_lengths(text)


def rounds(*routed_and_appended):
    return [Round([(n, 1.0) for n in routed], appended, appended) for routed, appended in routed_and_appended]


@pytest.mark.parametrize("gold,found,answer,expected", [
    ({5}, rounds(([5, 1], [5]), ([5, 1], [])), " 12\n", (1, 1, 1)),
    ({5}, rounds(([1, 5], [1]), ([1, 5], [])), "123", (1, 1, 0)),        # first among those not yet appended
    ({5}, rounds(([1, 5], []),), "12", (1, 0, 1)),
    ({5}, rounds(([1, 2, 5], [1]),), "", (0, 0, 0)),                     # not among the first two
    ({5, 8}, rounds(([8, 1], [8]), ([1, 8], [])), "12", (0.5, 0.5, 1)),
    ({5, 8}, rounds(([8, 1], [8]), ([8, 5], [5]), ([5, 8], [])), "2", (1, 1, 0)),
    ({5, 8}, [], "12", (0, 0, 1)),
])
def test_score(gold, found, answer, expected):
    """recall@k, top-1 or exact match would count something else than they say."""
    assert score(Question("?", (0,), "12"), gold, found, answer, 2) == expected


@pytest.fixture
def evaluate(run, checkpoint, tmp_path, monkeypatch):
    """Run eval.py with something in the place of the model's answers; returns the rows and what was asked."""
    def evaluate(*flags, answer=lambda memory, texts, question: ("", [])):
        asked = []

        def observed(model, tokenizer, memory, texts, question, config):
            asked.append(SimpleNamespace(memory=memory, texts=[tokenizer.decode(text) for text in texts], question=question, model=model))
            return answer(memory, asked[-1].texts, question)
        monkeypatch.setattr(evaluation, "answer_question", observed)
        result = run(evaluation, "--checkpoint", checkpoint, "--device", "cpu", "--json", tmp_path / "rows.json", *flags)
        assert result.code == 0, result.err
        return json.loads((tmp_path / "rows.json").read_text()), asked
    return evaluate


def gold_of(texts, question):
    """Places of the documents that answer a question, in the order of the hops, and the answer; found by their texts."""
    key, places = question.removeprefix("What is the special magic number for ").removesuffix("?"), []
    while True:
        places += [i for i, text in enumerate(texts) if text.startswith(f"One of the special magic numbers for {key} is")]
        found = NEEDLE.fullmatch(texts[places[-1]])
        if found:
            return places, found[2]
        key = LINK.fullmatch(texts[places[-1]])[2]


@pytest.mark.parametrize("task", TASKS)
def test_memories(evaluate, tokenizer, task):
    """A question would be asked of a memory that is not the one counted, encoded or answered from; lengths would not be nested."""
    lengths, needed = [400, 900], 2 if task == "two_hop" else 1
    rows, asked = evaluate("--task", task, "--lengths", "400,900", "--questions", 3)
    assert [row["questions"] for row in rows] == [3, 3] and len(asked) == 6
    assert [a.question for a in asked[:3]] == [a.question for a in asked[3:]] and len({a.question for a in asked}) == 3
    for i, one in enumerate(asked):
        row, length, numbers = rows[i // 3], lengths[i // 3], one.memory.numbers
        assert len(one.texts) == len(numbers) == len(set(one.texts)) == row["documents"]
        spelled = [torch.tensor(tokenizer.document(n, tokenizer.encode(text))) for n, text in zip(numbers, one.texts)]
        size = sum(map(len, spelled))
        assert length - 60 < size <= length if task != "niah_single" else abs(size - row["memory_tokens"]) < 12
        assert length - 60 < row["memory_tokens"] <= length
        with torch.no_grad():
            fresh = one.model.encode(spelled, numbers)  # raises where numbers do not increase
        assert torch.equal(fresh.offsets, one.memory.offsets)
        for name in ("keys", "values", "routing_keys"):
            for a, b in zip(getattr(fresh, name), getattr(one.memory, name)):
                assert torch.allclose(a, b, atol=1e-5)
        assert len(gold_of(one.texts, one.question)[0]) == needed
        assert sum("special magic" in text for text in one.texts) == (1 if task == "niah_single" else len(one.texts))
    for short, long in zip(asked[:3], asked[3:]):
        assert set(zip(short.memory.numbers, short.texts)) < set(zip(long.memory.numbers, long.texts))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind,expected", [("right", (1.0, 1.0, 1.0)), ("wrong", (0.0, 0.0, 0.0)), ("first hop", (None, None, 0.0))])
def test_counting(evaluate, task, kind, expected):
    """A model that finds and answers everything would not score 1, or one that finds nothing not 0."""
    def answer(memory, texts, question):
        gold, value = gold_of(texts, question)
        others = [i for i in range(len(texts)) if i not in gold]
        named = {"right": gold, "wrong": others[:1], "first hop": gold[:1]}[kind]
        found = [Round([(memory.numbers[i], 1.0)], [memory.numbers[i]], [memory.numbers[i]]) for i in named]
        return value if kind == "right" else "0", found
    rows, _ = evaluate("--task", task, "--lengths", "400", "--questions", 3, answer=answer)
    share = 0.5 if task == "two_hop" else 1.0
    expected = tuple(share if value is None else value for value in expected)
    assert (rows[0]["recall_at_k"], rows[0]["router_top1"], rows[0]["exact_match"]) == expected


@pytest.mark.parametrize("seed", range(6))
def test_smallest_memories(evaluate, seed):
    """A memory of a few documents would fail where the needle has the lowest or the highest number."""
    rows, asked = evaluate("--task", "niah_single", "--lengths", "90", "--questions", 2, "--seed", seed)
    assert 1 <= rows[0]["documents"] <= 4 and all(len(gold_of(a.texts, a.question)[0]) == 1 for a in asked)


def test_top_k(evaluate, checkpoint):
    """--top-k would not change what the model selects, or not be what the table says."""
    for flags, top_k in ((["--top-k", 7], 7), ([], 2)):
        rows, asked = evaluate("--lengths", "300", "--questions", 1, *flags)
        assert rows[0]["top_k"] == asked[0].model.config.top_k == top_k
