/* Rows times packed panels: weights become fp32 in registers, inputs in a buffer that both halves of a panel read. */
enum { TILE = 6, RUN = 512 }; /* rows of a register tile; inputs of a row that are kept as fp32 */
enum { AHEAD = 2048 };        /* how far before its use a weight is fetched: half panels leave every second cache line to be guessed */

static TARGET void widen_row(const bf16 *x, int64_t n, float *y) {
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) _mm256_storeu_ps(y + k, widen8(x + k));
    for (; k < n; k++) y[k] = bf16_to_float(x[k]);
}

/* sum += a * w. Left to itself, GCC takes new registers for the sums of a loop and then has too few: it spills. */
INLINE void accumulate(__m256 *sum, __m256 a, __m256 w) { __asm__("vfmadd231ps %2, %1, %0" : "+x"(*sum) : "x"(a), "x"(w)); }

/* c[MR][16] (+)= x[MR, 2 n] and half a panel. Every MR sums over k in the same order, the first of a pair before the second, and
 * sums kept in c between runs are not rounded, so a row's result does not depend on its batch. */
#define DEFINE_TILE(MR)                                                                                              \
    static TARGET void tile_##MR(const float *x, const bf16 *w, int64_t n, float *c, int64_t ldc, int first) {       \
        __m256 acc[MR][2];                                                                                           \
        _Pragma("GCC unroll 6") for (int i = 0; i < MR; i++) {                                                       \
            acc[i][0] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c + i * ldc);                                  \
            acc[i][1] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c + i * ldc + 8);                              \
        }                                                                                                            \
        for (int64_t k = 0; k < n; k++) {                                                                            \
            _mm_prefetch((const char *)(w + k * 64 + AHEAD), _MM_HINT_T0);                                           \
            _mm_prefetch((const char *)(w + k * 64 + AHEAD + 32), _MM_HINT_T0);                                      \
            __m256i p0 = _mm256_loadu_si256((const __m256i *)(w + k * 64));                                          \
            __m256i p1 = _mm256_loadu_si256((const __m256i *)(w + k * 64 + 16));                                     \
            __m256 w0 = first_of_pairs(p0), w1 = first_of_pairs(p1);                                                 \
            _Pragma("GCC unroll 6") for (int i = 0; i < MR; i++) {                                                   \
                __m256 a = _mm256_broadcast_ss(x + i * RUN + 2 * k);                                                 \
                accumulate(&acc[i][0], a, w0);                                                                       \
                accumulate(&acc[i][1], a, w1);                                                                       \
            }                                                                                                        \
            w0 = second_of_pairs(p0), w1 = second_of_pairs(p1);                                                      \
            _Pragma("GCC unroll 6") for (int i = 0; i < MR; i++) {                                                   \
                __m256 a = _mm256_broadcast_ss(x + i * RUN + 2 * k + 1);                                             \
                accumulate(&acc[i][0], a, w0);                                                                       \
                accumulate(&acc[i][1], a, w1);                                                                       \
            }                                                                                                        \
        }                                                                                                            \
        _Pragma("GCC unroll 6") for (int i = 0; i < MR; i++) {                                                       \
            _mm256_storeu_ps(c + i * ldc, acc[i][0]);                                                                \
            _mm256_storeu_ps(c + i * ldc + 8, acc[i][1]);                                                            \
        }                                                                                                            \
    }
DEFINE_TILE(1) DEFINE_TILE(2) DEFINE_TILE(3) DEFINE_TILE(4) DEFINE_TILE(5) DEFINE_TILE(6)
typedef void (*tile_fn)(const float *, const bf16 *, int64_t, float *, int64_t, int);
static const tile_fn TILES[TILE + 1] = {0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};

TARGET void panel_product(const bf16 *x, int64_t ldx, int64_t M, const bf16 *w, int64_t K2, float *c, int64_t ldc) {
    _Alignas(32) float wide[TILE * RUN];
    for (int64_t k = 0; k < K2; k += RUN / 2) { /* a run of the panel stays in the first cache for all rows */
        int64_t n = K2 - k < RUN / 2 ? K2 - k : RUN / 2;
        for (int64_t m = 0; m < M;) {
            int64_t rows = tile_rows(M - m, TILE);
            for (int64_t i = 0; i < rows; i++) widen_row(x + (m + i) * ldx + 2 * k, 2 * n, wide + i * RUN);
            for (int half = 0; half < 2; half++) TILES[rows](wide, w + k * 64 + half * 32, n, c + m * ldc + half * 16, ldc, k == 0);
            m += rows;
        }
    }
}

/* One row, two panels at a time: eight independent sums hide the latency of a single row. */
static TARGET void row_panels(const bf16 *x, const bf16 *w, int64_t K2, int64_t panels, float *c) {
    int64_t p = 0, size = K2 * 64;
    for (; p + 2 <= panels; p += 2, w += 2 * size, c += 2 * PANEL) {
        __m256 acc[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) acc[i] = _mm256_setzero_ps();
        for (int64_t k = 0; k < K2; k++) {
            __m256 a = _mm256_set1_ps(bf16_to_float(x[2 * k])), b = _mm256_set1_ps(bf16_to_float(x[2 * k + 1]));
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const bf16 *at = w + i / 4 * size + k * 64 + i % 4 * 16;
                if (i % 2 == 0) _mm_prefetch((const char *)(at + 1024), _MM_HINT_T0);
                __m256i pairs = _mm256_loadu_si256((const __m256i *)at);
                acc[i] = _mm256_fmadd_ps(a, first_of_pairs(pairs), acc[i]);
                acc[i] = _mm256_fmadd_ps(b, second_of_pairs(pairs), acc[i]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) _mm256_storeu_ps(c + 8 * i, acc[i]);
    }
    if (p < panels) panel_product(x, 0, 1, w, K2, c, PANEL);
}
