"""What eval.py asks of which memory, or of which baseline, and how it counts."""
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_tasks import LINK, NEEDLE, NOISE, PROPERTY

import answers
import batches
import documents
import eval as evaluation
from common import UserError
from eval import parse_lengths, score
from interleave import Round
from question_sets import bm25_search
from tasks import TASKS, Question
from tokenizer import Tokenizer


@pytest.mark.parametrize("text,lengths", [
    ("500", [500]), ("16k,1m", [16_384, 1_048_576]), (" 2K, 1k ,1024,3", [3, 1024, 2048]),
    ("100m", [104_857_600])])
def test_parse_lengths(text, lengths):
    """Memory lengths would be other numbers of tokens than they say, in a wrong order, or doubled."""
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "16q", "0", "0k", "k", "1k,", "-5", "1.5k", "1 k", "1k;2k"])
def test_lengths_that_are_none(text):
    """A mistake in --lengths would be another length, or a traceback."""
    with pytest.raises(UserError, match=re.escape(f"--lengths {text}: ")):
        parse_lengths(text)


def rounds(*routed_and_named):
    return [Round([(n, 1.0) for n in routed], named) for routed, named in routed_and_named]


@pytest.mark.parametrize("gold,found,answer,expected", [
    ([[5]], rounds(([5, 1], [5]), ([5, 1], [])), " 12\n", (1, 1, 1, 1)),
    # first among those not yet appended
    ([[5]], rounds(([1, 5], [1]), ([1, 5], [])), "123", (1, 1, 0, 0)),
    ([[5]], rounds(([1, 5], [])), "12", (1, 0, 0, 1)),
    ([[5]], rounds(([1, 5], [5])), "12", (1, 0, 1, 1)),                     # named against the ranking
    ([[5]], rounds(([5, 1], [1, 5])), "12", (1, 1, 0, 1)),                  # named, but not first
    ([[5]], rounds(([1, 2, 5], [1])), "", (0, 0, 0, 0)),                    # not among the first two
    ([[5]], rounds(([1, 5], [1]), ([5, 1], [5])), "12", (1, 1, 0, 1)),      # named a round too late
    ([[5], [8]], rounds(([8, 1], [8]), ([1, 8], [])), "12", (0.5, 0.5, 0, 1)),
    ([[8], [5]], rounds(([8, 1], [8]), ([8, 5], [5]), ([5, 8], [])), "2", (1, 1, 1, 0)),
    # in the wrong order of hops
    ([[5], [8]], rounds(([8, 1], [8]), ([8, 5], [5]), ([5, 8], [])), "2", (1, 1, 0, 0)),
    ([[8], [5]], rounds(([8, 5], [8, 5]), ([8, 5], [])), "12", (1, 0.5, 0.5, 1)),         # both at once
    ([[5], [8]], [], "12", (0, 0, 0, 1)),
    # a hop of two, in any order
    ([[5, 8]], rounds(([8, 5], [8, 5]), ([5, 8], [])), "12", (1, 0.5, 1, 1)),
    # one of them not in the first two
    ([[5, 8]], rounds(([8, 5], [8, 1, 5]), ([1, 2], [])), "12", (1, 0.5, 0.5, 1)),
    # one of them a round too late
    ([[5, 8]], rounds(([8, 5], [8]), ([5, 1], [5])), "12", (1, 1, 0.5, 1)),
    ([[7], [5, 8, 9]], rounds(([7], [7, 9]), ([9, 8], [8, 5, 7])), "", (0.75, 0.5, 0.75, 0)),
])
def test_score(gold, found, answer, expected):
    """recall@k, top-1, named or exact match would count something else than they say."""
    assert score(Question("?", (0,), "12"), gold, found, answer, 2) == expected


@pytest.fixture
def evaluate(run, checkpoint, tmp_path, monkeypatch):
    """Run eval.py with something in the place of the model's answers; returns the rows and what was asked."""
    def evaluate(*flags, answer=lambda memory, texts, question: ("", [])):
        asked = []

        def observed(model, tokenizer, memory, texts, questions, config, batch):
            shown = [tokenizer.decode(texts[d]) for d in range(len(memory or texts))]
            asked.extend(SimpleNamespace(memory=memory, texts=shown, question=question, model=model,
                                         config=config) for question in questions)
            return [answer(memory, shown, question) for question in questions]
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "answer_questions", observed)
            result = run(evaluation, "--checkpoint", checkpoint, "--device", "cpu", "--json",
                         tmp_path / "rows.json", *flags)
        assert result.code == 0, result.err
        return json.loads((tmp_path / "rows.json").read_text()), asked
    return evaluate


def gold_of(texts, question):
    """Places of the documents that answer a question, in the order of the hops, and the answer; found by
    their texts."""
    key, places = re.fullmatch(r"What is the (?:special magic number for|colour of) (\S+)\?", question)[1], []
    while True:
        places += [i for i, text in enumerate(texts)
                   if re.search(f"(One of the special magic numbers for|The colour of) {re.escape(key)} is",
                                text)]
        found = NEEDLE.search(texts[places[-1]]) or PROPERTY.search(texts[places[-1]])
        if found:
            return places, found[2]
        key = LINK.search(texts[places[-1]])[2]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("filler", [0, 2])
