"""Memory Sparse Attention: a transformer whose upper half reads a memory of documents (arXiv 2603.23516).

    memory = model.encode(documents, numbers)              # once per document
    output = model.read(tokens, memory, routing_mask)      # per question: logits and selections

Training and inference are these two calls; `forward` is encode + read + losses. Read this file from here: the
configuration, the transformer's blocks, the model. What `encode` makes and `read` consumes: memory.py.

    B questions   T question tokens   M documents   L tokens of a document, padded   C chunks
    S memory slots   H query heads   G key/value heads   D head size   E width   N predicted tokens
"""
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import Pretrained
from common import UserError
from memory import Cache, Memory, hit_rate, leave_out, rank_documents
from msa_kernel import chunk_offsets, pool_chunks, ranges, sparse_attention
from routing import group_queries
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
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True    # the output matrix is the embedding
    qk_norm: bool = False               # RMSNorm on queries and keys per head, as in Qwen3
    chunk_size: int = 64                # tokens pooled into one memory slot
    top_k: int = 16                     # documents that each memory layer selects
    router_temperature: float = 0.1     # tau of Eq. 5 and of the naming rule
    router_layer_idx: str = ""          # the memory layers, as "18,19,20" or "all"; empty: the upper half
    decouple_router: bool = True        # routers have their own maps; off: attention's queries and keys route
    normalize_routing: bool = True      # routing scores are cosines; off: products, times head_dim ** -0.5
    attend_memory: bool = True          # memory layers read what they select; off: they only route
    prompts: Literal["nanomsa", "msa", "chat"] = "nanomsa"  # how the model is asked; see interleave.py
    max_document_tokens: int = 128      # how long documents were cut for training; sample.py cuts alike

    def __post_init__(self):
        for name in [own.name for own in fields(PaperConfig)]:
            value = getattr(self, name)
            if type(value) in (int, float) and not value > 0:
                allowed = "at least 1" if type(value) is int else "positive"
                raise UserError(f"model.{name} is {value}; it must be {allowed}")
        if self.num_hidden_layers < 2:
            raise UserError("model.num_hidden_layers is 1; it must be at least 2, the upper half reads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"model.num_attention_heads is {self.num_attention_heads}; it must be a multiple "
                            f"of model.num_key_value_heads, {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; RoPE needs an even number")
        if not self.memory_layers:
            raise UserError(f'model.router_layer_idx is {self.router_layer_idx!r}; it must be "all", empty, '
                            f"or increasing numbers below {self.num_hidden_layers} with commas between")

    @property
    def memory_layers(self):
        """Indices of the layers that route and read the memory: the upper half (section 3.2), or as named."""
        layers = list(range(self.num_hidden_layers))
        if self.router_layer_idx == "all":
            return layers
        if not self.router_layer_idx:
            return layers[self.num_hidden_layers // 2:]
        named = [int(i) if i.strip().isdecimal() else -1 for i in self.router_layer_idx.split(",")]
        return named if named == [i for i in layers if i in named] else []  # empty: not what is allowed


# ------------------------------------------------------------------------------------------------------------
# The transformer. Module names are the Hugging Face ones, so that a state dict is a checkpoint.

class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rope_angles(positions, config):
    """cos and sin of RoPE, each (T, 1, D), for positions (T,); the two halves of a head rotate together."""
    steps = torch.arange(0, config.head_dim, 2, device=positions.device)
    angles = torch.outer(positions.float(), config.rope_theta ** (-steps / config.head_dim))
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Apply RoPE to (..., T, heads, D)."""
    cos, sin = (angle.to(x.dtype) for angle in rope)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    def __init__(self, config, is_memory_layer):
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(E, H * D, bias=False)
        self.k_proj = nn.Linear(E, G * D, bias=False)
        self.v_proj = nn.Linear(E, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, E, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        if is_memory_layer and config.decouple_router:  # Sequential: the authors say router_q_proj.0.weight
            self.router_q_proj = nn.Sequential(nn.Linear(E, H * D, bias=False))
            self.router_k_proj = nn.Sequential(nn.Linear(E, G * D, bias=False))
        self.kv_heads, self.head_dim = G, D
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
        """(B, T, E) -> (B, T, G * D); no RoPE: routing is about content, not place. query: attention's, which
        routes in its place where the router has no maps of its own."""
        own = self.heads(self.router_q_proj(h)) if self.decouple_router else query
        scale = 1 if self.decouple_router and self.normalize_routing else self.head_dim ** -0.5
        return group_queries(own, self.kv_heads, self.normalize_routing) * scale

    def routing_key(self, h, keys):
        """(M, L, E) -> (M, L, G, D), not yet pooled or normalised; keys: attention's."""
        return self.heads(self.router_k_proj(h)) if self.decouple_router else keys


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
    def __init__(self, config, is_memory_layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, is_memory_layer)
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
        self.layers = nn.ModuleList(Block(config, i in config.memory_layers) for i in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


@dataclass
class Output:
    logits: torch.Tensor               # (B, T, V) fp32; or (N, V) for the N positions asked for
    selections: list = field(default_factory=list)  # of Selection, one per memory layer


# ------------------------------------------------------------------------------------------------------------

class PaperMSA(Pretrained, nn.Module):
    """The paper's model. A subclass may replace its short methods, from `init_weights` to `memory_bias`."""

    def __init__(self, config):
        super().__init__()
        self.config, self.others = config, {}  # others: entries of config.json that are passed on
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

    def embed(self, tokens, cache):
        """(B, T) ids that continue those of a Cache -> (B, T, E)."""
        return self.model.embed_tokens(tokens)

    def chunk_offsets(self, lengths):
        """Where documents' chunks begin: (M,) lengths -> (M + 1,), ceil(length / chunk_size) for each."""
        return chunk_offsets(lengths, self.config.chunk_size)

    def pool(self, keys, values, routing_keys, lengths):
        """Three (M, L, G, D) -> three (C, G, D): the mean of each chunk's tokens (section 3.2)."""
        return pool_chunks(keys, values, routing_keys, lengths, self.config.chunk_size,
                           normalize=self.config.normalize_routing)

    def memory_bias(self, selection):
        """What is added to the logits of memory slots, (B, S), or None."""
        return None

    def run(self, x, rope, attend, count=None):
        """The first `count` layers, all by default: the one loop, of documents and questions alike.

        attend(i, attention, h, keys, values): for layer i, as Block.forward has it. Returns x (B, T, E) and a
        list of what was found in each layer.
        """
        found = []
        for i, layer in enumerate(self.model.layers[:count]):
            x, of_layer = layer(x, rope, partial(attend, i))
            found.append(of_layer)
        return x, found

    # --------------------------------------------------------------------------------------------------------
    def encode(self, documents, numbers=None, batch_tokens=None, progress=None):
        """Documents -> Memory, each encoded alone (section 3.2): what is stored of one depends on no other.

        documents: a list of int64 tensors (L,), spelled with their numbers; numbers: increasing, 0, 1, ... by
        default. Documents of similar length are padded into batches of at most `batch_tokens` tokens, by
        default 2,048 on a CPU, whose caches they fit, and 16,384 elsewhere; the order given is the order
        returned. progress: called with the number of tokens just encoded. Raises
        UserError for an id outside the vocabulary, ValueError for no or empty documents or wrong numbers.
        """
        numbers = list(range(len(documents))) if numbers is None else list(numbers)
        if not documents or min(map(len, documents)) == 0:
            raise ValueError("encode needs at least one document, and no empty one")
        if len(numbers) != len(documents) or any(a >= b for a, b in zip(numbers, numbers[1:])):
            raise ValueError("encode needs one number per document, increasing")
        batch_tokens = batch_tokens or (2048 if self.device.type == "cpu" else 16384)
        lengths = torch.tensor([len(document) for document in documents])
        offsets, parts, encoded = self.chunk_offsets(lengths), [], []
        order = lengths.argsort(stable=True).tolist()
        while order:
            width = int(lengths[order[-1]])
            batch = order[-max(1, batch_tokens // width):]
            del order[-len(batch):]
            tokens = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                tokens[row, :lengths[i]] = documents[i]
            self.check_ids(tokens)
            parts.append(self.encode_batch(tokens.to(self.device), lengths[batch].to(self.device)))
            encoded += batch
            if progress:
                progress(int(lengths[batch].sum()))
        counts = offsets.diff()
        starts = F.pad(counts[encoded].cumsum(0), (1, 0))[torch.tensor(encoded).argsort()]  # in the parts
        rows = ranges(starts, counts).to(self.device)
        stored = [[torch.cat(xs) for xs in zip(*layers)] for layers in zip(*parts)]  # of layers: keys, ...
        assert all(len(xs[0]) == offsets[-1] for xs in stored), "what was encoded is not what was given"
        keys, values, routing_keys = ([xs[kind][rows] for xs in stored] for kind in range(3))
        return Memory(keys, values, routing_keys, offsets.to(self.device), numbers)

    def encode_batch(self, tokens, lengths):
        """(M, L) padded documents -> per memory layer: chunk keys, values, routing keys, each (C, G, D).

        Attention is causal, so that padding on the right needs no mask. Positions count from 0 (document-wise
        RoPE). Stops after the last memory layer's projections.
        """
        memory_layers = self.config.memory_layers
        rope = rope_angles(torch.arange(tokens.size(1), device=tokens.device), self.config)

        def attend(i, attention, h, keys, values):
            pooled, attended = None, None
            if i in memory_layers:
                pooled = self.pool(keys, values, attention.routing_key(h, keys), lengths)
            if i < memory_layers[-1]:
                attended = sparse_attention(attention.query(h, rope), keys, values)
            return attended, pooled

        _, found = self.run(self.embed(tokens, Cache()), rope, attend, memory_layers[-1] + 1)
        return [pooled for pooled in found if pooled is not None]

    def check_ids(self, tokens):
        """Raises UserError for a token id outside the vocabulary."""
        outside = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if len(outside):
            raise UserError(f"token id {int(outside[0])} is outside the model's vocabulary of "
                            f"{self.config.vocab_size} tokens; the tokenizer is not this model's")

    # --------------------------------------------------------------------------------------------------------
    def read(self, tokens, memory=None, routing_mask=None, cache=None, prefix_length=0, positions=None):
        """Question tokens -> Output: logits, and each memory layer's Selection (section 3.3).

        tokens: (B, T) int64; rows of unequal length are padded on the right. memory: what has `select`, or
        None. routing_mask: (B, T) bool, the tokens that route; none of them: nothing is selected. cache: a
        Cache, filled by this call; when it already holds tokens these continue them, and nothing is routed
        again. prefix_length: so many first tokens are a template's head: at positions 0.., blind to the
        memory. positions: optional (B, T) bool, where logits are wanted; default everywhere. The question
        stands at prefix_length + top_k, however many documents there are (global RoPE, section 3.3).
        """
        config, memory_layers = self.config, self.config.memory_layers
        cache = Cache() if cache is None else cache
        if cache.length == 0:
            cache.prefix_length = prefix_length
        place = cache.length + torch.arange(tokens.size(1), device=tokens.device)
        rope = rope_angles(place + config.top_k * (place >= cache.prefix_length), config)
        routes = cache.length == 0 and memory is not None and len(memory) > 0
        if routes and routing_mask is None:
            raise ValueError("read needs a routing_mask with a memory: which tokens route?")

        def attend(i, attention, h, keys, values):
            query, selection, chosen = attention.query(h, rope), None, ()
            keys, values = cache.extended(i, keys, values)
            if i in memory_layers and routes:
                routing_query = attention.routing_query(h, query)
                of_layer = memory_layers.index(i)
                selection = memory.select(of_layer, routing_query, routing_mask, config.top_k)
            elif i in memory_layers and cache.selections:
                selection = cache.selections[memory_layers.index(i)]
            if selection is not None and config.attend_memory:
                chosen = (selection.keys, selection.values, selection.index, selection.slots,
                          cache.prefix_length, self.memory_bias(selection))
            return sparse_attention(query, keys, values, *chosen), (keys, values, selection)

        x, found = self.run(self.embed(tokens, cache), rope, attend)
        for i, (keys, values, selection) in enumerate(found):
            cache.keys[i], cache.values[i] = keys, values
        cache.selections = [selection for _, _, selection in found if selection is not None]
        cache.length += tokens.size(1)
        x = self.model.norm(x if positions is None else x[positions])
        head = self.model.embed_tokens if config.tie_word_embeddings else self.lm_head
        return Output(F.linear(x, head.weight).float(), cache.selections)

    # --------------------------------------------------------------------------------------------------------
    def forward(self, documents, numbers, batches):
        """encode + read + losses of one pool: its questions share its documents.

        documents, numbers: as for `encode`; batches: dicts of tokens, routing_mask, target_mask (B, T),
        answers (B,), positive and appended (B, M), as `prepare_data.collate` makes them. Returns a dict of
        scalars: `lm` (mean over predicted tokens) and `aux` (Eq. 5, mean over positives, layers and
        questions) carry gradients; the others do not. `naming` and `answer`: the parts of `lm` in samples
        that name documents and in those that answer; `named` and `answered`: the shares of these samples
        whose every token is the likeliest. `recall` (layers + 1,): the share of positives among what each
        layer selected, then among the first top_k of `rank_documents`, documents in the sample left out;
        `top1`: the same of the first alone; `chance`: the recall of a random ranking.
        """
        config, memory = self.config, self.encode(documents, numbers)
        zeros = partial(torch.zeros, device=self.device)
        aux, routed, top1, recall = zeros(()), 0, zeros(()), zeros(len(config.memory_layers) + 1)
        losses, predicted, right, samples = (zeros(2) for _ in range(4))  # of samples that name, that answer
        for batch in batches:
            tokens, target, answers = batch["tokens"], batch["target_mask"], batch["answers"].long()
            output = self.read(tokens, memory, batch["routing_mask"], positions=F.pad(target[:, 1:], (0, 1)))
            row = target.nonzero()[:, 0]                                                    # (N,)
            token_losses = F.cross_entropy(output.logits, tokens[target], reduction="none")
            losses = losses.index_add(0, answers[row], token_losses)
            wrong = zeros(len(tokens)).index_add(0, row, (output.logits.argmax(-1) != tokens[target]).float())
            predicted += torch.bincount(answers[row], minlength=2)
            samples += torch.bincount(answers, minlength=2)
            right += torch.bincount(answers, (wrong == 0).float(), minlength=2)
            asks = batch["positive"].any(1)  # the others have read their documents
            if not asks.any():
                continue
            positive, appended = batch["positive"][asks], batch["appended"][asks]
            selections = [selection.map(lambda x, asks=asks: x[asks]) for selection in output.selections]
            scores = torch.stack([selection.all_scores for selection in selections])        # (layers, B', M)
            aux = aux + contrastive_loss(scores, positive, appended, config.router_temperature).mean(0).sum()
            routed += len(positive)
            first = leave_out(rank_documents(selections)[0], appended)
            found = [selection.documents for selection in selections] + [first[:, :config.top_k]]
            recall += torch.stack([hit_rate(documents, positive).sum() for documents in found])
            top1 += hit_rate(first[:, :1], positive).sum()
        asked = max(routed, 1)
        naming, answer = losses.detach() / predicted.clamp(min=1)
        named, answered = right / samples.clamp(min=1)
        chance = zeros(()) + min(1.0, config.top_k / len(numbers))
        return dict(lm=losses.sum() / predicted.sum().clamp(min=1), aux=aux / asked, naming=naming,
                    answer=answer, named=named, answered=answered, recall=recall / asked, top1=top1 / asked,
                    chance=chance)


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
# without, delete scratch.py and what follows, and call the classes above ModelConfig and MSA.

@dataclass
class ModelConfig(ScratchConfig, PaperConfig):
    """Every option of a model."""


class MSA(Scratch, PaperMSA):
    """The paper's model, and what is switched on of scratch.py."""

    config_class = ModelConfig
