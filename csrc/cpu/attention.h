// Paged attention of a ragged batch. Included inside a level's namespace.
//
// Rows of one token: pieces of CHUNK keys at fixed places of the sequence, merged in order. So a token's result depends
// neither on its neighbours nor on how many threads shared the work. Rows of several: tiles of queries, the query heads
// of one KV head packed together, over blocks of keys with a running softmax (Milakov and Gimelshein,
// arXiv:1805.02867; Dao et al., arXiv:2205.14135).

constexpr int64_t CHUNK = 128;       // keys of a piece of a decode row: two pieces of all heads fit the L2 cache
constexpr int64_t TILE_ROWS = 128;   // query tokens x heads of a prefill tile
constexpr int64_t TILE_KEYS = 64;    // keys of a block of a prefill tile
constexpr int64_t SPLIT_CHUNKS = 1024;  // of split rows: each has shared memory, 4 KiB for 8 heads of 128
constexpr float NEVER = -__builtin_inff();

// A cache of bytes: a row of `size` whole numbers, filled up to fours, then the float32 that they are to be multiplied by.
inline V load(const int8_t* p) { return load_bytes(p); }
inline V load(const int8_t* p, int64_t n) { return load_bytes(p, n); }
template <class C> inline float scale_of(const C* row, int64_t size) {
    float scale;
    __builtin_memcpy(&scale, row + (size + 3) / 4 * 4, sizeof scale);
    return scale;
}
template <class C> constexpr bool scaled = __is_same(C, int8_t);
template <class T, class C> constexpr bool paired = FAST_PAIRS && __is_same(T, bf16) && __is_same(C, bf16);

struct Rules {
    int64_t heads, kv_heads, group, size, padded, row, block, window;  // row: elements from one KV head to the next
    float scale, cap;
    const float* slopes;
};

inline float exponential(float x) {
    float out[W];
    store(out, exponential(set(x)));
    return out[0];
}

// Raw products with keys j = first .. first + count (in lanes beyond: anything) -> scores. `i`: the query's place.
inline void score(const Rules& r, float* s, int64_t count, int64_t first, int64_t i, int64_t head) {
    float slope = r.slopes ? r.slopes[head] : 0.0f;
    for (int64_t n = 0; n < count; n += W) {
        V v = mul(load(s + n), set(r.scale));
        if (r.cap > 0.0f) v = mul(hyperbolic(mul(v, set(1.0f / r.cap))), set(r.cap));
        if (slope != 0.0f) {
            float j[W];
            for (int lane = 0; lane < W; lane++) j[lane] = float(first + n + lane - i);
            v = fma(set(slope), load(j), v);
        }
        store(s + n, v);
    }
}

// Products of W keys, which begin `at` behind the pointers, with one query.
template <class C> inline V products(const C* const* keys, int64_t at, const float* q, int64_t size) {
    V a[W];
    for (int i = 0; i < W; i++) a[i] = zero();
    int64_t e = 0;
    for (; e + W <= size; e += W) {
        V x = load(q + e);
        for (int i = 0; i < W; i++) a[i] = fma(load(keys[i] + at + e), x, a[i]);
    }
    if (e < size) {
        V x = load(q + e, size - e);
        for (int i = 0; i < W; i++) a[i] = fma(load(keys[i] + at + e, size - e), x, a[i]);
    }
    return sums(a);
}

