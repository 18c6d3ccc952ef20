# SPDX-License-Identifier: Apache-2.0
"""EG3D: the tri-plane generator that FaceDNeRF and NeRFFaceShop stand on, trainable by itself."""
