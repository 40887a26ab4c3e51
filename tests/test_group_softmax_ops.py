"""The operators of balanced group softmax under PyTorch's own checks: opcheck, torch.compile, export, fake tensors."""
import dataclasses

import pytest
import rsloss_kernels
import torch
from group_softmax_samples import OPERATORS, GroupSample, as_labels, on_device
from harness import Backend
from rsloss_kernels import GroupSoftmaxLoss, _library, group_softmax_loss, group_softmax_scores
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

DESCRIPTIONS = [
    GroupSample("float32", rows=9, sizes=(3, 4)),
    GroupSample("float64_sigmoid_last", rows=5, dtype=torch.float64, form="sigmoid", place="last", label_dtype=torch.int32),
    GroupSample("empty_bfloat16", rows=0, dtype=torch.bfloat16, weight_dtype=torch.float64),
]
SAMPLES = pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda description: description.name)


def operator_calls(backend, inputs, generator) -> dict[str, tuple]:
    """Arguments of every operator; later ones take what earlier ones return."""
    inputs = on_device(inputs, backend)
    groups = inputs.groups
    is_first, of_background = inputs.background == "first", groups.background_group
    keys = torch.rand((groups.num_groups, len(inputs.labels)), generator=generator).to(backend.device)
    layout = (groups.starts, groups.others)
    rows = (inputs.logits, inputs.labels, groups.class_columns, inputs.weights)
    forward = (*rows, *layout, is_first)
    losses, averages, tables = _library.operator("group_softmax_forward", backend.name)(*forward)
    return {
        "group_softmax_sample": (inputs.labels, groups.class_columns, keys, *layout, of_background, is_first, 1.5),
        "group_softmax_forward": forward,
        "group_softmax_backward": (*rows, averages, tables, torch.ones_like(losses), *layout, is_first),
        "group_softmax_scores": (inputs.logits, groups.class_columns, *layout, of_background, is_first),
    }


@SAMPLES
def test_opcheck(backend, generator, description):
    calls = operator_calls(backend, description.draw(generator), generator)
    assert set(calls) == set(OPERATORS)
    for name, arguments in calls.items():
        if name == "group_softmax_forward":
            arguments = (arguments[0].detach().requires_grad_(), *arguments[1:])
        results = torch.library.opcheck(_library.operator(name, backend.name), arguments)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4, f"{name}: {results}"


def test_compile_once_for_all_numbers_of_rows(backend, generator):
    """One graph with sampling, loss and gradient, whatever the batch."""
    torch._dynamo.reset()
    rsloss_kernels._backends.look_up_reasons()
    inputs = on_device(GroupSample("compile", sizes=(4, 5, 2)).draw(generator), backend)
    counter = CompileCounterWithBackend("aot_eager")
    options = {"groups": inputs.groups, "background": inputs.background}

    def step(logits, labels, weights):
        sampled = group_softmax_loss(logits, labels, **options)
        return torch.stack([sampled, group_softmax_loss(logits, labels, sample_weights=weights, **options)])

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    with rsloss_kernels.use_backend(backend.name):
        for rows in (12, 30, 7, 100):
            drawn = on_device(dataclasses.replace(GroupSample("compile", sizes=(4, 5, 2)), rows=rows).draw(generator), backend)
            outcomes = []
            for function in (step, compiled):
                for which in (0, 1):
                    leaf = drawn.logits.clone().requires_grad_()
                    losses = function(leaf, drawn.labels, drawn.weights)[which]
                    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
                    assert losses.isfinite().all() and gradient.isfinite().all()
                outcomes.append((losses.detach(), gradient))
            assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
            frames.append(counter.frame_count)
    # Tracing may start over within the first call; later calls must find its graph.
    assert frames[0] > 0 and len(set(frames)) == 1


@pytest.mark.slow_interpreter
def test_compile_a_model_with_its_loss(backend, generator):
    """With a layer before and arithmetic after the loss."""
    torch._dynamo.reset()
    groups = on_device(GroupSample("model").draw(generator), backend).groups
    layer = torch.nn.Linear(6, groups.num_logits).to(backend.device)
    module = GroupSoftmaxLoss(groups, others_ratio=None)
    # The default compiler takes long over the reference's many operations.
    compiler = "aot_eager" if backend.name == "reference" else "inductor"
    compiled = torch.compile(
        lambda features, labels: module(layer(features), labels) * 2, backend=compiler, fullgraph=True, dynamic=True
    )
    with rsloss_kernels.use_backend(backend.name):
        for rows in (40, 55):
            features = torch.randn((rows, 6), generator=generator).to(backend.device)
            labels = as_labels(torch.randint(0, 13, (rows,), generator=generator), 12, "first", torch.arange(rows) % 9 == 0)
            total = compiled(features, labels.to(backend.device))
            expected = module(layer(features), labels.to(backend.device)) * 2
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-7)
            assert torch.autograd.grad(total, layer.weight)[0].any()


def test_export(backend, generator):
    inputs = on_device(GroupSample("export").draw(generator), backend)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.groups = inputs.groups

        def forward(self, logits, labels, weights):
            losses = group_softmax_loss(logits, labels, self.groups, sample_weights=weights)
            return losses, group_softmax_scores(logits, self.groups)

    rows = torch.export.Dim("rows", min=2)
    shapes = {"logits": {0: rows}, "labels": {0: rows}, "weights": {1: rows}}
    with rsloss_kernels.use_backend(backend.name):
        program = torch.export.export(Head(), (inputs.logits, inputs.labels, inputs.weights), dynamic_shapes=shapes)
        other = on_device(GroupSample("export", rows=17).draw(generator), backend)
        arguments = (other.logits, other.labels, other.weights)
        for got, wanted in zip(program.module()(*arguments), Head()(*arguments), strict=True):
            assert torch.equal(got, wanted)
    used = {str(node.target) for node in program.graph.nodes if "rsloss_kernels" in str(node.target)}
    assert used and all(name.endswith(f".{backend.name}") for name in used)


@SAMPLES
def test_fake_gpu_tensors_take_the_shapes_of_real_ones(generator, description):
    """The logic of shapes, dtypes and devices on a GPU, without one."""
    for name, arguments in operator_calls(Backend("reference", "cpu"), description.draw(generator), generator).items():
        real = pytree.tree_leaves(_library.operator(name, "reference")(*arguments))
        for backend in ("cuda", "triton", "reference"):
            with FakeTensorMode(shape_env=ShapeEnv()):
                on_gpu = pytree.tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), arguments)
                fake = pytree.tree_leaves(_library.operator(name, backend)(*on_gpu))
            for got, wanted in zip(fake, real, strict=True):
                assert got.device.type == "cuda" and got.dtype == wanted.dtype and got.shape == wanted.shape
