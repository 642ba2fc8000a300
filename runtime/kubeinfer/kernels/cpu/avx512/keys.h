/* Queries with keys and values as they lie in the cache. */

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

/* 32 elements of a row, and two rows side by side, element by element: how a panel of values is packed. What ZIP_ORDER
 * defines stands outside of the caller's loops. Macros, since functions would make GCC spill more in the loops around them. */
typedef __m512i row32;
#define LOAD_ROW(P, M) _mm512_maskz_loadu_epi16(M, P)
#define ZIP_ORDER                                                                                        \
    uint16_t order[64];                                                                                  \
    for (int i = 0; i < 64; i++) order[i] = (uint16_t)(i / 2 + 32 * (i % 2));                            \
    row32 first_half = _mm512_loadu_si512(order), second_half = _mm512_loadu_si512(order + 32);
#define ZIP_ROWS(A, B, TO)                                                                               \
    do {                                                                                                 \
        bf16 *to_ = (TO);                                                                                \
        _mm512_storeu_si512(to_, _mm512_permutex2var_epi16(A, first_half, B));                           \
        _mm512_storeu_si512(to_ + 32, _mm512_permutex2var_epi16(A, second_half, B));                     \
    } while (0)
