"""GHMC and GHMR as modules: the state of the momentum, checkpoints, casts, compilation, and MMDetection's own modules beside them."""
import contextlib
import copy
import math
import pickle
import warnings

import harness
import mmdet_losses
import pytest
import torch
from ghm_samples import CLASSIFICATION, GHM_LOSSES, REGRESSION, GHMSample, assert_state
from rsloss_kernels import GHMC, GHMR, ghm_classification_loss, use_backend
from torch._dynamo.testing import CompileCounterWithBackend

LOSSES = pytest.mark.parametrize("loss", GHM_LOSSES.values(), ids=GHM_LOSSES)
# Elements on many bins, and in every step other ones.
WALK = ("trained", "ties", "init", "trained", "separated", "all_equal")


def drawn(backend, loss, generator, **description) -> tuple[torch.Tensor, ...]:
    inputs = loss.draw(GHMSample("state", **{"rows": 20, "weight": "element", **description}), generator)
    return tuple(value.to(backend.device) for value in inputs.arguments)


def run(backend, module, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the gradient, on the CPU."""
    leaf = arguments[0].detach().clone().requires_grad_()
    with use_backend(backend.name):
        value = module(leaf, *arguments[1:])
    (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach().cpu(), gradient.cpu()


def buffers(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.named_buffers()}


def assert_same_state(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


# --- sequences ---


@LOSSES
@pytest.mark.parametrize("options", [{}, {"bias_correction": True}, {"empty_bins": "count"}, {"empty_bins": "count", "bias_correction": True}],
                         ids=["published", "corrected", "count", "count_corrected"])  # fmt: skip
def test_fifty_steps_of_momentum(backend, loss, generator, options):
    module = loss.module(bins=30, momentum=0.75, **options).to(backend.device)
    state = {"acc_sum": torch.zeros(30, dtype=torch.float64), "momentum": 0.75, "bins": 30}
    state["empty_bins"] = options.get("empty_bins", "skip")
    if options.get("bias_correction"):
        state["num_updates"] = torch.zeros(30, dtype=torch.int64)
    for step in range(6 if backend.is_interpreted else 50):
        arguments = drawn(backend, loss, generator, distribution=WALK[step % len(WALK)], dtype=torch.float64)
        value, gradient = run(backend, module, *arguments)
        truth = loss.truth(*(argument.cpu() for argument in arguments), **state)
        harness.assert_gates(backend, harness.Evaluation((value,), gradient), truth.losses, truth.gradient(), f"step {step}")
        state |= {"acc_sum": truth.acc_sum} | ({"num_updates": truth.num_updates} if "num_updates" in state else {})
        got = buffers(module)
        assert set(got) == {"acc_sum"} | ({"num_updates"} if "num_updates" in state else set())
        # Rounded once per step.
        torch.testing.assert_close(got["acc_sum"], truth.acc_sum, rtol=1e-14, atol=0)
        assert "num_updates" not in got or torch.equal(got["num_updates"], truth.num_updates)


@pytest.fixture
def theirs_in_float64(monkeypatch):
    """MMDetection's modules narrow the targets to float32, whatever the logits are, and the whole loss with them."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def normaliser(loss, weight) -> float:
    """Theirs, plus what their mean adds to it."""
    total = float((weight if loss.is_regression else weight > 0).sum())
    return 1 + 2.0**-23 / max(total, 1.0)


@LOSSES
@pytest.mark.parametrize(
    "dtype, momentum",
    [
        (torch.float64, 0.75),
        pytest.param(torch.float64, 0.0, marks=pytest.mark.slow_interpreter),
        pytest.param(torch.float32, 0.75, marks=pytest.mark.slow_interpreter),
    ],
    ids=str,
)
def test_fifty_steps_beside_mmdetection(backend, loss, generator, dtype, momentum, request):
    if dtype == torch.float64:
        request.getfixturevalue("theirs_in_float64")
    theirs = getattr(mmdet_losses.ghm(), loss.module.__name__)(bins=30, momentum=momentum, loss_weight=1.5).to(dtype)
    ours = loss.module(bins=30, momentum=momentum, loss_weight=1.5).to(backend.device)
    # Of the noise of theirs: sums, state and differences of sigmoids in the dtype.
    gate = 1e-9 if dtype == torch.float64 else 2e-5
    for step in range(6 if backend.is_interpreted else 50):
        arguments = drawn(backend, loss, generator, distribution=("trained", "wide")[step % 2], dtype=torch.float64)
        # Away from the edges, which they round to float32.
        norm = gradient_norms(loss, *(argument.cpu() for argument in arguments[:2]))
        distance = (norm * 30 - (norm * 30).round()).abs()
        weight = torch.where((distance.to(backend.device) > 1e-3) | (norm > 0.99).to(backend.device), arguments[2], 0.0)
        pred, target = (argument.to(dtype) for argument in arguments[:2])
        value, gradient = run(backend, ours, pred, target, weight)
        leaf = pred.detach().cpu().clone().requires_grad_()
        wanted = theirs(leaf, target.cpu(), weight.cpu())
        (wanted_gradient,) = torch.autograd.grad(wanted, leaf)
        wanted, wanted_gradient = (part.detach() * normaliser(loss, weight) for part in (wanted, wanted_gradient))
        assert abs(float(value) - float(wanted)) <= gate * abs(float(wanted)), f"step {step}"
        assert (gradient - wanted_gradient).abs().max() <= gate * wanted_gradient.abs().max(), f"step {step}"
        if momentum > 0:
            torch.testing.assert_close(buffers(ours)["acc_sum"], theirs.acc_sum.double(), rtol=gate, atol=0)


def gradient_norms(loss, pred, target) -> torch.Tensor:
    if loss.is_regression:
        return (pred - target).abs() / torch.hypot(pred - target, torch.full_like(pred, 0.02))
    return (pred.sigmoid() - target).abs()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@LOSSES
def test_reductions_beside_mmdetection(backend, loss, generator, reduction, theirs_in_float64):
    """"none" carries the published normaliser: the number of valid elements, or the sum of the weights."""
    pred, target, weight = drawn(backend, loss, generator, dtype=torch.float64)
    theirs = getattr(mmdet_losses.ghm(), loss.module.__name__)(momentum=0.5).double()
    ours = loss.module(momentum=0.5, reduction=reduction).to(backend.device)
    for _ in range(2):
        leaf = pred.cpu().clone().requires_grad_()
        wanted = theirs(leaf, target.cpu(), weight.cpu(), reduction_override=reduction)
        (wanted_gradient,) = torch.autograd.grad(wanted.sum(), leaf)
        if reduction == "mean":
            wanted, wanted_gradient = (part.detach() * normaliser(loss, weight) for part in (wanted, wanted_gradient))
        for module in (ours, copy.deepcopy(ours)):
            got, gradient = run(backend, module, pred, target, weight)
            assert got.shape == wanted.shape and got.dtype == torch.float64
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(buffers(ours)["acc_sum"], theirs.acc_sum, rtol=1e-12, atol=0)


def test_index_form_beside_mmdetection(backend, generator, theirs_in_float64):
    logits = torch.randn((40, 5), generator=generator, dtype=torch.float64)
    labels, weight = torch.randint(0, 6, (40,), generator=generator), torch.randint(0, 2, (40,), generator=generator).double()
    wanted = mmdet_losses.ghm().GHMC().double()(logits, labels, weight) * normaliser(CLASSIFICATION, weight[:, None].expand(40, 5))
    got, _ = run(backend, GHMC(), *(value.to(backend.device) for value in (logits, labels, weight)))
    assert abs(float(got) - float(wanted)) <= 1e-9 * float(wanted)


# --- the module ---


@LOSSES
def test_module_equals_function(backend, loss, generator):
    arguments = drawn(backend, loss, generator)
    expected = loss.evaluate(backend, *arguments, bins=30, empty_bins="count")
    module = loss.module(bins=30, empty_bins="count", loss_weight=4.0)
    value, gradient = run(backend, module, *arguments)
    assert value == 4 * expected.losses[0] and torch.equal(gradient, 4 * expected.gradient)
    assert not module.state_dict()
    with use_backend(backend.name):
        assert module(*arguments, avg_factor=7.0, reduction_override="mean") == value
        assert module(arguments[0], arguments[1]) == 4 * loss.function(*arguments[:2], bins=30, empty_bins="count")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_weight_of_a_module_may_be_a_tensor(reduction):
    pred, target = torch.linspace(-2, 2, 12).view(4, 3), torch.tensor([0, 3, 2, 1])
    expected = GHMC(loss_weight=2.5, reduction=reduction)(pred, target)
    assert torch.equal(GHMC(loss_weight=torch.tensor(2.5), reduction=reduction)(pred, target), expected)
    learnt = GHMC(loss_weight=torch.nn.Parameter(torch.tensor(2.5)), reduction=reduction)
    learnt(pred, target).sum().backward()
    torch.testing.assert_close(learnt.loss_weight.grad * 2.5, expected.sum())


def test_module_says_what_it_is_and_survives_pickle():
    module = GHMC(bins=30, momentum=0.75, loss_weight=0.5, background="first", bias_correction=True)
    assert repr(module).startswith("GHMC(bins=30, momentum=0.75, loss_weight=0.5, ") and "background='first'" in repr(module)
    assert "process_group='default'" in repr(GHMR(process_group="default"))
    assert repr(GHMR(mu=0.1)).startswith("GHMR(mu=0.1, bins=10, momentum=0.0")
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert repr(twin) == repr(module)
        assert_same_state(buffers(twin), buffers(module))
    # MMDetection's positional order.
    assert (GHMC(30, 0.5, True, 2.0, "none").loss_weight, GHMR(0.1, 30, 0.5, 2.0, "none").reduction) == (2.0, "none")


@LOSSES
@pytest.mark.parametrize("target", [0.0, 1.0, 0.3])
def test_elementwise_gradients_of_special_values(backend, loss, target):
    """The same as those of the mean, also where a part of the formula has no derivative."""
    pred = torch.tensor([0.0, -0.0, 0.3, 1.0, 1e4, -1e4, torch.inf, -torch.inf], dtype=torch.float64, device=backend.device)
    _, wanted = run(backend, loss.module(), pred, torch.full_like(pred, target))
    _, got = run(backend, loss.module(reduction="none"), pred, torch.full_like(pred, target))
    torch.testing.assert_close(got / len(pred), wanted, rtol=1e-9, atol=1e-15)


@LOSSES
def test_elementwise_loss_where_elements_are_not_valid(backend, loss, generator):
    pred, target, weight = drawn(backend, loss, generator)
    pred[weight == 0] = torch.nan
    value, gradient = run(backend, loss.module(reduction="none"), pred, target, weight)
    is_valid = (weight > 0).cpu()
    assert not value[~is_valid].any() and not gradient[~is_valid].any()
    assert value[is_valid].isfinite().all() and gradient[is_valid].all()
    # The mean, times its normaliser.
    mean = loss.evaluate(backend, pred, target, weight)
    total = weight.sum().cpu() if loss.is_regression else is_valid.sum()
    torch.testing.assert_close(value.sum() / total, mean.losses[0])
    torch.testing.assert_close(gradient / total, mean.gradient)


# --- the state ---


@contextlib.contextmanager
def evaluating(module):
    module.eval()
    yield
    module.train()


@LOSSES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_state_changes_only_in_training_with_gradients(backend, loss, generator, reduction):
    module = loss.module(momentum=0.75, bias_correction=True, reduction=reduction).to(backend.device)
    arguments = drawn(backend, loss, generator)
    run(backend, module, *arguments)
    before = buffers(module)
    assert before["acc_sum"].any() and before["num_updates"].max() == 1
    twin = copy.deepcopy(module)
    with evaluating(module):
        frozen, _ = run(backend, module, *arguments)
    assert_same_state(buffers(module), before)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), use_backend(backend.name):
            assert torch.equal(module(*arguments).cpu(), frozen)
        assert_same_state(buffers(module), before)
    trained, _ = run(backend, twin, *arguments)
    assert torch.equal(trained, frozen) and buffers(twin)["num_updates"].max() == 2


