// Norms, activations, gather, add, argmax. Included inside a level's namespace, after its vectors.

// exp to 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]. 0 for -inf, inf above 88.8, NaN for NaN.
inline V exponential(V x) {
    x = maximum(set(-105.0f), minimum(set(90.0f), x));  // the second operand is kept where it is NaN
    V n = round_even(mul(x, set(1.44269504f)));
    V r = fma(n, set(-0.693359375f), x);
    r = fma(n, set(2.12194440e-4f), r);
    V p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), set(1.0f));
    return scale2(p, n);
}

inline V logistic(V x) { return div(set(1.0f), add(set(1.0f), exponential(sub(zero(), x)))); }

// tanh(|x|) = 1 - 2 / (exp(2|x|) + 1); near 0, where that cancels, the odd Taylor polynomial.
inline V hyperbolic(V x) {
    V a = absolute(x), s = mul(a, a);
    V far = sub(set(1.0f), div(set(2.0f), add(exponential(add(a, a)), set(1.0f))));
    V p = set(-17.0f / 315.0f);
    p = fma(p, s, set(2.0f / 15.0f));
    p = fma(p, s, set(-1.0f / 3.0f));
    V near = fma(mul(p, s), a, a);
    float out[W], low[W], size[W];
    store(out, far);
    store(low, near);
    store(size, a);
    for (int i = 0; i < W; i++) out[i] = size[i] < 0.15f ? low[i] : out[i];
    return with_sign(load(out), x);
}

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline V error_function(V x) {
    V a = absolute(x);
    V t = div(set(1.0f), fma(a, set(0.3275911f), set(1.0f)));
    V p = set(1.061405429f);
    p = fma(p, t, set(-1.453152027f));
    p = fma(p, t, set(1.421413741f));
    p = fma(p, t, set(-0.284496736f));
    p = fma(p, t, set(0.254829592f));
    V tail = mul(mul(p, t), exponential(sub(zero(), mul(a, a))));
    return with_sign(sub(set(1.0f), tail), x);
}

inline V activate(int kind, V x) {
    switch (kind) {
        case QR_SILU: return mul(x, logistic(x));
        case QR_GELU: return mul(mul(x, set(0.5f)), add(set(1.0f), error_function(mul(x, set(0.70710678f)))));
        case QR_GELU_TANH: {
            V cubic = fma(mul(mul(x, x), x), set(0.044715f), x);
            return mul(mul(x, set(0.5f)), add(set(1.0f), hyperbolic(mul(cubic, set(0.79788456f)))));
        }
        case QR_QUICK_GELU: return mul(x, logistic(mul(x, set(1.702f))));
        case QR_RELU: return maximum(zero(), x);
        case QR_RELU2: return mul(maximum(zero(), x), maximum(zero(), x));
        case QR_RELU6: return minimum(set(6.0f), maximum(zero(), x));
        case QR_TANH: return hyperbolic(x);
        case QR_SIGMOID: return logistic(x);
        default: return x;
    }
}

// x as it would be after a store in type T.
template <class T> inline V rounded(V x) {
    T part[W];
    store(part, x);
    return load(part);
}
template <> inline V rounded<float>(V x) { return x; }

// total = x + residual, rounded to T as the residual stream is.
template <class T>
inline V total_at(const T* x, const T* residual, T* total, int64_t d, int64_t left) {
    V t = load(x + d, left);
    if (residual) t = rounded<T>(add(t, load(residual + d, left)));
    if (total) store(total + d, t, left);
    return t;
}

// What an RMSNorm gives of normed numbers: rounded, then times the weight; with a weight in float32 (QR_WIDE) unrounded.
template <class T> inline V weighted(V x, const void* weight, bool wide, int64_t d, int64_t left) {
    if (wide) return mul(x, load(static_cast<const float*>(weight) + d, left));
    x = rounded<T>(x);
    return weight ? mul(x, load(static_cast<const T*>(weight) + d, left)) : x;
}

