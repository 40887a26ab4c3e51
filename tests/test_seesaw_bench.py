"""The published form and the truth that the benchmark of Seesaw loss compares to, and its results file."""
import pathlib
import sys

import golden_vectors
import harness
import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import bench_seesaw, plot, report, results, run, seesaw_problems, targets  # noqa: E402
from bench.peers.seesaw import PublishedSeesaw, seesaw_truth  # noqa: E402

# The peer knows neither weights nor divisors.
CASES = [
    case
    for case in golden_vectors.cases("seesaw")
    if (case.hyper["reduction"], case.hyper["avg_factor"], case.hyper["loss_weight"]) == ("mean", "none", 1.0)
    and all(bool((case.inputs()[f"s{number}_label_weight"] == 1).all()) for number in range(case.hyper["steps"]))
]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_published_form_and_truth_equal_golden(case):
    hyper, inputs, wanted = case.hyper, case.inputs(), case.outputs("seesaw")
    powers = {name: hyper[name] for name in ("p", "q", "eps")}
    published = PublishedSeesaw(torch.zeros(hyper["num_classes"] + 1, dtype=torch.float64), **powers)
    for number in range(hyper["steps"]):
        logits, labels = inputs[f"s{number}_pred"].double(), inputs[f"s{number}_target"]
        leaf = logits.clone().requires_grad_()
        losses = published(leaf, labels)
        (gradient,) = torch.autograd.grad(losses, leaf)
        *truth, of_truth = seesaw_truth(logits, labels, published.counts, **powers)
        for got, value, name in zip(losses, truth, ("obj", "cls"), strict=True):
            recorded = wanted[f"s{number}_loss_{name}"]
            harness.assert_within(got.detach(), recorded, 1e-11, name)
            harness.assert_within(value, recorded, 1e-11, f"truth of {name}")
        recorded = wanted.get(f"s{number}_grad")
        if recorded is not None:
            harness.assert_within(gradient, recorded, 1e-11, "gradient")
            harness.assert_within(of_truth, recorded, 1e-11, "gradient of the truth")
        assert torch.equal(published.counts, wanted[f"s{number}_cum_samples_after"].double())


def test_inputs_hold_what_the_case_says():
    inputs = seesaw_problems.make_inputs(seesaw_problems.Case(4000, seed=3))
    assert inputs.logits.shape == (4000, 1205) and inputs.counts.shape == (1204,)
    assert 0.2 < (inputs.labels < 1203).float().mean() < 0.3 and inputs.labels.max() == 1203 and inputs.labels.min() >= 0
    assert inputs.counts.min() == 1 and 15_000 < inputs.counts.max() < 22_100
    assert inputs.minimal_bytes() == 3 * 4000 * 1205 * 4 + 2 * 4000 * 8


def test_benchmark_writes_what_its_readers_take(tmp_path):
    out = tmp_path / "results" / "box"
    options = "--budget 0.01 --seeds 0 --device cpu --threads 1 --metric speed --rows 8 16".split()
    assert run.main(["seesaw", *options, "--out", str(out), "--providers", "reference", "published", "plain"]) == 0
    records = results.read(out / "seesaw.json")["sections"]["speed"]["records"]
    names = {"copy floor", "seesaw [reference]", "published Seesaw", "plain softmax, eager"}
    assert {record["provider"] for record in records} == names and all(record["median_ms"] > 0 for record in records)
    assert plot.main([str(out / "seesaw.json")]) == 0 and (out / "seesaw_time_against_r.png").exists()
    text = report.tables(tmp_path / "results")
    assert "**Seesaw loss**" in text and "| 16 | 1,203 | float32 |" in text


def test_accuracy_rows_notice_a_wrong_gradient():
    loss = bench_seesaw.LOSS
    inputs = seesaw_problems.make_inputs(seesaw_problems.Case(12))
    *values, gradient = loss.truth(inputs)
    of_loss, of_gradient = targets.errors(loss, "reference", inputs, (*values, gradient))
    assert of_loss <= 1e-7 and of_gradient <= 2e-6
    assert targets.errors(loss, "reference", inputs, (values[0], values[1] * (1 + 1e-5), gradient))[0] > 5e-6
    assert targets.errors(loss, "reference", inputs, (*values, gradient * (1 + 1e-5)))[1] > 5e-6
