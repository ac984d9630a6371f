"""The kernels' logic on the CPU, in Triton's interpreter; what only a device can show is in `test_gpu.py`.

Triton decides on import whether it interprets, and torch may import it at any time: so all of this runs in a process of
its own.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from multiprocessing import get_context

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_runner.gradients import kernels

FP32, TF32, BF16 = 1e-6, 1e-3, 4e-3  # relative errors, of the norm

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheels for this platform")


@pytest.fixture(scope="module")
def interpreted():
    """Call a function of this module in a process where Triton interprets."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # Triton interprets by numpy
                patch.setenv(name, "1")
            pool.submit(int).result()  # starts the process, which inherits the variables
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The assembly of a program, given its name and constants, for compute capability 9.0 and channels last."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def assembly(name: str, constants: dict) -> str:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from cl_runner.gradients import triton_programs

        program = getattr(triton_programs, name)
        tensors = dict.fromkeys(("gradients", "inputs", "partial"), "*fp32")
        types = dict.fromkeys(program.arg_names, "i32") | tensors
        ones = {key: 1 for key in ("g_row", "x_channel", "multiplicity") if key in types} | constants
        types |= dict.fromkeys(ones, "constexpr")
        # Sizes and strides of a usual layer, multiples of 16, which the launcher tells the compiler.
        known = [place for place, kind in enumerate(types.values()) if kind != "constexpr"]
        attributes = {(place,): [["tt.divisibility", 16]] for place in known}
        source = ASTSource(program, types, {(program.arg_names.index(key),): ones[key] for key in ones}, attributes)
        options = {"enable_fp_fusion": True}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    return assembly


def linear_twin(gradients: Tensor, inputs: Tensor) -> Tensor:
    return torch.einsum("vbtn,btk->vbnk", gradients.double(), inputs.double()).square().sum((0, 1))


def conv_twin(weight: Tensor, gradients: Tensor, inputs: Tensor, settings: tuple) -> Tensor:
    """Autograd, one sample and one pass at a time."""
    stride, padding, dilation, groups = settings
    weight = weight.double().requires_grad_()
    total = torch.zeros_like(weight)
    for sample, image in enumerate(inputs.double()):
        output = F.conv2d(image[None], weight, None, stride, padding, dilation, groups)
        for one in gradients[:, sample].double():
            total = total + torch.autograd.grad(output, weight, one[None], retain_graph=True)[0].square()
    return total.detach()


