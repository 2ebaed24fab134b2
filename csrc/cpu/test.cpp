// The C++ tests: every op at every level on buffers of exactly the size it may touch, so that AddressSanitizer sees one
// number too many, compared with plain loops in double. Also the pool: many short programs, and a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "pool.h"

namespace {
#define QR_INLINE inline
#include "types.h"

uint32_t state = 1;
float draw() {  // about -1 .. 1
    state = state * 1664525u + 1013904223u;
    return float(state >> 8) / float(1 << 23) - 1.0f;
}
int64_t draw(int64_t low, int64_t high) {
    state = state * 1664525u + 1013904223u;
    return low + int64_t(state) % (high - low + 1);
}

int failures = 0;
void expect(bool good, const char* what, double error = 0) {
    if (good) return;
    failures++;
    std::printf("FAILED %s (%g)\n", what, error);
}

template <class T> struct Buffer {
    std::vector<T> data;
    explicit Buffer(int64_t size, bool random = true) : data(size_t(size)) {
        for (auto& x : data) from_float(random ? draw() : 0.0f, x);
    }
    double operator[](int64_t i) const { return to_float(data[size_t(i)]); }
    void* at() { return data.data(); }
};

template <class T> constexpr int type_of = __is_same(T, float) ? QR_F32 : __is_same(T, bf16) ? QR_BF16 : QR_F16;
template <class T> constexpr double bound = __is_same(T, float) ? 1e-4 : __is_same(T, bf16) ? 1.2e-2 : 2e-3;

template <class T, class Of = T> void check(const char* what, const Buffer<T>& got, const std::vector<double>& expected) {
    double error = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        double off = std::fabs(got[int64_t(i)] - expected[i]) / std::fmax(1.0, std::fabs(expected[i]));
        error = off > error || off != off ? off : error;
    }
    expect(error <= bound<Of>, what, error);
}

template <class T> void test_linear(qr_pool* pool, int64_t m, int64_t n, int64_t k, bool gated) {
    int64_t rows = gated ? 2 * n : n;
    Buffer<T> x(m * k), w(rows * k), bias(rows), y(m * n), add(m * n);
    qr_op op{QR_LINEAR, QR_TYPES(type_of<T>, type_of<T>, type_of<T>) | (gated ? QR_GATED | QR_KIND(QR_SILU) : 0),
             {x.at(), w.at(), bias.at(), y.at(), add.at()}, {m, n, k, k, k, n, n}, {}};
    std::vector<double> expected;
    auto dot = [&](int64_t i, int64_t row) {
        double sum = bias[row];
        for (int64_t j = 0; j < k; j++) sum += x[i * k + j] * w[row * k + j];
        return sum;
    };
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double r = dot(i, j);
            if (gated) r = r / (1 + std::exp(-r)) * dot(i, n + j);
            expected.push_back(r + add[i * n + j]);
        }
    expect(qr_run(pool, &op, 1, nullptr) == 0, "run");
    check("linear", y, expected);
}

