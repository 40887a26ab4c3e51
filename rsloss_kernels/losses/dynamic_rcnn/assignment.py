"""Dynamic label assignment: labels by an IoU threshold, and the threshold that follows the proposals."""
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsloss_kernels import _checks, distributed
from rsloss_kernels._state import store
from rsloss_kernels.losses.dynamic_rcnn.schedules import Statistic, WindowedValue


def assign_by_iou(max_overlaps: Tensor, pos_thr: float | Tensor, neg_thr: float | Tensor | None = None) -> Tensor:
    """Labels boxes by their largest IoU with a ground truth.

    Args:
        max_overlaps: any shape, floating; a negative one marks a box to be ignored, as in MMDetection.
        pos_thr: from here on a box is positive. A number or a Tensor of one number on the device of `max_overlaps`, which no host reads.
        neg_thr: below it a box is negative; between the two it is ignored. None: `pos_thr`. Where it is above `pos_thr`, positives win.

    Returns:
        int64, the shape of `max_overlaps`: 1 positive, 0 negative, -1 ignored (NaN too). Compared in the dtype of `max_overlaps`, to which
        thresholds are rounded.

    Raises TypeError, ValueError: wrong types, shapes, devices.
    """
    name = "assign_by_iou"
    _checks.check_tensor(name, "max_overlaps", max_overlaps)
    _checks.check_floating(name, "max_overlaps", max_overlaps)
    pos_thr = _read_threshold(name, "pos_thr", pos_thr, max_overlaps)
    neg_thr = pos_thr if neg_thr is None else _read_threshold(name, "neg_thr", neg_thr, max_overlaps)
    is_negative = (max_overlaps >= 0) & (max_overlaps < neg_thr)
    labels = torch.where(is_negative, 0, -1)
    return torch.where((max_overlaps >= pos_thr) & (max_overlaps >= 0), 1, labels)


