// Stable sort of numbered doubles, ascending: by digits for many, by comparison for few.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace rsloss {

struct SortKey {
  uint64_t bits;  // ordered like the doubles
  int32_t slot;
};

// Maps doubles without NaN to integers in the same order; -0 and 0 become equal.
inline uint64_t ordered_bits(double value) {
  const double unsigned_zero = value + 0.0;
  uint64_t bits;
  std::memcpy(&bits, &unsigned_zero, sizeof bits);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

template <int kDigitBits>
inline void sort_by_digits(std::vector<SortKey>& keys) {
  constexpr int kDigits = (64 + kDigitBits - 1) / kDigitBits;
  constexpr uint64_t kMask = (uint64_t{1} << kDigitBits) - 1;
  std::vector<std::array<uint32_t, kMask + 1>> counts(kDigits);
  for (const SortKey& key : keys)
    for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][key.bits >> (digit * kDigitBits) & kMask];
  std::vector<SortKey> other(keys.size());
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = digit * kDigitBits;
    // Doubles that come from floats have long runs of equal low digits.
    if (counts[digit][keys[0].bits >> shift & kMask] == keys.size()) continue;
    uint32_t begin = 0;
    for (uint32_t& count : counts[digit]) {
      const uint32_t size = count;
      count = begin;
      begin += size;
    }
    for (const SortKey& key : keys) other[counts[digit][key.bits >> shift & kMask]++] = key;
    keys.swap(other);
  }
}

// keys come with ascending slots, which break ties.
inline void sort_keys(std::vector<SortKey>& keys) {
  if (keys.size() < 256) {
    std::sort(keys.begin(), keys.end(),
              [](const SortKey& a, const SortKey& b) { return a.bits != b.bits ? a.bits < b.bits : a.slot < b.slot; });
  } else if (keys.size() < 8192) {
    sort_by_digits<8>(keys);
  } else {
    sort_by_digits<11>(keys);
  }
}

}  // namespace rsloss
