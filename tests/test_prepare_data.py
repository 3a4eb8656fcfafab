"""Your own questions, the files of prepared data, and the samples made of them."""
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch

import prepare_data
from common import UserError
from documents import read_documents
from pools import ARRAYS, Pools, Ragged, RaggedWriter, array_types, collate, draw_numbers
from prepare_data import DataConfig
from tasks import make_pool
from tokenizer import Tokenizer
from training_sets import training_questions

# ------------------------------------------------------------------------------------------------------------
# The prepared data

def test_same_seed_same_bytes(run, tiny, tmp_path, files_of, monkeypatch):
    """Two people with the same seed would train on different data, or another seed would change nothing."""
    made = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert run(prepare_data, tiny / "tiny.toml", "--out", "data", "--seed", seed).code == 0
        made[name] = files_of("data")
    names = [f"{split}/{name}" for split in ("train", "validation") for name in ARRAYS]
    assert made["a"].keys() == {"about.json", "tokenizer.tiktoken", "tokenizer_msa.json"} | {
        f"{name}.{kind}" for name in names for kind in ("bin", "offsets")}
    assert made["a"] == made["b"]
    for name in ("train/documents.bin", "train/questions.bin", "train/answers.bin",
                 "validation/documents.bin"):
        assert made["a"][name] != made["c"][name]


@pytest.mark.parametrize("flags,settings", [
    ([], {}),
    (["--properties", 3, "--filler", 2, "--number-tokens", "--vocab-size", 1100],
     dict(properties=3, filler=2)),
    (["--needles", 0, "--chains", 0, "--properties", 1], dict(needles=0, chains=0, properties=1))])
def test_prepared_pools_are_the_generated_ones(words, run, tiny, tmp_path, flags, settings):
    """What is read back from disk would not be what was generated, or validation pools would hold training
    keys."""
    config, folder = DataConfig(**dict(needles=2, chains=1, noise=1) | settings), tiny / "data"
    if flags:
        folder = tmp_path / "data"
        assert run(prepare_data, tiny / "tiny.toml", "--out", folder, *flags).code == 0
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.number_length == (5 if "--number-tokens" in flags else 0)
    for split, stream, count in (("train", 0, 4), ("validation", 1, 2)):
        pools = Pools(folder / split, tokenizer.vocab_size)
        assert len(pools) == count
        for i in range(count):
            texts, questions = make_pool(words(), config, split, np.random.default_rng([1337, stream, i]))
            documents, asked = pools[i]
            assert [tokenizer.decode(document.tolist()) for document in documents] == texts
            found = [(tokenizer.decode(q.tolist()), tokenizer.decode(a.tolist()), tuple(map(tuple, gold)),
                      pooled)
                     for q, a, gold, pooled in asked]
            assert found == [(q.text, q.answer, q.gold, q.pooled) for q in questions]
            assert sum(pooled is True for *_, pooled in asked) == config.properties


# ------------------------------------------------------------------------------------------------------------
# Samples

TEXTS = ("Noise.", "The one for b is 12.", "a is the one for b.", "[1]. <|end|>", "c is teal.")


def make_small_pool(tokenizer, questions):
    """The TEXTS, and questions (text, answer, gold, pooled) whose samples are written by hand below."""
    def array(text):
        return np.array(tokenizer.encode(text), dtype=np.uint16)
    return [array(text) for text in TEXTS], [(array(question), array(answer), gold, pooled)
                                             for question, answer, gold, pooled in questions]


HOPS = [("b?", "12", [[1]], False), ("And a?", "12", [[2], [1]], False)]
COLOUR = ("c?", "teal", [[4]], True)


def spell(tokenizer, number):
    """A document's number as it is written, worked out here."""
    if not tokenizer.number_length:
        return f"[{number}]"
    return f"[<|0:{number % 256}|><|1:{number // 256 % 256}|><|2:{number // 65536}|>]"


