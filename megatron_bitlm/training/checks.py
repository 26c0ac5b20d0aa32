"""Checks of a run that need neither process groups nor a model: before anything starts or is written."""

from __future__ import annotations

from typing import Any

from megatron_bitlm.data.packing import num_validation_samples
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.checkpoint import complete_checkpoints, read_meta
from megatron_bitlm.parallel.state import launched_world_size
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.initial_weights import check_initial_checkpoint
from megatron_bitlm.training.run_folder import RunFolder
from megatron_bitlm.training.session import DataFacts, read_data_facts, whole_validation_batches


def check_run(config: RunConfig, folder: RunFolder, world_size: int | None = None) -> DataFacts:
    """All checks that need neither process groups nor a model; nothing is written.

    Args:
        config: The run.
        folder: Its folder.
        world_size: Processes of the run; None for those this process was started with.

    Raises:
        BitLMError: As `pretrain`.
    """
    config.validate()
    world_size = launched_world_size() if world_size is None else world_size
    config.parallel.validate(world_size, config.model.resolve_backbone())
    config.num_micro_batches(config.parallel.data_parallel_size(world_size))
    facts = read_data_facts(config)
    if config.model.output == "softmax":
        config.model.softmax.padded_vocab_size(facts.card.vocab_size, config.parallel.tensor_model_parallel_size)
    available = num_validation_samples(
        config.data, block_size=config.model.block_size, at_most=config.validation.num_samples
    )
    whole_validation_batches(config, available, config.parallel.data_parallel_size(world_size))
    folder.check(config)
    initial = check_initial_checkpoint(config)
    if initial is not None:
        check_same_data(initial, facts)
    for _, path in reversed(complete_checkpoints(folder.checkpoints)):
        try:
            meta = read_meta(path)
        except BitLMError:
            continue  # damaged: the session sets it aside, with a warning, and takes the one before
        check_same_data(meta, facts)
        check_same_optimizer(meta, config)
        check_same_model(meta, config)
        break
    return facts


def data_identity(facts: DataFacts) -> dict[str, Any]:
    """What a model and a dataset must agree on."""
    card = facts.card
    return {
        "vocab_size": card.vocab_size,
        "num_bits": card.num_bits,
        "block_size": card.block_size,
        "code_map_hash": card.code_map_hash,
        "tokenizer_fingerprint": card.tokenizer_fingerprint,
        "bos_id": card.bos_id,
        "eos_id": card.eos_id,
    }


def check_same_data(meta: dict[str, Any], facts: DataFacts) -> None:
    """Raise BitLMError where a checkpoint was trained on another code, tokenizer or framing than the data's."""
    stored, here = meta["data"], data_identity(facts)
    for name, value in here.items():
        if stored.get(name) != value:
            raise BitLMError(
                f"the checkpoint of step {meta['step']} was trained with {name} {stored.get(name)!r}, but "
                f"{facts.prefix}.json has {value!r}; use the dataset the run was started with"
            )


def check_same_model(meta: dict[str, Any], config: RunConfig) -> None:
    """Raise BitLMError where a checkpoint holds another kind of model than the run asks for."""
    stored = meta["settings"].get("model.output", "diffusion")
    if stored != config.model.output:
        raise BitLMError(
            f"the checkpoint of step {meta['step']} holds a model with model.output {stored}, but the run asks for "
            f"{config.model.output}; set model.output to {stored}, or start in another run.directory"
        )


def check_same_optimizer(meta: dict[str, Any], config: RunConfig) -> None:
    """Raise BitLMError where a checkpoint has the optimizer's state in the form of the other kind of optimizer.

    megatron-core names and nests the state of its distributed optimizer otherwise than that of the plain one, and loads
    neither as the other. Every other part of the layout may change.
    """
    name = "use_distributed_optimizer"
    stored, here = meta["settings"].get(f"parallel.{name}"), getattr(config.parallel, name)
    if stored is not None and stored != here:
        raise BitLMError(
            f"the checkpoint of step {meta['step']} has {name} {stored}, but parallel.{name} is {here}; set it to "
            f"{stored} to resume this run"
        )
