# SPDX-License-Identifier: Apache-2.0
"""StyleSDF: scalar losses and the path length regulariser on a small stand-in for the generator."""

from __future__ import annotations

import torch

from facelab.losses.adversarial import d_fake_loss, d_real_loss, g_loss
from facelab.losses.path_length import path_length
from facelab.losses.sdf import eikonal_loss, minimal_surface_loss, viewpoint_loss

from ..harness import Arrays, Meta


def losses(meta: Meta, arrays: Arrays) -> Arrays:
    case = meta["config"]
    assert case.get("smooth_l1_beta", 1) == 1
    codes, noise = arrays["in_latents"].clone().requires_grad_(), arrays["in_noise"]
    image = torch.tanh(codes.flatten(1) @ arrays["in_proj"]).reshape(noise.shape)
    path = path_length(image, codes, noise, arrays["in_mean_path"], case["path_decay"])
    return {
        "out_d_logistic": d_fake_loss(arrays["in_fake"]) + d_real_loss(arrays["in_real"]),
        "out_g_nonsat": g_loss(arrays["in_fake"]),
        "out_viewpoint": viewpoint_loss(arrays["in_view_pred"], arrays["in_view_gt"]),
        "out_eikonal": eikonal_loss(arrays["in_eik"]),
        "out_minsurf": minimal_surface_loss(arrays["in_sdf"], case["min_surf_beta"]),
        "out_path_penalty": path.penalty,
        "out_path_mean": path.mean,
        "out_path_lengths": path.lengths,
    }


ADAPTERS = {"stylesdf/losses": losses}
