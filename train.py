"""Train a model with memory layers, from scratch or from a checkpoint: its own, or a Llama or Qwen3 backbone.

    python prepare_data.py config/demo.toml                              # the data of the run, once
    python train.py config/demo.toml                                     # on a laptop CPU or one GPU
    python train.py config/demo.toml --max-steps 500 --out out/short     # every setting is a flag
    python train.py config/demo.toml --resume                            # go on where it stopped, exactly
    torchrun --nproc_per_node=2 train.py config/demo.toml                # one pool per rank and step
    python train.py config/notes.toml                                    # low-rank, from checkpoints/smollm2
    python train.py config/smollm2.toml                                  # a chat backbone learns to read
    torchrun --nproc_per_node=8 train.py config/qwen3-4b.toml            # weights shared out to eight GPUs

A step reads `accumulate` pools per rank; it encodes a pool's documents once, and asks all of its questions.
Two phases (section 3.4): `router_steps` steps of router_lm_weight * LM + aux, then LM + 0.1 * aux. Ctrl-C
saves before it stops. Writes to `out`: config.json, model.safetensors, the tokenizer, training_state/ (for
--resume, on any number of ranks), log.jsonl and curves.png. A step is measured before it changes the weights:
the row of step 1 is the untrained model's. Every memory layer's recall is of what it selects itself.
"""
import contextlib
import importlib.util
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import PACKAGES, WEIGHTS, find, find_base, whole
from common import (
    UserError,
    autocast,
    check_least,
    check_outside,
    check_spelled,
    command_line,
    detect_device,
    drawing,
    end_process_group,
    is_of_a_lost_rank,
    keep_freed_memory,
    main,
    make_folder,
    peak_memory,
    start_process_group,
)
from costs import is_split, operations, sizes, speed
from interleave import most_tokens
from low_rank import add_factors, factors
from model import MSA, ModelConfig, compile_blocks
from pools import Pools, check_prepared, collate, collate_chat, read_prepared
from prepare_data import CODERS, DataConfig, own_folders
from prompts import load_tokenizer
from routers import fit_routers
from tokenizer import Tokenizer
from training_state import Log, has_state, read_about, read_log, read_state, tell_changes, write_state


@dataclass
class TrainConfig:
    out: str = "out/demo"               # folder of the checkpoint
    init_from: str = ""                 # folder, .gguf file or "owner/name" on the Hub to start from
    rank: int = 0                       # of changes to init_from's maps, all that is trained; 0: all weights
    max_steps: int = 1500               # optimizer steps
    router_steps: int = 300             # first steps, of router_lm_weight * LM + aux; with a rank none
    router_lm_weight: float = 0.1       # of LM in that phase (the paper's); 0 keeps what copy_init made
    routing_dropout: float = 0.0        # share of a question's tokens that do not route in the first phase
    learning_rate: float = 2e-3         # after warm-up; lower for wider models (the paper: 1e-4 at 4B)
    final_learning_rate: float = 2e-5   # at the last step; cosine decay (the paper: 6e-6)
    warmup_steps: int = 50              # linear warm-up
    weight_decay: float = 0.1           # matrices only
    gradient_clip: float = 1.0          # norm
    accumulate: int = 1                 # pools per rank and step; raise it when memory is short
    pools_together: int = 1             # with a rank: pools in one batch; 8 or more keep a GPU busy
    checkpoint_activations: bool = False  # made again in the backward: less memory, more than a third slower
    compile: bool = False               # blocks' products by torch.compile: minutes at first, then faster
    number_limit: int = 10_000_000      # documents' numbers are drawn below it: as many as will be needed
    seed: int = 1337                    # weights and document numbers
    log_every: int = 10                 # steps
    evaluate_every: int = 250           # steps; the checkpoint is written first
    shard: Literal["auto", "on", "off"] = "auto"  # each rank holds a part of the model; auto: where it must
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; with --rank of weights, too
    resume: bool = False                # continue the run in `out`
    overwrite: bool = False             # start anew although `out` holds a checkpoint
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        check_least(self, ("max_steps", "accumulate", "pools_together", "log_every", "evaluate_every",
                           "learning_rate", "gradient_clip", "number_limit"),
                    rank=0, seed=0, router_steps=0, router_lm_weight=0, warmup_steps=0, weight_decay=0,
                    final_learning_rate=0)
        if self.number_limit > 10 ** 18:
            raise UserError(f"number_limit is {self.number_limit}; it must be at most 10 ** 18")
        if not self.out:
            raise UserError("--out is empty; name a folder for the checkpoint")
        if self.rank and not self.init_from:
            raise UserError(f"rank is {self.rank}: of changes to a chat backbone; give it with --init-from")
        if self.pools_together > 1 and not self.rank:
            raise UserError(f"pools_together is {self.pools_together}: of changes to a chat backbone; "
                            "give it with --rank, or use --accumulate")
        if self.rank and self.shard == "on":
            raise UserError(f"rank is {self.rank}: what is trained is small; leave --shard out")
        if self.rank:  # nothing routes
            self.router_steps = 0
        if not 0 <= self.routing_dropout < 1:
            raise UserError(f"routing_dropout is {self.routing_dropout}; it must be at least 0 and below 1")


