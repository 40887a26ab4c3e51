// Element-wise sigmoid losses on a GPU.
//   forward    streams the levels once. Losses are summed in two floats, or in float64 where they are computed in it; the class
//              sums in registers, as a thread keeps to its classes. Each block adds up its threads in order
//   combine    adds the blocks up in order
//   elements, backward   stream the same and write the losses or gradients
// No atomics. Temporary memory: 8 bytes per block, and with class sums 16 for each of its classes.
#include <type_traits>

#include "focal/focal_elements.cuh"
#include "focal/focal_stream.cuh"

namespace rsloss {
namespace {

// Blocks that are to be resident, which bounds the registers. Class sums keep 16 more.
template <class T, bool kSums>
constexpr int kBlocks = sizeof(T) == sizeof(double) || kSums ? 2 : 3;
constexpr float kLargestFloat = 3.4028234e38f;

// What a block has at hand: the classes of its tile, the table of exponentials.
template <bool kAcross>
class FocalBlock {
 public:
  static constexpr int kClasses = FocalWalk<kAcross>::kClasses;

  // shared: focal_shared_bytes(...). By all threads; ends with a barrier.
  __device__ __forceinline__ FocalBlock(const FocalStream& stream, const FocalWalk<kAcross>& walk, unsigned char* shared)
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
__device__ __forceinline__ bool weighted_loss(const FocalBlock<kAcross>& block, const FocalPlace& place, const FocalQuad& quad,
                                              int v, bool has_weights, TwoFloat* loss) {
  *loss = {0, 0};
  if (!block.is_hard(quad.targets[v])) return false;
  const bool is_positive = quad.targets[v] != 0;
  const HardClass entry = block.of(place, v, is_positive);
  if (entry.weight.high == 0) return true;
  const float x = static_cast<float>(is_positive ? -quad.logits[v] : quad.logits[v]);
  const TwoFloat of_logit = block.elements().loss(x, entry.gamma);
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
__device__ __forceinline__ bool weighted_slope(const FocalBlock<kAcross>& block, const FocalPlace& place, const FocalQuad& quad,
                                               int v, float factor, float* slope) {
  *slope = 0;
  if (!block.is_hard(quad.targets[v])) return false;
  const bool is_positive = quad.targets[v] != 0;
  const HardClass entry = block.of(place, v, is_positive);
  if (entry.weight.high == 0) return true;
  const float x = static_cast<float>(is_positive ? -quad.logits[v] : quad.logits[v]);
  *slope = block.elements().slope(x, entry.gamma) * entry.weight.high * (static_cast<float>(quad.weights[v]) * factor);
  if (is_positive) *slope = -*slope;
  return fabsf(x) <= kLargestFloat && fabsf(*slope) <= kLargestFloat;
}

// Sums of one class over the lanes of a block, by halves; cells: shared, [kSums][threads], each lane's own in place.
template <int kSums>
__device__ __forceinline__ void add_up_lanes(double* cells, int lanes, int lane, int units) {
  for (int left = lanes; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (lane < left - half) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        double* const own = cells + sum * blockDim.x + threadIdx.x;
        *own += own[half * units];
      }
    }
    left = half;
  }
  __syncthreads();
}

class ExactSum {
 public:
  __device__ __forceinline__ void add(double x) { sum_ += x; }
  __device__ __forceinline__ double value() const { return sum_; }

 private:
  double sum_ = 0;
};

// The class sums of the classes that one thread keeps to, in registers.
template <class Sum, int kClasses>
class ClassSums {
 public:
  template <class Number>
  __device__ __forceinline__ void add(int v, bool is_positive, Number pull) {
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      if (kClasses > 1 && k != v) continue;
      if (is_positive) {
        sums_[kPositiveSum][k].add(pull);
      } else {
        sums_[kNegativeSum][k].add(pull);
      }
    }
  }
  __device__ __forceinline__ double value(int row, int k) const { return sums_[row][k].value(); }

