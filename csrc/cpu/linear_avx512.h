// The dot products of bf16 linear layers with vdpbf16ps. Included inside the level's namespace, after linear.h.

inline __m512bh pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh pairs(const bf16* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }

template <int R, int M>
inline void dots(const bf16* const* w, const bf16* x, int64_t stride_x, int64_t size, int64_t ahead, float* out,
                 int64_t stride, bool more) {
    V a[16];  // [m][r], R * M of them
    for (int i = 0; i < 16; i++) a[i] = zero();
    int64_t k = 0;
    for (; k + 32 <= size; k += 32) {
        __m512bh y[M];
        for (int m = 0; m < M; m++) y[m] = pairs(x + m * stride_x + k);
        for (int r = 0; r < R; r++) {
            _mm_prefetch(reinterpret_cast<const char*>(w[r] + k + ahead), _MM_HINT_T1);
            __m512bh v = pairs(w[r] + k);
            for (int m = 0; m < M; m++) a[m * R + r].v = _mm512_dpbf16_ps(a[m * R + r].v, v, y[m]);
        }
    }
    if (k < size) {
        __mmask32 mask = __mmask32((1ull << (size - k)) - 1);
        for (int r = 0; r < R; r++) {
            __m512bh v = pairs(w[r] + k, mask);
            for (int m = 0; m < M; m++)
                a[m * R + r].v = _mm512_dpbf16_ps(a[m * R + r].v, v, pairs(x + m * stride_x + k, mask));
        }
    }
    __m512 all = sums(a).v;
    for (int m = 0; m < M; m++) {
        float* to = out + m * stride;
        if constexpr (R == 4) {
            __m128 part = m == 0   ? _mm512_castps512_ps128(all)
                          : m == 1 ? _mm512_extractf32x4_ps(all, 1)
                          : m == 2 ? _mm512_extractf32x4_ps(all, 2)
                                   : _mm512_extractf32x4_ps(all, 3);
            _mm_storeu_ps(to, more ? _mm_add_ps(part, _mm_loadu_ps(to)) : part);
        } else {
            static_assert(R == 8);
            __m256 part = m ? _mm512_extractf32x8_ps(all, 1) : _mm512_castps512_ps256(all);
            _mm256_storeu_ps(to, more ? _mm256_add_ps(part, _mm256_loadu_ps(to)) : part);
        }
    }
}

// One token: row after row, so that the weights are one stream, which is asked for 8 KiB ahead. On Zen 4 (two threads, a
// host of 36 GB/s): 33 GB/s, 8 rows at a time 31; without asking 28 and 24.
constexpr int64_t LONE_AHEAD = 8192;
inline void lone(const bf16* x, int64_t size, const bf16* weights, int64_t stride, int64_t count, float* out,
                 bool more) {
    for (int64_t n = 0; n < count; n += 16) {
        int64_t rows = least(16, count - n);
        V a[16];
        for (int r = 0; r < 16; r++) a[r] = zero();
        for (int64_t r = 0; r < rows; r++) {
            const bf16* w = weights + (n + r) * stride;
            __m512 part[4];
            for (int i = 0; i < 4; i++) part[i] = _mm512_setzero_ps();
            int64_t k = 0;
            auto one = [&](int i) {
                _mm_prefetch(reinterpret_cast<const char*>(w + k) + LONE_AHEAD, _MM_HINT_T1);
                part[i] = _mm512_dpbf16_ps(part[i], pairs(w + k), pairs(x + k));
                k += 32;
            };
            while (k + 128 <= size) one(0), one(1), one(2), one(3);
            for (int i = 0; k + 32 <= size; i++) one(i & 3);
            if (k < size) {
                __mmask32 mask = __mmask32((1ull << (size - k)) - 1);
                part[0] = _mm512_dpbf16_ps(part[0], pairs(w + k, mask), pairs(x + k, mask));
            }
            a[r].v = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
        }
        V all = sums(a);
        if (more) all = add(all, load(out + n, rows));
        store(out + n, all, rows);
    }
}
