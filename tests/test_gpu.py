"""Tests that need a GPU; the other files test the same code on the CPU."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from cl_runner.fisher.estimators import Exact, Probe
from cl_runner.gradients import kernels, passes
from cl_runner.gradients.graphs import Replayed, side_stream
from cl_runner.models.efficientnet import EfficientNetLite0
from cl_runner.models.model import Model
from cl_runner.models.preprocess import Preprocess
from cl_runner.models.resnet import ResNet18
from cl_runner.streams.split import Split

from .gradients.test_kernels import conv_case, conv_twin, linear_twin, relative
from .test_resume import OFTEN, PowerCutError, assert_equal_runs, carry_out, cut, experiment

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_before():
    """Restore the global settings that a run in this process changes."""
    products, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    tf32, benchmark = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(products)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark


def fishers_on_both(architecture, estimator):
    """The diagonals [P] on the CPU and on the GPU, for the first of five tasks of digits."""
    for device in (CPU, CUDA):
        stream = Split(name="digits", num_tasks=5).load("unused", device)
        model = architecture.build(stream).to(device)
        model.reveal(stream.tasks[0])
        diagonal = estimator(model, stream.tasks[0].train).diagonal()
        yield torch.cat([values.cpu().flatten() for values in diagonal.values.values()])


@pytest.mark.parametrize("architecture", [ResNet18(width=8), EfficientNetLite0(pretrained=True, image_size=32)])
@pytest.mark.parametrize("estimator", [Exact(num_samples=20), Probe(num_samples=20)])
def test_the_fisher_is_the_cpus(architecture, estimator):
    one, other = fishers_on_both(architecture, estimator)
    assert (one - other).norm() <= 1e-3 * one.norm()


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "tf32"}, {"representation": "kfac"}, {"representation": "ekfac"}], ids=str
)
def test_the_fisher_of_many_passes_is_the_cpus(settings, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    monkeypatch.setattr(passes, "TOGETHER", 2)  # nine passes: two blocks replayed, after one as it is and one captured
    one, other = fishers_on_both(ResNet18(width=8), Exact(num_samples=20, logits="all", **settings))
    assert (one - other).norm() <= (5e-3 if "precision" in settings else 1e-3) * one.norm()
    if "representation" not in settings:
        assert len(replays) == 3


class Masked(nn.Module):
    """A layer whose backward pass waits for the device, which no graph can capture."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(64, 16), nn.Linear(8, 8)
        self.register_buffer("mask", torch.arange(16) % 2 == 0)

    def forward(self, inputs):
        return self.leave(self.enter(inputs.flatten(1))[:, self.mask])


def test_passes_that_cannot_be_captured_are_made_as_they_are(monkeypatch):
    monkeypatch.setattr(passes, "TOGETHER", 2)
    fishers = []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        stream = Split(name="digits", num_tasks=5).load("unused", device)
        model = Model(Preprocess(1), Masked(), 8, stream, active_logits="all").to(device)
        model.reveal(stream.tasks[0])
        fisher = Exact(num_samples=20)
        for _ in range(2):  # the second finds the allocator as it should be
            found = fisher(model, stream.tasks[0].train).values.values()
        fishers.append(torch.cat([values.cpu().flatten() for values in found]))
    assert (fishers[0] - fishers[1]).norm() <= 1e-3 * fishers[0].norm()


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


@pytest.mark.parametrize("strategy", ["finetune", "ewc", "lwf"])
def test_a_deterministic_run_that_is_stopped_again_and_again_equals_an_uninterrupted_one(strategy, tmp_path):
    words = [f"strategy={strategy}", "device=cuda", "trainer.deterministic=true", "stream.augment=[crop]", *OFTEN]
    make = partial(experiment, tmp_path, *words)
    whole = carry_out(make(), "whole")
    for steps in (5, 8, 13):
        with pytest.raises(PowerCutError):
            carry_out(cut(make(), steps=steps), "stopped")
    assert_equal_runs(whole, carry_out(make(), "stopped"))


@pytest.mark.parametrize(
    "words", [["strategy.strength=1"], ["strategy=er"], ["strategy=derpp"]], ids=["ewc", "er", "derpp"]
)
def test_nothing_in_a_step_waits_for_the_device(words, cl_runner, monkeypatch):
    from cl_runner.trainer import Training

    step = Training.step

    def watched(self, batch):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Training, "step", watched)
    status, said = cl_runner("device=cuda", *words)
    assert status == 0, said


# Images, weight, settings and passes of a layer, as `conv_case` takes them.
LAYERS = {
    "ResNet-18, first": ((32, 3, 32, 32), (64, 3, 3, 3), ((1, 1), (1, 1), (1, 1), 1), 1),
    "ResNet-18, layer 1": ((32, 64, 32, 32), (64, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1), 2),
    "ResNet-18, layer 4": ((32, 256, 8, 8), (512, 256, 3, 3), ((2, 2), (1, 1), (1, 1), 1), 1),
    "ResNet-50, stem": ((8, 3, 112, 112), (64, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1), 1),
    "ResNet-50, shortcut": ((16, 256, 14, 14), (512, 256, 1, 1), ((2, 2), (0, 0), (1, 1), 1), 1),
    "MobileNetV2, expansion": ((32, 24, 16, 16), (144, 24, 1, 1), ((1, 1), (0, 0), (1, 1), 1), 2),
    "MobileNetV2, depthwise": ((32, 144, 16, 16), (144, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 144), 2),
    "ConvNeXt, depthwise": ((8, 96, 14, 14), (96, 1, 7, 7), ((1, 1), (3, 3), (1, 1), 96), 1),
    "ResNeXt, groups": ((16, 128, 14, 14), (128, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 32), 1),
}
BOUNDS: dict[kernels.Precision, float] = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 5e-3}


