// The ranking sweep on a GPU: collect positives, rank them, bin the negatives, and the gradient pass. The number of launches
// depends on the number of tensors alone. Streaming passes: targets once in collect, logits once in bin and once in backward.
#include "ranking/ranking_device.cuh"

namespace rsloss {
namespace {

constexpr int kStreamThreads = 1024;

// ---- collect
// -------------------------------------------------------------------------------------------------------------------

constexpr int kWordBits = 64;
// A block takes tiles of one mask word per thread.
constexpr int64_t kTileWords = kThreads;

struct WordBits {
  uint64_t negative;
  uint64_t positive;
};

// Bits [from, to) of a word, 0 <= from < to <= 64.
__device__ __forceinline__ uint64_t bit_range(int64_t from, int64_t to) {
  return (~uint64_t{0} >> (kWordBits - (to - from))) << from;
}

// Classes of the targets of one mask word. Dense: by a whole warp (loads of 32 neighbours), `word` uniform.
template <class Target>
__device__ __forceinline__ WordBits dense_word(const CollectLevel& level, int64_t word) {
  const Target* targets = static_cast<const Target*>(level.targets);
  WordBits bits = {0, 0};
  for (int half = 0; half < kWordBits / kWarp; ++half) {
    const int64_t element = word * kWordBits + half * kWarp + threadIdx.x % kWarp;
    const auto value = element < level.elements ? widen(targets[element]) : -1;
    const uint64_t negative = __ballot_sync(kAllLanes, value == 0);
    // A NaN is a positive of no use, which makes the losses NaN.
    const uint64_t positive = __ballot_sync(kAllLanes, value > 0 || isnan(value));
    bits.negative |= negative << (half * kWarp);
    bits.positive |= positive << (half * kWarp);
  }
  return bits;
}

// Class indices: one thread reads the label of every row that reaches into the word.
template <class Label>
__device__ __forceinline__ WordBits label_word(const CollectLevel& level, bool background_first, int64_t word) {
  const Label* labels = static_cast<const Label*>(level.targets);
  const int64_t first = word * kWordBits;
  const int64_t last = first + kWordBits < level.elements ? first + kWordBits : level.elements;
  WordBits bits = {0, 0};
  int64_t row = first / level.classes;
  for (int64_t start = row * level.classes; start < last; start += level.classes, ++row) {
    const int64_t label = labels[row];
    if (label < 0) continue;
    const int64_t from = start > first ? start : first;
    const int64_t to = start + level.classes < last ? start + level.classes : last;
    bits.negative |= bit_range(from - first, to - first);
    const int64_t column = label - (background_first ? 1 : 0);
    // A label above the classes is background; it is never used as an address.
    if (column < 0 || column >= level.classes) continue;
    const int64_t element = start + column;
    if (element >= first && element < last) bits.positive |= uint64_t{1} << (element - first);
  }
  bits.negative &= ~bits.positive;
  return bits;
}

__device__ __forceinline__ int64_t words_of(const CollectLevel& level) { return (level.elements + kWordBits - 1) / kWordBits; }

// Reads the targets once, writes the mask (elements / 8 bytes) and two counts per block. A block owns a contiguous run of
// tiles, so that the blocks' counts, scanned in order, are the places of its positives.
template <class Target, bool kDense>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_mask_kernel(CollectLevel level, bool background_first, int64_t* block_positives, int64_t* block_negatives) {
  __shared__ int64_t scratch[kWarpsPerBlock];
  const int64_t words = words_of(level);
  const int64_t tiles = (words + kTileWords - 1) / kTileWords;
  const Share<int64_t> share(tiles, blockIdx.x, gridDim.x);
  int64_t positives = 0;
  int64_t negatives = 0;
  for (int64_t tile = share.first; tile < share.last; ++tile) {
    const int64_t word = tile * kTileWords + threadIdx.x;
    WordBits bits = {0, 0};
    if constexpr (kDense) {
      const int lane = threadIdx.x % kWarp;
#pragma unroll 4
      for (int other = 0; other < kWarp && word - lane + other < words; ++other) {
        const WordBits found = dense_word<Target>(level, word - lane + other);
        if (other == lane) bits = found;
      }
    } else if (word < words) {
      bits = label_word<Target>(level, background_first, word);
    }
    if (word < words) level.negatives[word] = bits.negative;
    positives += __popcll(bits.positive);
    negatives += __popcll(bits.negative);
  }
  int64_t total;
  block_exclusive_scan(positives, scratch, &total);
  if (threadIdx.x == 0) block_positives[blockIdx.x] = total;
  block_exclusive_scan(negatives, scratch, &total);
  if (threadIdx.x == 0) block_negatives[blockIdx.x] = total;
}

// One block: 16 bytes read and 8 written per block of the mask kernel. block_positives becomes its exclusive scan.
__global__ void __launch_bounds__(kStreamThreads, 1)
    ranking_count_kernel(int blocks, int64_t* block_positives, const int64_t* block_negatives, int64_t* counts) {
  __shared__ int64_t scratch[kStreamThreads / kWarp];
  const Share<int> share(blocks, threadIdx.x, blockDim.x);
  int64_t positives = 0;
  int64_t negatives = 0;
  for (int block = share.first; block < share.last; ++block) {
    positives += block_positives[block];
    negatives += block_negatives[block];
  }
  int64_t total_positives;
  int64_t total_negatives;
  int64_t before = block_exclusive_scan(positives, scratch, &total_positives);
  block_exclusive_scan(negatives, scratch, &total_negatives);
  for (int block = share.first; block < share.last; ++block) {
    const int64_t here = block_positives[block];
    block_positives[block] = before;
    before += here;
  }
  if (threadIdx.x == 0) {
    block_positives[blocks] = total_positives;
    counts[kFound] = total_positives;
    counts[kNegatives] = total_negatives;
  }
}

__device__ __forceinline__ void write_padding(double* records, int64_t column, int64_t capacity) {
  records[kLogit * capacity + column] = NAN;
  records[kQuality * capacity + column] = 0;
  records[kSegment * capacity + column] = 0;
  records[kIndex * capacity + column] = -1;
}

// Writes 32 bytes per unused column.
__global__ void __launch_bounds__(kThreads, 4) ranking_pad_kernel(const int64_t* counts, int64_t capacity, double* positives) {
  for (int64_t column = used_columns(counts, capacity) + grid_thread(); column < capacity; column += grid_threads()) {
    write_padding(positives, column, capacity);
  }
}

// Reads the mask (elements / 8 bytes) in blocks that found positives, and once more the targets of those words that are not all
// negatives; writes 32 bytes per positive. offsets: the scanned counts of this level's blocks.
template <class Target, bool kDense>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_collect_kernel(CollectLevel level, bool background_first, const int64_t* offsets, int64_t capacity,
                           double* positives) {
  __shared__ int64_t scratch[kWarpsPerBlock];
  int64_t base = offsets[blockIdx.x];
  if (base == offsets[blockIdx.x + 1]) return;
  const int64_t words = words_of(level);
  const int64_t tiles = (words + kTileWords - 1) / kTileWords;
  const Share<int64_t> share(tiles, blockIdx.x, gridDim.x);
  for (int64_t tile = share.first; tile < share.last && base < capacity; ++tile) {
    const int64_t word = tile * kTileWords + threadIdx.x;
    const bool has_others = word < words && ~level.negatives[word] != 0;
    uint64_t positive = 0;
    if constexpr (kDense) {
      const int lane = threadIdx.x % kWarp;
      unsigned todo = __ballot_sync(kAllLanes, has_others);
      while (todo != 0) {
        const int other = __ffs(static_cast<int>(todo)) - 1;
        todo &= todo - 1;
        const WordBits found = dense_word<Target>(level, word - lane + other);
        if (other == lane) positive = found.positive;
      }
    } else if (has_others) {
      positive = label_word<Target>(level, background_first, word).positive;
    }
    int64_t total;
    int64_t slot = base + block_exclusive_scan<int64_t>(__popcll(positive), scratch, &total);
    base += total;
    for (; positive != 0 && slot < capacity; positive &= positive - 1, ++slot) {
      const int64_t element = word * kWordBits + __ffsll(static_cast<long long>(positive)) - 1;
      double quality = 1;
      if constexpr (kDense) {
        quality = widen(static_cast<const Target*>(level.targets)[element]);
      } else if (level.quality != nullptr) {
        quality = load_as_double(level.quality, level.quality_type, element / level.classes);
      }
      const double logit = load_as_double(level.logits, level.logits_type, element);
      const bool is_valid = isfinite(logit) && isfinite(quality);
      positives[kLogit * capacity + slot] = is_valid ? logit : NAN;
      positives[kQuality * capacity + slot] = quality;
      positives[kSegment * capacity + slot] = 0;
      positives[kIndex * capacity + slot] = static_cast<double>(level.first_index + element);
    }
  }
}

// Calls run.operator()<Target, kDense>() for the type of the targets.
template <class Run>
cudaError_t dispatch_targets(Type type, Run run) {
  switch (type) {
    case Type::kHalf:
      return run.template operator()<__half, true>();
    case Type::kBFloat16:
      return run.template operator()<__nv_bfloat16, true>();
    case Type::kFloat:
      return run.template operator()<float, true>();
    case Type::kDouble:
      return run.template operator()<double, true>();
    case Type::kInt32:
      return run.template operator()<int32_t, false>();
    default:
      return run.template operator()<int64_t, false>();
  }
}

// As many blocks as are resident at once, each with at least one tile: more would only lengthen the scan of their counts.
int64_t collect_grid(const CollectLevel& level, const DeviceLimits& limits) {
  return resident_grid(ceil_div(level.elements, kWordBits * kTileWords), limits);
}

struct LaunchMask {
  const CollectLevel& level;
  int64_t grid;
  bool background_first;
  int64_t* block_positives;
  int64_t* block_negatives;
  cudaStream_t stream;

