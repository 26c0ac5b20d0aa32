"""The training data's loader timed against megatron-core's own GPT dataset, on documents of the same lengths.

By default both read sparse files, which take no space on disk and read as zeros, so what is measured is the work of a
core and not a disk. megatron-core's holds an int32 a token, ours packed codes. Apart from the timed turns, each is
opened in a process of its own, which tells how long that takes and how its memory grows as samples are read.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader

from megatron_bitlm.benchmarks.datasets import write_sparse_dataset, write_sparse_int32_dataset
from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison, take_turns
from megatron_bitlm.benchmarks.memory import resident_bytes
from megatron_bitlm.benchmarks.report import check_output, describe_device, make_report, publish
from megatron_bitlm.data.card import read_card
from megatron_bitlm.data.packing import DataConfig, SampleLoader, build_datasets, quiet_megatron
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.parallel.processes import end_with_parent

_MEGATRON, _OURS = "megatron_gpt_dataset", "bitlm"
_SEED = 1234


@dataclass(kw_only=True)
class LoaderBenchmark(BenchmarkConfig):
    """Samples of packed documents in random order, in one process.

    Attributes:
        dataset: Prefix of a dataset made by `bitlm preprocess`; by default a sparse one is made.
        num_documents: Documents of the sparse one.
        dataset_bytes: Bytes of its codes.
        sequence_length: S.
        micro_batch_size: Samples of a batch.
        num_samples: Samples of a turn; four times as many are read where memory is watched.
        cache_dir: Folder for the sample indices; by default they are built in memory.
    """

    dataset: str | None = None
    num_documents: int = 10_000_000
    dataset_bytes: int = 10_000_000_000
    sequence_length: int = 16_384
    micro_batch_size: int = 1
    num_samples: int = 500
    cache_dir: str | None = None

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        super().validate()
        if self.micro_batch_size < 1 or self.num_samples < 1 or self.num_samples % self.micro_batch_size:
            raise BitLMError(
                f"num_samples {self.num_samples} is not a positive multiple of micro_batch_size {self.micro_batch_size}"
            )

    @property
    def num_samples_in_all(self) -> int:
        """Enough for the timed turns and for watching memory, whichever is more."""
        return self.num_samples * max(self.num_warmup + self.num_repetitions, 5)


@dataclass(frozen=True)
class Places:
    """Prefixes of the two datasets."""

    bitlm: str
    megatron: str


def bench_loader(settings: LoaderBenchmark, output: Path | None = None) -> dict[str, Any]:
    """Times the loaders, prints a table and returns the figures (also as JSON in ``output``).

    Raises:
        BitLMError: A dataset that cannot be read or is too small, or an ``output`` that exists.
    """
    check_output(output)
    settings.validate()
    device = settings.torch_device()
    machine = describe_device(device)
    names = (_MEGATRON, _OURS)
    with tempfile.TemporaryDirectory(prefix="bitlm-bench-") as folder:
        places = _datasets(settings, Path(folder))
        card = read_card(places.bitlm)
        facts: dict[str, Any] = {name: _watch(settings, places, name) for name in names}
        calls = {name: _turn(settings, open_loader(settings, places, name)) for name in names}
        turns = take_turns(calls, settings, device)
        facts |= {"num_documents": card.num_documents, "bin_bytes": card.bin_num_bytes}
    tokens = float(settings.num_samples * settings.sequence_length)
    comparison = Comparison(_MEGATRON, turns, dict.fromkeys(names, tokens), "tokens")
    lines = [
        f"loading of samples of {settings.sequence_length} tokens from {card.num_documents:,} documents, "
        f"{card.bin_num_bytes / 1e9:.2f} GB of codes, in one process",
        comparison.table(),
        *(_fact_line(name, facts[name]) for name in names),
    ]
    return publish(make_report("loader", settings, machine, comparison, facts), "\n".join(lines), output)


def open_loader(settings: LoaderBenchmark, places: Places, name: str) -> Iterator[Any]:
    """Opens a dataset, builds its sample index, and gives its batches."""
    if name == _MEGATRON:
        samples = _megatron_samples(settings, places.megatron)
        return iter(DataLoader(samples, batch_size=settings.micro_batch_size, shuffle=False))
    config = DataConfig(
        paths=[places.bitlm],
        sequence_length=settings.sequence_length,
        split="1,0",
        cache_dir=settings.cache_dir,
    )
    train, _ = build_datasets(
        config,
        block_size=read_card(places.bitlm).block_size,
        num_train_samples=settings.num_samples_in_all,
        num_valid_samples=0,
        seed=_SEED,
    )
    return iter(SampleLoader(train, micro_batch_size=settings.micro_batch_size))


class _Vocabulary:
    """What megatron-core asks of a tokenizer for samples that are never tokenised."""

    vocab_size = None
    eod = 0
    pad = 1
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012 - constant


def _megatron_samples(settings: LoaderBenchmark, prefix: str) -> Any:
    config = GPTDatasetConfig(
        random_seed=_SEED,
        sequence_length=settings.sequence_length,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=settings.cache_dir or "",
        tokenizer=_Vocabulary(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [settings.num_samples_in_all, 0, 0]
    with quiet_megatron():
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def _turn(settings: LoaderBenchmark, batches: Iterator[Any]) -> Callable[[], object]:
    def run() -> None:
        for _ in range(settings.num_samples // settings.micro_batch_size):
            next(batches)

    return run


def _watch(settings: LoaderBenchmark, places: Places, name: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        return pool.submit(watch_memory, settings, places, name).result()


def watch_memory(settings: LoaderBenchmark, places: Places, name: str) -> dict[str, Any]:
    """Seconds to open, and resident bytes before, when open, and after every turn's number of samples."""
    before, start, cpu_start = resident_bytes(), time.perf_counter(), time.process_time()
    run = _turn(settings, open_loader(settings, places, name))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    resident = [resident_bytes()]
    for _ in range(4):
        run()
        resident.append(resident_bytes())
    return {
        "open_seconds": seconds,
        "open_cpu_seconds": cpu_seconds,
        "resident_bytes_before": before,
        "resident_bytes": resident,
        "num_samples_between": settings.num_samples,
    }


def _datasets(settings: LoaderBenchmark, folder: Path) -> Places:
    prefix = settings.dataset or str(folder / "sparse")
    if settings.dataset is None:
        write_sparse_dataset(Path(prefix), settings.num_documents, settings.dataset_bytes)
    write_sparse_int32_dataset(folder / "int32", Path(prefix))
    return Places(prefix, str(folder / "int32"))


def _fact_line(name: str, found: dict[str, Any]) -> str:
    if found["resident_bytes_before"] is None:
        memory = "memory is not told by this system"
    else:
        megabytes = ", ".join(f"{value / 1e6:,.0f}" for value in found["resident_bytes"])
        memory = f"resident MB when open and after each {found['num_samples_between']} samples: {megabytes}"
    return (
        f"{name}: opened in {found['open_seconds']:.1f} s ({found['open_cpu_seconds']:.1f} s of CPU); {memory} "
    ).rstrip()
