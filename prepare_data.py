"""Documents, questions and training files.

    python prepare_data.py config/demo.toml                               # the [data] table of a run
    python prepare_data.py --documents FOLDER --questions FILE.jsonl --out data/mine
    python prepare_data.py --data SET,SET --encoding CHECKPOINT --out data/sets

Without documents of your own the data are the synthetic tasks of tasks.py: needles, chains and colours.

Training data is a sequence of **pools**: the documents of one step and the questions about them. A question
becomes one-step samples (`collate`): question -> first hop; question, first hop -> second hop; all -> answer.
On disk (`data/demo/train/`) a pool is rows of eight ragged arrays, each a `.bin` of values and a `.offsets`
of int64, written as they are made and memory-mapped by `Pools`.

Your own questions are lines {"question": ..., "answer": ..., "documents": ["a.txt", ["b.txt", "c.txt:12"]]}:
files of the folder in the order of the hops, with a line where a long file was split. A list in the list is
one hop of several documents: one round names them all. With "pooled": true the answer is learned from the
pooled memory of the one document, without its text.

SET is a folder in BEIR's layout or SQuAD's .json file (question_sets.py), of which the questions for training
are taken; for a chat backbone it may also be a FILE.jsonl of your own questions about --documents, or a
folder of your own documents. A pool is a passage, some questions about it, and passages that BM25 finds for
them in its place; the questions of impossible.jsonl, which their passage does not answer, and questions in
which a name or number is another's, are answered by prompts.NOT_FOUND. Where a SET has no questions they are
made: what a sentence says is asked of the rest of its document. Documents about which a test is asked stay
out, with all that have the same title.
"""
import contextlib
import dataclasses
import re
import shutil
import tempfile
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import find_base
from common import (
    UserError,
    command_line,
    main,
    make_folder,
    naming,
    read_json,
    read_rows,
    sync_folder,
    sync_handle,
    write_json,
)
from documents import list_documents, read_documents
from prompts import NOT_FOUND
from question_sets import (
    SetQuestion,
    bm25_search,
    pieces_of,
    place_of,
    read_impossible,
    read_set,
    read_texts,
    tell_odd,
)
from tasks import Question, Words, make_pool
from tokenizer import named_encoding, train_encoding


