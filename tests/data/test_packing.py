"""Samples, blends, splits and micro-batches against a small reference in plain Python."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bitlm.benchmarks.datasets import write_sparse_dataset
from megatron_bitlm.benchmarks.memory import resident_bytes
from megatron_bitlm.data.packing import DataConfig, SampleLoader, build_datasets, collate, fixed_batches
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from tests.data.packing_run import batches_of_rank
from tests.distributed_harness import run_ranks

VOCAB_SIZE = 258
BOS, EOS = 256, 257


def random_documents(seed, num_documents, max_length=40, first_id=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, max_length, size=num_documents)
    return [(first_id + generator.integers(0, 100, size=length)).tolist() for length in lengths]


@pytest.fixture(scope="module")
def prefixes(write_dataset, tmp_path_factory):
    """Two datasets whose ids tell them apart: below 100, and from 100 to 199."""
    folder = tmp_path_factory.mktemp("packing")
    for name, seed, num_documents, first_id in (("a", 1, 200, 0), ("b", 2, 150, 100)):
        documents = random_documents(seed, num_documents, first_id=first_id)
        write_dataset(folder / name, documents, vocab_size=VOCAB_SIZE, block_size=4)
    return [str(folder / "a"), str(folder / "b")]


def config(paths, **changes):
    return DataConfig(**{"paths": list(paths), "sequence_length": 32, "split": "80,20", **changes})


def build(paths, num_train=50, num_valid=0, seed=7, block_size=4, **changes):
    return build_datasets(
        config(paths, **changes),
        block_size=block_size,
        num_train_samples=num_train,
        num_valid_samples=num_valid,
        seed=seed,
    )


def ids_of(item, block_size=4):
    return BinaryCode(VOCAB_SIZE).unpack(item["packed"], block_size)


def reference_stream(dataset, documents, block_size, frame):
    """Blocks and (is the first of a document) flags of the documents in Megatron's order, back to back."""
    blocks, is_start = [], []
    for document in dataset.document_index:
        framed = frame(documents[document], block_size, BOS, EOS)
        pieces = [framed[i : i + block_size] for i in range(0, len(framed), block_size)]
        blocks += pieces
        is_start += [True] + [False] * (len(pieces) - 1)
    return blocks, is_start


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    num_documents=st.integers(1, 12),
    block_size=st.sampled_from([1, 2, 4]),
    num_blocks=st.integers(2, 9),
    num_samples=st.integers(1, 25),
)
def test_samples_are_cuts_of_concatenated_documents(
    seed, num_documents, block_size, num_blocks, num_samples, write_dataset, frame_reference, tmp_path_factory
):
    documents = random_documents(seed, num_documents)
    prefix = str(tmp_path_factory.mktemp("p") / "set")
    write_dataset(prefix, documents, vocab_size=VOCAB_SIZE, block_size=block_size)
    train, _ = build(
        [prefix], num_samples, seed=seed, block_size=block_size, sequence_length=num_blocks * block_size, split="1,0"
    )
    blocks, is_start = reference_stream(train, documents, block_size, frame_reference)
    assert len(train) >= num_samples
    assert sorted(train.shuffle_index) == list(range(len(train)))
    for number in range(len(train)):
        place = int(train.shuffle_index[number]) * num_blocks
        item = train[number]
        assert item["packed"].dtype == np.uint8 and item["document_starts"].dtype == np.int32
        # The sample has one block more than its inputs, and that one is the first of the next sample.
        assert ids_of(item, block_size).tolist() == blocks[place : place + num_blocks + 1]
        inside = [i for i in range(1, num_blocks) if is_start[place + i]]
        assert item["document_starts"].tolist() == [0, *inside]


def test_one_pass_sees_every_document_once(prefixes):
    train, valid = build(prefixes[:1], 10, None)
    assert sorted(train.document_index) == list(range(160))
    assert sorted(valid.document_index) == list(range(160, 200))


def test_isolation_off_gives_one_piece(prefixes):
    joined, _ = build(prefixes[:1], isolate_documents=False)
    apart, _ = build(prefixes[:1])
    assert all(joined[i]["document_starts"].tolist() == [0] for i in range(50))
    assert sum(len(apart[i]["document_starts"]) for i in range(50)) > 100
    assert all(np.array_equal(joined[i]["packed"], apart[i]["packed"]) for i in range(50))


