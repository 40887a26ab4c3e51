"""EqualizedFocalLoss, EqualizedQualityFocalLoss and EQLv2Loss: the losses as modules that keep the gradients of each class."""
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from rsloss_kernels import _checks, distributed
from rsloss_kernels._state import StatefulLoss, keeps_statistics, store
from rsloss_kernels.losses.equalized_focal import api
from rsloss_kernels.losses.focal import arguments
from rsloss_kernels.losses.focal.op import Modulator
from rsloss_kernels.losses.levels import LAYOUTS, Levelled


class _GradientBalance(distributed.HoldsGroup, StatefulLoss):
    """The state that the losses share: sums over all steps of how strongly each class's positives and negatives pulled."""

    pos_grad: Tensor
    neg_grad: Tensor
    pos_neg: Tensor
    initial_ratio = 1.0
    _options: tuple[str, ...] = ()

    def __init__(self, num_classes: int, loss_weight: float, process_group: object | None):
        super().__init__()
        name = type(self).__name__
        num_classes = _checks.read_count(name, "num_classes", num_classes)
        distributed.resolve_group(name, process_group)
        self.num_classes = num_classes
        self.loss_weight = arguments.read_number(name, "loss_weight", loss_weight, least=None)
        self.process_group = process_group
        self.register_buffer("pos_grad", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("neg_grad", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("pos_neg", torch.full((num_classes,), self.initial_ratio, dtype=torch.float64))

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
        for name in ("pos_grad", "neg_grad", "pos_neg"):
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor) and value.shape != (self.num_classes,):
                error_msgs.append(
                    f"{type(self).__name__}: {name} of the checkpoint must have shape [{self.num_classes}], one number per foreground class, "
                    f"got {list(value.shape)}. num_classes counts the foreground classes alone, not the background"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _accumulate(self, loss: Tensor, sums: Tensor) -> None:
        """Adds the sums [2, C] of all processes, once per step; leaves the state as it is where anything of theirs is not finite."""
        if not keeps_statistics(self):
            return
        group = None if self.process_group is None else distributed.resolve_group(type(self).__name__, self.process_group)
        loss = loss.detach()
        if group is not None:
            packed = distributed.sum_over_group(torch.cat([sums.flatten(), loss.double()[None]]), group)
            sums, loss = packed[:-1].view(2, self.num_classes), packed[-1]
        is_kept = _are_finite(loss, sums)
        if is_kept is False:
            return
        pos_grad, neg_grad, pos_neg = self.pos_grad, self.neg_grad, self.pos_neg
        added_pos, added_neg = (sums if is_kept is True else torch.where(is_kept, sums, 0.0)).unbind()
        pos_grad.add_(added_pos)
        neg_grad.add_(added_neg)
        ratio = self._ratio(pos_grad, neg_grad)
        store(pos_neg, ratio if is_kept is True else torch.where(is_kept, ratio, pos_neg))

    def _ratio(self, pos_grad: Tensor, neg_grad: Tensor) -> Tensor:
        return pos_grad / (neg_grad + 1e-10)

    def extra_repr(self) -> str:
        options = {name: repr(getattr(self, name)) for name in self._options}
        if self.process_group != "default":
            options["process_group"] = distributed.describe_group(self.process_group)
        return ", ".join(f"{name}={value}" for name, value in options.items())


def _are_finite(loss: Tensor, sums: Tensor) -> bool | Tensor:
    """Read on the host where it need not wait; on a GPU, in a traced graph and of tensors without numbers 0-d."""
    # Infinities and NaN survive in a sum, which finite gradients do not overflow.
    if sums.is_cpu and type(sums) is Tensor and not torch.compiler.is_compiling():
        return math.isfinite(float(sums.sum()) + float(loss))
    return (sums.sum() + loss).isfinite()


class _EqualizedFocus(_GradientBalance):
    """What both forms of the equalized focal loss share."""

    modulator: Modulator
    alpha = -1.0

    def __init__(
        self,
        num_classes: int,
        gamma: float,
        scale_factor: float,
        loss_weight: float,
        process_group: object | None,
        weighting_factor: bool,
        reduction: str,
        background: str,
        ignore_index: int | None,
        layout: str,
    ):
        name = type(self).__name__
        super().__init__(num_classes, loss_weight, process_group)
        weighting_factor = api.check_focus(name, gamma, self.alpha, scale_factor, weighting_factor)
        _checks.check_choice(name, "reduction", reduction, arguments.REDUCTIONS)
        _checks.check_choice(name, "background", background, ("last", "first"))
        _checks.check_choice(name, "layout", layout, LAYOUTS)
        self.gamma = float(gamma)
        self.scale_factor = float(scale_factor)
        self.weighting_factor = weighting_factor
        self.reduction = reduction
        self.background = background
        self.ignore_index = arguments.read_ignore_index(name, ignore_index)
        self.layout = layout

    _options = ("num_classes", "gamma", "scale_factor", "loss_weight", "weighting_factor", "reduction", "background", "ignore_index", "layout")

    def _ratio(self, pos_grad: Tensor, neg_grad: Tensor) -> Tensor:
        return super()._ratio(pos_grad, neg_grad).clamp(0, 1)

    def _evaluate(
        self,
        logits: Levelled,
        labels: Levelled,
        quality: Levelled | None,
        weight: Levelled | None,
        avg_factor: float | Tensor | None,
        reduction_override: str | None,
    ) -> Tensor | list[Tensor]:
        name = type(self).__name__
        reduction = self.reduction if reduction_override is None else reduction_override
        _checks.check_choice(name, "reduction_override", reduction, arguments.REDUCTIONS)
        if avg_factor is not None and reduction != "mean":
            raise ValueError(f"{name}: avg_factor must be None with reduction {reduction!r}: only 'mean' divides")
        request = api.read_equalized_focal(
            name, logits, labels, quality, self.pos_neg, self.gamma, self.alpha, self.scale_factor, self.weighting_factor,
            self.modulator, weight, reduction, avg_factor, self.background, self.ignore_index, self.layout, self.loss_weight,
        )  # fmt: skip
        if reduction != "none":
            loss, sums = api.loss_and_sums(request)
            self._accumulate(loss, sums)
            return loss
        losses = request.reduce("none")
        if keeps_statistics(self):
            with torch.no_grad():
                loss, sums = api.loss_and_sums(request)
            self._accumulate(loss, sums)
        return losses


class EqualizedFocalLoss(_EqualizedFocus):
    """`equalized_focal_loss` with its state; for the class that the paper's authors published, without hooks on the model.

    Args:
        num_classes: C, the foreground classes alone, one channel each (the published class counts the background too: one less here).
        gamma, alpha, scale_factor, weighting_factor: see `equalized_focal_loss`.
        loss_weight: factor of the loss.
        process_group: "default" (all processes if torch.distributed is initialised), a group, or None: no communication. The state is that
            of all processes, in one collective per step; every process must call, with the same number of classes.
        reduction: "mean" (divides by `avg_factor`, by 1 without it, as published), "sum" or "none".
        background: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C, as the published class).
        ignore_index: one more label that drops its row; negative ones always do.
        layout: "rows", "anchor_major" or "class_major", see `equalized_focal_loss`.

    Buffers, float64 [C] whatever the module is cast to: `pos_grad` and `neg_grad`, at first 0, the sums over all steps of the size of the
    gradients of each class's positives and negatives, of the returned loss (`loss_weight`, `alpha`, weights and `avg_factor` included, the
    upstream gradient not, nor any scale of AMP), and `pos_neg`, at first 1, their ratio within [0, 1]. They are taken in forward, in
    training mode with gradients enabled only, and used from the next step on. A step whose loss or sums are not finite, on any process,
    leaves them. Call it once per step, with all levels as a list, and not within activation checkpointing, whose second forward would see
    the next state. Checkpoints of the published class load.
    """

    modulator = Modulator.FOCAL

    def __init__(
        self,
        num_classes: int,
        gamma: float = 2.0,
        alpha: float = 0.25,
        scale_factor: float = 8.0,
        loss_weight: float = 1.0,
        process_group: object | None = "default",
        *,
        weighting_factor: bool = True,
        reduction: str = "mean",
        background: str = "last",
        ignore_index: int | None = None,
        layout: str = "rows",
    ):
        self.alpha = arguments.read_number(type(self).__name__, "alpha", alpha, least=None)
        options = (weighting_factor, reduction, background, ignore_index, layout)
        super().__init__(num_classes, gamma, scale_factor, loss_weight, process_group, *options)

    @overload
    def forward(
        self,
        pred: Tensor,
        target: Levelled,
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        pred: Levelled,
        target: Levelled,
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | list[Tensor]: ...

    def forward(
        self,
        pred: Levelled,
        target: Levelled,
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | list[Tensor]:
        """The loss times `loss_weight`, and the state of the next step.

        Args:
            pred, target, weight: `logits`, `labels` and `weight` of `equalized_focal_loss`.
            avg_factor: a number or a Tensor of one number; divides in "mean", an error in other reductions.
            reduction_override: in place of the module's `reduction`.

        Returns: 0-d; for "none" the loss of each element in the shapes of the logits, 0 where a row was dropped.
        """
        return self._evaluate(pred, target, None, weight, avg_factor, reduction_override)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha!r}"


class EqualizedQualityFocalLoss(_EqualizedFocus):
    """`equalized_quality_focal_loss` with its state. Arguments and buffers as in `EqualizedFocalLoss`; there is no alpha."""

    modulator = Modulator.QUALITY

    def __init__(
        self,
        num_classes: int,
        gamma: float = 2.0,
        scale_factor: float = 8.0,
        loss_weight: float = 1.0,
        process_group: object | None = "default",
        *,
        weighting_factor: bool = True,
        reduction: str = "mean",
        background: str = "last",
        ignore_index: int | None = None,
        layout: str = "rows",
    ):
        options = (weighting_factor, reduction, background, ignore_index, layout)
        super().__init__(num_classes, gamma, scale_factor, loss_weight, process_group, *options)

    @overload
    def forward(
        self,
        pred: Tensor,
        target: tuple[Levelled, Levelled],
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        pred: Levelled,
        target: tuple[Levelled, Levelled],
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | list[Tensor]: ...

    def forward(
        self,
        pred: Levelled,
        target: tuple[Levelled, Levelled],
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | list[Tensor]:
        """As `EqualizedFocalLoss.forward`; `target` is `(labels, quality)`, as MMDetection's quality focal loss has it."""
        if not isinstance(target, (tuple, list)) or len(target) != 2:
            raise TypeError(f"{type(self).__name__}: target must be a tuple (labels, quality), got {type(target).__name__}")
        return self._evaluate(pred, *target, weight, avg_factor, reduction_override)

    if TYPE_CHECKING:
        __call__ = forward


class EQLv2Loss(_GradientBalance):
    """`eqlv2_loss` with its state; `num_classes` and forward as in MMDetection's class, whose checkpoints load.

    Args:
        num_classes: C, the foreground classes alone; logits have C + 1 channels, the background last.
        gamma, mu, alpha, focal_gamma: see `eqlv2_loss`.
        loss_weight: factor of the loss; the state is without it, as published.
        process_group: "default" (all processes if torch.distributed is initialised), a group, or None: no communication. The state is that
            of all processes, in one collective per step; every process must call, with the same number of classes.
        test_with_obj: whether `get_activation` multiplies by the probability of not being background.
        use_sigmoid: must be True, else NotImplementedError.

    Buffers, float64 [C] whatever the module is cast to: `pos_grad`, `neg_grad` and `pos_neg`, at first 100, which is plain cross entropy.
    They change in training mode with gradients enabled only (published: in evaluation too), and not in a step whose loss or sums are not
    finite on any process.
    """

    initial_ratio = 100.0
    custom_cls_channels = True
    _options = ("num_classes", "gamma", "mu", "alpha", "focal_gamma", "loss_weight", "test_with_obj")

    def __init__(
        self,
        num_classes: int,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        loss_weight: float = 1.0,
        process_group: object | None = "default",
        *,
        focal_gamma: float = 0.0,
        test_with_obj: bool = True,
        use_sigmoid: bool = True,
    ):
        super().__init__(num_classes, loss_weight, process_group)
        api.check_equalization("EQLv2Loss", gamma, mu, alpha, focal_gamma)
        test_with_obj = _checks.read_flag("EQLv2Loss", "test_with_obj", test_with_obj)
        use_sigmoid = _checks.read_flag("EQLv2Loss", "use_sigmoid", use_sigmoid)
        if not use_sigmoid:
            raise NotImplementedError("EQLv2Loss: use_sigmoid must be True (there is no softmax form), got False")
        self.gamma, self.mu, self.alpha, self.focal_gamma = float(gamma), float(mu), float(alpha), float(focal_gamma)
        self.test_with_obj = test_with_obj
        self.use_sigmoid = use_sigmoid

    def forward(
        self,
        cls_score: Tensor | Sequence[Tensor],
        label: Tensor | Sequence[Tensor],
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss times `loss_weight`, 0-d, and the state of the next step.

        Args:
            cls_score, label: `logits` and `labels` of `eqlv2_loss`.
            weight, avg_factor, reduction_override: have no effect, as published: the loss is the mean over the rows.
        """
        settings = (self.gamma, self.mu, self.alpha, self.focal_gamma, self.loss_weight)
        loss, sums = api.eqlv2_loss_and_sums(api.read_eqlv2("EQLv2Loss", cls_score, label, self.pos_neg, *settings))
        self._accumulate(loss, sums)
        return loss

    if TYPE_CHECKING:
        __call__ = forward

    def get_cls_channels(self, num_classes: int) -> int:
        """Channels of a classifier for `num_classes` foreground classes."""
        return num_classes + 1

    get_channel_num = get_cls_channels

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores [..., C + 1] for inference: sigmoids, those of the foreground times one minus that of the background."""
        api.check_background_column("EQLv2Loss.get_activation", cls_score, self.num_classes)
        scores = cls_score.sigmoid()
        if not self.test_with_obj:
            return scores
        return torch.cat([scores[..., :-1] * (1 - scores[..., -1:]), scores[..., -1:]], -1)