  template <class Target, bool kDense>
  cudaError_t operator()() const {
    return launch(ranking_mask_kernel<Target, kDense>, grid, kThreads, 0, stream, level, background_first, block_positives,
                  block_negatives);
  }
};

struct LaunchCollect {
  const CollectLevel& level;
  int64_t grid;
  bool background_first;
  const int64_t* offsets;
  int64_t capacity;
  double* positives;
  cudaStream_t stream;

  template <class Target, bool kDense>
  cudaError_t operator()() const {
    return launch(ranking_collect_kernel<Target, kDense>, grid, kThreads, 0, stream, level, background_first, offsets, capacity,
                  positives);
  }
};

struct CollectWorkspace {
  int64_t* block_positives;  // [blocks + 1]
  int64_t* block_negatives;  // [blocks]

  CollectWorkspace(Workspace* workspace, int64_t blocks)
      : block_positives(workspace->take<int64_t>(blocks + 1)), block_negatives(workspace->take<int64_t>(blocks)) {}
};

}  // namespace

cudaError_t collect_workspace_bytes(const CollectLevel* levels, int num_levels, int64_t* bytes) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  int64_t blocks = 0;
  for (int i = 0; i < num_levels; ++i) blocks += collect_grid(levels[i], limits);
  Workspace workspace(nullptr);
  CollectWorkspace(&workspace, blocks);
  *bytes = workspace.bytes();
  return cudaSuccess;
}

