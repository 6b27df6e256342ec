"""Views of single pairs and answers: texts, coloured tokens, thumbnails that fit a budget."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmpo.report.files import Run
from vlmpo.report.kept import ScoredPair, ScoredResponse

_STRENGTHS = (0.05, 0.25, 1.0, 3.0)  # nats from which a token's colour gets one shade stronger
_TEXT_SHOWN = 1200  # characters of a prompt, a question or an answer
_TOKEN_SHOWN = 100
_NAMED_TOKENS = 3
_ANSWERS_SHOWN = 12


@dataclass(frozen=True)
class Token:
    """Holds one token: its text, a CSS class for its colour, and its numbers in words."""

    text: str
    css: str
    title: str


@dataclass(frozen=True)
class ResponseView:
    """Holds a response as it is shown."""

    title: str
    tokens: list[Token]
    summary: str


@dataclass(frozen=True)
class PairView:
    """Holds a pair as it is shown; ``images`` are data URLs."""

    title: str
    facts: str
    prompt: str
    images: list[str]
    image_note: str
    responses: list[ResponseView]


@dataclass(frozen=True)
class AnswerView:
    """Holds a question with the answers before and after training; ``before`` is None if it is not known."""

    question: str
    truth: str
    before: tuple[str, str] | None
    after: tuple[str, str]


def pair_views(pairs: Sequence[ScoredPair], kind: str, tokens: int, images: dict[str, str]) -> list[PairView]:
    """Return the pairs of ``kind``, the most extreme first.

    Args:
        pairs: of one run.
        kind: ``largest`` or ``smallest``.
        tokens: shown of a response at most.
        images: data URL by thumbnail.
    """
    mine = sorted((p for p in pairs if p.kind == kind), key=lambda p: -p.margin if kind == "largest" else p.margin)
    views = []
    for number, pair in enumerate(mine, 1):
        urls = [images[image] for image in pair.images if image in images]
        left = pair.num_media - len(urls)
        views.append(
            PairView(
                title=f"{number}. margin {pair.margin:+.3f}",
                facts=f"{pair.source}, {pair.origin}; {pair.seen_margin:+.3f} when last seen in training, "
                f"step {pair.seen_step}",
                prompt=cut(pair.prompt),
                images=urls,
                image_note=f"{left} more image{'s' * (left != 1)} or videos are not shown" if left > 0 else "",
                responses=[
                    _response("chosen", pair.chosen, tokens),
                    _response("rejected", pair.rejected, tokens),
                ],
            )
        )
    return views


def _response(title: str, response: ScoredResponse, most: int) -> ResponseView:
    moved = response.policy - response.reference
    summary = f"log-prob {response.policy:.2f}, reference {response.reference:.2f}: {moved:+.2f} nats"
    differences = [(policy - reference, text) for text, policy, reference in response.tokens if reference is not None]
    named = []
    for word, order in (("raised", -1), ("lowered", 1)):
        best = sorted((d for d in differences if d[0] * order < -_STRENGTHS[0]), key=lambda d: d[0] * order)
        if best:
            shown = ", ".join(f"“{cut(text.strip() or text, 24)}” {d:+.2f}" for d, text in best[:_NAMED_TOKENS])
            named.append(f"most {word}: {shown}")
    if not differences:
        named = ["the reference is kept as sums, so that no token can be coloured"]
    tokens = [_token(*token) for token in response.tokens[:most]]
    if (more := response.num_tokens - len(tokens)) > 0:
        tokens.append(Token(f" … {more} more token{'s' * (more != 1)}", "more", ""))
    return ResponseView(title, tokens, "; ".join([summary, *named]))


def _token(text: str, policy: float, reference: float | None) -> Token:
    text = cut(text, _TOKEN_SHOWN)
    if reference is None:
        return Token(text, "", f"log-prob {policy:.2f}")
    moved = policy - reference
    strength = sum(abs(moved) >= bound for bound in _STRENGTHS)
    css = f"{'up' if moved > 0 else 'down'}{strength}" if strength else ""
    return Token(text, css, f"{moved:+.2f} nats: {policy:.2f}, reference {reference:.2f}")


def cut(text: Any, limit: int = _TEXT_SHOWN) -> str:
    """Return a text, its end left out above ``limit`` characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


# ---- answers ----


def answer_views(run: Run) -> tuple[list[AnswerView], list[list[str]]]:
    """Return answers to held-out questions, those whose verdict changed first; and a table of how many changed."""
    before_all, after_all = run.answers
    before = {str(answer.get("question_id")): answer for answer in before_all}
    both = [(before.get(str(answer.get("question_id"))), answer) for answer in after_all]

    def right(answer: dict[str, Any] | None) -> bool:
        return answer is not None and answer.get("status") == "correct"

    counts: dict[tuple[bool, bool], int] = {}
    for old, new in both:
        if old is not None:
            counts[right(old), right(new)] = counts.get((right(old), right(new)), 0) + 1
    words = {True: "right", False: "not right"}
    table = [[words[old], words[new], str(count)] for (old, new), count in sorted(counts.items())]
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for old, new in both:
        groups.setdefault((right(old), right(new)), []).append((old, new))
    order = [(False, True), (True, False), (False, False), (True, True)]
    chosen = [pair for key in order for pair in groups.get(key, [])[: _ANSWERS_SHOWN // (2 if key[0] != key[1] else 6)]]
    views = [
        AnswerView(
            question=cut(new.get("question") or new.get("origin") or new.get("question_id") or ""),
            truth=cut(new.get("truth", ""), 200),
            before=None if old is None else (cut(old.get("text", "")), str(old.get("status", ""))),
            after=(cut(new.get("text", "")), str(new.get("status", ""))),
        )
        for old, new in chosen[:_ANSWERS_SHOWN]
    ]
    return views, table


# ---- thumbnails ----


def fitted_thumbnails(runs: Sequence[Run], budget: int) -> dict[str, str]:
    """Return data URLs of the runs' thumbnails, by thumbnail, that take at most ``budget`` characters together.

    If they take more, all are shrunk; what still does not fit is left out, the last ones first.
    """
    kept = dict.fromkeys(image for run in runs if run.kept for pair in run.kept.pairs for image in pair.images)
    total = sum(map(len, kept))
    each = budget // max(1, len(kept))
    urls: dict[str, str] = {}
    spent = 0
    for image in kept:
        small = image if total <= budget else _shrunk(image, each)
        kind = _kind(small)
        if kind and spent + len(small) + 40 <= budget:
            urls[image] = f"data:image/{kind};base64,{small}"
            spent += len(urls[image])
    return urls


def _kind(image: str) -> str | None:
    """Return the kind of an encoded file in base64, by its first bytes; None if it is none of ours."""
    return "png" if image.startswith("iVBORw0KGgo") else "jpeg" if image.startswith("/9j/") else None


def _shrunk(image: str, most: int) -> str:
    """Return the picture in at most ``most`` characters, if a quarter of its width and height will do."""
    if len(image) <= most:
        return image
    try:
        with Image.open(io.BytesIO(base64.b64decode(image, validate=True))) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, binascii.Error):
        return ""
    small = image
    for part in (1.0, 0.7, 0.5, 0.35, 0.25):
        file = io.BytesIO()
        size = (max(1, int(picture.width * part)), max(1, int(picture.height * part)))
        picture.resize(size).save(file, "JPEG", quality=65)
        small = base64.b64encode(file.getvalue()).decode()
        if len(small) <= most:
            break
    return small
