"""Rank & Sort loss: the public function and module."""
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels._state import weighted
from rsloss_kernels.losses.ranking import api as ranking
from rsloss_kernels.losses.ranking.arguments import read_arguments


class RankSortLosses(NamedTuple):
    """The two 0-d losses of Rank & Sort; their sum is what a trainer minimises."""

    ranking: Tensor
    sorting: Tensor


def rank_sort_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    quality: Tensor | Sequence[Tensor] | None = None,
    *,
    delta: float = 0.5,
    background: str = "last",
    segments: Tensor | Sequence[Tensor] | int | str | None = None,
    num_segments: int | None = None,
    max_positives: int | None = None,
    process_group: object | None = None,
    average_gradients: bool = True,
    upstream_parity: bool = False,
    layout: str = "rows",
    num_classes: int | None = None,
) -> RankSortLosses:
    """Rank & Sort loss over all elements: positives above negatives, and positives in the order of their quality.

    Oksuz et al., "Rank & Sort Loss for Object Detection and Instance Segmentation", ICCV 2021, Eq. 3-8. The gradient is the paper's
    identity update, not the derivative of the value. Exact for every delta.

    Args:
        logits: any shape, class logits; float16, bfloat16, float32 or float64. For class indices the last dimension is the C classes.
            Or levels of a head, see `layout`.
        targets: either dense, with the shape of `logits`: above 0 a positive with that quality (IoU), 0 a negative, below 0 ignored
            (integers of that shape too: class indices of a head of one class need logits [A, 1]);
            or class indices, an integral dtype with the shape of `logits` less its last dimension: 0..C-1 foreground and C
            background (see `background`), below 0 the whole row is ignored, above C the same as background.
        quality: for class indices only, floating with the shape of `targets`: IoU of every foreground row in [0, 1], default 1. A
            foreground row is a positive whatever its quality.
        delta: half-width of the smoothed step in logit units, 0 (a hard step, ties count) or within [1e-30, 1e30].
        background: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C).
        segments, num_segments: what is ranked by itself; None: all is one segment. Ids, int32 or int64 with the shape of `logits`
            less its last dimension (1-D logits with dense targets: of the logits), within 0..num_segments-1, anything else is ignored;
            an int n: n equal contiguous chunks of the first dimension; "class": every column of the last dimension. A loss is then the
            mean over the segments that hold a valid positive of their own means, 0 if none does. Memory and time grow with the number
            of segments, empty ones too, by some ten bytes each.
        max_positives: capacity of the tables on a GPU, default: the rows for class indices, min(N, 16384) for dense targets. With more
            positives than that, both losses and the whole gradient are NaN. A CPU has room for all; under torch.compile, where tables
            have static sizes, a capacity saves memory there too. With a process group the capacity of every process, equal on all,
            default 16384.
        process_group: None: no communication. A torch.distributed group, or "default" (all processes if torch.distributed is
            initialised, else no communication): positives and negatives of all processes are ranked together, bitwise as one process
            would with their batches put together; every process gets the losses of the whole and the gradient of its own logits.
            Every process must call, with positives or without. Segments are global: one id, or the chunks of one number, are one
            segment on all processes. With `average_gradients` and a group whose size is no power of two the factor rounds once.
            A process that raises by itself (a bad argument, a value found by RSLOSS_DEBUG_CHECKS=1) leaves the others waiting for the
            group's timeout. All processes compile the loss or none does; a new `max_positives` comes on all in the same call. On CUDA
            tensors the first call with a group compares capacities on the host: make one before capturing a graph.
        average_gradients: with a process group, multiply gradients by the group's size for reducers that average.
        upstream_parity: as the authors' code, multiply the whole gradient by the upstream gradient of `ranking`.
        layout, num_classes: for a head's output as it is, without permuting or concatenating it. `logits` may be a list of levels,
            ranked together, with one dtype and C classes each: [..., C] in the layout "rows", else maps [B, A * C, *spatial] of A anchors,
            "anchor_major" (channel = anchor * C + class) or "class_major" (class * A + anchor), in channels-last memory too. `num_classes`
            is C; None: the last dimension of rows; the channels of maps, which have one anchor then. Class indices and qualities of a
            level of maps have shape [B, S * A] with its S places, or [B, *spatial, A] (one anchor: [B, *spatial]); dense targets that of the
            logits, or of labels and C. All are lists with one per level, or one tensor in which the levels follow one another ([B, K] or
            [B, K, C]). Segments of maps: None, or n equal chunks of the images of all levels. Losses and gradients are bitwise those of
            the levels put together as rows, [B, K, C].

    Returns:
        `(ranking, sorting)`, 0-d, float64 for float64 logits, else float32. Each has its own gradient. Without positives both are
        exact zeros, connected to the graph.

    NaN and infinity: a negative at -inf or +inf takes the limit of the step. A NaN in an element that is not ignored, or an infinite
    positive, makes both losses and the gradient of that element NaN; other gradients are as if it were ignored. Ignored elements may
    hold anything. `targets` and `quality` are detached. Do not edit `logits` in place before backward.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices or ranges, processes that differ in dtype or options; with
        RSLOSS_DEBUG_CHECKS=1 also labels above C, quality outside [0, 1], segment ids from num_segments on, and dense targets that are
        positive for more than half of the elements.
        RuntimeError: a forced backend that cannot run; with RSLOSS_DEBUG_CHECKS=1 more positives than `max_positives`.
    """
    upstream_parity = _checks.read_flag("rank_sort_loss", "upstream_parity", upstream_parity)
    request = read_arguments(
        "rank_sort_loss",
        "rank_sort_forward",
        logits,
        targets,
        quality,
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
    return RankSortLosses(*ranking.evaluate("rank_sort", request, upstream_parity=upstream_parity))


class RankSortLoss(ranking.RankingLoss):
    """`rank_sort_loss` as a module without state; `forward(logits, targets, quality=None)` returns `(ranking, sorting)`.

    Args:
        loss_weight: factor of both losses.
        The others are the keywords of `rank_sort_loss`. Segment ids belong to a batch: `forward` takes them.

    Raises TypeError, ValueError for wrong arguments, here or in `forward`.
    """

    def __init__(
        self,
        delta: float = 0.5,
        *,
        background: str = "last",
        segments: Tensor | int | str | None = None,
        num_segments: int | None = None,
        max_positives: int | None = None,
        process_group: object | None = None,
        average_gradients: bool = True,
        upstream_parity: bool = False,
        layout: str = "rows",
        num_classes: int | None = None,
        loss_weight: float = 1.0,
    ):
        super().__init__(
            loss_weight,
            delta=delta,
            background=background,
            segments=segments,
            num_segments=num_segments,
            max_positives=max_positives,
            process_group=process_group,
            average_gradients=average_gradients,
            upstream_parity=upstream_parity,
            layout=layout,
            num_classes=num_classes,
        )

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor],
        quality: Tensor | Sequence[Tensor] | None = None,
        *,
        segments: Tensor | Sequence[Tensor] | None = None,
        num_segments: int | None = None,
    ) -> RankSortLosses:
        """`rank_sort_loss` of a batch; both losses are multiplied by `loss_weight`.

        Args:
            logits, targets, quality: as in `rank_sort_loss`.
            segments: ids, in place of the module's segments.
            num_segments: how many, in place of the module's `num_segments`.
        """
        losses = rank_sort_loss(logits, targets, quality, **self.options(segments=segments, num_segments=num_segments))
        return RankSortLosses(*(weighted(loss, self.loss_weight) for loss in losses))

    if TYPE_CHECKING:
        __call__ = forward
