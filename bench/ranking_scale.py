"""Rows that must hold about scale: 16-bit logits, segments, very many positives, two processes. On a CPU, the compiled backend."""
from dataclasses import replace

from bench import loss_bench, ranking_targets, targets, world
from bench.logits import make_inputs
from bench.providers import differentiated
from bench.ranking_problems import PROBLEMS

BACKEND = "cpp"
SEGMENTS = 64


def narrow_type(loss, arguments, report) -> None:
    """bfloat16 against float32 logits of the same values: a histogram of at most 65,536 values takes the place of the search."""
    wide, narrow = "float32", "bfloat16"
    case = PROBLEMS.make_case(arguments, "init", 1000, 10**6)
    relevant = []

    def build(seed):
        inputs = make_inputs(replace(case, seed=seed, dtype=narrow))
        widened = replace(inputs, logits=inputs.logits.float())
        relevant.append(inputs.relevant(loss.delta))
        return [
            differentiated(dtype, loss.forward(one, BACKEND), one.logits)
            for dtype, one in ((wide, widened), (narrow, inputs))
        ]

    title = f"{loss.name(BACKEND)}, {replace(case, dtype=narrow).title}"
    _report_ratio(loss, arguments, report, build, relevant, title, narrow, wide, 0.5, f"x its {wide} time")


def equal_segments(loss, arguments, report) -> None:
    """64 equal segments in both forms against the same call without segments."""
    whole = PROBLEMS.make_case(arguments, "trained", 1000, 10**6, "index", SEGMENTS)
    for form in ("chunks", "row ids"):
        relevant = []

        def build(seed, form=form, relevant=relevant):
            inputs = make_inputs(replace(whole, seed=seed))
            relevant.append(inputs.relevant(loss.delta))
            chosen = {"segments": SEGMENTS}
            if form == "row ids":
                chosen = {"segments": inputs.segment_ids, "num_segments": SEGMENTS}
            return [
                differentiated(name, loss.forward(inputs, BACKEND, **options), inputs.logits)
                for name, options in ((form, chosen), ("whole", {}))
            ]

        title = f"{loss.name(BACKEND)}, {whole.title}, {form}"
        _report_ratio(loss, arguments, report, build, relevant, title, form, "whole", 1.5, "x the unsegmented call")


def many_positives(loss, arguments, report) -> None:
    """As many positives as a batch of crowded images has, and as many as negatives."""
    case = PROBLEMS.make_case(arguments, "trained", 10**5, 10**6)
    relevant = []

    def build(seed):
        inputs = make_inputs(replace(case, seed=seed))
        relevant.append(inputs.relevant(loss.delta))
        return [differentiated("ours", loss.forward(inputs, BACKEND), inputs.logits)]

    got, note = None, loss.why_not(BACKEND, case.device)
    if note is None:
        timing = loss_bench.time_draws(arguments, build)["ours"]
        got = None if timing.failure else timing.median * 1e3
        note = timing.failure or ranking_targets.told_relevant(relevant)
    report(f"{loss.name(BACKEND)}, {case.title}", 100.0, "ms", got, note)
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


def _report_ratio(loss, arguments, report, build, relevant, title, ours, other, limit, unit) -> None:
    got, note = None, loss.why_not(BACKEND, arguments.device)
    if note is None:
        timings = loss_bench.time_draws(arguments, build)
        got = timings[ours].ratio_to(timings[other])
        note = f"{targets.medians(timings, ours, other)}; {ranking_targets.told_relevant(relevant)}"
    report(title, limit, unit, got, note)
