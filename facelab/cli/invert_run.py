# SPDX-License-Identifier: Apache-2.0
"""What invert_cnerf does: sessions, groups of photos optimised side by side, tuning, what is written."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from facelab.api import FaceModel
from facelab.cli.invert_results import told, write_result
from facelab.cli.photo_sessions import begun_before, drive, expect_side
from facelab.data import reading
from facelab.errors import UserError
from facelab.generator import Codes
from facelab.inference import pictures as pic
from facelab.inversion import session as files
from facelab.inversion.loop import STEP, Solution
from facelab.inversion.perceptual_files import load_perceptual
from facelab.inversion.photos import Prepared, View
from facelab.inversion.problem import Problem, Target
from facelab.inversion.schedules import ramped_rate
from facelab.inversion.session import Session
from facelab.inversion.start import CodeStatistics
from facelab.inversion.tuning import Tuning, TuningSettings, tunable
from facelab.methods.cnerf import inversion as cnerf
from facelab.training.signals import StopRequest

TUNES = ("tune_steps", "tune_lr", "tune_parts")
SAME = ("method", "model_weights", "photo", "options", "perceptual_net")  # what a resumed session must share


class Run:
    """A model with everything that all photos share.

    Args:
        face: a CNeRF model.
        model: where it came from.
        options: of the command line that decide the result, plain values.
        save_every: steps between two states on the disk.
        progress: draw bars.
        max_points: field evaluations kept for the derivatives at a time, None: all.
    """

    def __init__(
        self,
        face: FaceModel,
        model: str,
        options: dict[str, Any],
        save_every: int,
        progress: bool,
        max_points: int | None = None,
    ) -> None:
        self.face, self.model, self.options = face, model, options
        self.save_every, self.progress = save_every, progress
        self.generator: Any = face.generator
        names = [field.name for field in dataclasses.fields(cnerf.InvertOptions)]
        self.finding = cnerf.InvertOptions(**{name: options[name] for name in names})
        self.settings = face.settings(ray_step_multiplier=1)
        if max_points is not None:
            self.settings = self.settings.replace(recompute=True, max_points=max_points)
        self.net: Any = load_perceptual(options["perceptual"]).to(face.device)
        self.parts = [part.strip() for part in options["tune_parts"].split(",") if part.strip()]
        tunable(self.generator, self.parts)  # a misspelt part is said before anything is computed
        if options["noise"]:
            cnerf.noise_maps(self.generator)

    @property
    def side(self) -> int:
        """Pixels a side of the model's pictures."""
        config = self.face.config
        return config.model.resolution if config.model.stage == "full" else config.render.resolution

    @functools.cached_property
    def statistics(self) -> CodeStatistics:
        """Where codes start and how far they spread."""
        return cnerf.statistics(self.generator, seed=self.options["seed"])

    @functools.cached_property
    def weights(self) -> str:
        """Names the model's weights."""
        return files.digest(self.face.state)

    def described(self, photo: Path) -> dict[str, Any]:
        """What a session is begun with."""
        import facelab

        return {
            "command": "invert_cnerf",
            "facelab": facelab.__version__,
            "method": self.face.method,
            "model": self.model,
            "model_weights": self.weights,
            "photo": str(photo.resolve()),
            "perceptual_net": self.net.name,
            "options": self.options,
        }


@dataclass
class Job:
    """One photo of a run: its folder, what it aims at, and where it stands (None: not begun)."""

    name: str
    session: Session
    target: Target
    view: View
    state: dict[str, Tensor] | None

    @property
    def step(self) -> int:
        """Steps made."""
        return 0 if self.state is None else int(self.state[STEP])


# ---------------------------------------------------------------- sessions


def open_sessions(
    run: Run, photos: Sequence[Path], out: Path, take: Callable[[Path], Prepared], resume: bool
) -> list[Job]:
    """Begin or reopen the folder of each photo; all photos are looked at before anything is computed.

    Raises:
        UserError: a photo that cannot be used, a session that was begun before (without ``resume``) or with other
            options, a damaged one.
    """
    sessions = {photo: Session(out / photo.stem) for photo in photos}
    begun = begun_before(list(sessions.values()), resume)
    prepared = {photo: take(photo) for photo, session in sessions.items() if session not in begun}
    for photo, found in prepared.items():
        if not run.finding.aims(found.label_map is not None):
            raise UserError(
                f"{photo}: nothing to aim at, picture, perceptual (and mask) weights are 0; give one of them"
            )
    jobs = []
    for photo, session in sessions.items():
        if photo in prepared:
            _begin(run, session, photo, prepared[photo])
        else:
            _expect(run, session, photo)
        jobs.append(_open(run, session, photo.stem))
    return jobs


def _expect(run: Run, session: Session, photo: Path) -> None:
    """UserError where a session was begun otherwise. Before its tuning has begun, that may be chosen anew."""
    described = run.described(photo)
    untuned = not (session / files.TUNING).exists()
    session.expect(described, SAME, TUNES if untuned else ())
    before = session.settings()
    if before["options"] != run.options:
        session.begin({**before, "options": run.options})


def _begin(run: Run, session: Session, photo: Path, found: Prepared) -> None:
    for note in found.notes:
        click.echo(f"{found.name}: {note}", err=True)
    view = {"azimuth": found.view.azimuth, "elevation": found.view.elevation}
    pic.save_png(session / files.TARGET, found.picture)
    if found.label_map is not None:
        pic.save_label_png(session / files.TARGET_MASK, found.label_map)
    settings = {**run.described(photo), "view_radians": view, "has_mask": found.label_map is not None}
    session.begin({**settings, "notes": list(found.notes)})


