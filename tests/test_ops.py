"""Every operator of the library on every backend under PyTorch's own checks: opcheck, torch.compile, export, fake tensors.

The operators are discovered and their arguments recorded while the public functions run on the samples, so that a new loss is
covered as soon as samples.py knows it.
"""
import copy
import pickle

import harness
import pytest
import rsloss_kernels
import torch
from ghm_samples import CLASSIFICATION, GHM, GHM_LOSSES
from group_softmax_samples import OPERATORS as OF_GROUP_SOFTMAX
from seesaw_samples import OPERATORS as OF_SEESAW
from smooth_l1_samples import OPERATORS as OF_SMOOTH_L1
from harness import Backend, assert_gates
from rsloss_kernels import _library
from samples import LOSSES, RANKING_SAMPLES, Inputs, Loss
from sigmoid_samples import EFL, FOCAL, QUALITY
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = harness.operator_names()
EVERY_LOSS = LOSSES | GHM_LOSSES | {loss.name: loss for loss in (FOCAL, QUALITY, EFL)}


def every_pair(is_kept=lambda loss, sample: True):
    """Every loss with its samples; under Triton's interpreter with the first of them, which reaches all its operators."""
    pairs = []
    for loss in EVERY_LOSS.values():
        for number, sample in enumerate(filter(lambda sample: is_kept(loss, sample), loss.operator_samples)):
            marks = [pytest.mark.slow_interpreter] if number > 0 else []
            pairs.append(pytest.param(loss, sample, id=f"{loss.name}-{sample.name}", marks=marks))
    return pytest.mark.parametrize("loss, sample", pairs)


SAMPLES = every_pair()
COMPILED_SAMPLES = every_pair(lambda loss, sample: sample.name in loss.compiled_samples)
# Options are constants of an exported program: none has one number per row.
EXPORTED_SAMPLES = every_pair(lambda loss, sample: sample.name in getattr(loss, "exported_samples", loss.compiled_samples))


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every operator of the library that runs."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == _library.NAMESPACE:
            # Tables copied, so that later in-place work cannot change them; logits without a graph.
            self.calls.append((function, pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)))
        return function(*args, **(kwargs or {}))


def arguments_on(backend: Backend, inputs: Inputs) -> tuple[torch.Tensor, list[torch.Tensor], dict]:
    """Logits, other arguments, options."""
    logits, *others = (value.to(backend.device) for value in inputs.arguments)
    return logits, others, harness.on_device(inputs.options, backend)


def record(backend: Backend, loss: Loss | GHM, sample, generator) -> list[tuple[torch._ops.OpOverload, tuple]]:
    inputs = loss.draw(sample, generator)
    logits, others, options = arguments_on(backend, inputs)
    with Recorder() as recorder, rsloss_kernels.use_backend(backend.name):
        losses = harness.losses_in(loss.function(logits.requires_grad_(), *others, **options))
        sum(losses).backward()
        loss.run_other_operators(backend, inputs)
    return recorder.calls


def differentiable(function: torch._ops.OpOverload, args: tuple) -> tuple:
    """The logits require grad where the operator has a gradient; a gradient pass has none (it refuses double backward)."""
    if function.__name__.split(".")[0].endswith(("_finalize", "_forward", "_elements")):
        return ([level.requires_grad_() for level in args[0]], *args[1:])
    return args


def test_every_operator_is_reached_by_a_sample(backend, generator):
    claimed = {name for loss in EVERY_LOSS.values() for name in loss.operators}
    # Those of group softmax, whose losses are one per group, of Seesaw loss and of smooth L1 are reached in their own files.
    elsewhere = {*OF_GROUP_SOFTMAX, *OF_SEESAW, *OF_SMOOTH_L1}
    assert claimed.isdisjoint(elsewhere) and claimed | elsewhere == set(OPERATORS)
    for loss in EVERY_LOSS.values():
        calls = record(backend, loss, loss.operator_samples[0], generator)
        wanted = [operator for operator in loss.operators if backend.name in _library.implemented_by(operator)]
        assert {str(function) for function, _ in calls} == {f"rsloss_kernels.{operator}.{backend.name}" for operator in wanted}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_all_backends_with_one_schema(operator):
    schemas = {str(_library.operator(operator, name)._schema).split("(", 1)[1] for name in _library.BACKENDS}
    assert len(schemas) == 1
    schema = _library.operator(operator, "cpp")._schema
    assert not schema.is_mutable
    assert all(result.alias_info is None for result in schema.returns)


@SAMPLES
def test_opcheck(backend, loss, generator, sample):
    for function, args in record(backend, loss, sample, generator):
        results = torch.library.opcheck(function, differentiable(function, args))
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4, f"{function}: {results}"


# --- torch.compile ---


def loss_and_gradient(function, logits, others, options):
    leaf = logits.detach().requires_grad_()
    returned = function(leaf, *others, **options)
    losses = harness.losses_in(returned)
    (gradient,) = torch.autograd.grad(sum(losses), leaf)
    statistics = () if isinstance(returned, torch.Tensor) else returned[len(losses) :]
    detached = (tuple(value.detach().cpu() for value in values) for values in (losses, statistics))
    return harness.Evaluation(next(detached), gradient.cpu(), next(detached))


def assert_true(backend, loss, got, inputs):
    truth = loss.truth(*inputs.arguments, **inputs.options)
    assert_gates(backend, got, truth.losses, truth.gradient(), narrow=loss.narrow)


