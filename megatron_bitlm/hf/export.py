"""From a training checkpoint of any layout to a folder that transformers loads, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_bitlm.data.files import whole_folder
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.hf.card import write_model_card
from megatron_bitlm.hf.names import Part, backbone_parts, module_parts
from megatron_bitlm.hf.safetensors_stream import TensorPlan, plan_shards, write_shards
from megatron_bitlm.hf.tokenizer import write_hf_tokenizer
from megatron_bitlm.inference.load import CheckpointFacts, read_checkpoint
from megatron_bitlm.inference.profile import bin_masses, read_record
from megatron_bitlm.method.head import DiffusionHead
from megatron_bitlm.method.objective import ObjectiveConfig
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.model.build import build_input
from megatron_bitlm.model.checkpoint import CODE_MAP_FILE, TOKENIZER_FOLDER
from megatron_bitlm.parallel.checkpoint_tensors import CheckpointTensors

FORMAT, VERSION, DESCRIPTION_FILE = "bitlm-hf", 1, "bitlm.json"
METHOD_FILES = ("blocks", "codes", "head", "likelihood", "noise", "objective", "path", "sampler", "slot_attention")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TORCH_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def export(
    checkpoint: str | Path, output: str | Path, *, dtype: str | None = None, max_shard_bytes: int = 5 * 10**9
) -> Path:
    """Write a Hugging Face folder; returns it.

    A BitLM's folder holds the files of its method and is loaded with `trust_remote_code=True`; a softmax model's is a
    stock Qwen3. Needs memory for one tensor of the checkpoint.

    Args:
        checkpoint: A run folder, its checkpoints folder or a step folder.
        output: Folder to make.
        dtype: `fp32` or `bf16`; None keeps what the checkpoint has.
        max_shard_bytes: Size from which a further file is begun.

    Raises:
        BitLMError: A checkpoint that cannot be read, or an output that exists.
    """
    output = Path(output)
    if output.exists():
        raise BitLMError(f"{output} exists and is left as it is; name another folder to export to")
    if max_shard_bytes < 1:
        raise BitLMError(f"--max_shard_bytes must be positive, got {max_shard_bytes}")
    facts = read_checkpoint(checkpoint)
    tensors = CheckpointTensors(facts.path)
    kind = _Softmax(facts) if facts.config.output == "softmax" else _BitLM(facts)
    chosen = DTYPES[dtype] if dtype else tensors.dtype("decoder.final_layernorm.weight")
    parts = [*backbone_parts(facts.config.resolve_backbone()), *kind.other_parts()]
    plans = [TensorPlan(name, _shape(tensors, part), chosen) for name, part in parts]
    with whole_folder(output) as aside:
        _write(aside, facts, kind, plans, _read(tensors, parts, chosen), max_shard_bytes)
    return output


def _write(
    folder: Path,
    facts: CheckpointFacts,
    kind: _BitLM | _Softmax,
    plans: list[TensorPlan],
    tensors: Iterator[Tensor],
    max_shard_bytes: int,
) -> None:
    map_plans, maps = kind.code_map()
    shards = plan_shards([*plans, *map_plans], max_shard_bytes)
    write_shards(folder, shards, chain(tensors, maps))
    dtype = plans[0].dtype
    _write_json(folder / "config.json", kind.config() | {"dtype": _TORCH_NAMES[dtype]})
    for name, content in kind.further_files().items():
        (folder / name).write_text(content)
    shutil.copytree(facts.path / TOKENIZER_FOLDER, folder / f"bitlm_{TOKENIZER_FOLDER}")
    if facts.code.code_map is not None:
        np.save(folder / CODE_MAP_FILE, facts.code.code_map)
    limit = int(facts.meta["settings"]["data.sequence_length"])
    reason = write_hf_tokenizer(facts.tokenizer, facts.path / TOKENIZER_FOLDER, folder, limit)
    num_parameters = sum(torch.Size(plan.shape).numel() for plan in plans)
    write_model_card(folder / "README.md", facts, num_parameters, reason)
    # Last, so that a folder with it is whole.
    record = {"format": FORMAT, "version": VERSION, "meta": {k: v for k, v in facts.meta.items() if k != "files"}}
    _write_json(folder / DESCRIPTION_FILE, record)


class _BitLM:
    """What is particular to exporting a BitLM."""

    def __init__(self, facts: CheckpointFacts) -> None:
        self.facts, self.model = facts, facts.config

    def other_parts(self) -> Iterator[tuple[str, Part]]:
        """Parts of input and head, by the names of the modules themselves."""
        return module_parts(bitlm_module_names(self.facts))

    def code_map(self) -> tuple[list[TensorPlan], list[Tensor]]:
        code_map = self.facts.code.code_map
        if code_map is None:
            return [], []
        return [TensorPlan("code_map", (len(code_map),), torch.int64)], [torch.from_numpy(code_map.astype(np.int64))]

    def config(self) -> dict[str, Any]:
        settings, data, model = self.facts.meta["settings"], self.facts.meta["data"], self.model
        backbone = model.resolve_backbone()
        return {
            "architectures": ["BitLMForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_bitlm.BitLMConfig",
                "AutoModelForCausalLM": "modeling_bitlm.BitLMForCausalLM",
            },
            "model_type": "bitlm",
            "vocab_size": data["vocab_size"],
            "block_size": model.block_size,
            "has_code_map": self.facts.code.code_map is not None,
            "bos_token_id": data["bos_id"],
            "eos_token_id": data["eos_id"],
            **qwen3_shape(backbone),
            "rope_theta": backbone.rope_theta,
            "max_position_embeddings": settings["data.sequence_length"],
            "input": model.input,
            "input_hidden_size": model.input_hidden_size or 4 * backbone.hidden_size,
            "head": asdict(model.head),
            "objective": _section(settings, "objective", ObjectiveConfig),
            "seed": settings["run.seed"],
            "sampler": asdict(SamplerConfig()),
            "entropy_profile": self._profile(),
        }

    def _profile(self) -> dict[str, list[float]] | None:
        """The measured entropy rate as the arguments of its table, unchanged, so that times are the same; or None."""
        record = read_record(self.facts.path)
        if record is None:
            return None
        return {"edges": record["edges"], "weights": bin_masses(record["edges"], record["rates"]).tolist()}

    def further_files(self) -> dict[str, str]:
        """The code that transformers runs: its two files, and those of the method as they are."""
        package = files("megatron_bitlm")
        remote = ("configuration_bitlm.py", "modeling_bitlm.py")
        sources = {name: package / "hf" / "remote" / name for name in remote}
        sources |= {f"{name}.py": package / "method" / f"{name}.py" for name in METHOD_FILES}
        return {name: source.read_text(encoding="utf-8") for name, source in sources.items()}


class _Softmax:
    """What is particular to exporting the softmax baseline: a stock Qwen3 folder."""

    def __init__(self, facts: CheckpointFacts) -> None:
        self.facts, self.model = facts, facts.config

    def other_parts(self) -> Iterator[tuple[str, Part]]:
        return softmax_parts(self.model.softmax.tie_embeddings)

    def code_map(self) -> tuple[list[TensorPlan], list[Tensor]]:
        return [], []

    def config(self) -> dict[str, Any]:
        settings, data, backbone = self.facts.meta["settings"], self.facts.meta["data"], self.model.resolve_backbone()
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.model.softmax.padded_vocab_size(data["vocab_size"]),
            "bos_token_id": data["bos_id"],
            "eos_token_id": data["eos_id"],
            **qwen3_shape(backbone),
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rope_theta},
            "rope_theta": backbone.rope_theta,  # for transformers before 5
            "max_position_embeddings": settings["data.sequence_length"],
            "tie_word_embeddings": self.model.softmax.tie_embeddings,
        }

    def further_files(self) -> dict[str, str]:
        """The rows that pad the vocabulary were never trained: generation must not take them."""
        data = self.facts.meta["data"]
        padded = self.model.softmax.padded_vocab_size(data["vocab_size"])
        settings = {"bos_token_id": data["bos_id"], "eos_token_id": data["eos_id"], "pad_token_id": data["eos_id"]}
        if padded > data["vocab_size"]:
            settings["suppress_tokens"] = list(range(data["vocab_size"], padded))
        return {"generation_config.json": json.dumps(settings, indent=1) + "\n"}


def bitlm_module_names(facts: CheckpointFacts) -> list[str]:
    """Names of the tensors of input module and head, which both sides share."""
    backbone = facts.config.resolve_backbone()
    with torch.device("meta"):
        lift = build_input(facts.config, facts.code, backbone.hidden_size, torch.float32)
        head = DiffusionHead(
            facts.config.head,
            num_bits=facts.code.num_bits,
            block_size=facts.config.block_size,
            condition_size=backbone.hidden_size,
        )
    return [*(f"input_module.{name}" for name in lift.state_dict()), *(f"head.{name}" for name in head.state_dict())]


def softmax_parts(tie_embeddings: bool) -> Iterator[tuple[str, Part]]:
    """Parts of the vocabulary tables."""
    yield "model.embed_tokens.weight", Part("input_module.word_embeddings.weight")
    if not tie_embeddings:
        yield "lm_head.weight", Part("output_layer.weight")


def qwen3_shape(backbone: Any) -> dict[str, Any]:
    """The backbone's shape under Qwen3's names."""
    return {
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.ffn_hidden_size,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_attention_heads,
        "num_key_value_heads": backbone.num_query_groups,
        "head_dim": backbone.head_dim,
        "rms_norm_eps": backbone.norm_epsilon,
    }


def _section(settings: dict[str, Any], name: str, kind: type) -> dict[str, Any]:
    known = asdict(kind())
    return {key: settings[f"{name}.{key}"] for key in known if f"{name}.{key}" in settings}


def _shape(tensors: CheckpointTensors, part: Part) -> tuple[int, ...]:
    shape = tensors.shape(part.key)[0 if part.layer is None else 1 :]
    return shape if part.rows is None else (sum(stop - start for start, stop in part.rows), *shape[1:])


def _read(tensors: CheckpointTensors, parts: list[tuple[str, Part]], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors in order; a fused one is read once for the parts that follow each other."""
    last: tuple[str, int | None] | None = None
    whole = torch.empty(0)
    for _, part in parts:
        if (part.key, part.layer) != last:
            whole, last = tensors.read(part.key, part.layer), (part.key, part.layer)
        rows = whole if part.rows is None else torch.cat([whole[start:stop] for start, stop in part.rows])
        yield rows.to(dtype)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
