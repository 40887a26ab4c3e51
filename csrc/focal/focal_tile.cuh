// What a block of threads has at hand of the classes of its tile, and with it the loss and the slope of an element with all
// that weights it: in float32 where that holds it, else the caller asks for float64.
#pragma once

#include "focal/focal_elements.cuh"
#include "focal/focal_stream.cuh"

namespace rsloss {

constexpr float kLargestFloat = 3.4028234e38f;

// What a block has at hand: the classes of its tile, the table of exponentials.
template <bool kAcross>
class TileClasses {
 public:
  static constexpr int kClasses = FocalWalk<kAcross>::kClasses;

  // shared: FocalShape::shared bytes. By all threads; ends with a barrier.
  __device__ __forceinline__ TileClasses(const FocalStream& stream, const FocalWalk<kAcross>& walk, unsigned char* shared)
      : stream_(stream),
        first_class_(walk.first_class()),
        classes_(reinterpret_cast<HardClass*>(shared + sizeof(TwoFloat) * ExponentialTable::kEntries)),
        exponentials_(reinterpret_cast<TwoFloat*>(shared)) {
    __shared__ int scratch[kWarpsPerBlock];
    const bool modulates_positives = stream.modulator == kFocal || stream.modulator == kQuality;
    const double first_gamma = class_entry(stream.class_table, stream.classes, first_class_).gamma;
    int differing = 0;
    for (int c = static_cast<int>(threadIdx.x); c < walk.classes(); c += static_cast<int>(blockDim.x)) {
      const ClassEntry entry = class_entry(stream.class_table, stream.classes, first_class_ + c);
      differing += entry.gamma != first_gamma;
      classes_[slot(false, c / kClasses, c % kClasses)] = hard_class(entry.gamma, entry.negative);
      classes_[slot(true, c / kClasses, c % kClasses)] = hard_class(modulates_positives ? entry.gamma : 0, entry.positive);
    }
    // Also the barrier behind the tables.
    differing = block_sum(differing, scratch);
    const bool is_cheap = differing == 0 && (first_gamma == 0 || first_gamma == 1 || first_gamma == 2);
    power_ = is_cheap ? static_cast<int>(first_gamma) : kAnyPower;
    // A positive of another power than its class is for focal.h.
    hard_positives_ = modulates_positives || power_ == 0 || power_ == kAnyPower;
  }

  __device__ __forceinline__ FocalElements elements() const { return {exponentials_, power_}; }

  // Whether an element is one for float32 arithmetic, as far as its target tells.
  __device__ __forceinline__ bool is_hard(float target) const { return target == 0 || (target == 1 && hard_positives_); }
  __device__ __forceinline__ HardClass of(const FocalPlace& place, int v, bool is_positive) const {
    return classes_[slot(is_positive, place.unit, kAcross ? v : 0)];
  }

  // Element v in float64, times its own weight. False: it does not count.
  __device__ __forceinline__ bool exact(const FocalStreamLevel& level, const FocalPlace& place, int v, FocalElement* weighted,
                                        bool* is_positive) const {
    const int c = first_class_ + place.unit * kClasses + (kAcross ? v : 0);
    const FocalNumbers numbers = load_element(stream_, level, place, v, c);
    const ClassEntry entry = class_entry(stream_.class_table, stream_.classes, c);
    if (!numbers.is_valid || !element_counts(entry, numbers.target, numbers.weight)) return false;
    const FocalElement element = focal_element(stream_.modulator, numbers.logit, numbers.target, entry);
    *weighted = {numbers.weight * element.loss, numbers.weight * element.slope};
    *is_positive = numbers.is_positive;
    return true;
  }

 private:
  __device__ __forceinline__ int slot(bool is_positive, int unit, int v) const {
    return ((is_positive ? kClasses : 0) + v) * stream_.units + unit;
  }

  const FocalStream& stream_;
  int first_class_;
  HardClass* classes_;
  ExponentialTable exponentials_;
  int power_;
  bool hard_positives_;
};

// Loss of element v with its weights in two floats. False: it is one for float64. Nothing is to be added where it is 0.
template <bool kAcross>
__device__ __forceinline__ bool weighted_loss(const TileClasses<kAcross>& tile, const FocalPlace& place, const FocalQuad& quad,
                                              int v, bool has_weights, TwoFloat* loss) {
  *loss = {0, 0};
  if (!tile.is_hard(quad.targets[v])) return false;
  const bool is_positive = quad.targets[v] != 0;
  const HardClass entry = tile.of(place, v, is_positive);
  if (entry.weight.high == 0) return true;
  const float x = static_cast<float>(is_positive ? -quad.logits[v] : quad.logits[v]);
  const TwoFloat of_logit = tile.elements().loss(x, entry.gamma);
  *loss = product_of(of_logit, entry.weight);
  if (has_weights) *loss = product_of(*loss, TwoFloat{static_cast<float>(quad.weights[v]), 0});
  const float size = fabsf(loss->high);
  if (of_logit.high > kSmallestLoss && size > kSmallestLoss && size < kLargestLoss) return true;
  // A logit that is masked out.
  const bool is_nothing = x == -INFINITY && size < kLargestLoss;
  if (is_nothing) *loss = {0, 0};
  return is_nothing;
}

// Derivative of element v with its weights. False: it is one for float64.
template <bool kAcross>
__device__ __forceinline__ bool weighted_slope(const TileClasses<kAcross>& tile, const FocalPlace& place, const FocalQuad& quad,
                                               int v, float factor, float* slope) {
  *slope = 0;
  if (!tile.is_hard(quad.targets[v])) return false;
  const bool is_positive = quad.targets[v] != 0;
  const HardClass entry = tile.of(place, v, is_positive);
  if (entry.weight.high == 0) return true;
  const float x = static_cast<float>(is_positive ? -quad.logits[v] : quad.logits[v]);
  *slope = tile.elements().slope(x, entry.gamma) * entry.weight.high * (static_cast<float>(quad.weights[v]) * factor);
  if (is_positive) *slope = -*slope;
  return fabsf(x) <= kLargestFloat && fabsf(*slope) <= kLargestFloat;
}

}  // namespace rsloss
