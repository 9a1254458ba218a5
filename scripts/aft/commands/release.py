# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Makes of a finished run of `aft pretrain` a folder to hand out: small weights, scores of those weights, pictures.

    aft release runs/aft-conv model_cards/aft-conv-small --dataset_path FILE
    aft release runs/aft-conv model_cards/aft-conv-small --dataset_path FILE --beside runs/aft-simple
    aft release runs/pictures model_cards/aft-pictures --pictures FOLDER

The weights are stored in --dtype and computed with in float32, as config.json then says. Test and valid are scored
with what was stored: by segments, sliding and, if the state of an AFT model does not grow, as one stream, carried and
refreshed; a model of pictures in bits per dimension, and it draws samples and completions. A compressor, `xz -9e`,
gets the same bytes: what the test split adds to the length of everything before it. The other pictures are those of
`aft draw`; --beside names runs for that of the receptive field, which is of texts alone. All of this goes
into the folder's run.jsonl, from which the card is made. The folder holds no code: the model loads where the package
is installed, and `aft push` adds the code that it needs elsewhere.
"""

import argparse
import re
import sys
from pathlib import Path

from aft.console import any_text
from aft.flags import DTYPES, FlagParser, check_model_name, import_files, like_path
from aft.picture_arguments import PictureArguments, complete_source, source_problems
from aft.redaction import readable
from aft.run_log import read_log
from aft.text_arguments import TextArguments


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """
    The flags of this program.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = FlagParser("release", __doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("folder", help="the new folder, whose name is that of the model")
    parser.add_fields(TextArguments)
    parser.add_fields(PictureArguments)
    parser.add_argument("--dataset_note", help="what the data are and where from, for the card")
    parser.add_argument("--dataset_license", help="under which license the data are, for the card")
    parser.add_argument(
        "--language", nargs="+", metavar="CODE", help="of the data, as in ISO 639: en, de; for the card"
    )
    parser.add_argument("--dtype", default="bfloat16", help=f"of the stored weights: {', '.join(DTYPES)}")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="AFT models for the receptive field")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier release")
    parser.add_loading(remote=False)
    args = parser.parse_args(argv)
    problems = [f"{name} must be a path, got ''" for name in ("run", "folder") if not getattr(args, name)]
    if readable(args.folder) != args.folder:
        problems.append(f"folder must have a name in UTF-8, which the card can hold, got {args.folder!r}")
    args.run, args.folder = Path(args.run), Path(args.folder)
    if wrong := [code for code in args.language or () if not re.fullmatch("[a-z]{2,3}", code)]:
        problems.append(f"--language must be codes of two or three small letters, got {', '.join(map(repr, wrong))}")
    if args.dtype not in DTYPES:
        problems.append(f"--dtype must be one of {', '.join(DTYPES)}, got {args.dtype!r}")
    log = args.folder / "run.jsonl"
    is_release = log.is_file() and any(event["event"] == "release" for event in read_log(log))
    if not problems and args.folder.exists() and not (args.overwrite and is_release):
        problems.append(f"folder must be new, or with --overwrite that of an earlier release, got {args.folder}")
    if args.folder.name in (names := [path.resolve().name for path in args.beside]):
        problems.append(f"--beside must have other names than {args.folder.name}, got {', '.join(names)}")
    complete_source(args)
    problems += source_problems(args)
    if problems:
        raise ValueError("aft release: " + "; ".join(problems))
    if not args.run.is_dir():
        raise ValueError(f"run: {args.run}: no such folder{like_path(args.run)}")
    for path in args.beside:
        check_model_name(path, "--beside", hub=False)
    return args


@any_text()
def main(argv: list[str] | None = None) -> Path:
    """
    Runs the program with the flags `argv`, those of the command line by default; returns the folder.

    Raises:
        ValueError: a flag is wrong, the run is not finished or of other data, or a model has the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    import_files(args.imports)
    from aft.releasing import release

    return release(args, argv)
