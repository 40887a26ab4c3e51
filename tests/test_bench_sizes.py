"""The benchmark over sizes and whole steps: fitted exponents, their tables and pictures, and counted instructions."""
import argparse
import json
import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import bench_rank_sort, callgrind, exponents, harness, measures, plot, report, results, scaling, slower, whole_step  # noqa: E402
from bench.logits import Case, make_inputs  # noqa: E402

SETTINGS = {"date": "2000-01-01", "threads": 2, "seeds": [0], "budget_s": 0.5, "foreign_load": 0.0, "cache": "cold"}


def test_exponents_are_those_of_the_upper_half():
    # A call costs 5 whatever it computes; above, time grows with the 1.5th power.
    points = [(10**k, max(5.0, 1e-3 * (10**k) ** 1.5)) for k in range(7)]
    fitted = exponents.fit(points)
    assert fitted.exponent == pytest.approx(1.5, abs=1e-9) and (fitted.low, fitted.high) == (10**3, 10**6)
    assert exponents.fit(points[:2]) is None
    assert exponents.fit([(1, 2.0), (2, 2.0), (4, 2.0)]).exponent == pytest.approx(0, abs=1e-12)
    # Three points at least, even where the upper half holds two.
    assert exponents.fit([(1, 1.0), (3, 9.0), (10, 100.0)])[1:] == (1, 10)


def growing(section, axis_values, power, provider="rank_sort_loss [cpp]"):
    times = {"median_ms": None, "q1_ms": None, "q3_ms": None, "repetitions": 3, "skipped": None, "provider": provider}
    return [
        {"problem": section, "x": x} | times | {"median_ms": float(x) ** power, "extra_bytes": 2**20 * x if x > 1 else None}
        for x in axis_values
    ]


def test_growth_becomes_tables_and_pictures(tmp_path):
    box = tmp_path / "results" / "box"
    sections = {name: {"settings": SETTINGS, "records": growing(name, [1, 10, 100, 1000], 0.5)} for name in exponents.AXES}
    sections["against_p"]["records"].append(sections["against_p"]["records"][0] | {"x": 10**4, "median_ms": None, "skipped": "too long"})
    path = results.update(box, scaling.STEM, harness.machine("cpu"), sections)
    text = report.tables(tmp_path / "results")
    assert "| against_n | rank_sort_loss [cpp] | 1 | 3.16 | 10 | 31.6 | 0.50 | 10 to 1,000 |" in text
    assert "| against_p | rank_sort_loss [cpp] | 1 | 3.16 | 10 | 31.6 | - | 0.50 | 10 to 1,000 |" in text
    assert "| against_n | rank_sort_loss [cpp] | - | 10 | 100 | 1,000 | 1.00 | 10 to 1,000 |" in text
    short = report.headlines(tmp_path / "results")
    assert "| against_world | rank_sort_loss [cpp] | processes | 0.50 | 10 to 1,000 | 1.00 |" in short
    drawn = tmp_path / "drawn.png"
    assert plot.draw_growth(results.read(path), "against_c", drawn) and drawn.read_bytes().startswith(b"\x89PNG")
    assert not plot.draw_growth({"sections": {"against_c": {"records": growing("c", [1], 1)}}}, "against_c", drawn)


def test_every_growing_problem_can_be_made():
    arguments = argparse.Namespace(dtype="float32", device="cpu", seeds=[0])
    for section, lines in scaling.LINES.items():
        assert section in exponents.AXES and len(lines) > 0
        for line in lines:
            loss = __import__(f"bench.bench_{line.stem}", fromlist=["LOSS"]).LOSS
            case = loss.problems.make_case(arguments, *line.entry(line.values[-1]))
            names = {provider.name for provider in loss.providers(case)}
            assert names.issuperset(line.others), line


