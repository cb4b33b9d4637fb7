"""Does joint training help, and why? One command runs what is missing and writes the page.

python -m jrm_jax.study --config=configs/study.py                all of it; go on where it was
python -m jrm_jax.study --config=configs/study.py --minutes=60   so much of it, then the page
python -m jrm_jax.study --config=configs/study.py --report       the page alone, from the cells
python -m jrm_jax.study --config=configs/study.py --cell=NAME    one cell, also if it is there
python -m jrm_jax.study --config=configs/study.py --jobs=4       four cells at a time
python -m jrm_jax.study --config=configs/study.py:regimes        the second part, likewise
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from jrm_jax import cli
from jrm_jax.shell import config_cli
from jrm_jax.shell.stop import ending

_CONFIG = config_flags.DEFINE_config_file("config", None, "File[:arguments].", lock_config=True)
_MINUTES = flags.DEFINE_float("minutes", 0.0, "Stop after so many; 0: when all is done.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the page, from the cells there are.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Cells made at a time, on a free core each.", lower_bound=1)
_CELL = flags.DEFINE_string("cell", "", "Make this cell (again), and nothing else.")
_KEEP = flags.DEFINE_bool("keep", False, "Keep the folders of the runs after measuring them.")


def main() -> None:
    try:
        config_cli.parse(sys.argv, __doc__, default="configs/study.py")
        from jrm_jax.study import design, regimes_report, report, runner

        config = _CONFIG.value
        with ending("stopped; the same command goes on"):  # the run of a cell ends, too
            if _CELL.value:
                runner.remake(config, runner.find_cell(config, _CELL.value), _KEEP.value)
                return
            if not _REPORT.value:
                runner.run(config, _MINUTES.value, _KEEP.value, _JOBS.value)
            page = regimes_report if design.is_second(config) else report
            for path in page.write(config):
                print(path)
    except cli.REPORTED as error:
        if not cli.is_expected(error) and flags.FLAGS.is_parsed():
            raise
        sys.exit(f"error: {cli.in_one_line(error)}")


if __name__ == "__main__":
    main()
