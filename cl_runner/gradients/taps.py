"""A forward pass with a tap on every layer's output, through which backward passes hand out the gradients.

Parameters are kept out of the graph, so that autograd does only the activations' part of a backward pass; what arrives
at a layer's tap, together with the layer's input, determines the gradients of its parameters.

Layers are recognised by the functions that they call (`F.linear`, `F.conv2d`, ...), not by their modules: so whatever
else a module does (an activation, padding, in-place arithmetic, a second call) need not be known here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from cl_runner.gradients.convolutions import Convolution, strided
from cl_runner.gradients.layers import (
    Affine,
    BatchStatisticsError,
    DependenceError,
    Direct,
    Embedding,
    Linear,
    Uncovered,
    Use,
)
from cl_runner.models.model import Classifier
from cl_runner.models.substitute import nothing_kept, places

Gradients = Callable[[Use, Tensor], None]

VIEWS = {
    "reshape",
    "view",
    "unsqueeze",
    "flatten",
    "contiguous",
    "to",
    "type_as",
    "float",
    "double",
    "view_as",
    "reshape_as",
    "unflatten",
    "squeeze",
}
BROADCAST = {f"{name}{end}" for name in ("add", "sub", "mul", "div") for end in ("", "_")}
CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
DROPOUTS = {  # whether they are active by default
    F.dropout: True,
    F.dropout1d: True,
    F.dropout2d: True,
    F.dropout3d: True,
    F.alpha_dropout: False,
    F.feature_alpha_dropout: False,
}
RULES = {
    F.linear: "linear",
    F.batch_norm: "batch_norm",
    F.layer_norm: "layer_norm",
    F.group_norm: "group_norm",
    F.rms_norm: "rms_norm",
    F.embedding: "embedding",
    F.multi_head_attention_forward: "attention",
}


class ToLogits(nn.Module):
    """A model from preprocessed inputs to logits, so that preprocessing runs once per batch."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.encode(inputs).logits


class Taps:
    """One forward pass of `model` and any number of backward passes through it.

    uses: the calls of layers with trainable parameters, in order.
    """

    def __init__(self, model: Classifier, inputs: Tensor) -> None:
        """`inputs`: [B, C, H, W] float, preprocessed.

        Raises Uncovered if a trainable parameter is used in a way that no rule covers.
        """
        self.uses: list[Use] = []
        self._receiver = _Receiver()
        self._wanted = torch.zeros((), device=inputs.device, requires_grad=True)  # keeps the graph alive
        # Looked up once: this takes about as long as a small net's forward pass.
        named = {name: held for name, held in places(model).items() if isinstance(held, nn.Parameter)}
        plain = {id(values): values.detach() for values in named.values()}
        trainable: dict[int, str] = {}
        for name, values in named.items():
            if values.requires_grad:
                trainable.setdefault(id(plain[id(values)]), name)
        parameters = {f"model.{name}": plain[id(values)] for name, values in named.items()}
        weights = {id(values) for values in plain.values()}
        with torch.enable_grad(), nothing_kept(model), _Interception(self, trainable, weights, len(inputs)):
            self.logits = functional_call(ToLogits(model), parameters, (inputs,), tie_weights=False)
        for use in self.uses:
            use.check_unchanged()

    def backward(self, vectors: Tensor, receive: Gradients, last: bool) -> None:
        """Pass each use's output gradient, for the sum of `vectors` [B, K] times the logits, to `receive`.

        `last`: whether the graph may be freed.
        """
        if not self.logits.requires_grad:  # no trainable parameter was used
            return
        self._receiver.receive = receive
        torch.autograd.grad(
            self.logits, self._wanted, vectors.to(self.logits), retain_graph=not last, allow_unused=True
        )

    def on(self, output: Tensor, use: Use) -> Tensor:
        """Put a tap for `use` on `output`."""
        self.uses.append(use)
        # In place, to copy nothing; but autograd does not let a custom function modify a view.
        return _Tap.apply(output.clone() if output._is_view() else output, self._wanted, self._receiver, use)


class _Receiver:
    """The graph's link to its taps: not `Taps` itself, which holds the graph; in that cycle neither would be freed."""

    receive: Gradients


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, wanted: Tensor, receiver: _Receiver, use: Use) -> Tensor:
        ctx.receiver, ctx.use = receiver, use
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.receiver.receive(ctx.use, gradients[0])
        return gradients[0], None, None, None


