"""Runs a command: parses its flags, and ends it with a report after a fault, a signal or a closed pipe.

Status and messages are the same for `fused-rec NAME` and `python -m experiments.NAME`; hints name the one in use.
"""

import dataclasses
import functools
import gc
import hashlib
import logging
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import absl.logging
import ml_collections
from absl import app, flags
from ml_collections import config_flags

from fused_rec.commands.exits import exit_broken_pipe, open_missing_streams
from fused_rec.commands.places import CONFIG_NAMES, DEFINE_path, new_folder
from fused_rec.config import Config, from_dict

# JAX and what needs it are imported once the flags are parsed: --help and a misspelt flag do not wait for them.
FAULTS = (ValueError, OSError, ArithmeticError, ImportError, MemoryError, app.UsageError)
# The flags that give a setting, by command: the first that a command has is named where the setting is at fault.
FLAGS_OF = {"data.path": ("config", "data_path", "path"), "text.cache": ("config", "cache")}
# Of Python's garbage collection, which with its own thresholds takes a tenth of the time until the first step: imports
# and the tracing of programs make many objects that stay.
COLLECTION = 10_000, 20, 10
PROGRAM_BYTES = 2**30  # of compiled programs that are kept
PROGRAM_SECONDS = 0.1  # of compilation from which on a program is kept
DEFINE_path(
    "compilation_cache",
    new_folder,
    "Folder of compiled programs, which later commands read; empty: none is kept.",
    default="~/.cache/fused_rec/compiled",
    optional=True,
)
_program: tuple[str, ...] = ()  # the console script and its command, where that runs
_MISSING = re.compile(r"flag --(\S+)=None: Flag --\1 must have a value other than None\.")


def start(main: Callable[[list[str]], None], launcher: str = "") -> None:
    """Parses the flags and runs `main`; faults of the input, missing memory or libraries end in a report.

    SIGINT and SIGTERM stop the command at a safe point, with status 130 and 143; the same command resumes.

    Args:
      main: function of a module of `fused_rec.commands`, or of the module that Python runs.
      launcher: the console script that runs the command; empty for `python -m`.
    """
    global _program
    _program = (launcher, main.__module__.rpartition(".")[2]) if launcher else ()
    open_missing_streams()
    _describe(main.__module__)
    try:
        app.run(functools.partial(_reported, main), flags_parser=_parse)
    except BrokenPipeError:
        exit_broken_pipe()


def config_of(values: ml_collections.ConfigDict) -> Config:
    """Returns the config of --config with an absolute data path: runs are opened from any folder.

    A flag that names a model.method applies the method's settings; other settings that are flags stay as given.
    """
    settings: Any = values.to_dict()
    config = from_dict(settings)
    given: dict[str, dict[str, Any]] = {}
    for name in config_flags.get_override_values(flags.FLAGS["config"]):
        section, _, setting = name.partition(".")
        given.setdefault(section, {})[setting] = settings[section][setting]
    if "method" in given.get("model", {}):
        from fused_rec.studies.variants import configured

        config = configured(config, given)
    if not config.data.path:
        return config
    path = str(absolute(config.data.path))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))


def absolute(path: str) -> Path:
    """Returns the absolute path with ~ and links resolved.

    Args:
      path: the path.

    Returns:
      The absolute path.

    Raises:
      ValueError: it cannot be resolved.
    """
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, OSError) as error:  # no home directory, links in a circle, too long
        raise ValueError(f"{path!r} names no place: {error}") from error


