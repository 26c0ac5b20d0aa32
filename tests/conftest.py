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

_NUM_THREADS_OF_A_RUN = 50  # of its process groups, in a world of one


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
    dozen runs in one process their threads would take more time than the tests. Fixtures may keep theirs.
    """
    before = _num_threads()
    yield
    if _num_threads() > before + _NUM_THREADS_OF_A_RUN // 2:
        gc.collect()


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))