def test_training_order_follows_the_seed_and_validation_does_not(prefixes):
    def rows(dataset):
        return [dataset[i]["packed"].tobytes() for i in range(8)]

    (train_a, valid_a), (train_b, valid_b), (again, _) = (build(prefixes[:1], 50, 8, seed=s) for s in (1, 2, 1))
    assert rows(train_a) == rows(again) != rows(train_b)
    assert rows(valid_a) == rows(valid_b)
    _, more = build(prefixes[:1], 50, None)
    assert rows(more) == rows(valid_a)


@pytest.mark.parametrize("weights", [[1.0, 3.0], [0.9, 0.1], None])
def test_blend_proportions(prefixes, weights):
    train, valid = build(prefixes, 400, 5, weights=weights)
    of_second = [bool((ids_of(train[i])[0] >= 100).any() and train[i]["dataset_id"] == 1) for i in range(400)]
    assert [train[i]["dataset_id"] == 1 for i in range(400)] == of_second
    if weights is None:
        sizes = [build([prefix], 1)[0]._get_num_tokens_per_epoch() for prefix in prefixes]
        weights = [float(size) for size in sizes]
    assert abs(np.mean(of_second) - weights[1] / sum(weights)) < 0.01
    assert len(valid) >= 5
    # In any prefix, too: a run that stops early has seen the blend.
    assert abs(np.mean(of_second[:100]) - weights[1] / sum(weights)) < 0.02


def test_whole_validation_of_a_blend_is_every_sample_once(prefixes):
    _, valid = build(prefixes, 50, None, weights=[1.0, 3.0])
    singles = [build([prefix], 1, None)[1] for prefix in prefixes]
    rows = Counter(valid[i]["packed"].tobytes() for i in range(len(valid)))
    expected = Counter(single[i]["packed"].tobytes() for single in singles for i in range(len(single)))
    assert rows == expected


def test_validation_never_repeats_documents(prefixes):
    _, everything = build(prefixes[:1], 1, None)
    _, capped = build(prefixes[:1], 1, 10_000)
    assert len(capped) == len(everything)
    _, blended = build(prefixes, 1, 10_000, weights=[0.5, 0.5])
    assert len(blended) > 5 and all(
        len(set(part.document_index)) == len(part.document_index) for part in blended.datasets
    )


# --------------------------------------------------------------------------------------------- batches


def test_collate():
    packed = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    starts = [np.array([0, 1], dtype=np.int32), np.array([0, 2, 3], dtype=np.int32)]
    items = [{"packed": packed[i], "document_starts": starts[i]} for i in range(2)]
    batch = collate(items, [10, 11], block_size=4)
    assert torch.equal(batch.packed, torch.from_numpy(packed))
    assert batch.sample_index.tolist() == [10, 11] and batch.sample_index.dtype == torch.int64
    assert batch.cu_seqlens.tolist() == [0, 4, 16, 24, 28, 32] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 12
    joined = collate(items, [10, 11], block_size=4, isolate=False)
    assert joined.cu_seqlens.tolist() == [0, 16, 32] and joined.max_seqlen == 16


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    """A tenth of a file of a gigabyte, in random order; a memory map would hold on to it."""
    write_sparse_dataset(tmp_path / "sparse", 100_000, 1_000_000_000)
    train, _ = build([str(tmp_path / "sparse")], 20_000, sequence_length=16_384, split="1,0")
    batches = iter(SampleLoader(train, micro_batch_size=1))
    next(batches)
    before = resident_bytes()
    for _ in range(2_700):  # 100 MB
        next(batches)
    assert resident_bytes() - before < 20e6


def rows_of(batches):
    return [
        (int(n), row.numpy().tobytes())
        for batch in batches
        for n, row in zip(batch.sample_index, batch.packed, strict=True)
    ]


def test_ranks_share_a_global_order_without_gaps(prefixes):
    train, _ = build(prefixes, 96)
    expected = [(i, train[i]["packed"].tobytes()) for i in range(96)]
    for micro_batch_size, size in [(1, 1), (4, 1), (2, 2), (1, 4), (3, 2)]:
        ranks = [
            list(
                SampleLoader(
                    train,
                    micro_batch_size=micro_batch_size,
                    data_parallel_rank=rank,
                    data_parallel_size=size,
                    end_sample=96,
                )
            )
            for rank in range(size)
        ]
        # Step by step, the ranks' micro-batches side by side are the next samples.
        steps = [batch for step in zip(*ranks, strict=True) for batch in step]
        assert rows_of(steps) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("consumed", [0, 8, 20])
