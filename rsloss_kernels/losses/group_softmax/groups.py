"""ClassGroups: which classes share a softmax, and which column of the logits is whose."""
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from rsloss_kernels import _checks
from rsloss_kernels._state import StatefulLoss
from rsloss_kernels.losses.group_softmax import op_checks

BACKGROUND_FORMS = ("softmax", "sigmoid")
BACKGROUND_GROUPS = ("first", "last")
_DTYPES = {"class_columns": torch.int32, "group_starts": torch.int64, "group_others": torch.int64}
_BUFFERS = tuple(_DTYPES)


class ClassGroups(StatefulLoss):
    """A partition of C classes into groups that each have a softmax, beside a group for the background.

    Classes are numbered 0..C-1 here, whatever the labels are. The logits lie group after group: in a group of classes first the
    logit of "others", then its classes in the order given. The background group is the first, with the logits (background,
    foreground), as in the authors' code; or the last, with (foreground, background), as in the EQL v2 repository.

    Args:
        groups: class numbers of each group, every class 0..C-1 exactly once. A group may be empty; it has the logit of its others.
        background_form: "softmax": two logits for background and foreground, as in the authors' code; "sigmoid": one logit, of the
            background, as in the paper.
        background_group: "first" or "last".

    Buffers `class_columns` int32 [C + 1], `group_starts` int64 [G + 1] and `group_others` int64 [G] (columns; -1: none) travel with
    the module and its checkpoints. Loading a checkpoint takes over its groups; it must have as many classes. Whatever else writes to them
    or replaces them (an average of a model's buffers over its steps, which rounds) reaches neither a loss nor a checkpoint.

    Attributes: `num_classes` C, `num_groups` G, `num_logits` K; `starts` and `others`, the buffers as numbers; `background_group`,
    the index of that group; `tables`, the buffers as losses read them, tensors of its own on their device.

    Raises TypeError, ValueError: classes that are missing, repeated or out of range; more than 63 groups of classes.
    """

    class_columns: Tensor
    group_starts: Tensor
    group_others: Tensor

    def __init__(
        self, groups: Sequence[Sequence[int]], *, background_form: str = "softmax", background_group: str = "first"
    ):
        super().__init__()
        name = type(self).__name__
        _checks.check_choice(name, "background_form", background_form, BACKGROUND_FORMS)
        _checks.check_choice(name, "background_group", background_group, BACKGROUND_GROUPS)
        groups = _read_groups(name, groups)
        num_classes = sum(map(len, groups))
        columns = [0] * (num_classes + 1)
        starts, others = [0], []

        def add_background() -> None:
            # The two logits lie in the order of each original.
            is_second = background_group == "last" and background_form == "softmax"
            columns[num_classes] = starts[-1] + int(is_second)
            others.append(-1 if background_form == "sigmoid" else starts[-1] + 1 - int(is_second))
            starts.append(starts[-1] + (2 if background_form == "softmax" else 1))

        if background_group == "first":
            add_background()
        for group in groups:
            others.append(starts[-1])
            for place, number in enumerate(group):
                columns[number] = starts[-1] + 1 + place
            starts.append(starts[-1] + 1 + len(group))
        if background_group == "last":
            add_background()
        for buffer, numbers in zip(_BUFFERS, (columns, starts, others), strict=True):
            self.register_buffer(buffer, torch.tensor(numbers, dtype=_DTYPES[buffer]))
        self._read_buffers(columns, starts, others)

    @classmethod
    def from_counts(
        cls,
        counts: Sequence[int] | Tensor,
        boundaries: Sequence[float] = (10, 100, 1000),
        background_form: str = "softmax",
        background_group: str = "first",
    ) -> "ClassGroups":
        """Groups by the number of training instances.

        Args:
            counts: [C], instances of each class, the background not among them; at least 0.
            boundaries: ascending; a class whose count equals one belongs to the group above. Empty: one group of all classes.
            background_form, background_group: as in the constructor.

        Classes of a group are in ascending order. There is one more group of classes than boundaries, with classes or without.
        """
        function = f"{cls.__name__}.from_counts"
        numbers = counts.tolist() if isinstance(counts, Tensor) else list(counts)
        if isinstance(counts, Tensor) and counts.dim() != 1:
            raise ValueError(f"{function}: counts must have shape [C], got {list(counts.shape)}")
        limits = [float(limit) for limit in boundaries]
        if any(not low < high for low, high in zip(limits, limits[1:], strict=False)) or any(limit != limit for limit in limits):
            raise ValueError(f"{function}: boundaries must ascend, got {list(boundaries)}")
        groups: list[list[int]] = [[] for _ in range(len(limits) + 1)]
        for number, count in enumerate(numbers):
            if not count >= 0:
                raise ValueError(f"{function}: counts must be at least 0, got {count} for class {number}")
            groups[sum(count >= limit for limit in limits)].append(number)
        return cls(groups, background_form=background_form, background_group=background_group)

    def column_of(self, number: int) -> int:
        """The column of class `number`, 0..C-1; of the background for C."""
        number = operator.index(number)
        if not 0 <= number <= self.num_classes:
            raise ValueError(
                f"{type(self).__name__}.column_of: number must be a class 0..{self.num_classes - 1} or {self.num_classes} for the "
                f"background, got {number}"
            )
        return self._columns[number]

    @property
    def groups(self) -> list[list[int]]:
        """Class numbers of each group of classes, in the order of their columns."""
        by_column = sorted(range(self.num_classes), key=self._columns.__getitem__)
        return [
            [number for number in by_column if self.starts[group] <= self._columns[number] < self.starts[group + 1]]
            for group in range(self.num_groups)
            if group != self.background_group
        ]

    def _read_buffers(self, columns: Sequence[int], starts: Sequence[int], others: Sequence[int]) -> None:
        """What the host must know."""
        self._columns = tuple(columns)
        self.starts, self.others = tuple(starts), tuple(others)
        self.num_classes, self.num_groups, self.num_logits = len(columns) - 1, len(others), starts[-1]
        background = columns[-1]
        self.background_group = next(g for g in range(len(others)) if starts[g] <= background < starts[g + 1])
        self.make_tables()

    def make_tables(self) -> None:
        """On the device of the buffers, where something moved these alone."""
        numbers = zip(_BUFFERS, (self._columns, self.starts, self.others), strict=True)
        # Tensors of inference mode could not be kept for backward.
        with torch.inference_mode(False):
            tables = [torch.tensor(values, dtype=_DTYPES[name], device=getattr(self, name).device) for name, values in numbers]
            for table in tables:
                # As torch._dynamo.mark_static does, which takes long to import: or torch.compile takes their sizes for those of a batch.
                table.__dict__["_dynamo_static_indices"] = {0}
            self.tables = tables

    def _restore(self) -> None:
        """Writes the tables into the buffers. Never waits for the device."""
        for name, table in zip(_BUFFERS, self.tables, strict=True):
            buffer = getattr(self, name)
            if buffer.is_inference() or buffer.shape != table.shape or buffer.dtype != table.dtype or buffer.device != table.device:
                setattr(self, name, table.clone())
            else:
                buffer.copy_(table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.make_tables()
        # `to_empty` leaves anything in them.
        self._restore()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "tables" not in state:
            # Of a version that read the buffers.
            self.make_tables()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._restore()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loaded: list[Any] = [state_dict.get(prefix + name) for name in _BUFFERS]
        is_whole = all(isinstance(value, Tensor) for value in loaded)
        if is_whole:
            tables = [value.long().tolist() for value in loaded]
            reason = _why_no_groups(tables[0], tables[1], tables[2], self.num_classes)
            if reason is not None:
                error_msgs.append(f"{type(self).__name__}: {reason}")
                return
            for name, value in zip(_BUFFERS, loaded, strict=True):
                if value.shape != getattr(self, name).shape:
                    setattr(self, name, getattr(self, name).new_empty(value.shape))
        else:
            # Only together do they mean anything.
            state_dict = {name: value for name, value in state_dict.items() if name.removeprefix(prefix) not in _BUFFERS}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if is_whole:
            self._read_buffers(*tables)

    def extra_repr(self) -> str:
        sizes = [len(group) for group in self.groups]
        place = "last" if self.background_group else "first"
        return f"{self.num_classes} classes in groups of {sizes}, background group {place}, {self.num_logits} logits"


def _read_groups(function: str, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    try:
        lists = [[operator.index(number) for number in group] for group in groups]
    except TypeError as error:
        raise TypeError(f"{function}: groups must be lists of integers, one list per group, got {groups!r} ({error})") from error
    if len(lists) >= op_checks.MOST_GROUPS:
        raise ValueError(f"{function}: groups must be at most {op_checks.MOST_GROUPS - 1}, got {len(lists)}")
    numbers = [number for group in lists for number in group]
    seen: set[int] = set()
    for number in numbers:
        if number in seen:
            raise ValueError(f"{function}: groups must hold each class once, got class {number} twice")
        seen.add(number)
    outside = sorted(number for number in seen if not 0 <= number < len(numbers))
    if outside:
        missing = sorted(set(range(len(numbers))) - seen)
        raise ValueError(
            f"{function}: groups of {len(numbers)} classes must hold 0..{len(numbers) - 1} (without the background), got {outside[:5]}, "
            f"missing {missing[:5]}"
        )
    return lists


def _why_no_groups(columns: list[int], starts: list[int], others: list[int], num_classes: int) -> str | None:
    """None for tables that belong to groups of `num_classes` classes, else the reason in words."""
    if len(columns) != num_classes + 1:
        return f"the checkpoint's groups hold {len(columns) - 1} classes, wanted {num_classes}"
    ascends = bool(starts) and starts[0] == 0 and all(a < b for a, b in zip(starts, starts[1:], strict=False))
    if not ascends or len(starts) != len(others) + 1:
        return f"group_starts must ascend from 0 and be one more than group_others, got {starts} and {len(others)}"
    known = [column for column in others if column != -1]
    if any(column != -1 and not starts[g] <= column < starts[g + 1] for g, column in enumerate(others)):
        return f"group_others must lie within their groups, got {others} for {starts}"
    if sorted(columns + known) != list(range(starts[-1])):
        return "class_columns and group_others must hold every column once"
    return None
