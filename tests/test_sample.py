"""Asking folders of all kinds of files, and banks of them; which sources are printed; the type on a CPU."""
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import sample
from common import detect_device
from interleave import Round
from memory_bank import Bank
from model import MSA
from sample import sources_of

TEXTS = {3: "The lighthouse was built in 1862 by the engineer Ada Thornquist.",
         5: "Three pumps keep the marsh dry; Ilse Marr repaired one.",
         8: "Ada Thornquist also drew the two piers of the harbour."}


@pytest.mark.parametrize("answer,question,expected", [
    ("Ada Thornquist.", "Who built the lighthouse?", [3, 8]),
    ("Ada Thornquist built it in 1862.", "Who built the lighthouse?", [3, 8]),  # two words of three in [8]
    ("It was the engineer Ada Thornquist, in 1862", "Who?", [3, 8]),
    ("ILSE MARR", "Who repaired the pump?", [5]),
    ("The marsh is dry.", "Is the marsh dry?", [5]),  # nothing but the question's words
    ("The lighthouse was built by Ilse Marr.", "Who built the lighthouse?", [5]),  # not [3], which repeats it
    ("two piers", "How many pumps?", [8]),
    ("It is the one.", "Which?", [3, 5, 8]), ("Napoleon", "Who?", [3, 5, 8]), ("", "Who?", [3, 5, 8]),
    ("1862: harbour, piers, two", "?", [8])])
def test_sources_of(answer, question, expected):
    """Every document that was found would be named, or the one that the answer comes from would not."""
    assert sources_of(answer, question, TEXTS) == expected


@pytest.mark.parametrize("order,expected", [((8, 3, 5), [8, 3]), ((3, 8, 5), [3, 8])])
def test_equal_sources_keep_their_ranking(order, expected):
    """Of two documents with the same words, the worse would come first."""
    assert sources_of("Ada Thornquist", "Who?", {n: TEXTS[n] for n in order}) == expected


def test_a_source_of_two_rounds():
    """A document that two rounds have named would be printed twice."""
    model = SimpleNamespace(config=SimpleNamespace(prompts="msa", attend_memory=True))
    assert sample.cited(model, None, None, None, "Who?", "Ada", [3, 3, 5], [5, 3]) == [3, 5]


@pytest.mark.parametrize("prompts,printed", [
    ("chat", ["  [8] d8", "  [3] d3"]), ("nanomsa", ["  [8] d8", "  [3] d3", "  [5] d5"])])
def test_show(monkeypatch, prompts, printed):
    """A chat model's sources would be all that was found, or the first round's alone; our own models' those
    that were not named; or an answer be given where the best score is no better than chance, be it that of
    another document than a second look has put first."""
    numbers = [3, 5, 8]
    events = [Round([(8, 0.5), (9, 0.9)], [8]), Round([(3, 0.2), (5, 0.1)], [3, 5]), "Ada ",
              "Thornquist"]
    monkeypatch.setattr(sample, "interleave", lambda *_: iter(events))
    said = []
    tokenizer = SimpleNamespace(decode=lambda text: text)
    model = SimpleNamespace(config=SimpleNamespace(prompts=prompts))
    memory, texts = SimpleNamespace(numbers=np.array(numbers)), list(TEXTS.values())
    config = sample.SampleConfig()
    say = lambda text, end="\n", flush=False: said.append(text + end)
    show = lambda reaches: sample.show(model, tokenizer, memory, texts, lambda d: f"d{numbers[d]}", "Who?",
                                       config, reaches, say)
    show(0.89)
    assert "".join(said) == "Ada Thornquist\n" + "".join(f"{line}\n" for line in printed)
    events[2:] = ["Not in these", " documents."]
    said.clear()
    show(0.89)
    assert "".join(said) == "Not in these documents.\n"  # it rests on none of them
    said.clear()
    show(0.9)
    assert "".join(said) == ("Nothing in these documents answers this (best score 0.90, chance reaches "
                             "0.90).\n  [8] d8 is the nearest\n")


# ------------------------------------------------------------------------------------------------------------
# From the command line

def sources(bank):
    """What a bank holds: number -> where it comes from."""
    bank = Bank(bank)
    return {int(number): bank.document(i)[1] for i, number in enumerate(bank.numbers)}


