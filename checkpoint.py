"""Checkpoint folders in the Hugging Face layout: config.json, model.safetensors or its shards, the
tokenizer's files.

One layout for our own checkpoints, Llama (SmolLM2) and Qwen3 backbones, and the authors' MSA-4B. Nothing here
is unpickled, and what the model does not compute is refused by its name in config.json.
"""
import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from common import UserError, atomic_file, merge, write_json

SHARD_BYTES = 2 << 30  # of a weights file: what saving holds in memory beside the model
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
HUB_FILES = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
             "tokenizer*",
             "chat_template.jinja")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
                "qk_norm")
ROUTING_ONLY = ("top_k", "router_temperature", "attend_memory", "max_document_tokens", "score_bias",
                "copy_init",
                "equal_routers")  # fields that change nothing of what a model encodes


def find(name):
    """The folder of a checkpoint: `name` itself, what a .gguf file was converted to, or where huggingface_hub
    keeps the files of the repository "owner/name", which it downloads first. Raises UserError."""
    folder = Path(name)
    if folder.suffix == ".gguf" and not folder.is_dir():
        from gguf_folder import folder_of  # here: bench.py runs where only torch, triton and numpy are
        return folder_of(folder)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder; to download a model of that name from the Hugging Face "
                        "Hub: "
                        "pip install -e '.[hub]'") from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except Exception as error:  # of the network's and the library's many kinds
        reason = str(error).split("\n")[0]
        raise UserError(f"{name}: no such folder, and no such model could be had from the Hugging Face Hub "
                        f"({type(error).__name__}: {reason})") from None


# ------------------------------------------------------------------------------------------------------------
# config.json

# What a backbone must say, or leave out: key -> (values allowed, what another value would mean)
PLAIN = {"hidden_act": (("silu",), "an activation"), "attention_bias": ((False,), "biases in attention"),
         "mlp_bias": ((False,), "biases in the MLP"), "use_sliding_window": ((False,), "sliding windows"),
         "partial_rotary_factor": ((1, 1.0), "partial RoPE"),
         "quantization_config": ((), "quantized weights"),
         "num_experts": ((), "a mixture of experts"), "num_local_experts": ((), "a mixture of experts")}
MSA_PLAIN = {"head_reduce_method": ("mean", "max"), "query_reduce_method": ("max", "max"),
             "chunk_reduce_method": ("max", "max"),
             "decouple_pooling_mode": ("mean", "mean")}  # what we compute, and the authors' default


def read_json(path, what):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return values
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {path.parent} is not a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not {what} ({type(error).__name__}: {error})") from None


