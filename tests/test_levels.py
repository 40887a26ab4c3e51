"""Shapes of a head's levels that could mean two things: one form for all levels, and the logits' own where several remain."""
import pytest
import torch

from rsloss_kernels import average_precision_loss, ghm_classification_loss, gradient_density, rank_sort_loss, sigmoid_focal_loss
from rsloss_kernels.losses.levels import read_levels, read_targets, read_values

LOSSES = {
    "focal": lambda *arguments, **options: sigmoid_focal_loss(*arguments, reduction="sum", **options),
    "rank_sort": lambda *arguments, **options: sum(rank_sort_loss(*arguments, **options)),
    "ap": average_precision_loss,
    "ghm": ghm_classification_loss,
}


def as_rows(level: torch.Tensor, classes: int) -> torch.Tensor:
    return level.movedim(1, -1).reshape(level.shape[0], -1, classes)


@pytest.mark.parametrize("loss", LOSSES)
def test_as_many_places_as_classes_each_way(loss, generator):
    """[B, *spatial, C] and [B, C, *spatial] are one shape on the first level; the second one tells."""
    maps = [torch.randn((2, 4, side, side), generator=generator) for side in (4, 3)]
    behind = [(torch.rand((2, side, side, 4), generator=generator) > 0.8).float() for side in (4, 3)]
    wanted = LOSSES[loss](torch.cat([as_rows(level, 4) for level in maps], 1), torch.cat([part.flatten(1, 2) for part in behind], 1))
    in_front = [part.movedim(-1, 1).contiguous() for part in behind]
    for targets in (behind, in_front):
        got = LOSSES[loss](maps, targets, layout="anchor_major", num_classes=4)
        assert float(got) == pytest.approx(float(wanted), rel=1e-6)
    # Alone the first level's are read as the logits are.
    alone = LOSSES[loss](maps[:1], in_front[:1], layout="anchor_major", num_classes=4)
    assert float(alone) == pytest.approx(float(LOSSES[loss](as_rows(maps[0], 4), behind[0].flatten(1, 2))), rel=1e-6)


def test_one_class_with_as_many_anchors_as_places(generator):
    """Weights in the shape of the logits are the elements'; class indices are the rows'."""
    level = torch.randn((1, 3, 3, 3), generator=generator)
    levels = read_levels("test", level, "anchor_major", 1)
    values = torch.arange(27.0).view(1, 3, 3, 3)
    (as_logits,), has_rows = read_values(levels, "weight", values, True, True)
    assert not has_rows and torch.equal(as_logits.flatten(), values.flatten())
    (labels,), _ = read_targets(levels, values.long() % 2, None, "last")
    assert not labels.is_floating_point() and torch.equal(labels.view(3, 9), (values.long() % 2).view(9, 3).T)


def test_levels_in_several_forms_are_refused(generator):
    maps = [torch.randn((1, 2, side, side), generator=generator) for side in (4, 3)]
    targets = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 3, 2)]
    with pytest.raises(ValueError, match=r"targets must have one form on all levels, got \[1, 2, 4, 4\] and \[1, 3, 3, 2\]"):
        sigmoid_focal_loss(maps, targets, layout="anchor_major", num_classes=2)


def test_integral_dense_targets_of_a_list_are_those_of_a_tensor(generator):
    logits, targets = torch.randn((4, 3), generator=generator).half(), torch.zeros(4, 3, dtype=torch.long)
    targets[0, 0] = 70_000  # beyond float16
    assert average_precision_loss([logits], [targets]) == average_precision_loss(logits, targets)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (100, 0), (0, 3)], ids=str)
def test_no_elements(shape):
    logits = torch.zeros(shape, requires_grad=True)
    total = sigmoid_focal_loss(logits, torch.zeros(shape), reduction="sum")
    total.backward()
    assert total == 0 and logits.grad.shape == shape
    assert sigmoid_focal_loss(logits, torch.zeros(shape)).shape == shape


def test_what_a_list_cannot_be():
    with pytest.raises(ValueError, match=r"logits must have shape \[rows, ..., C\] in a list, got \[3\]"):
        rank_sort_loss([torch.zeros(3), torch.zeros(2)], [torch.zeros(3), torch.zeros(2)])
    with pytest.raises(TypeError, match="gradient_density: pred must be a Tensor, got list"):
        gradient_density([torch.zeros(4, 3)], [torch.zeros(4, dtype=torch.long)])


def test_expanded_weights_of_a_list_are_those_of_rows(generator):
    levels = read_levels("test", [torch.randn((5, 3), generator=generator)], "rows", None)
    from rsloss_kernels.losses.levels import unexpanded

    (weight,) = unexpanded(levels, [torch.rand((5, 1), generator=generator).expand(5, 3)])
    assert weight.shape == (5,)
