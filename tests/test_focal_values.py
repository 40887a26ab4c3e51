"""Values and gradients of the element-wise sigmoid losses: the authors' outputs, an oracle on fresh random inputs."""
import golden_vectors
import harness
import pytest
import rsloss_kernels
import torch
from sigmoid_samples import SIGMOID_LOSSES

GRADIENT_GATE = 2e-6
DTYPES = [torch.float64, torch.float32]


def evaluate(backend, loss, logits, *others, **options) -> harness.Evaluation:
    return harness.evaluate(backend, logits, *others, loss=loss, **options)


# --- the authors' outputs ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", golden_vectors.params("focal"))
def test_golden(backend, case, dtype):
    inputs, hyper = case.inputs(), case.hyper
    logits, labels = inputs["pred"].to(dtype), inputs["target"]
    common = {"background": "first", "avg_factor": hyper["normalizer"], "reduction": "sum"}
    focal = evaluate(
        backend, rsloss_kernels.sigmoid_focal_loss, logits, labels, alpha=hyper["alpha"], gamma=hyper["gamma"], **common
    )
    quality = evaluate(backend, rsloss_kernels.quality_focal_loss, logits, labels, inputs["scores"], beta=hyper["gamma"], **common)
    recorded = 0
    for got, implementation in ((focal, "eod"), (focal, "dynrcnn"), (quality, "eod_qfl")):
        wanted = case.outputs(implementation)
        if wanted:
            harness.assert_gates(backend, got, [float(wanted["loss"])], wanted["grad"], implementation, narrow=GRADIENT_GATE)
            recorded += 1
    assert recorded == 3


# --- random inputs ---


@pytest.mark.parametrize(
    "loss, sample",
    [pytest.param(loss, sample, id=f"{loss.name}-{sample.name}") for loss in SIGMOID_LOSSES.values() for sample in loss.samples],
)
def test_samples(backend, loss, generator, sample):
    inputs = loss.draw(sample, generator)
    loss.assert_agrees(backend, *inputs.arguments, label=sample.name, upstream=-0.375, **inputs.options)