def _read_threshold(function: str, name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{function}: {name} must be a number or a Tensor of one number, got {type(value).__name__}")
        if value != value:
            raise ValueError(f"{function}: {name} must be a number to compare with, got {value}")
        # Rounded as a Tensor is, whatever the shape of `max_overlaps`.
        return torch.full((), value, dtype=like.dtype, device=like.device)
    if value.numel() != 1 or value.dim() > 1 or not value.is_floating_point():
        raise ValueError(
            f"{function}: {name} must be a number or a floating Tensor of one number, got {value.dtype} of shape {list(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{function}: {name} must be on the device of max_overlaps, {like.device}, got {value.device}")
    return value.detach().reshape(()).to(like.dtype)


class DynamicLabelAssignment(WindowedValue):
    """The IoU threshold of Dynamic R-CNN, for `assign_by_iou`: the mean over a window of steps of the `iou_topk`-th largest IoU.

    Zhang et al., "Dynamic R-CNN", ECCV 2020, eq. 2 and 3. README.md of this loss has both published variants, step by step.

    Args:
        iou_topk: which IoU of an image.
        update_iter_interval: steps of a window.
        initial_iou: the threshold is never less than this, once it is updated.
        variant: "mmdet" (of each image, mean over the images) or "original" (among all images; ground truths are among the boxes).
        first_iou: the threshold until the first update; None: 0.5 for "mmdet", as its configuration has it, else `initial_iou`.
        process_group: None (each process follows its own images, as published), "default" (all processes if torch.distributed is
            initialised) or a group, whose images are followed together in one collective per step.
        max_images: with a group, most images of one process in a step; the same on all processes.
        schedule_length: how many updates `schedule()` remembers.

    Buffers, whatever the module is cast to: `iou_threshold` (float64, 0-d; set both thresholds of an assigner by it, and in MMDetection
    `min_pos_iou`), `iou_sum`, `num_recorded`, `num_steps` (of the window), `num_updates`, `schedule_values`, `schedule_steps`. They
    change in `update` alone, in training mode.
    """

    iou_threshold: Tensor
    iou_sum: Tensor
    value_name = "iou_threshold"

    def __init__(
        self,
        iou_topk: int = 75,
        update_iter_interval: int = 100,
        initial_iou: float = 0.4,
        variant: str = "mmdet",
        process_group: object | None = None,
        *,
        first_iou: float | None = None,
        max_images: int = 8,
        schedule_length: int = 1024,
    ):
        name = "DynamicLabelAssignment"
        initial_iou = _check_iou(name, "initial_iou", initial_iou)
        if first_iou is None:
            first_iou = 0.5 if variant == "mmdet" else initial_iou
        topk = _checks.read_count(name, "iou_topk", iou_topk)
        options = (variant, process_group, max_images, schedule_length)
        super().__init__(_check_iou(name, "first_iou", first_iou), topk, update_iter_interval, *options)
        self.initial_iou = initial_iou
        self.register_buffer("iou_sum", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, ious_per_image: Sequence[Tensor] | Tensor) -> None:
        """Takes a step; in evaluation mode does nothing.

        Args:
            ious_per_image: the largest IoU of every box with a ground truth: a list of floating [n], one per image (n may be 0, and
                differ), or one Tensor [n] of one image or [B, n].

        Raises TypeError, ValueError: wrong types, shapes, devices; more images than `max_images`.
        """
        if not self.training:
            return
        images = self._read_images(ious_per_image)
        self._check_images(len(images))
        if self.variant == "original":
            joined = torch.cat(images) if images else self.iou_threshold.new_empty(0)
            smallest = self._kth_smallest(-joined, torch.ones_like(joined, dtype=torch.bool), len(images))
            self._advance(smallest._replace(value=-smallest.value))
            return
        # Of each image by itself, as their numbers differ.
        of_images = [
            torch.where(image.isfinite().all(), image.topk(min(self.topk, len(image))).values[-1], torch.nan)
            for image in images
            if len(image)
        ]
        total = torch.stack(of_images).sum() if of_images else torch.zeros_like(self.iou_threshold)
        both = torch.stack([total, torch.full_like(total, len(of_images))])
        total, count = distributed.sum_over_group(both, self._group()).unbind()
        self._advance(Statistic(total / count.clamp(min=1), count > 0))

    def _read_images(self, given: Sequence[Tensor] | Tensor) -> list[Tensor]:
        name = "DynamicLabelAssignment"
        if isinstance(given, Tensor):
            given = [given] if given.dim() == 1 else list(given) if given.dim() == 2 else [given]
        elif isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"{name}: ious_per_image must be a list of Tensors or a Tensor, got {type(given).__name__}")
        for image in given:
            _checks.check_tensor(name, "ious_per_image", image)
            _checks.check_floating(name, "ious_per_image", image)
            if image.dim() != 1:
                raise ValueError(f"{name}: ious_per_image must hold one Tensor [n] per image, got shape {list(image.shape)}")
            if image.device != self.iou_threshold.device:
                raise ValueError(
                    f"{name}: ious_per_image must be on the device of the module, {self.iou_threshold.device}, got {image.device}"
                )
        return [image.detach().double() for image in given]

    def _record(self, value: Tensor, records: Tensor) -> None:
        store(self.iou_sum, self.iou_sum + torch.where(records, value, 0.0))

    def _summary(self, recorded: Tensor) -> tuple[Tensor, Tensor]:
        divisor = recorded.clamp(min=1) if self.variant == "mmdet" else self.update_iter_interval
        return (self.iou_sum / divisor).clamp(min=self.initial_iou), recorded > 0

    def _clear(self, ends: Tensor) -> None:
        store(self.iou_sum, torch.where(ends, 0.0, self.iou_sum))

    def _shown(self) -> dict[str, object]:
        return {"iou_topk": self.topk, "initial_iou": self.initial_iou, **super()._shown()}


def _check_iou(function: str, name: str, value: Any) -> float:
    if not _checks.is_number(value):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{function}: {name} must be within [0, 1], got {value}")
    return float(value)
