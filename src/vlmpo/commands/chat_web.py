"""The web page of ``vlmpo chat --web``: on this machine only, by gradio, which is optional."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from vlmpo.errors import RecordError, RunError
from vlmpo.generate.conversation import Conversation
from vlmpo.log import shown


def check_gradio() -> None:
    """Raise RunError if gradio is not installed."""
    if find_spec("gradio") is None:
        raise RunError("--web needs gradio, which is not installed: pip install 'vlmpo[web]'")


def serve_page(conversation: Conversation, images: Sequence[str]) -> None:
    """Serve the page on 127.0.0.1, and open it, until the process is stopped."""
    build_page(conversation, images).launch(server_name="127.0.0.1", share=False, inbrowser=True, quiet=False)


class Page:
    """Holds what the page shows: what was asked and answered, for each speaker.

    Args:
        conversation: who is asked.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._transcripts = [""] * len(conversation.speakers)
        self._seen: str | None = None

    def ask(self, question: str, image: str | None) -> list[str]:
        """Ask, with ``image`` if it is another than before; return the cleared question and the transcripts."""
        if not question.strip():
            return [question, *self._transcripts]
        try:
            answers = self._conversation.ask(question, [image] if image not in (None, self._seen) else [])
        except RecordError as error:
            return [question, *(f"{text}error: {shown(error.detail)}\n\n" for text in self._transcripts)]
        self._seen = image
        for index, answer in enumerate(answers):
            self._transcripts[index] += f"> {question}\n{shown(answer.text)}\n\n"
        return ["", *self._transcripts]

    def restart(self) -> list[str]:
        """Forget all turns; return empty transcripts."""
        self._conversation.restart()
        self._seen = None
        self._transcripts = [""] * len(self._transcripts)
        return ["", *self._transcripts]


def build_page(conversation: Conversation, images: Sequence[str]) -> Any:
    """Return the page as gradio's Blocks. Answers stand in text boxes, which interpret no markup."""
    import gradio

    page = Page(conversation)
    with gradio.Blocks(title="vlmpo chat", analytics_enabled=False) as blocks:
        image = gradio.Image(value=images[0] if images else None, type="filepath", label="image", height=240)
        with gradio.Row():
            answers = [
                gradio.Textbox(label=speaker.heading, lines=12, interactive=False) for speaker in conversation.speakers
            ]
        question = gradio.Textbox(label="question", placeholder="Enter asks")
        with gradio.Row():
            ask, new = gradio.Button("Ask", variant="primary"), gradio.Button("New conversation")
        for event in (ask.click, question.submit):
            event(page.ask, [question, image], [question, *answers])
        new.click(page.restart, [], [question, *answers])
    return blocks