def learning_rate(step, config):
    """Linear warm-up, constant through the router phase, then cosine down to the final rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    start = max(config.router_steps, config.warmup_steps)
    progress = min(max((step - start) / max(config.max_steps - start, 1), 0), 1)
    share = (1 + math.cos(math.pi * progress)) / 2
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * share


def changes_of(config, loaded):
    """What `config.model` changes of `loaded`, the configuration of what `init_from` names: {field: value}.
    Raises UserError."""
    backbone = loaded.prompts != "nanomsa"
    free = (*ROUTING, "number_chunk", "normalize_values", "score_bias") if backbone else ()
    changes = own_settings(config, loaded, ("second_look",) if config.rank else free)
    if config.rank:
        changes["second_look"] = changes["second_look"] or loaded.second_look
    elif backbone:
        changes |= dict(attend_memory=True, prompts="nanomsa", second_look=0)
    return changes


def start_from(config, folder, tokenizer, device, dtype):
    """The model of `folder`, which `init_from` names. One of train.py's goes on as it is. A backbone keeps
    its sizes and weights, and is a memory model as `config.model` says; routers that it lacks: see
    whiten_routers. With a rank it stays a chat backbone in `dtype`, and what is trained are low-rank changes:
    those that it has, or new ones. Raises UserError where it cannot be."""
    loaded = MSA.read_config(folder)[0]
    if config.rank and loaded.prompts != "chat":
        raise UserError(f"rank is {config.rank}, of changes to a chat backbone, which --init-from "
                        f"{config.init_from} is not; leave it out")
    if config.rank > loaded.hidden_size:
        raise UserError(f"rank is {config.rank}; at most {loaded.hidden_size}, the width of --init-from "
                        f"{config.init_from}")
    changes = changes_of(config, loaded)
    if not tokenizer.extends(load_tokenizer(folder, loaded)):
        raise UserError(f"{config.data.out}: prepared with another tokenizer than that of --init-from "
                        f"{config.init_from}, in which its tokens are other words; run prepare_data.py with "
                        f"--encoding {config.init_from}")
    model = MSA.from_pretrained(folder, device, dtype, merged=not config.rank, **changes)
    ranks = {len(tensor) for name, tensor in factors(model).items() if name.endswith(".down")}
    if ranks - {config.rank}:
        raise UserError(f"rank is {config.rank}, but the changes of --init-from {config.init_from}, which go "
                        f"on, have {max(ranks)}; give --rank {max(ranks)}")
    if config.rank and not ranks:
        known = os.path.exists(config.init_from)  # else it is a name on the Hub
        model.others["base"] = os.path.abspath(config.init_from) if known else config.init_from
        if config.init_from not in PACKAGES:  # whose numbers are the Hub's, or these rounded
            model.others["base_digest"] = model.weights_digest()
        add_factors(model, config.rank)
    if not config.rank:
        model.resize_vocabulary(tokenizer.vocab_size)
    return model.train()


ROUTING = ("chunk_size", "top_k", "router_temperature", "router_layer_idx", "routing_layers",
           "query_reduction", "routing_dim", "document_share")  # what new routers are free to choose


def own_settings(config, loaded, names):
    """The fields `names` of config.model. Raises UserError for another that differs from `init_from`'s."""
    for name, default in asdict(ModelConfig()).items():
        asked, own = getattr(config.model, name), getattr(loaded, name)
        if name not in (*names, "vocab_size", "max_document_tokens") and asked not in (default, own):
            allowed = f" (what can be set: {', '.join(names)})" if names else ""
            raise UserError(f"model.{name} is {asked!r}, but --init-from {config.init_from} has {own!r}; "
                            f"leave it out{allowed}")
    return {name: getattr(config.model, name) for name in names}


