// How the passes stream over the levels: four elements per thread and step, with their targets, weights and which of them
// count.
//
// A block keeps to one tile of classes. Of rows [outer, classes] a thread keeps to its classes while the block walks down the
// rows: four neighbours of one row where the number of classes is a multiple of 4 ("across"), else one class in four rows. Of
// maps [outer, classes, inner] it keeps to four neighbouring places and steps through the classes of its tile.
#pragma once

#include "common/quads.cuh"
#include "focal/focal_kernels.cuh"

namespace rsloss {

// Rows that a thread visits, in quads, before the block turns to other rows.
constexpr int kRowSteps = 4;
// Classes of a tile of maps.
constexpr int kMapClasses = 8;

// A level as its kernels see it.
struct FocalStreamLevel {
  Column logits;
  Column targets;
  Column qualities;  // data null: none
  Column weights;    // data null: 1
  Column grads;      // data null: those of all elements are in the factor
  Column outputs;
  bool weights_by_row;
  int64_t rows;        // of rows; of maps: quads of places, outer * inner_quads
  int64_t inner;       // of maps
  int64_t first_tile;  // tiles of rows are numbered through all levels

  __device__ __forceinline__ bool has_labels() const { return targets.type == Type::kInt32 || targets.type == Type::kInt64; }
};

struct FocalStream {
  FocalStreamLevel levels[kMostFocalLevels];
  int num_levels;
  bool is_maps;
  int64_t tiles;  // of rows, of all levels
  int class_tiles;
  int classes;  // of the problem
  int units;    // classes of a tile, in quads where they lie across
  int lanes;    // threads of a block that have the same classes
  LabelRule labels;
  const double* class_table;
  FocalModulator modulator;
  const void* normalizer;
  Type normalizer_type;
  const void* grad;
  Type grad_type;
  double scale;

  __device__ __forceinline__ double factor() const {
    const double divided = normalizer == nullptr ? scale : scale / load_as_double(normalizer, normalizer_type, 0);
    return grad == nullptr ? divided : divided * load_as_double(grad, grad_type, 0);
  }
};

// Where four elements are.
struct FocalPlace {
  int64_t element;
  int64_t element_stride;
  int64_t row;  // of labels, qualities, weights by row
  int64_t row_stride;
  int count;
  int unit;  // class, or quad of classes, within the tile
};

// The elements of a step. valid, positive: bits; positive is what the label says, whatever the quality, or a target above 0.
struct FocalQuad {
  float logits[kQuad];
  float targets[kQuad];
  float weights[kQuad];
  unsigned valid;
  unsigned positive;
};

template <bool kAcross>
class FocalWalk {
 public:
  // Classes of one thread at a time.
  static constexpr int kClasses = kAcross ? kQuad : 1;

  __device__ __forceinline__ explicit FocalWalk(const FocalStream& stream)
      : stream_(stream),
        thread_(static_cast<int>(threadIdx.x)),
        unit_(stream.is_maps ? 0 : thread_ % stream.units),
        lane_(stream.is_maps ? thread_ : thread_ / stream.units),
        tile_(static_cast<int>(blockIdx.x) % stream.class_tiles) {}

  __device__ __forceinline__ int first_class() const { return tile_ * stream_.units * kClasses; }
  // Of this tile; the last one may have fewer.
  __device__ __forceinline__ int classes() const {
    const int left = stream_.classes - first_class();
    const int whole = stream_.units * kClasses;
    return left < whole ? left : whole;
  }
  __device__ __forceinline__ int unit() const { return unit_; }
  __device__ __forceinline__ int lane() const { return lane_; }

