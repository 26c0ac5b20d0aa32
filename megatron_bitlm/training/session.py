"""Everything one process holds while it trains: place in the layout, model, optimizer, data, scorer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_bitlm.data.card import Card, load_dataset_code, load_dataset_tokenizer, read_card
from megatron_bitlm.data.indexed import CodeDataset, open_dataset
from megatron_bitlm.data.loading import SampleLoader, fixed_batches
from megatron_bitlm.data.packing import build_datasets
from megatron_bitlm.data.tokenizer import Tokenizer
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.objective import DenoisingObjective
from megatron_bitlm.model.build import build_chunks, unwrap
from megatron_bitlm.parallel.state import ParallelState
from megatron_bitlm.training.checkpoint import CheckpointManager
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.criterion import Criterion, CrossEntropyCriterion, DenoisingCriterion
from megatron_bitlm.training.likelihood import LikelihoodReport
from megatron_bitlm.training.optimizer import build_optimizer, build_scheduler
from megatron_bitlm.training.scoring import build_scorer
from megatron_bitlm.training.step import Inputs, PipelineRunner, TrainingStep, to_device

_NUM_SPOT_CHECKS, _NUM_SPOT_BLOCKS = 16, 64
_VALIDATION_SEED_OFFSET = 0x5EED  # the bound's noise must not repeat the training noise of the same samples


@dataclass
class DataFacts:
    """What the datasets of a run agree on."""

    card: Card
    code: BinaryCode
    tokenizer: Tokenizer
    prefix: str


def read_data_facts(config: RunConfig) -> DataFacts:
    """Card, code and tokenizer of the datasets, checked against each other and the model's block size.

    Raises:
        BitLMError: No paths, an unreadable dataset, or one made for another block size, code or tokenizer.
    """
    if not config.data.paths:
        raise BitLMError("data.paths is empty: name at least one dataset prefix made by `bitlm preprocess`")
    prefix = config.data.paths[0]
    card = read_card(prefix)
    if card.block_size != config.model.block_size:
        raise BitLMError(
            f"{prefix}.json was made with block_size {card.block_size}, but model.block_size is "
            f"{config.model.block_size}; preprocess again or change model.block_size"
        )
    code = load_dataset_code(prefix)
    for path in config.data.paths:
        dataset = open_dataset(
            path,
            block_size=card.block_size,
            code_map_hash=card.code_map_hash,
            tokenizer_fingerprint=card.tokenizer_fingerprint,
            vocab_size=card.vocab_size,
        )
        _spot_check(path, dataset, code)
    return DataFacts(card, code, load_dataset_tokenizer(prefix), prefix)


def _spot_check(path: str, dataset: CodeDataset, code: BinaryCode) -> None:
    """Look at some blocks of documents spread over the dataset: training reads bits and would not notice foreign ones.

    Raises:
        BitLMError: The bits belong to no id, or a document does not start with BOS.
    """
    card = dataset.card
    for document in range(0, len(dataset), -(-len(dataset) // _NUM_SPOT_CHECKS)):
        blocks = dataset.get(document, 0, min(_NUM_SPOT_BLOCKS, int(dataset.sequence_lengths[document])))
        try:
            ids = code.unpack(blocks, card.block_size)
        except ValueError as error:
            raise BitLMError(f"{path}.bin document {document}: {error}; preprocess the text again") from error
        if (ids[0] != card.bos_id).any():
            raise BitLMError(f"{path}.bin document {document} does not start with BOS {card.bos_id}; preprocess again")


def whole_validation_batches(config: RunConfig, available: int, data_parallel_size: int) -> int:
    """As many of the `available` validation samples as fill micro-batches on all ranks.

    Raises:
        BitLMError: Not even one each.
    """
    share = config.training.micro_batch_size * data_parallel_size
    if available < share:
        raise BitLMError(
            f"validation.num_samples {config.validation.num_samples} of data.split {config.data.split!r} "
            f"are {available} samples, fewer than training.micro_batch_size x data-parallel ranks = {share}; raise "
            "these or lower training.micro_batch_size"
        )
    return available // share * share


class Session:
    """Builds what `config` asks for on this rank. Collective.

    Args:
        config: The run, already validated.
        facts: Of its datasets.
        state: This process's place in the layout.
        checkpoints: Folder of the run's checkpoints.
    """

    def __init__(self, config: RunConfig, facts: DataFacts, state: ParallelState, checkpoints: Path) -> None:
        self.config, self.facts, self.state = config, facts, state
        self.num_micro_batches = config.num_micro_batches(state.data_parallel_size)
        training = config.training
        precise = build_chunks(
            config.model,
            state,
            code=facts.code,
            bos_id=facts.card.bos_id,
            eos_id=facts.card.eos_id,
            precision=training.precision,
            seed=config.run.seed,
            fp8=training.fp8,
        )
        self.chunks = [unwrap(chunk) for chunk in precise]
        self.wrapped = wrapped = self._wrap(precise)
        parallel = config.parallel
        self.optimizer = build_optimizer(
            config.optimizer,
            wrapped,
            bf16=training.precision == "bf16",
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        self._connect(wrapped)
        scheduler = build_scheduler(config.optimizer, self.optimizer, training.num_steps)
        self.checkpoints = CheckpointManager(checkpoints, config.checkpoint, self.chunks, self.optimizer, scheduler)
        self.train_data, self.valid_data = build_datasets(
            config.data,
            block_size=config.model.block_size,
            num_train_samples=training.num_steps * training.global_batch_size,
            num_valid_samples=config.validation.num_samples,
            seed=config.run.seed,
        )
        available = min(config.validation.num_samples, len(self.valid_data))
        self.num_validation_samples = whole_validation_batches(config, available, state.data_parallel_size)
        runner = PipelineRunner(wrapped, training.micro_batch_size, config.data.sequence_length)
        self.step = TrainingStep(
            runner,
            self.optimizer,
            scheduler,
            self._criterion(),
            device=state.device,
        )
        self.scorer = build_scorer(
            config.model,
            runner,
            code=facts.code,
            token_num_bytes=facts.tokenizer.token_num_bytes(),
            seed=(config.run.seed + _VALIDATION_SEED_OFFSET) % 2**32,
            sequence_parallel=parallel.sequence_parallel,
            device=state.device,
        )

    def loader(self, consumed_samples: int, num_extra_samples: int = 0) -> SampleLoader:
        """This rank's micro-batches from the run's sample number `consumed_samples` on.

        `num_extra_samples` more than a run without rewinds needs, see `SampleLoader`.
        """
        return SampleLoader(
            self.train_data,
            micro_batch_size=self.config.training.micro_batch_size,
            data_parallel_rank=self.state.data_parallel_rank,
            data_parallel_size=self.state.data_parallel_size,
            consumed_samples=consumed_samples,
            num_workers=self.config.data.num_workers,
            num_extra_samples=num_extra_samples,
        )

    def next_inputs(self, batches: Any) -> list[Inputs]:
        """The micro-batches of one step, on the device."""
        return [self._to_device(next(batches)) for _ in range(self.num_micro_batches)]

    def complete_weights(self) -> None:
        """Make this rank's weights those of the last step. Collective.

        With `parallel.overlap_param_gather` a rank holds only its own share of an update until the next training
        forward pass has gathered the rest.
        """
        if self.config.parallel.overlap_param_gather:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)

    def close(self) -> None:
        """Let the model and the process groups it refers to be freed; nothing here may be used after.

        The gradient hooks of megatron-core hold the model, and are held by the graph nodes of its parameters: circles
        that lead through autograd, where Python's collector cannot see them, and so are opened here.
        """
        for chunk in self.wrapped:
            chunk.grad_accs.clear()
            for parameter in chunk.parameters():
                parameter.main_param = None  # the optimizer's shard of it is a view
        config = self.chunks[0].config
        config.finalize_model_grads_func = config.grad_scale_func = config.no_sync_func = None

    def validate(self) -> LikelihoodReport:
        """The likelihood of the validation samples, or its bound. Collective."""
        self.complete_weights()
        num_samples = self.num_validation_samples
        batches = fixed_batches(
            self.valid_data,
            num_samples,
            micro_batch_size=self.config.training.micro_batch_size,
            data_parallel_rank=self.state.data_parallel_rank,
            data_parallel_size=self.state.data_parallel_size,
        )
        inputs = [self._to_device(batch) for batch in batches]
        num_blocks = self.config.data.sequence_length // self.config.model.block_size
        return self.scorer(inputs, num_samples, num_blocks, self.config.validation.num_repeats)

    def _to_device(self, batch: Any) -> Inputs:
        return to_device(batch, self.state.device, self.config.model)

    def _criterion(self) -> Criterion:
        config = self.config
        if config.model.output == "softmax":
            return CrossEntropyCriterion()
        return DenoisingCriterion(
            DenoisingObjective(config.objective, self.facts.code, config.run.seed),
            block_size=config.model.block_size,
            sequence_parallel=config.parallel.sequence_parallel,
        )

    def _wrap(self, chunks: list) -> list[DistributedDataParallel]:
        parallel = self.config.parallel
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=False,  # the step checks loss and norm itself, with a message
        )
        return [
            DistributedDataParallel(unwrap(chunk).config, settings, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]

    def _connect(self, wrapped: list[DistributedDataParallel]) -> None:
        """Tell the schedules how to finish gradients and when to communicate."""
        config, parallel = self.chunks[0].config, self.config.parallel

        def single(items: list) -> Any:
            return items if len(items) > 1 else items[0]

        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if parallel.overlap_grad_reduce:
            config.no_sync_func = single([chunk.no_sync for chunk in wrapped])
        # No param_sync_func: each chunk's forward hooks gather its weights, and a second call would meet theirs.