// out[g][e .. e + N * W] += sum of p[g][j] * values[j], for G query heads.
template <int G, int N, class C>
inline void weighted(const C* const* values, int64_t at, int64_t count, const float* p, int64_t e, int64_t left,
                     float* out, int64_t stride) {
    V a[G][N];
    for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) a[g][n] = zero();
    for (int64_t j = 0; j < count; j++) {
        V v[N];
        for (int n = 0; n < N; n++)
            v[n] = left >= N * W ? load(values[j] + at + e + n * W)
                                   : load(values[j] + at + e + n * W, left - n * W);
        for (int g = 0; g < G; g++) {
            V weight = set(p[g * CHUNK + j]);
            for (int n = 0; n < N; n++) a[g][n] = fma(weight, v[n], a[g][n]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) store(out + g * stride + e + n * W, a[g][n]);
}

// out[g] = sum of p[g][j] * values[j], for G query heads.
template <int G, class C>
inline void weighted_all(const Rules& r, const C* const* values, int64_t at, int64_t count, const float* p,
                         float* out) {
    int64_t e = 0;
    for (; e + 4 * W <= r.size; e += 4 * W) weighted<G, 4>(values, at, count, p, e, 4 * W, out, r.padded);
    for (; e < r.size; e += W) weighted<G, 1>(values, at, count, p, e, r.size - e, out, r.padded);
}

// What one piece knows of one query head: maximum, sum, and `padded` weighted values behind it.
struct Part { float top, total; };

inline void merge(Part& to, float* values, const Part& from, const float* more, int64_t size) {
    float top = to.top > from.top ? to.top : from.top;
    float keep = exponential(to.top - top), take = exponential(from.top - top);
    for (int64_t e = 0; e < size; e += W)
        store(values + e, fma(load(more + e), set(take), mul(load(values + e), set(keep))));
    to = {top, to.total * keep + from.total * take};
}

template <class T> inline void put(const Rules& r, T* out, const float* values, float total) {
    bool empty = total == 0.0f;  // the values may then be what lay in the memory
    V scale = set(1.0f / total);
    for (int64_t e = 0; e < r.size; e += W) store(out + e, empty ? zero() : mul(load(values + e), scale), r.size - e);
}

struct DecodeMemory {
    const void *keys[CHUNK], *values[CHUNK];  // of the first KV head
    float scores[4 * CHUNK], scales[2 * CHUNK];
    bf16 probs[4 * CHUNK];
};

// Keys and values that will be needed next, brought to the L2 cache a few tokens at a time while others are worked on:
// pages are scattered, so the hardware does not foresee them.
struct Coming {
    const char *keys, *values;  // the caches
    const int32_t* pages;
    int64_t next, end, block;       // tokens
    int64_t stride, offset, bytes;  // of a slot: its bytes, where in it, and how many to ask for

    inline void ask(int64_t tokens) {
        for (int64_t stop = least(end, next + tokens); next < stop; next++) {
            int64_t at = (most(pages[next / block], 0) * block + next % block) * stride + offset;
            for (int64_t i = at; i < at + bytes; i += 64) {
                __builtin_prefetch(keys + i, 0, 2);
                __builtin_prefetch(values + i, 0, 2);
            }
        }
    }
};

#include "attention_decode.h"
#include "attention_tiles.h"
#ifdef QR_PAIRS
#include "attention_pairs.h"
#endif

template <class T, class C> size_t tile_bytes(const Rules& r) {
#ifdef QR_PAIRS
    if constexpr (__is_same(T, bf16)) return PairMemory::bytes(r);
#endif
    return TileMemory::bytes(r);
}

template <class T, class C, class... Rest> void prefill(const Rules& r, Rest... rest) {
#ifdef QR_PAIRS
    if constexpr (__is_same(T, bf16)) return pair_tile<C>(r, rest...);
#endif
    prefill_tile<T, C>(r, rest...);
}

// How the decode rows are shared out. A row is split where it alone would keep a thread busy when the others have
// nothing left to do: its pieces are (chunk, KV head) or whole chunks, each with a place in shared memory, merged at the
// end; once there are SPLIT_CHUNKS, no further row is split. All others go in runs of rows: the next row is then the
// one that this thread asked for.
struct Sharing {
    const int32_t* lengths;
    // Rows of more chunks than `fair` are split, those in front of `until`; KV heads that a piece is split by.
    int64_t window, rows, fair, until, heads;
    int64_t pieces = 0, run = 1, runs = 0;
    bool merging = false;

    inline int64_t begin(int64_t row) const { return most(0, lengths[row] - window) / CHUNK; }
    inline int64_t chunks(int64_t row) const { return most(1, ceil_div(lengths[row], CHUNK) - begin(row)); }
    inline bool split(int64_t row) const { return row < until && chunks(row) > fair; }
    inline Sharing(const int32_t* lengths, int64_t window, int64_t rows, int64_t kv_heads, int threads)
        : lengths(lengths), window(window), rows(rows), fair(INT64_MAX), until(rows), heads(1) {
        int64_t total = 0, whole = 0, cut = 0;
        for (int64_t row = 0; row < rows; row++) total += chunks(row);
        if (threads > 1) fair = rows < 4 * threads ? 0 : most(1, total / (4 * threads));
        for (int64_t row = 0; row < rows; row++) {
            if (split(row)) cut += chunks(row), merging |= chunks(row) > 1;
            else whole++;
            if (cut >= SPLIT_CHUNKS) until = least(until, row + 1);
        }
        if (cut < 16 * threads) heads = kv_heads;
        pieces = cut * heads;
        run = most(1, whole / (8 * threads));
        runs = whole ? ceil_div(rows, run) : 0;
    }
};

template <class T, class C> void attention_rows(const qr_op& op, Context& c) {
    Rules r{};
    r.heads = op.i[2], r.kv_heads = op.i[3], r.group = r.heads / r.kv_heads, r.size = op.i[4], r.row = op.i[11];
    r.padded = (r.size + 4 * W - 1) / (4 * W) * (4 * W);
    r.block = op.i[5], r.window = op.i[10] > 0 ? op.i[10] : INT64_MAX / 2;
    r.scale = float(op.f[0]), r.cap = float(op.f[1]), r.slopes = static_cast<const float*>(op.p[7]);
    int64_t rows = c.count(op.i[0]), decodes = least(rows, c.count(op.i[1]));
    auto *tables = static_cast<const int32_t*>(op.p[3]), *lengths = static_cast<const int32_t*>(op.p[4]);
    auto* cu_q = static_cast<const int32_t*>(op.p[5]);
    Sharing share(lengths, r.window, decodes, r.kv_heads, c.threads);
    int64_t tokens = most(1, TILE_ROWS / r.group), tiles = 0;
    for (int64_t row = decodes; row < rows; row++) tiles += ceil_div(cu_q[row + 1] - cu_q[row], tokens) * r.kv_heads;

    size_t cell = size_t(r.padded + 2) * sizeof(float);  // a part and its values
    size_t chunk_cells = size_t(r.heads) * cell;         // of a chunk: parts of all heads, then their values
    auto* shared = share.merging ? static_cast<char*>(c.shared(size_t(share.pieces / share.heads) * chunk_cells))
                                 : nullptr;
    size_t room = sizeof(DecodeMemory) + size_t(r.padded) * sizeof(float) + 2 * chunk_cells, tile_room = 0;
    if (tiles) tile_room = tile_bytes<T, C>(r);
    auto* memory = static_cast<char*>(c.scratch(room > tile_room ? room : tile_room));
    auto& decode = *reinterpret_cast<DecodeMemory*>(memory);
    auto* query = reinterpret_cast<float*>(memory + sizeof(DecodeMemory));
    struct Cells {
        Part* parts;
        float* values;
    };
    auto cells = [&](void* at) {
        auto* parts = static_cast<Part*>(at);
        return Cells{parts, reinterpret_cast<float*>(parts + r.heads)};
    };
    Cells all = cells(query + r.padded), more = cells(reinterpret_cast<char*>(all.parts) + chunk_cells);
    auto add = [&](Cells to, Cells from, int64_t head) {
        merge(to.parts[head], to.values + head * r.padded, from.parts[head], from.values + head * r.padded, r.padded);
    };
    auto finish = [&](Cells from, int64_t which, int64_t head) {
        T* out = static_cast<T*>(op.p[6]) + which * op.i[8] + head * r.size;
        put(r, out, from.values + head * r.padded, lengths[which] > 0 ? from.parts[head].total : 0.0f);
    };
    auto coming = [&](int64_t which, int64_t first, int64_t last, int64_t h, int64_t count) {
        int64_t bytes = r.row * int64_t(sizeof(C));
        return Coming{static_cast<const char*>(op.p[1]), static_cast<const char*>(op.p[2]), tables + which * op.i[6],
                      first, last, r.block, op.i[9] * int64_t(sizeof(C)), h * bytes, count * bytes};
    };
    auto piece = [&](int64_t which, int64_t first, int64_t last, int64_t h, Coming& next, int64_t asked, Cells to) {
        const T* q = static_cast<const T*>(op.p[0]) + which * op.i[7];
        decode_piece<T, C>(r, q, lengths[which], first, last, h, next, asked, decode, query, to.parts + h * r.group,
                           to.values + h * r.group * r.padded);
    };
    // All heads of a chunk before the next one, which is on its way meanwhile: of this row, else of row `after`.
    int64_t primed = -1;  // the row whose first chunk is on its way
    auto whole_row = [&](int64_t which, int64_t after) {
        int64_t length = lengths[which], low = most(0, length - r.window), begin = share.begin(which);
        for (int64_t chunk = begin; chunk * CHUNK < length; chunk++) {
            int64_t first = most(low, chunk * CHUNK), last = least(length, (chunk + 1) * CHUNK), row_next = which;
            if (chunk == begin && primed != which) coming(which, first, last, 0, r.kv_heads).ask(CHUNK);
            int64_t from = last, to = least(length, last + CHUNK);
            if (last == length) {
                row_next = primed = after;
                if (row_next >= 0) {
                    from = most(0, lengths[row_next] - r.window);
                    to = least(lengths[row_next], (from / CHUNK + 1) * CHUNK);
                }
            }
            Coming next = coming(row_next < 0 ? which : row_next, from, to, 0, r.kv_heads);
            int64_t asked = ceil_div(to - from, r.kv_heads * ceil_div(last - first, W));
            look_up<C>(r, op, tables + which * op.i[6], first, last, decode);
            for (int64_t h = 0; h < r.kv_heads; h++) {
                piece(which, first, last, h, next, asked, chunk > begin ? more : all);
                for (int64_t g = 0; chunk > begin && g < r.group; g++) add(all, more, h * r.group + g);
            }
        }
        for (int64_t h = 0; h < r.heads; h++) finish(all, which, h);
    };

    int64_t row = decodes, passed = 0;       // where the walk over the tiles of the prefill rows stands
    int64_t cut = 0, cut_passed = 0;         // and that over the pieces of the split rows
    for (int64_t item; (item = c.take(share.pieces + share.runs + tiles)) >= 0;) {
        if (item < share.pieces) {
            int64_t at = item / share.heads;
            for (;; cut++) {
                int64_t here = share.split(cut) ? share.chunks(cut) : 0;
                if (at < cut_passed + here) break;
                cut_passed += here;
            }
            int64_t length = lengths[cut], low = most(0, length - r.window), chunk = share.begin(cut) + at - cut_passed;
            int64_t first = most(low, chunk * CHUNK), last = least(length, (chunk + 1) * CHUNK);
            bool alone = share.chunks(cut) == 1;
            Cells to = alone ? all : cells(shared + size_t(at) * chunk_cells);
            int64_t h = share.heads > 1 ? item % share.heads : 0, end = share.heads > 1 ? h + 1 : r.kv_heads;
            if (first < last) {
                look_up<C>(r, op, tables + cut * op.i[6], first, last, decode);
                Coming own = coming(cut, first, last, h, end - h);
                own.ask(CHUNK);  // all of it: nothing before it could be used to ask ahead
                for (int64_t n = h; n < end; n++) piece(cut, first, last, n, own, W, to);
            }
            for (int64_t n = h * r.group; alone && n < end * r.group; n++) finish(to, cut, n);
        } else if (item < share.pieces + share.runs) {
            int64_t first = (item - share.pieces) * share.run, last = least(decodes, first + share.run);
            for (int64_t which = first; which < last; which++)
                if (!share.split(which))
                    whole_row(which, which + 1 < decodes && !share.split(which + 1) ? which + 1 : -1);
        } else {
            int64_t at = item - share.pieces - share.runs;
            for (;; row++) {
                int64_t here = ceil_div(cu_q[row + 1] - cu_q[row], tokens) * r.kv_heads;
                if (at < passed + here) break;
                passed += here;
            }
            int64_t count = cu_q[row + 1] - cu_q[row], tile = (at - passed) / r.kv_heads;
            tile = ceil_div(count, tokens) - 1 - tile;  // the longest first
            prefill<T, C>(r, op, tables + row * op.i[6], cu_q[row], count, lengths[row], tile * tokens,
                          least(count, (tile + 1) * tokens), (at - passed) % r.kv_heads, memory);
        }
    }
    if (!share.merging) return;
    c.barrier();
    int64_t before = 0;
    for (int64_t which = 0, at = c.take(decodes * r.kv_heads); at >= 0; at = c.take(decodes * r.kv_heads)) {
        for (; which < at / r.kv_heads; which++) before += share.split(which) ? share.chunks(which) : 0;
        int64_t count = share.split(which) ? share.chunks(which) : 1, h = at % r.kv_heads;
        Cells to = cells(shared + size_t(before) * chunk_cells);
        for (int64_t g = h * r.group; count > 1 && g < (h + 1) * r.group; g++) {
            for (int64_t n = 1; n < count; n++) add(to, cells(shared + size_t(before + n) * chunk_cells), g);
            finish(to, which, g);
        }
    }
}

void attention(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto a) {
        using T = typename decltype(a)::type;
        if (type_b(op) == QR_I8) attention_rows<T, int8_t>(op, c);
        else attention_rows<T, T>(op, c);
    });
}
