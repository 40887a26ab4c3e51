"""The element-wise sigmoid losses at the edges: nothing counts, NaN and infinity, extreme values, uninitialised memory."""
import harness
import pytest
import torch
from rsloss_kernels import _library, sigmoid_focal_loss, use_backend
from rsloss_kernels.losses.focal.op import Modulator
from sigmoid_samples import EFL, EQLV2, FOCAL, PLAIN_LOSSES, QUALITY, SIGMOID_LOSSES, SIGMOID_SAMPLES, VARIFOCAL, SigmoidSample

NAN, INF = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
LOSSES = pytest.mark.parametrize("loss", SIGMOID_LOSSES.values(), ids=SIGMOID_LOSSES)
PLAIN = pytest.mark.parametrize("loss", PLAIN_LOSSES.values(), ids=PLAIN_LOSSES)


def arguments_of(loss, logits, labels):
    """With a state or a quality where the loss takes one."""
    others = (torch.ones(labels.shape),) if loss.takes_quality and loss.is_equalized else ()
    return (logits, labels, *others, *((torch.linspace(0, 1, logits.shape[-1] - (loss is EQLV2)),) if loss.is_equalized else ()))


NOTHING_COUNTS = {
    "empty": lambda: (torch.zeros((0, 4)), torch.zeros((0,), dtype=torch.int64), {}),
    "labels_below_0": lambda: (torch.full((5, 4), NAN), torch.full((5,), -1), {}),
    "dense_below_0": lambda: (torch.full((5, 4), NAN), torch.full((5, 4), -0.5), {}),
    "weights_0": lambda: (torch.full((5, 4), NAN), torch.zeros((5,), dtype=torch.int64), {"weight": torch.zeros(5)}),
    "elements_0": lambda: (torch.full((5, 4), INF), torch.full((5, 4), NAN), {"weight": torch.zeros((5, 4))}),
    "no_class": lambda: (torch.full((5, 4), NAN), torch.zeros((5,), dtype=torch.int64), {"class_mask": [False] * 4}),
    "ignore_index": lambda: (torch.full((5, 4), NAN), torch.full((5,), 4), {"ignore_index": 4}),
}


OF_EQUALIZED = {
    "efl": ("empty", "labels_below_0", "weights_0", "ignore_index"),
    "eqfl": ("empty", "ignore_index"),
    "eqlv2": ("labels_below_0",),
}


@pytest.mark.parametrize(
    "loss, name",
    [
        pytest.param(loss, name, id=f"{loss.name}-{name}")
        for loss in SIGMOID_LOSSES.values()
        for name in OF_EQUALIZED.get(loss.name, NOTHING_COUNTS)
    ],
)
@DTYPES
def test_nothing_counts_gives_exact_zeros_connected_to_the_graph(backend, loss, name, dtype):
    logits, targets, options = NOTHING_COUNTS[name]()
    arguments = arguments_of(loss, logits.to(dtype), targets) if loss.is_equalized else (logits.to(dtype), targets)
    got = loss.evaluate(backend, *arguments, upstream=[NAN], **options)
    assert got.losses[0].item() == 0 and got.losses[0].dtype == dtype
    assert got.gradient.shape == logits.shape and torch.equal(got.gradient, torch.zeros_like(got.gradient))
    assert not any(value.any() for value in got.statistics)


def test_nothing_counts_elementwise(backend):
    logits = torch.full((5, 4), NAN, device=backend.device, requires_grad=True)
    with use_backend(backend.name):
        losses = sigmoid_focal_loss(logits, torch.full((5,), -1, device=backend.device))
    losses.backward(torch.full_like(losses, INF))
    assert not losses.any() and not logits.grad.any()


@LOSSES
@DTYPES
def test_nan_in_an_element_that_counts(backend, loss, generator, dtype):
    """The loss, that element's gradient and its class's sum are NaN; all others are as if it were dropped."""
    logits = torch.randn((30, 4), generator=generator, dtype=dtype)
    labels = torch.randint(0, 4, (30,), generator=generator)
    broken = torch.zeros((30, 4), dtype=torch.bool)
    broken[[0, 7, 29], [3, 0, 1]] = True
    labels[7] = 0  # a positive
    arguments = arguments_of(loss, logits.masked_fill(broken, NAN), labels)
    got = loss.evaluate(backend, *arguments)
    assert got.losses[0].isnan() and torch.equal(got.gradient.isnan(), broken)
    if loss is not EQLV2:
        without = loss.evaluate(backend, *arguments, weight=(~broken).to(dtype))
        assert without.losses[0].isfinite() and torch.equal(got.gradient[~broken], without.gradient[~broken])
    if loss.is_equalized:
        of_class = torch.stack(got.statistics)
        expected = torch.zeros_like(of_class, dtype=torch.bool)
        for row, column in broken.nonzero().tolist():
            if column < of_class.shape[1]:
                expected[int(labels[row] != column), column] = True
        assert torch.equal(of_class.isnan(), expected)


