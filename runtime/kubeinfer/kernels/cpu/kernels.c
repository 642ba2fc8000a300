/* CPU kernels over bfloat16 with fp32 accumulation: a plain C ABI, called through ctypes.
 *
 * Needs AVX-512 with BF16 at run time (library.py asks the processor); everything else falls back to torch.
 * OpenMP symbols are left open on purpose: they bind to the OpenMP that torch has loaded, so there is one thread pool.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef uint16_t bf16;

enum { PANEL = 32, TILE = 12 }; /* outputs of a packed panel; rows of a register tile */

INLINE __m512 load_bf16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE __m512 load_bf16_tail(const bf16 *p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
INLINE void store_bf16(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }
INLINE void store_bf16_tail(bf16 *p, __m512 v, __mmask16 m) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
}
INLINE float bf16_to_float(bf16 x) {
    union { uint32_t u; float f; } c = {(uint32_t)x << 16};
    return c.f;
}
INLINE bf16 float_to_bf16(float x) {
    union { float f; uint32_t u; } c = {x};
    if (x != x) return 0x7fc0;
    return (bf16)((c.u + 0x7fff + ((c.u >> 16) & 1)) >> 16);
}
INLINE __m512bh broadcast_pair(const bf16 *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}
/* exp to about 2 ulp of bf16's needs: 2^n times a degree-5 polynomial on [-0.5, 0.5] */
INLINE __m512 vexp(__m512 x) {
    __m512 t = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-100.0f)), _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.33335581e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* ---- linear: y[M,N] = x[M,K] w[N,K]^T + b ---- */

/* Packed weight: panels of 32 outputs, each [K/2][32][2]. K must be even; N is padded with zeros. */
void ki_pack_linear(const bf16 *w, int64_t N, int64_t K, bf16 *out) {
    int64_t panels = (N + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        uint32_t *dst = (uint32_t *)(out + p * PANEL * K);
        for (int64_t j = 0; j < PANEL; j++) {
            int64_t row = p * PANEL + j;
            const uint32_t *src = (const uint32_t *)(w + row * K);
            for (int64_t k = 0; k < K / 2; k++) dst[k * PANEL + j] = row < N ? src[k] : 0;
        }
    }
}

/* acc[MR][2] over one panel; every MR sums over k in the same order, so a row's result does not depend on its batch */
#define TILE_BODY(MR)                                                                                       \
    __m512 acc[MR][2];                                                                                      \
    _Pragma("GCC unroll 12") for (int i = 0; i < MR; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();      \
    for (int64_t k = 0; k < K2; k++) {                                                                      \
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(w + k * 64);                                             \
        __m512bh b1 = (__m512bh)_mm512_loadu_si512(w + k * 64 + 32);                                        \
        _Pragma("GCC unroll 12") for (int i = 0; i < MR; i++) {                                             \
            __m512bh a = broadcast_pair(x + i * ldx + 2 * k);                                               \
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a, b0);                                                 \
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a, b1);                                                 \
        }                                                                                                   \
    }                                                                                                       \
    _Pragma("GCC unroll 12") for (int i = 0; i < MR; i++) {                                                 \
        _mm512_storeu_ps(c + i * ldc, acc[i][0]);                                                           \
        _mm512_storeu_ps(c + i * ldc + 16, acc[i][1]);                                                      \
    }

#define DEFINE_TILE(MR)                                                                                     \
    static TARGET void tile_##MR(const bf16 *x, int64_t ldx, const bf16 *w, int64_t K2, float *c, int64_t ldc) { \
        TILE_BODY(MR)                                                                                       \
    }
DEFINE_TILE(1) DEFINE_TILE(2) DEFINE_TILE(3) DEFINE_TILE(4) DEFINE_TILE(5) DEFINE_TILE(6)
DEFINE_TILE(7) DEFINE_TILE(8) DEFINE_TILE(9) DEFINE_TILE(10) DEFINE_TILE(11) DEFINE_TILE(12)
typedef void (*tile_fn)(const bf16 *, int64_t, const bf16 *, int64_t, float *, int64_t);
static const tile_fn TILES[TILE + 1] = {0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6,
                                        tile_7, tile_8, tile_9, tile_10, tile_11, tile_12};

