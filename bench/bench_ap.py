"""AP loss against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_ap.py --quick
    python bench/bench_ap.py --must-show
    python bench/bench_ap.py --positives 1000 --negatives 1e5 1e6
"""
import functools
import os
import pathlib
import sys

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import loss_bench, ranking_scale, ranking_targets  # noqa: E402
from bench import ranking_providers as field  # noqa: E402
from bench.peers.brute_force import brute_force_average_precision  # noqa: E402
from bench.peers.bucketed import bucketed_average_precision_loss  # noqa: E402
from bench.peers.published_loop import published_average_precision  # noqa: E402
from bench.providers import FOCAL, peer  # noqa: E402
from rsloss_kernels import average_precision_loss  # noqa: E402

DELTA = 1.0


def _call(logits, inputs, **options):
    return (average_precision_loss(logits, inputs.targets, delta=DELTA, **options),)


def _binary(function):
    def bind(inputs):
        targets = field.binary(inputs)
        return lambda logits: (function(logits, targets, DELTA),)

    return bind


LOSS = field.RankingLoss(
    stem="ap",
    function="average_precision_loss",
    operator="average_precision_finalize",
    delta=DELTA,
    num_losses=1,
    call=_call,
    peers=(
        peer(field.LOOP, _binary(published_average_precision), field.limit("P*N", field.LOOP_PAIRS)),
        peer("bucketed", _binary(bucketed_average_precision_loss), field.limit("P*P", field.SQUARE)),
    ),
    truth=lambda inputs: brute_force_average_precision(inputs.logits, inputs.dense, DELTA),
)
SPEED = (("trained", 1000, 10**6, {FOCAL: 0.20, field.LOOP: 1 / 200}),)
TARGETS = ranking_targets.Targets(
    warm_speed=SPEED,
    cold_speed=SPEED,
    cuda_speed=(("trained", 1000, 2 * 10**6, None, 40.0),),
    scale=(ranking_scale.equal_segments,),
)


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, functools.partial(ranking_targets.check, LOSS, TARGETS), __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
