"""The training loop, optimizer, checkpoints and metrics."""

import megatron_bitlm.parallel.quick_import  # noqa: F401 (before the modules here import megatron-core)
