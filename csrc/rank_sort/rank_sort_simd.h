// Sums of H over pairs of positives, all or by prefix sums, compiled once per instruction set
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

// Moves members of a position below `middle` to the front, the others behind them; both stay ascending by rank. Returns the
// number of the former.
static int64_t split_members(Member* members, int64_t count, int32_t middle, Member* scratch) {
  int64_t worse = 0, better = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Member member = members[i];
    const bool is_worse = member.position < middle;
    members[worse] = member;
    scratch[better] = member;
    worse += is_worse;
    better += !is_worse;
  }
  __builtin_memcpy(members + worse, scratch, static_cast<size_t>(better) * sizeof(Member));
  return worse;
}

// How many of the `count` members ascending by rank come before `rank`, at least `from`.
static inline int64_t advance(const Member* members, int64_t count, int64_t from, int32_t rank) {
  while (from < count && members[from].rank < rank) ++from;
  return from;
}

// Splits a node of the tree; adds to its better half the sums of H and of H times quality over the worse half. prefix: [count
// rows of 4].
static int64_t split_adding_worse(Member* members, int64_t count, int32_t middle, double slope, Member* scratch,
                                  double* prefix) {
  const int64_t worse = split_members(members, count, middle, scratch);
  FourDoubles sum = {};
  store_vector(prefix, sum);
  for (int64_t k = 0; k < worse; ++k) {
    const Member& source = members[k];
    sum += FourDoubles{1, source.value, source.offset, source.offset * source.value};
    store_vector(prefix + 4 * (k + 1), sum);
  }
  int64_t low = 0, high = 0;
  for (int64_t i = worse; i < count; ++i) {
    Member& member = members[i];
    low = advance(members, worse, low, member.lower);
    high = advance(members, worse, high, member.upper);
    const FourDoubles above = sum - load_vector<FourDoubles>(prefix + 4 * high);
    const FourDoubles inside = load_vector<FourDoubles>(prefix + 4 * high) - load_vector<FourDoubles>(prefix + 4 * low);
    member.sum += above[0] + 0.5 * inside[0] + (inside[2] - inside[0] * member.offset) * slope;
    member.product += above[1] + 0.5 * inside[1] + (inside[3] - inside[1] * member.offset) * slope;
  }
  return worse;
}

// Splits a node; adds to its worse half the sum over the better half of its value times H, seen from there.
static int64_t split_adding_pull(Member* members, int64_t count, int32_t middle, double slope, Member* scratch,
                                 double* prefix) {
  const int64_t worse = split_members(members, count, middle, scratch), better = count - worse;
  const Member* sources = members + worse;
  TwoDoubles sum = {};
  store_vector(prefix, sum);
  for (int64_t k = 0; k < better; ++k) {
    sum += TwoDoubles{sources[k].value, sources[k].offset * sources[k].value};
    store_vector(prefix + 2 * (k + 1), sum);
  }
  int64_t low = 0, high = 0;
  for (int64_t i = 0; i < worse; ++i) {
    Member& member = members[i];
    low = advance(sources, better, low, member.lower);
    high = advance(sources, better, high, member.upper);
    const TwoDoubles below = load_vector<TwoDoubles>(prefix + 2 * low);
    const TwoDoubles inside = load_vector<TwoDoubles>(prefix + 2 * high) - below;
    member.product += below[0] + 0.5 * inside[0] - (inside[1] - inside[0] * member.offset) * slope;
  }
  return worse;
}

// For the positions [first, end) of a leaf: sums over the worse ones inside the leaf, [first, group_begin_i).
static void add_worse_in_leaf(const double* s, const double* y, const int32_t* group_begin, int32_t first, int32_t end,
                              double slope, double* worse, double* worse_quality) {
  for (int32_t p = first; p < end; ++p) {
    const PairSums sums = pair_sums(s[p], 1, slope, s + first, y + first, group_begin[p] - first);
    worse[p] += sums.plain;
    worse_quality[p] += sums.weighted;
  }
}

// The pull of the better ones inside the leaf, [group_end_j, end), on every positive j of it.
static void add_pull_in_leaf(const double* s, const double* weight, const int32_t* group_end, int32_t first, int32_t end,
                             double slope, double* pull) {
  for (int32_t p = first; p < end; ++p) {
    const int32_t from = group_end[p];
    pull[p] += pair_sums(s[p], -1, slope, s + from, weight + from, end - from).weighted;
  }
}
