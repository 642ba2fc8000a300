/* Paged attention: one query token by online softmax over runs of keys, several by tiles (flash attention: Dao et al. 2022). */
#include "parts.h"

/* Rows of keys [j0, j0 + n) of a sequence, found block by block: a division a key would cost more than its product. */
INLINE void key_rows(const attention_args *a, const int32_t *table, int64_t head, int64_t j0, int64_t n, const bf16 **rows) {
    int64_t bs = a->block_size, offset = j0 % bs;
    const int32_t *block = table + j0 / bs;
    for (int64_t j = 0; j < n; block++, offset = 0) {
        const bf16 *row = a->cache + (((int64_t)*block * a->Hk + head) * bs + offset) * a->D;
        for (; offset < bs && j < n; offset++, j++, row += a->D) rows[j] = row;
    }
}

enum { MAX_GROUP = 16, MAX_DIM = 256, DECODE_KEYS = 128 };

/* Rows lie scattered over the cache's blocks: the processor does not guess where the next one is. */
enum { AHEAD = 16 };
INLINE void fetch_row(const bf16 *row, int64_t D) {
    for (int64_t d = 0; d < D; d += 32) _mm_prefetch((const char *)(row + d), _MM_HINT_T0);
}

/* The sums of sixteen vectors, by a tree of pairs: four times fewer shuffles than sixteen separate sums. */
INLINE __m512 sums16(__m512 v[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

/* The products of a query with sixteen keys. */
INLINE __m512 dot16(const bf16 *query, const bf16 *const *keys, int64_t D) {
    __m512 acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
    int64_t d = 0;
    for (; d + 32 <= D; d += 32) {
        __m512bh q = (__m512bh)_mm512_loadu_si512(query + d);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) acc[i] = _mm512_dpbf16_ps(acc[i], q, (__m512bh)_mm512_loadu_si512(keys[i] + d));
    }
    if (d < D) {
        __mmask32 m = (__mmask32)((1ull << (D - d)) - 1);
        __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(m, query + d);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) acc[i] = _mm512_dpbf16_ps(acc[i], q, (__m512bh)_mm512_maskz_loadu_epi16(m, keys[i] + d));
    }
    return sums16(acc);
}

/* o[HEADS][D] += s[HEADS][n] values[n][D]: rows of s DECODE_KEYS apart, of o MAX_DIM */
#define DEFINE_WEIGH(HEADS)                                                                                          \
    static TARGET void weigh_##HEADS(const float *s, const bf16 *const *keys, int64_t v_offset, int64_t n, int64_t D, \
                                     float *o) {                                                                     \
        for (int64_t d = 0; d < D; d += 32) {                                                                        \
            uint64_t inside = D - d >= 32 ? 0xffffffffu : (1ull << (D - d)) - 1;                                     \
            __mmask16 m0 = (__mmask16)inside, m1 = (__mmask16)(inside >> 16);                                        \
            __m512 acc[HEADS][2];                                                                                    \
            _Pragma("GCC unroll 4") for (int i = 0; i < HEADS; i++) {                                                \
                acc[i][0] = _mm512_maskz_loadu_ps(m0, o + i * MAX_DIM + d);                                          \
                acc[i][1] = _mm512_maskz_loadu_ps(m1, o + i * MAX_DIM + d + 16);                                     \
            }                                                                                                        \
            for (int64_t j = 0; j < n; j++) {                                                                        \
                const bf16 *value = keys[j] + v_offset + d;                                                          \
                __m512 v0 = load_bf16_tail(value, m0), v1 = load_bf16_tail(value + 16, m1);                          \
                _Pragma("GCC unroll 4") for (int i = 0; i < HEADS; i++) {                                            \
                    __m512 p = _mm512_set1_ps(s[i * DECODE_KEYS + j]);                                               \
                    acc[i][0] = _mm512_fmadd_ps(p, v0, acc[i][0]);                                                   \
                    acc[i][1] = _mm512_fmadd_ps(p, v1, acc[i][1]);                                                   \
                }                                                                                                    \
            }                                                                                                        \
            _Pragma("GCC unroll 4") for (int i = 0; i < HEADS; i++) {                                                \
                _mm512_mask_storeu_ps(o + i * MAX_DIM + d, m0, acc[i][0]);                                           \
                _mm512_mask_storeu_ps(o + i * MAX_DIM + d + 16, m1, acc[i][1]);                                      \
            }                                                                                                        \
        }                                                                                                            \
    }
DEFINE_WEIGH(1) DEFINE_WEIGH(2) DEFINE_WEIGH(3) DEFINE_WEIGH(4)
typedef void (*weigh_fn)(const float *, const bf16 *const *, int64_t, int64_t, int64_t, float *);
static const weigh_fn WEIGH[5] = {0, weigh_1, weigh_2, weigh_3, weigh_4};

