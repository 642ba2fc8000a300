/* What is done row by row: norms, activation, rotary embedding with the write to the cache, greedy sampling. */
#include "parts.h"

TARGET void rms_norm_part(const team *team, const bf16 *x, int64_t ldx, bf16 *r, const bf16 *w, bf16 *y, int64_t T, int64_t H,
                          float eps) {
    int64_t t, end;
    for (team_rows(team, T, &t, &end); t < end; t++) {
        const bf16 *row = x + t * ldx;
        bf16 *res = r ? r + t * H : NULL, *out = y + t * H;
        vec sum = zeros();
        for (int64_t h = 0; h < H; h += 16) {
            lanes m = FIRST_LANES(H - h);
            vec v = load_bf16_tail(row + h, m);
            if (res) {
                v = add(v, load_bf16_tail(res + h, m));
                store_bf16_tail(res + h, v, m);
                v = load_bf16_tail(res + h, m);
            }
            sum = fmadd(v, v, sum);
        }
        vec scale = splat(1.0f / sqrtf(sum_of(sum) / (float)H + eps));
        const bf16 *src = res ? res : row;
        for (int64_t h = 0; h < H; h += 16) {
            lanes m = FIRST_LANES(H - h);
            vec v = mul(load_bf16_tail(src + h, m), scale);
            store_bf16_tail(out + h, mul(v, load_bf16_tail(w + h, m)), m);
        }
    }
}

TARGET void silu_and_mul_part(const team *team, const bf16 *x, bf16 *y, int64_t T, int64_t I) {
    int64_t t, end;
    for (team_rows(team, T, &t, &end); t < end; t++) {
        const bf16 *gate = x + t * 2 * I, *up = gate + I;
        for (int64_t i = 0; i < I; i += 16) {
            lanes m = FIRST_LANES(I - i);
            store_bf16_tail(y + t * I + i, mul(silu(load_bf16_tail(gate + i, m)), load_bf16_tail(up + i, m)), m);
        }
    }
}

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
        lanes m = FIRST_LANES(half - d);
        vec a = load_bf16_tail(x + d, m), b = load_bf16_tail(x + half + d, m);
        vec c = load_tail(cosine + d, m), s = load_tail(sine + d, m);
        store_bf16_tail(y + d, fmsub(a, c, mul(b, s)), m);
        store_bf16_tail(y + half + d, fmadd(b, c, mul(a, s)), m);
    }
    if (y != x && R < D) memcpy(y + R, x + R, (size_t)(D - R) * sizeof(bf16));
}

TARGET void rope_and_cache_part(const team *team, const rope_args *a) {
    int64_t page = a->Hk * a->block_size * a->D, t, end, D = a->D, R = a->R;
    for (team_rows(team, a->T, &t, &end); t < end; t++) {
        const float *cs = a->cos_sin ? a->cos_sin + (int64_t)a->positions[t] * R : NULL;
        for (int64_t h = 0; h < a->Hq; h++) {
            bf16 *head = a->q + t * a->ld + h * D;
            if (a->q_norm) norm_head(head, a->q_norm, D, a->eps);
            if (cs) rotate_head(head, head, cs, R, D);
        }
        if (a->slots[t] < 0) continue;
        int64_t block = a->slots[t] / a->block_size, offset = a->slots[t] % a->block_size;
        for (int64_t h = 0; h < a->Hk; h++) {
            bf16 *head = a->k + t * a->ld + h * D;
            bf16 *to = a->cache + block * page + (h * a->block_size + offset) * D;
            if (a->k_norm) norm_head(head, a->k_norm, D, a->eps);
            if (cs) rotate_head(head, to, cs, R, D);
            else memcpy(to, head, (size_t)D * sizeof(bf16));
            memcpy(to + a->blocks * page, a->v + t * a->ld + h * D, (size_t)D * sizeof(bf16));
        }
    }
}

/* The first of the largest entries of each row. */
TARGET void ki_argmax(const float *x, int64_t ld, int64_t B, int64_t V, int64_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < B; b++) {
        const float *row = x + b * ld;
        vec top = splat(-INFINITY);
        for (int64_t v = 0; v < V; v += 16) {
            lanes m = FIRST_LANES(V - v);
            top = max_where(top, m, top, load_tail(row + v, m));
        }
        float best = max_of(top);
        out[b] = 0;
        for (int64_t v = 0; v < V; v += 16) {
            lanes m = FIRST_LANES(V - v);
            lanes hit = equal(m, load_tail(row + v, m), splat(best));
            if (hit) { out[b] = v + __builtin_ctz(hit); break; }
        }
    }
}

/* A kernel of one part; a second thread is worth waking from a few rows on. */
#define ALONE(WORTH, PART)                                                    \
    team_shared shared = {0};                                                 \
    int worth = (WORTH);                                                      \
    _Pragma("omp parallel if (worth)")                                        \
    {                                                                         \
        team self = {omp_get_thread_num(), omp_get_num_threads(), &shared};   \
        PART;                                                                 \
    }

TARGET void ki_rms_norm(const bf16 *x, int64_t ldx, bf16 *r, const bf16 *w, bf16 *y, int64_t T, int64_t H, float eps) {
    ALONE(T >= 16, rms_norm_part(&self, x, ldx, r, w, y, T, H, eps))
}

TARGET void ki_silu_and_mul(const bf16 *x, bf16 *y, int64_t T, int64_t I) {
    ALONE(T * I >= 8192, silu_and_mul_part(&self, x, y, T, I))
}

TARGET void ki_rope_and_cache(bf16 *q, bf16 *k, const bf16 *v, int64_t ld, const int32_t *positions, const float *cos_sin,
                              int64_t R, const int32_t *slots, bf16 *cache, int64_t blocks, int64_t block_size,
                              const bf16 *q_norm, const bf16 *k_norm, float eps, int64_t T, int64_t Hq, int64_t Hk,
                              int64_t D) {
    rope_args a = {q, k, v, ld, positions, cos_sin, R, slots, cache, blocks, block_size, q_norm, k_norm, eps, T, Hq, Hk, D};
    ALONE(T >= 16, rope_and_cache_part(&self, &a))
}
