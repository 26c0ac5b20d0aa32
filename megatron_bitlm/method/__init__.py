"""The method in plain torch: codes, noise path, attention, head, sampler, likelihood."""
