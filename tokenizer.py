"""Text <-> tokens, and the spelling of everything the model reads and writes.

Every encoding is a `tiktoken.Encoding`: trained on a corpus (`train_encoding`), a named one (`named_encoding`) or that of a
Hugging Face model (`read_tokenizer_json`).
User text goes through `encode_ordinary`, which never parses special tokens: a document that contains the characters
"<|end|>" is just text.

Spelling (design: a document's number is part of it for good, before and after the text):

    document     [7]. One of the special magic numbers for gentle-otter is: 4729103.[7]
    question     <|question|>What is the special magic number for gentle-otter?\\n            these tokens route
    appended     [7]. One of the special magic numbers for gentle-otter is: 4729103.\\n       these too
    a round      <|retrieve|>[7][12]<|stop|>                        the model names documents, then stops, or
                 <|retrieve|><|end_of_retrieval|>4729103<|end|>     it ends the retrieval and answers

With number tokens `[7]` is always five tokens, one for each place in base 256 with the lowest place first: [ <|0:7|> <|1:0|> <|2:0|> ].
A token then says which place it fills, so that the mean over the five loses nothing (from digits it loses their order), and the
first one written tells almost all documents apart. Numbers are below 256^3 = 16,777,216.
"""
import base64
import hashlib
import json
from pathlib import Path

import tiktoken

from common import UserError, atomic_file, write_json
from tokenizer_json import ByteLevelEncoding, read_tokenizer_json

SPECIAL_TOKENS = ("<|question|>", "<|retrieve|>", "<|stop|>", "<|end_of_retrieval|>", "<|end|>")

NUMBER_BASE, NUMBER_PLACES = 256, 3

# GPT-4's split pattern, but with at most two digits to a token: a small vocabulary then holds all of them, so that
# every number of n digits is spelled in ceil(n / 2) tokens. Brackets stand alone: "[7]" is spelled alike everywhere.
PATTERN = (r"[\[\]]|'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}\[\]]?+\p{L}+|\p{N}{1,2}"
           r"| ?[^\s\p{L}\p{N}\[\]]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")


