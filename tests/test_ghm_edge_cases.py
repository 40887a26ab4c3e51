"""GHM-C and GHM-R at the edges: nothing valid, NaN and infinity, huge and tiny values, uninitialised memory."""
import harness
import pytest
import torch
from ghm_samples import CLASSIFICATION, GHM_LOSSES, GHM_SAMPLES, REGRESSION, GHMSample
from rsloss_kernels import gradient_density, use_backend

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64]
LOSSES = pytest.mark.parametrize("loss", GHM_LOSSES.values(), ids=GHM_LOSSES)


def state() -> dict:
    return {
        "momentum": 0.75,
        "acc_sum": torch.arange(10, dtype=torch.float64) / 3,
        "num_updates": torch.arange(10),
    }


NOTHING_VALID = {
    "empty": lambda: (torch.zeros((0, 4)), torch.zeros((0, 4)), None),
    "no_columns": lambda: (torch.zeros((5, 0)), torch.zeros((5, 0)), None),
    "weights_0": lambda: (torch.ones((5, 4)), torch.ones((5, 4)), torch.zeros((5, 4))),
    "weights_below_0": lambda: (torch.ones((5, 4)), torch.ones((5, 4)), torch.full((5, 4), -1.0)),
    "weights_nan": lambda: (torch.ones((5, 4)), torch.ones((5, 4)), torch.full((5, 4), NAN)),
    "garbage": lambda: (torch.full((5, 4), NAN), torch.full((5, 4), INF), torch.zeros((5, 4))),
}


@LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NOTHING_VALID)
def test_nothing_valid_gives_exact_zeros(backend, loss, name, dtype):
    pred, target, weight = NOTHING_VALID[name]()
    for options in ({}, state(), {**state(), "empty_bins": "count"}):
        got = loss.evaluate(backend, pred.to(dtype), target, weight, upstream=[NAN], **options)
        assert got.losses[0].item() == 0 and got.losses[0].dtype == dtype
        assert got.gradient.shape == pred.shape and torch.equal(got.gradient, torch.zeros_like(got.gradient))
        if options:
            assert torch.equal(got.statistics[0], options["acc_sum"]) and torch.equal(got.statistics[1], options["num_updates"])


@LOSSES
@pytest.mark.parametrize("name", NOTHING_VALID)
def test_nothing_valid_stays_connected_to_the_graph(backend, loss, name):
    """A process without elements must still take part in the backward of all."""
    pred, target, weight = NOTHING_VALID[name]()
    leaf = pred.to(backend.device).requires_grad_()
    with use_backend(backend.name):
        value = loss.function(leaf, target.to(backend.device), weight if weight is None else weight.to(backend.device))
    assert value.requires_grad
    value.backward()
    assert leaf.grad.shape == pred.shape and not leaf.grad.any()


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 3, 4, 5)])
def test_any_shape(backend, generator, shape):
    pred = torch.randn(shape, generator=generator)
    for loss in GHM_LOSSES.values():
        loss.assert_agrees(backend, pred, (torch.rand(shape, generator=generator) < 0.5).float(), label=f"{shape}")
    if shape:
        labels = torch.randint(-1, shape[-1] + 2, shape[:-1], generator=generator)
        CLASSIFICATION.assert_agrees(backend, pred, labels, torch.rand(shape[:-1], generator=generator) - 0.2, label=f"{shape}")


@LOSSES
def test_a_broken_state_does_no_harm_without_momentum(backend, loss, generator):
    arguments = loss.draw(GHMSample("broken_state"), generator).arguments
    expected = loss.evaluate(backend, *arguments)
    for value in (NAN, INF):
        got = loss.evaluate(backend, *arguments, acc_sum=torch.full((10,), value))
        assert got.losses == expected.losses and torch.equal(got.gradient, expected.gradient) and got.statistics[0].isfinite().all()


@LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["pred", "target", "both"])
def test_nan_in_a_valid_element(backend, loss, generator, where, dtype):
    """The loss and that element's gradient are NaN, the state stays; all others are as if it were not valid."""
    pred, target = loss.draw(GHMSample("nan", form="soft", dtype=dtype), generator).arguments
    weight = torch.ones_like(pred)
    broken = torch.zeros_like(pred, dtype=torch.bool)
    broken[[0, 7, 59], [3, 0, 2]] = True
    if where != "target":
        pred = pred.masked_fill(broken, NAN)
    if where != "pred":
        target = target.masked_fill(broken, NAN)
    for options in ({}, state()):
        got = loss.assert_agrees(backend, pred, target, weight, **options)
        assert got.losses[0].isnan() and torch.equal(got.gradient.isnan(), broken)
        without = loss.evaluate(backend, pred, target, weight.masked_fill(broken, 0.0), **options)
        assert without.losses[0].isfinite() and torch.equal(got.gradient[~broken], without.gradient[~broken])
        if options:
            assert torch.equal(got.statistics[0], options["acc_sum"]) and torch.equal(got.statistics[1], options["num_updates"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["dense", "soft"])
def test_an_infinite_target_of_classification_is_as_nan(backend, generator, form, dtype):
    """Whatever the logit: beside some of them the formulas stay finite or infinite."""
    pred, target = CLASSIFICATION.draw(GHMSample("infinite_target", form=form, dtype=dtype), generator).arguments
    pred[:8, 1] = torch.tensor([0.0, -0.0, 2.0, 2.0, -2.0, -100.0, INF, -INF])
    broken = torch.zeros_like(pred, dtype=torch.bool)
    broken[:8, 1] = True
    expected = CLASSIFICATION.evaluate(backend, pred, target.masked_fill(broken, NAN), **state())
    for value in (INF, -INF):
        got = CLASSIFICATION.evaluate(backend, pred, target.masked_fill(broken, value), **state())
        assert got.losses[0].isnan() and torch.equal(got.gradient.isnan(), broken)
        assert torch.equal(got.gradient[~broken], expected.gradient[~broken])
        assert all(map(torch.equal, got.statistics, expected.statistics))


@LOSSES
@pytest.mark.parametrize("upstream", [0.0, 1.0, INF])
def test_nan_reaches_the_gradient_whatever_the_upstream_factor(backend, loss, generator, upstream):
    pred, target = loss.draw(GHMSample("nan"), generator).arguments
    pred[4, 1] = NAN
    gradient = loss.evaluate(backend, pred, target, upstream=[upstream]).gradient
    assert gradient[4, 1].isnan()
    if upstream != INF:
        assert harness.where(gradient.isnan()) == [4 * 4 + 1]


@LOSSES
def test_nan_alone(backend, loss):
    got = loss.assert_agrees(backend, torch.tensor([NAN, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]), **state())
    assert got.losses[0].isnan() and got.gradient[0].isnan() and got.gradient[1] == 0


@LOSSES
def test_many_nan_do_not_write_out_of_bounds(backend, loss, generator):
    """NaN compares false with everything: an unguarded search would leave its table."""
    pred, target = loss.draw(GHMSample("nan", rows=900, bins=256), generator).arguments
    holes = torch.rand(pred.shape, generator=generator) < 0.5
    loss.assert_agrees(backend, pred.where(~holes, NAN), target, bins=256)


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES], ids=str)
def test_infinite_logits_take_their_limits(backend, generator, dtype):
    logits = torch.randn((6, 2), generator=generator).to(dtype)
    logits[0], logits[1] = torch.tensor([INF, -INF])
    # Right and sure: nothing is lost. Soft or wrong: an infinite loss with a finite gradient.
    right = torch.zeros((6, 2))
    right[0] = 1
    CLASSIFICATION.assert_agrees(backend, logits, right, bins=30)
    assert not CLASSIFICATION.evaluate(backend, logits, right).gradient[:2].any()
    for wrong in (1 - right, torch.full((6, 2), 0.25)):
        truth = CLASSIFICATION.truth(logits, wrong)
        got = CLASSIFICATION.evaluate(backend, logits, wrong, **state())
        assert got.losses[0] == INF and truth.losses[0] == INF
        assert torch.equal(got.statistics[0], state()["acc_sum"]) and torch.equal(got.statistics[1], state()["num_updates"])
        got = CLASSIFICATION.evaluate(backend, logits, wrong)
        harness.assert_gradient(backend, got.gradient, truth.gradient(), narrow=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_distances_take_their_limits(backend, dtype):
    pred = torch.tensor([INF, -INF, 0.01, 0.0], dtype=dtype)
    for target in (torch.zeros(4), torch.tensor([0.0, 0.0, -INF, INF])):
        truth = REGRESSION.truth(pred, target)
        got = REGRESSION.evaluate(backend, pred, target, **state())
        assert got.losses[0] == INF and torch.equal(got.statistics[0], state()["acc_sum"])
        got = REGRESSION.evaluate(backend, pred, target)
        harness.assert_gradient(backend, got.gradient, truth.gradient(), narrow=2e-6)
    got = REGRESSION.evaluate(backend, torch.full((2,), INF, dtype=dtype), torch.tensor([INF, 0.0]))
    assert got.losses[0].isnan() and harness.where(got.gradient.isnan()) == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_largest_finite_values(backend, dtype):
    largest = torch.finfo(dtype).max
    pred = torch.tensor([largest, -largest, largest, -largest], dtype=dtype)
    target = torch.tensor([0.0, 0.0, 1.0, 1.0])
    got = CLASSIFICATION.assert_agrees(backend, pred, target)
    # Two of four in the last bin: the mean of their two losses, over two bins.
    assert got.losses[0].isfinite() and got.losses[0] == torch.finfo(dtype).max / 2
    got = REGRESSION.assert_agrees(backend, pred[:2] / 2, target[:2])
    assert got.losses[0].isfinite() and got.gradient.tolist() == [0.5, -0.5]


def test_largest_float64_distances(backend):
    pred = torch.tensor([1e200, -1e200, 1e300], dtype=torch.float64)
    got = REGRESSION.assert_agrees(backend, pred, torch.zeros(3))
    assert got.losses[0].isfinite() and torch.allclose(got.gradient, torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64) / 3)


