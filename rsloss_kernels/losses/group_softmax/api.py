"""Balanced group softmax: the public functions."""
import math
from typing import Any

import torch
from torch import Tensor

from rsloss_kernels import _backends, _checks, _library
from rsloss_kernels.losses.group_softmax import op_checks
from rsloss_kernels.losses.group_softmax.groups import ClassGroups


def group_softmax_loss(
    logits: Tensor,
    labels: Tensor,
    groups: ClassGroups,
    *,
    sample_weights: Tensor | None = None,
    others_ratio: float | None = 8.0,
    generator: torch.Generator | None = None,
    background: str = "first",
    class_weights: Tensor | None = None,
) -> Tensor:
    """Balanced group softmax: one softmax cross entropy per group of classes.

    Li et al., "Overcoming Classifier Imbalance for Long-tail Object Detection with Balanced Group Softmax", CVPR 2020. In a group, a
    row of another group's class or of the background is "others". Of the others of each group of classes only some are kept, as many
    as `others_ratio` times the group's foreground rows, drawn anew in every call; a group without foreground rows does not train.

    Args:
        logits: [N, K] with K = `groups.num_logits`; float16, bfloat16, float32 or float64.
        labels: [N], integers: 0 the background and 1..C the classes, or as `background` says. Negative: the row is ignored in all
            groups. Above C: background.
        groups: ClassGroups on the device of `logits`.
        sample_weights: [G, N], real numbers, in place of the sampling: of each row in each group, that of the background included.
            0: the row is not read there. The authors' weights.
        others_ratio: at least 0; None or infinity keep all others, 0 none. k = floor(foreground rows * ratio) are kept, uniformly
            without replacement.
        generator: of the random numbers, on the device of `logits`; None: PyTorch's own, as it must be inside torch.compile.
        background: "first" (0 background, classes 1..C) or "last" (classes 0..C-1, C background).
        class_weights: [C], floating: factors of the weights of foreground rows in the group of their class (the authors'
            class-reweighted form); others and the background group stay as they are.

    Returns:
        [G] losses, float64 for float64 logits, else float32; each `sum(weight * cross entropy) / max(sum(weight), 1)` over the rows.
        Train with their sum. A group without weights has a loss of exactly 0 that is connected to the graph, as has N = 0.

    NaN and infinity: -inf at what is not the target is a probability of 0. NaN, +inf, or -inf at the target make the group's loss and
    the gradient of that row in that group NaN, nothing else. Logits where the weight is 0 may be anything; their gradient is exactly 0.
    Only `logits` get a gradient. Do not edit `logits` or `labels` in place before backward.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices or ranges; with RSLOSS_DEBUG_CHECKS=1 also labels above C.
        RuntimeError: a forced backend that cannot run.
    """
    function = "group_softmax_loss"
    check_generator(function, generator)
    logits, labels = read_rows(function, "logits", logits, labels, groups, background)
    if class_weights is not None:
        # Before the sampling, which takes random numbers from the caller's generator.
        _check_class_weights(function, class_weights, logits, groups)
    backend = _backends.resolve("group_softmax_forward", logits.device.type)
    is_first = background == "first"
    if sample_weights is None:
        ratio = read_others_ratio(function, others_ratio)
        weights = _sample(function, backend, labels, groups, generator, is_first, ratio)
    else:
        weights = _read_weights(function, sample_weights, logits, groups)
    if class_weights is not None:
        weights = _reweight(weights, labels, groups, class_weights, is_first)
    (losses,) = _library.differentiable(
        "group_softmax_forward",
        backend,
        logits,
        labels,
        groups.tables[0],
        weights,
        groups.starts,
        groups.others,
        is_first,
    )
    return losses


def group_softmax_scores(logits: Tensor, groups: ClassGroups, *, background: str = "first") -> Tensor:
    """Scores of the classes at inference: the softmax of each group, scaled by the probability of the foreground.

    Li et al., CVPR 2020, section 4.2: `score(class) = P_group(class) * P_0(foreground)`, `score(background) = P_0(background)`. The
    probabilities of "others" are dropped, so that a row does not sum to 1.

    Args:
        logits: [N, K] with K = `groups.num_logits`; float16, bfloat16, float32 or float64.
        groups: ClassGroups on the device of `logits`.
        background: "first" (column 0 is the background's) or "last" (column C).

    Returns:
        [N, C + 1], dtype of `logits`, detached. What is below 1e-30 may be 0, but for float64. NaN or +inf make the classes of that
        group NaN, in the background group all.

    Raises TypeError, ValueError: wrong types, shapes or devices.
    """
    function = "group_softmax_scores"
    logits = _read_logits(function, "logits", logits, groups)
    _checks.check_choice(function, "background", background, ("last", "first"))
    _library.refuse_transformed(function, logits)
    backend = _backends.resolve(function, logits.device.type)
    return _library.operator(function, backend)(
        logits.detach(), groups.tables[0], groups.starts, groups.others, groups.background_group, background == "first"
    )


