"""Who takes part in a benchmark: a name, how to bind it to inputs, and for which problems it is left out."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import Workload
from bench.peers.focal import compiled_focal_loss, focal_loss

FOCAL, COMPILED_FOCAL = "focal, eager", "focal, torch.compile"
MODES = ("forward", "backward", "full")
Forward = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Provider:
    """`bind(inputs)` returns the forward pass as a function of the logits; `why_not(case)` why it is left out, or None."""

    name: str
    bind: Callable[[object], Forward]
    why_not: Callable[[object], str | None] = lambda case: None
    is_ours: bool = False
    can_capture: bool = True
    is_compiled: bool = False


def workload(provider: Provider, inputs, mode: str) -> Workload:
    return differentiated(provider.name, provider.bind(inputs), inputs.logits, mode)


def leaves_of(logits: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """The same numbers, to be differentiated; levels stay apart."""
    return logits.detach().clone().requires_grad_() if isinstance(logits, Tensor) else [leaves_of(level) for level in logits]


def differentiated(name: str, forward: Forward, logits: Tensor | list[Tensor], mode: str = "full") -> Workload:
    """forward: the losses with their graph; backward: the gradient from a fresh graph; full: both, as a training step."""
    leaf = leaves_of(logits)
    if mode == "forward":
        return Workload(name, lambda: forward(leaf))
    if mode == "full":
        return Workload(name, lambda: torch.autograd.grad(forward(leaf), leaf))
    graph = []

    def prepare() -> None:
        graph[:] = [forward(leaf)]

    return Workload(name, lambda: torch.autograd.grad(graph.pop(), leaf), prepare)


def peer(name: str, bind: Callable[[object], Forward], why_not=lambda case: None, is_compiled: bool = False) -> Provider:
    """Another way to compute the loss; its control flow or its shapes need the host, so it cannot be captured."""
    return Provider(name, bind, why_not, can_capture=False, is_compiled=is_compiled)


def focal_providers(binary_targets: Callable[[object], Tensor]) -> list[Provider]:
    """Focal loss of the same logits; the targets of the inputs as zeros and ones."""

    def bound(function: Callable) -> Callable[[object], Forward]:
        def bind(inputs) -> Forward:
            targets = binary_targets(inputs)
            return lambda logits: (function(logits, targets),)

        return bind

    return [Provider(FOCAL, bound(focal_loss)), Provider(COMPILED_FOCAL, bound(compiled_focal_loss), is_compiled=True)]
