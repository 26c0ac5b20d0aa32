"""A tiny model learns a few documents by heart and writes them down again: the whole chain from text to text.

Nothing in this chain may be off by one block, one slot or one bit: a shifted target, a condition from the wrong block,
a mask that hides the prompt or a cache that differs from training would leave the loss high or the text wrong.
"""

import pytest

from megatron_bitlm.inference.generate import Generator
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.method.sampler import SamplerConfig
from tests.training_runs import make_dataset, read_metrics, train

DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A rolling stone gathers no moss, they say.",
    "Half of what I say is meaningless; but I say it.",
]
SETTINGS = {
    "model__backbone": {
        "num_layers": 2,
        "hidden_size": 96,
        "ffn_hidden_size": 192,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "head_dim": 48,
    },
    "model__head": {
        "width": 96,
        "num_layers": 2,
        "head_dim": 48,
        "conditioning": "mix",
        "slot_embedding": True,
        "adaln_init_std": 0.05,
    },
    "objective": {"loss": "bce", "samples_per_block": 4, "condition_drop_probability": 0.0},
    "data__sequence_length": 96,
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20, "weight_decay": 0.0},
    "training": {"num_steps": 250, "global_batch_size": 2, "micro_batch_size": 2, "progress": "off"},
    "checkpoint__interval_steps": 0,
    "validation": {"interval_steps": 0, "num_samples": 8},
}


def memorise(folder, documents, block_size, **overrides):
    """Train on `documents`, with copies of them as validation split; returns the run's folder and outcome."""
    prefix = make_dataset(folder, "docs", documents * 10, block_size=block_size)
    settings = {**SETTINGS, "model__block_size": block_size, "data__split": "1,9,0", **overrides}
    return folder / "run", train(folder / "run", prefix, **settings)


def write_down(run, prompts):
    """Continuations of the prompts with guidance 1, prompt included; None where the text never ended."""
    with loaded_model(run) as loaded:
        generator = Generator(
            loaded.model, loaded.code, bos_id=loaded.bos_id, eos_id=loaded.eos_id, sampler=SamplerConfig(guidance=1.0)
        )
        ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
        results = generator.generate(ids, max_new_tokens=80)
        return [
            prompt + loaded.tokenizer.decode(result.ids) if result.finished else None
            for prompt, result in zip(prompts, results, strict=True)
        ]


@pytest.mark.parametrize(
    ("block_size", "parameterization"), [(4, "x0"), (1, "matched_filter")], ids=["m = 4", "m = 1, matched filter"]
)
def test_documents_are_learned_by_heart(tmp_path, block_size, parameterization):
    head = {**SETTINGS["model__head"], "parameterization": parameterization}
    run, outcome = memorise(tmp_path, DOCUMENTS, block_size, model__head=head)
    records = read_metrics(run)
    assert records[0]["loss"] > 0.3
    assert sum(record["loss"] for record in records[-20:]) / 20 < 0.02
    # Validation documents are the training documents, cut into samples at other places.
    assert outcome.validation.estimate.nats_per_token < 0.25
    # Prompts of whole blocks, and of blocks with some slots open.
    for length in (8, 5, 6):
        assert write_down(run, [text[:length] for text in DOCUMENTS]) == DOCUMENTS


def test_a_single_document_needs_no_prompt(tmp_path):
    run, _ = memorise(tmp_path, DOCUMENTS[:1], 4, training={**SETTINGS["training"], "num_steps": 120})
    assert write_down(run, ["", "", "The"]) == DOCUMENTS[:1] * 3
