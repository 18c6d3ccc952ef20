# SPDX-License-Identifier: Apache-2.0
"""CNeRF's field: K local generators side by side, and a base shape that they change (arXiv 2302.01579, section 3).

All regions go through each layer in one batched product; nothing loops over them. The distance's gradient is pulled
back from the distance to the points as ordinary tensors (:func:`distance_gradient`): it costs one more product per
layer, and a loss on it needs one ordinary backward.

Shape legend: N scenes, K regions, L = D + 2 layers (D of shape, two of texture), P = R S points, C width, W width of
a code. Axis T of :mod:`facelab.nn.film` is 1 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from facelab.fields.output import FieldOutput
from facelab.fields.sdf import BETA_START
from facelab.methods.cnerf.fusion import RegionValues, Subset, fuse, fuse_features
from facelab.methods.cnerf.mixing import TEXTURE_LAYERS
from facelab.methods.cnerf.passes import Plan, evaluate, phase, sine, wide
from facelab.nn.film import FilmLinear, FilmSine, StackedLinear, affine, sine_affine
from facelab.tensors import constant

Layers = Sequence[FilmLinear]
BASE_OF = slice(0, 1)  # the region whose codes shape the base: the background


@dataclass(frozen=True)
class CNerfFieldConfig:
    """Architecture of the field; the defaults are those of the released model.

    Attributes:
        regions: K.
        depth: D, shape layers of a local generator.
        width: C.
        style_dim: W.
        box_side: points are multiplied by 2 / box_side, far minus near of the cameras; None: as they are.
    """

    regions: int = 9
    depth: int = 3
    width: int = 128
    style_dim: int = 256
    box_side: float | None = 0.24

    def __post_init__(self) -> None:
        if min(self.regions, self.depth, self.width, self.style_dim) < 1:
            raise ValueError(f"regions, depth, width and style_dim are at least 1, got {self}")
        if self.box_side is not None and not self.box_side > 0:
            raise ValueError(f"box_side must be positive or None, got {self.box_side}")

    @property
    def scale(self) -> float:
        """Factor from scene units to what the networks see."""
        return 1.0 if self.box_side is None else 2 / self.box_side


@dataclass(frozen=True)
class Sines:
    """Sines behind a layer (N, K, 1, P, C): taken, or, where a backward will want it, what they are to be taken of."""

    tensor: Tensor
    taken: bool = False

    def affine(self, weight: Tensor, bias: Tensor) -> Tensor:
        """``W sin + b`` with weights (N, K, O, C) and biases (N, K, O) -> (N, K, 1, P, O)."""
        if self.tensor.dtype == torch.float16:
            flat = (self.tensor.flatten(0, 2), weight.flatten(0, 1), bias.flatten(0, 1))
            return phase(*flat).unflatten(0, self.tensor.shape[:3])
        return (affine if self.taken else sine_affine)(self.tensor, weight, bias)

    def select(self, regions: Sequence[int]) -> Sines:
        """Those of some regions."""
        return Sines(self.tensor[:, list(regions)], self.taken)


@dataclass(frozen=True)
class Heads:
    """Linear maps of the sines to masks and to distances with raw colours.

    Attributes:
        mask: (K, 1, C), behind the shape layers.
        values: (K, 4, C), behind the texture layers: distance and colour.
        seen, bias: (K, 4, 3) and (K, 4) of mask and colour, by the view directions.
        sdf_bias: (K, 1).
    """

    mask: Tensor
    values: Tensor
    seen: Tensor
    bias: Tensor
    sdf_bias: Tensor

    def seen_from(self, mask: Tensor, values: Tensor, directions: Tensor) -> RegionValues:
        """Products (N, K, P, 1) and (N, K, P, 4), without biases, and directions (N, R, 3) -> what the field says."""
        rays = directions.shape[1]
        mask, values = (x.unflatten(2, (rays, -1)) for x in (mask, values))  # N, K, R, S, ...
        seen = of_directions(directions, self.seen, self.bias)[..., None, :]
        rgb = values[..., 1:] + seen[..., 1:]
        return RegionValues(rgb, values[..., 0] + self.sdf_bias[..., None], mask[..., 0] + seen[..., 0])


class LocalGenerators(nn.Module):
    """``count`` local generators with weights stacked along the first axis.

    ``layers`` are the shape layers, then the two texture layers; the mask is read behind the shape layers, distance,
    feature and colour behind the texture layers. Parameters are zero until :meth:`reset_parameters`.
    """

    def __init__(self, count: int, config: CNerfFieldConfig) -> None:
        super().__init__()
        self.depth, width = config.depth, config.width
        self.layers = nn.ModuleList(
            FilmSine(3 if layer == 0 else width, width, config.style_dim, count, first=layer == 0)
            for layer in range(config.depth + TEXTURE_LAYERS)
        )
        self.mask = StackedLinear(width + 3, 1, "freq", count)
        self.sdf = StackedLinear(width, 1, "freq", count)
        self.feature = StackedLinear(width + 3, width, "normal", count)
        self.rgb = StackedLinear(width, 3, "freq", count)

    def modulate(self, styles: Tensor) -> tuple[FilmLinear, ...]:
        """Styles (N, K, L, W) -> layers with weights (N, K, C, I)."""
        return tuple(layer.modulate(styles[:, :, i]) for i, layer in enumerate(self._films()))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all parameters (StyleSDF's rules)."""
        for module in (*self._films(), self.mask, self.sdf, self.feature, self.rgb):
            module.reset_parameters(generator)

    def _films(self) -> list[FilmSine]:
        return [layer for layer in self.layers if isinstance(layer, FilmSine)]

    def distance(self, points: Tensor, layers: Layers) -> Tensor:
        """(N, P, 3) points -> (N, P) distance, summed over the generators."""
        return self.distance_of(run_layers(points, layers, len(layers))[1])

    def distance_of(self, texture: Sines) -> Tensor:
        """Distance (N, P) summed over the generators, from the sines of the last layer."""
        head = self.sdf.of_scenes(len(texture.tensor))
        return texture.affine(head.weight, head.bias)[:, :, 0, :, 0].sum(1)

    def color_head(self) -> tuple[Tensor, Tensor]:
        """Feature and colour layer as one: nothing lies between them. Weight (K, 3, C + 3), bias (K, 3)."""
        weight = torch.bmm(self.rgb.weight, self.feature.weight)
        return weight, torch.baddbmm(self.rgb.bias[..., None], self.rgb.weight, self.feature.bias[..., None])[..., 0]

    def values(self, shape: Sines, texture: Sines, directions: Tensor) -> RegionValues:
        """Distances, masks and raw colours.

        Args:
            shape, texture: behind the shape and the texture layers.
            directions: (N, R, 3); P is R S.
        """
        heads = self.heads()
        mask, sdf_rgb = (
            self._of_points(x, weight)[:, :, 0] for x, weight in ((shape, heads.mask), (texture, heads.values))
        )
        return heads.seen_from(mask, sdf_rgb, directions)

    def heads(self) -> Heads:
        """What masks, distances and raw colours are read with."""
        (weight, bias), width = self.color_head(), self.sdf.weight.shape[-1]
        values = torch.cat([self.sdf.weight, weight[..., :width]], dim=1)
        seen = torch.cat([self.mask.weight, weight], dim=1)[..., width:]
        return Heads(self.mask.weight[..., :width], values, seen, torch.cat([self.mask.bias, bias], 1), self.sdf.bias)

    def features(self, texture: Sines, directions: Tensor, mask: Tensor, kept: Sequence[int] | None) -> Tensor:
        """Fused features (N, R, S, C) of all or some regions; arguments as in :meth:`values`, masks (N, K, R, S)."""
        weight, bias, width = self.feature.weight, self.feature.bias, texture.tensor.shape[-1]
        if kept is not None:
            texture, mask = texture.select(kept), mask[:, list(kept)]
            weight, bias = weight[list(kept)], bias[list(kept)]
        seen = of_directions(directions, weight[..., width:], bias)  # N, K, R, C: the same for all samples of a ray
        of_rays = torch.einsum("nkrs,nkrc->nrsc", mask, seen)
        if texture.taken and not torch.is_grad_enabled():
            return masked_product(texture.tensor[:, :, 0], mask, weight[..., :width]) + of_rays
        points = self._of_points(texture, weight[..., :width])[:, :, 0].unflatten(2, mask.shape[2:])
        return fuse_features(points, mask) + of_rays

    @staticmethod
    def _of_points(sines: Sines, weight: Tensor) -> Tensor:
        """Weight (K, O, C) on (N, K, 1, P, C) -> (N, K, 1, P, O)."""
        stacked = weight.expand(len(sines.tensor), *weight.shape)
        return sines.affine(stacked, stacked.new_zeros(stacked.shape[:-1]))


