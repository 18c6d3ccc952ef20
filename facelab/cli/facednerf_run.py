# SPDX-License-Identifier: Apache-2.0
"""What invert_eg3d and FaceDNeRF's commands do: a session for each head, both stages, pictures along the way."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from facelab.api import FaceModel
from facelab.cameras import Camera
from facelab.cli.facednerf_nets import Judges
from facelab.cli.photo_sessions import EVERY, begun_before, expect_side
from facelab.cli.portraits import Portrait
from facelab.config import to_dict
from facelab.errors import Interrupted, UserError
from facelab.files import make_folder
from facelab.generator import Codes
from facelab.inference import pictures as pic
from facelab.inversion import session as files
from facelab.inversion.loop import STEP
from facelab.inversion.problem import Target
from facelab.inversion.session import Session
from facelab.methods.facednerf import editing
from facelab.methods.facednerf.config import FaceDNeRFConfig
from facelab.methods.facednerf.course import Control, Step
from facelab.methods.facednerf.editing import Edited
from facelab.methods.facednerf.model import Model
from facelab.methods.facednerf.terms import LightGoal
from facelab.progress import progress_bar
from facelab.training.signals import StopRequest

RECONSTRUCTION, FRONT = "reconstruction", "front.png"
STEPS = "steps"  # folder of the pictures along the way
SAME = ("command", "method", "model_weights", "photo", "start", "task", "settings", "judges")


@dataclass(frozen=True)
class Outputs:
    """What is written, and how often; nothing here changes what is found.

    Attributes:
        out: gets a folder for each head.
        save_every: steps between two states.
        picture_every: steps between two pictures of the way, 0: none.
        video_frames: 0: no video.
        progress: draw bars.
    """

    out: Path
    save_every: int = 50
    picture_every: int = 50
    video_frames: int = 120
    progress: bool = True


@dataclass(frozen=True)
class Run:
    """A model with everything that all heads share.

    Attributes:
        command: name of the command.
        face: an EG3D model.
        path: where it came from.
        config: settings as they are used.
        judges: networks.
        light: (9,) world light that is wanted, or None.
        goal: the same as the procedures take it.
        task: what was asked for in words (prompt, light ...), plain values.
        outputs: what is written.
    """

    command: str
    face: FaceModel
    path: str
    config: FaceDNeRFConfig
    judges: Judges
    light: Tensor | None
    goal: LightGoal | None
    task: dict[str, Any]
    outputs: Outputs

    @functools.cached_property
    def model(self) -> Model:
        """As the procedures take it."""
        return Model.of(self.face)

    @property
    def side(self) -> int:
        """Pixels a side of the model's pictures."""
        return self.model.picture_side(self.model.settings(self.config))

    @functools.cached_property
    def weights(self) -> str:
        """Names the model's weights."""
        return files.digest(self.face.state)

    def described(self, photo: str, start: Codes | None = None) -> dict[str, Any]:
        """What a session is begun with."""
        import facelab

        return {
            "command": self.command,
            "facelab": facelab.__version__,
            "method": self.face.method,
            "model": self.path,
            "model_weights": self.weights,
            "photo": photo,
            "start": None if start is None else files.digest(start.values),
            "task": self.task,
            "settings": dict(_flat(to_dict(self.config))),
            "judges": self.judges.names,
        }


@dataclass
class Job:
    """One head of a run: its folder, what it aims at (None: text alone), whether everything is there already, and codes
    (1, L, W) to begin with (None: the average)."""

    name: str
    session: Session
    target: Target | None
    seed: int | None = None
    done: bool = False
    start: Codes | None = None

    def finish(self) -> None:
        """Drop the state of the tuning, three times a generator: from its end there is nothing to go on to."""
        (self.session / files.TUNING).unlink(missing_ok=True)

    @property
    def place(self) -> tuple[int, int]:
        """Steps made in the two stages; heads that stand at the same place can go on side by side."""
        return tuple(_step(self.session, name) for name in (files.STATE, files.TUNING))  # type: ignore[return-value]


