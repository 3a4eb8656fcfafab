"""Documents of a folder or a .jsonl file.

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
