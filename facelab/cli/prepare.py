# SPDX-License-Identifier: Apache-2.0
"""prepare_data: the commands of :mod:`facelab.data.commands`, and those that need more than the data layer."""

from __future__ import annotations

from facelab.cli.parser import masks
from facelab.data.commands import main as prepare_data

prepare_data.add_command(masks)
