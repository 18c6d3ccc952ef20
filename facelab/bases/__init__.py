# SPDX-License-Identifier: Apache-2.0
"""The generators that the methods stand on, each trainable and usable by itself."""
