"""Rows that must hold beyond the plain comparison: 16-bit logits, segments, very many positives, two processes, outputs whose memory is
kept, and what a call and the import cost apart from the data. On a CPU, the compiled backend."""
import statistics
import subprocess
import sys
from dataclasses import replace

from bench import harness, measures, memory, ranking_targets, targets, world
from bench.logits import make_inputs
from bench.providers import COMPILED_FOCAL, differentiated
from bench.ranking_problems import PROBLEMS

BACKEND = "cpp"
SEGMENTS = 64


def narrow_type(loss, arguments, report) -> None:
    """bfloat16 logits against the same draw in float32; told too, against float32 logits that were rounded to bfloat16, where many
    positives share a logit, so that there are fewer breakpoints."""
    case = PROBLEMS.make_case(arguments, "init", 1000, 10**6)

    def build(seed, relevant):
        wide, narrow = (make_inputs(replace(case, seed=seed, dtype=dtype)) for dtype in ("float32", "bfloat16"))
        relevant.append(narrow.relevant(loss.delta))
        rounded = replace(narrow, logits=narrow.logits.float())
        return [
            differentiated(name, loss.forward(inputs, BACKEND), inputs.logits)
            for name, inputs in (("wide", wide), ("rounded", rounded), ("narrow", narrow))
        ]

    title = f"{loss.name(BACKEND)}, {replace(case, dtype='bfloat16').title}"
    units = {"wide": "the float32 time of the same draw", "rounded": "the float32 time of the rounded logits"}
    for cache in ("warm", "cold"):
        _report_ratios(loss, arguments, report, build, title, "narrow", {"wide": 0.5, "rounded": None}, units, cache)
    for distribution in ("trained", "init"):
        case = replace(PROBLEMS.make_case(arguments, distribution, 1000, 10**6), dtype="bfloat16")
        elements = case.positives + case.negatives
        _report_time(loss, arguments, report, case, "warm", 1e9 / elements, 0.35, "ns per element")
        # As many positives beside next to no negatives. These are too few to be counted by pattern, so it is no part of the row above.
        few = replace(case, negatives=1000)
        _report_time(loss, arguments, report, few, "warm", 1e9 / elements, None, f"ns per element of {case.title}")


def tiny_call(loss, arguments, report) -> None:
    """What a call costs where there is next to nothing to compute."""
    case = PROBLEMS.make_case(arguments, "trained", 10, 1000)
    _report_time(loss, arguments, report, case, "warm", 1e6, 70.0, "us")


IMPORT = "import torch, time; start = time.perf_counter(); import rsloss_kernels; print(time.perf_counter() - start)"
IMPORTS = 5


def import_of_the_package(loss, arguments, report) -> None:
    """Beyond torch, in processes of their own."""
    runs = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in range(IMPORTS)]
    seconds = [float(run.stdout) for run in runs]
    report("import rsloss_kernels after torch", 0.3, "s", statistics.median(seconds), f"{min(seconds):.3g} to {max(seconds):.3g} s")


def kept_outputs(loss, arguments, report) -> None:
    """Outputs as large as the logits whose pages the system need not find anew: the C library keeps the others' memory as this
    library keeps its own, both in huge pages. The page faults that are left are told."""
    case = PROBLEMS.make_case(arguments, "trained", 1000, 10**7)
    names, got, note = [loss.name(BACKEND), COMPILED_FOCAL], None, loss.why_not(BACKEND, case.device)
    if note is None:
        try:
            told = measures.alone(arguments, "times", memory.KEPT_ENVIRONMENT, case, names, arguments.budget)
            ours, other = (harness.Timing(told[name][0]) for name in names)
            # A page in a thousand that the outputs have.
            is_kept = all(faults < 1e-3 * 4 * case.negatives / 4096 for _, faults in told.values())
            got = ours.ratio_to(other) if is_kept else None
            note = "; ".join(f"{statistics.median(told[name][0]) * 1e3:.4g} ms, {told[name][1]} page faults" for name in names)
        except Exception as error:  # the other rows must still be measured
            note = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    report(f"{names[0]}, {case.title}, memory of outputs kept, warm", 0.30, f"x {COMPILED_FOCAL}", got, note)


