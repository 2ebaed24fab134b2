// Linear layers of many tokens: a lane is a token. Included inside the level's namespace, after quantized.h.
//
// Owns: the order of tokens, the tiles, their way back to rows of outputs. The tokens are turned once, so that a word (2
// inputs in bf16, 4 in int8) of 16 tokens is one register; a weight's word goes to all lanes straight from its row. No
// weight is packed and no sum over lanes is left to make: on Zen 4, one thread, 229 of 235 GFLOP/s in bf16 at 32
// tokens, where dot products of rows (linear.h) did 200-219 and panels turned from weight rows 121-184.

constexpr int64_t LANES_FROM = 12;          // up to so many tokens dot products (linear.h) are as fast
constexpr int64_t LANES_FROM_BYTES = 8;     // the same of integers
// Tokens beyond a multiple of 16 that are left to dot products. Those sum in another order: the last bits of a token's
// outputs depend on its place in the step, and where two logits are all but equal another one may win.
constexpr int64_t LANES_REST = 8;
constexpr int LANES_ROWS = 8;               // weight rows of a tile: rows 4 KiB apart share one set of 8 lines in L1
constexpr int LANES_GROUPS = 3;            // groups of 16 tokens of a tile, at most: 24 registers of sums
constexpr int64_t LANES_STRIP = 128 << 10;  // of weights before the next tokens: they stay in the L2 cache
constexpr int64_t LANES_BYTES = 4 << 20;   // of turned tokens at a time: they are read from the L3 cache

// Groups of the next tile when `left` are left: no single one at the end that 2 and 2 avoid.
template <class Form> inline int64_t groups_of(int64_t left) { return left == 4 ? 2 : least(left, Form::groups); }

// 16 rows of 16 words as 16 rows of the words' lanes, `pitch` bytes apart; `to` may be `a`.
inline void turn_words(const __m512i* a, char* to, int64_t pitch) {
    __m512i b[16];
    for (int r = 0; r < 16; r += 4) {  // 4 x 4 words in each of the 4 parts of a register
        __m512i x = _mm512_unpacklo_epi32(a[r], a[r + 1]), y = _mm512_unpacklo_epi32(a[r + 2], a[r + 3]);
        __m512i z = _mm512_unpackhi_epi32(a[r], a[r + 1]), u = _mm512_unpackhi_epi32(a[r + 2], a[r + 3]);
        b[r] = _mm512_unpacklo_epi64(x, y);
        b[r + 1] = _mm512_unpackhi_epi64(x, y);
        b[r + 2] = _mm512_unpacklo_epi64(z, u);
        b[r + 3] = _mm512_unpackhi_epi64(z, u);
    }
    for (int i = 0; i < 4; i++, to += pitch) {  // part p of b[i], b[4 + i], ... are words 4p + i of the rows
        __m512i x = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x44), y = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x44);
        __m512i z = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xee), u = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xee);
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(x, y, 0x88));
        _mm512_storeu_si512(to + 4 * pitch, _mm512_shuffle_i32x4(x, y, 0xdd));
        _mm512_storeu_si512(to + 8 * pitch, _mm512_shuffle_i32x4(z, u, 0x88));
        _mm512_storeu_si512(to + 12 * pitch, _mm512_shuffle_i32x4(z, u, 0xdd));
    }
}
// The same of rows in memory: `count` of 16, zeros for the others; ceil(bytes / 4) words of each.
inline void turn_rows(const char* from, int64_t stride, int64_t count, int64_t bytes, char* to, int64_t pitch) {
    for (int64_t k = 0; k < bytes; k += 64, to += 16 * pitch) {
        int64_t left = bytes - k;
        __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
        __m512i a[16];
        for (int r = 0; r < 16; r++)
            a[r] = r < count ? _mm512_maskz_loadu_epi8(mask, from + r * stride + k) : _mm512_setzero_si512();
        if (left >= 64) {
            turn_words(a, to, pitch);
        } else {
            alignas(64) char last[16 * 64];
            turn_words(a, last, 64);
            for (int64_t i = 0; i < ceil_div(left, 4); i++) __builtin_memcpy(to + i * pitch, last + i * 64, 64);
        }
    }
}

