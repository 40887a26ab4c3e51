"""Seesaw loss: the authors' outputs step by step, the truth on fresh random inputs, edge cases, state, bad input, operators."""
import copy
import math

import golden_vectors
import harness
import mmdet_losses
import pytest
import torch
from rsloss_kernels import SeesawLoss, _library, seesaw_loss, use_backend
from seesaw_samples import GRADIENT_GATE, OPERATORS, Inputs, draw, evaluate, truth

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Keyword arguments of `draw` by name.
SAMPLES = {
    "default": {},
    "one_class": {"classes": 1},
    "one_row": {"rows": 1, "weight": False},
    "many_classes": {"classes": 300, "rows": 9},
    "many_rows": {"rows": 700, "classes": 3},
    "sure_and_right": {"right": 18.0, "spread": 0.1},
    "surest": {"right": 90.0, "spread": 0.1, "weight": False},
    "sure_and_wrong": {"right": -30.0},
    "wide": {"spread": 300.0},
    "no_mitigation": {"p": 0.0},
    "no_compensation": {"q": 0.0},
    "other_powers": {"p": 1.5, "q": 0.7, "eps": 0.3},
    "eps_0": {"eps": 0.0},
}
SMALL = {"rows": 5, "classes": 3, "weight": False}


pytestmark = pytest.mark.implemented("seesaw_forward")


def module_of(hyper: dict) -> SeesawLoss:
    names = ("num_classes", "p", "q", "eps", "loss_weight", "reduction")
    return SeesawLoss(**{name: hyper[name] for name in names})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", golden_vectors.params("seesaw"))
