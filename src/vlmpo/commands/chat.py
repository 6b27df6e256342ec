"""``vlmpo chat``: ask a trained model and its reference side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmpo.commands.trained import Trained, find_trained, load_reference, load_trained
from vlmpo.data.encode.images import open_image
from vlmpo.data.encode.processors import reads_images
from vlmpo.errors import RecipeError, RecordError
from vlmpo.generate.base import Generated, Sampling
from vlmpo.generate.conversation import Conversation, Speaker
from vlmpo.generate.local import LocalEngine
from vlmpo.log import logger, print_error, print_line, shown
from vlmpo.recipe import EvaluateSection

WIDE = 80  # columns of a terminal from which answers stand side by side
_COMMANDS = "/image PATH adds an image to the next question, /new starts a new conversation, /quit ends"


def chat(
    run: str,
    images: Sequence[Path] = (),
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
    web: bool = False,
) -> None:
    """Ask the model of ``run`` and its reference: questions from the terminal, one a line from a pipe, or a web page.

    Args:
        run: a run folder, a checkpoint, a model folder or adapter, or a Hub name.
        images: they come with the first question; from a pipe with each.
        temperature: 0 takes the most likely token.
        max_new_tokens: of an answer; by default the recipe's ``evaluate.max_new_tokens``, or that key's default.
        web: open a local web page.

    Raises:
        VlmpoError: there is no such model yet, it cannot be loaded, or an image cannot be read.
    """
    for image in images:
        _check_image(image)
    if web:
        from vlmpo.commands.chat_web import check_gradio

        check_gradio()
        if len(images) > 1:
            raise RecipeError("--web: the page asks about one image at a time; give one, or none")
    trained = find_trained(run)
    logger.info(f"model: {trained.what}")
    by_turns = not web and sys.stdin.isatty() and sys.stdout.isatty()
    conversation = _open_conversation(
        trained, _sampling(trained, temperature, max_new_tokens), with_images=bool(images), follows=by_turns or web
    )
    if web:
        from vlmpo.commands.chat_web import serve_page

        serve_page(conversation, [str(image) for image in images])
    elif by_turns:
        Session(conversation, images, Console()).talk(_typed())
    else:
        logger.info("each line is a question of its own")
        Session(conversation, images, None).talk(_piped())


def _check_image(path: Path) -> None:
    """Raise RecordError if ``path`` is no image that can be read."""
    if not path.is_file():
        raise RecordError("missing_image", "", f"there is no image file {path}")
    open_image(path)


def _sampling(trained: Trained, temperature: float, max_new_tokens: int | None) -> Sampling:
    section = trained.recipe.evaluate if trained.recipe is not None else None
    default = section.max_new_tokens if section is not None else EvaluateSection().max_new_tokens
    return Sampling(temperature, 1.0, max_new_tokens or default)


def _open_conversation(trained: Trained, sampling: Sampling, *, with_images: bool, follows: bool) -> Conversation:
    """Load the model and its reference; log what they are and how they are asked."""
    model, processor = load_trained(trained)
    if with_images and not reads_images(processor):
        raise RecipeError(f"{trained.path} reads no images; leave them out")
    data = trained.recipe.data.model_dump(include={"max_tiles", "video_frames"}) if trained.recipe is not None else {}
    engine = LocalEngine(model, processor, sampling, 1, **data)
    engine.check_vision()
    speakers = [Speaker("trained" if trained.reference else "model", engine, nullcontext)]
    if (reference := load_reference(trained, model)) is not None:
        logger.info(f"reference: {reference.what}")
        other = engine if reference.model is model else LocalEngine(reference.model, processor, sampling, 1, **data)
        speakers.append(Speaker("reference", other, reference.while_asked))
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    logger.info(f"answers: {how}, at most {sampling.max_new_tokens} tokens (--max-new-tokens)")
    for notice in engine.notices:
        logger.info(f"note: {notice}")
    if follows and not engine.takes_turns():
        logger.info("the chat template takes no earlier turns: each question is a new conversation")
        follows = False
    return Conversation(speakers, follows=follows)


# ---- a session ----


class Session:
    """Asks what it is given, line by line, and shows the answers.

    Args:
        conversation: who is asked.
        images: those the first question brings; without a terminal every question brings them.
        console: the terminal; None prints plain lines.
    """

    def __init__(self, conversation: Conversation, images: Sequence[Any], console: Console | None) -> None:
        self._conversation = conversation
        self._given = list(images)
        self._waiting = list(images)
        self._console = console

    def talk(self, lines: Iterator[str]) -> None:
        """Take each line as a command or a question, to the end or to ``/quit``."""
        if self._console is not None:
            print_line(_COMMANDS + ("; the next question brings the images given" if self._given else ""))
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/"):
                self._obey(text)
            elif text:
                self._ask(text)

    def _obey(self, command: str) -> None:
        word, _, rest = command.partition(" ")
        path = rest.strip().strip("'\"")
        if word == "/new":
            self._conversation.restart()
            self._waiting = list(self._given)
        elif word == "/image" and path:
            image = Path(path).expanduser()
            try:
                _check_image(image)
            except RecordError as error:
                print_error("error: ", error.detail)
                return
            self._waiting.append(image)
        else:
            print_error("error: ", f"{word} is no command; {_COMMANDS}")

    def _ask(self, question: str) -> None:
        terminal = self._console
        try:
            with terminal.status("answering") if terminal is not None else nullcontext():
                answers = self._conversation.ask(question, self._waiting)
        except RecordError as error:
            print_error("error: ", error.detail)
            return
        if terminal is not None:
            self._waiting = []
        show_answers([speaker.heading for speaker in self._conversation.speakers], answers, terminal, question)


def show_answers(
    headings: Sequence[str], answers: Sequence[Generated], console: Console | None, question: str = ""
) -> None:
    """Show answers side by side on a wide console, one below the other on a narrow one, or as plain lines (None)."""
    texts = [_text(answer) for answer in answers]
    if console is None:
        for heading, text in [("question", question), *zip(headings, texts, strict=True)]:
            print_line(f"{heading}: {text}".replace("\n", "\n  "))
        print_line("")
    elif console.width >= WIDE and len(texts) > 1:
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for heading in headings:
            table.add_column(heading, ratio=1, overflow="fold")
        table.add_row(*map(Text, texts))
        console.print(table)
    else:
        for heading, text in zip(headings, texts, strict=True):
            console.print(Text(heading, style="bold"))
            console.print(Text(text, overflow="fold"))


def _text(answer: Generated) -> str:
    """Return an answer as a terminal may be sent it."""
    cut = " [cut off at the limit of tokens]" if answer.finish_reason == "length" else ""
    return (shown(answer.text) or "[nothing]") + cut


def _typed() -> Iterator[str]:
    """Yield what is typed on the terminal, to Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing and history
    while True:
        try:
            yield input("\n> ")
        except EOFError:
            print_line("")
            return


def _piped() -> Iterator[str]:
    if (reconfigure := getattr(sys.stdin, "reconfigure", None)) is not None:
        reconfigure(errors="replace")
    yield from sys.stdin
