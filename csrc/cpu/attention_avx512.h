// bf16 operands of attention for vdpbf16ps. Included inside the level's namespace, before attention.h.

inline V products(const bf16* const* keys, const bf16* q, int64_t size) {
    V a[16];
    for (int i = 0; i < 16; i++) a[i] = zero();
    for (int64_t e = 0; e < size; e += 32) {
        __mmask32 mask = size - e >= 32 ? ~__mmask32(0) : __mmask32((1ull << (size - e)) - 1);
        __m512bh x = pairs(q + e, mask);
        for (int i = 0; i < 16; i++) a[i].v = _mm512_dpbf16_ps(a[i].v, pairs(keys[i] + e, mask), x);
    }
    return sums(a);
}

inline void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Panels of 16 keys as [e / 2][16][2].
inline void pack_keys(const bf16* const* keys, int64_t count, int64_t size, bf16* panels) {
    for (int64_t j = 0; j < 64; j += 16)
        for (int64_t e = 0; e < size; e += 32) {
            __mmask32 mask = size - e >= 32 ? ~__mmask32(0) : __mmask32((1ull << (size - e)) - 1);
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = j + i < count ? _mm512_maskz_loadu_epi16(mask, keys[j + i] + e) : _mm512_setzero_si512();
            transpose(r);
            int64_t rows = ceil_div(least(32, size - e), 2);
            for (int64_t i = 0; i < rows; i++)
                _mm512_storeu_si512(panels + j * (size + (size & 1)) + (e / 2 + i) * 32, r[i]);
        }
}

// Panels of 16 numbers of the values as [j / 2][16][2].
inline void pack_values(const bf16* const* values, int64_t count, int64_t size, int64_t padded, bf16* panels) {
    int64_t even = (count + 1) / 2 * 2;
    for (int64_t e = 0; e < padded; e += 16) {
        __mmask16 mask = e < size ? lanes(size - e) : __mmask16(0);
        for (int64_t j = 0; j < count; j += 2) {
            __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values[j] + e));
            __m512i b = j + 1 < count ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values[j + 1] + e))
                                      : _mm512_setzero_si512();
            _mm512_storeu_si512(panels + e * even + j * 16, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
    }
}

// Panels hold 16 columns as [k / 2][16][2]; the rows of x are broadcast two numbers at a time from where they are.
inline __m512bh twice(const bf16* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}

template <int M, int N>
inline void tile_product(const bf16* x, int64_t stride_x, const bf16* panels, int64_t stride_panel, int64_t size,
                         float* sums, int64_t stride, bool more) {
    __m512 a[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) a[m][n] = more ? _mm512_loadu_ps(sums + m * stride + n * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k + 2 <= size; k += 2) {
        __m512bh w[N];
        for (int n = 0; n < N; n++) w[n] = (__m512bh)_mm512_loadu_si512(panels + n * stride_panel + k * 16);
        for (int m = 0; m < M; m++) {
            __m512bh y = twice(x + m * stride_x + k);
            for (int n = 0; n < N; n++) a[m][n] = _mm512_dpbf16_ps(a[m][n], w[n], y);
        }
    }
    if (size & 1)
        for (int m = 0; m < M; m++) {
            __m512bh y = (__m512bh)_mm512_set1_epi32(x[m * stride_x + size - 1].bits);
            for (int n = 0; n < N; n++)
                a[m][n] = _mm512_dpbf16_ps(
                    a[m][n], (__m512bh)_mm512_loadu_si512(panels + n * stride_panel + (size - 1) * 16), y);
        }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) _mm512_storeu_ps(sums + m * stride + n * 16, a[m][n]);
}

template <int N>
void tile_products(const bf16* x, int64_t stride_x, int64_t rows, const bf16* panels, int64_t stride_panel,
                   int64_t size, float* sums, int64_t stride, bool more) {
    int64_t m = 0;
    for (; m + 8 <= rows; m += 8)
        tile_product<8, N>(x + m * stride_x, stride_x, panels, stride_panel, size, sums + m * stride, stride, more);
    for (; m < rows; m++)
        tile_product<1, N>(x + m * stride_x, stride_x, panels, stride_panel, size, sums + m * stride, stride, more);
}

inline void tile_multiply(const bf16* x, int64_t stride_x, int64_t rows, const bf16* panels, int64_t width,
                             int64_t size, float* sums, bool more) {
    int64_t even = (size + 1) / 2 * 2;
    for (int64_t n = 0; n < width; n += 32)
        tile_products<2>(x, stride_x, rows, panels + n * even, 16 * even, size, sums + n, width, more);
}
