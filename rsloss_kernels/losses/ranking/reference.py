"""The shared ranking operators in plain PyTorch: the readable form, and the fallback on any device.

Breakpoints, bins and lines as in README.md beside this file; float64 inside. The logits are streamed in chunks: besides the bit
mask and the gradient only collecting makes tensors of their size, of one byte per element. `sweep.py` beside this file holds what
the last operators share.
"""
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rsloss_kernels.losses.ranking.op import RECORD_ROWS, count_elements, index_shape

CHUNK = 1 << 18


def ranking_collect(logits, targets, quality, segments, num_segments, max_positives, maps, background_first):
    device = logits[0].device
    records, masks, offset = [], [], 0
    negative_count = torch.zeros((), dtype=torch.int64, device=device)
    for level, (level_logits, level_targets) in enumerate(zip(logits, targets, strict=True)):
        if level_targets.is_floating_point():
            is_positive, is_negative = _read_dense(level_targets)
            index = is_positive.nonzero().squeeze(1)
            value = level_targets.flatten()[index].double()
        else:
            classes, places = index_shape(level_logits, level_targets, maps)
            row, index, is_negative = _read_labels(level_targets, classes, places, background_first)
            value = torch.ones(index.shape, dtype=torch.float64, device=device)
            if quality:
                value = quality[level].flatten()[row].double()
        logit = level_logits.flatten()[index].double()
        logit = logit.where(logit.isfinite() & value.isfinite(), torch.nan)
        segment = torch.zeros_like(index)
        if segments is not None or num_segments > 1:
            segment = segments_of(index, logits, level, segments, num_segments)
        record = torch.stack([logit, value, segment.double(), (index + offset).double()])
        if segments is not None:
            record = record[:, _is_segment(segment, num_segments)]
            for start in range(0, is_negative.numel(), CHUNK):
                part = is_negative[start : start + CHUNK]
                everyone = torch.arange(start, start + part.numel(), device=device)
                part &= _is_segment(segments_of(everyone, logits, level, segments, num_segments), num_segments)
        records.append(record)
        masks.append(_pack(is_negative))
        negative_count += is_negative.sum()
        offset += level_logits.numel()
    found = torch.cat(records, 1)
    capacity = found.shape[1] if max_positives is None else max_positives
    positives = torch.zeros((RECORD_ROWS, capacity), dtype=torch.float64, device=device)
    positives[0], positives[3] = torch.nan, -1
    positives[:, : found.shape[1]] = found[:, :capacity]
    counts = torch.stack([torch.tensor(found.shape[1], device=device), negative_count, torch.tensor(offset, device=device)])
    return positives, torch.cat(masks), counts


