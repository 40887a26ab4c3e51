"""Dynamic R-CNN: the authors' recorded sequences, and statistics against what the definition says, written in numpy."""
import itertools

import numpy as np
import pytest
import torch
from golden_vectors import Case, cases

from rsloss_kernels import DynamicLabelAssignment, DynamicSmoothL1Loss, assign_by_iou, smooth_l1_loss

GOLDEN = cases("dynamic_rcnn")


def of_kind(kind: str) -> list:
    return [pytest.param(case, id=case.name) for case in GOLDEN if case.manifest["kind"] == kind]


def test_every_golden_case_is_tested():
    kinds = [case.manifest["kind"] for case in GOLDEN]
    assert len(GOLDEN) == 29
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "smooth_l1": 11, "smooth_l1_weighted": 1, "matcher": 3, "dyn_orig_seq": 9, "dyn_mmdet_seq": 5,
    }  # fmt: skip


@pytest.mark.parametrize("case", of_kind("smooth_l1"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_published_smooth_l1(case: Case, dtype):
    inputs, wanted = case.inputs(), case.outputs("dyn")
    pred, target = inputs["pred"].to(dtype).requires_grad_(), inputs["target"].to(dtype)
    beta = case.hyper["beta"]
    loss = smooth_l1_loss(pred, target, beta, reduction="mean" if case.hyper["size_average"] else "sum")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-7
    assert abs(loss.item() - wanted["loss"].item()) <= tolerance * wanted["loss"].item()
    (gradient,) = torch.autograd.grad(loss, pred)
    if beta == 0:
        # Published: NaN. Ours: that of the absolute value.
        assert wanted["grad"].isnan().any()
        assert torch.equal(gradient, (pred - target).detach().sign() / (pred.numel() if case.hyper["size_average"] else 1))
        return
    error = (gradient.double() - wanted["grad"]).abs().max()
    assert error <= (1e-12 if dtype == torch.float64 else 2e-6) * wanted["grad"].abs().max()


@pytest.mark.parametrize("case", of_kind("smooth_l1_weighted"))
def test_published_weights(case: Case):
    inputs, wanted = case.inputs(), case.outputs("mmdet")
    pred = inputs["pred"].double().requires_grad_()
    beta = torch.tensor(case.hyper["beta"], dtype=torch.float64)
    value = smooth_l1_loss(pred, inputs["target"].double(), beta, inputs["weight"].double(), avg_factor=case.hyper["avg_factor"])
    assert abs(value.item() - wanted["loss"].item()) <= 1e-12 * wanted["loss"].item()
    (gradient,) = torch.autograd.grad(value, pred)
    torch.testing.assert_close(gradient, wanted["grad"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", of_kind("matcher"))
def test_published_matcher(case: Case):
    """One threshold, a box at exactly that IoU, a tie between two ground truths."""
    (ious,), (matches,) = case.inputs().values(), case.outputs("dyn").values()
    threshold = case.hyper["threshold"]
    overlaps, nearest = ious.max(0)
    for thr in (threshold, torch.tensor(threshold, dtype=torch.float64), torch.tensor([threshold])):
        labels = assign_by_iou(overlaps, thr)
        assert torch.equal(torch.where(labels == 1, nearest, -1), matches)
    assert set(labels.tolist()) == {0, 1}


def boxes_iou(a, b):
    """float64 [A, B], with widths and areas of pixels that count from edge to edge, as published."""
    corner = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2]) + 1
    inside = np.clip(corner, 0, None).prod(-1)
    area_a, area_b = (np.prod(x[:, 2:] - x[:, :2] + 1, axis=1) for x in (a, b))
    return inside / (area_a[:, None] + area_b[None] - inside)


def encode(gt, boxes, weights):
    size, gt_size = boxes[:, 2:] - boxes[:, :2] + 1, gt[:, 2:] - gt[:, :2] + 1
    offset = ((gt[:, :2] + gt_size / 2) - (boxes[:, :2] + size / 2)) / size
    return np.concatenate([offset, np.log(gt_size / size)], 1) * np.asarray(weights)


def steps_of(case: Case, step: int):
    """Of each image (IoUs, class labels by the nearest ground truth, regression targets as if matched)."""
    inputs = {key.removeprefix(f"s{step}_"): value.double().numpy() for key, value in case.inputs().items() if key.startswith(f"s{step}_")}
    for image in itertools.count():
        if f"im{image}_gt" not in inputs:
            return
        yield inputs[f"im{image}_gt"], inputs[f"im{image}_gt_labels"], inputs[f"im{image}_proposals"]


@pytest.mark.parametrize("case", of_kind("dyn_orig_seq"))
def test_published_training_of_the_authors(case: Case):
    """Boxes in, labels, losses, gradients, threshold and beta out, step by step."""
    hyper, wanted, inputs = case.hyper, case.outputs("dyn"), case.inputs()
    settings = {"update_iter_interval": hyper["iteration_count"], "variant": "original"}
    assignment = DynamicLabelAssignment(hyper["KI"], initial_iou=hyper["warmup_iou"], **settings)
    loss_bbox = DynamicSmoothL1Loss(hyper["KE"], initial_beta=hyper["warmup_beta"], reduction="sum", **settings)
    published_beta = hyper["warmup_beta"]
    for step in range(hyper["steps"]):
        before = loss_bbox.beta.clone()
        if step in hyper["skipped_iterations"]:
            assignment.update([])
            loss_bbox.update([])
        else:
            ious, labels, targets = [], [], []
            for gt, gt_labels, boxes in steps_of(case, step):
                overlaps = boxes_iou(gt, boxes)
                label = assign_by_iou(torch.from_numpy(overlaps.max(0)), assignment.iou_threshold)
                match = np.where(label.numpy() == 1, overlaps.argmax(0), 0)
                ious.append(torch.from_numpy(overlaps[match, np.arange(len(boxes))]))
                labels.append(torch.from_numpy(gt_labels[match]).long() * (label == 1))
                targets.append(torch.from_numpy(encode(gt[match], boxes, hyper["bbox_reg_weights"])))
            if f"s{step}_loss_bbox" in wanted:
                label, target = torch.cat(labels), torch.cat(targets)
                assert torch.equal(label, wanted[f"s{step}_labels"])
                torch.testing.assert_close(target, wanted[f"s{step}_regression_targets"], rtol=1e-10, atol=1e-12)
                regression = inputs[f"s{step}_box_regression"].double().requires_grad_()
                rows = (label > 0).nonzero()[:, 0]
                own = regression.view(len(label), -1, 4)[rows, label[rows]]
                if published_beta == 0:
                    loss = smooth_l1_loss(own, target[rows], 0.0, reduction="sum", avg_factor=len(label))
                else:
                    loss = loss_bbox(own, target[rows]) / len(label)
                torch.testing.assert_close(loss.detach(), wanted[f"s{step}_loss_bbox"], rtol=1e-10, atol=0)
                (gradient,) = torch.autograd.grad(loss, regression)
                if published_beta == 0 and len(rows):
                    assert wanted[f"s{step}_grad_box_regression"].isnan().any() and gradient.isfinite().all()
                else:
                    torch.testing.assert_close(gradient, wanted[f"s{step}_grad_box_regression"], rtol=1e-9, atol=1e-13)
            assignment.update(ious)
            loss_bbox.update(targets, num_images=len(targets))
        if f"s{step}_iou_thr_after" not in wanted:
            assert case.crashed
            continue
        torch.testing.assert_close(assignment.iou_threshold, wanted[f"s{step}_iou_thr_after"], rtol=1e-12, atol=0)
        published_beta = wanted[f"s{step}_beta_after"]
        torch.testing.assert_close(loss_bbox.beta, before if published_beta == 0 else published_beta, rtol=1e-12, atol=0)
        assert loss_bbox.num_recorded == assignment.num_recorded == wanted[f"s{step}_history_len"]
    assert loss_bbox.beta > 0 and loss_bbox.num_steps == assignment.num_steps == hyper["steps"]


@pytest.mark.parametrize("case", of_kind("dyn_mmdet_seq"))
def test_published_training_of_mmdetection(case: Case):
    hyper, inputs = case.hyper, case.inputs()
    settings = {"update_iter_interval": hyper["update_iter_interval"]}
    assignment = DynamicLabelAssignment(hyper["iou_topk"], initial_iou=hyper["initial_iou"], **settings)
    loss_bbox = DynamicSmoothL1Loss(hyper["beta_topk"], initial_beta=hyper["initial_beta"], **settings)
    new, old = case.outputs("mmdet_new"), case.outputs("mmdet_old")
    for step in range(hyper["steps"]):
        ious = [inputs[f"s{step}_max_overlaps{image}"].double() for image in range(hyper["num_imgs"])]
        assignment.update(ious)
        loss_bbox.update(
            inputs[f"s{step}_bbox_targets"].double(), inputs[f"s{step}_bbox_weights"].double(), num_images=hyper["num_imgs"]
        )
        if f"s{step}_beta_after" not in new:
            assert case.crashed
            continue
        torch.testing.assert_close(assignment.iou_threshold, new[f"s{step}_iou_thr_after"], rtol=1e-12, atol=0)
        torch.testing.assert_close(loss_bbox.beta, new[f"s{step}_beta_after"], rtol=1e-12, atol=0)
        if old[f"s{step}_beta_after"] != 0:
            torch.testing.assert_close(loss_bbox.beta, old[f"s{step}_beta_after"], rtol=1e-12, atol=0)
        assert loss_bbox.num_recorded == assignment.num_recorded == new[f"s{step}_history_len"]
        recorded = loss_bbox.beta_history[: int(loss_bbox.num_recorded)]
        torch.testing.assert_close(recorded, new[f"s{step}_beta_history"], rtol=1e-12, atol=0)
        torch.testing.assert_close(assignment.iou_sum, new[f"s{step}_iou_history"].sum(), rtol=1e-12, atol=1e-15)
    assert loss_bbox.beta > 0
