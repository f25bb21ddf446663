"""Label lists and prompt templates."""

from __future__ import annotations

from collections.abc import Iterable

from xclip_fast.errors import InputError


def clean_labels(labels: Iterable[str]) -> list[str]:
    """Labels without surrounding white space, in the order given.

    Raises:
        InputError: there is no label, a label is blank or not valid Unicode, or two differ in case or spacing alone,
            which the tokenizer cannot tell apart.
        ValueError: ``labels`` is a string or holds something other than strings.

    Example:
        >>> from xclip_fast.text import clean_labels
        >>> clean_labels([" cooking", "riding a bike"])
        ['cooking', 'riding a bike']
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of strings, found the string {shown(labels)}")
    cleaned: list[str] = []
    seen: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if not isinstance(label, str):
            raise ValueError(f"labels must be strings, found {type(label).__name__} at place {number}")
        check_unicode(label)
        text = label.strip()
        if not text:
            raise InputError(f"label {number} is blank: give each class a name")
        first = seen.setdefault(" ".join(text.split()).lower(), number)
        if first != number:
            raise InputError(
                f"labels {first} and {number} are the same, {shown(cleaned[first - 1])} and {shown(text)}: "
                "give each class one name"
            )
        cleaned.append(text)
    if not cleaned:
        raise InputError("no labels were given: name at least one class")
    return cleaned


def apply_template(labels: Iterable[str], template: str) -> list[str]:
    """Each label put in the place of ``{}`` in a template such as ``"a video of {}"``; other braces stay as they are.

    Raises:
        InputError: the template does not hold exactly one ``{}``.

    Example:
        >>> from xclip_fast.text import apply_template
        >>> apply_template(["cooking"], "a video of {}")
        ['a video of cooking']
    """
    if template.count("{}") != 1:
        raise InputError(f"template {shown(template)} has {template.count('{}')} places '{{}}' for a label: use one")
    before, after = template.split("{}")
    return [before + label + after for label in labels]


def check_unicode(text: str) -> None:
    """Refuse what has no UTF-8 form: lone surrogates, as they come from undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"text {shown(text)} is not valid Unicode: write it in UTF-8") from None


def shown(text: str) -> str:
    """A text as an error message shows it: ASCII, quoted, cut."""
    quoted = ascii(text)
    return quoted if len(quoted) <= 60 else f"{quoted[:57]}..."
