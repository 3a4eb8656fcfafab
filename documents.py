"""Documents of a folder, of a file, or of the lines of a .jsonl file.

    skipped = {}
    for document in read_documents("notes", count_tokens, max_tokens=512, skipped=skipped):
        print(document.where(), document.spelled())      # a.md:3-6 (Boats) ...
    tell_skipped(skipped, print)                         # skipped b.txt: not UTF-8 (byte 2)

Long texts are split at paragraphs; every piece knows its file, lines and heading, for citations.
"""
import logging
import os
import re
import unicodedata
from bisect import bisect
from dataclasses import dataclass, replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

from common import HEAD_BYTES, UserError, numbered, printable, progress_bar, read_rows, read_text

TOLD = 10  # files that `tell_skipped` names
# Files that are never text, by the ends of their names: images, sound, films, archives, programs, fonts
NO_TEXT = frozenset(""".png .jpg .jpeg .gif .webp .bmp .ico .tif .tiff .heic .svg .psd .mp3 .wav .flac .ogg
    .m4a .mp4 .mov .avi .mkv .webm .zip .gz .bz2 .xz .zst .7z .rar .tar .tgz .jar .exe .dll .so .dylib .o .a
    .pyc .class .woff .woff2 .ttf .otf .safetensors .gguf .npy .npz .pt .pth .db""".split())


@dataclass(frozen=True)
class Document:
    """A document's text and where it came from, for citations; lines count from 1 (of a PDF: pages).

    id: what makes it the same document after a change; number: that a bank must give it, else the next.
    """
    text: str
    source: str = ""
    first_line: int = 0
    last_line: int = 0
    id: str = ""
    number: int | None = None
    title: str = ""  # its own, or the heading that it stands under

    def where(self):
        """Its file, lines and title, for a user to read."""
        title = f" ({self.title})" if self.title else ""
        place = f"{self.source}:{self.first_line}-{self.last_line}{title}" if self.source else "(generated)"
        return printable(place)

    def spelled(self):
        """What is encoded: the title and the text, which stays as it is if its first line is the title."""
        first_words = lambda text: re.search(r"\w.*|$", text)[0].rstrip("# ")  # without a heading's marks
        if not self.title or first_words(self.text) == first_words(self.title):
            return self.text
        return f"{self.title}\n{self.text}"


def read_documents(path, count_tokens, max_tokens, skipped=None):
    """Yields Documents, file by file in the order of names: of a folder's text files, web pages and PDFs, of
    one such file, or of a .jsonl file of lines {"id": ..., "title": ..., "text": ...}, title optional.

    A text of more than `max_tokens` (by `count_tokens(text)`, its title included) is split at paragraphs; a
    longer paragraph at lines, a longer line at words. skipped: a dict for the files that are left out,
    name -> why, "" for those that are never text. Raises UserError for what is missing or has no text, for a
    folder that cannot be listed and for a line of a .jsonl file that is not as above.
    """
    check_documents(path)
    root = Path(path)
    skipped = {} if skipped is None else skipped
    if root.is_dir() or root.suffix.lower() != ".jsonl":
        texts = read_files(root, skipped)
    else:
        texts = ((id, numbered(text if text.strip() else title), [(0, title)])  # some are a title alone
                 for id, title, text in read_jsonl(root))
    empty = True
    for name, lines, headings in texts:
        for i, piece in enumerate(split_text(lines, headings, count_tokens, max_tokens)):
            empty = False
            yield replace(piece, source=name, id=f"{name}#{i}")
    if empty:
        reasons = "".join(f"; {name}: {why}" for name, why in list(skipped.items())[:TOLD] if why)
        raise UserError(f"{path}: no text in it; expected text files (.txt, .md, .html, .pdf and others), or "
                        f"a .jsonl file, not empty{reasons}")


