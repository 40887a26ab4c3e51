"""What a call costs beside its arithmetic: waits for the device and launches, counted one by one in forward and in backward.

On CUDA: synchronisations, as PyTorch's debug mode warns of them, and everything that the profiler sees the device do. A CPU is
nothing to wait for. Counted there is the same thing at its origin: operators whose result the host must read before it can go on,
such as `.item()`, a mask as an index or `nonzero`, and all operators below autograd, views included. Counts do not hang on the load.
"""
import argparse
import warnings
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measures
from bench.providers import Forward, leaves_of

COUNTED = {
    ("syncs", "cpu"): "reads by the host",
    ("syncs", "cuda"): "waits for the device",
    ("launches", "cpu"): "operators dispatched",
    ("launches", "cuda"): "kernels launched",
}
NO_DEVICE = "no device to wait for; counted are results that the host must read to go on"
COMPILED = "compiled code passes no dispatcher"
SYNCHRONISES = "synchronizing CUDA operation"
# A result whose value, or whose shape, only the data tells.
HOST_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}


class Observer(TorchDispatchMode):
    """Sees every operator that reaches a backend, in `observe`, which calls it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # The plain PyTorch backend is an operator for the dispatcher; it costs what it calls.
        if function.namespace == "rsloss_kernels" and function._overloadname == "reference":
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return self.observe(function, args, kwargs or {})

    def observe(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> object:
        raise NotImplementedError


class Dispatched(Observer):
    """Counts the operators, and those that the host must read."""

    def __init__(self):
        super().__init__()
        self.operators = self.reads = 0

    def observe(self, function, args, kwargs):
        self.operators += 1
        self.reads += is_read_by_host(function, args)
        return function(*args, **kwargs)


def is_read_by_host(function: torch._ops.OpOverload, args: tuple) -> bool:
    if function.overloadpacket not in INDEXING:
        return not HOST_READS.isdisjoint(function.tags)
    # A mask becomes a list of places, but for one value that is written through it: that is a fill.
    is_fill = len(args) > 2 and args[2].numel() == 1
    return not is_fill and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def dispatched(call: Callable[[], object]) -> tuple[object, int, int]:
    """What `call` returns, the operators and the reads by the host."""
    with Dispatched() as counter:
        result = call()
    return result, counter.operators, counter.reads


def waited(call: Callable[[], object]) -> tuple[object, int]:
    """What `call` returns, and how often the host waited for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return result, sum(SYNCHRONISES in str(warning.message) for warning in caught)


def launched(call: Callable[[], object]) -> tuple[object, int]:
    """What `call` returns, and how many kernels, copies and fills the device ran."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        result = call()
        torch.cuda.synchronize()
    return result, sum(event.device_type == torch.autograd.DeviceType.CUDA for event in recorded.events())


def counter(metric: str, device: str) -> Callable[[Callable[[], object]], tuple[object, int]]:
    """Of a call: what it returns, and the count."""
    if device == "cuda":
        return {"syncs": waited, "launches": launched}[metric]
    number = {"syncs": 2, "launches": 1}[metric]

    def count(call: Callable[[], object]) -> tuple[object, int]:
        counted = dispatched(call)
        return counted[0], counted[number]

    return count


def measure(loss, arguments: argparse.Namespace, case, metric: str) -> list[dict]:
    """The records of one problem."""
    inputs, count = loss.problems.make_inputs(case), counter(metric, case.device)
    records = []
    for provider in measures.chosen_providers(loss, arguments, case):
        skipped = provider.why_not(case) or (COMPILED if provider.is_compiled and case.device == "cpu" else None)
        forward = backward = None
        if not skipped:
            try:
                forward, backward = passes(provider.bind(inputs), inputs, count)
            except Exception as error:  # a peer that cannot run here must not end the comparison of the others
                skipped = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        record = measures.case_fields(case, inputs.elements, provider.name, skipped)
        records.append(record | {"counted": COUNTED[metric, case.device], "forward": forward, "backward": backward})
    return records


def passes(forward: Forward, inputs, count: Callable) -> tuple[int, int]:
    """The counts of forward and of backward. The call before sets up whatever is set up once."""
    leaves = leaves_of(inputs.logits)
    torch.autograd.grad(forward(leaves), leaves)
    losses, of_forward = count(lambda: forward(leaves))
    return of_forward, count(lambda: torch.autograd.grad(losses, leaves))[1]
