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
folder of your own documents. Documents about which a test is asked stay out; where a SET has no questions
they are made of its texts (training_sets.py).
"""
import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
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
    sync_folder,
    write_json,
)
from documents import list_documents, read_documents
from pools import Pools, PoolWriter, read_prepared
from question_sets import is_questions, read_texts
from tasks import Words, make_pool
from tokenizer import named_encoding, train_encoding
from training_sets import QuestionSet, hold_out, is_texts, training_questions


@dataclass
class DataConfig:
    out: str = "data/demo"          # folder to write
    seed: int = 1337                # same seed, same bytes
    pools: int = 2000               # training pools; an optimizer step reads train.py's `accumulate` per rank
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
    documents: str = ""             # your own documents: a folder of text, or a file
    questions: str = ""             # a .jsonl file: your own questions about them
    data: str = ""                  # sets of questions, commas between; one that is named twice counts twice
    max_document_tokens: int = 512  # longer files are split at paragraphs, longer documents of a SET left out
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
            if self.encoding == "train" and own_folders(self):
                raise UserError("data has questions or documents of your own, which are for a chat backbone; "
                                "give its checkpoint, such as --encoding checkpoints/smollm2")
        elif bool(self.documents) != bool(self.questions):
            raise UserError("documents and questions go together: a folder, and a .jsonl file about it")


# ------------------------------------------------------------------------------------------------------------
# The kinds of data

def own_pool(documents, questions, config, rng):
    """Document indices and question indices of one pool: random questions, their documents, random others."""
    asked = rng.choice(len(questions), min(config.questions_per_pool, len(questions)), replace=False).tolist()
    gold = list(dict.fromkeys(i for q in asked for i in questions[q].documents))
    drawn = rng.permutation(len(documents)).tolist()[:config.documents_per_pool + len(gold)]
    others = [i for i in drawn if i not in set(gold)]
    pool = gold + others[:max(0, config.documents_per_pool - len(gold))]
    return rng.permutation(pool).tolist(), asked


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


def own_folders(config):
    """The folders and files of one's own documents that a DataConfig names, as they are here and now. A model
    that train.py makes of some keeps max_document_tokens, so that sample.py and eval.py split alike."""
    texts = [path for path in config.data.split(",") if path and is_texts(path)]
    return [config.documents, *texts] if config.documents else texts


def write_sets(config, folder):
    """Pools of sets of questions, which take turns; returns the tokenizer."""
    paths = [path for path in config.data.split(",") if path]
    tokenizer = make_encoding(config, (text for path in dict.fromkeys(paths)
                                      for text in read_texts(path, lambda _: None)))
    rng = np.random.default_rng(config.seed)
    sets = {path: QuestionSet(path, tokenizer, config.max_document_tokens, rng, config.documents)
            for path in paths}
    mute = [path for path in sets if is_texts(path) and not sets[path].about]
    if mute:
        told = f"{', '.join(mute)}: no sentence makes a question: none has a name or number that stands twice"
        if len(mute) == len(sets):
            raise UserError(f"{told}; give questions, --data FILE.jsonl --documents FOLDER")
        print(f"{told}; left out")
        paths = [path for path in paths if path not in mute]
        sets = {path: sets[path] for path in paths}
    folder_of = {path: Path(config.documents if is_questions(path) else path).resolve() for path in paths}
    held = hold_out(sets, folder_of, config.seed)
    for split, pools in (("train", config.pools), ("validation", config.validation_pools)):
        trains, turns = split == "train", {}
        writer = PoolWriter(folder / split, tokenizer)
        for path, own in sets.items():
            groups = [gold for gold in own.about if held[folder_of[path]].isdisjoint(gold) == trains]
            if not groups:
                which = "it has none with a short answer, or no split train"
                if own.about:
                    which = "validation needs one about another document: add documents"
                    if is_texts(path) or is_questions(path):
                        which += ", or lower max_document_tokens, so that long ones are split"
                raise UserError(f"{path}: no question is left for {split}; {which}")
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
    handle = hold(out)
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
        if handle is not None:
            os.close(handle)
        if not held:
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()


def hold(out):
    """A handle that holds the folder `out` while it is open: two that prepare it would delete each other's
    work. None where there are no such locks. Raises UserError where another process holds it."""
    try:
        import fcntl  # not on Windows
        handle = os.open(out, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except BlockingIOError:
        raise UserError(f"{out}: another process is preparing data there; wait until it is done, or give "
                        "another --out") from None
    except (ImportError, OSError):
        return None


def folder_digest(folder):
    """16 hexadecimal digits of a split's files: texts may change, and the configuration be the same."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def script():
    config = command_line(DataConfig, __doc__, table="data")
    out = Path(config.out)
    for folder in own_folders(config):
        of = "--documents" if folder == config.documents else "--data"
        check_outside("--out", out, folder, of)
        check_outside("--questions", config.questions, folder, of)
        for path in filter(is_questions, config.data.split(",")):
            check_outside("--data", path, folder, of)
    with replacing(out) as building:
        if config.data:
            tokenizer = write_sets(config, building)
        else:
            tokenizer = (write_own if config.documents else write_synthetic)(config, building)
        tokenizer.save(building)
        about = {"vocab_size": tokenizer.vocab_size, "config": dataclasses.asdict(config),
                 "digest": folder_digest(building / "train"), "own": bool(own_folders(config))}
        write_json(building / "about.json", about)
    pools = Pools(out / "train", tokenizer.vocab_size)
    tokens = len(pools.documents.values)
    print(f"{out}: {len(pools):,} training pools, {len(pools.documents):,} documents of "
          f"{tokens / len(pools.documents):.0f} tokens on average, {len(pools.questions):,} questions; "
          f"vocabulary {tokenizer.vocab_size:,}")


if __name__ == "__main__":
    main(script)