def segments_of(index: Tensor, logits: list[Tensor], level: int, segments: Tensor | None, num_segments: int) -> Tensor:
    """Segments of the elements `index`, flat in `logits[level]`, as int64; below 0 or from `num_segments` on: ignored."""
    if segments is None:
        return index // max(logits[level].numel() // num_segments, 1)
    ids, (rows, columns) = segments.flatten(), segments.shape
    if columns > 1:
        return ids[index % columns].long()
    offset = sum(before.numel() for before in logits[:level])
    return ids[(index + offset) // max(count_elements(logits) // max(rows, 1), 1)].long()


def _is_segment(segment: Tensor, num_segments: int) -> Tensor:
    return (segment >= 0) & (segment < num_segments)


def _read_dense(targets: Tensor) -> tuple[Tensor, Tensor]:
    """A target above 0 is a positive, NaN an invalid one; 0 is a negative; below 0 is ignored."""
    flat = targets.flatten()
    return (flat > 0) | flat.isnan(), flat == 0


def _read_labels(labels: Tensor, num_classes: int, places: int, background_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of the positives the rows and the flat indices, which ascend; and which elements are negatives. Elements are [outer, classes,
    places], labels [outer, places]. A label above the classes is background.
    """
    flat = labels.flatten().long()
    column = flat - 1 if background_first else flat
    rows = ((column >= 0) & (column < num_classes)).nonzero().squeeze(1)
    index, order = ((rows // places * num_classes + column[rows]) * places + rows % places).sort()
    is_negative = (flat >= 0).view(-1, 1, places).repeat(1, num_classes, 1).flatten()
    is_negative[index] = False
    return rows[order], index, is_negative


def _pack(bits: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 64))
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def _unpack(mask: Tensor, count: int) -> Tensor:
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.flatten()[:count].bool()


def _chunks(logits: list[Tensor], negatives: Tensor) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Yields (logits as float64, negative mask, number of the tensor, start) for at most CHUNK elements at a time."""
    first_byte = 0
    for level, level_logits in enumerate(logits):
        flat = level_logits.flatten()
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK].double()
            bytes_from = first_byte + start // 8
            yield part, _unpack(negatives[bytes_from : bytes_from + (part.numel() + 7) // 8], part.numel()), level, start
        first_byte += (flat.numel() + 63) // 64 * 8


def arithmetic_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def breakpoints(centre: Tensor, delta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Smallest values of `dtype` that are >= centre - delta and >= centre + delta, as float64."""
    return _round_up(centre, -delta, dtype), _round_up(centre, delta, dtype)


def _round_up(centre: Tensor, shift: float, dtype: torch.dtype) -> Tensor:
    total = centre + shift
    part = total - centre
    error = (centre - (total - part)) + (shift - part)
    rounded = total.to(dtype)
    too_small = (rounded.double() < total) | ((rounded.double() == total) & (error > 0))
    return torch.where(too_small, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded).double()


def fixed_point_unit(delta: float, count: int, dtype: torch.dtype) -> tuple[float, int]:
    """The unit of the fixed-point sums of at most `count` offsets, a power of two (0 for delta = 0), and the bits of one offset.

    dtype: of the arithmetic.
    """
    bits = min(52 if dtype == torch.float64 else 44, 62 - max(count - 1, 0).bit_length())
    if delta == 0:
        return 0.0, bits
    mantissa, exponent = math.frexp(2 * delta)
    return math.ldexp(1.0, exponent - (mantissa == 0.5) - bits), bits


class Ascending:
    """Values that ascend inside every segment, to be searched by value and segment; `segment` is None where there is only one.

    Values are replaced by their ranks among all distinct ones, so that (segment, rank) is one ascending integer.
    """

    def __init__(self, values: Tensor, segment: Tensor | None):
        self.values, self.segment = values, segment  # [n], int64 [n] ascending
        if segment is not None:
            self.distinct = values.unique()
            self.keys = self._key(torch.searchsorted(self.distinct, values), segment)

    def _key(self, rank: Tensor, segment: Tensor) -> Tensor:
        return segment * (self.distinct.numel() + 1) + rank

    def count_below(self, value: Tensor, segment: Tensor | None, right: bool = False) -> Tensor:
        """How many stand before `value` of `segment`, those of earlier segments included; with `right` equal ones too."""
        if segment is None:
            return torch.searchsorted(self.values, value, right=right)
        return torch.searchsorted(self.keys, self._key(torch.searchsorted(self.distinct, value, right=right), segment))

    def last_not_above(self, value: Tensor, segment: Tensor | None) -> Tensor:
        """Place of the last one in `segment` that is `<= value`; -1 if there is none."""
        place = self.count_below(value, segment, right=True) - 1
        if segment is None:
            return place
        return place.where(self.segment[place.clamp(min=0)] == segment, -1)


def merge_breakpoints(lo: Tensor, hi: Tensor, segment: Tensor | None, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """All breakpoints ascending inside every segment, and the slots of every lo and hi.

    Where equal hi stands before lo: windows that only touch have nothing in common. With delta = 0 they have no width, and each
    must open before it closes: lo before hi.

    lo, hi: [V], ascending inside every segment.
    """
    rank = torch.arange(lo.numel(), device=lo.device)
    lo_slot = rank + Ascending(hi, segment).count_below(lo, segment, right=delta > 0)
    hi_slot = rank + Ascending(lo, segment).count_below(hi, segment, right=delta == 0)
    merged = lo.new_empty(2 * lo.numel())
    merged[lo_slot], merged[hi_slot] = lo, hi
    return merged, lo_slot, hi_slot


def ranking_bin(logits, negatives, positives, counts, segments, num_segments, delta):
    is_segmented = num_segments > 1
    # By the last key first. Padding and invalid positives both have a NaN logit; padding comes behind.
    order = positives[3].sort(stable=True).indices
    is_last = (positives[3] < 0).to(torch.int8)
    by_segment = [positives[2]] if is_segmented else []
    for key in (positives[1], positives[0], *by_segment, 2 * is_last + positives[0].isnan() if is_segmented else is_last):
        order = order[key[order].sort(stable=True).indices]
    ranked = positives[:, order]
    valid = ranked[:, ranked[0].isfinite()]
    rank_segment = valid[2].long() if is_segmented else None
    arithmetic = arithmetic_type(logits[0].dtype)
    merged, _, _ = merge_breakpoints(*breakpoints(valid[0], delta, arithmetic), rank_segment, delta)
    edges = Ascending(merged, rank_segment.repeat_interleave(2) if is_segmented else None)
    unit, bits = fixed_point_unit(delta, int(counts[2]), arithmetic)
    bins = torch.zeros((2, 2 * ranked.shape[1] + 1), dtype=torch.int64, device=ranked.device)
    lowest = merged.min() if merged.numel() else torch.nan
    for value, is_negative, level, start in _chunks(logits, negatives):
        bins[0, 0] += (value.isnan() & is_negative).sum()
        is_negative &= value >= lowest
        value = value[is_negative]
        segment = None
        if is_segmented:
            segment = segments_of(is_negative.nonzero().squeeze(1) + start, logits, level, segments, num_segments)
        slot = edges.last_not_above(value, segment)
        if is_segmented:
            value, slot = value[slot >= 0], slot[slot >= 0]
        bins[0].index_add_(0, slot + 1, torch.ones_like(slot))
        if unit > 0:
            offset = ((value - merged[slot]) * (1 / unit)).nan_to_num(0.0).clamp(0, 2**bits - 1)
            bins[1].index_add_(0, slot + 1, offset.long())
    return ranked, bins


def ranking_backward(
    logits, negatives, gradients, lines, counts, segments, num_segments, grad_first, grad_second
) -> list[Tensor]:
    results = [torch.zeros_like(level, memory_format=torch.contiguous_format) for level in logits]
    if counts[0] > gradients.shape[1]:
        return [result.fill_(torch.nan) for result in results]
    upstream = [torch.zeros((), device=lines.device) if grad is None else grad for grad in (grad_first, grad_second)]
    upstream = [grad.double() for grad in upstream]
    edges, values, slopes = lines
    is_segmented = num_segments > 1
    # The breakpoints of the ranks [a, b) of a segment have the slots [2a, 2b).
    ascending = Ascending(edges, gradients[3].long().repeat_interleave(2) if is_segmented else None)
    for value, is_negative, level, start in _chunks(logits, negatives):
        line = torch.zeros_like(value)
        if edges.numel():
            segment = None
            if is_segmented:
                everyone = torch.arange(start, start + value.numel(), device=value.device)
                segment = segments_of(everyone, logits, level, segments, num_segments)
            slot = ascending.last_not_above(value, segment)
            clamped = slot.clamp(min=0)
            offset = torch.where(value.isinf(), 0.0, value - edges[clamped])
            line = torch.where(slot < 0, 0.0, values[clamped] + slopes[clamped] * offset)
        gradient = torch.where(value.isnan(), value, line * upstream[0]).where(is_negative, 0.0)
        results[level].view(-1)[start : start + value.numel()] = gradient.to(results[level].dtype)
    index = gradients[0].long()
    of_positive = gradients[1] * upstream[0] + gradients[2] * upstream[1]
    offset = 0
    for result in results:
        here = (index >= offset) & (index < offset + result.numel())
        result.view(-1)[index[here] - offset] = of_positive[here].to(result.dtype)
        offset += result.numel()
    return results
