"""Values and gradients of Rank & Sort: against the authors' recorded outputs, and an oracle on fresh random inputs."""
import dataclasses

import golden_vectors
import oracles
import pytest
import torch
from harness import NOISE, Evaluation, assert_gates, assert_within, evaluate
from samples import DELTAS, DISTRIBUTIONS, RANKING_SAMPLES, RankingSample

GOLDEN = golden_vectors.params("ranksort")
DTYPES = [torch.float64, torch.float32]
# (positives, negatives) on both sides of the sizes at which implementations change method.
SIZES = [(0, 40), (1, 150), (2, 3), (17, 400), (70, 900), (300, 2500)]
SIZES_ON_SLOW_BACKENDS = [(0, 40), (2, 3), (17, 400), (130, 600)]
SIZES_INTERPRETED = [(2, 3), (35, 300)]


def published(case) -> tuple[list[float], torch.Tensor]:
    """What the authors' float64 run returned; exact zeros where it crashed or divided by zero for want of a positive."""
    out = case.outputs("rs")
    if not out:
        assert "rs" in case.crashed and {"nopos", "empty"} & set(case.tags)
        return [0.0, 0.0], torch.zeros(case.inputs()["logits"].numel(), dtype=torch.float64)
    return [float(out["ranking_loss"]), float(out["sorting_loss"])], out["grad"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors(backend, case, dtype):
    inputs, hyper = case.inputs(), case.hyper
    got = evaluate(
        backend,
        inputs["logits"].to(dtype),
        inputs["targets"],
        delta=hyper["delta"],
        upstream=(hyper["gout_rank"], hyper["gout_sort"]),
        upstream_parity=True,
    )
    losses, gradient = published(case)
    assert_gates(backend, got, losses, gradient, case.name, NOISE)


def test_all_golden_vectors_are_there():
    assert len(GOLDEN) == 92
    assert sum("gout" in case.tags for case in golden_vectors.cases("ranksort")) == 3


@pytest.mark.parametrize("case", GOLDEN)
def test_oracle_agrees_with_golden_vectors(case):
    """The oracle of the other tests is right, and independently of the library."""
    inputs, hyper = case.inputs(), case.hyper
    truth = oracles.rank_sort(oracles.read_dense(inputs["logits"], inputs["targets"]), hyper["delta"])
    losses, gradient = published(case)
    for value, wanted in zip(truth.losses, losses, strict=True):
        assert abs(value - wanted) <= 1e-12 * abs(wanted) + NOISE
    parity = truth.gradient(hyper["gout_rank"], hyper["gout_rank"])
    assert_within(parity, gradient, 1e-12 * float(gradient.abs().amax() if gradient.numel() else 0) + NOISE, case.name)


def assert_agrees_with_oracle(backend, sample: RankingSample, generator, upstream=(1.0, 1.0)) -> Evaluation:
    inputs = sample.draw(generator)
    got = evaluate(backend, *inputs.arguments, upstream=upstream, **inputs.options)
    elements = oracles.read(inputs.logits, inputs.targets, inputs.quality, sample.background)
    truth = oracles.rank_sort(elements, sample.delta)
    assert int((elements.is_positive).sum()) == sample.positives
    label = f"{sample.name} P={sample.positives} N={int(elements.is_negative.sum())}"
    assert_gates(backend, got, truth.losses, truth.gradient(*upstream), label)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_inputs(backend, generator, distribution, delta, dtype):
    sizes = SIZES_INTERPRETED if backend.is_interpreted else SIZES_ON_SLOW_BACKENDS if backend.is_slow else SIZES
    for number, (positives, negatives) in enumerate(sizes):
        sample = RankingSample(
            f"{distribution}", positives, negatives, ignored=negatives // 10, distribution=distribution, delta=delta, dtype=dtype
        )
        assert_agrees_with_oracle(backend, sample, generator)
        rows = dataclasses.replace(
            sample, form="index", classes=1 + number, background=("last", "first")[number % 2], quality_levels=(None, 1, 5)[number % 3]
        )
        assert_agrees_with_oracle(backend, rows, generator)


@pytest.mark.parametrize("sample", RANKING_SAMPLES, ids=lambda sample: sample.name)
def test_samples(backend, generator, sample):
    assert_agrees_with_oracle(backend, sample, generator, upstream=(1.75, -0.375))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", ["init", "trained", "ties", "separated"])
def test_16_bit_logits_lose_only_the_rounding_of_the_gradient(backend, generator, distribution, dtype):
    for delta in (0.0, 0.5, 1.0):
        for form in ("dense", "index"):
            sample = RankingSample(distribution, 40, 500, 20, distribution, delta, form, dtype=dtype)
            assert_agrees_with_oracle(backend, sample, generator)


@pytest.mark.parametrize("quality_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_quality_and_targets_of_any_floating_dtype(backend, generator, quality_dtype):
    for dtype in (torch.float16, torch.float32, torch.float64):
        dense = RankingSample("dense", dtype=dtype, target_dtype=quality_dtype, ignored=20)
        assert_agrees_with_oracle(backend, dense, generator)
        rows = RankingSample("index", form="index", dtype=dtype, quality_dtype=quality_dtype)
        assert_agrees_with_oracle(backend, rows, generator)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integral_dtype(backend, generator, label_dtype):
    sample = RankingSample("labels", form="index", target_dtype=label_dtype)
    assert_agrees_with_oracle(backend, sample, generator)


def test_labels_that_int32_cannot_hold_are_background(backend, generator):
    logits = torch.randn((4, 3), generator=generator)
    expected = evaluate(backend, logits, torch.tensor([0, 3, 2, 3]))
    assert evaluate(backend, logits, torch.tensor([0, 2**32 - 1, 2, 3], dtype=torch.uint32)) == expected
    assert evaluate(backend, logits, torch.tensor([0, 2**63 - 1, 2, 3])) == expected


def test_integral_and_bool_dense_targets(backend, generator):
    inputs = RankingSample("dense", quality_levels=1).draw(generator)
    expected = evaluate(backend, inputs.logits, inputs.targets)
    for dtype in (torch.int64, torch.uint8, torch.bool):
        assert evaluate(backend, inputs.logits, inputs.targets.to(dtype)) == expected


def test_quality_zero_is_a_positive_in_index_form_only(backend, generator):
    logits = torch.randn((6, 3), generator=generator)
    labels, quality = torch.tensor([0, 3, 1, 3, 2, 3]), torch.tensor([0.0, 0.7, 0.5, 0.3, 0.9, 0.1])
    truth = oracles.rank_sort(oracles.read_labels(logits, labels, quality), 0.5)
    got = evaluate(backend, logits, labels, quality)
    assert_gates(backend, got, truth.losses, truth.gradient())
    dense = torch.zeros_like(logits)
    dense[[2, 4], [1, 2]] = torch.tensor([0.5, 0.9])
    truth = oracles.rank_sort(oracles.read_dense(logits, dense), 0.5)
    assert_gates(backend, evaluate(backend, logits, dense), truth.losses, truth.gradient())
    assert got.losses[0] != truth.ranking


def test_label_above_the_classes_is_background(backend, generator):
    logits = torch.randn((6, 3), generator=generator)
    labels = torch.tensor([0, 3, 1, 3, 2, 3])
    expected = evaluate(backend, logits, labels)
    for above in (4, 1000, 2**31 - 1, 2**62):
        assert evaluate(backend, logits, torch.where(labels == 3, above, labels)) == expected
    for below in (-2, -(2**31), -(2**62)):
        assert evaluate(backend, logits, labels.where(labels != 3, below)) == evaluate(backend, logits, labels.where(labels != 3, -1))


def test_dense_target_below_zero_is_ignored(backend, generator):
    inputs = RankingSample("ignored", ignored=40).draw(generator)
    expected = evaluate(backend, *inputs.arguments)
    for below in (-0.5, -1e-30, -torch.inf):
        assert evaluate(backend, inputs.logits, inputs.targets.where(inputs.targets >= 0, below)) == expected
    kept = inputs.targets >= 0
    alone = evaluate(backend, inputs.logits[kept], inputs.targets[kept])
    assert alone.losses == expected.losses
    assert torch.equal(alone.gradient, expected.gradient[kept]) and not expected.gradient[~kept].any()


@pytest.mark.parametrize("logit", [1e4, 1e6, 1e30, -1e4, -1e6, -1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_outlier_positive(backend, generator, logit, dtype):
    """A grid or a fixed-point exponent shared by all positives would lose the precision of the others."""
    for delta in (0.0, 0.1, 0.5):
        inputs = RankingSample("outlier", 25, 800, delta=delta, dtype=dtype).draw(generator)
        logits = inputs.logits.clone()
        logits[inputs.targets.argmax()] = logit
        got = evaluate(backend, logits, inputs.targets, delta=delta)
        truth = oracles.rank_sort(oracles.read_dense(logits, inputs.targets), delta)
        assert_gates(backend, got, truth.losses, truth.gradient(), f"outlier {logit} delta {delta}")


@pytest.mark.parametrize("delta", [0.0, 1e-30, 1e-12, 1e-3, 1e3, 1e12, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_delta(backend, generator, delta, dtype):
    for distribution in ("trained", "ties", "tiny", "wide"):
        sample = RankingSample(distribution, 20, 300, distribution=distribution, delta=delta, dtype=dtype)
        assert_agrees_with_oracle(backend, sample, generator)


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_many_equal_logits(backend, delta):
    """1e5 elements in one bin: narrow counters would wrap."""
    logits, targets = torch.full((100_000,), -4.6), torch.zeros(100_000)
    targets[::1000] = torch.linspace(0.05, 1, 100)
    got = evaluate(backend, logits, targets, delta=delta)
    positives, negatives, self_term = 100, 99_900, 1.0 if delta == 0 else 0.5
    ranking = self_term * negatives / (self_term * (positives + negatives))
    share = torch.full((100_000,), ranking / negatives, dtype=torch.float64)
    truth = oracles.rank_sort(oracles.read_dense(logits[targets > 0], targets[targets > 0]), delta)
    share[targets > 0] = -ranking / positives + truth.sorting_gradient
    assert_gates(backend, got, (ranking, truth.sorting), share)
    assert not evaluate(backend, logits, torch.zeros_like(logits), delta=delta).gradient.any()


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_positives(backend, generator, dtype):
    sample = RankingSample("many", 1500, 3000, delta=0.5, dtype=dtype, quality_levels=200)
    assert_agrees_with_oracle(backend, sample, generator)
    assert_agrees_with_oracle(backend, dataclasses.replace(sample, distribution="ties", delta=0.0), generator)


def test_published_example():
    """One positive, one negative far above: 1 / (1/2 + 1), because of the self term 1/2. Three halves by hand, no code involved."""
    logits, targets = torch.tensor([0.0, 9.0]), torch.tensor([1.0, 0.0])
    truth = oracles.rank_sort(oracles.read_dense(logits, targets), 0.5)
    assert truth.losses == (pytest.approx(2 / 3, rel=1e-15), 0.0)
    assert truth.gradient().tolist() == pytest.approx([-2 / 3, 2 / 3], rel=1e-15)


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("distance", [0.3, 0.9, 5.0, 8.5, 9.0, 9.5, 30.0])
def test_positives_apart_from_a_tight_cluster(backend, generator, distance, spread):
    """A look-up table sized for the cluster must not lose windows of the others that reach into it."""
    cluster = torch.randn(40, generator=generator) * spread
    for delta in (0.01, 0.5, 20.0):
        apart = torch.tensor([-distance, distance]) * max(delta, spread)
        positives = torch.cat([cluster, apart])
        negatives = positives[torch.randint(0, 42, (300,), generator=generator)]
        negatives = negatives + torch.randn(300, generator=generator) * max(delta, spread)
        logits = torch.cat([positives, negatives])
        targets = torch.cat([torch.rand(42, generator=generator) * 0.9 + 0.1, torch.zeros(300)])
        truth = oracles.rank_sort(oracles.read_dense(logits, targets), delta)
        assert_gates(backend, evaluate(backend, logits, targets, delta=delta), truth.losses, truth.gradient(), f"delta {delta}")
