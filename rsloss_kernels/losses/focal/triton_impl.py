"""The element-wise sigmoid losses as Triton kernels: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

The loss is one pass over the elements by a fixed number of programs, whose partial sums are added in order. With sums over classes
the programs go over tiles of rows and classes instead. The losses of single elements and the gradient are the same
pass without sums. What happens to one element is told in triton_elements.py. Everything is float64 inside. Formulas and layouts:
README.md beside this file.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.focal.op_checks import row_shape
from rsloss_kernels.losses.focal.triton_elements import weighted_loss_and_slope
from rsloss_kernels.losses.triton_common import (
    Configuration,
    configuration,
    float_bits,
    float_of,
    launching_on,
    rounded_to,
    row_and_class,
)

# Arguments that change from call to call without a gain from code of their own; floats travel as the bits of a float64.
PLAIN_INTEGERS = ("inner", "rows", "ignore_index", "scale_bits", "entries", "class_entries")


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def focal_loss_kernel(
    logits_ptr,
    targets_ptr,
    qualities_ptr,
    weights_ptr,
    class_table_ptr,
    partials_ptr,  # [programs]
    size,
    classes,
    inner,
    ignore_index,
    MODULATOR: tl.constexpr,
    MAPS: tl.constexpr,
    IS_INDEX: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    level = (logits_ptr, targets_ptr, qualities_ptr, weights_ptr, class_table_ptr)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < size:
        row, column = row_and_class(start, lane, size, classes, inner, MAPS)
        inside = lane < size - start
        loss, _, _, _ = weighted_loss_and_slope(
            *(level, start + lane, row, column, inside, classes, ignore_index),
            *(MODULATOR, IS_INDEX, BACKGROUND_FIRST, WEIGHT_PER_ROW),
        )
        sums += loss
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    tl.store(partials_ptr + tl.program_id(0), tl.sum(sums))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def focal_class_sums_kernel(
    logits_ptr,
    targets_ptr,
    qualities_ptr,
    weights_ptr,
    class_table_ptr,
    partials_ptr,  # [blocks of classes, programs]
    class_partials_ptr,  # [2, classes, class_entries], from the first entry of this level on
    rows,
    classes,
    inner,
    ignore_index,
    class_entries,
    MODULATOR: tl.constexpr,
    MAPS: tl.constexpr,
    IS_INDEX: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_CLASSES: tl.constexpr,
):
    level = (logits_ptr, targets_ptr, qualities_ptr, weights_ptr, class_table_ptr)
    # Neighbours in memory along the last axis.
    ROW_AXIS: tl.constexpr = 1 if MAPS else 0
    lane = tl.expand_dims(tl.arange(0, TILE_ROWS), 1 - ROW_AXIS)
    column = tl.program_id(1) * TILE_CLASSES + tl.arange(0, TILE_CLASSES)
    wide_column = tl.expand_dims(tl.minimum(column, classes - 1), ROW_AXIS)
    is_class = tl.expand_dims(column < classes, ROW_AXIS)
    zeros = (lane + wide_column).to(tl.float64) * 0.0
    sums, positive_sums, negative_sums = zeros, zeros, zeros
    start = tl.program_id(0).to(tl.int64) * TILE_ROWS
    while start < rows:
        is_row = lane < rows - start
        near = tl.minimum(lane, rows - 1 - start)
        row = start + near
        if MAPS:
            first_outer = start // inner
            ahead = (start - first_outer * inner).to(inner.dtype) + near.to(tl.int32)
            outer = first_outer + ahead // inner
            place = (outer * classes + wide_column) * inner + ahead % inner
        else:
            place = row * classes + wide_column
        loss, slope, _, is_positive = weighted_loss_and_slope(
            *(level, place, row, wide_column, is_row & is_class, classes, ignore_index),
            *(MODULATOR, IS_INDEX, BACKGROUND_FIRST, WEIGHT_PER_ROW),
        )
        pull = tl.abs(slope)
        sums += loss
        positive_sums += tl.where(is_positive, pull, 0.0)
        negative_sums += tl.where(is_positive, 0.0, pull)
        start += tl.num_programs(0).to(tl.int64) * TILE_ROWS
    tl.store(partials_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(sums))
    place = column.to(tl.int64) * class_entries + tl.program_id(0)
    tl.store(class_partials_ptr + place, tl.sum(positive_sums, ROW_AXIS), mask=column < classes)
    place += classes.to(tl.int64) * class_entries
    tl.store(class_partials_ptr + place, tl.sum(negative_sums, ROW_AXIS), mask=column < classes)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def focal_total_kernel(
    partials_ptr,  # [entries]
    normalizer_ptr,
    loss_ptr,
    entries,
    scale_bits,
    SUMS_AT_ONCE: tl.constexpr,
):
    lane = tl.arange(0, SUMS_AT_ONCE)
    sums = tl.zeros([SUMS_AT_ONCE], tl.float64)
    start = entries * 0
    while start < entries:
        sums += tl.load(partials_ptr + start + lane, mask=start + lane < entries, other=0.0)
        start += SUMS_AT_ONCE
    factor = float_of(scale_bits)
    if normalizer_ptr is not None:
        factor /= tl.load(normalizer_ptr).to(tl.float64)
    tl.store(loss_ptr, (factor * tl.sum(sums)).to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def focal_elements_kernel(
    logits_ptr,
    targets_ptr,
    qualities_ptr,
    weights_ptr,
    class_table_ptr,
    normalizer_ptr,
    grads_ptr,
    results_ptr,
    size,
    classes,
    inner,
    ignore_index,
    scale_bits,
    GRAD_PER_ELEMENT: tl.constexpr,
    MODULATOR: tl.constexpr,
    MAPS: tl.constexpr,
    IS_INDEX: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of every element, or without `grads_ptr` its loss."""
    level = (logits_ptr, targets_ptr, qualities_ptr, weights_ptr, class_table_ptr)
    lane = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row, column = row_and_class(start, lane, size, classes, inner, MAPS)
    inside = lane < size - start
    loss, slope, is_used, _ = weighted_loss_and_slope(
        *(level, start + lane, row, column, inside, classes, ignore_index),
        *(MODULATOR, IS_INDEX, BACKGROUND_FIRST, WEIGHT_PER_ROW),
    )
    factor = float_of(scale_bits)
    if normalizer_ptr is not None:
        factor /= tl.load(normalizer_ptr).to(tl.float64)
    result = loss
    if grads_ptr is not None:
        result = slope
        if GRAD_PER_ELEMENT:
            factor = factor * tl.load(grads_ptr + start + lane, mask=inside, other=0.0).to(tl.float64)
        else:
            factor = factor * tl.load(grads_ptr).to(tl.float64)
    result = rounded_to(tl.where(is_used, factor * result, 0.0), results_ptr.dtype.element_ty)
    tl.store(results_ptr + start + lane, result, mask=inside)


