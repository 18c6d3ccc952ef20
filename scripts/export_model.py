# SPDX-License-Identifier: Apache-2.0
"""python scripts/export_model.py runs/fenerf/synthetic_64 networks/fenerf_synthetic_64.safetensors --with-discriminators"""

from facelab.cli.export import export_command

if __name__ == "__main__":
    export_command()
