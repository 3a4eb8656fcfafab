"""The scripts as a user calls them: what works, and what one clear sentence must answer."""
import dataclasses
import inspect
import io
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import needles
import prepare_data
import sample
import train
from common import UserError, atomic_file, command_line, merge, write_json
from tokenizer import train_encoding

MISSING_DEVICE = "cuda"
TOML = {
    "unknown.toml": '[model]\nhiden_size = 16\n[data]\nseeds = 3\n',
    "string.toml": 'max_steps = "5"\n[data]\npools = "5"\n',
    "float.toml": 'max_steps = 5.5\n[data]\npools = 5.5\n',
    "bool.toml": '[model]\ntop_k = true\n',
    "table.toml": 'model = 3\ndata = 3\n',
    "zero.toml": '[model]\ntop_k = 0\n[data]\npools = 0\n',
    "device.toml": 'device = "tpu"\n',
    "broken.toml": 'max_steps = \n',
    "digits.toml": f'learning_rate = {"9" * 400}\n',
    "more_digits.toml": f'learning_rate = {"9" * 5000}\n',
}


@pytest.fixture(scope="module")
def place(tiny, checkpoint, tokenizer, tmp_path_factory):
    """A folder with one of everything that can be wrong."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in TOML.items():
        (folder / name).write_text(text)
    (folder / "latin.toml").write_bytes("out = 'Grüße'".encode("latin-1"))
    shutil.copy(tiny / "tiny.toml", folder / "tiny.toml")
    for name in ("docs", "empty", "latin"):
        (folder / name).mkdir()
    (folder / "docs" / "a.txt").write_text("One of the special magic numbers for gentle-otter is: 4729103.\n")
    (folder / "docs" / "b.md").write_text("The quiet river can follow the amber castle.\n")
    (folder / "latin" / "a.txt").write_bytes("Grüße".encode("latin-1"))
    questions = [{"question": f"What is {i}?", "answer": "it", "documents": ["a.txt"]} for i in range(3)]
    (folder / "good.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "bad.jsonl").write_text(json.dumps(questions[0]) + "\n{\n")
    for name, edits in {"good": {}, "shape": {"hidden_size": 24}, "layers": {"num_hidden_layers": 4},
                        "type": {"hidden_size": "16"}, "float": {"hidden_size": 16.5}, "topk": {"top_k": 0},
                        "chunk": {"number_chunk": 5}, "no_tokenizer": {}, "no_weights": {}, "half": {},
                        "large_tokenizer": {}}.items():
        shutil.copytree(checkpoint, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        for key, value in edits.items():
            (config["msa_config"] if key in config["msa_config"] else config)[key] = value
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "no_tokenizer" / "tokenizer_msa.json").unlink()
    (folder / "no_weights" / "model.safetensors").unlink()
    weights = folder / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:weights.stat().st_size // 2])
    texts = [f"{a}{b}{c} words" for a in "abcdefghijklm" for b in "nopqrstuvwxyz" for c in "abcdefghijklm"]
    train_encoding(texts, tokenizer.vocab_size + 50).save(folder / "large_tokenizer")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.txt").write_text("years of work")
    for name, edits in (("odd_data", {}), ("later_data", {"a_setting_of_tomorrow": 1})):
        shutil.copytree(tiny / "data", folder / name)
        about = json.loads((folder / name / "about.json").read_text())
        about["config"] |= {"out": name} | edits
        (folder / name / "about.json").write_text(json.dumps(about))
    ids = folder / "odd_data" / "train" / "documents.bin"
    np.full(ids.stat().st_size // 2, 5000, np.uint16).tofile(ids)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    shutil.rmtree("other", ignore_errors=True)  # what a mistake that was carried out has made
    monkeypatch.setattr(train, "plot", lambda *_: None)
    return place


# ------------------------------------------------------------------------------------------------------------
# A user's mistakes: script, arguments, what the message says

MISTAKES = [
    # configuration files
    (train, "none.toml", "error: none.toml: no such configuration file"),
    (train, "broken.toml", "error: broken.toml: not valid TOML: "),
    (train, "digits.toml", "error: digits.toml: learning_rate = 9+ is of type int; it must be of type float"),
    (train, "more_digits.toml", "error: more_digits.toml: not valid TOML: Exceeds the limit"),
    (train, "latin.toml", "error: latin.toml: not UTF-8 .byte 9.; convert it"),
    (train, "unknown.toml", "error: unknown.toml: unknown key 'model.hiden_size'; known here: .*hidden_size"),
    (train, "string.toml", "error: string.toml: max_steps = '5' is of type str; it must be of type int"),
    (train, "float.toml", "error: float.toml: max_steps = 5.5 is of type float; it must be of type int"),
    (train, "bool.toml", "error: bool.toml: model.top_k = True is of type bool; it must be of type int"),
    (train, "table.toml", r"error: table.toml: model = 3; it must be a table, \[model\]"),
    (train, "zero.toml", "error: zero.toml: model.top_k is 0; it must be at least 1"),
    (train, "device.toml", "error: .*tpu.*cpu"),
    (prepare_data, "none.toml", "error: none.toml: no such configuration file"),
    (prepare_data, "unknown.toml", "error: unknown.toml: unknown key '.*seeds'; known here: .*seed"),
    (prepare_data, "string.toml", "error: string.toml: .*pools = '5' is of type str; it must be of type int"),
    (prepare_data, "table.toml", "error: table.toml: data = 3"),
    (prepare_data, "zero.toml", "error: zero.toml: --pools is 0; it must be at least 1"),
    # flags
    (train, "tiny.toml --max-steps many", "--max-steps: .*'many'"),
    (train, "tiny.toml --max-steps 0", "--max-steps is 0; it must be above 0"),
    (train, "tiny.toml --model.top-k 0", "model.top_k is 0; it must be at least 1"),
    (train, "tiny.toml --model.number-chunk 5 --out other",
     "error: model.number_chunk is 5; with this tokenizer it must be 0"),
    (train, "tiny.toml --routing-dropout 1 --out other",
     "routing_dropout is 1.0; it must be at least 0 and below 1"),
    (train, "tiny.toml --router-lm-weight -1 --out other",
     "--router-lm-weight is -1.0; it must be at least 0"),
    (train, "tiny.toml --data.properties -1", "properties is -1; it must be at least 0"),
    (train, "tiny.toml --device tpu", "'tpu' .*--device"),
    (train, f"tiny.toml --device {MISSING_DEVICE}",
     f"error: --device {MISSING_DEVICE}: not available here; available: .*cpu"),
    (train, "tiny.toml --maxsteps 5", "--maxsteps"),
    (train, "tiny.toml --seed -1 --out other", "seed .*-1"),
    (prepare_data, "tiny.toml --pools 0", "--pools is 0; it must be at least 1"),
    (prepare_data, "tiny.toml --needles 0 --chains 0", "needles, chains and properties are all 0"),
    (prepare_data, "tiny.toml --properties -1 --out other", "properties is -1; it must be at least 0"),
    (prepare_data, "tiny.toml --filler -1 --out other", "filler is -1; it must be at least 0"),
    (prepare_data, "tiny.toml --number-tokens --vocab-size 1028 --out other",
     "error: vocab_size is 1028; .* at least 1029"),
    (prepare_data, "tiny.toml --seed -1 --out other", "seed .*-1"),
    (prepare_data, "tiny.toml --vocab-size 260 --out other", "error: vocab_size is 260; .* at least 261"),
    (prepare_data, "tiny.toml --encoding gpt1 --out other",
     "error: encoding 'gpt1' is unknown: no folder .*gpt2"),
    (prepare_data, "--documents docs --out other", "documents and questions go together"),
    (prepare_data, "--data , --out other", "data is ','; name a set"),
    (prepare_data, "tiny.toml --vocab-size 5000000000 --out other", "vocab_size is 5000000000; it must be b"),
    (train, "tiny.toml --number-limit 4000000000000000000", "number_limit is 4000000000000000000; .*at most"),
    (sample, "--checkpoint good --documents docs --temperature -1 q",
     "temperature is -1.0; it must be at least 0"),
    (sample, "--checkpoint good --documents docs --top-p 0 q",
     "top_p is 0.0; it must be above 0 and at most 1"),
    (sample, "--checkpoint good --documents docs --max-documents 0 q",
     "max_documents is 0; it must be at least 1, or -1"),
    (sample, "--checkpoint good --documents docs --max-document-tokens -1 q",
     "--max-document-tokens is -1; it must be at least 0"),
    (sample, "--checkpoint good --memory other --max-document-tokens 9 q",
     "--max-document-tokens is about --documents; give them, or leave it out"),
    (sample, "--checkpoint good --documents docs --max-rounds two q", "--max-rounds: .*'two'"),
    (sample, f"--checkpoint good --documents docs --device {MISSING_DEVICE} q",
     f"error: --device {MISSING_DEVICE}: not available"),
    (sample, "--checkpoint good q", "error: --documents is missing"),
    (evaluation, "--checkpoint good --lengths 16q", "--lengths 16q: '16q' is not a length"),
    (evaluation, "--checkpoint good --lengths 0", "--lengths 0: '0' is not a length"),
    (evaluation, "--checkpoint good --questions 0", "questions is 0; it must be at least 1"),
    (evaluation, "--checkpoint good --top-k -1", "--top-k is -1; it must be at least 0"),
    (evaluation, "--checkpoint good --top-k 1001", "--top-k is 1,001; it must be at most 1,000"),
    (evaluation, "--checkpoint good --task niah", "'niah' .*--task.* 'niah_multikey'"),
    (evaluation, "--checkpoint good --seed -1 --lengths 1k --questions 1", "seed .*-1"),
    (evaluation, "--checkpoint good --filler -1", "filler is -1; it must be at least 0"),
    (evaluation, "--checkpoint good --baseline bm26", "'bm26' .*--baseline.* 'bm25'"),
    (evaluation, "--checkpoint good --baseline bm25 --task niah_single",
     "--baseline bm25: not for niah_single, .* another --task"),
    (evaluation, "--checkpoint good --temperature -1", "temperature is -1.0; it must be at least 0"),
    (evaluation, "--checkpoint good --lengths 500,1k --questions 100",
     "error: --lengths: .*100 questions .*fewer --questions"),
    (evaluation, "--checkpoint good --lengths 5 --questions 1", "error: --lengths: 5 tokens .*longer memory"),
    (evaluation, "--checkpoint good --lengths 5 --questions 1 --task niah_single",
     "error: --lengths: 5 tokens .*longer memory"),
    # folders and files
    (prepare_data, "--documents none --questions good.jsonl --out other", "error: none: no such folder"),
    (prepare_data, "--documents empty --questions good.jsonl --out other", "error: empty: no text in it"),
    (prepare_data, "--documents latin --questions good.jsonl --out other",
     "error: latin: no text in it; .*a.txt: not UTF-8"),
    (prepare_data, "--documents docs --questions none.jsonl --out other", "error: none.jsonl: "),
    (prepare_data, "--documents docs --questions bad.jsonl --out other --vocab-size 300",
     "error: bad.jsonl:2: not an object"),
    (prepare_data, "tiny.toml --out thesis",
     "error: thesis: exists and is not prepared data; give another --out"),
    (prepare_data, "tiny.toml --out tiny.toml", "error: tiny.toml"),
    (sample, "--checkpoint good --documents none q", "error: none: no such folder"),
    (sample, "--checkpoint good --documents empty q", "error: empty: no text in it"),
    (sample, "--checkpoint good --documents latin q", "error: latin: no text in it; .*a.txt: not UTF-8"),
    (evaluation, "--checkpoint good --lengths 300 --questions 1 --json tiny.toml/rows.json",
     "error: tiny.toml"),
    (sample, "--checkpoint good --documents none --memory other q", "error: none: no such folder"),
    (sample, "--checkpoint good --documents docs --memory docs/bank q",
     "error: --memory docs/bank: lies in --documents docs, and would be read, too"),
    (prepare_data, "--documents docs --questions good.jsonl --out docs/data",
     "error: --out docs/data: lies in --documents docs"),
    (sample, "--checkpoint good --documents docs --questions good.jsonl --json ./good.jsonl",
     "error: --json ./good.jsonl: is good.jsonl, which would be lost"),
    (sample, "--checkpoint good --documents docs --questions good.jsonl --json docs",
     "error: --json docs: not a regular file"),
    (evaluation, "--checkpoint good --data good.jsonl --documents docs --json good.jsonl",
     "error: --json good.jsonl: is good.jsonl, which would be lost"),
    (evaluation, "--checkpoint good --data good.jsonl --documents docs --json docs/rows.json",
     "error: --json docs/rows.json: lies in --documents docs, and would be read, too; give another place"),
    (evaluation, "--checkpoint good --data docs/q.jsonl --documents docs",
     "error: --data docs/q.jsonl: lies in --documents docs"),
    (sample, "--checkpoint good --documents docs --questions docs/q.jsonl --json rows",
     "error: --questions docs/"),
    (prepare_data, "--documents docs --questions docs/q.json --out other",
     "error: --questions docs/q.json: lies in --documents docs"),
    (evaluation, "--checkpoint good --data good.jsonl --documents docs --memory docs/bank",
     "error: --memory docs/bank: lies in --documents docs, and would be read, too"),
    (sample, "--checkpoint good --documents docs --questions good.jsonl --json docs/a.txt",
     "error: --json docs/a.txt: lies in --documents docs"),
    (evaluation, "--checkpoint good --json rows --plot rows", "error: --plot rows: is rows, which would be"),
    (train, "tiny.toml --out odd_data --data.out odd_data", "error: --out is odd_data, which holds the prep"),
    (needles, "--out docs", "error: --out docs: is there, and not empty"),
    # checkpoints
    (evaluation, "--checkpoint good --baseline oracle --zero-values",
     "zero-values is about the memory, --baseline oracle has none"),
    (evaluation, "--checkpoint good --baseline bm25 --routing-keys int8",
     "routing-keys is about the memory, --baseline bm25 has none"),
    (evaluation, "--checkpoint good --task niah_single --memory bank",
     "--memory: a bank holds one memory as it is; leave out niah_single"),
    (evaluation, "--checkpoint good --beside none.json",
     "error: --beside none.json: No such file or directory"),
    (evaluation, "--checkpoint good --beside good.jsonl",
     "error: --beside good.jsonl: not a file that --json wrote"),
    (evaluation, "--checkpoint good --memory docs", "error: docs: exists and is not a memory bank"),
    (sample, "--checkpoint none --documents docs q",
     "error: none/config.json: no such file; none is not a checkpoint"),
    (sample, "--checkpoint empty --documents docs q",
     "error: empty/config.json: no such file; empty is not a checkpoint"),
    (sample, "--checkpoint no_weights --documents docs q",
     "error: no_weights/model.safetensors: no such file"),
    (sample, "--checkpoint half --documents docs q",
     "error: half/model.safetensors: not a whole safetensors file"),
    (sample, "--checkpoint shape --documents docs q",
     "error: shape/model.safetensors: tensor .* is .*16.*; the configuration says .*24"),
    (sample, "--checkpoint layers --documents docs q",
     "error: layers/model.safetensors: tensor model.layers.* the configuration says"),
    (sample, "--checkpoint type --documents docs q",
     "error: type/config.json: hidden_size = '16' is of type str"),
    (sample, "--checkpoint float --documents docs q", "error: float/config.json: "),
    (sample, "--checkpoint topk --documents docs q", "error: .*top_k is 0; it must be at least 1"),
    (sample, "--checkpoint chunk --documents docs q",
     "error: model.number_chunk is 5; with this tokenizer it must be 0"),
    (sample, "--checkpoint no_tokenizer --documents docs q",
     "error: no_tokenizer/tokenizer_msa.json: no tokenizer here"),
    (sample, "--checkpoint large_tokenizer --documents docs q",
     "error: large_tokenizer: the tokenizer has .* the model only"),
    (evaluation, "--checkpoint none", "error: none/config.json: no such file"),
    # training data that does not fit
    (train, "tiny.toml --data.out none", "error: none: no prepared data here; run python prepare_data.py"),
    (train, "tiny.toml --data.pools 5",
     "error: .*data: prepared with pools = 4, but this run says 5; run prepare_data.py"),
    (train, "tiny.toml --data.out later_data --out other",
     "error: later_data: .*a_setting_of_tomorrow.*run prepare_data.py"),
    (train, "tiny.toml --model.vocab-size 300",
     "error: model.vocab_size is 300; the tokenizer of .* has .* at least as many"),
    (train, "tiny.toml --data.out odd_data --out other",
     "error: odd_data/train: pool 0 holds token id 5000, .*vocabulary ends at 607"),
]


@pytest.mark.parametrize("script,args,message", MISTAKES,
                         ids=[f"{script.__name__} {args}" for script, args, _ in MISTAKES])
def test_mistakes(run, here, files_of, script, args, message):
    """A mistake would end in a traceback or in a sentence that does not say what to change,
    or would be carried out."""
    before = files_of(here).keys()
    result = run(script, *args.split())
    assert result.code == 2
    assert re.search(message, result.error), result.err
    assert "Traceback" not in result.err
    own = result.err.splitlines()[-1].startswith("error: ")  # else a wrong flag, which tyro explains
    assert own == message.startswith("error: ") or "helptext" in result.err
    assert files_of(here).keys() == before


# ------------------------------------------------------------------------------------------------------------
# What works

def names_of(config, prefix="", skip=()):
    """Flags of a configuration, nested ones with their table's name (unless the table is in `skip`)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from names_of(value, prefix if field.name in skip else f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}".replace("_", "-")


