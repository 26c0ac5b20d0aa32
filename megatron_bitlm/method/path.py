"""The noise path from clean codes to Gaussian noise: log-SNR, time laws, loss weights, the posterior of a lone bit.

Time runs as in the BitLM paper (arXiv 2605.11577): t = 0 is clean, t = 1 is noise.
Shape legend: N blocks, M slots, K bits; `...` any leading shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

MIN_TIME = 0.05  # wherever t^2 or t^3 divides; BitDance's floor
LOGIT_CLIP = 15.0  # tanh(15) is 1 in float32, so a larger logit only costs gradients
EDGE_SLACK = 1e-4  # float32 times round to log-SNRs this far outside the table they were drawn from

TimeLawName = Literal["uniform", "logit_normal", "entropy"]
WeightingName = Literal["x0", "velocity", "likelihood"]


def interpolate(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Noisy analog bits a_t = (1 - t) a_0 + t eps (BitLM eq. 9).

    `clean` and `noise` are [..., M, K]; `time` is [...], one value a block (eq. 8).
    """
    t = time[..., None, None]
    return (1.0 - t) * clean + t * noise


def log_snr(time: Tensor) -> Tensor:
    """Log signal-to-noise ratio lambda = 2 ln((1 - t) / t) of the straight path."""
    return 2.0 * (torch.log1p(-time) - torch.log(time))


def time_from_log_snr(lam: Tensor) -> Tensor:
    """Inverse of `log_snr`: t = sigmoid(-lambda / 2)."""
    return torch.sigmoid(-0.5 * lam)


def lone_bit_logit(noisy: Tensor, time: Tensor) -> Tensor:
    """Exact posterior logit of one uniform +-1 bit given its noisy value, [..., M, K] for `time` [...].

    ln p(+1 | a_t) / p(-1 | a_t) = 2 (1 - t) a_t / t^2, clipped to +-2 * 15 and with t held above 0.05
    (matched filter of arXiv 2605.07013, derived for this path). Its posterior mean is tanh(logit / 2).
    """
    t = time[..., None, None]
    half = (1.0 - t) * noisy / t.clamp(min=MIN_TIME).square()
    return 2.0 * half.clamp(-LOGIT_CLIP, LOGIT_CLIP)


def lone_bit_mmse(lam: np.ndarray, num_nodes: int = 129) -> np.ndarray:
    """Minimum mean squared error of one uniform +-1 bit at log-SNR `lam` (float64, same shape).

    1 - E tanh(g + sqrt(g) z) with g = e^lambda, by Gauss-Hermite quadrature.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    weights = weights / weights.sum()
    snr = np.exp(np.asarray(lam, dtype=np.float64))[..., None]
    return 1.0 - (weights * np.tanh(snr + np.sqrt(snr) * nodes)).sum(-1)


class TimeLaw(Protocol):
    """A distribution of diffusion times, drawn by its inverse CDF so that times follow from keyed uniforms."""

    def sample(self, uniform: Tensor) -> Tensor:
        """Map float32 uniforms in [0, 1) to times in [0, 1], same shape."""

    def density(self, time: Tensor) -> Tensor:
        """Probability density over t, same shape."""


class UniformTime:
    """t ~ U[0, 1] (BitLM, section 3.2)."""

    def sample(self, uniform: Tensor) -> Tensor:
        """The uniforms themselves."""
        return uniform

    def density(self, time: Tensor) -> Tensor:
        """One everywhere."""
        return torch.ones_like(time)


class LogitNormalTime:
    """t = sigmoid(mean + std n) with n standard normal; (0.8, 0.8) is BitDance's law in this direction of time."""

    def __init__(self, mean: float = 0.8, std: float = 0.8) -> None:
        if std <= 0:
            raise ValueError(f"logit-normal times need std > 0, got {std}")
        self.mean, self.std = mean, std

    def sample(self, uniform: Tensor) -> Tensor:
        """Inverse CDF; the open interval keeps the normal quantile finite."""
        quantile = torch.special.ndtri(uniform.double().clamp(2.0**-25, 1 - 2.0**-25))
        return torch.sigmoid(self.mean + self.std * quantile).to(uniform.dtype)

    def density(self, time: Tensor) -> Tensor:
        """Density of the logit-normal law."""
        z = (torch.logit(time) - self.mean) / self.std
        return torch.exp(-0.5 * z.square()) / (self.std * math.sqrt(2 * math.pi) * time * (1 - time))


