# SPDX-License-Identifier: Apache-2.0
"""python scripts/compute_metrics.py runs/fenerf/celebamask_hq_128 --data PATH --metrics fid,kid --inception FILE"""

from facelab.cli.metrics import compute_metrics

if __name__ == "__main__":
    compute_metrics()
