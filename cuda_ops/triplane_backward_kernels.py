# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of :mod:`cuda_ops.triplane_render`, backward; everything is said there.

All K samples of a ray, in ascending order, are a vector of T (a power of two, padded). The field is computed twice, in
blocks of B samples that fit into registers: first for density and colour, which the compositing needs of all samples,
then, with the gradients of both at hand, for its own gradient:

    w_k = alpha_k T_k, T_k = prod_{m < k} (1 - alpha_m + eps), alpha = 1 - exp(-softplus(x) length)
    dL/dalpha_k = g_k T_k - (sum_{m > k} g_m w_m) / (1 - alpha_k + eps) with g = dL/dw

A colour's gradient is its weight times that of the ray's features, so that g_k needs one number of a sample only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cuda_ops.triplane_kernels import (
    KEEP_EPS,
    MARGIN,
    SHIFT,
    _at,
    _axis,
    corner,
    exp,
    hidden_layer,
    place,
    plane_features,
    product,
    product_of,
    sigmoid,
    softplus,
    tap_offsets,
)


@triton.jit
def _previous(values, T: tl.constexpr):
    """values[k - 1], 0 before the first."""
    k = tl.arange(0, T)
    return tl.where(k > 0, _at(values, k - 1, T), 0.0)


@triton.jit
def _composite(t, sigma, q, g_opacity, g_depth, g_mean, K: tl.constexpr, T: tl.constexpr):
    """-> weights (T,) of the samples and gradients (T,) of their raw densities.

    Args:
        q: (T,) colour of each sample times the gradient of the ray's features.
    """
    k = tl.arange(0, T)
    there = k < K - 1  # the interval from sample k to the next
    t_next, sigma_next, q_next = _at(t, k + 1, T), _at(sigma, k + 1, T), _at(q, k + 1, T)
    x = (sigma + sigma_next) * 0.5 - SHIFT
    length = t_next - t
    fade = tl.where(there, exp(-softplus(x) * length), 1.0)
    alpha = 1.0 - fade
    keep = tl.where(there, 1.0 - alpha + KEEP_EPS, 1.0)
    reach = tl.associative_scan(keep, 0, product_of)
    reach = tl.where(k > 0, _at(reach, k - 1, T), 1.0)
    w = alpha * reach
    middle = (t + t_next) * 0.5
    opacity = tl.sum(w, 0)
    depth = tl.sum(w * tl.where(there, middle, 0.0), 0)
    near = tl.sum(tl.where(k == 0, t, 0.0), 0)
    far = tl.sum(tl.where(k == K - 1, t, 0.0), 0)
    some = tl.where(opacity > 0.0, opacity, 1.0)
    mean = depth / some
    g_mean = tl.where((opacity > 0.0) & (mean >= near) & (mean <= far), g_mean / some, 0.0)
    g_depth += g_mean
    g_opacity -= g_mean * mean
    g = tl.where(there, (q + q_next) * 0.5 + g_opacity + g_depth * middle, 0.0)
    behind = tl.cumsum(g * w, 0, reverse=True)
    behind = tl.where(there, _at(behind, k + 1, T), 0.0)
    g_x = (g * reach * fade - behind * (fade / keep)) * sigmoid(x) * length
    g_x = tl.where(there, g_x, 0.0)
    return (w + _previous(w, T)) * 0.5, (g_x + _previous(g_x, T)) * 0.5


