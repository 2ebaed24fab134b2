// Linear layers from weights of 8 or 4 bits (QR_LINEAR_Q). Included inside a level's namespace, after linear.h.
//
// Owns: the rounding of tokens to int8, the dequantization of weight rows, and the split over threads; the epilogue is
// that of linear.h. A level may have forms of its own for integer products: see `Plain`, the one that serves all.
//
// Integer products: tokens are rounded once (by each thread where they are few, else shared out), then every weight is
// read once for a block of tokens. Weight-only: a few rows at a time become bf16 or float in the L1 cache, for the dot
// products of linear.h.

constexpr int64_t QUANTIZED_BYTES = 256 << 10;  // of a block's rounded tokens: a quarter of the L2 cache
constexpr int64_t QUANTIZED_ALONE = 8192;       // so few numbers are rounded by each thread for itself
constexpr int64_t QUANTIZED_ROWS = 8;           // rows dequantized at a time

struct Weights {
    const uint8_t* q;
    const float* scale;
    int64_t stride, size, group, groups, bits;
    inline explicit Weights(const qr_op& op)
        : q(static_cast<const uint8_t*>(op.p[1])), scale(static_cast<const float*>(op.p[5])), stride(op.i[4]),
          size(op.i[2]), group(op.i[8]), groups(op.i[2] / most(op.i[8], 1)), bits(op.i[7]) {}
    // Row n as int8: where it lies, or in `room`.
    inline const int8_t* row(int64_t n, int8_t* room) const {
        const uint8_t* from = q + n * stride;
        if (bits == 8) return reinterpret_cast<const int8_t*>(from);
        for (int64_t i = 0; i < size / 2; i++) {
            room[2 * i] = int8_t((from[i] & 15) - 8);
            room[2 * i + 1] = int8_t((from[i] >> 4) - 8);
        }
        return room;
    }
};

inline int64_t padded(int64_t size) { return ceil_div(size, 128) * 128; }

// x as int8, zeros up to padded(size); returns the scale: its largest magnitude becomes 127. NaN where x is not finite.
template <class A> inline float round_token(const A* x, int64_t size, int8_t* out) {
    V top = zero(), odd = zero();
    for (int64_t k = 0; k < size; k += W) {
        V v = load(x + k, size - k);
        top = maximum(absolute(v), top);
        odd = add(odd, mul(v, zero()));
    }
    float high = largest(top), strange = sum(odd);
    float scale = (high < 1e-12f ? 1e-12f : high) / 127.0f;
    if (strange != strange) scale = strange;
    V by = set(scale);
    int64_t k = 0;
    for (; k + W <= size; k += W) store_bytes(out + k, round_even(div(load(x + k), by)));
    if (k < size) store_bytes(out + k, round_even(div(load(x + k, size - k), by)));
    for (k = size; k < padded(size); k++) out[k] = 0;
    return scale;
}

// Any bits and any group: rounded tokens as they are, one dot product for each group.
struct Plain {
    static constexpr bool scale_rows = false;  // whether `products` leaves the scales of rows to the caller
    static inline int64_t bytes(int64_t size) { return padded(size); }  // of a token
    static inline int64_t room(int64_t size) { return padded(size); }   // that `products` needs, no less than a token
    static inline void arrange(const int8_t* plain, int64_t size, int8_t* to) {
        __builtin_memcpy(to, plain, size_t(padded(size)));
    }
    // Sums of `count` weight rows with the tokens: sums[m * LINEAR_ROWS + n].
    static inline void products(const int8_t* x, int64_t stride, int64_t tokens, const Weights& w, int64_t first,
                                int64_t count, float* sums, int8_t* room) {
        for (int64_t n = 0; n < count; n++) {
            const int8_t* row = w.row(first + n, room);
            const float* scale = w.scale + (first + n) * w.groups;
            for (int64_t m = 0; m < tokens; m++) {
                float total = 0;
                for (int64_t g = 0; g < w.groups; g++)
                    total += float(dot_bytes(row + g * w.group, x + m * stride + g * w.group, w.group)) * scale[g];
                sums[m * LINEAR_ROWS + n] = total;
            }
        }
    }
};

