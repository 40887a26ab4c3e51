# ruff: noqa: E501 (a fault is one line, as long as the text it replaces)
"""The faults that tests/mutation plants, and the tests that must notice each.

Every fault is one that a reader could make: a wrong comparison, an index off by one, a missing barrier, a dropped tail, swapped
tables, a lost atomic, a factor forgotten.
"""
from typing import NamedTuple


class Fault(NamedTuple):
    backend: str
    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


RANKING = "tests/test_ranking_values.py tests/test_ranking_edge_cases.py tests/test_segments.py tests/test_rank_sort.py"
AP = "tests/test_ap.py tests/test_ranking_values.py"
ALRP = "tests/test_alrp.py tests/test_ranking_values.py"
GHM = "tests/test_ghm_values.py tests/test_ghm_edge_cases.py tests/test_ghm_state.py"
FOCAL = "tests/test_focal_values.py tests/test_focal_maps.py tests/test_focal_edge_cases.py"
NARROW = "tests/test_focal_narrow.py"
EQUALIZED = "tests/test_equalized_focal_values.py tests/test_equalized_focal_state.py"
GROUPS = "tests/test_group_softmax_values.py tests/test_group_softmax_edge_cases.py"
SEESAW = "tests/test_seesaw.py tests/test_seesaw_state.py"
SMOOTH_L1 = "tests/test_smooth_l1_values.py"
DYNAMIC = "tests/test_dynamic_rcnn_values.py tests/test_dynamic_rcnn_state.py"
BALANCING = "tests/test_self_balancing.py"

LOSSES = "rsloss_kernels/losses"
RANKING_PY = f"{LOSSES}/ranking/reference.py"
SWEEP_PY = f"{LOSSES}/ranking/sweep.py"