@pytest.mark.parametrize("script,config,positional", [
    (train, train.TrainConfig, []), (prepare_data, prepare_data.DataConfig, []),
    (sample, sample.SampleConfig, ["question"]), (evaluation, evaluation.EvalConfig, [])])
def test_help(run, script, config, positional):
    """--help would fail, or leave out a setting, its explanation or the commands to copy."""
    result = run(script, "--help")
    assert result.code == 0 and result.err == ""
    for name in names_of(config(), skip=("interleave",)):
        expected = name.upper() if name in positional else f"--{name}"
        assert re.search(rf"(?<![\w-]){re.escape(expected)}(?![\w-])", result.out), expected
    assert f"python {script.__name__}.py" in result.out
    text = " ".join(re.sub("[\u2500-\u257f|]", " ", result.out).split())
    explained = {*explanations(config())}
    missing = [comment for comment in explained if " ".join(comment.split()) not in text]
    assert len(explained) > 6 and not missing
    assert result.out.startswith(f"usage: {script.__name__}.py {'[FILE.toml] ' * (script is not sample)}[-h]")


def explanations(config):
    """The whole comments of a configuration's fields, behind them or above; every field must have one."""
    lines = open(inspect.getsourcefile(type(config)), encoding="utf-8").read().split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith(f"class {type(config).__name__}"))
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(getattr(config, field.name)):
            yield from explanations(getattr(config, field.name))
            continue
        found = [i for i, line in enumerate(lines[first:], first) if line.startswith(f"    {field.name}: ")]
        if not found:
            continue  # it is inherited
        at, comment = found[0], ""
        if "  # " in lines[at]:
            yield lines[at].rpartition("  # ")[2]
            continue
        while lines[at - 1].startswith("    # "):
            at, comment = at - 1, f"{lines[at - 1][6:]} {comment}"
        assert comment, f"--{field.name} is not explained"
        yield comment


