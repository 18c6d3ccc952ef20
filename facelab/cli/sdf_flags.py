# SPDX-License-Identifier: Apache-2.0
"""Flags of StyleSDF's and CNeRF's programs for pictures that are not here -> what to do instead."""

from __future__ import annotations

KNOWN = "nothing, the model knows it; leave it out"
OF_PICTURES = {
    "--config": KNOWN,
    "--expname": "MODEL is the first argument: a run folder, a checkpoint or a file",
    "--checkpoints_dir": "MODEL is the first argument: a run folder, a checkpoint or a file",
    "--ckpt": "MODEL is RUN/checkpoints/STEP",
    "--trained_ckpt": "MODEL is the first argument, after scripts/convert_checkpoint.py",
    "--results_dir": "--out",
    "--size": KNOWN,
    "--identities": "--seeds 0-15 (these sixteen heads; the same seed is the same head)",
    "--truncation_ratio": "--psi; it acts once, --double-truncation restores the original's second time",
    "--truncation_mean": "nothing, the mean of 10 000 codes is stored with the model; leave it out",
    "--num_views_per_id": "--yaws and --pitches, radians",
    "--fixed_camera_angles": "--views fixed (StyleSDF's thirteen), row (CNeRF's ten)",
    "--no_surface_renderings": "leave shape out of --layers",
    "--no_surface_videos": "leave shape out of --layers",
    "--azim_video": "--trajectory stylesdf_level of scripts/render_video.py; the ellipse is stylesdf",
    "--project_noise": "nothing, it does not run in the original; noise is fixed here; leave it out",
    "--azim": "--yaws, radians",
    "--elev": "--pitches, radians",
    "--N_samples": "--ray-step-multiplier",
    **dict.fromkeys(("--style_dim", "--channel_multiplier", "--depth", "--width", "--dist_radius"), KNOWN),
    **dict.fromkeys(("--n_mlp", "--n_render", "--n_wcode", "--uniform", "--flag"), KNOWN),
}
