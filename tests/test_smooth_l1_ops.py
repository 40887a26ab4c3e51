"""Smooth L1 loss inside autograd, compilers and CUDA graphs' rules; what it refuses."""
import copy
import importlib.util
import itertools
import os

import harness
import pytest
import torch
from rsloss_kernels import DynamicSmoothL1Loss, _library, smooth_l1_loss, use_backend
from smooth_l1_samples import OPERATORS, Inputs, draw, evaluate
from torch._dynamo.testing import CompileCounterWithBackend


def on(backend, inputs: Inputs):
    """Prediction that requires grad, target, beta, weight."""
    values = (inputs.pred, inputs.target, inputs.beta, inputs.weight)
    pred, *others = (value.to(backend.device) if isinstance(value, torch.Tensor) else value for value in values)
    return pred.detach().requires_grad_(), *others


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_again_and_no_second_derivative(backend, generator, reduction):
    pred, *others = on(backend, draw(generator, weight="row"))
    with use_backend(backend.name):
        value = smooth_l1_loss(pred, *others, reduction=reduction).sum()
    first, second = (torch.autograd.grad(value, pred, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()
    (gradient,) = torch.autograd.grad(value, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_inputs_are_left_alone_and_get_no_gradient(backend, generator):
    arguments = on(backend, draw(generator, beta=torch.tensor(0.3), weight="element"))
    for value in arguments[1:]:
        value.requires_grad_()
    before = [(value.detach().clone(), value._version) for value in arguments]
    with use_backend(backend.name):
        smooth_l1_loss(*arguments, avg_factor=torch.tensor(2.0, device=backend.device)).backward()
    assert arguments[0].grad.any() and all(value.grad is None for value in arguments[1:])
    for value, (content, version) in zip(arguments, before, strict=True):
        assert value._version == version and torch.equal(value.detach(), content)
    with use_backend(backend.name), torch.no_grad():
        assert not smooth_l1_loss(*arguments).requires_grad


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_editing_an_argument_before_backward_is_refused(backend, generator, place):
    arguments = list(on(backend, draw(generator, beta=torch.tensor(0.3), weight="element")))
    arguments[0] = arguments[0] * 1
    with use_backend(backend.name):
        value = smooth_l1_loss(*arguments)
    with torch.no_grad():
        arguments[place].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, generator, dtype):
    for pred_dtype in (torch.float32, dtype):
        pred, *others = on(backend, draw(generator, dtype=pred_dtype))
        results = []
        for enabled in (False, True):
            with torch.autocast(backend.device, dtype, enabled=enabled), use_backend(backend.name):
                value = smooth_l1_loss(pred, *others)
            results.append((value, *torch.autograd.grad(value, pred)))
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_backward_runs_on_the_backend_of_forward(backend, generator):
    inputs = draw(generator, weight="row")
    pred, *others = on(backend, inputs)
    with use_backend(backend.name):
        value = smooth_l1_loss(pred, *others)
    assert harness.operators_of_backward(value) == [f"smooth_l1_backward.{backend.name}"]
    assert torch.equal(pred.grad.cpu(), evaluate(backend, inputs).gradient)


def test_opcheck(backend, generator):
    """With everything in forward, with as little as possible for single losses."""
    forward, elements, backward = (_library.operator(name, backend.name) for name in OPERATORS)
    pred, target, _, weight = on(backend, draw(generator, (7, 3), weight="row", dtype=torch.float64))
    number = torch.tensor(0.3, device=backend.device)
    arguments = (pred, target, weight, number, number)
    for function, args in ((forward, (*arguments, 0.0, 1.5)), (elements, (pred, target, None, None, None, 0.4, 1.0))):
        assert set(torch.library.opcheck(function, args).values()) == {"SUCCESS"}
    pred = pred.detach()
    assert set(torch.library.opcheck(backward, (pred, *arguments[1:], number, 0.0, 1.5)).values()) == {"SUCCESS"}


def compiled_frames(backend, generator, numbers: list) -> list[int]:
    """Graphs so far after a call with each beta, with other numbers of rows, the results of which are those without a compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(smooth_l1_loss, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for rows, beta in zip((30, 44, 61), numbers, strict=True):
        pred, target, _, weight = on(backend, draw(generator, (rows, 4), weight="row"))
        with use_backend(backend.name):
            results = []
            for function in (smooth_l1_loss, compiled):
                value = function(pred, target, beta, weight, avg_factor=float(rows))
                results.append((value.detach(), *torch.autograd.grad(value, pred)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-12)
        frames.append(counter.frame_count)
    return frames


def test_one_graph_for_all_shapes_and_betas_on_the_device(backend, generator):
    betas = [torch.tensor(beta, device=backend.device) for beta in (0.3, 0.7, 0.45)]
    frames = compiled_frames(backend, generator, betas)
    # The number of rows divides too: a constant of the first graph, a variable of the second.
    assert frames[0] > 0 and frames[1] == frames[2] <= 2 * frames[0]


def test_one_graph_for_all_numbers(generator):
    frames = compiled_frames(harness.Backend("reference", "cpu"), generator, [0.3, 0.7, 0.45])
    assert frames[0] > 0 and frames[1] == frames[2] <= 2 * frames[0]


def test_modules_keep_their_beta_for_backward(backend, generator):
    """An update between forward and backward, the place where it is published, changes neither."""
    inputs = draw(generator, (20, 4), beta=1.0)
    module = DynamicSmoothL1Loss(update_iter_interval=1).to(backend.device)
    pred, target, _, _ = on(backend, inputs)
    with use_backend(backend.name):
        value = module(pred, target)
        module.update(target * 0.1)
        assert module.beta < 1
        value.backward()
    assert torch.equal(pred.grad.cpu(), evaluate(backend, inputs).gradient)


def good() -> dict:
    return {"pred": torch.ones(3, 4), "target": torch.zeros(3, 4), "beta": 0.5, "weight": torch.ones(3)}


BETA = "0 or within [1e-30, 1e30]"
# (argument, bad value, exception, what was wanted, what was got)
FAULTS = [
    ("pred", [1.0], TypeError, "a Tensor", "list"),
    ("pred", torch.ones(3, 4).long(), TypeError, "floating dtype", "torch.int64"),
    ("pred", torch.ones(3, 4).to_sparse(), TypeError, "strided", "sparse"),
    ("target", None, TypeError, "a Tensor", "NoneType"),
    ("target", torch.zeros(3, 4, dtype=torch.complex64), TypeError, "real", "complex64"),
    ("target", torch.zeros(3), ValueError, "the shape of pred, [3, 4]", "[3]"),
    ("target", torch.zeros(3, 4, device="meta"), ValueError, "the device of pred, cpu", "meta"),
    ("weight", torch.ones(4), ValueError, "the shape of pred or that less the last dimension, [3], [3, 4]", "[4]"),
    ("weight", 2.0, TypeError, "a Tensor", "float"),
    ("weight", torch.ones(3, device="meta"), ValueError, "the device of pred, cpu", "meta"),
    ("beta", "1", TypeError, "a number or a Tensor", "str"),
    ("beta", True, TypeError, "a number or a Tensor", "bool"),
    ("beta", -1.0, ValueError, BETA, "-1.0"),
    ("beta", float("nan"), ValueError, BETA, "nan"),
    ("beta", 1e-31, ValueError, BETA, "1e-31"),
    ("beta", torch.ones(2), ValueError, "a floating Tensor of one number", "[2]"),
    ("beta", torch.tensor(1), ValueError, "a floating Tensor of one number", "torch.int64"),
    ("beta", torch.ones((), device="meta"), ValueError, "the device of pred, cpu", "meta"),
    ("reduction", "max", ValueError, "one of 'none', 'mean', 'sum'", "'max'"),
    ("avg_factor", "3", TypeError, "a number or a Tensor", "str"),
    ("avg_factor", torch.ones(2), ValueError, "a number or a Tensor of one number", "[2]"),
]


@pytest.mark.parametrize("argument, value, error, wanted, got", FAULTS)
def test_bad_input(argument, value, error, wanted, got):
    with pytest.raises(error) as raised:
        smooth_l1_loss(**{**good(), argument: value})
    message = str(raised.value)
    assert message.startswith(f"smooth_l1_loss: {argument} must be ") or message.startswith(f"smooth_l1_loss: {argument} must have ")
    before, after = message.split("got", 1)
    assert wanted in before and got in after


def test_weights_of_one_row_need_rows():
    with pytest.raises(ValueError, match=r"weight must have the shape of pred, \[4\], got \[\]"):
        smooth_l1_loss(torch.ones(4), torch.ones(4), 1.0, torch.ones(()))


@pytest.mark.parametrize("beta", [-1.0, float("nan"), 1e-31, 2e30])
def test_debug_checks_read_beta(monkeypatch, beta):
    monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
    with pytest.raises(ValueError, match="smooth_l1_loss: beta must be 0 or within"):
        smooth_l1_loss(**{**good(), "beta": torch.tensor(beta, dtype=torch.float64)})
    smooth_l1_loss(**{**good(), "beta": torch.tensor(0.0)})


@pytest.mark.parametrize("environment", [os.environ, {}], ids=["of_the_process", "plain"])
def test_debug_checks_are_switched_while_running(monkeypatch, environment):
    """Whatever `os.environ` keeps its variables in."""
    monkeypatch.setattr(os, "environ", environment)
    spec = importlib.util.find_spec("rsloss_kernels._checks")
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    for value, wanted in (("1", True), ("0", False)):
        monkeypatch.setitem(environment, "RSLOSS_DEBUG_CHECKS", value)
        assert checks.debug_checks() is wanted
    monkeypatch.delitem(environment, "RSLOSS_DEBUG_CHECKS")
    assert not checks.debug_checks()


OPERATOR_FAULTS = {
    "pred": (torch.ones(3, 4).long(), torch.ones(4, 3).t()),
    "target": (torch.ones(3, 4).long(), torch.ones(3), torch.ones(4, 3).t(), torch.ones(3, 5)),
    "weight": (torch.ones(4), torch.ones(3).bool(), torch.ones(3, 1), torch.ones(6)[::2]),
    "beta": (torch.ones(1), torch.tensor(1)),
    "normalizer": (torch.ones(1), torch.tensor(1)),
    "fixed_beta": (-1.0, float("nan"), 1e-31, 2e30),
    "grad": (torch.ones(3), torch.tensor(1), torch.ones(4, 3).t()),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_check_for_themselves(backend, name):
    """Whatever calls them, no address comes of a wrong shape, dtype or stride."""
    arguments = {
        **{"pred": torch.ones(3, 4), "target": torch.ones(3, 4), "weight": torch.ones(3)},
        **{"beta": None, "normalizer": None, "grad": torch.ones(()), "fixed_beta": 1.0, "scale": 1.0},
    }
    if not name.endswith("backward"):
        del arguments["grad"]
    moved = {key: value.to(backend.device) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    operator = _library.operator(name, backend.name)
    operator(*moved.values())
    for argument, value in itertools.chain(*([(key, value) for value in OPERATOR_FAULTS.get(key, ())] for key in arguments)):
        value = value.to(backend.device) if isinstance(value, torch.Tensor) else value
        with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"{name}: {argument} must"):
            operator(*copy.copy({**moved, argument: value}).values())
