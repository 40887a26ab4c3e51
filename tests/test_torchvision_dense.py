"""torchvision's RetinaNet and FCOS with losses of the library."""
import copy
import warnings

import pytest
import torch
import torchvision_models as models
from harness import assert_within
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import fcos, retinanet
from torchvision.ops import box_iou, generalized_box_iou_loss

from rsloss_kernels import GHMC, RankSortLoss, _library, rank_sort_loss, score_weights
from rsloss_kernels.integrations._ranking_head import LOGGED, giou_losses
from rsloss_kernels.integrations.torchvision import (
    DENSE_LOSSES,
    FCOSHead,
    RankingHeadLoss,
    RetinaNetHead,
    calibrate_score_thresh,
    step_log,
    use_loss,
)

KINDS = ("retinanet", "fcos")
RANKING = {"rank_sort": {"rank", "sort"}, "ap": {"ap"}, "alrp": {"alrp"}}
QUALITY = {"quality_focal", "varifocal", "eqfl"}


@pytest.mark.parametrize("empty", [(), (1,), (0, 1, 2)], ids=["all", "one without objects", "none with objects"])
@pytest.mark.parametrize(("kind", "boxes"), [("retinanet", "l1"), ("retinanet", "giou"), ("fcos", "giou")])
def test_focal_loss_is_torchvisions(kind, boxes, empty):
    images, targets = models.make_batch(empty=empty, dtype=torch.float64)
    plain = models.make_model(kind).double()
    if kind == "retinanet":
        plain.head.regression_head._loss_type = boxes
    ours = use_loss(copy.deepcopy(plain), "focal")
    wanted, got = plain(images, targets), ours(images, targets)
    assert got.keys() == wanted.keys() and got["classification"] > 0
    for name, value in wanted.items():
        assert_within(got[name], value, 1e-10 * abs(value) + 1e-15, name)
    wanted, got = (models.gradients(*pair) for pair in ((plain, wanted), (ours, got)))
    assert got.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        assert_within(got[name], value, 1e-9 * largest, name)


@pytest.mark.parametrize("kind", ["smooth_l1", "diou", "ciou"])
def test_other_box_losses_are_torchvisions(kind):
    images, targets = models.make_batch()
    plain = models.make_model("retinanet")
    plain.head.regression_head._loss_type = kind
    wanted, got = plain(images, targets), use_loss(copy.deepcopy(plain), "focal")(images, targets)
    torch.testing.assert_close(got["bbox_regression"], wanted["bbox_regression"])


