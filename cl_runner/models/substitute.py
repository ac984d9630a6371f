"""Forward passes with other tensors in place of a network's own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def places(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name: once for a module registered twice, twice for a parameter that two modules
    share."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, values in (*module._parameters.items(), *module._buffers.items()):
            if values is not None:
                found[f"{prefix}.{name}" if prefix else name] = values
    return found


def call_with(model: nn.Module, values: Mapping[str, Tensor], *inputs: Any) -> Any:
    """`model(*inputs)` with `values`, by the model's own names, wherever the tensors they replace are used.

    `functional_call`, given both names of a module that is registered twice, would leave it without its parameters.
    """
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    instead = {id(own[name]): value for name, value in values.items()}
    placed = {name: instead[id(held)] for name, held in places(model).items() if id(held) in instead}
    with nothing_kept(model):
        return functional_call(model, placed, inputs, tie_weights=False)


@contextmanager
def nothing_kept(model: nn.Module) -> Iterator[None]:
    """Clear caches derived from the parameters, before and after: in eval mode, timm's attention layers with position
    biases cache their lookups."""
    attentions = [module for module in model.modules() if hasattr(module, "attention_bias_cache")]
    kept: list[Any] = [module.attention_bias_cache for module in attentions]
    for cache in kept:
        cache.clear()
    try:
        yield
    finally:
        for cache in kept:
            cache.clear()
