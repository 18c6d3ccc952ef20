# SPDX-License-Identifier: Apache-2.0
"""Flags of pi-GAN's and FENeRF's original training command, and what to say here instead. No torch."""

from __future__ import annotations

INSTEAD = {
    "--output_dir": "--out FOLDER (the run folder)",
    "--load_dir": "--resume auto, which goes on where --out stands",
    "--load_step": "--resume RUN/checkpoints/STEP",
    "--set_step": "nothing, the step comes with the checkpoint; --init-from starts a new run from weights",
    "--n_epochs": "--max-steps (iterations, not epochs)",
    "--sample_interval": "--set log.samples_every=2000",
    "--model_save_interval": "--set checkpoint.keep_every=5000",
    "--eval_freq": "scripts/compute_metrics.py on any checkpoint",
    "--num_gpus": "--gpus",
    "--port": "nothing, there is no port to choose; leave it out",
}