  // Calls visit(level, place) for every step of this thread, which returns the elements, as bits, that revisit(level, place, v)
  // is called for afterwards: rare elements in a loop of their own, which needs other registers.
  template <class Visit, class Revisit>
  __device__ __forceinline__ void for_places(Visit visit, Revisit revisit) const {
    if (lane_ >= stream_.lanes || unit_ * kClasses >= classes()) return;
    int level = 0;
    const int64_t blocks = gridDim.x / static_cast<unsigned>(stream_.class_tiles);
    for (int64_t tile = static_cast<int>(blockIdx.x) / stream_.class_tiles; tile < stream_.tiles; tile += blocks) {
      while (level + 1 < stream_.num_levels && stream_.levels[level + 1].first_tile <= tile) ++level;
      const FocalStreamLevel& at = stream_.levels[level];
      const Tile of_tile =
          !kAcross && stream_.is_maps ? map_tile(at, tile - at.first_tile) : row_tile(at, tile - at.first_tile);
      uint64_t rare = 0;
#pragma unroll 1
      for (int step = 0; step < of_tile.steps; ++step) {
        rare |= static_cast<uint64_t>(visit(at, place_in(of_tile, step))) << (kQuad * step);
      }
#pragma unroll 1
      for (; rare != 0; rare &= rare - 1) {
        const int bit = __ffsll(static_cast<long long>(rare)) - 1;
        revisit(at, place_in(of_tile, bit / kQuad), bit % kQuad);
      }
    }
  }

 private:
  // The steps of a thread in a tile: where the first one is, and how far it is to the next.
  struct Tile {
    int64_t element;
    int64_t next_element;
    int64_t row;
    int64_t rows_left;  // behind the first row of the first step
    int steps;
  };

  __device__ __forceinline__ Tile row_tile(const FocalStreamLevel& level, int64_t tile) const {
    const int64_t rows_of_step = static_cast<int64_t>(stream_.lanes) * (kAcross ? 1 : kQuad);
    Tile of;
    of.row = tile * kRowSteps * rows_of_step + lane_;
    of.rows_left = level.rows - of.row;
    of.element = of.row * stream_.classes + first_class() + unit_ * kClasses;
    of.next_element = rows_of_step * stream_.classes;
    of.steps = 0;
#pragma unroll
    for (int step = 0; step < kRowSteps; ++step) of.steps += of.rows_left > step * rows_of_step;
    return of;
  }

  __device__ __forceinline__ Tile map_tile(const FocalStreamLevel& level, int64_t tile) const {
    const int64_t quad = tile * stream_.lanes + lane_;
    const int64_t quads = (level.inner + kQuad - 1) / kQuad;
    // A division of 64 bits costs several of 32.
    const int64_t outer = static_cast<uint64_t>(quad | quads) >> 32 == 0
                              ? static_cast<int64_t>(static_cast<uint32_t>(quad) / static_cast<uint32_t>(quads))
                              : quad / quads;
    const int64_t inner = (quad - outer * quads) * kQuad;
    Tile of;
    of.row = outer * level.inner + inner;
    of.rows_left = level.inner - inner;
    of.element = (outer * stream_.classes + first_class()) * level.inner + inner;
    of.next_element = level.inner;
    of.steps = quad < level.rows ? classes() : 0;
    return of;
  }

  __device__ __forceinline__ FocalPlace place_in(const Tile& tile, int step) const {
    FocalPlace place;
    place.element = tile.element + step * tile.next_element;
    place.element_stride = 1;
    place.row = tile.row;
    place.row_stride = 1;
    place.count = tile.rows_left < kQuad ? static_cast<int>(tile.rows_left) : kQuad;
    place.unit = step;
    if (kAcross || !stream_.is_maps) {
      const int64_t lanes = stream_.lanes;
      place.row += step * lanes * (kAcross ? 1 : kQuad);
      place.unit = unit_;
      place.count = kQuad;
      place.row_stride = kAcross ? 0 : lanes;
      if constexpr (!kAcross) {
        place.element_stride = lanes * stream_.classes;
        const int64_t left = tile.rows_left - step * lanes * kQuad;
        if (left <= 3 * lanes) place.count = static_cast<int>((left - 1) / lanes) + 1;
      }
    }
    return place;
  }

