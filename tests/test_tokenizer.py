"""Text <-> tokens, and the spelling of documents, questions and numbers."""
import base64
import json
import re
import sys
from pathlib import Path

import pytest
import requests
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common import UserError
from tokenizer import SPECIAL_TOKENS, HubEncoding, Tokenizer, named_encoding, train_encoding

ROOT = Path(__file__).parent.parent

TEXTS = [
    "",
    "One of the special magic numbers for gentle-otter is: 4729103.",
    "  two  spaces\tand a tab \n\n  and blank lines \n",
    "carriage\r\nreturn\r\n\r\nand alone\r",
    "Grüße, naïve café; Ελληνικά, русский, 日本語, العربية, e\u0301",
    "emoji 😀👩‍👩‍👧‍👦🇫🇷 and \u2028 separators \u00a0 \x00 \x7f",
    "[7]. [[12]] ]8[ [9",
    "<|end|> <|question|><|stop|> <|endoftext|> <|end_of_retrieval|>",
    "1 12 123 1234 12345 1234567 ١٢٣",
]


@pytest.fixture(scope="module")
def numeric():
    """An encoding whose vocabulary holds all pairs of digits."""
    texts = [f"{first}{second} the number the river" for first in range(10) for second in range(10)] * 3
    return train_encoding(texts, 256 + 5 + 120)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    """Text would change on its way through the tokenizer."""
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x"]) == [tokenizer.encode(text), tokenizer.encode("x")]


@pytest.mark.parametrize("text", [*SPECIAL_TOKENS, "<|0:0|>", "<|1:77|>", "<|2:255|>"])
def test_look_alikes_are_text(number_tokenizer, text):
    """A document that contains the characters of a special token could end an answer or a retrieval, or name
    a document."""
    tokenizer = number_tokenizer
    special = {tokenizer.special_tokens[token] for token in (*SPECIAL_TOKENS, text)}
    assert len(special) == 5 + (text not in SPECIAL_TOKENS)
    for spelled in (text, f"a{text}b", f" {text}\n", text + text):
        assert special.isdisjoint(tokenizer.encode(spelled))
        assert special.isdisjoint(tokenizer.encode_batch([spelled])[0])


@pytest.mark.parametrize("kind,numbers", [("tokenizer", 0), ("number_tokenizer", 768)])
def test_special_ids(request, kind, numbers):
    """The names of the special tokens would not mean the tokens of these names, or number tokens would lie
    between them."""
    tokenizer = request.getfixturevalue(kind)
    ids = [tokenizer.question_start, tokenizer.retrieve, tokenizer.stop, tokenizer.end_of_retrieval,
           tokenizer.end]
    assert ids == list(range(tokenizer.vocab_size - numbers - 5, tokenizer.vocab_size - numbers))
    assert tokenizer.decode(ids) == "<|question|><|retrieve|><|stop|><|end_of_retrieval|><|end|>"
    assert tokenizer.first_number == (ids[-1] + 1 if numbers else None)


@pytest.mark.parametrize("number", [0, 7, 12, 305, 10_000, 9_999_999])
@pytest.mark.parametrize("text", ["Hello.", "[3]. 5", "", "12"])
def test_spelling(tokenizer, number, text):
    """Documents would be spelled otherwise than the model was trained to read and to name them."""
    ids, spelled = tokenizer.encode(text), tokenizer.number(number)
    document, appended = tokenizer.document(number, ids), tokenizer.appended(number, ids)
    question = tokenizer.question(ids)
    assert tokenizer.decode(spelled) == f"[{number}]"
    assert tokenizer.decode(document) == f"[{number}]. {text}[{number}]"
    assert tokenizer.decode(appended) == f"[{number}]. {text}\n"
    assert tokenizer.decode(question) == f"<|question|>{text}\n"
    assert document[:len(spelled)] == document[-len(spelled):] == appended[:len(spelled)] == spelled
    assert spelled[0] == tokenizer.open_bracket and spelled.count(tokenizer.open_bracket) == 1
    assert question[0] == tokenizer.question_start and question[1:-1] == ids


