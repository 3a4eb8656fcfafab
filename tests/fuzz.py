# ruff: noqa: E402
"""Thousands of odd inputs: each must end in success, or in one sentence that says what is wrong.

    python tests/fuzz.py [--inputs 1000] [--seed 1] [--kind documents]      # so many of every kind

`make fuzz` runs it, `make test` a short pass. An input follows from a good one and a seed: values of its JSON
or TOML become others, bytes are changed, cut, repeated or encoded otherwise. Children are forked for BATCH
inputs each: one that dies, hangs or wants two gigabytes is a fault too. Faults are named by their seeds.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import baseline
import common
import eval as evaluation
import prepare_data
import question_sets
import sample
import train
import training_sets
import training_state
from documents import documents_size, read_documents, tell_skipped
from model import MSA, ModelConfig
from prompts import ChatTokenizer, load_checkpoint
from tokenizer import train_encoding

SECONDS, BYTES, BATCH = 60, 2 << 30, 100
ODD = [None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1 << 31, 1 << 63, 1 << 80, float("inf"), float("nan"), "",
       " ", "x", "~", "0", "-1", "\0", "\ud800", "\ufeff", "\u2028", "é" * 300, "a" * 5000, [], {}, [[]],
       [None], {"": 0}, [1, "a"], "[" * 2000, "../..", "/", "\x1b[2J", "a\nb", "{{ x }}", "1e400", [0] * 1000]
ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1251", "utf-7"]
PARTS = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\r\n", b"\n", b"\x0c", b"\xe2\x80\xa8",
         b"\x85", b"\t", b" " * 3000, b"[" * 3000, b'{"a":' * 2000, b"<", b"<![CDATA[", b"]]>", b"{%", b"{{",
         b"\x1b[2J", b"=" * 99, b"# ", b"```", b"\xed\xa0\x80", b"1" * 5000, b'"', b"\\u0000", b"\\ud800",
         b",", b"}", b"version https://git-lfs"]


def damage(data, rng):
    """Bytes, perhaps with some of them changed."""
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        data = rng.choice([
            lambda: data[:at], lambda: data[:at] + rng.choice(PARTS) + data[at:],
            lambda: data[:at] + data[end:], lambda: data[:at] + data[at:end] * 3 + data[end:],
            lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1:],
            lambda: data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b""])),
            lambda: data.decode(errors="ignore").encode(rng.choice(ENCODINGS), errors="ignore")])()
    return data


def altered(value, rng):
    """A JSON value in which one part is another."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    key = rng.choice([*value] if isinstance(value, dict) else range(len(value)))
    value, kind = value.copy(), rng.random()
    if kind < 0.15:
        del value[key]
    elif kind < 0.25 and isinstance(value, list):
        value += value
    else:
        value[key] = altered(value[key], rng)
    return value


def spelled(value, rng):
    """A value as JSON, perhaps another or damaged."""
    value = altered(value, rng) if rng.random() < 0.3 else value
    data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return damage(data, rng) if rng.random() < 0.1 else data


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def lines(rows, rng):
    return rng.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(spelled(row, rng) for row in rows)


# ------------------------------------------------------------------------------------------------------------
# Kinds of inputs: each takes an empty folder and a Random

TEXT = ("# Boats\n\nThey float; grey ones, too.\n\nPiers\n=====\n\nTwo piers:\n\n* one of oak\n* one of stone"
        "\n\n```\n# code\n```\n" + "A long line. " * 50 + "\n").encode()
PAGE = (b"<html><head><title>Boats</title><style>p {}</style></head><body><p>Two <b>pi</b>ers<br>&amp;&#0;"
        b"&#xd800;<ul><li>a<li>b</ul><!-- no --><script>if (a < b)</script><![if !x]><svg/></body></html>")
