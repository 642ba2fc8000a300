/* Sixteen lanes of fp32 in two registers. Needs AVX2 and FMA. */
#define TARGET __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef struct { __m256 low, high; } vec;
typedef uint16_t lanes; /* a bit a lane */

#define BOTH(F, ...) ((vec){F(low, __VA_ARGS__), F(high, __VA_ARGS__)})
#define UNARY(HALF, OP, A) OP((A).HALF)
#define BINARY(HALF, OP, A, B) OP((A).HALF, (B).HALF)
#define TERNARY(HALF, OP, A, B, C) OP((A).HALF, (B).HALF, (C).HALF)

INLINE vec splat(float x) { return (vec){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vec zeros(void) { return splat(0.0f); }
INLINE vec add(vec a, vec b) { return BOTH(BINARY, _mm256_add_ps, a, b); }
INLINE vec sub(vec a, vec b) { return BOTH(BINARY, _mm256_sub_ps, a, b); }
INLINE vec mul(vec a, vec b) { return BOTH(BINARY, _mm256_mul_ps, a, b); }
INLINE vec quotient(vec a, vec b) { return BOTH(BINARY, _mm256_div_ps, a, b); }
INLINE vec max(vec a, vec b) { return BOTH(BINARY, _mm256_max_ps, a, b); }
INLINE vec min(vec a, vec b) { return BOTH(BINARY, _mm256_min_ps, a, b); }
INLINE vec fmadd(vec a, vec b, vec c) { return BOTH(TERNARY, _mm256_fmadd_ps, a, b, c); }
INLINE vec fmsub(vec a, vec b, vec c) { return BOTH(TERNARY, _mm256_fmsub_ps, a, b, c); }

INLINE __m256 nearest8(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec nearest(vec x) { return BOTH(UNARY, nearest8, x); }
/* n up to 127; from below it stops at -125: what would be smaller is as good as nothing, and denormal numbers can be slow. */
INLINE __m256 times_power_of_2_8(__m256 x, __m256 n) {
    __m256i whole = _mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-125.0f)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23)));
}
INLINE vec times_power_of_2(vec x, vec n) { return BOTH(BINARY, times_power_of_2_8, x, n); }

INLINE float sum_of(vec x) {
    __m256 a = _mm256_add_ps(x.low, x.high);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
INLINE float max_of(vec x) {
    __m256 a = _mm256_max_ps(x.low, x.high);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

/* All ones in the lanes of eight whose bits are set. */
INLINE __m256i spread8(uint32_t m) {
    __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)m), bits), bits);
}
/* Lanes outside m are zero, or a's. */
INLINE vec keep(lanes m, vec v) {
    return (vec){_mm256_and_ps(v.low, _mm256_castsi256_ps(spread8(m))), _mm256_and_ps(v.high, _mm256_castsi256_ps(spread8(m >> 8)))};
}
INLINE vec where(vec a, lanes m, vec b) {
    return (vec){_mm256_blendv_ps(a.low, b.low, _mm256_castsi256_ps(spread8(m))),
                 _mm256_blendv_ps(a.high, b.high, _mm256_castsi256_ps(spread8(m >> 8)))};
}
INLINE vec mul_where(vec a, lanes m, vec b, vec c) { return where(a, m, mul(b, c)); }
INLINE vec max_where(vec a, lanes m, vec b, vec c) { return where(a, m, max(b, c)); }
INLINE lanes equal(lanes m, vec a, vec b) {
    return (lanes)(m & (_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ)) |
                        _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ)) << 8));
}

INLINE vec load(const float *p) { return (vec){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float *p, vec v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}
INLINE vec load_tail(const float *p, lanes m) {
    if (m == 0xffff) return load(p);
    return (vec){_mm256_maskload_ps(p, spread8(m)), _mm256_maskload_ps(p + 8, spread8(m >> 8))};
}
INLINE void store_tail(float *p, vec v, lanes m) {
    if (m == 0xffff) {
        store(p, v);
        return;
    }
    _mm256_maskstore_ps(p, spread8(m), v.low);
    _mm256_maskstore_ps(p + 8, spread8(m >> 8), v.high);
}

INLINE __m256 widen8(const bf16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE vec load_bf16(const bf16 *p) { return (vec){widen8(p), widen8(p + 8)}; }
/* There are no masked loads of 16-bit elements. The lanes of a tail are the first ones, so that their number is enough. */
INLINE vec load_bf16_tail(const bf16 *p, lanes m) {
    if (m == 0xffff) return load_bf16(p);
    bf16 whole[16] = {0};
    for (int i = 0; m >> i; i++) whole[i] = p[i];
    return load_bf16(whole);
}
/* To nearest, ties to even; a number that is none stays none. */
INLINE __m256i round8(__m256 v) {
    __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
INLINE void store_bf16(bf16 *p, vec v) {
    __m256i packed = _mm256_packus_epi32(round8(v.low), round8(v.high)); /* within each half of the register */
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE void store_bf16_tail(bf16 *p, vec v, lanes m) {
    if (m == 0xffff) {
        store_bf16(p, v);
        return;
    }
    bf16 whole[16];
    store_bf16(whole, v);
    for (int i = 0; m >> i; i++) p[i] = whole[i];
}

/* Eight pairs of elements as fp32, exactly: the first ones and the second ones. */
INLINE __m256 first_of_pairs(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE __m256 second_of_pairs(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
}
