// Prefill tiles of attention by vdpbf16ps. Included by attention.h at the level that has it.
//
// A lane is a query, so nothing is ever summed across a register: scores are K Q^T and outputs V^T P, one operand packed
// in pairs for thirty-two queries, the other broadcast two numbers at a time from where it lies. A tile is some blocks
// of thirty-two packed rows (query tokens x heads of one KV head), which share the packed values.

constexpr int64_t LANES = 32;       // packed rows of a block
constexpr int64_t PAIR_KEYS = 64;   // keys of a step of a tile
constexpr float LOG2E = 1.44269504f;
// The maximum that a row's sums are taken against follows the true one only where that is this many powers of two
// larger: until then numbers grow by 2^8 at most, and the sums need not be scaled again.
constexpr float SLACK = 8.0f;

// 2^x to 7.5e-5 of its value (the result is rounded to bf16, 2e-3): 2^-127, which a product takes for 0, for -inf;
// NaN for NaN; x at most 100. Whole part and fraction by sums, as these run beside the products.
QR_ALWAYS __m512 power(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // the second where either is NaN
    __m512 magic = _mm512_set1_ps(12582912.0f), n = _mm512_add_ps(x, magic);
    __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(n, magic));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0551716618f), f, _mm512_set1_ps(0.242611122f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693260987f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999928074f));
    return (__m512)_mm512_add_epi32((__m512i)p, _mm512_slli_epi32((__m512i)n, 23));
}

// s[m][32] = keys[m] . each of the 32 rows packed as [size / 2][32][2]; the maxima of each row so far.
template <int M>
QR_ALWAYS void pair_scores(const bf16* const* keys, const bf16* q, int64_t size, float* s, __m512& top0, __m512& top1) {
    __m512 a[M][2];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) a[m][0] = a[m][1] = _mm512_setzero_ps();
    int64_t e = 0;
    for (; e + 2 <= size; e += 2) {
        __m512bh x0 = pairs(q + e * LANES), x1 = pairs(q + e * LANES + 32);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __m512bh y = twice(keys[m] + e);
            a[m][0] = _mm512_dpbf16_ps(a[m][0], x0, y);
            a[m][1] = _mm512_dpbf16_ps(a[m][1], x1, y);
        }
    }
    if (e < size) {  // an odd number: what lies behind a key may be anything
        __m512bh x0 = pairs(q + e * LANES), x1 = pairs(q + e * LANES + 32);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __m512bh y = (__m512bh)_mm512_set1_epi32(keys[m][e].bits);
            a[m][0] = _mm512_dpbf16_ps(a[m][0], x0, y);
            a[m][1] = _mm512_dpbf16_ps(a[m][1], x1, y);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        _mm512_storeu_ps(s + m * LANES, a[m][0]);
        _mm512_storeu_ps(s + m * LANES + 16, a[m][1]);
        top0 = _mm512_max_ps(top0, a[m][0]), top1 = _mm512_max_ps(top1, a[m][1]);
    }
}

// sums[m][32] (+)= values[pair][m][2] . probs[pair][32][2] over the pairs of keys.
template <int M>
QR_ALWAYS void pair_outputs(const bf16* values, int64_t stride, const bf16* probs, int64_t count, float* sums, bool more) {
    __m512 a[M][2];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < 2; n++)
            a[m][n] = more ? _mm512_loadu_ps(sums + m * LANES + 16 * n) : _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j++) {
        __m512bh x0 = pairs(probs + j * 2 * LANES), x1 = pairs(probs + j * 2 * LANES + 32);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __m512bh y = twice(values + j * stride + 2 * m);
            a[m][0] = _mm512_dpbf16_ps(a[m][0], x0, y);
            a[m][1] = _mm512_dpbf16_ps(a[m][1], x1, y);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < 2; n++) _mm512_storeu_ps(sums + m * LANES + 16 * n, a[m][n]);
}

// What a tile works on. `wide`: the head size up to a whole number of eights, of which outputs are made.
struct PairMemory {
    bf16 *queries, *values, *probs, *keys;  // keys: those that were bytes
    float *scores, *sums, *tops, *totals;
    bool* begun;  // of each block: whether it has sums
    int64_t wide;