def whiten_routers(model, pools, tokenizer, config, dtype):
    """Routers for a backbone that has none, from the documents and questions of the first 16 pools."""
    documents, questions = [], []
    for i in range(min(16, len(pools))):
        found, _, batches = next_pool(pools, i, tokenizer, config, torch.device("cpu"))
        documents += [document.tolist() for document in found]
        for batch in batches:
            routing = batch["routing_mask"] > 0
            questions += [row[routes].tolist() for row, routes in zip(batch["tokens"], routing)]
    with autocast(model.device, dtype):
        fit_routers(model, documents, questions)


def next_pool(pools, position, tokenizer, config, device, dropout=0.0):
    """Pool number `position` (the data is read again when it ends), collated; what is random in it depends on
    the position alone.

    dropout: the share of tokens that do not route. Words that all questions have in common score alike in all
    documents that have them: where they score best, the maximum over tokens hides the words that tell
    documents apart, and Eq. 5 has no gradient that could change it.
    """
    rng = np.random.default_rng([config.seed, position])
    if config.rank:
        places = range(position * config.pools_together, (position + 1) * config.pools_together)
        taken = [pools[place % len(pools)] for place in places]
        documents, numbers, batches = collate_chat(taken, tokenizer, config.number_limit, rng)
    else:
        taken = pools[position % len(pools)]
        documents, numbers, batches = collate(taken, tokenizer, config.number_limit, rng)
    for batch in batches if dropout else ():
        routes = batch["routing_mask"]
        kept = routes * torch.from_numpy(rng.random(routes.shape) >= dropout)
        batch["routing_mask"] = torch.where(kept.any(1, keepdim=True), kept, routes)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    return documents, numbers, batches


def taken_pools(pools, tokenizer, config, device, step, position, rank, world):
    """`next_pool` of every pool that this rank takes from a step and a position on. For a GPU the next one is
    made by a thread meanwhile; on a CPU that would take the time of the step."""
    def places():
        for at in range(step, config.max_steps):
            dropout = config.routing_dropout if at < config.router_steps else 0.0
            for micro in range(config.accumulate):
                place = position + ((at - step) * config.accumulate + micro) * world + rank
                yield pools, place, tokenizer, config, device, dropout

    if device.type == "cuda":
        with ThreadPoolExecutor(1) as worker:
            coming = (worker.submit(next_pool, *place) for place in places())
            for made, _ in pairwise(chain(coming, [None])):  # the one behind it is being made
                yield made.result()
    else:
        yield from (next_pool(*place) for place in places())


METRICS = ("lm", "naming", "answer", "named", "answered", "aux", "top1", "chance")  # scalars of a step


def flatten_metrics(losses):
    """A pool's metrics, the recalls last, as one detached tensor (2, n) to add up over pools and ranks: the
    values, and a 1 for each that there is."""
    scalars = torch.stack([losses[name].detach().float() for name in METRICS])
    values = torch.cat([scalars, losses["recall"].float()])
    return torch.stack([values.nan_to_num(), 1.0 - values.isnan().float()])


def name_metrics(sums):
    """The means of what `flatten_metrics` made, by name; None of what there was none of."""
    values = [round(total / count, 6) if count else None for total, count in zip(*sums.tolist())]
    return {**dict(zip(METRICS, values)), "recall": values[len(METRICS):]}


def describe(row, config):
    """A log row in a line: losses, samples wholly right, recall of each layer and of the mean score. A chat
    backbone does not route in training: its two kinds of answers."""
    number = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    both = lambda loss, right: f"{number(row[loss], 3)} {number(row[right], 2)}"
    if config.rank:
        return f"| answer {both('answer', 'answered')} | not found {both('naming', 'named')}"
    recall = " ".join(number(share, 2) for share in row["recall"])
    return (f"| naming {both('naming', 'named')} | answer {both('answer', 'answered')} "
            f"| aux {number(row['aux'], 3)} | recall@{config.model.top_k} {recall} "
            f"(chance {number(row['chance'], 2)}) | top-1 {number(row['top1'], 2)}")


