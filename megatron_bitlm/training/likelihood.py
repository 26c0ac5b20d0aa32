"""The likelihood bound over a set of samples, computed by the pipeline and identical in every layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.likelihood import (
    BlockTerms,
    LikelihoodAccumulator,
    LikelihoodEstimate,
    adapted_proposal,
    block_bound,
    mean_squared_error_profile,
    pilot_proposal,
)
from megatron_bitlm.method.objective import likelihood_terms
from megatron_bitlm.method.path import TabulatedTime
from megatron_bitlm.model.bitlm import ScoredBlocks
from megatron_bitlm.training.step import Inputs, PipelineRunner, add_over_ranks

_PILOT_SHARE = 4  # the pilot that adapts the proposal sees a quarter of the samples,
_MIN_PILOT_SAMPLES = 16  # but not fewer than these
_NUM_FIELDS = 5  # lambda, squared error, reconstruction, counted tokens, valid


@dataclass
class ValidationConfig:
    """Held-out likelihood bound during training.

    Attributes:
        interval_steps: Steps between validations; 0 validates only at the end.
        num_samples: Samples of the validation split that are scored.
        num_repeats: Independent noise draws a block; more shrink the standard error by its Monte Carlo part.
    """

    interval_steps: int = 1000
    num_samples: int = 64
    num_repeats: int = 1

    def validate(self) -> None:
        """Raise BitLMError naming the setting and its value."""
        if self.interval_steps < 0:
            raise BitLMError(f"validation.interval_steps must not be negative, got {self.interval_steps}")
        for name in ("num_samples", "num_repeats"):
            if getattr(self, name) < 1:
                raise BitLMError(f"validation.{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class LikelihoodReport:
    """The bound with what it was measured on; `edges` and `mse` are the error profile over log-SNR."""

    estimate: LikelihoodEstimate
    num_bytes: int
    edges: np.ndarray
    mse: np.ndarray
    num_blocks: int

    @property
    def bits_per_byte(self) -> float:
        """Upper bound in bits per UTF-8 byte of the counted text."""
        return self.estimate.bits_per_byte(self.num_bytes)

    def record(self) -> dict[str, float]:
        """Flat names for logs."""
        record = {
            "validation/nats_per_token": self.estimate.nats_per_token,
            "validation/perplexity": self.estimate.perplexity,
            "validation/bits_per_byte": self.bits_per_byte,
        }
        if self.estimate.num_samples > 1:  # one sample has no standard error, and JSON no NaN
            record["validation/standard_error"] = self.estimate.standard_error
        return record


class LikelihoodScorer:
    """Scores a fixed set of samples under the model.

    Args:
        runner: Pipeline over the model chunks (in forward-only mode).
        code: Token code.
        token_num_bytes: int64 [V], UTF-8 bytes each id stands for.
        block_size: M.
        seed: Keys the noise of the bound: two calls draw the same numbers.
        sequence_parallel: Whether tensor-parallel ranks hold shards of the sequence.
        device: Of the model.
    """

    def __init__(
        self,
        runner: PipelineRunner,
        *,
        code: BinaryCode,
        token_num_bytes: np.ndarray,
        block_size: int,
        seed: int,
        sequence_parallel: bool,
        device: torch.device,
    ) -> None:
        self.runner, self.code, self.block_size, self.seed = runner, code, block_size, seed
        self.token_num_bytes = torch.from_numpy(np.asarray(token_num_bytes, dtype=np.int64))
        self.sequence_parallel, self.device = sequence_parallel, device

    def __call__(
        self, inputs: list[Inputs], num_samples: int, num_blocks: int, num_repeats: int = 1
    ) -> LikelihoodReport:
        """Bound over samples 0 .. num_samples - 1, each of `num_blocks` target blocks. Collective.

        `inputs` are this data-parallel rank's micro-batches; together the ranks hold every sample once.
        """
        training = [chunk.training for chunk in self.runner.chunks]
        for chunk in self.runner.chunks:
            chunk.eval()
        proposal = self._adapted(inputs, num_samples, num_blocks)
        fields = [self._fields(inputs, num_samples, num_blocks, proposal, 1 + repeat) for repeat in range(num_repeats)]
        for chunk, mode in zip(self.runner.chunks, training, strict=True):
            chunk.train(mode)
        return self._report(torch.stack(fields), proposal, self._num_bytes(inputs))

    def _adapted(self, inputs: list[Inputs], num_samples: int, num_blocks: int) -> TabulatedTime:
        """The proposal, from the first samples by number: the same ones however they are spread over ranks."""
        size = max(num_samples // _PILOT_SHARE, min(num_samples, _MIN_PILOT_SAMPLES))
        first = [item for item in inputs if int(item.sample_index.min()) < size]
        pilot = self._fields(first, num_samples, num_blocks, pilot_proposal(), 0)[:size]
        seen = pilot[..., 4] > 0
        return adapted_proposal(pilot_proposal(), pilot[..., 0][seen].numpy(), pilot[..., 1][seen].numpy())

    def _fields(
        self, inputs: list[Inputs], num_samples: int, num_blocks: int, proposal: TabulatedTime, repeat: int
    ) -> Tensor:
        """float64 CPU [num_samples, num_blocks, _NUM_FIELDS], the same on every rank."""
        seed = (self.seed + repeat) % 2**32
        inputs = self.runner.whole_rounds(inputs)

        def objective(head, condition, clean, sample, block):  # noqa: ANN001, ANN202 (see bitlm.Objective)
            return likelihood_terms(head, condition, clean, sample, block, proposal=proposal, seed=seed)

        table = torch.zeros(num_samples, num_blocks, _NUM_FIELDS, dtype=torch.float64, device=self.device)
        order = iter(inputs)

        def collect(scored: ScoredBlocks, non_loss_data: bool = True) -> None:
            item = next(order)
            terms: BlockTerms = scored.scores
            values = torch.stack(
                [
                    terms.log_snr,
                    terms.squared_error,
                    terms.reconstruction,
                    scored.counts.num_tokens,
                    scored.counts.valid,
                ],
                dim=-1,
            )
            table[item.sample_index[:, None], scored.block[None, :]] = values.double()

        if inputs:  # a rank may hold none of the pilot's samples
            with torch.no_grad():
                self.runner.run(inputs, objective, collect, forward_only=True)
        return add_over_ranks(table, sequence_parallel=self.sequence_parallel).cpu()

    def _num_bytes(self, inputs: list[Inputs]) -> int:
        """UTF-8 bytes of the target blocks of every sample."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        table = self.token_num_bytes.to(self.device)
        for item in inputs:
            ids = self.code.decode(self.code.unpack_codes(item.packed[:, 1:], self.block_size))
            total += table[ids].sum()
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return int(total)

    def _report(self, fields: Tensor, proposal: TabulatedTime, num_bytes: int) -> LikelihoodReport:
        bits = self.block_size * self.code.num_bits
        accumulator = LikelihoodAccumulator()
        valid = fields[0, ..., 4] > 0
        terms = BlockTerms(fields[..., 0], fields[..., 1], fields[..., 2])
        nats = (block_bound(terms, proposal, bits).mean(0) * valid).sum(-1)
        tokens = fields[0, ..., 3].sum(-1)
        for sample in range(fields.shape[1]):
            if tokens[sample] > 0:
                accumulator.add(sample, float(nats[sample]), int(tokens[sample]))
        if not accumulator.tokens:
            raise BitLMError("the validation samples hold no text tokens; check data.split and data.paths")
        chosen = valid.expand(fields.shape[:-1])
        edges, mse = mean_squared_error_profile(fields[..., 0][chosen].numpy(), fields[..., 1][chosen].numpy(), bits)
        estimate = accumulator.estimate()
        if not math.isfinite(estimate.nats_per_token):
            raise BitLMError(f"the likelihood bound is {estimate.nats_per_token}: the model's outputs are not finite")
        return LikelihoodReport(estimate, num_bytes, edges, mse, int(valid.sum()))
