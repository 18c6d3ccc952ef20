# SPDX-License-Identifier: Apache-2.0
"""Losses: tensors in, scalar out."""