    static inline int64_t width(const Rules& r) { return ceil_div(r.size, 32) * 32; }
    static inline int64_t blocks(const Rules& r) { return ceil_div(most(TILE_ROWS, r.group), LANES); }
    static inline size_t bytes(const Rules& r) {
        int64_t w = width(r), b = blocks(r);
        return size_t(2 * (b * w * LANES + PAIR_KEYS * LANES + 2 * PAIR_KEYS * w) +
                      4 * (PAIR_KEYS * LANES + b * LANES * (w + 2)) + b);
    }
    inline PairMemory(const Rules& r, char* memory) {
        int64_t w = width(r), b = blocks(r);
        wide = ceil_div(r.size, 8) * 8;
        scores = reinterpret_cast<float*>(memory);
        sums = scores + PAIR_KEYS * LANES;
        tops = sums + b * LANES * w;
        totals = tops + b * LANES;
        queries = reinterpret_cast<bf16*>(totals + b * LANES);
        probs = queries + b * w * LANES;
        keys = probs + PAIR_KEYS * LANES;
        values = keys + PAIR_KEYS * w;
        begun = reinterpret_cast<bool*>(values + PAIR_KEYS * w);
    }
};

// How the scores of one step of keys become probabilities.
struct PairStep {
    const Rules& r;
    const float *key_scales, *value_scales;  // of the keys of this step, or null
    int64_t first, here;                     // its keys
    const int32_t* places;                   // of the queries: 32 positions, and their slopes
    const float* slopes;
    bool plain;                              // scores are products alone
};

// Scores as they are to be, -inf where hidden; returns the maxima in place of those of the products.
inline void pair_rules(const PairStep& t, float* s, __m512& top0, __m512& top1) {
    top0 = top1 = _mm512_set1_ps(NEVER);
    const Rules& r = t.r;
    int64_t window = least(r.window, INT32_MAX);
    for (int64_t half = 0; half < LANES; half += 16) {
        __m512i i = _mm512_loadu_si512(t.places + half);
        __m512i behind = _mm512_sub_epi32(i, _mm512_set1_epi32(int(window)));
        __m512 slope = t.slopes ? _mm512_loadu_ps(t.slopes + half) : _mm512_setzero_ps(), top = top0;
        for (int64_t n = 0; n < t.here; n++) {
            float* at = s + n * LANES + half;
            __m512 v = _mm512_loadu_ps(at);
            __m512i j = _mm512_set1_epi32(int(t.first + n));
            if (!t.plain) {
                v = _mm512_mul_ps(v, _mm512_set1_ps(t.key_scales ? r.scale * t.key_scales[n] : r.scale));
                if (r.cap > 0.0f) v = mul(hyperbolic(mul(V{v}, set(1.0f / r.cap))), set(r.cap)).v;
                if (t.slopes) v = _mm512_fmadd_ps(slope, _mm512_cvtepi32_ps(_mm512_sub_epi32(j, i)), v);
                v = _mm512_mul_ps(v, _mm512_set1_ps(LOG2E));
            }
            __mmask16 seen = _mm512_cmple_epi32_mask(j, i) & _mm512_cmpgt_epi32_mask(j, behind);
            v = _mm512_mask_blend_ps(seen, _mm512_set1_ps(NEVER), v);
            top = _mm512_max_ps(top, v);
            _mm512_storeu_ps(at, v);
        }
        (half ? top1 : top0) = top;
    }
}

// Scores s[keys][32] -> probabilities in pairs [keys / 2][32][2] against tops; totals grow. Where a row's maximum has
// outgrown the one in `tops`, that and the row's sums (`wide` x 32) are brought to the new one.
inline void pair_soften(const PairStep& t, float* s, __m512 top0, __m512 top1, float* tops, float* totals, float* sums,
                        int64_t wide, bf16* probs) {
    float by = t.plain ? t.r.scale * LOG2E : 1.0f;
    __m512 c = _mm512_set1_ps(by), base[2], total[2];
    for (int n = 0; n < 2; n++) {
        __m512 old = _mm512_loadu_ps(tops + 16 * n), now = _mm512_mul_ps(n ? top1 : top0, c);
        __mmask16 grown = _mm512_cmp_ps_mask(now, _mm512_add_ps(old, _mm512_set1_ps(SLACK)), _CMP_GT_OQ);
        total[n] = _mm512_loadu_ps(totals + 16 * n);
        if (grown) {
            __m512 shrink = _mm512_mask_blend_ps(grown, _mm512_set1_ps(1.0f), power(_mm512_sub_ps(old, now)));
            old = _mm512_mask_blend_ps(grown, old, now);
            _mm512_storeu_ps(tops + 16 * n, old);
            if (sums) {
                total[n] = _mm512_mul_ps(total[n], shrink);
                for (int64_t e = 0; e < wide; e++) {
                    float* at = sums + e * LANES + 16 * n;
                    _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
                }
            }
        }
        __mmask16 none = _mm512_cmp_ps_mask(old, _mm512_set1_ps(NEVER), _CMP_EQ_OQ);  // nothing seen: -inf - 0 = -inf
        base[n] = _mm512_mask_blend_ps(none, old, _mm512_setzero_ps());
    }
    __m512i turn = _mm512_or_si512(_mm512_set1_epi32(16 << 16),
                                   _mm512_mullo_epi32(_mm512_set1_epi32(0x10001),
                                                      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
                                                                        14, 15)));
    for (int64_t j = 0; j < t.here; j += 2)
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++) {
            __m512 p[2];
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                p[k] = power(_mm512_fmsub_ps(_mm512_loadu_ps(s + (j + k) * LANES + 16 * n), c, base[n]));
                total[n] = _mm512_add_ps(total[n], p[k]);
                if (t.value_scales) p[k] = _mm512_mul_ps(p[k], _mm512_set1_ps(t.value_scales[j + k]));
            }
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
            _mm512_storeu_si512(probs + j * LANES + 32 * n, _mm512_permutexvar_epi16(turn, both));
        }
    _mm512_storeu_ps(totals, total[0]);
    _mm512_storeu_ps(totals + 16, total[1]);
}

