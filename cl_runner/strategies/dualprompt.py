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
    """Learn prompts shared by all tasks in early blocks, and prompts of each task, with a key, in later blocks.

    Prompts are additional keys and values of a frozen vision transformer's attention (prefix tuning). To the loss is
    added strength * (1 - cos(q(x), k_t)), q the pretrained features and k_t the task's key; at test time each image
    gets the prompts of the learned task with the nearest key, even if its task is known. A task's prompts are
    initialised with the previous task's, as in the authors' code. The loss on the labels sees only the task's own
    outputs. Unlike in that code, an image does not get the prompts chosen by most of its batch (a batch of one task
    nearly gives the task away), and prompts and keys are initialised normally with a standard deviation of 0.02, not
    uniformly from 0 to 0.01.
    """

    redraws = True  # the key
    excludes_replay = True  # replayed rows would train the current task's prompts, and attract its key

    def __init__(
        self,
        *,
        general_blocks: Sequence[int] = (0, 1),
        expert_blocks: Sequence[int] = (2, 3, 4),
        general_length: Count = 5,
        expert_length: Count = 20,
        strength: NonNegativeFloat = 1.0,
    ) -> None:
        """`…_blocks`: indices of transformer blocks; `…_length`: keys, and as many values, in each (in the authors'
        code `expert_length` is 20 for ImageNet-R and 5 for CIFAR-100)."""
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
