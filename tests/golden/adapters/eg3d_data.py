# SPDX-License-Identifier: Apache-2.0
"""EG3D's camera labels and crops, and the mathematics of its metrics."""

from __future__ import annotations

import torch

from facelab.data import eg3d_labels as labels
from facelab.metrics.frechet import FeatureStats, frechet_distance
from facelab.metrics.kernel import kernel_distance_of
from facelab.metrics.manifold import precision_recall

from ..harness import Arrays, Meta, given


@given("angle", "trans", "lm3d", "lm5_*", partly={"align_params": 2})
def face_labels(meta: Meta, arrays: Arrays) -> Arrays:
    """Reconstruction output -> labels and their mirror image; landmarks -> crop (width and height are given)."""
    case = meta["config"]
    raw = labels.pose_from_face_model(arrays["angle"], arrays["trans"])
    rotation = labels.face_rotation(arrays["angle"])
    normalised = labels.normalise_pose(raw, "orig", case["radius"])
    label = labels.make_label(normalised, labels.intrinsics(case["focal"]))
    fits, crops = [], []
    for number, (width, height) in enumerate(arrays["align_params"].tolist()):
        fit = labels.weak_perspective(arrays[f"lm5_{number}"], arrays["lm3d"])
        crop = labels.crop_of((int(width), int(height)), fit, case["target_size"], case["rescale_factor"])
        fits.append([width, height, *fit])
        crops.append([crop.width, crop.height, crop.left, crop.up])
    return {
        "rotation": rotation,
        "pose_raw": raw,
        "label_orig": label,
        "pose_cor": labels.normalise_pose(raw, "cor", case["radius"], tuple(case["cor_centre"])),
        "label_mirror": labels.mirror_label(label),
        "afhq_pose_from_rotation": labels.afhq_pose(rotation, case["radius"]),
        "align_params": torch.tensor(fits),
        "align_resize_w_h_left_up": torch.tensor(crops),
    }


@given("real", "gen", "kid_*_idx")
def metrics(meta: Meta, arrays: Arrays) -> dict[str, float]:
    """FID with population covariances, KID over the subsets of the case, precision and recall."""
    real, gen, case = arrays["real"], arrays["gen"], meta["config"]
    first, second = (FeatureStats(x.shape[1]).add(x) for x in (real, gen))
    assert arrays["kid_gen_idx"].shape == (case["kid_subsets"], case["kid_subset_size"])
    found = precision_recall(real, gen, case["nhood_size"])
    return {
        "fid": frechet_distance(first, second, ddof=0),
        "kid": kernel_distance_of(real, gen, arrays["kid_real_idx"], arrays["kid_gen_idx"]).mean,
        "precision": found.precision,
        "recall": found.recall,
    }


ADAPTERS = {"eg3d/face_labels": face_labels, "eg3d/metrics": metrics}
