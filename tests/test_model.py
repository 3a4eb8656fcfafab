"""encode, read, forward, losses and checkpoints against tests/reference.py
and against values worked out by hand."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import Reference, Sample

import msa_kernel
from cache import Cache
from common import UserError
from memory import Memory, Selection, leave_out, rank_documents, recall
from model import MSA, ModelConfig, contrastive_loss

INF = float("inf")
BASE = ModelConfig(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                   num_attention_heads=4, num_key_value_heads=2, head_dim=6, chunk_size=4, top_k=2)
SHAPES = {
    "base": {},
    "qk_norm": dict(qk_norm=True),
    "untied": dict(tie_word_embeddings=False),
    "named layers": dict(num_hidden_layers=4, router_layer_idx="0,2"),
    "all layers": dict(router_layer_idx="all"),
    "one head": dict(num_attention_heads=1, num_key_value_heads=1, head_dim=10),
    "ratio 1": dict(num_attention_heads=3, num_key_value_heads=3),
    "ratio 3": dict(num_attention_heads=6, num_key_value_heads=2),
    "ratio 4": dict(num_attention_heads=4, num_key_value_heads=1, head_dim=2),
    "chunk of 1": dict(chunk_size=1, top_k=1),
    "one long chunk": dict(chunk_size=64, num_hidden_layers=2),
    "more than there are": dict(top_k=9, rope_theta=100.0),
    "number chunk": dict(number_chunk=1),
    "values of unit size": dict(normalize_values=True),
    "score bias": dict(score_bias=True, router_temperature=0.3),
    "reading": dict(number_chunk=1, normalize_values=True, score_bias=True, qk_norm=True, chunk_size=2,
                    copy_init=True),
    "all at once": dict(qk_norm=True, tie_word_embeddings=False, num_attention_heads=6,
                        num_hidden_layers=5, chunk_size=3, top_k=3, router_temperature=0.5,
                        rms_norm_eps=1e-2),
    "shared": dict(routing_layers="0,1", num_hidden_layers=4, routing_dim=5, query_reduction="mean",
                   document_share=0.7),
    "shared, above": dict(routing_layers="0,2,3", num_hidden_layers=4, router_layer_idx="1,2",
                          num_attention_heads=6, number_chunk=1, score_bias=True, chunk_size=3),
    "shared, one layer": dict(routing_layers="1", num_attention_heads=4, num_key_value_heads=1, qk_norm=True,
                              query_reduction="mean", tie_word_embeddings=False, chunk_size=2),
    "shared, no reading": dict(routing_layers="0,1", num_hidden_layers=4, attend_memory=False, routing_dim=7,
                               document_share=1.5, chunk_size=2),
    "routing alone": dict(attend_memory=False, query_reduction="mean", document_share=0.2, chunk_size=2),
}
LENGTHS = (5, 1, 4, 3, 9, 8)  # documents; around the chunk size of 4
NUMBERS = [2, 3, 5, 8, 13, 21]


def make(precision=torch.float64, **changes):
    """A model whose weights are large enough for every part of it to matter."""
    torch.manual_seed(1)
    model = MSA(replace(BASE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.size(1) ** -0.5)
            else:
                parameter.normal_(1, 0.3)
        for buffer in model.buffers():  # token_weights
            buffer.uniform_(0.2, 2)
    return model.to(precision)


def tokens(*lengths, seed=0, vocabulary=BASE.vocab_size):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]


def stack(rows, dtype=torch.long):
    """Lists or tensors of unequal length, padded on the right with zeros (B, T)."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows],
                                           batch_first=True)


def oracle(model):
    return Reference(model.state_dict(), model.config)


def close(actual, expected, tolerance=2e-5, what=""):
    """Within a tolerance relative to the largest number expected.
    Routing, RoPE angles and logits are single precision throughout."""
    actual, expected = actual.detach().double(), torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.isfinite().all(), f"{what}: not finite"
    worst, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert worst <= tolerance * max(scale, 1e-6), f"{what}: off by {worst:.2e}, numbers up to {scale:.2e}"


def parts_of(memory):
    """Every tensor of a memory, by name."""
    return {f"{name} of memory layer {i}": x for name in ("keys", "values", "routing_keys")
            for i, x in enumerate(getattr(memory, name))}


def same_memory(actual, expected, tolerance=0.0):
    assert actual.numbers == expected.numbers
    assert actual.offsets.tolist() == expected.offsets.tolist()
    for (name, a), b in zip(parts_of(actual).items(), parts_of(expected).values()):
        assert a.shape == b.shape and len(a) == actual.offsets[-1], name
        assert len(a) == 0 or (a - b).abs().max() <= tolerance, name


# ------------------------------------------------------------------------------------------------------------
# Encode

@pytest.mark.parametrize("shape", SHAPES)
def test_encode(shape):
    """What is stored of a document would be wrong: order of RoPE, pooling and normalisation, positions,
    chunk boundaries, order."""
    model, documents = make(**SHAPES[shape]), tokens(*LENGTHS)
    memory = model.encode(documents, NUMBERS)
    expected = oracle(model).encode([d.tolist() for d in documents])
    assert memory.numbers == NUMBERS and len(memory) == len(documents)
    last = model.config.number_chunk
    size = model.config.chunk_size
    assert memory.offsets.diff().tolist() == [math.ceil((n - last) / size) + (last > 0) for n in LENGTHS]
    judge = oracle(model)
    assert len(memory.keys) == len(memory.values) == len(judge.reading_layers)
    assert len(memory.routing_keys) == len(judge.routing_layers)
    chunks_of = lambda layer: [chunk for document in expected for chunk in document[layer]]
    for layer, keys, values in zip(judge.reading_layers, memory.keys, memory.values):
        close(keys, torch.stack([c.key for c in chunks_of(layer)]), what="keys")
        close(values, torch.stack([c.value for c in chunks_of(layer)]), what="values")
    for layer, routing_keys in zip(judge.routing_layers, memory.routing_keys):
        close(routing_keys, torch.stack([c.routing_key for c in chunks_of(layer)]), what="routing keys")


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_encode_one_document(length):
    """A memory of a single document, of one token even, would be spelled differently."""
    model, documents = make(), tokens(length)
    expected = oracle(model).encode([documents[0].tolist()])[0]
    memory = model.encode(documents)
    assert memory.numbers == [0] and memory.offsets.tolist() == [0, math.ceil(length / 4)]
    for layer, chunks in enumerate([expected[1], expected[2]]):
        close(memory.values[layer], torch.stack([c.value for c in chunks]))
        close(memory.routing_keys[layer], torch.stack([c.routing_key for c in chunks]))


