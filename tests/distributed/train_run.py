"""What each rank runs to compare layouts: whole runs of `bitlm pretrain`, one after the other."""

import os

import torch

from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.trainer import Outcome, pretrain


def run_all(ports: list[int], configs: list[RunConfig]) -> list[Outcome]:
    """Train every configuration on these ranks; each makes its process groups anew."""
    torch.set_num_threads(1)
    outcomes = []
    for port, config in zip(ports, configs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        outcomes.append(pretrain(config))
    return outcomes
