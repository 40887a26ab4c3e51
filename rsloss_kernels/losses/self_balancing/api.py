"""Self-balancing of a task's loss by the value of the ranking losses, and the score weights and weighted mean of the box loss.

A handful of 0-d operations, one row maximum and two sums: plain PyTorch on every backend, nothing read on the host.
"""
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsloss_kernels import _checks, distributed
from rsloss_kernels._state import StatefulLoss, keeps_statistics, store
from rsloss_kernels.losses.ranking.arguments import positives_among, read_targets

MODES = ("step", "running")
SMALLEST_WEIGHT = 1e-12
# As published: the iterations of an epoch of COCO there.
DEFAULT_PERIOD = 3665


class SelfBalancing(distributed.HoldsGroup, StatefulLoss):
    """Scales a task's loss (box, mask, ...) to the size of a reference loss, so that no weight needs tuning.

    `mode="step"`: factor = reference / loss, of this very step (Oksuz et al., Rank & Sort, ICCV 2021, where the reference is
    ranking + sorting). `mode="running"`: factor = (mean loss + mean reference) / mean loss over `period` steps, used from the
    step that completes the period until the next one does (aLRP, NeurIPS 2020, where the reference is the classification loss).
    The factor is a constant for the gradient.

    Args:
        mode: "step" or "running".
        period: for "running", steps between two factors; as published, the iterations of one epoch. "step" has none, and warns.
        initial: for "running", the factor of the first period; in both modes the first value of the buffer `SB_weight`.
        process_group: None, "default" (all processes, if torch.distributed is initialised) or a group: the factor comes from the
            means of both losses over its processes, one all-gather of two numbers, so that factor and buffers are the same on all.
            Every process must then call the module in every step.

    Buffers, float64 whatever the module is cast to: `SB_weight` (the last factor) and for "running" `counter` (int64, steps
    gathered since the last factor), `reference_sum`, `loss_sum`. They change only in training mode with gradients enabled.

    One module per task and stage. Raises TypeError, ValueError for wrong arguments.
    """

    SB_weight: Tensor
    counter: Tensor
    reference_sum: Tensor
    loss_sum: Tensor

    def __init__(
        self, mode: str = "step", period: int = DEFAULT_PERIOD, initial: float = 50.0, *, process_group: object | None = None
    ):
        super().__init__()
        _checks.check_choice("SelfBalancing", "mode", mode, MODES)
        period = _checks.read_count("SelfBalancing", "period", period)
        if isinstance(initial, bool) or not isinstance(initial, (int, float)) or not 0 <= initial < float("inf"):
            raise ValueError(f"SelfBalancing: initial must be a finite number of at least 0, got {initial!r}")
        distributed.resolve_group("SelfBalancing", process_group)
        if mode == "step" and period != DEFAULT_PERIOD:
            warnings.warn(f"SelfBalancing: period={period} has no effect with mode='step', only with mode='running'", stacklevel=2)
        self.mode = mode
        self.period = period
        self.process_group = process_group
        self.register_buffer("SB_weight", torch.tensor(initial, dtype=torch.float64))
        if mode == "running":
            self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
            self.register_buffer("reference_sum", torch.zeros((), dtype=torch.float64))
            self.register_buffer("loss_sum", torch.zeros((), dtype=torch.float64))

    def forward(self, reference_loss: Tensor, loss: Tensor) -> Tensor:
        """The scaled loss.

        Args:
            reference_loss: 0-d, detached here.
            loss: 0-d; the gradient flows through it alone.

        Returns:
            `factor * loss`, 0-d, float64 for a float64 `loss`, else float32. In step mode a finite pair whose factor is not
            finite (a loss of 0) gives an exact zero that is still connected to the graph, and a NaN or infinite argument gives NaN.
            In all these cases the buffers stay as they are. With a group that is judged by the means.
        """
        _check_loss("reference_loss", reference_loss)
        _check_loss("loss", loss)
        _checks.check_device("SelfBalancing", "reference_loss", reference_loss, loss, "loss")
        result_type = torch.promote_types(loss.dtype, torch.float32)
        group = distributed.resolve_group("SelfBalancing", self.process_group)
        both = torch.stack([reference_loss.detach().double(), loss.detach().double()])
        reference, value = (distributed.sum_over_group(both, group) / distributed.world_size(group)).unbind()
        factor = (self._step if self.mode == "step" else self._running)(reference, value, result_type)
        return loss.to(result_type) * factor.to(result_type)

    if TYPE_CHECKING:
        __call__ = forward

    def _step(self, reference: Tensor, value: Tensor, result_type: torch.dtype) -> Tensor:
        factor = reference / value
        is_finite_input = reference.isfinite() & value.isfinite()
        usable = factor.to(result_type).isfinite() & is_finite_input
        if keeps_statistics(self):
            store(self.SB_weight, torch.where(usable, factor, self.SB_weight))
        return torch.where(usable, factor, torch.where(is_finite_input, 0.0, torch.nan))

    def _running(self, reference: Tensor, value: Tensor, result_type: torch.dtype) -> Tensor:
        if not keeps_statistics(self):
            return self.SB_weight.clone()
        reference_sum, loss_sum, counter = self.reference_sum + reference, self.loss_sum + value, self.counter + 1
        completes = counter >= self.period
        factor = torch.where(completes, (loss_sum + reference_sum) / loss_sum, self.SB_weight)
        # A period that would end in a factor that is not finite does not end: it waits for the next usable step.
        usable = factor.to(result_type).isfinite() & reference.isfinite() & value.isfinite()
        factor = torch.where(usable, factor, self.SB_weight)
        starts_anew = usable & completes
        store(self.SB_weight, factor)
        for buffer, gathered in ((self.counter, counter), (self.reference_sum, reference_sum), (self.loss_sum, loss_sum)):
            store(buffer, torch.where(usable, gathered, buffer).masked_fill(starts_anew, 0))
        return factor

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}" + (f", period={self.period}" if self.mode == "running" else "")


