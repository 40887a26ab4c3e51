// Balanced group softmax on a GPU.
//   sample     a block per group finds the k-th smallest key digit by digit, in histograms of whole numbers, and keeps the
//              others below it and as many equal ones, in the order of rows, as are left
//   forward    a warp reads the columns of one row in one group twice, for the largest logit and for the sum of exponentials
//   combine    adds the blocks up in order
//   backward   a warp reads the columns once more and writes the gradient
//   scores     a warp reads the logits of one row for its groups' sums, and once more by class
// float32 and narrower: differences and exponentials in two floats, sums in two floats and then in float64. Temporary memory:
// 16 bytes per block.
#include "group_softmax/group_softmax_kernels.cuh"

#include <type_traits>

#include "common/cuda_device.cuh"
#include "common/two_float.cuh"

namespace rsloss {
namespace {

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
// Beyond this distance from the largest logit an exponential is no normal float.
constexpr float kFarthest = 87.0f;

__device__ __forceinline__ int64_t label_of(const GroupLabels& labels, int64_t row) {
  return labels.type == Type::kInt64 ? static_cast<const int64_t*>(labels.labels)[row]
                                     : static_cast<const int32_t*>(labels.labels)[row];
}

// Column of a row's label, any number; -1 of a row that is ignored, which is `ignored`.
struct RowLabel {
  int column;
  bool is_used;
};
__device__ __forceinline__ RowLabel row_label(const GroupLayout& layout, const GroupLabels& labels, int64_t row) {
  const int number = layout.class_of(label_of(labels, row));
  return {number < 0 ? -1 : labels.class_columns[number], number >= 0};
}

// Whether a row is foreground of a group, or one of its others.
struct Membership {
  bool is_foreground;
  bool is_other;
};
__device__ __forceinline__ Membership membership(const GroupLayout& layout, const GroupLabels& labels, int group, int64_t row) {
  const RowLabel label = row_label(layout, labels, row);
  const bool is_foreground = label.is_used && layout.holds(group, label.column);
  return {is_foreground, label.is_used && !is_foreground};
}

__device__ __forceinline__ uint32_t order_of(float key) { return order_of_key(key, bits_as<uint32_t>(key)); }

// The key of which `kept` others, at least 1 and fewer than all, are at or below, by order; *equal: how many of that key are
// kept. By all threads of a block.
__device__ __forceinline__ uint32_t find_threshold(const GroupLayout& layout, const GroupLabels& labels, int group,
                                                   const float* keys, int64_t kept, int64_t* equal) {
  __shared__ uint32_t histogram[kDigits];
  __shared__ int64_t scratch[kLargeBlock / kWarp];
  __shared__ uint32_t found_digit;
  __shared__ int64_t found_before;
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t prefix = 0;
  uint32_t known = 0;  // bits of the prefix
#pragma unroll 1
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (thread < kDigits) histogram[thread] = 0;
    __syncthreads();
    for (int64_t row = thread; row < labels.rows; row += blockDim.x) {
      if (!membership(layout, labels, group, row).is_other) continue;
      const uint32_t order = order_of(keys[row]);
      if ((order & known) == prefix) atomicAdd(&histogram[(order >> shift) & (kDigits - 1)], 1u);
    }
    __syncthreads();
    int64_t total;
    const int64_t count = thread < kDigits ? histogram[thread] : 0;
    const int64_t before = block_exclusive_scan(count, scratch, &total);
    if (before < kept && kept <= before + count) {
      found_digit = static_cast<uint32_t>(thread);
      found_before = before;
    }
    __syncthreads();
    prefix |= found_digit << shift;
    known |= static_cast<uint32_t>(kDigits - 1) << shift;
    kept -= found_before;
    // The next digit overwrites what was found behind other barriers.
  }
  *equal = kept;
  return prefix;
}

__global__ void __launch_bounds__(kLargeBlock, 1)
    group_softmax_sample_kernel(GroupLayout layout, GroupLabels labels, const float* all_keys, double others_ratio,
                                float* all_weights) {
  __shared__ int64_t scratch[kLargeBlock / kWarp];
  const int group = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  float* const weights = all_weights + group * labels.rows;
  if (group == layout.background_group) {
    for (int64_t row = thread; row < labels.rows; row += blockDim.x) weights[row] = label_of(labels, row) < 0 ? 0.0f : 1.0f;
    return;
  }
  int64_t own_foreground = 0, own_others = 0;
  for (int64_t row = thread; row < labels.rows; row += blockDim.x) {
    const Membership member = membership(layout, labels, group, row);
    own_foreground += member.is_foreground;
    own_others += member.is_other;
  }
  const int64_t foreground = block_sum(own_foreground, scratch), others = block_sum(own_others, scratch);
  const int64_t kept = kept_others(foreground, others, others_ratio);
  const bool is_some = kept > 0 && kept < others && all_keys != nullptr;
  const float* const keys = is_some ? all_keys + group * labels.rows : nullptr;
  int64_t equal = 0;
  const uint32_t threshold = is_some ? find_threshold(layout, labels, group, keys, kept, &equal) : 0;
  // By whole blocks, as rows of equal keys are counted in their order.
  int64_t equal_before = 0;
  for (int64_t first = 0; first < labels.rows; first += blockDim.x) {
    const int64_t row = first + thread;
    Membership member = {false, false};
    if (row < labels.rows) member = membership(layout, labels, group, row);
    bool is_kept = member.is_other && kept == others;
    if (is_some) {
      const uint32_t order = member.is_other ? order_of(keys[row]) : 0;
      const bool is_equal = member.is_other && order == threshold;
      int64_t total;
      const int64_t rank = equal_before + block_exclusive_scan(static_cast<int64_t>(is_equal), scratch, &total);
      equal_before += total;
      is_kept = member.is_other && (order < threshold || (is_equal && rank < equal));
    }
    if (row < labels.rows) weights[row] = member.is_foreground || is_kept ? 1.0f : 0.0f;
  }
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
template <class T>
__device__ __forceinline__ T warp_maximum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = larger(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// exp(z - m), z at most m, in two floats or as a double; 0 where it is no normal number.
__device__ __forceinline__ TwoFloat exponential(const ExponentialTable& table, float z, float m) {
  const TwoFloat distance = sum_of(m, TwoFloat{-z, 0});
  return distance.high < kFarthest ? table.exp_of_minus(distance.high, distance.low) : TwoFloat{0, 0};
}
__device__ __forceinline__ double exponential(const ExponentialTable&, double z, double m) { return exp(z - m); }

class PlainSum {
 public:
  __device__ __forceinline__ void add(double x) { sum_ += x; }
  __device__ __forceinline__ double value() const { return sum_; }

 private:
  double sum_ = 0;
};
template <class T>
using TermSum = std::conditional_t<std::is_same_v<T, float>, CompensatedSum, PlainSum>;

// The largest logit of a row in a group and the sum of exponentials less one of the largest.
template <class T>
struct GroupSums {
  T largest;
  double rest;
  bool is_broken;  // by NaN or +inf
};

// By a warp. The numbers are the same in all of its lanes.
template <class Element>
__device__ __forceinline__ GroupSums<Arithmetic<Element>> group_sums(const GroupLayout& layout, int group, const Element* row,
                                                                     const ExponentialTable& table) {
  using T = Arithmetic<Element>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int end = layout.starts[group + 1];
  const bool has_constant = layout.others[group] < 0;
  T largest = has_constant ? T(0) : -static_cast<T>(INFINITY);
  bool is_broken = false;
  for (int j = layout.starts[group] + lane; j < end; j += kWarp) {
    const T z = widen(row[j]);
    is_broken = is_broken || !(z < static_cast<T>(INFINITY));
    largest = larger(largest, z);
  }
  largest = warp_maximum(largest);
  is_broken = __ballot_sync(kAllLanes, is_broken) != 0;

  TermSum<T> sum;
  int ties = 0;
  const auto add = [&](T z) {
    if (z == largest) {
      ++ties;
    } else {
      sum.add(exponential(table, z, largest));
    }
  };
  for (int j = layout.starts[group] + lane; j < end; j += kWarp) add(widen(row[j]));
  if (has_constant && lane == 0) add(0);
  double rest = warp_sum(sum.value()) + (warp_sum(ties) - 1);
  if (sizeof(T) == sizeof(float) && rest < kSmallestFloatRest) {
    double exact = 0;
    const auto add_exact = [&](T z) {
      if (z != largest) exact += exp(static_cast<double>(z) - static_cast<double>(largest));
    };
    for (int j = layout.starts[group] + lane; j < end; j += kWarp) add_exact(widen(row[j]));
    if (has_constant && lane == 0) add_exact(0);
    rest = warp_sum(exact);
  }
  return {largest, rest, is_broken};
}

// partials: [G, 2, blocks], sums of losses and of weights.
template <class Element>
__global__ void __launch_bounds__(kThreads, 4)
    group_softmax_forward_kernel(GroupLayout layout, GroupLabels labels, GroupRows rows, Arithmetic<Element>* row_tables,
                                 double* partials) {
  using T = Arithmetic<Element>;
  __shared__ TwoFloat entries[ExponentialTable::kEntries];
  __shared__ double scratch[kWarpsPerBlock];
  const ExponentialTable table(entries);
  __syncthreads();
  const int group = static_cast<int>(blockIdx.x) % layout.groups;
  const int block = static_cast<int>(blockIdx.x) / layout.groups;
  const int blocks = static_cast<int>(gridDim.x) / layout.groups;
  const bool is_first_lane = threadIdx.x % kWarp == 0;
  double loss_sum = 0, weight_sum = 0;
  for (int64_t row = block * kWarpsPerBlock + static_cast<int>(threadIdx.x) / kWarp; row < labels.rows;
       row += blocks * kWarpsPerBlock) {
    const int64_t pair = group * labels.rows + row;
    const RowLabel label = row_label(layout, labels, row);
    const double weight = label.is_used ? load_as_double(rows.weights, rows.weights_type, pair) : 0;
    double tables[kRowTables] = {0, 0, 0};
    if (weight != 0) {
      const Element* const logits = static_cast<const Element*>(rows.logits) + row * layout.columns();
      const GroupSums<T> sums = group_sums(layout, group, logits, table);
      const int target = layout.target_in(group, label.column);
      const double at_target = target < 0 ? 0 : static_cast<double>(widen(logits[target]));
      double loss = NAN;
      tables[kLargest] = tables[kScale] = tables[kComplement] = NAN;
      if (!sums.is_broken && is_sound(sums.largest, at_target, sums.rest)) {
        const PairTerms terms = pair_terms(static_cast<double>(sums.largest) - at_target, sums.rest);
        loss = terms.cross_entropy;
        tables[kLargest] = sums.largest;
        tables[kScale] = terms.scale;
        tables[kComplement] = terms.complement;
      }
      if (is_first_lane) {
        loss_sum += weight * loss;
        weight_sum += weight;
      }
    }
    if (is_first_lane) {
#pragma unroll
      for (int i = 0; i < kRowTables; ++i) row_tables[i * layout.groups * labels.rows + pair] = static_cast<T>(tables[i]);
    }
  }
  const double loss = block_sum(loss_sum, scratch);
  const double weight = block_sum(weight_sum, scratch);
  if (threadIdx.x == 0) {
    partials[(2 * group) * blocks + block] = loss;
    partials[(2 * group + 1) * blocks + block] = weight;
  }
}

// A warp per group.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    group_softmax_combine_kernel(const double* partials, int groups, int blocks, T* losses, double* averages) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int group = grid_warp(); group < groups; group += grid_warps()) {
    double loss = 0, weight = 0;
    for (int i = lane; i < blocks; i += kWarp) {
      loss += partials[2 * group * blocks + i];
      weight += partials[(2 * group + 1) * blocks + i];
    }
    loss = warp_sum(loss);
    weight = warp_sum(weight);
    if (lane != 0) continue;
    averages[group] = average_factor(weight);
    losses[group] = static_cast<T>(loss / averages[group]);
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 4)
    group_softmax_backward_kernel(GroupLayout layout, GroupLabels labels, GroupRows rows, const double* averages,
                                  const Arithmetic<Element>* row_tables, const void* grad_losses, Type grad_losses_type,
                                  Element* gradient) {
  using T = Arithmetic<Element>;
  __shared__ TwoFloat entries[ExponentialTable::kEntries];
  const ExponentialTable table(entries);
  __syncthreads();
  const int group = static_cast<int>(blockIdx.x) % layout.groups;
  const int blocks = static_cast<int>(gridDim.x) / layout.groups;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first = layout.starts[group];
  const int end = layout.starts[group + 1];
  const double upstream = load_as_double(grad_losses, grad_losses_type, group) / averages[group];
  for (int64_t row = static_cast<int>(blockIdx.x) / layout.groups * kWarpsPerBlock + static_cast<int>(threadIdx.x) / kWarp;
       row < labels.rows; row += blocks * kWarpsPerBlock) {
    const int64_t pair = group * labels.rows + row;
    const int64_t pairs = layout.groups * labels.rows;
    const RowLabel label = row_label(layout, labels, row);
    const double weight = label.is_used ? load_as_double(rows.weights, rows.weights_type, pair) : 0;
    const Element* const logits = static_cast<const Element*>(rows.logits) + row * layout.columns();
    Element* const out = gradient + row * layout.columns();
    const T largest = row_tables[kLargest * pairs + pair];
    if (weight == 0 || isnan(largest)) {
      for (int j = first + lane; j < end; j += kWarp) out[j] = narrowed<Element>(weight == 0 ? T(0) : static_cast<T>(NAN));
      continue;
    }
    const int target = layout.target_in(group, label.column);
    const double factor = weight * upstream;
    const double of_terms = factor * static_cast<double>(row_tables[kScale * pairs + pair]);
    const double complement = static_cast<double>(row_tables[kComplement * pairs + pair]);
    // All that is left of such a pair is below what floats hold well.
    const bool is_exact = sizeof(T) == sizeof(double) || complement < kSmallestFloatRest;
    for (int j = first + lane; j < end; j += kWarp) {
      const T z = widen(logits[j]);
      T slope;
      if (j == target) {
        slope = static_cast<T>(-factor * complement);
      } else if (is_exact) {
        slope = static_cast<T>(exp(static_cast<double>(z) - static_cast<double>(largest)) * of_terms);
      } else {
        const TwoFloat term = exponential(table, static_cast<float>(z), static_cast<float>(largest));
        slope = static_cast<T>(term.high * static_cast<float>(of_terms));
      }
      out[j] = narrowed<Element>(slope);
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 4)
    group_softmax_scores_kernel(GroupLayout layout, const int* class_columns, const Element* logits, int64_t rows,
                                Element* scores) {
  using T = Arithmetic<Element>;
  __shared__ TwoFloat entries[ExponentialTable::kEntries];
  __shared__ T largest_of[kWarpsPerBlock][kMostGroups];
  __shared__ T scale_of[kWarpsPerBlock][kMostGroups];
  const ExponentialTable table(entries);
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int background = layout.background_group;
  for (int64_t row = grid_warp(); row < rows; row += grid_warps()) {
    const Element* const at = logits + row * layout.columns();
    for (int group = 0; group < layout.groups; ++group) {
      const GroupSums<T> sums = group_sums(layout, group, at, table);
      if (lane == 0) {
        const bool is_broken = sums.is_broken || isinf(sums.largest);
        largest_of[warp][group] = sums.largest;
        scale_of[warp][group] = is_broken ? static_cast<T>(NAN) : static_cast<T>(1 / (1 + sums.rest));
      }
    }
    __syncwarp();
    const auto probability = [&](int group, T z) {
      const T largest = largest_of[warp][group], scale = scale_of[warp][group];
      if (isnan(scale)) return scale;
      if constexpr (std::is_same_v<T, float>) {
        return exponential(table, z, largest).high * scale;
      } else {
        return exponential(table, z, largest) * scale;
      }
    };
    const int other = layout.others[background];
    const T foreground = probability(background, other < 0 ? T(0) : widen(at[other]));
    for (int c = lane; c <= layout.classes; c += kWarp) {
      const int column = class_columns[c];
      const int group = layout.group_of(column);
      T score = group < layout.groups ? probability(group, widen(at[column])) : T(0);
      if (c < layout.classes) score *= foreground;
      const int place = !layout.background_first ? c : c == layout.classes ? 0 : c + 1;
      scores[row * (layout.classes + 1) + place] = narrowed<Element>(score);
    }
    // The next row overwrites the sums.
    __syncwarp();
  }
}

// Blocks of one group.
int64_t blocks_of_group(const GroupLayout& layout, int64_t rows, const DeviceLimits& limits) {
  const int64_t resident = std::max<int64_t>(1, static_cast<int64_t>(limits.processors) * kBlocksPerProcessor / layout.groups);
  return std::min(ceil_div(rows, kWarpsPerBlock), resident);
}

// Calls body with a value of the type.
template <class Body>
cudaError_t dispatch(Type type, Body body) {
  switch (type) {
    case Type::kHalf:
      return body(__half{});
    case Type::kBFloat16:
      return body(__nv_bfloat16{});
    case Type::kFloat:
      return body(float{});
    default:
      return body(double{});
  }
}

}  // namespace

cudaError_t launch_group_softmax_sample(const GroupLayout& layout, const GroupLabels& labels, const float* keys,
                                        double others_ratio, float* weights, cudaStream_t stream) {
  if (labels.rows == 0) return cudaSuccess;
  const int block = labels.rows <= kThreads ? kThreads : kLargeBlock;
  return launch(group_softmax_sample_kernel, layout.groups, block, 0, stream, layout, labels, keys, others_ratio, weights);
}

cudaError_t group_softmax_workspace_bytes(const GroupLayout& layout, int64_t rows, int64_t* bytes) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  *bytes = 2 * layout.groups * blocks_of_group(layout, rows, limits) * static_cast<int64_t>(sizeof(double));
  return cudaSuccess;
}

cudaError_t launch_group_softmax_forward(const GroupLayout& layout, const GroupLabels& labels, const GroupRows& rows,
                                         void* losses, double* averages, void* row_tables, void* workspace,
                                         cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const int64_t blocks = blocks_of_group(layout, labels.rows, limits);
  double* const partials = static_cast<double*>(workspace);
  return dispatch(rows.logits_type, [&](auto element) {
    using Element = decltype(element);
    using T = Arithmetic<Element>;
    if (blocks > 0) {
      RSL_RETURN_IF_ERROR(launch(group_softmax_forward_kernel<Element>, blocks * layout.groups, kThreads, 0, stream, layout,
                                 labels, rows, static_cast<T*>(row_tables), partials));
    }
    return launch(group_softmax_combine_kernel<T>, ceil_div(layout.groups, kWarpsPerBlock), kThreads, 0, stream, partials,
                  layout.groups, static_cast<int>(blocks), static_cast<T*>(losses), averages);
  });
}

cudaError_t launch_group_softmax_backward(const GroupLayout& layout, const GroupLabels& labels, const GroupRows& rows,
                                          const double* averages, const void* row_tables, const void* grad_losses,
                                          Type grad_losses_type, void* gradient, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const int64_t blocks = blocks_of_group(layout, labels.rows, limits);
  if (blocks == 0) return cudaSuccess;
  return dispatch(rows.logits_type, [&](auto element) {
    using Element = decltype(element);
    return launch(group_softmax_backward_kernel<Element>, blocks * layout.groups, kThreads, 0, stream, layout, labels, rows,
                  averages, static_cast<const Arithmetic<Element>*>(row_tables), grad_losses, grad_losses_type,
                  static_cast<Element*>(gradient));
  });
}

cudaError_t launch_group_softmax_scores(const GroupLayout& layout, const int* class_columns, const void* logits,
                                        Type logits_type, int64_t rows, void* scores, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  return dispatch(logits_type, [&](auto element) {
    using Element = decltype(element);
    return launch(group_softmax_scores_kernel<Element>, resident_grid(ceil_div(rows, kWarpsPerBlock), limits), kThreads, 0,
                  stream, layout, class_columns, static_cast<const Element*>(logits), rows, static_cast<Element*>(scores));
  });
}

}  // namespace rsloss
