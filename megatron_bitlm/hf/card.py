"""The model card of an exported folder, with the figures of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_bitlm.inference.load import CheckpointFacts

_FIGURES = {
    "validation/nats_per_token": "validation, nats/token",
    "validation/perplexity": "validation, perplexity",
    "validation/bits_per_byte": "validation, bits/byte",
    "validation/standard_error": "standard error, nats/token",
}


def write_model_card(path: Path, facts: CheckpointFacts, num_parameters: int, no_tokenizer: str | None) -> None:
    """Write README.md of an export.

    Args:
        path: Of the file.
        facts: Of the checkpoint.
        num_parameters: Exported.
        no_tokenizer: Why there is no tokenizer.json, or None.
    """
    settings, data, step = facts.meta["settings"], facts.meta["data"], facts.meta["step"]
    softmax = facts.config.output == "softmax"
    tokens = step * settings["training.global_batch_size"] * settings["data.sequence_length"]
    rows = {
        "parameters": f"{num_parameters:,}",
        "vocabulary": f"{data['vocab_size']:,} ids"
        + ("" if softmax else f", {data['num_bits']} bits, blocks of {data['block_size']}"),
        "trained": f"{step:,} steps, {tokens:,} tokens, {settings['training.precision']}",
        "megatron-bitlm": facts.meta.get("package_version", "unknown"),
        **_last_figures(facts.path, step, "=" if softmax else "≤"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    kind = (
        "softmax baseline on a Qwen3 backbone" if softmax else "BitLM, a language model with a bitwise diffusion head"
    )
    tokenizer = f"\nNo `tokenizer.json`: {no_tokenizer}.\n" if no_tokenizer else ""
    path.write_text(
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# {kind}\n\n| | |\n|---|---|\n{table}\n"
        f"{tokenizer}\n```python\n{_usage(softmax)}```\n\nThe run's settings are in `bitlm.json`; `bitlm import` "
        "makes a training checkpoint of this folder again.\n",
        encoding="utf-8",
    )


def _usage(softmax: bool) -> str:
    flags = "" if softmax else ", trust_remote_code=True"
    prompt = 'add_special_tokens=False, return_tensors="pt"'
    generate = "max_new_tokens=64" if softmax else "max_new_tokens=64, num_steps=15, guidance=1.0, seeds=[0]"
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("."{flags})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("."{flags})\n'
        f'ids = tokenizer("Return the", {prompt}).input_ids\n'
        f"new = model.generate(ids, {generate})\nprint(tokenizer.decode(new[0], skip_special_tokens=True))\n"
    )


def _last_figures(checkpoint: Path, step: int, sign: str) -> dict[str, str]:
    """The run's newest validation up to the checkpoint's step, where its metrics.jsonl is still beside it."""
    metrics = checkpoint.parent.parent / "metrics.jsonl"
    found: dict[str, Any] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        record = json.loads(line)
        if record["step"] <= step and "validation/nats_per_token" in record:
            found = record
    return {
        name: f"{sign} {found[key]:.4f}" if "error" not in key else f"{found[key]:.4f}"
        for key, name in _FIGURES.items()
        if found.get(key) is not None
    }
