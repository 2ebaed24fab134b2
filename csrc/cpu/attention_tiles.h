// Prefill tiles of attention. Included by attention.h, inside a level's namespace. Operands are floats.

struct TileMemory {
    float *queries, *panels, *probs, *scores, *values, *tops, *totals;

    static inline int64_t rows(const Rules& r) { return most(TILE_ROWS, r.group); }
    static inline size_t bytes(const Rules& r) {
        int64_t wide = r.padded;
        return size_t(rows(r) * (2 * wide + 2 * TILE_KEYS + 64 + 2) + 2 * TILE_KEYS * wide) * 4;
    }
    inline TileMemory(const Rules& r, char* memory) {
        int64_t wide = r.padded, n = rows(r);
        queries = reinterpret_cast<float*>(memory);
        panels = queries + n * (wide + 32);
        probs = panels + 2 * TILE_KEYS * wide;
        scores = probs + n * (TILE_KEYS + 32);
        values = scores + n * TILE_KEYS;
        tops = values + n * wide;
        totals = tops + n;
    }
};

// sums[m][n] (+)= sum over k of x[m][k] * panel[k][n], n up to `width` (a multiple of 2 W).
template <int M>
inline void float_tile(const float* x, int64_t stride_x, const float* panel, int64_t width, int64_t size,
                          float* sums, bool more) {
    for (int64_t n = 0; n < width; n += 2 * W) {
        V a[M][2];
        for (int m = 0; m < M; m++) {
            a[m][0] = more ? load(sums + m * width + n) : zero();
            a[m][1] = more ? load(sums + m * width + n + W) : zero();
        }
        for (int64_t k = 0; k < size; k++) {
            V b0 = load(panel + k * width + n), b1 = load(panel + k * width + n + W);
            for (int m = 0; m < M; m++) {
                V y = set(x[m * stride_x + k]);
                a[m][0] = fma(y, b0, a[m][0]);
                a[m][1] = fma(y, b1, a[m][1]);
            }
        }
        for (int m = 0; m < M; m++) {
            store(sums + m * width + n, a[m][0]);
            store(sums + m * width + n + W, a[m][1]);
        }
    }
}

inline void tile_multiply(const float* x, int64_t stride_x, int64_t rows, const float* panel, int64_t width,
                             int64_t size, float* sums, bool more) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
        float_tile<4>(x + m * stride_x, stride_x, panel, width, size, sums + m * width, more);
    for (; m < rows; m++) float_tile<1>(x + m * stride_x, stride_x, panel, width, size, sums + m * width, more);
}

// Keys as columns: panel[e][j].
template <class C>
inline void pack_keys(const C* const* keys, int64_t count, int64_t size, float* panel) {
    for (int64_t j = 0; j < TILE_KEYS; j++) {
        float by = 1.0f;
        if constexpr (scaled<C>) by = j < count ? scale_of(keys[j], size) : 0.0f;
        for (int64_t e = 0; e < size; e++) panel[e * TILE_KEYS + j] = j < count ? to_float(keys[j][e]) * by : 0.0f;
    }
}
// Values low .. count as rows: panel[j][e]; zeros before them.
template <class C>
inline void pack_values(const C* const* values, int64_t low, int64_t count, int64_t size, int64_t padded,
                        float* panel) {
    for (int64_t n = 0; n < low * padded; n += W) store(panel + n, zero());
    for (int64_t j = low; j < count; j++) {
        V by = set(1.0f);
        if constexpr (scaled<C>) by = set(scale_of(values[j], size));
        for (int64_t e = 0; e < padded; e += W)
            store(panel + j * padded + e, e < size ? mul(load(values[j] + e, size - e), by) : zero());
    }
}

