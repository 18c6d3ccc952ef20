# SPDX-License-Identifier: Apache-2.0
"""FENeRF: face editing in radiance fields with a jointly rendered segmentation (arXiv 2111.15490)."""
