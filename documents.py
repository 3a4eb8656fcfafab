"""Documents and sets of questions about them: a folder, a .jsonl file, BEIR's layout, SQuAD's file.

    for document in read_documents("notes", count_tokens, max_tokens=512):
        print(document.where(), document.text)      # a.md:3-6 ...

Long texts are split at paragraphs; every piece knows its file and lines, for citations.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

from common import UserError


@dataclass(frozen=True)
class Document:
    """A document's text and where it came from, for citations; lines count from 1.

    id: what makes it the same document after a change; number: that a bank must give it, else the next.
    """
    text: str
    source: str = ""
    first_line: int = 0
    last_line: int = 0
    id: str = ""
    number: int | None = None

    def where(self):
        return f"{self.source}:{self.first_line}-{self.last_line}" if self.source else "(generated)"


def read_documents(path, count_tokens, max_tokens):
    """Yields Documents, file by file: of a folder's .txt and .md files (hidden ones left out) in the order of
    their names, or of a .jsonl file of lines {"id": ..., "title": ..., "text": ...}, title optional.

    A text of more than `max_tokens` (by `count_tokens(text)`) is split at paragraphs; a longer paragraph at
    lines, a longer line at words. Raises UserError for what is missing or has no text, and for a file or line
    that cannot be read or is not UTF-8.
    """
    root = Path(path)
    if root.suffix.lower() == ".jsonl" and root.is_file():
        texts = read_jsonl(root)
    elif root.is_dir():
        texts = read_files(root)
    else:
        raise UserError(f"{path}: no such folder of documents, nor a .jsonl file")
    empty = True
    for id, source, text in texts:
        for i, (first, last, piece) in enumerate(split_text(text, count_tokens, max_tokens)):
            empty = False
            yield Document(piece, source, first, last, f"{id}#{i}")
    if empty:
        raise UserError(f"{path}: no text in it; expected .txt or .md files, or a .jsonl file, not empty")


def read_files(root):
    """Yields (id, source, text) of a folder's files: the path below the folder is both."""
    for path in folder_files(root):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 (byte {error.start}); "
                            "convert it to UTF-8 or move it out of the folder") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        name = os.fsencode(path.relative_to(root)).decode(errors="replace")  # not every name is UTF-8
        yield name, name, text


def folder_files(root):
    """The .txt and .md files of a folder, sorted; hidden ones are left out."""
    return sorted(path for path in root.rglob("*")
                  if path.suffix.lower() in (".txt", ".md") and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(root).parts))


