"""GHM-C and GHM-R inside autograd: repeated and refused backwards, modes, AMP, memory held for backward, the backend's choice."""

import harness
import pytest
import torch
import torch.utils.checkpoint
from ghm_samples import CLASSIFICATION, GHM_LOSSES, GHMSample
from rsloss_kernels import use_backend

LOSSES = pytest.mark.parametrize("loss", GHM_LOSSES.values(), ids=GHM_LOSSES)
FORMS = pytest.mark.parametrize(
    "loss, form",
    [pytest.param(loss, form, id=f"{loss.name}-{form}") for loss in GHM_LOSSES.values() for form in ("dense", "soft", "index")
     if form == "dense" or not loss.is_regression],
)  # fmt: skip


def drawn(backend, loss, generator, **description):
    """Logits that require grad, then the other arguments, on the backend's device."""
    inputs = loss.draw(GHMSample("autograd", **{"weight": "element", **description}), generator)
    pred, *others = (value.to(backend.device) for value in inputs.arguments)
    return pred.requires_grad_(), *others


def loss_of(backend, loss, *arguments, **options):
    with use_backend(backend.name):
        return loss.function(*arguments, **options)


@FORMS
def test_second_backward_is_the_same(backend, loss, generator, form):
    arguments = drawn(backend, loss, generator, form=form)
    value = loss_of(backend, loss, *arguments)
    first, second = (torch.autograd.grad(value, arguments[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
    value.backward()
    loss_of(backend, loss, *arguments).backward()
    assert torch.equal(arguments[0].grad, first + second)


@FORMS
def test_inputs_are_not_written(backend, loss, generator, form):
    arguments = drawn(backend, loss, generator, form=form)
    state = [torch.ones(10, dtype=torch.float64, device=backend.device), torch.ones(10, dtype=torch.int64, device=backend.device)]
    everything = [*arguments, *state]
    before = [(value.detach().clone(), value._version) for value in everything]
    got = loss_of(backend, loss, *arguments, momentum=0.5, acc_sum=state[0], num_updates=state[1])
    (3 * got.loss).backward()
    for value, (content, version) in zip(everything, before, strict=True):
        assert value._version == version and torch.equal(value.detach(), content)


@LOSSES
def test_editing_the_logits_before_backward_is_refused(backend, loss, generator):
    pred, *others = drawn(backend, loss, generator)
    inner = pred * 1
    value = loss_of(backend, loss, inner, *others)
    with torch.no_grad():
        inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@LOSSES
def test_the_state_may_be_edited_before_backward(backend, loss, generator):
    """A module stores the new state in the tensor that the operator got."""
    arguments = drawn(backend, loss, generator)
    acc_sum = torch.ones(10, dtype=torch.float64, device=backend.device)
    expected = loss.evaluate(backend, *arguments, momentum=0.5, acc_sum=acc_sum.clone()).gradient
    got = loss_of(backend, loss, *arguments, momentum=0.5, acc_sum=acc_sum)
    acc_sum.copy_(got.acc_sum).mul_(5)
    got.acc_sum.zero_()
    got.loss.backward()
    assert torch.equal(arguments[0].grad.cpu(), expected)


@LOSSES
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_results_do_not_alias_inputs(backend, loss, generator, momentum):
    arguments = drawn(backend, loss, generator)
    state = {
        "acc_sum": torch.ones(10, dtype=torch.float64, device=backend.device),
        "num_updates": torch.ones(10, dtype=torch.int64, device=backend.device),
    }
    for weight in (arguments[2], torch.zeros_like(arguments[2])):
        returned = loss_of(backend, loss, *arguments[:2], weight, momentum=momentum, **state)
        (gradient,) = torch.autograd.grad(returned.loss, arguments[0])
        everything = [*returned, gradient, *arguments, *state.values()]
        assert len({value.untyped_storage().data_ptr() for value in everything}) == len(everything)
        assert not returned.acc_sum.requires_grad and not returned.num_updates.requires_grad


@LOSSES
def test_double_backward_is_refused_clearly(backend, loss, generator):
    pred, *others = drawn(backend, loss, generator)
    (gradient,) = torch.autograd.grad(loss_of(backend, loss, pred, *others), pred, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@FORMS
def test_other_arguments_get_no_gradient(backend, loss, generator, form):
    pred, *others = drawn(backend, loss, generator, form=form)
    floating = [value.requires_grad_() for value in others if value.is_floating_point()]
    acc_sum = torch.ones(10, dtype=torch.float64, device=backend.device, requires_grad=True)
    loss_of(backend, loss, pred, *others, momentum=0.5, acc_sum=acc_sum).loss.backward()
    assert pred.grad.any() and acc_sum.grad is None and all(value.grad is None for value in floating)
    assert not loss_of(backend, loss, pred.detach(), *others).requires_grad


@LOSSES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients(backend, loss, generator, mode):
    arguments = drawn(backend, loss, generator)
    expected = loss_of(backend, loss, *arguments).item()
    with mode():
        values = [loss_of(backend, loss, *arguments), loss_of(backend, loss, arguments[0] * 1, *arguments[1:])]
    for value in (*values, loss_of(backend, loss, arguments[0].detach(), *arguments[1:])):
        assert value.item() == expected and not value.requires_grad


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, loss, generator, dtype):
    """A cast would hand the operator a float32 copy of 16-bit logits, or 16-bit copies of float32 ones."""
    for pred_dtype in (torch.float32, dtype, torch.float64):
        arguments = drawn(backend, loss, generator, dtype=pred_dtype)
        expected = loss_of(backend, loss, *arguments)
        (gradient,) = torch.autograd.grad(expected, arguments[0])
        with torch.autocast(backend.device, dtype):
            got = loss_of(backend, loss, *arguments)
        assert torch.equal(got, expected) and got.dtype == expected.dtype
        (under_autocast,) = torch.autograd.grad(got, arguments[0])
        assert under_autocast.dtype == pred_dtype and torch.equal(under_autocast, gradient)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradient_scaler(backend, loss, generator, dtype):
    """A scale of 2^16 is exact, and a NaN logit makes the scaler skip the step."""
    arguments = drawn(backend, loss, generator, dtype=dtype, weight=None)
    plain = loss.evaluate(backend, *arguments).gradient
    scaled = loss.evaluate(backend, *arguments, upstream=[65536.0]).gradient
    is_normal = plain.abs() > 2**-10 if dtype == torch.float16 else torch.ones_like(plain, dtype=torch.bool)
    is_normal &= scaled.isfinite()
    assert is_normal.any() or dtype == torch.float16
    assert torch.equal(scaled[is_normal], plain[is_normal] * 65536)
    broken = arguments[0].detach().clone()
    broken[3, 1] = torch.nan
    weight = torch.nn.Parameter(torch.ones((), device=backend.device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler(backend.device, init_scale=65536.0)
    scaler.scale(loss_of(backend, loss, broken * weight, *arguments[1:])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == 1 and scaler.get_scale() == 32768


@FORMS
@pytest.mark.slow_interpreter
def test_memory_held_for_backward(backend, loss, generator, form):
    """The caller's own tensors and a number per bin."""
    arguments = drawn(backend, loss, generator, form=form, rows=5000, bins=256)
    storages = {}

    def pack(value):
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        value = loss_of(backend, loss, *arguments, bins=256)
    for argument in arguments:
        assert storages.pop(argument.untyped_storage().data_ptr()) == argument.numel() * argument.element_size()
    assert value.requires_grad and sum(storages.values()) <= 256 * 8


def test_expanded_weights_of_rows_are_not_copied(backend, generator):
    logits, target, rows = drawn(backend, CLASSIFICATION, generator, weight="row")
    addresses = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: addresses.add(value.data_ptr()), lambda value: value):
        value = loss_of(backend, CLASSIFICATION, logits, target, rows[:, None].expand(logits.shape))
    assert rows.data_ptr() in addresses
    assert value == loss_of(backend, CLASSIFICATION, logits, target, rows[:, None].repeat(1, logits.shape[1]))


@LOSSES
def test_backward_runs_on_the_backend_of_forward(backend, loss, generator):
    """Backward may run on another thread and after `use_backend` has ended."""
    arguments = drawn(backend, loss, generator)
    value = loss_of(backend, loss, *arguments)
    assert harness.operators_of_backward(value) == [f"ghm_backward.{backend.name}"]
    assert torch.equal(arguments[0].grad.cpu(), loss.evaluate(backend, *arguments).gradient)


@FORMS
def test_upstream_gradient_scales(backend, loss, generator, form):
    arguments = drawn(backend, loss, generator, form=form, dtype=torch.float64)
    expected = loss.evaluate(backend, *arguments).gradient
    for factor in (4.0, -0.125, 0.0):
        assert torch.equal(loss.evaluate(backend, *arguments, upstream=[factor]).gradient, factor * expected)
    truth = loss.truth(*(value.detach().cpu() for value in arguments)).gradient(1.7)
    harness.assert_gradient(backend, loss.evaluate(backend, *arguments, upstream=[1.7]).gradient, truth)


@LOSSES
@pytest.mark.parametrize("upstream", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_upstream_gradients_that_are_not_finite_or_huge(backend, loss, generator, dtype, upstream):
    """As in floating-point arithmetic where an element is valid, and exactly 0 elsewhere."""
    arguments = loss.draw(GHMSample("upstream", weight="element", dtype=dtype), generator).arguments
    wanted = torch.where(arguments[2] > 0, loss.truth(*arguments).gradient(upstream), 0.0).to(dtype).double()
    got = loss.evaluate(backend, *arguments, upstream=[upstream]).gradient.double()
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
    assert torch.equal(got[got.isinf()], wanted[wanted.isinf()])
    finite = wanted.isfinite()
    harness.assert_within(got[finite], wanted[finite], 2e-6 * wanted[finite].abs() + 1e-44, "finite entries")


@LOSSES
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(backend, loss, generator, use_reentrant):
    pred, *others = drawn(backend, loss, generator)
    expected = loss.evaluate(backend, pred, *others).gradient

    def head(values):
        return loss_of(backend, loss, values * 1.0, *others)

    torch.utils.checkpoint.checkpoint(head, pred, use_reentrant=use_reentrant).backward()
    assert torch.equal(pred.grad.cpu(), expected)


def test_after_a_layer_under_autocast(backend, generator):
    layer = torch.nn.Linear(8, 5).to(backend.device)
    features = torch.randn((30, 8), generator=generator).to(backend.device)
    labels = torch.randint(0, 6, (30,), generator=generator).to(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        logits = layer(features)
        value = loss_of(backend, CLASSIFICATION, logits, labels)
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    value.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()
