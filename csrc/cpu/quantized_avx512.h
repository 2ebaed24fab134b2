// Integer products with vpdpbusd, of unsigned weights and signed tokens. Included inside the level's namespace, after
// quantized.h.
//
// A weight is made unsigned by adding 128 (8 bits) or is so as it lies (4 bits, + 8). What that adds to a sum depends
// on the token alone: it is taken off by what the accumulators start from, which is kept with the rounded token.

// Writes sums [m][r] to out[m * stride + r].
template <int R, int M> inline void spread(__m512 all, float* out, int64_t stride) {
    static_assert(R == 4 || R == 8);
    alignas(64) float part[16];
    _mm512_store_ps(part, all);
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r += 4) _mm_storeu_ps(out + m * stride + r, _mm_load_ps(part + m * R + r));
}

// The sums of 16 vectors of integers.
inline __m512i sums_of(const __m512i* a) {
    __m512i four[4];
    for (int i = 0; i < 4; i++) {
        const __m512i* b = a + 4 * i;
        __m512i x = _mm512_add_epi32(_mm512_unpacklo_epi32(b[0], b[1]), _mm512_unpackhi_epi32(b[0], b[1]));
        __m512i y = _mm512_add_epi32(_mm512_unpacklo_epi32(b[2], b[3]), _mm512_unpackhi_epi32(b[2], b[3]));
        four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
    }
    __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x88),
                                  _mm512_shuffle_i32x4(four[0], four[1], 0xdd));
    __m512i cd = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2], four[3], 0x88),
                                  _mm512_shuffle_i32x4(four[2], four[3], 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}

// As `strip` and `tile` of linear.h, with `Form::dots`.
template <class Form, int R, int M>
inline void strip_of(const int8_t* x, int64_t stride_x, const Weights& w, int64_t first, int64_t count, float* out) {
    for (int64_t n = 0; n < count; n += R) {
        const uint8_t* q[R];
        const float* scale[R];
        bool whole = n + R <= count;
        for (int r = 0; r < R; r++) {
            int64_t row = first + least(n + r, count - 1);
            q[r] = w.q + row * w.stride;
            scale[r] = w.scale + row * w.groups;
        }
        float part[M * R];
        float* to = whole ? out + n : part;
        Form::template dots<R, M>(q, scale, x, stride_x, w.size, whole ? Form::ahead * w.stride : 0, to,
                                  whole ? LINEAR_ROWS : R);
        if (whole) continue;
        for (int m = 0; m < M; m++)
            for (int r = 0; n + r < count; r++) out[m * LINEAR_ROWS + n + r] = part[m * R + r];
    }
}
// One token: row after row, so that the weights are one stream (see `lone`).
template <class Form>
inline void lone_of(const int8_t* x, const Weights& w, int64_t first, int64_t count, float* out) {
    for (int64_t n = 0; n < count; n += 16) {
        int64_t rows = least(16, count - n);
        typename Form::Sum a[16] = {};
        for (int64_t r = 0; r < rows; r++) {
            int64_t row = first + n + r;
            Form::row(w.q + row * w.stride, w.scale + row * w.groups, x, w.size, a + r);
        }
        store(out + n, Form::total(a), rows);
    }
}
template <class Form>
inline void tile_of(const int8_t* x, int64_t stride, int64_t tokens, const Weights& w, int64_t first, int64_t count,
                    float* out) {
    if (tokens == 1) return lone_of<Form>(x, w, first, count, out);
    if (tokens == 2) return strip_of<Form, 8, 2>(x, stride, w, first, count, out);
    for (int64_t n = 0; n < count; n += 4) {
        int64_t m = 0, now = least(4, count - n), row = first + n;
        for (; m + 4 <= tokens; m += 4)
            strip_of<Form, 4, 4>(x + m * stride, stride, w, row, now, out + m * LINEAR_ROWS + n);
        const int8_t* y = x + m * stride;
        float* to = out + m * LINEAR_ROWS + n;
        if (tokens - m == 3) strip_of<Form, 4, 3>(y, stride, w, row, now, to);
        else if (tokens - m == 2) strip_of<Form, 4, 2>(y, stride, w, row, now, to);
        else if (tokens - m == 1) strip_of<Form, 4, 1>(y, stride, w, row, now, to);
    }
}

