"""Memory Sparse Attention (arXiv 2603.23516), slow and obvious: the oracle of the tests.

Plain loops over documents, chunks, heads and tokens, one vector at a time, in double precision; no
batches, no padding, no masks, no cache. It shares no code with the modules it judges: it takes a state
dict with Hugging Face names and a configuration with plain attributes. Everything is made of torch
operations, so that autograd gives the true gradients.

    reference = Reference(state_dict, config)
    memory = reference.encode(documents)              # [document][layer][chunk] -> Chunk
    reading = reference.read(tokens, memory, routes)  # logits; per memory layer: scores, chosen documents
    losses = reference.losses(documents, samples)     # what training minimises and prints
"""
import math
from collections import namedtuple

import torch

# Each (G, D); the routing key has unit length per head.
Chunk = namedtuple("Chunk", "key value routing_key")
# logits (T, V); per memory layer: a list of M scores, or of None, and the list of the chosen documents.
Reading = namedtuple("Reading", "logits scores chosen")
# Over tokens: a list of ids and two of bools; a bool; two sets of documents.
Sample = namedtuple("Sample", "tokens routes targets answers positive appended")


def linear(weight, x):
    return weight @ x


def rms_norm(weight, x, eps):
    return weight * x / torch.sqrt((x * x).mean() + eps)


def silu(x):
    return x / (1 + torch.exp(-x))


def unit(x):
    return x / torch.sqrt((x * x).sum())


def mean(vectors):
    return sum(vectors) / len(vectors)