@LOSSES
def test_non_finite_or_empty_steps_leave_the_state(backend, loss, generator):
    module = loss.module(momentum=0.75, bias_correction=True).to(backend.device)
    pred, target, weight = drawn(backend, loss, generator, weight=None) + (None,)
    run(backend, module, pred, target)
    before = buffers(module)
    broken = pred.clone()
    broken[3, 1] = torch.nan
    for arguments in ((broken, target), (pred, target, torch.zeros_like(pred)), (pred[:0], target[:0])):
        run(backend, module, *arguments)
        assert_same_state(buffers(module), before)
    broken[3, 1] = torch.inf
    value, _ = run(backend, module, broken, torch.zeros_like(target))
    assert value == torch.inf
    assert_same_state(buffers(module), before)


@LOSSES
def test_first_step_with_and_without_bias_correction(backend, loss, generator):
    """As published the first step of a momentum of 0.75 weighs four times too much."""
    arguments = drawn(backend, loss, generator, dtype=torch.float64)
    plain, _ = run(backend, loss.module(), *arguments)
    published, _ = run(backend, loss.module(momentum=0.75).to(backend.device), *arguments)
    corrected, _ = run(backend, loss.module(momentum=0.75, bias_correction=True).to(backend.device), *arguments)
    torch.testing.assert_close(published, 4 * plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(corrected, plain, rtol=1e-12, atol=0)


def test_empty_bins_of_the_paper_decay(backend):
    pred, target = torch.full((8,), -5.0, device=backend.device), torch.zeros(8, device=backend.device)
    wanted = {"skip": [4.0, 4.0], "count": [4.0, 2.0]}
    for empty_bins, values in wanted.items():
        module = GHMC(bins=2, momentum=0.5, empty_bins=empty_bins).to(backend.device)
        for logits, value in zip((pred, -pred), values, strict=True):
            run(backend, module, logits, target)
            assert buffers(module)["acc_sum"][0] == value


@LOSSES
def test_two_forwards_before_one_backward(backend, loss, generator):
    module = loss.module(momentum=0.5).to(backend.device)
    twin = copy.deepcopy(module)
    batches = [drawn(backend, loss, generator, distribution=name) for name in ("trained", "ties")]
    expected = [run(backend, twin, *batch)[1] for batch in batches]
    leaves = [batch[0].clone().requires_grad_() for batch in batches]
    with use_backend(backend.name):
        total = sum(module(leaf, *batch[1:]) for leaf, batch in zip(leaves, batches, strict=True))
    total.backward()
    assert all(torch.equal(leaf.grad.cpu(), gradient) for leaf, gradient in zip(leaves, expected, strict=True))


@LOSSES
def test_state_survives_save_resume_and_copies(backend, loss, generator):
    batches = [drawn(backend, loss, generator, distribution=WALK[step]) for step in range(4)]

    def new():
        return loss.module(bins=30, momentum=0.75, bias_correction=True).to(backend.device)

    def steps(module, chosen):
        return [run(backend, module, *batch) for batch in chosen]

    whole = new()
    expected = steps(whole, batches)
    first = new()
    steps(first, batches[:2])
    resumed = new()
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for module in (resumed, copy.deepcopy(first), pickle.loads(pickle.dumps(first)).to(backend.device)):
        got = steps(module, batches[2:])
        assert all(torch.equal(a, b) for pair in zip(got, expected[2:], strict=True) for a, b in zip(*pair, strict=True))
        assert_same_state(buffers(module), buffers(whole))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@LOSSES
def test_state_stays_wide_under_casts(backend, loss, generator, cast):
    module = loss.module(momentum=0.3, bias_correction=True).to(backend.device)
    run(backend, module, *drawn(backend, loss, generator))
    before = buffers(module)
    getattr(torch.nn.Sequential(module, torch.nn.Linear(2, 2)), cast)()
    assert module.acc_sum.dtype == torch.float64 and module.num_updates.dtype == torch.int64
    assert_same_state(buffers(module), before)
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}.get(cast, torch.float32)
    run(backend, module, *drawn(backend, loss, generator, dtype=dtype))
    assert module.num_updates.max() == 2
    assert module.to("meta").acc_sum.device.type == "meta"


