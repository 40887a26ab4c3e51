// Balanced group softmax on the CPU: sampling of others, one threaded pass over the rows for all groups' losses, one for the
// gradient, one for scores. Allocates the outputs, a few numbers per row and group for the sampling, and a chunk's tables per
// thread.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "group_softmax/group_softmax.h"
#include "group_softmax/group_softmax_checks.h"
#include "group_softmax/group_softmax_rows.h"

#define RSL_SIMD_BODY "group_softmax/group_softmax_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

using Numbers = std::vector<int64_t>;

// Labels, of which the address and the type are asked for once: asking costs more than reading.
class Labels {
 public:
  Labels(const GroupLayout& layout, const int* class_columns, const Tensor& labels)
      : layout_(layout),
        class_columns_(class_columns),
        data_(labels.const_data_ptr()),
        is_int_(labels.scalar_type() == ScalarType::Int),
        rows_(labels.size(0)) {}

  int64_t rows() const { return rows_; }
  int64_t operator[](int64_t row) const {
    return is_int_ ? static_cast<const int32_t*>(data_)[row] : static_cast<const int64_t*>(data_)[row];
  }
  bool is_ignored(int64_t row) const { return (*this)[row] < 0; }
  // -1 for a row that is ignored.
  int column(int64_t row) const {
    const int number = layout_.class_of((*this)[row]);
    return number < 0 ? -1 : class_columns_[number];
  }

 private:
  const GroupLayout& layout_;
  const int* class_columns_;
  const void* data_;
  bool is_int_;
  int64_t rows_;
};

const int* int_data(const Tensor& tensor) { return static_cast<const int*>(tensor.const_data_ptr()); }

ScalarType wide_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Logits of enough work to pay for waking a thread.
constexpr int64_t kLogitsPerTask = 16384;

// Calls body(first row, rows) for pieces of at most kChunkRows rows, on as many threads as it pays.
template <class Body>
void for_chunks(int64_t rows, int64_t columns, const Body& body) {
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  const int64_t tasks = task_count(chunks, std::max<int64_t>(1, kLogitsPerTask / (kChunkRows * columns)));
  share_items(chunks, tasks, [&](int64_t i) { body(i * kChunkRows, std::min<int64_t>(kChunkRows, rows - i * kChunkRows)); });
}

void fill_chunk(const GroupLayout& layout, const Labels& labels, const Tensor& weights, int64_t begin, int64_t count,
                GroupChunk& chunk) {
  bool is_used[kChunkRows];
  chunk.layout = &layout;
  chunk.rows = static_cast<int>(count);
  for (int64_t i = 0; i < count; ++i) {
    is_used[i] = !labels.is_ignored(begin + i);
    chunk.columns[i] = labels.column(begin + i);
  }
  dispatch_floating(weights.scalar_type(), [&](auto tag) {
    const auto* data = static_cast<const decltype(tag)*>(weights.const_data_ptr());
    for (int group = 0; group < layout.groups; ++group) {
      double* out = chunk.weights + group * kChunkRows;
      for (int64_t i = 0; i < kChunkRows; ++i)
        out[i] = i < count && is_used[i] ? static_cast<double>(widen(data[group * labels.rows() + begin + i])) : 0;
    }
  });
}

constexpr uint8_t kIgnoredRow = 255;  // above every group

// The group of each row's label.
std::vector<uint8_t> groups_of_rows(const GroupLayout& layout, const Labels& labels) {
  std::vector<uint8_t> of_rows(labels.rows());
  for (size_t row = 0; row < of_rows.size(); ++row) {
    const int64_t at = static_cast<int64_t>(row);
    of_rows[row] = labels.is_ignored(at) ? kIgnoredRow : static_cast<uint8_t>(layout.group_of(labels.column(at)));
  }
  return of_rows;
}

// Ascends with the key, NaN above all: for keys within [0, 1) all of about one size.
constexpr int kKeyParts = 256;
int part_of_key(float key) {
  const float scaled = key * kKeyParts;
  return scaled < 0 ? 0 : scaled < kKeyParts ? static_cast<int>(scaled) : kKeyParts - 1;
}

// The order of the key above the row's number: one comparison settles ties as well.
uint64_t rank_of_key(const float* keys, int64_t row) {
  uint32_t bits;
  std::memcpy(&bits, keys + row, sizeof bits);
  return static_cast<uint64_t>(order_of_key(keys[row], bits)) << 32 | static_cast<uint64_t>(row);
}

