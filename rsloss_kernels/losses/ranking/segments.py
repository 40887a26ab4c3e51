"""What the losses rank by itself: reads the arguments `segments` and `num_segments`."""
from typing import Any

import torch
from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels.losses.levels import Levels, read_values

_WANTED = "None, a Tensor of ids, a number of equal chunks of the first dimension, or 'class'"


def check_segments(function: str, segments: Any, num_segments: int | None) -> None:
    """What can be said without a batch."""
    if num_segments is not None and not (_checks.is_int(num_segments) and 1 <= num_segments < _checks.LARGEST_COUNT):
        raise ValueError(f"{function}: num_segments must be None or an int within 1..2^31-2, got {num_segments!r}")
    if segments is None or is_ids(segments):
        return
    if not (_checks.is_int(segments) or isinstance(segments, str)):
        raise TypeError(f"{function}: segments must be {_WANTED}, got {type(segments).__name__}")
    if segments != "class" if isinstance(segments, str) else not 1 <= segments < _checks.LARGEST_COUNT:
        raise ValueError(f"{function}: segments must be {_WANTED}, got {segments!r}")


def is_ids(segments: object) -> bool:
    return isinstance(segments, (Tensor, list, tuple))


def read_segments(
    function: str,
    first: Tensor,
    levels: Levels | None,
    targets: Tensor,
    segments: Any,
    num_segments: int | None,
) -> tuple[Tensor | None, int]:
    """The ids as the operators take them, int32 [rows, 1] or [1, columns], None for equal chunks; and how many segments there are.

    Args:
        first: the logits of the first level, as given.
        levels: None: `first` is all there is.
        targets: those of the first level, as read.
    """
    check_segments(function, segments, num_segments)
    if segments is None:
        if num_segments is not None:
            raise ValueError(f"{function}: num_segments must be None without segments, got {num_segments!r}")
        return None, 1
    if levels is not None and levels.layout != "rows" and not _checks.is_int(segments):
        raise ValueError(
            f"{function}: segments of maps must be None or a number of equal chunks of the images, got "
            f"{repr(segments) if isinstance(segments, str) else 'ids'}; put the levels together as rows for others"
        )
    if is_ids(segments):
        if num_segments is None:
            raise ValueError(f"{function}: num_segments must be given with ids as segments, got None")
        return _read_ids(function, first, levels, targets, segments, num_segments), int(num_segments)
    if segments == "class":
        if first.dim() < 2:
            raise ValueError(
                f"{function}: logits must have rows and a last dimension of classes for segments 'class', got {list(first.shape)}"
            )
        known = max(first.shape[-1], 1)
    else:
        for level in [first] if levels is None else levels.given:
            if level.dim() == 0 or level.shape[0] % segments:
                raise ValueError(
                    f"{function}: segments must divide the first dimension of logits, got {segments} for shape {list(level.shape)}"
                )
        known = int(segments)
    if num_segments not in (None, known):
        raise ValueError(f"{function}: num_segments must be None or {known} for segments {segments!r}, got {num_segments}")
    if known == 1 or segments != "class":
        return None, known
    return torch.arange(known, dtype=torch.int32, device=first.device)[None], known


def _read_ids(
    function: str, first: Tensor, levels: Levels | None, targets: Tensor, segments: Any, num_segments: int
) -> Tensor:
    """int32, [rows, 1]."""
    # Of 1-D logits with dense targets every element is a row.
    is_per_element = first.dim() == 1 and targets.is_floating_point()
    if levels is None:
        _checks.check_tensor(function, "segments", segments)
        _checks.check_device(function, "segments", segments, first)
        wanted, meaning = first.shape[:-1], "the shape of logits less the last dimension"
        if is_per_element:
            wanted, meaning = first.shape, "the shape of 1-D logits (every element is a row)"
        _checks.check_shape(function, "segments", segments, wanted, meaning)
        values = [segments]
    else:
        values, _ = read_values(levels, "segments", segments, not is_per_element, is_per_element)
    for value in values:
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{function}: segments must be int32 or int64, got {value.dtype}")
        if _checks.debug_checks() and value.numel() and int(value.max()) >= num_segments:
            raise ValueError(f"{function}: segments must be ids below num_segments, {num_segments}, got {int(value.max())}")
    # An id outside is ignored, and must not wrap around to one inside.
    narrow = [value if value.dtype == torch.int32 else value.clamp(-1, num_segments).to(torch.int32) for value in values]
    rows = [value.reshape(-1, 1) for value in narrow]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).contiguous()
