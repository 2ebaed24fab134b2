// Drawing a token from each row of logits without sorting it. Included inside a level's namespace.
//
// `ops/sampling.py` says what is to come out, to the token. Thresholds are exact: masses are whole numbers, from
// arithmetic whose every step is rounded alike in torch. Noise passes through logarithms, of which torch's differ from
// these in the last place: a row whose two best scores are closer than that can matter is handed back undecided (token
// -1), as is one with a number that is not finite at its top.

constexpr int64_t TOKENS = 64;  // of a block: sixteen counters of Philox, and one maximum
constexpr float MOST_NOISE = 23.0f;  // more than the largest (ops/philox.py)
constexpr int64_t FIRST_LOOK = 256;  // candidates among which a nucleus is searched before all are counted
constexpr int64_t BUCKETS = 512;

// x, which no compiler may fuse with what follows.
inline V apart(V x) {
#if defined(__x86_64__) || defined(__i386__)
    asm("" : "+x"(x.v));
#elif defined(__aarch64__)
    asm("" : "+w"(x.v));
#else
    float part[W];
    store(part, x);
    volatile float* opaque = part;
    for (int i = 0; i < W; i++) opaque[i] = opaque[i];
    x = load(part);
#endif
    return x;
}

constexpr float MASS1 = 0.6931470036506653f, MASS2 = 0.24022242426872253f, MASS3 = 0.05550733581185341f,
                MASS4 = 0.009671512991189957f, MASS5 = 0.001326472614891827f;

// exp(x - top) in units of 2^-40, a whole number once cut off: as `_mass` in ops/sampling.py, step by step.
inline V mass(V x, V top) {
    V t = apart(mul(sub(x, top), set(1.44269504f)));
    t = maximum(set(-64.0f), t);
    V n = round_even(t), f = sub(t, n);
    V p = mul(f, set(MASS5));
    p = mul(apart(add(apart(p), set(MASS4))), f);
    p = mul(apart(add(apart(p), set(MASS3))), f);
    p = mul(apart(add(apart(p), set(MASS2))), f);
    p = mul(apart(add(apart(p), set(MASS1))), f);
    return scale2(apart(add(apart(p), set(1.0f))), add(n, set(40.0f)));
}
constexpr float MASSLESS = -29.2f;  // x - top below which a mass is 0 in any case: 2^-42

struct Weighed {
    float x;
    int64_t mass;
};

// The x at which the masses of the candidates from the largest on reach `limit` (at most their sum).
inline float reach(Weighed* a, int64_t count, int64_t limit) {
    for (;;) {
        float first = a[0].x, middle = a[count / 2].x, last = a[count - 1].x;
        float low = first < middle ? first : middle, high = first < middle ? middle : first;
        float pivot = last < low ? low : last > high ? high : last;
        int64_t above = 0, upto = 0, end = count, more = 0, equal = 0;  // [0, above) >, [above, upto) =, [end, count) <
        while (upto < end) {
            Weighed here = a[upto];
            if (here.x > pivot) {
                more += here.mass;
                a[upto++] = a[above], a[above++] = here;
            } else if (here.x == pivot) {
                equal += here.mass, upto++;
            } else {
                a[upto] = a[--end], a[end] = here;
            }
        }
        if (limit <= more) {
            count = above;
        } else if (limit <= more + equal || end == count) {
            return pivot;
        } else {
            limit -= more + equal, a += end, count -= end;
        }
    }
}

struct SampleMemory {
    float* tops;        // of each block
    Weighed* candidates;
    int64_t sums[BUCKETS];
    static inline size_t bytes(int64_t vocab) {
        return sizeof(SampleMemory) + 64 + size_t(ceil_div(vocab, TOKENS)) * 4 + size_t(vocab + W) * sizeof(Weighed);
    }
};

struct Row {
    float* x;
    int64_t vocab, blocks;
    SampleMemory& memory;
    float top;

    inline int64_t end(int64_t block) const { return least(vocab, (block + 1) * TOKENS); }

    // Candidates x >= low with their masses (or 1 each).
    inline int64_t collect(float low, bool ones) const {
        int64_t count = 0;
        for (int64_t b = 0; b < blocks; b++) {
            if (!(memory.tops[b] >= low)) continue;
            float m[TOKENS];
            int64_t begin = b * TOKENS, size = end(b) - begin;
            for (int64_t d = 0; !ones && d < size; d += W) {
                V v = size - d >= W ? load(x + begin + d) : load(x + begin + d, size - d);
                store(m + d, mass(v, set(top)));
            }
            for (int64_t d = 0; d < size; d++)
                if (x[begin + d] >= low)
                    memory.candidates[count++] = {x[begin + d], ones ? 1 : int64_t(m[d])};
        }
        return count;
    }

    // Something that at least `count` numbers of the row reach: the count-th largest of the blocks' maxima.
    inline float bound(int64_t count) const {
        if (count > blocks) return NEVER;
        for (int64_t b = 0; b < blocks; b++) memory.candidates[b] = {memory.tops[b], 1};
        return reach(memory.candidates, blocks, count);
    }

