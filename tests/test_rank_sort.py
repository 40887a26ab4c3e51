"""Rank & Sort: the authors' recorded outputs, and what is its own. Random inputs: test_ranking_values.py."""
import golden_vectors
import oracles
import pytest
import torch
from harness import NOISE, assert_gates, assert_within, evaluate

GOLDEN = golden_vectors.params("ranksort")
DTYPES = [torch.float64, torch.float32]


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
    assert got.losses[0] != truth.losses[0]


def test_published_example():
    """One positive, one negative far above: 1 / (1/2 + 1), because of the self term 1/2. Three halves by hand, no code involved."""
    logits, targets = torch.tensor([0.0, 9.0]), torch.tensor([1.0, 0.0])
    truth = oracles.rank_sort(oracles.read_dense(logits, targets), 0.5)
    assert truth.losses == (pytest.approx(2 / 3, rel=1e-15), 0.0)
    assert truth.gradient().tolist() == pytest.approx([-2 / 3, 2 / 3], rel=1e-15)


def test_sorting_loss_needs_no_negatives(backend, generator):
    logits, quality = torch.randn(12, generator=generator), torch.linspace(0.1, 1, 12)
    got = evaluate(backend, logits, quality)
    truth = oracles.rank_sort(oracles.read_dense(logits, quality), 0.5)
    assert_gates(backend, got, truth.losses, truth.gradient())
    assert got.losses[0] == 0 and truth.losses[1] > 0


@pytest.mark.parametrize("delta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_parity_scales_everything_by_the_ranking_loss_factor(backend, generator, delta, dtype):
    logits = torch.randn(60, generator=generator, dtype=torch.float64).to(dtype)
    targets = (torch.rand(60, generator=generator) - 0.7).clamp(min=0)
    truth = oracles.rank_sort(oracles.read_dense(logits, targets), delta)
    got = evaluate(backend, logits, targets, delta=delta, upstream=(2.0, 7.0), upstream_parity=True)
    assert_gates(backend, got, truth.losses, truth.gradient(2.0, 2.0))
    only_sorting = evaluate(backend, logits, targets, delta=delta, upstream=(None, 7.0), upstream_parity=True)
    assert not only_sorting.gradient.any()
