"""The benchmark of smooth L1 loss: its inputs, its results file, and that its accuracy rows can fail."""
import pathlib
import sys

import harness
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import bench_smooth_l1, plot, report, results, run, smooth_l1_problems, targets  # noqa: E402


def test_inputs_and_peer():
    case = smooth_l1_problems.Case(4000, "rows", dtype="float64", seed=3)
    inputs = smooth_l1_problems.make_inputs(case)
    assert inputs.logits.shape == (1000, 4) and 0.2 < inputs.weights.mean() < 0.3
    assert inputs.minimal_bytes() == 8 * (2 * (2 * 4000 + 1000) + 4000)
    is_near = (inputs.logits - inputs.targets).abs() < inputs.beta
    assert 0.75 < is_near.double().mean() < 0.95
    truth, gradient = bench_smooth_l1.LOSS.truth(inputs)
    leaf = inputs.logits.clone().requires_grad_()
    loss = bench_smooth_l1.plain_smooth_l1(leaf, inputs.targets, inputs.weights, inputs.avg_factor)
    harness.assert_within(loss.detach(), truth, 1e-12, "peer")
    harness.assert_within(torch.autograd.grad(loss, leaf)[0], gradient, 1e-14, "gradient of the peer")


def test_benchmark_writes_what_its_readers_take(tmp_path):
    out = tmp_path / "results" / "box"
    options = "--budget 0.01 --seeds 0 --device cpu --threads 1 --metric speed --sizes 400 800".split()
    assert run.main(["smooth_l1", *options, "--out", str(out), "--providers", "reference", "eager"]) == 0
    records = results.read(out / "smooth_l1.json")["sections"]["speed"]["records"]
    assert {record["provider"] for record in records} == {"copy floor", "smooth_l1 [reference]", "smooth L1, eager"}
    assert all(record["median_ms"] > 0 for record in records)
    assert plot.main([str(out / "smooth_l1.json")]) == 0 and (out / "smooth_l1_time_against_n.png").exists()
    text = report.tables(tmp_path / "results")
    assert "**Smooth L1 loss**" in text and "| 800 | dense | float32 |" in text


def test_accuracy_rows_notice_a_wrong_gradient():
    loss = bench_smooth_l1.LOSS
    inputs = smooth_l1_problems.make_inputs(smooth_l1_problems.Case(400))
    value, gradient = loss.truth(inputs)
    of_loss, of_gradient = targets.errors(loss, "reference", inputs, (value, gradient))
    assert of_loss <= 1e-7 and of_gradient <= 2e-6
    assert targets.errors(loss, "reference", inputs, (value * (1 + 1e-5), gradient))[0] > 5e-6
    assert targets.errors(loss, "reference", inputs, (value, gradient * (1 + 1e-5)))[1] > 5e-6
