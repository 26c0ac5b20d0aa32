"""Settings that every test shares."""

import gc
import os
from collections.abc import Iterator

# Before torch is imported: one thread a process (ranks and workers share the cores), no look-ups of the hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same commit gives the same answer, and a slow machine is not a failure.
settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")

_NUM_QUIET_THREADS = 40  # torch and the tests themselves have fewer; one world of process groups has more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none"))


@pytest.fixture(autouse=True)
def no_left_over_process_groups() -> Iterator[None]:
    """Frees the process groups of a run that has ended: each gloo group polls a hundred times a second.

    They hang on models, whose modules refer to each other, until Python's collector happens to come by; after some
    dozen runs in one process their threads would take more time than the tests.
    """
    yield
    if len(os.listdir("/proc/self/task")) > _NUM_QUIET_THREADS:
        gc.collect()
