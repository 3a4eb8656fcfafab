"""What every script needs and none is about: the command line, the device, processes, text, whole files.

A script's configuration is one dataclass. Its defaults are overridden by a TOML file, and that by flags:

    config = command_line(TrainConfig, __doc__)      # python train.py config/demo.toml --max-steps 500

A user's mistake is a `UserError`: it names the flag, file or line, what was found, what is allowed.
`main(script)` prints it and exits with code 2.
"""
import atexit
import codecs
import contextlib
import ctypes
import dataclasses
import errno
import functools
import importlib.util
import io
import json
import math
import os
import re
import shutil
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
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a letter gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += "; free some space and run again (what was saved before is intact)"
    except (MemoryError, RuntimeError) as error:
        sizes = re.search("allocate|out of memory|overflowed", str(error))
        if not (sizes or isinstance(error, MemoryError)):
            raise
        message = f"not enough memory for these sizes ({' '.join(str(error).split())})"
    if speaks():
        message = printable(message)
        if len(message) > 1000:  # it quotes what was found
            message = f"{message[:600]} [...] {message[-300:]}"
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def speaks():
    """Whether this process says why it ends: of those that torchrun started here only the first to ask."""
    try:
        file = Path(os.environ["TORCHELASTIC_ERROR_FILE"])  # in a folder of this rank's, in one of the run's
        os.close(os.open(file.parent.parent / "told", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except (KeyError, OSError):
        return True
    return True


def printable(text):
    """A text without control characters, which could drive a terminal: "\\x1b" stands for one. Unpaired
    surrogates, which stand for bytes of names that are not UTF-8, become "\\udcff"."""
    unseen = r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(unseen, lambda found: found[0].encode("unicode_escape").decode(), text)


def is_first_rank():
    """Whether this process is alone, or torchrun's rank 0, which alone speaks."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(items=None, **settings):
    """tqdm's bar, on the first rank, of what takes more than a second; nothing of it stays."""
    from tqdm import tqdm  # here: the kernels and their benchmark run where only torch, triton and numpy are
    return tqdm(items, leave=False, delay=1, disable=not is_first_rank(), **settings)


def parts_of(items, size, label, unit):
    """Items in parts of `size`, with a bar that shows them pass."""
    with progress_bar(desc=label, total=len(items), unit=unit) as bar:
        for start in range(0, len(items), size):
            part = items[start:start + size]
            yield part
            bar.update(len(part))


@functools.cache
def note(message):
    """Say on stderr, once, what a user may not expect."""
    if is_first_rank():
        print(f"note: {printable(message)}", file=sys.stderr)


def command_line(config_class, description, args=None, table=None, takes_file=True):
    """Build `config_class` from its defaults, an optional TOML file, flags, in that order.

    table: read this table of the file only; the rest belongs to another script. takes_file: whether an
    argument may be a file at all; it may stand anywhere.

    "~" at the start of a path is expanded. Raises UserError for a TOML file that is missing, malformed, or
    holds an unknown key or a value of a wrong type, and for numbers that no machine can compute with. tyro
    itself reports wrong flags, and the checks of `__post_init__`, with exit code 2.
    """
    import tyro  # here: the kernels and their benchmark run where only torch, triton and numpy are installed

    args, default = list(sys.argv[1:] if args is None else args), config_class()
    alone = {*switches(default)}
    valued = lambda arg: arg.startswith("--") and "=" not in arg and arg.replace("_", "-") not in alone
    files = [i for i, arg in enumerate(args) if takes_file and arg.endswith(".toml")
             and not arg.startswith("-") and not (i and valued(args[i - 1]))]
    if len(files) > 1:
        raise UserError(f"{args[files[0]]} and {args[files[1]]} are two configuration files; give one")
    if files:
        path = os.path.expanduser(args.pop(files[0]))
        try:
            text = read_text(path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: no such configuration file") from None
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # of TOML, or a number of 5,000 digits
            raise UserError(f"{path}: not valid TOML: {error}") from None
        if table and values and table not in values:
            raise UserError(f"{path}: has no table [{table}], which is all that is read here; write the line "
                            f"[{table}] above its settings")
        values = values.get(table, {}) if table else values
        if not isinstance(values, dict):
            raise UserError(f"{path}: {table} = {values!r} is a value; it must be a table, [{table}]")
        default = merge(default, values, path)
    prog = Path(sys.argv[0]).name + " [FILE.toml]" * takes_file
    parse = lambda: tyro.cli(config_class, default=default, args=args, description=description, prog=prog)
    config = told_once(parse) if "TORCHELASTIC_ERROR_FILE" in os.environ else parse()
    check_values(config)
    return config


def told_once(parse):
    """Call `parse`; what it prints before it exits is printed by one rank."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        if speaks():
            print(said.getvalue(), end="", file=sys.stderr if stop.code else sys.stdout)
        raise


def switches(config, prefix="--"):
    """The flags of a dataclass that take no value: those of its bools, and of nested ones."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from switches(value, f"{prefix}{name}.")
            yield from switches(value, prefix)  # tyro may leave the prefix out
        elif isinstance(value, bool):
            yield from (prefix + name, f"{prefix}no-{name}")


def check_values(config, prefix="--"):
    """Expand "~" in the paths of a dataclass, that is in its plain strings, in which paths may stand with
    commas between. Raises UserError for numbers that are not finite or need more than 64 bits, and NULs."""
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_values(value, f"{flag}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} is {value}; it must be a finite number")
        elif isinstance(value, int) and not -1 << 63 <= value < 1 << 63:
            raise UserError(f"{flag} is {value}; it must be below 2^63")
        elif isinstance(value, str) and "\0" in value:
            raise UserError(f"{flag} is {value!r}; it must not hold a NUL")
        elif field.type is str:
            setattr(config, field.name, ",".join(map(os.path.expanduser, value.split(","))))


def check_least(config, positive=(), **least):
    """Raises UserError for a number of a configuration that is below what it must at least be, or, of the
    names in `positive`, not above 0."""
    wanted = [(name, getattr(config, name) > 0, "above 0") for name in positive]
    wanted += [(name, getattr(config, name) >= low, f"at least {low}") for name, low in least.items()]
    for name, right, allowed in wanted:
        if not right:  # as NaN never is
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be {allowed}")


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
        elif dataclasses.is_dataclass(old):
            raise UserError(f"{path}: {prefix}{key} = {value!r}; it must be a table, [{prefix}{key}]")
        elif type(old) is float and type(value) is int and abs(value) < 1e300:
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


def proc_bytes(file, name):
    """A number that /proc/FILE gives in kB, as bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc", file).read_text())[1])


def peak_memory(device):
    """The most memory that this process has held, as text; on a torch.device, too, if it is a GPU."""
    try:
        text = f"{proc_bytes('self/status', 'VmHWM') / 1e9:.1f} GB"
    except OSError:  # not Linux
        text = "? GB"
    if device.type == "cuda":
        text += f" and {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the device"
    return text


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
    if kind == "cuda" and index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"this machine has {count} GPUs, none of them for rank {index}; give torchrun "
                        f"--nproc_per_node={count}, or --device cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if dtype == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, reason = "bfloat16", f"{reason}; bfloat16 is fast here"
    elif dtype == "auto" and kind == "cpu" and hidden_size >= 512 and world == 1:
        speed = bfloat16_speed()
        dtype = "bfloat16" if speed >= 1.5 else "float32"
        reason = f"{reason}; {dtype}, as products in bfloat16 are {speed:.1f} times as fast as in float32"
    elif dtype == "auto":
        dtype, reason = "float32", f"{reason}; float32 is the safe choice here"
    return torch.device(kind, index), getattr(torch, dtype), reason


def to_device(x, device):
    """A CPU tensor, or numbers that make one, on the device; from pinned memory, so that the host does not
    wait for the copy."""
    x = torch.as_tensor(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def timed(run):
    """(seconds, result) of a call."""
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def has_bfloat16():
    """Whether torch knows instructions of this CPU for products in bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bfloat16_speed():
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16, measured in some 20 ms;
    0 where it has no instructions for it."""
    if not has_bfloat16():
        return 0.0
    # The first product prepares, and others may be disturbed: the fastest counts
    best = lambda x: min(timed(lambda: x @ x)[0] for _ in range(5))
    x = torch.ones(384, 384)
    return best(x) / best(x.bfloat16())


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
                            world_size=world, timeout=timedelta(seconds=timeout),
                            device_id=device if device.type == "cuda" else None)
    return store


def is_of_a_lost_rank(error):
    """Whether a RuntimeError of a collective says that another rank has ended or does not answer."""
    return isinstance(error, dist.DistError) or bool(re.search("(?i)timed out|connection", str(error)))


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


# ------------------------------------------------------------------------------------------------------------
# Text

HEAD_BYTES = 1 << 16  # of a file, which tell how it is encoded
# Byte order marks; those of UTF-32 begin like those of UTF-16
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; UTF-16 is also known by its
    NULs. Its lines end in "\\n" alone. Raises OSError, and UserError for what is not text."""
    with open(path, "rb") as file, naming(path):
        data = file.read(HEAD_BYTES)
        encoding = encoding_of(data, path)
        if encoding != "utf-8" or b"\0" not in data:  # else it is no text, and may be long
            data += file.read()
    if encoding.startswith("utf-8") and b"\0" in data:
        raise UserError(f"{path}: holds NULs, which no text does")
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        raise UserError(f"{path}: not {name} (byte {error.start}); convert it to UTF-8") from None


def check_download(head, path, page=False):
    """Raises UserError where the first bytes of a file are of what git-lfs puts in its place, of gzip's, or,
    with `page`, of a web page."""
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a pointer of git-lfs, not the file; git lfs pull brings it")
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path}: compressed; gunzip it first")
    if page and head.lstrip().startswith(b"<"):
        raise UserError(f"{path}: a web page, not the file; download it again")


def encoding_of(head, path=""):
    """The name of the encoding of a file, from its first bytes. path: names it where that is a guess. Raises
    UserError as `check_download` does."""
    check_download(head, path)
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    even, odd = head[0::2].count(0), head[1::2].count(0)
    wide = "utf-16-le" if odd > even else "utf-16-be"  # it has spaces, whose upper byte is 0
    controls = re.search(r"[\0-\x08\x0e-\x1f]", head.decode(wide, errors="ignore"))
    if max(even, odd) <= len(head) // 20 or controls:
        return "utf-8"
    note(f"{path}: read as {wide.upper()}, for its NULs; it has no byte order mark")
    return wide


def numbered(text):
    """The lines of a text, pairs (number from 1, line), as editors count them: only \\n, \\r\\n and \\r
    end one."""
    return list(enumerate(re.split(r"\r\n|\r|\n", text), start=1))


def read_json(path, what):
    """The object in a JSON file. what: what it is, for the message. Raises UserError for another file,
    and for a missing one, which is taken for a checkpoint's: other callers look first."""
    try:
        text = read_text(path)
        check_download(text[:99].encode(), path, page=True)
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return values
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {Path(path).parent} is not a checkpoint") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not {what} ({type(error).__name__}: {error})") from None


def read_rows(path, wanted="a JSON object in UTF-8"):
    """Yields (line number, dict) of a .jsonl file, read line by line; empty lines are left out. Raises
    UserError for a missing file, and for a line that is not what is `wanted`."""
    try:
        data = open(path, "rb", HEAD_BYTES)  # once: it may be a pipe
        encoding = encoding_of(data.peek(), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file of one object a line") from None
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"  # a wrong byte costs its line
    with io.TextIOWrapper(data, encoding, errors) as file, naming(path):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # raises for an unpaired surrogate
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not {wanted}")
            yield number, row


# ------------------------------------------------------------------------------------------------------------
# Whole files

@contextlib.contextmanager
def naming(path):
    """An OSError that knows no name, as a full disk's, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync_handle(handle, path):
    """Wait until a file or folder is on the disk. Where its file system cannot do that, go on: only a power
    cut could undo anything."""
    try:
        with naming(path):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
        note(f"{path}: its file system cannot be told to write at once ({error.strerror}); "
             "a power cut may undo the last changes")


def sync_folder(folder):
    """Make what was renamed in `folder` survive a power cut."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # others may read it, or the system does not know how
        return
    try:
        sync_handle(handle, folder)
    finally:
        os.close(handle)


def make_folder(path, probe=False):
    """Make a folder, what it links to, and those above it, such that a power cut does not undo it. Returns
    it, without links. probe: raise OSError where no file can be written in it."""
    given, path = path, Path(os.path.realpath(path))
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if probe:
            tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(given)) from None
    for folder in missing:
        sync_folder(folder.parent)
    return path


def check_spelled(path):
    """Raises UserError for a path whose bytes are not UTF-8: safetensors and tokenizers read no other."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: its name is not UTF-8, and could not be read again; rename it") from None


@contextlib.contextmanager
def emptied(folder):
    """A folder that was new or empty is empty again where what is to be written in it fails."""
    try:
        yield
    except BaseException:
        for path in Path(folder).iterdir() if Path(folder).exists() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def check_output(flag, path, *others):
    """Make the folder of a file that will be written in the end. Raises UserError where it cannot be, and
    where it is one of `others`, paths or "", which this command reads or writes, too."""
    if path:
        make_folder(Path(path).parent, probe=True)
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{flag} {path}: not a regular file; give another name")
        for other in filter(None, others):
            if os.path.realpath(other) == os.path.realpath(path):
                raise UserError(f"{flag} {path}: is {other}, which would be lost; give another name")


def check_outside(flag, path, documents, of="--documents"):
    """Raises UserError where `path`, a file that is written or has answers, would be among the documents of a
    folder, which the flag `of` names; either may be "", which is nowhere."""
    if not path or not documents:
        return
    inside, folder = Path(os.path.realpath(path)), os.path.realpath(documents)
    if inside.is_relative_to(folder):
        if not any(part.startswith(".") for part in inside.relative_to(folder).parts):  # hidden: not read
            raise UserError(f"{flag} {path}: lies in {of} {documents}, and would be read, too; give "
                            "another place")


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """Open a file that appears under `path` whole or not at all, even after a power cut: temporary file,
    fsync, rename. What `path` links to is replaced, not the link."""
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():
        raise UserError(f"{path}: not a regular file; it would be replaced")
    make_folder(real.parent)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{real.name[:40]}.", suffix=".tmp", dir=real.parent)
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            sync_handle(file.fileno(), path)
        with contextlib.suppress(PermissionError):  # a file system may have no such thing
            os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp made it private
        os.replace(temporary, real)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None  # the name that the user knows
        raise
    sync_folder(real.parent)


UMASK = os.umask(0)
os.umask(UMASK)


def check_drawing(path):
    """Raises UserError where there is a `path` to draw to, and nothing to draw with."""
    if path and not importlib.util.find_spec("matplotlib"):
        raise UserError(f"--plot {path}: drawing needs matplotlib: pip install -e '.[plot]'")


@contextlib.contextmanager
def drawing(path, size=(7, 4), rows=1, columns=1):
    """Axes to draw on, or an array of them, of a figure of `size` inches; the .png appears under `path` at
    the end."""
    check_drawing(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(rows, columns)
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


def write_rows(path, rows):
    """Write a .jsonl file, one row a line, atomically."""
    with atomic_file(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")
