"""What must hold for every input of GHM-C and GHM-R: invariances, bitwise repeatability, independence of memory layout."""
import contextlib

import harness
import hypothesis.strategies as st
import pytest
import rsloss_kernels
import torch
from ghm_samples import CLASSIFICATION, GHM_LOSSES, REGRESSION, GHMSample
from harness import bits
from hypothesis import example, given

LOSSES = pytest.mark.parametrize("loss", GHM_LOSSES.values(), ids=GHM_LOSSES)
# Logits on a grid with ties and with the middle of the bins' range; targets: negative, positive, soft; weights: none, small, large.
GRID = st.integers(-200, 200).map(lambda n: n / 16)
ELEMENTS = st.lists(
    st.tuples(GRID, st.sampled_from([0.0, 0.0, 1.0, 0.3]), st.sampled_from([0.0, 1e-3, 1.0, 7.0])), min_size=1, max_size=40
)
BINS = st.sampled_from([1, 2, 10, 30, 256])
DTYPE = st.sampled_from([torch.float32, torch.float64])
MOMENTUM = st.sampled_from([0.0, 0.5, 0.99])


def tensors(elements, dtype, loss) -> tuple[torch.Tensor, ...]:
    pred, target, weight = (torch.tensor(values, dtype=torch.float64) for values in zip(*elements, strict=True))
    # Distances of the size of mu.
    return (pred / 64 if loss.is_regression else pred).to(dtype), target, weight


@LOSSES
@given(elements=ELEMENTS, bins=BINS, dtype=DTYPE, momentum=MOMENTUM, empty_bins=st.sampled_from(["skip", "count"]))
@example(elements=[(0.0, 1.0, 1.0)], bins=2, dtype=torch.float32, momentum=0.0, empty_bins="skip")
@example(elements=[(0.5, 0.0, 0.0)], bins=1, dtype=torch.float64, momentum=0.5, empty_bins="count")
def test_any_small_input_agrees_with_the_oracle(backend, loss, elements, bins, dtype, momentum, empty_bins):
    state = {"acc_sum": torch.arange(bins, dtype=torch.float64), "num_updates": torch.arange(bins)}
    arguments = tensors(elements, dtype, loss)
    loss.assert_agrees(backend, *arguments, bins=bins, momentum=momentum, empty_bins=empty_bins, **state)


@LOSSES
@given(elements=ELEMENTS, bins=BINS, dtype=DTYPE, data=st.data())
def test_order_of_elements_does_not_matter(backend, loss, elements, bins, dtype, data):
    order = torch.tensor(data.draw(st.permutations(range(len(elements)))))
    arguments = tensors(elements, dtype, loss)
    before = loss.evaluate(backend, *arguments, bins=bins)
    after = loss.evaluate(backend, *(value[order] for value in arguments), bins=bins)
    # The weights of the bins come from counts alone; only the sum of the losses may round differently.
    assert torch.equal(bits(after.gradient), bits(before.gradient[order]))
    rounding = 1e-13 if dtype == torch.float64 else 2.0**-23
    harness.assert_within(after.losses[0], before.losses[0], rounding * before.losses[0].abs(), "loss")


@LOSSES
@given(elements=ELEMENTS, bins=BINS, dtype=DTYPE)
def test_elements_that_are_not_valid_leave_no_trace(backend, loss, elements, bins, dtype):
    pred, target, weight = tensors(elements, dtype, loss)
    kept = weight > 0
    whole, alone = (loss.evaluate(backend, *values, bins=bins) for values in ((pred, target, weight), (pred[kept], target[kept], None)))
    assert torch.equal(bits(whole.gradient[kept]), bits(alone.gradient)) and not whole.gradient[~kept].any()
    rounding = 1e-13 if dtype == torch.float64 else 2.0**-23
    harness.assert_within(whole.losses[0], alone.losses[0], rounding * alone.losses[0].abs(), "loss")
    assert loss.evaluate(backend, pred.where(kept, torch.nan), target.where(kept, torch.inf), weight, bins=bins) == whole


