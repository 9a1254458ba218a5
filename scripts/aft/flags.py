# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What every command line has in common: flags from dataclasses, names of presets and models, and what a user who
mistyped one may have meant. Nothing here loads torch."""

import argparse
import difflib
import importlib.util
import re
import sys
import types
from collections.abc import Collection, Iterable
from dataclasses import MISSING, field, fields
from pathlib import Path


# Beside this package in a wheel, and at the top of the repository in a clone.
CONFIGURATION = next(
    folder
    for folder in (
        Path(__file__).resolve().parent / "configuration",
        Path(__file__).resolve().parents[2] / "configuration",
    )
    if folder.is_dir()
)
DTYPES = ("float32", "bfloat16", "float16")  # that weights may be loaded in
TRUST_HELP = "run the code that comes with a model of a type that is not installed"
IMPORT_HELP = "Python files to run first, which register models of their own"
HUB_NAME = r"(\w[\w.-]*/)?\w[\w.-]*"
METAVARS = {bool: "true|false", int: "N", float: "X", list[str]: "VALUE", list[int]: "N"}
TRUTH = {
    text: value for value, texts in ((True, "yes true t y 1"), (False, "no false f n 0")) for text in texts.split()
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name that is most like this one, if there is one that is like it."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def like_path(path: Path) -> str:
    """The same for a path that is not there: what lies beside it under a similar name."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / found[0]}?" if found else ""


def from_folder(folder: Path, name: str, value: str, paths: Collection[str], maybe_paths: Collection[str]) -> str:
    """
    The value of a flag in a file of `folder`, where a relative path begins there.

    Args:
        paths: the flags whose values are paths.
        maybe_paths: those whose values may be names too: a path if something is there.
    """
    if value and (name in paths or (name in maybe_paths and (folder / value).exists())):
        return str(folder / value)
    return value


def flag(default, text: str, *aliases: str):
    """A dataclass field with the help text of its flag, and other names of it."""
    return field(default=default, metadata={"help": text.replace("%", "%%"), "aliases": [*aliases]})


