"""`bitlm quickstart`: documents to dataset to trained model to likelihood, text and pictures, on this machine.

Every stage calls what its own command calls and prints that command; a stage that is already done is kept, so an
interrupted quickstart goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_bitlm import __version__
from megatron_bitlm.config import load_run
from megatron_bitlm.data.card import dataset_path
from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from megatron_bitlm.errors import STOP_EXIT_STATUS, BitLMError
from megatron_bitlm.evaluation.denoising import plot_denoising
from megatron_bitlm.evaluation.likelihood import (
    checkpoint_likelihood,
    describe,
    likelihood_figures,
    split_baselines,
)
from megatron_bitlm.evaluation.plots import plot_loss, read_metrics
from megatron_bitlm.inference.generate import Generator
from megatron_bitlm.inference.load import LoadedModel, loaded_model
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.trainer import pretrain

PROMPTS = ("Return the number of ", "This function ", "Raises an error if the ")
_DEFAULT_CONFIG = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
_MAX_NEW_TOKENS = 120


@dataclass
class Report:
    """What a quickstart leaves in report.json; seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to `stage`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - began, 1)


def run_quickstart(arguments: list[str]) -> None:
    """Do all stages in the folder the arguments name."""
    options = _parser().parse_args(arguments)
    if not Path(options.config).is_file():
        raise BitLMError(f"there is no configuration {options.config}; give --config examples/quickstart.yaml")
    folder = Path(options.directory)
    overrides = ["--run.directory", str(folder), *options.overrides]
    config = load_run(options.config, overrides)
    label = Path(options.tokenizer).name.replace(":", "-")
    prefix = Path(options.data) / f"installed-docs-{label}-m{config.model.block_size}"
    overrides += ["--data.paths", json.dumps([str(prefix)])]
    config = load_run(options.config, overrides)
    report = Report()
    with report.timed("preprocess"):
        _make_dataset(prefix, config, options.tokenizer)
    with report.timed("pretrain"):
        _announce("pretrain", options.config, *overrides)
        outcome = pretrain(config)
    if outcome.stopped:
        sys.exit(STOP_EXIT_STATUS)
    sampler = SamplerConfig(
        num_steps=options.steps, guidance=options.guidance, guidance_mode=options.guidance_mode, grid=options.grid
    )
    with loaded_model(config.run.directory) as loaded:
        with report.timed("likelihood"):
            figures = _likelihood(loaded, config)
        with report.timed("generate"):
            texts = _continuations(loaded, config, sampler)
            _draw_denoising(loaded, sampler, folder / "denoising.png")
    _draw_loss(config, figures, folder / "loss.png")
    _write_report(folder / "report.json", config, sampler, report, figures, texts)
    print(f"\nwrote {folder}/loss.png, {folder}/denoising.png and {folder}/report.json")


def _make_dataset(prefix: Path, config: RunConfig, tokenizer: str) -> None:
    flags = ["--corpus", "installed-docs", "--tokenizer", tokenizer, "--block_size", str(config.model.block_size)]
    if dataset_path(prefix, ".json").exists():
        print(f"dataset {prefix} is there already")
        return
    _announce("preprocess", *flags, "--output", str(prefix))
    preprocess(
        PreprocessConfig(
            corpus="installed-docs", tokenizer=tokenizer, output=str(prefix), block_size=config.model.block_size
        )
    )


def _likelihood(loaded: LoadedModel, config: RunConfig) -> dict[str, Any]:
    micro_batch_size = config.training.micro_batch_size
    _announce(
        *("evaluate", "likelihood", "--checkpoint", config.run.directory, "--baselines"),
        *("--micro-batch-size", str(micro_batch_size)),
    )
    report = checkpoint_likelihood(loaded, config.data, num_samples=None, micro_batch_size=micro_batch_size)
    figures = likelihood_figures(report)
    baselines = split_baselines(config.data, loaded.tokenizer.token_num_bytes())
    figures |= {name: asdict(result) for name, result in baselines.items()}
    print(describe(figures))
    return figures


