"""The shared ranking operators in plain PyTorch: the readable form, and the fallback on any device.

Breakpoints, bins and lines as in README.md beside this file; float64 inside. The logits are streamed in chunks: besides the bit
mask and the gradient only collecting makes tensors of their size, of one byte per element.
"""
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rsloss_kernels.losses.ranking.op import LINE_ROWS, RECORD_ROWS

CHUNK = 1 << 18


def ranking_collect(logits, targets, quality, segments, num_segments, max_positives, background_first):
    device = logits[0].device
    records, masks, negative_count, offset = [], [], 0, 0
    for level, (level_logits, level_targets) in enumerate(zip(logits, targets, strict=True)):
        if level_targets.is_floating_point():
            is_positive, is_negative = _read_dense(level_targets)
            index = is_positive.nonzero().squeeze(1)
            value = level_targets.flatten()[index].double()
        else:
            index, is_negative = _read_labels(level_targets, level_logits.shape[-1], background_first)
            value = torch.ones(index.shape, dtype=torch.float64, device=device)
            if quality:
                value = quality[level].flatten()[index // level_logits.shape[-1]].double()
        logit = level_logits.flatten()[index].double()
        logit = logit.where(logit.isfinite() & value.isfinite(), torch.nan)
        records.append(torch.stack([logit, value, torch.zeros_like(value), (index + offset).double()]))
        masks.append(_pack(is_negative))
        negative_count = negative_count + is_negative.sum()
        offset += level_logits.numel()
    found = torch.cat(records, 1)
    capacity = found.shape[1] if max_positives is None else max_positives
    positives = torch.zeros((RECORD_ROWS, capacity), dtype=torch.float64, device=device)
    positives[0], positives[3] = torch.nan, -1
    positives[:, : found.shape[1]] = found[:, :capacity]
    counts = torch.stack([torch.tensor(found.shape[1], device=device), torch.as_tensor(negative_count, device=device)])
    return positives, torch.cat(masks), counts


def _read_dense(targets: Tensor) -> tuple[Tensor, Tensor]:
    """A target above 0 is a positive, NaN an invalid one; 0 is a negative; below 0 is ignored."""
    flat = targets.flatten()
    return (flat > 0) | flat.isnan(), flat == 0


def _read_labels(labels: Tensor, num_classes: int, background_first: bool) -> tuple[Tensor, Tensor]:
    """Flat indices of the positives, and which elements are negatives. A label above the classes is background."""
    flat = labels.flatten().long()
    column = flat - 1 if background_first else flat
    rows = ((column >= 0) & (column < num_classes)).nonzero().squeeze(1)
    index = rows * num_classes + column[rows]
    is_negative = (flat >= 0).repeat_interleave(num_classes)
    is_negative[index] = False
    return index, is_negative


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


def count_elements(logits: list[Tensor]) -> int:
    return sum(level.numel() for level in logits)


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


def fixed_point_unit(delta: float, count: int) -> tuple[float, int]:
    """The unit of the fixed-point sums of at most `count` offsets, a power of two (0 for delta = 0), and the bits of one offset."""
    bits = min(44, 62 - max(count - 1, 0).bit_length())
    if delta == 0:
        return 0.0, bits
    mantissa, exponent = math.frexp(2 * delta)
    return math.ldexp(1.0, exponent - (mantissa == 0.5) - bits), bits


def merge_breakpoints(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All breakpoints ascending, lo before hi where equal, and the slots of every lo and hi. Inputs are ascending."""
    rank = torch.arange(lo.numel(), device=lo.device)
    lo_slot = rank + torch.searchsorted(hi, lo)
    hi_slot = rank + torch.searchsorted(lo, hi, right=True)
    merged = lo.new_empty(2 * lo.numel())
    merged[lo_slot], merged[hi_slot] = lo, hi
    return merged, lo_slot, hi_slot


def ranking_bin(logits, negatives, positives, counts, segments, num_segments, delta):
    # By the last key first. Padding and invalid positives both have a NaN logit; padding comes behind.
    order = positives[3].sort(stable=True).indices
    for key in (positives[1], positives[0], positives[3] < 0):
        order = order[key[order].sort(stable=True).indices]
    ranked = positives[:, order]
    arithmetic = arithmetic_type(logits[0].dtype)
    centre = ranked[0][ranked[0].isfinite()]
    edges, _, _ = merge_breakpoints(*breakpoints(centre, delta, arithmetic))
    unit, bits = fixed_point_unit(delta, count_elements(logits))
    bins = torch.zeros((2, 2 * ranked.shape[1] + 1), dtype=torch.int64, device=ranked.device)
    for value, is_negative, _, _ in _chunks(logits, negatives):
        value = value[is_negative]
        bins[0, 0] += value.isnan().sum()
        if edges.numel() == 0:
            continue
        value = value[value >= edges[0]]
        index = torch.searchsorted(edges, value, right=True)
        bins[0].index_add_(0, index, torch.ones_like(index))
        if unit > 0:
            offset = ((value - edges[index - 1]) * (1 / unit)).nan_to_num(0.0).clamp(0, 2**bits - 1)
            bins[1].index_add_(0, index, offset.long())
    return ranked, bins


def clusters(lo_slot: Tensor, hi_slot: Tensor, edges: Tensor) -> Tensor:
    """Origin of every bin `1..2V`: the first breakpoint of the run of covered bins that it belongs to."""
    opens = torch.zeros(edges.numel(), dtype=torch.int64, device=edges.device)
    opens[lo_slot], opens[hi_slot] = 1, -1
    starts = (opens.cumsum(0) - opens) == 0
    return edges[starts][starts.cumsum(0) - 1]


def false_positives(bins: Tensor, centre: Tensor, delta: float, dtype: torch.dtype, num_elements: int) -> Tensor:
    """FP_i of every valid positive, from the bins of `num_elements` logits."""
    edges, lo_slot, hi_slot = merge_breakpoints(*breakpoints(centre, delta, dtype))
    count, fixed = bins[0, 1 : edges.numel() + 1], bins[1, 1 : edges.numel() + 1]
    from_slot = count.flip(0).cumsum(0).flip(0)
    above = from_slot[hi_slot].double()
    if delta == 0:
        return above
    unit, _ = fixed_point_unit(delta, num_elements)
    origin = clusters(lo_slot, hi_slot, edges)
    is_covered = torch.zeros_like(count)
    is_covered[lo_slot], is_covered[hi_slot] = 1, -1
    moment = torch.where(is_covered.cumsum(0) > 0, fixed.double() * unit + count * (edges - origin), 0.0).cumsum(0)
    moment = torch.nn.functional.pad(moment, (1, 0))
    inside = (from_slot[lo_slot] - from_slot[hi_slot]).double()
    offset = moment[hi_slot] - moment[lo_slot] - inside * (centre - origin[lo_slot])
    return above + (0.5 * inside + offset / (2 * delta)).clamp(min=0)


def gradient_lines(centre: Tensor, coefficient: Tensor, delta: float, dtype: torch.dtype, capacity: int) -> Tensor:
    """The piecewise-linear gradient of a negative, sum_i c_i H(s - s_i), as `lines` [3, 2 cap]."""
    lines = torch.zeros((LINE_ROWS, 2 * capacity), dtype=torch.float64, device=centre.device)
    lines[0] = torch.inf
    lines[1] = coefficient.sum()
    edges, lo_slot, hi_slot = merge_breakpoints(*breakpoints(centre, delta, dtype))
    used = edges.numel()
    lines[0, :used] = edges

    def per_slot(at_lo: Tensor, at_hi: Tensor) -> Tensor:
        steps = torch.zeros_like(edges)
        steps[lo_slot], steps[hi_slot] = at_lo, at_hi
        return steps.cumsum(0)

    closed = per_slot(torch.zeros_like(coefficient), coefficient)
    if delta == 0:
        lines[1, :used] = closed
        return lines
    origin = clusters(lo_slot, hi_slot, edges)
    is_open = per_slot(torch.ones_like(coefficient), -torch.ones_like(coefficient)) > 0
    weighted = coefficient * (centre - origin[lo_slot])
    opened = per_slot(coefficient, -coefficient).where(is_open, 0)
    moment = per_slot(weighted, -weighted).where(is_open, 0)
    lines[1, :used] = closed + (0.5 * opened + (opened * (edges - origin) - moment) / (2 * delta))
    lines[2, :used] = opened / (2 * delta)
    return lines


def ranking_backward(
    logits, negatives, gradients, lines, counts, segments, num_segments, grad_first, grad_second
) -> list[Tensor]:
    results = [torch.zeros_like(level, memory_format=torch.contiguous_format) for level in logits]
    if counts[0] > gradients.shape[1]:
        return [result.fill_(torch.nan) for result in results]
    upstream = [torch.zeros((), device=lines.device) if grad is None else grad for grad in (grad_first, grad_second)]
    upstream = [grad.double() for grad in upstream]
    edges, values, slopes = lines
    for value, is_negative, level, start in _chunks(logits, negatives):
        slope_of = torch.zeros_like(value)
        if edges.numel():
            k = torch.searchsorted(edges, value, right=True) - 1
            clamped = k.clamp(min=0)
            offset = torch.where(value.isinf(), 0.0, value - edges[clamped])
            slope_of = torch.where(k < 0, 0.0, values[clamped] + slopes[clamped] * offset)
        gradient = torch.where(value.isnan(), value, slope_of * upstream[0]).where(is_negative, 0.0)
        results[level].view(-1)[start : start + value.numel()] = gradient.to(results[level].dtype)
    index = gradients[0].long()
    of_positive = gradients[1] * upstream[0] + gradients[2] * upstream[1]
    offset = 0
    for result in results:
        here = (index >= offset) & (index < offset + result.numel())
        result.view(-1)[index[here] - offset] = of_positive[here].to(result.dtype)
        offset += result.numel()
    return results