class TabulatedTime:
    """Piecewise-constant density over log-SNR bins: the entropy law and the likelihood proposal.

    `edges` are J + 1 increasing log-SNR values, `weights` J non-negative masses (normalised here).
    """

    def __init__(self, edges: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> None:
        edges, weights = np.asarray(edges, np.float64), np.asarray(weights, np.float64)
        if edges.ndim != 1 or weights.shape != (edges.size - 1,) or not (np.diff(edges) > 0).all():
            raise ValueError(
                f"a time table needs J+1 increasing edges and J weights, got {edges.shape} and {weights.shape}"
            )
        if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
            raise ValueError("the weights of a time table must be finite, non-negative and not all zero")
        self.edges = torch.from_numpy(edges)
        self.mass = torch.from_numpy(weights / weights.sum())
        self.cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), self.mass.cumsum(0)])

    def sample_log_snr(self, uniform: Tensor) -> Tensor:
        """Inverse CDF from u to lambda, float64, same shape (u = 0 is the smallest lambda)."""
        edges, mass, cumulative = (x.to(uniform.device) for x in (self.edges, self.mass, self.cumulative))
        u = uniform.double().contiguous()
        index = (torch.searchsorted(cumulative, u, right=True) - 1).clamp(0, mass.numel() - 1)
        fraction = ((u - cumulative[index]) / mass[index].clamp(min=1e-300)).clamp(0, 1)
        return edges[index] + fraction * (edges[index + 1] - edges[index])

    def log_snr_density(self, lam: Tensor) -> Tensor:
        """Density over lambda (float64; zero outside the table, but for `EDGE_SLACK` at its ends)."""
        edges, mass = self.edges.to(lam.device), self.mass.to(lam.device)
        index = (torch.searchsorted(edges, lam.double().contiguous(), right=True) - 1).clamp(0, mass.numel() - 1)
        inside = (lam >= edges[0] - EDGE_SLACK) & (lam <= edges[-1] + EDGE_SLACK)
        return torch.where(inside, mass[index] / (edges[index + 1] - edges[index]), 0.0)

    def sample(self, uniform: Tensor) -> Tensor:
        """Times in the dtype of `uniform`; larger u is cleaner."""
        return time_from_log_snr(self.sample_log_snr(uniform)).to(uniform.dtype)

    def density(self, time: Tensor) -> Tensor:
        """Density over t: q(lambda) |d lambda / dt| = 2 q(lambda) / (t (1 - t))."""
        t = time.double()
        return (self.log_snr_density(log_snr(t)) * 2.0 / (t * (1.0 - t))).to(time.dtype)


def entropy_profile(lam: np.ndarray, mean_squared_error: np.ndarray) -> np.ndarray:
    """Entropy rate rho(lambda) = e^lambda MSE(lambda) / 2 in nats per unit of lambda (arXiv 2605.07013)."""
    return 0.5 * np.exp(lam) * mean_squared_error


def lone_bit_entropy_law(num_bins: int = 64, lowest: float = -9.0, highest: float = 4.4) -> TabulatedTime:
    """Entropy law of independent uniform bits: the profile to start from when none was measured."""
    edges = np.linspace(lowest, highest, num_bins + 1)
    centres = 0.5 * (edges[1:] + edges[:-1])
    return TabulatedTime(edges, entropy_profile(centres, lone_bit_mmse(centres)))


def make_time_law(name: TimeLawName, table: TabulatedTime | None = None) -> TimeLaw:
    """The law called `name`; `entropy` uses `table`, or the lone-bit profile without one.

    Raises ValueError for an unknown name.
    """
    if name == "uniform":
        return UniformTime()
    if name == "logit_normal":
        return LogitNormalTime()
    if name == "entropy":
        return table if table is not None else lone_bit_entropy_law()
    raise ValueError(f"unknown time law {name!r}: choose uniform, logit_normal or entropy")


def loss_weight(name: WeightingName, time: Tensor, law: TimeLaw) -> Tensor:
    """Weight of a block's squared error at `time`, same shape.

    x0: 1 (BitLM eq. 12). velocity: 1 / max(t, 0.05)^2 (BitDance). likelihood: the NLL weight (1 - t) / t^3 over the
    law's density with t held above 0.05, so that the mean over elements estimates nats per bit.
    """
    if name == "x0":
        return torch.ones_like(time)
    held = time.clamp(min=MIN_TIME)
    if name == "velocity":
        return held.square().reciprocal()
    if name == "likelihood":
        return (1.0 - time) / held.pow(3) / law.density(held.clamp(max=1 - 1e-6)).clamp(min=1e-6)
    raise ValueError(f"unknown weighting {name!r}: choose x0, velocity or likelihood")


def stratified_uniforms(uniform: Tensor) -> Tensor:
    """Spread R independent uniforms [..., R] over R equal strata: (j + u_j) / R, same shape, below 1 like `uniform`."""
    num = uniform.shape[-1]
    spread = (torch.arange(num, device=uniform.device, dtype=uniform.dtype) + uniform) / num
    return spread.clamp(max=1.0 - torch.finfo(uniform.dtype).eps / 2)  # j + u rounds up to j + 1 where u is near 1
