"""GroupSoftmaxLoss with the call signatures of MMDetection, and the conversion of an ordinary classifier."""
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels._state import StatefulLoss, weighted
from rsloss_kernels.losses.focal.arguments import REDUCTIONS, read_number
from rsloss_kernels.losses.group_softmax import api
from rsloss_kernels.losses.group_softmax.groups import ClassGroups


class GroupSoftmaxLoss(StatefulLoss):
    """`group_softmax_loss` as a module: the loss of a detector's classification head.

    Where MMDetection (3) asks a loss, the head learns from it how many channels its classifier has, what the scores are, and the
    accuracy; MMDetection numbers the background last, so give `background="last"` there.

    Args:
        groups: ClassGroups; becomes a submodule, so that it moves with the model and is in its checkpoints.
        others_ratio: kept "others" per foreground row of a group, at least 0; None or infinity: all.
        loss_weight: factor of the loss.
        background: "first" (0 background, classes 1..C) or "last" (classes 0..C-1, C background).
        class_weights: [C], floating; factors of the weights of foreground rows in the group of their class. A buffer outside of the
            checkpoints, which keeps its dtype whatever the model is cast to.
        generator: of the random numbers of the sampling; None: PyTorch's own (inside torch.compile always). Its state is in no state_dict:
            to resume bit by bit save `generator.get_state()`.

    Raises TypeError, ValueError: wrong types or ranges.
    """

    class_weights: Tensor | None
    custom_cls_channels = True
    custom_activation = True
    custom_accuracy = True
    use_sigmoid = False

    def __init__(
        self,
        groups: ClassGroups,
        others_ratio: float | None = 8.0,
        loss_weight: float = 1.0,
        *,
        background: str = "first",
        class_weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if not isinstance(groups, ClassGroups):
            raise TypeError(f"{name}: groups must be ClassGroups, got {type(groups).__name__}")
        api.read_others_ratio(name, others_ratio)
        _checks.check_choice(name, "background", background, ("last", "first"))
        api.check_generator(name, generator)
        if class_weights is not None:
            _checks.check_tensor(name, "class_weights", class_weights)
            _checks.check_floating(name, "class_weights", class_weights)
            _checks.check_shape(name, "class_weights", class_weights, (groups.num_classes,), "a weight per class")
        self.groups = groups
        self.others_ratio = others_ratio
        self.loss_weight = read_number(name, "loss_weight", loss_weight, least=None)
        self.background = background
        self.generator = generator
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The sum of the groups' losses times `loss_weight`.

        Args:
            cls_score: [N, K], logits of a classifier of `groups.num_logits` channels.
            label: [N], class indices; negative: ignored.
            weight: [N], real: rows whose weight is not above 0 are ignored. How large it is does not matter: as published, the
                sampling alone weighs.
            avg_factor: a number or a Tensor of one number; has no effect, as published: each group divides by its own weights.
            reduction_override: "none": [G] losses of the groups, times `loss_weight`; None, "mean", "sum": their sum, 0-d.

        Raises TypeError, ValueError: wrong types, shapes, devices or ranges.
        """
        name = type(self).__name__
        if reduction_override is not None:
            _checks.check_choice(name, "reduction_override", reduction_override, REDUCTIONS)
        if not (avg_factor is None or _checks.is_number(avg_factor) or (isinstance(avg_factor, Tensor) and avg_factor.numel() == 1)):
            got = f"shape {list(avg_factor.shape)}" if isinstance(avg_factor, Tensor) else type(avg_factor).__name__
            raise TypeError(f"{name}: avg_factor must be None, a number or a Tensor of one number, got {got}")
        if weight is not None:
            label = self._without_weightless(label, weight)
        losses = api.group_softmax_loss(
            cls_score,
            label,
            self.groups,
            others_ratio=self.others_ratio,
            generator=self.generator,
            background=self.background,
            class_weights=self.class_weights,
        )
        return weighted(losses if reduction_override == "none" else losses.sum(), self.loss_weight)

    if TYPE_CHECKING:
        __call__ = forward

    def _without_weightless(self, label: Tensor, weight: Tensor) -> Tensor:
        name = type(self).__name__
        _checks.check_tensor(name, "label", label)
        _checks.check_tensor(name, "weight", weight)
        if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise TypeError(f"{name}: label must be class indices, integers, got {label.dtype}")
        _checks.check_device(name, "weight", weight, label, "label")
        _checks.check_shape(name, "weight", weight, label.shape, "the shape of label")
        if weight.dtype.is_complex:
            raise TypeError(f"{name}: weight must be real, got {weight.dtype}")
        return torch.where(weight > 0, _checks.as_labels(name, label, "label"), -1)

    def get_cls_channels(self, num_classes: int) -> int:
        """Channels of the classifier for `num_classes` classes, which must be C, without the background."""
        if num_classes != self.groups.num_classes:
            raise ValueError(
                f"{type(self).__name__}: num_classes must be {self.groups.num_classes}, the classes of its groups without the "
                f"background, got {num_classes}"
            )
        return self.groups.num_logits

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """[N, K] logits -> [N, C + 1] scores, see `group_softmax_scores`."""
        return api.group_softmax_scores(cls_score, self.groups, background=self.background)

    @torch.no_grad()
    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Per cent, shape [1]: rows told rightly from the background, and foreground rows whose class has the highest score.

        0 without such rows, as in MMDetection. Rows with a negative label do not count.
        """
        scores = self.get_activation(cls_score)
        labels = _checks.as_labels(type(self).__name__, labels, "labels")
        is_first = self.background == "first"
        background = scores[:, 0] if is_first else scores[:, -1]
        of_classes = scores[:, 1:] if is_first else scores[:, :-1]
        classes = labels.long() - int(is_first)
        is_used = labels >= 0
        is_foreground = is_used & (classes >= 0) & (classes < self.groups.num_classes)
        is_told = (background < 0.5) == is_foreground
        is_found = of_classes.argmax(-1) == classes if self.groups.num_classes else torch.zeros_like(is_used)

        def per_cent(right: Tensor, among: Tensor) -> Tensor:
            return (100.0 * (right & among).sum() / among.sum().clamp(min=1))[None]

        return {"acc_objectness": per_cent(is_told, is_used), "acc_classes": per_cent(is_found, is_foreground)}

    def extra_repr(self) -> str:
        return f"others_ratio={self.others_ratio}, loss_weight={self.loss_weight}, background={self.background!r}"


@torch.no_grad()
def convert_classifier(
    weight: Tensor, bias: Tensor | None, groups: ClassGroups, *, background: str = "first"
) -> tuple[Tensor, Tensor]:
    """Weights of a grouped classifier from those of an ordinary one with C + 1 channels, as a start for fine-tuning.

    Classes and the background keep theirs. In a plain softmax, what stands against the classes of one group is the log of the sum of
    the exponentials of all other logits, which no linear layer can compute; nearly all rows are background, where that sum is about
    the background's logit alone: so "others" of the groups of classes start as the background. What stands against the background is
    the same of the C classes, for which nothing is known: the mean of their weights, and log C added to the mean of their biases, which
    is that sum to first order around equal logits. With the one logit of the "sigmoid" form this is subtracted from the background's.

    Args:
        weight: [C + 1, ...], of a linear layer or a convolution; floating.
        bias: [C + 1] or None for zeros.
        groups: ClassGroups of C classes.
        background: where it lies in `weight` and `bias`, "first" or "last".

    Returns:
        (weight [K, ...], bias [K]) with K = `groups.num_logits`: new tensors, dtype and device of `weight`, detached.

    Raises TypeError, ValueError: wrong types or shapes.
    """
    function = "convert_classifier"
    if not isinstance(groups, ClassGroups):
        raise TypeError(f"{function}: groups must be ClassGroups, got {type(groups).__name__}")
    _checks.check_tensor(function, "weight", weight)
    _checks.check_floating(function, "weight", weight)
    _checks.check_choice(function, "background", background, ("last", "first"))
    channels = groups.num_classes + 1
    if weight.dim() < 2 or weight.shape[0] != channels:
        raise ValueError(
            f"{function}: weight must have shape [{channels}, ...], the {groups.num_classes} classes and the background "
            f"({background}), got {list(weight.shape)}"
        )
    if bias is None:
        bias = weight.new_zeros(channels)
    _checks.check_tensor(function, "bias", bias)
    _checks.check_floating(function, "bias", bias)
    _checks.check_device(function, "bias", bias, weight, "weight")
    _checks.check_shape(function, "bias", bias, (channels,), "a number per channel of weight")
    if background == "first":
        weight, bias = weight.roll(-1, 0), bias.roll(-1)
    return _convert(weight, 0.0, groups), _convert(bias, math.log(max(groups.num_classes, 1)), groups)


def _convert(source: Tensor, gain: float, groups: ClassGroups) -> Tensor:
    """[C + 1, ...], the background last, -> [K, ...]; `gain` is added to the mean of the classes."""
    of_background = source[-1].double()
    of_classes = source[:-1].double()
    of_foreground = (of_classes.mean(0) if len(of_classes) else torch.zeros_like(of_background)) + gain
    result = source.new_empty((groups.num_logits, *source.shape[1:]))
    result[groups.tables[0].to(source.device).long()] = source
    for group, column in enumerate(groups.others):
        if column != -1:
            is_background = group == groups.background_group
            result[column] = (of_foreground if is_background else of_background).to(source.dtype)
        else:
            result[groups.column_of(groups.num_classes)] = (of_background - of_foreground).to(source.dtype)
    return result
