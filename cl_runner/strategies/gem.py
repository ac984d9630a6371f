"""Gradient episodic memory (Lopez-Paz & Ranzato, 2017, arXiv 1706.08840)."""

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from cl_runner.memory.base import Memory
from cl_runner.strategies.inference import float64_device
from cl_runner.strategies.rehearsal import Rehearsal
from cl_runner.streams.base import Examples

CHUNK = 2**20  # elements of each gradient converted to double precision at a time


class GEM(Rehearsal):
    """Step along the nearest direction that, to first order, increases no earlier task's loss on its memory.

    A task's rows are chosen at its end, and every step uses all of them; the paper keeps each task's last ones
    (memory.keep=newest memory.share=task). The margin is added to the solution of the dual, as in the paper; the
    authors' code solves for v >= margin instead, a smaller correction.
    """

    def __init__(self, *, memory: Memory, margin: NonNegativeFloat = 0.5) -> None:
        """`margin`: added to the solution of the dual (the paper's memory strength γ): favours earlier tasks."""
        super().__init__(memory=memory, store="task")
        self.margin = margin

    def with_replay(self, batch: Examples) -> Examples:
        return batch

    def after_backward(self) -> None:
        if not len(self.memory):
            return
        held = self.memory.examples.to(self.model.device)
        past = [held[held.task_ids == task] for task in held.task_ids.unique().tolist()]
        learning = self.learning
        own = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in learning])
        found = project(own, torch.stack([_flat(self.gradient(rows)) for rows in past]), self.margin)
        for parameter, part in zip(learning, found.split([p.numel() for p in learning]), strict=True):
            # In the weight's own memory order, which fused optimizers take for granted.
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))


def project(gradient: Tensor, constraints: Tensor, margin: float = 0.0) -> Tensor:
    """The vector nearest to `gradient` [P] whose product with no row of `constraints` [T, P] is negative (eq. 8-11).

    If that differs from the gradient, `margin` times the sum of the constraints is added.
    """
    products = _products(torch.cat([constraints, gradient[None]]), constraints)  # [T + 1, T]
    gram, against = products[:-1], products[-1]
    if not np.isfinite(products).all() or (against >= 0).all():  # a loss that is not finite stops the run elsewhere
        return gradient
    weights = torch.from_numpy(solve_dual(gram, against) + margin).to(gradient)
    return gradient + weights @ constraints


def solve_dual(gram: np.ndarray, against: np.ndarray) -> np.ndarray:
    """The v >= 0 [T] that minimises v' gram v / 2 + against' v, where `against` [T] lies in the range of `gram` [T, T].

    As non-negative least squares: |A v - b| with A'A = gram and A'b = -against.
    """
    from scipy.optimize import nnls  # slow to import, and needed only here

    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    roots, vectors = np.sqrt(values[kept]), vectors[:, kept]
    return nnls(roots[:, None] * vectors.T, -(vectors.T @ against) / roots)[0]


def _products(rows: Tensor, columns: Tensor) -> np.ndarray:
    """rows @ columns.T in double precision, in chunks."""
    pieces = zip(rows.split(CHUNK, 1), columns.split(CHUNK, 1), strict=True)
    place = float64_device(rows.device)
    return torch.stack([a.to(place).double() @ b.to(place).double().T for a, b in pieces]).sum(0).cpu().numpy()


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