def truth(text: str) -> bool:
    """
    What a yes or no means.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return TRUTH[text.lower()]


def import_files(paths: list[str]) -> None:
    """
    Runs Python files, each once, which register models of their own with transformers.

    Raises:
        ValueError: one is not there, or raises what is wrong with it.
    """
    for name in paths:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"--import {name}: no such file{like_path(path)}")
        found = sys.modules.get(path.stem)
        if found is not None and Path(getattr(found, "__file__", None) or "").resolve() == path.resolve():
            continue
        if found is not None:
            raise ValueError(
                f"--import {name}: must have another name than the module {path.stem}, which is there already"
            )
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[path.stem]
            raise ValueError(f"--import {name}: {type(error).__name__}: {error}") from error


def sampling_checks(args: argparse.Namespace) -> list[tuple[str, bool, str]]:
    """The flags of `FlagParser.add_sampling`: for each its name, whether its value is allowed, and what is."""
    return [
        ("temperature", 1e-6 <= args.temperature <= 1e6, "in [1e-6, 1e6]"),
        ("top_k", args.top_k >= 0, "at least 0"),
        ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
        ("seed", 0 <= args.seed < 2**32, "in [0, 2**32)"),
        ("dtype", args.dtype in DTYPES, "float32, bfloat16 or float16"),
    ]


def with_underscores(item: str) -> str:
    """A word of a command line, with underscores in the name of a flag in place of dashes."""
    name, equals, value = item.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else item


class FlagParser(argparse.ArgumentParser):
    """
    A parser that raises a ValueError for a wrong command line, with the flag that may have been meant, and whose flags
    may be abbreviated by nobody.

    Args:
        command (`str`): that of `aft`, for the usage.
        description (`str`): as it is printed.
        groups: dataclasses, each field of which becomes a flag of its type: `bool`, `list[str]`, `list[int]`, or
            another, maybe with None. A flag may be written with dashes, one of a `bool` without a value, and one of a
            `list[str]` again.
    """

    def __init__(self, command: str, description: str, groups: tuple[type, ...] = ()):
        super().__init__(
            prog=f"aft {command}",
            description=description,
            usage=f"aft {command} [FLAGS]" if groups else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for group in groups:
            self.add_fields(group)

    def add_fields(self, group: type) -> None:
        target = self.add_argument_group(group._argument_group_name)
        for entry in fields(group):
            names = [*entry.metadata.get("aliases", ()), f"--{entry.name}"]
            kind = entry.type
            if isinstance(kind, types.UnionType):
                [kind] = [one for one in kind.__args__ if one is not types.NoneType]
            default = entry.default if entry.default is not MISSING else entry.default_factory()
            options = {
                "dest": entry.name,
                "default": default,
                "help": f"{entry.metadata['help']} (default: %(default)s)",
            }
            if kind is bool:
                options |= {"type": truth, "nargs": "?", "const": True}
            elif kind == list[str]:
                options |= {"nargs": "+", "action": "extend"}
            elif kind == list[int]:
                options |= {"type": int, "nargs": "+"}
            else:
                options |= {"type": kind}
            target.add_argument(*names, metavar=METAVARS.get(kind, "VALUE"), **options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_underscores(item) for item in args], namespace)

    def add_loading(self, remote: bool = True) -> None:
        """The flags that say which code a saved model may need."""
        if remote:
            self.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
        self.add_argument("--import", dest="imports", action="append", default=[], metavar="FILE", help=IMPORT_HELP)

    def add_sampling(self, temperature: float) -> argparse._ArgumentGroup:
        """The flags of samples and of where the model runs, which `sampling_checks` looks at."""
        group = self.add_argument_group("sampling")
        group.add_argument(
            "--temperature", type=float, default=temperature, help="divides the logits (default: %(default)s)"
        )
        group.add_argument("--top_k", type=int, default=0, help="sample among the k likeliest; 0 = all (default)")
        group.add_argument(
            "--top_p", type=float, default=1.0, help="sample among the likeliest of this mass (default 1)"
        )
        group.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
        self.add_argument("--device", help="where the model runs (default: cuda if it is there, else cpu)")
        self.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
        return group

    def error(self, message: str):
        unknown = re.search("unrecognized arguments: (.*)", message)
        known = [name for action in self._actions for name in action.option_strings]
        for word in unknown[1].split() if unknown else ():
            if word.startswith("-"):
                message += did_you_mean(word.partition("=")[0], known)
                break
        raise ValueError(f"{self.prog}: {message}")


def find_preset(name: str, kind: str, flag_name: str) -> str:
    """
    The path of a preset: of a file, or of one of those in `configuration/`, by its name without the suffix.

    Raises:
        ValueError: there is none; begins with the flag.
    """
    if Path(name).is_file() or Path(name).name != name or Path(name).suffix:
        return name
    presets = {path.stem: path for path in (CONFIGURATION / kind).glob("*.*")}
    if name not in presets:
        known = ", ".join(sorted(presets))
        raise ValueError(f"{flag_name} {name}: no such file or preset{did_you_mean(name, presets)}; presets: {known}")
    return str(presets[name])


def check_model_name(
    name: str | Path, flag_name: str = "--model", hub: bool = True, what: str = "model", file: str = "config.json"
) -> None:
    """
    Checks that a name is that of a folder with a saved model, or, if `hub`, may be one on the Hub: `owner/name` where
    there is no folder `owner`, or a single word.

    Args:
        what, file: what else it may be that is saved, and the file that is there then.

    Raises:
        ValueError: it is neither; begins with the flag.
    """
    path = Path(name)
    if path.is_dir() and str(name):
        if not (path / file).is_file():
            raise ValueError(f"{flag_name} {name}: must be a folder with a saved {what}, and has no {file}")
    elif path.exists():
        raise ValueError(f"{flag_name} {name}: must be a folder with a saved {what}, got a file")
    elif (
        not hub or not re.fullmatch(HUB_NAME, str(name), re.ASCII) or (path.parent != Path() and path.parent.is_dir())
    ):
        raise ValueError(f"{flag_name} {name}: no such folder{like_path(path)}")
