"""Documents, questions and training files.

    python prepare_data.py config/demo.toml                               # the [data] table of a run
    python prepare_data.py --documents FOLDER --questions FILE.jsonl --out data/mine
    python prepare_data.py --data SET,SET --encoding CHECKPOINT --out data/sets

Without documents of your own the data are the synthetic tasks of tasks.py: needles, chains and colours.

Training data is a sequence of **pools**: the documents of one step and the questions about them (pools.py).

Your own questions are lines {"question": ..., "answer": ..., "documents": ["a.txt", ["b.txt", "c.txt:12"]]}:
files of the folder in the order of the hops, with a line where a long file was split. A list in the list is
one hop of several documents: one round names them all. With "pooled": true the answer is learned from the
pooled memory of the one document, without its text.

SET is a folder in BEIR's layout or SQuAD's .json file (question_sets.py), of which the questions for training
are taken; for a chat backbone it may also be a FILE.jsonl of your own questions about --documents, or a
folder of your own documents. A pool is a passage, some questions about it, and passages that BM25 finds for
them in its place; questions that a passage does not answer (of impossible.jsonl, or SQuAD's own), and ones in
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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoint import find_base
from common import (
    UserError,
    check_least,
    check_outside,
    command_line,
    main,
    make_folder,
    naming,
    read_rows,
    sync_folder,
    write_json,
)
from documents import list_documents, read_documents
from pools import MOST_SHOWN, Pools, PoolWriter, read_prepared
from prompts import NOT_FOUND
from question_sets import (
    SetQuestion,
    bm25_search,
    is_questions,
    pieces_of,
    place_of,
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
    alike: float = 0.0              # share of the keys with a common word that begin or end alike: tell, bell
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
        check_least(self, pools=1, validation_pools=1, hops=1, max_document_tokens=1, documents_per_pool=1,
                    questions_per_pool=1, needles=0, chains=0, noise=0, properties=0, filler=0, seed=0)
        if not self.out:
            raise UserError("--out is empty; name a folder for the data")
        if not 0 <= self.alike <= 1:
            raise UserError(f"alike is {self.alike}; it must be between 0 and 1")
        if self.needles + self.chains + self.properties == 0:
            raise UserError("needles, chains and properties are all 0; a pool needs something to ask about")
        if self.vocab_size >= 1 << 31:
            raise UserError(f"vocab_size is {self.vocab_size}; it must be below {1 << 31:,}")
        if self.data and not self.data.strip(","):
            raise UserError(f"data is {self.data!r}; name a set")
        if self.data:
            own = any(map(is_questions, self.data.split(",")))
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

def training_questions(path, documents):
    """The Questions of a .jsonl file about `documents`, each with one answer and its hops in order. Raises
    UserError that names the line."""
    pieces, questions = pieces_of(documents), {}
    wanted = 'an object with "question", "answer" (text) and "documents" (a list)'
    for number, row in read_rows(path, wanted):
        try:
            text, answer, names = row["question"], row["answer"], row["documents"]
            pooled = row.get("pooled", False)
            if not (isinstance(text, str) and isinstance(answer, str) and isinstance(names, list)
                    and text.strip() and answer.strip()):
                raise TypeError
            hops = [hop if isinstance(hop, list) else [hop] for hop in names]
            gold = tuple(tuple(place_of(str(name), pieces, documents, answer) for name in hop)
                         for hop in hops)
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
    documents = list_documents(config.documents, tokenizer.count, limit, print)
    questions = training_questions(config.questions, documents)
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
UPPER, LOWER = "A-ZÀ-ÖØ-ÞΑ-ΩЀ-Я", "a-zß-öø-ÿα-ωа-џ"  # letters
# Names, aside from a first word's capital, and numbers of two digits or more
NAME = re.compile(rf"(?<=[{LOWER},] )[{UPPER}][\w'’-]+(?: [{UPPER}][\w'’-]+)*|\b\d[\d,.]*\d\b")
ANSWER_WORDS = 4        # but so many words are one, however many tokens they have: a uuid has 36
IMPOSSIBLE = 0.34       # share of a pool's questions, at most, that their passage does not answer
RANDOM_DOCUMENTS = 1    # of a pool; the others are its passage and what is like it
HELD_OUT = 0.05         # share of the documents about which validation asks


def cloze(text, rng):
    """A text without one of its sentences, and pairs (question, answer) that this sentence makes: names and
    numbers in it that the others have, too, are asked for (arXiv 1804.00720). Without any: (text, [])."""
    title, end, body = text.partition("\n") if "\n" in text else ("", "", text)
    spaces = re.finditer(rf"(?<=[.!?])\s+(?=[{UPPER}])|\n\s*\n", body)
    starts = [0, *(space.end() for space in spaces), len(body)]
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


def is_texts(path):
    """Whether what `data` names is a folder of texts, not a set."""
    return Path(path).is_dir() and not (Path(path) / "corpus.jsonl").exists()


def own_folders(config):
    """Of a DataConfig the folders and files of one's own documents, which sample.py cuts as they are cut."""
    texts = [path for path in config.data.split(",") if path and is_texts(path)]
    return [config.documents, *texts] if config.documents else texts


def read_training_set(path, documents, tokenizer, limit, rng):
    """`read_set` of a SET that is one, is made of texts, or asks, as a .jsonl file, about `documents`."""
    own = lambda place: list_documents(place, tokenizer.count, limit, print)
    if is_questions(path):
        found = own(documents)
        asked = [SetQuestion(question.text, tuple(question.documents), (question.answer,))
                 for question in training_questions(path, found)]
        return [document.spelled() for document in found], {"train": asked}, {}
    if not Path(path).is_dir() or (Path(path) / "queries.jsonl").exists():
        return read_set(path)
    texts = [document.spelled() for document in own(path)] if is_texts(path) else read_texts(path)
    texts, asked = zip(*(cloze(text, rng) for text in texts))
    return texts, {"train": [SetQuestion(question, (i,), (answer,)) for i, found in enumerate(asked)
                             for question, answer in found]}, {}


