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
#if RSL_ISA == 512
  return _mm512_min_pd(_mm512_max_pd(h, zero), one);
#else
  h = h < zero ? zero : h;
  return h > one ? one : h;
#endif
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
// number of the former. No branch and no search depends on the data: bounds among the members of a node become bounds among
// those of a half by the number of worse ones before them.
static int64_t split_members(Member* members, int64_t count, int32_t middle, const NodeRoom& room) {
  int64_t worse = 0, better = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Member member = members[i];
    const bool is_worse = member.position < middle;
    room.worse_before[i] = static_cast<int32_t>(worse);
    members[worse] = member;
    room.scratch[better] = member;
    worse += is_worse;
    better += !is_worse;
  }
  room.worse_before[count] = static_cast<int32_t>(worse);
  __builtin_memcpy(members + worse, room.scratch, static_cast<size_t>(better) * sizeof(Member));
  return worse;
}

// Splits a node of the tree; adds to its better half the sums of H and of H times quality over the worse half.
static int64_t split_adding_worse(Member* members, int64_t count, int32_t middle, double slope, const NodeRoom& room) {
  const int64_t worse = split_members(members, count, middle, room);
  FourDoubles sum = {};
  store_vector(room.prefix, sum);
  for (int64_t k = 0; k < worse; ++k) {
    Member& source = members[k];
    sum += FourDoubles{1, source.value, source.offset, source.offset * source.value};
    store_vector(room.prefix + 4 * (k + 1), sum);
    source.lower = room.worse_before[source.lower];
    source.upper = room.worse_before[source.upper];
  }
  for (int64_t i = worse; i < count; ++i) {
    Member& member = members[i];
    const int32_t low = room.worse_before[member.lower], high = room.worse_before[member.upper];
    const FourDoubles above = sum - load_vector<FourDoubles>(room.prefix + 4 * high);
    const FourDoubles inside =
        load_vector<FourDoubles>(room.prefix + 4 * high) - load_vector<FourDoubles>(room.prefix + 4 * low);
    member.sum += above[0] + 0.5 * inside[0] + (inside[2] - inside[0] * member.offset) * slope;
    member.product += above[1] + 0.5 * inside[1] + (inside[3] - inside[1] * member.offset) * slope;
    member.lower -= low;
    member.upper -= high;
  }
  return worse;
}

// Splits a node; adds to its worse half the sum over the better half of its value times H, seen from there.
static int64_t split_adding_pull(Member* members, int64_t count, int32_t middle, double slope, const NodeRoom& room) {
  const int64_t worse = split_members(members, count, middle, room);
  TwoDoubles sum = {};
  store_vector(room.prefix, sum);
  for (int64_t i = worse; i < count; ++i) {
    Member& source = members[i];
    sum += TwoDoubles{source.value, source.offset * source.value};
    store_vector(room.prefix + 2 * (i - worse + 1), sum);
    source.lower -= room.worse_before[source.lower];
    source.upper -= room.worse_before[source.upper];
  }
  for (int64_t i = 0; i < worse; ++i) {
    Member& member = members[i];
    const int32_t low = room.worse_before[member.lower], high = room.worse_before[member.upper];
    const TwoDoubles below = load_vector<TwoDoubles>(room.prefix + 2 * (member.lower - low));
    const TwoDoubles inside = load_vector<TwoDoubles>(room.prefix + 2 * (member.upper - high)) - below;
    member.product += below[0] + 0.5 * inside[0] - (inside[1] - inside[0] * member.offset) * slope;
    member.lower = low;
    member.upper = high;
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
