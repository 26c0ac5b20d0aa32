"""Realising one block: guidance, time grids, Euler and stochastic steps (BitLM eq. 21-24, algorithm 2).

Knows the head and the noise path only; no model loading, no text.
Shape legend: T denoising steps (the paper's K), N blocks, M slots, K bits, D backbone width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .head import DiffusionHead, Modulation, clean_estimate
from .path import (
    TabulatedTime,
    log_snr,
    lone_bit_entropy_law,
    time_from_log_snr,
)

LOWEST_LOG_SNR, HIGHEST_LOG_SNR = -9.0, 4.4  # range of the log-SNR grid; the likelihood bound uses the same
MAX_NOISE_RAISE = math.sqrt(2.0) - 1.0

GuidanceMode = Literal["mean", "clipped", "logit"]
GridName = Literal["uniform", "logsnr", "entropy"]


@dataclass
class SamplerConfig:
    """How one block is realised.

    Attributes:
        num_steps: Denoising steps (the paper's K); the head is evaluated exactly this often.
        guidance: Classifier-free guidance scale; 1 costs one head pass, anything else two.
        guidance_mode: `mean` (the paper), `clipped` (to +-1) or `logit` (guide the logits, stays inside the cube).
        grid: Times of the steps: `uniform` (the paper), `logsnr`, or `entropy` (equal quantiles of the entropy rate).
        noise_raise: Strength eta of the stochastic sampler; 0 is the deterministic Euler solver.
        noise_gate: `entropy` scales eta by the entropy rate at each step, `constant` does not.
    """

    num_steps: int = 15
    guidance: float = 9.0
    guidance_mode: GuidanceMode = "mean"
    grid: GridName = "uniform"
    noise_raise: float = 0.0
    noise_gate: Literal["entropy", "constant"] = "entropy"

    def validate(self) -> None:
        """Raise ValueError naming the setting and its value."""
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a number >= 0, got {self.guidance}")
        if self.guidance_mode not in ("mean", "clipped", "logit"):
            raise ValueError(f"unknown guidance_mode {self.guidance_mode!r}: choose mean, clipped or logit")
        if self.grid not in ("uniform", "logsnr", "entropy"):
            raise ValueError(f"unknown grid {self.grid!r}: choose uniform, logsnr or entropy")
        if self.noise_gate not in ("entropy", "constant"):
            raise ValueError(f"unknown noise_gate {self.noise_gate!r}: choose entropy or constant")
        if not 0 <= self.noise_raise <= MAX_NOISE_RAISE:
            raise ValueError(f"noise_raise must lie in [0, {MAX_NOISE_RAISE:.4f}], got {self.noise_raise}")


def guide(conditional: Tensor, unconditional: Tensor, scale: float, mode: GuidanceMode) -> Tensor:
    """Guided clean estimate from the two output logits, same shape: a_u + scale (a_c - a_u).

    `mean` is the paper's and leaves the cube; `clipped` returns to it; `logit` guides before the tanh.
    """
    if mode == "logit":
        return clean_estimate(unconditional + scale * (conditional - unconditional))
    mean = clean_estimate(unconditional)
    mean = mean + scale * (clean_estimate(conditional) - mean)
    return mean.clamp(-1, 1) if mode == "clipped" else mean


def time_grid(name: GridName, num_steps: int, profile: TabulatedTime | None = None) -> Tensor:
    """Descending times t_T = 1 > ... > t_0 = 0, float64 [num_steps + 1]; both ends are exact.

    `entropy` places the inner times at equal quantiles of `profile` (the entropy rate over log-SNR; without one, that
    of independent uniform bits).
    """
    if name == "uniform":
        return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    inner = torch.arange(1, num_steps, dtype=torch.float64) / num_steps
    if name == "logsnr":
        lam = LOWEST_LOG_SNR + (HIGHEST_LOG_SNR - LOWEST_LOG_SNR) * inner * num_steps / max(num_steps - 1, 1)
    else:
        lam = (profile or lone_bit_entropy_law()).sample_log_snr(inner)
    ends = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return torch.cat([ends[0], time_from_log_snr(lam), ends[1]])


def noise_raises(config: SamplerConfig, times: Tensor, profile: TabulatedTime | None = None) -> list[float]:
    """eta of each step, [num_steps]: zero at t = 1 (there is no signal to disturb), gated by the entropy rate."""
    if config.noise_raise == 0:
        return [0.0] * config.num_steps
    gate = np.ones(config.num_steps)
    if config.noise_gate == "entropy":
        rate = (profile or lone_bit_entropy_law()).log_snr_density(log_snr(times[1:-1])).numpy()
        gate[1:] = rate / max(rate.max(initial=0.0), 1e-300)
    gate[0] = 0.0
    return np.minimum(config.noise_raise * gate, MAX_NOISE_RAISE).tolist()


def raise_noise(noisy: Tensor, time: float, eta: float, fresh: Tensor) -> tuple[Tensor, float]:
    """Move a_t up to noise level sigma (1 + eta), sigma = t / (1 - t); returns the state and its time.

    In y = a_t / (1 - t): y + sqrt(sigma_hat^2 - sigma^2) n (arXiv 2605.07013, BitDance).
    """
    sigma = time / (1.0 - time)
    raised = sigma * (1.0 + eta)
    y = noisy / (1.0 - time) + math.sqrt(raised**2 - sigma**2) * fresh
    raised_time = raised / (1.0 + raised)
    return y * (1.0 - raised_time), raised_time


def euler_step(noisy: Tensor, clean: Tensor, time: float, next_time: float) -> Tensor:
    """a_s = (s / t) a_t + (1 - s / t) a_0-estimate (BitLM eq. 23); at s = 0 the estimate itself."""
    ratio = next_time / time
    return ratio * noisy + (1.0 - ratio) * clean


@dataclass
class KnownSlots:
    """Slots of a partial prompt block that are held to their codes at every step.

    codes: [N, M, K] in {-1, +1} (any value where not known); mask: bool [N, M].
    """

    codes: Tensor
    mask: Tensor

    def hold(self, noisy: Tensor, initial_noise: Tensor, time: float) -> Tensor:
        """a_t with the known slots set to (1 - t) phi + t eps, eps their initial noise."""
        held = (1.0 - time) * self.codes + time * initial_noise
        return torch.where(self.mask[..., None], held, noisy)


FreshNoise = Callable[[int], Tensor]
Observer = Callable[[float, Tensor], None]


class BlockSampler:
    """Samples blocks with one head under fixed settings; times, grids and null modulations are computed once.

    Args:
        head: The diffusion head, in eval mode.
        config: Steps, guidance, grid.
        profile: Measured entropy rate for the entropy grid and gate, or None for that of independent bits.

    Raises:
        ValueError: A setting outside its range.
    """

    def __init__(self, head: DiffusionHead, config: SamplerConfig, profile: TabulatedTime | None = None) -> None:
        config.validate()
        self.head, self.config = head, config
        self.times = time_grid(config.grid, config.num_steps, profile).tolist()
        self.raises = noise_raises(config, torch.tensor(self.times, dtype=torch.float64), profile)
        self.guided = config.guidance != 1.0
        device = head.input.weight.device
        self.evaluation_times = torch.tensor(
            [self._raised(k) for k in range(config.num_steps)], dtype=torch.float32, device=device
        )

    def _raised(self, step: int) -> float:
        time, eta = self.times[step], self.raises[step]
        if eta == 0.0:
            return time
        sigma = time / (1.0 - time) * (1.0 + eta)
        return sigma / (1.0 + sigma)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        initial_noise: Tensor,
        *,
        known: KnownSlots | None = None,
        fresh_noise: FreshNoise | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Final analog bits a_0 [N, M, K] (float32); their signs are the block (eq. 24).

        Args:
            condition: C of the previous block, [N, M, D].
            initial_noise: a_1, standard normal [N, M, K], float32.
            known: Slots held to given codes.
            fresh_noise: step index -> standard normal [N, M, K]; needed when noise_raise > 0.
            observe: Called with (time, state) at t = 1 and after every step.
        """
        conditional, null = self._modulations(condition)
        state = initial_noise
        for step, (time, next_time) in enumerate(zip(self.times[:-1], self.times[1:], strict=True)):
            if known is not None:
                state = known.hold(state, initial_noise, time)
            if observe is not None and step == 0:
                observe(time, state)
            if self.raises[step] > 0:
                if fresh_noise is None:
                    raise ValueError("noise_raise > 0 needs fresh_noise")
                state, time = raise_noise(state, time, self.raises[step], fresh_noise(step))
                if known is not None:
                    state = known.hold(state, initial_noise, time)
            clean = self._estimate(state, step, conditional, null)
            state = euler_step(state, clean, time, next_time)
            if observe is not None:
                observe(next_time, state if known is None else known.hold(state, initial_noise, next_time))
        return state if known is None else known.hold(state, initial_noise, 0.0)

    def _modulations(self, condition: Tensor) -> tuple[Modulation, Modulation | None]:
        """Modulations of all steps in one matrix product each: they do not depend on the state."""
        times = self.evaluation_times
        dtype = self.head.input.weight.dtype
        embedded = self.head.embed_condition(condition.to(dtype))
        conditional = self.head.modulation(embedded, times[:, None].expand(-1, len(condition)))
        null = self.head.modulation(self.head.null(), times[:, None]) if self.guided else None
        return conditional, null

    def _estimate(self, state: Tensor, step: int, conditional: Modulation, null: Modulation | None) -> Tensor:
        num_blocks = state.shape[0]
        time = self.evaluation_times[step]
        mod = Modulation([g[step] for g in conditional.groups], conditional.final[step])
        if null is None:
            return clean_estimate(self.head.denoise(state, time.expand(num_blocks), mod))
        both = Modulation(
            [_stack(c, n[step]) for c, n in zip(mod.groups, null.groups, strict=True)],
            _stack(mod.final, null.final[step]),
        )
        logits = self.head.denoise(torch.cat([state, state]), time.expand(2 * num_blocks), both)
        c, u = logits.chunk(2)
        return guide(c, u, self.config.guidance, self.config.guidance_mode)


def _stack(conditional: Tensor, null: Tensor) -> Tensor:
    return torch.cat([conditional, null.expand_as(conditional)])


__all__ = [
    "BlockSampler",
    "KnownSlots",
    "SamplerConfig",
    "euler_step",
    "guide",
    "noise_raises",
    "raise_noise",
    "time_grid",
]
