// Lines -> gradient of every element, 0 where the mask says so. Reads 4 bytes and 1 bit, writes 4 bytes per element.
// Compiled once per instruction set (common/for_each_isa.h). Elements come in words of 64, one bit of the mask each: full words
// of 16- or 32-bit floats take the vector path; float64 and the last, partial word take the scalar one, which computes the
// same.
#include "ranking/ranking_lanes_simd.h"

// Fused where those of the vectors are, and whatever the optimiser does: an element has the same bits in a vector and alone.
template <class T>
static inline T multiply_add(T a, T b, T c) {
#if RSL_ISA != 0
  if constexpr (sizeof(T) == sizeof(float)) return __builtin_fmaf(a, b, c);
  else return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class T>
static inline T searched_gradient(const GradientPass<T>& pass, int32_t part, int32_t from, T value) {
  const int32_t bin = count_edges(pass.edges, pass.parts[part].end, from, value);
  if (bin == pass.parts[part].first) return 0;
  const Line<T> line = pass.lines[bin];
  // A flat line may be longer than the largest finite value, up to infinity.
  return line.slope == 0 ? line.value : multiply_add(line.slope, value - pass.edges[bin - 1], line.value);
}

// The cell at `address`, that of the value, whose value is NaN.
static inline float crowded_gradient(const GradientPass<float>& pass, int32_t address, float value) {
  int32_t before;
  __builtin_memcpy(&before, &pass.cells[address].slope, sizeof before);
  return searched_gradient(pass, address / pass.part_cells, before, value);
}

static inline float gradient_one(const GradientPass<float>& pass, int32_t part, float value) {
  if (value != value) return value;
  if (!(value >= pass.edges[pass.parts[part].first])) return 0;
  const int32_t cell = cell_of(pass.grid, value), address = part * pass.part_cells + cell;
  const CellLine line = pass.cells[address];
  if (line.value != line.value) return crowded_gradient(pass, address, value);
  const float bounded = value < pass.grid.top ? value : pass.grid.top;
  const float t = multiply_add(bounded, pass.grid.scale, -(pass.grid.origin + static_cast<float>(cell)));
  return multiply_add(line.slope, t, line.value);
}

static inline double gradient_one(const GradientPass<double>& pass, int32_t part, double value) {
  if (value != value) return value;
  const int32_t first = pass.parts[part].first;
  return value >= pass.edges[first] ? searched_gradient(pass, part, first, value) : 0;
}

template <class In, class T>
static void gradient_word(const In* logits, int64_t count, uint64_t negatives, const int32_t* part, const GradientPass<T>& pass,
                          In* gradient) {
  for (int64_t i = 0; i < count; ++i)
    gradient[i] = In(negatives >> i & 1 ? gradient_one(pass, part == nullptr ? 0 : part[i], widen(logits[i])) : T(0));
}

#if RSL_ISA != 0

constexpr int kBlock = kMixedElements;
constexpr float kFew = 0.25f;  // share of the elements up to which packing them pays

// The lanes that are `searched` in place of their results.
__attribute__((noinline)) static Floats gradient_searched(const GradientPass<float>& pass, Floats x, const int32_t* addresses,
                                                          uint32_t searched, Floats results_so_far) {
  alignas(64) float values[kLanes], results[kLanes];
  store(values, x);
  store(results, results_so_far);
  for (; searched; searched &= searched - 1) {
    const int lane = __builtin_ctz(searched);
    if (values[lane] == values[lane]) results[lane] = crowded_gradient(pass, addresses[lane], values[lane]);
  }
  return load(results);
}

// What a pass reads again and again, out of reach of its stores.
struct LineTable {
  CellGrid grid;
  const CellLine* cells;
};

// starts: of the cells of x; addresses: of these cells with the part, in the table, in memory only where they are searched.
template <class Addresses>
RSL_INLINE Floats gradient_lanes(const GradientPass<float>& pass, const LineTable& table, Floats x, const Entries& entries,
                                 Floats starts, uint32_t relevant, const Addresses& addresses) {
  const Floats value = as_floats(entries.first), slope = as_floats(entries.second);
  const Floats t = multiply_subtract(at_most(broadcast(table.grid.top), x), broadcast(table.grid.scale), starts);
  const Floats result = multiply_add(slope, t, value);
  const uint32_t searched = relevant & is_nan(value);
  return __builtin_expect(searched != 0, 0) ? gradient_searched(pass, x, addresses(), searched, result) : result;
}

// cells: inside the grid.
RSL_INLINE Floats gradient_lanes(const GradientPass<float>& pass, const LineTable& table, Floats x, const int32_t* cells,
                                 const int32_t* addresses, uint32_t relevant) {
  return gradient_lanes(pass, table, x, gather_pairs(table.cells, addresses), starts_of(table.grid, cells), relevant,
                        [=] { return addresses; });
}

// A block of words. line(i, next, x, relevant): the gradient at the vector from i on; at `next` is the one a word further,
// behind the last word that of the first. Returns how many elements got a line.
template <bool kMixed, class In, class Line>
RSL_INLINE int write_lines(const In* logits, const uint64_t* negatives, int count, const Lanes& lanes,
                           const GradientPass<float>& pass, In* gradient, const Line& line) {
  Floats lowest = broadcast(pass.lowest);
  int written = 0;
  for (int word = 0; word * 64 < count; ++word) {
    const int next = word * 64 + 64 < count ? word * 64 + 64 : 0;
#pragma GCC unroll 8
    for (int lane = 0; lane < 64; lane += kLanes) {
      const int i = word * 64 + lane;
      const Floats x = load(logits + i);
      if constexpr (kMixed) lowest = load(lanes.lowest + i);
      const uint32_t relevant = static_cast<uint32_t>(negatives[word] >> lane) & kAllLanes & not_below(x, lowest);
      store(gradient + i, select(relevant, line(i, next + lane, x, relevant)));
      written += __builtin_popcount(relevant);
    }
  }
  return written;
}

// The lines of one word and the cells of the next at a time.
template <bool kMixed, class In>
static int gradient_of_many(const In* logits, const uint64_t* negatives, int count, const Lanes& lanes,
                            const GradientPass<float>& pass, In* gradient) {
  alignas(64) int32_t cells[kBlock], mixed_addresses[kMixed ? kBlock : 1];
  const int32_t* addresses = kMixed ? mixed_addresses : cells;
  const LineTable table{pass.grid, pass.cells};
  const auto find_cells = [&](int i) __attribute__((always_inline)) {
    store_cells(table.grid, load(logits + i), cells + i);
    if constexpr (kMixed) add_cells(cells + i, lanes.first_cell + i, mixed_addresses + i);
  };
  for (int i = 0; i < 64; i += kLanes) find_cells(i);
  const auto line = [&](int i, int next, Floats x, uint32_t relevant) __attribute__((always_inline)) {
    find_cells(next);
    return gradient_lanes(pass, table, x, cells + i, addresses + i, relevant);
  };
  return write_lines<kMixed>(logits, negatives, count, lanes, pass, gradient, line);
}

#if RSL_ISA == 512

// The same with gathers, which need no cells in memory.
template <bool kMixed, class In>
static int gradient_of_many_gathered(const In* logits, const uint64_t* negatives, int count, const Lanes& lanes,
                                     const GradientPass<float>& pass, In* gradient) {
  const LineTable table{pass.grid, pass.cells};
  alignas(64) int32_t searched[kLanes];
  const auto line = [&](int i, int, Floats x, uint32_t relevant) __attribute__((always_inline)) {
    const __m512i cells = _mm512_cvttps_epi32(positions(table.grid, x));
    const __m512i addresses = kMixed ? _mm512_add_epi32(cells, _mm512_loadu_si512(lanes.first_cell + i)) : cells;
    return gradient_lanes(pass, table, x, gather_pairs(table.cells, addresses), starts_of(table.grid, cells), relevant, [&] {
      _mm512_store_si512(searched, addresses);
      return searched;
    });
  };
  return write_lines<kMixed>(logits, negatives, count, lanes, pass, gradient, line);
}

#endif

// The same for a block in which few elements get one: these are packed before, and spread out afterwards.
template <bool kMixed, class In>
static int gradient_of_few(const In* logits, const uint64_t* negatives, int count, const Lanes& lanes,
                           const GradientPass<float>& pass, In* gradient) {
  alignas(64) float values[kBlock + kLanes], results[kBlock + kLanes];
  alignas(64) int32_t cells[kBlock + kLanes], addresses[kBlock + kLanes];
  alignas(64) uint64_t masks[kMixedWords];
  const LineTable table{pass.grid, pass.cells};
  Floats lowest = broadcast(pass.lowest);
  int written = 0;
  for (int word = 0; word * 64 < count; ++word) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; i += kLanes) {
      const Floats x = load(logits + word * 64 + i);
      if constexpr (kMixed) lowest = load(lanes.lowest + word * 64 + i);
      const uint32_t relevant = static_cast<uint32_t>(negatives[word] >> i) & kAllLanes & not_below(x, lowest);
      compress(values + written, x, relevant);
      if constexpr (kMixed) compress(addresses + written, lanes.first_cell + word * 64 + i, relevant);
      mask |= static_cast<uint64_t>(relevant) << i;
      written += __builtin_popcount(relevant);
    }
    masks[word] = mask;
  }
  // What is left of the last vector is looked up too.
  store(values + written, broadcast(0));
  if constexpr (kMixed) store(addresses + written, broadcast(0));
  for (int i = 0; i < written; i += kLanes) store_cells(table.grid, load(values + i), cells + i);
  if constexpr (kMixed)
    for (int i = 0; i < written; ++i) addresses[i] += cells[i];
  for (int i = 0; i < written; i += kLanes)
    store(results + i, gradient_lanes(pass, table, load(values + i), cells + i, (kMixed ? addresses : cells) + i, kAllLanes));
  const float* next = results;
  for (int word = 0; word * 64 < count; ++word) {
    for (int i = 0; i < 64; i += kLanes) {
      const uint32_t relevant = static_cast<uint32_t>(masks[word] >> i) & kAllLanes;
      store(gradient + word * 64 + i, expand(next, relevant));
      next += __builtin_popcount(relevant);
    }
  }
  return written;
}

template <bool kMixed, class In>
static void gradient_full_words(const In* logits, const uint64_t* negatives, int64_t words, const MixedSpan* span,
                                const GradientPass<float>& pass, In* gradient) {
  LaneRoom room;
  Lanes lanes{};
  bool are_few = true;
  auto* of_many = gradient_of_many<kMixed, In>;
#if RSL_ISA == 512
  if (has_fast_gathers()) of_many = gradient_of_many_gathered<kMixed, In>;
#endif
  for (int64_t word = 0; word < words; word += kBlock / 64) {
    const int64_t first = word * 64, left = words * 64 - first;
    const int count = left < kBlock ? static_cast<int>(left) : kBlock;
    if constexpr (kMixed) lanes = lanes_of(*span, first, count, room);
    auto* of_block = are_few ? gradient_of_few<kMixed, In> : of_many;
    const int written = of_block(logits + first, negatives + word, count, lanes, pass, gradient + first);
    // Neighbouring blocks are alike, and both ways compute the same.
    are_few = written < count * kFew;
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
