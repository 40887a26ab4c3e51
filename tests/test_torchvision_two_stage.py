"""torchvision's Faster R-CNN with losses for long-tailed classes, and as Dynamic R-CNN."""
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision_models as models
from torch import nn
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.ops import box_iou, generalized_box_iou_loss

from rsloss_kernels import (
    ClassGroups,
    DynamicLabelAssignment,
    DynamicSmoothL1Loss,
    EQLv2Loss,
    GroupSoftmaxLoss,
    _library,
    group_softmax_loss,
    group_softmax_scores,
    rank_sort_loss,
    score_weights,
)
from rsloss_kernels.integrations.torchvision import step_log, use_dynamic_rcnn, use_loss
from rsloss_kernels.integrations.torchvision.roi_heads import rebound

CLASSES = models.CHANNELS - 1
ROI_LOSSES = ("group_softmax", "eqlv2", "seesaw")


def options_of(loss: str, **more: object) -> dict:
    return {"groups": ClassGroups.from_counts([5, 20, 3000, 7, 200]), **more} if loss == "group_softmax" else {}


def captured(model: nn.Module, batch: tuple, seed: int = 0) -> tuple:
    """The losses, and what the box head's losses were given."""
    given = []
    box_head_losses = type(model.roi_heads).box_head_losses
    model.roi_heads.box_head_losses = lambda *arguments: given.append(arguments) or box_head_losses(model.roi_heads, *arguments)
    torch.manual_seed(seed)
    losses = model(*batch)
    del model.roi_heads.box_head_losses
    return losses, *given[0]


@pytest.mark.parametrize("empty", [(), (0, 1, 2)], ids=["objects", "no objects"])
@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_with_nothing_swapped_it_is_torchvisions(kind, empty):
    batch = models.make_batch(empty=empty)
    plain = models.make_model(kind)
    ours = use_dynamic_rcnn(copy.deepcopy(plain), label_assignment=False, smooth_l1=False)
    results = []
    for model in (plain, ours):
        torch.manual_seed(0)  # of the sampler
        losses = model(*batch)
        results.append((losses, models.gradients(model, losses), model.eval()(batch[0])))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert step_log(ours) == {} and ("loss_mask" in results[1][0]) == (kind == "mask_rcnn")


def test_group_softmax_is_the_librarys():
    plain = models.make_model("faster_rcnn")
    before = copy.deepcopy(plain.roi_heads.box_predictor.cls_score)
    model = use_loss(plain, "group_softmax", **options_of("group_softmax", others_ratio=None))
    groups = model.roi_heads.class_loss.groups
    losses, logits, _, labels, _ = captured(model, models.make_batch())
    assert logits.shape[1] == groups.num_logits == model.roi_heads.box_predictor.cls_score.out_features
    torch.testing.assert_close(losses["loss_classifier"], group_softmax_loss(logits, torch.cat(labels), groups, others_ratio=None).sum())
    # The classifier goes on from the one that was there.
    after = model.roi_heads.box_predictor.cls_score
    for number in range(CLASSES + 1):
        column = groups.column_of(number - 1 if number else CLASSES)
        assert torch.equal(after.weight[column], before.weight[number]) and torch.equal(after.bias[column], before.bias[number])
    # Not from one that another loss has left, whose channels mean something else.
    use_loss(use_loss(model, "eqlv2"), "group_softmax", **options_of("group_softmax"))
    assert not model.roi_heads.box_predictor.cls_score.bias.any()