REFERENCE = [
    ("a target of 0 is ignored", RANKING_PY, "return (flat > 0) | flat.isnan(), flat == 0", "return (flat > 0) | flat.isnan(), flat < 0", RANKING),
    ("labels above the classes wrap", RANKING_PY, "rows = ((column >= 0) & (column < num_classes))", "rows = ((column >= 0) & (column <= num_classes))", RANKING),
    ("mask without its last word", RANKING_PY, "padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 64))", "padded = torch.nn.functional.pad(bits.to(torch.uint8)[: bits.numel() // 8 * 8], (0, -(bits.numel() // 8 * 8) % 64 + (64 if bits.numel() % 64 and bits.numel() // 8 % 8 == 0 else 0)))", RANKING),
    ("breakpoints rounded to the nearest", RANKING_PY, "return torch.where(too_small, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded).double()", "return rounded.double()", RANKING),
    ("negatives counted from above the breakpoint", RANKING_PY, "is_negative &= value >= lowest", "is_negative &= value > lowest", RANKING),
    ("gradient at infinity is NaN", RANKING_PY, "offset = torch.where(value.isinf(), 0.0, value - edges[clamped])", "offset = value - edges[clamped]", RANKING),
    ("upstream gradients swapped", RANKING_PY, "of_positive = gradients[1] * upstream[0] + gradients[2] * upstream[1]", "of_positive = gradients[1] * upstream[1] + gradients[2] * upstream[0]", "tests/test_ranking_autograd.py tests/test_rank_sort.py"),
    ("overflow of the capacity passes in silence", RANKING_PY, "if counts[0] > gradients.shape[1]:", "if counts[0] > gradients.shape[1] + 1:", "tests/test_ranking_edge_cases.py tests/test_ranking_autograd.py"),
    ("NaN among negatives is not told", SWEEP_PY, "| (bins[0, 0] > 0) | invalid.any()", "| invalid.any()", RANKING),
    ("mean over positives, not segments", SWEEP_PY, "self.share = 1 / (sizes[number].double() * max(sizes.numel(), 1))", "self.share = 1 / torch.full_like(sizes[number].double(), size)", "tests/test_segments.py"),
    ("half of the window forgotten", SWEEP_PY, "torch.where(inside > 0, 0.5 * inside + distance / (2 * self.delta), 0.0)", "torch.where(inside > 0, distance / (2 * self.delta), 0.0)", RANKING),
    ("a positive above itself counts twice", SWEEP_PY, "return above.clamp(min=0.5) + 0.5 if self.delta > 0 else above", "return above.clamp(min=0.5) + 1.0 if self.delta > 0 else above", AP),
    ("sorting target and current swapped", f"{LOSSES}/rank_sort/reference.py", "sorting_error = (worse_deficit * better + better_excess * worse)", "sorting_error = (worse_deficit * worse + better_excess * better)", RANKING),
    ("pull on worse positives has the wrong sign", f"{LOSSES}/rank_sort/reference.py", "pull[lower_half] += sweep", "pull[lower_half] -= sweep", RANKING),
    ("gate of ranking applied to sorting", f"{LOSSES}/rank_sort/reference.py", "is_ranked_below, is_sorted_below = false_positives > EPS, worse > EPS", "is_ranked_below, is_sorted_below = false_positives > EPS, false_positives > EPS", RANKING),
    ("interpolation takes the worst precision", f"{LOSSES}/ap/reference.py", "error = running(error, sweep.first, torch.minimum)", "error = running(error.flip(0), sweep.first, torch.minimum).flip(0)", AP),
    ("localisation error of the positive itself", f"{LOSSES}/alrp/reference.py", "self_step = 0.5 if delta > 0 else 1.0", "self_step = 0.0", ALRP),
    ("edges of GHM belong to the lower bin", f"{LOSSES}/ghm/reference.py", "return lowest + (position >= _look_up(", "return lowest + (position > _look_up(", GHM),
    ("empty bins are counted", f"{LOSSES}/ghm/reference.py", "num_bins = bins if count_empty_bins else is_filled.sum()", "num_bins = bins", GHM),
    ("momentum moves empty bins", f"{LOSSES}/ghm/reference.py", "changes = torch.ones_like(is_filled) if count_empty_bins else is_filled", "changes = torch.ones_like(is_filled)", GHM),
    ("state moves with a NaN", f"{LOSSES}/ghm/reference.py", "is_kept = is_filled.any() & loss.isfinite()", "is_kept = is_filled.any()", GHM),
    ("alpha of positives and negatives swapped", f"{LOSSES}/focal/reference.py", "gamma, a, b = class_table[:, :, None]", "gamma, b, a = class_table[:, :, None]", FOCAL),
    ("ignored rows keep their gradient", f"{LOSSES}/focal/reference.py", "is_ignored = is_ignored | (t.long() == ignore_index)", "is_ignored = is_ignored | (t.long() == ignore_index + 1)", FOCAL),
    ("others are sampled with one too many", f"{LOSSES}/group_softmax/reference.py", "is_kept = is_other & (rank < math.floor(wanted))", "is_kept = is_other & (rank <= math.floor(wanted))", "tests/test_group_softmax_ops.py tests/test_group_softmax_values.py tests/test_group_softmax_edge_cases.py"),
    ("group average below one", f"{LOSSES}/group_softmax/reference.py", "averages[group] = torch.where(total <= 1, 1.0, total)", "averages[group] = total.clamp(min=1e-12)", GROUPS),
    ("mitigation also boosts", f"{LOSSES}/seesaw/reference.py", "mitigation = p * (log_counts - log_counts[target][:, None]).clamp(max=0)", "mitigation = p * (log_counts - log_counts[target][:, None])", SEESAW),
    ("smooth L1 without its offset", f"{LOSSES}/smooth_l1/reference.py", "distance * (0.5 * distance / beta), distance - 0.5 * beta)", "distance * (0.5 * distance / beta), distance)", SMOOTH_L1),
    ("period one step too long", f"{LOSSES}/self_balancing/api.py", "completes = counter >= self.period", "completes = counter > self.period", BALANCING),
    ("factor inverted", f"{LOSSES}/self_balancing/api.py", "factor = reference / value", "factor = value / reference", BALANCING),
    ("threshold without its floor", f"{LOSSES}/dynamic_rcnn/assignment.py", "return (self.iou_sum / divisor).clamp(min=self.initial_iou), recorded > 0", "return self.iou_sum / divisor, recorded > 0", DYNAMIC),
    ("window is not cleared", f"{LOSSES}/dynamic_rcnn/assignment.py", "store(self.iou_sum, torch.where(ends, 0.0, self.iou_sum))", "pass", DYNAMIC),
    ("state of EFL moves in eval mode", f"{LOSSES}/equalized_focal/modules.py", "        if not keeps_statistics(self):\n            return\n        group", "        group", EQUALIZED),
    ("ratio is not bounded", f"{LOSSES}/equalized_focal/modules.py", "return super()._ratio(pos_grad, neg_grad).clamp(0, 1)", "return super()._ratio(pos_grad, neg_grad)", EQUALIZED),
]  # fmt: skip

