# SPDX-License-Identifier: Apache-2.0
"""Photos as people take them -> EG3D's crop and camera, with a verdict: see docs/preprocessing.md.

>>> from facelab.data.preprocess import make_detector, prepare_photo
>>> photo = prepare_photo("me.jpg", make_detector("mtcnn")).require()  # doctest: +SKIP
>>> photo.crop, photo.camera()  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from facelab.data.preprocess.cameras import CameraEstimator, Deep3dCamera, make_camera_estimator
    from facelab.data.preprocess.detectors import DlibDetector, FileLandmarks, MtcnnDetector, make_detector
    from facelab.data.preprocess.doctor import PreparedPhoto, prepare_photo
    from facelab.data.preprocess.faces import Face, FaceDetector
    from facelab.data.preprocess.photos import prepare_photos
    from facelab.data.preprocess.verdict import Check, Limits

_HOMES = {
    "CameraEstimator": "cameras",
    "Check": "verdict",
    "Deep3dCamera": "cameras",
    "DlibDetector": "detectors",
    "Face": "faces",
    "FaceDetector": "faces",
    "FileLandmarks": "detectors",
    "Limits": "verdict",
    "MtcnnDetector": "detectors",
    "PreparedPhoto": "doctor",
    "make_camera_estimator": "cameras",
    "make_detector": "detectors",
    "prepare_photo": "doctor",
    "prepare_photos": "photos",
}
__all__ = [
    "CameraEstimator",
    "Check",
    "Deep3dCamera",
    "DlibDetector",
    "Face",
    "FaceDetector",
    "FileLandmarks",
    "Limits",
    "MtcnnDetector",
    "PreparedPhoto",
    "make_camera_estimator",
    "make_detector",
    "prepare_photo",
    "prepare_photos",
]


def __getattr__(name: str):
    """Import on first use: the command line wants no torch before a command runs."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"facelab.data.preprocess.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'facelab.data.preprocess' has no attribute {name!r}")
