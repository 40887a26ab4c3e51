"""Smooth L1 loss against plain PyTorch: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_smooth_l1.py --quick
    python bench/bench_smooth_l1.py --must-show
    python bench/bench_smooth_l1.py --sizes 4096 1e6 --form rows --mode forward
"""
import functools
import os
import pathlib
import sys

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import rsloss_kernels  # noqa: E402
from bench import element_targets, harness, loss_bench, smooth_l1_problems  # noqa: E402
from bench.providers import Forward, Provider  # noqa: E402
from bench.smooth_l1_problems import BETA, Case, Inputs  # noqa: E402
from rsloss_kernels import smooth_l1_loss  # noqa: E402

EAGER, COMPILED = "smooth L1, eager", "smooth L1, torch.compile"
TARGETS = element_targets.Targets(
    warm_speed=[
        ((4096, "dense"), {EAGER: None, COMPILED: None, harness.COPY: None}),
        ((10**6, "dense"), {EAGER: None, COMPILED: None, harness.COPY: 2.0}),
        ((10**7, "dense"), {EAGER: 1 / 4, COMPILED: None, harness.COPY: 2.0}),
    ],
    cuda_speed=[((2 * 10**7, "dense"), 1.5)],
    memory=[(size, "dense") for size in (4096, 10**6, 10**7)],
    accuracy=[(10**6, form) for form in ("dense", "rows", "unweighted")],
)


class SmoothL1Benchmark(loss_bench.OfOperator):
    operator = "smooth_l1_forward"
    stem, title, num_losses = "smooth_l1", "smooth_l1_loss", 1
    problems = smooth_l1_problems.PROBLEMS

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor]:
        with rsloss_kernels.use_backend(backend):
            return (smooth_l1_loss(logits, inputs.targets, inputs.beta, inputs.weights, avg_factor=inputs.avg_factor),)

    def truth(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in float64, from the definition."""
        weights = torch.ones_like(inputs.logits) if inputs.weights is None else inputs.weights
        weights = (weights if weights.dim() == 2 else weights[:, None]).double() / inputs.avg_factor
        d = inputs.logits.double() - inputs.targets.double()
        losses = torch.where(d.abs() < BETA, d.square() / (2 * BETA), d.abs() - BETA / 2)
        return (weights * losses).sum(), weights * (d / BETA).clamp(-1, 1)

    def providers(self, case: Case) -> list[Provider]:
        ours = [self.ours(backend) for backend in self.backends(case.device)]
        return [*ours, Provider(EAGER, _eager), Provider(COMPILED, _compiled, is_compiled=True)]

    def bind(self, inputs: Inputs, backend: str) -> Forward:
        return lambda preds: self.outputs(preds, inputs, backend)


def plain_smooth_l1(preds: Tensor, target: Tensor, weights: Tensor | None, avg_factor: float) -> Tensor:
    """As frameworks have it: single losses, weighted, summed; beta is a number."""
    losses = torch.nn.functional.smooth_l1_loss(preds, target, reduction="none", beta=BETA)
    if weights is not None:
        losses = losses * (weights if weights.dim() == 2 else weights[:, None])
    return losses.sum() / avg_factor


_compiled_smooth_l1 = torch.compile(plain_smooth_l1, dynamic=True)


def _eager(inputs: Inputs) -> Forward:
    return lambda preds: (plain_smooth_l1(preds, inputs.targets, inputs.weights, inputs.avg_factor),)


def _compiled(inputs: Inputs) -> Forward:
    return lambda preds: (_compiled_smooth_l1(preds, inputs.targets, inputs.weights, inputs.avg_factor),)


LOSS = SmoothL1Benchmark()


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, functools.partial(element_targets.check, LOSS, TARGETS), __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