def test_memories(evaluate, tokenizer, task, filler):
    """A question would be asked of a memory that is not the one counted, encoded or answered from; lengths
    would not be nested; documents would have other filler than was asked for."""
    lengths, needed, most = [400 * (1 + filler),
                             900 * (1 + filler)], 2 if task == "two_hop" else 1, 60 * (1 + filler)
    rows, asked = evaluate("--task", task, "--lengths", "{},{}".format(*lengths), "--questions", 3,
                           "--filler", filler)
    assert [row["filler"] for row in rows] == [filler] * 2
    assert [row["questions"] for row in rows] == [3, 3] and len(asked) == 6
    assert [a.question for a in asked[:3]] == [a.question for a in asked[3:]]
    assert len({a.question for a in asked}) == 3
    for i, one in enumerate(asked):
        row, length, numbers = rows[i // 3], lengths[i // 3], one.memory.numbers
        assert len(one.texts) == len(numbers) == len(set(one.texts)) == row["documents"]
        spelled = [torch.tensor(tokenizer.document(n, tokenizer.encode(text)))
                   for n, text in zip(numbers, one.texts)]
        size = sum(map(len, spelled))
        if task == "niah_single":
            assert abs(size - row["memory_tokens"]) < 12 + 25 * filler
        else:
            assert length - most < size <= length
        assert length - most < row["memory_tokens"] <= length
        with torch.no_grad():
            fresh = one.model.encode(spelled, numbers)  # raises where numbers do not increase
        assert torch.equal(fresh.offsets, one.memory.offsets)
        for name in ("keys", "values", "routing_keys"):
            for a, b in zip(getattr(fresh, name), getattr(one.memory, name)):
                assert torch.allclose(a, b, atol=1e-5)
        assert len(gold_of(one.texts, one.question)[0]) == needed
        facts = [len(kind.findall(text)) for text in one.texts for kind in (NEEDLE, LINK, PROPERTY)]
        assert sum(facts) == (1 if task == "niah_single" else len(one.texts))
        noise = sum(len(NOISE.findall(text)) for text in one.texts)
        assert sum(facts) + noise == len(one.texts) * (1 + filler)
    for short, long in zip(asked[:3], asked[3:]):
        assert set(zip(short.memory.numbers, short.texts)) < set(zip(long.memory.numbers, long.texts))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind,expected", [
    ("right", (1.0, 1.0, 1.0, 1.0)), ("wrong", (0.0, 0.0, 0.0, 0.0)), ("first hop", (None, None, None, 0.0)),
    ("backwards", (1.0, 1.0, None, 1.0))])
def test_counting(evaluate, task, kind, expected):
    """A model that finds and answers everything would not score 1, or one that finds nothing not 0."""
    def answer(memory, texts, question):
        gold, value = gold_of(texts, question)
        others = [i for i in range(len(texts)) if i not in gold]
        named = {"right": gold, "wrong": others[:1], "first hop": gold[:1], "backwards": gold[::-1]}[kind]
        found = [Round([(memory.numbers[i], 1.0)], [memory.numbers[i]]) for i in named]
        return value if kind in ("right", "backwards") else "0", found
    rows, _ = evaluate("--task", task, "--lengths", "400", "--questions", 3, answer=answer)
    share = (0.0 if kind == "backwards" else 0.5) if task == "two_hop" else 1.0
    expected = tuple(share if value is None else value for value in expected)
    assert (rows[0]["recall_at_k"], rows[0]["router_top1"], rows[0]["named"],
            rows[0]["exact_match"]) == expected


@pytest.mark.parametrize("seed", range(6))
def test_smallest_memories(evaluate, seed):
    """A memory of a few documents would fail where the needle has the lowest or the highest number."""
    rows, asked = evaluate("--task", "niah_single", "--lengths", "90", "--questions", 2, "--seed", seed)
    assert rows[0]["batch"] == 1  # each question has a memory of its own
    assert 1 <= rows[0]["documents"] <= 4 and all(len(gold_of(a.texts, a.question)[0]) == 1 for a in asked)


def test_top_k(evaluate, checkpoint):
    """--top-k would not change what the model selects, or not be what the table says."""
    for flags, top_k in ((["--top-k", 7], 7), ([], 2)):
        rows, asked = evaluate("--lengths", "300", "--questions", 1, *flags)
        assert rows[0]["top_k"] == asked[0].model.config.top_k == top_k


def test_rows(evaluate, checkpoint):
    """A table would not say what it was measured with, or say something else."""
    flags = ["--task", "read_pooled", "--filler", 1, "--zero-values", "--max-rounds", 0, "--router-weight",
             2.5, "--seed", 9]
    rows, asked = evaluate("--lengths", "300", "--questions", 2, *flags)
    measured = {name: rows[0].pop(name) for name in ("memory_tokens", "documents", "seconds_per_question",
                                                     "encode_tokens_per_second")}
    assert rows == [dict(task="read_pooled", baseline="none", questions=2, seed=9, top_k=2, recall_at_k=0,
                         router_top1=0, named=0,
                         exact_match=0, filler=1, routing_keys="float32", zero_values=True, max_rounds=0,
                         router_weight=2.5, batch=8,
                         checkpoint=str(checkpoint), device="cpu")]
    assert 240 < measured["memory_tokens"] <= 300 and measured["documents"] == len(asked[0].texts)
    assert measured["seconds_per_question"] >= 0 and measured["encode_tokens_per_second"] > 0
    assert asked[0].config.max_rounds == 0 and asked[0].config.router_weight == 2.5