/* c[M][32] = x[M,K] panel, fp32 */
static TARGET void panel_product(const bf16 *x, int64_t ldx, int64_t M, const bf16 *w, int64_t K2, float *c, int64_t ldc) {
    for (int64_t m = 0; m < M;) {
        int64_t rows = M - m < TILE ? M - m : TILE;
        /* 13 rows go as 7 + 6: a tile of one row would leave the multipliers idle */
        if (M - m > TILE && M - m < 2 * TILE) rows = (M - m + 1) / 2;
        TILES[rows](x + m * ldx, ldx, w, K2, c + m * ldc, ldc);
        m += rows;
    }
}

/* One row, four panels at a time: eight independent sums hide the latency of a single row. */
static TARGET void row_panels(const bf16 *x, const bf16 *w, int64_t K2, int64_t panels, float *c) {
    int64_t p = 0, size = K2 * 64;
    for (; p + 4 <= panels; p += 4, w += 4 * size, c += 4 * PANEL) {
        __m512 acc[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) acc[i] = _mm512_setzero_ps();
        for (int64_t k = 0; k < K2; k++) {
            __m512bh a = broadcast_pair(x + 2 * k);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const bf16 *at = w + i * size + k * 64;
                _mm_prefetch((const char *)(at + 1024), _MM_HINT_T0);
                acc[2 * i] = _mm512_dpbf16_ps(acc[2 * i], a, (__m512bh)_mm512_loadu_si512(at));
                acc[2 * i + 1] = _mm512_dpbf16_ps(acc[2 * i + 1], a, (__m512bh)_mm512_loadu_si512(at + 32));
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) _mm512_storeu_ps(c + 16 * i, acc[i]);
    }
    for (; p < panels; p++, w += size, c += PANEL) tile_1(x, 0, w, K2, c, PANEL);
}

static TARGET void finish_panel(const float *c, int64_t M, bf16 *y, int64_t ldy, const bf16 *bias, int64_t n0, int64_t N) {
    for (int half = 0; half < 2; half++) {
        int64_t n = n0 + 16 * half;
        if (n >= N) return;
        __mmask16 mask = N - n >= 16 ? 0xffff : (__mmask16)((1u << (N - n)) - 1);
        __m512 b = bias ? load_bf16_tail(bias + n, mask) : _mm512_setzero_ps();
        for (int64_t m = 0; m < M; m++)
            store_bf16_tail(y + m * ldy + n, _mm512_add_ps(_mm512_loadu_ps(c + m * PANEL + 16 * half), b), mask);
    }
}

TARGET void ki_linear(const bf16 *x, int64_t ldx, const bf16 *packed, const bf16 *bias, bf16 *y, int64_t ldy,
                      int64_t M, int64_t N, int64_t K) {
    int64_t panels = (N + PANEL - 1) / PANEL, K2 = K / 2;
    if (M == 1) {
        int64_t groups = (panels + 3) / 4;
#pragma omp parallel for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            float c[4 * PANEL];
            int64_t count = panels - 4 * g < 4 ? panels - 4 * g : 4;
            row_panels(x, packed + 4 * g * PANEL * K, K2, count, c);
            for (int64_t i = 0; i < count; i++) finish_panel(c + i * PANEL, 1, y, ldy, bias, (4 * g + i) * PANEL, N);
        }
        return;
    }
    enum { CHUNK = 120 };
    int64_t chunks = (M + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < chunks; i++) {
            float c[CHUNK * PANEL];
            int64_t m = i * CHUNK, rows = M - m < CHUNK ? M - m : CHUNK;
            panel_product(x + m * ldx, ldx, rows, packed + p * PANEL * K, K2, c, PANEL);
            finish_panel(c, rows, y + m * ldy, ldy, bias, p * PANEL, N);
        }
}

/* ---- norms and activation ---- */