def conv_case(images: tuple, weight: tuple, settings: tuple, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """A non-zero `out`, and random gradients and inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs, out = torch.randn(images, generator=generator), torch.rand(weight, generator=generator)
    stride, padding, dilation, groups = settings
    shape = F.conv2d(inputs, out, None, stride, padding, dilation, groups).shape
    return out, torch.randn(passes, *shape, generator=generator), inputs


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def linear_error(
    passes: int, samples: int, positions: int, rows: int, columns: int, precision: kernels.Precision
) -> float:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(passes, samples, positions, rows, generator=generator)
    inputs = torch.randn(samples, positions, columns, generator=generator)
    out = torch.rand(rows, columns, generator=generator)
    expected = out + linear_twin(gradients, inputs)
    kernels.add_linear_squares(out, gradients, inputs, precision)
    return relative(out, expected)


def conv_error(
    images: tuple, weight: tuple, settings: tuple, passes: int, layout: str, precision: kernels.Precision
) -> float:
    out, gradients, inputs = conv_case(images, weight, settings, passes)
    expected = out + conv_twin(out, gradients, inputs, settings)
    if layout == "channels_last":
        inputs = inputs.to(memory_format=torch.channels_last)
        gradients = gradients.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, gradients.shape[:2])
    if layout == "sliced":
        inputs = F.pad(inputs, (1, 2, 3, 0, 0, 1), value=torch.nan)[:, :-1, 3:, 1:-2]
        gradients = F.pad(gradients, (0, 1, 0, 2), value=torch.nan)[..., :-2, :-1]
    if layout == "bfloat16":
        inputs, gradients = inputs.bfloat16(), gradients.bfloat16()
    if layout == "expanded":
        inputs, gradients = inputs[:1].expand_as(inputs), gradients[:, :, :1].expand_as(gradients)
        expected = out + conv_twin(out, gradients, inputs, settings)
    kernels.add_conv_squares(out, gradients, inputs, *settings, precision)
    return relative(out, expected)


PLAIN = ((1, 1), (0, 0), (1, 1), 1)
SAME = ((1, 1), (1, 1), (1, 1), 1)
CONVOLUTIONS = {
    "3x3": ((3, 5, 7, 6), (9, 5, 3, 3), SAME, 2),
    "1x1": ((3, 5, 7, 6), (9, 5, 1, 1), PLAIN, 2),
    "1x1, stride 2": ((3, 5, 7, 6), (9, 5, 1, 1), ((2, 2), (0, 0), (1, 1), 1), 1),
    "1x1, padded": ((3, 5, 3, 4), (9, 5, 1, 1), ((1, 1), (1, 0), (1, 1), 1), 1),
    "5x3, uneven": ((2, 3, 12, 9), (4, 3, 5, 3), ((2, 1), (2, 0), (1, 2), 1), 3),
    "7x7, stem": ((2, 3, 15, 15), (8, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1), 1),
    "a channel": ((2, 1, 8, 8), (16, 1, 3, 3), SAME, 1),
    "as large as the image": ((2, 4, 4, 4), (6, 4, 4, 4), PLAIN, 1),
    "patches": ((2, 3, 8, 8), (20, 3, 4, 4), ((4, 4), (0, 0), (1, 1), 1), 2),
    "1d": ((3, 4, 1, 19), (5, 4, 1, 3), ((1, 2), (0, 1), (1, 1), 1), 2),
    "a tap a tile": ((2, 40, 5, 5), (17, 40, 3, 3), SAME, 1),
    "many channels": ((1, 130, 3, 3), (17, 130, 3, 3), SAME, 1),
    "groups": ((3, 6, 5, 5), (9, 2, 3, 3), ((1, 1), (1, 1), (1, 1), 3), 2),
    "1x1, groups": ((2, 6, 5, 5), (4, 3, 1, 1), ((1, 1), (0, 0), (1, 1), 2), 2),
    "depthwise": ((3, 7, 6, 5), (7, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 7), 2),
    "depthwise 5x3, uneven": ((2, 5, 12, 9), (5, 1, 5, 3), ((2, 1), (2, 1), (1, 2), 5), 1),
    "depthwise 7x7": ((1, 3, 9, 9), (3, 1, 7, 7), ((1, 1), (3, 3), (1, 1), 3), 1),
    "depthwise, two rows a channel": ((2, 3, 6, 5), (6, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 3), 3),
    "depthwise, many": ((2, 70, 3, 3), (70, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 70), 1),
    "depthwise, many rows a channel": ((2, 2, 4, 4), (36, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 2), 1),
}


@needs_triton
@pytest.mark.parametrize("positions", [1, 2, 16, 17, 50])
@pytest.mark.parametrize(
    ("passes", "samples", "rows", "columns"), [(1, 1, 1, 1), (1, 9, 3, 70), (2, 4, 130, 5), (3, 3, 31, 33)]
)
def test_the_squares_of_a_linear_layer_are_the_einsums(interpreted, positions, passes, samples, rows, columns):
    assert interpreted(linear_error, passes, samples, positions, rows, columns, "fp32") <= FP32


@needs_triton
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_squares_of_a_convolution_are_autograds(interpreted, case):
    assert interpreted(conv_error, *CONVOLUTIONS[case], "contiguous", "fp32") <= FP32


@needs_triton
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("case", ["3x3", "1x1", "groups", "depthwise", "a tap a tile"])
def test_the_squares_do_not_depend_on_the_layout(interpreted, case, layout):
    assert interpreted(conv_error, *CONVOLUTIONS[case], layout, "fp32") <= FP32


@needs_triton
def test_tf32_stays_within_its_bound(interpreted):
    assert FP32 < interpreted(linear_error, 2, 8, 40, 33, 30, "tf32") <= TF32
    assert FP32 < interpreted(conv_error, *CONVOLUTIONS["3x3"], "contiguous", "tf32") <= TF32


@needs_triton
@pytest.mark.parametrize("case", ["3x3", "depthwise"])
def test_operands_that_come_in_bf16_stay_within_its_bound(interpreted, case):
    # The interpreter cannot multiply bf16; the products are exact in float32, so rounding is the only error.
    assert FP32 < interpreted(conv_error, *CONVOLUTIONS[case], "bfloat16", "fp32") <= BF16


def bias_of_tf32() -> float:
    generator = torch.Generator().manual_seed(0)
    gradients, inputs = torch.randn(1, 64, 8, 32, generator=generator), torch.randn(64, 8, 32, generator=generator)
    out = torch.zeros(32, 32)
    kernels.add_linear_squares(out, gradients, inputs, "tf32")
    return abs(float(out.double().sum() / linear_twin(gradients, inputs).sum()) - 1)


@needs_triton
def test_tf32_does_not_make_all_squares_too_small(interpreted):
    assert interpreted(bias_of_tf32) <= 1e-4  # 1.3e-3 if truncated instead of rounded


def every_tiling_error(precision: kernels.Precision) -> float:
    """The largest error of all candidates that a device would choose from."""
    errors = []
    for case in ("a tap a tile", "depthwise 5x3, uneven"):
        images, weight, settings, passes = CONVOLUTIONS[case]
        out, gradients, inputs = conv_case(images, weight, settings, passes)
        expected = out + conv_twin(out, gradients, inputs, settings)

        def each(key, candidates, like, timed, expected=expected):
            for candidate in candidates.values():
                found = like.clone()
                candidate(found)
                errors.append(relative(found, expected))
            return lambda _: None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "fastest", each)
            kernels.add_conv_squares(out, gradients, inputs, *settings, precision)
    return max(errors)


@needs_triton
@pytest.mark.parametrize(("precision", "bound"), [("fp32", FP32), ("tf32", TF32)])
def test_every_tiling_computes_the_same(interpreted, precision, bound):
    assert interpreted(every_tiling_error, precision) <= bound


def result(samples: int) -> Tensor:
    out, gradients, inputs = conv_case((samples, 4, 6, 6), (6, 4, 3, 3), SAME, 1)
    kernels.add_conv_squares(out, gradients, inputs, *SAME, "fp32")
    return out


@needs_triton
def test_the_same_call_gives_the_same_bits(interpreted):
    assert torch.equal(interpreted(result, 11), interpreted(result, 11))


@needs_triton
def test_no_samples_add_nothing(interpreted):
    weight = torch.rand((6, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(interpreted(result, 0), weight)


def test_shapes_that_do_not_fit_are_refused():
    out, gradients, inputs = conv_case((2, 4, 6, 6), (6, 4, 3, 3), SAME, 1)
    with pytest.raises(ValueError, match=r"expected gradients \[V, B, 6, ...\] and inputs \[B, 4, ...\]"):
        kernels.add_conv_squares(out, gradients, inputs[:, :3], *SAME, "fp32")


def test_off_the_device_the_first_candidate_is_taken_untimed():
    def never(out: Tensor) -> None:
        raise AssertionError

    first = lambda out: out.add_(1)  # noqa: E731
    assert kernels.fastest("key", {"first": first, "second": never}, torch.zeros(1)) is first


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Have a candidate's result, added to zeros, pass for its milliseconds."""

    def milliseconds(candidate, scratch):
        candidate(scratch.zero_())
        return scratch.item()

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(kernels, "_milliseconds", milliseconds)
    monkeypatch.setattr(kernels, "_slow", [])


def fails(out: Tensor) -> None:
    raise RuntimeError("no compiler\nfor the launcher")


def fails_otherwise(out: Tensor) -> None:
    raise MemoryError("too large")


def test_the_fastest_is_taken_or_untimed_the_first_that_does_not_fail(as_on_a_device, caplog):
    candidates = {"broken": fails, "slow": lambda out: out.add_(3), "quick": lambda out: out.add_(1)}
    for timed, winner in ((True, "quick"), (False, "slow")):
        assert kernels._measured(candidates, torch.zeros(1), timed) == winner
    assert not caplog.records


def test_kernels_are_timed_only_where_there_are_units_enough(monkeypatch):
    asked = []

    def fastest(key, candidates, like, timed):
        asked.append(timed)
        return lambda _: None

    monkeypatch.setattr(kernels, "fastest", fastest)
    for samples in (2, kernels.FEW_UNITS):
        out, gradients, inputs = conv_case((samples, 4, 6, 6), (6, 4, 3, 3), SAME, 1)
        kernels.add_conv_squares(out, gradients, inputs, *SAME, "fp32")
    assert asked == [False, True]


def test_a_device_on_which_no_kernel_runs_is_warned_of_once(as_on_a_device, caplog):
    for broken, timed in ((fails, True), (fails_otherwise, False), (fails, True)):
        candidates = {"broken": broken, kernels.RIVAL: lambda out: out.add_(1)}
        assert kernels._measured(candidates, torch.zeros(1), timed) == kernels.RIVAL
    (record,) = caplog.records
    assert record.getMessage().endswith("so a Fisher takes longer: RuntimeError: no compiler")


def test_without_the_interpreter_there_are_no_kernels_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.available(torch.device("cpu"))


@needs_triton
def test_in_the_interpreter_there_are_kernels_on_the_cpu(interpreted):
    assert interpreted(kernels.available, torch.device("cpu"))


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="interpreted, nothing is compiled")
@pytest.mark.parametrize(("precision", "tap_a_tile"), [("ieee", False), ("tf32", True), ("bf16", False)])
def test_the_matrix_program_compiles_for_a_device_that_is_not_there(compiled, precision, tap_a_tile):
    tiles = {"pointwise": False, "tap_a_tile": tap_a_tile, "block_m": 64, "block_n": 64, "block_t": 32}
    tensor_cores = "wgmma" in compiled("matrix_squares", tiles | {"precision": precision})
    assert tensor_cores == (precision != "ieee")


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="interpreted, nothing is compiled")
def test_the_depthwise_program_reads_channels_that_lie_together_four_at_a_time(compiled):
    assert "ld.global.v4" in compiled("depthwise_squares", {"block_taps": 16, "block_m": 32, "block_t": 8})


