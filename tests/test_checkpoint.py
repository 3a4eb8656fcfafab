"""Checkpoint folders: against transformers, in memory, and when something is wrong with them.
Parity tests need the extra `dev`."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prompts import write

import checkpoint as layout
from checkpoint import INDEX, WEIGHTS, Weights, find
from common import UserError
from model import MSA, Cache, ModelConfig
from prompts import load_checkpoint

ROOT = Path(__file__).parent.parent
TINY = dict(vocab_size=97, intermediate_size=48, num_hidden_layers=4, head_dim=16)
SHAPES = {"ratio 1": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4),
          "ratio 3": dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2),
          "ratio 4": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=1)}


def backbone(folder, kind, shape="ratio 3", shards=False, dtype="float32", **options):
    """A tiny random backbone that transformers has saved; returns transformers' model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(len(kind) + len(shape))
    rope = {"rope_type": "default", "rope_theta": 1234.0}
    make_config = getattr(transformers, f"{kind}Config")
    config = make_config(**TINY, **SHAPES[shape], rope_parameters=rope, initializer_range=0.2, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(getattr(torch, dtype))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms: not all ones
            parameter.data += 0.2 * torch.randn(len(parameter)).to(parameter.dtype)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    return model


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_transformers_parity(kind, shape, tied, tmp_path):
    """A backbone would say something else than in transformers, or what is saved of it would."""
    transformers = pytest.importorskip("transformers")
    theirs = backbone(tmp_path / "theirs", kind, shape, shards=tied, tie_word_embeddings=tied)
    ours = MSA.from_pretrained(tmp_path / "theirs")
    tokens = torch.randint(97, (2, 33))
    expected = theirs(tokens).logits
    assert expected.abs().max() > 1 and (ours.read(tokens).logits - expected).abs().max() < 1e-4
    said = theirs.generate(tokens[:1], max_new_tokens=64, do_sample=False, eos_token_id=None,
                           attention_mask=torch.ones(1, 33, dtype=torch.long))[0].tolist()
    found = tokens[0].tolist()
    while len(found) < len(said):
        found.append(int(ours.read(torch.tensor([found])).logits[0, -1].argmax()))
    assert found == said and len(said) == 33 + 64
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again).__name__ == f"{kind}ForCausalLM" and again(tokens).logits.equal(expected)
    reread = MSA.from_pretrained(tmp_path / "ours")
    assert reread.config == ours.config
    assert all(a.equal(b) for a, b in zip(reread.state_dict().values(), ours.state_dict().values()))


@torch.no_grad()
def test_smollm2():
    """SmolLM2 itself: perplexity within 0.1 % and greedy answers as in transformers."""
    transformers, folder = pytest.importorskip("transformers"), os.environ.get("NANOMSA_SMOLLM2")
    if not folder:
        pytest.skip("set NANOMSA_SMOLLM2 to the folder of SmolLM2-135M-Instruct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = MSA.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (ROOT / "LICENSE").read_text() + Path(os.__file__).read_text()
    text = torch.tensor([tokenizer.encode(text)[:700]])
    loss = lambda logits: float(torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:]).exp())
    a, b = loss(theirs(text).logits), loss(ours.read(text).logits)
    print(f"perplexity: transformers {a:.5f}, ours {b:.5f}")
    assert abs(a / b - 1) < 1e-3
    for question in ("What is the capital of France?", "Write a haiku about rain.",
                     "Explain what a hash table is."):
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                               add_generation_prompt=True, return_dict=False)
        said = theirs.generate(torch.tensor([tokens]), max_new_tokens=48, do_sample=False)[0].tolist()
        found, cache, last = list(tokens), Cache(), list(tokens)
        while len(found) < len(said):
            last = [int(ours.read(torch.tensor([last]), cache=cache).logits[0, -1].argmax())]
            found += last
        assert found == said, question


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@torch.no_grad()
def test_routers_of_a_backbone(kind, tmp_path):
    """Untrained routers would be noise; or with QK-norm leave out its weights."""
    backbone(tmp_path, kind)
    model = MSA.from_pretrained(tmp_path)
    assert model.config.router_layers == [0, 1] and model.config.prompts == "chat"
    assert not model.config.attend_memory
    assert model.model.layers[1].self_attn.router_k_proj[0].weight.equal(torch.eye(48))
    model = MSA.from_pretrained(tmp_path, routing_layers="", query_reduction="max", routing_dim=0)
    assert model.config.router_layers == model.config.memory_layers == [2, 3]
    attention = model.model.layers[2].self_attn
    h = torch.randn(1, 3, 48)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    query, key = attention.q_proj(h).view(1, 3, 6, 16), attention.k_proj(h).view(1, 3, 2, 16)
    if kind == "Qwen3":
        query, key = attention.q_norm(query), attention.k_norm(key)
    assert torch.allclose(unit(attention.router_q_proj(h).view(1, 3, 6, 16)), unit(query), atol=1e-5)
    assert torch.allclose(unit(attention.router_k_proj(h).view(1, 3, 2, 16)), unit(key), atol=1e-5)
    router = model.state_dict()["model.layers.2.self_attn.router_q_proj.0.weight"]
    assert router.data_ptr() != attention.q_proj.weight.data_ptr()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(stored, dtype, tmp_path):
    """Weights would be held in another type than asked for, or rounded twice."""
    theirs = backbone(tmp_path, "Llama", dtype=stored)
    ours = MSA.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in theirs.state_dict().items():
        if name != "lm_head.weight" or not ours.config.tie_word_embeddings:
            assert ours.state_dict()[name].equal(tensor.to(dtype)), name


