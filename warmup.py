"""Routers for a backbone that is left untouched: what enters its memory layers is computed once, then only
the routers' maps are made.

    python train.py config/smol.toml --init-from out/smollm2 --router-data SET  # SET: a folder in BEIR's layout, or SQuAD's file

The routing key of a chunk is a linear map of the mean of its tokens' layer inputs: of a document no more than
these means is kept. In a trained language model a few directions of the layer inputs are hundreds of times
longer than the others and the same in every text: through them everything looks alike. So routers start as
one random orthogonal map for queries and keys alike, behind a whitening of each side (the inverse square root
of its second moments): like finds like, and every direction counts. From there Eq. 5 trains them.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError, autocast, write_json
from memory import Cache, hit_rate
from model import MSA, contrastive_loss, rope_angles
from msa_kernel import chunk_means, chunk_offsets, ranges, sparse_attention
from prompts import load_tokenizer
from question_sets import bm25_search, read_set
from routing import group_queries, route, top_documents

RIDGE = 0.05          # added to the second moments, as a share of their mean, before they are inverted
BATCH_TOKENS = 4096   # of texts that run through the backbone at once
STATISTICS = 20000    # rows that the moments are taken from
# Share of the documents that training questions are about, whose questions choose the best step
HELD_OUT = 0.1
BATCH, NEGATIVES = 64, 256  # questions of a step, and documents besides theirs
AT = 16               # recall is of the first so many, or top_k where that is less


@dataclass
class Inputs:
    """What enters the memory layers, for texts one after another: of every token, or of every chunk its
    tokens' mean."""
    rows: list             # of (N, E) bfloat16, one per memory layer
    offsets: torch.Tensor  # (n + 1,) int64: text i has rows offsets[i]:offsets[i + 1]


