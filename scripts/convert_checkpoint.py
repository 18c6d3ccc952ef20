# SPDX-License-Identifier: Apache-2.0
"""python scripts/convert_checkpoint.py fenerf 315000_generator.pth models/fenerf.safetensors"""

from facelab.cli.convert import convert_checkpoint

if __name__ == "__main__":
    convert_checkpoint()
