"""Files in llama.cpp's format as checkpoints: against the folders that they came from, and when something is
wrong with them. Needs the extras `gguf` and `dev`."""
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from test_checkpoint import backbone
from tokenizers import pre_tokenizers

import gguf_folder
from checkpoint import find
from common import UserError
from model import MSA
from prompts import ChatTokenizer, load_checkpoint

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parent.parent
TEXTS = [(ROOT / "README.md").read_text(encoding="utf-8")[:5000],
         (ROOT / "LICENSE").read_text(encoding="utf-8"),
         "12345 zebra don't DON'T we'll\tx\n\n\n  y   ½² e\u0301\u00e9 日本語 \u2028 [PAD7]",
         "a<|end|>b<think>c", " \n "]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanomsa"


def permute(weights, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute, word for word."""
    return (weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
            .swapaxes(1, 2)
            .reshape(weights.shape))


GGUF_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 4)  # it has all of a Llama's


def write_gguf(path, folder, kind, half=False, tokens=None, merges=(), kinds=None, pre="gpt-2", model="gpt2",
               eot=0, extra=(), **fields):
    """Write the checkpoint of `folder` as llama.cpp's converter does it. half: matrices in float16; extra:
    more tensors; fields: of the model, in place of the folder's."""
    config = json.loads((folder / "config.json").read_text())
    values = {"block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
              "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
              "attention.head_count": config["num_attention_heads"],
              "attention.head_count_kv": config["num_key_value_heads"],
              "attention.key_length": config["head_dim"],
              "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": 1234.0, **fields}
    writer = gguf.GGUFWriter(path, kind)
    for name, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{kind}.{name}", value)
    tokens = tokens or [f"t{i}" for i in range(97)]
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds or [1] * len(tokens))
    writer.add_token_merges(list(merges) or ["t 1"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 2)
    if eot:
        writer.add_eot_token_id(eot)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in [*load_file(folder / "model.safetensors").items(), *extra]:
        array = tensor.float().numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            array = permute(array, config[key])
        if half and array.ndim > 1:
            array = array.astype(np.float16)
        writer.add_tensor(GGUF_NAMES.get_name(name, try_suffixes=(".weight",)) or name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Merges of a tiny vocabulary without byte-level words: only the weights matter
WEIGHTS_ONLY = dict(tokens=["t", "1", "t1", *(f"<{i}>" for i in range(94))])


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("half", [True, False])
@torch.no_grad()
def test_logits(kind, tied, half, tmp_path):
    """A Llama's queries and keys would be in llama.cpp's order, or a Qwen3's changed where they are not; an
    output matrix be lost; RoPE's base, the heads' size or the norms' epsilon be others."""
    backbone(tmp_path / "hub", kind, dtype="bfloat16", tie_word_embeddings=tied, rms_norm_eps=3e-5)
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    path = write_gguf(tmp_path / "a.gguf", tmp_path / "hub", kind.lower(), half, **WEIGHTS_ONLY)
    tokens = torch.randint(97, (2, 33))
    expected = theirs(tokens).logits
    source, ours = MSA.from_pretrained(tmp_path / "hub"), MSA.from_pretrained(path)
    found = ours.read(tokens).logits
    assert ours.config == source.config
    assert expected.abs().max() > 1 and (found - expected).abs().max() < 1e-4
    if not half:  # float32 holds what the folder has, float16 almost
        assert found.equal(source.read(tokens).logits)


@torch.no_grad()
def test_quantized(tmp_path):
    """Blocks of a quantized matrix would be put together in a wrong order or scale."""
    backbone(tmp_path / "hub", "Llama", "ratio 4", dtype="bfloat16")
    path, plain = tmp_path / "a.gguf", gguf.GGUFWriter.add_tensor
    quantized = {}

    def add(writer, name, array):
        if name != "blk.1.ffn_up.weight":
            return plain(writer, name, array)
        quantized[name] = array
        plain(writer, name, gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0),
              raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        write_gguf(path, tmp_path / "hub", "llama", **WEIGHTS_ONLY)
    found = load_file(find(path) / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].float().numpy()
    # 8 bits between -max and max of 32 numbers in a row, then bfloat16
    blocks = quantized["blk.1.ffn_up.weight"].reshape(-1, 32)
    bound = np.abs(blocks).max(1, keepdims=True) * (0.5 / 127 + 2 ** -8)
    assert (np.abs(found.reshape(-1, 32) - blocks) <= bound).all() and found.std() > 0.1


def cut_as_transformers(pre):
    """The words of tokenizer.ggml.pre as transformers' or the libraries' own code cuts them."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    if pre == "qwen2":
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as pattern
    else:
        from transformers.convert_slow_tokenizer import TikTokenConverter  # its default is Llama 3's
        pattern = TikTokenConverter().pattern
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(False, use_regex=False)])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    backbone(folder, "Llama", dtype="bfloat16")
    return folder


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokens(pre, hub, tmp_path):
    """A text would be other tokens than those that the model has learned: cut elsewhere, not normalised as
    Qwen's are, or with special tokens parsed that a user wrote; a base Llama 3 would get no BOS."""
    pytest.importorskip("transformers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    theirs.pre_tokenizer = cut_as_transformers("gpt-2")  # tokens of many digits: other cuts forbid some
    theirs.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        theirs.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([*TEXTS[:2], "12345 2345 123 " * 9], trainer)
    whole = json.loads(theirs.to_str())
    model = whole["model"]
    model["vocab"]["Ġzebra"] = len(model["vocab"])  # Llama 3 takes it as a whole, though no merges make it
    theirs = tokenizers.Tokenizer.from_str(json.dumps(whole))
    theirs.pre_tokenizer = cut_as_transformers(pre)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(merge) for merge in model["merges"]]
    theirs.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    theirs.encode_special_tokens = True
    special = ["<think>", "[PAD7]", "<|user|>", "<|end|>", "<|begin|>"]
    kinds = [1] * len(tokens) + [4, 5, 3, 3, 3]
    theirs.add_special_tokens(["[PAD7]"])  # takes the id, and is text
    theirs.add_special_tokens(special[2:])
    path = write_gguf(tmp_path / "a.gguf", hub, "llama", tokens=tokens + special, merges=merges, kinds=kinds,
                      pre=pre)
    ours = ChatTokenizer(find(path))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        if pre == "qwen2":
            text = unicodedata.normalize("NFC", text)
        assert ours.decode(ours.encode(text)) == text
    ids = {token: len(tokens) + i for i, token in enumerate(special)}
    own = ours.encode("hi<|end|>")
    assert ids["<|end|>"] not in own and ids["<think>"] in ours.encode("a<think>")
    assert ours.templated("hi<|end|>") == [ids["<|begin|>"], ids["<|user|>"], *own, ids["<|end|>"]]
    assert ours.ends == {ids["<|end|>"]} and ours.vocab_size == len(tokens) + 5
    assert ours.encoding.start() == ([ids["<|begin|>"]] if pre == "llama-bpe" else [])


def test_cache(hub, cache, tmp_path):
    """A file would be converted at every call, or an older one's folder be used after it has changed; what
    was interrupted would be taken for a whole folder."""
    path = write_gguf(tmp_path / "a.gguf", hub, "llama", **WEIGHTS_ONLY)
    first = find(path)
    assert first.parent == cache and first.name.startswith("a-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_folder, "convert", lambda *_: pytest.fail("it was converted twice"))
        assert find(str(path)) == first
    write_gguf(path, hub, "llama", eot=94, **WEIGHTS_ONLY, **{"rope.freq_base": 99.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_folder, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            find(path)
    assert [*cache.iterdir()] == [first]
    second = find(path)
    assert second != first and MSA.from_pretrained(second).config.rope_theta == 99
    assert {*cache.iterdir()} == {first, second}
    # What ends a turn ends an answer, beside what ends a text
    assert json.loads((second / "config.json").read_text())["eos_token_id"] == [95, 94]

    # Another process finishes the same file first
    path.touch()
    original = gguf_folder.save_file

    def save_twice(*args):
        original(*args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf_folder, "save_file", original)
            winner.append(find(path))

    winner = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_folder, "save_file", save_twice)
        assert [find(path)] == winner
    assert {*cache.iterdir()} == {first, second, *winner}
    MSA.from_pretrained(winner[0])


@pytest.mark.parametrize("change, message", [
    (dict(kind="mamba"), "general.architecture is 'mamba'; supported are llama and qwen3"),
    ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'; it must be 'none' or absent"),
    ({"rope.dimension_count": 8}, "llama.rope.dimension_count is 8; it must be 16 or absent"),
    (dict(extra=[("rope_freqs.weight", torch.ones(8))]), "rope_freqs.weight is not supported (scaled RoPE"),
    (dict(extra=[("blk.0.attn_q.bias", torch.ones(8))]), "blk.0.attn_q.bias is not supported (scaled RoPE"),
    (dict(extra=[("blk.4.attn_q.weight", torch.ones(8))]), "blk.4.attn_q.weight is not supported"),
    (dict(block_count=5), "not a plain llama in one file: its tensor blk.4.ffn_up.weight is missing"),
    (dict(block_count=4_000_000_000), "is missing"),
    (dict(model="llama"), "its tokenizer is 'llama' with words cut as 'gpt-2'; supported is 'gpt2'"),
    (dict(pre="tekken"), "words cut as 'tekken'; supported is 'gpt2' with gpt-2, smollm, "),
    (dict(pre="default"), "words cut as 'default'; supported"), (dict(pre=None), "words cut as None; "),
    (dict(merges=["no such"]), "cannot be converted, perhaps it is not whole"),
    (dict(kinds=[1]), "cannot be converted, perhaps it is not whole"),
])
def test_refused(change, message, hub, cache, tmp_path):
    """A model that is computed otherwise would answer nonsense without a word; or a folder that does not
    work would stay in the cache."""
    path = write_gguf(tmp_path / "a.gguf", hub, **{"kind": "llama", **WEIGHTS_ONLY, **change})
    with pytest.raises(UserError) as caught:
        find(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert not [*cache.iterdir()]


def test_damaged(hub, cache, tmp_path, monkeypatch):
    """A download that ended early would be half a model; another file, or a missing package, end in a
    traceback."""
    path = write_gguf(tmp_path / "a.gguf", hub, "llama", **WEIGHTS_ONLY)
    whole, cut = path.read_bytes(), tmp_path / "cut.gguf"
    lengths = [*range(4, 9000, 97), *range(9000, len(whole), len(whole) // 40), len(whole) - 40]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.gguf: cannot be converted, perhaps it is not whole"):
            find(cut)
    for data in (b"", b"GG", b"PK\x03\x04" + whole[4:]):
        cut.write_bytes(data)
        with pytest.raises(UserError, match="cut.gguf: not a GGUF file; it begins with"):
            find(cut)
    with pytest.raises(UserError, match="none.gguf: no such file"):
        find(tmp_path / "none.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"a.gguf: to read it, install the package gguf: pip install -e '.\["):
        find(path)
    assert not [*cache.iterdir()]


def test_vocabulary_of_another_size(hub, tmp_path):
    """Token ids would lie outside the embedding."""
    tokens = [*WEIGHTS_ONLY["tokens"], "one more"]
    path = write_gguf(tmp_path / "a.gguf", hub, "llama", tokens=tokens)
    with pytest.raises(UserError, match="the tokenizer has 98 tokens, the model only 97"):
        load_checkpoint(find(path), "cpu")
