"""What the public functions of all ranking losses share first: they check their arguments and put them in the operators' form."""
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rsloss_kernels import _backends, _checks, distributed
from rsloss_kernels.losses import levels as reading
from rsloss_kernels.losses.levels import Levels, read_levels
from rsloss_kernels.losses.ranking import debug_checks
from rsloss_kernels.losses.ranking.op import MOST_POSITIVES
from rsloss_kernels.losses.ranking.segments import read_segments

if TYPE_CHECKING:
    import torch.distributed as dist

# Without `max_positives`: of dense targets on a GPU, and of every process of a group.
DEFAULT_CAPACITY = 16384


class Request(NamedTuple):
    """The checked arguments of a ranking loss, in the form that the operators take."""

    function: str
    levels: Levels | None  # what logits are; None: one tensor of rows
    logits: list[Tensor]
    targets: list[Tensor]  # one per level
    quality: list[Tensor]  # empty, or one per level
    segments: Tensor | None
    num_segments: int
    capacity: int | None
    maps: bool
    is_background_first: bool
    delta: float
    group: "dist.ProcessGroup | None"
    average_gradients: bool
    backend: str


def read_arguments(
    function: str,
    operator: str,
    logits: Any,
    targets: Any,
    quality: Any = None,
    *,
    delta: float,
    background: str,
    segments: Any = None,
    num_segments: int | None = None,
    max_positives: int | None,
    process_group: object | None,
    average_gradients: bool,
    layout: str = "rows",
    num_classes: int | None = None,
    regression_losses: Any = None,
) -> Request:
    """Checks the arguments of the loss `function`, to run on the backend of `operator`.

    `regression_losses`, of aLRP: the quality where they have the shape of class indices, else one per positive, as many as the default
    of `max_positives` without a process group.
    """
    average_gradients = _checks.read_flag(function, "average_gradients", average_gradients)
    is_one = isinstance(logits, Tensor) and isinstance(targets, Tensor) and not isinstance(quality, (list, tuple))
    if is_one and layout == "rows" and num_classes is None:
        # Read without a description of levels, which a small loss would feel.
        levels, maps, first = None, False, logits
        _checks.check_logits(function, logits)
        delta, max_positives = check_options(function, delta, background, max_positives)
        if regression_losses is not None:
            _checks.check_device(function, "regression_losses", regression_losses, logits)
            is_per_row = _checks.is_index_form(targets, logits) and regression_losses.shape == targets.shape
            quality = regression_losses if is_per_row else None
        targets, quality = read_targets(function, logits, targets, quality)
        logits, targets = [_checks.contiguous(logits)], [targets]
    else:
        levels = read_levels(function, logits, layout, num_classes)
        maps, first, logits = levels.maps, levels.first, levels.logits
        delta, max_positives = check_options(function, delta, background, max_positives)
        targets, quality = reading.read_targets(levels, targets, quality, background)
        if regression_losses is not None and not targets[0].is_floating_point():
            quality = _read_aligned(levels, regression_losses)
    is_per_positive = regression_losses is not None and not quality
    if is_per_positive:
        _check_per_positive(function, regression_losses, first)
    ids = None
    if segments is None and num_segments is None:
        num_segments = 1
    else:
        ids, num_segments = read_segments(function, first, levels, targets[0], segments, num_segments)
    group = None if process_group is None else distributed.resolve_group(function, process_group)
    backend = _backends.resolve(operator, first.device.type)
    if group is None:
        most = regression_losses.numel() if is_per_positive and max_positives is None else max_positives
        capacity = capacity_of(logits, targets, most)
    else:
        capacity = max_positives or DEFAULT_CAPACITY
    if capacity is not None and max_positives is not None and max_positives >= MOST_POSITIVES:
        raise ValueError(f"{function}: max_positives must be below 2^29 where it sizes tables, got {max_positives}")
    if _checks.debug_checks():
        num_classes = levels.num_classes if levels is not None else first.shape[-1] if first.dim() else 1
        # More positives than the default of the loss, or of a process of a group, are told where that is known.
        limit = max_positives or (None if is_per_positive else capacity)
        debug_checks.check_values(
            function,
            num_classes,
            targets,
            quality if regression_losses is None else [],
            [positives_among(target, num_classes, background) for target in targets],
            ids,
            num_segments,
            limit if group is None else None,
        )
    return Request(
        function,
        levels,
        logits,
        targets,
        quality,
        ids,
        num_segments,
        capacity,
        maps,
        background == "first",
        delta,
        group,
        average_gradients,
        backend,
    )


def _read_aligned(levels: Levels, regression_losses: Tensor) -> list[Tensor]:
    """Regression losses in the shape of class indices, one per level; empty if they have another one."""
    if levels.layout != "rows" and regression_losses.dim() == 1:
        return []
    if levels.layout == "rows" and tuple(regression_losses.shape) != levels.row_shape:
        return []
    return reading.read_values(levels, "regression_losses", regression_losses, True, False)[0]


def _check_per_positive(function: str, regression_losses: Tensor, logits: Tensor) -> None:
    _checks.check_device(function, "regression_losses", regression_losses, logits)
    if regression_losses.dim() != 1:
        raise ValueError(
            f"{function}: regression_losses must have one dimension (a value per positive), or the shape of class indices, got "
            f"{list(regression_losses.shape)} for logits {list(logits.shape)}"
        )


def check_options(function: str, delta: float, background: str, max_positives: int | None) -> tuple[float, int | None]:
    """What can be said without a batch; returns `delta` as a float, and `max_positives`."""
    _checks.check_choice(function, "background", background, ("last", "first"))
    if max_positives is not None:
        if not (_checks.is_int(max_positives) and 1 <= max_positives < 2**63):
            raise ValueError(f"{function}: max_positives must be None or an int of at least 1 and below 2^63, got {max_positives!r}")
        max_positives = int(max_positives)
    return _checks.check_delta(function, delta), max_positives


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
    _checks.check_device(function, "quality", quality, logits)
    _checks.check_shape(function, "quality", quality, targets.shape, "the shape of targets")
    return labels, [_checks.plain(quality)]


def _is_integral(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def positives_among(targets: Tensor, num_classes: int, background: str) -> Tensor:
    """Which of `targets`, as read, are positives. In its shape."""
    if targets.is_floating_point():
        return targets > 0
    first = int(background == "first")
    return (targets >= first) & (targets < num_classes + first)


def capacity_of(logits: list[Tensor], targets: list[Tensor], max_positives: int | None) -> int | None:
    """Slots for positives. None on a CPU outside of tracing: exactly as many as there are."""
    is_cpu = logits[0].device.type == "cpu"
    if is_cpu and not torch.compiler.is_compiling():
        return None
    if max_positives is not None:
        return max_positives
    is_index_form = not targets[0].is_floating_point()
    most = sum(value.numel() for value in (targets if is_index_form else logits))
    return most if is_cpu or is_index_form else min(most, DEFAULT_CAPACITY)
