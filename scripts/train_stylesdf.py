# SPDX-License-Identifier: Apache-2.0
"""python scripts/train_stylesdf.py --stage volume --curriculum ffhq_volume --data PATH --gpus 2"""

from facelab.cli.train import train_command

if __name__ == "__main__":
    train_command("stylesdf", "ffhq_volume")()
