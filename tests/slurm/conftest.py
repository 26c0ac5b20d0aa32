"""A Slurm cluster and a dataset that the tests of this folder share."""

import contextlib
import io
from pathlib import Path

import pytest

from megatron_bitlm.cli import main
from tests.slurm.cluster import SlurmCluster, why_not
from tests.training_runs import corpus, make_dataset


@pytest.fixture(scope="module")
def cluster():
    reason = why_not()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    with SlurmCluster() as running:
        yield running


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), "four", corpus())


@pytest.fixture
def bitlm(cluster, monkeypatch):
    """`bitlm ARGUMENTS` in this process, as on a login node of the cluster; returns what it prints."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def call(*arguments: str) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert main(arguments) == 0
        return output.getvalue().strip()

    return call