def test_exact_resume(prefixes, consumed, num_workers):
    train, _ = build(prefixes, 48)
    arguments = {"micro_batch_size": 2, "data_parallel_rank": 1, "data_parallel_size": 2, "end_sample": 48}
    whole = rows_of(SampleLoader(train, **arguments))
    loader = SampleLoader(train, consumed_samples=consumed, num_workers=num_workers, **arguments)
    assert len(loader) == (48 - consumed) // 4
    assert rows_of(loader) == whole[consumed // 2 :]
    assert rows_of(loader) == whole[consumed // 2 :]


def test_dataset_can_be_sent_to_another_process(prefixes):
    train, _ = build(prefixes, 20)
    again = pickle.loads(pickle.dumps(train))
    assert np.array_equal(again[3]["packed"], train[3]["packed"])


def test_fixed_batches(prefixes):
    _, valid = build(prefixes[:1], 1, None)
    first = rows_of(fixed_batches(valid, 12, micro_batch_size=4))
    assert first == rows_of(fixed_batches(valid, 12, micro_batch_size=4))
    assert [number for number, _ in first] == list(range(12))
    ranks = [
        rows_of(fixed_batches(valid, 12, micro_batch_size=2, data_parallel_rank=r, data_parallel_size=2))
        for r in range(2)
    ]
    assert sorted(ranks[0] + ranks[1]) == sorted(first)
    for num_samples in (10, 4 * len(valid)):
        with pytest.raises(BitLMError, match=f"{num_samples} validation samples .* multiple of .* = 4"):
            fixed_batches(valid, num_samples, micro_batch_size=4)


# ----------------------------------------------------------------------------------- caches and ranks


def test_index_cache(prefixes, tmp_path):
    plain, _ = build(prefixes, 60, 4)
    cache = tmp_path / "cache"
    for _ in range(2):
        cached, valid = build(prefixes, 60, 4, cache_dir=str(cache))
        assert all(np.array_equal(plain[i]["packed"], cached[i]["packed"]) for i in range(60))
        names = sorted(path.name for path in cache.iterdir())
        assert len(names) == 4 and not any(name.startswith(".") for name in names)
    build(prefixes, 60, 4, seed=8, cache_dir=str(cache))
    assert len(list(cache.iterdir())) == 6  # training orders of another seed; validation is shared
    assert sorted(path.name for path in Path(prefixes[0]).parent.iterdir()) == sorted(
        f"{name}{suffix}" for name in "ab" for suffix in (".bin", ".idx", ".json", ".tokenizer")
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(BitLMError, match="cache_dir .*file.*cannot be used"):
        build(prefixes, 60, cache_dir=str(tmp_path / "file"))


def test_index_cache_is_not_used_for_other_data(write_dataset, tmp_path):
    rows = []
    for seed in (1, 2):
        write_dataset(tmp_path / "set", random_documents(seed, 50), vocab_size=VOCAB_SIZE, block_size=4)
        train, _ = build([str(tmp_path / "set")], 30, cache_dir=str(tmp_path / "cache"))
        fresh, _ = build([str(tmp_path / "set")], 30)
        assert all(np.array_equal(train[i]["packed"], fresh[i]["packed"]) for i in range(30))
        rows.append(train[0]["packed"].tobytes())
        for path in list(tmp_path.glob("set*")):
            path.rename(path.with_name(f"{path.name}.{seed}"))
    assert rows[0] != rows[1]


def truncate(folder):
    path = folder / "document_index.npy"
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_bit(folder):
    path = folder / "shuffle_index.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "document_index.npy has another size": truncate,
    "shuffle_index.npy does not match its checksum": flip_a_bit,
    "sample_index.npy is missing": lambda folder: (folder / "sample_index.npy").unlink(),
    "index.json is missing": lambda folder: (folder / "index.json").unlink(),
    "index.json cannot be read": lambda folder: (folder / "index.json").write_text("{"),
    "is of another release": lambda folder: (folder / "index.json").write_text(
        (folder / "index.json").read_text().replace('"version": 1', '"version": 0')
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_index_cache_is_built_anew(prefixes, tmp_path, capsys, message):
    def rows():
        train, _ = build(prefixes[:1], 60, cache_dir=str(tmp_path))
        return [train[i]["packed"].tobytes() for i in range(60)]

    expected = rows()
    (folder,) = tmp_path.iterdir()
    DAMAGES[message](folder)
    assert rows() == expected
    warning = capsys.readouterr().err
    assert message in warning and "built anew" in warning and folder.name in warning
    assert rows() == expected and capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("with_cache", [False, True])
def test_gloo_ranks_see_the_same_samples(prefixes, tmp_path, with_cache):
    results = run_ranks(batches_of_rank, 2, prefixes, str(tmp_path / "cache") if with_cache else None)
    train, _ = build(prefixes, 40, 4, seed=3, weights=[1.0, 3.0], sequence_length=16)
    seen = {}
    for numbers, contents in results:
        seen.update(zip(numbers, contents, strict=True))
    assert sorted(seen) == list(range(40))
    assert all(train[i]["packed"].tolist() == seen[i] for i in range(40))


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 30}, "sequence_length 30 is not divisible by block_size 4; 28 would be"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"weights": [1.0]}, "weights has 1 values for 2 paths"),
        ({"weights": [1.0, -1.0]}, r"weights \[1.0, -1.0\] must all be positive"),
        ({"weights": [1.0, 0.0]}, "must all be positive"),
        ({"split": "90"}, "split '90'"),
        ({"split": "0,1"}, "split '0,1'"),
        ({"split": "a,b"}, "split 'a,b'"),
        ({"split": "-1,2"}, "split '-1,2'"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"paths": ["/nowhere/x", "/nowhere/y"]}, "/nowhere/x.json: no such dataset card"),
        ({"paths": []}, "paths is empty"),
    ],
)
def test_refused_settings(prefixes, changes, message):
    with pytest.raises(BitLMError, match=message):
        build(**{"paths": prefixes, **changes})


