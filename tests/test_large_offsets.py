"""Index arithmetic beyond 2^31 elements without their memory: tensors of pages that nobody touches, of which the GPU kernels (on the
CPU) run their last blocks or programs alone. What these write at the end must be what a tensor of the end alone gives.

Whole losses read as many elements on a CPU, where gradients would take their memory, and on a large GPU compute gradients too.
"""
import contextlib
import fcntl
import importlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
from harness import Backend, backends_under_test
from torch import Tensor

from rsloss_kernels import (
    _library,
    ghm_classification_loss,
    rank_sort_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
    use_backend,
)

CLASSES, ROWS_AT_THE_END = 80, 320
# Beyond what 31 and what 32 bits count; the end begins at a whole word of the mask.
ROWS = {"2^31": (2**31 // CLASSES + 4 * ROWS_AT_THE_END) // 4 * 4, "2^32": (2**32 // CLASSES + 4 * ROWS_AT_THE_END) // 4 * 4}
BACKENDS = [backend for backend in backends_under_test() if backend.is_slow]
WHOLE_BACKENDS = [backend for backend in backends_under_test() if backend.name != "reference" and not backend.is_slow]


def untouched(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written."""
    count = 1
    for size in shape:
        count *= size
    # Named from Python 3.13 on; the number is that of Linux.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, count * torch.empty((), dtype=dtype).element_size(), flags=flags)
    # Pages that are only read are then one large page of zeros.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def lengthened(end: Tensor, rows: int) -> Tensor:
    """`end` behind so many zeros that it has `rows` rows."""
    result = untouched(rows, *end.shape[1:], dtype=end.dtype)
    result[-len(end) :] = end
    return result


@contextlib.contextmanager
def last_blocks_alone(backend: Backend, monkeypatch) -> Iterator[None]:
    """So many processors that no block takes more than one step, of which only the last ones run."""
    with monkeypatch.context() as patch:
        if backend.name == "cuda":
            patch.setenv("RSL_EMULATOR_PROCESSORS", str(1 << 20))
            patch.setenv("RSL_EMULATOR_LAST_BLOCKS", "128")
        else:
            interpreter = importlib.import_module("triton.runtime.interpreter")
            table = importlib.import_module("rsloss_kernels.losses.triton_common").INTERPRETED
            for name, run in table.items():
                patch.setitem(table, name, run._replace(programs=1 << 30))

            def programs(*bounds):
                return range(*bounds) if len(bounds) > 1 or bounds[0] < 1000 else range(bounds[0] - 2, bounds[0])

            patch.setattr(interpreter, "range", programs, raising=False)
            # It copies every argument onto itself.
            patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        yield


def operator(name: str, backend: Backend) -> Callable:
    return _library.operator(name, backend.name)


def focal(backend: Backend, logits: Tensor, labels: Tensor, _: Tensor) -> Tensor:
    table = torch.tensor([[2.0], [0.25], [0.75]], dtype=torch.float64).expand(3, CLASSES).contiguous()
    grads = [torch.ones(())]
    (gradient,) = operator("focal_backward", backend)([logits], [labels], [], [], table, None, grads, 0, False, False, None, 1.0)
    return gradient


def ghm(backend: Backend, logits: Tensor, labels: Tensor, _: Tensor) -> Tensor:
    bin_weights = torch.linspace(1, 2, 10, dtype=torch.float64)
    (gradient,) = operator("ghm_backward", backend)([logits], [labels], [], bin_weights, torch.ones(()), None, False)
    return gradient


def smooth_l1(backend: Backend, logits: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    return operator("smooth_l1_backward", backend)(logits, others, None, None, None, torch.ones(()), 1.0, 1.0)


def group_softmax(backend: Backend, logits: Tensor, labels: Tensor, _: Tensor) -> Tensor:
    rows, end = logits.shape[0], ROWS_AT_THE_END
    groups = ([0, 30, CLASSES], [-1, -1])
    columns, weights = torch.arange(CLASSES, dtype=torch.int32), torch.ones(end, 2)
    _, averages, tables = operator("group_softmax_forward", backend)(
        logits[-end:].clone(), labels[-end:].clone(), columns, weights.T.contiguous(), *groups, False
    )
    weights = torch.stack([lengthened(weights[:, group], rows) for group in range(2)])
    tables = torch.stack([lengthened(table, rows) for table in tables.view(6, end)]).view(3, 2, rows)
    arguments = (logits, labels, columns, weights, averages, tables, torch.ones(2))
    return operator("group_softmax_backward", backend)(*arguments, *groups, False)


PASSES = {"focal": focal, "ghm": ghm, "smooth_l1": smooth_l1, "group_softmax": group_softmax}


@pytest.mark.parametrize("loss", PASSES)
@pytest.mark.parametrize("kernels", BACKENDS, ids=lambda backend: backend.id)
def test_gradients_beyond_31_bits(kernels, loss, generator, monkeypatch):
    assert kernels.why_not() is None
    end, rows = ROWS_AT_THE_END, ROWS["2^31"]
    logits = torch.randn(end, CLASSES, generator=generator).bfloat16()
    labels = torch.randint(0, CLASSES, (end,), generator=generator)
    others = torch.randn(end, CLASSES, generator=generator).bfloat16()
    wanted = PASSES[loss](kernels, logits, labels, others)
    arguments = [lengthened(part, rows) for part in (logits, labels, others)]
    with last_blocks_alone(kernels, monkeypatch):
        gradient = PASSES[loss](kernels, *arguments)
    assert gradient.numel() > 2**31 and wanted.abs().min() < wanted.abs().max()
    assert torch.equal(gradient[-end:], wanted)


# Values are counted up to 2^32 elements; beyond, and with segments, every element is looked for.
@pytest.mark.parametrize(("size", "num_segments"), [("2^31", 1), ("2^31", 2), ("2^32", 1)])
@pytest.mark.parametrize("kernels", BACKENDS, ids=lambda backend: backend.id)
def test_ranking_passes_beyond_31_bits(kernels, size, num_segments, generator, monkeypatch):
    """A bit mask, records and chunks of the end; the same bins bit for bit, and the same gradient."""
    assert kernels.why_not() is None
    end, rows, positives = ROWS_AT_THE_END * CLASSES, ROWS[size], 40
    before = rows * CLASSES - end
    logits = torch.randn(end, generator=generator).bfloat16()
    mask = torch.randint(0, 256, (end // 8,), generator=generator, dtype=torch.uint8)
    records = torch.zeros(4, positives, dtype=torch.float64)
    index = torch.randperm(end, generator=generator)[:positives].sort()[0]
    records[0], records[1] = logits[index].double(), torch.rand(positives, generator=generator)
    records[3] = index.double()
    counts = torch.tensor([positives, end, rows * CLASSES])
    found = []
    for is_long in (False, True):
        level, negatives, moved, segments = logits, mask, records.clone(), None
        if is_long:
            level, negatives = lengthened(logits, before + end), lengthened(mask, (before + end) // 8)
            moved[3] += before
        if num_segments > 1:
            # Of rows of all classes, in both forms; those at the end belong to the last segment.
            moved[2] = num_segments - 1
            ids = torch.full((ROWS_AT_THE_END, 1), num_segments - 1, dtype=torch.int32)
            segments = lengthened(ids, rows) if is_long else ids
            level = level.view(-1, CLASSES)
        in_segments = (segments, num_segments)
        with last_blocks_alone(kernels, monkeypatch) if is_long else contextlib.nullcontext():
            ranked, bins = operator("ranking_bin", kernels)([level], negatives, moved, counts, *in_segments, 0.25)
            *_, gradients, lines = operator("average_precision_finalize", kernels)(
                [level], negatives, ranked, counts, bins, *in_segments, 0.25, 1.0, True
            )
            upstream = torch.ones(())
            arguments = ([level], negatives, gradients, lines, counts, *in_segments, upstream, upstream)
            (gradient,) = operator("ranking_backward", kernels)(*arguments)
        found.append((bins, gradient.view(-1)[-end:]))
    (bins, gradient), (wanted_bins, wanted) = found[1], found[0]
    assert wanted_bins[0].sum() > end / 4 and wanted.count_nonzero() > end / 4
    assert torch.equal(bins, wanted_bins) and torch.equal(gradient, wanted)


def rank_sort_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack(rank_sort_loss(logits, labels, delta=0.25, max_positives=512)).sum()


def smooth_l1_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows without a label have no weight."""
    return smooth_l1_loss(logits, logits.detach() * 0.5, 1.0, (labels >= 0).to(logits.dtype), reduction="sum")


WHOLE_LOSSES = {
    "rank_sort": rank_sort_of_rows,
    "focal": lambda logits, labels: sigmoid_focal_loss(logits, labels, reduction="sum"),
    "ghm": lambda logits, labels: ghm_classification_loss(logits, labels, (labels >= 0).to(logits.dtype)),
    "smooth_l1": smooth_l1_of_rows,
}


@contextlib.contextmanager
def memory_to_itself(kernels: Backend) -> Iterator[None]:
    """Processes of a test run share the GPU; one at a time takes its memory, and leaves nothing."""
    if kernels.device != "cuda":
        yield
        return
    with open(os.path.join(tempfile.gettempdir(), "rsloss_large_offsets.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


# On a CPU the targets of smooth L1 would take their memory.
WHOLE_CASES = [(kernels, loss) for kernels in WHOLE_BACKENDS for loss in list(WHOLE_LOSSES)[: 4 if kernels.device == "cuda" else 3]]


@pytest.mark.parametrize(("kernels", "loss"), WHOLE_CASES, ids=lambda case: getattr(case, "id", case))
def test_losses_beyond_31_bits(kernels, loss, generator):
    """Ignored rows ahead of those at the end change nothing but the unit of fixed-point sums."""
    assert kernels.why_not() is None
    end = ROWS_AT_THE_END
    if kernels.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 80 << 30:
        pytest.skip("the GPU has less than 80 GiB")
    logits = torch.randn(end, CLASSES, generator=generator).bfloat16()
    labels = torch.randint(0, 2 * CLASSES, (end,), generator=generator, dtype=torch.int32).clamp(max=CLASSES)
    with memory_to_itself(kernels):
        compare_whole(kernels, loss, logits, labels)


def compare_whole(kernels: Backend, loss: str, logits: Tensor, labels: Tensor) -> None:
    end, rows, on_gpu = ROWS_AT_THE_END, ROWS["2^31"], kernels.device == "cuda"
    whole = torch.full((rows,), -1, dtype=torch.int32, device=kernels.device)
    whole[-end:] = labels.to(kernels.device)
    if on_gpu:
        level = torch.zeros(rows, CLASSES, dtype=torch.bfloat16, device="cuda")
        level[-end:] = logits.cuda()
    else:
        level = lengthened(logits, rows)
    values, gradients = [], []
    for part, targets in ((logits.to(kernels.device), labels.to(kernels.device)), (level, whole)):
        part.requires_grad_(on_gpu)
        with use_backend(kernels.name):
            value = WHOLE_LOSSES[loss](part, targets)
        values.append(value.double().item())
        if on_gpu:
            gradients.append(torch.autograd.grad(value, part)[0])
    assert abs(values[1] - values[0]) <= 1e-7 * abs(values[0]) and values[0] > 0
    if on_gpu:
        short, long = gradients
        assert torch.equal(long[-end:], short) or (long[-end:] - short).abs().max() <= 2**-8 * short.abs().max()
        assert long[:-end].count_nonzero() == 0
