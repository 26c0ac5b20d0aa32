"""The commands one after the other, as a user types them: text, dataset, run, figures, text."""

import json
import math
import re

import pytest
import torch
import yaml

from megatron_bitlm.cli import main
from tests.training_runs import corpus, make_dataset, read_metrics, run_settings, write_corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, its dataset data/docs and the configuration run.yaml."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("commands")
    write_corpus(folder / "corpus.jsonl", corpus(200))
    arguments = ["--input", str(folder / "corpus.jsonl"), "--tokenizer", "bytes", "--num_workers", "1"]
    assert main(["preprocess", *arguments, "--output", str(folder / "data" / "docs")]) == 0
    # So that a model that has learned nothing already has the bound of independent uniform bits.
    settings = run_settings(
        folder / "run",
        str(folder / "data" / "docs"),
        training__progress="lines",
        model__head__parameterization="matched_filter",
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def trained(place):
    assert main(["pretrain", str(place / "run.yaml"), "--training.log_interval_steps", "4"]) == 0
    return place / "run"


def read(capsys):
    return capsys.readouterr().out


def test_inspect_shows_the_corpus_again(place, capsys):
    assert main(["inspect", str(place / "data" / "docs"), "--documents", "2", "--verify"]) == 0
    shown = read(capsys)
    assert all(text in shown for text in corpus(200)[:2]) and "checksums match" in shown


def test_pretrain_leaves_a_whole_run(trained):
    left = {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "lock"}
    assert {path.name for path in trained.iterdir()} == left
    records = read_metrics(trained)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["loss"] < records[0]["loss"]
    assert {"gradient_norm/backbone", "gradient_norm/head", "invalid_code_rate"} <= records[0].keys()
    assert any(name.startswith("error_by_time/") for name in records[0])
    assert [r["step"] for r in records if "validation/nats_per_token" in r] == [6, 12]


def test_tensorboard_has_what_metrics_have(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    last = read_metrics(trained)[-1]
    for name in ("loss", "gradient_norm/head", "validation/nats_per_token", "learning_rate", "invalid_code_rate"):
        event = events.Scalars(name if "/" in name else f"train/{name}")[-1]
        assert event.step == 12 and event.value == pytest.approx(last[name], rel=1e-6)


def test_pretrain_prints_lines_and_resumes(place, capsys):
    arguments = ["pretrain", str(place / "run.yaml"), "--run.directory", str(place / "cut")]
    assert main([*arguments, "--training.stop_after_steps", "5", "--training.log_interval_steps", "5"]) == 0
    assert re.search(r"^step 5/5  loss \d.*tokens/s", read(capsys), flags=re.MULTILINE)
    assert main([*arguments, "--training.log_interval_steps", "6"]) == 0
    printed = read(capsys)
    assert f"resumed {place / 'cut'} at step 5" in printed and "step 12: validation <= " in printed


def evaluate(capsys, *arguments):
    capsys.readouterr()
    assert main(["evaluate", "likelihood", *arguments, "--json"]) == 0
    return json.loads(read(capsys))


def test_likelihood_beside_baselines(trained, capsys):
    figures = evaluate(capsys, "--checkpoint", str(trained), "--baselines", "--micro-batch-size", "4")
    bound = figures["bound"]
    assert math.isfinite(bound["nats_per_token"]) and bound["nats_per_token"] >= 0
    assert 0 < bound["standard_error"] < bound["nats_per_token"]
    assert bound["perplexity"] == pytest.approx(math.exp(bound["nats_per_token"]))
    nats = bound["nats_per_token"] * bound["num_tokens"]
    assert bound["bits_per_byte"] == pytest.approx(nats / math.log(2) / bound["num_bytes"])
    bigram, unigram = figures["bigram"], figures["unigram"]
    assert 0 < bigram["nats_per_token"] < unigram["nats_per_token"] < math.log(258)
    # Twelve steps: below 9 independent uniform bits a token (EOS fill included), above what counting reaches.
    assert unigram["nats_per_token"] < bound["nats_per_token"] < 9 * math.log(2)
    # The model is scored on whole samples, the baselines on all validation documents.
    assert 0.8 * unigram["num_tokens"] < bound["num_tokens"] <= unigram["num_tokens"]


def test_likelihood_is_repeatable_and_more_draws_agree(trained, capsys):
    common = ["--checkpoint", str(trained), "--num-samples", "16", "--micro-batch-size"]
    first = evaluate(capsys, *common, "4")["bound"]
    assert evaluate(capsys, *common, "4")["bound"] == first
    assert evaluate(capsys, *common, "8")["bound"] == pytest.approx(first, rel=1e-6)
    repeated = evaluate(capsys, *common, "8", "--num-repeats", "8")["bound"]
    assert 0 < abs(repeated["nats_per_token"] - first["nats_per_token"]) < 5 * first["standard_error"]


def test_likelihood_as_a_table(trained, capsys):
    assert main(["evaluate", "likelihood", "--checkpoint", str(trained), "--baselines"]) == 0
    assert re.search(r"^BitLM +<= \d+\.\d{4} \+- .*\nbigram +.*\nunigram +", read(capsys), flags=re.MULTILINE)


def test_generate_continues_prompts(trained, capsys):
    arguments = ["generate", "--checkpoint", str(trained), "--prompt", "abc def", "", "--max-new-tokens", "12"]
    results = []
    for seed in ("3", "3", "4"):
        capsys.readouterr()
        assert main([*arguments, "--seed", seed, "--steps", "4", "--json"]) == 0
        results.append([json.loads(line) for line in read(capsys).splitlines()])
    assert results[0] == results[1] != results[2]
    assert [result["prompt"] for result in results[0]] == ["abc def", ""]
    assert all(result["finished"] or len(result["ids"]) == 12 for result in results[0])


def test_quickstart_end_to_end_and_again(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    make_dataset(tmp_path / "data", "installed-docs-bytes-m4", corpus(200))
    settings = run_settings("unused", "unused", training__progress="off", data__split="90,10,0")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", "tiny.yaml", "--directory", "quick", "--data", "data", "--steps", "3"]
    assert main(["quickstart", *arguments]) == 0
    printed = read(capsys)
    for command in ("pretrain", "evaluate likelihood", "generate"):
        assert f"$ bitlm {command} " in printed
    report = json.loads((tmp_path / "quick" / "report.json").read_text())
    likelihood = report["likelihood"]
    assert likelihood["bigram"]["nats_per_token"] < likelihood["unigram"]["nats_per_token"]
    assert math.isfinite(likelihood["bound"]["nats_per_token"])
    assert report["training"]["steps"] == 12 and len(report["continuations"]) == 3
    assert report["versions"]["torch"] == torch.__version__ and report["seeds"]["run"] == 1
    for name in ("loss.png", "denoising.png"):
        assert (tmp_path / "quick" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # A second time: what is done stays, and the same figures come out.
    kept = (tmp_path / "quick" / "metrics.jsonl").read_bytes()
    assert main(["quickstart", *arguments]) == 0
    assert (tmp_path / "quick" / "metrics.jsonl").read_bytes() == kept
    assert json.loads((tmp_path / "quick" / "report.json").read_text())["likelihood"] == likelihood
    # And beside a softmax model, which gets the same time.
    capsys.readouterr()
    assert main(["quickstart", *arguments, "--compare"]) == 0
    printed = read(capsys)
    assert re.search(r"^BitLM +<= \d.*\nsoftmax +=", printed, flags=re.MULTILINE)
    assert "softmax's is exact" in printed and "--model.output softmax" in printed
    report = json.loads((tmp_path / "quick" / "report.json").read_text())
    assert report["likelihood"] == likelihood and len(report["softmax"]["continuations"]) == 3
    ours, other = report["comparison"]["BitLM"], report["comparison"]["softmax"]
    assert (ours["relation"], other["relation"]) == ("<=", "=")
    assert ours["num_tokens"] == other["num_tokens"] == likelihood["bound"]["num_tokens"]
    assert other["nats_per_token"] == report["softmax"]["likelihood"]["exact"]["nats_per_token"]
    assert other["training_steps"] >= 4 and other["training_tokens"] == other["training_steps"] * 8 * 64
    assert (tmp_path / "quick" / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    kept = (tmp_path / "quick" / "softmax" / "metrics.jsonl").read_bytes()
    assert main(["quickstart", *arguments, "--compare"]) == 0
    assert (tmp_path / "quick" / "softmax" / "metrics.jsonl").read_bytes() == kept


def test_a_run_asked_to_stop_says_so_by_its_status(place, monkeypatch, capsys):
    from megatron_bitlm.training import trainer

    def stopped(config):
        return trainer.Outcome(3, False, None, stopped=True)

    monkeypatch.setattr(trainer, "pretrain", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", str(place / "run.yaml")])
    assert stop.value.code == 75  # EX_TEMPFAIL of sysexits.h


def test_every_command_is_listed_and_an_unknown_one_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    listed = read(capsys)
    assert all(name in listed for name in ("preprocess", "inspect", "pretrain", "generate", "evaluate", "quickstart"))
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2 and "train" in capsys.readouterr().err
