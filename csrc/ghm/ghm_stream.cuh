// How histogram and backward stream over a level: four neighbouring elements per thread and step, with their targets and which
// of them are valid. Types are told apart at run time, once per step; labels are followed without a division.
#pragma once

#include "common/map_cursor.cuh"
#include "common/quads.cuh"
#include "ghm/ghm_kernels.cuh"
#include "ghm/ghm_two_float.cuh"

namespace rsloss {

// Bit v: whether element v is above 0.
template <class T>
__device__ __forceinline__ unsigned above_zero(const T (&numbers)[kQuad]) {
  unsigned mask = 0;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    if (numbers[v] > 0) mask |= 1u << v;
  }
  return mask;
}

// A level as its kernels see it.
struct GhmStream {
  Column preds;
  Column targets;  // class indices: int32 or int64 [rows]
  Column weights;  // data null: every element is valid
  Column gradients;
  bool weights_by_row;
  bool background_first;
  int64_t elements;
  IndexShape shape;
  // What a thread advances by from step to step where rows lie together: rows, and elements of a row.
  int64_t row_step;
  int64_t column_step;
};

// Which forms of targets and losses there are.
enum class GhmForm { kDense, kLabels, kRegression };

// Where an element stands in its row, four elements further from step to step.
class RowWalk {
 public:
  __device__ __forceinline__ RowWalk(const GhmStream& stream, int64_t element) : stream_(stream) {
    const uint64_t at = static_cast<uint64_t>(element), width = static_cast<uint64_t>(stream.shape.classes);
    // A division of 64 bits costs several of 32.
    row_ =
        static_cast<int64_t>((at | width) >> 32 == 0 ? static_cast<uint32_t>(at) / static_cast<uint32_t>(width) : at / width);
    column_ = element - row_ * stream.shape.classes;
  }
  __device__ __forceinline__ void step() {
    row_ += stream_.row_step;
    column_ += stream_.column_step;
    if (column_ < stream_.shape.classes) return;
    column_ -= stream_.shape.classes;
    ++row_;
  }
  // Calls visit(row, v, next v), the elements [v, next v) of the quad, for every row that its first `count` reach into.
  template <class Visit>
  __device__ __forceinline__ void for_rows(int count, Visit visit) const {
    int64_t row = row_;
    int64_t left = stream_.shape.classes - column_;
    for (int v = 0; v < count; ++row) {
      const int next = left < count - v ? v + static_cast<int>(left) : count;
      visit(row, v, next);
      v = next;
      left = stream_.shape.classes;
    }
  }
  __device__ __forceinline__ int64_t column() const { return column_; }

 private:
  const GhmStream& stream_;
  int64_t row_;
  int64_t column_;
};

__device__ __forceinline__ bool is_valid_row(const Column& weights, int64_t row) {
  return load_as_double(weights.data, weights.type, row) > 0;
}

// Calls use(first, count, preds, targets, valid) for every quad; `count` is 0 behind the end, so that whole warps take part in
// every call. `targets` as T, `valid` in bits.
template <class T, GhmForm form, class Use>
__device__ __forceinline__ void stream_quads(const GhmStream& stream, Use use) {
  constexpr int kWords = sizeof(T);
  const int64_t stride = grid_threads() * kQuad;
  const int in_warp = static_cast<int>(threadIdx.x % kWarp) * kQuad;
  int64_t first_of_warp = grid_thread() * kQuad - in_warp;
  const bool by_row = form == GhmForm::kLabels || stream.weights_by_row;
  const bool by_element = stream.weights.data != nullptr && !stream.weights_by_row;
  const bool has_wide_weights = stream.weights.type == Type::kDouble;
  RowWalk walk(stream, by_row ? first_of_warp + in_warp : 0);
  for (; first_of_warp < stream.elements; first_of_warp += stride) {
    const int64_t first = first_of_warp + in_warp;
    const int64_t left = stream.elements - first;
    const int count = left >= kQuad ? kQuad : left > 0 ? static_cast<int>(left) : 0;
    const RawQuad<kWords> raw_preds = load_raw<kWords>(stream.preds, first, count);
    RawQuad<kWords> raw_targets;
    if constexpr (form != GhmForm::kLabels) raw_targets = load_raw<kWords>(stream.targets, first, count);
    RawQuad<4> raw_weights;
    if (by_element && !has_wide_weights) raw_weights = load_raw<4>(stream.weights, first, count);

    unsigned valid = (1u << count) - 1;
    unsigned positive = 0;  // bits
    if (by_row && stream.shape.places > 1) {
      MapCursor cursor(stream.shape, first);
      for (int v = 0; v < count; ++v, cursor.skip(1)) {
        if (stream.weights_by_row && !is_valid_row(stream.weights, cursor.row())) valid &= ~(1u << v);
        if constexpr (form == GhmForm::kLabels) {
          const int64_t label = load_label(stream.targets, cursor.row());
          if (label == cursor.column() + (stream.background_first ? 1 : 0)) positive |= 1u << v;
        }
      }
    } else if (by_row) {
      walk.for_rows(count, [&](int64_t row, int v, int next) {
        if (stream.weights_by_row && !is_valid_row(stream.weights, row)) valid &= ~((1u << next) - (1u << v));
        if constexpr (form == GhmForm::kLabels) {
          // The element of this row that is its class; none where there is no such class.
          const int64_t label = load_label(stream.targets, row);
          const int64_t first_label = stream.background_first ? 1 : 0;
          if (label < first_label || label - first_label >= stream.shape.classes) return;
          const int64_t at = label - first_label - (v == 0 ? walk.column() : -v);
          if (at >= v && at < next) positive |= 1u << at;
        }
      });
      walk.step();
    }
    if (by_element && has_wide_weights) {
      double weights[kQuad];
      numbers_of(load_raw<8>(stream.weights, first, count), Type::kDouble, weights);
      valid &= above_zero(weights);
    } else if (by_element) {
      float weights[kQuad];
      numbers_of(raw_weights, stream.weights.type, weights);
      valid &= above_zero(weights);
    }
    T preds[kQuad];
    T targets[kQuad];
    numbers_of(raw_preds, stream.preds.type, preds);
    if constexpr (form == GhmForm::kLabels) {
#pragma unroll
      for (int v = 0; v < kQuad; ++v) targets[v] = static_cast<T>(positive >> v & 1);
    } else {
      numbers_of(raw_targets, stream.targets.type, targets);
    }
    use(first, count, preds, targets, valid);
  }
}

}  // namespace rsloss
