# SPDX-License-Identifier: Apache-2.0
"""Score distillation: what a text-to-image diffusion model would change in a picture (DreamFusion, arXiv 2209.14988).

The picture is encoded, noised to a random time step t and given to the denoiser with and without the prompt; the
difference between predicted and added noise is the gradient of the latents, which goes back through the encoder:

    dL/dz = w(t) (eps_hat - eps),   eps_hat = eps_c + s (eps_c - eps_u)       (FaceDNeRF, arXiv 2306.00783, with s = 100)

Nothing here imports a diffusion library: denoiser, encoder and schedule are called as diffusers' models are
(:mod:`facelab.nn.pretrained.diffusion` reads them from files).

Shape legend: N pictures, K samples of (t, eps) for each, S side in pixels, h, w of the latents, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from facelab.draws import Draws
from facelab.errors import nearest
from facelab.ranges import check_ranges

Formula = Literal["beyond_prompt", "from_empty"]
Weighting = Literal["one_minus_alpha", "sqrt_alpha", "one"]
FORMULAS = ("beyond_prompt", "from_empty")
WEIGHTINGS = ("one_minus_alpha", "sqrt_alpha", "one")
PRECISIONS = ("fp16", "bf16", "fp32")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
PICTURE_SIZE = 512  # pixels, where the denoiser does not say
Share = float | Callable[[int], float]  # 0..1 of an optimisation that is done, or a function of the step that says so


class Conditioning(Protocol):
    """What the denoiser is told; :class:`~facelab.nn.pretrained.diffusion.PromptEmbeddings` is one.

    Attributes:
        tokens: (2, T, C), of the negative prompt and of the prompt.
    """

    @property
    def tokens(self) -> Tensor: ...

    def extra(self, count: int, side: int) -> Mapping[str, Tensor] | None:
        """Further conditioning of ``count`` rows of each kind for pictures of ``side`` pixels, or None."""
        ...


@dataclass(frozen=True)
class TokenEmbeddings:
    """Embeddings without anything else: Stable Diffusion 1.x and 2.x.

    Attributes:
        tokens: (2, T, C), of the negative prompt and of the prompt.
    """

    tokens: Tensor

    def extra(self, count: int, side: int) -> None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class GuidanceReference:
    """Switches back to the original program.

    Attributes:
        weighted_backward: the loss weight (about 1e-5) enters before the gradient passes the encoder, in the encoder's
            precision, where half precision rounds small entries to zero; off: the gradient of weight 1 passes the
            encoder, scaled to its range, and the weight follows in float32.
        replace_non_finite: NaN and infinity in the gradient become 0 and large numbers; off: the loss is then not
            finite, so that the loop stops.
        bilinear: larger pictures are brought down by bilinear interpolation without antialiasing; off: area averages.
    """

    weighted_backward: bool = False
    replace_non_finite: bool = False
    bilinear: bool = False


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """How a prompt pulls.

    Attributes:
        guidance: s of the formula.
        formula: ``beyond_prompt``: eps_c + s (eps_c - eps_u), the original's; ``from_empty``: eps_u + s (eps_c - eps_u),
            the usual one. s in the first equals s + 1 in the second.
        t_min, t_max: range of time steps, as fractions of the schedule, both ends included.
        t_max_end: where ``t_max`` has moved to, linearly, at the end of the optimisation; None: it stays.
        weighting: ``one_minus_alpha``: 1 - a, the original's; ``sqrt_alpha``: sqrt(a) (1 - a); ``one``: 1; a is the
            cumulative product of the schedule at t.
        samples: K, pairs of time step and noise for each picture, averaged.
        picture_size: pixels at which pictures are encoded; None: what the denoiser was made for (its configuration),
            512 where that does not say.
        clip: largest entry of the gradient of the latents; None: no limit.
        rows: pictures that the denoiser sees at once, with and without prompt; None: all. Fewer take less memory.
        precision: of denoiser and encoder when they are read from files.
        reference: switches back to the original.

    Raises:
        ValueError: a value outside its range.
    """

    guidance: float = 100.0
    formula: Formula = "beyond_prompt"
    t_min: float = 0.02
    t_max: float = 0.98
    t_max_end: float | None = None
    weighting: Weighting = "one_minus_alpha"
    samples: int = 1
    picture_size: int | None = None
    clip: float | None = None
    rows: int | None = None
    precision: Literal["fp16", "bf16", "fp32"] = "bf16"
    reference: GuidanceReference = field(default_factory=GuidanceReference)

    def __post_init__(self) -> None:
        for name, known in (("formula", FORMULAS), ("weighting", WEIGHTINGS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.{nearest(value, known)}")
        end = self.t_max if self.t_max_end is None else self.t_max_end
        if not (0 <= self.t_min <= self.t_max <= 1 and self.t_min <= end <= 1):
            raise ValueError(
                f"time steps need 0 <= guidance.t_min <= guidance.t_max <= 1, got t_min {self.t_min}, "
                f"t_max {self.t_max}, t_max_end {end}"
            )
        check_ranges("guidance", self, counts=("samples", "rows", "picture_size"), positive=("clip",))

    def range_at(self, progress: float, steps: int) -> tuple[int, int]:
        """First and last time step, of a schedule of ``steps``, when ``progress`` (0..1) of the optimisation is done."""
        end = self.t_max if self.t_max_end is None else self.t_max_end
        last = self.t_max + (end - self.t_max) * min(max(progress, 0.0), 1.0)
        low, high = (min(int(share * steps), steps - 1) for share in (self.t_min, last))
        return low, high


@dataclass(frozen=True)
class NoiseSchedule:
    """What is needed of a scheduler.

    Attributes:
        alphas: (steps,) cumulative products, float32.
        prediction: what the denoiser predicts: ``epsilon``, ``v_prediction`` or ``sample``.
    """

    alphas: Tensor
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"the denoiser must predict {', '.join(PREDICTIONS)}, got {self.prediction!r}")

    @staticmethod
    def of(scheduler: Any) -> NoiseSchedule:
        """Of one of diffusers' schedulers, or of anything with ``alphas_cumprod`` and ``config.prediction_type``."""
        if isinstance(scheduler, NoiseSchedule):
            return scheduler
        config = getattr(scheduler, "config", None)
        return NoiseSchedule(scheduler.alphas_cumprod.float().cpu(), _entry(config, "prediction_type", "epsilon"))

    @staticmethod
    def scaled_linear(start: float, end: float, steps: int = 1000, prediction: str = "epsilon") -> NoiseSchedule:
        """Square roots of the betas grow linearly: Stable Diffusion's."""
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        return NoiseSchedule(torch.cumprod(1.0 - betas, dim=0), prediction)

    def noise_in(self, predicted: Tensor, noisy: Tensor, alpha: Tensor) -> Tensor:
        """The noise that a prediction stands for; ``alpha`` broadcasts against the latents (arXiv 2202.00512, app. D)."""
        if self.prediction == "v_prediction":
            return alpha.sqrt() * predicted + (1 - alpha).sqrt() * noisy
        if self.prediction == "sample":
            return (noisy - alpha.sqrt() * predicted) / (1 - alpha).sqrt()
        return predicted