def test_golden(backend, case, dtype):
    hyper, inputs, wanted = case.hyper, case.inputs(), case.outputs("seesaw")
    module = module_of(hyper).to(backend.device)
    avg_factor = None if hyper["avg_factor"] == "none" else hyper["avg_factor"]
    for number in range(hyper["steps"]):
        pred, labels, weight = (inputs[f"s{number}_{name}"].to(backend.device) for name in ("pred", "target", "label_weight"))
        leaf = pred.to(dtype).requires_grad_()
        if case.crashed:
            with pytest.raises(ValueError, match="avg_factor must be None with reduction 'sum'"):
                module(leaf, labels, weight, avg_factor)
            return
        with use_backend(backend.name):
            losses = module(leaf, labels, weight, avg_factor)
        (gradient,) = torch.autograd.grad([loss.sum() for loss in losses.values()], leaf)
        # Not of every step where there are many classes.
        truth_gradient = wanted.get(f"s{number}_grad", gradient.cpu())
        recorded = [wanted[f"s{number}_loss_{name}"] for name in ("obj", "cls")]
        got = [losses[f"loss_cls_{name}"].detach().cpu() for name in ("objectness", "classes")]
        if hyper["reduction"] == "none":
            # Theirs are of foreground rows alone.
            is_foreground = labels.cpu() < hyper["num_classes"]
            assert not got[1][~is_foreground].any()
            got[1] = got[1][is_foreground]
            gate = backend.loss_gate(dtype)
            for value, truth_value in zip(got, recorded, strict=True):
                harness.assert_within(value, truth_value, gate * truth_value + harness.NOISE, case.name)
            harness.assert_gradient(backend, gradient.cpu(), truth_gradient, case.name, harness.NOISE, GRADIENT_GATE)
        else:
            evaluation = harness.Evaluation(tuple(got), gradient.cpu())
            values = [float(value) for value in recorded]
            gates = {"noise": harness.NOISE, "narrow": GRADIENT_GATE}
            harness.assert_gates(backend, evaluation, values, truth_gradient, case.name, **gates)
        assert torch.equal(module.cum_samples.cpu(), wanted[f"s{number}_cum_samples_after"].double())
    assert any(f"s{number}_grad" in wanted for number in range(hyper["steps"]))
    scores = module.get_activation(leaf.detach().double()).cpu()
    harness.assert_within(scores, wanted["activation_last"], 1e-12, case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(backend, name, dtype, generator):
    """Losses of single rows to 3e-8, their sums and gradients to the gates."""
    inputs = draw(generator, dtype=dtype, **SAMPLES[name])
    rows, gradient = truth(inputs, (0.7, -1.3))
    inputs.options["reduction"] = "sum"
    got = evaluate(backend, inputs, (0.7, -1.3))
    harness.assert_gates(backend, got, rows.sum(1).tolist(), gradient, name, narrow=GRADIENT_GATE)
    weight = inputs.weight if inputs.weight is None else inputs.weight.to(backend.device)
    others = (inputs.labels.to(backend.device), weight, inputs.counts[:-1].double().clamp(min=1).log().to(backend.device))
    powers = [inputs.options.get(key, default) for key, default in (("p", 0.8), ("q", 2.0), ("eps", 1e-2))]
    of_rows = _library.operator("seesaw_forward", backend.name)(inputs.logits.to(backend.device), *others, *powers, 0, None)
    losses = torch.stack(of_rows[:2])
    gate = backend.loss_gate(dtype) if dtype == torch.float64 else 3e-8
    harness.assert_within(losses.cpu(), torch.from_numpy(rows), gate * torch.from_numpy(rows).abs() + 1e-300, name)


def test_reductions(backend, generator):
    inputs = draw(generator, dtype=torch.float64)
    rows = torch.from_numpy(truth(inputs)[0])
    used = int((inputs.labels >= 0).sum())
    foreground = int(((inputs.labels >= 0) & (inputs.labels < 7)).sum())
    for options, wanted in (
        ({}, rows.sum(1) / torch.tensor([used, foreground])),
        ({"avg_factor": 12.5}, rows.sum(1) / 12.5),
        ({"avg_factor": torch.tensor(4, device=backend.device)}, rows.sum(1) / 4),
        ({"reduction": "none"}, rows),
    ):
        inputs.options = options
        got = evaluate(backend, inputs)
        torch.testing.assert_close(torch.stack(got.losses), wanted, rtol=1e-9, atol=1e-300)


def test_upstream_of_single_rows(backend, generator):
    inputs = draw(generator, dtype=torch.float64, reduction="none")
    upstream = torch.randn((2, 30), generator=generator, dtype=torch.float64)
    of_objectness, of_classes = truth(inputs, (1.0, 0.0))[1], truth(inputs, (0.0, 1.0))[1]
    got = evaluate(backend, inputs, tuple(upstream))
    harness.assert_gradient(backend, got.gradient, of_objectness * upstream[0, :, None] + of_classes * upstream[1, :, None])


def test_powers_of_0_are_a_softmax(backend, generator):
    inputs = draw(generator, dtype=torch.float64, weight=False, p=0.0, q=0.0)
    got = evaluate(backend, inputs)
    is_foreground = (inputs.labels >= 0) & (inputs.labels < 7)
    wanted = torch.nn.functional.cross_entropy(inputs.logits[is_foreground, :-2], inputs.labels[is_foreground])
    torch.testing.assert_close(got.losses[1], wanted, rtol=1e-12, atol=0)


def test_nothing_and_no_foreground(backend):
    for labels in ([], [-1, -5], [3, 7], [3, -1]):
        labels = torch.tensor(labels, dtype=torch.int64)
        inputs = Inputs(torch.full((len(labels), 5), 0.5), labels, torch.zeros(4))
        got = evaluate(backend, inputs)
        has_background = bool((labels >= 0).any())
        assert got.losses[1] == 0 and not got.gradient[:, :3].any()
        assert float(got.losses[0]) == (pytest.approx(math.log(2)) if has_background else 0.0)
        assert bool(got.gradient.any()) == has_background


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_where_nothing_is_read(backend, generator, poison):
    """Ignored rows, rows of weight 0, and the class logits of background."""
    inputs = draw(generator)
    # Whatever is drawn.
    inputs.labels[0], inputs.labels[1], inputs.weight[2] = -1, 7, 0.0
    is_dropped = (inputs.labels < 0) | (inputs.weight == 0)
    clean = evaluate(backend, inputs)
    inputs.logits[is_dropped] = poison
    inputs.logits[inputs.labels >= 7, :7] = poison
    assert evaluate(backend, inputs) == clean
    assert not clean.gradient[is_dropped].any()


def test_poison_stays_in_its_row_and_loss(backend, generator):
    for column, poison in ((1, math.nan), (1, math.inf), (0, -math.inf), (3, math.nan), (4, math.inf), (3, -math.inf)):
        inputs = draw(generator, **SMALL)
        inputs.labels = torch.tensor([1, 0, 2, 3, 0])
        clean = evaluate(backend, inputs)
        inputs.logits[1, column] = poison
        got = evaluate(backend, inputs)
        broken = slice(0, 3) if column < 3 else slice(3, 5)
        assert got.losses[int(column < 3)].isnan() and got.losses[int(column >= 3)] == clean.losses[int(column >= 3)]
        assert got.gradient[1, broken].isnan().all()
        clean.gradient[1, broken] = got.gradient[1, broken] = 0.0
        assert torch.equal(got.gradient, clean.gradient)


def test_minus_infinity_is_a_probability_of_0(backend, generator):
    inputs = draw(generator, **SMALL)
    inputs.labels = torch.tensor([1, 0, 2, 3, 0])
    inputs.logits[0, 2], inputs.logits[1, 4], inputs.logits[3, 3] = -math.inf, -math.inf, -math.inf
    rows, gradient = truth(inputs)
    got = evaluate(backend, inputs)
    harness.assert_gates(backend, got, (rows.sum(1) / [5, 4]).tolist(), gradient / torch.tensor([4.0] * 3 + [5.0] * 2), narrow=GRADIENT_GATE)
    assert got.gradient[0, 2] == 0 and got.losses[0].isfinite()


@pytest.mark.parametrize("name", sorted(set(_library.BACKENDS) - set(_library.implemented_by("seesaw_forward"))))
def test_a_backend_without_kernels_refuses(name):
    with use_backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' was asked for but cannot run seesaw_forward"):
        seesaw_loss(torch.zeros(2, 5), torch.tensor([0, 3]), torch.zeros(4))


def test_the_same_bits_every_time(backend, generator):
    inputs = draw(generator, rows=300, classes=20)
    first = evaluate(backend, inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert evaluate(backend, inputs) == first
    finally:
        torch.set_num_threads(threads)


def test_inputs_are_left_alone_and_double_backward_is_refused(backend, generator):
    inputs = draw(generator)
    before = copy.deepcopy(inputs)
    evaluate(backend, inputs)
    assert all(torch.equal(getattr(inputs, name), getattr(before, name)) for name in ("logits", "labels", "counts", "weight"))
    leaf = inputs.logits.to(backend.device).requires_grad_()
    with use_backend(backend.name):
        losses = seesaw_loss(leaf, inputs.labels.to(backend.device), inputs.counts.to(backend.device))
    (gradient,) = torch.autograd.grad(losses.classes, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype, generator):
    inputs = draw(generator, dtype=dtype, **SMALL)
    args = [value.to(backend.device) for value in (inputs.labels, inputs.counts[:-1].double().clamp(min=1).log())]
    logits = inputs.logits.to(backend.device)
    forward, backward = (_library.operator(name, backend.name) for name in OPERATORS)
    weight = torch.rand(5, device=backend.device)
    rows = (logits.detach(), args[0], None, args[1])
    avg_factor = torch.tensor(3.0, dtype=torch.float64, device=backend.device)
    for reduction, factor in ((0, None), (1, None), (1, avg_factor), (2, None)):
        torch.library.opcheck(forward, (logits.requires_grad_(), args[0], weight, args[1], 0.8, 2.0, 0.01, reduction, factor))
        objectness, classes, *tables = forward(*rows, 0.8, 2.0, 0.01, reduction, factor)
        torch.library.opcheck(backward, (*rows, *tables, objectness, None if reduction == 2 else classes, 0.8, 2.0))


def test_compile(backend, generator):
    """The module in one graph for any number of rows; its counts change in it."""
    module = SeesawLoss(7).to(backend.device)
    eager = copy.deepcopy(module)
    step = torch.compile(lambda *args: sum(module(*args).values()), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (30, 41):
        inputs = draw(generator, rows=rows, weight=False)
        leaf, labels = inputs.logits.to(backend.device).requires_grad_(), inputs.labels.to(backend.device)
        with use_backend(backend.name):
            wanted = torch.autograd.grad(sum(eager(leaf, labels).values()), leaf)
            assert torch.equal(torch.autograd.grad(step(leaf, labels), leaf)[0], wanted[0])
        assert torch.equal(module.cum_samples, eager.cum_samples) and module.cum_samples.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_beside_mmdetection(backend, reduction, generator):
    """Three steps of their module and ours, constructed alike; ours loads their checkpoint."""
    options = {"num_classes": 7, "p": 0.9, "q": 1.5, "eps": 0.02, "loss_weight": 0.5, "reduction": reduction, "use_sigmoid": False}
    theirs, ours = mmdet_losses.load("seesaw_loss").SeesawLoss(**options), SeesawLoss(**options).to(backend.device)
    assert ours.get_cls_channels(7) == theirs.get_cls_channels(7) == 9
    for _ in range(3):
        inputs = draw(generator, dtype=torch.float64)
        labels = inputs.labels.clamp(0, 7)
        ours.load_state_dict(theirs.state_dict())
        leaves = [inputs.logits.clone().requires_grad_(), inputs.logits.to(backend.device).requires_grad_()]
        wanted = theirs(leaves[0], labels, inputs.weight)
        with use_backend(backend.name):
            got = ours(leaves[1], labels.to(backend.device), inputs.weight.to(backend.device))
        assert got.keys() == wanted.keys() and torch.equal(ours.cum_samples.cpu(), theirs.cum_samples.double())
        for losses in (wanted, got):
            sum(losses.values()).backward()
        # They compute the factors from counts in float32.
        for name, value in wanted.items():
            torch.testing.assert_close(got[name].cpu(), value, rtol=1e-6, atol=0, check_dtype=False)
        torch.testing.assert_close(leaves[1].grad.cpu(), leaves[0].grad, rtol=1e-5, atol=1e-7)
        accuracy = ours.get_accuracy(leaves[1].detach(), labels.to(backend.device))
        for name, value in theirs.get_accuracy(leaves[0].detach(), labels).items():
            torch.testing.assert_close(accuracy[name].cpu(), value, check_dtype=False)