def test_a_bank_keeps_what_cannot_be_read(run, checkpoint, tmp_path):
    """A file that cannot be read for a moment would count as deleted, and come back under new numbers; or a
    deleted one would stay."""
    notes, bank = tmp_path / "notes", tmp_path / "bank"
    notes.mkdir()
    for name in ("a", "b", "bb", "d"):
        (notes / f"{name}.txt").write_text(f"{name} one\n\n{name} two two\n")
    ask = lambda: run(sample, "--checkpoint", checkpoint, "--documents", notes, "--memory", bank, "--device",
                      "cpu", "--max-document-tokens", 8, "--max-answer-tokens", 1, "What?")
    result = ask()
    assert result.code == 0 and "8 added;" in result.out, result.err
    before = sources(bank)
    shutil.move(notes / "b.txt", tmp_path / "b.txt")
    (notes / "b.txt").symlink_to("nowhere")
    (notes / "d.txt").unlink()
    result = ask()
    assert result.code == 0 and "skipped b.txt: cannot be read (No such file or directory)\n" in result.out
    assert "0 added, 2 removed, 4 unchanged, 2 kept unread" in result.out
    assert sources(bank) == {n: source for n, source in before.items() if not source.startswith("d.txt")}
    (notes / "b.txt").unlink()
    result = ask()
    assert "0 added, 2 removed, 4 unchanged on" in result.out and "skipped" not in result.out
    shutil.move(tmp_path / "b.txt", notes / "b.txt")
    assert "2 added, 4 unchanged" in ask().out


def test_a_bank_follows_titles(run, checkpoint, tmp_path):
    """Two documents of one title would be cited alike, a title not be encoded, or an old one be kept."""
    path, bank = tmp_path / "docs.jsonl", tmp_path / "bank"

    def ask(titles):
        rows = [{"id": f"p-{i}", "title": title, "text": "It is teal."} for i, title in enumerate(titles)]
        path.write_text("\n".join(map(json.dumps, rows)))
        return run(sample, "--checkpoint", checkpoint, "--documents", path, "--memory", bank,
                   "--device", "cpu", "--max-answer-tokens", 1, "--trace", "--max-rounds", 1, "What?").out
    assert "2 added;" in ask(["Paris", "Paris"])
    assert sources(bank) == {0: "p-0:1-1 (Paris)", 1: "p-1:1-1 (Paris)"}
    assert "0 added, 2 unchanged" in ask(["Paris", "Paris"])
    traced = ask(["Paris", "Lyon"])
    assert "0 added, 1 updated, 1 unchanged" in traced and sources(bank)[1] == "p-1:1-1 (Lyon)"
    for number, title, text in re.findall(r"appended \[(\d)\] p-\d:1-1 \((\w+)\): (.*\n.*)\n", traced):
        assert (title, text) == (["Paris", "Lyon"][int(number)], f"{title}\nIt is teal.")
    assert "appended [" in traced


def test_what_is_skipped_is_said(run, checkpoint, tmp_path):
    """A file would be left out of the memory without a word, or stop the others."""
    (tmp_path / "a.md").write_text("# Boats\n\nThey float.\n")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    result = run(sample, "--checkpoint", checkpoint, "--documents", tmp_path, "--device", "cpu",
                 "--max-answer-tokens", 1, "--max-rounds", 0, "What?")
    assert result.code == 0, result.err
    assert result.out.startswith("skipped b.txt: not UTF-8 (byte 0); convert it to UTF-8\n1 documents, ")
    assert "  [0] a.md:1-3 (Boats) (read in the memory; no text was appended)\n" in result.out


# ------------------------------------------------------------------------------------------------------------
# The type of weights on a CPU

@pytest.mark.parametrize("speed,hidden_size,world,expected", [
    (2.6, 512, 1, torch.bfloat16), (1.5, 576, 1, torch.bfloat16), (1.4, 2560, 1, torch.float32),
    (0.0, 2560, 1, torch.float32), (9.0, 511, 1, torch.float32), (9.0, 0, 1, torch.float32),
    (9.0, 2560, 2, torch.float32)])
def test_the_type_on_a_cpu(monkeypatch, speed, hidden_size, world, expected):
    """A large model would take four times as long as it could, or a tiny one answer otherwise than it was
    trained to, or two processes compute in different types."""
    monkeypatch.setattr(common, "bfloat16_speed", lambda: speed)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    device, dtype, reason = detect_device("cpu", "auto", hidden_size)
    assert device.type == "cpu" and dtype == expected
    assert (f"{speed:.1f} times" in reason) == (hidden_size >= 512 and world == 1)
    assert detect_device("cpu", "float32", hidden_size)[1] == torch.float32
    assert detect_device("cpu", "bfloat16", hidden_size)[1] == torch.bfloat16


def test_a_rank_without_a_gpu(monkeypatch):
    """Two ranks on a machine of one GPU would end in a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert detect_device()[:2] == (torch.device("cuda", 0), torch.float32)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(common.UserError, match="has 1 GPUs, none of them for rank 1; .*--nproc_per_node=1"):
        detect_device()


def test_bfloat16_speed(monkeypatch):
    """The measure would fail, mean the inverse, or be made where there are no instructions for it."""
    clock = iter([0, 9, 9, 12, 20, 26, 30, 36, 40, 47,        # float32: 3 seconds at best
                  50, 59, 60, 62, 70, 73, 80, 84, 90, 95])    # bfloat16: 2
    with monkeypatch.context() as patch:
        patch.setattr(common, "has_bfloat16", lambda: True)
        patch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        assert common.bfloat16_speed() == 3 / 2
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert common.bfloat16_speed() == 0.0


def test_batches_fit_the_device(checkpoint, monkeypatch):
    """Documents would be encoded in batches too large for a CPU's caches."""
    model = MSA.from_pretrained(checkpoint)
    texts, sizes = [torch.ones(100, dtype=torch.long)] * 50, []
    encode_batch = model.encode_batch
    monkeypatch.setattr(model, "encode_batch", lambda tokens, lengths: (
        sizes.append(tokens.numel()), encode_batch(tokens, lengths))[1])
    with torch.no_grad():
        model.encode(texts)
        assert sizes == [2000, 2000, 1000]
        model.encode(texts, batch_tokens=5000)
    assert sizes[3:] == [5000]