def read_config(folder):
    """config.json -> (values of ModelConfig by name, the entries that are not the model's concern). Raises
    UserError."""
    path = Path(folder) / "config.json"
    found = read_json(path, "a checkpoint's configuration")
    kind, msa = found.pop("model_type", None), found.pop("msa_config", None)
    if kind not in ("llama", "qwen3", "msa", "nanomsa"):
        raise UserError(f"{path}: model_type is {kind!r}; supported are llama, qwen3, msa (the authors') and "
                        "nanomsa")
    if not isinstance(msa, dict | None):
        raise UserError(f"{path}: msa_config is {msa!r}; it must be an object")
    for key, (allowed, meaning) in PLAIN.items():
        if found.get(key) is not None and found[key] not in allowed:
            raise UserError(f"{path}: {key} is {found[key]!r}: {meaning}, which this model does not have; "
                            + (f"it must be {allowed[0]!r}" if allowed else "it must be absent"))
    if found.get("sliding_window") is not None and "use_sliding_window" not in found:
        raise UserError(f"{path}: sliding_window is {found['sliding_window']!r}; this model attends to "
                        "everything: it must be null")
    kinds = found.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{path}: layer_types has others than full_attention, which this model does not have")
    for key in ("rope_scaling", "rope_parameters"):  # the older word and the newer
        rope = found.pop(key, None) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if rope_type != "default":
            raise UserError(f"{path}: RoPE is scaled ({rope_type!r}), which this model does not do; only the "
                            "default kind is supported")
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"]
    try:
        if kind != "nanomsa":
            heads, width = found["num_attention_heads"], found["hidden_size"]
            whole = type(heads) is int and type(width) is int and heads > 0
            defaults = dict(rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
                            num_key_value_heads=heads,
                            head_dim=128 if kind != "llama" else width // heads if whole else 0)
            found = {**defaults, **{key: value for key,
                                    value in found.items() if value is not None or key not in defaults}}
        if kind == "nanomsa" and msa is None:
            raise KeyError("msa_config")
        if kind != "nanomsa":
            found["qk_norm"] = kind != "llama"
        values = {name: found.pop(name) for name in PLAIN_FIELDS}
    except KeyError as error:
        raise UserError(f"{path}: not a checkpoint's configuration: {error} is missing") from None
    # A plain backbone: its routers are untrained, it has not learned to read a memory or to name documents
    if msa is None:
        msa = {"attend_memory": False, "prompts": "chat"}
    elif kind == "msa" or "pooling_kernel_size" in msa:
        msa = authors_options(msa, path)
    else:
        for name in ("chunk_size", "top_k", "router_temperature"):
            if name not in msa:
                raise UserError(f"{path}: msa_config lacks {name}")
        if msa.pop("full_attention", False):  # of before it had a file of its own
            raise UserError(f"{path}: a baseline without a memory; train it anew with baseline.py")
    return {**values, **msa}, found


def authors_options(msa, path):
    """The authors' msa_config in our names. A router is normalised where the name of its loss says INFONCE,
    as their training does it."""
    for name, (ours, default) in MSA_PLAIN.items():
        if msa.get(name, default) != ours:
            raise UserError(f"{path}: msa_config.{name} is {msa.get(name, default)!r}; only {ours!r} is "
                            "supported")
    values = dict(router_layer_idx=msa.get("router_layer_idx", "all"), top_k=msa.get("top_k_docs", 16),
                  chunk_size=msa.get("pooling_kernel_size", 64),
                  router_temperature=msa.get("infonce_loss_temp", 0.1),
                  decouple_router=msa.get("decouple_router", False), prompts="msa")
    return {**values, "normalize_routing": msa.get("normalize_routing",
                                                   "INFONCE" in str(msa.get("aux_loss_method", "INFONCE")))}


def write_config(folder, config, others, dtype):
    """Write config.json, such that transformers reads the plain backbone where it knows its kind.

    config: a dataclass, whose fields beyond PLAIN_FIELDS go into "msa_config"; others: entries that are
    passed on, such as eos_token_id; dtype: of the weights.
    """
    values = asdict(config)
    plain = {name: values.pop(name) for name in PLAIN_FIELDS}
    kind = "nanomsa" if config.smear else "qwen3" if config.qk_norm else "llama"
    if kind != "nanomsa":
        del plain["qk_norm"]
    architecture = dict(nanomsa="MSA", qwen3="Qwen3ForCausalLM", llama="LlamaForCausalLM")[kind]
    # Newer files' word for torch_dtype
    others = {name: value for name, value in others.items() if name != "dtype"}
    write_json(Path(folder) / "config.json", {
        "max_position_embeddings": 32768, "hidden_act": "silu", "attention_bias": False, **others,
        "architectures": [architecture], "model_type": kind, "torch_dtype": str(dtype).removeprefix("torch."),
        **plain, "msa_config": values})


# ------------------------------------------------------------------------------------------------------------
# Weights

class Weights:
    """The tensors of a folder, each read when it is asked for.

    shapes, dtypes, files: name -> shape, type, the file that holds it; main: the file that says what there
    is.
    """

    def __init__(self, folder):
        """Looks at every file's header. Raises UserError for a file that is missing, not whole, or
        pickled."""
        folder = Path(folder)
        files, self.main = [folder / WEIGHTS], folder / WEIGHTS
        if not files[0].exists() and (folder / INDEX).exists():
            self.main = folder / INDEX
            places = read_json(self.main, "an index of weights").get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(x, str) and Path(x).name == x
                                                       for x in places.values()):
                raise UserError(f"{self.main}: not an index of weights; its weight_map must name files of "
                                "this folder")
            files = [folder / name for name in sorted(set(places.values()))]
            for path in files:
                if not path.is_file():
                    raise UserError(f"{path}: no such file, but {INDEX} names it; a shard of this checkpoint "
                                    "is missing")
        elif not files[0].exists():
            pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt")
                             for path in folder.glob(kind))
            raise UserError(f"{files[0]}: no such file; " + (
                f"{pickled[0]} is pickled, and pickles run code when they are read: convert it to "
                "safetensors" if pickled
                else f"{folder} is not a checkpoint"))
        self.shapes, self.dtypes, self.files = {}, {}, {}
        for path in files:
            with open_weights(path) as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(f"{path}: tensor {name} is of type {part.get_dtype()}; it must be "
                                        f"one of {', '.join(DTYPES)}")
                    self.shapes[name], self.dtypes[name], self.files[name] = (
                        tuple(part.get_shape()),
                        DTYPES[part.get_dtype()],
                        path,
                    )

    def read(self, name, device, dtype):
        """One tensor, copied. The file is opened anew, so that what was mapped of it does not stay in memory
        beside the copy."""
        with open_weights(self.files[name]) as file:
            return file.get_tensor(name).to(device=device, dtype=dtype, copy=True)