@pytest.mark.parametrize(
    "loss, where",
    [
        pytest.param(loss, where, id=f"{loss.name}-{where}")
        for loss in PLAIN_LOSSES.values()
        for where in ("targets", "weight", "quality")
        if loss.takes_quality or where != "quality"
    ],
)
def test_nan_beside_the_logits(backend, loss, generator, where):
    sample = SigmoidSample("nan", form="index" if where == "quality" else "soft", has_quality=True, weight="element")
    inputs = loss.draw(sample, generator)
    arguments, options = list(inputs.arguments), dict(inputs.options)
    value = {"targets": lambda: arguments[1], "weight": lambda: options["weight"], "quality": lambda: arguments[2]}[where]()
    value[3] = NAN
    truth = loss.truth(*arguments, **options)
    got = loss.assert_agrees(backend, *arguments, **options)
    assert got.losses[0].isnan() == truth.gradient().isnan().any()
    assert torch.equal(got.gradient.isnan(), truth.gradient().isnan())


@PLAIN
@pytest.mark.parametrize("upstream", [0.0, 1.0, INF])
def test_nan_reaches_the_gradient_whatever_the_upstream_factor(backend, loss, upstream):
    logits, labels = torch.tensor([[1.0, NAN], [0.5, -1.0]]), torch.tensor([0, 2])
    gradient = loss.evaluate(backend, logits, labels, upstream=[upstream]).gradient
    assert gradient[0, 1].isnan()
    if upstream != INF:
        assert harness.where(gradient.isnan()) == [1]


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_infinite_logits_take_their_limits(backend, loss, dtype):
    """Right and sure costs nothing; wrong and sure an infinite loss with a finite gradient."""
    logits = torch.tensor([[INF, -INF, -INF, 0.5], [0.25, 1.0, -INF, -INF]], dtype=dtype)
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 2])
    got = loss.assert_agrees(backend, *arguments_of(loss, logits, right))
    assert got.losses[0].isfinite() and not got.gradient[logits.isinf()].any()
    got = loss.evaluate(backend, *arguments_of(loss, logits, wrong))
    truth = loss.truth(*arguments_of(loss, logits, wrong))
    assert got.losses[0] == INF == truth.losses[0]
    assert got.gradient.isfinite().all()
    harness.assert_gradient(backend, got.gradient, truth.gradient(), narrow=2e-6)


@PLAIN
@DTYPES
def test_infinite_logits_of_soft_targets(backend, loss, dtype):
    logits = torch.tensor([INF, -INF, INF, -INF, 1.0], dtype=dtype)[:, None]
    targets = torch.tensor([0.3, 0.6, 1.0, 0.0, 0.5])[:, None]
    for gamma in (0.0, 0.5, 1.0, 2.0):
        options = {"beta" if loss is QUALITY else "gamma": gamma}
        got, truth = loss.evaluate(backend, logits, targets, **options), loss.truth(logits, targets, **options)
        assert got.losses[0] == INF == truth.losses[0]
        harness.assert_gradient(backend, got.gradient, truth.gradient(), f"gamma {gamma}", narrow=2e-6)


@DTYPES
def test_infinite_logits_of_soft_targets_without_a_weight(backend, dtype):
    """A factor 0 makes 0 of an infinite cross entropy, but not of NaN."""
    logits = torch.tensor([INF, -INF, INF, NAN], dtype=dtype, device=backend.device)[:, None]
    targets = torch.tensor([0.3, 0.6, 0.0, 0.5], device=backend.device)[:, None]
    table = torch.tensor([[2.0], [0.0], [1.0]], dtype=torch.float64, device=backend.device)
    elements, slopes = [_library.operator(f"focal_{name}", backend.name) for name in ("elements", "backward")]
    inputs = [logits], [targets], [], [], table, None
    for modulator in (Modulator.QUALITY, Modulator.VARIFOCAL):
        options = int(modulator), False, False, None, 1.0
        (losses,), (gradient,) = elements(*inputs, *options), slopes(*inputs, [torch.ones_like(logits)], *options)
        assert losses[:3].flatten().tolist() == [0.0, 0.0, INF] and losses[3].isnan()
        assert gradient[:3].flatten().tolist() == [0.0, 0.0, 1.0] and gradient[3].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@PLAIN
