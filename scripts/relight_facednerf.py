# SPDX-License-Identifier: Apache-2.0
"""python scripts/relight_facednerf.py models/ffhq.safetensors me.jpg --light right"""

from facelab.cli.facednerf import relight_facednerf

if __name__ == "__main__":
    relight_facednerf()
