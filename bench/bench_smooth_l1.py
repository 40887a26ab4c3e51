"""Smooth L1 loss against plain PyTorch: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_smooth_l1.py --quick
    python bench/bench_smooth_l1.py --must-show
    python bench/bench_smooth_l1.py --sizes 4096 1e6 --form rows --mode forward
"""
import argparse
import os
import pathlib
import sys

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import rsloss_kernels  # noqa: E402
from bench import loss_bench, smooth_l1_problems, targets  # noqa: E402
from bench.providers import Forward, Provider  # noqa: E402
from bench.smooth_l1_problems import BETA, Case, Inputs, make_case  # noqa: E402
from rsloss_kernels import smooth_l1_loss  # noqa: E402

EAGER, COMPILED = "smooth L1, eager", "smooth L1, torch.compile"
# Of the loss, of the gradient.
LIMITS = 1e-7, 2e-6
# (case; largest ratio to eager PyTorch, largest ratio to the copy, None: told only)
CPU_SPEED = [((4096, "dense"), None, None), ((10**6, "dense"), None, 2.0), ((10**7, "dense"), 1 / 4, 2.0)]
CUDA_SPEED = [((2 * 10**7, "dense"), 1.5)]


class SmoothL1Benchmark(loss_bench.OfOperator):
    operator = "smooth_l1_forward"
    stem, title, num_losses = "smooth_l1", "smooth_l1_loss", 1
    problems = smooth_l1_problems.PROBLEMS

    def name(self, backend: str) -> str:
        return f"smooth_l1 [{backend}]"

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
        ours = [self._ours(backend) for backend in self.backends(case.device)]
        return [*ours, Provider(EAGER, _eager), Provider(COMPILED, _compiled, is_compiled=True)]

    def _ours(self, backend: str) -> Provider:
        def bind(inputs: Inputs) -> Forward:
            return lambda logits: self.outputs(logits, inputs, backend)

        return Provider(self.name(backend), bind, is_ours=True, can_capture=backend != "reference")


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


def check(arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd; medians of alternating runs, over the seeds."""
    report = targets.Rows()
    if arguments.device == "cuda":
        compiled, sizes = ["cuda", "triton"], [case for case, _ in CUDA_SPEED]
        targets.captured(LOSS, arguments, report, [(make_case(arguments, *entry), limit) for entry, limit in CUDA_SPEED])
    else:
        compiled, sizes = ["cpp"], [case for case, *_ in CPU_SPEED]
        _cpu_speed(arguments, report)
    for backend in compiled:
        for entry in sizes:
            case = make_case(arguments, *entry)
            limit = case.size * getattr(torch, case.dtype).itemsize + targets.MEBIBYTE
            targets.memory(LOSS, backend, case, limit, arguments, report)
    backends = list(dict.fromkeys([*compiled, *LOSS.backends(arguments.device)]))
    for form in ("dense", "rows", "unweighted"):
        targets.accuracy(LOSS, make_case(arguments, 10**6, form), backends, LIMITS, report)
    return report.close()


def _cpu_speed(arguments: argparse.Namespace, report: targets.Rows) -> None:
    ours, missing = LOSS.name("cpp"), LOSS.why_not("cpp", "cpu")
    for entry, of_eager, of_copy in CPU_SPEED:
        case = make_case(arguments, *entry)
        timings, _ = targets.time_case(LOSS, arguments, case, [ours, EAGER, COMPILED])
        for other, limit in ((EAGER, of_eager), (COMPILED, None), (loss_bench.COPY, of_copy)):
            got = timings[ours].ratio_to(timings[other]) if ours in timings else None
            report(f"{ours}, {case.title}", limit, f"x {other}", got, missing or targets.medians(timings, ours, other))


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, check, __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
