"""What holds of balanced group softmax whatever the inputs, and how its sampling is distributed."""
import dataclasses

import harness
import pytest
import rsloss_kernels
import torch
from group_softmax_samples import GroupSample, Inputs, call, evaluate, layout_of, on_device, sample
from hypothesis import given
from hypothesis import strategies as st
from rsloss_kernels import ClassGroups, group_softmax_scores, use_backend

SIZES = st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple)


@given(
    seed=st.integers(0, 2**20),
    sizes=SIZES,
    rows=st.integers(0, 20),
    form=st.sampled_from(["softmax", "sigmoid"]),
    place=st.sampled_from(["first", "last"]),
    weights=st.sampled_from(["random", "sampled", "ones"]),
)
def test_gradients_of_a_pair_sum_to_0_and_point_at_the_target(backend, seed, sizes, rows, form, place, weights):
    description = GroupSample("any", rows, sizes, form=form, place=place, weights=weights, background=place)
    inputs = description.draw(torch.Generator().manual_seed(seed))
    got, starts = evaluate(backend, inputs), inputs.groups.starts
    assert all(loss >= 0 and loss.isfinite() for loss in got.losses)
    for row, targets in enumerate(inputs.targets()):
        for group, target in enumerate(targets):
            part = got.gradient[row, starts[group] : starts[group + 1]]
            if inputs.groups.others[group] != -1:
                assert abs(part.sum()) <= 2e-6 * part.abs().sum()
            assert all((value <= 0) == (starts[group] + i == target) or value == 0 for i, value in enumerate(part))


def test_a_constant_added_to_a_group_changes_nothing(backend, generator):
    inputs = GroupSample("shift", dtype=torch.float64, weights="random").draw(generator)
    expected = evaluate(backend, inputs)
    moved = dataclasses.replace(inputs, logits=inputs.logits.clone())
    for group, (start, end) in enumerate(zip(inputs.groups.starts, inputs.groups.starts[1:], strict=False)):
        moved.logits[:, start:end] += 5.0 * group - 7.0
    got = evaluate(backend, moved)
    harness.assert_within(torch.stack(got.losses), torch.stack(expected.losses), 1e-12, "losses")
    harness.assert_within(got.gradient, expected.gradient, 1e-12, "gradient")


def test_order_of_rows_does_not_matter(backend, generator):
    inputs = GroupSample("order", dtype=torch.float64, weights="random").draw(generator)
    expected, order = evaluate(backend, inputs), torch.randperm(len(inputs.labels), generator=generator)
    part = dataclasses.replace(
        inputs, logits=inputs.logits[order], labels=inputs.labels[order], weights=inputs.weights[:, order].contiguous()
    )
    got = evaluate(backend, part)
    harness.assert_within(torch.stack(got.losses), torch.stack(expected.losses), 1e-12, "losses")
    harness.assert_within(got.gradient, expected.gradient[order], 1e-14, "gradient")


def test_both_conventions_of_labels_agree(backend, generator):
    inputs = GroupSample("first", weights="random").draw(generator)
    classes = inputs.groups.num_classes
    labels = torch.where(inputs.labels > 0, inputs.labels - 1, torch.where(inputs.labels == 0, classes, -1))
    last = dataclasses.replace(inputs, labels=labels, background="last")
    assert evaluate(backend, last) == evaluate(backend, inputs)
    moved = on_device(inputs, backend)
    with use_backend(backend.name):
        first, last = (group_softmax_scores(moved.logits, moved.groups, background=place) for place in ("first", "last"))
    assert torch.equal(first.roll(-1, 1), last)


def test_both_places_of_the_background_group_agree(backend, generator):
    """The layouts of the two originals, with the columns moved."""
    first = GroupSample("first", weights="random", sizes=(4, 3)).draw(generator)
    groups = ClassGroups(first.groups.groups, background_group="last")
    columns = list(range(2, first.groups.num_logits)) + [1, 0]
    last = Inputs(
        first.logits[:, columns], first.labels, groups, first.weights[[1, 2, 0]], layout_of(groups.groups, "softmax", "last"), "first"
    )
    one, other = evaluate(backend, first), evaluate(backend, last)
    assert [one.losses[g] for g in (1, 2, 0)] == list(other.losses)
    harness.assert_within(other.gradient, one.gradient[:, columns].double(), 1e-7, "gradient")


def test_one_logit_for_the_background_is_the_difference_of_two(backend, generator):
    two = GroupSample("two", weights="random", dtype=torch.float64, sizes=(4,)).draw(generator)
    groups = ClassGroups(two.groups.groups, background_form="sigmoid")
    logits = torch.cat([two.logits[:, :1] - two.logits[:, 1:2], two.logits[:, 2:]], 1)
    one = Inputs(logits, two.labels, groups, two.weights, layout_of(groups.groups, "sigmoid", "first"), "first")
    got, wanted = evaluate(backend, one), evaluate(backend, two)
    harness.assert_within(torch.stack(got.losses), torch.stack(wanted.losses), 1e-12, "losses")
    harness.assert_within(got.gradient, torch.cat([wanted.gradient[:, :1], wanted.gradient[:, 2:]], 1), 1e-14, "gradient")
    one, two = on_device(one, backend), on_device(two, backend)
    with use_backend(backend.name):
        scores = [group_softmax_scores(inputs.logits, inputs.groups) for inputs in (one, two)]
    harness.assert_within(scores[0], scores[1], 1e-14, "scores")