def test_model_of_another_kind_is_refused(prefixes):
    with pytest.raises(BitLMError, match="its block_size is 4, expected 2"):
        build(prefixes, block_size=2)
    with pytest.raises(BitLMError, match="its vocab_size is 258, expected 300"):
        build_datasets(config(prefixes), block_size=4, num_train_samples=1, num_valid_samples=0, seed=0, vocab_size=300)


def test_datasets_that_disagree_are_refused(prefixes, write_dataset, tmp_path):
    write_dataset(tmp_path / "other", random_documents(0, 50), vocab_size=VOCAB_SIZE + 1, block_size=4)
    with pytest.raises(BitLMError, match=r"packing\d+/a and .*other cannot be blended: vocab_size is 258 .* 259"):
        build([prefixes[0], str(tmp_path / "other")])
    code_map = np.roll(np.arange(VOCAB_SIZE), 1)
    write_dataset(tmp_path / "map", random_documents(0, 50), vocab_size=VOCAB_SIZE, block_size=4, code_map=code_map)
    with pytest.raises(BitLMError, match="map cannot be blended: code_map_hash"):
        build([prefixes[0], str(tmp_path / "map")])


def test_too_small_splits_are_named(write_dataset, tmp_path):
    prefix = str(tmp_path / "few")
    write_dataset(prefix, random_documents(0, 3), vocab_size=VOCAB_SIZE, block_size=4)
    with pytest.raises(BitLMError, match="validation split of .*few is too small: 0 of its 3 documents"):
        build([prefix], 10, 5, split="98,2")
    train, valid = build([prefix], 10, 0, split="98,2")
    assert len(train) >= 10 and valid is None
    assert build([prefix], 10, 5, split="100,0")[1] is None
    with pytest.raises(BitLMError, match="training split of .*few is too small"):
        build([prefix], 10, 0, split="1,99")


@pytest.mark.parametrize("changes", [{"micro_batch_size": 0}, {"data_parallel_rank": 1}, {"consumed_samples": -1}])
def test_refused_loaders(prefixes, changes):
    train, _ = build(prefixes[:1])
    with pytest.raises(BitLMError):
        SampleLoader(train, **{"micro_batch_size": 2, **changes})
