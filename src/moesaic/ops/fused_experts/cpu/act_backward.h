/* The derivatives of the activations: `*dg` and `*du` of what `activate` computes, given the gradient d of its result. */
#pragma once
#include "act.h"

INLINE vf silu_slope(vf x) {
    vf s = vsigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}
INLINE vf gelu_slope(vf x) {
    return 0.5f * (1.0f + verf(x * 0.70710678118654752f)) + x * vexp(-0.5f * x * x) * 0.3989422804014327f;
}
INLINE vf gelu_tanh_slope(vf x) {
    vf s = vsigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    return s + x * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * x * x);
}
INLINE vf where_positive(vf x, vf v) { return select_vf(x > 0.0f, v, select_vf(x != x, x, splat(0.0f))); }

INLINE void activate_backward(int act, vf g, vf u, vf d, float alpha, float limit, vf *dg, vf *du) {
    vf top = splat(limit), gc, uc, s;
    switch (act) {
    case SILU: *du = d * silu_slope(u); return;
    case GELU: *du = d * gelu_slope(u); return;
    case GELU_TANH: *du = d * gelu_tanh_slope(u); return;
    case RELU: *du = where_positive(u, d); return;
    case RELU2: *du = where_positive(u, 2.0f * u * d); return;
    case SWIGLU: *dg = d * u * silu_slope(g), *du = d * g * vsigmoid(g); return;
    case GEGLU: *dg = d * u * gelu_slope(g), *du = d * vgelu(g); return;
    case GEGLU_TANH: *dg = d * u * gelu_tanh_slope(g), *du = d * vgelu_tanh(g); return;
    case REGLU: *dg = where_positive(g, d * u), *du = d * vrelu(g); return;
    case REGLU2: *dg = where_positive(g, 2.0f * g * d * u), *du = d * vrelu(g) * vrelu(g); return;
    case SWIGLU_STEP:
        gc = g * vsigmoid(g), uc = vbelow(vabove(u, top), -top);
        *dg = select_vf(gc > limit, splat(0.0f), d * uc * silu_slope(g));
        *du = select_vf((u > limit) | (u < -limit), splat(0.0f), d * vabove(gc, top));
        return;
    case SWIGLU_SOFTCAPPED:
        gc = vtanh(g / alpha), uc = vtanh(u / limit), s = vsigmoid(g);
        *dg = d * (limit * uc) * s * (1.0f - gc * gc + alpha * gc * (1.0f - s));
        *du = d * (alpha * gc) * s * (1.0f - uc * uc);
        return;
    case SWIGLU_OAI:
        gc = vabove(g, top), uc = vbelow(vabove(u, top), -top), s = vsigmoid(alpha * gc);
        *dg = d * (uc + 1.0f) * s * (1.0f + alpha * gc * (1.0f - s));
        break;
    default: /* SWIGLU_CLAMPED */
        gc = vabove(g, top), uc = vbelow(vabove(u, top), -top), s = vsigmoid(gc);
        *dg = d * uc * s * (1.0f + gc * (1.0f - s));
    }
    *dg = select_vf(g > limit, splat(0.0f), *dg); /* no gradient passes a clamp */
    *du = select_vf((u > limit) | (u < -limit), splat(0.0f), d * gc * s);
}
