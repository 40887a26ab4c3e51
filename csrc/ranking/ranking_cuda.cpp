// Torch glue of the shared ranking operators on CUDA: checks, allocation, device and stream. The kernels are in
// ranking_*_kernels.cu.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda_glue.h"
#include "ranking/ranking.h"
#include "ranking/ranking_checks.h"
#include "ranking/ranking_forward.h"
#include "ranking/ranking_kernels.cuh"

namespace rsloss {
namespace {

// Of a tensor of the list whose element 0 has the flat index `first_index`. Checked by check_segments.
SegmentMap segment_map(const Tensors& logits, const Tensor& level, int64_t first_index, const std::optional<Tensor>& segments,
                       int64_t num_segments) {
  const int32_t count = static_cast<int32_t>(num_segments);
  if (!segments) return {nullptr, false, count, 0, level.numel() / num_segments};
  const int32_t* const ids = input<int32_t>(*segments);
  if (segments->size(1) != 1) return {ids, true, count, 0, segments->size(1)};
  return {ids, false, count, first_index, count_elements(logits) / std::max<int64_t>(1, segments->size(0))};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ranking_collect(Tensors logits, Tensors targets, Tensors quality,
                                                   std::optional<Tensor> segments, int64_t num_segments,
                                                   std::optional<int64_t> max_positives, bool maps, bool background_first) {
  const char* op = "ranking_collect";
  check_logits(op, logits);
  check_collect_targets(op, logits, targets, quality, maps);
  check_segments(op, logits, segments, num_segments);
  const CurrentStream stream(logits[0]);
  Tensor negatives = torch::stable::new_empty(logits[0], {mask_bytes(logits)}, ScalarType::Byte);
  Tensor counts = torch::stable::new_empty(logits[0], {kCounts}, ScalarType::Long);

  std::vector<CollectLevel> levels;
  uint64_t* words = output<uint64_t>(negatives);
  int64_t first_index = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    CollectLevel level = {};
    level.logits = logits[i].const_data_ptr();
    level.logits_type = type_of(logits[i]);
    level.targets = targets[i].const_data_ptr();
    level.targets_type = type_of(targets[i]);
    level.quality = quality.empty() ? nullptr : quality[i].const_data_ptr();
    level.quality_type = quality.empty() ? Type::kFloat : type_of(quality[i]);
    level.negatives = words;
    level.elements = logits[i].numel();
    level.shape = is_label(targets[i].scalar_type()) ? index_shape(logits[i], targets[i], maps) : IndexShape{1, 1};
    level.first_index = first_index;
    level.segments = segment_map(logits, logits[i], first_index, segments, num_segments);
    levels.push_back(level);
    words += mask_words(level.elements);
    first_index += level.elements;
  }
  const int num_levels = static_cast<int>(levels.size());
  int64_t bytes = 0;
  check_cuda(op, collect_workspace_bytes(levels.data(), num_levels, &bytes));
  Tensor workspace = new_workspace(logits[0], bytes);
  const auto collect_into = [&](int64_t capacity) {
    Tensor positives = torch::stable::new_empty(logits[0], {kRecordRows, capacity}, ScalarType::Double);
    check_cuda(op, launch_ranking_collect(levels.data(), num_levels, background_first, capacity, output<double>(positives),
                                          output<int64_t>(counts), output<void>(workspace), stream));
    return positives;
  };
#ifdef RSL_CUDA_EMULATOR
  // The emulated kernels run on CPU tensors, for which None means as many as there are; nothing keeps the host from looking.
  if (!max_positives) {
    collect_into(0);
    max_positives = input<int64_t>(counts)[kFound];
  }
#endif
  // A GPU cannot size its outputs by what it finds, so the caller must name a capacity.
  STD_TORCH_CHECK(max_positives.has_value(), op, ": max_positives must be an int on CUDA, got None");
  STD_TORCH_CHECK(*max_positives >= 0 && *max_positives < (int64_t{1} << 29), op,
                  ": max_positives must be within [0, 2^29), got ", *max_positives);
  Tensor positives = collect_into(*max_positives);
  return {positives, negatives, counts};
}

std::tuple<Tensor, Tensor> ranking_bin(Tensors logits, Tensor negatives, Tensor positives, Tensor counts,
                                       std::optional<Tensor> segments, int64_t num_segments, double delta) {
  const char* op = "ranking_bin";
  check_delta(op, delta);
  const int64_t capacity =
      check_collected(op, logits, negatives, counts, segments, num_segments, "positives", positives, kRecordRows);

  const CurrentStream stream(logits[0]);
  Tensor ranked = torch::stable::empty_like(positives);
  Tensor bins = torch::stable::new_empty(logits[0], {2, 2 * capacity + 1}, ScalarType::Long);
  const Type type = type_of(logits[0]);
  const int32_t segment_count = static_cast<int32_t>(num_segments);
  Tensor workspace = new_workspace(logits[0], bin_workspace_bytes(type, capacity, segment_count));

  std::vector<LogitsLevel> levels;
  const uint8_t* mask = input<uint8_t>(negatives);
  int64_t first_index = 0;
  for (const Tensor& level : logits) {
    levels.push_back(
        {level.const_data_ptr(), mask, level.numel(), segment_map(logits, level, first_index, segments, num_segments)});
    mask += 8 * mask_words(level.numel());
    first_index += level.numel();
  }
  check_cuda(op, launch_ranking_bin(levels.data(), static_cast<int>(levels.size()), type, input<double>(positives),
                                    input<int64_t>(counts), capacity, segment_count, delta, output<double>(ranked),
                                    output<int64_t>(bins), output<void>(workspace), stream));
  return {ranked, bins};
}

namespace {

const void* upstream(const char* op, const char* name, const std::optional<Tensor>& gradient, const Tensor& logits) {
  if (!gradient) return nullptr;
  STD_TORCH_CHECK(same_device(*gradient, logits), op, ": ", name, " must be on the device of logits, ", device_of(logits),
                  ", got ", device_of(*gradient));
  STD_TORCH_CHECK(gradient->dim() == 0 && gradient->scalar_type() == loss_type(logits), op, ": ", name,
                  " must be 0-d, in the dtype of the losses (float64 for float64 logits, else float32), got shape ",
                  shape_of(*gradient));
  return gradient->const_data_ptr();
}

Tensors ranking_backward(Tensors logits, Tensor negatives, Tensor gradients, Tensor lines, Tensor counts,
                         std::optional<Tensor> segments, int64_t num_segments, std::optional<Tensor> grad_first,
                         std::optional<Tensor> grad_second) {
  const char* op = "ranking_backward";
  const int64_t capacity =
      check_collected(op, logits, negatives, counts, segments, num_segments, "gradients", gradients, kGradientRows);
  check_table(op, "lines", lines, logits[0], ScalarType::Double, kLineRows, 2 * capacity);
  const void* const first = upstream(op, "grad_first", grad_first, logits[0]);
  const void* const second = upstream(op, "grad_second", grad_second, logits[0]);

  const CurrentStream stream(logits[0]);
  Tensors results;
  std::vector<BackwardLevel> levels;
  const uint8_t* mask = input<uint8_t>(negatives);
  int64_t first_index = 0;
  for (const Tensor& level : logits) {
    results.push_back(torch::stable::empty_like(level));
    levels.push_back({level.const_data_ptr(), mask, output<void>(results.back()), level.numel(), first_index,
                      segment_map(logits, level, first_index, segments, num_segments)});
    mask += 8 * mask_words(level.numel());
    first_index += level.numel();
  }
  const int32_t segment_count = static_cast<int32_t>(num_segments);
  Tensor workspace = new_workspace(logits[0], backward_workspace_bytes(type_of(logits[0]), segment_count));
  check_cuda(op, launch_ranking_backward(levels.data(), static_cast<int>(levels.size()), type_of(logits[0]),
                                         input<double>(gradients), input<double>(lines), input<int64_t>(counts), capacity,
                                         segment_count, first, second, output<void>(workspace), stream));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) {
  m.impl("ranking_collect.cuda", TORCH_BOX(&ranking_collect));
  m.impl("ranking_bin.cuda", TORCH_BOX(&ranking_bin));
  m.impl("ranking_backward.cuda", TORCH_BOX(&ranking_backward));
}

}  // namespace rsloss

bool rsloss_set_launch_options(bool is_programmatic, int blocks_per_processor, int most_replicas) {
  if (blocks_per_processor < 1 || blocks_per_processor > 2 || most_replicas < 1 || most_replicas > 32) return false;
  rsloss::launch_options = {is_programmatic, blocks_per_processor, most_replicas};
  return true;
}
