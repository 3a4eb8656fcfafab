"""Documents of a folder, and how long ones are split."""
import os
import re

import numpy as np
import pytest

from common import UserError
from documents import read_documents


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
