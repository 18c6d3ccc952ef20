# SPDX-License-Identifier: Apache-2.0
"""Random arguments and shapes in official EG3D pickles: converted or refused in one line, quickly, nothing else."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facelab.bases.eg3d.convert import read_original
from facelab.bases.eg3d.convert_discriminator import discriminator_to_original
from facelab.bases.eg3d.model import TriPlaneGenerator
from facelab.bases.eg3d.originals import generator_config_from_original, generator_to_original
from facelab.errors import UserError
from facelab.nn.discriminators.stylegan2 import StyleGan2Discriminator, StyleGan2DiscriminatorConfig
from tests.checkpoints.pickle_makers import dump, network_record

OPTIONS = {
    "clamp_mode": "softplus", "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
    "c_gen_conditioning_zero": False, "gpc_reg_prob": 0.5, "c_scale": 1.0, "superresolution_noise_mode": "none",
    "density_reg": 0.25, "density_reg_p_dist": 0.004, "reg_type": "l1", "decoder_lr_mul": 1.0, "sr_antialias": True,
    "depth_resolution": 4, "depth_resolution_importance": 4, "ray_start": 2.25, "ray_end": 3.3, "box_warp": 1,
    "avg_camera_radius": 2.7, "avg_camera_pivot": [0, 0, 0.2], "white_back": False, "disparity_space_sampling": False,
    "density_noise": 0,
}  # fmt: skip
KWARGS = {
    "z_dim": 4, "c_dim": 25, "w_dim": 4, "img_resolution": 128, "img_channels": 3, "sr_num_fp16_res": 0,
    "mapping_kwargs": {"num_layers": 2}, "channel_base": 512, "channel_max": 2, "num_fp16_res": 0, "conv_clamp": None,
    "fused_modconv_default": "inference_only",
}  # fmt: skip
D_KWARGS = {
    "c_dim": 25, "img_resolution": 128, "img_channels": 3, "channel_base": 512, "channel_max": 2, "num_fp16_res": 4,
    "conv_clamp": 256, "disc_c_noise": 0, "architecture": "resnet", "block_kwargs": {"freeze_layers": 0},
    "mapping_kwargs": {}, "epilogue_kwargs": {"mbstd_group_size": 4, "mbstd_num_channels": 1},
}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 8, 10**6, 10**12, 2**59, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "auto",
    "none", "random", "a" * 5000, "\x1b[2J\n", [], [1], [0, 0, 0], ["a", "b", "c"], {}, {"num_layers": 10**9}, b"\xff", (),
]  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    config = StyleGan2DiscriminatorConfig(resolution=128, channel_base=512, channel_max=2)
    return {
        "G_ema": generator_to_original(TriPlaneGenerator(generator_config_from_original(KWARGS, OPTIONS))),
        "D": discriminator_to_original(StyleGan2Discriminator(config).state_dict()),
    }


def random_file(tensors: dict[str, dict[str, torch.Tensor]], rng: np.random.Generator) -> bytes:
    """Up to two changes of arguments, options, attributes or tensors."""
    tables: list[dict[str, Any]] = [dict(KWARGS), dict(OPTIONS), dict(D_KWARGS), {"neural_rendering_resolution": 16}]
    states = {name: dict(state) for name, state in tensors.items()}
    for _ in range(int(rng.integers(0, 3))):
        kind = int(rng.integers(0, 6))
        if kind < 4:
            table = tables[kind]
            key = str(rng.choice(list(table) or ["new"]))
            if rng.random() < 0.15:
                table.pop(key, None)
            else:
                table[key] = VALUES[int(rng.integers(len(VALUES)))]
            continue
        state = states[("G_ema", "D")[kind - 4]]
        key = str(rng.choice(list(state)))
        old = state.pop(key)
        change = int(rng.integers(0, 5))
        if change == 0:
            state[f"{key}x"] = old
        elif change == 1:
            state[key] = old[None]
        elif change == 2:
            state[key] = torch.zeros(())
        elif change == 3:
            state[key] = torch.zeros(1).expand(*(3 for _ in range(int(rng.integers(1, 6)))))
    kwargs, options, d_kwargs, attributes = tables
    full = {**kwargs, "rendering_kwargs": options}
    generator = network_record("TriPlaneGenerator", states["G_ema"], full, rendering_kwargs=options, **attributes)
    return dump({"G_ema": generator, "D": network_record("DualDiscriminator", states["D"], d_kwargs)})


def run_random(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], count: int, seed: int) -> Counter:
    path = folder / "net.pkl"
    outcomes: Counter = Counter()
    for number in range(count):
        path.write_bytes(random_file(tensors, np.random.default_rng([seed, number])))
        start = time.thread_time()
        try:
            found = read_original(path)
            outcomes["with D" if "discriminator" in found.weights else "without D"] += 1
            assert all(note.isprintable() for note in found.notes), f"seed {seed}, file {number}"
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 1500, f"seed {seed}, file {number}: {error}"
            outcomes["refused"] += 1
        assert time.thread_time() - start < 3, f"seed {seed}, file {number}"
    return outcomes


def test_thirty_files(tmp_path: Path, tensors) -> None:
    outcomes = run_random(tmp_path, tensors, 30, 0)
    assert min(outcomes["refused"], outcomes["with D"], outcomes["without D"]) > 3, outcomes


@pytest.mark.slow
def test_hundreds_of_files(tmp_path: Path, tensors) -> None:
    print(dict(run_random(tmp_path, tensors, 400, 1)))