inline __m512i word_at(const char* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}

// Rows of a strip: `base` and the bytes from one to the next.
struct Strip {
    const char* base;
    int64_t stride;
};

// What to ask for on the way, a line for a line of each row: rows `stride` bytes apart, of `bytes` each (0: nothing).
struct Ahead {
    const char* rows;
    int64_t stride, bytes;
};

// The words of `rows` weight rows (`w`, `stride` bytes apart) with G groups of turned tokens, by `product`, for the words
// begin .. end in bytes.
template <int N, int G, class Sum, class Product>
inline void lanes_words(const char* w, int64_t stride, const char*& x, int64_t begin, int64_t end,
                        const Ahead& ahead, Sum (&a)[N][G], Product product) {
    const char *w0 = w, *w3 = w + 3 * stride, *w6 = w + 6 * stride;  // the others are one or two strides from these
    for (int64_t line = begin; line < end; line += 64) {
        if (line < ahead.bytes)
            for (int n = 0; n < N; n++) _mm_prefetch(ahead.rows + n * ahead.stride + line, _MM_HINT_T1);
        for (int64_t k = line, stop = least(line + 64, end); k < stop; k += 4, x += 64 * G) {
            __m512i y[G];
            for (int g = 0; g < G; g++) y[g] = _mm512_loadu_si512(x + 64 * g);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                __m512i v = word_at((n < 3 ? w0 : n < 6 ? w3 : w6) + n % 3 * stride + k);
                for (int g = 0; g < G; g++) a[n][g] = product(a[n][g], y[g], v);
            }
        }
    }
}

// Rows in bf16 with tokens in bf16. `Q`: the rows are dequantized first.
template <bool Q> struct PairLanes {
    using A = bf16;
    static constexpr bool scaled = false;  // whether sums need `scale`
    static constexpr int groups = LANES_GROUPS;
    const char *weights, *x;
    int64_t size, stride, stride_x;
    const qr_op& op;
    explicit PairLanes(const qr_op& op)
        : weights(static_cast<const char*>(op.p[1])), x(static_cast<const char*>(op.p[0])), size(op.i[2]),
          stride(op.i[4] * (Q ? 1 : 2)), stride_x(2 * op.i[3]), op(op) {}
    int64_t span() const { return ceil_div(size, 2) * 4; }  // bytes of a turned token
    // Bytes of a thread's scratch, for so many rows or 16 tokens.
    int64_t room(int64_t rows) const { return Q ? rows * (2 * padded(size) + 64) + padded(size) : 0; }
    const char* row(int64_t n) const { return weights + n * stride; }
    // 16 tokens, `pitch` bytes from a word of all to the next.
    void turn(int64_t first, int64_t count, char* to, int64_t pitch, float*, char*) const {
        turn_rows(x + first * stride_x, stride_x, count, 2 * size, to, pitch);
    }
    Strip rows(int64_t first, int64_t count, char* room) const {
        if constexpr (!Q) return {row(first), stride};
        Weights w(op);
        int64_t wide = 2 * padded(size) + 64;
        auto* bytes = reinterpret_cast<int8_t*>(room + count * wide);
        for (int64_t r = 0; r < count; r++)
            dequantize<bf16>(w, w.row(first + r, bytes), w.scale + (first + r) * w.groups, 0, size,
                             reinterpret_cast<bf16*>(room + r * wide));
        return {room, wide};
    }
    template <int G>
    void tile(const Strip& rows, int64_t n, int64_t, int step, const char* x, const char* ahead,
              float* out) const {
        constexpr int N = LANES_ROWS;
        __m512 a[N][G];
        for (int i = 0; i < N; i++)
            for (int g = 0; g < G; g++) a[i][g] = _mm512_setzero_ps();
        auto product = [](__m512 to, __m512i y, __m512i v) { return _mm512_dpbf16_ps(to, (__m512bh)y, (__m512bh)v); };
        const char* w = rows.base + n * rows.stride;
        int64_t by = step * rows.stride, whole = 2 * size & ~int64_t(3);
        int64_t bytes = Q ? size * op.i[7] / 8 : whole;  // of a row as it lies in memory
        lanes_words(w, by, x, 0, whole, Ahead{ahead, stride, ahead ? bytes : 0}, a, product);
        if (whole < 2 * size)
            for (int i = 0; i < N; i++) {
                uint16_t half;
                __builtin_memcpy(&half, w + i * by + whole, 2);
                for (int g = 0; g < G; g++) a[i][g] = product(a[i][g], _mm512_loadu_si512(x + 64 * g), _mm512_set1_epi32(half));
            }
        for (int i = 0; i < N; i++)
            for (int g = 0; g < G; g++) _mm512_storeu_ps(out + (i * G + g) * 16, a[i][g]);
    }
    void scale(int64_t, int64_t, float, float*) const {}
    int64_t few_span() const { return 0; }
    void few(int64_t, int64_t, char*, float*, char*) const {}
    void few_sums(const Strip& rows, int64_t, int64_t count, int64_t token, int64_t tokens, const char*,
                  float* sums) const {
        constexpr int64_t depth = LINEAR_BYTES / 2;
        auto* from = reinterpret_cast<const bf16*>(x + token * stride_x);
        for (int64_t k = 0; k < size; k += depth)
            ::qr::avx512::tile(from + k, stride_x / 2, tokens, least(depth, size - k),
                               reinterpret_cast<const bf16*>(rows.base) + k, rows.stride / 2, count, sums, k > 0);
    }
};

