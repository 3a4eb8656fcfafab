"""The full-attention baseline: a transformer of the demo's size reads all documents as one text, without a
memory.

    python prepare_data.py config/full.toml
    python baseline.py config/full.toml                       # trains (19 minutes of one core), then asks
    python baseline.py config/full.toml --lengths 1k,2k       # the model in `out` is there: asks only

Trained on pools of the synthetic tasks, asked about needles (tasks.py) whose keys it has never seen, at
several lengths. Nothing routes: the loss is that of answers alone. To do without this file, delete it and
config/full.toml.
"""
import json
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cache import Cache
from common import (
    UserError,
    check_least,
    command_line,
    detect_device,
    keep_freed_memory,
    main,
    make_folder,
    progress_bar,
    read_text,
    write_json,
    write_rows,
)
from model import MSA, ModelConfig
from pools import Pools, check_prepared, stack
from prepare_data import DataConfig
from scratch import start_equal
from tasks import Words, grow_memory, parse_lengths
from tokenizer import Tokenizer


@dataclass
class BaselineConfig:
    out: str = "out/full"               # folder of the checkpoint and of answers.json
    max_steps: int = 1100               # optimizer steps
    accumulate: int = 4                 # pools a step
    learning_rate: float = 1e-3         # after 50 steps of warm-up; falls to 2e-5 as a cosine
    seed: int = 1337                    # of weights
    lengths: str = "1k,2k,4k,8k,16k"    # tokens of documents that are asked about, as our memory counts them
    questions: int = 29                 # asked for each seed and length
    seeds: str = "1,2,3,4,5,6,7"        # of documents and questions
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        parse_lengths(self.lengths)
        check_least(self, ("max_steps", "accumulate", "learning_rate", "questions"))
        if not all(seed.strip().isdecimal() for seed in self.seeds.split(",")):
            raise UserError(f"seeds is {self.seeds!r}; write whole numbers with commas between, such as "
                            "1,2,3")


def make_model(config):
    """A plain transformer (the routers are never used) with the same help as the demo.

    All embeddings share a part: without one, keys have no constant part, and with RoPE alone no head can
    attend by place. The last layer's query and key maps start equal, as the demo's routers do.
    """
    model = MSA(config)
    E = config.hidden_size
    model.model.embed_tokens.weight.data += torch.randn(E) * E ** -0.5
    attention = model.model.layers[-1].self_attn
    start_equal(attention.q_proj, attention.k_proj, attention)
    return model