cudaError_t launch_ranking_collect(const CollectLevel* levels, int num_levels, bool background_first, int64_t capacity,
                                   double* positives, int64_t* counts, void* workspace, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  int64_t blocks = 0;
  for (int i = 0; i < num_levels; ++i) blocks += collect_grid(levels[i], limits);
  Workspace memory(workspace);
  const CollectWorkspace tables(&memory, blocks);

  int64_t first_block = 0;
  for (int i = 0; i < num_levels; ++i) {
    const int64_t grid = collect_grid(levels[i], limits);
    if (grid == 0) continue;
    RSL_RETURN_IF_ERROR(dispatch_targets(levels[i].targets_type,
                                         LaunchMask{levels[i], grid, background_first, tables.block_positives + first_block,
                                                    tables.block_negatives + first_block, stream}));
    first_block += grid;
  }
  RSL_RETURN_IF_ERROR(launch(ranking_count_kernel, 1, kStreamThreads, 0, stream, blocks, tables.block_positives,
                             tables.block_negatives, counts));
  if (capacity == 0) return cudaSuccess;
  const int64_t pad_grid = resident_grid(ceil_div(capacity, kThreads), limits);
  RSL_RETURN_IF_ERROR(launch(ranking_pad_kernel, pad_grid, kThreads, 0, stream, counts, capacity, positives));
  first_block = 0;
  for (int i = 0; i < num_levels; ++i) {
    const int64_t grid = collect_grid(levels[i], limits);
    if (grid == 0) continue;
    RSL_RETURN_IF_ERROR(dispatch_targets(
        levels[i].targets_type,
        LaunchCollect{levels[i], grid, background_first, tables.block_positives + first_block, capacity, positives, stream}));
    first_block += grid;
  }
  return cudaSuccess;
}

// ---- rank and breakpoints
// ------------------------------------------------------------------------------------------------------

