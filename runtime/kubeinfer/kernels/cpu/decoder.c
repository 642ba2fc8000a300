/* A stack of decoder layers (Llama and its kin) in one call: the threads stay together from the first norm to the last
 * product, where a call a kernel would wake and join them eight times a layer. */
#include "parts.h"

typedef struct {
    const bf16 *input_norm;
    const bf16 *qkv, *qkv_bias;
    const bf16 *q_norm, *k_norm;
    const bf16 *out, *out_bias;
    const bf16 *mlp_norm;
    const bf16 *gate_up, *gate_up_bias;
    const bf16 *down, *down_bias;
    bf16 *cache;
    int64_t window;
} decoder_layer;

typedef struct {
    int64_t layers, hidden, inner, heads, kv_heads, head_dim;
    int64_t rotary_dim;
    const float *cos_sin;
    float eps, scale;
} decoder_shape;

typedef struct {
    int64_t tokens, seqs, blocks, block_size;
    const int32_t *positions, *slots, *query_start, *seq_lens, *table;
    int64_t ld_table;
    const int32_t *wanted; /* tokens whose final state is asked for; NULL: all */
    int64_t num_wanted;
} decoder_step;

/* Scratch of a call: normed rows or attention's result, then projections, then what the MLP keeps between its products. */
int64_t ki_decoder_scratch(const decoder_shape *s, int64_t tokens) {
    int64_t q = s->heads * s->head_dim, width = s->hidden > q ? s->hidden : q;
    int64_t projected = q + 2 * s->kv_heads * s->head_dim;
    return tokens * (2 * width + (projected > s->inner ? projected : s->inner));
}

static TARGET void gather_rows(const team *t, const bf16 *x, int64_t width, const int32_t *rows, int64_t count, bf16 *y) {
    int64_t i, end;
    for (team_rows(t, count, &i, &end); i < end; i++) memcpy(y + i * width, x + rows[i] * width, (size_t)width * sizeof(bf16));
}

static TARGET int decoder_thread(const team *t, const decoder_shape *s, const decoder_layer *layers, const decoder_step *step,
                                 const int32_t *tasks, int64_t num_tasks, bf16 *hidden, bf16 *result, bf16 *scratch) {
    int64_t T = step->tokens, H = s->hidden, D = s->head_dim, q = s->heads * D, width = H > q ? H : q;
    int64_t projected_width = q + 2 * s->kv_heads * D;
    bf16 *normed = scratch, *attended = scratch + T * width, *projected = scratch + 2 * T * width, *inner = projected;
    void *space = NULL;
    int failed = 0;
    for (int64_t l = 0; l < s->layers; l++) {
        const decoder_layer *w = layers + l;
        rms_norm_part(t, hidden, H, NULL, w->input_norm, normed, T, H, s->eps);
        team_wait(t);
        linear_part(t, normed, H, w->qkv, w->qkv_bias, NULL, projected, projected_width, T, projected_width, H);
        team_wait(t);
        rope_args rope = {projected, projected + q, projected + q + s->kv_heads * D, projected_width, step->positions,
                          s->cos_sin, s->rotary_dim, step->slots, w->cache, step->blocks, step->block_size, w->q_norm,
                          w->k_norm, s->eps, T, s->heads, s->kv_heads, D};
        rope_and_cache_part(t, &rope);
        team_wait(t);
        attention_args attention = {projected, projected_width, w->cache, step->blocks, step->block_size, step->query_start,
                                    step->seq_lens, step->table, step->ld_table, attended, step->seqs, s->heads,
                                    s->kv_heads, D, s->scale, w->window};
        failed |= attention_part(t, &attention, tasks, num_tasks, &space);
        team_wait(t);
        if (l == s->layers - 1 && step->wanted) {
            /* nothing reads the other tokens' states after the last layer's keys and values are in the cache */
            gather_rows(t, attended, q, step->wanted, step->num_wanted, normed);
            gather_rows(t, hidden, H, step->wanted, step->num_wanted, result);
            team_wait(t);
            bf16 *other = attended;
            attended = normed;
            normed = other;
            hidden = result;
            T = step->num_wanted;
        }
        linear_part(t, attended, q, w->out, w->out_bias, hidden, hidden, H, T, H, q);
        team_wait(t);
        rms_norm_part(t, hidden, H, NULL, w->mlp_norm, normed, T, H, s->eps);
        team_wait(t);
        gated_linear_part(t, normed, H, w->gate_up, w->gate_up_bias, inner, T, s->inner, H);
        team_wait(t);
        linear_part(t, inner, s->inner, w->down, w->down_bias, hidden, hidden, H, T, H, s->inner);
        team_wait(t);
    }
    free(space);
    return failed;
}

/* hidden [tokens, H] goes through all layers in place. With `wanted` only those tokens' states are finished, into
 * result [num_wanted, H], and hidden is left unfinished. Returns 0, or -1 if memory ran out. */
TARGET int ki_decoder(const decoder_shape *s, const decoder_layer *layers, const decoder_step *step, bf16 *hidden, bf16 *result,
                      bf16 *scratch) {
    attention_args batch = {.query_start = step->query_start, .B = step->seqs, .Hq = s->heads, .Hk = s->kv_heads};
    int64_t count;
    int32_t *tasks = attention_tasks(&batch, &count);
    if (!tasks) return -1;
    int failed = 0;
    team_shared shared = {0};
#pragma omp parallel reduction(| : failed)
    {
        team t = {omp_get_thread_num(), omp_get_num_threads(), &shared};
        failed = decoder_thread(&t, s, layers, step, tasks, count, hidden, result, scratch);
    }
    free(tasks);
    return failed ? -1 : 0;
}