def read_rows(
    function: str, name: str, logits: Tensor, labels: Tensor, groups: ClassGroups, background: str
) -> tuple[Tensor, Tensor]:
    """The checked rows in the form that the operators take."""
    logits = _read_logits(function, name, logits, groups)
    _checks.check_choice(function, "background", background, ("last", "first"))
    _checks.check_tensor(function, "labels", labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{function}: labels must be class indices, integers, got {labels.dtype}")
    _checks.check_device(function, "labels", labels, logits)
    _checks.check_shape(function, "labels", labels, logits.shape[:1], f"one label per row of {name}")
    labels = _checks.contiguous(_checks.as_labels(function, labels, "labels"))
    if _checks.debug_checks() and labels.numel() and int(labels.max()) > groups.num_classes:
        raise ValueError(
            f"{function}: labels must be at most {groups.num_classes}, the number of classes "
            f"({'0 is the background' if background == 'first' else 'that is the background'}), got {int(labels.max())}"
        )
    return logits, labels


def check_generator(function: str, generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{function}: generator must be a torch.Generator or None, got {type(generator).__name__}")


def read_others_ratio(function: str, others_ratio: float | None) -> float:
    if others_ratio is None:
        return math.inf
    op_checks.check_others_ratio(function, others_ratio)
    return float(others_ratio)


def _read_logits(function: str, name: str, logits: Tensor, groups: ClassGroups) -> Tensor:
    if not isinstance(groups, ClassGroups):
        raise TypeError(f"{function}: groups must be ClassGroups, got {type(groups).__name__}")
    _checks.check_tensor(function, name, logits)
    _checks.check_floating(function, name, logits)
    op_checks.check_columns(function, name, logits, groups)
    device = groups.tables[0].device
    if device != logits.device and groups.class_columns.device == logits.device:
        groups.make_tables()
    elif device != logits.device:
        raise ValueError(
            f"{function}: groups must be on the device of {name}, {logits.device} (groups.to(device)), got {device}"
        )
    return _checks.contiguous(logits)


def _sample(
    function: str,
    backend: str,
    labels: Tensor,
    groups: ClassGroups,
    generator: torch.Generator | None,
    is_first: bool,
    ratio: float,
) -> Tensor:
    keys = None
    if 0 < ratio < math.inf:
        options: dict[str, Any] = {"dtype": torch.float32, "device": labels.device}
        if generator is not None:
            # Not given at all where there is none: torch.compile cannot trace a generator, None included.
            if generator.device.type != labels.device.type:
                raise ValueError(f"{function}: generator must be on the device of logits, {labels.device}, got {generator.device}")
            options["generator"] = generator
        keys = torch.rand((groups.num_groups, labels.shape[0]), **options)
    return _library.operator("group_softmax_sample", backend)(
        labels, groups.tables[0], keys, groups.starts, groups.others, groups.background_group, is_first, ratio
    )


def _read_weights(function: str, weights: Tensor, logits: Tensor, groups: ClassGroups) -> Tensor:
    _checks.check_tensor(function, "sample_weights", weights)
    _checks.check_device(function, "sample_weights", weights, logits)
    wanted = (groups.num_groups, logits.shape[0])
    _checks.check_shape(function, "sample_weights", weights, wanted, "a weight per group and row")
    if not (weights.dtype.is_floating_point or weights.dtype.is_complex):
        weights = weights.double()
    _checks.check_floating(function, "sample_weights", weights)
    return _checks.plain(weights)


def _check_class_weights(function: str, class_weights: Tensor, logits: Tensor, groups: ClassGroups) -> None:
    _checks.check_tensor(function, "class_weights", class_weights)
    _checks.check_device(function, "class_weights", class_weights, logits)
    _checks.check_floating(function, "class_weights", class_weights)
    _checks.check_shape(function, "class_weights", class_weights, (groups.num_classes,), "a weight per class, without the background")


def _reweight(weights: Tensor, labels: Tensor, groups: ClassGroups, class_weights: Tensor, is_first: bool) -> Tensor:
    """float64: products of weights of whichever dtypes."""
    classes = op_checks.class_of(labels, groups.num_classes, is_first)
    class_columns, group_starts, _ = groups.tables
    columns = class_columns[classes.clamp(min=0)]
    group = torch.bucketize(columns, group_starts[1:].to(columns.dtype), right=True)
    is_own = group == torch.arange(groups.num_groups, device=group.device)[:, None]
    # The background, and the others of every group, keep their weights.
    factors = torch.cat([class_weights.detach().double(), class_weights.new_ones(1, dtype=torch.float64)])[classes.clamp(min=0)]
    return weights.double() * torch.where(is_own, factors, 1.0)
