"""scripts/build_pairs.py: pairs from index files of apt and of random letters, and that nothing leaks into test."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import build_pairs
import pytest

from aft.package_descriptions import HELPER, Description, read_descriptions, split_paragraphs


COUNT = 160  # packages; two of a source package each, and the last has no translation
SHARED = "Every package says this."


def source_of(number: int) -> str:
    """aa1, aa2, ab1, ...: the versions of one program."""
    first, second = divmod(number // 4, 10)
    return f"{chr(97 + first)}{chr(97 + second)}{1 + number // 2 % 2}"


def english(number: int) -> str:
    return f"Tool {number}\n It does thing {number},\n  and   more.\n .\n {SHARED}"


def german(number: int) -> str:
    return f"Werkzeug {number}\n Es macht Sache {number} und mehr.\n .\n Das sagt jedes Paket."


def stanza(**fields: str) -> str:
    return "".join(f"{name.replace('__', '-')}: {value}\n" for name, value in fields.items()) + "\n"


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """A folder as apt keeps its lists."""
    folder, texts = tmp_path_factory.mktemp("lists"), {"binary-amd64_Packages": ""}
    for number in range(COUNT):
        key, package = f"md5-{number}", f"pack-{number:03}"
        texts["binary-amd64_Packages"] += stanza(
            Package=package, Source=f"{source_of(number)} (1.0)", Section="contrib/net", Description__md5=key
        )
        for language, text in (("en", english(number)), ("pt_BR", german(number))):
            if language == "en" or number < COUNT - 1:
                entry = stanza(Package=package, Description__md5=key, **{f"Description__{language}": text})
                name = f"i18n_Translation-{language.replace('_', '%5f')}"
                texts[name] = texts.get(name, "") + entry
    for name, text in texts.items():
        (folder / f"deb.example.org_dists_stable_main_{name}").write_text(text, encoding="utf-8")
    (folder / "deb.example.org_dists_stable_InRelease").write_text("Translation-de")
    return folder


def build(out: Path, *flags: str | Path) -> dict[str, list[tuple[str, ...]]]:
    """The rows of each file that is built."""
    build_pairs.main([*map(str, flags), "--output_dir", str(out)])
    assert {path.name for path in out.parent.iterdir()} == {out.name}
    lines = {name: (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in build_pairs.SPLITS}
    return {name: [tuple(json.loads(line).values()) for line in found] for name, found in lines.items()}


def split_by_hand(group: str) -> str:
    share = int(hashlib.sha256(group.encode()).hexdigest()[:16], 16) / 16**16
    return "test" if share < 0.05 else "valid" if share < 0.1 else "train"


def test_paragraphs_become_lines():
    text = "One  line\nfirst\n  part\n.\n * a point\n ..\n.\n.\nlast"
    assert split_paragraphs(text) == ["One line", "first part", "* a point ..", "last"]
    assert split_paragraphs("alone") == ["alone"]


def test_descriptions_have_their_source_and_translation(lists):
    found, sums = read_descriptions(lists, ["en", "pt_BR"])
    assert [(one.package, one.source) for one in found] == [(f"pack-{n:03}", source_of(n)) for n in range(COUNT)]
    assert found[1].english == ["Tool 1", "It does thing 1, and more.", SHARED]
    assert found[1].translated[1] == "Es macht Sache 1 und mehr." and found[-1].translated is None
    assert {one.section for one in found} == {"net"}
    files = [path for path in lists.iterdir() if path.name.rpartition("_")[2] != "InRelease"]
    assert sums == {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def test_of_packages_with_one_description_the_first_by_name_counts(tmp_path):
    """Whatever the order of stanzas and files: the archive of security updates repeats packages."""
    key = {"Description__md5": "k"}
    rows = [
        stanza(Package="b", Source="z", Section="net", **key),
        stanza(Package="a", Section="libs", **key),
        stanza(Package="of-another-archive"),
    ]
    text = stanza(Description__md5="k", Description__en="Text") + stanza(
        Description__md5="l", Description__en="None's"
    )
    (tmp_path / "main_i18n_Translation-en").write_text(text)
    for order in (rows, rows[::-1]):
        (tmp_path / "Packages").write_text("".join(order[:1]))
        (tmp_path / "security_Packages").write_text("\n" + "".join(order[1:]))
        assert read_descriptions(tmp_path, ["en"])[0] == [Description("a", "a", "libs", ["Text"])]


def test_translations_of_all_versions_of_a_program_are_in_one_split(lists, tmp_path):
    out = tmp_path / "out" / "en-pt"
    rows = build(out, "--task", "translation", "--language", "pt_BR", "--lists_dir", lists)
    expected = {name: set() for name in rows}
    for number in range(COUNT - 1):
        expected[split_by_hand(source_of(number)[:-1])] |= {
            (f"Tool {number}", f"Werkzeug {number}"),
            (f"It does thing {number}, and more.", f"Es macht Sache {number} und mehr."),
        }
    expected["train"].add((SHARED, "Das sagt jedes Paket."))
    assert {name: set(found) for name, found in rows.items()} == expected
    assert {name: len(found) for name, found in rows.items()} == {name: len(found) for name, found in expected.items()}
    assert json.loads((out / "test.jsonl").read_text().splitlines()[0]).keys() == {"en", "pt_BR"}

    known = json.loads((out / "sources.json").read_text())
    assert known["command"].startswith("python scripts/build_pairs.py --task translation --language pt_BR ")
    assert (known["descriptions"], known["translated"], known["left_out_as_of_unequal_paragraphs"]) == (
        COUNT,
        COUNT - 1,
        0,
    )
    programs = {name: len(found) // 2 for name, found in expected.items()}  # with the shared one, the same in train
    assert known["splits"] == {
        name: {
            "pairs": len(found),
            "left_out_as_duplicates": programs[name] - 1,
            "left_out_as_in_an_earlier_split": int(name != "train"),
        }
        for name, found in expected.items()
    }


@pytest.mark.parametrize(
    ("task", "columns", "row"),
    [
        ("summarization", ["document", "summary"], (f"It does thing 5, and more.\n{SHARED}", "Tool 5")),
        ("sections", ["text", "label"], (f"Tool 5\nIt does thing 5, and more.\n{SHARED}", "net")),
    ],
)
def test_other_pairs_of_descriptions(task, columns, row, lists, tmp_path):
    rows = build(tmp_path / "out", "--task", task, "--lists_dir", lists)
    assert row in rows[split_by_hand(source_of(5)[:-1])] and sum(map(len, rows.values())) == COUNT
    assert list(json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])) == columns


def test_pairs_with_a_long_text_are_left_out(lists, tmp_path):
    flags = ["--task", "translation", "--language", "pt_BR", "--lists_dir", lists]
    everything = build(tmp_path / "a" / "out", *flags)
    short = build(tmp_path / "b" / "out", *flags, "--longest", len(SHARED))
    assert short == {
        name: [pair for pair in found if max(map(len, pair)) <= len(SHARED)] for name, found in everything.items()
    }
    known = json.loads((tmp_path / "b" / "out" / "sources.json").read_text())
    assert known["left_out_as_longer"] == COUNT - 1  # what each says it does


def test_what_has_no_pair_is_left_out():
    of = Description("a", "a", "", ["Alone"], ["Allein", "Mehr"])
    assert not [*build_pairs.pair_translations(of), *build_pairs.pair_summary(of), *build_pairs.pair_section(of)]


@pytest.mark.parametrize(
    ("task", "right"),
    [
        ("copy", lambda text: text),
        ("reverse", lambda text: text[::-1]),
        ("sort", lambda text: " ".join(sorted(text[::2]))),
    ],
)
def test_strings_are_drawn_once_and_repeatably(task, right, tmp_path):
    flags = ["--task", task, "--count", "300", "--length", "3", "--seed"]
    rows = build(tmp_path / "out" / "0", *flags, "0")
    found = [pair for part in rows.values() for pair in part]
    assert len({source for source, _ in found}) == len(found) == 300
    assert {len(source) for source, _ in found} == {1, 3, 5}
    assert all(target == right(source) for source, target in found)
    assert {split_by_hand(source): name for name, part in rows.items() for source, _ in part} == {n: n for n in rows}
    again, other = (build(tmp_path / str(n) / "out", *flags, seed) for n, seed in enumerate("01"))
    assert again == rows != other


APT = """#!/bin/sh
test "$4" = update || exit 3
head -2 "$3" > "$SEEN"
grep -q '^Dir::Cache "/.*/cache";$' "$3" || exit 4
cp "$LISTS"/* "$(sed -n 's/^Dir::State::lists "\\(.*\\)";/\\1/p' "$3")/partial/.."
"""


def test_apt_fetches_into_a_folder_of_its_own(lists, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "apt-get"
    program.write_text(APT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LISTS", str(lists))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    flags = "--task", "translation", "--language", "pt_BR"
    assert build(tmp_path / "a" / "out", *flags) == build(tmp_path / "b" / "out", *flags, "--lists_dir", lists)
    assert (tmp_path / "seen").read_text() == '#clear Acquire::Languages;\nAcquire::Languages { "en"; "pt_BR"; };\n'

    program.write_text("#!/bin/sh\necho Err: no network >&2\nexit 100\n")
    with pytest.raises(ValueError, match="apt-get failed, or give --lists_dir: Err: no network"):
        build(tmp_path / "c" / "out", *flags)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apt-get: there is no such program here; run this on Debian, or give"):
        build(tmp_path / "c" / "out", *flags)
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(not HELPER.exists(), reason="apt reads compressed files, and is not here")
def test_compressed_indexes_say_the_same(lists, tmp_path):
    for path in lists.iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    (found, sums), expected = (read_descriptions(folder, ["en", "pt_BR"]) for folder in (tmp_path, lists))
    assert (found, {name.removesuffix(".gz"): value for name, value in sums.items()}) == expected
    (tmp_path / "Packages.lz4").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="apt-helper failed, or decompress the files: .*Packages.lz4"):
        read_descriptions(tmp_path, ["en"])


WRONG_FLAGS = {
    "language": (["--task", "translation"], "--language must be one other than en, e.g. de or pt_BR, got None"),
    "english": (["--task", "translation", "--language", "en"], "got en"),
    "unread": (
        ["--task", "sections", "--language", "de", "--seed", "1"],
        "--language must not be given with --task sections, got de; --seed must not be given with",
    ),
    "lists-unread": (["--task", "copy", "--lists_dir", "."], "--lists_dir must not be given with --task copy"),
    "longest": (["--task", "sections", "--longest", "0"], "--longest must be at least 1, got 0"),
    "longest-unread": (["--task", "copy", "--longest", "9"], "--longest must not be given with --task copy, got 9"),
    "no-lists": (["--task", "sections", "--lists_dir", "nowhere"], "--lists_dir must be a folder, got nowhere"),
    "counts": (["--task", "sort", "--count", "0", "--seed", "-1"], "--count must be at least 1, got 0; --seed must"),
    "length": (["--task", "sort", "--length", "0"], "--length must be at least 1, got 0"),
    "too-many": (["--task", "sort", "--length", "1", "--count", "14"], "--count must be at most 13 with --length 1"),
    "too-few": (["--task", "sort", "--count", "1"], "--task sort: there are too few pairs, "),
}


@pytest.mark.parametrize(("flags", "message"), WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_flags_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_pairs.main(["--output_dir", "out", *flags])
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output_dir must be a new or an empty folder, got ."):
        build_pairs.main(["--output_dir", ".", "--task", "copy"])


WRONG_INDEXES = {
    "missing": ({"Packages": b"", "a_Translation-de.gz": b""}, "must have indexes of en, got those of Packages, de"),
    "no-field": (
        {"Packages": b"", "Translation-en": b"Package a\n"},
        "Translation-en: must be lines of `Field: value`",
    ),
    "no-text": (
        {"Packages": b"", "Translation-en": b"Package: a\nDescription-md5: b\n"},
        "a stanza must have Description-en, got Package, Description-md5",
    ),
    "no-package": ({"Packages": b"\nSource: a\n", "Translation-en": b""}, "a stanza must have Package, got Source"),
    "no-text-at-all": ({"Packages": b"", "Translation-en": b"\xff"}, "Translation-en: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize(("files", "message"), WRONG_INDEXES.values(), ids=WRONG_INDEXES)
def test_wrong_indexes_are_refused(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_descriptions(tmp_path, ["en"])
