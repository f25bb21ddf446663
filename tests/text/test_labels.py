"""Label lists and prompt templates."""

from __future__ import annotations

import pytest

from xclip_fast import InputError
from xclip_fast.text import apply_template, clean_labels


def test_labels_keep_their_order_and_lose_outer_space() -> None:
    assert clean_labels([" zebra ", "ant\n", "\tmiddle  name"]) == ["zebra", "ant", "middle  name"]


def test_any_iterable_of_labels_will_do() -> None:
    assert clean_labels(label for label in ("a", "b")) == ["a", "b"]


@pytest.mark.parametrize("labels", [[], (), iter([])])
def test_no_label_is_an_error(labels) -> None:
    with pytest.raises(InputError, match="no labels"):
        clean_labels(labels)


@pytest.mark.parametrize("blank", ["", "  ", "\t\n", "\u00a0\u3000"])
def test_a_blank_label_is_named_by_its_place(blank: str) -> None:
    with pytest.raises(InputError, match="label 2 is blank"):
        clean_labels(["a", blank, "c"])


@pytest.mark.parametrize("second", ["Playing Sports", "playing  sports", " playing\tsports "])
def test_labels_the_tokenizer_cannot_tell_apart_are_named(second: str) -> None:
    with pytest.raises(InputError, match=r"labels 2 and 4 are the same, 'playing sports' and '[pP]laying"):
        clean_labels(["a", "playing sports", "b", second])


def test_an_undecodable_label_is_an_input_error() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        clean_labels(["fine", b"caf\xe9".decode("utf-8", "surrogateescape")])


def test_errors_are_one_short_line_whatever_the_label() -> None:
    hostile = "line\nbreak \x1b[31m" + "x" * 100_000
    with pytest.raises(InputError) as caught:
        clean_labels([hostile, hostile])
    message = str(caught.value)
    assert len(message) < 250
    assert message.isprintable()


@pytest.mark.parametrize("labels", ["a,b", [1, 2], ["a", None]])
def test_what_is_no_list_of_strings_is_refused(labels) -> None:
    with pytest.raises(ValueError, match="labels must be"):
        clean_labels(labels)


def test_a_hundred_thousand_labels() -> None:
    labels = [f"class {number}" for number in range(100_000)]
    assert clean_labels(labels) == labels
    with pytest.raises(InputError, match="labels 5 and 100001"):
        clean_labels([*labels, "CLASS 4"])


def test_template() -> None:
    assert apply_template(["dog", "cat"], "a video of {}.") == ["a video of dog.", "a video of cat."]


def test_braces_in_labels_and_elsewhere_in_the_template_are_text() -> None:
    assert apply_template(["{0} {}", "{x}"], "{a} {} }{") == ["{a} {0} {} }{", "{a} {x} }{"]


@pytest.mark.parametrize(("template", "found"), [("", 0), ("a video", 0), ("{0}", 0), ("{} and {}", 2)])
def test_a_template_has_one_place_for_the_label(template: str, found: int) -> None:
    with pytest.raises(InputError, match=f"has {found} places"):
        apply_template(["dog"], template)
