// Rows of one token. Included by attention.h, inside a level's namespace.

// Where the keys and values first .. last of a row lie, filled up to a whole vector of them.
template <class C>
inline void look_up(const Rules& r, const qr_op& op, const int32_t* pages, int64_t first, int64_t last,
                    DecodeMemory& memory) {
    auto **k = reinterpret_cast<const C**>(memory.keys), **v = reinterpret_cast<const C**>(memory.values);
    for (int64_t j = first; j < last;) {
        int64_t page = most(pages[j / r.block], 0), stop = least(last, (j / r.block + 1) * r.block);
        int64_t offset = (page * r.block + j % r.block) * op.i[9];
        for (; j < stop; j++, offset += op.i[9]) {
            k[j - first] = static_cast<const C*>(op.p[1]) + offset;
            v[j - first] = static_cast<const C*>(op.p[2]) + offset;
        }
    }
    int64_t count = last - first;
    for (int64_t n = count; n < ceil_div(count, W) * W; n++) k[n] = k[count - 1], v[n] = v[count - 1];
}

// Keys first .. last of a row, which were looked up, and the query heads of KV head h: parts and their values. Of what
// is `coming`, `asked` tokens are asked for with each vector of keys. 32 rows of 200 tokens, 3 KV heads of 64, one
// thread on Zen 4: 45 ns for each key and KV head without, 24 with.
template <class T, class C>
void decode_piece(const Rules& r, const T* q, int64_t length, int64_t first, int64_t last, int64_t h, Coming& coming,
                  int64_t asked, DecodeMemory& memory, float* query, Part* parts, float* values) {
    auto **k = reinterpret_cast<const C**>(memory.keys), **v = reinterpret_cast<const C**>(memory.values);
    int64_t count = last - first, rounded_up = ceil_div(count, W) * W, at = h * r.row;
    if constexpr (scaled<C>)
        for (int64_t n = 0; n < rounded_up; n++) {
            memory.scales[n] = scale_of(k[n] + at, r.size);
            memory.scales[CHUNK + n] = scale_of(v[n] + at, r.size);
        }
    for (int64_t g0 = 0; g0 < r.group; g0 += 4) {
        int64_t now = least(4, r.group - g0);
        for (int64_t g = 0; g < now; g++) {
            int64_t head = h * r.group + g0 + g;
            float* s = memory.scores + g * CHUNK;
            const T* from = q + head * r.size;
            if constexpr (!paired<T, C>)
                for (int64_t e = 0; e < r.size; e += W) store(query + e, load(from + e, r.size - e));
            for (int64_t n = 0; n < count; n += W) {
                if (g0 + g == 0) coming.ask(asked);
                if constexpr (paired<T, C>) store(s + n, products(k + n, at, from, r.size));
                else if constexpr (scaled<C>)
                    store(s + n, mul(products(k + n, at, query, r.size), load(memory.scales + n)));
                else store(s + n, products(k + n, at, query, r.size));
            }
            score(r, s, count, first, length - 1, head);
            for (int64_t n = count; n < rounded_up; n++) s[n] = NEVER;
            V top = set(NEVER), total = zero();
            for (int64_t n = 0; n < count; n += W) top = maximum(top, load(s + n));
            float high = largest(top);
            for (int64_t n = 0; n < count; n += W) {
                V e = exponential(sub(load(s + n), set(high)));
                total = add(total, e);
                if constexpr (scaled<C>) e = mul(e, load(memory.scales + CHUNK + n));
                if constexpr (paired<T, C>) store(memory.probs + g * CHUNK + n, e);
                else store(s + n, e);
            }
            parts[g0 + g] = {high, sum(total)};
        }
        float* out = values + g0 * r.padded;
        auto all = [&](auto heads) {
            constexpr int G = decltype(heads)::value;
            if constexpr (paired<T, C>) weighted_pairs<G>(v, at, count, memory.probs, CHUNK, r.size, out, r.padded);
            else weighted_all<G>(r, v, at, count, memory.scores, out);
        };
        if (now == 4) all(Number<4>{});
        else if (now == 3) all(Number<3>{});
        else if (now == 2) all(Number<2>{});
        else all(Number<1>{});
    }
}
