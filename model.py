"""Memory Sparse Attention: a transformer whose upper half reads a memory of documents (arXiv 2603.23516).

    memory = model.encode(documents, numbers)              # once per document
    output = model.read(tokens, memory, routing_mask)      # per question: logits and selections

Training and inference are the same two calls; `forward` is encode + read + losses.

    B questions   T question tokens   M documents   L tokens of a document (padded)   C chunks   K documents selected
    S memory slots of a question   H query heads   G key/value heads   D head size   E width   N predicted tokens
"""
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import Weights, find, read_config, write_config, write_weights
from common import UserError, merge
from msa_kernel import chunk_offsets, document_slots, group_queries, pool_chunks, quantize, ranges, route, sparse_attention, top_documents


@dataclass
class ModelConfig:
    vocab_size: int = 4096              # tokens; at least the tokenizer's
    hidden_size: int = 128              # E
    intermediate_size: int = 384        # width of the SwiGLU
    num_hidden_layers: int = 4          # the upper half reads the memory
    num_attention_heads: int = 4        # H
    num_key_value_heads: int = 2        # G; divides H
    head_dim: int = 32                  # D; even
    rope_theta: float = 10000.0         # RoPE base
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True    # the output matrix is the embedding
    qk_norm: bool = False               # RMSNorm on queries and keys per head, as in Qwen3
    chunk_size: int = 64                # tokens pooled into one memory slot
    top_k: int = 16                     # documents that each memory layer selects
    router_temperature: float = 0.1     # tau of Eq. 5 and of the naming rule
    router_layer_idx: str = ""          # the memory layers, as "18,19,20" or "all"; empty: the upper half
    decouple_router: bool = True        # routers have maps of their own; else the attention's queries and keys route, after RoPE
    normalize_routing: bool = True      # routing scores are cosines; else products, times head_dim ** -0.5
    attend_memory: bool = True          # memory layers attend to what they find; off where only the router was trained
    prompts: Literal["nanomsa", "msa", "chat"] = "nanomsa"  # what the model was trained to be asked in; see tokenizer.py
    smear: bool = False                 # from scratch: e_t + W e_{t-1} before the first layer (recall within 80 steps, not 350)
    equal_routers: bool = False         # from scratch: routing query and key maps start equal, so that like finds like (with
                                        # full_attention: those of the last layer's attention)
    copy_init: bool = False             # from scratch: memory layers start as copiers of what they attend to; see init_weights
    number_chunk: int = 0               # tokens of a closing number that have a chunk of their own; 5 with number tokens
    normalize_values: bool = False      # pooled values get unit RMS per head: the mean of many is small
    score_bias: bool = False            # memory attention adds (a document's routing score - the best one) / tau to its logits
    full_attention: bool = False        # no memory but the baseline: the documents stand before the question as one text

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) in (int, float) and name != "number_chunk" and not value > 0:
                raise UserError(f"model.{name} is {value}; it must be at least 1" if type(value) is int else
                                f"model.{name} is {value}; it must be positive")
        if self.number_chunk < 0:
            raise UserError(f"model.number_chunk is {self.number_chunk}; it must be at least 0")
        if self.num_hidden_layers < 2:
            raise UserError("model.num_hidden_layers is 1; at least 2 are needed, the upper half reads the memory")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"model.num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                            f"model.num_key_value_heads, {self.num_key_value_heads}")
        if self.equal_routers and not self.decouple_router:
            raise UserError("model.equal_routers is on, but without model.decouple_router there are no routers; leave it out")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; RoPE needs an even number")
        if not self.memory_layers and not self.full_attention:
            raise UserError(f"model.router_layer_idx is {self.router_layer_idx!r}; it must be \"all\", empty, or increasing numbers below "
                            f"{self.num_hidden_layers} with commas between")

    @property
    def memory_layers(self):
        """Indices of the layers that route and read the memory: the upper half (section 3.2), unless `router_layer_idx` says others."""
        layers, asked = range(self.num_hidden_layers), self.router_layer_idx
        if asked in ("", "all"):
            return layers[self.num_hidden_layers if self.full_attention else 0 if asked else self.num_hidden_layers // 2:]
        named = [int(i) if i.strip().isdecimal() else -1 for i in asked.split(",")]
        return named if named == [i for i in layers if i in named] else []  # []: not what is allowed


MSA_FIELDS = ("chunk_size", "top_k", "router_temperature", "router_layer_idx", "decouple_router", "normalize_routing", "attend_memory",
              "prompts", "smear", "equal_routers", "copy_init", "number_chunk", "normalize_values", "score_bias",
              "full_attention")  # under "msa_config" in config.json; those that are not there have their defaults


# ---------------------------------------------------------------------------------------------------------------------
# What encode makes and read consumes

@dataclass
class Selection:
    """What one memory layer's routing chose for B questions. Document indices count in the order of numbers."""
    keys: torch.Tensor                 # (C', G, D) chunk keys; every question reads its own rows of them
    values: torch.Tensor               # (C', G, D)
    index: torch.Tensor                # (B, S) int64, rows of keys and values, in document order
    slots: torch.Tensor                # (B,) how many of the S count
    slot_scores: torch.Tensor          # (B, S) fp32, the score of each slot's document
    documents: torch.Tensor            # (B, K) int64, best first; -1: fewer than K
    scores: torch.Tensor               # (B, K) fp32, descending; -inf where documents is -1
    all_scores: torch.Tensor           # (B, M) fp32, for Eq. 5; None from a bank

    def map(self, pick):
        """A copy of which every tensor of B rows is what `pick` makes of it."""
        rows = {name: pick(getattr(self, name)) for name in ("index", "slots", "slot_scores", "documents", "scores")}
        return Selection(self.keys, self.values, **rows, all_scores=None if self.all_scores is None else pick(self.all_scores))


@dataclass
class Memory:
    """A memory held as tensors, one entry per memory layer; documents in the order of their numbers."""
    keys: list                         # of (C, G, D): attention keys after QK-norm and RoPE, mean of each chunk
    values: list                       # of (C, G, D): attention values, mean of each chunk
    routing_keys: list                 # of (C, G, D): unit length per head; int8 with scales
    offsets: torch.Tensor              # (M + 1,) int64: document m's chunks are offsets[m]:offsets[m + 1]
    numbers: list                      # M document numbers, increasing
    scales: list = None                # of (C,) fp32, with int8 routing keys

    def __len__(self):
        return len(self.numbers)

    def select(self, layer, routing_query, routing_mask, top_k, force=None):
        """Route (section 3.2) and point at what was found; nothing is copied.

        layer: counts memory layers from 0; routing_query: (B, T, G * D) from `group_queries`; routing_mask: (B, T) bool;
        force: optional (B, M) bool, documents that are selected whatever their score (training with it
        hides a router at chance: what one layer then reads tells the next which documents are right).
        """
        scales = None if self.scales is None else self.scales[layer]
        scores = route(routing_query, routing_mask, self.routing_keys[layer], self.offsets, scales)
        ranked = scores.detach() if force is None else scores.detach().masked_fill(force, float("inf"))
        documents, _ = top_documents(ranked, top_k)
        own = scores.detach().gather(1, documents.clamp(min=0)).masked_fill(documents < 0, float("-inf"))
        index, slots, owner = document_slots(documents, self.offsets)
        return Selection(self.keys[layer], self.values[layer], index, slots, own.gather(1, owner), documents, own, scores)

    def subset(self, documents):
        """The memory of these documents only: a copy. documents: increasing indices, else ValueError."""
        documents = torch.as_tensor(documents, dtype=torch.long, device=self.offsets.device)
        if (documents.diff() <= 0).any():
            raise ValueError("the documents of a subset must be increasing indices")
        counts = self.offsets.diff()[documents]
        offsets = F.pad(counts.cumsum(0), (1, 0))
        rows = ranges(self.offsets[documents], counts)
        return Memory(*([x[rows] for x in xs] for xs in (self.keys, self.values, self.routing_keys)), offsets,
                      [self.numbers[d] for d in documents.tolist()], self.scales and [x[rows] for x in self.scales])

    def round_routing_keys(self, dtype):
        """The same memory with routing keys in float32, bfloat16 or int8."""
        if dtype != torch.int8:
            return replace(self, routing_keys=[x.to(dtype) for x in self.routing_keys])
        keys, scales = zip(*map(quantize, self.routing_keys))
        return replace(self, routing_keys=list(keys), scales=list(scales))

    @staticmethod
    def cat(memories):
        """One memory of several whose numbers follow each other."""
        numbers = [n for memory in memories for n in memory.numbers]
        if any(a >= b for a, b in zip(numbers, numbers[1:])):
            raise ValueError("document numbers must be increasing")
        counts = torch.cat([memory.offsets.diff() for memory in memories])
        join = lambda name: [torch.cat(xs) for xs in zip(*(getattr(memory, name) for memory in memories))]
        return Memory(join("keys"), join("values"), join("routing_keys"), F.pad(counts.cumsum(0), (1, 0)), numbers,
                      memories[0].scales and join("scales"))


class Cache:
    """A question's local keys and values and its Selections: a read that is given a filled cache does not route again."""

    def __init__(self):
        self.keys, self.values = {}, {}        # layer -> (B, T', G, D)
        self.selections = []                   # one per memory layer; empty without a memory
        self.length, self.prefix_length = 0, 0
        self.last_embedding = None             # (B, 1, E): the next token's predecessor, for smear

    def extend(self, layer, keys, values):
        """Append this read's keys and values of one layer; returns all of them."""
        if self.length:
            keys, values = torch.cat([self.keys[layer], keys], 1), torch.cat([self.values[layer], values], 1)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values

    def map(self, pick):
        """A copy of which every tensor of B rows is what `pick` makes of it; the original stays as it is."""
        copy = Cache()
        copy.keys, copy.values = ({layer: pick(x) for layer, x in xs.items()} for xs in (self.keys, self.values))
        copy.selections = [selection.map(pick) for selection in self.selections]
        copy.length, copy.prefix_length = self.length, self.prefix_length
        copy.last_embedding = pick(self.last_embedding)
        return copy

    def rows(self, index):
        """A copy that holds these rows, index (B,) int64."""
        return self.map(lambda x: x[index])

    def expand(self, n):
        """One question's cache for n continuations, without a copy of its tensors."""
        return self.map(lambda x: x.expand(n, *x.shape[1:]))


@dataclass
class Output:
    logits: torch.Tensor               # (B, T, V) fp32; or (N, V) for the N positions asked for
    selections: list = field(default_factory=list)  # of Selection, one per memory layer


# ---------------------------------------------------------------------------------------------------------------------
# The transformer. Module names are the Hugging Face ones, so that a state dict is a checkpoint.

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rope_angles(positions, config):
    """cos and sin of RoPE, each (T, 1, D), for positions (T,); the two halves of a head rotate together."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim)
    angles = torch.outer(positions.float(), frequencies)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Apply RoPE to (..., T, heads, D)."""
    cos, sin = (a.to(x.dtype) for a in rope)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    def __init__(self, config, is_memory_layer):
        super().__init__()
        E, H, G, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj, self.k_proj = nn.Linear(E, H * D, bias=False), nn.Linear(E, G * D, bias=False)
        self.v_proj, self.o_proj = nn.Linear(E, G * D, bias=False), nn.Linear(H * D, E, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.heads, self.kv_heads, self.head_dim = H, G, D
        self.decouple_router, self.normalize_routing = config.decouple_router, config.normalize_routing
        if is_memory_layer and config.decouple_router:  # Sequential: the authors' checkpoints say router_q_proj.0.weight
            self.router_q_proj = nn.Sequential(nn.Linear(E, H * D, bias=False))
            self.router_k_proj = nn.Sequential(nn.Linear(E, G * D, bias=False))

    def query(self, x, rope):
        """Queries (..., T, H, D) of a normed input (..., T, E)."""
        return rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))), rope)

    def key_value(self, x, rope):
        """Keys after QK-norm and RoPE, and values, each (..., T, G, D)."""
        keys = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))), rope)
        return keys, self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))

    def routing_query(self, x, query):
        """(B, T, E) -> (B, T, G * D); no RoPE: routing is about content, not place. query: attention's, which routes in its place where
        the router has no maps of its own."""
        own = self.router_q_proj(x).unflatten(-1, (self.heads, self.head_dim)) if self.decouple_router else query
        scale = 1 if self.decouple_router and self.normalize_routing else self.head_dim ** -0.5
        return group_queries(own, self.kv_heads, self.normalize_routing) * scale

    def routing_key(self, x, keys):
        """(M, L, E) -> (M, L, G, D), not yet pooled or normalised; keys: attention's."""
        return self.router_k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)) if self.decouple_router else keys


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, I = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(a, b, bias=False) for a, b in ((E, I), (E, I), (I, E)))

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, is_memory_layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, is_memory_layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def finish(self, x, attended):
        """The rest of the block, once attention (..., T, H, D) is known."""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i in config.memory_layers) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.smear:
            self.smear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


