"""The command line of the commands that take a config: where its file is, help, near misses."""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jrm_jax.errors import UserError
from jrm_jax.shell.arguments import check_place, check_places
from jrm_jax.shell.packaged import CONFIGS, config_names, find_config

EXAMPLE = "configs/joint.py"
HELP = ("-h", "-help", "-helpfull", "-helpshort")
NEAR = 0.65  # from here on a field's name is suggested
LONGEST = 80  # characters of a field with its value


def parse(argv: list[str], about: str, default: str = "") -> None:
    """Parse the flags of a command.

    Args:
        argv: sys.argv; the value of --config becomes the path of the file.
        about: the command's docstring, for --help.
        default: the config if none is given; '' where it must be given.

    Raises:
        UserError: no such config or field, an unexpected argument, an address in place of a folder.
        SystemExit: after --help.
        Others that `cli.in_one_line` knows: what the flag libraries raise.
    """
    check_places(argv[1:])
    given = _resolve(argv)
    if default and not given:
        given = find_config(default)
        argv.insert(1, f"--config={given}")
    if any(word.replace("--", "-", 1) in HELP for word in argv[1:]):
        print(help_text(about, given or find_config(EXAMPLE)))
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError):
        fields = dict(fields_of(_load(given or find_config(EXAMPLE))))
        for word in argv[1:]:
            field = re.match(r"--?(?:no)?config\.([^=]+)", word)
            if field:
                check_field(field[1], fields)
        raise
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}")
    if isinstance(config := flags.FLAGS["config"].value, ConfigDict):
        for name, value in fields_of(config):
            check_place(f"config.{name}", str(value))


def _resolve(argv: list[str]) -> str:
    """Write where the config is into `argv`, before its fields, which may have come first; returns
    the value of --config, '' if there is none."""
    given, rest, words = [], [], iter(argv[1:])
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("-config", "--config"):
            rest.append(word)
        elif (value := value if equals else next(words, None)) is not None:
            given.append(find_config(value))
        else:
            rest.append(word)  # without a value: the flag library's to refuse
    argv[1:] = [*(f"--config={value}" for value in given), *rest]
    return given[-1] if given else ""


def _load(value: str) -> ConfigDict:
    """The config as it is without overrides, apart from the flags of the command."""
    alone, argv = flags.FlagValues(), ["", f"--config={value}"]
    found = config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=argv)
    alone(argv)
    return found.value


def fields_of(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('optimizer.name', 'muon'), ..."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# Near misses


def check_field(name: str, fields: Sequence[str]) -> None:
    """
    Raises:
        UserError: a config has no field `name` (with dots), nor a group of that name.
    """
    if name in fields or any(field.startswith(f"{name}.") for field in fields):
        return
    ranked = sorted(fields, key=lambda field: -_likeness(name, field))
    near = [f"config.{field}" for field in ranked[:3] if _likeness(name, field) >= NEAR]
    group = name.rpartition(".")[0]
    inner = [f.removeprefix(f"{group}.") for f in fields if f.rpartition(".")[0] == group]
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif inner:
        hint = f"{f'config.{group}' if group else 'config'} has {', '.join(inner)}"
    else:
        hint = "--help lists the fields"
    raise UserError(f"--config.{name}: there is no such field; {hint}")


def _likeness(name: str, field: str) -> float:
    """From 0 to 1.2; short forms count too, such as lr for learning_rate."""
    (group, _, last), (other, _, word) = name.rpartition("."), field.rpartition(".")
    parts = word.split("_")
    alike = difflib.SequenceMatcher(None, last, word).ratio()
    if last == "".join(part[0] for part in parts if part):
        alike = 0.95
    elif set(last.split("_")) & set(parts):
        alike = max(alike, 0.7)
    return alike + 0.2 * difflib.SequenceMatcher(None, group, other).ratio()


# Help


def help_text(about: str, config: str) -> str:
    """What a command does, its flags, and the fields of a config with their values."""
    lines = [about.strip(), "", "Flags:"]
    module = flags.FLAGS.find_module_defining_flag("config")
    for flag in flags.FLAGS.get_flags_for_module(module):
        default = "" if flag.default is None else f" (default: {flag.default})"
        lines.append(f"  --{flag.name:<18} {flag.help}{default}")
    path = config.partition(":")[0]
    comments = _comments(f"{CONFIGS / 'common.py'}") | _comments(path)
    lines += ["", f"Configs that come with the code: {', '.join(config_names())}.", ""]
    lines.append(f"Fields of {config}, each a flag --config.NAME=VALUE:")
    for name, value in fields_of(_load(config)):
        words = textwrap.shorten(f"{name} = {value!r}", LONGEST, placeholder=" ...")
        lines.append(f"  {words:<44}  {comments.get(name, '')}".rstrip())
    return "\n".join(lines)


def _comments(path: str) -> dict[str, str]:
    """What a config file says behind its fields, where they are first set: {'batch_size': 'groups
    per step, all hosts together'}."""
    with open(path, encoding="utf-8") as file:
        found = re.findall(r"^\s+config\.([\w.]+) = .*?  # (.*)$", file.read(), re.MULTILINE)
    return {name: words.strip(" .") for name, words in reversed(found)}