namespace {

// -1, 0 or 1; NaN stands after every number.
__device__ __forceinline__ int compare(double a, double b) {
  if (a < b) return -1;
  if (a > b) return 1;
  return static_cast<int>(isnan(a)) - static_cast<int>(isnan(b));
}

// The place of every positive is the number of those before it by (logit, quality, flat index), counted by one warp: about P^2
// / 32 loads from cache, no sort. Reads 8 bytes per pair and moves 32 bytes per positive; pads the rest, clears the bins (32
// bytes per column).
__global__ void __launch_bounds__(kThreads, 4)
    ranking_rank_kernel(const double* positives, const int64_t* counts, int64_t capacity, double* ranked, int64_t* bins) {
  const int used = used_columns(counts, capacity);
  const double* logit = positives + kLogit * capacity;
  const double* quality = positives + kQuality * capacity;
  const int lane = threadIdx.x % kWarp;
  for (int i = grid_warp(); i < used; i += grid_warps()) {
    const double own = logit[i];
    int before = 0;
    for (int j = lane; j < used; j += kWarp) {
      const double other = logit[j];
      // The cheap test settles almost every pair; a NaN on either side fails it and takes the long way.
      if (other > own) continue;
      int order = other < own ? -1 : compare(other, own);
      if (order == 0) order = compare(quality[j], quality[i]);
      // Columns are in the order of the flat index.
      before += order < 0 || (order == 0 && j < i);
    }
    const int place = warp_sum(before);
    if (lane < kRecordRows) ranked[lane * capacity + place] = positives[lane * capacity + i];
  }
  const int thread = static_cast<int>(grid_thread());
  const int threads = static_cast<int>(grid_threads());
  // Unrolling these would only cost registers.
#pragma unroll 1
  for (int column = used + thread; column < capacity; column += threads) write_padding(ranked, column, capacity);
#pragma unroll 1
  for (int k = thread; k < 2 * capacity + 1; k += threads) bins[k] = bins[2 * capacity + 1 + k] = 0;
}

// A merge of two ascending lists by ranks: the place of lo_i is i plus the hi before it, and the other way round. Equal: lo
// first. Reads log2(V) cached doubles per positive, writes 8 + 2 sizeof(T) bytes.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_breakpoints_kernel(const double* ranked, const int64_t* counts, int64_t capacity, double delta,
                               Breakpoints<T> breakpoints) {
  const int valid = valid_positives(ranked, counts, capacity);
  for (int i = static_cast<int>(grid_thread()); i < valid; i += static_cast<int>(grid_threads())) {
    const T lo = round_up_sum<T>(ranked[i], -delta);
    const T hi = round_up_sum<T>(ranked[i], delta);
    const int lo_slot = i + partition_point(valid, [=](int j) { return round_up_sum<T>(ranked[j], delta) >= lo; });
    const int hi_slot = i + partition_point(valid, [=](int j) { return round_up_sum<T>(ranked[j], -delta) > hi; });
    breakpoints.edges[lo_slot] = lo;
    breakpoints.edges[hi_slot] = hi;
    breakpoints.lo_slot[i] = lo_slot;
    breakpoints.hi_slot[i] = hi_slot;
  }
}

// One block, a suffix sum of the 2V counts: reads and writes 16 bytes per breakpoint.
__global__ void __launch_bounds__(kStreamThreads, 1)
    ranking_count_from_slot_kernel(const double* ranked, const int64_t* counts, const int64_t* bins, int64_t capacity,
                                   int64_t* from_slot) {
  __shared__ int64_t scratch[kStreamThreads / kWarp];
  const int edges = 2 * valid_positives(ranked, counts, capacity);
  const Share<int> share(edges, threadIdx.x, blockDim.x);
  int64_t own = 0;
  for (int k = share.first; k < share.last; ++k) own += bins[k + 1];
  int64_t total;
  int64_t rest = -block_exclusive_scan(own, scratch, &total);
  rest += total;
  for (int k = share.first; k < share.last; ++k) {
    from_slot[k] = rest;
    rest -= bins[k + 1];
  }
  if (threadIdx.x == 0) from_slot[edges] = 0;
}

// ---- streaming passes
// ----------------------------------------------------------------------------------------------------------

template <class Element, int kVector>
struct alignas(sizeof(Element) * kVector) Pack {
  Element values[kVector];
};

// 16 bytes per thread and load.
template <class Element>
constexpr int kFullVector = 16 / sizeof(Element);

// Elements [group * kVector, ...) and their mask bits; behind the end zeros.
template <class Element, int kVector>
struct Group {
  Pack<Element, kVector> pack;
  unsigned negative;

  __device__ __forceinline__ void load(const Element* elements, const uint8_t* negatives, int64_t count, int64_t group) {
    const int64_t first = group * kVector;
    negative = 0;
    if (first >= count) return;
    negative = (negatives[first / 8] >> (first % 8)) & ((1u << kVector) - 1);
    if (first + kVector <= count) {
      pack = *reinterpret_cast<const Pack<Element, kVector>*>(elements + first);
      return;
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (first + v < count) {
        pack.values[v] = elements[first + v];
      } else {
        negative &= ~(1u << v);
      }
    }
  }
};

// Finds the last of `count` ascending edges at or below a value in about one step: a uniform grid of cells between the first
// and the last edge narrows it to the edges of one cell, bisection does the rest. cell() is monotone, and the same operations
// place values and edges, so this is exact whatever the rounding. starts[c] = number of edges in cells before c.
constexpr int kCells = 4096;
constexpr int kStartsBytes = (kCells + 4) * static_cast<int>(sizeof(uint32_t));

// T: type of values; Stored: type of the edges, which hold values of T.
template <class T, class Stored>
struct Locator {
  const Stored* edges;
  uint32_t* starts;  // shared, [kCells + 1]
  T first;
  T scale;

  __device__ __forceinline__ int cell(T value) const {
    const T position = (value - first) * scale;
    // inf * 0 belongs to the last cell: such a value lies above every edge of another cell.
    return position < static_cast<T>(kCells - 1) ? static_cast<int>(position) : kCells - 1;
  }

