// To which segment the elements of the logits belong, element by element or in spans of words of the mask, on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace rsloss {

// Words that are treated together where segments change among them, and their elements.
constexpr int64_t kMixedWords = 16;
constexpr int64_t kMixedElements = 64 * kMixedWords;

// Element i has the place (first + i) / width, modulo `period` if there is one, and the segment ids[place].
struct SegmentLayout {
  const int32_t* ids;  // none: places are segments
  int64_t num_segments;
  int64_t first;
  int64_t width;
  int64_t period;  // 0: none

  // An element that belongs to no segment has the number `num_segments`.
  int32_t segment(int64_t place) const {
    if (ids == nullptr) return static_cast<int32_t>(place);
    return static_cast<int32_t>(std::min(static_cast<uint32_t>(ids[place]), static_cast<uint32_t>(num_segments)));
  }

  // The segments of the elements [begin, begin + count).
  void write_segments(int64_t begin, int64_t count, int32_t* segments) const {
    int64_t place = (first + begin) / width, next = (place + 1) * width - (first + begin);
    if (width == 1 && period == 0) {
      for (int64_t i = 0; i < count; ++i) segments[i] = segment(place + i);
      return;
    }
    if (period > 0) place %= period;
    for (int64_t i = 0; i < count; next += width) {
      const int32_t number = segment(place);
      for (const int64_t end = std::min(next, count); i < end; ++i) segments[i] = number;
      if (++place == period) place = 0;
    }
  }
};

// Arguments must have passed `check_segments`. An element that belongs to no segment has the number `num_segments`.
class SegmentMap {
 public:
  SegmentMap(const Tensors& logits, const std::optional<Tensor>& segments, int64_t num_segments)
      : num_segments_(num_segments), form_(segments ? (segments->size(1) == 1 ? kRows : kColumns) : kChunks) {
    for (const Tensor& level : logits) {
      first_.push_back(first_.empty() ? 0 : first_.back() + size_.back());
      size_.push_back(level.numel());
    }
    if (!segments) return;
    ids_ = static_cast<const int32_t*>(segments->const_data_ptr());
    num_ids_ = segments->numel();
    row_size_ = num_ids_ > 0 ? (first_.back() + size_.back()) / num_ids_ : 0;
  }

  bool is_single() const { return form_ == kChunks && num_segments_ == 1; }
  bool has_ids() const { return form_ != kChunks; }
  bool ignores_elements() const {
    const uint32_t bound = static_cast<uint32_t>(num_segments_);
    uint32_t ignores = 0;  // not bool, which is not vectorised
    for (int64_t i = 0; i < num_ids_; ++i) ignores |= static_cast<uint32_t>(ids_[i]) >= bound ? 1 : 0;
    return ignores != 0;
  }
  int64_t num_segments() const { return num_segments_; }

  // A run of elements of one segment: up to `end`, perhaps further.
  struct Run {
    int64_t segment;
    int64_t end;
  };

  // The run of a tensor's element `begin`; it is looked at up to `until` > begin.
  Run run_at(size_t level, int64_t begin, int64_t until) const {
    if (form_ == kChunks) {
      const int64_t chunk = size_[level] / num_segments_;
      return {begin / chunk, std::min(until, (begin / chunk + 1) * chunk)};
    }
    const int64_t width = form_ == kRows ? row_size_ : 1;
    const int64_t place = form_ == kRows ? (first_[level] + begin) / width : begin % num_ids_;
    int64_t next = place + 1, end = form_ == kRows ? next * width - first_[level] : begin + 1;
    for (; end < until && next < num_ids_ && ids_[next] == ids_[place]; ++next) end += width;
    return {segment(ids_[place]), std::min(end, until)};
  }

  // Calls body(segment, begin, end) for the runs of a tensor's elements [begin, end).
  template <class Body>
  void for_runs(size_t level, int64_t begin, int64_t end, const Body& body) const {
    if (form_ == kColumns) {
      int64_t column = begin % std::max<int64_t>(num_ids_, 1);
      for (int64_t i = begin; i < end; ++i) {
        body(segment(ids_[column]), i, i + 1);
        column = column + 1 < num_ids_ ? column + 1 : 0;
      }
      return;
    }
    while (begin < end) {
      const Run run = run_at(level, begin, end);
      body(run.segment, begin, run.end);
      begin = run.end;
    }
  }

  SegmentLayout layout(size_t level) const {
    if (form_ == kChunks) return {nullptr, num_segments_, 0, std::max<int64_t>(1, size_[level] / num_segments_), 0};
    if (form_ == kRows) return {ids_, num_segments_, first_[level], row_size_, 0};
    return {ids_, num_segments_, 0, 1, num_ids_};
  }

  // Covers the words [begin, end) of a tensor's mask by calls of whole(segment, first word, one past the last) for long
  // stretches that lie in one segment, and of mixed(first, one past the last) for the others.
  template <class Whole, class Mixed>
  void for_spans(size_t level, int64_t begin, int64_t end, const Whole& whole, const Mixed& mixed) const {
    if (begin == end) return;
    if (is_single()) return whole(int64_t{0}, begin, end);
    const int64_t last = std::min(64 * end, size_[level]);
    for (int64_t word = begin, mixed_begin = begin; word < end;) {
      const Run run = run_at(level, 64 * word, last);
      const int64_t whole_end = run.end == last ? end : run.end / 64, next = std::min(end, word + kMixedWords);
      const bool is_whole = whole_end >= next;
      if (mixed_begin < word && is_whole) mixed(mixed_begin, word);
      if (is_whole) whole(run.segment, word, whole_end);
      word = is_whole ? whole_end : next;
      if (is_whole) mixed_begin = word;
      else if (word == end) mixed(mixed_begin, end);
    }
  }

 private:
  enum Form { kChunks, kRows, kColumns };

  int64_t segment(int32_t id) const { return id >= 0 && id < num_segments_ ? id : num_segments_; }

  int64_t num_segments_;
  Form form_;
  const int32_t* ids_ = nullptr;
  int64_t num_ids_ = 0;
  int64_t row_size_ = 0;
  std::vector<int64_t> first_;  // by tensor: index of its first element
  std::vector<int64_t> size_;
};

}  // namespace rsloss
