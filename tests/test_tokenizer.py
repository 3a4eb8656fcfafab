"""Text <-> tokens, and the spelling of documents, questions and numbers."""
import base64
import json
import sys

import pytest
import requests
import tiktoken

from common import UserError
from tokenizer import SPECIAL_TOKENS, Tokenizer, named_encoding, train_encoding

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
    """A document that contains the characters of a special token could end an answer or a retrieval, or name a document."""
    tokenizer = number_tokenizer
    special = {tokenizer.encoding.encode_single_token(token) for token in (*SPECIAL_TOKENS, text)}
    assert len(special) == 5 + (text not in SPECIAL_TOKENS)
    for spelled in (text, f"a{text}b", f" {text}\n", text + text):
        assert special.isdisjoint(tokenizer.encode(spelled))
        assert special.isdisjoint(tokenizer.encode_batch([spelled])[0])


@pytest.mark.parametrize("kind,numbers", [("tokenizer", 0), ("number_tokenizer", 768)])
def test_special_ids(request, kind, numbers):
    """The names of the special tokens would not mean the tokens of these names, or number tokens would lie between them."""
    tokenizer = request.getfixturevalue(kind)
    ids = [tokenizer.question_start, tokenizer.retrieve, tokenizer.stop, tokenizer.end_of_retrieval, tokenizer.end]
    assert ids == list(range(tokenizer.vocab_size - numbers - 5, tokenizer.vocab_size - numbers))
    assert tokenizer.decode(ids) == "<|question|><|retrieve|><|stop|><|end_of_retrieval|><|end|>"
    assert tokenizer.first_number == (ids[-1] + 1 if numbers else None)


@pytest.mark.parametrize("number", [0, 7, 12, 305, 10_000, 9_999_999])
@pytest.mark.parametrize("text", ["Hello.", "[3]. 5", "", "12"])
def test_spelling(tokenizer, number, text):
    """Documents would be spelled otherwise than the model was trained to read and to name them."""
    ids, spelled = tokenizer.encode(text), tokenizer.number(number)
    document, appended, question = tokenizer.document(number, ids), tokenizer.appended(number, ids), tokenizer.question(ids)
    assert tokenizer.decode(spelled) == f"[{number}]"
    assert tokenizer.decode(document) == f"[{number}]. {text}[{number}]"
    assert tokenizer.decode(appended) == f"[{number}]. {text}\n"
    assert tokenizer.decode(question) == f"<|question|>{text}\n"
    assert document[:len(spelled)] == document[-len(spelled):] == appended[:len(spelled)] == spelled
    assert spelled[0] == tokenizer.open_bracket and spelled.count(tokenizer.open_bracket) == 1
    assert question[0] == tokenizer.question_start and question[1:-1] == ids


@pytest.mark.parametrize("number,places", [
    (0, [0, 0, 0]), (7, [7, 0, 0]), (255, [255, 0, 0]), (256, [0, 1, 0]), (65_535, [255, 255, 0]), (65_536, [0, 0, 1]),
    (4_729_103, [15, 41, 72]),  # 72 * 65,536 + 41 * 256 + 15
    (16_777_215, [255, 255, 255])])
def test_number_tokens(number_tokenizer, number, places):
    """A number would not be its three places in base 256, lowest first, between brackets: wherever it is written, the same five tokens."""
    spelled, ids = number_tokenizer.number(number), number_tokenizer.encode("[3]. 5")
    assert number_tokenizer.decode(spelled) == "[" + "".join(f"<|{place}:{digit}|>" for place, digit in enumerate(places)) + "]"
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
    with pytest.raises(UserError, match=f"^document number {number}: this tokenizer spells numbers below 16,777,216$"):
        number_tokenizer.number(number)
    assert tokenizer.decode(tokenizer.number(number)) == f"[{number}]"  # digits go on


@pytest.mark.parametrize("kind,allowed,message", [
    ("tokenizer", (0,), "it must be 0, since it spells numbers in digits"), ("number_tokenizer", (0, 5), "it must be 0 or 5$")])
def test_check_number_chunk(request, kind, allowed, message):
    """A model's last chunk would hold more or less than the number that closes a document."""
    tokenizer = request.getfixturevalue(kind)
    for size in range(8):
        if size in allowed:
            tokenizer.check_number_chunk(size)
        else:
            with pytest.raises(UserError, match=f"^model.number_chunk is {size}; with this tokenizer {message}"):
                tokenizer.check_number_chunk(size)


