/* Linear layers over packed bfloat16 weights with fp32 sums. */
#include "parts.h"

enum { CHUNK = 120, GATED_CHUNK = 60 }; /* rows whose sums are kept beside a panel */

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

/* Rows of the next register tile, of at most `most`: most + 1 go as two halves, since one row alone would leave the multipliers idle. */
INLINE int64_t tile_rows(int64_t left, int64_t most) {
    int64_t rows = left < most ? left : most;
    if (left > most && left < 2 * most) rows = (left + 1) / 2;
    return rows;
}

#include "product.h" /* panel_product and, for one row, row_panels */

/* Where a product goes, and what is added to it. */
typedef struct {
    bf16 *y;     /* [M, N] in bfloat16, or */
    float *wide; /* in fp32 */
    int64_t ld, N;
    const bf16 *bias, *add; /* [N] and rows ld apart, or NULL */
} product_result;

/* Rows [m0, m0 + M) of outputs [n0, n0 + 32) from their sums c. */
static TARGET void finish_panel(const product_result *r, const float *c, int64_t m0, int64_t M, int64_t n0) {
    for (int half = 0; half < 2; half++) {
        int64_t n = n0 + 16 * half;
        if (n >= r->N) return;
        lanes mask = FIRST_LANES(r->N - n);
        vec b = r->bias ? load_bf16_tail(r->bias + n, mask) : zeros();
        for (int64_t m = 0; m < M; m++) {
            int64_t at = (m0 + m) * r->ld + n;
            vec v = add(load(c + m * PANEL + 16 * half), b);
            if (r->add) v = add(v, load_bf16_tail(r->add + at, mask));
            if (r->wide) store_tail(r->wide + at, v, mask);
            else store_bf16_tail(r->y + at, v, mask);
        }
    }
}

/* How many of `tasks` a thread takes at a time: few enough that threads end together, else `most` (a panel's worth). */
static int64_t grain_of(const team *t, int64_t tasks, int64_t most) {
    int64_t grain = tasks / (8 * t->count);
    return grain < 1 ? 1 : grain > most ? most : grain;
}

static TARGET void product_part(const team *t, const bf16 *x, int64_t ldx, const bf16 *packed, const product_result *r, int64_t M,
                                int64_t K) {
    int64_t panels = (r->N + PANEL - 1) / PANEL, K2 = K / 2;
    if (M == 1) {
        int64_t grain = grain_of(t, panels, 4);
        for (int64_t p = team_claim(t, grain); p < panels; p = team_claim(t, grain)) {
            float c[4 * PANEL];
            int64_t count = panels - p < grain ? panels - p : grain;
            row_panels(x, packed + p * PANEL * K, K2, count, c);
            for (int64_t i = 0; i < count; i++) finish_panel(r, c + i * PANEL, 0, 1, (p + i) * PANEL);
        }
        return;
    }
    int64_t chunks = (M + CHUNK - 1) / CHUNK, tasks = panels * chunks, grain = grain_of(t, tasks, chunks);
    for (int64_t first = team_claim(t, grain); first < tasks; first = team_claim(t, grain))
        for (int64_t i = first; i < first + grain && i < tasks; i++) {
            float c[CHUNK * PANEL];
            int64_t p = i / chunks, m = i % chunks * CHUNK, rows = M - m < CHUNK ? M - m : CHUNK;
            panel_product(x + m * ldx, ldx, rows, packed + p * PANEL * K, K2, c, PANEL);
            finish_panel(r, c, m, rows, p * PANEL);
        }
}

TARGET void linear_part(const team *t, const bf16 *x, int64_t ldx, const bf16 *packed, const bf16 *bias, const bf16 *add,
                        bf16 *y, int64_t ldy, int64_t M, int64_t N, int64_t K) {
    product_result result = {.y = y, .ld = ldy, .N = N, .bias = bias, .add = add};
    product_part(t, x, ldx, packed, &result, M, K);
}

TARGET void gated_linear_part(const team *t, const bf16 *x, int64_t ldx, const bf16 *packed, const bf16 *bias, bf16 *y,
                              int64_t M, int64_t I, int64_t K) {
    int64_t panels = I / PANEL, K2 = K / 2, chunks = (M + GATED_CHUNK - 1) / GATED_CHUNK, tasks = panels * chunks;
    int64_t grain = grain_of(t, tasks, chunks);
    const bf16 *gates = packed, *ups = packed + I * K;
    for (int64_t first = team_claim(t, grain); first < tasks; first = team_claim(t, grain))
        for (int64_t i = first; i < first + grain && i < tasks; i++) {
            float gate[GATED_CHUNK * PANEL], up[GATED_CHUNK * PANEL];
            int64_t p = i / chunks, m0 = i % chunks * GATED_CHUNK, rows = M - m0 < GATED_CHUNK ? M - m0 : GATED_CHUNK;
            if (M == 1) {
                row_panels(x, gates + p * PANEL * K, K2, 1, gate);
                row_panels(x, ups + p * PANEL * K, K2, 1, up);
            } else {
                panel_product(x + m0 * ldx, ldx, rows, gates + p * PANEL * K, K2, gate, PANEL);
                panel_product(x + m0 * ldx, ldx, rows, ups + p * PANEL * K, K2, up, PANEL);
            }
            for (int half = 0; half < PANEL; half += 16) {
                int64_t n = p * PANEL + half;
                vec gate_bias = bias ? load_bf16(bias + n) : zeros();
                vec up_bias = bias ? load_bf16(bias + I + n) : zeros();
                for (int64_t m = 0; m < rows; m++) {
                    vec g = add(load(gate + m * PANEL + half), gate_bias);
                    vec u = add(load(up + m * PANEL + half), up_bias);
                    store_bf16(y + (m0 + m) * I + n, mul(silu(g), u));
                }
            }
        }
}

/* y[M,N] = x[M,K] w^T in fp32: logits, whose differences bfloat16 would round away */
TARGET void ki_logits(const bf16 *x, const bf16 *packed, float *y, int64_t M, int64_t N, int64_t K) {
    product_result result = {.wide = y, .ld = N, .N = N};
    team_shared shared = {0};
#pragma omp parallel
    {
        team t = {omp_get_thread_num(), omp_get_num_threads(), &shared};
        product_part(&t, x, K, packed, &result, M, K);
    }
}

TARGET void ki_linear(const bf16 *x, int64_t ldx, const bf16 *packed, const bf16 *bias, bf16 *y, int64_t ldy,
                      int64_t M, int64_t N, int64_t K) {
    team_shared shared = {0};
#pragma omp parallel
    {
        team t = {omp_get_thread_num(), omp_get_num_threads(), &shared};
        linear_part(&t, x, ldx, packed, bias, NULL, y, ldy, M, N, K);
    }
}