def expected_samples(tokenizer, numbers):
    """(what routes, targets, positive, appended) of each sample of HOPS."""
    n1, n2 = spell(tokenizer, numbers[1]), spell(tokenizer, numbers[2])
    b, a = f"{n1}. The one for b is 12.\n", f"{n2}. a is the one for b.\n"
    one, two = "<|question|>b?\n", "<|question|>And a?\n"
    answer = "<|end_of_retrieval|>12<|end|>"
    return sorted([
        (one, f"{n1}<|stop|>", [1], []),
        (one + b, answer, [], [1]),
        (two, f"{n2}<|stop|>", [2], []),
        (two + a, f"{n1}<|stop|>", [1], [2]),
        (two + a + b, answer, [], [1, 2]),
    ])


def samples_in(tokenizer, batches, batch_tokens=2048):
    """(what routes, targets, positive, appended) of each sample of the batches, sorted; checks everything
    else in them."""
    found = []
    for batch in batches:
        tokens, routing, target = batch["tokens"], batch["routing_mask"], batch["target_mask"]
        assert tokens.shape == routing.shape == target.shape
        assert batch["positive"].shape == batch["appended"].shape == (len(tokens), len(TEXTS))
        assert batch["answers"].shape == (len(tokens),)
        assert tokens.dtype == routing.dtype == torch.int64
        assert {batch[name].dtype for name in batch if name not in ("tokens", "routing_mask")} == {torch.bool}
        assert len(tokens) == 1 or tokens.numel() <= batch_tokens
        for i in range(len(tokens)):
            begin, end = int((routing[i] > 0).sum()), int(target[i].nonzero().max()) + 1
            assert routing[i, :begin].all() and tokens[i, begin] == tokenizer.retrieve
            assert not target[i, begin]
            assert target[i, begin + 1:end].all() and not target[i, :begin].any()
            assert not tokens[i, end:].any()
            found.append((tokenizer.decode(tokens[i, :begin].tolist()),
                          tokenizer.decode(tokens[i, begin + 1:end].tolist()),
                          batch["positive"][i].nonzero().flatten().tolist(),
                          batch["appended"][i].nonzero().flatten().tolist()))
            segments, seen = routing[i, :begin], found[-1][3]  # the question's, and one of each appended text
            assert (segments.diff() >= 0).all() and segments.unique().tolist() == [*range(1, 2 + len(seen))]
            said = [tokenizer.decode(tokens[i, :begin][segments == n].tolist())
                    for n in range(2, 2 + len(seen))]
            assert sorted(d for text in said for d in range(len(TEXTS)) if TEXTS[d] in text) == seen
            wanted = found[-1][1]
            assert batch["answers"][i] == wanted.startswith("<|end_of_retrieval|>")
            assert batch["answers"][i] != wanted.endswith("<|stop|>")
        # no more padding than needed
        assert max(int(row.nonzero().max()) for row in target) == tokens.size(1) - 1
    return sorted(found)


@pytest.mark.parametrize("kind", ["tokenizer", "number_tokenizer"])
@pytest.mark.parametrize("batch_tokens,batches", [(2048, 1), (120, None), (1, 5)])
def test_collate_spells_samples(request, kind, batch_tokens, batches):
    """The model would be trained on other spellings, targets, routing tokens or positives than inference
    uses."""
    tokenizer = request.getfixturevalue(kind)
    spelled, numbers, made = collate(make_small_pool(tokenizer, HOPS), tokenizer, 10_000_000,
                                     np.random.default_rng(5), batch_tokens)
    expected = [f"{spell(tokenizer, n)}. {text}{spell(tokenizer, n)}" for n, text in zip(numbers, TEXTS)]
    assert [tokenizer.decode(document.tolist()) for document in spelled] == expected
    assert all(document.dtype == np.int64 and document.ndim == 1 for document in spelled)
    # every sample once
    assert samples_in(tokenizer, made, batch_tokens) == expected_samples(tokenizer, numbers)
    assert len(made) == batches if batches else 1 < len(made) < 5


