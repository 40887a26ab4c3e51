"""What the last operators of all ranking losses share, in plain PyTorch: from ranked positives and bins to sums and tables.

The sums above a positive and the lines restart in every segment: one is as exact as by itself. No loop over segments.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from rsloss_kernels.losses.ranking import reference
from rsloss_kernels.losses.ranking.op import GRADIENT_ROWS, LINE_ROWS


class Sweep:
    """The V valid positives, ascending by logit inside every segment, with their windows and the negatives above them."""

    def __init__(self, logits, ranked, counts, bins, num_segments, delta, gradient_scale):
        self.ranked, self.num_segments, self.delta = ranked, num_segments, delta
        self.dtype = reference.arithmetic_type(logits[0].dtype)
        self.is_valid = ranked[0].isfinite()  # [cap]
        self.centre, self.quality, segment, _ = ranked[:, self.is_valid]  # [V]
        self.segment = segment.long() if num_segments > 1 else None
        self._count_segments(gradient_scale)

        lo, hi = reference.breakpoints(self.centre, delta, self.dtype)
        self.edges, self.lo_slot, self.hi_slot = reference.merge_breakpoints(lo, hi, self.segment, delta)
        # For differences: a breakpoint beyond the largest finite number is infinite.
        self.finite_edges = self.edges.clamp(max=torch.finfo(self.dtype).max)
        # Ranks of those inside the window of a positive: `lo <= s_j < hi`.
        ascending = reference.Ascending(self.centre, self.segment)
        self.lower = ascending.count_below(lo, self.segment)  # [V]
        self.upper = ascending.count_below(hi, self.segment)  # [V]
        # The first rank that H(s_i - s_j) does not count in full, seen from j.
        self.full_end = self.lower if delta > 0 else ascending.count_below(self.centre, self.segment, right=True)
        self.origin = self._cluster_origins()  # [2V]
        self.offset = self.centre - self.origin[self.lo_slot]  # [V]

        self.false_positives = self._false_positives(bins, int(counts[2]))  # [V]
        invalid = (ranked[3] >= 0) & ~self.is_valid
        self.is_broken = (counts[0] > ranked.shape[1]) | (bins[0, 0] > 0) | invalid.any()

    def _count_segments(self, gradient_scale: float) -> None:
        size = self.centre.numel()
        # First and past-the-last rank of the segment of every positive, and its share in the mean over segments.
        self.first, self.share = None, 1 / max(size, 1)
        self.end = torch.full((size,), size, device=self.centre.device)
        if self.segment is not None:
            _, number, sizes = self.segment.unique_consecutive(return_inverse=True, return_counts=True)
            self.end = sizes.cumsum(0)[number]
            self.first = self.end - sizes[number]
            self.share = 1 / (sizes[number].double() * max(sizes.numel(), 1))
        self.scale = gradient_scale * self.share

    def _cluster_origins(self) -> Tensor:
        """For every bin the first breakpoint of the run of covered bins that it belongs to; no run leaves its segment."""
        opens = torch.zeros(self.edges.numel(), dtype=torch.int64, device=self.edges.device)
        opens[self.lo_slot], opens[self.hi_slot] = 1, -1
        depth = opens.cumsum(0)
        self.is_covered = depth > 0
        starts = depth == opens
        return self.edges[starts][starts.cumsum(0) - 1]

    def _cluster_tops(self) -> Tensor:
        """For every bin the last breakpoint of the run of covered bins that it belongs to."""
        ends = ~self.is_covered
        return self.finite_edges[ends][ends.cumsum(0) - ends.long()]

    def _running_down(self, values: Tensor) -> Tensor:
        """Running sum from the last slot of every cluster down to its first."""
        place = torch.arange(values.numel(), device=values.device)
        first = torch.where(~self.is_covered.flip(0), place, 0).cummax(0).values
        return running(values.flip(0), first).flip(0)

    def _first_slot(self) -> Tensor | None:
        return None if self.first is None else 2 * self.first.repeat_interleave(2)

    def _false_positives(self, bins: Tensor, num_elements: int) -> Tensor:
        """FP_i, from the bins of `num_elements` logits."""
        count, fixed = bins[:, 1 : self.edges.numel() + 1]
        from_slot = pad(count.flip(0).cumsum(0).flip(0), (0, 1))
        above = (from_slot[self.hi_slot] - from_slot[2 * self.end]).double()
        if self.delta == 0:
            return above
        unit, _ = reference.fixed_point_unit(self.delta, num_elements, self.dtype)
        # From the top of a cluster down, offsets from its last breakpoint: near the top, where few negatives make a small FP,
        # nothing large is added that would have to cancel again.
        top = self._cluster_tops()
        moment = torch.where(self.is_covered, fixed.double() * unit + count * (self.finite_edges - top), 0.0)
        moment = self._running_down(moment)
        inside = (from_slot[self.lo_slot] - from_slot[self.hi_slot]).double()
        distance = moment[self.lo_slot] - moment[self.hi_slot] - inside * (self.centre - top[self.lo_slot])
        # Prefix sums that were not added up one after the other leave rounding where nothing was added.
        return above + torch.where(inside > 0, 0.5 * inside + distance / (2 * self.delta), 0.0).clamp(min=0)

    def sums_above(self, values: Tensor) -> Tensor:
        """Sums of `values_j H(s_j - s_i)` over the positives j in the segment of i, for every positive i. [rows, V]"""
        size = self.centre.numel()
        upper = torch.where(self.upper < self.end, self.upper, size)

        def from_top(rows: Tensor, first: Tensor) -> Tensor:
            return torch.stack([pad(running(row.flip(0), first).flip(0), (0, 1)) for row in rows])

        # From the top down: what stands below, and may be large, takes no digits from a sum.
        first = (size - self.end).flip(0)
        plain, moment = from_top(values, first), from_top(values * self.offset, first)
        full = plain[:, upper]
        return self._sums(+1, full, plain[:, self.lower] - full, moment[:, self.lower] - moment[:, upper], self.offset)

    def sums_in_nodes(self, sign: int, values: Tensor, member: Tensor, of: Tensor, node: Tensor) -> Tensor:
        """Sums of `values_j H(sign (s_j - s_i))` over the members j in the node of i, for every positive i in `of`.

        sign: +1 or -1. values: [rows, V]. member, of: ranks. node: [V], of one segment each. Returns [rows, len(of)].
        """
        size = self.centre.numel()
        keys, order = (node[member] * size + member).sort()
        member = member[order]
        prefix, moment = _prefix(values[:, member]), _prefix(values[:, member] * self.offset[member])
        first_key = node[of] * size
        lower = torch.searchsorted(keys, first_key + self.lower[of])
        upper = torch.searchsorted(keys, first_key + self.upper[of])
        if sign > 0:
            full = prefix[:, torch.searchsorted(keys, first_key + size)] - prefix[:, upper]
        else:
            full_end = torch.searchsorted(keys, first_key + self.full_end[of])
            full = prefix[:, full_end] - prefix[:, torch.searchsorted(keys, first_key)]
        return self._sums(sign, full, prefix[:, upper] - prefix[:, lower], moment[:, upper] - moment[:, lower], self.offset[of])

    def _sums(self, sign: int, full: Tensor, inside: Tensor, moment: Tensor, offset: Tensor) -> Tensor:
        """Of those that count in full, and those inside the window with their moment about the origin that `offset` has too."""
        if self.delta == 0:
            return full
        return full + 0.5 * inside + sign * (moment - inside * offset) / (2 * self.delta)

    def among_positives(self) -> Tensor:
        """N_i plus one half: the place of every positive among the positives, itself counted as one. [V]"""
        above = self.sums_above(torch.ones_like(self.centre)[None])[0]
        return above.clamp(min=0.5) + 0.5 if self.delta > 0 else above

    def loss(self, errors: Tensor) -> Tensor:
        """The mean over segments of the means of `errors` [V]; NaN if something is invalid. 0-d"""
        # One after the other: `sum` cuts many values into as many parts as there are threads.
        total = (errors * self.share).cumsum(0)[-1:].sum()
        return torch.where(self.is_broken, torch.nan, total).to(self.dtype)

    def gradients(self, *gradients: Tensor) -> Tensor:
        """The table `gradients`, from the gradients [V] of the positives for the first and the second loss before the mean."""
        table = torch.zeros((GRADIENT_ROWS, self.ranked.shape[1]), dtype=torch.float64, device=self.ranked.device)
        table[0] = self.ranked[3]
        for row, gradient in enumerate(gradients, start=1):
            table[row] = torch.where(self.ranked[3] >= 0, torch.nan, 0.0)
            table[row, self.is_valid] = gradient * self.scale
        table[3] = self.num_segments
        table[3, self.is_valid] = 0 if self.segment is None else self.segment.double()
        return table

    def lines(self, coefficient: Tensor) -> Tensor:
        """The table `lines`: the gradient of a negative, sum_i c_i H(s - s_i), from the coefficients [V] before the mean."""
        coefficient = coefficient * self.scale
        lines = torch.zeros((LINE_ROWS, 2 * self.ranked.shape[1]), dtype=torch.float64, device=self.ranked.device)
        used, first_slot = self.edges.numel(), self._first_slot()
        lines[0], lines[0, :used] = torch.inf, self.edges

        def per_slot(at_lo: Tensor, at_hi: Tensor) -> Tensor:
            steps = torch.zeros_like(self.edges)
            steps[self.lo_slot], steps[self.hi_slot] = at_lo, at_hi
            return running(steps, first_slot)

        lines[1, :used] = per_slot(torch.zeros_like(coefficient), coefficient)
        if self.delta > 0:
            weighted = coefficient * self.offset
            opened = per_slot(coefficient, -coefficient).where(self.is_covered, 0)
            moment = per_slot(weighted, -weighted).where(self.is_covered, 0)
            lines[1, :used] += 0.5 * opened + (opened * (self.finite_edges - self.origin) - moment) / (2 * self.delta)
            lines[2, :used] = opened / (2 * self.delta)
        lines[1, used:] = lines[1, used - 1] if used else 0
        return lines


def _prefix(values: Tensor) -> Tensor:
    return pad(values.cumsum(1), (1, 0))


def running(values: Tensor, first: Tensor | None, combine: Callable[..., Tensor] = torch.add) -> Tensor:
    """Running sum (or minimum: `combine=torch.minimum`) of `values` [n] that restarts at the places `first` [n], ascending."""
    if first is None:
        return values.cumsum(0) if combine is torch.add else values.cummin(0).values
    place = torch.arange(values.numel(), device=values.device) - first
    step, longest = 1, int(place.max()) + 1 if values.numel() else 0
    while step < longest:
        combined = torch.where(place[step:] >= step, combine(values[step:], values[:-step]), values[step:])
        values, step = torch.cat([values[:step], combined]), 2 * step
    return values
