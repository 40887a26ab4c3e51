"""The mask head of Mask R-CNN beside a box head trained by ranking: the published loss by hand, and real models, small, that learn."""
import copy

import frameworks
import mmdet_two_stage as two_stage
import pytest
import torch

RANKED = {"type": "RankSortMaskHead"}


@pytest.fixture(scope="module")
def mm():
    return frameworks.mmdetection()


@pytest.fixture(scope="module")
def model(mm):
    return two_stage.two_stage(mm, mask_head=RANKED)


def masks_of(mm, model, batch, *, autocast: bool = False) -> tuple[dict, torch.Tensor, dict[str, float]]:
    """What the mask head gets in a training step, its gradient and what it logs."""
    head, seen = model.roi_head.mask_head, []
    original = head.loss_and_target

    def catch(**given):
        given["mask_preds"].retain_grad()
        seen.append(given | (found := original(**given)))
        return found

    head.loss_and_target = catch
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, log = mm.losses_of(model, copy.deepcopy(batch))
        model.zero_grad()
        loss.backward()
    finally:
        del head.loss_and_target
    return seen[0], seen[0]["mask_preds"].grad, two_stage.numbers(log)


def dice_by_hand(given: dict, is_agnostic: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted mean of dice losses as the authors have them, in float64, and the logits that it is of."""
    logits = given["mask_preds"].detach().double().requires_grad_()
    labels = torch.cat([result.pos_gt_labels for result in given["sampling_results"]])
    weights = torch.cat([result.ranked.weights for result in given["sampling_results"]])
    targets = given["mask_targets"].double()
    assert targets.any() and len(labels) == len(logits) > 0
    dice = []
    for mask, label, target in zip(logits, labels.tolist(), targets, strict=True):
        probability = mask[0 if is_agnostic else label].sigmoid()
        dice.append(1 - 2 * (probability * target).sum() / ((probability**2).sum() + (target**2).sum() + 1e-5))
    return (weights * torch.stack(dice)).sum() / weights.sum(), logits


@pytest.mark.parametrize("is_agnostic", [False, True], ids=["per class", "class-agnostic"])
def test_loss_by_hand(mm, model, generator, is_agnostic):
    """Dice weighted by the scores of the boxes, scaled to ranking + sorting; the factor has no gradient."""
    if is_agnostic:
        model = two_stage.two_stage(mm, mask_head=RANKED | {"class_agnostic": True})
    given, gradient, log = masks_of(mm, model, two_stage.with_masks(mm.make_batch(generator)))
    mean, logits = dice_by_hand(given, is_agnostic)
    assert logits.shape[1:] == (1 if is_agnostic else mm.CLASSES, 14, 14)
    assert log["mask_unbalanced"] == pytest.approx(mean.item(), rel=1e-6)
    assert log["loss_mask"] == pytest.approx(log["loss_rank"] + log["loss_sort"], rel=1e-6)
    assert log["mask_SB_weight"] == pytest.approx(log["loss_mask"] / mean.item(), rel=1e-5)
    (mean * log["mask_SB_weight"]).backward()
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=1e-4, atol=1e-6 * float(logits.grad.abs().max()))


@pytest.mark.parametrize("cascade", [False, True], ids=["mask", "cascade mask"])
def test_ten_steps_of_a_small_model(mm, generator, cascade):
    model = two_stage.two_stage(mm, mask_head=RANKED, cascade=cascade)
    calls = []
    for head in two_stage.box_heads(model):
        head.ranking.classification.register_forward_hook(lambda *_: calls.append(1))
    batch = two_stage.with_masks(mm.training_batch())
    first = two_stage.numbers(mm.losses_of(model, copy.deepcopy(batch))[1])
    losses, log = two_stage.train(mm, model, batch)
    stages = ["s0.", "s1."] if cascade else [""]
    assert len(calls) == 11 * len(stages) and losses[-1] < 0.9 * losses[0]
    assert sum(log[f"{stage}mask_unbalanced"] for stage in stages) < sum(first[f"{stage}mask_unbalanced"] for stage in stages)
    without, empty = mm.losses_of(model, two_stage.with_masks(mm.make_batch(generator, boxes=0)))
    assert list(empty) == list(log) and all(empty[f"{stage}loss_mask"] == 0 for stage in stages)
    model.zero_grad()
    without.backward()
    heads = model.roi_head.mask_head if cascade else [model.roi_head.mask_head]
    assert all(value.grad is not None and not value.grad.any() for head in heads for value in head.parameters())
    found = two_stage.predict(model, batch)
    assert all(instances.masks.shape == (len(instances), mm.SIDE, mm.SIDE) and instances.masks.any() for instances in found)


def test_bfloat16_autocast(mm, model, generator):
    """Of logits in 16 bits, sums in more."""
    given, gradient, log = masks_of(mm, model, two_stage.with_masks(mm.make_batch(generator)), autocast=True)
    mean, _ = dice_by_hand(given)
    assert given["mask_preds"].dtype == gradient.dtype == torch.bfloat16 and gradient.isfinite().all() and gradient.any()
    assert log["mask_unbalanced"] == pytest.approx(mean.item(), rel=1e-5)
    assert log["loss_mask"] == pytest.approx(log["loss_rank"] + log["loss_sort"], rel=1e-5)


def test_a_weight_in_place_of_the_balancing(mm, generator):
    model = two_stage.two_stage(mm, mask_head=RANKED | {"mask_weight": 3.0})
    assert "roi_head.mask_head.balancing.SB_weight" not in model.state_dict()
    log = two_stage.numbers(mm.losses_of(model, two_stage.with_masks(mm.make_batch(generator)))[1])
    assert log["mask_SB_weight"] == 3 and log["loss_mask"] == pytest.approx(3 * log["mask_unbalanced"])


def test_factor_is_in_checkpoints(mm, model, generator):
    mm.losses_of(model, two_stage.with_masks(mm.make_batch(generator)))
    again = two_stage.two_stage(mm, mask_head=RANKED, seed=1)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.roi_head.mask_head.balancing.SB_weight, model.roi_head.mask_head.balancing.SB_weight)
    assert again.roi_head.mask_head.balancing.SB_weight != 50


def test_needs_a_ranked_box_head(mm, generator):
    model = two_stage.two_stage(mm, two_stage.SOFTMAX, mask_head=RANKED)
    with pytest.raises(TypeError, match="RankSortMaskHead: bbox_head must be a RankSortBBoxHead"):
        mm.losses_of(model, two_stage.with_masks(mm.make_batch(generator)))


def test_some_masks_of_many(mm, generator):
    """Four masks of two images, with their own weights and targets; each positive's turn comes."""
    model = two_stage.two_stage(mm, mask_head=RANKED, kind="RankSortRoIHead")
    model.roi_head.max_masks = 4
    batch, seen = two_stage.with_masks(mm.make_batch(generator)), []
    box_head = model.roi_head.bbox_head
    original = box_head.loss_and_target
    box_head.loss_and_target = lambda **given: seen.append(given["sampling_results"]) or original(**given)
    drawn = set()
    for _ in range(8):
        given, gradient, log = masks_of(mm, model, batch)
        assert gradient.shape[0] == 4 and log["num_positives"] >= 6
        assert log["mask_unbalanced"] == pytest.approx(dice_by_hand(given)[0].item(), rel=1e-6)
        for few, all_of_image in zip(given["sampling_results"], seen[-1], strict=True):
            places = [all_of_image.pos_inds.tolist().index(place) for place in few.pos_inds.tolist()]
            assert places == sorted(places)
            for name in ("pos_priors", "pos_gt_labels", "pos_assigned_gt_inds", "pos_gt_bboxes"):
                assert torch.equal(getattr(few, name), getattr(all_of_image, name)[places]), name
            assert torch.equal(few.ranked.weights, all_of_image.ranked.weights[places])
        drawn |= {(image, place) for image, few in enumerate(given["sampling_results"]) for place in few.pos_inds.tolist()}
    assert len(drawn) > 4
    model.roi_head.max_masks = 100
    given, _, log = masks_of(mm, model, batch)
    assert len(given["mask_preds"]) == log["num_positives"]
