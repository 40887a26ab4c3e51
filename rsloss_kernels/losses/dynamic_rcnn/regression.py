"""DynamicSmoothL1Loss: smooth L1 whose beta follows the regression targets."""
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels._state import store
from rsloss_kernels.losses.dynamic_rcnn.schedules import EPS, WindowedValue
from rsloss_kernels.losses.focal.arguments import REDUCTIONS, read_number
from rsloss_kernels.losses.focal.modules import EPS as AVG_EPS
from rsloss_kernels.losses.smooth_l1 import api


class DynamicSmoothL1Loss(WindowedValue):
    """Smooth L1 with the `beta` of Dynamic R-CNN: the median over a window of steps of the `beta_topk`-th smallest regression target per
    image; forward is that of MMDetection's SmoothL1Loss.

    Zhang et al., "Dynamic R-CNN", ECCV 2020, eq. 5 and algorithm 1. README.md of this loss has both published variants, step by step.

    Args:
        beta_topk: which target, times the images.
        update_iter_interval: steps of a window.
        initial_beta: the first `beta`, and the largest.
        variant: "mmdet" (of the rows with a weight, median) or "original" (of all rows, upper median).
        process_group: None (each process follows its own boxes, as published), "default" (all processes if torch.distributed is
            initialised) or a group, whose boxes are followed together in one collective per step. The loss itself communicates nothing.
        loss_weight: factor of the loss.
        reduction: "mean", "sum" or "none".
        max_images: with a group, most images of one process in a step; the same on all processes.
        schedule_length: how many updates `schedule()` remembers.

    Buffers, whatever the module is cast to: `beta` (float64, 0-d, never below 1e-15), `beta_history` (float64
    [update_iter_interval], the first `num_recorded` are of this window), `num_recorded`, `num_steps`, `num_updates`,
    `schedule_values`, `schedule_steps`. They change in `update` alone, in training mode; a forward before it keeps its own `beta` for
    backward.
    """

    beta: Tensor
    beta_history: Tensor
    value_name = "beta"

    def __init__(
        self,
        beta_topk: int = 10,
        update_iter_interval: int = 100,
        initial_beta: float = 1.0,
        variant: str = "mmdet",
        process_group: object | None = None,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        *,
        max_images: int = 8,
        schedule_length: int = 1024,
    ):
        name = "DynamicSmoothL1Loss"
        api.check_beta(name, "initial_beta", initial_beta)
        if initial_beta < EPS:
            raise ValueError(f"{name}: initial_beta must be at least {EPS:g}, got {initial_beta}")
        topk = _checks.read_count(name, "beta_topk", beta_topk)
        super().__init__(float(initial_beta), topk, update_iter_interval, variant, process_group, max_images, schedule_length)
        _checks.check_choice(name, "reduction", reduction, REDUCTIONS)
        self.initial_beta = float(initial_beta)
        self.loss_weight = read_number(name, "loss_weight", loss_weight, least=None)
        self.reduction = reduction
        self.register_buffer("beta_history", torch.zeros(self.update_iter_interval, dtype=torch.float64))

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss times `loss_weight`, by the present `beta`.

        Args:
            pred, target, weight: as in `smooth_l1_loss`.
            avg_factor: a number or a Tensor of one number. "mean" divides by it plus float32's epsilon, as in MMDetection; "none" does
                not look at it; an error for "sum".
            reduction_override: "none", "mean" or "sum", in place of the module's `reduction`.

        Raises TypeError, ValueError: wrong types, shapes, devices or ranges.
        """
        name = type(self).__name__
        reduction = self.reduction if reduction_override is None else reduction_override
        _checks.check_choice(name, "reduction_override", reduction, REDUCTIONS)
        if avg_factor is not None and reduction == "sum":
            raise ValueError(f"{name}: avg_factor must be None with reduction 'sum': only 'mean' divides")
        avg_factor = None if reduction == "none" else avg_factor
        # A copy: an update before backward must not change what this forward used.
        return api.evaluate(name, pred, target, self.beta.clone(), weight, reduction, avg_factor, self.loss_weight, AVG_EPS)

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def update(
        self,
        bbox_targets: Tensor | Sequence[Tensor],
        bbox_weights: Tensor | Sequence[Tensor] | None = None,
        num_images: int | None = None,
    ) -> None:
        """Takes a step; in evaluation mode does nothing.

        Args:
            bbox_targets: floating [N, 4] (or any [N, D], D at least 2): encoded regression targets of the sampled boxes, dx and dy
                first; or a list of these, one per image.
            bbox_weights: real or bool [N, D] or [N], or a list of these: "mmdet" counts the rows whose (first) weight is above 0, None
                all; "original" does not read it.
            num_images: of these targets, at least 1 where there are any; None: the length of the list, 1 for a Tensor.

        Raises TypeError, ValueError: wrong types, shapes, devices; more images than `max_images`.
        """
        if not self.training:
            return
        name = type(self).__name__
        targets = self._join("bbox_targets", bbox_targets)
        if targets.dim() != 2 or targets.shape[1] < 2:
            raise ValueError(f"{name}: bbox_targets must have shape [N, 4], got {list(targets.shape)}")
        _checks.check_floating(name, "bbox_targets", targets)
        if num_images is None:
            num_images = 1 if isinstance(bbox_targets, Tensor) else len(bbox_targets)
        elif isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 0:
            raise ValueError(f"{name}: num_images must be an int of at least 0, got {num_images!r}")
        if num_images == 0 and len(targets):
            raise ValueError(f"{name}: num_images must be at least 1 for targets of shape {list(targets.shape)}, got 0")
        self._check_images(num_images)
        counts = targets.new_ones(len(targets), dtype=torch.bool)
        if bbox_weights is not None:
            weights = self._join("bbox_weights", bbox_weights)
            if weights.shape != targets.shape:
                _checks.check_shape(name, "bbox_weights", weights, targets.shape[:1], f"one number per row or the shape {list(targets.shape)}")
            if self.variant == "mmdet":
                counts = (weights if weights.dim() == 1 else weights[:, 0]) > 0
        offsets = targets[:, :2].double().abs().mean(1)
        self._advance(self._kth_smallest(offsets, counts, num_images))

    def _join(self, argument: str, given: Tensor | Sequence[Tensor]) -> Tensor:
        name = type(self).__name__
        if not isinstance(given, Tensor) and (isinstance(given, str) or not isinstance(given, Sequence)):
            raise TypeError(f"{name}: {argument} must be a Tensor or a list of Tensors, got {type(given).__name__}")
        parts = [given] if isinstance(given, Tensor) else list(given)
        for part in parts:
            _checks.check_tensor(name, argument, part)
            if part.is_complex():
                raise TypeError(f"{name}: {argument} must be real, got {part.dtype}")
            if part.dim() not in (1, 2) or part.shape[1:] != parts[0].shape[1:]:
                got = ", ".join(str(list(one.shape)) for one in parts)
                raise ValueError(f"{name}: {argument} must be [N, 4], or a list of these, one per image, got {got}")
            if part.device != self.beta.device:
                raise ValueError(f"{name}: {argument} must be on the device of the module, {self.beta.device}, got {part.device}")
        if not parts:
            return self.beta.new_empty((0, 4))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).detach()

    def _record(self, value: Tensor, records: Tensor) -> None:
        history = self.beta_history
        # A window of more entries than it has room for keeps the smallest.
        is_full = self.num_recorded >= len(history)
        place = torch.where(is_full, history.argmax(), self.num_recorded)
        is_written = records & (~is_full | (value < history.max()))
        is_place = torch.arange(len(history), device=history.device) == place
        store(history, torch.where(is_place & is_written, value, history))

    def _summary(self, recorded: Tensor) -> tuple[Tensor, Tensor]:
        length = len(self.beta_history)
        is_recorded = torch.arange(length, device=recorded.device) < recorded
        ordered = torch.where(is_recorded, self.beta_history, torch.inf).sort().values
        if self.variant == "original":
            found, exists = ordered[length // 2], recorded > length // 2
        else:
            middle = torch.stack([(recorded - 1) // 2, recorded // 2]).clamp(0, length - 1)
            found, exists = ordered.index_select(0, middle).mean(), recorded > 0
        return found.clamp(max=self.initial_beta), exists & (found >= EPS)

    def _shown(self) -> dict[str, object]:
        shown = {"beta_topk": self.topk, "initial_beta": self.initial_beta, **super()._shown()}
        return {**shown, "loss_weight": self.loss_weight, "reduction": self.reduction}
