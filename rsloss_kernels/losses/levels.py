"""Reads what losses take of a head as it comes: logits, as one tensor or as a list of levels, in one of the layouts; their targets.

The dimensions of a level are named by letters: B images, S places (the product of the spatial sizes), A anchors, C classes. Whatever
comes with the logits is in the order BSA, or BSAC for what each element has one of; a head's maps are BACS or BCAS, and BSAC or BSCA in
channels-last memory.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rsloss_kernels import _checks

Levelled = Tensor | Sequence[Tensor]  # one tensor, or one per level
LAYOUTS = ("rows", "anchor_major", "class_major")


class Level(NamedTuple):
    """One level, as it was given and as the operators take it."""

    given: Tensor
    logits: Tensor  # contiguous
    order: str  # of the dimensions in memory; "" for rows
    sizes: dict[str, int]  # of B, S, A and C; empty for rows
    rows: tuple[int, ...]  # the shape of its labels for the operators

    @property
    def counted(self) -> tuple[tuple[int, ...], int]:
        """What stands before the dimension along which levels are put together as rows, and the rows of this one in it."""
        if self.order:
            return (self.sizes["B"],), self.sizes["S"] * self.sizes["A"]
        return self.rows[:-1], self.rows[-1] if self.rows else 1


class Levels(NamedTuple):
    """The logits of a call."""

    function: str
    levels: list[Level]
    num_classes: int
    is_list: bool
    layout: str
    maps: bool

    @property
    def logits(self) -> list[Tensor]:
        return [level.logits for level in self.levels]

    @property
    def given(self) -> list[Tensor]:
        return [level.given for level in self.levels]

    @property
    def numel(self) -> int:
        return sum(level.given.numel() for level in self.levels)

    @property
    def num_rows(self) -> int:
        return sum(math.prod(level.rows) for level in self.levels)

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """Of one tensor with one number for each row of all levels; None if they have no such shape."""
        if len(self.levels) == 1 and not self.levels[0].order:
            return self.levels[0].rows
        counted = [level.counted for level in self.levels]
        before = counted[0][0]
        return (*before, sum(rows for _, rows in counted)) if all(other == before for other, _ in counted) else None

    @property
    def first(self) -> Tensor:
        return self.levels[0].given

    def as_elements(self) -> "Levels":
        """Rows as elements of a single class, for what treats all classes alike."""
        levels = [level._replace(logits=level.logits.view(-1, 1), rows=(level.given.numel(),)) for level in self.levels]
        return self._replace(levels=levels, num_classes=1)

    def restore(self, outputs: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Outputs in the shape of the operators' levels as the logits were given."""
        restored = [_restore(level, output) for level, output in zip(self.levels, outputs, strict=True)]
        return restored if self.is_list else restored[0]


def read_levels(
    function: str, logits: Tensor | Sequence[Tensor], layout: str, num_classes: int | None, of_table: int | None = None
) -> Levels:
    """`of_table`: the classes that a state or a table of the caller has, which decide where `num_classes` is None."""
    is_list = not isinstance(logits, Tensor)
    given = _as_list(function, "logits", logits)
    _checks.check_choice(function, "layout", layout, LAYOUTS)
    for number, level in enumerate(given):
        _checks.check_logits(function, level)
        if number and (level.dtype != given[0].dtype or level.device != given[0].device):
            raise TypeError(
                f"{function}: all levels of logits must have one dtype and device, {given[0].dtype} on {given[0].device}, "
                f"got {level.dtype} on {level.device}"
            )
        if level.dim() < (2 if layout != "rows" or len(given) > 1 else 1):
            shape = "[B, A * C, *spatial]" if layout != "rows" else "[rows, ..., C] in a list" if len(given) > 1 else "[..., C]"
            raise ValueError(f"{function}: logits must have shape {shape}, got {list(level.shape)}")
    wanted = _read_num_classes(function, given[0], layout, num_classes, of_table)
    if layout == "rows":
        levels = [_read_rows(function, level, wanted) for level in given]
        return Levels(function, levels, wanted, is_list, layout, False)
    levels = _read_maps(function, given, layout, wanted)
    return Levels(function, levels, wanted, is_list, layout, levels[0].order != "BSAC")