def test_one_line_is_measured_from_its_smallest_size(monkeypatch, tmp_path):
    small = scaling.Line("rank_sort", "tiny", lambda p: ("trained", p, 300), [2, 5, 10**9], ("focal, eager",))
    monkeypatch.setattr(scaling, "LINES", {"against_p": [small]})
    asked = []
    monkeypatch.setattr(measures, "alone", lambda arguments, what, environment, case, larger, name: asked.append(name) or [123, "no figure"])
    assert scaling.main(["--against", "p", "--most", "100", "--budget", "0.01", "--threads", "1", "--out", str(tmp_path)]) == 0
    records = results.read(tmp_path / "scaling.json")["sections"]["against_p"]["records"]
    assert [record["x"] for record in records] == [2, 2, 5, 5] and all(record["median_ms"] > 0 for record in records)
    assert [record["extra_bytes"] for record in records] == [123, 123, None, None] and asked[1] == "focal, eager"


def test_memory_of_a_child_that_dies_is_told():
    case = Case("trained", 5, 200)

    class Loss:
        problems = bench_rank_sort.LOSS.problems

        @staticmethod
        def providers(case):
            import os

            os._exit(3)

    assert measures.memory_of_each(Loss, case, [], "any") == ["the process ended without a figure"]


def test_segments_one_by_one_are_the_published_loss_of_each():
    case = Case("trained", 12, 2000, "index", 3)
    inputs = make_inputs(case)
    providers = {provider.name: provider for provider in bench_rank_sort.LOSS.providers(case)}
    whole = providers["rank_sort_loss [reference], chunks"].bind(inputs)(inputs.logits)
    for name in ("published loop, a call per segment", "rank_sort_loss [reference], a call per segment"):
        got = providers[name].bind(inputs)(inputs.logits)
        torch.testing.assert_close(torch.stack(got), torch.stack(whole), rtol=1e-5, atol=1e-6)


def test_heads_name_providers_that_take_part():
    arguments = argparse.Namespace(dtype="float32", device="cpu", seeds=[0])
    for head in whole_step.HEADS:
        loss = __import__(f"bench.bench_{head.stem}", fromlist=["LOSS"]).LOSS
        names = {provider.name for provider in loss.providers(loss.problems.make_case(arguments, *head.entry))}
        assert {head.before, head.anyway} <= names, head


def test_a_small_head_and_the_losses_of_a_step(monkeypatch, tmp_path):
    arguments = argparse.Namespace(dtype="float32", device="cpu", seeds=[0], budget=0.01, cache="cold")
    (head, _) = whole_step.dense_head("small", 40, 6, segments=2)
    records = whole_step.measure_head(head, arguments)
    assert [record["role"] for record in records] == ["before", "anyway", "ours"] and all(record["median_ms"] > 0 for record in records)
    labels = torch.full((30,), 80)
    labels[:4] = 3
    logits = torch.randn(30, 80)
    losses = {name: function(logits).item() for name, (_, function) in whole_step.losses_of_step(labels).items()}
    assert losses["published loop"] == pytest.approx(losses["rank_sort_loss"], rel=1e-5)
    assert losses["MMDetection's"] == pytest.approx(losses["ghm_classification_loss"], rel=1e-4)
    monkeypatch.setattr(whole_step, "CANVASES", 2)
    digits = whole_step.measure_digits(argparse.Namespace(rounds=1))
    assert [row["provider"] for row in digits] == ["focal, eager", "published loop", "rank_sort_loss"]
    assert all(0 < row["loss_ms"] < row["step_ms"] and 0 < row["positives"] < row["rows"] for row in digits)
    steps = [
        {"model": "m", "images": "2 x 64 px", "rows": 30, "positives": 4, "loss": "focal", "provider": "p", "step_ms": 50.0, "loss_ms": 1.0}
    ]
    sections = {name: {"settings": SETTINGS, "records": rows} for name, rows in (("heads", records), ("steps", steps))}
    results.update(tmp_path / "box", whole_step.STEM, harness.machine("cpu"), sections)
    text = report.tables(tmp_path)
    assert "| m | 2 x 64 px | 30 | 4 | focal | p | 50 | 1 | 2.0 % |" in text and "| small | 3,200 | Rank & Sort |" in text


