# SPDX-License-Identifier: Apache-2.0
"""python scripts/extract_mesh.py runs/fenerf/celebamask_hq_128 --seeds 0 --format ply,glb"""

from facelab.cli.render import extract_mesh

if __name__ == "__main__":
    extract_mesh()
