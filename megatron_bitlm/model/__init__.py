"""The parallel model: the method on megatron-core."""

import megatron_bitlm.parallel.quick_import  # noqa: F401 (before the modules here import megatron-core)
