"""From a training run to generated text: checkpoints read back, the command, and damaged folders."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.command import continue_texts
from megatron_bitlm.inference.load import loaded_model, model_config
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.sampler import SamplerConfig
from tests.training_runs import checkpoint_tensors, corpus, make_dataset, train


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two steps with a code map, and a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("run")
    code_map = folder / "map.npy"
    np.save(code_map, np.random.default_rng(0).permutation(258))
    prefix = make_dataset(folder, "data", corpus(num_documents=48), code_map=str(code_map))
    overrides = {"training__num_steps": 2, "checkpoint__interval_steps": 1, "checkpoint__keep_last": 2}
    train(folder / "run", prefix, **overrides, model__head__conditioning="mix", optimizer__warmup_steps=1)
    return folder / "run"


@pytest.fixture
def damaged(run_folder, tmp_path):
    """A copy of the newest checkpoint alone, to spoil."""
    return shutil.copytree(run_folder / "checkpoints" / "step_00000002", tmp_path / "step_00000002")


def generate(*arguments) -> int:
    return main(["generate", *map(str, arguments)])


def edit_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_the_model_comes_back_with_its_weights_and_its_vocabulary(run_folder):
    stored = checkpoint_tensors(run_folder, 2)
    with loaded_model(run_folder) as loaded:
        assert loaded.step == 2 and not loaded.model.training
        assert (loaded.bos_id, loaded.eos_id) == (256, 257) and loaded.tokenizer.vocab_size == 258
        assert loaded.code.code_map is not None and loaded.config.head.conditioning == "mix"
        for name, parameter in loaded.model.head.named_parameters():
            assert torch.equal(parameter, stored[f"head.{name}"]), name
        assert loaded.model.head.null_condition.abs().sum() > 0
        text = loaded.tokenizer.decode(loaded.tokenizer.encode("Zoë\n"))
        assert text == "Zoë\n"


def test_a_run_folder_means_its_newest_checkpoint_and_a_step_folder_itself(run_folder):
    for path, step in (
        (run_folder, 2),
        (run_folder / "checkpoints", 2),
        (run_folder / "checkpoints" / "step_00000001", 1),
    ):
        with loaded_model(path) as loaded:
            assert loaded.step == step


def test_process_groups_end_with_the_context(run_folder):
    with pytest.raises(RuntimeError, match="inside"), loaded_model(run_folder):
        raise RuntimeError("inside")
    assert not torch.distributed.is_initialized()
    with loaded_model(run_folder):
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_half_precision_loads_for_generation(run_folder):
    with loaded_model(run_folder, precision="bf16") as loaded:
        assert loaded.model.head.input.weight.dtype == torch.bfloat16
        sampler = SamplerConfig(num_steps=3, guidance=2.0)
        results = continue_texts(loaded, ["abc", ""], sampler=sampler, max_new_tokens=6, seed=0)
        assert all(len(result.ids) == 6 or result.finished for result in results)


def test_command_prints_continuations(run_folder, capsys):
    arguments = ["--checkpoint", run_folder, "--prompt", "abc def", "", "Zoë", "--max-new-tokens", 9, "--steps", 3]
    assert generate(*arguments) == 0
    out = capsys.readouterr().out
    assert out.count("--- ") == 3 and "\nabc def" in out and "\nZoë" in out
    assert generate(*arguments) == 0
    assert capsys.readouterr().out == out
    assert generate(*arguments, "--seed", 7) == 0
    assert capsys.readouterr().out != out


def test_command_prints_json(run_folder, capsys, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\nthr\x0cee \u2028 x\n", encoding="utf-8")
    options = ["--checkpoint", run_folder, "--max-new-tokens", 5, "--steps", 2, "--guidance", 1, "--json"]
    options += ["--grid", "entropy", "--noise-raise", 0.1]
    assert generate(*options, "--prompt-file", prompts) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "", "thr\x0cee \u2028 x"]
    for line in lines:
        assert len(line["ids"]) == 5 or line["finished"]
        assert isinstance(line["text"], str) and line["num_blocks"] >= 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    assert generate(*options, "--prompt-file", "-") == 0
    assert json.loads(capsys.readouterr().out) == lines[0]


def refused(capsys, *arguments) -> str:
    """The one sentence that a refused command prints."""
    assert generate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("bitlm generate: ")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --prompt TEXT or --prompt-file FILE"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
        (["--prompt", "a", "--steps", "0"], "num_steps must be at least 1, got 0"),
        (["--prompt", "a", "--guidance", "nan"], "guidance"),
        (["--prompt", "a", "--noise-raise", "2"], "noise_raise"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "a", "--seed", "-1"], "seeds must lie"),
    ],
)
def test_bad_options_end_with_one_sentence(run_folder, capsys, arguments, words):
    assert words in refused(capsys, "--checkpoint", run_folder, *arguments)


def test_prompts_that_are_no_text(run_folder, capsys, tmp_path):
    file = tmp_path / "prompts.bin"
    file.write_bytes(b"\xff\xfe\x00")
    assert "prompts.bin" in refused(capsys, "--checkpoint", run_folder, "--prompt-file", file)


@pytest.mark.parametrize("content", [None, "nothing", "unfinished"])
def test_a_folder_without_a_complete_checkpoint(capsys, tmp_path, content):
    folder = tmp_path / "absent"
    if content:
        folder.mkdir()
    if content == "unfinished":
        (folder / "checkpoints" / ".step_00000001.tmp").mkdir(parents=True)
    sentence = refused(capsys, "--checkpoint", folder, "--prompt", "a")
    assert "no complete checkpoint" in sentence and str(folder) in sentence


def largest(folder):
    return max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)


def cut_weights(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def remove_weights(folder):
    file = largest(folder)
    file.unlink()
    return file.name


def scramble_index(folder):
    file = folder / ".metadata"
    file.write_bytes(b"\x00" * file.stat().st_size)
    return "step_00000002"


def scramble_weights(folder):
    for file in folder.glob("*.distcp"):
        file.write_bytes(b"\x00" * file.stat().st_size)
    return "step_00000002"


def break_meta(folder):
    (folder / "meta.json").write_text('{"format": "bitlm-ch')
    return "meta.json"


def other_version(folder):
    edit_meta(folder, lambda meta: meta.update(version=99))
    return "meta.json"


def drop_meta_section(folder):
    edit_meta(folder, lambda meta: meta.pop("data"))
    return "meta.json"


def drop_meta_setting(folder):
    edit_meta(folder, lambda meta: meta["settings"].pop("training.precision"))
    return "meta.json"


def unknown_setting(folder):
    edit_meta(folder, lambda meta: meta["settings"].update({"model.head.colour": 3}))
    return "model.head.colour"


def impossible_setting(folder):
    edit_meta(folder, lambda meta: meta["settings"].update({"model.head.head_dim": 7}))
    return "head_dim 7"


def other_shape(folder):
    edit_meta(folder, lambda meta: meta["settings"].update({"model.backbone.num_layers": 3}))
    return "step_00000002"


def swap_code_map(folder):
    np.save(folder / "code_map.npy", np.random.default_rng(1).permutation(258))
    return "code map"


def scramble_code_map(folder):
    file = folder / "code_map.npy"
    file.write_bytes(b"\x00" * file.stat().st_size)
    return "code_map.npy"


def repeat_in_code_map(folder):
    np.save(folder / "code_map.npy", np.zeros(258, dtype=np.int64))
    return "code_map.npy"


def other_tokenizer_hash(folder):
    edit_meta(folder, lambda meta: meta["data"].update(tokenizer_fingerprint="0" * 64))
    return "tokenizer"


def edit_tokenizer(folder):
    file = max((folder / "tokenizer").iterdir())
    before = json.loads(file.read_text())["fingerprint"]
    file.write_text(file.read_text().replace(before, before[::-1]))
    return "tokenizer"


def break_tokenizer(folder):
    file = max((folder / "tokenizer").iterdir())
    file.write_bytes(b"{" * file.stat().st_size)
    return "tokenizer"


SPOILS = [
    cut_weights,
    remove_weights,
    scramble_index,
    scramble_weights,
    break_meta,
    other_version,
    drop_meta_section,
    drop_meta_setting,
    unknown_setting,
    impossible_setting,
    other_shape,
    swap_code_map,
    scramble_code_map,
    repeat_in_code_map,
    other_tokenizer_hash,
    edit_tokenizer,
    break_tokenizer,
]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_a_damaged_checkpoint_ends_with_one_sentence(damaged, capsys, spoil):
    words = spoil(damaged)
    assert words in refused(capsys, "--checkpoint", damaged, "--prompt", "a", "--max-new-tokens", 2, "--steps", 1)
    assert not torch.distributed.is_initialized()


def test_settings_find_their_place():
    settings = {"model.block_size": 2, "model.head.width": 48, "model.backbone.num_layers": 5, "run.seed": 3}
    config = model_config(settings)
    assert (config.block_size, config.head.width, config.backbone.num_layers) == (2, 48, 5)
    for name in ("model.size", "model.head.a.b", "model.head"):
        with pytest.raises(BitLMError, match=name):
            model_config({name: 1})


def test_the_code_map_decides_the_patterns(run_folder):
    with loaded_model(run_folder) as loaded:
        ids = torch.arange(258)
        assert torch.equal(loaded.code.decode(loaded.code.encode(ids)), ids)
        assert not torch.equal(loaded.code.encode(ids), BinaryCode(258).encode(ids))