def _parse(argv: list[str]) -> list[str]:
    try:
        left = flags.FLAGS(argv)
        if "config" in flags.FLAGS and (given := flags.FLAGS["config"].value) is not None:
            given.to_dict()  # raises where the file could not be read
        return left
    except SystemExit:  # --help has been answered
        sys.stdout.flush()
        sys.exit(0)
    except (flags.Error, AttributeError, KeyError, ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        # Beyond flags.Error: how ml_collections says that a setting or a file of settings is not there or not sound.
        reported = str(error)
        if isinstance(error, flags.Error):
            reported = re.sub(_MISSING, r"--\1 is missing", reported.strip('"'))
        elif isinstance(error, AttributeError | KeyError):
            reported = "--config has no such setting: " + re.sub(r"[\\']", "", reported.replace("\\n", " "))
        else:
            reported = f"--config cannot be read: {' '.join(reported.rpartition('failure to load:')[2].split())}"
            if isinstance(error, OSError):
                reported += f"; give the path of a file, or one of {', '.join(CONFIG_NAMES)}"
        print(reported, file=sys.stderr)
        sys.exit(1)


def _reported(main: Callable[[list[str]], None], argv: list[str]) -> None:
    gc.set_threshold(*COLLECTION)
    import jax

    from fused_rec.distributed import processes, signals
    from fused_rec.distributed.devices import DeviceError, keep_memory

    keep_memory()
    _log()
    if (folder := flags.FLAGS["compilation_cache"].value) is not None:
        keep_programs(folder)
    # Everything here is float32 or int32; fused_rec.distributed.devices.computes does the same for the Python
    # interface.
    jax.config.update("jax_enable_x64", False)
    try:
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]!r}; every setting is a flag")
        with signals.handle_signals():
            main(argv)
            sys.stdout.flush()
    except signals.Stopped as stopped:
        message = "; ".join([str(stopped), *getattr(stopped, "__notes__", [])])
        print(f"\n{message}\nTo go on, give the same command again:\n  {command()}", file=sys.stderr)
        sys.exit(stopped.exit_status)
    except BrokenPipeError:
        exit_broken_pipe()
    except Exception as error:
        if not isinstance(error, DeviceError) and processes.is_collective_failure(
            error
        ):  # without devices there are no hosts either
            print(
                f"\nAnother process of this run has ended or cannot be reached: {str(error).splitlines()[0]}\n"
                f"To go on from the last checkpoint, start all processes again:\n  {command()}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # an orderly end would wait for the others
        if flags.FLAGS.verbosity > 0 or not isinstance(error, (*FAULTS, DeviceError)):
            raise
        sys.stdout.flush()  # what was said before comes before
        print(_report(error), file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))


def _report(error: Exception) -> str:
    if isinstance(error, app.UsageError):
        return str(error)
    lines = [f"{type(error).__name__}: {error}"]
    setting = getattr(error, "setting", None)
    for flag in FLAGS_OF.get(setting, ()) if isinstance(setting, str) else ():
        if flag in flags.FLAGS:
            lines.append(f"({setting} is set by --{f'config.{setting}' if flag == 'config' else flag}=DIR)")
            break
    return "\n".join([*lines, "(--verbosity=1 shows where it was raised)"])


class _Formatter(logging.Formatter):
    """Log format: the time, and the level above INFO."""

    def format(self, record: logging.LogRecord) -> str:
        grave = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {grave}{super().format(record)}"


def _log() -> None:
    absl.logging.get_absl_handler().setFormatter(_Formatter())
    logging.getLogger("fused_rec").setLevel(logging.INFO)
    # JAX tells at INFO which accelerators it looked for in vain.
    logging.getLogger("jax").setLevel(logging.WARNING)


def _describe(module: str) -> None:
    """Lets --help show the text and flags of the command; absl shows those of the module that Python runs."""
    if module == "__main__":
        return
    text = sys.modules[module].__doc__ or ""
    sys.modules["__main__"].__doc__ = text.replace("python -m experiments.", f"{_program[0]} ") if _program else text
    for flag in (*flags.FLAGS.get_key_flags_for_module(module), flags.FLAGS["compilation_cache"]):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def keep_programs(folder: Path) -> None:
    """Lets JAX keep compiled programs in a folder, for later processes; must be called before the first compilation.

    Programs for a CPU may have instructions that another CPU lacks, so each kind of CPU has a subfolder. Nothing
    changes where JAX already has such a folder (JAX_COMPILATION_CACHE_DIR), or where this one cannot be written.

    Args:
      folder: the folder; JAX removes the programs used least recently beyond `PROGRAM_BYTES`.
    """
    import jax

    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    try:
        own = folder.expanduser() / f"{platform.machine()}-{_processor()}"
        own.mkdir(mode=0o700, parents=True, exist_ok=True)  # a program is executed: nobody else may write one
        own.chmod(0o700)
    except (OSError, RuntimeError):  # RuntimeError: the home directory is not known
        return
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_compilation_cache_max_size", PROGRAM_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", PROGRAM_SECONDS)


def _processor() -> str:
    """Returns a hash of the instructions that the CPU has, where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    listed = next((line for line in lines if line.lower().startswith(("flags", "features"))), "".join(lines[:1]))
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def command() -> str:
    """Returns the command line of this process, for another run."""
    if _program:
        return shlex.join([*_program, *sys.argv[1:]])
    module = sys.modules["__main__"].__spec__
    return shlex.join(["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])


def command_named(name: str) -> str:
    """Returns how to run another command, in the way this one was run."""
    return shlex.join([_program[0], name] if _program else ["python", "-m", f"experiments.{name}"])