// `C`: of the outputs.
template <class T, class C = T>
void test_quantized(qr_pool* pool, int64_t m, int64_t n, int64_t k, int64_t group, int64_t bits, bool dynamic,
                    bool gated = false) {
    int64_t rows = gated ? 2 * n : n;
    Buffer<T> x(m * k), bias(rows);
    Buffer<C> y(m * n);
    Buffer<float> scales(rows * (k / group)), rounded(k);
    std::vector<uint8_t> q(size_t(rows * k * bits / 8));
    for (auto& byte : q) byte = uint8_t(draw(0, 255));
    if (gated)
        for (auto& scale : scales.data) scale /= float(1 << bits);  // a product of two sums is to fit a float16
    qr_op op{QR_LINEAR_Q, QR_TYPES(type_of<T>, 0, type_of<C>) | (gated ? QR_GATED | QR_KIND(QR_SILU) : 0),
             {x.at(), q.data(), bias.at(), y.at(), nullptr, scales.at()},
             {m, n, k, k, k * bits / 8, n, 0, bits, group, dynamic}, {}};
    auto weight = [&](int64_t row, int64_t j) {
        int64_t at = row * k + j;
        int byte = q[size_t(bits == 8 ? at : at / 2)];
        int value = bits == 8 ? int8_t(byte) : (at & 1 ? byte >> 4 : byte & 15) - 8;
        return value * scales[row * (k / group) + j / group];
    };
    std::vector<double> expected;
    for (int64_t i = 0; i < m; i++) {
        float top = 1e-12f;
        for (int64_t j = 0; j < k; j++) top = std::fmax(top, std::fabs(float(x[i * k + j])));
        float scale = top / 127.0f;
        for (int64_t j = 0; j < k; j++)
            rounded.data[size_t(j)] =
                dynamic ? std::nearbyint(float(x[i * k + j]) / scale) * scale : float(x[i * k + j]);
        auto dot = [&](int64_t row) {
            double sum = bias[row];
            for (int64_t j = 0; j < k; j++) sum += rounded[j] * weight(row, j);
            return sum;
        };
        for (int64_t row = 0; row < n; row++) {
            double r = dot(row);
            expected.push_back(gated ? r / (1 + std::exp(-r)) * dot(n + row) : r);
        }
    }
    expect(qr_run(pool, &op, 1, nullptr) == 0, "run");
    double largest = 1;
    for (double r : expected) largest = std::fmax(largest, std::fabs(r));
    for (size_t i = 0; i < expected.size(); i++) expected[i] /= largest;
    for (auto& r : y.data) from_float(float(to_float(r) / largest), r);
    check<C, T>("quantized linear", y, expected);
}

template <class T> void test_norm(qr_pool* pool, int64_t t, int64_t d) {
    Buffer<T> x(t * d), residual(t * d), w(d), y(t * d), total(t * d);
    qr_op op{QR_RMS_NORM, QR_TYPES(type_of<T>, 0, 0), {x.at(), residual.at(), w.at(), y.at(), total.at()},
             {t, d, d, d, d, d}, {1e-5}};
    qr_run(pool, &op, 1, nullptr);
    std::vector<double> expected, sums;
    for (int64_t i = 0; i < t; i++) {
        double squares = 0;
        for (int64_t j = 0; j < d; j++) {
            double s = x[i * d + j] + residual[i * d + j];
            sums.push_back(s);
            squares += total[i * d + j] * total[i * d + j];
        }
        for (int64_t j = 0; j < d; j++)
            expected.push_back(total[i * d + j] / std::sqrt(squares / double(d) + 1e-5) * w[j]);
    }
    check("total", total, sums);
    check("rms norm", y, expected);
    op.op = QR_LAYER_NORM;
    qr_run(pool, &op, 1, nullptr);
}

template <class T> void test_small(qr_pool* pool, int64_t t, int64_t d) {
    Buffer<T> x(t * 2 * d), y(t * d), table(7 * d);
    std::vector<int64_t> ids(static_cast<size_t>(t)), index(static_cast<size_t>(t));
    for (int kind = 0; kind < QR_KINDS; kind++) {
        qr_op op{QR_ACTIVATION, QR_TYPES(type_of<T>, 0, 0) | QR_KIND(kind) | QR_GATED, {x.at(), y.at()},
                 {t, d, 2 * d, d}, {}};
        qr_run(pool, &op, 1, nullptr);
    }
    std::vector<double> expected;
    for (auto& id : ids) id = draw(0, 6);
    for (int64_t i = 0; i < t; i++)
        for (int64_t j = 0; j < d; j++) expected.push_back(table[ids[size_t(i)] * d + j]);
    qr_op gather{QR_GATHER, QR_TYPES(type_of<T>, 0, 0), {ids.data(), table.at(), y.at()}, {t, d, 7, d, d}, {}};
    qr_run(pool, &gather, 1, nullptr);
    check("gather", y, expected);
    qr_op most_op{QR_ARGMAX, QR_TYPES(type_of<T>, 0, 0), {x.at(), index.data()}, {t, d, 2 * d}, {}};
    qr_run(pool, &most_op, 1, nullptr);
    for (int64_t i = 0; i < t; i++)
        for (int64_t j = 0; j < d; j++)
            expect(x[i * 2 * d + j] <= x[i * 2 * d + index[size_t(i)]], "argmax");
    qr_op sum{QR_ADD, QR_TYPES(type_of<T>, 0, 0), {x.at(), x.at(), y.at()}, {t, d, 2 * d, 2 * d, d}, {}};
    qr_run(pool, &sum, 1, nullptr);
    for (int64_t i = 0; i < t * d; i++) expected[size_t(i)] = 2 * x[i / d * 2 * d + i % d];
    check("add", y, expected);
}

