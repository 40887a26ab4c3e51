"""GHM-C and GHM-R against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_ghm.py --quick
    python bench/bench_ghm.py --must-show
    python bench/bench_ghm.py --loss GHM-R --sizes 1e5 1e6 --bins 10 30 --mode forward
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

from bench import element_targets, ghm_problems, harness, loss_bench  # noqa: E402
from bench.ghm_problems import BOXES, CLASSES, MU, Case, Inputs  # noqa: E402
from bench.peers.ghm import PublishedGHMC, PublishedGHMR, ghm_truth  # noqa: E402
from bench.providers import Forward, Provider, focal_providers, peer  # noqa: E402
from rsloss_kernels import ghm_classification_loss, ghm_regression_loss  # noqa: E402

PUBLISHED, SMOOTH_L1 = "MMDetection's", "smooth L1, eager"
COPY = harness.COPY
TARGETS = element_targets.Targets(
    warm_speed=[
        ((CLASSES, 10**6, 10, "dense"), {PUBLISHED: 1 / 15, COPY: 2.5}),
        ((CLASSES, 10**6, 30, "dense"), {PUBLISHED: 1 / 20, COPY: 4.0}),
        ((CLASSES, 10**6, 10, "index"), {PUBLISHED: 1 / 15, COPY: None}),
        ((CLASSES, 10**6, 30, "index"), {PUBLISHED: 1 / 20, COPY: None}),
        ((BOXES, 10**6, 10, "dense"), {PUBLISHED: 1 / 15, COPY: None}),
    ],
    cuda_speed=[((kind, 2 * 10**7, 10, form), 1.5) for kind, form in ((CLASSES, "index"), (CLASSES, "dense"), (BOXES, "dense"))],
    memory=[(CLASSES, 10**6, bins, form) for form in ("dense", "index") for bins in (10, 30)] + [(BOXES, 10**6, 10, "dense")],
    accuracy=[
        (CLASSES, 10**6, 30, "dense"),
        (CLASSES, 10**6, 10, "index"),
        (CLASSES, 10**6, 10, "index", 0.0, "init"),
        (BOXES, 10**6, 10, "dense"),
    ],
)


class GHMLoss(loss_bench.OfOperator):
    """Both losses as the benchmark sees them."""

    operator = "ghm_finalize"
    stem, title, num_losses = "ghm", "ghm_classification_loss and ghm_regression_loss", 1
    problems = ghm_problems.PROBLEMS

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        """The loss, with momentum the new state too."""
        case = inputs.case
        options = {"bins": case.bins}
        if case.momentum:
            options |= {"momentum": case.momentum, "acc_sum": torch.zeros(case.bins, device=case.device)}
        function = ghm_classification_loss if case.loss == CLASSES else functools.partial(ghm_regression_loss, mu=MU)
        with self.forced(backend, case.device):
            got = function(logits, inputs.targets, inputs.weights, **options)
        return got if isinstance(got, tuple) else (got,)

    def truth(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        weights = inputs.weights
        if weights is not None and weights.dim() == 1:
            weights = weights[:, None].expand(inputs.logits.shape)
        return ghm_truth(inputs.logits, inputs.dense, weights, inputs.case.bins, None if inputs.case.loss == CLASSES else MU)

    def providers(self, case: Case) -> list[Provider]:
        others = focal_providers(lambda inputs: inputs.dense.to(inputs.logits.dtype)) if case.loss == CLASSES else [SMOOTH_L1_PROVIDER]
        return [self.ours(backend) for backend in self.backends(case.device)] + [peer(PUBLISHED, _published), *others]

    def bind(self, inputs: Inputs, backend: str) -> Forward:
        return lambda logits: self.outputs(logits, inputs, backend)[:1]


def _published(inputs: Inputs) -> Forward:
    case, weights = inputs.case, inputs.weights
    weights = torch.ones_like(inputs.dense) if weights is None else weights
    targets_of_form = inputs.targets if case.form == "index" else inputs.dense
    loss = PublishedGHMC(case.bins, case.momentum) if case.loss == CLASSES else PublishedGHMR(MU, case.bins, case.momentum)
    return lambda logits: (loss(logits, targets_of_form, weights),)


def _smooth_l1(inputs: Inputs) -> Forward:
    def forward(preds: Tensor) -> tuple[Tensor]:
        losses = torch.nn.functional.smooth_l1_loss(preds, inputs.targets.to(preds.dtype), reduction="none", beta=1 / 9)
        return ((losses * inputs.weights).sum(),)

    return forward


SMOOTH_L1_PROVIDER = Provider(SMOOTH_L1, _smooth_l1)
LOSS = GHMLoss()


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, functools.partial(element_targets.check, LOSS, TARGETS), __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