@pytest.mark.parametrize("number,places", [
    (0, [0, 0, 0]), (7, [7, 0, 0]), (255, [255, 0, 0]), (256, [0, 1, 0]),
    (65_535, [255, 255, 0]), (65_536, [0, 0, 1]), (16_777_215, [255, 255, 255]),
    (4_729_103, [15, 41, 72]),  # 72 * 65,536 + 41 * 256 + 15
])
def test_number_tokens(number_tokenizer, number, places):
    """A number would not be its three places in base 256, lowest first, between brackets: wherever it is
    written, the same five tokens."""
    spelled, ids = number_tokenizer.number(number), number_tokenizer.encode("[3]. 5")
    digits = "".join(f"<|{place}:{digit}|>" for place, digit in enumerate(places))
    assert number_tokenizer.decode(spelled) == f"[{digits}]"
    first = number_tokenizer.first_number
    assert spelled[1:-1] == [first + places[0], first + 256 + places[1], first + 512 + places[2]]
    assert [spelled[0]] == number_tokenizer.encode("[") and [spelled[-1]] == number_tokenizer.encode("]")
    assert len(spelled) == number_tokenizer.number_length == 5
    document, appended = number_tokenizer.document(number, ids), number_tokenizer.appended(number, ids)
    assert document == [*spelled, *number_tokenizer.encode(". "), *ids, *spelled]
    assert appended == [*spelled, *number_tokenizer.encode(". "), *ids, *number_tokenizer.encode("\n")]


@pytest.mark.parametrize("number", [256 ** 3, 256 ** 3 + 7, 10 ** 9])
def test_numbers_that_have_no_tokens(tokenizer, number_tokenizer, number):
    """A number beyond three places would be spelled like another one, or end in a traceback."""
    message = f"^document number {number}: this tokenizer spells numbers below 16,777,216$"
    with pytest.raises(UserError, match=message):
        number_tokenizer.number(number)
    assert tokenizer.decode(tokenizer.number(number)) == f"[{number}]"  # digits go on


@pytest.mark.parametrize("kind,allowed,message", [
    ("tokenizer", (0,), "it must be 0, since it spells numbers in digits"),
    ("number_tokenizer", (0, 5), "it must be 0 or 5$")])
def test_check_number_chunk(request, kind, allowed, message):
    """A model's last chunk would hold more or less than the number that closes a document."""
    tokenizer = request.getfixturevalue(kind)
    for size in range(8):
        if size in allowed:
            tokenizer.check_number_chunk(size)
        else:
            found = f"^model.number_chunk is {size}; with this tokenizer {message}"
            with pytest.raises(UserError, match=found):
                tokenizer.check_number_chunk(size)


def test_without_number_tokens(tokenizer, number_tokenizer):
    """Numbers would be spelled in tokens that nobody asked for; or the digits of a text would be taken for a
    number's tokens."""
    assert tokenizer.first_number is None and tokenizer.number_length == 0
    assert tokenizer.number(305) == tokenizer.encode("[305]")
    text = number_tokenizer.encode("see [305] and [7]")
    assert number_tokenizer.decode(text) == "see [305] and [7]"
    assert max(text) < number_tokenizer.question_start


@pytest.mark.parametrize("before,after", [
    ("", ""), ("see ", " there"), ("a", "b"), ("1", "2"), ("(", ")."), ("\n", "\n")])
def test_numbers_are_spelled_alike_everywhere(tokenizer, before, after):
    """A number inside a text would be other tokens than the number that the model writes, and could not be
    copied."""
    expected = [*tokenizer.encode(before), *tokenizer.number(4071), *tokenizer.encode(after)]
    assert tokenizer.encode(f"{before}[4071]{after}") == expected


