# SPDX-License-Identifier: Apache-2.0
"""Regions of a head on the command line: names, numbers with a warning, and which views show them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from facelab.cli.common import Command

MODES = ("features", "carve")
VIEWS = ("row", "fixed")


def region_options(function: Command) -> Command:
    """--semantics and --semantics-mode."""
    for option in (
        click.option(
            "--semantics",
            default=None,
            help="Show these regions alone, by name: eye,nose (CNeRF). Numbers are understood, with a warning.",
        ),
        click.option(
            "--semantics-mode",
            type=click.Choice(MODES),
            default=None,
            help="carve: the other regions are taken away; features: they only give the decoder no features, as in "
            "the original. [default: as configured, carve]",
        ),
    ):
        function = option(function)
    return function


def named_regions(face: Any, text: str) -> tuple[str, ...]:
    """``"eye,5"`` -> names of the model's regions, in the order of its channels; numbers are told with their names.

    Raises:
        UserError: an unknown region, with the nearest name, or a model without regions.
    """
    from facelab.errors import UserError, an
    from facelab.methods.cnerf.regions import parse_regions

    names = face.region_names
    if not names:
        raise UserError(f"heads of {an(face.method)} model are not composed of regions; expected a CNeRF model")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        channels = parse_regions(text, names)
    for warning in told:
        click.echo(f"warning: {warning.message}", err=True)
    return tuple(names[channel] for channel in channels)


def showing(face: Any, semantics: str | None, mode: str | None) -> Any:
    """The model with ``--semantics`` and ``--semantics-mode`` applied. UserError for a mode without regions."""
    from facelab.errors import UserError

    if semantics is None:
        if mode is not None:
            raise UserError("--semantics-mode says what happens to the other regions, expected --semantics with it")
        return face
    return face.only(named_regions(face, semantics), None if mode is None else mode == "carve")


def sphere_prior(face: Any, option: str) -> Any:
    """The distribution of a model's training cameras, for presets. UserError where it is none of StyleSDF's."""
    from facelab.cameras.sphere import SpherePrior
    from facelab.errors import UserError, an

    prior = getattr(face.view, "prior", None)
    prior = prior() if callable(prior) else prior
    if not isinstance(prior, SpherePrior):
        raise UserError(
            f"{option} is for StyleSDF and CNeRF models, this is {an(face.method)} model; choose other views"
        )
    return prior


def preset_cameras(face: Any, name: str, fov: float | None) -> Any:
    """Cameras of a preset: ``row``, CNeRF's ten in a row; ``fixed``, StyleSDF's thirteen. UserError for other methods.

    Args:
        fov: full field of view in degrees, None: as trained.
    """
    prior = sphere_prior(face, f"--views {name}")
    prior = prior if fov is None else replace(prior, fov=fov)
    return (prior.row() if name == "row" else prior.fixed_views()).to(face.device)


def views_option() -> Callable[[Command], Command]:
    """--views."""
    return click.option(
        "--views",
        type=click.Choice(VIEWS),
        default=None,
        help="Instead of --yaws and --pitches: row, CNeRF's ten from one side to the other a little from above; fixed, "
        "StyleSDF's thirteen.",
    )
