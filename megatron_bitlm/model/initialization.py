"""Initial weights that do not depend on the parallel layout.

Every parameter is drawn from a generator keyed by the run's seed and the parameter's global name, at its full
size and on the CPU; a tensor-parallel rank keeps its shard of it. So one process and any layout start from
the same model.
"""

import hashlib
from collections.abc import Iterator

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

_EMBEDDING, _OUTPUT_LAYER = "input_module.word_embeddings.weight", "output_layer.weight"
_VOCABULARY_TABLES = (_EMBEDDING, _OUTPUT_LAYER)


def _key(seed: int, name: str) -> int:
    """A 63-bit generator seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def global_names(model: nn.Module) -> dict[str, str]:
    """Maps this rank's names of transformer layers ("decoder.layers.0") to those of the whole model."""
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, TransformerLayer):
            parent = name.rpartition(".")[0]
            names[name] = f"{parent}.{module.layer_number - 1}"
    return names


def globalize(name: str, layer_names: dict[str, str]) -> str:
    """A parameter's name in the whole model, given `global_names` of this rank's part."""
    for local, whole in layer_names.items():
        if name.startswith(f"{local}."):
            return whole + name.removeprefix(local)
    return name


def _keyed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if getattr(module, "keyed_init", False):
            yield name, module


def _reset_keyed(module: nn.Module, key: int) -> None:
    """Runs `module.reset_parameters()` on the CPU from its own key; the process's generator is left alone.

    The values go to the CPU and back rather than the module: a layer of Transformer Engine cannot be copied there.
    """
    devices = [parameter.device for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.data = parameter.data.cpu()
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key)
    try:
        module.reset_parameters()
    finally:
        torch.set_rng_state(state)
    for parameter, device in zip(module.parameters(), devices, strict=True):
        parameter.data = parameter.data.to(device)


def _is_norm_weight(name: str) -> bool:
    # Transformer Engine keeps a fused norm's weight inside the linear that follows it.
    return name.endswith("layer_norm_weight") or (name.endswith(".weight") and "layernorm" in name.split(".")[-2])


def _tensor_parallel_shard(full: Tensor, name: str, dim: int, rank: int, size: int) -> Tensor:
    """This rank's part of a whole weight, as megatron-core's linears and checkpoints cut it.

    The first linear of SwiGLU holds gate above up, and a rank holds its part of each. The fused
    query/key/value linear is ordered by query group, so its parts are contiguous.
    """
    pieces = full.chunk(2, dim) if name.endswith("mlp.linear_fc1.weight") else (full,)
    return torch.cat([piece.chunk(size, dim)[rank] for piece in pieces], dim)


def initialize_module(module: nn.Module, name: str, seed: int) -> None:
    """Draws a module that brings its own rule (`keyed_init`) as `initialize_parameters` does for the model's `name`."""
    _reset_keyed(module, _key(seed, name))


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Fills all parameters of a pipeline stage (a model chunk); the same for every parallel layout.

    Modules with `keyed_init = True` are drawn by their own `reset_parameters()`. In the transformer, norms
    are 1, matrices N(0, init_std^2), and those that write to the residual stream (attention output, second
    SwiGLU matrix) get init_std / sqrt(2 L), megatron-core's default. The softmax's tables are N(0, init_std^2).

    Args:
        model: unwrapped; with `config`, and process groups in `pg_collection`.
        seed: the run's.

    Raises:
        TypeError: for a parameter that no rule covers.
    """
    layer_names = global_names(model)
    done: set[str] = set()
    for name, module in _keyed_modules(model):
        _reset_keyed(module, _key(seed, name))
        done |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
    for name, parameter in model.named_parameters():
        if name not in done:
            # The last stage's copy of a tied table starts as the first stage's does.
            tied = name == _OUTPUT_LAYER and model.share_embeddings_and_output_weights
            _draw(parameter, _EMBEDDING if tied else globalize(name, layer_names), model, seed)


def _draw_table(parameter: Tensor, model: nn.Module, std: float, key: int) -> None:
    """A table with a row for each id, sharded by rows; the rows that pad the vocabulary are zero."""
    group = model.pg_collection.tp
    full = torch.zeros(parameter.shape[0] * group.size(), parameter.shape[1])
    full[: model.code.vocab_size].normal_(std=std, generator=torch.Generator().manual_seed(key))
    parameter.copy_(full.chunk(group.size())[group.rank()])


def _draw(parameter: Tensor, name: str, model: nn.Module, seed: int) -> None:
    if _is_norm_weight(name):
        parameter.fill_(1.0)
        return
    config: TransformerConfig = model.config
    std = config.init_method_std
    if name.endswith(_VOCABULARY_TABLES):
        _draw_table(parameter, model, std, _key(seed, name))
        return
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= (2 * config.num_layers) ** 0.5
    elif not name.endswith(("linear_qkv.weight", "linear_fc1.weight")):
        raise TypeError(f"no rule says how to initialise {name}")
    group = model.pg_collection.tp
    dim = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    shape = list(parameter.shape)
    shape[dim] *= group.size()
    generator = torch.Generator().manual_seed(_key(seed, name))
    full = torch.empty(shape, dtype=torch.float32).normal_(std=std, generator=generator)
    parameter.copy_(_tensor_parallel_shard(full, name, dim, group.rank(), group.size()))