PDF = b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\ntrailer\n<< /Root 1 0 R >>\nstartxref\n"
NAMES = ["a.txt", "b.md", "c.html", "d.pdf", "e.rst", "f", ".hidden", "g.jsonl", "sub/h.txt", "e\u0301.txt",
         "\xe9.txt", os.fsdecode(b"n\xff.txt"), "n\x1b.txt", "o\n.txt", "p:1.txt", "#.txt", "q.TXT", "a" * 99]
ROWS = [{"_id": f"d{i}", "id": f"d{i}", "title": f"Title {i}", "text": f"Text {i} of it."} for i in range(4)]
ASKED = [{"question": f"What is {i}?", "answer": "it", "answers": ["it"], "documents": ["a.txt:1"],
          "pooled": False, "_id": f"q{i}", "text": f"What is {i}?"} for i in range(3)]
count_words = lambda text: len(text.split())


def check(documents, most):
    """What every Document must be."""
    assert len({document.id for document in documents}) == len(documents), "two documents with one id"
    for document in documents:
        (document.where() + document.spelled()).encode()
        assert common.printable(document.where()) == document.where() and document.text.strip()
        assert 0 < document.first_line <= document.last_line and count_words(document.text) <= most


def fuzz_documents(folder, rng):
    for name in rng.sample(NAMES, rng.randrange(1, 8)):
        write(folder / "d" / name, damage(PAGE if "html" in name else PDF if "pdf" in name else TEXT, rng))
    for target in rng.sample(["a.txt", "sub", ".", "..", "nowhere", "/proc/self/mem"], rng.randrange(2)):
        (folder / "d" / "link").symlink_to(target)
    skipped, most = {}, rng.choice([1, 3, 20, 1000])
    documents_size(folder / "d")
    check([*read_documents(folder / "d", count_words, most, skipped)], most)
    tell_skipped(skipped, print)


def fuzz_questions(folder, rng):
    write(folder / "d.jsonl", lines(ROWS, rng))
    documents = [*read_documents(folder / "d.jsonl", count_words, 9)]
    names = [*["d1:1"] * 50, "d1:²", "d1:" + "9" * 5000, ":", "", "d1:2", "d2:-1", "d0"]
    write(folder / "q.jsonl", lines([row | {"documents": [rng.choice(names)]} for row in ASKED], rng))
    read = rng.choice([training_sets.training_questions, question_sets.read_questions])
    for question in read(folder / "q.jsonl", documents):
        question.text.encode()


def fuzz_sets(folder, rng):
    tables = {"corpus": ROWS, "queries": ASKED, "impossible": [{"text": "Who?", "document": "d0"}]}
    damaged = rng.choice([*tables, None])
    for name, rows in tables.items():
        write(folder / "s" / f"{name}.jsonl", lines(rows, rng if name == damaged else CALM))
    judged, tab = rng.choice(["", "query-id\tcorpus-id\tscore\n"]), rng.choice("\t\t ")
    for i in range(3):
        columns = [f"q{i}", *["0"] * rng.choice([0, 0, 1]), f"d{i}", rng.choice(["1", "1", "0", "1.0"])]
        judged += tab.join(columns) + "\n"
    write(folder / "s" / "qrels" / "test.tsv", damage(judged.encode(), CALM if damaged else rng))
    qas = [{"question": "Who?", "id": "1", "is_impossible": False, "answers": [{"text": "he"}]}]
    articles = [{"title": f"T_{i}", "paragraphs": [{"context": "He.", "qas": qas}]} for i in range(4)]
    write(folder / "s.json", spelled({"data": articles}, rng))
    path = folder / rng.choice(["s", "s", "s.json"])
    texts, questions, none = question_sets.read_set(path)
    for text in [*texts, *(question.text for split in questions.values() for question in split)]:
        assert text.encode()
    assert all(question and (place is None or texts[place])
               for split in none.values() for question, place in split)
    asked, *_ = question_sets.choose_split(questions, none, "", path)
    assert all(texts[i].strip() for question in asked for i in question.gold)


