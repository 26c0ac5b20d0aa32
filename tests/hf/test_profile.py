"""A calibrated checkpoint's entropy profile travels with its export, and generation follows it there, too."""

import shutil

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_bitlm.hf.export import export
from megatron_bitlm.inference.generate import Generator
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.inference.profile import write_profile
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.model.checkpoint import find_checkpoint

SETTINGS = {"num_steps": 6, "guidance": 2.0, "grid": "entropy", "noise_raise": 0.3, "early_exit": 0.5}
SEEDS, PROMPT = [3, 4, 5], [65, 66, 67, 68, 69]


def ours(checkpoint):
    with loaded_model(checkpoint) as loaded:
        generator = Generator(
            loaded.model,
            loaded.code,
            bos_id=loaded.bos_id,
            eos_id=loaded.eos_id,
            sampler=SamplerConfig(**SETTINGS),
            profile=loaded.profile,
        )
        return [result.ids for result in generator.generate([PROMPT] * 3, max_new_tokens=14, seeds=SEEDS)]


def test_generated_ids_follow_the_profile(bitlm_run, tmp_path):
    checkpoint = shutil.copytree(find_checkpoint(bitlm_run), tmp_path / "step_00000008")
    before = ours(checkpoint)
    rates = [0.1, 0.3, 0.2, 4.0, 3.0, 0.5, 0.2, 0.1]
    write_profile(checkpoint, np.linspace(-9.0, 4.4, 9), rates, measured_on={})
    expected = ours(checkpoint)
    assert expected != before
    model = AutoModelForCausalLM.from_pretrained(export(checkpoint, tmp_path / "hf"), trust_remote_code=True)
    found = model.generate(torch.tensor([PROMPT] * 3), max_new_tokens=14, seeds=SEEDS, **SETTINGS)[:, 5:].tolist()
    assert [row[: len(ids)] for row, ids in zip(found, expected, strict=True)] == expected