@dataclass
class DataConfig:
    out: str = "data/demo"          # folder to write
    seed: int = 1337                # same seed, same bytes
    pools: int = 2000               # training pools; one optimizer step reads one per rank
    validation_pools: int = 16      # pools whose keys are neither trained on nor tested
    needles: int = 16               # one-hop needles in a pool, each asked about
    chains: int = 14                # chains in a pool, each asked about
    hops: int = 2                   # documents in a chain
    noise: int = 4                  # noise documents in a pool
    properties: int = 0             # documents that state a colour; asked about, answered from pooled memory
    alike: float = 0.0              # share of the keys with a common word that begin alike (tell, teller)
    filler: int = 0                 # up to so many noise sentences around each; 2: up to 64 tokens
    encoding: str = "train"         # "train" a BPE on this data, a name that tiktoken knows, or a checkpoint
    vocab_size: int = 4096          # of the trained BPE, special tokens included
    number_tokens: bool = False     # spell documents' numbers in tokens of their own; see tokenizer.py
    documents: str = ""             # your own documents: a folder of text, or a .jsonl file
    questions: str = ""             # a .jsonl file: your own questions about them
    data: str = ""                  # sets of questions, commas between; one that is named twice counts twice
    max_document_tokens: int = 512  # longer files are split at paragraphs
    documents_per_pool: int = 48    # your own data: documents that a step encodes
    questions_per_pool: int = 16    # your own data: questions that a step asks; the pool has their documents

    def __post_init__(self):
        least = dict(pools=1, validation_pools=1, hops=1, max_document_tokens=1, documents_per_pool=1,
                     questions_per_pool=1, needles=0, chains=0, noise=0, properties=0, filler=0, seed=0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if not 0 <= self.alike <= 1:
            raise UserError(f"alike is {self.alike}; it must be between 0 and 1")
        if self.needles + self.chains + self.properties == 0:
            raise UserError("needles, chains and properties are all 0; a pool needs something to ask about")
        if self.data:
            own = any(path.endswith(".jsonl") for path in self.data.split(","))
            if own != bool(self.documents) or self.questions:
                raise UserError("data and documents go together where data has a .jsonl file of questions "
                                "about them, and only there; questions is for neither")
            if own and self.encoding == "train":
                raise UserError("data has questions of your own, which are for a chat backbone; give its "
                                "checkpoint, such as --encoding checkpoints/smollm2")
        elif bool(self.documents) != bool(self.questions):
            raise UserError("documents and questions go together: a folder, and a .jsonl file about it")


# ------------------------------------------------------------------------------------------------------------
# Your own questions

def read_questions(path, documents):
    """Questions of a .jsonl file about `documents`. Raises UserError that names the line."""
    pieces, questions = pieces_of(documents), {}
    wanted = 'an object with "question", "answer" (text) and "documents" (a list)'
    for number, row in read_rows(path, wanted):
        try:
            text, answer, names = row["question"], row["answer"], row["documents"]
            pooled = row.get("pooled", False)
            if not (isinstance(text, str) and isinstance(answer, str) and isinstance(names, list)
                    and text and answer):
                raise TypeError
            hops = [hop if isinstance(hop, list) else [hop] for hop in names]
            gold = tuple(tuple(place_of(str(name), pieces, documents) for name in hop) for hop in hops)
            question = Question(text, gold, answer, pooled)
            if not gold or not all(gold):
                raise UserError("'documents' is empty, or a list in it is; name a document in each")
            if len(set(question.documents)) < len(question.documents):
                raise UserError("'documents' names a document twice; name it where it is first needed")
            if type(pooled) is not bool or (pooled and len(question.documents) != 1):
                raise UserError(f"'pooled' is {pooled!r}; true or false, and true only with one document")
            questions[question] = questions.get(question, 0) + 1
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not {wanted}") from None
    again = sum(questions.values()) - len(questions)  # one of two could train, the other validate
    tell_odd(path, {"skipped: asked again": again}, print)
    if len(questions) < 2:
        raise UserError(f"{path}: holds {len(questions)} questions; at least 2 are needed, one to train "
                        "on and one to validate with")
    return [*questions]


def own_pool(documents, questions, config, rng):
    """Document indices and question indices of one pool: random questions, their documents, random others."""
    asked = rng.choice(len(questions), min(config.questions_per_pool, len(questions)), replace=False).tolist()
    gold = list(dict.fromkeys(i for q in asked for i in questions[q].documents))
    drawn = rng.permutation(len(documents)).tolist()[:config.documents_per_pool + len(gold)]
    others = [i for i in drawn if i not in set(gold)]
    pool = gold + others[:max(0, config.documents_per_pool - len(gold))]
    return rng.permutation(pool).tolist(), asked


# ------------------------------------------------------------------------------------------------------------
# Files

class RaggedWriter:
    """Rows of unequal length, streamed to `path.bin`; `path.offsets` (int64, rows + 1): where each begins."""

    def __init__(self, path, dtype):
        self.path, self.dtype = path, dtype
        self.offsets = array("q", [0])
        self.file = open(f"{path}.bin", "wb")

    def append(self, row):
        self.file.write(np.asarray(row, dtype=self.dtype).tobytes())
        self.offsets.append(self.offsets[-1] + len(row))

    def close(self):
        with self.file, open(f"{self.path}.offsets", "wb") as offsets:
            offsets.write(self.offsets.tobytes())
            for file in (self.file, offsets):
                file.flush()
                sync_handle(file.fileno(), self.path)

    def __len__(self):
        return len(self.offsets) - 1


class Ragged:
    """What RaggedWriter wrote, memory-mapped: `ragged[i]` is row i."""

    def __init__(self, path, dtype):
        try:
            self.offsets = np.fromfile(f"{path}.offsets", dtype=np.int64)
            size = Path(f"{path}.bin").stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file; prepared by an older version, or incomplete: "
                            "run prepare_data.py again") from None
        if not len(self.offsets) or self.offsets[-1] * np.dtype(dtype).itemsize != size:
            raise UserError(f"{path}.bin: {size} bytes, not what its offsets say; run prepare_data.py again")
        self.values = np.zeros(0, dtype)
        if size:  # nothing cannot be mapped
            with naming(f"{path}.bin"):
                self.values = np.memmap(f"{path}.bin", dtype, "r")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.values[self.offsets[i]:self.offsets[i + 1]]


