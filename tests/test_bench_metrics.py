"""The benchmark's counts, profiles and rows that must hold: figures that nobody could tell from wrong ones."""
import argparse
import dataclasses
import gzip
import itertools
import json
import mmap
import pathlib
import re
import sys
import warnings

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import bench_rank_sort, counts, element_targets, harness, measures, memory, profiling, report, results, run, targets  # noqa: E402
from bench import bench_focal, bench_ghm, bench_maps, map_problems, ranking_scale, ranking_targets  # noqa: E402
from bench.providers import COMPILED_FOCAL, FOCAL, leaves_of  # noqa: E402

TINY = ["--positives", "8", "--negatives", "400", "--seeds", "0", "--budget", "0.01", "--device", "cpu", "--threads", "1"]


def test_reads_by_the_host_are_those_of_unknown_shape_or_value():
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])

    def reads(call):
        return counts.dispatched(call)[2]

    assert reads(lambda: values.sum().item()) == 1
    assert reads(lambda: bool((values > 0).any())) == 1
    assert reads(lambda: mask.nonzero()) == 1 and reads(lambda: values.masked_select(mask)) == 1
    assert reads(lambda: values[mask]) == 1
    assert reads(lambda: values[torch.tensor([0, 1])]) == 0

    def write(value):
        values[mask] = value

    # One value that is written through a mask is a fill, several go to the places of the mask.
    assert reads(lambda: write(2.0)) == 0 and reads(lambda: write(torch.ones(2))) == 1


def test_operators_below_autograd_are_counted_those_of_the_plain_backend_too():
    leaf = torch.ones(3, requires_grad=True)
    result, operators, _ = counts.dispatched(lambda: (leaf * 2).sum())
    assert operators == 2
    assert counts.dispatched(lambda: torch.autograd.grad(result, leaf))[1] == 3  # of ones_like, expand and mul
    case = bench_rank_sort.LOSS.problems.case("trained", 5, 100)
    inputs = bench_rank_sort.LOSS.problems.make_inputs(case)
    forward = bench_rank_sort.LOSS.forward(inputs, "reference")
    assert counts.dispatched(lambda: forward(inputs.logits))[1] > 20
    if "cpp" in bench_rank_sort.LOSS.backends("cpu"):
        forward = bench_rank_sort.LOSS.forward(inputs, "cpp")
        assert counts.passes(forward, inputs, counts.counter("syncs", "cpu")) == (0, 0)
        assert max(counts.passes(forward, inputs, counts.counter("launches", "cpu"))) < 6


