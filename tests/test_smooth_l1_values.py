"""Smooth L1 loss: values and gradients against the truth, at the edges, against MMDetection's and PyTorch's."""
import itertools
import math

import harness
import mmdet_losses
import numpy as np
import pytest
import torch
from rsloss_kernels import DynamicSmoothL1Loss, smooth_l1_loss, use_backend
from smooth_l1_samples import GRADIENT_GATE, LONG, Inputs, draw, evaluate, total, truth

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SINGLE, DOUBLE, HALF, BFLOAT = torch.float32, torch.float64, torch.float16, torch.bfloat16
# Keyword arguments of `draw` by name.
SAMPLES = {
    "plain": {},
    "sum_of_rows": {"weight": "row", "reduction": "sum"},
    "elements_weighted": {"weight": "element", "avg_factor": 7.0},
    "one_element": {"shape": (1,)},
    "maps": {"shape": (2, 4, 5, 7), "weight": "row", "beta": torch.tensor(0.11, dtype=DOUBLE)},
    "odd": {"shape": (331, 3), "weight": "row", "avg_factor": torch.tensor(9, dtype=torch.int64)},
    "several_chunks": {"shape": (30_001, 3), "weight": "row", "beta": torch.tensor([0.3])},
    "beta_0": {"beta": 0.0},
    "beta_0_tensor": {"beta": torch.zeros(()), "weight": "element"},
    "smallest_beta": {"beta": 1e-30, "scale": 1e-30},
    "below_the_smallest": {"beta": torch.tensor(9e-31, dtype=DOUBLE), "scale": 1e-30},
    "largest_beta": {"beta": 1e30, "scale": 1e18},
    "all_square": {"beta": 100.0},
    "all_linear": {"beta": 1e-6},
    "tiny": {"scale": 1e-19, "beta": 1.0, "dtype": DOUBLE},
    "mixed": {"dtype": SINGLE, "target_dtype": DOUBLE, "weight": "element", "weight_dtype": HALF},
    "narrow": {"dtype": BFLOAT, "target_dtype": SINGLE, "weight": "row", "weight_dtype": BFLOAT},
    "wide_weights": {"dtype": HALF, "weight": "element", "weight_dtype": DOUBLE, "avg_factor": 3.0},
}


def assert_true(backend, inputs: Inputs, label=""):
    losses, slopes = truth(inputs)
    wanted = torch.from_numpy(slopes.astype(np.float64))
    harness.assert_gates(backend, evaluate(backend, inputs), [total(losses)], wanted, label, narrow=GRADIENT_GATE)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(inputs.pred.shape, generator=generator, dtype=DOUBLE).to(inputs.pred.dtype)
    options = {**inputs.options, "reduction": "none"}
    if "avg_factor" not in inputs.options and inputs.options.get("reduction", "mean") == "mean":
        options["avg_factor"] = max(inputs.pred.numel(), 1)
    single = evaluate(backend, Inputs(inputs.pred, inputs.target, inputs.beta, inputs.weight, options), upstream)
    gate, (relative, smallest) = backend.loss_gate(inputs.pred.dtype), harness.ROUNDING.get(inputs.pred.dtype, (0.0, 1e-45))
    elements = torch.from_numpy(losses.astype(np.float64))
    assert single.losses[0].dtype == inputs.pred.dtype
    harness.assert_within(single.losses[0], elements, (gate + relative) * elements.abs() + smallest, f"{label} elements")
    wanted = torch.from_numpy((slopes * upstream.double().numpy().astype(LONG)).astype(np.float64))
    harness.assert_gradient(backend, single.gradient, wanted, f"{label} of elements", narrow=GRADIENT_GATE)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(backend, name, generator):
    sample = dict(SAMPLES[name])
    dtypes = [sample.pop("dtype")] if "dtype" in sample else FLOATS
    # Others would round everything to 0 or infinity.
    dtypes = [dtype for dtype in dtypes if dtype != HALF or 1e-3 < sample.get("scale", 1) < 1e3]
    if backend.is_slow and name == "several_chunks":
        dtypes = dtypes[2:3]
    for dtype in dtypes:
        assert_true(backend, draw(generator, dtype=dtype, **sample), f"{name} {dtype}")


