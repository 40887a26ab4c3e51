"""bench/gpu_variants.py and bench/gpu_latency.py where there is no GPU: what they compare and tell, on the emulated kernels."""
import json
import pathlib
import sys
from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import build

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import gpu_latency, gpu_variants, harness, targets  # noqa: E402
from bench.logits import Case, make_inputs  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the programs themselves run there")
SMALL = Case("trained", 60, 3000, "dense", max_positives=64)


@pytest.fixture(scope="module")
def setter():
    build.load_emulated_cuda()
    return gpu_variants.find_setter()


@pytest.mark.parametrize("program", [gpu_variants, gpu_latency])
def test_programs_say_that_there_is_no_device(program, capsys):
    assert program.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_gives_the_same_bits_and_the_truth(dtype, setter):
    verdicts = gpu_variants.compare_ways(setter, make_inputs(replace(SMALL, dtype=dtype)))
    assert verdicts == dict.fromkeys(gpu_variants.WAYS)


def test_ways_that_differ_are_told_and_never_recommended(setter, monkeypatch, capsys, tmp_path):
    evaluate = gpu_variants._evaluate

    def slightly_off(setter, options, inputs):
        *losses, gradient = evaluate(setter, options, inputs)
        return *losses, gradient + (1e-9 if options.most_replicas == 4 else 0)

    def timings(workloads, device, budget, capture, cold):
        assert device == "cuda" and capture
        return {workload.name: harness.Timing([number + 1.0] * 3) for number, workload in enumerate(workloads)}

    monkeypatch.setattr(gpu_variants, "_evaluate", slightly_off)
    monkeypatch.setattr(harness, "measure", timings)
    records = gpu_variants.measure_problem(setter, SMALL, 0.01)
    assert len(records) == 4 * len(gpu_variants.WAYS)
    wrong = {record["way"] for record in records if record["wrong"]}
    assert wrong == {"four replicas", "all three"}
    assert gpu_variants.summary(records) == pytest.approx({"as it is": 1, "early starts": 2, "two blocks of 768": 3})
    gpu_variants.show(records)
    assert "other bits" in capsys.readouterr().out
    # Errors beyond the gates count against all of them.
    monkeypatch.setattr(gpu_variants, "_evaluate", lambda *arguments: tuple(1.001 * part for part in evaluate(*arguments)))
    assert "errors of 1.0e-03" in gpu_variants.compare_ways(setter, make_inputs(SMALL))["as it is"]


def test_rows_of_the_host_and_of_focal(setter, monkeypatch):
    """Every call runs; times are those of the CPU, or made up."""
    monkeypatch.setattr(gpu_latency, "cuda_case", lambda *size, **options: replace(SMALL, positives=10, negatives=500))
    monkeypatch.setattr(gpu_latency, "CALLS", 2)
    monkeypatch.setattr(gpu_latency, "WARM_UPS", 1)
    monkeypatch.setattr(gpu_latency.LOSS.__class__, "why_not", lambda loss, backend, device: None if backend == "cuda" else "off")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness, "captured", lambda workload: workload)

    def timings(workloads, device, budget, capture, cold):
        return {workload.name: harness.Timing([workload.call() and 1e-5] * 3) for workload in workloads}

    monkeypatch.setattr(harness, "measure", timings)
    report = targets.Rows()
    gpu_latency.host_rows(report)
    gpu_latency.focal_rows(report)
    rows = json.loads(json.dumps(report.close()))
    limits = [row["limit"] for row in rows]
    assert limits.count(50.0) == limits.count(90.0) == 1
    assert [row["aim"] for row in rows].count(20.0) == [row["aim"] for row in rows].count(1.3) == 4
    assert [row["passed"] for row in rows if "triton" in row["target"]] == [False, False]