// Rounded tokens with weights in 8 bits (one scale a row) or 4 (one for 32 inputs). Weights become unsigned by adding
// 128 or 8; what that adds to a sum is what its accumulator starts from, a word before the words of the row or group.
template <class T, int bits> struct ByteLanes {
    using A = T;
    static constexpr bool scaled = true;
    static constexpr int groups = bits == 8 ? 2 : LANES_GROUPS;  // of 8 bits 3 run at two thirds of the speed of 2
    static constexpr int64_t group = bits == 4 ? 32 : 0;  // 0: the row
    using Few = typename Choose<bits == 8, Bytes, Nibbles>::type;
    Weights w;
    const T* x;
    int64_t size, stride, stride_x, wide;
    explicit ByteLanes(const qr_op& op)
        : w(op), x(static_cast<const T*>(op.p[0])), size(w.size), stride(w.stride), stride_x(op.i[3]),
          wide(padded(size) + 64) {}
    int64_t span() const { return ceil_div(size, 4) * 4 + (group ? size / 32 : 1) * 4; }
    int64_t room(int64_t rows) const { return rows * wide; }
    const char* row(int64_t n) const { return reinterpret_cast<const char*>(w.q) + n * stride; }
    void turn(int64_t first, int64_t count, char* to, int64_t pitch, float* scales, char* room) const {
        auto* rows = reinterpret_cast<int8_t*>(room);
        for (int64_t t = 0; t < count; t++) scales[t] = round_token(x + (first + t) * stride_x, size, rows + t * wide);
        int64_t part = group ? group : size;
        for (int64_t k = 0; k < size; k += part) {
            int32_t starts[16] = {};
            for (int64_t t = 0; t < count; t++) {
                __m512i sum = _mm512_setzero_si512();
                for (int64_t i = 0; i < part; i += 64) {
                    __mmask64 mask = part - i >= 64 ? ~0ull : (1ull << (part - i)) - 1;
                    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(1 << (bits - 1))),
                                              _mm512_maskz_loadu_epi8(mask, rows + t * wide + k + i));
                }
                starts[t] = -_mm512_reduce_add_epi32(sum);
            }
            __builtin_memcpy(to, starts, 64);
            turn_rows(room + k, wide, count, part, to + pitch, pitch);
            to += (1 + ceil_div(part, 4)) * pitch;
        }
    }
    Strip rows(int64_t first, int64_t count, char* room) const {
        for (int64_t r = 0; r < count; r++) {
            const char* from = row(first + r);
            char* to = room + r * wide;
            for (int64_t k = 0; k < stride_of(size); k += 64) {
                __mmask64 mask = stride_of(size) - k >= 64 ? ~0ull : (1ull << (stride_of(size) - k)) - 1;
                __m512i v = _mm512_maskz_loadu_epi8(mask, from + k);
                if constexpr (bits == 8) {
                    _mm512_storeu_si512(to + k, _mm512_xor_si512(v, _mm512_set1_epi8(-128)));
                } else {
                    __m512i lows = _mm512_set1_epi8(15), even = _mm512_and_si512(v, lows);
                    __m512i odd = _mm512_and_si512(_mm512_srli_epi16(v, 4), lows);
                    __m512i a = _mm512_unpacklo_epi8(even, odd), b = _mm512_unpackhi_epi8(even, odd);
                    __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
                    __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
                    _mm512_storeu_si512(to + 2 * k, _mm512_permutex2var_epi64(a, lower, b));
                    _mm512_storeu_si512(to + 2 * k + 64, _mm512_permutex2var_epi64(a, upper, b));
                }
            }
        }
        return {room, wide};
    }
    static int64_t stride_of(int64_t size) { return bits == 8 ? size : size / 2; }
    template <int G>
    void tile(const Strip& rows, int64_t n, int64_t first, int step, const char* x, const char* ahead,
              float* out) const {
        constexpr int N = bits == 8 ? LANES_ROWS : LANES_ROWS / 2;
        auto product = [](__m512i to, __m512i y, __m512i v) { return _mm512_dpbusd_epi32(to, v, y); };
        for (int half = 0; half < LANES_ROWS; half += N) {
            const char *from = rows.base + (n + half * step) * rows.stride, *y = x;
            const char* ask = ahead ? ahead + half * stride : nullptr;
            __m512i a[N][G];
            if constexpr (bits == 8) {
                for (int i = 0; i < N; i++)
                    for (int g = 0; g < G; g++) a[i][g] = _mm512_loadu_si512(y + 64 * g);
                y += 64 * G;
                lanes_words(from, step * rows.stride, y, 0, size, Ahead{ask, stride, ask ? size : 0}, a, product);
                for (int i = 0; i < N; i++)
                    for (int g = 0; g < G; g++)
                        _mm512_storeu_ps(out + (i * G + g) * 16, _mm512_cvtepi32_ps(a[i][g]));
                return;
            }
            __m512 total[N][G];
            for (int i = 0; i < N; i++)
                for (int g = 0; g < G; g++) total[i][g] = _mm512_setzero_ps();
            for (int64_t k = 0; k < size; k += group) {
                for (int i = 0; i < N; i++)
                    for (int g = 0; g < G; g++) a[i][g] = _mm512_loadu_si512(y + 64 * g);
                y += 64 * G;
                bool each = ask && k % 128 == 0;  // a line of 64 bytes holds 128 of them
                lanes_words(from + k, step * rows.stride, y, 0, group, Ahead{each ? ask + k / 2 : nullptr, stride, each ? 64 : 0}, a, product);
                for (int i = 0; i < N; i++) {
                    __m512 by = _mm512_set1_ps(w.scale[(first + (half + i) * step) * w.groups + k / 32]);
                    for (int g = 0; g < G; g++)
                        total[i][g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[i][g]), by, total[i][g]);
                }
            }
            for (int i = 0; i < N; i++)
                for (int g = 0; g < G; g++) _mm512_storeu_ps(out + ((half + i) * G + g) * 16, total[i][g]);
        }
    }
    // Tokens for dot products.
    int64_t few_span() const { return Few::bytes(size); }
    void few(int64_t first, int64_t count, char* to, float* scales, char* room) const {
        for (int64_t t = 0; t < count; t++) {
            scales[t] = round_token(x + (first + t) * stride_x, size, reinterpret_cast<int8_t*>(room));
            Few::arrange(reinterpret_cast<int8_t*>(room), size, reinterpret_cast<int8_t*>(to + t * few_span()));
        }
    }
    void few_sums(const Strip&, int64_t first, int64_t count, int64_t, int64_t tokens, const char* few,
                  float* sums) const {
        tile_of<Few>(reinterpret_cast<const int8_t*>(few), few_span(), tokens, w, first, count, sums);
    }
    // The scales of a token and, in 8 bits, of the rows.
    void scale(int64_t first, int64_t count, float token, float* sums) const {
        for (int64_t n = 0; n < count; n += W) {
            V r = load(sums + n);
            if (!group) r = mul(r, load(w.scale + first + n, count - n));
            store(sums + n, mul(r, set(token)));
        }
    }
};

