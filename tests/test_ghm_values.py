"""Values, gradients and state of GHM-C and GHM-R: the authors' outputs, an oracle on fresh random inputs, exact bins."""
import bisect
import dataclasses
import decimal
import fractions
import functools
import itertools
import math

import golden_vectors
import harness
import numpy as np
import pytest
import rsloss_kernels
import torch
from ghm_samples import CLASSIFICATION, DISTRIBUTIONS, GHM, GHM_LOSSES, GHM_SAMPLES, GRADIENT_GATE, REGRESSION, GHMSample
from harness import assert_gates, assert_within

DTYPES = [torch.float64, torch.float32]
LOSSES = pytest.mark.parametrize("loss", GHM_LOSSES.values(), ids=GHM_LOSSES)
SAMPLES = pytest.mark.parametrize(
    "loss, sample",
    [pytest.param(loss, sample, id=f"{loss.name}-{sample.name}") for loss in GHM_LOSSES.values() for sample in loss.samples],
)


def golden_module(case: golden_vectors.Case) -> torch.nn.Module:
    options = {name: case.hyper[name] for name in ("bins", "momentum", "loss_weight")}
    if case.manifest["kind"] == "ghmr":
        return rsloss_kernels.GHMR(mu=case.hyper["mu"], **options)
    return rsloss_kernels.GHMC(background="first" if case.hyper["label_convention"] == "bg0" else "last", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", golden_vectors.params("ghm"))
def test_golden(backend, case, dtype):
    """Steps one after the other, as every implementation recorded them in float64."""
    inputs, module = case.inputs(), golden_module(case).to(backend.device)
    recorded = {name: case.outputs(name) for name in ("orig", "mmdet1", "mmdet2", "mmdet2r")}
    recorded = {name: outputs for name, outputs in recorded.items() if outputs}
    assert recorded and not case.crashed
    for step in range(case.hyper["steps"]):
        pred, target, weight = (inputs[f"s{step}_{name}"].to(backend.device) for name in ("pred", "target", "label_weight"))
        leaf = pred.to(dtype).requires_grad_()
        with rsloss_kernels.use_backend(backend.name):
            loss = module(leaf, target, weight)
        gradient = torch.autograd.grad(loss, leaf, torch.full_like(loss, case.hyper["gout"]))[0].cpu()
        got = harness.Evaluation((loss.detach().cpu(),), gradient)
        per_element = weight if weight.dim() == pred.dim() else weight[:, None].expand(pred.shape)
        valid = max(float(per_element.sum() if case.manifest["kind"] == "ghmr" else (per_element > 0).sum()), 1.0)
        for name, outputs in recorded.items():
            # One version divides by its normaliser plus float32's epsilon.
            wanted = {key: outputs.get(f"s{step}_{key}") for key in ("loss", "grad", "acc_sum")}
            factor = 1 + 2.0**-23 / valid if name == "mmdet2r" else 1.0
            truth = gradient if wanted["grad"] is None else wanted["grad"] * factor
            label = f"{name} step {step}"
            assert_gates(backend, got, [float(wanted["loss"]) * factor], truth, label, harness.NOISE, GRADIENT_GATE)
            if case.hyper["momentum"] > 0:
                assert_within(module.acc_sum.cpu(), wanted["acc_sum"], 1e-10 * wanted["acc_sum"], f"{label} acc_sum")


def assert_sample_agrees(backend, loss: GHM, sample: GHMSample, generator, upstream=1.0) -> harness.Evaluation:
    inputs = loss.draw(sample, generator)
    label = f"{sample.name} {sample.form} rows={sample.rows} bins={sample.bins}"
    return loss.assert_agrees(backend, *inputs.arguments, label=label, upstream=upstream, **inputs.options)


@LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_inputs(backend, loss, generator, distribution, dtype):
    forms = ("dense",) if loss.is_regression else ("dense", "soft", "index")
    variants = itertools.cycle(
        [
            {"bins": 10, "weight": "element"},
            {"bins": 30, "momentum": 0.75, "background": "first"},
            {"bins": 1, "empty_bins": "count"},
            {"bins": 256, "momentum": 0.5, "is_corrected": True},
            {"bins": 2, "weight": "element", "mu": 0.3},
        ]
    )
    for form in forms:
        sizes = (200,) if backend.is_interpreted else (1, 7, 400) if backend.is_slow else (1, 7, 400, 2000)
        for rows, variant in zip(sizes, variants, strict=False):
            sample = GHMSample(distribution, rows, 3, distribution, form, dtype=dtype, **variant)
            assert_sample_agrees(backend, loss, sample, generator)


@SAMPLES
def test_samples(backend, loss, generator, sample):
    assert_sample_agrees(backend, loss, sample, generator, upstream=-0.375)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", ["init", "trained", "ties", "separated"])
def test_16_bit_logits_lose_only_the_rounding_of_the_gradient(backend, loss, generator, distribution, dtype):
    for form in ("dense",) if loss.is_regression else ("dense", "soft", "index"):
        assert_sample_agrees(backend, loss, GHMSample(distribution, 90, 4, distribution, form, dtype=dtype, bins=30), generator)


@LOSSES
@pytest.mark.parametrize("other_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_targets_and_weights_of_any_floating_dtype(backend, loss, generator, other_dtype):
    for dtype in (torch.float16, torch.float32, torch.float64):
        form = "dense" if loss.is_regression else "soft"
        sample = GHMSample(
            "dtypes", form=form, dtype=dtype, target_dtype=other_dtype, weight="element", weight_dtype=other_dtype
        )
        assert_sample_agrees(backend, loss, sample, generator)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integral_dtype(backend, generator, label_dtype):
    logits = torch.randn((9, 3), generator=generator)
    labels = torch.tensor([0, 3, 2, 3, 1, 3, 0, 2, 7])
    expected = CLASSIFICATION.assert_agrees(backend, logits, labels)
    assert CLASSIFICATION.evaluate(backend, logits, labels.to(label_dtype)) == expected


def test_labels_that_int32_cannot_hold_are_background(backend, generator):
    logits = torch.randn((4, 3), generator=generator)
    for background, none in (("last", 3), ("first", 0)):
        expected = CLASSIFICATION.evaluate(backend, logits, torch.tensor([1, none, 2, none]), background=background)
        for labels in (torch.tensor([1, 2**32 - 1, 2, none], dtype=torch.uint32), torch.tensor([1, 2**63 - 1, 2, -(2**63)])):
            assert CLASSIFICATION.evaluate(backend, logits, labels, background=background) == expected


def test_integral_and_bool_dense_targets(backend, generator):
    logits = torch.randn((6, 4), generator=generator)
    target = torch.randint(0, 2, (6, 4), generator=generator).float()
    expected = CLASSIFICATION.assert_agrees(backend, logits, target)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        assert CLASSIFICATION.evaluate(backend, logits, target.to(dtype)) == expected
    offsets = torch.randint(-(2**30), 2**30, (6, 4), generator=generator)
    pred = offsets.double() + torch.randn((6, 4), generator=generator) * 0.02
    expected = REGRESSION.assert_agrees(backend, pred, offsets.double())
    assert REGRESSION.evaluate(backend, pred, offsets) == expected


def test_a_label_that_is_no_foreground_class_is_a_row_of_zeros(backend, generator):
    """Never ignored: what is to be ignored has weight 0."""
    logits = torch.randn((6, 3), generator=generator)
    labels, one_hot = torch.tensor([0, 3, 1, 3, 2, 3]), torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]])
    expected = CLASSIFICATION.assert_agrees(backend, logits, one_hot.float())
    for other in (3, 4, 1000, 2**31 - 1, -1, -2, -(2**31)):
        assert CLASSIFICATION.evaluate(backend, logits, labels.where(labels != 3, other)) == expected
        shifted = torch.where(labels == 3, 0 if other == 3 else other, labels + 1)
        assert CLASSIFICATION.evaluate(backend, logits, shifted, background="first") == expected