def open_weights(path):
    # Here: bench.py runs where only torch, triton and numpy are installed
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    except OSError as error:  # a folder, for one: without an errno
        raise UserError(f"{path}: cannot be read ({error})") from None


def write_weights(folder, tensors):
    """Write tensors (name -> tensor) as model.safetensors, or as shards of about SHARD_BYTES and their index;
    each appears whole."""
    from safetensors.torch import save

    folder, shards, room = Path(folder), [], 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= tensor.nbytes
    names = [WEIGHTS] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors"
                                                for i in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards):
        with atomic_file(folder / file_name, "wb") as file:
            file.write(save({name: tensors[name].detach().cpu().contiguous() for name in shard},
                            {"format": "pt"}))
    if len(shards) > 1:
        write_json(folder / INDEX,
                   {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                                    "weight_map": {name: file for file, shard in zip(names, shards)
                                                   for name in shard}})
    kept = {*names, INDEX} if len(shards) > 1 else {*names}
    for path in list(folder.iterdir()):  # an earlier checkpoint's
        if path.name not in kept and re.fullmatch(rf"{WEIGHTS}|{INDEX}|model-\d{{5}}-of-\d{{5}}\.safetensors",
                                                  path.name):
            path.unlink()


# ------------------------------------------------------------------------------------------------------------
# A model and its folder

