// The segment of an element, on the device.
#pragma once

#include "ranking/ranking_kernels.cuh"

namespace rsloss {

// Walks over neighbouring elements: one division where it starts.
class SegmentCursor {
 public:
  __device__ __forceinline__ SegmentCursor(const SegmentMap& map, int64_t element) : map_(map) {
    const uint64_t at = static_cast<uint64_t>(map.first + element);
    const uint64_t width = static_cast<uint64_t>(map.width);
    // A division of 64 bits costs several of 32.
    row_ =
        static_cast<int64_t>((at | width) >> 32 == 0 ? static_cast<uint32_t>(at) / static_cast<uint32_t>(width) : at / width);
    column_ = static_cast<int64_t>(at) - row_ * map.width;
  }
  // Elements from here on that are known to share the id.
  __device__ __forceinline__ int64_t run() const { return map_.is_by_column ? 1 : map_.width - column_; }
  // At most to the end of the row.
  __device__ __forceinline__ void skip(int64_t elements) {
    column_ += elements;
    if (column_ == map_.width) {
      column_ = 0;
      ++row_;
    }
  }
  __device__ __forceinline__ void next() { skip(1); }
  // -1 if the element is ignored.
  __device__ __forceinline__ int32_t id() const {
    const int32_t id = map_.ids == nullptr ? static_cast<int32_t>(row_) : map_.ids[map_.is_by_column ? column_ : row_];
    return id >= 0 && id < map_.count ? id : -1;
  }

 private:
  const SegmentMap& map_;
  int64_t row_;
  int64_t column_;
};

// Where all elements are of one segment.
struct OneSegment {
  __device__ __forceinline__ OneSegment(const SegmentMap&, int64_t) {}
  __device__ __forceinline__ void next() {}
  __device__ __forceinline__ int32_t id() const { return 0; }
};

}  // namespace rsloss