def test_every_mix_of_types_and_ends_finite(backend, generator):
    """Of prediction, target, weight; last vectors that are not whole; data that is not aligned."""
    for number, (pred, target, weight) in enumerate(itertools.product(FLOATS, FLOATS, FLOATS)):
        if backend.is_slow and number % 7 != 0:
            continue
        kind = "row" if number % 2 else "element"
        inputs = draw(generator, (23, 3), 0.6, kind, dtype=pred, target_dtype=target, weight_dtype=weight)
        padded = torch.empty(inputs.pred.numel() + 1, dtype=pred)[1:].view(inputs.pred.shape)
        inputs.pred = padded.copy_(inputs.pred)
        assert_true(backend, inputs, f"{pred} {target} {weight}")


def test_several_rounds_of_a_program(backend, generator, monkeypatch):
    """As on more elements than all programs take at once: with Triton three programs of 64."""
    if backend.name == "triton":
        from rsloss_kernels.losses.smooth_l1 import triton_impl

        few = triton_impl.configuration("smooth l1 sums", 3003, torch.device(backend.device))._replace(block=64, programs=3)
        monkeypatch.setattr(triton_impl, "configuration", lambda *_: few)
    assert_true(backend, draw(generator, shape=(1001, 3), weight="row", reduction="sum"))


@pytest.mark.slow_interpreter
def test_single_differences(backend):
    """One at a time, so that nothing averages out: around beta and the powers of two."""
    for beta in (0.0, 1.0, 0.1111111111111111, 3e-7):
        grid = torch.cat([torch.logspace(-6, 3, 40), torch.tensor([1 - 2**-24, 1, 1 + 2**-23])]) * (beta or 1.0)
        for d in torch.cat([grid, -grid]).tolist():
            inputs = Inputs(torch.tensor([d + 0.3]), torch.tensor([0.3]), beta)
            losses, slopes = truth(inputs)
            harness.assert_gates(backend, evaluate(backend, inputs), [total(losses)], torch.from_numpy(slopes.astype(np.float64)), f"{d}",
                                 narrow=GRADIENT_GATE)  # fmt: skip


@pytest.mark.parametrize("d, beta, weight", [(1e-20, 1.0, 1e12), (1e-5, 1e30, 1e15), (1e-30, 1e-30, 1e20), (3e38, 1.0, 1e-20)])
def test_weights_far_from_the_losses(backend, d, beta, weight):
    """A loss that a float32 has no bits for, times a weight that makes it a usual number; and the other way round."""
    inputs = Inputs(torch.full((1, 1), d), torch.zeros(1, 1), beta, torch.full((1, 1), weight))
    losses, slopes = truth(inputs)
    wanted = torch.from_numpy(slopes.astype(np.float64))
    harness.assert_gates(backend, evaluate(backend, inputs), [total(losses)], wanted, narrow=GRADIENT_GATE)


def test_square_strictly_below_beta(backend):
    """Both forms and their slopes meet there; at beta itself the linear one is right to the last bit."""
    pred = torch.tensor([0.5, -0.5, 0.25, 0.75, 0.0], dtype=DOUBLE)
    got = evaluate(backend, Inputs(pred, torch.zeros(5, dtype=DOUBLE), 0.5, options={"reduction": "none"}))
    assert got.losses[0].tolist() == [0.25, 0.25, 0.0625, 0.5, 0.0]
    assert got.gradient.tolist() == [1.0, -1.0, 0.5, 1.0, 0.0]
    got = evaluate(backend, Inputs(pred, torch.zeros(5, dtype=DOUBLE), 0.0, options={"reduction": "none"}))
    assert torch.equal(got.losses[0], pred.abs()) and torch.equal(got.gradient, pred.sign())


