"""RULER's eight needle tasks (arXiv 2404.06654) as documents, and a set of other needles to train on.

    python needles.py                # writes sets/ruler, a set for prepare_data.py, in BEIR's layout

    single_1     one needle in noise               multikey_1   three other needles in the essays
    single_2     one needle in essays              multikey_2   the haystack is needles
    single_3     the same, its value a uuid        multikey_3   the same, keys and values are uuids
    multivalue   four values of one key            multiquery   four keys are asked about, with a value each

Needles, keys, values, noise and questions are RULER's; what stands in one context there, stands in documents
here. A line of noise or of a needle haystack is a document, and so is a needle in either. Essays are packed
into documents of whole sentences, of at most PACKED characters, and a needle stands between two sentences of
one; the needles of a question are in different documents. Lines of noise are all alike, as RULER's are; other
documents differ. RULER begins the answer for the model ("The special magic number for ... is"); we do not.

RULER's essays are Paul Graham's. `--essays FOLDER` takes the .txt and .md files of a folder; without it the
essays are English that is there: the docstrings of Python's standard library, NumPy and PyTorch, with the
language reference of pydoc. One source in eight is for training alone, as are the keys' "train" pairs.
"""
import ast
import importlib.util
import os
import re
import sysconfig
import uuid
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

from common import UserError, atomic_file, check_least, command_line, emptied, main, read_text, write_rows
from documents import folder_files, name_of
from tasks import Words, hide

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {} for {} is: {}."
ONE = "What is the special magic {} for {} mentioned in the provided text?"
ALL = "What are all the special magic {} for {} mentioned in the provided text?"
PACKED = 400         # characters of a document of essays, about 100 tokens; a longer sentence is cut at words
TRAIN_SOURCES = 8    # one source of essays in so many is for training


class Task(NamedTuple):
    """What RULER calls type_haystack, type_needle_k, type_needle_v, num_needle_k, _v and _q."""
    haystack: str = "essays"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1     # needles' keys
    values: int = 1   # of each key
    asked: int = 1    # of the keys


RULER = dict(
    single_1=Task("noise"), single_2=Task(), single_3=Task(value="uuids"),
    multikey_1=Task(keys=4), multikey_2=Task("needles"), multikey_3=Task("needles", "uuids", "uuids"),
    multivalue=Task(values=4), multiquery=Task(keys=4, asked=4))


class Needles(NamedTuple):
    """A question of RULER's: its text, and what its documents say.

    needles: sentences, those that answer it first; answers: as many values as there are such needles.
    """
    text: str
    needles: list
    answers: list


# ------------------------------------------------------------------------------------------------------------
# Keys and values

class Draw:
    """Keys, all different, and values, of RULER's three types; keys of words are of one split."""

    def __init__(self, words, split, rng):
        self.words, self.rng, self.used = words, rng, set()
        self.pairs = words.of_split(split)
        self.most = int(self.pairs.sum())

    def value(self, kind):
        """A random value: seven digits, an adjective and a noun, or a uuid."""
        if kind == "numbers":
            return str(self.rng.integers(1_000_000, 10_000_000))
        if kind == "uuids":
            return str(uuid.UUID(bytes=self.rng.bytes(16), version=4))
        while True:
            pair = int(self.rng.integers(len(self.pairs)))
            if self.pairs[pair]:
                return self.words.key(pair)

    def key(self, kind):
        """A value that was not drawn before as a key. Raises UserError where there are no more."""
        if kind == "words" and len(self.used) >= self.most:
            raise UserError(f"there are {self.most:,} keys of two words; ask for a smaller memory")
        while True:
            key = self.value(kind)
            if key not in self.used:
                self.used.add(key)
                return key

    def like(self, key):
        """A new key of words that shares its adjective or its noun with `key`. Raises UserError where there
        is none."""
        for _ in range(10_000):
            other = self.value("words").split("-")
            shared = int(self.rng.integers(2))
            other[shared] = key.split("-")[shared]
            pair = (self.words.adjectives.index(other[0]) * len(self.words.nouns)
                    + self.words.nouns.index(other[1]))
            if self.pairs[pair] and "-".join(other) not in self.used:
                self.used.add("-".join(other))
                return "-".join(other)
        raise UserError(f"there is no other key like {key!r}; ask for fewer needles")


