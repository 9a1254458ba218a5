"""Pictures that a reader can read: a colour for each model, few lines, and legends in words."""

import pytest
from draw_positions import legends

from aft.drawing import COLOURS, MOST_LINES, colour_of, groups, line_styles


def test_a_model_has_one_colour_everywhere():
    first = line_styles(["aft-conv", "transformer", "aft-simple"])
    second = line_styles(["aft-simple-decay", "aft-conv-decay"])
    assert first["aft-conv"]["color"] == second["aft-conv-decay"]["color"] == colour_of("aft-conv-32-32")
    assert first["aft-simple"]["color"] == second["aft-simple-decay"]["color"]
    assert len({style["color"] for style in first.values()}) == 3


def test_variants_of_a_model_have_other_dashes():
    names = ["aft-conv", "aft-conv-decay", "aft-conv-carried", "other", "one-more"]
    styles = line_styles(names)
    assert len({styles[name]["color"] for name in names[:3]}) == 1
    assert len({tuple(style.values()) for style in styles.values()}) == 5
    assert styles["other"]["color"] in COLOURS and styles["other"]["color"] != styles["one-more"]["color"]


@pytest.mark.parametrize("names", [["w-8", "w-128", "w-32"], ["aft-conv-4-32", "aft-conv-1-32", "aft-conv-32-32"]])
def test_a_sweep_has_colours_in_its_order(names):
    styles = line_styles(names)

    def light(name: str) -> int:
        colour = styles[name]["color"]
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    def number(name: str) -> int:
        return sum(map(int, name.replace("aft-conv", "").strip("w-").split("-")))

    assert [light(name) for name in sorted(names, key=number)] == sorted(map(light, names))
    assert len(set(map(light, names))) == 3 and {style["linestyle"] for style in styles.values()} == {"-"}


@pytest.mark.parametrize("count", [1, 6, 7, 11, 12, 16])
@pytest.mark.parametrize("reference", [None, "3"])
def test_pictures_have_few_lines_and_the_reference(count, reference):
    names = [str(index) for index in range(count)]
    found = groups(names, reference)
    assert all(len(group) <= MOST_LINES for group in found)
    assert {name for group in found for name in group} == set(names)
    assert sum(map(len, found)) == count + (len(found) - 1 if reference in names else 0)
    assert all(reference in group for group in found) or reference not in names
    assert all(group == sorted(group, key=int) for group in found)


def rows(model: str, protocol: str) -> list[dict]:
    return [{"model": model, "protocol": protocol}]


def test_legends_are_words():
    one = [rows("runs/aft-conv-seed0", "carried, T = 512, L = 7"), rows("runs/aft-simple-seed1", "carried, T = 9")]
    assert legends(one) == ["aft-conv", "aft-simple"]
    assert legends([*one, rows("runs/gpt2", "refreshed, T = 1")]) == [
        "aft-conv, as one stream",
        "aft-simple, as one stream",
        "gpt2, starting anew",
    ]
