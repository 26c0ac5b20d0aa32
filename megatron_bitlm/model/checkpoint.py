"""Reading checkpoints: megatron-core's torch_dist format in a folder per step, complete or absent.

runs/NAME/checkpoints/
    step_00000500/    tensors, tokenizer/, code_map.npy unless identity, and
        meta.json     format version, step, settings, code map and tokenizer hashes, sizes and checksums; written last
    latest            name of the newest complete folder
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core import parallel_state

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.parallel.safe_loading import load_sharded

FORMAT, VERSION = "bitlm-checkpoint", 2
META_FILE, TOKENIZER_FOLDER, CODE_MAP_FILE = "meta.json", "tokenizer", "code_map.npy"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


def step_folder(step: int) -> str:
    """Folder name of a step, e.g. step_00000500."""
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every complete checkpoint under `folder`, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and (path / "meta.json").is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by a step folder, a checkpoints folder or a run folder (the newest inside).

    Raises:
        BitLMError: Nothing complete is there.
    """
    path = Path(path)
    if (path / "meta.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        found = complete_checkpoints(folder)
        if found:
            return found[-1][1]
    raise BitLMError(f"no complete checkpoint in {path}: give a run folder or one of its checkpoints/step_* folders")


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint, after checking its version and the files' sizes.

    Raises:
        BitLMError: Unreadable, another format or version, or a file missing or truncated.
    """
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BitLMError(f"cannot read {file}: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise BitLMError(f"{file} is not a {FORMAT} of version {VERSION}; it was written by another release")
    for name, known in meta["files"].items():
        part = path / name
        actual = part.stat().st_size if part.is_file() else None
        if actual != known["bytes"]:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {known['bytes']}"
            raise BitLMError(f"checkpoint file {part} {state}; use an earlier checkpoint")
    return meta


def load_code(path: Path, meta: dict[str, Any]) -> BinaryCode:
    """The token code of a checkpoint.

    Raises:
        BitLMError: The stored code map is not the one meta.json names.
    """
    map_file = path / CODE_MAP_FILE
    code_map = np.load(map_file, allow_pickle=False) if map_file.is_file() else None
    code = BinaryCode(meta["data"]["vocab_size"], code_map)
    if code.code_map_hash != meta["data"]["code_map_hash"]:
        raise BitLMError(f"the code map in {path} is not the one the checkpoint was trained with")
    return code


def model_state(chunks: list) -> dict[str, Any]:
    """Sharded state of the unwrapped model chunks, one entry a chunk."""
    metadata = sharding_metadata()
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}


def load_model(path: Path, chunks: list) -> None:
    """Load the model's tensors alone, whatever layout wrote them; no code found in the folder is run. Collective."""
    loaded = load_sharded(model_state(chunks), path)
    for name, chunk in zip(model_state(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=True)


def sharding_metadata() -> dict[str, Any]:
    """How megatron-core shards a checkpoint: so that any other parallel layout loads it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": False,
    }
