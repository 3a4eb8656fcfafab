"""Documents, questions and training files.

    python prepare_data.py config/demo.toml                                            # the [data] table of a run
    python prepare_data.py --documents FOLDER --questions FILE.jsonl --out data/mine   # your own

Without documents of your own the data are the synthetic tasks of tasks.py: needles, two-hop chains and colours.

Training data is a sequence of **pools**: the documents of one step and the questions about them. Every question
becomes one-step samples (`collate`): question -> first document; question and first document -> second; all -> answer.
On disk (`data/demo/train/`) a pool is rows of seven ragged arrays, each a `.bin` of values and a `.offsets` of int64,
written as they are made and memory-mapped by `Pools`.

Your own questions are lines {"question": ..., "answer": ..., "documents": ["a.txt", "b.txt:12"]}: files of the folder in
the order of the hops, with a line where a long file was split. With "pooled": true the answer is learned from the pooled memory of
the one document, without its text.
"""
import dataclasses
import json
import os
import shutil
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, command_line, main, write_json
from tasks import Question, Words, make_pool
from tokenizer import named_encoding, train_encoding


@dataclass
class DataConfig:
    out: str = "data/demo"           # folder to write
    seed: int = 1337                 # same seed, same bytes
    pools: int = 2000                # training pools; one optimizer step reads one per rank
    validation_pools: int = 16       # pools whose keys are neither trained on nor tested
    needles: int = 16                # one-hop needles in a pool, each asked about
    chains: int = 14                 # two-hop chains in a pool (two documents each), each asked about
    noise: int = 4                   # noise documents in a pool
    properties: int = 0              # documents in a pool that state a colour, each asked about; answered from the pooled memory
    alike: float = 0.0               # share of the keys with a common word whose other words are spelled alike, as tell and teller
    filler: int = 0                  # up to so many noise sentences around a sentence that matters; 2: documents of up to 64 tokens
    encoding: str = "train"          # "train" a BPE on this data, or a name that tiktoken knows, such as "gpt2"
    vocab_size: int = 4096           # of the trained BPE, special tokens included
    number_tokens: bool = False      # numbers of documents are spelled in three tokens of their own, not in digits; see tokenizer.py
    documents: str = ""              # a folder of .txt and .md files: your own documents instead of the synthetic ones
    questions: str = ""              # a .jsonl file: your own questions about them
    max_document_tokens: int = 512   # longer files are split at paragraphs
    documents_per_pool: int = 48     # your own data: documents that a step encodes
    questions_per_pool: int = 16     # your own data: questions that a step asks; their documents are in its pool

    def __post_init__(self):
        for name in ("pools", "validation_pools", "max_document_tokens", "documents_per_pool", "questions_per_pool"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("needles", "chains", "noise", "properties", "filler", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.alike <= 1:
            raise UserError(f"alike is {self.alike}; it must be between 0 and 1")
        if self.needles + self.chains + self.properties == 0:
            raise UserError("needles, chains and properties are all 0; a pool needs something to ask about")
        if bool(self.documents) != bool(self.questions):
            raise UserError("documents and questions go together: a folder and a .jsonl file of questions about it")


# ---------------------------------------------------------------------------------------------------------------------
# Documents of a folder

@dataclass(frozen=True)
class Document:
    """A document's text and where it came from, for citations; lines count from 1. id: what makes it the same document after a change.
    number: that a bank must give it, else the next."""
    text: str
    source: str = ""
    first_line: int = 0
    last_line: int = 0
    id: str = ""
    number: int | None = None

    def where(self):
        return f"{self.source}:{self.first_line}-{self.last_line}" if self.source else "(generated)"


def read_documents(path, count_tokens, max_tokens):
    """Yields Documents, file by file: of a folder's .txt and .md files (hidden ones left out) in the order of their names, or of a .jsonl
    file of lines {"id": ..., "title": ..., "text": ...}, title optional.

    A text of more than `max_tokens` (by `count_tokens(text)`) is split at paragraphs; a longer paragraph at lines, a longer
    line at words. Raises UserError for what is missing or has no text, and for a file or line that cannot be read or is not UTF-8.
    """
    root, none = Path(path), True
    if root.suffix.lower() == ".jsonl" and root.is_file():
        texts = read_jsonl(root)
    elif root.is_dir():
        texts = read_files(root)
    else:
        raise UserError(f"{path}: no such folder of documents, nor a .jsonl file")
    for id, source, text in texts:
        for i, (first, last, piece) in enumerate(split_text(text, count_tokens, max_tokens)):
            none = False
            yield Document(piece, source, first, last, f"{id}#{i}")
    if none:
        raise UserError(f"{path}: no text in it; expected .txt or .md files, or lines of a .jsonl file, that are not empty")


def read_folder(folder, count_tokens, max_tokens):
    """All of `read_documents` as a list."""
    return list(read_documents(folder, count_tokens, max_tokens))


def read_files(root):
    """Yields (id, source, text) of a folder's files: the path below the folder is both."""
    for path in folder_files(root):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it to UTF-8 or move it out of the folder") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        yield (os.fsencode(path.relative_to(root)).decode(errors="replace"),) * 2 + (text,)  # not every name is UTF-8


def folder_files(root):
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in (".txt", ".md") and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(root).parts))