def question_about(keys, kind, several):
    """RULER's question for the values, of the type `kind`, of keys; several: it has more than one answer."""
    named = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
    return ALL.format(kind, named) if several else ONE.format(kind[:-1], named)


def draw_question(task, draw):
    """The Needles of one question of a Task."""
    keys = [draw.key(task.key) for _ in range(task.keys)]
    asked = keys[:task.asked]
    stated = [(key, draw.value(task.value)) for key in keys for _ in range(task.values)]
    answers = [value for key, value in stated if key in asked]
    return Needles(question_about(asked, task.value, len(answers) > 1),
                   [NEEDLE.format(task.value, key, value) for key, value in stated], answers)


# ------------------------------------------------------------------------------------------------------------
# Haystacks

def docstrings(path):
    """The docstrings of a Python file, one after another; nothing of a file that cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n".join(text for text in found if text)


def essays(folder=""):
    """Yields (name, text) of the sources of essays, white space collapsed. Raises UserError for a folder
    without any, and for a file that is no text."""
    if folder:
        if not os.path.isdir(folder):
            raise UserError(f"--essays {folder}: no such folder")
        paths = [path for path in folder_files(folder)
                 if path.suffix.lower() in (".txt", ".md") and path.is_file()]
        if not paths:
            raise UserError(f"--essays {folder}: holds no .txt or .md file")
        named = ((name_of(path.relative_to(folder)), read_text(path)) for path in paths)
    else:
        named = offline_essays()
    for name, text in named:
        yield name, " ".join(text.split())


def offline_essays():
    """English that is wherever this runs: pydoc's topics, and docstrings. Yields (name, text)."""
    yield from sorted(topics.items())
    places = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    places |= {name: Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")}
    for name, place in places.items():
        for path in sorted(place.rglob("*.py")):
            inside = path.relative_to(place).as_posix()
            if "site-packages" not in inside and "test" not in inside and (text := docstrings(path)):
                yield f"{name}/{inside}", text


def pack_sentences(text):
    """The documents of a source: lists of sentences that follow each other, of PACKED characters at most."""
    found, size = [[]], 0
    for sentence in re.split(r"(?<=[.!?]) ", text):
        for piece in re.findall(rf"\S.{{0,{PACKED - 2}}}(?=\s|$)|\S{{{PACKED}}}", sentence):
            if size + len(piece) > PACKED:
                found.append([])
                size = 0
            found[-1].append(piece)
            size += len(piece) + 1
    return [passage for passage in found if passage]


def essay_passages(folder, split):
    """The documents of all sources of a split, "train" or "test", each once: lists of sentences."""
    known = {}
    for name, text in essays(folder):
        if (zlib.crc32(name.encode()) % TRAIN_SOURCES == 0) == (split == "train"):
            known |= {" ".join(passage): passage for passage in pack_sentences(text)}
    return list(known.values())


class Haystack:
    """The documents of a haystack, lists of sentences, as many as asked for; more begin as fewer do.

    Where there is too little text, it is repeated.
    """

    def __init__(self, task, draw, folder=""):
        """task: a Task, of which haystack, key and value count; draw: a Draw; folder: of --essays."""
        self.task, self.draw, self.sentences = task, draw, []
        if task.haystack == "essays":
            found = essay_passages(folder, "test")
            if not found:
                raise UserError(f"--essays {folder}: no source of it is for tests; give more files")
            self.passages = [found[i] for i in draw.rng.permutation(len(found))]

    def grow(self, count):
        """Have at least `count` documents."""
        for i in range(len(self.sentences), count):
            if self.task.haystack == "noise":
                self.sentences.append([NOISE])
            elif self.task.haystack == "needles":
                key, value = self.draw.key(self.task.key), self.draw.value(self.task.value)
                self.sentences.append([NEEDLE.format(self.task.value, key, value)])
            else:
                self.sentences.append(self.passages[i % len(self.passages)])

    def hide(self, needle, place, rng):
        """The document that stands in place of document `place` and says the needle."""
        return hide([needle], self.sentences[place] if self.task.haystack == "essays" else [], rng)


# ------------------------------------------------------------------------------------------------------------
# A set to train on

@dataclass
class SetConfig:
    out: str = "sets/ruler"        # folder to write, in BEIR's layout
    groups: int = 4000             # of documents that answer together; a pool is about one
    essays: str = ""               # folder of .txt and .md files; "": docstrings, see above
    seed: int = 1337               # same seed, same files

    def __post_init__(self):
        check_least(self, groups=1, seed=0)


def draw_group(draw, haystack, rng):
    """(texts, questions, impossible): one to four documents, questions (text, values) that all of them answer
    with one value each, and questions that none answers, whose keys are like those there.

    haystack: a call that returns a document's sentences. A document has one to five needles: a reader that
    always saw several stops at the second of RULER's four documents, which have one each.
    """
    count, of_keys, kind = int(rng.choice([1, 1, 2, 3, 4, 4, 4, 4])), "words", "numbers"
    if count == 1:  # RULER asks for several numbers, never for several uuids
        of_keys, kind = rng.choice(["words", "words", "uuids"]), rng.choice(["numbers", "uuids"])
    most = 3 if kind == "numbers" else 2  # a needle of two uuids has 86 tokens
    common, own = int(rng.integers(1, 3)), int(rng.integers(1, most + 1))
    common, own = [(common, 0), (0, own), (common, own)][rng.integers(3)] if count > 1 else (0, own)
    needles, questions, impossible = [[] for _ in range(count)], [], []
    for _ in range(common):  # keys with a value in every document
        key, values = draw.key(of_keys), [draw.value(kind) for _ in range(count)]
        for place, value in zip(needles, values):
            place.append(NEEDLE.format(kind, key, value))
        questions.append((question_about([key], kind, True), values))
    for _ in range(own):  # keys with one value each, one in every document
        keys = [draw.key(of_keys) for _ in range(count)]
        if of_keys == "words" and rng.random() < 0.5:  # they may share a word
            keys[1:] = [draw.like(keys[0]) for _ in keys[1:]]
        values = [draw.value(kind) for _ in range(count)]
        for place, key, value in zip(needles, keys, values):
            place.append(NEEDLE.format(kind, key, value))
        order = rng.permutation(count)  # as asked; values are in the order of documents
        questions.append((question_about([keys[i] for i in order], kind, count > 1), values))
        missing = draw.like(keys[0]) if of_keys == "words" else draw.key(of_keys)
        impossible.append(question_about([missing], kind, False))
    return [hide(place, haystack(), rng) for place in needles], questions, impossible if count == 1 else []


def write_set(config):
    """Write the set; returns how many documents and questions it has.

    An answer of a question with several documents has a line for each, in their order; see `collate_chat`.
    """
    rng, words = np.random.default_rng(config.seed), Words()
    draw, essay = Draw(words, "train", rng), essay_passages(config.essays, "train")
    if not essay:
        raise UserError(f"--essays {config.essays}: no source of it is for training; give more files")

    def haystack():
        where = rng.integers(4)
        if where == 0:
            return []  # a needle alone, or lines of needles
        if where == 1:
            return [words.noise(rng) for _ in range(int(rng.integers(1, 5)))]  # not RULER's
        sentences = essay[rng.integers(len(essay))]
        return sentences[:int(rng.integers(1, len(sentences) + 1))]  # the shorter, the more in the same time

    documents, asked, judged, none = [], [], [], []
    for group in range(config.groups):
        texts, questions, impossible = draw_group(draw, haystack, rng)
        ids = [f"{group}-{i}" for i in range(len(texts))]
        documents += zip(ids, texts)
        for number, (text, values) in enumerate(questions):
            asked.append(dict(_id=f"{group}-q{number}", text=text, answers=["\n".join(values)]))
            judged += [f"{group}-q{number}\t{id}\t1" for id in ids]
        none += [dict(text=text, document=ids[0], split="train") for text in impossible]
        documents.append((f"{group}-plain", hide([], haystack() or essay[0], rng)))
    rows = [dict(_id=id, title="", text=text) for id, text in documents]
    folder = Path(config.out)
    with emptied(folder):
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        for name, lines in (("corpus.jsonl", rows), ("queries.jsonl", asked), ("impossible.jsonl", none)):
            write_rows(folder / name, lines)
        with atomic_file(folder / "qrels" / "train.tsv") as file:
            file.write("\n".join(["query-id\tcorpus-id\tscore", *judged, ""]))
    return len(documents), len(asked)


def script():
    config = command_line(SetConfig, __doc__)
    if Path(config.out).exists() and any(Path(config.out).iterdir()):
        raise UserError(f"--out {config.out}: is there, and not empty; remove it or give another")
    print("{}: {:,} documents, {:,} questions".format(config.out, *write_set(config)))


if __name__ == "__main__":
    main(script)
