"""Fields of a completion request: which there are, what they may hold, and what they become."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass, fields
from typing import Any

from megatron_bitlm.method.sampler import SamplerConfig
from megatron_bitlm.method.token_sampling import TokenSamplerConfig
from megatron_bitlm.serving.errors import ApiError

BITLM_FIELDS = {
    "num_steps": int,
    "guidance": float,
    "guidance_mode": str,
    "grid": str,
    "noise_raise": float,
    "early_exit": float,
    "early_exit_steps": int,
}
SOFTMAX_FIELDS = {"temperature": float, "top_p": float, "top_k": int}
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 256
_MAX_SEED = 2**63
# Fields of OpenAI's that change nothing at these values, and are not to be had at others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "suffix": ("",),
}
_IGNORED = ("user", "metadata")
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_new_tokens: Tokens of one completion.
        max_choices: Completions of one request: prompts times n.
        max_num_steps: Denoising steps of a block.
    """

    max_new_tokens: int
    max_choices: int
    max_num_steps: int


@dataclass
class Completion:
    """A request, checked as far as that goes without a tokenizer.

    prompts: texts or lists of ids; n: completions of each; seed: of the first choice, the next ones count up.
    """

    prompts: list[str] | list[list[int]]
    max_tokens: int
    n: int
    seed: int
    stop: list[str]
    stream: bool
    include_usage: bool
    echo: bool
    sampler: SamplerConfig | TokenSamplerConfig


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        ApiError: 400 where it is no JSON object.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, 'the body must be a JSON object with a prompt, for example {"prompt": "Once"}')
    return value


def parse_completion(given: dict[str, Any], *, model_name: str, is_softmax: bool, limits: Limits) -> Completion:
    """Check every field of a request.

    Raises:
        ApiError: 400 with the field to blame, 404 for another model.
    """
    given = {name: value for name, value in given.items() if value is not None}
    name = _typed(given, "model", str, model_name)
    if name != model_name:
        raise ApiError(404, f"there is no model {name!r} here, only {model_name!r}", "model", "model_not_found")
    known = {"model", "prompt", "max_tokens", "n", "seed", "stop", "stream", "stream_options", "echo"}
    known |= {*_NEUTRAL, *_IGNORED, *BITLM_FIELDS, *SOFTMAX_FIELDS}
    for field in given:
        if field not in known:
            raise ApiError(400, f"unknown field {field!r}", field)
    prompts, n = _prompts(given), _typed(given, "n", int, 1)
    if n < 1:
        raise ApiError(400, f"n must be at least 1, got {n}", "n")
    if len(prompts) * n > limits.max_choices:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n = {n} are {len(prompts) * n} completions, more than the "
            f"{limits.max_choices} of one request; send several",
            "n" if n > 1 else "prompt",
        )
    _check_neutral(given, n)
    max_tokens = _typed(given, "max_tokens", int, min(16, limits.max_new_tokens))
    if not 1 <= max_tokens <= limits.max_new_tokens:
        raise ApiError(400, f"max_tokens must lie in [1, {limits.max_new_tokens}], got {max_tokens}", "max_tokens")
    # A seed of ours fits into the 53 bits that a number has in JavaScript.
    seed = _typed(given, "seed", int, secrets.randbelow(2**53 - 2**20))
    if not 0 <= seed < _MAX_SEED:
        raise ApiError(400, f"seed must lie in [0, 2^63), got {seed}", "seed")
    stream = _typed(given, "stream", bool, False)
    return Completion(
        prompts=prompts,
        max_tokens=max_tokens,
        n=n,
        seed=seed,
        stop=_stops(given),
        stream=stream,
        include_usage=_include_usage(given, stream),
        echo=_typed(given, "echo", bool, False),
        sampler=_softmax_sampler(given) if is_softmax else _bitlm_sampler(given, limits),
    )