def read_jsonl(path):
    """Yields (id, title, text) of the lines of a .jsonl file; a document without a title is called by its id."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line.decode())
                id = found["_id"] if "_id" in found else found["id"]  # BEIR's files say _id
                title, text = found.get("title") or id, found["text"]
                if {type(x) for x in (id, title, text)} != {str}:
                    raise TypeError
                f"{id}{title}{text}".encode()  # raises for half a character, "\\ud83d"
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f'{path}:{number}: not an object {{"id": "...", "title": "...", "text": "..."}} of UTF-8 strings') from None
            yield id, title, text


def read_beir(folder):
    """A retrieval set in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv (train, test, and what else there is).

    Returns (documents, questions by split): documents are texts, without their titles; questions are (text, gold), gold a tuple of the
    indices of the documents that answer it. Raises UserError that names the line.
    """
    folder = Path(folder)
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; expected a set in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/train.tsv")
    corpus, queries = (list(read_jsonl(folder / name)) for name in ("corpus.jsonl", "queries.jsonl"))
    place, text_of, questions = {id: i for i, (id, _, _) in enumerate(corpus)}, {id: text for id, _, text in queries}, {}
    if len(place) < len(corpus):
        raise UserError(f"{folder}/corpus.jsonl: two documents have the same _id; ids must differ")
    for path in sorted((folder / "qrels").glob("*.tsv")):
        gold = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8") from None
        for number, line in enumerate(lines, start=1):
            if number == 1 or not line.strip():  # the first line names the columns
                continue
            query, document, score = (line.split("\t") + ["", ""])[:3]
            if query not in text_of or document not in place or not score.strip().lstrip("-").isdecimal():
                raise UserError(f"{path}:{number}: {line!r} is not a query's _id, a document's _id and a score, with tabs between")
            if int(score) > 0:
                gold.setdefault(query, []).append(place[document])
        questions[path.stem] = [(text_of[query], tuple(dict.fromkeys(found))) for query, found in gold.items()]
    return [text for _, _, text in corpus], questions


def read_squad(path):
    """SQuAD's own file as a retrieval set: its paragraphs, and the questions about each.

    Returns what `read_beir` does, of the splits train and test: every fourth article is for testing. Questions that a paragraph does not
    answer are left out. Raises UserError for another file.
    """
    documents, questions = [], {"train": [], "test": []}
    try:
        articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
        for i, article in enumerate(articles):
            for paragraph in article["paragraphs"]:
                asked = [row["question"].strip() for row in paragraph["qas"] if not row.get("is_impossible")]
                questions["test" if i % 4 == 3 else "train"] += [(question, (len(documents),)) for question in asked]
                documents.append(paragraph["context"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected SQuAD's .json file, or a folder in BEIR's layout") from None
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


def documents_size(path):
    """Bytes of what `read_documents` reads."""
    root = Path(path)
    return sum(file.stat().st_size for file in (folder_files(root) if root.is_dir() else [root] if root.is_file() else []))


def split_text(text, count_tokens, max_tokens):
    """Pieces of at most `max_tokens` as (first line, last line, text): whole paragraphs where they fit."""
    pieces, current = [], []  # `current`: numbered lines of the piece being filled

    def flush():
        lines = [line for line in current if line[1].strip()]
        if lines:
            pieces.append((lines[0][0], lines[-1][0], "\n".join(line for _, line in current).strip()))
        current.clear()

    def fits(block):
        return count_tokens("\n".join(line for _, line in current + block)) <= max_tokens

    for paragraph in paragraphs(text):
        blocks = [paragraph] if count_tokens("\n".join(line for _, line in paragraph)) <= max_tokens else \
            [[part] for line in paragraph for part in split_line(line, count_tokens, max_tokens)]
        for block in blocks:
            if not fits(block):
                flush()
            current.extend(block)
    flush()
    return pieces


def paragraphs(text):
    """Lists of (line number, line), each up to and including the blank lines behind it."""
    block = []
    for number, line in enumerate(text.splitlines(), start=1):
        if block and not block[-1][1].strip() and line.strip():
            yield block
            block = []
        block.append((number, line))
    if block:
        yield block


def split_line(line, count_tokens, max_tokens):
    """One numbered line as several of at most `max_tokens`, cut between words (inside a word that alone is too long)."""
    number, text = line
    if count_tokens(text) <= max_tokens or len(text) < 2:
        return [line]
    middle = text.find(" ", len(text) // 2)
    middle = len(text) // 2 if middle < 0 else middle
    return (split_line((number, text[:middle]), count_tokens, max_tokens)
            + split_line((number, text[middle:].lstrip()), count_tokens, max_tokens))


# ---------------------------------------------------------------------------------------------------------------------
# Your own questions

def read_questions(path, documents):
    """Questions of a .jsonl file about `documents`. Raises UserError that names the line."""
    places = {}
    for i, document in enumerate(documents):
        places.setdefault(document.source, []).append(i)
    questions = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer, names = row["question"], row["answer"], row["documents"]
            if not (question and isinstance(question, str) and answer and isinstance(answer, str) and isinstance(names, list)):
                raise TypeError
            gold = tuple(find_document(str(name), places, documents) for name in names)
            if not gold:
                raise UserError("'documents' is empty")
            if type(row.get("pooled", False)) is not bool or (row.get("pooled") and len(gold) != 1):
                raise UserError(f"'pooled' is {row['pooled']!r}; true or false, and true only with one document")
            questions.append(Question(question, gold, answer, row.get("pooled", False)))
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not an object with \"question\", \"answer\" (text) and \"documents\" (a list)") from None
    if len(questions) < 2:
        raise UserError(f"{path}: holds {len(questions)} questions; at least 2 are needed, one to train on and one to validate")
    return questions


def find_document(name, places, documents):
    """The index of the document "file" or "file:line"."""
    source, _, line = name.rpartition(":") if name.rpartition(":")[2].isdigit() else (name, "", "")
    candidates = [i for i in places.get(source, [])
                  if not line or documents[i].first_line <= int(line) <= documents[i].last_line]
    if len(candidates) != 1:
        raise UserError(f"'{name}' names {len(candidates)} documents of the folder; give a file below it, "
                        "and \"file:line\" where a long file was split")
    return candidates[0]


def own_pool(documents, questions, config, rng):
    """Document indices and question indices of one pool: random questions, their documents, random others."""
    asked = rng.choice(len(questions), min(config.questions_per_pool, len(questions)), replace=False).tolist()
    gold = list(dict.fromkeys(i for q in asked for i in questions[q].gold))
    others = [i for i in rng.permutation(len(documents)).tolist()[:config.documents_per_pool + len(gold)] if i not in set(gold)]
    pool = gold + others[:max(0, config.documents_per_pool - len(gold))]
    return rng.permutation(pool).tolist(), asked


# ---------------------------------------------------------------------------------------------------------------------
# Files

class RaggedWriter:
    """Rows of unequal length, streamed to `path.bin`; `path.offsets` (int64, rows + 1) says where each begins."""

    def __init__(self, path, dtype):
        self.path, self.dtype, self.offsets = path, np.dtype(dtype), array("q", [0])
        self.file = open(f"{path}.bin", "wb")

    def append(self, row):
        self.file.write(np.asarray(row, dtype=self.dtype).tobytes())
        self.offsets.append(self.offsets[-1] + len(row))

    def close(self):
        self.file.close()
        np.frombuffer(self.offsets, dtype=np.int64).tofile(f"{self.path}.offsets")

    def __len__(self):
        return len(self.offsets) - 1


class Ragged:
    """What RaggedWriter wrote, memory-mapped: `ragged[i]` is row i."""

    def __init__(self, path, dtype):
        try:
            self.offsets = np.fromfile(f"{path}.offsets", dtype=np.int64)
            size, item = Path(f"{path}.bin").stat().st_size, np.dtype(dtype).itemsize
            self.values = np.memmap(f"{path}.bin", dtype, "r", shape=size // item) if size >= item else np.zeros(0, dtype)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file; run prepare_data.py first") from None
        if not len(self.offsets) or self.offsets[-1] * item != size:
            raise UserError(f"{path}.bin: {size} bytes, but its offsets say otherwise; run prepare_data.py again")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.values[self.offsets[i]:self.offsets[i + 1]]


ARRAYS = ("documents", "questions", "answers", "gold", "pooled", "pool_documents", "pool_questions")  # the first three: tokens


class PoolWriter:
    """Writes one split. Tokens are uint16 where the vocabulary allows, else uint32."""

    def __init__(self, folder, tokenizer):
        folder.mkdir(parents=True)
        self.tokenizer = tokenizer
        for name, dtype in array_types(tokenizer.vocab_size).items():
            setattr(self, name, RaggedWriter(folder / name, dtype))

    def add_documents(self, texts):
        """Append documents; returns the index of the first."""
        first = len(self.documents)
        for text in texts:
            self.documents.append(self.tokenizer.encode(text))
        return first

    def add_questions(self, questions, first_document=0):
        """Append Questions whose gold indices count from `first_document`; returns the index of the first."""
        first = len(self.questions)
        for question in questions:
            self.questions.append(self.tokenizer.encode(question.text))
            self.answers.append(self.tokenizer.encode(question.answer))
            self.gold.append([first_document + i for i in question.gold])
            self.pooled.append([question.pooled])
        return first

    def add_pool(self, documents, questions):
        self.pool_documents.append(documents)
        self.pool_questions.append(questions)

    def close(self):
        for name in ARRAYS:
            getattr(self, name).close()


def array_types(vocab_size):
    token = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    return {name: token if i < 3 else np.int64 for i, name in enumerate(ARRAYS)}


class Pools:
    """A split on disk: `pools[i]` is (documents, questions); a document is an array of ids, a question a tuple
    (question ids, answer ids, gold indices into the pool's documents, pooled)."""

    def __init__(self, folder, vocab_size):
        """Raises UserError for missing or broken files, and (when a pool is read) for ids outside the vocabulary."""
        self.folder, self.vocab_size = Path(folder), vocab_size
        about = read_about(self.folder.parent)
        for name, dtype in array_types(about["vocab_size"]).items():
            setattr(self, name, Ragged(self.folder / name, dtype))

    def __len__(self):
        return len(self.pool_documents)

    def __getitem__(self, i):
        ids = self.pool_documents[i].tolist()
        place = {document: at for at, document in enumerate(ids)}
        try:
            documents = [self.documents[d] for d in ids]
            questions = [(self.questions[q], self.answers[q], [place[d] for d in self.gold[q].tolist()], bool(self.pooled[q][0]))
                         for q in self.pool_questions[i].tolist()]
        except (IndexError, KeyError):
            raise UserError(f"{self.folder}: pool {i} names a row that does not exist; run prepare_data.py again") from None
        largest = max(int(row.max(initial=0)) for row in documents + [row for q in questions for row in q[:2]])
        if largest >= self.vocab_size:
            raise UserError(f"{self.folder}: pool {i} holds token id {largest}, but the model's vocabulary ends at "
                            f"{self.vocab_size - 1}; set vocab_size in [model] to the tokenizer's")
        return documents, questions


def read_about(folder):
    """The description of prepared data. Raises UserError when there is none."""
    try:
        about = json.loads((Path(folder) / "about.json").read_text(encoding="utf-8"))
        return {"vocab_size": int(about["vocab_size"]), "config": dict(about["config"])}
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared data here; run python prepare_data.py with the same configuration") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/about.json: malformed; run python prepare_data.py again") from None


