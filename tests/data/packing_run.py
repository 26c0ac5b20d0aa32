"""What one rank does in the test of building samples under torch.distributed."""

import torch.distributed

from megatron_bitlm.data.packing import DataConfig, SampleLoader, build_datasets


def batches_of_rank(paths: list[str], cache_dir: str | None) -> tuple[list[int], list[list]]:
    """This rank's sample numbers and packed bytes of a small run over two blended datasets."""
    torch.distributed.init_process_group("gloo")
    config = DataConfig(paths=paths, weights=[1.0, 3.0], sequence_length=16, split="80,20", cache_dir=cache_dir)
    train, valid = build_datasets(config, block_size=4, num_train_samples=40, num_valid_samples=4, seed=3)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loader = SampleLoader(train, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=size, end_sample=40)
    batches = list(loader)
    numbers = [int(number) for batch in batches for number in batch.sample_index]
    contents = [row.tolist() for batch in batches for row in batch.packed]
    torch.distributed.destroy_process_group()
    assert len(valid) >= 4
    return numbers, contents