@pytest.mark.parametrize("task", TASKS)
def test_zero_values(evaluate, task):
    """What --zero-values measures would still read the memory, or no longer find in it."""
    flags = ["--task", task, "--lengths", "400", "--questions", 3]
    for plain, zeroed in zip(evaluate(*flags)[1], evaluate(*flags, "--zero-values")[1], strict=True):
        assert plain.question == zeroed.question and plain.texts == zeroed.texts
        assert plain.memory.numbers == zeroed.memory.numbers
        assert all(values.ne(0).any(-1).all() for values in plain.memory.values)
        for a, b in zip(plain.memory.values, zeroed.memory.values):
            assert a.shape == b.shape and b.eq(0).all()
        for name in ("keys", "routing_keys"):
            assert all(torch.equal(a, b)
                       for a, b in zip(getattr(plain.memory, name), getattr(zeroed.memory, name)))


@pytest.mark.parametrize("kind, dtype", [("bfloat16", torch.bfloat16), ("int8", torch.int8)])
@pytest.mark.parametrize("task", ["niah_single", "niah_multikey"])
def test_routing_keys(evaluate, task, kind, dtype):
    """Every figure of rounded routing keys would be one of float32 keys, or a chunk would have another's
    scale."""
    flags = ["--task", task, "--lengths", "400", "--questions", 2]
    rows, asked = evaluate(*flags, "--routing-keys", kind)
    assert rows[0]["routing_keys"] == kind
    for plain, rounded in zip(evaluate(*flags)[1], asked, strict=True):
        assert plain.memory.scales is None
        for layer, (a, b) in enumerate(zip(plain.memory.routing_keys, rounded.memory.routing_keys)):
            assert a.dtype == torch.float32 and b.dtype == dtype
            b = b * rounded.memory.scales[layer][:, None, None] if kind == "int8" else b.float()
            torch.testing.assert_close(a, b, rtol=0, atol=1 / 254 + 1e-6)


@pytest.mark.parametrize("task", ["niah_multikey", "two_hop", "read_pooled"])
def test_bank(evaluate, task, tmp_path):
    """A table over a bank would ask other documents than one over a memory in RAM, or say nothing of what
    opening costs."""
    flags = ["--task", task, "--lengths", "400,800", "--questions", 2]
    rows, asked = evaluate(*flags, "--memory", tmp_path / "bank")
    for row, length in zip(rows, (400, 800)):
        assert row["ranks"] == 1 and row["open_seconds"] > 0 and row["first_question_seconds"] >= 0
        assert row["routing_keys"] == "bfloat16"
        assert len(row["resident_bytes_per_rank"]) == 1 and row["resident_bytes_per_rank"][0] > 1e7
        assert length - 60 < row["memory_tokens"] <= length
    for plain, found in zip(evaluate(*flags, "--routing-keys", "bfloat16")[1], asked, strict=True):
        assert found.question == plain.question and found.texts == plain.texts
        assert found.memory.numbers.tolist() == plain.memory.numbers
        query = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))
        a, b = (m.select({0: query}, torch.ones(1, 3).bool(), 3, [0]) for m in (found.memory, plain.memory))
        assert a.documents.equal(b.documents)
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-6)
    state = (tmp_path / "bank" / "manifest.json").read_bytes()
    evaluate(*flags, "--memory", tmp_path / "bank", "--routing-keys", "int8")  # again: nothing is encoded
    assert (tmp_path / "bank" / "manifest.json").read_bytes() == state


def test_a_bank_of_something_else(run, evaluate, checkpoint, tmp_path, monkeypatch):
    """Evaluating would delete a user's documents from their bank, or ask over an older, shorter memory's
    numbers."""
    evaluate("--lengths", "400", "--questions", 1, "--memory", tmp_path / "bank")
    for other, message in ((["--seed", 5], "holds other documents than this evaluation's"),
                           (["--lengths", "2k"],
                            r"holds 'niah_multikey seed 1 filler 0 #\d+' as \[\d+\], not \[\d+\]; give")):
        state = (tmp_path / "bank" / "manifest.json").read_bytes()
        result = run(evaluation, "--checkpoint", checkpoint, "--lengths", "400", "--questions", 1, "--memory",
                     tmp_path / "bank", *other)
        assert result.code == 2 and re.search(message, result.error), result.error
        assert (tmp_path / "bank" / "manifest.json").read_bytes() == state
    # another model's bank is known before the minutes that a long memory takes to build
    monkeypatch.setattr(evaluation, "grow_memory", None)
    result = run(evaluation, "--checkpoint", Path(evaluation.__file__).parent / "checkpoints/demo",
                 "--memory", tmp_path / "bank")
    assert result.code == 2 and "made by another model" in result.error, result.error


