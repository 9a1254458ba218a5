# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Draws pictures with a language model of pictures, pixel by pixel: a grid of samples as a PNG.

    aft paint runs/pictures --samples 16 --output samples.png
    aft paint runs/pictures --samples 4 --output completed.png --pictures FOLDER --rows 14

With --pictures it completes the first pictures of a split: a row of the grid has what is given of a picture, several
samples, and the picture itself. The samples are those of the model as it is, unless --temperature, --top_k or --top_p
say otherwise.
"""

import argparse
from pathlib import Path

from aft.console import any_text
from aft.flags import FlagParser, check_model_name, import_files, sampling_checks
from aft.picture_arguments import PictureArguments, SplitArguments, source_problems


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this program.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = FlagParser("paint", __doc__)
    parser.add_argument("model", help="folder of a saved model of pictures, or a name on the Hub")
    parser.add_argument("--output", required=True, help="PNG file of the grid")
    parser.add_argument("--samples", type=int, default=16, help="pictures to draw, or to complete (default: 16)")
    parser.add_argument("--rows", type=int, help="rows of pixels that are given of each (default: the upper half)")
    parser.add_argument("--split", default="test", help="whose pictures are completed: train, valid or test (default)")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at once (default: %(default)s)")
    parser.add_fields(PictureArguments)
    parser.add_fields(SplitArguments)
    parser.add_sampling(temperature=1.0)
    parser.add_loading()
    args = parser.parse_args(argv)
    output, completes = Path(args.output), args.pictures is not None
    problems = [
        f"--{name} must be {allowed}, got {getattr(args, name)!r}"
        for name, ok, allowed in (
            ("output", output.suffix.lower() == ".png" and not output.is_dir(), "a file whose name ends with .png"),
            ("samples", args.samples >= 1, "at least 1"),
            ("rows", args.rows is None or completes, "left out without --pictures"),
            ("rows", args.rows is None or args.rows >= 1, "at least 1"),
            ("split", args.split in ("train", "valid", "test"), "train, valid or test"),
            ("batch_size", args.batch_size >= 1, "at least 1"),
            *sampling_checks(args),
        )
        if not ok
    ]
    problems += source_problems(args) if completes else []
    if problems:
        raise ValueError("aft paint: " + "; ".join(problems))
    check_model_name(args.model)
    args.output = output
    return args


@any_text()
def main(argv: list[str] | None = None) -> None:
    """
    Runs the program with the flags `argv`, those of the command line by default.

    Raises:
        ValueError: a flag is wrong, or the model is none of pictures, whole and finite.
    """
    args = parse_arguments(argv)
    import_files(args.imports)
    from aft.painting import paint

    paint(args)
