"""ClassGroups: which class belongs where, checkpoints and copies; the conversion of an ordinary classifier; the module's accuracy."""
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from rsloss_kernels import ClassGroups, GroupSoftmaxLoss, convert_classifier, group_softmax_loss, group_softmax_scores

COUNTS = [3, 7, 9, 10, 99, 100, 999, 1000, 25000, 0]
FORMS = pytest.mark.parametrize("form, place", [("softmax", "first"), ("softmax", "last"), ("sigmoid", "first"), ("sigmoid", "last")])


@pytest.mark.parametrize("counts", [COUNTS, tuple(COUNTS), torch.tensor(COUNTS), np.array(COUNTS)], ids=["list", "tuple", "tensor", "array"])
def test_a_count_on_a_boundary_belongs_to_the_group_above(counts):
    groups = ClassGroups.from_counts(counts)
    assert groups.groups == [[0, 1, 2, 9], [3, 4], [5, 6], [7, 8]]
    assert (groups.num_classes, groups.num_groups, groups.num_logits, groups.background_group) == (10, 5, 16, 0)
    # The background and the foreground; the others of a group, then its classes.
    assert groups.starts == (0, 2, 7, 10, 13, 16) and groups.others == (1, 2, 7, 10, 13)
    assert [groups.column_of(number) for number in range(11)] == [3, 4, 5, 8, 9, 11, 12, 14, 15, 6, 0]


@pytest.mark.parametrize("boundaries", [(), (10**9,), (0.5, 9.5, 99.5), (0,)])
def test_any_boundaries(boundaries):
    groups = ClassGroups.from_counts(COUNTS, boundaries)
    wanted = [
        [number for number, count in enumerate(COUNTS) if low <= count < high]
        for low, high in zip((-1, *boundaries), (*boundaries, math.inf), strict=True)
    ]
    assert groups.groups == wanted and groups.num_logits == len(COUNTS) + 1 + len(wanted) + 1


@FORMS
def test_every_column_is_somebodys(form, place):
    groups = ClassGroups([[2, 0], [], [1]], background_form=form, background_group=place)
    others = [column for column in groups.others if column != -1]
    columns = [groups.column_of(number) for number in range(4)]
    assert sorted(others + columns) == list(range(groups.num_logits))
    assert groups.groups == [[2, 0], [], [1]]  # classes in the order given
    assert groups.column_of(2) + 1 == groups.column_of(0)
    assert groups.background_group == (0 if place == "first" else 3)
    assert len(others) == (4 if form == "softmax" else 3)


@FORMS
def test_copies_and_checkpoints(form, place, tmp_path):
    groups = ClassGroups([[2, 0], [], [1]], background_form=form, background_group=place)
    torch.save(groups.state_dict(), tmp_path / "groups.pt")
    assert set(groups.state_dict()) == {"class_columns", "group_starts", "group_others"}
    loaded = ClassGroups([[0, 1, 2]])  # takes over the groups of the checkpoint
    loaded.load_state_dict(torch.load(tmp_path / "groups.pt"))
    logits = torch.randn(3, groups.num_logits)
    expected = group_softmax_scores(logits, groups)
    for twin in (loaded, copy.deepcopy(groups), pickle.loads(pickle.dumps(groups)), copy.deepcopy(groups).half().float()):
        assert (twin.starts, twin.others, twin.background_group) == (groups.starts, groups.others, groups.background_group)
        assert twin.groups == groups.groups and twin.class_columns.dtype == torch.int32
        assert torch.equal(group_softmax_scores(logits, twin), expected)


def test_groups_in_a_model():
    """They move with it and are in its checkpoint, under the name of the loss."""
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 9), "loss": GroupSoftmaxLoss(ClassGroups([[0, 1], [2, 3]]))})
    names = {f"loss.groups.{name}" for name in ("class_columns", "group_starts", "group_others")}
    assert names <= set(model.state_dict())
    assert model.to("meta")["loss"].groups.class_columns.is_meta


def test_a_checkpoint_of_another_loss_leaves_the_groups():
    model = torch.nn.ModuleDict({"loss": GroupSoftmaxLoss(ClassGroups([[0], [1, 2]]))})
    with pytest.warns(UserWarning, match="ClassGroups: the checkpoint is of a model with another loss"):
        model.load_state_dict({})
    # Part of the tables is as good as none.
    other = GroupSoftmaxLoss(ClassGroups([[1], [0, 2]])).state_dict()
    with pytest.warns(UserWarning, match="it has no class_columns, group_starts, group_others|another loss"):
        model.load_state_dict({"loss.groups.class_columns": other["groups.class_columns"]})
    groups = model["loss"].groups
    assert groups.groups == [[0], [1, 2]] and groups.class_columns.tolist() == [groups.column_of(number) for number in range(4)]