# ------------------------------------------------------------------------------------------------------------
# Baselines

def answer_in(prompt):
    """What a reader of the text behind a question answers: the last number or colour that it states."""
    found = [match for kind in (NEEDLE, PROPERTY) for match in kind.findall(prompt)]
    return found[-1][1] if found else ""


@pytest.fixture
def watch(run, checkpoint, tmp_path, monkeypatch):
    """Run eval.py with a baseline that answers by `answer_in`; returns the rows and what it read, of each
    question."""
    def watch(*flags, checkpoint=checkpoint):
        seen, own = [], Tokenizer.load(checkpoint)

        def prompt(server, asked):
            for row, request in asked.items():
                seen.append(SimpleNamespace(tokens=request.tokens, memory=request.memory, model=server.model))
                server.left[row] = [*own.encode(answer_in(own.decode(request.tokens))), own.end]
            return [[] for _ in asked]

        def no_memory_asked(*_):
            raise AssertionError("a baseline asked the memory")
        with monkeypatch.context() as patch:
            patch.setattr(batches.Server, "left", {}, raising=False)
            patch.setattr(batches.Server, "prompt", prompt)
            patch.setattr(batches.Server, "read", lambda server, asked: [None] * len(asked))
            pick = lambda server, asked: [server.left[row].pop(0) for row in asked]
            patch.setattr(batches.Server, "pick", pick)
            for name in ("answer_questions", "encode_texts"):
                patch.setattr(evaluation, name, no_memory_asked)
            result = run(evaluation, "--checkpoint", checkpoint, "--device", "cpu", "--json",
                         tmp_path / "rows.json", *flags)
        assert result.code == 0, result.err
        assert all(one.memory is None for one in seen)
        return json.loads((tmp_path / "rows.json").read_text()), seen
    return watch


def scores_of(row):
    return row["recall_at_k"], row["router_top1"], row["named"], row["exact_match"]


def with_documents(tokenizer, one, places):
    """The prompt of a question behind which stand these documents of its memory, in this order."""
    documents = "".join(f"[{one.memory.numbers[i]}]. {one.texts[i]}\n" for i in places)
    return f"<|question|>{one.question}\n{documents}<|retrieve|><|end_of_retrieval|>"


@pytest.mark.parametrize("task,filler", [("niah_single", 1), ("niah_multikey", 0), ("two_hop", 0),
                                         ("two_hop", 1), ("read_pooled", 0)])
def test_oracle(evaluate, watch, tokenizer, task, filler):
    """The oracle would read other texts than a question's own documents in the order of the hops, or under
    other numbers; and no_memory more than the question."""
    flags = ["--task", task, "--lengths", "800,1600", "--questions", 3, "--filler", filler, "--seed", 2]
    _, asked = evaluate(*flags)
    rows, seen = watch(*flags, "--baseline", "oracle")
    assert [tokenizer.decode(one.tokens) for one in seen] == [
        with_documents(tokenizer, one, gold_of(one.texts, one.question)[0]) for one in asked]
    assert [(row["baseline"], row["encode_tokens_per_second"], *scores_of(row))
            for row in rows] == [("oracle", 0, 0, 0, 0, 1)] * 2
    rows, seen = watch(*flags, "--baseline", "no_memory")
    assert [tokenizer.decode(one.tokens) for one in seen] == [with_documents(tokenizer, one, [])
                                                              for one in asked]
    assert [(row["baseline"], *scores_of(row)) for row in rows] == [("no_memory", 0, 0, 0, 0)] * 2


@pytest.mark.parametrize("baseline", ["oracle", "bm25"])
def test_baselines_of_several_documents_a_hop(monkeypatch, tokenizer, baseline):
    """A comparison's documents would be searched for in two rounds, or not stand in the order of their
    numbers."""
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")
    texts = ["A khaki otter.", "The quiet river has a khaki otter.", "The amber river is short.",
             "A heron eats."]
    numbers, read = [9, 30, 4, 2], []
    answer = lambda model, tokenizer, asked, *_: read.extend(given for _, given in asked) or ["short"]
    monkeypatch.setattr(evaluation, "answers_from_texts", answer)
    config = SimpleNamespace(baseline=baseline, interleave=None, batch=2)
    model = SimpleNamespace(config=SimpleNamespace(top_k=1))
    question = Question("quiet river or amber river?", ((1, 2), (0,)), "short")
    ask = evaluation.baseline_asker(model, tokenizer, texts, numbers, [], [question], config)(4)
    (answer, found), = ask([0])
    assert [n for n, _ in read[0]] == [4, 30, 9]
    assert [tokenizer.decode(tokens) for _, tokens in read[0]] == [texts[2], texts[1], texts[0]]
    if baseline == "bm25":
        assert [(set(r.named), r.appended) for r in found] == [({4, 30}, [4, 30]), ({9}, [9])]
        # what the rounds before it found, and k
        assert len(found[0].routed) == 2 and len(found[1].routed) == 3
        assert score(question, [[30, 4], [9]], found, answer, 2)[2:] == (1, 1)


