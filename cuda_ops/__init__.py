# SPDX-License-Identifier: Apache-2.0
"""Fast kernels, each beside a plain torch twin (:mod:`cuda_ops.reference`). Imports torch only.

Kernels are compiled on first use, never at import; :mod:`cuda_ops.dispatch` says which one runs.
"""