def plot(rows, path, routes):
    """Draw a log's losses, its samples wholly right, and, of what routes, every memory layer's recall beside
    chance."""
    if not importlib.util.find_spec("matplotlib"):
        return  # the plot extra is not installed
    with drawing(path, (14, 4), columns=3) as panels:
        draw_curves(rows, panels, routes)


def draw_curves(rows, panels, routes):
    """What `plot` draws, on three axes."""
    left, middle, right = panels
    train, validation = ([row for row in rows if row["split"] == split] for split in ("train", "validation"))

    def draw(axes, label, of_row, **style):
        known, dots = ([r for r in some if of_row(r) is not None] for some in (train, validation))
        line, = axes.plot([r["step"] for r in known], [*map(of_row, known)], label=label, **style)
        axes.plot([r["step"] for r in dots], [*map(of_row, dots)], "o", color=line.get_color(), ms=4)

    losses = ((left, "naming", "next token, naming" if routes else "next token, not found"),
              (left, "answer", "next token, answers"), (left, "aux", "routing (Eq. 5)"))
    shares = (middle, "named", "number and stop" if routes else "not found"), (middle, "answered", "answer")
    for axes, name, label in (*losses[:3 if routes else 2], *shares):
        draw(axes, label, lambda row: row[name], lw=0.8)
    layers = len(train[0]["recall"]) - 1
    right.set_visible(routes)
    for i, label in enumerate([*(f"memory layer {i}" for i in range(layers)), "mean score"]):
        draw(right, label, lambda row: row["recall"][i], lw=0.8)
    draw(right, "chance", lambda row: row["chance"], color="k", ls=":")
    left.set(xlabel="step", ylabel="loss", yscale="log", title="losses (dots: validation)")
    middle.set(xlabel="step", ylabel="share of samples wholly right", ylim=(0, 1.02), title="named, answered")
    right.set(xlabel="step", ylabel="recall@k", ylim=(0, 1.02), title="routing")
    for axes in panels:
        axes.legend()


def check_out(config, folder):
    """Raises UserError where `out` holds what this run must not replace. folder: of `init_from`, or None."""
    out = Path(config.out)
    check_spelled(out)
    for read in MSA.bases(folder) if folder else ():  # and what its low-rank changes are of
        if read.resolve() == out.resolve():
            raise UserError(f"--out is {config.out}, which --init-from reads; give another")
    if out.resolve() == Path(config.data.out).resolve():
        raise UserError(f"--out is {config.out}, which holds the prepared data; give another")
    for own in own_folders(config.data):
        check_outside("--out", out, own, "the documents of")
    goes_on = has_state(out / "training_state")
    held = goes_on or any((out / name).exists() for name in ("config.json", WEIGHTS, *CODERS))
    if held and not (config.overwrite or config.resume):
        how = "continue it with --resume, " * goes_on
        raise UserError(f"{out}: holds a checkpoint; {how}replace it with --overwrite, or give another --out")


