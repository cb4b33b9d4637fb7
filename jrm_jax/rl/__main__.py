"""A score under optimisation, where the truth is known: best-of-n and online RL in the built-in
world, and a page of what came of it.

    python -m jrm_jax.rl --config=configs/rl.py --model=FOLDER_OR_RUN [--model=...]
                                              what is missing, then WORKDIR/report.md
    python -m jrm_jax.rl --config=configs/rl.py:comparison          docs/rl.md
    python -m jrm_jax.rl --config=configs/rl.py:comparison --report     the page alone

Several models are compared; with --config.reward.ensemble=True they are one reward. What was
stopped goes on where it was with the same command.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jrm_jax import cli
from jrm_jax.shell import config_cli
from jrm_jax.shell.stop import StopRequest, ending

_CONFIG = config_flags.DEFINE_config_file("config", None, "File[:arguments].", lock_config=True)
_MODEL = flags.DEFINE_multi_string("model", [], "A run's folder or an export; may be repeated.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/rl", "Folder of the runs, and of the page.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the page, from the runs there are.")


def _main() -> int:
    config_cli.parse(sys.argv, __doc__, default="configs/rl.py")
    cli.prepare()
    from jrm_jax.rl import check, report, runner

    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    check.check_config(config)
    if not _REPORT.value:
        with StopRequest(say=_say) as stop:
            status = runner.run(config, _MODEL.value, workdir, stop, _say)
        if status:
            _say("stopped; the same command goes on")
            return 128 + status
    with ending():
        for path in report.write(config, runner.folder_of(config, workdir)):
            print(path)
    return 0


def _say(words: str) -> None:
    print(words, flush=True)


def main() -> None:
    try:
        sys.exit(_main())
    except cli.REPORTED as error:
        if not cli.is_expected(error) and flags.FLAGS.is_parsed():
            raise
        sys.exit(f"error: {cli.in_one_line(error)}")


if __name__ == "__main__":
    main()
