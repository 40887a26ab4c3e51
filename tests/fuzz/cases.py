"""Which losses there are, and the case of a name."""
import functools
import random
from collections.abc import Callable

from ghm_samples import GHM_LOSSES
from samples import LOSSES
from sigmoid_samples import SIGMOID_LOSSES

from . import ghm_cases, ranking_cases, regression_cases, sigmoid_cases, softmax_cases
from .case import Case
from .source import Source

DRAWS: dict[str, Callable[[Source, str], Case]] = {
    **{name: functools.partial(ranking_cases.draw, loss=loss) for name, loss in LOSSES.items()},
    **{name: functools.partial(ghm_cases.draw, loss=loss) for name, loss in GHM_LOSSES.items()},
    **{name: functools.partial(sigmoid_cases.draw, loss=loss) for name, loss in SIGMOID_LOSSES.items()},
    "group_softmax": softmax_cases.draw_groups,
    "seesaw": softmax_cases.draw_seesaw,
    "smooth_l1": regression_cases.draw_smooth_l1,
    "asl1": regression_cases.draw_authentic,
    "score_weights": regression_cases.draw_score_weights,
    "assign_by_iou": regression_cases.draw_assignment,
}
# Where values are wanted most: of these losses twice as many cases as of the others.
OFTEN = ("rank_sort", "ap", "alrp", "ghm_classification", "ghm_regression", "focal")
# Plain PyTorch on every backend: one is enough.
WITHOUT_BACKENDS = ("asl1", "score_weights", "assign_by_iou")


def loss_of(name: str) -> str:
    """Of SEED:NUMBER, without drawing the case."""
    return random.Random(f"loss of {name}").choice([*DRAWS, *OFTEN])


def draw(name: str) -> Case:
    return DRAWS[loss_of(name)](Source(name), name)