def test_the_demo_stays_float32():
    """The answers of a shipped checkpoint would depend on the CPU."""
    assert MSA.read_config("checkpoints/demo")[0].hidden_size < 512
    assert common.HEAD_BYTES % 4 == 0  # a cut character would hide how a file is encoded


def test_questions_of_a_file(run, checkpoint, tmp_path, monkeypatch, eager_compile):
    """Answers of a file's questions would be in another order, not be those of one at a time or of a compiled
    model, or lack their sources; a mistake in the file would be told after minutes of encoding."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("amber", "teal", "khaki"):
        (notes / f"{name}.txt").write_text(f"The colour of quiet-river is {name}.")
    questions = ["What is the colour of quiet-river?", "Which?", "What is it?"]
    lines = "".join(json.dumps({"question": question}) + "\n" for question in questions)
    (tmp_path / "q.jsonl").write_text(lines + "\n")
    flags = ["--checkpoint", checkpoint, "--documents", notes, "--device", "cpu", "--max-answer-tokens", 5]
    asks = [*flags, "--questions", tmp_path / "q.jsonl", "--json"]
    for out, *options in (("1", "--batch", 1), ("2", "--batch", 2), ("compiled", "--compile")):
        done = run(sample, *asks, tmp_path / f"{out}.json", *options)
        assert done.code == 0 and "3 answers" in done.out, done.err
    rows = json.loads((tmp_path / "2.json").read_text())
    for other in ("1", "compiled"):
        assert rows == json.loads((tmp_path / f"{other}.json").read_text())
    assert len(eager_compile) == 2 * 5  # of two layers MLP, norms, projections
    assert [row["question"] for row in rows] == questions
    for row in rows:
        alone = run(sample, *flags, row["question"]).out.splitlines()
        assert alone[1] == (row["answer"] or "(no answer)")
        assert [line.replace(" (read in the memory; no text was appended)", "") for line in alone[2:]] == [
            f"  [{one['number']}] {one['source']}" for one in row["documents"]]
    pooled = run(sample, *asks, tmp_path / "pooled.json", "--max-rounds", 0)
    assert pooled.code == 0 and [len(row["documents"]) for row in json.loads(
        (tmp_path / "pooled.json").read_text())] == [1, 1, 1]  # an answer rests on something
    monkeypatch.setattr(sample, "chance", lambda *_: 2.0)  # no score is above it
    assert run(sample, *asks, tmp_path / "3.json").code == 0
    assert [(row["answer"], row["documents"]) for row in json.loads((tmp_path / "3.json").read_text())] == [
        (None, [])] * 3
    ask_all = sample.ask_all  # the second part of the questions fails: the answers of the first stay
    monkeypatch.setattr(sample, "ask_all", lambda *args: ask_all(*args) if questions[0] in args[5] else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(sample, *asks, tmp_path / "4.json", "--batch", 1)
    assert len(json.loads((tmp_path / "4.json").read_text())) == 2
    monkeypatch.setattr(sample, "encode_texts", None)
    (tmp_path / "q.jsonl").write_text(lines + '{"text": "Who?"}')
    for wrong, message in ((asks + [tmp_path / "x.json"], "q.jsonl:4: not an object"),
                           (asks[:-1], "--questions FILE.jsonl and --json OUT belong together"),
                           (asks + [tmp_path / "x.json", "Who?"], "leave out the one that is not"),
                           (asks + [tmp_path / "x.json", "--trace"], "--trace is about questions that"),
                           (asks + [tmp_path / "x.json", "--batch", 0], "batch is 0")):
        done = run(sample, *wrong)
        assert done.code == 2 and message in done.error
    assert not (tmp_path / "x.json").exists()


def test_names_that_a_bank_holds(run, checkpoint, tmp_path, monkeypatch):
    """A bank that somebody else has made would write to the terminal what it likes."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("The number of oak is 4.")
    flags = ["--checkpoint", checkpoint, "--memory", tmp_path / "bank", "--trace", "--max-answer-tokens", 2]
    assert run(sample, *flags, "--documents", tmp_path / "d", "Oak?").code == 0
    document = Bank.document
    monkeypatch.setattr(Bank, "document", lambda *args: (document(*args)[0], "\x1b[2Ja.txt"))
    result = run(sample, *flags, "Oak?")
    assert result.code == 0 and "\\x1b[2Ja.txt" in result.out and "\x1b" not in result.out, result.err
