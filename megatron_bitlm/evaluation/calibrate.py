"""`bitlm calibrate`: the entropy rate of a checkpoint on data, stored with it for the entropy grid and the noise gate.

rho(lambda) = e^lambda MSE(lambda) / 2 nats per unit of log-SNR (arXiv 2605.07013), MSE the denoiser's squared error of
a block at log-SNR lambda: what the likelihood bound measures on its way.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from megatron_bitlm.data.packing import DataConfig
from megatron_bitlm.errors import BitLMError
from megatron_bitlm.evaluation.likelihood import checkpoint_likelihood
from megatron_bitlm.inference.load import LoadedModel, loaded_model
from megatron_bitlm.inference.profile import check_free, read_profile, write_profile
from megatron_bitlm.method.path import entropy_profile
from megatron_bitlm.method.sampler import time_grid
from megatron_bitlm.model.checkpoint import find_checkpoint
from megatron_bitlm.training.likelihood import BoundReport

_SHOWN_STEPS = 15


def run_calibrate(arguments: list[str]) -> None:
    """Parse arguments, measure, store, and print where and what.

    Raises:
        BitLMError: No BitLM, data that does not fit, or a profile that exists and is not to be replaced.
    """
    options = calibrate_parser().parse_args(arguments)
    path = find_checkpoint(options.checkpoint)
    check_free(path, replace=options.replace)
    with loaded_model(path) as loaded:
        settings = loaded.settings
        data = DataConfig(
            paths=options.data or settings["data.paths"],
            sequence_length=settings["data.sequence_length"],
            split=options.split or settings["data.split"],
            isolate_documents=settings["data.isolate_documents"],
        )
        report = measure(loaded, data, options.num_samples, options.micro_batch_size)
    edges, rates = entropy_rates(report, loaded.config.block_size * loaded.code.num_bits)
    measured_on = {"data": list(data.paths), "split": data.split, "num_blocks": report.num_blocks}
    file = write_profile(path, edges, rates, measured_on=measured_on, replace=options.replace)
    times = time_grid("entropy", _SHOWN_STEPS, read_profile(path)).tolist()
    if options.json:
        print(json.dumps({"file": str(file), "num_blocks": report.num_blocks, "times": times}))
        return
    print(f"{file}: {report.num_blocks} blocks of {', '.join(data.paths)}")
    print(f"entropy grid of {_SHOWN_STEPS} steps: {' '.join(f'{time:.3f}' for time in times)}")


def measure(loaded: LoadedModel, data: DataConfig, num_samples: int | None, micro_batch_size: int) -> BoundReport:
    """The likelihood bound of validation samples, with the error profile.

    Raises:
        BitLMError: A softmax model, or data that does not fit.
    """
    if loaded.config.output == "softmax":
        raise BitLMError("the checkpoint holds a softmax model, which denoises nothing; calibrate a BitLM")
    report = checkpoint_likelihood(loaded, data, num_samples=num_samples, micro_batch_size=micro_batch_size)
    assert isinstance(report, BoundReport)
    return report


def entropy_rates(report: BoundReport, bits_per_block: int) -> tuple[np.ndarray, np.ndarray]:
    """(edges [J + 1], entropy rate of a block [J]); bins that no draw fell into get their neighbours' error."""
    centres = 0.5 * (report.edges[1:] + report.edges[:-1])
    seen = ~np.isnan(report.mse)
    mse = np.interp(centres, centres[seen], report.mse[seen])
    return report.edges, entropy_profile(centres, bits_per_block * mse)


def calibrate_parser() -> argparse.ArgumentParser:
    """Parser of `bitlm calibrate`."""
    parser = argparse.ArgumentParser(
        prog="bitlm calibrate",
        description="Measure the entropy rate that the entropy grid and the noise gate follow; kept beside meta.json.",
    )
    parser.add_argument("checkpoint", help="run folder, or one of its checkpoints/step_* folders")
    parser.add_argument("--data", nargs="+", metavar="PREFIX", help="datasets (default: the run's)")
    parser.add_argument("--split", help="shares of documents, as data.split (default: the run's)")
    parser.add_argument("--num-samples", type=int, help="validation samples to measure on (default: all)")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="samples of a pass (default %(default)s)")
    parser.add_argument("--replace", action="store_true", help="take the place of a stored profile")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
