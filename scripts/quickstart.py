# SPDX-License-Identifier: Apache-2.0
"""python scripts/quickstart.py : train on, then render; what `make quickstart` runs."""

from facelab.cli.quickstart import quickstart

if __name__ == "__main__":
    quickstart()
