"""Every public name with the types that a user sees. mypy --strict reads this (`make lint`), test_types.py runs it.

`assert_type` is for mypy; `returns` says the same of the object. Where a module's constructor decides what it returns, the type holds both.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import assert_type

import rsloss_kernels as rk

CALLS: list[Callable[[], None]] = []


def runs(call: Callable[[], None]) -> Callable[[], None]:
    CALLS.append(call)
    return call


def returns(value: object, wanted: type, entries: type | None = None) -> None:
    if not isinstance(value, wanted):
        raise AssertionError(f"wanted {wanted.__name__}, got {type(value).__name__}")
    if entries is not None and isinstance(value, (list, tuple)):
        for entry in value:
            returns(entry, entries)


X, Y = torch.linspace(-2, 2, 12).view(4, 3).requires_grad_(), torch.tensor([0, 3, 2, -1])
DENSE, QUALITY = torch.eye(4, 3), torch.full((4,), 0.5)
LEVELS, LABELS = [X, X[:2]], [Y, Y[:2]]
BOXES, OFFSETS = torch.ones(4, 4), torch.zeros(4, 4)


@runs
def ranking() -> None:
    losses = rk.rank_sort_loss(X, Y, QUALITY, delta=0.5, segments=2)
    assert_type(losses, rk.RankSortLosses)
    assert_type(losses.ranking, Tensor)
    returns(losses, rk.RankSortLosses, Tensor)
    of_levels = assert_type(rk.RankSortLoss(loss_weight=2.0)(LEVELS, LABELS), rk.RankSortLosses)
    returns(of_levels, rk.RankSortLosses, Tensor)
    returns(assert_type(rk.average_precision_loss(X, DENSE, interpolated=False), Tensor), Tensor)
    returns(assert_type(rk.APLoss()(X, Y, segments=torch.zeros(4, dtype=torch.int64), num_segments=1), Tensor), Tensor)
    alrp = assert_type(rk.alrp_loss(X, Y, QUALITY), rk.ALRPLosses)
    returns(alrp, rk.ALRPLosses, Tensor)
    returns(assert_type(rk.alrp_regression_loss(QUALITY, alrp.rank, alrp.order), Tensor), Tensor)
    returns(assert_type(rk.ALRPLoss(process_group="default")(X, Y, QUALITY), rk.ALRPLosses), rk.ALRPLosses, Tensor)


@runs
def balancing() -> None:
    module = rk.SelfBalancing("running", period=10)
    returns(assert_type(module(X.sum(), X.mean()), Tensor), Tensor)
    returns(assert_type(module.SB_weight, Tensor), Tensor)
    weights = assert_type(rk.score_weights(X, Y, background="first"), Tensor)
    returns(assert_type(rk.score_weighted_mean(QUALITY, weights), Tensor), Tensor)


@runs
def focal() -> None:
    returns(assert_type(rk.sigmoid_focal_loss(X, Y), Tensor), Tensor)
    returns(assert_type(rk.sigmoid_focal_loss(X, Y, gamma=torch.ones(3), class_mask=[True, False, True], reduction="sum"), Tensor), Tensor)
    returns(assert_type(rk.sigmoid_focal_loss(LEVELS, LABELS, alpha=0.5), list[Tensor]), list, Tensor)
    returns(assert_type(rk.sigmoid_focal_loss(LEVELS, LABELS, reduction="mean", avg_factor=3), Tensor), Tensor)
    returns(assert_type(rk.quality_focal_loss(X, Y, QUALITY, beta=1.0, reduction="mean"), Tensor), Tensor)
    returns(assert_type(rk.quality_focal_loss(LEVELS, LABELS), list[Tensor]), list, Tensor)
    returns(assert_type(rk.varifocal_loss(X, DENSE, iou_weighted=False, weight=QUALITY), Tensor), Tensor)
    returns(assert_type(rk.varifocal_loss(LEVELS, LABELS, reduction="sum"), Tensor), Tensor)
    for reduction in ("none", "mean"):
        assert_type(rk.sigmoid_focal_loss(LEVELS, LABELS, reduction=reduction), Tensor | list[Tensor])
    returns(assert_type(rk.SigmoidFocalLoss(gamma=1.5)(X, Y), Tensor), Tensor)
    returns(assert_type(rk.SigmoidFocalLoss(reduction="none")(LEVELS, LABELS), Tensor | list[Tensor]), list, Tensor)
    returns(assert_type(rk.QualityFocalLoss()(X, (Y, QUALITY), avg_factor=torch.tensor(2.0)), Tensor), Tensor)
    returns(assert_type(rk.VarifocalLoss(iou_weighted=False)(X, DENSE, None, 4.0, reduction_override="mean"), Tensor), Tensor)


@runs
def equalized() -> None:
    ratio = torch.ones(3)
    losses = assert_type(rk.equalized_focal_loss(X, Y, ratio, weighting_factor=True), rk.EqualizedLoss)
    assert_type(losses.pos_grad, Tensor)
    returns(losses, rk.EqualizedLoss, Tensor)
    returns(assert_type(rk.equalized_quality_focal_loss(X, Y, QUALITY, ratio), rk.EqualizedLoss), rk.EqualizedLoss, Tensor)
    returns(assert_type(rk.eqlv2_loss(X, Y, ratio[:2]), rk.EqualizedLoss), rk.EqualizedLoss, Tensor)
    returns(assert_type(rk.EqualizedFocalLoss(3)(X, Y), Tensor), Tensor)
    returns(assert_type(rk.EqualizedFocalLoss(3, reduction="none")(LEVELS, LABELS), Tensor | list[Tensor]), list, Tensor)
    returns(assert_type(rk.EqualizedQualityFocalLoss(3, process_group=None)(X, (Y, QUALITY)), Tensor), Tensor)
    module = rk.EQLv2Loss(2)
    returns(assert_type(module(LEVELS, LABELS), Tensor), Tensor)
    returns(assert_type(module.pos_neg, Tensor), Tensor)
    returns(assert_type(module.get_activation(X), Tensor), Tensor)
    returns(assert_type(module.get_cls_channels(2), int), int)


@runs
def harmonized() -> None:
    sums, updates = torch.zeros(10), torch.zeros(10, dtype=torch.int64)
    returns(assert_type(rk.ghm_classification_loss(X, DENSE), Tensor), Tensor)
    with_state = assert_type(rk.ghm_classification_loss(LEVELS, LABELS, momentum=0.5, acc_sum=sums), rk.GHMLoss)
    returns(with_state, rk.GHMLoss, Tensor)
    corrected = assert_type(rk.ghm_classification_loss(X, Y, momentum=0.5, acc_sum=sums, num_updates=updates), rk.GHMCorrectedLoss)
    returns(corrected, rk.GHMCorrectedLoss, Tensor)
    returns(assert_type(rk.ghm_regression_loss(BOXES, OFFSETS, mu=0.1), Tensor), Tensor)
    returns(assert_type(rk.ghm_regression_loss(BOXES, OFFSETS, acc_sum=sums), rk.GHMLoss), rk.GHMLoss, Tensor)
    returns(assert_type(rk.gradient_density(X, DENSE, bins=5), rk.GradientDensity), rk.GradientDensity, Tensor)
    returns(assert_type(rk.authentic_smooth_l1_loss(BOXES, OFFSETS, reduction="sum"), Tensor), Tensor)
    module = rk.GHMC(momentum=0.5, bias_correction=True)
    returns(assert_type(module(X, Y), Tensor), Tensor)
    returns(assert_type(module.acc_sum, Tensor), Tensor)
    returns(assert_type(module(LEVELS, LABELS, reduction_override="none"), Tensor | list[Tensor]), list, Tensor)
    returns(assert_type(rk.GHMR()(BOXES, OFFSETS), Tensor), Tensor)


@runs
def group_softmax() -> None:
    groups = assert_type(rk.ClassGroups.from_counts([5, 500, 50], background_form="sigmoid"), rk.ClassGroups)
    logits = torch.zeros(4, assert_type(groups.num_logits, int))
    assert_type(rk.ClassGroups([[0, 2], [1]]).column_of(1), int)
    returns(assert_type(rk.group_softmax_loss(logits, Y, groups, others_ratio=None), Tensor), Tensor)
    returns(assert_type(rk.group_softmax_scores(logits, groups), Tensor), Tensor)
    module = rk.GroupSoftmaxLoss(groups, background="last")
    returns(assert_type(module(logits, Y), Tensor), Tensor)
    returns(assert_type(module.get_accuracy(logits, Y), dict[str, Tensor]), dict)
    returns(assert_type(rk.convert_classifier(torch.ones(4, 2), None, groups), tuple[Tensor, Tensor]), tuple, Tensor)


@runs
def seesaw() -> None:
    logits = torch.zeros(4, 5)
    losses = assert_type(rk.seesaw_loss(logits, Y, torch.ones(4), reduction="none"), rk.SeesawLosses)
    returns(losses, rk.SeesawLosses, Tensor)
    module = rk.SeesawLoss(3, return_dict=True)
    returns(assert_type(module(logits, Y), dict[str, Tensor] | Tensor), dict)
    returns(assert_type(module.cum_samples, Tensor), Tensor)
    returns(assert_type(module.get_accuracy(logits, Y), dict[str, Tensor]), dict)


@runs
def dynamic() -> None:
    returns(assert_type(rk.smooth_l1_loss(BOXES, OFFSETS, torch.tensor(0.5), reduction="sum"), Tensor), Tensor)
    assignment = rk.DynamicLabelAssignment(update_iter_interval=1)
    assignment.update([torch.rand(5), torch.rand(3)])
    threshold = assert_type(assignment.iou_threshold, Tensor)
    returns(assert_type(rk.assign_by_iou(torch.rand(5), threshold, 0.3), Tensor), Tensor)
    returns(assert_type(assignment.schedule().values, Tensor), Tensor)
    module = rk.DynamicSmoothL1Loss(variant="original")
    module.update(BOXES, num_images=2)
    returns(assert_type(module(BOXES, OFFSETS, avg_factor=2), Tensor), Tensor)
    returns(assert_type(module.beta, Tensor), Tensor)


@runs
def package() -> None:
    returns(assert_type(rk.__version__, str), str)
    with rk.use_backend("reference"):
        returns(assert_type(rk.backend_report(), str), str)
