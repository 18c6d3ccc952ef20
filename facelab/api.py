# SPDX-License-Identifier: Apache-2.0
"""The public Python API: open a checkpoint, sample, render, extract a mesh.

>>> import facelab
>>> model = facelab.load("fenerf_synthetic_64")
>>> picture = model.sample(seed=3, settings=model.settings(16, 1))
>>> picture.rgb.shape, picture.semantics.shape
(torch.Size([1, 3, 16, 16]), torch.Size([1, 19, 16, 16]))
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from facelab.cameras import Camera
from facelab.config import from_dict, to_dict
from facelab.data.classes import PALETTE
from facelab.deviations import Deviation, active
from facelab.draws import Draws
from facelab.errors import TAKE_A_MODEL, TAKE_IT_AGAIN, UserError, an, nearest
from facelab.generator import Codes, GeneratorOutput, Scene, fill_output
from facelab.methods import load_method
from facelab.rendering.background import FILL_VALUES
from facelab.rendering.settings import RenderSettings

if TYPE_CHECKING:
    from facelab.inference.shapes import HeadField

PICKLES = (".pth", ".pt", ".pkl", ".ckpt", ".tar")
PREFERRED_WEIGHTS = ("ema", "generator", "ema_slow")


def load(path: str | Path, device: str | torch.device = "cpu", weights: str | None = None) -> FaceModel:
    """Open a facelab checkpoint: a run folder, a checkpoint folder or a single ``.safetensors`` model.

    Method and configuration come from the file; nothing in it is executed. Files of the original
    programs are converted first (``scripts/convert_checkpoint.py``).

    Args:
        path: where it lies, or the name of a bundled model (``networks/manifest.yaml``).
        device: where the generator goes.
        weights: ``ema`` (default where present), ``ema_slow`` or ``generator`` (not averaged).

    Raises:
        UserError: no such file, damaged, or without a generator; one line.

    >>> load("fenerf_synthetic_64").method
    'fenerf'
    """
    from facelab.checkpoints.format import load_checkpoint

    found = locate(path, own=True)
    checkpoint = load_checkpoint(found, device="cpu", with_state=False)
    missing = {"method", "config"} - set(checkpoint.meta)
    if missing:
        lacks = " and ".join(sorted(missing))
        raise UserError(f"{path} does not say its {lacks}, so no model can be built from it; {TAKE_A_MODEL}")
    method = load_method(str(checkpoint.meta["method"]))
    staged = from_dict(method.config_type, checkpoint.meta["config"], where=str(path))  # type: ignore[arg-type]
    config = staged.at(int(checkpoint.step), int(checkpoint.meta.get("images", 0)))  # type: ignore[call-overload]
    available = [name for name in PREFERRED_WEIGHTS if name in checkpoint.weights]
    if weights is not None and weights not in available:
        raise UserError(f"{path} has no weights '{weights}', it has {', '.join(available) or 'no generator at all'}")
    if not available:
        held = ", ".join(sorted(checkpoint.weights)) or "nothing"
        raise UserError(f"{path} holds no generator, only {held}; {TAKE_A_MODEL}")
    generator = method.build_generator(config)
    chosen = checkpoint.weights[weights or available[0]]
    check_finite(path, chosen)
    state = {k: v.float() if v.is_floating_point() else v for k, v in chosen.items()}
    try:
        generator.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path}: the weights do not fit the stored configuration ({reason}); {TAKE_IT_AGAIN}"
        ) from error
    generator.eval().requires_grad_(False).to(device)
    if generator.field_net.precision == "fp16" and torch.device(device).type == "cpu":
        generator.field_net.precision = "fp32"  # the fused kernels are for GPUs
    if not generator.has_averages:
        generator.update_averages()
    return FaceModel(method, generator, config, dict(checkpoint.meta), Path(path))


def check_finite(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """UserError where weights hold NaN or infinite numbers; names the first tensor."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(
                f"{path}: '{name}' holds NaN or infinite numbers, expected weights that make pictures; take an earlier "
                "checkpoint, or convert or download the file again"
            )


