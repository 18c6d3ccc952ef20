# SPDX-License-Identifier: Apache-2.0
"""python scripts/train_cnerf.py --stage volume --data ffhq_lmdb --gpus 4"""

from facelab.cli.train import train_command

if __name__ == "__main__":
    train_command("cnerf", "ffhq_volume")()
