"""AP loss: the public function and module."""
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels._state import weighted
from rsloss_kernels.losses.ranking import api as ranking
from rsloss_kernels.losses.ranking.arguments import read_arguments


def average_precision_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    delta: float = 1.0,
    interpolated: bool = True,
    background: str = "last",
    segments: Tensor | Sequence[Tensor] | int | str | None = None,
    num_segments: int | None = None,
    max_positives: int | None = None,
    process_group: object | None = None,
    average_gradients: bool = True,
    layout: str = "rows",
    num_classes: int | None = None,
) -> Tensor:
    """AP loss over all elements: one minus the mean precision at the positives.

    Chen et al., "Towards Accurate One-Stage Object Detection with AP-Loss", CVPR 2019. The gradient is the paper's error-driven
    update, not the derivative of the value. Exact for every delta; at `delta = 0` ties count in full (the authors' code divides by
    zero there).

    Args:
        logits: any shape, class logits; float16, bfloat16, float32 or float64. For class indices the last dimension is the C classes.
            Or levels of a head, see `layout`.
        targets: either dense, with the shape of `logits`: above 0 a positive (whatever the value; the authors' code ignores what lies
            between 0 and 1), 0 a negative, below 0 ignored (integers of that shape too: class indices of a head of one class need
            logits [A, 1]); or class indices, an integral dtype with the shape of `logits` less its last dimension: 0..C-1 foreground
            and C background (see `background`), below 0 the whole row is ignored, above C the same as background.
        delta: half-width of the smoothed step in logit units, 0 (a hard step, ties count) or within [1e-30, 1e30].
        interpolated: every positive takes the best precision at its own or a lower score, as the authors do; False: its own.
        background: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C).
        segments, num_segments, max_positives, process_group, average_gradients: as in `rank_sort_loss`.
        layout, num_classes: for a head's output as it is, as in `rank_sort_loss`.

    Returns:
        0-d, within [0, 1], float64 for float64 logits, else float32. Without positives an exact zero, connected to the graph.

    NaN and infinity: as in `rank_sort_loss`. `targets` are detached. Do not edit `logits` in place before backward.

    Raises:
        TypeError, ValueError, RuntimeError: as `rank_sort_loss`.
    """
    interpolated = _checks.read_flag("average_precision_loss", "interpolated", interpolated)
    request = read_arguments(
        "average_precision_loss",
        "average_precision_forward",
        logits,
        targets,
        delta=delta,
        background=background,
        segments=segments,
        num_segments=num_segments,
        max_positives=max_positives,
        process_group=process_group,
        average_gradients=average_gradients,
        layout=layout,
        num_classes=num_classes,
    )
    return ranking.evaluate("average_precision", request, interpolated=interpolated)[0]


class APLoss(ranking.RankingLoss):
    """`average_precision_loss` as a module without state; `forward(logits, targets)` returns the 0-d loss.

    Args:
        loss_weight: factor of the loss.
        The others are the keywords of `average_precision_loss`. Segment ids belong to a batch: `forward` takes them.

    Raises TypeError, ValueError for wrong arguments, here or in `forward`.
    """

    def __init__(
        self,
        delta: float = 1.0,
        *,
        interpolated: bool = True,
        background: str = "last",
        segments: Tensor | int | str | None = None,
        num_segments: int | None = None,
        max_positives: int | None = None,
        process_group: object | None = None,
        average_gradients: bool = True,
        layout: str = "rows",
        num_classes: int | None = None,
        loss_weight: float = 1.0,
    ):
        super().__init__(
            loss_weight,
            delta=delta,
            interpolated=interpolated,
            background=background,
            segments=segments,
            num_segments=num_segments,
            max_positives=max_positives,
            process_group=process_group,
            average_gradients=average_gradients,
            layout=layout,
            num_classes=num_classes,
        )

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor],
        *,
        segments: Tensor | Sequence[Tensor] | None = None,
        num_segments: int | None = None,
    ) -> Tensor:
        """`average_precision_loss` of a batch times `loss_weight`.

        Args:
            logits, targets: as in `average_precision_loss`.
            segments: ids, in place of the module's segments.
            num_segments: how many, in place of the module's `num_segments`.
        """
        options = self.options(segments=segments, num_segments=num_segments)
        return weighted(average_precision_loss(logits, targets, **options), self.loss_weight)

    if TYPE_CHECKING:
        __call__ = forward