def toml(table, prefix=""):
    """A table as TOML; of what TOML does not have, anything."""
    own = [f"{key} = {json.dumps(value)}\n" for key, value in table.items() if not isinstance(value, dict)]
    return "".join(own) + "".join(f"[{prefix}{key}]\n{toml(value, f'{prefix}{key}.')}"
                                  for key, value in table.items() if isinstance(value, dict))


def fuzz_configurations(folder, rng):
    kind = rng.choice([train.TrainConfig, prepare_data.DataConfig, evaluation.EvalConfig, sample.SampleConfig,
                       baseline.BaselineConfig])
    values = dataclasses.asdict(kind())
    names = rng.sample([*values], 2)
    for _ in range(rng.randrange(3)):
        values = altered(values, rng)
    data = toml(values if isinstance(values, dict) else {}).encode("utf-8", "surrogatepass")
    write(folder / "c.toml", damage(data, rng) if rng.random() < 0.3 else data)
    flags = [f"--{name.replace('_', '-')}={rng.choice(ODD)}".replace("\0", "") for name in names]
    flags = [flag.encode(errors="replace").decode() for flag in flags[:rng.randrange(3)]]
    common.command_line(kind, "", [str(folder / "c.toml"), *flags], "data" if rng.random() < 0.1 else None)


def fuzz_runs(folder, rng):
    """sample.py with values that are in range, on a tiny model."""
    for name in ("a.txt", "b.txt"):
        write(folder / "d" / name, damage(TEXT, rng if name == "a.txt" else CALM))
    floats = [0, 1e-9, 0.5, 1, 1e6]
    given = {"temperature": floats, "top-p": [1e-300, 0.5, 1], "router-weight": floats, "max-rounds": [-1, 0],
             "max-documents": [1, 2, 8], "seed": [0, (1 << 63) - 1], "max-document-tokens": [9, 99, 1 << 62]}
    flags = [f"--{name}={rng.choice(given[name])}" for name in rng.sample([*given], 3)]
    if rng.random() < 0.5:
        flags += [f"--memory={folder / 'bank'}",
                  *rng.sample(["--info", "--verify", "--compact", "--trace", "--content=int8"], 2)]
    question = damage(b"What is it?", rng).decode(errors="replace").replace("\0", "")
    sys.argv = ["sample.py", f"--checkpoint={MADE['model']}", f"--documents={folder / 'd'}",
                "--max-answer-tokens=2", *flags, "--", question]
    sample.script()


def fuzz_checkpoints(folder, rng):
    shutil.copytree(MADE["model"], folder / "m")
    path = folder / "m" / rng.choice([*["config.json"] * 3, "tokenizer_msa.json", "tokenizer.tiktoken",
                                      "model.safetensors"])
    data = path.read_bytes()
    json_data = lambda: spelled(altered(json.loads(data), rng), rng)
    path.write_bytes(json_data() if path.suffix == ".json" else damage(data, rng))
    model, tokenizer = load_checkpoint(folder / "m", torch.device("cpu"))
    model.encode([torch.tensor(tokenizer.document(1, tokenizer.encode("One of them is: 12.")))], [1])


def fuzz_tokenizers(folder, rng):
    about = {"eos_token": "</s>", "bos_token": {"content": "<s>"},
             "chat_template": damage(TEMPLATE, rng).decode(errors="replace")}
    files = {"tokenizer.json": json.loads(MADE["tokenizer"]), "tokenizer_config.json": about,
             "generation_config.json": {"eos_token_id": [2, 0]}}
    damaged = rng.choice([*files, None])
    for name, value in files.items():
        write(folder / name, spelled(altered(value, rng), rng) if name == damaged else spelled(value, CALM))
    tokenizer = ChatTokenizer(folder)
    for text in ("What is it?", "    a  <s> b\n\n</s>", "é\ufffd\u2028"):
        tokenizer.decode([*tokenizer.message(text, [(1, text)]), *tokenizer.routed(text)[0]])


