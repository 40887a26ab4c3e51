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


class Classes(NamedTuple):
    """The columns of the class table; `gamma` is a number where all classes have the same, for which powers are cheap."""

    gamma: Tensor | float
    a: Tensor  # [C, 1]
    b: Tensor  # [C, 1]
    has_free: bool  # whether any of `a` and `b` is 0


class Chunk(NamedTuple):
    """A part of a level seen as [outer, C, inner]. `weights` and `is_ignored` may be None, for 1 and for no element."""

    place: tuple[slice, slice, slice]
    logits: Tensor  # float64 [outer, C, inner]
    targets: Tensor  # float64 [outer, C, inner]
    is_positive: Tensor  # [outer, C, inner], for the class sums
    weights: Tensor | None  # float64 [outer, C or 1, inner]
    is_ignored: Tensor | None  # [outer, C or 1, inner]

    def weighted(self, values: Tensor) -> Tensor:
        """Times the weights, 0 where ignored, whatever stands there."""
        values = values if self.weights is None else values * self.weights
        return values if self.is_ignored is None else torch.where(self.is_ignored, 0.0, values)


class Elements:
    """`L` and `dL/dz` of elements, none of which is ignored."""

    def __init__(self, z: Tensor, t: Tensor, classes: Classes, modulator: int):
        is_above = z > 0
        small = torch.exp(-z.abs())
        larger = 1 / (1 + small)
        smaller = small * larger
        slope = torch.where(is_above, 1 - t, -t)
        self.t, self.classes, self.modulator = t, classes, modulator
        self.entropy = torch.where(slope == 0, 0.0, slope * z) + torch.log1p(small)
        # p - t, from 1 - p and 1 - t where z is above 0: what is subtracted is no larger than it must be.
        self.distance = slope + torch.where(is_above, -smaller, smaller)
        if modulator == Modulator.QUALITY:
            self.base = self.distance.abs()
        else:
            p, not_p = torch.where(is_above, larger, smaller), torch.where(is_above, smaller, larger)
            self.base = p * (1 - t) + not_p * t if modulator == Modulator.FOCAL else torch.where(t > 0, 1.0, p)
        self.variance = smaller * larger
        gamma = classes.gamma
        is_plain = not isinstance(gamma, Tensor) and gamma == 0
        self.factor = self._class_weight() if is_plain else self._class_weight() * self.base**gamma

    def _class_weight(self) -> Tensor:
        if self.modulator == Modulator.FOCAL:
            return torch.lerp(self.classes.b, self.classes.a, self.t)
        of_positives = self.classes.a * self.t if self.modulator == Modulator.VARIFOCAL else self.classes.a
        return torch.where(self.t > 0, of_positives, self.classes.b)

    def losses(self) -> Tensor:
        # The factor of a soft target may be 0 where its cross entropy is infinite.
        is_nothing = (self.factor == 0) & self.entropy.isinf()
        return torch.where(is_nothing, 0.0, self.factor * self.entropy)

    def slopes(self) -> Tensor:
        # The derivative of the logarithm of the base.
        if self.modulator == Modulator.QUALITY:
            rate = torch.where(self.distance == 0, 0.0, self.variance / self.distance)
        elif self.modulator == Modulator.FOCAL:
            rate = torch.where(self.base == 0, 0.0, self.variance * (1 - 2 * self.t) / self.base)
        else:
            rate = torch.where(self.t > 0, 0.0, 1 - self.base)
        # An infinite cross entropy no longer changes with the modulator.
        of_modulator = torch.where(rate == 0, 0.0, self.classes.gamma * rate * self.entropy)
        return self.factor * (of_modulator + self.distance)


def _columns(class_table: Tensor) -> Classes:
    gamma, a, b = class_table[:, :, None]
    shared = gamma.flatten()[0]
    return Classes(shared.item() if bool((gamma == shared).all()) else gamma, a, b, bool((class_table[1:] == 0).any()))


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
    v = None if weights is None else weights[place].double()
    is_ignored = t < 0
    if t.is_floating_point():
        t = t.double()
        is_positive = t > 0
    else:
        if ignore_index is not None:
            # In 64 bits: the number would be narrowed to the labels' 32.
            is_ignored = is_ignored | (t.long() == ignore_index)
        is_positive = t == columns
        t = is_positive.double()
        if qualities is not None:
            t = torch.where(is_positive, qualities[place].double(), 0.0)
            is_ignored = is_ignored | (t < 0)
    if v is not None:
        is_ignored = is_ignored | (v == 0)
    if classes.has_free:
        a, b = classes.a == 0, classes.b == 0
        # What nothing is paid for: the targets are 0, 1, or any.
        is_ignored = is_ignored | (t == 0) & b | (t == 1) & a | a & b
    if not bool(is_ignored.any()):
        return Chunk(place, z, t, is_positive, v, None)
    z, t = torch.where(is_ignored, 0.0, z), torch.where(is_ignored, 0.0, t)
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
            elements = Elements(chunk.logits, chunk.targets, classes, modulator)
            total += _sum(chunk.weighted(elements.losses()).flatten())
            if class_sums:
                pulls = chunk.weighted(elements.slopes()).abs().transpose(0, 1).flatten(1)  # [C, outer * inner]
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
            losses = Elements(chunk.logits, chunk.targets, classes, modulator).losses() * factor
            seen[chunk.place] = chunk.weighted(losses)
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
            scaled = upstream if is_of_loss else upstream[chunk.place].double() * factor
            slopes = Elements(chunk.logits, chunk.targets, classes, modulator).slopes()
            seen[chunk.place] = chunk.weighted(slopes * scaled)
    return outputs
