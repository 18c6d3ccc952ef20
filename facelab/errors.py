# SPDX-License-Identifier: Apache-2.0
"""Errors whose text is meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Remedies that several errors end in: for a file that is no model, and for weights that are not whole.
TAKE_A_MODEL = "take a run folder, or what scripts/export_model.py or convert_checkpoint.py writes"
TAKE_IT_AGAIN = "take another checkpoint, or copy, convert or export the file again"


class UserError(Exception):
    """A problem the user can mend: one line that says what, expected, got and remedy.

    Command line entry points print it without a traceback and exit with status 2.
    """


class Interrupted(UserError):
    """Ctrl-C: what is done is kept and the same command goes on from there. Commands exit with status 130."""


class NoSurface(UserError):
    """A field that never crosses the level at which its surface was asked for."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest candidate, or an empty string.

    >>> nearest("celeba_128", ["celebamask_hq_128", "cats"])
    " Did you mean 'celebamask_hq_128'?"
    """
    close = difflib.get_close_matches(str(name), [str(c) for c in candidates], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def an(name: str) -> str:
    """The name behind its article.

    >>> an("eg3d"), an("fenerf")
    ('an eg3d', 'a fenerf')
    """
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