@torch.no_grad()
def compute_inputs(model, texts, reduce, label, prefix_length=0, shift=0):
    """Inputs of texts (lists of ids), in batches of similar length. reduce: (h (B, L, E), lengths (B,)) ->
    (rows, counts (B,)) to keep."""
    lengths = np.array([len(text) for text in texts])
    order, layers, kept, counts = (
        np.argsort(-lengths, kind="stable").tolist(),
        [[] for _ in model.config.memory_layers],
        [],
        [],
    )
    with tqdm(desc=label, total=int(lengths.sum()), unit=" tokens", unit_scale=True, delay=1) as bar:
        while order:
            batch = order[:max(1, BATCH_TOKENS // len(texts[order[0]]))]
            del order[:len(batch)]
            sizes, tokens = (
                torch.from_numpy(lengths[batch]),
                torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long),
            )
            for row, i in enumerate(batch):
                tokens[row, :lengths[i]] = torch.tensor(texts[i])
            for rows, h in zip(layers, layer_inputs(model, tokens.to(model.device), prefix_length, shift)):
                found, count = reduce(h, sizes.to(h.device))
                rows.append(found.bfloat16().cpu())
            kept += batch
            counts.append(count.cpu())
            bar.update(int(sizes.sum()))
    counts, back = torch.cat(counts), torch.tensor(kept).argsort()
    starts = F.pad(counts.cumsum(0), (1, 0))[:-1]
    rows = ranges(starts[back], counts[back])  # from the order of computing to the order given
    return Inputs([torch.cat(parts)[rows] for parts in layers], F.pad(counts[back].cumsum(0), (1, 0)))


def layer_inputs(model, tokens, prefix_length, shift):
    """The normed inputs (B, L, E) of every memory layer, for right-padded texts (B, L), each read alone; from
    prefix_length on they stand `shift` further."""
    place = torch.arange(tokens.size(1), device=tokens.device)
    rope, last = rope_angles(place + shift * (place >= prefix_length),
                             model.config), model.config.memory_layers[-1]

    def attend(i, attention, h, keys, values):
        return None if i == last else sparse_attention(attention.query(h, rope), keys, values), h

    _, found = model.run(model.embed(tokens, Cache()), rope, attend, last + 1)
    return [found[i] for i in model.config.memory_layers]


def document_inputs(model, documents):
    """Inputs of documents' chunks; documents: lists of ids, spelled with their numbers."""
    cut = (model.config.chunk_size, model.config.number_chunk)
    reduce = lambda h, lengths: (chunk_means(h.float()[:, :, None], lengths, *cut)[:, 0],
                                 chunk_offsets(lengths, *cut).diff())
    return compute_inputs(model, documents, reduce, "documents")


def question_inputs(model, questions, prefix_length=0):
    """Inputs of questions' tokens behind the prefix, which are those that route; questions: lists of ids, the
    prefix included."""
    def reduce(h, lengths):
        place = torch.arange(h.size(1), device=h.device)
        return h[(place >= prefix_length) & (place < lengths[:, None])], lengths - prefix_length
    return compute_inputs(model, questions, reduce, "questions", prefix_length, model.config.top_k)


# ------------------------------------------------------------------------------------------------------------
# Routing by maps of inputs

def document_scores(maps, shape, x, mask, chunks, offsets):
    """(B, M) for question inputs x (B, T, E), of which `mask` (B, T) route, and documents' chunks (C, E).

    maps: (H * D, E) of queries and (G * D, E) of keys; shape: (H, G, D).
    """
    (H, G, D), (query_map, key_map) = shape, maps
    query = group_queries(F.linear(x.float(), query_map).unflatten(-1, (H, D)), G)
    keys = F.normalize(F.linear(chunks.float(), key_map).unflatten(-1, (G, D)), dim=-1)
    return route(query, mask, keys, offsets)


def batch_of(questions, rows):
    """Where the tokens of these questions lie among all, (B, T), and which of them there are (B, T)."""
    counts = questions.offsets.diff()[rows]
    place = torch.arange(int(counts.max()))
    mask = place < counts[:, None]
    return (questions.offsets[rows][:, None] + place).masked_fill(~mask, 0), mask


def whitening(x):
    """(E, E), symmetric: what makes the second moments of rows (N, E) nearly those of white noise."""
    x = x[torch.randperm(len(x))[:STATISTICS]].double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return ((vectors * (values + RIDGE * values.mean()).rsqrt()) @ vectors.T).float()


def whiten(inputs, known=None):
    """Whitens Inputs in place, by the moments of the first `known` texts (of all); returns the (E, E) of each
    layer."""
    known = len(inputs.offsets) - 1 if known is None else known
    found = [whitening(rows[:inputs.offsets[known]]) for rows in inputs.rows]
    for rows, white in zip(inputs.rows, found):
        for part in rows.split(1 << 16):
            part.copy_(part.float() @ white)
    return found


def shape_of(config):
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


def first_maps(config):
    """For each memory layer a random orthogonal map for keys, and the same for the queries of every head."""
    (H, G, D), E = shape_of(config), config.hidden_size
    keys = [torch.nn.init.orthogonal_(torch.empty(G * D, E)) for _ in config.memory_layers]
    return [[key.view(G, 1, D, E).expand(-1, H // G, -1, -1).reshape(H * D, E).clone(), key] for key in keys]


def write_routers(model, maps, whitenings):
    """Give the model routers that do to inputs as they are what `maps` do to whitened ones; whitenings:
    (questions', documents')."""
    for i, pair, whites in zip(model.config.memory_layers, maps, zip(*whitenings)):
        attention = model.model.layers[i].self_attn
        for router, x, white in zip((attention.router_q_proj[0], attention.router_k_proj[0]), pair, whites):
            router.weight.data.copy_(x @ white)


def start_routers(model, documents, questions, dtype=torch.float32):
    """Routers to train with the rest of a model from: whitened orthogonal maps. Both: lists of ids, all of
    whose tokens count."""
    with autocast(model.device, dtype):
        inputs = question_inputs(model, questions), document_inputs(model, documents)
    write_routers(model, first_maps(model.config), tuple(map(whiten, inputs)))


@torch.no_grad()
def recalls(maps, shape, questions, documents, rows, gold, top_k, batch=64):
    """Recall of questions `rows` among the first AT: a list (layers + 1), by every layer's own ranking, then
    as `rank_documents` ranks, by the mean score, a layer counting its k-th score for what it did not select;
    and of the first of that ranking alone."""
    found, first = 0, 0.0
    for part in rows.split(batch):
        at, mask = batch_of(questions, part)
        scores = torch.stack([document_scores(pair, shape, questions.rows[layer][at], mask,
                                              documents.rows[layer], documents.offsets)
                              for layer, pair in enumerate(maps)])  # (layers, B, M)
        least = scores.topk(min(top_k, scores.size(2)), dim=2).values[:, :, -1:]
        ranked = scores.clamp(min=least).mean(0, keepdim=True)
        positive = positives(gold, part, scores.size(2))
        tops = [top_documents(of_layer, min(AT, top_k))[0] for of_layer in torch.cat([scores, ranked])]
        found += torch.stack([hit_rate(documents, positive).sum() for documents in tops])
        first += float(hit_rate(tops[-1][:, :1], positive).sum())
    return [round(r, 4) for r in (found / len(rows)).tolist()], round(first / len(rows), 4)


def positives(gold, rows, documents):
    """(B, M) bool."""
    positive = torch.zeros(len(rows), documents, dtype=torch.bool)
    for row, question in enumerate(rows.tolist()):
        positive[row, list(gold[question])] = True
    return positive


def train_maps(maps, shape, questions, documents, rows, held_out, gold, config, say):
    """Eq. 5 from these maps on; returns the best, by the recall of the held-out questions. Inputs are
    whitened: directions learn alike."""
    rng, M, top_k = torch.Generator().manual_seed(config.seed), len(documents.offsets) - 1, config.model.top_k
    best, best_recall, order = [[x.clone() for x in pair] for pair in maps], -1.0, []
    parameters = [x.requires_grad_() for pair in maps for x in pair]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    with tqdm(desc="training routers", total=config.max_steps, unit="step", delay=1) as bar:
        for step in range(config.max_steps + 1):
            if step % config.evaluate_every == 0 or step == config.max_steps:
                recall, _ = recalls(maps, shape, questions, documents, held_out, gold, top_k)
                say(f"step {step:4d}/{config.max_steps} held-out recall@{min(AT, top_k)} {recall[-1]:.3f}, "
                    "layers "
                    + " ".join(f"{r:.2f}" for r in recall[:-1]))
                together = recall[-1] + np.mean(recall[:-1])
                if together > best_recall:
                    best, best_recall = [[x.detach().clone() for x in pair] for pair in maps], together
            if step == config.max_steps:
                return best
            for group in optimizer.param_groups:
                group["lr"] = (
                    config.learning_rate
                    * min(1, (step + 1) / 20)
                    * (1 + math.cos(math.pi * step / config.max_steps))
                    / 2
                )
            order = order if len(order) >= BATCH else rows[torch.randperm(len(rows), generator=rng)].tolist()
            batch, order = torch.tensor(order[:BATCH]), order[BATCH:]
            asked = torch.tensor([d for question in batch.tolist() for d in gold[question]])
            chosen = torch.cat([asked, torch.randperm(M, generator=rng)[:NEGATIVES]]).unique()
            counts = documents.offsets.diff()[chosen]
            chunks, offsets = ranges(documents.offsets[chosen], counts), F.pad(counts.cumsum(0), (1, 0))
            at, mask = batch_of(questions, batch)
            routing = mask & (torch.rand(mask.shape, generator=rng) >= config.routing_dropout)
            routing = torch.where(routing.any(1, keepdim=True), routing, mask)
            positive = positives(gold, batch, M)[:, chosen]
            for layer, pair in enumerate(maps):
                scores = document_scores(pair, shape, questions.rows[layer][at], routing,
                                         documents.rows[layer][chunks], offsets)
                contrastive_loss(scores, positive, torch.zeros_like(positive),
                                 config.model.router_temperature).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update()


def train_routers(config, folder, changes, device, dtype, say):
    """Write a checkpoint of the backbone `folder` with routers to `config.out`, and what was measured to
    router.json.

    config: a TrainConfig; changes: fields of the model's configuration that are set.
    """
    out, loaded = Path(config.out), MSA.read_config(folder)[0]
    if loaded.prompts != "chat" or not loaded.decouple_router:
        raise UserError(f"--router-data is for backbones; {config.init_from} is a model with a memory "
                        "already: leave it out")
    model = MSA.from_pretrained(folder, device, **changes)
    tokenizer, config = load_tokenizer(folder, model.config), replace(config, model=model.config)
    out.mkdir(parents=True, exist_ok=True)
    say(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, memory layers "
        f"{model.config.memory_layers}")
    measured = warm_up(config, model, tokenizer, dtype, say)
    model.to(model.stored_dtype).save(out)
    tokenizer.save(out)
    write_json(out / "router.json", dict(init_from=config.init_from, router_data=config.router_data,
                                         seed=config.seed, **measured))
    say(f"done: {out}")


def warm_up(config, model, tokenizer, dtype, say):
    """Make and train the routers of a chat backbone on `config.router_data`. Returns what was measured.

    dtype: of the backbone's products; those of the routers are float32 (and autocast would keep the first
    maps that it has rounded).
    """
    texts, questions = read_set(config.router_data, say)
    asked = {split: [row[:2] for row in rows] for split, rows in questions.items()}
    tested = {d for _, found in asked.setdefault("test", []) for d in found}
    asked["train"] = [row for split, rows in asked.items() if split != "test" for row in rows
                      if not tested.intersection(row[1])]
    for split, least in (("train", 10), ("test", 1)):
        if len(asked[split]) < least:
            raise UserError(f"{config.router_data}: {len(asked[split])} questions to {split} on, of "
                            "documents that no test question is "
                            f"about; at least {least} are needed")
    gold = [found for split in ("train", "test") for _, found in asked[split]]
    about = sorted({found[0] for _, found in asked["train"]})
    if len(about) < 2:
        raise UserError(f"{config.router_data}: all training questions are about one document; at least two "
                        "are needed, one held out")
    c, top_k, at, began = model.config, model.config.top_k, min(AT, model.config.top_k), time.time()
    shape = shape_of(c)
    spelled = [tokenizer.question(text)[0] for split in ("train", "test") for text, _ in asked[split]]
    encoded = tokenizer.encode_batch(texts)
    with autocast(model.device, dtype):
        documents = document_inputs(model, [tokenizer.document(n, text) for n, text in enumerate(encoded)])
        questions = question_inputs(model, spelled, len(tokenizer.head))
    tokens, seconds = sum(map(len, encoded)) + int(questions.offsets[-1]), time.time() - began
    say(f"{len(texts):,} documents, {len(gold):,} questions: {tokens:,} tokens at {tokens / seconds:,.0f} "
        "tokens/s")
    rng = np.random.default_rng(config.seed)
    train, test = torch.arange(len(asked["train"])), torch.arange(len(asked["train"]), len(gold))
    kept_back = set(rng.permutation(about)[:max(1, round(HELD_OUT * len(about)))].tolist())
    held = torch.tensor([gold[q][0] in kept_back for q in train.tolist()])
    measured = dict(documents=len(texts), train_questions=int((~held).sum()), held_out=int(held.sum()),
                    test_questions=len(test),
                    tokens=tokens, input_seconds=round(seconds, 1), at=at,
                    chance=round(min(1, at / len(texts)), 4))

    def measure(name, maps):
        recall, first = recalls(maps, shape, questions, documents, test, gold, top_k)
        measured[name] = dict(recall_at_k=recall[-1], top1=first, layers=recall[:-1])
        say(f"{name}: recall@{at} {recall[-1]:.3f}, top-1 {first:.3f}, layers "
            f"{' '.join(f'{r:.2f}' for r in recall[:-1])}", flush=True)

    try:
        search = bm25_search(texts)
        hits = [set(found) & {d for d, _ in search(text, at)} for text, found in asked["test"]]
        measured["bm25"] = round(float(np.mean([len(hit) / len(found) for hit,
                                                (_, found) in zip(hits, asked["test"])])), 4)
    except UserError:  # bm25s is not installed
        measured["bm25"] = None
    say(f"recall@{at} of {len(test):,} test questions: chance {measured['chance']}, BM25 {measured['bm25']}")
    attention = [model.model.layers[i].self_attn for i in c.memory_layers]
    measure("as attention", [[router[0].weight.detach().float().cpu()
                              for router in (a.router_q_proj, a.router_k_proj)] for a in attention])
    torch.manual_seed(config.seed)
    # Test questions are not looked at
    whitenings, maps = (whiten(questions, len(train)), whiten(documents)), first_maps(c)
    measure("whitened", maps)
    began = time.time()
    maps = train_maps(maps, shape, questions, documents, train[~held], train[held], gold, config, say)
    measured["training_seconds"] = round(time.time() - began, 1)
    measure("trained", maps)
    write_routers(model, maps, whitenings)
    return measured
