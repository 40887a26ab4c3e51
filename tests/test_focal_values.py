"""Values and gradients of the element-wise sigmoid losses: the authors' outputs, an oracle on fresh random inputs."""
import dataclasses
import itertools

import golden_vectors
import harness
import mmdet_losses
import pytest
import rsloss_kernels
import torch
from ghm_samples import DISTRIBUTIONS
from harness import assert_within, moved
from rsloss_kernels import quality_focal_loss, sigmoid_focal_loss, use_backend
from sigmoid_samples import EFL, EQFL, FOCAL, PLAIN_LOSSES, QUALITY, SIGMOID_LOSSES, VARIFOCAL, SigmoidSample

GRADIENT_GATE = 2e-6
DTYPES = [torch.float64, torch.float32]
LOSSES = pytest.mark.parametrize("loss", SIGMOID_LOSSES.values(), ids=SIGMOID_LOSSES)
PLAIN = pytest.mark.parametrize("loss", PLAIN_LOSSES.values(), ids=PLAIN_LOSSES)


def evaluate(backend, loss, logits, *others, **options) -> harness.Evaluation:
    return harness.evaluate(backend, logits, *others, loss=loss, **options)


# --- the authors' outputs ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", golden_vectors.params("focal"))
def test_golden(backend, case, dtype):
    inputs, hyper = case.inputs(), case.hyper
    logits, labels = inputs["pred"].to(dtype), inputs["target"]
    common = {"background": "first", "avg_factor": hyper["normalizer"], "reduction": "sum"}
    focal = evaluate(
        backend, rsloss_kernels.sigmoid_focal_loss, logits, labels, alpha=hyper["alpha"], gamma=hyper["gamma"], **common
    )
    quality = evaluate(backend, rsloss_kernels.quality_focal_loss, logits, labels, inputs["scores"], beta=hyper["gamma"], **common)
    recorded = 0
    for got, implementation in ((focal, "eod"), (focal, "dynrcnn"), (quality, "eod_qfl")):
        wanted = case.outputs(implementation)
        if wanted:
            harness.assert_gates(backend, got, [float(wanted["loss"])], wanted["grad"], implementation, narrow=GRADIENT_GATE)
            recorded += 1
    assert recorded == 3


# --- random inputs ---


@pytest.mark.parametrize(
    "loss, sample",
    [pytest.param(loss, sample, id=f"{loss.name}-{sample.name}") for loss in SIGMOID_LOSSES.values() for sample in loss.samples],
)
def test_samples(backend, loss, generator, sample):
    inputs = loss.draw(sample, generator)
    loss.assert_agrees(backend, *inputs.arguments, label=sample.name, upstream=-0.375, **inputs.options)


@pytest.mark.slow_interpreter
@PLAIN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_inputs(backend, loss, generator, distribution, dtype):
    variants = itertools.cycle([{}, {"gamma": 1.5, "weight": "element"}, {"gamma": 1.0, "weight": "row"}, {"gamma": 0.3}, {"gamma": 5.0}])
    for form in ("dense", "soft", "index"):
        sizes = (90,) if backend.is_interpreted else (1, 7, 90) if backend.is_slow else (1, 7, 400)
        for rows, variant in zip(sizes, variants, strict=False):
            sample = SigmoidSample(distribution, rows, 3, distribution, form, dtype=dtype, has_quality=rows == 7, **variant)
            inputs = loss.draw(sample, generator)
            loss.assert_agrees(backend, *inputs.arguments, label=f"{form} {rows} {variant}", **inputs.options)


@PLAIN
def test_float64_to_the_end_of_its_range(backend, loss):
    logits = torch.tensor([[350.0], [-690.0], [700.0], [709.0], [711.0], [-720.0], [746.0], [1000.0]], dtype=torch.float64)
    plain = {"beta": 0.0} if loss.modulator == "quality" else {"gamma": 0.0}
    for row, label, options in itertools.product(logits, (0, 1), ({}, plain)):
        loss.assert_agrees(backend, row[None], torch.tensor([label]), label=f"{row.item()} {label} {options}", **options)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits_lose_only_the_rounding_of_the_gradient(backend, loss, generator, dtype):
    for distribution, form in itertools.product(("init", "trained", "ties", "separated"), ("index", "soft")):
        if form == "index" or not loss.is_equalized:
            inputs = loss.draw(SigmoidSample("narrow", 90, 4, distribution, form, dtype=dtype, gamma=1.5), generator)
            loss.assert_agrees(backend, *inputs.arguments, label=f"{distribution} {form}", **inputs.options)