def rope(heads, position, theta):
    """Turn the plane of coordinates j and j + D/2 of every head (heads, D) by position * theta^(-2j/D)."""
    D = heads.size(1)
    angle = torch.tensor([position * theta ** (-2 * j / D) for j in range(D // 2)], dtype=heads.dtype)
    a, b = heads[:, :D // 2], heads[:, D // 2:]
    return torch.cat([a * torch.cos(angle) - b * torch.sin(angle),
                      a * torch.sin(angle) + b * torch.cos(angle)], 1)


def chunks_of(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]


def group_of(head, heads, kv_heads):
    """The key/value head that a query head reads: neighbours share one."""
    return head // (heads // kv_heads)


def attend(query, keys, values, biases=()):
    """Softmax attention of all heads of one token: query (H, D); keys and values: lists of (G, D); biases:
    added to the logits of the first keys, nothing to the others. Returns (H, D)."""
    added = torch.tensor([*biases] + [0.0] * (len(keys) - len(biases)), dtype=query.dtype)
    keys, values, attended = torch.stack(keys), torch.stack(values), []
    for h, head in enumerate(query):
        g = group_of(h, len(query), keys.size(1))
        attended.append(torch.softmax(keys[:, g] @ head / math.sqrt(len(head)) + added, 0) @ values[:, g])
    return torch.stack(attended)


def unit_rms(x):
    return x / torch.sqrt((x * x).mean() + torch.finfo(torch.float64).eps)


def spans(tokens, size, last):
    """The chunks of a document: pieces of `size` tokens; the `last` tokens, if any, by themselves."""
    body = len(tokens) - last
    return chunks_of(tokens[:body], size) + ([tokens[body:]] if last else [])


def cosine(a, b):
    return a @ b / torch.sqrt((a @ a) * (b @ b))


def chunk_score(routing_query, routing_key):
    """Mean over query heads of the cosine; routing_query (H, D), routing_key (G, D)."""
    H, G = len(routing_query), len(routing_key)
    return mean([cosine(routing_query[h], routing_key[group_of(h, H, G)]) for h in range(H)])


def document_score(routing_queries, routing_keys):
    """The best chunk score over a question's routing tokens and a document's chunks; None without tokens."""
    if not routing_queries:
        return None
    return torch.stack([chunk_score(query, key) for query in routing_queries for key in routing_keys]).max()


def choose(scores, top_k):
    """The top k documents, best first, ties to the lower number."""
    if None in scores:
        return []
    return sorted(range(len(scores)), key=lambda m: (-scores[m].item(), m))[:top_k]


def rank(scores, chosen):
    """The documents that some layer chose, by the mean over layers of their scores, ties to the lower number.

    A layer that did not choose a document counts the score of the last one that it chose.
    """
    means = {}
    for m in sorted({m for layer in chosen for m in layer}):
        means[m] = mean([of_layer[m if m in own else own[-1]].item()
                         for of_layer, own in zip(scores, chosen)])
    return sorted(means, key=lambda m: (-means[m], m))


def eq5(scores, positive, appended, temperature):
    """Eq. 5 of one question and layer: every positive against the negatives, averaged over the positives."""
    negatives = [m for m in range(len(scores)) if m not in positive and m not in appended]
    below = sum(torch.exp(scores[m] / temperature) for m in negatives)
    return mean([-torch.log(torch.exp(scores[i] / temperature) / (torch.exp(scores[i] / temperature) + below))
                 for i in positive])


def share(found, positive):
    """The share of the positives that is among the found."""
    return len(positive & set(found)) / len(positive)


class Reference:
    def __init__(self, state_dict, config):
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in state_dict.items()}
        # the upper half, the larger one if they are unequal
        upper_half = list(range(config.num_hidden_layers // 2, config.num_hidden_layers))
        self.memory_layers = self.named(config.router_layer_idx) or upper_half
        self.shared = self.named(config.routing_layers)  # in the paper's mode there are none
        self.routing_layers = self.shared or self.memory_layers
        self.reading_layers = self.memory_layers if config.attend_memory else []

    def named(self, text):
        if text == "all":
            return list(range(self.config.num_hidden_layers))
        return [int(layer) for layer in text.split(",")] if text else []

    # ---- a transformer, token by token

    def weight(self, layer, name):
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def norm(self, layer, name, x):
        return rms_norm(self.weight(layer, name), x, self.config.rms_norm_eps)

    def heads(self, layer, name, count, x):
        """A projection of one token's normed input, cut into heads (count, D)."""
        return linear(self.weight(layer, f"self_attn.{name}"), x).reshape(count, self.config.head_dim)

    def placed(self, layer, name, heads, position):
        """QK-norm if there is one, then RoPE, of every head of a query or a key."""
        if self.config.qk_norm:
            heads = torch.stack([self.norm(layer, f"self_attn.{name}_norm", head) for head in heads])
        return rope(heads, position, self.config.rope_theta)

    def query_key_value(self, layer, x, position):
        query = self.heads(layer, "q_proj", self.config.num_attention_heads, x)
        key = self.heads(layer, "k_proj", self.config.num_key_value_heads, x)
        value = self.heads(layer, "v_proj", self.config.num_key_value_heads, x)
        return self.placed(layer, "q", query, position), self.placed(layer, "k", key, position), value

    def embed(self, tokens):
        return [self.weights["model.embed_tokens.weight"][token] for token in tokens]

    def finish(self, layer, x, attended):
        """The rest of a layer for one token: output projection and SwiGLU, each added to the residual."""
        x = x + linear(self.weight(layer, "self_attn.o_proj"), attended.flatten())
        h = self.norm(layer, "post_attention_layernorm", x)
        gate = linear(self.weight(layer, "mlp.gate_proj"), h)
        up = linear(self.weight(layer, "mlp.up_proj"), h)
        return x + linear(self.weight(layer, "mlp.down_proj"), silu(gate) * up)

    def logits(self, x):
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        normed = rms_norm(self.weights["model.norm.weight"], x, self.config.rms_norm_eps)
        return linear(self.weights[head], normed)

    # ---- section 3.2: encode, route

    def encode(self, documents):
        return [self.encode_document(document) for document in documents]

    def encode_document(self, tokens):
        """One document, alone, at positions 0, 1, ...: its list of Chunks of each layer that is stored."""
        xs, stored = self.embed(tokens), {}
        cut = lambda x: spans(x, self.config.chunk_size, self.config.number_chunk)
        pool = lambda x: [mean(span) for span in cut(x)]
        for layer in range(self.config.num_hidden_layers):
            hs = [self.norm(layer, "input_layernorm", x) for x in xs]
            queries, keys, values = zip(*(self.query_key_value(layer, h, t) for t, h in enumerate(hs)))
            chunks = [Chunk(None, None, None) for _ in cut(hs)]
            if layer in self.reading_layers:
                chunks = [Chunk(key, value, None) for key, value in zip(pool(keys), pool(values))]
                if self.config.normalize_values:
                    chunks = [chunk._replace(value=torch.stack([unit_rms(head) for head in chunk.value]))
                              for chunk in chunks]
            if layer in self.routing_layers:
                routing_keys = self.share_document(pool([self.router(layer, "k", h) for h in hs]))
                chunks = [chunk._replace(routing_key=key) for chunk, key in zip(chunks, routing_keys)]
            stored[layer] = chunks
            xs = [self.finish(layer, x, attend(queries[t], keys[:t + 1], values[:t + 1]))
                  for t, x in enumerate(xs)]
        return stored

    def router(self, layer, which, h):
        """A routing query ("q", one per query head) or key ("k") of one normed input."""
        if self.config.routing_dim:
            name = f"model.layers.{layer}.self_attn.router_{which}_proj.0"
            return (linear(self.weights[f"{name}.weight"], h) + self.weights[f"{name}.bias"])[None]
        heads = self.config.num_attention_heads if which == "q" else self.config.num_key_value_heads
        return self.heads(layer, f"router_{which}_proj.0", heads, h)

    def share_document(self, keys):
        """Pooled routing keys of one document at unit length, with a share of what the document is about."""
        keys = [torch.stack([unit(head) for head in key]) for key in keys]
        if not self.config.document_share:
            return keys
        about = self.config.document_share * torch.stack([unit(head) for head in mean(keys)])
        keys = [torch.stack([unit(head) for head in key + about]) for key in keys]
        return [torch.stack([unit(head) for head in key + self.config.document_share * keys[0]])
                for key in keys]

    def route(self, layer, hs, tokens, routes, memory):
        """The documents' scores in one layer; hs: normed inputs of all tokens; routes: 0 where a token does
        not route, else the number of its segment."""
        queries = [h for h, segment in zip(hs, routes) if segment]
        if self.config.query_reduction == "mean":
            queries = []
            for segment in sorted(set(map(int, routes)) - {0}):
                own = [(h, self.weights["model.token_weights"][token])
                       for h, token, its_segment in zip(hs, tokens, routes) if its_segment == segment]
                queries.append(sum(weight * h for h, weight in own) / sum(weight for _, weight in own))
        queries = [self.router(layer, "q", h) for h in queries]
        return [document_score(queries, [chunk.routing_key for chunk in document[layer]])
                for document in memory]

    def find(self, tokens, positions, routes, memory):
        """Shared mode: the documents' mean scores over the routing layers, in a pass that sees no memory."""
        xs, found = self.embed(tokens), []
        for layer in range(max(self.shared) + 1):
            hs = [self.norm(layer, "input_layernorm", x) for x in xs]
            if layer in self.shared:
                found.append(self.route(layer, hs, tokens, routes, memory))
            queries, keys, values = zip(*(self.query_key_value(layer, h, p) for h, p in zip(hs, positions)))
            xs = [self.finish(layer, x, attend(queries[t], keys[:t + 1], values[:t + 1]))
                  for t, x in enumerate(xs)]
        return [None if None in scores else mean(scores) for scores in zip(*found)]

    # ---- section 3.3: read

    def read(self, tokens, memory=None, routes=None, prefix_length=0):
        """One question. tokens: a list; routes: a list, 0 where a token does not route, 1 in the question, 2,
        3, ... in texts that were appended; the first `prefix_length` tokens are a prefix."""
        memory = memory or []
        behind = prefix_length + self.config.top_k
        positions = [*range(prefix_length), *range(behind, behind + len(tokens) - prefix_length)]
        xs, all_scores, all_chosen = self.embed(tokens), [], []
        if self.shared and memory:
            all_scores.append(self.find(tokens, positions, routes, memory))
            all_chosen.append(choose(all_scores[0], self.config.top_k))
        for layer in range(self.config.num_hidden_layers):
            hs = [self.norm(layer, "input_layernorm", x) for x in xs]
            queries, keys, values = zip(*(self.query_key_value(layer, h, p) for h, p in zip(hs, positions)))
            slots, biases = [], []
            if layer in self.memory_layers and memory and not self.shared:
                all_scores.append(self.route(layer, hs, tokens, routes, memory))
                all_chosen.append(choose(all_scores[-1], self.config.top_k))
            if layer in self.reading_layers and memory:
                scores, chosen = all_scores[-1], all_chosen[-1]
                slots = [chunk for m in sorted(chosen) for chunk in memory[m][layer]]
                if self.config.score_bias and chosen:
                    best = max(scores[m].item() for m in chosen)
                    biases = [(scores[m].item() - best) / self.config.router_temperature
                              for m in sorted(chosen) for _ in memory[m][layer]]
            following = []
            for t, x in enumerate(xs):
                seen = slots if t >= prefix_length else []
                all_keys = [chunk.key for chunk in seen] + list(keys[:t + 1])
                all_values = [chunk.value for chunk in seen] + list(values[:t + 1])
                attended = attend(queries[t], all_keys, all_values, biases if seen else [])
                following.append(self.finish(layer, x, attended))
            xs = following
        return Reading(torch.stack([self.logits(x) for x in xs]), all_scores, all_chosen)

    # ---- losses

    def losses(self, documents, samples):
        """The losses and the measures of one pool."""
        memory, k = self.encode(documents), self.config.top_k
        surprise = {True: [], False: []}  # by whether the sample answers
        right = {True: [], False: []}
        aux, recalls, top1 = [], [], []
        for sample in samples:
            reading = self.read(sample.tokens, memory, sample.routes)
            wanted = [(token, reading.logits[t - 1])
                      for t, (token, target) in enumerate(zip(sample.tokens, sample.targets)) if target]
            surprise[sample.answers] += [-torch.log_softmax(logits, 0)[token] for token, logits in wanted]
            said = all(int(logits.argmax()) == token for token, logits in wanted)
            right[sample.answers].append(float(said))
            if not sample.positive:
                continue
            aux += [eq5(scores, sample.positive, sample.appended, self.config.router_temperature)
                    for scores in reading.scores]
            ranking = [m for m in rank(reading.scores, reading.chosen) if m not in sample.appended]
            recalls.append([share(found, sample.positive) for found in [*reading.chosen, ranking[:k]]])
            top1.append(share(ranking[:1], sample.positive))
        average_of = lambda values, none=0.0: mean(values) if values else none
        return dict(lm=mean(surprise[True] + surprise[False]),
                    naming=average_of(surprise[False], math.nan), named=average_of(right[False], math.nan),
                    answer=average_of(surprise[True], math.nan), answered=average_of(right[True], math.nan),
                    aux=average_of(aux), top1=average_of(top1),
                    recall=[mean(layer) for layer in zip(*recalls)],
                    chance=min(1.0, k / len(documents)))
