"""Balanced group softmax in the box heads of MMDetection: Faster and Cascade R-CNN, groups from counts in a configuration or a file."""
import copy
import json

import frameworks
import mmdet_two_stage as two_stage
import pytest
import torch
from rsloss_kernels import ClassGroups, group_softmax_loss, group_softmax_scores

COUNTS = [3, 2000, 50, 7, 150]  # groups 0 3, 2, 4, 1
LOSS = {"type": "GroupSoftmaxLoss", "counts": COUNTS}


@pytest.fixture(scope="module")
def mm():
    return frameworks.mmdetection()


@pytest.fixture(scope="module")
def build(mm):
    from mmdet.registry import MODELS

    return lambda **parts: MODELS.build({"type": "GroupSoftmaxLoss", **parts})


def with_groups(mm, loss=None, **parts):
    return two_stage.two_stage(mm, two_stage.SOFTMAX | {"loss_cls": LOSS | (loss or {})}, training={"sampler": two_stage.SOME}, **parts)


def test_losses_by_hand(mm, generator):
    """The head's classification loss is the library's function on what the head gets, with the same random numbers."""
    model = with_groups(mm, {"others_ratio": 0.5, "loss_weight": 2.0})
    head, seen = model.roi_head.bbox_head, []
    original = head.loss
    head.loss = lambda logits, deltas, rois, labels, *rest, **options: (
        seen.append((logits, labels, torch.get_rng_state())) or original(logits, deltas, rois, labels, *rest, **options)
    )
    loss, log = mm.losses_of(model, mm.make_batch(generator))
    ((logits, labels, state),) = seen
    groups = ClassGroups.from_counts(COUNTS)
    assert groups.groups == [[0, 3], [2], [4], [1]] and logits.shape == (48, groups.num_logits) == (48, 2 + 3 + 2 + 2 + 2)
    torch.set_rng_state(state)
    wanted = 2 * group_softmax_loss(logits, labels, groups, others_ratio=0.5, background="last").sum()
    assert log["loss_cls"].item() == wanted.item() > 0
    own, by_hand = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (log["loss_cls"], wanted))
    assert torch.equal(own, by_hand)
    assert list(log) == ["loss", "loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "acc_objectness", "acc_classes", "loss_bbox"]

    scores = group_softmax_scores(logits.detach(), groups, background="last")
    assert scores.shape == (48, mm.CLASSES + 1)
    is_foreground = labels < mm.CLASSES
    right = (scores[is_foreground, :-1].argmax(1) == labels[is_foreground]).float().mean() * 100
    assert log["acc_classes"].item() == pytest.approx(right.item(), abs=1e-3) and is_foreground.sum() >= 6


def test_scores_of_predictions(mm, generator):
    """Detections carry products of two softmaxes, the background dropped."""
    model = with_groups(mm)
    head, seen = model.roi_head.bbox_head, []
    head.register_forward_hook(lambda module, arguments, result: seen.append(result[0]))
    found = two_stage.predict(model, mm.make_batch(generator, images=1))[0]
    scores = group_softmax_scores(seen[0], head.loss_cls.groups, background="last")[:, :-1]
    assert len(found) == 20 and found.scores.max() == scores.max()
    assert all((scores[:, label] == score).any() for score, label in zip(found.scores, found.labels, strict=True))


@pytest.mark.parametrize("cascade", [False, True], ids=["faster", "cascade"])
def test_ten_steps_of_a_small_model(mm, generator, cascade):
    model = with_groups(mm, cascade=cascade)
    calls = []
    heads = two_stage.box_heads(model)
    for head in heads:
        head.loss_cls.register_forward_hook(lambda *_: calls.append(1))
    batch = mm.training_batch()
    losses, log = two_stage.train(mm, model, batch)
    assert len(calls) == 10 * len(heads) and losses[-1] < 0.8 * losses[0]
    assert {f"{stage}acc_classes" for stage in (["s0.", "s1."] if cascade else [""])} < set(log)
    without, empty = mm.losses_of(model, mm.make_batch(generator, boxes=0))
    assert list(empty) == list(log) and without.isfinite()
    assert all(0 < len(instances) <= 20 for instances in two_stage.predict(model, batch))


def test_bfloat16_autocast(mm, generator):
    model, batch = with_groups(mm, {"others_ratio": None}), mm.make_batch(generator)
    model.train_cfg.rcnn.sampler = model.roi_head.train_cfg.sampler = two_stage.ALL
    model.roi_head.init_assigner_sampler()
    exact, _ = mm.losses_of(model, copy.deepcopy(batch))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = mm.losses_of(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.1)
    assert model.roi_head.bbox_head.fc_cls.weight.grad.isfinite().all() and model.roi_head.bbox_head.fc_cls.weight.grad.any()


def test_losses_of_groups_by_name(mm, generator):
    model = with_groups(mm, {"return_dict": True})
    _, log = mm.losses_of(model, mm.make_batch(generator))
    names = [f"loss_cls_group{group}" for group in range(5)]
    assert [key for key in log if "loss_cls_group" in key] == names
    parts = sum(log[key] for key in [*names, "loss_rpn_cls", "loss_rpn_bbox", "loss_bbox"])
    assert log["loss"].item() == pytest.approx(parts.item(), rel=1e-6)


def test_groups_are_in_checkpoints(mm):
    model, other = with_groups(mm), with_groups(mm, {"counts": COUNTS[::-1]}, seed=1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert other.roi_head.bbox_head.loss_cls.groups.groups == [[0, 3], [2], [4], [1]]


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def annotations(path, categories, found):
    content = {"images": [], "categories": categories}
    if found is not None:
        content["annotations"] = found
    return write(path, content)


def test_groups_from_files(build, tmp_path):
    by_list = build(counts=write(tmp_path / "counts.json", COUNTS)).groups
    assert by_list.groups == build(counts=COUNTS).groups.groups == build(groups=[[0, 3], [2], [4], [1]]).groups.groups

    categories = [{"id": number, "name": name} for number, name in ((7, "cat"), (2, "dog"), (9, "rare"))]
    of_image = [{"category_id": 7}] * 3 + [{"category_id": 2}] * 12
    of_image += [{"category_id": 2, "iscrowd": 1}] * 100 + [{"category_id": 9, "ignore": True}] * 20
    path = annotations(tmp_path / "coco.json", categories, of_image)
    from rsloss_kernels.integrations.mmdet import read_class_counts

    assert read_class_counts(path) == [3, 12, 0]  # in the order of the file, without crowds
    assert read_class_counts(path, ["rare", "cat"]) == [3, 0]  # which names alone do not change
    assert build(counts=path, boundaries=[10]).groups.groups == [[0, 2], [1]]

    lvis = annotations(tmp_path / "lvis.json", [category | {"instance_count": 5} for category in categories], None)
    assert read_class_counts(lvis) == [5, 5, 5]
    annotations(tmp_path / "coco.json", categories, of_image[:1])
    assert read_class_counts(path) == [1, 0, 0]  # a file that has changed is read anew


def test_bad_configurations(mm, build, tmp_path):
    with pytest.raises(ValueError, match="one of counts and groups must be given, got none"):
        build()
    with pytest.raises(ValueError, match="got both"):
        build(counts=COUNTS, groups=[[0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="num_classes must be 4"):
        with_groups(mm, {"counts": COUNTS[:4]})
    with pytest.raises(ValueError, match="classes must be None for a list of counts"):
        build(counts=write(tmp_path / "counts.json", COUNTS), classes=["cat"])
    with pytest.raises(ValueError, match="must hold a list of counts or annotations with categories"):
        build(counts=write(tmp_path / "other.json", {"counts": COUNTS}))
    path = annotations(tmp_path / "none.json", [{"id": 1, "name": "cat"}], [])
    with pytest.raises(ValueError, match="has no annotations, and no instance_count"):
        build(counts=path)
    with pytest.raises(ValueError, match=r"must hold all classes, missing \['dog'\]"):
        build(counts=path, classes=["dog"])
