// Collects the positives and the mask of the negatives: one pass over the targets that counts, a scan of the blocks' counts,
// and a pass over those words that hold positives.
#include "common/map_cursor.cuh"
#include "ranking/ranking_device.cuh"
#include "ranking/ranking_segments.cuh"

namespace rsloss {
namespace {

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

// Class indices of a map: by a whole warp like dense targets, as neighbours have labels that are neighbours. `cursor` stands at
// the lane's first element of the word, and behind it at that of the next word.
template <class Label>
__device__ __forceinline__ WordBits map_word(const CollectLevel& level, bool background_first, int64_t word,
                                             MapCursor* cursor) {
  const Label* labels = static_cast<const Label*>(level.targets);
  WordBits bits = {0, 0};
  for (int half = 0; half < kWordBits / kWarp; ++half) {
    const bool is_inside = word * kWordBits + half * kWarp + static_cast<int>(threadIdx.x % kWarp) < level.elements;
    const int64_t label = is_inside ? labels[cursor->row()] : -1;
    const bool is_positive = is_inside && label == cursor->column() + (background_first ? 1 : 0);
    const uint64_t negative = __ballot_sync(kAllLanes, label >= 0 && !is_positive);
    const uint64_t positive = __ballot_sync(kAllLanes, is_positive);
    bits.negative |= negative << (half * kWarp);
    bits.positive |= positive << (half * kWarp);
    cursor->skip(kWarp);
  }
  return bits;
}

// Class indices of rows: one thread reads the label of every row that reaches into the word.
template <class Label>
__device__ __forceinline__ WordBits label_word(const CollectLevel& level, bool background_first, int64_t word) {
  const Label* labels = static_cast<const Label*>(level.targets);
  const int64_t first = word * kWordBits;
  const int64_t last = first + kWordBits < level.elements ? first + kWordBits : level.elements;
  WordBits bits = {0, 0};
  const int64_t classes = level.shape.classes;
  int64_t row = first / classes;
  for (int64_t start = row * classes; start < last; start += classes, ++row) {
    const int64_t label = labels[row];
    if (label < 0) continue;
    const int64_t from = start > first ? start : first;
    const int64_t to = start + classes < last ? start + classes : last;
    bits.negative |= bit_range(from - first, to - first);
    const int64_t column = label - (background_first ? 1 : 0);
    // A label above the classes is background; it is never used as an address.
    if (column < 0 || column >= classes) continue;
    const int64_t element = start + column;
    if (element >= first && element < last) bits.positive |= uint64_t{1} << (element - first);
  }
  bits.negative &= ~bits.positive;
  return bits;
}

// Takes the bits of elements whose segment is ignored away.
__device__ __forceinline__ WordBits drop_ignored(const CollectLevel& level, int64_t word, WordBits bits) {
  if (level.segments.ids == nullptr || (bits.negative | bits.positive) == 0) return bits;
  const int64_t first = word * kWordBits;
  const int64_t last = level.elements - first < kWordBits ? level.elements - first : kWordBits;
  SegmentCursor cursor(level.segments, first);
  uint64_t kept = 0;
  for (int64_t at = 0; at < last;) {
    const int64_t run = cursor.run() < last - at ? cursor.run() : last - at;
    if (cursor.id() >= 0) kept |= bit_range(at, at + run);
    cursor.skip(run);
    at += run;
  }
  return {bits.negative & kept, bits.positive & kept};
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
    } else if (level.shape.places > 1) {
      const int lane = threadIdx.x % kWarp;
      MapCursor cursor(level.shape, (word - lane) * kWordBits + lane);
      for (int other = 0; other < kWarp && word - lane + other < words; ++other) {
        const WordBits found = map_word<Target>(level, background_first, word - lane + other, &cursor);
        if (other == lane) bits = found;
      }
    } else if (word < words) {
      bits = label_word<Target>(level, background_first, word);
    }
    if (word < words) {
      bits = drop_ignored(level, word, bits);
      level.negatives[word] = bits.negative;
    }
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
__global__ void __launch_bounds__(kLargeBlock, 1) ranking_count_kernel(int blocks, int64_t elements, int64_t* block_positives,
                                                                       const int64_t* block_negatives, int64_t* counts) {
  __shared__ int64_t scratch[kLargeBlock / kWarp];
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
    counts[kElements] = elements;
  }
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
    WordBits bits = {0, 0};
    if (kDense || level.shape.places > 1) {
      const int lane = threadIdx.x % kWarp;
      unsigned todo = __ballot_sync(kAllLanes, has_others);
      while (todo != 0) {
        const int other = __ffs(static_cast<int>(todo)) - 1;
        todo &= todo - 1;
        WordBits found;
        if constexpr (kDense) {
          found = dense_word<Target>(level, word - lane + other);
        } else {
          MapCursor cursor(level.shape, (word - lane + other) * kWordBits + lane);
          found = map_word<Target>(level, background_first, word - lane + other, &cursor);
        }
        if (other == lane) bits = found;
      }
    } else if constexpr (!kDense) {
      if (has_others) bits = label_word<Target>(level, background_first, word);
    }
    uint64_t positive = word < words ? drop_ignored(level, word, bits).positive : 0;
    int64_t total;
    int64_t slot = base + block_exclusive_scan<int64_t>(__popcll(positive), scratch, &total);
    base += total;
    for (; positive != 0 && slot < capacity; positive &= positive - 1, ++slot) {
      const int64_t element = word * kWordBits + __ffsll(static_cast<long long>(positive)) - 1;
      double quality = 1;
      if constexpr (kDense) {
        quality = widen(static_cast<const Target*>(level.targets)[element]);
      } else if (level.quality != nullptr) {
        quality = load_as_double(level.quality, level.quality_type, level.shape.row(element));
      }
      const double logit = load_as_double(level.logits, level.logits_type, element);
      const bool is_valid = isfinite(logit) && isfinite(quality);
      positives[kLogit * capacity + slot] = is_valid ? logit : NAN;
      positives[kQuality * capacity + slot] = quality;
      positives[kSegment * capacity + slot] = level.segments.count == 1 ? 0 : SegmentCursor(level.segments, element).id();
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
  int64_t elements = 0;
  for (int i = 0; i < num_levels; ++i) {
    blocks += collect_grid(levels[i], limits);
    elements += levels[i].elements;
  }
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
  RSL_RETURN_IF_ERROR(launch(ranking_count_kernel, 1, kLargeBlock, 0, stream, blocks, elements, tables.block_positives,
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

}  // namespace rsloss
