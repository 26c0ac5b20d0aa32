"""Shards made apart and merged are the dataset that one preprocessing of everything makes, byte for byte."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_bitlm.cli import main
from megatron_bitlm.data import merge as merging
from megatron_bitlm.data.card import read_card
from megatron_bitlm.data.corpus import open_corpus
from megatron_bitlm.data.inspect import document_texts
from megatron_bitlm.data.merge import merge_datasets
from megatron_bitlm.data.partial import PartialDataset
from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from megatron_bitlm.errors import BitLMError
from tests.training_runs import corpus, write_corpus

COUNTS = ("num_documents", "num_empty_documents", "num_blocks", "num_text_tokens", "num_text_bytes", "bin_sha256")
COUNTS += ("idx_sha256", "bin_num_bytes")


def make(folder: Path, name: str, inputs: list[Path], **settings) -> Path:
    preprocess(
        PreprocessConfig(
            **{"input": [str(p) for p in inputs], "output": str(folder / name), "tokenizer": "bytes", "num_workers": 1}
            | settings
        )
    )
    return folder / name


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("text")
    texts = corpus(40, seed=3)
    return [write_corpus(folder / f"{i}.jsonl", [*texts[i::4], ""]) for i in range(4)]


@pytest.fixture
def parts(tmp_path, files) -> list[str]:
    return [str(make(tmp_path, f"part{i}", files[i : i + 2])) for i in (0, 2)]


def test_merged_parts_are_the_whole(tmp_path, files, parts, capsys, monkeypatch):
    monkeypatch.setattr(merging, "_CHUNK_NUM_BYTES", 1000)  # many chunks
    whole = make(tmp_path, "whole", files)
    assert main(["merge", "--input", *parts, "--output", str(tmp_path / "merged")]) == 0
    assert "40 documents" in capsys.readouterr().out
    merged, card = read_card(tmp_path / "merged"), read_card(whole)
    for name in COUNTS:
        assert getattr(merged, name) == getattr(card, name), name
    for suffix in (".bin", ".idx"):
        assert Path(f"{whole}{suffix}").read_bytes() == (tmp_path / f"merged{suffix}").read_bytes()
    assert list(document_texts(tmp_path / "merged")) == list(document_texts(whole))
    assert merged.settings["merged"] == parts and merged.settings["tokenizer"] == "bytes"


def test_a_folder_stands_for_its_datasets_by_name(tmp_path, files):
    (tmp_path / "shards").mkdir()
    for i in (1, 0):
        make(tmp_path / "shards", f"s{i}", [files[i]])
    card = merge_datasets([str(tmp_path / "shards")], str(tmp_path / "merged"))
    assert [Path(name).name for name in card.settings["merged"]] == ["s0", "s1"]
    os.rename(tmp_path / "shards" / "s1.json", tmp_path / "s1.json")
    (tmp_path / "shards" / "s1.partial").mkdir()
    with pytest.raises(BitLMError, match="s1.partial is not finished"):
        merge_datasets([str(tmp_path / "shards")], str(tmp_path / "again"))


def test_a_killed_merge_goes_on(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(merging, "_CHUNK_NUM_BYTES", 500)
    expected = merge_datasets(parts, str(tmp_path / "expected"))
    append, calls = PartialDataset.append_packed, []

    def dies(self, *arguments):
        calls.append(arguments[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        append(self, *arguments)

    monkeypatch.setattr(PartialDataset, "append_packed", dies)
    with pytest.raises(KeyboardInterrupt):
        merge_datasets(parts, str(tmp_path / "merged"))
    assert not (tmp_path / "merged.json").exists()
    card = merge_datasets(parts, str(tmp_path / "merged"))
    assert card == expected
    assert calls.count(calls[0]) == 1 and calls.count(calls[3]) == 2


@pytest.mark.parametrize(
    ("settings", "word"), [({"block_size": 2}, "block_size"), ({"tokenizer": "train:bpe:300"}, "vocab_size")]
)
def test_datasets_of_another_kind_are_refused(tmp_path, files, parts, settings, word):
    other = make(tmp_path, "other", files, **settings)
    with pytest.raises(BitLMError, match=word):
        merge_datasets([parts[0], str(other)], str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


def test_another_code_map_is_refused(tmp_path, files, parts):
    np.save(tmp_path / "map.npy", np.roll(np.arange(258), 1))
    other = make(tmp_path, "other", files, code_map=str(tmp_path / "map.npy"))
    with pytest.raises(BitLMError, match="code_map_hash"):
        merge_datasets([parts[0], str(other)], str(tmp_path / "merged"))


def test_a_damaged_part_is_refused(tmp_path, parts):
    content = bytearray(Path(f"{parts[1]}.bin").read_bytes())
    content[100] ^= 1
    Path(f"{parts[1]}.bin").write_bytes(content)
    with pytest.raises(BitLMError, match="checksum"):
        merge_datasets(parts, str(tmp_path / "merged"))
    assert not (tmp_path / "merged.json").exists()


def test_an_output_is_not_overwritten(tmp_path, parts):
    with pytest.raises(BitLMError, match="not overwritten"):
        merge_datasets(parts, parts[0])


def mark_as_shard(prefix: str, *shard: int) -> None:
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_text())
    content["settings"]["shard"] = list(shard)
    path.write_text(json.dumps(content))


def test_all_shards_have_to_be_there_in_order(tmp_path, parts):
    for number, prefix in enumerate(parts):
        mark_as_shard(prefix, number, 2)
    output = str(tmp_path / "merged")
    with pytest.raises(BitLMError, match="shard 1 of 2 is missing"):
        merge_datasets(parts[:1], output)
    with pytest.raises(BitLMError, match=r"in the order \[1, 0\]"):
        merge_datasets(parts[::-1], output)
    with pytest.raises(BitLMError, match="each once"):
        merge_datasets([*parts, parts[0]], output)
    mark_as_shard(parts[1], 1, 3)
    with pytest.raises(BitLMError, match="not a shard of the same dataset"):
        merge_datasets(parts, output)


def test_shares_of_a_corpus_are_its_files_in_order(files, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(files[0].parent, folder)
    whole = open_corpus([str(folder)])
    for num_shares in (1, 2, 3, 4, 7):
        shares = [whole.share(rank, num_shares) for rank in range(num_shares)]
        assert [source for share in shares for source in share.sources] == whole.sources
        assert sum(share.num_input_bytes for share in shares) == whole.num_input_bytes
        assert max(len(share.sources) for share in shares) <= -(-4 // num_shares) + 1
    assert dataclasses.asdict(whole.share(0, 1)) == dataclasses.asdict(whole)