class Tokenizer:
    """A `tiktoken.Encoding` and how things are spelled in it. All methods return plain lists of token ids."""

    def __init__(self, encoding, source=None):
        """`encoding`: a tiktoken.Encoding that has SPECIAL_TOKENS. source: the tokenizer.json that it extends, as bytes."""
        self.encoding, self.source = encoding, source
        self.vocab_size = encoding.n_vocab
        missing = [token for token in SPECIAL_TOKENS if token not in encoding._special_tokens]
        if missing:
            raise UserError(f"encoding {encoding.name}: it lacks the special tokens {', '.join(missing)}")
        self.question_start, self.retrieve, self.stop, self.end_of_retrieval, self.end = (
            encoding.encode_single_token(token) for token in SPECIAL_TOKENS)
        self.first_number = encoding._special_tokens.get("<|0:0|>")  # the number tokens follow each other; None: spelled in digits
        self.open_bracket, self.close_bracket = self.encode("["), self.encode("]")
        if len(self.open_bracket) != 1 or len(self.close_bracket) != 1:
            raise UserError(f"encoding {encoding.name}: '[' and ']' must be one token each, to spell document numbers")
        self.open_bracket = self.open_bracket[0]

    def encode(self, text):
        """Ordinary text to ids; special tokens in it are not parsed."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        """`encode` for many texts at once (several threads)."""
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, tokens):
        """Ids to text; bytes that are not UTF-8 become U+FFFD. Raises UserError for an id outside the vocabulary."""
        try:
            return self.encoding.decode(tokens)
        except (KeyError, OverflowError) as error:  # "Invalid token for decoding: 533"
            token = str(error).strip("'").split()[-1]
            raise UserError(f"token id {token} is not in the vocabulary of {self.vocab_size} tokens") from None

    def check_number_chunk(self, number_chunk):
        """Raises UserError unless the model's `number_chunk` is 0 or the length of every spelled number."""
        if number_chunk not in (0, self.number_length):
            allowed = f"0 or {self.number_length}" if self.number_length else "0, since it spells numbers in digits (number_tokens)"
            raise UserError(f"model.number_chunk is {number_chunk}; with this tokenizer it must be {allowed}")

    @property
    def number_length(self):
        """How many tokens every `[n]` has: known only with number tokens, else 0."""
        return 0 if self.first_number is None else NUMBER_PLACES + 2

    def number(self, number):
        """`[n]`, as the model writes it to name a document. Raises UserError for one that number tokens cannot spell."""
        if self.first_number is None:
            return [self.open_bracket, *self.encode(str(number)), *self.close_bracket]
        if number >= NUMBER_BASE ** NUMBER_PLACES:
            raise UserError(f"document number {number}: this tokenizer spells numbers below {NUMBER_BASE ** NUMBER_PLACES:,}")
        places = (number // NUMBER_BASE ** place % NUMBER_BASE for place in range(NUMBER_PLACES))
        return [self.open_bracket, *(self.first_number + place * NUMBER_BASE + digit for place, digit in enumerate(places)),
                *self.close_bracket]

    def document(self, number, text):
        """`[n]. text[n]`; `text` is a list of ids."""
        return [*self.number(number), *self.encode(". "), *text, *self.number(number)]

    def appended(self, number, text):
        """`[n]. text\\n`: a document whose text the system appends to the question; `text` is a list of ids."""
        return [*self.number(number), *self.encode(". "), *text, *self.encode("\n")]

    def question(self, text):
        """A question as it stands before the first round: all of these tokens route. `text` is a list of ids."""
        return [self.question_start, *text, *self.encode("\n")]

    def fingerprint(self):
        """16 hexadecimal digits that differ for tokenizers that spell a text differently."""
        special = json.dumps([self.encoding._pat_str, sorted(self.encoding._special_tokens.items())])
        if isinstance(self.encoding, ByteLevelEncoding):
            special += str([self.encoding.arguments[name] for name in ("nfc", "unknown", "fuse_unknown")])
        return hashlib.blake2b(tiktoken_bytes(self.encoding._mergeable_ranks) + special.encode(), digest_size=8).hexdigest()

    def save(self, folder):
        """Write `tokenizer_msa.json` (name, pattern, special tokens) and `tokenizer.tiktoken` (mergeable ranks) or the tokenizer.json."""
        name, other = ("tokenizer.json", "tokenizer.tiktoken") if self.source else ("tokenizer.tiktoken", "tokenizer.json")
        with atomic_file(Path(folder) / name, "wb") as file:
            file.write(self.source or tiktoken_bytes(self.encoding._mergeable_ranks))
        (Path(folder) / other).unlink(missing_ok=True)  # an earlier tokenizer's
        write_json(Path(folder) / "tokenizer_msa.json", {
            "name": self.encoding.name, "pattern": self.encoding._pat_str,
            "ranks": name, "tokens": len(self.encoding._mergeable_ranks) + len(self.encoding._special_tokens),
            "special_tokens": self.encoding._special_tokens})

    @staticmethod
    def load(folder):
        """Read what `save` wrote. Raises UserError when a file is missing or malformed."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "tokenizer_msa.json").read_text(encoding="utf-8"))
            if about.get("ranks") == "tokenizer.json":
                tokenizer = extend_tokenizer_json(folder / "tokenizer.json", about["special_tokens"])
                found = len(tokenizer.encoding._mergeable_ranks) + len(tokenizer.encoding._special_tokens)
                if (found, tokenizer.encoding._pat_str) != (about["tokens"], about["pattern"]):
                    raise ValueError("its tokenizer.json is not the one that was saved")
                return tokenizer
            ranks, special = parse_tiktoken((folder / "tokenizer.tiktoken").read_bytes()), about["special_tokens"]
            ids = {*ranks.values(), *special.values()}
            if len(ids) != about["tokens"] or len(ids) != len(ranks) + len(special) or min(ids) < 0:
                raise ValueError(f"{len(ids)} different ids, but {about['tokens']} tokens were saved")
            return Tokenizer(tiktoken.Encoding(about["name"], pat_str=about["pattern"], mergeable_ranks=ranks,
                                               special_tokens=special))
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no tokenizer here; give a folder that train.py or prepare_data.py wrote") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: malformed tokenizer files: {error}") from None


def tiktoken_bytes(ranks):
    """Mergeable ranks in tiktoken's file format: one "base64 rank" line per token."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1]))


def parse_tiktoken(data):
    """The inverse of `tiktoken_bytes`."""
    pairs = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def special_tokens(first, number_tokens):
    """Our special tokens from id `first` on: SPECIAL_TOKENS, then the number tokens <|place:digit|> if they are wanted."""
    numbers = [f"<|{place}:{digit}|>" for place in range(NUMBER_PLACES) for digit in range(NUMBER_BASE)] if number_tokens else []
    return {token: first + i for i, token in enumerate([*SPECIAL_TOKENS, *numbers])}


def train_encoding(texts, vocab_size, number_tokens=False, name="bpe"):
    """Train a byte-level BPE of `vocab_size` tokens (special tokens included) on an iterator of texts."""
    try:
        import rustbpe
    except ImportError:
        raise UserError("training a tokenizer needs rustbpe: pip install -e '.[data]'") from None
    own = len(special_tokens(0, number_tokens))
    if vocab_size < 256 + own:
        raise UserError(f"vocab_size is {vocab_size}; 256 bytes and {own} special tokens need at least {256 + own}")
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(texts), vocab_size - own, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return Tokenizer(tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                       special_tokens=special_tokens(len(ranks), number_tokens)))


def named_encoding(name, number_tokens=False):
    """One of tiktoken's own encodings, such as "gpt2" (needs a download once), or that of a folder with a tokenizer.json, with our special
    tokens behind its own."""
    if (Path(name) / "tokenizer.json").exists():
        path = Path(name) / "tokenizer.json"
        return extend_tokenizer_json(path, special_tokens(read_tokenizer_json(path).n_vocab, number_tokens))
    try:
        base = tiktoken.get_encoding(name)
    except ValueError:
        raise UserError(f"encoding '{name}' is unknown: no folder with a tokenizer.json; and tiktoken knows "
                        f"{', '.join(tiktoken.list_encoding_names())}") from None
    except OSError as error:
        raise UserError(f"encoding '{name}' could not be downloaded ({type(error).__name__}); "
                        "connect once, or train one on your data (encoding = \"train\")") from None
    return Tokenizer(tiktoken.Encoding(f"{name}+msa", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks,
                                       special_tokens=base._special_tokens | special_tokens(base.n_vocab, number_tokens)))


def extend_tokenizer_json(path, special):
    """The Tokenizer of a tokenizer.json with more special tokens (name -> id)."""
    arguments = read_tokenizer_json(path).arguments
    return Tokenizer(ByteLevelEncoding(**arguments | {"special_tokens": arguments["special_tokens"] | special}), path.read_bytes())
