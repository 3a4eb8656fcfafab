"""Reading of sets of questions, with what is wrong in the files that people have, and BM25."""
import gzip
import json
import math
import re
import sys

import pytest

from common import UserError
from documents import Titled, read_documents
from question_sets import (
    SetQuestion,
    bm25_search,
    choose_split,
    holds,
    read_beir,
    read_questions,
    read_set,
    read_squad,
    read_texts,
    titled,
)

HEAD = "query-id\tcorpus-id\tscore\n"


def beir_set(folder):
    """A set of four documents, of which the first question needs one and the second, in another split,
    two."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "Title" if i == 1 else "", "text": f"Text {i}."} for i in range(4)]
    queries = [{"_id": "q0", "text": "Which is third?", "answers": ["d2", "the third"]},
               {"_id": "q1", "text": "Which are first?"}]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "train.tsv").write_text(f"{HEAD}q0\td2\t1\n")
    lines = ("q1\td1\t1", "", "q0\td3\t2", "q1\td0\t1", "q1\td1\t1", "q1\td3\t0")
    (folder / "qrels" / "test.tsv").write_text(HEAD + "\n".join(lines))
    return folder


def test_read_beir(tmp_path):
    """Splits would be mixed, a title or the answers lost, a document counted that does not answer, or
    twice; a set without a fault would be complained about."""
    said = []
    texts, questions, none = read_beir(beir_set(tmp_path / "set"), said.append)
    assert texts == ["Text 0.", "Title\nText 1.", "Text 2.", "Text 3."] and said == []
    assert questions == {"train": [SetQuestion("Which is third?", (2,), ("d2", "the third"))],
                         "test": [SetQuestion("Which are first?", (1, 0)),
                                  SetQuestion("Which is third?", (3,), ("d2", "the third"))]}
    assert read_set(tmp_path / "set", said.append) == (texts, questions, none) and none == {}
    (tmp_path / "set" / "queries.jsonl").unlink()
    assert read_texts(tmp_path / "set") == texts


@pytest.mark.parametrize("text,gold,message", [
    # a question that is not there, and a document that is not
    (HEAD + "q9\td1\t1\nq0\td1\t1\nq0\td9\t1\n", {"q0": (1,)},
     "skipped: unknown question or document (2), "
     "questions judged by the others of their documents alone (1)"),
    (HEAD + "q0\td1\t1\t\t\nq1\td9\t0\nq1\td0\t1\n", {"q0": (1,), "q1": (0,)},
     "skipped: unknown question or document (1)"),
    ("q0\td0\t1\nq0\td3\t1\n", {"q0": (0, 3)}, "no header (1)"),
    (HEAD + "q0\td0\t1.0\nq0\td1\t0.0\nq0\td2\t0.5\nq0\td3\t1\n", {"q0": (0, 2, 3)}, "decimal scores (3)"),
    ("q0\t0\td0\t1\nq1\t0\td2\t0\nq1\tQ0\td3\t2\n", {"q0": (0,), "q1": (3,)},
     "no header (1), four columns (3)"),
    ("q0 0 d0 1\nq1 0 d2 1\n", {"q0": (0,), "q1": (2,)}, "no header (1), four columns (2)"),
    ("\nquery-id\tcorpus-id\tscore\thop\nq0 \t d0\t1\t1\nq0\td1\t0\t1\n", {"q0": (0,)}, None),
    ("query-id\titer\tcorpus-id\tscore\nq0\td1\td0\t1\n", {"q0": (0,)}, "four columns (1)"),
    (HEAD + "q0\td0\t-1\n", {}, None),
    ("\ufeff" + HEAD + "q0\td0\t1\r\n", {"q0": (0,)}, None)])
def test_odd_judgements(tmp_path, text, gold, message):
    """A set with the usual faults would be refused, its first judgement taken for a header, a negative
    judgement for a positive; or nobody would be told what was skipped."""
    folder, said = beir_set(tmp_path / "set"), []
    (folder / "qrels" / "test.tsv").write_bytes(text.encode())
    _, questions, _ = read_beir(folder, said.append)
    names = {"Which is third?": "q0", "Which are first?": "q1"}
    assert {names[question.text]: question.gold for question in questions["test"]} == gold
    said = [line for line in said if "qrels/test.tsv" in line]
    assert said == ([f"{folder}/qrels/test.tsv: {message}"] if message else [])


def test_numbers_as_ids(tmp_path):
    """A set whose ids are whole numbers would be refused, or lose its questions; a flag would be an id."""
    folder = beir_set(tmp_path / "set")
    (folder / "corpus.jsonl").write_text('{"_id": 0, "text": "a"}\n{"_id": 12, "text": "b"}\n')
    (folder / "queries.jsonl").write_text('{"_id": 7, "text": "Which?"}\n')
    (folder / "qrels" / "test.tsv").write_text(HEAD + "7\t12\t1\n")
    (folder / "impossible.jsonl").write_text('{"text": "Why?", "document": 12, "split": "test"}\n')
    _, questions, none = read_beir(folder)
    assert questions["test"] == [SetQuestion("Which?", (1,))] and none == {"test": [("Why?", 1)]}
    (folder / "queries.jsonl").write_text('{"_id": true, "text": "Which?"}\n')
    with pytest.raises(UserError, match='queries.jsonl:1: a question needs an "_id", a string or a w'):
        read_beir(folder)


@pytest.mark.parametrize("fields,answers", [
    ('"answer": 0', ("0",)), ('"answer": false', ("no",)), ('"answers": 5.5', ("5.5",)),
    ('"answers": "c"', ("c",)), ('"answers": [["x", "y"], [true], null, " "]', ("x", "y", "yes")),
    ('"answers": [], "answer": ["x"]', ("x",)), ('"answers": ["x"], "answer": "y"', ("x",)),
    ('"answer": "x", "answer_aliases": ["y", "x"]', ("x", "y")),
    ('"metadata": {"answer": "x", "answer_aliases": ["y"]}', ("x", "y")),
    ('"answer": 3.0', ("3",)), ('"answer": NaN, "answer_aliases": ["x", NaN]', ("x",)),
    ('"answer": [], "metadata": 5', ())])
def test_how_answers_are_spelled(tmp_path, fields, answers):
    """A set would be refused, or an answer that is right be wrong, for the way in which others write them."""
    folder = beir_set(tmp_path / "set")
    (folder / "queries.jsonl").write_text('{"id": "q", "text": "How many?", ' + fields + "}")
    (folder / "qrels" / "test.tsv").write_text(HEAD + "q\td1\t1\n")
    assert read_beir(folder)[1]["test"] == [SetQuestion("How many?", (1,), answers)]


def test_what_stands_for_no_answer(tmp_path):
    """A model that rightly refuses would be wrong, and be trained to say CANNOTANSWER."""
    folder = beir_set(tmp_path / "set")
    rows = [("a", ["CANNOTANSWER"]), ("b", ["Unanswerable", "CANNOTANSWER"]), ("c", ["CANNOTANSWER", "yes"])]
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": id, "text": id, "answers": given}) + "\n"
                                                  for id, given in rows))
    (folder / "qrels" / "test.tsv").write_text(HEAD + "a\td1\t1\nb\td2\t1\nc\td3\t1\n")
    _, questions, none = read_beir(folder)
    assert questions["test"] == [SetQuestion("c", (3,), ("yes",))] and none == {"test": [("a", 1), ("b", 2)]}
    with open(folder / "queries.jsonl", "a") as file:
        file.write('{"_id": "d", "text": "d", "answers": ["unanswerable"]}\n'
                   '{"_id": "e", "text": "e", "answers": ["x"], "answerable": false}\n'
                   '{"_id": "f", "text": "f", "metadata": {"is_impossible": 1}}\n'
                   '{"_id": "g", "text": "g", "answers": ["x"], "answerable": true}\n')
    with open(folder / "qrels" / "test.tsv", "a") as file:
        file.write("d\td1\t0\ne\td2\t1\n")  # MS MARCO judges them 0, others not at all
    said = []
    _, questions, none = read_beir(folder, said.append)
    assert len(questions["test"]) == 1 and none["test"] == [("d", None), ("f", None), ("a", 1), ("b", 2),
                                                            ("e", 2)]
    assert said[-1].endswith("no qrels name a document that answers (1)")
    for path in (folder / "qrels").iterdir():
        path.unlink()
    assert read_beir(folder, said.append)[2] == {} and said[-1].endswith("document that answers (7)")
    asked = lambda *answers: {"question": "Why?", "answers": [{"text": answer} for answer in answers]}
    paragraphs = [{"context": "It is red. CANNOTANSWER", "qas": [asked("CANNOTANSWER"), asked("red")]},
                  {"context": " ", "qas": [asked("blue")]}, {"context": "It is red.", "qas": [asked("It")]}]
    path, said = tmp_path / "quac.json", []
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    texts, questions, none = read_squad(path, said.append)
    assert texts == ["It is red."] and none["train"] == [("Why?", 0)]
    assert questions["train"] == [SetQuestion("Why?", (0,), ("red",)), SetQuestion("Why?", (0,), ("It",))]
    assert said[-1] == f"{path}: skipped: empty context (1)"


@pytest.mark.parametrize("text,answer,held", [
    ("by Mark\nHunter in", "mark hunter", True), ("It is known.", "no", False), ("вода", "да", False),
    ("Это да.", "да", True), ("cafés", "caf", False), ("他在北京住", "北京", True),
    ("_Oslo_", "Oslo ", True)])
def test_holds(text, answer, held):
    """The oracle would show another passage than the one that answers."""
    assert holds(text, ["nothing", answer]) == held


def test_documents_that_repeat(tmp_path):
    """Of two documents alike one would count as wrong, and be what does not answer in training."""
    folder, said = beir_set(tmp_path / "set"), []
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"_id": "d4", "text": "Text 0."}\n{"_id": "d5", "text": "Text 5."}\n')
    (folder / "qrels" / "test.tsv").write_text(HEAD + "q0\td4\t1\nq0\td0\t1\nq1\td5\t1\n")
    texts, questions, _ = read_beir(folder, said.append)
    assert texts == ["Text 0.", "Title\nText 1.", "Text 2.", "Text 3.", "Text 5."] == read_texts(folder)
    assert [question.gold for question in questions["test"]] == [(0,), (4,)]
    assert said == [f"{folder}/corpus.jsonl: the same as another, and one document with it (1)"]


@pytest.mark.parametrize("answer", ["{}", "[{}]", '[["x", ["y"]]]'])
def test_answers_that_are_no_text(tmp_path, answer):
    """An object that answers would be left out, and its question not be asked."""
    folder = beir_set(tmp_path / "set")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "How many?", "answer": ' + answer + "}")
    with pytest.raises(UserError, match='queries.jsonl:1: "answer" is .*; it must be a list of strings'):
        read_beir(folder)


def test_what_is_not_asked(tmp_path):
    """A question that nobody judged would vanish, and one that nothing answers, where its split is not
    named; or a title that is a number be refused."""
    folder, said = beir_set(tmp_path / "set"), []
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": 1984, "text": "Text."}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q0", "text": "Which?"}\n{"_id": "q1", "text": "Who?"}\n')
    (folder / "impossible.jsonl").write_text('{"text": "Why?"}\n{"text": "How?", "split": "test"}\n')
    texts, questions, none = read_beir(folder, said.append)
    assert texts == ["1984\nText."] and questions["test"] == [SetQuestion("Who?", (0,))]
    assert none == {"test": [("Why?", None), ("How?", None)], "train": [("Why?", None)]}
    assert f"{folder}/queries.jsonl: not asked: no qrels name a document that answers (1)" in said
    with open(folder / "queries.jsonl", "a") as file:
        file.write('{"_id": "q2", "text": "Who?"}\n')  # a turn with the same words
    assert len(read_beir(folder, said.append)[1]["test"]) == 1 and said[-1].endswith("that answers (2)")
    (folder / "impossible.jsonl").write_text('{"text": "Why?", "split": "Test"}\n')
    read_beir(folder, said.append)
    assert said[-1].endswith(", not asked: of a split of impossible.jsonl that no qrels file has (1)")


@pytest.mark.parametrize("file,text,message", [
    ("corpus.jsonl", None, "corpus.jsonl: no such file; expected a set in BEIR's layout"),
    ("queries.jsonl", None, "queries.jsonl: No such file"),
    ("queries.jsonl", '{"_id": "a"}\n', "queries.jsonl:1: not an object"),
    ("queries.jsonl", '{"text": "a"}\n', 'queries.jsonl:1: a question needs an "_id"'),
    ("queries.jsonl", '\n[]\n', "queries.jsonl:2: not a JSON object"),
    ("queries.jsonl", b'{"_id": "a", "text": "\xff"}\n', "queries.jsonl:1: not a JSON object"),
    ("corpus.jsonl", '{"_id": "a", "text": ""}\n', "corpus.jsonl: no document in it"),
    ("qrels/test.tsv", HEAD + "q0\td1\tbest\n", "test.tsv:2: 'q0.*is not a question's id"),
    ("qrels/test.tsv", HEAD + "q0\td1\t--1\n", "test.tsv:2"),
    ("qrels/test.tsv", b"head\n\xff", "test.tsv: not UTF-8"),
    ("qrels/test.tsv", "q0\td1\tbest\n", "test.tsv:1: 'q0.*is not a question's id"),
    ("qrels/test.tsv", HEAD + "q0\n", "test.tsv:2")])
def test_bad_sets(tmp_path, file, text, message):
    """A damaged set would end in a traceback that does not name the line."""
    folder = beir_set(tmp_path / "set")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_beir(folder, print)


def test_choose_split():
    """A table would be of training questions, or of another split than it says."""
    one = [SetQuestion("?", (0,))]
    none = {"train": [("Why?", 0)], "test": [("How?", 1), ("Why?", 0)]}
    choose = lambda questions, split="", none=none: choose_split(questions, none, split, "set")
    assert choose({"train": one, "dev": one * 2, "test": one * 3}) == (one * 3, none["test"], "test")
    assert choose({"train": one, "dev": one * 2, "test": []}) == (one * 2, [], "dev")
    assert choose({"train": one * 4, "test": []}) == (one * 4, none["train"], "train")
    assert choose({"train": one * 4, "test": one}, "train") == (one * 4, none["train"], "train")
    other = [SetQuestion("!", (1,))]
    assert choose({"train": one, "test": other + one, "dev": []}, "all") == (
        one + other, [("Why?", 0), ("How?", 1)], "all")
    assert choose({"test": []}) == ([], none["test"], "test")  # nothing answers any of them
    assert choose({"train": [], "dev": []}, "train") == ([], none["train"], "train")
    assert choose({"dev": []}, "all") == ([], [("Why?", 0), ("How?", 1)], "all")
    for questions, split, message in (
            ({"a": one, "b": one}, "", "set: several splits, none of them test or dev; give --split a or b"),
            ({"test": one}, "dev", "set: no split 'dev' with questions; give --split test"),
            ({"test": []}, "test", "set: no question of it has a document that answers; expected judgements"),
            ({}, "all", "set: no question of it has a document that answers")):
        with pytest.raises(UserError, match=f"^{message}"):
            choose(questions, split, {"test": []})


def test_read_squad(tmp_path):
    """Questions would be about another paragraph, answers be doubled, or test articles be trained on."""
    article = lambda name, *asked: {"title": name, "paragraphs": [{"context": f"{name} text.", "qas": [
        {"question": question, "is_impossible": impossible, "answers": [{"text": name}, {"text": name}]}
        for question, impossible in asked]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [article("A_b", (" Why? ", False), ("No?", True)), article("B"),
                                         article("C", ("Who?", False)),
                                         article("D", ("When?", False))]}))
    said = []
    texts, questions, none = read_squad(path, said.append)
    assert said == [f"{path}: every fourth article is for testing: 1 questions; 2 of train"]
    assert none == {"train": [("No?", 0)], "test": []}
    assert texts == ["A b\nA_b text.", "B\nB text.", "C\nC text.", "D\nD text."] == read_texts(path)
    assert questions == {"train": [SetQuestion("Why?", (0,), ("A_b",)), SetQuestion("Who?", (2,), ("C",))],
                         "test": [SetQuestion("When?", (3,), ("D",))]}
    typed = lambda context, answer: json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [
        {"question": "a", "answers": [{"text": answer}]}]}]}]})
    for text, message in (
            ("{", "JSONDecodeError"), ("[]", "data is null, not a list"), ('{"data": 3}', "data is 3, not a"),
            ('{"data": [{"title": "A"}]}', r"data\[0\].paragraphs is null, not a list"),
            ('{"data": [{"title": ["A"], "paragraphs": []}]}', r"data\[0\].title is ..A.., not a text"),
            (typed(None, "c"), r"data\[0\].paragraphs\[0\].context is null, not a text"),
            (typed("b", "c").replace('"a"', "7"), r"data\[0\].paragraphs\[0\].qas\[0\].question is 7, not")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"squad.json: not a file of SQuAD's: {message}"):
            read_squad(path)
    path.write_text(typed("b", {}))
    with pytest.raises(UserError, match=r"qas\[0\].answers is .*; it must be a list of strings"):
        read_squad(path)
    path.write_text(typed("b", 7).replace('[{"text": 7}]', '{"text": ["x", 7], "answer_start": [0, 0]}'))
    assert read_squad(path)[1]["train"] == [SetQuestion("a", (0,), ("x", "7"))]  # the Hub's spelling
    with pytest.raises(UserError, match="No such file"):
        read_squad(tmp_path / "none.json")
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match=f"^{path}: compressed; gunzip it first"):
        read_squad(path)
    path.write_text(json.dumps({"data": [article("A") | {"title": None}]}))
    assert read_squad(path)[0] == ["A text."]
    blank, none = article("", ("Why?", False), (" ", False), (" ", True)), article("C", ("Who?", False))
    none["paragraphs"][0]["qas"][0]["answers"] = None
    none["paragraphs"][0]["qas"].append({"question": "How?", "answerable": False, "answers": []})
    path.write_text(json.dumps({"data": [blank, none]}))
    _, questions, none = read_squad(path, said.append)
    assert questions["train"] == [SetQuestion("Why?", (0,)), SetQuestion("Who?", (1,))]
    assert none["train"] == [("How?", 1)]
    assert said[-1] == f"{path}: skipped: empty question (2)"


def test_titled():
    """A document without a title would begin with an empty line, as if the title were one."""
    assert titled("A", "b") == "A\nb" and titled("", "b") == "b"
    assert isinstance(titled("A", "b"), Titled) and not isinstance(titled("", "b"), Titled)


def test_read_questions(tmp_path):
    """One's own questions would be about another piece of a file than the line that they name."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("one two three\n\nfour five six\n\nseven")
    (tmp_path / "notes" / "b.md").write_text("eight")
    documents = list(read_documents(tmp_path / "notes", lambda text: len(text.split()), 3))
    assert [document.text for document in documents] == ["one two three", "four five six", "seven", "eight"]
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "Which?", "answers": ["five"], "documents": ["a.md:3", "b.md"]}\n\n'
                    '{"question": "What?"}\n{"question": "Who?", "answer": "eight"}\n'
                    '{"question": "Where?", "answer": "", "documents": []}\n'
                    '{"question": "When?", "answers": ["", "six"], "documents": []}\n'
                    '{"question": "How?", "answers": [" "], "documents": []}\n')
    assert read_questions(path, documents) == [
        SetQuestion("Which?", (1, 3), ("five",)), SetQuestion("What?", ()),
        SetQuestion("Who?", (), ("eight",)), SetQuestion("Where?", (), nothing=True),
        SetQuestion("When?", (), ("six",)), SetQuestion("How?", (), nothing=True)]
    path.write_text('{"question": "Which?", "documents": [["b.md", "a.md:5"]]}\n'  # a hop
                    '{"question": "Where?", "documents": []}\n' * 2
                    + '{"question": "Which?", "documents": ["b.md", "a.md"]}\n')
    said = []
    assert read_questions(path, documents, said.append) == [
        SetQuestion("Which?", (3, 2)), SetQuestion("Where?", (), nothing=True),
        SetQuestion("Which?", (3, 0), whole=True)]
    assert said == [f"{path}: skipped: asked again (2)"]
    for line, message in (('{"question": "?", "documents": ["a.md:2"]}', "'a.md:2' names no document"),
                          ('{"question": "?", "documents": ["c.md"]}', "'c.md' names no document"),
                          ('{"question": "?", "documents": [3]}', "'3' names no document"),
                          ('{"question": "?", "documents": "b.md"}', "\"documents\" is 'b.md'"),
                          ('{"text": "?"}', 'not an object {"question"'), ("?", "not a JSON object")):
        path.write_text(f"\n{line}\n")
        with pytest.raises(UserError, match=f"own.jsonl:2: {re.escape(message)}"):
            read_questions(path, documents)
    path.write_text("\n")
    with pytest.raises(UserError, match="no question in it"):
        read_questions(path, documents)


