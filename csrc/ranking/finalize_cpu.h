// What the last operators of all ranking losses share on the CPU: from ranked positives and bins to windows and false
// positives, and from a loss's own terms to losses, gradient records and lines.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/new_tensor_cpu.h"
#include "ranking/ranking_checks.h"
#include "ranking/windows_cpu.h"

namespace rsloss {

// What a loss computes for its positives, [V] each, without the division by their number. Losses with one value leave `second`
// empty.
struct PositiveTerms {
  explicit PositiveTerms(int64_t count) : coefficient(count), first(count) {}

  std::vector<double> coefficient;  // share per unit of H that a negative takes of the first loss
  std::vector<double> first;        // gradient of the positive for the first loss
  std::vector<double> second;       // likewise for the second loss
};

class RankedPositives {
 public:
  // known: the windows of `ranked`, or none.
  RankedPositives(const char* op, const Tensors& logits, const Tensor& negatives, const Tensor& ranked, const Tensor& counts,
                  const Tensor& bins, const std::optional<Tensor>& segments, int64_t num_segments, double delta,
                  double gradient_scale, std::optional<Windows> known = std::nullopt)
      : num_segments_(num_segments), gradient_scale_(gradient_scale) {
    check_delta(op, delta);
    capacity_ = check_collected(op, logits, negatives, counts, segments, num_segments, "ranked", ranked, kRecordRows);
    const int64_t columns = 2 * capacity_ + 1;
    check_table(op, "bins", bins, logits[0], ScalarType::Long, 2, columns);
    records_ = static_cast<const double*>(ranked.const_data_ptr());
    is_double_ = logits[0].scalar_type() == ScalarType::Double;
    windows = known ? *std::move(known) : windows_of(records_, capacity_, num_segments, delta, is_double_);
    const int64_t* bin_counts = static_cast<const int64_t*>(bins.const_data_ptr());
    const int64_t* count = static_cast<const int64_t*>(counts.const_data_ptr());
    const double unit = fixed_point_unit(delta, fixed_point_bits(count[kElements], is_double_));
    false_positive = false_positives(windows, bin_counts, bin_counts + columns, unit);
    is_broken_ = count[kFound] > capacity_ || bin_counts[0] > 0;
    for (int64_t i = windows.count; i < capacity_; ++i) is_broken_ |= is_invalid(i);
  }

  int64_t count() const { return windows.count; }
  const double* quality() const { return records_ + kQuality * capacity_; }

  // The mean over segments of the means of their `error`, [V].
  Tensor loss(const std::vector<double>& error) const {
    double value = 0;
    for (const SegmentRange& range : windows.ranges) {
      double sum = 0;
      for (int64_t i = range.begin; i < range.end; ++i) sum += error[i];
      value += sum / static_cast<double>(range.size());
    }
    if (!windows.ranges.empty()) value /= static_cast<double>(windows.ranges.size());
    if (is_broken_) value = kNaN;
    Tensor result = new_cpu_tensor({}, is_double_ ? ScalarType::Double : ScalarType::Float);
    if (is_double_) *static_cast<double*>(result.mutable_data_ptr()) = value;
    else *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
    return result;
  }

  // [cap]: `value`, [V], and NaN for invalid positives, 0 for padding.
  Tensor statistics(const std::vector<double>& value) const {
    Tensor result = new_cpu_tensor({capacity_}, ScalarType::Double);
    fill_row(static_cast<double*>(result.mutable_data_ptr()), value);
    return result;
  }

  // Scales `terms` by 1 / (positives of the segment * segments) on the way.
  Tensor gradients(PositiveTerms& terms) const {
    for (const SegmentRange& range : windows.ranges) {
      const double scale = gradient_scale_ / static_cast<double>(range.size() * static_cast<int64_t>(windows.ranges.size()));
      for (int64_t i = range.begin; i < range.end; ++i) {
        terms.coefficient[i] *= scale;
        terms.first[i] *= scale;
        if (!terms.second.empty()) terms.second[i] *= scale;
      }
    }
    Tensor result = new_cpu_tensor({kGradientRows, capacity_}, ScalarType::Double);
    double* record = static_cast<double*>(result.mutable_data_ptr());
    std::copy_n(records_ + kIndex * capacity_, capacity_, record + kGradientIndex * capacity_);
    std::copy_n(records_ + kSegment * capacity_, windows.count, record + kGradientSegment * capacity_);
    std::fill_n(record + kGradientSegment * capacity_ + windows.count, capacity_ - windows.count,
                static_cast<double>(num_segments_));
    if (terms.second.empty()) terms.second.assign(terms.first.size(), 0);
    fill_row(record + kFirst * capacity_, terms.first);
    fill_row(record + kSecond * capacity_, terms.second);
    return result;
  }

  // After `gradients`, from the scaled coefficients.
  Tensor lines(const PositiveTerms& terms) const {
    Tensor result = new_cpu_tensor({kLineRows, 2 * capacity_}, ScalarType::Double);
    write_lines(windows, terms.coefficient.data(), static_cast<double*>(result.mutable_data_ptr()), 2 * capacity_);
    return result;
  }

  Windows windows;
  std::vector<double> false_positive;  // [V]

 private:
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

  bool is_invalid(int64_t slot) const { return records_[kIndex * capacity_ + slot] >= 0; }

  void fill_row(double* row, const std::vector<double>& value) const {
    std::copy(value.begin(), value.end(), row);
    for (int64_t i = windows.count; i < capacity_; ++i) row[i] = is_invalid(i) ? kNaN : 0;
  }

  const double* records_;  // [4, cap]
  int64_t capacity_;
  int64_t num_segments_;
  double gradient_scale_;
  bool is_double_;
  bool is_broken_;
};

}  // namespace rsloss