def test_scores_of_classes_and_background_are_probabilities(backend, generator):
    """With one group of classes and no mass on its others the row sums to 1."""
    inputs = on_device(GroupSample("one", dtype=torch.float64, sizes=(6,)).draw(generator), backend)
    inputs.logits[:, inputs.groups.others[1]] = -torch.inf
    with use_backend(backend.name):
        scores = group_softmax_scores(inputs.logits, inputs.groups)
    harness.assert_within(scores.sum(1).cpu(), 1.0, 1e-12, "sum")
    assert (scores >= 0).all()


def test_the_result_is_the_same_every_time_and_on_any_number_of_threads(backend, generator):
    if not backend.is_deterministic:
        return
    inputs = GroupSample("threads", rows=70 if backend.is_slow else 200, sizes=(40, 9), weights="random").draw(generator)
    keys, threads = torch.rand((3, len(inputs.labels)), generator=generator), torch.get_num_threads()
    expected = evaluate(backend, inputs), sample(backend, inputs, keys, 1.5)
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert evaluate(backend, inputs) == expected[0]
            assert torch.equal(sample(backend, inputs, keys, 1.5), expected[1])
    finally:
        torch.set_num_threads(threads)


# --- sampling ---


@pytest.mark.slow_interpreter
def test_others_are_drawn_uniformly_without_replacement(backend):
    """Each of 20 others in half of the draws, each pair in 9/38 of them: 3 of 10 foreground rows times 10 / 3."""
    inputs = GroupSample("uniform", rows=24, sizes=(1, 1), weights="ones", ignored=False).draw(torch.Generator())
    inputs.labels = torch.tensor([1, 1, 1, *[0] * 12, *[2] * 8, -1])
    others, draws = torch.arange(3, 23), 100 if backend.is_slow else 2000
    with use_backend(backend.name):
        torch.manual_seed(0)
        counts, pairs = torch.zeros(20), torch.zeros(20, 20)
        for _ in range(draws):
            keys = torch.rand(3, 24)
            kept = sample(backend, inputs, keys, 10 / 3)[1]
            assert kept[:3].all() and kept[23] == 0 and kept[others].sum() == 10
            counts += kept[others]
            pairs += kept[others][:, None] * kept[others]
    deviation = (draws * 0.25) ** 0.5
    assert ((counts - draws / 2).abs() < 5 * deviation).all()
    apart = ~torch.eye(20, dtype=torch.bool)
    assert ((pairs - draws * 9 / 38)[apart].abs() < 5 * deviation).all()


def test_sampling_follows_the_generator(backend, generator):
    """One generator in the same state draws the same; the next call draws anew; groups draw independently of each other."""
    inputs = on_device(GroupSample("generator", rows=200, sizes=(2, 2), foreground=0.1, ignored=False).draw(generator), backend)
    device = torch.Generator(backend.device)
    draws = []
    for seed in (1, 1, 2):
        device.manual_seed(seed)
        draws.append([evaluate(backend, inputs, others_ratio=2.0, generator=device) for _ in range(2)])
    assert draws[0] == draws[1] and draws[0] != draws[2] and draws[0][0] != draws[0][1]
    starts = inputs.groups.starts
    gradient = draws[0][0].gradient
    kept = [gradient[:, starts[g] : starts[g + 1]].any(1) for g in (1, 2)]
    background = inputs.labels.cpu() == 0
    assert not torch.equal(kept[0][background], kept[1][background])
    torch.manual_seed(5)
    default = evaluate(backend, inputs, others_ratio=2.0)
    torch.manual_seed(5)
    assert evaluate(backend, inputs, others_ratio=2.0) == default


def test_ratios_that_keep_all_or_none(backend, generator):
    inputs = GroupSample("ratios", foreground=0.3).draw(generator)
    everything = [evaluate(backend, inputs, others_ratio=ratio) for ratio in (None, float("inf"), 1e9, 40)]
    assert all(got == everything[0] for got in everything)
    none = evaluate(backend, inputs, others_ratio=0)
    starts = inputs.groups.starts
    for group, (start, end) in enumerate(zip(starts[1:], starts[2:], strict=False), start=1):
        is_own = torch.tensor([any(target is not None and start < target < end for target in row) for row in inputs.targets()])
        is_own &= inputs.labels >= 0
        assert torch.equal(none.gradient[:, start:end].any(1), is_own), group


def test_class_weights(backend, generator):
    """They multiply the weights of a class's rows in its own group; the average factor is the sum of the products."""
    inputs = GroupSample("factors", weights="random", dtype=torch.float64, background="last").draw(generator)
    factors = torch.rand(inputs.groups.num_classes, generator=generator, dtype=torch.float64) * 3
    weights = inputs.weights.double().clone()
    for row, number in enumerate(inputs.numbers()):
        for group, entries in enumerate(inputs.layout):
            if isinstance(number, int) and number in entries:
                weights[group, row] *= factors[number]
    expected = evaluate(backend, dataclasses.replace(inputs, weights=weights))
    got = evaluate(backend, inputs, sample_weights=inputs.weights.to(backend.device), class_weights=factors.to(backend.device))
    assert got == expected
    moved = on_device(inputs, backend)
    module = rsloss_kernels.GroupSoftmaxLoss(moved.groups, None, background="last", class_weights=factors).to(backend.device)
    with use_backend(backend.name):
        total = module(moved.logits, moved.labels)
    expected = call(backend, moved, others_ratio=None, class_weights=factors.to(backend.device))
    assert torch.equal(total, expected.sum()) and not torch.equal(expected, call(backend, moved, others_ratio=None))
