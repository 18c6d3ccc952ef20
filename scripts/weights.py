# SPDX-License-Identifier: Apache-2.0
"""python scripts/weights.py list | verify | import DIR | fetch NAME"""

from facelab.cli.weights import weights

if __name__ == "__main__":
    weights()