// As prefill_tile: query tokens begin .. end of a row (of `count`, the last of `length`) and KV head h.
template <class C>
void pair_tile(const Rules& r, const qr_op& op, const int32_t* pages, int64_t start, int64_t count, int64_t length,
               int64_t begin, int64_t end, int64_t h, char* room) {
    PairMemory memory(r, room);
    int64_t rows = (end - begin) * r.group, blocks = ceil_div(rows, LANES), width = PairMemory::width(r);
    int64_t past = length - count, low = most(0, past + begin - r.window + 1), stop = least(length, past + end);
    auto place = [&](int64_t p) { return past + begin + p / r.group; };
    for (int64_t b = 0; b < blocks; b++) {
        for (int64_t half = 0; half < LANES; half += 16)
            for (int64_t e = 0; e < r.size; e += 32) {
                __m512i x[16];
                for (int64_t i = 0; i < 16; i++) {
                    int64_t p = least(rows - 1, b * LANES + half + i), head = h * r.group + p % r.group;
                    auto* q = static_cast<const bf16*>(op.p[0]) + (start + begin + p / r.group) * op.i[7];
                    x[i] = row_of(q + head * r.size + e, r.size - e);
                }
                turn_words(x, reinterpret_cast<char*>(x), 64);
                bf16* to = memory.queries + b * width * LANES + e * LANES + 2 * half;
                for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 2 * LANES, x[i]);
            }
        for (int64_t n = 0; n < LANES; n++) memory.tops[b * LANES + n] = NEVER, memory.totals[b * LANES + n] = 0.0f;
        memory.begun[b] = false;
    }
    int64_t first = low / PAIR_KEYS * PAIR_KEYS;
    if (length <= 0) stop = first;
    alignas(64) const C *both_k[2][PAIR_KEYS], *both_v[2][PAIR_KEYS];  // of this step and of the next
    auto look_up = [&](int64_t j0, const C** to_k, const C** to_v) {
        int64_t here = least(PAIR_KEYS, stop - j0);
        for (int64_t n = 0; n < here;) {
            int64_t j = most(low, j0 + n), in = j % r.block;  // what lies in front of every window is never read
            int64_t at = (most(pages[j / r.block], 0) * r.block + in) * op.i[9] + h * r.row;
            int64_t until = j0 + n < low ? n + 1 : least(here, n + r.block - in);
            for (; n < until; n++, at += op.i[9]) {
                to_k[n] = static_cast<const C*>(op.p[1]) + at;
                to_v[n] = static_cast<const C*>(op.p[2]) + at;
            }
        }
        for (int64_t n = here; n < PAIR_KEYS; n++) to_k[n] = to_k[most(here - 1, 0)];
    };
    if (first < stop) look_up(first, both_k[0], both_v[0]);
    for (int64_t j0 = first, turn = 0; j0 < stop; j0 += PAIR_KEYS, turn ^= 1) {
        int64_t here = least(PAIR_KEYS, stop - j0);
        const C **k = both_k[turn], **v = both_v[turn], **k_next = both_k[turn ^ 1], **v_next = both_v[turn ^ 1];
        float key_scales[PAIR_KEYS], value_scales[PAIR_KEYS];
        const bf16* rows_k[PAIR_KEYS];
        for (int64_t n = 0; n < PAIR_KEYS; n++) {
            if constexpr (scaled<C>) {
                key_scales[n] = scale_of(k[n], r.size);
                value_scales[n] = n < here && j0 + n >= low ? scale_of(v[n], r.size) : 0.0f;
                bf16* to = memory.keys + n * width;
                for (int64_t e = 0; e < r.size; e += 32) _mm512_storeu_si512(to + e, row_of(k[n] + e, r.size - e));
                rows_k[n] = to;
            } else {
                rows_k[n] = k[n];
            }
        }
        for (int64_t n = 0; n < PAIR_KEYS; n += 2)
            for (int64_t e = 0; e < r.size; e += 32) {
                bool one = n < here && j0 + n >= low, two = n + 1 < here && j0 + n + 1 >= low;
                __m512i lo, hi;
                interleave(one ? row_of(v[n] + e, r.size - e) : _mm512_setzero_si512(),
                           two ? row_of(v[n + 1] + e, r.size - e) : _mm512_setzero_si512(), lo, hi);
                bf16* to = memory.values + n * memory.wide + 2 * e;  // what is too wide is written over next
                _mm512_storeu_si512(to, lo);
                if (e + 16 < memory.wide) _mm512_storeu_si512(to + 32, hi);
            }
        if (j0 + PAIR_KEYS < stop) {
            look_up(j0 + PAIR_KEYS, k_next, v_next);
            for (int64_t n = 0; n < least(PAIR_KEYS, stop - j0 - PAIR_KEYS); n++)
                for (int64_t e = 0; e < r.size * int64_t(sizeof(C)); e += 64) {
                    __builtin_prefetch(reinterpret_cast<const char*>(k_next[n]) + e, 0, 2);
                    __builtin_prefetch(reinterpret_cast<const char*>(v_next[n]) + e, 0, 2);
                }
        }
        for (int64_t b = 0; b < blocks; b++) {
            int64_t p0 = b * LANES, p1 = least(rows, p0 + LANES) - 1;
            int64_t seen = least(here, place(p1) + 1 - j0);  // by the last query of the block
            if (seen <= 0 || j0 + seen <= place(p0) - r.window + 1) continue;
            seen = ceil_div(seen, 8) * 8;
            int32_t places[LANES];
            float slopes[LANES];
            bool masked = j0 + seen - 1 > place(p0) || j0 <= place(p1) - r.window || j0 < low;
            bool plain = !scaled<C> && r.cap <= 0.0f && !r.slopes && r.scale > 0.0f;
            if (masked || !plain)
                for (int64_t n = 0; n < LANES; n++) {
                    int64_t p = least(p0 + n, p1);
                    places[n] = int32_t(place(p));
                    slopes[n] = r.slopes ? r.slopes[h * r.group + p % r.group] : 0.0f;
                }
            PairStep step{r, scaled<C> ? key_scales : nullptr, scaled<C> ? value_scales : nullptr, j0, seen, places,
                          r.slopes ? slopes : nullptr, plain};
            float *tops = memory.tops + p0, *totals = memory.totals + p0, *sums = memory.sums + p0 * width;
            __m512 top0 = _mm512_set1_ps(NEVER), top1 = top0;
            for (int64_t n = 0; n < seen; n += 8)
                pair_scores<8>(rows_k + n, memory.queries + p0 * width, r.size, memory.scores + n * LANES, top0, top1);
            if (masked || !plain) pair_rules(step, memory.scores, top0, top1);
            bool begun = memory.begun[b];
            pair_soften(step, memory.scores, top0, top1, tops, totals, begun ? sums : nullptr, memory.wide,
                        memory.probs);
            for (int64_t e = 0; e < memory.wide; e += 8)
                pair_outputs<8>(memory.values + 2 * e, 2 * memory.wide, memory.probs, seen / 2, sums + e * LANES,
                                begun);
            memory.begun[b] = true;
        }
    }
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t half = 0; half < LANES; half += 16) {
            alignas(64) float scales[16];
            __m512 total = _mm512_loadu_ps(memory.totals + b * LANES + half);
            __mmask16 some = memory.begun[b] ? _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ) : 0;
            _mm512_store_ps(scales, _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), total));
            for (int64_t e = 0; e < r.size; e += 16) {
                __m512i x[16];
                for (int64_t i = 0; i < 16; i++)
                    x[i] = _mm512_loadu_si512(memory.sums + (b * width + least(e + i, memory.wide - 1)) * LANES + half);
                turn_words(x, reinterpret_cast<char*>(x), 64);
                for (int64_t i = 0; i < least(16, rows - b * LANES - half); i++) {
                    int64_t p = b * LANES + half + i, head = h * r.group + p % r.group;
                    auto* out = static_cast<bf16*>(op.p[6]) + (start + begin + p / r.group) * op.i[8];
                    V v = some >> i & 1 ? mul(V{(__m512)x[i]}, set(scales[i])) : zero();
                    store(out + head * r.size + e, v, r.size - e);
                }
            }
        }
}