def test_collate_of_pooled_questions(tokenizer):
    """A question that the memory itself answers would be taught to name, to answer from its text always or
    never, or to route nowhere."""
    pool, again = make_small_pool(tokenizer, [HOPS[0], COLOUR, HOPS[1]]), 0
    for seed in range(400):
        _, numbers, batches = collate(pool, tokenizer, 10_000_000, np.random.default_rng(seed))
        answer = "<|end_of_retrieval|>teal<|end|>"
        once = ("<|question|>c?\n", answer, [4], [])
        text = (f"<|question|>c?\n[{numbers[4]}]. c is teal.\n", answer, [], [4])
        found, hops = samples_in(tokenizer, batches), expected_samples(tokenizer, numbers)
        assert found in (sorted([*hops, once]), sorted([*hops, once, text]))
        again += text in found
    assert abs(again / 400 - 0.25) <= 4 * (0.1875 / 400) ** 0.5


@pytest.mark.parametrize("kind", ["tokenizer", "number_tokenizer"])
def test_collate_of_several_documents_a_hop(request, kind):
    """A comparison would be taught to name one of its documents, to name them in another order than inference
    appends them in, to route to those that were named before, or to read them in the order of the file."""
    tokenizer = request.getfixturevalue(kind)
    pool = make_small_pool(tokenizer,
                           [("b or c?", "b", [[4, 1]], False), ("All?", "12", [[2], [4, 1], [0]], False)])
    _, numbers, batches = collate(pool, tokenizer, 10_000_000, np.random.default_rng(3))
    n0, n1, n2, _, n4 = (spell(tokenizer, n) for n in numbers)
    both, a = f"{n1}. The one for b is 12.\n{n4}. c is teal.\n", f"{n2}. a is the one for b.\n"
    one, two, noise = "<|question|>b or c?\n", "<|question|>All?\n", f"{n0}. Noise.\n"
    assert samples_in(tokenizer, batches) == sorted([
        (one, f"{n1}{n4}<|stop|>", [1, 4], []),
        (one + both, "<|end_of_retrieval|>b<|end|>", [], [1, 4]),
        (two, f"{n2}<|stop|>", [2], []),
        (two + a, f"{n1}{n4}<|stop|>", [1, 4], [2]),
        (two + a + both, f"{n0}<|stop|>", [0], [1, 2, 4]),
        (two + a + both + noise, "<|end_of_retrieval|>12<|end|>", [], [0, 1, 2, 4]),
    ])


def test_a_number_limit_beyond_the_number_tokens(number_tokenizer):
    """Documents of a step could get numbers that cannot be spelled, and training end in a traceback."""
    with pytest.raises(UserError, match="spells numbers below 16,777,216"):
        for seed in range(50):
            collate(make_small_pool(number_tokenizer, HOPS), number_tokenizer, 10 ** 9,
                    np.random.default_rng(seed))


@pytest.mark.parametrize("count,limit", [(48, 10_000_000), (9, 10), (10, 10), (1, 1), (40, 101)])
def test_document_numbers(count, limit):
    """Documents of one step would share a number, or get one that the largest memory does not use."""
    for seed in range(20):
        numbers = draw_numbers(count, limit, np.random.default_rng(seed))
        assert len(numbers) == count and 0 <= numbers[0] and numbers[-1] < limit
        assert all(a < b for a, b in zip(numbers, numbers[1:]))


def test_numbers_of_all_widths():
    """Small memories have short numbers: a model trained on seven digits only could not name their
    documents."""
    rng = np.random.default_rng(0)
    widths = np.bincount([len(str(draw_numbers(1, 10_000_000, rng)[0])) for _ in range(3000)],
                         minlength=8)[1:] / 3000
    assert len(widths) == 7 and widths.min() > 0.10 and widths.max() < 0.19


