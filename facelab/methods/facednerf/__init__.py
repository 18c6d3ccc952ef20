# SPDX-License-Identifier: Apache-2.0
"""FaceDNeRF: one photo to a 3D face that follows text and light (arXiv 2306.00783), on EG3D."""
