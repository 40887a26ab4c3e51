"""The state of the equalized losses: sequences beside published code, checkpoints, casts, compilation."""
import copy
import pickle
import warnings

import harness
import mmdet_losses
import pytest
import torch
from published_efl import PublishedEqualizedFocalLoss
from rsloss_kernels import EqualizedFocalLoss, EQLv2Loss, SigmoidFocalLoss, use_backend
from sigmoid_samples import EFL, EQFL, EQLV2, EQUALIZED_LOSSES, SigmoidSample
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

LOSSES = pytest.mark.parametrize("loss", EQUALIZED_LOSSES.values(), ids=EQUALIZED_LOSSES)
CLASSES = 4
# Negatives outweigh positives in the second and third: ratios within (0, 1).
WALK = ("trained", "ties", "ties", "init")


def drawn(backend, loss, generator, number: int = 1, **description) -> tuple:
    """The arguments of the module's forward: logits and labels, or a tuple of labels and quality."""
    sample = SigmoidSample("state", classes=CLASSES, distribution=WALK[number % len(WALK)], **description)
    logits, *others, _ = (value.to(backend.device) for value in loss.draw(sample, generator).arguments)
    return logits, tuple(others) if loss is EQFL else others[0]


def run(backend, module, logits, target, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the gradient, on the CPU."""
    leaf = logits.detach().clone().requires_grad_()
    with use_backend(backend.name):
        value = module(leaf, target, **options)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach().cpu(), gradient.cpu()


def buffers(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.named_buffers()}


def assert_same_state(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def new(backend, loss, **options):
    return loss.module(CLASSES, **options).to(backend.device)


# --- sequences ---


@LOSSES
@pytest.mark.parametrize("avg_factor", [None, 7.5])
def test_steps_follow_the_definition(backend, loss, generator, avg_factor):
    """A step's loss from the state before it, the state from the sums of the returned loss; EQL v2's without its division."""
    options = {} if loss is EQLV2 else {"gamma": 1.5, "scale_factor": 4.0}
    module = new(backend, loss, loss_weight=2.0, **options)
    pulls = torch.zeros((2, CLASSES), dtype=torch.float64)
    ratio = torch.full((CLASSES,), 100.0 if loss is EQLV2 else 1.0, dtype=torch.float64)
    divided = {} if loss is EQLV2 else {"avg_factor": avg_factor}
    for step in range(4 if backend.is_slow else 12):
        logits, target = drawn(backend, loss, generator, step, dtype=torch.float64)
        value, gradient = run(backend, module, logits, target, avg_factor=avg_factor)
        others = [part.cpu() for part in (target if isinstance(target, tuple) else (target,))]
        truth = loss.truth(logits.cpu(), *others, ratio, **options, **divided)
        got = harness.Evaluation((value / 2,), gradient / 2)
        harness.assert_gates(backend, got, truth.losses, truth.gradient(), f"step {step}", narrow=2e-6)
        sums = torch.stack([part[:CLASSES] for part in truth.class_sums])
        pulls += sums if loss is EQLV2 else 2 * sums
        ratio = pulls[0] / (pulls[1] + 1e-10)
        ratio = ratio if loss is EQLV2 else ratio.clamp(0, 1)
        state = buffers(module)
        for name, wanted in (("pos_grad", pulls[0]), ("neg_grad", pulls[1]), ("pos_neg", ratio)):
            torch.testing.assert_close(state[name], wanted, rtol=1e-9, atol=0)
    assert ((ratio > 0) & (ratio < (5 if loss is EQLV2 else 1))).any()


@pytest.mark.parametrize(
    "dtype, anchors", [(torch.float64, 3), pytest.param(torch.float32, 1, marks=pytest.mark.slow_interpreter)], ids=str
)
def test_fifty_steps_of_five_levels_beside_the_published_class(backend, generator, dtype, anchors):
    """A little head is trained by both; ours takes the levels as they are and hangs nothing on the model."""
    steps, classes, batch = 4 if backend.is_slow else 50, 3, 2
    sizes = [(5, 6), (3, 3), (2, 2), (1, 2), (1, 1)]
    places = sum(height * width for height, width in sizes) * anchors
    heads = [torch.nn.Conv2d(4, anchors * classes, 1).to(dtype) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    heads[1].to(backend.device)
    published = PublishedEqualizedFocalLoss(num_classes=classes + 1, fpn_levels=len(sizes)).to(dtype)
    ours = EqualizedFocalLoss(num_classes=classes, background="first", layout="anchor_major").to(backend.device)
    optimizers = [torch.optim.SGD(head.parameters(), lr=0.02) for head in heads]
    rtol = 1e-7 if dtype == torch.float64 else 1e-3
    for step in range(steps):
        features = [torch.randn((batch, 4, *size), generator=generator).to(dtype) for size in sizes]
        # Class 3 is rare.
        labels = torch.multinomial(torch.tensor([0.7, 0.1, 0.15, 0.02, 0.03]), batch * places, replacement=True, generator=generator)
        labels = torch.where(labels == 4, -1, labels).view(batch, places)
        normalizer = float((labels > 0).sum().clamp(min=1))

        levels = [heads[0](feature) for feature in features]
        for level in levels:
            level.register_hook(published.collect)
        flat = torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, classes) for level in levels], 1)
        wanted = published(flat.reshape(-1, classes), labels.flatten(), normalizer)

        with use_backend(backend.name):
            got = ours([heads[1](feature.to(backend.device)) for feature in features], labels.to(backend.device), avg_factor=normalizer)
        for loss, optimizer in ((wanted, optimizers[0]), (got, optimizers[1])):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(got.detach().cpu().to(dtype), wanted.detach(), rtol=rtol, atol=0, msg=f"step {step}")
        for name, value in buffers(ours).items():
            torch.testing.assert_close(value.to(dtype), getattr(published, name), rtol=rtol, atol=0, msg=f"step {step} {name}")
    torch.testing.assert_close(heads[1].weight.cpu(), heads[0].weight, rtol=rtol, atol=rtol)
    assert ((ours.pos_neg > 0) & (ours.pos_neg < 1)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_eqlv2_beside_mmdetection(backend, generator, dtype):
    options = {"num_classes": CLASSES, "gamma": 12.0, "mu": 0.8, "alpha": 4.0, "loss_weight": 1.5}
    theirs = mmdet_losses.load("eqlv2_loss").EQLV2Loss(**options).to(dtype)
    ours = EQLv2Loss(**options).to(backend.device)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    for step in range(4 if backend.is_slow else 30):
        logits, labels = drawn(backend, EQLV2, generator, step, dtype=dtype)
        labels = labels.clamp(min=0)
        value, gradient = run(backend, ours, logits, labels)
        leaf = logits.cpu().clone().requires_grad_()
        wanted = theirs(leaf, labels.cpu())
        (expected,) = torch.autograd.grad(wanted, leaf)
        torch.testing.assert_close(value, wanted.detach(), rtol=rtol, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
        for name, buffer in buffers(ours).items():
            torch.testing.assert_close(buffer.to(dtype), getattr(theirs, name), rtol=rtol, atol=0)
    torch.testing.assert_close(ours.get_activation(logits).cpu(), theirs.get_activation(logits.cpu().clone()), rtol=1e-6, atol=1e-9)
    assert ours.get_cls_channels(CLASSES) == ours.get_channel_num(CLASSES) == theirs.get_channel_num(CLASSES) == CLASSES + 1
    theirs.test_with_obj = ours.test_with_obj = False
    torch.testing.assert_close(ours.get_activation(logits).cpu(), theirs.get_activation(logits.cpu().clone()), rtol=1e-6, atol=1e-9)


# --- when the state changes ---


def test_the_first_step_is_the_focal_loss(backend, generator):
    logits, labels = drawn(backend, EFL, generator)
    expected = run(backend, SigmoidFocalLoss(reduction="sum", gamma=1.5, alpha=0.3), logits, labels)
    module = new(backend, EFL, gamma=1.5, alpha=0.3)
    first, second = (run(backend, module, logits, labels) for _ in range(2))
    assert all(torch.equal(got, wanted) for got, wanted in zip(first, expected, strict=True))
    assert second[0] != first[0]


@LOSSES
def test_state_changes_only_in_training_with_gradients(backend, loss, generator):
    module = new(backend, loss)
    arguments = drawn(backend, loss, generator)
    labels, *quality = arguments[1] if loss is EQFL else arguments[1:]
    labels[:CLASSES] = torch.arange(CLASSES)  # a positive of every class
    for value in quality:
        value[:CLASSES] = 0.7
    run(backend, module, *arguments)
    before = buffers(module)
    assert before["pos_grad"].all() and before["neg_grad"].all()
    twin = copy.deepcopy(module)
    frozen, _ = run(backend, module.eval(), *arguments)
    assert_same_state(buffers(module), before)
    module.train()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), use_backend(backend.name):
            assert torch.equal(module(*arguments).cpu(), frozen)
        assert_same_state(buffers(module), before)
    trained, _ = run(backend, twin, *arguments)
    assert torch.equal(trained, frozen) and not torch.equal(buffers(twin)["pos_grad"], before["pos_grad"])


@LOSSES
def test_steps_that_are_not_finite_leave_the_state(backend, loss, generator):
    module = new(backend, loss)
    logits, target = drawn(backend, loss, generator)
    run(backend, module, logits, target)
    before = buffers(module)
    labels = target[0] if isinstance(target, tuple) else target
    row = int((labels >= 0).nonzero()[0])
    for value in (torch.nan, torch.inf):
        broken = logits.clone()
        broken[row] = value
        loss_value, _ = run(backend, module, broken, target)
        assert not loss_value.isfinite()
        assert_same_state(buffers(module), before)
    if loss is not EQLV2:
        run(backend, module, logits, target, avg_factor=torch.tensor(0.0, device=backend.device))
        assert_same_state(buffers(module), before)
    dropped = torch.full_like(labels, -1)
    value, gradient = run(backend, module, logits, (dropped, *target[1:]) if isinstance(target, tuple) else dropped)
    assert value == 0 and not gradient.any()
    assert all(torch.equal(buffers(module)[name], before[name]) for name in ("pos_grad", "neg_grad"))


@pytest.mark.parametrize("loss", [EFL, EQFL], ids=lambda loss: loss.name)
def test_reductions_share_the_state(backend, loss, generator):
    """"none" gathers what "sum" does, and "mean" that over `avg_factor`."""
    arguments = drawn(backend, loss, generator, dtype=torch.float64)
    states, values = {}, {}
    for reduction in ("none", "sum", "mean"):
        module = new(backend, loss, reduction=reduction, loss_weight=0.5)
        values[reduction], gradient = run(backend, module, *arguments)
        states[reduction] = buffers(module)
        assert gradient.any()
    assert_same_state(states["none"], states["sum"])
    assert_same_state(states["mean"], states["sum"])
    assert values["none"].shape == arguments[0].shape
    torch.testing.assert_close(values["none"].sum(), values["sum"], rtol=1e-13, atol=0)
    module = new(backend, loss, loss_weight=0.5)
    run(backend, module, *arguments, avg_factor=4)
    torch.testing.assert_close(buffers(module)["pos_grad"], states["sum"]["pos_grad"] / 4, rtol=1e-15, atol=0)


@LOSSES
def test_tensors_without_numbers(loss):
    """Whether a step is finite is not asked of a tensor that does not know."""
    with FakeTensorMode():
        module = loss.module(CLASSES)
        labels = torch.zeros(6, dtype=torch.int64)
        logits = torch.empty(6, CLASSES + (loss is EQLV2), requires_grad=True)
        module(logits, (labels, torch.empty(6)) if loss is EQFL else labels).backward()
        assert isinstance(module.pos_neg, FakeTensor) and logits.grad.shape == logits.shape


@LOSSES
def test_two_forwards_before_one_backward(backend, loss, generator):
    module = new(backend, loss)
    run(backend, module, *drawn(backend, loss, generator))
    twin = copy.deepcopy(module)
    batches = [drawn(backend, loss, generator, number) for number in (1, 2)]
    expected = [run(backend, twin, *batch)[1] for batch in batches]
    leaves = [batch[0].clone().requires_grad_() for batch in batches]
    with use_backend(backend.name):
        total = sum(module(leaf, batch[1]) for leaf, batch in zip(leaves, batches, strict=True))
    total.backward()
    assert all(torch.equal(leaf.grad.cpu(), gradient) for leaf, gradient in zip(leaves, expected, strict=True))


def test_upstream_gradient_is_not_part_of_the_state(backend, generator):
    """Nor is a scale of AMP."""
    arguments = drawn(backend, EFL, generator)
    plain, scaled = new(backend, EFL), new(backend, EFL)
    run(backend, plain, *arguments)
    leaf = arguments[0].clone().requires_grad_()
    with use_backend(backend.name):
        (65536 * scaled(leaf, arguments[1])).backward()
    assert_same_state(buffers(scaled), buffers(plain))


# --- checkpoints and casts ---


@LOSSES
def test_state_survives_save_resume_and_copies(backend, loss, generator):
    batches = [drawn(backend, loss, generator, step) for step in range(4)]

    def steps(module, chosen):
        return [run(backend, module, *batch) for batch in chosen]

    whole = new(backend, loss)
    expected = steps(whole, batches)
    first = new(backend, loss)
    steps(first, batches[:2])
    resumed = new(backend, loss)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for module in (resumed, copy.deepcopy(first), pickle.loads(pickle.dumps(first)).to(backend.device)):
        got = steps(module, batches[2:])
        assert all(torch.equal(a, b) for pair in zip(got, expected[2:], strict=True) for a, b in zip(*pair, strict=True))
        assert_same_state(buffers(module), buffers(whole))
        assert repr(module) == repr(whole) and f"num_classes={CLASSES}" in repr(module)


@LOSSES
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_state_stays_wide_under_casts(backend, loss, generator, cast):
    module = new(backend, loss)
    run(backend, module, *drawn(backend, loss, generator))
    before = buffers(module)
    getattr(torch.nn.Sequential(module, torch.nn.Linear(2, 2)), cast)()
    assert {value.dtype for value in module.buffers()} == {torch.float64}
    assert_same_state(buffers(module), before)
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(cast, torch.float32)
    run(backend, module, *drawn(backend, loss, generator, dtype=dtype))
    assert not torch.equal(buffers(module)["pos_grad"], before["pos_grad"])
    assert module.to("meta").pos_neg.device.type == "meta"


def test_checkpoints_of_the_published_classes_load_without_a_warning(generator):
    """float32 buffers of C entries, though EFL's number of classes counts the background."""
    theirs = [PublishedEqualizedFocalLoss(num_classes=CLASSES + 1), mmdet_losses.load("eqlv2_loss").EQLV2Loss(num_classes=CLASSES)]
    for published, ours in zip(theirs, (EqualizedFocalLoss(CLASSES), EQLv2Loss(CLASSES)), strict=True):
        published.pos_grad += torch.rand(CLASSES, generator=generator)
        published.pos_neg *= torch.rand(CLASSES, generator=generator)
        heads = [torch.nn.ModuleDict({"loss_cls": module}) for module in (ours, published)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            heads[0].load_state_dict(heads[1].state_dict(), strict=True)
        assert_same_state(buffers(ours), {name: value.double() for name, value in buffers(published).items()})


@pytest.mark.parametrize("size", [CLASSES + 1, CLASSES - 1])
def test_checkpoint_of_another_number_of_classes_is_refused_with_the_convention(size):
    module, other = EqualizedFocalLoss(CLASSES), EqualizedFocalLoss(size)
    message = rf"pos_grad of the checkpoint must have shape \[{CLASSES}\].* got \[{size}\]. num_classes counts the foreground classes alone"
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(other.state_dict())
    assert_same_state(buffers(module), buffers(EqualizedFocalLoss(CLASSES)))


@LOSSES
def test_checkpoint_of_another_loss_loads_with_one_warning(loss):
    module = loss.module(CLASSES)
    with pytest.warns(UserWarning, match="another loss.*pos_grad.*acc_sum") as caught:
        module.load_state_dict({"acc_sum": torch.ones(10)}, strict=True)
    assert len(caught) == 1
    assert_same_state(buffers(module), buffers(loss.module(CLASSES)))


# --- compilation ---


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("loss", [EFL, EQLV2], ids=lambda loss: loss.name)
def test_thirty_compiled_steps_compile_once(backend, loss, generator):
    torch._dynamo.reset()
    eager, module = (new(backend, loss) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    batches = [drawn(backend, loss, generator, step) for step in range(len(WALK))]
    batches[2][0][:, 0] = torch.nan
    for step in range(6 if backend.is_slow else 30):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            value, gradient = run(backend, compiled, *batches[step % len(batches)])
        expected = run(backend, eager, *batches[step % len(batches)])
        torch.testing.assert_close((value, gradient), expected, rtol=0, atol=0, equal_nan=True)
        assert_same_state(buffers(module), buffers(eager))
    assert counter.frame_count == 1 and module.pos_grad.any()


def test_compiled_levels_of_any_size_and_normalizer_compile_once(generator):
    torch._dynamo.reset()
    eager, module = (EqualizedFocalLoss(3, layout="anchor_major") for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for height, avg_factor in ((4, 2.5), (7, 9.0), (5, 3.25)):
        levels = [torch.randn((2, 6, height, width), generator=generator).requires_grad_() for width in (height + 1, 3)]
        labels = torch.randint(-1, 4, (2, 2 * height * (height + 4)), generator=generator)
        values = [step(levels, labels, avg_factor=avg_factor) for step in (compiled, eager)]
        gradients = [torch.autograd.grad(value, levels) for value in values]
        torch.testing.assert_close(values[0], values[1], rtol=1e-7, atol=0)
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
        frames.append(counter.frame_count)
    # Tracing may start over within the first calls; later ones must find its graph.
    assert frames[1] == frames[2]
