// Collects the positives and the bit mask of the negatives on the CPU: one threaded pass over the targets.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "ranking/ranking.h"
#include "ranking/ranking_checks.h"
#include "ranking/ranking_forward.h"
#include "ranking/ranking_sweep.h"
#include "ranking/segments_cpu.h"

#define RSL_SIMD_BODY "ranking/ranking_scan_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kScanWords = 512;

// out[i] = tensor[index[i] / divisor], as double.
void gather_elements(const Tensor& tensor, const std::vector<int64_t>& index, int64_t divisor, int64_t count, double* out) {
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    const auto* data = static_cast<const decltype(tag)*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<double>(data[divisor == 1 ? index[i] : index[i] / divisor]);
  });
}

// What is found in a tensor, or in a task's share of it. A task collects it in a variable of its own and counts while the mask
// is in its cache: cache lines that go from thread to thread cost more than all the rest.
struct Found {
  std::vector<int64_t> positives;  // flat indices, ascending
  int64_t negatives = 0;
};

Found join(std::vector<Found>& shares) {
  Found all = std::move(shares[0]);
  for (size_t i = 1; i < shares.size(); ++i) {
    all.positives.insert(all.positives.end(), shares[i].positives.begin(), shares[i].positives.end());
    all.negatives += shares[i].negatives;
  }
  return all;
}

// Fills the mask of one tensor from dense targets.
Found scan_dense(const Tensor& targets, uint64_t* negatives) {
  const int64_t count = targets.numel(), words = mask_words(count);
  const int64_t tasks = task_count(words, kWordsPerTask);
  std::vector<Found> found(tasks);
  dispatch_floating(targets.scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    const In* data = static_cast<const In*>(targets.const_data_ptr());
    run_tasks(tasks, [&](int64_t task) {
      uint64_t positives[kScanWords];
      Found mine;
      const int64_t end = task_begin(words, tasks, task + 1);
      for (int64_t word = task_begin(words, tasks, task); word < end; word += kScanWords) {
        const int64_t block = std::min(kScanWords, end - word);
        RSL_ISA_CALL(scan_targets, data + word * 64, std::min(block * 64, count - word * 64), negatives + word, positives);
        for (int64_t i = 0; i < block; ++i)
          for (uint64_t bits = positives[i]; bits != 0; bits &= bits - 1)
            mine.positives.push_back((word + i) * 64 + __builtin_ctzll(bits));
        mine.negatives += RSL_ISA_CALL(count_bits, negatives + word, block);
      }
      found[task] = std::move(mine);
    });
  });
  return join(found);
}

void clear_bits(uint64_t* words, int64_t begin, int64_t end) {
  for (; begin < end && begin % 64 != 0; ++begin) words[begin / 64] &= ~(uint64_t{1} << begin % 64);
  for (; begin + 64 <= end; begin += 64) words[begin / 64] = 0;
  for (; begin < end; ++begin) words[begin / 64] &= ~(uint64_t{1} << begin % 64);
}

// The same from class indices. Tasks own multiples of 64 rows, so that no two touch the same word.
template <class Label>
Found scan_labels(const Label* labels, int64_t rows, int64_t classes, bool background_first, uint64_t* negatives) {
  const int64_t words = mask_words(rows * classes), groups = (rows + 63) / 64;
  std::memset(negatives, 0xff, words * 8);
  clear_bits(negatives, rows * classes, words * 64);
  const int64_t tasks = task_count(rows, 1 << 15);
  std::vector<Found> found(tasks);
  run_tasks(tasks, [&](int64_t task) {
    Found mine;
    const int64_t begin = 64 * task_begin(groups, tasks, task);
    const int64_t end = std::min(rows, 64 * task_begin(groups, tasks, task + 1));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t label = static_cast<int64_t>(labels[row]);
      if (label < 0) {
        clear_bits(negatives, row * classes, (row + 1) * classes);
        continue;
      }
      const int64_t column = background_first ? label - 1 : label;
      if (column >= 0 && column < classes) {
        const int64_t index = row * classes + column;
        negatives[index / 64] &= ~(uint64_t{1} << index % 64);
        mine.positives.push_back(index);
      }
    }
    mine.negatives = RSL_ISA_CALL(count_bits, negatives + begin * classes / 64, mask_words((end - begin) * classes));
    found[task] = std::move(mine);
  });
  return join(found);
}

