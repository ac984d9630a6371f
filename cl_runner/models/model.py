"""The model of a run: preprocess -> backbone -> head, and which outputs the loss may see."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from cl_runner.models.cosine import CosineHead
from cl_runner.models.heads import Init, draw
from cl_runner.streams.base import Scenario, Stream, Task

ActiveLogits = Literal["current", "seen", "all"]
Parameters = dict[str, Tensor]  # by the names of `named_parameters()`


@dataclass(frozen=True)
class Output:
    """What a model computes for a batch."""

    logits: Tensor  # [B, K], unmasked
    features: Tensor  # [B, D]
    source: Tensor | Callable[[], Tensor]  # the inputs, or a function that computes them on demand

    @cached_property
    def inputs(self) -> Tensor:
        """[B, C, H, W] float, as the backbone got them: a teacher must see the same augmented pixels."""
        return self.source if isinstance(self.source, Tensor) else self.source()


class Classifier(nn.Module, ABC):
    """preprocess -> backbone -> head, as far as a Fisher needs to know it."""

    preprocess: nn.Module
    backbone: nn.Module
    head: nn.Linear

    def forward(self, images: Tensor) -> Output:
        """`images`: [B, C, H, W], as `preprocess` takes them."""
        return self.encode(self.preprocess(images))

    def encode(self, inputs: Tensor) -> Output:
        """`inputs`: [B, C, H, W] float, already preprocessed (`Output.inputs`, say)."""
        features = self.backbone(inputs)
        return Output(self.head(features), features, inputs)

    @abstractmethod
    def restrict(self, logits: Tensor, task_ids: Tensor) -> Tensor:
        """`logits` [B, K] with -inf for outputs not visible to each example's task [B]."""

    @property
    @abstractmethod
    def revealed(self) -> Tensor:
        """The head's rows visible to any task's loss, [K] bool."""

    @property
    def device(self) -> torch.device:
        return self.head.weight.device


