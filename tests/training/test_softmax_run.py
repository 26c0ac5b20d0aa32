"""Whole runs of the softmax baseline: it learns, its figures are exact, it resumes, and says what it is."""

import math
import shutil

import numpy as np
import pytest
import torch

from megatron_bitlm.data.card import load_dataset_code, read_card
from megatron_bitlm.data.packing import DataConfig, build_datasets
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.evaluation.likelihood import checkpoint_likelihood
from megatron_bitlm.inference.load import loaded_model
from megatron_bitlm.model.softmax import SoftmaxLM
from megatron_bitlm.training.checks import check_run
from megatron_bitlm.training.run_folder import RunFolder
from tests.training_runs import checkpoint_tensors, read_metrics, run_config, train

SOFTMAX = {"model__output": "softmax"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("softmax") / "run"
    return directory, train(directory, dataset, **SOFTMAX, optimizer__learning_rate=1e-2)


def test_it_learns_and_reports_nats_per_token(whole):
    directory, outcome = whole
    records = read_metrics(directory)
    assert records[0]["loss"] == pytest.approx(math.log(258), abs=0.1)
    assert records[-1]["loss"] < 4.0
    assert records[-1]["perplexity"] == pytest.approx(math.exp(records[-1]["loss"]))
    assert not any("mean_squared_error" in record or "invalid_code_rate" in record for record in records)
    assert all(record["gradient_norm/head"] > 0 for record in records)
    assert outcome.finished and outcome.validation.is_exact
    assert records[-1]["validation/is_exact"] is True
    assert records[-1]["validation/perplexity"] == pytest.approx(math.exp(records[-1]["validation/nats_per_token"]))


def test_the_validation_figure_is_the_cross_entropy_counted_by_hand(whole, dataset):
    """Token by token from the ids: text and the first EOS of a document, given what the sample holds of it."""
    directory, outcome = whole
    card, code = read_card(dataset), load_dataset_code(dataset)
    length, m = 64, card.block_size
    data = DataConfig(paths=[dataset], sequence_length=length, split="75,25,0")
    _, valid = build_datasets(data, block_size=m, num_train_samples=96, num_valid_samples=16, seed=1)
    with loaded_model(directory) as loaded, torch.no_grad():
        sizes = loaded.tokenizer.token_num_bytes()
        nats, tokens, num_bytes = 0.0, 0, 0
        for number in range(16):
            ids = torch.from_numpy(code.unpack(valid[number]["packed"], m).reshape(-1))
            cuts = [m - 1, *(block * m for block in valid[number]["document_starts"].tolist() if block), length + m - 1]
            for begin, end in zip(cuts, cuts[1:], strict=False):
                layout = causal(end - begin)
                logits = loaded.model.logits(loaded.model.states(ids[None, begin:end], layout))[:, 0]
                for place, target in enumerate(ids[begin + 1 : end + 1].tolist()):
                    before = int(ids[begin + place])
                    if target == card.bos_id or (target == card.eos_id and before == card.eos_id):
                        continue
                    nats -= float(logits[place].double().log_softmax(-1)[target])
                    tokens += 1
                    num_bytes += int(sizes[target])
    estimate = outcome.validation.estimate
    assert (estimate.num_tokens, outcome.validation.num_bytes, estimate.num_samples) == (tokens, num_bytes, 16)
    assert estimate.nats_per_token == pytest.approx(nats / tokens, rel=1e-6)
    assert outcome.validation.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def causal(length):
    from megatron_bitlm.model.layout import SequenceLayout

    return SequenceLayout.from_batch(None, 1, length, 1)


def test_both_models_are_measured_on_the_same_tokens(whole, dataset, tmp_path):
    directory, _ = whole
    train(tmp_path / "bitlm", dataset, training__num_steps=1, optimizer__warmup_steps=0)
    data = DataConfig(paths=[dataset], sequence_length=64, split="75,25,0")
    reports = []
    for run in (directory, tmp_path / "bitlm"):
        with loaded_model(run) as loaded:
            reports.append(checkpoint_likelihood(loaded, data, num_samples=None, micro_batch_size=4))
    exact, bound = reports
    assert exact.is_exact and not bound.is_exact
    assert exact.estimate.num_tokens == bound.estimate.num_tokens > 1000
    assert exact.num_bytes == bound.num_bytes and exact.estimate.num_samples == bound.estimate.num_samples
    assert np.isfinite(exact.estimate.standard_error)


def test_it_resumes_bit_for_bit(whole, dataset, tmp_path):
    directory, _ = whole
    stopped = tmp_path / "run"
    settings = {**SOFTMAX, "optimizer__learning_rate": 1e-2}
    train(stopped, dataset, **settings, training__stop_after_steps=5)
    train(stopped, dataset, **settings)
    assert read_metrics(stopped) == read_metrics(directory)
    ours, theirs = checkpoint_tensors(stopped, 12), checkpoint_tensors(directory, 12)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_checkpoint_says_which_model_it_is(whole, dataset):
    directory, _ = whole
    with loaded_model(directory) as loaded:
        assert isinstance(loaded.model, SoftmaxLM) and loaded.config.output == "softmax"
    with pytest.raises(BitLMError, match="model.output is 'softmax' there and 'diffusion' here"):
        train(directory, dataset, optimizer__learning_rate=1e-2)


def test_a_checkpoint_of_the_other_model_is_refused(whole, dataset, tmp_path):
    directory, _ = whole
    other = tmp_path / "run"
    shutil.copytree(directory, other)
    settings = {"optimizer__learning_rate": 1e-2, "run__directory": str(other)}
    # A configuration that was edited after the run: the checkpoint still knows.
    (other / "config.yaml").write_text(
        (other / "config.yaml").read_text().replace("output: softmax", "output: diffusion")
    )
    with pytest.raises(
        BitLMError, match="step 12 holds a model with model.output softmax, but the run asks for diffusion"
    ):
        train(other, dataset, **settings)
    # And a checkpoint whose settings were edited does not load as what it is not.
    meta = other / "checkpoints" / "step_00000012" / "meta.json"
    meta.write_text(meta.read_text().replace('"model.output": "softmax"', '"model.output": "diffusion"'))
    with pytest.raises(BitLMError, match="not the model its meta.json tells of"), loaded_model(other):
        pass


def test_ranks_that_cannot_share_the_vocabulary_are_refused_before_they_start(dataset, tmp_path):
    overrides = {"model__softmax": {"make_vocab_size_divisible_by": 7}, "parallel__tensor_model_parallel_size": 2}
    config = run_config(tmp_path / "run", dataset, **SOFTMAX, **overrides)
    with pytest.raises(BitLMError, match="2 tensor-parallel ranks cannot share a vocabulary of 259 rows"):
        check_run(config, RunFolder(tmp_path / "run"), world_size=2)