@pytest.mark.parametrize("dtype", [SINGLE, BFLOAT, DOUBLE], ids=str)
def test_what_is_not_finite(backend, dtype):
    """Infinite differences take their limits; NaN is its element's; what has no weight may hold anything."""
    nan, inf = math.nan, math.inf
    pred = torch.tensor([[0.5, inf, -inf], [nan, 0.25, inf], [nan, inf, -inf], [1.0, 2.0, 0.0]], dtype=dtype)
    target = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, inf], [nan, inf, 1.0], [0.0, nan, 0.0]], dtype=dtype)
    weight = torch.tensor([[1.0, 1, 1], [1, 2, 1], [0, 0, 0], [1, 0, 1]], dtype=dtype)
    slopes = torch.tensor([[0.5, 1, -1], [nan, 0.5, nan], [0, 0, 0], [1, 0, 0]], dtype=dtype)
    got = evaluate(backend, Inputs(pred, target, 1.0, weight, {"reduction": "sum"}))
    assert got.losses[0].isnan() and torch.equal(harness.bits(got.gradient.nan_to_num(9)), harness.bits(slopes.nan_to_num(9)))
    each = evaluate(backend, Inputs(pred, target, 1.0, weight, {"reduction": "none"})).losses[0]
    wanted = torch.tensor([[0.125, inf, inf], [nan, 0.0625, nan], [0, 0, 0], [0.5, 0, 0]], dtype=dtype)
    assert torch.equal(each.nan_to_num(9, posinf=8), wanted.nan_to_num(9, posinf=8))
    got = evaluate(backend, Inputs(pred[:1], target[:1], 1.0, weight[:1]))
    assert got.losses[0] == inf and torch.equal(got.gradient, slopes[:1] / 3)
    # Weights that are not finite, one of a row.
    rows = torch.tensor([nan, 0.0, 0.0, 2.0], dtype=dtype)
    got = evaluate(backend, Inputs(pred.nan_to_num(1, 1, 1), target.nan_to_num(0, 0), 1.0, rows, {"reduction": "sum"}))
    assert got.losses[0].isnan() and got.gradient[0].isnan().all() and not got.gradient[1:3].any() and got.gradient[3].isfinite().all()
    # A weight of 0 outweighs what divides and what arrives.
    got = evaluate(backend, Inputs(pred[2:3], target[2:3], 1.0, weight[2:3], {"avg_factor": 2.0}), math.inf)
    assert got.losses[0] == 0 and not got.gradient.any()


@pytest.mark.parametrize("beta", [-1.0, math.nan, math.inf, 2e30])
def test_a_tensor_beta_out_of_range_is_not_a_finite_loss(backend, beta):
    """Nobody may read it on the host; all that counts is NaN."""
    weight = torch.tensor([1.0, 0.0])
    beta = torch.tensor(beta, dtype=DOUBLE)
    for options in ({}, {"reduction": "none"}):
        for pred in (torch.tensor([0.5, 0.3]), torch.zeros(2)):
            got = evaluate(backend, Inputs(pred, torch.zeros(2), beta, weight, options))
            assert got.losses[0].flatten()[0].isnan() and got.gradient[0].isnan() and got.gradient[1] == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), ()])
def test_nothing_at_all(backend, shape):
    pred = torch.zeros(shape)
    for reduction in ("mean", "sum", "none"):
        got = evaluate(backend, Inputs(pred, torch.zeros(shape), 1.0, options={"reduction": reduction}))
        assert got.losses[0].shape == (shape if reduction == "none" else ()) and got.gradient.shape == shape
        assert not got.losses[0].any() and not got.gradient.any()
    got = evaluate(backend, Inputs(torch.full((2, 3), math.nan), torch.zeros(2, 3), 1.0, torch.zeros(2)))
    assert got.losses[0] == 0 and not got.gradient.any()
    # Nothing divided by nothing, as in floating point.
    got = evaluate(backend, Inputs(pred, torch.zeros(shape), 1.0, options={"avg_factor": 0.0}))
    assert got.losses[0].isnan()


def test_forms_of_weights_and_memory(backend, generator):
    """Rows, columns, expanded, bool, integers; strides that are not contiguous."""
    inputs = draw(generator, (9, 4), 0.5, "row")
    rows = inputs.weight
    wanted = evaluate(backend, inputs)
    for weight in (rows[:, None], rows[:, None].expand(9, 4), rows[:, None].repeat(1, 4), rows.repeat_interleave(2)[::2]):
        assert evaluate(backend, Inputs(inputs.pred, inputs.target, 0.5, weight)) == wanted
    for weight, same in ((rows > 0, (rows > 0).float()), ((rows > 0).int(), (rows > 0).double())):
        got = evaluate(backend, Inputs(inputs.pred, inputs.target, 0.5, weight))
        assert got == evaluate(backend, Inputs(inputs.pred, inputs.target, 0.5, same))
    wide = torch.stack([inputs.pred, inputs.target], -1)
    got = evaluate(backend, Inputs(wide[..., 0], inputs.target.t().contiguous().t(), 0.5, rows))
    assert got == wanted and got.gradient.is_contiguous()
    assert evaluate(backend, Inputs(inputs.pred, inputs.target.mul(4).round().long(), 0.5, rows)) == evaluate(
        backend, Inputs(inputs.pred, inputs.target.mul(4).round().double(), 0.5, rows)
    )