def test_fingerprint_whatever_the_dtype(tmp_path):
    """A bank made on a GPU in bfloat16 would be refused on a CPU in float32."""
    backbone(tmp_path, "Qwen3", dtype="bfloat16")
    a, b = (MSA.from_pretrained(tmp_path, dtype=dtype).fingerprint()
            for dtype in (torch.float32, torch.bfloat16))
    assert a == b != MSA.from_pretrained(tmp_path, chunk_size=16).fingerprint()


@torch.no_grad()
def test_bfloat16_reads_a_memory(tmp_path):
    """A model in bfloat16 would fail on its own memory, or be far from the same one in float32."""
    backbone(tmp_path, "Qwen3")
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = MSA.from_pretrained(tmp_path, dtype=dtype, attend_memory=True, top_k=2, chunk_size=8)
        memory = model.encode([torch.arange(1 + i, 20 + 3 * i) for i in range(3)])
        question, routes = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
        logits.append(model.read(question, memory, routes).logits)
    assert logits[1].dtype == torch.float32
    assert (logits[0] - logits[1]).abs().max() < 0.1 * logits[0].abs().max()


@torch.no_grad()
@pytest.mark.parametrize("routing_dim", [0, 12])
def test_a_backbone_in_shared_mode(tmp_path, routing_dim):
    """A backbone would get routers in other layers than it routes in, or of another size; a token's weight
    would be missing, lost with the vocabulary's growth, or not count in what a bank says of its model."""
    backbone(tmp_path / "plain", "Qwen3")
    options = dict(routing_layers="0", query_reduction="mean", routing_dim=routing_dim)
    model = MSA.from_pretrained(tmp_path / "plain", **options)
    assert not model.trained_routers and model.model.token_weights.eq(1).all()
    assert not hasattr(model.model.layers[1].self_attn, "router_q_proj")
    memory = model.encode([torch.arange(1 + i, 20 + 3 * i) for i in range(3)])
    size = routing_dim or model.config.head_dim
    assert [x.shape[2] for x in memory.routing_keys] == [size] and not memory.keys
    question = torch.tensor([[5, 6, 7]])
    before = model.find(question, memory, torch.ones_like(question)).all_scores
    fingerprint, size = model.fingerprint(), len(model.model.token_weights)
    model.model.token_weights[5] = 4.0
    assert model.fingerprint() != fingerprint
    model.resize_vocabulary(size + 3)
    model.save_pretrained(tmp_path / "saved")
    again = MSA.from_pretrained(tmp_path / "saved")
    assert again.trained_routers and "token_weights" in dict(again.model.named_buffers())
    assert again.model.token_weights.tolist() == [1.0] * 5 + [4.0] + [1.0] * (size - 3)
    after = again.find(question, memory, torch.ones_like(question)).all_scores
    assert (before - after).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------------
# Saving

def own(**options):
    return MSA(ModelConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, head_dim=16, top_k=2, **options))


def test_shards(tmp_path, monkeypatch):
    """Large models would be written through one copy in memory, or a shard's tensors be lost;
    an older checkpoint's files would stay."""
    first, second = own(), own(qk_norm=True)
    first.save_pretrained(tmp_path)
    monkeypatch.setattr(layout, "SHARD_BYTES", 20_000)
    second.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert WEIGHTS not in names and INDEX in names and len(names) > 4
    again = MSA.from_pretrained(tmp_path)
    assert again.config.qk_norm
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), second.state_dict().values()))
    monkeypatch.undo()
    first.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert not MSA.from_pretrained(tmp_path).config.qk_norm


