# SPDX-License-Identifier: Apache-2.0
"""Build hook: a wheel carries configs/ and the small files of networks/ as facelab/_data."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DATA_SUFFIXES = {".yaml", ".json", ".safetensors", ".md", ".txt"}


class BuildWithData(build_py):
    """Copy the data folders of the checkout into the package; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False):
            return
        for source, target in self._data_files():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        extra = [] if getattr(self, "editable_mode", False) else [str(target) for _, target in self._data_files()]
        return [*super().get_outputs(include_bytecode), *extra]

    def _data_files(self) -> list[tuple[Path, Path]]:
        data = Path(self.build_lib) / "facelab" / "_data"
        return [
            (source, data / source.relative_to(ROOT))
            for folder in ("configs", "networks")
            for source in sorted((ROOT / folder).rglob("*"))
            if source.is_file() and source.suffix in DATA_SUFFIXES
        ]


setup(cmdclass={"build_py": BuildWithData})
