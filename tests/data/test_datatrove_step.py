"""The steps of a datatrove pipeline, run by datatrove's own executor without a cluster."""

import argparse
from pathlib import Path

import pytest

from megatron_bitlm.data.card import read_card
from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.slurm.preprocess import PreprocessArray, add_preprocess_options
from tests.training_runs import corpus, write_corpus

pytest.importorskip("datatrove", reason="needs the extra `slurm`")

from datatrove.executor.local import LocalPipelineExecutor  # noqa: E402

from megatron_bitlm.data.datatrove_step import (  # noqa: E402
    BinaryCodeWriter,
    CorpusReader,
    MergeShards,
    shard_folder,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(3):
        write_corpus(folder / f"{i}.jsonl", corpus(12, seed=i))
    return folder


def execute(pipeline, tasks: int, logs: Path) -> None:
    LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(logs)).run()


def test_shards_of_a_pipeline_merge_to_what_preprocess_makes(tmp_path, text):
    output = str(tmp_path / "data")
    writer = BinaryCodeWriter(output, tokenizer="bytes", settings={"input": [str(text)]})
    # More tasks than files: some shards are empty.
    execute([CorpusReader([str(text)]), writer], 5, tmp_path / "logs")
    assert len(list(shard_folder(output).glob("*.json"))) == 5
    execute([MergeShards(output)], 1, tmp_path / "merge-logs")
    preprocess(PreprocessConfig(input=[str(text)], output=str(tmp_path / "whole"), tokenizer="bytes", num_workers=1))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"data{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    card = read_card(output)
    assert card.num_documents == 36 and card.settings["input"] == [str(text)] and "shard" not in card.settings


def test_a_finished_shard_is_kept_and_another_one_refused(tmp_path, text):
    output = str(tmp_path / "data")
    reader = CorpusReader([str(text)])
    BinaryCodeWriter(output, tokenizer="bytes").run(reader.run(rank=0, world_size=3), 0, 3)
    shard = next(shard_folder(output).glob("*.bin"))
    before = shard.stat().st_mtime_ns
    BinaryCodeWriter(output, tokenizer="bytes").run(reader.run(rank=0, world_size=3), 0, 3)
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(BitLMError, match="made with other settings"):
        BinaryCodeWriter(output, tokenizer="bytes", block_size=2).run(reader.run(rank=0, world_size=3), 0, 3)
    with pytest.raises(BitLMError, match="train it beforehand"):
        BinaryCodeWriter(output, tokenizer="train:bpe:300")


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_preprocess_options(parser)
    return parser.parse_args(["--partition", "cpu", "--tokenizer", "bytes", *arguments])


def test_an_array_says_what_its_tasks_read(tmp_path, text):
    flags = ["--input", str(text), "--output", str(tmp_path / "data"), "--tasks", "2"]
    description = PreprocessArray.from_options(options(*flags)).describe()
    assert "2 tasks" in description and "task 1: 1 files" in description
    with pytest.raises(BitLMError, match="--tasks must be at least 1"):
        PreprocessArray.from_options(options(*flags[:-1], "0"))
    with pytest.raises(BitLMError, match="no such file"):
        PreprocessArray.from_options(options("--input", "none", *flags[2:])).describe()
