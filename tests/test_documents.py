"""Documents of a folder, and how long ones are split."""
import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from common import UserError
from documents import (
    LONG,
    PASSAGE,
    Document,
    Titled,
    documents_size,
    find_headings,
    passages,
    read_documents,
    split_text,
    tell_skipped,
)


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


def test_a_title_alone(tmp_path):
    """A document that is a title alone, as some of BEIR's are, would be left out without a word."""
    (tmp_path / "c.jsonl").write_text('{"_id": "a", "title": "It opens at nine", "text": ""}\n'
                                      '{"_id": "b", "title": "T", "text": "x"}\n')
    found = read_all(tmp_path / "c.jsonl", count_words, 100)
    assert [document.spelled() for document in found] == ["It opens at nine", "T\nx"]


def test_one_file(tmp_path):
    """A file would have to be put into a folder first, be cited by its whole path, or, unreadable, be empty
    without a reason."""
    (tmp_path / "a.md").write_text("# Boats\n\nThe boat is red.\n\nIt leaks.\n")
    (tmp_path / "b.txt").write_text("Another.")
    documents = read_all(tmp_path / "a.md", count_words, 6)
    assert as_tuples(documents) == [("a.md", 1, 3, "# Boats\n\nThe boat is red."),
                                    ("a.md", 5, 5, "It leaks.")]
    assert [d.id for d in documents] == ["a.md#0", "a.md#1"] and documents[1].title == "Boats"
    (tmp_path / "photo.JPG").write_bytes(b"x" * 1000)  # not read
    assert documents_size(tmp_path / "a.md") == 37 and documents_size(tmp_path) == 37 + 8
    for name, data, why in (("c.txt", b"caf\xe9", "; c.txt: not UTF-8"), ("d.png", b"text", ", not empty")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: no text in it.*{why}"):
            read_all(tmp_path / name, count_words, 6)
    with pytest.raises(UserError, match="none.txt: no such folder of documents, nor a file"):
        read_all(tmp_path / "none.txt", count_words, 6)


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
    (lambda folder: [folder.mkdir(), *((folder / f"{name}.jsonl").touch() for name in ("corpus", "queries"))],
     "a set of questions; its documents are .*corpus.jsonl"),
    (lambda folder: [(folder / "qrels").mkdir(parents=True), (folder / "queries.jsonl").touch()],
     "a set of questions"),  # its corpus is packed
    (lambda folder: folder.mkdir(), "no text in it; expected text files"),
    (lambda folder: folder.write_text(" \n"), "no text in it"),
    (lambda folder: [folder.mkdir(), (folder / "a.txt").write_text(" \n")], "no text in it"),
    (lambda folder: [folder.mkdir(), (folder / "a.png").write_text("text")], "no text in it"),
    (lambda folder: [folder.mkdir(), (folder / "a.txt").write_bytes(b"\xff")],
     "no text in it; .*; a.txt: not UTF-8"),
])
def test_folders_without_documents(tmp_path, make, message):
    """A missing or empty folder would end in a traceback, or in a memory of nothing."""
    make(tmp_path / "docs")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'docs'))}: {message}"):
        read_all(tmp_path / "docs", count_words, 10)


def test_a_set_as_documents(tmp_path):
    """The answers of SQuAD's file would be read with its texts."""
    path = tmp_path / "dev.json"
    path.write_text('{"data": [{"title": "A", "paragraphs": []}]}')
    with pytest.raises(UserError, match="dev.json: a set of questions in SQuAD's layout, whose answers"):
        read_all(path, count_words, 10)