@pytest.mark.parametrize("batch_tokens", [1, 7, 20, 16384])
def test_encode_documents_are_independent(batch_tokens):
    """What is stored of a document would depend on its neighbours, on their order or on the batching."""
    model, documents = make(torch.float32, chunk_size=16), tokens(1, 15, 16, 17, 33, 64, 2, 17, 1, seed=3)
    alone = [model.encode([document]) for document in documents]
    counted = []
    # The last order has some documents only, and one of them three times.
    for order in ([*range(9)], [8, 3, 5, 0, 7, 1, 6, 2, 4], [4, 4, 1, 4]):
        memory = model.encode([documents[i] for i in order], batch_tokens=batch_tokens,
                              progress=counted.append)
        assert len(memory) == len(order)
        for place, i in enumerate(order):
            found = memory.subset([place])
            assert found.numbers == [place]
            assert found.offsets.tolist() == [0, math.ceil(len(documents[i]) / 16)]
            for a, b in zip(parts_of(found).values(), parts_of(alone[i]).values()):
                assert (a - b).abs().max() <= 1e-5
    assert sum(counted) == 2 * sum(map(len, documents)) + 3 * 33 + 15


@pytest.mark.parametrize("chosen", [[0], [5], [0, 1, 2], [3, 4, 5], [1, 4], [0, 2, 3, 5], [*range(6)], []])
def test_memory_subset(chosen):
    """A part of a memory would not be the memory of these documents."""
    model, documents = make(), tokens(*LENGTHS)
    found = model.encode(documents, NUMBERS).subset(chosen)
    assert len(found) == len(chosen)
    if chosen:
        same_memory(found, model.encode([documents[m] for m in chosen], [NUMBERS[m] for m in chosen]), 1e-6)


@pytest.mark.parametrize("cuts", [(), (1,), (3,), (5,), (1, 2), (2, 3, 5)])
def test_memory_cat(cuts):
    """Memories put one behind another would not be the memory of all their documents."""
    model, documents = make(), tokens(*LENGTHS)
    ends = [*cuts, 6]
    parts = [model.encode(documents[a:b], NUMBERS[a:b]) for a, b in zip([0, *ends], ends)]
    same_memory(Memory.cat(parts), model.encode(documents, NUMBERS), 1e-6)


@pytest.mark.parametrize("numbers", [[1, 1], [5, 2], [1, 2, 3], [1]])
def test_numbers_must_increase(numbers):
    """Documents out of the order of their numbers, or without one, would be accepted;
    ties would go to the wrong document."""
    with pytest.raises(ValueError, match="increasing"):
        make().encode(tokens(3, 4), numbers)
    first, second = (make().encode(tokens(3), [number]) for number in (7, 3))
    for wrong in ([first, second], [first, first]):
        with pytest.raises(ValueError, match="increasing"):
            Memory.cat(wrong)


@pytest.mark.parametrize("bad", [29, 1000, -1])
def test_encode_id_outside_the_vocabulary(bad):
    """Another tokenizer's ids would end in a crash far from the cause, or be read as other tokens."""
    with pytest.raises(UserError, match=rf"id {bad} .* 29 tokens"):
        make().encode([torch.tensor([0, 28]), torch.tensor([3, bad, 1])])


@pytest.mark.parametrize("lengths", [(), (0,), (2, 0), (0, 2)])
def test_encode_nothing(lengths):
    """An empty document would get a number without anything stored under it."""
    with pytest.raises(ValueError, match="empty"):
        make().encode(tokens(*lengths))


# ------------------------------------------------------------------------------------------------------------
# Read

QUESTIONS = tokens(7, 1, 4, seed=5)  # unequal lengths; one of a single token
# the tokens that route, by segment: where queries are means, each segment is one
ROUTES = [[0, 1, 1, 2, 0, 2, 0], [1], [1, 0, 0, 3]]


def check_reading(output, row, expected, length, tolerance=2e-5):
    """One row of an Output against the reference's Reading of it."""
    close(output.logits[row, :length], expected.logits, tolerance, "logits")
    assert len(output.selections) == len(expected.chosen)
    for selection, scores, chosen in zip(output.selections, expected.scores, expected.chosen):
        close(selection.all_scores[row], torch.stack(scores), tolerance, "scores of all documents")
        missing = selection.documents.size(1) - len(chosen)
        assert selection.documents[row].tolist() == chosen + [-1] * missing
        wanted = torch.stack([scores[m] for m in chosen])
        close(selection.scores[row, :len(chosen)], wanted, tolerance, "scores")
        assert selection.scores[row, len(chosen):].eq(-INF).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix_length", [0, 2])
