"""Pools: the training data of one step, on disk and as batches.

    pools = Pools("data/demo/train", tokenizer.vocab_size)    # what prepare_data.py wrote
    documents, numbers, batches = collate(pools[0], tokenizer, number_limit, rng)

A **pool** is the documents of one step and the questions about them. On disk it is rows of eight ragged
arrays, each a `.bin` of values and a `.offsets` of int64, written as they are made and memory-mapped. A
question becomes one-step samples (`collate`): question -> first hop; question, first hop -> second hop; all
-> answer. For a chat backbone (`collate_chat`) it is asked in a message that shows documents of its pool.
"""
import dataclasses
from array import array
from pathlib import Path

import numpy as np
import torch

from common import UserError, naming, read_json, sync_handle
from memory import BATCH_TOKENS, by_length, shared_length
from prompts import NOT_FOUND

MOST_SHOWN = 5       # documents in a chat backbone's message, 1 or more, gold ones aside
WITHOUT_GOLD = 0.15  # share of these messages that show none of the gold documents
CHAT_TOKENS = 32768  # of a batch of several pools' questions, padding included


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
            raise UserError(f"{error.filename}: no such file; run prepare_data.py again") from None
        if not len(self.offsets) or self.offsets[-1] * np.dtype(dtype).itemsize != size:
            raise UserError(f"{path}.bin: {size} bytes, not what its offsets say; run prepare_data.py again")
        self.values = np.zeros(0, dtype)
        if size:  # an empty file cannot be mapped
            with naming(f"{path}.bin"):
                self.values = np.memmap(f"{path}.bin", dtype, "r")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.values[self.offsets[i]:self.offsets[i + 1]]


TOKENS = "documents", "questions", "answers"
ARRAYS = (*TOKENS,
          "gold", "hop_ends", "pooled",         # of a question: documents; where in them hops end; 0 or 1
          "pool_documents", "pool_questions")


def array_types(vocab_size):
    """The type of each of ARRAYS: TOKENS are uint16 where the vocabulary allows, else uint32."""
    token = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    return {name: token if name in TOKENS else np.int64 for name in ARRAYS}


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
        """Raises UserError for missing or broken files; reading a pool, for ids outside the vocabulary.
        digest: of the training data, None where an older prepare_data.py wrote them."""
        self.folder, self.vocab_size = Path(folder), vocab_size
        about = read_prepared(self.folder.parent)
        self.digest = about["digest"]
        for name, dtype in array_types(about["vocab_size"]).items():
            setattr(self, name, Ragged(self.folder / name, dtype))
        if not len(self):
            raise UserError(f"{self.folder}: holds no pools; run prepare_data.py again")

    def __len__(self):
        return len(self.pool_documents)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)  # it ends loops
        try:
            ids = self.pool_documents[i].tolist()
            place = {document: at for at, document in enumerate(ids)}
            documents, questions = [self.documents[d] for d in ids], []
            for q in self.pool_questions[i].tolist():
                hops = np.split(self.gold[q], self.hop_ends[q][:-1])
                gold = [[place[document] for document in hop.tolist()] for hop in hops if len(hop)]
                questions.append((self.questions[q], self.answers[q], gold, bool(self.pooled[q][0])))
        except (KeyError, IndexError, ValueError):
            raise UserError(f"{self.folder}: pool {i} is damaged; run prepare_data.py again") from None
        rows = [*documents, *(row for question in questions for row in question[:2])]
        largest = max(int(row.max(initial=0)) for row in rows)
        if largest >= self.vocab_size:
            raise UserError(f"{self.folder}: pool {i} holds token id {largest}, but the model's vocabulary "
                            f"ends at {self.vocab_size - 1}; set vocab_size in [model] to the tokenizer's")
        return documents, questions


def read_prepared(folder):
    """The description of prepared data. Raises UserError when there is none."""
    path = Path(folder) / "about.json"
    if not path.exists():
        raise UserError(f"{folder}: no prepared data here; run python prepare_data.py with the same "
                        "configuration")
    try:
        about = read_json(path, "an object")
        return {"vocab_size": int(about["vocab_size"]), "config": dict(about["config"]),
                "digest": about.get("digest"), "own": about.get("own")}
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{path}: malformed; run python prepare_data.py again") from None


def check_prepared(config):
    """Raises UserError unless the data in `config.out` were prepared with this prepare_data.DataConfig."""
    asked, held = dataclasses.asdict(config), read_prepared(config.out)["config"]
    for name in [*asked, *held]:
        if name != "out" and held.get(name) != asked.get(name):  # a folder may have moved
            raise UserError(f"{config.out}: prepared with {name} = {held.get(name)!r}, but this run says "
                            f"{asked.get(name)!r}; run prepare_data.py with the same configuration")


# ------------------------------------------------------------------------------------------------------------
# Batches

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


def collate(pool, tokenizer, number_limit, rng, batch_tokens=BATCH_TOKENS):
    """One pool as the arguments of `MSA.forward`: documents, and batches of one-step samples (section 3.4).

    A hop is one sample, which names its documents in the order of their numbers, and then stops. A question
    that is answered from the pooled memory is one sample, and one time in four another with its document
    appended: reading the text is easier, but must not be forgotten. Documents get random numbers, increasing
    with their place: the order of a pool is random already.
    Returns (documents, numbers, batches): int64 arrays spelled `[n]. text[n]` (FSDP would move tensors to the
    GPU one by one), their numbers, and dicts of
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
    return [np.array(tokenizer.document(n, text)) for n, text in zip(numbers, texts)], numbers, batches


def in_batches(samples, length, batch_tokens):
    """Samples as the batches of `by_length`, where length(sample) is theirs, each the longest first."""
    return [[samples[i] for i in reversed(batch)]
            for batch in by_length([*map(length, samples)], batch_tokens)]


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


def collate_chat(pools, tokenizer, number_limit, rng):
    """`collate` for a chat backbone, which answers from the texts in its message: nothing is routed.

    One message a pool: some of its documents in random order, among them those of one of its questions, or
    none of those; then each of its questions. One whose documents are shown is answered, one of which none is
    shown and whose answer stands nowhere is told NOT_FOUND, others are left out. An answer of as many
    lines as it has gold documents, two or more, has one for each: those of the shown ones are said, in the
    order in which they are shown, and some of these documents may not be shown.

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
    lines = lambda text: [line for line in text.split("\n") if line.strip()]
    asked = [(tokenizer.decode(question.tolist()), lines(tokenizer.decode(answer.tolist())),
              [document for hop in gold for document in hop]) for question, answer, gold, _ in questions]
    leaders = [(gold, len(gold) == len(parts) > 1) for _, parts, gold in asked if gold]
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
        for question, parts, needed in asked:
            answer = ", ".join(parts)
            if len(needed) == len(parts) > 1:
                of = dict(zip(needed, parts))
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
        shared = min(most, shared_length(rows))
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
