"""What only a device can show; the same code is tested on the CPU by the other files."""

import json

import pytest
import torch

from cl_runner.fisher.estimators import Exact, Probe
from cl_runner.models.efficientnet import EfficientNetLite0
from cl_runner.models.resnet import ResNet18
from cl_runner.streams.split import Split

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("architecture", [ResNet18(width=8), EfficientNetLite0(pretrained=True, image_size=32)])
@pytest.mark.parametrize("estimator", [Exact(num_samples=20), Probe(num_samples=20)])
def test_the_fisher_is_the_cpus(architecture, estimator):
    squares = []
    for device in (CPU, CUDA):
        stream = Split(name="digits", num_tasks=5).load("unused", device)
        model = architecture.build(stream).to(device)
        model.reveal(stream.tasks[0])
        squares.append(torch.cat([v.cpu().flatten() for v in estimator(model, stream.tasks[0].train).values.values()]))
    assert (squares[0] - squares[1]).norm() <= 1e-3 * squares[0].norm()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_run_on_the_device_learns_what_a_run_on_the_cpu_learns(cl_runner, tmp_path, precision):
    accuracy = {}
    for device, kind in (("cpu", "fp32"), ("cuda", precision)):
        words = [f"device={device}", f"trainer.precision={kind}", f"output_root={device}", "trainer.epochs=5"]
        status, said = cl_runner(*words)
        assert status == 0, said
        (folder,) = (tmp_path / device).iterdir()
        results = json.loads((folder / "results.json").read_text())
        accuracy[device] = results["metrics"]["average_accuracy"]
        assert results["peak_memory"]["train"] > 0
    assert accuracy["cuda"] == pytest.approx(accuracy["cpu"], abs=0.05)


def test_a_deterministic_run_repeats_itself(cl_runner, tmp_path):
    matrices = []
    for root in ("one", "two"):
        status, said = cl_runner("device=cuda", "trainer.deterministic=true", f"output_root={root}")
        assert status == 0, said
        (folder,) = (tmp_path / root).iterdir()
        matrices.append(json.loads((folder / "results.json").read_text())["accuracy"])
    assert matrices[0] == matrices[1]


def test_nothing_in_a_step_waits_for_the_device(cl_runner, monkeypatch):
    from cl_runner.trainer import Trainer

    step = Trainer.step

    def watched(self, batch):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "step", watched)
    status, said = cl_runner("device=cuda", "strategy.strength=1")
    assert status == 0, said
