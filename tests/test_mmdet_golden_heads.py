"""The authors' recorded ATSS and RPN heads, through the losses of MMDetection's heads trained by ranking."""
import frameworks
import golden_vectors
import pytest
import torch
from harness import assert_within

GATE = 1e-9


@pytest.fixture(scope="module")
def mm():
    return frameworks.mmdetection()


def cases(kind: str) -> list:
    return [pytest.param(case, id=case.name) for case in golden_vectors.cases("rank_head") if case.manifest["kind"] == kind]


class BoxesThemselves:
    """A coder whose deltas are the boxes, for originals that recorded boxes."""

    encode_size = 4

    @staticmethod
    def decode(anchors, deltas):
        return deltas


def golden_head(mm, monkeypatch, kind, targets, anchors, num_classes=1, **parts):
    """A head of one level whose targets are these."""
    from mmdet.registry import MODELS

    classes = {} if "RPN" in kind else {"num_classes": num_classes}
    config = {"type": kind, "in_channels": 4, "anchor_generator": mm.anchors() | {"strides": [8]}, "bbox_coder": mm.coder()}
    if "ATSS" in kind:
        config |= {"feat_channels": 4, "stacked_convs": 0, "norm_cfg": {"type": "GN", "num_groups": 2}}
    head = MODELS.build(config | classes | parts).double()
    monkeypatch.setattr(head, "get_anchors", lambda *arguments, **options: ([[anchors]], [[torch.ones(len(anchors)).bool()]]))
    monkeypatch.setattr(head, "get_targets", lambda *arguments, **options: targets)
    return head


def as_map(rows):
    """[A, K] -> [1, K, A, 1]."""
    return rows.t()[None, :, :, None]


def assert_close(got, wanted, label):
    wanted = wanted.double().reshape(got.shape)
    assert_within(got.detach().double(), wanted, GATE * float(wanted.abs().amax()) + 1e-14, label)


def atss(mm, monkeypatch, case, **parts):
    """Losses, logits and boxes of a recorded ATSS head."""
    inputs = case.inputs()
    labels, weights = inputs["labels"][None], inputs["label_weights"][None].double()
    boxes = inputs["box_target"].double()
    targets = ([boxes[None]], [labels], [weights], [boxes[None]], [torch.ones_like(boxes)[None]], 1.0)
    head = golden_head(mm, monkeypatch, "RankSortATSSHead", targets, boxes, case.hyper["num_classes"], **parts)
    head.bbox_coder = BoxesThemselves()
    logits, predicted = (inputs[name].double().requires_grad_() for name in ("cls_scores", "box_pred"))
    losses = head.loss_by_feat([as_map(logits)], [as_map(predicted)], [None], [{}])
    sum(value for key, value in losses.items() if "loss" in key).backward()
    return head, losses, logits, predicted


@pytest.mark.parametrize("case", cases("head_atss"))
def test_golden_atss_head(mm, monkeypatch, case):
    head, losses, logits, boxes = atss(mm, monkeypatch, case, loss_cls={"type": "RankSortLoss", "delta": case.hyper["delta"]})
    golden = case.outputs("rs_atss")
    assert all(value.isfinite() for value in losses.values())
    if not golden:  # there a positive of label weight 0 crashes, here its row is ignored
        assert case.name == "head010_posweight0"
        is_ignored = case.inputs()["label_weights"] == 0
        assert not logits.grad[is_ignored].any() and not boxes.grad[is_ignored].any() and losses["loss_rank"] > 0
        return
    for name in ("loss_rank", "loss_sort"):
        assert_close(losses[name], golden[name], name)
    assert_close(logits.grad, golden["grad_scores"], "scores")
    if not golden["loss_bbox"].isfinite():  # perfect boxes: there the factor is infinite, here there is nothing to learn
        assert case.name == "head009_iou1_all" and losses["loss_bbox"] == 0 and not boxes.grad.any()
        return
    assert_close(losses["loss_bbox"], golden["loss_bbox"], "box")
    assert_close(boxes.grad, golden["grad_box"], "box gradient")
    labels = case.inputs()["labels"]
    assert losses["num_positives"] == (labels < case.hyper["num_classes"]).sum()
    if losses["num_positives"] > 0:
        assert_close(head.ranking.balancing.SB_weight, golden["SB_weight"], "factor")
        assert losses["bbox_unbalanced"] == pytest.approx(float(golden["loss_bbox"] / golden["SB_weight"]), rel=1e-6)


@pytest.mark.parametrize("case", cases("head_atss"))
def test_golden_atss_head_with_average_precision(mm, monkeypatch, case):
    weight = case.hyper["loc_weight_ap"]
    head, losses, logits, boxes = atss(mm, monkeypatch, case, loss_cls={"type": "APLoss"}, ranking={"box_weight": weight})
    golden = case.outputs("brs_atss_ap")
    assert_close(losses["loss_ap"], golden["loss_rank"], "AP")
    if case.name != "head010_posweight0":  # here a row that is ignored has no box loss either
        assert_close(losses["loss_bbox"], golden["loss_bbox"], "box")
        assert_close(boxes.grad, golden["grad_box"], "box gradient")
    assert_close(logits.grad, golden["grad_scores"], "scores")
    assert losses["SB_weight"] == weight


@pytest.mark.parametrize("case", cases("head_rpn"))
def test_golden_rpn_head(mm, monkeypatch, case):
    inputs, hyper = case.inputs(), case.hyper
    labels = inputs["labels"]
    # Published boxes are decoded without anchors; GIoU does not change where anchors are shifted and scaled.
    unit = torch.tensor([[-0.5, -0.5, 0.5, 0.5]], dtype=torch.float64).expand(len(labels), 4)
    golden, loss, name = case.outputs("rs_rpn"), {"type": "RankSortLoss", "delta": hyper.get("delta", 0.5)}, "loss_rpn_rank"
    if case.outputs("rs_rpn_alrp"):
        golden, loss, name = case.outputs("rs_rpn_alrp"), {"type": "ALRPLoss", "iou_threshold": 0.7}, "loss_rpn_alrp"
    targets = [[labels[None]], [inputs["label_weights"][None].double()], None, [unit[None]], 1.0]
    options = {"loss_cls": loss, "ranking": {"head_weight": hyper["head_weight"]}, "bbox_coder": mm.coder(hyper["stds"])}
    head = golden_head(mm, monkeypatch, "RankSortRPNHead", targets, unit, **options)
    targets[2] = [head.bbox_coder.decode(unit, inputs["delta_target"].double())[None]]
    logits, deltas = (inputs[key].double().requires_grad_() for key in ("cls_scores", "delta_pred"))
    losses = head.loss_by_feat([as_map(logits)], [as_map(deltas)], [None], [{}])
    assert all("rpn" in key for key in losses) and "rpn_SB_weight" in losses
    sum(value for key, value in losses.items() if "loss" in key).backward()
    if losses["rpn_num_positives"] == 0:  # there a constant without a gradient, here a zero with one
        assert case.name == "head014_rpn_nopos" and losses[name] == losses["loss_rpn_bbox"] == 0
        assert logits.grad is not None and not logits.grad.any() and not deltas.grad.any()
        return
    assert_close(losses[name], golden["loss_rpn_cls" if "alrp" in name else name], name)
    if "loss_rpn_sort" in golden:
        assert_close(losses["loss_rpn_sort"], golden["loss_rpn_sort"], "sorting")
    assert_close(losses["loss_rpn_bbox"], golden["loss_rpn_bbox"], "box")
    assert_close(logits.grad, golden["grad_scores"], "scores")
    assert_close(deltas.grad, golden["grad_delta"], "deltas")