@pytest.mark.parametrize("digits", range(1, 8))
def test_digits(numeric, digits):
    """Numbers of as many digits would have different numbers of tokens, or tokens of more than two digits."""
    for number in ("1000000"[:digits], "9999999"[:digits], "4729103"[:digits]):
        pieces = [numeric.decode([token]) for token in numeric.encode(number)]
        assert "".join(pieces) == number
        assert len(pieces) == (digits + 1) // 2
        assert max(map(len, pieces)) <= 2


@pytest.mark.parametrize("kind", ["tokenizer", "number_tokenizer"])
def test_save_and_load(request, kind, tmp_path, files_of):
    """A checkpoint's tokenizer would encode or spell numbers otherwise than the one that the model was
    trained with."""
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert sorted(files_of(tmp_path / "a")) == ["tokenizer.tiktoken", "tokenizer_msa.json"]
    assert loaded.encoding.name == tokenizer.encoding.name
    for name in ("vocab_size", "end", "open_bracket", "first_number", "number_length"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    for number in (0, 300, 9_999_999):
        assert loaded.number(number) == tokenizer.number(number)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
    everything = list(range(tokenizer.vocab_size))
    assert loaded.decode(everything) == tokenizer.decode(everything)


def edit(name, **changes):
    """An edit of one file: of tokenizer_msa.json by keys (None removes one), of tokenizer.tiktoken by a
    function of its bytes."""
    def apply(folder):
        path = folder / name
        if "data" in changes:
            path.write_bytes(changes["data"](path.read_bytes()))
        else:
            about = json.loads(path.read_text()) | changes
            path.write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    return apply


def one_line(token, rank):
    return base64.b64encode(token) + b" %d\n" % rank


MALFORMED = {
    "empty json": edit("tokenizer_msa.json", data=lambda b: b""),
    "half a json": edit("tokenizer_msa.json", data=lambda b: b[:len(b) // 2]),
    "json list": edit("tokenizer_msa.json", data=lambda b: b"[]"),
    "json not UTF-8": edit("tokenizer_msa.json", data=lambda b: b"\xff\xfe" + b),
    "no pattern": edit("tokenizer_msa.json", pattern=None),
    "broken pattern": edit("tokenizer_msa.json", pattern="(("),
    "pattern of a wrong type": edit("tokenizer_msa.json", pattern=5),
    "no special tokens": edit("tokenizer_msa.json", special_tokens={}),
    "special tokens of a wrong type": edit("tokenizer_msa.json", special_tokens=3),
    "special id of a wrong type": edit("tokenizer_msa.json",
                                       special_tokens={token: "a" for token in SPECIAL_TOKENS}),
    "empty ranks": edit("tokenizer.tiktoken", data=lambda b: b""),
    "no ranks": edit("tokenizer.tiktoken", data=lambda b: b"aGVsbG8=\n" + b),
    "three columns": edit("tokenizer.tiktoken", data=lambda b: b"aGVsbG8= 1 2\n" + b),
    "rank is a word": edit("tokenizer.tiktoken", data=lambda b: b"aGVsbG8= one\n" + b),
    "negative rank": edit("tokenizer.tiktoken", data=lambda b: b + one_line(b"qqqq", -1)),
    "rank given twice": edit("tokenizer.tiktoken", data=lambda b: b + one_line(b"qqqq", 0)),
    "cut inside a line": edit("tokenizer.tiktoken", data=lambda b: b[:len(b) // 2].rpartition(b" ")[0]),
    "cut behind a line": edit("tokenizer.tiktoken", data=lambda b: b[:b.index(b"\n", len(b) // 2) + 1]),
    "bytes are missing": edit("tokenizer.tiktoken", data=lambda b: b"".join(b.splitlines(True)[100:])),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(tokenizer, tmp_path, name):
    """Broken tokenizer files would end in a traceback, or encode text into wrong tokens without a word."""
    tokenizer.save(tmp_path)
    MALFORMED[name](tmp_path)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "tokenizer_msa.json"])
def test_missing_files(tokenizer, tmp_path, name):
    """A folder without a tokenizer would end in a traceback."""
    tokenizer.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)


def test_named_encoding(monkeypatch, tmp_path):
    """A named encoding would lose its own special tokens, or ours would take their ids."""
    base = tiktoken.Encoding("bytes", pat_str=r"\w+|\W", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 256})
    asked = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or base)
    named = named_encoding("bytes")
    assert asked == ["bytes"] and named.vocab_size == 262 and named.encoding.name == "bytes+msa"
    ours = [named.question_start, named.retrieve, named.stop, named.end_of_retrieval, named.end]
    assert ours == [257, 258, 259, 260, 261]
    assert named.encode("hé<|end|>") == list("hé<|end|>".encode())
    assert named.decode([104, 256, 261]) == "h<|endoftext|><|end|>"
    named.save(tmp_path)
    assert Tokenizer.load(tmp_path).document(12, [104]) == named.document(12, [104]) == list(b"[12]. h[12]")


def test_named_encoding_with_number_tokens(monkeypatch, tmp_path):
    """Number tokens would take ids of a named encoding, or be forgotten there or in its files."""
    base = tiktoken.Encoding("gaps", pat_str=r"\w+|\W", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 300})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: base)
    named_encoding("gaps", number_tokens=True).save(tmp_path)
    named = Tokenizer.load(tmp_path)
    assert (named.question_start, named.end, named.first_number) == (301, 305, 306)
    assert named.vocab_size == 306 + 768
    assert named.number(513) == [ord("["), 306 + 1, 306 + 256 + 2, 306 + 512, ord("]")]
    assert named_encoding("gaps").vocab_size == 306


def test_named_encoding_with_gaps(monkeypatch, tmp_path):
    """An encoding whose ids have gaps, as those of cl100k_base and o200k_base, could not be saved and
    loaded."""
    base = tiktoken.Encoding("gaps", pat_str=r"\w+|\W", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 257, "<|endofprompt|>": 276})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: base)
    named = named_encoding("gaps")
    named.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == named.vocab_size == 282
    assert loaded.question_start == named.question_start == 277
    assert loaded.decode(loaded.document(12, [104])) == "[12]. h[12]"
    with pytest.raises(UserError, match="token id 256 is not in the vocabulary"):  # untrained models say it
        loaded.decode([104, 256])


