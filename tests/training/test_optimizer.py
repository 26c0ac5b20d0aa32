"""Schedules at known steps, parameter groups, and gradient norms by part."""

import math

import pytest
import torch

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.state import initialize_parallel, shutdown_parallel
from megatron_bitlm.training.optimizer import OptimizerConfig, build_scheduler
from megatron_bitlm.training.session import Session, read_data_facts
from tests.training_runs import read_metrics, run_config, train

PEAK, LOWEST = 1e-3, 1e-4
PEAK_OF_SETTINGS = 2e-3


def cosine(progress):
    return LOWEST + (PEAK - LOWEST) * 0.5 * (1 + math.cos(math.pi * progress))


class Groups:
    """As much of an optimizer as a schedule touches."""

    def __init__(self):
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0, "max_lr": PEAK, "min_lr": LOWEST}]


def rates(num_steps, **settings):
    optimizer = Groups()
    config = OptimizerConfig(learning_rate=PEAK, min_learning_rate_ratio=0.1, **settings)
    config.validate(num_steps)
    scheduler = build_scheduler(config, optimizer, num_steps)
    found = [None]  # steps count from 1
    for _ in range(num_steps):
        scheduler.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "cosine"}, {10: PEAK, 35: cosine(0.5), 60: LOWEST}),
        ({"schedule": "linear"}, {10: PEAK, 35: (PEAK + LOWEST) / 2, 60: LOWEST}),
        ({"schedule": "constant"}, {10: PEAK, 35: PEAK, 60: PEAK}),
        ({"schedule": "wsd", "wsd_decay_steps": 20}, {10: PEAK, 40: PEAK, 50: cosine(0.5), 60: LOWEST}),
        ({"schedule": "cosine", "decay_steps": 30}, {10: PEAK, 20: cosine(0.5), 30: LOWEST, 60: LOWEST}),
    ],
    ids=["cosine", "linear", "constant", "wsd", "shorter than the run"],
)
def test_learning_rates_at_known_steps(settings, expected):
    found = rates(60, warmup_steps=10, **settings)
    for step, rate in {1: PEAK / 10, 5: PEAK / 2, **expected}.items():
        assert found[step] == pytest.approx(rate, rel=1e-9), f"step {step}"


def test_no_warmup_starts_at_the_peak():
    assert rates(4, warmup_steps=0, schedule="constant")[1:] == [PEAK] * 4


@pytest.fixture
def session(tmp_path, dataset, request):
    """A session of `request.param` overrides, with its process group."""
    overrides = getattr(request, "param", {})
    config = run_config(tmp_path / "run", dataset, **overrides)
    state = initialize_parallel(config.parallel, seed=1)
    try:
        yield Session(config, read_data_facts(config), state, tmp_path / "run" / "checkpoints")
    finally:
        shutdown_parallel()


UNEVEN = {
    "optimizer__head_learning_rate_multiplier": 0.25,
    "optimizer__weight_decay": 0.3,
    "parallel__use_distributed_optimizer": False,
}


@pytest.mark.parametrize("session", [UNEVEN], indirect=True)
def test_weight_decay_spares_vectors_and_the_head_has_its_own_rate(session):
    names = {
        id(parameter): (name, parameter) for chunk in session.chunks for name, parameter in chunk.named_parameters()
    }
    seen = {}
    for group in session.optimizer.param_groups:
        for parameter in group["params"]:
            name, own = names.pop(id(parameter))
            assert name.startswith("head.") == bool(group["is_decoupled_lr"]), name
            rate = PEAK_OF_SETTINGS * (0.25 if name.startswith("head.") else 1.0)
            assert group["max_lr"] == pytest.approx(rate) and group["min_lr"] == pytest.approx(rate * 0.1), name
            spared = own.ndim == 1
            assert group["wd_mult"] == (0.0 if spared else 1.0), name
            seen.setdefault((name.startswith("head."), spared), []).append(name)
    assert not names and len(seen) == 4  # every parameter in one group; all four kinds occur


@pytest.mark.parametrize(
    "settings",
    [{}, {"parallel__use_distributed_optimizer": False}, {"training__precision": "bf16"}],
    ids=["distributed", "plain", "bf16"],
)
@pytest.mark.parametrize("clip", [0.0, 0.01, 100.0])
def test_gradient_norms_of_the_parts_make_up_the_whole(tmp_path, dataset, clip, settings):
    run = {"training__num_steps": 2, "optimizer__warmup_steps": 0, "optimizer__clip_grad": clip, **settings}
    train(tmp_path / "run", dataset, **run)
    records = read_metrics(tmp_path / "run")
    for record in records:
        parts = math.hypot(record["gradient_norm/backbone"], record["gradient_norm/head"])
        assert parts == pytest.approx(record["gradient_norm"], rel=1e-4)
    assert records[0]["gradient_norm"] > 0.01  # so that the smallest clip binds and the largest does not
    assert records[1]["gradient_norm/backbone"] > 0


def test_norms_are_those_before_clipping(tmp_path, dataset):
    norms = []
    for clip in (0.0, 0.01):
        train(
            tmp_path / str(clip),
            dataset,
            training__num_steps=1,
            optimizer__warmup_steps=0,
            optimizer__clip_grad=clip,
        )
        [record] = read_metrics(tmp_path / str(clip))
        norms.append({name: value for name, value in record.items() if "norm" in name})
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_reported_rate_is_the_backbones(tmp_path, dataset):
    train(tmp_path / "run", dataset, training__num_steps=2, optimizer__warmup_steps=1, **UNEVEN)
    assert read_metrics(tmp_path / "run")[0]["learning_rate"] == pytest.approx(PEAK_OF_SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"min_learning_rate_ratio": 1.5}, "min_learning_rate_ratio must lie in .* got 1.5"),
        ({"warmup_steps": 60}, "warmup_steps 60 must be less than the schedule's 60 steps"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
        ({"decay_steps": 0}, "decay_steps must be at least 1, got 0"),
        ({"schedule": "wsd"}, "wsd_decay_steps must lie in 1..60 with wsd, got None"),
        ({"schedule": "wsd", "wsd_decay_steps": 61}, "wsd_decay_steps must .* got 61"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\), got 1.0"),
        ({"epsilon": -1e-8}, "epsilon must be finite and not negative, got -1e-08"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and not negative, got inf"),
        ({"clip_grad": math.nan}, "clip_grad must be finite and not negative, got nan"),
        ({"head_learning_rate_multiplier": -1.0}, "head_learning_rate_multiplier"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(BitLMError, match=f"optimizer.{message}"):
        OptimizerConfig(**{"warmup_steps": 10, **settings}).validate(60)


@pytest.mark.parametrize("session", [{}], indirect=True)
def test_a_step_moves_every_parameter_that_has_a_gradient(session):
    before = {name: p.detach().clone() for name, p in session.chunks[0].named_parameters()}
    batches = iter(session.loader(0))
    for step in (1, 2):
        session.step(step, session.next_inputs(batches))
    for name, parameter in session.chunks[0].named_parameters():
        assert not torch.equal(parameter, before[name]), name
