"""`bitlm export` and `bitlm import`: between training checkpoints and Hugging Face folders."""

from __future__ import annotations

import argparse

from megatron_bitlm.hf.export import export
from megatron_bitlm.hf.restore import import_folder


def run_export(arguments: list[str]) -> None:
    """Parse arguments, write the folder and say where it is.

    Raises:
        BitLMError: As `export`.
    """
    parser = argparse.ArgumentParser(
        prog="bitlm export", description="A checkpoint of any layout as a folder that transformers loads."
    )
    parser.add_argument("checkpoint", help="run folder, its checkpoints folder or one step folder")
    parser.add_argument("output", help="folder to make; an existing one is left as it is")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights (default: as in the checkpoint)")
    parser.add_argument("--max_shard_bytes", type=int, default=5 * 10**9, help="size of one weights file (default 5e9)")
    options = parser.parse_args(arguments)
    folder = export(options.checkpoint, options.output, dtype=options.dtype, max_shard_bytes=options.max_shard_bytes)
    print(f"exported to {folder}")


def run_import(arguments: list[str]) -> None:
    """Parse arguments, write the checkpoint and say where it is.

    Raises:
        BitLMError: As `import_folder`.
    """
    parser = argparse.ArgumentParser(
        prog="bitlm import",
        description="A training checkpoint from a folder of `bitlm export`, or from a Qwen3 model as a run's start.",
    )
    parser.add_argument("folder", help="Hugging Face folder; no code in it is run")
    parser.add_argument("output", help="folder to make; name it as run.initial_checkpoint to train from it")
    parser.add_argument("--config", metavar="RUN.yaml", help="the run that a Qwen3 model is to start")
    options = parser.parse_args(arguments)
    config = None
    if options.config is not None:
        from megatron_bitlm.config import load_run

        config = load_run(options.config)
    print(f"imported to {import_folder(options.folder, options.output, config)}")