ARRAYS = ("documents", "questions", "answers",  # tokens
          "gold", "hop_ends", "pooled",         # of a question: documents; where in them hops end; 0 or 1
          "pool_documents", "pool_questions")


def array_types(vocab_size):
    """The type of each of ARRAYS: tokens are uint16 where the vocabulary allows, else uint32."""
    token = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    return {name: token if i < 3 else np.int64 for i, name in enumerate(ARRAYS)}


class PoolWriter:
    """Writes one split."""

    def __init__(self, folder, tokenizer):
        folder.mkdir(parents=True)
        self.encode = tokenizer.encode
        types = array_types(tokenizer.vocab_size)
        self.rows = {name: RaggedWriter(folder / name, dtype) for name, dtype in types.items()}

    def add(self, texts, questions):
        """Append documents, and Questions whose gold counts from the first of them; returns their indices."""
        rows, document, asked = self.rows, len(self.rows["documents"]), len(self.rows["questions"])
        for text in texts:
            rows["documents"].append(self.encode(text))
        for question in questions:
            rows["questions"].append(self.encode(question.text))
            rows["answers"].append(self.encode(question.answer))
            rows["gold"].append([document + i for i in question.documents])
            rows["hop_ends"].append(np.cumsum([len(hop) for hop in question.gold]))
            rows["pooled"].append([question.pooled])
        return range(document, document + len(texts)), range(asked, asked + len(questions))

    def add_pool(self, documents, questions):
        """Append a pool of what was added before: indices of documents and of questions."""
        self.rows["pool_documents"].append(documents)
        self.rows["pool_questions"].append(questions)

    def close(self):
        for rows in self.rows.values():
            rows.close()


class Pools:
    """A split on disk: `pools[i]` is (documents, questions). A document is an array of ids, a question is
    (question ids, answer ids, gold, pooled); gold: a list of hops, each a list of indices of documents."""

    def __init__(self, folder, vocab_size):
        """Raises UserError for missing or broken files; reading a pool, for ids outside the vocabulary."""
        self.folder, self.vocab_size = Path(folder), vocab_size
        about = read_about(self.folder.parent)
        for name, dtype in array_types(about["vocab_size"]).items():
            setattr(self, name, Ragged(self.folder / name, dtype))

    def __len__(self):
        return len(self.pool_documents)

    def __getitem__(self, i):
        ids = self.pool_documents[i].tolist()
        place = {document: at for at, document in enumerate(ids)}
        documents, questions = [self.documents[d] for d in ids], []
        for q in self.pool_questions[i].tolist():
            hops = np.split(self.gold[q], self.hop_ends[q][:-1])
            gold = [[place[document] for document in hop.tolist()] for hop in hops if len(hop)]
            questions.append((self.questions[q], self.answers[q], gold, bool(self.pooled[q][0])))
        rows = [*documents, *(row for question in questions for row in question[:2])]
        largest = max(int(row.max(initial=0)) for row in rows)
        if largest >= self.vocab_size:
            raise UserError(f"{self.folder}: pool {i} holds token id {largest}, but the model's vocabulary "
                            f"ends at {self.vocab_size - 1}; set vocab_size in [model] to the tokenizer's")
        return documents, questions


def read_about(folder):
    """The description of prepared data. Raises UserError when there is none."""
    path = Path(folder) / "about.json"
    if not path.exists():
        raise UserError(f"{folder}: no prepared data here; run python prepare_data.py with the same "
                        "configuration")
    try:
        about = read_json(path, "an object")
        return {"vocab_size": int(about["vocab_size"]), "config": dict(about["config"])}
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{path}: malformed; run python prepare_data.py again") from None


def check_prepared(config):
    """Raises UserError unless the data in `config.out` were prepared with this DataConfig."""
    asked = dataclasses.asdict(config)
    held = dataclasses.asdict(DataConfig()) | read_about(config.out)["config"]  # newer options had no effect
    for name in [*asked, *held]:
        if held.get(name) != asked.get(name):
            raise UserError(f"{config.out}: prepared with {name} = {held.get(name)!r}, but this run says "
                            f"{asked.get(name)!r}; run prepare_data.py with the same configuration")