def test_fewer_numbers_than_documents():
    """A limit below the number of documents would draw numbers for ever."""
    def too_long(*_):
        raise TimeoutError("still drawing")
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(UserError, match="number_limit"):
            draw_numbers(5, 4, np.random.default_rng(0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize("rows", [[], [[]], [[1], [], [2, 3, 60_000], []]])
def test_ragged(tmp_path, dtype, rows):
    """Rows would come back shifted, cut or of another type."""
    writer = RaggedWriter(tmp_path / "rows", dtype)
    for row in rows:
        writer.append(row)
    assert len(writer) == len(rows)
    writer.close()
    ragged = Ragged(tmp_path / "rows", dtype)
    assert [ragged[i].tolist() for i in range(len(ragged))] == rows
    assert all(ragged[i].dtype == dtype for i in range(len(rows)))


@pytest.mark.parametrize("vocab_size,dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_token_types(vocab_size, dtype):
    """Ids above 65,535 would wrap around."""
    assert [array_types(vocab_size)[name] for name in ARRAYS] == [dtype] * 3 + [np.int64] * 5


@pytest.mark.parametrize("name,cut", [("rows.bin", 4), ("rows.bin", 1), ("rows.bin", 16), ("rows.offsets", 8),
                                      ("rows.offsets", 24)])
def test_truncated_files(tmp_path, name, cut):
    """A copy that was cut short would be trained on, or end in a traceback."""
    writer = RaggedWriter(tmp_path / "rows", np.uint32)
    for row in ([1, 2, 3], [4]):
        writer.append(row)
    writer.close()
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "rows.")) + ".*run prepare_data.py again"):
        Ragged(tmp_path / "rows", np.uint32)


@pytest.mark.parametrize("name", ["rows.bin", "rows.offsets"])
def test_missing_file(tmp_path, name):
    """A missing file of the data would end in a traceback."""
    RaggedWriter(tmp_path / "rows", np.uint16).close()
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / name))}: no such file"):
        Ragged(tmp_path / "rows", np.uint16)


def test_incomplete_data(tiny, tmp_path):
    """Data that lost where its hops end would end in a traceback, or be read as other hops."""
    shutil.copytree(tiny / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "train").glob("hop_ends.*"):
        path.unlink()
    with pytest.raises(UserError, match="hop_ends.offsets: no such file; run prepare_data.py again$"):
        Pools(tmp_path / "data" / "train", 600)


@pytest.mark.parametrize("name", ["documents", "questions", "answers"])
def test_token_id_out_of_range(tiny, tokenizer, name):
    """An id outside the vocabulary would end in an index error inside the model (or, on a GPU, in a failed
    assertion)."""
    pools = Pools(tiny / "data" / "train", tokenizer.vocab_size)
    largest = int(max(getattr(pools, part).values.max() for part in ("documents", "questions", "answers")))
    setattr(pools, name, [np.array([largest + 1])] * 100)
    pools.vocab_size = largest + 1
    folder = re.escape(str(tiny / "data" / "train"))
    with pytest.raises(UserError, match=f"{folder}: pool 1 holds token id {largest + 1}, .* {largest};"):
        pools[1]
    pools.vocab_size = largest + 2
    pools[1]


@pytest.mark.parametrize("about", [b"{", b"[]", b"{}", b"\xff"])
def test_malformed_about(tiny, tmp_path, tokenizer, about):
    """A broken description of the data would end in a traceback."""
    (tmp_path / "about.json").write_bytes(about)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / 'about.json'))}: malformed"):
        Pools(tmp_path / "train", tokenizer.vocab_size)


