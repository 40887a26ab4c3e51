"""What ranking losses, histograms, balancing and means exchange in a process group, so that all processes compute what one would on their
batches put together.

Whatever decides a bit of the result is exchanged as it is (records of positives) or summed as integers (counts, bins); every process
then computes the same from it. Collectives run on the device of the tensors (gloo for CPU tensors, NCCL for CUDA tensors) and wait as
long as the group's own timeout, the one given to `init_process_group` or `new_group`, for a process that does not come.
"""

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rsloss_kernels import _checks

# A record with a flat index from here on belongs to another process. Exact in float64, and beyond every real element.
FOREIGN = 2.0**52
# Capacities, per group, that every process is known to share.
_agreed: "weakref.WeakKeyDictionary[dist.ProcessGroup, set[int]]" = weakref.WeakKeyDictionary()


class GlobalBatch(NamedTuple):
    """The positives and counts of a whole group, in the form of the ranking operators."""

    positives: Tensor  # float64 [4, cap], of all processes in the order of their ranks; flat indices over the whole batch
    counts: Tensor  # int64 [3], sums; the first is more than cap if any process overflowed or the processes do not fit together
    first_index: Tensor  # int64, 0-d: elements of the processes of lower rank
    world_size: int


def resolve_group(function: str, process_group: object | None) -> "dist.ProcessGroup | None":
    """None: no group. "default": all processes if torch.distributed is initialised, else none. A group: itself."""
    if process_group is None:
        return None
    if isinstance(process_group, str) and process_group == "default":
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            f"{function}: process_group must be None, 'default' or a torch.distributed.ProcessGroup that this process is in, "
            f"got {describe_group(process_group)}"
        )
    return process_group


def describe_group(process_group: object) -> str:
    """In words, without an address in memory."""
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        return f"<group of {process_group.size()} processes>"
    if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
        return "a group that this process is not in"
    return repr(process_group) if isinstance(process_group, (str, int, float, list, tuple)) else type(process_group).__name__


class HoldsGroup:
    """Mixin of modules with an attribute `process_group`: a copy of the module (of an averaged model, say) has the same group."""

    process_group: object | None

    def __deepcopy__(self, memo: dict[int, object]) -> "HoldsGroup":
        memo[id(self.process_group)] = self.process_group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def world_size(group: "dist.ProcessGroup | None") -> int:
    return 1 if group is None else dist.get_world_size(group)


def gather_positives(
    function: str,
    logits: list[Tensor],
    positives: Tensor,
    counts: Tensor,
    group: "dist.ProcessGroup",
    settings: dict[str, float] | None = None,
) -> GlobalBatch:
    """Puts the output of `ranking_collect` of all processes together; they must agree in capacity, dtype and `settings`.

    On CPU tensors the sizes are exchanged first: then only what holds a record travels, and processes that do not fit together all
    raise. On other tensors nothing may be read on the host: one all-gather moves the whole capacity, and processes that do not fit
    together all get an overflow (RSLOSS_DEBUG_CHECKS=1: an error). Only an unequal capacity would break that all-gather itself; it is
    exchanged when a group sees it for the first time. The same all-gather serves torch.compile, without that exchange: all
    processes compile or none does.

    Args:
        positives, counts: float64 [4, cap] and int64 [3], of this process.
        settings: arguments of the loss by name, numbers that must be equal on all processes; the same names on each.

    Raises:
        ValueError: on every process, for different capacities, dtypes, settings.
        RuntimeError: on every process, with RSLOSS_DEBUG_CHECKS=1, for more positives than the capacity of a process.
    """
    capacity, world = positives.shape[1], dist.get_world_size(group)
    settings = settings or {}
    agreement = [_checks.LOGIT_TYPES.index(logits[0].dtype), capacity, *settings.values()]
    header = torch.cat([counts.double(), *[positives.new_full((1,), value) for value in agreement]])
    names = ("the dtype of logits", "max_positives", *settings)
    is_traced = torch.compiler.is_compiling()
    if positives.is_cpu and not is_traced:
        headers = _all_gather(header, group)
        widest = _check_headers(function, headers.tolist(), names)
        gathered = _all_gather(positives[:, :widest].contiguous(), group)
    else:
        if not is_traced:
            _agree(function, header, capacity, group, names)
        packed = _all_gather(torch.cat([header, positives.flatten()]), group)
        headers, gathered = packed[:, : len(header)], packed[:, len(header) :].view(world, len(positives), capacity)
        if _checks.debug_checks():
            _check_headers(function, headers.tolist(), names)
    return _join(headers, gathered, capacity, dist.get_rank(group))


def _join(headers: Tensor, gathered: Tensor, capacity: int, rank: int) -> GlobalBatch:
    """`headers` [world, 3 + agreement], `gathered` [world, 4, width]."""
    world = len(headers)
    elements = headers[:, 2]
    first = elements.cumsum(0) - elements  # [world]
    index = gathered[:, 3]
    is_real = (index >= 0).flatten()
    index = torch.where(index >= 0, index + first[:, None], index)
    records = torch.cat([gathered[:, :3], index[:, None]], 1).transpose(0, 1).flatten(1)  # [4, world * width]
    # Real records first, in their order, then the padding: a permutation, whose size does not depend on the data.
    place = torch.where(is_real, is_real.cumsum(0) - 1, is_real.sum() + (~is_real).cumsum(0) - 1)
    compact = records.new_empty(records.shape).index_copy_(1, place, records)

    counts = headers[:, :3].sum(0).long()
    is_bad = (headers[:, 0] > capacity).any() | (headers[:, 3:] != headers[:1, 3:]).any()
    found = torch.where(is_bad, compact.shape[1] + 1, counts[0])
    return GlobalBatch(compact, torch.cat([found[None], counts[1:]]), first[rank].long(), world)