def test_unknown_encoding():
    """A wrong name of an encoding would end in a traceback, or would not say which names there are."""
    message = "encoding 'gpt1' is unknown: no folder with a tokenizer.json; and tiktoken knows .*gpt2"
    with pytest.raises(UserError, match=message):
        named_encoding("gpt1")


@pytest.mark.parametrize("error", [
    requests.exceptions.ConnectionError, requests.exceptions.HTTPError, TimeoutError])
def test_encoding_without_a_network(monkeypatch, error):
    """Without a network the user would get a page of tracebacks instead of the way out."""
    def offline(name):
        raise error("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    message = f"'gpt2' could not be downloaded .{error.__name__}.; connect once, or train one"
    with pytest.raises(UserError, match=message):
        named_encoding("gpt2")


def test_encoding_without_our_special_tokens():
    """An encoding that cannot spell a retrieval would be accepted."""
    encoding = tiktoken.Encoding("plain", pat_str=r"\w+|\W",
                                 mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|end|>": 256, "<|stop|>": 257})
    message = "plain: it lacks the special tokens <|question|>, <|retrieve|>, <|end_of_retrieval|>"
    with pytest.raises(UserError, match=f"{re.escape(message)}$"):
        Tokenizer(encoding)


@pytest.mark.parametrize("size,number_tokens,fits", [
    (260, False, False), (-1, False, False), (261, False, True), (270, False, True),
    (1028, True, False), (261, True, False), (1029, True, True), (1040, True, True)])
def test_vocabulary_size(size, number_tokens, fits):
    """A vocabulary that cannot hold the bytes would be trained, or one that can would be refused."""
    texts = ["the quiet river can follow the river"] * 4
    if fits:
        assert train_encoding(texts, size, number_tokens).vocab_size == size
    else:
        message = f"vocab_size is {size}; .* at least {1029 if number_tokens else 261}"
        with pytest.raises(UserError, match=message):
            train_encoding(texts, size, number_tokens)


def test_training_needs_rustbpe(monkeypatch):
    """Without the data extra the user would not learn what to install."""
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(UserError, match="rustbpe: pip install"):
        train_encoding(["text"], 300)


@pytest.mark.parametrize("beyond", [0, 1, 99_999])
def test_decode_of_an_id_out_of_range(tokenizer, beyond):
    """An id that the vocabulary does not have would end in a traceback, or the message would not name it."""
    token = tokenizer.vocab_size + beyond
    message = f"^token id {token} is not in the vocabulary of {tokenizer.vocab_size} tokens"
    with pytest.raises(UserError, match=message):
        tokenizer.decode([0, token])


@pytest.mark.parametrize("folder,expected", [("demo", "47b1971df3d78e6b"), ("long", "de322b3b5898ca98")])
def test_fingerprints_stay(folder, expected):
    """Banks on disk name their tokenizer; all of them would be refused."""
    assert Tokenizer.load(ROOT / "checkpoints" / folder).fingerprint() == expected


@pytest.mark.parametrize("space", [" ", "\t \u2003"])
def test_a_million_spaces(tokenizer, space):
    """A run of white space would overflow the stack of tiktoken, which ends the program in a panic."""
    text = f"a{space * (1_200_000 // len(space))}b [7]"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids[:1] == tokenizer.encode("a")
    assert ids[-2:] == tokenizer.encode("7]")
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]
    many = [f"{n} mills" for n in range(2001)]
    assert tokenizer.encode_batch(many) == [*map(tokenizer.encode, many)]


def test_extends(tokenizer, number_tokenizer, tmp_path):
    """A model would be trained further on ids that are other words to it."""
    encoding = tokenizer.encoding
    more = tiktoken.Encoding("more", pat_str=encoding._pat_str, mergeable_ranks=encoding._mergeable_ranks,
                             special_tokens=encoding._special_tokens | {"<|more|>": 700})
    assert Tokenizer(more).extends(tokenizer) and not tokenizer.extends(Tokenizer(more))
    assert tokenizer.extends(tokenizer) and not tokenizer.extends(number_tokenizer)
    split = tiktoken.Encoding("split", pat_str=r"\S+|\s", mergeable_ranks=encoding._mergeable_ranks,
                              special_tokens=encoding._special_tokens)
    assert not Tokenizer(split).extends(tokenizer)


@pytest.mark.parametrize("kind", ["tokenizer", "number_tokenizer"])
def test_the_encoding_of_a_checkpoint(request, kind, tmp_path):
    """Data for a checkpoint of ours would be prepared in other tokens than its own, or fail for want of a
    reason."""
    own = request.getfixturevalue(kind)
    own.save(tmp_path)
    numbers = own.first_number is not None
    found = named_encoding(str(tmp_path), number_tokens=numbers)
    assert found.fingerprint() == own.fingerprint() and found.vocab_size == own.vocab_size
    assert found.extends(own)
    message = f"number_tokens is {not numbers}, but the tokenizer of .* with {numbers}"
    with pytest.raises(UserError, match=message):
        named_encoding(str(tmp_path), number_tokens=not numbers)


# ------------------------------------------------------------------------------------------------------------
# tokenizer.json: the oracle is the tokenizers library, or transformers

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
CORPUS = [(ROOT / name).read_text(encoding="utf-8")[:30_000] for name in ("README.md", "model.py", "LICENSE")]
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bpe(trained, **options):
    """A BPE's file as a model with other options and 256 tokens of bytes behind its own."""
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"] | {name: len(model["vocab"]) + i for i, name in enumerate(BYTES)}
    return models.BPE(vocab, [tuple(merge) for merge in model["merges"]], unk_token="<unk>", **options)


def make(kind):
    """A tokenizers.Tokenizer of one kind, trained on CORPUS, with four special tokens, and one that is
    not."""
    model, trainer, split = {
        "byte level": (models.BPE(), trainers.BpeTrainer, pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(False, False, False)])),
        "metaspace": (models.BPE(), trainers.BpeTrainer, pre_tokenizers.Metaspace(prepend_scheme="first")),
        "byte fallback": (models.BPE(), trainers.BpeTrainer,
                          pre_tokenizers.Metaspace(prepend_scheme="never")),
        "unigram": (models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace()),
        "word piece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer,
                       pre_tokenizers.WhitespaceSplit()),
        "word level": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer,
                       pre_tokenizers.WhitespaceSplit()),
    }[kind]
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = split
    more = {"unk_token": "<unk>"} if kind == "unigram" else {}
    if kind == "byte level":
        more = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False, **more)
    made.train_from_iterator(CORPUS, trainer)
    made.decoder = {"byte level": decoders.ByteLevel(), "unigram": decoders.Metaspace(),
                    "metaspace": decoders.Metaspace(prepend_scheme="first"), "word level": None,
                    "word piece": decoders.WordPiece(), "byte fallback": decoders.Sequence([
                        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                        decoders.Strip(" ", 1, 0)])}[kind]
    if kind == "byte fallback":  # as in Llama 2's file
        made.model, made.pre_tokenizer = bpe(made, byte_fallback=True, fuse_unk=True), None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                                normalizers.Replace(" ", "\u2581")])
    if kind == "byte level":
        made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                        special_tokens=[("<s>", 1), ("</s>", 2)])
    made.enable_truncation(5)
    made.enable_padding(length=4)
    return made