template <class A, class C, class Form> void linear_integers(const qr_op& op, Context& c) {
    int64_t tokens = c.count(op.i[0]), outputs = op.i[1], stride_x = op.i[3];
    Weights w(op);
    bool gated = op.flags & QR_GATED;
    int64_t grain = grain_of(outputs, c.threads), pieces = ceil_div(outputs, grain);
    int64_t stride = Form::bytes(w.size), wide = Form::room(w.size);
    if (stride % 1024 == 0) stride += 64;  // rows a power of two apart fall on the same few lines of the caches
    int64_t block = most(16, least(LINEAR_TOKENS, QUANTIZED_BYTES / stride / 4 * 4));
    int64_t most_now = least(block, tokens), all = most_now * stride;
    bool alone = tokens * w.size <= QUANTIZED_ALONE;
    auto* room = static_cast<int8_t*>(c.scratch(size_t(wide + (alone ? all : 0))));
    int8_t* x = alone ? room + wide : static_cast<int8_t*>(c.shared(size_t(all) + LINEAR_TOKENS * sizeof(float)));
    alignas(64) float sums[2][LINEAR_TOKENS * LINEAR_ROWS], own[LINEAR_TOKENS];
    float* scales = alone ? own : reinterpret_cast<float*>(x + all);
    for (int64_t start = 0; start < tokens; start += block) {
        int64_t now = least(block, tokens - start);
        auto prepare = [&](int64_t m) {
            scales[m] = round_token(static_cast<const A*>(op.p[0]) + (start + m) * stride_x, w.size, room);
            Form::arrange(room, w.size, x + m * stride);
        };
        if (alone) {
            for (int64_t m = 0; m < now; m++) prepare(m);
        } else {
            for (int64_t m; (m = c.take(now)) >= 0;) prepare(m);
            c.barrier();
        }
        for (int64_t piece; (piece = c.take_near(pieces)) >= 0;) {
            int64_t end = least(outputs, (piece + 1) * grain);
            for (int64_t first = piece * grain; first < end; first += LINEAR_ROWS) {
                int64_t count = least(LINEAR_ROWS, end - first);
                for (int half = 0; half < (gated ? 2 : 1); half++) {
                    int64_t from = first + half * outputs;
                    Form::products(x, stride, now, w, from, count, sums[half], room);
                    for (int64_t m = 0; m < now; m++)
                        for (int64_t n = 0; n < count; n += W) {
                            float* at = sums[half] + m * LINEAR_ROWS + n;
                            V r = load(at);
                            if (Form::scale_rows) r = mul(r, load(w.scale + from + n, count - n));
                            store(at, mul(r, set(scales[m])));
                        }
                }
                for (int64_t m = 0; m < now; m++) {
                    float *one = sums[0] + m * LINEAR_ROWS, *two = sums[1] + m * LINEAR_ROWS;
                    finish<A, A, C>(op, start + m, first, count, gated ? two : one, gated ? one : nullptr);
                }
            }
        }
        if (start + block < tokens) c.barrier();
    }
}

// Inputs begin .. begin + count of a row: row * scale, rounded to A.
template <class A, class X>
inline void dequantize(const Weights& w, const int8_t* row, const float* scale, int64_t begin, int64_t count, X* to) {
    using R = typename Choose<__is_same(A, X), float, A>::type;  // a store in type A rounds by itself
    int64_t k = begin, end = begin + count, stop = begin / w.group * w.group;
    for (scale += begin / w.group; k < end; scale++) {
        V by = set(*scale);
        stop = least(end, stop + w.group);
        for (; k + W <= stop; k += W) store(to + k - begin, rounded<R>(mul(load_bytes(row + k), by)));
        if (k < stop) store(to + k - begin, rounded<R>(mul(load_bytes(row + k, stop - k), by)), stop - k);
        k = stop;
    }
}

