# SPDX-License-Identifier: Apache-2.0
"""python scripts/generate_facednerf.py models/ffhq.safetensors --prompt 'a smiling old man' --diffusion sd21"""

from facelab.cli.facednerf import generate_facednerf

if __name__ == "__main__":
    generate_facednerf()
