"""What several test files need: the scripts, run in this process; a tiny prepared data set;
a tiny untrained checkpoint."""
import contextlib
import functools
import io
import multiprocessing
import os
import re
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before torch and triton are imported. Tests are of the CPU even beside a GPU, which `make gpu` tests.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

import torch

import common
import eval as evaluation
import prepare_data
from model import MSA, ModelConfig
from tokenizer import Tokenizer, train_encoding

torch.set_num_threads(1)

TINY = """
out = "checkpoint"
max_steps = 8
router_steps = 3
warmup_steps = 2
evaluate_every = 3
log_every = 1
device = "cpu"
[model]
vocab_size = 608
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
chunk_size = 16
top_k = 2
[data]
out = "{data}"
pools = 4
validation_pools = 2
needles = 2
chains = 1
noise = 1
vocab_size = 600
"""


# What `pytest -m fast` runs: files without whole trainings, large memories, processes or interpreted kernels.
FAST = {"test_documents", "test_interleave", "test_model", "test_prepare_data", "test_prompts",
        "test_tokenizer"}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in FAST:
            item.add_marker("fast")


@pytest.fixture(scope="session", autouse=True)
def words():
    """The word lists: reading them takes seconds, so that everything here shares one."""
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(prepare_data.Words)
        patch.setattr(prepare_data, "Words", cached)
        patch.setattr(evaluation, "Words", cached)
        yield cached


def run_script(module, *args):
    """Run a script's main as `python module.py args` does; returns its exit code and what it printed.

    `error` is stderr without line breaks and boxes. The handlers that the script set for signals are removed.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        patch.setenv("COLUMNS", "400")
        try:
            common.main(module.script)
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    error = " ".join(re.sub("[\u2500-\u257f]", " ", err.getvalue()).split())
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), error=error)


@pytest.fixture(scope="session")
def run():
    return run_script


def on_ranks(count, function, *args, kill=None):
    """Call function(rank, *args) in `count` processes that are forked, with the environment that torchrun
    gives its own: nothing is imported again. kill: called with the processes. Returns what each returned,
    None where it did not."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]

    def call(rank):
        places = dict(RANK=rank, WORLD_SIZE=count, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=count, MASTER_PORT=port)
        os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "localhost"}
        pipes[rank][1].send(function(rank, *args))

    started = [context.Process(target=call, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    if kill:
        kill(started)
    for process in started:
        process.join(60)
        assert process.exitcode is not None, "a rank waits for ever"
    return [receive.recv() if receive.poll() else None for receive, _ in pipes]


def run_as_rank(rank, module, *args):
    """For `on_ranks`: a script's exit code, output and errors."""
    result = run_script(module, *args)
    return result.code, result.out, result.err


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with `tiny.toml`, a configuration of a run that takes a tenth of a second,
    and its data in `data`."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.toml").write_text(TINY.format(data=(folder / "data").as_posix()))
    result = run_script(prepare_data, folder / "tiny.toml")
    assert result.code == 0, result.err
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return Tokenizer.load(tiny / "data")


@pytest.fixture(scope="session")
def number_tokenizer():
    """A tokenizer whose document numbers are tokens of their own: 256 bytes, 5 special tokens,
    768 places of numbers, 60 merges."""
    texts = ["One of the special magic numbers for gentle-otter is: 4729103.",
             "The colour of quiet-river is teal."] * 3
    return train_encoding(texts, 256 + 5 + 768 + 60, number_tokens=True)


def save_untrained(folder, tokenizer, **options):
    """Write a checkpoint of an untrained model, whose vocabulary is the tokenizer's; returns its folder."""
    torch.manual_seed(0)
    MSA(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                    chunk_size=16, top_k=2, **options)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny, tokenizer):
    return save_untrained(tiny / "untrained", tokenizer)


def read_files(folder):
    """The bytes of every file below a folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def files_of():
    return read_files


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile traces, which takes seconds, and leaves out what takes minutes: a list of what it did."""
    compiled, compile = [], torch.compile

    def trace(function, **_):
        compiled.append(function)
        return compile(function, backend="eager")
    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **_: setattr(self, "_compiled_call_impl", trace(self._call_impl)))
    return compiled