def test_other_files_stay(tmp_path):
    """A user's own file beside a checkpoint would be deleted when it is saved."""
    (tmp_path / "model-before.safetensors").write_bytes(b"mine")
    own().save_pretrained(tmp_path)
    assert (tmp_path / "model-before.safetensors").read_bytes() == b"mine"


def test_missing_routers(tmp_path):
    """One of our own checkpoints that has lost its routers would be asked with untrained ones."""
    own().save_pretrained(tmp_path)
    save_file({name: x for name, x in load_file(tmp_path / WEIGHTS).items() if "router" not in name},
              tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="router_k_proj.0.weight is missing"):
        MSA.from_pretrained(tmp_path)


def test_changes(tmp_path):
    """A misspelled or wrong setting would be a traceback."""
    own().save_pretrained(tmp_path)
    assert MSA.from_pretrained(tmp_path, top_k=7).config.top_k == 7
    for changes, message in ((dict(zzz=3), "unknown key 'zzz'"),
                             (dict(top_k="x"), "top_k = 'x' is of type str")):
        with pytest.raises(UserError, match=message):
            MSA.from_pretrained(tmp_path, **changes)


def test_what_is_passed_on(tmp_path):
    """Entries of config.json that are not the model's, such as the token that ends an answer,
    would be lost when it is saved."""
    backbone(tmp_path / "a", "Llama", eos_token_id=5, max_position_embeddings=333)
    MSA.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    found = json.loads((tmp_path / "b" / "config.json").read_text())
    assert found["eos_token_id"] == 5 and found["max_position_embeddings"] == 333
    assert found["model_type"] == "llama"


# ------------------------------------------------------------------------------------------------------------
# Memory

