"""The names of classes: the official label list, and names as words."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from xclip_fast.data.lists import check_number, read_text
from xclip_fast.errors import InputError
from xclip_fast.text.labels import clean_labels

HEADER = ["id", "name"]
# before the second word of "applyMakeup", and of "TVShow", but not of "LSATs"
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})")


def read_labels(path: str | Path) -> list[str]:
    """The class names of a label list: a CSV with the header ``id,name`` and the ids 0 to K - 1 in any order.

    Raises:
        InputError: it cannot be read, is no such file, an id is missing or there twice, or a name is blank or there
            twice.

    Example:
        >>> from pathlib import Path
        >>> from xclip_fast.data import read_labels
        >>> _ = Path("labels.csv").write_text('id,name\\n1,"cooking, outdoors"\\n0,riding a bike\\n')
        >>> read_labels("labels.csv")
        ['riding a bike', 'cooking, outdoors']
    """
    where = str(path)
    names: dict[int, str] = {}
    lines = csv.reader(read_text(path, "a label list").splitlines(keepends=True), strict=True)
    try:
        header = next(lines, [])
        if [cell.strip() for cell in header] != HEADER:
            raise InputError(f"{where}: the first line must be 'id,name', found {','.join(header)[:60]!a}")
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(HEADER):
                raise InputError(
                    f"{where}, line {lines.line_num}: {len(cells)} fields where there must be 2, id and name; "
                    "put a name with a comma in quotes"
                )
            number = check_number(cells[0], f"{where}, line {lines.line_num}: the id")
            if number in names:
                raise InputError(f"{where}, line {lines.line_num}: the id {number} is there twice: give each class one")
            names[number] = cells[1]
    except csv.Error as error:
        raise InputError(f"{where}, line {lines.line_num}: no CSV ({error}): write lines of id,name") from None
    gap = next((number for number in range(len(names)) if number not in names), None)
    if gap is not None:
        raise InputError(
            f"{where}: {len(names)} classes need the ids 0 to {len(names) - 1}, found up to {max(names)} and no {gap}: "
            "number them without a gap from 0"
        )
    try:
        return clean_labels(names[number] for number in range(len(names)))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def normalise_names(classes: Iterable[str], *, split_camel_case: bool = True) -> list[str]:
    """Class names as the words of a sentence: lower case, and spaces for underscores.

    Args:
        classes: names as data sets have them.
        split_camel_case: also put spaces between the words of "ApplyEyeMakeup".

    Raises:
        InputError: a name is blank, or two are the same now.

    Example:
        >>> from xclip_fast.data import normalise_names
        >>> normalise_names(["ApplyEyeMakeup", "brush_hair", "taking LSATs"])
        ['apply eye makeup', 'brush hair', 'taking lsats']
        >>> normalise_names(["YoYo"], split_camel_case=False)
        ['yoyo']
    """
    return clean_labels(_words(name, split_camel_case) for name in classes)


def _words(name: str, split_camel_case: bool) -> str:
    spaced = name.replace("_", " ")
    if split_camel_case:
        spaced = _CAMEL.sub(" ", spaced)
    return " ".join(spaced.split()).lower()
