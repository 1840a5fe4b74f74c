"""Flags that several commands share, most of them names of files and folders.

A name that cannot serve is refused when flags are parsed, before any work.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from fused_rec.explanation.catalogs import LANGUAGES, SOURCE

Check = Callable[[Path], str]  # what is wrong with the place, empty where nothing is
flags.disclaim_key_flags()  # a flag defined by a function here is one of the calling module's, and in its --help
CONFIGS = Path(__file__).with_name("configs")
CONFIG_NAMES = sorted(file.stem for file in CONFIGS.glob("*.py") if file.stem != "__init__")
LONGEST = 200  # bytes of a name that is made: file systems take 255, and names of files half written are longer


class _Place(flags.ArgumentParser):
    """Of an argument the path, ~ resolved; a default, given as a Path, is left as it is."""

    syntactic_help = "a path"

    def __init__(self, check: Check, optional: bool):
        super().__init__()
        self._check, self._optional = check, optional

    def parse(self, argument: Any) -> Path | None:
        if isinstance(argument, Path):
            return argument
        if self._optional and not argument:
            return None
        if not argument.strip():
            raise ValueError("it is empty; give a name")
        try:
            argument.encode()
            path = Path(argument).expanduser()
            problem = self._check(path)
        except UnicodeEncodeError:
            problem = "the name is not valid UTF-8 and cannot be written down; rename it"
        except (OSError, RuntimeError, ValueError) as error:  # too long, no home directory, NUL
            problem = str(error)
        if problem:
            raise ValueError(problem)
        return path


class _Config(flags.ArgumentParser):
    """Of a file's path, or the name of a config that is installed, the config."""

    def __init__(self, of_path: flags.ArgumentParser):
        super().__init__()
        self._of_path = of_path

    def parse(self, argument: str) -> ml_collections.ConfigDict | None:
        name, colon, variant = argument.partition(":")
        return self._of_path.parse(f"{CONFIGS / name}.py{colon}{variant}" if name in CONFIG_NAMES else argument)

    def flag_type(self) -> str:
        return self._of_path.flag_type()


def DEFINE_config() -> flags.FlagHolder:  # noqa: N802 - as absl names what defines a flag
    """Defines --config, which is required; any setting of the config is a flag too, as --config.model.dim."""
    about = f"A Python file, as those of experiments/configs, or one of {', '.join(CONFIG_NAMES)}."
    holder = config_flags.DEFINE_config_file("config", None, about, lock_config=True)
    flag = flags.FLAGS["config"]
    flag.parser = _Config(flag.parser)
    flags.mark_flag_as_required("config")
    return holder


def DEFINE_path(  # noqa: N802 - as absl names what defines a flag
    name: str, check: Check, about: str, *, default: str | None = None, required: bool = False, optional: bool = False
) -> flags.FlagHolder:
    """Defines a flag whose value is the Path of a place that passes the check, or None.

    optional: an empty name means no place at all.
    """
    given = None if default is None else Path(default)
    return flags.DEFINE(_Place(check, optional), name, given, about, required=required)


def DEFINE_run() -> tuple[flags.FlagHolder, flags.FlagHolder, flags.FlagHolder]:  # noqa: N802
    """Defines --workdir of a finished run, which is required, --data_path and --cache."""
    return (
        DEFINE_path("workdir", existing_folder, "Folder of a finished run.", required=True),
        DEFINE_path(
            "data_path",
            existing_folder,
            "Current folder of the run's tables, if they have moved; other tables are refused.",
        ),
        DEFINE_path("cache", new_folder, "Folder of cached text embeddings; that of the training by default."),
    )


def DEFINE_served() -> tuple[flags.FlagHolder, flags.FlagHolder]:  # noqa: N802
    """Defines --history and --tables, what a finished run ranks with."""
    return (
        flags.DEFINE_enum(
            "history",
            "all",
            ["train", "all"],
            "Interactions, reviews and ties to rank with: all of the tables, or those that the model was trained on.",
        ),
        DEFINE_path(
            "tables",
            existing_folder,
            "Folder of tables (docs/tables.md) to serve in place of those of the training; ids are matched.",
        ),
    )


def DEFINE_split() -> flags.FlagHolder:  # noqa: N802
    """Defines --split, the held-out split to evaluate."""
    return flags.DEFINE_enum("split", "valid", ["valid", "test"], "Held-out split to evaluate.")


def DEFINE_baselines(known: Iterable[str], default: Sequence[str]) -> flags.FlagHolder:  # noqa: N802
    """Defines --baselines, names of `known`."""
    return flags.DEFINE_list("baselines", list(default), f"Baselines to compare with: any of {', '.join(known)}.")


def DEFINE_rules() -> flags.FlagHolder:  # noqa: N802
    """Defines --rules, a file of suitability rules."""
    return DEFINE_path("rules", existing_file, "JSON file of suitability rules; see docs/SUITABILITY.md.")


def DEFINE_language() -> flags.FlagHolder:  # noqa: N802
    """Defines --language, that of the reasons."""
    about = f"Language of the reasons: {', '.join(LANGUAGES)}, or the path of a compiled message catalog (.mo)."
    return flags.DEFINE_string("language", SOURCE, about)


def require_known(flag: flags.FlagHolder, known: Iterable[str]) -> None:
    """Raises UsageError for entries of a list that are not known."""
    if unknown := set(flag.value) - set(known):
        raise app.UsageError(f"--{flag.name} has {sorted(unknown)}; they must be of {', '.join(known)}")


def existing_folder(path: Path) -> str:
    """A folder that is read."""
    if not path.exists():
        return "there is no such folder"
    if not path.is_dir():
        return "this is a file, and a folder is due"
    return "" if os.access(path, os.R_OK | os.X_OK) else "this folder cannot be read"


def existing_file(path: Path) -> str:
    """A file, or pipe, that is read."""
    if not path.exists():
        return "there is no such file"
    if path.is_dir():
        return "this is a folder, and a file is due"
    return "" if os.access(path, os.R_OK) else "this file cannot be read"


def new_folder(path: Path) -> str:
    """A folder that is made where there is none. One that is there need not be writable: it may have all it needs."""
    if path.is_dir():
        return ""
    return "this is a file, and a folder is due" if os.path.lexists(path) else _makeable(path)


def written_folder(path: Path) -> str:
    """A folder that is written in, and made where there is none."""
    return _makeable(path / "file") if path.is_dir() else new_folder(path)


def written_file(path: Path) -> str:
    """A file that is made or replaced, in a folder that is there."""
    if path.is_dir():
        return "this is a folder, and a file is due"
    if not path.parent.is_dir():
        return f"it is in {path.parent}, which is no folder; make it first"
    return _makeable(path)


def written_file_anywhere(path: Path) -> str:
    """A file that is made or replaced, its folder too."""
    return "this is a folder, and a file is due" if path.is_dir() else _makeable(path)


def _makeable(path: Path) -> str:
    """Says what keeps a file or folder, and those above it, from being made."""
    for part in path.parts:
        if len(part.encode()) > LONGEST:
            return f"a name in it has {len(part.encode())} bytes; give one of {LONGEST} at most"
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        return f"{folder} is a file, and a folder is due"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"