class MSA(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.others = config, {}  # others: entries of config.json that are passed on
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.device.type == "meta":  # there, what is read takes the place of the weights
            self.init_weights()

    def init_weights(self):
        """GPT-2's: normal(0, 0.02), output projections smaller by sqrt(2 * layers). With `copy_init`: normal(0, E ** -0.5), output
        projections zero, but in the upper half v_proj orthogonal and o_proj its transpose."""
        config = self.config
        G, D, E, H = config.num_key_value_heads, config.head_dim, config.hidden_size, config.num_attention_heads
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                shrink = (2 * config.num_hidden_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                std = 0.02 * shrink if not config.copy_init else E ** -0.5 if shrink == 1 else 0
                nn.init.normal_(parameter, std=std)
        for layer in self.model.layers[config.num_hidden_layers // 2:] if config.copy_init else ():
            nn.init.orthogonal_(layer.self_attn.v_proj.weight, gain=0.5)
            values = layer.self_attn.v_proj.weight.data.view(G, 1, D, E)
            layer.self_attn.o_proj.weight.data.view(E, G, -1, D).copy_(values.permute(3, 0, 1, 2).expand(-1, -1, H // G, -1))
        if config.full_attention:  # all embeddings share a part: else keys have none, and with RoPE alone no head can attend by place
            self.model.embed_tokens.weight.data += torch.randn(E) * E ** -0.5
        if config.equal_routers:
            for i in config.memory_layers:
                attention = self.model.layers[i].self_attn
                keys = attention.router_k_proj[0].weight.data.view(G, 1, D, E)
                attention.router_q_proj[0].weight.data.view(G, -1, D, E).copy_(keys.expand(-1, H // G, -1, -1))
            if config.full_attention:  # the baseline gets the same help: its last layer's attention
                attention = self.model.layers[-1].self_attn
                keys = attention.k_proj.weight.data.view(G, 1, D, E)
                attention.q_proj.weight.data.view(G, -1, D, E).copy_(keys.expand(-1, H // G, -1, -1))

    def init_routers(self):
        """Memory layers route as they attend, but without RoPE: routers become the layer's own query and key maps, with the weights of
        QK-norm in them (what it divides by is normalised away)."""
        for i in self.config.memory_layers:
            attention = self.model.layers[i].self_attn
            for router, own, norm in ((attention.router_q_proj, attention.q_proj, attention.q_norm),
                                      (attention.router_k_proj, attention.k_proj, attention.k_norm)):
                scale = norm.weight[:, None] if self.config.qk_norm else 1
                maps = own.weight.detach().unflatten(0, (-1, self.config.head_dim)) * scale
                router[0].weight = nn.Parameter(maps.flatten(0, 1))

    def resize_vocabulary(self, size):
        """Grow the embedding (and the output matrix) to `size` tokens; new ones start at the mean of the others, and a little apart."""
        for module in (self.model.embed_tokens, None if self.config.tie_word_embeddings else self.lm_head):
            if module is not None and size > len(module.weight):
                old = module.weight.detach()
                new = old.mean(0) + 0.1 * old.std(0) * torch.randn(size - len(old), old.size(1), device=old.device, dtype=old.dtype)
                module.weight = nn.Parameter(torch.cat([old, new]))
        self.config = replace(self.config, vocab_size=len(self.model.embed_tokens.weight))

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def embed(self, tokens, before=None):
        """(B, T) ids -> (B, T, E), and the last token's own embedding; `before` (B, 1, E): the embedding in front of them."""
        x = self.model.embed_tokens(tokens)
        last = x[:, -1:]
        if self.config.smear:
            before = torch.zeros_like(last) if before is None else before
            x = x + self.model.smear(torch.cat([before, x[:, :-1]], 1))
        return x, last

    # -----------------------------------------------------------------------------------------------------------------
    def encode(self, documents, numbers=None, batch_tokens=16384, progress=None):
        """Documents -> Memory, each encoded alone (section 3.2): what is stored of one does not depend on the others.

        documents: a list of int64 tensors (L,), spelled with their numbers; numbers: increasing, 0, 1, ... by default.
        Documents of similar length are padded into batches of at most `batch_tokens` tokens; the order given is the order
        returned. progress: called with the number of tokens just encoded. Raises UserError for an id outside the
        vocabulary, ValueError for an empty list or document or for numbers that do not increase.
        """
        numbers = list(range(len(documents))) if numbers is None else list(numbers)
        if not documents or min(map(len, documents)) == 0:
            raise ValueError("encode needs at least one document, and no empty one")
        if len(numbers) != len(documents) or any(a >= b for a, b in zip(numbers, numbers[1:])):
            raise ValueError("encode needs one number per document, increasing")
        lengths = torch.tensor([len(document) for document in documents])
        if int(lengths.min()) < self.config.number_chunk:
            raise ValueError(f"encode found a document shorter than its closing number, {self.config.number_chunk} tokens")
        offsets = chunk_offsets(lengths, self.config.chunk_size, self.config.number_chunk)
        order, parts = lengths.argsort(stable=True).tolist(), []
        while order:
            width, batch = int(lengths[order[-1]]), order[-max(1, batch_tokens // int(lengths[order[-1]])):]
            del order[-len(batch):]
            tokens = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                tokens[row, :lengths[i]] = documents[i]
            self.check_ids(tokens)
            parts.append((batch, self.encode_batch(tokens.to(self.device), lengths[batch].to(self.device))))
            if progress:
                progress(int(lengths[batch].sum()))
        return self.assemble(parts, offsets, numbers)

    def encode_batch(self, tokens, lengths):
        """(M, L) padded documents -> per memory layer: chunk keys, values, routing keys, each (C, G, D).

        Attention is causal, so that padding on the right needs no mask. Stops after the last memory layer's projections.
        """
        config, stored = self.config, []
        for attention, h, keys, values in self.read_alone(tokens):
            k, v, routing = pool_chunks(keys, values, attention.routing_key(h, keys), lengths, config.chunk_size, config.number_chunk,
                                        config.normalize_routing)
            stored.append((k, F.rms_norm(v, v.shape[-1:]) if config.normalize_values else v, routing))
        return stored

    def read_alone(self, tokens, prefix_length=0, shift=0):
        """Yields (attention, normed input (B, L, E), keys, values) of every memory layer for right-padded texts (B, L), each read alone and
        without a memory, at positions from 0 (document-wise RoPE); from prefix_length on they are moved by `shift`."""
        place = torch.arange(tokens.size(1), device=tokens.device)
        rope, (x, _) = rope_angles(place + shift * (place >= prefix_length), self.config), self.embed(tokens)
        for i, layer in enumerate(self.model.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            keys, values = attention.key_value(h, rope)
            if i in self.config.memory_layers:
                yield attention, h, keys, values
            if i == self.config.memory_layers[-1]:
                return
            x = layer.finish(x, sparse_attention(attention.query(h, rope), keys, values))

    def assemble(self, parts, offsets, numbers):
        """Batches of encoded documents, put back into the order given."""
        encoded, counts = torch.tensor([i for batch, _ in parts for i in batch]), offsets.diff()
        starts = F.pad(counts[encoded].cumsum(0), (1, 0))[encoded.argsort()]                # where document m's chunks lie in the parts
        rows, layers = ranges(starts, counts).to(self.device), []
        for name in range(3):
            layers.append([])
            for layer in range(len(self.config.memory_layers)):
                x = torch.cat([stored[layer][name] for _, stored in parts])
                assert len(x) == offsets[-1], "what was encoded is not what was given"
                layers[-1].append(x[rows])
        return Memory(*layers, offsets.to(self.device), numbers)

    def check_ids(self, tokens):
        """Raises UserError for a token id outside the vocabulary."""
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            found = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
            raise UserError(f"token id {found} is outside the model's vocabulary of {self.config.vocab_size} tokens; "
                            "the tokenizer and the model do not belong together")

    # -----------------------------------------------------------------------------------------------------------------
    def read(self, tokens, memory=None, routing_mask=None, cache=None, prefix_length=0, positions=None, force=None):
        """Question tokens -> logits, reading the memory (section 3.3).

        tokens: (B, T) int64; rows of unequal length are padded on the right. memory: what has `select`, or None.
        routing_mask: (B, T) bool, the tokens that route; none of them: nothing is selected.
        cache: a Cache, filled by this call; when it already holds tokens these continue them, and nothing is routed again.
        prefix_length: so many first tokens are a template's head: at positions 0.., blind to the memory.
        positions: optional (B, T) bool, where logits are wanted; default everywhere.
        The question stands at prefix_length + top_k, however many documents there are (global RoPE, section 3.3).
        """
        config = self.config
        cache = Cache() if cache is None else cache
        if cache.length == 0:
            cache.prefix_length = prefix_length
        place = cache.length + torch.arange(tokens.size(1), device=tokens.device)
        rope = rope_angles(place + config.top_k * (place >= cache.prefix_length), config)
        routes = cache.length == 0 and memory is not None and len(memory) > 0
        if routes and routing_mask is None:
            raise ValueError("read needs a routing_mask with a memory: which tokens route?")
        x, last = self.embed(tokens, cache.last_embedding)
        place_of = {layer: i for i, layer in enumerate(config.memory_layers)}
        for i, layer in enumerate(self.model.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            keys, values = cache.extend(i, *attention.key_value(h, rope))
            query, chosen = attention.query(h, rope), ()
            if i in place_of:
                if routes:
                    routing = attention.routing_query(h, query)
                    cache.selections.append(memory.select(place_of[i], routing, routing_mask, config.top_k, force))
                if cache.selections and config.attend_memory:
                    s = cache.selections[place_of[i]]
                    bias = (s.slot_scores - s.scores.amax(1, keepdim=True)) / config.router_temperature if config.score_bias else None
                    chosen = (s.keys, s.values, s.index, s.slots, cache.prefix_length, bias)
            x = layer.finish(x, sparse_attention(query, keys, values, *chosen))
        cache.length, cache.last_embedding = cache.length + tokens.size(1), last
        x = self.model.norm(x if positions is None else x[positions])
        head = self.model.embed_tokens if config.tie_word_embeddings else self.lm_head
        return Output(F.linear(x, head.weight).float(), cache.selections)

    # -----------------------------------------------------------------------------------------------------------------
    def forward(self, documents, numbers, batches):
        """encode + read + losses of one pool: its questions share its documents.

        documents, numbers: as for `encode`; with full_attention R texts of equal length (L,), in which the M numbered documents stand,
        document m in text m * R // M; batches: dicts of tokens, routing_mask, target_mask (B, T), answers (B,), positive and
        appended (B, M), as `prepare_data.collate` makes them. Returns a dict of scalars: `lm` (mean over predicted tokens)
        and `aux` (Eq. 5, mean over positives, layers and questions) carry gradients; the others do not. `naming` and `answer`: the
        parts of `lm` in samples that name a document and in those that answer; `named` and `answered`: the shares of these samples whose
        every token is the likeliest. `recall` (layers + 1,), the share of positives among the first k of each layer's own ranking,
        then of the mean score's, documents in the sample left out; `top1` of the latter; `chance`, what recall a random ranking has.
        """
        full = self.config.full_attention
        memory = None if full else self.encode(documents, numbers)
        context = self.context(torch.stack(documents)) if full else Cache()
        aux, routed, top1 = torch.zeros((), device=self.device), 0, 0.0
        recall = torch.zeros(len(self.config.memory_layers) + 1, device=self.device)
        losses, right, samples = (torch.zeros(2, device=self.device) for _ in range(3))  # of samples that name, that answer
        predicted = torch.zeros(2, device=self.device)
        for batch in batches:
            tokens, target, answers = batch["tokens"], batch["target_mask"], batch["answers"].long()
            cache = context.rows(batch["positive"].float().argmax(1) * len(documents) // len(numbers)) if full else Cache()
            output = self.read(tokens, memory, batch["routing_mask"], cache, positions=F.pad(target[:, 1:], (0, 1)))
            token_losses = F.cross_entropy(output.logits, tokens[target], reduction="none")
            row = target.nonzero()[:, 0]
            losses = losses.index_add(0, answers[row], token_losses)
            wrong = torch.zeros(len(tokens), device=self.device).index_add(0, row, (output.logits.argmax(-1) != tokens[target]).float())
            predicted += torch.bincount(answers[row], minlength=2)
            samples += torch.bincount(answers, minlength=2)
            right += torch.bincount(answers, (wrong == 0).float(), minlength=2)
            asks = batch["positive"].any(1)  # the others have read their documents
            if full or not asks.any():
                continue
            positive, appended = batch["positive"][asks], batch["appended"][asks]
            scores = torch.stack([selection.all_scores[asks] for selection in output.selections])       # (layers, B', M)
            aux = aux + contrastive_loss(scores, positive, appended, self.config.router_temperature).mean(0).sum()
            routed += len(positive)
            ranked = torch.cat([scores, scores.mean(0, keepdim=True)]).detach().masked_fill(appended, float("-inf"))
            recall = recall + hit_rate(ranked, positive, self.config.top_k).sum(1)
            top1 = top1 + hit_rate(ranked[-1:], positive, 1).sum()
        asked = max(routed, 1)
        naming, answer = losses.detach() / predicted.clamp(min=1)
        named, answered = right / samples.clamp(min=1)
        return dict(lm=losses.sum() / predicted.sum().clamp(min=1), naming=naming, answer=answer, named=named, answered=answered,
                    aux=aux / asked, recall=recall / asked, top1=recall.new_tensor(float(top1)) / asked,
                    chance=recall.new_tensor(min(1.0, self.config.top_k / len(numbers))))

    def context(self, texts):
        """The baseline's memory: texts (R, L) of many documents, read with full attention into a Cache that questions continue."""
        tokens, cache = texts.to(self.device), Cache()
        self.check_ids(tokens)
        self.read(tokens, cache=cache, positions=torch.zeros_like(tokens, dtype=torch.bool))
        return cache

    # -----------------------------------------------------------------------------------------------------------------
    def fingerprint(self):
        """16 hexadecimal digits that differ where what `encode` stores might: of the configuration and of up to 1,024 numbers a tensor,
        rounded to bfloat16, so that they are the same whatever type the weights are held in."""
        without = ("top_k", "router_temperature", "score_bias", "attend_memory")
        config = {name: value for name, value in asdict(self.config).items() if name not in without}
        found = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8)
        for name, tensor in sorted(self.state_dict().items()):
            sample = tensor.flatten()[::max(1, tensor.numel() // 1024)].bfloat16().float().cpu().numpy()
            found.update(name.encode() + sample.tobytes())
        return found.hexdigest()

    def save(self, folder):
        """Write config.json and the weights in the type that they have, each file atomically."""
        write_weights(folder, self.state_dict())
        self.save_config(folder)

    def save_config(self, folder):
        """Write config.json alone."""
        values = asdict(self.config)
        msa = {name: values.pop(name) for name in MSA_FIELDS}
        write_config(folder, values, msa, self.others, self.model.embed_tokens.weight.dtype)

    def save_pretrained(self, folder):
        """`save`, for a model whose backbone transformers knows: it loads the folder as a plain Llama or Qwen3 with the same logits, and
        leaves the routers out. Raises UserError for a model that is not one."""
        if self.config.smear:
            raise UserError("model.smear is on: transformers has no such model; train without it, or use save")
        self.save(folder)

    @staticmethod
    def from_pretrained(name, device="cpu", dtype=torch.float32, **changes):
        """The model of a checkpoint folder, or of a repository "owner/name" of the Hugging Face Hub, in evaluation mode.

        Reads what `save` wrote, Llama and Qwen3 backbones, and the authors' MSA-4B. A backbone without routers gets those of
        `init_routers`. Every tensor is read straight into the device and dtype: there is no second copy of the weights.
        changes: fields of ModelConfig that replace the checkpoint's. Raises UserError for what is missing, damaged or not supported. Sets
        `trained_routers`, whether the checkpoint had any, and `stored_dtype`, the type of its embedding.
        """
        folder = find(name)
        config, others = load_config(folder)
        with torch.device("meta"):
            model = MSA(merge(config, changes, "from_pretrained"))
        model.others, weights = others, Weights(folder)
        unused = re.compile(r"rotary_emb\.inv_freq$|(^|\.)temperature$" + "|^lm_head.weight$" * model.config.tie_word_embeddings)
        shapes = {name: shape for name, shape in weights.shapes.items() if not unused.search(name)}
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        untrained = config.prompts == "chat" and model.config.decouple_router and not any("router_" in name for name in shapes)
        check_shapes({name: shape for name, shape in own.items() if not (untrained and "router_" in name)}, shapes,
                     lambda name: weights.files.get(name, weights.main))
        for name in sorted(shapes, key=lambda name: -weights.shapes[name][0]):  # the largest first: least beside it
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(weights.read(name, device, dtype)))
        if untrained:
            model.init_routers()
        model.trained_routers, model.stored_dtype = not untrained, weights.dtypes["model.embed_tokens.weight"]
        return model.eval()

    def load_tensors(self, tensors, path):
        """Fill the weights from `tensors`. Raises UserError that names the first tensor that does not fit."""
        own, found = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (self.state_dict(), tensors))
        check_shapes(own, found, lambda name: path)
        self.load_state_dict(tensors)


def check_shapes(own, found, file_of):
    """Raises UserError that names the first tensor whose shape is not the model's; both: name -> shape."""
    for name in sorted(own.keys() | found.keys()):
        if found.get(name) != own.get(name):
            raise UserError(f"{file_of(name)}: tensor {name} is {found.get(name, 'missing')}; "
                            f"the configuration says {own.get(name, 'absent')}")


def load_config(folder):
    """(ModelConfig, entries that are not the model's concern) of a checkpoint folder. Raises UserError."""
    values, others = read_config(folder)
    return merge(ModelConfig(), values, Path(folder) / "config.json"), others


def contrastive_loss(scores, positive, excluded, temperature):
    """Eq. 5 per question: each positive against all negatives, never against other positives.

    scores: (..., B, M) fp32; positive, excluded: (B, M) bool; excluded documents are neither positive nor negative.
    Every question needs a positive. Returns (..., B): the mean over a question's positives of
    -log(e^{s_i/tau} / (e^{s_i/tau} + sum over negatives e^{s_j/tau})).
    """
    scores = scores / temperature
    negatives = scores.masked_fill(positive | excluded, float("-inf")).logsumexp(-1, keepdim=True)       # (..., B, 1)
    loss = F.softplus(negatives - scores).masked_fill(~positive, 0)                                      # log(1 + e^{n - s})
    return loss.sum(-1) / positive.sum(-1)


def hit_rate(scores, positive, k):
    """The share of each question's positives among its first k: (layers, B, M) scores, (B, M) -> (layers, B)."""
    layers, B, M = scores.shape
    top, _ = top_documents(scores.reshape(layers * B, M), k)
    first = torch.zeros(layers * B, M + 1, dtype=torch.bool, device=scores.device)
    first.scatter_(1, top.masked_fill(top < 0, M), True)  # the last column: places that no document fills
    return (first[:, :M].view(layers, B, M) & positive).sum(-1) / positive.sum(-1)
