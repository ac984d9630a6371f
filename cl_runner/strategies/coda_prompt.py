"""CODA-Prompt: continual decomposed attention-based prompting (Smith et al., 2023, arXiv 2211.13218)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from cl_runner.errors import ConfigError
from cl_runner.models.model import Output
from cl_runner.models.prompts import Components
from cl_runner.ranges import Count
from cl_runner.strategies.prompting import Prompting
from cl_runner.streams.base import Examples

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class CODAPrompt(Prompting):
    """Learn prompt components for each task on top of the frozen ones of earlier tasks, and weight them by the query.

    A block's prompt is sum_m cos(q * A_m, K_m) P_m over all components so far: additional keys (one half) and values
    (the other) of a frozen vision transformer's attention. New components are initialised orthonormal, to earlier ones
    too; to the loss is added strength * |B B' - I|^2, a sum, for B = P, K and A in each block. Given this
    initialisation, the authors' code has a strength of 0; the 0.1 of the paper's runs was combined with a mean over
    B B' and another factor of 1e-6. The loss on the labels sees only the task's own outputs.
    """

    redraws = True  # the components
    prompts: Components

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (0, 1, 2, 3, 4),
        components: Count = 10,
        length: Annotated[int, Field(ge=2)] = 8,
        strength: NonNegativeFloat = 0.0,
    ) -> None:
        """`blocks`: indices of transformer blocks; `components`: per task; `length`: a prompt's keys plus values."""
        if length % 2:
            raise ConfigError("strategy.length", f"expected an even number (half keys, half values), got {length}")
        self.blocks, self.components, self.length, self.strength = blocks, components, length, strength

    def prompts_for(self, backbone: "VisionTransformer", num_tasks: int) -> Components:
        return Components(backbone, num_tasks, self.blocks, self.components, self.length)

    def penalties(self, batch: Examples, output: Output) -> dict[str, Tensor]:
        return {"orthogonality": self.strength * self.prompts.dependence()} if self.strength else {}
