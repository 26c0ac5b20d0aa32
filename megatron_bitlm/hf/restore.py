"""From a Hugging Face folder to a training checkpoint: one of ours back bit for bit, or a stock Qwen3 to start from.

Weights are read one tensor at a time, and no code in the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megatron_bitlm import __version__
from megatron_bitlm.data.files import whole_folder, write_atomic
from megatron_bitlm.data.tokenizer import Tokenizer
from megatron_bitlm.data.tokenizer_loading import load_tokenizer
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.hf.export import (
    DESCRIPTION_FILE,
    DTYPES,
    FORMAT,
    VERSION,
    bitlm_module_names,
    qwen3_shape,
    softmax_parts,
)
from megatron_bitlm.hf.names import Part, backbone_parts, module_parts
from megatron_bitlm.inference.load import CheckpointFacts
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.head import DiffusionHead
from megatron_bitlm.model.build import ModelConfig, build_input, model_config
from megatron_bitlm.model.checkpoint import TOKENIZER_FOLDER, load_code, step_folder
from megatron_bitlm.model.initialization import initialize_module
from megatron_bitlm.parallel.checkpoint_tensors import CheckpointTensorsWriter
from megatron_bitlm.training.checkpoint import seal_checkpoint
from megatron_bitlm.training.checks import data_identity
from megatron_bitlm.training.config import RunConfig, flat_settings
from megatron_bitlm.training.session import read_data_facts


class TensorFolder:
    """The safetensors files of a folder.

    Raises:
        BitLMError: No weights, an unreadable file, or an index that does not fit the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(_read_json(index)["weight_map"].values()))
        self.files: dict[str, Path] = {}
        for name in names:
            if Path(name).name != name:
                raise BitLMError(f"{index} names {name!r}, which is no file beside it")
            with self._open(path / name) as file:
                self.files |= dict.fromkeys(file.keys(), path / name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        with self._open(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, num_rows: int | None = None) -> Tensor:
        """A tensor, or its first rows."""
        with self._open(self.files[name]) as file:
            return file.get_tensor(name) if num_rows is None else file.get_slice(name)[:num_rows]

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise BitLMError(f"cannot read {path}: {error}") from error


@dataclass
class _Source:
    """What is written: parts by name, where each tensor comes from, and what belongs beside the tensors."""

    parts: list[tuple[str, Part]]
    read: Callable[[str], Tensor]
    meta: dict[str, Any]
    code: BinaryCode
    tokenizer: Tokenizer
    dtype: torch.dtype


def import_folder(folder: str | Path, output: str | Path, config: RunConfig | None = None) -> Path:
    """Make a training checkpoint in `output`; returns its step folder.

    Args:
        folder: What `bitlm export` wrote, or a Qwen3 model's folder.
        output: Folder to make; `run.initial_checkpoint` of a run may name it.
        config: The run that starts from a Qwen3 model, whose backbone it must have. A BitLM gets the backbone, with new
            input and head; the softmax baseline also the vocabulary tables.

    Raises:
        BitLMError: Another architecture, missing or extra tensors, wrong shapes, or an output that exists.
    """
    folder, output = Path(folder), Path(output)
    if output.exists():
        raise BitLMError(f"{output} exists and is left as it is; name another folder to import to")
    found = _read_json(folder / "config.json")
    tensors = TensorFolder(folder)
    if (folder / DESCRIPTION_FILE).is_file():
        source = _exported(folder, tensors)
    elif found.get("model_type") == "qwen3":
        if config is None:
            raise BitLMError(
                f"{folder} is a stock Qwen3 model: name the run that starts from it with --config RUN.yaml"
            )
        source = _stock(folder, found, tensors, config)
    else:
        raise BitLMError(
            f"{folder} holds a {found.get('model_type', 'model of no known type')!r}; only folders of `bitlm export` "
            "and Qwen3 models can be imported"
        )
    name = step_folder(source.meta["step"])
    with whole_folder(output) as aside:
        (aside / name).mkdir()
        _write(aside / name, source)
        write_atomic(aside / "latest", f"{name}\n".encode())
    return output / name


def _write(step: Path, source: _Source) -> None:
    writer = CheckpointTensorsWriter(step)
    num_layers = model_config(source.meta["settings"]).resolve_backbone().num_layers
    for (key, layer), group in groupby(source.parts, lambda item: (item[1].key, item[1].layer)):
        tensor = _joined([(source.read(name), part) for name, part in group]).to(source.dtype)
        writer.add(key, tensor, first=layer, shape=None if layer is None else (num_layers, *tensor.shape))
    writer.close({})
    seal_checkpoint(step, source.meta, source.tokenizer, source.code)


def _joined(pieces: list[tuple[Tensor, Part]]) -> Tensor:
    """One tensor of the checkpoint from those that share it."""
    if pieces[0][1].rows is None:
        return pieces[0][0]
    num_rows = max(stop for _, part in pieces for _, stop in part.rows)
    out = pieces[0][0].new_empty(num_rows, *pieces[0][0].shape[1:])
    for tensor, part in pieces:
        if len(tensor) != sum(stop - start for start, stop in part.rows):
            raise BitLMError(f"a tensor of {part.key} has {len(tensor)} rows, which is not the shape of this model")
        taken = 0
        for start, stop in part.rows:
            out[start:stop] = tensor[taken : taken + stop - start]
            taken += stop - start
    return out


def _exported(folder: Path, tensors: TensorFolder) -> _Source:
    """A folder that `bitlm export` wrote."""
    record = _read_json(folder / DESCRIPTION_FILE)
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise BitLMError(f"{folder / DESCRIPTION_FILE} is no {FORMAT} of version {VERSION}; it is of another release")
    meta = record["meta"]
    code, model = load_code(folder, meta), model_config(meta["settings"])
    tokenizer = load_tokenizer(folder / f"bitlm_{TOKENIZER_FOLDER}")
    if tokenizer.fingerprint != meta["data"]["tokenizer_fingerprint"]:
        raise BitLMError(f"{folder / f'bitlm_{TOKENIZER_FOLDER}'} is not the tokenizer the model was trained with")
    facts = CheckpointFacts(folder, meta, model, code, tokenizer)
    parts = list(backbone_parts(model.resolve_backbone()))
    if model.output == "softmax":
        parts += softmax_parts(model.softmax.tie_embeddings)
    else:
        parts += module_parts(bitlm_module_names(facts))
    extra = {"code_map"} if model.output == "diffusion" and code.code_map is not None else set()
    _check_names(folder, tensors, {name for name, _ in parts} | extra)
    dtype = DTYPES[meta["settings"]["training.precision"]]
    return _Source(parts, tensors.read, meta, code, tokenizer, dtype)


def _stock(folder: Path, found: dict[str, Any], tensors: TensorFolder, config: RunConfig) -> _Source:
    """A Qwen3 model of somebody else, as the start of the run `config`."""
    config.validate()
    model, facts = config.model, read_data_facts(config)
    backbone = model.resolve_backbone()
    wanted = qwen3_shape(backbone) | {"rope_theta": backbone.rope_theta}
    given = {"rope_theta": (found.get("rope_parameters") or {}).get("rope_theta")} | found
    for name, value in wanted.items():
        if given.get(name) != value:
            raise BitLMError(f"{folder}/config.json has {name} {given.get(name)}, but the run's model needs {value}")
    parts = list(backbone_parts(backbone))
    tables = dict(softmax_parts(tie_embeddings=bool(found.get("tie_word_embeddings"))))
    _check_names(folder, tensors, {name for name, _ in parts} | tables.keys())
    meta = {
        "step": 0,
        "data": data_identity(facts),
        "settings": flat_settings(config),
        "package_version": __version__,
    }
    dtype, read = DTYPES[config.training.precision], tensors.read
    if model.output == "softmax":
        if bool(found.get("tie_word_embeddings")) != model.softmax.tie_embeddings:
            raise BitLMError(
                f"{folder}/config.json has tie_word_embeddings {found.get('tie_word_embeddings')}, but "
                f"model.softmax.tie_embeddings is {model.softmax.tie_embeddings}; make them agree"
            )
        read = _with_padded_tables(folder, tensors, tables, model.softmax.padded_vocab_size(facts.card.vocab_size))
        parts += tables.items()
    else:
        fresh = dict(_new_modules(model, facts.code, config.run.seed))
        parts += module_parts(list(fresh))
        read = _first_of(fresh, tensors)
    return _Source(parts, read, meta, facts.code, facts.tokenizer, dtype)


def _new_modules(model: ModelConfig, code: BinaryCode, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors of input and head as a new run of that seed begins with."""
    hidden_size = model.resolve_backbone().hidden_size
    head = DiffusionHead(model.head, num_bits=code.num_bits, block_size=model.block_size, condition_size=hidden_size)
    modules: dict[str, nn.Module] = {"input_module": build_input(model, code, hidden_size, torch.float32), "head": head}
    for prefix, module in modules.items():
        initialize_module(module, prefix, seed)
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in module.state_dict().items())


def _first_of(fresh: dict[str, Tensor], tensors: TensorFolder) -> Callable[[str], Tensor]:
    return lambda name: fresh[name] if name in fresh else tensors.read(name)


def _with_padded_tables(
    folder: Path, tensors: TensorFolder, tables: dict[str, Part], num_rows: int
) -> Callable[[str], Tensor]:
    """Vocabulary tables cut to, or filled with zeros up to, the rows of the run's."""

    def read(name: str) -> Tensor:
        if name not in tables:
            return tensors.read(name)
        table = tensors.read(name, num_rows)
        missing = num_rows - len(table)
        return torch.cat([table, table.new_zeros(missing, table.shape[1])]) if missing else table

    for name in tables:
        if len(tensors.shape(name)) != 2:
            raise BitLMError(f"{folder}: {name} is no table")
    return read


def _check_names(folder: Path, tensors: TensorFolder, expected: set[str]) -> None:
    missing, extra = sorted(expected - tensors.files.keys()), sorted(tensors.files.keys() - expected)
    for kind, names in (("lacks", missing), ("has, beyond this model's,", extra)):
        if names:
            raise BitLMError(f"{folder} {kind} {len(names)} tensors: {', '.join(names[:3])}; it is of another model")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BitLMError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise BitLMError(f"{path} is no JSON object")
    return content
