"""The videos that could not be decoded, so that none is tried twice."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

from xclip_fast.errors import InputError
from xclip_fast.files import check_writable, parse_json, replacing

_FORMAT = "xclip_fast quarantine 1"
_MAX_BYTES = 256 << 20
_log = logging.getLogger("xclip_fast")


class Quarantine:
    """The list of bad videos with the reasons, in memory and in a JSON file where a path is given.

    What the file lists already is not decoded again: delete it when the videos were repaired. Several processes need a
    file each. ``reasons`` maps names of videos to reasons.

    Args:
        path: the file, replaced as a whole when the list grows.

    Raises:
        InputError: the file cannot be read, is no such list, or could not be written.

    Example:
        >>> from xclip_fast.data import Quarantine
        >>> bad = Quarantine("quarantine.json")
        >>> bad.add("a.mp4", "a.mp4: an empty file; give a video file")
        >>> bad.save()
        >>> "a.mp4" in Quarantine("quarantine.json").reasons
        True
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()
        self._saved = 0
        if self.path is not None:
            check_writable(self.path)
            if self.path.exists():
                self.reasons = _read(self.path)
                self._saved = len(self.reasons)

    def add(self, video: str, reason: str) -> None:
        """Put a video on the list, if it is not there; any thread may."""
        with self._lock:
            if video in self.reasons:
                return
            self.reasons[video] = reason
        _log.warning("%s (another video takes its place)", reason)

    def save(self) -> None:
        """Write the file, if there is one and the list grew.

        Raises:
            InputError: it can't be written.
        """
        with self._lock:
            if self.path is None or len(self.reasons) == self._saved:
                return
            found = dict(sorted(self.reasons.items()))
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"format": _FORMAT, "videos": found}, indent=1), encoding="utf-8")
            self._saved = len(found)


def _read(path: Path) -> dict[str, str]:
    where = repr(str(path))
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {where}: {error.strerror}") from None
    if len(content) > _MAX_BYTES:
        raise InputError(f"{where} is too long for a list of bad videos: more than {_MAX_BYTES} bytes")
    found = parse_json(content, where)
    videos = found.get("videos")
    if found.get("format") != _FORMAT or not isinstance(videos, dict):
        raise InputError(f"{where} is no list of bad videos: choose another name, or delete it")
    if not all(isinstance(reason, str) for reason in videos.values()):
        raise InputError(f"{where} is damaged: a reason is no text: delete it")
    return videos