def prepare(config, device, dtype):
    """(configuration with what the model says, model with its first weights on the device, tokenizer, pools
    of each split, dtype of the products). Raises UserError for an `out` or data that do not fit."""
    folder = None
    if config.init_from:
        folder = (find_base if config.rank else find)(config.init_from)
    check_out(config, folder)
    check_prepared(config.data)
    tokenizer = Tokenizer.load(config.data.out)
    if tokenizer.vocab_size > config.model.vocab_size and not folder:
        raise UserError(f"model.vocab_size is {config.model.vocab_size}; the tokenizer of {config.data.out} "
                        f"has {tokenizer.vocab_size} tokens, and the model needs at least as many")
    tokenizer.number(config.number_limit - 1)  # raises where it cannot be spelled
    if config.model.prompts != "nanomsa":
        raise UserError(f"model.prompts is {config.model.prompts!r}; leave it out: models that train.py "
                        'makes are asked as "nanomsa", or with a rank as --init-from is')
    torch.manual_seed(config.seed)
    weights, products = (dtype, torch.float32) if config.rank else (torch.float32, dtype)
    model = start_from(config, folder, tokenizer, device, weights) if folder else MSA(config.model).to(device)
    if read_prepared(config.data.out)["own"]:  # sample.py and eval.py split them alike
        model.config.max_document_tokens = config.data.max_document_tokens
    config, model.checkpoint_activations = replace(config, model=model.config), config.checkpoint_activations
    if config.rank:
        tokenizer = load_tokenizer(folder, model.config)
        if config.data.max_document_tokens > most_tokens(model):
            raise UserError(f"data.max_document_tokens is {config.data.max_document_tokens:,}; of this "
                            f"model's context it must be at most half, {most_tokens(model):,}: prepare again")
    tokenizer.check_number_chunk(config.model.number_chunk)
    pools = {split: Pools(f"{config.data.out}/{split}", config.model.vocab_size)
             for split in ("train", "validation")}
    if folder and not (model.trained_routers or config.resume or config.rank):
        whiten_routers(model, pools["train"], tokenizer, config, products)
    return config, model, tokenizer, pools, products


def device_bytes(device):
    """Bytes of a GPU, or of this process's share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share_out(model, config, device, dtype, world):
    """What the loop calls: the model itself, or in DDP, where every rank holds all of it, or, shared out,
    FSDP2's. Then each rank holds its rows of weights, gradients and moments, and all weights only while a
    pool is computed: in bfloat16 with that `dtype` (the residual stream, too; gradients are added up, and
    weights changed, in float32). `auto` shares out where 20 bytes a parameter that learns (weight, gradient,
    two moments, DDP's copy of gradients) would take more than 3/4 of the device."""
    if world == 1:
        return model
    needed = sum(p.nbytes + 16 * p.numel() * p.requires_grad for p in model.parameters())
    if not is_split(config, world, needed, device_bytes(device)):
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # As a whole: with blocks by themselves ranks whose pools have more batches would wait for ever
    return fully_shard(model, mesh=init_device_mesh(device.type, (world,)), reshard_after_forward=False,
                       mp_policy=precision)


def is_shared(model):
    """Whether `share_out` gave each rank a part."""
    return hasattr(model, "unshard")


def make_optimizer(model, config):
    """AdamW for what learns; weight decay for matrices only."""
    learns = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in learns if (p.ndim < 2) == small] for small in (False, True))
    return torch.optim.AdamW([dict(params=matrices, weight_decay=config.weight_decay),
                              dict(params=vectors, weight_decay=0.0)],
                             lr=config.learning_rate, betas=(0.9, 0.95), fused=model.device.type != "mps")


def settings_of(config, model, tokenizer, digest):
    """What --resume compares: {name: value} of every setting but those that differ from call to call, nested
    ones as "model.top_k"; the fingerprint of the tokenizer, the `digest` of the prepared data, and the digest
    of the weights that low-rank changes belong to."""
    values = {"tokenizer": tokenizer.fingerprint(), "data": digest,
              "base_digest": model.others.get("base_digest")}
    for name, value in asdict(config).items():
        nested = isinstance(value, dict)  # a table of the configuration
        values |= {f"{name}.{key}": x for key, x in value.items()} if nested else {name: value}
    return {name: value for name, value in values.items() if name not in ("out", "resume", "overwrite")}


