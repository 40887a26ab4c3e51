"""What must be true of every case, on every backend: the truth to the precision gates, the same bits every time, inputs left alone."""
import copy
from collections.abc import Sequence

import harness
import numpy as np
import torch
from harness import Backend, Evaluation
from rsloss_kernels import ClassGroups, _library, use_backend
from torch import Tensor

from .case import Case, Wanted
from .cases import WITHOUT_BACKENDS

# Emulated and interpreted kernels take a second for what is chunked elsewhere.
LARGEST_ON_SLOW = 300
# Half a unit in the last place of a loss that is not a sum; and what no gate is relative to, as in the tests of single losses.
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 1e-300}
SMALLEST_OF_POWERS = {torch.float32: 1e-25, torch.float64: 1e-280, torch.float16: 2.0**-25, torch.bfloat16: 1e-25}


def check(case: Case, backends: Sequence[Backend]) -> list[Backend]:
    """Raises AssertionError, or whatever the loss raises. Returns the backends that ran the case."""
    # A copy of all memory around the arguments too.
    memory = {level.untyped_storage().data_ptr(): _bytes(level) for level in [*case.given, *case.logits]}
    before = {pointer: value.clone() for pointer, value in memory.items()}
    chosen = [backend for backend in backends if _takes(backend, case)]
    results: list[tuple[Backend, Evaluation]] = []
    # Of numpy, which the oracles and Triton's interpreter compute with.
    with np.errstate(all="ignore"):
        wanted = case.truth()
        for backend in chosen:
            first, second = (_with_threads(number, case, backend) for number in (1, 2))
            _assert_same(first, second, backend, case)
            for pointer, value in memory.items():
                assert torch.equal(value, before[pointer]), f"{backend.id}: an argument changed"
            assert_true(backend, case, first, wanted)
            if results and (wanted.gradient is None or None in wanted.losses):
                assert_agree(backend, case, first, *results[0])
            results.append((backend, first))
            if case.also is not None:
                case.also(backend)
    return chosen


def _takes(backend: Backend, case: Case) -> bool:
    if case.loss in WITHOUT_BACKENDS:
        return backend.name == "reference" or backend.device == "cuda"
    if case.loss == "seesaw" and backend.name not in _library.implemented_by("seesaw_forward"):
        return False  # by design
    return not (backend.is_slow and case.elements > LARGEST_ON_SLOW)


def _bytes(value: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())


def _with_threads(number: int, case: Case, backend: Backend) -> Evaluation:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return evaluate(case, backend)
    finally:
        torch.set_num_threads(before)


def _on_device(value, device: str):
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_on_device(entry, device) for entry in value]
    return copy.deepcopy(value).to(device) if isinstance(value, ClassGroups) and device != "cpu" else value


def evaluate(case: Case, backend: Backend) -> Evaluation:
    """Losses and gradient on the CPU, lists of levels in the order of `Case.to_canonical`."""
    device = backend.device
    leaves = [_on_device(level.detach(), device).requires_grad_(case.has_gradient) for level in case.logits]
    others = [_on_device(value, device) for value in case.others]
    options = {name: _on_device(value, device) for name, value in case.options.items()}
    with use_backend(backend.name):
        returned = case.function(leaves if case.is_list else leaves[0], *others, **options)
    if isinstance(returned, list):
        losses, statistics = tuple(returned), ()
    else:
        losses = harness.losses_in(returned)
        statistics = () if isinstance(returned, Tensor) else returned[len(losses) :]
    gradient = torch.zeros(0)
    if case.has_gradient:
        kept = [(value, factor) for value, factor in zip(losses, case.upstream, strict=True) if factor is not None]
        factors = [torch.as_tensor(factor, dtype=value.dtype, device=device).expand_as(value) for value, factor in kept]
        gradients = torch.autograd.grad([value for value, _ in kept], leaves, factors)
        for level, one in zip(leaves, gradients, strict=True):
            assert one.shape == level.shape and one.dtype == level.dtype, f"{backend.id}: gradient {one.dtype} {one.shape}"
            assert one.numel() == 0 or one.untyped_storage().data_ptr() != level.untyped_storage().data_ptr(), "gradient is the logits"
        gradient = case.to_canonical(gradients).cpu()
    else:
        assert not any(value.requires_grad for value in losses), f"{backend.id}: the result must be detached"
    detached = [value.detach().cpu() for value in losses]
    if case.is_elementwise:
        detached = [case.to_canonical(detached)]
    return Evaluation(tuple(detached), gradient, tuple(value.detach().cpu() for value in statistics))


def _assert_same(first: Evaluation, second: Evaluation, backend: Backend, case: Case) -> None:
    if not backend.is_deterministic or first == second:
        return
    again = _with_threads(1, case, backend)
    reason = "the number of threads" if again == first else "runs with one thread"
    raise AssertionError(f"{backend.id}: other bits, between {reason}")


