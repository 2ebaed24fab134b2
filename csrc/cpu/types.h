// Element types and conversions that every level shares. Included inside a level's namespace, so that each level has
// its own copy. Knows no vectors.

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float bits_float(uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
inline uint32_t float_bits(float x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return bits_float(sign | ((rest << 13) + (112u << 23)));
    float small = float(rest) * 0x1p-24f;  // subnormal: exact
    return sign ? -small : small;
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
    uint32_t bits = float_bits(x);
    if (x != x) out.bits = uint16_t(bits >> 16 | 0x40);  // a NaN whose payload lies low must not become infinite
    else out.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, f16& out) {
    uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) { out.bits = uint16_t(sign | 0x7e00); return; }
    if (rest >= 0x477ff000) { out.bits = uint16_t(sign | 0x7c00); return; }  // rounds beyond 65504
    if (rest < 0x38800000) {  // subnormal: adding 0.5 lets the hardware round at 2^-24
        float shifted = bits_float(rest) + 0.5f;
        out.bits = uint16_t(sign | (float_bits(shifted) - 0x3f000000));
        return;
    }
    out.bits = uint16_t(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

inline float to_float(int8_t x) { return float(x); }

template <class T> struct Tag { using type = T; };

// Calls f(Tag<T>) for the element type of a code.
template <class F> inline void with_type(int code, F f) {
    if (code == QR_BF16) f(Tag<bf16>{});
    else if (code == QR_F16) f(Tag<f16>{});
    else f(Tag<float>{});
}
inline int type_a(const qr_op& op) { return op.flags & 15; }
inline int type_b(const qr_op& op) { return op.flags >> 4 & 15; }
inline int type_c(const qr_op& op) { return op.flags >> 8 & 15; }
inline int kind_of(const qr_op& op) { return op.flags >> 12 & 15; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits `total` into pieces for the threads: big enough that taking one costs nothing beside it, small enough that a
// thread whose core was taken away delays the others little.
struct Pieces {
    int64_t total, size, count;
    inline Pieces(int64_t total, int64_t least_size, int threads)
        : total(total), size(most(least_size, ceil_div(total, threads * 8))), count(ceil_div(total, size)) {}
    inline int64_t begin(int64_t piece) const { return piece * size; }
    inline int64_t end(int64_t piece) const { return least(total, (piece + 1) * size); }
};

template <int n> struct Number { static constexpr int value = n; };
template <bool yes, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };
