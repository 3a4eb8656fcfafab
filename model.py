"""Memory Sparse Attention: a transformer whose upper half reads a memory of documents (arXiv 2603.23516).

    memory = model.encode(documents, numbers)              # once per document
    output = model.read(tokens, memory, routing_mask)      # per question: logits and selections

Training and inference are these two calls. What `encode` makes and `read` consumes: memory.py.

    B questions   T question tokens   M documents   L tokens of a document, padded   C chunks
    S memory slots   H query heads   G key/value heads   D head size   E width   N predicted tokens
"""
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cache import Cache
from checkpoint import Pretrained, check_config, named_layers
from memory import BATCH_TOKENS, Memory, Output, Tally, at_once, follow, padded_batches
from msa_kernel import chunk_offsets, pool_chunks, sparse_attention
from routing import group_queries, share_document
from scratch import Scratch, ScratchConfig


@dataclass
class PaperConfig:
    vocab_size: int = 4096              # tokens; at least the tokenizer's
    hidden_size: int = 128              # E
    intermediate_size: int = 384        # width of the SwiGLU
    num_hidden_layers: int = 4          # the upper half reads the memory
    num_attention_heads: int = 4        # H
    num_key_value_heads: int = 2        # G; divides H
    head_dim: int = 32                  # D; even
    rope_theta: float = 10000.0         # RoPE base
    rms_norm_eps: float = 1e-6          # what RMSNorm adds to the mean square
    tie_word_embeddings: bool = True    # the output matrix is the embedding
    qk_norm: bool = False               # RMSNorm on queries and keys per head, as in Qwen3
    chunk_size: int = 64                # tokens pooled into one memory slot
    top_k: int = 16                     # documents that each memory layer selects
    router_temperature: float = 0.1     # tau of Eq. 5 and of the naming rule
    router_layer_idx: str = ""          # the memory layers, as "18,19,20" or "all"; empty: the upper half
    routing_layers: str = ""            # these route for all, as "0,3"; empty: each memory layer for itself
    query_reduction: Literal["max", "mean"] = "max"  # of routing tokens: the best counts, or their mean
    routing_dim: int = 0                # numbers of a routing key, one vector; 0: shaped as attention's keys
    document_share: float = 0.0         # of the document's mean and first chunk, added to routing keys
    decouple_router: bool = True        # routers have their own maps; off: attention's queries and keys route
    normalize_routing: bool = True      # routing scores are cosines; off: products, times head_dim ** -0.5
    attend_memory: bool = True          # memory layers read what they select; off: they only route
    prompts: Literal["nanomsa", "msa", "chat"] = "nanomsa"  # how the model is asked; see interleave.py
    second_look: int = 0                # found documents that a chat backbone reads alone to rerank them
    max_document_tokens: int = 128      # how long documents were cut for training; sample.py cuts alike

    def __post_init__(self):
        check_config(self)

    @property
    def memory_layers(self):
        """Indices of the layers that read the memory: the upper half (section 3.2), or as named."""
        layers = self.num_hidden_layers
        return named_layers(self.router_layer_idx, layers) or list(range(layers // 2, layers))

    @property
    def reading_layers(self):
        """The layers whose keys and values a memory holds."""
        return self.memory_layers if self.attend_memory else []

    @property
    def router_layers(self):
        """The layers whose routing keys a memory holds."""
        return named_layers(self.routing_layers, self.num_hidden_layers) or self.memory_layers

    @property
    def rankings(self):
        """How many Selections a question has."""
        return 1 if self.routing_layers else len(self.memory_layers)

    @property
    def routing_shape(self):
        """(query heads, key heads, size) of routing."""
        shape = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        return (1, 1, self.routing_dim) if self.routing_dim else shape


# ------------------------------------------------------------------------------------------------------------
# The transformer. Module names are the Hugging Face ones, so that a state dict is a checkpoint.

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rope_angles(positions, config):
    """cos and sin of RoPE, each (..., T, 1, D), for positions (..., T); a head's halves rotate together."""
    steps = torch.arange(0, config.head_dim, 2, device=positions.device)
    angles = positions[..., None].float() * config.rope_theta ** (-steps / config.head_dim)
    angles = torch.cat([angles, angles], -1)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Apply RoPE to (..., T, heads, D)."""
    cos, sin = (angle.to(x.dtype) for angle in rope)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    def __init__(self, config, routes):
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(E, H * D, bias=False)
        self.k_proj = nn.Linear(E, G * D, bias=False)
        self.v_proj = nn.Linear(E, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, E, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.kv_heads, self.head_dim, self.routing_shape = G, D, config.routing_shape
        H, G, D = config.routing_shape
        if routes and config.decouple_router:  # Sequential: the authors say router_q_proj.0.weight
            self.router_q_proj = nn.Sequential(nn.Linear(E, H * D, bias=config.routing_dim > 0))
            self.router_k_proj = nn.Sequential(nn.Linear(E, G * D, bias=config.routing_dim > 0))
        self.decouple_router, self.normalize_routing = config.decouple_router, config.normalize_routing

    def heads(self, x):
        """(..., heads * D) -> (..., heads, D)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def query(self, h, rope):
        """Queries (..., T, H, D) of a normed input (..., T, E)."""
        return rotate(self.q_norm(self.heads(self.q_proj(h))), rope)

    def key_value(self, h, rope):
        """Keys after QK-norm and RoPE, and values, each (..., T, G, D)."""
        return rotate(self.k_norm(self.heads(self.k_proj(h))), rope), self.heads(self.v_proj(h))

    def routing_query(self, h, query):
        """(B, T, E) -> (B, T, W), without RoPE: routing is about content. query: attention's, which routes
        where the router has no maps of its own."""
        _, groups, size = self.routing_shape
        own = self.routed(self.router_q_proj, h, (-1, size)) if self.decouple_router else query
        scale = 1 if self.decouple_router and self.normalize_routing else size ** -0.5
        return group_queries(own, groups, self.normalize_routing) * scale

    def routing_key(self, h, keys):
        """(M, L, E) -> (M, L, groups, size), not yet pooled or normalised; keys: attention's."""
        return self.routed(self.router_k_proj, h, self.routing_shape[1:]) if self.decouple_router else keys

    def routed(self, router, h, shape):  # in the router's precision: centring subtracts most of an input
        return router(h.to(router[0].weight.dtype)).unflatten(-1, shape)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(E, I, bias=False)
        self.up_proj = nn.Linear(E, I, bias=False)
        self.down_proj = nn.Linear(I, E, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, routes):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, routes)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, attend):
        """x (B, T, E) -> (B, T, E), and what else `attend` found.

        attend(attention, h, keys, values) -> (what attention brings (B, T, H, D), found), of the normed input
        h; None in place of the first ends the block there. It changes nothing outside: a block may run twice.
        """
        h = self.input_layernorm(x)
        attended, found = attend(self.self_attn, h, *self.self_attn.key_value(h, rope))
        if attended is not None:
            x = x + self.self_attn.o_proj(attended.flatten(-2))
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x, found


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(Block(config, i in config.router_layers) for i in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.query_reduction == "mean":  # what a token counts in a question's mean
            self.register_buffer("token_weights", torch.ones(config.vocab_size))


# ------------------------------------------------------------------------------------------------------------

class PaperMSA(Pretrained, nn.Module):
    """The paper's model. A subclass may replace its short methods, from `init_weights` to `memory_bias`."""

    config_class = PaperConfig

    def __init__(self, config):
        super().__init__()
        self.config, self.others = config, {}  # others: entries of config.json that are passed on
        self.checkpoint_activations = False  # the backward computes blocks and documents again: less memory
        self.replays = False  # answers are read token by token by CUDA graphs: see batches.py
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if self.device.type != "meta":  # there, what is read takes the place of the weights
            self.init_weights()

    def init_weights(self):
        """GPT-2's: normal(0, 0.02), output projections smaller by sqrt(2 * layers)."""
        shrink = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 * (shrink if is_output else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def chunk_offsets(self, lengths):
        """Where documents' chunks begin: (M,) lengths -> (M + 1,), ceil(length / chunk_size) for each."""
        return chunk_offsets(lengths, self.config.chunk_size)

    def pool(self, keys, values, routing_keys, lengths):
        """(M, L, G, D) each, or None -> (C, G, D): the mean of each chunk's tokens (section 3.2)."""
        return pool_chunks(keys, values, routing_keys, lengths, self.config.chunk_size,
                           normalize=self.config.normalize_routing)

    def memory_bias(self, selection):
        """What is added to the logits of memory slots, (B, S), or None."""
        return None

    def run(self, x, rope, attend, count=None, again=True):
        """The first `count` layers, all by default: the one loop, of documents and questions alike.

        attend(i, attention, h, keys, values): as Block.forward has it. Returns x and what each layer found.
        """
        found, again = [], again and self.checkpoint_activations
        for i, layer in enumerate(self.model.layers[:count]):
            x, of_layer = apply(layer, x, rope, partial(attend, i), again=again)
            found.append(of_layer)
        return x, found

    # --------------------------------------------------------------------------------------------------------
    def encode(self, documents, numbers=None, batch_tokens=None, progress=None):
        """Documents -> Memory, each encoded alone (section 3.2): what is stored of one depends on no other.

        documents: token ids of each, spelled with its number, as a list, an array or a tensor (L,); numbers:
        increasing, 0, 1, ... by default. Documents of similar length share padded batches of `batch_tokens`
        tokens at most (2,048 on a CPU, or to run again, else 16,384); the order given is returned. progress:
        called with tokens just encoded. Raises UserError for an id outside the vocabulary, ValueError for
        wrong arguments.
        """
        numbers = list(range(len(documents))) if numbers is None else list(numbers)
        if not documents or min(map(len, documents)) == 0:
            raise ValueError("encode needs at least one document, and no empty one")
        if len(numbers) != len(documents) or any(a >= b for a, b in zip(numbers, numbers[1:])):
            raise ValueError("encode needs one number per document, increasing")
        if not batch_tokens:
            batch_tokens = BATCH_TOKENS if self.checkpoint_activations else at_once(BATCH_TOKENS, self.device)
        lengths = torch.tensor([len(document) for document in documents])
        offsets, parts, encoded = self.chunk_offsets(lengths), [], []
        for batch, tokens in padded_batches(documents, batch_tokens):
            self.check_ids(tokens)
            inputs = tokens.to(self.device), lengths[batch].to(self.device)
            parts.append(apply(self.encode_batch, *inputs, again=self.checkpoint_activations))
            encoded += batch
            if progress:
                progress(int(lengths[batch].sum()))
        return Memory.in_order(parts, encoded, offsets, numbers, self.device)

    def encode_batch(self, tokens, lengths):
        """(M, L) padded documents -> keys and values of reading layers, routing keys of routing layers, all
        (C, G, D). Causal: padding on the right needs no mask. Positions count from 0 (document-wise RoPE)."""
        reading, routing = self.config.reading_layers, self.config.router_layers
        rope = rope_angles(torch.arange(tokens.size(1), device=tokens.device), self.config)
        last, long = max(reading + routing), tokens.size(1) > BATCH_TOKENS  # long: its blocks run again, too

        def attend(i, attention, h, keys, values):
            kept = (keys, values) if i in reading else (None, None)
            routing_keys = attention.routing_key(h, keys) if i in routing else None
            attended = sparse_attention(attention.query(h, rope), keys, values) if i < last else None
            return attended, self.pool(*kept, routing_keys, lengths)

        _, found = self.run(self.model.embed_tokens(tokens), rope, attend, last + 1, long)
        keys, values, routing_keys = ([x for x in xs if x is not None] for xs in zip(*found))
        if self.config.document_share:
            offsets = self.chunk_offsets(lengths)
            routing_keys = [share_document(x, offsets, self.config.document_share) for x in routing_keys]
        return keys, values, routing_keys

    def routing_weights(self, tokens, mask):
        """What each segment's mean weighs its tokens by, (B, S, T); None where every token routes by itself.
        mask: (B, T) as for `read`."""
        if self.config.query_reduction == "max":
            return None
        segments = torch.arange(1, max(int(mask.max()), 1) + 1, device=tokens.device)[:, None]      # (S, 1)
        return (mask[:, None] == segments) * self.model.token_weights[tokens][:, None]

    def routing_inputs(self, h, mask, weights):
        """What becomes routing queries, and which of them route (bool): h (B, T, E) itself, or the weighted
        mean of each segment (B, S, E). mask: (B, T) as for `read`; weights: of `routing_weights`."""
        if weights is None:
            return h, mask != 0
        total, dtype = weights.sum(2, keepdim=True), torch.promote_types(h.dtype, weights.dtype)
        return (weights / total.clamp(min=1e-9)).to(dtype) @ h.to(dtype), total[..., 0] > 0

    def find(self, tokens, memory, routing_mask, prefix_length=0, first=None):
        """The Selection that all reading layers share: one pass of the question through the routing layers
        alone, which see no memory. Arguments as for `read`; first: of a first round, which routes too."""
        config, layers = self.config, self.config.router_layers
        place = torch.arange(tokens.size(1), device=tokens.device)
        rope = rope_angles(place + config.top_k * (place >= prefix_length), config)
        weights = self.routing_weights(tokens, routing_mask)  # once: on a GPU it waits

        def attend(i, attention, h, keys, values):
            query, routed = attention.query(h, rope), None
            if i in layers:
                inputs, mask = self.routing_inputs(h, routing_mask, weights)
                routed = attention.routing_query(inputs, query), mask
            return sparse_attention(query, keys, values) if i < layers[-1] else None, routed

        _, found = self.run(self.model.embed_tokens(tokens), rope, attend, layers[-1] + 1)
        queries = {place: found[i][0] for place, i in enumerate(layers)}
        queries, mask = follow(queries, found[-1][1], memory, first) if first else (queries, found[-1][1])
        return memory.select(queries, mask, config.top_k, range(len(config.reading_layers)))

    def read(self, tokens, memory=None, routing_mask=None, cache=None, prefix_length=0, positions=None,
             vocabulary=None):
        """Question tokens -> Output: logits, and the Selections (section 3.3).

        tokens: (B, T) int64; rows of unequal length are padded on the right. memory: what has `select`, or
        None. routing_mask: (B, T), the tokens that route, bool or int64: 0 none, 1 the question, 2, 3, ...
        texts appended later, which are means of their own. cache: a Cache, filled by this call; when it holds
        tokens these continue them, and nothing is routed again. prefix_length: so many first tokens are a
        template's head: at positions 0.., blind to the memory; the question stands at prefix_length + top_k.
        positions: where logits are wanted, (B, T) bool, (N,) rows and columns, or slice(0), nowhere;
        vocabulary: of which ids.
        """
        config, cache = self.config, Cache() if cache is None else cache
        memory_layers, shared = config.memory_layers, config.routing_layers != ""
        past, place = copy(cache), cache.places(tokens)
        cache.prefix_length = cache.prefix_length if cache.length else prefix_length
        rope = rope_angles(place + config.top_k * (place >= cache.prefix_length), config)
        routes = cache.length == 0 and memory is not None and len(memory) > 0
        if routes and routing_mask is None:
            raise ValueError("read needs a routing_mask with a memory: which tokens route?")
        if routes and shared:
            cache.selections = [self.find(tokens, memory, routing_mask, prefix_length)]
        weights = self.routing_weights(tokens, routing_mask) if routes and not shared else None

        def attend(i, attention, h, keys, values):
            query, selection, chosen = attention.query(h, rope), None, ()
            keys, values = past.extended(i, keys, values)  # a block may run again, when the cache has grown
            nth = memory_layers.index(i) if i in memory_layers else None
            if nth is not None and routes and not shared:
                inputs, mask = self.routing_inputs(h, routing_mask, weights)
                queries = {nth: attention.routing_query(inputs, query)}
                selection = memory.select(queries, mask, config.top_k, [nth] * config.attend_memory)
            elif nth is not None and cache.selections:
                selection = cache.selections[0 if shared else nth]
            if selection is not None and config.attend_memory:
                at = nth if shared else 0
                chosen = (selection.keys[at], selection.values[at], selection.index, selection.slots,
                          cache.prefix_length, self.memory_bias(selection))
            return past.attend(query, keys, values, *chosen), (keys, values, selection)

        x, found = self.run(self.model.embed_tokens(tokens), rope, attend)
        cache.keep(*zip(*found))
        x = self.model.norm(x if positions is None else x[positions])
        head = self.model.embed_tokens if config.tie_word_embeddings else self.lm_head
        weight = head.weight if vocabulary is None else head.weight[vocabulary]
        return Output(F.linear(x, weight).float(), cache.selections)

    def forward(self, documents, numbers, batches):
        """encode + read + losses of one pool: its questions share its documents, which may be none.

        documents, numbers: as for `encode`; batches: dicts of tokens, routing_mask, target_mask (B, T),
        answers (B,), positive and appended (B, M), perhaps `shared` (1, P), which all rows begin with: see
        `pools.collate`. Returns scalars: `lm` (mean over predicted tokens) and `aux` (Eq. 5, mean over
        positives, layers and questions) carry gradients; those of `memory.Tally` and `chance` do not.
        """
        config, memory = self.config, self.encode(documents, numbers) if documents else None
        lm = aux = torch.zeros((), device=self.device)
        tally = Tally(config.rankings, self.device)
        for batch in batches:
            tokens, cache = batch["tokens"], Cache()
            row, column = batch["target_mask"].nonzero().unbind(1)  # (N,): places of predicted tokens
            if "shared" in batch:
                self.read(batch["shared"], cache=cache, positions=slice(0))
            output = self.read(tokens, memory, batch["routing_mask"], cache.expand(len(tokens)),
                               positions=(row, column - 1))
            token_losses = F.cross_entropy(output.logits, tokens[row, column], reduction="none")    # (N,)
            lm = lm + token_losses.sum()
            tally.add_tokens(batch, (row, column), output.logits, token_losses)
            asks = batch["positive"].any(1).nonzero()[:, 0]  # the others have read their documents
            if not len(asks):
                continue
            positive, appended = batch["positive"][asks], batch["appended"][asks]
            selections = [selection.map(lambda x: x[asks]) for selection in output.selections]
            scores = torch.stack([selection.all_scores for selection in selections])        # (layers, B', M)
            aux = aux + contrastive_loss(scores, positive, appended, config.router_temperature).mean(0).sum()
            tally.add_rankings(selections, positive, appended, config.top_k)
        return dict(lm=lm / tally.predicted.sum().clamp(min=1), aux=aux / max(tally.asked, 1),
                    chance=torch.full_like(lm, min(1, config.top_k / max(len(numbers), 1))), **tally.means())


def apply(function, *inputs, again):
    """function(*inputs). again: activation checkpointing; the backward recomputes what is in between."""
    if again:
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


def compile_blocks(model):
    """Compile what the blocks compute of tokens alone: MLPs, norms, projections with RoPE. Attention is left
    out: it has its own kernels, and shapes that the data decide. On a GPU answers are CUDA graphs, too."""
    model.replays = model.device.type == "cuda"
    torch._dynamo.config.recompile_limit = 64  # kinds of layers, with and without gradients, of one row
    for layer in model.model.layers:
        attention = layer.self_attn
        for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            module.compile(dynamic=True)
        attention.query, attention.key_value = (torch.compile(method, dynamic=True)
                                                for method in (attention.query, attention.key_value))


def contrastive_loss(scores, positive, excluded, temperature):
    """Eq. 5 per question: each positive against all negatives, never against other positives.

    scores: (..., B, M) fp32; positive, excluded: (B, M) bool; excluded documents are neither positive nor
    negative. Every question needs a positive. Returns (..., B): the mean over a question's positives of
    -log(e^{s_i/tau} / (e^{s_i/tau} + sum over negatives e^{s_j/tau})).
    """
    scores = scores / temperature
    negatives = scores.masked_fill(positive | excluded, float("-inf")).logsumexp(-1, keepdim=True)
    loss = F.softplus(negatives - scores).masked_fill(~positive, 0)  # log(1 + e^{n - s})
    return loss.sum(-1) / positive.sum(-1)


# ------------------------------------------------------------------------------------------------------------
# The paper's model with what helps tiny ones that are trained from scratch, all of it off by default. To do
# without, delete scratch.py, baseline.py and what follows, call the classes above ModelConfig and MSA, drop
# both files from pyproject.toml, and in code and configurations what is still found by
# `git grep -nE "number_chunk|normalize_values|score_bias|copy_init|equal_routers"`.

@dataclass
class ModelConfig(ScratchConfig, PaperConfig):
    """Every option of a model."""


class MSA(Scratch, PaperMSA):
    """The paper's model, and what is switched on of scratch.py."""

    config_class = ModelConfig
