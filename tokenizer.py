"""Text <-> tokens, and the spelling of everything the model reads and writes.

An encoding is a `tiktoken.Encoding`, trained on a corpus or named, or a Hugging Face model's `HubEncoding`.
A user's text is never parsed for special tokens: a document that contains "<|end|>" is just text.

Spelling. A document's number is part of it for good, and stands before and after its text:

    document     [7]. One of the special magic numbers for gentle-otter is: 4729103.[7]
    question     <|question|>What is the special magic number for gentle-otter?\\n         these tokens route
    appended     [7]. One of the special magic numbers for gentle-otter is: 4729103.\\n    these too
    a round      <|retrieve|>[7][12]<|stop|>                     the model names documents, then stops, or
                 <|retrieve|><|end_of_retrieval|>4729103<|end|>  it ends the retrieval and answers

With number tokens `[7]` is always five tokens, one for each place in base 256 with the lowest place first:
[ <|0:7|> <|1:0|> <|2:0|> ]. A token then says which place it fills, so that the mean over the five loses
nothing (from digits it loses their order), and the first one written tells almost all documents apart.
Numbers are below 256^3 = 16,777,216.
"""
import base64
import contextlib
import hashlib
import json
import re
import secrets
from itertools import pairwise
from pathlib import Path

import tiktoken
import tokenizers

from common import UserError, atomic_file, check_download, parts_of, read_text, write_json

SPECIAL_TOKENS = ("<|question|>", "<|retrieve|>", "<|stop|>", "<|end_of_retrieval|>", "<|end|>")

NUMBER_BASE, NUMBER_PLACES = 256, 3

# GPT-4's split pattern, but with at most two digits to a token: a small vocabulary then holds all of them, so
# that a number of n digits is ceil(n / 2) tokens. Brackets stand alone: "[7]" is spelled alike everywhere.
PATTERN = (r"[\[\]]|'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}\[\]]?+\p{L}+|\p{N}{1,2}"
           r"| ?[^\s\p{L}\p{N}\[\]]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")

LONG_SPACE = 500_000  # characters of white space in a row; at a million tiktoken's stack overflows