def test_what_is_left_out_is_told(tmp_path):
    """One bad file would stop the rest, or be left out without a word, or hide the other bad ones."""
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes(b"\xff\xfea\0\0\xd8")  # half a pair
    (tmp_path / "letter.docx").write_bytes(b"PK\x03\x04\x14\0\x06\0\x08\xff")
    (tmp_path / "late.txt").write_bytes(b"x" * 100_000 + b"\0")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    for name in ("a.png", "b.ZIP"):
        (tmp_path / name).write_text("text")
    skipped, said = {}, []
    assert [d.text for d in read_documents(tmp_path, count_words, 10, skipped)] == ["good"]
    tell_skipped(skipped, said.append)
    assert said == [
        "skipped gone.txt: cannot be read (No such file or directory)",
        "skipped late.txt: holds NULs, which no text does",
        "skipped latin.txt: not UTF-8 (byte 2); convert it to UTF-8",
        "skipped letter.docx: holds NULs, which no text does",
        "skipped wide.txt: not UTF-16 (byte 4); convert it to UTF-8",
        "skipped 2 images, archives and other files that are never text"]


def test_many_left_out_are_counted():
    """A thousand bad files would scroll the answer away; or ten and one would count wrongly."""
    for count, last in ((10, "skipped 9: why"), (11, "skipped 1 more files that could not be read"),
                        (1012, "skipped 1,002 more files that could not be read")):
        said = []
        tell_skipped({str(i): "why" for i in range(count)}, said.append)
        assert len(said) == min(count, 11) and said[0] == "skipped 0: why" and said[-1] == last


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_cannot_be_read(tmp_path):
    """The user would not learn which of many files cannot be read."""
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").chmod(0)
    skipped = {}
    assert [d.text for d in read_documents(tmp_path, count_words, 10, skipped)] == ["good"]
    assert skipped == {"secret.txt": "cannot be read (Permission denied)"}


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """Documents of a share that went away would count as deleted."""
    (tmp_path / "share").mkdir()
    (tmp_path / "a.txt").write_text("good")
    iterdir = type(tmp_path).iterdir

    def refuse(path):
        if path.name == "share":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)
    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    share = re.escape(str(tmp_path / "share"))
    message = f"^{share}: cannot be listed .Permission denied.; make it readable$"
    with pytest.raises(UserError, match=message):
        read_all(tmp_path, count_words, 10)
    with pytest.raises(UserError, match=message):
        documents_size(tmp_path)


def test_links_are_followed_once(tmp_path):
    """Linked folders would be left out, read twice, or without end; hidden ones and theirs be read."""
    notes = tmp_path / "notes"
    (notes / "real").mkdir(parents=True)
    (notes / ".hidden").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for path in (notes / "real" / "b.txt", tmp_path / "elsewhere" / "a.txt", notes / ".hidden" / "c.txt",
                 notes / ".d.txt"):
        path.write_text(path.name)
    (notes / "again").symlink_to("real")   # before its own name in the order of names
    (notes / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../notes")
    (notes / "loop").symlink_to(".")
    (notes / "file.txt").symlink_to("../elsewhere/a.txt")
    assert [d.source for d in read_all(notes, count_words, 10)] == ["file.txt", "linked/a.txt", "real/b.txt"]
    assert documents_size(notes) == 5 + 5 + 5


# ------------------------------------------------------------------------------------------------------------
# Files as text

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["The colour of calm-meadow\nis teal.",
                                  "Куда ты идёшь, мой друг?\nТуда и сюда."])
def test_encodings(tmp_path, encoding, text):
    """A text of another editor would be refused, or read as NULs and a byte order mark."""
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    if encoding in ("utf-16", "utf-32"):  # the other order of bytes
        mark = "\ufeff"
        (tmp_path / "b.txt").write_bytes((mark + text).encode(f"{encoding}-be"))
    documents = read_all(tmp_path, count_words, 20)
    assert {(d.first_line, d.last_line, d.text) for d in documents} == {(1, 2, text)}
    rows = [{"id": "p", "title": "A \n place", "text": text}, {"_id": "q", "text": "Another."}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "docs.jsonl").write_bytes(lines.encode(encoding))
    found = read_all(tmp_path / "docs.jsonl", count_words, 20)
    assert [(d.where(), d.title, d.text, d.id) for d in found] == [
        ("p:1-2 (A place)", "A place", text, "p#0"), ("q:1-1", "", "Another.", "q#0")]