class Model(Classifier):
    """A classifier with one head row for every class of the stream.

    The head never grows: `visible` [T, K] masks the outputs that compete for an example of each task, so that optimizer
    state, anchors, stored logits and checkpoints keep their shapes.
    """

    visible: Tensor

    def __init__(
        self,
        preprocess: nn.Module,
        backbone: nn.Module,
        num_features: int,
        stream: Stream,
        active_logits: ActiveLogits | None = None,
        head_init: Init = "torch",
        pretrained_head: nn.Linear | None = None,
        seed: int = 0,
        head_name: str = "head",
        metadata: dict[str, str] | None = None,
    ) -> None:
        """`backbone`: images [B, C, H, W] -> features [B, D = `num_features`]; `active_logits`: which outputs enter
        the loss, None for the scenario's default; `pretrained_head`: the backbone's own, kept frozen beside the new
        one, which makes the pretrained model task zero; `seed`: of the head's rows; `head_name`: the classifier's name
        in the architecture's files of weights; `metadata`: what those files say about images."""
        super().__init__()
        self.preprocess, self.backbone = preprocess, backbone
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(num_features, stream.num_classes)
        self.pretrained_head = pretrained_head.requires_grad_(False) if pretrained_head is not None else None
        self.scenario, self.seed = stream.scenario, seed
        self.head_init: Init = head_init
        self.head_name, self.metadata = head_name, metadata or {}
        defaults: dict[Scenario, ActiveLogits] = {
            Scenario.TASK: "current",
            Scenario.DOMAIN: "all",
            Scenario.CLASS: "seen",
        }
        self.active_logits = active_logits or defaults[stream.scenario]
        self.register_buffer("visible", torch.zeros(len(stream), stream.num_classes, dtype=torch.bool))
        self._eval_only: list[nn.Module] = []

    def reveal(self, task: Task) -> None:
        """Let the loss see `task`'s outputs; rows that become visible for the first time are redrawn."""
        known = self.revealed
        if self.active_logits == "all":
            self.visible[:] = True
        elif self.active_logits == "seen":
            self.visible[:, list(task.classes)] = True
        else:
            self.visible[task.index, list(task.classes)] = True
        self.draw_head(task, self.revealed & ~known)

    def draw_head(self, task: Task, rows: Tensor) -> None:
        """Redraw these rows [K] (bool) of the head, differently for every task."""
        draw(self.head, self.head_init, torch.Generator().manual_seed(self.seed + 7919 * task.index), rows)

    @property
    def revealed(self) -> Tensor:
        return self.visible.any(0)

    def forward(self, images: Tensor, features: Tensor | None = None) -> Output:
        """`images`: [B, C, H, W] uint8; `features`: theirs, if a frozen backbone has computed them before.

        With `features`, images are preprocessed only when `Output.inputs` is read.
        """
        if features is None:
            return self.encode(self.preprocess(images))
        return Output(self.head(self.dropout(features)), features, lambda: self.preprocess(images))

    def encode(self, inputs: Tensor) -> Output:
        features = self.backbone(inputs)
        return Output(self.head(self.dropout(features)), features, inputs)

    def restrict(self, logits: Tensor, task_ids: Tensor) -> Tensor:
        return logits.masked_fill(~self.visible[task_ids], -torch.inf)

    def keep_in_eval(self, modules: Iterable[nn.Module]) -> None:
        """Keep these modules, beside those kept already, in eval mode, whatever the model's own."""
        self._eval_only = list(dict.fromkeys([*self._eval_only, *modules]))
        self.train(self.training)

    def train(self, mode: bool = True) -> "Model":
        super().train(mode)
        for module in self._eval_only:
            module.eval()
        return self

    def plain_state(self) -> dict[str, Tensor]:
        """Backbone and head by the architecture's own names, on the CPU: what `model.pretrained` reads from a file.

        A cosine head is written as its closest linear layer.
        """
        head = self.head.as_linear() if isinstance(self.head, CosineHead) else self.head.state_dict()
        state = {**self.backbone.state_dict(), **{f"{self.head_name}.{name}": value for name, value in head.items()}}
        layout = torch.contiguous_format
        return {name: value.to("cpu", copy=True, memory_format=layout) for name, value in state.items()}

    def load_plain_state(self, state: dict[str, Tensor]) -> None:
        """Load what `plain_state` returned, for a model whose head is linear."""
        own = self.backbone.state_dict().keys()
        self.backbone.load_state_dict({name: state[name] for name in own})
        prefix = f"{self.head_name}."
        self.head.load_state_dict({name.removeprefix(prefix): state[name] for name in state.keys() - own})


def trainable(model: nn.Module, *, head: bool = True) -> Parameters:
    """The parameters that learn, by name (live, not copied); without `head`, those of the backbone and of what a method
    has added to it."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (head or not name.startswith("head."))
    }


class Network(Classifier):
    """A backbone under its head, of which all outputs are visible to every task: any network that is no run's model."""

    def __init__(self, backbone: nn.Module, head: nn.Linear, preprocess: nn.Module | None = None) -> None:
        """`backbone`: images -> features [B, D]; `preprocess`: None for a backbone that takes images as they come."""
        super().__init__()
        self.preprocess = nn.Identity() if preprocess is None else preprocess
        self.backbone, self.head = backbone, head

    def restrict(self, logits: Tensor, task_ids: Tensor) -> Tensor:
        return logits

    @property
    def revealed(self) -> Tensor:
        return torch.ones(self.head.out_features, dtype=torch.bool, device=self.device)


class PretrainedView(Network):
    """The current backbone of `model` under its own frozen pretrained head: the model of task zero.

    Shares every module with `model`; its trainable parameters carry the same names (`backbone.…`).
    """

    def __init__(self, model: Model) -> None:
        assert model.pretrained_head is not None, "the strategy's check lets only models with a pretrained head here"
        super().__init__(model.backbone, model.pretrained_head, model.preprocess)
