"""The mean of what several trainings changed of one backbone.

    python average.py --checkpoints checkpoints/smollm2,out/more --out out/mean
    python average.py --checkpoints out/a,out/b,out/c --weights 1,1,2 --out out/mean

Trainings that begin at the same weights, or go on from each other, end in one valley: the mean of their
weights often does better on held-out questions than the best of them (model soups, arXiv 2203.05482), and
costs nothing when it is used. What is averaged are the changes up @ down, as matrices; the mean, of a higher
rank, is cut to the rank of the first, whose configuration it has. Choose by questions that no test asks.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from common import UserError, command_line, emptied, main
from low_rank import factors
from model import MSA
from prompts import load_tokenizer


@dataclass
class AverageConfig:
    checkpoints: str = ""   # two or more folders that training with a rank has written, commas between
    weights: str = ""       # of each, commas between; empty: all count alike
    out: str = "out/mean"   # folder to write


def read_flags(config):
    """(folders, the share of each, adding up to 1). Raises UserError."""
    folders = [folder for folder in config.checkpoints.split(",") if folder]
    if len(folders) < 2:
        raise UserError(f"--checkpoints is {config.checkpoints!r}; name two folders or more, commas between")
    try:
        weights = [float(weight) for weight in (config.weights or "1," * len(folders)).strip(",").split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(folders) or min(weights) <= 0 or not math.isfinite(sum(weights)):
        raise UserError(f"--weights is {config.weights!r}; give a number above 0 for each of the "
                        f"{len(folders)} --checkpoints, commas between, or leave it out")
    return folders, [weight / sum(weights) for weight in weights]


def mean_change(pairs, shares):
    """The pair (up (outputs, r), down (r, inputs)), float32, of which the product is nearest to the mean of
    the products of `pairs`, weighted by `shares`; r is the rank of the first pair."""
    up = torch.cat([share * up.float() for share, (up, _) in zip(shares, pairs)], 1)
    down = torch.cat([down.float() for _, down in pairs])
    left, own = torch.linalg.qr(up)           # of few columns: what is decomposed is small
    right, other = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(own @ other.T, full_matrices=False)
    rank = len(pairs[0][1])
    root = values[:rank].sqrt()
    more = rank - len(root)  # where there are fewer singular values than the rank, the rest is 0
    return (F.pad(left @ u[:, :rank] * root, (0, more)),
            F.pad(root[:, None] * (v[:rank] @ right.T), (0, 0, 0, more)))


def script():
    config = command_line(AverageConfig, __doc__, takes_file=False)
    out = Path(config.out)
    if not config.out or out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {config.out!r}: not a new or empty folder; give another")
    folders, shares = read_flags(config)
    first, own = None, []
    for folder in folders:  # of the models but the first their changes alone are held
        model = MSA.from_pretrained(folder, dtype=torch.bfloat16, merged=False)
        first, found = first or model, factors(model)
        if not found:
            raise UserError(f"{folder}: it has no low-rank changes; train.py writes them, given --rank")
        if model.others["base"] != first.others["base"]:
            raise UserError(f"{folder}: its base is {model.others['base']}, that of {folders[0]} is "
                            f"{first.others['base']}; the mean of what changed two models is of neither")
        if not all(x.isfinite().all() for x in found.values()):
            raise UserError(f"{folder}: some of its low-rank changes are no numbers; train it anew")
        own.append(found)
    for name in own[0]:
        if name.endswith(".up"):
            begin = name.removesuffix("up")
            pairs = [(found[name], found[f"{begin}down"]) for found in own]
            for leaf, mean in zip(("up", "down"), mean_change(pairs, shares)):
                first.put(begin + leaf, mean.contiguous())
    with emptied(out):
        first.save_pretrained(out)
        load_tokenizer(folders[0], first.config).save(out)
    numbers = sum(map(torch.numel, factors(first).values()))
    print(f"{out}: the mean of {len(folders)} checkpoints, {numbers:,} numbers")


if __name__ == "__main__":
    main(script)
