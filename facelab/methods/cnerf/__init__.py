# SPDX-License-Identifier: Apache-2.0
"""CNeRF: a head composed of nine semantic local generators in one signed distance field (arXiv 2302.01579)."""