CPP = [
    ("quarter of the pairs dropped in a tail", "csrc/rank_sort/rank_sort_simd.h", "if (count - k < 8) h = lane < zero + static_cast<double>(count - k) ? h : zero;", "if (count - k < 8) h = lane < zero + static_cast<double>(count - k - 1) ? h : zero;", RANKING),
    ("moment of the window has the wrong sign", "csrc/rank_sort/rank_sort_simd.h", "member.sum += above[0] + 0.5 * inside[0] + (inside[2]", "member.sum += above[0] + 0.5 * inside[0] - (inside[2]", RANKING),
    ("bounds of the better half are off by one", "csrc/rank_sort/rank_sort_simd.h", "    member.lower -= low;\n    member.upper -= high;\n", "    member.lower -= low + (low > 0);\n    member.upper -= high;\n", RANKING),
    ("last bins are not emptied", "csrc/ranking/ranking_bin_simd.h", "for (int32_t bin = 0; bin < packed.bins; ++bin) {", "for (int32_t bin = 0; bin + 1 < packed.bins; ++bin) {", RANKING),
    ("odd element of a buffer lost", "csrc/ranking/ranking_bin_simd.h", "if (filled % 2 != 0) buffer.bin[filled] = buffer.offset[filled] = 0;", "filled &= ~1;", RANKING),
    ("NaN of full words is not counted", "csrc/ranking/ranking_bin_simd.h", "if (broken) nan_count += __builtin_popcount(broken);", "", RANKING),
    ("partial word reads its neighbour's bits", "csrc/ranking/ranking_bin_simd.h", "const uint64_t inside = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};", "const uint64_t inside = ~uint64_t{0};", "tests/test_ranking_bad_input.py::test_bits_behind_the_last_element_count_for_nothing"),
    ("steps of gathered lines are their values", "csrc/ranking/ranking_simd.h", "_mm512_or_si512(even, _mm512_set1_epi32(1))", "even", RANKING),  # noticed where has_fast_gathers()
    ("packed gradients are not spread out", "csrc/ranking/ranking_gradient_simd.h", "      next += __builtin_popcount(relevant);\n    }\n  }\n  return written;", "      next += __builtin_popcount(relevant) & ~1;\n    }\n  }\n  return written;", RANKING),
    ("line at the wrong cell", "csrc/ranking/ranking_gradient_simd.h", "cells[i] = {static_cast<float>(value + step * static_cast<double>(i)), static_cast<float>(step)};", "cells[i] = {static_cast<float>(value + step * static_cast<double>(i + 1)), static_cast<float>(step)};", RANKING),
    ("cells rounded to the nearest", "csrc/ranking/cell_grid.h", "inline int32_t cell_of(const CellGrid& grid, float value) { return static_cast<int32_t>(position_of(grid, value)); }", "inline int32_t cell_of(const CellGrid& grid, float value) { return static_cast<int32_t>(position_of(grid, value) + 0.5f); }", RANKING),
    ("invalid positives pass", "csrc/ranking/finalize_cpu.h", "for (int64_t i = windows.count; i < capacity_; ++i) is_broken_ |= is_invalid(i);", "", RANKING),
    ("second loss is not scaled", "csrc/ranking/finalize_cpu.h", "if (!terms.second.empty()) terms.second[i] *= scale;", "", RANKING),
    ("interpolation runs over segments", "csrc/ap/ap_cpu.cpp", "  for (const SegmentRange& range : positives.windows.ranges) {\n    double smallest = 1;\n", "  double smallest = 1;\n  for (const SegmentRange& range : positives.windows.ranges) {\n", f"tests/test_segments.py {AP}"),
    ("localisation of the positive itself", "csrc/alrp/alrp_cpu.cpp", "localisation_terms(sums[i], losses[i] - self * regression[i], positives", "localisation_terms(sums[i], losses[i], positives", ALRP),
    ("edges of GHM belong to the lower bin", "csrc/ghm/ghm.h", "return static_cast<double>(nearest) < threshold ? nextafterf(nearest, INFINITY) : nearest;", "return nextafterf(nearest, INFINITY);", GHM),
    ("easy elements are counted twice", "csrc/ghm/ghm_classification_simd.h", "  count -= filled - others.count;\n", "", GHM),
    ("slope of a positive keeps its sign", "csrc/ghm/ghm_classification_simd.h", "choose(fits, negate_where(masks.one, sigma * factor), FloatVec{})", "choose(fits, sigma * factor, FloatVec{})", GHM),
    ("a class sum is taken twice", "csrc/focal/focal_cpu.cpp", "end = task_begin(classes, tasks, task + 1);", "end = std::min(classes, task_begin(classes, tasks, task + 1) + 1);", "tests/test_focal_properties.py"),
    ("class sums of one part of a map alone", "csrc/focal/focal_cpu.cpp", "if (level_is_map(levels[i]) && part == (end - 1) / parts.class_parts) {", "if (level_is_map(levels[i])) {", FOCAL),
    ("left-over negatives vanish", "csrc/focal/focal_background_simd.h", "    any |= left_over[begin / 64] = block.negative[begin / 64] & ~taken;", "    left_over[begin / 64] = 0;", FOCAL),
    ("rounding of the modulated entropy is lost", "csrc/focal/focal_functions_simd.h", "return {high, sum * (high + part) + part};", "return {high, sum * high + part};", FOCAL),
    ("picked elements that fill no vector vanish", "csrc/focal/focal_sweeps_simd.h", "  if (count != 0) body(at, count);", "", FOCAL),
    ("elements that have no place keep the loss of one", "csrc/focal/focal_narrow_simd.h", "places[begin + __builtin_ctzll(bits)] = narrow.count;", "(void)bits;", NARROW),
    ("gradients that were flushed stay 0", "csrc/focal/focal_slopes_simd.h", "slope = choose(flushed, apart, slope);", "", NARROW),
    ("results below the normal range are flushed ever after", "csrc/common/flush_subnormals.h", "{ _mm_setcsr(before_); }", "{}", NARROW),
    ("losses left over by the table vanish", "csrc/focal/focal_narrow_simd.h", "left_over[word] = block.negative[word] & ~within;", "left_over[word] = 0;", NARROW),
    ("table of losses without what floats lose", "csrc/focal/focal_narrow_simd.h", "        add_doubles(sum, widen_floats(loss.low));\n", "", NARROW),
    ("16-bit logits are not kept for later stages", "csrc/focal/focal_background_simd.h", "      if (widens) store_floats(widened + i, z);\n", "", NARROW),
    ("slopes leave out a term", "csrc/focal/focal_slopes_simd.h", "for (int k = kSlopeDegree - 1; k >= 0; --k)", "for (int k = kSlopeDegree - 1; k >= 1; --k)", FOCAL),
    ("pieces of a late task vanish", "csrc/common/parallel.h", "        body(piece * piece_, std::min((piece + 1) * piece_, items_));", "        if (i == 0) body(piece * piece_, std::min((piece + 1) * piece_, items_));", "tests/test_work_shares.py"),
    ("class sums of negatives are not added", "csrc/focal/focal_simd.h", "return pull == 0.0 ? sum : sum + absolute(w) * (unscale * pull);", "return sum;", EQUALIZED),
    ("ties of two columns in a group", "csrc/group_softmax/group_softmax_simd.h", ": static_cast<double>(widen(row[start + 1 - skipped]));", ": static_cast<double>(widen(row[start + skipped]));", GROUPS),
    ("broken pairs give a number", "csrc/group_softmax/group_softmax_simd.h", "total += is_read ? weight * (is_sound ? terms.cross_entropy : nan) : zero;", "total += is_read && is_sound ? weight * terms.cross_entropy : zero;", GROUPS),
    ("compensation below the threshold", "csrc/seesaw/seesaw_simd.h", "q * (above > 0.0 ? above : zero)", "q * above", SEESAW),
    ("last logits of a row are not read", "csrc/seesaw/seesaw_simd.h", "i < count ? static_cast<double>(widen(p[i])) : -kDoubleInfinity;", "i + 1 < count ? static_cast<double>(widen(p[i])) : -kDoubleInfinity;", SEESAW),
    ("weight 0 of a NaN", "csrc/smooth_l1/smooth_l1_simd.h", "return weight == 0 ? Vec{} : weight * x;", "return weight * x;", SMOOTH_L1),
    ("far slopes have no sign", "csrc/smooth_l1/smooth_l1_simd.h", "(d < 0 ? zero - 1 : d)", "(d < 0 ? zero + 1 : d)", SMOOTH_L1),
]  # fmt: skip

