"""Parts of the page that several views have. Every text goes in as text, never as markup."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from nicegui import ui

from qwen_lit.errors import UserError
from qwen_lit.studio.draft import Draft
from qwen_lit.studio.jobs import Job, shown_command
from qwen_lit.studio.studio import Studio
from qwen_lit.studio.texts import texts

CSS = """
body { overflow-wrap: anywhere; }
.marked > div { display: inline; white-space: pre-wrap; }
.trained { background: rgba(46, 160, 67, .28); border-radius: 3px; }
.mono { font-family: ui-monospace, monospace; font-size: .8rem; white-space: pre-wrap; }
.log { max-height: 18rem; overflow: auto; width: 100%; background: rgba(128, 128, 128, .1); padding: .5rem; }
.tail { display: flex; flex-direction: column-reverse; }
.nicegui-content { padding: .5rem; max-width: 1400px; margin: 0 auto; }
.q-tab-panel { padding: .5rem 0; }
"""


class View:
    """One browser's view: its language, and the draft that it changes."""

    def __init__(self, studio: Studio, language: str) -> None:
        """Reads the draft.

        Args:
            studio: that all views share.
            language: of this one.
        """
        self.studio, self.language, self.words = studio, language, texts(language)
        self.draft: Draft = studio.draft()
        self.at_leave: Callable[[], Awaitable[None]] | None = None
        """What ends when the browser goes elsewhere."""

    def t(self, key: str, **values: object) -> str:
        """The words of a key, with values in them."""
        return self.words[key].format(**values) if values else self.words[key]

    async def leave(self) -> None:
        """End what belongs to the part that is shown."""
        if self.at_leave is not None:
            await self.at_leave()
            self.at_leave = None

    def keep(self) -> None:
        """Keep the draft, for a reload and other browsers."""
        self.draft.keep(self.studio.draft_file)

    def start(self, arguments: list[str], output_dir: Any = None) -> Job:
        """Start a command."""
        return self.studio.jobs.start(arguments, output_dir)


def told(action: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
    """An action whose ``UserError`` is shown."""

    @functools.wraps(action)
    async def acted(*given: Any, **named: Any) -> None:
        try:
            result = action(*given, **named)
            if inspect.isawaitable(result):
                await result
        except UserError as error:
            ui.notify(str(error), type="negative", multi_line=True, close_button=True)

    return acted


def card(title: str) -> ui.card:
    """A part of a view under a title."""
    found = ui.card().classes("w-full")
    with found:
        ui.label(title).classes("text-lg font-medium")
    return found


def command_line(view: View, arguments: Sequence[str]) -> None:
    """A command, to copy."""
    text = shown_command(list(arguments))
    with ui.row().classes("w-full no-wrap items-center gap-1"):
        ui.label(f"$ {text}").classes("mono grow").props("data-testid=command")
        ui.button(icon="content_copy", on_click=lambda: ui.clipboard.write(text)).props(
            f'flat dense round aria-label="{view.t("copy")}"'
        )


def field(view: View, name: str, **options: Any) -> ui.number:
    """A number of the draft."""

    def changed() -> None:
        value = getattr(view.draft, name)
        kind = type(getattr(Draft(), name))
        if value is not None:
            setattr(view.draft, name, kind(value))
            view.keep()

    found = ui.number(view.t(f"field.{name}"), on_change=changed, **options).bind_value(view.draft, name)
    return found.classes("w-36").props(f"data-testid={name} debounce=300")


def text_field(view: View, name: str, classes: str = "grow") -> ui.input:
    """A text of the draft."""
    found = ui.input(view.t(f"field.{name}"), on_change=view.keep).bind_value(view.draft, name)
    return found.classes(classes).props(f"data-testid={name} debounce=300")


def switch(view: View, name: str) -> ui.switch:
    """A choice of the draft."""
    return ui.switch(view.t(f"field.{name}"), on_change=view.keep).bind_value(view.draft, name)


def model_field(view: View) -> None:
    """The base model: what is found on the machine, or a name of the hub."""
    found = {one: view.studio.folders.shown(view.studio.folders.inside(one)) for one in view.studio.folders.models()}

    def choose(event: Any) -> None:
        if event.value:
            view.draft.model = str(event.value)
            view.keep()

    with ui.row().classes("w-full items-center"):
        text_field(view, "model", "grow")
        if found:
            ui.select(found, label=view.t("model.found"), on_change=choose).classes("w-64").props(
                "data-testid=found_models"
            )


def job_status(view: View, job: Job) -> None:
    """Whether a job runs, its command, and the end of its log."""
    code = job.code
    words = (
        view.t("job.running") if job.alive else view.t("job.done") if code == 0 else view.t("job.failed", code=code)
    )
    with ui.row().classes("items-center"):
        if job.alive:
            ui.spinner(size="1.2em")
        ui.label(words).props(f"data-testid=status_{job.kind}")
    command_line(view, job.arguments)


def log_of(job: Job) -> None:
    """The end of what a job has said."""
    with ui.element("div").classes("log tail"):
        ui.label(job.output()[-20_000:]).classes("mono").props(f"data-testid=log_{job.kind}")