def check_documents(path):
    """Raises UserError for what is neither folder nor file, and for a set, whose answers would be read."""
    if not Path(path).is_dir() and not Path(path).is_file():
        raise UserError(f"{path}: no such folder of documents, nor a file")
    if (Path(path) / "queries.jsonl").is_file() and any((Path(path) / name).exists()
                                                        for name in ("corpus.jsonl", "qrels")):
        raise UserError(f"{path}: a set of questions; its documents are {Path(path) / 'corpus.jsonl'}")
    if Path(path).is_file() and Path(path).suffix.lower() == ".json":
        with open(path, "rb") as file:
            if b'"paragraphs"' in file.read(HEAD_BYTES):
                raise UserError(f"{path}: a set of questions in SQuAD's layout, whose answers would be read; "
                                "give its paragraphs as a .jsonl file")


def list_documents(path, count_tokens, max_tokens, say):
    """The Documents of `read_documents`, all at once; `say` is told what was skipped."""
    skipped, documents = {}, []
    with progress_bar(desc="reading", total=documents_size(path), unit="B", unit_scale=True) as bar:
        for document in read_documents(path, count_tokens, max_tokens, skipped):
            documents.append(document)
            bar.update(len(document.text.encode(errors="replace")))
    tell_skipped(skipped, say)
    return documents


def tell_skipped(skipped, say):
    """Say in a line each which files were left out and why, the first TOLD of them; the rest are counted."""
    named = [f"skipped {name}: {printable(why)}" for name, why in skipped.items() if why]
    for line in named[:TOLD]:
        say(line)
    if named[TOLD:]:
        say(f"skipped {len(named) - TOLD:,} more files that could not be read")
    if len(skipped) > len(named):
        say(f"skipped {len(skipped) - len(named):,} images, archives and other files that are never text")


# ------------------------------------------------------------------------------------------------------------
# Files -> numbered lines: pairs (line, text), and headings: pairs (line, title)

def folder_files(root):
    """The files of a folder, sorted, or the one file that is named instead; hidden ones of a folder are left
    out. Links to folders are followed, but no folder is read twice, nor by a link's name if it has its own.
    Raises UserError for one that cannot be listed."""
    if not os.path.isdir(root):
        return [Path(root)]
    files, folders, links, seen = [], [Path(root)], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            for path in sorted(folder.iterdir()):
                among = files
                if path.is_dir():
                    among = links if path.is_symlink() else folders
                if not path.name.startswith("."):
                    among.append(path)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from None
    return sorted(files)


def read_files(root, skipped):
    """Yields (name, lines, headings) of a folder's files, or of one file; the name is the path below the
    folder."""
    names, folder = set(), root if root.is_dir() else root.parent
    for path in folder_files(root):
        name = name_of(path.relative_to(folder))
        if name in names:
            skipped[f"{name} (twice)"] = "another file has this name, in letters that look alike"
            continue
        names.add(name)
        try:
            lines, headings = read_file(path)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or path.is_symlink():  # else it was deleted just now
                skipped[name] = f"cannot be read ({error.strerror})"
        except (UserError, AssertionError) as error:  # html.parser's, of a page beyond it
            skipped[name] = str(error).removeprefix(f"{path}: ")
        else:
            yield name, lines, headings


def name_of(path):
    """A path as text: the composed and the decomposed spelling of a letter are one, bytes that are not UTF-8
    are spelled as \\xff, control characters as \\x1b."""
    name = os.fsencode(path).decode(errors="backslashreplace")
    return printable(unicodedata.normalize("NFC", name))


def read_file(path):
    """(lines, headings) of a file. Raises OSError, and UserError with the reason why it holds no text."""
    kind = path.suffix.lower()
    if kind in NO_TEXT:
        raise UserError("")
    if path.exists() and not path.is_file():
        raise UserError("not a regular file")
    if kind == ".pdf":
        return read_pdf(path), []
    lines = numbered(read_text(path))
    if kind in (".html", ".htm"):
        page = WebPage(lines)
        if not page.lines:
            raise UserError("a page without text, as those are that scripts fill")
        return page.lines, [(0, page.title)]
    return lines, find_headings(lines, kind != ".rst") if kind in (".md", ".markdown", ".rst") else []


