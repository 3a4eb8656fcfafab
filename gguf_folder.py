"""A .gguf file as a checkpoint folder in the Hugging Face layout, so that every `--checkpoint` may name one.

    python sample.py --checkpoint SmolLM2-135M-Instruct.Q4_1.gguf --documents texts "Who built it?"

It is converted once, into ~/.cache/nanomsa or $XDG_CACHE_HOME/nanomsa, and again when the file has changed.
Llama and Qwen3 are supported; what the model would not compute is refused. Needs the package gguf.
"""
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from tqdm import tqdm

from common import UserError, check_download, check_spelled, sync_handle, write_json

# What GGUF calls the tensors of a layer, and what the Hub calls them
BLOCK = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
BLOCKS = {"llama": BLOCK,
          "qwen3": BLOCK | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}}

# How tokenizer.ggml.pre cuts a text into words. %s: how many digits may stand together
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2, BYTES = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
CUTS = {"gpt-2": GPT2, "smollm": Sequence([Digits(individual_digits=True), GPT2]),
        "llama-bpe": Sequence([Split(Regex(WORDS % "{1,3}"), "isolated"), BYTES]),
        "qwen2": Sequence([Split(Regex(WORDS % ""), "isolated"), BYTES])}


def folder_of(path):
    """The checkpoint folder of the file `path`, a Path: converted unless it was before. Raises UserError for
    a file that is missing, damaged or of a model that is not supported, and where gguf is not installed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    check_spelled(path)
    header = np.fromfile(path, np.uint8, 1 << 20).tobytes()
    check_download(header[:99], path, page=True)
    if not header.startswith(b"GGUF"):
        raise UserError(f"{path}: not a GGUF file; it begins with {header[:4]!r}, not with b'GGUF'")
    # This script is hashed too: what an older one has converted is not used.
    version = f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode() + Path(__file__).read_bytes()
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "nanomsa"
    target = cache / f"{path.stem}-{hashlib.blake2b(header + version, digest_size=8).hexdigest()}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:  # it is renamed below
        try:
            convert(path, Path(folder))
        except (UserError, OSError):
            raise
        except Exception as error:  # of the libraries' many kinds
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{path}: cannot be converted, perhaps it is not whole ({reason})") from None
        try:
            os.rename(folder, target)
        except OSError:
            if not target.exists():  # else another process was first
                raise
    return target


def convert(path, folder):
    """Write the checkpoint. Raises UserError for what is not supported; a damaged file raises anything."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: to read it, install the package gguf: pip install -e '.[gguf]'") from None
    with tqdm(desc=f"converting {path.name}", unit=" tensors") as bar:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config, names = read_config(path, fields, tensors)
        write_json(folder / "config.json", config)
        write_tokenizer(path, folder, fields)
        weights = {}
        bar.reset(total=len(tensors))
        for name, tensor in tensors.items():
            weight = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if config["model_type"] == "llama" and (".attn_q." in name or ".attn_k." in name):
                # RoPE turns pairs of dimensions: llama.cpp's stand side by side, the Hub's half a head apart
                pairs = weight.reshape(-1, config["head_dim"] // 2, 2, weight.shape[-1])
                weight = pairs.swapaxes(1, 2).reshape(weight.shape)
            weights[names[name]] = torch.from_numpy(weight).to(torch.bfloat16)
            bar.update()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for written in folder.iterdir():
        with open(written, "rb") as file:
            sync_handle(file.fileno(), path)


def read_config(path, fields, tensors):
    """(config.json, GGUF's name -> the Hub's of every tensor). Raises UserError for what is not supported."""
    kind = fields["general.architecture"]
    if kind not in BLOCKS:
        raise UserError(f"{path}: general.architecture is {kind!r}; supported are {' and '.join(BLOCKS)}")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    heads, layers = own["attention.head_count"], own["block_count"]
    head_dim = own.get("attention.key_length", own["embedding_length"] // heads)
    for name, allowed in (("rope.scaling.type", "none"), ("rope.dimension_count", head_dim)):
        if own.get(name, allowed) != allowed:
            raise UserError(f"{path}: {kind}.{name} is {own[name]!r}; it must be {allowed!r} or absent")
    tied = "output.weight" not in tensors
    ends = [fields[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if name in fields]  # of a text, and of a turn
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not tied:
        names["output"] = "lm_head"
    for i in range(min(layers, len(tensors))):  # a damaged file may say that it has a billion layers
        names |= {f"blk.{i}.{theirs}": f"model.layers.{i}.{ours}" for theirs, ours in BLOCKS[kind].items()}
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in names.items()}
    for name in sorted(names.keys() ^ tensors.keys(), reverse=True):
        what = "is missing" if name in names else "is not supported (scaled RoPE, a bias or an expert)"
        raise UserError(f"{path}: not a plain {kind} in one file: its tensor {name} {what}")
    return dict(
        architectures=[f"{kind.capitalize()}ForCausalLM"], model_type=kind, torch_dtype="bfloat16",
        vocab_size=len(tensors["token_embd.weight"].data), hidden_size=own["embedding_length"],
        intermediate_size=own["feed_forward_length"], num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=own.get("attention.head_count_kv", heads), head_dim=head_dim,
        rope_theta=own.get("rope.freq_base", 1e4), max_position_embeddings=own["context_length"],
        rms_norm_eps=float(str(np.float32(own["attention.layer_norm_rms_epsilon"]))),  # 1e-5, not 9.99...e-6
        tie_word_embeddings=tied, eos_token_id=ends), names


def write_tokenizer(path, folder, fields):
    """tokenizer.json and tokenizer_config.json. Raises UserError for other kinds than byte-level BPE."""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    cut = own.get("pre")
    if own["model"] != "gpt2" or cut not in CUTS:
        raise UserError(f"{path}: its tokenizer is {own['model']!r} with words cut as {cut!r}; supported is "
                        f"'gpt2' with {', '.join(CUTS)}")
    vocabulary = {token: i for i, token in enumerate(own["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in own["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = CUTS[cut], decoders.ByteLevel()
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    # Beside words (1) there are special tokens (3), those that texts may contain (4), and unused ones (5)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == 3)
                          for token, kind in zip(own["tokens"], own["token_type"], strict=True)
                          if kind in (3, 4)])
    about = {f"{name}_token": own["tokens"][own[f"{name}_token_id"]] for name in ("bos", "eos")
             if f"{name}_token_id" in own}
    if own.get("add_bos_token", cut == "llama-bpe"):
        bos = (about["bos_token"], own["bos_token_id"])
        tokenizer.post_processor = processors.TemplateProcessing([bos[0], "$A"], None, [bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    about["chat_template"] = fields.get("tokenizer.chat_template")
    write_json(folder / "tokenizer_config.json", about | {"tokenizer_class": "PreTrainedTokenizerFast"})
