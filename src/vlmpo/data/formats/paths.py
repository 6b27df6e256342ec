"""Decide which file a record's path or ``file://`` address means, and refuse one outside the folders it may be in."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

from vlmpo.data.formats.base import RecordContext
from vlmpo.errors import shorten

# Ways to name an image or video, as `vlmpo inspect` counts them.
RELATIVE, ABSOLUTE, ADDRESS, EMBEDDED = "relative paths", "absolute paths", "file:// addresses", "embedded"


def is_below(path: str, folder: str) -> bool:
    """Return whether a path is below a folder, or the folder itself, by their names alone."""
    path, folder = os.path.normpath(path), os.path.normpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def is_really_below(path: str, root: str) -> bool:
    """Return whether a path is below a folder, or the folder itself, with all links followed."""
    try:
        return is_below(os.path.realpath(path), os.path.realpath(root))
    except (OSError, ValueError):  # no file has such a name
        return False


def local_path(value: str, kind: str, key: str, context: RecordContext) -> str:
    """Return the path of the image or video that a record names; messages call it ``key``.

    A link below the image root is followed, as the snapshots of the Hub are made of links. Without an image root (data
    in memory) relative paths are the user's own.

    Raises:
        RecordError: ``missing_image`` or ``missing_video`` for the address of another host; ``outside_image_root``.
    """
    path = _named(value, kind, key, context)
    rules, root = context.paths, context.image_root
    full = os.path.join(root, path)
    if os.pardir in path:
        full = os.path.normpath(full)  # after a link, `..` would lead to the folder above its target
    remedy = "name the folder that holds them all under `image_root`"
    if os.path.isabs(path):
        context.forms.add(ADDRESS if path != value else ABSOLUTE)
        folders, what = rules.absolute_in, "is outside its data set"
        is_inside = folders is None or any(is_below(full, folder) for folder in (root, *folders))
        remedy = f"a data set of the Hub may not name files of this machine; {remedy} if you trust it"
    else:
        context.forms.add(RELATIVE)
        folder = rules.within or root
        is_inside, what = not root or os.pardir not in path or is_below(full, folder), f"leads out of {folder}"
    if is_inside and rules.confine:
        is_inside, what = is_really_below(full, root), f"leads out of {root}, and data.confine is true"
    if not is_inside:
        raise context.error("outside_image_root", f"`{key}` {what}: {shorten(value)}; {remedy}")
    return full


def _named(value: str, kind: str, key: str, context: RecordContext) -> str:
    """Return the path that is written, or that a ``file://`` address stands for."""
    if value.startswith("file://"):
        try:
            address = urlsplit(value)
        except ValueError as error:
            detail = f"`{key}` is not a file address ({error}): {shorten(value)}; write the path"
            raise context.error(f"missing_{kind}", detail) from error
        if address.netloc not in ("", "localhost"):
            detail = f"`{key}` names the host {shorten(address.netloc)}: {shorten(value)}; write the path"
            raise context.error(f"missing_{kind}", detail)
        return unquote(address.path)
    if value.startswith(("http://", "https://")):
        detail = f"`{key}` is a web address ({shorten(value)}); save it as a file and name that, or embed its bytes"
        raise context.error(f"missing_{kind}", detail)
    return value
