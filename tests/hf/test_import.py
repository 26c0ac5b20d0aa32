"""Folders brought back: bit for bit into training checkpoints, or a stock Qwen3 as the start of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.hf.export import export
from megatron_bitlm.hf.restore import import_folder
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.parallel.checkpoint_tensors import CheckpointTensors
from tests.training_runs import SETTINGS, read_metrics, run_config, run_settings, train


def weights(step: Path) -> dict[str, torch.Tensor]:
    tensors = CheckpointTensors(step)
    return {name: tensors.read(name) for name in tensors.names() if not name.startswith("optimizer.")}


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


@pytest.mark.parametrize("kind", ["bitlm_run", "softmax_run"])
def test_export_and_import_give_the_same_bits(kind, request, tmp_path, capsys):
    run = request.getfixturevalue(kind)
    export(run, tmp_path / "hf", max_shard_bytes=50_000)
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    step = tmp_path / "back" / "step_00000008"
    assert str(step) in capsys.readouterr().out
    first, second = weights(newest(run)), weights(step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert main(["checkpoint", "verify", str(tmp_path / "back")]) == 0
    with loaded_model(run) as one:
        expected = {name: tensor.detach().clone() for name, tensor in one.model.named_parameters()}
    with loaded_model(tmp_path / "back") as loaded:
        assert loaded.step == 8
        assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.model.named_parameters())
    again = export(tmp_path / "back", tmp_path / "twice")
    assert (again / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def test_a_run_starts_from_imported_weights(bitlm_run, dataset, tmp_path):
    back = import_folder(export(bitlm_run, tmp_path / "hf"), tmp_path / "back")
    options = {"training__num_steps": 4, "model__head__conditioning": "mix", "training__precision": "bf16"}
    train(tmp_path / "new", dataset, run__initial_checkpoint=str(back.parent), **options)
    train(tmp_path / "scratch", dataset, **options)
    new, scratch = (read_metrics(tmp_path / name) for name in ("new", "scratch"))
    assert new[0]["loss"] < scratch[0]["loss"] - 0.05
    assert new[0]["loss"] == pytest.approx(read_metrics(bitlm_run)[-1]["loss"], abs=0.08)
    assert new[-1]["loss"] < new[0]["loss"] + 0.05  # the optimizer's own copies of the weights began there, too


def test_a_run_refuses_weights_of_another_model(bitlm_run, dataset, tmp_path):
    with pytest.raises(BitLMError, match="has model.head.conditioning 'mix', but the run has 'slot'"):
        train(tmp_path / "new", dataset, run__initial_checkpoint=str(bitlm_run))
    with pytest.raises(BitLMError, match="run.initial_checkpoint: no complete checkpoint in"):
        train(tmp_path / "new", dataset, run__initial_checkpoint=str(tmp_path))
    assert not (tmp_path / "new").exists()


def stock_qwen3(folder: Path, *, tied: bool = False, **changes) -> Qwen3ForCausalLM:
    """A folder as a hub model's, of the tests' backbone."""
    backbone = SETTINGS["model"]["backbone"]
    shape = {
        "vocab_size": 300,
        "hidden_size": backbone["hidden_size"],
        "intermediate_size": backbone["ffn_hidden_size"],
        "num_hidden_layers": backbone["num_layers"],
        "num_attention_heads": backbone["num_attention_heads"],
        "num_key_value_heads": backbone["num_query_groups"],
        "head_dim": backbone["head_dim"],
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**(shape | changes))).eval()
    model.save_pretrained(folder)
    return model


def run_file(tmp_path: Path, dataset: str, **overrides) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_settings(tmp_path / "run", dataset, **overrides)))
    return str(path)


def test_a_stock_qwen3_starts_a_bitlm(dataset, tmp_path):
    qwen = stock_qwen3(tmp_path / "qwen")
    config = run_file(tmp_path, dataset)
    assert main(["import", str(tmp_path / "qwen"), str(tmp_path / "start"), "--config", config]) == 0
    train(tmp_path / "scratch", dataset, training__num_steps=4, checkpoint__interval_steps=4)
    with loaded_model(tmp_path / "start") as loaded:
        ours = loaded.model.state_dict()
        theirs = qwen.model.state_dict()
        assert torch.equal(ours["decoder.layers.1.mlp.linear_fc2.weight"], theirs["layers.1.mlp.down_proj.weight"])
        assert torch.equal(ours["decoder.layers.0.mlp.linear_fc1.weight"][64:], theirs["layers.0.mlp.up_proj.weight"])
        assert torch.equal(ours["head.output.weight"], torch.zeros_like(ours["head.output.weight"]))
        started = {name: tensor.clone() for name, tensor in ours.items() if not name.startswith("decoder.")}
    config = run_config(tmp_path / "fresh", dataset)
    from megatron_bitlm.model.build import build_chunks, unwrap
    from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel
    from megatron_bitlm.training.session import read_data_facts

    state = initialize_parallel(ParallelConfig(), seed=0)
    facts = read_data_facts(config)
    chunks = build_chunks(
        config.model, state, code=facts.code, bos_id=256, eos_id=257, precision="fp32", seed=config.run.seed
    )
    fresh = unwrap(chunks[0]).state_dict()
    shutdown_parallel()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in started.items())  # input and head as in a new run


def test_a_stock_qwen3_starts_the_softmax_baseline_with_its_tables(dataset, tmp_path):
    qwen = stock_qwen3(tmp_path / "qwen")
    config = run_file(tmp_path, dataset, model__output="softmax")
    assert main(["import", str(tmp_path / "qwen"), str(tmp_path / "start"), "--config", config]) == 0
    from megatron_bitlm.model.layout import SequenceLayout

    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with loaded_model(tmp_path / "start") as loaded, torch.no_grad():
        layout = SequenceLayout.from_batch(None, 2, 12, 1)
        logits = loaded.model.logits(loaded.model.states(ids, layout)).transpose(0, 1)
        torch.testing.assert_close(logits[..., :258], qwen(ids).logits[..., :258], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, but the run's model needs 2"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta 10000.0"),
    ],
)
def test_another_qwen3_is_refused(dataset, tmp_path, capsys, changes, words):
    stock_qwen3(tmp_path / "qwen", **changes)
    config = run_file(tmp_path, dataset)
    assert main(["import", str(tmp_path / "qwen"), str(tmp_path / "start"), "--config", config]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "start").exists()


def test_what_cannot_be_imported(bitlm_run, tmp_path, capsys):
    folder = export(bitlm_run, tmp_path / "hf")

    def refused(words: str, source: Path = folder, *flags: str) -> None:
        assert main(["import", str(source), str(tmp_path / "out"), *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()

    stock_qwen3(tmp_path / "qwen")
    capsys.readouterr()
    refused("name the run that starts from it with --config", tmp_path / "qwen")
    refused("config.json", tmp_path / "nothing")
    for name, change, words in (
        ("missing", lambda t: t.pop("head.output.bias"), "lacks 1 tensors: head.output.bias"),
        ("extra", lambda t: t.update(more=torch.zeros(2)), "beyond this model's, 1 tensors: more"),
        ("rows", lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 32)}), "has 3 rows"),
    ):
        shutil.copytree(folder, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / name / "model.safetensors")
        refused(words, tmp_path / name)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "bitlm.json").unlink()
    config = json.loads((other / "config.json").read_text()) | {"model_type": "llama"}
    (other / "config.json").write_text(json.dumps(config))
    refused("'llama'; only folders of `bitlm export` and Qwen3 models", other)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    with open(cut / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    refused(f"cannot read {cut / 'model.safetensors'}", cut)
    (tmp_path / "out2").mkdir()
    assert main(["import", str(folder), str(tmp_path / "out2")]) == 2
    assert "exists and is left as it is" in capsys.readouterr().err
