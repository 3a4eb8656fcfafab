"""What every script needs and none is about: the command line, the device, processes, whole files.

A script's configuration is one dataclass. Its defaults are overridden by a TOML file, and that by flags:

    config = command_line(TrainConfig, __doc__)      # python train.py config/demo.toml --max-steps 500

A user's mistake is a `UserError`: it names the flag, file or line, what was found, what is allowed.
`main(script)` prints it and exits with code 2.
"""
import atexit
import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import sys
import tempfile
import time
import tomllib
import typing
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(ValueError):
    """A mistake of the user's, told in one sentence; a traceback would not help."""


def main(script):
    """Run `script()`; a user's mistake or a failing disk ends in one line on stderr and exit code 2."""
    try:
        return script()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno is None:  # a library's, not about a file
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}"
        if error.errno == errno.ENOSPC:
            message += "; free some space and run again (what was saved before is intact)"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def command_line(config_class, description, args=None, table=None, takes_file=True):
    """Build `config_class` from its defaults, an optional TOML file (first argument), flags, in that order.

    table: read this table of the file only; the rest belongs to another script. takes_file: whether the first
    argument may be a file at all.

    Raises UserError for a TOML file that is missing, malformed, or holds an unknown key or a value of a wrong
    type. tyro itself reports wrong flags, and the checks of `__post_init__`, with exit code 2.
    """
    import tyro  # here: the kernels and their benchmark run where only torch, triton and numpy are installed

    args = list(sys.argv[1:] if args is None else args)
    default = config_class()
    if takes_file and args and args[0].endswith(".toml"):
        path = args.pop(0)
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            values = values.get(table, {}) if table else values
            if not isinstance(values, dict):
                raise UserError(f"{path}: {table} = {values!r} is a value; it must be a table, [{table}]")
            default = merge(default, values, path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such configuration file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
    return tyro.cli(config_class, default=default, args=args, description=description)


def merge(config, table, path, prefix=""):
    """`config` (a dataclass) with the values of a TOML `table`; nested tables fill nested dataclasses."""
    known = {field.name: field.type for field in dataclasses.fields(config)}
    changes = {}
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{path}: unknown key '{prefix}{key}'; known here: {', '.join(sorted(known))}")
        old = getattr(config, key)
        if dataclasses.is_dataclass(old) and isinstance(value, dict):
            value = merge(old, value, path, f"{prefix}{key}.")
        elif type(old) is float and type(value) is int:
            value = float(value)
        elif old is not None and type(value) is not type(old):
            raise UserError(f"{path}: {prefix}{key} = {value!r} is of type {type(value).__name__}; "
                            f"it must be of type {type(old).__name__}, such as {old!r}")
        elif typing.get_origin(known[key]) is typing.Literal and value not in typing.get_args(known[key]):
            allowed = ", ".join(typing.get_args(known[key]))
            raise UserError(f"{path}: {prefix}{key} = {value!r}; it must be one of {allowed}")
        changes[key] = value
    try:
        return dataclasses.replace(config, **changes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def detect_device(device="auto", dtype="auto", hidden_size=0):
    """The device and dtype to compute in, each `auto` or a name, and a sentence that says why.

    hidden_size: the model's, if known. On a CPU, bfloat16 is chosen for models of 512 and more where it is
    measured to be fast, and by a single process: several could measure differently.
    Returns (torch.device, torch.dtype, reason). Raises UserError for a device that is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, reason = device, "as asked"
    if device == "auto":
        kind = next(name for name in available if available[name])
        reason = {"cuda": "CUDA is available", "mps": "no CUDA, but Apple's MPS is available",
                  "cpu": "neither CUDA nor MPS is available"}[kind]
    elif not available.get(device, False):
        names = ", ".join(name for name in available if available[name])
        raise UserError(f"--device {device}: not available here; available: {names}")
    index = int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None
    world = int(os.environ.get("WORLD_SIZE", 1))
    if dtype == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported():
        dtype, reason = "bfloat16", f"{reason}; bfloat16 is fast here"
    elif dtype == "auto" and kind == "cpu" and hidden_size >= 512 and world == 1:
        speed = bfloat16_speed()
        dtype = "bfloat16" if speed >= 1.5 else "float32"
        reason = f"{reason}; {dtype}, as products in bfloat16 are {speed:.1f} times as fast as in float32"
    elif dtype == "auto":
        dtype, reason = "float32", f"{reason}; float32 is the safe choice here"
    return torch.device(kind, index), getattr(torch, dtype), reason


def to_device(x, device):
    """A CPU tensor, or numbers that make one, on the device; from pinned memory, so that nobody waits."""
    x = torch.as_tensor(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def bfloat16_speed():
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16, measured in some 20 ms;
    0 where torch knows no instructions for it."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0.0
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(384, 384, dtype=dtype)
        times = []
        for _ in range(5):  # the first one prepares, and others may be disturbed: the fastest counts
            began = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def autocast(device, dtype):
    """Mixed precision when `dtype` is bfloat16, nothing when it is float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def start_process_group(device, timeout):
    """Join the processes that torchrun has started; returns the store that they share.

    timeout: seconds that a collective waits for the slowest. On a CPU the group ends with the interpreter,
    after an error too: gloo's threads abort if they free a tensor later. On a GPU call `end_process_group`.
    """
    # First of all: what imports this while a group exists (DDP does) keeps the group in default arguments.
    # Its threads then outlive `end_process_group` and may abort at exit.
    import torch.distributed.nn  # noqa: F401

    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        atexit.register(end_process_group)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timedelta(seconds=timeout))
    return store


def end_process_group():
    """Leave the group that `start_process_group` joined, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory():
    """Tell glibc to keep what is freed: on CPUs, small models would else spend their time in page faults."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 25)        # threshold of mmap, bytes
        mallopt(-1, 2_000_000_000)  # threshold of trimming
        mallopt(-2, 1 << 28)        # padding at the top


def return_freed_memory():
    """Give what `keep_freed_memory` has kept back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """Open a file that appears under `path` whole or not at all: temporary file, fsync, rename."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; it would be replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp made it private
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None  # the name that the user knows
        raise


UMASK = os.umask(0)
os.umask(UMASK)


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")
