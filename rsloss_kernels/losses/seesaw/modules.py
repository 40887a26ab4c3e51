"""SeesawLoss: the loss as a module that counts the samples of each class, with the call signatures of MMDetection."""
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rsloss_kernels import _checks, distributed
from rsloss_kernels._state import StatefulLoss, keeps_statistics, store, weighted
from rsloss_kernels.losses.focal.arguments import REDUCTIONS, read_number
from rsloss_kernels.losses.focal.modules import EPS
from rsloss_kernels.losses.seesaw import api

if TYPE_CHECKING:
    import torch.distributed as dist


class SeesawLoss(distributed.HoldsGroup, StatefulLoss):
    """`seesaw_loss` with its state; constructor and forward take the keywords of MMDetection's class, whose checkpoints load.

    Args:
        num_classes: C, the foreground classes alone; logits have C + 2 columns.
        p, q, eps: see `seesaw_loss`.
        loss_weight: factor of both losses.
        reduction: "mean", "sum" or "none", see `seesaw_loss`.
        return_dict: whether forward returns the two losses apart, else their sum.
        process_group: None (no communication: each process counts its own samples, as published), "default" (all processes if
            torch.distributed is initialised) or a group, whose samples are counted together: one collective for the counts, before the
            loss, and one number after it, whether the losses of all processes are finite.
        use_sigmoid: must be False, else NotImplementedError.

    Buffer `cum_samples`, float64 [C + 1] whatever the module is cast to, at first 0: the rows of each class and of the background, weights
    aside. A forward in training mode with gradients enabled adds its own before the loss (published: in evaluation mode too); where a loss
    is not finite on any process, they are taken back (published: they stay). Not for use within activation checkpointing, whose second
    forward would count again.
    """

    custom_cls_channels = True
    custom_activation = True
    custom_accuracy = True

    cum_samples: Tensor

    def __init__(
        self,
        num_classes: int,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 1e-2,
        loss_weight: float = 1.0,
        *,
        reduction: str = "mean",
        return_dict: bool = True,
        process_group: object | None = None,
        use_sigmoid: bool = False,
    ):
        super().__init__()
        name = type(self).__name__
        self.num_classes = _checks.read_count(name, "num_classes", num_classes)
        return_dict = _checks.read_flag(name, "return_dict", return_dict)
        use_sigmoid = _checks.read_flag(name, "use_sigmoid", use_sigmoid)
        if use_sigmoid:
            raise NotImplementedError(f"{name}: use_sigmoid must be False (there is no sigmoid form), got True")
        _checks.check_choice(name, "reduction", reduction, REDUCTIONS)
        distributed.resolve_group(name, process_group)
        self.p, self.q, self.eps = (read_number(name, key, value) for key, value in (("p", p), ("q", q), ("eps", eps)))
        self.loss_weight = read_number(name, "loss_weight", loss_weight, least=None)
        self.reduction = reduction
        self.return_dict = return_dict
        self.process_group = process_group
        self.use_sigmoid = use_sigmoid
        self.register_buffer("cum_samples", torch.zeros(self.num_classes + 1, dtype=torch.float64))

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
        value = state_dict.get(f"{prefix}cum_samples")
        if isinstance(value, Tensor) and value.shape != self.cum_samples.shape:
            error_msgs.append(
                f"{type(self).__name__}: cum_samples of the checkpoint must have shape [{self.num_classes + 1}], a number per foreground "
                f"class and one for the background, got {list(value.shape)}"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def forward(
        self,
        cls_score: Tensor,
        labels: Tensor,
        label_weights: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """The losses times `loss_weight`, and the counts of the next step.

        Args:
            cls_score, labels, label_weights: `logits`, `labels` and `weight` of `seesaw_loss`.
            avg_factor: a number or a Tensor of one number. "mean" divides by it plus float32's epsilon, as in MMDetection; "none" does
                not look at it; an error for "sum".
            reduction_override: in place of the module's `reduction`.

        Returns: {"loss_cls_objectness", "loss_cls_classes"}, or their sum without `return_dict`.
        """
        name = type(self).__name__
        reduction = self.reduction if reduction_override is None else reduction_override
        _checks.check_choice(name, "reduction_override", reduction, REDUCTIONS)
        cls_score, labels = api.read_rows(name, "cls_score", cls_score, labels, self.num_classes)
        counts = self.cum_samples
        if keeps_statistics(self):
            counts = counts + self._count(labels)
        settings = (self.p, self.q, self.eps, reduction, None if reduction == "none" else avg_factor, EPS)
        losses = api.evaluate(name, cls_score, labels, counts, label_weights, *settings)
        if counts is not self.cum_samples:
            are_finite = self._are_finite(losses)
            if isinstance(are_finite, Tensor):
                counts = torch.where(are_finite, counts, self.cum_samples)
            if are_finite is not False:
                store(self.cum_samples, counts)
        objectness, classes = (weighted(value, self.loss_weight) for value in losses)
        if not self.return_dict:
            return objectness + classes
        return {"loss_cls_objectness": objectness, "loss_cls_classes": classes}

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def _count(self, labels: Tensor) -> Tensor:
        """Rows of each class and of the background in all processes, float64 [C + 1]; without reading anything on the host."""
        # Whole numbers, so that the order in which they are added does not matter. Ignored rows go in front of the classes.
        places = labels.clamp(-1, self.num_classes) + 1
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = torch.bincount(places, minlength=self.num_classes + 2)
        else:
            counts = torch.zeros(self.num_classes + 2, dtype=torch.int64, device=labels.device)
            counts = counts.index_add(0, places.long(), torch.ones_like(places, dtype=torch.int64))
        return distributed.sum_over_group(counts[1:].double(), self._group())

    @torch.no_grad()
    def _are_finite(self, losses: tuple[Tensor, Tensor]) -> bool | Tensor:
        """Those of all processes. Read on the host where it need not wait; on a GPU, in a traced graph and of tensors without numbers 0-d."""
        group = self._group()
        if group is None:
            first = losses[0]
            if first.dim() == 0 and first.is_cpu and type(first) is Tensor and not torch.compiler.is_compiling():
                return all(math.isfinite(loss.item()) for loss in losses)
            return torch.stack(losses).isfinite().all()
        # A collective of its own: it asks for the losses, which need the counts of the first. Infinities and NaN survive in a sum, in which
        # finite numbers may overflow, but those of float32 not as float64.
        total = torch.stack(losses).sum(dtype=torch.float64)
        return distributed.sum_over_group(total, group).isfinite()

    def _group(self) -> "dist.ProcessGroup | None":
        return None if self.process_group is None else distributed.resolve_group(type(self).__name__, self.process_group)

    def get_cls_channels(self, num_classes: int) -> int:
        """Channels of the classifier for `num_classes` classes, which must be C."""
        if num_classes != self.num_classes:
            raise ValueError(f"{type(self).__name__}: num_classes must be {self.num_classes}, as the module was made, got {num_classes}")
        return num_classes + 2

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores [..., C + 1] for inference: the softmax of the classes times the probability of foreground, then that of background."""
        api.check_columns(f"{type(self).__name__}.get_activation", "cls_score", cls_score, self.num_classes)
        objectness = cls_score[..., -2:].softmax(-1)
        return torch.cat([cls_score[..., :-2].softmax(-1) * objectness[..., :1], objectness[..., 1:]], -1)

    @torch.no_grad()
    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Per cent, shape [1]: rows told rightly from background, foreground rows whose class has the largest logit; 0 without such
        rows. Rows with a negative label do not count."""
        cls_score, labels = api.read_rows(f"{type(self).__name__}.get_accuracy", "cls_score", cls_score, labels, self.num_classes)
        is_used = labels >= 0
        is_foreground = is_used & (labels < self.num_classes)
        is_told = (cls_score[:, -2] >= cls_score[:, -1]) == is_foreground
        is_found = cls_score[:, :-2].argmax(-1) == labels

        def per_cent(right: Tensor, among: Tensor) -> Tensor:
            return (100.0 * (right & among).sum() / among.sum().clamp(min=1))[None]

        return {"acc_objectness": per_cent(is_told, is_used), "acc_classes": per_cent(is_found, is_foreground)}

    def extra_repr(self) -> str:
        names = ("num_classes", "p", "q", "eps", "loss_weight", "reduction", "return_dict")
        options = {name: repr(getattr(self, name)) for name in names}
        if self.process_group is not None:
            options["process_group"] = distributed.describe_group(self.process_group)
        return ", ".join(f"{name}={value}" for name, value in options.items())