@LOSSES
@given(elements=ELEMENTS, bins=BINS)
def test_every_bin_in_use_has_the_same_share(backend, loss, elements, bins):
    """What harmonizing is for: the weights of the elements of a bin sum to 1 / bins in use."""
    pred, target, weight = (value.to(backend.device) for value in tensors(elements, torch.float64, loss))
    options = {"mu": 0.02} if loss.is_regression else {}
    with rsloss_kernels.use_backend(backend.name):
        density = rsloss_kernels.gradient_density(pred, target, weight, bins=bins, **options)
    valid, in_use = int((weight > 0).sum()), int((density.counts > 0).sum())
    assert int(density.counts.sum()) == valid
    shares = (density.counts * density.weights)[density.counts > 0]
    torch.testing.assert_close(shares, torch.full_like(shares, valid / max(in_use, 1)), rtol=1e-12, atol=0)


@given(elements=ELEMENTS, bins=BINS, dtype=DTYPE)
def test_logits_and_targets_have_a_mirror_image(backend, elements, bins, dtype):
    """z, t and -z, 1 - t have the same gradient norm and loss, and opposite gradients."""
    elements = [(z, float(t > 0.5), weight) for z, t, weight in elements]
    logits, target, weight = tensors(elements, dtype, CLASSIFICATION)
    got = CLASSIFICATION.evaluate(backend, logits, target, weight, bins=bins)
    mirrored = CLASSIFICATION.evaluate(backend, -logits, 1 - target, weight, bins=bins)
    assert torch.equal(mirrored.gradient, -got.gradient) and torch.equal(mirrored.losses[0], got.losses[0])


@given(elements=ELEMENTS, bins=BINS, exponent=st.integers(-20, 20))
def test_scaling_offsets_and_mu_scales_the_loss(backend, elements, bins, exponent):
    """By powers of two, exactly."""
    pred, target, weight = tensors(elements, torch.float64, REGRESSION)
    got = REGRESSION.evaluate(backend, pred, target, weight, bins=bins, mu=0.25)
    factor = 2.0**exponent
    scaled = REGRESSION.evaluate(backend, pred * factor, target * factor, weight, bins=bins, mu=0.25 * factor)
    assert torch.equal(scaled.gradient, got.gradient) and torch.equal(scaled.losses[0], got.losses[0] * factor)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@LOSSES
