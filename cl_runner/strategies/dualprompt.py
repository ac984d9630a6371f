"""DualPrompt: complementary prompting (Wang et al., 2022, arXiv 2204.04799)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat

from cl_runner.models.prompts import Experts, Prompts
from cl_runner.ranges import Count
from cl_runner.strategies.prompting import Prompting

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class DualPrompt(Prompting):
    """Learn prompts that all tasks share, in early blocks, and prompts of each task, with a key, in later ones.

    Prompts are further keys and values of a frozen vision transformer's attention (prefix tuning). The loss gains
    strength * the cosine distance from the task's key to the query; when asked, each image gets the prompts of the
    learned task whose key is nearest, also where its task is told. A task's prompts begin as the task before left its
    own, as in the authors' code. The loss on the labels sees the task's own outputs alone. Other than in that code, an
    image is not given the prompts of most of its batch (which, of one task, nearly tells the task); and prompts and
    keys begin normal with a standard deviation of 0.02, not uniform from 0 to 0.01.
    """

    redraws = True  # the key
    excludes_replay = True  # replayed rows would train the current task's prompts, and draw its key towards them

    def __init__(
        self,
        *,
        general_blocks: Sequence[int] = (0, 1),
        expert_blocks: Sequence[int] = (2, 3, 4),
        general_length: Count = 5,
        expert_length: Count = 20,
        strength: NonNegativeFloat = 1.0,
    ) -> None:
        """`…_blocks`: of the transformer, from 0; `…_length`: keys, and as many values, in each (the authors' code has
        an `expert_length` of 20 for ImageNet-R and of 5 for CIFAR-100)."""
        self.general_blocks, self.expert_blocks = general_blocks, expert_blocks
        self.general_length, self.expert_length, self.strength = general_length, expert_length, strength

    def prompts_for(self, backbone: "VisionTransformer", num_tasks: int) -> Prompts:
        return Experts(
            backbone,
            num_tasks,
            general_blocks=self.general_blocks,
            expert_blocks=self.expert_blocks,
            general_length=self.general_length,
            expert_length=self.expert_length,
        )
