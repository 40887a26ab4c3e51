"""GHMC and GHMR: the losses as modules with MMDetection's constructor and forward, and the state of their momentum."""
import math
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from rsloss_kernels import _checks, distributed
from rsloss_kernels._state import StatefulLoss, keeps_statistics, store, weighted
from rsloss_kernels.losses.focal.arguments import read_number
from rsloss_kernels.losses.ghm import api, arguments, op_checks, reference
from rsloss_kernels.losses.levels import LAYOUTS, Levelled, read_num_classes

REDUCTIONS = ("none", "mean")


class _GradientHarmonizing(distributed.HoldsGroup, StatefulLoss):
    """What both modules share. `mu` is None for GHM-C."""

    acc_sum: Tensor
    num_updates: Tensor
    mu: float | None = None
    background: str = "last"
    layout: str = "rows"
    num_classes: int | None = None

    def __init__(
        self,
        bins: int,
        momentum: float,
        loss_weight: float | Tensor,
        reduction: str,
        empty_bins: str,
        bias_correction: bool,
        process_group: object | None,
        average_gradients: bool,
    ):
        super().__init__()
        name = type(self).__name__
        arguments.check_options(name, bins, self.mu, momentum, empty_bins, self.background)
        _checks.check_choice(name, "reduction", reduction, REDUCTIONS)
        distributed.resolve_group(name, process_group)
        bias_correction = _checks.read_flag(name, "bias_correction", bias_correction)
        average_gradients = _checks.read_flag(name, "average_gradients", average_gradients)
        self.bins = int(bins)
        self.momentum = momentum
        self.loss_weight = loss_weight if isinstance(loss_weight, Tensor) else read_number(name, "loss_weight", loss_weight, least=None)
        self.reduction = reduction
        self.empty_bins = empty_bins
        self.bias_correction = bias_correction
        self.process_group = process_group
        self.average_gradients = average_gradients
        if momentum > 0:
            self.register_buffer("acc_sum", torch.zeros(bins, dtype=torch.float64))
            if bias_correction:
                self.register_buffer("num_updates", torch.zeros(bins, dtype=torch.int64))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # MMDetection's modules keep the edges of the bins as a buffer; here they follow from the number of bins.
        known = {name: value for name, value in state_dict.items() if name != f"{prefix}edges"}
        acc_sum, updates = known.get(f"{prefix}acc_sum"), f"{prefix}num_updates"
        if isinstance(acc_sum, Tensor) and updates not in known and hasattr(self, "num_updates"):
            # Trained without bias correction: what is not zero has long taken the scale of a batch, and is left as it is.
            known[updates] = (acc_sum != 0) * self._updates_without_bias()
        super()._load_from_state_dict(known, prefix, *args)

    def _updates_without_bias(self) -> int:
        """So many that `1 - momentum**updates` is exactly 1 in float64."""
        return math.ceil(40 / -math.log(self.momentum))

    @overload
    def forward(
        self,
        pred: Tensor,
        target: Levelled,
        label_weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        pred: Levelled,
        target: Levelled,
        label_weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | list[Tensor]: ...

    def forward(
        self,
        pred: Levelled,
        target: Levelled,
        label_weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | list[Tensor]:
        """The loss times `loss_weight`.

        Args:
            pred: GHMC: class logits, for class indices [..., C]; GHMR: box offsets. Any shape; float16, bfloat16, float32 or float64.
                GHMC takes levels of a head too, see `ghm_classification_loss`.
            target: the shape of `pred`, any real dtype (of an integral one a copy is made: float32 for GHMC, float64 for GHMR); for GHMC
                values within [0, 1] (integral one-hot too), or class indices, integers with the shape of `pred` less its last dimension:
                any label that is no foreground class, negative ones too, is background.
            label_weight: floating, integral or bool (both as a float16 copy), the shape of `pred`, for GHMC or that less its last
                dimension. Elements whose weight is above 0 count, all alike; None: all count.
            avg_factor: a number or a 0-d tensor; has no effect, as in MMDetection: the density normalises.
            reduction_override: "none" or "mean", in place of the module's `reduction`. Pass it by keyword: MMDetection's GHMC has it
                fourth, before `avg_factor`. Other keywords, which MMDetection's GHMC swallows, are a TypeError.

        Returns:
            0-d for "mean"; for "none" the shape and dtype of `pred` (a list for a list): the loss of each element times the weight of its
            bin, 0 where it is not valid. As published these weights are those of the mean times a normaliser: the number of valid
            elements for GHMC, the sum of `label_weight` for GHMR, at least 1 (with a process group, of all processes). Here gradients
            are never multiplied by the group's size.

        Raises TypeError, ValueError: wrong types, shapes, devices or ranges.
        """
        name = type(self).__name__
        reduction = self.reduction if reduction_override is None else reduction_override
        _checks.check_choice(name, "reduction_override", reduction, REDUCTIONS)
        _check_avg_factor(name, avg_factor)
        request = arguments.read_arguments(
            name,
            "pred",
            pred,
            target,
            label_weight,
            self.bins,
            self.mu,
            self.momentum,
            self.empty_bins,
            self.background,
            self.process_group,
            self.layout,
            self.num_classes,
        )
        state = arguments.read_state(request, getattr(self, "acc_sum", None), getattr(self, "num_updates", None))
        if reduction == "mean":
            loss, *new_state = api.evaluate(request, *state, self.average_gradients)
        else:
            losses, *new_state = self._elementwise(request, label_weight, state)
            losses = [weighted(level, self.loss_weight) for level in losses]
        if keeps_statistics(self):
            for buffer, value in zip(state, new_state, strict=True):
                if buffer is not None:
                    store(buffer, value)
        if reduction == "mean":
            return weighted(loss, self.loss_weight)
        return losses[0] if request.levels is None else request.levels.restore(losses)

    if TYPE_CHECKING:
        __call__ = forward

    def _elementwise(
        self, request: arguments.Request, label_weight: Levelled | None, state: tuple[Tensor | None, Tensor | None]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """One per level, in plain torch operations but for the weights of the bins."""
        histogram, is_agreed = api.read_histogram(request, self.average_gradients, self.bias_correction)
        _, acc_sum, num_updates, weights = api.finalize(request, histogram, *state)
        weights = weights * self._normaliser(request, histogram, label_weight).clamp(min=1)
        if is_agreed is not None:
            weights = torch.where(is_agreed, weights, torch.nan)
        valid: list[Tensor] | list[None] = request.weights or [None] * len(request.preds)
        levels = zip(request.preds, request.targets, valid, strict=True)
        return [self._losses_of_level(request, weights, *level) for level in levels], acc_sum, num_updates

    def _losses_of_level(
        self, request: arguments.Request, weights: Tensor, pred: Tensor, target: Tensor, valid: Tensor | None
    ) -> Tensor:
        is_valid = reference.valid_elements(pred, valid)
        dense = reference.as_dense(target, pred, request.is_background_first)
        # An element that does not count may hold NaN, which must reach neither the loss nor its gradient.
        values, dense = (torch.where(is_valid, value, 0.0) for value in (pred.double(), dense))
        of_bin = weights[reference.bin_of(values.detach(), dense, self.bins, self.mu)]
        losses = reference.element_losses(values, dense, self.mu) * torch.where(is_valid, of_bin, 0.0)
        return losses.to(pred.dtype)

    def _normaliser(self, request: arguments.Request, histogram: Tensor, label_weight: Any) -> Tensor:
        return histogram[0].sum()

    def extra_repr(self) -> str:
        names = ["bins", "momentum", "loss_weight", "reduction", "empty_bins", "bias_correction", "average_gradients"]
        options = {name: repr(getattr(self, name)) for name in names}
        if self.process_group is not None:
            options["process_group"] = distributed.describe_group(self.process_group)
        return ", ".join(f"{name}={value}" for name, value in options.items())


def _check_avg_factor(function: str, avg_factor: object) -> None:
    """It has no effect, but MMDetection's GHMC takes `reduction_override` in its place."""
    if not (avg_factor is None or _checks.is_number(avg_factor) or (isinstance(avg_factor, Tensor) and avg_factor.dim() == 0)):
        got = f"a Tensor of shape {list(avg_factor.shape)}" if isinstance(avg_factor, Tensor) else repr(avg_factor)
        raise TypeError(
            f"{function}: avg_factor must be None, a number or a 0-d Tensor (pass reduction_override by keyword), got {got}"
        )


class GHMC(_GradientHarmonizing):
    """`ghm_classification_loss` with the state of its momentum; a drop-in replacement for MMDetection's module of this name.

    `forward(pred, target, label_weight=None, avg_factor=None, reduction_override=None)`.

    Args:
        bins: of the gradient norm, 1..256.
        momentum: of the elements in each bin, within [0, 1).
        use_sigmoid: must be True, else NotImplementedError: there is no other form.
        loss_weight: factor of the loss, a number or a 0-d tensor.
        reduction: "mean" or "none" (see `forward`); "sum" is a ValueError, as published.
        background, layout, num_classes: as in `ghm_classification_loss`.
        empty_bins: "skip": as the authors' code, empty bins do not count and keep their state; "count": as the paper, all count and decay.
        bias_correction: divide the running counts by what the momentum has gathered so far, so that the first steps weigh like later
            ones.
        process_group: None: the density of this process. A group or "default" (all processes): that of all their elements.
        average_gradients: with a process group, multiply gradients by its size, for DistributedDataParallel, which averages them.

    Buffers, with a momentum above 0: `acc_sum` (float64, whatever the module is cast to) and, with bias correction, `num_updates`
    (int64). They change only in training mode with gradients enabled, and not where the loss is not finite or nothing is valid. A
    forward without that uses the density it would have stored. A checkpoint of MMDetection's module, or of this one without bias
    correction, loads: what its `acc_sum` has gathered is then not corrected.
    """

    def __init__(
        self,
        bins: int = 10,
        momentum: float = 0.0,
        use_sigmoid: bool = True,
        loss_weight: float | Tensor = 1.0,
        reduction: str = "mean",
        *,
        background: str = "last",
        empty_bins: str = "skip",
        bias_correction: bool = False,
        process_group: object | None = None,
        average_gradients: bool = True,
        layout: str = "rows",
        num_classes: int | None = None,
    ):
        self.background, self.layout, self.num_classes = background, layout, read_num_classes("GHMC", num_classes)
        _checks.check_choice("GHMC", "layout", layout, LAYOUTS)
        super().__init__(
            bins, momentum, loss_weight, reduction, empty_bins, bias_correction, process_group, average_gradients
        )
        use_sigmoid = _checks.read_flag("GHMC", "use_sigmoid", use_sigmoid)
        if not use_sigmoid:
            raise NotImplementedError("GHMC: use_sigmoid must be True (a softmax form was never published), got False")
        self.use_sigmoid = use_sigmoid

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, background={self.background!r}, layout={self.layout!r}, num_classes={self.num_classes}"


class GHMR(_GradientHarmonizing):
    """`ghm_regression_loss` with the state of its momentum; a drop-in replacement for MMDetection's module of this name.

    `forward(pred, target, label_weight=None, avg_factor=None, reduction_override=None)`. Buffers and checkpoints as in `GHMC`.

    Args:
        mu: where the loss turns from square to linear, in the units of `pred`, within [1e-30, 1e30].
        bins: of the gradient norm, 1..256.
        momentum: of the elements in each bin, within [0, 1).
        loss_weight: factor of the loss, a number or a 0-d tensor.
        reduction: "mean" or "none" (see `forward`); "sum" is a ValueError, as published.
        empty_bins: "skip": empty bins do not count and keep their state; "count": all count and decay.
        bias_correction: divide the running counts by what the momentum has gathered so far.
        process_group: None: the density of this process. A group or "default" (all processes): that of all their elements.
        average_gradients: with a process group, multiply gradients by its size.
    """

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0.0,
        loss_weight: float | Tensor = 1.0,
        reduction: str = "mean",
        *,
        empty_bins: str = "skip",
        bias_correction: bool = False,
        process_group: object | None = None,
        average_gradients: bool = True,
    ):
        op_checks.check_mu("GHMR", mu)
        self.mu = float(mu)
        super().__init__(
            bins, momentum, loss_weight, reduction, empty_bins, bias_correction, process_group, average_gradients
        )

    def _normaliser(self, request: arguments.Request, histogram: Tensor, label_weight: Any) -> Tensor:
        # A weight of NaN is not valid, and leaves no trace.
        own = histogram.new_full((), request.preds[0].numel()) if label_weight is None else label_weight.double().nansum()
        return distributed.sum_over_group(own, request.group)

    def extra_repr(self) -> str:
        return f"mu={self.mu!r}, {super().extra_repr()}"