def sampler_defaults(is_softmax: bool) -> dict[str, Any]:
    """The sampler's fields with their defaults."""
    config = TokenSamplerConfig() if is_softmax else SamplerConfig()
    names = SOFTMAX_FIELDS if is_softmax else BITLM_FIELDS
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name in names}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _typed(given: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field's value of this kind; true is no number, 3 is one."""
    value = given.get(name, default)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise ApiError(400, f"{name} must be {_TYPE_NAMES[kind]}, got {_shown(value)}", name)
    if kind is float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ApiError(400, f"{name} must be a finite number", name)
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _prompts(given: dict[str, Any]) -> list[str] | list[list[int]]:
    """Prompts as texts, or as lists of ids; a list of ids is one prompt."""
    kinds = "a string, a list of strings, a list of token ids or a list of such lists"
    if "prompt" not in given:
        raise ApiError(400, f"prompt is missing: give {kinds}", "prompt")
    prompt = given["prompt"]
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif not isinstance(prompt, list):
        raise ApiError(400, f"prompt must be {kinds}, got {_shown(prompt)}", "prompt")
    else:
        prompts = [prompt] if prompt and all(_is_id(item) for item in prompt) else prompt
    if not prompts or any(item in ("", []) for item in prompts):
        raise ApiError(400, "prompt is empty: give at least one character or token id", "prompt")
    are_texts = all(isinstance(item, str) for item in prompts)
    if not are_texts and not all(isinstance(item, list) and all(_is_id(token) for token in item) for item in prompts):
        raise ApiError(400, f"prompt must be {kinds}, got {_shown(prompt)}", "prompt")
    if are_texts:
        for text in prompts:
            _check_unicode(text, "prompt")
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_unicode(text: str, name: str) -> None:
    """JSON can spell halves of surrogate pairs, which no UTF-8 can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{name} holds half of a surrogate pair, which is no character: {error}", name) from error


def _stops(given: dict[str, Any]) -> list[str]:
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        raise ApiError(400, f"stop must be a string or a list of strings, none empty, got {_shown(stop)}", "stop")
    if len(stops) > _MAX_STOPS or any(len(item) > _MAX_STOP_CHARACTERS for item in stops):
        message = f"stop takes at most {_MAX_STOPS} strings of {_MAX_STOP_CHARACTERS} characters each"
        raise ApiError(400, message, "stop")
    return stops


def _include_usage(given: dict[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, f"stream_options takes include_usage only, got {_shown(options)}", "stream_options")
    if options and not stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    return _typed(options, "include_usage", bool, False)


def _check_neutral(given: dict[str, Any], n: int) -> None:
    for name, values in _NEUTRAL.items():
        if name in given and given[name] not in values and not (name == "best_of" and given[name] == n):
            raise ApiError(400, f"{name} {_shown(given[name])} is not supported; leave it out", name)


def _bitlm_sampler(given: dict[str, Any], limits: Limits) -> SamplerConfig:
    """OpenAI's temperature and top_p are taken at their defaults, which many clients send, and mean nothing here."""
    for name, neutral in (("temperature", 1), ("top_p", 1), ("top_k", 0)):
        if name in given and _typed(given, name, float, neutral) != neutral:
            raise ApiError(
                400,
                f"{name} {_shown(given[name])} does not apply: this model denoises blocks of bits and has no softmax; "
                f"leave it out, and shape its sampling with {', '.join(BITLM_FIELDS)}",
                name,
            )
    settings = {name: _typed(given, name, kind, None) for name, kind in BITLM_FIELDS.items() if name in given}
    config = SamplerConfig(**settings)
    if config.num_steps > limits.max_num_steps:
        message = f"num_steps must lie in [1, {limits.max_num_steps}], got {config.num_steps}"
        raise ApiError(400, message, "num_steps")
    return _validated(config, BITLM_FIELDS)


def _softmax_sampler(given: dict[str, Any]) -> TokenSamplerConfig:
    for name in BITLM_FIELDS:
        if name in given:
            own = ", ".join(SOFTMAX_FIELDS)
            raise ApiError(400, f"{name} is a field of BitLM models; this one has a softmax: use {own}", name)
    return _validated(
        TokenSamplerConfig(
            **{name: _typed(given, name, kind, None) for name, kind in SOFTMAX_FIELDS.items() if name in given}
        ),
        SOFTMAX_FIELDS,
    )


def _validated(config: Any, names: dict[str, type]) -> Any:
    try:
        config.validate()
    except ValueError as error:
        param = next((name for name in sorted(names, key=len, reverse=True) if name in str(error)), None)
        raise ApiError(400, str(error), param) from error
    return config