def test_expanded_weights_are_not_copied(backend, generator):
    inputs = draw(generator, (50, 4), 0.5, "row")
    pred, target, rows = (value.to(backend.device) for value in (inputs.pred, inputs.target, inputs.weight))
    storages = {}

    def pack(value):
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), use_backend(backend.name):
        value = smooth_l1_loss(pred.requires_grad_(), target, 0.5, rows[:, None].expand(50, 4), avg_factor=3.0)
    # Nothing of the size of the prediction besides the caller's own, which backward reads again.
    assert value.requires_grad
    assert storages.keys() == {kept.untyped_storage().data_ptr() for kept in (pred, target, rows)}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_mmdetection(backend, reduction, generator):
    """Its own module, float64: every reduction, weights, what divides."""
    theirs = mmdet_losses.load("smooth_l1_loss").SmoothL1Loss(beta=0.4, reduction=reduction, loss_weight=1.7)
    ours = DynamicSmoothL1Loss(initial_beta=0.4, reduction=reduction, loss_weight=1.7).to(backend.device)
    for weight, avg_factor in itertools.product((None, "element"), (None, 5.0, 0.0, torch.tensor(3.0, dtype=DOUBLE))):
        if reduction == "sum" and avg_factor is not None:
            with pytest.raises(ValueError, match="avg_factor"):
                ours(torch.zeros(2, 4, device=backend.device), torch.zeros(2, 4, device=backend.device), avg_factor=avg_factor)
            continue
        inputs = draw(generator, (30, 4), weight=weight, dtype=DOUBLE)
        wanted_pred, pred = inputs.pred.clone().requires_grad_(), inputs.pred.to(backend.device).requires_grad_()
        wanted = theirs(wanted_pred, inputs.target, inputs.weight, avg_factor)
        with use_backend(backend.name):
            weights = None if weight is None else inputs.weight.to(backend.device)
            factor = avg_factor.to(backend.device) if isinstance(avg_factor, torch.Tensor) else avg_factor
            got = ours(pred, inputs.target.to(backend.device), weights, factor)
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-9, atol=1e-12)
        wanted.sum().backward()
        got.sum().backward()
        torch.testing.assert_close(pred.grad.cpu(), wanted_pred.grad, rtol=1e-9, atol=1e-12)


def test_as_pytorch(backend, generator):
    for beta in (0.0, 0.7):
        inputs = draw(generator, (40, 4), beta, dtype=DOUBLE)
        wanted = torch.nn.functional.smooth_l1_loss(inputs.pred.requires_grad_(), inputs.target, beta=beta)
        got = evaluate(backend, inputs)
        torch.testing.assert_close(got.losses[0], wanted.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got.gradient, torch.autograd.grad(wanted, inputs.pred)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.slow_interpreter
def test_the_same_bits_every_time(backend, generator):
    inputs = draw(generator, (40_001, 4), weight="row")
    first = evaluate(backend, inputs)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert evaluate(backend, inputs) == first
    finally:
        torch.set_num_threads(threads)


def test_scaled_mirrored_and_shuffled(backend, generator):
    """By a power of two everything scales to the last bit; a mirrored difference has the opposite slope; elements stand for themselves."""
    inputs = draw(generator, (40, 3), 0.4, "row", reduction="none")
    base = evaluate(backend, inputs)
    got = evaluate(backend, Inputs(inputs.pred * 8, inputs.target * 8, 3.2, inputs.weight, inputs.options))
    assert torch.equal(got.losses[0], base.losses[0] * 8) and torch.equal(got.gradient, base.gradient)
    got = evaluate(backend, Inputs(inputs.target, inputs.pred, 0.4, inputs.weight, inputs.options))
    assert torch.equal(got.losses[0], base.losses[0]) and torch.equal(got.gradient, -base.gradient)
    order = torch.randperm(40, generator=generator)
    got = evaluate(backend, Inputs(inputs.pred[order], inputs.target[order], 0.4, inputs.weight[order], inputs.options))
    assert torch.equal(got.losses[0], base.losses[0][order]) and torch.equal(got.gradient, base.gradient[order])
    # Convex, and never above the absolute value nor more than beta / 2 below it.
    distance = (inputs.pred - inputs.target).abs() * inputs.weight[:, None]
    assert (base.losses[0] <= distance * (1 + 1e-6)).all() and (base.losses[0] >= distance - 0.2 * inputs.weight[:, None] - 1e-6).all()