def find_headings(lines, markdown):
    """The headings of Markdown, "# Title", outside of its code, and those that Markdown and rst underline."""
    headings, above, fence = [], "", ""
    for number, line in lines:
        indented, line = re.match(r" {4}| {0,3}\t", line), line.strip()
        fenced = re.match(r"(`{3,})[^`]*$|(~{3,})", line) if markdown else None
        marked = re.fullmatch(r"#{1,6}\s+(\S.*?)(\s+#+)?", line) if markdown and not indented else None
        underline = re.fullmatch(r"""([=~^"'#*+.:-])\1{2,}""", line)
        # One as long, or longer, closes it, if nothing stands behind it
        if fenced and (not fence or line == line[0] * len(line) and line.startswith(fence)):
            fence, line = "" if fence else fenced[1] or fenced[2], ""
        elif marked and not fence:
            headings.append((number, marked[1]))
            line = ""  # nothing underlines it
        elif underline and not fence and re.search(r"\w", above) and len(line) >= len(above):
            headings.append((number - 1, above))
        above = line
    return headings


class WebPage(HTMLParser):
    """What a browser shows of a page: `lines`, one a block, with the numbers of its lines; `title`."""

    UNSEEN = ("script", "style", "template", "noscript", "title")
    WITHIN_LINES = frozenset("""a abbr b bdi bdo cite code data del dfn em font i img input ins kbd label mark
        q s samp small span strike strong sub sup time tt u var wbr""".split())

    def __init__(self, lines):
        super().__init__()
        self.lines, self.title, self.unseen, self.pre = [(1, "")], "", None, False
        self.feed("\n".join(line for _, line in lines))
        self.close()
        self.lines = [(number, " ".join(line.split())) for number, line in self.lines if line.strip()]

    def handle_starttag(self, tag, attrs):
        if tag in self.UNSEEN:
            self.unseen = self.unseen or tag
        self.pre |= tag == "pre"
        self.end_line(tag)

    def handle_endtag(self, tag):
        if tag == self.unseen:
            self.unseen = None
        self.pre &= tag != "pre"
        self.end_line(tag)

    def end_line(self, tag):
        if tag not in self.WITHIN_LINES:
            self.lines.append((0, ""))

    def handle_data(self, data):
        if self.unseen == "title":
            self.title = self.title or " ".join(data.split())
        elif not self.unseen:
            for nth, part in enumerate(data.split("\n") if self.pre else [data]):
                self.lines += [(0, "")] * (nth > 0)
                number, line = self.lines[-1]
                if not line.strip():
                    number = self.getpos()[0] + nth + part[:len(part) - len(part.lstrip())].count("\n")
                self.lines[-1] = (number, line + part)


def read_pdf(path):
    """The lines of a PDF, numbered by their pages. Raises UserError for one without text, or damaged."""
    try:
        import pypdf
    except ImportError:
        raise UserError("PDFs need pypdf: pip install -e '.[pdf]'") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of every oddity that it gets over
    try:
        with open(path, "rb") as file:
            texts = [page.extract_text().encode(errors="replace").decode()  # it may hold lone surrogates
                     for page in pypdf.PdfReader(file).pages]
    except Exception as error:  # of the disk's kinds, or of a damaged file: anything
        raise UserError(f"not a PDF that can be read ({type(error).__name__}: {error})") from None
    if not "".join(texts).strip():
        raise UserError("a PDF without text, as scans are")
    pages = enumerate(texts, start=1)
    return [(page, line) for page, text in pages for _, line in numbered(text + "\n")]  # a blank line at last


def read_jsonl(path):
    """Yields (id, title, text) of the lines of a .jsonl file; the title may be ""."""
    wanted = 'an object {"id": "...", "title": "...", "text": "..."} of UTF-8 strings'
    for number, row in read_rows(path, wanted):
        id, title = name_in(row.get("_id", row.get("id"))), name_in(row.get("title") or "")
        text = row.get("text", 0)
        text = "" if text is None else text
        for name, value in (("id", id), ("title", title), ("text", text)):
            if not isinstance(value, str) or (name, value) == ("id", ""):  # documents are cited by it
                raise UserError(f'{path}:{number}: not {wanted}; "{name}" is missing, or something else')
        yield id, " ".join(title.split()), text