  const FocalStream& stream_;
  int thread_;
  int unit_;
  int lane_;
  int tile_;
};

// Column of a row's label, kBackgroundRow or kIgnoredRow.
__device__ __forceinline__ int column_of_row(const FocalStream& stream, const FocalStreamLevel& level, int64_t row) {
  return static_cast<int>(labelled_column(stream.labels, load_label(level.targets, row)));
}

// Of columns that are no wider than float32.
template <bool kAcross>
__device__ __forceinline__ FocalQuad load_quad(const FocalStream& stream, const FocalStreamLevel& level,
                                               const FocalPlace& place, int first_class) {
  constexpr int kWords = kQuad;
  const bool has_labels = level.has_labels();
  const bool has_weights = level.weights.data != nullptr;
  const int64_t stride = kAcross ? 1 : place.element_stride;
  const RawQuad<kWords> raw_logits = load_raw<kWords>(level.logits, place.element, place.count, stride);
  FocalQuad quad;
  quad.valid = (1u << place.count) - 1;
  quad.positive = 0;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    quad.weights[v] = 1;
    quad.targets[v] = 0;
  }
  if (has_weights) {
    if (!level.weights_by_row) {
      numbers_of(load_raw<kWords>(level.weights, place.element, place.count, stride), level.weights.type, quad.weights);
    } else if constexpr (kAcross) {
      const float weight = load_number<float>(level.weights, place.row);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) quad.weights[v] = weight;
    } else {
      numbers_of(load_raw<kWords>(level.weights, place.row, place.count, place.row_stride), level.weights.type, quad.weights);
    }
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      if (quad.weights[v] == 0) quad.valid &= ~(1u << v);
    }
  }
  const int first = first_class + place.unit * (kAcross ? kQuad : 1);
  if (!has_labels) {
    numbers_of(load_raw<kWords>(level.targets, place.element, place.count, stride), level.targets.type, quad.targets);
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      if (quad.targets[v] > 0) quad.positive |= 1u << v;
    }
  } else if constexpr (kAcross) {
    const int column = column_of_row(stream, level, place.row);
    if (column == kIgnoredRow) quad.valid = 0;
    if (column >= first && column < first + kQuad) quad.positive = 1u << (column - first);
  } else {
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      if (v >= place.count) continue;
      const int column = column_of_row(stream, level, place.row + v * place.row_stride);
      if (column == kIgnoredRow) quad.valid &= ~(1u << v);
      if (column == first) quad.positive |= 1u << v;
    }
  }
  if (has_labels && quad.positive != 0) {
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      if ((quad.positive >> v & 1) == 0) continue;
      quad.targets[v] = level.qualities.data == nullptr
                            ? 1.0f
                            : load_number<float>(level.qualities, place.row + v * (kAcross ? 0 : place.row_stride));
    }
  }
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    if (quad.targets[v] < 0) quad.valid &= ~(1u << v);
  }
  numbers_of(raw_logits, level.logits.type, quad.logits);
  return quad;
}

// One element, loaded by itself.
struct FocalNumbers {
  double logit;
  double target;
  double weight;
  bool is_valid;
  bool is_positive;
};

// Element v of a place, of class c.
__device__ __forceinline__ FocalNumbers load_element(const FocalStream& stream, const FocalStreamLevel& level,
                                                     const FocalPlace& place, int v, int c) {
  const int64_t at = place.element + v * place.element_stride;
  const int64_t row = place.row + v * place.row_stride;
  FocalNumbers numbers;
  numbers.logit = load_as_double(level.logits.data, level.logits.type, at);
  numbers.weight = 1;
  if (level.weights.data != nullptr) {
    numbers.weight = load_as_double(level.weights.data, level.weights.type, level.weights_by_row ? row : at);
  }
  numbers.is_valid = true;
  if (level.has_labels()) {
    const int column = column_of_row(stream, level, row);
    numbers.is_valid = column != kIgnoredRow;
    numbers.is_positive = column == c;
    numbers.target = !numbers.is_positive              ? 0
                     : level.qualities.data == nullptr ? 1
                                                       : load_as_double(level.qualities.data, level.qualities.type, row);
  } else {
    numbers.target = load_as_double(level.targets.data, level.targets.type, at);
    numbers.is_positive = numbers.target > 0;
  }
  if (numbers.target < 0) numbers.is_valid = false;
  return numbers;
}

}  // namespace rsloss