@pytest.fixture(scope="module", params=[
    "byte level", "metaspace", "byte fallback", "unigram", "word piece", "word level"])
def hub(request, tmp_path_factory):
    """(a file of one kind, the library's reader of it as we use it)"""
    path = tmp_path_factory.mktemp("hub") / "tokenizer.json"
    library = make(request.param)
    library.save(str(path))
    library = type(library).from_file(str(path))  # scores are rounded, which decides between equal pieces
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    return path, library


PLAIN = [*TEXTS[:7], TEXTS[8], *(text[5000:9000] for text in CORPUS), "    four <tool> spaces <tool>"]


def test_every_kind_of_file(hub):
    """A model would read other tokens than those it was trained on: cut, padded, or with special tokens
    around."""
    path, library = hub
    encoding = HubEncoding(path)
    expected = [library.encode(text, add_special_tokens=False).ids for text in PLAIN]
    assert max(map(len, expected)) > 500 and encoding.encode_ordinary_batch(PLAIN) == expected
    assert encoding.n_vocab == max(library.get_vocab().values()) + 1 == library.get_vocab_size()
    for text, ids in zip(PLAIN, expected):
        assert encoding.encode_ordinary(text) == ids
        assert encoding.decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert library.token_to_id("<tool>") in expected[-1]
    if "byte" in library.model.__class__.__name__:
        assert encoding.decode(expected[2]) == PLAIN[2]
    assert encoding.start() == [1]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert theirs(PLAIN, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("text", ["</s>", "a</s>b", "x </s> y", "<|turn|></s>\n<s>", "end</s>", " <|turn|> "])
def test_special_tokens_are_text(hub, text):
    """A text could end an answer: in some vocabularies special tokens are words, which the library finds in a
    text."""
    path, library = hub
    encoding = HubEncoding(path)
    ids = encoding.encode_ordinary(text)
    assert ids and ids == encoding.encode_ordinary_batch([text, "x"])[0]
    assert {1, 2, 3}.isdisjoint(ids)  # 0, the unknown token, is what unknown characters are
    found = library.encode(text, add_special_tokens=False).ids
    assert ids == found or not {1, 2, 3}.isdisjoint(found)
    if 0 not in ids:
        assert "".join(encoding.decode(ids).split()) == "".join(text.split())


def test_tokens_as_text(hub):
    """Special tokens that a model writes would vanish from what is shown; an unknown id would, too."""
    encoding = HubEncoding(hub[0])
    encoding.add({"<|ours|>": encoding.n_vocab + 3})
    a, = encoding.encode_ordinary("a")[-1:]
    text = encoding.decode([a, 2, a, encoding.n_vocab - 1, a]).replace(" ", "")
    assert text == "a</s>a<|ours|>a"
    for unknown in (encoding.n_vocab - 2, encoding.n_vocab, -1, 2 ** 40):
        with pytest.raises(KeyError, match=f"^{unknown}$"):
            encoding.decode([a, unknown])


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_growing_text(kind, tmp_path):
    """Half of a character would be shown, or other text than what was shown before."""
    make(kind).save(str(tmp_path / "tokenizer.json"))
    encoding, text = HubEncoding(tmp_path / "tokenizer.json"), "wait \u2603 a \U0001f600 b"
    ids = encoding.encode_ordinary(text)
    shown = [encoding.decode(ids[:end]) for end in range(len(ids) + 1)]
    assert shown[-1] == text and sum(one.endswith("\ufffd") for one in shown) == 5
    assert all(text.startswith(one) for one in shown if not one.endswith("\ufffd"))


def test_hard_texts(hub):
    """A text that UTF-8 cannot hold, or a million spaces, would end the program."""
    encoding = HubEncoding(hub[0])
    assert encoding.encode_ordinary("a\ud800b") == encoding.encode_ordinary("a\ufffdb")
    assert encoding.encode_ordinary_batch(["\ud83d\ude00"]) == [encoding.encode_ordinary("\U0001f600")]
    ids = encoding.encode_ordinary(" " * 1_000_000 + "x")
    assert encoding.decode(ids).endswith("x")


def edited(path, **changes):
    """Rewrite a tokenizer.json with other values; those of its model as model_NAME."""
    about = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        place = about["model"] if key.startswith("model_") else about
        place[key.removeprefix("model_")] = value
    path.write_text(json.dumps(about), encoding="utf-8")


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "not text": lambda path: path.write_bytes(b"\xff\xfe"),
    "list": lambda path: path.write_text("[]"),
    "no model": lambda path: path.write_text('{"version": "1.0"}'),
    "unknown model": lambda path: edited(path, model_type="Mystery"),
    "negative id": lambda path: edited(path, model_vocab={"a": -1}),
    "same ids": lambda path: edited(path, added_tokens=[], model_vocab={"a": 1, "b": 1}, model_merges=[]),
    "no tokens": lambda path: edited(path, added_tokens=[], model_vocab={}, model_merges=[]),
    "merge of nothing": lambda path: edited(path, model_merges=["q \u2603"]),
    "regex": lambda path: edited(path, pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}),
    "panic": lambda path: edited(path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name, tmp_path):
    """A damaged file would end in a traceback, or in a panic that no `except Exception` sees."""
    path = tmp_path / "tokenizer.json"
    make("byte level").save(str(path))
    DAMAGE[name](path)
    with pytest.raises(UserError, match="^[^\n]*tokenizer.json: malformed tokenizer.json: [^\n]+$"):
        HubEncoding(path)


