# SPDX-License-Identifier: Apache-2.0
"""pi-GAN (Chan et al., CVPR 2021, arXiv 2012.00926)."""
