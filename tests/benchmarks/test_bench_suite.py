"""The GPU suite: refused without a GPU; its parts name options that exist; failures are reported and do not stop it."""

import json

import pytest
import torch

from megatron_bitlm.benchmarks import suite
from megatron_bitlm.benchmarks.command import parse_benchmark
from megatron_bitlm.benchmarks.suite import Part, SuiteBenchmark, all_parts, bench_suite, chosen_parts, run_part
from megatron_bitlm.cli import main
from megatron_bitlm.errors import BitLMError

ATTENTION = Part("small", "attention", ("--seq_len", "64", "--head_dim", "8", "--device", "cpu"))
BROKEN = Part("broken", "attention", ("--seq_len", "63", "--device", "cpu"))
REPORT = """<testsuites><testsuite>
<testcase classname="a" name="one"/><testcase classname="a" name="two"><failure/></testcase>
<testcase classname="a" name="three"><skipped/></testcase><testcase classname="b" name="four"><error/></testcase>
</testsuite></testsuites>"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_without_a_gpu(tmp_path, capsys):
    assert main(["bench", "suite", "--output", str(tmp_path / "suite.json")]) == 2
    assert "the suite is for a GPU, and PyTorch finds no CUDA device here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", all_parts(with_fp8=True), ids=lambda part: part.name)
def test_parts_have_options_that_exist(part):
    settings, output = parse_benchmark(part.benchmark, list(part.options))
    assert output is None
    settings.validate()


def test_parts_can_be_chosen():
    without = [part.name for part in chosen_parts(SuiteBenchmark(), with_fp8=False)]
    assert len(set(without)) == len(without) == 10 and not any("fp8" in name for name in without)
    chosen = chosen_parts(SuiteBenchmark(only=["step-0.6b", "head-1024"]), with_fp8=True)
    assert [part.name for part in chosen] == ["head-1024", "step-0.6b"]
    with pytest.raises(BitLMError, match="no part 'step' here; choose among attention-2048"):
        chosen_parts(SuiteBenchmark(only=["step"]), with_fp8=True)


def test_fp8_parts_run_every_layer_in_fp8():
    for part in all_parts(with_fp8=True):
        settings, _ = parse_benchmark(part.benchmark, list(part.options))
        if "slice" in part.name:
            assert settings.fp8_bf16_layers == 0


def test_suite_reports_what_ran_and_what_failed(tmp_path, monkeypatch, capsys):
    """With a stand-in for the GPU's description and for the parts, which run on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite, "describe_device", lambda device: machine())
    monkeypatch.setattr(suite, "HAVE_TE", False)
    monkeypatch.setattr(suite, "all_parts", lambda with_fp8: [BROKEN, ATTENTION])
    settings = SuiteBenchmark(tests=False, num_warmup=0, num_repetitions=1, device="cpu")
    output = tmp_path / "suite.json"
    with pytest.raises(BitLMError, match=r"^broken failed; see the .log files in "):
        bench_suite(settings, output)
    report = json.loads(output.read_text())
    parts = report["facts"]["parts"]
    assert list(parts) == ["broken", "small"] and parts["small"]["error"] is None
    assert "whole number of blocks" in parts["broken"]["error"] and parts["broken"]["report"] is None
    assert list(parts["small"]["report"]["variants"])[0] == "fast"
    text = output.with_suffix(".md").read_text()
    assert "FP8 was left out: Transformer Engine is not installed." in text
    assert "## broken" in text and "| masked_sdpa |" in text and text in capsys.readouterr().out + "\n"


def machine():
    return {"cpu": "any", "num_cores": 1, "num_threads": 1, "torch": torch.__version__, "load_average": 0.0}


def test_finished_parts_are_not_run_again(tmp_path):
    (tmp_path / "small.json").write_text('{"answer": 42}')
    assert run_part(ATTENTION, tmp_path, SuiteBenchmark()) == {"error": None, "report": {"answer": 42}}
    assert not (tmp_path / "small.log").exists()


def test_counts_of_a_test_report(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(REPORT)
    found = suite.read_test_report(path)
    assert found == {
        "error": "2 tests failed",
        "num_passed": 1,
        "num_skipped": 1,
        "failed": ["a::two", "b::four"],
    }
    path.write_text("<testsuites><testsuite/></testsuites>")
    assert suite.read_test_report(path)["error"] == "no test ran"


def test_marked_tests_are_run_once(tmp_path, monkeypatch):
    tests = tmp_path / "tests"
    tests.mkdir()
    body = "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): assert False\n"
    (tests / "test_it.py").write_text(body + "def test_unmarked(): assert False\n")
    monkeypatch.setattr(suite, "_TESTS", tests)
    found = suite.run_tests(tmp_path, 5)
    assert found == {"error": "1 tests failed", "num_passed": 1, "num_skipped": 0, "failed": ["tests.test_it::test_b"]}
    (tests / "test_it.py").unlink()
    assert suite.run_tests(tmp_path, 5) == found
    assert "1 failed, 1 passed, 1 deselected" in (tmp_path / "tests.log").read_text()


def test_a_part_that_takes_too_long(tmp_path):
    found = run_part(ATTENTION, tmp_path, SuiteBenchmark(timeout_minutes=0.001))
    assert found == {"error": "stopped after 0.001 minutes", "report": None}
