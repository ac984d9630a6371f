"""What a finished run has learned, loaded from its folder: it predicts as the run did."""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from cl_runner import checkpoint
from cl_runner.config import Experiment, check
from cl_runner.errors import ConfigError
from cl_runner.evaluate import accuracies, competing
from cl_runner.folder import RunFolder
from cl_runner.models.model import Model
from cl_runner.randomness import random_state, restore_random_state
from cl_runner.run import assembled
from cl_runner.strategies.base import Strategy
from cl_runner.streams.base import Scenario, Stream


@dataclass(frozen=True)
class Learned:
    """A run's components as they were when it ended; the model is in eval mode."""

    experiment: Experiment
    stream: Stream
    model: Model

    @property
    def strategy(self) -> Strategy:
        return self.experiment.strategy

    @torch.inference_mode()
    def predict(self, images: Tensor, task: int | None = None) -> Tensor:
        """The labels [N] that the run predicts for `images` [N, C, H, W], uint8, 0 to 255.

        `task`: of the images, from 0. In the task scenario the prediction is among its classes; in the others it
        changes nothing. Raises ValueError where it is missing or does not exist, or if the images are not of the
        stream's shape.
        """
        shape = tuple(self.stream.image_shape)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.shape[1:] != shape:
            got = f"{getattr(images, 'dtype', type(images).__name__)} {list(getattr(images, 'shape', []))}"
            raise ValueError(f"expected a tensor of images, torch.uint8 {['N', *shape]}, got {got}")
        if task is None and (self.stream.scenario is Scenario.TASK or self.strategy.needs_task_id):
            raise ValueError("expected `task`, the images' task: the run was told it too")
        if task is not None and not (hasattr(task, "__index__") and task in range(len(self.stream))):
            raise ValueError(f"expected a task from 0 to {len(self.stream) - 1}, got {task!r}")
        task, device = task or 0, self.model.device
        outputs = competing(self.stream, self.stream.scenario, self.stream.tasks[task], learned=len(self.stream))
        labels, predicted = torch.tensor(outputs, device=device), []
        self.model.eval()
        for some in images.split(self.experiment.trainer.eval_batch_size):
            scores = self.strategy.predict(some.to(device), torch.full((len(some),), task, device=device))
            predicted.append(labels[scores[:, outputs].argmax(1)])
        return torch.cat(predicted).to(images.device) if predicted else labels[:0].to(images.device)

    def accuracies(self, split: str = "test") -> dict[str, list[float]]:
        """scenario -> accuracy on each task, [T]: for the test split, the last rows of the run's matrices."""
        found = accuracies(self.strategy, len(self.stream), self.experiment.trainer.eval_batch_size, split)
        return {str(scenario): row for scenario, row in found.items()}


def load(folder: str | Path, *, device: str = "auto", data_root: str | None = None) -> Learned:
    """What the run in `folder` has learned.

    Methods that predict by more than the network (prototypes, prompts, weights for each task) need the checkpoint,
    which `trainer.keep_checkpoint=true` keeps. `data_root`: None for the run's own.

    Raises ConfigError where there is no finished run or no checkpoint although the method needs it, and as `check`.
    """
    folder = Path(folder)
    if not RunFolder(folder).done:
        what = RunFolder(folder).state if (folder / "status.json").exists() else "no run's folder"
        raise ConfigError("folder", f"expected that of a finished run, got {str(folder)!r}, which is {what}")
    results = RunFolder(folder).results
    here = {"device": device, "output_root": str(folder.parent), **({"data_root": data_root} if data_root else {})}
    experiment = check(DictConfig(results["config"] | here))
    kept = checkpoint.load(folder, experiment.hash, experiment.device)
    num_tasks = len(results["accuracy"][experiment.stream.scenario])
    if kept is not None and kept["position"]["tasks"] < num_tasks:  # the one before the last, which is damaged
        kept = None
    if kept is None and not experiment.strategy.predicts_by_weights:
        method = f"{type(experiment.strategy).__name__} predicts by what is in the checkpoint alone"
        if experiment.config["trainer"]["keep_checkpoint"]:
            raise ConfigError("folder", f"expected the run's last checkpoint in {folder}, got none that fits: {method}")
        advice = "give it with rerun=true"  # a finished run is otherwise only shown
        raise ConfigError("trainer.keep_checkpoint", f"expected true in the run's configuration ({advice}): {method}")
    outside = random_state(experiment.device)
    try:
        stream, model = assembled(experiment)
    finally:
        restore_random_state(outside, experiment.device)
    if kept is None:
        model.load_plain_state(load_file(folder / "model.safetensors"))
    else:
        checkpoint.restore_model(model, kept["model"])
        experiment.strategy.load_state_dict(kept["strategy"])
    model.eval()
    return Learned(experiment, stream, model)