@pytest.mark.parametrize("task,filler", [("niah_multikey", 0), ("niah_multikey", 2), ("two_hop", 0),
                                         ("two_hop", 1), ("read_pooled", 0)])
def test_bm25(evaluate, watch, tokenizer, monkeypatch, task, filler):
    """BM25 would search another memory, not go on from the text it found, find a document twice, or be
    counted otherwise than the model."""
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")
    flags = ["--task", task, "--lengths", "1000,3000", "--questions", 3, "--filler", filler]
    _, asked = evaluate(*flags)
    searched = []
    monkeypatch.setattr(evaluation, "bm25_search",
                        lambda texts: searched.append(sorted(texts)) or bm25_search(texts))
    rows, seen = watch(*flags, "--baseline", "bm25")
    assert searched == [sorted(asked[0].texts), sorted(asked[3].texts)]  # each length once
    # no other document holds both words of a key: all is found
    assert [tokenizer.decode(one.tokens) for one in seen] == [
        with_documents(tokenizer, one, gold_of(one.texts, one.question)[0]) for one in asked]
    assert [(row["baseline"], row["encode_tokens_per_second"], *scores_of(row))
            for row in rows] == [("bm25", 0, 1, 1, 1, 1)] * 2


def test_bm25_that_finds_nothing(watch, monkeypatch):
    """Documents that BM25 did not find would count as found, or one that it finds in every round would be
    appended in every round."""
    asked, counted = [], []

    def nothing(texts):
        wrong = [i for i, text in enumerate(texts) if LINK.fullmatch(text)]

        def search(query, k):
            asked.append((query, k))
            key = re.search(r"number for (\S+)\?", query)[1]
            return [(i, 1.0) for i in wrong if f" for {key} is" not in texts[i]][:k]
        return search

    def count(question, gold, rounds, *rest):
        counted.append(rounds)
        return score(question, gold, rounds, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "bm25_search", nothing)
        patch.setattr(evaluation, "score", count)
        rows, seen = watch("--task", "two_hop", "--lengths", "600", "--questions", 2, "--baseline", "bm25")
    assert scores_of(rows[0]) == (0, 0, 0, 0) and len(seen) == 2
    # the checkpoint's top-k, and one for the document that was found
    assert [k for _, k in asked] == [2, 3, 2, 3]
    for i, found in enumerate(counted):
        assert [len(r.named) for r in found] == [1, 1]
        assert found[0].named == found[0].appended != found[1].named == found[1].appended
        assert found[0].routed[0][0] == found[1].routed[0][0] == found[0].named[0]
        assert found[1].routed[1][0] == found[1].named[0]
        (first, _), (second, _) = asked[2 * i:2 * i + 2]
        assert second.startswith(f"{first} One of the special magic numbers for ")


# ------------------------------------------------------------------------------------------------------------
# Sets of questions

def write_set(folder, words):
    """A set in BEIR's layout: a document about each word, and a question about every second one."""
    (folder / "qrels").mkdir(parents=True)
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    documents = [{"_id": word, "title": f"Of {word}", "text": f"The {word} is item {i}."}
                 for i, word in enumerate(words)]
    queries = [{"_id": f"q-{word}", "text": f"Which item is {word}?", "answers": [f"item {i}"]}
               for i, word in enumerate(words) if i % 2 == 0]
    (folder / "corpus.jsonl").write_text(lines(documents))
    (folder / "queries.jsonl").write_text(lines(queries))
    (folder / "qrels" / "test.tsv").write_text("".join(f"q-{word}\t{word}\t1\n" for word in words[::2]))
    return folder


@pytest.fixture
def evaluate_set(run, checkpoint, tmp_path, monkeypatch):
    """Run eval.py on a set, with a reader that copies the last item that it was given; returns the rows, what
    was read and what was printed. The memory ranks documents by their texts backwards."""
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")

    def evaluate_set(*flags, reaches=float("-inf")):
        seen = []

        def answer(tokenizer, question, appended):
            texts = [tokenizer.decode(text) for _, text in appended]
            seen.append((question, [number for number, _ in appended], texts))
            return texts[-1].rpartition(" is ")[2] if texts else "unknown"

        def answer_all(model, tokenizer, asked, config, batch, cut):
            return [answer(tokenizer, *one) for one in asked]

        def ranked(model, tokenizer, memory, texts, questions, config, batch, look):
            assert model.config.top_k in (16, min(64, len(memory)))
            return [(list(range(len(memory)))[::-1], 20, len(question) / 100) for question in questions]
        with monkeypatch.context() as patch:
            patch.setattr(answers, "answers_from_texts", answer_all)
            patch.setattr(evaluation, "ranked", ranked)
            patch.setattr(evaluation, "chance", lambda *_: reaches)
            result = run(evaluation, "--checkpoint", checkpoint, "--device", "cpu", "--json",
                         tmp_path / "rows.json", *flags)
        assert result.code == 0, result.err
        return json.loads((tmp_path / "rows.json").read_text()), seen, result.out
    return evaluate_set


