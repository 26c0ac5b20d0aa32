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
        num_steps: Denoising steps (the paper's K); without `early_exit` the head is evaluated exactly this often.
        guidance: Classifier-free guidance scale; 1 costs one head pass, anything else two.
        guidance_mode: `mean` (the paper), `clipped` (to +-1) or `logit` (guide the logits, stays inside the cube).
        grid: Times of the steps: `uniform` (the paper), `logsnr`, or `entropy` (equal quantiles of the entropy rate).
        noise_raise: Strength eta of the stochastic sampler; 0 is the deterministic Euler solver.
        noise_gate: `entropy` scales eta by the entropy rate at each step, `constant` does not.
        early_exit: End a block once the clean estimates of every open bit, guided and conditional, are at least this
            far from zero on the same side; they are then the block. Null makes all steps. A guess, not a proof: the
            head might still change its mind.
        early_exit_steps: Successive steps for which that must hold, with the same signs.
    """

    num_steps: int = 15
    guidance: float = 9.0
    guidance_mode: GuidanceMode = "mean"
    grid: GridName = "uniform"
    noise_raise: float = 0.0
    noise_gate: Literal["entropy", "constant"] = "entropy"
    early_exit: float | None = None
    early_exit_steps: int = 1

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
        if self.early_exit is not None and not self.early_exit > 0:
            raise ValueError(f"early_exit must be a number > 0 or null, got {self.early_exit}")
        if self.early_exit_steps < 1:
            raise ValueError(f"early_exit_steps must be at least 1, got {self.early_exit_steps}")


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

    def take(self, blocks: Tensor) -> KnownSlots:
        """Those of some blocks, int64 [n]."""
        return KnownSlots(self.codes[blocks], self.mask[blocks])


FreshNoise = Callable[[int], Tensor]
Observer = Callable[[float, Tensor], None]


@dataclass
class SampledBlocks:
    """bits: final analog bits a_0 [N, M, K] (float32), whose signs are the blocks (eq. 24); num_evaluations: of the
    head, for each block (a guided one, with and without the condition, counts once)."""

    bits: Tensor
    num_evaluations: list[int]


class BlockSampler:
    """Samples blocks with one head under fixed settings; times, grids and null modulations are computed once, here.

    Args:
        head: The diffusion head, in eval mode, with the weights it is to keep.
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
        device = head.input.weight.device
        self.evaluation_times = torch.tensor(
            [self._raised(k) for k in range(config.num_steps)], dtype=torch.float32, device=device
        )
        self.null: Modulation | None = None
        if config.guidance != 1.0:
            with torch.no_grad():
                self.null = head.modulation(head.null(), self.evaluation_times[:, None])

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
    ) -> SampledBlocks:
        """Realise N blocks. Without `early_exit` nothing waits for the device.

        Args:
            condition: C of the previous block, [N, M, D].
            initial_noise: a_1, standard normal [N, M, K], float32.
            known: Slots held to given codes.
            fresh_noise: step index -> standard normal [N, M, K]; needed when noise_raise > 0.
            observe: Called with (time, state) at t = 1 and after every step; a block that has ended keeps its bits.
        """
        running = _Running(initial_noise, initial_noise, known, self._modulation(condition))
        ended = _Ended(self.config, initial_noise)
        for step, next_time in enumerate(self.times[1:]):
            estimates = self._step(running, step, fresh_noise, observe if step == 0 else None)
            if ended.is_possible and step + 1 < self.config.num_steps:
                ended.take_settled(running, estimates, step + 1)
            if observe is not None:
                observe(next_time, ended.with_running(running, next_time))
            if not len(running.state):
                # Observers are owed every time of the grid.
                if observe is not None:
                    for later in self.times[step + 2 :]:
                        observe(later, ended.bits)
                break
        return SampledBlocks(ended.with_running(running, 0.0), ended.num_evaluations)

    def _step(
        self, running: _Running, step: int, fresh_noise: FreshNoise | None, observe: Observer | None
    ) -> _Estimates:
        """Move the running blocks to the next time; returns what the head said of them."""
        time = self.times[step]
        state = running.held(time)
        if observe is not None:
            observe(time, state)
        if self.raises[step] > 0:
            if fresh_noise is None:
                raise ValueError("noise_raise > 0 needs fresh_noise")
            fresh = fresh_noise(step)
            fresh = fresh if running.places is None else fresh[running.places]
            running.state, time = raise_noise(state, time, self.raises[step], fresh)
            state = running.held(time)
        estimates = self._estimate(state, step, running.modulation)
        running.state = euler_step(state, estimates.clean, time, self.times[step + 1])
        return estimates

    def _modulation(self, condition: Tensor) -> Modulation:
        """Of all steps, in one matrix product: it does not depend on the state. [T, N, ...], guided [T, 2N, ...]."""
        embedded = self.head.embed_condition(condition.to(self.head.input.weight.dtype))
        own = self.head.modulation(embedded, self.evaluation_times[:, None].expand(-1, len(condition)))
        if self.null is None:
            return own
        return Modulation(
            [_stack(c, n) for c, n in zip(own.groups, self.null.groups, strict=True)],
            _stack(own.final, self.null.final),
        )

    def _estimate(self, state: Tensor, step: int, modulation: Modulation) -> _Estimates:
        own = Modulation([group[step] for group in modulation.groups], modulation.final[step])
        if self.null is not None:
            state = torch.cat([state, state])
        logits = self.head.denoise(state, self.evaluation_times[step].expand(len(state)), own)
        if self.null is None:
            return _Estimates(clean_estimate(logits), logits)
        conditional, unconditional = logits.chunk(2)
        return _Estimates(guide(conditional, unconditional, self.config.guidance, self.config.guidance_mode), logits)


