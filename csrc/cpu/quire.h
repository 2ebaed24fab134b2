/* The interface of quire's native CPU library: plain C, pointers and integers, no torch.
 *
 * A program is an array of qr_op over fixed buffers. qr_run lets the threads of a pool walk it in order, each op split
 * over the threads, a barrier after each. Sizes that change from step to step are read from a qr_dims at run time, so a
 * program recorded once serves every step whose sizes fit its buffers. One op alone is a program of length 1.
 *
 * A COUNT field of an op (marked # below) holds a number >= 0, or -1 - k for dims->n[k].
 * Strides are in elements. Heads of one token lie side by side (stride E). Pointers may be null where said so.
 * Ops never allocate once the pool's scratch has grown to what the largest step needs.
 */
#ifndef QUIRE_H
#define QUIRE_H
#include <stdint.h>

#define QR_ABI 4
#define QR_POINTERS 12
#define QR_INTS 16
#define QR_FLOATS 4
#define QR_DIMS 16

typedef struct {
    int32_t op;
    int32_t flags;
    void* p[QR_POINTERS];
    int64_t i[QR_INTS];
    double f[QR_FLOATS];
} qr_op;

typedef struct {
    int64_t n[QR_DIMS];
} qr_dims;

typedef struct qr_pool qr_pool;

/* Element types. */
enum { QR_F32 = 0, QR_BF16 = 1, QR_F16 = 2, QR_I8 = 3 };

/* Flags: bits 0-3 type of activations (A), 4-7 type of what the op calls B, 8-11 type of what it calls C, 12-15
 * activation kind; then single bits. */
#define QR_TYPES(a, b, c) ((a) | (b) << 4 | (c) << 8)
#define QR_KIND(k) ((k) << 12)
#define QR_GATED (1 << 16) /* first half of the outputs is the gate */
#define QR_SOLO (1 << 17)  /* too small to wake other threads for; only looked at where the op runs alone */
#define QR_WIDE (1 << 18)  /* weights of an RMSNorm are float32, and the norm is not rounded before it meets them */

/* Activation kinds. QR_NONE is the identity. */
enum {
    QR_NONE, QR_SILU, QR_GELU, QR_GELU_TANH, QR_QUICK_GELU, QR_RELU, QR_RELU2, QR_RELU6, QR_TANH, QR_SIGMOID, QR_KINDS
};

enum {
    /* Does nothing. */
    QR_NOP = 0,

    /* y[M, N] = kind(x[M, K] w[N, K]^T + bias) + add; A: x, w, bias, add; C: y (as A, or float32).
     * With QR_GATED w has 2N rows, and y = kind(first N outputs) * last N.
     * p: 0 x, 1 w, 2 bias or null, 3 y, 4 add or null
     * i: 0 M#, 1 N, 2 K, 3 stride x, 4 stride w, 5 stride y, 6 stride add */
    QR_LINEAR = 1,

    /* total = x + residual; y = total * rsqrt(mean(total^2) + eps) * weight, the norm rounded before it meets the weight.
     * A: all (but see QR_WIDE). Each of the T tokens has `heads` rows of D numbers side by side with stride `head stride`.
     * p: 0 x, 1 residual or null, 2 weight or null, 3 y, 4 total (or null where there is no residual; may be residual),
     *    5 bias or null (LayerNorm)
     * i: 0 T#, 1 D, 2 stride x, 3 stride residual, 4 stride y, 5 stride total, 6 heads (0: 1), 7 head stride of x,
     *    8 head stride of y
     * f: 0 eps */
    QR_RMS_NORM = 2,
    QR_LAYER_NORM = 3,

    /* y = kind(x), with QR_GATED y = kind(x[:, :D]) * x[:, D:2D]. A: x, y. With QR_TANH y = cap * tanh(x / cap).
     * p: 0 x, 1 y;  i: 0 T#, 1 D, 2 stride x, 3 stride y;  f: 0 cap (0: 1) */
    QR_ACTIVATION = 4,

    /* y[t] = table[ids[t] + offset] * scale (ids int64; out of range: zeros). A: both. With B QR_I8 the table is int8, and
     * row v of it stands for table[v] * scales[v].
     * p: 0 ids, 1 table, 2 y, 3 add or null (y += add[t]), 4 scales float32, where B is QR_I8;
     * i: 0 T#, 1 D, 2 rows of the table, 3 stride table, 4 stride y, 5 offset, 6 stride add
     * f: 0 scale (0: 1) */
    QR_GATHER = 5,