def test_a_document_of_one_long_line(tmp_path):
    """A document of a .jsonl file is one line: the piece where a letter of the answer stands would be meant
    in its place; of a line that is named the piece that holds the answer as a word."""
    path, rows = tmp_path / "own.jsonl", tmp_path / "news.jsonl"
    rows.write_text('{"id": "news", "text": "known as one two no three"}\n')
    documents = list(read_documents(rows, lambda text: len(text.split()), 3))
    assert [document.text for document in documents] == ["known as one", "two no three"]
    path.write_text('{"question": "Is it?", "answer": "no", "documents": ["news"]}\n'
                    '{"question": "Is it so?", "answer": "no", "documents": ["news:1"]}\n')
    whole, line = read_questions(path, documents)
    assert whole.whole and not line.whole and line.gold == (1,)


# ------------------------------------------------------------------------------------------------------------
# BM25

def bm25(query, texts, stems, stop_words):
    """Scores by hand: idf * tf / (tf + k1 * (1 - b + b * length / mean length)), k1 = 1.2, b = 0.75, words of
    at least two letters, as stems, stop words left out."""
    words = lambda text: [stems.get(word, word) for word in re.findall(r"\w\w+", text.lower())
                          if word not in stop_words]
    documents = [words(text) for text in texts]
    mean, scores = sum(map(len, documents)) / len(documents), []
    for document in documents:
        total = 0.0
        for word in set(words(query)):
            holds, times = sum(word in other for other in documents), document.count(word)
            idf = math.log(1 + (len(documents) - holds + 0.5) / (holds + 0.5))
            total += idf * times / (times + 1.2 * (0.25 + 0.75 * len(document) / mean))
        scores.append(total)
    return scores