def test_largest_finite_logits(backend, loss, dtype):
    largest = torch.finfo(dtype).max / 4
    logits = torch.tensor([[largest, -largest], [-largest, 0.0]], dtype=dtype)
    for labels in (torch.tensor([0, 2]), torch.tensor([2, 2]), torch.tensor([1, 0])):
        got = loss.assert_agrees(backend, logits, labels)
        assert got.losses[0].isfinite() and got.gradient.isfinite().all()


@pytest.mark.slow_interpreter
@PLAIN
@DTYPES
def test_subnormal_logits_and_signed_zeros(backend, loss, dtype):
    tiny = torch.finfo(dtype).tiny / 8
    logits = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0], dtype=dtype)[:, None]
    for target in (0.0, -0.0, 1.0, 0.5):
        loss.assert_agrees(backend, logits, torch.full((6, 1), target), label=f"target {target}")


@DTYPES
def test_a_target_that_equals_the_probability(backend, dtype):
    """The quality modulator is 0 there, as is its gradient, also where its exponent is below 1."""
    logits, targets = torch.zeros((3, 2), dtype=dtype), torch.full((3, 2), 0.5)
    for beta in (0.0, 0.5, 1.0, 2.0):
        got = QUALITY.evaluate(backend, logits, targets, beta=beta)
        assert not got.gradient.any() and (got.losses[0] != 0) == (beta == 0)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_a_class_whose_positives_weigh_nothing(backend, gamma):
    """`alpha` 1 drops negatives and 0 positives, whatever they hold."""
    logits, labels = torch.tensor([[NAN, 2.0], [1.0, NAN]]), torch.tensor([0, 1])
    got = FOCAL.assert_agrees(backend, logits, labels, alpha=0.0, gamma=gamma)
    assert got.losses[0].isfinite() and not got.gradient.diagonal().any() and got.gradient[0, 1] > 0
    got = FOCAL.assert_agrees(backend, logits.flip(1), labels, alpha=1.0, gamma=gamma)
    assert got.losses[0].isfinite() and not got.gradient.flip(1).diagonal().any()


def test_a_quality_below_0_drops_its_element(backend, generator):
    logits = torch.randn((4, 3), generator=generator)
    logits[1, 2] = NAN
    for loss in (QUALITY, VARIFOCAL):
        got = loss.assert_agrees(backend, logits, torch.tensor([0, 2, 3, 1]), torch.tensor([0.3, -1.0, NAN, 0.9]))
        assert got.losses[0].isfinite() and not got.gradient[1, 2].any() and got.gradient[1, :2].all()


@DTYPES
def test_a_nan_logit_of_a_quality_of_0(backend, dtype):
    """The labelled class of a box without overlap is an element that counts."""
    logits, labels, quality = torch.zeros((40, 2), dtype=dtype), torch.full((40,), 2), torch.zeros(40)
    labels[7], logits[7, 1] = 1, NAN
    for loss in (QUALITY, VARIFOCAL):
        for exponent in (0.0, 1.5, 2.0):
            got = loss.evaluate(backend, logits, labels, quality, **{"beta" if loss is QUALITY else "gamma": exponent})
            assert got.losses[0].isnan() and harness.where(got.gradient.isnan()) == [15]