CUDA = [
    ("carry between the halves of a sum lost", "csrc/ranking/ranking_bin_kernels.cu", "const uint32_t add_high = static_cast<uint32_t>(offset >> 32) + carry;", "const uint32_t add_high = static_cast<uint32_t>(offset >> 32);", RANKING),
    ("a plain addition in place of an atomic one", "csrc/ranking/ranking_bin_kernels.cu", "    atomicAdd(&shared_counts[replica + k], 1u);\n", "    if (replica == 0) atomicAdd(&shared_counts[replica + k], 1u);\n", RANKING),
    ("bins are read before they are whole", "csrc/ranking/ranking_bin_kernels.cu", "  add_to_bin(bins, locate_negatives<Element, kVector>(level, locator, fixed_point, add));\n  __syncthreads();\n", "  add_to_bin(bins, locate_negatives<Element, kVector>(level, locator, fixed_point, add));\n", "tests/test_cuda_on_cpu.py " + RANKING),
    ("replicas but the first forgotten", "csrc/ranking/ranking_bin_kernels.cu", "for (int r = 0; r < replicas; ++r) {", "for (int r = 0; r < 1; ++r) {", RANKING),
    ("lines are used before they are there", "csrc/ranking/ranking_backward_kernels.cu", "      table[k] = static_cast<T>(lines[k / count * 2 * capacity + k % count]);\n    }\n    __syncthreads();\n", "      table[k] = static_cast<T>(lines[k / count * 2 * capacity + k % count]);\n    }\n", "tests/test_cuda_on_cpu.py " + RANKING),
    ("value and slope swapped", "csrc/ranking/ranking_backward_kernels.cu", "{{}, table + kValue * count, table + kSlope * count}", "{{}, table + kSlope * count, table + kValue * count}", RANKING),
    ("positives of the last column keep nothing", "csrc/ranking/ranking_backward_kernels.cu", "column < used; column += grid_threads()", "column + 1 < used; column += grid_threads()", RANKING),
    ("a positive of equal quality is worse", "csrc/rank_sort/rank_sort_kernels.cu", "if (gap < 0) {", "if (gap <= 0) {", RANKING),
    ("equal qualities pull", "csrc/rank_sort/rank_sort_kernels.cu", "if (quality[i] > own_quality) pull", "if (quality[i] >= own_quality) pull", RANKING),
    ("carry of earlier tiles lost", "csrc/ap/ap_kernels.cu", "const double carry = block_minimum(before, scratch);", "const double carry = INFINITY;", AP),
    ("invalid elements add to the first bin", "csrc/ghm/ghm_kernels.cu", "    easy_count += __popc(valid);\n", "    easy_count += kQuad;\n", GHM),
    ("partials of a warp only", "csrc/ghm/ghm_kernels.cu", "block < blocks; block += kWarp) sum", "block < blocks; block += 2 * kWarp) sum", "tests/test_ghm_cuda_on_cpu.py"),
    ("rank among equal keys is not offset", "csrc/group_softmax/group_softmax_kernels.cu", "      equal_before += total;\n", "", "tests/test_group_softmax_cuda_on_cpu.py"),
    ("ties of the largest logit", "csrc/group_softmax/group_softmax_kernels.cu", "double rest = warp_sum(sum.value()) + (warp_sum(ties) - 1);", "double rest = warp_sum(sum.value());", GROUPS),
    ("constant of others forgotten", "csrc/group_softmax/group_softmax_kernels.cu", "  if (has_constant && lane == 0) add(0);\n", "", GROUPS),
]  # fmt: skip

