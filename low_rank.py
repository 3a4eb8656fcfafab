"""Low-rank changes of a model whose own weights stay as they are (LoRA, arXiv 2106.09685).

    add_factors(model, rank)         # before training: maps of the upper layers become W + up @ down
    factors(model)                   # name -> tensor: all that training changes
    merge_factors(model)             # afterwards: one matrix again, so that reading costs nothing more

A layer below the first changed one gets no gradient, and keeps nothing for one.
"""
import torch
import torch.nn.functional as F
from torch import nn


class LowRank(nn.Linear):
    """A map with a change of low rank: W in its own type, down (rank, inputs) and up (outputs, rank) in
    float32."""

    def forward(self, x):
        """x: (..., inputs) -> (..., outputs), in x's type."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        return F.linear(x, self.weight) + F.linear(F.linear(x, down), up)


def add_factors(model, rank):
    """Freeze a model, and give every map of the upper two thirds of its layers, routers aside, factors that
    begin as a change of nothing."""
    model.requires_grad_(False)
    layers = model.model.layers
    for layer in layers[len(layers) // 3:]:
        for name, module in layer.named_modules():
            if type(module) is nn.Linear and "router_" not in name:
                module.__class__, device = LowRank, module.weight.device
                outputs, inputs = module.weight.shape
                bound = inputs ** -0.5
                module.down = nn.Parameter(torch.empty(rank, inputs, device=device).uniform_(-bound, bound))
                module.up = nn.Parameter(torch.zeros(outputs, rank, device=device))


def factors(model):
    """The factors of a model, name -> tensor; {} where it has none."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if name.rpartition(".")[2] in ("down", "up")}


@torch.no_grad()
def merge_factors(model):
    """Turn every W + up @ down into one matrix of W's type; the sum is taken in float32."""
    for module in model.modules():
        if isinstance(module, LowRank):
            module.weight.copy_(module.weight.float() + module.up @ module.down)
            del module.down, module.up
            module.__class__ = nn.Linear
    model.requires_grad_(True)