def test_targets_and_qualities_above_1_do_no_harm(backend, generator):
    logits = torch.randn((4, 3), generator=generator)
    targets = torch.zeros((4, 3))
    targets[1, 2], targets[2, 0] = 1 + 1e-6, 7.0
    for loss in PLAIN_LOSSES.values():
        gradient = loss.evaluate(backend, logits, targets).gradient
        others = torch.ones((4, 3), dtype=torch.bool)
        others[1, 2] = others[2, 0] = False
        expected = loss.evaluate(backend, logits, torch.zeros((4, 3))).gradient
        torch.testing.assert_close(gradient[others], expected[others], rtol=1e-5, atol=0)
    # A quality that rounding left a little above 1, as boxes that overlap entirely have it.
    got = QUALITY.evaluate(backend, logits, torch.tensor([0, 1, 2, 3]), torch.full((4,), 1 + 2.0**-20))
    wanted = QUALITY.evaluate(backend, logits, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(got.gradient, wanted.gradient, rtol=1e-5, atol=1e-6)


def test_negative_weights_are_weights(backend, generator):
    inputs = FOCAL.draw(SigmoidSample("negative", form="soft"), generator)
    chance, size = torch.rand((2, *inputs.arguments[0].shape), generator=generator)
    weight = torch.where(chance < 0.2, 0.01, -1.0) * size  # the sum is not what cancellation leaves of it
    FOCAL.assert_agrees(backend, *inputs.arguments, weight=weight)
    EFL.assert_agrees(backend, *EFL.draw(SigmoidSample("negative"), generator).arguments, weight=weight, avg_factor=-2.0)


def test_labels_far_out_of_range_are_background(backend, generator):
    logits = torch.randn((5, 3), generator=generator)
    for background in ("last", "first"):
        for label in (4, 2**31 - 1, 2**62):
            labels = torch.tensor([1, label, 2, label, 1])
            FOCAL.assert_agrees(backend, logits, labels, background=background)
        dropped = FOCAL.assert_agrees(backend, logits, torch.tensor([1, -1, 2, -(2**62), -(2**63)]), background=background)
        assert not dropped.gradient[[1, 3, 4]].any() and dropped.gradient[[0, 2]].all()
    for ignore_index in (2**40, 2**31, -5):
        labels = torch.tensor([1, ignore_index, 0, 2, 3])
        FOCAL.assert_agrees(backend, logits, labels, ignore_index=ignore_index)
        if -(2**31) <= ignore_index < 2**31:
            FOCAL.assert_agrees(backend, logits, labels.int(), ignore_index=ignore_index)
    # An int32 label never equals what int32 cannot hold.
    FOCAL.assert_agrees(backend, logits, torch.tensor([1, 0, 0, 2, 3], dtype=torch.int32), ignore_index=2**32)


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


@pytest.mark.parametrize("sample", SIGMOID_SAMPLES[::3], ids=lambda sample: sample.name)
def test_no_uninitialised_memory_reaches_the_result(backend, generator, sample, poisoned_memory):
    for loss in (QUALITY, EFL):
        if sample in loss.samples:
            inputs = loss.draw(sample, generator)
            loss.assert_agrees(backend, *inputs.arguments, label=sample.name, **inputs.options)
    inputs = FOCAL.draw(sample, generator)
    leaf, targets = (value.to(backend.device) for value in inputs.arguments)
    with use_backend(backend.name):
        losses = sigmoid_focal_loss(leaf.requires_grad_(), targets, **harness.on_device(inputs.options, backend))
    losses.sum().backward()
    assert losses.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("weight", [1e12, 1e30])
def test_huge_class_weights(backend, generator, gamma, weight):
    """No product leaves the range of float on the way."""
    logits, labels = 2 * torch.randn((40, 2), generator=generator) - 1, torch.full((40,), 2)
    for class_weight in ([weight, weight], [weight, 1.0]):
        got = FOCAL.evaluate(backend, logits, labels, gamma=gamma, class_weight=torch.tensor(class_weight))
        truth = FOCAL.truth(logits, labels, gamma=gamma, class_weight=torch.tensor(class_weight))
        harness.assert_within(got.losses[0], truth.losses[0], backend.loss_gate(torch.float32) * truth.losses[0], "loss")


@pytest.mark.parametrize("rows", [1, 3, 1025])
@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_infinite_class_weights(rows, gamma):
    """Where there is nothing to multiply they multiply nothing."""
    with use_backend("cpp"):
        for class_weight in ([INF, INF], [INF, 1.0]):
            loss = sigmoid_focal_loss(
                torch.full((rows, 2), -1.0), torch.full((rows,), 2), gamma=gamma, class_weight=torch.tensor(class_weight), reduction="sum"
            )
            assert loss == INF


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_gradients_do_not_depend_on_neighbours(backend, generator, gamma):
    """Of as many logits above 0 that they are picked out of a block, and of one more."""
    logits = -5 * torch.rand(1024, generator=generator)
    chosen = torch.randperm(1024, generator=generator)[:129]
    logits[chosen] = 5 * torch.rand(129, generator=generator)
    less = logits.clone()
    less[chosen[-1]] *= -1
    labels = torch.randint(2, (1024,), generator=generator)
    labels[chosen[-1]] = 1
    gradients = [FOCAL.evaluate(backend, values[:, None], labels, gamma=gamma).gradient for values in (logits, less)]
    changed = (gradients[0] != gradients[1]).flatten().nonzero().flatten()
    assert changed.tolist() == [chosen[-1].item()]
