// A range of elements -> the sum of their losses, their losses, or their gradients. Compiled once per instruction set
// (common/for_each_isa.h). A block at a time is read as T, float or double: in place where it has that type, else from a
// buffer, which has zeros behind the last element: those add nothing.
#include "common/vectors_simd.h"

template <class Element, class T>
constexpr bool kFits = sizeof(Element) <= sizeof(T);

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVec;
};
template <>
struct VectorOf<double> {
  using type = DoubleVec;
};

template <class Element>
static inline void widen_numbers(const Element* data, int size, float* buffer) {
  int i = 0;
  for (; i + kFloats <= size; i += kFloats) store_vec(buffer + i, load_floats(data + i));
  for (; i < size; ++i) buffer[i] = widen(data[i]);
}
template <class Element>
static inline void widen_numbers(const Element* data, int size, double* buffer) {
  for (int i = 0; i < size; ++i) buffer[i] = static_cast<double>(widen(data[i]));
}

// Element `at` of the first row counts as the first.
template <class Element, class T>
static inline void spread_rows(const Element* rows, int64_t row, int64_t at, int size, T* buffer) {
  for (int i = 0; i < size; at = 0, ++rows) {
    const T value = static_cast<T>(widen(*rows));
    for (const int64_t end = i + row - at; i < end && i < size; ++i) buffer[i] = value;
  }
}

template <class T>
static const T* read_block(const SmoothL1Column& column, int64_t begin, int size, T* buffer) {
  const ScalarType own = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
  if (column.type == own && column.row == 1 && size == kBlock) return static_cast<const T*>(column.data) + begin;
  dispatch_floating(column.type, [&](auto tag) {
    using Element = decltype(tag);
    if constexpr (kFits<Element, T>) {
      const Element* data = static_cast<const Element*>(column.data);
      if (column.row == 1) widen_numbers(data + begin, size, buffer);
      else spread_rows(data + begin / column.row, column.row, begin % column.row, size, buffer);
    }
  });
  for (int i = size; i % kFloats != 0; ++i) buffer[i] = 0;
  return buffer;
}

static inline void narrow_numbers(const double* numbers, int size, double* output) {
  __builtin_memcpy(output, numbers, static_cast<size_t>(size) * sizeof(double));
}
template <class Element>
static inline void narrow_numbers(const float* numbers, int size, Element* output) {
  int i = 0;
  for (; i + kFloats <= size; i += kFloats) store_floats(output + i, load_vec<FloatVec>(numbers + i));
  for (; i < size; ++i) output[i] = Element(numbers[i]);
}

// The blocks of a range, with weights where there are any.
template <class T, class Body>
static inline void for_blocks(const SmoothL1Problem& problem, int64_t begin, int64_t end, const Body& body) {
  T pred_buffer[kBlock], target_buffer[kBlock], weight_buffer[kBlock];
  for (; begin < end; begin += kBlock) {
    const int size = end - begin < kBlock ? static_cast<int>(end - begin) : kBlock;
    const T* pred = read_block(problem.pred, begin, size, pred_buffer);
    const T* target = read_block(problem.target, begin, size, target_buffer);
    const T* weight = problem.weight.data == nullptr ? nullptr : read_block(problem.weight, begin, size, weight_buffer);
    body(begin, size, pred, target, weight);
  }
}

static inline DoubleVec value_of(DoubleVec d, const SmoothL1Beta& beta) {
  const DoubleVec distance = absolute(d);
  return distance < beta.beta ? distance * (distance * (0.5 * beta.inverse)) : distance - beta.half;
}

// 0 where the weight is.
template <class Vec>
static inline Vec weighted(Vec weight, Vec x) {
  return weight == 0 ? Vec{} : weight * x;
}

// w l of as many elements as a vector of floats has.
template <class T>
static inline DoublePair losses_of(const T* pred, const T* target, const T* weight, const SmoothL1Beta& beta) {
  const DoublePair p = load_doubles(pred), t = load_doubles(target);
  DoublePair loss = {value_of(p.low - t.low, beta), value_of(p.high - t.high, beta)};
  if (weight != nullptr) {
    const DoublePair w = load_doubles(weight);
    loss = {weighted(w.low, loss.low), weighted(w.high, loss.high)};
  }
  return loss;
}