@pytest.mark.parametrize("mu", [1e20, 1e25, 1e30])
def test_distances_whose_ratio_to_mu_underflows_when_squared(backend, mu):
    """Then the loss is as good as the root of 1 is, which estimates of some processors are not."""
    pred = torch.tensor([5.06640625, -3.0, 0.5, 1e-3, 250.0])
    REGRESSION.assert_agrees(backend, pred, torch.zeros(5), mu=mu, bins=2)
    # One element is its bin: the loss is its own.
    got = REGRESSION.assert_agrees(backend, pred[:1], torch.zeros(1), mu=mu, bins=2)
    assert abs(got.losses[0].item() / (5.06640625**2 / (2 * mu)) - 1) <= 6e-8


@LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_values_and_signed_zeros(backend, loss, dtype):
    tiny = torch.finfo(dtype).tiny / 8
    pred = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0], dtype=dtype)
    for target in (0.0, -0.0, 1.0):
        loss.assert_agrees(backend, pred, torch.full((6,), target), bins=3, label=f"target {target}")


def test_the_smallest_logit_below_the_middle_is_below_it(backend):
    """Its gradient norm rounds to one half."""
    for dtype in DTYPES:
        logits = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny], dtype=dtype, device=backend.device)
        with use_backend(backend.name):
            assert gradient_density(logits, torch.zeros_like(logits), bins=2).counts.tolist() == [1, 3]
            assert gradient_density(logits, torch.ones_like(logits), bins=2).counts.tolist() == [1, 3]


def test_targets_outside_of_0_and_1_harm_nothing(backend):
    """They are an error under debug checks; without, no table is left and other elements keep their gradients' direction."""
    logits = torch.tensor([0.3, -0.7, 2.0, 0.0])
    target = torch.tensor([-3.0, 7.5, 0.0, 1.0])
    got = CLASSIFICATION.evaluate(backend, logits, target, **state())
    assert got.gradient[:2].sign().tolist() == [1, -1] and got.gradient[2] > 0 > got.gradient[3]
    assert got.statistics[0].isfinite().all()


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


@pytest.mark.parametrize(
    "loss, sample",
    [
        pytest.param(loss, sample, id=f"{loss.name}-{sample.name}")
        for loss in GHM_LOSSES.values()
        for sample in GHM_SAMPLES[:: 2 if loss is CLASSIFICATION else 1]
        if sample in loss.samples
    ],
)
def test_no_uninitialised_memory_reaches_the_result(backend, loss, generator, sample, poisoned_memory):
    inputs = loss.draw(sample, generator)
    loss.assert_agrees(backend, *inputs.arguments, label=sample.name, **inputs.options)