// A strip's rows with the tokens of one block: sums[t * LINEAR_ROWS + n]. `ask`: whether to ask for the next strip's.
template <int G, class Form>
inline void lanes_strip(const Form& form, const Strip& rows, int64_t first, int64_t count, const char* x, bool ask,
                        float* sums) {
    constexpr int64_t wide = 16 * G;
    alignas(64) float part[16 * wide];
    for (int64_t n = 0; n < count; n += 16) {
        for (int64_t h = 0; h < 16 && n + h < count; h += LANES_ROWS) {
            int64_t at = n + h;
            float* to = part + h * wide;
            if (at + LANES_ROWS <= count) {
                const char* ahead = ask ? form.row(first + at + count) : nullptr;
                form.template tile<G>(rows, at, first + at, 1, x, ahead, to);
                continue;
            }
            for (; at < count; at++, to += wide) {  // the few that are left, each in the place of all
                alignas(64) float same[LANES_ROWS * wide];
                form.template tile<G>(rows, at, first + at, 0, x, nullptr, same);
                __builtin_memcpy(to, same, wide * sizeof(float));
            }
        }
        for (int g = 0; g < G; g++) {
            __m512i a[16];
            for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(part + i * wide + 16 * g);
            turn_words(a, reinterpret_cast<char*>(sums + 16 * g * LINEAR_ROWS + n), LINEAR_ROWS * sizeof(float));
        }
    }
}

