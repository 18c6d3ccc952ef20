# SPDX-License-Identifier: Apache-2.0
"""pi-GAN: the SIREN generator that FENeRF stands on, trainable by itself."""
