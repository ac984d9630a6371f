"""Fused kernels that sum squared per-sample weight gradients, and the choice of the fastest on a device.

Triton has no wheels for macOS and Windows, so it is imported only when a kernel is called: ask `available` first.
Sums over samples and positions are kept in float32; their order, and so the result, is the same in every call.
"""

import functools
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("cl_runner")

Precision = Literal["fp32", "tf32", "bf16"]
Pair = tuple[int, int]
Adder = Callable[[Tensor], object]  # adds its result to the given tensor

WAVES = 4  # programs per processor of the device: enough to balance the load, few enough to keep their results small
CHOICES = 4096  # that `fastest` remembers
REPEATS = 3  # timings per candidate
FEW_UNITS = 16  # passes times samples: with fewer, compiling all candidates takes longer than the best of them saves
RIVAL = "rival"  # the candidate that is no kernel


class Tiling(NamedTuple):
    """The size of a program's tile and of the blocks of positions it works through, and its launch parameters."""

    rows: int
    columns: int
    positions: int
    warps: int
    stages: int = 1


# Each tile has two accumulators, product and squares: on compute capability 9.0, channels last, these do not spill.
TENSOR_CORES = (
    Tiling(128, 128, 32, 8, 3),
    Tiling(64, 128, 32, 4, 3),
    Tiling(128, 64, 32, 4, 3),
    Tiling(64, 64, 64, 4, 3),
)
PLAIN_CORES = (Tiling(128, 128, 16, 8, 2), Tiling(64, 64, 16, 4, 2), Tiling(32, 64, 16, 4, 2))
# Columns are taps here. The first two suit adjacent channels, the last two adjacent positions.
DEPTHWISE = (Tiling(64, 16, 4, 4), Tiling(32, 16, 8, 4), Tiling(16, 16, 16, 4), Tiling(4, 16, 64, 4))
# Rows per channel up to which the depthwise program is used; with more, the matrix program reuses enough.
MULTIPLICITY = 8
# Input channels per group: below the first, a tile always spans taps; above the second, never; between, try both.
FEW_CHANNELS, MANY_CHANNELS = 32, 128


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`: CUDA of compute capability 8 or later, or the CPU in Triton's interpreter.

    The interpreter (TRITON_INTERPRET=1 in the environment before Triton is imported) is for tests.
    """
    if not _installed():
        return False
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def add_linear_squares(
    out: Tensor, gradients: Tensor, inputs: Tensor, precision: Precision, rival: Adder | None = None
) -> None:
    """Add Σ_v Σ_b (Σ_t g[v, b, t, n] a[b, t, k])² to `out`, in place.

    Args:
        out: [N, K], float32 or float64.
        gradients: g, of the layer's output, [V, B, T, N], in any layout.
        inputs: a, [B, T, K], in any layout.
        precision: of the products: `fp32`; `tf32` and `bf16` round both operands to nearest.
        rival: another implementation, used where it measures faster.

    Raises ValueError where the shapes do not fit, and whatever `fastest` raises.
    """
    positions_last = inputs.transpose(1, 2)[:, :, None]  # [B, K, 1, T]
    outputs = gradients.transpose(2, 3)[:, :, :, None]  # [V, B, N, 1, T]
    adder = None if rival is None else lambda weight: rival(weight[:, :, 0, 0])
    add_conv_squares(out[:, :, None, None], outputs, positions_last, (1, 1), (0, 0), (1, 1), 1, precision, adder)


def add_conv_squares(
    out: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    precision: Precision,
    rival: Adder | None = None,
) -> None:
    """Add a convolution's Σ_v Σ_b (∂/∂W of pass v and sample b)² to `out`, in place. Depthwise ones compute in fp32.

    Args:
        out: [Cout, Cin/groups, kh, kw], float32 or float64. A 1d convolution has kh = H = 1.
        gradients: of the layer's output, [V, B, Cout, OH, OW], in any layout; channels last is fastest.
        inputs: [B, Cin, H, W], in any layout; zero-padded by the same amount on both sides.
        stride, padding, dilation, groups: the layer's.
        precision, rival: as in `add_linear_squares`.

    Raises ValueError where the shapes do not fit, and whatever `fastest` raises.
    """
    _check(out, gradients, inputs, groups)
    if gradients.numel() == 0 or inputs.numel() == 0:
        return
    flat = gradients.flatten(3)  # [V, B, Cout, T]: a view, except in layouts that no layer produces
    window = _Window(gradients.shape[4], stride, padding, dilation, groups)
    candidates: dict[Hashable, Adder] = {}
    if out.shape[1] == 1 and out.shape[0] // groups <= MULTIPLICITY:
        for tiling in DEPTHWISE:
            candidates[tiling] = functools.partial(
                _add_depthwise, gradients=flat, inputs=inputs, window=window, tiling=tiling
            )
    else:
        for tiling, tap_a_tile in _tilings(out, flat.shape[3], groups, precision):
            candidates[tiling, tap_a_tile] = functools.partial(
                _add_matrix, gradients=flat, inputs=inputs, window=window, precision=precision, tiling=tiling,
                tap_a_tile=tap_a_tile,
            )  # fmt: skip
    if rival is not None:
        candidates[RIVAL] = rival
    # Rounded up, so that a short last batch does not need a choice of its own.
    count = flat.shape[0] * flat.shape[1]
    units = (count - 1).bit_length()
    layout = flat.stride()[2:], inputs.stride()[1:], flat.dtype, inputs.dtype
    key = out.shape, flat.shape[3], inputs.shape[1:], window, precision, units, layout
    fastest(key, candidates, out, timed=count >= FEW_UNITS)(out)


_winners: OrderedDict[Hashable, Hashable] = OrderedDict()


def fastest(key: Hashable, candidates: Mapping[Hashable, Adder], like: Tensor, timed: bool = True) -> Adder:
    """The fastest candidate, timed when this `key` with these candidates first comes up.

    Each candidate adds its result to a tensor like `like`; for timing, to a scratch tensor. A candidate that fails is
    never chosen. Off CUDA the first is taken; if not `timed`, and with deterministic algorithms, whose results must not
    hang on timings, the first that does not fail.

    Raises:
        RuntimeError: if asked to time during the capture of a CUDA graph. Run the same work once before capturing it.
        Exception: the last candidate's, if all of them fail.
    """
    if like.device.type != "cuda":
        return next(iter(candidates.values()))
    timed = timed and not torch.are_deterministic_algorithms_enabled()
    full_key = (key, like.device, tuple(candidates), timed)
    if full_key not in _winners:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"kernels of a new shape cannot be timed while a CUDA graph is captured: {key}")
        _winners[full_key] = _measured(candidates, torch.zeros_like(like), timed)
        if len(_winners) > CHOICES:
            _winners.popitem(last=False)
    return candidates[_winners[full_key]]


def _measured(candidates: Mapping[Hashable, Adder], scratch: Tensor, timed: bool) -> Hashable:
    times: dict[Hashable, float] = {}
    failure = RuntimeError("expected at least one candidate, got none")
    with torch.cuda.device(scratch.device):
        for name, candidate in candidates.items():
            try:
                times[name] = _milliseconds(candidate, scratch)
                if not timed:
                    break
            # A tile too large for this device, no C compiler for Triton's launcher, out of memory: many types.
            except Exception as problem:
                log.debug("candidate %s fails: %s", name, problem)
                failure = problem
    if not times:
        raise failure
    if list(times) == [RIVAL] and len(candidates) > 1:
        _warn_of_slowness(f"{type(failure).__name__}: {failure}".partition("\n")[0])
    return min(times, key=lambda name: times[name])


_slow: list[str] = []  # the first reason, once it has been told


def _warn_of_slowness(reason: str) -> None:
    if not _slow:
        _slow.append(reason)
        log.warning("no fused kernel runs for a layer's shape, so a Fisher takes longer: %s", reason)


def _milliseconds(candidate: Adder, scratch: Tensor) -> float:
    candidate(scratch)  # compiles
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        candidate(scratch)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


class _Window(NamedTuple):
    """How a convolution reads its input."""

    width_out: int
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


def _check(out: Tensor, gradients: Tensor, inputs: Tensor, groups: int) -> None:
    rows, channels = out.shape[:2]
    samples = gradients.shape[1]
    if gradients.shape[2] != rows or inputs.shape[:2] != (samples, channels * groups) or rows % groups:
        raise ValueError(
            f"expected gradients [V, B, {rows}, ...] and inputs [B, {channels * groups}, ...] of {groups} groups; "
            f"got {list(gradients.shape)} and {list(inputs.shape)}"
        )


def _tilings(out: Tensor, positions: int, groups: int, precision: Precision) -> list[tuple[Tiling, bool]]:
    """Tilings, none much larger than the matrices, and whether a tile is confined to one tap."""
    rows, channels, taps = out.shape[0] // groups, out.shape[1], out.shape[2] * out.shape[3]
    keep = [True] if taps == 1 or channels > MANY_CHANNELS else [False] if channels < FEW_CHANNELS else [True, False]
    return list(
        dict.fromkeys(
            (
                tiling._replace(
                    rows=_fitting(tiling.rows, rows),
                    columns=_fitting(tiling.columns, channels if tap_a_tile else channels * taps),
                    positions=_fitting(tiling.positions, positions),
                ),
                tap_a_tile,
            )
            for tap_a_tile in keep
            for tiling in (PLAIN_CORES if precision == "fp32" else TENSOR_CORES)
        )
    )


def _fitting(block: int, size: int) -> int:
    """A power of two, at least 16, the smallest operand of a matrix product in Triton."""
    return min(block, max(16, 1 << (size - 1).bit_length()))


def _add_matrix(
    out: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    window: _Window,
    precision: Precision,
    tiling: Tiling,
    tap_a_tile: bool,
) -> None:
    groups = window.groups
    rows, channels, taps = out.shape[0] // groups, out.shape[1], out.shape[2] * out.shape[3]
    column_tiles = (
        taps * math.ceil(channels / tiling.columns) if tap_a_tile else math.ceil(channels * taps / tiling.columns)
    )
    tiles = math.ceil(rows / tiling.rows) * column_tiles
    units, splits = _splits(gradients, tiles * groups)
    partial = torch.empty(splits, out.shape[0], *out.shape[2:], channels, dtype=torch.float32, device=out.device)
    # Where input and output share evenly spaced positions, addresses can be computed without coordinates.
    pointwise = (
        (taps, window.stride, window.padding) == (1, (1, 1), (0, 0))
        and (inputs.shape[2] == 1 or inputs.stride(2) == inputs.shape[3] * inputs.stride(3))
    )  # fmt: skip
    with torch.cuda.device_of(out):
        _programs().matrix_squares[tiles, splits, groups](
            gradients, inputs, partial,
            gradients.shape[0] * gradients.shape[1], units, gradients.shape[0], gradients.shape[3],
            rows, channels * taps, channels, out.shape[3], window.width_out, *inputs.shape[2:],
            *gradients.stride(), *inputs.stride(),
            *window.stride, *window.padding, *window.dilation,
            pointwise=pointwise, tap_a_tile=tap_a_tile, precision="ieee" if precision == "fp32" else precision,
            block_m=tiling.rows, block_n=tiling.columns, block_t=tiling.positions,
            num_warps=tiling.warps, num_stages=tiling.stages, enable_fp_fusion=True,
        )  # fmt: skip
    out += partial.sum(0).permute(0, 3, 1, 2)


def _add_depthwise(out: Tensor, gradients: Tensor, inputs: Tensor, window: _Window, tiling: Tiling) -> None:
    rows, taps = out.shape[0], out.shape[2] * out.shape[3]
    block_taps = min(tiling.columns, 1 << (taps - 1).bit_length())
    row_tiles, tap_tiles = math.ceil(rows / tiling.rows), math.ceil(taps / block_taps)
    units, splits = _splits(gradients, row_tiles * tap_tiles)
    partial = torch.empty(splits, rows, taps, dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        _programs().depthwise_squares[row_tiles, splits, tap_tiles](
            gradients, inputs, partial,
            gradients.shape[0] * gradients.shape[1], units, gradients.shape[0], gradients.shape[3],
            rows, rows // window.groups, taps, out.shape[3], window.width_out, *inputs.shape[2:],
            *gradients.stride(), *inputs.stride(),
            *window.stride, *window.padding, *window.dilation,
            block_taps=block_taps, block_m=tiling.rows, block_t=tiling.positions,
            num_warps=tiling.warps, enable_fp_fusion=True,
        )  # fmt: skip
    out += partial.sum(0).view(out.shape)


def _splits(gradients: Tensor, tiles: int) -> Pair:
    """Units per program (a unit is one pass of one sample), and programs per tile."""
    units = gradients.shape[0] * gradients.shape[1]
    wanted = min(units, max(1, WAVES * _processors(gradients.device) // tiles))
    each = math.ceil(units / wanted)
    return each, math.ceil(units / each)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


@functools.cache
def _programs() -> Any:  # Triton's compiled functions are untyped
    from cl_runner.gradients import triton_programs

    return triton_programs