def resume(out, model, optimizer, settings, world, say):
    """Go on where the run in `out` was last saved: returns step, position and the log's rows. Says what is
    otherwise than before. Raises UserError for what cannot be."""
    about = read_about(out / "training_state")
    changes = tell_changes(out / "training_state", about, settings, world)
    rows = about["rows"] or read_log(out / "log.jsonl", about["step"])
    read_state(out / "training_state", model, optimizer, about)
    say(f"resumed from {out} at step {about['step']}" + "".join(f"; {change}" for change in changes))
    together = settings["pools_together"]
    read = about["position"] * about["settings"].get("pools_together", together)
    position = -(-read // together)  # no pool is read again
    return about["step"], position, rows


def save(out, model, optimizer, tokenizer, about, log, rank):
    """Write the checkpoint: first what --resume needs, `about` it and its log too, then the model. Each file
    appears whole or not at all."""
    shared = is_shared(model)
    log.sync()
    if rank == 0 or shared:
        if not log.file:  # until it begins, log.jsonl holds the rows of the run that this one replaces
            about = {**about, "rows": log.rows}
        write_state(out / "training_state", model, optimizer, about, rank, about["ranks"] if shared else 1)
        log.begin()
    save_model(out, model, tokenizer, rank)


def save_model(out, model, tokenizer, rank):
    """Write the folder in the Hugging Face layout, which the first rank does tensor by tensor."""
    if rank == 0 or is_shared(model):
        model.save_pretrained(out if rank == 0 else None)
    if rank == 0:
        tokenizer.save(out)


def validate(model, pools, tokenizer, config, device, dtype, rank, world):
    """The sums of `flatten_metrics` over the validation pools, dealt to the ranks, each pool by itself."""
    config = replace(config, pools_together=1)
    sums = torch.zeros(2, len(METRICS) + config.model.rankings + 1, device=device)
    model.eval()
    if is_shared(model):
        model.unshard()  # all ranks at once: they may have unequal numbers of pools
    with torch.no_grad(), autocast(device, dtype):
        for i in range(rank, len(pools), world):
            sums += flatten_metrics(model(*next_pool(pools, i, tokenizer, config, device)))
    if is_shared(model):
        model.reshard()
    model.train()
    if world > 1:
        dist.all_reduce(sums)
    return sums


@contextlib.contextmanager
def telling_of_lost_ranks(config):
    """Where another rank has ended, UserError says how to go on."""
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and is_of_a_lost_rank(error)):
            raise
        how = "starts anew"
        if has_state(Path(config.out) / "training_state"):
            how = f"with --resume goes on from the last checkpoint in {config.out}"
        raise UserError(f"another rank has ended or does not answer; the same command {how}") from None


def step_gradients(model, wrapped, taken, config, step, device, dtype, world):
    """Adds up the gradients of a step's pools; returns (their metrics added up, tokens, operations). wrapped:
    the model as `share_out` returned it."""
    aux_weight, lm_weight = (1.0, config.router_lm_weight) if step < config.router_steps else (0.1, 1.0)
    metrics, tokens, work = 0.0, 0, 0
    for micro in range(config.accumulate):
        documents, numbers, batches = next(taken)
        last = micro == config.accumulate - 1  # gradients are added up over ranks once
        if is_shared(model):
            model.set_requires_gradient_sync(last)
        elif world > 1:
            wrapped.require_backward_grad_sync = last
        with autocast(device, dtype):
            losses = wrapped(documents, numbers, batches)
        ((lm_weight * losses["lm"] + aux_weight * losses["aux"]) / config.accumulate).backward()
        metrics = metrics + flatten_metrics(losses)
        lengths, parts = [*map(len, documents)], sizes(batches)
        tokens += sum(lengths) + sum(rows * length + shared for rows, length, shared, _ in parts)
        work += operations(config.model, lengths, parts, config.rank)
    return metrics, tokens, work


