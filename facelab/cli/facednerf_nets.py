# SPDX-License-Identifier: Apache-2.0
"""The judges of FaceDNeRF's commands, from files or as substitutes; the light that is wanted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facelab import assets
from facelab.errors import UserError
from facelab.inversion.perceptual_files import load_perceptual
from facelab.methods.facednerf.config import FaceDNeRFConfig, WeightConfig, meaningless
from facelab.methods.facednerf.terms import FRONT_LOSSES, SIDE_LOSSES, Networks

if TYPE_CHECKING:
    from facelab.nn.pretrained.light_estimator import LightEstimator, Norm

TEXT_OPTIONS = ("prompt", "negative", "diffusion", "demo_diffusion", "diffusion_device", "embeddings")
AUTO, NONE, RANDOM = "auto", "none", "random"
ARCFACE = "arcface_ir_se50"
RANDOM_SEED, RANDOM_SIDE = 0, 64  # of networks without weights; pixels that the light's sees


@dataclass(frozen=True)
class Judges:
    """Networks with what they are called.

    Attributes:
        networks: for :mod:`facelab.methods.facednerf.editing`.
        names: of each network that is there; decides the result, so a session keeps it.
        config: with weight 0 for what has no network and can do without.
        notes: what a person should know, one line each.
    """

    networks: Networks
    names: dict[str, str]
    config: FaceDNeRFConfig
    notes: tuple[str, ...] = ()


def make_judges(options: dict[str, Any], config: FaceDNeRFConfig, device: str, photo: bool, light: bool) -> Judges:
    """The networks that a run needs; its options are taken out of ``options``.

    Args:
        options: of the command line; those of text and light may be missing.
        config: decides which networks are needed.
        photo: whether there is one: losses of the front view need it.
        light: whether one is wanted.

    Raises:
        UserError: a file that is missing or another network, a prompt or a light that nobody judges.
    """
    found: dict[str, Any] = {}
    names: dict[str, str] = {}
    notes: list[str] = []
    o = {
        name: options.pop(name, None)
        for name in (*TEXT_OPTIONS, "perceptual", "identity", "light_network", "clip", "clip_activation")
    }
    if o["clip_activation"] is not None and o["clip"] is None:
        raise UserError("--clip-activation is of CLIP's layers, but there is no --clip; give both or none")
    if o["clip"] is not None and not config.weights.clip:
        config = _weights(config, clip=1.0)
    if o["clip"] is not None and o["diffusion"] is None and not o["demo_diffusion"]:
        config = _weights(config, text=0.0)  # CLIP alone
    require_effect(config, bool(o["prompt"]), light)
    weights = config.active
    left_out = [name for name in meaningless(config.domain) if getattr(config.weights, name)]
    if left_out:
        notes.append(f"domain {config.domain}: {' and '.join(left_out)} left out, judged by networks for human faces")
    if photo:
        net = load_perceptual(o["perceptual"]).to(device)
        found["perceptual"], names["perceptual"] = net, net.name
        if net.metric != "lpips_vgg":
            notes.append(f"no LPIPS file: the perceptual distance is {net.metric} ({net.name})")
    if photo and weights.identity:
        found["identity"], names["identity"] = _identity(o["identity"], device)
        if found["identity"] is None:
            notes.append(
                f"no ArcFace file: the person is not compared; give one with --identity (weights.py list {ARCFACE})"
            )
            config = _weights(config, identity=0.0)
    if weights.text:
        found["text"], names["text"] = _guidance(o, config, device)
        if o["demo_diffusion"]:
            notes.append("the diffusion model has random weights: the prompt moves pixels, it means nothing to them")
    if weights.clip:
        found["clip"], names["clip"] = _clip(o["clip"], o["prompt"] or "", o["clip_activation"], device)
    if weights.light:
        found["light"], names["light"] = load_light_judge(o["light_network"], config.light_norm, device)
        if o["light_network"] == RANDOM:
            notes.append("the light is judged by a network of random weights: its numbers mean nothing")
    return Judges(Networks(**found), names, config, tuple(notes))


def _weights(config: FaceDNeRFConfig, **changes: float) -> FaceDNeRFConfig:
    weights: WeightConfig = dataclasses.replace(config.weights, **changes)
    return dataclasses.replace(config, weights=weights)


def _identity(choice: str, device: str) -> tuple[Any, str]:
    """ArcFace on the part of a portrait that holds the face, and its name."""
    from facelab.metrics.features import read_tensor_file
    from facelab.nn.pretrained.arcface import FaceIdentity, arcface_from_published

    path = assets.locate(ARCFACE) if choice == AUTO else None if choice == NONE else assets.find(ARCFACE, choice)
    if path is None:
        return None, NONE
    network = FaceIdentity(arcface_from_published(read_tensor_file(path), path)).to(device)
    return network, FaceIdentity.name


def _guidance(o: dict[str, Any], config: FaceDNeRFConfig, device: str) -> tuple[Any, str]:
    """Score distillation of the prompt, and its name. The text encoder is gone when this returns."""
    from facelab.cli.common import pick_device
    from facelab.losses.score_distillation import ScoreDistillation
    from facelab.nn.pretrained import diffusion, random_diffusion

    if o["diffusion"] is not None and o["demo_diffusion"]:
        raise UserError("--diffusion and --demo-diffusion are two diffusion models, expected one of them; drop one")
    place = pick_device(o["diffusion_device"]) if o["diffusion_device"] else device
    settings = config.guide()
    if o["demo_diffusion"]:
        parts: Any = random_diffusion.tiny_diffusion(RANDOM_SEED, device=place)
        embeddings = random_diffusion.tiny_embeddings(o["prompt"], o["negative"])
    elif o["diffusion"] is None:
        raise UserError(
            f"a prompt needs a diffusion model: give --diffusion FOLDER ({diffusion.DOWNLOAD}), --clip FILE, or for a "
            "try without weights --demo-diffusion"
        )
    else:
        embeddings = diffusion.encode_prompt(o["diffusion"], o["prompt"], o["negative"], place, o["embeddings"])
        parts = diffusion.load_diffusion(o["diffusion"], settings.precision, place, config.memory.recompute)
    judge = ScoreDistillation(parts.unet, parts.vae, parts.scheduler, embeddings.to(place), settings)
    return judge, parts.source


def _clip(path: Path | None, prompt: str, activation: Any, device: str) -> tuple[Any, str]:
    """CLIP's similarity to the prompt, and its name."""
    from facelab.losses.clip_similarity import ClipSimilarity
    from facelab.metrics.clip_score import load_clip

    if path is None:
        raise UserError("weights.clip is above 0 but there is no CLIP; give its file with --clip")
    vision, embedding, name = load_clip(path, prompt, activation=activation)
    name = name if activation is None else f"{name} {activation}"
    return ClipSimilarity(vision.to(device), embedding.to(device), name), name