def draw_numbers(count, limit, rng):
    """`count` distinct document numbers below `limit`, increasing; every number of digits is as likely as any other."""
    digits = len(str(limit - 1))
    numbers = set()
    if count > limit:
        raise UserError(f"number_limit is {limit}; a pool of {count} documents needs at least as many numbers")
    while len(numbers) < count:
        n = int(rng.integers(10 ** int(rng.integers(1, digits + 1))))
        if n < limit:
            numbers.add(n)
    return sorted(numbers)


def collate(pool, tokenizer, number_limit, rng, batch_tokens=2048, contexts=0):
    """One pool as the arguments of `MSA.forward`: documents, and batches of one-step samples (section 3.4 of the paper).

    A question that is answered from the pooled memory is one sample, and one time in four another with its document
    appended: reading the text is easier, but must not be forgotten. Documents get random numbers, increasing with their
    place: the order of a pool is random already.
    Returns (documents, numbers, batches): a list of LongTensors spelled `[n]. text[n]`, their numbers, and dicts of
        tokens (B, T) int64; routing_mask (B, T) bool: tokens that route; target_mask (B, T) bool: tokens to predict;
        answers (B,) bool: the target is an answer, not numbers;
        positive (B, M) bool: the documents to route to; appended (B, M) bool: those whose text is in the sample
    Samples of similar length share a batch of at most `batch_tokens` tokens, padding included.
    contexts: for the full-attention baseline the documents become so many texts of equal length (newlines in front), document m in
    text m * contexts // M; it has no use for numbers. A question is one sample, its answer, if one text holds its documents.
    """
    documents, questions = pool
    texts = [document.tolist() for document in documents]
    numbers = draw_numbers(len(texts), number_limit, rng)
    place = [document * contexts // len(texts) for document in range(len(texts))]  # the text that holds a document
    samples = []  # (prompt, target, positive, appended)
    for question, answer, gold, pooled in questions:
        prompt, answer = tokenizer.question(question.tolist()), [tokenizer.end_of_retrieval, *answer.tolist(), tokenizer.end]
        if contexts:
            if len({place[document] for document in gold}) == 1:
                samples.append((prompt, answer, gold, []))
            continue
        if pooled:
            samples.append((prompt, answer, gold, []))
            if rng.random() > 0.25:
                continue
        for hop, document in enumerate(gold):
            if not pooled:
                samples.append((prompt, [*tokenizer.number(numbers[document]), tokenizer.stop], [document], gold[:hop]))
            prompt = prompt + tokenizer.appended(numbers[document], texts[document])
        samples.append((prompt, answer, [], gold))
    if contexts and not samples:  # no question has its documents in one of so many texts
        return collate(pool, tokenizer, number_limit, rng, batch_tokens, contexts // 2)
    samples.sort(key=lambda sample: len(sample[0]) + len(sample[1]))
    batches, batch = [], []
    for sample in reversed(samples):  # longest first: the first of a batch sets its width
        width = len((batch or [sample])[0][0]) + len((batch or [sample])[0][1]) + 1
        if batch and ((len(batch) + 1) * width > batch_tokens):
            batches.append(stack(batch, tokenizer, len(texts)))
            batch = []
        batch.append(sample)
    batches.append(stack(batch, tokenizer, len(texts)))
    if contexts:
        joined = [[] for _ in range(contexts)]
        for at, text in zip(place, texts):
            joined[at] += text
        width, newline = max(map(len, joined)), tokenizer.encode("\n")
        return [torch.tensor(newline * (width - len(text)) + text) for text in joined], numbers, batches
    return [torch.tensor(tokenizer.document(n, text)) for n, text in zip(numbers, texts)], numbers, batches


def stack(samples, tokenizer, documents):
    """Samples as the padded tensors of one batch; see `collate`."""
    width = max(len(prompt) + 1 + len(target) for prompt, target, _, _ in samples)
    tokens = torch.zeros(len(samples), width, dtype=torch.long)
    routing_mask, target_mask, answers = tokens.bool(), tokens.bool(), torch.zeros(len(samples), dtype=torch.bool)
    positive = torch.zeros(len(samples), documents, dtype=torch.bool)
    appended = positive.clone()
    for i, (prompt, target, gold, seen) in enumerate(samples):
        begin, end = len(prompt) + 1, len(prompt) + 1 + len(target)
        tokens[i, :end] = torch.tensor([*prompt, tokenizer.retrieve, *target])
        routing_mask[i, :len(prompt)] = True
        target_mask[i, begin:end] = True
        answers[i] = target[0] == tokenizer.end_of_retrieval
        positive[i, gold] = True
        appended[i, seen] = True
    return dict(tokens=tokens, routing_mask=routing_mask, target_mask=target_mask, answers=answers, positive=positive, appended=appended)


# ---------------------------------------------------------------------------------------------------------------------

def synthetic_splits(config):
    """Generators of pools (texts, questions), by split."""
    words = Words()
    def generate(split, count, stream):
        for i in range(count):
            yield make_pool(words, config, split, np.random.default_rng([config.seed, stream, i]))
    return {"train": lambda: generate("train", config.pools, 0),
            "validation": lambda: generate("validation", config.validation_pools, 1)}


def make_encoding(config, texts):
    """The tokenizer that the configuration asks for: trained on `texts`, or a known one."""
    if config.encoding == "train":
        return train_encoding(texts, config.vocab_size, config.number_tokens)
    return named_encoding(config.encoding, config.number_tokens)


def write_synthetic(config, folder):
    splits = synthetic_splits(config)
    def sample_texts():  # 1,000 pools are enough to learn merges from
        for _, (documents, questions) in zip(range(1000), splits["train"]()):
            yield from documents
            yield from (q.text for q in questions)
    tokenizer = make_encoding(config, sample_texts())
    for split, pools in splits.items():
        writer = PoolWriter(folder / split, tokenizer)
        total = config.pools if split == "train" else config.validation_pools
        for documents, questions in tqdm(pools(), desc=f"{split} pools", total=total, unit="pool"):
            document, question = writer.add_documents(documents), writer.add_questions(questions, len(writer.documents) - len(documents))
            writer.add_pool(range(document, document + len(documents)), range(question, question + len(questions)))
        writer.close()
    return tokenizer


def write_own(config, folder):
    documents = read_folder(config.documents, lambda text: len(text) // 4, config.max_document_tokens)
    tokenizer = make_encoding(config, (d.text for d in documents))
    documents = read_folder(config.documents, lambda text: len(tokenizer.encode(text)), config.max_document_tokens)
    questions = read_questions(config.questions, documents)
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(questions))
    held_out = max(1, len(questions) // 20)  # one question in twenty validates
    for split, chosen, pools in (("train", order[held_out:], config.pools), ("validation", order[:held_out], config.validation_pools)):
        asked = [questions[i] for i in chosen]
        writer = PoolWriter(folder / split, tokenizer)
        writer.add_documents([d.text for d in documents])
        writer.add_questions(asked)
        for _ in tqdm(range(pools), desc=f"{split} pools", unit="pool"):
            writer.add_pool(*own_pool(documents, asked, config, rng))
        writer.close()
    return tokenizer


def script():
    config = command_line(DataConfig, __doc__, table="data")
    out = Path(config.out)
    if out.exists() and not (out / "about.json").exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is not prepared data; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # the folder appears whole or not at all
    try:
        tokenizer = write_own(config, building) if config.documents else write_synthetic(config, building)
        tokenizer.save(building)
        write_json(building / "about.json", {"vocab_size": tokenizer.vocab_size, "config": dataclasses.asdict(config)})
        shutil.rmtree(out, ignore_errors=True)
        building.chmod(0o755)  # mkdtemp made it private
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    pools = Pools(out / "train", tokenizer.vocab_size)
    tokens = len(pools.documents.values)
    print(f"{out}: {len(pools):,} training pools, {len(pools.documents):,} documents of {tokens / len(pools.documents):.0f} tokens "
          f"on average, {len(pools.questions):,} questions; vocabulary {tokenizer.vocab_size:,}")


if __name__ == "__main__":
    main(script)