def join(pool, tokenizer, count):
    """A pool's documents as `count` texts of equal length (newlines in front), and its questions as one
    batch.

    Document m of M stands in text m * count // M. Asked are the questions whose documents stand in one text:
    their place there is returned too. Returns (texts (count, L), batch as of pools.stack, place (B,)),
    or None where there is no such question.
    """
    documents, questions = pool
    joined = [[] for _ in range(count)]
    place = [document * count // len(documents) for document in range(len(documents))]
    for at, document in zip(place, documents):
        joined[at] += document.tolist()
    samples, places = [], []
    for question, answer, gold, _ in questions:
        found = {place[document] for hop in gold for document in hop}
        if len(found) == 1:
            target = [tokenizer.end_of_retrieval, *answer.tolist(), tokenizer.end]
            prompt = tokenizer.question(question.tolist())
            samples.append((prompt, target, [], [], [1] * len(prompt)))
            places += found
    if not samples:
        return None
    width, newline = max(map(len, joined)), tokenizer.encode("\n")
    texts = torch.tensor([newline * (width - len(text)) + text for text in joined])
    return texts, stack(samples, tokenizer, len(documents)), torch.tensor(places)


def read_context(model, texts):
    """Texts (R, L), read with full attention into a Cache that questions continue."""
    cache = Cache()
    model.read(texts, cache=cache, positions=slice(0))
    return cache


def loss_of(model, texts, batch, place):
    """The mean next-token loss of answers, and the share of questions answered wholly right."""
    tokens, target = batch["tokens"].to(model.device), batch["target_mask"].to(model.device)
    place = place.to(model.device)
    cache = read_context(model, texts.to(model.device)).map(lambda x: x[place])
    logits = model.read(tokens, cache=cache, positions=F.pad(target[:, 1:], (0, 1))).logits
    wrong = torch.zeros(len(tokens)).index_add(0, target.nonzero()[:, 0].cpu(),
                                               (logits.argmax(-1) != tokens[target]).float().cpu())
    return F.cross_entropy(logits, tokens[target]), float((wrong == 0).float().mean())


def train(config, model, tokenizer, pools):
    """Few documents are told apart sooner: eight texts a pool at first, then four, two, and one from 3/8
    on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95),
                                  weight_decay=0.1)
    rows = []
    with tqdm(total=config.max_steps, desc="training", unit="step") as bar:
        for step in range(config.max_steps):
            warm, done = min(1, (step + 1) / 50), step / config.max_steps
            rate = 2e-5 + (config.learning_rate - 2e-5) * (1 + np.cos(np.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate * warm
            count, losses = max(1, 8 >> int(8 * done)), []
            for micro in range(config.accumulate):
                pool = pools[(step * config.accumulate + micro) % len(pools)]
                joined = join(pool, tokenizer, count) or join(pool, tokenizer, 1)
                loss, right = loss_of(model, *joined)
                (loss / config.accumulate).backward()
                losses.append((float(loss.detach()), right))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss, right = np.mean(losses, 0).tolist()
            if not np.isfinite(loss):
                raise UserError(f"the loss is not a number at step {step + 1}; lower --learning-rate")
            rows.append(dict(step=step + 1, texts=count, loss=round(loss, 4), answered=round(right, 4)))
            bar.set_postfix(loss=f"{loss:.3f}", answered=f"{right:.2f}", texts=count, refresh=False)
            bar.update()
    return rows


def continue_greedily(model, tokens, cache, end, limit):
    """At most `limit` token ids that follow `tokens`, up to `end`."""
    said = []
    while len(said) < limit:
        logits = model.read(torch.tensor([tokens], device=model.device), cache=cache).logits[0, -1]
        tokens = [int(logits.argmax())]
        if tokens == [end]:
            break
        said += tokens
    return said


@torch.no_grad()
def ask(model, tokenizer, words, config, seed):
    """The share of exact answers about needles at each length: rows of a table."""
    lengths = parse_lengths(config.lengths)
    memory = grow_memory(words, tokenizer, "niah_multikey", lengths, config.questions, seed)
    rows = []
    for count in memory.counts:
        order = np.argsort(memory.numbers[:count])
        text = [token for d in order for token in tokenizer.encode(memory.texts[d])]
        context, right = read_context(model, torch.tensor([text], device=model.device)), 0
        for question in progress_bar(memory.questions, desc=f"{count:,} documents"):
            prompt = [*tokenizer.question(tokenizer.encode(question.text)), tokenizer.retrieve,
                      tokenizer.end_of_retrieval]
            answer = continue_greedily(model, prompt, context.expand(1), tokenizer.end, 16)
            right += tokenizer.decode(answer).strip() == question.answer
        rows.append(dict(seed=seed, memory_tokens=int(memory.ends[count - 1]), documents=count,
                         read_tokens=len(text),
                         questions=len(memory.questions), exact_match=right / len(memory.questions)))
    return rows


def script():
    config = command_line(BaselineConfig, __doc__)
    keep_freed_memory()
    device, _, reason = detect_device(config.device, "float32")
    print(f"device: {device} ({reason})")
    out = Path(config.out)
    torch.manual_seed(config.seed)
    if (out / "config.json").exists():
        model, tokenizer = MSA.from_pretrained(out, device), Tokenizer.load(out)
    else:
        check_prepared(config.data)
        make_folder(out, probe=True)
        tokenizer = Tokenizer.load(config.data.out)
        model = make_model(config.model).to(device)
        rows = train(config, model, tokenizer, Pools(f"{config.data.out}/train", config.model.vocab_size))
        write_rows(out / "log.jsonl", rows)
        tokenizer.save(out)
        model.save_pretrained(out)  # config.json comes last: where it is, all is
    words, path, key = Words(), out / "answers.json", itemgetter("seed", "memory_tokens", "questions")
    found = json.loads(read_text(path)) if path.exists() else []
    print(f"{'tokens':>8} {'documents':>9} {'seed':>4} {'exact':>6}")
    for seed in map(int, config.seeds.split(",")):
        for row in ask(model.eval(), tokenizer, words, config, seed):
            print(f"{row['memory_tokens']:>8,} {row['documents']:>9,} {seed:>4} "
                  f"{row['exact_match']:>6.3f}", flush=True)
            found = [other for other in found if key(other) != key(row)] + [row]
        write_json(path, found)


if __name__ == "__main__":
    main(script)