template <class T>
void norm_row(const T* x, const T* residual, const void* weight, const T* bias, T* y, T* total, int64_t size, float eps,
              bool centred, bool wide) {
    V a = zero(), squares = zero();
    for (int64_t d = 0; d < size; d += W) {
        V t = total_at(x, residual, total, d, size - d);
        a = add(a, t);
        squares = fma(t, t, squares);
    }
    if (total) x = total;
    float mean = 0.0f, spread;
    if (centred) {
        mean = sum(a) / float(size);
        V off = zero();  // a second pass, since E[x^2] - E[x]^2 cancels
        for (int64_t d = 0; d < size; d += W) {
            V t = load(x + d, size - d);
            float left[W];
            store(left, sub(t, set(mean)));
            V u = size - d >= W ? load(left) : load(left, size - d);
            off = fma(u, u, off);
        }
        spread = sum(off) / float(size);
    } else {
        spread = sum(squares) / float(size);
    }
    V scale = set(1.0f / __builtin_sqrtf(spread + eps)), shift = set(mean);
    for (int64_t d = 0; d < size; d += W) {
        int64_t left = size - d;
        V t = load(x + d, left);
        if (centred) {
            t = mul(sub(t, shift), scale);
            if (weight) t = mul(t, load(static_cast<const T*>(weight) + d, left));
            if (bias) t = add(t, load(bias + d, left));
        } else {
            t = weighted<T>(mul(t, scale), weight, wide, d, left);
        }
        store(y + d, t, left);
    }
}

template <class T> void norm_rows(const qr_op& op, Context& c, bool centred) {
    int64_t tokens = c.count(op.i[0]), size = op.i[1], heads = op.i[6] ? op.i[6] : 1;
    auto* x = static_cast<const T*>(op.p[0]);
    auto* residual = static_cast<const T*>(op.p[1]);
    auto* y = static_cast<T*>(op.p[3]);
    auto* total = static_cast<T*>(op.p[4]);
    Pieces pieces(tokens * heads, most(1, 2048 / most(size, 1)), c.threads);
    for (int64_t piece; (piece = c.take(pieces.count)) >= 0;)
        for (int64_t row = pieces.begin(piece); row < pieces.end(piece); row++) {
            int64_t t = row / heads, h = row % heads;
            norm_row(x + t * op.i[2] + h * op.i[7], residual ? residual + t * op.i[3] : nullptr,
                     op.p[2], static_cast<const T*>(op.p[5]), y + t * op.i[4] + h * op.i[8],
                     total ? total + t * op.i[5] : nullptr, size, float(op.f[0]), centred, op.flags & QR_WIDE);
        }
}

void rms_norm(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto tag) { norm_rows<typename decltype(tag)::type>(op, c, false); });
}
void layer_norm(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto tag) { norm_rows<typename decltype(tag)::type>(op, c, true); });
}

template <class T> void activation_rows(const qr_op& op, Context& c) {
    int64_t tokens = c.count(op.i[0]), size = op.i[1];
    int kind = kind_of(op);
    bool gated = op.flags & QR_GATED;
    float cap = kind == QR_TANH ? float(op.f[0]) : 0.0f;
    int64_t width = least(size, 1024), across = ceil_div(size, most(width, 1));
    Pieces pieces(tokens * across, 1, c.threads);
    for (int64_t piece; (piece = c.take(pieces.count)) >= 0;)
        for (int64_t at = pieces.begin(piece); at < pieces.end(piece); at++) {
            int64_t t = at / across, first = at % across * width, end = least(size, first + width);
            auto* x = static_cast<const T*>(op.p[0]) + t * op.i[2];
            auto* y = static_cast<T*>(op.p[1]) + t * op.i[3];
            for (int64_t d = first; d < end; d += W) {
                V v = load(x + d, end - d);
                V r = cap != 0.0f ? mul(hyperbolic(div(v, set(cap))), set(cap)) : activate(kind, v);
                if (gated) r = mul(rounded<T>(r), load(x + size + d, end - d));
                store(y + d, r, end - d);
            }
        }
}
void activation(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto tag) { activation_rows<typename decltype(tag)::type>(op, c); });
}

