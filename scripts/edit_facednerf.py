# SPDX-License-Identifier: Apache-2.0
"""python scripts/edit_facednerf.py models/ffhq.safetensors me.jpg --prompt 'a man with a beard' --diffusion sd21"""

from facelab.cli.facednerf import edit_facednerf

if __name__ == "__main__":
    edit_facednerf()
