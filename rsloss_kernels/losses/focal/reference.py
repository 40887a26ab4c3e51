"""The element-wise sigmoid losses in plain PyTorch, float64 inside.

README.md beside this file has the formulas. The logits are taken in chunks, small enough for a CPU's caches, so that the temporaries
stay few and the memory beside the outputs does not depend on the number of rows.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rsloss_kernels.losses.focal.op import Modulator

# Elements of a chunk.
CHUNK = 2**16
CHUNK_ON_GPU = 2**23
# Sums of float64 that are added up apart, so that their order does not depend on the number of threads.
LANES = 64


class Chunk(NamedTuple):
    """A part of a level seen as [outer, C, inner]; everything but the place is float64 or bool."""

    place: tuple[slice, slice, slice]
    logits: Tensor  # [outer, C, inner]
    targets: Tensor  # [outer, C, inner]
    is_positive: Tensor  # [outer, C, inner], for the class sums
    weights: Tensor  # [outer, C, inner] or 0-d
    is_ignored: Tensor  # [outer, C, inner]


class Classes(NamedTuple):
    """The columns of the class table; `gamma` is a number where all classes have the same, for which powers are cheap."""

    gamma: Tensor | float
    a: Tensor  # [C, 1]
    b: Tensor  # [C, 1]


def _columns(class_table: Tensor) -> Classes:
    gamma, a, b = class_table[:, :, None]
    shared = gamma.flatten()[0]
    return Classes(shared.item() if bool((gamma == shared).all()) else gamma, a, b)


def elements(z: Tensor, t: Tensor, classes: Classes, modulator: int) -> tuple[Tensor, Tensor]:
    """`L` and `dL/dz` of each element, of one another's shape; none is ignored."""
    is_above = z > 0
    small = torch.exp(-z.abs())
    larger = 1 / (1 + small)
    smaller = small * larger
    p, not_p = torch.where(is_above, larger, smaller), torch.where(is_above, smaller, larger)

    slope = torch.where(is_above, 1 - t, -t)
    entropy = torch.where(slope == 0, 0.0, slope * z) + torch.log1p(small)
    # p - t, from 1 - p and 1 - t where z is above 0: what is subtracted is no larger than it must be.
    distance = torch.where(is_above, slope - smaller, slope + smaller)

    # The modulator is base^gamma; rate is the derivative of log(base).
    gamma = classes.gamma
    if modulator == Modulator.QUALITY:
        base = distance.abs()
        rate = torch.where(distance == 0, 0.0, smaller * larger / distance)
    elif modulator == Modulator.FOCAL:
        base = p * (1 - t) + not_p * t
        rate = torch.where(base == 0, 0.0, smaller * larger * (1 - 2 * t) / base)
    else:
        base, rate = torch.where(t > 0, 1.0, p), torch.where(t > 0, 0.0, not_p)
    weight = _class_weight(t, classes, modulator)
    factor = weight if _is_zero(gamma) else weight * base**gamma
    # An infinite cross entropy no longer changes with the modulator.
    of_modulator = torch.where(rate == 0, 0.0, gamma * rate * entropy)
    return factor * entropy, factor * (of_modulator + distance)


def _is_zero(gamma: Tensor | float) -> bool:
    return not isinstance(gamma, Tensor) and gamma == 0


def _class_weight(t: Tensor, classes: Classes, modulator: int) -> Tensor:
    if modulator == Modulator.FOCAL:
        return classes.a * t + classes.b * (1 - t)
    of_positives = classes.a * t if modulator == Modulator.VARIFOCAL else classes.a
    return torch.where(t > 0, of_positives, classes.b)


def as_3d(level: Tensor, num_classes: int, maps: bool) -> Tensor:
    """A view [outer, C, inner] of a level; of what each row has one of, [outer, 1, inner] with `num_classes` 1."""
    if maps:
        return level.view(-1 if level.numel() else 0, num_classes, level.shape[2:].numel())
    return level.view(-1 if level.numel() else 0, num_classes, 1)


def _chunks(
    logits: Tensor, targets: Tensor, qualities: Tensor | None, weights: Tensor | None, classes: Classes, maps: bool,
    background_first: bool, ignore_index: int | None,
) -> Iterator[Chunk]:  # fmt: skip
    num_classes = len(classes.a)
    is_per_row = {"targets": not targets.is_floating_point(), "weights": weights is not None and weights.shape != logits.shape}
    z = as_3d(logits, num_classes, maps)
    t = as_3d(targets, 1 if is_per_row["targets"] else num_classes, maps)
    q = None if qualities is None else as_3d(qualities, 1, maps)
    v = None if weights is None else as_3d(weights, 1 if is_per_row["weights"] else num_classes, maps)
    columns = torch.arange(num_classes, device=z.device)[:, None] + int(background_first)
    for place in _places(z):
        yield _read_chunk(place, z, t, q, v, columns, classes, ignore_index)