@LOSSES
def test_checkpoint_of_mmdetection_loads_without_a_warning(loss, generator):
    """float32 `acc_sum`, and a buffer of edges."""
    theirs = getattr(mmdet_losses.ghm(), loss.module.__name__)(momentum=0.75)
    assert set(theirs.state_dict()) == {"edges", "acc_sum"} and theirs.acc_sum.dtype == torch.float32
    theirs(*loss.draw(GHMSample("theirs", weight="element"), generator).arguments)
    ours = loss.module(momentum=0.75)
    head, their_head = torch.nn.ModuleDict({"loss_cls": ours}), torch.nn.ModuleDict({"loss_cls": theirs})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.load_state_dict(their_head.state_dict(), strict=True)
        loss.module().load_state_dict(getattr(mmdet_losses.ghm(), loss.module.__name__)().state_dict(), strict=True)
    assert ours.acc_sum.dtype == torch.float64 and torch.equal(ours.acc_sum, theirs.acc_sum.double()) and ours.acc_sum.any()


@LOSSES
@pytest.mark.parametrize("momentum", [1e-300, 0.75, 1 - 2.0**-53])
def test_state_gathered_without_bias_correction_is_not_corrected(backend, loss, generator, momentum):
    published = loss.module(momentum=momentum).to(backend.device)
    corrected = loss.module(momentum=momentum, bias_correction=True).to(backend.device)
    arguments = drawn(backend, loss, generator)
    for unused in (3, 0):
        published.acc_sum.fill_(50.0)[:unused] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            corrected.load_state_dict(published.state_dict(), strict=True)
        updates = buffers(corrected)["num_updates"]
        assert torch.equal(corrected.acc_sum, published.acc_sum) and not updates[:unused].any()
        assert (torch.expm1(updates[unused:] * math.log(momentum)) == -1).all()
    assert torch.equal(run(backend, corrected, *arguments)[0], run(backend, published, *arguments)[0])
    assert corrected.num_updates.max() == updates[0] + 1


