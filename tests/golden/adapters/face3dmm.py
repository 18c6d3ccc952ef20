# SPDX-License-Identifier: Apache-2.0
"""The 3DMM tools of Deep3DFaceRecon: regression network with published names passed through our loader,
alignment, the face model."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from facelab.data.preprocess.alignment import FaceAlignment, align_face, fixed_crop
from facelab.face_model import bfm
from facelab.nn.pretrained.face_reconstruction import published_shapes, regressor_from_published

from ..harness import Arrays, Meta, case_weights


def recon_net(meta: Meta, arrays: Arrays) -> Arrays:
    """Coefficients, and the first channels of the pooled feature."""
    case = meta["config"]
    shapes = published_shapes(int(case["arch"].removeprefix("resnet")))
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
    network = regressor_from_published(case_weights(meta, shapes))
    with torch.no_grad():
        return {
            "out_feature": network.features(arrays["in_img"])[:, : case["feature_channels"]],
            "out_coeffs": network(arrays["in_img"]),
        }


def align(meta: Meta, arrays: Arrays) -> dict[str, np.ndarray]:
    """The aligned picture, its parameters from 68 and from five points, and the landmarks in it. Ours count rows down."""
    case = meta["config"]
    photo = Image.fromarray(arrays["in_image"].numpy())
    points = arrays["in_lm"].double().numpy()
    points = np.stack([points[:, 0], photo.height - 1 - points[:, 1]], axis=-1)
    how = (arrays["lm3d"].double().numpy(), case["rescale_factor"], case["target_size"])
    found = align_face(photo, points, *how)
    return {
        "out_params": parameters(found),
        "out_params5": parameters(align_face(photo, bfm.alignment_points(points), *how)),
        "out_image": np.array(found.picture),
        "out_lm": found.carry(points),
    }


def parameters(found: FaceAlignment) -> np.ndarray:
    """Width, height, scale, centre."""
    return np.array([*found.plan.picture, found.scale, *found.centre])


def generated_crop(meta: Meta, arrays: Arrays) -> Arrays:
    """The fixed part of generated pictures."""
    case = meta["config"]
    return {"out_img": fixed_crop(arrays["in_img"], case["s"], tuple(case["t"]), case["target"])}


def face3dmm_forward(meta: Meta, arrays: Arrays) -> Arrays:
    """Model file, coefficients -> shape, normals, camera, colours, landmarks."""
    case = meta["config"]
    file = {name.removeprefix("model_"): values.numpy() for name, values in arrays.items() if name != "in_coeffs"}
    model = bfm.BaselFace.from_arrays(file, case["recenter"])
    found = bfm.FaceCoefficients.split(arrays["in_coeffs"])
    shape = model.vertices(found.identity, found.expression)
    placed = bfm.to_camera(shape, found.angle, found.translation, case["camera_distance"])
    return {
        "out_shape": shape,
        "out_normals": model.normals(shape),
        "out_rotation": bfm.face_rotation(found.angle),
        "out_vertices_cam": placed,
        "out_texture": model.linear_albedo(found.albedo),
        "out_color": model.shaded(found, case["init_lit"]),
        "out_landmarks": bfm.project(model.landmark_positions(placed), case["focal"], case["center"]),
    }


ADAPTERS = {
    "cgof/align": align,
    "cgof/face3dmm_forward": face3dmm_forward,
    "cgof/fixed_crop": generated_crop,
    "cgof/recon_net": recon_net,
}
