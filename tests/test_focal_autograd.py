"""The element-wise sigmoid losses inside autograd: repeated and refused backwards, modes, AMP, memory held for backward."""

import harness
import pytest
import torch
import torch.utils.checkpoint
from rsloss_kernels import sigmoid_focal_loss, use_backend
from sigmoid_samples import EFL, FOCAL, QUALITY, VARIFOCAL, SigmoidSample

# One per modulator, and one that returns sums of classes.
LOSSES = pytest.mark.parametrize("loss", [FOCAL, QUALITY, VARIFOCAL, EFL], ids=lambda loss: loss.name)


def drawn(backend, loss, generator, **description):
    """Arguments, the logits requiring grad, and options, on the backend's device."""
    description = {"has_quality": True, "weight": "element"} | description
    inputs = loss.draw(SigmoidSample("autograd", **description), generator)
    logits, *others = (value.to(backend.device) for value in inputs.arguments)
    return [logits.requires_grad_(), *others], harness.on_device(inputs.options, backend)


def loss_of(backend, loss, arguments, options):
    with use_backend(backend.name):
        return harness.losses_in(loss.function(*arguments, **options))[0]


@LOSSES
def test_second_backward_is_the_same(backend, loss, generator):
    arguments, options = drawn(backend, loss, generator)
    value = loss_of(backend, loss, arguments, options)
    first, second = (torch.autograd.grad(value, arguments[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
    value.backward()
    loss_of(backend, loss, arguments, options).backward()
    assert torch.equal(arguments[0].grad, first + second)


@LOSSES
def test_inputs_are_not_written_and_results_do_not_alias_them(backend, loss, generator):
    arguments, options = drawn(backend, loss, generator, avg_factor="tensor")
    everything = [*arguments, *(value for value in options.values() if torch.is_tensor(value))]
    before = [(value.detach().clone(), value._version) for value in everything]
    with use_backend(backend.name):
        returned = loss.function(*arguments, **options)
    results = [returned] if torch.is_tensor(returned) else [*returned]
    (gradient,) = torch.autograd.grad(results[0], arguments[0], torch.full_like(results[0], 3))
    for value, (content, version) in zip(everything, before, strict=True):
        assert value._version == version and torch.equal(value.detach(), content)
    # The two sums are rows of one tensor.
    addresses = [value.data_ptr() for value in (*results, gradient, *everything)]
    assert len(set(addresses)) == len(addresses)
    assert not any(value.requires_grad for value in results[1:])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_editing_the_logits_before_backward_is_refused(backend, generator, reduction):
    arguments, options = drawn(backend, FOCAL, generator)
    inner = arguments[0] * 1
    value = loss_of(backend, FOCAL, [inner, *arguments[1:]], options | {"reduction": reduction}).sum()
    with torch.no_grad():
        inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@LOSSES
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_double_backward_is_refused_clearly(backend, loss, generator, reduction):
    arguments, options = drawn(backend, loss, generator)
    if not loss.is_equalized:
        options["reduction"] = reduction
    value = loss_of(backend, loss, arguments, options).sum()
    (gradient,) = torch.autograd.grad(value, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@LOSSES
def test_other_arguments_get_no_gradient(backend, loss, generator):
    arguments, options = drawn(backend, loss, generator, form="index" if loss.is_equalized else "soft", avg_factor="tensor")
    floating = [value for value in (*arguments[1:], *options.values()) if torch.is_tensor(value) and value.is_floating_point()]
    for value in floating:
        value.requires_grad_()
    loss_of(backend, loss, arguments, options).backward()
    assert len(floating) > 1 and arguments[0].grad.any() and all(value.grad is None for value in floating)
    assert not loss_of(backend, loss, [arguments[0].detach(), *arguments[1:]], options).requires_grad


@LOSSES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients(backend, loss, generator, mode):
    arguments, options = drawn(backend, loss, generator, classes=5 if mode is torch.no_grad else 6)
    with mode():
        values = [loss_of(backend, loss, [x, *arguments[1:]], options) for x in (arguments[0], arguments[0] * 1)]
    # Tables made within such a mode serve later calls too.
    expected = loss_of(backend, loss, arguments, options)
    expected.backward()
    assert all(value == expected and not value.requires_grad for value in values) and arguments[0].grad.any()


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, loss, generator, dtype):
    """A cast would hand the operator a float32 copy of 16-bit logits, or 16-bit copies of float32 ones."""
    for of_logits in (torch.float32, dtype, torch.float64):
        arguments, options = drawn(backend, loss, generator, dtype=of_logits)
        expected = loss_of(backend, loss, arguments, options)
        (gradient,) = torch.autograd.grad(expected, arguments[0])
        with torch.autocast(backend.device, dtype):
            got = loss_of(backend, loss, arguments, options)
        assert torch.equal(got, expected) and got.dtype == expected.dtype
        (under_autocast,) = torch.autograd.grad(got, arguments[0])
        assert under_autocast.dtype == of_logits and torch.equal(under_autocast, gradient)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradient_scaler(backend, loss, generator, dtype):
    """A scale of 2^16 is exact, and a NaN logit makes the scaler skip the step."""
    arguments, options = drawn(backend, loss, generator, dtype=dtype, weight=None)
    arguments[0] = (arguments[0].detach() / 8).requires_grad_()
    value = loss_of(backend, loss, arguments, options)
    plain, scaled = (torch.autograd.grad(value, arguments[0], torch.full_like(value, s), retain_graph=True)[0] for s in (1.0, 65536.0))
    is_normal = (plain.abs() > 2**-13 if dtype == torch.float16 else plain != 0) & scaled.isfinite()
    assert is_normal.any() and torch.equal(scaled[is_normal], plain[is_normal] * 65536)
    broken = arguments[0].detach().clone()
    broken[arguments[1] >= 0] = torch.nan
    weight = torch.nn.Parameter(torch.ones((), device=backend.device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler(backend.device, init_scale=65536.0)
    scaler.scale(loss_of(backend, loss, [broken * weight, *arguments[1:]], options)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == 1 and scaler.get_scale() == 32768


@LOSSES
@pytest.mark.parametrize("form", ["index", "soft"])
@pytest.mark.slow_interpreter
def test_memory_held_for_backward(backend, loss, generator, form):
    """The caller's own tensors and the table of the classes."""
    form = "index" if loss.is_equalized else form
    arguments, options = drawn(backend, loss, generator, form=form, rows=5000)
    storages = {}

    def pack(value):
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        value = loss_of(backend, loss, arguments, options)
    # All but the state, from which the table was made.
    for argument in (*arguments[: len(arguments) - loss.is_equalized], options["weight"]):
        assert storages.pop(argument.untyped_storage().data_ptr()) == argument.numel() * argument.element_size()
    assert value.requires_grad and sum(storages.values()) <= 3 * 4 * 8


@pytest.mark.parametrize("form", ["dense", "index"])
def test_expanded_weights_of_rows_are_not_copied(backend, generator, form):
    arguments, options = drawn(backend, FOCAL, generator, weight="row", form=form)
    rows, addresses = options["weight"], set()
    expanded = rows[:, None].expand(arguments[0].shape)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: addresses.add(value.data_ptr()), lambda value: value):
        value = loss_of(backend, FOCAL, arguments, options | {"weight": expanded})
    assert rows.data_ptr() in addresses
    assert value == loss_of(backend, FOCAL, arguments, options | {"weight": expanded.contiguous()})


def test_expanded_dense_targets_are_no_labels(backend, generator):
    """Dense integral targets that were expanded over the classes have the strides of weights per row."""
    logits = torch.randn((4, 3), generator=generator)
    targets = torch.zeros((4, 1), dtype=torch.int64).expand(4, 3)
    value = loss_of(backend, FOCAL, (logits, targets), {"reduction": "sum"})
    assert value == loss_of(backend, FOCAL, (logits, targets.contiguous()), {"reduction": "sum"})


def test_weights_expanded_on_some_levels(backend, generator):
    levels = [torch.randn((rows, 3), generator=generator) for rows in (4, 2)]
    labels = [torch.zeros(len(level), dtype=torch.int64) for level in levels]
    weights = [torch.rand((4, 1), generator=generator).expand(4, 3), torch.rand((2, 3), generator=generator)]
    value = loss_of(backend, FOCAL, (levels, labels), {"weight": weights, "reduction": "sum"})
    weights = [weight.contiguous() for weight in weights]
    assert value == loss_of(backend, FOCAL, (levels, labels), {"weight": weights, "reduction": "sum"})


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_backward_runs_on_the_backend_of_forward(backend, generator, reduction):
    """Backward may run on another thread and after `use_backend` has ended."""
    arguments, options = drawn(backend, FOCAL, generator)
    value = loss_of(backend, FOCAL, arguments, options | {"reduction": reduction}).sum()
    assert harness.operators_of_backward(value) == [f"focal_backward.{backend.name}"]
    assert arguments[0].grad.any()


@LOSSES
def test_upstream_gradient_scales(backend, loss, generator):
    inputs = loss.draw(SigmoidSample("upstream", dtype=torch.float64, weight="row"), generator)
    expected = loss.evaluate(backend, *inputs.arguments, **inputs.options).gradient
    for factor in (4.0, -0.125, 0.0):
        got = loss.evaluate(backend, *inputs.arguments, upstream=[factor], **inputs.options)
        assert torch.equal(got.gradient, factor * expected)


@LOSSES
@pytest.mark.parametrize("upstream", [torch.nan, torch.inf, -torch.inf, 3e37, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_upstream_gradients_that_are_not_finite_or_huge(backend, loss, generator, dtype, upstream):
    """As in floating-point arithmetic where an element counts, and exactly 0 elsewhere."""
    inputs = loss.draw(SigmoidSample("upstream", weight="element", dtype=dtype), generator)
    is_dropped = (inputs.options["weight"] == 0) | (inputs.arguments[1] < 0)[:, None]
    wanted = loss.truth(*inputs.arguments, **inputs.options).gradient(upstream).to(dtype).double()
    wanted = torch.where(is_dropped, 0.0, wanted)
    got = loss.evaluate(backend, *inputs.arguments, upstream=[upstream], **inputs.options).gradient.double()
    assert is_dropped.any() and torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
    assert torch.equal(got[got.isinf()], wanted[wanted.isinf()])
    finite = wanted.isfinite()
    harness.assert_within(got[finite], wanted[finite], 2e-6 * wanted[finite].abs().max() + 1e-44 if finite.any() else 0.0, "finite")


@LOSSES
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(backend, loss, generator, use_reentrant):
    arguments, options = drawn(backend, loss, generator)
    (expected,) = torch.autograd.grad(loss_of(backend, loss, arguments, options), arguments[0])

    def head(values):
        return loss_of(backend, loss, [values * 1.0, *arguments[1:]], options)

    torch.utils.checkpoint.checkpoint(head, arguments[0], use_reentrant=use_reentrant).backward()
    assert torch.equal(arguments[0].grad, expected)


def test_levels_that_are_not_used_have_a_gradient_of_0(backend, generator):
    """reduction="none" returns a loss per level, of which a caller may drop some."""
    levels = [torch.randn((rows, 3), generator=generator).to(backend.device).requires_grad_() for rows in (4, 5)]
    labels = [torch.randint(0, 4, (rows,), generator=generator).to(backend.device) for rows in (4, 5)]
    with use_backend(backend.name):
        losses = sigmoid_focal_loss(levels, labels)
    first, second = torch.autograd.grad(losses[1].sum(), levels, allow_unused=True, retain_graph=True)
    assert (first is None or not first.any()) and second.all()
    frozen = [levels[0], levels[1].detach()]
    with use_backend(backend.name):
        sum(part.sum() for part in sigmoid_focal_loss(frozen, labels)).backward()
    assert levels[0].grad.all() and levels[1].grad is None


def test_after_a_layer_under_autocast(backend, generator):
    layer = torch.nn.Conv2d(8, 10, 1).to(backend.device)
    features = torch.randn((2, 8, 5, 6), generator=generator).to(backend.device)
    labels = torch.randint(0, 6, (2, 60), generator=generator).to(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        logits = layer(features)
        value = loss_of(backend, FOCAL, [logits, labels], {"layout": "anchor_major", "num_classes": 5})
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    value.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()
