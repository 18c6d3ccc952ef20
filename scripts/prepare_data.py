#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""python scripts/prepare_data.py celebamask-hq SRC DST | ffhq IMAGES MASKS DST | masks IMAGES OUT --parser FILE | ..."""

from facelab.cli.prepare import prepare_data

if __name__ == "__main__":
    prepare_data()
