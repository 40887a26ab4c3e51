"""Values and gradients of every ranking loss against an oracle on fresh random inputs. Recorded outputs: the file of each loss."""
import dataclasses

import oracles
import pytest
import torch
from harness import Evaluation, assert_gates
from samples import DELTAS, DISTRIBUTIONS, RANKING_SAMPLES, Loss, RankingSample

DTYPES = [torch.float64, torch.float32]
# (positives, negatives) on both sides of the sizes at which implementations change method.
SIZES = [(0, 40), (1, 150), (2, 3), (17, 400), (70, 900), (300, 2500)]
SIZES_ON_SLOW_BACKENDS = [(0, 40), (2, 3), (130, 600)]
SIZES_INTERPRETED = [(2, 3), (35, 300)]
UPSTREAM = (1.75, -0.375)


def assert_agrees(backend, loss: Loss, *arguments, upstream=None, label="", **options) -> Evaluation:
    got = loss.evaluate(backend, *arguments, upstream=upstream, **options)
    truth = loss.truth(*arguments, **options)
    assert_gates(backend, got, truth.losses, truth.gradient(*upstream or ()), label)
    return got


def assert_sample_agrees(backend, loss: Loss, sample: RankingSample, generator, upstream=None) -> Evaluation:
    inputs = loss.draw(sample, generator)
    elements = oracles.read(*inputs.arguments[:2], background=sample.background)
    assert int(elements.is_positive.sum()) == sample.positives
    label = f"{sample.name} P={sample.positives} N={int(elements.is_negative.sum())} delta={sample.delta}"
    return assert_agrees(backend, loss, *inputs.arguments, upstream=upstream, label=label, **inputs.options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_inputs(backend, loss, generator, distribution, delta, dtype):
    sizes = SIZES_INTERPRETED if backend.is_interpreted else SIZES_ON_SLOW_BACKENDS if backend.is_slow else SIZES
    for number, (positives, negatives) in enumerate(sizes):
        sample = RankingSample(
            f"{distribution}", positives, negatives, ignored=negatives // 10, distribution=distribution, delta=delta, dtype=dtype
        )
        assert_sample_agrees(backend, loss, sample, generator)
        rows = dataclasses.replace(
            sample, form="index", classes=1 + number, background=("last", "first")[number % 2], quality_levels=(None, 1, 5)[number % 3]
        )
        assert_sample_agrees(backend, loss, rows, generator)


@pytest.mark.parametrize("sample", RANKING_SAMPLES, ids=lambda sample: sample.name)
def test_samples(backend, loss, generator, sample):
    assert_sample_agrees(backend, loss, sample, generator, UPSTREAM[: loss.num_losses])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", ["init", "trained", "ties", "separated"])
def test_16_bit_logits_lose_only_the_rounding_of_the_gradient(backend, loss, generator, distribution, dtype):
    for delta in (0.0, 0.5, 1.0):
        for form in ("dense", "index"):
            sample = RankingSample(distribution, 40, 500, 20, distribution, delta, form, dtype=dtype)
            assert_sample_agrees(backend, loss, sample, generator)


@pytest.mark.parametrize("quality_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_third_argument_and_targets_of_any_floating_dtype(backend, loss, generator, quality_dtype):
    for dtype in (torch.float16, torch.float32, torch.float64):
        dense = RankingSample("dense", dtype=dtype, target_dtype=quality_dtype, ignored=20)
        assert_sample_agrees(backend, loss, dense, generator)
        rows = RankingSample("index", form="index", dtype=dtype, quality_dtype=quality_dtype)
        assert_sample_agrees(backend, loss, rows, generator)


@pytest.mark.shared_code
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integral_dtype(backend, loss, generator, label_dtype):
    sample = RankingSample("labels", form="index", target_dtype=label_dtype)
    assert_sample_agrees(backend, loss, sample, generator)


@pytest.mark.shared_code
def test_labels_that_int32_cannot_hold_are_background(backend, loss, generator):
    logits = torch.randn((4, 3), generator=generator)

    def with_labels(labels):
        return loss.evaluate(backend, *loss.arguments(logits, labels))

    expected = with_labels(torch.tensor([0, 3, 2, 3]))
    assert with_labels(torch.tensor([0, 2**32 - 1, 2, 3], dtype=torch.uint32)) == expected
    assert with_labels(torch.tensor([0, 2**63 - 1, 2, 3])) == expected


@pytest.mark.shared_code
def test_integral_and_bool_dense_targets(backend, loss, generator):
    arguments = loss.draw(RankingSample("dense", quality_levels=1), generator).arguments
    expected = loss.evaluate(backend, *arguments)
    for dtype in (torch.int64, torch.uint8, torch.bool):
        assert loss.evaluate(backend, arguments[0], arguments[1].to(dtype), *arguments[2:]) == expected


@pytest.mark.shared_code
def test_label_above_the_classes_is_background(backend, loss, generator):
    logits = torch.randn((6, 3), generator=generator)
    labels = torch.tensor([0, 3, 1, 3, 2, 3])

    def with_labels(labels):
        return loss.evaluate(backend, *loss.arguments(logits, labels))

    expected = with_labels(labels)
    for above in (4, 1000, 2**31 - 1, 2**62):
        assert with_labels(torch.where(labels == 3, above, labels)) == expected
    ignored = with_labels(labels.where(labels != 3, -1))
    assert ignored != expected
    for below in (-2, -(2**31), -(2**62)):
        assert with_labels(labels.where(labels != 3, below)) == ignored


def test_dense_target_below_zero_is_ignored(backend, loss, generator):
    logits, targets, *third = loss.draw(RankingSample("ignored", ignored=40), generator).arguments
    expected = loss.evaluate(backend, logits, targets, *third)
    for below in (-0.5, -1e-30, -torch.inf):
        assert loss.evaluate(backend, logits, targets.where(targets >= 0, below), *third) == expected
    kept = targets >= 0
    alone = loss.evaluate(backend, logits[kept], targets[kept], *third)
    assert alone.losses == expected.losses
    assert torch.equal(alone.gradient, expected.gradient[kept]) and not expected.gradient[~kept].any()


@pytest.mark.parametrize("logit", [1e4, 1e6, 1e30, -1e4, -1e6, -1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_outlier_positive(backend, loss, generator, logit, dtype):
    """A grid or a fixed-point exponent shared by all positives would lose the precision of the others."""
    for delta in (0.0, 0.1, 0.5):
        logits, targets, *third = loss.draw(RankingSample("outlier", 25, 800, delta=delta, dtype=dtype), generator).arguments
        logits[targets.argmax()] = logit
        assert_agrees(backend, loss, logits, targets, *third, delta=delta, label=f"outlier {logit} delta {delta}")


@pytest.mark.parametrize("delta", [0.0, 1e-30, 1e-12, 1e-3, 1e3, 1e12, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_delta(backend, loss, generator, delta, dtype):
    for distribution in ("trained", "ties", "tiny", "wide"):
        sample = RankingSample(distribution, 20, 300, distribution=distribution, delta=delta, dtype=dtype)
        assert_sample_agrees(backend, loss, sample, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positives_at_neighbouring_floats(backend, loss, generator, dtype):
    """Windows narrower than the spacing of floats touch and no more: a sum over a chain of them, divided by delta, has no digits."""
    for centre in (1.0, -3.7):  # on both sides of a power of two the spacing differs
        floats = torch.full((13,), centre, dtype=dtype)
        for place in range(6):
            below, above = floats[: 6 - place], floats[7 + place :]
            below.copy_(torch.nextafter(below, torch.full_like(below, -torch.inf)))
            above.copy_(torch.nextafter(above, torch.full_like(above, torch.inf)))
        logits = torch.cat([floats, floats[3:9], floats[torch.randint(13, (40,), generator=generator)]])
        targets = torch.cat([torch.rand(19, generator=generator) * 0.9 + 0.1, torch.zeros(40)])
        spacing = float(floats[12].double() - floats[11].double())
        for delta in (1e-30, 1e-6 * spacing, 0.5 * spacing, spacing, 1.5 * spacing):
            assert_agrees(backend, loss, *loss.arguments(logits, targets), delta=delta, label=f"{centre} delta {delta}")


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_many_equal_logits(backend, loss, delta):
    """1e5 elements in one bin: narrow counters would wrap."""
    logits, targets = torch.full((100_000,), -4.6), torch.zeros(100_000)
    targets[::1000] = torch.linspace(0.05, 1, 100)
    assert_agrees(backend, loss, *loss.arguments(logits, targets), delta=delta)
    assert not loss.evaluate(backend, *loss.arguments(logits, torch.zeros_like(logits)), delta=delta).gradient.any()


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_positives(backend, loss, generator, dtype):
    sample = RankingSample("many", 1500, 3000, delta=0.5, dtype=dtype, quality_levels=200)
    assert_sample_agrees(backend, loss, sample, generator)
    assert_sample_agrees(backend, loss, dataclasses.replace(sample, distribution="ties", delta=0.0), generator)


@pytest.mark.shared_code
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("distance", [0.3, 0.9, 5.0, 8.5, 9.0, 9.5, 30.0])
def test_positives_apart_from_a_tight_cluster(backend, loss, generator, distance, spread):
    """A look-up table sized for the cluster must not lose windows of the others that reach into it."""
    cluster = torch.randn(40, generator=generator) * spread
    for delta in (0.01, 0.5, 20.0):
        apart = torch.tensor([-distance, distance]) * max(delta, spread)
        positives = torch.cat([cluster, apart])
        negatives = positives[torch.randint(0, 42, (300,), generator=generator)]
        negatives = negatives + torch.randn(300, generator=generator) * max(delta, spread)
        logits = torch.cat([positives, negatives])
        targets = torch.cat([torch.rand(42, generator=generator) * 0.9 + 0.1, torch.zeros(300)])
        assert_agrees(backend, loss, *loss.arguments(logits, targets), delta=delta, label=f"delta {delta}")
