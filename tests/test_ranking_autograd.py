"""Ranking losses inside autograd: repeated and refused backwards, modes, AMP, memory held for backward, the module, the backend's choice."""
import concurrent.futures
import copy
import pickle

import harness
import pytest
import torch
import torch.utils.checkpoint
from harness import assert_within
from rsloss_kernels import use_backend
from samples import RankingSample


def drawn(backend, loss, generator, **description):
    """Logits that require grad, then the other arguments, on the backend's device."""
    inputs = loss.draw(RankingSample("autograd", **{"positives": 20, "negatives": 200, **description}), generator)
    logits, *others = (value.to(backend.device) for value in inputs.arguments)
    return logits.requires_grad_(), *others


def numbers(losses) -> list[float]:
    return [loss.item() for loss in losses]


def losses_of(backend, loss, *arguments, **options):
    with use_backend(backend.name):
        return harness.losses_in(loss.function(*arguments, **options))


@pytest.mark.parametrize("form", ["dense", "index"])
def test_second_backward_is_the_same(backend, loss, generator, form):
    arguments = drawn(backend, loss, generator, form=form)
    total = sum(losses_of(backend, loss, *arguments))
    first, second = (torch.autograd.grad(total, arguments[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
    total.backward()
    total = sum(losses_of(backend, loss, *arguments))
    total.backward()
    assert torch.equal(arguments[0].grad, first + second)


def test_losses_backward_one_after_the_other(backend, loss, generator):
    arguments = drawn(backend, loss, generator, dtype=torch.float64)
    losses = losses_of(backend, loss, *arguments)
    assert len(losses) == loss.num_losses
    parts = [torch.autograd.grad(value, arguments[0], retain_graph=True)[0] for value in losses]
    assert all(part.any() for part in parts)
    together = loss.evaluate(backend, arguments[0], *arguments[1:]).gradient.to(parts[0].device)
    torch.testing.assert_close(sum(parts), together, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("form", ["dense", "index"])
def test_inputs_are_not_written(backend, loss, generator, form):
    arguments = drawn(backend, loss, generator, form=form)
    before = [(value.detach().clone(), value._version) for value in arguments]
    (3 * sum(losses_of(backend, loss, *arguments))).backward()
    for value, (content, version) in zip(arguments, before, strict=True):
        assert value._version == version and torch.equal(value.detach(), content)


def test_editing_the_logits_before_backward_is_refused(backend, loss, generator):
    logits, *others = drawn(backend, loss, generator)
    inner = logits * 1
    total = sum(losses_of(backend, loss, inner, *others))
    with torch.no_grad():
        inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_results_do_not_alias_inputs(backend, loss, generator):
    arguments = drawn(backend, loss, generator)
    with use_backend(backend.name):
        returned = loss.function(*arguments)
    returned = [returned] if isinstance(returned, torch.Tensor) else [*returned]
    (gradient,) = torch.autograd.grad(sum(returned[: loss.num_losses]), arguments[0])
    everything = [*returned, gradient, *arguments]
    assert len({value.untyped_storage().data_ptr() for value in everything}) == len(everything)


def test_graph_names_the_loss_and_the_backend(backend, loss, generator):
    losses = losses_of(backend, loss, *drawn(backend, loss, generator))
    wanted = f"{loss.finalize.removesuffix('_finalize')}_{backend.name}Backward"
    assert [value.grad_fn.name() for value in losses] == [wanted] * loss.num_losses


def test_double_backward_is_refused_clearly(backend, loss, generator):
    logits, *others = drawn(backend, loss, generator)
    losses = losses_of(backend, loss, logits, *others)
    (gradient,) = torch.autograd.grad(sum(losses), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("form", ["dense", "index"])
def test_other_arguments_get_no_gradient(backend, loss, generator, form):
    logits, *others = drawn(backend, loss, generator, form=form)
    floating = [value.requires_grad_() for value in others if value.is_floating_point()]
    sum(losses_of(backend, loss, logits, *others)).backward()
    assert logits.grad.any() and all(value.grad is None for value in floating)
    assert not any(value.requires_grad for value in losses_of(backend, loss, logits.detach(), *others))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients(backend, loss, generator, mode):
    arguments = drawn(backend, loss, generator, form="index")
    expected = numbers(losses_of(backend, loss, *arguments))
    with mode():
        losses = losses_of(backend, loss, *arguments)
        assert not any(value.requires_grad for value in losses)
        inside = losses_of(backend, loss, arguments[0] * 1, *arguments[1:])
    for values in (losses, inside, losses_of(backend, loss, arguments[0].detach(), *arguments[1:])):
        assert numbers(values) == expected
        assert not any(value.requires_grad for value in values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, loss, generator, dtype):
    """A cast would hand the operator a float32 copy of 16-bit logits, or 16-bit copies of float32 ones."""
    for logits_dtype in (torch.float32, dtype, torch.float64):
        arguments = drawn(backend, loss, generator, dtype=logits_dtype)
        expected = losses_of(backend, loss, *arguments)
        (gradient,) = torch.autograd.grad(sum(expected), arguments[0])
        with torch.autocast(backend.device, dtype):
            got = losses_of(backend, loss, *arguments)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))
        (under_autocast,) = torch.autograd.grad(sum(got), arguments[0])
        assert under_autocast.dtype == logits_dtype and torch.equal(under_autocast, gradient)


def test_after_a_layer_under_autocast(backend, loss, generator):
    layer = torch.nn.Linear(8, 5).to(backend.device)
    features = torch.randn((30, 8), generator=generator).to(backend.device)
    labels = torch.randint(0, 6, (30,), generator=generator).to(backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        logits = layer(features)
        losses = losses_of(backend, loss, *loss.arguments(logits, labels))
    assert logits.dtype == torch.bfloat16 and all(value.dtype == torch.float32 for value in losses)
    sum(losses).backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradient_scaler(backend, loss, generator, dtype):
    """A scale of 2^16 is exact, keeps tiny 16-bit gradients, and a NaN logit makes the scaler skip the step."""
    arguments = drawn(backend, loss, generator, dtype=dtype)
    plain = loss.evaluate(backend, *arguments).gradient
    scaled = loss.evaluate(backend, *arguments, upstream=[65536.0] * loss.num_losses).gradient
    kept = plain.abs() > 2**-10
    if dtype != torch.float16:
        assert torch.equal(scaled, plain * 65536)
    else:
        assert kept.any() and torch.equal(scaled[kept], plain[kept] * 65536)
    assert int((scaled != 0).sum()) >= int((plain != 0).sum())
    broken = arguments[0].detach().clone()
    broken[(arguments[1] == 0).nonzero()[0]] = torch.nan
    weight = torch.nn.Parameter(torch.ones((), device=backend.device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler(backend.device, init_scale=65536.0)
    scaler.scale(sum(losses_of(backend, loss, broken * weight, *arguments[1:]))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == 1 and scaler.get_scale() == 32768


@pytest.mark.parametrize("form", ["dense", "index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.slow_interpreter
def test_memory_held_for_backward(backend, loss, generator, form, dtype):
    """The logits themselves, a bit per element, a few numbers per positive; no copy of the logits, no targets."""
    positives, elements = 300, 400_000
    rows = elements // (1 if form == "dense" else 4)
    arguments = drawn(backend, loss, generator, form=form, positives=positives, negatives=rows, dtype=dtype)
    storages = {}

    def pack(value):
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        losses = losses_of(backend, loss, *arguments, max_positives=positives)
    logits = arguments[0]
    assert storages.pop(logits.untyped_storage().data_ptr()) == logits.numel() * logits.element_size()
    assert losses[0].requires_grad
    # GPU kernels on the CPU have a GPU's default capacity for class indices: the rows.
    slots = arguments[1].numel() if backend.is_slow and form == "index" else positives
    assert sum(storages.values()) <= logits.numel() / 8 + 600 * slots + 2**20


def test_backward_runs_on_the_backend_of_forward(backend, loss, generator):
    """Backward may run on another thread and after `use_backend` has ended."""
    arguments = drawn(backend, loss, generator)
    total = sum(losses_of(backend, loss, *arguments))
    assert harness.operators_of_backward(total) == [f"ranking_backward.{backend.name}"]
    expected = loss.evaluate(backend, *arguments).gradient
    assert torch.equal(arguments[0].grad.cpu(), expected)


@pytest.mark.slow_interpreter  # and confined to one thread: it patches the globals of triton.language
def test_calls_from_many_threads(backend, loss, generator):
    inputs = [loss.draw(RankingSample("threads", 10 + i, 300), generator).arguments for i in range(4)]
    expected = [loss.evaluate(backend, *one) for one in inputs]

    def run(one):
        leaf, *others = (value.clone().to(backend.device) for value in one)
        losses = harness.losses_in(loss.function(leaf.requires_grad_(), *others))
        sum(losses).backward()
        return numbers(losses), leaf.grad.cpu()

    with use_backend(backend.name), concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, inputs * 3))
    for (losses, gradient), wanted in zip(results, expected * 3, strict=True):
        assert losses == numbers(wanted.losses)
        assert torch.equal(gradient, wanted.gradient)


# --- the module ---


def test_module_is_the_function_with_a_weight(backend, loss, generator):
    arguments = drawn(backend, loss, generator, form="index", background="first", dtype=torch.float64)
    module = loss.module(delta=0.25, background="first", loss_weight=4.0)
    with use_backend(backend.name):
        returned = module(*arguments), loss.function(*arguments, delta=0.25, background="first")
    assert type(returned[0]) is type(returned[1])
    got, expected = map(harness.losses_in, returned)
    assert numbers(got) == [4 * value for value in numbers(expected)]
    (gradient,) = torch.autograd.grad(sum(got), arguments[0])
    (wanted,) = torch.autograd.grad(sum(expected), arguments[0])
    assert torch.equal(gradient, 4 * wanted)
    if not isinstance(returned[0], torch.Tensor):
        statistics = (one[loss.num_losses :] for one in returned)
        assert all(torch.equal(weighted, plain) for weighted, plain in zip(*statistics, strict=True))


def test_module_has_no_state_and_says_what_it_is(loss):
    module = loss.module(delta=0.25, background="first", loss_weight=2.0)
    assert not module.state_dict() and not list(module.parameters()) and not list(module.buffers())
    assert repr(module).startswith(loss.module.__name__ + "(delta=0.25, ")
    assert "background='first'" in repr(module) and repr(module).endswith("loss_weight=2.0)")
    assert repr(pickle.loads(pickle.dumps(module))) == repr(copy.deepcopy(module)) == repr(module)
    assert loss.module().delta == loss.delta and loss.module().background == "last"


@pytest.mark.parametrize("upstream", [(torch.nan, 1.0), (torch.inf, 1.0), (-torch.inf, 0.0), (3e38, 1.0), (1.0, torch.nan), (1e-40, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_upstream_gradients_that_are_not_finite_or_huge(backend, loss, generator, dtype, upstream):
    """A GradScaler and a broken loss send them; products are as in floating-point arithmetic, and nothing is read out of bounds."""
    upstream = upstream[: loss.num_losses]
    inputs = loss.draw(RankingSample("upstream", 60, 500, 30, dtype=dtype), generator)
    elements = loss.read(*inputs.arguments)
    first, *second = loss.truth(*inputs.arguments, **inputs.options).gradients
    # Negatives have no gradient of the second loss, and ignored elements none at all.
    wanted = first * upstream[0]
    if second:
        wanted = torch.where(elements.is_positive, wanted + second[0] * upstream[1], wanted)
    wanted = torch.where(elements.is_positive | elements.is_negative, wanted, 0.0).to(dtype).double()
    got = loss.evaluate(backend, *inputs.arguments, upstream=upstream, **inputs.options).gradient.double()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    largest = wanted[finite].abs().amax() if finite.any() else torch.tensor(0.0)
    assert_within(got[finite], wanted[finite], 1e-6 * largest + 1e-44, "finite entries")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(backend, loss, generator, use_reentrant):
    logits, *others = drawn(backend, loss, generator)
    expected = loss.evaluate(backend, logits, *others).gradient

    def head(values):
        return sum(losses_of(backend, loss, values * 1.0, *others))

    torch.utils.checkpoint.checkpoint(head, logits, use_reentrant=use_reentrant).backward()
    assert torch.equal(logits.grad.cpu(), expected)


def test_hooks_on_saved_tensors_see_autograd(backend, loss, generator):
    logits, *others = drawn(backend, loss, generator)
    seen = []

    def unpack(value):
        with torch.enable_grad():
            seen.append((torch.ones(1, requires_grad=True) * 2).requires_grad)
        return value

    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, unpack):
        total = sum(losses_of(backend, loss, logits, *others))
    total.backward()
    assert seen and all(seen)