/* y = norm(x + r) * w, r = x + r (r may be NULL: y = norm(x) * w) */
TARGET void ki_rms_norm(const bf16 *x, int64_t ldx, bf16 *r, const bf16 *w, bf16 *y, int64_t T, int64_t H, float eps) {
#pragma omp parallel for schedule(static) if (T >= 16)
    for (int64_t t = 0; t < T; t++) {
        const bf16 *row = x + t * ldx;
        bf16 *res = r ? r + t * H : NULL, *out = y + t * H;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t h = 0; h < H; h += 16) {
            __mmask16 m = H - h >= 16 ? 0xffff : (__mmask16)((1u << (H - h)) - 1);
            __m512 v = load_bf16_tail(row + h, m);
            if (res) {
                v = _mm512_add_ps(v, load_bf16_tail(res + h, m));
                store_bf16_tail(res + h, v, m);
                v = load_bf16_tail(res + h, m);
            }
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)H + eps));
        const bf16 *src = res ? res : row;
        for (int64_t h = 0; h < H; h += 16) {
            __mmask16 m = H - h >= 16 ? 0xffff : (__mmask16)((1u << (H - h)) - 1);
            __m512 v = _mm512_mul_ps(load_bf16_tail(src + h, m), scale);
            store_bf16_tail(out + h, _mm512_mul_ps(v, load_bf16_tail(w + h, m)), m);
        }
    }
}

/* y[T,I] = silu(x[:, :I]) * x[:, I:] */
TARGET void ki_silu_and_mul(const bf16 *x, bf16 *y, int64_t T, int64_t I) {
#pragma omp parallel for schedule(static) if (T * I >= 8192)
    for (int64_t t = 0; t < T; t++) {
        const bf16 *gate = x + t * 2 * I, *up = gate + I;
        for (int64_t i = 0; i < I; i += 16) {
            __mmask16 m = I - i >= 16 ? 0xffff : (__mmask16)((1u << (I - i)) - 1);
            __m512 g = load_bf16_tail(gate + i, m);
            __m512 one = _mm512_set1_ps(1.0f);
            __m512 s = _mm512_div_ps(g, _mm512_add_ps(one, vexp(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), _mm512_set1_ps(80.0f)))));
            store_bf16_tail(y + t * I + i, _mm512_mul_ps(s, load_bf16_tail(up + i, m)), m);
        }
    }
}

/* ---- rotary embedding and the write to the cache ---- */

static TARGET void norm_head(bf16 *x, const bf16 *w, int64_t D, float eps) {
    float sum = 0;
    for (int64_t d = 0; d < D; d++) { float v = bf16_to_float(x[d]); sum += v * v; }
    float scale = 1.0f / sqrtf(sum / (float)D + eps);
    for (int64_t d = 0; d < D; d++) x[d] = float_to_bf16(bf16_to_float(x[d]) * scale * bf16_to_float(w[d]));
}

static TARGET void rotate_head(const bf16 *x, bf16 *y, const float *cs, int64_t R, int64_t D) {
    int64_t half = R / 2;
    const float *cosine = cs, *sine = cs + half;
    for (int64_t d = 0; d < half; d += 16) {
        __mmask16 m = half - d >= 16 ? 0xffff : (__mmask16)((1u << (half - d)) - 1);
        __m512 a = load_bf16_tail(x + d, m), b = load_bf16_tail(x + half + d, m);
        __m512 c = _mm512_maskz_loadu_ps(m, cosine + d), s = _mm512_maskz_loadu_ps(m, sine + d);
        store_bf16_tail(y + d, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), m);
        store_bf16_tail(y + half + d, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), m);
    }
    if (y != x && R < D) memcpy(y + R, x + R, (size_t)(D - R) * sizeof(bf16));
}

