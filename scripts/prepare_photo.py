#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""python scripts/prepare_photo.py PHOTO [--out DIR] [--face N] [--detector mtcnn|dlib] [--landmarks FILE]"""

from facelab.cli.photos import prepare_photo

if __name__ == "__main__":
    prepare_photo()