  // By all threads of a block; count > 0. Ends with a barrier.
  __device__ __forceinline__ void build(const Stored* sorted, int count, void* shared) {
    edges = sorted;
    starts = static_cast<uint32_t*>(shared);
    first = static_cast<T>(edges[0]);
    scale = static_cast<T>(kCells) / (static_cast<T>(edges[count - 1]) - first);
    for (int c = threadIdx.x; c <= kCells; c += blockDim.x) {
      starts[c] = static_cast<uint32_t>(partition_point(count, [&](int k) { return cell(static_cast<T>(edges[k])) >= c; }));
    }
    __syncthreads();
  }

  // value >= first
  __device__ __forceinline__ int find(T value) const {
    const int at = cell(value);
    int low = static_cast<int>(starts[at]);
    int high = static_cast<int>(starts[at + 1]);
    while (low < high) {
      const int middle = (low + high) / 2;
      if (static_cast<T>(edges[middle]) <= value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low - 1;
  }
};

// 64-bit sums in shared memory as two halves, because a native 64-bit atomic does not exist there (it is a compare-and-swap
// loop). A wrap of the low half carries into the high one. fixed_point_bits() keeps the sum of all elements below 2^63, so
// neither the high half nor, below 2^32 elements per block, the count ever wraps.
struct SharedSums {
  uint32_t* low;
  uint32_t* high;

  __device__ SharedSums(void* memory, int entries) : low(static_cast<uint32_t*>(memory)), high(low + entries) {}
  __device__ __forceinline__ void clear(int entry) const { low[entry] = high[entry] = 0; }
  __device__ __forceinline__ void add(int entry, uint64_t offset) const {
    const uint32_t add_low = static_cast<uint32_t>(offset);
    const uint32_t before = atomicAdd(&low[entry], add_low);
    const uint32_t carry = before + add_low < before ? 1 : 0;
    const uint32_t add_high = static_cast<uint32_t>(offset >> 32) + carry;
    if (add_high != 0) atomicAdd(&high[entry], add_high);
  }
  __device__ __forceinline__ uint64_t get(int entry) const { return (static_cast<uint64_t>(high[entry]) << 32) + low[entry]; }
};

__device__ __forceinline__ void add_to_bin(int64_t* bin, uint64_t value) {
  if (value != 0) atomicAdd(reinterpret_cast<unsigned long long*>(bin), static_cast<unsigned long long>(value));
}

constexpr int kMaxReplicas = 32;
constexpr int64_t kBinBytes = sizeof(uint64_t) + sizeof(uint32_t);  // sum and count

// Bytes of shared memory for the bins of `edges` breakpoints in `replicas` copies, with the edges themselves and the cells.
template <class T>
RSL_HOST_DEVICE int64_t bin_shared_bytes(int64_t edges, int64_t replicas) {
  return kStartsBytes + edges * (replicas * kBinBytes + static_cast<int64_t>(sizeof(T)));
}

// kUnroll groups are loaded before any is used: with one block of 1024 threads per processor 32 KiB are in flight.
constexpr int kUnroll = 2;

// Calls add(k, offset) for every negative at or above the first edge: k is the edge left of it, offset its fixed-point distance
// from there. Returns the thread's number of NaN negatives. num_edges = 0: counts those only.
template <class Element, int kVector, class Located, class Add>
__device__ __forceinline__ uint64_t stream_negatives(const Element* logits, const uint8_t* negatives, int64_t elements,
                                                     const Located& locator, int num_edges, double scale, double most,
                                                     Add add) {
  using T = Arithmetic<Element>;
  unsigned nans = 0;
  const int64_t groups = (elements + kVector - 1) / kVector;
  for (int64_t group = grid_thread(); group < groups; group += kUnroll * grid_threads()) {
    Group<Element, kVector> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u].load(logits, negatives, elements, group + u * grid_threads());
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if ((loaded[u].negative >> v & 1) == 0) continue;
        const T value = widen(loaded[u].pack.values[v]);
        if (isnan(value)) ++nans;
        if (num_edges == 0 || !(value >= locator.first)) continue;
        const int k = locator.find(value);
        const double distance = static_cast<double>(value) - static_cast<double>(locator.edges[k]);
        add(k, static_cast<uint64_t>(fixed_point_offset(distance, scale, most)));
      }
    }
  }
  return nans;
}

