"""aLRP loss against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_alrp.py --quick
    python bench/bench_alrp.py --must-show
    python bench/bench_alrp.py --positives 1000 --negatives 1e5 1e6

Timed is the classification part with its rank and order; the regression part is a sum over the positives.
"""
import functools
import os
import pathlib
import sys

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import loss_bench, ranking_targets  # noqa: E402
from bench import ranking_providers as field  # noqa: E402
from bench.peers.brute_force import brute_force_alrp  # noqa: E402
from bench.peers.published_loop import published_alrp  # noqa: E402
from bench.providers import FOCAL, peer  # noqa: E402
from rsloss_kernels import alrp_loss  # noqa: E402

DELTA = 1.0


def _call(logits, inputs, **options):
    return alrp_loss(logits, inputs.targets, inputs.regression, delta=DELTA, **options)


def _loop(inputs):
    targets, regression = field.binary(inputs), inputs.regression_of_positives
    return lambda logits: published_alrp(logits, targets, regression, DELTA)[:1]


LOSS = field.RankingLoss(
    stem="alrp",
    function="alrp_loss",
    operator="alrp_finalize",
    delta=DELTA,
    num_losses=1,
    call=_call,
    peers=(peer(field.LOOP, _loop, field.limit("P*N", field.LOOP_PAIRS)),),
    truth=lambda inputs: brute_force_alrp(inputs.logits, inputs.dense, inputs.regression_of_positives, DELTA),
    has_segments=False,
)
SPEED = (("trained", 1000, 10**6, {FOCAL: 0.20, field.LOOP: 1 / 200}),)
TARGETS = ranking_targets.Targets(
    warm_speed=SPEED,
    cold_speed=SPEED,
    cuda_speed=(("trained", 1000, 2 * 10**6, None, 40.0),),
)


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, functools.partial(ranking_targets.check, LOSS, TARGETS), __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
