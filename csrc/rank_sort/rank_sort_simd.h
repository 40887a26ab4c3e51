// Sums of H over pairs of positives and prefix sums over blocks of them, compiled once per instruction set
// (common/for_each_isa.h).

typedef double Doubles __attribute__((vector_size(64)));
typedef double FourDoubles __attribute__((vector_size(32)));
typedef double TwoDoubles __attribute__((vector_size(16)));

template <class Vector>
static inline Vector load_vector(const double* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector>
static inline void store_vector(double* p, const Vector& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// H(x), 8 at a time; slope = 1 / (2 delta), 0 for the hard step.
static inline Doubles step_lanes(const Doubles& x, double slope) {
  const Doubles zero = {}, one = zero + 1.0;
  if (slope == 0) return x >= zero ? one : zero;
  Doubles h = x * slope + 0.5;
  h = h < zero ? zero : h;
  return h > one ? one : h;
}

static inline double add_lanes(const Doubles& v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

// The sum of H(sign (s_k - centre)) and of the same times value_k, over k < count. Reads up to 7 entries beyond count, which
// must be finite.
struct PairSums {
  double plain;
  double weighted;
};

static inline PairSums pair_sums(double centre, double sign, double slope, const double* s, const double* value,
                                 int64_t count) {
  const Doubles lane = {0, 1, 2, 3, 4, 5, 6, 7}, zero = {};
  Doubles plain = {}, weighted = {};
  for (int64_t k = 0; k < count; k += 8) {
    Doubles h = step_lanes((load_vector<Doubles>(s + k) - centre) * sign, slope);
    if (count - k < 8) h = lane < zero + static_cast<double>(count - k) ? h : zero;
    plain += h;
    weighted += h * load_vector<Doubles>(value + k);
  }
  return {add_lanes(plain), add_lanes(weighted)};
}

// prefix: [count + 1, 4 or 2]; row r + 1 adds rows[r] if from <= position[r] < to.
template <class Row>
static void prefix_rows(const double* rows, const int32_t* position, int64_t count, int32_t from, int32_t to, double* prefix) {
  constexpr int kWidth = sizeof(Row) / sizeof(double);
  Row sum = {};
  store_vector(prefix, sum);
  for (int64_t r = 0; r < count; ++r) {
    const bool is_member = position[r] >= from && position[r] < to;
    const Row zero = {};
    sum += is_member ? load_vector<Row>(rows + kWidth * r) : zero;
    store_vector(prefix + kWidth * (r + 1), sum);
  }
}

static void prefix_qualities(const double* rows, const int32_t* position, int64_t count, int32_t from, int32_t to,
                             double* prefix) {
  prefix_rows<FourDoubles>(rows, position, count, from, to, prefix);
}

static void prefix_weights(const double* rows, const int32_t* position, int64_t count, int32_t from, int32_t to,
                           double* prefix) {
  prefix_rows<TwoDoubles>(rows, position, count, from, to, prefix);
}

// For members [begin, end) of one block, by quality: sums over the worse ones inside the block, [first, group_begin_i).
static void add_worse_in_block(const double* s, const double* y, const int32_t* group_begin, const int32_t* rank, int32_t first,
                               int32_t end, double slope, double* worse, double* worse_quality) {
  for (int32_t p = first; p < end; ++p) {
    const PairSums sums = pair_sums(s[p], 1, slope, s + first, y + first, group_begin[p] - first);
    worse[rank[p]] += sums.plain;
    worse_quality[rank[p]] += sums.weighted;
  }
}

// The pull of the better ones inside the block, [group_end_j, end), on every member j.
static void add_pull_in_block(const double* s, const double* weight, const int32_t* group_end, const int32_t* rank,
                              int32_t first, int32_t end, double slope, double* pull) {
  for (int32_t p = first; p < end; ++p) {
    const int32_t from = group_end[p];
    pull[rank[p]] += pair_sums(s[p], -1, slope, s + from, weight + from, end - from).weighted;
  }
}