def _places(level: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    outer, num_classes, inner = level.shape
    size = CHUNK_ON_GPU if level.is_cuda else CHUNK
    inner_step = max(1, min(inner, size // num_classes))
    outer_step = max(1, size // (num_classes * inner_step))
    for first in range(0, outer, outer_step):
        for begin in range(0, inner, inner_step):
            yield slice(first, first + outer_step), slice(None), slice(begin, begin + inner_step)


def _read_chunk(
    place: tuple[slice, slice, slice], logits: Tensor, targets: Tensor, qualities: Tensor | None, weights: Tensor | None,
    columns: Tensor, classes: Classes, ignore_index: int | None,
) -> Chunk:  # fmt: skip
    z, t = logits[place].double(), targets[place]
    v = z.new_ones(()) if weights is None else weights[place].double()
    is_ignored = (v == 0) | (t < 0)
    if t.is_floating_point():
        t = t.double()
        is_positive = t > 0
    else:
        if ignore_index is not None:
            # In 64 bits: the number would be narrowed to the labels' 32.
            is_ignored = is_ignored | (t.long() == ignore_index)
        is_positive = t == columns
        t = is_positive.double() if qualities is None else torch.where(is_positive, qualities[place].double(), 0.0)
        is_ignored = is_ignored | (t < 0)
    # What nothing is paid for: the targets are 0, 1, or any.
    is_free = (t == 0) & (classes.b == 0) | (t == 1) & (classes.a == 0) | (classes.a == 0) & (classes.b == 0)
    is_ignored = is_ignored | is_free
    z, t, v = (torch.where(is_ignored, 0.0, value) for value in (z, t, v))
    return Chunk(place, z, t, is_positive, v, is_ignored)


def _read(logits, targets, qualities, weights, class_table, maps, background_first, ignore_index):
    """Of each level the columns of the class table and the chunks."""
    classes = _columns(class_table)
    for number, level in enumerate(logits):
        others = (values[number] if values else None for values in (targets, qualities, weights))
        yield classes, _chunks(level, *others, classes, maps, background_first, ignore_index)


def _sum(values: Tensor) -> Tensor:
    """Over the last dimension, in an order fixed by its size."""
    values = pad(values, (0, -values.shape[-1] % LANES))
    return values.view(*values.shape[:-1], -1, LANES).sum(-2).sum(-1)


def _factor(scale: float, normalizer: Tensor | None, like: Tensor) -> Tensor:
    """`scale / normalizer`, 0-d."""
    return like.new_full((), scale) if normalizer is None else scale / normalizer.double()


def focal_forward(
    logits, targets, qualities, weights, class_table, normalizer, modulator, maps, background_first, ignore_index, scale, class_sums
) -> tuple[Tensor, Tensor]:
    total = class_table.new_zeros(())
    sums = class_table.new_zeros((2, class_table.shape[1]) if class_sums else (0,))
    for classes, chunks in _read(logits, targets, qualities, weights, class_table, maps, background_first, ignore_index):
        for chunk in chunks:
            losses, slopes = elements(chunk.logits, chunk.targets, classes, modulator)
            total += _sum((losses * chunk.weights).flatten())
            if class_sums:
                pulls = (slopes * chunk.weights).abs().transpose(0, 1).flatten(1)  # [C, outer * inner]
                is_positive = chunk.is_positive.transpose(0, 1).flatten(1)
                sums += _sum(torch.stack([torch.where(is_positive, pulls, 0.0), torch.where(is_positive, 0.0, pulls)]))
    loss_type = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    return (total * _factor(scale, normalizer, class_table)).to(loss_type), sums


def focal_elements(
    logits, targets, qualities, weights, class_table, normalizer, modulator, maps, background_first, ignore_index, scale
) -> list[Tensor]:
    factor = _factor(scale, normalizer, class_table)
    outputs = [torch.empty_like(level, memory_format=torch.contiguous_format) for level in logits]
    levels = _read(logits, targets, qualities, weights, class_table, maps, background_first, ignore_index)
    for output, (classes, chunks) in zip(outputs, levels, strict=True):
        seen = as_3d(output, class_table.shape[1], maps)
        for chunk in chunks:
            losses, _ = elements(chunk.logits, chunk.targets, classes, modulator)
            seen[chunk.place] = torch.where(chunk.is_ignored, 0.0, losses * chunk.weights * factor)
    return outputs


def focal_backward(
    logits, targets, qualities, weights, class_table, normalizer, grads, modulator, maps, background_first, ignore_index, scale
) -> list[Tensor]:
    factor = _factor(scale, normalizer, class_table)
    is_of_loss = grads[0].dim() == 0
    outputs = [torch.empty_like(level, memory_format=torch.contiguous_format) for level in logits]
    levels = _read(logits, targets, qualities, weights, class_table, maps, background_first, ignore_index)
    for number, (output, (classes, chunks)) in enumerate(zip(outputs, levels, strict=True)):
        seen = as_3d(output, class_table.shape[1], maps)
        upstream = grads[0].double() * factor if is_of_loss else as_3d(grads[number], class_table.shape[1], maps)
        for chunk in chunks:
            _, slopes = elements(chunk.logits, chunk.targets, classes, modulator)
            scaled = upstream if is_of_loss else upstream[chunk.place].double() * factor
            seen[chunk.place] = torch.where(chunk.is_ignored, 0.0, slopes * chunk.weights * scaled)
    return outputs
