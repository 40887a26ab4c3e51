"""Balanced group softmax against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_group_softmax.py --quick
    python bench/bench_group_softmax.py --must-show
    python bench/bench_group_softmax.py --rows 512 4096 --classes instances --ratio 1 --mode forward
"""
import argparse
import contextlib
import os
import pathlib
import sys

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import rsloss_kernels  # noqa: E402
from bench import group_softmax_problems, loss_bench, targets  # noqa: E402
from bench.group_softmax_problems import Case, Inputs, make_case  # noqa: E402
from bench.peers.group_softmax import PublishedGroupSoftmax, group_softmax_truth  # noqa: E402
from bench.providers import Forward, Provider, peer  # noqa: E402
from rsloss_kernels import group_softmax_loss  # noqa: E402

PUBLISHED, PLAIN = "published groups", "plain softmax, eager"
# Of the loss, of the gradient.
LIMITS = 1e-7, 2e-6
ACCURACY = [(2048,), (512, "instances")]
OF_PUBLISHED, OF_COPY = 1 / 16, 2.0
CPU_SPEED = [(512,), (2048,), (512, "instances"), (2048, "instances")]
CUDA_SPEED = [(8192,)]
OF_COPY_CAPTURED = 1.5


class GroupSoftmaxBenchmark(loss_bench.OfOperator):
    operator = "group_softmax_forward"
    stem, title, num_losses = "group_softmax", "group_softmax_loss", 1
    problems = group_softmax_problems.PROBLEMS

    def name(self, backend: str) -> str:
        return f"group_softmax [{backend}]"

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor]:
        """For the accuracy all others are kept: a sample would differ from that of the truth."""
        return self._total(logits, inputs, backend, sample_weights=torch.ones_like(torch.stack(inputs.mapped), dtype=torch.float32))

    def truth(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        mapped = inputs.mapped
        return group_softmax_truth(inputs.logits, mapped, inputs.slices, torch.ones_like(torch.stack(mapped), dtype=torch.float64))

    def providers(self, case: Case) -> list[Provider]:
        ours = [self._ours(backend) for backend in self.backends(case.device)]
        return [*ours, peer(PUBLISHED, _published), Provider(PLAIN, _plain_softmax)]

    def _ours(self, backend: str) -> Provider:
        def bind(inputs: Inputs) -> Forward:
            return lambda logits: self._total(logits, inputs, backend, others_ratio=inputs.case.others_ratio)

        return Provider(self.name(backend), bind, is_ours=True, can_capture=backend != "reference")

    def _total(self, logits: Tensor, inputs: Inputs, backend: str, **options) -> tuple[Tensor]:
        is_automatic = self.is_automatic(backend, inputs.case.device)
        with contextlib.nullcontext() if is_automatic else rsloss_kernels.use_backend(backend):
            return (group_softmax_loss(logits, inputs.labels, inputs.groups, **options).sum(),)


def _published(inputs: Inputs) -> Forward:
    ratio = min(inputs.case.others_ratio, 1e9)
    loss = PublishedGroupSoftmax(inputs.maps, inputs.slices, ratio)
    return lambda logits: (sum(loss(logits, inputs.labels)),)


def _plain_softmax(inputs: Inputs) -> Forward:
    """One softmax over all columns: what a detector pays anyway."""
    return lambda logits: (cross_entropy(logits, inputs.labels),)


LOSS = GroupSoftmaxBenchmark()


def check(arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd, sampling included; medians of alternating runs, over the
    seeds."""
    report = targets.Rows()
    if arguments.device == "cuda":
        compiled, sizes = ["cuda", "triton"], CUDA_SPEED
        targets.captured(LOSS, arguments, report, [(make_case(arguments, *entry), OF_COPY_CAPTURED) for entry in CUDA_SPEED])
    else:
        compiled, sizes = ["cpp"], CPU_SPEED[:2]
        _cpu_speed(arguments, report)
    for backend in compiled:
        for entry in sizes:
            case = make_case(arguments, *entry)
            gradient = group_softmax_problems.make_inputs(case).logits.nbytes
            targets.memory(LOSS, backend, case, gradient + targets.MEBIBYTE, arguments, report)
    for entry in ACCURACY:
        backends = list(dict.fromkeys([*compiled, *LOSS.backends(arguments.device)]))
        targets.accuracy(LOSS, make_case(arguments, *entry), backends, LIMITS, report)
    return report.close()


def _cpu_speed(arguments: argparse.Namespace, report: targets.Rows) -> None:
    ours, missing = LOSS.name("cpp"), LOSS.why_not("cpp", "cpu")
    for entry in CPU_SPEED:
        case = make_case(arguments, *entry)
        timings, _ = targets.time_case(LOSS, arguments, case, [ours, PUBLISHED, PLAIN])
        for other, limit in ((PUBLISHED, OF_PUBLISHED), (loss_bench.COPY, OF_COPY), (PLAIN, None)):
            got = timings[ours].ratio_to(timings[other]) if ours in timings else None
            report(f"{ours}, {case.title}", limit, f"x {other}", got, missing or targets.medians(timings, ours, other))


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, check, __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