@pytest.mark.slow_interpreter
@PLAIN
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_targets_and_weights_of_any_floating_dtype(backend, loss, generator, other):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sample = SigmoidSample("dtypes", form="soft", dtype=dtype, target_dtype=other, weight="element", weight_dtype=other)
        inputs = loss.draw(sample, generator)
        loss.assert_agrees(backend, *inputs.arguments, label=str(dtype), **inputs.options)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integral_dtype(backend, generator, label_dtype):
    logits = torch.randn((9, 3), generator=generator)
    labels = torch.tensor([0, 3, 2, 3, 1, 3, 0, 2, 7])
    expected = FOCAL.assert_agrees(backend, logits, labels)
    assert FOCAL.evaluate(backend, logits, labels.to(label_dtype)) == expected


def test_labels_that_int32_cannot_hold_are_background(backend, generator):
    logits = torch.randn((4, 3), generator=generator)
    for background, none in (("last", 3), ("first", 0)):
        expected = FOCAL.evaluate(backend, logits, torch.tensor([1, none, 2, none]), background=background)
        for labels in (torch.tensor([1, 2**32 - 1, 2, none], dtype=torch.uint32), torch.tensor([1, 2**63 - 1, 2, 2**40 + 1])):
            assert FOCAL.evaluate(backend, logits, labels, background=background) == expected


@PLAIN
def test_integral_and_bool_dense_targets(backend, loss, generator):
    logits = torch.randn((6, 4), generator=generator)
    targets = torch.randint(0, 2, (6, 4), generator=generator).float()
    expected = loss.assert_agrees(backend, logits, targets)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        assert loss.evaluate(backend, logits, targets.to(dtype)) == expected


@PLAIN
def test_class_indices_are_one_hot_targets(backend, loss, generator):
    """Bit by bit: one element is one computation."""
    logits = torch.randn((40, 5), generator=generator) * 3
    labels = torch.randint(0, 6, (40,), generator=generator)
    dense = torch.nn.functional.one_hot(labels, 6)[:, :5].float()
    expected = loss.evaluate(backend, logits, dense, **gamma_of(loss, 1.7))
    got = loss.evaluate(backend, logits, labels, **gamma_of(loss, 1.7))
    assert torch.equal(got.gradient, expected.gradient) and got.losses == expected.losses


@PLAIN
def test_elements_need_no_rows(backend, loss, generator):
    """Flat logits, and few long rows, are their elements one by one: in the losses, in those of elements, and bit by bit."""
    logits = torch.randn((90,), generator=generator) * 3
    targets, weight = (torch.rand((90,), generator=generator).round(decimals=1) for _ in range(2))
    expected = loss.assert_agrees(backend, logits[:, None], targets[:, None], weight=weight[:, None])
    for shape in ((90,), (1, 90), (3, 5, 6)):
        values = [value.view(shape) for value in (logits, targets, weight)]
        got = loss.evaluate(backend, *values[:2], weight=values[2])
        assert got.losses == expected.losses and torch.equal(got.gradient.flatten(), expected.gradient.flatten())
        assert got.gradient.shape == shape
        loss.assert_agrees(backend, *values[:2], weight=values[2], class_weight=torch.ones(shape[-1]))
        with use_backend(backend.name):
            losses = loss.function(*(value.to(backend.device) for value in values[:2]), reduction="none")
        assert losses.shape == shape
        assert_within(losses.double().sum().cpu(), loss.evaluate(backend, *values[:2]).losses[0], 1e-5 * losses.double().sum().cpu(), "sum")


@pytest.mark.slow_interpreter
@PLAIN
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_equal_exponents_of_classes_are_one_exponent(backend, loss, generator, gamma):
    """A table of equal entries may take a cheaper path, with the same result to the gates."""
    inputs = loss.draw(SigmoidSample("equal", form="soft", classes=5), generator)
    name = "beta" if loss is QUALITY else "gamma"
    wanted = loss.truth(*inputs.arguments, **{name: gamma})
    for value in (gamma, torch.full((5,), gamma)):
        loss.assert_true(backend, loss.evaluate(backend, *inputs.arguments, **{name: value}), wanted, f"{value}")
    mixed = torch.tensor([gamma, gamma, gamma, gamma, gamma + 1e-9], dtype=torch.float64)
    loss.assert_agrees(backend, *inputs.arguments, **{name: mixed})