/* q, k, v are views of qkv rows of stride ld; cache is [2][blocks][Hk][block_size][D] */
TARGET void ki_rope_and_cache(bf16 *q, bf16 *k, const bf16 *v, int64_t ld, const int32_t *positions, const float *cos_sin,
                              int64_t R, const int32_t *slots, bf16 *cache, int64_t blocks, int64_t block_size,
                              const bf16 *q_norm, const bf16 *k_norm, float eps, int64_t T, int64_t Hq, int64_t Hk,
                              int64_t D) {
    int64_t page = Hk * block_size * D;
#pragma omp parallel for schedule(static) if (T >= 16)
    for (int64_t t = 0; t < T; t++) {
        const float *cs = cos_sin ? cos_sin + (int64_t)positions[t] * R : NULL;
        for (int64_t h = 0; h < Hq; h++) {
            bf16 *head = q + t * ld + h * D;
            if (q_norm) norm_head(head, q_norm, D, eps);
            if (cs) rotate_head(head, head, cs, R, D);
        }
        if (slots[t] < 0) continue;
        int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
        for (int64_t h = 0; h < Hk; h++) {
            bf16 *head = k + t * ld + h * D;
            bf16 *to = cache + block * page + (h * block_size + offset) * D;
            if (k_norm) norm_head(head, k_norm, D, eps);
            if (cs) rotate_head(head, to, cs, R, D);
            else memcpy(to, head, (size_t)D * sizeof(bf16));
            memcpy(to + blocks * page, v + t * ld + h * D, (size_t)D * sizeof(bf16));
        }
    }
}

/* ---- attention ---- */

typedef struct {
    const bf16 *q; int64_t ldq;
    const bf16 *cache; int64_t blocks, block_size;
    const int32_t *table; int64_t ld_table;
    bf16 *out;
    int64_t Hq, Hk, D;
    float scale;
    int64_t window;
} attention;

/* Rows of keys [j0, j0 + n) of a sequence, found block by block: a division a key would cost more than its product. */
INLINE void key_rows(const attention *a, const int32_t *table, int64_t head, int64_t j0, int64_t n, const bf16 **rows) {
    int64_t bs = a->block_size, offset = j0 % bs;
    const int32_t *block = table + j0 / bs;
    for (int64_t j = 0; j < n; block++, offset = 0) {
        const bf16 *row = a->cache + (((int64_t)*block * a->Hk + head) * bs + offset) * a->D;
        for (; offset < bs && j < n; offset++, j++, row += a->D) rows[j] = row;
    }
}

enum { MAX_GROUP = 16, MAX_DIM = 256, DECODE_KEYS = 128 };

/* One query token: all heads of one KV head, online softmax over runs of keys. */
static TARGET void decode_one(const attention *a, int64_t token, int64_t seq, int64_t head, int64_t g0, int64_t G, int64_t len) {
    int64_t D = a->D, v_offset = a->blocks * a->Hk * a->block_size * D, first_head = head * (a->Hq / a->Hk) + g0;
    const int32_t *table = a->table + seq * a->ld_table;
    float o[MAX_GROUP][MAX_DIM], best[MAX_GROUP], total[MAX_GROUP], s[MAX_GROUP][DECODE_KEYS];
    for (int64_t g = 0; g < G; g++) { best[g] = -INFINITY; total[g] = 0; memset(o[g], 0, (size_t)D * 4); }
    int64_t start = a->window > 0 && len > a->window ? len - a->window : 0;
    for (int64_t j0 = start; j0 < len; j0 += DECODE_KEYS) {
        int64_t n = len - j0 < DECODE_KEYS ? len - j0 : DECODE_KEYS;
        const bf16 *keys[DECODE_KEYS];
        key_rows(a, table, head, j0, n, keys);
        for (int64_t j = 0; j < n; j++) {
            const bf16 *key = keys[j];
            for (int64_t g = 0; g < G; g++) {
                const bf16 *query = a->q + token * a->ldq + (first_head + g) * D;
                __m512 acc = _mm512_setzero_ps();
                for (int64_t d = 0; d < D; d += 32) {
                    if (D - d >= 32) {
                        acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(query + d), (__m512bh)_mm512_loadu_si512(key + d));
                    } else {
                        __mmask32 m = (__mmask32)((1ull << (D - d)) - 1);
                        acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_maskz_loadu_epi16(m, query + d), (__m512bh)_mm512_maskz_loadu_epi16(m, key + d));
                    }
                }
                s[g][j] = _mm512_reduce_add_ps(acc) * a->scale;
            }
        }
        for (int64_t g = 0; g < G; g++) {
            float top = best[g];
            for (int64_t j = 0; j < n; j++) top = s[g][j] > top ? s[g][j] : top;
            float shrink = expf(best[g] - top);
            __m512 sum = _mm512_setzero_ps(), vtop = _mm512_set1_ps(top);
            for (int64_t j = 0; j < n; j += 16) {
                __mmask16 m = n - j >= 16 ? 0xffff : (__mmask16)((1u << (n - j)) - 1);
                __m512 e = _mm512_maskz_mov_ps(m, vexp(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, &s[g][j]), vtop)));
                _mm512_storeu_ps(&s[g][j], e);
                sum = _mm512_add_ps(sum, e);
            }
            total[g] = total[g] * shrink + _mm512_reduce_add_ps(sum);
            best[g] = top;
            if (shrink != 1.0f)
                for (int64_t d = 0; d < D; d++) o[g][d] *= shrink;
        }
        for (int64_t d = 0; d < D; d += 16) {
            __mmask16 m = D - d >= 16 ? 0xffff : (__mmask16)((1u << (D - d)) - 1);
            for (int64_t g = 0; g < G; g += 4) {
                int64_t count = G - g < 4 ? G - g : 4;
                __m512 acc[4];
                for (int64_t i = 0; i < 4; i++) acc[i] = i < count ? _mm512_maskz_loadu_ps(m, &o[g + i][d]) : _mm512_setzero_ps();
                for (int64_t j = 0; j < n; j++) {
                    __m512 v = load_bf16_tail(keys[j] + v_offset + d, m);
                    for (int64_t i = 0; i < count; i++) acc[i] = _mm512_fmadd_ps(_mm512_set1_ps(s[g + i][j]), v, acc[i]);
                }
                for (int64_t i = 0; i < count; i++) _mm512_mask_storeu_ps(&o[g + i][d], m, acc[i]);
            }
        }
    }
    for (int64_t g = 0; g < G; g++) {
        bf16 *to = a->out + (token * a->Hq + first_head + g) * D;
        __m512 inv = _mm512_set1_ps(total[g] > 0 ? 1.0f / total[g] : 0.0f);
        for (int64_t d = 0; d < D; d += 16) {
            __mmask16 m = D - d >= 16 ? 0xffff : (__mmask16)((1u << (D - d)) - 1);
            store_bf16_tail(to + d, _mm512_mul_ps(_mm512_maskz_loadu_ps(m, &o[g][d]), inv), m);
        }
    }
}