def test_without_number_tokens(tokenizer, number_tokenizer):
    """Numbers would be spelled in tokens that nobody asked for; or the digits of a text would be taken for a number's tokens."""
    assert tokenizer.first_number is None and tokenizer.number_length == 0
    assert tokenizer.number(305) == tokenizer.encode("[305]")
    text = number_tokenizer.encode("see [305] and [7]")
    assert number_tokenizer.decode(text) == "see [305] and [7]" and max(text) < number_tokenizer.question_start


@pytest.mark.parametrize("before,after", [("", ""), ("see ", " there"), ("a", "b"), ("1", "2"), ("(", ")."), ("\n", "\n")])
def test_numbers_are_spelled_alike_everywhere(tokenizer, before, after):
    """A number inside a text would be other tokens than the number that the model writes, and could not be copied."""
    assert tokenizer.encode(f"{before}[4071]{after}") == [*tokenizer.encode(before), *tokenizer.number(4071), *tokenizer.encode(after)]


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
    """A checkpoint's tokenizer would encode or spell numbers otherwise than the one that the model was trained with."""
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "a")
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert sorted(files_of(tmp_path / "a")) == ["tokenizer.tiktoken", "tokenizer_msa.json"]
    assert (loaded.vocab_size, loaded.end, loaded.open_bracket) == (tokenizer.vocab_size, tokenizer.end, tokenizer.open_bracket)
    assert loaded.encoding.name == tokenizer.encoding.name
    assert (loaded.first_number, loaded.number_length) == (tokenizer.first_number, tokenizer.number_length)
    assert [loaded.number(n) for n in (0, 300, 9_999_999)] == [tokenizer.number(n) for n in (0, 300, 9_999_999)]
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
    everything = list(range(tokenizer.vocab_size))
    assert loaded.decode(everything) == tokenizer.decode(everything)


def edit(name, **changes):
    """An edit of one file: of tokenizer_msa.json by keys (None removes one), of tokenizer.tiktoken by a function of its bytes."""
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
    "special id of a wrong type": edit("tokenizer_msa.json", special_tokens={token: "a" for token in SPECIAL_TOKENS}),
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
    assert [named.question_start, named.retrieve, named.stop, named.end_of_retrieval, named.end] == [257, 258, 259, 260, 261]
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
    assert (named.question_start, named.end, named.first_number, named.vocab_size) == (301, 305, 306, 306 + 768)
    assert named.number(513) == [ord("["), 306 + 1, 306 + 256 + 2, 306 + 512, ord("]")]
    assert named_encoding("gaps").vocab_size == 306


def test_named_encoding_with_gaps(monkeypatch, tmp_path):
    """An encoding whose ids have gaps, as those of cl100k_base and o200k_base, could not be saved and loaded."""
    base = tiktoken.Encoding("gaps", pat_str=r"\w+|\W", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 257, "<|endofprompt|>": 276})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: base)
    named = named_encoding("gaps")
    named.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == named.vocab_size == 282 and loaded.question_start == named.question_start == 277
    assert loaded.decode(loaded.document(12, [104])) == "[12]. h[12]"
    with pytest.raises(UserError, match="token id 256 is not in the vocabulary"):  # a model that is not yet trained may say it
        loaded.decode([104, 256])


def test_unknown_encoding():
    """A wrong name of an encoding would end in a traceback, or would not say which names there are."""
    with pytest.raises(UserError, match="encoding 'gpt1' is unknown: no folder with a tokenizer.json; and tiktoken knows .*gpt2"):
        named_encoding("gpt1")


@pytest.mark.parametrize("error", [requests.exceptions.ConnectionError, requests.exceptions.HTTPError, TimeoutError])
def test_encoding_without_a_network(monkeypatch, error):
    """Without a network the user would get a page of tracebacks instead of the way out."""
    def offline(name):
        raise error("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=f"'gpt2' could not be downloaded .{error.__name__}.; connect once, or train one"):
        named_encoding("gpt2")


def test_encoding_without_our_special_tokens():
    """An encoding that cannot spell a retrieval would be accepted."""
    encoding = tiktoken.Encoding("plain", pat_str=r"\w+|\W", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|end|>": 256, "<|stop|>": 257})
    with pytest.raises(UserError, match="plain: it lacks the special tokens <|question|>, <|retrieve|>, <|end_of_retrieval|>$"):
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
        with pytest.raises(UserError, match=f"vocab_size is {size}; .* at least {1029 if number_tokens else 261}"):
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
    with pytest.raises(UserError, match=f"^token id {token} is not in the vocabulary of {tokenizer.vocab_size} tokens"):
        tokenizer.decode([0, token])