def locate(path: str | Path, own: bool = False) -> Path:
    """The path, or the file of a bundled model of that name; with ``own``, UserError for an original program's file."""
    from facelab.assets import find_bundled

    found = Path(path) if Path(path).exists() else find_bundled(str(path)) or Path(path)
    if own and found.is_file() and found.suffix in PICKLES:
        raise UserError(
            f"{path} is a file of an original program, expected a facelab checkpoint or .safetensors model; "
            f"convert it first: python scripts/convert_checkpoint.py auto {path} models"
        )
    return found


class FaceModel:
    """A generator with its configuration, ready for use.

    Attributes:
        method: name of the method, for example ``fenerf``.
        config: typed configuration of the run, at the checkpoint's step.
        generator: the module, a :class:`facelab.generator.Generator`.
        meta: what the checkpoint says of itself (step, images, deviations ...).
        path: where it came from.
        subset: regions that are shown alone, see :meth:`only`; None: the whole head.
        noise: maps of the decoder by layer in place of the stored ones, see :meth:`with_noise`.
    """

    def __init__(
        self,
        method: Any,
        generator: Any,
        config: Any,
        meta: Mapping[str, Any],
        path: Path,
        subset: Any = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._method = method
        self.method: str = method.name
        self.generator = generator
        self.config = config
        self.meta = dict(meta)
        self.path = path
        self.subset = subset
        self.noise = noise

    def _with(self, **changes: Any) -> FaceModel:
        """The same model with another generator, config, subset or noise."""
        names = ("generator", "config", "meta", "path", "subset", "noise")
        return FaceModel(self._method, **{name: changes.get(name, getattr(self, name)) for name in names})

    @property
    def device(self) -> torch.device:
        """Where the generator lives."""
        return next(self.generator.parameters()).device

    @property
    def has_labels(self) -> bool:
        """Whether pictures come with a segmentation."""
        return bool(self.region_names) or getattr(self.generator.config.field, "label_layers", 0) > 0

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the regions that a head is composed of, in the order of its labels; none for most methods."""
        return getattr(self.generator, "region_names", ())

    @property
    def palette(self) -> Sequence[tuple[int, int, int]]:
        """Colour of each label, 0..255."""
        return getattr(self.generator, "palette", PALETTE)

    @property
    def has_raw(self) -> bool:
        """Whether a network enlarges the rendering, so that there is a raw picture beside the final one."""
        return self._decoder is not None or getattr(self.config.model, "superresolution_kind", None) is not None

    @property
    def _decoder(self) -> Any:
        """Configuration of the network that draws the picture from renderings of one size, or None."""
        return getattr(self.generator.config, "decoder", None)

    @property
    def depth_range(self) -> tuple[float, float]:
        """Distances from the camera between which a head lies, scene units: the colours of depth pictures."""
        return self._method.depth_range(self.config)

    @property
    def view(self) -> Any:
        """Where this model's cameras stand: ``fov`` in degrees and ``cameras(pitch, yaw, fov)``."""
        return self._method.view(self.config)

    @property
    def state(self) -> dict[str, Tensor]:
        """The generator's weights and stored averages by name."""
        return self.generator.state_dict()

    @property
    def deviations(self) -> list[Deviation]:
        """Where this model's configuration differs from the original program by default."""
        return active(self._method.deviations, self.config.reference)

    def filled_with(self, color: str) -> FaceModel:
        """The same model with another colour in empty rays: black, white, grey or light_grey. UserError otherwise."""
        if not hasattr(self.config.render, "fill_color"):
            raise UserError(f"{an(self.method)} model leaves empty rays as they are, so it takes no fill colour")
        if color not in FILL_VALUES:
            known = ", ".join(FILL_VALUES)
            raise UserError(f"unknown fill colour {color!r}, expected one of {known}.{nearest(color, FILL_VALUES)}")
        render = dataclasses.replace(self.config.render, fill_color=color)
        return self._with(config=dataclasses.replace(self.config, render=render))

    def only(self, regions: str | Iterable[str | int], carve: bool | None = None) -> FaceModel:
        """The same model showing some regions of its heads alone, in pictures and meshes (CNeRF).

        Args:
            regions: names (``"eye,nose"``); numbers are understood, with a warning that names them.
            carve: True: the other regions are taken away; False: they only give the decoder no features, as in the
                original; None: as configured.

        Raises:
            UserError: an unknown region, with the nearest name, or a model whose heads have no regions.
        """
        if not self.region_names:
            raise UserError(f"heads of {an(self.method)} model are not composed of regions; expected a CNeRF model")
        return self._with(subset=self.generator.subset(regions, carve))

    def with_noise(self, maps: Mapping[str, Tensor]) -> FaceModel:
        """The same model with other noise maps of its decoder: those that were found with an inverted head."""
        return self._with(noise=maps or None)

    def truncated_twice(self) -> FaceModel:
        """The same model with the original's truncation of StyleSDF and CNeRF: psi acts about as its square."""
        if not hasattr(self.generator.config, "double_truncation"):
            raise UserError(
                f"the original truncates the codes of this {self.method} model once; drop the double truncation"
            )
        generator = copy.copy(self.generator)  # shares the weights
        generator.config = dataclasses.replace(generator.config, double_truncation=True)
        reference = dataclasses.replace(self.config.reference, double_truncation=True)
        return self._with(generator=generator, config=dataclasses.replace(self.config, reference=reference))

    def fast(self, precision: str = "fp16") -> FaceModel:
        """The same model for fast pictures: fp32, tf32, fp16, bf16 or fp16_all, as CUDA graphs on a GPU.

        What that costs in exactness says :func:`facelab.inference.fast.measure_error`. UserError for another name.
        """
        from facelab.inference.fast import accelerate

        return self._with(generator=accelerate(self.generator, precision))

    def latents(self, seed: int | Iterable[int]) -> dict[str, Tensor]:
        """Latent codes of one or more seeds, the same on every device and those of the original program.

        pi-GAN and FENeRF draw the codes of a seed one after the other (geometry, then appearance) as
        ``torch.manual_seed(seed); torch.randn(1, 256)`` does, EG3D as
        ``numpy.random.RandomState(seed).randn(1, 512)`` does. UserError for a seed that cannot be one.

        >>> model = load("fenerf_synthetic_64")
        >>> {name: tuple(code.shape) for name, code in model.latents([0, 7]).items()}
        {'geo': (2, 128), 'app': (2, 128)}
        """
        seeds = [seed] if isinstance(seed, int) else list(seed)
        rows = [self._method.seed_latents(self.generator.latent_spec, one) for one in seeds]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in self.generator.latent_spec}

    @torch.no_grad()
    def codes(self, seed: int | Iterable[int] = 0, truncation: float = 0.7, cutoff: int | None = None) -> Codes:
        """Mapped codes of seeds; ``truncation`` 1 is the full variety, 0 the average head.

        ``cutoff``: only the first so many layers are truncated (EG3D, by default 14 as in the original's
        programs). A model that is told a camera (EG3D) is told the one in front of the face.

        Raises:
            UserError: a cutoff for a model that has one code for all layers.

        >>> model = load("fenerf_synthetic_64")
        >>> {name: tuple(code.shape) for name, code in model.codes(seed=3).values.items()}
        {'geo': (1, 2, 1024), 'app': (1, 2, 384)}
        """
        layers = self._method.truncated_layers
        if layers is None:
            if cutoff is not None:
                raise UserError(
                    f"{an(self.method)} model has one code for all layers, so it takes no truncation cutoff"
                )
            return self.generator.map(self.latents(seed), truncation=truncation)
        layers = layers if cutoff is None else cutoff
        return self.generator.map(self.latents(seed), truncation=truncation, cutoff=layers)

    def camera(self, pitch: float = 0.0, yaw: float = 0.0, fov: float | None = None) -> Camera:
        """A camera at the model's distance; pitch (up) and yaw in radians away from the frontal view, fov in degrees.

        >>> model = load("fenerf_synthetic_64")
        >>> [round(x, 2) for x in model.camera(yaw=0.3).angles[0].tolist()]
        [1.57, 1.87]
        """
        if fov is not None and not 0 < fov < 180:
            raise UserError(f"the field of view must lie within 0..180 degrees, got {fov:g}")
        return self.view.cameras(torch.pi / 2 - pitch, torch.pi / 2 + yaw, fov).to(self.device)

    def settings(
        self, resolution: int | None = None, ray_step_multiplier: int = 2, lock_view: bool = False
    ) -> RenderSettings:
        """Inference settings of this model: image side in pixels, factor on the samples per ray.

        >>> model = load("fenerf_synthetic_64")
        >>> small = model.settings(resolution=16, ray_step_multiplier=1)
        >>> small.resolution, small.jitter
        (16, False)
        """
        if self._decoder is not None and resolution not in (None, self._decoder.in_resolution):
            raise UserError(
                f"the decoder of this {self.method} model reads renderings of {self._decoder.in_resolution} pixels, "
                f"got {resolution}; leave the image size out"
            )
        return self._method.inference_settings(self.config, resolution, ray_step_multiplier, lock_view)

    @torch.no_grad()
    def scene(self, code: Codes) -> Scene:
        """What does not depend on the camera, of codes of N heads: computed once, rendered from many cameras."""
        code = code.to(self.device)
        scene = self.generator.scene(code) if self.noise is None else self.generator.scene(code, self.noise)
        return scene if self.subset is None else scene.replace(subset=self.subset)

    @torch.no_grad()
    def sample(
        self,
        seed: int | Iterable[int] = 0,
        code: Codes | None = None,
        camera: Camera | None = None,
        *,
        truncation: float = 0.7,
        settings: RenderSettings | None = None,
        fill: bool = True,
    ) -> GeneratorOutput:
        """Pictures of seeds, or of given codes, from one camera each (default: frontal).

        See :meth:`render` for what comes back.

        >>> model = load("fenerf_synthetic_64")
        >>> model.sample(seed=[0, 1], settings=model.settings(16, 1)).depth.shape
        torch.Size([2, 1, 16, 16])
        """
        codes = code if code is not None else self.codes(seed, truncation)
        return self.render(codes, camera, settings=settings, fill=fill)

    @torch.no_grad()
    def render(
        self,
        scene: Scene | Codes,
        camera: Camera | None = None,
        *,
        settings: RenderSettings | None = None,
        fill: bool = True,
        seed: int = 0,
    ) -> GeneratorOutput:
        """Render a scene (or codes) from cameras; one scene and many cameras broadcasts.

        Args:
            scene: codes, or a scene that was computed once for many cameras.
            camera: N cameras, default one frontal camera per scene.
            settings: default :meth:`settings`.
            fill: give empty rays the fill colour and prepend the background class to the labels; models that draw the
                background themselves stay as they are.
            seed: of random depths and noise maps, where settings and ``reference.random_inference`` ask for any.

        Returns:
            rgb in [-1, 1], depth, opacity, semantics with background as channel 0 (if the model has labels).

        >>> model = load("fenerf_synthetic_64")
        >>> sides = Camera.cat([model.camera(yaw=-0.3), model.camera(yaw=0.3)])
        >>> model.render(model.codes(3), sides, settings=model.settings(16, 1)).rgb.shape
        torch.Size([2, 3, 16, 16])
        """
        made: Scene = self.scene(scene) if isinstance(scene, Codes) else scene
        camera = self.camera() if camera is None else camera.to(self.device)
        if len(camera) == 1 and made.count > 1:
            camera = Camera.cat([camera] * made.count)
        draws = Draws(seed).at(phase="inference")
        if getattr(self.config.reference, "random_inference", False) and hasattr(self.generator, "with_noise"):
            made = self.generator.with_noise(made, draws)
        output = self.generator.render(made, camera, settings or self.settings(), draws)
        if not fill or output.semantics is None or not getattr(self._method, "fills_empty", True):
            return output
        color = getattr(self.config.render, "fill_color", "black")
        return fill_output(output, color, getattr(self.config.reference, "fill_labels", False))

    def label_map(self, output: GeneratorOutput) -> Tensor:
        """Class of each pixel of a filled picture: (N, S, S) integers, CelebAMask-HQ classes 0..18 or regions.

        Where other regions are carved away (:meth:`only`), what no region claims by half is 0, background.

        >>> model = load("fenerf_synthetic_64")
        >>> labels = model.label_map(model.sample(3, settings=model.settings(16, 1)))
        >>> labels.shape, bool((labels == 1).any())  # 1 is skin
        (torch.Size([1, 16, 16]), True)
        """
        if output.semantics is None:
            raise UserError(f"this {self.method} model has no labels, so there is no segmentation to show")
        labels = output.semantics.argmax(dim=1)
        if self.subset is None or not self.subset.carve:
            return labels
        return labels.masked_fill(output.semantics.amax(dim=1) < 0, 0)  # half of a mask; what is carved away scores -1

    @torch.no_grad()
    def extract_mesh(
        self,
        seed: int = 0,
        code: Codes | None = None,
        *,
        resolution: int = 256,
        cube_size: float | None = None,
        level: float | None = None,
        truncation: float = 0.5,
        max_points: int = 100_000,
        reference_lattice: bool | None = None,
        colored: bool = True,
        aligned: bool = False,
    ) -> Any:
        """The surface of a head, or of the regions of :meth:`only`, as a :class:`facelab.mesh.io.Mesh`.

        Args:
            seed, code, truncation: which head.
            resolution: lattice points per side; of the aligned way rays per side and depths of each.
            cube_size: side of the cube around the origin, scene units; default: what holds a head.
            level: on the surface; default: a raw density of 10, or a signed distance of 0.
            max_points: field evaluations at a time.
            reference_lattice: the original's: sheared for densities, the aligned way with its arithmetic for signed
                distances; default as configured.
            colored: ask the field for the vertex colours.
            aligned: along the rays of the frontal camera, then resampled to a box, as StyleSDF does; ``cube_size`` is
                not used. Signed distances only.

        Raises:
            UserError: the field never crosses the level; names its range. Densities along rays.

        >>> model = load("fenerf_synthetic_64")
        >>> mesh = model.extract_mesh(seed=3, resolution=24, cube_size=0.24)
        >>> mesh.vertices.shape[1], mesh.faces.shape[1]
        (3, 3)
        """
        from facelab.inference.shapes import frustum_mesh, lattice_mesh

        scene = self.scene(code if code is not None else self.codes(seed, truncation))
        field = self._field_of(scene)
        switch = "skewed_shapes" if field.is_distance else "sheared_lattice"
        configured = getattr(self.config.reference, switch, False)
        reference = configured if reference_lattice is None else reference_lattice
        if aligned or (reference and field.is_distance):
            settings = self._method.inference_settings(self.config).replace(
                resolution=resolution, samples_coarse=resolution, max_points=max_points
            )
            return frustum_mesh(
                self.generator, scene, self.camera(), settings, level=level, colored=colored, reference=reference
            )
        cube = self.head_cube if cube_size is None else cube_size
        return lattice_mesh(field, resolution, cube, level, max_points, colored=colored, sheared=reference)

    @property
    def head_cube(self) -> float:
        """Side of a cube around the origin that holds a head, scene units."""
        return self._method.head_cube(self.config)

    def density(self, code: Codes) -> Callable[[Tensor], Tensor]:
        """The density of a head, raw where its field has no distance: (P, 3) points in scene units -> (P,)."""
        return torch.no_grad()(self.head_field(code).density)

    def head_field(self, code: Codes) -> HeadField:
        """The field of one head as functions of points: density, signed distance where it has one, colour."""
        return self._field_of(self.scene(code))

    def _field_of(self, scene: Scene) -> HeadField:
        from facelab.inference.shapes import HeadField

        return HeadField.of(self.generator, scene)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write a single-file model (``.safetensors``) that :func:`load` reads.

        >>> model = load("fenerf_synthetic_64")
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(model.save(Path(folder) / "copy.safetensors"))
        >>> again.config == model.config
        True
        """
        from facelab.checkpoints.format import export_model

        meta = {**self.meta, "method": self.method, "config": to_dict(self.config)}
        return export_model(path, {"ema": self.state}, meta, dtype=dtype)


def mixed_codes(first: Codes, second: Codes, kind: str, t: Sequence[float]) -> list[Codes]:
    """Codes along an interpolation: ``geo``, ``app``, ``both`` or ``non`` (see inference.interpolation)."""
    from facelab.inference.interpolation import straight_codes

    return list(straight_codes([first, second], kind, t))