def _continuations(loaded: LoadedModel, config: RunConfig, sampler: SamplerConfig) -> list[dict[str, Any]]:
    _announce(
        *("generate", "--checkpoint", config.run.directory, "--steps", str(sampler.num_steps)),
        *("--guidance", str(sampler.guidance), "--guidance-mode", sampler.guidance_mode, "--grid", sampler.grid),
        *("--max-new-tokens", str(_MAX_NEW_TOKENS), "--prompt", *PROMPTS),
    )
    generator = Generator(loaded.model, loaded.code, bos_id=loaded.bos_id, eos_id=loaded.eos_id, sampler=sampler)
    prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
    results = generator.generate(prompts, max_new_tokens=_MAX_NEW_TOKENS)
    texts = []
    for prompt, result in zip(PROMPTS, results, strict=True):
        text = loaded.tokenizer.decode(result.ids)
        print(f"---\n{prompt}{text}")
        texts.append({"prompt": prompt, "text": text, **asdict(result)})
    return texts


def _draw_denoising(loaded: LoadedModel, sampler: SamplerConfig, path: Path) -> None:
    """Film the first whole block after a prompt."""
    frames: list[tuple[float, torch.Tensor]] = []

    def film(block: int, moment: float, state: torch.Tensor) -> None:
        if block == 1:
            frames.append((moment, state[0].cpu()))

    generator = Generator(loaded.model, loaded.code, bos_id=loaded.bos_id, eos_id=loaded.eos_id, sampler=sampler)
    prompt = loaded.tokenizer.encode(PROMPTS[0])
    generator.generate([prompt], max_new_tokens=2 * loaded.config.block_size, observe=film)
    if not frames:
        raise BitLMError("the model ended the text before its second block, so there is no denoising to draw")
    tokens = [[_token_text(loaded, int(i)) for i in loaded.code.decode(state)] for _, state in frames]
    states = torch.stack([state for _, state in frames]).numpy()
    plot_denoising(states, [moment for moment, _ in frames], tokens, path)


def _token_text(loaded: LoadedModel, token: int) -> str:
    names = {loaded.bos_id: "<BOS>", loaded.eos_id: "<EOS>"}
    return names.get(token) or loaded.tokenizer.decode([token])


def _draw_loss(config: RunConfig, figures: dict[str, Any], path: Path) -> None:
    records = read_metrics(Path(config.run.directory) / "metrics.jsonl")
    lines = {name: figures[name]["bits_per_byte"] for name in ("unigram", "bigram")}
    plot_loss(records, path, reference_lines=lines)


def _write_report(
    path: Path,
    config: RunConfig,
    sampler: SamplerConfig,
    report: Report,
    figures: dict[str, Any],
    texts: list[dict[str, Any]],
) -> None:
    last = read_metrics(Path(config.run.directory) / "metrics.jsonl")[-1]
    content = {
        "likelihood": figures,
        "continuations": texts,
        "training": {"steps": last["step"], "tokens": last["tokens"], "loss": last["loss"]},
        "seconds": report.seconds,
        "sampler": asdict(sampler),
        "settings": asdict(config),
        "seeds": {"run": config.run.seed, "continuations": list(range(len(PROMPTS)))},
        "versions": {
            "megatron-bitlm": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "megatron-core", "numpy")},
        },
        "machine": {"processor": platform.machine(), "num_threads": torch.get_num_threads()},
    }
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def _announce(*words: str) -> None:
    print(f"\n$ bitlm {shlex.join(words)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitlm quickstart",
        description="Dataset, training, likelihood, text and pictures from this machine's documentation.",
        epilog="Further --section.field value flags change the training configuration.",
    )
    defaults = SamplerConfig()
    parser.add_argument("--directory", default="runs/quickstart", help="the run's folder (default %(default)s)")
    parser.add_argument("--data", default="data", help="folder of the dataset (default %(default)s)")
    parser.add_argument("--config", default=str(_DEFAULT_CONFIG), help="training configuration")
    parser.add_argument("--tokenizer", default="bytes", help="as `bitlm preprocess --tokenizer` (default %(default)s)")
    parser.add_argument("--steps", type=int, default=defaults.num_steps, help="denoising steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=defaults.guidance, help="guidance (default %(default)s)")
    parser.add_argument("--guidance-mode", choices=["mean", "clipped", "logit"], default=defaults.guidance_mode)
    parser.add_argument("--grid", choices=["uniform", "logsnr", "entropy"], default=defaults.grid)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run_quickstart(sys.argv[1:])
