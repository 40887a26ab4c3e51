// Collects the positives and the bit mask of the negatives on the CPU: one threaded pass over the targets.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
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

// The elements of a floating tensor, as double.
class Elements {
 public:
  explicit Elements(const Tensor& tensor)
      : type_(tensor.scalar_type()), size_(static_cast<int64_t>(tensor.element_size())), data_(tensor.const_data_ptr()) {}

  void prefetch(int64_t i) const { __builtin_prefetch(static_cast<const char*>(data_) + i * size_); }

  double operator[](int64_t i) const {
    double value = 0;
    dispatch_floating(type_, [&](auto tag) { value = static_cast<double>(static_cast<const decltype(tag)*>(data_)[i]); });
    return value;
  }

 private:
  ScalarType type_;
  int64_t size_;
  const void* data_;
};

struct Positive {
  int64_t index;  // flat, in its tensor
  double logit;
  double quality;
};

// What is found in a tensor, or in a task's share of it. A task collects it in a variable of its own, and reads and counts
// while all is in its cache: cache lines that go from thread to thread cost more than all the rest.
struct Found {
  std::vector<Positive> positives;  // ascending by index
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
Found scan_dense(const Tensor& targets, const Tensor& logits, uint64_t* negatives) {
  const int64_t count = targets.numel(), words = mask_words(count);
  const int64_t tasks = task_count(words, kWordsPerTask);
  std::vector<Found> found(tasks);
  dispatch_floating(targets.scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    const In* data = static_cast<const In*>(targets.const_data_ptr());
    const Elements logit(logits);
    run_tasks(tasks, [&](int64_t task) {
      uint64_t positives[kScanWords];
      Found mine;
      const int64_t end = task_begin(words, tasks, task + 1);
      for (int64_t word = task_begin(words, tasks, task); word < end; word += kScanWords) {
        const int64_t block = std::min(kScanWords, end - word);
        RSL_ISA_CALL(scan_targets, data + word * 64, std::min(block * 64, count - word * 64), negatives + word, positives);
        const size_t before = mine.positives.size();
        for (int64_t i = 0; i < block; ++i) {
          for (uint64_t bits = positives[i]; bits != 0; bits &= bits - 1) {
            const int64_t index = (word + i) * 64 + __builtin_ctzll(bits);
            logit.prefetch(index);
            mine.positives.push_back({index, 0, static_cast<double>(data[index])});
          }
        }
        for (size_t i = before; i < mine.positives.size(); ++i) mine.positives[i].logit = logit[mine.positives[i].index];
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
Found scan_labels(const Label* labels, int64_t rows, int64_t classes, bool background_first, const Tensor& logits,
                  uint64_t* negatives) {
  const int64_t words = mask_words(rows * classes), groups = (rows + 63) / 64;
  std::memset(negatives, 0xff, words * 8);
  clear_bits(negatives, rows * classes, words * 64);
  const int64_t tasks = task_count(rows, 1 << 15);
  const Elements logit(logits);
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
        mine.positives.push_back({index, logit[index], 1});
      }
    }
    mine.negatives = RSL_ISA_CALL(count_bits, negatives + begin * classes / 64, mask_words((end - begin) * classes));
    found[task] = std::move(mine);
  });
  return join(found);
}

uint64_t lowest_bits(int64_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

// Bits of the rows of a map for its elements [outer, classes, places], from the element `first` on.
class RowBits {
 public:
  // bits: [words of outer * places, one more]
  RowBits(const uint64_t* bits, IndexShape shape, int64_t first)
      : bits_(bits),
        shape_(shape),
        place_(first % shape.places),
        column_(first / shape.places % shape.classes),
        row_(first / (shape.places * shape.classes) * shape.places) {}

  // Those of the next `count` elements, at most 64.
  uint64_t next(int64_t count) {
    uint64_t bits = 0;
    for (int64_t done = 0; done < count;) {
      const int64_t run = std::min(count - done, shape_.places - place_), at = row_ + place_;
      uint64_t found = bits_[at / 64] >> at % 64;
      if (at % 64 + run > 64) found |= bits_[at / 64 + 1] << (64 - at % 64);
      bits |= (found & lowest_bits(run)) << done;
      done += run;
      place_ += run;
      if (place_ < shape_.places) break;
      place_ = 0;
      if (++column_ < shape_.classes) continue;
      column_ = 0;
      row_ += shape_.places;
    }
    return bits;
  }

 private:
  const uint64_t* bits_;
  IndexShape shape_;
  int64_t place_;
  int64_t column_;
  int64_t row_;  // of the first place
};

// The same of a map: two passes. The first reads every label once, not once per class, clears the bits of the positives and
// keeps a bit per row; the second finds what was cleared, in the order of the elements, and clears ignored rows plane by plane.
template <class Label>
Found scan_map(const Label* labels, int64_t rows, IndexShape shape, bool background_first, const Tensor& logits,
               uint64_t* negatives) {
  const int64_t count = rows * shape.classes, words = mask_words(count), row_words = mask_words(rows);
  const int64_t tasks = task_count(words, kWordsPerTask), label_tasks = std::min(tasks, row_words);
  const Label first = background_first ? 1 : 0;
  const Label last = static_cast<Label>(std::min<int64_t>(shape.classes - 1, std::numeric_limits<Label>::max()));
  run_tasks(tasks, [&](int64_t task) {
    const int64_t begin = task_begin(words, tasks, task);
    std::memset(negatives + begin, 0xff, (task_begin(words, tasks, task + 1) - begin) * 8);
  });
  std::unique_ptr<uint64_t[]> kept(new uint64_t[row_words + 1]);
  std::vector<int64_t> kept_count(label_tasks);
  run_tasks(label_tasks, [&](int64_t task) {
    uint64_t foreground[kScanWords];
    const int64_t begin = task_begin(row_words, label_tasks, task), end = task_begin(row_words, label_tasks, task + 1);
    for (int64_t word = begin; word < end; word += kScanWords) {
      const int64_t block = std::min(kScanWords, end - word), size = std::min(block * 64, rows - word * 64);
      RSL_ISA_CALL(scan_label_words, labels + word * 64, size, first, last, &kept[word], foreground);
      for (int64_t i = 0; i < block; ++i) {
        for (uint64_t bits = foreground[i]; bits != 0; bits &= bits - 1) {
          const int64_t row = (word + i) * 64 + __builtin_ctzll(bits),
                        plane = row / shape.places * shape.classes + labels[row] - first;
          const int64_t index = plane * shape.places + row % shape.places;
          __atomic_fetch_and(&negatives[index / 64], ~(uint64_t{1} << index % 64), __ATOMIC_RELAXED);
        }
      }
    }
    kept_count[task] = RSL_ISA_CALL(count_bits, &kept[begin], end - begin);
  });
  kept[row_words] = 0;
  const bool has_ignored = std::accumulate(kept_count.begin(), kept_count.end(), int64_t{0}) != rows;
  const Elements logit(logits);
  std::vector<Found> found(tasks);
  run_tasks(tasks, [&](int64_t task) {
    Found mine;
    const int64_t begin = task_begin(words, tasks, task), end = task_begin(words, tasks, task + 1);
    for (int64_t word = begin; word < end; ++word) {
      for (uint64_t bits = ~negatives[word]; bits != 0; bits &= bits - 1) {
        const int64_t index = 64 * word + __builtin_ctzll(bits);
        mine.positives.push_back({index, logit[index], 1});
      }
    }
    if (has_ignored) {
      RowBits rows_kept(kept.get(), shape, 64 * begin);
      for (int64_t word = begin; word < end; ++word)
        negatives[word] &= rows_kept.next(std::min<int64_t>(64, count - 64 * word));
    }
    if (end == words) clear_bits(negatives, count, words * 64);
    mine.negatives = RSL_ISA_CALL(count_bits, negatives + begin, end - begin);
    found[task] = std::move(mine);
  });
  return join(found);
}

template <class Label>
Found scan_index(const Label* labels, int64_t rows, IndexShape shape, bool background_first, const Tensor& logits,
                 uint64_t* negatives) {
  if (shape.places == 1) return scan_labels(labels, rows, shape.classes, background_first, logits, negatives);
  return scan_map(labels, rows, shape, background_first, logits, negatives);
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
  const auto is_ignored = [&](const Positive& positive) {
    return segments.run_at(level, positive.index, positive.index + 1).segment == segments.num_segments();
  };
  std::vector<Positive>& positives = found.positives;
  positives.erase(std::remove_if(positives.begin(), positives.end(), is_ignored), positives.end());
  found.negatives = RSL_ISA_CALL(count_bits, words, mask_words(count));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ranking_collect(Tensors logits, Tensors targets, Tensors quality,
                                                   std::optional<Tensor> segments, int64_t num_segments,
                                                   std::optional<int64_t> max_positives, bool maps, bool background_first) {
  check_logits("ranking_collect", logits);
  check_collect_targets("ranking_collect", logits, targets, quality, maps);
  check_segments("ranking_collect", logits, segments, num_segments);
  const SegmentMap map(logits, segments, num_segments);
  const bool ignores_elements = map.ignores_elements();
  STD_TORCH_CHECK(!max_positives || (*max_positives >= 0 && *max_positives < kMostPositives),
                  "ranking_collect: max_positives must be None or at least 0 and below 2^29, got ", max_positives.value_or(0));
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
      found.push_back(scan_dense(target, logits[level], words));
    } else {
      const IndexShape shape = index_shape(logits[level], target, maps);
      const int64_t rows = target.numel();
      found.push_back(target.scalar_type() == ScalarType::Int
                          ? scan_index(static_cast<const int32_t*>(target.const_data_ptr()), rows, shape, background_first,
                                       logits[level], words)
                          : scan_index(static_cast<const int64_t*>(target.const_data_ptr()), rows, shape, background_first,
                                       logits[level], words));
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
    std::vector<Positive>& positive_of = found[level].positives;
    if (!quality.empty()) {
      const IndexShape shape = index_shape(logits[level], targets[level], maps);
      const Elements of_row(quality[level]);
      for (Positive& positive : positive_of) positive.quality = of_row[shape.row(positive.index)];
    }
    const int64_t end = slot + std::min<int64_t>(static_cast<int64_t>(positive_of.size()), capacity - slot);
    for (auto positive = positive_of.begin(); slot < end; ++slot, ++positive) {
      const bool is_finite = std::isfinite(positive->logit) && std::isfinite(positive->quality);
      records[kLogit * capacity + slot] = is_finite ? positive->logit : kNaN;
      records[kQuality * capacity + slot] = positive->quality;
      records[kSegment * capacity + slot] =
          map.is_single() ? 0 : static_cast<double>(map.run_at(level, positive->index, positive->index + 1).segment);
      records[kIndex * capacity + slot] = static_cast<double>(first_index + positive->index);
    }
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
