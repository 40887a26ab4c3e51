"""Balanced group softmax at the edges: nothing to learn from, NaN and infinity, logits that must not be read, uninitialised memory."""
import dataclasses

import pytest
import torch
from group_softmax_samples import (
    SAMPLES,
    GroupSample,
    assert_agrees,
    call,
    evaluate,
    on_device,
    sample,
    scores_truth,
)
from rsloss_kernels import group_softmax_scores, use_backend

NAN, INF = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)

NOTHING = {
    "empty": {"rows": 0},
    "all_ignored": {"rows": 5},
    "weights_0": {"rows": 5, "weights": "zeros"},
    "no_columns_but_the_background": {"rows": 0, "sizes": ()},
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_gives_exact_zeros_that_are_connected(backend, generator, name):
    """A process without rows must still take part in the backward of all."""
    for form, dtype in (("softmax", torch.float32), ("sigmoid", torch.float64)):
        inputs = GroupSample(name, form=form, dtype=dtype, **NOTHING[name]).draw(generator)
        if name == "all_ignored":
            inputs.labels.fill_(-1)
        inputs.logits.fill_(NAN)
        inputs = on_device(inputs, backend)
        for options in ({}, {"others_ratio": 8.0}, {"others_ratio": None}):
            if name == "weights_0" and options:
                continue
            leaf = inputs.logits.detach().requires_grad_()
            losses = call(backend, inputs, leaf, **options)
            assert losses.requires_grad and losses.shape == (len(inputs.layout),) and not losses.any()
            (losses * NAN).sum().backward()
            assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_groups_without_foreground_do_not_train(backend, generator):
    """Their logits are not even read; that of the background always trains."""
    inputs = GroupSample("absent", sizes=(3, 2, 4), ignored=False).draw(generator)
    first = inputs.groups.groups[0]
    inputs.labels = torch.tensor([first[0] + 1, first[1] + 1, 0, 0] * 10)
    inputs.weights = sample(backend, inputs, torch.rand((4, 40), generator=generator), 8.0)
    assert inputs.weights.any(1).tolist() == [True, True, False, False]
    inputs.logits[:, inputs.groups.starts[2] :] = NAN
    got = assert_agrees(backend, inputs)
    assert got.losses[2] == 0 == got.losses[3] and got.losses[0] > 0 < got.losses[1]
    assert not got.gradient[:, inputs.groups.starts[2] :].any()


@DTYPES
def test_pairs_of_weight_0_are_not_read(backend, generator, dtype):
    inputs = GroupSample("unread", dtype=dtype, weights="random", sizes=(30, 2)).draw(generator)
    expected = assert_agrees(backend, inputs)
    starts = inputs.groups.starts
    for group, weights in enumerate(inputs.weights):
        rows = ((weights == 0) | (inputs.labels < 0)).nonzero().flatten()
        for number, row in enumerate(rows.tolist()):
            inputs.logits[row, starts[group] : starts[group + 1]] = (NAN, INF, -INF)[number % 3]
    assert evaluate(backend, inputs) == expected


@DTYPES
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_logit_breaks_its_pair_alone(backend, generator, value, dtype):
    for form, place in (("softmax", "first"), ("sigmoid", "last")):
        inputs = GroupSample("broken", dtype=dtype, form=form, place=place, weights="ones", sizes=(20, 1, 0)).draw(generator)
        inputs.labels[:6] = torch.tensor([0, 1, 2, 0, 1, 2])
        sound = evaluate(backend, inputs)
        for group in range(len(inputs.layout)):
            broken = dataclasses.replace(inputs, logits=inputs.logits.clone())
            columns = slice(inputs.groups.starts[group], inputs.groups.starts[group + 1])
            broken.logits[4, columns.stop - 1] = value
            got = assert_agrees(backend, broken)
            assert [loss.isnan().item() for loss in got.losses] == [g == group for g in range(len(inputs.layout))]
            is_nan = torch.zeros_like(got.gradient, dtype=torch.bool)
            is_nan[4, columns] = True
            assert torch.equal(got.gradient.isnan(), is_nan)
            assert torch.equal(got.gradient[~is_nan], sound.gradient[~is_nan])


@DTYPES
def test_minus_infinity_is_a_probability_of_0(backend, generator, dtype):
    """As masks write it; at the target it breaks the pair."""
    for form in ("softmax", "sigmoid"):
        inputs = GroupSample("masked", dtype=dtype, form=form, weights="ones", sizes=(20, 3), rows=12, ignored=False).draw(generator)
        for row, targets in enumerate(inputs.targets()):
            others = [column for column in range(inputs.logits.shape[1]) if column not in targets]
            for column in others[row % 2 :: 2] if row else others:
                inputs.logits[row, column] = -INF
        got = assert_agrees(backend, inputs)
        assert all(loss.isfinite() for loss in got.losses) and not got.gradient[inputs.logits == -INF].any()
        inputs.logits[3, inputs.targets()[3][1]] = -INF
        got = assert_agrees(backend, inputs)
        assert got.losses[1].isnan() and got.losses[0].isfinite() and got.losses[2].isfinite()


def test_weights_that_are_not_finite_break_their_group_alone(backend, generator):
    inputs = GroupSample("weights", weights="ones", ignored=False).draw(generator)
    sound = evaluate(backend, inputs)
    inputs.weights[1, 7] = NAN
    got = evaluate(backend, inputs)
    starts = inputs.groups.starts
    assert [loss.isnan().item() for loss in got.losses] == [False, True, False, False, False]
    assert got.gradient[7, starts[1] : starts[2]].isnan().all()
    assert torch.equal(got.gradient[:, starts[2] :], sound.gradient[:, starts[2] :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_below_one_in_all_and_negative_ones(backend, generator, dtype):
    """The divisor is at least 1; nothing else is done to weights."""
    for scale in (1e-3, -1.0, 1e20, 1e-20):
        inputs = GroupSample("small", dtype=dtype, weights="random", weight_dtype=torch.float64).draw(generator)
        inputs.weights = inputs.weights * scale
        assert_agrees(backend, inputs, f"{scale}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_largest_finite_logits(backend, generator, dtype):
    inputs = GroupSample("largest", dtype=dtype, weights="ones", rows=8).draw(generator)
    inputs.logits = (inputs.logits.sign() * torch.finfo(dtype).max).to(dtype)
    got = assert_agrees(backend, inputs)
    assert all(loss.isfinite() for loss in got.losses) and got.gradient.isfinite().all()


@DTYPES
def test_scores_of_logits_that_are_not_finite(backend, generator, dtype):
    inputs = GroupSample("scores", dtype=dtype, sizes=(3, 20), rows=4).draw(generator)
    starts = inputs.groups.starts
    inputs.logits[0, starts[1] + 1 : starts[2]] = -INF
    masked = scores_truth(inputs)[0]
    inputs.logits[1, starts[1]], inputs.logits[2, 0], inputs.logits[3, starts[2] + 4] = NAN, NAN, INF
    moved = on_device(inputs, backend)
    with use_backend(backend.name):
        scores = group_softmax_scores(moved.logits, moved.groups).cpu()
    torch.testing.assert_close(scores[0].double(), masked, rtol=2e-3 if dtype == torch.float16 else 2e-6, atol=1e-7)
    columns = [[0], *[[number + 1 for number in group] for group in inputs.groups.groups]]
    assert not scores[0, columns[1]].any()
    for row, broken in ((1, columns[1]), (2, sum(columns, [])), (3, columns[2])):
        assert scores[row].isnan().nonzero().flatten().tolist() == sorted(broken)


# --- uninitialised memory ---


@pytest.fixture
def poisoned_memory():
    """New tensors are full of NaN, integers of their largest value."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("description", SAMPLES[::2], ids=lambda description: description.name)
def test_no_uninitialised_memory_reaches_the_result(backend, generator, description, poisoned_memory):
    inputs = description.draw(generator)
    inputs.weights = sample(backend, inputs, torch.rand((len(inputs.layout), len(inputs.labels)), generator=generator), 1.0)
    assert_agrees(backend, inputs, description.name)
    moved = on_device(inputs, backend)
    with use_backend(backend.name):
        assert group_softmax_scores(moved.logits, moved.groups).isfinite().all()