@dataclass
class _Estimates:
    """clean: the (guided) clean estimate [n, M, K]; logits: [n, M, K] that it is of, guided [2n, M, K]."""

    clean: Tensor
    logits: Tensor

    def sureness(self) -> Tensor:
        """[n, M, K]: how far the less sure of the guided and the conditional estimate stands on the side it is on.

        Guidance moves an estimate far from zero where condition and null merely differ, so that alone says little.
        """
        sign = torch.where(self.clean >= 0, 1.0, -1.0)
        return torch.minimum(clean_estimate(self.logits[: len(sign)]) * sign, self.clean.abs())


@dataclass
class _Running:
    """Blocks still being denoised, n of N.

    state, initial_noise: [n, M, K]; known: of these blocks; modulation: [T, n, ...] or guided [T, 2n, ...]; places:
    int64 [n], their numbers, or None while all run.
    """

    state: Tensor
    initial_noise: Tensor
    known: KnownSlots | None
    modulation: Modulation
    places: Tensor | None = None

    def held(self, time: float) -> Tensor:
        """The state with the known slots held to their codes."""
        return self.state if self.known is None else self.known.hold(self.state, self.initial_noise, time)

    def keep(self, blocks: Tensor) -> None:
        """Go on with some of them, int64 [k], so that the head's batch shrinks."""
        num_sides = self.modulation.final.shape[1] // len(self.state)
        rows = torch.cat([blocks + side * len(self.state) for side in range(num_sides)])
        self.modulation = Modulation([g[:, rows] for g in self.modulation.groups], self.modulation.final[:, rows])
        self.state, self.initial_noise = self.state[blocks], self.initial_noise[blocks]
        self.known = None if self.known is None else self.known.take(blocks)
        self.places = blocks if self.places is None else self.places[blocks]


class _Ended:
    """Early exit: which blocks have settled, and their bits.

    Nothing can be proven: the block is the sign of the head's last estimate, and the head may answer anything to its
    last input. Even the sign of that input, a_{t_1}, is safe only where |a_t| > (t / t_1 - 1) B, B the largest
    estimate: outside the cube until the last step but one of a uniform grid. So settled is what the estimates say.
    """

    def __init__(self, config: SamplerConfig, like: Tensor) -> None:
        self.is_possible, self.num_steps_to_hold = config.early_exit is not None, config.early_exit_steps
        self.threshold = math.inf if config.early_exit is None else config.early_exit
        self.num_evaluations, self.bits = [config.num_steps] * len(like), like
        if self.is_possible:
            self.bits = torch.zeros_like(like)
            self.signs = torch.zeros_like(like, dtype=torch.bool)
            self.num_steps_held = torch.zeros(len(like), dtype=torch.int64, device=like.device)

    def take_settled(self, running: _Running, estimates: _Estimates, num_evaluations: int) -> None:
        """Move the running blocks whose estimates have settled here."""
        clean = estimates.clean
        far, signs = estimates.sureness() >= self.threshold, clean >= 0
        if running.known is not None:
            far |= running.known.mask[..., None]
        same = (signs == self.signs).flatten(1).all(1)
        held = torch.where(same, self.num_steps_held, 0) + 1
        self.num_steps_held, self.signs = torch.where(far.flatten(1).all(1), held, 0), signs
        settled = self.num_steps_held >= self.num_steps_to_hold
        done = settled.nonzero()[:, 0]
        if not len(done):
            return
        running.state = torch.where(settled[:, None, None], clean, running.state)
        bits, places = running.held(0.0)[done], done if running.places is None else running.places[done]
        self.bits[places] = bits
        for place in places.tolist():
            self.num_evaluations[place] = num_evaluations
        left = (~settled).nonzero()[:, 0]
        self.num_steps_held, self.signs = self.num_steps_held[left], self.signs[left]
        running.keep(left)

    def with_running(self, running: _Running, time: float) -> Tensor:
        """States [N, M, K] of all blocks at `time`, those that have ended and those that run."""
        if running.places is None:
            return running.held(time)
        whole = self.bits.clone()
        whole[running.places] = running.held(time)
        return whole


def _stack(conditional: Tensor, null: Tensor) -> Tensor:
    return torch.cat([conditional, null.expand_as(conditional)], dim=1)


__all__ = [
    "BlockSampler",
    "KnownSlots",
    "SampledBlocks",
    "SamplerConfig",
    "euler_step",
    "guide",
    "noise_raises",
    "raise_noise",
    "time_grid",
]