class _Interception(TorchFunctionMode):
    """Intercepts every torch function call, and puts taps where a trainable parameter takes part."""

    def __init__(self, taps: Taps, trainable: dict[int, str], weights: set[int], size: int) -> None:
        """`weights`: ids of all parameters, including frozen ones."""
        super().__init__()
        self.taps, self.weights, self.size = taps, weights, size
        self.names = dict(trainable)  # id of a tensor -> the parameter that it is, or is a view of
        self.kept: list[Tensor] = []  # the views, kept alive so that their ids are not reused

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return self.dropout(func, *args, **kwargs)
        if func in RULES or func in CONVOLUTIONS:
            if args and id(args[0]) in self.names:  # such as a table of queries
                raise Uncovered(f"{self.names[id(args[0])]} is the input of {func.__name__}")
            if func in CONVOLUTIONS:
                return self.convolution(func, *args, **kwargs)
            return getattr(self, RULES[func])(*args, **kwargs)
        met = [value for value in _tensors((*args, *kwargs.values())) if id(value) in self.weights]
        if not met:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        if name in VIEWS:
            result = func(*args, **kwargs)  # of another tensor, if only the parameter's shape or type is used
            return self.view(args[0], result) if id(args[0]) in self.weights else result
        met = [value for value in met if id(value) in self.names]
        if not met:
            return func(*args, **kwargs)
        if name == "expand":
            return self.expanded(met[0], func(*args, **kwargs))
        if name.removeprefix("r") in BROADCAST or func.__name__ in BROADCAST:
            return func(*[self.broadcast(value, args) for value in args], **kwargs)
        result = func(*args, **kwargs)
        if any(isinstance(value, Tensor) for value in _tensors((result,))):
            raise Uncovered(f"{self.names[id(met[0])]} is used in {name}")
        return result  # a shape or a number: no gradient flows through it

    def named(self, **parameters: Tensor | None) -> dict[str, str]:
        """role -> name, for the trainable ones among `parameters`."""
        return {role: self.names[id(value)] for role, value in parameters.items() if id(value) in self.names}

    def mine(self, names: dict[str, str], inputs: Tensor) -> dict[str, str]:
        if names and (inputs.dim() < 2 or inputs.shape[0] != self.size):
            raise Uncovered(f"{next(iter(names.values()))} is used on inputs without the samples as first axis")
        return names

    def linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(inputs, weight, bias)
        names = self.mine(self.named(weight=weight, bias=bias), inputs)
        return self.taps.on(output, Linear(names, inputs)) if names else output

    def convolution(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        output = func(input, weight, bias, stride, padding, dilation, groups)
        names = self.mine(self.named(weight=weight, bias=bias), input)
        if not names:
            return output
        axes = CONVOLUTIONS[func]
        if input.dim() != axes + 2:
            raise Uncovered(f"{next(iter(names.values()))} is used in a convolution over a single, unbatched input")
        try:
            call = strided(weight, axes, stride, padding, dilation, groups)
        except Uncovered as uncovered:
            raise Uncovered(f"{next(iter(names.values()))} is used in {uncovered}") from None
        return self.taps.on(output, Convolution.of(names, input, call))

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        standardised = id(input) in self.weights  # some layers normalise their own weight this way
        if training and input.shape[0] == self.size and not standardised:
            raise BatchStatisticsError("in which a batch norm uses the statistics of its batch even in eval mode")
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        names = self.mine(self.named(weight=weight, bias=bias), input)
        if not names:
            return output
        if running_mean is None or running_var is None:
            raise Uncovered(f"{next(iter(names.values()))} normalises by the statistics of its batch")
        shape = (1, -1, *[1] * (input.dim() - 2))
        mean, scale = running_mean.view(shape), (running_var + eps).rsqrt()
        use = Affine(names, input, lambda x: x - mean, range(2, input.dim()), scale)
        return self.taps.on(output, use)

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        output = F.layer_norm(input, normalized_shape, weight, bias, eps)
        names = self.mine(self.named(weight=weight, bias=bias), input)
        axes = range(1, input.dim() - len(normalized_shape))
        use = Affine(names, input, lambda x: F.layer_norm(x, normalized_shape, eps=eps), axes)
        return self.taps.on(output, use) if names else output

    def rms_norm(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        output = F.rms_norm(input, normalized_shape, weight, eps)
        names = self.mine(self.named(weight=weight), input)
        axes = range(1, input.dim() - len(normalized_shape))
        use = Affine(names, input, lambda x: F.rms_norm(x, normalized_shape, eps=eps), axes)
        return self.taps.on(output, use) if names else output

    def group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        output = F.group_norm(input, num_groups, weight, bias, eps)
        names = self.mine(self.named(weight=weight, bias=bias), input)
        use = Affine(names, input, lambda x: F.group_norm(x, num_groups, eps=eps), range(2, input.dim()))
        return self.taps.on(output, use) if names else output

    def embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        output = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        names = self.named(weight=weight)
        if not names:
            return output
        if max_norm is not None or scale_grad_by_freq or input.dim() == 0 or input.shape[0] != self.size:
            raise Uncovered(f"{names['weight']} is looked up in a way that no rule covers")
        padding = padding_idx if padding_idx is None else padding_idx % len(weight)
        return self.taps.on(output, Embedding(names, input, padding))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Self-attention as `nn.MultiheadAttention` calls it, [L, B, D]; computed here with the samples first."""
        given: dict[str, Any] = dict(zip(ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
        parts = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
        names = self.named(**{part: given[part] for part in parts})
        if not names:
            return F.multi_head_attention_forward(query, key, value, *args, **kwargs)
        plain = query is key is value and query.dim() == 3 and given["in_proj_weight"] is not None
        asked = [name for name in ATTENTION_EXTRAS if given.get(name) is not None and given[name] is not False]
        if not plain or asked:
            special = ", ".join(asked) or "other keys than queries"
            raise Uncovered(f"{next(iter(names.values()))} is used in an attention with {special}")
        if given["dropout_p"] and given["training"]:
            raise _active_dropout()
        with self:  # intercepts the projections below like any layer
            tokens = query.transpose(0, 1)
            weight: Any = given["in_proj_weight"]
            projected = F.linear(tokens, weight, given["in_proj_bias"])
            heads = projected.unflatten(-1, (3, given["num_heads"], -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, L, d]
            q, k, v = heads.unbind(0)
            weights = None
            if given.get("need_weights", True):
                weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
                attended = weights @ v
                weights = weights.mean(1) if given.get("average_attn_weights", True) else weights
            else:
                attended = F.scaled_dot_product_attention(q, k, v)
            output = F.linear(attended.transpose(1, 2).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
        return output.transpose(0, 1).contiguous(), weights  # contiguous like the original: callers may view it

    def dropout(
        self, func: Any, input: Tensor, p: float = 0.5, training: bool | None = None, inplace: bool = False
    ) -> Tensor:
        if p and (DROPOUTS[func] if training is None else training):
            raise _active_dropout()
        return input

    def view(self, parameter: Tensor, result: Tensor) -> Tensor:
        """A reshaped parameter counts as that parameter: its squares are reshaped back."""
        self.weights.add(id(result))
        self.kept.append(result)
        if id(parameter) not in self.names:
            return result
        if result.numel() != parameter.numel() or result.dtype != parameter.dtype:
            raise Uncovered(f"{self.names[id(parameter)]} is converted before it is used")
        self.names[id(result)] = self.names[id(parameter)]
        return result

    def expanded(self, parameter: Tensor, result: Tensor) -> Tensor:
        """A token expanded to one per sample, and tapped as such."""
        name = self.names[id(parameter)]
        if result.shape != (self.size, *parameter.shape[1:]):
            raise Uncovered(f"{name} is expanded along an axis other than the samples'")
        return self.taps.on(result, Direct({"values": name}, parameter))

    def broadcast(self, value: Any, operands: Sequence[Any]) -> Any:
        """Expand a parameter in arithmetic with samples to one per sample, and tap it."""
        if id(value) not in self.names:
            return value
        name = self.names[id(value)]
        axes = max(operand.dim() for operand in operands if isinstance(operand, Tensor))
        batch = [operand for operand in operands if isinstance(operand, Tensor) and id(operand) not in self.names]
        own = (1,) * (axes - value.dim()) + tuple(value.shape)
        if not any(x.dim() == axes and x.shape[0] == self.size for x in batch) or own[0] != 1 or len(own) < 2:
            raise Uncovered(f"{name} is used in arithmetic without the samples")
        return self.taps.on(value.view(own).expand(self.size, *own[1:]), Direct({"values": name}, value))


ATTENTION_ARGUMENTS = (
    "embed_dim_to_check",
    "num_heads",
    "in_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
    "add_zero_attn",
    "dropout_p",
    "out_proj_weight",
    "out_proj_bias",
    "training",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "use_separate_proj_weight",
)
ATTENTION_EXTRAS = (
    "bias_k",
    "bias_v",
    "add_zero_attn",
    "key_padding_mask",
    "attn_mask",
    "use_separate_proj_weight",
    "static_k",
    "static_v",
    "is_causal",
)


def _active_dropout() -> DependenceError:
    return DependenceError("in which a dropout stays active in eval mode")


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
