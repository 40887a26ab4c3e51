// Four elements per thread and step of tensors whose types are told apart at run time, once per step.
#pragma once

#include "common/cuda_device.cuh"
#include "common/two_float.cuh"

namespace rsloss {

constexpr int kQuad = 4;
constexpr unsigned kWholeQuad = (1u << kQuad) - 1;

template <class Word>
struct alignas(sizeof(Word) * kQuad <= 16 ? sizeof(Word) * kQuad : 16) Quad {
  Word at[kQuad];
};

// A tensor of one number per element. is_aligned: whole quads can be loaded and stored at once.
struct Column {
  const void* data;
  Type type;
  bool is_aligned;
};

inline bool is_label(Type type) { return type == Type::kInt32 || type == Type::kInt64; }

inline int64_t bytes_of(Type type) {
  switch (type) {
    case Type::kHalf:
    case Type::kBFloat16:
      return 2;
    case Type::kFloat:
    case Type::kInt32:
      return 4;
    default:
      return 8;
  }
}

inline Column column_of(const void* data, Type type) {
  const uintptr_t alignment = static_cast<uintptr_t>(std::min<int64_t>(16, kQuad * bytes_of(type)));
  return {data, type, reinterpret_cast<uintptr_t>(data) % alignment == 0};
}

// The bits of four elements: those of one type behind one another. All columns are loaded before any is looked into, so that
// their loads are on their way together.
template <int kWords>
struct alignas(16) RawQuad {
  uint32_t words[kWords];
};

template <class Word, int kWords>
__device__ __forceinline__ void load_words(const Column& column, int64_t first, int count, int64_t stride,
                                           RawQuad<kWords>* raw) {
  const Word* const words = static_cast<const Word*>(column.data) + first;
  if (column.is_aligned && count == kQuad && stride == 1) {
    const Quad<Word> quad = *reinterpret_cast<const Quad<Word>*>(words);
    memcpy(raw->words, quad.at, sizeof(quad));
    return;
  }
  Word at[kQuad];
#pragma unroll
  for (int v = 0; v < kQuad; ++v) at[v] = v < count ? words[v * stride] : 0;
  memcpy(raw->words, at, sizeof(at));
}

// Elements first, first + stride, ..., `count` of them, at most 4; the others are 0. kWords: 4 do not hold doubles. Quads that
// are aligned need a `first` that is a multiple of 4.
template <int kWords>
__device__ __forceinline__ RawQuad<kWords> load_raw(const Column& column, int64_t first, int count, int64_t stride = 1) {
  RawQuad<kWords> raw;
  if (column.type == Type::kFloat) {
    load_words<uint32_t>(column, first, count, stride, &raw);
  } else if (kWords == 4 || column.type != Type::kDouble) {
    load_words<uint16_t>(column, first, count, stride, &raw);
  } else if constexpr (kWords == 8) {
    load_words<uint64_t>(column, first, count, stride, &raw);
  }
  return raw;
}

__device__ __forceinline__ uint16_t half_word(const uint32_t* words, int v) {
  return static_cast<uint16_t>(words[v / 2] >> (v % 2 * 16));
}

template <class T, int kWords>
__device__ __forceinline__ void numbers_of(const RawQuad<kWords>& raw, Type type, T (&numbers)[kQuad]) {
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    if (type == Type::kFloat) {
      numbers[v] = bits_as<float>(raw.words[v]);
    } else if (type == Type::kHalf) {
      numbers[v] = widen(bits_as<__half>(half_word(raw.words, v)));
    } else if (kWords == 4 || type != Type::kDouble) {
      numbers[v] = widen(bits_as<__nv_bfloat16>(half_word(raw.words, v)));
    } else if constexpr (kWords == 8) {
      numbers[v] = bits_as<double>(static_cast<uint64_t>(raw.words[2 * v + 1]) << 32 | raw.words[2 * v]);
    }
  }
}

template <class T>
__device__ __forceinline__ void store_numbers(const Column& column, int64_t first, int count, const T (&numbers)[kQuad],
                                              int64_t stride = 1) {
  const auto store = [&](auto narrow_to) {
    using Element = decltype(narrow_to);
    Element* const elements = static_cast<Element*>(const_cast<void*>(column.data)) + first;
    Quad<Element> quad;
#pragma unroll
    for (int v = 0; v < kQuad; ++v) quad.at[v] = narrowed<Element>(static_cast<Arithmetic<Element>>(numbers[v]));
    if (column.is_aligned && count == kQuad && stride == 1) {
      *reinterpret_cast<Quad<Element>*>(elements) = quad;
    } else {
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        if (v < count) elements[v * stride] = quad.at[v];
      }
    }
  };
  switch (column.type) {
    case Type::kDouble:
      if constexpr (sizeof(T) == sizeof(double)) store(double{});
      break;
    case Type::kFloat:
      store(float{});
      break;
    case Type::kHalf:
      store(__half{});
      break;
    default:
      store(__nv_bfloat16{});
  }
}

template <class T>
__device__ __forceinline__ T load_number(const Column& column, int64_t index) {
  T numbers[kQuad];
  numbers_of(load_raw<sizeof(T)>(column, index, 1), column.type, numbers);
  return numbers[0];
}

__device__ __forceinline__ void store_as(const Column& column, int64_t index, double number) {
  const double numbers[kQuad] = {number, 0, 0, 0};
  store_numbers(column, index, 1, numbers);
}

__device__ __forceinline__ int64_t load_label(const Column& labels, int64_t row) {
  return labels.type == Type::kInt64 ? static_cast<const int64_t*>(labels.data)[row]
                                     : static_cast<const int32_t*>(labels.data)[row];
}

}  // namespace rsloss
