"""AP loss: the authors' recorded outputs, and what is its own. Random inputs: test_ranking_values.py."""
import golden_vectors
import oracles
import pytest
import torch
from harness import NOISE, assert_gates, assert_within, evaluate
from rsloss_kernels import APLoss, average_precision_loss, use_backend
from samples import DELTAS, LOSSES, RankingSample

GOLDEN = golden_vectors.params("aploss")
DTYPES = [torch.float64, torch.float32]
IMPLEMENTATIONS = ("ap", "ap_orig", "brs_ap")
# Recorded with the ranking part of the bucketed loss under the name of AP; it is another loss.
OTHER_LOSS = {"bap", "bap_unstable"}


def as_published(targets: torch.Tensor) -> torch.Tensor:
    """The authors' positives are exactly 1; they ignore what lies between 0 and 1."""
    return torch.where((targets > 0) & (targets < 1), -1.0, targets)


def published(case) -> list[tuple[float, torch.Tensor]]:
    """Every implementation's float64 loss and gradient, as far as it is finite. What stands for the others is in `defined`."""
    outputs = [case.outputs(implementation) for implementation in IMPLEMENTATIONS]
    return [(float(out["loss"]), out["grad"]) for out in outputs if out and out["grad"].isfinite().all()]


def defined(case) -> tuple[float, torch.Tensor]:
    """Our answer where no original has one: zeros without positives, and for ties at delta 0 the step that counts them."""
    inputs = case.inputs()
    if {"nopos", "empty"} & set(case.tags):
        return 0.0, torch.zeros(inputs["logits"].numel(), dtype=torch.float64)
    assert case.name == "ap012_d0_ties"
    truth = oracles.average_precision(oracles.read_dense(inputs["logits"], as_published(inputs["targets"])), 0.0)
    assert 0 < truth.losses[0] < 1 and truth.gradient().isfinite().all()
    return truth.losses[0], truth.gradient()


def test_all_golden_vectors_are_there():
    cases = golden_vectors.cases("aploss")
    assert len(cases) == 46
    without = {case.name for case in cases if not published(case)}
    assert without == {"ap012_d0_ties"}
    assert {case.name for case in cases if "ap" in case.crashed} == {"ap043_nopos", "ap044_nopos_soft", "ap045_empty"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors(backend, case, dtype):
    inputs = case.inputs()
    got = evaluate(
        backend,
        inputs["logits"].to(dtype),
        as_published(inputs["targets"]),
        loss=average_precision_loss,
        delta=case.hyper["delta"],
        upstream=(case.hyper["gout"],),
    )
    answers = published(case)
    if not answers or case.crashed - OTHER_LOSS:
        answers.append(defined(case))
    for loss, gradient in answers:
        assert_gates(backend, got, [loss], gradient, case.name, NOISE)
    assert got.losses[0].isfinite() and got.gradient.isfinite().all()


@pytest.mark.parametrize("case", GOLDEN)
def test_oracle_agrees_with_golden_vectors(case):
    """The oracle of the other tests is right, and independently of the library."""
    inputs = case.inputs()
    elements = oracles.read_dense(inputs["logits"], as_published(inputs["targets"]))
    truth = oracles.average_precision(elements, case.hyper["delta"])
    for loss, gradient in published(case):
        assert abs(truth.losses[0] - loss) <= 1e-12 * abs(loss) + NOISE
        largest = float(gradient.abs().amax() if gradient.numel() else 0)
        assert_within(truth.gradient(case.hyper["gout"]), gradient, 1e-12 * largest + NOISE, case.name)


def test_every_target_above_zero_is_a_positive(backend):
    """Unlike the authors' code, and as in Rank & Sort; the value itself does not matter."""
    case = next(case for case in golden_vectors.cases("aploss") if case.name == "ap038_soft_targets")
    inputs = case.inputs()
    soft = (inputs["targets"] > 0) & (inputs["targets"] < 1)
    assert soft.any()

    def run(targets):
        return evaluate(backend, inputs["logits"], targets, loss=average_precision_loss)

    got = run(inputs["targets"])
    assert got == run((inputs["targets"] > 0).float().where(inputs["targets"] >= 0, -1.0))
    assert got == run(inputs["targets"].where(~soft, 1e-30))
    assert (got.gradient[soft] <= 0).all() and got.gradient[soft].any() and got != run(as_published(inputs["targets"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta", DELTAS)
def test_precision_that_is_not_interpolated(backend, generator, delta, dtype):
    differs = False
    for distribution in ("trained", "ties", "init"):
        sample = RankingSample(distribution, 40, 300, 10, distribution, delta, dtype=dtype)
        logits, targets = LOSSES["ap"].draw(sample, generator).arguments
        # Far above the rest and apart from each other, from the top: three negatives, a positive, eleven equal positives. The
        # first positive has precision 1/4, those below it at least 7/10.
        step, positives = 10 * delta + 1, (targets > 0).nonzero()
        logits[positives[:11]] = logits.max() + step
        logits[positives[11]] = logits.max() + step
        logits[(targets == 0).nonzero()[:3]] = logits.max() + step
        elements = oracles.read(logits, targets)
        results = {}
        for interpolated in (True, False):
            truth = oracles.average_precision(elements, delta, interpolated)
            got = evaluate(backend, logits, targets, loss=average_precision_loss, delta=delta, interpolated=interpolated)
            assert_gates(backend, got, truth.losses, truth.gradient(), f"{distribution} interpolated={interpolated}")
            results[interpolated] = got
        differs |= bool(results[True].losses[0] < results[False].losses[0])
        assert results[True].losses[0] <= results[False].losses[0]
    assert differs


def test_module_passes_every_keyword_on(backend, generator):
    arguments = [value.to(backend.device) for value in LOSSES["ap"].draw(RankingSample("module", form="index"), generator).arguments]
    with use_backend(backend.name):
        for options in ({"interpolated": False, "delta": 0.25}, {"background": "first"}, {"segments": 3}):
            expected = average_precision_loss(*arguments, **options)
            assert torch.equal(APLoss(**options)(*arguments), expected)
            assert expected != average_precision_loss(*arguments)
        with pytest.raises(ValueError, match="max_positives must be"):
            APLoss(max_positives=0)(*arguments)


def test_published_example():
    """One positive, one negative far above: precision 1/2. A second positive below it, one more negative between: by hand."""
    truth = oracles.average_precision(oracles.read_dense(torch.tensor([0.0, 9.0]), torch.tensor([1.0, 0.0])), 1.0)
    assert truth.losses == (0.5,) and truth.gradient().tolist() == [-0.5, 0.5]
    # Precision 1/3 at the upper positive, 1/2 at the lower: the upper one is interpolated.
    logits, targets = torch.tensor([30.0, 20.0, 10.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    elements = oracles.read_dense(logits, targets)
    assert oracles.average_precision(elements, 1.0).losses == (0.5,)
    assert oracles.average_precision(elements, 1.0, interpolated=False).losses == (pytest.approx((2 / 3 + 1 / 2) / 2),)
    assert oracles.average_precision(elements, 1.0).gradient().tolist() == pytest.approx([0.25, 0.25, -0.25, -0.25])
