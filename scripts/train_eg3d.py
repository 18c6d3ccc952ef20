# SPDX-License-Identifier: Apache-2.0
"""python scripts/train_eg3d.py --curriculum ffhq_512 --data FFHQ_512.zip --gpus 8"""

from facelab.cli.train import train_command

if __name__ == "__main__":
    train_command("eg3d", "ffhq_512")()
