"""What every test of a loss shares: the backends under test, one way to evaluate a loss, and the precision gates.

`RSLOSS_TEST_BACKENDS` (comma list) names the backends that must run; one that cannot fails every test that promised it. A backend
that computes on CPU tensors here (the emulated CUDA kernels, Triton's interpreter) is tested on those; where there is a GPU, `cuda`
and `triton` are tested on CUDA tensors.
"""
import dataclasses
import importlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rsloss_kernels
from rsloss_kernels import _backends, _library

# Tests beside MMDetection, torchvision and Ultralytics are left out, on machines that cannot have these.
WITHOUT_FRAMEWORKS = os.environ.get("RSLOSS_TEST_WITHOUT_FRAMEWORKS", "0") != "0"
HOST_COMPILER = "/usr/bin/g++"
# Rounding of a value to a 16-bit type: half a unit in the last place, and half the smallest subnormal.
ROUNDING = {torch.float16: (2**-11, 2**-25), torch.bfloat16: (2**-8, 2**-134)}
# The originals subtract two numbers near 1 for a sorting loss near 0; their float64 outputs carry that much noise.
NOISE = 1e-15
# What some losses return besides losses, by name.
STATISTICS = ("rank", "order", "acc_sum", "num_updates", "pos_grad", "neg_grad")


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    device: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.device}"

    @property
    def is_interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    @property
    def is_slow(self) -> bool:
        """GPU kernels that run on the CPU."""
        return self.name in ("cuda", "triton") and self.device == "cpu"

    @property
    def is_compiled(self) -> bool:
        return self.name in ("cpp", "cuda")

    @property
    def is_deterministic(self) -> bool:
        return self.name != "reference" or self.device == "cpu"

    def loss_gate(self, dtype: torch.dtype) -> float:
        """Largest error of a loss, relative to its true value."""
        return self._float64_gate if dtype == torch.float64 else 1e-7

    def gradient_gate(self, dtype: torch.dtype, narrow: float = 1e-6) -> float:
        """Largest error of a gradient entry, relative to the largest true entry; `narrow` that of the loss in float32."""
        return self._float64_gate if dtype == torch.float64 else narrow

    @property
    def _float64_gate(self) -> float:
        return 1e-9 if self.name in ("cuda", "triton") else 1e-10

    def why_not(self) -> str | None:
        """None if the backend can run every operator that it implements on the device, else the reason in words."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU"
        if self.name == "cuda" and self.device == "cpu":
            _emulate_cuda()
        mine = (name for name in operator_names() if self.name in _library.implemented_by(name))
        return next(filter(None, (_backends.why_not(name, self.name, self.device) for name in mine)), None)


def _emulate_cuda() -> None:
    """Compiles the CUDA sources for the host and loads them as kernels of the `.cuda` overloads for CPU tensors, once."""
    if not _library.has_native_kernel("ranking_bin", "cuda", "cpu"):
        is_sanitized = os.environ.get("RSLOSS_TEST_SANITIZED", "0") != "0"
        importlib.import_module("cuda_on_cpu.build").load_emulated_cuda(is_sanitized)
        _backends.look_up_reasons()


def backends_under_test() -> list[Backend]:
    names = os.environ.get("RSLOSS_TEST_BACKENDS")
    return [_on_its_device(name.strip()) for name in names.split(",")] if names else list(_default_backends())


def _default_backends() -> Iterator[Backend]:
    yield Backend("reference", "cpu")
    yield Backend("cpp", "cpu")
    if torch.cuda.is_available():
        yield Backend("reference", "cuda")
        yield Backend("cuda", "cuda")
        yield Backend("triton", "cuda")
        return
    if os.path.exists(HOST_COMPILER):
        yield Backend("cuda", "cpu")
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Backend("triton", "cpu")


def _on_its_device(name: str) -> Backend:
    if name not in _library.BACKENDS:
        raise ValueError(f"RSLOSS_TEST_BACKENDS: wanted some of {', '.join(_library.BACKENDS)}, got {name!r}")
    runs_on_gpu = name in ("cuda", "triton") and torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    return Backend(name, "cuda" if runs_on_gpu else "cpu")


def operator_names() -> list[str]:
    """Every operator of the library, without its overloads."""
    prefix = f"{_library.NAMESPACE}::"
    found = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    return sorted(name.removeprefix(prefix) for name in found)


@dataclasses.dataclass
class Evaluation:
    """Losses, the gradient of the logits, and what else a loss returns, on the CPU."""

    losses: tuple[Tensor, ...]
    gradient: Tensor
    statistics: tuple[Tensor, ...] = ()

    def __eq__(self, other: "Evaluation") -> bool:
        """Bitwise, NaN equal to NaN."""
        mine, theirs = ((*one.losses, one.gradient, *one.statistics) for one in (self, other))
        return all(torch.equal(bits(a), bits(b)) for a, b in zip(mine, theirs, strict=True))


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def losses_in(returned: Tensor | tuple) -> tuple[Tensor, ...]:
    """The 0-d losses among what a loss returns; the others are statistics."""
    if isinstance(returned, Tensor):
        return (returned,)
    return tuple(value for name, value in zip(returned._fields, returned, strict=True) if name not in STATISTICS)


def evaluate(
    backend: Backend,
    logits: Tensor,
    *others: Tensor | None,
    loss: Callable = rsloss_kernels.rank_sort_loss,
    upstream: Sequence[float | None] | None = None,
    **options,
) -> Evaluation:
    """Runs a loss and its backward. `upstream`: the gradient of each loss, by default 1; None drops that loss from the graph.

    Backward runs after the choice of the backend was undone, as it does on a thread of its own.
    """
    leaf = logits.detach().to(backend.device).requires_grad_()
    moved = [value if value is None else value.to(backend.device) for value in others]
    with rsloss_kernels.use_backend(backend.name):
        returned = loss(leaf, *moved, **on_device(options, backend))
    losses = losses_in(returned)
    statistics = () if isinstance(returned, Tensor) else returned[len(losses) :]
    kept = [(value, factor) for value, factor in zip(losses, upstream or [1.0] * len(losses), strict=True) if factor is not None]
    factors = [torch.full_like(value, factor) for value, factor in kept]
    (gradient,) = torch.autograd.grad([value for value, _ in kept], leaf, factors)
    detached = (tuple(value.detach().cpu() for value in values) for values in (losses, statistics))
    return Evaluation(next(detached), gradient.cpu(), next(detached))


def operators_of_backward(value: Tensor) -> list[str]:
    """Runs backward on a thread of its own, as autograd may, and after the choice of the backend was undone. Which of the library's
    operators ran, with their overloads."""
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == _library.NAMESPACE:
                names.append(str(function).removeprefix(f"{_library.NAMESPACE}."))
            return function(*args, **(kwargs or {}))

    def run() -> None:
        with Recorder():
            value.backward()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return names


def on_device(options: dict, backend: Backend) -> dict:
    return {name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in options.items()}


def smallest_of(dtype: torch.dtype) -> float:
    """Below it nothing is relative: the smallest float32, and for float64 logits e^-708, rounded up to a power of two."""
    return 2.0**-1021 if dtype == torch.float64 else 2.0**-149


def assert_gates(
    backend: Backend,
    got: Evaluation,
    losses: Sequence[float],
    gradient: Tensor,
    label: str = "",
    noise: float = 0.0,
    narrow: float = 1e-6,
) -> None:
    """Losses and gradient against the float64 truth, to the gates of the logits' dtype. NaN must stand where the truth has NaN."""
    dtype = got.gradient.dtype
    for value, wanted in zip(got.losses, losses, strict=True):
        assert value.shape == () and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_within(value, wanted, backend.loss_gate(dtype) * abs(wanted) + noise, f"{label} loss")
    assert_gradient(backend, got.gradient, gradient, label, noise, narrow)