@pytest.mark.parametrize("iou_weighted", [True, False])
def test_varifocal_with_and_without_the_weight_of_quality(backend, generator, iou_weighted):
    for form in ("soft", "index"):
        inputs = VARIFOCAL.draw(SigmoidSample("iou", form=form, has_quality=True, class_weight=True), generator)
        VARIFOCAL.assert_agrees(backend, *inputs.arguments, iou_weighted=iou_weighted, **inputs.options)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_of_100_are_finite(backend, loss, dtype):
    """Where the published forms take the logarithm of a probability that rounded to 0."""
    logits = torch.tensor([[100.0, -100.0, 17.0, -17.0], [-100.0, 100.0, -8.0, 40.0], [88.0, -88.0, 104.0, -104.0]], dtype=dtype)
    for labels in (torch.tensor([0, 0, 1]), torch.tensor([1, 3, 4])):
        arguments = (torch.cat([logits, logits[:, :1]], 1) if loss.name == "eqlv2" else logits, labels)
        if loss.is_equalized:
            arguments += ((torch.tensor([0.2, 0.9, 1.0]),) if loss is EQFL else ()) + (torch.tensor([0.0, 1.0, 0.5, 0.01]),)
        got = loss.assert_agrees(backend, *arguments)
        assert got.losses[0].isfinite() and got.gradient.isfinite().all() and got.losses[0] > 0


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 0.3, 10.0])
def test_equal_logits_below_zero(backend, generator, gamma):
    """Rounding that is the same for all elements of a batch stays in the sum, wherever the logit is."""
    if backend.is_slow or backend.is_interpreted:
        pytest.skip("many calls; the formulas of these backends are taken as they stand, not by tables")
    # Deeper ones have no loss in float.
    depth = min(28.000002, 84 / (gamma + 1))
    logits = torch.cat([-3 * torch.rand(60, generator=generator), -depth * torch.rand(20, generator=generator)])
    for logit in [*logits.tolist(), -0.0, max(-28.0, -depth), -depth]:
        inputs = torch.full((33, 2), logit)
        labels = torch.full((33,), 2)
        truth = FOCAL.truth(inputs[:1], labels[:1], gamma=gamma)
        got = FOCAL.evaluate(backend, inputs, labels, gamma=gamma)
        assert_within(got.losses[0], 33 * truth.losses[0], backend.loss_gate(torch.float32) * 33 * truth.losses[0], f"loss at {logit}")
        harness.assert_gradient(backend, got.gradient[-1:], truth.gradient(), narrow=GRADIENT_GATE)


@pytest.mark.slow_interpreter
@PLAIN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [-4.59512, 0.0, 2.7])
def test_many_equal_logits(backend, loss, logit, dtype):
    """Errors of elements do not average out; nor do those of a long sum."""
    rows = 40 if backend.is_interpreted else 3000 if backend.is_slow else 50_000
    logits = torch.full((rows, 4), logit, dtype=dtype)
    for gamma in (2.0, 1.5):
        inputs = {"beta" if loss is QUALITY else "gamma": gamma}
        truth = loss.truth(logits[:1], torch.tensor([2]), **inputs)
        got = loss.evaluate(backend, logits, torch.full((rows,), 2), **inputs)
        assert_within(got.losses[0], rows * truth.losses[0], backend.loss_gate(dtype) * rows * truth.losses[0], "loss")
        harness.assert_gradient(backend, got.gradient[-1:], truth.gradient(), narrow=GRADIENT_GATE)


def gamma_of(loss, value: float) -> dict:
    return {"beta" if loss is QUALITY else "gamma": value}


# --- reductions ---


@PLAIN
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_elements(backend, loss, generator, dtype):
    """reduction="none", with an upstream gradient per element."""
    for sample in (SigmoidSample("soft", form="soft", weight="element"), SigmoidSample("index", has_quality=True, ignore_index=2)):
        inputs = loss.draw(dataclasses.replace(sample, dtype=dtype), generator)
        truth = loss.truth(*inputs.arguments, **inputs.options, avg_factor=2.5)
        leaf, *others = (value.to(backend.device) for value in inputs.arguments)
        upstream = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(dtype)
        with use_backend(backend.name):
            losses = loss.function(
                leaf.requires_grad_(), *others, reduction="none", avg_factor=2.5, **harness.on_device(inputs.options, backend)
            )
        assert losses.dtype == dtype and losses.shape == leaf.shape
        (gradient,) = torch.autograd.grad(losses, leaf, upstream.to(backend.device))
        wanted = torch.from_numpy(truth.elements.astype("float64")).view(leaf.shape)
        relative, smallest = harness.ROUNDING.get(dtype, (backend.loss_gate(dtype), 2.0**-149 if dtype == torch.float32 else 0.0))
        bound = (relative + backend.loss_gate(dtype)) * wanted.abs() + smallest
        assert_within(losses.detach().cpu(), wanted, bound, f"{sample.name} losses")
        slopes = truth.gradient().view(leaf.shape) * upstream.double()
        harness.assert_gradient(backend, gradient.cpu(), slopes, sample.name, narrow=GRADIENT_GATE)


