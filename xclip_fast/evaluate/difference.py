"""Which classes of one data set another does not have, by their names: Kinetics-600 against Kinetics-400."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xclip_fast.errors import InputError
from xclip_fast.text import clean_labels
from xclip_fast.text.labels import shown

# no comparison of names sees this one; the published 220 classes (Chen and Huang, ICCV 2021) leave it out
KINETICS_RENAMED = {"inflating balloons": "balloon blowing"}

_LEAST_COMMON = 2  # words: "digging" and "clam digging" are two classes


@dataclass(frozen=True)
class Renamed:
    """A class that has another name here, and is not new.

    Attributes:
        name: as the newer data set has it.
        old: as the older one has it.
        why: what the names differ in.

    Example:
        >>> from xclip_fast.evaluate import Renamed
        >>> Renamed("dyeing hair", "dying hair", "one letter").old
        'dying hair'
    """

    name: str
    old: str
    why: str


@dataclass(frozen=True)
class NewClasses:
    """The classes that are new, and those that only seem so.

    Attributes:
        names: the new ones, in the order of the newer data set.
        given: how many names are not, letter for letter, among the older ones.
        renamed: those of them that are an older class by its name, see ``new_classes``.
        known: those of them that are an older class though their names do not tell.

    Example:
        >>> from xclip_fast.evaluate import new_classes
        >>> found = new_classes(["yoga", "dyeing hair", "arguing"], ["yoga", "dying hair"])
        >>> found.names, found.given
        (('arguing',), 2)
    """

    names: tuple[str, ...]
    given: int
    renamed: tuple[Renamed, ...]
    known: tuple[Renamed, ...]

    @property
    def by_name(self) -> int:
        """How many are new as far as names tell."""
        return len(self.names) + len(self.known)

    def __str__(self) -> str:
        lines = [f"{self.given} names are not among the older ones letter for letter"]
        if self.renamed:
            lines.append(f"{len(self.renamed)} of them are older classes, renamed: that leaves {self.by_name}")
            lines += [f"  {one.name!r} is {one.old!r}: {one.why}" for one in self.renamed]
        if self.known:
            lines.append(f"what makes {self.by_name} of {len(self.names)}, as no comparison of names sees it:")
            lines += [f"  {one.name!r} is {one.old!r}" for one in self.known]
        return "\n".join([*lines, f"new classes: {len(self.names)}"])


def new_classes(newer: Sequence[str], older: Sequence[str], known: Mapping[str, str] = KINETICS_RENAMED) -> NewClasses:
    """The classes of ``newer`` that ``older`` does not have.

    A name that is not among the older ones letter for letter may still be an older class. An older name that ``newer``
    has no more is looked for, once, among the new ones: equal but for case and punctuation; but for what stands in
    parentheses; but for articles; but for words left out or put elsewhere, with two words in common; but for one
    letter; but for a word made longer ("tie", "necktie"). The lists that X-CLIP ships differ in 232 names; 11 are
    renamed by these rules, which leaves 221. The published number is 220 (Chen and Huang, "Elaborative Rehearsal for
    Zero-shot Action Recognition", ICCV 2021): "inflating balloons" is "balloon blowing" by another word.

    Args:
        newer: class names, such as the 600 of Kinetics-600.
        older: class names, such as the 400 of Kinetics-400.
        known: newer to older names that are one class though their names do not tell.

    Raises:
        InputError: a list holds a blank or repeated name, or nothing is new.

    Example:
        >>> from xclip_fast.evaluate import new_classes
        >>> kinetics_400 = ["hugging", "tying tie", "balloon blowing"]
        >>> kinetics_600 = ["hugging (not baby)", "hugging baby", "tying necktie", "inflating balloons"]
        >>> print(new_classes(kinetics_600, kinetics_400))
        4 names are not among the older ones letter for letter
        2 of them are older classes, renamed: that leaves 2
          'hugging (not baby)' is 'hugging': what stands in parentheses
          'tying necktie' is 'tying tie': a longer word
        what makes 2 of 1, as no comparison of names sees it:
          'inflating balloons' is 'balloon blowing'
        new classes: 1
    """
    newer, older = clean_labels(newer), clean_labels(older)
    left = [name for name in newer if name not in set(older)]
    given = len(left)
    gone = [name for name in older if name not in set(newer)]
    renamed = []
    # the closest kind of likeness is looked for first, in all names
    for why, alike in _RULES:
        for old in list(gone):
            match = next((name for name in left if alike(name, old)), None)
            if match is not None:
                renamed.append(Renamed(match, old, why))
                left.remove(match)
                gone.remove(old)
    told = [Renamed(name, known[name], "another word") for name in left if known.get(name) in gone]
    names = tuple(name for name in left if name not in {one.name for one in told})
    if not names:
        raise InputError(f"all {len(newer)} classes are among the {len(older)} older ones: give the newer list first")
    return NewClasses(names, given, tuple(renamed), tuple(told))


def draw_classes(names: Sequence[str], count: int = 160, times: int = 3, seed: int = 0) -> list[list[str]]:
    """Random choices of classes, each made without regard to the others, in the order of the names.

    Args:
        names: to choose from, such as the 220 new classes.
        count: how many to choose; 160 in the zero-shot protocol of Kinetics-600.
        times: how many choices.
        seed: the same seed and names give the same choices.

    Raises:
        InputError: there are fewer names than are to be chosen.
        ValueError: a number is less than 1.

    Example:
        >>> from xclip_fast.evaluate import draw_classes
        >>> [len(draw) for draw in draw_classes(["a", "b", "c", "d"], count=3)]
        [3, 3, 3]
    """
    if count < 1 or times < 1:
        raise ValueError(f"count and times must be at least 1, found {count} and {times}")
    if count > len(names):
        raise InputError(f"draws of {count} classes were asked for, and there are {len(names)}: ask for fewer")
    draws = []
    for number in range(times):
        # a generator of strings is the same on every machine and in every version
        chosen = set(random.Random(f"classes {seed} {number}").sample(range(len(names)), count))
        draws.append([name for place, name in enumerate(names) if place in chosen])
    return draws


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def _plain(name: str) -> list[str]:
    return [word for word in _words(name) if word not in ("a", "an", "the")]


def _parenthesis(one: str, other: str) -> bool:
    # of two such names, one with and one without, or they tell two classes apart: "(in game)" and "(not in game)"
    bare = [re.sub(r"\([^)]*\)", " ", name) for name in (one, other)]
    return _words(bare[0]) == _words(bare[1]) and (bare[0] == one) != (bare[1] == other)


def _same_words(one: str, other: str) -> bool:
    few, many = sorted((set(_plain(one)), set(_plain(other))), key=len)
    return len(few) >= _LEAST_COMMON and few <= many and "not" not in many - few


def _one_letter(one: str, other: str) -> bool:
    short, long = sorted((" ".join(_plain(one)), " ".join(_plain(other))), key=len)
    if not short or len(long) - len(short) > 1:
        return False
    place = next((place for place, pair in enumerate(zip(short, long, strict=False)) if len(set(pair)) > 1), len(short))
    return short[place + (len(short) == len(long)) :] == long[place + 1 :]


def _longer_word(one: str, other: str) -> bool:
    pairs = list(zip(_plain(one), _plain(other), strict=False))
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    if len(_plain(one)) != len(_plain(other)) or len(pairs) < _LEAST_COMMON or len(differing) != 1:
        return False
    short, long = sorted(differing[0], key=len)
    return long.endswith(short)


_Alike = Callable[[str, str], bool]
_RULES: tuple[tuple[str, _Alike], ...] = (
    ("case or punctuation", lambda one, other: _words(one) == _words(other)),
    ("what stands in parentheses", _parenthesis),
    ("an article", lambda one, other: _plain(one) == _plain(other)),
    ("the words around it", _same_words),
    ("one letter", _one_letter),
    ("a longer word", _longer_word),
)


def order_of(names: Sequence[str], chosen: Sequence[str]) -> dict[int, int]:
    """Places in ``names`` of the chosen ones, to their places in ``chosen``.

    Raises:
        InputError: a chosen one is not among the names.

    Example:
        >>> from xclip_fast.evaluate.difference import order_of
        >>> order_of(["a", "b", "c"], ["c", "a"])
        {2: 0, 0: 1}
    """
    places = {name: place for place, name in enumerate(names)}
    for name in chosen:
        if name not in places:
            raise InputError(f"class {shown(name)} is not among the {len(names)} of the list: choose from those")
    return {places[name]: place for place, name in enumerate(chosen)}
