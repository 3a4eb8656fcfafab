"""What a bank must survive: kills at every step and at random moments, full disks, damaged files.

    python tests/torture.py [--kills 200] [--mutations 2000] [--seed 1]

`make torture` runs it, `make test` a sample of it. Banks here are small and made of numbers that follow from
(number, version), so that an oracle, a dict, says what each must hold. Children are forked and killed, and
what they leave is opened and read to the last byte. SIGKILL takes a process, not the machine's page cache:
power_cuts.py tests what a power cut leaves.
"""
import argparse
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memory_bank  # noqa: E402
from common import UserError  # noqa: E402
from memory_bank import Bank, Layout, Writer, join, write_segment  # noqa: E402

LAYOUTS = {kind: Layout("model-tokenizer", 2, 1, 4, 3, 2, 4, kind) for kind in ("bfloat16", "int8")}


def make(number, version, layout):
    """The records of one document: 1 to 3 chunks, a text of 0 to 4 tokens; all of it follows from its number
    and version."""
    rng = np.random.default_rng([number, version])
    chunks, source = int(rng.integers(1, 4)), f"doc {number}, version {version}".encode()
    shapes = layout.shapes(1, chunks, int(rng.integers(0, 5)), len(source))
    found = {name: rng.integers(0, 100, shape).astype(dtype)
             for name, (dtype, shape) in shapes.items() if name in memory_bank.AXIS}
    one = lambda x, dtype: np.array([x], dtype)
    return {**found, "numbers": one(number, np.int64), "chunks": one(chunks, np.int32),
            "tokens": one(len(found["text"]), np.int32), "sources": one(len(source), np.int32),
            "id_hashes": one(number + 1000, np.uint64), "digests": one(version, np.uint64),
            "source": np.frombuffer(source, np.uint8)}


def expected(versions, layout):
    """What `contents` finds in a bank of these documents: number -> version."""
    found = {}
    for number, version in versions.items():
        x = make(number, version, layout)
        found[number] = (version, number + 1000, x["text"].tobytes(), x["source"].tobytes().decode(),
                         x["content"].tobytes(), x["scales"].tobytes(), x["routing_keys"].tobytes())
    return found


def contents(bank):
    """All that a bank holds, through the functions that a reader uses: number -> everything."""
    found = {}
    positions, ends = np.arange(len(bank)), memory_bank.ends_of(bank.chunks)
    plan = bank.plan(positions)
    layout = bank.layout
    shape = layout.routing_layers, ends[-1], layout.routing_heads, layout.routing_dim
    keys = np.full(shape, 9999, np.uint16)
    for layer in range(layout.routing_layers):
        for rows, read in bank.routing_keys(layer, plan):
            keys[layer, rows] = read()
    for position in positions:
        text, source = bank.document(position)
        content, scales = bank.content(position)
        scales = b"" if scales is None else scales.tobytes()
        found[int(bank.numbers[position])] = (
            int(bank.digests[position]), int(bank.id_hashes[position]), text.tobytes(), source,
            content.tobytes(), scales, keys[:, ends[position]:ends[position + 1]].tobytes())
    return found


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------
# Changes: each is done to a bank by a Writer and to the oracle, a dict number -> version

def add(writer, versions, rng):
    numbers = range(writer.bank.next_number, writer.bank.next_number + rng.randint(1, 4))
    writer.add(join([make(number, 0, writer.bank.layout) for number in numbers]))


def remove(writer, versions, rng):
    writer.remove(rng.sample(sorted(versions), min(len(versions), rng.randint(1, 3))))


def update(writer, versions, rng):
    numbers = sorted(rng.sample(sorted(versions), min(len(versions), 2)))
    if numbers:
        writer.add(join([make(number, versions[number] + 1, writer.bank.layout) for number in numbers]),
                   removed=numbers)