// The threads share the outputs; every thread copies all tokens. `X`: what `dots` takes both sides as.
template <class A, class C, class X> void linear_floats(const qr_op& op, Context& c) {
    int64_t tokens = c.count(op.i[0]), outputs = op.i[1], stride_x = op.i[3];
    Weights w(op);
    constexpr int64_t depth = LINEAR_BYTES / int64_t(sizeof(X)), pad = 64 / int64_t(sizeof(X));
    bool gated = op.flags & QR_GATED;
    int64_t grain = grain_of(outputs, c.threads), pieces = ceil_div(outputs, grain);
    int64_t parts = ceil_div(w.size, depth), stride = ceil_div(least(w.size, depth), 64) * 64 + pad;
    int64_t skip = least(LINEAR_TOKENS, tokens) * stride, wide = padded(w.size);
    auto* x = static_cast<X*>(
        c.scratch(size_t(skip * parts + QUANTIZED_ROWS * stride) * sizeof(X) + size_t(QUANTIZED_ROWS * wide)));
    X* rows = x + skip * parts;
    auto* room = reinterpret_cast<int8_t*>(rows + QUANTIZED_ROWS * stride);
    alignas(64) float sums[2][LINEAR_TOKENS * LINEAR_ROWS];
    for (int64_t start = 0; start < tokens; start += LINEAR_TOKENS) {
        int64_t now = least(LINEAR_TOKENS, tokens - start);
        for (int64_t m = 0; m < now; m++) {
            auto* from = static_cast<const A*>(op.p[0]) + (start + m) * stride_x;
            for (int64_t k = 0; k < w.size; k += W) {
                int64_t left = least(w.size - k, W);  // depth is a multiple of W
                store(x + k / depth * skip + m * stride + k % depth, load(from + k, left), left);
            }
        }
        for (int64_t piece; (piece = c.take_near(pieces)) >= 0;) {
            int64_t end = least(outputs, (piece + 1) * grain);
            for (int64_t first = piece * grain; first < end; first += LINEAR_ROWS) {
                int64_t count = least(LINEAR_ROWS, end - first);
                for (int half = 0; half < (gated ? 2 : 1); half++)
                    for (int64_t n = 0; n < count; n += QUANTIZED_ROWS) {
                        int64_t few = least(QUANTIZED_ROWS, count - n), from = first + n + half * outputs;
                        const int8_t* row[QUANTIZED_ROWS];
                        for (int64_t r = 0; r < few; r++) {
                            for (int64_t at = 0; at < w.stride; at += 64)
                                __builtin_prefetch(w.q + (from + r + LINEAR_AHEAD) * w.stride + at, 0, 2);
                            row[r] = w.row(from + r, room + r * wide);
                        }
                        for (int64_t k = 0; k < w.size; k += depth) {
                            int64_t size = least(depth, w.size - k);
                            for (int64_t r = 0; r < few; r++)
                                dequantize<A>(w, row[r], w.scale + (from + r) * w.groups, k, size, rows + r * stride);
                            tile(x + k / depth * skip, stride, now, size, static_cast<const X*>(rows), stride, few,
                                 sums[half] + n, k > 0);
                        }
                    }
                for (int64_t m = 0; m < now; m++) {
                    float *one = sums[0] + m * LINEAR_ROWS, *two = sums[1] + m * LINEAR_ROWS;
                    finish<A, A, C>(op, start + m, first, count, gated ? two : one, gated ? one : nullptr);
                }
            }
        }
        if (start + LINEAR_TOKENS < tokens) c.barrier();
    }
}

template <class Form> void linear_integers_of(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto a) {
        using A = typename decltype(a)::type;
        if (type_c(op) == QR_F32) linear_integers<A, float, Form>(op, c);
        else linear_integers<A, A, Form>(op, c);
    });
}
void linear_floats_of(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto a) {
        using A = typename decltype(a)::type;
        if (type_c(op) == QR_F32) linear_floats<A, float, float>(op, c);
        else linear_floats<A, A, float>(op, c);
    });
}
void linear_q_generic(const qr_op& op, Context& c) {
    if (op.i[9]) linear_integers_of<Plain>(op, c);
    else linear_floats_of(op, c);
}