template <class T>
static double sum_losses(const SmoothL1Problem& problem, int64_t begin, int64_t end) {
  DoubleVec low{}, high{};
  for_blocks<T>(problem, begin, end, [&](int64_t, int size, const T* pred, const T* target, const T* weight) {
    const SmoothL1Beta beta = problem.beta;
    for (int i = 0; i < size; i += kFloats) {
      const DoublePair loss = losses_of(pred + i, target + i, weight == nullptr ? nullptr : weight + i, beta);
      low += loss.low;
      high += loss.high;
    }
  });
  const DoubleVec both = low + high;
  double sum = 0;
  for (int lane = 0; lane < kDoubles; ++lane) sum += both[lane];
  return sum;
}

static inline void store_pair(float* p, DoublePair x) { store_vec(p, to_floats(x.low, x.high)); }
static inline void store_pair(double* p, DoublePair x) { store_doubles(p, x); }

// Calls body(i, results) for a block, which fills T results[i] to [i + kFloats), for every vector of it; writes them.
template <class T, class Body>
static inline void write_block(const SmoothL1Column& output, int64_t begin, int size, const Body& body) {
  T results[kBlock];
  for (int i = 0; i < size; i += kFloats) body(i, results + i);
  dispatch_floating(output.type, [&](auto tag) {
    using Element = decltype(tag);
    // Wide inputs of narrow predictions.
    if constexpr (sizeof(T) == sizeof(double) && sizeof(Element) < sizeof(double)) {
      Element* at = static_cast<Element*>(const_cast<void*>(output.data)) + begin;
      for (int i = 0; i < size; ++i) at[i] = Element(static_cast<float>(results[i]));
    } else if constexpr (kFits<Element, T>) {
      narrow_numbers(results, size, static_cast<Element*>(const_cast<void*>(output.data)) + begin);
    }
  });
}

template <class T>
static void write_losses(const SmoothL1Problem& problem, int64_t begin, int64_t end, const SmoothL1Column& output) {
  for_blocks<T>(problem, begin, end, [&](int64_t first, int size, const T* pred, const T* target, const T* weight) {
    write_block<T>(output, first, size, [&](int i, T* results) {
      const DoublePair loss = losses_of(pred + i, target + i, weight == nullptr ? nullptr : weight + i, problem.beta);
      DoublePair scaled = {loss.low * problem.factor, loss.high * problem.factor};
      if (weight != nullptr) {
        const DoublePair w = load_doubles(weight + i);
        scaled = {w.low == 0.0 ? DoubleVec{} : scaled.low, w.high == 0.0 ? DoubleVec{} : scaled.high};
      }
      store_pair(results, scaled);
    });
  });
}

template <class Vec, class T>
static inline Vec slope_of(Vec d, T beta, T inverse) {
  const Vec zero{}, sign = d > 0 ? zero + 1 : (d < 0 ? zero - 1 : d);
  return absolute(d) < beta ? d * inverse : sign;
}

template <class T>
static void write_gradients(const SmoothL1Problem& problem, int64_t begin, int64_t end, const SmoothL1Column& output) {
  using Vec = typename VectorOf<T>::type;
  constexpr int kLanes = static_cast<int>(sizeof(Vec) / sizeof(T));
  const T beta = static_cast<T>(problem.beta.beta), inverse = static_cast<T>(problem.beta.inverse),
          factor = static_cast<T>(problem.factor);
  T grad_buffer[kBlock];
  for_blocks<T>(problem, begin, end, [&](int64_t first, int size, const T* pred, const T* target, const T* weight) {
    const T* grad = problem.grad.data == nullptr ? nullptr : read_block(problem.grad, first, size, grad_buffer);
    write_block<T>(output, first, size, [&](int i, T* results) {
      for (int part = 0; part < kFloats; part += kLanes) {
        const int at = i + part;
        const Vec d = load_vec<Vec>(pred + at) - load_vec<Vec>(target + at);
        Vec gradient = slope_of(d, beta, inverse) * (grad == nullptr ? Vec{} + factor : load_vec<Vec>(grad + at) * factor);
        if (weight != nullptr) gradient = weighted(load_vec<Vec>(weight + at), gradient);
        store_vec(results + part, gradient);
      }
    });
  });
}
