"""Box heads of Faster and Cascade R-CNN trained by ranking: the authors' outputs, values by hand, and real models, small, that learn."""
import copy
import pathlib
import warnings

import frameworks
import golden_vectors
import mmdet_two_stage as two_stage
import pytest
import torch
import torch.distributed as dist
from harness import assert_within
from rsloss_kernels import rank_sort_loss
from torch.nn.parallel import DistributedDataParallel

GATE = 1e-9
LOGGED = ["bbox_unbalanced", "SB_weight", "num_positives", "positives_iou"]
OF_RPN = ["loss_rpn_cls", "loss_rpn_bbox"]
GOLDEN = [case for case in golden_vectors.cases("rank_head") if case.manifest["kind"] == "head_atss"]


@pytest.fixture(scope="module")
def mm():
    return frameworks.mmdetection()


@pytest.fixture(scope="module")
def faster(mm):
    return two_stage.two_stage(mm)


def assert_close(got, wanted, label):
    wanted = wanted.double().reshape(got.shape)
    assert_within(got.detach().double(), wanted, GATE * float(wanted.abs().amax()) + 1e-14, label)


class BoxesThemselves:
    """A coder whose deltas are the boxes, for originals that recorded boxes."""

    encode_size = 4

    @staticmethod
    def decode(rois, deltas):
        return deltas


@pytest.mark.parametrize("case", GOLDEN, ids=[case.name for case in GOLDEN])
def test_golden_head(mm, case):
    """The published RoI head is the published ATSS head, but for no positives."""
    from mmdet.registry import MODELS

    inputs, golden, classes = case.inputs(), case.outputs("rs_atss"), case.hyper["num_classes"]
    loss = {"type": "RankSortLoss", "delta": case.hyper["delta"]}
    config = {"type": "RankSortBBoxHead", "in_channels": 1, "fc_out_channels": 1, "reg_class_agnostic": True, "loss_cls": loss}
    head = MODELS.build(config | {"num_classes": classes}).double()
    head.bbox_coder = BoxesThemselves()
    logits, boxes = (inputs[name].double().requires_grad_() for name in ("cls_scores", "box_pred"))
    targets = inputs["box_target"].double()
    rois = torch.cat([torch.zeros(len(boxes), 1), targets], 1)
    losses = head.loss(logits, boxes, rois, inputs["labels"], inputs["label_weights"].double(), targets)
    sum(value for key, value in losses.items() if "loss" in key).backward()
    assert list(losses) == ["loss_rank", "loss_sort", "loss_bbox", *LOGGED] and all(value.isfinite() for value in losses.values())
    if not golden:  # there a positive of label weight 0 crashes, here its row is ignored
        assert case.name == "head010_posweight0" and losses["loss_rank"] > 0 and not logits.grad[inputs["label_weights"] == 0].any()
        return
    for name in ("loss_rank", "loss_sort"):
        assert_close(losses[name], golden[name], name)
    assert_close(logits.grad, golden["grad_scores"], "scores")
    if not golden["loss_bbox"].isfinite():  # perfect boxes: there the factor is infinite, here there is nothing to learn
        assert case.name == "head009_iou1_all" and losses["loss_bbox"] == 0 and not boxes.grad.any()
        return
    assert_close(losses["loss_bbox"], golden["loss_bbox"], "box")
    assert_close(boxes.grad, golden["grad_box"], "box gradient")


def test_losses_by_hand(mm, faster, generator):
    """What the head gets in a training step, put through the library's functions and the framework's own GIoU loss."""
    from mmdet.structures.bbox import bbox_overlaps

    head, seen = faster.roi_head.bbox_head, []
    original = head.loss_and_target
    head.loss_and_target = lambda **given: seen.append(given) or original(**given)
    try:
        _, log = mm.losses_of(faster, mm.make_batch(generator))
    finally:
        del head.loss_and_target
    (given,) = seen
    logits, deltas, rois = given["cls_score"], given["bbox_pred"], given["rois"]
    assert logits.shape == (len(rois), mm.CLASSES) and deltas.shape == (len(rois), 4 * mm.CLASSES)
    labels, quality, giou, weight = [], [], [], []
    for row, of_image in enumerate(
        (result, place)
        for result in given["sampling_results"]
        for place in [*range(len(result.pos_priors)), *[None] * len(result.neg_priors)]
    ):
        result, place = of_image
        labels.append(mm.CLASSES if place is None else int(result.pos_gt_labels[place]))
        quality.append(torch.zeros(()))
        if place is None:
            continue
        own = deltas[row, 4 * labels[-1] : 4 * labels[-1] + 4][None]
        box, target = head.bbox_coder.decode(rois[row, 1:][None], own), result.pos_gt_bboxes[place][None]
        quality[-1] = bbox_overlaps(box, target, is_aligned=True)[0].detach()
        giou.append(1 - bbox_overlaps(box, target, mode="giou", is_aligned=True)[0])
        weight.append(logits[row].detach().sigmoid().max())
    ranking, sorting = rank_sort_loss(logits, torch.tensor(labels), torch.stack(quality))
    box = (torch.stack(weight) * torch.stack(giou)).sum() / sum(weight)
    wanted = {"loss_rank": ranking, "loss_sort": sorting, "loss_bbox": ranking + sorting, "bbox_unbalanced": box}
    wanted |= {"SB_weight": (ranking + sorting) / box, "num_positives": len(giou), "positives_iou": sum(quality) / len(giou)}
    assert len(giou) >= 6
    for key, value in wanted.items():
        assert log[key].item() == pytest.approx(torch.as_tensor(value).item(), rel=2e-6), key
    noted = torch.cat([result.ranked.weights for result in given["sampling_results"]])
    torch.testing.assert_close(noted, torch.stack(weight), rtol=1e-6, atol=0)
    assert given["sampling_results"][1].ranked.reference == log["loss_rank"] + log["loss_sort"]


