"""The full-attention baseline against the plain transformer of tests/reference.py, and from start to end."""
import json

import pytest
import torch
from reference import Reference

import baseline
from model import MSA, ModelConfig

CONFIG = ModelConfig(vocab_size=608, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=6, copy_init=True)


def pool_of(tokenizer):
    """Five documents; questions about the first, the last, and one about both the second and the fourth."""
    array = lambda text: torch.tensor(tokenizer.encode(text)).numpy()
    documents = [array(text) for text in ("a is 1.", "b is 22.", "c is 333.", "d is 4.", "e is 55555.")]
    questions = [(array("What is a?"), array("1"), [[0]], False), (array("e?"), array("55555"), [[4]], False),
                 (array("b and d?"), array("224"), [[1], [3]], False)]
    return documents, questions


@pytest.mark.parametrize("count, asked, place",
                         [(1, 3, [0, 0, 0]), (2, 2, [0, 1]), (4, 2, [0, 3]), (8, 2, [0, 6])])
def test_join(tokenizer, count, asked, place):
    """A question would stand behind a text without its documents, or documents would be lost or reordered."""
    documents, questions = pool_of(tokenizer)
    texts, batch, places = baseline.join((documents, questions), tokenizer, count)
    assert places.tolist() == place and len(batch["tokens"]) == asked and len(texts) == count
    assert "".join(tokenizer.decode(text.tolist()).lstrip("\n") for text in texts) == \
        "a is 1.b is 22.c is 333.d is 4.e is 55555."
    said = lambda tokens: tokenizer.decode(tokens.tolist())
    for row, target, (question, answer, _, _) in zip(batch["tokens"], batch["target_mask"], questions):
        assert said(row[target]) == f"<|end_of_retrieval|>{said(answer)}<|end|>"
        assert said(row).startswith(f"<|question|>{said(question)}\n")


def test_join_of_nothing(tokenizer):
    """A pool none of whose questions can be asked would end in an empty batch."""
    documents, questions = pool_of(tokenizer)
    assert baseline.join((documents, questions[2:]), tokenizer, 2) is None


@pytest.mark.parametrize("count", [1, 2])
def test_loss(tokenizer, count):
    """The baseline would not be the plain transformer over a text and a question,
    or its loss not that of answers."""
    torch.manual_seed(2)
    model = baseline.make_model(CONFIG).double()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    texts, batch, place = baseline.join(pool_of(tokenizer), tokenizer, count)
    loss, right = baseline.loss_of(model, texts, batch, place)
    judge, surprise, all_right = Reference(model.state_dict(), model.config), [], []
    for row, target, at in zip(batch["tokens"], batch["target_mask"], place.tolist()):
        before, length = texts[at].tolist(), int(target.nonzero().max()) + 1
        logits = judge.read(before + row[:length].tolist()).logits[len(before):]
        wanted = [(int(row[t]), logits[t - 1]) for t in target.nonzero().squeeze(1).tolist()]
        surprise += [-torch.log_softmax(x, 0)[token] for token, x in wanted]
        all_right.append(all(int(x.argmax()) == token for token, x in wanted))
    assert loss.item() == pytest.approx(float(sum(surprise) / len(surprise)), rel=1e-5)
    assert right == pytest.approx(sum(all_right) / len(all_right))


def test_start():
    """Keys would have no constant part, so that no head attends by place, or like would not find like."""
    torch.manual_seed(0)
    model = baseline.make_model(ModelConfig(hidden_size=64, copy_init=True))
    shared = model.model.embed_tokens.weight.detach().mean(0)
    assert 0.7 < shared.norm() < 1.3
    assert MSA(ModelConfig(hidden_size=64)).model.embed_tokens.weight.mean(0).norm() < 0.05
    *others, last = (layer.self_attn for layer in model.model.layers)
    heads = lambda x: x.weight.unflatten(0, (2, -1, 32))
    equal = lambda attention: heads(attention.q_proj).equal(heads(attention.k_proj).expand(-1, 2, -1, -1))
    assert equal(last) and not any(equal(attention) for attention in others)


def test_from_start_to_end(run, tiny, tmp_path):
    """Training would not write a model that is asked afterwards, or asking again would train again."""
    config = (tiny / "tiny.toml").read_text().split("router_steps")
    kept = [line for line in config[1].splitlines()[1:] if "_steps" not in line and "every" not in line]
    path, out = tmp_path / "full.toml", tmp_path / "out"
    path.write_text(f'out = "{out.as_posix()}"\nmax_steps = 3\naccumulate = 1\n'
                    'lengths = "1k"\nquestions = 2\nseeds = "1,2"\n' + "\n".join(kept))
    result = run(baseline, path)
    assert result.code == 0, result.err
    rows = json.loads((out / "answers.json").read_text())
    assert [(row["seed"], row["questions"]) for row in rows] == [(1, 2), (2, 2)]
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    weights = (out / "model.safetensors").read_bytes()
    result = run(baseline, path, "--seeds", "3")
    assert result.code == 0 and (out / "model.safetensors").read_bytes() == weights
    assert [row["seed"] for row in json.loads((out / "answers.json").read_text())] == [1, 2, 3]
    run(baseline, path, "--seeds", "2")  # in place of the one before
    assert [row["seed"] for row in json.loads((out / "answers.json").read_text())] == [1, 3, 2]
    result = run(baseline, path, "--out", tmp_path / "nan", "--learning-rate", 1e30)
    assert result.code == 2 and "the loss is not a number at step" in result.error
    assert "prepared with" in run(baseline, path, "--out", tmp_path / "new", "--data.pools", "5").error
