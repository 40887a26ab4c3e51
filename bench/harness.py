"""Times workloads side by side, and says on which machine.

All workloads of a case run in one process, one sample each per round, the order reversed every other round: whatever slows the
machine down slows both sides. A ratio is the median over the rounds in which both ran. CPU calls are timed by the clock; CUDA
calls by events around an idle device, so that host overheads count; captured CUDA calls by events around the replay, device
time alone.
"""
import contextlib
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

WARM_UP_SECONDS = 0.2
MAX_WARM_UPS = 5
UNCOUNTED_CALLS, COUNTED_CALLS = 2, 5  # of a warm sample on a CPU
LONG_SECONDS = 0.1
L2_FLUSH_BYTES = 256 << 20
SLEEP_CYCLES = 200_000
COPY = "copy floor"


@dataclass
class Workload:
    """`call` is timed; `prepare`, if any, runs untimed before each call."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass
class Timing:
    """Seconds of one workload, one sample per round, or the reason why there is none."""

    samples: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def quartiles(self) -> tuple[float, float, float]:
        if len(self.samples) == 1:
            return (self.samples[0],) * 3
        return tuple(statistics.quantiles(self.samples, n=4, method="inclusive"))

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def ratio_to(self, other: "Timing") -> float | None:
        """Median of the ratios of the rounds in which both ran; None if either failed."""
        ratios = [mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=False)]
        return statistics.median(ratios) if ratios else None


class Draws:
    """One workload timed on several draws of its inputs. Every figure is the median over the draws, a ratio taken draw by draw."""

    def __init__(self, timings: list[Timing]):
        self.timings = timings

    @property
    def samples(self) -> list[float]:
        return [sample for timing in self.timings for sample in timing.samples]

    @property
    def failure(self) -> str | None:
        """The first reason; a workload that fails on one draw has no figures."""
        return next((timing.failure for timing in self.timings if timing.failure), None)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        return tuple(statistics.median(column) for column in zip(*(timing.quartiles for timing in self.timings), strict=True))

    @property
    def median(self) -> float:
        return statistics.median(timing.median for timing in self.timings)

    def plus(self, other: "Draws") -> "Draws":
        """Both one after the other: round by round."""
        return Draws(
            [
                Timing([a + b for a, b in zip(mine.samples, theirs.samples, strict=False)], mine.failure or theirs.failure)
                for mine, theirs in zip(self.timings, other.timings, strict=True)
            ]
        )

    def ratio_to(self, other: "Draws") -> float | None:
        if self.failure or other.failure:
            return None
        return statistics.median(
            mine.ratio_to(theirs) for mine, theirs in zip(self.timings, other.timings, strict=True)
        )


class _CpuClock:
    """`cold`: the call before was another's, which left the caches full of its own. Else a sample is the median of a block of calls one
    after another, the first of them uncounted; a call above LONG_SECONDS is one by itself, a block would take too long."""

    def __init__(self, cold: bool):
        self.cold = cold

    def sample(self, workload: Workload) -> float:
        calls = [self._time(workload)]
        if self.cold or calls[0] > LONG_SECONDS:
            return calls[0]
        calls += [self._time(workload) for _ in range(UNCOUNTED_CALLS + COUNTED_CALLS - 1)]
        return statistics.median(calls[UNCOUNTED_CALLS:])

    @staticmethod
    def _time(workload: Workload) -> float:
        if workload.prepare is not None:
            workload.prepare()
        start = time.perf_counter()
        kept = workload.call()
        seconds = time.perf_counter() - start
        del kept
        return seconds


class _CudaClock:
    """Events on the current stream. `cold`: the L2 cache is overwritten before every call."""

    def __init__(self, captured: bool, cold: bool):
        self.captured = captured
        self.flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda") if cold else None
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, workload: Workload) -> float:
        if workload.prepare is not None:
            workload.prepare()
        if self.flush is not None:
            self.flush.zero_()
        if not self.captured:
            torch.cuda.synchronize()
        elif self.flush is None:
            # Keeps the device busy until the replay is enqueued, as the flush does; else the gap between them would be timed.
            torch.cuda._sleep(SLEEP_CYCLES)
        self.start.record()
        kept = workload.call()
        self.stop.record()
        torch.cuda.synchronize()
        del kept
        return self.start.elapsed_time(self.stop) / 1e3


def captured(workload: Workload) -> Workload:
    """The workload as the replay of a CUDA graph; raises where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            if workload.prepare is not None:
                workload.prepare()
            workload.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Backward runs on the stream of its forward, so both must be on the stream that is captured.
    if workload.prepare is not None:
        with torch.cuda.stream(side):
            workload.prepare()
        torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        outputs = workload.call()

    def replay():
        graph.replay()
        return outputs

    return Workload(workload.name, replay)


