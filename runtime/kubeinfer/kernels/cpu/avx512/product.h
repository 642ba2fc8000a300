/* Rows times packed panels: one instruction multiplies and adds two inputs of sixteen outputs. */
enum { TILE = 12 }; /* rows of a register tile */

INLINE __m512bh broadcast_pair(const bf16 *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
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

TARGET void panel_product(const bf16 *x, int64_t ldx, int64_t M, const bf16 *w, int64_t K2, float *c, int64_t ldc) {
    for (int64_t m = 0; m < M;) {
        int64_t rows = tile_rows(M - m, TILE);
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