def test_sets(evaluate_set, tokenizer, tmp_path):
    """A table would be of other documents than it says: without titles, without distractors, of another
    order; or lack a field that others read."""
    words = "amber teal otter heron river castle".split()
    data, more = write_set(tmp_path / "set", words), write_set(tmp_path / "more", "khaki quiet".split())
    rows, seen, out = evaluate_set("--data", data, "--distractors", more, "--questions", 2, "--k", "1,3",
                                   "--plot", tmp_path / "rows.png")
    assert "test.tsv: no header (1)" in out and "95 % interval" in out
    texts = [f"Of {word}\nThe {word} is item {i}." for part in (words, ["khaki", "quiet"])
             for i, word in enumerate(part)]
    tokens = [len(tokenizer.encode(text)) for text in texts]
    assert [(row["set"], row["split"], row["documents"], row["memory_tokens"], row["k"], row["method"])
            for row in rows] == [("set", "test", count, sum(tokens[:count]), k, method) for count in (6, 8)
                                 for k in (1, 3) for method in ("none", "oracle", "bm25", "memory")]
    assert all(row["questions"] == 2 and row["questions_of_recall"] == 3 for row in rows)
    named = dict(oracle=(None,) * 4, none=(None,) * 4, bm25=(1, 1, 1, 1))
    for row in rows:
        # backwards, the third of six documents is fourth, the first sixth; behind two more, two later
        memory = (0, 2 / 3, 1, 1) if row["documents"] == 6 else (0, 1 / 3, 1, 1)
        recall = named.get(row["method"], memory)
        assert tuple(row[name] for name in ("recall_at_1", "recall_at_5", "recall_at_16",
                                            "all_gold_at_16")) == recall
    assert [row["exact_match"] for row in rows[:2]] == [0, 1] and rows[2]["exact_match"] == 1
    for _, numbers, read in seen:
        assert read == [texts[number] for number in numbers] and len(numbers) <= 3
    given = [numbers for _, numbers, _ in seen]
    assert {len(numbers) for numbers in given} == {0, 1, 3} and [7, 6, 5] in given and [5, 4, 3] in given
    assert {question for question, *_ in seen} < {f"Which item is {word}?" for word in words[::2]}


def test_what_a_set_leaves_out(evaluate_set, tmp_path):
    """One question, with the history of its conversation, would cost a whole set; or what a distractor holds,
    too, count as a wrong answer."""
    data = write_set(tmp_path / "set", "amber teal otter heron".split())
    more = write_set(tmp_path / "more", "amber khaki".split())  # "amber" as in the set
    with open(data / "queries.jsonl", "a") as file:
        file.write(json.dumps({"_id": "q-teal", "text": "Why? " * 10_000}) + "\n")
    with open(data / "qrels" / "test.tsv", "a") as file:
        file.write("q-teal\tteal\t1\n")
    rows, _, out = evaluate_set("--data", data, "--distractors", more, "--questions", 1)
    assert f"{data}: questions left out: of more than 16,384 tokens (1)" in out
    assert {row["documents"] for row in rows} == {4, 5}
    assert {row["questions_of_recall"] for row in rows} == {2}


