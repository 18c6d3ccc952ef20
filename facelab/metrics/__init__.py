# SPDX-License-Identifier: Apache-2.0
"""Measures of generated faces: picture distances, segmentation overlap, geometry.

``frechet`` and ``kernel`` compare two sets of feature vectors, ``features`` makes the vectors,
``segmentation`` compares label maps, ``geometry`` compares depths and poses. A number's name says
what made it: only features of the FID Inception network give ``fid`` and ``kid``.
"""
