"""Rename the keys of records, and the speakers of their messages, as LLaMA-Factory's ``dataset_info.json`` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmpo.data.formats.base import RecordContext
from vlmpo.data.formats.turns import message_list

# Names of the columns in dataset_info.json, and the keys that vlmpo's parsers read.
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    **{name: name for name in ("history", "system", "tools", "images", "videos", "audios")},
    **{name: name for name in ("chosen", "rejected", "kto_tag")},
}
# Names of its tags, with their defaults.
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_NEEDED = ("instruction", "conversations", "chosen", "rejected")
_SPEAKERS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}


@dataclass(frozen=True)
class ColumnMap:
    """Says what the keys of a data set's records are called.

    Attributes:
        columns: pairs of the key that a parser reads and the record's own.
        tags: pairs of a tag and its value, for all of TAGS; empty to leave messages as they are.
    """

    columns: tuple[tuple[str, str], ...] = ()
    tags: tuple[tuple[str, str], ...] = ()

    def renamed(self, record: Mapping[str, Any], context: RecordContext) -> dict[str, Any]:
        """Return a record with the keys and speakers that the parsers of LLaMA-Factory's formats read.

        Raises:
            RecordError: ``missing_field`` if it lacks a column that is needed.
        """
        found: dict[str, Any] = {}
        for key, column in self.columns:
            if column in record:
                found[key] = record[column]
            elif key in _NEEDED and (key != "rejected" or context.need_rejected):
                detail = f"`{column}` is missing, which dataset_info.json names as the column of `{key}`"
                raise context.error("missing_field", detail)
        mapped = {column for _, column in self.columns}
        for key, value in record.items():
            if key not in mapped:
                found[f"{key} (not mapped)" if key in found else key] = value
        if self.tags:
            for key in ("conversations", "chosen", "rejected"):
                if key in found:
                    found[key] = self._translated(found[key])
        return found

    def _translated(self, value: Any) -> Any:
        """Return messages with ``role`` and ``content`` for their tags; anything else as it is."""
        tags = dict(self.tags)
        role, content = tags["role_tag"], tags["content_tag"]
        if isinstance(value, Mapping) and isinstance(value.get(role), str):
            names = {tags[tag]: name for tag, name in _SPEAKERS.items()}
            rest = {key: part for key, part in value.items() if key not in (role, content)}
            return {**rest, "role": names.get(value[role], value[role]), "content": value.get(content)}
        messages = message_list(value)
        if messages is None:
            return value
        return [self._translated(message) if isinstance(message, Mapping) else message for message in messages]