def draw_numbers(count, limit, rng):
    """`count` distinct document numbers below `limit`, increasing; all numbers of digits are alike likely."""
    digits, numbers = len(str(limit - 1)), set()
    if count > limit:
        raise UserError(f"number_limit is {limit}; a pool of {count} documents needs as many numbers")
    while len(numbers) < count:
        n = int(rng.integers(10 ** int(rng.integers(1, digits + 1))))
        if n < limit:
            numbers.add(n)
    return sorted(numbers)


def collate(pool, tokenizer, number_limit, rng, batch_tokens=2048):
    """One pool as the arguments of `MSA.forward`: documents, and batches of one-step samples (section 3.4).

    A hop is one sample, which names its documents in the order of their numbers, and then stops. A question
    that is answered from the pooled memory is one sample, and one time in four another with its document
    appended: reading the text is easier, but must not be forgotten. Documents get random numbers, increasing
    with their place: the order of a pool is random already.
    Returns (documents, numbers, batches): LongTensors spelled `[n]. text[n]`, their numbers, and dicts of
        tokens (B, T) int64; routing_mask (B, T) int64: 1 the question, 2, 3, ... texts appended to it, which
        route; 0 what does not
        target_mask (B, T) bool: tokens to predict; answers (B,) bool: they are an answer, not numbers
        positive (B, M) bool: documents to route to; appended (B, M) bool: those whose text is in the sample
    Samples of similar length share a batch of at most `batch_tokens` tokens, padding included.
    """
    documents, questions = pool
    texts = [document.tolist() for document in documents]
    numbers = draw_numbers(len(texts), number_limit, rng)
    length = lambda sample: len(sample[0]) + 1 + len(sample[1])
    samples = []
    for question, answer, gold, pooled in questions:
        prompt, appended = tokenizer.question(question.tolist()), []
        segments = [1] * len(prompt)
        answer = [tokenizer.end_of_retrieval, *answer.tolist(), tokenizer.end]
        if pooled:
            samples.append((prompt, answer, gold[0], [], segments))
            if rng.random() > 0.25:
                continue
        for hop in map(sorted, gold):
            if not pooled:
                names = [token for document in hop for token in tokenizer.number(numbers[document])]
                samples.append((prompt, [*names, tokenizer.stop], hop, appended, segments))
            for document in hop:
                text = tokenizer.appended(numbers[document], texts[document])
                prompt = prompt + text
                segments = segments + [segments[-1] + 1] * len(text)
            appended = appended + hop
        samples.append((prompt, answer, [], appended, segments))
    batches = [stack(batch, tokenizer, len(texts)) for batch in in_batches(samples, length, batch_tokens)]
    return [torch.tensor(tokenizer.document(n, text)) for n, text in zip(numbers, texts)], numbers, batches


def in_batches(samples, length, batch_tokens):
    """Samples in lists of similar length(sample), the longest first, of at most `batch_tokens` tokens,
    padding included: the first of a list sets its width."""
    batches = [[]]
    for sample in reversed(sorted(samples, key=length)):
        if batches[-1] and (len(batches[-1]) + 1) * length(batches[-1][0]) > batch_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def stack(samples, tokenizer, documents):
    """Samples (prompt, target, positive, appended, segments) as the padded tensors of one batch; see
    `collate`."""
    size = len(samples), max(len(prompt) + 1 + len(target) for prompt, target, *_ in samples)
    tokens, routing_mask = torch.zeros(2, *size, dtype=torch.long)
    target_mask = torch.zeros(size, dtype=torch.bool)
    positive, appended = torch.zeros(2, len(samples), documents, dtype=torch.bool)
    answers = torch.zeros(len(samples), dtype=torch.bool)
    for i, (prompt, target, gold, seen, segments) in enumerate(samples):
        begin, end = len(prompt) + 1, len(prompt) + 1 + len(target)
        tokens[i, :end] = torch.tensor([*prompt, tokenizer.retrieve, *target])
        routing_mask[i, :len(prompt)] = torch.tensor(segments)
        target_mask[i, begin:end] = True
        answers[i] = target[0] == tokenizer.end_of_retrieval
        positive[i, gold] = True
        appended[i, seen] = True
    return dict(tokens=tokens, routing_mask=routing_mask, target_mask=target_mask, answers=answers,
                positive=positive, appended=appended)