def two_segments(writer, versions, rng):
    """As two ranks encode: their segments appear in one change."""
    start = writer.bank.next_number
    writer.commit([write_segment(writer.folder, writer.bank.layout, make(start + i, 0, writer.bank.layout))
                   for i in (1, 0)])


def merge(writer, versions, rng):
    writer.merge()


def compact(writer, versions, rng):
    writer.compact()


CHANGES = {change.__name__: change for change in (add, remove, update, two_segments, merge, compact)}


def after(change, versions, next_number, seed):
    """The oracle's state after a change: (number -> version, next number). Draws as the change itself
    does."""
    rng, versions = random.Random(seed), dict(versions)
    if change == "add":
        new = range(next_number, next_number + rng.randint(1, 4))
        versions |= dict.fromkeys(new, 0)
        next_number = new[-1] + 1
    elif change == "remove":
        for number in rng.sample(sorted(versions), min(len(versions), rng.randint(1, 3))):
            del versions[number]
    elif change == "update":
        for number in rng.sample(sorted(versions), min(len(versions), 2)):
            versions[number] += 1
    elif change == "two_segments":
        versions |= {next_number: 0, next_number + 1: 0}
        next_number += 2
    return versions, next_number


def start(folder, layout, segments=10):
    """A bank of many small segments with deleted documents in some; returns the oracle's state."""
    versions, following = {}, 0
    with Writer(folder, layout) as writer:
        for seed, change in enumerate(["add"] * segments + ["remove", "update"]):
            CHANGES[change](writer, versions, random.Random(seed))
            versions, following = after(change, versions, following, seed)
    return versions, following


# ------------------------------------------------------------------------------------------------------------
# Kills

CALLS = ("write", "fsync", "replace", "unlink", "open", "close", "chmod", "ftruncate", "pwrite")


