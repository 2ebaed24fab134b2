// Vectors of eight floats in AVX2 registers (with FMA and F16C). Included inside the level's namespace.

struct V { __m256 v; };
constexpr int W = 8;

inline V zero() { return {_mm256_setzero_ps()}; }
inline V set(float x) { return {_mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline V load(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline V load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline __m256i lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V load(const float* p, int64_t n) { return n >= W ? load(p) : V{_mm256_maskload_ps(p, lanes(n))}; }
template <class T> inline V load(const T* p, int64_t n) {
    if (n >= W) return load(p);
    T part[W] = {};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return load(part);
}
inline void store(float* p, V x) { _mm256_storeu_ps(p, x.v); }
inline void store(bf16* p, V x) {
    __m256i bits = _mm256_castps_si256(x.v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i round = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256 is_nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
    __m256i both = _mm256_srli_epi32(_mm256_blendv_epi8(round, nan, _mm256_castps_si256(is_nan)), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(both, both), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(f16* p, V x) {
    __m128i half = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
inline void store(float* p, V x, int64_t n) {
    if (n >= W) store(p, x);
    else _mm256_maskstore_ps(p, lanes(n), x.v);
}
template <class T> inline void store(T* p, V x, int64_t n) {
    if (n >= W) return store(p, x);
    T part[W];
    store(part, x);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
}
// Whole numbers from bytes, and to bytes (|x| <= 127; others become something).
inline V load_bytes(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline V load_bytes(const int8_t* p, int64_t n) {
    if (n >= W) return load_bytes(p);
    int8_t part[W] = {};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return load_bytes(part);
}
inline void store_bytes(int8_t* p, V x) {
    __m256i whole = _mm256_cvtps_epi32(x.v);
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
inline int32_t dot_bytes(const int8_t* a, const int8_t* b, int64_t n) {
    __m256i all = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i)));
        __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i)));
        all = _mm256_add_epi32(all, _mm256_madd_epi16(x, y));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    for (; i < n; i++) sum += int32_t(a[i]) * int32_t(b[i]);
    return sum;
}
inline V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline V maximum(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
inline V minimum(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
inline V round_even(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V absolute(V a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline V with_sign(V a, V sign) {
    __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_andnot_ps(bit, a.v), _mm256_and_ps(bit, sign.v))};
}
inline V scale2(V x, V n) {
    __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    __m256i rest = _mm256_sub_epi32(whole, half);
    __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(x.v, first), second)};
}
inline float sum(V a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(V a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline V sums(const V* a) {
    __m256 ab = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    __m256 cd = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(ab, cd, 0x20), _mm256_permute2f128_ps(ab, cd, 0x31))};
}