def change_weights(optimizer, config, step):
    """One step of AdamW by the gradients, clipped; returns their norm before that."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    learns = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(torch.nn.utils.clip_grad_norm_(learns, config.gradient_clip))
    optimizer.step()
    optimizer.zero_grad()
    return norm


def catch_signals(say):
    """A list to which Ctrl-C, or SIGTERM, adds its number: the step is finished and saved, and the run stops.
    A second one stops it at once."""
    signals = []

    def keep(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError, RuntimeError):  # what reads the output may be gone, or it is in use
            waits = " (torchrun waits for it 30 s, or its --shutdown-timeout)" if "RANK" in os.environ else ""
            say(f"stopping after this step, which is saved{waits}; once more: at once", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, keep)
    return signals


def script():
    config = command_line(TrainConfig, __doc__)
    keep_freed_memory()
    device, dtype, reason = detect_device(config.device, config.dtype)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        start_process_group(device, timeout=3600)  # while rank 0 writes, the others wait
    say = print if rank == 0 else lambda *_, **__: None
    say(f"device: {device} ({reason}); ranks: {world}"
        + "; if one ends, the same command with --resume goes on from the last checkpoint" * (world > 1))
    with telling_of_lost_ranks(config):
        train(config, device, dtype, rank, world, say)
    end_process_group()


def train(config, device, dtype, rank, world, say):
    """A whole run: prepare, perhaps resume, step by step, save."""
    out = Path(config.out)
    config, model, tokenizer, pools, dtype = prepare(config, device, dtype)
    if config.compile:
        compile_blocks(model)
    wrapped = share_out(model, config, device, dtype, world)
    optimizer = make_optimizer(model, config)
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, of which "
        f"{learns:,} learn, memory layers {config.model.memory_layers}; "
        f"data: {len(pools['train']):,} pools" + "; weights are shared out to the ranks" * is_shared(model))
    settings = settings_of(config, model, tokenizer, pools["train"].digest)
    step, position, rows = 0, 0, []
    if config.resume:
        step, position, rows = resume(out, model, optimizer, settings, world, say)
    unseen = not any((row["step"], row["split"]) == (step, "validation") for row in rows)
    make_folder(out, probe=True)  # an unusable folder is better known before the first step
    # What --overwrite replaces stays until there is something to put in its place
    log = Log(out / "log.jsonl" if rank == 0 else None, rows, patient=config.overwrite and not config.resume)

    def evaluate():
        metrics = validate(model, pools["validation"], tokenizer, config, device, dtype, rank, world)
        if not metrics[1, METRICS.index("lm")]:
            raise UserError(f"the validation loss is not a number at step {step}, and {out} is of no use; "
                            "train anew with a lower --learning-rate")
        log.add({"step": step, "split": "validation", **name_metrics(metrics)})
        say(f"step {step:5d} validation {describe(log.rows[-1], config)}", flush=True)

    due = lambda step: step % config.evaluate_every == 0 or step == config.max_steps
    signals, stop = catch_signals(say), torch.zeros(1, device=device)  # stop: all ranks agree after a step
    model.train()
    taken = taken_pools(pools["train"], tokenizer, config, device, step, position, rank, world)
    began, tokens_done, work_done, start_step = time.time(), 0, 0, step
    if step >= config.max_steps:  # the run may have ended before it wrote the model of its last state
        save_model(out, model, tokenizer, rank)
    if step and unseen and due(step):  # and before this
        evaluate()
    while step < config.max_steps and not stop:
        metrics, tokens, work = step_gradients(model, wrapped, taken, config, step, device, dtype, world)
        norm = change_weights(optimizer, config, step)
        tokens_done, work_done = tokens_done + tokens, work_done + work
        position += config.accumulate * world
        step += 1
        stop.fill_(bool(signals))
        if world > 1:  # every rank logs the same and stops at the same step
            dist.all_reduce(metrics)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        if not math.isfinite(norm):
            saved = f" (the last checkpoint in {out} is of an earlier step)"
            raise UserError(f"the loss is not a number at step {step}; lower --learning-rate"
                            + saved * (start_step > 0 or step > config.evaluate_every))
        log.add({"step": step, "split": "train", **name_metrics(metrics), "norm": round(float(norm), 4)})
        if step % config.log_every == 0 or step == 1:
            spent = time.time() - began
            left = spent / (step - start_step) * (config.max_steps - step)
            rates = f"{tokens_done * world / spent:,.0f} tokens/s, {speed(device, work_done, spent)}"
            say(f"step {step:5d}/{config.max_steps} {describe(log.rows[-1], config)} | "
                f"{rates} | {left // 60:.0f}m{left % 60:02.0f}s left", flush=True)
        if due(step) or stop:  # before the evaluation, which might fail
            about = dict(step=step, position=position, ranks=world, settings=settings)
            save(out, model, optimizer, tokenizer, about, log, rank)
        if due(step):
            evaluate()
    if rank == 0:
        plot(log.rows, out / "curves.png", config.rank == 0)
    say(f"{'stopped' if stop else 'done'} at step {step}: {out} ({time.time() - began:.0f} s, "
        f"{tokens_done * world:,.0f} tokens; a rank held {peak_memory(device)} at most)"
        + "; go on with --resume" * bool(stop))
    if stop and world == 1:  # what would come next in a script waits, too; torchrun tells this by itself
        sys.exit(128 + signals[0])


if __name__ == "__main__":
    main(script)
