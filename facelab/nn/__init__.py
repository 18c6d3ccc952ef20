# SPDX-License-Identifier: Apache-2.0
"""Modules with weights; they know no camera, loss, file or method."""
