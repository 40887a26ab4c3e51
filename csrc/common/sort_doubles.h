// Stable sort of numbered doubles, ascending: by digits for many, by comparison for few.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
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

inline uint64_t bits_of(const SortKey& key) { return key.bits; }
inline uint64_t bits_of(uint64_t key) { return key; }

// Sorts by the bits [first, end), stably: a pass per digit, which share the bits evenly.
template <class Key>
inline void sort_by_digits(std::vector<Key>& keys, int first, int end) {
  const int most = keys.size() < 8192 ? 9 : 11;
  const int digits = (end - first + most - 1) / most, width = (end - first + digits - 1) / digits;
  const uint64_t values = uint64_t{1} << width;
  std::vector<uint32_t> places(digits * values);
  for (const Key& key : keys)
    for (int digit = 0; digit < digits; ++digit)
      ++places[digit * values + (bits_of(key) >> (first + digit * width) & (values - 1))];
  std::vector<Key> other(keys.size());
  for (int digit = 0; digit < digits; ++digit) {
    uint32_t begin = 0, *place = &places[digit * values];
    for (uint64_t value = 0; value < values; ++value) {
      const uint32_t size = place[value];
      place[value] = begin;
      begin += size;
    }
    for (const Key& key : keys) other[place[bits_of(key) >> (first + digit * width) & (values - 1)]++] = key;
    keys.swap(other);
  }
}

constexpr int kSlotBits = 29;  // slots are below 2^29

// keys come with ascending slots, which break ties.
inline void sort_keys(std::vector<SortKey>& keys) {
  if (keys.size() < 256) {
    std::sort(keys.begin(), keys.end(),
              [](const SortKey& a, const SortKey& b) { return a.bits != b.bits ? a.bits < b.bits : a.slot < b.slot; });
    return;
  }
  uint64_t differing = 0;
  for (const SortKey& key : keys) differing |= key.bits ^ keys[0].bits;
  if (differing == 0) return;
  const int low = __builtin_ctzll(differing), width = 64 - __builtin_clzll(differing) - low;
  if (width + kSlotBits > 64) {
    sort_by_digits(keys, low, low + width);
    return;
  }
  // Doubles that come from floats differ in 35 bits at most, which fit above the slot.
  const uint64_t mask = (uint64_t{1} << width) - 1, same = keys[0].bits & ~(mask << low);
  std::vector<uint64_t> packed(keys.size());
  for (size_t i = 0; i < keys.size(); ++i)
    packed[i] = (keys[i].bits >> low & mask) << kSlotBits | static_cast<uint64_t>(keys[i].slot);
  sort_by_digits(packed, kSlotBits, kSlotBits + width);
  for (size_t i = 0; i < keys.size(); ++i)
    keys[i] = {same | packed[i] >> kSlotBits << low, static_cast<int32_t>(packed[i] & ((uint64_t{1} << kSlotBits) - 1))};
}

}  // namespace rsloss
