"""Sums of squared matrix products, in pieces that fit into a cache: the arithmetic behind the layers' rules."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cl_runner.gradients import kernels
from cl_runner.gradients.kernels import Precision

# Numbers in a temporary on the CPU: part of a core's second-level cache.
CACHE = 1 << 17
# Numbers in a weight up to which its product is not split: smaller products are slower.
WHOLE = 1 << 20
# Numbers in a temporary that is too large for any cache anyway.
ROOM = 1 << 24


def gram_is_cheaper(positions: int, passes: int, device: torch.device) -> bool:
    """Whether it is cheaper to multiply all pairs of positions once than the positions in every pass.

    Counting multiplications per element of the weight: T (T + 1) against, per pass, 2 T plus the cost of squaring and
    adding the product, which is memory traffic worth about thirty. A kernel that squares in registers has no such cost.
    """
    if kernels.available(device):
        return positions <= 3
    return positions <= 64 and positions * (positions + 1) <= passes * (2 * positions + 30)


def rounded(values: Tensor, precision: Precision) -> Tensor:
    """Round to `precision` as the kernels do: with its loss, but without its speed."""
    if precision == "bf16":
        return values.bfloat16().to(values.dtype)
    if precision == "tf32" and values.dtype == torch.float32:
        return ((values.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return values


def slices(length: int, numbers: int, room: int | None = None) -> Iterator[slice]:
    """Slices whose temporaries, of `numbers` per element, fit into `room` (None: a cache's), or of one element."""
    size = max(1, (CACHE if room is None else room) // max(1, numbers))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def pairs(rows: Tensor, weighted: bool = False, onto: Tensor | None = None) -> Tensor:
    """r_t r_t' for t <= t', [b, T (T + 1) / 2, N], of `rows` [b, T, N]; `weighted`: twice where t < t'; plus `onto`."""
    positions = rows.shape[1]
    if positions == 1:
        return rows.square() if onto is None else onto.addcmul_(rows, rows)
    first, second = torch.triu_indices(positions, positions, device=rows.device)
    found = rows[:, first] * rows[:, second]
    if weighted:
        found.mul_((1 + (first != second)).to(found)[:, None])
    return found if onto is None else onto.add_(found)


def add_gram(total: Tensor, held: Tensor, inputs: Callable[[slice], Tensor]) -> None:
    """Add `held` [B, P, N] times the pairs of `inputs` (a slice -> [b, T, K]), over samples and pairs, to `total`."""
    total = total.view(held.shape[2], -1)
    for some in slices(len(held), held[0].numel() + held.shape[1] * total.shape[1], room=ROOM):
        total.addmm_(held[some].flatten(0, 1).t(), pairs(inputs(some)).flatten(0, 1))
    if held.shape[1] > 1:
        total.clamp_min_(0)  # rounding can leave small negative numbers


def add_product_squares(total: Tensor, gradients: Tensor, inputs: Tensor) -> None:
    """Add Σ_b (Σ_t g_bt x_bt)² to `total`, N K numbers, from `gradients` [B, T, N] and `inputs` [B, T, K]."""
    total = total.view(gradients.shape[2], -1)
    if total.device.type != "cpu":
        for some in slices(len(gradients), total.numel(), room=ROOM):
            total += torch.bmm(gradients[some].transpose(1, 2), inputs[some]).square_().sum(0)
        return
    # By columns where the whole product would leave the cache before it is squared.
    whole = total.numel() <= WHOLE
    for columns in [slice(None)] if whole else slices(total.shape[1], total.shape[0]):
        part = total[:, columns]
        scratch = torch.empty_like(part, memory_format=torch.contiguous_format)
        for g, x in zip(gradients, inputs[:, :, columns], strict=True):
            torch.mm(g.t(), x, out=scratch)
            part.addcmul_(scratch, scratch)


def add_squares(total: Tensor, gradients: Tensor) -> None:
    """Add the squares of `gradients` [B, ...], summed over samples, to `total`, which may have another shape."""
    total += torch.linalg.vecdot(gradients.flatten(1), gradients.flatten(1), dim=0).view_as(total)
