# Copyright 2026 The modeling_aft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""
Pushes a saved model to the Hub, in one commit: weights, configurations, code, tokenizer and model card.

    aft push runs/tiny me/aft-tiny --dry_run
    aft push runs/tiny me/aft-tiny --private

The folder is one that `aft pretrain`, `aft release` or `save_pretrained` of model and tokenizer, or image processor,
wrote. If it holds no
code, as those of release.py, that of the installed package is pushed with it. Before anything is sent, the code beside
the weights loads them; code that is not that of this repository runs only with --trust_remote_code. The card is made
from the log of the run, run.jsonl; without one, or with --keep_card, README.md, if there is one, is pushed with the
metadata that it lacks. The pictures that the log names go with it. Checkpoints, optimizer states and whatever else is
in the folder stay there, and nothing outside of it is sent, where a link or the log leads there. Log in with `hf auth
login`, or set HF_TOKEN.
"""

import argparse
import re
from pathlib import Path

from aft.console import any_text
from aft.flags import HUB_NAME, FlagParser, like_path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """
    The flags of this program.

    Raises:
        ValueError: one error that lists every value that is not allowed.
    """
    parser = FlagParser("push", __doc__)
    parser.add_argument("folder", help="where the model was saved")
    parser.add_argument("repo_id", help="where it goes: owner/name; made if it does not exist")
    parser.add_argument("--revision", help="branch to push to, made if it does not exist (default: main)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of changing main")
    parser.add_argument("--commit_message", help="message of the commit (default: Upload and the name of the class)")
    parser.add_argument("--license", help="of the model, on its card (default: apache-2.0)")
    parser.add_argument("--datasets", nargs="+", metavar="ID", help="data sets on the Hub, on the model's card")
    parser.add_argument("--keep_card", action="store_true", help="push README.md, although there is a log")
    parser.add_argument("--dry_run", action="store_true", help="check the folder and print what would be pushed")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of the folder that is not ours")
    args = parser.parse_args(argv)
    problems = [] if args.folder else ["folder must be a path, got ''"]
    args.folder = Path(args.folder)
    if not re.fullmatch(HUB_NAME, args.repo_id, re.ASCII):
        problems.append(f"repo_id must be owner/name, of letters, digits, -, _ and ., got {args.repo_id!r}")
    if args.create_pr and args.revision is not None:
        problems.append(f"--revision must be left out with --create_pr, got {args.revision!r}")
    if args.commit_message is not None and not args.commit_message.strip():
        problems.append(f"--commit_message must have at least one character, got {args.commit_message!r}")
    if problems:
        raise ValueError("aft push: " + "; ".join(problems))
    if not args.folder.is_dir():
        raise ValueError(f"folder {args.folder}: no such folder{like_path(args.folder)}")
    return args


@any_text()
def main(argv: list[str] | None = None) -> None:
    """
    Runs the program with the flags `argv`, those of the command line by default.

    Raises:
        ValueError: a flag is wrong, or the folder is not one to push.
        OSError: it was not pushed.
    """
    args = parse_arguments(argv)
    from aft.pushing import push_folder

    push_folder(args)
