"""Logits as heads have them, one tensor or levels, rows or maps, with the targets that lie beside them."""
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .source import FLOATS, NAN, Source

ABOVE = (1, 100, 2**31 - 1, 2**62)  # what a label may exceed the number of classes by


@dataclasses.dataclass
class Form:
    """How rows [R, C] lie in the logits that are given."""

    shapes: list[tuple[int, ...]]  # of the logits
    layout: str
    sizes: list[tuple[int, int, int]]  # B, S, A of each level of maps
    classes: int
    is_list: bool

    @property
    def batch(self) -> int:
        """Images, over whose rows the levels follow one another."""
        return self.shapes[0][0] if self.batch_is_first else 1

    @property
    def batch_is_first(self) -> bool:
        return self.is_maps or self.is_list

    @property
    def is_maps(self) -> bool:
        return self.layout != "rows"

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The shape of the labels of each level."""
        return [(b, s * a) for b, s, a in self.sizes] if self.is_maps else [shape[:-1] for shape in self.shapes]

    @property
    def is_ambiguous(self) -> bool:
        """Whether [B, S A, C] or [B, *spatial, A] is the shape of some logits too, or one of them that of the other: it may be read as
        the wrong one then."""
        shapes = zip(self.shapes, self.rows, self.sizes, strict=True) if self.is_maps else ()
        forms = ((shape, (*rows, self.classes), (shape[0], *shape[2:], sizes[2])) for shape, rows, sizes in shapes)
        return any(len(set(form)) < 3 for form in forms)

    def to_rows(self, values: Sequence[Tensor]) -> Tensor:
        """[B K, C], of values in the shapes of the logits: those of an image level after level, place after place, anchor by anchor."""
        named = list(values)
        if self.is_maps:
            for number, (b, s, a) in enumerate(self.sizes):
                if self.layout == "anchor_major":
                    named[number] = values[number].reshape(b, a, self.classes, s).permute(0, 3, 1, 2)
                else:
                    named[number] = values[number].reshape(b, self.classes, a, s).permute(0, 3, 2, 1)
        return self.of_elements(named)

    def of_elements(self, values: Sequence[Tensor]) -> Tensor:
        """[B K, C], of values in the order of rows."""
        counts = [math.prod(rows[1:]) if self.batch_is_first else math.prod(rows) for rows in self.rows]
        levels = [value.reshape(self.batch, count, self.classes) for value, count in zip(values, counts, strict=True)]
        return torch.cat(levels, 1).reshape(-1, self.classes)

    def of_rows(self, values: Sequence[Tensor]) -> Tensor:
        """[B K]"""
        counts = [math.prod(rows[1:]) if self.batch_is_first else math.prod(rows) for rows in self.rows]
        return torch.cat([value.reshape(self.batch, count) for value, count in zip(values, counts, strict=True)], 1).reshape(-1)

    def to_flat(self, values: Sequence[Tensor]) -> Tensor:
        return self.to_rows(values).reshape(-1)


def draw_form(source: Source, classes: int, takes_maps: bool, largest: int = 30_000) -> Form:
    size = source.size(largest) // classes
    kind = source.random.random()
    levels = source.pick((1, 2, 3))
    if takes_maps and kind < 0.25:
        layout, batch, anchors = source.pick(("anchor_major", "class_major")), source.pick((1, 2)), source.pick((1, 2, 3))
        shapes, sizes = [], []
        for _ in range(levels):
            spatial = source.shape(size // (levels * batch * anchors), 3, 1)
            shapes.append((batch, anchors * classes, *spatial))
            sizes.append((batch, math.prod(spatial), anchors))
        return Form(shapes, layout, sizes, classes, levels > 1 or source.chance(0.3))
    if kind < 0.4:
        batch = source.pick((1, 2, 3))
        lengths = [source.random.randint(0, max(2 * size // (levels * batch), 0)) for _ in range(levels)]
        return Form([(batch, length, classes) for length in lengths], "rows", [], classes, True)
    return Form([(*source.shape(size, 3, 0), classes)], "rows", [], classes, False)


def lay_level(source: Source, value: Tensor, is_maps: bool) -> Tensor:
    if is_maps and source.chance(0.5):
        source.notes.append("channels last")
        last = value.movedim(1, -1).contiguous()
        source.given.append(last)
        return last.movedim(-1, 1)
    return source.lay(value, may_expand=True)


def per_level(source: Source, values: Sequence[Tensor], form: Form) -> Tensor | list[Tensor]:
    """A list, or one tensor for all levels, of what rows or elements have one of."""
    if not form.is_list:
        return values[0] if source.chance(0.8) else [values[0]]
    if form.is_maps or all(len(shape) == 3 for shape in form.shapes):
        if source.chance(0.4) and all(value.dim() in (2, 3) and value.shape[0] == values[0].shape[0] for value in values):
            return source.lay(torch.cat(values, 1))
    return list(values)


def draw_quality(source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Within [0, 1], few of them equal, all of some levels, or tiny."""
    quality = source.uniform(shape)
    levels = source.pick((None, None, 1, 2, 5))
    if levels:
        quality = (quality * levels).ceil() / levels
    elif source.chance(0.1):
        quality = quality * source.pick((1e-6, 1e-30, float(torch.finfo(dtype).tiny)))
    return quality.to(dtype)


