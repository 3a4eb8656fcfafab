"""A Hugging Face tokenizer.json, of a byte-level BPE, as a tiktoken.Encoding that gives the same ids.

    encoding = read_tokenizer_json("out/smollm2/tokenizer.json")

tiktoken cuts a text by one pattern and merges what has the lowest rank; what a file asks beyond that is refused by its name.
"""
import json
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import regex  # tiktoken brings it
import tiktoken

from common import UserError

# How GPT-2's pre-tokenizer splits a text; and how it splits what lies between digits when these are split off first: a text
# then ends before each digit, so that white space before one is a piece as it is at the end of a text.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BETWEEN_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# What Oniguruma (the tokenizers library) and fancy_regex (tiktoken) read alike: literals, classes, general categories, groups,
# looking ahead, quantifiers. Not \w, \h, ^, $, (?m), {1,3}+ and more; nor an (?i:) where one character matches two, as ß does ss.
ESCAPE = r"\\(?:[rntsSdD]|[pP]\{(?:[LMNPSZ][a-z]?|Han)\}|[^\w\s<>])"
SAME_REGEX = re.compile(
    rf"(?:\||\((?:\?[:=!>]|(?!\?))|(?:[^][\\(){{}}?*+|.^$]|{ESCAPE}|\[\^?(?:(?!&&|--|~~)[^][\\]|{ESCAPE})+\]|\)"
    r"|\(\?i:(?![^)]*(?:ss|st|f[fil]))['a-z|[\]]*\))(?:(?:[?*+][?+]?|\{\d+(?:,\d*)?\})(?![?*+{]))?)+")
PROBE = "".join(map(chr, range(9, 1000))) + " a  b\n\n 'll 12,345 \u3042\u4e2d\U0001f600 "

# A byte-level vocabulary writes a byte as one printable character: itself, or else one from U+0100 on.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = dict.fromkeys(range(256), 0xFFFF) | {code: code for code in PRINTABLE}  # 0xFFFF: stands for no byte
BYTE_OF |= {256 + i: byte for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}

