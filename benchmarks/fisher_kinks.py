"""Show why the batch size changes a Fisher in float32: units at the kink of a ReLU or ReLU6.

    python benchmarks/fisher_kinks.py [--models resnet18_imagenet efficientnet_lite0 ...]

A batch of another size is summed in another order and rounded differently. That moves a unit's input by some 1e-7; if
it is that close to a kink, its slope changes from 0 to 1, and the gradient jumps, whatever the precision. This counts,
over 65 samples, the units whose slope differs between a batch of 64 and a single sample, and how far the two Fishers
are apart, over all samples and over those without such a unit. Weights are fresh and pixels random, as in `fisher.py`.
"""

import argparse

import torch
from fisher_truth import error
from nets import SUBJECTS, Subject, unsettle
from torch import Tensor, nn

from cl_runner.fisher.curvature import Diagonal
from cl_runner.fisher.engine import SquaredGradients, undisturbed
from cl_runner.models.model import Model
from cl_runner.streams.base import Examples

OUTPUTS, SAMPLES, BATCH = 7, 65, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", choices=list(SUBJECTS), default=["resnet18_imagenet", "efficientnet_lite0"]
    )
    torch.set_num_threads(1)
    print("| model | units | with another slope | in samples | Fishers apart | of the samples without |")
    print("|---|---|---|---|---|---|")
    for name in parser.parse_args().models:
        print(f"| {SUBJECTS[name].title} | {' | '.join(_cells(SUBJECTS[name]))} |", flush=True)


def _cells(subject: Subject) -> list[str]:
    model, examples = (
        subject.build(OUTPUTS, torch.device("cpu")),
        subject.examples(SAMPLES, OUTPUTS, torch.device("cpu")),
    )
    unsettle(model)
    with undisturbed(model), torch.no_grad():
        alone, together = (slopes(model, examples, size) for size in (1, BATCH))
        moved = (alone != together).sum(1)
        apart = [difference(model, examples, chosen) for chosen in (moved >= 0, moved == 0)]
    return [str(alone.numel()), str(int(moved.sum())), str(int((moved > 0).sum())), *(f"{far:.1e}" for far in apart)]


def slopes(model: Model, examples: Examples, size: int) -> Tensor:
    """[N, units] bool: the slope of every ReLU and ReLU6 in the model."""
    seen: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(1)
        seen.append((x > 0) & (x < 6) if isinstance(module, nn.ReLU6) else x > 0)

    kinds = [module for module in model.modules() if isinstance(module, (nn.ReLU, nn.ReLU6))]
    hooks = [module.register_forward_pre_hook(look) for module in kinds]
    rows = []
    for batch in examples.batches(size):
        model(batch.images)
        rows.append(torch.cat(seen, 1))
        seen.clear()
    for hook in hooks:
        hook.remove()
    return torch.cat(rows)


def difference(model: Model, examples: Examples, chosen: Tensor) -> float:
    """Difference between the Fishers at both batch sizes, by one random vector per sample; only `chosen` [N] count."""
    vectors = torch.randn(len(examples), 1, OUTPUTS, generator=torch.Generator().manual_seed(0)) * chosen[:, None, None]

    def fisher(size: int) -> Diagonal:
        sums = SquaredGradients(model)
        for batch, own in zip(examples.batches(size), vectors.split(size), strict=True):
            sums.add(model.preprocess(batch.images), 1, lambda rows, _, own=own: own[rows])
        return sums.curvature()

    return error(fisher(BATCH), fisher(1))


if __name__ == "__main__":
    main()