class CNerfField(nn.Module):
    """Local generators of all regions, the base shape under them, and the width ``beta`` of the density.

    Attributes:
        precision: what the regions' products take: ``fp32`` (``tf32``: the same, rounded as the device is told to),
            or ``fp16`` operands with everything else in float32, see :mod:`facelab.methods.cnerf.passes`; without
            effect where derivatives are recorded but no gradient of the distance is asked for. The base is float32.
        fused: the passes of a training step are compiled, on a GPU.
    """

    precision: Literal["fp32", "tf32", "fp16"] = "fp32"
    fused: bool = False

    def __init__(self, config: CNerfFieldConfig) -> None:
        super().__init__()
        self.config = config
        self.regions = LocalGenerators(config.regions, config)
        self.base = LocalGenerators(1, config)  # the original's init_network; only its distance is used
        self.beta = nn.Parameter(torch.full((1,), BETA_START))

    def bind(
        self,
        styles: Tensor,
        *,
        features: bool = True,
        subset: Subset | None = None,
        residual_gradient: bool = False,
        base_gradient: bool = False,
    ) -> BoundCNerf:
        """The field of N scenes.

        Args:
            styles: (N, K, L, W).
            features: also give features; False saves a fifth of the work.
            subset: some regions only.
            residual_gradient: gradients leave the base out, as the original's eikonal term does.
            base_gradient: derivatives flow through the base too; the original's never do.

        Raises:
            ValueError: styles of another shape, regions that do not exist.
        """
        c = self.config
        wanted = (c.regions, c.depth + TEXTURE_LAYERS, c.style_dim)
        if styles.ndim != 4 or tuple(styles.shape[1:]) != wanted:
            raise ValueError(f"styles must be (N, {', '.join(map(str, wanted))}), got {tuple(styles.shape)}")
        if subset is not None:
            subset.check(c.regions)
        with torch.autocast(styles.device.type, enabled=False):
            styles = _at_least_float32(styles)
            layers = self.regions.modulate(styles)
            with torch.set_grad_enabled(torch.is_grad_enabled() and base_gradient):
                base = self.base.modulate((styles if base_gradient else styles.detach())[:, BASE_OF])
        return BoundCNerf(self, layers, base, features, subset, residual_gradient, base_gradient)

    def base_distance(self, points: Tensor, styles: Tensor) -> Tensor:
        """(N, R, S, 3) points in scene units -> (N, R, S, 1) distance to the base shape, with gradient."""
        layers = self.base.modulate(styles[:, BASE_OF])
        distance = self.base.distance(points.flatten(1, 2) * self.config.scale, layers)
        return distance.unflatten(1, points.shape[1:3])[..., None]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all parameters."""
        self.regions.reset_parameters(generator)
        self.base.reset_parameters(generator)
        self.beta.fill_(BETA_START)


@dataclass(frozen=True)
class BoundCNerf:
    """The field with its codes filled in: a :class:`~facelab.fields.sdf.DistanceField`.

    Everything is computed in float32 at least, because sines of large arguments amplify rounding. One scene may be
    asked for any number of cameras, N scenes for N.
    """

    net: CNerfField
    layers: tuple[FilmLinear, ...]
    base: tuple[FilmLinear, ...]
    with_features: bool = True
    subset: Subset | None = None
    residual_gradient: bool = False
    base_gradient: bool = False

    def __call__(self, points: Tensor, directions: Tensor) -> FieldOutput:
        """Points (N, R, S, 3) in scene units, view directions (N, R, 3) -> values."""
        return self._evaluate(points, directions, False)[0]

    def with_gradient(self, points: Tensor, directions: Tensor) -> tuple[FieldOutput, Tensor]:
        """Values, and the gradient (N, R, S, 3) of the distance with respect to the points in scene units.

        A subset does not change it: it is that of the whole head. With ``residual_gradient`` the base is left out.
        """
        output, gradient = self._evaluate(points, directions, True)
        assert gradient is not None
        return output, gradient

    def distances(self, points: Tensor) -> Tensor:
        """(N, R, S, 3) points -> (N, R, S, 1) signed distance alone: meshes. Regions are carved as seen from the front."""
        if self.subset is not None and self.subset.carve:
            front = constant((0.0, 0.0, -1.0), points.device, points.dtype).expand(*points.shape[:2], 3)
            sdf = self.without_features()(points, front).sdf
            assert sdf is not None
            return sdf
        scaled = self._of_scenes(points).flatten(1, 2) * self.net.config.scale
        with torch.autocast(points.device.type, enabled=False):
            distance = self.net.regions.distance(scaled, self.layers) + self._base(scaled, False)[0]
        return distance.reshape(*points.shape[:3], 1)

    def without_features(self) -> BoundCNerf:
        """The same field that does not evaluate its features."""
        return replace(self, with_features=False)

    def region(self, channel: int) -> BoundCNerf:
        """The field of one region alone, carved out: for its mesh."""
        return replace(self, subset=Subset((channel,)))

    def _evaluate(self, points: Tensor, directions: Tensor, gradient: bool) -> tuple[FieldOutput, Tensor | None]:
        flat, seen = self._of_scenes(points), self._of_scenes(directions)
        with torch.autocast(points.device.type, enabled=False):
            output, slope = self._flat(flat, seen, gradient)
        if len(points) == len(flat):
            return output, slope
        output = output._map(lambda x: x.reshape(len(points), -1, *x.shape[2:]))
        return output, None if slope is None else slope.reshape(points.shape)

    def _of_scenes(self, x: Tensor) -> Tensor:
        """(cameras, R, ...) -> (scenes, R', ...): the cameras of one scene are more rays of it."""
        scenes = len(self.layers[0].weight)
        if scenes not in (1, len(x)):
            raise ValueError(f"{scenes} scenes cannot be seen from {len(x)} cameras: give 1 or {len(x)}")
        return _at_least_float32(x).reshape(scenes, -1, *x.shape[2:])

    def _flat(self, points: Tensor, directions: Tensor, gradient: bool) -> tuple[FieldOutput, Tensor | None]:
        net, scale, grid = self.net, self.net.config.scale, points.shape[1:3]
        scaled = points.flatten(1, 2) * scale
        base, base_slope = self._base(scaled, gradient and not self.residual_gradient)
        if gradient and not self.with_features and not points.requires_grad:
            heads = net.regions.heads()
            plan = Plan(net.config.depth, net.fused and points.is_cuda, net.precision == "fp16")
            found = evaluate(scaled, self.layers, heads.mask, heads.values, plan)
            values = heads.seen_from(found.mask, found.values, directions)
            slope = found.gradient if base_slope is None else found.gradient + base_slope
            return fuse(values, base.unflatten(1, grid), net.beta, self.subset), (scale * slope).unflatten(1, grid)
        half = net.precision == "fp16" and not torch.is_grad_enabled()
        shape, texture, arguments = run_layers(scaled, self.layers, net.config.depth, keep=gradient, half=half)
        values = net.regions.values(shape, texture, directions)
        output = fuse(values, base.unflatten(1, grid), net.beta, self.subset)
        if self.with_features:
            kept = None if self.subset is None else self.subset.channels
            output = replace(output, features=net.regions.features(texture, directions, values.mask, kept))
        if not gradient:
            return output, None
        slope = distance_gradient(arguments, self.layers, net.regions.sdf.weight)
        slope = scale * (slope if base_slope is None else slope + base_slope)
        return output, slope.unflatten(1, grid)

    def _base(self, points: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Distance (N, P) of the base and, if wanted, its gradient (N, P, 3), in the networks' units."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.base_gradient):
            net = self.net.base
            _, last, arguments = run_layers(points, self.base, len(self.base), keep=gradient)
            distance = net.distance_of(last)
            slope = distance_gradient(arguments, self.base, net.sdf.weight) if gradient else None
        return distance, slope


# ---------------------------------------------------------------- layers


def run_layers(
    points: Tensor, layers: Layers, depth: int, keep: bool = False, half: bool = False
) -> tuple[Sines, Sines, list[Tensor]]:
    """Points (N, P, 3) through all layers; ``half``: the sines are float16.

    Returns:
        The sines of layer ``depth`` (counted from 1) and of the last layer; the arguments (N, K, 1, P, C) of all of
        them in order if ``keep``.
    """
    x = points[:, None, None].expand(-1, layers[0].weight.shape[1], -1, -1, -1)
    in_place = not keep and not torch.is_grad_enabled()
    kept: list[Tensor] = []
    middle = sines = Sines(x, taken=True)
    for number, layer in enumerate(layers, start=1):
        argument = sines.affine(layer.weight, layer.bias)
        if keep:
            kept.append(argument)
        if half:
            sines = Sines(sine(argument, torch.float16), True)
        else:
            sines = Sines(argument.sin_() if in_place else argument, in_place)
        if number == depth:
            middle = sines
    return middle, sines, kept


def distance_gradient(arguments: Sequence[Tensor], layers: Layers, head: Tensor) -> Tensor:
    """Gradient of the summed distances with respect to the points that entered the layers.

    From the distance's weights down to the points, ``g = cos(a_l) * (W_(l+1)' g)``. The backward keeps, besides the
    arguments, one tensor of their size for each layer, and computes no product twice. It cannot be differentiated
    again.

    Args:
        arguments: of the sines of all layers, (N, K, 1, P, C).
        head: (K, 1, C) weight of the distances.

    Returns:
        (N, P, 3).
    """
    weights = [layer.weight for layer in layers[1:]]
    pulled = _PullBack.apply(len(arguments), head[:, None], *arguments, *weights)
    return torch.matmul(pulled[:, :, 0], layers[0].weight).sum(1)


def pull_back_plain(head: Tensor, arguments: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """What :func:`distance_gradient` does above the first layer, step by step: its definition.

    Args:
        head: (K, 1, 1, C), the distance by the last sine.
        arguments: L of (N, K, 1, P, C).
        weights: L - 1 of (N, K, C, C), of the layers above the first.

    Returns:
        (N, K, 1, P, C), the distance by what the first layer's sine is taken of.
    """
    pulled = head * torch.cos(arguments[-1])
    for argument, weight in zip(reversed(arguments[:-1]), reversed(weights), strict=True):
        pulled = torch.cos(argument) * _times(pulled, weight)
    return pulled


def _times(rows: Tensor, weight: Tensor) -> Tensor:
    """(N, K, 1, P, O) @ (N, K, O, I) -> (N, K, 1, P, I)."""
    product = torch.bmm(rows.reshape(-1, *rows.shape[-2:]), weight.reshape(-1, *weight.shape[-2:]))
    return product.reshape(*rows.shape[:-1], weight.shape[-1])


class _PullBack(torch.autograd.Function):
    """See :func:`pull_back_plain`. Products are kept, sines and cosines are computed again."""

    @staticmethod
    def forward(ctx: Any, count: int, head: Tensor, *tensors: Tensor) -> Tensor:
        arguments, weights = tensors[:count], tensors[count:]
        products: list[Tensor] = []  # of the layers below the last, from the top
        pulled = head * torch.cos(arguments[-1])
        for argument, weight in zip(reversed(arguments[:-1]), reversed(weights), strict=True):
            products.append(_times(pulled, weight))
            pulled = torch.cos(argument) * products[-1]
        ctx.count = count
        ctx.save_for_backward(head, *tensors, *products)
        return pulled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        count, (head, *tensors) = ctx.count, ctx.saved_tensors
        arguments, weights, products = tensors[:count], tensors[count : 2 * count - 1], tensors[2 * count - 1 :]
        products = [*reversed(products), head]  # by layer, from the bottom
        of_arguments: list[Tensor] = []
        of_weights: list[Tensor] = []
        for layer in range(count - 1):
            argument, weight = arguments[layer], weights[layer]
            of_arguments.append(torch.sin(argument).mul_(products[layer]).mul_(grad).neg_())
            through = torch.cos(argument).mul_(grad)
            upper = torch.cos(arguments[layer + 1]).mul_(products[layer + 1])
            rows, columns = (x.reshape(-1, *x.shape[-2:]) for x in (upper, through))
            of_weights.append(torch.bmm(rows.transpose(1, 2), columns).reshape(weight.shape))
            grad = _times(through, weight.transpose(-1, -2))
        last = arguments[-1]
        of_arguments.append(torch.sin(last).mul_(head).mul_(grad).neg_())
        of_head = torch.cos(last).mul_(grad).sum((0, 3), keepdim=True)[0]
        return None, of_head, *of_arguments, *of_weights


def masked_product(sines: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """``sum over k of m_k W_k s_k`` as one product over regions and width: nothing of K x C numbers a point but its input.

    Args:
        sines: (N, K, P, C).
        mask: (N, K, R, S), P = R S.
        weight: (K, O, C).

    Returns:
        (N, R, S, O) in the weight's type. No derivatives are recorded.
    """
    scenes, regions, points, width = sines.shape
    rows = sines.new_empty(scenes, points, regions, width)
    torch.mul(sines.transpose(1, 2), mask.flatten(2).transpose(1, 2)[..., None].to(sines.dtype), out=rows)
    columns = weight.transpose(1, 2).flatten(0, 1).to(sines.dtype)  # K C, O
    product = wide(rows.flatten(2), columns.expand(scenes, *columns.shape), weight.dtype)
    return product.unflatten(1, mask.shape[2:])


def of_directions(directions: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What view directions (N, R, 3) add behind weights (K, O, 3) and bias (K, O): (N, K, R, O)."""
    return torch.einsum("nrd,kod->nkro", directions, weight) + bias[:, None]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
