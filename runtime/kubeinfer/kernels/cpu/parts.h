/* The parts that kernels are made of: each is called by every thread of a team and does that thread's share of the work.
 *
 * OpenMP symbols are left open on purpose: they bind to the OpenMP that torch has loaded, so there is one thread pool.
 * No part waits for the team at its end; `team_wait` stands between parts that read one another's results.
 */
#ifndef KUBEINFER_PARTS_H
#define KUBEINFER_PARTS_H

#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vector.h"

/* What the threads of a team share. One barrier and one counter of claimed tasks serve all parts, one after the other. */
typedef struct {
    _Alignas(64) int64_t claimed; /* tasks of the present part that some thread took */
    _Alignas(64) int arrived;
    _Alignas(64) int phase;
    int sleepers;
} team_shared;

typedef struct {
    int index, count; /* this thread, of how many */
    team_shared *shared;
} team;

/* Take the next `grain` tasks; their first index. Beyond the number of tasks: none are left. */
static inline int64_t team_claim(const team *t, int64_t grain) {
    return __atomic_fetch_add(&t->shared->claimed, grain, __ATOMIC_RELAXED);
}

enum { SPINS = 1024 }; /* some tens of microseconds: parts end together, unless the system took a thread's processor away */

/* Wait until every thread is here. Spinning beats sleeping for parts this short; a long wait means that the awaited thread has
 * no processor, and then to go on spinning would keep it from getting this one. */
static inline void team_wait(const team *t) {
    team_shared *s = t->shared;
    if (t->count == 1) {
        s->claimed = 0;
        return;
    }
    int phase = __atomic_load_n(&s->phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&s->arrived, 1, __ATOMIC_ACQ_REL) == t->count) {
        s->arrived = 0;
        s->claimed = 0;
        __atomic_store_n(&s->phase, phase + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&s->sleepers, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, &s->phase, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (__atomic_load_n(&s->phase, __ATOMIC_ACQUIRE) != phase) return;
        _mm_pause();
    }
    __atomic_add_fetch(&s->sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&s->phase, __ATOMIC_ACQUIRE) == phase)
        syscall(SYS_futex, &s->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0);
    __atomic_sub_fetch(&s->sleepers, 1, __ATOMIC_SEQ_CST);
}

/* This thread's rows of T, one run. */
static inline void team_rows(const team *t, int64_t T, int64_t *first, int64_t *end) {
    *first = T * t->index / t->count;
    *end = T * (t->index + 1) / t->count;
}

/* c[M][32] (rows ldc apart) = x[M,K] panel, fp32; K2 = K / 2 */
void panel_product(const bf16 *x, int64_t ldx, int64_t M, const bf16 *panel, int64_t K2, float *c, int64_t ldc);

/* y[M,N] = x[M,K] w^T + bias (+ add[M,N], rows ldy apart like y; may be y). bias and add may be NULL. */
void linear_part(const team *t, const bf16 *x, int64_t ldx, const bf16 *packed, const bf16 *bias, const bf16 *add, bf16 *y,
                 int64_t ldy, int64_t M, int64_t N, int64_t K);

/* y[M,I] = silu(gate) * up, where the packed weight holds I gates and then I ups; I a multiple of 32. */
void gated_linear_part(const team *t, const bf16 *x, int64_t ldx, const bf16 *packed, const bf16 *bias, bf16 *y, int64_t M,
                       int64_t I, int64_t K);

/* y = norm(x + r) * w and r = x + r; without r y = norm(x) * w. Rows of y and r are H apart. */
void rms_norm_part(const team *t, const bf16 *x, int64_t ldx, bf16 *r, const bf16 *w, bf16 *y, int64_t T, int64_t H, float eps);

/* y[T,I] = silu(x[:, :I]) * x[:, I:] */
void silu_and_mul_part(const team *t, const bf16 *x, bf16 *y, int64_t T, int64_t I);

/* Queries, keys and values of a step, rows ld apart, and where they go. cache is [2][blocks][Hk][block_size][D]. */
typedef struct {
    bf16 *q, *k;
    const bf16 *v;
    int64_t ld;
    const int32_t *positions;
    const float *cos_sin; /* [positions][R], cosines first; NULL: no rotation */
    int64_t R;
    const int32_t *slots;
    bf16 *cache;
    int64_t blocks, block_size;
    const bf16 *q_norm, *k_norm; /* [D] or NULL */
    float eps;
    int64_t T, Hq, Hk, D;
} rope_args;

void rope_and_cache_part(const team *t, const rope_args *a);

typedef struct {
    const bf16 *q; int64_t ldq;
    const bf16 *cache; int64_t blocks, block_size;
    const int32_t *query_start, *seq_lens, *table; int64_t ld_table;
    bf16 *out;
    int64_t B, Hq, Hk, D;
    float scale;
    int64_t window;
} attention_args;

/* The work of a batch, cut into pieces of about equal size: (sequence, first token) pairs. NULL: no memory. */
int32_t *attention_tasks(const attention_args *a, int64_t *count);

/* Returns 0, or -1 if memory ran out. *space is this thread's scratch, made at first need; the caller frees it. */
int attention_part(const team *t, const attention_args *a, const int32_t *tasks, int64_t count, void **space);

#endif
