"""Routers for a backbone that was never taught to route: from its own layer inputs, without a single label.

    make_routers(model, tokenizer, texts)      # once, before a corpus is encoded; its bank keeps them

A few directions of a trained model's layer inputs are hundreds of times longer than the others and the same
in every text: through them everything looks alike. So each side is whitened by its own statistics: the
routing key of a chunk is (S_d + ridge)^-1/2 (h - m_d) for the mean h of its tokens' inputs, a routing query
is (S_d + S_q + ridge)^-1/2 (h - m_q); m and S are means and covariances of documents' chunks and questions'
tokens, each S divided by its trace. Like then finds like, and every direction counts. Rare words have long
whitened inputs: a question's tokens are averaged before the query is brought to unit length, and so weigh by
rarity, as with IDF; besides, tokens are weighted by how few documents have them (`token_weights`). In a
corpus of few words, such as lists of numbers, those of a question that no document has would drown the
others: UNSEEN bounds them. English, where documents' tokens weigh .57 to .65 on average and none more than
1.05, is not touched.

What a memory's best score says is measured on the memory itself, with questions that mean nothing (`chance`).

Documents' statistics come from the corpus at hand, and so do questions': what is asked are pieces of its
sentences behind a question word. A question is whitened by both kinds together, each at the same weight.
"""
import numpy as np
import torch

from cache import Cache
from common import UserError, progress_bar, to_device
from memory import BATCH_TOKENS, padded_batches
from model import rope_angles
from msa_kernel import chunk_means

RIDGE = 0.01             # added to covariances, as a share of their mean variance, before they are inverted
FEW = 0.1                # more ridge for small corpora: this share of width over chunks
UNSEEN = 2               # a token that no document has weighs at most so many times what theirs do on average
SAMPLE_TOKENS = 300_000  # of documents that the statistics are taken from
QUESTIONS = 2000         # that are made from the documents
RANDOM = 100             # questions without a meaning that are asked of a memory to know what chance reaches
DEVIATIONS = 2           # of their scores by which chance reaches beyond the mean
ASKING = ("What is", "What was", "Who is", "Who was", "When did", "When was", "Where is", "Where did",
          "Why did", "How did", "How many", "How much", "Which", "What does", "In what year", "What kind of")


def make_questions(texts, count, rng):
    """`count` strings like questions: three to nine words of a text that follow each other, behind ASKING."""
    texts = [words for words in map(str.split, texts) if words]
    questions = []
    while texts and len(questions) < count:
        words, size = texts[rng.integers(len(texts))], int(rng.integers(3, 10))
        start = int(rng.integers(max(1, len(words) - size + 1)))
        piece = " ".join(words[start:start + size]).strip(".,;:()\"'")
        questions.append(f"{ASKING[rng.integers(len(ASKING))]} {piece}?")
    return questions


class Moments:
    """Mean and second moments of rows that come in batches, in double precision: centring subtracts most."""

    def __init__(self, width):
        self.count, self.sum = 0, torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows):
        """rows: (n, E)."""
        rows = rows.cpu().double()
        self.count, self.sum = self.count + len(rows), self.sum + rows.sum(0)
        self.products += rows.T @ rows

    def mean(self):
        return self.sum / self.count

    def covariance(self, centred):
        """(E, E), divided by its trace; not `centred`: the second moments, likewise."""
        moments = self.products / self.count
        if centred:
            moments = moments - torch.outer(self.mean(), self.mean())
        if moments.trace() <= 0:  # one chunk
            moments = torch.eye(len(moments)).to(moments)
        return moments / moments.trace()


def inverse_root(moments, count):
    """(moments + ridge)^-1/2, (E, E) symmetric. count: rows that they are taken from; few need more ridge."""
    values, vectors = torch.linalg.eigh(moments)
    ridge = max(RIDGE, FEW * len(values) / count)
    scales = (values.clamp(min=0) + ridge * values.mean()).rsqrt()
    return (vectors * scales) @ vectors.T


def layer_inputs(model, tokens, places, cache):
    """The normed inputs (B, L, E) of every routing layer for right-padded texts (B, L), each read alone, or
    behind what a Cache holds, which these fill.

    places (L,): where the tokens stand.
    """
    layers, rope = model.config.router_layers, rope_angles(places, model.config)

    def attend(i, attention, h, keys, values):
        keys, values = cache.extended(i, keys, values)
        attended = None if i == layers[-1] else cache.attend(attention.query(h, rope), keys, values)
        return attended, (h, keys, values)

    _, found = model.run(model.model.embed_tokens(tokens), rope, attend, layers[-1] + 1)
    inputs, keys, values = zip(*found)
    cache.keep(keys, values, [])
    return [inputs[i] for i in layers]


def token_batches(texts, device, bar):
    """Padded tokens (B, L) and their lengths (B,) of texts, lists of ids, in batches of similar length."""
    for batch, tokens in padded_batches([torch.tensor(text) for text in texts], BATCH_TOKENS):
        lengths = torch.tensor([len(texts[i]) for i in batch])
        yield tokens.to(device), lengths.to(device)
        bar.update(int(lengths.sum()))