def assert_true(backend: Backend, case: Case, got: Evaluation, wanted: Wanted) -> None:
    """Against the truth, as far as its oracle goes."""
    assert len(got.losses) == len(wanted.losses), f"{backend.id}: {len(got.losses)} losses"
    label = f"{backend.id} {case.loss}"
    for value, expected in zip(got.losses, wanted.losses, strict=True):
        if expected is not None:
            assert_loss(backend, value, torch.as_tensor(expected, dtype=torch.float64), case, label)
    if wanted.gradient is not None:
        value, expected = settle(got.gradient, wanted.gradient.reshape(got.gradient.shape), f"{label} gradient")
        assert_gradient(backend, case, value, expected, label)
    if wanted.statistics is not None:
        wanted.statistics(backend, got.statistics)


def noise_of(case: Case, dtype: torch.dtype) -> float:
    """What of a result of the dtype no gate is relative to; with large powers that is where exponentials end, times their factors."""
    return max(case.noise, SMALLEST.get(dtype, 0.0)) if case.slack == 1 else SMALLEST_OF_POWERS[dtype]


def assert_gradient(backend: Backend, case: Case, value: Tensor, expected: Tensor, label: str) -> None:
    slack = case.slack
    # What arrives from above multiplies the last bits of the smallest numbers too.
    factors = [float(torch.as_tensor(factor).abs().max()) for factor in case.upstream if factor is not None and torch.as_tensor(factor).numel()]
    noise = noise_of(case, value.dtype) * max(1.0, *factors, 0.0)
    if slack > 1 and value.dtype == torch.float64:
        bound = slack * backend.gradient_gate(value.dtype) * expected.nan_to_num(0).abs().amax().item() if expected.numel() else 0.0
        harness.assert_within(value, expected, bound + noise, f"{label} gradient")
    else:
        harness.assert_gradient(backend, value, expected, label, noise, slack * case.narrow)


def assert_loss(backend: Backend, value: Tensor, expected: Tensor, case: Case, label: str) -> None:
    """Of one number: to the gate of the logits' dtype. Of many, to that and the rounding of their own dtype."""
    dtype = case.logits[0].dtype
    gate, noise = case.slack * backend.loss_gate(dtype), noise_of(case, value.dtype)
    if value.dtype == torch.int64:
        assert torch.equal(value.double(), expected.reshape(value.shape)), f"{label}: wrong labels"
        return
    if value.dim():
        relative, smallest = harness.ROUNDING.get(value.dtype, (ROUNDING.get(value.dtype), 0.0))
        gate, noise = gate + relative, max(smallest, noise)
    else:
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), f"{label}: loss of {value.dtype}"
    value, expected = settle(value, expected.reshape(value.shape), f"{label} loss")
    harness.assert_within(value, expected, gate * expected.abs() + noise, f"{label} loss")


def settle(got: Tensor, wanted: Tensor, label: str) -> tuple[Tensor, Tensor]:
    """Without what the dtype of `got` has no number for: that must be the infinity of its sign."""
    largest = torch.finfo(got.dtype).max
    # What rounds to infinity or to the largest number, depending on the last bits.
    is_close = (wanted.abs() - largest).abs() <= largest * 2 * torch.finfo(got.dtype).eps
    is_beyond = (wanted.abs() > largest) & ~is_close
    if not bool((is_beyond | is_close).any()):
        return got, wanted
    assert torch.equal(got[is_beyond].double(), wanted[is_beyond].sign() * torch.inf), f"{label}: not infinite where the truth is"
    is_close &= got.isinf() & (got.sign() == wanted.sign())
    return got.masked_fill(is_beyond | is_close, 0), wanted.masked_fill(is_beyond | is_close, 0)


def assert_agree(backend: Backend, case: Case, got: Evaluation, other: Backend, expected: Evaluation) -> None:
    """Two backends beyond the oracle: each may be as far from the truth as its gate."""
    dtype = case.logits[0].dtype
    label = f"{backend.id} beside {other.id} {case.loss}"
    gate = case.slack * (backend.loss_gate(dtype) + other.loss_gate(dtype))
    for value, wanted in zip(got.losses, expected.losses, strict=True):
        relative, smallest = harness.ROUNDING.get(value.dtype, (ROUNDING.get(value.dtype, 0.0), 0.0))
        value, wanted = settle(value, wanted.double(), label)
        bound = (gate + 2 * relative * (value.dim() > 0)) * wanted.abs() + 2 * smallest + noise_of(case, value.dtype)
        harness.assert_within(value, wanted, bound, f"{label} loss")
    value, wanted = settle(got.gradient, expected.gradient.double(), label)
    largest = wanted.nan_to_num(0).abs().amax() if wanted.numel() else 0.0
    relative, smallest = harness.ROUNDING.get(dtype, (0.0, 0.0))
    gate = case.slack * (backend.gradient_gate(dtype, case.narrow) + other.gradient_gate(dtype, case.narrow))
    bound = gate * largest + 2 * relative * wanted.abs() + 2 * smallest + noise_of(case, dtype)
    harness.assert_within(value, wanted, bound, f"{label} gradient")
