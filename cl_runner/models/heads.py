"""How a layer's rows are initialised, and how a head's are held fixed until a loss reaches them."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["torch", "xavier", "truncated_normal"]


def draw(linear: nn.Linear, init: Init, generator: torch.Generator, rows: Tensor | None = None) -> None:
    """Draw `linear`'s weight and bias, or only the `rows` [K] (bool) of them.

    torch: uniform in ±1/sqrt(fan_in), bias too (PyTorch's own default); xavier: uniform in ±sqrt(6/(fan_in +
    fan_out)), zero bias (Glorot & Bengio, 2010); truncated_normal: std 0.02, cut at two std, zero bias. Drawn on the
    CPU, so that a seed gives the same weights on every device.
    """
    weight = torch.empty(linear.weight.shape)
    bias = torch.zeros(linear.out_features)
    if init == "torch":
        bound = 1 / math.sqrt(linear.in_features)
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=generator)
    elif init == "xavier":
        nn.init.xavier_uniform_(weight, generator=generator)
    else:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04, generator=generator)
    with torch.no_grad():
        chosen = slice(None) if rows is None else rows.cpu()
        linear.weight[chosen] = weight[chosen].to(linear.weight)
        if linear.bias is not None:
            linear.bias[chosen] = bias[chosen].to(linear.bias)


def keep_unreached_rows(head: nn.Linear, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """From now on, exempt the head's rows from the optimizer's weight decay until a loss term reaches them.

    Decay pulls all weights towards zero, and so would forget the outputs of tasks that the loss does not see, without
    any gradient. Momentum cannot move them as long as the optimizer's state starts empty. Returns the rows reached so
    far, one [K, 1] or [K] bool per parameter: the live tensors, which may be overwritten on a resume.
    """
    if not any(group.get("weight_decay") for group in optimizer.param_groups):
        return []
    held = [parameter for parameter in head.parameters() if parameter.requires_grad]
    reached = {parameter: torch.zeros_like(_row_sums(parameter), dtype=torch.bool) for parameter in held}
    before: dict[Tensor, Tensor] = {}

    def remember(*_: object) -> None:
        for parameter in held:
            before[parameter] = parameter.detach().clone()
            if parameter.grad is not None:
                reached[parameter] |= _row_sums(parameter.grad) != 0

    def restore(*_: object) -> None:
        with torch.no_grad():
            for parameter in held:
                parameter.copy_(torch.where(reached[parameter], parameter, before[parameter]))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)
    return list(reached.values())


def per_row(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` [K], shaped to broadcast along the first dimension of `like` [K, ...]."""
    return rows.view(-1, *[1] * (like.dim() - 1))


def _row_sums(values: Tensor) -> Tensor:
    """Sum of magnitudes of each row: [K, D] -> [K, 1], [K] -> [K]."""
    return values.abs().sum(1, keepdim=True) if values.dim() == 2 else values.abs()
