"""Power cuts: what a disk may hold when the machine stops in the middle of a change.

    python tests/power_cuts.py [--cuts 1000] [--seed 1]

`make torture` runs it, `make test` a sample of it. A change is made once while its calls are traced: files
made, renamed and deleted, folders made, and what was synced when. Then it is cut at a random call, and what
no sync has forced to the disk is there or not:

    ext4     names change in their order, and every sync forces all before it; data that was not synced may
             be missing, zeros or cut
    strict   each change of a name that its folder's own sync has not forced may be missing by itself

What is left must be the state before the change or the one behind it, and the one behind it once it is done.
"""
import argparse
import builtins
import os
import random
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torture  # noqa: E402

import checkpoint  # noqa: E402
from memory_bank import Writer  # noqa: E402
from model import MSA, ModelConfig  # noqa: E402
from training_state import Log, read_about, read_log, read_state, write_state  # noqa: E402

MODELS = ("ext4", "strict")


class Trace:
    """What happens below `root` while it is open: `events`, (what, path, target, file, contents then).

    A file is a number, whatever its names; contents: file -> bytes. names: at the start, path -> file, None
    for a folder."""

    CALLS = ("open", "replace", "rename", "unlink", "mkdir", "fsync")

    def __init__(self, root):
        self.root, self.files, self.events = str(root), {}, []
        self.names = {}
        for path in sorted(Path(root).rglob("*")):
            self.names[str(path)] = None if path.is_dir() else self.file_of(path.stat().st_ino)
        self.contents = self.look()

    def file_of(self, inode, new=False):
        """The number of a file; `new`: its inode was another's, who is gone."""
        if new or inode not in self.files:
            self.files[inode] = len(self.files) + 1000 * len(self.events)
        return self.files[inode]

    def look(self):
        paths = [path for path in Path(self.root).rglob("*") if path.is_file()]
        return {self.file_of(path.stat().st_ino): path.read_bytes() for path in paths}

    def note(self, what, path, target="", file=None):
        path, target = os.path.abspath(path), os.path.abspath(target) if target else ""
        if path.startswith(self.root):
            self.events.append((what, path, target, file, self.look()))

    def wrap(self, name, real):
        def call(path, *args, **kwargs):
            if name == "fsync":
                where, inode = os.readlink(f"/proc/self/fd/{path}"), os.fstat(path).st_ino
                folder = os.path.isdir(where)
                self.note("sync folder" if folder else "sync", where, file=folder or self.file_of(inode))
                return real(path)
            if name == "open" and (not args[0] & os.O_CREAT or os.path.exists(path)):
                return real(path, *args, **kwargs)
            file = self.file_of(os.stat(path).st_ino) if name in ("replace", "rename", "unlink") else None
            done = real(path, *args, **kwargs)
            if name == "open":
                file = self.file_of(os.stat(path).st_ino, new=True)
            self.note(name, path, args[0] if name in ("replace", "rename") else "", file)
            return done
        return call

    def open_file(self, path, mode="r", *args, **kwargs):
        new = mode[0] in "wax" and not os.path.exists(path)
        file = self.opened(path, mode, *args, **kwargs)
        if new:
            self.note("open", path, "", self.file_of(os.stat(path).st_ino, new=True))
        return file

    def __enter__(self):
        self.real, self.opened = {name: getattr(os, name) for name in self.CALLS}, builtins.open
        for name, call in self.real.items():
            setattr(os, name, self.wrap(name, call))
        builtins.open = self.open_file
        return self

    def __exit__(self, *_):
        builtins.open = self.opened
        for name, call in self.real.items():
            setattr(os, name, call)
        self.events.append(("end", "", "", None, self.look()))

    def cut(self, count, model, rng):
        """What may be on the disk when only the first `count` events have happened: path -> bytes, None for a
        folder."""
        names, durable, contents = dict(self.names), dict(self.contents), dict(self.contents)
        forced, all_forced = {}, -1
        for i, (what, path, _, file, then) in enumerate(self.events[:count]):
            contents |= then
            if what == "sync":
                durable[file] = then[file]
            if what == "sync folder":
                forced[path] = i
            if what.startswith("sync"):
                all_forced = i
        last = max(all_forced, rng.randrange(-1, count))  # of the changes of names that ext4 has written
        for i, (what, path, target, file, _) in enumerate(self.events[:count]):
            where = os.path.dirname(path)
            kept = i <= last if model == "ext4" else i < forced.get(where, -1) or rng.random() < 0.5
            there = where == self.root or where in names
            if what.startswith("sync") or not kept or not there:
                continue
            if what in ("unlink", "replace", "rename"):
                names.pop(path, None)
            if what != "unlink":
                names[target or path] = file
        return {path: None if file is None else self.survivor(durable.get(file), contents[file], rng)
                for path, file in names.items()}

    @staticmethod
    def survivor(durable, data, rng):
        """What is left of a file whose `data` was written, and of which `durable` was synced."""
        if durable == data:
            return data
        half = len(data) // 2
        return rng.choice([durable or b"", data, data[:half], data[:half] + bytes(len(data) - half),
                           bytes(len(data))])


