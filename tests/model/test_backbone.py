"""The backbone against transformers' Qwen3, cached against uncached, and its parts against plain formulas."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.method.codes import BinaryCode
from megatron_bitlm.model.backbone import Backbone, block_spec, transformer_config
from megatron_bitlm.model.initialization import initialize_parameters
from megatron_bitlm.model.inputs import CodeEmbedding, CodeMLP
from megatron_bitlm.model.layers import RMSNorm, apply_rotary, rotary_tables
from megatron_bitlm.model.layout import KVCache, SequenceLayout
from megatron_bitlm.model.presets import BackboneConfig
from megatron_bitlm.parallel.state import ParallelConfig, initialize_parallel, shutdown_parallel
from tests.model.qwen3_reference import block_causal_bias, qwen3_from_backbone

SHAPE = BackboneConfig(3, 48, 80, 4, 2, head_dim=16)
NUM_BITS, ROWS, LENGTH = 9, 2, 32
# Offsets that are whole blocks for every block size tested.
DOCUMENTS = [0, 12, 28, 32, 48, 64]
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}


@pytest.fixture(scope="module", autouse=True)
def single_process():
    state = initialize_parallel(ParallelConfig(), seed=0)
    yield state
    shutdown_parallel()


def build(block_size=4, precision="fp32", backend="auto", shape=SHAPE, **parallel) -> Backbone:
    config = transformer_config(shape, ParallelConfig(**parallel), precision=precision)
    model = Backbone(
        config,
        block_spec(config, block_size=block_size, attention_backend=backend),
        backbone=shape,
        input_module=CodeMLP(NUM_BITS, 64, shape.hidden_size, dtype=config.params_dtype),
    )
    initialize_parameters(model, seed=3)
    # Larger weights and uneven norms, so that attention is far from uniform and a wrong mask or norm shows.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
            else:
                parameter.mul_(6.0)
    return model


def random_codes(dtype=torch.float32, rows=ROWS, length=LENGTH, seed=11) -> torch.Tensor:
    bits = torch.randint(0, 2, (rows, length, NUM_BITS), generator=torch.Generator().manual_seed(seed))
    return (2 * bits - 1).to(dtype)


def document_numbers(offsets: list[int]) -> torch.Tensor:
    lengths = torch.tensor(offsets).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths).view(ROWS, LENGTH)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("offsets", [[0, 32, 64], DOCUMENTS], ids=["whole rows", "documents"])
def test_forward_and_gradients_match_transformers_qwen3(precision, block_size, offsets):
    model = build(block_size, precision)
    layout = SequenceLayout.from_batch(torch.tensor(offsets), ROWS, LENGTH, block_size)
    codes = random_codes()
    hidden = model(codes, layout).transpose(0, 1)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7), dtype=hidden.dtype)
    (hidden * weights).sum().backward()

    reference = qwen3_from_backbone(SHAPE, model.state_dict())
    reference_input = copy.deepcopy(model.input_module)
    reference_input.zero_grad()
    bias = block_causal_bias(layout.positions, document_numbers(offsets), block_size).to(hidden.dtype)
    expected = reference(
        inputs_embeds=reference_input(codes), attention_mask=bias, position_ids=layout.positions
    ).last_hidden_state
    (expected * weights).sum().backward()

    def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    tolerance = TOLERANCE[precision]
    assert relative_error(hidden, expected) < tolerance
    for ours, theirs in zip(model.input_module.parameters(), reference_input.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 10 * tolerance
    for layer, other in zip(model.decoder.layers, reference.layers, strict=True):
        pairs = [
            (layer.self_attention.linear_proj, other.self_attn.o_proj),
            (layer.self_attention.q_layernorm, other.self_attn.q_norm),
            (layer.self_attention.k_layernorm, other.self_attn.k_norm),
            (layer.mlp.linear_fc2, other.mlp.down_proj),
            (layer.input_layernorm, other.input_layernorm),
            (layer.pre_mlp_layernorm, other.post_attention_layernorm),
        ]
        for ours, theirs in pairs:
            assert relative_error(ours.weight.grad, theirs.weight.grad) < 10 * tolerance
        gate_up = torch.cat([other.mlp.gate_proj.weight.grad, other.mlp.up_proj.weight.grad])
        assert relative_error(layer.mlp.linear_fc1.weight.grad, gate_up) < 10 * tolerance


def test_bf16_is_near_fp32():
    layout = SequenceLayout.from_batch(DOCUMENTS, ROWS, LENGTH, 4)
    exact = build()(random_codes(), layout)
    model = build(precision="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rounded = model(random_codes(), layout)
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - exact).norm() / exact.norm()).item() < 0.05


def test_a_document_does_not_see_its_neighbours():
    model, codes = build(), random_codes()
    layout = SequenceLayout.from_batch(DOCUMENTS, ROWS, LENGTH, 4)
    before = model(codes, layout)
    changed = codes.clone()
    changed[0, 12:28] *= -1
    difference = (model(changed, layout) - before).abs().amax(dim=(2,)).transpose(0, 1)
    assert (difference[0, 12:28] > 1e-3).all()
    difference[0, 12:28] = 0
    assert difference.max() == 0


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("lengths", [[20, 20], [20, 12], [8, 20]])
def test_cached_decoding_equals_one_full_pass(block_size, lengths):
    """Prompts of unequal length in one pass, then block by block, rows ending at different places."""
    model, codes = build(block_size, "fp64").eval(), random_codes()
    full = model(codes, SequenceLayout.from_batch(None, ROWS, LENGTH, block_size)).transpose(0, 1)

    cache = KVCache(ROWS + 1, LENGTH)
    prompts = torch.cat([codes[row, :length] for row, length in enumerate(lengths)])[None]
    layout = SequenceLayout.prompts(cache, [0, 1], lengths, block_size, device="cpu")
    found = model(prompts, layout)[:, 0].split(lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row], full[row, :length], rtol=0, atol=1e-12)
    while max(cache.lengths) < LENGTH:
        starts = cache.lengths[:ROWS]
        newest = torch.stack([codes[row, start : start + block_size] for row, start in enumerate(starts)])
        states = model(newest, SequenceLayout.next_blocks(cache, ROWS, block_size, device="cpu")).transpose(0, 1)
        for row, start in enumerate(starts):
            torch.testing.assert_close(states[row], full[row, start : start + block_size], rtol=0, atol=1e-12)
    assert cache.lengths == [length + LENGTH - max(lengths) for length in lengths] + [0]


def test_a_row_moves_in_the_cache():
    model, codes = build(4, "fp64").eval(), random_codes()
    full = model(codes, SequenceLayout.from_batch(None, ROWS, LENGTH, 4)).transpose(0, 1)
    cache = KVCache(2, LENGTH)
    model(codes[:, :16].reshape(1, 32, -1), SequenceLayout.prompts(cache, [0, 1], [16, 16], 4, device="cpu"))
    cache.move(1, 0)
    assert cache.lengths == [16, 0]
    states = model(codes[1:, 16:20], SequenceLayout.next_blocks(cache, 1, 4, device="cpu")).transpose(0, 1)
    torch.testing.assert_close(states[0], full[1, 16:20], rtol=0, atol=1e-12)
    cache.release(0)
    model(codes[:1, :8], SequenceLayout.prompts(cache, [0], [8], 4, device="cpu"))
    states = model(codes[:1, 8:12], SequenceLayout.next_blocks(cache, 1, 4, device="cpu")).transpose(0, 1)
    torch.testing.assert_close(states[0], full[0, 8:12], rtol=0, atol=1e-12)


def test_a_full_cache_says_so():
    model, cache = build(), KVCache(ROWS, 8)
    model(random_codes(length=8).reshape(1, 16, -1), SequenceLayout.prompts(cache, [0, 1], [8, 8], 4, device="cpu"))
    with pytest.raises(ValueError, match="row 0 of a cache of 8 tokens cannot take 4 behind 8"):
        SequenceLayout.next_blocks(cache, ROWS, 4, device="cpu")
    with pytest.raises(ValueError, match="row 1 of the cache holds 8 tokens; prompts fill empty rows"):
        SequenceLayout.prompts(cache, [1], [8], 4, device="cpu")
    with pytest.raises(ValueError, match="cannot take 12 behind 0"):
        SequenceLayout.prompts(KVCache(1, 8), [0], [12], 4, device="cpu")


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute": "full"},
        {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute": "selective"},
        {"recompute": "selective", "recompute_modules": ("layernorm", "mlp")},
    ],
    ids=["full", "block", "core_attn", "layernorm+mlp"],
)
def test_recomputation_changes_nothing(recompute):
    layout = SequenceLayout.from_batch(DOCUMENTS, ROWS, LENGTH, 4)

    def gradients(**parallel) -> dict[str, torch.Tensor]:
        model = build(**parallel).train()
        model(random_codes(), layout).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, recomputed = gradients(), gradients(**recompute)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0, msg=name)


def test_initial_weights_are_a_function_of_seed_and_name():
    first, same, other = build(), build(), build()
    initialize_parameters(other, seed=4)
    for model in (first, same):
        initialize_parameters(model, seed=3)
    weights = dict(first.named_parameters())
    for name, parameter in same.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert not torch.equal(dict(other.named_parameters())[name], weights[name])
    assert not torch.equal(weights["decoder.layers.0.mlp.linear_fc1.weight"], weights[name])
    assert weights[name].std().item() == pytest.approx(0.02, rel=0.05)
    scaled = weights["decoder.layers.1.mlp.linear_fc2.weight"].std().item()
    assert scaled == pytest.approx(0.02 / 6**0.5, rel=0.05)


def test_initialisation_leaves_the_generator_alone_and_covers_everything():
    config = transformer_config(SHAPE, ParallelConfig())
    model = Backbone(config, block_spec(config, block_size=4), backbone=SHAPE, input_module=CodeMLP(NUM_BITS, 64, 48))
    assert torch.isnan(model.decoder.layers[0].mlp.linear_fc1.weight).all()
    before = torch.get_rng_state()
    initialize_parameters(model, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    model.extra = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="extra.weight"):
        initialize_parameters(model, seed=1)


def test_rms_norm_matches_torch():
    config = transformer_config(SHAPE, ParallelConfig(), precision="fp64")
    ours = RMSNorm(config, 24, eps=1e-6)
    theirs = nn.RMSNorm(24, eps=1e-6, dtype=torch.float64)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(24, dtype=torch.float64))
        theirs.weight.copy_(ours.weight)
    x = torch.randn(5, 3, 24, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    weights = torch.randn_like(x)
    (ours(x) * weights).sum().backward()
    (theirs(other) * weights).sum().backward()
    torch.testing.assert_close(ours(x), theirs(other), rtol=0, atol=1e-13)
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=1e-12)


def test_rotation_is_a_complex_product():
    positions = torch.randint(0, 500, (2, 6))
    x = torch.randn(6, 2, 3, 16, dtype=torch.float64, requires_grad=True)
    turned = apply_rotary(x, rotary_tables(positions, 16, 1e6, torch.float64))
    frequencies = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    factors = torch.exp(1j * positions.t()[..., None].double() * frequencies)[:, :, None]
    expected = torch.complex(x[..., :8], x[..., 8:]) * factors
    # The tables come from fp32 angles.
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1), rtol=0, atol=2e-4)
    assert torch.autograd.gradcheck(lambda y: apply_rotary(y, rotary_tables(positions, 16, 1e6, torch.float64)), x)


def test_code_embedding_reads_the_row_of_the_id():
    code = BinaryCode(258)
    module = CodeEmbedding(code, 12)
    module.reset_parameters()
    ids = torch.tensor([[0, 257, 31], [256, 1, 128]])
    assert torch.equal(module(code.encode(ids)), module.table.weight[ids])


def test_unavailable_features_are_refused_by_name():
    config = transformer_config(SHAPE, ParallelConfig())
    from megatron.core.models.gpt import gpt_layer_specs

    if not gpt_layer_specs.HAVE_TE:
        with pytest.raises(BitLMError, match="Transformer Engine is not installed"):
            block_spec(config, block_size=4, implementation="transformer_engine")


def test_ranks_of_a_context_do_not_decode():
    layout = SequenceLayout.prompts(KVCache(ROWS, LENGTH), [0], [16], 4, device="cpu")
    with pytest.raises(ValueError, match="one context-parallel rank"):
        layout.for_context_rank(0, 2)


def test_sequence_shards_must_be_whole_blocks():
    model = build()
    model.config.sequence_parallel, model.config.tensor_model_parallel_size = True, 16
    with pytest.raises(BitLMError, match="16 tensor-parallel ranks .* of 32 tokens .* a multiple of 64"):
        model(random_codes(), SequenceLayout.from_batch(None, ROWS, LENGTH, 4))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_block_mask_is_built_once_a_batch(monkeypatch):
    built = []
    make = BlockMask.from_kv_blocks
    monkeypatch.setattr(BlockMask, "from_kv_blocks", lambda *a, **k: built.append(make(*a, **k)) or built[-1])
    model = build(backend="flex")
    for batch in range(2):
        with torch.no_grad():
            model(random_codes(), SequenceLayout.from_batch(DOCUMENTS, ROWS, LENGTH, 4))
        assert len(built) == batch + 1, f"{SHAPE.num_layers} layers share one BlockMask"