def test_sample(run, here):
    """An answer would not come, or not with the sources and the trace that were asked for."""
    question = ["--checkpoint", "good", "--documents", "docs",
                "What is the special magic number for gentle-otter?"]
    result = run(sample, *question)
    assert result.code == 0 and result.out.startswith("2 documents, ") and "round: " not in result.out
    traced = run(sample, *question, "--trace", "--max-rounds", 1)
    assert traced.code == 0 and traced.out.count("round: routed to [") == 1
    assert re.search(r"round: routed to \[[01]\] \S+, \[[01]\] \S+\n +named (\[[01]\]|nothing)", traced.out)
    appended = re.findall(r"appended \[(\d)\] (\S+:\d+-\d+): (.*)", traced.out)
    assert appended
    for number, source, text in appended:
        assert (source, text) == {
            "0": ("a.txt:1-1", "One of the special magic numbers for gentle-otter is: 4729103."),
            "1": ("b.md:1-1", "The quiet river can follow the amber castle.")}[number]
        assert f"  [{number}] {source}\n" in traced.out
    again = run(sample, *question, "--trace", "--max-rounds", 1)
    assert again.out.split("tokens/s")[1] == traced.out.split("tokens/s")[1]


def test_sample_of_the_memory_alone(run, here):
    """An answer that no appended text supports would name no source,
    or another one than the document that ranked first."""
    result = run(sample, "--checkpoint", "good", "--documents", "docs", "What is it?",
                 "--trace", "--max-rounds", 0)
    assert result.code == 0 and result.out.count("round: routed to [") == 1 and "appended [" not in result.out
    first = re.search(r"round: routed to \[(\d)\]", result.out)[1]
    source = ("a.txt:1-1", "b.md:1-1")[int(first)]
    assert result.out.endswith(f"\n  [{first}] {source} (read in the memory; no text was appended)\n")


