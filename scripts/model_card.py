# SPDX-License-Identifier: Apache-2.0
"""python scripts/model_card.py networks/fenerf_synthetic_64.safetensors --metrics metrics.json"""

from facelab.cli.card import card_command

if __name__ == "__main__":
    card_command()