// 8 bits, one scale for a row. A token: 64 bytes that the accumulators start from, then its numbers.
struct Bytes {
    static constexpr bool scale_rows = true;
    static constexpr int64_t ahead = 2 * LINEAR_AHEAD;
    static inline int64_t bytes(int64_t size) { return 64 + padded(size); }
    static inline int64_t room(int64_t size) { return padded(size); }
    static inline void arrange(const int8_t* plain, int64_t size, int8_t* to) {
        __m512i start = _mm512_setzero_si512();
        for (int64_t k = 0; k < padded(size); k += 64) {
            __m512i v = _mm512_loadu_si512(plain + k);
            start = _mm512_dpbusd_epi32(start, _mm512_set1_epi8(-128), v);
            _mm512_storeu_si512(to + 64 + k, v);
        }
        _mm512_storeu_si512(to, _mm512_sub_epi32(_mm512_setzero_si512(), start));
    }
    template <int R, int M>
    static inline void dots(const uint8_t* const* q, const float* const*, const int8_t* x, int64_t stride, int64_t size,
                            int64_t ahead, float* out, int64_t stride_out) {
        __m512i a[16], high = _mm512_set1_epi8(-128);
        for (int i = 0; i < 16; i++)
            a[i] = i < R * M ? _mm512_loadu_si512(x + i / R * stride) : _mm512_setzero_si512();
        x += 64;
        int64_t k = 0;
        for (; k + 64 <= size; k += 64) {
            __m512i y[M];
            for (int m = 0; m < M; m++) y[m] = _mm512_loadu_si512(x + m * stride + k);
            for (int r = 0; r < R; r++) {
                _mm_prefetch(reinterpret_cast<const char*>(q[r] + k + ahead), _MM_HINT_T1);
                __m512i v = _mm512_xor_si512(_mm512_loadu_si512(q[r] + k), high);
                for (int m = 0; m < M; m++) a[m * R + r] = _mm512_dpbusd_epi32(a[m * R + r], v, y[m]);
            }
        }
        if (k < size) {
            __mmask64 mask = (1ull << (size - k)) - 1;
            for (int r = 0; r < R; r++) {
                __m512i v = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, q[r] + k), high);
                for (int m = 0; m < M; m++)
                    a[m * R + r] = _mm512_dpbusd_epi32(a[m * R + r], v, _mm512_loadu_si512(x + m * stride + k));
            }
        }
        spread<R, M>(_mm512_cvtepi32_ps(sums_of(a)), out, stride_out);
    }
    using Sum = __m512i;
    static inline V total(const Sum* a) { return {_mm512_cvtepi32_ps(sums_of(a))}; }
    static inline void row(const uint8_t* q, const float*, const int8_t* x, int64_t size, Sum* to) {
        __m512i high = _mm512_set1_epi8(-128), a[4] = {_mm512_loadu_si512(x)};
        x += 64;
        int64_t k = 0;
        auto one = [&](int i) {
            _mm_prefetch(reinterpret_cast<const char*>(q + k) + LONE_AHEAD, _MM_HINT_T1);
            __m512i v = _mm512_xor_si512(_mm512_loadu_si512(q + k), high);
            a[i] = _mm512_dpbusd_epi32(a[i], v, _mm512_loadu_si512(x + k));
            k += 64;
        };
        while (k + 256 <= size) one(0), one(1), one(2), one(3);
        for (int i = 0; k + 64 <= size; i++) one(i & 3);
        if (k < size) {
            __m512i v = _mm512_xor_si512(_mm512_maskz_loadu_epi8((1ull << (size - k)) - 1, q + k), high);
            a[0] = _mm512_dpbusd_epi32(a[0], v, _mm512_loadu_si512(x + k));
        }
        *to = _mm512_add_epi32(_mm512_add_epi32(a[0], a[1]), _mm512_add_epi32(a[2], a[3]));
    }
    static inline void products(const int8_t* x, int64_t stride, int64_t tokens, const Weights& w, int64_t first,
                                int64_t count, float* sums, int8_t*) {
        tile_of<Bytes>(x, stride, tokens, w, first, count, sums);
    }
};