def estimated(backbone: str, precision: str) -> tuple[float, int]:
    """The error of a Fisher that takes several blocks of passes, and how often a kernel was called."""
    from dataclasses import replace

    from cl_runner.fisher import reference
    from cl_runner.fisher.estimators import Exact
    from tests.fisher.cases import distance, examples, model

    calls = 0
    add = kernels.add_conv_squares

    def counted(*args) -> None:
        nonlocal calls
        calls += 1
        add(*args)

    kernels.add_conv_squares = counted
    subject, data = model(backbone).float(), examples(5)
    found = replace(Exact(), logits="all", precision=precision, batch_size=3)(subject, data)  # five passes
    return distance(found, reference.exact(subject, data, "all")), calls


@needs_triton
@pytest.mark.parametrize("backbone", ["conv", "depthwise", "groups", "batch norm", "attention"])
def test_a_fisher_by_kernels_is_its_definition(interpreted, backbone):
    error, calls = interpreted(estimated, backbone, "fp32")
    assert error < 1e-5
    assert calls >= 4, "two batches and two blocks of passes for each layer"


@needs_triton
def test_a_fisher_by_kernels_in_tf32_is_nearly_its_definition(interpreted):
    assert 1e-6 < interpreted(estimated, "conv", "tf32")[0] < TF32