def test_report_tells_where_this_library_is_slower():
    fields = {"rows": 512, "classes": 80, "dtype": "float32", "device": "cpu"}
    times = {"seesaw [cpp]": 2.0, "seesaw [reference]": 9.0, "plain softmax, eager": 0.5, "copy floor": 0.1, "published Seesaw": 3.0}
    records = [fields | {"provider": name, "median_ms": time} for name, time in times.items()]
    text = slower.slower("seesaw", records)
    assert "- `plain softmax, eager`: 4 x (rows 512 C 80): Seesaw reads a weight" in text and text.count("\n- ") == 1
    assert slower.UNKNOWN in slower.slower("seesaw", [*records[:1], records[4] | {"median_ms": 1.0}])
    assert slower.slower("seesaw", [record for record in records if "plain" not in record["provider"]]) == ""


CALLGRIND = """# callgrind format
version: 1
positions: line
events: Ir
ob=(1) /usr/lib/libc.so.6
fl=(1) string.c
fn=(1) memcpy
10 100
+3 20
ob=(2) /home/me/rsloss_kernels/_ops_cpu.so
fl=(2) sweep.cpp
fn=(2) rsloss::avx2::sweep(float const*)
7 3000
cfi=(3) table.h
cob=(2)
cfn=(3) rsloss::lookup(int)
calls=5 12
8 5000
* 400
fi=(3)
-2 600
fe=(2)
fn=(3)
12 5000
fn=(1)
9 1
"""


def test_costs_are_of_the_function_itself():
    library, other = "/home/me/rsloss_kernels/_ops_cpu.so", "/usr/lib/libc.so.6"
    costs = callgrind.function_costs(CALLGRIND)
    assert costs == {
        (other, "memcpy"): 120,
        (library, "rsloss::avx2::sweep(float const*)"): 4000,
        (library, "rsloss::lookup(int)"): 5000,
        (library, "memcpy"): 1,
    }
    plain = "positions: instr line\nob=/a/_ops_cpu.so\nfn=sweep\n0x10 7 42\n+4 +1 8\n"
    assert callgrind.function_costs(plain) == {("/a/_ops_cpu.so", "sweep"): 50}
    text = callgrind.table(costs, work=1000, top=1)
    assert "| `rsloss::lookup(int)` | 5 | 55.5 % |" in text and "sweep" not in text
    assert "| all functions of the library | 9.001 |" in text and "around them | 0.12 |" in text


def test_what_is_missing_is_said_and_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(callgrind.shutil, "which", lambda name: "/usr/bin/perf" if name == "perf" else None)
    command = ["rank_sort", "--positives", "5", "--negatives", "200"]
    assert callgrind.main(command) == 2
    assert "valgrind is not installed; --tool perf is there" in capsys.readouterr().err
    monkeypatch.setattr(type(bench_rank_sort.LOSS), "why_not", lambda *_: None)
    counted = iter(["100,,instructions:u,1,100.00,,", "340,,instructions:u,1,100.00,,"])

    def run(prefix, *rest, toggle):
        pathlib.Path(prefix[prefix.index("-o") + 1]).write_text(f"# started\n\n{next(counted)}\n")

    monkeypatch.setattr(callgrind, "run", run)
    assert callgrind.main([*command, "--tool", "perf", "--calls", "2"]) == 0
    assert f"{240 / (2 * 205):.4g} instructions per element" in capsys.readouterr().out
    counted = iter(2 * ["<not supported>,,instructions:u,0,100.00,,"])
    assert callgrind.main([*command, "--tool", "perf"]) == 2 and "counts no instructions" in capsys.readouterr().err


def test_the_counted_program_makes_its_calls(monkeypatch):
    states = []
    monkeypatch.setattr(callgrind, "instrument", states.append)
    monkeypatch.setattr(callgrind, "BACKEND", "reference")
    threads = torch.get_num_threads()
    try:
        case = Case("trained", 5, 200).as_dict()
        assert callgrind.drive(json.dumps(["rank_sort", case, 2, True])) == 0
    finally:
        torch.set_num_threads(threads)
    assert states == ["on", "off"]
