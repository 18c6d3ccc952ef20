# SPDX-License-Identifier: Apache-2.0
"""The mapping network of StyleGAN2 with labels: latent code and label -> style codes.

Shapes: N batch, Z latent width, C label width, W width of a style code, L number of style codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from facelab.nn.stylegan2.layers import FullyConnected, normalize_second_moment, reset_children


class MappingNetwork(nn.Module):
    """Style codes of latent codes, labels, or both (StyleGAN2-ADA, arXiv 2006.06676, section 2 and appendix).

    The latent code and the linearly embedded label are each divided by their root mean square, concatenated, and
    passed through ``num_layers`` leaky-ReLU layers of a small learning rate.

    Args:
        z_dim: width of the latent code; 0: the label alone is mapped.
        c_dim: width of the label; 0: none.
        w_dim: width of the style code.
        num_ws: number of copies of the style code, one for each layer that takes one; None: the code is returned
            as it is, (N, W), without average and truncation (discriminators).
        num_layers: 2 in EG3D's generator, 8 in its discriminator.
        embed_features: width of the embedded label; None: ``w_dim``.
        layer_features: width of the layers in between; None: ``w_dim``.
        w_avg_beta: decay of the running average of the style code; None: there is no average.
        generator: draws the first weights; None: seed 0.

    Raises:
        ValueError: neither a latent code nor a label.
    """

    w_avg: Tensor | None

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        *,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if z_dim <= 0 and c_dim <= 0:
            raise ValueError("a mapping network needs z_dim > 0 or c_dim > 0, got 0 and 0")
        self.z_dim, self.c_dim, self.w_dim, self.num_ws, self.w_avg_beta = z_dim, c_dim, w_dim, num_ws, w_avg_beta
        embedded = (w_dim if embed_features is None else embed_features) if c_dim > 0 else 0
        hidden = w_dim if layer_features is None else layer_features
        widths = [z_dim + embedded, *[hidden] * (num_layers - 1), w_dim]
        self.embed = FullyConnected(c_dim, embedded) if c_dim > 0 else None
        self.layers = nn.ModuleList(
            FullyConnected(a, b, activation=activation, lr_multiplier=lr_multiplier)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        has_average = num_ws is not None and w_avg_beta is not None
        self.register_buffer("w_avg", torch.zeros(w_dim) if has_average else None)
        self.reset_parameters(generator if generator is not None else torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights anew; the average starts at 0."""
        reset_children(self, generator)
        if self.w_avg is not None:
            self.w_avg.zero_()

    def style(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        """z (N, Z) and c (N, C) -> (N, W), one style code a sample, not truncated. ValueError for other shapes."""
        parts = []
        if self.z_dim > 0:
            parts.append(normalize_second_moment(self._checked("z", z, self.z_dim)))
        if self.embed is not None:
            parts.append(normalize_second_moment(self.embed(self._checked("c", c, self.c_dim))))
        if len(parts) == 2 and parts[0].shape[0] != parts[1].shape[0]:
            raise ValueError(f"z and c: expected one label a code, got {parts[0].shape[0]} and {parts[1].shape[0]}")
        x = torch.cat(parts, dim=1)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """z (N, Z), c (N, C) -> style codes (N, L, W), or (N, W) with ``num_ws`` None.

        Args:
            truncation_psi: the codes are moved to ``w_avg + psi * (w - w_avg)``; 1: not at all, 0: the average face.
            truncation_cutoff: only the first so many codes are moved; None: all.

        Raises:
            ValueError: another shape; truncation of a network without an average.
        """
        w = self.style(z, c)
        if self.num_ws is None:
            if truncation_psi != 1:
                raise ValueError(f"truncation_psi {truncation_psi:g}: a network without num_ws is not truncated; use 1")
            return w
        return self.truncate(w[:, None].expand(-1, self.num_ws, -1), truncation_psi, truncation_cutoff)

    def truncate(self, ws: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
        """Move style codes (N, L, W) towards the average; see :meth:`forward`."""
        if psi == 1:
            return ws
        if self.w_avg is None:
            raise ValueError(f"truncation_psi {psi:g}: this mapping network keeps no average; use 1")
        moved = self.w_avg.lerp(ws, psi)
        return moved if cutoff is None else torch.cat([moved[:, :cutoff], ws[:, cutoff:]], dim=1)

    @torch.no_grad()
    def update_w_avg(self, w: Tensor) -> None:
        """Move the running average towards the mean of style codes that are not truncated.

        ``w_avg <- w_avg * w_avg_beta + mean(w) * (1 - w_avg_beta)``. Never called by :meth:`forward`: the phase of
        the training that owns the average calls it, with the codes of all processes.

        Args:
            w: (..., W).

        Raises:
            ValueError: the network keeps no average.
        """
        if self.w_avg is None or self.w_avg_beta is None:
            raise ValueError("update_w_avg: this mapping network keeps no average (num_ws or w_avg_beta is None)")
        mean = w.detach().reshape(-1, self.w_dim).mean(dim=0).to(self.w_avg.dtype)
        self.w_avg.copy_(mean.lerp(self.w_avg, self.w_avg_beta))

    def _checked(self, name: str, x: Tensor | None, width: int) -> Tensor:
        if x is None or x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"{name}: expected shape (N, {width}), got {None if x is None else tuple(x.shape)}")
        return x.to(self.layers[0].weight.dtype)  # type: ignore[arg-type]