def interrupt(at, how):
    """From now on in this process, the at-th call that changes files fails.

    how: "before", "halfway" (through a write) and "after" kill the process there; "full": the disk is full,
    for this call and all that follow.
    """
    count = [0]

    def wrap(name, real):
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            count[0] += 1
            if how == "full" and count[0] >= at and name in ("write", "open"):
                if name == "write":
                    real(args[0], args[1][:len(args[1]) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", "file")
            if count[0] == at and how != "full":
                if how == "halfway" and name == "write":
                    real(args[0], args[1][:len(args[1]) // 2])
                if how == "after":
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    # pathlib calls os.unlink by its own name
    Path.unlink = lambda self, missing_ok=False: os.unlink(self)


def fork(action):
    """Run `action` in a child; returns its exit code, negative for the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = action() or 0
        except OSError as error:
            code = 28 if error.errno == errno.ENOSPC else 1
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(folder, *allowed):
    """The bank is whole and holds one of these states; the next writer leaves no stray file. Returns the
    index of the state."""
    layout = memory_bank.read_manifest(folder)[0]
    found = contents(Bank(folder))
    wanted = [expected(versions, layout) for versions in allowed]
    assert found in wanted, f"{folder}: holds {sorted(found)}, neither of {[sorted(w) for w in wanted]}"
    with Writer(folder) as writer:
        named = {f"segments/{segment.path.name}" for segment in writer.bank.segments}
    stray = files_of(folder) ^ (named | {"manifest.json", "lock"})
    assert not stray, f"{folder}: stray or missing files {stray}"
    Bank(folder).verify()
    return wanted.index(found)


def kill_at_every_call(change, how, layout, stride=1):
    """Kill a change at its first, second, ... call. Returns (calls that there were, kills that left the new
    state)."""
    with tempfile.TemporaryDirectory() as root, small_segments():
        versions, following = start(Path(root) / "start", layout)
        new, _ = after(change, versions, following, 5)
        done = 0
        for at in range(1, 1000, stride):
            folder = Path(root) / "bank"
            shutil.copytree(Path(root) / "start", folder)

            def action():
                interrupt(at, how)
                with Writer(folder) as writer:
                    CHANGES[change](writer, versions, random.Random(5))

            code = fork(action)
            failed = 28 if how == "full" else -signal.SIGKILL
            assert code in (0, failed), f"{change}, {how} call {at}: exit code {code}"
            state = check(folder, versions, new)
            if code == 0:
                assert state == 1 or new == versions
                return at - 1, done
            done += state
            with Writer(folder) as writer:  # and it goes on from there
                if not state:
                    CHANGES[change](writer, versions, random.Random(5))
            check(folder, new)
            shutil.rmtree(folder)
    raise AssertionError("a change of a thousand calls")


def kill_creation(how):
    """Kill the making of a bank at every call: nothing is there, or an empty bank; and making it again
    succeeds."""
    with tempfile.TemporaryDirectory() as root:
        for at in range(1, 100):
            folder = Path(root) / "bank"

            def action():
                interrupt(at, how)
                with Writer(folder, LAYOUTS["int8"]):
                    pass

            code = fork(action)
            with Writer(folder, LAYOUTS["int8"]) as writer:
                writer.add(make(0, 0, LAYOUTS["int8"]))
            check(folder, {0: 0})
            if code == 0:
                return at - 1
            shutil.rmtree(folder)


def kill_at_random(kills, seed, layout):
    """Let a child change a bank again and again and kill it at random moments; returns how many changes were
    committed in all."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root, small_segments():
        folder, total = Path(root) / "bank", 0
        versions, following = start(folder, layout)
        for _ in range(kills):
            plan = [(rng.choice(list(CHANGES)), rng.random()) for _ in range(200)]  # more than it will get to
            states = [(versions, following)]
            for change, draw in plan:
                states.append(after(change, *states[-1], draw))
            reader, writer_end = os.pipe()
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    with Writer(folder) as writer:
                        for (change, draw), state in zip(plan, states):
                            CHANGES[change](writer, state[0], random.Random(draw))
                            os.write(writer_end, b".")
                os._exit(1)
            os.close(writer_end)
            time.sleep(rng.random() * 0.1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done = 0
            while part := os.read(reader, 1 << 16):
                done += len(part)
            os.close(reader)
            done += check(folder, states[done][0], states[min(done + 1, len(plan))][0])
            versions, following = states[done][0], Bank(folder).next_number
            total += done
        return total


@contextlib.contextmanager
def small_segments():
    """Segments are full at 2 kB, so that merging and compacting write several."""
    before = (memory_bank.SEGMENT_BYTES, memory_bank.SMALL)
    memory_bank.SEGMENT_BYTES = 2048
    memory_bank.SMALL = 1
    try:
        yield
    finally:
        memory_bank.SEGMENT_BYTES, memory_bank.SMALL = before


# ------------------------------------------------------------------------------------------------------------
# Damaged files

def mutate(folder, rng):
    """Damage one file of a bank; returns what was done."""
    files = [folder / "manifest.json", *sorted((folder / "segments").iterdir())]
    kind = rng.choice(["bit", "byte", "zeros", "truncate", "extend", "swap", "header", "manifest", "missing",
                       "replace"])
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "zeros":
        n = min(rng.randrange(1, 64), len(data) - at)
        data[at:at + n] = bytes(n)
    elif kind == "truncate":
        del data[at:]
    elif kind == "extend":
        data += rng.randbytes(rng.randrange(1, 100))
    elif kind == "replace":
        data = bytearray(rng.randbytes(rng.randrange(0, 200)))
    elif kind == "missing":
        path.unlink()
        return f"{path.name} deleted"
    elif kind == "swap":
        a, b = rng.sample(files[1:], 2)
        data, other = a.read_bytes(), b.read_bytes()
        a.write_bytes(other)
        b.write_bytes(data)
        return f"{a.name} and {b.name} swapped"
    elif kind == "header":  # sizes that a reader might believe
        path = rng.choice(files[1:])
        data = bytearray(path.read_bytes())
        if rng.random() < 0.3:
            data[:8] = rng.choice([0, 1, 1 << 16, 1 << 20, 1 << 40, 1 << 63,
                                   (1 << 64) - 1]).to_bytes(8, "little")
        else:
            length = int.from_bytes(data[:8], "little")
            header = hostile(bytes(data[8:8 + length]).decode().rstrip(), rng)
            data[8:8 + length] = header.ljust(length).encode()[:length]
    elif kind == "manifest":  # sizes again, under a checksum that is right
        path = files[0]
        file = json.loads(path.read_text())
        counts = rng.choice([file["bank"]["layout"], *file["bank"]["segments"] * 3])
        name = rng.choice([name for name in counts if name not in ("deleted", "fingerprint")])
        counts[name] = rng.choice([0, -1, 1, 1 << 31, 1 << 62, 1 << 70, 1.5, None, "x", [], {}, True,
                                   "../manifest.json", counts[name] + 1 if type(counts[name]) is int else 1])
        file["sum"] = zlib.crc32(json.dumps(file["bank"]).encode())
        data = json.dumps(file).encode()
    path.write_bytes(data)
    return f"{path.name}: {kind} at {at}"


def hostile(text, rng):
    """JSON in which one number is another."""
    places = [i for i, c in enumerate(text) if c.isdigit() and text[i - 1] in "[, "]
    at = rng.choice(places)
    end = next(i for i in range(at, len(text)) if not text[i].isdigit())
    return text[:at] + str(rng.choice([0, 1, 1 << 20, 1 << 40, 1 << 62, 1 << 80, -1])) + text[end:]


def damage(mutations, seed, layout):
    """Damage banks; each reader must say so, in one sentence that names a file, or find what was there.
    Returns (refused, unchanged)."""
    rng, refused, unchanged = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as root:
        versions, _ = start(Path(root) / "start", layout, segments=3)
        wanted = expected(versions, layout)
        for i in range(mutations):
            folder = Path(root) / f"bank{i}"
            shutil.copytree(Path(root) / "start", folder)
            what = mutate(folder, rng)

            def action():
                signal.alarm(10)  # a hang
                used = 1 << 40
                if sys.platform == "linux":
                    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)  # a huge allocation
                try:
                    bank = Bank(folder)
                    if contents(bank) != wanted:
                        return 3
                    bank.verify()
                    return 0
                except UserError as error:
                    message = str(error)
                    named = str(folder) in message
                    return 2 if named and "\n" not in message and len(message) < 2000 else 4

            code = fork(action)
            found = {3: "another answer", 4: "an unclear message"}.get(code, f"exit code {code}")
            assert code in (0, 2), f"mutation {i} ({what}): {found}"
            refused += code == 2
            unchanged += code == 0
            shutil.rmtree(folder)
    return refused, unchanged


# ------------------------------------------------------------------------------------------------------------

def script():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for how in ("before", "halfway", "after", "full"):
        counts = {change: kill_at_every_call(change, how, LAYOUTS["int8"]) for change in CHANGES}
        print(f"{'full disk from' if how == 'full' else 'killed ' + how} every call: "
              + ", ".join(f"{change} {calls} ({new} left the new state)"
                          for change, (calls, new) in counts.items()), flush=True)
    calls = [kill_creation(how) for how in ("before", "halfway", "after")]
    print(f"killed while a bank is made: {calls} calls", flush=True)
    for kind, layout in LAYOUTS.items():
        done = kill_at_random(args.kills // 2, args.seed, layout)
        print(f"{args.kills // 2} kills at random moments, {kind}: {done:,} changes committed, "
              "every one found again", flush=True)
        refused, unchanged = damage(args.mutations // 2, args.seed, layout)
        print(f"{args.mutations // 2} damaged banks, {kind}: {refused} refused by a sentence, "
              f"{unchanged} unchanged", flush=True)


if __name__ == "__main__":
    script()
