"""Balanced group softmax inside autograd: repeated and refused backwards, modes, AMP, memory held for backward, its backend."""

import harness
import pytest
import torch
import torch.utils.checkpoint
from group_softmax_samples import GroupSample, call, evaluate, on_device, truth
from rsloss_kernels import GroupSoftmaxLoss, group_softmax_scores, use_backend


def drawn(backend, generator, **description):
    inputs = on_device(GroupSample("autograd", **{"weights": "random", **description}).draw(generator), backend)
    inputs.logits.requires_grad_()
    return inputs


def test_second_backward_is_the_same(backend, generator):
    inputs = drawn(backend, generator)
    losses = call(backend, inputs)
    first, second = (torch.autograd.grad(losses.sum(), inputs.logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
    losses.sum().backward()
    call(backend, inputs).sum().backward()
    assert torch.equal(inputs.logits.grad, first + second)


def test_inputs_are_not_written(backend, generator):
    inputs = drawn(backend, generator)
    everything = [inputs.logits, inputs.labels, inputs.weights, *inputs.groups.buffers()]
    before = [(value.detach().clone(), value._version) for value in everything]
    (3 * call(backend, inputs)).sum().backward()
    call(backend, inputs, others_ratio=1.0).sum().backward()
    with use_backend(backend.name):
        group_softmax_scores(inputs.logits, inputs.groups)
    for value, (content, version) in zip(everything, before, strict=True):
        assert value._version == version and torch.equal(value.detach(), content)


def test_editing_the_logits_before_backward_is_refused(backend, generator):
    inputs = drawn(backend, generator)
    inner = inputs.logits * 1
    losses = call(backend, inputs, inner)
    with torch.no_grad():
        inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_double_backward_is_refused_clearly(backend, generator):
    inputs = drawn(backend, generator)
    (gradient,) = torch.autograd.grad(call(backend, inputs).sum(), inputs.logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_each_group_has_its_own_gradient(backend, generator):
    """Dropping or scaling a loss drops or scales the gradient of its columns."""
    inputs = drawn(backend, generator, dtype=torch.float64)
    whole = evaluate(backend, inputs).gradient
    starts = inputs.groups.starts
    for group in range(inputs.groups.num_groups):
        (gradient,) = torch.autograd.grad(4 * call(backend, inputs)[group], inputs.logits)
        columns = slice(starts[group], starts[group + 1])
        assert torch.equal(gradient.cpu()[:, columns], 4 * whole[:, columns])
        gradient[:, columns] = 0
        assert not gradient.any()


def test_other_arguments_get_no_gradient(backend, generator):
    inputs = drawn(backend, generator)
    inputs.weights.requires_grad_()
    factors = torch.rand(inputs.groups.num_classes, generator=generator).to(backend.device).requires_grad_()
    call(backend, inputs, class_weights=factors).sum().backward()
    assert inputs.logits.grad.any() and inputs.weights.grad is None and factors.grad is None
    assert not call(backend, inputs, inputs.logits.detach()).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_without_gradients(backend, generator, mode):
    inputs = drawn(backend, generator)
    expected = call(backend, inputs).detach()
    with mode():
        losses = call(backend, inputs)
    assert torch.equal(losses, expected) and not losses.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, generator, dtype):
    for logits_dtype in (torch.float32, dtype, torch.float64):
        inputs = drawn(backend, generator, dtype=logits_dtype)
        expected = call(backend, inputs)
        (gradient,) = torch.autograd.grad(expected.sum(), inputs.logits)
        with torch.autocast(backend.device, dtype), use_backend(backend.name):
            got = call(backend, inputs)
            scores = group_softmax_scores(inputs.logits, inputs.groups)
        assert torch.equal(got, expected) and got.dtype == expected.dtype and scores.dtype == logits_dtype
        (under_autocast,) = torch.autograd.grad(got.sum(), inputs.logits)
        assert under_autocast.dtype == logits_dtype and torch.equal(under_autocast, gradient)


def test_a_layer_under_autocast_and_a_gradient_scaler(backend, generator):
    """A NaN logit makes the scaler skip the step."""
    inputs = drawn(backend, generator)
    layer = torch.nn.Linear(8, inputs.groups.num_logits).to(backend.device)
    features = torch.randn((len(inputs.labels), 8), generator=generator).to(backend.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(backend.device, init_scale=65536.0)
    for is_broken in (False, True):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(backend.device, torch.bfloat16):
            logits = layer(features * (torch.nan if is_broken else 1.0))
            losses = call(backend, inputs, logits)
        assert logits.dtype == torch.bfloat16 and losses.dtype == torch.float32
        scaler.scale(losses.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) == is_broken
    assert scaler.get_scale() == 32768


@pytest.mark.slow_interpreter
def test_memory_held_for_backward(backend, generator):
    """The logits, which are the caller's, and a few numbers per row and group."""
    inputs = drawn(backend, generator, rows=300, sizes=(100, 100))
    storages = {}

    def pack(value):
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        losses = call(backend, inputs)
    assert losses.requires_grad
    assert storages.pop(inputs.logits.untyped_storage().data_ptr()) == inputs.logits.nbytes
    assert sum(storages.values()) <= 300 * (8 + 3 * 4) + 201 * 4 + 64


def test_backward_runs_on_the_backend_of_forward(backend, generator):
    """Backward may run on another thread and after `use_backend` has ended."""
    inputs = drawn(backend, generator)
    losses = call(backend, inputs)
    assert harness.operators_of_backward(losses.sum()) == [f"group_softmax_backward.{backend.name}"]
    assert torch.equal(inputs.logits.grad.cpu(), evaluate(backend, inputs).gradient)


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf, 3e38, 1e-40])
def test_upstream_gradients_that_are_not_finite_or_huge(backend, generator, upstream):
    """As in floating-point arithmetic where the weight is not 0, and exactly 0 elsewhere."""
    inputs = drawn(backend, generator, rows=12, sizes=(5, 4))
    groups = len(inputs.layout)
    got = evaluate(backend, inputs, [upstream] * groups).gradient.double()
    slopes = truth(inputs).gradient()
    wanted = torch.where(slopes != 0, slopes * torch.tensor(upstream, dtype=torch.float32).double(), 0.0)
    if upstream in (3e38, 1e-40):
        harness.assert_within(got, wanted, 2e-6 * wanted.abs() + 1e-44, "huge and tiny")
    else:
        assert torch.equal(got.isfinite(), slopes == 0) and not got[slopes == 0].any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(backend, generator, use_reentrant):
    inputs = drawn(backend, generator)
    expected = evaluate(backend, inputs).gradient
    head = torch.utils.checkpoint.checkpoint(
        lambda values: call(backend, inputs, values * 1.0).sum(), inputs.logits, use_reentrant=use_reentrant
    )
    head.backward()
    assert torch.equal(inputs.logits.grad.cpu(), expected)


def test_logits_that_are_not_contiguous(backend, generator):
    """Every other column of a wider tensor, rows in reverse order of memory, one row for all."""
    inputs = drawn(backend, generator, rows=9)
    expected = evaluate(backend, inputs)
    wide = inputs.logits.detach().repeat_interleave(2, 1).requires_grad_()
    transposed = inputs.logits.detach().t().contiguous().requires_grad_()
    for leaf, view in ((wide, wide[:, ::2]), (transposed, transposed.t())):
        losses = call(backend, inputs, view)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        own = gradient[:, ::2] if leaf is wide else gradient.t()
        assert torch.equal(losses.detach().cpu(), torch.stack(expected.losses)) and torch.equal(own.cpu(), expected.gradient)
    one = inputs.logits[:1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(call(backend, inputs, one.expand(9, -1)).sum(), one)
    assert gradient.shape == one.shape and gradient.any()


def test_module_in_a_model(backend, generator):
    """Sum of the groups' losses times the weight, with MMDetection's arguments."""
    inputs = drawn(backend, generator, weights="ones", ignored=False, background="last")
    module = GroupSoftmaxLoss(inputs.groups, others_ratio=None, loss_weight=0.25, background="last").to(backend.device)
    weights = (torch.arange(len(inputs.labels), device=backend.device) % 4 > 0).float() * 7
    inputs.labels = torch.where(weights > 0, inputs.labels, -1)
    expected = 0.25 * call(backend, inputs, others_ratio=None)
    with use_backend(backend.name):
        for labels in (inputs.labels, inputs.labels.int()):
            total = module(inputs.logits, labels, weights, avg_factor=17.0)
            per_group = module(inputs.logits, labels, weights, reduction_override="none")
            assert torch.equal(total, expected.sum()) and torch.equal(per_group, expected)
            assert torch.equal(module(inputs.logits, labels, weights, torch.tensor(3), "mean"), total)
        total.backward()
        assert inputs.logits.grad.any() and module.get_cls_channels(inputs.groups.num_classes) == inputs.groups.num_logits
        scores = module.get_activation(inputs.logits)
        assert torch.equal(scores, group_softmax_scores(inputs.logits, inputs.groups, background="last"))
