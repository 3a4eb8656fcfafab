"""What training costs: bytes and hours of a configuration, counted; time and memory against full attention,
measured. `python bench.py plan` and `python bench.py linear` call this.
"""
import statistics
import time
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache import Cache
from common import autocast, drawing
from low_rank import add_factors
from memory import BATCH_TOKENS, Memory
from model import MSA, Block, rope_angles
from msa_kernel import chunk_offsets, sparse_attention


def operations(config, lengths, batches, rank=0):
    """What a pool's forward and backward have to compute, in operations, 2 for a product and its sum:

        learns * (sum over tokens of 2 * the matrices that a token passes + 4 * H * D * the keys that it sees)

    config: a ModelConfig; lengths: of documents, in tokens; batches: (rows, tokens, shared tokens, predicted
    tokens). A document's token passes the layers before the last that a memory keeps, and this one's key and
    value maps, and sees half its document; a question's passes all, and sees the shared tokens, half the
    question and, in memory layers, the chunks of top_k documents; a predicted one passes the output matrix.
    Where routing layers are named a question passes those up to the last of them once more (`find`).
    learns: 3, since a backward is twice a forward; 5/3 with a `rank`, where two thirds of the layers have a
    backward, of their inputs alone. What is computed again is not counted, so that the share of a device's
    peak (MFU) is of use."""
    E, layers, memory = config.hidden_size, config.num_hidden_layers, config.memory_layers
    width, groups = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    matrices = E * (2 * width + 2 * groups + 3 * config.intermediate_size)
    heads, key_heads, size = config.routing_shape
    router = E * size * len(config.router_layers) * config.decouple_router
    deep = max(config.reading_layers + config.router_layers)
    total = 2 * sum(lengths) * (deep * matrices + 2 * E * groups + key_heads * router)
    total += 2 * width * deep * sum(length * length for length in lengths)
    chunks = sum(-(-length // config.chunk_size) for length in lengths) / max(len(lengths), 1)
    slots = min(config.top_k, len(lengths)) * chunks * len(memory) * config.attend_memory
    routes = len(lengths) > 0  # a message that shows its documents routes nothing
    before = max(config.router_layers)
    for rows, tokens, shared, predicted in batches:
        total += 2 * (rows * tokens + shared) * (layers * matrices + routes * heads * router)
        if routes and config.routing_layers:
            total += 2 * rows * tokens * (before * (matrices + width * tokens) + E * (width + 2 * groups))
        seen = layers * (shared + tokens / 2) + slots
        total += 4 * width * (rows * tokens * seen + layers * shared * shared / 2)
        total += 2 * E * config.vocab_size * predicted
    return (5 / 3 if rank else 3) * total


# bfloat16 operations a second, without sparsity, by what the device's name holds
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def speed(device, done, spent):
    """Operations of this rank in some seconds, as text; of a GPU in PEAK with their share of its peak."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((rate for part, rate in PEAK.items() if part in name), None)
    text = f"{done / spent / 1e12:.3g} TFLOP/s"
    return f"{text}, MFU {done / spent / peak:.0%}" if peak else text


def sizes(batches):
    """(rows, tokens, shared tokens, predicted tokens) of each batch."""
    return [(*b["tokens"].shape, b["shared"].numel() if "shared" in b else 0, int(b["target_mask"].sum()))
            for b in batches]


class Held(TorchDispatchMode):
    """Counts the bytes of tensors made under it, once for each memory: `now`, and `peak`, the most at once.
    What an operation uses inside is not seen. known: tensors that do not count, such as weights."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {id(x.untyped_storage()): x.untyped_storage() for x in known}  # held, so that ids stay

    def forget(self, key, size):
        self.now -= size
        del self.seen[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and id(storage := x.untyped_storage()) not in self.seen:
                key, size = id(storage), storage.nbytes()
                self.seen[key] = weakref.finalize(storage, self.forget, key, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return made


# ------------------------------------------------------------------------------------------------------------
# Bytes and hours of a configuration

def kept_per_token(config, dtype):
    """Bytes that one block keeps of a token for its backward, counted on fake tensors: the difference of 512
    and 256 tokens, so that weights, and what autocast makes of them, drop out. dtype: of the products."""
    def kept(tokens):
        found = {}
        def pack(x):
            found[id(x.untyped_storage())] = x.untyped_storage()
            return x
        with FakeTensorMode(), saved_tensors_hooks(pack, lambda x: x), autocast(torch.device("cpu"), dtype):
            layer, x = Block(config, True), torch.empty(1, tokens, config.hidden_size, requires_grad=True)
            rope = rope_angles(torch.arange(tokens), config)
            attend = lambda attention, h, keys, values: (
                sparse_attention(attention.query(h, rope), keys, values), attention.routing_key(h, keys))
            kept_alive = layer(x, rope, attend)  # noqa: F841
            return sum(storage.nbytes() for storage in found.values())
    return (kept(512) - kept(256)) / 256


QUESTION, ANSWER = 32, 24  # tokens, where the data do not say


def pool_of(config):
    """A pool of a TrainConfig, as (lengths of documents, batches as `operations` takes them). Documents
    are as long as they may be; each question is asked once, and answered once with a document behind it."""
    data, longest = config.data, config.data.max_document_tokens
    documents, questions = data.documents_per_pool, data.questions_per_pool
    if not (data.documents or data.data):  # the synthetic tasks
        longest = 64 if data.filler else 32
        documents = data.needles + data.chains * data.hops + data.properties + data.noise
        questions = data.needles + data.chains + data.properties
    if config.rank:  # a chat backbone encodes none: its message shows a few documents
        shown, count = 4 * longest, questions * config.pools_together
        if config.pools_together == 1:  # they are read once for all questions
            return [], [(count, QUESTION + ANSWER, shown, count * ANSWER)]
        return [], [(count, shown + QUESTION + ANSWER, 0, count * ANSWER)]
    rows, batches = [QUESTION + ANSWER] * questions + [QUESTION + longest + ANSWER] * questions, []
    while rows:
        width = rows[-1]
        count = min(max(1, BATCH_TOKENS // width), rows.count(width))
        batches.append((count, width, 0, count * ANSWER))
        del rows[-count:]
    return [longest] * documents, batches


def is_split(config, ranks, needed, device_bytes):
    """Whether the ranks split the weights, gradients and moments of a TrainConfig: as `shard` says, or, where
    it is "auto", if the `needed` bytes of a whole copy would take more than 3/4 of the `device_bytes`."""
    must = config.shard == "auto" and not config.rank and needed > 0.75 * device_bytes
    return ranks > 1 and (config.shard == "on" or must)


def plan(config, gpus, gpu_bytes, mfu, peak):
    """Bytes of each GPU, term by term, and hours of a TrainConfig.

    P parameters, R GPUs, bytes of each; float32 weights, gradients and moments, products in bfloat16:
        one copy   4 P weights + 4 P gradients + 8 P moments (AdamW); shared out: each / R. With 1 rank, or
                   DDP: + 4 P of buckets with more ranks, + 2 P of weights that autocast has cast
        shared     while a pool is computed: 2 P weights + 2 P gradients + 4 P for their sum in float32, and
                   with `accumulate` another 4 P of sums until now
        a token    K: what a block keeps of a token (`kept_per_token`)
        documents  tokens * layers * K (the last memory layer, of which keys and values are all, keeps
                   little); computed again: a batch's * layers * K, and of all the pooled tensors
        questions  tokens * layers * K; computed again: tokens * layers * E * 4, and a batch's * K
        logits     predicted tokens * vocabulary * 12: logits, their log-softmax and its gradient
    Hours: operations * pools / (gpus * peak * mfu); computing again adds a third of the operations.
    Returns a dict of terms in bytes, and of `hours`, `tokens`, `tokens_per_second`; prints nothing.
    """
    shape, (lengths, batches) = config.model, pool_of(config)
    with torch.device("meta"):
        model = MSA(shape)
    if config.rank:
        add_factors(model, config.rank)
    P = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers, deep = shape.num_hidden_layers, max(shape.reading_layers + shape.router_layers)
    K = kept_per_token(shape, torch.bfloat16)
    ddp = dict(weights=2 * (P - learns) + 4 * learns, gradients=4 * learns, moments=8 * learns,
               buckets=4 * learns * (gpus > 1), casts=0 if config.rank else 2 * P)
    shared = dict(weights=4 * P / gpus, gradients=4 * P / gpus, moments=8 * P / gpus, all_weights=2 * P,
                  all_gradients=6 * P + 4 * P * (config.accumulate > 1))
    needed = sum(ddp[name] for name in ("weights", "gradients", "moments", "buckets"))
    out = is_split(config, gpus, needed, gpu_bytes)
    tokens, asked = sum(lengths), sum(rows * width + before for rows, width, before, _ in batches)
    largest = max(rows * width + before for rows, width, before, _ in batches)
    chunks = sum(-(-length // shape.chunk_size) for length in lengths)
    pooled = 2 * shape.num_key_value_heads * shape.head_dim * len(shape.reading_layers)
    pooled += shape.routing_shape[1] * shape.routing_shape[2] * len(shape.router_layers)
    logits = 12 * shape.vocab_size * sum(predicted for *_, predicted in batches)
    kept = dict(documents=tokens * deep * K, questions=asked * layers * K, logits=logits)
    batch = max(BATCH_TOKENS, max(lengths, default=0)) if lengths else 0
    again = dict(documents=min(batch, tokens) * deep * K + 3 * 4 * chunks * pooled,
                 questions=asked * layers * shape.hidden_size * 4 + largest * K, logits=logits)
    work = operations(shape, lengths, batches, config.rank)
    seconds = work / (peak * mfu)  # of a pool
    pools = config.max_steps * config.accumulate  # of each GPU
    return dict(parameters=P, learns=learns, gpus=gpus, shared=out, state=shared if out else ddp,
                per_token_and_layer=K, activations=kept, computed_again=again, pool_tokens=tokens,
                asked=asked, operations=work, tokens=pools * gpus * (tokens + asked),
                tokens_per_second=gpus * (tokens + asked) / seconds, hours=pools * seconds / 3600)


def print_plan(found, gpu_bytes, mfu, peak):
    """A plan as a table; a line for each term."""
    P, gigabytes = found["parameters"], lambda n: f"{n / 1e9:8.2f} GB"
    where = "shared out" if found["shared"] else "whole on each"
    print(f"{P:,} parameters, of which {found['learns']:,} learn; {found['gpus']} x "
          f"{gpu_bytes / 1e9:.0f} GB; weights {where}; a pool: "
          f"{found['pool_tokens']:,} tokens of documents, {found['asked']:,} of questions")
    for name, value in found["state"].items():
        if value:
            print(f"  {name:22}{gigabytes(value)}")
    state = sum(found["state"].values())
    print(f"  {'state':22}{gigabytes(state)}\n"
          f"  a block keeps {found['per_token_and_layer'] / 1e3:.1f} KB of a token")
    print(f"  {'':22}{'kept':>11} {'computed again':>16}")
    for name, value in found["activations"].items():
        print(f"  {name:22}{gigabytes(value)} {gigabytes(found['computed_again'][name]):>16}")
    both = [state + sum(found[kind].values()) for kind in ("activations", "computed_again")]
    fits = ["fits" if total <= gpu_bytes else "too much" for total in both]
    print(f"  {'all':22}{gigabytes(both[0])} {gigabytes(both[1]):>16}\n  {'':22}{fits[0]:>11} {fits[1]:>16}")
    print(f"  {found['operations'] / 1e12:,.1f} TFLOP a pool; at MFU {mfu:.0%} of {peak / 1e12:.0f} TFLOP/s "
          f"{found['tokens_per_second']:,.0f} tokens/s; {found['tokens'] / 1e9:.2f}B tokens: "
          f"{found['hours']:.1f} hours, computed again {found['hours'] * 4 / 3:.1f}")


# ------------------------------------------------------------------------------------------------------------
# Linear in the memory?

def random_pool(config, documents, length, questions, tokens, device):
    """One pool for MSA.forward: documents and questions of random tokens, each about one document."""
    ids = lambda *shape: torch.randint(0, config.vocab_size, shape, device=device)
    target = torch.zeros(questions, tokens, dtype=torch.bool, device=device)
    target[:, tokens // 2:] = True
    positive = torch.zeros(questions, documents, dtype=torch.bool, device=device)
    positive[torch.arange(questions), torch.arange(questions) % documents] = True
    batch = dict(tokens=ids(questions, tokens), routing_mask=~target, target_mask=target, positive=positive,
                 answers=target.new_zeros(questions), appended=torch.zeros_like(positive))
    return list(ids(documents, length).cpu()), list(range(documents)), [batch]


def training_step(model, tokens, kind):
    """Forward and backward over documents of 64 tokens and one question of 32: by the memory, or with full
    attention, which reads all of it as one text."""
    documents, numbers, batches = random_pool(model.config, tokens // 64, 64, 1, 32, model.device)
    model.checkpoint_activations = kind == "MSA, computed again"

    def run():
        if kind == "full attention":
            batch = batches[0]
            text = torch.cat([torch.cat(documents).to(model.device), batch["tokens"][0]])[None]
            target = F.pad(batch["target_mask"], (tokens, 0))
            logits = model.read(text, positions=F.pad(target[:, 1:], (0, 1))).logits
            F.cross_entropy(logits, text[target]).backward()
        else:
            losses = model(documents, numbers, batches)
            (losses["lm"] + losses["aux"]).backward()
    return run


def question(model, tokens, kind):
    """A question of 32 tokens, asked of a memory, or of the cache, that `tokens` tokens have left: of random
    contents, which its time does not depend on."""
    config, device = model.config, model.device
    ids = torch.randint(0, config.vocab_size, (1, 32), device=device)
    many = lambda count, rows: [torch.randn(rows, config.num_key_value_heads, config.head_dim, device=device)
                                for _ in range(count)]
    if kind == "full attention":
        cache, (keys, values) = Cache(), (many(config.num_hidden_layers, tokens) for _ in range(2))
        cache.keys, cache.values = (dict(enumerate(x[None] for x in xs)) for xs in (keys, values))
        cache.length = tokens
        return lambda: model.read(ids, cache=cache.expand(1)).logits
    layers, chunks = len(config.memory_layers), tokens // 64
    routing = [F.normalize(x, dim=-1) for x in many(layers, chunks)]
    offsets = chunk_offsets(torch.full((chunks,), 64), config.chunk_size).to(device)
    memory = Memory(many(layers, chunks), many(layers, chunks), routing, offsets, list(range(chunks)))
    return lambda: model.read(ids, memory, torch.ones_like(ids)).logits


def seconds_and_bytes(run, model):
    """(seconds of a call, bytes that it holds at most beside what was there). On a CPU the seconds are those
    that it computes, on all threads: what else runs there does not count. Short calls count by the median of
    three; the bytes are another call's, which is slower for being watched."""
    times, clock = [], time.process_time if model.device.type == "cpu" else time.perf_counter
    while len(times) < 4 and sum(times) < 10:  # the first is a warm-up, where there is a second
        began = clock()
        run()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return statistics.median(times[1:] or times), torch.cuda.max_memory_allocated() - before
    known = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with Held(known) as held:
        run()
    return statistics.median(times[1:] or times), held.peak


KINDS = ("MSA", "MSA, computed again", "full attention")
EXTRAPOLATED = 384 * 1024  # tokens


def linear(model, limit, longest, free, shortest):
    """Rows of (what, kind, tokens, seconds, bytes), of training steps and of questions: from `shortest` on,
    twice as many each time up to `longest`, while the next should take less than `limit` seconds and `free`
    bytes."""
    rows = []
    for what, make in (("training step", training_step), ("question", question)):
        for kind in KINDS if make is training_step else (KINDS[0], KINDS[2]):
            tokens, growth = shortest, 4 if kind == "full attention" else 2
            while tokens <= longest:
                with torch.set_grad_enabled(make is training_step):
                    run = make(model, tokens, kind)
                    seconds, held = seconds_and_bytes(run, model)
                del run
                rows.append(dict(what=what, kind=kind, tokens=tokens, seconds=seconds, bytes=held))
                print(f"{what:14} {kind:20} {tokens:>10,} tokens {seconds:10.4f} s {held / 1e9:9.3f} GB",
                      flush=True)
                # Beside what it holds at most, a question's memory or cache is there
                there = tokens * 8 * model.config.num_hidden_layers * (
                    model.config.num_key_value_heads * model.config.head_dim) * (make is question)
                if growth * seconds > limit or 2 * (held + there) > free:
                    break
                tokens *= 2
    return rows


def compare(rows):
    """Lines about `linear`: exponents of the upper half of the lengths, where MSA begins to be ahead, the
    ratio at the longest that both reach, and at EXTRAPOLATED tokens by fits of a + b n to all lengths with
    relative errors; + c n^2 for the seconds of full attention's training steps."""
    lines = []
    of = lambda what, kind: [row for row in rows if (row["what"], row["kind"]) == (what, kind)]
    for what, kind in dict.fromkeys((row["what"], row["kind"]) for row in rows):
        own, full = of(what, kind), {row["tokens"]: row for row in of(what, KINDS[2])}
        for unit in ("seconds", "bytes"):
            upper = own[len(own) // 2:] if len(own) > 3 else own
            slope = np.polyfit(*(np.log([row[name] for row in upper]) for name in ("tokens", unit)), 1)[0]
            text = f"{what}, {kind}, {unit}: exponent {slope:.2f} from {upper[0]['tokens']:,} tokens on"
            both = [(row["tokens"], full[row["tokens"]][unit] / row[unit]) for row in own
                    if row["tokens"] in full]
            if kind != KINDS[2] and both:
                ahead = next((f"{tokens:,}" for tokens, ratio in both if ratio > 1), "no length measured")
                fits = [fitted(xs, unit, square and unit == "seconds")
                        for xs, square in ((own, False), (of(what, KINDS[2]), what == "training step"))]
                text += (f"; ahead of full attention from {ahead}; ratio {both[-1][1]:.2f} at "
                         f"{both[-1][0]:,}; fitted at {EXTRAPOLATED:,}: {fits[1] / fits[0]:.1f}")
            lines.append(text)
    return lines


def fitted(rows, unit, square):
    """What a + b n (+ c n^2), fitted with relative errors, says at EXTRAPOLATED tokens."""
    tokens, found = (np.array([row[name] for row in rows], float) for name in ("tokens", unit))
    degree = min(2 if square else 1, len(rows) - 1)
    return float(np.polyval(np.polyfit(tokens, found, degree, w=1 / found), EXTRAPOLATED))


def plot(rows, title, path):
    """Time and memory of training steps and of questions against tokens, both logarithmic."""
    units = ("seconds", 1, "s"), ("bytes", 1e9, "GB beside weights")
    with drawing(path, (11, 7), rows=2, columns=2) as panels:
        for line, what in zip(panels, ("training step", "question")):
            for axes, (unit, scale, label) in zip(line, units):
                for kind in KINDS:
                    own = [row for row in rows if (row["what"], row["kind"]) == (what, kind)]
                    if own:
                        axes.plot([row["tokens"] for row in own], [row[unit] / scale for row in own], "o-",
                                  ms=4, label=kind, color=f"C{KINDS.index(kind)}")
                axes.set(xscale="log", yscale="log", xlabel="tokens of documents", ylabel=label,
                         title=f"{title}: {what}")
                axes.legend()
