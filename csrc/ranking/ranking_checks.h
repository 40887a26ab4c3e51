// Checks of the arguments of the ranking operators, for the CPU and the CUDA glue alike.
#pragma once

#include <limits>

#include "common/checks.h"
#include "ranking/ranking.h"

namespace rsloss {

inline bool is_label(ScalarType type) { return type == ScalarType::Int || type == ScalarType::Long; }

// Checked by check_collect_targets.
inline IndexShape index_shape(const Tensor& logits, const Tensor& labels, bool maps) {
  if (!maps) return {logits.size(logits.dim() - 1), 1};
  int64_t places = 1;
  for (int64_t d = 2; d < logits.dim(); ++d) places *= logits.size(d);
  return {labels.size(1) > 0 ? logits.size(1) / labels.size(1) : 0, places};
}

// Class indices have the shape of the logits without the last dimension, [B, A, *spatial] with maps [B, A C, *spatial]; dense
// targets have the whole shape.
inline void check_target_shape(const char* op, const Tensor& logits, const Tensor& targets, bool maps) {
  const bool has_labels = is_label(targets.scalar_type()), is_map = has_labels && maps;
  const int64_t dims = logits.dim() - (has_labels && !maps ? 1 : 0);
  bool matches = targets.dim() == dims && (!is_map || dims >= 2);
  for (int64_t d = 0; matches && d < dims; ++d) {
    const int64_t wanted = logits.size(d), got = targets.size(d);
    matches = is_map && d == 1 ? (got == 0 ? wanted == 0 : wanted % got == 0) : got == wanted;
  }
  STD_TORCH_CHECK(matches, op, ": targets must have the shape of logits, ", shape_of(logits),
                  !has_labels ? ", got "
                  : is_map    ? ", [B, A C, *spatial], less C, got "
                              : ", less its last dimension, got ",
                  shape_of(targets));
}

inline void check_collect_targets(const char* op, const Tensors& logits, const Tensors& targets, const Tensors& quality,
                                  bool maps) {
  STD_TORCH_CHECK(targets.size() == logits.size(), op, ": targets must hold as many tensors as logits, ", logits.size(),
                  ", got ", targets.size());
  STD_TORCH_CHECK(quality.empty() || quality.size() == logits.size(), op,
                  ": quality must be empty or hold as many tensors as logits, ", logits.size(), ", got ", quality.size());
  for (size_t level = 0; level < logits.size(); ++level) {
    check_placement(op, "targets", targets[level], logits[0]);
    const ScalarType type = targets[level].scalar_type();
    STD_TORCH_CHECK(is_floating(type) || is_label(type), op, ": targets must be int32, int64 or floating, got ",
                    toString(type));
    check_target_shape(op, logits[level], targets[level], maps);
    if (quality.empty()) continue;
    check_placement(op, "quality", quality[level], logits[0]);
    STD_TORCH_CHECK(is_label(type), op, ": quality must be empty with dense targets, got a tensor");
    STD_TORCH_CHECK(is_floating(quality[level].scalar_type()), op, ": quality must have a floating dtype, got ",
                    toString(quality[level].scalar_type()));
    STD_TORCH_CHECK(shape_of(quality[level]) == shape_of(targets[level]), op, ": quality must have the shape of targets, ",
                    shape_of(targets[level]), ", got ", shape_of(quality[level]));
  }
}

// None: every tensor is cut into equal chunks. Else ids [rows, 1], every row with as many elements, or [1, columns], every
// tensor with whole rows.
inline void check_segments(const char* op, const Tensors& logits, const std::optional<Tensor>& segments, int64_t num_segments) {
  STD_TORCH_CHECK(num_segments >= 1 && num_segments < std::numeric_limits<int32_t>::max(), op,
                  ": num_segments must be within [1, 2^31 - 1), got ", num_segments);
  if (!segments) {
    for (const Tensor& level : logits) {
      STD_TORCH_CHECK(level.numel() % num_segments == 0, op,
                      ": num_segments must divide the elements of every tensor of logits, ", level.numel(), ", got ",
                      num_segments);
    }
    return;
  }
  check_placement(op, "segments", *segments, logits[0]);
  check_dtype(op, "segments", *segments, ScalarType::Int);
  STD_TORCH_CHECK(segments->dim() == 2 && (segments->size(0) == 1 || segments->size(1) == 1), op,
                  ": segments must have shape [rows, 1] or [1, columns], got ", shape_of(*segments));
  const int64_t pieces = segments->numel();
  const auto is_whole = [=](int64_t elements) { return pieces == 0 ? elements == 0 : elements % pieces == 0; };
  bool cuts = true;
  if (segments->size(1) == 1) {
    cuts = is_whole(count_elements(logits));
  } else {
    for (const Tensor& level : logits) cuts = cuts && is_whole(level.numel());
  }
  STD_TORCH_CHECK(cuts, op, ": segments must cut logits of ", count_elements(logits), " elements into whole rows, got shape ",
                  shape_of(*segments));
}

// Slots are numbered in 32 bits, three to a positive.
constexpr int64_t kMostPositives = int64_t{1} << 29;

// What every operator behind `ranking_collect` gets; returns the capacity, the columns of `table`.
inline int64_t check_collected(const char* op, const Tensors& logits, const Tensor& negatives, const Tensor& counts,
                               const std::optional<Tensor>& segments, int64_t num_segments, const char* name,
                               const Tensor& table, int64_t rows) {
  check_logits(op, logits);
  check_segments(op, logits, segments, num_segments);
  check_vector(op, "negatives", negatives, logits[0], ScalarType::Byte, mask_bytes(logits));
  check_vector(op, "counts", counts, logits[0], ScalarType::Long, kCounts);
  check_table(op, name, table, logits[0], ScalarType::Double, rows, -1);
  STD_TORCH_CHECK(table.size(1) < kMostPositives, op, ": ", name, " must have fewer than 2^29 columns, got ", table.size(1));
  return table.size(1);
}

}  // namespace rsloss
