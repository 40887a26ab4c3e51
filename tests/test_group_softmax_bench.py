"""The published form and the truth that the benchmark of group softmax compares to, and its results file."""
import pathlib
import sys

import golden_vectors
import harness
import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import bench_group_softmax, group_softmax_problems, plot, report, results, run, targets  # noqa: E402
from bench.peers.group_softmax import PublishedGroupSoftmax, group_softmax_truth  # noqa: E402

CASES = [case for case in golden_vectors.cases("bags") if case.manifest["kind"] == "bags"]


def read(case: golden_vectors.Case) -> tuple[torch.Tensor, list[torch.Tensor], list[tuple[int, int]], dict]:
    arrays = case.inputs()
    mapped = [of_group[arrays["labels"]] for of_group in arrays["label2binlabel"]]
    assert torch.equal(torch.stack(mapped), arrays["group_labels"])
    return arrays["cls_score"].double(), mapped, [tuple(part) for part in arrays["pred_slice"].tolist()], arrays


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_published_form_and_truth_equal_golden(case):
    logits, mapped, slices, arrays = read(case)
    outputs = case.outputs("bags")
    published = PublishedGroupSoftmax(arrays["label2binlabel"], slices, case.hyper["others_sample_ratio"])
    leaf = logits.clone().requires_grad_()
    losses = torch.stack(published.losses(leaf, mapped, list(arrays["group_weights"])))
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    harness.assert_within(losses, outputs["loss_bins"], 1e-12, "losses")
    harness.assert_within(gradient, outputs["grad"], 1e-12, "gradient")
    loss, gradient = group_softmax_truth(logits, mapped, slices, arrays["group_weights"])
    harness.assert_within(loss, outputs["loss_total"], 1e-11, "truth")
    harness.assert_within(gradient, outputs["grad"], 1e-12, "its gradient")
    # numpy's sample is another one, but as large.
    for weight, wanted in zip([published._sample(of_group) for of_group in mapped[1:]], arrays["group_weights"][1:], strict=True):
        assert weight.sum() == wanted.sum()


def test_inputs_hold_what_the_case_says():
    inputs = group_softmax_problems.make_inputs(group_softmax_problems.Case(4000, "instances", seed=3))
    assert inputs.logits.shape == (4000, 1236) and inputs.groups.num_classes == 1230
    shares = [(of_group[inputs.labels] > 0).float().mean().item() for of_group in inputs.maps]
    assert 0.2 < shares[0] < 0.3 and shares[1] < 0.005 and shares[4] > 0.18
    assert inputs.minimal_bytes() == 3 * 4000 * 1236 * 4 + 2 * 4000 * 8


def test_benchmark_writes_what_its_readers_take(tmp_path):
    out = tmp_path / "results" / "box"
    options = "--budget 0.01 --seeds 0 --device cpu --threads 1 --metric speed --rows 8 16".split()
    assert run.main(["group_softmax", *options, "--out", str(out), "--providers", "reference", "published", "plain"]) == 0
    records = results.read(out / "group_softmax.json")["sections"]["speed"]["records"]
    names = {"copy floor", "group_softmax [reference]", "published groups", "plain softmax, eager"}
    assert {record["provider"] for record in records} == names and all(record["median_ms"] > 0 for record in records)
    assert plot.main([str(out / "group_softmax.json")]) == 0 and (out / "group_softmax_time_against_r.png").exists()
    text = report.tables(tmp_path / "results")
    assert "**Balanced group softmax**" in text and "| 16 | even | 8.0 | float32 |" in text


def test_accuracy_rows_notice_a_wrong_gradient():
    loss = bench_group_softmax.LOSS
    inputs = group_softmax_problems.make_inputs(group_softmax_problems.Case(12))
    value, gradient = loss.truth(inputs)
    of_loss, of_gradient = targets.errors(loss, "reference", inputs, (value, gradient))
    assert of_loss <= 1e-7 and of_gradient <= 2e-6
    assert targets.errors(loss, "reference", inputs, (value * (1 + 1e-5), gradient))[0] > 5e-6
    assert targets.errors(loss, "reference", inputs, (value, gradient * (1 + 1e-5)))[1] > 5e-6