def _as_list(function: str, name: str, value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{function}: {name} must be a Tensor or a list of one or more, got {_describe(value)}")
    for entry in value:
        _checks.check_tensor(function, name, entry)
    return list(value)


def _describe(value: object) -> str:
    return f"an empty {type(value).__name__}" if isinstance(value, (list, tuple)) and not value else type(value).__name__


def _read_num_classes(function: str, first: Tensor, layout: str, num_classes: int | None, of_table: int | None) -> int:
    num_classes = read_num_classes(function, num_classes)
    if num_classes is None:
        num_classes = of_table
    if num_classes is None:
        # Without elements there may be no classes either.
        return max(first.shape[-1 if layout == "rows" else 1], 1)
    return num_classes


def read_num_classes(function: str, num_classes: int | None) -> int | None:
    """What can be said without logits."""
    return None if num_classes is None else _checks.read_count(function, "num_classes", num_classes)


def _check_channels(function: str, found: int, num_classes: int, is_right: bool) -> None:
    if not is_right:
        raise ValueError(
            f"{function}: logits must have {num_classes} classes, got {found} channels. A number of classes here counts the foreground "
            f"classes alone, one channel each: background is the absence of all, and has none"
        )


def _read_rows(function: str, level: Tensor, num_classes: int) -> Level:
    *rows, channels = level.shape
    _check_channels(function, channels, num_classes, channels == num_classes or channels == 0)
    return Level(level, _checks.contiguous(level), "", {}, tuple(rows))


def _read_maps(function: str, given: list[Tensor], layout: str, num_classes: int) -> list[Level]:
    for level in given:
        _check_channels(function, level.shape[1], num_classes, level.shape[1] % num_classes == 0)
    # With one anchor both layouts are the same.
    in_head = "BACS" if layout == "anchor_major" or all(level.shape[1] == num_classes for level in given) else "BCAS"
    # In channels-last memory as it lies, if all levels are: the operators take one layout.
    is_last = all(level.movedim(1, -1).is_contiguous() for level in given) and not all(level.is_contiguous() for level in given)
    order = in_head if not is_last else "BSAC" if in_head == "BACS" else "BSCA"
    levels = []
    for level in given:
        sizes = {"B": level.shape[0], "S": math.prod(level.shape[2:]), "A": level.shape[1] // num_classes, "C": num_classes}
        rows, elements = _operator_shapes(order, sizes, level)
        if order == "BACS":
            ordered = _checks.contiguous(level)
        else:
            named = level.reshape([sizes[name] for name in in_head])
            ordered = _permute(named, in_head, order).contiguous().view(elements)
        levels.append(Level(level, ordered, order, sizes, rows))
    return levels


def _operator_shapes(order: str, sizes: dict[str, int], level: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of what each row has one of, and of what each element has one of."""
    batch, places, anchors, classes = (sizes[name] for name in "BSAC")
    if order == "BSAC":
        return (batch, places, anchors), (batch, places, anchors, classes)
    if order == "BACS":
        return (batch, anchors, *level.shape[2:]), tuple(level.shape)
    if order == "BCAS":
        return (batch, 1, anchors * places), (batch, classes, anchors * places)
    return (batch * places, 1, anchors), (batch * places, classes, anchors)


def _permute(value: Tensor, before: str, after: str) -> Tensor:
    return value if before == after else value.permute([before.index(name) for name in after])


def _restore(level: Level, output: Tensor) -> Tensor:
    if not level.order:
        return output.view(level.given.shape)
    in_head = "BCAS" if level.order in ("BCAS", "BSCA") else "BACS"
    named = _permute(output.view([level.sizes[name] for name in level.order]), level.order, in_head)
    if level.order[1] != "S":
        return named.reshape(level.given.shape)
    # Channels-last, as the logits.
    batch, channels, *spatial = level.given.shape
    return named.permute(0, 3, 1, 2).reshape(batch, *spatial, channels).movedim(-1, 1)


def index_in_rows(levels: Levels, index: Tensor) -> Tensor:
    """Flat indices over the operators' levels -> over the logits put together as rows, `[..., K, C]`: levels along K.

    Indices outside come out as any numbers. int64; nothing is read on the host.
    """
    if levels.row_shape is None:
        raise ValueError(
            f"{levels.function}: levels of logits must have one shape but for their last two dimensions to be put together, got "
            f"{' and '.join(str(list(level.given.shape)) for level in levels.levels)}"
        )
    columns, start, row = [], 0, 0
    for level in levels.levels:
        rows, anchors = level.counted[1], max(level.sizes.get("A", 1), 1)
        columns.append((start, row, anchors, max(rows // anchors, 1)))
        start, row = start + level.given.numel(), row + rows
    table = _table(list(zip(*columns, strict=True)), index)
    start, first_row, anchors, places = table[:, torch.bucketize(index, table[0, 1:], right=True)]
    # The first letter takes what is left.
    sizes = {"S": places, "A": anchors, "C": max(levels.num_classes, 1)}
    coordinates, rest, order = {}, index - start, levels.levels[0].order or "BSAC"
    for letter in order[:0:-1]:
        coordinates[letter], rest = rest % sizes[letter], rest // sizes[letter]
    in_image = first_row + coordinates["S"] * anchors + coordinates["A"]
    return (rest * row + in_image) * sizes["C"] + coordinates["C"]


def _table(numbers: list[tuple[int, ...]], like: Tensor) -> Tensor:
    """int64, on the device of `like`. A copy from the host would wait for a GPU."""
    if like.is_cuda or torch.compiler.is_compiling():
        return torch.stack([torch.stack([like.new_full((), number, dtype=torch.int64) for number in row]) for row in numbers])
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def read_values(
    levels: Levels, name: str, value: Tensor | Sequence[Tensor], per_row: bool, per_element: bool, rows_first: bool = False
) -> tuple[list[Tensor], bool]:
    """Targets, qualities or weights, one per level and contiguous, as the operators take them; and whether rows have one each.

    `value` is a list with one per level, or one tensor for all: then its next to last dimension, or the last one of what rows have
    one of, runs over the levels. Nothing is converted. What has the shape of the logits is read as they are, unless `rows_first`.
    """
    function, given = levels.function, levels.levels
    if isinstance(value, Tensor) and len(given) == 1:
        values = [value]
    elif isinstance(value, Tensor):
        values = _split(levels, name, value, per_row, per_element)
    else:
        values = _as_list(function, name, value)
        if len(values) != len(given):
            raise ValueError(f"{function}: {name} must be one Tensor or {len(given)}, one per level of logits, got {len(values)}")
    for level, entry in zip(given, values, strict=True):
        _checks.check_strided(function, name, entry)
        _checks.check_device(function, name, entry, level.given)
    values = [entry.detach() if entry.requires_grad else entry for entry in values]
    forms = [_forms_of(levels, name, level, entry, per_row, per_element) for level, entry in zip(given, values, strict=True)]
    # Some shapes fit several forms, of one class or of as many places as classes: they follow the other levels, then the order below.
    order = (ROWS, AS_LOGITS, CLASSES_LAST) if rows_first else (AS_LOGITS, CLASSES_LAST, ROWS)
    form = next((form for form in order if all(form in found for found in forms)), None)
    if form is None:
        raise ValueError(f"{function}: {name} must have one form on all levels, got {' and '.join(str(list(entry.shape)) for entry in values)}")
    return [_ordered(level, entry, form) for level, entry in zip(given, values, strict=True)], form == ROWS


def _split(levels: Levels, name: str, value: Tensor, per_row: bool, per_element: bool) -> list[Tensor]:
    of_rows = levels.row_shape
    shapes = [] if of_rows is None else [of_rows] * per_row + [(*of_rows, levels.num_classes)] * per_element
    if tuple(value.shape) not in shapes:
        wanted = ", or have shape " + " or ".join(str(list(shape)) for shape in shapes) if shapes else ""
        raise ValueError(
            f"{levels.function}: {name} must be a list with one per level of logits{wanted}, got {list(value.shape)}"
        )
    return list(value.split([level.counted[1] for level in levels.levels], len(of_rows or ()) - 1))


# What `values` may be: one per row; one per element in the logits' own shape; or with the classes behind what rows have one of.
ROWS, AS_LOGITS, CLASSES_LAST = "rows", "as logits", "classes last"


def _forms_of(levels: Levels, name: str, level: Level, value: Tensor, per_row: bool, per_element: bool) -> list[str]:
    """The forms that the shape of `value` fits; raises if there is none."""
    if not level.order:
        shapes = {ROWS: [level.rows], AS_LOGITS: [tuple(level.given.shape)], CLASSES_LAST: []}
    else:
        batch, places, anchors, classes = (level.sizes[letter] for letter in "BSAC")
        spatial = tuple(level.given.shape[2:])
        of_rows = [(batch, places * anchors), (batch, *spatial, anchors)] + [(batch, *spatial)] * (anchors == 1)
        shapes = {ROWS: of_rows, AS_LOGITS: [tuple(level.given.shape)], CLASSES_LAST: [(*of_row, classes) for of_row in of_rows]}
    wanted = {form: fitting for form, fitting in shapes.items() if (per_row if form == ROWS else per_element)}
    found = [form for form, fitting in wanted.items() if tuple(value.shape) in fitting]
    if not found:
        forms = " or ".join(str(list(shape)) for shape in dict.fromkeys(shape for fitting in wanted.values() for shape in fitting))
        raise ValueError(
            f"{levels.function}: {name} must have shape {forms} for logits {list(level.given.shape)}, got {list(value.shape)}"
        )
    return found


def _ordered(level: Level, value: Tensor, form: str) -> Tensor:
    """`value` in the order of the operators' level, contiguous."""
    if not level.order:
        return _checks.contiguous(value) if form == ROWS else _checks.contiguous(value).view(level.logits.shape)
    rows, elements = _operator_shapes(level.order, level.sizes, level.given)
    batch, places, anchors, classes = (level.sizes[letter] for letter in "BSAC")
    if form == ROWS:
        return _permute(value.reshape(batch, places, anchors), "BSA", level.order.replace("C", "")).contiguous().view(rows)
    if form == CLASSES_LAST:
        return _permute(value.reshape(batch, places, anchors, classes), "BSAC", level.order).contiguous().view(elements)
    in_head = "BCAS" if level.order in ("BCAS", "BSCA") else "BACS"
    named = value.reshape([level.sizes[letter] for letter in in_head])
    return _permute(named, in_head, level.order).contiguous().view(elements)


def unexpanded(levels: Levels, weight: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """Weights of rows that were expanded over the classes, per row again: a copy would have one number per element."""
    entries = [weight] if isinstance(weight, Tensor) else weight if isinstance(weight, (list, tuple)) else []
    for level, entry in zip(levels.levels, entries, strict=False):
        if level.order or not isinstance(entry, Tensor) or entry.layout != torch.strided or entry.dim() != level.given.dim():
            return weight
        if entry.shape[-1] != levels.num_classes or levels.num_classes == 1 or entry.stride(-1) != 0:
            return weight
    per_row = [entry[..., 0] for entry in entries]
    return per_row[0] if isinstance(weight, Tensor) else per_row or weight


def read_targets(
    levels: Levels,
    targets: Tensor | Sequence[Tensor],
    quality: Tensor | Sequence[Tensor] | None,
    background: str,
    name: str = "targets",
) -> tuple[list[Tensor], list[Tensor]]:
    """Targets and qualities (empty if there are none) as the operators take them. `background` is checked.

    `name` is that of the caller's argument: "labels" are class indices alone.
    """
    function = levels.function
    _checks.check_choice(function, "background", background, ("last", "first"))
    entries = _as_list(function, name, targets)
    dtype = entries[0].dtype
    # Floating targets may mix dtypes.
    is_mixed = any(entry.dtype != dtype and not (entry.is_floating_point() and dtype.is_floating_point) for entry in entries[1:])
    if dtype.is_complex or is_mixed:
        names = ", ".join(sorted({str(entry.dtype) for entry in entries}))
        raise TypeError(f"{function}: {name} must be class indices or floating, of one dtype on all levels, got {names}")
    is_integral = not dtype.is_floating_point
    is_index = is_integral and dtype != torch.bool
    values, has_labels = read_values(levels, name, targets, is_index, name != "labels", rows_first=True)
    if has_labels:
        values = [_checks.as_labels(function, value, name) for value in values]
    else:
        if is_integral:
            values = [value.to(torch.float32) for value in values]
        for value in values:
            _checks.check_floating(function, "targets", value)
    if quality is None:
        return values, []
    if not has_labels:
        raise ValueError(f"{function}: quality must be None with dense targets, which are read as quality")
    qualities, _ = read_values(levels, "quality", quality, True, False)
    for value in qualities:
        _checks.check_floating(function, "quality", value)
    return values, qualities