 private:
  Sum sums_[kClassSumRows][kClasses];
};

// loss_partials: [slots of all blocks]. sum_partials: [2, classes, slots of the blocks of one tile of classes].
struct FocalPartials {
  double* losses;
  double* sums;
  int64_t first_block;
  int64_t first_slot;
  int64_t slots;
};

template <class T, bool kAcross, bool kSums>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kSums>)
    focal_forward_kernel(FocalStream stream, FocalPartials partials) {
  constexpr int kClasses = FocalWalk<kAcross>::kClasses;
  RSL_DYNAMIC_SHARED(shared);
  __shared__ double scratch[kWarpsPerBlock];
  const FocalWalk<kAcross> walk(stream);
  const FocalBlock<kAcross> block(stream, walk, shared);
  CompensatedSum loss_sum;
  double exact_sum = 0;
  ClassSums<CompensatedSum, kClasses> class_sums;
  ClassSums<ExactSum, kClasses> exact_class_sums;
  walk.for_places(
      [&](const FocalStreamLevel& level, const FocalPlace& place) {
        unsigned exact = (1u << place.count) - 1;
        if constexpr (sizeof(T) == sizeof(float)) {
          const FocalQuad quad = load_quad<kAcross>(stream, level, place, walk.first_class());
          const bool has_weights = level.weights.data != nullptr;
          exact = 0;
#pragma unroll
          for (int v = 0; v < kQuad; ++v) {
            if ((quad.valid >> v & 1) == 0) continue;
            TwoFloat loss;
            float slope = 0;
            bool is_done = weighted_loss(block, place, quad, v, has_weights, &loss);
            if constexpr (kSums) is_done = is_done && weighted_slope(block, place, quad, v, 1, &slope);
            if (is_done) {
              loss_sum.add(loss);
              if constexpr (kSums) class_sums.add(v, (quad.positive >> v & 1) != 0, TwoFloat{fabsf(slope), 0});
            } else {
              exact |= 1u << v;
            }
          }
        }
        return exact;
      },
      [&](const FocalStreamLevel& level, const FocalPlace& place, int v) {
        FocalElement element;
        bool is_positive;
        if (!block.exact(level, place, v, &element, &is_positive)) return;
        exact_sum += element.loss;
        if constexpr (kSums) exact_class_sums.add(v, is_positive, fabs(element.slope));
      });

  const double sum = block_sum(loss_sum.value() + exact_sum, scratch);
  if (threadIdx.x == 0) partials.losses[partials.first_block + blockIdx.x] = sum;
  if constexpr (kSums) {
    // Behind the barriers of the sum nobody reads the tables any more.
    double* const cells = reinterpret_cast<double*>(shared);
#pragma unroll
    for (int row = 0; row < kClassSumRows; ++row) {
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        cells[(row * kClasses + k) * blockDim.x + threadIdx.x] = class_sums.value(row, k) + exact_class_sums.value(row, k);
      }
    }
    const int units = stream.is_maps ? 1 : stream.units;
    add_up_lanes<kClassSumRows * kClasses>(cells, stream.lanes, walk.lane(), units);
    const int64_t slot = partials.first_slot + static_cast<int>(blockIdx.x) / stream.class_tiles;
    for (int c = static_cast<int>(threadIdx.x); c < walk.classes(); c += static_cast<int>(blockDim.x)) {
#pragma unroll
      for (int row = 0; row < kClassSumRows; ++row) {
        partials.sums[(row * static_cast<int64_t>(stream.classes) + walk.first_class() + c) * partials.slots + slot] =
            cells[(row * kClasses + c % kClasses) * blockDim.x + c / kClasses];
      }
    }
  }
}

// A warp per number: the loss, then the class sums.
__global__ void __launch_bounds__(kThreads, 4)
    focal_combine_kernel(const double* loss_partials, int64_t blocks, const double* sum_partials, int64_t slots, int sums,
                         const void* normalizer, Type normalizer_type, double scale, void* loss, Type loss_type,
                         double* class_sums) {
  for (int entry = grid_warp(); entry <= sums; entry += grid_warps()) {
    const double* const partials = entry == 0 ? loss_partials : sum_partials + (entry - 1) * slots;
    const int64_t count = entry == 0 ? blocks : slots;
    double sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += partials[i];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp != 0) continue;
    if (entry > 0) {
      class_sums[entry - 1] = sum;
      continue;
    }
    const double divided = normalizer == nullptr ? scale : scale / load_as_double(normalizer, normalizer_type, 0);
    if (loss_type == Type::kDouble) {
      *static_cast<double*>(loss) = divided * sum;
    } else {
      *static_cast<float*>(loss) = static_cast<float>(divided * sum);
    }
  }
}

