"""Seesaw loss against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_seesaw.py --quick
    python bench/bench_seesaw.py --must-show
    python bench/bench_seesaw.py --rows 512 4096 --classes 80 --mode forward
"""
import argparse
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import rsloss_kernels  # noqa: E402
from bench import element_targets, harness, loss_bench, seesaw_problems, targets  # noqa: E402
from bench.peers.seesaw import PublishedSeesaw, seesaw_truth  # noqa: E402
from bench.providers import Forward, Provider, peer  # noqa: E402
from bench.seesaw_problems import Case, Inputs  # noqa: E402
from rsloss_kernels import SeesawLoss, seesaw_loss  # noqa: E402

PUBLISHED, PLAIN = "published Seesaw", "plain softmax, eager"
LIMITS = {PUBLISHED: 1 / 5, PLAIN: None, harness.COPY: None}
SIZES = {"cpu": [(512,), (2048,)], "cuda": [(8192,)]}


class SeesawBenchmark(loss_bench.OfOperator):
    operator = "seesaw_forward"
    stem, title, num_losses = "seesaw", "SeesawLoss", 2
    problems = seesaw_problems.PROBLEMS

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
        with rsloss_kernels.use_backend(backend):
            return seesaw_loss(logits, inputs.labels, inputs.counts)

    def truth(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return seesaw_truth(inputs.logits, inputs.labels, inputs.counts)

    def providers(self, case: Case) -> list[Provider]:
        ours = [self.ours(backend) for backend in self.backends(case.device)]
        return [*ours, peer(PUBLISHED, _published), Provider(PLAIN, _plain_softmax)]

    def bind(self, inputs: Inputs, backend: str) -> Forward:
        """The module with its counts."""
        loss = SeesawLoss(inputs.case.classes).to(inputs.logits.device)
        loss.cum_samples.copy_(inputs.counts)

        def forward(logits: Tensor) -> tuple[Tensor, ...]:
            with self.forced(backend, inputs.case.device):
                return tuple(loss(logits, inputs.labels).values())

        return forward


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
    backend, sizes = "triton" if arguments.device == "cuda" else "cpp", SIZES[arguments.device]
    if arguments.device == "cpu":
        element_targets.compare_warm_and_cold(LOSS, [(entry, LIMITS) for entry in sizes], None, arguments, report)
    else:
        for entry in sizes:
            element_targets.compare(LOSS, backend, LOSS.problems.make_case(arguments, *entry), LIMITS, arguments, report)
    element_targets.memory_and_accuracy(LOSS, [backend], sizes, sizes, arguments, report)
    return report.close()


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, check, __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
