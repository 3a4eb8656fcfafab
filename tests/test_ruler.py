"""RULER's needle tasks: their definitions, their documents, the set to train on, and the script."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

import needles
import ruler
from common import UserError
from memory import Memory
from needles import (
    NOISE,
    PACKED,
    RULER,
    Draw,
    Haystack,
    Task,
    draw_question,
    essay_passages,
    pack_sentences,
)
from prompts import load_checkpoint
from sync import encode_texts

WORD, NUMBER = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
# RULER's scripts/synthetic.yaml, written down once more: haystack, key, value, keys, values, keys asked
DEFINITIONS = dict(single_1=("noise", WORD, NUMBER, 1, 1, 1), single_2=("essays", WORD, NUMBER, 1, 1, 1),
                   single_3=("essays", WORD, UUID, 1, 1, 1), multikey_1=("essays", WORD, NUMBER, 4, 1, 1),
                   multikey_2=("needles", WORD, NUMBER, 1, 1, 1), multikey_3=("needles", UUID, UUID, 1, 1, 1),
                   multivalue=("essays", WORD, NUMBER, 1, 4, 1), multiquery=("essays", WORD, NUMBER, 4, 1, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty short essays; tests have some of them, and training others."""
    folder = tmp_path_factory.mktemp("essays")
    for i in range(60):
        text = " ".join(f"Essay {i} says {i * j % 97} things about number {j}." for j in range(25))
        (folder / f"{i}.txt").write_text(text.replace("things", "things\n\n"))
    return folder


def test_definitions(words):
    """A task would ask for another number of keys or values, or of another type; questions would not be
    RULER's; a key that training may know would be asked about."""
    pairs = {words().key(int(pair)) for pair in np.flatnonzero(words().split == 0)}
    assert [*RULER] == [*DEFINITIONS]
    for name, (haystack, key, value, keys, values, asked) in DEFINITIONS.items():
        draw, kind = Draw(words(), "test", np.random.default_rng(3)), "uuid" if value == UUID else "number"
        assert RULER[name].haystack == haystack
        for _ in range(20):
            question = draw_question(RULER[name], draw)
            stated = [re.fullmatch(rf"One of the special magic {kind}s for ({key}) is: ({value})\.", needle)
                      for needle in question.needles]
            said = [(match[1], match[2]) for match in stated]
            assert len(said) == keys * values and len({key for key, _ in said}) == keys
            named = list(dict.fromkeys(key for key, _ in said[:asked * values]))
            assert question.answers == [value for _, value in said if _ in named] == [
                value for _, value in said[:asked * values]]
            subject = {1: "{}", 4: "{}, {}, {}, and {}"}[asked].format(*named)
            begin = f"What is the special magic {kind}" if asked * values == 1 else (
                f"What are all the special magic {kind}s")
            assert question.text == f"{begin} for {subject} mentioned in the provided text?"
            assert key == UUID or {key for key, _ in said} <= pairs


def test_keys_run_out(words):
    """A haystack of more needles than there are keys would be drawn for ever."""
    draw = Draw(words(), "test", np.random.default_rng(3))
    assert draw.most == (words().split == 0).sum()
    draw.most = 1
    key = draw.key("words")
    draw.used |= {draw.words.key(pair) for pair in range(len(draw.pairs))}
    with pytest.raises(UserError, match=f"no other key like '{key}'; ask for fewer needles"):
        draw.like(key)
    with pytest.raises(UserError, match="there are 1 keys of two words; ask for a smaller memory"):
        draw.key("words")


def test_passages(folder):
    """A word would be lost or stand twice, a document be longer than it may, or tests would show what
    training has seen."""
    long = "x" * (2 * PACKED + 7)
    for text in ("", "One.", "A b! C d? E.", f"Before. {long} after. {'many words ' * 90}End", long,
                 " ".join((folder / "7.txt").read_text().split())):
        found = pack_sentences(text)
        assert "".join("".join(passage) for passage in found).replace(" ", "") == text.replace(" ", "")
        assert all(0 < len(" ".join(passage)) <= PACKED for passage in found)
        if long not in text:
            assert " ".join(" ".join(passage) for passage in found).split() == text.split()
    assert pack_sentences("A b! C d? E.") == [["A b!", "C d?", "E."]]
    sources = {split: {passage[0].split()[1] for passage in essay_passages(str(folder), split)
                       if passage[0].startswith("Essay")} for split in ("train", "test")}
    assert sources["train"] and not sources["train"] & sources["test"]
    assert len(sources["train"] | sources["test"]) == 60
    with pytest.raises(UserError, match="none: no such folder"):
        essay_passages(str(folder / "none"), "test")


