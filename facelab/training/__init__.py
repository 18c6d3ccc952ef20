# SPDX-License-Identifier: Apache-2.0
"""Training: loop, phases, averages, distribution, logging."""
