"""What the public functions of all ranking losses share first: they check their arguments and put them in the operators' form."""
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from rsloss_kernels import _backends, _checks, distributed

# Without `max_positives`: of dense targets on a GPU, and of every process of a group.
DEFAULT_CAPACITY = 16384


class Request(NamedTuple):
    """The checked arguments of a ranking loss, in the form that the operators take."""

    function: str
    logits: Tensor
    targets: Tensor
    quality: list[Tensor]  # empty, or one
    segments: Tensor | None
    num_segments: int
    capacity: int | None
    is_background_first: bool
    delta: float
    group: object | None
    average_gradients: bool
    backend: str


def read_arguments(
    function: str,
    operator: str,
    logits: Tensor,
    targets: Tensor,
    quality: Tensor | None = None,
    *,
    delta: float,
    background: str,
    segments: Tensor | int | str | None = None,
    num_segments: int | None = None,
    max_positives: int | None,
    process_group: object | None,
    average_gradients: bool,
    default_capacity: int | None = None,
    is_unit_quality: bool = True,
) -> Request:
    """Checks the arguments of the loss `function`, to run on the backend of `operator`.

    Args:
        default_capacity: replaces the default of `max_positives` where there is no process group.
        is_unit_quality: whether `quality` must be within [0, 1].
    """
    _checks.check_logits(function, logits)
    _checks.check_tensor(function, "targets", targets)
    delta = check_options(function, delta, background, max_positives)
    targets, quality = read_targets(function, logits, targets, quality)
    ids = None
    if segments is None and num_segments is None:
        num_segments = 1
    else:
        num_segments = read_num_segments(function, logits, segments, num_segments)
        if num_segments > 1 or isinstance(segments, Tensor):
            ids = read_segment_ids(function, logits, targets, segments, num_segments)
    group = None if process_group is None else distributed.resolve_group(function, process_group)
    backend = _backends.resolve(operator, logits.device.type)
    if group is None:
        capacity = capacity_of(logits, targets, default_capacity if max_positives is None else max_positives)
    else:
        capacity = max_positives or DEFAULT_CAPACITY
    if _checks.debug_checks():
        # More positives than the default of the loss, or of a process of a group, are told where that is known.
        limit = max_positives or (None if default_capacity is not None else capacity)
        is_positive = _in_segments(positives_among(logits, targets, background), ids, num_segments)
        check_values(function, logits, targets, quality if is_unit_quality else [], is_positive)
        if limit is not None and group is None:
            check_capacity(function, is_positive, limit)
    return Request(
        function,
        _checks.contiguous(logits),
        targets,
        quality,
        ids,
        num_segments,
        capacity,
        background == "first",
        delta,
        group,
        average_gradients,
        backend,
    )


