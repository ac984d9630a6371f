"""The model of a run: preprocess -> backbone -> head, and which outputs the loss may see."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_runner.models.cosine import CosineHead
from cl_runner.models.heads import Init, draw
from cl_runner.streams.base import Scenario, Stream, Task

ActiveLogits = Literal["current", "seen", "all"]


@dataclass(frozen=True)
class Output:
    """What a model says of a batch."""

    logits: Tensor  # [B, K], unmasked
    features: Tensor  # [B, D]
    inputs: Tensor  # [B, C, H, W] float, as the backbone saw them: a teacher must see the same augmented pixels


class Model(nn.Module):
    """preprocess -> backbone -> head, with one head row for every class of the stream.

    The head never grows: `visible` [T, K] says which outputs an example of each task may be told apart by, so that
    optimizer state, anchors, stored logits and checkpoints keep their shapes.
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
        the loss, None for what the scenario says; `pretrained_head`: the backbone's own, kept frozen beside the new
        one: it is what makes the pretrained model task zero; `seed`: of the rows of the head; `head_name`: what the
        architecture calls its classifier in files of weights; `metadata`: what those files say of the images."""
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
        self._still: list[nn.Module] = []

    def reveal(self, task: Task) -> None:
        """Let the loss see `task`'s outputs; rows that it sees for the first time are drawn afresh."""
        known = self.revealed
        if self.active_logits == "all":
            self.visible[:] = True
        elif self.active_logits == "seen":
            self.visible[:, list(task.classes)] = True
        else:
            self.visible[task.index, list(task.classes)] = True
        self.draw_head(task, self.revealed & ~known)

    def draw_head(self, task: Task, rows: Tensor) -> None:
        """Afresh, these rows [K] (bool) of it: another draw for every task."""
        draw(self.head, self.head_init, torch.Generator().manual_seed(self.seed + 7919 * task.index), rows)

    @property
    def revealed(self) -> Tensor:
        """The head's rows that some task's loss sees, [K] bool."""
        return self.visible.any(0)

    def forward(self, images: Tensor, features: Tensor | None = None) -> Output:
        """`images`: [B, C, H, W] uint8; `features`: theirs, where a backbone that stays still gave them before."""
        return self.encode(self.preprocess(images), features)

    def encode(self, inputs: Tensor, features: Tensor | None = None) -> Output:
        """`inputs`: [B, C, H, W] float, already preprocessed (`Output.inputs`, say)."""
        known = self.backbone(inputs) if features is None else features
        return Output(self.head(self.dropout(known)), known, inputs)

    def restrict(self, logits: Tensor, task_ids: Tensor) -> Tensor:
        """`logits` [B, K] with -inf where an example of its task [B] may not be told apart by them."""
        return logits.masked_fill(~self.visible[task_ids], -torch.inf)

    def hold_statistics(self, modules: Iterable[nn.Module]) -> None:
        """Keep these modules (normalisation layers) in eval mode, whatever mode the model is put in."""
        self._still = list(modules)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Model":
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def plain_state(self) -> dict[str, Tensor]:
        """Backbone and head by the architecture's own names, on the CPU: what `model.pretrained` reads from a file.

        A head of cosines is written as the linear layer that comes nearest to it.
        """
        head = self.head.as_linear() if isinstance(self.head, CosineHead) else self.head.state_dict()
        state = {**self.backbone.state_dict(), **{f"{self.head_name}.{name}": value for name, value in head.items()}}
        layout = torch.contiguous_format
        return {name: value.to("cpu", copy=True, memory_format=layout) for name, value in state.items()}

    def weights_metadata(self) -> dict[str, str]:
        """What goes with `plain_state` into a safetensors file: the architecture, and the images that it takes."""
        return dict(self.metadata)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device


def trainable(model: nn.Module, *, head: bool = True) -> dict[str, Tensor]:
    """The parameters that learn, by name (live, not copied); without `head`, the backbone's alone."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (head or name.startswith("backbone."))
    }


class PretrainedView(nn.Module):
    """The backbone of `model`, as it now is, under its own frozen pretrained head: the model of task zero.

    Shares every module with `model`; its trainable parameters carry the same names (`backbone.…`).
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert model.pretrained_head is not None, "the strategy's check lets only models with a pretrained head here"
        self.preprocess, self.backbone, self.head = model.preprocess, model.backbone, model.pretrained_head

    def forward(self, images: Tensor) -> Output:
        return self.encode(self.preprocess(images))

    def encode(self, inputs: Tensor) -> Output:
        features = self.backbone(inputs)
        return Output(self.head(features), features, inputs)

    def restrict(self, logits: Tensor, task_ids: Tensor) -> Tensor:
        """Every output of the pretrained head counts."""
        return logits

    @property
    def revealed(self) -> Tensor:
        return torch.ones(self.head.out_features, dtype=torch.bool, device=self.head.weight.device)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device
