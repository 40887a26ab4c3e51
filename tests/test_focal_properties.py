"""What must hold for every input of the element-wise sigmoid losses: invariances, bitwise repeatability, independence of memory layout."""
import contextlib

import harness
import hypothesis.strategies as st
import pytest
import torch
from harness import bits
from hypothesis import example, given
from rsloss_kernels import equalized_focal_loss, use_backend
from sigmoid_samples import EFL, FOCAL, PLAIN_LOSSES, QUALITY, SigmoidSample, assert_is_focal_loss

PLAIN = pytest.mark.parametrize("loss", PLAIN_LOSSES.values(), ids=PLAIN_LOSSES)
# Logits on a grid with ties; targets: negative, positive, soft, dropped; weights: none, small, large.
GRID = st.integers(-320, 320).map(lambda n: n / 8)
TARGET = st.sampled_from([0.0, 0.0, 1.0, 0.3, 0.875, -1.0])
ELEMENTS = st.lists(st.tuples(GRID, TARGET, st.sampled_from([0.0, 1e-3, 1.0, 7.0])), min_size=1, max_size=40)
GAMMA = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 10.0])
DTYPE = st.sampled_from([torch.float32, torch.float64])


def tensors(elements, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, targets, weight = (torch.tensor(values, dtype=torch.float64)[:, None] for values in zip(*elements, strict=True))
    return logits.to(dtype), targets, weight


def exponent(loss, gamma: float) -> dict:
    return {"beta" if loss is QUALITY else "gamma": gamma}


@PLAIN
@given(elements=ELEMENTS, gamma=GAMMA, dtype=DTYPE)
@example(elements=[(0.0, 1.0, 1.0)], gamma=2.0, dtype=torch.float32)
@example(elements=[(40.0, 0.0, 1.0), (-40.0, 1.0, 7.0)], gamma=0.5, dtype=torch.float64)
def test_any_small_input_agrees_with_the_oracle(backend, loss, elements, gamma, dtype):
    logits, targets, weight = tensors(elements, dtype)
    loss.assert_agrees(backend, logits, targets, weight=weight, **exponent(loss, gamma))


@PLAIN
@given(elements=ELEMENTS, gamma=GAMMA, dtype=DTYPE, data=st.data())
def test_order_of_elements_does_not_matter(backend, loss, elements, gamma, dtype, data):
    order = torch.tensor(data.draw(st.permutations(range(len(elements)))))
    logits, targets, weight = tensors(elements, dtype)
    before = loss.evaluate(backend, logits, targets, weight=weight, **exponent(loss, gamma))
    after = loss.evaluate(backend, logits[order], targets[order], weight=weight[order], **exponent(loss, gamma))
    # An element is one computation, wherever it stands; only the sum may round differently. PyTorch's powers depend on the place.
    if backend.name == "reference":
        allowed = 8 * torch.finfo(dtype).eps * before.gradient[order].abs().double() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        harness.assert_within(after.gradient, before.gradient[order].double(), allowed, "gradient")
    else:
        assert torch.equal(bits(after.gradient), bits(before.gradient[order]))
    rounding = 1e-13 if dtype == torch.float64 else 2.0**-23
    harness.assert_within(after.losses[0], before.losses[0].double(), rounding * before.losses[0].abs().double() + 2.0**-149, "loss")


@PLAIN
@given(elements=ELEMENTS, gamma=GAMMA, dtype=DTYPE)
def test_elements_that_are_dropped_leave_no_trace(backend, loss, elements, gamma, dtype):
    logits, targets, weight = tensors(elements, dtype)
    kept = (weight > 0) & (targets >= 0)
    whole = loss.evaluate(backend, logits, targets, weight=weight, **exponent(loss, gamma))
    assert not whole.gradient[~kept].any()
    holes = logits.where(kept, torch.nan), targets.where(weight > 0, torch.nan)
    assert loss.evaluate(backend, *holes, weight=weight, **exponent(loss, gamma)) == whole


@given(elements=ELEMENTS, gamma=GAMMA, dtype=DTYPE)
def test_logits_and_targets_have_a_mirror_image(backend, elements, gamma, dtype):
    """z, t and -z, 1 - t have the same loss, with alpha mirrored too, and opposite gradients. Targets of 0 are summed before those of 1,
    so the sums may differ by their rounding."""
    elements = [(z, float(t > 0.5), weight) for z, t, weight in elements]
    logits, targets, weight = tensors(elements, dtype)
    got = FOCAL.evaluate(backend, logits, targets, weight=weight, gamma=gamma, alpha=0.25)
    mirrored = FOCAL.evaluate(backend, -logits, 1 - targets, weight=weight, gamma=gamma, alpha=0.75)
    assert torch.equal(mirrored.gradient, -got.gradient)
    loss = got.losses[0]
    harness.assert_within(mirrored.losses[0], loss, 4 * torch.finfo(loss.dtype).eps * loss.abs(), "mirrored")


@given(elements=ELEMENTS, gamma=st.sampled_from([1.0, 1.5, 2.0]), dtype=DTYPE, power=st.integers(-20, 20))
def test_weights_scale(backend, elements, gamma, dtype, power):
    """By powers of two, exactly."""
    logits, targets, weight = tensors(elements, dtype)
    logits, factor = logits.clamp(-8, 8), 2.0**power
    got = FOCAL.evaluate(backend, logits, targets, weight=weight, gamma=gamma)
    scaled = FOCAL.evaluate(backend, logits, targets, weight=weight * factor, gamma=gamma)
    assert torch.equal(scaled.gradient, got.gradient * factor) and torch.equal(scaled.losses[0], got.losses[0] * factor)


@given(labels=st.lists(st.integers(-1, 4), min_size=1, max_size=20), dtype=DTYPE, data=st.data())
def test_equalized_focal_loss_of_balanced_classes_is_the_focal_loss(backend, labels, dtype, data):
    """Bit by bit, for gradients of any ratio of 1 or more."""
    logits = torch.tensor(data.draw(st.lists(GRID, min_size=3 * len(labels), max_size=3 * len(labels))), dtype=dtype).view(-1, 3)
    options = {"gamma": data.draw(st.sampled_from([0.5, 1.5, 2.0])), "alpha": data.draw(st.sampled_from([0.25, 0.3, -1.0]))}
    focal = FOCAL.evaluate(backend, logits, torch.tensor(labels), **options)
    balanced = EFL.evaluate(backend, logits, torch.tensor(labels), torch.tensor([1.0, 1.0, 2.5]), **options)
    assert_is_focal_loss(backend, balanced, focal)


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
def test_bitwise_the_same_for_any_number_of_threads_and_run(backend, generator, dtype):
    if not backend.is_deterministic:
        pytest.skip("the reference on a GPU; documented as not bitwise repeatable")
    large = 2000 if backend.is_slow else 30_000
    cases = [(FOCAL, large, "index", 5), (QUALITY, large, "soft", 5), (EFL, large, "index", 5), (EFL, 9, "index", 1203)]
    if not backend.is_slow:
        # Tasks share out the sums of so many classes.
        cases.append((EFL, 300, "index", 1203))
    for loss, rows, form, classes in cases:
        inputs = loss.draw(SigmoidSample("threads", rows, classes, form=form, weight="element", dtype=dtype, gamma=1.5), generator)
        results = []
        # GPU kernels on the CPU have the number of the grid's processors in place of threads.
        for count in (1, 2, 3, 1) if backend.name == "cpp" else (1, 2):
            with threads(count):
                results.append(loss.evaluate(backend, *inputs.arguments, **inputs.options))
        assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_sums_are_those_of_the_gradient(backend, generator, dtype):
    """What the published hooks collect after backward."""
    batch, anchors, classes, sizes = 2, 2, 4, [(5, 6), (3, 2)]
    levels = [torch.randn((batch, anchors * classes, *size), generator=generator).to(backend.device, dtype) for size in sizes]
    labels = torch.randint(-1, classes + 1, (batch, 72), generator=generator).to(backend.device)
    leaves = [level.requires_grad_() for level in levels]
    with use_backend(backend.name):
        returned = equalized_focal_loss(
            leaves, labels, torch.linspace(0, 1, classes, device=backend.device), layout="anchor_major", avg_factor=3.5
        )
    returned.loss.backward()
    flat = [level.grad.view(batch, anchors, classes, -1).permute(0, 3, 1, 2).reshape(batch, -1, classes) for level in levels]
    pulls = torch.cat(flat, 1).double().abs()
    is_positive = labels[..., None] == torch.arange(classes, device=backend.device)
    # The gradient's own rounding: half a unit in the last place of each summand.
    rtol = 1e-6 + (torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(returned.pos_grad, (pulls * is_positive).sum((0, 1)), rtol=rtol, atol=0)
    torch.testing.assert_close(returned.neg_grad, (pulls * ~is_positive).sum((0, 1)), rtol=rtol, atol=0)


def layouts(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in memory laid out differently."""
    rows, columns = value.shape
    offset = torch.zeros(value.numel() + 3, dtype=value.dtype)
    strided = torch.zeros((rows, 2 * columns), dtype=value.dtype)
    results = {"transposed": value.t().contiguous().t(), "offset": offset[3:].view(rows, columns), "every_second": strided[:, ::2]}
    for name in ("offset", "every_second"):
        results[name].copy_(value)
    return results


@PLAIN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_layout_in_memory_does_not_matter(backend, loss, generator, dtype):
    sample = SigmoidSample("layout", rows=37, classes=3, form="soft", weight="element", dtype=dtype)
    inputs = loss.draw(sample, generator)
    logits, targets = inputs.arguments
    weight = inputs.options.pop("weight")
    expected = loss.evaluate(backend, logits, targets, weight=weight, **inputs.options)
    for name in layouts(logits):
        moved = [layouts(value)[name] for value in (logits, targets, weight)]
        assert loss.evaluate(backend, *moved[:2], weight=moved[2], **inputs.options) == expected, name