def assert_gradient(
    backend: Backend, got: Tensor, wanted: Tensor, label: str = "", noise: float = 0.0, narrow: float = 1e-6
) -> None:
    """Each entry to the gate times the largest entry, and the whole in relative L2 norm; plus the rounding of a 16-bit dtype."""
    wanted = wanted.reshape(got.shape)
    gate, largest = backend.gradient_gate(got.dtype, narrow), wanted.nan_to_num(0).abs().amax() if wanted.numel() else 0.0
    relative, smallest = ROUNDING.get(got.dtype, (0.0, 0.0))
    assert_within(got, wanted, gate * largest + relative * wanted.abs() + smallest + noise, f"{label} gradient")
    known = ~wanted.isnan()
    error, size = (got.double() - wanted)[known].norm(), wanted[known].norm()
    bound = (gate + relative) * size + (smallest + noise) * wanted.numel() ** 0.5
    assert error <= bound, f"{label} gradient: L2 error {error:.3e} above {bound:.3e}"


def assert_within(got: Tensor, wanted: Tensor | float, bound: Tensor | float, label: str) -> None:
    got, wanted = got.double(), torch.as_tensor(wanted, dtype=torch.float64).expand(got.shape)
    assert torch.equal(got.isnan(), wanted.isnan()), f"{label}: NaN at {where(got.isnan())}, wanted at {where(wanted.isnan())}"
    known = ~wanted.isnan()
    excess = ((got - wanted).abs() - bound)[known]
    if excess.numel() and not excess.max() <= 0:
        worst = excess.argmax()
        raise AssertionError(
            f"{label}: got {got[known][worst]:.17g}, wanted {wanted[known][worst]:.17g}, "
            f"beyond the gate by {excess.max():.3e} ({int((excess > 0).sum())} of {got.numel()} entries are)"
        )


