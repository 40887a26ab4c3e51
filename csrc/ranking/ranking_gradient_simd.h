// Lines -> gradient of every element, 0 where the mask says so. Reads 4 bytes and 1 bit, writes 4 bytes per element.
// Compiled once per instruction set (common/for_each_isa.h). Elements come in words of 64, one bit of the mask each: full words
// of 16- or 32-bit floats take the vector path; float64 and the last, partial word take the scalar one, which computes the
// same.
#include "ranking/ranking_lanes_simd.h"

template <class In, class T>
static void gradient_word(const In* logits, int64_t count, uint64_t negatives, const int32_t* part, const GradientPass<T>& pass,
                          In* gradient) {
  for (int64_t i = 0; i < count; ++i)
    gradient[i] = In(negatives >> i & 1 ? gradient_one(pass, part == nullptr ? 0 : part[i], widen(logits[i])) : T(0));
}

#if RSL_ISA != 0

constexpr int kBlock = kMixedElements;

// cells: inside the grid; addresses: with the part, in the table.
static inline Floats gradient_lanes(const GradientPass<float>& pass, Floats x, const int32_t* cells, const int32_t* addresses,
                                    uint32_t relevant) {
  const Entries entries = gather_pairs(pass.cells, addresses);
  const Floats value = as_floats(entries.first), slope = as_floats(entries.second);
  const Floats t =
      multiply_subtract(at_most(broadcast(pass.grid.top), x), broadcast(pass.grid.scale), starts_of(pass.grid, cells));
  const Floats result = multiply_add(slope, t, value);
  uint32_t searched = relevant & is_nan(value);
  if (!searched) return result;
  alignas(64) float values[kLanes], results[kLanes];
  store(values, x);
  store(results, result);
  for (; searched; searched &= searched - 1) {
    const int lane = __builtin_ctz(searched);
    if (values[lane] == values[lane]) results[lane] = crowded_gradient(pass, addresses[lane], values[lane]);
  }
  return load(results);
}

// A block of words: the cells of all its logits first, then the lines.
template <bool kMixed, class In>
static void gradient_full_words(const In* logits, const uint64_t* negatives, int64_t words, const MixedSpan* span,
                                const GradientPass<float>& pass, In* gradient) {
  alignas(64) int32_t cells[kBlock], mixed_addresses[kMixed ? kBlock : 1];
  const int32_t* addresses = kMixed ? mixed_addresses : cells;
  LaneRoom room;
  Lanes lanes{};
  Floats lowest = broadcast(pass.lowest);
  for (int64_t first = 0; first < words; first += kBlock / 64) {
    const int64_t last = first + kBlock / 64 < words ? first + kBlock / 64 : words;
    for (int64_t i = first * 64; i < last * 64; i += kLanes) store_cells(pass.grid, load(logits + i), cells + i - first * 64);
    if constexpr (kMixed) {
      const int64_t count = (last - first) * 64;
      lanes = lanes_of(*span, first * 64, count, room);
      for (int64_t i = 0; i < count; ++i) mixed_addresses[i] = cells[i] + lanes.first_cell[i];
    }
    for (int64_t i = first * 64; i < last * 64; i += kLanes) {
      const Floats x = load(logits + i);
      const int64_t at = i - first * 64;
      if constexpr (kMixed) lowest = load(lanes.lowest + at);
      const uint32_t relevant = static_cast<uint32_t>(negatives[i / 64] >> i % 64) & kAllLanes & not_below(x, lowest);
      store(gradient + i,
            relevant ? select(relevant, gradient_lanes(pass, x, cells + at, addresses + at, relevant)) : broadcast(0));
    }
  }
}

#endif

// cells[i] = {value + step * i, step}
static void fill_line_cells(CellLine* cells, int64_t count, double value, double step) {
  for (int64_t i = 0; i < count; ++i)
    cells[i] = {static_cast<float>(value + step * static_cast<double>(i)), static_cast<float>(step)};
}

// logits, gradient: [count]. negatives: [words of count]. span: the segments of the elements, or none if all are of the first
// part of the pass.
template <class In, class T>
static void write_gradient(const In* logits, int64_t count, const uint64_t* negatives, const MixedSpan* span,
                           const GradientPass<T>& pass, In* gradient) {
  int64_t word = 0;
#if RSL_ISA != 0
  if constexpr (has_vectors<In>()) {
    word = count / 64;
    if (span == nullptr) gradient_full_words<false>(logits, negatives, word, span, pass, gradient);
    else gradient_full_words<true>(logits, negatives, word, span, pass, gradient);
  }
#endif
  for (; word * 64 < count; ++word) {
    const int64_t left = count - word * 64, size = left < 64 ? left : 64;
    int32_t parts[64];
    if (span != nullptr) span->write_parts(word * 64, size, parts);
    gradient_word(logits + word * 64, size, negatives[word], span == nullptr ? nullptr : parts, pass, gradient + word * 64);
  }
}
