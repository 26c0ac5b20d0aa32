"""Small corpora, configurations and runs for the tests that train."""

import copy
import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_bitlm.config import load_run
from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.trainer import Outcome, pretrain

TIMINGS = ("seconds", "tokens_per_second", "mfu")

SETTINGS: dict[str, Any] = {
    "run": {"seed": 1},
    "model": {
        "preset": "tiny",
        "backbone": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 2,
            "num_query_groups": 2,
            "head_dim": 16,
        },
        "head": {"width": 32, "num_layers": 2, "head_dim": 16, "adaln_init_std": 0.05},
    },
    "data": {"sequence_length": 64, "split": "75,25,0"},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 3},
    "training": {"num_steps": 12, "global_batch_size": 8, "micro_batch_size": 4, "progress": "off"},
    "checkpoint": {"interval_steps": 4},
    "validation": {"interval_steps": 6, "num_samples": 16},
}


def corpus(num_documents: int = 96, seed: int = 0) -> list[str]:
    """Documents of a few made-up words, so that a letter tells much about the next one."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 7))) for _ in range(40)]
    return [" ".join(generator.choices(words, k=generator.randint(8, 40))) + ".\n" for _ in range(num_documents)]


def write_corpus(path: Path, documents: list[str]) -> Path:
    """JSONL with one document a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def make_dataset(folder: Path, name: str, documents: list[str], **settings: Any) -> str:
    """Prefix of a dataset of bytes; `settings` go to `preprocess`."""
    source = write_corpus(folder / f"{name}.jsonl", documents)
    prefix = str(folder / name)
    preprocess(
        PreprocessConfig(
            **{"input": [str(source)], "output": prefix, "tokenizer": "bytes", "num_workers": 1} | settings
        )
    )
    return prefix


def run_settings(directory: Path | str, prefix: str, **overrides: Any) -> dict[str, Any]:
    """SETTINGS for a run; an override is named section__field, deeper ones section__part__field."""
    settings = copy.deepcopy(SETTINGS)
    settings["run"]["directory"] = str(directory)
    settings["data"]["paths"] = [prefix]
    for name, value in overrides.items():
        *path, last = name.split("__")
        target = settings
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return settings


def run_config(directory: Path | str, prefix: str, **overrides: Any) -> RunConfig:
    """The configuration of `run_settings`, read from YAML as `bitlm pretrain` does."""
    directory = Path(directory)
    path = directory.with_name(f"{directory.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(run_settings(directory, prefix, **overrides)))
    return load_run(str(path))


def train(directory: Path | str, prefix: str, **overrides: Any) -> Outcome:
    """Run or resume in this process."""
    return pretrain(run_config(directory, prefix, **overrides))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl without what a clock measured."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def checkpoint_tensors(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name, model and optimizer, read without megatron."""
    reader = FileSystemReader(directory / "checkpoints" / f"step_{step:08d}")
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in stored.items()
        if isinstance(item, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def start_run(config: RunConfig) -> multiprocessing.Process:
    """Start `pretrain(config)` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "megatron_bitlm.training.trainer"])
    forkserver.ensure_running()
    process = context.Process(target=_train_alone, args=(config,), daemon=False)
    process.start()
    return process


def kill_at_step(process: multiprocessing.Process, directory: Path, step: int, timeout_s: float = 120) -> int:
    """SIGKILL the run once metrics.jsonl shows `step`; returns the exit code."""
    deadline, file = time.monotonic() + timeout_s, directory / "metrics.jsonl"
    needle = f'"step": {step},'
    while not (file.exists() and needle in file.read_text()):
        assert process.is_alive() and time.monotonic() < deadline, f"the run never came to step {step}"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


def _train_alone(config: RunConfig) -> None:
    torch.set_num_threads(1)
    pretrain(config)