MODEL_RULES = {"type": ("BPE", None), "dropout": (None, 0), "byte_fallback": (False, None),  # old files lack some: None
               "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
MAX_IDS = 1 << 24  # no vocabulary comes near: an id beyond it is damage
MISSING = -1


class ByteLevelEncoding(tiktoken.Encoding):
    """A tiktoken.Encoding that gives a `tokenizer.json`'s ids, which need be neither in merge order nor there for every byte.

    tiktoken merges first what has the lowest id, and wants all 256 bytes. So within, a token's id is its place in merge order, with
    the missing bytes last; what the methods take and give are the file's ids. `type(e)(**e.arguments)` is a copy of `e`.
    """

    def __init__(self, name, *, pat_str, mergeable_ranks, special_tokens, unreachable=(), unknown=None, fuse_unknown=False, nfc=False):
        """`mergeable_ranks`: {bytes: the file's id} in merge order. `unreachable`: the same for tokens that no text becomes.

        `unknown`: the id that a missing byte becomes, or a run of them if `fuse_unknown`; None: they are dropped, and what is left
        merges. `nfc`: normalize the text first.
        """
        self.arguments = {"name": name, "pat_str": pat_str, "mergeable_ranks": mergeable_ranks, "special_tokens": special_tokens,
                          "unreachable": dict(unreachable), "unknown": unknown, "fuse_unknown": fuse_unknown, "nfc": nfc}
        missing = [byte for byte in (bytes([i]) for i in range(256)) if byte not in mergeable_ranks]
        super().__init__(name, pat_str=pat_str, special_tokens={},
                         mergeable_ranks={token: rank for rank, token in enumerate([*mergeable_ranks, *missing])})
        self._mergeable_ranks, self._special_tokens = mergeable_ranks, special_tokens
        self._special_token_values = set(special_tokens.values())
        self._bytes_of = {i: token for token, i in [*mergeable_ranks.items(), *dict(unreachable).items()]}
        self._bytes_of |= {i: token.encode() for token, i in special_tokens.items()}
        self.max_token_value = max(self._bytes_of)
        ids = [*mergeable_ranks.values(), *[MISSING] * len(missing)]
        self._file_ids = None if ids == [*range(len(ids))] else ids
        self._missing = re.compile(b"[" + re.escape(b"".join(missing)) + b"]+") if missing else None

    def __getstate__(self):
        return self.arguments

    def encode_ordinary(self, text):
        """The ids of `text`. No special token is parsed, but if it is the file's `unk_token`, a missing byte becomes it."""
        unknown, fuse = self.arguments["unknown"], self.arguments["fuse_unknown"]
        if self.arguments["nfc"]:
            text = unicodedata.normalize("NFC", text)
        ids = self._outer(super().encode_ordinary(text))
        if self._missing is None or MISSING not in ids:
            return ids
        if unknown is None or fuse:  # such bytes go within a piece, before the rest of it merges; rare, so Python may split
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does with lone surrogates
            kept = 0 if unknown is None else 1
            pieces = (self._missing.sub(lambda run: run[0][:kept], match[0].encode()) for match in regex.finditer(self._pat_str, text))
            ids = self._outer([i for piece in pieces if piece for i in self._core_bpe.encode_single_piece(piece)])
        return [unknown if i == MISSING else i for i in ids]

    def _outer(self, ids):
        return ids if self._file_ids is None else list(map(self._file_ids.__getitem__, ids))

    def encode_single_token(self, text_or_bytes):
        token = text_or_bytes if isinstance(text_or_bytes, bytes) else text_or_bytes.encode()
        return self._mergeable_ranks[token] if token in self._mergeable_ranks else self._special_tokens[token.decode()]

    def decode_single_token_bytes(self, token):
        return self._bytes_of[token]

    def decode_bytes(self, tokens):
        return b"".join(map(self._bytes_of.__getitem__, tokens))

    def decode(self, tokens, errors="replace"):
        return self.decode_bytes(tokens).decode("utf-8", errors)

    # tiktoken's other methods would speak of the ids within
    encode = encode_batch = encode_to_numpy = encode_with_unstable = token_byte_values = None
    _encode_single_piece = _encode_only_native_bpe = _encode_bytes = None


def read_tokenizer_json(path):
    """Read a byte-level BPE from a `tokenizer.json`. Raises UserError for one that a tiktoken pattern and ranks cannot express.

    What the file says of post-processing, padding and truncation is left out: no special token is added, and texts stay whole.
    """
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        model, added = about["model"], about.get("added_tokens") or []
        for key, allowed in MODEL_RULES.items():
            if model.get(key) not in allowed:
                raise UserError(f"model.{key} is {json.dumps(model[key])}; it must be {json.dumps(allowed[0])}")
        normalizers = [step["type"] for step in pipeline(about.get("normalizer"), "normalizers")]
        if normalizers not in ([], ["NFC"]):
            raise UserError(f"normalizer is {' + '.join(normalizers)}; it must be NFC or null")
        if (about.get("decoder") or {"type": "ByteLevel"})["type"] != "ByteLevel":
            raise UserError(f"decoder is {about['decoder']['type']}; it must be ByteLevel")
        pattern = split_pattern(pipeline(about.get("pre_tokenizer"), "pretokenizers"))
        special = {token["content"]: token["id"] for token in added}
        check_ids([*model["vocab"].items(), *((token["content"], token["id"]) for token in added)])
        return ByteLevelEncoding(Path(path).absolute().parent.name, pat_str=pattern, nfc=bool(normalizers), special_tokens=special,
                                 **merge_order(model, special))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a tokenizer.json") from None
    except KeyError as error:
        raise UserError(f"{path}: malformed tokenizer.json: {error} is missing") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: malformed tokenizer.json: {error}") from None


def pipeline(component, key):
    """The steps of a normalizer or pre-tokenizer: none, itself, or those of a Sequence."""
    return [] if component is None else component[key] if component["type"] == "Sequence" else [component]


def split_pattern(steps):
    """The one pattern that cuts a text as these pre-tokenizers do, one after the other."""
    match [{"use_regex": True} | step if step["type"] == "ByteLevel" else step for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(regular)}]:
            return GPT2_PATTERN if regular else r"[\s\S]+"
        case [{"type": "Digits", "individual_digits": bool(single)},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(regular)}]:
            return (r"\p{N}|" if single else r"\p{N}+|") + (BETWEEN_DIGITS if regular else r"\P{N}+")
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return isolated(pattern)
    found = " + ".join(step["type"] + "".join(f" {key}={json.dumps(value)}" for key, value in step.items() if key != "type")
                       for step in steps) or "null"
    raise UserError(f"pre_tokenizer is {found}; it must be ByteLevel, Digits + ByteLevel, or Split + ByteLevel use_regex=false, "
                    "where Split is by a Regex with behavior=\"Isolated\" invert=false, and ByteLevel has add_prefix_space=false")