def _open(run: Run, session: Session, name: str) -> Job:
    """A session from its files."""
    settings = session.settings()
    numbers: Any = settings.get("view_radians")
    try:
        view = View(float(numbers["azimuth"]), float(numbers["elevation"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{session / files.SETTINGS}: expected view_radians with azimuth and elevation, got {numbers}; "
            "choose another output folder"
        ) from None
    picture = np.asarray(reading.read_image(session / files.TARGET))
    scores = labels = None
    if settings.get("has_mask"):
        label_map, _ = reading.read_mask(session / files.TARGET_MASK)
        expect_side(session / files.TARGET_MASK, label_map.shape, run.side)
        scores, labels = cnerf.region_targets(label_map[None], run.generator)
    expect_side(session / files.TARGET, picture.shape[:2], run.side)
    image = pic.from_uint8(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None])
    angles = torch.tensor([[view.azimuth, view.elevation]])
    target = Target(image, cnerf.make_camera(angles, run.face.config.camera.fov), scores, labels)
    return Job(name, session, target, view, session.read_state())


# ---------------------------------------------------------------- running


def run_all(run: Run, jobs: Sequence[Job], batch: int) -> None:
    """All photos, ``batch`` side by side; those of a group stand at the same step and have a mask, or have none.

    Raises:
        Interrupted: Ctrl-C; the states are saved.
    """
    if run.net.metric != "lpips_vgg":
        click.echo(f"no LPIPS file: the perceptual distance is {run.net.metric} ({run.net.name})", err=True)
    with StopRequest() as stop:
        for first in range(0, len(jobs), batch):
            chunk = list(jobs[first : first + batch])
            kinds = list(dict.fromkeys((job.step, job.target.scores is None) for job in chunk))
            for kind in kinds:
                group = [job for job in chunk if (job.step, job.target.scores is None) == kind]
                _run_group(run, group, stop)


def _run_group(run: Run, jobs: list[Job], stop: StopRequest) -> None:
    problem = problem_of(run, joined([job.target for job in jobs]), [job.view for job in jobs])
    inversion = cnerf.make_inversion(run.generator, problem, run.statistics, run.finding)
    states = [job.state for job in jobs if job.state is not None]
    if states:
        try:
            inversion.restore(states)
        except UserError as error:
            raise UserError(f"{jobs[0].session / files.STATE}: {error}; remove it to begin anew") from error
    curves = [job.session.losses(inversion.step) for job in jobs]

    def save() -> None:
        for i, job in enumerate(jobs):
            job.session.save_state(inversion.state(i))
            job.session.save_losses(curves[i])

    name = jobs[0].name if len(jobs) == 1 else f"{len(jobs)} photos"
    drive(inversion, name, stop, save=save, save_every=run.save_every, show=run.progress, curves=curves)
    solution = inversion.solution()
    for i, job in enumerate(jobs):
        alone = one_of(solution, i)
        alone_problem = problem_of(run, job.target.to(run.face.device), [job.view])
        write_result(run, job, alone, alone_problem)
        if run.options["tune_steps"]:
            tune(run, job, alone, stop)
        click.echo(told(job))


def tune(run: Run, job: Job, solution: Solution, stop: StopRequest) -> None:
    """Tune a copy of the generator around a solution and write it with its pictures and numbers."""
    o = run.options
    problem = problem_of(run, job.target.to(run.face.device), [job.view], copy.deepcopy(run.generator))
    rate = functools.partial(ramped_rate, steps=o["tune_steps"], base=o["tune_lr"])
    tuning = Tuning(problem, solution, TuningSettings(o["tune_steps"], rate), run.parts)
    state = job.session.read_state(files.TUNING)
    if state is not None:
        tuning.restore(state)

    def save() -> None:
        job.session.save_state(tuning.state(), files.TUNING)

    drive(tuning, f"{job.name}, tuning", stop, save=save, save_every=run.save_every, show=run.progress)
    problem.generator.requires_grad_(False)  # type: ignore[attr-defined]
    face = run.face
    tuned = FaceModel(face._method, problem.generator, face.config, {**face.meta, "tuned_to": job.name}, face.path)
    tuned.save(job.session / files.GENERATOR)
    write_result(run, job, solution, problem, "tuned")


# ---------------------------------------------------------------- the problem


def problem_of(run: Run, target: Target, views: Sequence[View], generator: Any = None) -> Problem:
    """Losses and cameras of a group of photos."""
    device = run.face.device
    angles = torch.tensor([[view.azimuth, view.elevation] for view in views], device=device)
    return cnerf.make_problem(
        run.generator if generator is None else generator,
        target.to(device),
        angles,
        run.face.config.camera.fov,
        run.settings,
        run.net,
        run.statistics,
        run.finding,
    )


def joined(targets: Sequence[Target]) -> Target:
    """Targets of several photos as one."""
    from facelab.cameras import Camera

    scores, labels = ([getattr(t, name) for t in targets] for name in ("scores", "labels"))
    return Target(
        torch.cat([t.picture for t in targets]),
        Camera.cat([t.camera for t in targets]),
        None if scores[0] is None else torch.cat(scores),
        None if labels[0] is None else torch.cat(labels),
    )


def one_of(solution: Solution, photo: int) -> Solution:
    """The solution of one photo."""
    rows = slice(photo, photo + 1)
    return Solution(
        Codes({k: v[rows] for k, v in solution.codes.values.items()}),
        {k: v[rows] for k, v in solution.noise.items()},
        solution.camera[photo],
        None if solution.view is None else solution.view[rows],
        solution.total[rows],
        {k: v[rows] for k, v in solution.parts.items()},
    )
