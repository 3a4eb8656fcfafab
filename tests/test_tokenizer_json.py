"""A tokenizer.json as a tiktoken.Encoding. The oracle is the tokenizers library, which comes with transformers; refusals need none."""
import argparse
import ast
import inspect
import json
import os
import pickle
import random
import re
import tarfile
import typing
import unicodedata
from pathlib import Path

import pytest

from common import UserError
from tokenizer import SPECIAL_TOKENS, Tokenizer, named_encoding, train_encoding
from tokenizer_json import BYTE_OF, read_tokenizer_json

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTE_CHARACTERS = {byte: chr(code) for code, byte in BYTE_OF.items() if byte < 256}
SMOLLM2_LACKS = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1d, 0xc0, 0xc1, 0xf1, 0xf2, *range(0xf5, 0x100)]
STANDARD_LIBRARY = [inspect.getsource(module) for module in (argparse, inspect, tarfile, typing)]


def split_by(regex, **changes):
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


def digits(single):
    return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": single}, BYTE_LEVEL]}


@pytest.fixture(scope="module")
def trained():
    """Two files of the tokenizers library: like SmolLM2's (special tokens first, 21 bytes missing) and like Qwen's (special last)."""
    tokenizers = pytest.importorskip("tokenizers")
    files = []
    for lacks, steps, first in ((SMOLLM2_LACKS, digits(True), [f"<|{i}|>" for i in range(17)]), ([], split_by(QWEN), [])):
        alphabet = [character for byte, character in BYTE_CHARACTERS.items() if byte not in lacks]
        empty = {"version": "1.0", "added_tokens": [], "pre_tokenizer": steps, "decoder": BYTE_LEVEL,
                 "model": {"type": "BPE", "vocab": {}, "merges": []}}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(empty))
        tokenizer.train_from_iterator([text[:50_000] for text in STANDARD_LIBRARY], tokenizers.trainers.BpeTrainer(
            vocab_size=1500, special_tokens=first, initial_alphabet=alphabet, show_progress=False))
        files.append(json.loads(tokenizer.to_str()))
    files[1]["added_tokens"] = [added(f"<|{i}|>", 1500 + i) for i in range(3)]
    return files


def added(content, i, special=True):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


@pytest.fixture(scope="module")
def texts():
    """5,000 texts: documentation, code, Unicode, marks to normalize, look-alikes, white space, digits, bytes that are missing."""
    random_ = random.Random(7)
    docs = [doc for source in STANDARD_LIBRARY for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (doc := ast.get_docstring(node))]
    old = unicodedata.ucd_3_2_0  # the library normalizes by an older Unicode, which does not know the newest marks
    known = [character for character in map(chr, range(0x110000)) if unicodedata.category(character) not in ("Cs", "Cn")
             and unicodedata.combining(character) == old.combining(character)]
    planes = [[character for character in known if ord(character) >> 16 == plane] for plane in (0, 0, 1, 2, 3, 14, 15, 16)]
    marks = [character for character in known if unicodedata.combining(character)]
    part = lambda text: text[(start := random_.randrange(len(text))):start + 150]
    some = lambda choices: "".join(random_.choices(choices, k=random_.randrange(30)))
    kinds = [
        lambda: part(random_.choice(docs)), lambda: part(random_.choice(STANDARD_LIBRARY)),
        lambda: some(random_.choice(planes)) + some(planes[0]),
        lambda: some(["e", "A", "\u1100", "\u1161", "\u11a8", *random_.sample(marks, 4)]),
        lambda: some(["<|0|>", "<|1|>", "<|", "|>", "0", " ", "a"]),
        lambda: some(" \t\n\r\f\x85\xa0\u2003\u2028 a1."),
        lambda: some("0123456789 .,\u0663\u00bd\u216b\U0001d7d8"),
        lambda: some("!!\x00\x04\x06.'sS\u017f\u212at'LL're \x13\U00050000\U0010ffff")]
    return [kinds[i % 8]() for i in range(5000)]


def all_splits(file):
    """Merges as in Llama 3's file: of every token, all splits into two tokens."""
    vocab = file["model"]["vocab"]
    pairs = [[token[:i], token[i:]] for token in sorted(vocab, key=vocab.get) for i in range(1, len(token))]
    return [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]