def test_read_padded_batch(shape, prefix_length):
    """Routing, selection, attention, positions or logits would be wrong,
    or a question's padding would change them."""
    model, documents = make(**SHAPES[shape]), tokens(*LENGTHS)
    prefix, before = tokens(prefix_length, seed=6)[0], [False] * prefix_length
    rows = [torch.cat([prefix, question]) for question in QUESTIONS]
    routes = [before + route for route in ROUTES]
    output = model.read(stack(rows), model.encode(documents, NUMBERS), stack(routes),
                        prefix_length=prefix_length)
    assert output.logits.dtype == torch.float32
    judge = oracle(model)
    memory = judge.encode([d.tolist() for d in documents])
    for b, (row, route) in enumerate(zip(rows, routes)):
        expected = judge.read(row.tolist(), memory, route, prefix_length)
        check_reading(output, b, expected, len(row))
        layers = len(judge.reading_layers)
        selected = [(output.selections[0], expected.chosen[0], place) for place in range(layers)]
        if not judge.shared:
            selected = [(*both, 0) for both in zip(output.selections, expected.chosen)][:layers]
        assert sum(len(selection.keys) for selection in output.selections) == layers
        for layer, (selection, chosen, place) in zip(judge.reading_layers, selected):
            read = [chunk for m in sorted(chosen) for chunk in memory[m][layer]]
            slots = selection.index[b, :selection.slots[b]]
            keys, values = selection.keys[place][slots], selection.values[place][slots]
            close(keys, torch.stack([chunk.key for chunk in read]), what="keys read")
            close(values, torch.stack([chunk.value for chunk in read]), what="values read")


@pytest.mark.parametrize("lengths", [(5,), (1,), (1, 1), (4, 1, 4, 13)])
def test_read_small_memories(lengths):
    """A memory of fewer than top_k documents would move the question's positions or fill empty places."""
    model, documents, question = make(top_k=3), tokens(*lengths), QUESTIONS[0]
    output = model.read(question[None], model.encode(documents), torch.tensor([ROUTES[0]]))
    memory = oracle(model).encode([d.tolist() for d in documents])
    expected = oracle(model).read(question.tolist(), memory, ROUTES[0])
    check_reading(output, 0, expected, 7)
    chunks = sum(math.ceil(length / 4) for length in lengths)
    assert len(lengths) > 3 or output.selections[0].slots.tolist() == [chunks]


def test_read_fp32():
    """Single precision, which everything runs in, would be further from the truth than rounding explains."""
    model, documents = make(torch.float32, **SHAPES["all at once"]), tokens(*LENGTHS)
    output = model.read(stack(QUESTIONS), model.encode(documents), stack(ROUTES, torch.bool))
    judge = oracle(model)
    memory = judge.encode([d.tolist() for d in documents])
    for b in range(3):
        expected = judge.read(QUESTIONS[b].tolist(), memory, ROUTES[b])
        check_reading(output, b, expected, len(QUESTIONS[b]), 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix_length", [0, 3])
def test_read_without_a_memory(shape, prefix_length):
    """Without a memory the model would not be the plain transformer,
    or an empty one would differ from none."""
    model, rows = make(**SHAPES[shape]), stack(QUESTIONS[::2])
    output = model.read(rows, prefix_length=prefix_length)
    assert output.selections == []
    for b, question in enumerate(QUESTIONS[::2]):
        expected = oracle(model).read(question.tolist(), prefix_length=min(prefix_length, len(question)))
        close(output.logits[b, :len(question)], expected.logits)
    empty = model.encode(tokens(3)).subset([])
    assert model.read(rows, empty, rows >= 0, prefix_length=prefix_length).logits.equal(output.logits)


@torch.no_grad()
def test_segments_by_hand():
    """A mean would not be a mean: of unit queries, over segments together, without weights, or of padding."""
    model = make(routing_layers="0", query_reduction="mean", num_hidden_layers=2)
    h, ids = torch.randn(2, 4, 16, dtype=torch.float64), torch.tensor([[3, 4, 3, 5], [6, 7, 8, 0]])
    model.model.token_weights[:] = torch.arange(29)
    routed = lambda ids, mask: model.routing_inputs(h, mask, model.routing_weights(ids, mask))
    means, routes = routed(ids, torch.tensor([[1, 1, 0, 2], [0, 1, 0, 0]]))
    assert routes.tolist() == [[True, True], [True, False]]
    close(means[0], torch.stack([(3 * h[0, 0] + 4 * h[0, 1]) / 7, h[0, 3]]))
    close(means[1, 0], h[1, 1])
    # a question all of whose words weigh nothing does not route, and is not NaN
    means, routes = routed(torch.zeros_like(ids), torch.ones_like(ids))
    assert routes.tolist() == [[False], [False]] and means.eq(0).all()
    # many more tokens in a second text do not hide what the question asks for: the best segment counts
    memory, question = model.encode(tokens(*LENGTHS)), torch.cat(tokens(3, 20, seed=12))[None]
    ask = lambda mask: model.find(question, memory, mask).all_scores
    mask = torch.tensor([[1] * 3 + [2] * 20])
    close(ask(mask), torch.maximum(ask(mask * (mask == 1)), ask((mask == 2).long())))


@torch.no_grad()
def test_find_runs_the_routing_layers_alone(monkeypatch):
    """Routing would cost the whole model's time, and encoding that of layers of which nothing is stored."""
    model = make(routing_layers="0,1", attend_memory=False, num_hidden_layers=6)
    for layer in model.model.layers[2:]:
        monkeypatch.setattr(layer, "forward", None)
    memory = model.encode(tokens(*LENGTHS))
    assert len(memory.routing_keys) == 2 and not memory.keys and not memory.values
    selection = model.find(stack(QUESTIONS), memory, stack(ROUTES))
    assert selection.documents.shape == (3, 2) and not selection.keys


@torch.no_grad()
@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("shared")])
def test_second_round_of_kernels(shape, monkeypatch):
    """On a GPU, where the kernels route, the second round would be refused, or find something else."""
    pytest.importorskip("triton")
    model, found = make(**SHAPES[shape]).float(), {}
    memory, rows, mask = model.encode(tokens(*LENGTHS)), stack(QUESTIONS), stack(ROUTES)
    for kernel in ("torch", "triton"):
        monkeypatch.setattr(msa_kernel, "KERNEL", kernel)
        first = model.find(rows, memory, mask)
        found[kernel] = first, model.find(rows, memory, mask, first=first)
    for ours, expected in zip(found["triton"], found["torch"]):
        assert torch.equal(ours.documents, expected.documents)
        torch.testing.assert_close(ours.scores, expected.scores, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("shared")])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_second_round(shape, top_k):
    """What was found would route by another document's keys, or without its share, in another layer, or
    alone; or a document that is not there would count."""
    model, asked = make(**SHAPES[shape] | dict(top_k=top_k)), []
    memory = model.encode(tokens(*LENGTHS))
    rows, mask = stack(QUESTIONS), stack(ROUTES)
    mask[1] = 0  # this question does not route
    select = lambda *about: asked.append(about) or memory.select(*about)
    watched = SimpleNamespace(select=select, document_queries=memory.document_queries)
    first = model.find(rows, watched, mask)
    second = model.find(rows, watched, mask, first=first)
    (queries, routes, *_), unit = asked[0], torch.nn.functional.normalize
    for b in range(len(rows)):
        for m, score in enumerate(second.all_scores[b].tolist()):
            own = range(memory.offsets[m], memory.offsets[m + 1])
            total = 0
            for place, keys in enumerate(x.float() for x in memory.routing_keys):
                asks = [float(queries[place][b, t] @ keys[c].flatten()) for t in range(len(routes[b]))
                        if routes[b, t] for c in own]
                follows = []
                for rank in range(3):
                    d = int(first.documents[b, rank]) if rank < top_k else -1
                    if d >= 0:
                        mean = unit(keys[memory.offsets[d]:memory.offsets[d + 1]].mean(0), dim=-1).flatten()
                        weight = 0.5 * min(1, max(0, float(first.scores[b, rank] / first.scores[b, 0])))
                        follows += [weight * float(mean @ keys[c].flatten()) / keys.size(1) for c in own]
                total += max(asks, default=-INF) + max(follows, default=-INF)
            assert score == pytest.approx(total / 2 / len(memory.routing_keys), abs=1e-5)
    assert second.all_scores[1].eq(-INF).all() and second.all_scores[0].isfinite().all()