@torch.no_grad()
def fit_routers(model, documents, questions, head=()):
    """Write routers into a model. documents, questions: lists of ids, spelled; head: the ids with which all
    questions begin besides, which do not count and are read once. With routing_dim the maps are the
    whitenings themselves; else a random map to the heads follows, orthogonal and the same for both sides, and
    nothing is centred: there is no bias."""
    config, device, centred = model.config, model.device, model.config.routing_dim > 0
    if config.routing_dim not in (0, config.hidden_size):
        raise UserError(f"model.routing_dim is {config.routing_dim}; it must be {config.hidden_size}, the "
                        "backbone's width, or 0 for keys shaped as attention's")
    chunks, tokens_of = ([Moments(config.hidden_size) for _ in config.router_layers] for _ in range(2))
    total = sum(map(len, documents)) + sum(map(len, questions))
    with progress_bar(desc="routers", total=total, unit=" tokens", unit_scale=True) as bar:
        for tokens, lengths in token_batches(documents, device, bar):
            places = torch.arange(tokens.size(1), device=device)
            for moments, h in zip(chunks, layer_inputs(model, tokens, places, Cache())):
                moments.add(chunk_means(h[:, :, None].float(), lengths, config.chunk_size)[:, 0])
        begun = Cache()
        if head:
            layer_inputs(model, to_device([head], device), torch.arange(len(head), device=device), begun)
        for tokens, lengths in token_batches(questions, device, bar):
            place = torch.arange(tokens.size(1), device=device)
            behind = place + len(head) + config.top_k  # a memory
            for moments, h in zip(tokens_of, layer_inputs(model, tokens, behind, begun.expand(len(tokens)))):
                moments.add(h[place < lengths[:, None]])
    for i, of_documents, of_questions in zip(config.router_layers, chunks, tokens_of):
        attention = model.model.layers[i].self_attn
        query_map, key_map = attention.router_q_proj[0], attention.router_k_proj[0]
        both = of_documents.covariance(centred) + of_questions.covariance(centred)
        key = inverse_root(of_documents.covariance(centred), of_documents.count)
        query = inverse_root(both, of_documents.count)
        if centred:
            key_map.bias.data.copy_(-(key @ of_documents.mean()))
            query_map.bias.data.copy_(-(query @ of_questions.mean()))
        else:
            heads = torch.nn.init.orthogonal_(torch.empty(key_map.out_features, len(key))).to(key)
            groups = heads.view(attention.kv_heads, 1, -1, len(key))
            repeated = groups.expand(-1, query_map.out_features // key_map.out_features, -1, -1)
            key, query = heads @ key, repeated.reshape(-1, len(key)) @ query
        key_map.weight.data.copy_(key)
        query_map.weight.data.copy_(query)
    if config.query_reduction == "mean":
        seen = torch.zeros(config.vocab_size, device=device)
        for document in documents:
            seen[torch.tensor(document, device=device).unique()] += 1
        rarity = torch.log((len(documents) + 1) / (seen + 0.5)).clamp(min=0) / np.log(len(documents) + 1)
        weights = rarity.sqrt()
        most = UNSEEN * (seen * weights).sum() / seen.sum()
        model.model.token_weights.copy_(weights.where(seen > 0, weights.clamp(max=most)))
    model.trained_routers = True


def make_routers(model, tokenizer, texts):
    """`fit_routers` for a chat backbone and a corpus of texts (strings), of which a sample is taken."""
    rng, documents, total = np.random.default_rng(0), [], 0
    texts = [texts[i] for i in rng.permutation(len(texts))]
    for text in texts:
        documents.append(tokenizer.document(len(documents), tokenizer.encode(text)))
        total += len(documents[-1])
        if total > SAMPLE_TOKENS:
            break
    questions = [tokenizer.encode(text) for text in make_questions(texts, QUESTIONS, rng)]
    fit_routers(model, documents, questions, tokenizer.head)


@torch.no_grad()
def chance(model, tokenizer, memory, seed=0):
    """What the best score of a question reaches in this memory by chance: of RANDOM questions of random
    tokens the mean and DEVIATIONS standard deviations. -inf where that says nothing: the memory has fewer
    documents than a routing key has numbers, or the model is no chat backbone in shared mode. Collective."""
    few = len(memory) < max(model.config.routing_dim, 1)
    if few or not model.config.routing_layers or model.config.prompts != "chat":
        return float("-inf")
    rng, questions, best, head = np.random.default_rng(seed), [], [], len(tokenizer.head)
    ids = sorted(tokenizer.encoding.names)  # there may be gaps
    for _ in range(RANDOM):
        words = tokenizer.decode([ids[i] for i in rng.integers(len(ids), size=rng.integers(4, 14))])
        questions.append(torch.tensor(tokenizer.routed(f"{ASKING[rng.integers(len(ASKING))]} {words}?")[0]))
    for batch, tokens in padded_batches(questions, 512):  # few at a time: each has a score for every chunk
        place, lengths = torch.arange(tokens.size(1)), torch.tensor([len(questions[i]) for i in batch])
        routes = (place >= head) & (place < lengths[:, None])
        selection = model.find(tokens.to(model.device), memory, routes.to(model.device), head)
        best += selection.scores[:, 0].tolist()
    return float(np.mean(best) + DEVIATIONS * np.std(best))