    inline float kth(int64_t k) const { return reach(memory.candidates, collect(bound(k), true), k); }

    // The smallest x that a nucleus of `share` of the mass of all x >= low has.
    inline float nucleus(float low, double share) const {
        int64_t total = 0;
        each_mass(low, [&](int64_t, int64_t size, const float*, const float* m) {
            for (int64_t d = 0; d < size; d++) total += int64_t(m[d]);
        });
        int64_t limit = most(1, int64_t(double(total) * share));
        if (limit > total) return low;
        float from = bound(FIRST_LOOK);
        if (from < low) from = low;
        int64_t count = collect(from, false), sum = 0;
        for (int64_t n = 0; n < count; n++) sum += memory.candidates[n].mass;
        if (sum >= limit) return reach(memory.candidates, count, limit);
        // Buckets of equal width below the top, in which masses are counted; then the candidates of one bucket.
        for (auto& bucket : memory.sums) bucket = 0;
        auto bucket_of = [&](float v) {
            return int64_t(least(BUCKETS - 1, int64_t((top - v) * (float(BUCKETS) / -MASSLESS))));
        };
        each_mass(low, [&](int64_t, int64_t size, const float* v, const float* m) {
            for (int64_t d = 0; d < size; d++)
                if (m[d] >= 1.0f) memory.sums[bucket_of(v[d])] += int64_t(m[d]);
        });
        int64_t bucket = 0;
        for (; bucket < BUCKETS - 1 && memory.sums[bucket] < limit; bucket++) limit -= memory.sums[bucket];
        count = 0;
        each_mass(low, [&](int64_t, int64_t size, const float* v, const float* m) {
            for (int64_t d = 0; d < size; d++)
                if (m[d] >= 1.0f && bucket_of(v[d]) == bucket) memory.candidates[count++] = {v[d], int64_t(m[d])};
        });
        return count ? reach(memory.candidates, count, limit) : low;
    }

    // f(first token, count, numbers, their masses) of each block that has a mass at x >= low; 0 for the others.
    template <class F> inline void each_mass(float low, F f) const {
        float m[TOKENS];
        for (int64_t b = 0; b < blocks; b++) {
            if (!(memory.tops[b] >= low) || memory.tops[b] - top < MASSLESS) continue;
            int64_t begin = b * TOKENS, size = end(b) - begin;
            for (int64_t d = 0; d < size; d += W)
                store(m + d, mass(size - d >= W ? load(x + begin + d) : load(x + begin + d, size - d), set(top)));
            for (int64_t d = 0; d < size; d++) m[d] = x[begin + d] >= low ? m[d] : 0.0f;
            f(begin, size, x + begin, m);
        }
    }
};

// Philox4x32-10 of sixteen counters (quad .. quad + 15, c1, c2, 0): word w of counter i to out[4 i + w].
inline void philox(uint32_t quad, uint32_t position, uint32_t sample, uint64_t key, uint32_t* out) {
    uint32_t c0[16], c1[16], c2[16], c3[16], k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int i = 0; i < 16; i++) c0[i] = quad + uint32_t(i), c1[i] = position, c2[i] = sample, c3[i] = 0;
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < 16; i++) {
            uint64_t p0 = uint64_t(c0[i]) * 0xD2511F53u, p1 = uint64_t(c2[i]) * 0xCD9E8D57u;
            uint32_t a = uint32_t(p1 >> 32) ^ c1[i] ^ k0, c = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
            c0[i] = a, c1[i] = uint32_t(p1), c2[i] = c, c3[i] = uint32_t(p0);
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 16; i++) out[4 * i] = c0[i], out[4 * i + 1] = c1[i], out[4 * i + 2] = c2[i], out[4 * i + 3] = c3[i];
}

// The logarithm of a positive normal number, to 2 ulp (the polynomial of Cephes).
inline float natural(float x) {
    uint32_t bits = float_bits(x);
    int32_t n = int32_t(bits - 0x3f3504f3u) >> 23;
    float f = bits_float(bits - (uint32_t(n) << 23)) - 1.0f, z = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f, p = p * f + 1.1676998740e-1f, p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f, p = p * f - 1.6668057665e-1f, p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f, p = p * f + 3.3333331174e-1f;
    float e = float(n);
    return f + (f * z * p - 2.12194440e-4f * e - 0.5f * z) + 0.693359375f * e;
}

// Standard Gumbel noise from words, as ops/philox.py. log1p(-u) by Kahan: what 1 - u lost is made good by a ratio. Short
// loops, each of which the compiler makes into vectors.
inline void gumbel(const uint32_t* words, float* noise) {
    float u[TOKENS], gap[TOKENS], inner[TOKENS];
    for (int64_t i = 0; i < TOKENS; i++) {
        float v = float(words[i]) * 0x1p-32f + 0x1p-33f, most_v = 1.0f - 0x1p-24f;
        u[i] = v < most_v ? v : most_v;
    }
    for (int64_t i = 0; i < TOKENS; i++) inner[i] = 1.0f - u[i], gap[i] = 1.0f - inner[i];
    for (int64_t i = 0; i < TOKENS; i++) inner[i] = -natural(inner[i]);
    for (int64_t i = 0; i < TOKENS; i++) {
        float some = gap[i] > 0x1p-30f ? gap[i] : 1.0f, ratio = inner[i] * (u[i] / some);
        inner[i] = gap[i] > 0x1p-30f ? ratio : u[i];
    }
    for (int64_t i = 0; i < TOKENS; i++) noise[i] = -natural(inner[i]);
}

