"""Turns, ratios and reports of the benchmark harness, on times that are known."""

import json

import numpy as np
import pytest
import torch

from megatron_bitlm.benchmarks.harness import BenchmarkConfig, Comparison, Turns, take_turns
from megatron_bitlm.benchmarks.memory import peak_memory
from megatron_bitlm.benchmarks.report import describe_device, make_report, publish
from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError

CPU = torch.device("cpu")


def test_variants_take_turns():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    turns = take_turns(variants, BenchmarkConfig(device="cpu", num_warmup=2, num_repetitions=3), CPU)
    assert calls == list("abc") * 5
    for times in (turns.seconds, turns.cpu_seconds):
        assert list(times) == list("abc") and all(len(own) == 3 and min(own) >= 0 for own in times.values())


def test_ratios_are_taken_turn_by_turn():
    """A machine that gets slower from turn to turn leaves the ratios alone."""
    load = np.array([1.0, 2.0, 4.0, 8.0])
    seconds = {"base": load.tolist(), "other": (load * [2.0, 2.0, 3.0, 2.0]).tolist()}
    turns = Turns(seconds, {"base": [1.0] * 4, "other": [4.0] * 4})
    comparison = Comparison("base", turns, {"base": 10.0, "other": 30.0}, "tokens", {"base": 100, "other": None})
    found = comparison.figures()["other"]
    assert found["time_ratio"]["median"] == 2 and found["time_ratio"]["max"] == 3
    assert found["rate_ratio"]["median"] == 1.5 and found["rate_ratio"]["min"] == 1
    assert found["tokens_per_second"]["max"] == 15 and found["seconds"]["median"] == 8
    assert found["turns"] == seconds["other"] and found["cpu_time_ratio"]["median"] == 4
    assert found["peak_bytes"] is None and found["peak_ratio"] is None
    lines = comparison.table().splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "2.00 (2.00 to 2.25)" in lines[2] and "1.50 (1.38 to 1.50)" in lines[2]


def test_report_is_written_once(tmp_path, capsys):
    output = tmp_path / "folder" / "figures.json"
    report = make_report("nothing", BenchmarkConfig(), describe_device(CPU), None, {"answer": 42})
    assert publish(report, "the text", output) is report
    written = json.loads(output.read_text())
    assert written == report and written["version"] == 1 and written["facts"] == {"answer": 42}
    assert {"cpu", "num_cores", "num_threads", "torch"} <= written["machine"].keys()
    printed = capsys.readouterr().out
    assert "the text" in printed and torch.__version__ in printed and str(output) in printed
    with pytest.raises(BitLMError, match=r"figures.json exists already"):
        publish(report, "again", output)
    assert json.loads(output.read_text()) == report


def build_array(num_bytes, name):
    """A call that holds `num_bytes` twice over, for the variant "twice", or once."""
    kept = np.ones(num_bytes if name == "twice" else 1, dtype=np.uint8)
    return lambda: np.ones(num_bytes, dtype=np.uint8).sum() + kept.sum()


def test_peak_memory_of_a_process_of_its_own():
    size = 200 << 20
    ballast = np.ones(size, dtype=np.uint8)  # of this process, and none of theirs
    once, twice = (peak_memory(build_array, size, name, CPU) for name in ("once", "twice"))
    assert ballast.sum() == size
    assert once == pytest.approx(size, rel=0.1) and twice == pytest.approx(2 * size, rel=0.1)


def test_unknown_benchmarks_are_refused(capsys):
    assert main(["bench", "nonsense"]) == 2
    assert "no benchmark 'nonsense'; choose one of attention" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0 and "attention" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(BitLMError, match="device is cuda, but PyTorch finds no CUDA device"):
        BenchmarkConfig(device="cuda").validate()
    assert BenchmarkConfig().torch_device() == CPU


@pytest.mark.gpu
def test_times_and_memory_on_a_gpu():
    """A product of matrices takes longer than an addition, and its peak is what it allocates."""
    device = torch.device("cuda", 0)
    x = torch.ones(4096, 4096, device=device)
    calls = {"add": lambda: x + x, "multiply": lambda: x @ x @ x}
    seconds = take_turns(calls, BenchmarkConfig(num_warmup=3), device).seconds
    assert np.median(seconds["multiply"]) > np.median(seconds["add"]) > 0
    assert peak_memory(build_on_gpu, 1 << 26, "any", device) >= 2 << 26


def build_on_gpu(num_bytes, name):
    kept = torch.ones(num_bytes, dtype=torch.uint8, device="cuda")
    return lambda: kept + kept
