"""DER++: dark experience replay with labels (Buzzega et al., 2020, arXiv 2004.07211)."""

from pydantic import NonNegativeFloat

from cl_runner.memory.base import Memory
from cl_runner.ranges import Count
from cl_runner.strategies.der import DER


class DERpp(DER):
    """DER, plus the cross-entropy on the labels of a second, independent draw from memory (algorithm 2)."""

    def __init__(
        self,
        *,
        memory: Memory,
        alpha: NonNegativeFloat = 0.5,
        beta: NonNegativeFloat = 0.5,
        replay_batch_size: Count | None = None,
    ) -> None:
        """`alpha`: see DER; `beta`: weight of the cross-entropy; `replay_batch_size`: of each draw."""
        super().__init__(memory=memory, alpha=alpha, replay_batch_size=replay_batch_size)
        self.terms.append({"label": beta, "logit": 0.0})