@pytest.mark.parametrize("form", ["soft", "index"])
def test_weights_of_rows_equal_weights_of_elements(backend, generator, form):
    sample = GHMSample("rows", form=form, weight="row")
    logits, target, rows = CLASSIFICATION.draw(sample, generator).arguments
    expected = CLASSIFICATION.assert_agrees(backend, logits, target, rows)
    assert CLASSIFICATION.evaluate(backend, logits, target, rows[:, None].expand(logits.shape)) == expected


@LOSSES
def test_only_the_sign_of_a_weight_matters(backend, loss, generator):
    inputs = loss.draw(GHMSample("weights", weight="element", momentum=0.75), generator)
    pred, target, weight = inputs.arguments
    expected = loss.assert_agrees(backend, pred, target, weight, **inputs.options)
    others = torch.where(weight > 0, torch.tensor([1e-45, 1e-20, 3.0, torch.inf])[torch.arange(4)], 0.0)
    below = torch.where(weight > 0, 1.0, torch.tensor([0.0, -1.0, torch.nan, -torch.inf]))
    for changed in (others, below, weight > 0, (weight > 0).double()):
        assert loss.evaluate(backend, pred, target, changed, **inputs.options) == expected


# --- bins ---


@functools.cache
def logit_edges(bins: int) -> list[decimal.Decimal]:
    """log(k / (bins - k)) with 60 digits."""
    with decimal.localcontext(prec=60):
        return [(decimal.Decimal(k) / (bins - k)).ln() for k in range(1, bins)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("bins", [2, 3, 10, 30, 256])
def test_bins_of_logits_on_and_beside_the_edges(backend, bins, dtype):
    """The edges as numbers of the dtype, and their neighbours: no rounded gradient norm decides."""
    numpy_dtype = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16}[dtype]
    logits, wanted = [], [0] * bins
    for exact in logit_edges(bins):
        edge = numpy_dtype(float(exact))
        # float64: beside what log1p may round differently.
        step = np.spacing(np.abs(edge)) * (4 if dtype == torch.float64 else 1)
        logits += [edge - step, edge + step] + ([edge] if dtype != torch.float64 or edge == 0 else [])
    for logit in logits:
        wanted[bisect.bisect_right(logit_edges(bins), decimal.Decimal(float(logit)))] += 1
    z = torch.tensor(np.array(logits))
    for logit, target in ((z, torch.zeros_like(z)), (-z, torch.ones_like(z))):
        with rsloss_kernels.use_backend(backend.name):
            density = rsloss_kernels.gradient_density(logit.to(backend.device), target.to(backend.device), bins=bins)
        assert density.counts.tolist() == wanted