@PLAIN
def test_reductions_and_what_divides(backend, loss, generator):
    inputs = loss.draw(SigmoidSample("reductions", dtype=torch.float64, weight="row"), generator)
    total = loss.evaluate(backend, *inputs.arguments, **inputs.options)
    elements = inputs.arguments[0].numel()
    for options, divisor in (
        ({"reduction": "mean"}, elements),
        ({"reduction": "mean", "avg_factor": 3.5}, 3.5),
        ({"reduction": "sum", "avg_factor": 3}, 3),
        ({"reduction": "mean", "avg_factor": torch.tensor(3.5)}, 3.5),
        ({"reduction": "sum", "avg_factor": torch.tensor([7])}, 7),
        ({"reduction": "sum", "avg_factor": torch.tensor(0.5, dtype=torch.float16)}, 0.5),
    ):
        got = loss.evaluate(backend, *inputs.arguments, **inputs.options, **options)
        assert_within(got.losses[0], total.losses[0] / divisor, 1e-14 * total.losses[0], str(options))
        assert_within(got.gradient, total.gradient / divisor, 1e-14 * total.gradient.abs(), str(options))


def test_a_normalizer_of_0_divides_as_in_floating_point(backend, generator):
    logits = torch.randn((5, 3), generator=generator)
    labels = torch.tensor([0, 1, 2, 3, -1])
    for zero in (0.0, 0, torch.tensor(0.0)):
        got = FOCAL.evaluate(backend, logits, labels, avg_factor=zero)
        assert got.losses[0] == torch.inf and not got.gradient[:4].isfinite().any() and not got.gradient[4].any()
        assert FOCAL.evaluate(backend, logits, torch.full((5,), -1), avg_factor=zero).losses[0].isnan()


def test_cross_entropy_is_gamma_0_alpha_below_0(backend, generator):
    logits = torch.randn((30, 4), generator=generator, dtype=torch.float64) * 4
    targets = torch.rand((30, 4), generator=generator, dtype=torch.float64)
    class_weight = torch.rand(4, generator=generator, dtype=torch.float64)
    with use_backend(backend.name):
        got = sigmoid_focal_loss(
            logits.to(backend.device), targets.to(backend.device), gamma=0.0, alpha=-1.0, class_weight=class_weight.tolist()
        )
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, weight=class_weight, reduction="none")
    # Theirs comes from numbers as large as the logit, which cancel where the loss is small.
    noise = torch.finfo(torch.float64).eps * logits.abs() * class_weight
    assert_within(got.cpu(), wanted, 1e-13 * wanted + noise, "cross entropy")


def test_dropped_classes_are_as_if_they_were_not_there(backend, generator):
    """Federated loss: unsampled classes."""
    logits = torch.randn((30, 6), generator=generator)
    labels = torch.randint(0, 7, (30,), generator=generator)
    mask = torch.tensor([True, False, True, True, False, True])
    got = FOCAL.evaluate(backend, logits, labels, class_mask=mask)
    place = torch.tensor([0, 4, 1, 2, 4, 3, 4])
    expected = FOCAL.evaluate(backend, logits[:, mask], place[labels])
    assert_within(got.losses[0], expected.losses[0].double(), 1e-7 * expected.losses[0].double(), "loss")
    assert torch.equal(got.gradient[:, mask], expected.gradient) and not got.gradient[:, ~mask].any()
    logits[:, ~mask] = torch.nan
    assert FOCAL.evaluate(backend, logits, labels, class_mask=mask.int()) == got
    assert FOCAL.evaluate(backend, logits, labels, class_mask=mask.tolist()) == got


# --- MMDetection's own modules ---


