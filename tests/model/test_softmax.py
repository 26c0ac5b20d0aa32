"""The softmax baseline: logits against transformers' Qwen3ForCausalLM, what it predicts and counts, its padding."""

import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.blocks import BlockCounter, counted_tokens
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.model.build import BackboneOverrides, ModelConfig, batch_layout, build_chunks, unwrap
from megatron_bitlm.model.softmax import SoftmaxConfig, causal_layout
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel
from tests.model.qwen3_reference import qwen3_from_backbone

VOCAB, BOS, EOS = 258, 256, 257
CODE = BinaryCode(VOCAB)
ROWS, BLOCKS, SLOTS = 2, 6, 4
LENGTH = BLOCKS * SLOTS
SHAPE = BackboneOverrides(2, 32, 64, 4, 2, head_dim=8)


@pytest.fixture(scope="module")
def state():
    yield initialize_parallel(ParallelConfig(), seed=0)
    shutdown_parallel()


def build(state, *, tie=False, divisor=128, precision="fp32", scale=6.0):
    config = ModelConfig(
        output="softmax",
        backbone=SHAPE,
        block_size=SLOTS,
        softmax=SoftmaxConfig(tie_embeddings=tie, make_vocab_size_divisible_by=divisor),
    )
    chunks = build_chunks(config, state, code=CODE, bos_id=BOS, eos_id=EOS, precision=precision, seed=1)
    model = unwrap(chunks[0])
    with torch.no_grad():  # far from uniform, so that a wrong mask or target shows
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return config, model


