"""Commands: they parse flags and delegate. Run from the checkout, as `python -m experiments.train`."""

import dataclasses
import functools
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import ml_collections
from absl import app, flags

from fused_rec import hosts
from fused_rec.config import Config, from_dict
from fused_rec.devices import keep_memory
from fused_rec.train import interrupt


def start(main: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs `main`; a fault of the input, a lack of memory or of a library ends in a report.

    SIGINT and SIGTERM end it where nothing is lost, with status 130 and 143; the same command then goes on.
    """
    keep_memory()
    app.run(functools.partial(_reported, main), flags_parser=_parse)


def config_of(values: ml_collections.ConfigDict) -> Config:
    """The config of a --config flag, its data path made absolute: runs keep it and are opened from elsewhere."""
    config = from_dict(values.to_dict())
    if not config.data.path:
        return config
    path = str(Path(config.data.path).expanduser().resolve())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))


def _parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # how ml_collections tells of a setting that is not there
        print(f"FATAL Flags parsing error:\n  {error}", file=sys.stderr)
        sys.exit(1)


def _reported(main: Callable[[list[str]], None], argv: list[str]) -> None:
    logging.getLogger("fused_rec").setLevel(logging.INFO)
    # JAX tells at INFO which accelerators it looked for in vain.
    logging.getLogger("jax").setLevel(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; every setting is a flag, see --help")
    try:
        with interrupt.handled():
            main(argv)
    except interrupt.Stopped as stopped:
        said = "; ".join([str(stopped), *getattr(stopped, "__notes__", [])])
        print(f"\n{said}\nTo go on, give the same command again:\n  {command()}", file=sys.stderr)
        sys.exit(stopped.exit_status)
    except Exception as error:
        if hosts.broke_off(error):
            print(
                f"\nAnother process of this run has ended or cannot be reached: {str(error).splitlines()[0]}\n"
                f"To go on from the last checkpoint, start all processes again:\n  {command()}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # an orderly end would wait for the others
        reported = (ValueError, OSError, ArithmeticError, ImportError, MemoryError)
        if flags.FLAGS.verbosity > 0 or not isinstance(error, reported):
            raise
        print(f"{type(error).__name__}: {error}\n(--verbosity=1 shows where it was raised)", file=sys.stderr)
        sys.exit(1)


def command() -> str:
    """The command line of this process, to be given again."""
    module = sys.modules["__main__"].__spec__
    return shlex.join(["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])
