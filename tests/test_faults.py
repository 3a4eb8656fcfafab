"""Kinds of faults that users of similar tools have reported: what is lost, misread, or ends in a wrong word.

Each test is about one kind; torture.py and fuzz.py look for more of them.
"""
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import power_cuts
import pytest

import common
import memory_bank
import prepare_data
import question_sets
import sample
import train
import training_sets
from common import UserError, atomic_file, note, numbered, read_rows, read_text
from documents import read_documents
from memory_bank import Bank
from model import MSA
from pools import Pools, RaggedWriter
from training_state import read_log

TEAL, NAVY = "The colour of calm-meadow is teal.", "The colour of green-heron is navy."
QUESTION = {"question": "What is the colour of calm-meadow?", "answer": "teal", "documents": ["a.txt"]}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with documents `d` and questions `q.jsonl` about them."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text(TEAL)
    write_jsonl(tmp_path / "q.jsonl", [QUESTION, {**QUESTION, "question": "Which colour?"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(run, out, *more, folder="."):
    return run(prepare_data, "--documents", f"{folder}/d", "--questions", f"{folder}/q.jsonl", "--pools", 2,
               "--validation-pools", 1, "--vocab-size", 300, "--out", out, *more)


def words(text):
    return len(text.split())


# ------------------------------------------------------------------------------------------------------------
# Nothing is lost

PREPARED = {"about.json", "tokenizer.tiktoken", "tokenizer_msa.json", "train", "validation"}


def test_prepared_data_behind_a_link(run, place):
    """The link, or what it points to, would go: the old data and the new."""
    (place / "big").mkdir()
    (place / "notes").symlink_to("big")
    for _ in range(2):
        assert prepare(run, "notes").code == 0
        assert (place / "notes").is_symlink()
        assert {path.name for path in (place / "big").iterdir()} == PREPARED
    Pools("notes/train", 300)[0]


def test_prepared_data_in_the_working_folder(run, place, monkeypatch):
    """The shell would stand in a folder that is no more."""
    (place / "empty").mkdir()
    monkeypatch.chdir(place / "empty")
    assert prepare(run, ".", folder="..").code == 0
    assert {path.name for path in (place / "empty").iterdir()} == PREPARED


def test_prepared_data_at_a_mount_point(run, place, monkeypatch):
    """A folder that cannot be renamed or removed would lose all that it holds."""
    assert prepare(run, "data").code == 0
    (place / "data" / "mine.txt").write_text("not of prepare_data.py")
    real = {name: getattr(os, name) for name in ("rename", "rmdir")}
    for name in real:
        def refuse(path, *more, name=name, **options):
            if os.path.realpath(path) == str(place / "data"):
                raise OSError(errno.EBUSY, "Device or resource busy", str(path))
            return real[name](path, *more, **options)
        monkeypatch.setattr(os, name, refuse)
    before = (place / "data" / "about.json").read_bytes()
    assert prepare(run, "data", "--seed", 5).code == 0
    assert {path.name for path in (place / "data").iterdir()} == PREPARED | {"mine.txt"}
    assert (place / "data" / "about.json").read_bytes() != before


@pytest.mark.parametrize("at", range(1, 11))
def test_prepared_data_that_cannot_be_put_in_place(run, place, monkeypatch, files_of, at):
    """A failure between the removal of the old and the coming of the new would cost both."""
    assert prepare(run, "data").code == 0
    before, rename, calls = files_of(place), Path.rename, []

    def fail(path, target):
        calls.append(path)
        if len(calls) == at:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    result = prepare(run, "data", "--seed", 5)
    assert result.code == 2 and result.error.endswith("error: data: Input/output error")
    assert files_of(place) == before and len(calls) >= at


def test_a_full_disk_names_its_file(run, place, monkeypatch, files_of):
    """A full disk would be told of "a file"."""
    before = files_of(place)

    def full(writer, row):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(RaggedWriter, "append", full)
    result = prepare(run, "data")
    assert result.code == 2 and "error: data: No space left on device; free some" in result.error
    assert files_of(place) == before and not (place / "data").exists()


def test_folders_of_others(run, place, tiny, files_of):
    """What is no prepared data, no checkpoint and no set of ours would be replaced by one."""
    for name in ("about.json", "train/x.csv", "weights/model.safetensors", "coder/tokenizer.json"):
        (place / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "own" / name).write_text("{}")
    before = files_of(place / "own")
    for script, *args in ((prepare_data, tiny / "tiny.toml", "--out", "own"),
                          (train, tiny / "tiny.toml", "--out", "own/weights"),
                          (train, tiny / "tiny.toml", "--out", "own/coder")):
        assert run(script, *args).code == 2
    assert files_of(place / "own") == before


def test_a_bank_without_documents(run, place, checkpoint):
    """It would answer all the same."""
    flags = "--checkpoint", checkpoint, "--device", "cpu", "--memory", "bank"
    ask = lambda *more: run(sample, *flags, *more)
    assert ask("--documents", "d", "--info").code == 0
    with memory_bank.Writer("bank") as writer:
        writer.remove(writer.bank.numbers.tolist())
    result = ask("Which colour?")
    assert result.code == 2 and result.error.endswith("bank: holds no documents; bring some with --documents")
    assert "documents     0 live" in ask("--info").out


def test_questions_of_a_pipe(place):
    """The first of them would be gone, as the file is read twice."""
    rows, (receive, send) = [{"question": f"{i} {'x' * 900}"} for i in range(60)], os.pipe()
    os.write(send, "".join(json.dumps(row) + "\n" for row in rows).encode())  # 55 of the 64 KB that it holds
    os.close(send)
    assert [row for _, row in read_rows(f"/dev/fd/{receive}")] == rows
    os.close(receive)


def test_a_validation_that_is_no_number(run, tiny, tmp_path):
    """Its losses would be logged as 0."""
    result = run(train, tiny / "tiny.toml", "--out", tmp_path, "--max-steps", 1, "--learning-rate", 1e10)
    assert result.code == 2 and "the validation loss is not a number at step 1" in result.error


def test_links_that_point_nowhere_yet(run, place, checkpoint):
    """A link to a folder that is yet to be made would be "File exists", or become a folder itself."""
    for name in ("data", "bank", "run"):
        (place / name).symlink_to(f"big/{name}")
    assert prepare(run, "data").code == 0
    assert ask(run, checkpoint, "d").code == 0
    with atomic_file("run/deep/file.txt") as file:
        file.write("new")
    assert all((place / name).is_symlink() for name in ("data", "bank", "run"))
    assert {path.name for path in (place / "big" / "data").iterdir()} == PREPARED
    assert (place / "big" / "bank" / "manifest.json").exists()
    assert (place / "big" / "run" / "deep" / "file.txt").read_text() == "new"


def test_a_folder_is_tried_before_the_work(place, monkeypatch):
    """Hours of training would be lost for a folder in which nothing can be written."""
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(common.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="Read-only file system: 'out'"):
        common.make_folder("out", probe=True)


def test_a_file_system_without_modes(tmp_path, monkeypatch):
    """A file could not be written where files have no modes, as on a FAT disk."""
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "chmod", refuse)
    with atomic_file(tmp_path / "a") as file:
        file.write("new")
    assert (tmp_path / "a").read_text() == "new"


def test_atomic_file_behind_a_link(tmp_path):
    """A link would become a file, and what it points to stay as it was; a long name could not be written."""
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    (tmp_path / "dangling").symlink_to("new.json")
    for name in ("link.json", "dangling", "n" * 255):
        with atomic_file(tmp_path / name) as file:
            file.write("new")
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"
    assert (tmp_path / "new.json").read_text() == "new"


def ask(run, checkpoint, documents, *more):
    return run(sample, "--checkpoint", checkpoint, "--documents", documents, "--memory", "bank", "--device",
               "cpu", "--max-answer-tokens", 1, "--max-document-tokens", 64, *more, "What?")


def held(bank="bank"):
    bank = Bank(bank)
    return {bank.document(i)[1]: int(number) for i, number in enumerate(bank.numbers)}


def test_many_removals_are_asked_for(run, checkpoint, place):
    """A share that is empty today would cost the whole bank."""
    for i in range(5):
        (place / "d" / f"{i}.txt").write_text(f"Number {i}.")
    assert "6 added" in ask(run, checkpoint, "d").out
    before = held()
    for i in range(4):
        (place / "d" / f"{i}.txt").unlink()
    (place / "d" / "new.txt").write_text("Something new.")
    result = ask(run, checkpoint, "d")
    assert result.code == 2 and "error: bank: 4 of its 6 documents are not in --documents; if" in result.error
    assert "give --remove" in result.error and held() == before | {"new.txt:1-1": 6}
    assert "0 added, 4 removed, 3 unchanged" in ask(run, checkpoint, "d", "--remove").out
    assert set(held()) == {"a.txt:1-1", "4.txt:1-1", "new.txt:1-1"}


def test_a_failing_sync_keeps_what_it_has(run, checkpoint, place, monkeypatch):
    """A bad line near the end would cost all that was encoded before it; or the rest be removed."""
    rows = [{"id": f"{i}", "text": f"Number {i} is fine."} for i in range(9)]
    write_jsonl(place / "a.jsonl", [rows[8], rows[0]])
    assert "2 added" in ask(run, checkpoint, "a.jsonl").out
    write_jsonl(place / "a.jsonl", [*rows[:7], {"id": 3}, *rows[7:]])
    result = ask(run, checkpoint, "a.jsonl")
    assert result.code == 2 and "error: a.jsonl:8: not an object" in result.error
    assert set(held()) == {f"{i}:1-1" for i in (*range(7), 8)} and held()["8:1-1"] == 0
    write_jsonl(place / "a.jsonl", rows)
    assert "1 added, 8 unchanged" in ask(run, checkpoint, "a.jsonl").out


def test_a_file_that_vanishes(run, checkpoint, place, monkeypatch):
    """A file deleted while others are read would end it all; or one that cannot be seen count as deleted."""
    for name in ("b", "c", "d"):
        (place / "d" / f"{name}.txt").write_text(f"The letter {name}.")
    assert "4 added" in ask(run, checkpoint, "d").out
    (place / "d" / "c.txt").unlink()
    (place / "d" / "c.txt").symlink_to("nowhere")
    real = read_text

    def vanish(path):
        (place / "d" / "b.txt").unlink(missing_ok=True)
        return real(path)
    monkeypatch.setattr("documents.read_text", vanish)
    monkeypatch.setattr("sample.documents_size", lambda _: 0)
    result = ask(run, checkpoint, "d")
    assert "0 added, 1 removed, 2 unchanged, 1 kept unread" in result.out, result.err
    assert "skipped c.txt: cannot be read (No such file or directory)\n" in result.out
    assert set(held()) == {"a.txt:1-1", "c.txt:1-1", "d.txt:1-1"}


def test_bad_files_are_listed_at_once(run, checkpoint, place):
    """Of many bad files one would be named in a run."""
    for i in range(3):
        (place / "d" / f"{i}.txt").write_bytes(b"caf\xe9")
    write_jsonl(place / "d.jsonl", [{"id": "a", "text": "b"}, {"id": "a", "text": "c"}])
    assert ask(run, checkpoint, "d").out.count(": not UTF-8 (byte 3); convert it to UTF-8\n") == 3


# ------------------------------------------------------------------------------------------------------------
# Text

TEXTS = {"utf-8": ("utf-8", True), "a mark": ("utf-8-sig", True), "utf-16": ("utf-16", True),
         "utf-16 without a mark": ("utf-16-le", True), "big end first": ("utf-16-be", True),
         "latin-1": ("latin-1", False)}
GREEK = "Γειά"  # so that UTF-16 is not only NULs and letters


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["documents", "corpus", "questions", "configuration", "judgements", "log"])
def test_one_reader_of_text(place, tiny, name, kind, capsys):
    """A byte order mark or UTF-16 would be understood in some files and refused in others, or read as NULs;
    other encodings would end in a traceback, or be read as other letters."""
    encoding, good = TEXTS[name]
    letters = "Größe" if encoding == "latin-1" else f"Größe {GREEK}"
    row = {"id": "a", "text": letters, **QUESTION, "question": letters}
    text = {"configuration": f'out = "{letters}"\nmax_steps = 3\n',
            "judgements": f"q\td\ts\nq0\t{letters}\t1\n",
            "log": json.dumps({"step": 1, "split": "train", "of": letters}, ensure_ascii=False) + "\n",
            "documents": f"{letters}\nis teal."}
    rows = json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps({**row, **QUESTION, "id": "b"})
    path = place / {"documents": "d/b.txt", "configuration": "file.toml"}.get(kind, "a.jsonl")
    path.write_bytes(text.get(kind, rows).encode(encoding))
    documents = lambda path: list(read_documents(path, words, 99))
    note.cache_clear()  # it speaks once

    def read():
        if kind == "documents":
            return documents("d")[1].text.partition("\n")[0]
        if kind == "corpus":
            return documents("a.jsonl")[0].text
        if kind == "questions":
            return training_sets.training_questions("a.jsonl", documents("d"))[0].text
        if kind == "configuration":
            return common.command_line(train.TrainConfig, "", ["file.toml"]).out
        if kind == "judgements":
            asked = question_sets.read_qrels(path, {"q0": question_sets.SetQuestion("?", ())}, {letters: 0})
            return letters if asked["q0"].gold == (0,) else asked
        return read_log(path, 1)[0]["of"]
    if good:
        assert read() == letters
        said = capsys.readouterr().err
        assert ("UTF-16-" in said) == (encoding in ("utf-16-le", "utf-16-be"))
    else:
        where = {"corpus": ":1: not an object", "questions": ":1: not an object", "documents": ""}
        skipped = {}
        with pytest.raises(UserError, match=f"{path.name}{where.get(kind, ': .*not UTF-8 .byte')}"):
            if kind != "documents":
                read()
            [*read_documents("d", words, 99, skipped)]
            raise UserError("b.txt" if "not UTF-8" in skipped["b.txt"] else "nothing said")


ODD_LINES = "one\x0c\x0b\x1c\x1d\x1e\x85\u2028\u2029one\r\ntwo\rthree\n\nfive"


def test_lines_are_counted_in_one_way(place):
    """A line would be another one than in every editor, and a citation or a question mean another place."""
    assert [(number, line[-5:]) for number, line in numbered(ODD_LINES)] == [
        (1, "\x85\u2028\u2029one"[-5:]), (2, "two"), (3, "three"), (4, ""), (5, "five")]
    pages = "".join(f"page {i}\x0c\nsix words are in this line\n\n" for i in range(9))
    (place / "d" / "b.txt").write_text(pages, newline="")
    documents = list(read_documents("d", words, 8))
    write_jsonl(place / "q.jsonl", [{**QUESTION, "question": f"{i}?", "documents": [f"b.txt:{3 * i + 2}"]}
                                    for i in range(9)])
    for i, question in enumerate(training_sets.training_questions("q.jsonl", documents)):
        text = documents[question.documents[0]].text
        assert text.startswith(f"page {i}\x0c"), (i, text)
    asked = question_sets.read_questions("q.jsonl", documents)
    assert [question.gold for question in asked] == [(i + 1,) for i in range(9)]
    (place / "t.tsv").write_text("h\nq0\u2028\td0\t1\nq0\td0\x85\t1\nq0\td0\n", newline="")
    with pytest.raises(UserError, match="t.tsv:4: "):
        question_sets.read_qrels(place / "t.tsv", {}, {}, print)


@pytest.mark.parametrize("data, asked, refused", [
    (b"What?\ncaf\xe9?\nAnd?\n", ["What?", "And?"], 1),
    ("\ufeffWhat?\r\nAnd?".encode(), ["What?", "And?"], 0),
    ("What?\r\nCafé?\r\n".encode("utf-16"), ["What?", "Café?"], 0),
    ("What?\r\nAnd?\r\n".encode("utf-16-le"), ["What?", "And?"], 0),
    (b"a\0b and more of it\n\xff\xfe\n\nWhat?", ["What?"], 2), (b"\n" * 9, [], 0), (b"", [], 0)])
def test_a_bad_line_in_a_session(monkeypatch, capsys, data, asked, refused):
    """One byte that is not UTF-8 would end the session, and cost the memory that lies in RAM."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), encoding="utf-8"))
    assert list(sample.typed_questions(sample.Ranks(sample.torch.device("cpu")))) == asked
    assert capsys.readouterr().out.count("not a text: ") == refused


def test_a_question_that_cannot_be_answered(run, checkpoint, place, monkeypatch):
    """One question would end the session, and cost the memory that lies in RAM."""
    asked, show = [], sample.show

    def refuse(model, tokenizer, memory, texts, where, question, *more):
        asked.append(question)
        if question == "Bad?":
            raise UserError("not this one")
        if question == "Long?":
            raise KeyboardInterrupt
        show(model, tokenizer, memory, texts, where, question, *more)
    monkeypatch.setattr(sample, "show", refuse)
    typed = io.BufferedReader(io.BytesIO(b"Good?\nBad?\nLong?\nGood?\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed))
    result = run(sample, "--checkpoint", checkpoint, "--documents", "d", "--max-answer-tokens", 1)
    assert result.code == 0 and asked == ["Good?", "Bad?", "Long?", "Good?"], result
    assert "error: not this one\n" in result.out and "error: interrupted\n" in result.out


def test_printing_ends_nothing():
    """A terminal that lacks a letter, or a name with half a one, would end the program."""
    code = "import common; common.main(lambda: print('ä \\u2028 \\udcff'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=Path(common.__file__).parent,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"\\xe4 \\u2028 \\udcff\n"), done.stderr


# ------------------------------------------------------------------------------------------------------------
# Sets as published

def a_set(folder, corpus, queries, qrels):
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


DOCUMENTS = [{"_id": f"d{i}", "title": "", "text": f"Text {i}."} for i in range(3)]
QUERIES = [{"_id": f"q{i}", "text": f"Question {i}?"} for i in range(3)]
NOT_ASKED = "not asked: no qrels name a document that answers"


@pytest.mark.parametrize("corpus, queries, qrels, gold, said", [
    # one id of the judgements is of no document, one of no question
    (DOCUMENTS, QUERIES, "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td9\t1\nq9\td1\t1\n", {0: "Text 0."},
     ["qrels/test.tsv: skipped: unknown question or document (2)", f"queries.jsonl: {NOT_ASKED} (2)"]),
    # no names of columns: the first line counts; TREC's four columns; scores with a point
    (DOCUMENTS, QUERIES, "q0\td0\t1\nq1\td1\t1\n", {0: "Text 0.", 1: "Text 1."},
     ["qrels/test.tsv: no header (1)", f"queries.jsonl: {NOT_ASKED} (1)"]),
    (DOCUMENTS, QUERIES, "q0 0 d0 1.0\nq1 0 d1 0\n", {0: "Text 0."},
     ["qrels/test.tsv: no header (1), four columns (2), decimal scores (1)",
      f"queries.jsonl: {NOT_ASKED} (2)"]),
    # documents and questions that are there twice, or empty
    ([*DOCUMENTS, {"_id": "d0", "text": "Another."}, {"_id": "d3", "title": "", "text": " "}], QUERIES,
     "h\th\th\nq0\td0\t1\nq1\td3\t1\n", {0: "Text 0."},
     ["corpus.jsonl: skipped: an _id that was there before (1), skipped: empty text (1)",
      "qrels/test.tsv: skipped: unknown question or document (1)", f"queries.jsonl: {NOT_ASKED} (2)"]),
    (DOCUMENTS, [*QUERIES, {"_id": "q0", "text": "Another?"}, {"_id": "q3", "text": ""}],
     "h\th\th\nq0\td0\t1\nq3\td0\t1\n", {0: "Text 0."},
     ["qrels/test.tsv: skipped: unknown question or document (1)",
      "queries.jsonl: skipped: an _id that was there before (1), skipped: empty text (1), "
      f"{NOT_ASKED} (2)"])])
def test_sets_as_published(tmp_path, corpus, queries, qrels, gold, said):
    """One odd line of thousands would keep a set from being read, or be left out without a word."""
    told, folder = [], a_set(tmp_path / "set", corpus, queries, qrels)
    texts, questions, _ = question_sets.read_set(folder, told.append)
    assert {question.text: [texts[i] for i in question.gold] for question in questions["test"]} == {
        f"Question {i}?": [text] for i, text in gold.items()}
    assert told == [f"{folder}/{line}" for line in said]


def test_questions_asked_twice(place, capsys):
    """The same question would train and validate, or count twice."""
    rows = [QUESTION, {**QUESTION, "question": "Which?"}, QUESTION]
    write_jsonl(place / "q.jsonl", rows)
    documents = list(read_documents("d", words, 99))
    for read in (training_sets.training_questions, question_sets.read_questions):
        asked = read("q.jsonl", documents)
        assert [question.text for question in asked] == [QUESTION["question"], "Which?"]
        assert capsys.readouterr().out == "q.jsonl: skipped: asked again (1)\n"


# ------------------------------------------------------------------------------------------------------------
# File systems, names, ~

def test_home(run, checkpoint, place, monkeypatch):
    """A folder named "~" would be made: in a TOML file and behind "=" no shell expands it."""
    monkeypatch.setenv("HOME", str(place / "home"))
    (place / "notes.toml").write_text('out = "~/out"\n[data]\nout = "~/data/notes"\ndocuments = "d"\n'
                                      'questions = "q.jsonl"\npools = 2\nvalidation_pools = 1\n'
                                      'vocab_size = 300\n')
    assert run(prepare_data, "notes.toml").code == 0
    assert (place / "home" / "data" / "notes" / "about.json").exists()
    result = run(sample, f"--checkpoint={checkpoint}", "--memory=~/bank", "--documents=~/../d", "~ is what?",
                 "--max-answer-tokens", 1)
    assert result.code == 0 and (place / "home" / "bank" / "manifest.json").exists(), result.err
    config = common.command_line(train.TrainConfig, "", ["notes.toml", "--data.documents=~/b",
                                                         "--init-from=~"])
    assert config.data.out == f"{place}/home/data/notes" and config.out == f"{place}/home/out"
    assert config.data.documents == f"{place}/home/b" and config.init_from == f"{place}/home"
    assert common.command_line(prepare_data.DataConfig, "", ["--data=a,~/b"]).data == f"a,{place}/home/b"
    assert not (place / "~").exists()
    (place / "home" / "model").mkdir()
    with pytest.raises(UserError, match=f"^{place}/home/model/config.json: no such file"):
        MSA.from_pretrained("~/model")


@pytest.mark.parametrize("code, goes_on", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_folders_that_cannot_be_synced(run, checkpoint, place, monkeypatch, code, goes_on):
    """A network's file system would be refused for what is lost at most in a power cut, by "a file: Invalid
    argument"; or a failing disk be overlooked."""
    fsync = os.fsync

    def refuse(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        return fsync(handle)
    monkeypatch.setattr(os, "fsync", refuse)
    note.cache_clear()
    result = ask(run, checkpoint, "d")
    assert result.code == (0 if goes_on else 2)
    if goes_on:
        assert f"bank: its file system cannot be told to write at once ({os.strerror(code)})" in result.error
        assert set(held()) == {"a.txt:1-1"}
    else:
        assert result.error.endswith("bank: Input/output error")


def test_no_locks(run, checkpoint, place, monkeypatch):
    """Two writers would undo each other's changes; or "a file: No locks available" be all that is said."""
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", refuse)
    result = ask(run, checkpoint, "d")
    assert result.code == 2 and "error: bank/lock: its file system has no locks (No locks" in result.error


def test_names(run, checkpoint, place):
    """Two names that are not UTF-8 would be one, a name drive the terminal, or two spellings of one name be
    two documents."""
    names = {b"a\xff.txt": "a\\xff.txt", b"a\xfe.txt": "a\\xfe.txt", b"b\x1b[2J\n.txt": "b\\x1b[2J\\n.txt",
             "e\u0301.txt".encode(): "\xe9.txt"}
    for i, name in enumerate(names):
        (place / "d" / os.fsdecode(name)).write_text(f"Number {i}.")
    documents = list(read_documents("d", words, 99))
    assert {d.source: d.text for d in documents if d.source != "a.txt"} == {
        shown: f"Number {i}." for i, shown in enumerate(names.values())}
    for spelling in ("e\u0301.txt", "\xe9.txt", "e\u0301.txt:1"):
        write_jsonl(place / "q.jsonl", [{**QUESTION, "documents": [spelling]}])
        found, = question_sets.read_questions("q.jsonl", documents)
        assert documents[found.gold[0]].text == "Number 3."
    result = ask(run, checkpoint, "d", "--trace", "--max-rounds", 1)
    assert "5 added" in result.out and not re.search("[\x00-\x09\x0b-\x1f]", result.out)
    (place / "d" / "\xe9.txt").write_text("The same name.")
    skipped = {}
    assert len(list(read_documents("d", words, 99, skipped))) == 5
    assert list(skipped) == ["\xe9.txt (twice)"]
    (place / "\x1b[2J.toml").write_text("x")
    result = run(train, "\x1b[2J.toml")
    assert result.code == 2 and "error: \\x1b[2J.toml: not valid TOML" in result.error
    assert "\x1b" not in result.err


def test_a_link_to_a_folder_that_is_away(run, checkpoint, place):
    """A share that is not mounted today would cost its documents, which would come back under new numbers."""
    (place / "share").mkdir()
    (place / "share" / "s.txt").write_text("On the share.")
    for i in range(3):
        (place / "d" / f"{i}.txt").write_text(f"Number {i}.")
    (place / "d" / "linked").symlink_to("../share")
    assert "5 added" in ask(run, checkpoint, "d").out
    before = held()
    (place / "share").rename(place / "away")
    result = ask(run, checkpoint, "d")
    assert "skipped linked: cannot be read (No such file or directory)\n" in result.out
    assert "0 added, 4 unchanged, 1 kept unread" in result.out and held() == before


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404</body></html>\n"
DOWNLOADS = {"pointer": (lambda data: POINTER, "a pointer of git-lfs, not the file; git lfs pull brings it"),
             "page": (lambda data: PAGE, "a web page, not the file; download it again"),
             "half": (lambda data: data[:len(data) // 2], "not "), "empty": (lambda data: b"", "not "),
             "zeros": (lambda data: bytes(len(data)), "(not a whole safetensors file .all [0-9,]+ bytes are 0"
                                                      "|holds NULs)")}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer_msa.json"])
@pytest.mark.parametrize("kind", DOWNLOADS)
def test_damaged_downloads(run, checkpoint, place, file, kind):
    """A clone without git-lfs would say "header too large", a failed download anything but its name."""
    change, message = DOWNLOADS[kind]
    folder = place / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    result = run(sample, "--checkpoint", folder, "--documents", "d", "What?")
    assert result.code == 2, result.err
    if file == "tokenizer_msa.json" and kind in ("half", "empty", "page"):
        message = "malformed tokenizer files"
    assert re.search(f"error: {folder}(/{file})?: {message}", result.error), result.err


@pytest.mark.parametrize("flags, message", [
    ("--seed 18446744073709551616", "--seed is 18446744073709551616; it must be below 2.63"),
    ("--seed 9223372036854775808", "it must be below 2.63"),
    ("--timeout inf", "--timeout is inf; .*finite"),
    ("--temperature inf", "temperature is inf; it must be at least 0, and at most 1,0"),
    ("--temperature nan", "temperature is nan; it must"),
    ("--router-weight 1e38", "router_weight is 1e.38; it"),
    ("--top-p nan", "top_p is nan; it must"), ("--temperature 1e-310", None), ("--temperature 1000000", None),
    ("--seed 9223372036854775807 --temperature 1 --top-p 1e-320", None), ("--timeout 1e300", None)])
def test_numbers_out_of_range(run, checkpoint, place, flags, message):
    """A seed or temperature that cannot be computed with would end in a traceback, or in noise."""
    result = run(sample, "--checkpoint", checkpoint, "--documents", "d", *flags.split(),
                 "--max-answer-tokens", 2, "What?")
    assert result.code == (2 if message else 0), result.err
    assert message is None or re.search(message, result.error), result.error
    assert "Traceback" not in result.err


# ------------------------------------------------------------------------------------------------------------
# The command line

@pytest.mark.parametrize("args, expected", [
    ("a.toml", (3, False)), ("--resume a.toml", (3, True)), ("--max-steps 5 a.toml --resume", (5, True)),
    ("--max-steps=5 a.toml", (5, False)), ("--no-resume a.toml", (3, False)),
    ("--data.number_tokens a.toml", (3, False)),
    ("--data.no-number-tokens a.toml", (3, False)), ("--out a.toml", (1500, False)),
    ("--out=b.toml a.toml", (3, False)), ("--init-from x.toml a.toml", (3, False))])
def test_a_configuration_anywhere(place, args, expected):
    """A file behind a flag would be an "unrecognized option", or a flag's value be taken for a file."""
    (place / "a.toml").write_text("max_steps = 3\n")
    config = common.command_line(train.TrainConfig, "", args.split())
    assert (config.max_steps, config.resume) == expected
    assert (config.out == "a.toml") == (args == "--out a.toml")


def test_two_configurations(place):
    """One of two files would be left out without a word."""
    with pytest.raises(UserError, match="^a.toml and b.toml are two configuration files; give one$"):
        common.command_line(train.TrainConfig, "", ["a.toml", "--resume", "b.toml"])


@pytest.mark.parametrize("flags, message", [
    ("--seed -1 q", "seed is -1; it must be at least 0"), ("--help", "usage: sample.py"),
    ("--documents none q", "error: none: no such folder of"),
    ("--memory none q", "none: no memory bank here")])
def test_ranks_say_it_once(run, checkpoint, place, monkeypatch, flags, message):
    """Each of many ranks would say what is wrong, or none of them."""
    said = []
    for rank in (2, 0, 1):  # as torchrun calls them
        (place / "run" / f"{rank}").mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place / "run" / f"{rank}" / "error.json"))
        result = run(sample, "--checkpoint", checkpoint, *flags.split())
        said.append(result.out if flags == "--help" else result.err)
        assert result.code == (0 if flags == "--help" else 2)
    assert message in said[0] and said[1:] == ["", ""]


# ------------------------------------------------------------------------------------------------------------
# Power cuts, and thousands of odd inputs: a sample of what `make torture` and `make fuzz` try

def test_power_cuts():
    """A power cut would leave a bank, a checkpoint or a training that is neither the old one nor the new."""
    assert power_cuts.cut_banks(3, 1)["merge"] == 6
    for sizes in ((8000, 8000), (1 << 30, 8000), (8000, 1 << 30)):
        assert 0 < power_cuts.cut_checkpoints(8, 1, sizes) < 16
    for same_step in (False, True):
        assert 0 < power_cuts.cut_training(8, 1, same_step) < 16


def test_power_cuts_find_what_is_not_synced(monkeypatch):
    """The cuts would be such that nothing can be lost."""
    monkeypatch.setattr(common, "sync_handle", lambda *_: None)
    for attempt in (power_cuts.cut_banks, lambda *args: power_cuts.cut_checkpoints(*args, (8000, 8000))):
        with pytest.raises((AssertionError, UserError)):
            attempt(8, 1)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_odd_inputs(tmp_path_factory, kind):
    """An input that nobody has thought of would end in a traceback, or in more than one sentence."""
    fuzz.prepare(tmp_path_factory.mktemp("fuzz"))
    good, refused, faults = fuzz.fuzz(kind, range(12))
    assert not faults and good + refused == 12 and good


def test_sizes_that_no_memory_holds(run, tiny, place):
    """A size with some zeros too many would end in a page of traceback."""
    result = run(train, tiny / "tiny.toml", "--model.hidden-size", 1 << 30, "--out", "other")
    assert result.code == 2 and "error: not enough memory for these sizes (" in result.error, result.err
    assert not (place / "other").exists()
