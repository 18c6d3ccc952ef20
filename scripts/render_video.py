# SPDX-License-Identifier: Apache-2.0
"""python scripts/render_video.py runs/fenerf/celebamask_hq_128 --seeds 0-3"""

from facelab.cli.render import render_video

if __name__ == "__main__":
    render_video()
