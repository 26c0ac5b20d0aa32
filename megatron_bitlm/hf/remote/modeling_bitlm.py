"""A BitLM for transformers: Qwen3's layers under a block-causal mask, and the diffusion head (arXiv 2605.11577).

The files beside this one that it imports are those the model was trained with, unchanged.
Shape legend: B rows, S sequence, N blocks, M slots, K bits, D hidden, T cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3Model
from transformers.modeling_outputs import ModelOutput

from .blocks import BlockCounter
from .codes import BinaryCode
from .configuration_bitlm import BitLMConfig
from .head import DiffusionHead, HeadConfig
from .noise import Stream, normal
from .objective import DenoisingObjective, ObjectiveConfig, flip_bits
from .path import TabulatedTime
from .sampler import BlockSampler, KnownSlots, SamplerConfig


@dataclass
class BitLMOutput(ModelOutput):
    """loss: mean denoising loss over the counted blocks, where labels were given; last_hidden_state: [B, S, D]."""

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None


class CodeMLP(nn.Module):
    """Codes to hidden states, K -> h -> D with GELU (tanh form), in place of an embedding table (eq. 7)."""

    def __init__(self, num_bits: int, inner_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(num_bits, inner_size), nn.Linear(inner_size, hidden_size)

    def forward(self, codes: Tensor) -> Tensor:
        """[..., K] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(codes.to(self.fc1.weight.dtype)), approximate="tanh"))


