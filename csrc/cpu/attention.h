// Paged attention of a ragged batch. Included inside a level's namespace.
//
// Rows of one token: pieces of CHUNK keys at fixed places of the sequence, merged in order. So a token's result depends
// neither on its neighbours nor on how many threads shared the work. Rows of several: tiles of queries, the query heads
// of one KV head packed together, over blocks of keys with a running softmax (Milakov and Gimelshein,
// arXiv:1805.02867; Dao et al., arXiv:2205.14135).

constexpr int64_t CHUNK = 256;       // keys of a piece of a decode row: two pieces of all heads fit the L2 cache
constexpr int64_t TILE_ROWS = 128;   // query tokens x heads of a prefill tile
constexpr int64_t TILE_KEYS = 64;    // keys of a block of a prefill tile
constexpr float NEVER = -__builtin_inff();

struct Rules {
    int64_t heads, kv_heads, group, size, padded, block, window;
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

// Products of W keys with one query.
template <class C> inline V products(const C* const* keys, const float* q, int64_t size) {
    V a[W];
    for (int i = 0; i < W; i++) a[i] = zero();
    int64_t e = 0;
    for (; e + W <= size; e += W) {
        V x = load(q + e);
        for (int i = 0; i < W; i++) a[i] = fma(load(keys[i] + e), x, a[i]);
    }
    if (e < size) {
        V x = load(q + e, size - e);
        for (int i = 0; i < W; i++) a[i] = fma(load(keys[i] + e, size - e), x, a[i]);
    }
    return sums(a);
}

// out[g][e .. e + N * W] += sum of p[g][j] * values[j], for G query heads.
template <int G, int N, class C>
inline void weighted(const C* const* values, int64_t count, const float* p, int64_t stride_p, int64_t e,
                        int64_t left, float* out, int64_t stride) {
    V a[G][N];
    for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) a[g][n] = zero();
    for (int64_t j = 0; j < count; j++) {
        V v[N];
        for (int n = 0; n < N; n++)
            v[n] = left >= N * W ? load(values[j] + e + n * W) : load(values[j] + e + n * W, left - n * W);
        for (int g = 0; g < G; g++) {
            V weight = set(p[g * stride_p + j]);
            for (int n = 0; n < N; n++) a[g][n] = fma(weight, v[n], a[g][n]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) store(out + g * stride + e + n * W, a[g][n]);
}

template <int G, class C>
inline void weighted_all(const Rules& r, const C* const* values, int64_t count, const float* p, float* out) {
    int64_t e = 0;
    for (; e + 4 * W <= r.size; e += 4 * W) weighted<G, 4>(values, count, p, CHUNK, e, 4 * W, out, r.padded);
    for (; e < r.size; e += W) weighted<G, 1>(values, count, p, CHUNK, e, r.size - e, out, r.padded);
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
    const void *keys[CHUNK], *values[CHUNK];
    float scores[4 * CHUNK];
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

// Keys first .. last of a row, query heads of KV head h: parts and their values. Of what is `coming`, `asked` tokens
// are asked for with each vector of keys. 32 rows of 200 tokens, 3 KV heads of 64, one thread on Zen 4: 45 ns for each
// key and KV head without, 24 with; 11 where all lies in the cache.
template <class T, class C>
void decode_piece(const Rules& r, const qr_op& op, const T* q, const int32_t* pages, int64_t length, int64_t first,
                  int64_t last, int64_t h, Coming& coming, int64_t asked, DecodeMemory& memory, float* query,
                  Part* parts, float* values) {
    auto **k = reinterpret_cast<const C**>(memory.keys), **v = reinterpret_cast<const C**>(memory.values);
    int64_t count = last - first, rounded_up = (count + W - 1) / W * W;
    for (int64_t j = first; j < last;) {
        int64_t page = most(pages[j / r.block], 0), stop = least(last, (j / r.block + 1) * r.block);
        int64_t offset = (page * r.block + j % r.block) * op.i[9] + h * r.size;
        for (; j < stop; j++, offset += op.i[9]) {
            k[j - first] = static_cast<const C*>(op.p[1]) + offset;
            v[j - first] = static_cast<const C*>(op.p[2]) + offset;
        }
    }
    for (int64_t n = count; n < rounded_up; n++) k[n] = k[count - 1];
    for (int64_t g0 = 0; g0 < r.group; g0 += 4) {
        int64_t now = least(4, r.group - g0);
        for (int64_t g = 0; g < now; g++) {
            int64_t head = h * r.group + g0 + g;
            float* s = memory.scores + g * CHUNK;
            const T* from = q + head * r.size;
            if constexpr (FAST_PAIRS && __is_same(T, bf16) && __is_same(C, bf16)) {
                for (int64_t n = 0; n < count; n += W) {
                    if (g0 + g == 0) coming.ask(asked);
                    store(s + n, products(k + n, from, r.size));
                }
            } else {
                for (int64_t e = 0; e < r.size; e += W) store(query + e, load(from + e, r.size - e));
                for (int64_t n = 0; n < count; n += W) {
                    if (g0 + g == 0) coming.ask(asked);
                    store(s + n, products(k + n, query, r.size));
                }
            }
            score(r, s, count, first, length - 1, head);
            for (int64_t n = count; n < rounded_up; n++) s[n] = NEVER;
            V top = set(NEVER), total = zero();
            for (int64_t n = 0; n < count; n += W) top = maximum(top, load(s + n));
            float high = largest(top);
            for (int64_t n = 0; n < count; n += W) {
                V e = exponential(sub(load(s + n), set(high)));
                total = add(total, e);
                store(s + n, e);
            }
            parts[g0 + g] = {high, sum(total)};
        }
        float* out = values + g0 * r.padded;
        if (now == 4) weighted_all<4>(r, v, count, memory.scores, out);
        else if (now == 3) weighted_all<3>(r, v, count, memory.scores, out);
        else if (now == 2) weighted_all<2>(r, v, count, memory.scores, out);
        else weighted_all<1>(r, v, count, memory.scores, out);
    }
}

#include "attention_tiles.h"

template <class T, class C> void attention_rows(const qr_op& op, Context& c) {
    Rules r{};
    r.heads = op.i[2], r.kv_heads = op.i[3], r.group = r.heads / r.kv_heads, r.size = op.i[4];
    r.padded = (r.size + 4 * W - 1) / (4 * W) * (4 * W);
    r.block = op.i[5], r.window = op.i[10] > 0 ? op.i[10] : INT64_MAX / 2;
    r.scale = float(op.f[0]), r.cap = float(op.f[1]), r.slopes = static_cast<const float*>(op.p[7]);
    int64_t rows = c.count(op.i[0]), decodes = least(rows, c.count(op.i[1]));
    auto *tables = static_cast<const int32_t*>(op.p[3]), *lengths = static_cast<const int32_t*>(op.p[4]);
    auto* cu_q = static_cast<const int32_t*>(op.p[5]);
    auto chunks = [&](int64_t row) {  // pieces of a decode row, and where they begin
        int64_t first = most(0, lengths[row] - r.window) / CHUNK;
        return most(1, ceil_div(lengths[row], CHUNK) - first);
    };
    int64_t longest = 1, pieces = 0;
    for (int64_t row = 0; row < decodes; row++) {
        longest = most(longest, chunks(row));
        pieces += chunks(row);
    }
    // Few pieces: one for each KV head and chunk, merged at the end. Many: one for each row, merged as it goes.
    bool split = pieces < 4 * c.threads;
    if (!split) longest = 1;
    int64_t per_row = split ? r.kv_heads * longest : 1, items = decodes * per_row;
    // Without a split, an item is a run of rows: the next row is then the one that this thread asked for.
    int64_t run = split ? 1 : most(1, decodes / (8 * c.threads)), runs = split ? items : ceil_div(decodes, run);
    int64_t tokens = most(1, TILE_ROWS / r.group), tiles = 0;
    for (int64_t row = decodes; row < rows; row++) tiles += ceil_div(cu_q[row + 1] - cu_q[row], tokens) * r.kv_heads;

    size_t cell = size_t(r.padded + 2) * sizeof(float);  // a part and its values
    bool merging = split && longest > 1;
    auto* shared = merging ? static_cast<char*>(c.shared(size_t(items) * size_t(r.group) * cell)) : nullptr;
    size_t room = sizeof(DecodeMemory) + size_t(r.padded) * sizeof(float) + size_t(r.group + r.heads) * cell;
    size_t tile_room = tiles ? TileMemory<T, C>::bytes(r) : 0;
    auto* memory = static_cast<char*>(c.scratch(room > tile_room ? room : tile_room));
    auto& decode = *reinterpret_cast<DecodeMemory*>(memory);
    auto* query = reinterpret_cast<float*>(memory + sizeof(DecodeMemory));
    auto* parts = reinterpret_cast<Part*>(query + r.padded);
    auto* values = reinterpret_cast<float*>(parts + r.group);
    auto* all = reinterpret_cast<Part*>(values + r.group * r.padded);  // of all heads of a row
    auto* all_values = reinterpret_cast<float*>(all + r.heads);
    auto out_of = [&](int64_t token, int64_t head) {
        return static_cast<T*>(op.p[6]) + token * op.i[8] + head * r.size;
    };

    auto coming = [&](int64_t which, int64_t first, int64_t last, int64_t h, int64_t count) {
        int64_t bytes = r.size * int64_t(sizeof(C));
        return Coming{static_cast<const char*>(op.p[1]), static_cast<const char*>(op.p[2]), tables + which * op.i[6],
                      first, last, r.block, op.i[9] * int64_t(sizeof(C)), h * bytes, count * bytes};
    };
    int64_t primed = -1;  // the row whose first chunk is on its way

    int64_t row = decodes, passed = 0;  // where the walk over the tiles of the prefill rows stands
    int64_t item = -1, rest = 0;
    for (;;) {
        if (rest > 0) {
            item++, rest--;
        } else {
            item = c.take(runs + tiles);
            if (item < 0) break;
            if (!split && item < runs) {
                item *= run;
                rest = least(run, decodes - item) - 1;
            } else if (!split) {
                item += items - runs;
            }
        }
        if (item >= items) {
            int64_t at = item - items;
            for (;; row++) {
                int64_t here = ceil_div(cu_q[row + 1] - cu_q[row], tokens) * r.kv_heads;
                if (at < passed + here) break;
                passed += here;
            }
            int64_t count = cu_q[row + 1] - cu_q[row], tile = (at - passed) / r.kv_heads;
            tile = ceil_div(count, tokens) - 1 - tile;  // the longest first
            prefill_tile<T, C>(r, op, tables + row * op.i[6], cu_q[row], count, lengths[row], tile * tokens,
                               least(count, (tile + 1) * tokens), (at - passed) % r.kv_heads, memory);
            continue;
        }
        int64_t which = item / per_row, length = lengths[which], low = most(0, length - r.window);
        const T* q = static_cast<const T*>(op.p[0]) + which * op.i[7];
        const int32_t* pages = tables + which * op.i[6];
        if (split) {
            int64_t h = item % per_row / longest, chunk = item % longest + low / CHUNK;
            int64_t first = most(low, chunk * CHUNK), last = least(length, (chunk + 1) * CHUNK);
            if (merging) {
                parts = reinterpret_cast<Part*>(shared + size_t(item) * size_t(r.group) * cell);
                values = reinterpret_cast<float*>(parts + r.group);
            }
            if (first < last)
            {
                Coming own = coming(which, first, last, h, 1);
                own.ask(2 * W);
                decode_piece<T, C>(r, op, q, pages, length, first, last, h, own, W, decode, query, parts, values);
            }
            if (!merging)
                for (int64_t g = 0; g < r.group; g++)
                    put(r, out_of(which, h * r.group + g), values + g * r.padded, first < last ? parts[g].total : 0.0f);
            continue;
        }
        // All heads of a chunk before the next one, which is on its way meanwhile: of this row, else of the next.
        int64_t begin = low / CHUNK, end = most(begin, ceil_div(length, CHUNK));
        for (int64_t chunk = begin; chunk < end; chunk++) {
            int64_t first = most(low, chunk * CHUNK), last = least(length, (chunk + 1) * CHUNK), row_next = which;
            if (chunk == begin && primed != which) coming(which, first, last, 0, r.kv_heads).ask(CHUNK);
            int64_t from = last, to = least(length, last + CHUNK);
            if (last == length) {
                row_next = primed = which + 1 < decodes ? which + 1 : -1;
                if (row_next >= 0) {
                    from = most(0, lengths[row_next] - r.window);
                    to = least(lengths[row_next], (from / CHUNK + 1) * CHUNK);
                }
            }
            Coming next = coming(row_next < 0 ? which : row_next, from, to, 0, r.kv_heads);
            int64_t asked = ceil_div(to - from, r.kv_heads * ceil_div(last - first, W));
            for (int64_t h = 0; h < r.kv_heads; h++) {
                Part* part = all + h * r.group;
                float* value = all_values + h * r.group * r.padded;
                bool more = chunk > begin;
                decode_piece<T, C>(r, op, q, pages, length, first, last, h, next, asked, decode, query,
                                   more ? parts : part, more ? values : value);
                for (int64_t g = 0; more && g < r.group; g++)
                    merge(part[g], value + g * r.padded, parts[g], values + g * r.padded, r.padded);
            }
        }
        for (int64_t h = 0; h < r.heads; h++)
            put(r, out_of(which, h), all_values + h * r.padded, length > 0 ? all[h].total : 0.0f);
    }
    if (!merging) return;
    c.barrier();
    for (int64_t at; (at = c.take(decodes * r.kv_heads)) >= 0;) {
        int64_t which = at / r.kv_heads, h = at % r.kv_heads, low = most(0, lengths[which] - r.window) / CHUNK;
        int64_t count = ceil_div(lengths[which], CHUNK) - low;
        auto* first = shared + size_t(at * longest) * size_t(r.group) * cell;
        auto* to = reinterpret_cast<Part*>(first);
        auto* sum = reinterpret_cast<float*>(to + r.group);
        for (int64_t n = 1; n < count; n++) {
            auto* from = reinterpret_cast<Part*>(first + size_t(n) * size_t(r.group) * cell);
            auto* more = reinterpret_cast<float*>(from + r.group);
            for (int64_t g = 0; g < r.group; g++)
                merge(to[g], sum + g * r.padded, from[g], more + g * r.padded, r.padded);
        }
        for (int64_t g = 0; g < r.group; g++)
            put(r, out_of(which, h * r.group + g), sum + g * r.padded, lengths[which] ? to[g].total : 0.0f);
    }
}

void attention(const qr_op& op, Context& c) {
    with_type(type_a(op), [&](auto a) {
        using T = typename decltype(a)::type;
        attention_rows<T, T>(op, c);
    });
}
