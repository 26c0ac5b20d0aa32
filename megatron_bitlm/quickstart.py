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
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_bitlm import __version__
from megatron_bitlm.config import load_run
from megatron_bitlm.data.card import dataset_path
from megatron_bitlm.data.files import write_atomic
from megatron_bitlm.data.preprocess import PreprocessConfig, preprocess
from megatron_bitlm.errors import STOP_EXIT_STATUS, BitLMError
from megatron_bitlm.evaluation.comparison import TrainedModel, describe_comparison, plot_comparison
from megatron_bitlm.evaluation.denoising import plot_denoising
from megatron_bitlm.evaluation.likelihood import (
    checkpoint_likelihood,
    describe,
    likelihood_figures,
    split_baselines,
)
from megatron_bitlm.evaluation.plots import plot_loss, read_metrics
from megatron_bitlm.inference.command import continue_texts
from megatron_bitlm.inference.generate import Generator
from megatron_bitlm.inference.load import LoadedModel, loaded_model
from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.method.token_sampling import TokenSamplerConfig
from megatron_bitlm.training.config import RunConfig
from megatron_bitlm.training.trainer import pretrain

PROMPTS = ("Return the number of ", "This function ", "Raises an error if the ")
_DEFAULT_CONFIG = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
_MAX_NEW_TOKENS = 120
_BASELINES = ("unigram", "bigram")
_NUM_TIMED_STEPS, _NUM_VALIDATIONS = 30, 10


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
    token_sampler = TokenSamplerConfig(options.temperature)
    try:
        token_sampler.validate()
    except ValueError as error:
        raise BitLMError(f"--{error}") from error
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
        measured = _measure(loaded, config, sampler, report, "")
        _draw_denoising(loaded, sampler, folder / "denoising.png")
    pictures, content = ["loss.png", "denoising.png"], measured.content()
    if options.compare:
        other = _compare(measured, options.config, overrides, report, token_sampler)
        content["comparison"] = {model.name: model.summary() for model in (measured.model, other.model)}
        content["softmax"] = other.content()
        measured.reference_lines["softmax"] = other.model.likelihood["bits_per_byte"]
        pictures.append("comparison.png")
        baselines = {name: measured.reference_lines[name] for name in _BASELINES}
        plot_comparison((measured.model, other.model), folder / pictures[-1], baselines)
        print(f"\n{describe_comparison((measured.model, other.model))}")
    plot_loss(measured.model.records, folder / "loss.png", reference_lines=measured.reference_lines)
    _write_report(folder / "report.json", config, sampler, report, content)
    print(f"\nwrote {', '.join(f'{folder}/{name}' for name in pictures)} and {folder}/report.json")


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


@dataclass
class Measured:
    """A trained model with its figures, its continuations and the baselines' bits per byte."""

    model: TrainedModel
    figures: dict[str, Any]
    texts: list[dict[str, Any]]
    reference_lines: dict[str, float]

    def content(self) -> dict[str, Any]:
        """Its part of report.json."""
        last = self.model.records[-1]
        return {
            "likelihood": self.figures,
            "continuations": self.texts,
            "training": {"steps": last["step"], "tokens": last["tokens"], "loss": last["loss"]},
        }


def _measure(
    loaded: LoadedModel, config: RunConfig, sampler: SamplerConfig | TokenSamplerConfig, report: Report, suffix: str
) -> Measured:
    """Likelihood, baselines and continuations; `suffix` tells the stages of a second model in the report."""
    with report.timed(f"likelihood{suffix}"):
        figures = _likelihood(loaded, config)
    began = time.perf_counter()
    with report.timed(f"generate{suffix}"):
        texts = _continuations(loaded, config, sampler)
    seconds = time.perf_counter() - began
    is_exact = "exact" in figures
    model = TrainedModel(
        name="softmax" if is_exact else "BitLM",
        is_exact=is_exact,
        likelihood=figures["exact" if is_exact else "bound"],
        records=read_metrics(Path(config.run.directory) / "metrics.jsonl"),
        num_parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        generated_tokens_per_second=sum(len(text["ids"]) + text["finished"] for text in texts) / seconds,
    )
    return Measured(model, figures, texts, {name: figures[name]["bits_per_byte"] for name in _BASELINES})


def _compare(first: Measured, path: str, overrides: list[str], report: Report, sampler: TokenSamplerConfig) -> Measured:
    """Train the softmax baseline for as long as the BitLM was trained, and measure it on the same tokens."""
    folder = Path(load_run(path, overrides).run.directory) / "softmax"
    overrides = [*overrides, "--model.output", "softmax", "--run.directory", str(folder)]
    if (folder / "config.yaml").exists():
        num_steps = load_run(str(folder / "config.yaml")).training.num_steps
    else:
        num_steps = _steps_of_seconds(first.model.training_seconds, path, overrides)
    overrides += ["--training.num_steps", str(num_steps)]
    overrides += ["--validation.interval_steps", str(max(1, num_steps // _NUM_VALIDATIONS))]
    config = load_run(path, overrides)
    with report.timed("pretrain softmax"):
        _announce("pretrain", path, *overrides)
        outcome = pretrain(config)
    if outcome.stopped:
        sys.exit(STOP_EXIT_STATUS)
    with loaded_model(config.run.directory) as loaded:
        return _measure(loaded, config, sampler, report, " softmax")


def _steps_of_seconds(seconds: float, path: str, overrides: list[str]) -> int:
    """How many steps the run of these settings does in so many seconds, by the median of its first steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "timing"
        options = ["--run.directory", str(run), "--training.stop_after_steps", str(_NUM_TIMED_STEPS)]
        options += ["--validation.interval_steps", "0", "--checkpoint.interval_steps", "0"]
        config = load_run(path, [*overrides, *options, "--training.progress", "off"])
        pretrain(config)
        step_seconds = median(record["seconds"] for record in read_metrics(run / "metrics.jsonl"))
    return max(round(seconds / step_seconds), config.optimizer.warmup_steps + 1)


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


def _continuations(
    loaded: LoadedModel, config: RunConfig, sampler: SamplerConfig | TokenSamplerConfig
) -> list[dict[str, Any]]:
    if isinstance(sampler, TokenSamplerConfig):
        options = ["--temperature", str(sampler.temperature)]
    else:
        options = ["--steps", str(sampler.num_steps), "--guidance", str(sampler.guidance)]
        options += ["--guidance-mode", sampler.guidance_mode, "--grid", sampler.grid]
    _announce(
        *("generate", "--checkpoint", config.run.directory, *options),
        *("--max-new-tokens", str(_MAX_NEW_TOKENS), "--prompt", *PROMPTS),
    )
    results = continue_texts(loaded, list(PROMPTS), sampler=sampler, max_new_tokens=_MAX_NEW_TOKENS, seed=0)
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

    generator = Generator(
        loaded.model,
        loaded.code,
        bos_id=loaded.bos_id,
        eos_id=loaded.eos_id,
        sampler=sampler,
        profile=loaded.profile,
    )
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


def _write_report(
    path: Path,
    config: RunConfig,
    sampler: SamplerConfig,
    report: Report,
    content: dict[str, Any],
) -> None:
    content = {
        **content,
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
    parser.add_argument(
        "--compare", action="store_true", help="also train a softmax model for the same time, and print both"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="of the softmax model's continuations (default %(default)s)"
    )
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run_quickstart(sys.argv[1:])
