// Linear layers from row-major weights: dot products of weight rows with activation rows, a tile of both at a time, so
// that each weight is read from memory once for a block of tokens. Included inside a level's namespace.
//
// Owns: the split over threads, the epilogue (bias, activation, gate, residual) and the generic dot products. A level
// may overload `dots` for its types.
//
// Nothing is packed, for any number of tokens: tiles of 4 weight rows x 4 tokens need 8 loads for 16 products, which
// the load ports keep up with, and a block of 64 tokens x 4 KiB stays in the L2 cache. For many tokens a level may do
// better (lanes_avx512.h).

constexpr int64_t LINEAR_TOKENS = 64;  // tokens of a block: their sums fit the stack, their rows the L2 cache
// Weight rows are asked for so many rows ahead, into the L2 cache. Measured on Zen 4, one thread, K = 576 and 2048: 8
// rows ahead into L1 11 and 20 GB/s, 8 into L2 18 and 24, 16 into L2 20 and 25, a fixed 2 KiB 14 and 22; the rows are
// too short for the hardware's own prefetcher.
constexpr int64_t LINEAR_AHEAD = 16;
constexpr int64_t LINEAR_BYTES = 4096;  // of a row at a time: 64 of them are a quarter of the L2 cache
constexpr int64_t LINEAR_PAIRED = 16;  // rows of each half at a time where outputs are gated
constexpr int64_t LINEAR_ROWS = 64;    // weight rows whose sums are collected before the epilogue runs over them

// Outputs of a piece: about eight pieces a thread, and as many for each as can be.
inline int64_t grain_of(int64_t outputs, int64_t threads) {
    int64_t most_of_all = most(32, 16 * ceil_div(outputs, 16 * 8 * threads)), best = most_of_all, least_work = INT64_MAX;
    for (int64_t grain = most_of_all; grain >= most(32, most_of_all / 2); grain -= 16) {
        int64_t work = ceil_div(ceil_div(outputs, grain), threads) * grain;  // of the thread with most
        if (work < least_work) best = grain, least_work = work;
    }
    return best;
}

// values[n] (and gates[n]) are the sums of outputs first .. first + count of token m: makes them the op's outputs.
template <class A, class B, class C>
inline void finish(const qr_op& op, int64_t m, int64_t first, int64_t count, const float* values,
                      const float* gates) {
    auto* bias = static_cast<const B*>(op.p[2]);
    C* y = static_cast<C*>(op.p[3]) + m * op.i[5] + first;
    const A* plus = op.p[4] ? static_cast<const A*>(op.p[4]) + m * op.i[6] + first : nullptr;
    int kind = kind_of(op);
    for (int64_t n = 0; n < count; n += W) {
        int64_t left = count - n;
        V r = load(values + n, left);
        if (gates) {
            V g = load(gates + n, left);
            if (bias) {
                g = add(g, load(bias + first + n, left));
                r = add(r, load(bias + op.i[1] + first + n, left));
            }
            r = mul(activate(kind, g), r);
        } else {
            if (bias) r = add(r, load(bias + first + n, left));
            if (kind) r = activate(kind, r);
        }
        if (plus) r = add(rounded<C>(r), load(plus + n, left));
        store(y + n, r, left);
    }
}

// Products of R weight rows with M activation rows: out[m * stride + r], added to what is there where `more`.
template <int R, int M, class B>
inline void dots(const B* const* w, const float* x, int64_t stride_x, int64_t size, int64_t ahead, float* out,
                 int64_t stride, bool more) {
    V a[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) a[r][m] = zero();
    int64_t k = 0;
    for (; k + W <= size; k += W) {
        V y[M];
        for (int m = 0; m < M; m++) y[m] = load(x + m * stride_x + k);
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w[r] + k + ahead, 0, 2);
            V v = load(w[r] + k);
            for (int m = 0; m < M; m++) a[r][m] = fma(v, y[m], a[r][m]);
        }
    }
    if (k < size)
        for (int r = 0; r < R; r++) {
            V v = load(w[r] + k, size - k);
            for (int m = 0; m < M; m++) a[r][m] = fma(v, load(x + m * stride_x + k, size - k), a[r][m]);
        }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
            float* to = out + m * stride + r;
            *to = more ? *to + sum(a[r][m]) : sum(a[r][m]);
        }
}

// Sums of `count` weight rows, R at a time, with M activation rows: out[m * LINEAR_ROWS + n].
template <int R, int M, class X, class B>
inline void strip(const X* x, int64_t stride_x, int64_t size, const B* weights, int64_t stride, int64_t count,
                  float* out, bool more) {
    int64_t n = 0, ahead = LINEAR_AHEAD * stride;
    for (; n + R <= count; n += R) {
        const B* w[R];
        for (int r = 0; r < R; r++) w[r] = weights + (n + r) * stride;
        dots<R, M>(w, x, stride_x, size, ahead, out + n, LINEAR_ROWS, more);
    }
    if (n == count) return;
    const B* w[R];
    float part[M * R];
    for (int r = 0; r < R; r++) w[r] = weights + least(n + r, count - 1) * stride;
    dots<R, M>(w, x, stride_x, size, 0, part, R, false);
    for (int m = 0; m < M; m++)
        for (int r = 0; n + r < count; r++) {
            float* to = out + m * LINEAR_ROWS + n + r;
            *to = more ? *to + part[m * R + r] : part[m * R + r];
        }
}