@pytest.mark.parametrize("loss", ROI_LOSSES)
def test_classes_are_where_torchvision_has_them(loss):
    """A classifier that is sure of one class detects that class, with the score of the loss."""
    model = use_loss(models.make_model("faster_rcnn"), loss, **options_of(loss)).eval()
    classifier = model.roi_heads.box_predictor.cls_score
    of_loss = model.roi_heads.class_loss
    for wanted in range(1, CLASSES + 1):
        logits = torch.full((classifier.out_features,), -8.0)
        if loss == "group_softmax":
            groups = of_loss.groups
            logits[list(groups.others)] = 0.0
            logits[groups.others[groups.background_group]] = 4.0  # the foreground
            logits[groups.column_of(wanted - 1)] = 4.0
            score = group_softmax_scores(logits[None], groups)[0, wanted]
        else:
            logits[wanted - 1] = 4.0
            if loss == "seesaw":
                logits[-2] = 3.0  # an object
            score = of_loss.get_activation(logits[None])[0, wanted - 1]
        with torch.no_grad():
            classifier.weight.zero_()
            classifier.bias.copy_(logits)
            found = model(models.make_batch(1)[0])[0]
        assert len(found["labels"]) and (found["labels"] == wanted).all() and score > 0.8
        torch.testing.assert_close(found["scores"], score.expand(found["scores"].shape))


@pytest.mark.parametrize("loss", ["eqlv2", "seesaw"])
def test_background_is_last_in_the_labels_of_the_loss(loss):
    model = use_loss(models.make_model("faster_rcnn"), loss)
    fresh = copy.deepcopy(model.roi_heads.class_loss)
    losses, logits, _, labels, _ = captured(model, models.make_batch())
    labels = torch.cat(labels)
    assert (labels == 0).any() and (labels > 0).any()
    wanted = fresh(logits, torch.where(labels == 0, CLASSES, labels - 1))
    torch.testing.assert_close(losses["loss_classifier"], sum(wanted.values()) if isinstance(wanted, dict) else wanted)


@pytest.mark.parametrize("loss", ROI_LOSSES)
def test_one_call_per_step_and_ten_steps_reduce_the_loss(loss, monkeypatch):
    calls = []
    evaluate = _library.differentiable
    monkeypatch.setattr(_library, "differentiable", lambda name, *given: calls.append(name) or evaluate(name, *given))
    monkeypatch.setattr(torchvision_roi_heads, "fastrcnn_loss", lambda *given: pytest.fail("torchvision's loss was called"))
    model = use_loss(use_dynamic_rcnn(models.make_model("faster_rcnn")), loss, **options_of(loss))
    batch = models.make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(11):
        calls.clear()
        torch.manual_seed(0)
        losses = model(*batch)
        assert len(calls) == 2 and sum("smooth_l1" in name for name in calls) == 1, calls
        total = sum(losses.values())
        history.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert history[-1] < 0.9 * history[0], history
    assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(found["scores"].isfinite().all() for found in model.eval()(batch[0]))


def test_masks_go_with_it():
    model = use_loss(use_dynamic_rcnn(models.make_model("mask_rcnn")), "seesaw")
    losses = model(*models.make_batch())
    assert losses["loss_mask"] > 0 and models.gradients(model, losses).keys() == dict(model.named_parameters()).keys()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*models.make_batch(empty=(0, 1, 2)))
    assert all(value.isfinite() for value in models.gradients(model, losses).values() for value in [value.sum()])