MOST_SHOWN = 5       # documents in a message, 1 or more, gold ones aside
WITHOUT_GOLD = 0.15  # share of messages that show none of the gold documents


CHAT_TOKENS = 32768  # of a batch of several pools' questions, padding included


def collate_chat(pools, tokenizer, number_limit, rng):
    """`collate` for a chat backbone, which answers from the texts in its message: nothing is routed.

    One message a pool: some of its documents in random order, among them those of one of its questions, or
    none of those; then each of its questions. One whose documents are shown is answered, one of which none is
    shown and whose answer stands nowhere is told NOT_FOUND, others are left out. An answer of several lines
    has one for each gold document: those of the shown ones are said, in the order in which they are shown,
    and some of these documents may not be shown.

    Returns ([], [], batches). The samples of one pool are one batch: they begin with the same tokens,
    `shared` (1, P) int64, and go on with `tokens`. Those of several pools are whole: more to compute, in
    fewer calls, as GPUs like it. `answers` says which are not NOT_FOUND.
    """
    if len(pools) == 1:
        return [], [], [stack_chat(chat_samples(pools[0], tokenizer, number_limit, rng))]
    samples = [sample for pool in pools for sample in chat_samples(pool, tokenizer, number_limit, rng)]
    length = lambda sample: len(sample[0]) + len(sample[1])
    return [], [], [stack_chat(batch, shares=False) for batch in in_batches(samples, length, CHAT_TOKENS)]


def chat_samples(pool, tokenizer, number_limit, rng):
    """The samples of one pool: (prompt, target, whether it is an answer)."""
    documents, questions = pool
    texts = [tokenizer.decode(document.tolist()) for document in documents]
    asked = [(tokenizer.decode(question.tolist()), tokenizer.decode(answer.tolist()),
              [document for hop in gold for document in hop]) for question, answer, gold, _ in questions]
    leaders = [(gold, "\n" in answer) for _, answer, gold in asked if gold]
    (gold, in_parts), samples = leaders[rng.integers(len(leaders))], []
    if in_parts:
        count = len(gold) if rng.random() < 0.5 else int(rng.integers(1, len(gold) + 1))
        gold = rng.permutation(gold)[:count].tolist()
    for shows in (rng.random() >= WITHOUT_GOLD, True):  # nothing may be left of a message without gold
        others = [i for i in rng.permutation(len(texts)).tolist() if i not in gold]
        count = int(rng.integers(1, MOST_SHOWN + 1))
        shown = [*gold, *others[:count - 1]] if shows else others[:count]
        shown = [shown[i] for i in rng.permutation(len(shown))]
        numbers = rng.permutation(draw_numbers(len(shown), number_limit, rng)).tolist()
        appended, said = [(n, texts[i]) for n, i in zip(numbers, shown)], " ".join(texts[i] for i in shown)
        for question, answer, needed in asked:
            if "\n" in answer:
                of = dict(zip(needed, answer.split("\n")))
                answer = ", ".join(of[i] for i in shown if i in of) or NOT_FOUND
            elif not {*needed} <= {*shown}:
                if {*needed} & {*shown} or answer.lower() in said.lower():
                    continue
                answer = NOT_FOUND
            target = tokenizer.answer(answer)
            samples.append((tokenizer.message(question, appended), target, answer != NOT_FOUND))
        if samples:
            break
    return samples


def stack_chat(samples, shares=True):
    """Samples (prompt, target, whether it is an answer) as one batch of `collate_chat`. shares: what all rows
    begin with is taken out of them, as `shared`."""
    rows, shared = [prompt + target for prompt, target, _ in samples], 0
    if shares:
        most = min(len(prompt) for prompt, _, _ in samples) - 1  # a token before predicts the first target
        shared = next((i for i in range(most) if len({row[i] for row in rows}) > 1), most)
    tokens = torch.zeros(len(rows), max(map(len, rows)) - shared, dtype=torch.long)
    target_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, (row, (prompt, _, _)) in enumerate(zip(rows, samples)):
        tokens[i, :len(row) - shared] = torch.tensor(row[shared:])
        target_mask[i, len(prompt) - shared:len(row) - shared] = True
    nothing = torch.zeros(len(rows), 0, dtype=torch.bool)
    batch = dict(tokens=tokens, target_mask=target_mask, routing_mask=torch.zeros_like(tokens),
                 positive=nothing, appended=nothing,
                 answers=torch.tensor([answers for _, _, answers in samples]))
    return batch | dict(shared=torch.tensor([rows[0][:shared]])) if shares else batch