// The threads share the outputs; the tokens are turned by all of them. A few tokens beyond a multiple of 16 are left to
// dot products, whose time follows their number.
template <class Form, class C> void linear_lanes(const qr_op& op, Context& c) {
    using A = typename Form::A;
    Form form(op);
    int64_t tokens = c.count(op.i[0]), outputs = op.i[1], span = form.span(), stride = 16 * span;
    int64_t rest = tokens > 16 && tokens % 16 <= LANES_REST ? tokens % 16 : 0, turned = tokens - rest;
    int halves = op.flags & QR_GATED ? 2 : 1;
    int64_t grain = grain_of(outputs, c.threads), pieces = ceil_div(outputs, grain);
    int64_t chunk = least(ceil_div(turned, 16) * 16, most(1, LANES_BYTES / stride / LANES_GROUPS) * 16 * LANES_GROUPS);
    int64_t all = chunk * span, few_bytes = rest * form.few_span();
    auto* memory = static_cast<char*>(c.shared(size_t(all + few_bytes + (chunk + rest) * int64_t(sizeof(float)))));
    auto* few = memory + all;
    auto* scales = reinterpret_cast<float*>(few + few_bytes);
    int64_t strip = most(16, least(LINEAR_ROWS, LANES_STRIP / most(form.stride, 64) / 16 * 16)), wide = form.room(strip);
    auto* room = static_cast<char*>(c.scratch(size_t(most(2 * wide, form.room(16)))));
    alignas(64) float sums[2][16 * LANES_GROUPS * LINEAR_ROWS];
    // Outputs that will be written soon: each line would be waited for otherwise, as rows lie far apart.
    auto own_outputs = [&](int64_t token, int64_t some, int64_t first, int64_t count) {
        auto* to = static_cast<C*>(op.p[3]) + token * op.i[5] + first;
        for (int64_t t = 0; t < some; t++, to += op.i[5])
            for (int64_t n = 0; n < count; n += 64 / int64_t(sizeof(C))) __builtin_prefetch(to + n, 1, 3);
    };
    // The sums of tokens `token` .. become outputs first ..
    auto deliver = [&](int64_t token, int64_t some, const float* by, int64_t first, int64_t count) {
        for (int64_t t = 0; t < some; t++) {
            float *one = sums[0] + t * LINEAR_ROWS, *two = sums[1] + t * LINEAR_ROWS;
            for (int half = 0; half < halves && Form::scaled; half++)
                form.scale(first + half * outputs, count, by[t], sums[half] + t * LINEAR_ROWS);
            finish<A, A, C>(op, token + t, first, count, halves > 1 ? two : one, halves > 1 ? one : nullptr);
        }
    };
    for (int64_t start = 0; start < turned; start += chunk) {
        int64_t now = least(chunk, turned - start), units = ceil_div(now, 16);
        bool last = start + now == turned;
        for (int64_t unit; (unit = c.take(units + (last && few_bytes))) >= 0;) {
            if (unit == units) {
                form.few(turned, rest, few, scales + chunk, room);
                continue;
            }
            int64_t begin = 0, groups = groups_of<Form>(units);
            while (begin + groups <= unit) begin += groups, groups = groups_of<Form>(units - begin);
            form.turn(start + 16 * unit, least(16, now - 16 * unit), memory + begin * stride + 64 * (unit - begin),
                      64 * groups, scales + 16 * unit, room);
        }
        c.barrier();
        for (int64_t piece; (piece = c.take_near(pieces)) >= 0;) {
            int64_t end = least(outputs, (piece + 1) * grain);
            for (int64_t first = piece * grain, count; first < end; first += count) {
                count = least(strip, end - first);
                Strip rows[2];
                for (int half = 0; half < halves; half++)
                    rows[half] = form.rows(first + half * outputs, count, room + half * wide);
                for (int64_t unit = 0, groups; unit < units; unit += groups) {
                    groups = groups_of<Form>(units - unit);
                    const char* x = memory + unit * stride;
                    own_outputs(start + 16 * unit, least(16 * groups, now - 16 * unit), first, count);
                    bool ask = unit == 0;  // later the rows are there already
                    for (int half = 0; half < halves; half++) {
                        int64_t from = first + half * outputs;
                        if (groups == 1) lanes_strip<1>(form, rows[half], from, count, x, ask, sums[half]);
                        else if (groups == 2) lanes_strip<2>(form, rows[half], from, count, x, ask, sums[half]);
                        else if constexpr (Form::groups > 2) lanes_strip<3>(form, rows[half], from, count, x, ask, sums[half]);
                    }
                    deliver(start + 16 * unit, least(16 * groups, now - 16 * unit), scales + 16 * unit, first, count);
                }
                if (!last || !rest) continue;
                for (int half = 0; half < halves; half++)
                    form.few_sums(rows[half], first + half * outputs, count, turned, rest, few, sums[half]);
                deliver(turned, rest, scales + chunk, first, count);
            }
        }
        if (!last) c.barrier();
    }
}

