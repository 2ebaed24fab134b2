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