struct Leader {
    float best = NEVER, second = NEVER;
    int64_t token = 0;
};

inline void score_block(const Row& row, int64_t block, float low, const qr_op& op, int64_t which, Leader& leader) {
    uint32_t words[TOKENS];
    float noise[TOKENS];
    philox(uint32_t(block * TOKENS / 4), uint32_t(static_cast<const int64_t*>(op.p[8])[which]),
           uint32_t(static_cast<const int64_t*>(op.p[7])[which]), uint64_t(static_cast<const int64_t*>(op.p[6])[which]), words);
    gumbel(words, noise);
    int64_t begin = block * TOKENS, size = row.end(block) - begin;
    for (int64_t d = 0; d < size; d++) {
        float x = row.x[begin + d], score = noise[d] + x;
        noise[d] = x >= low ? score : NEVER;
    }
    for (int64_t d = size; d < TOKENS; d++) noise[d] = NEVER;
    V top = set(NEVER);
    for (int64_t d = 0; d < TOKENS; d += W) top = maximum(load(noise + d), top);
    if (!(largest(top) > leader.second)) return;
    for (int64_t d = 0; d < size; d++) {
        if (!(noise[d] > leader.second)) continue;
        if (noise[d] > leader.best) leader = {noise[d], leader.best, begin + d};
        else leader.second = noise[d];
    }
}

inline void sample_row(const qr_op& op, int64_t which, SampleMemory& memory) {
    int64_t vocab = op.i[1];
    Row row{static_cast<float*>(op.p[0]) + which * op.i[2], vocab, ceil_div(vocab, TOKENS), memory, 0.0f};
    auto& token = static_cast<int64_t*>(op.p[9])[which];
    float temperature = static_cast<const float*>(op.p[1])[which];
    V high = set(NEVER), odd = zero();
    for (int64_t b = 0; b < row.blocks; b++) {
        V most_here = set(NEVER);
        for (int64_t d = b * TOKENS; d < row.end(b); d += W) {
            int64_t left = row.end(b) - d;
            V v = left >= W ? load(row.x + d) : load(row.x + d, left);
            if (temperature != 1.0f) {
                v = div(v, set(temperature));
                store(row.x + d, v, left);
            }
            odd = add(odd, mul(maximum(set(-1.0f), v), zero()));  // NaN where v is, or is infinite upwards
            if (left < W) {  // the lanes behind the end are no candidates
                float part[W];
                store(part, v);
                for (int64_t i = left; i < W; i++) part[i] = NEVER;
                v = load(part);
            }
            most_here = maximum(v, most_here);
        }
        memory.tops[b] = largest(most_here);
        high = maximum(set(memory.tops[b]), high);
    }
    float& top = row.top = largest(high);
    float& low = static_cast<float*>(op.p[11])[which];
    low = NEVER, token = -1;
    static_cast<float*>(op.p[10])[which] = top;
    if (sum(odd) != 0.0f || top == NEVER) return;
    float log_min_p = static_cast<const float*>(op.p[2])[which];
    int64_t k = static_cast<const int64_t*>(op.p[3])[which];
    double share = static_cast<const double*>(op.p[4])[which];
    auto raise = [&](float to) { low = to > low ? to : low; };
    if (log_min_p != NEVER) low = top + log_min_p;
    if (k > 0 && k < vocab) raise(row.kth(k));
    if (share < 1.0) raise(row.nucleus(low, share));
    int64_t first = 0;
    while (memory.tops[first] != top) first++;
    if (static_cast<const uint8_t*>(op.p[5])[which]) {
        for (token = first * TOKENS; row.x[token] != top;) token++;
        return;
    }
    Leader leader;
    score_block(row, first, low, op, which, leader);
    auto margin = [&] { return 1e-5f + 1e-6f * __builtin_fabsf(leader.best); };
    for (int64_t b = 0; b < row.blocks; b++)
        if (b != first && memory.tops[b] >= low && memory.tops[b] + MOST_NOISE >= leader.best - margin())
            score_block(row, b, low, op, which, leader);
    if (leader.second < leader.best - margin()) token = leader.token;
}

void sample(const qr_op& op, Context& c) {
    int64_t rows = c.count(op.i[0]), vocab = op.i[1];
    auto* room = static_cast<char*>(c.scratch(SampleMemory::bytes(vocab)));
    auto& memory = *reinterpret_cast<SampleMemory*>(room);
    memory.candidates = reinterpret_cast<Weighed*>(room + (sizeof(SampleMemory) + 63) / 64 * 64);
    memory.tops = reinterpret_cast<float*>(memory.candidates + vocab + W);
    for (int64_t row; (row = c.take(rows)) >= 0;) sample_row(op, row, memory);
}
