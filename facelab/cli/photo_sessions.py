# SPDX-License-Identifier: Apache-2.0
"""What commands that optimise photos share: session folders that may go on, and driving a stage to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from facelab.errors import Interrupted, UserError
from facelab.inversion.loop import NotFiniteError, Report
from facelab.inversion.session import Session
from facelab.progress import progress_bar
from facelab.training.signals import StopRequest

EVERY = 10  # steps between two rows of the curve


def begun_before(sessions: Sequence[Session], resume: bool, what: str = "an inversion") -> list[Session]:
    """The sessions that were begun before. UserError if there are any and they are not to go on."""
    begun = [session for session in sessions if session.begun]
    if begun and not resume:
        raise UserError(
            f"{begun[0].folder} holds {what} already; add --resume to go on with it, or choose another --out"
        )
    return begun


def expect_side(path: Path, shape: Sequence[int], side: int) -> None:
    """UserError where a picture of a session is not of the model's size."""
    if tuple(shape) != (side, side):
        raise UserError(
            f"{path}: expected {side}x{side} pixels, got {shape[1]}x{shape[0]}; choose another output folder"
        )


def drive(
    stage: Any,
    name: str,
    stop: StopRequest,
    *,
    save: Callable[[], None],
    save_every: int,
    show: bool,
    curves: Sequence[list[dict[str, Any]]] = (),
    on_step: Callable[[Report], None] = lambda _: None,
) -> None:
    """Step until the end, saving now and then and when asked to stop.

    Args:
        stage: of :mod:`facelab.inversion.loop`.
        name: for the bar and the message.
        save: writes the states of all photos.
        curves: of each photo, get a row every :data:`EVERY` steps.

    Raises:
        Interrupted: asked to stop; everything is saved.
        UserError: a step that is not finite; the state before it is saved.
    """
    with progress_bar(total=stage.steps, initial=stage.step, desc=name, show=show, leave=False) as bar:
        while not stage.finished:
            try:
                if stop.requested:
                    save()
                    raise Interrupted(
                        f"interrupted at step {stage.step} of {stage.steps} of {name}; saved, add --resume to go on"
                    )
                report = stage.advance()
                if report.step % EVERY == 0 or stage.finished:
                    for i, curve in enumerate(curves):
                        curve.append(curve_row(report, i))
                    bar.set_postfix(loss=f"{float(report.total.mean()):.4f}", refresh=False)
                on_step(report)
                if stage.step % save_every == 0 or stage.finished:
                    save()
            except NotFiniteError as error:
                for curve in curves:  # rows that were written before the host knew
                    curve[:] = [row for row in curve if row["step"] < stage.step]
                save()
                raise UserError(f"{name}: {error}; the last good state is saved, --resume goes on from it") from error
            bar.update()


def curve_row(report: Report, photo: int) -> dict[str, Any]:
    """Losses of one photo at a step, each without its weight."""
    values = {name: float(value[photo]) for name, value in report.parts.items()}
    return {"step": report.step, "total": float(report.total[photo]), **values}