def test_haystacks(words, folder, tokenizer):
    """A shorter memory would not be part of a longer one, lengths would not be what they say, or a needle
    would hide nowhere, or push a sentence out."""
    for task in (Task("noise"), Task(), Task("needles", "uuids", "uuids")):
        def make(task=task):
            return Haystack(task, Draw(words(), "test", np.random.default_rng(5)), str(folder))
        haystack = make()
        texts, numbers, ends, counts = ruler.grow(haystack, tokenizer, [900, 3000, 60000], 8)
        exact = np.cumsum([len(tokenizer.document(n, tokenizer.encode(text)))
                           for n, text in zip(numbers, texts)])
        assert sorted(numbers) == list(range(len(texts))) == list(range(counts[-1]))
        for length, count in zip((900, 3000, 60000), counts):
            assert exact[count - 1] <= length + 2 * count  # a number may have a digit more
            assert ends[count - 1] <= length < ends[count]
        again = make()
        again.grow(counts[1])
        assert [" ".join(s) for s in again.sentences] == texts[:counts[1]]
        hidden = haystack.hide("A needle.", 3, np.random.default_rng(0))
        assert hidden.replace("A needle.", "").split() == (texts[3].split() if task == Task() else [])
        assert len({*texts}) == {"noise": 1, "needles": len(texts)}.get(task.haystack, len({*texts}))
        if task == Task():  # 60,000 tokens are more than there is: it begins again
            assert len({*texts}) == len(haystack.passages) < len(texts)
        if task.haystack == "noise":
            assert {*texts} == {NOISE} == {"The grass is green. The sky is blue. The sun is yellow. "
                                           "Here we go. There and back again."}


def test_with_documents(checkpoint):
    """A question would be asked of a memory in which its needles stand elsewhere, or beside what they
    replaced."""
    model, tokenizer = load_checkpoint(checkpoint, "cpu")
    texts = [tokenizer.encode("a word " * n) for n in (3, 40, 1, 17, 60, 5, 5)]
    memory, _ = encode_texts(model, tokenizer, texts)
    for places in ([0], [6], [2, 3], [0, 1, 6], [1, 3, 5], list(range(7))):
        new = [tokenizer.encode("another one " * (7 * place + 1)) for place in places]
        own, _ = encode_texts(model, tokenizer, new, places)
        whole = [new[places.index(i)] if i in places else text for i, text in enumerate(texts)]
        expected, _ = encode_texts(model, tokenizer, whole)
        found = memory.with_documents(places, own)
        assert found.numbers == expected.numbers and torch.equal(found.offsets, expected.offsets)
        for name in ("keys", "values", "routing_keys"):
            for a, b in zip(getattr(found, name), getattr(expected, name)):
                assert torch.allclose(a, b, atol=1e-6)


def test_set_to_train_on(words, folder, run, tmp_path, monkeypatch):
    """An answer would not stand in its document, keys or haystacks of the test would be trained on, or a
    question that has an answer be called impossible."""
    monkeypatch.setattr(needles, "Words", words)
    result = run(needles, "--out", tmp_path, "--groups", 80, "--essays", folder)
    assert result.code == 0, result.err
    read = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    texts = {row["_id"]: row["text"] for row in read("corpus.jsonl")}
    gold = {}
    for line in (tmp_path / "qrels/train.tsv").read_text().splitlines()[1:]:
        question, document, _ = line.split("\t")
        gold.setdefault(question, []).append(document)
    trained = {words().key(int(pair)) for pair in np.flatnonzero(words().split == 2)}
    counts, whole = set(), "\n".join(texts.values())
    for row in read("queries.jsonl"):
        values = row["answers"][0].split("\n")
        counts.add(len(values))
        keys = re.findall(f"{UUID}|{WORD}", row["text"])
        assert len(values) == len(gold[row["_id"]]) and len(keys) in (1, len(values))
        for value, document in zip(values, gold[row["_id"]]):  # exactly the values that its documents say
            said = {found[1] for key in keys
                    for found in re.finditer(rf" for {key} is: (\S+)\.(?= |$)", texts[document])}
            assert said == {value}
        for key in keys:
            assert whole.count(f" for {key} is: ") == len(values) / len(keys)
            assert re.fullmatch(UUID, key) or key in trained
    assert counts == {1, 2, 3, 4}
    held = {texts[ids[0]].count("special magic") for ids in gold.values() if len(ids) == 4}
    assert held >= {1, 2} and max(held) <= 5
    for row in read("impossible.jsonl"):
        (key,) = re.findall(f"{UUID}|{WORD}", row["text"])
        assert f" for {key} is" not in whole and row["document"] in texts and row["split"] == "train"
    tested = {" ".join(passage) for passage in essay_passages(str(folder), "test")}
    assert "The grass is green" not in whole and not tested & {*texts.values()}