// A cache of T, or of bytes as quire.h has them; `at` reads number n of the row that begins at `row`.
template <class T> struct Cache {
    Buffer<T> floats;
    std::vector<int8_t> bytes;
    int64_t e, row;
    Cache(int64_t rows, int64_t e, bool int8)
        : floats(int8 ? 0 : rows * e), bytes(int8 ? size_t(rows * (ceil_div(e, 4) * 4 + 4)) : 0), e(e),
          row(int8 ? ceil_div(e, 4) * 4 + 4 : e) {}
    void* at() { return bytes.empty() ? floats.at() : bytes.data(); }
    double number(int64_t row_index, int64_t n) const {
        if (bytes.empty()) return floats[row_index * row + n];
        float scale;
        __builtin_memcpy(&scale, &bytes[size_t(row_index * row + row - 4)], 4);
        return double(scale) * bytes[size_t(row_index * row + n)];
    }
};

// Rows of the given lengths and token counts, written by QR_HEADS and read by QR_ATTENTION in one program.
template <class T>
void test_attention(qr_pool* pool, const std::vector<int32_t>& lengths, const std::vector<int32_t>& counts, int64_t kv,
                    int64_t group, int64_t e, int64_t b, int64_t window, bool int8 = false) {
    int64_t rows = int64_t(lengths.size()), heads = kv * group, pages = 0, width = 1, decodes = 0;
    for (auto n : lengths) pages += ceil_div(n, b), width = most(width, ceil_div(n, b));
    while (decodes < rows && counts[size_t(decodes)] == 1) decodes++;
    std::vector<int32_t> table(size_t(rows * width), -1), cu_q{0};
    std::vector<int64_t> slots, positions;
    int32_t page = int32_t(pages);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t p = 0; p < ceil_div(lengths[size_t(r)], b); p++) table[size_t(r * width + p)] = --page;
        for (int64_t i = 0; i < counts[size_t(r)]; i++) {
            int64_t j = lengths[size_t(r)] - counts[size_t(r)] + i;
            slots.push_back(j < 0 ? -1 : table[size_t(r * width + j / b)] * b + j % b);
            positions.push_back(most(j, 0));
        }
        cu_q.push_back(cu_q.back() + counts[size_t(r)]);
    }
    int64_t tokens = cu_q.back(), wide = (heads + 2 * kv) * e, half = e / 2;
    Buffer<T> qkv(tokens * wide), out(tokens * heads * e);
    Cache<T> keys(pages * b * kv, e, int8), values(pages * b * kv, e, int8);
    int types = QR_TYPES(type_of<T>, int8 ? QR_I8 : 0, 0);
    Buffer<float> angles(2 * 4000 * half);
    T* x = qkv.data.data();
    qr_op ops[2] = {
        {QR_HEADS, types,
         {x, x + heads * e, x + (heads + kv) * e, angles.at(), positions.data(), slots.data(), keys.at(), values.at(),
          x},
         {-1, heads, kv, e, half, 4000, wide, wide, wide, wide, kv * keys.row, keys.row}, {}},
        {QR_ATTENTION, types,
         {x, keys.at(), values.at(), table.data(), const_cast<int32_t*>(lengths.data()), cu_q.data(), out.at()},
         {-2, -3, heads, kv, e, b, width, wide, heads * e, kv * keys.row, window, keys.row}, {0.3, 0.0}}};
    qr_dims dims{{tokens, rows, decodes}};
    expect(qr_run(pool, ops, 2, &dims) == 0, "run");
    std::vector<double> expected(size_t(tokens * heads * e), 0.0);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t t = 0; t < counts[size_t(r)]; t++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t token = cu_q[size_t(r)] + t, i = lengths[size_t(r)] - counts[size_t(r)] + t;
                std::vector<double> p;
                double total = 0;
                auto slot = [&](int64_t j) {
                    return (int64_t(table[size_t(r * width + j / b)]) * b + j % b) * kv + h / group;
                };
                int64_t first = window ? most(0, i - window + 1) : 0;
                for (int64_t j = first; j <= i; j++) {
                    double s = 0;
                    for (int64_t n = 0; n < e; n++) s += qkv[token * wide + h * e + n] * keys.number(slot(j), n);
                    p.push_back(std::exp(0.3 * s));
                    total += p.back();
                }
                double* to = &expected[size_t((token * heads + h) * e)];
                for (int64_t j = first; j <= i; j++)
                    for (int64_t n = 0; n < e; n++) to[n] += p[size_t(j - first)] / total * values.number(slot(j), n);
            }
    check("attention", out, expected);
}

// Rows with each kind of truncation: the token is among those that a sort would keep, and greedy rows take the largest.
void test_sample(qr_pool* pool, int64_t rows, int64_t vocab, double scale) {
    Buffer<float> x(rows * vocab), temperature(rows, false), low(rows, false), top(rows, false), log_min_p(rows, false);
    std::vector<int64_t> top_k, seed, sample, position, token(static_cast<size_t>(rows), -7);
    std::vector<double> top_p;
    std::vector<uint8_t> greedy;
    for (auto& value : x.data) value *= float(scale);
    for (int64_t r = 0; r < rows; r++) {
        temperature.data[size_t(r)] = r % 3 ? 1.0f : 0.5f;
        log_min_p.data[size_t(r)] = r % 4 == 1 ? -1.0f : -INFINITY;
        top_k.push_back(r % 5 == 2 ? draw(1, vocab) : 0);
        top_p.push_back(r % 2 ? 1.0 : 0.01 * double(draw(1, 99)));
        greedy.push_back(r % 7 == 6);
        seed.push_back(draw(0, 1 << 30)), sample.push_back(r), position.push_back(r + 5);
    }
    qr_op op{QR_SAMPLE, 0,
             {x.at(), temperature.at(), log_min_p.at(), top_k.data(), top_p.data(), greedy.data(), seed.data(),
              sample.data(), position.data(), token.data(), top.at(), low.at()},
             {rows, vocab, vocab}, {}};
    expect(qr_run(pool, &op, 1, nullptr) == 0, "run");
    for (int64_t r = 0; r < rows; r++) {
        int64_t t = token[size_t(r)], kept = 0;
        double all = 0, above = 0, edge = -INFINITY;
        expect(t >= -1 && t < vocab, "token");
        for (int64_t v = 0; v < vocab; v++) {
            double value = x[r * vocab + v];
            expect(value <= top[r], "largest");
            kept += value >= low[r], all += std::exp(value - top[r]);
            if (value < low[r]) edge = std::fmax(edge, value);
            else above += std::exp(value - top[r]);
        }
        if (t >= 0) expect(x[r * vocab + t] >= low[r], "a survivor");
        if (t >= 0 && greedy[size_t(r)]) expect(x[r * vocab + t] == top[r], "greedy");
        if (int64_t k = top_k[size_t(r)]; k && top_p[size_t(r)] == 1.0 && r % 4 != 1)
            expect(kept == k, "top k", double(kept));
        if (top_p[size_t(r)] < 1.0 && !top_k[size_t(r)] && r % 4 != 1)
            expect(above >= top_p[size_t(r)] * all * (1 - 1e-5), "nucleus", above / all);
    }
}