def fuzz_logs(folder, rng):
    write(folder / "log.jsonl", lines([{"step": i, "split": "train"} for i in range(1, 4)], rng) + b"\n")
    about = {"step": 3, "position": 3, "ranks": 1, "settings": {}, "files": ["a"]}
    write(folder / "about.json", spelled(about, rng))
    training_state.read_log(folder / "log.jsonl", training_state.read_about(folder)["step"])


def fuzz_sessions(folder, rng):
    data = damage(b"What is it?\nWho was he?\n\nAnd \xc3\xa9?\n", rng)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), encoding="utf-8")
    for question in sample.typed_questions(sample.Ranks(torch.device("cpu"))):
        question.encode()


KINDS = {name.removeprefix("fuzz_"): run for name, run in [*globals().items()] if name.startswith("fuzz_")}
TEMPLATE = (b"{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '</s>' + '\\n'}}"
            b"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
CALM, MADE = random.Random(), {}
CALM.choice, CALM.random = lambda options: options[0], lambda: 1.0  # changes nothing


# ------------------------------------------------------------------------------------------------------------

def prepare(folder):
    """Make a tiny model, and a tokenizer.json."""
    MADE["model"], tokenizer = folder / "model", train_encoding([TEXT.decode()] * 3, 300)
    config = ModelConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         head_dim=8, num_attention_heads=2, num_key_value_heads=1, chunk_size=16)
    MSA(config).save_pretrained(folder / "model")
    tokenizer.save(MADE["model"])
    letters = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2} | letters, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens([AddedToken("    ", normalized=False)])
    MADE["tokenizer"] = made.to_str()


def outcome(kind, seed, folder):
    """What an input ends in: "good", "refused", or what is wrong about its end."""
    rng, said = random.Random(f"{kind} {seed}"), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            common.main(lambda: KINDS[kind](folder, rng))
        return "good"
    except SystemExit as stop:
        told = said.getvalue().strip()
        last = told.rpartition("\n")[2]
        good = last.startswith("error: ") and "a file: " not in last and len(last) < 2000
        good |= "helptext" in told  # tyro's words about a wrong flag
        return "refused" if stop.code == 2 and good else f"exit code {stop.code}: {told[-2000:]}"
    except BaseException:
        return traceback.format_exc()[-1500:]


def batch(kind, seeds, out):
    """Try seeds in this child; two lines of JSON for each go to the file handle `out`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES,) * 2)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            os.write(out, json.dumps([seed, "dies or hangs"]).encode() + b"\n")
            signal.alarm(SECONDS)
            found = outcome(kind, seed, Path(folder))
            signal.alarm(0)
            os.write(out, json.dumps([seed, found]).encode() + b"\n")


def fuzz(kind, seeds):
    """Try seeds of a kind; returns (good, refused, faults: seed -> what)."""
    found, todo = {}, [*seeds]
    while todo:
        reader, writer = os.pipe()
        if os.fork() == 0:
            with contextlib.suppress(BaseException):
                batch(kind, todo[:BATCH], writer)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            found |= {seed: what for seed, what in map(json.loads, file)}
        os.wait()
        todo = [seed for seed in todo if seed not in found]
    counts = [*found.values()]
    faults = {seed: what for seed, what in found.items() if what not in ("good", "refused")}
    return counts.count("good"), counts.count("refused"), faults


def script():
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS)
    args, total = parser.parse_args(), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for kind in [args.kind] if args.kind else KINDS:
            good, refused, faults = fuzz(kind, range(args.seed, args.seed + args.inputs))
            for seed, what in faults.items():
                print(f"--kind {kind} --seed {seed}: {what}")
            print(f"{kind}: {args.inputs:,} inputs, {good:,} good, {refused:,} refused by a sentence, "
                  f"{len(faults):,} faults", flush=True)
            total += len(faults)
    sys.exit(total > 0)


if __name__ == "__main__":
    script()