def captured(model: nn.Module, batch: tuple) -> tuple:
    """The losses, and what the head's compute_loss was given."""
    arguments = []
    compute_loss = type(model.head).compute_loss
    model.head.compute_loss = lambda *given: arguments.append(given) or compute_loss(model.head, *given)
    losses = model(*batch)
    del model.head.compute_loss
    return losses, *arguments[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rank_and_sort_ranks_all_rows_of_the_batch(kind):
    """Against the loss of dense targets, put together image by image."""
    model = use_loss(models.make_model(kind), "rank_sort")
    losses, targets, outputs, anchors, matched_idxs = captured(model, models.make_batch(empty=(0,)))
    dense, box_losses, weights = [], [], []
    for image, (target, boxes, matched) in enumerate(zip(targets, anchors, matched_idxs, strict=True)):
        logits = outputs["cls_logits"][image]
        wanted = torch.zeros_like(logits)
        wanted[matched == -2] = -1
        rows = (matched >= 0).nonzero().squeeze(1)
        coder = model.head.regression_head.box_coder.decode_single if kind == "retinanet" else model.head.box_coder.decode
        predicted, objects = coder(outputs["bbox_regression"][image][rows], boxes[rows]), target["boxes"][matched[rows]]
        if len(rows):
            wanted[rows, target["labels"][matched[rows]]] = box_iou(predicted, objects).diagonal().detach()
            box_losses.append(generalized_box_iou_loss(predicted, objects))
            weights.append(logits[rows].sigmoid().amax(1).detach())
        dense.append(wanted)
    assert kind == "fcos" or any((wanted == -1).any() for wanted in dense), "no anchor is between the thresholds"
    logits, dense = outputs["cls_logits"].flatten(0, 1), torch.cat(dense)
    ranking, sorting = rank_sort_loss(logits, dense)
    box_losses, weights = torch.cat(box_losses), torch.cat(weights)
    torch.testing.assert_close(score_weights(logits, dense)[score_weights(logits, dense) > 0], weights)
    unbalanced = (box_losses * weights).sum() / weights.sum()
    balanced = unbalanced * ((ranking + sorting) / unbalanced).detach()
    torch.testing.assert_close(losses["classification"], ranking + sorting)
    torch.testing.assert_close(losses["bbox_regression"], balanced)
    log = step_log(model)
    torch.testing.assert_close(log["bbox_unbalanced"], unbalanced.detach())
    torch.testing.assert_close(log["SB_weight"].float(), ((ranking + sorting) / unbalanced).detach())
    assert log["num_positives"] == len(weights)
    torch.testing.assert_close(log["positives_iou"], dense[dense > 0].sum() / len(weights))
    got, wanted = (
        torch.autograd.grad(value, [outputs["cls_logits"], outputs["bbox_regression"]], retain_graph=True)
        for value in (sum(losses.values()), ranking + sorting + balanced)
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("kind", "loss"), [*(("retinanet", loss) for loss in DENSE_LOSSES), *(("fcos", loss) for loss in ("rank_sort", "focal", "varifocal"))]
)
def test_one_call_per_step_and_ten_steps_reduce_the_loss(kind, loss, monkeypatch):
    calls = []
    evaluate = _library.differentiable
    monkeypatch.setattr(_library, "differentiable", lambda name, *given: calls.append(name) or evaluate(name, *given))
    looped = [(retinanet, "sigmoid_focal_loss"), (fcos, "sigmoid_focal_loss"), (retinanet, "_box_loss")]
    for module, name in looped:
        monkeypatch.setattr(module, name, lambda *given, name=name, **options: pytest.fail(f"torchvision's {name} was called"))
    model = use_loss(models.make_model(kind), loss)
    batch = models.make_batch()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    history = []
    for _ in range(11):
        calls.clear()
        losses = model(*batch)
        assert len(calls) == 1, f"3 images, 2 levels, calls {calls}"
        total = sum(losses.values())
        # The box loss of aLRP has the ranks below it: it rises while they fall.
        history.append(float((losses["classification"] if loss == "alrp" else total).detach()))
        optimizer.zero_grad()
        total.backward()
        assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
        optimizer.step()
    assert history[-1] < 0.95 * history[0], history

    names = {"classification", "bbox_regression"}
    if kind == "fcos" and loss not in {*RANKING, *QUALITY}:
        names.add("bbox_ctrness")
    assert losses.keys() == names
    detections = model.eval()(batch[0])
    assert all(found["scores"].isfinite().all() and (found["scores"] <= 1).all() for found in detections)
    assert model.score_thresh == (0 if loss in RANKING else {"retinanet": 0.05, "fcos": 0.2}[kind])
    if loss in RANKING:
        assert all(len(found["scores"]) > 10 for found in detections)


@pytest.mark.parametrize("loss", [*RANKING, "focal"])
def test_log_has_the_same_names_without_objects(loss):
    model = use_loss(models.make_model("retinanet"), loss)
    names = {*RANKING[loss], *LOGGED} if loss in RANKING else {"num_positives"}
    for empty in ((), (0, 1, 2)):
        losses = model(*models.make_batch(empty=empty))
        log = step_log(model)
        assert log.keys() == names and not any("loss" in name for name in names)
        assert all(value.dim() == 0 and not value.requires_grad and value.isfinite() for value in log.values())
        assert losses.keys() == {"classification", "bbox_regression"}
        assert (log["num_positives"] == 0) == bool(empty)
        found = models.gradients(model, losses)
        assert found.keys() == dict(model.named_parameters()).keys(), "DistributedDataParallel waits for every gradient"
        if empty and loss in RANKING:
            assert all(value == 0 for value in losses.values()) and not any(value.any() for value in found.values())


def test_a_default_score_threshold_is_warned_of():
    with pytest.warns(UserWarning, match=r"score_thresh of 0\.05 may drop any share") as caught:
        model = use_loss(models.make_model("retinanet"), "rank_sort", score_thresh=None)
    assert model.score_thresh == 0.05 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_loss(models.make_model("retinanet"), "rank_sort").score_thresh == 0
        assert use_loss(models.make_model("retinanet"), "rank_sort", score_thresh=0.3).score_thresh == 0.3
        assert use_loss(models.make_model("retinanet", score_thresh=0.0), "ap", score_thresh=None).score_thresh == 0
        assert use_loss(models.make_model("fcos"), "varifocal").score_thresh == 0.2
        exchanged = use_loss(models.make_model("fcos"), "rank_sort")
        assert exchanged.score_thresh == 0 and use_loss(exchanged, "ap").score_thresh == 0
        assert use_loss(exchanged, "focal").score_thresh == 0.2  # the model's own again
        assert use_loss(models.make_model("fcos"), "focal", score_thresh=None).score_thresh == 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_threshold_keeps_the_right_detections(kind):
    model = use_loss(models.make_model(kind, nms_thresh=0.3), "rank_sort")
    images, _ = models.make_batch()
    with torch.no_grad():
        found = model.eval()(images)
    # As if every fifth detection were an object; none of its class overlaps it more than non-maximum suppression allows.
    targets = [{"boxes": one["boxes"][:50:5], "labels": one["labels"][:50:5]} for one in found]
    model.train()
    threshold = calibrate_score_thresh(model, [(images[:1], targets[:1]), (images[1:], targets[1:])], keep=1.0)
    assert model.training and threshold == model.score_thresh > 0
    lowest = min(float(one["scores"][:50:5].min()) for one in found)
    assert threshold < lowest
    kept = model.eval()(images)
    for before, after in zip(found, kept, strict=True):
        assert torch.equal(after["scores"], before["scores"][before["scores"] > threshold])
    right = torch.cat([one["scores"][:50:5] for one in found]).sort(descending=True).values
    half = calibrate_score_thresh(model, [(images, targets)], keep=0.5)
    assert right[len(right) // 2 - 1] > half >= right[len(right) // 2] and not model.training
    with pytest.warns(UserWarning, match="no detection is right"):
        assert calibrate_score_thresh(model, [(images, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}] * 3)]) == 0
    with pytest.raises(ValueError, match="keep must be"):
        calibrate_score_thresh(model, [], keep=0)


