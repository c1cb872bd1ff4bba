"""Triton kernels that rebuild logits tile by tile and keep none: sums over keys of ``exp(row . key * sharpness + ...)``, alone or times a value.

Needs the package triton. ``teacher.kernels`` has the operators that start these kernels, and what they are for.

    gather     of some rows and a share of the keys: peak, total, and the values weighted and summed
    merge      the shares of the keys together
    scatter    the gradient of some prototypes: a sum over the student's rows and one over the teacher's

Every number is summed in one fixed order by one program, without atomics: the same bits in every rerun. Sums and exponents
are fp32; products of fp32 inputs are fp32 without TF32, of bf16 inputs those of the tensor cores with fp32 sums.
A shape is (width, main, rest): the columns of a row are cut into two powers of two, of which the second may be 0.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SIZES = ["num_rows", "num_keys", "share", "num_shares", "num_prototypes", "num_targets"]


@triton.jit
def _offsets(
    first, stop, block: tl.constexpr, start: tl.constexpr, part: tl.constexpr, width: tl.constexpr
):
    """Where ``part`` columns from ``start`` on of some rows lie, and which of them there are."""
    row = first + tl.arange(0, block)
    column = start + tl.arange(0, part)
    inside = (row[:, None] < stop) & (column[None, :] < width)
    return row[:, None].to(tl.int64) * width + column[None, :], inside


@triton.jit
def _load(pointer, first, stop, block: tl.constexpr, shape: tl.constexpr):
    """Both parts of some rows, zeros outside; the first one twice where there is no second."""
    offsets, inside = _offsets(first, stop, block, 0, shape[1], shape[0])
    main = tl.load(pointer + offsets, mask=inside, other=0.0)
    rest = main
    if shape[2] > 0:
        offsets, inside = _offsets(first, stop, block, shape[1], shape[2], shape[0])
        rest = tl.load(pointer + offsets, mask=inside, other=0.0)
    return main, rest


@triton.jit
def _store(pointer, first, stop, main, rest, block: tl.constexpr, shape: tl.constexpr):
    offsets, inside = _offsets(first, stop, block, 0, shape[1], shape[0])
    tl.store(pointer + offsets, main.to(pointer.dtype.element_ty), mask=inside)
    if shape[2] > 0:
        offsets, inside = _offsets(first, stop, block, shape[1], shape[2], shape[0])
        tl.store(pointer + offsets, rest.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _zeros(block: tl.constexpr, part: tl.constexpr):
    return tl.zeros([block, part], tl.float32)


@triton.jit
def _empty_sums(block: tl.constexpr, shape: tl.constexpr):
    main = _zeros(block, shape[1])
    rest = main
    if shape[2] > 0:
        rest = _zeros(block, shape[2])
    return main, rest


@triton.jit
def _dot(one, other, found):
    """``found + one @ other`` with fp32 sums. The interpreter holds bf16 as bits, which it cannot multiply."""
    if INTERPRETED:
        one = one.to(tl.float32)
        other = other.to(tl.float32)
    return tl.dot(one, other, found, input_precision="ieee")


@triton.jit
def _logits(
    main,
    rest,
    key_main,
    key_rest,
    log_keys,
    sharpness,
    first,
    stop,
    block: tl.constexpr,
    shape: tl.constexpr,
):
    """Products of rows and keys times ``sharpness``, with the keys' log factors; -inf from ``stop`` on."""
    found = _dot(main, tl.trans(key_main), None)
    if shape[2] > 0:
        found = _dot(rest, tl.trans(key_rest), found)
    key = first + tl.arange(0, block)
    if log_keys is not None:
        bias = tl.load(log_keys + key, mask=key < stop, other=float("-inf"))
    else:
        bias = tl.where(key < stop, 0.0, float("-inf"))
    return found * sharpness + bias[None, :]


@triton.jit
def _add(sum_main, sum_rest, weight, main, rest, shape: tl.constexpr):
    """Sums of rows plus values by their weights, which take the values' dtype."""
    weight = weight.to(main.dtype)
    sum_main = _dot(weight, main, sum_main)
    if shape[2] > 0:
        sum_rest = _dot(weight, rest, sum_rest)
    return sum_main, sum_rest


