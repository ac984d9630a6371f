"""Other packages that compute a diagonal Fisher in PyTorch, each used as its documentation says.

A peer is prepared once for a network, outside all timing. It then maps preprocessed images and labels [B] to the
diagonal, summed over the samples, by the network's parameter names. Its network is a copy in eval mode of the measured
one, without in-place activations, which several of these libraries cannot handle. Parameters that a library omits are
missing from its result, and what it refuses it raises.
"""

# The packages are in the extra `bench`, which nothing else needs.
# pyright: reportMissingImports=false

import copy
import importlib.metadata
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_runner.fisher.curvature import Diagonal
from cl_runner.models.model import Model, Parameters
from cl_runner.streams.base import Examples

Sums = Callable[[Tensor, Tensor], Parameters]  # images [B, C, H, W] float, labels [B] -> the sum over samples
Estimate = Callable[[Examples], Diagonal]
Call = Callable[[], Estimate]  # prepares, and may raise
Estimates = Literal["empirical", "sampled", "products", "exact"]

DRAWS = 32  # whose mean is compared with `exact`
PRODUCTS = 10  # with the matrix, for curvlinops' estimate
# The largest parameter's share of the gradients that vmap holds, in bytes. Beyond it page faults cost more than vmap
# saves: a ResNet-18 is twice as fast with one sample at a time as with eight.
BLOCK = 16_000_000


@dataclass(frozen=True)
class Peer:
    """Another way to compute an estimate.

    package: the distribution it comes from; None: plain PyTorch. prepare: ways to set its library up for a network, the
    later ones for networks that the earlier ones cannot handle. draws: for a random peer, the number of calls whose
    mean is compared with `exact`.
    """

    name: str
    package: str | None
    estimates: Estimates
    prepare: tuple[Callable[[nn.Module], Sums], ...]
    draws: int = 1

    @property
    def title(self) -> str:
        if self.package is None:
            return self.name
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}: {self.name}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package}: {self.name}"

    def ways(self, model: Model, batch_size: int) -> Iterator[Call]:
        """Every way to run on `model`, first in its own memory layout, then in NCHW."""
        for prepare in self.prepare:
            yield lambda prepare=prepare: _bound(prepare, model, batch_size, contiguous=False)
            yield lambda prepare=prepare: _bound(prepare, model, batch_size, contiguous=True)


def _bound(prepare: Callable[[nn.Module], Sums], model: Model, batch_size: int, contiguous: bool) -> Estimate:
    parts = OrderedDict(backbone=copy.deepcopy(model.backbone), head=copy.deepcopy(model.head))
    network, preprocess = nn.Sequential(parts).eval(), copy.deepcopy(model.preprocess).eval()
    if contiguous:
        network.to(memory_format=torch.contiguous_format)
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            vars(module)["inplace"] = False
    sums = prepare(network)

    def estimate(examples: Examples) -> Diagonal:
        total: Parameters = {}
        for batch in examples.batches(batch_size):
            images = preprocess(batch.images)
            for name, values in sums(images.contiguous() if contiguous else images, batch.labels).items():
                total[name] = total[name].add_(values) if name in total else values
        return Diagonal(total).scaled(1 / len(examples))

    return estimate


def loop(network: nn.Module) -> Sums:
    """One sample at a time, as in van de Ven's and Mammoth's code."""

    def sums(images: Tensor, labels: Tensor) -> Parameters:
        total = {name: torch.zeros_like(values) for name, values in network.named_parameters()}
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            network.zero_grad(set_to_none=True)
            F.cross_entropy(network(image), label).backward()
            for name, parameter in network.named_parameters():
                if parameter.grad is not None:
                    total[name] += parameter.grad.square()
        return total

    return sums