enum { ROWS = 96, KEYS = 64 }; /* a prefill tile: query rows (tokens x heads of one KV head) by keys */

typedef struct {
    bf16 q[ROWS * MAX_DIM];
    bf16 kp[KEYS * MAX_DIM];       /* keys, two panels of [D/2][32][2] */
    bf16 vp[KEYS * (MAX_DIM + 32)]; /* values, panels of [KEYS/2][32][2] */
    float s[ROWS * KEYS];
    bf16 p[ROWS * KEYS];
    float pv[ROWS * PANEL];
    float o[ROWS * MAX_DIM];
    float best[ROWS], total[ROWS];
} tile_space;

/* Tokens [t0, t0 + n) of a sequence whose first query token sits at position pos0 (of t0: pos0 as given). */
static TARGET void prefill_tile(const attention *a, tile_space *w, int64_t seq, int64_t head, int64_t token, int64_t n, int64_t pos0) {
    int64_t D = a->D, G = a->Hq / a->Hk, rows = n * G, bs = a->block_size;
    int64_t v_offset = a->blocks * a->Hk * bs * D, d_panels = (D + PANEL - 1) / PANEL;
    const int32_t *table = a->table + seq * a->ld_table;
    for (int64_t i = 0; i < n; i++)
        memcpy(w->q + i * G * D, a->q + (token + i) * a->ldq + head * G * D, (size_t)(G * D) * sizeof(bf16));
    for (int64_t r = 0; r < rows; r++) { w->best[r] = -INFINITY; w->total[r] = 0; }
    memset(w->o, 0, (size_t)(rows * D) * 4);
    uint16_t order[64];
    for (int i = 0; i < 64; i++) order[i] = (uint16_t)(i / 2 + 32 * (i % 2)); /* a pair of keys side by side */
    __m512i first_half = _mm512_loadu_si512(order), second_half = _mm512_loadu_si512(order + 32);
    int64_t len = pos0 + n, start = a->window > 0 && pos0 + 1 > a->window ? pos0 + 1 - a->window : 0;
    for (int64_t j0 = start; j0 < len; j0 += KEYS) {
        int64_t keys = len - j0 < KEYS ? len - j0 : KEYS;
        /* pack: keys by pairs of dimensions, values by pairs of keys */
        const bf16 *rows_of[KEYS];
        key_rows(a, table, head, j0, keys, rows_of);
        for (int64_t j = 0; j < KEYS; j++) {
            uint32_t *to = (uint32_t *)w->kp + (j / PANEL) * (D / 2) * PANEL + j % PANEL;
            if (j < keys) {
                const uint32_t *from = (const uint32_t *)rows_of[j];
                for (int64_t d = 0; d < D / 2; d++) to[d * PANEL] = from[d];
            } else {
                for (int64_t d = 0; d < D / 2; d++) to[d * PANEL] = 0;
            }
        }
        for (int64_t j = 0; j < KEYS; j += 2) {
            for (int64_t p = 0; p < d_panels; p++) {
                int64_t d = p * PANEL;
                __mmask32 m = D - d >= PANEL ? 0xffffffffu : (__mmask32)((1ull << (D - d)) - 1);
                __m512i v0 = _mm512_maskz_loadu_epi16(j < keys ? m : 0, rows_of[j < keys ? j : 0] + v_offset + d);
                __m512i v1 = _mm512_maskz_loadu_epi16(j + 1 < keys ? m : 0, rows_of[j + 1 < keys ? j + 1 : 0] + v_offset + d);
                bf16 *to = w->vp + p * KEYS * PANEL + (j / 2) * 64;
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(v0, first_half, v1));
                _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(v0, second_half, v1));
            }
        }
        for (int64_t p = 0; p < KEYS / PANEL; p++)
            panel_product(w->q, D, rows, w->kp + p * PANEL * D, D / 2, w->s + p * PANEL, KEYS);
        for (int64_t r = 0; r < rows; r++) {
            int64_t pos = pos0 + r / G;
            int64_t low = a->window > 0 ? pos - a->window + 1 - j0 : 0, high = pos - j0 + 1; /* visible: [low, high) */
            if (low < 0) low = 0;
            if (high > keys) high = keys;
            float *s = w->s + r * KEYS;
            bf16 *p = w->p + r * KEYS;
            __m512 x[4], top = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(a->scale);
            uint64_t visible = high <= low ? 0 : ((high >= 64 ? ~0ull : (1ull << high) - 1) & ~((1ull << low) - 1));
            for (int i = 0; i < 4; i++) {
                __mmask16 m = (__mmask16)(visible >> (16 * i));
                x[i] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), m, _mm512_loadu_ps(s + 16 * i), scale);
                top = _mm512_max_ps(top, x[i]);
            }
            float row_top = _mm512_reduce_max_ps(top), new_top = row_top > w->best[r] ? row_top : w->best[r];
            if (new_top == -INFINITY) {
                memset(p, 0, KEYS * sizeof(bf16));
                continue;
            }
            float shrink = expf(w->best[r] - new_top);
            __m512 sum = _mm512_setzero_ps(), vtop = _mm512_set1_ps(new_top);
            for (int i = 0; i < 4; i++) {
                __m512 e = _mm512_maskz_mov_ps((__mmask16)(visible >> (16 * i)), vexp(_mm512_sub_ps(x[i], vtop)));
                sum = _mm512_add_ps(sum, e);
                store_bf16(p + 16 * i, e);
            }
            w->total[r] = w->total[r] * shrink + _mm512_reduce_add_ps(sum);
            w->best[r] = new_top;
            if (shrink != 1.0f)
                for (int64_t d = 0; d < D; d++) w->o[r * D + d] *= shrink;
        }
        for (int64_t p = 0; p < d_panels; p++) {
            int64_t width = D - p * PANEL < PANEL ? D - p * PANEL : PANEL;
            panel_product(w->p, KEYS, rows, w->vp + p * KEYS * PANEL, KEYS / 2, w->pv, PANEL);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < width; d++) w->o[r * D + p * PANEL + d] += w->pv[r * PANEL + d];
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        bf16 *to = a->out + ((token + r / G) * a->Hq + head * G + r % G) * D;
        float inv = w->total[r] > 0 ? 1.0f / w->total[r] : 0.0f;
        for (int64_t d = 0; d < D; d++) to[d] = float_to_bf16(w->o[r * D + d] * inv);
    }
}

