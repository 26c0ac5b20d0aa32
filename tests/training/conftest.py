"""Datasets that the training tests share."""

import pytest
import torch

from tests.training_runs import corpus, make_dataset


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Other tests and ranks share the cores, and sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> str:
    """Prefix of a dataset of bytes with m = 4."""
    return make_dataset(tmp_path_factory.mktemp("data"), "four", corpus())


@pytest.fixture(scope="session")
def dataset_of_single_tokens(tmp_path_factory) -> str:
    """Prefix of a dataset of bytes with m = 1."""
    return make_dataset(tmp_path_factory.mktemp("data"), "one", corpus(), block_size=1)
