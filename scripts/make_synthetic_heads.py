#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""python scripts/make_synthetic_heads.py --out DIR [--count 1000] [--size 128] [--seed 0] [--sheet PICTURE]"""

from facelab.cli.heads import make_synthetic_heads

if __name__ == "__main__":
    make_synthetic_heads()