def test_waits_for_the_device_are_the_warnings_of_the_debug_mode(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another matter", stacklevel=1)
        return "result"

    assert counts.waited(call) == ("result", 3) and modes == ["warn", 0]


def test_counts_become_sections_and_tables(tmp_path):
    box = tmp_path / "results" / "box"
    command = ["rank_sort", *TINY, "--providers", "reference", "loop", "focal, torch", "--out", str(box)]
    assert run.main([*command, "--metric", "counts"]) == 0
    document = results.read(box / "rank_sort.json")
    syncs, launches = (document["sections"][name]["records"] for name in ("syncs", "launches"))
    of = {record["provider"]: record for record in syncs}
    ours = "rank_sort_loss [reference]"
    read = {name: record["forward"] for name, record in of.items()}
    assert read[ours] > 0 and of[ours]["backward"] > 0 and read["published loop"] > 8
    assert of["focal, torch.compile"]["skipped"] == counts.COMPILED
    assert {record["counted"] for record in syncs} == {"reads by the host"}
    assert min(record["forward"] for record in launches if record["forward"] is not None) > 8
    text = report.tables(tmp_path / "results")
    assert f"| trained | 8 | 400 | dense | float32 | {read[ours]} + {of[ours]['backward']} | {read['published loop']} + 0 | - |" in text
    assert f"Reads by the host for 408 elements, forward + backward: `{ours}` {read[ours]} + " in report.headlines(tmp_path / "results")
    spoiled = document["sections"]["syncs"]["records"][0]
    spoiled["forward"] = "none"
    with pytest.raises(ValueError, match="syncs.records"):
        results.validate(document)


def test_warm_calls_follow_their_own():
    calls = []
    workloads = [harness.Workload(name, lambda name=name: calls.append(name), lambda name=name: calls.append(name + "'")) for name in "ab"]
    timings = harness.measure(workloads, "cpu", budget=1, max_repetitions=2, cold=False)
    assert [len(timing.samples) for timing in timings.values()] == [2, 2]
    # Prepared and called, again and again: so also in the rounds, the second of which runs backwards.
    block = harness.UNCOUNTED_CALLS + harness.COUNTED_CALLS
    assert "".join(calls).endswith("".join(block * f"{name}'{name}" for name in "abba"))


def test_a_cold_sample_is_one_call_and_a_warm_one_the_median_of_the_counted(monkeypatch):
    def sample(seconds, cold=False):
        clock = itertools.chain.from_iterable((0.0, second) for second in seconds)
        monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
        got = harness._CpuClock(cold).sample(harness.Workload("a", lambda: None))
        assert next(clock, None) is None
        return got

    assert sample([0.09, 0.08, 0.01, 0.05, 0.02, 0.04, 0.03]) == 0.03
    assert sample([0.2]) == 0.2
    assert sample([0.09], cold=True) == 0.09


def test_profile_writes_a_trace_and_the_cost_of_every_operator(tmp_path):
    command = ["rank_sort", *TINY, "--profile", "--providers", "focal, eager"]
    with pytest.raises(SystemExit):
        run.main(command)
    assert run.main([*command, "--out", str(tmp_path)]) == 0
    (table,) = tmp_path.glob("*.md")
    text = table.read_text()
    # Two inputs and one output of 408 floats each.
    assert "| `aten::binary_cross_entropy_with_logits` | 1 |" in text and f"| {3 * 4 * 408:,} |" in text
    with gzip.open(table.with_suffix(".trace.json.gz"), "rt") as file:
        assert any(event.get("name") == "aten::sigmoid" for event in json.load(file)["traceEvents"])


def test_views_and_untouched_memory_move_nothing():
    with profiling.Costs() as costs:
        torch.empty(5).expand(3, 5).t()
        torch.ones(1).expand(1000).sum()
    moved = {name.partition("::")[2]: operator.moved for name, operator in costs.operators.items()}
    assert moved["empty"] == moved["expand"] == moved["t"] == 0
    assert moved["sum"] == 4 + 4


def test_kernels_of_a_trace_stand_below_their_operators():
    figures = {"registers per thread": 40, "shared memory": 1024, "est. achieved occupancy %": 75}
    launch = {"cat": "cpu_op", "name": "aten::mul", "args": {"External id": 7}}
    kernel = {"cat": "kernel", "name": "mul_kernel", "dur": 2.0, "args": {"External id": 7, **figures}}
    events = [launch, kernel, kernel, {"cat": "kernel", "name": "stray", "dur": 1.0, "args": {}}, {"ph": "M"}]
    operators = {"aten::mul": profiling.Operator(calls=2, seconds=9.0, moved=8000)}
    profiling.read_kernels(events, operators)
    assert operators["aten::mul"].seconds == pytest.approx(4e-6)
    text = profiling.table(operators, bandwidth=4e9, calls=2)
    assert "| `aten::mul` | 1 | 2 | 4,000 | 2 | 50 % |  |  |  |\n| - `mul_kernel` | 1 | 2 |  |  |  | 40 | 1024 | 75 |" in text
    assert "| `outside of operators` | 0 | 0.5 | 0 | 0 | - |" in text


def test_an_aim_is_told_and_not_held(capsys):
    rows = targets.Rows()
    rows("speed", targets.Aim(1.4), "x focal", 3.0)
    rows("speed", 1.4, "x focal", 3.0)
    assert [row["passed"] for row in rows.close()] == [True, False]
    assert [(row["target"], row["limit"], row["aim"]) for row in rows.records] == [("speed", None, 1.4), ("speed", 1.4, None)]
    rows("speed", targets.Aim(1.4), "x focal", 1.2)
    rows("speed", None, "x focal", 3.0)
    rows("speed", 1.4, "x focal", 1.2)
    rows("speed", targets.Aim(1.4), "x focal", None)
    assert [targets.verdict(row) for row in rows.records] == ["missed", "FAIL", "met", "told", "pass", "FAIL"]
    told = capsys.readouterr().out
    assert "missed  speed: 3 x focal, aim 1.4" in told and "FAIL    speed: 3 x focal, limit 1.4" in told
    assert targets.summary(rows.records) == "1 of 2 rows that must hold do, 1 of 3 aims are met"
    assert targets.as_aims({"a": 0.5, "b": None}) == {"a": 0.5, "b": None} and isinstance(targets.as_aims({"a": 0.5})["a"], targets.Aim)


def test_outputs_count_as_kept_only_without_page_faults(monkeypatch):
    loss, arguments = bench_rank_sort.LOSS, argparse.Namespace(dtype="float32", device="cpu", seeds=[0], budget=0.1)
    monkeypatch.setattr(type(loss), "why_not", lambda *_: None)
    rows = targets.Rows()
    for faults in (0, 9000):
        told = {loss.name("cpp"): [[1.0, 2.0], 0], COMPILED_FOCAL: [[5.0, 10.0], faults]}
        monkeypatch.setattr(measures, "alone", lambda *_, told=told: told)
        ranking_scale.kept_outputs(loss, arguments, rows)
    assert [(row["got"], row["passed"]) for row in rows.records] == [(0.2, True), (None, False)]
    assert "9000 page faults" in rows.records[1]["note"]


def test_rows_of_time_are_in_their_unit(monkeypatch):
    loss = bench_rank_sort.LOSS
    arguments = argparse.Namespace(dtype="float32", device="cpu", seeds=[0], budget=0.1, cache="cold")
    monkeypatch.setattr(type(loss), "why_not", lambda *_: None)
    asked = []

    def time_draws(arguments, build):
        asked.append((arguments.cache, [workload.name for workload in build(0)]))
        return {"ours": harness.Draws([harness.Timing([50e-6])])}

    monkeypatch.setattr(measures, "time_draws", time_draws)
    monkeypatch.setattr(ranking_scale, "IMPORTS", 1)
    monkeypatch.setattr(ranking_scale, "IMPORT", "print(0.25)")
    rows = targets.Rows()
    ranking_scale.tiny_call(loss, arguments, rows)
    ranking_scale.import_of_the_package(loss, arguments, rows)
    assert [(row["got"], row["unit"], row["passed"]) for row in rows.records] == [(50.0, "us", True), (0.25, "s", True)]
    assert asked == [("warm", ["ours"])] and "P=10 N=1e3" in rows.records[0]["target"] and rows.records[0]["target"].endswith("warm")


def timed_without_a_clock(monkeypatch, ratio):
    def time_case(loss, arguments, case, names, capture=False):
        ours, *others = names
        draws = {name: harness.Draws([harness.Timing([1.0])]) for name in others}
        return draws | {ours: harness.Draws([harness.Timing([ratio])])}, [{"relevant": [0.5]}]

    monkeypatch.setattr(targets, "time_case", time_case)
    for name in ("memory", "accuracy"):
        monkeypatch.setattr(targets, name, lambda *_: None)


def test_limits_hold_for_warm_calls_and_cold_ones_have_aims(monkeypatch):
    timed_without_a_clock(monkeypatch, 0.16)
    arguments = argparse.Namespace(dtype="float32", device="cpu", seeds=[0], budget=0.1, cache="cold")
    monkeypatch.setattr(type(bench_rank_sort.LOSS), "why_not", lambda *_: None)
    promised = dataclasses.replace(bench_rank_sort.TARGETS, scale=())
    of_ranking = {
        (row["target"].rpartition(", ")[2], row["unit"]): (row["limit"], row["aim"], targets.verdict(row))
        for row in ranking_targets.check(bench_rank_sort.LOSS, promised, arguments)
        if "trained P=1000" in row["target"] and "[cpp]" in row["target"]
    }
    assert of_ranking["warm", f"x {FOCAL}"] == (0.14, None, "FAIL")
    assert of_ranking["cold", f"x {FOCAL}"] == (None, 0.2, "met")
    assert of_ranking["warm", f"x {COMPILED_FOCAL}"] == (0.4, None, "pass") and ("cold", f"x {COMPILED_FOCAL}") not in of_ranking
    monkeypatch.setattr(type(bench_ghm.LOSS), "why_not", lambda *_: None)
    rows = element_targets.check(bench_ghm.LOSS, bench_ghm.TARGETS, arguments)
    of_ghm = [(row["target"].rpartition(", ")[2], row["limit"], row["aim"]) for row in rows if row["unit"].endswith("MMDetection's")]
    limits = [1 / 15, 1 / 20, 1 / 15, 1 / 20, 1 / 15]
    assert of_ghm == [("warm", limit, None) for limit in limits] + [("cold", None, limit) for limit in limits]


def test_rows_name_the_state_of_the_caches():
    arguments = argparse.Namespace(dtype="float32", device="cpu", seeds=[0], budget=0.01, providers=None, cache="warm")
    case = bench_focal.LOSS.problems.make_case(arguments, "focal", 800, 10)
    rows = targets.Rows()
    element_targets.compare(bench_focal.LOSS, "reference", case, {FOCAL: 1000.0}, arguments, rows)
    assert rows.records[0]["target"].endswith("index float32, warm") and rows.records[0]["passed"]


def test_what_of_a_limit_faster_arithmetic_leaves(monkeypatch):
    # Round by round the sums are 1.5, 3 and 4.5, and the shares 0.5, 1.5 and 0.75; those of medians would be 2.5 / 24 * 8.
    seconds = {element_targets.LEAST: [1.0, 0.5, 3.0], harness.COPY: [0.5, 2.5, 1.5], "published EQL v2": [24.0, 16.0, 48.0]}

    def measure(workloads, *_, **__):
        assert {work.name for work in workloads} == set(seconds)
        return {name: harness.Timing(samples) for name, samples in seconds.items()}

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(type(bench_focal.LOSS), "why_not", lambda *_: None)
    monkeypatch.setattr(bench_focal.LOSS, "backends", lambda device: ["cpp"], raising=False)
    entry, least = ("EQLv2", 90, 5), ("EQLv2", 6, 5)
    promised = dataclasses.replace(
        bench_focal.TARGETS, warm_speed=[(entry, {"published EQL v2": 1 / 8}), (least, {"published EQL v2": 1 / 8})], least={entry: least}
    )
    rows = targets.Rows()
    arguments = argparse.Namespace(dtype="float32", device="cpu", seeds=[0, 1], budget=0.1, cache="cold")
    element_targets.tell_least(bench_focal.LOSS, promised, arguments, rows)
    (row,) = rows.records
    assert row["got"] == 0.75 and row["limit"] is None and row["unit"] == "of the limit beside published EQL v2"
    with pytest.raises(ValueError, match="EQLv2"):
        dataclasses.replace(promised, least={("EQLv2", 7, 5): least})


def test_page_faults_and_the_answer_of_a_process_of_its_own(capsys):
    with mmap.mmap(-1, 512 * mmap.PAGESIZE) as pages:
        assert memory.page_faults(lambda: pages.write(bytes(512 * mmap.PAGESIZE)), calls=1) >= 512
    loss = bench_rank_sort.LOSS
    case = loss.problems.case("trained", 5, 200)
    names = [loss.name("reference"), FOCAL]
    measures.answer(loss, json.dumps(["times", case.as_dict(), names, 0.01, 1 << 20]))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(told) == names and all(min(samples) > 0 and faults >= 0 for samples, faults in told.values())


@pytest.mark.parametrize("loss", ["focal", "rank_sort"])
def test_maps_hold_what_their_rows_hold(loss):
    inputs = map_problems.make_inputs(map_problems.Case(loss, 2, 64, 3))
    places = 8 * 8 + 4 * 4 + 2 * 2 + 1 + 1
    rows = map_problems.rows_of(inputs.logits)
    assert rows.shape == inputs.dense.shape == (2, places * 3, 80) and inputs.elements == rows.numel()
    assert int(inputs.dense.sum()) == 2 * 70 and rows[inputs.dense > 0].mean() > -1 > -4 > rows[inputs.dense == 0].mean()
    providers = {provider.name: provider for provider in bench_maps.LOSS.providers(inputs.case)}
    got, wanted = (
        torch.autograd.grad(providers[name].bind(inputs)(levels), levels)
        for name, levels in ((name, leaves_of(inputs.logits)) for name in ("maps [reference]", "cat + permute [reference]"))
    )
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other) and one.any()


def test_the_program_of_the_page_on_performance_runs(tmp_path, monkeypatch, capsys):
    text = (pathlib.Path(__file__).resolve().parents[1] / "docs" / "performance.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "performance.md", "exec"), {"__name__": "performance"})
    assert "rsloss_kernels::ranking_backward" in capsys.readouterr().out and (tmp_path / "step.json").stat().st_size > 0
