"""The softmax baseline's exact likelihood, of the tokens that BitLM's bound is of."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.method.likelihood import LikelihoodAccumulator
from megatron_bitlm.model.softmax import ScoredTokens
from megatron_bitlm.training.likelihood import LikelihoodReport, evaluating, finite_estimate, target_num_bytes
from megatron_bitlm.training.step import Inputs, PipelineRunner, add_over_ranks


class CrossEntropyScorer:
    """Negative log-likelihood of a fixed set of samples: text and one EOS a document, each given all before it.

    Args:
        runner: Pipeline over the model chunks (in forward-only mode).
        code: Token code.
        token_num_bytes: int64 [V], UTF-8 bytes each id stands for.
        block_size: M of the dataset.
        device: Of the model.
    """

    def __init__(
        self,
        runner: PipelineRunner,
        *,
        code: BinaryCode,
        token_num_bytes: np.ndarray,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.runner, self.code, self.block_size, self.device = runner, code, block_size, device
        self.token_num_bytes = torch.from_numpy(np.asarray(token_num_bytes, dtype=np.int64))

    def __call__(
        self, inputs: list[Inputs], num_samples: int, num_blocks: int, num_repeats: int = 1
    ) -> LikelihoodReport:
        """See `training.likelihood.Scorer`; nothing here is drawn, so repeats would repeat and are not made."""
        with evaluating(self.runner.chunks):
            table = self._sums(inputs, num_samples)
        accumulator = LikelihoodAccumulator()
        for sample, (nats, tokens) in enumerate(table.tolist()):
            if tokens > 0:
                accumulator.add(sample, nats, int(tokens))
        estimate = finite_estimate(accumulator)
        num_bytes = target_num_bytes(inputs, self.code, self.token_num_bytes, self.block_size, self.device)
        return LikelihoodReport(estimate, num_bytes, is_exact=True)

    def _sums(self, inputs: list[Inputs], num_samples: int) -> Tensor:
        """float64 CPU [num_samples, 2], nats and counted tokens of every sample, the same on every rank."""
        table = torch.zeros(num_samples, 2, dtype=torch.float64, device=self.device)
        inputs = self.runner.whole_rounds(inputs)
        order = iter(inputs)

        def collect(scored: ScoredTokens, non_loss_data: bool = True) -> None:
            nats = (scored.nats.double() * scored.counted).sum(1)
            table[next(order).sample_index] = torch.stack([nats, scored.counted.sum(1).double()], dim=-1)

        self.runner.run(inputs, {}, collect, forward_only=True)
        return add_over_ranks(table, is_sharded=False).cpu()