/* Mixed batch: sequences of one query token go the decode way, others by tiles. Returns 0, or -1 if memory ran out. */
TARGET int ki_attention(const bf16 *q, int64_t ldq, const bf16 *cache, int64_t blocks, int64_t block_size,
                        const int32_t *query_start, const int32_t *seq_lens, const int32_t *table, int64_t ld_table,
                        bf16 *out, int64_t B, int64_t Hq, int64_t Hk, int64_t D, float scale, int64_t window) {
    attention a = {q, ldq, cache, blocks, block_size, table, ld_table, out, Hq, Hk, D, scale, window};
    int64_t G = Hq / Hk, tile_tokens = ROWS / G > 0 ? ROWS / G : 1, count = 0;
    for (int64_t b = 0; b < B; b++) {
        int64_t n = query_start[b + 1] - query_start[b];
        count += n == 1 ? 1 : (n + tile_tokens - 1) / tile_tokens;
    }
    if (count == 0) return 0;
    int32_t *tasks = malloc((size_t)count * 2 * sizeof(int32_t));
    if (!tasks) return -1;
    int64_t at = 0;
    for (int64_t b = 0; b < B; b++) {
        int64_t n = query_start[b + 1] - query_start[b];
        /* the last tokens have the most keys: begin with them, so that threads end together */
        for (int64_t t = (n - 1) / tile_tokens; t >= 0 && n > 0; t--) {
            tasks[2 * at] = (int32_t)b;
            tasks[2 * at + 1] = (int32_t)(n == 1 ? 0 : t * tile_tokens);
            at++;
            if (n == 1) break;
        }
    }
    int failed = 0;
#pragma omp parallel
    {
        tile_space *space = NULL;
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t i = 0; i < count; i++)
            for (int64_t h = 0; h < Hk; h++) {
                int64_t b = tasks[2 * i], t0 = tasks[2 * i + 1], first = query_start[b];
                int64_t n = query_start[b + 1] - first, len = seq_lens[b];
                if (n == 1) {
                    if (len > 0)
                        for (int64_t g = 0; g < G; g += MAX_GROUP)
                            decode_one(&a, first, b, h, g, G - g < MAX_GROUP ? G - g : MAX_GROUP, len);
                    else
                        memset(out + (first * Hq + h * G) * D, 0, (size_t)(G * D) * sizeof(bf16));
                    continue;
                }
                if (!space) space = aligned_alloc(64, (sizeof(tile_space) + 63) / 64 * 64);
                if (!space) { failed = 1; continue; }
                int64_t size = n - t0 < tile_tokens ? n - t0 : tile_tokens;
                prefill_tile(&a, space, b, h, first + t0, size, len - n + t0);
            }
        free(space);
    }
    free(tasks);
    return failed ? -1 : 0;
}

/* ---- greedy sampling: the first of the largest entries of each row ---- */

TARGET void ki_argmax(const bf16 *x, int64_t ld, int64_t B, int64_t V, int64_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < B; b++) {
        const bf16 *row = x + b * ld;
        __m512 top = _mm512_set1_ps(-INFINITY);
        for (int64_t v = 0; v < V; v += 16) {
            __mmask16 m = V - v >= 16 ? 0xffff : (__mmask16)((1u << (V - v)) - 1);
            top = _mm512_mask_max_ps(top, m, top, load_bf16_tail(row + v, m));
        }
        float best = _mm512_reduce_max_ps(top);
        out[b] = 0;
        for (int64_t v = 0; v < V; v += 16) {
            __mmask16 m = V - v >= 16 ? 0xffff : (__mmask16)((1u << (V - v)) - 1);
            __mmask16 hit = _mm512_mask_cmp_ps_mask(m, load_bf16_tail(row + v, m), _mm512_set1_ps(best), _CMP_EQ_OQ);
            if (hit) { out[b] = v + __builtin_ctz(hit); break; }
        }
    }
}