@pytest.mark.parametrize("line", [b'{"id": "a", "text": "Gr\xfc\xdfe"}', b'{"id": "a", "text": "\\ud83d"}',
                                  b'{"id": "a"}', b'["a", "b"]', b'{"id": 3.5, "text": "a"}',
                                  b'{"id": true, "text": "a"}', b'{"id": "", "text": "a"}', b"{", b"\0"])
def test_bad_lines_of_jsonl(tmp_path, line):
    """A bad line would end in a traceback that does not name it."""
    (tmp_path / "docs.jsonl").write_bytes(b'{"id": "good", "text": "a"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match="docs.jsonl:3: not an object"):
        read_all(tmp_path / "docs.jsonl", count_words, 10)


def test_lines_as_editors_count_them(tmp_path):
    """Form feeds and Unicode's separators would count as lines: all citations behind them be wrong."""
    (tmp_path / "a.txt").write_bytes("one\x0c\x0b\x1c\x85\u2028two\r\nthree\rfour\n\nfive".encode())
    documents = read_all(tmp_path, count_words, 1)
    assert [(d.first_line, d.last_line) for d in documents if "five" in d.text] == [(5, 5)]
    assert [d.first_line for d in documents if "three" in d.text or "four" in d.text] == [2, 3]
    assert read_all(tmp_path, count_words, 100)[0].text == "one\x0c\x0b\x1c\x85\u2028two\nthree\nfour\n\nfive"


PAGE = """<!doctype html><html><head><title>Boats &amp;
  piers</title><style>p { color: red }</style><script>if (a < b) document.write("<p>no</p>")</script>
<body><h1>The harbour</h1><p>Two <b>pi</b>ers,
one of <a href="oak.html">oak</a>.<br>Mooring: nine&nbsp;crowns.
<ul><li>

 First<li>Second</ul><svg><title>drawing</title></svg>
<table><tr><td>Depth<td>4 m</table><noscript>Turn it on</noscript><!-- unseen -->
"""


def test_web_pages(tmp_path):
    """Scripts and markup would be read, words be joined or cut, or lines be cited that are not the file's."""
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "b.HTM").write_text("<p>Fine</p><![if !x]>")
    (tmp_path / "odd.html").write_text("<p>Odd</p><![weird[ ]]>")  # too odd for some versions of html.parser
    (tmp_path / "z.txt").write_text("The last.")
    (tmp_path / "c.html").write_text("<pre>\nalpha = 1\n\n  beta = <b>2</b>\n</pre>\nand\nmore")
    assert [(d.first_line, d.text) for d in read_all(tmp_path / "c.html", count_words, 3)] == [
        (2, "alpha = 1"), (4, "beta = 2"), (6, "and more")]  # of code the lines stay apart
    (tmp_path / "c.html").write_text('<title>Manual</title><div id="root"></div><script>draw()</script>')
    skipped = {}
    with pytest.raises(UserError, match=r"c.html: no text in it; .*; c.html: a page without text"):
        read_all(tmp_path / "c.html", count_words, 3, skipped)
    assert list(skipped) == ["c.html"]
    (tmp_path / "c.html").unlink()
    documents = [d for d in read_all(tmp_path, count_words, 100) if d.source != "odd.html"]
    assert as_tuples(documents)[0] == ("a.html", 3, 8, "The harbour\nTwo piers, one of oak.\n"
                                       "Mooring: nine crowns.\nFirst\nSecond\nDepth\n4 m")
    assert documents[0].where() == "a.html:3-8 (Boats & piers)"
    lines = [(d.first_line, d.text) for d in read_all(tmp_path, count_words, 4) if d.source == "a.html"]
    assert (4, "Mooring: nine crowns.") in lines and (7, "First\nSecond\nDepth") in lines
    assert [d.text for d in documents[1:]] == ["Fine", "The last."]


