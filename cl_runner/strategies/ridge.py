"""Selection of the ridge penalty of a linear regression on held-out examples."""

import math

import torch
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-8, 9))  # to choose from


def best_ridge(inputs: Tensor, targets: Tensor) -> float:
    """The one of RIDGES with the smallest squared error on a random fifth of the examples when fitted to the others.

    `inputs`: [N, M]; `targets`: [N, K]. Solves with the smaller of the two Gram matrices; a ridge that leaves it
    singular is ruled out. The fifth is drawn from the global CPU generator.
    """
    order = torch.randperm(len(inputs)).to(inputs.device)
    count = max(1, len(inputs) // 5)
    held, fitted = order[:count], order[count:]
    known, queries = inputs[fitted], inputs[held]
    if len(known) <= inputs.shape[1]:  # fewer examples than dimensions
        gram, left, right = known @ known.T, queries @ known.T, targets[fitted]
    else:
        gram, left, right = known.T @ known, queries, known.T @ targets[fitted]
    eye = torch.eye(len(gram)).to(gram)

    def error(ridge: float) -> float:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
        if failed:
            return math.inf
        return (left @ torch.cholesky_solve(right, factor) - targets[held]).square().sum().item()

    return min(RIDGES, key=error)