// 4 bits, groups of 32, which are 16 bytes: a vector has 4 of them, and the sums of each in 4 lanes. A token, for every
// 128 inputs: 64 bytes that the accumulators start from, then the even inputs, then the odd ones.
struct Nibbles {
    static constexpr bool scale_rows = false;
    static constexpr int64_t ahead = 2 * LINEAR_AHEAD;
    static inline int64_t bytes(int64_t size) { return padded(size) / 128 * 192; }
    static inline int64_t room(int64_t size) { return padded(size); }
    static inline void arrange(const int8_t* plain, int64_t size, int8_t* to) {
        __m512i even = _mm512_set1_epi16(255), eights = _mm512_set1_epi8(8);
        __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        for (int64_t k = 0; k < padded(size); k += 128, to += 192) {
            __m512i a = _mm512_loadu_si512(plain + k), b = _mm512_loadu_si512(plain + k + 64);
            __m512i low = _mm512_packus_epi16(_mm512_and_si512(a, even), _mm512_and_si512(b, even));
            __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
            low = _mm512_permutexvar_epi64(order, low);
            high = _mm512_permutexvar_epi64(order, high);
            __m512i start = _mm512_dpbusd_epi32(_mm512_setzero_si512(), eights, low);
            start = _mm512_dpbusd_epi32(start, eights, high);
            start = _mm512_add_epi32(start, _mm512_shuffle_epi32(start, _MM_PERM_ENUM(0x4e)));
            start = _mm512_add_epi32(start, _mm512_shuffle_epi32(start, _MM_PERM_ENUM(0xb1)));
            start = _mm512_maskz_sub_epi32(0x1111, _mm512_setzero_si512(), start);  // the first lane of each group
            _mm512_storeu_si512(to, start);
            _mm512_storeu_si512(to + 64, low);
            _mm512_storeu_si512(to + 128, high);
        }
    }
    // 128 inputs of R rows and M tokens, of which `left` exist; `a` has `stride_a` accumulators for each token.
    template <int R, int stride_a, int M, bool whole>
    static inline void step(const uint8_t* const* q, const float* const* scale, int64_t k, int64_t left, int64_t ahead,
                            const int8_t* x, int64_t stride, V* a) {
        __m512i lows = _mm512_set1_epi8(15), each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        __m512i low[R], high[R];
        __m512 by[R];
        for (int r = 0; r < R; r++) {
            const uint8_t* from = q[r] + k / 2;
            if (whole) _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T1);
            __m512i v = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << left / 2) - 1, from);
            __m128 few = whole ? _mm_loadu_ps(scale[r] + k / 32)
                               : _mm_maskz_loadu_ps(__mmask8((1u << left / 32) - 1), scale[r] + k / 32);
            low[r] = _mm512_and_si512(v, lows);
            high[r] = _mm512_and_si512(_mm512_srli_epi16(v, 4), lows);
            by[r] = _mm512_permutevar_ps(_mm512_broadcast_f32x4(few), each);
        }
        for (int m = 0; m < M; m++) {
            const int8_t* y = x + m * stride;
            __m512i start = _mm512_loadu_si512(y), even = _mm512_loadu_si512(y + 64), odd = _mm512_loadu_si512(y + 128);
            for (int r = 0; r < R; r++) {
                __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, low[r], even), high[r], odd);
                V& to = a[m * stride_a + r];
                to.v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by[r], to.v);
            }
        }
    }
    template <int R, int M>
    static inline void dots(const uint8_t* const* q, const float* const* scale, const int8_t* x, int64_t stride,
                            int64_t size, int64_t ahead, float* out, int64_t stride_out) {
        V a[16];
        for (int i = 0; i < 16; i++) a[i] = zero();
        int64_t k = 0;
        constexpr int rows = M <= 2 ? 1 : R;  // at a time, as registers allow
        for (; k + 128 <= size; k += 128, x += 192)
            for (int r = 0; r < R; r += rows)
                step<rows, R, M, true>(q + r, scale + r, k, 128, ahead, x, stride, a + r);
        for (int r = 0; r < R && k < size; r += rows)
            step<rows, R, M, false>(q + r, scale + r, k, size - k, ahead, x, stride, a + r);
        spread<R, M>(sums(a).v, out, stride_out);
    }
    using Sum = V;
    static inline V total(const V* a) { return sums(a); }
    static inline void row(const uint8_t* q, const float* scale, const int8_t* x, int64_t size, V* to) {
        V a[2] = {zero(), zero()};
        int64_t k = 0;
        for (; k + 256 <= size; k += 256, x += 384) {
            step<1, 1, 1, true>(&q, &scale, k, 128, LONE_AHEAD, x, 0, a);
            step<1, 1, 1, true>(&q, &scale, k + 128, 128, LONE_AHEAD, x + 192, 0, a + 1);
        }
        for (; k + 128 <= size; k += 128, x += 192) step<1, 1, 1, true>(&q, &scale, k, 128, LONE_AHEAD, x, 0, a);
        if (k < size) step<1, 1, 1, false>(&q, &scale, k, size - k, LONE_AHEAD, x, 0, a);
        *to = add(a[0], a[1]);
    }
    static inline void products(const int8_t* x, int64_t stride, int64_t tokens, const Weights& w, int64_t first,
                                int64_t count, float* sums, int8_t*) {
        tile_of<Nibbles>(x, stride, tokens, w, first, count, sums);
    }
};