def isolated(pattern):
    """The pattern of pieces that match `pattern`, and of what lies between them (which tiktoken would drop)."""
    read = SAME_REGEX.match(pattern)
    rest = pattern[read.end() if read else 0:]
    if rest or not pattern:
        raise UserError(f"pre_tokenizer: the regex of Split may mean something else to tiktoken from {rest[:20]!r} on; it must be of plain "
                        f"characters, classes, \\s, \\d, \\p{{L}} and the like, groups, lookahead, quantifiers: {pattern}")
    whole = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    try:
        empty = any(not match[0] for match in regex.finditer(pattern, PROBE))
        tiktoken.Encoding("", pat_str=whole, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    except (ValueError, regex.error) as error:
        raise UserError(f"pre_tokenizer: the regex of Split does not compile: {error}: {pattern}") from None
    if empty:
        raise UserError(f"pre_tokenizer: the regex of Split matches the empty text, which cuts nothing off: {pattern}")
    return whole


def check_ids(tokens):
    """Raises UserError unless these (token, id) pairs are one to one, and the ids are in range."""
    id_of, token_of = {}, {}
    for token, i in tokens:
        if type(i) is not int or not 0 <= i < MAX_IDS:
            raise UserError(f"the token {token!r} has the id {i!r}; it must be a number from 0 to {MAX_IDS - 1:,}")
        if token_of.setdefault(i, token) != token:
            raise UserError(f"the token {token!r} has the id {i}, but that is the id of {token_of[i]!r}; ids must differ")
        if id_of.setdefault(token, i) != i:
            raise UserError(f"the token {token!r} has the id {i}, but it also has the id {id_of[token]}; it must have one")


def vocabulary_bytes(token):
    """The bytes that a token of the vocabulary stands for."""
    try:
        return token.translate(BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        raise UserError(f"model.vocab: the token {token!r} is not written in byte-level characters") from None


def merge_order(model, special):
    """What `ByteLevelEncoding` needs of a BPE model: the tokens in merge order, those that no text becomes, the unknown token.

    The file lists pairs to merge, but tiktoken merges any two tokens that make a third. That is the same if tiktoken, given the bytes
    of a token, ends with a listed pair: on its way to a token, a text goes through the same states as these bytes alone.
    """
    vocab, whole = model["vocab"], bool(model.get("ignore_merges"))
    bytes_of = {token: vocabulary_bytes(token) for token in vocab if token not in special}
    ranks, first = {}, {}  # {pair: rank}, as the library: the last of two equal pairs counts; {token: its first pair's rank}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        for token in (left, right, left + right):
            if token not in bytes_of:
                problem = "an added token, which no text may become" if token in special else "not in model.vocab"
                raise UserError(f"model.merges[{rank}], {left!r} + {right!r}: {token!r} is {problem}")
        ranks[bytes_of[left], bytes_of[right]] = rank
        first.setdefault(bytes_of[left + right], rank)
    id_of = {bytes_of[token]: vocab[token] for token in sorted(bytes_of, key=vocab.get)}
    singles = [token for token in id_of if len(token) == 1]
    others = [token for token in id_of if len(token) != 1 and token not in first]  # only a whole piece becomes one, by ignore_merges
    order = {token: i for i, token in enumerate([*singles, *first, *(others if whole else [])])}
    unreachable, before = set() if whole else set(others), -1
    for token in [*order][len(singles):]:
        parts = last_parts(token, order)
        if ranks.get(parts, -1) > before:
            before = ranks[parts]
        elif parts in ranks:
            raise UserError(f"model.merges[{ranks[parts]}], {parts[0]!r} + {parts[1]!r}, stands between merges that make one other token; "
                            "tiktoken does these together")
        elif len(parts) == 2:
            raise UserError(f"model.merges: tiktoken would merge {parts[0]!r} + {parts[1]!r}, which the file does not list")
        elif not whole:
            unreachable.add(token)
    lost, unknown = 256 - len(singles), model.get("unk_token")
    if clash := [token for token in special if token in vocab and len(token) == 1 and ord(token) in BYTE_OF]:
        raise UserError(f"the added token {clash[0]!r} is a byte of model.vocab, and no text may become an added token")
    if lost and whole:
        raise UserError(f"model.ignore_merges is true; then model.vocab must hold all 256 bytes, but it lacks {lost}")
    if lost and unknown is not None and (unknown not in vocab or any(bytes_of.get(unknown) in pair for pair in ranks)):
        raise UserError(f"model.unk_token is {unknown!r} and stands for {lost} missing bytes; it must be in model.vocab and in no merge")
    return {"mergeable_ranks": {token: id_of[token] for token in order if token not in unreachable},
            "unreachable": {token: id_of[token] for token in unreachable},
            "unknown": vocab[unknown] if lost and unknown is not None else None, "fuse_unknown": bool(model.get("fuse_unk"))}


def last_parts(token, ranks):
    """The tokens that tiktoken merges the bytes of `token` into, before the step that makes it `token` if there are two."""
    parts = [token[i:i + 1] for i in range(len(token))]
    found = [ranks.get(left + right, MAX_IDS) for left, right in pairwise(parts)]
    while len(parts) > 2 and (rank := min(found)) < MAX_IDS:
        i = found.index(rank)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        found[max(i - 1, 0):i + 2] = [ranks.get(left + right, MAX_IDS) for left, right in pairwise(parts[max(i - 1, 0):i + 2])]
    return tuple(parts)