def test_what_the_library_refuses_later(tmp_path):
    """A file that can be read but not used would end in a traceback or a panic."""
    path = tmp_path / "tokenizer.json"
    make("byte level").save(str(path))
    edited(path, decoder={"type": "Strip", "content": "a", "start": 2 ** 62, "stop": 2 ** 62})
    with pytest.raises(UserError, match="tokenizer.json: it cannot decode: [^\n]*$"):
        HubEncoding(path).decode(HubEncoding(path).encode_ordinary("a"))
    edited(path, added_tokens=[], post_processor=None,
           model={"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}})
    with pytest.raises(UserError, match="tokenizer.json: it cannot encode this text: .*UNK"):
        HubEncoding(path).encode_ordinary("b")


@pytest.mark.parametrize("name", ["nowhere.json", ""])
def test_no_file(tmp_path, name):
    """A missing file, or a folder, would end in a traceback."""
    with pytest.raises(UserError, match="^.*: (No such file|Is a directory).*; give a tokenizer.json$"):
        HubEncoding(tmp_path / name)


def test_ids_with_gaps(tmp_path):
    """The model's rows would be too few, or ours would take ids of the file's."""
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "[": 4, "]": 9}, unk_token="a")).save(str(path))
    assert HubEncoding(path).n_vocab == 10
    found = named_encoding(str(tmp_path))
    assert found.question_start == 10 and found.vocab_size == 15
    assert found.number(4)[0] == found.open_bracket == 4
    assert HubEncoding(path).encode_template("[") == [4]


