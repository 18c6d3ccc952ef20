# SPDX-License-Identifier: Apache-2.0
"""Golden cases: numbers of the original implementations, compared with ours through the converters."""