class CodeEmbedding(nn.Module):
    """A table by id, in place of the code MLP."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        return self.table(ids)


class BitLMForCausalLM(PreTrainedModel):
    """Loss of training and generation by blocks; made for `AutoModelForCausalLM` with `trust_remote_code=True`."""

    config_class = BitLMConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Qwen3DecoderLayer"]

    def __init__(self, config: BitLMConfig) -> None:
        super().__init__(config)
        num_bits = max(1, (config.vocab_size - 1).bit_length())
        self.model = Qwen3Model(_qwen3_config(config))
        self.model.embed_tokens = nn.Identity()  # codes go through `input_module`
        if config.input == "mlp":
            self.input_module = CodeMLP(num_bits, config.input_hidden_size, config.hidden_size)
        else:
            self.input_module = CodeEmbedding(config.vocab_size, config.hidden_size)
        self.head = DiffusionHead(
            HeadConfig(**config.head),
            num_bits=num_bits,
            block_size=config.block_size,
            condition_size=config.hidden_size,
        )
        if config.has_code_map:
            self.register_buffer("code_map", torch.arange(config.vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DiffusionHead):
            module.reset_parameters()
        elif not any(module is part for part in self.head.modules()):
            super()._init_weights(module)

    @property
    def code(self) -> BinaryCode:
        """The token code."""
        if "_code" not in self.__dict__:
            code_map = self.code_map.cpu() if self.config.has_code_map else None
            self.__dict__["_code"] = BinaryCode(self.config.vocab_size, code_map)
        return self.__dict__["_code"]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        sample_index: Tensor | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> BitLMOutput | tuple:
        """States of packed ids, and with `labels` the training loss (eq. 12, 20).

        Args:
            input_ids: int64 [B, S], S a multiple of M; a block of BOS begins a document, which sees nothing before it.
            labels: int64 [B, S], the same ids: every block is denoised given those before it. Blocks whose labels are
                all -100 are left out, as are blocks of BOS.
            sample_index: int64 [B], keys of the noise; 0, 1, ... by default. The same rows and keys give the same loss.
            return_dict: False gives a tuple.
            unused: `attention_mask` is refused unless it is all ones: pad with EOS and mask by labels.
        """
        mask = unused.pop("attention_mask", None)
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ValueError("BitLM reads whole blocks without padding: fill with EOS, and leave it out by labels -100")
        size = self.config.block_size
        if input_ids.shape[1] % size:
            raise ValueError(f"the sequence of {input_ids.shape[1]} ids is no multiple of block_size {size}")
        if labels is None:
            hidden, loss = self._read(input_ids, self.code.encode(input_ids)), None
        else:
            if sample_index is None:
                sample_index = torch.arange(len(input_ids), device=input_ids.device)
            hidden = self._read(input_ids[:, :-size], self._training_codes(input_ids[:, :-size], sample_index))
            loss = self._loss(hidden, input_ids, labels, sample_index)
        output = BitLMOutput(loss=loss, last_hidden_state=hidden)
        return output if return_dict else output.to_tuple()

    def _training_codes(self, ids: Tensor, sample_index: Tensor) -> Tensor:
        """Codes [B, S, K] of ids [B, S], in training mode with the input noise that the model was trained with."""
        codes = self.code.encode(ids)
        probability = ObjectiveConfig(**self.config.objective).bit_flip_probability
        if not self.training or probability == 0:
            return codes
        blocks = codes.unflatten(1, (-1, self.config.block_size))
        number = torch.arange(blocks.shape[1], device=ids.device)
        return flip_bits(blocks, probability, self.config.seed, sample_index, number).flatten(1, 2)

    def _read(self, ids: Tensor, codes: Tensor) -> Tensor:
        """Final states [B, S, D] of packed documents `ids` [B, S], read as `codes` [B, S, K]."""
        size = self.config.block_size
        starts = (ids.unflatten(1, (-1, size)) == self.config.bos_token_id).all(-1)
        starts[:, 0] = True
        document = starts.cumsum(1).repeat_interleave(size, 1)
        token = torch.arange(ids.shape[1], device=ids.device)
        first = torch.where(starts.repeat_interleave(size, 1), token // size * size, 0).cummax(1).values
        block = token // size
        visible = (document[:, :, None] == document[:, None, :]) & (block[None, :, None] >= block[None, None, :])
        return self._states(codes, token - first, visible, None)

    def _states(self, codes: Tensor, positions: Tensor, visible: Tensor, cache: DynamicCache | None) -> Tensor:
        """Final states of `codes` [B, S, K] at `positions` [B, S]; `visible` is bool [B, S, T]."""
        embedded = self.input_module(codes if self.config.input == "mlp" else self.code.decode(codes))
        return self.model(
            inputs_embeds=embedded,
            attention_mask={"full_attention": _additive(visible, embedded.dtype)},
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _loss(self, hidden: Tensor, ids: Tensor, labels: Tensor, sample_index: Tensor) -> Tensor:
        size, config = self.config.block_size, self.config
        objective = DenoisingObjective(ObjectiveConfig(**config.objective), self.code, config.seed)
        clean = self.code.encode(ids[:, size:]).unflatten(1, (-1, size))
        block = torch.arange(clean.shape[1], device=ids.device)
        scores = objective(self.head, hidden.unflatten(1, (-1, size)), clean, sample_index, block).objective
        counted = BlockCounter(self.code, config.bos_token_id, config.eos_token_id)(clean).valid
        counted &= (labels[:, size:].unflatten(1, (-1, size)) != -100).any(-1)
        return torch.where(counted, scores, 0.0).sum() / counted.sum().clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 64,
        seeds: Sequence[int] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue prompts, block by block (algorithm 2); stops at EOS.

        Args:
            input_ids: int64 [B, S], prompts without framing; None or S = 0 begins from nothing.
            attention_mask: [B, S], 0 on padding, wherever it is.
            max_new_tokens: New tokens a row.
            seeds: One seed a row; 0, 1, ... by default. A row's result does not depend on the others.
            settings: Of the sampler, e.g. num_steps=15, guidance=9.0; the configuration's `sampler` by default.

        Returns:
            int64 [B, S + new tokens], prompts as given and what follows; rows that ended early are filled with EOS.
        """
        prompts = _prompts(input_ids, attention_mask)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts) or max_new_tokens < 1:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts, max_new_tokens {max_new_tokens}")
        longest = max(map(len, prompts)) + max_new_tokens + 2 * self.config.block_size
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"prompt and {max_new_tokens} new tokens with their framing take {longest} positions of "
                f"{self.config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
            )
        table = self.config.entropy_profile
        profile = None if table is None else TabulatedTime(table["edges"], table["weights"])
        sampler = BlockSampler(self.head, SamplerConfig(**{**self.config.sampler, **settings}), profile)
        rows = [self._continue(p, max_new_tokens, seed, sampler) for p, seed in zip(prompts, seeds, strict=True)]
        longest = max(len(row) for row in rows)
        new = torch.tensor(
            [row + [self.config.eos_token_id] * (longest - len(row)) for row in rows], device=self.device
        )
        return new if input_ids is None else torch.cat([input_ids.to(self.device), new], 1)

    def _continue(self, prompt: list[int], max_new_tokens: int, seed: int, sampler: BlockSampler) -> list[int]:
        """New ids of one prompt, with the EOS that ended them."""
        size, device = self.config.block_size, self.device
        framed = [self.config.bos_token_id] * size + prompt
        num_full, num_known = divmod(len(framed), size)
        full = torch.tensor([framed[: num_full * size]], device=device)
        cache = DynamicCache(config=self.model.config)
        position = torch.arange(full.shape[1], device=device)
        visible = (position[:, None] // size >= position[None, :] // size)[None]
        condition = self._states(self.code.encode(full), position[None], visible, cache)[:, -size:]
        new: list[int] = []
        number, length = 0, full.shape[1]
        while len(new) < max_new_tokens:
            known = self._known(framed[num_full * size :]) if number == 0 and num_known else None
            final = self._realise(condition, num_full + number, seed, sampler, known)
            ids = self.code.decode(final)
            for token in ids[0, num_known if number == 0 else 0 :].tolist()[: max_new_tokens - len(new)]:
                new.append(token)
                if token == self.config.eos_token_id:
                    return new
            if len(new) < max_new_tokens:
                position = torch.arange(length, length + size, device=device)[None]
                everything = torch.ones(1, size, length + size, dtype=torch.bool, device=device)
                condition = self._states(self.code.encode(ids), position, everything, cache)
            number, length = number + 1, length + size
        return new

    def _known(self, partial: list[int]) -> KnownSlots:
        """The slots of a prompt's last, partial block, which are held to their codes."""
        size = self.config.block_size
        ids = torch.tensor([partial + [self.config.bos_token_id] * (size - len(partial))], device=self.device)
        return KnownSlots(self.code.encode(ids), torch.arange(size, device=self.device)[None] < len(partial))

    def _realise(
        self, condition: Tensor, block: int, seed: int, sampler: BlockSampler, known: KnownSlots | None
    ) -> Tensor:
        """Final analog bits [1, M, K] of a row's block number `block`."""
        shape = (self.config.block_size, self.code.num_bits)
        steps = sampler.config.num_steps if sampler.config.noise_raise > 0 else 0
        key, number = (torch.tensor([value], device=self.device) for value in (seed, block))
        draws = normal(0, Stream.SAMPLER, key, number, (1 + steps) * shape[0] * shape[1]).unflatten(-1, (-1, *shape))
        fresh = (lambda step: draws[:, 1 + step]) if steps else None
        return sampler.sample(condition, draws[:, 0], known=known, fresh_noise=fresh).bits


def _prompts(input_ids: Tensor | None, attention_mask: Tensor | None) -> list[list[int]]:
    if input_ids is None:
        return [[]]
    if attention_mask is None:
        return input_ids.tolist()
    return [row[kept.bool()].tolist() for row, kept in zip(input_ids, attention_mask, strict=True)]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool [B, S, T] -> mask [B, 1, S, T] that is added to scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)[:, None]


def _qwen3_config(config: BitLMConfig) -> Qwen3Config:
    backbone = Qwen3Config(
        vocab_size=1,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    backbone._attn_implementation = config._attn_implementation
    return backbone