def test_bitwise_the_same_for_any_number_of_threads_and_run(backend, loss, generator, dtype):
    if not backend.is_deterministic:
        pytest.skip("the reference on a GPU adds atomically; documented as not bitwise repeatable")
    large = 20_000 if backend.name == "cpp" else 5000
    for rows, form in ((40, "dense"), (large, "dense"), (large, "index"), (large // 2, "soft")):
        if form != "dense" and loss.is_regression:
            continue
        weight = "row" if form == "index" else "element"
        sample = GHMSample("threads", rows, 5, form=form, weight=weight, dtype=dtype, bins=30, momentum=0.5)
        inputs = loss.draw(sample, generator)
        results = []
        # GPU kernels on the CPU have the number of the grid's processors in place of threads.
        for count in (1, 2, 2, 3, 4, 1) if backend.name == "cpp" else (1, 2):
            with threads(count):
                results.append(loss.evaluate(backend, *inputs.arguments, **inputs.options))
        assert all(result == results[0] for result in results)


def layouts(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in memory laid out differently."""
    rows, columns = value.shape
    offset = torch.zeros(value.numel() + 3, dtype=value.dtype)
    strided = torch.zeros((rows, 2 * columns), dtype=value.dtype)
    results = {
        "transposed": value.t().contiguous().t(),
        "offset": offset[3:].view(rows, columns),
        "every_second_column": strided[:, ::2],
    }
    for name in ("offset", "every_second_column"):
        results[name].copy_(value)
    return results


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_layout_in_memory_does_not_matter(backend, loss, generator, dtype):
    arguments = loss.draw(GHMSample("layout", rows=37, classes=3, weight="element", dtype=dtype), generator).arguments
    expected = loss.evaluate(backend, *arguments)
    for laid_out in zip(*(layouts(value).items() for value in arguments), strict=True):
        values = [value for _, value in laid_out]
        assert all(torch.equal(value, argument) for value, argument in zip(values, arguments, strict=True))
        assert loss.evaluate(backend, *values) == expected, laid_out[0][0]


def test_layout_of_class_indices_does_not_matter(backend, generator):
    logits, labels, rows = CLASSIFICATION.draw(GHMSample("layout", form="index", weight="row"), generator).arguments
    expected = CLASSIFICATION.evaluate(backend, logits, labels, rows)
    for name in layouts(logits):
        values = (layouts(logits)[name], layouts(labels[:, None])[name][:, 0], layouts(rows[:, None])[name][:, 0])
        assert CLASSIFICATION.evaluate(backend, *values) == expected, name


@LOSSES
def test_channels_last_maps_and_their_gradient(backend, loss, generator):
    pred = torch.randn((2, 3, 4, 5), generator=generator)
    target = (torch.rand(pred.shape, generator=generator) < 0.2).float()
    expected = loss.evaluate(backend, pred, target)
    assert loss.evaluate(backend, pred.to(memory_format=torch.channels_last), target) == expected


@LOSSES
def test_expanded_targets_and_weights(backend, loss, generator):
    pred, row = torch.randn((6, 10), generator=generator), torch.tensor([0.0, 1.0] * 5)
    expected = loss.evaluate(backend, pred, row.repeat(6, 1), row.repeat(6, 1))
    assert loss.evaluate(backend, pred, row.expand(6, 10), row.expand(6, 10)) == expected


@LOSSES
def test_expanded_upstream_gradient(backend, loss, generator):
    """`.expand().sum()` hands the operator a stride-0 gradient."""
    arguments = loss.draw(GHMSample("expanded"), generator).arguments
    expected = loss.evaluate(backend, *arguments, upstream=[3.0]).gradient
    leaf, *others = (value.to(backend.device) for value in arguments)
    with rsloss_kernels.use_backend(backend.name):
        value = loss.function(leaf.requires_grad_(), *others)
    value.expand(3).sum().backward()
    assert torch.equal(leaf.grad.cpu(), expected)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_list_of_feature_maps_equals_their_concatenation(backend, loss, generator, dtype):
    """Level sizes that are no multiple of a vector or a block, one level empty; targets and weights in both forms."""
    for form, weight in (("dense", "element"),) if loss.is_regression else (("dense", "row"), ("index", "element"), ("soft", None)):
        sample = GHMSample("levels", 500, 3, form=form, weight=weight, dtype=dtype, bins=30, momentum=0.5)
        inputs = loss.draw(sample, generator)
        sizes = [1, 64, 0, 65, 370]
        if form == "soft":
            inputs.targets[:65].round_()  # levels of 0 and 1 alone
        truth = loss.truth(*inputs.arguments, **inputs.options)
        levels = [value.split(sizes) for value in inputs.arguments]
        results = []
        for preds, targets, *weights in (levels, [[value] for value in inputs.arguments]):
            histogram, value, acc_sum, _, gradients = loss.run_operators(
                backend, preds, targets, weights[0] if weights else [], **inputs.options
            )
            got = harness.Evaluation((value.cpu(),), torch.cat([gradient.cpu() for gradient in gradients]))
            harness.assert_gates(backend, got, truth.losses, truth.gradient(), form, 2.0**-149, loss.narrow)
            assert torch.equal(histogram[0, :30].cpu().long(), truth.counts) and histogram[0, 30] == 0 and histogram[1, 30] == 0
            results.append((got.gradient, acc_sum.cpu()))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*results, strict=True))


@LOSSES
def test_histogram_is_laid_out_as_documented(backend, loss, generator):
    sample = GHMSample("layout", 50, 4, weight="element", bins=10)
    inputs = loss.draw(sample, generator)
    pred, target, weight = inputs.arguments
    pred[:3, 0], weight[:3, 0] = torch.nan, 1.0
    truth = loss.truth(pred, target, weight, **inputs.options)
    histogram, value, acc_sum, weights, _ = loss.run_operators(backend, [pred], [target], [weight], **inputs.options)
    histogram = histogram.cpu()
    assert histogram.dtype == weights.dtype == acc_sum.dtype == torch.float64
    assert histogram.shape == (2, 11) and value.isnan()
    assert torch.equal(histogram[0, :10].long(), truth.counts) and histogram[:, 10].tolist() == [3, 0]
    torch.testing.assert_close(weights.cpu(), truth.weights, rtol=1e-14, atol=0)
    finite = loss.truth(pred, target, weight.where(~pred.isnan(), 0.0), **inputs.options)
    assert abs(float((histogram[1, :10] * weights.cpu()).sum()) - finite.losses[0]) <= backend.loss_gate(pred.dtype) * finite.losses[0]
