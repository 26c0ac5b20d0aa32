"""Exported folders: what transformers computes from them, against the model they came from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_bitlm.cli import main
from megatron_bitlm.data.loading import fixed_batches
from megatron_bitlm.data.packing import build_datasets
from megatron_bitlm.data.tokenizer import BytesTokenizer
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.hf.export import METHOD_FILES, export
from megatron_bitlm.hf.restore import import_folder
from megatron_bitlm.hf.safetensors_stream import TensorPlan, plan_shards, write_safetensors
from megatron_bitlm.hf.tokenizer import write_hf_tokenizer
from megatron_bitlm.inference.generate import Generator
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.method.objective import DenoisingObjective, ObjectiveConfig
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.model.layout import SequenceLayout
from megatron_bitlm.parallel.checkpoint_tensors import CheckpointTensors
from tests.training_runs import run_config

PROMPTS = [[1, 2, 3, 4, 5], [], [104, 105], list(range(97, 109))]


@pytest.fixture(scope="module")
def exported(bitlm_run, tmp_path_factory) -> Path:
    return export(bitlm_run, tmp_path_factory.mktemp("exported") / "hf", max_shard_bytes=60_000)


@pytest.fixture(scope="module")
def model(exported):
    return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()


def batch(run: Path, dataset: str, num_samples: int = 4):
    config = run_config(run, dataset)
    _, data = build_datasets(config.data, block_size=4, num_train_samples=8, num_valid_samples=num_samples, seed=1)
    return next(iter(fixed_batches(data, num_samples, micro_batch_size=4, data_parallel_rank=0, data_parallel_size=1)))


def test_states_equal_the_megatron_models(bitlm_run, dataset, model):
    packed = batch(bitlm_run, dataset)
    with loaded_model(bitlm_run) as loaded, torch.no_grad():
        ids = loaded.code.unpack(packed.packed, 4)[:, :-1].flatten(1)
        layout = SequenceLayout.from_batch(packed.cu_seqlens, len(ids), ids.shape[1], 4)
        states = loaded.model.states(loaded.code.encode(ids), layout).transpose(0, 1)
        theirs = model(ids).last_hidden_state
        assert len(packed.cu_seqlens) > len(ids) + 1  # several documents in a row
        torch.testing.assert_close(theirs, states, rtol=0, atol=1e-5)
        noisy, time = torch.randn(6, 4, 9), torch.rand(6)
        condition = states.flatten(0, 1).unflatten(0, (-1, 4))[:6]
        ours = loaded.model.head(noisy, time, condition)
        torch.testing.assert_close(model.head(noisy, time, condition), ours, rtol=0, atol=1e-5)


def test_loss_is_that_of_training(bitlm_run, dataset, model):
    packed = batch(bitlm_run, dataset)
    with loaded_model(bitlm_run) as loaded, torch.no_grad():
        layout = SequenceLayout.from_batch(packed.cu_seqlens, 4, 64, 4)
        objective = DenoisingObjective(ObjectiveConfig(), loaded.code, 1)
        scored = loaded.model(
            packed=packed.packed, layout=layout, sample_index=packed.sample_index, objective=objective
        )
        valid = scored.counts.valid
        expected = scored.scores.objective[valid].mean()
        of_the_first = scored.scores.objective[:, :1][valid[:, :1]].mean()
        ids = loaded.code.unpack(packed.packed, 4).flatten(1)
    loss = model(ids, labels=ids, sample_index=packed.sample_index).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert model.input_module.fc1.weight.grad.abs().sum() > 0
    masked = ids.clone()
    masked[:, 8:] = -100
    first = model(ids, labels=masked, sample_index=packed.sample_index).loss
    assert first.item() == pytest.approx(of_the_first.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{"guidance": 1.0}, {"guidance": 3.0, "num_steps": 6, "noise_raise": 0.2}])
def test_generated_ids_are_the_same_for_equal_seeds(bitlm_run, model, settings):
    seeds = [3, 4, 5, 2**40]
    with loaded_model(bitlm_run) as loaded:
        generator = Generator(
            loaded.model, loaded.code, bos_id=loaded.bos_id, eos_id=loaded.eos_id, sampler=SamplerConfig(**settings)
        )
        ours = generator.generate(PROMPTS, max_new_tokens=14, seeds=seeds)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=14, seeds=seeds, **settings)[:, width:].tolist()
    for mine, row in zip(ours, theirs, strict=True):
        assert row[: len(mine.ids)] == mine.ids
        assert len(mine.ids) == 14 or row[len(mine.ids)] == BytesTokenizer.eos_id
    assert len({tuple(row.ids) for row in ours}) > 1  # the model says something


def test_what_the_exported_model_refuses(model):
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="no multiple of block_size 4"):
        model(ids[:, :6])
    with pytest.raises(ValueError, match="without padding"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="positions of 64"):
        model.generate(ids, max_new_tokens=60)
    with pytest.raises(ValueError, match="guidance must be a number >= 0"):
        model.generate(ids, max_new_tokens=4, guidance=-1.0)
    with pytest.raises(ValueError, match="id 300"):
        model(torch.full((1, 8), 300))


def test_the_folder_round_trips_through_transformers(exported, model, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (
        AutoConfig.from_pretrained(path, trust_remote_code=True) for path in (exported, tmp_path / "again")
    )
    for name in ("vocab_size", "block_size", "head", "objective", "seed", "rope_theta", "bos_token_id", "eos_token_id"):
        assert getattr(first, name) == getattr(second, name)


def test_the_tokenizer_gives_the_same_ids(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    text = "naïve  café\n\tx = 1  # 東京"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == BytesTokenizer().encode(text) and tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)


def test_method_files_are_the_packages_own(exported):
    package = Path(__file__).parents[2] / "megatron_bitlm" / "method"
    for name in METHOD_FILES:
        assert (exported / f"{name}.py").read_bytes() == (package / f"{name}.py").read_bytes()


def test_it_loads_where_neither_this_package_nor_megatron_is(exported, tmp_path):
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('megatron', 'megatron_bitlm', 'triton'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
        "print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, guidance=1.0).shape[1] <= 7)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("True"), done.stderr[-2000:]


def test_the_card_has_the_runs_figures(exported, bitlm_run):
    figures = [json.loads(line) for line in (bitlm_run / "metrics.jsonl").read_text().splitlines()][-1]
    card = (exported / "README.md").read_text()
    assert f"≤ {figures['validation/nats_per_token']:.4f}" in card and "8 steps, 4,096 tokens, fp32" in card


def test_softmax_is_a_stock_qwen3(softmax_run, tmp_path, capsys):
    assert main(["export", str(softmax_run), str(tmp_path / "hf")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with loaded_model(softmax_run) as loaded, torch.no_grad():
        layout = SequenceLayout.from_batch(None, 2, 12, 1)
        logits = loaded.model.logits(loaded.model.states(ids, layout)).transpose(0, 1)[..., :258]
        torch.testing.assert_close(model(ids).logits[..., :258], logits, rtol=0, atol=1e-5)
    new = model.generate(ids, max_new_tokens=5, do_sample=True)
    assert new.max() < 258  # rows that pad the vocabulary are suppressed


def test_an_existing_folder_is_left_alone(bitlm_run, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    assert main(["export", str(bitlm_run), str(tmp_path / "hf")]) == 2
    assert "exists and is left as it is" in capsys.readouterr().err
    with pytest.raises(BitLMError, match="max_shard_bytes must be positive, got 0"):
        export(bitlm_run, tmp_path / "other", max_shard_bytes=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_failed_export_leaves_nothing(bitlm_run, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_bitlm.hf.export.write_model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(bitlm_run, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_streamed_files_are_read_by_the_library(tmp_path):
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.arange(4), torch.zeros(0, 2)]
    plans = [TensorPlan(f"t{i}", tuple(t.shape), t.dtype) for i, t in enumerate(tensors)]
    write_safetensors(tmp_path / "model.safetensors", plans, tensors)
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[f"t{i}"], tensor) for i, tensor in enumerate(tensors))
    shards = plan_shards(plans, 60)
    assert [[plan.name for plan in shard] for _, shard in shards] == [["t0"], ["t1", "t2", "t3"]]
    assert shards[0][0] == "model-00001-of-00002.safetensors"


def test_qwens_ranks_become_a_tokenizer_json_with_the_same_ids(tmp_path, qwen_ranks):
    from megatron_bitlm.data.tokenizer_loading import load_tokenizer

    tokenizer = load_tokenizer(qwen_ranks)
    tokenizer.save(tmp_path / "saved")
    assert write_hf_tokenizer(tokenizer, tmp_path / "saved", tmp_path, 4096) is None
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "The naïve café, 東京 1,234.5 don't  end\n\n",
        "x" * 50 + " 🤗🤗 \u00a0z",
        "def f(x):\r\n\treturn 3**2",
    ):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_a_code_map_an_embedding_table_and_bf16(mapped_run, tmp_path):
    folder = export(mapped_run, tmp_path / "hf", dtype="fp32")
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with loaded_model(mapped_run, precision="fp32") as loaded, torch.no_grad():
        assert loaded.code.code_map is not None
        assert exported.code.code_map_hash == loaded.code.code_map_hash
        layout = SequenceLayout.from_batch(None, 2, 16, 4)
        states = loaded.model.states(loaded.code.encode(ids), layout).transpose(0, 1)
        torch.testing.assert_close(exported(ids).last_hidden_state, states, rtol=0, atol=1e-5)
        sampler = SamplerConfig(guidance=2.0)
        generator = Generator(loaded.model, loaded.code, bos_id=256, eos_id=257, sampler=sampler)
        [ours] = generator.generate([[1, 2, 3]], max_new_tokens=9, seeds=[4])
    theirs = exported.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=9, seeds=[4], guidance=2.0)[0, 3:].tolist()
    assert theirs[: len(ours.ids)] == ours.ids
    labels = {"labels": ids, "sample_index": torch.tensor([5, 6])}
    clean = exported(ids, **labels).loss
    assert exported.train()(ids, **labels).loss != clean  # input bits are flipped in training alone
    half = AutoModelForCausalLM.from_pretrained(export(mapped_run, tmp_path / "bf16"), trust_remote_code=True)
    assert half.dtype == torch.bfloat16
    back = import_folder(tmp_path / "bf16", tmp_path / "back")
    first, second = (
        CheckpointTensors(path) for path in (sorted((mapped_run / "checkpoints").glob("step_*"))[-1], back)
    )
    names = [name for name in first.names() if not name.startswith("optimizer.")]
    assert names and all(torch.equal(first.read(name), second.read(name)) for name in names)
