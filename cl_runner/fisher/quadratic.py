"""Sums of quadratics around anchors, merged where possible, with value and gradient in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cl_runner.fisher.curvature import Curvature
from cl_runner.models.model import Parameters

# Numbers in a dot product on the CPU. Over the largest layer of a ResNet-18 at once, float32 is off by 4e-5; in blocks
# of this size by 1e-7, in about the same time.
DOT = 65_536


@dataclass(frozen=True)
class Quadratic:
    """(w - anchor)' F (w - anchor) + constant, w the parameters that `anchor` names; F covers no others."""

    curvature: Curvature
    anchor: Parameters
    constant: Tensor  # non-negative scalar: how far apart the anchors merged into this one are

    def merged(self, other: "Quadratic") -> "Quadratic | None":
        """Both as a single quadratic, or None if their curvatures cannot be merged."""
        merged = self.curvature.merged(self.anchor, other.curvature, other.anchor)
        if merged is None:
            return None
        curvature, anchor, least = merged
        return Quadratic(curvature, anchor, self.constant + other.constant + least)

    def value_and_pull(self, parameters: Parameters) -> tuple[Tensor, Parameters]:
        """The value, a scalar, and F (w - anchor), half the gradient, by name."""
        delta = _difference(parameters, self.anchor)
        pull = self.curvature.product(delta)
        return torch.stack([self.constant, *_inner_products(pull, delta)]).sum(), pull


@dataclass(frozen=True)
class Penalty:
    """A sum of quadratics in a model's parameters; those that can be merged are one term, however many were added."""

    terms: tuple[Quadratic, ...] = ()

    def plus(self, curvature: Curvature, anchor: Parameters) -> "Penalty":
        """This penalty plus (w - anchor)' F (w - anchor); keeps `anchor`, which must be a copy of the live weights."""
        values = next(iter(anchor.values()), torch.zeros(()))
        added = Quadratic(curvature, anchor, values.new_zeros(()))
        for index, term in enumerate(self.terms):
            if (merged := term.merged(added)) is not None:
                return Penalty((*self.terms[:index], merged, *self.terms[index + 1 :]))
        return Penalty((*self.terms, added))

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The value at these parameters, a scalar; needs at least one term, and ignores parameters with no anchor.

        It can be differentiated once. Frozen parameters contribute to the value but get no gradient.
        """
        names = list(dict.fromkeys(name for term in self.terms for name in term.anchor))
        return _Sum.apply(self.terms, names, *(parameters[name] for name in names))


class _Sum(torch.autograd.Function):
    """Computes value and gradient together: both need F (w - anchor), which autograd would compute a second time."""

    @staticmethod
    def forward(ctx: Any, terms: tuple[Quadratic, ...], names: list[str], *parameters: Tensor) -> Tensor:
        live = dict(zip(names, parameters, strict=True))
        device = terms[0].constant.device.type
        with torch.autocast(device, enabled=False):  # half-precision matrix products would be off by 1 %
            values, pulls = zip(*(term.value_and_pull(live) for term in terms), strict=True)
            total: Parameters = pulls[0]
            for pull in pulls[1:]:
                for name, part in pull.items():
                    total[name] = total[name].add_(part) if name in total else part
        ctx.held = [needed and name in total for name, needed in zip(names, ctx.needs_input_grad[2:], strict=True)]
        ctx.save_for_backward(*(total[name] for name, held in zip(names, ctx.held, strict=True) if held))
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pulls = ctx.saved_tensors
        # New tensors: autograd adds the loss's own gradient to them in place.
        gradients = iter(torch.ops.aten._foreach_mul.Tensor(pulls, 2 * upstream) if pulls else ())
        return None, None, *(next(gradients) if held else None for held in ctx.held)


def _difference(parameters: Parameters, anchor: Parameters) -> Parameters:
    """parameters - anchor, for the names of `anchor`."""
    if not anchor:
        return {}
    live = [parameters[name] for name in anchor]
    return dict(zip(anchor, torch.ops.aten._foreach_sub.List(live, list(anchor.values())), strict=True))


def _inner_products(one: Parameters, other: Parameters) -> list[Tensor]:
    """Scalars that sum to the inner product of both over the names of `one`."""
    pairs = [_flat(values, other[name]) for name, values in one.items()]
    if not pairs or not pairs[0][0].is_cuda:
        return [torch.dot(*blocks) for a, b in pairs for blocks in zip(a.split(DOT), b.split(DOT), strict=True)]
    # Two copies cost less than one kernel launch per parameter.
    ones, others = zip(*pairs, strict=True)
    return [torch.dot(torch.cat(ones), torch.cat(others))]


def _flat(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten both in the memory order of `one`: no copy if they share it, channels_last included."""
    order = sorted(range(one.dim()), key=one.stride, reverse=True)
    return one.permute(order).flatten(), other.permute(order).flatten()


# Checkpoints are read with `weights_only=True`, which builds no class that is not named here.
torch.serialization.add_safe_globals([Quadratic, Penalty])