@dataclass(frozen=True)
class Distilled:
    """One evaluation, for logs and tests; all detached, for weight 1.

    Attributes:
        latents: (N, 4, h, w) encoded pictures, scaled.
        latent_gradient: (N, 4, h, w) float32.
        timesteps: (K, N) integers.
        square: (N,) sum of squares of the gradient of the latents: what tells how far picture and prompt are apart.
    """

    latents: Tensor
    latent_gradient: Tensor
    timesteps: Tensor
    square: Tensor


class ScoreDistillation:
    """The gradient that a prompt asks for; parts stay as they are.

    Args:
        unet: called (noisy latents, time steps, encoder_hidden_states=..., [added_cond_kwargs=...]) -> has ``sample``.
        vae: ``encode(pictures)`` -> has ``latent_dist`` with ``mean`` and ``std``; ``config.scaling_factor``.
        scheduler: see :meth:`NoiseSchedule.of`.
        embeddings: (2, T, C) of the negative prompt and of the prompt, or a :class:`Conditioning`.
        settings: how it pulls.

    Pictures may lie on another device than the parts: gradients come back to them.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        scheduler: Any,
        embeddings: Tensor | Conditioning,
        settings: GuidanceSettings | None = None,
    ) -> None:
        self.unet, self.vae, self.schedule = unet, vae, NoiseSchedule.of(scheduler)
        self.embeddings: Conditioning = TokenEmbeddings(embeddings) if isinstance(embeddings, Tensor) else embeddings
        self.settings = settings or GuidanceSettings()
        shape = tuple(self.embeddings.tokens.shape)
        if len(shape) != 3 or shape[0] != 2:
            raise ValueError(f"embeddings must be (2, T, C), of the negative prompt and of the prompt, got {shape}")
        self._alphas: dict[torch.device, Tensor] = {}  # of the schedule, copied to a device once
        self._told: dict[Any, dict[str, Any]] = {}  # what the denoiser is told of the prompt, likewise
        self.scaling = float(_entry(getattr(vae, "config", None), "scaling_factor", 1.0))
        self.side = self.settings.picture_size or _own_size(unet, vae)

    def gradient(
        self, pictures: Tensor, draws: Draws, *, progress: Share = 0.0, timesteps: Tensor | None = None
    ) -> tuple[Tensor, Distilled]:
        """The gradient of weight 1 with respect to the pictures, on their device and in float32.

        Args:
            pictures: (N, 3, S, S) about [-1, 1], not clamped.
            draws: ``sds/posterior``, ``sds/t`` and ``sds/noise`` are drawn on the CPU, so devices agree.
            progress: 0..1, for ``t_max_end``; as a function of the step where steps are played back as CUDA graphs.
            timesteps: (K, N) or (N,) integers instead of random ones.

        Raises:
            ValueError: pictures of another shape, or time steps outside the schedule.
        """
        leaf = _checked(pictures).detach().requires_grad_()
        with torch.enable_grad():
            latents = self.encode(leaf, draws)
        found = self._distil(latents, draws, progress, timesteps)
        gradient = self._through_encoder(latents, leaf, found.latent_gradient)
        return gradient.float(), found

    def loss(self, pictures: Tensor, draws: Draws, *, progress: Share = 0.0, timesteps: Tensor | None = None) -> Tensor:
        """(N,) half the squared distance of the latents from where the prompt wants them; the derivative with respect
        to the pictures is :meth:`gradient`, times whatever the loss is multiplied with. Arguments as there.

        Time steps are random, so values of different steps say little; do not choose the best step by them.
        """
        wanted = torch.is_grad_enabled() and pictures.requires_grad
        if not wanted or self.settings.reference.weighted_backward:
            latents = self.encode(_checked(pictures), draws)
            found = self._distil(latents, draws, progress, timesteps)
            value = _Directed.apply(latents, found.latent_gradient, 0.5 * found.square)
            return value.to(pictures.device)
        gradient, found = self.gradient(pictures, draws, progress=progress, timesteps=timesteps)
        return _Directed.apply(pictures, gradient, (0.5 * found.square).to(pictures.device))

    def encode(self, pictures: Tensor, draws: Draws) -> Tensor:
        """(N, 3, S, S) in [-1, 1] -> (N, 4, h, w) a sample of the latents, times their scale; differentiable."""
        device, dtype = _place(self.vae, pictures)
        fitted = self._fitted(pictures).to(device=device, dtype=dtype)
        found = self.vae.encode(fitted).latent_dist
        shape = tuple(found.mean.shape)
        noise = draws.host(lambda own: own.normal("sds/posterior", shape), device).to(found.mean.dtype)
        return (found.mean + found.std * noise) * self.scaling

    def with_embeddings(self, embeddings: Tensor | Conditioning) -> ScoreDistillation:
        """The same parts with another prompt."""
        return ScoreDistillation(self.unet, self.vae, self.schedule, embeddings, self.settings)

    def _fitted(self, pictures: Tensor) -> Tensor:
        if tuple(pictures.shape[2:]) == (self.side, self.side):
            return pictures
        if max(pictures.shape[2:]) > self.side and not self.settings.reference.bilinear:
            return F.interpolate(pictures, size=(self.side, self.side), mode="area")
        return F.interpolate(pictures, size=(self.side, self.side), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def _distil(self, latents: Tensor, draws: Draws, progress: Share, timesteps: Tensor | None) -> Distilled:
        """The gradient of the latents: averaged over the samples, in float32, on the denoiser's device."""
        device, _ = _place(self.unet, latents)
        z = latents.detach().to(device).float()
        count = len(z)
        t = draws.host(lambda own: self._timesteps(count, own, progress, timesteps), device)
        shape = (len(t), *z.shape)
        noise = draws.host(lambda own: own.normal("sds/noise", shape), device)
        if device not in self._alphas:
            self._alphas[device] = self.schedule.alphas.to(device)
        alpha = self._alphas[device][t][..., None, None, None]
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        empty, prompted = self._predict(noisy.flatten(0, 1), t.flatten())
        empty, prompted = (self.schedule.noise_in(value.reshape(shape), noisy, alpha) for value in (empty, prompted))
        base = prompted if self.settings.formula == "beyond_prompt" else empty
        gradient = self._weight(alpha) * (base + self.settings.guidance * (prompted - empty) - noise)
        gradient = gradient.mean(dim=0)
        if self.settings.clip is not None:
            gradient = gradient.clamp(-self.settings.clip, self.settings.clip)
        if self.settings.reference.replace_non_finite:
            gradient = torch.nan_to_num(gradient)
        gradient = gradient.to(latents.device)
        return Distilled(latents.detach(), gradient, t, gradient.square().flatten(1).sum(1))

    def _timesteps(self, count: int, draws: Draws, progress: Share, given: Tensor | None) -> Tensor:
        """(K, N)."""
        steps = len(self.schedule.alphas)
        if given is not None:
            t = given.long().reshape(-1, count)
            if t.numel() == 0 or int(t.min()) < 0 or int(t.max()) >= steps:
                raise ValueError(f"time steps must lie in 0..{steps - 1}, got {given.tolist()}")
            return t
        low, high = self.settings.range_at(progress(draws.step) if callable(progress) else progress, steps)
        u = draws.uniform("sds/t", (self.settings.samples, count))
        return (low + (u * (high - low + 1)).floor().long()).clamp_max(high)

    def _prompted(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The denoiser's arguments for ``count`` latents, without and with the prompt."""
        key = count, device, dtype
        if key not in self._told:
            tokens = self.embeddings.tokens.to(device, dtype)
            told: dict[str, Any] = {"encoder_hidden_states": tokens.repeat_interleave(count, dim=0)}
            extra = self.embeddings.extra(count, self.side)
            if extra is not None:
                told["added_cond_kwargs"] = {name: value.to(device, dtype) for name, value in extra.items()}
            self._told[key] = told
        return self._told[key]

    def _predict(self, noisy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 4, h, w), (R,) -> predictions without and with the prompt, float32; at most ``rows`` at a time."""
        device, dtype = _place(self.unet, noisy)
        found: list[tuple[Tensor, Tensor]] = []
        size = self.settings.rows or len(noisy)
        for part, when in zip(noisy.split(size), t.split(size), strict=True):
            told = self._prompted(len(part), device, dtype)
            answer = self.unet(torch.cat([part, part]).to(dtype), torch.cat([when, when]), **told).sample
            empty, prompted = answer.float().chunk(2)
            found.append((empty, prompted))
        return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])

    def _weight(self, alpha: Tensor) -> Tensor:
        if self.settings.weighting == "one":
            return torch.ones_like(alpha)
        return (1 - alpha) * (alpha.sqrt() if self.settings.weighting == "sqrt_alpha" else 1.0)

    @staticmethod
    def _through_encoder(latents: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
        """Back-propagate a gradient of the latents, scaled by a power of two so that half precision holds it."""
        largest = gradient.abs().amax()
        usable = torch.isfinite(largest) & (largest > 0)
        exponent = torch.where(usable, largest, torch.ones_like(largest)).log2().ceil()
        scale = torch.exp2(exponent)
        (found,) = torch.autograd.grad(latents, leaf, (gradient / scale).to(latents.dtype))
        return found * scale.to(found.device)


class _Directed(torch.autograd.Function):
    """A (N,) value whose derivative with respect to ``x`` (N, ...) is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        factor = outer[0].reshape(-1, *[1] * (gradient.ndim - 1))
        # the product is taken in the type of x: float32 for pictures, the encoder's for latents
        return factor.to(ctx.dtype) * gradient.to(ctx.dtype), None, None


def describe(settings: GuidanceSettings) -> dict[str, Any]:
    """For JSON files."""
    return dataclasses.asdict(settings)


def _checked(pictures: Tensor) -> Tensor:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        raise ValueError(
            f"pictures must be float (N, 3, S, S) in [-1, 1], got {pictures.dtype} {tuple(pictures.shape)}"
        )
    return pictures


def _place(part: Any, like: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where a part lies and in which precision; that of ``like`` for one without parameters."""
    first = next(part.parameters(), None) if hasattr(part, "parameters") else None
    return (like.device, torch.float32) if first is None else (first.device, first.dtype)


def _entry(config: Any, name: str, default: Any) -> Any:
    """An entry of a configuration that may be an object, a mapping, or missing."""
    found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if found is None else found


def _own_size(unet: Any, vae: Any) -> int:
    """Pixels that the denoiser was made for: its latents' size times the encoder's reduction."""
    latent = _entry(getattr(unet, "config", None), "sample_size", None)
    blocks = _entry(getattr(vae, "config", None), "block_out_channels", None)
    if not isinstance(latent, int) or blocks is None:
        return PICTURE_SIZE
    return latent * 2 ** (len(blocks) - 1)