def loop_over_classes(network: nn.Module) -> Sums:
    """One sample and one class at a time: E_c (∂ log p_c)², as van de Ven's code does for `exact`."""

    def sums(images: Tensor, labels: Tensor) -> Parameters:
        parameters = {name: values for name, values in network.named_parameters() if values.requires_grad}
        total = {name: torch.zeros_like(values) for name, values in parameters.items()}
        for image in images.split(1):
            log_p = network(image).log_softmax(1)[0]
            for number, weight in enumerate(log_p.exp().tolist(), start=1):
                more = number < len(log_p)
                gradients = torch.autograd.grad(log_p[number - 1], list(parameters.values()), retain_graph=more)
                for name, gradient in zip(parameters, gradients, strict=True):
                    total[name].addcmul_(gradient, gradient, value=weight)
        return total

    return sums


def functional(network: nn.Module) -> Sums:
    """`vmap(grad(...))` over the fastest number of samples at a time."""
    parameters = {name: values.detach() for name, values in network.named_parameters() if values.requires_grad}
    chunk = _chunk(parameters)

    def loss(values: Parameters, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, values, (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    def sums(images: Tensor, labels: Tensor) -> Parameters:
        total = {name: torch.zeros_like(values) for name, values in parameters.items()}
        for some, theirs in zip(images.split(chunk), labels.split(chunk), strict=True):
            for name, rows in gradients(parameters, some, theirs).items():
                total[name] += rows.square().sum(0)
        return total

    return sums


def functional_over_classes(network: nn.Module) -> Sums:
    """One forward pass per sample, and `vmap` over its classes' backward passes."""
    parameters = {name: values.detach() for name, values in network.named_parameters() if values.requires_grad}
    chunk = _chunk(parameters)

    def sums(images: Tensor, labels: Tensor) -> Parameters:
        total = {name: torch.zeros_like(values) for name, values in parameters.items()}
        for image in images.split(1):
            logits, pull, *_ = vjp(lambda values, image=image: functional_call(network, values, (image,)), parameters)
            p = logits.softmax(1)[0]
            vectors = p.sqrt()[:, None] * (torch.eye(len(p)).to(p) - p)
            for some in vectors.split(chunk):
                (rows,) = vmap(pull)(some[:, None])
                for name, values in rows.items():
                    total[name] += values.square().sum(0)
        return total

    return sums


def _chunk(parameters: Parameters) -> int:
    largest = max(values.nbytes for values in parameters.values())
    on_cpu = next(iter(parameters.values())).device.type == "cpu"
    return max(1, BLOCK // largest) if on_cpu else 32


def backpack(extension: str, saved: str) -> tuple[Callable[[nn.Module], Sums], ...]:
    """An extension of BackPACK, which leaves its result in an attribute `saved` of the parameters.

    The second way traces the network into layers that BackPACK knows, as it offers for residual sums.
    """

    def prepare(network: nn.Module, convert: bool) -> Sums:
        from backpack import backpack as active
        from backpack import extend, extensions

        extended: Any = extend(network, use_converter=convert)
        extended.eval()
        loss = extend(nn.CrossEntropyLoss(reduction="sum"))

        def sums(images: Tensor, labels: Tensor) -> Parameters:
            extended.zero_grad(set_to_none=True)
            with active(getattr(extensions, extension)()):
                loss(extended(images), labels).backward()
            return _taken(extended, saved)

        return sums

    return partial(prepare, convert=False), partial(prepare, convert=True)


def opacus(network: nn.Module) -> Sums:
    """opacus' per-sample gradients, squared; it does not support BatchNorm, whose parameters are therefore frozen."""
    from opacus import GradSampleModule

    network.train()  # its hooks do nothing in eval mode
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().requires_grad_(False)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    wrapped = GradSampleModule(network, loss_reduction="sum", strict=False)

    def sums(images: Tensor, labels: Tensor) -> Parameters:
        wrapped.zero_grad(set_to_none=True)
        F.cross_entropy(wrapped(images), labels, reduction="sum").backward()
        samples = _taken(network, "grad_sample")
        return {name: values.square().sum(0) for name, values in samples.items()}

    return sums


def _taken(network: nn.Module, attribute: str) -> Parameters:
    """What a library has left in an attribute of the parameters; the attribute is removed."""
    taken = {}
    for name, parameter in network.named_parameters():
        if getattr(parameter, attribute, None) is not None:
            taken[name] = getattr(parameter, attribute).detach()
            setattr(parameter, attribute, None)
    return taken


def nngeometry(estimates: Estimates) -> Callable[[nn.Module], Sums]:
    """nngeometry's `PMatDiag`, from the Jacobians of a loss function's outputs [B, n]."""

    def prepare(network: nn.Module) -> Sums:
        from nngeometry.backend import TorchHooksJacobianBackend
        from nngeometry.layercollection import LayerCollection
        from nngeometry.metrics import FIM, FIM_MonteCarlo
        from nngeometry.object import PMatDiag, PVector

        layers = LayerCollection.from_model(network)

        def of_labels(images: Tensor, labels: Tensor) -> Tensor:
            return network(images).log_softmax(1).gather(1, labels[:, None])

        def matrix(batch: tuple[Tensor, Tensor]) -> Any:
            options: dict[str, Any] = {"device": str(batch[0].device), "layer_collection": layers}
            if estimates == "exact":
                return FIM(network, batch, PMatDiag, **options)
            if estimates == "sampled":
                return FIM_MonteCarlo(network, batch, PMatDiag, **options)
            backend = TorchHooksJacobianBackend(network, of_labels, layer_collection=layers)
            return PMatDiag(backend, examples=batch)

        def sums(images: Tensor, labels: Tensor) -> Parameters:
            vector = PVector(layers, vector_repr=matrix((images, labels)).get_diag() * len(images))
            found: Parameters = {}
            for layer, values in vector.to_dict().items():
                names = (f"{layer}.weight", f"{layer}.bias")
                found |= dict(zip(names, values, strict=False))
            return found

        return sums

    return prepare


def curvlinops(network: nn.Module) -> Sums:
    """Hutchinson's estimate v∘Gv of the Gauss-Newton diagonal, the only one in the released version."""
    from curvlinops import GGNLinearOperator, hutchinson_diag

    parameters = dict(network.named_parameters())

    def sums(images: Tensor, labels: Tensor) -> Parameters:
        loss, data = nn.CrossEntropyLoss(reduction="sum"), [(images, labels)]
        matrix: Any = GGNLinearOperator(network, loss, list(parameters.values()), data, check_deterministic=False)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward mode
            flat = hutchinson_diag(matrix, PRODUCTS)
        parts = flat.split([values.numel() for values in parameters.values()])
        return {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}

    return sums


BACKPACK, NNGEOMETRY = "backpack-for-pytorch", "nngeometry"

PEERS = (
    Peer("loop, one sample at a time", None, "empirical", (loop,)),
    Peer("torch.func, vmap(grad)", None, "empirical", (functional,)),
    Peer("SumGradSquared", BACKPACK, "empirical", backpack("SumGradSquared", "sum_grad_squared")),
    Peer("PMatDiag, labels", NNGEOMETRY, "empirical", (nngeometry("empirical"),)),
    Peer("grad_sample, squared", "opacus", "empirical", (opacus,)),
    Peer("DiagGGNMC", BACKPACK, "sampled", backpack("DiagGGNMC", "diag_ggn_mc"), draws=DRAWS),
    Peer("PMatDiag, Monte Carlo", NNGEOMETRY, "sampled", (nngeometry("sampled"),), draws=DRAWS),
    Peer(f"hutchinson_diag, {PRODUCTS} products", "curvlinops-for-pytorch", "products", (curvlinops,)),
    Peer("loop, one sample and class at a time", None, "exact", (loop_over_classes,)),
    Peer("torch.func, vmap over classes", None, "exact", (functional_over_classes,)),
    Peer("DiagGGNExact", BACKPACK, "exact", backpack("DiagGGNExact", "diag_ggn_exact")),
    Peer("PMatDiag", NNGEOMETRY, "exact", (nngeometry("exact"),)),
)
