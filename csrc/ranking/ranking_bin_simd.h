// Negatives at or above the first breakpoint -> counts and fixed-point sums. Reads 4 bytes and 1 bit per element.
// Compiled once per instruction set (common/for_each_isa.h). Elements come in words of 64, one bit of the mask each: full words
// of 16- or 32-bit floats take the vector path; float64 and the last, partial word take the scalar one, which computes the
// same.
#include "ranking/ranking_lanes_simd.h"

template <class In, class T>
static void bin_word(const In* logits, uint64_t negatives, const int32_t* part, const BinPass<T>& pass, int64_t& nan_count) {
  for (; negatives != 0; negatives &= negatives - 1) {
    const int i = __builtin_ctzll(negatives);
    const T value = widen(logits[i]);
    if (value != value) ++nan_count;
    else bin_one(pass, part == nullptr ? 0 : part[i], value);
  }
}

// Adds the words to the sums, and clears them.
static void empty_packed(const BinPass<float>& pass) {
  PackedSums& packed = *pass.packed;
  for (int32_t bin = 0; bin < packed.bins; ++bin) {
    const uint64_t word = packed.words[bin];
    pass.sums[bin].count += static_cast<int64_t>(word >> kPackedSumBits);
    pass.sums[bin].sum += static_cast<int64_t>(word & ((uint64_t{1} << kPackedSumBits) - 1));
    packed.words[bin] = 0;
  }
  packed.pending = 0;
}

#if RSL_ISA != 0

constexpr int kBuffer = 256;

struct BinBuffer {
  alignas(64) float value[kBuffer + 64 + kLanes];
  alignas(64) int32_t cell[kBuffer + 64 + kLanes];
  alignas(64) int32_t bin[kBuffer + 64 + kLanes];
  alignas(64) int32_t first_cell[kBuffer + 64 + kLanes];  // of the part, only where segments are mixed
  alignas(64) int64_t offset[kBuffer + 64 + kLanes];
  alignas(64) int32_t crowded[kBuffer + 64 + kLanes];  // lanes
};

// Loops over the whole buffer, so that no load waits for a store just before it: cells and offsets; bins; those in crowded
// cells; the scattered additions.
template <bool kMixed>
static inline void bin_buffer(const BinPass<float>& pass, BinBuffer& buffer, int filled) {
  const int64_t one = pass.packed == nullptr ? 0 : int64_t{1} << kPackedSumBits;
  for (int i = 0; i < filled; i += kLanes) {
    const Floats x = load(buffer.value + i);
    store_cells(pass.grid, x, buffer.cell + i);
    store_offsets(pass, x, one - static_cast<int64_t>(kIntegerShiftBits), buffer.offset + i);
  }
  if constexpr (kMixed)
    for (int i = 0; i < filled; ++i) buffer.cell[i] += buffer.first_cell[i];
  int crowded = 0;
  for (int i = 0; i < filled; i += kLanes) {
    const Entries entries = gather_pairs(pass.cells, buffer.cell + i);
    const uint32_t mask = store_bins(entries, load(buffer.value + i), buffer.bin + i);
    store_lanes(i, mask, buffer.crowded + crowded);
    crowded += __builtin_popcount(mask);
  }
  for (int i = 0; i < crowded; ++i) {
    const int lane = buffer.crowded[i];
    if (lane >= filled) break;
    const int32_t bin = bin_crowded(pass, pass.cells[buffer.cell[lane]], buffer.value[lane]);
    buffer.bin[lane] = bin;
    if (bin == 0) buffer.offset[lane] = 0;  // adds nothing to bin 0, which nobody reads
  }
  if (pass.packed != nullptr) {
    if (pass.packed->pending + filled > kMostPacked) empty_packed(pass);
    pass.packed->pending += filled;
    uint64_t* words = pass.packed->words;
    // Bins come two at a time; behind the last one may be one of nothing.
    if (filled % 2 != 0) buffer.bin[filled] = buffer.offset[filled] = 0;
#pragma GCC unroll 4
    for (int i = 0; i < filled; i += 2) {
      uint64_t bins;
      __builtin_memcpy(&bins, buffer.bin + i, sizeof bins);
      words[static_cast<uint32_t>(bins)] += static_cast<uint64_t>(buffer.offset[i]);
      words[bins >> 32] += static_cast<uint64_t>(buffer.offset[i + 1]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < filled; ++i) {
    BinSums& bin = pass.sums[buffer.bin[i]];
    bin.count += 1;
    bin.sum += buffer.offset[i];
  }
}

// Gathers the relevant values of many words in a buffer that stays in the first-level cache.
template <bool kMixed, class In>
static void bin_full_words(const In* logits, const uint64_t* negatives, int64_t words, const MixedSpan* span,
                           const BinPass<float>& pass, int64_t& nan_count) {
  BinBuffer buffer;
  LaneRoom room;
  Lanes lanes{};
  int filled = 0;
  Floats lowest = broadcast(pass.lowest);
  for (int64_t word = 0; word < words; ++word) {
    if constexpr (kMixed) {
      const int64_t left = words - word;
      if (word % kMixedWords == 0) lanes = lanes_of(*span, word * 64, 64 * (left < kMixedWords ? left : kMixedWords), room);
    }
    const uint64_t mask = negatives[word];
    if (mask != 0) {
      const In* values = logits + word * 64;
      for (int i = 0; i < 64; i += 16) __builtin_prefetch(values + 2048 + i);
      for (int i = 0; i < 64; i += kLanes) {
        const uint32_t wanted = static_cast<uint32_t>(mask >> i) & kAllLanes;
        const Floats x = load(values + i);
        const int64_t lane = word % kMixedWords * 64 + i;
        if constexpr (kMixed) lowest = load(lanes.lowest + lane);
        const uint32_t relevant = wanted & at_least(x, lowest);
        const uint32_t broken = wanted & is_nan(x);
        if (broken) nan_count += __builtin_popcount(broken);
        compress(buffer.value + filled, x, relevant);
        if constexpr (kMixed) compress(buffer.first_cell + filled, lanes.first_cell + lane, relevant);
        filled += __builtin_popcount(relevant);
      }
    }
    if (filled >= kBuffer || word + 1 == words) {
      // What is left of the last vector is looked up too.
      store(buffer.value + filled, broadcast(0));
      if constexpr (kMixed) store(buffer.first_cell + filled, broadcast(0));
      bin_buffer<kMixed>(pass, buffer, filled);
      filled = 0;
    }
  }
}

#endif

// logits: [count]. negatives: [words of count]. span: the segments of the elements, or none if all are of the first part of the
// pass. Returns the number of NaN negatives.
template <class In, class T>
static int64_t bin_negatives(const In* logits, int64_t count, const uint64_t* negatives, const MixedSpan* span,
                             const BinPass<T>& pass) {
  int64_t nan_count = 0, word = 0;
#if RSL_ISA != 0
  if constexpr (has_vectors<In>()) {
    word = count / 64;
    if (span == nullptr) bin_full_words<false>(logits, negatives, word, span, pass, nan_count);
    else bin_full_words<true>(logits, negatives, word, span, pass, nan_count);
  }
#endif
  for (; word * 64 < count; ++word) {
    const int64_t left = count - word * 64, size = left < 64 ? left : 64;
    const uint64_t inside = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
    int32_t parts[64];
    if (span != nullptr) span->write_parts(word * 64, size, parts);
    bin_word(logits + word * 64, negatives[word] & inside, span == nullptr ? nullptr : parts, pass, nan_count);
  }
  return nan_count;
}
