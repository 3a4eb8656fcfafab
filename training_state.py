"""A training run on disk, as --resume needs it: on any number of ranks, the steps of a run nobody stopped.

    OUT/training_state/00001200-0-of-4.safetensors    of one rank: its rows of weights and of AdamW's moments
    OUT/training_state/about.json                     the files that count, step, position, settings

A tensor is its rows in all files, one file after the other; what ranks do not share out is in the first file
alone. about.json is written last: a run that is killed while it saves leaves the state before. There is no
other state, as every random draw is seeded by the position. (torch.distributed.checkpoint pickles what this
keeps in about.json, and holds what it writes in memory twice.)
"""
import json
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import ROUTING_ONLY, check_shapes, open_weights, other_names, write_tensors
from common import UserError, atomic_file, naming, read_json, read_text, sync_handle, write_json, write_rows

FIXED = "rank", "init_from", "tokenizer", "base_digest"  # settings with which a run cannot go on
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, shaped as their weight; beside them `step`, (1,)


def local(tensor):
    """The rows of a tensor that this rank holds; a view."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def write_state(folder, model, optimizer, about, rank=0, shards=1):
    """Write weights, moments and `about`, a dict for JSON, atomically.

    shards: ranks that the model is shared out to, all of which call this; else rank 0 alone does. Each tensor
    goes to the disk by itself: nothing is held twice."""
    folder, step = Path(folder), about["step"]
    other = other_names(folder / "about.json", f"{step:08d}-")  # those of a run that is replaced stay as yet
    files = [f"{step:08d}-{i}-of-{shards}{other}.safetensors" for i in range(shards)]
    tensors = dict(model.trained())
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{kind}"] = value.reshape(1) if kind == "step" else value
    own = {name: local(x) for name, x in tensors.items() if rank == 0 or hasattr(x, "to_local")}
    with atomic_file(folder / files[rank], "wb") as file:
        write_tensors(file, own)
    if shards > 1:
        dist.barrier()
    if rank == 0:
        write_json(folder / "about.json", {**about, "files": files})
        old = {*folder.glob("*.safetensors"), *folder.glob(".*.tmp")} - {folder / name for name in files}
        for path in old:  # the state before, and what a kill has left
            path.unlink()


def has_state(folder):
    """Whether there is something to resume."""
    return (Path(folder) / "about.json").exists()


def read_about(folder):
    """What `write_state` was told. Raises UserError where there is nothing to resume, or nothing whole."""
    path = Path(folder) / "about.json"
    if not has_state(folder):
        raise UserError(f"{folder}: nothing to resume; leave --resume out to start")
    about = {"rows": [], **read_json(path, "a whole training state")}  # rows: of log.jsonl, until it begins
    kinds = {"step": int, "position": int, "ranks": int, "settings": dict, "files": list, "rows": list}
    if not all(type(about.get(name)) is kind for name, kind in kinds.items()) or not all(
            isinstance(name, str) and Path(name).name == name for name in about["files"] or [None]):
        raise UserError(f"{path}: not a whole training state; start anew with --overwrite")
    return about


@torch.no_grad()
def read_state(folder, model, optimizer, about):
    """Fill the weights and the optimizer, tensor by tensor from the mapped files, on any number of ranks.
    Raises UserError, and leaves all as it is, for a file that is not whole or is of another model."""
    try:
        files = [open_weights(Path(folder) / name) for name in about["files"]]
    except UserError as error:
        raise UserError(f"{error}: not a whole training state; start anew with --overwrite") from None
    parts = {}  # name -> its slices, in order
    for file in files:
        for name in file.keys():
            parts.setdefault(name, []).append(file.get_slice(name))
    shapes = {name: (sum(part.get_shape()[0] for part in slices), *slices[0].get_shape()[1:])
              for name, slices in parts.items()}
    weights = model.trained()
    stepped = {name: parameter for name, parameter in model.named_parameters()
               if parameter.requires_grad and f"{name}.step" in shapes}
    own = {name: tuple(x.shape) for name, x in weights.items()}
    own |= {f"{name}.{kind}": tuple(p.shape) for name, p in stepped.items() for kind in MOMENTS}
    own |= {f"{name}.step": (1,) for name in stepped}
    check_shapes(own, shapes, lambda name: Path(folder) / about["files"][0])

    def fill(name, tensor):
        """Copy this rank's rows of a tensor: every rank has as many as the first, or what is left."""
        into, at, first = local(tensor), 0, 0
        if into.shape != tensor.shape:
            first = dist.get_rank() * -(-len(tensor) // dist.get_world_size())
        for part in parts[name]:
            rows = part.get_shape()[0]
            low, high = max(first - at, 0), min(first + len(into) - at, rows)
            if low < high:
                into[at + low - first:at + high - first].copy_(part[low:high])
            at += rows
        return tensor

    for name, tensor in weights.items():
        fill(name, tensor)
    fused = optimizer.param_groups[0]["fused"]
    for name, parameter in stepped.items():
        step = fill(f"{name}.step", torch.zeros(1, device=parameter.device if fused else "cpu"))
        optimizer.state[parameter] = {"step": step.reshape(())} | {
            kind: fill(f"{name}.{kind}", torch.zeros_like(parameter)) for kind in MOMENTS}


class Log:
    """log.jsonl: one row a line, written when it is made."""

    def __init__(self, path, rows=(), patient=False):
        """path None: rows are kept, not written. patient: what is there stays until `begin` is called; else
        the first new row replaces it, or `rows` do, if there are any."""
        self.path, self.rows, self.patient, self.file = path, list(rows), patient, None
        if rows:
            self.begin()

    def begin(self):
        """Replace what is there by the rows until now, which those to come follow."""
        if self.path and not self.file:
            write_rows(self.path, self.rows)
            self.file = open(self.path, "a", encoding="utf-8")

    def sync(self):
        """Wait until the rows are on the disk: what --resume reads beside a state must be there with it."""
        if self.file:
            sync_handle(self.file.fileno(), self.path)

    def add(self, row):
        """Keep a row, a dict, and write it. A tracker is called here: `wandb.log(row)`, or trackio's."""
        if not self.patient:
            self.begin()
        self.rows.append(row)
        if self.file:
            with naming(self.path):
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()


def read_log(path, step):
    """The rows of log.jsonl up to a step. Raises UserError where some of them are missing; what was being
    written when the run ended may be."""
    try:
        lines = read_text(path).split("\n")
        rows = [row for row in map(json.loads, filter(None, lines[:-1])) if row["step"] <= step]
        steps = [row["step"] for row in rows if row["split"] == "train"]
        if len(steps) != step or steps != [*range(1, len(steps) + 1)]:
            raise ValueError(f"not one row for each of {step} steps")
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: does not hold the rows of the steps before ({type(error).__name__}: "
                        f"{error}); start anew with --overwrite, or put it back") from None
    return rows


def tell_changes(folder, about, settings, ranks):
    """What a resumed run does otherwise than the run until now, as lines "learning_rate 0.001 -> 0.0005".

    settings: name -> value. Raises UserError where one of the model or the tokens differs.
    """
    before = {**about["settings"], "ranks": about["ranks"]}
    now = {**settings, "ranks": ranks}
    changed = {n: (before[n], now[n]) for n in now if n in before and before[n] != now[n]}
    for name, (old, new) in changed.items():
        table, _, key = name.rpartition(".")
        if table == "model" and key not in ROUTING_ONLY or name in FIXED:
            raise UserError(f"{folder}: a run with {name} = {old!r} cannot go on with {new!r}; leave it as "
                            "it was, or start anew with --overwrite or another --out")
    return [f"{name} {old} -> {new}" for name, (old, new) in changed.items()]
