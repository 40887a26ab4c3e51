// The mathematics of the ranking sweep, for host and device: breakpoints, fixed-point sums, windows.
// Derivation and tensor layouts: rsloss_kernels/losses/ranking/README.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"
#include "common/index_shape.h"

namespace rsloss {

// Rows of the tensors that pass between the operators.
enum RecordRow { kLogit = 0, kQuality = 1, kSegment = 2, kIndex = 3, kRecordRows = 4 };
enum GradientRow { kGradientIndex = 0, kFirst = 1, kSecond = 2, kGradientSegment = 3, kGradientRows = 4 };
enum LineRow { kBreakpoint = 0, kValue = 1, kSlope = 2, kLineRows = 3 };
enum CountEntry { kFound = 0, kNegatives = 1, kElements = 2, kCounts = 3 };

// A false-positive sum, or a sum over worse positives, at or below this shares out no error (eps of the authors' code).
constexpr double kEps = 1e-10;

// The next float or double above a finite value. Bits, because a call to nextafter for every other breakpoint shows in the
// timings.
RSL_HOST_DEVICE float next_up(float value) {
  const float unsigned_zero = value + 0.0f;
  int32_t bits;
  memcpy(&bits, &unsigned_zero, sizeof bits);
  bits += bits >= 0 ? 1 : -1;
  float next;
  memcpy(&next, &bits, sizeof next);
  return next;
}

RSL_HOST_DEVICE double next_up(double value) {
  const double unsigned_zero = value + 0.0;
  int64_t bits;
  memcpy(&bits, &unsigned_zero, sizeof bits);
  bits += bits >= 0 ? 1 : -1;
  double next;
  memcpy(&next, &bits, sizeof next);
  return next;
}

// Smallest value of T (float or double) that is >= centre + shift in exact arithmetic. The two-sum recovers what the addition
// rounds away, so the answer is right even where shift is far below the spacing of T.
template <class T>
RSL_HOST_DEVICE T round_up_sum(double centre, double shift) {
  const double total = centre + shift;
  const double part = total - centre;
  const double error = (centre - (total - part)) + (shift - part);
  const T rounded = static_cast<T>(total);
  const bool too_small = static_cast<double>(rounded) < total || (static_cast<double>(rounded) == total && error > 0);
  return too_small ? next_up(rounded) : rounded;
}

// Offsets inside a bin are summed in units of a power of two, 2^(ceil(log2(2 delta)) - bits). `bits` per offset: as many as
// cannot overflow int64 when all `count` elements share a bin, at most 44, or 52 for float64.
RSL_HOST_DEVICE int fixed_point_bits(int64_t count, bool is_double) {
  const int most = is_double ? 52 : 44;
  int log_count = 0;
  while (log_count < 62 && (int64_t{1} << log_count) < count) ++log_count;
  return 62 - log_count < most ? 62 - log_count : most;
}

inline double fixed_point_unit(double delta, int bits) {
  if (delta == 0) return 0;
  int exponent;
  const double mantissa = std::frexp(2 * delta, &exponent);
  return std::ldexp(1.0, exponent - (mantissa == 0.5 ? 1 : 0) - bits);
}

// floor(distance / unit), clamped to `most` = 2^bits - 1: garbage in bins outside every window, which is never read.
// scale = 1 / unit (0 for delta = 0). The comparisons send NaN to 0.
RSL_HOST_DEVICE int64_t fixed_point_offset(double distance, double scale, double most) {
  const double offset = distance * scale;
  return static_cast<int64_t>(offset > 0 ? (offset < most ? offset : most) : 0.0);
}

// H(x) = clamp(x / (2 delta) + 1/2, 0, 1); delta = 0: 1 where x >= 0. inverse_width = 1 / (2 delta), 0 for delta = 0.
RSL_HOST_DEVICE double step_over_width(double x, double inverse_width) {
  if (inverse_width == 0) return x >= 0 ? 1 : 0;
  const double h = x * inverse_width + 0.5;
  return h < 0 ? 0 : (h > 1 ? 1 : h);
}

// FP_i from the bins: `above` negatives at or right of hi_i; `inside` negatives in the window, whose sum of (s - origin) is
// `moment`; `centre` is s_i - origin, `origin` an end of the cluster.
RSL_HOST_DEVICE double false_positives(double above, double inside, double moment, double centre, double delta) {
  if (delta == 0) return above;
  const double partial = 0.5 * inside + (moment - inside * centre) / (2 * delta);
  return above + (partial > 0 ? partial : 0);
}

// The rank of a positive among the positives, in which it counts one itself: `sum` of H over all of them holds H(0).
RSL_HOST_DEVICE double rank_with_self(double sum, double delta) {
  const double rank = delta > 0 ? sum + 0.5 : sum;
  return rank > 1 ? rank : 1;
}

// Gradient of a negative at a breakpoint: `closed` = sum of c_i with hi_i at or left of it, `opened` = sum of c_i whose window
// holds it, `moment` = sum of c_i (s_i - origin) over the same, `distance` = breakpoint - origin.
RSL_HOST_DEVICE double line_value(double closed, double opened, double moment, double distance, double delta) {
  if (delta == 0) return closed;
  return closed + 0.5 * opened + (opened * distance - moment) / (2 * delta);
}

}  // namespace rsloss