@triton.jit
def _spread(
    plane, d_plane, gradient, px, py, live, height, width, C: tl.constexpr,
    PLANES: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """Add the gradient (T, C) of bilinear features to the plane's; -> gradients (T,) of px and py, 0 unless POINTS."""
    fx, fy = place(px, width), place(py, height)
    ix, iy, wx, wy = corner(fx, fy)
    gx, gy = tl.zeros_like(px), tl.zeros_like(py)
    for tap in tl.static_range(4):
        at, inside = tap_offsets(ix + tap % 2, iy + tap // 2, live, height, width, C)
        ax = wx if tap % 2 == 1 else 1.0 - wx
        ay = wy if tap >= 2 else 1.0 - wy
        if PLANES:
            tl.atomic_add(d_plane + at, gradient * (ax * ay)[:, None], mask=inside[:, None], sem="relaxed")
        if POINTS:
            value = tl.load(plane + at, mask=inside[:, None], other=0.0).to(tl.float32)
            slope = tl.sum(value * gradient, 1)
            gx += slope * ay if tap % 2 == 1 else -slope * ay
            gy += slope * ax if tap >= 2 else -slope * ax
    return gx * (width * 0.5), gy * (height * 0.5)


@triton.jit
def _onto(gx, gy, A: tl.constexpr, B: tl.constexpr, WHICH: tl.constexpr):
    """The part of a plane's gradients (along its width A and height B) that belongs to one coordinate."""
    total = tl.zeros_like(gx)
    if A == WHICH:
        total += gx
    if B == WHICH:
        total += gy
    return total


@triton.jit
def render_backward(
    planes, origins, directions, w1, bias1, w2, bias2, depths, d_out, d_scalars, d_planes, d_origins, d_directions, partial,
    rays, rays_per_image, each, planes_stride, size, height, width, scale,
    A0: tl.constexpr, B0: tl.constexpr, A1: tl.constexpr, B1: tl.constexpr, A2: tl.constexpr, B2: tl.constexpr,
    C: tl.constexpr, HIDDEN: tl.constexpr, F: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, B: tl.constexpr, BLOCKS: tl.constexpr,
    WHITE: tl.constexpr, CONCAT: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr,
    PLANES: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """``each`` rays, one after the other; the decoder's gradients are summed up over them and left in ``partial``."""
    inputs: tl.constexpr = 3 * C if CONCAT else C
    share: tl.constexpr = 1.0 if CONCAT else 1.0 / 3.0
    h, f, c, k = tl.arange(0, HIDDEN), tl.arange(0, F), tl.arange(0, C), tl.arange(0, T)
    b1, ws, bs, b2 = tl.load(bias1 + h), tl.load(w2 + h), tl.load(bias2), tl.load(bias2 + 1 + f)
    g_w1a, g_w1b, g_w1c = (
        tl.zeros((HIDDEN, C), tl.float32),
        tl.zeros((HIDDEN, C), tl.float32),
        tl.zeros((HIDDEN, C), tl.float32),
    )
    g_w2 = tl.zeros((F, HIDDEN), tl.float32)
    g_b1, g_ws = tl.zeros((HIDDEN,), tl.float32), tl.zeros((HIDDEN,), tl.float32)
    g_b2 = tl.zeros((F,), tl.float32)
    g_bs = tl.zeros((1,), tl.float32)
    start = tl.program_id(0).to(tl.int64) * each
    for step in range(each):
        ray = start + step
        if ray < rays:
            image = (ray // rays_per_image) * planes_stride
            mine = planes + image
            ox, oy, oz = tl.load(origins + ray * 3), tl.load(origins + ray * 3 + 1), tl.load(origins + ray * 3 + 2)
            dx, dy, dz = (
                tl.load(directions + ray * 3),
                tl.load(directions + ray * 3 + 1),
                tl.load(directions + ray * 3 + 2),
            )
            g_seen = tl.load(d_out + ray * F + f)
            g_sum = tl.sum(g_seen, 0)
            sigma, q = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
            for n in range(BLOCKS):
                row = n * B + tl.arange(0, B)
                t = tl.load(depths + ray * K + tl.minimum(row, K - 1))
                f0, f1, f2 = plane_features(
                    mine, (ox + t * dx) * scale, (oy + t * dy) * scale, (oz + t * dz) * scale, row < K,
                    size, height, width, A0, B0, A1, B1, A2, B2, C, CONCAT, HALF,
                )  # fmt: skip
                hidden = hidden_layer(f0, f1, f2, w1, b1, C, HIDDEN, CONCAT, HALF, DOT)
                colour = sigmoid(
                    product(hidden, tl.load(w2 + (1 + f)[None, :] * HIDDEN + h[:, None]), HALF, DOT) + b2[None, :]
                )
                found = tl.sum(hidden * ws[None, :], 1) + bs
                seen = tl.sum(colour * g_seen[None, :], 1) * (1.0 + 2.0 * MARGIN) - MARGIN * g_sum
                sigma = tl.where(k // B == n, tl.gather(found, k % B, 0), sigma)
                q = tl.where(k // B == n, tl.gather(seen, k % B, 0), q)
            g_opacity = tl.load(d_scalars + rays + ray)
            if WHITE:
                g_opacity -= g_sum
            p, g_sigma = _composite(
                tl.load(depths + ray * K + tl.minimum(k, K - 1)),
                sigma,
                q,
                g_opacity,
                tl.load(d_scalars + ray),
                tl.load(d_scalars + rays + rays + ray),
                K,
                T,
            )
            g_bs += tl.sum(g_sigma, 0)
            go_x, go_y, go_z, gd_x, gd_y, gd_z = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for n in range(BLOCKS):
                row = n * B + tl.arange(0, B)
                live = row < K
                t = tl.load(depths + ray * K + tl.minimum(row, K - 1))
                x, y, z = (ox + t * dx) * scale, (oy + t * dy) * scale, (oz + t * dz) * scale
                f0, f1, f2 = plane_features(
                    mine, x, y, z, live, size, height, width, A0, B0, A1, B1, A2, B2, C, CONCAT, HALF
                )
                hidden = hidden_layer(f0, f1, f2, w1, b1, C, HIDDEN, CONCAT, HALF, DOT)
                colour = sigmoid(
                    product(hidden, tl.load(w2 + (1 + f)[None, :] * HIDDEN + h[:, None]), HALF, DOT) + b2[None, :]
                )
                # gradients span too many powers of two for halves; both are 0 for padding
                g_p, g_s = tl.gather(p, row, 0) * (1.0 + 2.0 * MARGIN), tl.gather(g_sigma, row, 0)
                g_colour = g_p[:, None] * g_seen[None, :] * colour * (1.0 - colour)
                g_b2 += tl.sum(g_colour, 0)
                g_ws += tl.sum(g_s[:, None] * hidden, 0)
                g_w2 += product(tl.trans(g_colour), hidden, False, DOT)
                g_hidden = (
                    product(g_colour, tl.load(w2 + (1 + f)[:, None] * HIDDEN + h[None, :]), False, DOT)
                    + g_s[:, None] * ws[None, :]
                )
                g_hidden *= 1.0 - exp(-hidden)  # the softplus
                g_b1 += tl.sum(g_hidden, 0)
                turned = tl.trans(g_hidden)
                g_w1a += product(turned, f0.to(tl.float32), False, DOT)
                if CONCAT:
                    g_w1b += product(turned, f1.to(tl.float32), False, DOT)
                    g_w1c += product(turned, f2.to(tl.float32), False, DOT)
                if PLANES or POINTS:
                    at = w1 + h[:, None] * inputs + c[None, :]
                    g = product(g_hidden, tl.load(at), False, DOT) * share
                    ax, ay = _spread(
                        mine, d_planes + image, g, _axis(x, y, z, A0), _axis(x, y, z, B0), live, height, width, C,
                        PLANES, POINTS,
                    )  # fmt: skip
                    if CONCAT:
                        g = product(g_hidden, tl.load(at + C), False, DOT)
                    bx, by = _spread(
                        mine + size, d_planes + image + size, g, _axis(x, y, z, A1), _axis(x, y, z, B1), live, height,
                        width, C, PLANES, POINTS,
                    )  # fmt: skip
                    if CONCAT:
                        g = product(g_hidden, tl.load(at + 2 * C), False, DOT)
                    cx, cy = _spread(
                        mine + size + size, d_planes + image + size + size, g, _axis(x, y, z, A2), _axis(x, y, z, B2),
                        live, height, width, C, PLANES, POINTS,
                    )  # fmt: skip
                    if POINTS:
                        gx = _onto(ax, ay, A0, B0, 0) + _onto(bx, by, A1, B1, 0) + _onto(cx, cy, A2, B2, 0)
                        gy = _onto(ax, ay, A0, B0, 1) + _onto(bx, by, A1, B1, 1) + _onto(cx, cy, A2, B2, 1)
                        gz = _onto(ax, ay, A0, B0, 2) + _onto(bx, by, A1, B1, 2) + _onto(cx, cy, A2, B2, 2)
                        go_x += tl.sum(gx, 0)
                        go_y += tl.sum(gy, 0)
                        go_z += tl.sum(gz, 0)
                        gd_x += tl.sum(gx * t, 0)
                        gd_y += tl.sum(gy * t, 0)
                        gd_z += tl.sum(gz * t, 0)
            if POINTS:
                tl.store(d_origins + ray * 3, go_x * scale)
                tl.store(d_origins + ray * 3 + 1, go_y * scale)
                tl.store(d_origins + ray * 3 + 2, go_z * scale)
                tl.store(d_directions + ray * 3, gd_x * scale)
                tl.store(d_directions + ray * 3 + 1, gd_y * scale)
                tl.store(d_directions + ray * 3 + 2, gd_z * scale)
    mine_sum = partial + tl.program_id(0).to(tl.int64) * (HIDDEN * inputs + HIDDEN + (1 + F) * (HIDDEN + 1))
    at = mine_sum + h[:, None] * inputs + c[None, :]
    tl.store(at, g_w1a)
    if CONCAT:
        tl.store(at + C, g_w1b)
        tl.store(at + 2 * C, g_w1c)
    mine_sum += HIDDEN * inputs
    tl.store(mine_sum + h, g_b1)
    mine_sum += HIDDEN
    tl.store(mine_sum + h, g_ws)
    tl.store(mine_sum + (1 + f)[:, None] * HIDDEN + h[None, :], g_w2)
    mine_sum += (1 + F) * HIDDEN
    tl.store(mine_sum + tl.arange(0, 1), g_bs)
    tl.store(mine_sum + 1 + f, g_b2)
