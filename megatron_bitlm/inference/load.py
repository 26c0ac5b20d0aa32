"""From a training checkpoint of any layout to a model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bitlm.data.tokenizer import Tokenizer
from megatron_bitlm.data.tokenizer_loading import load_tokenizer
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.profile import read_profile
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.path import TabulatedTime
from megatron_bitlm.model.bitlm import BitLM
from megatron_bitlm.model.build import ModelConfig, build_chunks, model_config, unwrap
from megatron_bitlm.model.checkpoint import (
    CODE_MAP_FILE,
    META_FILE,
    TOKENIZER_FOLDER,
    find_checkpoint,
    load_code,
    load_model,
    read_meta,
)
from megatron_bitlm.model.softmax import SoftmaxLM
from megatron_bitlm.parallel.state import ParallelConfig, ParallelState, initialize_parallel, shutdown_parallel


@dataclass
class LoadedModel:
    """A model ready to generate or to be scored, with what its checkpoint says of it.

    profile: the entropy rate measured by `bitlm calibrate`, or None.
    """

    model: BitLM | SoftmaxLM
    config: ModelConfig
    code: BinaryCode
    tokenizer: Tokenizer
    bos_id: int
    eos_id: int
    step: int
    settings: dict[str, Any]
    state: ParallelState
    profile: TabulatedTime | None


@dataclass
class CheckpointFacts:
    """What a checkpoint says of itself beside its tensors.

    path: the step folder; meta: of meta.json; config: the model; code and tokenizer: those it was trained with.
    """

    path: Path
    meta: dict[str, Any]
    config: ModelConfig
    code: BinaryCode
    tokenizer: Tokenizer


def read_checkpoint(checkpoint: str | Path) -> CheckpointFacts:
    """The facts of a run folder's newest checkpoint, or of a step folder; no tensor is read.

    Raises:
        BitLMError: No complete checkpoint, a damaged one, or one whose code or tokenizer does not match.
    """
    path = find_checkpoint(checkpoint)
    meta = _read_meta(path)
    code = _load_code(path, meta)
    tokenizer = load_tokenizer(path / TOKENIZER_FOLDER)
    if tokenizer.fingerprint != meta["data"]["tokenizer_fingerprint"]:
        raise BitLMError(f"{path / TOKENIZER_FOLDER} is not the tokenizer the checkpoint was trained with")
    return CheckpointFacts(path, meta, model_config(meta["settings"]), code, tokenizer)


@contextmanager
def loaded_model(
    checkpoint: str | Path, *, precision: str | None = None, tensor_parallel_size: int = 1
) -> Iterator[LoadedModel]:
    """The model of a run folder or step folder, in eval mode; process groups end with the context.

    Args:
        checkpoint: A run folder, its checkpoints folder or a step folder.
        precision: fp32 or bf16; null takes the one it was trained in.
        tensor_parallel_size: Processes that share the model, which torchrun started; whatever layout trained it.

    Raises:
        BitLMError: No complete checkpoint, a damaged one, sizes that do not divide, or a checkpoint whose code or
            tokenizer does not match.
    """
    facts = read_checkpoint(checkpoint)
    path, meta, config, code, tokenizer = facts.path, facts.meta, facts.config, facts.code, facts.tokenizer
    settings = meta["settings"]
    layout = ParallelConfig(tensor_model_parallel_size=tensor_parallel_size)
    state = initialize_parallel(layout, seed=0, model=config.resolve_backbone())
    try:
        chunks = build_chunks(
            config,
            state,
            code=code,
            bos_id=meta["data"]["bos_id"],
            eos_id=meta["data"]["eos_id"],
            precision=precision or settings["training.precision"],
            seed=0,
        )
        model = unwrap(chunks[0])
        _load_weights(path, model)
        model.eval()
        yield LoadedModel(
            model,
            config,
            code,
            tokenizer,
            meta["data"]["bos_id"],
            meta["data"]["eos_id"],
            meta["step"],
            settings,
            state,
            read_profile(path),
        )
    finally:
        shutdown_parallel()


def _read_meta(path: Path) -> dict[str, Any]:
    """meta.json with everything that loading needs."""
    try:
        meta = read_meta(path)
        needed = [meta["step"], meta["settings"]["training.precision"]]
        needed += [meta["data"][name] for name in ("vocab_size", "code_map_hash", "tokenizer_fingerprint")]
        needed += [meta["data"][name] for name in ("bos_id", "eos_id")]
    except (KeyError, TypeError, AttributeError) as error:
        raise BitLMError(f"{path / META_FILE} is not complete ({error}); use another checkpoint") from error
    return meta


def _load_code(path: Path, meta: dict[str, Any]) -> BinaryCode:
    try:
        return load_code(path, meta)
    except BitLMError:
        raise
    except (ValueError, OSError, EOFError) as error:
        size = meta["data"]["vocab_size"]
        raise BitLMError(f"{path / CODE_MAP_FILE} is not a code map of {size} ids; use another checkpoint") from error


def _load_weights(path: Path, model: BitLM | SoftmaxLM) -> None:
    try:
        load_model(path, [model])
    except (BitLMError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[-1].strip()[:200]}"
        raise BitLMError(
            f"cannot load {path}: damaged, or not the model its {META_FILE} tells of ({reason})"
        ) from error
