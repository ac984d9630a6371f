"""Squared per-sample gradients by `torch.func`: one forward a sample, shared by all its backwards, under `vmap`."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from cl_runner.fisher.curvature import Parameters
from cl_runner.models.model import Model, PretrainedView

# All gradients of one vmap call together, in numbers.
BUDGET = 64_000_000
# On the CPU, the largest parameter's share of them, in bytes. Much more comes afresh from the kernel at every call, and
# the page faults cost more than the arithmetic: a pass of an MLP 0.45 against 1.04 ms, of a ResNet-18 31 against 68.
CPU_BLOCK = 16_000_000


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode and every buffer is as it was, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, content in buffers:
            setattr(module, name, buffer)
            if not torch.equal(buffer, content):  # an expanded buffer cannot be written to, and does not change
                buffer.copy_(content)


class SquaredGradients:
    """The running sum over units of Σ_v (vᵀ ∂z/∂θ)², z a unit's logits and v its output vectors.

    A unit is a sample, or a whole batch. Every trainable parameter takes part, by the name it has in `model`; what a
    vector does not reach gets zeros. The live parameters are not touched, nor their `.grad` or `requires_grad`.
    """

    def __init__(self, model: Model | PretrainedView) -> None:
        live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._logits = _Logits(model)
        self._parameters = {f"model.{name}": parameter.detach() for name, parameter in live.items()}
        # Sixty thousand additions in float32 would cost the fifth digit; MPS has nothing wider.
        wide = torch.float32 if model.device.type == "mps" else torch.float64
        self._sums = {name: torch.zeros_like(values, dtype=wide) for name, values in self._parameters.items()}
        self._units = 0
        self._most = _most_gradients(self._parameters)

    def add(self, inputs: Tensor, passes: int, vectors: Callable[[slice], Tensor], together: bool = False) -> None:
        """Add a batch's units.

        Args:
            inputs: [B, C, H, W] float, preprocessed.
            passes: V, the vectors a sample.
            vectors: the output vectors of the samples in a slice of the batch, [b, V, K]; asked for a few samples at
                a time, since those of a whole batch can be larger than the model (V = K = 1000).
            together: the batch is one unit: its gradient is that of Σ_b v_b · z_b.
        """
        self._units += 1 if together else len(inputs)
        if not self._parameters:
            return
        partial = {name: torch.zeros_like(values) for name, values in self._parameters.items()}
        most = len(inputs) if together else max(1, self._most // max(1, passes))
        for rows in _even_slices(len(inputs), most):
            images, outputs = inputs[rows], vectors(rows)
            if outputs.shape[1] == 0:  # a lone output has nothing to be told apart from
                continue
            # [units, samples a unit, C, H, W] and [units, V, samples a unit, K]
            images = images[None] if together else images[:, None]
            outputs = outputs.transpose(0, 1)[None] if together else outputs[:, :, None]
            for some in outputs.split(self._most, dim=1):
                for name, gradients in _vmapped(self._gradients, images, some).items():
                    _add_squares(partial[name], gradients)
        for name, values in partial.items():
            self._sums[name] += values

    def mean(self) -> Parameters:
        """The sums over the number of units, in the parameters' own dtype."""
        return {
            name.removeprefix("model."): (total / self._units).to(self._parameters[name].dtype)
            for name, total in self._sums.items()
        }

    def _gradients(self, inputs: Tensor, vectors: Tensor) -> Parameters:
        """Of one unit: `inputs` [n, C, H, W], `vectors` [V, n, K] -> [V, ...] for every parameter."""
        pull = vjp(lambda parameters: functional_call(self._logits, parameters, (inputs,)), self._parameters)[1]
        return vmap(pull)(vectors)[0]


class _Logits(nn.Module):
    """A model from preprocessed inputs to logits, so that preprocessing runs once a batch and outside `vmap`."""

    def __init__(self, model: Model | PretrainedView) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.encode(inputs).logits


def _vmapped(gradients: Callable[[Tensor, Tensor], Parameters], inputs: Tensor, vectors: Tensor) -> Parameters:
    with warnings.catch_warnings():
        # Pooling of channels_last images has no batching rule in vmap: slower, no less right, nothing a user can help.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return vmap(gradients)(inputs, vectors)


def _most_gradients(parameters: Parameters) -> int:
    """How many gradients one vmap call may hold."""
    if not parameters:
        return 1
    most = BUDGET // max(1, sum(values.numel() for values in parameters.values()))
    if next(iter(parameters.values())).device.type == "cpu":
        most = min(most, CPU_BLOCK // max(1, max(values.nbytes for values in parameters.values())))
    return max(1, most)


def _even_slices(length: int, most: int) -> Iterator[slice]:
    """As few slices as can be, none longer than `most`, as equal as can be."""
    size = math.ceil(length / math.ceil(length / most))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    """Add the squares of `gradients` [b, V, ...] to `total` [...]; never in place on them, since vmap's may alias."""
    rows = gradients.flatten(0, 1)
    if total.device.type != "cpu":
        total += rows.square().sum(0)
        return
    for row in rows:  # no temporary of the gradients' size: 0.50 against 0.66 ms a pass of an MLP
        total.addcmul_(row, row)
