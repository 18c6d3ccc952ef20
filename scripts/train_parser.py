#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""python scripts/train_parser.py --curriculum synthetic --out runs/parser/synthetic [--gpus 1]"""

from facelab.cli.parser import train_parser

if __name__ == "__main__":
    train_parser()