def _step(session: Session, name: str) -> int:
    state = session.read_state(name)
    return 0 if state is None else int(state[STEP])


def _flat(values: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names."""
    for key, value in values.items():
        yield from _flat(value, f"{start}{key}.") if isinstance(value, dict) else [(f"{start}{key}", value)]


# ---------------------------------------------------------------- sessions


def read_start(run: Run, path: Path) -> Codes:
    """The codes of one head that ``--start`` names. UserError for those of several, or of another model."""
    from facelab.inference.latent_files import read_codes

    codes = read_codes(path, run.model.generator)
    count = len(codes.values["w"])
    if count != 1:
        raise UserError(f"--start: {path} holds codes of {count} heads, expected one; give a file for each photo")
    return codes


def open_photos(
    run: Run,
    photos: Sequence[Path],
    names: Sequence[str],
    take: Callable[[Path], Portrait],
    resume: bool,
    starts: Mapping[Path, Codes] | None = None,
) -> list[Job]:
    """Begin or reopen the folder of each photo; all photos are looked at before anything is computed.

    ``starts``: codes to begin with, for all photos or none.

    Raises:
        UserError: a photo that cannot be used, a folder that holds another run (or, without ``resume``, this one), a
            damaged session.
    """
    sessions = {photo: Session(run.outputs.out / name) for photo, name in zip(photos, names, strict=True)}
    begun = usable_sessions([session.folder for session in sessions.values()], resume)
    prepared = {photo: take(photo) for photo, session in sessions.items() if session.folder not in begun}
    jobs = []
    for photo, session in sessions.items():
        start = None if not starts else starts[photo]
        done, described = False, run.described(str(photo.resolve()), start)
        if photo in prepared:
            found = prepared[photo]
            for note in found.notes:
                click.echo(f"{found.name}: {note}", err=True)
            pic.save_png(session / files.TARGET, found.picture)
            session.begin({**described, "camera": found.label.tolist(), "notes": list(found.notes)})
        else:
            done = _expect(session, described)
        jobs.append(Job(photo.stem, session, _target(run, session), done=done, start=start))
    return jobs


def open_seeds(run: Run, seeds: Sequence[int], names: Sequence[str], resume: bool) -> list[Job]:
    """Begin or reopen the folder of each head that has no photo. UserError as :func:`open_photos`."""
    jobs = [Job(name, Session(run.outputs.out / name), None, seed) for seed, name in zip(seeds, names, strict=True)]
    begun = usable_sessions([job.session.folder for job in jobs], resume)
    for job in jobs:
        described = run.described(f"seed {job.seed}")
        if job.session.folder in begun:
            job.done = _expect(job.session, described)
        else:
            job.session.begin(described)
    return jobs


def usable_sessions(folders: Sequence[Path], resume: bool) -> dict[Path, Session]:
    """Those that were begun. UserError for folders of something else, or begun ones without ``resume``."""
    sessions = [Session(folder) for folder in folders]
    for session in sessions:
        if not session.begun and session.folder.is_dir() and any(session.folder.iterdir()):
            raise UserError(f"{session.folder} holds other files and no session of this command; choose another --out")
    return {session.folder: session for session in begun_before(sessions, resume, "a session")}


def _expect(session: Session, described: dict[str, Any]) -> bool:
    """Whether a session has come to its end already. UserError where it was begun otherwise.

    What spares memory may change at any time, and the tuning before it has begun or after its end.
    """
    free = ("memory.",) if (session / files.TUNING).exists() else ("memory.", "tune.")
    session.expect(described, SAME, [name for name in described["settings"] if name.startswith(free)])
    before, now = session.settings(), described["settings"]
    changed = [name for name, value in now.items() if before["settings"].get(name) != value]
    if changed:
        session.begin({**before, "settings": now})
    if any(name.startswith("tune.") for name in changed):
        (session / files.METRICS).unlink(missing_ok=True)
    return (session / files.METRICS).is_file()


def _target(run: Run, session: Session) -> Target:
    """What a session aims at, from its files. UserError where they are damaged."""
    from facelab.data import reading

    numbers = session.settings().get("camera")
    try:
        label = torch.tensor([numbers], dtype=torch.float32)
        camera = Camera.from_label(label)
    except (TypeError, ValueError):
        raise UserError(
            f"{session / files.SETTINGS}: expected a camera of 25 numbers; choose another output folder"
        ) from None
    picture = np.asarray(reading.read_image(session / files.TARGET))
    expect_side(session / files.TARGET, picture.shape[:2], run.side)
    image = pic.from_uint8(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None])
    return Target(image, camera)


# ---------------------------------------------------------------- running


class Watch:
    """Follows the steps of a group: bar, curves, pictures."""

    def __init__(self, run: Run, jobs: Sequence[Job], bar: Any) -> None:
        self.run, self.jobs, self.bar = run, jobs, bar
        self.rows: dict[int, list[dict[str, Any]]] = {}
        self.first = True

    def __call__(self, step: Step) -> None:
        """See :attr:`facelab.methods.facednerf.editing.Control.on_step`."""
        whole = step.step + (self.run.config.codes.steps if step.stage == "tune" else 0)
        chosen = range(len(self.jobs)) if step.photo is None else [step.photo]
        last = step.step >= step.steps - 1  # a tuning that ends early has made as many steps as it reports
        for row, number in enumerate(chosen):
            if number not in self.rows:
                self.rows[number] = self.jobs[number].session.losses(whole)
            if step.step % EVERY == 0 or last:
                parts = {name: float(value[row]) for name, value in step.parts.items()}
                total = float(step.total[row])
                self.rows[number].append(
                    {"step": whole, "stage": step.stage, "seconds": step.seconds, "total": total, **parts}
                )
            every = self.run.outputs.picture_every
            if every and (step.step % every == 0 or last or self.first):
                self._pictures(self.jobs[number].session, step, row)
        self.first = False
        if whole % self.run.outputs.save_every == 0 or last:
            self.save()
        if step.step % EVERY == 0:  # asking for a number makes a GPU wait
            self.bar.set_postfix(stage=step.stage, loss=f"{float(step.total.mean()):.4f}", refresh=False)
        self.bar.update()

    def save(self) -> None:
        """Write the curves."""
        for number, rows in self.rows.items():
            self.jobs[number].session.save_losses(rows)

    @staticmethod
    def _pictures(session: Session, step: Step, row: int) -> None:
        folder = make_folder(session / STEPS)
        for name, picture in (("front", step.front), ("side", step.side)):
            if picture is not None and bool(picture[row].isfinite().all()):
                pic.save_png(folder / f"{name}_{step.stage}_{step.step:05d}.png", pic.to_uint8(picture[row]))


@dataclass(frozen=True)
class Found:
    """What a run found for one head of a group, and what the group took."""

    edited: Edited
    row: int
    heads: int
    seconds: float
    gigabytes: float | None


def run_photos(run: Run, jobs: Sequence[Job], batch: int, finish: Callable[[Job, Found], None]) -> None:
    """All photos that are not done, ``batch`` side by side; those of a group stand at the same place.

    Raises:
        Interrupted: Ctrl-C; the states are saved.
    """
    waiting = [job for job in jobs if not job.done]
    with StopRequest() as stop:
        for first in range(0, len(waiting), batch):
            chunk = waiting[first : first + batch]
            for place in dict.fromkeys(job.place for job in chunk):
                group = [job for job in chunk if job.place == place]
                _run_group(run, group, stop, finish)


def reconstructions(run: Run, jobs: Sequence[Job], batch: int) -> dict[str, Tensor]:
    """The photos as they are, in ``reconstruction/`` of each session: name -> (1, 3, S, S) from the photo's camera."""
    config = dataclasses.replace(
        run.config, weights=dataclasses.replace(run.config.weights, text=0.0, clip=0.0, light=0.0)
    )
    plain = dataclasses.replace(run, config=config, light=None, goal=None)
    inner = [
        Job(job.name, Session(make_folder(job.session / RECONSTRUCTION)), job.target, start=job.start)
        for job in jobs
        if not job.done
    ]
    for job in inner:
        job.done = (job.session / files.METRICS).is_file()

    def keep(job: Job, found: Found) -> None:
        pic.save_png(job.session / FRONT, pic.to_uint8(found.edited.front.rgb)[found.row])
        losses = {name: float(value[found.row]) for name, value in found.edited.losses.items()}
        job.session.save_json(files.METRICS, {"photo": job.name, "losses": losses})
        job.finish()

    run_photos(plain, inner, batch, keep)
    return {job.name: pic.from_uint8(pic.read_picture(job.session / FRONT))[None] for job in inner}


def run_seeds(run: Run, jobs: Sequence[Job], average: bool, finish: Callable[[Job, Found], None]) -> None:
    """All heads without a photo that are not done, one after the other. Interrupted: Ctrl-C; the states are saved."""

    def procedure(job: Job, control: Control) -> Edited:
        assert job.seed is not None
        config = dataclasses.replace(run.config, seed=job.seed)
        return editing.generate(run.model, config, run.judges.networks, 1, run.goal, control, random_start=not average)

    with StopRequest() as stop:
        for job in (job for job in jobs if not job.done):
            with _watched(run, [job], stop) as (control, taken):
                edited = procedure(job, control)
            finish(job, taken(edited, 0))


def _run_group(run: Run, jobs: list[Job], stop: StopRequest, finish: Callable[[Job, Found], None]) -> None:
    targets = [job.target for job in jobs]
    target = joined([t for t in targets if t is not None]).to(run.face.device)
    starts = [job.start for job in jobs if job.start is not None]
    start = Codes.cat(starts) if starts else None
    with _watched(run, jobs, stop) as (control, taken):
        edited = editing.edit(run.model, target, run.config, run.judges.networks, run.goal, control, start)
    for row, job in enumerate(jobs):
        finish(job, taken(edited, row))


@contextmanager
def _watched(run: Run, jobs: list[Job], stop: StopRequest) -> Iterator[tuple[Control, Callable[[Edited, int], Found]]]:
    """A :class:`Control` for a group; the curves are written whatever happens."""
    config, device = run.config, run.face.device
    name = jobs[0].name if len(jobs) == 1 else f"{len(jobs)} photos"
    total = config.codes.steps + config.tune.steps * len(jobs)
    made = sum(jobs[0].place)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    with progress_bar(total=total, initial=min(made, total), desc=name, show=run.outputs.progress, leave=False) as bar:
        watch = Watch(run, jobs, bar)
        often = run.outputs.save_every
        say = functools.partial(click.echo, err=True)
        control = Control([job.session for job in jobs], often, 2 * often, watch, lambda: bool(stop.requested), say=say)

        def taken(edited: Edited, row: int) -> Found:
            memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
            return Found(edited, row, len(jobs), time.perf_counter() - begin, memory)

        try:
            yield control, taken
        except Interrupted as error:
            text = str(error)
            raise Interrupted(f"{name}: {text}; add --resume to go on") from error
        except UserError as error:
            if "out of memory" not in str(error):
                raise
            raise UserError(f"{error} (--low-memory does the first three, --batch 1 the fifth, --set any)") from error
        finally:
            watch.save()


def joined(targets: Sequence[Target]) -> Target:
    """Targets of several photos as one."""
    return Target(torch.cat([t.picture for t in targets]), Camera.cat([t.camera for t in targets]))
