"""Elastic weight consolidation (Kirkpatrick et al., 2017, arXiv 1612.00796; a running sum of Fishers with decay is
online EWC, Schwarz et al., 2018, arXiv 1805.06370), anchored to the pretrained weights too."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.fisher.cost import announce
from cl_runner.fisher.curvature import Curvature
from cl_runner.fisher.estimators import Estimator
from cl_runner.fisher.quadratic import Penalty
from cl_runner.models.architecture import Architecture
from cl_runner.models.model import Classifier, Model, Output, PretrainedView
from cl_runner.strategies.anchors import (
    Anchor,
    Source,
    check_source,
    covered,
    share_of_classes,
    wants_pretrained,
    wants_previous,
)
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Examples, Stream, Task
from cl_runner.streams.recipe import Recipe


class EWC(Strategy):
    """Anchor each weight to where earlier tasks left it, in proportion to how much they depend on it.

    Adds factor * strength * sum_t (w - w_t)' F_t (w - w_t) to the loss, where w_t are the weights after task t and F_t
    is its Fisher, without the head rows that no loss had seen by then (eq. 3 of the paper, for a diagonal F_t).
    The pretrained weights can be anchored too, as task zero: w_0 are the backbone's initial weights, and F_0 is the
    Fisher of the pretrained model under its own head, on the first task's images (the paper's tasks are 1, 2, ...).
    """

    saved = ("previous", "pretrained", "reports")
    holds_earlier_weights = True

    def __init__(
        self,
        *,
        fisher: Estimator,
        strength: NonNegativeFloat = 10_000.0,
        pretrained_strength: NonNegativeFloat | None = None,
        anchor: Source = "auto",
        accumulation: Literal["separate", "sum", "average"] = "separate",
        decay: Annotated[float, Field(ge=0, le=1)] = 1.0,
        factor: float = 0.5,
        head: bool = True,
    ) -> None:
        """`pretrained_strength`: null for the same as `strength`. `accumulation`: one term per task, or a single one
        around the last weights, with the sum of all Fishers, where each new task first multiplies the old sum by
        `decay`, or with their average, in which each class counts once (as in PyCIL). The penalty in online EWC's paper
        has `decay` times that sum, so its strength is this one divided by `decay`; it also normalises each Fisher
        first, which is not done here. `head`: whether to anchor the new head too (the pretrained weights are those of
        the backbone only)."""
        if factor not in (0.5, 1.0):
            raise ConfigError("strategy.factor", f"expected 0.5 or 1.0, got {factor}")
        self.fisher, self.strength = fisher, strength
        self.anchor: Source = anchor
        self.pretrained_strength = strength if pretrained_strength is None else pretrained_strength
        self.accumulation, self.decay, self.factor, self.head = accumulation, decay, factor, head

    def check(self, stream: Recipe, model: Architecture) -> None:
        super().check(stream, model)
        check_source("strategy.anchor", self.anchor, model)
        if self.decay != 1 and self.accumulation != "sum":
            raise ConfigError("strategy.decay", f"expected 1.0 unless strategy.accumulation=sum, got {self.decay}")

    def setup(self, model: Model, stream: Stream) -> None:
        super().setup(model, stream)
        self.fisher.check(model, stream.image_shape)
        self.previous, self.pretrained = Penalty(), Penalty()
        self.reports: list[dict[str, Any]] = []  # one per Fisher, the pretrained model's first

    def before_task(self, task: Task) -> None:
        if task.index > 0 or not wants_pretrained(self.anchor, self.model):
            return
        anchor = Anchor.at_pretrained(self.model)
        if not anchor.weights:
            return
        view, fisher, examples = PretrainedView(self.model), self.fisher.for_pretrained(), task.train
        self.pretrained = Penalty().plus(self._estimated(fisher, view, examples), anchor.weights)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        live = dict(self.model.named_parameters())
        named = {"ewc": (self.strength, self.previous), "ewc_pretrained": (self.pretrained_strength, self.pretrained)}
        return {
            name: self.factor * strength * penalty(live) for name, (strength, penalty) in named.items() if penalty.terms
        }

    def after_task(self, task: Task) -> None:
        last = task.index == len(self.stream) - 1  # no later task could change the weights
        if last or not wants_previous(self.anchor):
            return
        anchor = Anchor.at(self.model, head=self.head)
        if not anchor.weights:
            return
        fisher = covered(self._estimated(self.fisher, self.model, task.train), self.model, head=self.head)
        if self.accumulation != "separate":
            share = share_of_classes(task, self.stream)
            old, new = (self.decay, 1.0) if self.accumulation == "sum" else (1 - share, share)
            for term in self.previous.terms:  # at most one
                fisher = term.curvature.only(anchor.weights).scaled(old).plus(fisher, new)
            self.previous = Penalty()
        self.previous = self.previous.plus(fisher, anchor.weights)

    def report(self) -> dict[str, float | None]:
        """The cost of all Fishers, and the last one's trace and error (null if it is not random)."""
        if not self.reports:
            return {}
        *_, last = self.reports
        spent = ("seconds", "samples", "backward_passes")
        values = last | {name: sum(report[name] for report in self.reports) for name in spent}
        return {f"fisher_{name}": value for name, value in values.items()}

    def _estimated(self, fisher: Estimator, model: Classifier, examples: Examples) -> Curvature:
        announce(fisher, model, examples)
        found, report = fisher.estimate(model, examples)
        self.reports.append(vars(report))
        return found
