# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: our own format, and safe readers of foreign ones.

``format``: folders and single-file models. ``legacy_pickle``, ``torchscript``: foreign files, read without running
them. ``key_map``: renaming rules. ``recognise``: which official file is this?
"""