def equal_segments(loss, arguments, report) -> None:
    """64 equal segments in both forms against the same call without segments."""
    whole = PROBLEMS.make_case(arguments, "trained", 1000, 10**6, "index", SEGMENTS)
    for form in ("chunks", "row ids"):

        def build(seed, relevant, form=form):
            inputs = make_inputs(replace(whole, seed=seed))
            relevant.append(inputs.relevant(loss.delta))
            chosen = {"segments": SEGMENTS}
            if form == "row ids":
                chosen = {"segments": inputs.segment_ids, "num_segments": SEGMENTS}
            return [
                differentiated(name, loss.forward(inputs, BACKEND, **options), inputs.logits)
                for name, options in ((form, chosen), ("whole", {}))
            ]

        title, units = f"{loss.name(BACKEND)}, {whole.title}, {form}", {"whole": "the unsegmented call"}
        _report_ratios(loss, arguments, report, build, title, form, {"whole": 1.5}, units, "cold")


def many_positives(loss, arguments, report) -> None:
    """As many positives as a batch of crowded images has, and as many as negatives."""
    _report_time(loss, arguments, report, PROBLEMS.make_case(arguments, "trained", 10**5, 10**6), "cold", 1e3, 100.0, "ms")
    ranking_targets.memory(loss, BACKEND, ("trained", 10**6, 10**6), arguments, report, limit=1.5e9)


def two_processes(loss, arguments, report) -> None:
    """One ranking over two processes that hold half of the elements each, against one process; threads shared out."""
    case = PROBLEMS.make_case(arguments, "trained", 1000, 10**6)
    case = replace(case, max_positives=2048)
    got, note = None, loss.why_not(BACKEND, case.device)
    if note is None:
        try:
            times = world.measure(loss.stem, case, 2, "gloo", arguments.threads, arguments.budget)
            got = times["together"] / times["whole"]
            note = ", ".join(f"{words}: {times[key] * 1e3:.4g} ms" for key, words in world.MEANING.items())
        except Exception as error:  # the other rows must still be measured
            note = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    report(f"{loss.name(BACKEND)}, {case.title}, 2 processes (gloo)", None, "x one process", got, note)


def _report_time(loss, arguments, report, case, cache: str, scale: float, limit: float | None, unit: str) -> None:
    """Seconds times `scale`."""
    relevant, got, note = [], None, loss.why_not(BACKEND, case.device)

    def build(seed):
        inputs = make_inputs(replace(case, seed=seed))
        relevant.append(inputs.relevant(loss.delta))
        return [differentiated("ours", loss.forward(inputs, BACKEND), inputs.logits)]

    if note is None:
        timing = measures.time_draws(targets.changed(arguments, cache=cache), build)["ours"]
        got = None if timing.failure else timing.median * scale
        note = timing.failure or ranking_targets.told_relevant(relevant)
    report(f"{loss.name(BACKEND)}, {case.title}, {cache}", limit, unit, got, note)


def _report_ratios(loss, arguments, report, build, title, ours, limits, units, cache: str) -> None:
    """Ours to each of the others of `limits`, named in `units`. build: workloads of a seed; adds what share of the negatives matters."""
    relevant: list[float] = []
    missing = loss.why_not(BACKEND, arguments.device)
    timings = None if missing else measures.time_draws(targets.changed(arguments, cache=cache), lambda seed: build(seed, relevant))
    for other, limit in limits.items():
        got, note = None, missing
        if timings:
            got = timings[ours].ratio_to(timings[other])
            note = f"{targets.medians(timings, ours, other)}; {ranking_targets.told_relevant(relevant)}"
        report(f"{title}, {cache}", limit, f"x {units[other]}", got, note)
