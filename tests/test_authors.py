"""The authors' semantics (MSA-4B's layout) against a slow oracle in float64 that shares no code with ours:
a token and a head at a time."""
import json
import math

import pytest
import test_prompts
import torch
from safetensors.torch import save_file

import eval as evaluation
import sample
from checkpoint import authors_options
from common import UserError
from model import MSA

V, E, D, LAYERS, CHUNK, HEAD = 61, 24, 8, 4, 5, [7, 8, 9]
DOCUMENTS = [[11, 12, 13], [14, 15, 16, 17, 18, 19, 20], [21], list(range(22, 37)), [40, 41, 42, 43, 44, 45]]
KINDS = {"cosine": dict(decouple_router=True, aux_loss_method="INFONCE"),
         "cosine, other name": dict(decouple_router=True, aux_loss_method="INFONCE_DECOUPLE"),
         "products": dict(decouple_router=True, aux_loss_method="BCE"),
         "asked for": dict(decouple_router=True, aux_loss_method="INFONCE_DECOUPLE", normalize_routing=False),
         "shared": dict(decouple_router=False, aux_loss_method="INFONCE"),
         "shared, products": dict(decouple_router=False, aux_loss_method="BCE")}


def write(folder, heads=6, groups=2, top_k=2, layers="2,3", V=V, **msa):
    """A random checkpoint in the authors' layout; returns (configuration, weights)."""
    msa = {"router_layer_idx": layers, "top_k_docs": top_k, "pooling_kernel_size": CHUNK,
           "head_reduce_method": "mean", "query_reduce_method": "max", "chunk_reduce_method": "max",
           "decouple_pooling_mode": "mean", "infonce_loss_temp": 0.1, **msa}
    config = {"architectures": ["MSAForCausalLM"], "model_type": "msa", "vocab_size": V, "hidden_size": E,
              "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": heads,
              "num_key_value_heads": groups, "head_dim": D, "hidden_act": "silu", "rope_theta": 5e6,
              "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "msa_config": msa}
    generator = torch.Generator().manual_seed(heads)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3
    weights = {"model.embed_tokens.weight": draw(V, E), "model.norm.weight": 1 + draw(E)}
    routing = range(LAYERS) if layers == "all" else [int(i) for i in layers.split(",")]
    for i in range(LAYERS):
        own = {"self_attn.q_proj": (heads * D, E), "self_attn.k_proj": (groups * D, E),
               "self_attn.v_proj": (groups * D, E), "self_attn.o_proj": (E, heads * D),
               "mlp.gate_proj": (32, E), "mlp.up_proj": (32, E), "mlp.down_proj": (E, 32)}
        if i in routing and msa["decouple_router"]:
            own |= {"self_attn.router_q_proj.0": (heads * D, E), "self_attn.router_k_proj.0": (groups * D, E)}
        weights |= {f"model.layers.{i}.{name}.weight": draw(*shape) for name, shape in own.items()}
        weights |= {f"model.layers.{i}.{name}.weight": 1 + draw(n) for name, n in (
            ("input_layernorm", E), ("post_attention_layernorm", E),
            ("self_attn.q_norm", D), ("self_attn.k_norm", D))}
    save_file({**weights, "temperature": torch.tensor(0.07)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return config, {name: tensor.double() for name, tensor in weights.items()}


# ------------------------------------------------------------------------------------------------------------
# The oracle

def norm(x, weight):
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weight


def turn(x, position):
    """RoPE of one head at one position."""
    out = x.clone()
    for j in range(D // 2):
        angle = position * 5e6 ** (-2 * j / D)
        a, b = x[j], x[j + D // 2]
        out[j] = a * math.cos(angle) - b * math.sin(angle)
        out[j + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attend(query, keys, values):
    return ((torch.stack(keys) @ query) / D ** 0.5).softmax(0) @ torch.stack(values)


class Oracle:
    def __init__(self, config, weights):
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.msa, self.w = config["msa_config"], weights
        listed = self.msa["router_layer_idx"]
        self.routing = list(range(LAYERS)) if listed == "all" else [int(i) for i in listed.split(",")]
        self.unit = self.msa.get("normalize_routing", "INFONCE" in self.msa["aux_loss_method"])

    def layer(self, i, name):
        return self.w[f"model.layers.{i}.{name}.weight"]

    def project(self, i, h, name, heads):
        return (self.layer(i, f"self_attn.{name}") @ h).view(heads, D)

    def states(self, i, x, positions):
        """Per token: normed input, queries, keys, values, each by head."""
        found = []
        for token, position in zip(x, positions):
            h = norm(token, self.layer(i, "input_layernorm"))
            q = [turn(norm(head, self.layer(i, "self_attn.q_norm")), position)
                 for head in self.project(i, h, "q_proj", self.heads)]
            k = [turn(norm(head, self.layer(i, "self_attn.k_norm")), position)
                 for head in self.project(i, h, "k_proj", self.groups)]
            found.append((h, q, k, list(self.project(i, h, "v_proj", self.groups))))
        return found

    def finish(self, i, x, heads):
        x = x + self.layer(i, "self_attn.o_proj") @ torch.cat(heads)
        h = norm(x, self.layer(i, "post_attention_layernorm"))
        gate, up = self.layer(i, "mlp.gate_proj") @ h, self.layer(i, "mlp.up_proj") @ h
        return x + self.layer(i, "mlp.down_proj") @ (gate * gate.sigmoid() * up)

    def causal(self, i, x, states, before=()):
        """before: (keys, values) of each group that every token sees."""
        out, R = [], self.heads // self.groups
        for t, token in enumerate(x):
            heads = []
            for head in range(self.heads):
                g = head // R
                keys = [k[g] for k, _ in before] + [s[2][g] for s in states[:t + 1]]
                values = [v[g] for _, v in before] + [s[3][g] for s in states[:t + 1]]
                heads.append(attend(states[t][1][head], keys, values))
            out.append(self.finish(i, token, heads))
        return out

    def encode(self, tokens):
        """Per routing layer: chunks of (keys, values, routing keys)."""
        x, stored = [self.w["model.embed_tokens.weight"][t] for t in tokens], []
        for i in range(LAYERS):
            states = self.states(i, x, range(len(x)))
            if i in self.routing:
                chunks = []
                for start in range(0, len(x), CHUNK):
                    part = states[start:start + CHUNK]
                    mean = lambda at, part=part: [sum(s[at][g] for s in part) / len(part)
                                                  for g in range(self.groups)]
                    keys, values = mean(2), mean(3)
                    routing = keys
                    if self.msa["decouple_router"]:
                        own = [self.project(i, s[0], "router_k_proj.0", self.groups) for s in part]
                        routing = [sum(o[g] for o in own) / len(part) for g in range(self.groups)]
                    chunks.append((keys, values, [r / r.norm() if self.unit else r for r in routing]))
                stored.append(chunks)
            x = self.causal(i, x, states)
        return stored

    def read(self, question, routes, memory, top_k):
        """(logits of the question, scores per routing layer, documents per routing layer)"""
        head = [self.w["model.embed_tokens.weight"][t] for t in HEAD]
        x, scores, chosen = [self.w["model.embed_tokens.weight"][t] for t in question], [], []
        for i in range(LAYERS):
            before_states = self.states(i, head, range(len(HEAD)))
            states = self.states(i, x, range(len(HEAD) + top_k, len(HEAD) + top_k + len(x)))
            before = [(s[2], s[3]) for s in before_states]
            if i in self.routing:
                at = self.routing.index(i)
                asking = [state for state, route in zip(states, routes) if route]
                best = lambda chunks, asking=asking: max(self.score(i, state, chunk[2])
                                                         for state in asking for chunk in chunks)
                scores.append([best(document[at]) for document in memory])
                chosen.append(sorted(range(len(memory)), key=lambda m: (-scores[-1][m], m))[:top_k])
                before = before + [chunk[:2] for m in sorted(chosen[-1]) for chunk in memory[m][at]]
            head, x = self.causal(i, head, before_states), self.causal(i, x, states, before)
        normed = torch.stack([norm(token, self.w["model.norm.weight"]) for token in x])
        return normed @ self.w["model.embed_tokens.weight"].T, scores, chosen

    def score(self, i, state, routing):
        own = state[1]
        if self.msa["decouple_router"]:
            own = self.project(i, state[0], "router_q_proj.0", self.heads)
        R, total = self.heads // self.groups, 0.0
        for head in range(self.heads):
            query = own[head] / own[head].norm() if self.unit else own[head]
            total += float(query @ routing[head // R])
        return total / self.heads * (1 if self.msa["decouple_router"] and self.unit else D ** -0.5)


# ------------------------------------------------------------------------------------------------------------

QUESTIONS = [([50, 51, 52, 53], [1, 1, 0, 0]), ([54, 55], [1, 0]),
             ([56, 57, 58, 3, 4, 5], [0, 1, 1, 1, 1, 0])]


@torch.no_grad()
def compare(folder, documents=DOCUMENTS, **options):
    """Our loader and model against the oracle: everything that is stored, scored, selected and said."""
    config, weights = write(folder, **options)
    oracle = Oracle(config, weights)
    model = MSA.from_pretrained(folder)
    top_k = config["msa_config"]["top_k_docs"]
    assert list(model.config.memory_layers) == oracle.routing and model.config.prompts == "msa"
    memory = model.encode([torch.tensor(d) for d in documents])
    expected = [oracle.encode(d) for d in documents]
    for layer in range(len(oracle.routing)):
        for name, at in (("keys", 0), ("values", 1), ("routing_keys", 2)):
            wanted = torch.stack([torch.stack(chunk[at]) for document in expected
                                  for chunk in document[layer]])
            assert (getattr(memory, name)[layer].double() - wanted).abs().max() < 1e-4, name
    width = max(len(question) for question, _ in QUESTIONS)  # a batch of unequal lengths, padded on the right
    tokens = torch.tensor([HEAD + question + [0] * (width - len(question)) for question, _ in QUESTIONS])
    routes = torch.tensor([[0] * len(HEAD) + mask + [0] * (width - len(mask)) for _, mask in QUESTIONS])
    output = model.read(tokens, memory, routes.bool(), prefix_length=len(HEAD))
    for row, (question, mask) in enumerate(QUESTIONS):
        logits, scores, chosen = oracle.read(question, mask, expected, top_k)
        found = output.logits[row, len(HEAD):len(HEAD) + len(question)].double()
        assert (found - logits).abs().max() < 1e-4
        for layer, selection in enumerate(output.selections):
            assert (selection.all_scores[row].double() - torch.tensor(scores[layer])).abs().max() < 1e-5
            assert [d for d in selection.documents[row].tolist() if d >= 0] == chosen[layer]


@pytest.mark.parametrize("kind", KINDS)
def test_routers(kind, tmp_path):
    """A checkpoint would be routed by other scores than the authors': normalised or not,
    by maps of its own or by attention's."""
    compare(tmp_path, **KINDS[kind])


@pytest.mark.parametrize("heads,groups", [(2, 2), (6, 2), (4, 1)])
def test_group_ratios(heads, groups, tmp_path):
    """Query heads would share another head's keys."""
    compare(tmp_path, heads=heads, groups=groups, **KINDS["cosine"])


@pytest.mark.parametrize("layers", ["all", "1", "0,3", "3"])
def test_router_layers(layers, tmp_path):
    """Memory would be read in other layers than the checkpoint says."""
    compare(tmp_path, layers=layers, **KINDS["cosine"])


@pytest.mark.parametrize("count,top_k", [(1, 2), (2, 9), (5, 9), (5, 5)])
def test_fewer_documents_than_k(count, top_k, tmp_path):
    """The question would stand elsewhere, or something would be read that no document is,
    where there are fewer documents than top_k."""
    compare(tmp_path, DOCUMENTS[:count], top_k=top_k, **KINDS["cosine"])


@torch.no_grad()
def test_prefix(tmp_path):
    """The template's head would see the memory, or the question would not see the head,
    or stand elsewhere than at 3 + top_k."""
    write(tmp_path, **KINDS["cosine"])
    model = MSA.from_pretrained(tmp_path)
    question, mask = torch.tensor([HEAD + [50, 51]]), torch.tensor([[False] * 3 + [True] * 2])
    def read(memory, question=question, **options):
        return model.read(question, memory, mask, prefix_length=3, **options).logits[0]
    one, other = (model.encode([torch.tensor(d) for d in part]) for part in (DOCUMENTS[:2], DOCUMENTS[2:4]))
    same = lambda a, b: torch.allclose(a, b, atol=1e-5)
    assert same(read(one)[:3], read(other)[:3]) and (read(one)[3:] - read(other)[3:]).abs().max() > 1e-3
    assert (read(one)[3:] - read(one, torch.tensor([[7, 8, 10, 50, 51]]))[3:]).abs().max() > 1e-3
    moved = MSA.from_pretrained(tmp_path, top_k=9)
    both = moved.read(question, one, mask, prefix_length=3).logits[0]
    assert (both[3:] - read(one)[3:]).abs().max() > 1e-4 and same(both[:3], read(one)[:3])


def test_pooling_order(tmp_path):
    """Normalising before pooling, or RoPE after it, would not be told apart from the authors' order."""
    config, weights = write(tmp_path, **KINDS["cosine"])
    model = MSA.from_pretrained(tmp_path)
    with torch.no_grad():
        memory = model.encode([torch.tensor(DOCUMENTS[3])])
    keys, routing = memory.keys[0], memory.routing_keys[0]
    assert torch.allclose(routing.norm(dim=-1), torch.ones(routing.shape[:2]), atol=1e-6)
    own = torch.stack([torch.stack(chunk[0]) for chunk in Oracle(config, weights).encode(DOCUMENTS[3])[0]])
    assert torch.allclose(keys.double(), own, atol=1e-4) and (keys.norm(dim=-1) < 0.999 * D ** 0.5).any()


def test_document_order(tmp_path):
    """Chunks would stand in the order of scores, not of documents."""
    write(tmp_path, top_k=3, **KINDS["cosine"])
    model = MSA.from_pretrained(tmp_path)
    with torch.no_grad():
        memory = model.encode([torch.tensor(d) for d in DOCUMENTS])
        output = model.read(torch.tensor([HEAD + [50, 51]]), memory, torch.tensor([[False] * 3 + [True] * 2]),
                            prefix_length=3)
    orders = [selection.documents[0].tolist() for selection in output.selections]
    assert any(order != sorted(order) for order in orders)
    for selection, order in zip(output.selections, orders):
        rows = selection.index[0, :selection.slots[0]].tolist()
        assert rows == sorted(rows) == [c for m in sorted(order)
                                        for c in range(*memory.offsets[m:m + 2].tolist())]


@pytest.mark.parametrize("name,value", [("head_reduce_method", "max"), ("query_reduce_method", "mean"),
                                        ("chunk_reduce_method", "mean"), ("decouple_pooling_mode", "max")])
def test_other_reductions_are_refused(name, value, tmp_path):
    """A checkpoint that reduces otherwise would be routed wrongly without a word."""
    write(tmp_path, **{**KINDS["cosine"], name: value})
    with pytest.raises(UserError, match=f"msa_config.{name} is '{value}'"):
        MSA.from_pretrained(tmp_path)


def test_authors_defaults():
    """What a configuration leaves out would be taken from elsewhere than from the authors' defaults."""
    found = authors_options({"head_reduce_method": "mean"}, "config.json")
    assert found == dict(router_layer_idx="all", top_k=16, chunk_size=64, router_temperature=0.1,
                         decouple_router=False, normalize_routing=True, prompts="msa")


def test_asked_from_the_command_line(run, tmp_path):
    """The authors' checkpoint could not be asked over a bank as our own are; or evaluated."""
    folder = tmp_path / "MSA-4B"
    test_prompts.write(folder)
    write(folder, V=261, **KINDS["cosine"])
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(("The amber birch lies by the sea.", "The grove heron lies inland.",
                              "Nothing lies here.")):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    flags = ("--checkpoint", folder, "--device", "cpu", "--max-rounds", 2, "--max-answer-tokens", 5)
    made = run(sample, *flags, "--memory", tmp_path / "bank", "--documents", tmp_path / "texts", "--trace",
               "Where is amber birch?")
    assert made.code == 0 and "3 added" in made.out and "round: routed to [" in made.out, (made.out, made.err)
    again = run(sample, *flags, "--memory", tmp_path / "bank", "Where is amber birch?")
    whole = run(sample, *flags, "--documents", tmp_path / "texts", "Where is amber birch?")
    assert again.code == whole.code == 0, (again.err, whole.err)
    asked = run(evaluation, *flags, "--lengths", "500", "--questions", 2, "--task", "niah_multikey")
    oracle = run(evaluation, *flags, "--lengths", "500", "--questions", 2, "--task", "niah_multikey",
                 "--baseline", "oracle")
    assert asked.code == oracle.code == 0, (asked.err, oracle.err)