def test_dropout(tmp_path):
    """The same document would be other tokens each time, and its memory another."""
    path = tmp_path / "tokenizer.json"
    make("byte level").save(str(path))
    whole = HubEncoding(path).encode_ordinary(CORPUS[0])
    edited(path, model_dropout=0.5)
    assert HubEncoding(path).encode_ordinary(CORPUS[0]) == whole


@pytest.mark.parametrize("number_tokens", [False, True])
def test_our_tokens_behind_a_file(number_tokens, tmp_path):
    """A backbone's tokenizer with our special tokens would lose its own ids, or those tokens, when it is
    saved."""
    path = tmp_path / "backbone" / "tokenizer.json"
    path.parent.mkdir()
    library = make("byte level")
    library.add_special_tokens(["<|end|>"])  # as Phi has it: another token than ours
    library.save(str(path))
    plain, ours = HubEncoding(path), named_encoding(str(path.parent), number_tokens)
    assert ours.question_start == plain.n_vocab and ours.end == plain.n_vocab + 4
    assert ours.vocab_size == plain.n_vocab + 5 + number_tokens * 768
    assert ours.decode([ours.retrieve, plain.ids["<|end|>"], ours.end]) == "<|retrieve|><|end|><|end|>"
    ours.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == path.read_bytes()
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint() == ours.fingerprint() and again.vocab_size == ours.vocab_size
    assert again.extends(ours) and ours.extends(again) and again.first_number == ours.first_number
    spaced = tmp_path / "spaced" / "tokenizer.json"  # the same in a file of other bytes
    spaced.parent.mkdir()
    spaced.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    assert named_encoding(str(spaced.parent), number_tokens).extends(ours)
    text = "a document [7] <|question|><|end|> here"
    assert again.encode(text) == ours.encode(text) == plain.encode_ordinary(text)
    spelled = again.decode(again.document(7, again.encode(text)))
    assert spelled.endswith(text + again.decode(again.number(7)))
    assert len(again.number(7)) == (5 if number_tokens else 3)
    assert named_encoding(str(tmp_path / "saved"), number_tokens).fingerprint() == ours.fingerprint()
    other = train_encoding(["some text"], 300)  # another tokenizer in the same folder, and back
    other.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint() == other.fingerprint() != ours.fingerprint()
    assert not other.extends(ours) and not ours.extends(other)
    ours.save(tmp_path / "saved")
    edited(tmp_path / "saved" / "tokenizer.json", normalizer=None)
    with pytest.raises(UserError, match="not the one that was saved"):
        Tokenizer.load(tmp_path / "saved")


def test_fingerprints_of_files(tmp_path):
    """A bank would be asked with a tokenizer that spells the same text otherwise."""
    found = set()
    for i, changes in enumerate((dict(), dict(normalizer=None), dict(model_ignore_merges=True))):
        path = tmp_path / str(i) / "tokenizer.json"
        path.parent.mkdir()
        make("byte level").save(str(path))
        edited(path, **changes)
        for number_tokens in (False, True):
            found.add(named_encoding(str(path.parent), number_tokens).fingerprint())
    assert len(found) == 6