@pytest.fixture
def every_candidate(monkeypatch):
    """Have each candidate add to an `out` of its own instead of timing them; returns those by their names."""
    found = {}

    def each(key, candidates, like, timed):
        for name, candidate in candidates.items():
            found[name] = like.clone()
            candidate(found[name])
        return lambda out: None

    monkeypatch.setattr(kernels, "fastest", each)
    return found


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kernel_of_a_convolution_agrees_with_autograd(every_candidate, layer, layout, precision):
    images, weight, settings, passes = LAYERS[layer]
    out, gradients, inputs = (tensor.to(CUDA) for tensor in conv_case(images, weight, settings, passes))
    inputs = inputs.to(memory_format=layout)
    gradients = gradients.flatten(0, 1).to(memory_format=layout).unflatten(0, gradients.shape[:2])
    expected = out + conv_twin(out, gradients, inputs, settings)
    kernels.add_conv_squares(out, gradients, inputs, *settings, precision)
    errors = {name: relative(found, expected) for name, found in every_candidate.items()}
    assert len(errors) >= 2
    assert max(errors.values()) <= BOUNDS[precision], errors


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("positions", [2, 65, 197])
def test_every_kernel_of_a_linear_layer_agrees_with_the_einsum(every_candidate, positions, precision):
    gradients = torch.randn(2, 16, positions, 576, device=CUDA)
    inputs = torch.randn(16, positions, 192, device=CUDA)
    out = torch.rand(576, 192, device=CUDA)
    expected = out + linear_twin(gradients, inputs)
    kernels.add_linear_squares(out, gradients, inputs, precision)
    errors = {name: relative(found[:, :, 0, 0], expected) for name, found in every_candidate.items()}
    assert len(errors) >= 2
    assert max(errors.values()) <= BOUNDS[precision], errors


def test_tf32_on_the_device_does_not_make_all_squares_too_small():
    gradients, inputs = torch.randn(1, 256, 8, 64, device=CUDA), torch.randn(256, 8, 64, device=CUDA)
    out = torch.zeros(64, 64, device=CUDA)
    kernels.add_linear_squares(out, gradients, inputs, "tf32")
    assert float(out.double().sum() / linear_twin(gradients, inputs).sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("layer", ["ResNet-18, layer 1", "MobileNetV2, depthwise"])
def test_a_kernel_gives_the_same_bits_at_every_call(layer):
    images, weight, settings, passes = LAYERS[layer]
    out, gradients, inputs = (tensor.to(CUDA) for tensor in conv_case(images, weight, settings, passes))
    again = out.clone()
    for total in (out, again):
        kernels.add_conv_squares(total, gradients, inputs, *settings, "tf32")
    assert torch.equal(out, again)


def test_the_fastest_candidate_is_measured_once_and_one_that_fails_is_never_taken():
    calls = []

    def fails(out):
        calls.append("fails")
        raise MemoryError

    def slow(out):
        calls.append("slow")
        torch.cuda._sleep(10_000_000)

    def quick(out):
        calls.append("quick")
        out.add_(1)

    candidates, out = {"fails": fails, "slow": slow, "quick": quick}, torch.zeros(1, device=CUDA)
    assert kernels.fastest("a test's", candidates, out) is quick
    measured = len(calls)
    assert kernels.fastest("a test's", candidates, out) is quick
    assert len(calls) == measured
    assert out.item() == 0


def test_a_new_shape_is_not_timed_while_a_graph_is_captured():
    out = torch.zeros(1, device=CUDA)
    with pytest.raises(RuntimeError, match="cannot be timed"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernels.fastest("another test's", {"only": lambda total: total.add_(1)}, out)


def test_replayed_backward_passes_add_what_eager_ones_add():
    first, second, batches, vectors = (
        torch.randn(size, device=CUDA) for size in ((64, 8), (10, 64), (3, 32, 8), (6, 32, 10))
    )

    def passes(replayed):
        total = torch.zeros_like(first)
        for batch in batches:
            leaf = first.clone().requires_grad_()
            logits = (batch @ leaf.T).tanh() @ second.T

            def add(one, logits=logits, leaf=leaf):
                total.add_(torch.autograd.grad(logits, leaf, one, retain_graph=True)[0].square())

            add = Replayed(add, vectors[0]) if replayed else add
            for one in vectors:
                add(one)
        return total

    expected = passes(replayed=False)
    with side_stream(CUDA):
        found = passes(replayed=True)
    torch.testing.assert_close(found, expected)
