"""`bitlm plan` from its command line to its report."""

import json

import pytest

from megatron_bitlm.cli import main

SETTINGS = """
model: {preset: 0.6B}
data: {sequence_length: 4096}
training: {global_batch_size: 64, precision: bf16}
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS)
    return str(path)


def test_text_names_all_that_was_asked_for(run_file, capsys):
    assert main(["plan", run_file, "--gpus", "16", "--top", "3"]) == 0
    text = capsys.readouterr().out
    for words in (
        "backbone 440.5 M",
        "FLOPs per token",
        "layouts for 16 H100",
        "3: --",
        "head activations",
        "imbalance 1.00",
        "sent per step",
        "matrix products reach 50% of the peak",
        "151669 ids, 18 bits",
    ):
        assert words in text, words


def test_json_has_the_same_figures(run_file, capsys):
    arguments = ["plan", run_file, "--gpus", "8", "--gpu", "b200", "--json", "--top", "2", "--vocab_size", "258"]
    assert main([*arguments, "--compute_efficiency", "0.25", "--model.preset", "1.7B"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gpu"]["name"] == "B200" and report["vocab_size"] == 258
    assert report["parameters"]["backbone"] == pytest.approx(1409e6, rel=0.01)
    assert len(report["layouts"]) == 2
    best = report["layouts"][0]
    assert best["fits"] and best["estimate"]["model_flops_utilization"] < 0.25
    memory = best["memory_bytes_by_rank"][0]
    assert memory["total"] == pytest.approx(sum(value for part, value in memory.items() if part != "total"))


def test_the_own_layout_in_detail(run_file, capsys):
    arguments = ["plan", run_file, "--gpus", "8", "--detail", "0", "--parallel.pipeline_model_parallel_size", "2"]
    assert main([*arguments, "--training.micro_batch_size", "1"]) == 0
    assert "layers 14 | 14;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--gpus is missing"),
        (["--gpus", "8", "--gpu", "abacus"], "--gpu abacus: no such GPU is known"),
        (["--gpus", "37"], "no layout divides training.global_batch_size 64"),
        (["--gpus", "1", "--model.preset", "8B"], "does not fit --gpus 1 H100"),
        (["--gpus", "8", "--vocab_size", "1"], "--vocab_size must be at least 2, got 1"),
        (["--gpus", "8", "--top", "0"], "--top 0 be at least 1"),
        (["--gpus", "8", "--detail", "0", "--parallel.tensor_model_parallel_size", "3"], "8 processes cannot be"),
        (["--gpus", "8", "--data.paths", "[no/such]"], "no such dataset card"),
        (["--gpus", "eight"], "invalid int value: 'eight'"),
        (["--gpus", "8", "--nonsense", "1"], "nonsense"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run_file, capsys, arguments, message):
    assert main(["plan", run_file, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1


def test_fp8_products_make_a_step_shorter_and_are_named(run_file, capsys):
    def plan(*flags: str) -> dict:
        assert main(["plan", run_file, "--gpus", "8", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["layouts"][0]["estimate"]

    seconds = [plan("--training.fp8.recipe", recipe)["seconds"] for recipe in ("none", "tensorwise")]
    assert seconds[1] < seconds[0]
    kept = ("--training.fp8.num_bf16_layers_at_start", "14", "--training.fp8.num_bf16_layers_at_end", "14")
    only_head = plan("--training.fp8.recipe", "tensorwise", *kept)["seconds"]
    assert seconds[1] < only_head < seconds[0]
    assert main(["plan", run_file, "--gpus", "8", "--training.fp8.recipe", "tensorwise"]) == 0
    assert "40% of 1979 in FP8" in capsys.readouterr().out
    assert main(["plan", run_file, "--gpus", "8", "--gpu", "a100", "--training.fp8.recipe", "tensorwise"]) == 2
    assert "FP8, which the A100 lacks" in capsys.readouterr().err