def draw_labels(source: Source, form: Form, background: str) -> tuple[Tensor | list[Tensor], Tensor]:
    kind = source.pick((torch.int64, torch.int32), torch.int16, torch.int8, torch.uint8)
    first, laid = int(background == "first"), []
    share, ignored = source.pick((0.0, 0.1, 0.5), 1.0), source.pick((0.0, 0.2), 0.9)
    above = min(form.classes + source.pick(ABOVE), torch.iinfo(kind).max) if source.chance(0.1) else None
    for shape in form.rows:
        chance = source.uniform(shape)
        labels = torch.randint(0, form.classes, shape, generator=source.generator) + first
        labels = torch.where(chance < share, labels, 0 if first else form.classes)
        if above:
            labels = torch.where(source.mask(shape, 0.1), above, labels)
        if kind != torch.uint8:
            labels = torch.where(chance > 1 - ignored, source.pick((-1,), -5, torch.iinfo(kind).min), labels)
        laid.append(source.lay(labels.to(kind), may_expand=True))
    flat = form.of_rows(laid)
    if form.is_maps and source.chance(0.3):
        # [B, *spatial, A]
        laid = [
            value.reshape(shape[0], *shape[2:], sizes[2]) for value, shape, sizes in zip(laid, form.shapes, form.sizes, strict=True)
        ]
        return (laid if form.is_list else laid[0]), flat
    return per_level(source, laid, form), flat


def draw_dense(source: Source, form: Form, dtype: torch.dtype) -> tuple[Tensor | list[Tensor], Tensor]:
    """In the shape of the logits, or [B, S A, C] for maps."""
    share, kind = source.pick((0.05, 0.3), 1.0), source.pick(FLOATS, torch.int64, torch.bool)
    is_soft, ignored = source.chance(0.5), source.pick((0.0, 0.2))
    in_shape = not form.is_maps or form.is_ambiguous or source.chance(0.5)
    if form.is_ambiguous and kind not in FLOATS:
        kind = torch.float32
    laid = []
    for shape, rows in zip(form.shapes, form.rows, strict=True):
        shape = shape if in_shape else (*rows, form.classes)
        if kind not in FLOATS:
            laid.append(source.lay(source.mask(shape, share).to(kind)))
            continue
        chance = source.uniform(shape)
        soft = draw_quality(source, shape, kind).double() if is_soft else torch.ones(shape, dtype=torch.float64)
        values = torch.where(chance < share, soft, torch.where(chance > 1 - ignored, -0.7, source.pick((0.0, -0.0))))
        laid.append(source.lay(source.broken(values.to(kind), 0.05, (NAN,))))
    flat = form.to_rows(laid) if in_shape else form.of_elements(laid)
    flat = flat.to(dtype) if kind not in FLOATS else flat
    if not form.is_list:
        return laid[0], flat
    return (laid if in_shape else per_level(source, laid, form)), flat