# ------------------------------------------------------------------------------------------------------------
# The kinds of data

def make_encoding(config, texts):
    """The tokenizer that the configuration asks for: trained on `texts`, or a known one."""
    if config.encoding == "train":
        return train_encoding(texts, config.vocab_size, config.number_tokens)
    return named_encoding(str(find_base(config.encoding)), config.number_tokens)


def write_synthetic(config, folder):
    """Pools of the synthetic tasks, each with documents of its own; returns the tokenizer."""
    words = Words()

    def pools(split, stream, count):
        for i in range(count):
            yield make_pool(words, config, split, np.random.default_rng([config.seed, stream, i]))

    def sample_texts():  # 1,000 pools are enough to learn merges from
        for documents, questions in pools("train", 0, min(1000, config.pools)):
            yield from documents
            yield from (question.text for question in questions)
    tokenizer = make_encoding(config, sample_texts())
    for split, stream, count in (("train", 0, config.pools), ("validation", 1, config.validation_pools)):
        writer = PoolWriter(folder / split, tokenizer)
        for texts, asked in tqdm(pools(split, stream, count), f"{split} pools", count, unit="pool"):
            writer.add_pool(*writer.add(texts, asked))
        writer.close()
    return tokenizer


def write_own(config, folder):
    """Pools drawn from your own documents, which all of them share; returns the tokenizer."""
    limit = config.max_document_tokens
    roughly = read_documents(config.documents, lambda text: len(text) // 4, limit)
    tokenizer = make_encoding(config, (document.spelled() for document in roughly))
    documents = list_documents(config.documents, lambda text: len(tokenizer.encode(text)), limit, print)
    questions = read_questions(config.questions, documents)
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(questions))
    held_out = max(1, len(questions) // 20)  # one question in twenty validates
    for split, chosen, pools in (("train", order[held_out:], config.pools),
                                 ("validation", order[:held_out], config.validation_pools)):
        asked = [questions[i] for i in chosen]
        writer = PoolWriter(folder / split, tokenizer)
        writer.add([document.spelled() for document in documents], asked)
        for _ in tqdm(range(pools), desc=f"{split} pools", unit="pool"):
            writer.add_pool(*own_pool(documents, asked, config, rng))
        writer.close()
    return tokenizer


ANSWER_TOKENS = 24      # a question whose shortest answer is longer is left out: sentences are not answers
# Names, aside from a first word's capital, and numbers of two digits or more
NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'’-]+(?: [A-Z][\w'’-]+)*|\b\d[\d,.]*\d\b")
ANSWER_WORDS = 4        # but so many words are one, however many tokens they have: a uuid has 36
IMPOSSIBLE = 0.34       # share of a pool's questions, at most, that their passage does not answer
RANDOM_DOCUMENTS = 1    # of a pool; the others are its passage and what is like it
HELD_OUT = 0.05         # share of the documents about which validation asks