@pytest.mark.parametrize("mu, dtype", [(0.5, torch.float32), (0.02, torch.float32), (0.75, torch.float64), (1e-30, torch.float32)])
@pytest.mark.parametrize("bins", [2, 10, 30, 256])
def test_bins_of_distances_on_and_beside_the_edges(backend, bins, mu, dtype):
    numpy_dtype = np.float32 if dtype == torch.float32 else np.float64
    squares = [fractions.Fraction(mu) ** 2 * k * k / ((bins - k) * (bins + k)) for k in range(1, bins)]
    distances, wanted = [0.0], [0] * bins
    for k in range(1, bins):
        edge = numpy_dtype(mu * k / math.sqrt((bins - k) * (bins + k)))
        step = np.spacing(edge) * (4 if dtype == torch.float64 else 1)
        # Where the root is a whole number the edge is exact.
        is_exact = bins == 10 and k in (6, 8)
        distances += [edge - step, edge + step] + ([edge] if dtype == torch.float32 or is_exact else [])
    for distance in distances:
        wanted[bisect.bisect_right(squares, fractions.Fraction(float(distance)) ** 2)] += 1
    d = torch.tensor(np.array(distances, dtype=numpy_dtype))
    for pred, target in ((d, torch.zeros_like(d)), (torch.zeros_like(d), d)):
        with rsloss_kernels.use_backend(backend.name):
            density = rsloss_kernels.gradient_density(pred.to(backend.device), target.to(backend.device), mu=mu, bins=bins)
        assert density.counts.tolist() == wanted