def test_bm25_search():
    """The baseline would be another ranking than BM25, miss a word's other forms, count words like "the", be
    cut off too early, or fail where fewer documents are left than are asked for."""
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")
    texts = ["The colours of quiet rivers are teal.",
             "The quiet river can follow the amber castle near the river.", "A river.",
             "Nothing is so.", "The colour of amber-river is khaki, and nothing is so quiet."]
    search, query = bm25_search(texts), "What is the colouring of amber-rivers?"
    stems = dict(colours="colour", colouring="colour", rivers="river", nothing="noth")
    stop_words = {"the", "of", "are", "is", "and"}
    scores = bm25(query, texts, stems, stop_words)
    order = sorted(range(5), key=lambda i: -scores[i])
    assert order[0] == 4 and len({round(score, 4) for score in scores}) == 5
    for k, expected in ((1, order[:1]), (3, order[:3]), (5, order), (50, order)):
        found = search(query, k)
        assert [i for i, _ in found] == expected
        assert [score for _, score in found] == pytest.approx([scores[i] for i in expected], abs=1e-5)


@pytest.mark.parametrize("missing", ["bm25s", "Stemmer"])
def test_bm25_needs_its_packages(monkeypatch, missing):
    """Without the baselines extra the user would not learn what to install, or compare with a weaker BM25."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"bm25s and PyStemmer: pip install -e '\.\[baselines\]'"):
        bm25_search(["a text"])


def test_bm25_without_words():
    """A set of stop words alone would end in a traceback of the library's."""
    search = bm25_search(["the", "a of", "x"])
    assert search("the", 2) == [(0, 0.0), (1, 0.0)] and len(search("what", 9)) == 3
