"""The noise path against Bayes' rule, numerical integration and scipy's distribution tests."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megatron_bitlm.method.path import (
    LogitNormalTime,
    TabulatedTime,
    UniformTime,
    entropy_profile,
    interpolate,
    log_snr,
    lone_bit_entropy_law,
    lone_bit_logit,
    lone_bit_mmse,
    loss_weight,
    make_time_law,
    stratified_uniforms,
    time_from_log_snr,
)

LAWS = {
    "uniform": UniformTime(),
    "logit_normal": LogitNormalTime(0.8, 0.8),
    "entropy": lone_bit_entropy_law(),
    "uneven table": TabulatedTime([-6.0, -1.0, 0.5, 4.0], [0.2, 0.0, 0.8]),
}
MIDPOINTS = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000


def reference_mmse(gamma: float) -> float:
    """E (1 - E[a | y])^2 for y = gamma a + sqrt(gamma) z, by a fine trapezoid sum with Bayes' rule written out."""
    z = np.linspace(-12, 12, 20_001)
    y = gamma + math.sqrt(gamma) * z
    plus = stats.norm.logpdf(y, gamma, math.sqrt(gamma))
    minus = stats.norm.logpdf(y, -gamma, math.sqrt(gamma))
    error = 2.0 * np.exp(minus - np.logaddexp(plus, minus))
    return float(np.trapezoid(stats.norm.pdf(z) * error**2, z))