class Pretrained:
    """What an nn.Module with `config`, `others` and `config_class` needs to be read from a folder, and
    written to one."""

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32, **changes):
        """The model of a checkpoint folder, or of a repository "owner/name" of the Hugging Face Hub, in
        evaluation mode.

        Reads what `save` wrote, Llama and Qwen3 backbones, and the authors' MSA-4B. A backbone without
        routers gets those of `init_routers`. Every tensor is read straight into the device and dtype: there
        is no second copy. changes: fields of the configuration that replace the checkpoint's. Raises
        UserError for what is missing, damaged or not supported. Sets `trained_routers`, whether the
        checkpoint had any, and `stored_dtype`, of its embedding.
        """
        folder = find(name)
        config, others = cls.read_config(folder)
        with torch.device("meta"):
            model = cls(merge(config, changes, "from_pretrained"))
        config, model.others, weights = model.config, others, Weights(folder)
        unused = (
            r"rotary_emb\.inv_freq$|(^|\.)temperature$" + "|^lm_head.weight$" * config.tie_word_embeddings
        )
        found = {name: shape for name, shape in weights.shapes.items() if not re.search(unused, name)}
        untrained = (config.prompts == "chat" and config.decouple_router
                     and not any("router_" in name for name in found))
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
               if not (untrained and "router_" in name)}
        check_shapes(own, found, lambda name: weights.files.get(name, weights.main))
        for name in sorted(found, key=lambda name: -found[name][0]):  # the largest first: least beside it
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(weights.read(name, device, dtype)))
        if untrained:
            model.init_routers()
        model.trained_routers, model.stored_dtype = not untrained, weights.dtypes["model.embed_tokens.weight"]
        return model.eval()

    @classmethod
    def read_config(cls, folder):
        """(configuration, entries that are not the model's concern) of a checkpoint folder. Raises
        UserError."""
        values, others = read_config(folder)
        return merge(cls.config_class(), values, Path(folder) / "config.json"), others

    def save(self, folder):
        """Write config.json and the weights in the type that they have, each file atomically."""
        write_weights(folder, self.state_dict())
        self.save_config(folder)

    def save_config(self, folder):
        """Write config.json alone."""
        write_config(folder, self.config, self.others, self.model.embed_tokens.weight.dtype)

    def save_pretrained(self, folder):
        """`save`, for a model whose backbone transformers knows: it loads the folder as a plain Llama or
        Qwen3 with the same logits, and leaves the routers out. Raises UserError for a model that is not
        one."""
        if self.config.smear:
            raise UserError("model.smear is on: transformers has no such model; train without it, or use "
                            "save")
        self.save(folder)

    def load_tensors(self, tensors, path):
        """Fill the weights from `tensors`. Raises UserError that names the first tensor that does not fit."""
        own, found = ({name: tuple(x.shape) for name, x in state.items()}
                      for state in (self.state_dict(), tensors))
        check_shapes(own, found, lambda name: path)
        self.load_state_dict(tensors)

    def fingerprint(self):
        """16 hexadecimal digits that differ where what `encode` stores might: of the configuration and of up
        to 1,024 numbers a tensor, rounded to bfloat16, so that they are the same whatever type the weights
        are held in."""
        config = {name: value for name, value in asdict(self.config).items() if name not in ROUTING_ONLY}
        found = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8)
        for name, tensor in sorted(self.state_dict().items()):
            sample = tensor.flatten()[::max(1, tensor.numel() // 1024)].bfloat16().float().cpu().numpy()
            found.update(name.encode() + sample.tobytes())
        return found.hexdigest()

    def init_routers(self):
        """Memory layers route as they attend, but without RoPE: routers become the layer's own query and key
        maps, with the weights of QK-norm in them (what it divides by is normalised away)."""
        for i in self.config.memory_layers:
            attention = self.model.layers[i].self_attn
            for router, own, norm in ((attention.router_q_proj, attention.q_proj, attention.q_norm),
                                      (attention.router_k_proj, attention.k_proj, attention.k_norm)):
                scale = norm.weight[:, None] if self.config.qk_norm else 1
                maps = own.weight.detach().unflatten(0, (-1, self.config.head_dim)) * scale
                router[0].weight = nn.Parameter(maps.flatten(0, 1))

    def resize_vocabulary(self, size):
        """Grow the embedding (and the output matrix) to `size` tokens; new ones start at the mean of the
        others, and a little apart."""
        for module in [self.model.embed_tokens] + ([] if self.config.tie_word_embeddings else [self.lm_head]):
            if size > len(module.weight):
                old = module.weight.detach()
                noise = torch.randn(size - len(old), old.size(1), device=old.device, dtype=old.dtype)
                module.weight = nn.Parameter(torch.cat([old, old.mean(0) + 0.1 * old.std(0) * noise]))
        self.config = replace(self.config, vocab_size=len(self.model.embed_tokens.weight))


def check_shapes(own, found, file_of):
    """Raises UserError that names the first tensor whose shape is not the model's; both: name -> shape."""
    for name in sorted(own.keys() | found.keys()):
        if found.get(name) != own.get(name):
            raise UserError(f"{file_of(name)}: tensor {name} is {found.get(name, 'missing')}; "
                            f"the configuration says {own.get(name, 'absent')}")
