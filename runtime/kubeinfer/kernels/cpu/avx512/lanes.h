/* Sixteen lanes of fp32 in one register. Needs AVX-512 with BF16. */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef __m512 vec;
typedef __mmask16 lanes; /* a bit a lane */

INLINE vec zeros(void) { return _mm512_setzero_ps(); }
INLINE vec splat(float x) { return _mm512_set1_ps(x); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec quotient(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec fmadd(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec fmsub(vec a, vec b, vec c) { return _mm512_fmsub_ps(a, b, c); }
INLINE vec nearest(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec times_power_of_2(vec x, vec n) { return _mm512_scalef_ps(x, n); }
INLINE float sum_of(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float max_of(vec x) { return _mm512_reduce_max_ps(x); }

INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE vec load_tail(const float *p, lanes m) { return _mm512_maskz_loadu_ps(m, p); }
INLINE void store_tail(float *p, vec v, lanes m) { _mm512_mask_storeu_ps(p, m, v); }
INLINE vec load_bf16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE vec load_bf16_tail(const bf16 *p, lanes m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
INLINE void store_bf16(bf16 *p, vec v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }
INLINE void store_bf16_tail(bf16 *p, vec v, lanes m) { _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v)); }

/* Lanes outside m are zero, or a's. */
INLINE vec keep(lanes m, vec v) { return _mm512_maskz_mov_ps(m, v); }
INLINE vec mul_where(vec a, lanes m, vec b, vec c) { return _mm512_mask_mul_ps(a, m, b, c); }
INLINE vec max_where(vec a, lanes m, vec b, vec c) { return _mm512_mask_max_ps(a, m, b, c); }
INLINE lanes equal(lanes m, vec a, vec b) { return _mm512_mask_cmp_ps_mask(m, a, b, _CMP_EQ_OQ); }
