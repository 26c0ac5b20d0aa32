"""An array job writes the shards of a dataset, a job after it merges them: the dataset of one `bitlm preprocess`."""

from pathlib import Path

import pytest

from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from tests.slurm.cluster import wait_until
from tests.training_runs import corpus, write_corpus

pytest.importorskip("datatrove", reason="needs the extra `slurm`")


def test_an_array_of_tasks_makes_the_dataset_of_one_process(cluster, bitlm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for i in range(3):
        write_corpus(Path("text") / f"{i}.jsonl", corpus(12, seed=i))
    flags = ["--input", "text", "--output", "data/array", "--tokenizer", "bytes", "--tasks", "2"]
    job = bitlm("slurm", "preprocess", *flags, "--partition", "main", "--time", "10", "--memory-gb", "1").split()[-1]

    def story() -> str:
        logs = [f"--- {path}\n{path.read_text()}" for path in sorted(Path("data/array.slurm").rglob("*.out"))]
        return "\n".join([cluster.run("squeue", "--all"), *logs, cluster.logs()])

    wait_until(lambda: cluster.job(job)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING"), 300, story)
    assert cluster.job(job)["JobState"] in ("COMPLETED", "COMPLETING"), story()
    assert len(list(Path("data/array.shards").glob("shard-*-of-00002.json"))) == 2
    preprocess(PreprocessConfig(input=["text"], output="data/whole", tokenizer="bytes", num_workers=1))
    for suffix in (".bin", ".idx"):
        assert Path(f"data/array{suffix}").read_bytes() == Path(f"data/whole{suffix}").read_bytes()
