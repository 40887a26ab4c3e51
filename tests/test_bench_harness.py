"""The benchmark's own instruments: figures that would be wrong without anybody noticing."""
import copy
import importlib
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

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from bench import (  # noqa: E402
    bench_bucketed,
    bench_focal,
    bench_ghm,
    focal_problems,
    ghm_problems,
    harness,
    memory,
    plot,
    report,
    results,
    run,
    targets,
)
from bench.logits import Case, make_inputs  # noqa: E402


def test_quartiles_and_paired_ratio():
    ours, theirs = harness.Timing([1.0, 2.0, 3.0, 4.0, 5.0]), harness.Timing([2.0, 8.0, 30.0])
    assert ours.quartiles == (2.0, 3.0, 4.0)
    assert harness.Timing([7.0]).quartiles == (7.0, 7.0, 7.0)
    # Round by round 0.5, 0.25, 0.1; the ratio of the medians would be 3 / 8.
    assert ours.ratio_to(theirs) == 0.25
    assert ours.ratio_to(harness.Timing(failure="broken")) is None


def test_figures_over_draws_are_medians_of_each_draw():
    ours = harness.Draws([harness.Timing([1.0]), harness.Timing([2.0, 4.0, 6.0]), harness.Timing([9.0])])
    theirs = harness.Draws([harness.Timing([2.0]), harness.Timing([8.0, 8.0, 8.0]), harness.Timing([3.0])])
    assert ours.quartiles == (3.0, 4.0, 5.0) and ours.median == 4.0 and len(ours.samples) == 5
    # Draw by draw 1/2, 1/2, 3; pooled it would be the median of 1/2, 1/4, 1/2, 3/4, 3.
    assert ours.ratio_to(theirs) == 0.5
    failed = harness.Draws([harness.Timing([1.0]), harness.Timing(failure="broken")])
    assert failed.failure == "broken" and ours.ratio_to(failed) is None and failed.ratio_to(ours) is None


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
from bench import memory
torch.ones(4).add_(1)
def call():
    scratch = torch.ones(3 << 20)  # 12 MiB, gone before the next line
    del scratch
    return torch.ones(5 << 20)     # 20 MiB
print(memory.peak_extra_bytes(call, "cpu"))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_peak_memory_counts_what_was_held_at_once():
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(ROOT)]
    done = subprocess.run(command, env=os.environ | memory.FREED_ENVIRONMENT, capture_output=True, text=True, check=True)
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
    assert torch.equal(inputs.regression_of_positives, 1 - inputs.dense[is_positive])
    lowest, negatives = inputs.logits[is_positive].min(), inputs.logits[~is_positive]
    assert inputs.relevant(0.5) == pytest.approx(int((negatives >= lowest.double() - 0.5).sum()) / negatives.numel())


@pytest.mark.parametrize("form", ["dense", "index"])
def test_shares_of_the_processes_make_up_the_batch(form):
    inputs = make_inputs(Case("trained", 40, 10_000, form, segments=3))
    assert inputs.logits.shape == (126, 80) and torch.bincount(inputs.segment_ids).tolist() == [42, 42, 42]
    shares = [inputs.share(rank, 4) for rank in range(4)]
    for name in ("logits", "targets", "dense", "regression", "regression_of_positives"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(inputs, name)), name
    assert {share.logits.shape[0] for share in shares} == {32, 30}


SMALL = ["--positives", "20", "--negatives", "2000", "--budget", "0.01", "--seeds", "0", "1", "--metric", "speed", "--device", "cpu"]


@pytest.mark.parametrize("stem", ["rank_sort", "ap", "alrp"])
def test_benchmark_of_a_loss_writes_what_its_readers_take(stem, tmp_path):
    chosen = ["--providers", "reference", "loop", "eager", "--out", str(tmp_path / "results" / "box"), "--threads", "1"]
    segments = ["--segments", "4", "--form", "index"] if stem != "alrp" else []
    assert run.main([stem, *SMALL, *chosen, *segments]) == 0
    document = results.read(tmp_path / "results" / "box" / f"{stem}.json")
    records = document["sections"]["speed"]["records"]
    ours = [record for record in records if "[reference]" in record["provider"]]
    assert len(ours) == (4 if segments else 1) and all(record["median_ms"] > 0 for record in ours)
    assert all(len(record["relevant"]) == 2 and 0 < record["relevant"][0] <= 1 for record in records)
    if segments:
        assert "| S | relevant |" in report.tables(tmp_path / "results")
    else:
        assert any(record["provider"] == "published loop" for record in records)


