#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""python scripts/prepare_data.py celebamask-hq SRC DST | ffhq IMAGES MASKS DST | synthetic DST | check DIR"""

from facelab.data.commands import main

if __name__ == "__main__":
    main()