template <class T> void gather_rows(const qr_op& op, Context& c) {
    int64_t tokens = c.count(op.i[0]), size = op.i[1];
    auto* ids = static_cast<const int64_t*>(op.p[0]);
    auto* plus = static_cast<const T*>(op.p[3]);
    bool scaled = op.f[0] != 0.0 && op.f[0] != 1.0;
    V scale = set(scaled ? float(op.f[0]) : 1.0f);
    Pieces pieces(tokens, most(1, 4096 / most(size, 1)), c.threads);
    for (int64_t piece; (piece = c.take(pieces.count)) >= 0;)
        for (int64_t t = pieces.begin(piece); t < pieces.end(piece); t++) {
            int64_t id = ids[t] + op.i[5];
            T* y = static_cast<T*>(op.p[2]) + t * op.i[4];
            bool known = id >= 0 && id < op.i[2];
            if (type_b(op) == QR_I8) {
                auto* q = static_cast<const int8_t*>(op.p[1]) + (known ? id * op.i[3] : 0);
                V by = set(known ? static_cast<const float*>(op.p[4])[id] : 0.0f);
                for (int64_t d = 0; d < size; d += W) {
                    V r = known ? mul(load_bytes(q + d, size - d), by) : zero();
                    if (scaled) r = mul(rounded<T>(r), scale);
                    if (plus) r = add(rounded<T>(r), load(plus + t * op.i[6] + d, size - d));
                    store(y + d, r, size - d);
                }
                continue;
            }
            const T* from = static_cast<const T*>(op.p[1]) + (known ? id * op.i[3] : 0);
            if (known && !plus && !scaled) {
                __builtin_memcpy(y, from, size_t(size) * sizeof(T));
                continue;
            }
            for (int64_t d = 0; d < size; d += W) {
                V r = known ? load(from + d, size - d) : zero();
                if (scaled) r = rounded<T>(mul(r, scale));
                if (plus) r = add(r, load(plus + t * op.i[6] + d, size - d));
                store(y + d, r, size - d);
            }
        }
}
void gather(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto tag) { gather_rows<typename decltype(tag)::type>(op, c); });
}

template <class T> void add_rows(const qr_op& op, Context& c) {
    int64_t size = op.i[1];
    Pieces pieces(c.count(op.i[0]), most(1, 4096 / most(size, 1)), c.threads);
    for (int64_t piece; (piece = c.take(pieces.count)) >= 0;)
        for (int64_t t = pieces.begin(piece); t < pieces.end(piece); t++) {
            auto* a = static_cast<const T*>(op.p[0]) + t * op.i[2];
            auto* b = static_cast<const T*>(op.p[1]) + t * op.i[3];
            auto* y = static_cast<T*>(op.p[2]) + t * op.i[4];
            for (int64_t d = 0; d < size; d += W)
                store(y + d, add(load(a + d, size - d), load(b + d, size - d)), size - d);
        }
}
void add_op(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto tag) { add_rows<typename decltype(tag)::type>(op, c); });
}

struct Best { float value; int64_t index; };

// Whether (value, index) comes before `best`: larger, NaN above all, the lower index among equals.
inline bool before(float value, int64_t index, const Best& best) {
    if (value != value) return best.value == best.value || index < best.index;
    return best.value == best.value && (value > best.value || (value == best.value && index < best.index));
}

template <class T> inline Best best_of(const T* x, int64_t begin, int64_t end) {
    // Blocks first: the exact place is looked for only where a block's maximum says that it may be.
    Best best{-__builtin_inff(), begin};
    constexpr int64_t block = 16 * W;
    for (int64_t at = begin; at < end; at += block) {
        int64_t stop = least(end, at + block);
        if (stop - at == block) {
            V top = set(-__builtin_inff()), odd = zero();
            for (int64_t d = at; d < stop; d += W) {
                V v = load(x + d);
                top = maximum(v, top);
                odd = add(odd, mul(v, zero()));  // NaN where v is NaN or infinite
            }
            float high = largest(top), strange = sum(odd);
            if (strange == strange && !(high > best.value)) continue;
        }
        for (int64_t d = at; d < stop; d++) {
            float value = to_float(x[d]);
            if (before(value, d, best)) best = {value, d};
        }
    }
    return best;
}

template <class T> void argmax_rows(const qr_op& op, Context& c) {
    int64_t rows = c.count(op.i[0]), vocab = op.i[1];
    int64_t parts = rows >= 4 * c.threads ? 1 : most(1, least(c.threads * 2, vocab / 4096));
    int64_t width = ceil_div(vocab, parts);
    auto* found = static_cast<Best*>(c.shared(size_t(rows * parts) * sizeof(Best)));
    for (int64_t at; (at = c.take(rows * parts)) >= 0;) {
        int64_t begin = at % parts * width;
        auto* x = static_cast<const T*>(op.p[0]) + at / parts * op.i[2];
        found[at] = best_of(x, least(begin, vocab), least(vocab, begin + width));
    }
    c.barrier();
    if (c.thread) return;
    for (int64_t row = 0; row < rows; row++) {
        Best best = found[row * parts];
        for (int64_t part = 1; part < parts; part++) {
            const Best& other = found[row * parts + part];
            if (other.index < vocab && before(other.value, other.index, best)) best = other;
        }
        static_cast<int64_t*>(op.p[1])[row] = best.index;
        if (op.p[2]) static_cast<float*>(op.p[2])[row] = best.value;
    }
}
void argmax(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto tag) { argmax_rows<typename decltype(tag)::type>(op, c); });
}

void nop(const qr_op&, Context&) {}
