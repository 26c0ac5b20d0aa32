"""`bitlm checkpoint`: what lies in a run, whether it is whole, and what it says of itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.model.checkpoint import complete_checkpoints, find_checkpoint, read_meta
from megatron_bitlm.parallel.safe_loading import read_common_state, read_tensor_metadata
from megatron_bitlm.training.checkpoint import describe_damage


def run_checkpoint(arguments: list[str]) -> None:
    """Parse arguments and print.

    Raises:
        BitLMError: No checkpoint there, or (verify) a damaged one.
    """
    options = checkpoint_parser().parse_args(arguments)
    path = Path(options.path)
    if options.action == "list":
        _list(path)
    elif options.action == "verify":
        _verify(path)
    else:
        print(json.dumps(read_meta(find_checkpoint(path)), indent=1))


def checkpoint_parser() -> argparse.ArgumentParser:
    """Parser of `bitlm checkpoint`."""
    parser = argparse.ArgumentParser(prog="bitlm checkpoint", description="Look at checkpoints; nothing is changed.")
    parser.add_argument("action", choices=["list", "verify", "show"], help="steps and sizes; checksums; meta.json")
    parser.add_argument("path", help="run folder, its checkpoints folder, or one step folder")
    return parser


def _steps(path: Path) -> list[Path]:
    """The step folders meant by a path, oldest first."""
    if (path / "meta.json").is_file():
        return [path]
    found = complete_checkpoints(path) or complete_checkpoints(path / "checkpoints")
    return [step for _, step in found] or [find_checkpoint(path)]  # the latter says that there is none


def _list(path: Path) -> None:
    print(f"{'step':>10} {'gigabytes':>10} {'files':>6}  folder")
    for step in _steps(path):
        try:
            meta = read_meta(step)
        except BitLMError as error:
            print(f"{'damaged':>10} {'':>10} {'':>6}  {step}: {error}")
            continue
        size = sum(known["bytes"] for known in meta["files"].values())
        print(f"{meta['step']:>10} {size / 1e9:>10.3f} {len(meta['files']):>6}  {step}")


def _describe_danger(step: Path) -> str | None:
    """Why a checkpoint whose checksums match would still not be loaded."""
    try:
        read_tensor_metadata(step)
        read_common_state(step)
    except BitLMError as error:
        return str(error)
    return None


def _verify(path: Path) -> None:
    damaged = []
    for step in _steps(path):
        damage = describe_damage(step) or _describe_danger(step)
        print(f"{step}: {damage or 'whole, every checksum matches'}")
        if damage:
            damaged.append(step.name)
    if damaged:
        raise BitLMError(f"not to be used: {', '.join(damaged)}")