/* One query token: all heads of one KV head, online softmax over runs of keys. */
static TARGET void decode_one(const attention_args *a, int64_t token, int64_t seq, int64_t head, int64_t g0, int64_t G, int64_t len) {
    int64_t D = a->D, v_offset = a->blocks * a->Hk * a->block_size * D, first_head = head * (a->Hq / a->Hk) + g0;
    const int32_t *table = a->table + seq * a->ld_table;
    float o[MAX_GROUP][MAX_DIM], best[MAX_GROUP], total[MAX_GROUP], s[MAX_GROUP][DECODE_KEYS];
    for (int64_t g = 0; g < G; g++) { best[g] = -INFINITY; total[g] = 0; memset(o[g], 0, (size_t)D * 4); }
    int64_t start = a->window > 0 && len > a->window ? len - a->window : 0;
    __m512 scale = _mm512_set1_ps(a->scale);
    for (int64_t j0 = start; j0 < len; j0 += DECODE_KEYS) {
        int64_t n = len - j0 < DECODE_KEYS ? len - j0 : DECODE_KEYS;
        const bf16 *keys[DECODE_KEYS];
        key_rows(a, table, head, j0, n, keys);
        for (int64_t j = n; j % 16; j++) keys[j] = keys[n - 1]; /* whole sixteens; what is too many is masked below */
        for (int64_t j = 0; j < n && j < AHEAD; j++) fetch_row(keys[j], D);
        for (int64_t j = 0; j < n; j += 16) {
            for (int64_t i = j; i < j + 16 && i < n; i++) {
                if (i + AHEAD < n) fetch_row(keys[i + AHEAD], D);
                fetch_row(keys[i] + v_offset, D);
            }
            for (int64_t g = 0; g < G; g++) {
                const bf16 *query = a->q + token * a->ldq + (first_head + g) * D;
                _mm512_storeu_ps(&s[g][j], _mm512_mul_ps(dot16(query, keys + j, D), scale));
            }
        }
        for (int64_t g = 0; g < G; g++) {
            __m512 tops = _mm512_set1_ps(best[g]);
            for (int64_t j = 0; j < n; j += 16) tops = _mm512_max_ps(tops, _mm512_loadu_ps(&s[g][j]));
            float top = _mm512_reduce_max_ps(tops);
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
        for (int64_t g = 0; g < G; g += 4) WEIGH[G - g < 4 ? G - g : 4](s[g], keys, v_offset, n, D, o[g]);
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
static TARGET void prefill_tile(const attention_args *a, tile_space *w, int64_t seq, int64_t head, int64_t token, int64_t n, int64_t pos0) {
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

int32_t *attention_tasks(const attention_args *a, int64_t *count) {
    int64_t G = a->Hq / a->Hk, tile_tokens = ROWS / G > 0 ? ROWS / G : 1, at = 0;
    *count = 0;
    for (int64_t b = 0; b < a->B; b++) *count += (a->query_start[b + 1] - a->query_start[b] + tile_tokens - 1) / tile_tokens;
    int32_t *tasks = malloc((size_t)(*count + 1) * 2 * sizeof(int32_t));
    if (!tasks) return NULL;
    for (int64_t b = 0; b < a->B; b++) {
        int64_t n = a->query_start[b + 1] - a->query_start[b];
        /* the last tokens have the most keys: begin with them, so that threads end together */
        for (int64_t t = (n + tile_tokens - 1) / tile_tokens - 1; t >= 0; t--, at++) {
            tasks[2 * at] = (int32_t)b;
            tasks[2 * at + 1] = (int32_t)(t * tile_tokens);
        }
    }
    return tasks;
}

TARGET int attention_part(const team *t, const attention_args *a, const int32_t *tasks, int64_t count, void **space) {
    int64_t G = a->Hq / a->Hk, tile_tokens = ROWS / G > 0 ? ROWS / G : 1, total = count * a->Hk;
    for (int64_t i = team_claim(t, 1); i < total; i = team_claim(t, 1)) {
        int64_t b = tasks[2 * (i / a->Hk)], t0 = tasks[2 * (i / a->Hk) + 1], h = i % a->Hk, first = a->query_start[b];
        int64_t n = a->query_start[b + 1] - first, len = a->seq_lens[b];
        if (n == 1) {
            if (len > 0)
                for (int64_t g = 0; g < G; g += MAX_GROUP)
                    decode_one(a, first, b, h, g, G - g < MAX_GROUP ? G - g : MAX_GROUP, len);
            else
                memset(a->out + (first * a->Hq + h * G) * a->D, 0, (size_t)(G * a->D) * sizeof(bf16));
            continue;
        }
        if (!*space) *space = aligned_alloc(64, (sizeof(tile_space) + 63) / 64 * 64);
        if (!*space) return -1;
        prefill_tile(a, *space, b, h, first + t0, n - t0 < tile_tokens ? n - t0 : tile_tokens, len - n + t0);
    }
    return 0;
}

/* Sequences of one query token go the decode way, others by tiles. Returns 0, or -1 if memory ran out. */
TARGET int ki_attention(const bf16 *q, int64_t ldq, const bf16 *cache, int64_t blocks, int64_t block_size,
                        const int32_t *query_start, const int32_t *seq_lens, const int32_t *table, int64_t ld_table,
                        bf16 *out, int64_t B, int64_t Hq, int64_t Hk, int64_t D, float scale, int64_t window) {
    attention_args a = {q, ldq, cache, blocks, block_size, query_start, seq_lens, table, ld_table, out, B, Hq, Hk, D, scale, window};
    int64_t count;
    int32_t *tasks = attention_tasks(&a, &count);
    if (!tasks) return -1;
    int failed = 0;
    team_shared shared = {0};
#pragma omp parallel reduction(| : failed)
    {
        team t = {omp_get_thread_num(), omp_get_num_threads(), &shared};
        void *space = NULL;
        failed = attention_part(&t, &a, tasks, count, &space);
        free(space);
    }
    free(tasks);
    return failed ? -1 : 0;
}