    /* One token from each row of float32 logits, by `sample` of quire's ops/sampling.py: x / temperature (in place),
     * min_p, top_k and top_p as a threshold, then the largest sum with Gumbel noise. -1 for a row that cannot be decided
     * here: its maximum is not finite, some number is NaN, or two scores are too close.
     * p: 0 x, 1 temperature float32, 2 log min_p float32 (-inf: off), 3 top_k int64 (0: off), 4 top_p float64 (1: off),
     *    5 greedy uint8, 6 seed int64, 7 sample int64, 8 position int64, 9 token int64, 10 largest x float32,
     *    11 threshold float32
     * i: 0 S#, 1 V, 2 stride x */
    QR_SAMPLE = 6,

    /* Head norm, rotary and KV write of T tokens, each part optional. A: all that has no other type (and see QR_WIDE).
     * Order: RMSNorm of each head of q and k (weights p9, p10), rotation of the first 2F numbers of a head by half
     * style, then q to q_out, and k and v to the cache at slots[t] (not where it is negative). With B QR_I8
     * the cache is int8: E whole numbers, the largest magnitude being 127, filled up to fours, then a float32 by which
     * they are to be multiplied (NaN where a number is not finite).
     * p: 0 q or null, 1 k or null, 2 v or null, 3 table float32 (2, L, F) or null, 4 positions int64, 5 slots int64 or
     *    null, 6 cache of keys, 7 cache of values, 8 q_out (may be q) or null, 9 weight of the norm of
     *    q or null, 10 of k or null
     * i: 0 T#, 1 H, 2 K, 3 E, 4 F, 5 L, 6 stride q, 7 stride k, 8 stride v, 9 stride q_out, 10 stride of a slot in
     *    the cache, 11 of a head in a slot
     * f: 0 eps of the norms */
    QR_HEADS = 7,

    /* Paged attention of R rows, causal. Row r has the tokens cu_q[r] .. cu_q[r+1]-1 of q and out, which are the last
     * of its lengths[r] tokens in the cache; the first `decodes` rows have one token each. Length 0 gives zeros.
     * A: q, out, cache (with B QR_I8 as QR_HEADS writes it). Score: q.k * scale, softcap * tanh(score / softcap), + slope * (j - i).
     * p: 0 q, 1 cache of keys, 2 cache of values, 3 block table int32, 4 lengths int32, 5 cu_q int32, 6 out,
     *    7 slopes float32 (H) or null
     * i: 0 R#, 1 decodes#, 2 H, 3 K, 4 E, 5 tokens of a block, 6 stride of the table, 7 stride q, 8 stride out,
     *    9 stride of a slot, 10 window (0: none), 11 stride of a head in a slot
     * f: 0 scale, 1 softcap (0: none) */
    QR_ATTENTION = 8,

    /* Index (lowest among equals) and value of the largest number of each row; NaN counts as the largest. A: x.
     * p: 0 x, 1 index int64, 2 value float32 or null;  i: 0 S#, 1 V, 2 stride x */
    QR_ARGMAX = 9,

    /* As QR_LINEAR with w[n, k] = q[n, k] * scales[n, k / group], in 8 bits (int8) or 4 (two in a byte, the even input
     * in the low half, each half q + 8; K is even). Integer products where `dynamic`: each row of x is rounded to int8
     * first, its largest magnitude to 127, and the sums of each group are exact.
     * p: 0 x, 1 q, 2 bias or null, 3 y, 4 add or null, 5 scales float32 [N, K / group]
     * i: 0 M#, 1 N, 2 K, 3 stride x, 4 bytes of a row of q, 5 stride y, 6 stride add, 7 bits, 8 group (divides K),
     *    9 dynamic */
    QR_LINEAR_Q = 10,

    /* y = a + b. A: all.  p: 0 a, 1 b, 2 y;  i: 0 T#, 1 D, 2 stride a, 3 stride b, 4 stride y */
    QR_ADD = 11,

    QR_OPS
};

/* Levels of instructions. AVX-512 means F, BW, DQ, VL, VNNI and BF16. */
enum { QR_PORTABLE = 0, QR_AVX2 = 1, QR_AVX512 = 2, QR_LEVELS };

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

int qr_abi(void);
/* Whether this processor has the level. */
int qr_has_level(int level);

/* A pool of `threads` threads, the caller of qr_run being one. cpus: where they may run, one for each thread
 * (null: all that this process may use); the others are pinned to those where the caller is not, which is left as it
 * is; where there are fewer than threads, nobody is pinned. level: -1 for the best this processor has. spin_us: how
 * long a waiting thread spins before it sleeps. Null where memory or threads cannot be had. */
qr_pool* qr_pool_new(int threads, const int* cpus, int level, int spin_us);
void qr_pool_free(qr_pool* pool);
int qr_pool_threads(const qr_pool* pool);
int qr_pool_level(const qr_pool* pool);

/* Runs a program; returns when it is done. Calls from several threads wait for each other. 0, or -1 for an op that
 * does not exist (nothing is run then), or -2 where a forked child could not start threads. */
int qr_run(qr_pool* pool, const qr_op* ops, int64_t count, const qr_dims* dims);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
