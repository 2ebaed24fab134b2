// Vectors of four floats in the compiler's own vector types, which any processor has. Owns: the vector type of the
// portable level; the other levels have the same functions over registers. Included inside the level's namespace.

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

struct V { Floats v; };
constexpr int W = 4;

inline V zero() { return {Floats{}}; }
inline V set(float x) { return {Floats{x, x, x, x}}; }
inline V load(const float* p) { V r; __builtin_memcpy(&r.v, p, 16); return r; }
inline V load(const bf16* p) {
    Halves half;
    __builtin_memcpy(&half, p, 8);
    return {(Floats)(__builtin_convertvector(half, Words) << 16)};
}
inline V load(const f16* p) { return {Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}}; }
template <class T> inline V load(const T* p, int64_t n) {
    if (n >= W) return load(p);
    T part[W] = {};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return load(part);
}
inline void store(float* p, V x) { __builtin_memcpy(p, &x.v, 16); }
inline void store(bf16* p, V x) {
    Words bits = (Words)x.v;
    Words rounded_bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan_bits = bits >> 16 | 0x40;
    Words nan = (Words)(x.v != x.v);
    Halves half = __builtin_convertvector((nan & nan_bits) | (~nan & rounded_bits), Halves);
    __builtin_memcpy(p, &half, 8);
}
inline void store(f16* p, V x) { for (int i = 0; i < W; i++) from_float(x.v[i], p[i]); }
template <class T> inline void store(T* p, V x, int64_t n) {
    if (n >= W) return store(p, x);
    T part[W];
    store(part, x);
    for (int64_t i = 0; i < n; i++) p[i] = part[i];
}
// Whole numbers from bytes, and to bytes (|x| <= 127; others become something).
inline V load_bytes(const int8_t* p) { return {Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}}; }
inline V load_bytes(const int8_t* p, int64_t n) {
    if (n >= W) return load_bytes(p);
    int8_t part[W] = {};
    for (int64_t i = 0; i < n; i++) part[i] = p[i];
    return load_bytes(part);
}
inline V choose(Ints mask, V a, V b) { return {(Floats)((mask & (Ints)a.v) | (~mask & (Ints)b.v))}; }
inline V add(V a, V b) { return {a.v + b.v}; }
inline V sub(V a, V b) { return {a.v - b.v}; }
inline V mul(V a, V b) { return {a.v * b.v}; }
inline V div(V a, V b) { return {a.v / b.v}; }
inline V fma(V a, V b, V c) { return {a.v * b.v + c.v}; }
// The second where either is NaN.
inline V maximum(V a, V b) { return choose(a.v > b.v, a, b); }
inline V minimum(V a, V b) { return choose(a.v < b.v, a, b); }
// For |a| < 2^22: the sum has no room for a fraction.
inline V round_even(V a) {
    volatile float magic = 12582912.0f;
    V m = set(magic);
    return sub(add(a, m), m);
}
inline V absolute(V a) { return {(Floats)((Ints)a.v & 0x7fffffff)}; }
inline V with_sign(V a, V sign) { return {(Floats)(((Ints)a.v & 0x7fffffff) | ((Ints)sign.v & INT32_MIN))}; }
// x * 2^n for whole n in -160 .. 160, in two steps, so that subnormal results are right.
inline V scale2(V x, V n) {
    Ints whole = __builtin_convertvector(choose(n.v == n.v, n, zero()).v, Ints), half = whole >> 1;
    return {x.v * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23)};
}
inline float sum(V a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
inline float largest(V a) {
    float best = a.v[0];
    for (int i = 1; i < W; i++) best = a.v[i] > best ? a.v[i] : best;
    return best;
}
// The sums of W vectors.
inline V sums(const V* a) { return {Floats{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])}}; }
inline void store_bytes(int8_t* p, V x) {
    Ints whole = __builtin_convertvector(choose(absolute(x).v < 128.0f, x, zero()).v, Ints);
    for (int i = 0; i < W; i++) p[i] = int8_t(whole[i]);
}
inline int32_t dot_bytes(const int8_t* a, const int8_t* b, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += int32_t(a[i]) * int32_t(b[i]);
    return sum;
}
