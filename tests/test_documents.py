"""Documents of a folder, retrieval sets, and the search that is a baseline."""
import json
import math
import os
import re
import sys

import numpy as np
import pytest

from common import UserError
from documents import bm25_search, read_beir, read_documents, read_squad


def count_words(text):
    return len(text.split())


def read_all(*args):
    return list(read_documents(*args))


def as_tuples(documents):
    return [(d.source, d.first_line, d.last_line, d.text) for d in documents]


def test_read_all(tmp_path):
    """Files would be left out, in another order on another machine, with a byte order mark, or with wrong
    lines."""
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfWith a mark.\n")
    (tmp_path / "a.md").write_bytes("\r\n\r\nWindows lines\r\nare two.\r\n\r\nGrüße.\r\n".encode())
    (tmp_path / "sub" / "deeper" / "c.txt").write_text("Deep.", encoding="utf-8")
    (tmp_path / "sub" / "empty.txt").write_text("")
    (tmp_path / "sub" / "blank.md").write_text("\n \n\t\n")
    (tmp_path / "image.png").write_bytes(b"\xff\xfe")
    documents = read_all(tmp_path, count_words, 100)
    assert as_tuples(documents) == [("a.md", 3, 6, "Windows lines\nare two.\n\nGrüße."),
                                    ("b.txt", 1, 1, "With a mark."),
                                    (os.path.join("sub", "deeper", "c.txt"), 1, 1, "Deep.")]
    assert documents[0].where() == "a.md:3-6"


def test_long_files_are_split_at_paragraphs(tmp_path):
    """A long file would be cut inside paragraphs that fit, or its pieces would cite wrong lines."""
    (tmp_path / "a.txt").write_text("one two\nthree\n\n\nfour five\n\nsix seven eight nine ten\n\neleven\n")
    assert as_tuples(read_all(tmp_path, count_words, 5)) == [
        ("a.txt", 1, 5, "one two\nthree\n\n\nfour five"), ("a.txt", 7, 7, "six seven eight nine ten"),
        ("a.txt", 9, 9, "eleven")]


def test_long_paragraphs_are_split_at_lines(tmp_path):
    """A paragraph that is too long would be one piece, or lose lines."""
    (tmp_path / "a.txt").write_text("one two\nthree four\nfive six\nseven eight\n\nnine\n")
    assert as_tuples(read_all(tmp_path, count_words, 4)) == [
        ("a.txt", 1, 2, "one two\nthree four"), ("a.txt", 3, 4, "five six\nseven eight"),
        ("a.txt", 6, 6, "nine")]


@pytest.mark.parametrize("seed", range(8))
def test_every_line_is_in_one_piece(tmp_path, seed):
    """Lines would be lost, doubled, reordered or cited wrongly, or a piece would be longer than allowed."""
    rng = np.random.default_rng(seed)
    words = [[f"w{i}.{j}" for j in range(rng.integers(1, 8))] if rng.random() < 0.7 else []
             for i in range(60)]
    lines = [" " * int(rng.integers(3)) * bool(line) + " ".join(line) for line in words]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    most = int(rng.integers(8, 20))
    documents = read_all(tmp_path, count_words, most)
    covered = []
    for document in documents:
        assert document.text == "\n".join(lines[document.first_line - 1:document.last_line]).strip()
        assert lines[document.first_line - 1].strip() and lines[document.last_line - 1].strip()
        assert count_words(document.text) <= most
        covered += range(document.first_line, document.last_line + 1)
    assert len(covered) == len(set(covered))
    assert {i + 1 for i, line in enumerate(lines) if line.strip()} <= set(covered)
    assert covered == sorted(covered)


@pytest.mark.parametrize("text,count", [
    (" ".join(f"w{i}" for i in range(50)), count_words), ("x" * 300, len), ("ab " * 50 + "y" * 90, len)])
def test_long_lines_are_split(tmp_path, text, count):
    """A line that is too long would be one piece, lose words, or never end."""
    (tmp_path / "a.txt").write_text(f"first\n\n{text}\nlast\n")
    documents = read_all(tmp_path, count, 16)
    assert all(count(document.text) <= 16 for document in documents) and len(documents) >= 4
    assert "".join("".join(document.text.split())
                   for document in documents) == "first" + text.replace(" ", "") + "last"
    assert {line for d in documents for line in (d.first_line, d.last_line)} == {1, 3, 4}
    if " " in text and "y" not in text:
        assert " ".join(document.text for document in documents).split() == ["first", *text.split(), "last"]


@pytest.mark.parametrize("make,message", [
    (lambda folder: None, "no such folder of documents"),
    (lambda folder: folder.mkdir(), "no text in it; expected .txt or .md files"),
    (lambda folder: folder.write_text("a file"), "no such folder of documents"),
    (lambda folder: [folder.mkdir(), (folder / "a.txt").write_text(" \n")], "no text in it"),
    (lambda folder: [folder.mkdir(), (folder / "a.pdf").write_text("text")], "no text in it"),
])
def test_folders_without_documents(tmp_path, make, message):
    """A missing or empty folder would end in a traceback, or in a memory of nothing."""
    make(tmp_path / "docs")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'docs'))}: {message}"):
        read_all(tmp_path / "docs", count_words, 10)


