"""What helps tiny models that are trained from scratch; pretrained backbones need none of it. Off by default.

results/README.md says what each of these brings: the demo trained without it. None is in the paper.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from common import UserError
from msa_kernel import chunk_offsets, pool_chunks


@dataclass
class ScratchConfig:
    number_chunk: int = 0  # tokens of a closing number that have a chunk of their own; 5 with number tokens
    normalize_values: bool = False  # pooled values get unit RMS per head: the mean of many is small
    score_bias: bool = False  # memory attention adds (a document's score - the best one) / tau to its logits
    copy_init: bool = False     # memory layers start as copiers of what they attend to
    equal_routers: bool = False  # routing query and key maps start equal, so that like finds like

    def __post_init__(self):
        super().__post_init__()
        if self.equal_routers and not self.decouple_router:
            raise UserError("model.equal_routers is on, but without model.decouple_router there are no "
                            "routers; leave it out")


class Scratch:
    """The methods of model.PaperMSA that these options change."""

    def init_weights(self):
        super().init_weights()
        if self.config.copy_init:
            copy_init(self)
        if self.config.equal_routers:
            for i in self.config.router_layers:
                attention = self.model.layers[i].self_attn
                start_equal(attention.router_q_proj[0], attention.router_k_proj[0], attention)

    def chunk_offsets(self, lengths):
        if int(lengths.min()) < self.config.number_chunk:
            raise ValueError("encode found a document shorter than its closing number, "
                             f"{self.config.number_chunk} tokens")
        return chunk_offsets(lengths, self.config.chunk_size, self.config.number_chunk)

    def pool(self, keys, values, routing_keys, lengths):
        config = self.config
        keys, values, routing_keys = pool_chunks(keys, values, routing_keys, lengths, config.chunk_size,
                                                 config.number_chunk, config.normalize_routing)
        if config.normalize_values and values is not None:
            values = F.rms_norm(values, values.shape[-1:])
        return keys, values, routing_keys

    def memory_bias(self, selection):
        if not self.config.score_bias:
            return None
        behind_the_best = selection.slot_scores - selection.scores.amax(1, keepdim=True)
        return behind_the_best / self.config.router_temperature


def copy_init(model):
    """normal(0, E ** -0.5), output projections zero, but in memory layers v_proj orthogonal and o_proj its
    transpose.

    What attention brings is then the token that it looks at: with GPT-2's initialisation at width 128 the
    largest logit that a copy can produce is about 2.5, and a token's identity does not get through.
    """
    E = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0 if is_output else E ** -0.5)
    for i in model.config.memory_layers:
        attention = model.model.layers[i].self_attn
        nn.init.orthogonal_(attention.v_proj.weight, gain=0.5)
        values = attention.v_proj.weight.data.view(attention.kv_heads, 1, -1, E)
        outputs = attention.o_proj.weight.data.view(E, attention.kv_heads, -1, attention.head_dim)
        outputs.copy_(values.permute(3, 0, 1, 2).expand_as(outputs))


def start_equal(queries, keys, attention):
    """Give the query map of every head the key map of its group; both are nn.Linear."""
    _, groups, size = attention.routing_shape
    shape = (groups, -1, size, keys.in_features)
    queries.weight.data.view(shape).copy_(keys.weight.data.view(shape).expand_as(queries.weight.view(shape)))
