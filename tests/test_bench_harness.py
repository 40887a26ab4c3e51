"""The benchmark's own instruments: figures that would be wrong without anybody noticing."""
import copy
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from bench import harness, plot, report, results  # noqa: E402
from bench.logits import Case, make_inputs  # noqa: E402


def test_quartiles_and_paired_ratio():
    ours, theirs = harness.Timing([1.0, 2.0, 3.0, 4.0, 5.0]), harness.Timing([2.0, 8.0, 30.0])
    assert ours.quartiles == (2.0, 3.0, 4.0)
    assert harness.Timing([7.0]).quartiles == (7.0, 7.0, 7.0)
    # Round by round 0.5, 0.25, 0.1; the ratio of the medians would be 3 / 8.
    assert ours.ratio_to(theirs) == 0.25
    assert ours.ratio_to(harness.Timing(failure="broken")) is None


def test_workloads_take_turns_and_prepare_is_not_timed():
    calls = []
    workloads = [
        harness.Workload("fast", lambda: calls.append("fast")),
        harness.Workload("slow", lambda: (calls.append("slow"), time.sleep(0.02)), prepare=lambda: time.sleep(0.05)),
        harness.Workload("broken", lambda: [][0]),
    ]
    timings = harness.measure(workloads, "cpu", budget=0.1, max_repetitions=4)
    assert timings["broken"].failure.startswith("IndexError") and not timings["broken"].samples
    assert len(timings["fast"].samples) == 4
    assert 1 <= len(timings["slow"].samples) <= 4
    assert min(timings["slow"].samples) >= 0.02
    # The rounds alternate in order: after the warm-up fast, slow, slow, fast, ...
    assert "".join(name[0] for name in calls[-8:]).count("ss") >= 1


MEMORY_PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from bench import harness
torch.ones(4).add_(1)
def call():
    scratch = torch.ones(3 << 20)  # 12 MiB, gone before the next line
    del scratch
    return torch.ones(5 << 20)     # 20 MiB
print(harness.peak_extra_bytes(call, "cpu"))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_peak_memory_counts_what_was_held_at_once():
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(ROOT)]
    done = subprocess.run(command, env=os.environ | harness.MEMORY_ENVIRONMENT, capture_output=True, text=True, check=True)
    mebibytes = int(done.stdout) / 2**20
    assert 19.9 < mebibytes < 21.5


@pytest.mark.parametrize("form", ["dense", "index"])
@pytest.mark.parametrize("distribution", ["init", "trained", "separated"])
def test_inputs_hold_what_the_case_says(form, distribution):
    case = Case(distribution, 30, 12000, form, seed=4)
    inputs, again = make_inputs(case), make_inputs(case)
    assert torch.equal(inputs.logits, again.logits) and torch.equal(inputs.targets, again.targets)
    is_positive = inputs.dense > 0
    assert int(is_positive.sum()) == 30 and inputs.dense.max() <= 1
    if form == "index":
        rows, columns = is_positive.nonzero(as_tuple=True)
        assert inputs.targets.shape == (151,) and inputs.logits.shape == (151, 80)
        assert torch.equal(inputs.targets[rows], columns) and int((inputs.targets == 80).sum()) == 121
        assert torch.equal(inputs.quality[rows], inputs.dense[is_positive])
    centre = {"init": -4.6, "trained": 0.0, "separated": 0.0}[distribution]
    assert abs(inputs.logits[is_positive].mean() - centre) < 1.2
    assert inputs.logits[~is_positive].mean() < -4.4


def record(provider, positives, negatives, median):
    fields = {"distribution": "trained", "positives": positives, "negatives": negatives, "elements": positives + negatives}
    fields |= {"form": "dense", "dtype": "float32", "device": "cpu", "max_positives": None}
    fields |= {"provider": provider, "skipped": None}
    fields |= {"mode": "full", "timing": "call", "median_ms": median, "q1_ms": median, "q3_ms": median, "repetitions": 5}
    return fields | {"ns_per_element": 1.0, "moved_bytes": 8, "gb_per_s": 1.0, "ratio_to_floor": 1.5, "ratio_to_focal": None}


SETTINGS = {"date": "2000-01-01", "threads": 2, "seed": 0, "budget_s": 0.5, "foreign_load": 0.0, "cache": "cold"}


@pytest.fixture
def folder(tmp_path):
    records = [record("bucketed", p, n, 1.25 * n / 1000) for p, n in ((10, 1000), (10, 2000), (20, 2000), (30, 2000))]
    speed = {"settings": SETTINGS, "records": records}
    results.update(tmp_path / "results" / "box", "rank_sort", harness.machine("cpu"), {"speed": speed})
    return tmp_path


def test_results_keep_the_other_sections_of_the_same_machine_only(folder):
    box, machine = folder / "results" / "box", harness.machine("cpu")
    results.update(box, "rank_sort", machine, {"targets": {"settings": SETTINGS, "records": []}})
    assert set(results.read(box / "rank_sort.json")["sections"]) == {"speed", "targets"}
    results.update(box, "rank_sort", machine | {"torch": "0.0"}, {"targets": {"settings": SETTINGS, "records": []}})
    assert set(results.read(box / "rank_sort.json")["sections"]) == {"targets"}


def test_results_outside_the_schema_are_refused(folder):
    path = folder / "results" / "box" / "rank_sort.json"
    document = json.loads(path.read_text())
    for spoil in (
        lambda it: it["sections"]["speed"]["records"][0].pop("median_ms"),
        lambda it: it["sections"]["speed"]["records"][0].update(median_ms="fast"),
        lambda it: it["sections"]["speed"]["settings"].update(remark=""),
        lambda it: it.update(schema=0),
    ):
        spoiled = copy.deepcopy(document)
        spoil(spoiled)
        with pytest.raises(ValueError, match="results: "):
            results.validate(spoiled)


def test_report_notices_a_figure_that_no_file_holds(folder):
    readme = folder / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    options = ["--results", str(folder / "results")]
    assert report.main([*options, "--check", str(readme)]) == 1
    report.main([*options, "--write", str(readme)])
    assert "| trained | 20 | 2,000 | dense | float32 | 2.5 |" in readme.read_text()
    assert report.main([*options, "--check", str(readme)]) == 0
    readme.write_text(readme.read_text().replace("| 2.5 |", "| 2.4 |"))
    assert report.main([*options, "--check", str(readme)]) == 1


def test_plot_follows_the_axis_with_everything_else_fixed(folder):
    path = folder / "results" / "box" / "rank_sort.json"
    fixed, lines = plot.series(results.read(path)["sections"]["speed"]["records"], "p")
    assert fixed["negatives"] == 2000 and [x for x, _ in lines["bucketed"]] == [10, 20, 30]
    assert plot.main([str(path)]) == 0
    for axis in "np":
        assert path.with_name(f"rank_sort_time_against_{axis}.png").read_bytes().startswith(b"\x89PNG")