def changed_weights(folder):
    """The weights of a folder, of which one is another."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.1
    return save(weights)


def test_script(words, folder, run, tmp_path, monkeypatch):
    """A model that can read needles would not find them, what is measured once would be measured again, or
    rows of other questions be taken for these."""
    monkeypatch.setattr(ruler, "Words", words)
    path, demo = tmp_path / "rows.json", Path(ruler.__file__).parent / "checkpoints/demo"
    args = ["--checkpoint", demo, "--lengths", "3k,6k", "--questions", 2, "--essays", folder, "--json", path,
            "--device", "cpu", "--dtype", "float32"]
    result = run(ruler, *args, "--tasks", "single_1,multikey_2", "--methods", "none,oracle,memory")
    assert result.code == 0, result.err
    rows = json.loads(path.read_text())
    score = {(row["task"], row["method"], row["length"]): row["score"] for row in rows}
    for task in ("single_1", "multikey_2"):
        assert score[task, "none", 0] == 0 and score[task, "oracle", 0] == 100
        assert score[task, "memory", 3072] == score[task, "memory", 6144] == 100
    assert all(row["recall_at_k"] == row["named"] == 100 for row in rows if row["method"] == "memory")
    batches, copied, serve, copy = [], [], ruler.run, Memory.with_documents
    monkeypatch.setattr(Memory, "with_documents", lambda *args: copied.append(0) or copy(*args))

    def served(model, tokenizer, loops, config, batch):
        before, loops = len(copied), [*loops]
        assert len(copied) == before  # no memory is copied before its question is asked
        batches.append(batch)
        yield from serve(model, tokenizer, loops, config, batch)
    monkeypatch.setattr(ruler, "run", served)
    for copies, batch in ((4e9, 8), (1, 1)):  # questions whose memories do not fit beside each other
        monkeypatch.setattr(ruler, "COPIES", copies)
        result = run(ruler, *args[:-6], "--device", "cpu", "--tasks", "single_1", "--methods", "memory")
        assert result.code == 0 and "100.0" in result.out and {*batches} == {batch}, result.err
        batches.clear()
    monkeypatch.setattr(ruler, "loop_of", None)  # whoever asks the memory again fails
    result = run(ruler, *args, "--tasks", "single_1,multikey_2", "--methods", "oracle,bm25,memory")
    assert result.code == 0, result.err
    again = json.loads(path.read_text())
    assert again[:len(rows)] == rows and len(again) == len(rows) + 4
    assert all(row["score"] == 100 for row in again[len(rows):])
    assert re.search(r"memory +3072 +- +100.0 ", result.out)
    result = run(ruler, *args, "--seed", 2)
    assert result.code == 2 and "measured with seed 1, not 2" in result.error
    result = run(ruler, *args, "--lengths", "6k")
    assert result.code == 2 and "measured with shortest 3072, not 6144" in result.error
    result = run(ruler, *args, "--essays", tmp_path / "none")
    assert result.code == 2 and "none: no such folder" in result.error
    result = run(ruler, *args, "--router-weight", 0.5)
    assert result.code == 2 and "measured with router_weight 1.0, not 0.5" in result.error
    shutil.copytree(demo, tmp_path / "again")
    path.write_text(json.dumps([row | dict(checkpoint=str(tmp_path / "again")) for row in again]))
    (tmp_path / "again" / "model.safetensors").write_bytes(changed_weights(demo))  # trained anew
    result = run(ruler, "--checkpoint", tmp_path / "again", *args[2:])
    assert result.code == 2 and re.search(r"measured with model '[0-9a-f-]{33}', not '", result.error)
    path.write_text(json.dumps([{name: row[name] for name in row if name != "task"} for row in again]))
    assert "rows.json: not a file that this script wrote ('task')" in run(ruler, *args).error
    path.write_text("{}")
    assert "rows.json: not a file that this script wrote (no list)" in run(ruler, *args).error
    result = run(ruler, "--tasks", "single_9")
    assert result.code == 2 and "--tasks single_9: not some of single_1" in result.error
