/* The activations of `moesaic.activations`, on vectors of fp32. `g` gate, `u` up; plain ones read `u` alone. */
#pragma once
#include "vec.h"

/* the order of `_cpu.ACTIVATIONS` */
enum act {
    SILU, GELU, GELU_TANH, RELU, RELU2,
    SWIGLU, GEGLU, GEGLU_TANH, REGLU, REGLU2, SWIGLU_OAI, SWIGLU_CLAMPED, SWIGLU_STEP, SWIGLU_SOFTCAPPED
};

INLINE int is_gated(int act) { return act >= SWIGLU; }

/* e^x: x = n·ln 2 + r, and a polynomial in r. Below the smallest normal number the result is 0. */
INLINE vf vexp(vf x) {
    vf y = select_vf(x > 88.0f, splat(88.0f), select_vf(x > -88.0f, x, splat(-88.0f)));
    vi n = __builtin_convertvector(y * 1.44269504f + select_vf(y > 0.0f, splat(0.5f), splat(-0.5f)), vi);
    vf k = __builtin_convertvector(n, vf);
    vf r = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    vf p = splat(1.393365153e-3f);
    p = p * r + 8.363180121e-3f;
    p = p * r + 4.166646490e-2f;
    p = p * r + 1.666657698e-1f;
    p = p * r + 5.000000013e-01f;
    p = p * (r * r) + r + 1.0f;
    p = p * (vf)((n + 127) << 23); /* n reaches -127 at the clamp only, whose result is thrown away */
    p = select_vf(x < -87.3f, splat(0.0f), p);
    p = select_vf(x > 88.0f, splat(INFINITY), p);
    return select_vf(x != x, x, p);
}
INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

/* erf: an odd polynomial up to 1; beyond it 1 - e^(-t·q(t)). Both fitted to the function at Chebyshev points. */
INLINE vf verf(vf x) {
    vf t = (vf)((vi)x & 0x7fffffff), s = x * x, p, q, c;
    p = splat(-9.673590170e-06f);
    p = p * s + 1.126825367e-04f;
    p = p * s + -8.484396519e-04f;
    p = p * s + 5.221053410e-03f;
    p = p * s + -2.686543831e-02f;
    p = p * s + 1.128378262e-01f;
    p = p * s + -3.761263848e-01f;
    p = (p * s + 1.128379167e+00f) * x;
    c = select_vf(t < 4.0f, t, splat(4.0f)); /* erf(4) is 1 in fp32 */
    q = splat(-2.376086556e-07f);
    q = q * c + 3.659136879e-06f;
    q = q * c + -5.208505859e-06f;
    q = q * c + -3.144046832e-04f;
    q = q * c + 3.785536658e-03f;
    q = q * c + -2.424274193e-02f;
    q = q * c + 1.069255604e-01f;
    q = q * c + 6.346751273e-01f;
    q = q * c + 1.128778244e+00f;
    q = 1.0f - vexp(-c * q);
    q = (vf)((vi)q | ((vi)x & (int32_t)0x80000000));
    p = select_vf(t < 1.0f, p, q);
    return select_vf(x != x, x, p);
}
INLINE vf vgelu(vf x) { return 0.5f * x * (1.0f + verf(x * 0.70710678118654752f)); }
INLINE vf vgelu_tanh(vf x) { return x * vsigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }
INLINE vf vrelu(vf x) { return select_vf(x > 0.0f, x, select_vf(x != x, x, splat(0.0f))); }
INLINE vf vabove(vf x, vf limit) { return select_vf(x > limit, limit, x); }
INLINE vf vbelow(vf x, vf limit) { return select_vf(x < limit, limit, x); }

/* by its series near zero, where 2·sigmoid(2x) - 1 would cancel */
INLINE vf vtanh(vf x) {
    vf t = (vf)((vi)x & 0x7fffffff), s = x * x, near;
    near = x * (1.0f - s * (1.0f / 3 - s * (2.0f / 15 - s * (17.0f / 315 - s * (62.0f / 2835)))));
    return select_vf(t < 0.3f, near, 2.0f * vsigmoid(2.0f * x) - 1.0f);
}

INLINE vf activate(int act, vf g, vf u, float alpha, float limit) {
    vf top = splat(limit), r;
    switch (act) {
    case SILU: return u * vsigmoid(u);
    case GELU: return vgelu(u);
    case GELU_TANH: return vgelu_tanh(u);
    case RELU: return vrelu(u);
    case RELU2: r = vrelu(u); return r * r;
    case SWIGLU: return g * vsigmoid(g) * u;
    case GEGLU: return vgelu(g) * u;
    case GEGLU_TANH: return vgelu_tanh(g) * u;
    case REGLU: return vrelu(g) * u;
    case SWIGLU_OAI:
        g = vabove(g, top);
        return g * vsigmoid(alpha * g) * (vbelow(vabove(u, top), -top) + 1.0f);
    case REGLU2: r = vrelu(g); return r * r * u;
    case SWIGLU_STEP: return vabove(g * vsigmoid(g), top) * vbelow(vabove(u, top), -top);
    case SWIGLU_SOFTCAPPED: return alpha * vtanh(g / alpha) * vsigmoid(g) * (limit * vtanh(u / limit));
    default: /* SWIGLU_CLAMPED */
        g = vabove(g, top);
        return g * vsigmoid(g) * vbelow(vabove(u, top), -top);
    }
}