def test_checkpoint_of_another_loss_loads_with_one_warning():
    module = GHMC(momentum=0.5)
    with pytest.warns(UserWarning, match="another loss.*acc_sum.*SB_weight") as caught:
        module.load_state_dict({"SB_weight": torch.ones(())}, strict=True)
    assert len(caught) == 1 and not module.acc_sum.any()


# --- compilation ---


@pytest.mark.slow_interpreter
@LOSSES
@pytest.mark.parametrize("options", [{}, {"bias_correction": True}, {"reduction": "none"}], ids=["plain", "corrected", "none"])
def test_a_hundred_compiled_steps_compile_once(backend, loss, generator, options):
    torch._dynamo.reset()
    eager, module = (loss.module(bins=30, momentum=0.75, **options).to(backend.device) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    batches = [drawn(backend, loss, generator, distribution=name) for name in WALK]
    batches[2][0][0, 0] = torch.nan
    for step in range(100 if backend.name == "cpp" else 12):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            value, gradient = run(backend, compiled, *batches[step % len(batches)])
        expected = run(backend, eager, *batches[step % len(batches)])
        torch.testing.assert_close((value, gradient), expected, rtol=0, atol=0, equal_nan=True)
        assert_same_state(buffers(module), buffers(eager))
    assert counter.frame_count == 1 and module.acc_sum.any()


def test_functional_state_is_returned_only_where_it_is_given(backend, generator):
    logits, labels = (value.to(backend.device) for value in CLASSIFICATION.draw(GHMSample("state", form="index"), generator).arguments)
    zeros = torch.zeros(10, device=backend.device)
    with use_backend(backend.name):
        plain = ghm_classification_loss(logits, labels)
        with_sum = ghm_classification_loss(logits, labels, acc_sum=zeros, momentum=0.5)
        with_both = ghm_classification_loss(logits, labels, acc_sum=zeros, momentum=0.5, num_updates=zeros.long())
    assert plain.shape == () and with_sum._fields == ("loss", "acc_sum")
    assert with_both._fields == ("loss", "acc_sum", "num_updates")
    assert torch.equal(with_sum.acc_sum, with_both.acc_sum) and with_sum.acc_sum.dtype == torch.float32
    torch.testing.assert_close(with_sum.loss, 2 * plain)
    torch.testing.assert_close(with_both.loss, plain)


def test_state_without_momentum_is_that_of_the_batch(backend, generator):
    for loss in (CLASSIFICATION, REGRESSION):
        arguments = drawn(backend, loss, generator)
        options = {"acc_sum": torch.full((10,), 5.0), "num_updates": torch.full((10,), 3)}
        got = loss.evaluate(backend, *arguments, **options)
        truth = loss.truth(*(value.cpu() for value in arguments), **options)
        assert got.losses[0] == loss.evaluate(backend, *arguments).losses[0]
        assert_state(got.statistics, truth, options)
        assert torch.equal(got.statistics[0].long(), truth.counts) and (got.statistics[1] == 3).all()


@LOSSES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_of_nan_leaves_no_trace(backend, loss, generator, reduction):
    pred, target = torch.randn((6, 4), generator=generator), (torch.rand((6, 4), generator=generator) < 0.3).float()
    results = []
    for weight in (0.0, float("nan")):
        weights = torch.ones(6, 4)
        weights[2, 1] = weight
        results.append(run(backend, loss.module(reduction=reduction), pred, target, weights))
    for got, wanted in zip(*results, strict=True):
        assert got.isfinite().all() and torch.equal(got, wanted)