// Scores of one packed row against `count` keys -> probabilities; the row's older sums shrink by the returned factor.
inline float soften(float* s, int64_t low, int64_t high, float& top, float& total, float* probs) {
    for (int64_t n = 0; n < low; n++) s[n] = NEVER;
    for (int64_t n = high; n < TILE_KEYS; n++) s[n] = NEVER;
    V best = set(NEVER);
    for (int64_t n = 0; n < TILE_KEYS; n += W) best = maximum(best, load(s + n));
    float now = largest(best);
    now = top > now ? top : now;
    if (low >= high) {
        for (int64_t n = 0; n < TILE_KEYS; n += W) store(probs + n, zero());
        return 1.0f;
    }
    V added = zero();
    for (int64_t n = 0; n < TILE_KEYS; n += W) {
        V e = exponential(sub(load(s + n), set(now)));
        added = add(added, e);
        store(probs + n, e);
    }
    float shrink = top == now ? 1.0f : exponential(top - now);
    total = total * shrink + sum(added);
    top = now;
    return shrink;
}

// Query tokens begin .. end of a row (of `count`, the last of `length`), whose first is token `start` of the batch.
template <class T, class C>
void prefill_tile(const Rules& r, const qr_op& op, const int32_t* pages, int64_t start, int64_t count, int64_t length,
                  int64_t begin, int64_t end, int64_t h, char* room) {
    TileMemory memory(r, room);
    int64_t rows = (end - begin) * r.group, stride = r.padded + 32, stride_p = TILE_KEYS + 32;
    auto token = [&](int64_t p) { return begin + p / r.group; };
    for (int64_t p = 0; p < rows; p++) {
        int64_t head = h * r.group + p % r.group;
        const T* q = static_cast<const T*>(op.p[0]) + (start + token(p)) * op.i[7] + head * r.size;
        for (int64_t e = 0; e < r.padded; e += W)
            store(memory.queries + p * stride + e, e < r.size ? load(q + e, r.size - e) : zero());
        for (int64_t e = 0; e < r.padded; e += W) store(memory.values + p * r.padded + e, zero());
        memory.tops[p] = NEVER;
        memory.totals[p] = 0.0f;
    }
    int64_t past = length - count, low = most(0, past + begin - r.window + 1), first = low / TILE_KEYS * TILE_KEYS;
    int64_t stop = length ? least(length, past + end) : 0;
    for (int64_t j0 = first; j0 < stop; j0 += TILE_KEYS) {
        int64_t here = least(TILE_KEYS, stop - j0);
        const C *keys[TILE_KEYS], *values[TILE_KEYS];
        for (int64_t n = 0; n < here; n++) {
            int64_t j = most(low, j0 + n);  // what lies in front of every window is never read
            int64_t slot = most(pages[j / r.block], 0) * r.block + j % r.block;
            keys[n] = static_cast<const C*>(op.p[1]) + slot * op.i[9] + h * r.row;
            values[n] = static_cast<const C*>(op.p[2]) + slot * op.i[9] + h * r.row;
        }
        float* panel_v = memory.panels + TILE_KEYS * r.padded;
        pack_keys(keys, here, r.size, memory.panels);
        tile_multiply(memory.queries, stride, rows, memory.panels, TILE_KEYS, r.size, memory.scores, false);
        for (int64_t p = 0; p < rows; p++) {
            int64_t i = past + token(p), low = most(j0, i - r.window + 1) - j0, high = least(j0 + here, i + 1) - j0;
            float* s = memory.scores + p * TILE_KEYS;
            score(r, s, TILE_KEYS, j0, i, h * r.group + p % r.group);
            float shrink = soften(s, least(low, TILE_KEYS), most(high, 0), memory.tops[p], memory.totals[p],
                                  memory.probs + p * stride_p);
            if (shrink != 1.0f)
                for (int64_t e = 0; e < r.padded; e += W) {
                    float* v = memory.values + p * r.padded + e;
                    store(v, mul(load(v), set(shrink)));
                }
        }
        pack_values(values, most(0, low - j0), here, r.size, r.padded, panel_v);
        tile_multiply(memory.probs, stride_p, rows, panel_v, r.padded, here, memory.values, true);
    }
    for (int64_t p = 0; p < rows; p++) {
        T* out = static_cast<T*>(op.p[6]) + (start + token(p)) * op.i[8] + (h * r.group + p % r.group) * r.size;
        put(r, out, memory.values + p * r.padded, memory.totals[p]);
    }
}
