"""What the public functions and modules of all ranking losses share: they run the operators, and keep their options."""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from rsloss_kernels import _checks, _library, distributed
from rsloss_kernels.losses.levels import LAYOUTS, read_num_classes
from rsloss_kernels.losses.ranking.arguments import Request, check_options
from rsloss_kernels.losses.ranking.op import count_elements
from rsloss_kernels.losses.ranking.segments import check_segments, is_ids

FLAGS = {"average_gradients", "interpolated", "upstream_parity"}


class Ranked(NamedTuple):
    """The state between the shared operators and a loss's finalize; the tensors are described in README.md beside this file."""

    logits: list[Tensor]
    negatives: Tensor
    ranked: Tensor
    counts: Tensor
    bins: Tensor
    segments: Tensor | None
    num_segments: int
    delta: float
    gradient_scale: float
    backend: str
    positives: Tensor  # those of this process


def evaluate(loss: str, request: Request, **options: float) -> tuple[Tensor, ...]:
    """The losses, with their gradient: in one call, or step by step where a process group communicates between the steps."""
    if request.group is not None:
        return finish(loss, rank_positives(request, options=options), *options.values())
    return _library.differentiable(
        f"{loss}_forward",
        request.backend,
        request.logits,
        request.targets,
        request.quality,
        request.segments,
        request.num_segments,
        request.capacity,
        request.maps,
        request.is_background_first,
        request.delta,
        1.0,
        *options.values(),
    )


def rank_positives(
    request: Request,
    edit_records: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    options: dict[str, float] | None = None,
) -> Ranked:
    """Runs the collect and bin operators.

    Args:
        edit_records: gets `positives` and `counts` as collected, returns what to go on with.
        options: the loss's own, numbers, which all processes of a group must share.
    """
    ids, num_segments, delta, group, backend = request.segments, request.num_segments, request.delta, request.group, request.backend
    # Nothing below needs a gradient but the logits, which the last operator gets attached.
    data = [level.detach() if level.requires_grad else level for level in request.logits]
    positives, negatives, counts = _library.operator("ranking_collect", backend)(
        data, request.targets, request.quality, ids, num_segments, request.capacity, request.maps, request.is_background_first
    )
    if edit_records is not None:
        positives, counts = edit_records(positives, counts)
    bin_negatives = _library.operator("ranking_bin", backend)
    if group is None:
        ranked, bins = bin_negatives(data, negatives, positives, counts, ids, num_segments, delta)
        gradient_scale = 1.0
    else:
        settings = {"delta": delta, "num_segments": num_segments, "average_gradients": request.average_gradients}
        settings |= options or {}
        batch = distributed.gather_positives(request.function, data, positives, counts, group, settings)
        counts = batch.counts
        ranked, bins = bin_negatives(data, negatives, batch.positives, counts, ids, num_segments, delta)
        bins = distributed.reduce_bins(bins, group)
        ranked = distributed.to_local(ranked, batch, count_elements(data))
        gradient_scale = float(batch.world_size) if request.average_gradients else 1.0
    return Ranked(request.logits, negatives, ranked, counts, bins, ids, num_segments, delta, gradient_scale, backend, positives)


def finish(loss: str, state: Ranked, *options: object) -> tuple[Tensor, ...]:
    """Runs the last operator of a loss: its losses, with their gradient, and statistics."""
    return _library.differentiable(
        f"{loss}_finalize",
        state.backend,
        state.logits,
        state.negatives,
        state.ranked,
        state.counts,
        state.bins,
        state.segments,
        state.num_segments,
        state.delta,
        state.gradient_scale,
        *options,
    )


class RankingLoss(distributed.HoldsGroup, nn.Module):
    """The base of the modules: checks the keywords of its function, keeps them as attributes, and has a `loss_weight`."""

    def __init__(self, loss_weight: float, **options: Any):
        super().__init__()
        function = type(self).__name__
        _, options["max_positives"] = check_options(function, options["delta"], options["background"], options["max_positives"])
        _checks.check_choice(function, "layout", options["layout"], LAYOUTS)
        options["num_classes"] = read_num_classes(function, options["num_classes"])
        for name in FLAGS & options.keys():
            options[name] = _checks.read_flag(function, name, options[name])
        if is_ids(options.get("segments")):
            raise TypeError(f"{function}: segments must not be ids here, they belong to a batch: give them to forward")
        check_segments(function, options.get("segments"), options.get("num_segments"))
        distributed.resolve_group(function, options["process_group"])
        is_number = isinstance(loss_weight, (int, float)) and not isinstance(loss_weight, bool)
        if not (is_number and math.isfinite(loss_weight)):
            raise ValueError(f"{function}: loss_weight must be a finite number, got {loss_weight!r}")
        self.loss_weight = loss_weight
        self.option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def options(self, **of_batch: object) -> dict[str, Any]:
        """The keywords of the function; those of a batch that are not None replace the module's."""
        options = {name: getattr(self, name) for name in self.option_names}
        return options | {name: value for name, value in of_batch.items() if value is not None}

    def extra_repr(self) -> str:
        options = {name: repr(value) for name, value in self.options().items() if value is not None}
        if "process_group" in options:
            options["process_group"] = distributed.describe_group(self.process_group)
        return ", ".join(f"{name}={value}" for name, value in [*options.items(), ("loss_weight", self.loss_weight)])