@triton.jit(do_not_specialize=SIZES)
def gather(
    rows, keys, values, log_rows, log_keys, peaks, totals, sums, num_rows, num_keys, share, sharpness,
    shape: tl.constexpr, value_shape: tl.constexpr, block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """With ``log_rows`` weights are as these say, else relative to a running peak. Without ``values`` keys are the values; without ``sums`` there are none."""
    first = tl.program_id(0) * block
    main, rest = _load(rows, first, num_rows, block, shape)
    row = first + tl.arange(0, block)
    peak = tl.full([block], float("-inf"), tl.float32)
    if log_rows is not None:
        peak = -tl.load(log_rows + row, mask=row < num_rows, other=0.0)
    total = tl.zeros([block], tl.float32)
    rounded = total
    if sums is not None:
        sum_main, sum_rest = _empty_sums(block, value_shape)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, num_keys)
    for at in range(start, stop, key_block):
        value_main, value_rest = _load(keys, at, stop, key_block, shape)
        logits = _logits(
            main, rest, value_main, value_rest, log_keys, sharpness, at, stop, key_block, shape
        )
        level = peak
        if log_rows is None:
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            fade = tl.exp(peak - level)
            peak = new_peak
            total = total * fade
            rounded = rounded * fade
            if sums is not None:
                sum_main = sum_main * fade[:, None]
                sum_rest = sum_rest * fade[:, None]
        weight = tl.exp(logits - level[:, None])
        total += tl.sum(weight, 1)
        if sums is not None:
            if values is not None:
                value_main, value_rest = _load(values, at, stop, key_block, value_shape)
            rounded += tl.sum(weight.to(value_main.dtype).to(tl.float32), 1)
            sum_main, sum_rest = _add(
                sum_main, sum_rest, weight, value_main, value_rest, value_shape
            )
    offset = tl.program_id(1).to(tl.int64) * num_rows
    if log_rows is None:
        tl.store(peaks + offset + row, peak, mask=row < num_rows)
    tl.store(totals + offset + row, total, mask=row < num_rows)
    if sums is not None:  # of rounded weights, which are to add up to the total
        ratio = tl.where(rounded > 0.0, total / rounded, 1.0)[:, None]
        sum_main = sum_main * ratio
        sum_rest = sum_rest * ratio
        out = sums + offset * value_shape[0]
        _store(out, first, num_rows, sum_main, sum_rest, block, value_shape)


@triton.jit(do_not_specialize=SIZES)
def merge(
    peaks, totals, sums, levels, values, num_rows, num_shares,
    width: tl.constexpr, block: tl.constexpr, column_block: tl.constexpr,
):  # fmt: skip
    """The logarithm of the total and the mean value; without ``peaks`` total and sum as they are; without ``sums`` no values."""
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.program_id(1) * column_block + tl.arange(0, column_block)
    inside = row < num_rows
    both = inside[:, None] & (column[None, :] < width)
    peak = tl.full([block], float("-inf"), tl.float32)
    if peaks is not None:
        for each in range(num_shares):
            offset = tl.cast(each, tl.int64) * num_rows + row
            peak = tl.maximum(peak, tl.load(peaks + offset, mask=inside, other=float("-inf")))
    level = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([block], tl.float32)
    value = tl.zeros([block, column_block], tl.float32)
    for each in range(num_shares):
        offset = tl.cast(each, tl.int64) * num_rows + row
        fade = tl.full([block], 1.0, tl.float32)
        if peaks is not None:
            fade = tl.exp(tl.load(peaks + offset, mask=inside, other=0.0) - level)
        total += fade * tl.load(totals + offset, mask=inside, other=1.0)
        if sums is not None:
            offsets = offset[:, None] * width + column[None, :]
            value += fade[:, None] * tl.load(sums + offsets, mask=both, other=0.0)
    if sums is not None:
        if peaks is not None:
            value = value / total[:, None]
        tl.store(values + row[:, None].to(tl.int64) * width + column[None, :], value, mask=both)
    if peaks is not None:
        total = level + tl.log(total)
    if tl.program_id(1) == 0:
        tl.store(levels + row, total, mask=inside)


@triton.jit
def _walk(
    sum_main, sum_rest, main, rest, log_row, keys, values, log_keys, factors, num_keys, sharpness,
    shape: tl.constexpr, value_shape: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """Adds values by their weights times their factors, over all keys. Without ``values`` keys are the values."""
    for at in range(0, num_keys, key_block):
        value_main, value_rest = _load(keys, at, num_keys, key_block, shape)
        logits = _logits(
            main, rest, value_main, value_rest, log_keys, sharpness, at, num_keys, key_block, shape
        )
        weight = tl.exp(logits + log_row[:, None])
        if factors is not None:
            key = at + tl.arange(0, key_block)
            weight = weight * tl.load(factors + key, mask=key < num_keys, other=0.0)[None, :]
        if values is not None:
            value_main, value_rest = _load(values, at, num_keys, key_block, value_shape)
        sum_main, sum_rest = _add(sum_main, sum_rest, weight, value_main, value_rest, value_shape)
    return sum_main, sum_rest


@triton.jit(do_not_specialize=SIZES)
def scatter(
    prototypes, student, log_student, factors, targets, bottleneck, pulls, log_columns, log_rows, gradient,
    num_prototypes, num_rows, num_targets, student_sharpness, sharpness,
    shape: tl.constexpr, target_shape: tl.constexpr, block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of prototypes: the student's rows by softmax and factors, and ``pulls`` by the teacher's assignment."""
    first = tl.program_id(0) * block
    sum_main, sum_rest = _empty_sums(block, shape)
    main, rest = _load(prototypes, first, num_prototypes, block, shape)
    log_row = tl.zeros([block], tl.float32)
    sum_main, sum_rest = _walk(
        sum_main, sum_rest, main, rest, log_row, student, None, log_student, factors, num_rows,
        student_sharpness, shape, shape, key_block,
    )  # fmt: skip
    main, rest = _load(targets, first, num_prototypes, block, target_shape)
    row = first + tl.arange(0, block)
    log_row = tl.load(log_columns + row, mask=row < num_prototypes, other=0.0)
    sum_main, sum_rest = _walk(
        sum_main, sum_rest, main, rest, log_row, bottleneck, pulls, log_rows, None, num_targets,
        sharpness, target_shape, shape, key_block,
    )  # fmt: skip
    _store(gradient, first, num_prototypes, sum_main, sum_rest, block, shape)
