# SPDX-License-Identifier: Apache-2.0
"""Networks whose weights were trained by others: the architecture is ours, the file is read by path."""