LOADS = """
import re, sys, torch
from model import MSA
MSA.from_pretrained(sys.argv[2], dtype=torch.bfloat16)  # what libraries load, they have loaded
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = MSA.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_no_second_copy(tmp_path):
    """Loading would hold what is read beside what is made of it:
    twice the memory of a model that just fits."""
    model = MSA(ModelConfig(vocab_size=8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4,
                            num_attention_heads=16, num_key_value_heads=8, head_dim=64,
                            qk_norm=True)).bfloat16()
    model.save_pretrained(tmp_path)
    del model
    own().save_pretrained(tmp_path / "small")
    command = [sys.executable, "-c", LOADS, str(tmp_path), str(tmp_path / "small")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size > 100e6 and 0.95 * size < peak < 1.15 * size


# ------------------------------------------------------------------------------------------------------------
# Bad input

def edit(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        values = {name: value for name, value in {**values, **changes}.items() if value != "delete"}
        (folder / "config.json").write_text(json.dumps(values))
    return change


def weights(change):
    def changed(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
    return changed


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def cut(keep):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


def index(places):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / INDEX).write_text(json.dumps(places))
    return change


NORM = "model.norm.weight"
ROUTER = "model.layers.2.self_attn.router_q_proj.0.weight"
BAD = {
    "unknown architecture": (edit(model_type="gpt2"),
                             "config.json: model_type is 'gpt2'; supported are llama, qwen3"),
    "no architecture": (edit(model_type="delete"), "config.json: model_type is None"),
    "scaled rope": (edit(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
                    r"RoPE is scaled \('yarn'\)"),
    "scaled rope, older": (edit(rope_parameters="delete", rope_theta=1e4,
                                rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
    "biases": (edit(attention_bias=True), "attention_bias is True: biases in attention"),
    "mlp biases": (edit(mlp_bias=True), "mlp_bias is True"),
    "activation": (edit(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "windows": (edit(use_sliding_window=True, sliding_window=4),
                "use_sliding_window is True: sliding windows"),
    "windows by layer": (edit(layer_types=["full_attention", "sliding_attention"]), "layer_types has others"),
    "windows, older": (edit(sliding_window=4096), "sliding_window is 4096"),
    "experts": (edit(num_experts=8), "num_experts is 8: a mixture of experts"),
    "quantized": (edit(quantization_config={"bits": 4}), "quantized weights"),
    "no width": (edit(hidden_size="delete"),
                 "config.json: not a checkpoint's configuration: 'hidden_size' is missing"),
    "a word": (edit(hidden_size="wide"), "config.json: hidden_size = 'wide' is of type str"),
    "no heads": (edit(num_attention_heads=0), "model.num_attention_heads is 0|model.head_dim is 0"),
    "no base": (edit(base=None), "base is None; it must be another folder, or a name on the Hub"),
    "its own base": (lambda folder: edit(base=str(folder))(folder), "base is '.*'; it must be another"),
    "context": (edit(max_position_embeddings="2k"), "max_position_embeddings is '2k'; it must be at least 1"),
    "layer types": (edit(layer_types=5), "layer_types has others"),
    "two kinds of rope": (edit(rope_scaling={"type": "yarn"}), "RoPE is scaled .'yarn'"),
    "weights a folder": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
                         f"{WEIGHTS}: "),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"),
                 "config.json: not a checkpoint's configuration"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "router layers": (edit(msa_config={"chunk_size": 64, "top_k": 2, "router_temperature": 0.1,
                                       "router_layer_idx": "3,9"}),
                      "router_layer_idx is '3,9'"),
    "prompts": (edit(msa_config={"chunk_size": 64, "top_k": 2, "router_temperature": 0.1,
                                 "prompts": "alpaca"}), "must be one of nanomsa"),
    "wrong shape": (weights(lambda t: t.update({NORM: torch.ones(5)})),
                    rf"{WEIGHTS}: tensor {NORM} is \(5,\); .* says \(48,\)"),
    "tensor missing": (weights(lambda t: t.pop(NORM)), f"{WEIGHTS}: tensor {NORM} is missing"),
    "tensor too many": (weights(lambda t: t.update(extra=torch.ones(2))),
                        r"tensor extra is \(2,\); the configuration says absent"),
    "type": (weights(lambda t: t.update({NORM: torch.ones(48, dtype=torch.int32)})),
             f"tensor {NORM} is of type I32"),
    "half a router": (weights(lambda t: t.update({ROUTER: torch.ones(96, 48)})),
                      "router_k_proj.0.bias is missing"),
    "empty": (cut(0), f"{WEIGHTS}: not a whole safetensors file"),
    "truncated": (cut(5000), f"{WEIGHTS}: not a whole safetensors file"),
    "cut short": (cut(-1), f"{WEIGHTS}: not a whole safetensors file"),
    "pickled": (pickled, "pytorch_model.bin is pickled"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
    "shard missing": (index({"weight_map": {NORM: "model-00002-of-00002.safetensors"}}),
                      "model-00002-of-00002.safetensors: no such file"),
    "index of a folder": (index({"weight_map": {NORM: ".."}}), "no such file|not an index"),
    "index of nothing": (index({"weights": 1}), f"{INDEX}: not an index"),
    "index elsewhere": (index({"weight_map": {NORM: "../x.safetensors"}}), f"{INDEX}: not an index"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints(what, tmp_path):
    """What cannot be loaded would end in a traceback, be loaded in part, or run code."""
    change, message = BAD[what]
    backbone(tmp_path, "Llama")
    change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        MSA.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_unpickled(tmp_path):
    """A folder whose weights were pickled could run what it likes."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    backbone(tmp_path, "Llama")
    (tmp_path / WEIGHTS).unlink()
    torch.save(Bomb(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        MSA.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_hub(monkeypatch, tmp_path):
    """A name would be downloaded although there is a folder of it;
    what cannot be had would end in a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert find("owner/name") == Path("owner/name") and find("out/a/b") == Path("out/a/b")
    with pytest.raises(UserError, match=r"owner/other: no such folder; .*pip install -e '\.\[hub\]'"):
        find("owner/other")

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            if name == "owner/gone":
                raise OSError("offline\nat length")
            assert "config.json" in allow_patterns
            assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
            return tmp_path / "cache"
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert find("owner/other") == tmp_path / "cache"
    with pytest.raises(UserError,
                       match=r"owner/gone: no such folder, and no such model .* \(OSError: offline\)"):
        find("owner/gone")


def test_weights_are_read_one_by_one(tmp_path):
    """A tensor would be read before it is asked for, or be a view of the file, which may change."""
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2).bfloat16()}, tmp_path / WEIGHTS)
    found = Weights(tmp_path)
    assert found.shapes == {"a": (2, 3), "b": (2,)}
    a = found.read("a", "cpu", torch.float32)
    (tmp_path / WEIGHTS).write_bytes(bytes((tmp_path / WEIGHTS).stat().st_size))
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_tokenizer_that_does_not_fit(tmp_path):
    """A tokenizer with more tokens than the model has rows for would end in an index error,
    or ask with the wrong words."""
    backbone(tmp_path, "Llama")
    with pytest.raises(UserError, match="no such file|cannot|No such file"):
        load_checkpoint(tmp_path, torch.device("cpu"))  # none at all
    write(tmp_path)
    with pytest.raises(UserError,
                       match="the tokenizer has 261 tokens, the model only 97; they do not belong together"):
        load_checkpoint(tmp_path, torch.device("cpu"))