@pytest.mark.parametrize("bins", [10, 256])
def test_bins_of_bfloat16_distances_beside_the_edges(backend, bins):
    """The three bfloat16 numbers around each edge."""
    squares = [fractions.Fraction(0.02) ** 2 * k * k / ((bins - k) * (bins + k)) for k in range(1, bins)]
    nearest = torch.tensor([float(square) for square in squares], dtype=torch.float64).sqrt().bfloat16().view(torch.int16)
    d = (nearest[:, None] + torch.arange(-1, 2)).to(torch.int16).view(torch.bfloat16)
    wanted = [0] * bins
    for distance in d.flatten().tolist():
        wanted[bisect.bisect_right(squares, fractions.Fraction(distance) ** 2)] += 1
    with rsloss_kernels.use_backend(backend.name):
        counts = rsloss_kernels.gradient_density(d.to(backend.device), torch.zeros_like(d).to(backend.device), mu=0.02, bins=bins).counts
    assert counts.tolist() == wanted


@pytest.mark.parametrize("mu", [0.02, 3.7, 1e-30, 1e30])
@pytest.mark.parametrize("bins", [2, 10, 256])
def test_distances_of_exactly_an_edge_belong_to_the_upper_bin(backend, bins, mu):
    """The edge is what the README's operations give, each rounded to the nearest: not so a fast square root."""
    edges = [mu * k / math.sqrt((bins - k) * (bins + k)) for k in range(1, bins)]
    pred = torch.tensor(edges + [math.nextafter(edge, 0.0) for edge in edges], dtype=torch.float64, device=backend.device)
    with rsloss_kernels.use_backend(backend.name):
        counts = rsloss_kernels.gradient_density(pred, torch.zeros_like(pred), mu=mu, bins=bins).counts
    assert counts.tolist() == [1] + [2] * (bins - 2) + [1]


def test_gradient_norms_of_exactly_one_half_belong_to_the_upper_bin(backend):
    with rsloss_kernels.use_backend(backend.name):
        for target in (0.0, 1.0):
            z, t = torch.zeros(3, device=backend.device), torch.full((3,), target, device=backend.device)
            assert rsloss_kernels.gradient_density(z, t, bins=10).counts.tolist() == [0] * 5 + [3] + [0] * 4
        # Soft targets on the edges: |0.5 - t| = 0.25 and 0.
        t = torch.tensor([0.25, 0.75, 0.5], device=backend.device)
        assert rsloss_kernels.gradient_density(torch.zeros_like(t), t, bins=4).counts.tolist() == [1, 2, 0, 0]


# --- sizes and values at which implementations lose precision ---


@LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_elements_have_no_errors_that_average_out(backend, loss, dtype):
    values = (1e-30, 1e-6, 0.01234, 0.3, 0.7071, 1.1, 2.7, 5.4321, 9.9, 17.3, 33.3, 60.1, 87.0)
    for value in values[::4] if backend.is_interpreted else values:
        for sign in (1, -1):
            pred = torch.full((37,), sign * value, dtype=dtype)
            for target in (0.0,) if loss.is_regression else (0.0, 1.0, 0.3, 1e-4):
                loss.assert_agrees(backend, pred, torch.full_like(pred, target), label=f"{sign * value} {target}", bins=30)


@pytest.mark.parametrize("distance", [2.0**-24, 1e-7, 1e-12])
def test_soft_targets_near_0_and_1(backend, distance):
    """The logits are sure and right, so that the derivative is a small difference: not of two numbers near 1."""
    for logit in (5.0, 20.0, 40.0):
        logits = torch.full((9,), logit, dtype=torch.float64)
        CLASSIFICATION.assert_agrees(backend, logits, torch.full_like(logits, 1 - distance), label=f"{logit}")
        CLASSIFICATION.assert_agrees(backend, -logits, torch.full_like(logits, distance), label=f"{-logit}")