def check_options(function: str, delta: float, background: str, max_positives: int | None) -> float:
    """What can be said without a batch; returns `delta` as a float."""
    _checks.check_choice(function, "background", background, ("last", "first"))
    if max_positives is not None and not (_is_int(max_positives) and max_positives >= 1):
        raise ValueError(f"{function}: max_positives must be None or an int of at least 1, got {max_positives!r}")
    return _checks.check_delta(function, delta)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_targets(
    function: str, logits: Tensor, targets: Tensor, quality: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Class indices as int32/int64, or dense targets in a floating dtype; and the list of qualities, empty if there are none."""
    _checks.check_strided(function, "targets", targets)
    _checks.check_device(function, "targets", targets, logits)
    if targets.shape != logits.shape:
        return _read_labels(function, logits, targets, quality)
    if quality is not None:
        raise ValueError(f"{function}: quality must be None with dense targets (they hold it already), got a Tensor")
    if targets.dtype in _checks.LOGIT_TYPES:
        return _checks.plain(targets), []
    if targets.is_complex():
        raise TypeError(f"{function}: targets must be real, got {targets.dtype}")
    if logits.dim() == 1 and _is_integral(targets) and _checks.debug_checks():
        warnings.warn(
            f"{function}: targets are integers with the shape of 1-D logits, so 1 is a positive and 0 a negative; for class indices "
            f"give logits a last dimension of classes, [{len(logits)}, 1]",
            stacklevel=4,
        )
    if targets.is_floating_point():
        _checks.check_floating(function, "targets", targets)
    return targets.to(torch.float32).contiguous(), []


def _read_labels(function: str, logits: Tensor, targets: Tensor, quality: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """`read_targets` of targets without the shape of `logits`."""
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        wanted = "the shape of logits (dense), or be integers with that shape less its last dimension (class indices)"
        _checks.check_shape(function, "targets", targets, logits.shape, wanted)
    if not _is_integral(targets):
        wanted = "integers where they have the shape of logits less its last dimension (class indices)"
        raise TypeError(f"{function}: targets must be {wanted}, got {targets.dtype}")
    labels = _checks.plain(_checks.as_labels(function, targets))
    if quality is None:
        return labels, []
    _checks.check_tensor(function, "quality", quality)
    _checks.check_floating(function, "quality", quality)
    _checks.check_strided(function, "quality", quality)
    _checks.check_device(function, "quality", quality, logits)
    _checks.check_shape(function, "quality", quality, targets.shape, "the shape of targets")
    return labels, [_checks.plain(quality)]


def _is_integral(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def check_segments(function: str, segments: Tensor | int | str | None, num_segments: int | None) -> None:
    """What can be said without a batch."""
    if num_segments is not None and not (_is_int(num_segments) and num_segments >= 1):
        raise ValueError(f"{function}: num_segments must be None or an int of at least 1, got {num_segments!r}")
    if segments is None or isinstance(segments, Tensor):
        return
    wanted = "None, a Tensor of ids, a number of equal chunks of the first dimension, or 'class'"
    if not (_is_int(segments) or isinstance(segments, str)):
        raise TypeError(f"{function}: segments must be {wanted}, got {type(segments).__name__}")
    if segments != "class" if isinstance(segments, str) else segments < 1:
        raise ValueError(f"{function}: segments must be {wanted}, got {segments!r}")


def read_num_segments(function: str, logits: Tensor, segments: Tensor | int | str | None, num_segments: int | None) -> int:
    """Checks the kind of `segments` and returns how many there are; ids themselves are read by `read_segment_ids`."""
    check_segments(function, segments, num_segments)
    if segments is None:
        if num_segments is not None:
            raise ValueError(f"{function}: num_segments must be None without segments, got {num_segments!r}")
        return 1
    if isinstance(segments, Tensor):
        if num_segments is None:
            raise ValueError(f"{function}: num_segments must be given with ids as segments, got None")
        return num_segments
    if segments == "class":
        if logits.dim() < 2:
            raise ValueError(
                f"{function}: logits must have rows and a last dimension of classes for segments 'class', got {list(logits.shape)}"
            )
        known = max(logits.shape[-1], 1)
    else:
        if logits.dim() == 0 or logits.shape[0] % segments:
            raise ValueError(
                f"{function}: segments must divide the first dimension of logits, got {segments} for shape {list(logits.shape)}"
            )
        known = segments
    if num_segments not in (None, known):
        raise ValueError(f"{function}: num_segments must be None or {known} for segments {segments!r}, got {num_segments}")
    return known


def read_segment_ids(
    function: str, logits: Tensor, targets: Tensor, segments: Tensor | int | str, num_segments: int
) -> Tensor | None:
    """The operators' form: int32, [rows, 1] or [1, columns]; None for equal chunks."""
    if isinstance(segments, str):
        return torch.arange(num_segments, dtype=torch.int32, device=logits.device)[None]
    if not isinstance(segments, Tensor):
        return None
    if segments.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: segments must be int32 or int64, got {segments.dtype}")
    _checks.check_strided(function, "segments", segments)
    _checks.check_device(function, "segments", segments, logits)
    if logits.dim() == 1 and targets.is_floating_point():
        _checks.check_shape(function, "segments", segments, logits.shape, "the shape of 1-D logits (every element is a row)")
    else:
        wanted = logits.shape[:-1]
        _checks.check_shape(function, "segments", segments, wanted, "the shape of logits less the last dimension")
    if _checks.debug_checks() and segments.numel() and int(segments.max()) >= num_segments:
        raise ValueError(f"{function}: segments must be ids below num_segments, {num_segments}, got {int(segments.max())}")
    if segments.dtype == torch.int64:
        # An id outside is ignored, and must not wrap around to one inside.
        segments = segments.clamp(-1, num_segments).to(torch.int32)
    return segments.reshape(-1, 1).contiguous()


def capacity_of(logits: Tensor, targets: Tensor, max_positives: int | None) -> int | None:
    """Slots for positives. None on a CPU outside of tracing: exactly as many as there are."""
    is_cpu = logits.device.type == "cpu"
    if is_cpu and not torch.compiler.is_compiling():
        return None
    if max_positives is not None:
        return max_positives
    is_index_form = not targets.is_floating_point()
    most = targets.numel() if is_index_form else logits.numel()
    if is_cpu:
        return most
    return most if is_index_form else min(most, DEFAULT_CAPACITY)


def positives_among(logits: Tensor, targets: Tensor, background: str) -> Tensor:
    """Which of `targets`, as read, are positives. In its shape."""
    if targets.is_floating_point():
        return targets > 0
    first = int(background == "first")
    return (targets >= first) & (targets < logits.shape[-1] + first)


def _in_segments(is_positive: Tensor, ids: Tensor | None, num_segments: int) -> Tensor:
    """Those that belong to a segment."""
    if ids is None or ids.shape[1] != 1:
        return is_positive
    rows = ids.shape[0]
    by_row = is_positive.reshape(rows, is_positive.numel() // max(rows, 1))
    return (by_row & (ids >= 0) & (ids < num_segments)).reshape(is_positive.shape)


def check_capacity(function: str, is_positive: Tensor, capacity: int) -> None:
    """Reads the data."""
    positives = int(is_positive.sum())
    if positives > capacity:
        raise RuntimeError(f"{function}: max_positives must be at least the number of positives, {positives}, got {capacity}")


def check_values(function: str, logits: Tensor, targets: Tensor, quality: list[Tensor], is_positive: Tensor) -> None:
    """Checks that read the data, on under RSLOSS_DEBUG_CHECKS=1 only."""
    if targets.is_floating_point():
        positives = int((targets > 0).sum())
        if 2 * positives > targets.numel():
            raise ValueError(
                f"{function}: targets must be positive for at most half of the elements (label smoothing is not supported: any "
                f"target above 0 is a positive), got {positives} of {targets.numel()}"
            )
        if positives and not float(targets.max()) <= 1:
            raise ValueError(f"{function}: targets must be at most 1, got {float(targets.max())}")
        return
    classes = logits.shape[-1]
    if targets.numel() and int(targets.max()) > classes:
        raise ValueError(f"{function}: targets must be class indices up to {classes}, got {int(targets.max())}")
    for value in quality:
        value = value[is_positive]
        if value.numel() and not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(
                f"{function}: quality must be within [0, 1] where there is a positive, got [{float(value.min())}, {float(value.max())}]"
            )