def load_light_judge(choice: str, norm: Norm, device: str) -> tuple[LightEstimator, str]:
    """The estimator of ``--light-network`` and its name. UserError without a file."""
    from facelab.nn.pretrained.light_estimator import LightEstimator, load_light_estimator

    if choice == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            estimator, name = LightEstimator(norm=norm, side=RANDOM_SIDE), "dpr-random"
    else:
        estimator, name = load_light_estimator(None if choice == AUTO else choice, norm), "dpr"
    return estimator.to(device), name


def light_in_picture(picture: NDArray[np.uint8], label: NDArray[np.float64] | None, choice: str, norm: Norm) -> Tensor:
    """(9,) world light that the estimator sees in a portrait framed as EG3D's crops.

    Args:
        picture: (S, S, 3) uint8.
        label: (25,) its camera, so that the light stays with the head; None: seen from the front.
        choice, norm: see :func:`load_light_judge`.
    """
    from facelab.cameras import Camera
    from facelab.inference.pictures import from_uint8
    from facelab.lighting import from_dpr
    from facelab.losses.lighting import light_in

    estimator, _ = load_light_judge(choice, norm, "cpu")
    camera = None if label is None else Camera.from_label(torch.from_numpy(label).float()[None])
    with torch.no_grad():
        return from_dpr(light_in(estimator, from_uint8(torch.tensor(picture).permute(2, 0, 1)[None])), camera)[0]


def require_effect(config: FaceDNeRFConfig, prompt: bool, light: bool) -> None:
    """UserError for a prompt or a light that no loss looks at."""
    weights, active = config.weights, config.active
    if light and not active.light:
        if weights.light:
            raise UserError(
                f"the light is judged by a network for human faces, expected domain faces, got {config.domain}; drop the "
                "light"
            )
        raise UserError("a light was given, but weights.light is 0, so nothing looks at it; give --light-weight")
    if prompt and not (active.text or active.clip):
        raise UserError(
            "a prompt was given, but weights.text and weights.clip are 0, so nothing reads it; give --text-weight"
        )


def require_aim(config: FaceDNeRFConfig, photo: bool) -> None:
    """UserError where no loss has a weight."""
    names = (*FRONT_LOSSES, *SIDE_LOSSES) if photo else SIDE_LOSSES
    if not any(getattr(config.active, name) for name in names):
        raise UserError(f"all weights are 0 ({', '.join(names)}), so there is nothing to aim at; give one of them")
