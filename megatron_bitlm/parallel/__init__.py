"""Process groups, devices and running megatron-core without CUDA."""

import warnings

# Importing megatron-core without Transformer Engine or Apex prints half a dozen warnings about fallbacks that
# are right here (our own norm, torch's AdamW), and its scripted functions warn about torch.jit once each.
for _message in (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"Transformer Engine and Apex are not installed",
    r"`torch\.jit\.script(_method)?` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
del _message