@given(st.floats(0, 1), st.integers(0, 2**31))
def test_interpolation_is_the_straight_line(time, seed):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    noisy = interpolate(clean, noise, torch.tensor([time, 0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(
        noisy[0], (1 - time) * clean[0].numpy() + time * noise[0].numpy(), rtol=1e-14, atol=1e-14
    )
    assert torch.equal(noisy[1], clean[1])
    assert torch.equal(noisy[2], noise[2])


def test_log_snr_is_the_log_of_signal_to_noise_power_and_inverts():
    time = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    np.testing.assert_allclose(
        log_snr(time), np.log((1 - time.numpy()) ** 2 / time.numpy() ** 2), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(time_from_log_snr(log_snr(time)), time, rtol=1e-13)
    assert time_from_log_snr(torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("time", [0.06, 0.2, 0.5, 0.9, 1.0])
def test_lone_bit_logit_is_bayes_rule(time):
    noisy = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64).view(101, 1, 1)
    logit = lone_bit_logit(noisy, torch.full((101,), time, dtype=torch.float64)).flatten().numpy()
    values = noisy.flatten().numpy()
    exact = stats.norm.logpdf(values, 1 - time, time) - stats.norm.logpdf(values, time - 1, time)
    np.testing.assert_allclose(logit, np.clip(exact, -30, 30), rtol=1e-9, atol=1e-9)


def test_lone_bit_logit_is_finite_at_both_ends():
    noisy = torch.tensor([-3.0, 0.0, 1.0]).view(3, 1, 1)
    assert lone_bit_logit(noisy, torch.zeros(3)).flatten().tolist() == [-30.0, 0.0, 30.0]
    assert lone_bit_logit(noisy, torch.ones(3)).flatten().tolist() == [0.0, 0.0, 0.0]


def test_lone_bit_mmse_matches_integration_and_monte_carlo():
    lam = np.linspace(-9, 3, 13)
    np.testing.assert_allclose(lone_bit_mmse(lam), [reference_mmse(math.exp(x)) for x in lam], rtol=2e-4, atol=1e-7)
    rng, num = np.random.default_rng(0), 400_000
    for value in (-2.0, 0.0, 1.5):
        gamma = math.exp(value)
        bit = rng.choice([-1.0, 1.0], num)
        error = (bit - np.tanh(gamma * bit + math.sqrt(gamma) * rng.standard_normal(num))) ** 2
        assert abs(error.mean() - lone_bit_mmse(np.array(value))) < 4 * error.std() / math.sqrt(num)


def test_lone_bit_mmse_limits_and_signs():
    dense = lone_bit_mmse(np.linspace(-30, 12, 2001))
    assert (dense >= 0).all() and (dense <= 1).all()
    assert (np.diff(dense) <= 1e-12).all()
    assert dense[0] == pytest.approx(1.0, abs=1e-9)
    assert dense[-1] == pytest.approx(0.0, abs=1e-12)
    # Any range and number of bins makes a law.
    for num_bins in (7, 64, 501):
        lone_bit_entropy_law(num_bins, -20.0, 8.0)


def test_entropy_rate_of_a_lone_bit_integrates_to_ln_2():
    lam = np.linspace(-25, 5, 6001)
    assert np.trapezoid(entropy_profile(lam, lone_bit_mmse(lam)), lam) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_density_integrates_to_one_and_describes_the_samples(law):
    lam = np.linspace(-60, 60, 1_200_001)
    time = torch.sigmoid(torch.from_numpy(-0.5 * lam[::-1].copy()))
    time = time[(time > 0) & (time < 1)]
    density = law.density(time).numpy()
    assert (density >= 0).all()
    steps = 0.5 * (density[1:] + density[:-1]) * np.diff(time.numpy())
    cumulative = np.concatenate([[0.0], np.cumsum(steps)])
    assert cumulative[-1] == pytest.approx(1.0, abs=2e-4)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    samples = law.sample(uniforms)
    assert samples.dtype == torch.float32 and (samples >= 0).all() and (samples <= 1).all()
    order = np.argsort(time.numpy())
    test = stats.kstest(samples.double().numpy(), lambda t: np.interp(t, time.numpy()[order], cumulative[order]))
    assert test.pvalue > 1e-3
    # Quantiles, not only the bulk: sampling is the inverse of the distribution function up to direction.
    grid = law.sample(torch.linspace(0.05, 0.95, 19, dtype=torch.float64)).sort().values
    np.testing.assert_allclose(np.interp(grid, time.numpy(), cumulative), np.linspace(0.05, 0.95, 19), atol=3e-4)


def test_logit_normal_is_scipys():
    time = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    logit = np.log(time.numpy() / (1 - time.numpy()))
    expected = stats.norm.pdf(logit, 0.3, 1.2) / (time.numpy() * (1 - time.numpy()))
    np.testing.assert_allclose(LogitNormalTime(0.3, 1.2).density(time), expected, rtol=1e-10)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_extreme_uniforms_give_usable_times_and_weights(law):
    time = law.sample(torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0]))
    assert torch.isfinite(time).all() and (time >= 0).all() and (time <= 1).all()
    if not isinstance(law, UniformTime):
        assert time.min() > 0 and time.max() < 1  # laws on the whole line never reach their ends
    for name in ("x0", "velocity", "likelihood"):
        weight = loss_weight(name, time, law)
        assert torch.isfinite(weight).all() and (weight >= 0).all()


def test_likelihood_weight_does_not_jump_where_rounding_leaves_the_table():
    """The noisiest time of a table rounds to just outside it; the weight there is that of its neighbours."""
    law = lone_bit_entropy_law()
    uniforms = torch.tensor([0.0, 1e-7, 1e-6, 1e-5])
    weight = loss_weight("likelihood", law.sample(uniforms), law)
    assert weight.max() < 2 * weight.min()


@pytest.mark.parametrize("name", ["uniform", "logit_normal", "entropy"])
def test_likelihood_weight_estimates_nats_per_bit(name):
    """E[weight x squared error] under the law is ln 2 for a lone uniform bit, whatever the law."""
    law = LAWS[name]
    time = law.sample(MIDPOINTS)
    error = np.interp(log_snr(time).clamp(-40, 8), np.linspace(-40, 8, 4001), lone_bit_mmse(np.linspace(-40, 8, 4001)))
    assert float((loss_weight("likelihood", time, law).numpy() * error).mean()) == pytest.approx(math.log(2), abs=1e-3)


def test_other_weights():
    time = torch.tensor([0.0, 0.02, 0.05, 0.5, 1.0])
    law = UniformTime()
    assert loss_weight("x0", time, law).tolist() == [1.0] * 5
    np.testing.assert_allclose(loss_weight("velocity", time, law), [400, 400, 400, 4, 1], rtol=1e-6)
    np.testing.assert_allclose(loss_weight("likelihood", time, law)[2:], [0.95 / 0.05**3, 4.0, 0.0], rtol=1e-5)
    with pytest.raises(ValueError, match="sigma"):
        loss_weight("sigma", time, law)


def test_uniform_time_mean_error_of_independent_bits_is_0_4627():
    error = lone_bit_mmse(log_snr(MIDPOINTS[::40]).numpy())
    assert error.mean() == pytest.approx(0.46269, abs=1e-4)


def test_entropy_law_places_equal_entropy_between_equal_quantiles():
    law = lone_bit_entropy_law(num_bins=512)
    lam = law.sample_log_snr(torch.arange(0, 9, dtype=torch.float64) / 8).numpy()
    shares = []
    for low, high in zip(lam[:-1], lam[1:], strict=True):
        grid = np.linspace(low, high, 2001)
        shares.append(np.trapezoid(entropy_profile(grid, lone_bit_mmse(grid)), grid))
    np.testing.assert_allclose(shares, math.log(2) / 8, rtol=0.01)


def test_laws_are_chosen_by_name():
    table = TabulatedTime([0.0, 1.0], [1.0])
    assert isinstance(make_time_law("uniform"), UniformTime)
    assert isinstance(make_time_law("logit_normal"), LogitNormalTime)
    assert isinstance(make_time_law("entropy"), TabulatedTime)
    assert make_time_law("entropy", table) is table
    with pytest.raises(ValueError, match="cosine"):
        make_time_law("cosine")
    with pytest.raises(ValueError, match="std > 0"):
        LogitNormalTime(0.0, 0.0)


@pytest.mark.parametrize(
    ("edges", "weights"),
    [
        ([0.0, 1.0], [1.0, 1.0]),
        ([1.0, 0.0], [1.0]),
        ([0.0, 1.0, 1.0], [1.0, 1.0]),
        ([0.0, 1.0], [-1.0]),
        ([0.0, 1.0], [math.nan]),
        ([0.0, 1.0, 2.0], [0.0, 0.0]),
    ],
)
def test_bad_tables_are_refused(edges, weights):
    with pytest.raises(ValueError, match="time table"):
        TabulatedTime(edges, weights)


def test_table_density_is_zero_outside():
    table = TabulatedTime([-1.0, 0.0, 2.0], [1.0, 3.0])
    lam = torch.tensor([-1.5, -0.5, 0.5, 1.9, 2.5])
    np.testing.assert_allclose(table.log_snr_density(lam), [0, 0.25, 0.375, 0.375, 0])


@given(st.integers(1, 9), st.integers(0, 2**31))
def test_stratified_uniforms_put_one_in_every_stratum(num, seed):
    uniforms = torch.rand(5, num, generator=torch.Generator().manual_seed(seed))
    spread = stratified_uniforms(uniforms)
    assert torch.equal((spread * num).floor().clamp(max=num - 1), torch.arange(num).expand(5, num).float())
    np.testing.assert_allclose(spread * num - torch.arange(num), uniforms, atol=1e-5)
    assert stratified_uniforms(torch.full((num,), 1 - 2.0**-24)).max() < 1


def test_stratified_uniforms_stay_uniform():
    spread = stratified_uniforms(torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0)))
    assert stats.kstest(spread[torch.arange(20_000), torch.arange(20_000) % 4], "uniform").pvalue > 1e-3