@COMPILED_SAMPLES
def test_compile_once_for_all_shapes(backend, loss, generator, sample):
    """One graph, whatever the number of rows and of positives, forward and backward."""
    torch._dynamo.reset()
    rsloss_kernels._backends.look_up_reasons()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss.function, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    with rsloss_kernels.use_backend(backend.name):
        for positives, negatives in ((9, 120), (30, 64), (2, 333), (17, 1000)):
            inputs = loss.draw(sample.resized(positives, negatives), generator)
            arguments = arguments_on(backend, inputs)
            got = loss_and_gradient(compiled, *arguments)
            assert_true(backend, loss, got, inputs)
            assert got == loss_and_gradient(loss.function, *arguments)
            frames.append(counter.frame_count)
    # Tracing may start over within the first call; later calls must find its graph.
    assert frames[0] > 0 and len(set(frames)) == 1


def test_compiled_function_follows_a_change_of_backend(generator):
    """A graph of one backend must not serve a call that forces another."""
    inputs = LOSSES["rank_sort"].draw(RANKING_SAMPLES[0], generator)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(rsloss_kernels.rank_sort_loss, backend=counter, fullgraph=True)
    for name in ("reference", "cpp", "reference"):
        with rsloss_kernels.use_backend(name):
            compiled(*inputs.arguments)
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs]
    used = [{target.rsplit(".", 1)[1] for target in graph if "rsloss_kernels" in target} for graph in targets]
    assert used == [{"reference"}, {"cpp"}]


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("loss", [pytest.param(loss, id=loss.name) for loss in (*LOSSES.values(), CLASSIFICATION)])
def test_compile_a_model_with_its_loss(backend, loss, generator):
    """Through the default compiler, with layers before and arithmetic after the loss."""
    torch._dynamo.reset()
    layer = torch.nn.Linear(6, 5).to(backend.device)
    module = loss.module()

    def step(features, labels, *third):
        return sum(harness.losses_in(module(layer(features).relu(), labels, *third))) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    with rsloss_kernels.use_backend(backend.name):
        for rows in (40, 55, 90):
            features = torch.randn((rows, 6), generator=generator).to(backend.device)
            labels = torch.randint(-1, 6, (rows,), generator=generator).to(backend.device)
            _, *others = loss.arguments(features, labels, torch.rand(rows, generator=generator).to(backend.device))
            gradients = []
            for function in (step, compiled):
                layer.weight.grad = None
                total = function(features, *others)
                total.backward()
                gradients.append((total.detach(), layer.weight.grad))
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
            assert gradients[0][1].any()


@EXPORTED_SAMPLES
def test_export(backend, loss, generator, sample):
    inputs = loss.draw(sample, generator)
    logits, others, options = arguments_on(backend, inputs)
    arguments = (logits, *others)

    class Model(torch.nn.Module):
        def forward(self, *arguments):
            returned = loss.function(*arguments, **options)
            return (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)

    rows, positives = torch.export.Dim("rows", min=2), torch.export.Dim("positives", min=1)
    sizes = [{0: rows if value.shape[0] == len(arguments[0]) else positives} for value in arguments]
    with rsloss_kernels.use_backend(backend.name):
        program = torch.export.export(Model(), arguments, dynamic_shapes={"arguments": tuple(sizes)})
        other = loss.draw(sample.resized(4, 77), generator)
        moved = tuple(value.to(backend.device) for value in other.arguments)
        got = program.module()(*moved)
        expected = Model()(*moved)
    used = {str(node.target) for node in program.graph.nodes if "rsloss_kernels" in str(node.target)}
    assert used and all(name.endswith(f".{backend.name}") for name in used)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- fake and meta tensors ---


def on_fake_gpu(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="cuda")


@SAMPLES
def test_fake_gpu_tensors_take_the_shapes_of_real_ones(loss, generator, monkeypatch, sample):
    """The logic of shapes, dtypes and devices on a GPU, without one: function by function and operator by operator."""
    inputs = loss.draw(sample, generator)
    calls = record(Backend("reference", "cpu"), loss, sample, generator)
    for name in ("cuda", "triton", "reference"):
        # Fake tensors need no kernel, so the choice of one that is missing here must not be refused.
        monkeypatch.setattr(rsloss_kernels._backends, "resolve", lambda operator, device, name=name: name)
        with FakeTensorMode():
            options = pytree.tree_map_only(torch.Tensor, on_fake_gpu, inputs.options)
            for value in harness.losses_in(loss.function(*map(on_fake_gpu, inputs.arguments), **options)):
                assert value.shape == () and value.device.type == "cuda"
                assert value.dtype == (torch.float64 if sample.dtype == torch.float64 else torch.float32)
        for function, args in calls:
            operator = _library.operator(function.__name__.split(".")[0], name)
            with FakeTensorMode(shape_env=ShapeEnv()):
                fake = pytree.tree_leaves(operator(*pytree.tree_map_only(torch.Tensor, on_fake_gpu, args)))
            real = pytree.tree_leaves(function(*args))
            for got, wanted in zip(fake, real, strict=True):
                assert got.device.type == "cuda" and got.dtype == wanted.dtype and got.dim() == wanted.dim()
                sizes = zip(got.shape, wanted.shape, strict=True)
                assert all(a == b for a, b in sizes if isinstance(a, int)), f"{operator}: {got.shape} for {wanted.shape}"


def test_module_survives_deepcopy_and_pickle(backend, loss, generator):
    arguments = [value.to(backend.device) for value in loss.draw(RANKING_SAMPLES[0], generator).arguments]
    module = loss.module()
    with rsloss_kernels.use_backend(backend.name):
        expected = [value.item() for value in harness.losses_in(module(*arguments))]
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("cpu").half().float()):
            assert [value.item() for value in harness.losses_in(twin(*arguments))] == expected