def words(file):
    """The vocabulary and 60 words that occur in the texts and that merges leave in pieces: tokens that only `ignore_merges` uses."""
    import tokenizers
    library = tokenizers.Tokenizer.from_str(json.dumps(file))
    found = sorted(set(re.findall(r" [a-z]{7,}", STANDARD_LIBRARY[0])))
    whole = [word.replace(" ", "\u0120") for word in found if len(library.encode(word).ids) > 2][:60]
    return file["model"]["vocab"] | {word: 2000 + i for i, word in enumerate(whole)}


def shuffled(file):
    ids = list(range(len(file["model"]["vocab"])))
    random.Random(3).shuffle(ids)
    return dict(zip(file["model"]["vocab"], ids))


KINDS = {  # which trained file, its changes, those of its model
    "smollm2": lambda small, qwen: (small, {}, {"merges": [" ".join(pair) for pair in small["model"]["merges"]]}),
    "qwen": lambda small, qwen: (qwen, {"normalizer": {"type": "NFC"}}, {}),
    "llama3": lambda small, qwen: (qwen, {"pre_tokenizer": split_by(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"))}, {
        "ignore_merges": True, "vocab": words(qwen), "merges": all_splits(qwen)}),
    "shuffled": lambda small, qwen: (qwen, {}, {"vocab": shuffled(qwen)}),
    "unreachable": lambda small, qwen: (qwen, {"pre_tokenizer": BYTE_LEVEL}, {"vocab": words(qwen)}),
    "unknown": lambda small, qwen: (small, {"pre_tokenizer": digits(False)}, {"unk_token": "<|3|>"}),
    "fused": lambda small, qwen: (small, {"pre_tokenizer": BYTE_LEVEL}, {"unk_token": "<|3|>", "fuse_unk": True}),
    "uncut": lambda small, qwen: (small, {"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, {}),
    "gaps": lambda small, qwen: (qwen, {"pre_tokenizer": split_by(r"(?!in)\p{L}+|\s+(?=\S)")}, {}),
}


def compare(path, texts):
    """The ids and the texts are those of the tokenizers library; returns the encoding and the ids."""
    import tokenizers
    library = tokenizers.Tokenizer.from_file(str(path))
    library.encode_special_tokens = True  # as we do always
    encoding = read_tokenizer_json(path)
    expected = [one.ids for one in library.encode_batch(texts, add_special_tokens=False)]
    ids = encoding.encode_ordinary_batch(texts, num_threads=1)
    for text, found, wanted in zip(texts, ids, expected):
        assert found == wanted, repr(text)
        assert encoding.decode(found) == library.decode(found, skip_special_tokens=False), repr(text)
    return encoding, ids


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json(monkeypatch, trained, texts, tmp_path, kind):
    """A Hugging Face model would read other tokens than those it was trained on."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    file, changes, model = KINDS[kind](*trained)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(file | changes | {"model": file["model"] | model}))
    encoding, ids = compare(path, texts if kind in ("smollm2", "qwen", "llama3", "shuffled") else texts[:1000])
    assert encoding.n_vocab == (2060 if "vocab" in model and kind != "shuffled" else 1500 if file is trained[0] else 1503)
    assert len(encoding._special_tokens) == (17 if file is trained[0] else 3)
    special = set(encoding._special_tokens.values()) - {encoding.arguments["unknown"]}
    lacks = bytes(SMOLLM2_LACKS) if file is trained[0] else b""
    normal = "NFC" if kind == "qwen" else None
    for text, found in zip(texts, ids):
        assert special.isdisjoint(found)
        if not set(lacks) & set(text.encode()):
            assert encoding.decode(found) == (unicodedata.normalize(normal, text) if normal else text)


@pytest.mark.skipif("NANOMSA_SMOLLM2" not in os.environ, reason="NANOMSA_SMOLLM2 is not set to the folder of SmolLM2")
def test_tokenizer_json_of_smollm2(texts):
    """The real file would be read otherwise than one we train."""
    pytest.importorskip("tokenizers")
    encoding, _ = compare(Path(os.environ["NANOMSA_SMOLLM2"]) / "tokenizer.json", texts)
    assert encoding.n_vocab == 49152 and len(encoding._special_tokens) == 17


def tiny(**model):
    """A file with all bytes and five merges."""
    vocab = {character: byte for byte, character in BYTE_CHARACTERS.items()} | {token: 256 + i for i, token in enumerate(
        ["ab", "bc", "abc", "!!", "xy", "unused"])}
    return {"added_tokens": [added("<|end|>", 262), added("<tool>", 270, special=False)], "normalizer": None, "pre_tokenizer": BYTE_LEVEL,
            "decoder": BYTE_LEVEL, "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", "b c", "ab c", "! !", "x y"]} | model}


@pytest.fixture
def read(tmp_path):
    def read(file):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(file if isinstance(file, bytes) else json.dumps(file).encode())
        return read_tokenizer_json(path)
    return read


def test_special_tokens_of_a_file(read):
    """A text could speak a special token, or one of the file's tokens could not be named, counted or read."""
    encoding = read(tiny())
    assert encoding.encode_ordinary("<|end|> <tool>") == list(b"<|end|> <tool>")
    assert encoding.encode_single_token("<|end|>") == 262 and encoding.encode_single_token(b"abc") == 258
    assert encoding.n_vocab == 271 and encoding._special_tokens == {"<|end|>": 262, "<tool>": 270}
    assert encoding.decode([258, 262, 270, 261]) == "abc<|end|><tool>unused" and encoding.encode_ordinary("unused") == list(b"unused")
    assert encoding.is_special_token(270) and encoding.decode_with_offsets([258, 65]) == ("abcA", [0, 3])
    copy = pickle.loads(pickle.dumps(encoding))
    assert copy.encode_ordinary_batch(["xyabc", ""]) == [[260, 258], []] and copy.n_vocab == 271


def test_tokenizer_with_a_file(read):
    """An encoding that was read from a file would not do what the others do."""
    encoding = read(tiny())
    special = encoding._special_tokens | {token: 300 + i for i, token in enumerate(SPECIAL_TOKENS)}
    with pytest.raises(UserError, match="it lacks the special tokens"):
        Tokenizer(encoding)
    tokenizer = Tokenizer(type(encoding)(**encoding.arguments | {"special_tokens": special}))
    assert tokenizer.vocab_size == 305 and tokenizer.decode(tokenizer.document(7, [258])) == "[7]. abc[7]"
    with pytest.raises(UserError, match="^token id 299 is not in the vocabulary of 305 tokens"):
        tokenizer.decode([299])


@pytest.mark.parametrize("unknown,fuse,ids", [
    (None, False, [259, 97, 98]), (None, True, [259, 97, 98]),
    ("unused", False, [33, 261, 261, 33, 97, 261, 98]), ("unused", True, [33, 261, 33, 97, 261, 98])])
def test_missing_bytes(read, unknown, fuse, ids):
    """A byte that the vocabulary lacks would become an id that the model has no embedding for; or, dropped, would keep others apart."""
    file = tiny(unk_token=unknown, fuse_unk=fuse)
    for byte in (1, 2):
        del file["model"]["vocab"][BYTE_CHARACTERS[byte]]
    encoding = read(file)
    assert encoding.encode_ordinary("!\x01\x02!a\x01b") == ids  # the pieces are "!\x01\x02!", "a", "\x01", "b"
    assert encoding.n_vocab == 271 and encoding.encode_ordinary("a\ud800!") == [97, *"\ufffd".encode(), 33]


def change(*path, **changes):
    """An edit of `tiny()`: the dictionary at `path` gets these values (one called `without` names a key to remove)."""
    def apply(file):
        for key in path:
            file = file[key]
        file.update(changes)
        file.pop(file.pop("without", None), None)
    return apply


def model(**changes):
    return change("model", **changes)


def vocabulary(**changes):
    return change("model", "vocab", **changes)


def splits(regex, **changes):
    return change(pre_tokenizer=split_by(regex, **changes))


def merges(*more):
    return lambda file: file["model"]["merges"].extend(more)


REFUSED = {
    "unigram": (model(type="Unigram"), 'model.type is "Unigram"; it must be "BPE"$'),
    "word piece": (model(type="WordPiece"), 'model.type is "WordPiece"'),
    "word level": (model(type="WordLevel"), 'model.type is "WordLevel"'),
    "byte fallback": (model(byte_fallback=True), "model.byte_fallback is true; it must be false$"),
    "dropout": (model(dropout=0.1), "model.dropout is 0.1; it must be null$"),
    "prefix": (model(continuing_subword_prefix="##"), 'model.continuing_subword_prefix is "##"; it must be null$'),
    "suffix": (model(end_of_word_suffix="</w>"), 'model.end_of_word_suffix is "</w>"; it must be null$'),
    "lower case": (change(normalizer={"type": "Lowercase"}), "normalizer is Lowercase; it must be NFC or null$"),
    "two normalizers": (change(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}),
                        "normalizer is NFC [+] Strip; it must be NFC or null$"),
    "decoder": (change(decoder={"type": "Metaspace"}), "decoder is Metaspace; it must be ByteLevel$"),
    "no pre-tokenizer": (change(pre_tokenizer=None), "pre_tokenizer is null; it must be ByteLevel, Digits . ByteLevel, or"),
    "metaspace": (change(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "pre_tokenizer is Metaspace"),
    "prefix space": (change(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "pre_tokenizer is ByteLevel add_prefix_space=true"),
    "two splits": (change(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        *split_by("a")["pretokenizers"][:1], *split_by("b")["pretokenizers"]]}), "pre_tokenizer is Split .* [+] Split .* [+] ByteLevel"),
    "split twice": (change(pre_tokenizer={"type": "Sequence", "pretokenizers": [*split_by("a")["pretokenizers"][:1], BYTE_LEVEL]}),
                    "pre_tokenizer is Split .* [+] ByteLevel .*use_regex=true"),
    "byte level first": (change(pre_tokenizer={"type": "Sequence", "pretokenizers": digits(True)["pretokenizers"][::-1]}),
                         "pre_tokenizer is ByteLevel .* [+] Digits"),
    "behavior": (splits("a", behavior="Removed"), 'Split .*behavior="Removed"'),
    "invert": (splits("a", invert=True), "Split .*invert=true"),
    "a string": (splits("a", pattern={"String": "a"}), 'Split pattern={"String": "a"}'),
    "word characters": (splits(r"a|\w+"), "the regex of Split may mean something else to tiktoken from '.*w[+]' on; it must be of"),
    "line anchor": (splits(r"^a|b"), r"from '\^a|b' on"),
    "possessive interval": (splits(r"a{1,3}+"), "from '[{]1,3}[+]' on"),
    "set operation": (splits(r"[\p{L}&&\p{P}]"), "regex of Split may mean"),
    "two for one": (splits(r"(?i:ss)"), "regex of Split may mean"),
    "look behind": (splits(r"(?<=a)b"), "regex of Split may mean"),
    "no regex": (splits(""), "regex of Split may mean"),
    "open regex": (splits("(a"), "the regex of Split does not compile: .*: [(]a$"),
    "empty pieces": (splits(r"a|(?=1)"), "the regex of Split matches the empty text"),
    "not JSON": (lambda file: b"{", "malformed tokenizer.json: Expecting"),
    "not text": (lambda file: b"\xff\xfe", "malformed tokenizer.json: .*codec"),
    "deep": (lambda file: b"[" * 100_000, "malformed tokenizer.json: .*recursion"),
    "a list": (lambda file: b"[]", "malformed tokenizer.json"),
    "no model": (change(without="model"), "malformed tokenizer.json: 'model' is missing"),
    "no vocabulary": (model(without="vocab"), "malformed tokenizer.json: 'vocab' is missing"),
    "no merges": (model(without="merges"), "malformed tokenizer.json: 'merges' is missing"),
    "a list for a vocabulary": (model(vocab=[["a", -1.0]]), "malformed tokenizer.json"),
    "no content": (change(added_tokens=[{"id": 262}]), "malformed tokenizer.json: 'content' is missing"),
    "surrogate": (change(added_tokens=[added("\ud800", 262)]), "malformed tokenizer.json: .*surrogates"),
    "merge of three": (merges("a b c"), "malformed tokenizer.json"),
    "merge of numbers": (merges([1, 2]), "malformed tokenizer.json|is not in model.vocab"),
    "part not in vocabulary": (merges("q u"), r"model.merges\[5\], 'q' [+] 'u': 'qu' is not in model.vocab$"),
    "negative id": (vocabulary(xy=-1), "the token 'xy' has the id -1; it must be a number from 0 to 16,777,215$"),
    "huge id": (vocabulary(xy=2**40), "the token 'xy' has the id 1099511627776"),
    "id of text": (vocabulary(xy="7"), "the token 'xy' has the id '7'"),
    "id of truth": (vocabulary(xy=True), "the token 'xy' has the id True"),
    "ids collide": (vocabulary(unused=260), "the token 'unused' has the id 260, but that is the id of 'xy'; ids must differ$"),
    "added id collides": (change(added_tokens=[added("<|end|>", 260)]), "the token '<|end|>' has the id 260, but that is the id of 'xy'"),
    "two ids": (change(added_tokens=[added("unused", 300)]), "the token 'unused' has the id 300, but it also has the id 261"),
    "foreign characters": (vocabulary(**{"\u2581the": 400}), "the token '\u2581the' is not written in byte-level characters"),
    "added token that merges make": (change(added_tokens=[added("abc", 258)]), "'ab' [+] 'c': 'abc' is an added token, which no text may"),
    "added token that is a byte": (change(added_tokens=[added("?", 63)]), "the added token '[?]' is a byte of model.vocab"),
    "pair that is not listed": (lambda file: (vocabulary(xyb=301, xybc=302)(file), file["model"].update(
        merges=["b c", "x y", "xy b", "xyb c"])), "tiktoken would merge b'xy' [+] b'bc', which the file does not list"),
    "whole word that tiktoken would merge": (lambda file: (vocabulary(abcab=301)(file), model(ignore_merges=True)(file)),
                                             "tiktoken would merge b'abc' [+] b'ab', which the file does not list"),
    "pairs apart": (model(merges=["a bc", "a b", "b c", "ab c"]), r"model.merges\[1\], b'a' [+] b'b', stands between merges that make one"),
    "whole words and missing bytes": (lambda file: (model(ignore_merges=True)(file), vocabulary(without="\u0100")(file)),
                                      "model.ignore_merges is true; .* all 256 bytes, but it lacks 1$"),
    "unknown token that is not there": (lambda file: (model(unk_token="<unk>")(file), vocabulary(without="\u0100")(file)),
                                        "model.unk_token is '<unk>' and stands for 1 missing bytes; it must be in model.vocab"),
    "unknown token that merges": (lambda file: (model(unk_token="ab")(file), vocabulary(without="\u0100")(file)),
                                  "model.unk_token is 'ab' and stands for 1 missing bytes; it must be .* in no merge$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(read, name):
    """A file that we cannot read as its model does would be read otherwise, or end in a traceback."""
    edit_file, message = REFUSED[name]
    file = tiny()
    content = edit_file(file)
    with pytest.raises(UserError, match=f"^[^\n]*tokenizer.json: [^\n]*{message}"):
        read(content if isinstance(content, bytes) else file)


@pytest.mark.parametrize("name", ["nowhere.json", ""])
def test_no_file(tmp_path, name):
    """A missing file, or a folder, would end in a traceback."""
    with pytest.raises(UserError, match="^.*: (No such file|Is a directory).*; give a tokenizer.json$"):
        read_tokenizer_json(tmp_path / name)


def test_extended(tmp_path):
    """A backbone's tokenizer with our special tokens would lose its own ids, or those tokens, when it is saved."""
    (tmp_path / "backbone").mkdir()
    path = tmp_path / "backbone" / "tokenizer.json"
    path.write_text(json.dumps(tiny()), encoding="utf-8")
    plain, ours = read_tokenizer_json(path), named_encoding(str(tmp_path / "backbone"), number_tokens=True)
    assert ours.vocab_size == plain.n_vocab + len(SPECIAL_TOKENS) + 3 * 256 and ours.question_start == plain.n_vocab
    ours.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == path.read_bytes()
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint() == ours.fingerprint() and again.vocab_size == ours.vocab_size and again.first_number == ours.first_number
    text = "a document [7] <|question|> here"
    assert again.encode(text) == ours.encode(text) == plain.encode_ordinary(text)
    assert again.number(7) == ours.number(7) and len(again.number(7)) == 5
    other = train_encoding(["some text"], 300)  # another tokenizer in the same folder, and back
    other.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint() == other.fingerprint() != ours.fingerprint()
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint() == ours.fingerprint()
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(tiny(merges=["a b"])), encoding="utf-8")
    with pytest.raises(UserError, match="not the one that was saved"):
        Tokenizer.load(tmp_path / "saved")


def test_fingerprints(tmp_path):
    """A bank would be asked with a tokenizer that spells the same text otherwise."""
    found = set()
    for i, normalizer in enumerate((None, {"type": "NFC"})):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "tokenizer.json").write_text(json.dumps(tiny() | {"normalizer": normalizer}), encoding="utf-8")
        found.add(named_encoding(str(tmp_path / str(i))).fingerprint())
    assert len(found) == 2
