"""`bitlm serve`: a checkpoint behind an OpenAI-compatible endpoint, until it is told to stop."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
from pathlib import Path

from megatron_bitlm.errors import BitLMError

KEY_VARIABLE = "BITLM_API_KEY"


def run_serve(arguments: list[str]) -> None:
    """Parse arguments, load the checkpoint, serve until SIGTERM or SIGINT.

    Raises:
        BitLMError: An option out of range, a key that cannot be read, an address that cannot be had or would be open
            to others, or a checkpoint that cannot be loaded.
    """
    options = _parser().parse_args(arguments)
    _check(options)
    api_key = read_key(options.api_key_file)
    if api_key is None and not options.allow_open and not is_loopback(options.host):
        raise BitLMError(
            f"--host {options.host} is reached from other machines, and there is no API key: give --api-key-file or "
            f"{KEY_VARIABLE}, or --allow-open where everyone may use it"
        )
    try:
        import uvicorn

        from megatron_bitlm.serving.app import build_app
    except ImportError as error:
        raise BitLMError(f"serving needs more packages ({error}): pip install 'megatron-bitlm[serve]'") from error
    from megatron_bitlm.inference.load import loaded_model
    from megatron_bitlm.serving.service import make_service

    with _listen(options.host, options.port) as listener, loaded_model(options.checkpoint) as loaded:
        service = make_service(loaded, options, api_key)
        server = uvicorn.Server(
            uvicorn.Config(
                build_app(service),
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=options.grace_seconds,
                limit_concurrency=options.max_connections,
            )
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {service.model.name} (step {loaded.step}) at http://{shown}:{port}/", flush=True)
        # uvicorn finishes what runs, and then sends itself the signal once more: this time it means nothing.
        previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
        try:
            server.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, previous)


def read_key(path: str | None) -> str | None:
    """The API key of a file, or else of the environment; None where there is neither.

    Raises:
        BitLMError: The file cannot be read, or the key is empty or no printable ASCII.
    """
    if path is not None:
        try:
            key, source = Path(path).read_text("utf-8").strip(), f"--api-key-file {path}"
        except (OSError, UnicodeDecodeError) as error:
            raise BitLMError(f"cannot read --api-key-file {path}: {error}") from error
    elif KEY_VARIABLE in os.environ:
        key, source = os.environ[KEY_VARIABLE].strip(), f"the environment's {KEY_VARIABLE}"
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise BitLMError(f"{source} holds no key: it must be one word of printable ASCII characters")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that a port that is taken is known before the checkpoint is read."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise BitLMError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error
    return listener


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitlm serve", description="An OpenAI-compatible completions endpoint, and a page that shows the bits."
    )
    parser.add_argument("checkpoint", help="run folder, or one of its checkpoints/step_* folders")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    parser.add_argument("--model-name", help="as requests call the model (default: name of the run folder)")
    parser.add_argument("--api-key-file", metavar="FILE", help=f"file with the API key; or set {KEY_VARIABLE}")
    parser.add_argument("--allow-open", action="store_true", help="without a key, and not only on loopback")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch-size", type=int, default=16, help="completions decoded at a time (default 16)")
    limits.add_argument("--max-context", type=int, help="tokens of prompt and completion (default: as in training)")
    limits.add_argument("--max-new-tokens", type=int, default=1024, help="of a completion (default %(default)s)")
    limits.add_argument("--max-choices", type=int, default=16, help="prompts times n of a request (default 16)")
    limits.add_argument("--max-num-steps", type=int, default=256, help="denoising steps of a block (default 256)")
    limits.add_argument("--max-queue", type=int, default=128, help="completions that wait (default %(default)s)")
    limits.add_argument("--max-body-bytes", type=int, default=2**20, help="of a request (default %(default)s)")
    limits.add_argument("--max-connections", type=int, default=1024, help="at a time (default %(default)s)")
    limits.add_argument("--grace-seconds", type=int, default=10, help="for what runs at SIGTERM (default %(default)s)")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, lowest in (
        ("max_batch_size", 1),
        ("max_context", 1),
        ("max_new_tokens", 1),
        ("max_choices", 1),
        ("max_num_steps", 1),
        ("max_queue", 0),
        ("max_body_bytes", 1),
        ("max_connections", 1),
        ("grace_seconds", 0),
        ("port", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise BitLMError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")
    if options.port > 65535:
        raise BitLMError(f"--port must be at most 65535, got {options.port}")
