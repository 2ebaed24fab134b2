// bf16 operands of attention for vdpbf16ps. Included inside the level's namespace, before attention.h.

inline __mmask32 words(int64_t n) { return n >= 32 ? ~__mmask32(0) : __mmask32((1ull << most(n, 0)) - 1); }

template <int N, bool full>
QR_ALWAYS V products_of(const bf16* const* keys, int64_t at, const bf16* q, int64_t left) {
    __mmask32 last = full ? ~__mmask32(0) : words(left - 32 * (N - 1));
    __m512bh x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) x[n] = full || n < N - 1 ? pairs(q + 32 * n) : pairs(q + 32 * n, last);
    V a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        const bf16* k = keys[i] + at;
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
            sum = _mm512_dpbf16_ps(sum, full || n < N - 1 ? pairs(k + 32 * n) : pairs(k + 32 * n, last), x[n]);
        a[i].v = sum;
    }
    return sums(a);
}

inline V products(const bf16* const* keys, int64_t at, const bf16* q, int64_t size) {
    if (size == 64) return products_of<2, true>(keys, at, q, 64);
    if (size == 128) return products_of<4, true>(keys, at, q, 128);
    V all = zero();
    for (int64_t e = 0; e < size; e += 32) all = add(all, products_of<1, false>(keys, at + e, q + e, size - e));
    return all;
}

inline __m512bh twice(const bf16* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}

// Words of a and b alternately: lo of the first sixteen, hi of the last.
inline void interleave(__m512i a, __m512i b, __m512i& lo, __m512i& hi) {
    __m512i x = _mm512_unpacklo_epi16(a, b), y = _mm512_unpackhi_epi16(a, b);
    __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    lo = _mm512_permutex2var_epi64(x, first, y), hi = _mm512_permutex2var_epi64(x, last, y);
}

inline __m512i row_of(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16(words(n), p); }
// Bytes become bf16 exactly.
inline __m512i row_of(const int8_t* p, int64_t n) {
    __m512i w = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(words(n), p));
    __m512 lo = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(w)));
    __m512 hi = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(w, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
}

// out[g][e .. e + 32 N] = sum of p[g][j] * values[j], two keys at a time: their numbers side by side.
template <int G, int N, bool full>
inline void weighted_pairs(const bf16* const* values, int64_t at, int64_t count, const bf16* p, int64_t stride,
                           int64_t left, float* out, int64_t padded) {
    __m512 a[G][2 * N];
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
        for (int n = 0; n < 2 * N; n++) a[g][n] = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 2) {  // behind the last: the last again, with probability 0
        __m512bh v[2 * N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            __m512i x, y;
            if (full) {
                x = _mm512_loadu_si512(values[j] + at + 32 * n), y = _mm512_loadu_si512(values[j + 1] + at + 32 * n);
            } else {
                x = row_of(values[j] + at + 32 * n, left - 32 * n);
                y = row_of(values[j + 1] + at + 32 * n, left - 32 * n);
            }
            v[2 * n] = (__m512bh)_mm512_unpacklo_epi16(x, y), v[2 * n + 1] = (__m512bh)_mm512_unpackhi_epi16(x, y);
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            __m512bh w = twice(p + g * stride + j);
#pragma GCC unroll 8
            for (int n = 0; n < 2 * N; n++) a[g][n] = _mm512_dpbf16_ps(a[g][n], v[n], w);
        }
    }
    __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            float* to = out + g * padded + 32 * n;
            _mm512_storeu_ps(to, _mm512_permutex2var_ps(a[g][2 * n], first, a[g][2 * n + 1]));
            _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(a[g][2 * n], last, a[g][2 * n + 1]));
        }
}

template <int G>
inline void weighted_pairs(const bf16* const* values, int64_t at, int64_t count, const bf16* p, int64_t stride,
                           int64_t size, float* out, int64_t padded) {
    int64_t e = 0;
    for (; e + 64 <= size; e += 64)
        weighted_pairs<G, 2, true>(values, at + e, count, p, stride, 64, out + e, padded);
    for (; e < size; e += 32)
        weighted_pairs<G, 1, false>(values, at + e, count, p, stride, size - e, out + e, padded);
}
