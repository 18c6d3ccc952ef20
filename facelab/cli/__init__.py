# SPDX-License-Identifier: Apache-2.0
"""Command line entry points. Modules here import click alone until a command runs, so that --help is fast."""