// Streams the logits (sizeof(Element) + 1/8 bytes per element) and adds every negative at or above the first edge to its bin,
// in shared memory; adds the block's bins to the global ones (2 atomics per non-empty bin). Small tables are replicated: lanes
// of a warp that meet in one bin (P = 1: all of them) would queue up. Tables that do not fit go to the global bins element by
// element.
template <class Element, int kVector>
__global__ void __launch_bounds__(kStreamThreads, 1)
    ranking_bin_kernel(const Element* logits, const uint8_t* negatives, int64_t elements, const double* ranked,
                       const int64_t* counts, int64_t capacity, Breakpoints<Arithmetic<Element>> breakpoints, double scale,
                       double most, int shared_bytes, int64_t* bins) {
  using T = Arithmetic<Element>;
  RSL_DYNAMIC_SHARED(memory);
  int64_t* const bin_counts = bins + 1;
  int64_t* const bin_sums = bins + (2 * capacity + 1) + 1;
  const int num_edges = 2 * valid_positives(ranked, counts, capacity);
  int replicas = num_edges > 0 ? kMaxReplicas : 0;
  while (replicas > 0 && bin_shared_bytes<T>(num_edges, replicas) > shared_bytes) replicas /= 2;
  Locator<T, T> locator = {};
  if (replicas == 0) {
    if (num_edges > 0) locator.build(breakpoints.edges, num_edges, memory);
    const auto add = [=](int k, uint64_t offset) {
      add_to_bin(bin_counts + k, 1);
      add_to_bin(bin_sums + k, offset);
    };
    add_to_bin(bins, stream_negatives<Element, kVector>(logits, negatives, elements, locator, num_edges, scale, most, add));
    return;
  }

  const int entries = replicas * num_edges;
  const SharedSums sums(memory, entries);
  T* const edges = reinterpret_cast<T*>(memory + sizeof(uint64_t) * entries);
  uint32_t* const shared_counts = reinterpret_cast<uint32_t*>(edges + num_edges);
#pragma unroll 1
  for (int k = threadIdx.x; k < entries; k += blockDim.x) {
    sums.clear(k);
    shared_counts[k] = 0;
    if (k < num_edges) edges[k] = breakpoints.edges[k];
  }
  __syncthreads();
  locator.build(edges, num_edges, shared_counts + entries);
  const int replica = static_cast<int>(threadIdx.x % replicas) * num_edges;
  const auto add = [=](int k, uint64_t offset) {
    atomicAdd(&shared_counts[replica + k], 1u);
    sums.add(replica + k, offset);
  };
  add_to_bin(bins, stream_negatives<Element, kVector>(logits, negatives, elements, locator, num_edges, scale, most, add));
  __syncthreads();
#pragma unroll 1
  for (int k = threadIdx.x; k < num_edges; k += blockDim.x) {
    uint64_t count = 0;
    uint64_t sum = 0;
#pragma unroll 1
    for (int r = 0; r < replicas; ++r) {
      count += shared_counts[r * num_edges + k];
      sum += sums.get(r * num_edges + k);
    }
    add_to_bin(bin_counts + k, count);
    add_to_bin(bin_sums + k, sum);
  }
}

// The lines of the gradient in the type they are evaluated in.
template <class T, class Stored>
struct Lines {
  Locator<T, Stored> locator;
  const Stored* values;
  const Stored* slopes;
  int count;

  __device__ __forceinline__ T operator()(T value) const {
    if (isnan(value)) return value;
    if (count == 0 || !(value >= locator.first)) return 0;
    const int k = locator.find(value);
    // At +inf the last line is flat; its distance would be inf * 0.
    const T distance = isinf(value) ? T(0) : value - static_cast<T>(locator.edges[k]);
    return static_cast<T>(values[k]) + static_cast<T>(slopes[k]) * distance;
  }
};

// Streams the logits and writes the gradient of one tensor: (2 sizeof(Element) + 1/8) bytes per element.
template <class Element, int kVector, class Gradient>
__device__ __forceinline__ void stream_gradient(const Element* logits, const uint8_t* negatives, int64_t elements,
                                                Gradient gradient_of, Element* gradients) {
  const int64_t groups = (elements + kVector - 1) / kVector;
  for (int64_t group = grid_thread(); group < groups; group += kUnroll * grid_threads()) {
    Group<Element, kVector> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u].load(logits, negatives, elements, group + u * grid_threads());
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = (group + u * grid_threads()) * kVector;
      if (first >= elements) continue;
      Pack<Element, kVector> out;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        narrow(gradient_of(widen(loaded[u].pack.values[v]), (loaded[u].negative >> v & 1) != 0), &out.values[v]);
      }
      if (first + kVector <= elements) {
        *reinterpret_cast<Pack<Element, kVector>*>(gradients + first) = out;
      } else {
        // Unrolled, so that the pack stays in registers.
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (first + v < elements) gradients[first + v] = out.values[v];
        }
      }
    }
  }
}

template <class T>
RSL_HOST_DEVICE int64_t lines_shared_bytes(int64_t count) {
  return kStartsBytes + kLineRows * static_cast<int64_t>(sizeof(T)) * count;
}

