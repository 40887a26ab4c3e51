"""The element-wise sigmoid losses from their definitions, in numpy's longest floating type; nothing shared with the library."""
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LONG = np.longdouble


@dataclasses.dataclass(frozen=True)
class SigmoidTruth:
    """Losses and their derivatives of every element [R, C], divided by the normalizer; what was dropped is 0."""

    elements: np.ndarray
    slopes: np.ndarray
    is_positive: np.ndarray
    sums_factor: float  # of the class sums, against the slopes

    @property
    def losses(self) -> list[float]:
        is_usual = np.abs(self.elements).max(initial=0) < 1e290
        return [math.fsum(map(float, self.elements.flat)) if is_usual else float(self.elements.sum())]

    def gradient(self, upstream: float = 1.0) -> Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy((self.slopes * LONG(upstream)).astype(np.float64))

    @property
    def class_sums(self) -> tuple[Tensor, Tensor]:
        pulls = np.abs(self.slopes) * LONG(self.sums_factor)
        # What is NaN in one sum is nothing in the other.
        sums = (np.where(mask, pulls, LONG(0)).sum(0) for mask in (self.is_positive, ~self.is_positive))
        return tuple(torch.from_numpy(value.astype(np.float64)) for value in sums)


def sigmoid_elements(z, t, gamma, a, b, modulator: str) -> tuple[np.ndarray, np.ndarray]:
    """`L` and `dL/dz`, all finite or infinite, with p the sigmoid of z and 0 times anything 0."""
    with np.errstate(all="ignore"):
        p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
        entropy = _times(t, np.logaddexp(LONG(0), -z)) + _times(1 - t, np.logaddexp(LONG(0), z))
        distance = (1 - t) * p - t * q  # p - t
        if modulator == "focal":
            weight, base, slope = a * t + b * (1 - t), p * (1 - t) + q * t, p * q * (1 - 2 * t)
        elif modulator == "quality":
            weight, base, slope = np.where(t > 0, a, b), np.abs(distance), p * q * np.sign(distance)
        else:
            weight = np.where(t > 0, a * t if modulator == "varifocal" else a, b)
            gamma = np.where(t > 0, LONG(0), gamma)
            base, slope = p, p * q
        modulation = np.where(gamma == 0, LONG(1), base**gamma)
        of_modulation = np.where((gamma == 0) | (slope == 0) | (base == 0), LONG(0), gamma * base ** (gamma - 1) * slope)
        return _times(weight * modulation, entropy), weight * (_times(of_modulation, entropy) + modulation * distance)


def _times(a, b) -> np.ndarray:
    return np.where(np.broadcast_to(a, np.broadcast_shapes(np.shape(a), np.shape(b))) == 0, LONG(0), a * b)


def sigmoid_loss(
    logits: Tensor,
    targets: Tensor,
    quality: Tensor | None = None,
    *,
    modulator: str,
    gamma: float | Tensor,
    a: float | Tensor,
    b: float | Tensor,
    weight: Tensor | None = None,
    class_weight: Tensor | Sequence[float] | None = None,
    class_mask: Tensor | None = None,
    divisor: float = 1.0,
    background: str = "last",
    ignore_index: int | None = None,
    sums_factor: float = 1.0,
) -> SigmoidTruth:
    """Of logits [..., C], as rows [R, C]."""
    num_classes = logits.shape[-1]
    z = _long(logits).reshape(-1, num_classes)
    gamma, a, b = (np.broadcast_to(_long(value), (num_classes,)) for value in (gamma, a, b))
    factor = np.ones(num_classes, LONG) if class_weight is None else _long(class_weight)
    if class_mask is not None:
        factor = np.where(_long(class_mask) != 0, factor, LONG(0))
    a, b = a * factor, b * factor

    dropped = np.zeros(z.shape, bool)
    if targets.shape == logits.shape:
        t = _long(targets).reshape(z.shape)
        is_positive = t > 0
    else:
        labels = targets.reshape(-1).numpy().astype(object)  # of unbounded integers
        is_positive = np.zeros(z.shape, bool)
        t = np.zeros(z.shape, LONG)
        of_rows = np.ones(len(labels), LONG) if quality is None else _long(quality).reshape(-1)
        for row, label in enumerate(labels):
            if label < 0 or label == ignore_index:
                dropped[row] = True
                continue
            column = label - (background == "first")
            if 0 <= column < num_classes:
                is_positive[row, column] = True
                t[row, column] = of_rows[row]
    v = np.ones(z.shape, LONG)
    if weight is not None:
        v = _long(weight).reshape(z.shape if weight.shape == logits.shape else (-1, 1)) * v
    with np.errstate(all="ignore"):
        dropped |= (v == 0) | (t < 0) | ((a == 0) & (b == 0)) | ((t == 0) & (b == 0)) | ((t == 1) & (a == 0))
        is_nan = ~dropped & (np.isnan(z) | np.isnan(t) | np.isnan(v))
        safe = dropped | is_nan
        z, t, v = (np.where(safe, LONG(0), value) for value in (z, t, v))
        losses, slopes = sigmoid_elements(z, t, gamma, a, b, modulator)
        outputs = [np.where(dropped, LONG(0), _times(v, value) / LONG(divisor)) for value in (losses, slopes)]
    losses, slopes = (np.where(is_nan, LONG(np.nan), value) for value in outputs)
    return SigmoidTruth(losses, slopes, is_positive, sums_factor)


def _long(value) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.dtype.is_floating_point else value
        value = value.numpy()
    return np.asarray(value).astype(LONG)
