# SPDX-License-Identifier: Apache-2.0
"""python scripts/invert_cnerf.py models/cnerf.safetensors me.jpg --parser fenerf_parser --out inversions"""

from facelab.cli.invert import invert_cnerf

if __name__ == "__main__":
    invert_cnerf()