def test_accuracy_rows_notice_a_wrong_gradient():
    for stem in ("rank_sort", "ap", "alrp"):
        loss = importlib.import_module(f"bench.bench_{stem}").LOSS
        inputs = make_inputs(Case("trained", 30, 3000))
        truth = loss.truth(inputs)
        of_values, of_gradient = targets.errors(loss, "reference", inputs, truth)
        assert of_values < 1e-7 and of_gradient < 1e-6
        for number in range(len(truth)):
            spoiled = list(truth)
            spoiled[number] = truth[number] * (1 + 1e-5)
            assert max(targets.errors(loss, "reference", inputs, spoiled)) > 5e-6


class _CopiedBytes(TorchDispatchMode):
    """Bytes that copies read and write."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.total += 2 * args[0].numel() * args[0].element_size()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("moved, working_set", [(1000, None), (1000, 1000), (1000, 300), (1000, 500), (1000, 2000)])
def test_copy_floor_moves_the_bytes_within_the_working_set(moved, working_set):
    workload = harness.copy_floor(moved, "cpu", working_set)
    with _CopiedBytes() as copied:
        workload.call()
    assert copied.total == moved
    source, target = (cell.cell_contents for cell in workload.call.__closure__ if isinstance(cell.cell_contents, torch.Tensor))
    assert source.numel() + target.numel() == (working_set or moved)


def test_ghm_inputs_hold_what_the_case_says():
    bytes_of = {}
    for form in ("dense", "index", "unweighted"):
        inputs = ghm_problems.make_inputs(ghm_problems.Case("GHM-C", 160_000, 10, form, seed=3))
        assert inputs.logits.shape == inputs.dense.shape == (2000, 80) and set(inputs.dense.unique().tolist()) == {0.0, 1.0}
        assert 100 < int(inputs.dense.sum()) == int(inputs.dense.any(-1).sum()) < 210
        if form == "index":
            assert torch.equal(inputs.targets < 80, inputs.dense.any(-1)) and inputs.weights.shape == (2000,)
            foreground = inputs.targets < 80
            assert torch.equal(inputs.dense[foreground].argmax(-1), inputs.targets[foreground])
        if inputs.weights is not None:
            assert 0.97 < inputs.weights.mean() < 1
        bytes_of[form] = inputs.minimal_bytes(), inputs.working_set()
    # Logits, targets and weights twice, and the gradient; int64 labels and float32 weights by row.
    rows = 2000 * (8 + 4)
    assert bytes_of == {
        "dense": (28 * 160_000, 16 * 160_000),
        "index": (12 * 160_000 + 2 * rows, 8 * 160_000 + rows),
        "unweighted": (20 * 160_000, 12 * 160_000),
    }
    boxes = ghm_problems.make_inputs(ghm_problems.Case("GHM-R", 40_000, 10))
    off = (boxes.logits - boxes.targets).abs()
    assert boxes.logits.shape == (10_000, 4) and 0.02 < off.median() < 0.06 and 0.02 < (off > 0.3).float().mean() < 0.1


def test_benchmark_of_ghm_writes_what_its_readers_take(tmp_path):
    out = tmp_path / "results" / "box"
    common = "--budget 0.01 --seeds 0 1 --device cpu --threads 1 --sizes 2000 4000".split() + ["--out", str(out), "--providers"]
    classes = "--metric speed --form index --momentum 0.75 --bins 10 30".split()
    assert run.main(["ghm", *classes, *common, "reference", "MMDetection", "eager"]) == 0
    document = results.read(out / "ghm.json")
    records = document["sections"]["speed"]["records"]
    assert {record["provider"] for record in records} == {"copy floor", "ghm [reference]", "MMDetection's", "focal, eager"}
    assert len(records) == 16 and all(record["median_ms"] > 0 and record["momentum"] == 0.75 for record in records)
    text = report.tables(tmp_path / "results")
    assert "**GHM losses**" in text and "| loss | logits | N | bins | momentum | targets | type | copy floor |" in text
    assert "| GHM-C | trained | 4,000 | 30 | 0.75 | index | float32 |" in text
    assert plot.main([str(out / "ghm.json")]) == 0
    assert all((out / f"ghm_time_against_{axis}.png").read_bytes().startswith(b"\x89PNG") for axis in "nb")
    boxes = "--metric memory --loss GHM-R --bins 10".split()
    # Memory is measured in a process of its own.
    assert run.main(["ghm", *boxes, *common, "reference", "--sizes", "2000"]) == 0
    sections = results.read(out / "ghm.json")["sections"]
    assert set(sections) == {"speed", "memory"} and len(sections["memory"]["records"]) == 1
    assert {record["loss"] for record in sections["memory"]["records"]} == {"GHM-R"}
    with pytest.raises(SystemExit, match="takes no class indices"):
        run.main(["ghm", "--loss", "GHM-R", "--form", "index"])


@pytest.mark.parametrize("entry", bench_ghm.TARGETS.accuracy)
def test_accuracy_rows_of_ghm_notice_a_wrong_gradient(entry):
    inputs = ghm_problems.make_inputs(ghm_problems.Case(entry[0], 4000, *entry[2:]))
    loss, gradient = bench_ghm.LOSS.truth(inputs)
    of_loss, of_gradient = targets.errors(bench_ghm.LOSS, "reference", inputs, (loss, gradient))
    assert of_loss < 1e-7 and of_gradient < 2e-6
    assert targets.errors(bench_ghm.LOSS, "reference", inputs, (loss * (1 + 1e-5), gradient))[0] > 5e-6
    assert targets.errors(bench_ghm.LOSS, "reference", inputs, (loss, gradient * (1 + 1e-5)))[1] > 5e-6


@pytest.mark.parametrize("entry", bench_focal.TARGETS.accuracy)
def test_accuracy_rows_of_the_element_wise_losses_notice_a_wrong_gradient(entry):
    inputs = focal_problems.make_inputs(focal_problems.Case(entry[0], 40_000, *entry[2:]))
    loss, gradient = bench_focal.LOSS.truth(inputs)
    of_loss, of_gradient = targets.errors(bench_focal.LOSS, "reference", inputs, (loss, gradient))
    assert of_loss < 1e-7 and of_gradient < 2e-6
    assert targets.errors(bench_focal.LOSS, "reference", inputs, (loss * (1 + 1e-5), gradient))[0] > 5e-6
    assert targets.errors(bench_focal.LOSS, "reference", inputs, (loss, gradient * (1 + 1e-5)))[1] > 5e-6


def test_benchmark_of_the_element_wise_losses_writes_what_its_readers_take(tmp_path):
    out = tmp_path / "results" / "box"
    options = "--metric speed --budget 0.01 --seeds 0 --device cpu --threads 1 --sizes 4000 8000 --classes 10".split()
    for kind, others in (("EFL", {"published EFL", "focal, eager"}), ("EQLv2", {"published EQL v2", "focal, eager"})):
        command = ["focal", "--loss", kind, *options, "--out", str(out), "--providers", "reference", "published", "eager"]
        assert run.main(command) == 0
        records = results.read(out / "focal.json")["sections"]["speed"]["records"]
        assert {record["provider"] for record in records} == {"copy floor", "focal [reference]", *others}
        assert len(records) == 8 and all(record["median_ms"] > 0 and record["loss"] == kind for record in records)
    assert "| EQLv2 | trained | 8,000 | 10 | index | float32 |" in report.tables(tmp_path / "results")
    with pytest.raises(SystemExit, match="takes no dense targets"):
        run.main(["focal", "--loss", "EFL", "--form", "dense", "--out", str(out)])


def test_bucketed_is_exact_for_a_hard_step_only():
    smooth, hard = (bench_bucketed.distance(delta, "trained", 40, 4000, [0, 1]) for delta in (0.5, 0.0))
    assert hard["gradient_largest"] < 1e-12 and hard["ranking_loss"] < 1e-12
    assert smooth["gradient_l2"] > 1e-3 and smooth["gradient_cosine"] < 1 and smooth["ranking_loss"] > 1e-5


def test_readmes_hold_the_committed_results():
    assert report.FILES == [ROOT / "README.md", ROOT / "bench" / "results" / "README.md"]
    assert report.main(["--check"]) == 0


def record(provider, positives, negatives, median):
    fields = {"distribution": "trained", "positives": positives, "negatives": negatives, "elements": positives + negatives}
    fields |= {"form": "dense", "dtype": "float32", "device": "cpu", "max_positives": None, "segments": 1}
    fields |= {"provider": provider, "skipped": None}
    fields |= {"mode": "full", "timing": "call", "median_ms": median, "q1_ms": median, "q3_ms": median, "repetitions": 5}
    fields |= {"relevant": [0.25, 0.75, 0.5]}
    return fields | {"ns_per_element": 1.0, "moved_bytes": 8, "gb_per_s": 1.0, "ratio_to_floor": 1.5, "ratio_to_focal": None}


def test_time_that_the_host_takes_is_foreign(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu 100 0 0 1000 0 0 0 7 0 0\n")
    monkeypatch.setattr(harness.ForeignLoad, "STAT", str(stat))
    load = harness.ForeignLoad()
    # More than the processors of this machine can do in the time until the next line.
    ticks = 10_000 * os.sysconf("SC_CLK_TCK")
    stat.write_text(f"cpu 100 0 0 1000 0 0 0 {7 + ticks} 0 0\n")
    assert load.fraction() > 1
    stat.write_text("cpu 100 0 0 1000\n")
    assert harness.ForeignLoad().fraction() is None


SETTINGS = {"date": "2000-01-01", "threads": 2, "seeds": [0], "budget_s": 0.5, "foreign_load": 0.0, "cache": "cold"}


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


def test_a_file_of_another_schema_is_replaced(folder):
    path = folder / "results" / "box" / "rank_sort.json"
    document = json.loads(path.read_text())
    records = document["sections"]["speed"]["records"]
    kept = {"memory": {"settings": SETTINGS, "records": []}}
    results.update(path.parent, "rank_sort", document["machine"], kept)
    assert set(results.read(path)["sections"]) == {"speed", "memory"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": results.SCHEMA - 1}))
    results.update(path.parent, "rank_sort", document["machine"], {"speed": {"settings": SETTINGS, "records": records}})
    assert set(results.read(path)["sections"]) == {"speed"}


def test_report_notices_a_figure_that_no_file_holds(folder):
    readme = folder / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n")
    options = ["--results", str(folder / "results")]
    assert report.main([*options, "--check", str(readme)]) == 1
    report.main([*options, "--write", str(readme)])
    assert "| trained | 20 | 2,000 | dense | float32 | 0.5 | 2.5 |" in readme.read_text()
    assert report.main([*options, "--check", str(readme)]) == 0
    readme.write_text(readme.read_text().replace("| 2.5 |", "| 2.4 |"))
    assert report.main([*options, "--check", str(readme)]) == 1
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the marks"):
        report.main([*options, "--write", str(readme)])


def test_headlines_are_multiples_of_ours_and_what_does_not_hold(folder):
    box = folder / "results" / "box"
    records = results.read(box / "rank_sort.json")["sections"]["speed"]["records"]
    records += [record("rank_sort_loss [cpp]", 10, 2000, 0.5), record("copy floor", 10, 2000, 0.1)]
    rows = [
        {"target": name, "limit": limit, "aim": aim, "unit": "MiB", "got": got, "passed": aim is not None or got <= 1, "note": None}
        for name, limit, aim, got in (("small", 1.0, None, 0.5), ("large", 1.0, None, 2.0), ("near", None, 3.0, 2.0), ("far", None, 3.0, 4.0))
    ]
    sections = {"speed": {"settings": SETTINGS, "records": records}, "targets": {"settings": SETTINGS, "records": rows}}
    for stem in ("rank_sort", "ap", "another"):
        results.update(box, stem, harness.machine("cpu"), sections)
    text = report.headlines(folder / "results")
    titles = [line.split("**")[1] for line in text.splitlines() if line.startswith("**")]
    assert titles == ["Rank & Sort loss", "AP loss", "another"]
    assert "| trained | 10 | 2,000 | dense | float32 | 0.5 | 5 x |" in text and "copy floor" not in text
    assert "| trained | 20 | 2,000 | dense | float32 | - | - |" in text
    assert "1 of 2 rows that must hold do, 1 of 2 aims are met. The others:" in text
    assert "| large | 2 MiB | 1 | FAIL |" in text and "| far | 4 MiB | aim 3 | missed |" in text
    assert "small" not in text and "near" not in text


def test_plot_follows_the_axis_with_everything_else_fixed(folder):
    path = folder / "results" / "box" / "rank_sort.json"
    fixed, lines = plot.series("rank_sort", results.read(path)["sections"]["speed"]["records"], "p")
    assert fixed["negatives"] == 2000 and [x for x, _ in lines["bucketed"]] == [10, 20, 30]
    assert plot.main([str(path)]) == 0
    for axis in "np":
        assert path.with_name(f"rank_sort_time_against_{axis}.png").read_bytes().startswith(b"\x89PNG")
    # Nothing varies in the number of segments.
    assert not path.with_name("rank_sort_time_against_s.png").exists()
    several = [record("x [cpp], chunks", 10, 1000, 1.0) | {"segments": count} for count in (2, 8, 64)]
    fixed, lines = plot.series("rank_sort", results.read(path)["sections"]["speed"]["records"] + several, "s")
    assert [x for x, _ in lines["x [cpp], chunks"]] == [2, 8, 64] and list(lines) == ["x [cpp], chunks"]