@pytest.mark.parametrize("variant", ["mmdet", "original"])
def test_dynamic_rcnn_follows_the_boxes(variant):
    """Threshold and beta of every step, and what they make of it, as computed from the proposals and the targets."""
    topk = 3
    model = use_dynamic_rcnn(
        models.make_model("faster_rcnn"),
        DynamicLabelAssignment(topk, update_iter_interval=2, initial_iou=0.2, variant=variant),
        DynamicSmoothL1Loss(topk, update_iter_interval=2, initial_beta=100.0, variant=variant),
    )
    heads, batch, assigned = model.roi_heads, models.make_batch(), []
    assign = type(heads).assign_targets_to_proposals
    heads.assign_targets_to_proposals = lambda *given: assigned.append((given, assign(heads, *given))) or assigned[-1][1]
    threshold, beta, window = (0.5 if variant == "mmdet" else 0.2), 100.0, []
    for step in range(4):
        losses, _, deltas, labels, targets = captured(model, batch, seed=step)
        log = step_log(model)
        assert log["iou_threshold"] == pytest.approx(threshold) and log["beta"] == pytest.approx(beta)
        (proposals, objects, classes), (matched, assigned_labels) = assigned[-1]
        best = [box_iou(boxes, proposal).max(0) for boxes, proposal in zip(objects, proposals, strict=True)]
        for (iou, index), label, match, of_class in zip(best, assigned_labels, matched, classes, strict=True):
            assert torch.equal(label, torch.where(iou >= threshold, of_class[index], 0)) and torch.equal(match, index)
        labels, targets = torch.cat(labels), torch.cat(targets)
        deltas = deltas.view(len(labels), -1, 4)[torch.arange(len(labels)), labels][labels > 0]
        box = F.smooth_l1_loss(deltas, targets[labels > 0], beta=beta, reduction="sum") / len(labels)
        torch.testing.assert_close(losses["loss_box_reg"], box)

        if variant == "mmdet":  # of each image without its own objects; of the positives
            ious = [iou[: len(iou) - len(boxes)].topk(topk).values[-1] for (iou, _), boxes in zip(best, objects, strict=True)]
            iou, offsets = torch.stack(ious).mean(), targets[labels > 0, :2].abs().mean(1)
        else:
            iou, offsets = torch.cat([iou for iou, _ in best]).topk(topk * 3).values[-1], targets[:, :2].abs().mean(1)
        window.append((float(iou), float(offsets.kthvalue(min(topk * 3, len(offsets))).values)))
        if len(window) == 2:
            ious, betas = zip(*window, strict=True)
            threshold = max(0.2, sum(ious) / 2)
            beta = min(100.0, sum(betas) / 2 if variant == "mmdet" else max(betas))
            window.clear()
    assert 0 < beta < 100 and threshold != 0.5

    # The windows are in a checkpoint; in evaluation nothing moves.
    resumed = use_dynamic_rcnn(
        models.make_model("faster_rcnn", seed=2),
        DynamicLabelAssignment(topk, update_iter_interval=2, initial_iou=0.2, variant=variant),
        DynamicSmoothL1Loss(topk, update_iter_interval=2, initial_beta=100.0, variant=variant),
    )
    resumed.load_state_dict(model.state_dict())
    assert resumed.roi_heads.smooth_l1.beta == pytest.approx(beta)
    state = copy.deepcopy(model.state_dict())
    model.eval()(batch[0])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("empty", [(), (0, 1, 2)], ids=["objects", "no objects"])
def test_ranking_loss_is_the_librarys(empty):
    """Of all proposals, as computed from them: boxes decoded where they lie, GIoU by torchvision."""
    model = models.make_model("faster_rcnn", box_batch_size_per_image=200, box_positive_fraction=1.0)
    model = use_loss(use_dynamic_rcnn(model, smooth_l1=False), "rank_sort")
    heads, chosen = model.roi_heads, []
    select = type(heads).select_training_samples
    heads.select_training_samples = lambda *given: chosen.append(select(heads, *given)) or chosen[-1]
    losses, logits, deltas, labels, targets = captured(model, models.make_batch(empty=empty))
    proposals = torch.cat(chosen[0][0])
    labels, targets = torch.cat(labels), torch.cat(targets)
    positives = (labels > 0).nonzero()[:, 0]
    assert logits.shape == (len(proposals), CLASSES) and heads.score_thresh == 0 and bool(len(positives)) != bool(empty)
    deltas = deltas.view(len(labels), -1, 4)[positives, labels[positives]]
    boxes, truth = (heads.box_coder.decode_single(codes, proposals[positives]) for codes in (deltas, targets[positives]))
    ious = box_iou(boxes, truth).diagonal()
    background_last = torch.where(labels > 0, labels - 1, CLASSES)
    quality = torch.zeros(len(labels)).index_copy(0, positives, ious.detach())
    ranking, sorting = rank_sort_loss(logits, background_last, quality)
    torch.testing.assert_close(losses["loss_classifier"], ranking + sorting)
    # Balanced: its value is that of the ranking loss, its gradient that of the weighted mean.
    torch.testing.assert_close(losses["loss_box_reg"], ranking + sorting)
    weights = score_weights(logits, background_last)[positives]
    mean = (generalized_box_iou_loss(boxes, truth) * weights).sum() / weights.sum() if len(positives) else deltas.sum()
    log = step_log(model)
    torch.testing.assert_close(log["bbox_unbalanced"], mean.detach(), rtol=1e-5, atol=1e-6)
    assert log["num_positives"] == len(positives)
    gradient = torch.autograd.grad(losses["loss_box_reg"], heads.box_predictor.bbox_pred.weight, retain_graph=True)[0]
    wanted = torch.autograd.grad(mean * log["SB_weight"], heads.box_predictor.bbox_pred.weight, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(wanted) if empty else wanted, rtol=1e-4, atol=1e-6)
    assert models.gradients(model, losses).keys() == dict(model.named_parameters()).keys()