// kGradients: dL/dz times the factor and what arrives for each element, else the loss times the factor.
template <class T, bool kAcross, bool kGradients>
__global__ void __launch_bounds__(kThreads, kBlocks<T, false>) focal_elements_kernel(FocalStream stream) {
  RSL_DYNAMIC_SHARED(shared);
  const FocalWalk<kAcross> walk(stream);
  const FocalBlock<kAcross> block(stream, walk, shared);
  const double factor = stream.factor();
  walk.for_places(
      [&](const FocalStreamLevel& level, const FocalPlace& place) {
        unsigned exact = (1u << place.count) - 1;
        if constexpr (sizeof(T) == sizeof(float)) {
          const int64_t stride = kAcross ? 1 : place.element_stride;
          const FocalQuad quad = load_quad<kAcross>(stream, level, place, walk.first_class());
          float upstream[kQuad] = {1, 1, 1, 1};
          if (kGradients && level.grads.data != nullptr) {
            numbers_of(load_raw<kQuad>(level.grads, place.element, place.count, stride), level.grads.type, upstream);
          }
          const TwoFloat factor_parts = two_float(factor);
          const bool has_weights = level.weights.data != nullptr;
          float results[kQuad] = {0, 0, 0, 0};
          exact = 0;
#pragma unroll
          for (int v = 0; v < kQuad; ++v) {
            if ((quad.valid >> v & 1) == 0) continue;
            bool is_done;
            if constexpr (kGradients) {
              is_done = weighted_slope(block, place, quad, v, factor_parts.high * upstream[v], &results[v]);
            } else {
              TwoFloat loss;
              is_done = weighted_loss(block, place, quad, v, has_weights, &loss);
              const bool is_zero = loss.high == 0;
              loss = product_of(loss, factor_parts);
              results[v] = loss.high + loss.low;
              const float size = fabsf(results[v]);
              is_done = is_done && fabsf(factor_parts.high) < kLargestLoss &&
                        (is_zero || (size > kSmallestLoss && size < kLargestLoss));
            }
            if (!is_done) exact |= 1u << v;
          }
          store_numbers(level.outputs, place.element, place.count, results, stride);
        }
        return exact;
      },
      [&](const FocalStreamLevel& level, const FocalPlace& place, int v) {
        const int64_t at = place.element + v * place.element_stride;
        double upstream = factor;
        if (kGradients && level.grads.data != nullptr) upstream *= load_as_double(level.grads.data, level.grads.type, at);
        FocalElement element;
        bool is_positive;
        double result = 0;
        if (block.exact(level, place, v, &element, &is_positive)) {
          result = upstream * (kGradients ? element.slope : element.loss);
        }
        store_as(level.outputs, at, result);
      });
}

// How a problem is cut into classes, tiles and blocks; the same for all of its launches.
struct FocalShape {
  bool is_double;
  bool is_across;
  bool is_maps;
  int units;
  int lanes;
  int block;
  int class_tiles;
  int64_t most_blocks;  // of one tile of classes
  int64_t shared;       // bytes
};

// Rows of one class lie in memory as places do.
bool is_maps(const FocalProblem& problem) {
  bool has_inner = problem.classes == 1;
  for (int i = 0; i < problem.num_levels; ++i) has_inner = has_inner || problem.levels[i].inner > 1;
  return has_inner;
}

// In float32 where nothing that is streamed is wider.
bool is_double(const FocalProblem& problem) {
  bool is_wide = problem.logits_type == Type::kDouble;
  for (int i = 0; i < problem.num_levels; ++i) {
    const FocalDeviceLevel& level = problem.levels[i];
    is_wide = is_wide || level.targets_type == Type::kDouble ||
              (level.weights != nullptr && level.weights_type == Type::kDouble) ||
              (level.qualities != nullptr && level.qualities_type == Type::kDouble) ||
              (level.grads != nullptr && level.grads_type == Type::kDouble);
  }
  return is_wide;
}

