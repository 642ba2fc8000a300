/* Vectors of bfloat16 and fp32, in two variants of the same operations: the folders avx512/ and avx2/ hold files of the same
 * names, and the include path chooses between them (setup.py). library.py asks the processor which variant it can run. */
#ifndef KUBEINFER_VECTOR_H
#define KUBEINFER_VECTOR_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

enum { PANEL = 32 }; /* outputs of a packed panel of a weight */

#include "lanes.h" /* TARGET, INLINE, and vec: sixteen lanes of fp32 */

/* The first n lanes of sixteen, or all. */
#define FIRST_LANES(n) ((n) >= 16 ? 0xffff : (lanes)((1u << (n)) - 1))

INLINE float bf16_to_float(bf16 x) {
    union { uint32_t u; float f; } c = {(uint32_t)x << 16};
    return c.f;
}
INLINE bf16 float_to_bf16(float x) {
    union { float f; uint32_t u; } c = {x};
    if (x != x) return 0x7fc0;
    return (bf16)((c.u + 0x7fff + ((c.u >> 16) & 1)) >> 16);
}
/* exp to about 2 ulp of bf16's needs: 2^n times a degree-5 polynomial on [-0.5, 0.5] */
INLINE vec vexp(vec x) {
    vec t = mul(max(x, splat(-100.0f)), splat(1.44269504f));
    vec n = nearest(t);
    vec f = sub(t, n);
    vec p = splat(1.33335581e-3f);
    p = fmadd(p, f, splat(9.61812911e-3f));
    p = fmadd(p, f, splat(5.55041087e-2f));
    p = fmadd(p, f, splat(2.40226507e-1f));
    p = fmadd(p, f, splat(6.93147181e-1f));
    p = fmadd(p, f, splat(1.0f));
    return times_power_of_2(p, n);
}
INLINE vec silu(vec x) {
    vec e = vexp(min(sub(zeros(), x), splat(80.0f)));
    return quotient(x, add(splat(1.0f), e));
}

#endif