@pytest.mark.parametrize("logit", [88.5, 100.0, 1e4, 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(backend, generator, logit, dtype):
    logits = torch.randn((8, 4), generator=generator, dtype=torch.float64).to(dtype)
    logits[0], logits[1] = logit, -logit
    for target in (torch.zeros(8, 4), torch.ones(8, 4), torch.rand((8, 4), generator=generator)):
        CLASSIFICATION.assert_agrees(backend, logits, target, label=f"{logit}")
        CLASSIFICATION.assert_agrees(backend, logits[:2], target[:2], label=f"{logit} alone")


@pytest.mark.parametrize("bins", [10, 100])
def test_logits_up_to_the_ends_of_the_float_path(backend, bins):
    """exp(86) times the number of bins is beyond float32."""
    logits = torch.linspace(-90, 90, 721)
    for target in (torch.zeros(721), torch.ones(721)):
        CLASSIFICATION.assert_agrees(backend, logits, target, label=f"{bins}", bins=bins)


@pytest.mark.parametrize("mu", [1e-30, 1e-12, 0.02, 1e3, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_mu(backend, generator, mu, dtype):
    for scale in (1e-30, 1e-9, 1.0, 1e9, 1e30):
        pred = (torch.randn(50, generator=generator, dtype=torch.float64) * scale).to(dtype)
        REGRESSION.assert_agrees(backend, pred, torch.zeros_like(pred), label=f"{mu} {scale}", mu=mu, bins=30)


def test_distances_of_large_offsets(backend, generator):
    """The difference of two float32 numbers must not be rounded to float32."""
    target = torch.randn(64, generator=generator, dtype=torch.float64) * 100
    pred = (target + torch.randn(64, generator=generator) * 0.01).float()
    REGRESSION.assert_agrees(backend, pred, target)


@LOSSES
@pytest.mark.parametrize("size", [1, 31, 1023, 1025, 4097, 70_001])
def test_sizes(backend, loss, generator, size):
    if backend.name != "cpp" and size > 5000:
        size = 9001
    pred = torch.randn(size, generator=generator) * 2
    target = (torch.rand(size, generator=generator) < 0.1).float()
    loss.assert_agrees(backend, pred, target, (torch.rand(size, generator=generator) < 0.9).float(), bins=30)


@LOSSES
def test_many_equal_elements(backend, loss):
    """1e5 elements in one bin: narrow counters would wrap."""
    pred = torch.full((100_000,), -4.6)
    got = loss.assert_agrees(backend, pred, torch.zeros_like(pred), momentum=0.5, acc_sum=torch.zeros(10, dtype=torch.float64))
    assert got.statistics[0].sum() == 50_000


@LOSSES
def test_sums_of_many_equal_losses(backend, loss):
    """One long sum would lose a digit for every ten times as many elements."""
    number = 2**16 if backend.is_slow else 2**20
    pred = torch.full((number,), 0.3, dtype=torch.float64)
    histogram, *_ = loss.run_operators(backend, [pred], [torch.zeros_like(pred)], [])
    assert_within(histogram[1].sum(), number * loss.truth(pred[:1], torch.zeros(1)).losses[0], 1e-12 * number, "sum")


# --- the density ---


@pytest.mark.parametrize("sample", GHM_SAMPLES[::3], ids=lambda sample: sample.name)
@LOSSES
def test_gradient_density(backend, loss, generator, sample):
    if sample not in loss.samples:
        sample = dataclasses.replace(sample, form="dense", weight="element", background="last")
    inputs = loss.draw(sample, generator)
    names = ("bins", "empty_bins", "mu", "background")
    options = {name: value for name, value in inputs.options.items() if name in names}
    with rsloss_kernels.use_backend(backend.name):
        got = rsloss_kernels.gradient_density(*(value.to(backend.device) for value in inputs.arguments), **options)
    truth = loss.truth(*inputs.arguments, **options)
    edges, counts, weights = (value.cpu() for value in got)
    assert edges.dtype == weights.dtype == torch.float64 and counts.dtype == torch.int64
    assert edges.tolist() == [k / sample.bins for k in range(sample.bins + 1)]
    assert torch.equal(counts, truth.counts)
    torch.testing.assert_close(weights, truth.weights * truth.counts.sum(), rtol=1e-14, atol=0)
