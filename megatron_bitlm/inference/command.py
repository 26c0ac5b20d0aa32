"""`bitlm generate`: prompts in, continuations out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.inference.generate import Generation, Generator
from megatron_bitlm.inference.load import LoadedModel, loaded_model
from megatron_bitlm.method.sampler import SamplerConfig


def run_generate(arguments: list[str]) -> None:
    """Parse arguments, load the checkpoint, print continuations."""
    options = _parser().parse_args(arguments)
    prompts = _prompts(options)
    sampler = SamplerConfig(
        num_steps=options.steps,
        guidance=options.guidance,
        guidance_mode=options.guidance_mode,
        grid=options.grid,
        noise_raise=options.noise_raise,
    )
    with loaded_model(options.checkpoint) as loaded:
        results = continue_texts(
            loaded, prompts, sampler=sampler, max_new_tokens=options.max_new_tokens, seed=options.seed
        )
        for prompt, result in zip(prompts, results, strict=True):
            _show(prompt, result, loaded, as_json=options.json)


def continue_texts(
    loaded: LoadedModel, prompts: list[str], *, sampler: SamplerConfig, max_new_tokens: int, seed: int
) -> list[Generation]:
    """Continue texts as one batch; row i uses seed + i."""
    generator = Generator(loaded.model, loaded.code, bos_id=loaded.bos_id, eos_id=loaded.eos_id, sampler=sampler)
    return generator.generate(
        [loaded.tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        seeds=[seed + row for row in range(len(prompts))],
    )


def _parser() -> argparse.ArgumentParser:
    defaults = SamplerConfig()
    parser = argparse.ArgumentParser(prog="bitlm generate", description="Continue prompts with a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="run folder, or one of its checkpoints/step_* folders")
    parser.add_argument("--prompt", nargs="+", default=[], help="texts to continue; may be empty strings")
    parser.add_argument("--prompt-file", help="file with one prompt a line; - for standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="limit for each prompt (default %(default)s)")
    parser.add_argument("--steps", type=int, default=defaults.num_steps, help="denoising steps K (default %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=defaults.guidance, help="classifier-free guidance (default %(default)s)"
    )
    parser.add_argument("--guidance-mode", choices=["mean", "clipped", "logit"], default=defaults.guidance_mode)
    parser.add_argument("--grid", choices=["uniform", "logsnr", "entropy"], default=defaults.grid)
    parser.add_argument(
        "--noise-raise", type=float, default=0.0, help="eta of the stochastic sampler; 0 is Euler (default 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count up")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt")
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompt_file:
        try:
            text = sys.stdin.read() if options.prompt_file == "-" else Path(options.prompt_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BitLMError(f"cannot read --prompt-file {options.prompt_file}: {error}") from error
        # Not splitlines(): it also cuts at form feeds and Unicode's separators, which a prompt may hold.
        prompts += text.removesuffix("\n").split("\n") if text else []
    if not prompts:
        raise BitLMError("give --prompt TEXT or --prompt-file FILE")
    return prompts


def _show(prompt: str, result: Generation, loaded: LoadedModel, *, as_json: bool) -> None:
    text = loaded.tokenizer.decode(result.ids)
    if as_json:
        print(json.dumps({"prompt": prompt, "text": text, **asdict(result)}))
        return
    end = "end of text" if result.finished else "limit reached"
    print(f"--- {len(result.ids)} tokens, {result.num_blocks} blocks, {end}")
    print(f"{prompt}{text}")