// As `strip`, of one token. A level may have its own.
template <class X, class B>
inline void lone(const X* x, int64_t size, const B* weights, int64_t stride, int64_t count, float* out, bool more) {
    strip<ROWS_OF_FEW, 1>(x, 0, size, weights, stride, count, out, more);
}

// As `strip`, of any number of tokens: a few rows at a time for all tokens, so that they are read from memory once.
template <class X, class B>
inline void tile(const X* x, int64_t stride_x, int64_t tokens, int64_t size, const B* weights, int64_t stride,
                 int64_t count, float* out, bool more) {
    if (tokens == 1) return lone(x, size, weights, stride, count, out, more);
    if (tokens == 2) return strip<ROWS_OF_FEW, 2>(x, stride_x, size, weights, stride, count, out, more);
    for (int64_t n = 0; n < count; n += 4) {
        const B* w = weights + n * stride;
        int64_t m = 0, now = least(4, count - n);
        for (; m + 4 <= tokens; m += 4)
            strip<4, 4>(x + m * stride_x, stride_x, size, w, stride, now, out + m * LINEAR_ROWS + n, more);
        const X* y = x + m * stride_x;
        float* to = out + m * LINEAR_ROWS + n;
        if (tokens - m == 3) strip<4, 3>(y, stride_x, size, w, stride, now, to, more);
        else if (tokens - m == 2) strip<4, 2>(y, stride_x, size, w, stride, now, to, more);
        else if (tokens - m == 1) strip<4, 1>(y, stride_x, size, w, stride, now, to, more);
    }
}

// The threads share the outputs; every thread reads all tokens. `X`: what `dots` takes activations as.
template <class A, class B, class C, class X> void linear_rows(const qr_op& op, Context& c) {
    int64_t tokens = c.count(op.i[0]), outputs = op.i[1], size = op.i[2], stride_w = op.i[4];
    constexpr int64_t depth = LINEAR_BYTES / int64_t(sizeof(X)), pad = 64 / int64_t(sizeof(X));
    auto* weights = static_cast<const B*>(op.p[1]);
    bool gated = op.flags & QR_GATED;
    int64_t grain = grain_of(outputs, c.threads), pieces = ceil_div(outputs, grain);
    alignas(64) float sums[2][LINEAR_TOKENS * LINEAR_ROWS];
    for (int64_t start = 0; start < tokens; start += LINEAR_TOKENS) {
        int64_t now = least(LINEAR_TOKENS, tokens - start), stride_x = op.i[3], skip = depth;
        int64_t deep = now > 1 ? depth : most(size, 1);  // of one token whole rows, so that the weights are one stream
        auto* a = static_cast<const A*>(op.p[0]) + start * stride_x;
        const X* x = reinterpret_cast<const X*>(a);
        // Rows a power of two apart fall on the same few lines of the caches: copied apart, block by block along k.
        if (!__is_same(A, X) || (now > 4 && stride_x * int64_t(sizeof(X)) % 1024 == 0)) {
            int64_t stride = (least(size, depth) + W - 1) / W * W + pad;
            skip = now * stride;
            deep = depth;
            auto* copy = static_cast<X*>(c.scratch(size_t(skip * ceil_div(size, depth)) * sizeof(X)));
            for (int64_t k0 = 0; k0 < size; k0 += depth)
                for (int64_t m = 0; m < now; m++) {
                    int64_t stop = least(depth, size - k0);
                    X* to = copy + k0 / depth * skip + m * stride;
                    for (int64_t k = 0; k < stop; k += W)
                        store(to + k, load(a + m * stride_x + k0 + k, stop - k), stop - k);
                }
            x = copy;
            stride_x = stride;
        }
        for (int64_t piece; (piece = c.take_near(pieces)) >= 0;) {
            int64_t end = least(outputs, (piece + 1) * grain);
            for (int64_t first = piece * grain; first < end; first += LINEAR_ROWS) {
                int64_t count = least(LINEAR_ROWS, end - first);
                // A gate and its output close together: each of the two streams is asked for ahead of itself.
                int64_t step = gated ? LINEAR_PAIRED : count;
                for (int64_t n = 0; n < count; n += step)
                    for (int half = 0; half < (gated ? 2 : 1); half++)
                        for (int64_t k = 0; k < size || k == 0; k += deep)
                            tile(x + k / deep * skip, stride_x, now, least(deep, size - k),
                                 weights + (first + n + half * outputs) * stride_w + k, stride_w,
                                 least(step, count - n), sums[half] + n, k > 0);
                for (int64_t m = 0; m < now; m++) {
                    float *one = sums[0] + m * LINEAR_ROWS, *two = sums[1] + m * LINEAR_ROWS;
                    finish<A, B, C>(op, start + m, first, count, gated ? two : one, gated ? one : nullptr);
                }
            }
        }
        if (start + LINEAR_TOKENS < tokens) c.barrier();
    }
}

// Through floats; activations and weights of one type.
void linear_generic(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto a) {
        using A = typename decltype(a)::type;
        if (type_c(op) == QR_F32) linear_rows<A, A, float, float>(op, c);
        else linear_rows<A, A, A, float>(op, c);
    });
}