@pytest.mark.parametrize(("kind", "loss"), [("retinanet", "rank_sort"), ("retinanet", "eqlv2"), ("fcos", "alrp"), ("fcos", "varifocal")])
def test_under_autocast_the_losses_stay(kind, loss):
    batch = models.make_batch()
    exact = use_loss(models.make_model(kind), loss)(*batch)
    model = use_loss(models.make_model(kind), loss)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.03, atol=1e-3)
    assert all(value.isfinite().all() for value in models.gradients(model, losses).values())


@pytest.mark.parametrize(("kind", "loss"), [("retinanet", "focal"), ("fcos", "rank_sort")])
def test_compiled_loss(kind, loss):
    model = use_loss(models.make_model(kind), loss)
    losses, *given = captured(model, models.make_batch())
    torch._dynamo.reset()
    # The number of positives is a shape that only the data know.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = torch.compile(model.head.compute_loss, backend="aot_eager", fullgraph=True)(*given)
    for name, value in losses.items():
        torch.testing.assert_close(got[name], value)
    wanted, found = (torch.autograd.grad(sum(parts.values()), given[1]["cls_logits"])[0] for parts in (losses, got))
    torch.testing.assert_close(found, wanted)
    assert step_log(model)["num_positives"] > 0


def test_heads_in_a_new_model():
    for kind, make in (
        (detection.RetinaNet, lambda: RetinaNetHead(32, 3, models.CHANNELS, loss="rank_sort", delta=0.3)),
        (detection.FCOS, lambda: FCOSHead(32, 1, models.CHANNELS, loss=RankingHeadLoss(RankSortLoss(), box_weight=2.0))),
    ):
        like = models.make_model(kind.__name__.lower())
        like.head = getattr(retinanet if kind is detection.RetinaNet else fcos, f"{kind.__name__}Head")(32, 3, models.CHANNELS)
        model = kind(
            models.Backbone(), models.CHANNELS, anchor_generator=like.anchor_generator, head=make(), min_size=64, max_size=64, score_thresh=0
        )
        losses = model(*models.make_batch())
        assert losses.keys() == {"classification", "bbox_regression"}
        assert set(model.state_dict()) - set(like.state_dict()) <= {"head.loss.balancing.SB_weight"}
    assert model.head.loss.balancing is None and step_log(model)["SB_weight"] == 2
    torch.testing.assert_close(losses["bbox_regression"], 2 * step_log(model)["bbox_unbalanced"], check_dtype=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_swap_keeps_the_parameters(kind):
    plain = models.make_model(kind)
    saved = copy.deepcopy(plain.state_dict())
    hooked = []
    plain.head.register_forward_hook(lambda *_: hooked.append(1))
    model = use_loss(plain, "ghm", momentum=0.75)
    assert model is plain and type(model.head).__name__ == type(models.make_model(kind).head).__name__
    assert set(model.state_dict()) - set(saved) == {"head.loss.acc_sum"}
    with pytest.warns(UserWarning, match="acc_sum"):
        model.load_state_dict(saved)
    copied = copy.deepcopy(model)
    model(*models.make_batch())
    assert hooked and model.head.loss.acc_sum.any() and not copied.head.loss.acc_sum.any()
    # And to another loss: the state of the first goes, a centre-ness that was at rest trains again.
    use_loss(model, "rank_sort")
    assert set(model.state_dict()) - set(saved) == {"head.loss.balancing.SB_weight"}
    if kind == "fcos":
        assert not model.head.regression_head.bbox_ctrness.weight.requires_grad
        use_loss(model, "focal")
        assert model.head.regression_head.bbox_ctrness.weight.requires_grad


def test_without_centerness_the_score_is_the_sigmoid_of_the_logit():
    model = use_loss(models.make_model("fcos", nms_thresh=1.1), "rank_sort").eval()
    images, _ = models.make_batch()
    outputs = []
    model.head.register_forward_hook(lambda module, given, output: outputs.append(output))
    for image, found in enumerate(model(images)):
        best = outputs[0]["cls_logits"][image].sigmoid().flatten().sort(descending=True).values
        torch.testing.assert_close(found["scores"][0], best[0])


def test_eqlv2_never_detects_its_background():
    model = use_loss(models.make_model("retinanet", score_thresh=0.0), "eqlv2").eval()
    logits = []
    model.head.classification_head.register_forward_hook(lambda module, given, output: logits.append(output))
    for image, found in enumerate(model(models.make_batch()[0])):
        assert len(found["labels"]) and found["labels"].min() >= 1
        scores = logits[0][image].sigmoid()
        torch.testing.assert_close(found["scores"][0], (scores[:, 1:] * (1 - scores[:, :1])).max())


def test_bad_arguments():
    model = models.make_model("retinanet")
    with pytest.raises(ValueError, match="loss must be one of 'rank_sort', .*got 'rank'"):
        use_loss(model, "rank")
    with pytest.raises(ValueError, match="got SeesawLoss|got 'seesaw'"):
        use_loss(model, "seesaw")
    with pytest.raises(ValueError, match="momentum must be given to the module"):
        use_loss(model, GHMC(), momentum=0.5)
    with pytest.raises(ValueError, match="background must be last"):
        use_loss(model, RankSortLoss(background="first"))
    with pytest.raises(ValueError, match="num_classes is the model's own, 6, and must not be given"):
        use_loss(model, "efl", num_classes=5)
    with pytest.raises(ValueError, match="score_thresh must be 'auto', a number or None, got 'none'"):
        use_loss(model, "focal", score_thresh="none")
    with pytest.raises(TypeError, match="model must be a RetinaNet or FCOS.*got Backbone"):
        use_loss(models.Backbone(), "rank_sort")
    with pytest.raises(TypeError, match="step_log"):
        step_log(model)
    images, targets = models.make_batch()
    targets[1]["labels"][0] = models.CHANNELS
    with pytest.raises(ValueError, match=r"within 0\.\.5 for a model of 6 classes .*got \d\.\.6"):
        use_loss(model, "rank_sort")(images, targets)


def test_giou_losses_are_torchvisions(generator):
    corner = torch.rand(50, 2, generator=generator, dtype=torch.float64) * 20
    target = torch.cat([corner, corner + 1 + torch.rand(50, 2, generator=generator, dtype=torch.float64) * 20], 1)
    pred = target + torch.randn(50, 4, generator=generator, dtype=torch.float64)
    losses, ious = giou_losses(pred, target)
    is_box = (pred[:, 2:] > pred[:, :2]).all(1)
    assert is_box.sum() > 10
    torch.testing.assert_close(losses[is_box], generalized_box_iou_loss(pred, target)[is_box], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ious[is_box], box_iou(pred, target).diagonal()[is_box], rtol=1e-6, atol=1e-9)
    assert giou_losses(pred.bfloat16(), target)[0].dtype == torch.float64 and not ious.requires_grad