class HubEncoding:
    """A Hugging Face tokenizer.json of any kind, with the calls of a tiktoken.Encoding.

    data: the file's bytes. ids: name -> id of its tokens. own: of our special tokens, which stand behind.
    n_vocab: the largest id + 1; ids may have gaps.
    """

    def __init__(self, path):
        """Raises UserError for a file that is missing, or that the tokenizers library refuses."""
        self.path = Path(path)
        self.name = self.path.absolute().parent.name
        self.own = {}
        with self.refusing("malformed tokenizer.json"):
            self.data, text = self.path.read_bytes(), read_text(self.path)
            check_download(self.data[:99], self.path, page=True)
            self.library = library = tokenizers.Tokenizer.from_str(text)
            self.ids = library.get_vocab(with_added_tokens=True)
            self.names = {i: name for name, i in self.ids.items()}
            self.n_vocab = max(self.names) + 1
            if len(self.names) < len(self.ids):
                raise ValueError("two tokens have the same id")
            library.encode_special_tokens = True  # in a text they are text
            library.no_truncation()
            library.no_padding()
            if hasattr(library.model, "dropout"):
                library.model.dropout = None  # a text is the same tokens every time
            # Some vocabularies spell special tokens as words. A text may become none but the unknown one.
            special = [token for token in library.get_added_tokens_decoder().values() if token.special]
            model = json.loads(text)["model"]
            unknown = {model.get("unk_id"), self.ids.get(model.get("unk_token"))}
            self.reserved = {self.ids[token.content] for token in special} - unknown
            # Special tokens of a template are parsed by other names, which no text can know.
            self.secret = secrets.token_hex(16)
            names = sorted((token.content for token in special), key=len, reverse=True)
            self.pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
            library.add_tokens([
                tokenizers.AddedToken(self.secret + token.content, lstrip=token.lstrip, rstrip=token.rstrip,
                                      single_word=token.single_word, normalized=False) for token in special])
            self.parsed = {library.token_to_id(self.secret + name): self.ids[name] for name in names}

    @contextlib.contextmanager
    def refusing(self, problem):
        """Whatever the library raises becomes a UserError that names the file. A panic is no Exception."""
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; give a tokenizer.json") from None
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{self.path}: {problem}: {' '.join(str(error).split())}") from None

    def add(self, own):
        """Add special tokens, name -> id, behind the file's."""
        self.own = own
        self.names |= {i: name for name, i in own.items()}
        self.n_vocab = max(self.names) + 1

    def encode_ordinary(self, text):
        """The ids of a text, in which special tokens are text."""
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        """`encode_ordinary` for many texts, in several threads."""
        texts = [without_surrogates(text) for text in texts]
        with self.refusing("it cannot encode this text"):
            rows = [found.ids for found in self.library.encode_batch_fast(texts, add_special_tokens=False)]
            return [row if self.reserved.isdisjoint(row) else self.spell(text)
                    for row, text in zip(rows, texts)]

    def spell(self, text):
        """The ids of a text; what would be a special token is encoded letter by letter."""
        found = self.library.encode(text, add_special_tokens=False)
        ids, last = [], 0
        for i, (start, end) in zip(found.ids, found.offsets):
            if i in self.reserved and end > start:
                letters = self.library.encode_batch([*text[start:end]], add_special_tokens=False)
                ids += self.encode_ordinary(text[last:start]) + [i for letter in letters for i in letter.ids]
                last = end
        return ids + self.encode_ordinary(text[last:]) if last else found.ids

    def encode_template(self, head, text="", tail=""):
        """The ids of a template's head, a text, and the template's tail. Its special tokens are parsed."""
        marked = [self.pattern.sub(self.secret + r"\g<0>", part) for part in (head, tail)]
        with self.refusing("it cannot encode this text"):
            found = self.library.encode(without_surrogates(text).join(marked), add_special_tokens=False)
        if text and not self.reserved.isdisjoint(found.ids):
            return [*self.encode_template(head), *self.encode_ordinary(text), *self.encode_template(tail)]
        return [self.parsed[i] if self.secret in token else i for i, token in zip(found.ids, found.tokens)]

    def start(self):
        """The ids that the file's post-processor puts before a text: a BOS, or none."""
        found = self.library.encode("a", add_special_tokens=True)
        return found.ids[:[*found.special_tokens_mask, 0].index(0)]

    def decode(self, tokens):
        """Ids to text, special tokens too; incomplete bytes are U+FFFD. Raises KeyError for unknown ids."""
        names = [self.names[i] for i in tokens]
        with self.refusing("it cannot decode"):
            return self.library.decoder.decode(names) if self.library.decoder else " ".join(names)


