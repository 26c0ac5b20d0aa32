"""The checkpoint benchmark measures what it says and writes what it prints."""

import json

import pytest

from megatron_bitlm.benchmarks.checkpoint import CheckpointBenchmark, bench_checkpoint
from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError

SMALL = {"num_layers": 1, "hidden_size": 64, "sequence_length": 32, "batch_size": 2, "num_steps": 2}
SMALL |= {"num_repetitions": 2, "device": "cpu"}


def test_report(tmp_path, capsys):
    output = tmp_path / "figures.json"
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["bench", "checkpoint", *flags, f"--folder={tmp_path}", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["baseline"] == "blocking" and list(report["variants"]) == ["blocking", "asynchronous"]
    assert all(len(found["turns"]) == 2 and min(found["turns"]) > 0 for found in report["variants"].values())
    facts = report["facts"]
    assert facts["checkpoint_bytes"] > 16 * facts["num_parameters"]  # weights, their copy and two moments in fp32
    assert {name: len(found) for name, found in facts["extra_seconds_of_a_turn"].items()} == {
        "blocking": 2,
        "asynchronous": 2,
    }
    assert "stall of training" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 100}, "hidden_size"),
        ({"num_steps": 0}, "num_steps"),
        ({"folder": "/nowhere"}, "no such folder"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(BitLMError, match=message):
        bench_checkpoint(CheckpointBenchmark(**{**SMALL, **change}))
