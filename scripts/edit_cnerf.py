# SPDX-License-Identifier: Apache-2.0
"""python scripts/edit_cnerf.py models/cnerf.safetensors --head 3 --from 7 --regions hair --out edits/hair"""

from facelab.cli.edit_cnerf import edit_cnerf

if __name__ == "__main__":
    edit_cnerf()