def test_sample_is_repeatable(run, here):
    """The same seed would sample another answer, or another seed the same."""
    flags = ["--checkpoint", "good", "--documents", "docs", "--temperature", 2,
             "--max-answer-tokens", 20, "why?"]
    answers = [run(sample, *flags, "--seed", seed).out.split(" on cpu")[-1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2] and len(answers[0]) > 30


@pytest.mark.parametrize("typed,answers", [("why?\n\n  \nwhere?\n", 2), ("", 0), ("why?", 1)])
def test_sample_asks_for_questions(run, here, monkeypatch, typed, answers):
    """Without a question on the command line the terminal would not be read,
    or its end would be a traceback."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    result = run(sample, "--checkpoint", "good", "--documents", "docs", "--trace", "--max-rounds", 1,
                 "--max-answer-tokens", 2)
    assert result.code == 0 and result.out.count("question> ") >= answers + 1
    assert result.out.count("round: routed to") == answers


def test_a_question_may_end_like_a_file(run, here):
    """A question that ends in .toml would be taken for a configuration file."""
    result = run(sample, "--checkpoint", "good", "--documents", "docs", "What is in broken.toml")
    assert result.code == 0, result.err
    result = run(sample, "What is in pyproject.toml", "--checkpoint", "good", "--documents", "docs")
    assert result.code == 0, result.err


@pytest.mark.parametrize("task,more", [
    ("niah_single", []), ("niah_multikey", []), ("two_hop", []), ("two_hop", ["--zero-values"]),
    ("read_pooled", ["--max-rounds", 0])])
def test_eval(run, here, tmp_path, task, more):
    """A table would lack rows or columns, or hold numbers that cannot be."""
    flags = ["--checkpoint", "good", "--task", task, "--lengths", "900,300", "--questions", 2, "--seed", 5,
             "--max-answer-tokens", 8, *more]
    result = run(evaluation, *flags, "--json", tmp_path / "new" / "rows.json")
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert len(rows) == 2 and rows[0]["documents"] < rows[1]["documents"]
    for row, length in zip(rows, (300, 900)):
        assert (row["task"], row["questions"], row["top_k"], row["seed"]) == (task, 2, 2, 5)
        assert row["zero_values"] == ("--zero-values" in more)
        assert length - 60 < row["memory_tokens"] <= length
        assert all(row[name] in (0, 0.25, 0.5, 0.75, 1)
                   for name in ("recall_at_k", "router_top1", "named", "exact_match"))
        assert row["named"] == 0 or row["max_rounds"] > 0
        assert row["seconds_per_question"] > 0 and row["encode_tokens_per_second"] > 0
        assert f"{row['memory_tokens']:,}" in result.out


def answers_of(run, out, *flags):
    """The rows of a short evaluation of a checkpoint."""
    result = run(evaluation, "--checkpoint", out, "--lengths", 600, "--questions", 2,
                 "--max-answer-tokens", 3, "--json", out / "rows.json", *flags)
    assert result.code == 0, result.err
    return json.loads((out / "rows.json").read_text())


@pytest.mark.parametrize("baseline", ["no_memory", "oracle", "bm25"])
def test_eval_of_baselines(run, here, tmp_path, baseline):
    """A baseline would fail with a real model, or not be a row of the same table."""
    if baseline == "bm25":
        pytest.importorskip("bm25s")
    out = shutil.copytree("good", tmp_path / "checkpoint")
    row, = answers_of(run, out, "--baseline", baseline)
    plain, = answers_of(run, shutil.copytree("good", tmp_path / "plain"))
    assert row["baseline"] == baseline and plain["baseline"] == "none" and row["seconds_per_question"] > 0
    assert row.keys() == plain.keys()
    assert all(row[name] == plain[name] for name in ("documents", "memory_tokens", "questions", "seed"))


def test_reading_from_start_to_end(run, here, tmp_path):
    """Documents with filler and properties, numbers in tokens of their own and a model made for them could
    not be used together."""
    settings = {"out": tmp_path / "data", "properties": 2, "filler": 1, "vocab-size": 1100}
    data = [[f"--{table}{name}", value] for table in ("", "data.") for name, value in settings.items()]
    assert run(prepare_data, "tiny.toml", *sum(data[:4], []), "--number-tokens").code == 0
    model = [f"--model.{name}" for name in ("equal-routers", "copy-init", "normalize-values", "score-bias",
                                            "qk-norm")]
    trained = run(train, "tiny.toml", *sum(data[4:], []), "--data.number-tokens", "--model.vocab-size", 1100,
                  "--max-steps", 2, "--out", tmp_path / "run", *model, "--model.number-chunk", 5)
    assert trained.code == 0, trained.err
    row, = answers_of(run, tmp_path / "run", "--task", "read_pooled", "--max-rounds", 0, "--filler", 1)
    assert row["named"] == 0 and row["filler"] == 1
    assert answers_of(run, tmp_path / "run", "--task", "two_hop", "--zero-values")[0]["zero_values"]
    asked = run(sample, "--checkpoint", tmp_path / "run", "--documents", "docs", "--max-answer-tokens", 2,
                "--trace", "What is 1?")
    assert asked.code == 0 and asked.out.startswith("2 documents, "), asked.err
    assert "round: routed to [" in asked.out, asked.err


def test_own_data_from_start_to_end(run, here, tmp_path):
    """Your own documents and questions could be prepared, but not trained on or asked about."""
    data = ["--documents", "docs", "--questions", "good.jsonl", "--out", tmp_path / "data",
            "--vocab-size", 300, "--pools", 3, "--validation-pools", 1, "--documents-per-pool", 2]
    assert run(prepare_data, *data).code == 0
    flags = [f"--data.{flag[2:]}" if str(flag).startswith("--") else flag for flag in data]
    model = ["--model.vocab-size", 300, "--model.hidden-size", 16, "--model.num-hidden-layers", 2,
             "--model.intermediate-size", 16]
    trained = run(train, *flags, *model, "--max-steps", 2, "--out", tmp_path / "run", "--device", "cpu")
    assert trained.code == 0, trained.err
    asked = run(sample, "--checkpoint", tmp_path / "run", "--documents", "docs", "--max-answer-tokens", 2,
                "What is 1?")
    assert asked.code == 0 and asked.out.startswith("2 documents, "), asked.err


def test_eval_plot(run, here, tmp_path):
    """The curve of an evaluation would not be drawn."""
    pytest.importorskip("matplotlib")
    flags = ["--checkpoint", "good", "--lengths", "300,600", "--questions", 1, "--max-answer-tokens", 1]
    result = run(evaluation, *flags, "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json")
    alone = (tmp_path / "a.png").read_bytes()
    assert result.code == 0 and alone.startswith(b"\x89PNG")
    assert run(evaluation, *flags, "--plot", tmp_path / "a.png", "--beside", tmp_path / "a.json").code == 0
    assert (tmp_path / "a.png").read_bytes() not in (alone, b"")
    undrawn = run(evaluation, *flags, "--beside", tmp_path / "a.json")
    assert undrawn.code == 2 and "--beside is drawn by --plot" in undrawn.error


# ------------------------------------------------------------------------------------------------------------
# Configurations and files

@dataclasses.dataclass
class Inner:
    size: int = 3
    rate: float = 0.5


@dataclasses.dataclass
class Outer:
    """A configuration."""
    steps: int = 10
    name: str = "a"
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_order_of_configuration(tmp_path):
    """A flag would not override the file, or the file not the defaults."""
    path = tmp_path / "run.toml"
    path.write_text("steps = 20\n[inner]\nsize = 5\nrate = 1\n")
    assert command_line(Outer, "", []) == Outer()
    assert command_line(Outer, "", [str(path)]) == Outer(20, "a", Inner(5, 1.0))
    flags = ["--inner.size", "7", "--name", "b"]
    assert command_line(Outer, "", [str(path), *flags]) == Outer(20, "b", Inner(7, 1.0))
    assert command_line(Inner, "", [str(path)], table="inner") == Inner(5, 1.0)
    with pytest.raises(UserError, match=r"run.toml: has no table \[other\], which is all that is read here"):
        command_line(Inner, "", [str(path)], table="other")
    path.write_text("")
    assert command_line(Inner, "", [str(path)], table="other") == Inner()


@pytest.mark.parametrize("table,message", [
    ({"step": 1}, "f.toml: unknown key 'step'; known here: inner, name, steps"),
    ({"inner": {"sizes": 1}}, "f.toml: unknown key 'inner.sizes'; known here: rate, size"),
    ({"inner": {"rate": "x"}},
     "f.toml: inner.rate = 'x' is of type str; it must be of type float, such as 0.5"),
    ({"steps": True}, "f.toml: steps = True is of type bool; it must be of type int, such as 10")])
def test_merge(table, message):
    """A mistake in a configuration file would be ignored, or would not be named."""
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        merge(Outer(), table, "f.toml")


def test_atomic_file(tmp_path, files_of):
    """A file would be half written when its writer fails, be unreadable to others, or leave rubbish."""
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as file:
        file.write("Grüße")
        assert not path.exists()
    assert path.read_bytes() == "Grüße".encode() and path.stat().st_mode & 0o777 == 0o666 & ~sample_umask()
    with pytest.raises(RuntimeError, match="stop"), atomic_file(path) as file:
        file.write("half")
        file.flush()
        raise RuntimeError("stop")
    assert files_of(tmp_path) == {"new/file.txt": "Grüße".encode()}
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


def sample_umask():
    """The permissions that an ordinary new file lacks."""
    import os
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "a"), "w"):
            pass
        return 0o666 & ~(os.stat(os.path.join(folder, "a")).st_mode & 0o777)


def test_every_script_is_installed():
    """`pip install` would leave out a script, and what imports it would fail."""
    root = Path(train.__file__).parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert sorted(listed) == sorted(script.stem for script in root.glob("*.py"))
