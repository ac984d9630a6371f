"""Learning-rate schedules within a task. Each takes the optimizer and the task's number of steps."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR


def constant(*, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The optimizer's own rate throughout."""
    return ConstantLR(optimizer, factor=1.0, total_iters=1)


def cosine(*, optimizer: Optimizer, steps: int, final: NonNegativeFloat = 0.0) -> LRScheduler:
    """Half a cosine from the optimizer's rate to `final` at the task's end (Loshchilov & Hutter, 2017, eq. 5)."""
    return CosineAnnealingLR(optimizer, T_max=steps, eta_min=final)


def step(
    *,
    optimizer: Optimizer,
    steps: int,
    milestones: list[Annotated[float, Field(gt=0, lt=1)]],
    gamma: PositiveFloat = 0.1,
) -> LRScheduler:
    """Multiply the rate by `gamma` at each of `milestones`, fractions of the task's steps, not before the first."""
    return MultiStepLR(optimizer, [max(1, round(share * steps)) for share in milestones], gamma)