def test_failure_keeps_the_old_data(run, tiny, tmp_path, files_of, monkeypatch):
    """A failed preparation would leave half of the new data, or nothing of the old."""
    out = tmp_path / "data"
    assert run(prepare_data, tiny / "tiny.toml", "--out", out).code == 0
    before = files_of(out)
    for args in (("--vocab-size", 200), ("--encoding", "nope"),
                 ("--documents", tmp_path / "none", "--questions", "none.jsonl")):
        assert run(prepare_data, tiny / "tiny.toml", "--out", out, *args).code == 2
        assert files_of(out) == before and [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(KeyboardInterrupt), prepare_data.replacing(out) as new:  # another process is at it
        refused = run(prepare_data, tiny / "tiny.toml", "--out", out)
        assert refused.code == 2 and "data: another process is preparing data there" in refused.error
        assert new.exists()
        raise KeyboardInterrupt
    assert files_of(out) == before
    assert run(prepare_data, tiny / "tiny.toml", "--out", out, "--pools", 5).code == 0
    assert len(Pools(out / "train", 600)) == 5 and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_other_folders_are_not_replaced(run, tiny, tmp_path, files_of):
    """`--out` of a folder that holds something else would delete it."""
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run(prepare_data, tiny / "tiny.toml", "--out", tmp_path)
    assert result.code == 2 and f"{tmp_path}: exists and is not prepared data" in result.error
    assert files_of(tmp_path) == {"thesis.txt": b"years of work"}


# ------------------------------------------------------------------------------------------------------------
# Your own questions

ALPHA = {"question": "What is alpha?", "answer": "one", "documents": ["a.txt"]}
BETA = {"question": "What is beta?", "answer": "two", "documents": ["sub/b.md:3", "a.txt"]}
BOTH = {"question": "Which is first?", "answer": "one", "documents": ["other0.txt", ["sub/b.md:3", "a.txt"]]}


@pytest.fixture
def own(tmp_path):
    """A folder of documents; sub/b.md is split in two."""
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("Alpha is one.\n")
    text = "A river is long and wide here.\n\nBeta is the one after alpha there.\n"
    (folder / "sub" / "b.md").write_text(text)
    for i in range(5):
        (folder / f"other{i}.txt").write_text(f"Nothing is said in {i}.\n")
    return tmp_path


def documents_of(own):
    return list(read_documents(own / "docs", lambda text: len(text.split()), 8))


def write_lines(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
                    encoding="utf-8")


def test_own_questions(run, own, tokenizer):
    """Your own data would be prepared with wrong documents or hops, without a question's documents, or with
    nothing to validate."""
    more = [ALPHA | {"question": f"Alpha, {i} times?", "pooled": i % 3 == 0} for i in range(30)]
    write_lines(own / "q.jsonl", [ALPHA, "", BETA, BOTH, *more])
    result = run(prepare_data, "--documents", own / "docs", "--questions", own / "q.jsonl", "--out",
                 own / "data",
                 "--vocab-size", 300, "--pools", 6, "--validation-pools", 2, "--max-document-tokens", 20,
                 "--documents-per-pool", 4, "--questions-per-pool", 16)
    assert result.code == 0, result.err
    own_tokenizer = Tokenizer.load(own / "data")
    def decode(tokens):
        return own_tokenizer.decode(tokens.tolist())
    alpha, beta, other = "Alpha is one.", "Beta is the one after alpha there.", "Nothing is said in 0."
    hops_of = {"What is beta?": [[beta], [alpha]], "Which is first?": [[other], [beta, alpha]]}
    stored, asked = {}, set()
    for split, count, questions in (("train", 6, 16), ("validation", 2, 1)):
        pools = Pools(own / "data" / split, own_tokenizer.vocab_size)
        assert len(pools) == count
        stored[split] = set(map(decode, pools.questions))
        for i in range(count):
            documents, rows = pools[i]
            texts = list(map(decode, documents))
            assert len(texts) == len(set(texts)) == 4 and len(rows) == questions
            for question, answer, gold, pooled in rows:
                text = decode(question)
                times = re.search(r"\d+", text)
                assert pooled == bool(times and int(times[0]) % 3 == 0)
                assert [[texts[document] for document in hop] for hop in gold] == hops_of.get(text, [[alpha]])
                assert decode(answer) == ("two" if text == "What is beta?" else "one")
                asked.add(text)
            collate(pools[i], own_tokenizer, 1000, np.random.default_rng(0))
    assert len(stored["train"] | stored["validation"]) == 33 and len(stored["validation"]) == 1
    assert not stored["train"] & stored["validation"] and hops_of.keys() <= asked


@pytest.mark.parametrize("line,message", [
    ("{", "not an object"), ("3", "not an object"), ("[]", "not an object"), ('"text"', "not an object"),
    ("null", "not an object"),
    ({"question": "What?", "answer": "one"}, "not an object with"),
    ({"question": "What?", "documents": ["a.txt"]}, "not an object with"),
    ({"answer": "one", "documents": ["a.txt"]}, "not an object .* with a question"),
    (ALPHA | {"documents": None}, "not an object with"),
    (ALPHA | {"documents": [3]}, "'3' names no document"),
    (ALPHA | {"documents": []}, "'documents' is empty"),
    (ALPHA | {"documents": ["a.txt", []]}, "'documents' is empty, or"),
    (ALPHA | {"documents": [[["a.txt"]]]}, r"\"\['a.txt'\]\" names no document"),
    (ALPHA | {"documents": [["a.txt", "sub/b.md:1"]], "pooled": True},
     "'pooled' is True; .*only with one document"),
    (ALPHA | {"documents": ["none.txt"]}, "'none.txt' names no document"),
    (ALPHA | {"documents": ["a.txt:7"]}, "'a.txt:7' names no document"),
    (ALPHA | {"documents": ["sub/b.md"]}, "'sub/b.md' names 2 documents, .*\"notes.md:12\""),
    (BETA | {"pooled": True}, "'pooled' is True; true or false, and true only with one document"),
    (ALPHA | {"pooled": 1}, "'pooled' is 1; true or false"),
    (ALPHA | {"pooled": 0}, "'pooled' is 0; true or false"),
    (ALPHA | {"pooled": "true"}, "'pooled' is 'true'; true or false"),
    (ALPHA | {"pooled": None}, "'pooled' is None; true or false"),
])
def test_malformed_questions(own, line, message):
    """The user would not learn which line of the file of questions is wrong, and why."""
    documents = documents_of(own)
    write_lines(own / "q.jsonl", [ALPHA, BETA, "", line, ALPHA])
    with pytest.raises(UserError, match=f"^{re.escape(str(own / 'q.jsonl'))}:4: {message}"):
        training_questions(own / "q.jsonl", documents)


@pytest.mark.parametrize("write,message", [
    (lambda path: None, "No such file or directory; expected a file of one object a line"),
    (lambda path: path.write_bytes(b"\xff\xfe"), "holds 0 questions; at least 2"),
    (lambda path: path.write_text(""), "holds 0 questions; at least 2"),
    (lambda path: write_lines(path, [ALPHA]), "holds 1 questions; at least 2"),
])
def test_files_without_questions(own, write, message):
    """A file of questions that holds too few, or nothing readable, would end in a traceback."""
    documents = documents_of(own)
    write(own / "q.jsonl")
    with pytest.raises(UserError, match=f"^{re.escape(str(own / 'q.jsonl'))}: {message}"):
        training_questions(own / "q.jsonl", documents)


def test_questions_as_windows_writes_them(own):
    """A byte order mark, or a line separator inside a string, would make a correct file malformed."""
    documents = documents_of(own)
    odd = ALPHA | {"question": "Two\u2028lines?"}
    lines = [json.dumps(question, ensure_ascii=False) for question in (ALPHA, odd, BETA)]
    (own / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    texts = [question.text for question in training_questions(own / "q.jsonl", documents)]
    assert texts == ["What is alpha?", "Two\u2028lines?", "What is beta?"]


def test_answers_in_a_list(own):
    """A file that eval.py asks would not do for training."""
    listed = {name: value for name, value in ALPHA.items() if name != "answer"}
    write_lines(own / "q.jsonl", [listed | {"answers": ["one", "1"]}, BETA])
    assert training_questions(own / "q.jsonl", documents_of(own))[0].answer == "one"


def test_what_eval_asks_can_be_trained_on(own, capsys):
    """A number as an answer, two lines of one document, or a question that nothing answers would end the
    preparation of a file that eval.py takes."""
    no_answer = {"question": "What is delta?", "documents": []}
    write_lines(own / "q.jsonl", [
        ALPHA | {"answer": 42}, no_answer, no_answer | {"answers": []}, no_answer | {"answer": ""},
        ALPHA | {"question": "Is it?", "answer": "unanswerable"},
        ALPHA | {"question": "Which?", "answer": None, "answers": ["teal"]},
        ALPHA | {"question": "Both?", "documents": ["a.txt", ["sub/b.md:1", "a.txt"]]},
        ALPHA | {"question": "Again?", "documents": ["a.txt", "a.txt:1"]}])
    number, which, both, again = training_questions(own / "q.jsonl", documents_of(own))
    assert number.answer == "42" and which.answer == "teal"
    assert number.gold == again.gold and len(again.gold) == 1
    assert both.gold[0] == number.gold[0] and len(both.gold) == 2 and both.gold[0] != both.gold[1]
    assert capsys.readouterr().out == f"{own / 'q.jsonl'}: left out: nothing answers (4)\n"