def test_read_needs_a_routing_mask():
    """Forgetting to say which tokens route would end far from the cause."""
    with pytest.raises(ValueError, match="routing_mask"):
        make().read(QUESTIONS[0][None], make().encode(tokens(3)))


def test_read_without_routing_tokens():
    """A question of which no token routes would read some document all the same, or end in NaN,
    alone or among others."""
    model, question = make(), QUESTIONS[0][None]
    memory, nowhere = model.encode(tokens(*LENGTHS)), torch.zeros(1, 7, dtype=torch.bool)
    plain = model.read(question, None).logits
    alone = model.read(question, memory, nowhere)
    close(alone.logits, plain, 1e-6)
    routes = torch.cat([nowhere, torch.tensor([ROUTES[0]])])
    both = model.read(torch.cat([question, question]), memory, routes)
    close(both.logits[0], plain[0], 1e-6)
    assert (both.logits[1] - plain[0]).abs().max() > 1e-2
    for selection in [*alone.selections, *both.selections]:
        assert selection.documents[0].eq(-1).all() and selection.slots[0] == 0
        assert selection.scores[0].eq(-INF).all() and selection.all_scores[0].eq(-INF).all()


def test_read_prefix_is_blind():
    """A template's head would see the memory, and so could not be kept from one question to the next."""
    model, question = make(), QUESTIONS[0][None]
    output = model.read(question, model.encode(tokens(*LENGTHS)), torch.tensor([ROUTES[0]]), prefix_length=3)
    plain = model.read(question, None, prefix_length=3)
    close(output.logits[:, :3], plain.logits[:, :3], 1e-6)
    assert (output.logits[:, 3:] - plain.logits[:, 3:]).abs().amax(2).min() > 1e-2


def test_read_positions():
    """Logits would be returned for other places than the ones asked for."""
    model, memory, routes = make(), make().encode(tokens(*LENGTHS)), stack(ROUTES, torch.bool)
    wanted = stack([[0, 1, 0, 0, 1, 0, 1], [1], [0, 0, 0, 1]], torch.bool)
    everywhere = model.read(stack(QUESTIONS), memory, routes).logits
    close(model.read(stack(QUESTIONS), memory, routes, positions=wanted).logits, everywhere[wanted], 1e-6)


@pytest.mark.parametrize("texts", ["aaa", "bab", "abab", "babaac", "cccbbbaaaccc", "bbbcaaaa",
                                   "ca" * 9 + "b" * 3])
def test_ties_go_to_the_lower_number(texts):
    """Of documents with the same text another than the lowest number would be selected,
    or the choice would be left to chance."""
    model, question, routes = make(), QUESTIONS[0][None], torch.tensor([ROUTES[0]])
    documents = dict(zip("abc", tokens(6, 5, 1, seed=7)))
    apart = model.encode(list(documents.values()))
    score = dict(zip("abc", model.read(question, apart, routes).selections[0].all_scores[0].tolist()))
    selection = model.read(question, model.encode([documents[text] for text in texts]), routes).selections[0]
    close(selection.all_scores[0], torch.tensor([score[text] for text in texts]), 1e-6)
    order = sorted(range(len(texts)), key=lambda m: (-score[texts[m]], m))
    assert selection.documents[0].tolist() == order[:2]


@pytest.mark.parametrize("length", [2, 3, 7, 20])
def test_number_chunk(length):
    """The closing number would share a chunk with the text,
    or a document that is little more than its number would fail."""
    model, document = make(number_chunk=2), tokens(length)[0]
    # `plain` has the same weights and a chunk for each token.
    memory, plain = model.encode([document]), make(chunk_size=1).encode([document])
    for layer in range(2):
        close(memory.values[layer][-1], plain.values[layer][-2:].mean(0), 1e-6)
        assert len(memory.values[layer]) == math.ceil((length - 2) / 4) + 1
    with pytest.raises(ValueError, match="shorter than its closing number, 2"):
        model.encode([document, document[:1]])


