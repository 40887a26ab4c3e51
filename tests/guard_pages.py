"""Every Triton kernel under the interpreter with each of its tensors between two pages that nobody may touch: an access beyond the last
element, or before the first one, kills the process at once.

    python -m tests.guard_pages                    kernels that are wrong on purpose, then all kernels
    python -m tests.guard_pages --quick            fewer sizes and dtypes, as in CI
    python -m tests.guard_pages --fuzz 500         random cases of all losses besides; --seed

A tensor lies right before the page behind it, or right behind the page before it: everything runs twice. A kernel gets no more than what its
arguments reach of their memory. Each part runs in a process of its own, whose death is reported with the Python stack.
"""
import argparse
import ctypes
import faulthandler
import importlib
import mmap
import os
import pathlib
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator

os.environ["TRITON_INTERPRET"] = "1"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

import rsloss_kernels as r  # noqa: E402

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ_WRITE, PRIVATE_ANONYMOUS = 0, 3, 0x22
SIDES = ("end", "start")
# Rows and classes, of 1, 63, 65 and 1003 elements.
SIZES = ((1, 1), (21, 3), (13, 5), (59, 17))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Bytes that end where a page begins that nobody may touch, or begin where such a page ends."""

    def __init__(self, size: int, side: str):
        self._room = -(-size // PAGE) * PAGE
        self._address = _libc.mmap(None, self._room + 2 * PAGE, PROT_NONE, PRIVATE_ANONYMOUS, -1, 0)
        if self._address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        first = self._address + PAGE
        if _libc.mprotect(first, self._room, PROT_READ_WRITE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        begin = first + (self._room - size if side == "end" else 0)
        self.bytes = torch.frombuffer((ctypes.c_char * size).from_address(begin), dtype=torch.uint8)

    def release(self) -> None:
        """Nothing may look at the bytes any more."""
        _libc.munmap(self._address, self._room + 2 * PAGE)


class Guard:
    """Puts the tensors of every launch between such pages, and what the kernel wrote back."""

    def __init__(self, side: str):
        self.side = side
        self.launched: set[str] = set()

    def install(self) -> None:
        guard = self

        def to_pages(executor, args, kwargs):
            guard.launched.add(executor.fn.__name__)
            return guard.move_in([*args], kwargs)

        def from_pages(executor, args, args_inside, kwargs, kwargs_inside):
            guard.move_out()

        interpreter.GridExecutor._init_args_hst = to_pages
        interpreter.GridExecutor._restore_args_dev = from_pages

    def move_in(self, args: list, kwargs: dict) -> tuple[list, dict]:
        # Arguments that share memory keep sharing it.
        spans: dict[int, list] = {}
        for value in [*args, *kwargs.values()]:
            if isinstance(value, Tensor) and value.numel():
                first, last = _span(value)
                found = spans.setdefault(value.untyped_storage().data_ptr(), [value, first, last])
                found[1:] = min(found[1], first), max(found[2], last)
        self._moved = {}
        for storage, (value, first, last) in spans.items():
            outside = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())[first:last]
            inside = Guarded(last - first, self.side)
            inside.bytes.copy_(outside)
            self._moved[storage] = (inside, outside, first)
        return [self._inside(value) for value in args], {name: self._inside(value) for name, value in kwargs.items()}

    def _inside(self, value):
        if not isinstance(value, Tensor) or not value.numel():
            return value
        inside, _, first = self._moved[value.untyped_storage().data_ptr()]
        offset = value.storage_offset() - first // value.element_size()
        return value.detach().new_empty(0).set_(inside.bytes.untyped_storage(), offset, value.size(), value.stride())

    def move_out(self) -> None:
        for inside, outside, _ in self._moved.values():
            outside.copy_(inside.bytes)
            inside.release()
        self._moved = {}


def _span(value: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor reaches."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))
    return value.storage_offset() * value.element_size(), (value.storage_offset() + extent) * value.element_size()


# --- kernels that are wrong on purpose ---


@triton.jit
def copy_kernel(from_ptr, to_ptr, size, read_at, write_at, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    # Lanes beyond the end have addresses in the pages, and must not be touched there.
    value = tl.load(from_ptr + place + read_at, mask=place < size)
    tl.store(to_ptr + place + write_at, value, mask=place < size)


def copies(read_at: int, write_at: int) -> Callable[[], None]:
    def run() -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            values, result = torch.arange(7, dtype=dtype), torch.zeros(7, dtype=dtype)
            copy_kernel[1,](values, result, 7, read_at, write_at, 4096)
            assert torch.equal(values, result)

    return run


# side -> name -> (kernel, whether it must live)
CONTROLS = {
    "end": {"is right": ((0, 0), True), "reads one too far": ((1, 0), False), "writes one too far": ((0, 1), False)},
    "start": {"is right": ((0, 0), True), "reads one too early": ((-1, 0), False), "writes one too early": ((0, -1), False)},
}

# --- the library's kernels ---


def calls(rows: int, classes: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Logits and a loss of them, 0-d."""
    generator = torch.Generator().manual_seed(rows * classes)
    logits = torch.randn(rows, classes, generator=generator).to(dtype)
    labels = torch.randint(-1, classes + 1, (rows,), generator=generator)
    labels[0] = 0
    quality = torch.rand(rows, generator=generator) * 0.9 + 0.1
    dense = torch.where(torch.rand(rows, classes, generator=generator) < 0.1, 0.7, 0.0)
    ids, ratio = torch.randint(-1, 3, (rows,), generator=generator), torch.rand(classes, generator=generator)
    yield logits, lambda x: sum(r.rank_sort_loss(x, labels, quality))
    yield logits, lambda x: sum(r.rank_sort_loss(x, dense, delta=0.0))
    yield logits, lambda x: sum(r.rank_sort_loss(x, labels, quality, segments=ids, num_segments=3))
    yield logits, lambda x: r.average_precision_loss(x, dense)
    yield logits, lambda x: r.alrp_loss(x, labels, quality).classification
    yield logits.view(1, classes, rows), lambda x: sum(r.rank_sort_loss([x], labels[None], layout="anchor_major", num_classes=classes))
    state = {"acc_sum": torch.rand(7, generator=generator).double(), "num_updates": torch.arange(7)}
    yield logits, lambda x: r.ghm_classification_loss(x, labels, quality, bins=7, momentum=0.5, **state).loss
    yield logits, lambda x: r.ghm_regression_loss(x, dense, quality[:, None].expand(rows, classes), mu=0.1)
    yield logits.view(1, classes, rows), lambda x: r.ghm_classification_loss([x], labels[None], layout="anchor_major", num_classes=classes)
    yield logits, lambda x: r.sigmoid_focal_loss(x, labels, weight=quality, reduction="sum")
    yield logits, lambda x: r.sigmoid_focal_loss(x, dense, gamma=ratio * 3).sum()
    yield logits, lambda x: r.quality_focal_loss(x, labels, quality, reduction="mean")
    yield logits, lambda x: r.equalized_focal_loss(x, labels, ratio).loss
    yield torch.cat([logits, logits[:, :1]], 1), lambda x: r.eqlv2_loss(x, labels.clamp(min=0), ratio + 0.5).loss
    groups = r.ClassGroups([list(range(classes // 2)), list(range(classes // 2, classes))])
    grouped = torch.randn(rows, groups.num_logits, generator=generator).to(dtype)

    def of_groups(x: Tensor) -> Tensor:
        keys = torch.Generator().manual_seed(1)
        scores = r.group_softmax_scores(x, groups, background="last")
        return r.group_softmax_loss(x, labels, groups, others_ratio=1.0, generator=keys, background="last").sum() + 0 * scores.sum()

    yield grouped, of_groups
    wide = torch.cat([logits, logits[:, :1], -logits[:, :1]], 1)
    yield wide, lambda x: sum(r.seesaw_loss(x, labels, torch.ones(classes + 1), quality))
    yield wide, lambda x: sum(value.sum() for value in r.seesaw_loss(x, labels, torch.ones(classes + 1), reduction="none"))
    yield logits, lambda x: r.smooth_l1_loss(x, dense, 0.5, quality, reduction="mean")
    yield logits, lambda x: r.smooth_l1_loss(x, dense, torch.tensor(0.5), reduction="none").sum()


def kernels() -> set[str]:
    """All that the library launches, by its sources."""
    sources = (path.read_text() for path in (ROOT / "rsloss_kernels" / "losses").rglob("*.py"))
    return {name for source in sources for name in re.findall(r"\b(\w+_kernel)\[", source)}


def run_library(guard: Guard, is_quick: bool) -> None:
    values = importlib.import_module("rsloss_kernels.losses.ranking.triton_values")
    guard.install()
    count = 0
    # Accesses before the first element are the rarer fault.
    for number, (rows, classes) in enumerate(SIZES[1:3] if is_quick and guard.side == "start" else SIZES):
        dtypes = (torch.float32, torch.bfloat16)
        for dtype in dtypes[number % 2 :][:1] if is_quick else dtypes:
            for logits, loss in calls(rows, classes, dtype):
                evaluate(logits, loss)
                count += 1
    # 16-bit logits by value, which takes many elements otherwise.
    most, values.FEWEST_BY_VALUE = values.FEWEST_BY_VALUE, 1
    evaluate(*next(calls(13, 5, torch.bfloat16)))
    values.FEWEST_BY_VALUE = most
    missing = kernels() - guard.launched
    assert not missing, f"no case launches {', '.join(sorted(missing))}"
    print(f"{guard.side}: {count} calls of losses, {len(kernels())} kernels", flush=True)


def evaluate(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """Its value near the reference's: what was moved in and out arrived."""
    leaf = logits.clone().requires_grad_()
    with r.use_backend("triton"):
        value = loss(leaf)
    value.backward()
    with r.use_backend("reference"):
        wanted = loss(logits)
    assert torch.allclose(value.detach().double(), wanted.double(), rtol=1e-2, atol=1e-6, equal_nan=True), (value, wanted)
    assert leaf.grad.isfinite().all()


def run_fuzz(cases: int, seed: int) -> None:
    """Random cases, as far as Triton takes them."""
    from fuzz import cases as drawn
    from fuzz import checks
    from harness import Backend

    ran = number = 0
    while ran < cases:
        ran += bool(checks.check(drawn.draw(f"{seed}:{number}"), [Backend("triton", "cpu")]))
        number += 1
    print(f"{ran} cases of {number} with seed {seed}", flush=True)


def survives(run: Callable[[], object], is_silent: bool = False) -> int:
    """Runs it in a process of its own. The signal that killed that one, negative; else its exit status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if is_silent:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            faulthandler.enable()
            with np.errstate(all="ignore"):
                run()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(arguments: list[str]) -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.guard_pages", description=__doc__, formatter_class=shape)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and dtypes")
    parser.add_argument("--fuzz", type=int, default=0, metavar="CASES", help="random cases of all losses, for each side")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of the random cases")
    options = parser.parse_args(arguments)
    # A process that forks must have no other threads.
    torch.set_num_threads(1)
    importlib.import_module("quick_interpreter").quicken()
    failed = 0
    guards = [Guard(side) for side in SIDES]
    for guard in guards:
        guard.install()
        side = guard.side
        for name, (offsets, must_live) in CONTROLS[side].items():
            status = survives(copies(*offsets), is_silent=not must_live)
            holds = status == (0 if must_live else -signal.SIGSEGV)
            failed += not holds
            print(f"{'ok  ' if holds else 'FAIL'} {side}, a kernel that {name}: {'lives' if status == 0 else f'status {status}'}")
        if options.fuzz:
            status = survives(lambda: run_fuzz(options.fuzz, options.seed))
            failed += status != 0
            print(f"{'ok  ' if status == 0 else 'FAIL'} {side}, {options.fuzz} random cases, --seed {options.seed}: status {status}")
    # Both in one process, which prepares each kernel once.
    status = survives(lambda: [run_library(guard, options.quick) for guard in guards])
    print(f"{'ok  ' if status == 0 else 'FAIL'} the library's kernels: status {status}")
    return int(failed > 0 or status != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
