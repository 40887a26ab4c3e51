"""Seesaw loss: the public function."""
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsloss_kernels import _backends, _checks, _library
from rsloss_kernels.losses.focal.arguments import REDUCTIONS, read_number


class SeesawLosses(NamedTuple):
    objectness: Tensor
    classes: Tensor


def seesaw_loss(
    logits: Tensor,
    labels: Tensor,
    cum_samples: Tensor,
    weight: Tensor | None = None,
    *,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 1e-2,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> SeesawLosses:
    """Seesaw loss: a softmax over the classes balanced by how often they occurred, and two logits for foreground and background.

    Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", CVPR 2021, equations 4 to 7. A row pushes down a class rarer than
    its own by `(count ratio)^p` less, and one whose probability is above that of its own by `(probability ratio)^q` more; both factors
    are constants for the gradient.

    Args:
        logits: [N, C + 2]: the C classes, foreground, background; float16, bfloat16, float32 or float64.
        labels: [N], integers: 0..C-1 the classes, C and above background. Negative: the row is ignored.
        cum_samples: [C + 1], real: how often each class was seen, this batch included; that of the background is not used.
        weight: [N], real. 0: the row is not read.
        p, q: at least 0; 0 leaves out the factor for rare classes, or that for confused ones.
        eps: at least 0; the probability of a row's own class counts as this much at least in the second factor.
        reduction: "mean" (objectness over all rows, classes over the foreground rows, whatever their weights; ignored rows do not
            count), "sum" or "none".
        avg_factor: a number or a 0-d Tensor that divides both losses instead, in "mean" alone.

    Returns:
        SeesawLosses(objectness, classes), named: 0-d, float64 for float64 logits, else float32; for "none" [N] in the dtype of the logits,
        0 where a row does not count. Without rows, and for classes without foreground rows, exactly 0, connected to the graph.

    NaN and infinity: -inf in a class that is not the row's own is a probability of 0. NaN, +inf, or -inf at the own class make the
    classes loss and the row's gradient of the class columns NaN; likewise the objectness. Only `logits` get a gradient. Do not edit
    `logits`, `labels` or `weight` in place before backward.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices or ranges; with RSLOSS_DEBUG_CHECKS=1 also labels above C.
        RuntimeError: a forced backend that cannot run.
    """
    return evaluate("seesaw_loss", logits, labels, cum_samples, weight, p, q, eps, reduction, avg_factor)


def evaluate(
    function: str, logits: Tensor, labels: Tensor, cum_samples: Tensor, weight: Tensor | None, p: float, q: float, eps: float,
    reduction: str, avg_factor: float | Tensor | None, avg_eps: float = 0.0,
) -> SeesawLosses:  # fmt: skip
    """`avg_eps` is added to `avg_factor`."""
    classes = cum_samples.shape[0] - 1 if isinstance(cum_samples, Tensor) and cum_samples.dim() == 1 else None
    logits, labels = read_rows(function, "logits", logits, labels, classes)
    log_counts = _read_counts(function, cum_samples, logits)
    weight = _read_weight(function, weight, logits)
    powers = [read_number(function, name, value) for name, value in (("p", p), ("q", q), ("eps", eps))]
    _checks.check_choice(function, "reduction", reduction, REDUCTIONS)
    avg_factor = _read_avg_factor(function, avg_factor, reduction, logits, avg_eps)
    backend = _backends.resolve("seesaw_forward", logits.device.type)
    options = (*powers, REDUCTIONS.index(reduction), avg_factor)
    losses = _library.differentiable("seesaw_forward", backend, logits, labels, weight, log_counts, *options)
    if reduction == "none":
        losses = tuple(value.to(logits.dtype) for value in losses)
    return SeesawLosses(*losses)


def read_rows(function: str, name: str, logits: Tensor, labels: Tensor, classes: int | None) -> tuple[Tensor, Tensor]:
    """The checked rows in the form that the operators take."""
    check_columns(function, name, logits, classes)
    if logits.dim() != 2:
        raise ValueError(f"{function}: {name} must have shape [N, C + 2], got {list(logits.shape)}")
    _checks.check_tensor(function, "labels", labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{function}: labels must be class indices, integers, got {labels.dtype}")
    _checks.check_device(function, "labels", labels, logits)
    _checks.check_shape(function, "labels", labels, logits.shape[:1], f"one label per row of {name}")
    labels = _checks.contiguous(_checks.as_labels(function, labels, "labels"))
    classes = logits.shape[1] - 2
    if _checks.debug_checks() and labels.numel() and int(labels.max()) > classes:
        raise ValueError(
            f"{function}: labels must be at most {classes}, the number of classes (that is the background), got {int(labels.max())}"
        )
    return _checks.contiguous(logits), labels


def check_columns(function: str, name: str, logits: Tensor, classes: int | None) -> None:
    """The most common mistake is a classifier of C + 1 channels."""
    _checks.check_tensor(function, name, logits)
    _checks.check_floating(function, name, logits)
    if logits.dim() < 1 or logits.shape[-1] < 3 or (classes is not None and logits.shape[-1] != classes + 2):
        wanted = "C + 2" if classes is None else f"{classes + 2}"
        raise ValueError(
            f"{function}: {name} must have {wanted} columns, got shape {list(logits.shape)}: the classes without the background "
            f"{'' if classes is None else f'({classes}) '}first, then a logit for foreground and one for background"
        )


def _read_counts(function: str, cum_samples: Tensor, logits: Tensor) -> Tensor:
    """Logarithms of the counts of the classes, float64 [C]."""
    _checks.check_tensor(function, "cum_samples", cum_samples)
    _checks.check_device(function, "cum_samples", cum_samples, logits)
    _checks.check_shape(function, "cum_samples", cum_samples, (logits.shape[1] - 1,), "a count per class and one for the background")
    if cum_samples.dtype.is_complex:
        raise TypeError(f"{function}: cum_samples must be real, got {cum_samples.dtype}")
    return cum_samples.detach()[:-1].double().clamp(min=1).log()


def _read_weight(function: str, weight: Tensor | None, logits: Tensor) -> Tensor | None:
    if weight is None:
        return None
    _checks.check_tensor(function, "weight", weight)
    _checks.check_device(function, "weight", weight, logits)
    _checks.check_shape(function, "weight", weight, logits.shape[:1], "one weight per row")
    if not (weight.dtype.is_floating_point or weight.dtype.is_complex):
        weight = weight.double()
    _checks.check_floating(function, "weight", weight)
    return _checks.plain(weight)


def _read_avg_factor(function: str, avg_factor: Any, reduction: str, logits: Tensor, eps: float) -> Tensor | None:
    if avg_factor is None:
        return None
    if reduction != "mean":
        raise ValueError(f"{function}: avg_factor must be None with reduction {reduction!r}: only 'mean' divides")
    if isinstance(avg_factor, Tensor):
        _checks.check_device(function, "avg_factor", avg_factor, logits)
        if avg_factor.numel() != 1 or avg_factor.dim() > 1 or avg_factor.is_complex():
            raise ValueError(f"{function}: avg_factor must be a number or a 0-d Tensor, got shape {list(avg_factor.shape)}")
        return avg_factor.detach().reshape(()).double() + eps
    if not _checks.is_number(avg_factor):
        raise TypeError(f"{function}: avg_factor must be a number or a 0-d Tensor, got {type(avg_factor).__name__}")
    return logits.new_full((), avg_factor + eps, dtype=torch.float64)