template <class T> void test_type(qr_pool* pool) {
    for (int i = 0; i < 12; i++)
        test_linear<T>(pool, draw(1, 9) * (i % 3 ? 1 : 10), draw(1, 90), draw(1, 80) * (i % 4 ? 1 : 60), i & 1);
    for (int i = 0; i < 24; i++) {
        int64_t groups = draw(1, 9), tokens = draw(1, 9) * (i % 3 ? 1 : 10), outputs = draw(1, 90);
        test_quantized<T>(pool, tokens, outputs, groups * 32, i % 5 ? 32 : groups * 32, i & 1 ? 4 : 8, i & 2);
        test_quantized<T>(pool, tokens, outputs, groups * 14, i % 5 ? groups * 14 : 14, i & 1 ? 4 : 8, i & 2);
    }
    test_quantized<T>(pool, 66, 5, 4160, 32, 4, true);
    test_quantized<T>(pool, 66, 5, 5000, 5000, 8, true);
    test_quantized<T>(pool, 3, 5, 5000, 5000, 8, false);
    for (int64_t tokens : {3, 39})
        for (int64_t bits : {4, 8})
            for (bool dynamic : {false, true}) {
                test_quantized<T>(pool, tokens, 70, 96, bits == 4 ? 32 : 96, bits, dynamic, true);
                test_quantized<T, float>(pool, tokens, 70, 96, bits == 4 ? 32 : 96, bits, dynamic, tokens > 3);
            }
    // More tokens than are turned at a time, and some that are left to dot products.
    test_linear<T>(pool, 66, 2, 30000, false);
    test_quantized<T>(pool, 66, 2, 60000, 60000, 8, true);
    for (int64_t d : {1, 5, 16, 33, 64, 100}) {
        test_norm<T>(pool, draw(1, 9), d);
        test_small<T>(pool, draw(1, 9), d);
    }
    for (int64_t e : {1, 2, 6, 16, 33, 34, 64, 80})
        for (int64_t window : {0, 3, 70})
            for (bool int8 : {false, true}) {
                test_attention<T>(pool, {9, 0, 70, 1}, {1, 1, 1, 1}, 2, 3, e, draw(1, 20), window, int8);
                test_attention<T>(pool, {5, 600, 33, 90}, {1, 1, 33, 70}, 1, draw(1, 9), e, draw(1, 20), window, int8);
            }
    test_attention<T>(pool, {1500}, {1}, 2, 4, 64, 16, 0);
    test_attention<T>(pool, {1500, 1200}, {1, 1}, 1, 3, 20, 7, 600);
}

void test_pool(int level) {
    // More threads than cores, and short spins: the paths that sleep and wake.
    for (int spin : {0, 50}) {
        qr_pool* pool = qr_pool_new(5, nullptr, level, spin);
        Buffer<float> x(64), y(64);
        std::vector<qr_op> ops(50, qr_op{QR_ACTIVATION, 0, {x.at(), y.at()}, {4, 16, 16, 16}, {}});
        for (int i = 0; i < 200; i++) qr_run(pool, ops.data(), int64_t(ops.size()), nullptr);
        for (int i = 0; i < 64; i++) expect(y[i] == x[i], "pool");
        ops[3].op = QR_OPS;
        expect(qr_run(pool, ops.data(), int64_t(ops.size()), nullptr) == -1, "an unknown op");
        ops[3].op = QR_ACTIVATION;
        pid_t child = fork();
        if (child == 0) _exit(qr_run(pool, ops.data(), int64_t(ops.size()), nullptr) ? 1 : 0);
        int status = 1;
        waitpid(child, &status, 0);
        expect(status == 0, "a forked child");
        qr_pool_free(pool);
    }
    int nowhere[2] = {0, 0};
    qr_pool* pinned = qr_pool_new(2, nowhere, level, 10);
    expect(pinned && qr_pool_threads(pinned) == 2 && qr_pool_level(pinned) == level, "pinned");
    qr_pool_free(pinned);
    expect(!qr_pool_new(0, nullptr, level, 10), "no threads");
    qr_pool_free(nullptr);
}

}  // namespace

int main() {
    for (int level = 0; level < QR_LEVELS; level++) {
        if (!qr_has_level(level)) continue;
        for (int threads : {1, 3}) {
            qr_pool* pool = qr_pool_new(threads, nullptr, level, 5);
            test_type<float>(pool);
            test_type<bf16>(pool);
            test_type<f16>(pool);
            for (int64_t vocab : {1, 5, 64, 65, 700, 20000})
                for (double scale : {0.01, 3.0, 30.0}) test_sample(pool, 15, vocab, scale);
            qr_pool_free(pool);
        }
        test_pool(level);
        std::printf("level %d: %s\n", level, failures ? "failed" : "good");
    }
    return failures != 0;
}
