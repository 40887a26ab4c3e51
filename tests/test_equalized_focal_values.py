"""Values, gradients and sums of EFL, EQFL and EQL v2: the authors' outputs, step by step."""
import golden_vectors
import harness
import pytest
import rsloss_kernels
import torch
from rsloss_kernels import EqualizedFocalLoss, EqualizedQualityFocalLoss, EQLv2Loss, equalized_focal_loss, use_backend
from sigmoid_samples import assert_is_focal_loss

GRADIENT_GATE = 2e-6
DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow_interpreter)]
SEQUENCES = [case for case in golden_vectors.cases("efl") if case.manifest["kind"] != "efl_single"]
SINGLES = [case for case in golden_vectors.cases("efl") if case.manifest["kind"] == "efl_single"]
EQLV2 = [case for case in golden_vectors.cases("eqlv2") if case.manifest["kind"] == "eqlv2_seq"]
EQLV1 = [case for case in golden_vectors.cases("eqlv2") if case.manifest["kind"] == "eqlv1"]
CASES = {"ids": lambda case: case.name}


def step(backend, module, logits, *others, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradient of each level, on the CPU."""
    leaves = [level.to(backend.device).requires_grad_() for level in logits]
    with use_backend(backend.name):
        loss = module(leaves, *others, **options)
    return loss.detach().cpu(), [gradient.cpu() for gradient in torch.autograd.grad(loss, leaves)]


def assert_state(module, wanted: dict, number: int, gate: float) -> None:
    for name in ("pos_grad", "neg_grad", "pos_neg"):
        recorded = wanted[f"s{number}_after_{name}"]
        got = getattr(module, name).cpu()
        assert got.dtype == torch.float64
        harness.assert_within(got, recorded, gate * recorded.abs() + 1e-300, f"step {number} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SEQUENCES, **CASES)
def test_golden_sequences(backend, case, dtype):
    """Levels of several sizes and anchors, classes from 1, as the published hooks collected them after backward."""
    inputs, hyper = case.inputs(), case.hyper
    is_quality = case.manifest["kind"] == "eqfl_seq"
    wanted = case.outputs("eqfl" if is_quality else "efl")
    options = {"loss_weight": hyper["loss_weight"], "reduction": hyper["reduction"], "scale_factor": hyper["scale_factor"]}
    options |= {"gamma": hyper["focal_gamma"], "background": "first", "layout": "anchor_major"}
    # The published number of classes counts the background.
    if is_quality:
        module = EqualizedQualityFocalLoss(hyper["num_classes"] - 1, **options)
    else:
        module = EqualizedFocalLoss(hyper["num_classes"] - 1, alpha=hyper["focal_alpha"], **options)
    module.to(backend.device)
    gate = backend.loss_gate(dtype) if dtype == torch.float64 else GRADIENT_GATE
    for number in range(hyper["steps"]):
        levels = [inputs[f"s{number}_level{level}"].to(dtype) for level in range(hyper["fpn_levels"])]
        labels, normalizer = inputs[f"s{number}_target"].to(backend.device), float(inputs[f"s{number}_normalizer"])
        target = (labels, inputs[f"s{number}_scores"].to(backend.device)) if is_quality else labels
        is_divided = normalizer == normalizer and hyper["reduction"] == "mean"
        loss, gradients = step(backend, module, levels, target, avg_factor=normalizer if is_divided else None)
        recorded = [wanted.get(f"s{number}_grad_level{level}") for level in range(len(levels))]
        truth = [given if value is None else value for value, given in zip(recorded, gradients, strict=True)]
        got = harness.Evaluation((loss,), torch.cat([value.flatten() for value in gradients]))
        # The state that came in has float32's errors from the steps before.
        noise = 0.0 if number == 0 or dtype == torch.float64 else 1e-6 * float(wanted[f"s{number}_loss"])
        joined = torch.cat([value.flatten() for value in truth])
        harness.assert_gates(backend, got, [float(wanted[f"s{number}_loss"])], joined, f"step {number}", noise, GRADIENT_GATE)
        assert_state(module, wanted, number, 2 * gate)
    assert number + 1 == hyper["steps"] and any(value is not None for value in recorded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SINGLES, **CASES)
def test_golden_single_steps(backend, case, dtype):
    inputs, hyper = case.inputs(), case.hyper
    wanted = case.outputs("efl")
    pred, labels, pos_neg = (inputs[name] for name in ("pred", "target", "pos_neg"))
    if hyper["reduction"] == "none":
        module = EqualizedFocalLoss(hyper["num_classes"] - 1, reduction="none", background="first").to(backend.device)
        module.pos_neg.copy_(pos_neg)
        leaf = pred.to(backend.device, dtype).requires_grad_()
        with use_backend(backend.name):
            losses = module(leaf, labels.to(backend.device))
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        losses = losses.detach().cpu()
        assert losses.shape == pred.shape and not losses[labels < 0].any()
        # The original leaves ignored rows out.
        gate = backend.gradient_gate(dtype, GRADIENT_GATE) * wanted["loss"].max()
        harness.assert_within(losses[labels >= 0], wanted["loss"], gate, "losses")
        harness.assert_gradient(backend, gradient.cpu(), wanted["grad"], narrow=GRADIENT_GATE)
        return
    options = {"gamma": hyper["focal_gamma"], "alpha": hyper["focal_alpha"], "scale_factor": hyper["scale_factor"]}
    options |= {"avg_factor": hyper["normalizer"], "background": "first", "pos_neg": pos_neg}
    got = evaluate_single(backend, pred.to(dtype), labels, **options)
    if not wanted["loss"].isfinite():
        # Unclamped logarithms of probabilities that rounded to 0.
        assert "saturated" in case.name and got.losses[0].isfinite() and got.gradient.isfinite().all() and got.losses[0] > 100
        return
    harness.assert_gates(backend, got, [float(wanted["loss"])], wanted["grad"], case.name, narrow=GRADIENT_GATE)
    if "posneg1" in case.name:
        del options["pos_neg"], options["scale_factor"]
        focal = harness.evaluate(
            backend, pred.to(dtype), labels, loss=rsloss_kernels.sigmoid_focal_loss, reduction="sum", **options
        )
        assert_is_focal_loss(backend, got, focal)


def evaluate_single(backend, logits, labels, **options) -> harness.Evaluation:
    def loss(*arguments, **rest):
        return equalized_focal_loss(*arguments, **rest).loss

    return harness.evaluate(backend, logits, labels, loss=loss, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EQLV2, **CASES)
def test_golden_eqlv2(backend, case, dtype):
    inputs, hyper, wanted = case.inputs(), case.hyper, case.outputs("eqlv2")
    options = {name: hyper[name] for name in ("gamma", "mu", "alpha", "loss_weight")}
    module = EQLv2Loss(hyper["num_classes"], **options).to(backend.device)
    gate = backend.loss_gate(dtype) if dtype == torch.float64 else GRADIENT_GATE
    for number in range(hyper["steps"]):
        pred, labels = inputs[f"s{number}_pred"].to(dtype), inputs[f"s{number}_target"].to(backend.device)
        loss, (gradient,) = step(backend, module, [pred], [labels])
        truth = wanted.get(f"s{number}_grad", gradient)
        noise = 0.0 if number == 0 or dtype == torch.float64 else 1e-6 * float(wanted[f"s{number}_loss"])
        got = harness.Evaluation((loss,), gradient)
        harness.assert_gates(backend, got, [float(wanted[f"s{number}_loss"])], truth, f"step {number}", noise, GRADIENT_GATE)
        assert_state(module, wanted, number, 2 * gate)
    activation = module.get_activation(pred.to(backend.device)).cpu()
    torch.testing.assert_close(activation.double(), wanted["activation_last"], rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-12)


@pytest.mark.parametrize("case", EQLV1, **CASES)
def test_golden_eqlv1(backend, case):
    """The first equalization loss is cross entropy with weights per element: negatives of rare classes on foreground rows have none."""
    inputs, wanted = case.inputs(), case.outputs("eqlv1")
    pred, labels = inputs["pred"].double(), inputs["target"]
    num_classes = pred.shape[1]
    is_rare = inputs["image_frequency"] < case.hyper["lambda_"]
    one_hot = labels[:, None] == torch.arange(num_classes)
    weight = ~((labels < num_classes)[:, None] & is_rare & ~one_hot)
    options = {"gamma": 0.0, "alpha": -1.0, "reduction": "sum", "avg_factor": len(pred), "weight": weight}
    got = harness.evaluate(backend, pred, labels, loss=rsloss_kernels.sigmoid_focal_loss, **options)
    harness.assert_gates(backend, got, [float(wanted["loss"])], wanted["grad"], case.name)
