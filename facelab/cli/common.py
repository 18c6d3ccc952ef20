# SPDX-License-Identifier: Apache-2.0
"""What all commands share: options, and one line instead of a traceback."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from facelab.errors import Interrupted, UserError

Command = Callable[..., Any]
PACKAGE = Path(__file__).parents[1]
OWN = (PACKAGE, PACKAGE.with_name("cuda_ops"))  # where warnings come from that are for the user
LAST_SEED = 2**63 - 1  # what random generators take
MOST_SEEDS = 1_000_000  # of one range


class OneLineCommand(click.Command):
    """A command that says what is wrong with its options in one line, like every other error.

    Args:
        instead: flag of an original program -> what there is here instead, said when it is used.
    """

    def __init__(self, *args: Any, instead: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instead = instead or {}
        self.context_settings = {
            "help_option_names": ["-h", "--help"],
            "max_content_width": 100,
            **self.context_settings,
        }

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line_usage(self.instead, any(parameter.name == "seeds" for parameter in self.params)):
            return super().make_context(*args, **kwargs)


class OneLineGroup(OneLineCommand, click.Group):
    """The same for a command with subcommands."""

    command_class = OneLineCommand

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        with one_line_usage():
            return super().resolve_command(ctx, args)


@contextlib.contextmanager
def one_line_usage(instead: Mapping[str, str] | None = None, seeds: bool = False) -> Iterator[None]:
    """Print click's complaint about the command line as ``error: ...`` and leave with status 2.

    ``instead``: what to say of flags that an original program has and this one has not; ``seeds``: whether there is
    ``--seeds``, which the originals take with blanks between them.
    """
    try:
        yield
    except click.NoSuchOption as error:
        advice = (instead or {}).get(error.option_name)
        message = " ".join(error.format_message().split()).rstrip(".")
        if advice is not None:
            message = f"{error.option_name} is a flag of the original; here: {advice}"
        click.echo(f"error: {message}; see --help", err=True)
        raise click.exceptions.Exit(2) from error
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a subcommand shows its help
            raise
        message = " ".join(error.format_message().split()).rstrip(".")
        if seeds and re.fullmatch(r"Got unexpected extra arguments? \([-\d ]+\)", message):
            message += ": several seeds are written with commas, --seeds 0,1,2"
        click.echo(f"error: {message}; see --help", err=True)
        raise click.exceptions.Exit(2) from error


def friendly(function: Command) -> Command:
    """Turn errors that the user can mend into one line on stderr and exit status 2.

    ``FACELAB_TRACEBACK=1`` shows the traceback, for reports.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with one_line_warnings():
                return function(*args, **kwargs)
        except (UserError, MemoryError, KeyboardInterrupt, BrokenPipeError, RuntimeError) as error:
            if os.environ.get("FACELAB_TRACEBACK") == "1":
                raise
            message = explain(error)
            if message is None:
                raise
            click.echo(f"error: {message}", err=True)
            sys.exit(130 if isinstance(error, (KeyboardInterrupt, Interrupted)) else 2)

    return wrapped


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings that come from this project as ``warning: ...``, without the place and the line of source."""
    before = warnings.formatwarning

    def formatted(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if any(Path(filename).is_relative_to(folder) for folder in OWN):
            return f"warning: {' '.join(str(message).split())}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def explain(error: BaseException) -> str | None:
    """The line for the user, or None for a programming error, whose traceback is needed."""
    if isinstance(error, UserError) or type(error).__name__ == "OpsError":  # the second: FACELAB_OPS, of cuda_ops
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BrokenPipeError):
        return "the reader of the output went away"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the second: torch, on a CPU
        return "out of memory; lower --image-size, --voxel-resolution, --max-points or the batch"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU is out of memory; in training lower train.batch_chunk or set render.recompute=true, "
            "for pictures lower --max-points"
        )
    return None


def device_option(function: Command) -> Command:
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Where to compute: auto (cuda if there is one), cpu, cuda, cuda:1 ...",
    )(function)


def model_argument(function: Command) -> Command:
    return click.argument("model", type=click.Path(path_type=Path))(function)


def seeds_option(default: Sequence[int] = (0, 1, 2)) -> Callable[[Command], Command]:
    """``--seeds 0,1,2`` or ``--seeds 0-7``."""
    return click.option(
        "--seeds",
        default=",".join(map(str, default)),
        show_default=True,
        callback=lambda _ctx, _param, value: parse_seeds(value),
        help="Which heads: numbers and ranges, for example 0,3,8-11.",
    )


def quality_options(function: Command) -> Command:
    """Image size, samples per ray, view lock, chunk size, speed."""
    for option in (
        click.option(
            "--image-size",
            type=click.IntRange(1),
            default=None,
            help="Pixels per side of the volume rendering. [default: as trained]",
        ),
        click.option(
            "--ray-step-multiplier",
            type=click.IntRange(1),
            default=2,
            show_default=True,
            help="Factor on the samples per ray of training.",
        ),
        click.option(
            "--fill-color", default=None, help="Empty rays: black, white, grey, light_grey. [default: as trained]"
        ),
        click.option("--lock-view-dependence", is_flag=True, help="Colour as seen from the front, from everywhere."),
        click.option(
            "--max-points",
            type=click.IntRange(1),
            default=2_400_000,
            show_default=True,
            help="Field evaluations at a time; bounds the memory, not the result.",
        ),
        click.option("--fast", is_flag=True, help="Lower precision and CUDA graphs; says what it costs in exactness."),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "tf32", "fp16", "bf16", "fp16_all"]),
            default="fp16",
            show_default=True,
            help="Of --fast.",
        ),
    ):
        function = option(function)
    return function


def parse_seeds(text: str) -> list[int]:
    """``"0,3,8-11"`` -> [0, 3, 8, 9, 10, 11]. click.BadParameter for anything else.

    >>> parse_seeds("0,3,8-11")
    [0, 3, 8, 9, 10, 11]
    """
    seeds: list[int] = []
    try:
        for part in str(text).replace(" ", ",").split(","):
            if not part:
                continue
            first, dash, last = part.partition("-")
            low, high = int(first), int(last if dash else first)
            if high > LAST_SEED or high - low >= MOST_SEEDS:
                raise ValueError
            seeds.extend(range(low, high + 1))
    except ValueError:
        seeds = []
    if not seeds:
        raise click.BadParameter(
            f"expected numbers and ranges such as 0,3,8-11, below 2^63 and up to {MOST_SEEDS} in a range, got {text!r}"
        )
    return seeds


def pick_device(name: str) -> str:
    """``auto`` -> cuda or cpu; UserError if a CUDA device is asked for and there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}, expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name} was asked for, but there are {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return name


def open_model(path: Path, device: str, weights: str | None = None, fill_color: str | None = None) -> Any:
    """facelab.load with the device name resolved."""
    import facelab

    model = facelab.load(path, pick_device(device), weights)
    return model if fill_color is None else model.filled_with(fill_color)


def hastened(face: Any, precision: str, codes: Any, settings: Any) -> Any:
    """The model for fast pictures; tells how far the first head is from full precision."""
    from facelab.inference.fast import measure_error

    quick = face.fast(precision)
    error = measure_error(quick.generator, codes.to(face.device), face.camera(), settings)
    click.echo(
        f"fast, {precision}: the first head differs from fp32 by {127.5 * error.max_abs:.2g} of 255 at most, "
        f"{127.5 * error.mean_abs:.2g} on average",
        err=True,
    )
    return quick


def sized_settings(model: Any, image_size: int | None, steps: int, lock: bool, max_points: int) -> Any:
    """The model's inference settings with the shared options applied."""
    return model.settings(image_size, steps, lock).replace(max_points=max_points)
