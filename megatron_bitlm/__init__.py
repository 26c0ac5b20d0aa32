"""megatron-bitlm: pretraining of language models whose softmax is replaced by a bitwise diffusion head."""

__version__ = "0.1.0"