def make_ids():
    """Two samples of N + 1 blocks: document starts at blocks 3 (row 0) and 4 (row 1), one and three EOS before."""
    ids = torch.randint(0, 256, (ROWS, BLOCKS + 1, SLOTS), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = BOS
    ids[0, 2, 3:] = EOS
    ids[0, 3] = BOS
    ids[1, 3, 1:] = EOS
    ids[1, 4] = BOS
    return ids


DOCUMENTS = [0, 3 * SLOTS, LENGTH, LENGTH + 4 * SLOTS, 2 * LENGTH]


def qwen3(config, model):
    """Qwen3ForCausalLM with the model's weights."""
    state = model.state_dict()
    backbone = config.resolve_backbone()
    reference = Qwen3ForCausalLM(
        Qwen3Config(
            **{
                **qwen3_from_backbone(backbone, state).config.to_dict(),
                "vocab_size": VOCAB,
                "tie_word_embeddings": False,
            }
        )
    )
    reference.model.load_state_dict(
        {
            **qwen3_from_backbone(backbone, state).state_dict(),
            "embed_tokens.weight": state["input_module.word_embeddings.weight"][:VOCAB],
        }
    )
    table = "input_module.word_embeddings" if config.softmax.tie_embeddings else "output_layer"
    reference.lm_head.weight.data.copy_(state[f"{table}.weight"][:VOCAB])
    return reference.eval()


def score(config, model, ids, documents=DOCUMENTS):
    layout = batch_layout(config, documents, batch_size=ROWS, sequence_length=LENGTH, device="cpu")
    return model(packed=CODE.pack(ids), layout=layout, sample_index=torch.arange(ROWS))


@pytest.mark.parametrize("tie", [False, True])
def test_nats_are_those_of_transformers_qwen3(state, tie):
    config, model = build(state, tie=tie)
    ids = make_ids()
    with torch.no_grad():
        scored = score(config, model, ids)
        reference = qwen3(config, model)
        tokens, starts = ids.flatten(1), {0: [3], 1: [4]}
        for row in range(ROWS):
            # Each document alone: in the input tokens M-1 .. S+M-2, with the targets behind them.
            cuts = [SLOTS - 1, *(block * SLOTS for block in starts[row]), LENGTH + SLOTS - 1]
            for begin, end in zip(cuts, cuts[1:], strict=False):
                log_p = reference(tokens[row : row + 1, begin:end]).logits.log_softmax(-1)[0]
                expected = -log_p.gather(-1, tokens[row, begin + 1 : end + 1, None])[:, 0]
                found = scored.nats[row, begin - SLOTS + 1 : end - SLOTS + 1]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.3


def test_the_tokens_counted_are_those_of_the_bound(state):
    config, model = build(state)
    ids = make_ids()
    ids[1, 6] = EOS  # a document whose text fills its blocks ends with a block of EOS
    scored = score(config, model, ids)
    blocks = BlockCounter(CODE, BOS, EOS)(CODE.encode(ids[:, 1:]))
    assert torch.equal(scored.counted.unflatten(1, (BLOCKS, SLOTS)).sum(-1), blocks.num_tokens)
    assert scored.num_counted == blocks.num_tokens.sum()
    assert scored.counted[0, : 2 * SLOTS].tolist() == [True] * 8
    assert counted_tokens(ids, BOS, EOS)[1, 3].tolist() == [True, True, False, False]
    assert counted_tokens(ids, BOS, EOS)[1, 4].tolist() == [False] * SLOTS
    assert counted_tokens(ids, BOS, EOS)[1, 6].tolist() == [True, False, False, False]


def test_a_prediction_sees_its_own_document_up_to_its_own_place(state):
    config, model = build(state)
    ids = make_ids()
    nats = score(config, model, ids).nats
    changed = ids.clone()
    changed[0, 2, 1] = (changed[0, 2, 1] + 7) % 256  # token 9: the target number 9 - M, an input from there on
    other = score(config, model, changed).nats
    differs = (other != nats).nonzero().tolist()
    assert {row for row, _ in differs} == {0}
    # Document 1 of the row begins with token 12, an input whose target is number 12 - M + 1.
    assert [token for _, token in differs] == list(range(9 - SLOTS, 12 - SLOTS + 1))


def test_padded_rows_are_never_predicted_and_never_learn(state):
    config, model = build(state, divisor=128)
    assert model.output_layer.weight.shape[0] == 384
    layout = causal_layout(None, batch_size=ROWS, sequence_length=LENGTH, block_size=SLOTS)
    ids = make_ids()[:, 1:].flatten(1)
    logits = model.logits(model.states(ids, layout))
    assert (logits[..., VOCAB:] == -torch.inf).all() and logits[..., :VOCAB].isfinite().all()
    model.zero_grad()
    scored = score(config, model, make_ids())
    (scored.nats * scored.counted).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert (model.output_layer.weight.grad[VOCAB:] == 0).all()
    assert (model.output_layer.weight.grad[:VOCAB].abs().sum(-1) > 0).all()
    # Another padding is the same model: rows of ids do not move.
    _, other = build(state, divisor=1)
    torch.testing.assert_close(score(config, other, make_ids()).nats, scored.nats, atol=1e-6, rtol=1e-6)


def test_starts_at_the_uniform_distribution(state):
    config, model = build(state, scale=1.0)
    nats = score(config, model, make_ids()).nats
    assert nats.mean().item() == pytest.approx(math.log(VOCAB), abs=0.05)


def test_bf16_stays_close(state):
    config, model = build(state, scale=1.0)
    _, narrow = build(state, precision="bf16", scale=1.0)
    torch.testing.assert_close(
        score(config, narrow, make_ids()).nats, score(config, model, make_ids()).nats, atol=0.05, rtol=0.02
    )


def test_the_fused_cross_entropy_of_the_gpu_is_the_same(state):
    """megatron-core compiles it; here it runs uncompiled. Its gradient comes in bf16, as bf16 logits want it."""
    config, model = build(state, precision="bf16", scale=2.0)
    found = {}
    for fused in (False, True):
        model.zero_grad()
        model.config.cross_entropy_loss_fusion = fused
        with torch.compiler.set_stance("force_eager"):
            scored = score(config, model, make_ids())
            (scored.nats * scored.counted).sum().backward()
        found[fused] = [scored.nats.detach(), *(parameter.grad.float() for parameter in model.parameters())]
    for plain, other in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(other, plain, atol=2e-2 * plain.abs().max().item(), rtol=0)


def test_settings_that_cannot_be_built():
    with pytest.raises(BitLMError, match="model.output must be diffusion or softmax, got 'gumbel'"):
        ModelConfig(output="gumbel").validate()
    with pytest.raises(BitLMError, match="make_vocab_size_divisible_by must be at least 1, got 0"):
        ModelConfig(softmax=SoftmaxConfig(make_vocab_size_divisible_by=0)).validate()
    assert SoftmaxConfig().padded_vocab_size(151_669, 8) == 151_680
    with pytest.raises(BitLMError, match="7 tensor-parallel ranks cannot share a vocabulary of 151680 rows"):
        SoftmaxConfig().padded_vocab_size(151_669, 7)