def test_a_file_that_is_not_utf8(tmp_path):
    """The user would not learn which of many files is not UTF-8, and where."""
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'latin.txt'))}: not UTF-8 .byte 2."):
        read_all(tmp_path, count_words, 10)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_cannot_be_read(tmp_path):
    """The user would not learn which of many files cannot be read."""
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'secret.txt'))}: cannot be read"):
        read_all(tmp_path, count_words, 10)


# ------------------------------------------------------------------------------------------------------------
# Retrieval sets

def beir_set(folder):
    """A set of four documents, of which the first question needs one and the second, in another split,
    two."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "Title" if i == 1 else "", "text": f"Text {i}."} for i in range(4)]
    queries = [{"_id": "q0", "text": "Which is third?"}, {"_id": "q1", "text": "Which are first?"}]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "train.tsv").write_text(f"{head}q0\td2\t1\n")
    lines = ("q1\td1\t1", "", "q0\td3\t2", "q1\td0\t1", "q1\td1\t1", "q1\td3\t0")
    (folder / "qrels" / "test.tsv").write_text(head + "\n".join(lines))
    return folder


def test_read_beir(tmp_path):
    """Splits would be mixed, titles read, or a document counted that does not answer, or twice."""
    texts, questions = read_beir(beir_set(tmp_path / "set"))
    assert texts == ["Text 0.", "Text 1.", "Text 2.", "Text 3."]
    assert questions == {"train": [("Which is third?", (2,))],
                         "test": [("Which are first?", (1, 0)), ("Which is third?", (3,))]}


@pytest.mark.parametrize("file,text,message", [
    ("corpus.jsonl", None, "corpus.jsonl: no such file; expected a set in BEIR's layout"),
    ("queries.jsonl", '{"_id": "a"}\n', "queries.jsonl:1: not an object"),
    ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n',
     "two documents have the same _id"),
    ("qrels/test.tsv", "head\nq0\tnone\t1\n", "test.tsv:2: 'q0.*is not a query's _id"),
    ("qrels/test.tsv", "head\nq0\td1\tbest\n", "test.tsv:2"),
    ("qrels/test.tsv", "head\nq0\td1\t²\n", "test.tsv:2"),
    ("qrels/test.tsv", "head\nq0\td1\t--1\n", "test.tsv:2"),
    ("qrels/test.tsv", b"head\n\xff", "test.tsv: not UTF-8"),
    ("qrels/test.tsv", "head\nq0\n", "test.tsv:2")])
def test_bad_sets(tmp_path, file, text, message):
    """A damaged set would end in a traceback that does not name the line."""
    folder = beir_set(tmp_path / "set")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_beir(folder)


def test_read_squad(tmp_path):
    """Questions would be about another paragraph, or test articles be trained on."""
    article = lambda name, *asked: {"title": name, "paragraphs": [{"context": f"{name} text.", "qas": [
        {"question": question, "is_impossible": impossible} for question, impossible in asked]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [article("A_b", (" Why? ", False), ("No?", True)), article("B"),
                                         article("C", ("Who?", False)),
                                         article("D", ("When?", False))]}))
    texts, questions = read_squad(path)
    assert texts == ["A_b text.", "B text.", "C text.", "D text."]
    assert questions == {"train": [("Why?", (0,)), ("Who?", (2,))], "test": [("When?", (3,))]}
    for text in ("{", "[]", '{"data": [{"title": "A"}]}', '{"data": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match="squad.json: not a file of SQuAD's"):
            read_squad(path)
    with pytest.raises(UserError, match="No such file"):
        read_squad(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------------------
# BM25

def bm25(query, texts):
    """Scores by hand: idf * tf / (tf + k1 * (1 - b + b * length / mean length)), k1 = 1.5, b = 0.75, words of
    at least two letters."""
    documents = [re.findall(r"\w\w+", text.lower()) for text in texts]
    mean, scores = sum(map(len, documents)) / len(documents), []
    for document in documents:
        total = 0.0
        for word in set(re.findall(r"\w\w+", query.lower())):
            holds, times = sum(word in other for other in documents), document.count(word)
            idf = math.log(1 + (len(documents) - holds + 0.5) / (holds + 0.5))
            total += idf * times / (times + 1.5 * (0.25 + 0.75 * len(document) / mean))
        scores.append(total)
    return scores


def test_bm25_search():
    """The baseline would be another ranking than BM25, cut off too early, or fail where fewer documents are
    left than are asked for."""
    pytest.importorskip("bm25s")
    texts = ["The colour of quiet-river is teal.",
             "The quiet river can follow the amber castle near the river.", "A river.",
             "Nothing is so.", "The colour of amber-river is khaki, and nothing is so quiet."]
    search, query = bm25_search(texts), "What is the colour of amber-river?"
    scores = bm25(query, texts)
    order = sorted(range(5), key=lambda i: -scores[i])
    assert order[0] == 4 and len({round(score, 4) for score in scores}) == 5
    for k, expected in ((1, order[:1]), (3, order[:3]), (5, order), (50, order)):
        found = search(query, k)
        assert [i for i, _ in found] == expected
        assert [score for _, score in found] == pytest.approx([scores[i] for i in expected], abs=1e-5)


def test_bm25_needs_bm25s(monkeypatch):
    """Without the baselines extra the user would not learn what to install."""
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"bm25s: pip install -e '\.\[baselines\]'"):
        bm25_search(["a text"])