def test_score_bias_reads_the_best():
    """At a low temperature the memory's attention would not go to the document that routing likes best,
    in each question of a batch."""
    model = make(score_bias=True, router_temperature=1e-4, top_k=4, num_hidden_layers=2)
    documents = tokens(*LENGTHS)
    memory, routes = model.encode(documents), stack(ROUTES, torch.bool)
    several = model.read(stack(QUESTIONS), memory, routes)
    for b, question in enumerate(QUESTIONS):
        best = several.selections[0].documents[b, :1].tolist()
        alone = model.read(question[None], memory.subset(best), routes[b:b + 1, :len(question)])
        close(several.logits[b, :len(question)], alone.logits[0], 1e-5)


def test_copy_init():
    """Memory layers would not start as copiers, which write the part of a token that their values see."""
    torch.manual_seed(0)
    model = MSA(replace(BASE, copy_init=True, num_attention_heads=4, num_key_value_heads=2, hidden_size=32))
    assert all(layer.mlp.down_proj.weight.eq(0).all() for layer in model.model.layers)
    assert model.model.layers[0].self_attn.o_proj.weight.eq(0).all()
    for layer in model.model.layers[1:]:
        x = torch.randn(32)
        # What every head sees if all look at x.
        values = layer.self_attn.v_proj(x).view(2, 1, 6).expand(-1, 2, -1).flatten()
        rows = layer.self_attn.v_proj.weight
        close(rows @ rows.T, 0.25 * torch.eye(12), 1e-5)
        close(layer.self_attn.o_proj(values), 2 * rows.T @ rows @ x, 1e-5)


# ------------------------------------------------------------------------------------------------------------
# Decoding with a Cache

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix_length", [0, 2])
@pytest.mark.parametrize("with_memory", [True, False])
def test_decode_equals_prefill(shape, prefix_length, with_memory):
    """Text read token by token would be read differently from text read at once, or would be routed again."""
    model = make(**SHAPES[shape])
    memory = model.encode(tokens(*LENGTHS)) if with_memory else None
    text = torch.cat([QUESTIONS[0], *tokens(5, seed=8)])[None]
    routes = torch.tensor([ROUTES[0] + [0] * 5])
    whole = model.read(text, memory, routes, prefix_length=prefix_length)
    cache = Cache()
    logits = [model.read(text[:, :7], memory, routes[:, :7], cache, prefix_length).logits]
    chosen = list(cache.selections)
    logits += [model.read(text[:, t:t + 1], cache=cache).logits for t in range(7, 10)]
    other = model.encode(tokens(3, 3)) if with_memory else None
    # Two at once, told to route
    logits.append(model.read(text[:, 10:], other, torch.ones(1, 2, dtype=torch.bool), cache).logits)
    close(torch.cat(logits, 1), whole.logits)
    assert cache.length == 12
    assert len(cache.selections) == len(chosen) and all(a is b for a, b in zip(cache.selections, chosen))


@pytest.mark.parametrize("with_memory", [True, False])
def test_cache_inside_the_prefix(with_memory):
    """A first read that ends inside the prefix would move the positions of what follows,
    or show it the memory."""
    model, question = make(), QUESTIONS[0][None]
    memory = model.encode(tokens(*LENGTHS)) if with_memory else None
    routes, cache = torch.tensor([[True, True] + [False] * 5]), Cache()
    logits = [model.read(question[:, :2], memory, routes[:, :2], cache, prefix_length=4).logits]
    logits += [model.read(question[:, t:t + 1], cache=cache).logits for t in range(2, 7)]
    close(torch.cat(logits, 1), model.read(question, memory, routes, prefix_length=4).logits)


@pytest.mark.parametrize("shape", ["base", "all at once"])
@pytest.mark.parametrize("with_memory", [True, False])
def test_cache_expand(shape, with_memory):
    """Several continuations of one question would mix, or would spoil the cache that they start from."""
    model, question = make(**SHAPES[shape]), QUESTIONS[0][None]
    memory, routes = (model.encode(tokens(*LENGTHS)) if with_memory else None), torch.tensor([ROUTES[0]])
    endings = stack(tokens(2, 2, 2, seed=9))
    cache = Cache()
    model.read(question, memory, routes, cache, prefix_length=1)
    for _ in range(2):  # twice: the first must leave the original as it was
        copies = cache.expand(3)
        logits = torch.cat([model.read(endings[:, t:t + 1], cache=copies).logits for t in range(2)], 1)
        for b, ending in enumerate(endings):
            text = torch.cat([question, ending[None]], 1)
            padded = torch.cat([routes, torch.zeros(1, 2, dtype=torch.bool)], 1)
            close(logits[b], model.read(text, memory, padded, prefix_length=1).logits[0, 7:])
        assert copies.length == 9 and cache.length == 7
        for selection, one in zip(copies.selections, cache.selections):
            assert selection.documents.tolist() == one.documents.tolist() * 3
            close(selection.scores, one.scores.expand(3, -1))
            close(selection.all_scores, one.all_scores.expand(3, -1))


# ------------------------------------------------------------------------------------------------------------
# Losses and gradients

# Tokens of the prompt, tokens to predict, positive, appended; out of POOL documents; whether it answers
SAMPLES = [
    (5, 2, {2}, set()),
    (6, 1, {0, 4}, {3}),
    (2, 1, {1}, {0, 4}),
    (3, 3, set(), {2, 3}),
    (4, 2, {3}, set(), True),   # from the pooled memory
]
POOL = (5, 1, 4, 3, 6)


