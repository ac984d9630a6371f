"""SLCA: slow learner with classifier alignment (Zhang et al., 2023, arXiv 2303.05118)."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from cl_runner.models.model import Model, Output, trainable
from cl_runner.ranges import Count
from cl_runner.strategies.base import Strategy
from cl_runner.strategies.inference import extract_features, float64_device
from cl_runner.strategies.moments import Moments
from cl_runner.streams.base import Examples, Scenario, Stream, Task


class SLCA(Strategy):
    """Train the backbone more slowly than the head; after each task but the first, retrain the head on features of all
    classes.

    The features are sampled from a Gaussian per class, with the mean and covariance of its features when its task was
    learned; the head's loss on them is the cross-entropy of softmax(z / (temperature |z|)), z the logits. Predictions
    are the aligned head's; the next task continues from the head before alignment. The steps of the backbone, and of
    branches or prompts in it, are scaled by `backbone_rate`, which equals a lower learning rate for every optimizer
    whose step is proportional to its rate. A task's loss sees only its own outputs. Unlike in the authors' code, logits
    are normalised to length one over all classes, not by the mean length over T tasks, so that ours are softer by about
    the square root of T (`temperature` = 0.1 / sqrt(T) comes near theirs); old classes' means are not shrunk when
    sampled from; and the alignment has no weight decay.
    """

    saved = ("moments", "unaligned")
    active_logits = "current"  # as in the paper
    for_pretrained = True
    realigns_head = True

    def __init__(
        self,
        *,
        backbone_rate: Annotated[float, Field(ge=0, le=1)] = 0.01,
        epochs: NonNegativeInt = 5,
        samples: Count = 256,
        lr: PositiveFloat = 0.01,
        temperature: PositiveFloat = 0.1,
        batch_size: Count = 256,
    ) -> None:
        """Of the alignment: `epochs` (0: none), `samples` per class in each, `lr` (SGD, momentum 0.9, cosine schedule;
        in the authors' code that of the head's training, and one far above it throws a head off that has learned in
        small steps), `temperature` that divides the normalised logits."""
        self.backbone_rate, self.epochs, self.samples = backbone_rate, epochs, samples
        self.lr, self.temperature, self.batch_size = lr, temperature, batch_size

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.moments = Moments(
            stream.num_classes, model.head.in_features, shared=False, device=float64_device(model.device)
        )
        self.unaligned: dict[str, Tensor] = {}  # the head's parameters after the last task, before alignment

    @torch.no_grad()
    def before_task(self, task: Task) -> None:
        rows = self.moments.seen  # those of new classes have been drawn since then
        for name, value in self.unaligned.items():
            which = rows if value.dim() else ...  # a cosine head's scale has no rows
            self.model.head.get_parameter(name)[which] = value[which]

    @torch.no_grad()
    def after_backward(self) -> None:
        slow = trainable(self.model, head=False).values()
        moving = [parameter for parameter in slow if parameter.grad is not None]
        self._before = [(parameter, parameter.clone()) for parameter in moving]

    @torch.no_grad()
    def after_step(self, batch: Examples, output: Output) -> None:
        for parameter, before in self._before:
            parameter.copy_(torch.lerp(before, parameter, self.backbone_rate))

    def after_task(self, task: Task) -> None:
        self.moments.add(*extract_features(self.model, task.train, self.batch_size))
        if self.epochs and task.index:
            self.unaligned = {name: value.detach().clone() for name, value in self.model.head.named_parameters()}
            self.align()

    def align(self) -> None:
        """Train the head on sampled features of all classes so far."""
        head, rivals = self.model.head, self._rivals()
        learning = list(trainable(head).values())
        if not learning:
            return
        optimizer = torch.optim.SGD(learning, self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        for _ in range(self.epochs):
            features, labels = (drawn.to(self.model.device) for drawn in self.moments.drawn(self.samples))
            for rows in torch.randperm(len(labels)).to(labels.device).split(self.batch_size):
                optimizer.zero_grad()
                self.alignment_loss(head(features[rows].float()), labels[rows], rivals).backward()
                optimizer.step()
            scheduler.step()

    def alignment_loss(self, logits: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
        """Cross-entropy of logits [B, K], normalised to length one, over the outputs that rivals [K, K] allows."""
        allowed = rivals[labels]
        length = (logits * allowed).norm(dim=1, keepdim=True).clamp(min=1e-7)
        scaled = logits / (self.temperature * length)
        return F.cross_entropy(scaled.masked_fill(~allowed, -torch.inf), labels)

    def _rivals(self) -> Tensor:
        """[K, K] bool: the outputs that each label competes with; in the task scenario, those of its own task."""
        by_task = self.stream.scenario is Scenario.TASK
        groups = [task.classes for task in self.stream.tasks] if by_task else [self.moments.seen]
        rivals = torch.zeros(self.stream.num_classes, self.stream.num_classes, dtype=torch.bool)
        for group in groups:
            rivals[torch.tensor(group)[:, None], torch.tensor(group)] = True
        return rivals.to(self.model.device)
