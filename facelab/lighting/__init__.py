# SPDX-License-Identifier: Apache-2.0
"""Light as second-order spherical harmonics: nine numbers, or nine per colour channel.

- :mod:`~facelab.lighting.harmonics`: the basis, shading, lamps and even light;
- :mod:`~facelab.lighting.projection`: functions of direction -> nine numbers; lobes; FaceDNeRF's lights;
- :mod:`~facelab.lighting.frames`: rotation, a camera's view of a light, DPR's axes and scale;
- :mod:`~facelab.lighting.description`: lights as users write them (names, YAML, numbers, panoramas);
- :mod:`~facelab.lighting.environment`: panoramas;
- :mod:`~facelab.lighting.agreement`: found lights against known ones;
- :mod:`~facelab.lighting.fitting`: the light in a picture whose normals are known;
- :mod:`~facelab.lighting.colour`: lightness and Lab;
- :mod:`~facelab.lighting.portrait`: random portrait lights, pictures of lights.
"""

from facelab.lighting.agreement import LightAgreement, light_agreement
from facelab.lighting.colour import lab, lightness, srgb_from_lab, with_lightness
from facelab.lighting.description import light_from_text, light_from_yaml
from facelab.lighting.environment import environment_light, read_panorama
from facelab.lighting.fitting import fit_light, shading_correlation
from facelab.lighting.frames import (
    from_dpr,
    from_viewer,
    grey,
    rotate,
    seen_by,
    switch_phase,
    to_dpr,
    viewer_axes,
)
from facelab.lighting.harmonics import (
    C0,
    C1,
    C2,
    C3,
    C4,
    LOBE,
    ambient,
    basis,
    directional,
    main_direction,
    shade,
)
from facelab.lighting.portrait import UNIFORMS, light_from_uniform, random_light, sphere_picture
from facelab.lighting.projection import (
    PRESETS,
    light_from_function,
    lobe,
    polar_basis,
    polar_directions,
    preset,
    project,
    reference_light,
)

__all__ = [
    "C0", "C1", "C2", "C3", "C4", "LOBE", "PRESETS", "UNIFORMS", "LightAgreement", "ambient", "basis", "directional",
    "environment_light", "fit_light", "from_dpr", "from_viewer", "grey", "lab", "light_agreement",
    "light_from_function", "light_from_text", "light_from_uniform", "light_from_yaml", "lightness", "lobe",
    "main_direction", "polar_basis", "polar_directions", "preset", "project", "random_light", "read_panorama",
    "reference_light", "rotate", "seen_by", "shade", "shading_correlation", "sphere_picture", "srgb_from_lab",
    "switch_phase", "to_dpr", "viewer_axes", "with_lightness",
]  # fmt: skip
