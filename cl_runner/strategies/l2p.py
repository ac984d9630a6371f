"""Learning to prompt (L2P: Wang et al., 2022, arXiv 2112.08654)."""

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat

from cl_runner.errors import ConfigError
from cl_runner.models.prompts import Pool, Prompts
from cl_runner.ranges import Count
from cl_runner.strategies.prompting import Prompting

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class L2P(Prompting):
    """Learn a pool of prompts with keys; each image gets those whose keys are nearest to its pretrained features.

    They are prepended as tokens to the input of a frozen vision transformer, and the mean of their outputs is the
    feature. To the loss is added strength * sum over the chosen keys of their cosine distance to the query (eq. 5).
    Prompts are chosen image by image, in training too, without the paper's optional penalty on frequent ones: unlike in
    the authors' configuration for CIFAR-100, an image does not get the prompts chosen by most of its batch, which would
    nearly give a batch's task away. The loss sees only the task's own outputs. Prompts and keys are initialised
    normally with a standard deviation of 0.02 (in the authors' code uniformly from 0 to 0.01). The defaults are the
    paper's; the authors' configuration for CIFAR-100 has length=10, top=4 and strength=1.
    """

    def __init__(
        self,
        *,
        pool: Count = 10,
        length: Count = 5,
        top: Count = 5,
        strength: NonNegativeFloat = 0.5,
    ) -> None:
        """`pool`: number of prompts; `length`: tokens of each; `top`: prompts per image."""
        if top > pool:
            raise ConfigError("strategy.top", f"expected at most pool={pool}, got {top}")
        self.pool, self.length, self.top, self.strength = pool, length, top, strength

    def prompts_for(self, backbone: "VisionTransformer", num_tasks: int) -> Prompts:
        return Pool(backbone, self.pool, self.length, self.top)