def _levels(logits, targets, qualities, weights, class_table, modulator, maps, background_first, ignore_index):
    """Of every level that is not empty: its number, and what every pass takes, as keyword arguments."""
    classes = class_table.shape[1]
    for number, (level, target) in enumerate(zip(logits, targets, strict=True)):
        weight = weights[number] if weights else None
        is_index = not target.is_floating_point()
        if level.numel():
            yield number, {
                "logits_ptr": level,
                "targets_ptr": target,
                "qualities_ptr": qualities[number] if qualities else None,
                "weights_ptr": weight,
                "class_table_ptr": class_table,
                "classes": classes,
                "inner": level[0, 0].numel() if maps else 1,
                # A negative label is ignored anyway.
                "ignore_index": -1 if ignore_index is None else ignore_index,
                "MODULATOR": modulator,
                "MAPS": maps,
                "IS_INDEX": is_index,
                "BACKGROUND_FIRST": is_index and background_first,
                "WEIGHT_PER_ROW": weight is not None and weight.shape == row_shape(level, classes, maps),
            }


def tile_shape(rows: int, classes: int, maps: bool, run: Configuration) -> tuple[int, int]:
    """Rows and classes of a tile, those that pad the classes least. Neighbours in memory are the classes of a row, or in maps the rows of
    a class, of which there are then more."""
    most = run.columns // 8 if maps else run.columns
    widths = (min(width, triton.next_power_of_2(classes)) for width in (most, most // 2, most // 4))
    width = min(widths, key=lambda width: triton.cdiv(classes, width) * width)
    return min(run.block // width, triton.next_power_of_2(rows)), width


def focal_forward(
    logits, targets, qualities, weights, class_table, normalizer, modulator, maps, background_first, ignore_index, scale, class_sums
) -> tuple[Tensor, Tensor]:
    device, classes = class_table.device, class_table.shape[1]
    levels = dict(_levels(logits, targets, qualities, weights, class_table, modulator, maps, background_first, ignore_index))
    shapes, grids = {}, {}
    for number in levels:
        size = logits[number].numel()
        run = configuration("focal class sums" if class_sums else "focal sums", size, device)
        if class_sums:
            rows, width = tile_shape(size // classes, classes, maps, run)
            blocks = triton.cdiv(classes, width)
            shapes[number] = {"rows": size // classes, "TILE_ROWS": rows, "TILE_CLASSES": width, **run.options}
            grids[number] = min(triton.cdiv(size // classes, rows), max(run.programs // blocks, 1)), blocks
        else:
            shapes[number] = {"size": size, **run.arguments}
            grids[number] = min(triton.cdiv(size, run.block), run.programs), 1
    entries, class_entries = sum(width * height for width, height in grids.values()), sum(width for width, _ in grids.values())
    partials = class_table.new_empty((entries,))
    class_partials = class_table.new_empty((2, classes if class_sums else 0, class_entries))
    loss = logits[0].new_empty((), dtype=torch.float64 if logits[0].dtype == torch.float64 else torch.float32)
    done, class_done = 0, 0
    with launching_on(class_table):
        for number, arguments in levels.items():
            grid = grids[number]
            arguments.update(shapes[number], partials_ptr=partials[done:])
            if class_sums:
                focal_class_sums_kernel[grid](
                    class_partials_ptr=class_partials.view(-1)[class_done:], class_entries=class_entries, **arguments
                )
            else:
                focal_loss_kernel[grid[0],](**arguments)
            done, class_done = done + grid[0] * grid[1], class_done + grid[0]
        run = configuration("focal total", entries, device)
        focal_total_kernel[1,](partials, normalizer, loss, entries, float_bits(scale), run.block, **run.options)
    return loss, class_partials.sum(-1) if class_sums else class_table.new_empty((0,))


def _map_elements(levels, class_table, normalizer, grads, modulator, maps, background_first, ignore_index, scale) -> list[Tensor]:
    results = [torch.empty_like(level, memory_format=torch.contiguous_format) for level in levels[0]]
    per_element = bool(grads) and grads[0].dim() > 0
    with launching_on(class_table):
        for number, arguments in _levels(*levels, class_table, modulator, maps, background_first, ignore_index):
            size = results[number].numel()
            run = configuration("focal elements", size, class_table.device)
            focal_elements_kernel[triton.cdiv(size, run.block),](
                normalizer_ptr=normalizer,
                grads_ptr=grads[number if per_element else 0] if grads else None,
                results_ptr=results[number],
                size=size,
                scale_bits=float_bits(scale),
                GRAD_PER_ELEMENT=per_element,
                **arguments,
                **run.arguments,
            )
    return results


def focal_elements(logits, targets, qualities, weights, class_table, normalizer, *options) -> list[Tensor]:
    return _map_elements((logits, targets, qualities, weights), class_table, normalizer, [], *options)


def focal_backward(logits, targets, qualities, weights, class_table, normalizer, grads, *options) -> list[Tensor]:
    return _map_elements((logits, targets, qualities, weights), class_table, normalizer, grads, *options)
