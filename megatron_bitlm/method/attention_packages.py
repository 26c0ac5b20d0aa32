"""Causal flash attention from packages that need not be installed, as attention_causal.py describes it.

- ``flash_attn2``: the package flash-attn 2;
- ``flash_attn3``: FlashAttention 3 (module ``flash_attn_interface``), for Hopper;
- ``transformer_engine``: cuDNN's kernel, through Transformer Engine.

They are imported when first asked for. Their functions that give and take a log-sum-exp are not public, so before
anything is called its arguments are compared with those that will be given.

Legend: B batch, S sequence, T = B*S tokens, H query heads, P key heads, D head dim.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_bitlm.method.attention_causal import CausalKernel, heads_of, rows_of, shaped_like
from megatron_bitlm.method.attention_layout import BlockCausalLayout

# ------------------------------------------------------------------------------------- flash-attn 2 and 3


def _flash_attn2_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    arguments = {**_packed(layout, q), "dropout_p": 0.0, "softmax_scale": scale, "causal": True}
    forward = _interface("flash_attn2", 0)
    out, lse, _, rng_state = forward(*(x.flatten(0, 1) for x in (q, k, v)), **arguments)
    return out.contiguous().view(q.shape), rows_of(lse, q), (rng_state,)


def _flash_attn2_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Sequence[Tensor],
    layout: BlockCausalLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    _interface("flash_attn2", 1)(
        *(x.flatten(0, 1) for x in (grad_out, q, k, v, out)),
        heads_of(lse),
        **_gradient_buffers(grads),
        **_packed(layout, q),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rng_state=state[0],
    )
    return grads


def _flash_attn3_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    arguments = {**_packed(layout, q), "softmax_scale": scale, "causal": True}
    out, lse, *_ = _interface("flash_attn3", 0)(*(x.flatten(0, 1) for x in (q, k, v)), **arguments)
    return out.contiguous().view(q.shape), rows_of(lse, q), ()


def _flash_attn3_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Sequence[Tensor],
    layout: BlockCausalLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    _interface("flash_attn3", 1)(
        *(x.flatten(0, 1) for x in (grad_out, q, k, v, out)),
        heads_of(lse),
        **_gradient_buffers(grads),
        **_packed(layout, q),
        softmax_scale=scale,
        is_causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads


def _packed(layout: BlockCausalLayout, q: Tensor) -> dict[str, Tensor | int]:
    offsets, longest = layout.offsets_on(q.device), layout.max_seqlen
    return {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _gradient_buffers(grads: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: grad.flatten(0, 1) for name, grad in zip(("dq", "dk", "dv"), grads, strict=True)}


# ------------------------------------------------------------------------------------- Transformer Engine


def _transformer_engine_arguments(
    function: Callable[..., Any], q: Tensor, layout: BlockCausalLayout, scale: float
) -> dict[str, Any]:
    offsets = layout.offsets_on(q.device)
    arguments: dict[str, Any] = {
        # Any bound will do. The true one changes from batch to batch, and cuDNN would plan its kernel anew for each.
        "max_seqlen_q": layout.seq_len,
        "max_seqlen_kv": layout.seq_len,
        "cu_seqlens_q": offsets,
        "cu_seqlens_kv": offsets,
        # Where each document starts in memory: the same, but a missing one is read all the same.
        "cu_seqlens_q_padded": offsets,
        "cu_seqlens_kv_padded": offsets,
        "fake_dtype": q.dtype,
        "fused_attention_backend": _module("transformer_engine").FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": scale,
        "dropout": 0.0,
        "qkv_layout": "thd_thd_thd",
        "attn_mask_type": "padding_causal",
        "window_size": (-1, 0),
    }
    # Newer versions ask for the layouts of the output and the gradients apart.
    formats = {"o_format": "thd", "do_format": "thd", "dqkv_layout": "thd_thd_thd"}
    taken = inspect.signature(function).parameters
    return {**arguments, **{name: value for name, value in formats.items() if name in taken}}


def _transformer_engine_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockCausalLayout, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    forward = _interface("transformer_engine", 0)
    tokens = {name: x.flatten(0, 1) for name, x in (("q", q), ("k", k), ("v", v))}
    arguments = _transformer_engine_arguments(forward, q, layout, scale)
    out, (stats, rng_state, *_), *_ = forward(is_training=True, **tokens, **arguments)
    # One lse a token, [T, H, 1]; before cuDNN 9.6 it is padded to [documents, H, S, 1].
    return out.contiguous().view(q.shape), rows_of(stats.squeeze(-1).transpose(0, 1), q), (rng_state,)


def _transformer_engine_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Sequence[Tensor],
    layout: BlockCausalLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _interface("transformer_engine", 1)
    names = zip(("q", "k", "v", "o", "d_o"), (q, k, v, out, grad_out), strict=True)
    grads = backward(
        **{name: x.flatten(0, 1) for name, x in names},
        aux_ctx_tensors=[lse.flatten(0, 1).contiguous().unsqueeze(-1), *state],
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_transformer_engine_arguments(backward, q, layout, scale),
    )
    return shaped_like(grads[:3], (q, k, v))


# --------------------------------------------------------------------------------------- what is installed


@dataclass(frozen=True)
class _Package:
    """Where an optional kernel lives: a module, its two functions, and the arguments that are given to them."""

    module: str
    functions: tuple[str, str]
    arguments: tuple[frozenset[str], frozenset[str]]


_PACKED_NAMES = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}
_GRADIENT_NAMES = {"dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"}
_FA2_OPTIONS = {"dropout_p", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes", "rng_state"}
_TE_NAMES = {
    *("max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q", "cu_seqlens_kv", "q", "k", "v", "fake_dtype"),
    *("cu_seqlens_q_padded", "cu_seqlens_kv_padded", "fused_attention_backend", "attn_scale", "dropout"),
    *("qkv_layout", "attn_mask_type", "window_size"),
}
_PACKAGES = {
    "flash_attn2": _Package(
        "flash_attn.flash_attn_interface",
        ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
        (
            frozenset({"q", "k", "v", "dropout_p", "causal", *_PACKED_NAMES}),
            frozenset({*_GRADIENT_NAMES, *_PACKED_NAMES, *_FA2_OPTIONS}),
        ),
    ),
    "flash_attn3": _Package(
        "flash_attn_interface",
        ("_flash_attn_forward", "_flash_attn_backward"),
        (
            frozenset({"q", "k", "v", "causal", *_PACKED_NAMES}),
            frozenset({*_GRADIENT_NAMES, *_PACKED_NAMES, "is_causal"}),
        ),
    ),
    "transformer_engine": _Package(
        "transformer_engine.pytorch.cpp_extensions.fused_attn",
        ("fused_attn_fwd", "fused_attn_bwd"),
        (
            frozenset({*_TE_NAMES, "is_training"}),
            frozenset({*_TE_NAMES, "o", "d_o", "aux_ctx_tensors", "deterministic"}),
        ),
    ),
}


def package_obstacle(name: str) -> str | None:
    """Why the optional kernel ``name`` cannot be used here, as a clause; None when it can."""
    package = _PACKAGES[name]
    try:
        module = _module(name)
    except ImportError as error:
        return f"{package.module} cannot be imported ({error})"
    for function, given in zip(package.functions, package.arguments, strict=True):
        found = getattr(module, function, None)
        if found is None:
            return f"{package.module} has no {function}, so its version is not one this package knows"
        taken, needed = _parameters(found)
        if not (needed <= given <= taken):
            wrong = ", ".join(sorted((needed - given) | (given - taken)))
            return f"{package.module}.{function} has another interface than this package knows (arguments {wrong})"
    return None


def _module(name: str) -> ModuleType:
    return importlib.import_module(_PACKAGES[name].module)


def _interface(name: str, index: int) -> Callable[..., Any]:
    """The forward (0) or backward (1) function of an optional kernel."""
    return getattr(_module(name), _PACKAGES[name].functions[index])


def _parameters(function: Callable[..., Any]) -> tuple[set[str], set[str]]:
    """Names of all arguments of a function or custom operator, and of those without a default."""
    overload = getattr(function, "_opoverload", None)
    if overload is not None:
        found = overload._schema.arguments
        return {x.name for x in found}, {x.name for x in found if not x.has_default_value()}
    parameters = inspect.signature(function).parameters
    return set(parameters), {name for name, x in parameters.items() if x.default is inspect.Parameter.empty}


PACKAGE_KERNELS = {
    "flash_attn2": CausalKernel(_flash_attn2_forward, _flash_attn2_backward),
    "flash_attn3": CausalKernel(_flash_attn3_forward, _flash_attn3_backward),
    "transformer_engine": CausalKernel(_transformer_engine_forward, _transformer_engine_backward),
}