def test_class_weights_keep_their_precision():
    factors = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    module = GroupSoftmaxLoss(ClassGroups([[0, 1]]), class_weights=factors).half()
    assert torch.equal(module.class_weights, factors) and set(module.state_dict()) == set(module.groups.state_dict(prefix="groups."))


BROKEN = {
    "classes": (lambda state: ClassGroups([[0, 1]]).state_dict(), "hold 2 classes, wanted 3"),
    "starts": (lambda state: state | {"group_starts": torch.tensor([0, 2, 1, 6])}, "group_starts must ascend"),
    "starts_size": (lambda state: state | {"group_starts": torch.tensor([0, 2, 6])}, "group_starts must ascend from 0 and be one more"),
    "others": (lambda state: state | {"group_others": torch.tensor([1, 5, 4])}, "group_others must lie within their groups"),
    "columns": (lambda state: state | {"class_columns": torch.tensor([3, 3, 5, 0], dtype=torch.int32)}, "hold every column once"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_fits_no_groups_is_refused(name):
    groups = ClassGroups([[0], [1, 2]])
    change, message = BROKEN[name]
    with pytest.raises(RuntimeError, match=message):
        groups.load_state_dict(change(dict(groups.state_dict())))
    assert groups.groups == [[0], [1, 2]] and groups.class_columns.tolist() == ClassGroups([[0], [1, 2]]).class_columns.tolist()


# --- conversion of an ordinary classifier ---


@FORMS
@pytest.mark.parametrize("background", ["first", "last"])
def test_converted_classifier(form, place, background, generator):
    groups = ClassGroups([[2, 0], [], [1, 3]], background_form=form, background_group=place)
    weight, bias = torch.randn((5, 6), generator=generator), torch.randn(5, generator=generator)
    features = torch.randn((7, 6), generator=generator)
    new_weight, new_bias = convert_classifier(weight, bias, groups, background=background)
    assert new_weight.shape == (groups.num_logits, 6) and new_bias.shape == (groups.num_logits,)
    old, new = features @ weight.t() + bias, features @ new_weight.t() + new_bias
    background_logit = old[:, 0] if background == "first" else old[:, 4]
    of_classes = old[:, 1:] if background == "first" else old[:, :4]
    foreground = of_classes.mean(1) + math.log(4)
    for number in range(4):
        torch.testing.assert_close(new[:, groups.column_of(number)], of_classes[:, number])
    for group, column in enumerate(groups.others):
        if group != groups.background_group:
            torch.testing.assert_close(new[:, column], background_logit)
    scores = group_softmax_scores(new, groups, background="first")
    torch.testing.assert_close(scores[:, 0], torch.sigmoid(background_logit - foreground))
    without_bias, zeros = convert_classifier(weight, None, groups, background=background)
    assert torch.equal(without_bias, new_weight) and zeros.dtype == weight.dtype


def test_conversion_keeps_the_background_of_equal_classes(generator):
    """Where the logits of the classes are equal, the chance of the background is that of the plain softmax."""
    groups = ClassGroups([[0, 1], [2]])
    logits = torch.cat([torch.randn((5, 1), generator=generator, dtype=torch.float64), torch.full((5, 3), 0.7, dtype=torch.float64)], 1)
    weight, bias = convert_classifier(torch.eye(4, dtype=torch.float64), None, groups)
    scores = group_softmax_scores(logits @ weight.t() + bias, groups)
    torch.testing.assert_close(scores[:, 0], logits.softmax(1)[:, 0])


def test_conversion_of_a_convolution_in_half(generator):
    weight = torch.randn((4, 3, 2, 2), generator=generator).half().requires_grad_()
    new_weight, new_bias = convert_classifier(weight, torch.zeros(4, dtype=torch.float16), ClassGroups([[0, 1, 2]]))
    assert new_weight.shape == (6, 3, 2, 2) and new_weight.dtype == new_bias.dtype == torch.float16 and not new_weight.requires_grad


# --- the module ---


def test_accuracy():
    groups = ClassGroups([[0, 1], [2]])
    for background in ("first", "last"):
        module = GroupSoftmaxLoss(groups, background=background)
        # A row each: background; background taken for class 0; class 2; class 1 taken for 0; ignored.
        logits = torch.zeros(5, groups.num_logits)
        logits[[0, 1, 2, 3], [0, 1, 1, 1]] = 5.0
        logits[1, groups.column_of(0)] = logits[2, groups.column_of(2)] = logits[3, groups.column_of(0)] = 3.0
        labels = torch.tensor([0, 0, 3, 2, -1]) if background == "first" else torch.tensor([3, 3, 2, 1, -1])
        accuracy = module.get_accuracy(logits, labels)
        assert accuracy["acc_objectness"].tolist() == [75.0] and accuracy["acc_classes"].tolist() == [50.0]
        nothing = module.get_accuracy(logits[:0], labels[:0])
        assert nothing["acc_objectness"].tolist() == [0.0] and nothing["acc_classes"].tolist() == [0.0]


def test_training_a_classifier_of_rare_classes(generator):
    """A hundred times fewer instances: the rare class is learnt all the same, and found by its score."""
    groups = ClassGroups.from_counts([1000, 10], (100,))
    labels = torch.cat([torch.ones(200), torch.full((4,), 2.0), torch.zeros(400)]).long()
    features = torch.eye(3)[labels] + 0.02 * torch.randn((len(labels), 3), generator=generator)
    classifier, module = torch.nn.Linear(3, groups.num_logits), GroupSoftmaxLoss(groups, generator=generator)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=2.0)
    for _ in range(80):
        optimizer.zero_grad()
        module(classifier(features), labels).backward()
        optimizer.step()
    scores = group_softmax_scores(classifier(features), groups)
    assert torch.equal(scores.argmax(1), labels)
    assert group_softmax_loss(classifier(features), labels, groups, others_ratio=None).sum() < 1


def test_what_writes_to_buffers_reaches_neither_losses_nor_checkpoints(generator):
    """An average over the steps rounds 5 * 0.9 + 5 * 0.1 to 4."""
    groups = ClassGroups([[2, 0], [], [1]])
    logits = torch.randn(3, groups.num_logits, generator=generator)
    expected = {name: value.clone() for name, value in groups.state_dict().items()}
    scores = group_softmax_scores(logits, groups)
    users = {
        "saved": lambda groups: groups.state_dict(),
        "moved": lambda groups: groups.to(torch.float64),
        "emptied": lambda groups: groups.to_empty(device="cpu"),
    }
    for name, use in users.items():
        twin = copy.deepcopy(groups)
        for buffer in twin.buffers():
            buffer.copy_(buffer * 0.9 + buffer * 0.1 - 0.4)
        assert not torch.equal(twin.class_columns, groups.class_columns)
        assert torch.equal(group_softmax_scores(logits, twin), scores)
        use(twin)
        assert all(torch.equal(value, getattr(twin, key)) for key, value in expected.items()), name
        assert torch.equal(group_softmax_scores(logits, twin), scores), name
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    for buffer in twin.buffers():
        buffer.data.zero_()
    assert torch.equal(group_softmax_scores(logits, twin), scores)
    zeros = {name: torch.zeros_like(value) for name, value in expected.items()}
    module = GroupSoftmaxLoss(twin, others_ratio=None, class_weights=torch.arange(3.0))
    labels = torch.tensor([1, 3, 0])
    right = module(logits, labels)
    replaced = torch.func.functional_call(module, {f"groups.{name}": value for name, value in zeros.items()}, (logits, labels))
    assert torch.equal(replaced, right)
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(logits, labels), right)
    program = torch.export.export(module, (logits, labels), strict=False)
    assert torch.equal(program.module()(logits, labels), right)
    assert not twin.class_columns.any(), "the buffers were put back before their use was tested"


