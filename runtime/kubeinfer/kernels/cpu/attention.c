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

#include "keys.h" /* dot16, DEFINE_WEIGH, ZIP_ROWS */
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
    vec scale = splat(a->scale);
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
                store(&s[g][j], mul(dot16(query, keys + j, D), scale));
            }
        }
        for (int64_t g = 0; g < G; g++) {
            vec tops = splat(best[g]);
            for (int64_t j = 0; j < n; j += 16) tops = max(tops, load(&s[g][j]));
            float top = max_of(tops);
            float shrink = expf(best[g] - top);
            vec sum = zeros(), vtop = splat(top);
            for (int64_t j = 0; j < n; j += 16) {
                lanes m = FIRST_LANES(n - j);
                vec e = keep(m, vexp(sub(load_tail(&s[g][j], m), vtop)));
                store(&s[g][j], e);
                sum = add(sum, e);
            }
            total[g] = total[g] * shrink + sum_of(sum);
            best[g] = top;
            if (shrink != 1.0f)
                for (int64_t d = 0; d < D; d++) o[g][d] *= shrink;
        }
        for (int64_t g = 0; g < G; g += 4) WEIGH[G - g < 4 ? G - g : 4](s[g], keys, v_offset, n, D, o[g]);
    }
    for (int64_t g = 0; g < G; g++) {
        bf16 *to = a->out + (token * a->Hq + first_head + g) * D;
        vec inv = splat(total[g] > 0 ? 1.0f / total[g] : 0.0f);
        for (int64_t d = 0; d < D; d += 16) {
            lanes m = FIRST_LANES(D - d);
            store_bf16_tail(to + d, mul(load_tail(&o[g][d], m), inv), m);
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
    ZIP_ORDER
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
                uint32_t m = D - d >= PANEL ? 0xffffffffu : (uint32_t)((1ull << (D - d)) - 1);
                row32 v0 = LOAD_ROW(rows_of[j < keys ? j : 0] + v_offset + d, j < keys ? m : 0);
                row32 v1 = LOAD_ROW(rows_of[j + 1 < keys ? j + 1 : 0] + v_offset + d, j + 1 < keys ? m : 0);
                ZIP_ROWS(v0, v1, w->vp + p * KEYS * PANEL + (j / 2) * 64);
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
            vec x[4], top = splat(-INFINITY), scale = splat(a->scale);
            uint64_t visible = high <= low ? 0 : ((high >= 64 ? ~0ull : (1ull << high) - 1) & ~((1ull << low) - 1));
            for (int i = 0; i < 4; i++) {
                lanes m = (lanes)(visible >> (16 * i));
                x[i] = mul_where(splat(-INFINITY), m, load(s + 16 * i), scale);
                top = max(top, x[i]);
            }
            float row_top = max_of(top), new_top = row_top > w->best[r] ? row_top : w->best[r];
            if (new_top == -INFINITY) {
                memset(p, 0, KEYS * sizeof(bf16));
                continue;
            }
            float shrink = expf(w->best[r] - new_top);
            vec sum = zeros(), vtop = splat(new_top);
            for (int i = 0; i < 4; i++) {
                vec e = keep((lanes)(visible >> (16 * i)), vexp(sub(x[i], vtop)));
                sum = add(sum, e);
                store_bf16(p + 16 * i, e);
            }
            w->total[r] = w->total[r] * shrink + sum_of(sum);
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