FocalShape focal_shape(const FocalProblem& problem, bool class_sums, const DeviceLimits& limits) {
  FocalShape shape = {};
  shape.is_double = is_double(problem);
  shape.is_maps = is_maps(problem);
  shape.is_across = !shape.is_double && !shape.is_maps && problem.classes % kQuad == 0;
  const int64_t all_units = shape.is_across ? problem.classes / kQuad : problem.classes;
  // Sums in registers take one class per thread.
  const int64_t most_units = !shape.is_maps ? kThreads : class_sums ? 1 : kMapClasses;
  shape.class_tiles = static_cast<int>(ceil_div(all_units, most_units));
  shape.units = static_cast<int>(ceil_div(all_units, shape.class_tiles));
  shape.block = kThreads;
  shape.lanes = kThreads;
  if (!shape.is_maps) {
    // As few threads as possible without classes.
    for (int block = kThreads; block >= kThreads / 2; block -= kWarp) {
      const int used = block / shape.units * shape.units, best = shape.block / shape.units * shape.units;
      if (used * shape.block > best * block) shape.block = block;
    }
    shape.lanes = shape.block / shape.units;
  }
  const int classes = shape.is_across ? kQuad : 1;
  const int64_t tables = static_cast<int64_t>(sizeof(TwoFloat)) * ExponentialTable::kEntries +
                         2 * classes * shape.units * static_cast<int64_t>(sizeof(HardClass));
  const int64_t cells = class_sums ? kClassSumRows * classes * shape.block * static_cast<int64_t>(sizeof(double)) : 0;
  shape.shared = std::max(tables, cells);
  const int64_t resident =
      limits.processors * static_cast<int64_t>(shape.is_double || class_sums ? kBlocks<double, true> : kBlocks<float, false>);
  shape.most_blocks = std::max<int64_t>(1, resident / shape.class_tiles);
  return shape;
}

// Levels [first, ...) as one launch sees them; *next: the first one of the launch behind it. Those of nothing are left out.
FocalStream focal_stream(const FocalProblem& problem, const FocalShape& shape, int first, int* next) {
  FocalStream stream = {};
  stream.is_maps = shape.is_maps;
  stream.class_tiles = shape.class_tiles;
  stream.classes = static_cast<int>(problem.classes);
  stream.units = shape.units;
  stream.lanes = shape.lanes;
  stream.labels = problem.labels;
  stream.class_table = problem.class_table;
  stream.modulator = problem.modulator;
  stream.normalizer = problem.normalizer;
  stream.normalizer_type = problem.normalizer_type;
  stream.grad = problem.grad;
  stream.grad_type = problem.grad_type;
  stream.scale = problem.scale;
  int i = first;
  for (; i < problem.num_levels && stream.num_levels < kMostFocalLevels; ++i) {
    const FocalDeviceLevel& level = problem.levels[i];
    if (level.outer * level.inner == 0) continue;
    FocalStreamLevel& at = stream.levels[stream.num_levels++];
    at.logits = column_of(level.logits, problem.logits_type);
    at.targets = column_of(level.targets, level.targets_type);
    at.qualities = column_of(level.qualities, level.qualities_type);
    at.weights = column_of(level.weights, level.weights_type);
    at.grads = column_of(level.grads, level.grads_type);
    at.outputs = column_of(level.outputs, problem.logits_type);
    at.weights_by_row = level.weights_by_row;
    // With one class everything is one row of places.
    const int64_t outer = problem.classes == 1 ? 1 : level.outer;
    at.inner = problem.classes == 1 ? level.outer * level.inner : level.inner;
    if (at.inner % kQuad != 0 && outer * problem.classes > 1) {
      // Quads of places do not start at multiples of four.
      for (Column* column : {&at.logits, &at.targets, &at.weights, &at.grads, &at.outputs}) {
        column->is_aligned = column->is_aligned && shape.is_across;
      }
    }
    at.rows = shape.is_maps ? outer * ceil_div(at.inner, kQuad) : outer;
    at.first_tile = stream.tiles;
    const int64_t rows_of_tile =
        shape.is_maps ? shape.lanes : static_cast<int64_t>(shape.lanes) * kRowSteps * (shape.is_across ? 1 : kQuad);
    stream.tiles += ceil_div(at.rows, rows_of_tile);
  }
  while (i < problem.num_levels && problem.levels[i].outer * problem.levels[i].inner == 0) ++i;
  *next = i;
  return stream;
}

// Calls body(stream, blocks per tile of classes) for every launch.
template <class Body>
cudaError_t for_launches(const FocalProblem& problem, const FocalShape& shape, Body body) {
  for (int first = 0; first < problem.num_levels;) {
    int next;
    const FocalStream stream = focal_stream(problem, shape, first, &next);
    first = next;
    if (stream.tiles > 0) RSL_RETURN_IF_ERROR(body(stream, std::min(stream.tiles, shape.most_blocks)));
  }
  return cudaSuccess;
}

