import pytest
import torch

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.presets import BackboneConfig, backbone_preset


@pytest.mark.parametrize(("name", "millions"), [("0.6B", 440), ("1.7B", 1409), ("4B", 3633), ("8B", 6946)])
def test_presets_have_qwen3s_sizes(name, millions):
    assert round(backbone_preset(name).num_matrix_parameters / 1e6) == millions


def test_parameter_count_is_that_of_transformers_qwen3():
    from transformers import Qwen3Config, Qwen3Model

    shape = backbone_preset("0.6B")
    with torch.device("meta"):
        model = Qwen3Model(
            Qwen3Config(
                vocab_size=1,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.ffn_hidden_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_attention_heads,
                num_key_value_heads=shape.num_query_groups,
                head_dim=shape.head_dim,
            )
        )
    without_table = sum(p.numel() for p in model.parameters()) - shape.hidden_size
    assert shape.num_parameters == without_table


def test_an_unknown_name_lists_the_known():
    with pytest.raises(BitLMError, match=r"'7B'; choose one of tiny, 0.6B, 1.7B, 4B, 8B"):
        backbone_preset("7B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_query_groups": 3}, "num_query_groups is 3"),
        ({"head_dim": 15}, "head_dim is 15"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 4}
    with pytest.raises(BitLMError, match=message):
        BackboneConfig(**{**sizes, "num_query_groups": 2, "head_dim": 16, **change}).validate()