def beside(ours, theirs, backend, pred, target, *others, gate=1e-6, **options):
    leaf, twin = pred.detach().to(backend.device).requires_grad_(), pred.detach().requires_grad_()
    with use_backend(backend.name):
        got = ours(leaf, *(moved(value, backend.device) for value in (target, *others)), **options)
    wanted = theirs(twin, target, *others, **options)
    torch.testing.assert_close(got.detach().cpu(), wanted.detach(), rtol=gate, atol=1e-7 * float(wanted.detach().abs().max()))
    gradients = [torch.autograd.grad(value.sum(), x)[0].cpu() for value, x in ((got, leaf), (wanted, twin))]
    harness.assert_within(gradients[0], gradients[1].double(), 5e-6 * gradients[1].abs().max() + 1e-12, "gradient")
    assert gradients[1].any()


@pytest.mark.slow_interpreter
@pytest.mark.parametrize(
    "reduction, avg_factor", [("mean", None), ("mean", 7.5), ("mean", 0.0), ("sum", None), ("none", None), ("none", 3.0)]
)
def test_modules_beside_mmdetection(backend, generator, reduction, avg_factor):
    """Index, one-hot and soft targets; weights of rows, as a column, flat; every reduction."""
    rows, classes = 30, 5
    pred = torch.randn((rows, classes), generator=generator) * 2 - 1
    labels = torch.randint(0, classes + 1, (rows,), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, classes + 1)[:, :classes]
    score, soft = torch.rand(rows, generator=generator), torch.rand((rows, classes), generator=generator) * one_hot
    weight = torch.rand(rows, generator=generator)
    options = {"reduction_override": reduction, "avg_factor": avg_factor}

    both = (rsloss_kernels.SigmoidFocalLoss, mmdet_losses.load("focal_loss").FocalLoss)
    ours, theirs = (module(gamma=1.5, alpha=0.3, loss_weight=2.0) for module in both)
    for target in (labels, one_hot, one_hot.float()):
        beside(ours, theirs, backend, pred, target, **options)
        beside(ours, theirs, backend, pred, target, weight, **options)
    beside(ours, theirs, backend, pred, labels, torch.rand(rows * classes, generator=generator), **options)
    beside(ours, theirs, backend, pred, labels, weight[:, None], **options)

    both = (rsloss_kernels.QualityFocalLoss, mmdet_losses.load("gfocal_loss").QualityFocalLoss)
    ours, theirs = (module(beta=1.5, loss_weight=0.5) for module in both)
    for target in ((labels, score), (labels, (score > 0.5).float()), soft):
        beside(ours, theirs, backend, pred, target, **options)
        beside(ours, theirs, backend, pred, target, weight, **options)

    for iou_weighted in (True, False):
        both = (rsloss_kernels.VarifocalLoss, mmdet_losses.load("varifocal_loss").VarifocalLoss)
        ours, theirs = (module(alpha=0.6, gamma=1.5, iou_weighted=iou_weighted, loss_weight=3.0) for module in both)
        beside(ours, theirs, backend, pred, soft, **options)
        beside(ours, theirs, backend, pred, soft, torch.rand((rows, classes), generator=generator), **options)


def test_modules_equal_functions(backend, generator):
    logits = torch.randn((20, 4), generator=generator).to(backend.device)
    labels, score = torch.randint(-1, 6, (20,), generator=generator).to(backend.device), torch.rand(20, generator=generator).to(backend.device)
    with use_backend(backend.name):
        for module, function, others, options in (
            (rsloss_kernels.SigmoidFocalLoss, sigmoid_focal_loss, None, {"gamma": 1.5, "alpha": 0.7}),
            (rsloss_kernels.QualityFocalLoss, quality_focal_loss, score, {"beta": 1.5}),
            (rsloss_kernels.VarifocalLoss, rsloss_kernels.varifocal_loss, score, {"gamma": 1.5, "alpha": 0.7, "iou_weighted": False}),
        ):
            extra = () if others is None else (others,)
            target = labels if others is None else (labels, others)
            common = {"background": "first", "ignore_index": 3}
            built = module(**options, **common, loss_weight=2.0, reduction="sum")
            assert built(logits, target) == 2 * function(logits, labels, *extra, reduction="sum", **options, **common)
            assert f"{next(iter(options))}=1.5" in repr(built) and not built.state_dict()


@pytest.mark.parametrize("weighting_factor", [True, False])
@pytest.mark.parametrize("loss", [EFL, EQFL], ids=lambda loss: loss.name)
def test_equalized_losses_with_and_without_the_weighting_factor(backend, loss, generator, weighting_factor):
    inputs = loss.draw(SigmoidSample("ablation", classes=7), generator)
    options = inputs.options | {"weighting_factor": weighting_factor, "scale_factor": 5.0}
    loss.assert_agrees(backend, *inputs.arguments, **options)
