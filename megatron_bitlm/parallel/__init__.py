"""Process groups, devices and running megatron-core without CUDA."""

import warnings

# Importing megatron-core without Transformer Engine or Apex prints half a dozen warnings about fallbacks that
# are right here (our own norm, torch's AdamW), and its scripted functions warn about torch.jit once each.
for _message in (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"Transformer Engine and Apex are not installed",
    r"`torch\.jit\.script(_method)?` is deprecated",
    # Its optimizer looks for .grad on views of its buffers, and its buckets use collectives that torch has renamed.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    r"`torch\.distributed\.(reduce_scatter|all_gather)\w*` is deprecated",
    # Its checkpoints go through interfaces of torch that are on their way out.
    r"`load_state_dict` is deprecated and will be removed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    # Our core attention is plain torch, so recomputing it does save memory.
    r"If you are using transformer_engine as the transformer implementation, the core_attn",
):
    warnings.filterwarnings("ignore", message=_message)
del _message