def without_surrogates(text):
    """What UTF-8 cannot hold becomes U+FFFD, as tiktoken does it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """An encoding and how things are spelled in it; what is spelled is a plain list of token ids.

    head: what stands before a question and does not route.
    """

    head = ()

    def __init__(self, encoding):
        """`encoding`: a tiktoken.Encoding or a HubEncoding that has SPECIAL_TOKENS. Raises UserError."""
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.special_tokens = encoding.own if isinstance(encoding, HubEncoding) else encoding._special_tokens
        missing = [token for token in SPECIAL_TOKENS if token not in self.special_tokens]
        if missing:
            raise UserError(f"encoding {encoding.name}: it lacks the special tokens {', '.join(missing)}")
        self.question_start, self.retrieve, self.stop, self.end_of_retrieval, self.end = (
            self.special_tokens[token] for token in SPECIAL_TOKENS)
        self.ends = {self.end}
        self.first_number = self.special_tokens.get("<|0:0|>")  # None: numbers are spelled in digits
        brackets = [*self.encode("["), *self.encode("]")]
        if len(brackets) != 2:
            raise UserError(f"encoding {encoding.name}: '[' and ']' must be one token each, to spell numbers")
        self.open_bracket, self.close_bracket = brackets

    def encode(self, text):
        """Ordinary text to ids; special tokens in it are not parsed."""
        if len(text) < LONG_SPACE:
            return self.encoding.encode_ordinary(text)
        cuts = [cut for run in re.finditer(rf"(?<!\s)\s{{{LONG_SPACE},}}", text)
                for cut in range(run.start(), run.end(), LONG_SPACE)]
        return [token for start, end in pairwise([0, *cuts, len(text)])
                for token in self.encoding.encode_ordinary(text[start:end])]

    def encode_batch(self, texts):
        """`encode` for many texts at once (several threads)."""
        if max(map(len, texts), default=0) >= LONG_SPACE:
            return [self.encode(text) for text in texts]
        return [ids for part in parts_of(texts, 1000, "tokenizing", "text")
                for ids in self.encoding.encode_ordinary_batch(part)]

    def count(self, text):
        """How many tokens a text has."""
        return len(self.encode(text))

    def decode(self, tokens):
        """Ids to text; bytes that are not UTF-8 become U+FFFD. Raises UserError for an unknown id."""
        try:
            return self.encoding.decode(tokens)
        except (KeyError, OverflowError) as error:  # "Invalid token for decoding: 533"
            found = str(error).strip("'").split()[-1]
            message = f"token id {found} is not in the vocabulary of {self.vocab_size} tokens"
            raise UserError(message) from None

    def check_number_chunk(self, number_chunk):
        """Raises UserError unless the model's `number_chunk` is 0 or the length of every spelled number."""
        if number_chunk not in (0, self.number_length):
            allowed = "0, since it spells numbers in digits (number_tokens)"
            if self.number_length:
                allowed = f"0 or {self.number_length}"
            raise UserError(f"model.number_chunk is {number_chunk}; with this tokenizer it must be {allowed}")

    @property
    def number_length(self):
        """How many tokens every `[n]` has: known only with number tokens, else 0."""
        return 0 if self.first_number is None else NUMBER_PLACES + 2

    def number(self, number):
        """`[n]`, as the model writes it to name a document. Raises UserError where number tokens end."""
        if self.first_number is None:
            return [self.open_bracket, *self.encode(str(number)), self.close_bracket]
        limit = NUMBER_BASE ** NUMBER_PLACES
        if number >= limit:
            raise UserError(f"document number {number}: this tokenizer spells numbers below {limit:,}")
        digits = [number // NUMBER_BASE ** place % NUMBER_BASE for place in range(NUMBER_PLACES)]
        places = [self.first_number + place * NUMBER_BASE + digit for place, digit in enumerate(digits)]
        return [self.open_bracket, *places, self.close_bracket]

    def document(self, number, text):
        """`[n]. text[n]`; `text` is a list of ids."""
        return [*self.number(number), *self.encode(". "), *text, *self.number(number)]

    def appended(self, number, text):
        """`[n]. text\\n`: a document that the system appends to the question; `text` is a list of ids."""
        return [*self.number(number), *self.encode(". "), *text, *self.encode("\n")]

    def question(self, text):
        """A question before the first round: all of these tokens route. `text` is a list of ids."""
        return [self.question_start, *text, *self.encode("\n")]

    def routed(self, text):
        """(ids, which of them route) of a question as it is routed in a first round."""
        ids = self.question(self.encode(text))
        return ids, [True] * len(ids)

    def base(self):
        """What spells a text, as (a pattern, a file's bytes): all but the special tokens."""
        if isinstance(self.encoding, HubEncoding):
            return "", self.encoding.data
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda pair: pair[1])
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks]  # tiktoken's format
        return self.encoding._pat_str, b"".join(lines)

    def fingerprint(self):
        """16 hexadecimal digits that differ for tokenizers that spell a text differently."""
        pattern, data = self.base()
        special = json.dumps([pattern, sorted(self.special_tokens.items())])
        return hashlib.blake2b(data + special.encode(), digest_size=8).hexdigest()

    def extends(self, other):
        """Whether all tokens of another Tokenizer have the same ids here: its model can go on with this."""
        own, others = self.base(), other.base()
        if isinstance(self.encoding, HubEncoding) and isinstance(other.encoding, HubEncoding):
            own, others = json.loads(own[1]), json.loads(others[1])  # whatever spaces a file has
        return own == others and other.special_tokens.items() <= self.special_tokens.items()

    def save(self, folder):
        """Write tokenizer_msa.json, and tokenizer.tiktoken (mergeable ranks) or tokenizer.json unchanged."""
        about = {"name": self.encoding.name, "pattern": self.base()[0], "ranks": "tokenizer.tiktoken"}
        if isinstance(self.encoding, HubEncoding):
            about |= {"ranks": "tokenizer.json", "fingerprint": self.fingerprint()}
        else:
            about["tokens"] = len(self.encoding._mergeable_ranks) + len(self.special_tokens)
        with atomic_file(Path(folder) / about["ranks"], "wb") as file:
            file.write(self.base()[1])
        for name in {"tokenizer.tiktoken", "tokenizer.json"} - {about["ranks"]}:  # an earlier tokenizer's
            (Path(folder) / name).unlink(missing_ok=True)
        write_json(Path(folder) / "tokenizer_msa.json", about | {"special_tokens": self.special_tokens})

    @staticmethod
    def load(folder):
        """Read what `save` wrote. Raises UserError when a file is missing or malformed."""
        folder = Path(folder)
        try:
            about = json.loads(read_text(folder / "tokenizer_msa.json"))
            special = about["special_tokens"]
            if about.get("ranks") == "tokenizer.json":
                encoding = HubEncoding(folder / "tokenizer.json")
                encoding.add({name: i for name, i in special.items() if i >= encoding.n_vocab})
                tokenizer = Tokenizer(encoding)
                if about.get("fingerprint") != tokenizer.fingerprint():
                    raise ValueError("its tokenizer.json is not the one that was saved")
                return tokenizer
            lines = read_text(folder / "tokenizer.tiktoken").split("\n")
            pairs = (line.split() for line in lines if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            ids = {*ranks.values(), *special.values()}
            if len(ids) != about["tokens"] or len(ids) != len(ranks) + len(special) or min(ids) < 0:
                raise ValueError(f"{len(ids)} different ids, but {about['tokens']} tokens were saved")
            return Tokenizer(tiktoken.Encoding(about["name"], pat_str=about["pattern"], mergeable_ranks=ranks,
                                               special_tokens=special))
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no tokenizer here; "
                            "give a folder that train.py or prepare_data.py wrote") from None
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise UserError(f"{folder}: malformed tokenizer files: {error}") from None