def test_nothing_to_measure(evaluate_set, run, checkpoint, tmp_path):
    """Questions without answers and documents would cost the whole evaluation and give dashes; or the oracle
    vanish, and nobody say why."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("The heron is 3.")
    bare, flags = {"question": "Which?"}, ("--data", tmp_path / "q.jsonl", "--documents", tmp_path / "notes")
    (tmp_path / "q.jsonl").write_text(json.dumps(bare))
    result = run(evaluation, "--checkpoint", checkpoint, "--device", "cpu", *flags)
    assert result.code == 2 and "no question is left of which an answer or a document" in result.error
    (tmp_path / "q.jsonl").write_text(json.dumps(bare | {"answer": "3"}))
    rows, _, out = evaluate_set(*flags, "--k", 1)
    assert [row["method"] for row in rows] == ["none", "bm25", "memory"]
    assert "answered, but no document is named; so none is given as the oracle's (1)" in out
    (tmp_path / "q.jsonl").write_text(json.dumps(bare | {"documents": []}))
    rows, _, out = evaluate_set(*flags, "--k", 1)
    assert "k 1: told " in out and rows[-1]["not_found_rightly"] == 0


def test_impossible(evaluate_set, checkpoint, tmp_path):
    """Questions that nothing answers would be asked of a model that never learned to say so, count among
    those with an answer, or be those of another split."""
    data = write_set(tmp_path / "set", "amber teal otter heron".split())
    (data / "impossible.jsonl").write_text("".join(
        json.dumps({"text": f"Who sold {word}?", "document": word, "split": split}) + "\n"
        for word, split in (("amber", "test"), ("teal", "train"), ("otter", "test"))))
    flags = "--data", data, "--questions", 2, "--k", 1
    rows, seen, out = evaluate_set(*flags)
    assert not [question for question, *_ in seen if "sold" in question] and len(rows) == 4
    shutil.copytree(checkpoint, tmp_path / "looks")
    about = json.loads((checkpoint / "config.json").read_text())
    about["msa_config"]["second_look"] = 2
    (tmp_path / "looks" / "config.json").write_text(json.dumps(about))
    rows, seen, out = evaluate_set(*flags, "--checkpoint", tmp_path / "looks")
    assert [question for question, *_ in seen if "sold" in question] == ["Who sold amber?", "Who sold otter?"]
    assert [row["method"] for row in rows] == ["none", "oracle", "bm25", "routing", "memory"]
    assert [row["not_found_rightly"] for row in rows] == [None] * 4 + [0] and "k 1: told " in out
    assert {row["questions"] for row in rows} == {2}


def test_a_set_that_nothing_answers(run, checkpoint, tmp_path):
    """Questions that are all marked as without an answer would be told to be ones that nobody judged."""
    data = write_set(tmp_path / "set", "amber teal".split())
    (data / "queries.jsonl").write_text('{"_id": "q-amber", "text": "Who sold it?", "is_impossible": true}\n')
    result = run(evaluation, "--checkpoint", checkpoint, "--device", "cpu", "--data", data)
    assert result.code == 2 and "nothing answers any question of test, which this checkpoint" in result.err


def test_a_long_document(evaluate_set, tmp_path):
    """A long document would be read as a whole, or its passages count as documents."""
    data = write_set(tmp_path / "set", "amber teal otter".split())
    body = "".join(f"The otter has {i} fish.\\n\\n" for i in range(2000))
    with open(data / "corpus.jsonl", "a") as file:
        file.write(f'{{"_id": "fish", "title": "Fish", "text": "{body}"}}\n')
    rows, seen, out = evaluate_set("--data", data, "--questions", 2, "--k", 1)
    assert "4 documents in " in out and {row["documents"] for row in rows} == {4}
    memory = [texts for _, numbers, texts in seen if numbers and numbers[0] > 2]
    assert memory and all(text.startswith("Fish\nThe otter has ") and len(text) < 4000 for text, in memory)
    row, = [row for row in rows if row["method"] == "memory"]
    assert (row["recall_at_1"], row["recall_at_5"]) == (0, 1)  # backwards: fish, otter, teal, amber


def test_a_set_in_a_bank(evaluate_set, tmp_path):
    """A bank would hold other documents than the set, be searched beyond the size that a row is about, be
    encoded twice, or fail for half a character."""
    data = write_set(tmp_path / "set", "amber teal otter heron".split())
    more = write_set(tmp_path / "more", ["khaki"])
    flags = ["--data", data, "--distractors", more, "--questions", 1]
    bare = lambda rows: [{name: value for name, value in row.items() if name not in
                          ("seconds_per_question", "routing_keys")} for row in rows]
    rows, _, _ = evaluate_set(*flags, "--memory", tmp_path / "bank")
    state = (tmp_path / "bank" / "manifest.json").read_bytes()
    assert bare(rows) == bare(evaluate_set(*flags)[0])
    evaluate_set(*flags, "--memory", tmp_path / "bank")
    assert (tmp_path / "bank" / "manifest.json").read_bytes() == state
    ask = {"question": "Which?", "answers": [{"text": "item 0"}]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"title": "Half \ud83d", "paragraphs": [
        {"context": "The amber \ud83d is item 0.", "qas": [ask]}]}]}))
    half = "--data", tmp_path / "squad.json", "--split", "all", "--memory", tmp_path / "half"
    rows, _, _ = evaluate_set(*half)
    assert rows[0]["documents"] == 1


def test_own_questions(evaluate_set, tmp_path, monkeypatch):
    """Questions about a folder of notes would be about other pieces of it; one that nothing answers would
    count as answered, or a model whose chance is not known as if it refused nothing."""
    (tmp_path / "notes").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "notes" / f"{name}.md").write_text(f"The {name}{name} is {name.upper()}")
    questions = [{"question": "What is bb?", "answers": ["b"], "documents": ["b.md"]},
                 {"question": "What is it all about?", "documents": []},
                 {"question": "What is dd?", "answer": "", "documents": []}]
    flags = "--data", tmp_path / "own.jsonl", "--documents", tmp_path / "notes", "--k", 2
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, questions)))
    rows, seen, out = evaluate_set(*flags, reaches=0.11)  # the patched best score is .01 a letter
    assert (rows[3]["refused"], rows[3]["refused_rightly"], rows[3]["not_found_rightly"]) == (1, 0.5, 0)
    assert "that have an answer: 1.000 (chance" in out and "that nothing answers: 0.500 (chance" in out
    (tmp_path / "own.jsonl").write_text(json.dumps(questions[0]))
    monkeypatch.setattr(documents, "LONG", 3)  # one's own are not cut again, as a set's are
    rows, seen, out = evaluate_set(*flags)
    assert (rows[3]["refused"], rows[3]["refused_rightly"]) == (None, None) and "refused" not in out
    assert " documents in " not in out
    assert [(row["method"], row["exact_match"]) for row in rows] == [
        ("none", 0), ("oracle", 1), ("bm25", 1), ("memory", 1)]
    assert rows[3]["recall_at_1"] == 0 and rows[2]["recall_at_1"] == rows[3]["recall_at_16"] == 1
    assert [numbers for _, numbers, _ in seen if len(numbers) == 2][-1] == [2, 1]
    (tmp_path / "own.jsonl").write_text(json.dumps(questions[0] | {"question": "Who was it?"}))
    assert evaluate_set(*flags)[0][2]["recall_at_16"] == 0  # BM25 knows none of these words


def test_questions_about_whole_files(evaluate_set, tmp_path):
    """A file that is named as a whole would be refused, or its first piece alone pass for it."""
    (tmp_path / "notes").mkdir()
    lines = [f"The otter has {i} fish, {'and ' * 40}so on." for i in range(9)]
    (tmp_path / "notes" / "fish.md").write_text("\n\n".join(lines))
    (tmp_path / "notes" / "line.md").write_text(" ".join(lines))
    (tmp_path / "notes" / "b.md").write_text("The bb is B")
    questions = [{"question": "What is bb?", "answers": ["b"], "documents": ["b.md"]},
                 {"question": "How many fish?", "answers": ["8 fish"], "documents": ["fish.md"]},
                 {"question": "Which line?", "answers": ["8 fish"], "documents": ["line.md:1"]}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, questions)))
    rows, seen, out = evaluate_set("--data", tmp_path / "own.jsonl", "--documents", tmp_path / "notes",
                                   "--k", 1, "--max-answer-tokens", 5)
    assert "3 documents in " in out and {row["documents"] for row in rows} == {3}
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, questions[::2])))  # of a line: its piece
    _, asked, said = evaluate_set("--data", tmp_path / "own.jsonl", "--documents", tmp_path / "notes",
                                  "--k", 1)
    assert " documents in " not in said
    nothing = {"question": "Why?", "is_impossible": True, "documents": ["fish.md"]}  # says nothing of files
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, [*questions[::2], nothing])))
    assert " documents in " not in evaluate_set("--data", tmp_path / "own.jsonl", "--documents",
                                                tmp_path / "notes", "--k", 1)[2]
    assert [len(texts) for _, _, texts in asked if "8 fish" in " ".join(texts)] == [1]
    given = [texts for question, _, texts in seen if question != "What is bb?"]
    assert max(map(len, given)) > 1 and any("8 fish" in text for texts in given for text in texts)


def test_a_set_without_answers(evaluate_set, checkpoint, tmp_path):
    """A set that nobody answers would have a second look taken at each of its questions, for hours; or shares
    of all questions stand beside shares of some, and nobody say so."""
    data = write_set(tmp_path / "set", "amber teal otter heron khaki".split())
    lines = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    (data / "queries.jsonl").write_text("".join(json.dumps({"_id": row["_id"], "text": row["text"]}) + "\n"
                                                for row in lines))
    shutil.copytree(checkpoint, tmp_path / "looks")
    about = json.loads((checkpoint / "config.json").read_text())
    about["msa_config"]["second_look"] = 2
    (tmp_path / "looks" / "config.json").write_text(json.dumps(about))
    for count, looked in ((2, 2), (0, len(lines))):
        rows, _, out = evaluate_set("--data", data, "--questions", count, "--checkpoint", tmp_path / "looks")
        found = {row["method"]: row["questions_of_recall"] for row in rows}
        assert found == dict(bm25=len(lines), routing=len(lines), memory=looked)
        assert ("of different questions: bm25's of 3, routing's of 3, memory's of 2" in out) == (count == 2)


@pytest.mark.parametrize("flags,message", [
    (["--data", "own.jsonl", "--documents", "notes", "--split", "dev"], "--split is about a set; questions"),
    (["--data", "set", "--task", "two_hop"], "--task is not for --data"),
    (["--data", "set", "--zero-values"], "--zero-values is not for --data"),
    (["--split", "dev"], "--split is about a set; give its --data"),
    (["--data", "own.jsonl"], "--data own.jsonl: a .jsonl file of questions and --documents belong together"),
    (["--data", "set", "--documents", "notes"], "and --documents belong together"),
    (["--data", "set", "--k", "0"], "--k 0: not counts of documents"),
    (["--data", "set", "--k", "1,x"], "--k 1,x: not counts of documents"),
    (["--data", "set", "--k", "2000000"], "--k 2000000: not counts of documents, 1 to 1000"),
    (["--data", "set", "--k", "2", "--max-documents", "1"], "--k says how many documents are read"),
    (["--data", "set", "--max-rounds", "0"], "--max-rounds 0 is about tasks"),
    (["--data", "nothing"], "nothing: No such file or directory; expected SQuAD's .json file, or a folder")])
def test_flags_of_sets(run, checkpoint, flags, message):
    """A flag that does nothing would be taken without a word."""
    result = run(evaluation, "--checkpoint", checkpoint, "--device", "cpu", *flags)
    assert result.code == 2 and message in result.error, result.error


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_outputs_in_the_bank(run, tmp_path, flag):
    """A file of the bank, such as its manifest, would be replaced by what is measured."""
    (tmp_path / "manifest.json").write_text("{}")
    result = run(evaluation, "--memory", tmp_path, flag, tmp_path / "manifest.json")
    assert result.code == 2 and f"{flag} {tmp_path / 'manifest.json'}: lies in --memory" in result.error
    assert (tmp_path / "manifest.json").read_text() == "{}"