TRITON = [
    ("NaN of negatives is not counted", f"{LOSSES}/ranking/triton_bin.py", "    tl.atomic_add(bins_ptr, nans.to(tl.int64), mask=nans > 0, sem=\"relaxed\")\n", "", RANKING),
    ("equal logits ordered by the index alone", f"{LOSSES}/ranking/triton_bin.py", "is_first = (other_quality < quality) | ((other_quality == quality) & (other_index < index))", "is_first = other_index < index", "tests/test_ranking_maps.py"),
    ("tail of the block adds", f"{LOSSES}/ranking/triton_bin.py", "wanted = is_negative & (value >= lowest)", "wanted = is_negative", RANKING),
    ("copies but the first forgotten", f"{LOSSES}/ranking/triton_bin.py", "    while copy < copies:\n        total", "    while copy < 1:\n        total", "tests/test_ranking_triton.py"),
    ("last breakpoint is never reached", f"{LOSSES}/ranking/triton_backward.py", "index = tl.where(is_negative & (index > 0), first_slot + index - 1, -1)", "index = tl.where(is_negative & (index > 1), first_slot + index - 2, -1)", RANKING),
    ("NaN gets a number", f"{LOSSES}/ranking/triton_lines.py", "gradient = tl.where(value == value, gradient * upstream, float(\"nan\"))", "gradient = gradient * upstream", RANKING),
    ("gradient of the first loss dropped", f"{LOSSES}/ranking/triton_backward.py", "other=0.0) * upstream_of(grad_first_ptr)", "other=0.0) * upstream_of(grad_second_ptr)", "tests/test_ranking_autograd.py tests/test_rank_sort.py"),
    ("invalid elements in the first bin", f"{LOSSES}/ghm/triton_impl.py", "bin_index = tl.where(is_valid, tl.where(is_nan, bins, bin_index), bins + 1)", "bin_index = tl.where(is_valid, tl.where(is_nan, bins, bin_index), 0)", GHM),
    ("empty bins weigh", f"{LOSSES}/ghm/triton_impl.py", "        num_bins = tl.sum(is_filled.to(tl.float64))\n", "        num_bins = tl.sum(is_bin.to(tl.float64))\n", GHM),
    ("one row too early", f"{LOSSES}/smooth_l1/triton_impl.py", "place = first_row + ((start - first_row * row).to(tl.int32) + lane) // row", "place = first_row + lane // row", SMOOTH_L1),
    ("programs leave out elements", f"{LOSSES}/smooth_l1/triton_impl.py", "        start += tl.num_programs(0).to(tl.int64) * BLOCK\n    tl.store(sums_ptr", "        start += (tl.num_programs(0) + 1).to(tl.int64) * BLOCK\n    tl.store(sums_ptr", SMOOTH_L1),
]  # fmt: skip

FAULTS = [
    Fault(backend, *fault)
    for backend, faults in (("reference", REFERENCE), ("cpp", CPP), ("cuda", CUDA), ("triton", TRITON))
    for fault in faults
]