def samples_of(specifications, seed=10):
    """Reference samples: a prompt that routes, one token in between, then what is to be predicted."""
    samples = []
    for i, (prompt, target, positive, appended, *answers) in enumerate(specifications):
        places = range(prompt + 1 + target)
        row = tokens(len(places), seed=seed + i)[0].tolist()
        segments = [min(t // 3, 1) + 1 if t < prompt else 0 for t in places]  # from the fourth on: the second
        samples.append(Sample(row, segments, [t > prompt for t in places],
                              bool(answers) or not positive, positive, appended))
    return samples


def batch_of(samples, documents):
    """The same as `MSA.forward` takes it."""
    def members(name):
        return torch.tensor([[m in getattr(sample, name) for m in range(documents)] for sample in samples])
    return dict(tokens=stack([sample.tokens for sample in samples]),
                routing_mask=stack([sample.routes for sample in samples]),
                target_mask=stack([sample.targets for sample in samples], torch.bool),
                answers=torch.tensor([sample.answers for sample in samples]),
                positive=members("positive"), appended=members("appended"))


def weights_of(model):
    return {name: parameter.detach().double().requires_grad_()
            for name, parameter in model.named_parameters()}


def check_forward(model, lengths, samples, batches, tolerance):
    """Losses, measures and the gradients of every parameter, of lm and of aux apart."""
    documents = tokens(*lengths)
    losses = model(documents, list(range(len(lengths))), batches)
    weights = weights_of(model)
    judge = Reference({**weights, **dict(model.named_buffers())}, model.config)
    expected = judge.losses([d.tolist() for d in documents], samples)
    for name in ("lm", "aux", "naming", "answer", "named", "answered", "top1", "chance", "recall"):
        wanted = torch.as_tensor(expected[name])
        assert (wanted.isnan() == torch.as_tensor(losses[name]).isnan()).all(), f"{name}: of no sample"
        close(torch.as_tensor(losses[name]).nan_to_num(), wanted.nan_to_num(), tolerance, name)
    for loss in ("lm", "aux"):
        found = torch.autograd.grad(losses[loss], list(model.parameters()), retain_graph=True,
                                    allow_unused=True)
        wanted = torch.autograd.grad(expected[loss], list(weights.values()), retain_graph=True,
                                     allow_unused=True)
        scale = max(float(gradient.abs().max()) for gradient in wanted if gradient is not None) or 1.0
        for name, gradient, truth in zip(weights, found, wanted):
            gradient, truth = (torch.zeros_like(weights[name]) if g is None else g.double()
                               for g in (gradient, truth))
            close((gradient - truth) / scale + 1, torch.ones_like(truth), tolerance,
                  f"gradient of {loss} for {name}")
            if loss == "lm" and "router" in name:
                # Top-k is not differentiable: the router learns from the auxiliary loss alone.
                assert gradient.eq(0).all(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape):
    """A loss, a measure or the gradient of some parameter would be wrong:
    training would go somewhere else."""
    samples = samples_of(SAMPLES)
    batches = [batch_of(samples[:3], len(POOL)), batch_of(samples[3:], len(POOL))]
    check_forward(make(**SHAPES[shape]).train(), POOL, samples, batches, 2e-5)


def test_forward_fp32():
    """Single precision, which training runs in, would be further from the truth than rounding explains."""
    samples = samples_of(SAMPLES)
    check_forward(make(torch.float32, **SHAPES["all at once"]), POOL, samples,
                  [batch_of(samples, len(POOL))], 2e-4)


@pytest.mark.parametrize("lengths, specifications", [
    ((5,), [(1, 1, {0}, set())]),
    ((1, 4), [(2, 2, {0}, {1}), (1, 1, {1}, {0})]),
    ((1, 5, 2), [(1, 1, {0, 1}, {2}), (4, 1, {2}, set())]),
])
def test_forward_without_negatives(lengths, specifications):
    """A question all of whose other documents are appended would give NaN,
    or a loss where nothing is to be told apart."""
    samples = samples_of(specifications)
    model = make()
    losses = model(tokens(*lengths), list(range(len(lengths))), [batch_of(samples, len(lengths))])
    if all(len(s.positive | s.appended) == len(lengths) for s in samples):
        assert losses["aux"] == 0
    (losses["lm"] + losses["aux"]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters()
               if parameter.grad is not None)
    model.zero_grad()
    check_forward(model, lengths, samples, [batch_of(samples, len(lengths))], 2e-5)


def test_forward_only_answers():
    """A pool that has nothing left to retrieve would divide by zero."""
    samples = samples_of([(5, 2, set(), {0}), (3, 1, set(), {1})])
    losses = make()(tokens(4, 5), [0, 1], [batch_of(samples, 2)])
    assert losses["aux"] == 0 and losses["lm"] == losses["answer"] and losses["lm"].isfinite()
    losses["lm"].backward()


def test_forward_batching():
    """The losses would depend on how the samples are cut into batches."""
    model, samples, documents = make(), samples_of(SAMPLES), tokens(*POOL)
    one = model(documents, NUMBERS[1:], [batch_of(samples, len(POOL))])
    four = model(documents, NUMBERS[1:], [batch_of([sample], len(POOL)) for sample in reversed(samples)])
    for name, value in one.items():
        close(torch.as_tensor(four[name]), value, 1e-6, name)


def saved_bytes(model, *pool):
    """(losses, bytes kept for the backward beside the parameters) of a forward."""
    kept = {}
    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = model(*pool)
    return losses, sum(kept.values()) - sum(kept.get(p.data_ptr(), 0) for p in model.parameters())


@pytest.mark.parametrize("shape", ["base", "reading", "all at once", "shared", "shared, above"])
@pytest.mark.parametrize("dtype, longest", [(torch.float32, 2048), (torch.bfloat16, 5)])
def test_activations_computed_again(shape, dtype, longest, monkeypatch):
    """With activations computed again, a loss or a gradient would differ by a bit, or nothing be saved: a
    block would see a cache that has grown, documents in other batches, or the products of another type."""
    monkeypatch.setattr("model.BATCH_TOKENS", longest)
    documents, samples = tokens(*[8] * 20, 3), samples_of(SAMPLES)
    batches = [batch_of(samples[:3], 21), batch_of(samples[3:], 21)]
    batches[1] |= dict(shared=tokens(4)[0][None], positive=batches[1]["positive"] & False)
    found = {}
    for again in (False, True):
        model = make(torch.float32, **SHAPES[shape]).train()
        model.checkpoint_activations = again
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses, kept = saved_bytes(model, documents, [*range(21)], batches)
        (losses["lm"] + losses["aux"]).backward()
        found[again] = losses["lm"], losses["aux"], kept, {n: p.grad for n, p in model.named_parameters()}
    (lm, aux, kept, gradients), (lm2, aux2, kept2, gradients2) = found[False], found[True]
    assert torch.equal(lm, lm2) and torch.equal(aux, aux2) and kept2 < kept / 3, (kept, kept2)
    for name, gradient in gradients.items():
        assert gradient is gradients2[name] is None or torch.equal(gradient, gradients2[name]), name


def test_contrastive_loss_by_hand():
    """Eq. 5 would count other positives or appended documents in the denominator, or average differently."""
    scores = torch.tensor([[[.1, .2, .3, .0]], [[.0, .0, .0, .0]]])  # two layers, one question
    positive, none = torch.tensor([[True, False, True, False]]), torch.zeros(1, 4, dtype=torch.bool)
    appended = torch.tensor([[False, True, False, False]])
    e = lambda s: math.exp(s / .1)
    first = -(math.log(e(.1) / (e(.1) + e(.2) + e(.0))) + math.log(e(.3) / (e(.3) + e(.2) + e(.0)))) / 2
    close(contrastive_loss(scores, positive, none, .1), torch.tensor([[first], [math.log(3)]]), 1e-6)
    first = -(math.log(e(.1) / (e(.1) + 1)) + math.log(e(.3) / (e(.3) + 1))) / 2
    close(contrastive_loss(scores, positive, appended, .1), torch.tensor([[first], [math.log(2)]]), 1e-6)
    # Large scores must not overflow.
    close(contrastive_loss(100 * scores, positive, none, .1)[0, 0], torch.tensor((1e2 + 0) / 2), 1e-6)
    assert contrastive_loss(scores, positive, ~positive, .1).eq(0).all()


def test_contrastive_loss_gradient_without_negatives():
    """The gradient would be NaN where there is nothing to tell a positive from."""
    scores = torch.randn(2, 1, 3, requires_grad=True)
    positive = torch.tensor([[True, False, True]])
    loss = contrastive_loss(scores, positive, ~positive, .1).sum()
    loss.backward()
    assert loss == 0 and scores.grad.eq(0).all()


@pytest.mark.parametrize("documents, expected", [
    ([[0], [1]], [.5, 0]), ([[0, 3], [0, 1]], [1, .5]), ([[0, 1, 2, 3], [-1, 2, 1, 0]], [1, .5]),
    ([[-1], [-1]], [0, 0]),
])
def test_recall_by_hand(documents, expected):
    """Recall would count places that no document fills, or all of them as the last document."""
    positive = torch.tensor([[True, False, False, True], [True, False, False, True]])
    assert recall(torch.tensor(documents), positive).tolist() == expected


def test_leave_out_by_hand():
    """Documents whose text is in the question would take places of the ranking,
    or the others would change their order."""
    documents = torch.tensor([[3, 1, 0, -1], [2, 0, 1, 3]])
    excluded = torch.tensor([[False, True, False, False], [False, False, True, False]])
    assert leave_out(documents, excluded).tolist() == [[3, 0, -1, -1], [0, 1, 3, -1]]


def selection_of(documents, scores):
    none = torch.zeros(len(documents), 0)
    return Selection(none, none, none, none, none, torch.tensor(documents), torch.tensor(scores), None)


def test_rank_documents_by_hand():
    """The mean score would leave layers out, count a missing document as zero, or break ties by chance."""
    one = selection_of([[4, 2], [1, -1], [-1, -1]], [[.75, .5], [.5, -INF], [-INF, -INF]])
    two = selection_of([[2, 3], [1, -1], [-1, -1]], [[1.0, .25], [.25, -INF], [-INF, -INF]])
    documents, scores = rank_documents([one, two])
    assert documents.tolist() == [[2, 4, 3, -1], [1, -1, -1, -1], [-1, -1, -1, -1]]
    # 4 has .75 and the second layer's last score; 3 has the first layer's last score and .25.
    close(scores[0, :3], torch.tensor([.75, .5, .375]), 1e-6)
    assert scores[1].tolist() == [.375, -INF, -INF, -INF] and scores[2].eq(-INF).all()
    ties = rank_documents([selection_of([[5, 0, 2]], [[.5, .5, .5]])])[0]
    assert ties.tolist() == [[0, 2, 5]]


def test_equal_routers():
    """Routers that are to start equal would not: like would not find like before training."""
    for layer in MSA(replace(BASE, equal_routers=True, num_attention_heads=6)).model.layers[1:]:
        queries, keys = layer.self_attn.router_q_proj[0].weight, layer.self_attn.router_k_proj[0].weight
        for head in range(6):
            assert queries[6 * head:6 * head + 6].equal(keys[6 * (head // 3):6 * (head // 3) + 6])


@torch.no_grad()
def test_without_attending():
    """A backbone whose router alone was trained would be disturbed by a memory that it has not learned
    to read; or would not route."""
    blind, seeing = make(torch.float32, attend_memory=False), make(torch.float32)
    memory, routed = (model.encode(tokens(*LENGTHS)) for model in (seeing, blind))
    assert not routed.keys and not routed.values  # nothing is stored that nothing reads
    rows, routes = stack(QUESTIONS), stack(ROUTES, torch.bool)
    found = blind.read(rows, routed, routes)
    plain = blind.read(rows)
    reading = seeing.read(rows, memory, routes)
    assert torch.allclose(found.logits, plain.logits, atol=1e-5)
    assert (found.logits - reading.logits).abs().max() > 1e-2
    assert len(found.selections) == len(blind.config.memory_layers) and not plain.selections
    assert found.selections[0].all_scores.equal(reading.selections[0].all_scores)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoint_round_trip(shape, tmp_path):
    """A model that is saved and loaded would not be the same to the last bit."""
    model = make(torch.float32, **SHAPES[shape]).train()
    model.save_pretrained(tmp_path)
    loaded = MSA.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.equal(model.state_dict()[name]), name
    memory, rows = model.encode(tokens(*LENGTHS)), stack(QUESTIONS)
    routes = stack(ROUTES, torch.bool)
    expected = model.eval().read(rows, memory, routes).logits
    assert loaded.read(rows, loaded.encode(tokens(*LENGTHS)), routes).logits.equal(expected)


@pytest.mark.parametrize("change, name", [
    (dict(hidden_size=20), "model.embed_tokens.weight"),
    (dict(num_hidden_layers=5), "model.layers.1.self_attn.router_k_proj.0.weight"),
    (dict(qk_norm=True), "model.layers.0.self_attn.k_norm.weight"),
])
@pytest.mark.parametrize("grows", [True, False])
def test_checkpoint_of_another_shape(change, name, grows, tmp_path):
    """Weights of another shape, too many or too few, would be loaded in part,
    or fail without saying which."""
    smaller, larger = MSA(BASE), MSA(replace(BASE, **change))
    weights, configuration = (smaller, larger) if grows else (larger, smaller)
    weights.save_pretrained(tmp_path)
    kept = (tmp_path / "model.safetensors").read_bytes()
    configuration.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(kept)
    with pytest.raises(UserError) as error:
        MSA.from_pretrained(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value) and name in str(error.value)


def test_output_matrix(tmp_path):
    """Without tied embeddings a missing output matrix would be noise;
    with them one that is there is not used, as in transformers."""
    MSA(BASE).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        MSA.from_pretrained(tmp_path, tie_word_embeddings=False)
    MSA(replace(BASE, tie_word_embeddings=False)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in MSA.from_pretrained(tmp_path, tie_word_embeddings=True).state_dict()


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_checkpoint_truncated(keep, tmp_path):
    """Half a file, as a full disk leaves it, would end in a traceback that does not name it."""
    MSA(BASE).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError) as error:
        MSA.from_pretrained(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_checkpoint_missing_file(missing, tmp_path):
    """A folder that is no checkpoint would end in a traceback that does not name what is missing."""
    MSA(BASE).save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError) as error:
        MSA.from_pretrained(tmp_path)
    assert str(tmp_path / missing) in str(error.value)


def changed(**changes):
    return lambda values: json.dumps({**values, **changes}).encode()


@pytest.mark.parametrize("write", [
    lambda values: b"",
    lambda values: json.dumps(values).encode()[:50],
    lambda values: b"[]",
    lambda values: b"null",
    lambda values: b"{}",
    lambda values: b"\xff\xfe\x00",
    changed(vocab_size=None),
    changed(msa_config=[1]),
    changed(msa_config={}),
    changed(hidden_size="wide"),
    changed(hidden_size=None),
    changed(hidden_size=-16),
    changed(hidden_size=16.5),
    changed(head_dim=3),
    changed(num_hidden_layers=1),
    changed(num_key_value_heads=3),
    changed(tie_word_embeddings="false"),
], ids=["empty", "half", "list", "null", "no keys", "not text", "key missing",
        "table a list", "table empty", "a word", "nothing", "negative", "fraction", "odd head", "one layer",
        "heads", "no boolean"])
def test_checkpoint_broken_config(write, tmp_path):
    """A configuration that says nothing, or nonsense, would end in a traceback,
    or in an error that does not name the file."""
    MSA(BASE).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(write(json.loads(path.read_text())))
    with pytest.raises(UserError) as error:
        MSA.from_pretrained(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(vocab_size=0), "model.vocab_size is 0"), (dict(top_k=0), "model.top_k is 0"),
    (dict(chunk_size=-1), "model.chunk_size is -1"),
    (dict(router_temperature=0.0), "model.router_temperature is 0.0"),
    (dict(num_hidden_layers=1), "model.num_hidden_layers is 1"),
    (dict(num_key_value_heads=3), "model.num_attention_heads is 4; .* 3"),
    (dict(head_dim=5), "model.head_dim is 5"),
    (dict(number_chunk=-1), "model.number_chunk is -1"),
    (dict(decouple_router=False, equal_routers=True), "model.equal_routers is on"),
    (dict(router_layer_idx="2,1"), "model.router_layer_idx is '2,1'"),
    (dict(router_layer_idx="x"), "router_layer_idx is 'x'"),
    (dict(router_layer_idx="9"), "router_layer_idx is '9'"),
    (dict(router_layer_idx="1,1"), "router_layer_idx is '1,1'"),
    (dict(routing_layers="0,3"), "model.routing_layers is '0,3'; .* below 3"),
    (dict(routing_dim=-1), "model.routing_dim is -1; it must be at least 0"),
    (dict(document_share=-0.5), "model.document_share is -0.5; it must be at least 0"),
    (dict(decouple_router=False, routing_dim=8), r"model.decouple_router is off.*routing_dim \(8\)"),
    (dict(decouple_router=False, query_reduction="mean"), "model.decouple_router is off.*query_reduction"),
    (dict(normalize_routing=False, document_share=1.0), "model.document_share is 1.0"),
])
def test_config_checks_itself(change, message):
    """A model that cannot work would be built, and fail later without naming the setting."""
    with pytest.raises(UserError, match=message):
        replace(BASE, **change)