def test_pdfs(tmp_path, monkeypatch):
    """Pages would be numbered wrongly; a damaged or scanned PDF, or a missing pypdf, stop the rest."""
    pages = {"good": ["First page.", "", "Third\npage."], "scan": ["", " "]}

    class PdfReader:
        def __init__(self, file):
            name = os.path.basename(file.name).removesuffix(".pdf")
            if name not in pages:
                raise ValueError("no xref")
            self.pages = [SimpleNamespace(extract_text=lambda text=text: text) for text in pages[name]]
    for name in ("good.pdf", "scan.pdf", "bad.pdf"):
        (tmp_path / name).write_bytes(b"%PDF")
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setitem(sys.modules, "pypdf", SimpleNamespace(PdfReader=PdfReader))
    skipped = {}
    documents = list(read_documents(tmp_path, count_words, 3, skipped))
    assert as_tuples(documents)[1:] == [("good.pdf", 1, 1, "First page."), ("good.pdf", 3, 3, "Third\npage.")]
    assert as_tuples(read_all(tmp_path, count_words, 9))[1][1:3] == (1, 3)
    assert skipped == {"bad.pdf": "not a PDF that can be read (ValueError: no xref)",
                       "scan.pdf": "a PDF without text, as scans are"}
    monkeypatch.setitem(sys.modules, "pypdf", None)
    assert [d.text for d in read_documents(tmp_path, count_words, 3, skipped)] == ["text"]
    assert skipped["good.pdf"] == "PDFs need pypdf: pip install -e '.[pdf]'"