def _agree(function: str, header: Tensor, capacity: int, group: "dist.ProcessGroup", names: tuple[str, ...]) -> None:
    known = _agreed.setdefault(group, set())
    if capacity not in known:
        _check_headers(function, _all_gather(header, group).tolist(), names)
        known.add(capacity)


def _check_headers(function: str, headers: list[list[float]], names: tuple[str, ...]) -> int:
    """Raises if the processes do not fit together. Returns the most records that any of them holds."""
    found, _, _, *agreement = zip(*headers, strict=True)
    _check_settings(function, dict(zip(names, agreement, strict=True)))
    capacity = int(agreement[1][0])
    if max(found) > capacity and _checks.debug_checks():
        raise RuntimeError(
            f"{function}: max_positives must be at least the positives of every process, {int(max(found))}, got {capacity}"
        )
    return int(min(max(found), capacity))


def _check_settings(function: str, settings: Mapping[str, Sequence[float]]) -> None:
    """Raises for a setting that is not the same on all processes; its values by rank."""
    for name, values in settings.items():
        if len(set(values)) > 1:
            shown = [_checks.LOGIT_TYPES[int(value)] if "dtype" in name else f"{value:g}" for value in values]
            raise ValueError(
                f"{function}: {name} must be the same on every process of the group, got {', '.join(map(str, shown))} by rank"
            )


def reduce_bins(bins: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sum of `bins` (int64) over the group, in place where nothing is traced."""
    dist.all_reduce(bins, group=group)
    return bins


def to_local(ranked: Tensor, batch: GlobalBatch, elements: "int | Tensor") -> Tensor:
    """`ranked` with flat indices of this process, which has `elements`: records of other processes get one that nothing has.

    Those are ranked like the others, and backward writes them nowhere.
    """
    index = ranked[3]
    own = index - batch.first_index
    own = torch.where((own >= 0) & (own < elements), own, index + FOREIGN)
    return torch.cat([ranked[:3], torch.where(index < 0, index, own)[None]])


def gather_rows(function: str, tensor: Tensor, group: "dist.ProcessGroup") -> tuple[Tensor, int]:
    """All processes' 1-D float64 tensors, of any lengths, one after the other; and where the own one begins.

    The lengths are read on the host, so this is not for code that is traced or captured.
    """
    if tensor.dim() != 1 or tensor.dtype != torch.float64:
        raise ValueError(f"{function}: rows must be 1-D float64, got {list(tensor.shape)} of {tensor.dtype}")
    lengths = _all_gather(tensor.new_full((1,), tensor.numel()), group).flatten().long().tolist()
    widest = max(lengths)
    offset = sum(lengths[: dist.get_rank(group)])
    if widest == 0:
        return tensor.detach().clone(), offset
    padded = torch.nn.functional.pad(tensor.detach(), (0, widest - tensor.numel()))
    gathered = _all_gather(padded, group)
    return torch.cat([row[:length] for row, length in zip(gathered, lengths, strict=True)]), offset


def sum_over_group(tensor: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """The sum over the group, detached: added in the order of the ranks, so that every process has the same bits."""
    detached = tensor.detach()
    return detached if group is None else _all_gather(detached.contiguous(), group).sum(0)


def sum_histograms(
    function: str, histogram: Tensor, widest: int, group: "dist.ProcessGroup", settings: dict[str, float]
) -> tuple[Tensor, Tensor | None]:
    """The sum of float64 histograms over the group, added in the order of the ranks; its processes must agree in `settings`.

    One all-gather of rows of `widest` numbers and the settings, whatever the histogram's own size, so that no process waits for one
    with another size.

    Returns:
        The sum and None on CPU tensors. On others, and in a traced graph, nothing is read on the host: the second is whether the
        processes agree, 0-d, and where they do not the sum is NaN.

    Raises:
        ValueError: on every process, for different settings, where they are read.
    """
    header = [histogram.new_full((1,), float(value)) for value in settings.values()]
    row = torch.cat([*header, histogram.flatten(), histogram.new_zeros(widest - histogram.numel())])
    gathered = _all_gather(row, group)
    headers = gathered[:, : len(header)]
    total = gathered[:, len(header) : len(header) + histogram.numel()].sum(0).view_as(histogram)
    if histogram.is_cpu and not torch.compiler.is_compiling():
        _check_settings(function, dict(zip(settings, headers.t().tolist(), strict=True)))
        return total, None
    is_agreed = (headers == headers[:1]).all()
    return torch.where(is_agreed, total, torch.nan), is_agreed


def gather_equal(tensor: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """[world, *shape]: the tensors of all processes, detached; they have one shape and dtype."""
    return _all_gather(tensor.detach().contiguous(), group)


# PyTorch 2.13 renamed it.
_all_gather_into: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def _all_gather(tensor: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """[world, *shape]; `tensor` is contiguous and has one shape on all processes."""
    gathered = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    if tensor.numel():
        _all_gather_into(gathered.view(-1), tensor.view(-1), group=group)
    return gathered