// Takes what belongs to no segment out of the mask and of the positives of one tensor.
void drop_ignored(const SegmentMap& segments, size_t level, int64_t count, uint64_t* words, Found& found) {
  const int64_t tasks = task_count(mask_words(count), kWordsPerTask);
  run_tasks(tasks, [&](int64_t task) {
    const int64_t begin = 64 * task_begin(mask_words(count), tasks, task);
    const int64_t end = std::min(count, 64 * task_begin(mask_words(count), tasks, task + 1));
    segments.for_runs(level, begin, end, [&](int64_t segment, int64_t first, int64_t last) {
      if (segment == segments.num_segments()) clear_bits(words, first, last);
    });
  });
  const auto is_ignored = [&](int64_t index) {
    return segments.run_at(level, index, index + 1).segment == segments.num_segments();
  };
  std::vector<int64_t>& positives = found.positives;
  positives.erase(std::remove_if(positives.begin(), positives.end(), is_ignored), positives.end());
  found.negatives = RSL_ISA_CALL(count_bits, words, mask_words(count));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ranking_collect(Tensors logits, Tensors targets, Tensors quality,
                                                   std::optional<Tensor> segments, int64_t num_segments,
                                                   std::optional<int64_t> max_positives, bool background_first) {
  check_logits("ranking_collect", logits);
  check_collect_targets("ranking_collect", logits, targets, quality);
  check_segments("ranking_collect", logits, segments, num_segments);
  const SegmentMap map(logits, segments, num_segments);
  const bool ignores_elements = map.ignores_elements();
  STD_TORCH_CHECK(!max_positives || *max_positives >= 0, "ranking_collect: max_positives must be None or at least 0, got ",
                  max_positives.value_or(0));
  Tensor negatives = new_cpu_tensor({mask_bytes(logits)}, ScalarType::Byte);
  std::vector<Found> found;
  uint64_t* words = static_cast<uint64_t*>(negatives.mutable_data_ptr());
  int64_t found_count = 0, negative_count = 0;
  for (size_t level = 0; level < logits.size(); ++level) {
    const Tensor& target = targets[level];
    const int64_t count = logits[level].numel();
    if (count == 0) {
      found.emplace_back();
      continue;
    }
    if (!is_label(target.scalar_type())) {
      found.push_back(scan_dense(target, words));
    } else {
      const int64_t classes = logits[level].size(logits[level].dim() - 1), rows = count / classes;
      found.push_back(
          target.scalar_type() == ScalarType::Int
              ? scan_labels(static_cast<const int32_t*>(target.const_data_ptr()), rows, classes, background_first, words)
              : scan_labels(static_cast<const int64_t*>(target.const_data_ptr()), rows, classes, background_first, words));
    }
    if (ignores_elements) drop_ignored(map, level, count, words, found.back());
    words += mask_words(count);
    found_count += static_cast<int64_t>(found.back().positives.size());
    negative_count += found.back().negatives;
  }
  const int64_t capacity = max_positives.value_or(found_count);
  Tensor positives = new_cpu_tensor({kRecordRows, capacity}, ScalarType::Double);
  double* records = static_cast<double*>(positives.mutable_data_ptr());
  int64_t slot = 0, first_index = 0;
  for (size_t level = 0; level < logits.size(); ++level) {
    const std::vector<int64_t>& index = found[level].positives;
    const bool dense = !is_label(targets[level].scalar_type());
    const int64_t count = std::min<int64_t>(static_cast<int64_t>(index.size()), capacity - slot);
    double *logit = records + kLogit * capacity + slot, *value = records + kQuality * capacity + slot;
    gather_elements(logits[level], index, 1, count, logit);
    if (dense) gather_elements(targets[level], index, 1, count, value);
    else if (quality.empty()) std::fill(value, value + count, 1.0);
    else gather_elements(quality[level], index, logits[level].size(logits[level].dim() - 1), count, value);
    for (int64_t i = 0; i < count; ++i) {
      if (!std::isfinite(logit[i]) || !std::isfinite(value[i])) logit[i] = kNaN;
      records[kSegment * capacity + slot + i] =
          map.is_single() ? 0 : static_cast<double>(map.run_at(level, index[i], index[i] + 1).segment);
      records[kIndex * capacity + slot + i] = static_cast<double>(first_index + index[i]);
    }
    slot += count;
    first_index += logits[level].numel();
  }
  for (; slot < capacity; ++slot) {
    records[kLogit * capacity + slot] = kNaN;
    records[kQuality * capacity + slot] = 0;
    records[kSegment * capacity + slot] = 0;
    records[kIndex * capacity + slot] = -1;
  }
  Tensor counts = new_cpu_tensor({kCounts}, ScalarType::Long);
  int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  count[kFound] = found_count;
  count[kNegatives] = negative_count;
  count[kElements] = count_elements(logits);
  return {positives, negatives, counts};
}

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) { m.impl("ranking_collect.cpp", TORCH_BOX(&ranking_collect)); }

}  // namespace rsloss
