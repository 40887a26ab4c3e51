"""Who takes part in the Rank & Sort benchmark, and for which problems each is left out, with the reason."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import rsloss_kernels
from bench.harness import Workload
from bench.logits import Case, Inputs
from bench.peers.bucketed import bucketed_rank_sort_loss
from bench.peers.focal import compiled_focal_loss, focal_loss
from bench.peers.published_loop import published_rank_sort
from bench.peers.vectorised import compiled_rank_sort, vectorised_rank_sort
from rsloss_kernels import _backends

DELTA = 0.5
OPERATOR = "rank_sort_finalize"
FOCAL, COMPILED_FOCAL, LOOP = "focal, eager", "focal, torch.compile", "published loop"
COMPILED = "vectorised, torch.compile"
MODES = ("forward", "backward", "full")
Forward = Callable[[Tensor], tuple[Tensor, ...]]

# Largest P*N, and P*P, that a peer is given: seconds per call for the loop, memory for the broadcast.
LOOP_PAIRS = {"cpu": 6e9, "cuda": 1.1e10}
BROADCAST_PAIRS = {"cpu": 2.5e8, "cuda": 4e9}
FUSED_PAIRS = {"cpu": 1.2e9, "cuda": 1e11}
SQUARE = {"cpu": 2.6e7, "cuda": 4.1e8}


@dataclass(frozen=True)
class Provider:
    """`bind(inputs)` returns the forward pass as a function of the logits; `why_not(case)` why it is left out, or None."""

    name: str
    bind: Callable[[Inputs], Forward]
    why_not: Callable[[Case], str | None] = lambda case: None
    is_ours: bool = False
    can_capture: bool = True
    is_compiled: bool = False


def our_name(backend: str) -> str:
    return f"rank_sort_loss [{backend}]"


def providers(device: str) -> list[Provider]:
    """Every usable backend of ours, then the peers."""
    ours = [_ours(backend) for backend in our_backends(device)]
    return ours + [
        Provider(LOOP, _dense(published_rank_sort), _limit("P*N", LOOP_PAIRS), can_capture=False),
        Provider("bucketed", _dense(bucketed_rank_sort_loss), _limit("P*P", SQUARE), can_capture=False),
        Provider("vectorised", _dense(vectorised_rank_sort), _both(BROADCAST_PAIRS), can_capture=False),
        Provider(COMPILED, _dense(compiled_rank_sort), _both(FUSED_PAIRS), can_capture=False, is_compiled=True),
        Provider(FOCAL, _focal(focal_loss)),
        Provider(COMPILED_FOCAL, _focal(compiled_focal_loss), is_compiled=True),
    ]


def our_backends(device: str) -> list[str]:
    """The usable backends, the automatic choice first. On a CPU Triton is its interpreter, which is not timed."""
    usable = _backends.usable(OPERATOR, device)
    if device == "cpu":
        usable = [backend for backend in usable if backend != "triton"]
    return sorted(usable, key=lambda backend: backend != _backends.resolve(OPERATOR, device))


def why_no_backend(backend: str, device: str) -> str | None:
    return _backends.why_not(OPERATOR, backend, device)


def _ours(backend: str) -> Provider:
    def bind(inputs: Inputs) -> Forward:
        targets, quality, capacity = inputs.targets, inputs.quality, inputs.case.max_positives

        def forward(logits: Tensor) -> tuple[Tensor, ...]:
            return rsloss_kernels.rank_sort_loss(logits, targets, quality, delta=DELTA, max_positives=capacity)

        def forced(logits: Tensor) -> tuple[Tensor, ...]:
            with rsloss_kernels.use_backend(backend):
                return forward(logits)

        is_automatic = backend == _backends.resolve(OPERATOR, inputs.logits.device.type)
        return forward if is_automatic else forced

    return Provider(our_name(backend), bind, is_ours=True, can_capture=backend != "reference")


def _dense(function: Callable) -> Callable[[Inputs], Forward]:
    return lambda inputs: lambda logits: function(logits, inputs.dense, DELTA)


def _focal(function: Callable) -> Callable[[Inputs], Forward]:
    def bind(inputs: Inputs) -> Forward:
        binary = (inputs.dense > 0).to(inputs.logits.dtype)
        return lambda logits: (function(logits, binary),)

    return bind


def _limit(what: str, limits: dict[str, float]) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        size = case.positives * (case.negatives if what == "P*N" else case.positives)
        limit = limits[case.device]
        return f"{what} = {size:.1e} is above {limit:.1e}" if size > limit else None

    return why_not


def _both(pairs: dict[str, float]) -> Callable[[Case], str | None]:
    return lambda case: _limit("P*N", pairs)(case) or _limit("P*P", SQUARE)(case)


def workload(provider: Provider, inputs: Inputs, mode: str) -> Workload:
    """forward: the losses with their graph; backward: the gradient from a fresh graph; full: both, as a training step."""
    forward = provider.bind(inputs)
    leaf = inputs.logits.detach().clone().requires_grad_()
    if mode == "forward":
        return Workload(provider.name, lambda: forward(leaf))
    if mode == "full":
        return Workload(provider.name, lambda: torch.autograd.grad(forward(leaf), leaf))
    graph = []

    def prepare() -> None:
        graph[:] = [forward(leaf)]

    return Workload(provider.name, lambda: torch.autograd.grad(graph.pop(), leaf), prepare)
