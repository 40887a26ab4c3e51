// Walks over the elements of a map with class indices, on the device.
#pragma once

#include "common/cuda_device.cuh"
#include "common/index_shape.h"

namespace rsloss {

// The row and the column of an element of a map.
class MapCursor {
 public:
  __device__ __forceinline__ MapCursor(const IndexShape& shape, int64_t element) : shape_(shape) {
    const int64_t plane = divide(element, shape.places);
    const int64_t outer = divide(plane, shape.classes);
    place_ = element - plane * shape.places;
    column_ = plane - outer * shape.classes;
    first_row_ = outer * shape.places;
  }
  __device__ __forceinline__ int64_t row() const { return first_row_ + place_; }
  __device__ __forceinline__ int64_t column() const { return column_; }
  __device__ __forceinline__ void skip(int64_t elements) {
    for (place_ += elements; place_ >= shape_.places; place_ -= shape_.places) {
      if (++column_ < shape_.classes) continue;
      column_ = 0;
      first_row_ += shape_.places;
    }
  }

 private:
  // A division of 64 bits costs several of 32.
  static __device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
    return (a | b) >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
  }

  const IndexShape& shape_;
  int64_t place_;
  int64_t column_;
  int64_t first_row_;
};

}  // namespace rsloss