def name_in(id):
    """An id, or a title, as text: some are numbers."""
    return str(id) if type(id) is int else id


def documents_size(path):
    """Bytes of the files that `read_documents` reads."""
    return sum(file.stat().st_size for file in folder_files(path)
               if file.is_file() and file.suffix.lower() not in NO_TEXT)


def split_text(lines, headings, count_tokens, max_tokens):
    """Yields Documents without a source, of at most `max_tokens`, whole paragraphs where they fit. A title is
    the nearest heading at or above, cut to a quarter of `max_tokens`."""
    count_tokens = lru_cache(8)(count_tokens)  # a paragraph is often all that a piece has
    short = lambda line: count_tokens(line[1]) <= max(1, max_tokens // 4)
    headings = [split_line(heading, short)[0] for heading in headings]

    def document(piece):
        text = "\n".join(line for _, line in piece).strip()
        first = next((number for number, line in piece if line.strip()), 0)
        last = next((number for number, line in reversed(piece) if line.strip()), 0)
        named = next((number for number, line in piece if re.search(r"\w", line)), first)
        above = bisect(headings, named, key=lambda heading: heading[0])
        return Document(text, "", first, last, title=headings[above - 1][1] if above else "")

    fits = lambda piece: count_tokens(document(piece).spelled()) <= max_tokens
    paragraphs = []  # pieces, each up to and including the blank lines behind it
    for number, line in lines:
        if not paragraphs or (line.strip() and not paragraphs[-1][-1][1].strip()):
            paragraphs.append([])
        paragraphs[-1].append((number, line))
    pieces = [[]]
    for paragraph in paragraphs:
        blocks = [paragraph]
        if not fits(paragraph):
            blocks = [[part] for line in paragraph for part in split_line(line, lambda line: fits([line]))]
        for block in blocks:
            if not fits(pieces[-1] + block):
                pieces.append([])
            pieces[-1] += block
    yield from (found for found in map(document, pieces) if found.text)


class Titled(str):
    """A document's text whose first line is its title."""


def spelled_texts(documents):
    """What is encoded of Documents; Titled where one has a title."""
    return [Titled(document.spelled()) if document.title else document.spelled() for document in documents]


LONG, PASSAGE = 512, 256  # tokens: a longer document of a set is read in passages of at most so many


def passages(texts, count_tokens, whole=0):
    """(passages, owner): the texts of a set, LONG ones split into passages with their title; owner: the place
    of the text that each is of, increasing. The first `whole` of them are left as they are."""
    found = []
    for place, text in enumerate(progress_bar(texts, desc="splitting", unit="text")):
        headings = [(0, text.partition("\n")[0])] if isinstance(text, Titled) else []
        size = len(text.encode(errors="replace"))
        if place < whole or size <= LONG or count_tokens(text) <= LONG:  # no token is shorter than a byte
            found.append((text, place))
        else:
            pieces = split_text(numbered(text), headings, count_tokens, PASSAGE)
            found += [(piece.spelled(), place) for piece in pieces]
    return [text for text, _ in found], [place for _, place in found]


def split_line(line, fits):
    """One numbered line as several that fit, cut near their middle: between sentences, else between words, a
    too long word inside."""
    number, text = line
    if fits(line) or len(text) < 2:
        return [line]
    half = len(text) // 2
    ends = [end.end() for end in re.finditer(r"[.!?]\W?(?=\s)", text) if abs(end.end() - half) <= half // 2]
    middle = min(ends, key=lambda end: abs(end - half), default=text.find(" ", half))
    middle = half if middle < 0 else middle
    return split_line((number, text[:middle]), fits) + split_line((number, text[middle:].lstrip()), fits)

