"""Run configurations from a YAML file and `--section.field value` flags."""

from __future__ import annotations

import typing
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from megatron_bitlm.training.config import RunConfig


def run_parser() -> ArgumentParser:
    """Parser of `bitlm pretrain CONFIG.yaml --section.field value`; types are checked, unknown keys refused."""
    parser = ArgumentParser(
        prog="bitlm pretrain",
        description="Train a BitLM, or resume it from its newest checkpoint. Start under torchrun for many processes.",
        usage="bitlm pretrain [CONFIG.yaml] [--section.field value ...]",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the sections below")
    hints = typing.get_type_hints(RunConfig)
    for field in fields(RunConfig):
        parser.add_class_arguments(hints[field.name], field.name, help=f"Section {field.name}.")
    return parser


def parse_run(arguments: list[str]) -> RunConfig:
    """The configuration that command-line arguments describe; the first may be a YAML file.

    Raises:
        SystemExit: Status 2 with one line for an unknown key or a value of the wrong type.
        BitLMError: A value out of range.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    parser = run_parser()
    return _build(parser, parser.parse_args(arguments))


def load_run(path: str, overrides: list[str] | None = None) -> RunConfig:
    """The configuration in a YAML file, with `--section.field value` overrides."""
    return parse_run([path, *(overrides or [])])


def _build(parser: ArgumentParser, namespace: Any) -> RunConfig:
    built = parser.instantiate_classes(namespace)
    return RunConfig(**{field.name: built[field.name] for field in fields(RunConfig)})
