# SPDX-License-Identifier: Apache-2.0
"""Measures of generated faces: picture distances, segmentation overlap, geometry.

``frechet``, ``kernel`` and ``manifold`` compare two sets of feature vectors, ``features`` and ``vgg``
make the vectors, ``segmentation`` compares label maps, ``geometry`` compares depths and poses,
``identity`` compares persons, ``estimated_depth`` asks another network for the depth, ``known_heads``
are synthetic heads whose truth is known, ``evaluate`` measures a whole generator. A number's name says
what made it: only features of the FID Inception network give ``fid`` and ``kid``.
"""
