# SPDX-License-Identifier: Apache-2.0
"""StyleSDF (arXiv 2112.11427): a FiLM-SIREN signed distance field, rendered small, and a StyleGAN2 decoder behind it."""
