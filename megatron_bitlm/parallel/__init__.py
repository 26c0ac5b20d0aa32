"""Process groups, devices and running megatron-core without CUDA."""
