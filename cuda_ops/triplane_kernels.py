# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of :mod:`cuda_ops.triplane_render`, forward; everything is said there.

Tiles of one ray: TS coarse and TI fine samples (powers of two, padded), C plane channels, F features.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from cuda_ops import dispatch

FAR_AWAY = tl.constexpr(1e30)  # depth of padding: behind everything
SHIFT = tl.constexpr(1.0)  # of raw density before the softplus
FLOOR = tl.constexpr(0.01)  # added to the blurred weights
PDF_EPS = tl.constexpr(1e-5)
KEEP_EPS = tl.constexpr(1e-10)
MARGIN = tl.constexpr(0.001)  # of the sigmoids: from -0.001 to 1.001
INTERPRETED = tl.constexpr(dispatch.interpreted())


@triton.jit
def log(x):
    """Of numbers in [1, 2], to 2e-7: the exact function takes twenty instructions."""
    if INTERPRETED:
        return tl.log(x)
    else:
        return libdevice.fast_logf(x)


@triton.jit
def exp(x):
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log(1.0 + exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


@triton.jit
def _axis(x, y, z, A: tl.constexpr):
    if A == 0:
        return x
    elif A == 1:
        return y
    else:
        return z


@triton.jit
def _at(values, index, N: tl.constexpr):
    """values[index], the index held within 0 .. N - 1."""
    return tl.gather(values, tl.minimum(tl.maximum(index, 0), N - 1), 0)


@triton.jit
def _before(products, index, N: tl.constexpr):
    """Product of the first ``index`` numbers, from their inclusive products."""
    return tl.where(index > 0, _at(products, index - 1, N), 1.0)


@triton.jit
def _count(values, x, OR_EQUAL: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr):
    """How many of N ascending values are smaller than each x (or equal to it): bisection."""
    found = tl.zeros_like(x).to(tl.int32)
    for k in tl.static_range(LOG_N):
        probe = tl.gather(values, found + ((N >> (k + 1)) - 1), 0)
        found += tl.where((probe <= x) if OR_EQUAL else (probe < x), N >> (k + 1), 0)
    probe = tl.gather(values, found, 0)
    return found + ((probe <= x) if OR_EQUAL else (probe < x)).to(tl.int32)


@triton.jit
def corner(fx, fy):
    """The pixel below a place in pixels, and how far it is beyond it."""
    x0, y0 = tl.floor(fx), tl.floor(fy)
    return x0.to(tl.int32), y0.to(tl.int32), fx - x0, fy - y0


@triton.jit
def place(p, size):
    """Coordinates in [-1, 1] -> pixels. Far outside everything is zero: the integers are kept small."""
    return (tl.minimum(tl.maximum(p, -2.0), 2.0) + 1.0) * size * 0.5 - 0.5


@triton.jit
def tap_offsets(ix, iy, live, height, width, C: tl.constexpr):
    """Where the channels of a pixel lie (T, C), and whether it is within the plane (T,)."""
    inside = live & (ix >= 0) & (ix < width) & (iy >= 0) & (iy < height)
    return (iy * width + ix)[:, None] * C + tl.arange(0, C)[None, :], inside


@triton.jit
def _tap(plane, ix, iy, weight, live, height, width, C: tl.constexpr, HALF: tl.constexpr):
    """One of the four neighbours: (T, C) times its weight, zero outside the plane."""
    at, inside = tap_offsets(ix, iy, live, height, width, C)
    dtype: tl.constexpr = tl.float16 if HALF else tl.float32
    return tl.load(plane + at, mask=inside[:, None], other=0.0).to(dtype) * weight[:, None].to(dtype)


@triton.jit
def lookup(plane, px, py, live, height, width, C: tl.constexpr, HALF: tl.constexpr):
    """Bilinear (T, C) features at px (width) and py (height) in [-1, 1]; HALF: in float16."""
    ix, iy, wx, wy = corner(place(px, width), place(py, height))
    found = _tap(plane, ix, iy, (1.0 - wx) * (1.0 - wy), live, height, width, C, HALF)
    found += _tap(plane, ix + 1, iy, wx * (1.0 - wy), live, height, width, C, HALF)
    found += _tap(plane, ix, iy + 1, (1.0 - wx) * wy, live, height, width, C, HALF)
    found += _tap(plane, ix + 1, iy + 1, wx * wy, live, height, width, C, HALF)
    return found


@triton.jit
def product(a, b, HALF: tl.constexpr, DOT: tl.constexpr):
    if HALF:
        return tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        return tl.dot(a, b, input_precision=DOT)


@triton.jit
def plane_features(
    planes, x, y, z, live, size, height, width,
    A0: tl.constexpr, B0: tl.constexpr, A1: tl.constexpr, B1: tl.constexpr, A2: tl.constexpr, B2: tl.constexpr,
    C: tl.constexpr, CONCAT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """What the decoder reads of the three planes, each (T, C); the mean three times unless CONCAT.

    Points in [-1, 1]; ``size`` are the numbers of one plane.
    """
    f0 = lookup(planes, _axis(x, y, z, A0), _axis(x, y, z, B0), live, height, width, C, HALF)
    f1 = lookup(planes + size, _axis(x, y, z, A1), _axis(x, y, z, B1), live, height, width, C, HALF)
    f2 = lookup(planes + size + size, _axis(x, y, z, A2), _axis(x, y, z, B2), live, height, width, C, HALF)
    if CONCAT:
        return f0, f1, f2
    else:
        mean = ((f0 + f1 + f2).to(tl.float32) * (1.0 / 3.0)).to(f0.dtype)
        return mean, mean, mean


@triton.jit
def hidden_layer(
    f0, f1, f2, w1, b1,
    C: tl.constexpr, HIDDEN: tl.constexpr, CONCAT: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(T, hidden) activations; ``w1`` points at (hidden, C or 3 C)."""
    inputs: tl.constexpr = 3 * C if CONCAT else C
    at = w1 + tl.arange(0, HIDDEN)[None, :] * inputs + tl.arange(0, C)[:, None]
    hidden = product(f0, tl.load(at), HALF, DOT)
    if CONCAT:
        hidden += product(f1, tl.load(at + C), HALF, DOT)
        hidden += product(f2, tl.load(at + 2 * C), HALF, DOT)
    return softplus(hidden + b1[None, :])


@triton.jit
def _field(
    planes, x, y, z, live, w1, b1, w2, b2, ws, bs, size, height, width,
    A0: tl.constexpr, B0: tl.constexpr, A1: tl.constexpr, B1: tl.constexpr, A2: tl.constexpr, B2: tl.constexpr,
    C: tl.constexpr, HIDDEN: tl.constexpr, CONCAT: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Raw density (T,) and the sigmoids (T, F) of the features."""
    f0, f1, f2 = plane_features(planes, x, y, z, live, size, height, width, A0, B0, A1, B1, A2, B2, C, CONCAT, HALF)
    hidden = hidden_layer(f0, f1, f2, w1, b1, C, HIDDEN, CONCAT, HALF, DOT)
    sigma = tl.sum(hidden * ws[None, :], axis=1) + bs
    return sigma, sigmoid(product(hidden, w2, HALF, DOT) + b2[None, :])


@triton.jit
def _alpha(sigma, sigma_next, t, t_next, live):
    """Opacity of the interval from a sample to the one behind it; 0 where there is none."""
    there = live & (t_next < 0.5 * FAR_AWAY)
    length = tl.where(there, t_next - t, 0.0)
    return tl.where(there, 1.0 - exp(-softplus((sigma + sigma_next) * 0.5 - SHIFT) * length), 0.0)


@triton.jit
def product_of(a, b):
    return a * b


@triton.jit
def _importance(t, sigma, u, S: tl.constexpr, TS: tl.constexpr, LOG_TS: tl.constexpr):
    """Ascending samples (TI,) of the blurred coarse weights, for ascending u."""
    i = tl.arange(0, TS)
    live = i < S
    t_next = tl.where(i + 1 < S, _at(t, i + 1, TS), FAR_AWAY)
    alpha = _alpha(sigma, _at(sigma, i + 1, TS), t, t_next, live)
    products = tl.associative_scan(1.0 - alpha + KEEP_EPS, 0, product_of)
    w = alpha * _before(products, i, TS)
    left = tl.maximum(tl.where(i > 0, _at(w, i - 1, TS), 0.0), w)
    right = tl.maximum(w, tl.where(i + 1 < S - 1, _at(w, i + 1, TS), 0.0))
    blurred = (left + right) * 0.5 + FLOOR
    density = tl.where((i >= 1) & (i <= S - 3), blurred + PDF_EPS, 0.0)
    cdf = tl.cumsum(density, 0) / tl.sum(density, 0)
    middle = (t + _at(t, i + 1, TS)) * 0.5
    bins: tl.constexpr = S - 2
    behind = _count(tl.where(i < bins, cdf, 2.0), u, False, TS, LOG_TS)
    below = tl.maximum(behind - 1, 0)
    above = tl.minimum(behind, bins - 1)
    low, high = _at(cdf, below, TS), _at(cdf, above, TS)
    gap = high - low
    gap = tl.where(gap < PDF_EPS, 1.0, gap)
    first, last = _at(middle, below, TS), _at(middle, above, TS)
    return first + (u - low) / gap * (last - first)


@triton.jit
def _coarse_depths(
    ray, limits, jitter, near, far,
    S: tl.constexpr, TS: tl.constexpr, LIMITS: tl.constexpr, JITTER: tl.constexpr, DISPARITY: tl.constexpr,
):  # fmt: skip
    """Ascending (TS,) ray parameters; padding repeats the last."""
    i = tl.minimum(tl.arange(0, TS), S - 1)
    moved = tl.full((TS,), 0.5, tl.float32)
    if JITTER:
        moved = tl.load(jitter + ray * S + i)
    step = (i.to(tl.float32) + moved) * (1.0 / (S - 1))
    if LIMITS:
        near = tl.load(limits + ray * 2)
        far = tl.load(limits + ray * 2 + 1)
    if DISPARITY:
        return 1.0 / (1.0 / near * (1.0 - step) + 1.0 / far * step)
    else:
        return near + step * (far - near)


@triton.jit
def _weights(
    tc, sc, tf, sf, n, m, S: tl.constexpr, TS: tl.constexpr, I: tl.constexpr, TI: tl.constexpr,
):  # fmt: skip
    """Merge two ascending sets -> weights and middles of the intervals that begin at each sample, and the
    weights of the samples (half of the interval before and behind). Depths of padding are FAR_AWAY; ``n`` are the
    fine samples before each coarse one, ``m`` the coarse ones before each fine one."""
    i, j = tl.arange(0, TS), tl.arange(0, TI)
    live_c, live_f = i < S, j < I
    own, other = tl.where(i + 1 < S, _at(tc, i + 1, TS), FAR_AWAY), tl.where(n < I, _at(tf, n, TI), FAR_AWAY)
    next_c = tl.minimum(own, other)
    sigma_c = tl.where(own <= other, _at(sc, i + 1, TS), _at(sf, n, TI))
    own, other = tl.where(j + 1 < I, _at(tf, j + 1, TI), FAR_AWAY), tl.where(m < S, _at(tc, m, TS), FAR_AWAY)
    next_f = tl.minimum(own, other)
    sigma_f = tl.where(own < other, _at(sf, j + 1, TI), _at(sc, m, TS))
    alpha_c = _alpha(sc, sigma_c, tc, next_c, live_c)
    alpha_f = _alpha(sf, sigma_f, tf, next_f, live_f)
    keep_c = tl.associative_scan(tl.where(live_c, 1.0 - alpha_c + KEEP_EPS, 1.0), 0, product_of)
    keep_f = tl.associative_scan(tl.where(live_f, 1.0 - alpha_f + KEEP_EPS, 1.0), 0, product_of)
    wc = alpha_c * _before(keep_c, i, TS) * _before(keep_f, n, TI)
    wf = alpha_f * _before(keep_f, j, TI) * _before(keep_c, m, TS)
    # the interval that ends at a sample begins at the one before it, of either set
    n_before = tl.where(i > 0, _at(n, i - 1, TS), 0)
    m_before = tl.where(j > 0, _at(m, j - 1, TI), 0)
    end_c = tl.where(n > n_before, _at(wf, n - 1, TI), tl.where(i > 0, _at(wc, i - 1, TS), 0.0))
    end_f = tl.where(m > m_before, _at(wc, m - 1, TS), tl.where(j > 0, _at(wf, j - 1, TI), 0.0))
    pc = tl.where(live_c, (wc + end_c) * 0.5, 0.0)
    pf = tl.where(live_f, (wf + end_f) * 0.5, 0.0)
    middle_c = tl.where(alpha_c > 0.0, (tc + next_c) * 0.5, 0.0)
    middle_f = tl.where(alpha_f > 0.0, (tf + next_f) * 0.5, 0.0)
    return wc, wf, middle_c, middle_f, pc, pf


@triton.jit
def render_forward(
    planes, origins, directions, limits, jitter, u, w1, bias1, w2, bias2, out, scalars, depths,
    rays, rays_per_image, planes_stride, size, height, width, scale, near, far,
    A0: tl.constexpr, B0: tl.constexpr, A1: tl.constexpr, B1: tl.constexpr, A2: tl.constexpr, B2: tl.constexpr,
    C: tl.constexpr, HIDDEN: tl.constexpr, F: tl.constexpr,
    S: tl.constexpr, TS: tl.constexpr, LOG_TS: tl.constexpr, I: tl.constexpr, TI: tl.constexpr, LOG_TI: tl.constexpr,
    LIMITS: tl.constexpr, JITTER: tl.constexpr, U: tl.constexpr, DISPARITY: tl.constexpr, WHITE: tl.constexpr,
    CONCAT: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr, KEEP: tl.constexpr, RAYS: tl.constexpr,
):  # fmt: skip
    """RAYS rays, one after the other. KEEP: their depths are written too, all in ascending order."""
    h, f = tl.arange(0, HIDDEN), tl.arange(0, F)
    b1 = tl.load(bias1 + h)
    ws, bs = tl.load(w2 + h), tl.load(bias2)
    colour_weight = tl.load(w2 + (1 + f)[None, :] * HIDDEN + h[:, None])
    b2 = tl.load(bias2 + 1 + f)
    i, j = tl.arange(0, TS), tl.arange(0, TI)
    for k in range(RAYS):
        ray = tl.program_id(0).to(tl.int64) * RAYS + k
        if ray < rays:
            mine = planes + (ray // rays_per_image) * planes_stride
            ox, oy, oz = tl.load(origins + ray * 3), tl.load(origins + ray * 3 + 1), tl.load(origins + ray * 3 + 2)
            dx, dy, dz = (
                tl.load(directions + ray * 3),
                tl.load(directions + ray * 3 + 1),
                tl.load(directions + ray * 3 + 2),
            )
            tc = _coarse_depths(ray, limits, jitter, near, far, S, TS, LIMITS, JITTER, DISPARITY)
            sc, colour_c = _field(
                mine, (ox + tc * dx) * scale, (oy + tc * dy) * scale, (oz + tc * dz) * scale, i < S,
                w1, b1, colour_weight, b2, ws, bs, size, height, width, A0, B0, A1, B1, A2, B2, C, HIDDEN, CONCAT, HALF, DOT,
            )  # fmt: skip
            last = tl.max(tc, 0)
            first = tl.min(tc, 0)
            tf = tl.full((TI,), FAR_AWAY, tl.float32)
            sf = tl.zeros((TI,), tl.float32)
            colour_f = tl.zeros((TI, F), tl.float32)
            n, m = tl.zeros((TS,), tl.int32), tl.zeros((TI,), tl.int32)
            if I > 0:
                numbers = (j.to(tl.float32) + 0.5) * (1.0 / I)
                if U:
                    numbers = tl.load(u + ray * I + tl.minimum(j, I - 1))
                tf = _importance(tc, sc, numbers, S, TS, LOG_TS)
                sf, colour_f = _field(
                    mine, (ox + tf * dx) * scale, (oy + tf * dy) * scale, (oz + tf * dz) * scale, j < I,
                    w1, b1, colour_weight, b2, ws, bs, size, height, width, A0, B0, A1, B1, A2, B2, C, HIDDEN, CONCAT, HALF, DOT,
                )  # fmt: skip
                first = tl.minimum(first, tl.min(tl.where(j < I, tf, FAR_AWAY), 0))
                last = tl.maximum(last, tl.max(tl.where(j < I, tf, -FAR_AWAY), 0))
                tf = tl.where(j < I, tf, FAR_AWAY)
            tc = tl.where(i < S, tc, FAR_AWAY)
            if I > 0:
                n = _count(tf, tc, False, TI, LOG_TI)
                m = _count(tc, tf, True, TS, LOG_TS)
            wc, wf, middle_c, middle_f, pc, pf = _weights(tc, sc, tf, sf, n, m, S, TS, I, TI)
            opacity = tl.sum(wc, 0) + tl.sum(wf, 0)
            depth = tl.sum(wc * middle_c, 0) + tl.sum(wf * middle_f, 0)
            seen = tl.sum(pc[:, None] * colour_c, 0) + tl.sum(pf[:, None] * colour_f, 0)
            # the sigmoids' margin, once for all samples: their weights sum up to the opacity
            seen = (1.0 + 2.0 * MARGIN) * seen - MARGIN * opacity
            if WHITE:
                seen += 1.0 - opacity
            mean = tl.where(opacity > 0.0, depth / tl.where(opacity > 0.0, opacity, 1.0), last)
            tl.store(out + ray * F + f, seen)
            tl.store(scalars + ray, depth)
            tl.store(scalars + rays + ray, opacity)
            tl.store(scalars + rays + rays + ray, tl.minimum(tl.maximum(mean, first), last))
            if KEEP:
                mine_t = depths + ray * (S + I)
                tl.store(mine_t + i + n, tc, mask=i < S)
                tl.store(mine_t + j + m, tf, mask=j < I)