// Gradient of every element but the positives, which ranking_scatter_kernel writes next. The lines live in shared memory where
// they fit (3 sizeof(T) bytes per breakpoint), else they are read from the lines themselves, in double.
template <class Element, int kVector>
__global__ void __launch_bounds__(kStreamThreads, 1)
    ranking_backward_kernel(const Element* logits, const uint8_t* negatives, int64_t elements, const double* lines,
                            const int64_t* counts, int64_t capacity, const Arithmetic<Element>* upstream, int shared_bytes,
                            Element* gradients) {
  using T = Arithmetic<Element>;
  RSL_DYNAMIC_SHARED(memory);
  if (counts[kFound] > capacity) {
    stream_gradient<Element, kVector>(logits, negatives, elements, [](T, bool) { return static_cast<T>(NAN); }, gradients);
    return;
  }
  const int count = 2 * used_columns(counts, capacity);
  const T factor = upstream == nullptr ? T(0) : *upstream;
  if (count == 0 || lines_shared_bytes<T>(count) <= shared_bytes) {
    T* const table = reinterpret_cast<T*>(memory + kStartsBytes);
    for (int k = threadIdx.x; k < kLineRows * count; k += blockDim.x) {
      table[k] = static_cast<T>(lines[k / count * 2 * capacity + k % count]);
    }
    __syncthreads();
    Lines<T, T> of = {{}, table + kValue * count, table + kSlope * count, count};
    if (count > 0) of.locator.build(table, count, memory);
    stream_gradient<Element, kVector>(
        logits, negatives, elements, [=](T value, bool is_negative) { return is_negative ? of(value) * factor : T(0); },
        gradients);
  } else {
    Lines<T, double> of = {{}, lines + kValue * 2 * capacity, lines + kSlope * 2 * capacity, count};
    of.locator.build(lines, count, memory);
    stream_gradient<Element, kVector>(
        logits, negatives, elements, [=](T value, bool is_negative) { return is_negative ? of(value) * factor : T(0); },
        gradients);
  }
}

// Gradient of the positives of one tensor: reads 24 bytes per positive of the batch, writes one element each.
template <class Element>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_scatter_kernel(const double* table, const int64_t* counts, int64_t capacity, const Arithmetic<Element>* grad_first,
                           const Arithmetic<Element>* grad_second, int64_t elements, int64_t first_index, Element* gradients) {
  if (counts[kFound] > capacity) return;
  const double first = grad_first == nullptr ? 0 : *grad_first;
  const double second = grad_second == nullptr ? 0 : *grad_second;
  const int used = used_columns(counts, capacity);
  for (int64_t column = grid_thread(); column < used; column += grid_threads()) {
    const int64_t element = static_cast<int64_t>(table[kGradientIndex * capacity + column]) - first_index;
    if (element < 0 || element >= elements) continue;
    const double gradient = table[kFirst * capacity + column] * first + table[kSecond * capacity + column] * second;
    narrow(static_cast<Arithmetic<Element>>(gradient), &gradients[element]);
  }
}

// One block per processor, or as many as its threads and shared memory hold: tables are set up once per block and the logits
// are walked in strides of the grid. Small inputs take a block per kUnroll groups of threads.
int64_t stream_grid(int64_t elements, int vector, int64_t shared_bytes, const DeviceLimits& limits) {
  // A block's own bookkeeping takes 1 KiB of the processor's shared memory.
  const int64_t resident = std::max<int64_t>(
      1, std::min<int64_t>(limits.threads_per_processor / kStreamThreads, limits.shared_per_processor / (shared_bytes + 1024)));
  return std::min(ceil_div(elements, static_cast<int64_t>(vector) * kUnroll * kStreamThreads), limits.processors * resident);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class Element>
cudaError_t launch_bin_typed(const LogitsLevel* levels, int num_levels, const double* positives, const int64_t* counts,
                             int64_t capacity, double delta, double* ranked, int64_t* bins, void* workspace,
                             cudaStream_t stream) {
  using T = Arithmetic<Element>;
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  Workspace memory(workspace);
  const auto breakpoints = Breakpoints<T>::take(&memory, capacity);
  // A warp per positive; at least one block, because the bins have an entry without any capacity.
  const int64_t grid = std::max<int64_t>(1, resident_grid(ceil_div(capacity, kWarpsPerBlock), limits));
  RSL_RETURN_IF_ERROR(launch(ranking_rank_kernel, grid, kThreads, 0, stream, positives, counts, capacity, ranked, bins));
  if (capacity > 0) RSL_RETURN_IF_ERROR(launch_breakpoints<T>(ranked, counts, capacity, delta, breakpoints, stream));

  int64_t elements = 0;
  for (int i = 0; i < num_levels; ++i) elements += levels[i].elements;
  const int bits = fixed_point_bits(elements);
  const double unit = fixed_point_unit(delta, bits);
  const double scale = unit > 0 ? 1 / unit : 0;
  const double most = std::ldexp(1.0, bits) - 1;
  const int64_t shared = std::min<int64_t>(limits.shared_per_block, bin_shared_bytes<T>(2 * capacity, kMaxReplicas));
  for (int i = 0; i < num_levels; ++i) {
    const LogitsLevel& level = levels[i];
    if (level.elements == 0) continue;
    const bool is_vector = is_aligned(level.logits);
    const auto kernel = is_vector ? ranking_bin_kernel<Element, kFullVector<Element>> : ranking_bin_kernel<Element, 1>;
    const int64_t stream_blocks = stream_grid(level.elements, is_vector ? kFullVector<Element> : 1, shared, limits);
    RSL_RETURN_IF_ERROR(launch(kernel, stream_blocks, kStreamThreads, shared, stream, static_cast<const Element*>(level.logits),
                               level.negatives, level.elements, ranked, counts, capacity, breakpoints, scale, most,
                               static_cast<int>(shared), bins));
  }
  return cudaSuccess;
}

template <class Element>
cudaError_t launch_backward_typed(const BackwardLevel* levels, int num_levels, const double* gradients, const double* lines,
                                  const int64_t* counts, int64_t capacity, const void* grad_first, const void* grad_second,
                                  cudaStream_t stream) {
  using T = Arithmetic<Element>;
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const T* const first = static_cast<const T*>(grad_first);
  const T* const second = static_cast<const T*>(grad_second);
  const int64_t shared = std::min<int64_t>(limits.shared_per_block, lines_shared_bytes<T>(2 * capacity));
  const int64_t scatter_grid = resident_grid(ceil_div(capacity, kThreads), limits);
  for (int i = 0; i < num_levels; ++i) {
    const BackwardLevel& level = levels[i];
    if (level.elements == 0) continue;
    const bool is_vector = is_aligned(level.logits) && is_aligned(level.gradient);
    const auto kernel =
        is_vector ? ranking_backward_kernel<Element, kFullVector<Element>> : ranking_backward_kernel<Element, 1>;
    const int64_t grid = stream_grid(level.elements, is_vector ? kFullVector<Element> : 1, shared, limits);
    Element* const out = static_cast<Element*>(level.gradient);
    RSL_RETURN_IF_ERROR(launch(kernel, grid, kStreamThreads, shared, stream, static_cast<const Element*>(level.logits),
                               level.negatives, level.elements, lines, counts, capacity, first, static_cast<int>(shared), out));
    if (scatter_grid == 0) continue;
    RSL_RETURN_IF_ERROR(launch(ranking_scatter_kernel<Element>, scatter_grid, kThreads, 0, stream, gradients, counts, capacity,
                               first, second, level.elements, level.first_index, out));
  }
  return cudaSuccess;
}

}  // namespace