// Weights of one group of classes.
void sample_group(uint8_t group, const std::vector<uint8_t>& of_rows, const float* keys, double ratio, float* weights) {
  const int64_t rows = static_cast<int64_t>(of_rows.size());
  const auto is_other = [&](int64_t row) { return of_rows[row] != group && of_rows[row] != kIgnoredRow; };
  int64_t foreground = 0, others = 0;
  for (int64_t row = 0; row < rows; ++row) {
    weights[row] = of_rows[row] == group ? 1.0f : 0.0f;
    foreground += of_rows[row] == group ? 1 : 0;
    others += is_other(row) ? 1 : 0;
  }
  int64_t kept = kept_others(foreground, others, ratio);
  if (kept == 0) return;
  if (kept == others) {
    for (int64_t row = 0; row < rows; ++row) weights[row] = of_rows[row] != kIgnoredRow ? 1.0f : 0.0f;
    return;
  }
  // All of the lower parts are kept, and the lowest of the part that holds the last.
  int64_t counts[kKeyParts] = {};
  for (int64_t row = 0; row < rows; ++row) counts[part_of_key(keys[row])] += is_other(row) ? 1 : 0;
  int last = 0;
  while (counts[last] < kept) kept -= counts[last++];
  std::vector<uint64_t> ranks;
  ranks.reserve(counts[last]);
  for (int64_t row = 0; row < rows; ++row) {
    if (!is_other(row)) continue;
    const int part = part_of_key(keys[row]);
    if (part < last) weights[row] = 1;
    if (part == last) ranks.push_back(rank_of_key(keys, row));
  }
  std::nth_element(ranks.begin(), ranks.begin() + (kept - 1), ranks.end());
  for (int64_t i = 0; i < kept; ++i) weights[ranks[i] & 0xffffffffu] = 1;
}

Tensor group_softmax_sample(Tensor labels, Tensor class_columns, std::optional<Tensor> keys, Numbers starts, Numbers others,
                            int64_t background_group, bool background_first, double others_ratio) {
  const char* op = "group_softmax_sample";
  check_defined(op, "labels", labels);
  const GroupLayout layout =
      read_groups_with_background(op, class_columns, labels, starts, others, background_group, background_first);
  check_group_sampling(op, labels, keys, layout.groups, others_ratio);
  const int64_t rows = labels.size(0), groups = layout.groups;
  const std::vector<uint8_t> of_rows = groups_of_rows(layout, Labels(layout, int_data(class_columns), labels));
  Tensor weights = new_cpu_tensor({groups, rows}, ScalarType::Float);
  float* data = static_cast<float*>(weights.mutable_data_ptr());
  const float* key_data = keys ? static_cast<const float*>(keys->const_data_ptr()) : nullptr;
  const int64_t tasks = rows * groups < 8192 ? 1 : task_count(groups, 1);
  run_tasks(tasks, [&](int64_t task) {
    for (int64_t group = task_begin(groups, tasks, task); group < task_begin(groups, tasks, task + 1); ++group) {
      float* out = data + group * rows;
      if (group != background_group)
        sample_group(static_cast<uint8_t>(group), of_rows, key_data ? key_data + group * rows : nullptr, others_ratio, out);
      else
        for (int64_t row = 0; row < rows; ++row) out[row] = of_rows[row] != kIgnoredRow ? 1.0f : 0.0f;
    }
  });
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> group_softmax_forward(Tensor logits, Tensor labels, Tensor class_columns, Tensor weights,
                                                         Numbers starts, Numbers others, bool background_first) {
  const GroupLayout layout =
      check_group_rows("group_softmax_forward", logits, labels, class_columns, weights, starts, others, background_first);
  const int64_t rows = logits.size(0), groups = layout.groups;
  Tensor losses = new_cpu_tensor({groups}, wide_type(logits));
  Tensor averages = new_cpu_tensor({groups}, ScalarType::Double);
  Tensor row_tables = new_cpu_tensor({kRowTables, groups, rows}, wide_type(logits));
  const Labels row_labels(layout, int_data(class_columns), labels);
  // Loss and weight of each group by chunk.
  std::vector<double> parts((rows + kChunkRows - 1) / kChunkRows * 2 * groups);
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    using Wide = Arithmetic<In>;
    Wide* tables = static_cast<Wide*>(row_tables.mutable_data_ptr());
    for_chunks(rows, layout.columns(), [&](int64_t begin, int64_t count) {
      GroupChunk chunk;
      GroupChunkResult result;
      fill_chunk(layout, row_labels, weights, begin, count, chunk);
      const In* data = static_cast<const In*>(logits.const_data_ptr()) + begin * layout.columns();
      RSL_ISA_CALL(forward_chunk, chunk, data, result);
      double* part = parts.data() + begin / kChunkRows * 2 * groups;
      for (int64_t group = 0; group < groups; ++group) {
        part[group] = result.loss[group];
        for (int64_t i = 0; i < count; ++i) part[groups + group] += chunk.weights[group * kChunkRows + i];
        for (int64_t table = 0; table < kRowTables; ++table)
          for (int64_t i = 0; i < count; ++i)
            tables[(table * groups + group) * rows + begin + i] =
                static_cast<Wide>(result.tables[table][group * kChunkRows + i]);
      }
    });
  });
  double* average = static_cast<double*>(averages.mutable_data_ptr());
  for (int64_t group = 0; group < groups; ++group) {
    double loss = 0, weight = 0;
    for (size_t i = 0; i < parts.size(); i += 2 * groups) {
      loss += parts[i + group];
      weight += parts[i + groups + group];
    }
    average[group] = average_factor(weight);
    if (wide_type(logits) == ScalarType::Double) static_cast<double*>(losses.mutable_data_ptr())[group] = loss / average[group];
    else static_cast<float*>(losses.mutable_data_ptr())[group] = static_cast<float>(loss / average[group]);
  }
  return {losses, averages, row_tables};
}

