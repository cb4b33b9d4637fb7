"""The reward service and its page.

    python -m jrm_jax.serve --model=runs/joint [--host=127.0.0.1 --port=8080]

docs/serving.md has the routes, what each trainer needs, sizing and alerts. It needs the packages of
requirements-serve.txt (`pip install .[serve]`).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jrm_jax import cli
from jrm_jax.errors import UserError
from jrm_jax.shell import disk, terminal
from jrm_jax.shell.arguments import Parser, check_least
from jrm_jax.shell.stop import leave

if TYPE_CHECKING:
    from jrm_jax.service.scorer import Scorer

LEAST = {"batch_size": 1, "programs": 1, "warm": -1}
NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from jrm_jax.service import limits

    parser = Parser(prog="python -m jrm_jax.serve", description="Rewards over HTTP, and a page.")
    parser.add_argument("--model", required=True, help="a run's folder, or an exported one")
    parser.add_argument("--step", default="best", help="of a run: a number, 'best' or 'latest'")
    parser.add_argument("--backbone", default="", help="where the backbone of a run lies by now")
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    words = "groups of a batch for each device; default 8"
    parser.add_argument("--batch_size", type=int, default=8, help=words)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--token_file", type=Path, help="tokens of callers, one a line")
    parser.add_argument(
        "--without_token", action="store_true",
        help="listen on an address that others reach, and answer everybody",
    )  # fmt: skip
    parser.add_argument(
        "--programs", type=int, default=12,
        help="that may be compiled for scores, as many for critiques; the last one is kept for what"
        " the others do not hold; default 12",
    )  # fmt: skip
    parser.add_argument(
        "--warm", type=int, default=-1, metavar="N",
        help="compile only the N smallest of the usual sizes before /ready says 200; default all",
    )  # fmt: skip
    limits.add_flags(parser)
    args = parser.parse_args(argv)
    args.step = int(args.step) if args.step.isdecimal() else args.step
    return args


def serve(args: argparse.Namespace) -> int:
    """The status of the process.

    Raises:
        UserError: no such model, an address that needs a token, limits at odds, a number below its
            least, a port in use.
    """
    from jrm_jax.service import auth, limits, server
    from jrm_jax.service.app import Service

    if not 0 < args.port < 65536:
        raise UserError(f"--port={args.port}: from 1 to 65535")
    check_least(args, LEAST)
    tokens = auth.read_tokens(args.token_file) if args.token_file else None
    if tokens is None and not args.without_token and auth.is_public(args.host):
        raise UserError(
            f"--host={args.host} can be reached by others: give --token_file=FILE, or"
            " --without_token if a network of your own keeps them out"
        )
    service = Service(limits.from_flags(args), tokens)
    server.configure_logging()
    sock = server.listen(args.host, args.port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    terminal.say(f"listening on http://{host}:{args.port}, loading {args.model}")
    return server.run(service, lambda: _load(args, service), sock, terminal.say)


def _load(args: argparse.Namespace, service) -> Scorer:
    from jrm_jax.service.scorer import Scorer
    from jrm_jax.serving.reward_model import RewardModel

    model = RewardModel.load(
        args.model, args.step, args.backbone,
        compute_dtype=args.compute_dtype, batch_size=args.batch_size, programs=args.programs,
        say=terminal.say,
    )  # fmt: skip
    warm = model.usual if args.warm < 0 else model.usual[: args.warm]
    began = time.monotonic()
    model.warm(warm)
    seconds = time.monotonic() - began
    service.model = {
        "name": Path(args.model).resolve().name,
        "step": model.card.get("step"),
        "template": model.card["stamp"]["template"],
    }
    many = f"{len(warm)} programs of {model.batch_size} groups"
    terminal.say(f"ready: {many}, compiled or read in {seconds:.0f} s")
    for bucket in warm:
        terminal.say(f"  {bucket.words}")
    return Scorer(model, service.limits, service.metrics, warm)


def main(argv: list[str] | None = None) -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        words = f"{', '.join(missing)} not installed: pip install -r requirements-serve.txt"
        sys.exit(f"error: {words}")
    args = parse_args(argv)
    if argv is None:
        cli.prepare()
    try:
        status = serve(args)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if (told := disk.expected_words(error)) is None:
            raise
        terminal.say(f"error: {told}")
        status = 1
    leave(status)


if __name__ == "__main__":
    main()