struct FocalSlots {
  int64_t blocks = 0;
  int64_t of_tile = 0;
};
FocalSlots count_slots(const FocalProblem& problem, const FocalShape& shape) {
  FocalSlots slots;
  for_launches(problem, shape, [&](const FocalStream&, int64_t blocks) {
    slots.blocks += blocks * shape.class_tiles;
    slots.of_tile += blocks;
    return cudaSuccess;
  });
  return slots;
}

// Calls body(T, whether classes lie across).
template <class Body>
cudaError_t dispatch(const FocalShape& shape, Body body) {
  if (shape.is_double) return body(double{}, std::false_type{});
  return shape.is_across ? body(float{}, std::true_type{}) : body(float{}, std::false_type{});
}

cudaError_t launch_forward(const FocalShape& shape, const FocalStream& stream, int64_t grid, const FocalPartials& partials,
                           bool class_sums, cudaStream_t cuda_stream) {
  return dispatch(shape, [&](auto type, auto across) {
    using T = decltype(type);
    constexpr bool kAcross = decltype(across)::value;
    const auto kernel = class_sums ? focal_forward_kernel<T, kAcross, true> : focal_forward_kernel<T, kAcross, false>;
    return launch(kernel, grid, shape.block, shape.shared, cuda_stream, stream, partials);
  });
}

template <bool kGradients>
cudaError_t launch_elements(const FocalProblem& problem, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const FocalShape shape = focal_shape(problem, false, limits);
  return for_launches(problem, shape, [&](const FocalStream& levels, int64_t blocks) {
    return dispatch(shape, [&](auto type, auto across) {
      return launch(focal_elements_kernel<decltype(type), decltype(across)::value, kGradients>, blocks * shape.class_tiles,
                    shape.block, shape.shared, stream, levels);
    });
  });
}

}  // namespace

cudaError_t focal_forward_workspace_bytes(const FocalProblem& problem, bool class_sums, int64_t* bytes) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const FocalSlots slots = count_slots(problem, focal_shape(problem, class_sums, limits));
  Workspace workspace(nullptr);
  workspace.take<double>(slots.blocks);
  if (class_sums) workspace.take<double>(kClassSumRows * problem.classes * slots.of_tile);
  *bytes = workspace.bytes();
  return cudaSuccess;
}

cudaError_t launch_focal_forward(const FocalProblem& problem, void* loss, double* class_sums, void* workspace,
                                 cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const bool has_sums = class_sums != nullptr;
  const FocalShape shape = focal_shape(problem, has_sums, limits);
  const FocalSlots slots = count_slots(problem, shape);
  const int sums = has_sums ? static_cast<int>(kClassSumRows * problem.classes) : 0;
  Workspace space(workspace);
  FocalPartials partials = {};
  partials.slots = slots.of_tile;
  partials.losses = space.take<double>(slots.blocks);
  partials.sums = space.take<double>(sums * slots.of_tile);
  RSL_RETURN_IF_ERROR(for_launches(problem, shape, [&](const FocalStream& levels, int64_t blocks) {
    RSL_RETURN_IF_ERROR(launch_forward(shape, levels, blocks * shape.class_tiles, partials, has_sums, stream));
    partials.first_block += blocks * shape.class_tiles;
    partials.first_slot += blocks;
    return cudaSuccess;
  }));
  const Type loss_type = problem.logits_type == Type::kDouble ? Type::kDouble : Type::kFloat;
  const int64_t grid = resident_grid(ceil_div(sums + 1, kWarpsPerBlock), limits);
  return launch(focal_combine_kernel, grid, kThreads, 0, stream, partials.losses, slots.blocks, partials.sums, slots.of_tile,
                sums, problem.normalizer, problem.normalizer_type, problem.scale, loss, loss_type, class_sums);
}

cudaError_t launch_focal_elements(const FocalProblem& problem, cudaStream_t stream) {
  return launch_elements<false>(problem, stream);
}

cudaError_t launch_focal_backward(const FocalProblem& problem, cudaStream_t stream) {
  return launch_elements<true>(problem, stream);
}

}  // namespace rsloss
