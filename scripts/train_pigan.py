# SPDX-License-Identifier: Apache-2.0
"""python scripts/train_pigan.py --curriculum celeba --data PATH --gpus 4"""

from facelab.cli.train import train_command

if __name__ == "__main__":
    train_command("pigan", "celeba")()
