"""The authors' detection heads, assembled from public parts alone: losses, balancing and gradients as recorded."""
import golden_vectors
import pytest
import torch
from harness import assert_within
from rsloss_kernels import (
    SelfBalancing,
    alrp_loss,
    alrp_regression_loss,
    average_precision_loss,
    rank_sort_loss,
    score_weights,
    use_backend,
)
from test_self_balancing import giou_losses

CASES = golden_vectors.cases("rank_head")
GATE = 1e-9


def cases(kind: str) -> list:
    return [pytest.param(case, id=case.name) for case in CASES if case.manifest["kind"] == kind]


def assert_close(got, wanted, label: str) -> None:
    got = torch.as_tensor(got, dtype=torch.float64).detach()
    wanted = torch.as_tensor(wanted, dtype=torch.float64).reshape(got.shape)
    largest = float(wanted.abs().amax()) if wanted.numel() else 0.0
    assert_within(got, wanted, GATE * largest + 1e-14, label)


def leaves(*values):
    return [value.double().requires_grad_() for value in values]


def test_all_golden_vectors_are_there():
    assert len(CASES) == 18 == sum(len(cases(kind)) for kind in ("head_atss", "head_rpn", "head_alrp_seq"))


def atss_parts(case):
    """Logits, boxes, dense targets of ones, IoU and GIoU loss of the positives, weighted box loss."""
    inputs = case.inputs()
    labels, num_classes = inputs["labels"], case.hyper["num_classes"]
    is_positive = labels < num_classes
    logits, boxes = leaves(inputs["cls_scores"], inputs["box_pred"])
    weights = score_weights(logits, labels)
    iou, giou = giou_losses(boxes[is_positive], inputs["box_target"][is_positive].double())
    total = weights.sum()
    box = (weights[is_positive] * giou).sum() / torch.where(total < 1e-12, 1.0, total)
    dense = torch.nn.functional.one_hot(labels, num_classes + 1)[:, :num_classes].double()
    dense[inputs["label_weights"] == 0] = -1
    return logits, boxes, dense, iou, box


@pytest.mark.parametrize("case", cases("head_atss"))
def test_atss_head_with_rank_sort(backend, case):
    logits, boxes, dense, iou, box = atss_parts(case)
    labels, golden = case.inputs()["labels"], case.outputs("rs_atss")
    is_positive = labels < case.hyper["num_classes"]
    is_counted = case.inputs()["label_weights"][is_positive] != 0
    rows = is_positive.nonzero().squeeze(1)[is_counted]
    dense[rows, labels[rows]] = iou.detach()[is_counted]
    balancing = SelfBalancing()
    with use_backend(backend.name):
        ranking, sorting = rank_sort_loss(logits, dense, delta=case.hyper["delta"])
    scaled = balancing(ranking + sorting, box)
    (ranking + sorting + scaled).backward()
    assert all(value.isfinite().all() for value in (ranking, sorting, scaled, logits.grad, boxes.grad))
    if not golden:  # the published head crashes where a positive has label weight 0; here that row is just ignored
        assert case.name == "head010_posweight0" and "rs_atss" in case.crashed
        assert not logits.grad[case.inputs()["label_weights"] == 0].any() and ranking > 0
        return
    assert_close(ranking, golden["loss_rank"], "ranking")
    assert_close(sorting, golden["loss_sort"], "sorting")
    assert_close(logits.grad, golden["grad_scores"], "scores")
    if not golden["loss_bbox"].isfinite():  # every box perfect: the published factor is infinite; here there is nothing to learn
        assert case.name == "head009_iou1_all" and scaled == 0 and not boxes.grad.any()
        return
    assert_close(scaled, golden["loss_bbox"], "box")
    assert_close(boxes.grad, golden["grad_box"], "box gradient")
    if "SB_weight" in golden and is_positive.any():
        assert_close(balancing.SB_weight, golden["SB_weight"], "factor")


@pytest.mark.parametrize("case", cases("head_atss"))
def test_atss_head_with_average_precision(backend, case):
    logits, boxes, dense, _, box = atss_parts(case)
    golden = case.outputs("brs_atss_ap")
    with use_backend(backend.name):
        ranking = average_precision_loss(logits, dense, delta=1.0)
    scaled = case.hyper["loc_weight_ap"] * box
    (ranking + scaled).backward()
    loss = next(golden[name] for name in ("loss_rank", "loss_cls", "loss_ap") if name in golden)
    assert_close(ranking, loss, "AP")
    assert_close(scaled, golden["loss_bbox"], "box")
    assert_close(logits.grad, golden["grad_scores"], "scores")
    assert_close(boxes.grad, golden["grad_box"], "box gradient")


