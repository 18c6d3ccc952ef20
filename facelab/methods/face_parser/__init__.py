# SPDX-License-Identifier: Apache-2.0
"""The small face parser of our own, trained on synthetic heads that are made to look like photographs."""
