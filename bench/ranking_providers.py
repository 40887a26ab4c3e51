"""A ranking loss as its benchmark sees it: how to call it, who else takes part, and for which problems each is left out."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import rsloss_kernels
from bench import ranking_problems
from bench.logits import Case, Inputs
from bench.loss_bench import OfOperator
from bench.problems import Problems
from bench.providers import Forward, Provider, focal_providers
from rsloss_kernels import _backends

LOOP, OWN_FOCAL = "published loop", "sigmoid_focal_loss"
PER_SEGMENT = ", a call per segment"

# Largest P*N, and P*P, that a peer is given: seconds per call for the loop, memory for the broadcast.
LOOP_PAIRS = {"cpu": 6e9, "cuda": 1.1e10}
BROADCAST_PAIRS = {"cpu": 2.5e8, "cuda": 4e9}
FUSED_PAIRS = {"cpu": 1.2e9, "cuda": 1e11}
SQUARE = {"cpu": 2.6e7, "cuda": 4.1e8}
# The plain PyTorch sweep compares positives pairwise in blocks: minutes beyond.
REFERENCE_POSITIVES = 50_000
LOOP_SEGMENTS = 1000


@dataclass(frozen=True)
class RankingLoss(OfOperator):
    """What differs between the ranking losses; one per bench_<stem>.py."""

    stem: str
    function: str
    operator: str
    delta: float
    # The first outputs that are losses, of how many outputs `call` has.
    num_losses: int
    # (logits, inputs, options such as max_positives or segments) -> what the public function returns
    call: Callable[..., tuple[Tensor, ...]]
    peers: tuple[Provider, ...]
    # float64: what `call` returns (the rest of its outputs is not compared), then the gradient of the sum of the losses
    truth: Callable[[Inputs], tuple[Tensor, ...]]
    has_segments: bool = True
    problems: ClassVar[Problems] = ranking_problems.PROBLEMS

    @property
    def title(self) -> str:
        return self.function

    def name(self, backend: str) -> str:
        return f"{self.function} [{backend}]"

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str | None = None, **options) -> tuple[Tensor, ...]:
        """All outputs of the public function, on `backend` or on the automatic one, with the capacity of the case."""
        return self._bind(inputs, backend, **options)(logits)

    def forward(self, inputs: Inputs, backend: str | None = None, **options) -> Forward:
        call = self._bind(inputs, backend, **options)
        return lambda logits: call(logits)[: self.num_losses]

    def _bind(self, inputs: Inputs, backend: str | None, **options) -> Forward:
        """What is the same in every call is settled here: a small loss would feel it."""
        options = {"max_positives": inputs.case.max_positives} | options
        if backend is None or self.is_automatic(backend, inputs.case.device):
            return lambda logits: self.call(logits, inputs, **options)

        def forced(logits: Tensor) -> tuple[Tensor, ...]:
            with rsloss_kernels.use_backend(backend):
                return self.call(logits, inputs, **options)

        return forced

    def providers(self, case: Case) -> list[Provider]:
        """Every usable backend of ours, then the peers. With segments: ours in both forms, and what it costs without them."""
        backends = self.backends(case.device)
        if case.segments == 1:
            return [self._ours(backend) for backend in backends] + list(self.peers) + FOCAL_PROVIDERS + [own_focal(case.device)]
        ours = [provider for backend in backends for provider in self._segmented(backend)]
        return ours + [_per_segment(peer) for peer in self.peers if peer.name == LOOP] + FOCAL_PROVIDERS

    def _ours(self, backend: str, name: str | None = None, **options) -> Provider:
        def why_not(case: Case) -> str | None:
            if backend == "reference" and case.positives > REFERENCE_POSITIVES:
                return f"P = {case.positives} is above {REFERENCE_POSITIVES} for plain PyTorch"
            return None

        return Provider(
            name or self.name(backend),
            lambda inputs: self.forward(inputs, backend, **{key: value(inputs) for key, value in options.items()}),
            why_not,
            is_ours=True,
            can_capture=backend != "reference",
        )

    def _segmented(self, backend: str) -> list[Provider]:
        name, count = self.name(backend), lambda inputs: inputs.case.segments
        return [
            self._ours(backend, f"{name}, chunks", segments=count),
            self._ours(backend, f"{name}, row ids", segments=lambda inputs: inputs.segment_ids, num_segments=count),
            self._ours(backend, f"{name}, without segments"),
            _per_segment(self._ours(backend)),
        ]


def _per_segment(provider: Provider) -> Provider:
    """One call for each of the equal segments; the losses are means over them."""

    def bind(inputs: Inputs) -> Forward:
        parts = [inputs.share(number, inputs.case.segments) for number in range(inputs.case.segments)]
        forwards = [provider.bind(part) for part in parts]

        def forward(logits: Tensor) -> tuple[Tensor, ...]:
            calls = [one(piece) for one, piece in zip(forwards, logits.chunk(len(parts)), strict=True)]
            return tuple(torch.stack(losses).mean() for losses in zip(*calls, strict=True))

        return forward

    def why_not(case: Case) -> str | None:
        return f"{case.segments} calls" if case.segments > LOOP_SEGMENTS else provider.why_not(case)

    return replace(provider, name=f"{provider.name}{PER_SEGMENT}", bind=bind, why_not=why_not, is_ours=False, can_capture=False)


def limit(what: str, limits: dict[str, float]) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        size = case.positives * (case.negatives if what == "P*N" else case.positives)
        most = limits[case.device]
        return f"{what} = {size:.1e} is above {most:.1e}" if size > most else None

    return why_not


def both_limits(pairs: dict[str, float]) -> Callable[[Case], str | None]:
    return lambda case: limit("P*N", pairs)(case) or limit("P*P", SQUARE)(case)


def binary(inputs: Inputs) -> Tensor:
    """Targets of exactly 1 for the positives, in the logits' dtype: what focal, and AP and aLRP as published, take."""
    return (inputs.dense > 0).to(inputs.logits.dtype)


FOCAL_PROVIDERS = focal_providers(binary)


def own_focal(device: str) -> Provider:
    """This library's focal loss: two passes over the logits, and nothing that a ranking does."""

    def bind(inputs: Inputs) -> Forward:
        targets = binary(inputs)
        return lambda logits: (rsloss_kernels.sigmoid_focal_loss(logits, targets, reduction="sum"),)

    return Provider(f"{OWN_FOCAL} [{_backends.resolve('focal_forward', device)}]", bind)
