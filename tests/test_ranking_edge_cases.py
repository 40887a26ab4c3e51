"""Ranking losses where there is nothing to rank, where values are not finite, where memory is dirty, and where a table is too small."""
import contextlib
import sys

import harness
import pytest
import rsloss_kernels
import torch
from harness import assert_gates
from samples import LOSSES, RANKING_SAMPLES, RankingSample
from torch.utils import deterministic

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def assert_agrees(backend, loss, *arguments, upstream=None, **options):
    got = loss.evaluate(backend, *arguments, upstream=upstream, **options)
    truth = loss.truth(*arguments, **options)
    assert_gates(backend, got, truth.losses, truth.gradient(*upstream or ()))
    return got, truth


# --- nothing to rank ---

NOTHING = {
    "empty_dense": (torch.zeros(0), torch.zeros(0), None),
    "empty_2d": (torch.zeros(0, 4), torch.zeros(0, 4), None),
    "no_classes": (torch.zeros(5, 0), torch.full((5,), -1), None),
    "empty_index": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)),
    "no_positives": (torch.linspace(-3, 3, 12), torch.zeros(12), None),
    "no_positives_index": (torch.linspace(-3, 3, 12).view(3, 4), torch.full((3,), 4), torch.ones(3)),
    "all_ignored": (torch.linspace(-3, 3, 12), -torch.ones(12), None),
    "all_ignored_index": (torch.linspace(-3, 3, 12).view(3, 4), torch.full((3,), -1), torch.ones(3)),
    "one_positive": (torch.tensor([0.3]), torch.tensor([1.0]), None),
    "no_dimensions_negative": (torch.tensor(0.3), torch.tensor(0.0), None),
    "no_dimensions_positive": (torch.tensor(0.3), torch.tensor(0.7), None),
    "ignored_nan": (torch.full((6,), NAN), -torch.ones(6), None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_rank_gives_exact_zeros(backend, loss, name, dtype):
    logits, targets, quality = NOTHING[name]
    arguments = loss.arguments(logits.to(dtype), targets, quality)
    for delta in (0.0, 0.5):
        got = loss.evaluate(backend, *arguments, delta=delta)
        assert [float(value) for value in got.losses] == [0.0] * loss.num_losses
        assert got.gradient.shape == logits.shape and got.gradient.dtype == dtype
        assert not got.gradient.isnan().any() and not got.gradient.any()


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_rank_stays_connected_to_the_graph(backend, loss, name):
    """Or a rank without objects would leave its peers waiting for gradients."""
    logits, *others = (value.to(backend.device) for value in loss.arguments(*NOTHING[name]))
    weight = torch.ones((), device=backend.device, requires_grad=True)
    with rsloss_kernels.use_backend(backend.name):
        losses = harness.losses_in(loss.function(logits * weight, *others))
    for value in losses:
        assert value.requires_grad
    sum(losses).backward()
    assert weight.grad is not None and (weight.grad == 0 or name == "ignored_nan")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_negatives_leaves_no_ranking_loss(backend, loss, generator, dtype):
    logits = torch.randn(12, generator=generator).to(dtype)
    got, _ = assert_agrees(backend, loss, *loss.arguments(logits, torch.linspace(0.1, 1, 12).to(dtype)))
    assert got.losses[0] == 0 and (loss.num_losses == 2 or not got.gradient.any())


# --- values that are not finite ---


def base(generator, dtype=torch.float32):
    """Positives 0-2, negatives 3-9, ignored 10-11."""
    logits = torch.randn(12, generator=generator).to(dtype)
    targets = torch.tensor([0.9, 0.4, 0.6, *[0.0] * 7, -1.0, -1.0], dtype=dtype)
    return logits, targets


NON_FINITE_LOGITS = {
    "nan_negative": ({4: NAN}, True),
    "nan_positive": ({1: NAN}, True),
    "negative_nan_positive": ({1: -NAN}, True),
    "plus_inf_positive": ({0: INF}, True),
    "minus_inf_positive": ({0: -INF}, True),
    "all_positives_nan": ({0: NAN, 1: NAN, 2: NAN}, True),
    "all_negatives_nan": ({i: NAN for i in range(3, 10)}, True),
    "everything_nan": ({i: NAN for i in range(12)}, True),
    "nan_and_inf": ({0: INF, 1: NAN, 3: NAN, 4: INF, 5: -INF}, True),
    "plus_inf_negative": ({5: INF}, False),
    "minus_inf_negative": ({6: -INF}, False),
    "both_inf_negatives": ({5: INF, 6: -INF, 7: INF}, False),
    "all_negatives_minus_inf": ({i: -INF for i in range(3, 10)}, False),
    "all_negatives_plus_inf": ({i: INF for i in range(3, 10)}, False),
    "ignored_nan_and_inf": ({10: NAN, 11: INF}, False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NON_FINITE_LOGITS)
def test_logits_that_are_not_finite(backend, loss, generator, name, dtype):
    values, is_broken = NON_FINITE_LOGITS[name]
    logits, targets = base(generator, dtype)
    for index, value in values.items():
        logits[index] = value
    arguments = loss.arguments(logits, targets)
    broken = (targets >= 0) & (logits.isnan() | (logits.isinf() & (targets > 0)))
    without = loss.arguments(logits.where(targets >= 0, 0), targets.where(~broken, -1))
    for delta in (0.0, 0.5):
        got, _ = assert_agrees(backend, loss, *arguments, delta=delta)
        assert all(bool(value.isnan()) == is_broken for value in got.losses)
        assert torch.equal(got.gradient.isnan(), broken)
        assert torch.equal(got.gradient[~broken], loss.evaluate(backend, *without, delta=delta).gradient[~broken])


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_dense_target_that_is_not_finite(backend, loss, generator, value, delta):
    logits, targets = base(generator)
    targets[1] = value
    got, _ = assert_agrees(backend, loss, *loss.arguments(logits, targets), delta=delta)
    assert all(value.isnan() for value in got.losses)
    assert harness.where(got.gradient.isnan()) == [1]


@pytest.mark.parametrize("loss", [pytest.param(loss, id=loss.name) for loss in LOSSES.values() if loss.third])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_third_argument_that_is_not_finite(backend, loss, generator, value, dtype):
    logits = torch.randn((5, 3), generator=generator)
    labels = torch.tensor([1, 3, 0, 2, -1])
    third = torch.tensor([0.5, value, value, 0.7, value], dtype=dtype)
    got, _ = assert_agrees(backend, loss, logits, labels, third)
    assert all(value.isnan() for value in got.losses)
    assert harness.where(got.gradient.isnan()) == [6], "values of background and ignored rows may be anything"


@pytest.mark.parametrize("upstream", [(1.0, None), (0.0, 1.0), (0.0, 0.0)])
def test_nan_reaches_the_gradient_whatever_the_upstream_factors(backend, loss, generator, upstream):
    """A gradient scaler must see it."""
    # (None, 1.0) of two losses is (1.0) of one.
    upstreams = [upstream, upstream[::-1]] if loss.num_losses == 2 else [upstream[:1]]
    logits, targets = base(generator)
    for index in (1, 4):
        broken = logits.clone()
        broken[index] = NAN
        for factors in upstreams:
            got = loss.evaluate(backend, *loss.arguments(broken, targets), upstream=factors)
            assert harness.where(got.gradient.isnan()) == [index]


def test_nan_negative_without_positives(backend, loss):
    logits = torch.tensor([0.0, NAN, 1.0])
    got, _ = assert_agrees(backend, loss, *loss.arguments(logits, torch.zeros(3)))
    assert all(value.isnan() for value in got.losses) and harness.where(got.gradient.isnan()) == [1]


def test_many_nan_logits_do_not_write_out_of_bounds(backend, loss, generator):
    """NaN compares false with everything: an unguarded search would leave its table."""
    logits, *others = loss.draw(RankingSample("nan", 40, 4000), generator).arguments
    holes = torch.rand(logits.shape, generator=generator) < 0.5
    assert_agrees(backend, loss, logits.where(~holes, NAN), *others)
    assert_agrees(backend, loss, torch.full_like(logits, NAN), *others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_finite_logits(backend, loss, dtype):
    largest = torch.finfo(dtype).max
    logits = torch.tensor([largest, -largest, 0, largest, -largest, 0, 1, largest], dtype=dtype)
    for second in (0.0, 0.6):
        targets = torch.tensor([0.5, 0.7, 0.9, 0, 0, 0, 0, second])
        for delta in (0.0, 0.5, 1e30):
            assert_agrees(backend, loss, *loss.arguments(logits, targets), delta=delta)


@pytest.mark.parametrize("far", [1e5, 1e8, 1e20], ids=str)
def test_many_logits_far_from_the_others(backend, loss, generator, far):
    """A unit for all offsets would be coarser than the windows near 0."""
    logits, *others = loss.draw(RankingSample("far", 60, 900), generator).arguments
    is_far = torch.rand(logits.shape, generator=generator) < 0.3
    assert_agrees(backend, loss, logits + far * is_far, *others)


@pytest.mark.parametrize("centre", [1e13, -1e30, 3.4028234663852886e38, -3.4028234663852886e38], ids=str)
def test_all_positives_at_one_large_logit(backend, loss, centre):
    """Whole vectors of negatives around breakpoints that are one number, which a grid of cells must not divide beyond infinity."""
    logits = torch.full((130,), centre)
    logits[70:100], logits[100:] = centre / 2, -centre
    for positives in (1, 3):
        targets = (torch.arange(130) < positives).float()
        for delta in (0.0, 1e-30, 0.5):
            assert_agrees(backend, loss, *loss.arguments(logits, targets), delta=delta)


def test_negatives_further_from_a_positive_than_the_largest_number(backend, loss):
    """Their distance is infinite, and 0 times that NaN."""
    largest = torch.finfo(torch.float32).max
    logits, targets = torch.full((9,), largest), torch.zeros(9)
    logits[0], targets[0] = -largest, 1.0
    for delta in (0.0, 0.5):
        got, _ = assert_agrees(backend, loss, *loss.arguments(logits, targets), delta=delta)
        assert got.gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_subnormal_logits_and_signed_zeros(backend, loss, dtype):
    tiny = torch.finfo(dtype).smallest_normal / 8
    logits = torch.tensor([tiny, -tiny, 0.0, -0.0, 0.0, -0.0, tiny, -tiny], dtype=dtype)
    targets = torch.tensor([0.5, 0.7, 0.9, 0.2, 0, 0, 0, 0])
    for delta in (0.0, 1e-30, 0.5):
        assert_agrees(backend, loss, *loss.arguments(logits, targets), delta=delta)


# --- dirty memory ---


@contextlib.contextmanager
def poisoned_memory():
    """Every uninitialised allocation comes back full of NaN (integers: of their largest value), `new_empty` of C++ included."""
    assert deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for fresh in (torch.empty(64), torch.zeros(1).new_empty(64), torch.empty_like(torch.zeros(64))):
            assert fresh.isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("sample", RANKING_SAMPLES, ids=lambda sample: sample.name)
def test_no_uninitialised_memory_reaches_the_result(backend, loss, generator, sample):
    inputs = loss.draw(sample, generator)
    expected = loss.evaluate(backend, *inputs.arguments, **inputs.options)
    with poisoned_memory():
        assert loss.evaluate(backend, *inputs.arguments, **inputs.options) == expected


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_tables_and_masks_are_padded_as_documented(backend, loss, generator):
    logits, targets, _ = RankingSample("padding", 5, 40, 3).draw(generator)
    with poisoned_memory():
        pipeline = loss.pipeline(backend, [logits.to(backend.device)], [targets.to(backend.device)], capacity=9)
        positives, negatives, counts = pipeline.collect()
        ranked, bins = pipeline.bin(negatives, positives, counts)
        outputs = pipeline.finish(pipeline.logits, negatives, ranked, counts, bins)
    *_, gradients, lines = outputs
    index = (targets > 0).nonzero().squeeze(1)
    order = logits[index].sort().indices
    negatives, counts, positives, ranked, bins, gradients, lines = (
        value.cpu() for value in (negatives, counts, positives, ranked, bins, gradients, lines)
    )
    unpacked = (negatives[:, None] >> torch.arange(8)) & 1
    assert torch.equal(unpacked.flatten()[:48].bool(), targets == 0) and not unpacked.flatten()[48:].any()
    assert counts.tolist() == [5, 40, 48]
    assert torch.equal(positives[3, :5], index.double()) and torch.equal(positives[0, :5], logits[index].double())
    assert torch.equal(positives[1, :5], targets[index].double()) and not positives[2].any()
    assert torch.equal(ranked[:, :5], positives[:, :5][:, order])
    for table in (positives, ranked):
        assert table.dtype == torch.float64 and table.shape == (4, 9)
        assert table[0, 5:].isnan().all() and not table[1:3, 5:].any() and (table[3, 5:] == -1).all()
    assert bins.dtype == torch.int64 and bins.shape == (2, 19) and not bins[:, 11:].any() and bins[0, 0] == 0
    assert gradients.shape == (4, 9) and (gradients[0, 5:] == -1).all() and not gradients[1:3, 5:].any()
    assert not gradients[3, :5].any() and (gradients[3, 5:] == 1).all()
    assert torch.equal(gradients[0, :5], ranked[3, :5]) and (loss.num_losses == 2 or not gradients[2].any())
    assert lines.shape == (3, 18) and (lines[0, 10:] == INF).all() and (lines[1, 10:] == lines[1, 9]).all()
    assert (lines[0, 1:10] >= lines[0, :9]).all() and not lines[2, 10:].any()
    if loss.third == "regression_losses":
        rank = outputs[1].cpu()
        elements = loss.read(logits, targets, targets[index])
        wanted = loss.oracle(elements, pipeline.delta).rank[order]
        assert rank.dtype == torch.float64 and rank.shape == (9,) and not rank[5:].any()
        torch.testing.assert_close(rank[:5], wanted, rtol=1e-7, atol=0)


# --- capacity ---


@pytest.mark.parametrize("form", ["dense", "index"])
@pytest.mark.parametrize("capacity", [1, 8, 29])
def test_more_positives_than_capacity_gives_nan_everywhere(backend, loss, generator, form, capacity):
    values = RankingSample("overflow", 30, 200, form=form).draw(generator)
    arguments = [[value.to(backend.device)] for value in values if value is not None]
    got = loss.pipeline(backend, *arguments, capacity=capacity).run()
    assert all(value.isnan() for value in got.losses)
    assert got.gradient.isnan().all()


@pytest.mark.shared_code
def test_overflow_is_counted(backend, loss, generator):
    logits, targets, _ = RankingSample("overflow", 30, 200).draw(generator)
    positives, _, counts = loss.pipeline(backend, [logits.to(backend.device)], [targets.to(backend.device)], capacity=7).collect()
    assert counts.tolist() == [30, 200, 230] and positives.shape == (4, 7)


@pytest.mark.parametrize("form", ["dense", "index"])
def test_max_positives_binds_on_a_gpu_only(backend, loss, generator, form):
    arguments = loss.draw(RankingSample("capacity", 30, 200, form=form), generator).arguments
    expected = loss.evaluate(backend, *arguments)
    got = loss.evaluate(backend, *arguments, max_positives=3)
    if backend.device == "cpu":
        assert got == expected
        assert loss.evaluate(backend, *arguments, max_positives=sys.maxsize) == expected
    else:
        with pytest.raises(ValueError, match="max_positives must be below 2.29 where it sizes tables"):
            loss.evaluate(backend, *arguments, max_positives=sys.maxsize)
        assert all(value.isnan() for value in got.losses) and got.gradient.isnan().all()
    assert loss.evaluate(backend, *arguments, max_positives=30) == expected
