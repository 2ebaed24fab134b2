// Vectors of sixteen floats in AVX-512 registers. Included inside the level's namespace.

struct V { __m512 v; };
constexpr int W = 16;

inline __mmask16 lanes(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

inline V zero() { return {_mm512_setzero_ps()}; }
inline V set(float x) { return {_mm512_set1_ps(x)}; }
inline V widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline V load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline V load(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
inline V load(const f16* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p))}; }
inline __m256i narrow(const bf16*, V x) { return (__m256i)_mm512_cvtneps_pbh(x.v); }
inline __m256i narrow(const f16*, V x) {
    return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, V x, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), x.v); }
template <class T> inline void store(T* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, x));
}
template <class T> inline void store(T* p, V x, int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(p, x)); }
// Whole numbers from bytes, and to bytes (|x| <= 127; others become something).
inline V load_bytes(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline V load_bytes(const int8_t* p, int64_t n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)))};
}
inline void store_bytes(int8_t* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
inline int32_t dot_bytes(const int8_t* a, const int8_t* b, int64_t n) {
    __m512i all = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 32) {
        __mmask32 mask = n - i >= 32 ? ~__mmask32(0) : (__mmask32(1) << (n - i)) - 1;
        __m512i x = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, a + i));
        __m512i y = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, b + i));
        all = _mm512_add_epi32(all, _mm512_madd_epi16(x, y));
    }
    return _mm512_reduce_add_epi32(all);
}
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V maximum(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V minimum(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V round_even(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V absolute(V a) { return {_mm512_abs_ps(a.v)}; }
inline V with_sign(V a, V sign) {
    __m512 bit = _mm512_set1_ps(-0.0f);
    return {_mm512_or_ps(_mm512_andnot_ps(bit, a.v), _mm512_and_ps(bit, sign.v))};
}
inline V scale2(V x, V n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(V a) { return _mm512_reduce_max_ps(a.v); }
// Two vectors at a time: pairs, fours, eights, sixteens; a transposition that adds on its way.
QR_ALWAYS V sums(const V* a) {
    __m512 four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const V* b = a + 4 * i;
        __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(b[0].v, b[1].v), _mm512_unpackhi_ps(b[0].v, b[1].v));
        __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(b[2].v, b[3].v), _mm512_unpackhi_ps(b[2].v, b[3].v));
        __m512d x2 = _mm512_castps_pd(x), y2 = _mm512_castps_pd(y);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x2, y2)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(x2, y2)));
    }
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                              _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                              _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd))};
}
