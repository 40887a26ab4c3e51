"""The rows of a benchmark that must hold, of the losses that rank nothing: each a figure with its limit for speed, memory, accuracy."""
import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench import harness, measures, targets
from bench.providers import workload

# Of the losses, of the gradient.
LIMITS = 1e-7, 2e-6
Speed = Sequence[tuple[tuple, Mapping[str, float | None]]]
LEAST = "next to no elements"


@dataclass(frozen=True)
class Targets:
    """What a loss promises, by entries of its problems.

    warm_speed: (entry, {what it is compared to: largest ratio, None: told only}); see --cache.
    cold_speed: likewise, but the ratios are aims; None: those of warm_speed.
    cuda_speed: captured; (entry, largest ratio to the copy). Their memory is measured on CUDA.
    memory: on a CPU; at most the gradient and a MiB.
    accuracy: to LIMITS.
    least: by entry of warm_speed, which must hold it, the same loss with next to no elements; see `tell_least`.
    further: of (arguments, report), more rows on a CPU.
    """

    warm_speed: Speed
    cuda_speed: Sequence[tuple[tuple, float]]
    memory: Sequence[tuple]
    accuracy: Sequence[tuple]
    cold_speed: Speed | None = None
    least: Mapping[tuple, tuple] = field(default_factory=dict)
    further: Callable[[argparse.Namespace, targets.Rows], None] = lambda arguments, report: None

    def __post_init__(self):
        unknown = set(self.least) - {entry for entry, _ in self.warm_speed}
        if unknown:
            raise ValueError(f"least must be of entries of warm_speed, got {sorted(map(str, unknown))}")


def check(loss, promised: Targets, arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd; medians of alternating runs, over the seeds."""
    report = targets.Rows()
    make_case = loss.problems.make_case
    if arguments.device == "cuda":
        compiled, sizes = ["cuda", "triton"], [entry for entry, _ in promised.cuda_speed]
        cases = [(make_case(arguments, *entry), limit) for entry, limit in promised.cuda_speed]
        targets.captured(loss, arguments, report, cases)
    else:
        compiled, sizes = ["cpp"], promised.memory
        compare_warm_and_cold(loss, promised.warm_speed, promised.cold_speed, arguments, report)
        tell_least(loss, promised, arguments, report)
        promised.further(arguments, report)
    memory_and_accuracy(loss, compiled, sizes, promised.accuracy, arguments, report)
    return report.close()


def compare_warm_and_cold(loss, warm: Speed, cold: Speed | None, arguments: argparse.Namespace, report: targets.Rows) -> None:
    """Of the compiled backend on a CPU. The limits hold for warm calls; cold ones have aims, by default as large."""
    aims = [(entry, targets.as_aims(limits)) for entry, limits in (warm if cold is None else cold)]
    for cache, rows in (("warm", warm), ("cold", aims)):
        for entry, limits in rows:
            case = loss.problems.make_case(arguments, *entry)
            compare(loss, "cpp", case, limits, targets.changed(arguments, cache=cache), report)


def compare(loss, backend: str, case, limits: Mapping[str, float | None], arguments: argparse.Namespace, report: targets.Rows) -> None:
    """A row for each of the others, all timed in turns."""
    ours, missing = loss.name(backend), loss.why_not(backend, case.device)
    timings, _ = targets.time_case(loss, arguments, case, [ours, *limits])
    for other, limit in limits.items():
        got = timings[ours].ratio_to(timings[other]) if ours in timings else None
        report(f"{ours}, {case.title}, {arguments.cache}", limit, f"x {other}", got, missing or targets.medians(timings, ours, other))


def tell_least(loss, promised: Targets, arguments: argparse.Namespace, report: targets.Rows) -> None:
    """Of a limit, what faster arithmetic leaves: a step with next to no elements, and the copy of what two passes must move."""
    arguments, ours = targets.changed(arguments, cache="warm"), loss.name("cpp")
    missing = loss.why_not("cpp", arguments.device)
    for entry, limits in promised.warm_speed:
        if entry not in promised.least:
            continue
        case, least = (loss.problems.make_case(arguments, *size) for size in (entry, promised.least[entry]))
        providers = {provider.name: provider for provider in loss.providers(case)}
        peers = {name: limit for name, limit in limits.items() if limit is not None and name in providers}
        title = f"{ours}, {case.title}, {LEAST} and the copy, warm"
        if missing:
            for peer in peers:
                report(title, None, f"of the limit beside {peer}", None, missing)
            continue

        def build(seed: int, case=case, least=least, providers=providers, peers=peers) -> list[harness.Workload]:
            inputs, few = (loss.problems.make_inputs(replace(each, seed=seed)) for each in (case, least))
            of_few = workload(replace(providers[ours], name=LEAST), few, "full")
            copy = harness.copy_floor(inputs.minimal_bytes(), case.device, inputs.working_set())
            return [copy, of_few, *(workload(providers[peer], inputs, "full") for peer in peers)]

        timings = measures.time_draws(arguments, build)
        for peer, limit in peers.items():
            share = timings[LEAST].plus(timings[harness.COPY]).ratio_to(timings[peer])
            got = None if share is None else share / limit
            report(title, None, f"of the limit beside {peer}", got, targets.medians(timings, LEAST, harness.COPY, peer))


def memory_and_accuracy(
    loss, compiled: list[str], sizes: Sequence[tuple], accuracy: Sequence[tuple], arguments: argparse.Namespace, report: targets.Rows
) -> None:
    """Memory of the compiled backends, accuracy of all."""
    for backend in compiled:
        for entry in sizes:
            case = loss.problems.make_case(arguments, *entry)
            gradient = loss.problems.make_inputs(case).gradient_bytes
            targets.memory(loss, backend, case, gradient + targets.MEBIBYTE, arguments, report)
    backends = list(dict.fromkeys([*compiled, *loss.backends(arguments.device)]))
    for entry in accuracy:
        targets.accuracy(loss, loss.problems.make_case(arguments, *entry), backends, LIMITS, report)