def where(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()[:8]


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of one test: depend on the seed of the run and on the test's name, not on which tests ran before.

    Both are mixed into 32 bits, which is all that torch's generator for CPUs takes of a seed.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


@dataclasses.dataclass
class Pipeline:
    """The operators of a ranking loss called one by one, as a process group or several feature maps would."""

    backend: Backend
    logits: list[Tensor]
    targets: list[Tensor]
    quality: list[Tensor] = dataclasses.field(default_factory=list)
    delta: float = 0.5
    capacity: int | None = None
    maps: bool = False
    background_first: bool = False
    segments: Tensor | None = None
    num_segments: int = 1
    finalize: str = "rank_sort_finalize"
    finalize_options: tuple = (False,)

    def call(self, name: str, *arguments):
        return _library.operator(name, self.backend.name)(*arguments)

    def collect(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.call(
            "ranking_collect",
            self.logits,
            self.targets,
            self.quality,
            self.segments,
            self.num_segments,
            self.capacity,
            self.maps,
            self.background_first,
        )

    def bin(self, negatives: Tensor, positives: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (self.logits, negatives, positives, counts, self.segments, self.num_segments, self.delta)
        return self.call("ranking_bin", *arguments)

    def finish(self, logits: list[Tensor], negatives: Tensor, ranked: Tensor, counts: Tensor, bins: Tensor) -> tuple[Tensor, ...]:
        """The losses, then a statistic of some losses, then `gradients` and `lines`."""
        return self.call(
            self.finalize,
            logits,
            negatives,
            ranked,
            counts,
            bins,
            self.segments,
            self.num_segments,
            self.delta,
            1.0,
            *self.finalize_options,
        )

    def run(self, upstream: Sequence[float] | None = None) -> Evaluation:
        positives, negatives, counts = self.collect()
        ranked, bins = self.bin(negatives, positives, counts)
        leaves = [level.detach().requires_grad_() for level in self.logits]
        losses = [value for value in self.finish(leaves, negatives, ranked, counts, bins) if value.requires_grad]
        factors = [torch.full_like(value, factor) for value, factor in zip(losses, upstream or [1.0] * len(losses), strict=True)]
        gradients = torch.autograd.grad(losses, leaves, factors)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        return Evaluation(tuple(value.detach().cpu() for value in losses), flat.cpu())


def moved(value: object, device: str) -> object:
    """A tensor on the device, in lists and tuples too; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(entry, device) for entry in value)
    return value.to(device) if isinstance(value, Tensor) else value
