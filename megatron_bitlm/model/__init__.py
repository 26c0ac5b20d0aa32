"""The parallel model: the method on megatron-core."""