MODELS = {
    "faster": {},
    "cascade": {"cascade": True},
    "ap": {"box_head": two_stage.RANKED | {"loss_cls": {"type": "APLoss"}, "ranking": {"box_weight": 2.0}}},
    "rpn too": {"rpn": {"type": "RankSortRPNHead"}},
}


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_of_a_small_model(mm, generator, name):
    """One ranking per head and step over both images, a smaller loss after ten steps, zeros without objects, detections."""
    model = two_stage.two_stage(mm, **MODELS[name])
    calls = []
    for stage, head in enumerate(two_stage.box_heads(model)):
        head.ranking.classification.register_forward_hook(lambda *_, stage=stage: calls.append(stage))
    batch = mm.training_batch()
    losses, log = two_stage.train(mm, model, batch)
    stages = len(two_stage.box_heads(model))
    assert calls == [*range(stages)] * 10 and losses[-1] < 0.95 * losses[0], losses
    counts = [key for key in log if key.endswith("num_positives") and "rpn" not in key]
    assert counts == [f"s{stage}.num_positives" for stage in range(stages)] if name == "cascade" else counts == ["num_positives"]
    assert all(log[key] >= 6 for key in counts)  # the objects are among the proposals

    without, empty = mm.losses_of(model, mm.make_batch(generator, boxes=0))
    assert list(empty) == list(log)
    assert all(value == 0 for key, value in empty.items() if "loss" in key and key != "loss" and "rpn" not in key)
    model.zero_grad()
    without.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    assert not any(value.grad.any() for value in model.roi_head.parameters())
    found = two_stage.predict(model, batch)
    assert all(0 < len(instances) <= 20 and 0 < instances.scores.min() and instances.scores.max() < 1 for instances in found)


def test_stages_balance_for_themselves(mm, generator):
    model = two_stage.two_stage(mm, cascade=True)
    log = two_stage.numbers(mm.losses_of(model, mm.make_batch(generator))[1])
    factors = [float(head.ranking.balancing.SB_weight) for head in two_stage.box_heads(model)]
    assert factors[0] != factors[1]
    for stage, weight in enumerate((1, 0.5)):
        parts = {key.removeprefix(f"s{stage}."): value for key, value in log.items() if key.startswith(f"s{stage}.")}
        assert parts["SB_weight"] == pytest.approx(factors[stage], rel=1e-6)
        assert parts["loss_bbox"] == pytest.approx(weight * factors[stage] * parts["bbox_unbalanced"], rel=1e-5)
        assert parts["loss_bbox"] == pytest.approx(parts["loss_rank"] + parts["loss_sort"], rel=1e-5)


