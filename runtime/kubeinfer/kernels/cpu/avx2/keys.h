/* Queries with keys and values as they lie in the cache. */

/* Sixteen elements in eight pairs; beyond the first n they are zero. */
INLINE __m256i load_pairs(const bf16 *p, int64_t n) {
    if (n >= 16) return _mm256_loadu_si256((const __m256i *)p);
    bf16 whole[16] = {0};
    for (int64_t i = 0; i < n; i++) whole[i] = p[i];
    return _mm256_loadu_si256((const __m256i *)whole);
}

/* The products of a query with eight keys; their sums are formed by a tree of pairs. */
INLINE __m256 dot8(const bf16 *query, const bf16 *const *keys, int64_t D) {
    __m256 acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) acc[i] = _mm256_setzero_ps();
    for (int64_t d = 0; d < D; d += 16) {
        __m256i q = load_pairs(query + d, D - d);
        __m256 q0 = first_of_pairs(q), q1 = second_of_pairs(q);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m256i k = load_pairs(keys[i] + d, D - d);
            acc[i] = _mm256_fmadd_ps(q0, first_of_pairs(k), acc[i]);
            acc[i] = _mm256_fmadd_ps(q1, second_of_pairs(k), acc[i]);
        }
    }
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(acc[0], acc[1]), _mm256_hadd_ps(acc[2], acc[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(acc[4], acc[5]), _mm256_hadd_ps(acc[6], acc[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
INLINE vec dot16(const bf16 *query, const bf16 *const *keys, int64_t D) {
    return (vec){dot8(query, keys, D), dot8(query, keys + 8, D)};
}

/* o[HEADS][D] += s[HEADS][n] values[n][D]: rows of s DECODE_KEYS apart, of o MAX_DIM */
#define DEFINE_WEIGH(HEADS)                                                                                          \
    static TARGET void weigh_##HEADS(const float *s, const bf16 *const *keys, int64_t v_offset, int64_t n, int64_t D, \
                                     float *o) {                                                                     \
        for (int64_t d = 0; d < D; d += 16) {                                                                        \
            lanes m = FIRST_LANES(D - d);                                                                            \
            vec acc[HEADS];                                                                                          \
            _Pragma("GCC unroll 4") for (int i = 0; i < HEADS; i++) acc[i] = load_tail(o + i * MAX_DIM + d, m);      \
            for (int64_t j = 0; j < n; j++) {                                                                        \
                vec v = load_bf16_tail(keys[j] + v_offset + d, m);                                                   \
                _Pragma("GCC unroll 4") for (int i = 0; i < HEADS; i++)                                              \
                    acc[i] = fmadd(splat(s[i * DECODE_KEYS + j]), v, acc[i]);                                        \
            }                                                                                                        \
            _Pragma("GCC unroll 4") for (int i = 0; i < HEADS; i++) store_tail(o + i * MAX_DIM + d, acc[i], m);      \
        }                                                                                                            \
    }

/* 32 elements of a row (the first ones, as many as m has bits), and two rows side by side, element by element: how a panel of
 * values is packed. */
typedef struct { __m256i low, high; } row32;
INLINE row32 load_row(const bf16 *p, uint32_t m) {
    int64_t n = __builtin_popcount(m);
    return (row32){load_pairs(p, n), load_pairs(p + 16, n - 16)};
}
#define LOAD_ROW load_row
#define ZIP_ORDER
INLINE void zip16(__m256i a, __m256i b, bf16 *to) {
    __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b); /* within each half of the register */
    _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i *)(to + 16), _mm256_permute2x128_si256(low, high, 0x31));
}
#define ZIP_ROWS(A, B, TO)                        \
    do {                                          \
        bf16 *to_ = (TO);                         \
        zip16((A).low, (B).low, to_);             \
        zip16((A).high, (B).high, to_ + 32);      \
    } while (0)
