"""Which evaluation items training has seen, by content."""

from __future__ import annotations

from pathlib import Path

from vlmpo.data.index.overlap import Item, Overlap, find_overlaps


def find_overlap(training: list[Item], evaluation: list[Item]) -> Overlap:
    return find_overlaps(training, {"test": evaluation})["test"]


def test_overlap_goes_by_content_not_by_name(tmp_path: Path) -> None:
    for name, data in {"a": b"one", "b": b"two", "copy_of_a": b"one", "c": b"six"}.items():
        (tmp_path / name).write_bytes(data)

    def item(text: str, *names: str) -> Item:
        return Item(text, tuple(str(tmp_path / name) for name in names), f"{text}:{names}")

    training = [item("how many?", "a"), item("which one?", "b"), item("words only")]
    evaluation = [
        item("<image>\nHow  MANY?", "copy_of_a"),  # the same prompt under another name
        item("what colour?", "copy_of_a"),  # a seen image, a new question
        item("how many?", "c"),  # a seen question, a new image
        item("Words only"),  # text alone: seen whole
        item("new words"),
        item("how many?", "absent"),
    ]
    found = find_overlap(training, evaluation)
    assert (found.items, found.with_seen_image, found.seen_whole) == (6, 2, 2)
    assert found.examples[0] == evaluation[0].origin
    assert "2 show an image" in found.message("test")
    assert find_overlap(training, evaluation[4:]).message("test") is None


def test_bytes_and_files_are_the_same_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    found = find_overlap([Item("q", (str(tmp_path / "a"),), "")], [Item("q", (b"one",), "line 3")])
    assert (found.with_seen_image, found.seen_whole) == (1, 1)
    assert found.examples == ("line 3",)
