"""Seesaw loss against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_seesaw.py --quick
    python bench/bench_seesaw.py --must-show
    python bench/bench_seesaw.py --rows 512 4096 --classes 80 --mode forward
"""
import argparse
import contextlib
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import rsloss_kernels  # noqa: E402
from bench import loss_bench, seesaw_problems, targets  # noqa: E402
from bench.peers.seesaw import PublishedSeesaw, seesaw_truth  # noqa: E402
from bench.providers import Forward, Provider, peer  # noqa: E402
from bench.seesaw_problems import Case, Inputs, make_case  # noqa: E402
from rsloss_kernels import SeesawLoss, seesaw_loss  # noqa: E402

PUBLISHED, PLAIN = "published Seesaw", "plain softmax, eager"
# Of the losses, of the gradient.
LIMITS = 1e-7, 2e-6
OF_PUBLISHED = 1 / 5
CPU_SIZES, CUDA_SIZES = [(512,), (2048,)], [(8192,)]


class SeesawBenchmark(loss_bench.OfOperator):
    operator = "seesaw_forward"
    stem, title, num_losses = "seesaw", "SeesawLoss", 2
    problems = seesaw_problems.PROBLEMS

    def name(self, backend: str) -> str:
        return f"seesaw [{backend}]"

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
        with rsloss_kernels.use_backend(backend):
            return seesaw_loss(logits, inputs.labels, inputs.counts)

    def truth(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return seesaw_truth(inputs.logits, inputs.labels, inputs.counts)

    def providers(self, case: Case) -> list[Provider]:
        ours = [self._ours(backend) for backend in self.backends(case.device)]
        return [*ours, peer(PUBLISHED, _published), Provider(PLAIN, _plain_softmax)]

    def _ours(self, backend: str) -> Provider:
        """The module with its counts."""

        def bind(inputs: Inputs) -> Forward:
            loss = SeesawLoss(inputs.case.classes).to(inputs.logits.device)
            loss.cum_samples.copy_(inputs.counts)
            is_automatic = self.is_automatic(backend, inputs.case.device)

            def forward(logits: Tensor) -> tuple[Tensor, ...]:
                with contextlib.nullcontext() if is_automatic else rsloss_kernels.use_backend(backend):
                    return tuple(loss(logits, inputs.labels).values())

            return forward

        return Provider(self.name(backend), bind, is_ours=True, can_capture=backend != "reference")


def _published(inputs: Inputs) -> Forward:
    loss = PublishedSeesaw(inputs.counts)
    return lambda logits: loss(logits, inputs.labels)


def _plain_softmax(inputs: Inputs) -> Forward:
    """One softmax over all columns: what a detector pays anyway."""
    return lambda logits: (cross_entropy(logits, inputs.labels),)


LOSS = SeesawBenchmark()


def check(arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd, counts included; medians of alternating runs, over the
    seeds."""
    report = targets.Rows()
    backend, sizes = ("triton", CUDA_SIZES) if arguments.device == "cuda" else ("cpp", CPU_SIZES)
    ours, missing = LOSS.name(backend), LOSS.why_not(backend, arguments.device)
    for entry in sizes:
        case = make_case(arguments, *entry)
        timings, _ = targets.time_case(LOSS, arguments, case, [ours, PUBLISHED, PLAIN])
        for other, limit in ((PUBLISHED, OF_PUBLISHED), (PLAIN, None), (loss_bench.COPY, None)):
            got = timings[ours].ratio_to(timings[other]) if ours in timings else None
            report(f"{ours}, {case.title}", limit, f"x {other}", got, missing or targets.medians(timings, ours, other))
    for entry in sizes:
        case = make_case(arguments, *entry)
        gradient = seesaw_problems.make_inputs(case).logits.nbytes
        targets.memory(LOSS, backend, case, gradient + targets.MEBIBYTE, arguments, report)
    for entry in sizes:
        backends = list(dict.fromkeys([backend, *LOSS.backends(arguments.device)]))
        targets.accuracy(LOSS, make_case(arguments, *entry), backends, LIMITS, report)
    return report.close()


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, check, __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