def read_jsonl(path):
    """Yields (id, title, text) of the lines of a .jsonl file; a document without a title has its id."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                id = row["_id"] if "_id" in row else row["id"]  # BEIR's files say _id
                title, text = row.get("title") or id, row["text"]
                if not all(isinstance(value, str) for value in (id, title, text)):
                    raise TypeError
                f"{id}{title}{text}".encode()  # raises for half a character, "\\ud83d"
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{path}:{number}: not an object {{"id": "...", "title": "...", '
                                '"text": "..."} of UTF-8 strings') from None
            yield id, title, text


def documents_size(path):
    """Bytes of what `read_documents` reads."""
    root = Path(path)
    files = folder_files(root) if root.is_dir() else [root]
    return sum(file.stat().st_size for file in files if file.is_file())


def split_text(text, count_tokens, max_tokens):
    """Yields (first line, last line, piece) of at most `max_tokens`: whole paragraphs where they fit."""
    def join(lines):
        return "\n".join(line for _, line in lines)

    paragraphs = []  # lists of (line number, line), each up to and including the blank lines behind it
    for number, line in enumerate(text.splitlines(), start=1):
        if not paragraphs or (line.strip() and not paragraphs[-1][-1][1].strip()):
            paragraphs.append([])
        paragraphs[-1].append((number, line))
    pieces = [[]]
    for paragraph in paragraphs:
        blocks = [paragraph]
        if count_tokens(join(paragraph)) > max_tokens:
            blocks = [[part] for line in paragraph for part in split_line(line, count_tokens, max_tokens)]
        for block in blocks:
            if count_tokens(join(pieces[-1] + block)) > max_tokens:
                pieces.append([])
            pieces[-1] += block
    for piece in pieces:
        numbers = [number for number, line in piece if line.strip()]
        if numbers:
            yield numbers[0], numbers[-1], join(piece).strip()


def split_line(line, count_tokens, max_tokens):
    """One numbered line as several of at most `max_tokens`, cut between words (a too long word inside)."""
    number, text = line
    if count_tokens(text) <= max_tokens or len(text) < 2:
        return [line]
    middle = text.find(" ", len(text) // 2)
    middle = len(text) // 2 if middle < 0 else middle
    return (split_line((number, text[:middle]), count_tokens, max_tokens)
            + split_line((number, text[middle:].lstrip()), count_tokens, max_tokens))


# ------------------------------------------------------------------------------------------------------------
# Retrieval sets: (documents, questions by split). Documents are texts, questions pairs (text, gold); gold
# is the tuple of the indices of the documents that answer.

def read_beir(folder):
    """A set in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv (train, test and other splits).

    Titles of documents are left out. Raises UserError that names the file and line.
    """
    folder = Path(folder)
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; expected a set in BEIR's layout: "
                            "corpus.jsonl, queries.jsonl, qrels/train.tsv")
    corpus = list(read_jsonl(folder / "corpus.jsonl"))
    text_of = {id: text for id, _, text in read_jsonl(folder / "queries.jsonl")}
    place = {id: i for i, (id, _, _) in enumerate(corpus)}
    if len(place) < len(corpus):
        raise UserError(f"{folder}/corpus.jsonl: two documents have the same _id; ids must differ")
    splits = sorted((folder / "qrels").glob("*.tsv"))
    return [text for _, _, text in corpus], {path.stem: read_qrels(path, text_of, place) for path in splits}


def read_qrels(path, text_of, place):
    """The questions of a file qrels/SPLIT.tsv. text_of: queries by their ids; place: of documents."""
    gold = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    for number, line in enumerate(lines[1:], start=2):  # the first line names the columns
        if not line.strip():
            continue
        try:
            query, document, score = line.split("\t")[:3]
            text, index, relevant = text_of[query], place[document], int(score) > 0
        except (ValueError, KeyError):
            raise UserError(f"{path}:{number}: {line!r} is not a query's _id, a document's _id and a score, "
                            "with tabs between") from None
        if relevant:
            gold.setdefault(query, (text, {}))[1][index] = None  # a dict: in order, each once
    return [(text, tuple(indices)) for text, indices in gold.values()]


def read_squad(path):
    """SQuAD's own file as a retrieval set: its paragraphs, and the questions about each.

    The splits are train and test: every fourth article is for testing. Questions that a paragraph does not
    answer are left out. Raises UserError for another file.
    """
    documents, questions = [], {"train": [], "test": []}
    try:
        articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
        for i, article in enumerate(articles):
            split = questions["test" if i % 4 == 3 else "train"]
            for paragraph in article["paragraphs"]:
                asked = [row["question"].strip() for row in paragraph["qas"] if not row.get("is_impossible")]
                split += [(question, (len(documents),)) for question in asked]
                documents.append(paragraph["context"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected SQuAD's .json file, or a folder in BEIR's "
                        "layout") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a file of SQuAD's ({type(error).__name__}: {error})") from None
    return documents, questions


def bm25_search(texts):
    """A function (query, k) -> the k best of `texts`, pairs (index, score), by BM25 (k1 1.5, b 0.75)."""
    try:
        import bm25s
    except ImportError:
        raise UserError("BM25 needs bm25s: pip install -e '.[baselines]'") from None
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)

    def search(query, k):
        words = bm25s.tokenize([query], stopwords=None, show_progress=False)
        found, scores = index.retrieve(words, k=min(k, len(texts)), show_progress=False)
        return list(zip(found[0].tolist(), scores[0].tolist()))
    return search