def test_tables_follow_buffers_that_were_moved_alone():
    groups = ClassGroups([[0, 1]])
    for name, buffer in groups.named_buffers():
        setattr(groups, name, buffer.to("meta"))
    assert group_softmax_scores(torch.zeros(2, groups.num_logits, device="meta"), groups).is_meta
    with pytest.raises(ValueError, match="groups must be on the device of logits"):
        group_softmax_scores(torch.zeros(2, groups.num_logits), groups)


def test_groups_made_in_inference_mode_train(generator):
    with torch.inference_mode():
        module = GroupSoftmaxLoss(ClassGroups([[2, 0], [], [1]]), others_ratio=None)
    logits = torch.randn(3, module.groups.num_logits, generator=generator)
    labels = torch.tensor([1, 3, 0])
    for moved in (module, copy.deepcopy(module).float(), copy.deepcopy(module).to("cpu"), copy.deepcopy(module).to_empty(device="cpu")):
        moved(leaf := logits.clone().requires_grad_(), labels).backward()
        assert leaf.grad.any()
        assert moved.state_dict()["groups.class_columns"].tolist() == [4, 7, 3, 0]


def test_a_pickle_of_a_version_without_tables(generator):
    groups = ClassGroups([[2, 0], [], [1]])
    logits = torch.randn(3, groups.num_logits, generator=generator)
    old = copy.deepcopy(groups)
    del old.tables
    loaded = pickle.loads(pickle.dumps(old))
    loaded.class_columns.zero_()
    assert torch.equal(group_softmax_scores(logits, loaded), group_softmax_scores(logits, groups))
    assert torch.equal(loaded.state_dict()["class_columns"], groups.class_columns)