def cloze(text, rng):
    """A text without one of its sentences, and pairs (question, answer) that this sentence makes: names and
    numbers in it that the others have, too, are asked for (arXiv 1804.00720). Without any: (text, [])."""
    title, end, body = text.partition("\n") if "\n" in text else ("", "", text)
    starts = [0, *(space.end() for space in re.finditer(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n", body)), len(body)]
    for i in rng.permutation(len(starts) - 1).tolist():
        sentence, found = body[starts[i]:starts[i + 1]].strip(), []
        rest = (body[:starts[i]] + body[starts[i + 1]:]).rstrip()
        for span in NAME.finditer(sentence):
            answer = span[0].rstrip(".,")
            if re.search(rf"\b{re.escape(answer)}\b", rest) and answer not in title:
                asked = "who or what" if answer[0].isalpha() else "how many"
                if re.fullmatch(r"1\d\d\d|20\d\d", answer):
                    asked = "what year"
                said = sentence[:span.start()] + asked + sentence[span.start() + len(answer):]
                said = " ".join(said.rstrip(".").split())
                found.append((f"{title}: {said}?" if title else f"{said}?", answer))
        if found:
            return title + end + rest, found
    return text, []


def read_training_set(path, documents, tokenizer, limit, rng):
    """(texts, {split: list of SetQuestion}) of a SET; documents: what a .jsonl file of it asks about."""
    own = lambda place: list_documents(place, lambda text: len(tokenizer.encode(text)), limit, print)
    if str(path).endswith(".jsonl"):
        found = own(documents)
        asked = [SetQuestion(q.text, tuple(q.documents), (q.answer,)) for q in read_questions(path, found)]
        return [document.spelled() for document in found], {"train": asked}
    if not Path(path).is_dir() or (Path(path) / "queries.jsonl").exists():
        return read_set(path)
    if (Path(path) / "corpus.jsonl").exists():
        texts = read_texts(path)
    else:
        texts = [document.spelled() for document in own(path)]
    texts, asked = zip(*(cloze(text, rng) for text in texts))
    return texts, {"train": [SetQuestion(question, (i,), (answer,)) for i, found in enumerate(asked)
                             for question, answer in found]}


class QuestionSet:
    """What training takes of a set: texts that may be shown, and questions by what they are about."""

    def __init__(self, path, tokenizer, limit, rng, documents=""):
        texts, questions = read_training_set(path, documents, tokenizer, limit, rng)
        self.texts, self.search = texts, bm25_search(texts)
        titles = [text.partition("\n")[0] for text in texts]
        tested = {titles[i] for split in ("test", "dev") for question in questions.get(split, ())
                  for i in question.gold}
        self.usable = {i for i, tokens in enumerate(tokenizer.encode_batch(texts))
                       if len(tokens) <= limit and titles[i] not in tested}
        self.about = {}  # gold documents -> (Questions that they answer, Questions that they do not)
        for question in questions.get("train", ()):
            answer = min(question.answers, key=len, default="")
            short = len(answer.split()) <= ANSWER_WORDS or len(tokenizer.encode(answer)) <= ANSWER_TOKENS
            if (answer and short
                    and self.usable.issuperset(question.gold) and len(question.gold) <= MOST_SHOWN):
                found = self.about.setdefault(question.gold, ([], []))
                found[0].append(Question(question.text, (question.gold,), answer))
        self.names = [(titles[gold[0]], name) for gold, (asked, _) in self.about.items()
                      for question in asked for name in NAME.findall(question.text) if name[0].isalpha()]
        for text, place in read_impossible(path).get("train", ()) if Path(path).is_dir() else ():
            if (place,) in self.about:
                self.about[place,][1].append(Question(text, (), NOT_FOUND))

    def misled(self, question, rng):
        """The question with another name or number in place of one of its own, which nothing that may be
        shown with it speaks of; [] where it has none."""
        spans, gold = [*NAME.finditer(question.text)], question.documents
        if not spans or len(gold) > 1:  # of two hops one may answer all the same
            return []
        span = spans[rng.integers(len(spans))]
        if span[0][0].isalpha():
            titles = {self.texts[i].partition("\n")[0] for i in gold}
            others = [name for title, name in rng.permutation(self.names).tolist() if title not in titles]
        else:
            others = ["".join(str(rng.integers(1, 10)) if c.isdigit() else c for c in span[0])]
        said = " ".join(self.texts[i] for i in gold)
        new = next((name for name in others if name not in said and name != span[0]), None)
        if new is None:
            return []
        return [Question(question.text[:span.start()] + new + question.text[span.end():], (), NOT_FOUND)]

    def pool(self, gold, allowed, config, rng):
        """(places of documents, Questions) of one pool about `gold`; allowed: places that may stand in it."""
        answered, impossible = ([found[i] for i in rng.permutation(len(found))] for found in self.about[gold])
        few = int(config.questions_per_pool * IMPOSSIBLE)
        for question in answered[:len(answered) // 3]:
            impossible += self.misled(question, rng) if len(impossible) < few else []
        chosen = impossible[:few] + answered[:config.questions_per_pool - len(impossible[:few])]
        found = [[place for place, _ in self.search(question.text, 4 * config.documents_per_pool)]
                 for question in chosen]
        alike = [place for places in zip(*found) for place in places if place in allowed]
        drawn = rng.choice(sorted(allowed), RANDOM_DOCUMENTS).tolist()
        places = list(dict.fromkeys([*gold, *drawn, *alike]))[:config.documents_per_pool]
        return rng.permutation(places).tolist(), chosen


def write_sets(config, folder):
    """Pools of sets of questions, which take turns; returns the tokenizer."""
    paths = [path for path in config.data.split(",") if path]
    tokenizer = make_encoding(config, (text for path in dict.fromkeys(paths) for text in read_texts(path)))
    rng = np.random.default_rng(config.seed)
    sets = {path: QuestionSet(path, tokenizer, config.max_document_tokens, rng, config.documents)
            for path in paths}
    held = {}
    for path, own in sets.items():  # the same documents of a set, whatever other sets there are
        draw = np.random.default_rng([config.seed, zlib.crc32(Path(path).name.encode())])
        held[path] = {i for i in sorted(own.usable) if draw.random() < HELD_OUT}
        if own.about and not any(held[path] & {*gold} for gold in own.about):  # of few documents
            held[path] |= {min(own.about)[0]}
    for split, pools in (("train", config.pools), ("validation", config.validation_pools)):
        trains, turns = split == "train", {}
        writer = PoolWriter(folder / split, tokenizer)
        for path, own in sets.items():
            groups = [gold for gold in own.about if held[path].isdisjoint(gold) == trains]
            if not groups:
                raise UserError(f"{path}: it has no question with a short answer for {split}")
            turns[path] = endless(groups, rng)
        for i in tqdm(range(pools), desc=f"{split} pools", unit="pool"):
            path = paths[i % len(paths)]
            own = sets[path]
            allowed = own.usable - held[path] if trains else own.usable
            places, chosen = own.pool(next(turns[path]), allowed, config, rng)
            at = {place: i for i, place in enumerate(places)}
            texts, asked = [own.texts[place] for place in places], [q.moved(at) for q in chosen]
            writer.add_pool(*writer.add(texts, asked))
        writer.close()
    return tokenizer


def endless(items, rng):
    """Yields the items in random order, again and again."""
    while True:
        yield from (items[i] for i in rng.permutation(len(items)))


MAKING = ".prepare-"  # how the names of folders begin in which data is made
CODERS = ("tokenizer.json", "tokenizer.tiktoken")  # of which an encoding writes one


@contextlib.contextmanager
def replacing(out):
    """A new folder in the folder `out`, whose entries take the place of those of their names in the end.

    Nothing of `out` goes before that, whether it is a link, a mount point or the working directory; what it
    held goes when all has come. Raises UserError where `out` holds what is not prepared data.
    """
    held = {path.name for path in out.iterdir()} - {"lost+found"} if out.exists() else set()
    ours = "about.json" in held or any(name.startswith(MAKING) for name in held)
    if held and not ours:
        raise UserError(f"{out}: exists and is not prepared data; give another --out")
    given, out = out, make_folder(out)
    new, old = (Path(tempfile.mkdtemp(prefix=MAKING, dir=out)) for _ in range(2))
    moved = []
    try:
        with naming(given):
            yield new
            names = [path.name for path in new.iterdir() if path.name != "about.json"]
            for name in ("about.json", *names, *CODERS):  # without about.json nobody reads the rest
                if (out / name).exists():
                    (out / name).rename(old / name)
                    moved.append((old / name, out / name))
            for name in (*names, "about.json"):
                (new / name).rename(out / name)
                moved.append((out / name, new / name))
            moved = []
            sync_folder(out)
            for folder in out.glob(f"{MAKING}*"):  # those of runs that were killed, too
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for source, target in reversed(moved):  # it has failed in the middle
            source.rename(target)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
        if not held:
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()


def script():
    config = command_line(DataConfig, __doc__, table="data")
    out = Path(config.out)
    with replacing(out) as building:
        write = write_sets if config.data else write_own if config.documents else write_synthetic
        tokenizer = write(config, building)
        tokenizer.save(building)
        about = {"vocab_size": tokenizer.vocab_size, "config": dataclasses.asdict(config)}
        write_json(building / "about.json", about)
    pools = Pools(out / "train", tokenizer.vocab_size)
    tokens = len(pools.documents.values)
    print(f"{out}: {len(pools):,} training pools, {len(pools.documents):,} documents of "
          f"{tokens / len(pools.documents):.0f} tokens on average, {len(pools.questions):,} questions; "
          f"vocabulary {tokenizer.vocab_size:,}")


if __name__ == "__main__":
    main(script)