def test_cascade_refines_boxes_of_the_last_class_too(mm, generator):
    """Without a background channel the last logit is a class, in the refinement of both training and prediction."""
    model = two_stage.two_stage(mm, two_stage.RANKED | {"reg_class_agnostic": False}, cascade=True)
    head, seen = model.roi_head.bbox_head[0], []
    torch.nn.init.constant_(head.fc_cls.bias[-1:], 9.0)
    original = head.regress_by_class
    head.regress_by_class = lambda rois, label, *rest: seen.append(label) or original(rois, label, *rest)
    batch = mm.make_batch(generator, boxes=0)
    mm.losses_of(model, copy.deepcopy(batch))
    two_stage.predict(model, batch)
    assert len(seen) == 4 and all(len(labels) and (labels == mm.CLASSES - 1).all() for labels in seen)
    scores = head.loss_cls.get_activation(torch.tensor([[-1.0, 2.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(scores, torch.tensor([[-1.0, 2.0, -torch.inf]]).sigmoid())


def test_bfloat16_autocast(mm, faster, generator):
    batch = mm.make_batch(generator)
    exact, log = mm.losses_of(faster, copy.deepcopy(batch))
    assert list(log) == ["loss", *OF_RPN, "loss_rank", "loss_sort", "loss_bbox", *LOGGED]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = mm.losses_of(faster, batch)
    faster.zero_grad()
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.1)
    assert all(value.grad.isfinite().all() for value in faster.parameters() if value.requires_grad)
    assert faster.roi_head.bbox_head.fc_reg.weight.grad.any() and faster.roi_head.bbox_head.fc_cls.weight.grad.any()


def test_factors_are_in_checkpoints(mm, faster, generator):
    mm.losses_of(faster, mm.make_batch(generator))
    again = two_stage.two_stage(mm, seed=1)
    again.load_state_dict(faster.state_dict(), strict=True)
    factor = again.roi_head.bbox_head.ranking.balancing.SB_weight
    assert factor != 50 and torch.equal(factor, faster.roi_head.bbox_head.ranking.balancing.SB_weight)


def test_warnings_of_configurations_for_other_losses(mm, faster, generator):
    batch = mm.make_batch(generator)
    model = two_stage.two_stage(mm, training={"sampler": two_stage.SOME}, testing={"score_thr": 0.05})
    with pytest.warns(UserWarning, match="sampler.num is 24: proposals that it leaves out are not ranked"):
        mm.losses_of(model, copy.deepcopy(batch))
    with pytest.warns(UserWarning, match="RankSortBBoxHead: test_cfg.score_thr is 0.05, but ranking orders scores"):
        two_stage.predict(model, batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(sampler|score_thr)")
        mm.losses_of(model, copy.deepcopy(batch))  # told once
        mm.losses_of(faster, copy.deepcopy(batch))
        two_stage.predict(faster, batch)
        model.test_cfg.rcnn.score_thr_is_calibrated = True
        two_stage.predict(model, batch)


def test_bad_configurations(mm, faster):
    with pytest.raises(TypeError, match="loss_cls must be RankSortLoss, APLoss or ALRPLoss, got FocalLoss"):
        two_stage.two_stage(mm, two_stage.RANKED | {"loss_cls": {"type": "FocalLoss"}})
    with pytest.raises(NotImplementedError, match="use_sigmoid must be True"):  # what a configuration for softmax leaves there
        two_stage.two_stage(mm, two_stage.RANKED | {"loss_cls": {"type": "RankSortLoss", "use_sigmoid": False}})
    with pytest.raises(TypeError, match="RankSortLoss ranks one sigmoid logit per foreground class: take RankSortBBoxHead"):
        two_stage.two_stage(mm, two_stage.SOFTMAX | {"loss_cls": {"type": "RankSortLoss"}})
    with pytest.raises(ValueError, match="reg_decoded_bbox must be True"):
        two_stage.two_stage(mm, two_stage.RANKED | {"reg_decoded_bbox": False})
    with pytest.raises(ValueError, match="reduction_override must be None, .* got 'sum'"):
        faster.roi_head.bbox_head.loss(*[torch.zeros(0)] * 6, reduction_override="sum")


def train_in_process(rank: int, folder: str) -> None:
    mm = frameworks.mmdetection()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, group in (("local", None), ("global", "default")):
        boxes = two_stage.RANKED | {"loss_cls": {"type": "RankSortLoss", "process_group": group}}
        model = two_stage.two_stage(mm, boxes, mask_head={"type": "RankSortMaskHead", "process_group": group})
        parallel = DistributedDataParallel(model)
        batch = two_stage.with_masks(mm.make_batch(torch.Generator().manual_seed(3), boxes=3 if rank == 0 else 0))
        loss, log = model.parse_losses(parallel(**model.data_preprocessor(batch, True), mode="loss"))
        loss.backward()
        gradient = torch.cat([value.grad.flatten() for value in model.roi_head.parameters()])
        results[name] = {"log": two_stage.numbers(log), "gradient": gradient}
    torch.save(results, pathlib.Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_one_without_positives(mm, tmp_path):
    """Boxes and masks; no process waits for another, nor differs in what it logs."""
    torch.multiprocessing.spawn(train_in_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    ranked = ["loss_rank", "loss_sort", "loss_bbox", "loss_mask"]
    for name in ("local", "global"):
        keys = ["loss", *OF_RPN, *ranked[:3], *LOGGED, "loss_mask", "mask_unbalanced", "mask_SB_weight"]
        assert list(first[name]["log"]) == list(second[name]["log"]) == keys
        assert torch.equal(first[name]["gradient"], second[name]["gradient"]) and first[name]["gradient"].any()
    local, alone = first["local"]["log"], second["local"]["log"]
    assert all(local[key] > 0 and alone[key] == 0 for key in ranked) and local["num_positives"] >= 6 and alone["num_positives"] == 0
    # One ranking and one mean over both: the same values on both, more negatives than the first has by itself.
    joined, other = first["global"]["log"], second["global"]["log"]
    assert all(joined[key] == other[key] for key in [*ranked, "bbox_unbalanced", "mask_unbalanced", "SB_weight", "mask_SB_weight"])
    assert joined["loss_rank"] > local["loss_rank"] and joined["bbox_unbalanced"] == pytest.approx(local["bbox_unbalanced"])
    assert joined["loss_mask"] == pytest.approx(joined["loss_rank"] + joined["loss_sort"])