def decoded(deltas: torch.Tensor, stds: list[float]) -> torch.Tensor:
    """Boxes around a unit box, without anchors, as the published RPN head has it."""
    shift, size = (deltas * deltas.new_tensor(stds)).split(2, 1)
    half = size.clamp(-torch.tensor(62.5).log().item(), torch.tensor(62.5).log().item()).exp() / 2
    centre = shift
    return torch.cat([centre - half, centre + half], 1)


@pytest.mark.parametrize("case", cases("head_rpn"))
def test_rpn_head(backend, case):
    inputs, hyper = case.inputs(), case.hyper
    labels, weight = inputs["labels"], hyper["head_weight"]
    is_positive = labels == 0
    logits, deltas = leaves(inputs["cls_scores"], inputs["delta_pred"])
    iou, giou = giou_losses(
        decoded(deltas[is_positive], hyper["stds"]), decoded(inputs["delta_target"][is_positive].double(), hyper["stds"])
    )
    ignored = inputs["label_weights"] == 0
    if case.outputs("rs_rpn_alrp"):
        golden = case.outputs("rs_rpn_alrp")
        kept = torch.where(ignored, -1, labels)
        with use_backend(backend.name):
            losses = alrp_loss(logits, kept, giou.detach() / (2 * (1 - 0.7)))
            regression = alrp_regression_loss(giou, losses.rank, losses.order)
        balancing = SelfBalancing("running", initial=50.0)
        classification, box = weight * losses.classification, weight * balancing(losses.classification, regression)
        results = {"loss_rpn_cls": classification, "loss_rpn_bbox": box}
    else:
        golden = case.outputs("rs_rpn")
        quality = torch.zeros(labels.shape, dtype=torch.float64)
        quality[is_positive] = iou.detach()
        kept = torch.where(ignored, -1, labels)
        with use_backend(backend.name):
            ranking, sorting = rank_sort_loss(logits, kept, quality, delta=hyper["delta"])
        weights = score_weights(logits, labels)
        box = (weights[is_positive] * giou).sum() / weights.sum().clamp(min=1e-10)
        scaled = SelfBalancing()(ranking + sorting, box)
        results = {"loss_rpn_rank": weight * ranking, "loss_rpn_sort": weight * sorting, "loss_rpn_bbox": weight * scaled}
    sum(results.values()).backward()
    if not is_positive.any():  # there the head returns a constant without a gradient; the losses themselves are zeros
        assert case.name == "head014_rpn_nopos" and all(value == 0 for value in results.values())
        assert all(float(golden[name]) == pytest.approx(weight) for name in results)
    else:
        for name, value in results.items():
            assert_close(value, golden[name], name)
    assert_close(logits.grad, golden["grad_scores"], "scores")
    assert_close(deltas.grad, golden["grad_delta"], "deltas")


@pytest.mark.parametrize("case", cases("head_alrp_seq"))
def test_alrp_head_over_steps(backend, case):
    inputs, golden, hyper = case.inputs(), case.outputs("alrp_retina"), case.hyper
    balancing = SelfBalancing("running", period=hyper["period"], initial=hyper["initial_SB"])
    for step in range(hyper["steps"]):
        logits, regression = leaves(inputs[f"s{step}_cls_scores"], inputs[f"s{step}_loss_bbox"])
        with use_backend(backend.name):
            losses = alrp_loss(logits, inputs[f"s{step}_labels"], regression, delta=hyper["delta"])
            box = balancing(losses.classification, alrp_regression_loss(regression, losses.rank, losses.order))
        (losses.classification + box).backward()
        wanted = {name.removeprefix(f"s{step}_"): value for name, value in golden.items() if name.startswith(f"s{step}_")}
        assert_close(losses.classification, wanted["loss_cls"], "classification")
        assert_close(box, wanted["loss_bbox"], "box")
        assert_close(balancing.SB_weight, wanted["SB_weight_after"], "factor")
        assert balancing.counter == wanted["counter_after"]
        of_scores, of_boxes = (next(v for k, v in wanted.items() if "grad" in k and word in k) for word in ("scores", "bbox"))
        assert_close(logits.grad, of_scores, "scores")
        assert_close(regression.grad, of_boxes, "regression losses")