def _check_loss(name: str, value: Tensor) -> None:
    _checks.check_tensor("SelfBalancing", name, value)
    if not value.is_floating_point():
        raise TypeError(f"SelfBalancing: {name} must have a floating dtype, got {value.dtype}")
    _checks.check_shape("SelfBalancing", name, value, (), "no dimensions")


def score_weights(logits: Tensor, targets: Tensor, *, background: str = "last") -> Tensor:
    """Weights of the box loss: how sure the classifier is of each positive row (Oksuz et al., Rank & Sort, ICCV 2021).

    Args:
        logits: [..., C], class logits; float16, bfloat16, float32 or float64.
        targets: dense, the shape of `logits`: a row with any target above 0 is positive; or class indices, an integral
            dtype with the shape of `logits` less its last dimension: foreground rows are positive (see `background`).
        background: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C).

    Returns:
        [...]: the largest sigmoid over all classes (not only the labelled one) on positive rows, 0 elsewhere; float64 for
        float64 logits, else float32; detached. All zeros without positives, whatever the other rows hold.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, background.
    """
    _checks.check_logits("score_weights", logits)
    _checks.check_tensor("score_weights", "targets", targets)
    _checks.check_choice("score_weights", "background", background, ("last", "first"))
    if logits.dim() == 0:
        raise ValueError("score_weights: logits must have at least one dimension, the classes, got []")
    targets, _ = read_targets("score_weights", logits, targets)
    is_positive = positives_among(targets, logits.shape[-1], background)
    if targets.is_floating_point():
        is_positive = is_positive.any(-1)
    result_type = torch.promote_types(logits.dtype, torch.float32)
    if logits.shape[-1] == 0:
        return logits.new_zeros(logits.shape[:-1], dtype=result_type)
    # The sigmoid is monotone: the row maximum first, then one sigmoid per row.
    confidence = logits.detach().amax(-1).to(result_type).sigmoid()
    return torch.where(is_positive, confidence, torch.zeros_like(confidence))


def score_weighted_mean(
    losses: Tensor, weights: Tensor, *, process_group: object | None = None, average_gradients: bool = True
) -> Tensor:
    """The weighted mean `sum(weights * losses) / max(sum(weights), 1e-12)`, over all processes of a group.

    With `score_weights`, the box loss of Rank & Sort (Oksuz et al., ICCV 2021).

    Args:
        losses: any shape, floating; the gradient flows through it alone.
        weights: floating, the shape of `losses`; detached. Where it is 0, `losses` may hold anything.
        process_group: None, "default" (all processes, if torch.distributed is initialised) or a group: both sums run over its
            processes, one all-gather of two numbers. Every process must then make the call, if only with empty tensors.
        average_gradients: with a group, multiply the gradient by the group's size, for DistributedDataParallel, which averages
            gradients; False for a reducer that sums them.

    Returns:
        0-d, float64 for float64 `losses`, else float32; sums are taken in float64. The value is the same on every process, the
        gradient that of the process's own losses. An exact zero, connected to the graph, if all weights are 0 or there are none.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, group.
    """
    for name, value in (("losses", losses), ("weights", weights)):
        _checks.check_tensor("score_weighted_mean", name, value)
        _checks.check_floating("score_weighted_mean", name, value)
    _checks.check_shape("score_weighted_mean", "weights", weights, losses.shape, "the shape of losses")
    _checks.check_device("score_weighted_mean", "weights", weights, losses, "losses")
    average_gradients = _checks.read_flag("score_weighted_mean", "average_gradients", average_gradients)
    group = distributed.resolve_group("score_weighted_mean", process_group)

    weights = weights.detach().double()
    own = torch.where(weights == 0, 0.0, losses.double() * weights).sum()
    total, weight = distributed.sum_over_group(torch.stack([own.detach(), weights.sum()]), group).unbind()
    weight = weight.clamp(min=SMALLEST_WEIGHT)
    scale = distributed.world_size(group) if average_gradients else 1
    # The value of the group with the gradient of this process: what is added is zero.
    mean = total / weight + (own - own.detach()) * (scale / weight)
    return mean.to(torch.promote_types(losses.dtype, torch.float32))