def test_ranking_loss_trains_and_detects():
    model = use_loss(models.make_model("faster_rcnn"), "rank_sort")
    batch, history = models.make_batch(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(11):
        torch.manual_seed(0)
        total = sum(model(*batch).values())
        history.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert history[-1] < 0.9 * history[0], history
    classifier = model.roi_heads.box_predictor.cls_score
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias.copy_(torch.tensor([-9.0, -9.0, 2.0, -9.0, -9.0]))
        found = model.eval()(batch[0])[0]
    best = found["labels"][found["scores"] > 0.5]
    assert len(best) and (best == 3).all() and found["scores"].max() == pytest.approx(torch.tensor(2.0).sigmoid().item())


def test_bad_arguments():
    model = models.make_model("faster_rcnn")
    own = model.roi_heads
    with pytest.raises(ValueError, match="loss must be one of 'group_softmax', 'eqlv2', 'seesaw', 'rank_sort'.*got 'focal'"):
        use_loss(model, "focal")
    with pytest.raises(ValueError, match="'group_softmax' needs groups"):
        use_loss(model, "group_softmax")
    assert model.roi_heads is own
    images, targets = models.make_batch()
    targets[0]["labels"][0] = 6
    with pytest.raises(ValueError, match=r"labels of the targets must be within 0\.\.5 for a model of 6 classes .*got 0\.\.6"):
        use_dynamic_rcnn(models.make_model("faster_rcnn"))(images, targets)
    with pytest.raises(ValueError, match="use_dynamic_rcnn: a ranking loss has a box loss of its own"):
        use_dynamic_rcnn(use_loss(models.make_model("faster_rcnn"), "ap"))
    with pytest.raises(ValueError, match="use_loss: a ranking loss has a box loss of its own"):
        use_loss(use_dynamic_rcnn(models.make_model("faster_rcnn")), "ap")
    with pytest.raises(ValueError, match="of the model's 5 classes without the background, got 6"):
        use_loss(model, EQLv2Loss(6))
    with pytest.raises(ValueError, match="of the model's 5 classes without the background, got 3"):
        use_loss(model, GroupSoftmaxLoss(ClassGroups([[0, 1, 2]])))
    with pytest.raises(TypeError, match="label_assignment must be a DynamicLabelAssignment, True or False, got DynamicSmoothL1Loss"):
        use_dynamic_rcnn(model, DynamicSmoothL1Loss())
    with pytest.raises(TypeError, match="use_dynamic_rcnn: model must be a FasterRCNN"):
        use_dynamic_rcnn(models.make_model("retinanet"))
    model.roi_heads.box_predictor = nn.Identity()
    with pytest.raises(TypeError, match="got FasterRCNN with RoIHeads and Identity"):
        use_loss(model, "eqlv2")
    with pytest.raises(RuntimeError, match="does not use no_such_name"):
        rebound(captured, no_such_name=None)