Tensor group_softmax_backward(Tensor logits, Tensor labels, Tensor class_columns, Tensor weights, Tensor averages,
                              Tensor row_tables, Tensor grad_losses, Numbers starts, Numbers others, bool background_first) {
  const char* op = "group_softmax_backward";
  const GroupLayout layout = check_group_rows(op, logits, labels, class_columns, weights, starts, others, background_first);
  check_group_backward(op, averages, row_tables, grad_losses, logits, layout.groups);
  const int64_t rows = logits.size(0);
  double factors[kMostGroups];
  dispatch_floating(grad_losses.scalar_type(), [&](auto tag) {
    const auto* upstream = static_cast<const decltype(tag)*>(grad_losses.const_data_ptr());
    for (int group = 0; group < layout.groups; ++group)
      factors[group] =
          static_cast<double>(widen(upstream[group])) / static_cast<const double*>(averages.const_data_ptr())[group];
  });
  const Labels row_labels(layout, int_data(class_columns), labels);
  Tensor gradient = new_cpu_tensor_like(logits);
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    for_chunks(rows, layout.columns(), [&](int64_t begin, int64_t count) {
      GroupChunk chunk;
      fill_chunk(layout, row_labels, weights, begin, count, chunk);
      const int64_t first = begin * layout.columns();
      const In* data = static_cast<const In*>(logits.const_data_ptr()) + first;
      const auto* tables = static_cast<const Arithmetic<In>*>(row_tables.const_data_ptr()) + begin;
      In* out = static_cast<In*>(gradient.mutable_data_ptr()) + first;
      RSL_ISA_CALL(backward_chunk, chunk, factors, data, tables, rows, out);
    });
  });
  return gradient;
}

Tensor group_softmax_scores(Tensor logits, Tensor class_columns, Numbers starts, Numbers others, int64_t background_group,
                            bool background_first) {
  const char* op = "group_softmax_scores";
  check_defined(op, "logits", logits);
  const GroupLayout layout =
      read_groups_with_background(op, class_columns, logits, starts, others, background_group, background_first);
  check_group_logits(op, logits, layout.columns());
  const int64_t rows = logits.size(0), size = layout.classes + 1;
  Tensor scores = new_cpu_tensor({rows, size}, logits.scalar_type());
  dispatch_floating(logits.scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    for_chunks(rows, layout.columns(), [&](int64_t begin, int64_t count) {
      std::vector<Arithmetic<In>> probabilities(layout.columns());
      const In* data = static_cast<const In*>(logits.const_data_ptr()) + begin * layout.columns();
      In* out = static_cast<In*>(scores.mutable_data_ptr()) + begin * size;
      RSL_ISA_CALL(score_rows, layout, int_data(class_columns), data, count, probabilities.data(), out);
    });
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("group_softmax_sample.cpp", TORCH_BOX(&group_softmax_sample));
  m.impl("group_softmax_forward.cpp", TORCH_BOX(&group_softmax_forward));
  m.impl("group_softmax_backward.cpp", TORCH_BOX(&group_softmax_backward));
  m.impl("group_softmax_scores.cpp", TORCH_BOX(&group_softmax_scores));
}

}  // namespace rsloss