template <class T>
cudaError_t launch_breakpoints(const double* ranked, const int64_t* counts, int64_t capacity, double delta,
                               Breakpoints<T> breakpoints, cudaStream_t stream) {
  // A thread per positive of the capacity; there are few.
  return launch(ranking_breakpoints_kernel<T>, ceil_div(capacity, kThreads), kThreads, 0, stream, ranked, counts, capacity,
                delta, breakpoints);
}

template cudaError_t launch_breakpoints<float>(const double*, const int64_t*, int64_t, double, Breakpoints<float>,
                                               cudaStream_t);
template cudaError_t launch_breakpoints<double>(const double*, const int64_t*, int64_t, double, Breakpoints<double>,
                                                cudaStream_t);

cudaError_t launch_count_from_slot(const double* ranked, const int64_t* counts, const int64_t* bins, int64_t capacity,
                                   int64_t* from_slot, cudaStream_t stream) {
  return launch(ranking_count_from_slot_kernel, 1, kStreamThreads, 0, stream, ranked, counts, bins, capacity, from_slot);
}

int64_t bin_workspace_bytes(Type logits_type, int64_t capacity) {
  Workspace workspace(nullptr);
  if (logits_type == Type::kDouble) {
    Breakpoints<double>::take(&workspace, capacity);
  } else {
    Breakpoints<float>::take(&workspace, capacity);
  }
  return workspace.bytes();
}

cudaError_t launch_ranking_bin(const LogitsLevel* levels, int num_levels, Type logits_type, const double* positives,
                               const int64_t* counts, int64_t capacity, double delta, double* ranked, int64_t* bins,
                               void* workspace, cudaStream_t stream) {
  const auto typed = logits_type == Type::kHalf       ? launch_bin_typed<__half>
                     : logits_type == Type::kBFloat16 ? launch_bin_typed<__nv_bfloat16>
                     : logits_type == Type::kFloat    ? launch_bin_typed<float>
                                                      : launch_bin_typed<double>;
  return typed(levels, num_levels, positives, counts, capacity, delta, ranked, bins, workspace, stream);
}

cudaError_t launch_ranking_backward(const BackwardLevel* levels, int num_levels, Type logits_type, const double* gradients,
                                    const double* lines, const int64_t* counts, int64_t capacity, const void* grad_first,
                                    const void* grad_second, cudaStream_t stream) {
  const auto typed = logits_type == Type::kHalf       ? launch_backward_typed<__half>
                     : logits_type == Type::kBFloat16 ? launch_backward_typed<__nv_bfloat16>
                     : logits_type == Type::kFloat    ? launch_backward_typed<float>
                                                      : launch_backward_typed<double>;
  return typed(levels, num_levels, gradients, lines, counts, capacity, grad_first, grad_second, stream);
}

}  // namespace rsloss