class QuestionSet:
    """What training takes of a set: texts that may be shown, and questions by what they are about."""

    def __init__(self, path, tokenizer, limit, rng, documents=""):
        texts, questions, none = read_training_set(path, documents, tokenizer, limit, rng)
        self.texts, self.search = texts, bm25_search(texts)
        titles = [text.partition("\n")[0] for text in texts]
        tested = {titles[i] for split in ("test", "dev") for question in questions.get(split, ())
                  for i in question.gold}
        self.usable = {i for i, tokens in enumerate(tokenizer.encode_batch(texts))
                       if len(tokens) <= limit and titles[i] not in tested}
        self.about = {}  # gold documents -> (Questions that they answer, Questions that they do not)
        left_out = Counter()
        for question in questions.get("train", ()):
            answer = min(question.answers, key=len, default="")
            if not answer:
                left_out["without an answer"] += 1
            elif len(answer.split()) > ANSWER_WORDS and tokenizer.count(answer) > ANSWER_TOKENS:
                left_out[f"with an answer of more than {ANSWER_TOKENS} tokens"] += 1
            elif len(question.gold) > MOST_SHOWN:
                left_out[f"about more than {MOST_SHOWN} documents"] += 1
            elif not self.usable.issuperset(question.gold):
                left_out[f"about a document of more than {limit} tokens, or one that is tested"] += 1
            else:
                found = self.about.setdefault(question.gold, ([], []))
                found[0].append(Question(question.text, (question.gold,), answer))
        tell_odd(f"{path}: questions left out", left_out, print)
        self.names = [(titles[gold[0]], name) for gold, (asked, _) in self.about.items()
                      for question in asked for name in NAME.findall(question.text) if name[0].isalpha()]
        for text, place in none.get("train", ()):
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
            drawn = (self.names[i] for i in rng.permutation(len(self.names)))
            others = (name for title, name in drawn if title not in titles)
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
        places = list(dict.fromkeys([*gold, *drawn, *alike]))[:max(config.documents_per_pool, len(gold))]
        return rng.permutation(places).tolist(), chosen


def write_sets(config, folder):
    """Pools of sets of questions, which take turns; returns the tokenizer."""
    paths = [path for path in config.data.split(",") if path]
    tokenizer = make_encoding(config, (text for path in dict.fromkeys(paths) for text in read_texts(path)))
    rng = np.random.default_rng(config.seed)
    sets = {path: QuestionSet(path, tokenizer, config.max_document_tokens, rng, config.documents)
            for path in paths}
    folder_of = {path: Path(config.documents if is_questions(path) else path).resolve() for path in paths}
    held = hold_out(sets, folder_of, config.seed)
    for split, pools in (("train", config.pools), ("validation", config.validation_pools)):
        trains, turns = split == "train", {}
        writer = PoolWriter(folder / split, tokenizer)
        for path, own in sets.items():
            groups = [gold for gold in own.about if held[folder_of[path]].isdisjoint(gold) == trains]
            if not groups:
                which = ("; all that it has are about documents of the other part" if own.about
                         else ", or no split train")
                raise UserError(f"{path}: it has no question with a short answer for {split}{which}")
            turns[path] = endless(groups, rng)
        for i in tqdm(range(pools), desc=f"{split} pools", unit="pool"):
            path = paths[i % len(paths)]
            own = sets[path]
            allowed = own.usable - held[folder_of[path]] if trains else own.usable
            places, chosen = own.pool(next(turns[path]), allowed, config, rng)
            at = {place: i for i, place in enumerate(places)}
            texts, asked = [own.texts[place] for place in places], [q.moved(at) for q in chosen]
            writer.add_pool(*writer.add(texts, asked))
        writer.close()
    return tokenizer


def hold_out(sets, folder_of, seed):
    """The documents that validation asks about: {folder: places}; those of a folder are the same whatever
    other sets there are, and for all sets that are about it. sets: QuestionSets by path; folder_of: path ->
    the folder or file of its documents."""
    held = {folder: set() for folder in folder_of.values()}
    for path, own in sets.items():
        draw = np.random.default_rng([seed, zlib.crc32(folder_of[path].name.encode())])
        held[folder_of[path]] |= {i for i in sorted(own.usable) if draw.random() < HELD_OUT}
    for path, own in sets.items():
        places = held[folder_of[path]]
        if own.about and not any(places & {*gold} for gold in own.about):  # of few documents
            beside = [other.about for at, other in sets.items() if folder_of[at] == folder_of[path]]
            leaves = lambda place: all(any((places | {place}).isdisjoint(gold) for gold in about)
                                       for about in beside)  # every set something to train on
            firsts = sorted({gold[0] for gold in own.about})
            places.add(next(filter(leaves, firsts), firsts[0]))
    return held


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
    ours = any(name.startswith(MAKING) for name in held)
    if "about.json" in held:
        with contextlib.suppress(UserError):  # it may be anybody's
            ours = bool(read_prepared(out))
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
    for folder in own_folders(config):
        check_outside("--out", out, folder, "--documents" if folder == config.documents else "--data")
    with replacing(out) as building:
        if config.data:
            tokenizer = write_sets(config, building)
        else:
            tokenizer = (write_own if config.documents else write_synthetic)(config, building)
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
