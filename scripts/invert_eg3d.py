# SPDX-License-Identifier: Apache-2.0
"""python scripts/invert_eg3d.py models/ffhq.safetensors me.jpg --out inversions"""

from facelab.cli.facednerf import invert_eg3d

if __name__ == "__main__":
    invert_eg3d()