def special_tokens(first, number_tokens):
    """Our special tokens, name -> id, from `first` on: SPECIAL_TOKENS, and number tokens where wanted."""
    names = [*SPECIAL_TOKENS]
    if number_tokens:
        names += [f"<|{place}:{digit}|>" for place in range(NUMBER_PLACES) for digit in range(NUMBER_BASE)]
    return {name: first + i for i, name in enumerate(names)}


def train_encoding(texts, vocab_size, number_tokens=False):
    """Train a byte-level BPE of `vocab_size` tokens (special tokens included) on an iterator of texts."""
    try:
        import rustbpe
    except ImportError:
        raise UserError("training a tokenizer needs rustbpe: pip install -e '.[data]'") from None
    own = len(special_tokens(0, number_tokens))
    if vocab_size < 256 + own:
        raise UserError(f"vocab_size is {vocab_size}; "
                        f"256 bytes and {own} special tokens need at least {256 + own}")
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(texts), vocab_size - own, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return Tokenizer(tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks,
                                       special_tokens=special_tokens(len(ranks), number_tokens)))


def named_encoding(name, number_tokens=False):
    """The Tokenizer that `--encoding` names. Raises UserError.

    The folder of a checkpoint of ours: its tokenizer as it is. A folder with a tokenizer.json, or a name that
    tiktoken knows, such as "gpt2" (a download once): that, with our special tokens behind its own.
    """
    folder = Path(name)
    if (folder / "tokenizer_msa.json").exists():
        tokenizer = Tokenizer.load(folder)
        if number_tokens != (tokenizer.first_number is not None):
            raise UserError(f"number_tokens is {number_tokens}, but the tokenizer of {name} was made with "
                            f"{not number_tokens}; set it so")
        return tokenizer
    if (folder / "tokenizer.json").exists():
        encoding = HubEncoding(folder / "tokenizer.json")
        encoding.add(special_tokens(encoding.n_vocab, number_tokens))
        return Tokenizer(encoding)
    try:
        base = tiktoken.get_encoding(name)
    except ValueError:
        raise UserError(f"encoding '{name}' is unknown: no folder with a tokenizer.json; and tiktoken knows "
                        f"{', '.join(tiktoken.list_encoding_names())}") from None
    except OSError as error:
        raise UserError(f"encoding '{name}' could not be downloaded ({type(error).__name__}); "
                        "connect once, or train one on your data (encoding = \"train\")") from None
    special = base._special_tokens | special_tokens(base.n_vocab, number_tokens)
    return Tokenizer(tiktoken.Encoding(f"{name}+msa", pat_str=base._pat_str, special_tokens=special,
                                       mergeable_ranks=base._mergeable_ranks))