void linear(const qr_op& op, Context& c) {
    bool many = c.count(op.i[0]) > LANES_FROM;
    if (type_a(op) != QR_BF16) linear_generic(op, c);
    else if (type_c(op) == QR_F32) many ? linear_lanes<PairLanes<false>, float>(op, c) : linear_rows<bf16, bf16, float, bf16>(op, c);
    else many ? linear_lanes<PairLanes<false>, bf16>(op, c) : linear_rows<bf16, bf16, bf16, bf16>(op, c);
}

template <int bits> void linear_bytes(const qr_op& op, Context& c) {
    using Few = typename ByteLanes<bf16, bits>::Few;
    if (c.count(op.i[0]) <= LANES_FROM_BYTES) return linear_integers_of<Few>(op, c);
    with_type(type_a(op), [&](auto a) {
        using A = typename decltype(a)::type;
        if (type_c(op) == QR_F32) linear_lanes<ByteLanes<A, bits>, float>(op, c);
        else linear_lanes<ByteLanes<A, bits>, A>(op, c);
    });
}

void linear_q(const qr_op& op, Context& c) {
    bool many = c.count(op.i[0]) > LANES_FROM;
    if (op.i[9] && op.i[7] == 8 && op.i[8] == op.i[2]) linear_bytes<8>(op, c);
    else if (op.i[9] && op.i[7] == 4 && op.i[8] == 32) linear_bytes<4>(op, c);
    else if (op.i[9]) linear_integers_of<Plain>(op, c);
    else if (type_a(op) != QR_BF16) linear_floats_of(op, c);
    else if (type_c(op) == QR_F32) many ? linear_lanes<PairLanes<true>, float>(op, c) : linear_floats<bf16, float, bf16>(op, c);
    else many ? linear_lanes<PairLanes<true>, bf16>(op, c) : linear_floats<bf16, bf16, bf16>(op, c);
}