def test_a_pdf_by_pypdf(tmp_path):
    """pypdf would be called otherwise than it wants."""
    pypdf = pytest.importorskip("pypdf")
    stream = b"BT /F1 12 Tf 20 50 Td (The number is 4729103.) Tj ET"
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
               b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] /Contents 4 0 R "
               b"/Resources << /Font << /F1 5 0 R >> >> >>",
               b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
               b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    data, places = b"%PDF-1.4\n", []
    for i, body in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (i, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(data)
    (tmp_path / "a.pdf").write_bytes(data + b"xref\n0 6\n0000000000 65535 f \n" + table + end)
    [document] = read_all(tmp_path, count_words, 9)
    assert pypdf and document.where() == "a.pdf:1-1" and document.text == "The number is 4729103."


# ------------------------------------------------------------------------------------------------------------
# Titles

MARKDOWN = """Before.

# The harbour #

Two piers.

```sh
# no heading
```

Winter
------

Closed: a | b
--- | ---

#hashtag
---
"""


def test_headings(tmp_path):
    """A piece would be cited and encoded under no heading, another one's, or under a comment in code."""
    (tmp_path / "a.md").write_text(MARKDOWN)
    (tmp_path / "b.rst").write_text("=====\nBoats\n=====\n\nThey float.\n\nOf oak\n~~~~~~\n\nHeavy.\n")
    (tmp_path / "c.py").write_text("# no heading\nx = 1\n")
    paragraphs = lambda text: len(re.split(r"\n\n+", text))
    assert [(d.text, d.title, d.where()) for d in read_all(tmp_path, paragraphs, 1)] == [
        ("Before.", "", "a.md:1-1"), ("# The harbour #", "The harbour", "a.md:3-3 (The harbour)"),
        ("Two piers.", "The harbour", "a.md:5-5 (The harbour)"),
        ("```sh\n# no heading\n```", "The harbour", "a.md:7-9 (The harbour)"),
        ("Winter\n------", "Winter", "a.md:11-12 (Winter)"),
        ("Closed: a | b\n--- | ---", "Winter", "a.md:14-15 (Winter)"),
        ("#hashtag\n---", "Winter", "a.md:17-18 (Winter)"),
        ("=====\nBoats\n=====", "Boats", "b.rst:1-3 (Boats)"), ("They float.", "Boats", "b.rst:5-5 (Boats)"),
        ("Of oak\n~~~~~~", "Of oak", "b.rst:7-8 (Of oak)"), ("Heavy.", "Of oak", "b.rst:10-10 (Of oak)"),
        ("# no heading\nx = 1", "", "c.py:1-2")]


@pytest.mark.parametrize("text,markdown,expected", [
    ("# A\n~~~\n# no\n~~~\n# B", True, [(1, "A"), (5, "B")]), ("A word\n~~~~~~", False, [(1, "A word")]),
    ("````\n```\n# no\n```\n# no\n````\n# B", True, [(7, "B")]), ("```a``` b\n# B", True, [(2, "B")]),
    ("# A\n\n    # no\n\t# no\n   # B", True, [(1, "A"), (5, "B")]), ("# no\n====", False, [(1, "# no")]),
    ("```\n```python\n# no\n```\n# B", True, [(5, "B")]),
    ("# A\n---\nb", True, [(1, "A")]), ("```\nno\n---\n```", True, [])])
def test_headings_beside_code(text, markdown, expected):
    """A comment in code would be a heading, or one behind the code none."""
    assert find_headings(list(enumerate(text.split("\n"), start=1)), markdown) == expected


@pytest.mark.parametrize("title,text,spelled", [
    ("", "Text.", "Text."), ("Boats", "They float.", "Boats\nThey float."),
    ("Boats", "# Boats\n\nText", None), ("Boats", "=====\nBoats\n=====\nText", None),
    ("Boats", "Boats", None), ("Boats", "## Boats ##\nText", None), ("A (b) [c]", "A (b) [c]\nText", None),
    ("Boats", "Boats float.", "Boats\nBoats float."),
    ("Boats", "They are\nBoats", "Boats\nThey are\nBoats")])
def test_titles_are_encoded_once(title, text, spelled):
    """What is found by its title would not be found, or a title be encoded twice."""
    assert Document(text, "a.md", 1, 2, title=title).spelled() == (spelled or text)


@pytest.mark.parametrize("most", [4, 9, 30])
def test_titles_count(tmp_path, most):
    """With its title a piece would be longer than the model was trained on; a long title leave no room."""
    title = " ".join(f"t{i}" for i in range(20))
    (tmp_path / "a.jsonl").write_text(json.dumps(
        {"id": "x", "title": title, "text": " ".join(f"w{i}" for i in range(60))}))
    documents = read_all(tmp_path / "a.jsonl", count_words, most)
    assert all(count_words(d.spelled()) <= most and d.title for d in documents)
    assert title.startswith(documents[0].title) and documents[0].title.startswith("t0")
    assert " ".join(d.text for d in documents).split() == [f"w{i}" for i in range(60)]


def test_passages():
    """A long document of a set would be read as a whole, lose its title or a word, or pass for another."""
    count = lambda text: len(text.split())
    body = [f"w{i}" for i in range(3000)]
    long = "The Mill\n" + "\n\n".join(" ".join(body[i:i + 100]) for i in range(0, 3000, 100))
    bare = " ".join(body)  # one line, which is no title
    texts = ["A\nshort one", Titled(long), "word " * LONG, bare, "", "Ann: so\n" + bare]
    found, owner = passages(texts, count)
    assert owner == sorted(owner) and {*owner} == {*range(6)} and owner[0] == 0
    own = lambda place: [text for text, of in zip(found, owner) if of == place]
    assert own(0) == texts[:1] and own(2) == texts[2:3] and own(4) == [""]
    for place, head in ((1, ["The", "Mill"]), (3, [])):
        assert len(own(place)) >= 6 and all(count(text) <= PASSAGE for text in own(place))
        assert [word for text in own(place) for word in text.split()[len(head):]] == body
        assert all(text.split()[:len(head)] == head for text in own(place))
    assert " ".join(own(5)).split() == ["Ann:", "so", *body]  # a first line that is no title


def test_passages_of_signs():
    """A text whose characters are several tokens each would be read as a whole."""
    found, owner = passages(["\U00012000 " * 600], lambda text: len(text.encode()))
    assert {*owner} == {0} and len(found) > 1


def test_long_lines_end_with_sentences():
    """An article in one line would be cut within a sentence, and the reader see two halves of it."""
    sentences = [f"Number {i} is what {'the ' * (i % 5)}line says here." for i in range(40)]
    pieces = list(split_text([(1, " ".join(sentences))], [], lambda text: len(text.split()), 30))
    assert len(pieces) > 5 and all(piece.text.endswith(".") for piece in pieces)
    assert " ".join(piece.text for piece in pieces) == " ".join(sentences)