def try_cuts(root, change, check, cuts, seed):
    """Make `change` once, and cut it `cuts` times by each model; check(folder) says what is left, "old" or
    "new", or raises. Returns how often it was the new state."""
    with Trace(root) as trace:
        change()
    found, whole = [], len(trace.events) - 1  # the last event is the end
    for model in MODELS:
        for i in range(cuts):
            rng = random.Random(f"{seed} {model} {i}")
            count = rng.randrange(whole + 1) if i else whole
            left = trace.cut(count, model, rng)
            with tempfile.TemporaryDirectory() as folder:
                for path, data in sorted(left.items()):
                    place = Path(folder) / os.path.relpath(path, root)
                    place.mkdir() if data is None else place.write_bytes(data)
                try:
                    found.append(check(Path(folder)))
                    assert found[-1] == "new" or count < whole, "a change that was done is undone"
                except BaseException:
                    last = [event[:3] for event in trace.events[:count]][-3:]
                    print(f"{model}, cut {i} after {count} of {whole} events, {last}", file=sys.stderr)
                    raise
    return found.count("new")


# ------------------------------------------------------------------------------------------------------------
# Changes

def cut_banks(cuts, seed):
    """Every change of a bank; and its making."""
    layout, counts = torture.LAYOUTS["int8"], {}
    for change in [*torture.CHANGES, "make"]:
        with tempfile.TemporaryDirectory() as root, torture.small_segments():
            folder = Path(root).resolve() / "new" / "bank"
            versions, following = ({}, 0) if change == "make" else torture.start(folder, layout)
            new, _ = torture.after(change, versions, following, 5)

            def run():
                with Writer(folder, layout) as writer:
                    if change != "make":
                        torture.CHANGES[change](writer, versions, random.Random(5))

            def check(root):
                bank = root / "new" / "bank"
                if change == "make":
                    old = not (bank / "manifest.json").exists()
                    with Writer(bank, layout) as writer:
                        writer.add(torture.make(0, 0, layout))
                    torture.check(bank, {0: 0})
                    return "old" if old else "new"
                found = torture.check(bank, versions, new)
                return "new" if found or new == versions else "old"
            counts[change] = try_cuts(folder.parent.parent, run, check, cuts, seed)
    return counts


def tiny(seed):
    torch.manual_seed(seed)
    return MSA(ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                           head_dim=8, num_attention_heads=2, num_key_value_heads=1, chunk_size=16))


def cut_checkpoints(cuts, seed, shard_bytes):
    """A checkpoint that takes the place of another, in one file or several."""
    def same(found, model):
        return all(torch.equal(x, found[name]) for name, x in model.state_dict().items())

    before, checkpoint.SHARD_BYTES = checkpoint.SHARD_BYTES, shard_bytes[0]
    try:
        with tempfile.TemporaryDirectory() as root:
            root, old, new = Path(root).resolve(), tiny(1), tiny(2)
            old.save_pretrained(root / "c")
            checkpoint.SHARD_BYTES = shard_bytes[1]

            def check(folder):
                found = MSA.from_pretrained(folder / "c").state_dict()
                assert same(found, old) or same(found, new), "neither the old weights nor the new ones"
                return "new" if same(found, new) else "old"
            return try_cuts(root, lambda: new.save_pretrained(root / "c"), check, cuts, seed)
    finally:
        checkpoint.SHARD_BYTES = before


def cut_training(cuts, seed, same_step):
    """A run that saves a second time; or another run that takes the place of one, at the same step."""
    with tempfile.TemporaryDirectory() as root:
        root, models = Path(root).resolve(), [tiny(1), tiny(2)]
        optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
        steps, logs = (2, 2 if same_step else 4), [None, None]

        def save(i):
            about = dict(step=steps[i], position=steps[i], ranks=1, settings={"seed": i * same_step})
            if i == 0 or same_step:
                logs[i] = Log(root / "log.jsonl", patient=same_step)
                begin = 1
            else:
                logs[i], begin = logs[0], steps[0] + 1
            for step in range(begin, steps[i] + 1):
                logs[i].add({"step": step, "split": "train", "run": i})
            logs[i].sync()
            if not logs[i].file:  # as train.save
                about["rows"] = logs[i].rows
            write_state(root / "training_state", models[i], optimizers[i], about)
            logs[i].begin()
        save(0)

        def check(folder):
            state, model = folder / "training_state", tiny(3)
            about = read_about(state)
            read_state(state, model, torch.optim.AdamW(model.parameters(), fused=True), about)
            i = int(about["settings"]["seed"] if same_step else about["step"] == 4)
            assert all(torch.equal(x, y) for x, y in zip(model.parameters(), models[i].parameters()))
            rows = about["rows"] or read_log(folder / "log.jsonl", about["step"])
            assert not same_step or {row["run"] for row in rows} == {i}
            return ("old", "new")[i]
        return try_cuts(root, lambda: save(1), check, cuts, seed)


def script():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    total = 2 * args.cuts
    for change, new in cut_banks(args.cuts, args.seed).items():
        print(f"{total:,} power cuts of a bank, {change}: {new:,} left the new state", flush=True)
    for sizes in ((1 << 30, 1 << 30), (8000, 8000), (1 << 30, 8000), (8000, 1 << 30)):
        new = cut_checkpoints(args.cuts, args.seed, sizes)
        what = " after ".join("one file" if size > 8000 else "shards" for size in sizes[::-1])
        print(f"{total:,} power cuts of a checkpoint, {what}: {new:,} left the new state", flush=True)
    for same_step in (False, True):
        new = cut_training(args.cuts, args.seed, same_step)
        what = "another at the same step" if same_step else "a later step"
        print(f"{total:,} power cuts of a training, {what}: {new:,} left the new state", flush=True)


if __name__ == "__main__":
    script()
