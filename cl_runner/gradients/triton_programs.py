"""Triton programs that sum squared per-sample weight gradients without ever writing one to memory.

A sample's weight gradient is a matrix product over its positions. Here its accumulator is squared in registers and
reset for the next sample, at the arithmetic and memory traffic of the ordinary, summed weight gradient. Every program
writes its own tile of `partial`, so there are no atomics and the result does not depend on the programs' order.

Importing this module imports Triton. If TRITON_INTERPRET=1 is set before that, the programs run on CPU tensors.
"""

import triton
import triton.language as tl

COUNTS = ("units", "units_a_program", "passes")  # change from batch to batch: one compiled program serves them all


@triton.jit
def rounded(values):
    """Round to the nearest tf32, ties away from zero. Tensor cores truncate: all squares would be 0.1 % too small."""
    return ((values.to(tl.float32).to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=COUNTS)
def matrix_squares(
    gradients, inputs, partial,
    units, units_a_program, passes, positions,
    rows, columns, channels, kernel_w, width_out, height, width,
    g_pass, g_sample, g_row, g_position,
    x_sample, x_channel, x_height, x_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    pointwise: tl.constexpr, tap_a_tile: tl.constexpr,
    precision: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    """partial[split, group, row, tap, channel] = Σ over the split's units of (Σ_t g[t, row] x[t, tap, channel])².

    A unit is one pass of one sample. A row is an output channel of the group, a column one of its input channels under
    one tap of the kernel, taps varying slowest; `positions` are the output's. The input is read where the convolution
    reads it (implicit im2col), if pointwise at position t itself. tap_a_tile: a tile's columns belong to one tap, which
    makes addresses cheap; otherwise tiles span taps, which wastes less where there are few channels.
    """
    row_tiles = tl.cdiv(rows, block_m)
    row_tile = tl.program_id(0) % row_tiles
    column_tile = tl.program_id(0) // row_tiles
    split, group = tl.program_id(1), tl.program_id(2)

    row = row_tile * block_m + tl.arange(0, block_m)
    if tap_a_tile:
        tiles = tl.cdiv(channels, block_n)
        tap = column_tile // tiles
        channel = (column_tile % tiles) * block_n + tl.arange(0, block_n)
        column = tap * channels + channel
        here = channel < channels
        down, right = tap // kernel_w * dilation_h, tap % kernel_w * dilation_w
    else:
        column = column_tile * block_n + tl.arange(0, block_n)
        channel = column % channels
        here = column < columns
        down = (column // channels // kernel_w * dilation_h)[None, :]
        right = (column // channels % kernel_w * dilation_w)[None, :]

    gradients += (group * rows + row)[:, None] * g_row
    inputs += (group * channels + channel)[None, :] * x_channel
    blocks = tl.cdiv(positions, block_t)
    first = split * units_a_program
    last = tl.minimum(first + units_a_program, units)
    product = tl.zeros((block_m, block_n), tl.float32)
    squares = tl.zeros((block_m, block_n), tl.float32)
    # One loop over both units and positions, so that the next unit's loads start before this one ends.
    for step in range(first * blocks, last * blocks):
        unit, block = step // blocks, step % blocks
        t = block * block_t + tl.arange(0, block_t)
        sample = (unit // passes).to(tl.int64)
        g_at = gradients + (unit % passes).to(tl.int64) * g_pass + sample * g_sample + t[None, :] * g_position
        g = tl.load(g_at, mask=(row < rows)[:, None] & (t < positions)[None, :], other=0.0)
        inside = here[None, :] & (t < positions)[:, None]
        if pointwise:
            x_at = inputs + sample * x_sample + t[:, None] * x_width
        else:
            h = (t // width_out * stride_h - padding_h)[:, None] + down
            w = (t % width_out * stride_w - padding_w)[:, None] + right
            inside &= (h >= 0) & (h < height) & (w >= 0) & (w < width)
            x_at = inputs + sample * x_sample + h * x_height + w * x_width
        x = tl.load(x_at, mask=inside, other=0.0)
        if precision == "bf16":
            product = tl.dot(g.to(tl.bfloat16), x.to(tl.bfloat16), product)
        else:
            if precision == "tf32":
                g, x = rounded(g), rounded(x)
            product = tl.dot(g.to(tl.float32), x.to(tl.float32), product, input_precision=precision)
        if block == blocks - 1:
            squares += product * product
            product = tl.zeros((block_m, block_n), tl.float32)

    partial += ((split * tl.num_programs(2) + group).to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    tl.store(partial, squares, mask=(row < rows)[:, None] & here[None, :])


@triton.jit(do_not_specialize=COUNTS)
def depthwise_squares(
    gradients, inputs, partial,
    units, units_a_program, passes, positions,
    rows, multiplicity, taps, kernel_w, width_out, height, width,
    g_pass, g_sample, g_row, g_position,
    x_sample, x_channel, x_height, x_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    block_taps: tl.constexpr, block_m: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    """partial[split, row, tap] = Σ over the split's units of (Σ_t g[t, row] x[t, tap])², each row with its own channel.

    `multiplicity` rows share a channel. All that a matrix product could reuse here is the gradient, which is read once
    for `block_taps` shifts of the input.
    """
    row = (tl.program_id(0) * block_m + tl.arange(0, block_m))[None, None, :]
    tap = (tl.program_id(2) * block_taps + tl.arange(0, block_taps))[None, :, None]
    split = tl.program_id(1)
    here = (row < rows) & (tap < taps)
    down = tap // kernel_w * dilation_h - padding_h
    right = tap % kernel_w * dilation_w - padding_w

    gradients += row * g_row
    inputs += row // multiplicity * x_channel
    first = split * units_a_program
    squares = tl.zeros((block_taps, block_m), tl.float32)
    for unit in range(first, tl.minimum(first + units_a_program, units)):
        sample = (unit // passes).to(tl.int64)
        offset = (unit % passes).to(tl.int64) * g_pass + sample * g_sample
        # Summed over its first axis once per unit: within a unit, no thread waits for another.
        products = tl.zeros((block_t, block_taps, block_m), tl.float32)
        for start in range(0, positions, block_t):
            t = (start + tl.arange(0, block_t))[:, None, None]
            g = tl.load(gradients + offset + t * g_position, mask=(t < positions) & (row < rows), other=0.0)
            h = t // width_out * stride_h + down
            w = t % width_out * stride_w + right
            inside = (t < positions) & here & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            x = tl.load(inputs + sample * x_sample + h * x_height + w * x_width, mask=inside, other=0.0)
            products += g.to(tl.float32) * x.to(tl.float32)
        product = tl.sum(products, axis=0)
        squares += product * product

    column, line = tl.reshape(tap, (block_taps, 1)), tl.reshape(row, (1, block_m))
    at = partial + (split.to(tl.int64) * rows + line) * taps + column
    tl.store(at, squares, mask=(line < rows) & (column < taps))