def measure(
    workloads: list[Workload],
    device: str,
    budget: float,
    max_repetitions: int = 300,
    capture: bool = False,
    cold: bool = True,
) -> dict[str, Timing]:
    """Times every workload for about `budget` seconds of samples, at most `max_repetitions` of them, in alternating rounds.

    A workload whose warm-up call takes the whole budget has that call as its only sample. One that raises has its reason in
    `failure`.
    """
    clock = _CudaClock(capture, cold) if device == "cuda" else _CpuClock(cold)
    timings = {workload.name: Timing() for workload in workloads}
    active = []
    with _no_garbage_collection():
        for workload in workloads:
            try:
                ready = captured(workload) if capture else workload
                first = _warm_up(clock, ready)
            except Exception as error:  # a peer that cannot run here must not end the comparison of the others
                timings[workload.name].failure = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                continue
            if first >= budget:
                timings[workload.name].samples.append(first)
            else:
                active.append(ready)
        spent = dict.fromkeys(timings, 0.0)
        for number in range(max_repetitions):
            for workload in active if number % 2 == 0 else reversed(active):
                seconds = clock.sample(workload)
                timings[workload.name].samples.append(seconds)
                spent[workload.name] += seconds
            active = [workload for workload in active if spent[workload.name] < budget]
    return timings


def _warm_up(clock, workload: Workload) -> float:
    """Calls until the time is used up. Returns the seconds of the fastest call."""
    seconds, begin = [], time.perf_counter()
    while len(seconds) < 2 or (len(seconds) < MAX_WARM_UPS and time.perf_counter() - begin < WARM_UP_SECONDS):
        seconds.append(clock.sample(workload))
        if len(seconds) == 1 and seconds[0] > 20:
            break
    return min(seconds)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def copy_floor(moved_bytes: int, device: str, working_set: int | None = None) -> Workload:
    """A plain copy that reads and writes `moved_bytes` in all: what the memory allows at best.

    `working_set`: the bytes that are touched, again and again where they are fewer than are moved; by default each byte once.
    """
    half = max((working_set or moved_bytes) // 2, 1)
    source = torch.zeros(half, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    whole, rest = divmod(max(moved_bytes // 2, 1), half)

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])

    return Workload(COPY, copy)


# Above this share of the processor used by others, times are not to be trusted: threads wait for each other at barriers.
QUIET = 0.06


class ForeignLoad:
    """The share of the processor that others take from now on: other processes, and what the host of a virtual machine runs in its
    place. Children of this process count as its own."""

    STAT = "/proc/stat"

    def __init__(self):
        self.begin = self._seconds()

    def fraction(self) -> float | None:
        if self.begin is None:
            return None
        all_busy, ours, wall = (now - then for now, then in zip(self._seconds(), self.begin, strict=True))
        return max(all_busy - ours, 0.0) / max(wall * (os.cpu_count() or 1), 1e-9)

    @classmethod
    def _seconds(cls) -> tuple[float, float, float] | None:
        try:
            with open(cls.STAT) as file:
                user, nice, system, _, _, irq, soft_irq, steal, *_ = (int(word) for word in file.readline().split()[1:])
        except (OSError, ValueError):
            return None
        return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]), time.perf_counter()


def machine(device: str) -> dict:
    """What a reader needs to know to repeat a figure."""
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "slug": machine_slug(device),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "gpu": gpu.name if gpu else None,
        "compute_capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_slug(device: str) -> str:
    """A short name for the results folder, such as `epyc-2-cores` or `nvidia-h200`."""
    if device == "cuda":
        words = torch.cuda.get_device_name(0)
    else:
        words = re.sub(r"\((R|TM)\)|\b(AMD|Intel|CPU|Processor|\d+-Core)\b|@.*", " ", _cpu_name()) + f" {_cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _triton_version() -> str | None:
    with contextlib.suppress(ImportError):
        import triton

        return triton.__version__
    return None
