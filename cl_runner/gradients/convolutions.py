"""Per-sample gradients of convolutions with any stride, dilation and groups; depthwise and pointwise separately."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.gradients import kernels
from cl_runner.gradients.kernels import Adder
from cl_runner.gradients.layers import Linear, Uncovered, Use, Weighted
from cl_runner.gradients.products import (
    ROOM,
    add_gram,
    add_product_squares,
    add_squares,
    gram_is_cheaper,
    pairs,
    rounded,
    slices,
)
from cl_runner.models.model import Parameters

# Positions from which, on the CPU, a convolution's own backward on one sample beats a product over its patches.
FEW = 128
# On the CPU, a kernel with more numbers than this is split by rows, if none of them has more than this.
PART = 1 << 18


@dataclass(frozen=True)
class Call:
    """How a convolution is called."""

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether it is a linear layer over positions."""
        return self.groups == 1 and prod(self.weight.shape[2:]) == 1 and not any(self.padding)

    @property
    def depthwise(self) -> bool:
        return self.weight.dim() == 4 and self.weight.shape[:2] == (self.groups, 1)

    def weight_gradient(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """The ordinary weight gradient, summed over samples."""
        return torch.ops.aten.convolution_backward(
            gradient,
            inputs,
            self.weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [False, True, False],
        )[1]


def strided(
    weight: Tensor,
    axes: int,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Call:
    """A convolution's call from its function's arguments, with one number per axis.

    Raises Uncovered for padding that differs between the two sides.
    """

    def every(value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * axes if len(values) == 1 else values

    dilation = every(dilation)
    if padding == "valid":
        padding = 0
    if padding == "same":
        reach = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        if any(total % 2 for total in reach):
            raise Uncovered("a convolution that pads one side more than the other")
        padding = [total // 2 for total in reach]
    assert not isinstance(padding, str)
    return Call(weight, every(stride), every(padding), dilation, groups)


class Convolution(Weighted):
    """Any convolution: the ordinary gradient of each sample separately, or a product over its patches."""

    def __init__(self, names: dict[str, str], inputs: Tensor, call: Call) -> None:
        super().__init__(names, inputs)
        self.call = call

    @staticmethod
    def of(names: dict[str, str], inputs: Tensor, call: Call) -> Use:
        """The cheapest rule for this call."""
        if call.pointwise:
            return Pointwise(names, inputs, call)
        return Depthwise(names, inputs, call) if call.depthwise else Convolution(names, inputs, call)

    def per_sample(self, gradient: Tensor) -> Parameters:
        found = {}
        if "weight" in self.names:
            each = [self.call.weight_gradient(*some) for some in self._alone(gradient)]
            found[self.names["weight"]] = torch.stack(each)
        if "bias" in self.names:
            found[self.names["bias"]] = gradient.flatten(2).sum(2)
        return found

    def add_squares(self, gradient: Tensor, totals: Parameters) -> None:
        if "bias" in self.names:
            add_squares(totals[self.names["bias"]], gradient.flatten(2).sum(2))
        if "weight" not in self.names:
            return
        dense = self.call.groups == 1 and self.call.weight.dim() == 4
        if kernels.available(gradient.device) and self.call.weight.dim() <= 4:
            self.waiting.append(gradient)
        elif dense and gram_is_cheaper(gradient[0, 0].numel(), self.passes, gradient.device):
            self.held = pairs(gradient.flatten(2).transpose(1, 2), weighted=True, onto=self.held)
        else:
            self.add_weight_squares(totals[self.names["weight"]], gradient)

    def add_fused_squares(self, total: Tensor, gradients: Tensor, rival: Adder) -> None:
        call, weight = self.call, self.call.weight.shape
        kernels.add_conv_squares(
            total.view(*weight[:2], *_pair(weight[2:])),
            gradients.view(*gradients.shape[:3], *_pair(gradients.shape[3:])),
            self.inputs.view(*self.inputs.shape[:2], *_pair(self.inputs.shape[2:])),
            _pair(call.stride),
            _pair(call.padding, absent=0),
            _pair(call.dilation),
            call.groups,
            self.precision,
            lambda total: rival(total.view(weight)),
        )

    def close(self, totals: Parameters) -> None:
        if self.held is not None:
            add_gram(totals[self.names["weight"]], self.held, self.patches)
            self.held = None

    def add_weight_squares(self, total: Tensor, gradient: Tensor) -> None:
        positions = gradient[0, 0].numel()
        cpu = gradient.device.type == "cpu"
        if self.call.weight.dim() != 4 or (cpu and positions >= FEW):
            each = (self.call.weight_gradient(*some) for some in self._alone(gradient))
            squared = next(each).square()  # in the layout of the gradients, which need not be the total's
            for values in each:
                squared.addcmul_(values, values)
            total += squared.reshape(total.shape)
        elif self.call.groups > 1:
            for some in slices(len(gradient), total.numel(), room=None if cpu else ROOM):
                total += self._grouped(gradient[some], some).square_().sum(0).view_as(total)
        elif cpu and total.numel() // self.call.weight.shape[2] <= PART < total.numel():
            self._add_by_rows(total.view(self.call.weight.shape), rounded(gradient, self.precision))
        else:
            rows = rounded(gradient.flatten(2).transpose(1, 2), self.precision)
            for some in slices(len(rows), self.call.weight[0].numel() * positions, room=ROOM):
                add_product_squares(total, rows[some], self.patches(some))

    def _add_by_rows(self, total: Tensor, gradient: Tensor) -> None:
        """Add one row of the kernel at a time: products stay in the cache, and few patches are in memory at once."""
        outputs, channels, height, width = total.shape
        rows = gradient.permute(0, 2, 3, 1).flatten(1, 2)  # [B, T, N]
        padded, size = self._padded(), gradient.shape[2:]
        for row in range(height):
            taps = [self._window(padded, size, row, column).permute(0, 2, 3, 1) for column in range(width)]
            squares = total.new_zeros(outputs, width * channels)
            add_product_squares(squares, rows, rounded(torch.cat(taps, 3).flatten(1, 2), self.precision))
            total[:, :, row] += squares.view(outputs, width, channels).transpose(1, 2)

    def _padded(self) -> Tensor:
        """The input of a two-dimensional convolution, zero-padded."""
        vertical, horizontal = self.call.padding
        return F.pad(self.inputs, (horizontal, horizontal, vertical, vertical))

    def _window(self, padded: Tensor, size: Sequence[int], *tap: int) -> Tensor:
        """What one tap of the kernel sees of `padded` at every position of an output of this `size`."""
        for axis, place in enumerate(tap):
            stride, first = self.call.stride[axis], place * self.call.dilation[axis]
            steps = slice(first, first + stride * (size[axis] - 1) + 1, stride)
            padded = padded[(slice(None),) * (axis + 2) + (steps,)]
        return padded

    def _grouped(self, gradient: Tensor, some: slice) -> Tensor:
        """Per-sample weight gradients, [b, groups, N / groups, K], of the samples in `some`."""
        patches = self.patches(some).unflatten(2, (self.call.groups, -1))  # [b, T, groups, K]
        gradient = rounded(gradient.flatten(2), self.precision)
        rows = gradient.unflatten(1, (self.call.groups, -1))  # [b, groups, N / groups, T]
        return rows @ patches.transpose(1, 2)

    def _alone(self, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, gradient = (rounded(values, self.precision) for values in (self.inputs, gradient))
        for index in range(len(gradient)):
            yield inputs[index : index + 1], gradient[index : index + 1]

    def patches(self, some: slice) -> Tensor:
        """What the kernel saw at every position, [b, T, K]."""
        call = self.call
        kernel = call.weight.shape[2:]
        inputs = rounded(self.inputs[some], self.precision)
        return F.unfold(inputs, kernel, call.dilation, call.padding, call.stride).transpose(1, 2)  # type: ignore[arg-type]


class Pointwise(Linear):
    """A 1 x 1 convolution: a linear layer over the pixels that it sees."""

    def __init__(self, names: dict[str, str], inputs: Tensor, call: Call) -> None:
        super().__init__(names, inputs)
        seen = self.inputs
        if max(call.stride) > 1:
            seen = seen[(slice(None), slice(None), *(slice(None, None, step) for step in call.stride))]
        self.rows = seen.flatten(2).transpose(1, 2)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(2).transpose(1, 2)

    def per_sample(self, gradient: Tensor) -> Parameters:
        found = super().per_sample(gradient)
        if "weight" in self.names:
            weight = found[self.names["weight"]]
            found[self.names["weight"]] = weight[(..., *[None] * (gradient.dim() - 2))]
        return found


class Depthwise(Convolution):
    """A depthwise convolution: a weight's gradient is the product of two images, one of them shifted."""

    def per_sample(self, gradient: Tensor) -> Parameters:
        found = {}
        if "weight" in self.names:
            found[self.names["weight"]] = self._shifted(gradient)
        if "bias" in self.names:
            found[self.names["bias"]] = gradient.flatten(2).sum(2)
        return found

    def add_weight_squares(self, total: Tensor, gradient: Tensor) -> None:
        few_taps = self.call.weight[0].numel() <= 9  # with more, its own backward is slow
        large = gradient[0, 0].numel() >= 2 * FEW and few_taps
        large &= gradient.is_contiguous(memory_format=torch.channels_last)
        if gradient.device.type == "cpu" and large:
            super().add_weight_squares(total, gradient)
        else:
            add_squares(total, self._shifted(gradient))

    def _shifted(self, gradient: Tensor) -> Tensor:
        """[B, C, 1, h, w]."""
        if gradient.device.type == "cpu" and not gradient.is_contiguous(memory_format=torch.channels_last):
            return self._as_one_image(gradient)
        padded = self._padded()
        found = gradient.new_empty(*self.call.weight.shape[2:], *gradient.shape[:2])
        for row, of_row in enumerate(found):
            for column, out in enumerate(of_row):
                torch.sum(gradient * self._window(padded, gradient.shape[2:], row, column), (2, 3), out=out)
        return found.permute(2, 3, 0, 1)[:, :, None]

    def _as_one_image(self, gradient: Tensor) -> Tensor:
        """Concatenate all samples' channels into one image, whose ordinary gradient is then per sample."""
        batch, channels = gradient.shape[:2]
        weight = self.call.weight.expand(batch, *self.call.weight.shape).flatten(0, 1)
        call = Call(weight, self.call.stride, self.call.padding, self.call.dilation, batch * channels)
        found = call.weight_gradient(
            self.inputs.contiguous().flatten(0, 1)[None], gradient.contiguous().flatten(0, 1)[None]
        )
        return found.unflatten(0, (batch, channels))


def _pair(values: Sequence[int], absent: int = 1) -> tuple[int, int]:
    """Values for two axes. A one-dimensional convolution is treated as one over images of a single row."""
    height, width = (absent, *values)[-2:]
    return height, width
