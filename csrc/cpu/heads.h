// Head norm, rotary and KV write of a token in one pass. Included inside a level's namespace.

// A row in a cache of bytes (quire.h says how); `row` has zeros behind its end.
template <class T> inline void put_bytes(const float* row, int64_t size, int8_t* cache) {
    V top = zero(), bad = zero();
    for (int64_t e = 0; e < size; e += W) {
        V v = rounded<T>(load(row + e));
        top = maximum(top, absolute(v));
        bad = fma(v, zero(), bad);  // NaN where one is not finite
    }
    bool finite = sum(bad) == 0.0f;
    float high = largest(top), scale = finite ? (high > 1e-12f ? high : 1e-12f) / 127.0f : __builtin_nanf("");
    for (int64_t e = 0; e < size; e += W) {
        int8_t part[W];
        store_bytes(part, finite ? round_even(div(rounded<T>(load(row + e)), set(scale))) : zero());
        __builtin_memcpy(cache + e, part, size_t(least(W, size - e)));
    }
    for (int64_t e = size; e & 3; e++) cache[e] = 0;
    __builtin_memcpy(cache + (size + 3) / 4 * 4, &scale, sizeof scale);
}

// One head: from x to two places (either may be null), normed and turned on the way. `row`: room for size + W floats.
template <class T, class C>
inline void head(const T* x, int64_t size, const void* weight, bool wide, float eps, const float* cosines,
                 const float* sines, int64_t half, float* row, T* out, C* cache) {
    for (int64_t e = 0; e < size; e += W) store(row + e, load(x + e, size - e));
    if (weight) {
        V squares = zero();
        for (int64_t e = 0; e < size; e += W) {
            V v = load(row + e);
            squares = fma(v, v, squares);  // lanes beyond the end are 0
        }
        V scale = set(1.0f / __builtin_sqrtf(sum(squares) / float(size) + eps));
        for (int64_t e = 0; e < size; e += W)
            store(row + e, rounded<T>(weighted<T>(mul(load(row + e), scale), weight, wide, e, size - e)));
    }
    if (cosines)
        for (int64_t f = 0; f < half; f += W) {
            int64_t left = half - f;
            V a = load(row + f, left), b = load(row + half + f, left);
            V c = load(cosines + f, left), s = load(sines + f, left);
            store(row + f, sub(mul(a, c), mul(b, s)), left);
            store(row + half + f, add(mul(b, c), mul(a, s)), left);
        }
    for (int64_t e = 0; e < size; e += W) {
        V v = load(row + e);
        if (out) store(out + e, v, size - e);
        if constexpr (!__is_same(C, int8_t))
            if (cache) store(cache + e, rounded<T>(v), size - e);
    }
    if constexpr (__is_same(C, int8_t))
        if (cache) put_bytes<T>(row, size, cache);
}

template <class T, class C> void heads_rows(const qr_op& op, Context& c) {
    int64_t tokens = c.count(op.i[0]), h_q = op.i[1], h_kv = op.i[2], size = op.i[3], half = op.i[4];
    auto *table = static_cast<const float*>(op.p[3]);
    auto *positions = static_cast<const int64_t*>(op.p[4]), *slots = static_cast<const int64_t*>(op.p[5]);
    auto* row = static_cast<float*>(c.scratch(size_t(size + 2 * W) * sizeof(float)));
    auto at = [](void* base, int64_t offset) { return base ? static_cast<T*>(base) + offset : nullptr; };
    Pieces pieces(tokens, most(1, 2048 / most(1, (h_q + 2 * h_kv) * size)), c.threads);
    for (int64_t piece; (piece = c.take(pieces.count)) >= 0;)
        for (int64_t t = pieces.begin(piece); t < pieces.end(piece); t++) {
            const float *cosines = nullptr, *sines = nullptr;
            if (table) {
                int64_t position = least(most(positions[t], 0), op.i[5] - 1);
                cosines = table + position * half;
                sines = cosines + op.i[5] * half;
            }
            const T *q = at(op.p[0], t * op.i[6]), *k = at(op.p[1], t * op.i[7]), *v = at(op.p[2], t * op.i[8]);
            T* q_out = at(op.p[8], t * op.i[9]);
            const void *weight_q = op.p[9], *weight_k = op.p[10];
            bool wide = op.flags & QR_WIDE;
            bool cached = slots && slots[t] >= 0;
            C *keys = cached ? static_cast<C*>(op.p[6]) + slots[t] * op.i[10] : nullptr;
            C *values = cached ? static_cast<C*>(op.p[7]) + slots[t] * op.i[10] : nullptr;
            float eps = float(op.f[0]);
            if (q && q_out)
                for (int64_t h = 0; h < h_q; h++)
                    head<T, C>(q + h * size, size, weight_q, wide, eps, cosines, sines, half, row, q_out + h * size,
                               nullptr);
            if (k && keys)
                for (int64_t h = 0; h < h_kv; h++)
                    head<T, C>(k + h * size, size, weight_k, wide, eps, cosines, sines, half, row, nullptr,
                               keys + h * op.i[11]);
            if (v && values)
                for (int64_t h = 0; h < h_kv; h++)
                    head<T, C>(v + h * size, size, nullptr, false, 0.0f, nullptr, nullptr, 0, row, nullptr,
                               values + h * op.i[11]);
        }
}
void heads(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto a) {
        using T = typename decltype(a)::type;
        if (type_b(op) == QR_I8) heads_rows<T, int8_t>(op, c);
        else heads_rows<T, T>(op, c);
    });
}
