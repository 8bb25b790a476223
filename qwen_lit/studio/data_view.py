"""The view of the data: files, their mixture, the audit, and rows with what is trained of them marked."""

from pathlib import Path
from typing import Any

from nicegui import run, ui

from qwen_lit.studio.draft import Source
from qwen_lit.studio.jobs import Job
from qwen_lit.studio.rows import FILTERS, Audited, Row, save_edited, source_line
from qwen_lit.studio.widgets import (
    View,
    card,
    field,
    job_status,
    log_of,
    model_field,
    switch,
    text_field,
    told,
)

PAGE = 10
"""Rows on one page."""
LARGEST = 2_000_000_000
"""Bytes of a dropped file."""


def data_view(view: View) -> None:
    """Build it."""
    with card(view.t("data.files")):
        sources = ui.refreshable(lambda: source_list(view))
        ui.upload(
            label=view.t("data.drop"),
            auto_upload=True,
            multiple=True,
            max_file_size=LARGEST,
            on_upload=told(lambda event: dropped(view, event, sources)),
            on_rejected=lambda: ui.notify(view.t("data.rejected"), type="negative"),
        ).classes("w-full").props("flat bordered data-testid=drop")
        path = ui.input(view.t("data.path")).classes("w-full").props("data-testid=path")
        path.on("keydown.enter", told(lambda: add(view, path, sources)))
        ui.button(view.t("data.add"), on_click=told(lambda: add(view, path, sources))).props("data-testid=add")
        sources()
        with ui.row().classes("w-full items-center"):
            text_field(view, "val_path")
            field(view, "val_size", min=0, step=0.01)
            field(view, "max_length", min=16, step=256)
            switch(view, "packing")
        model_field(view)
    Audit(view)


def source_list(view: View) -> None:
    """The files of the mixture."""
    for one in view.draft.sources:
        with ui.row().classes("w-full items-center no-wrap"):
            ui.label(view.studio.folders.shown(Path(one.path))).classes("grow").props("data-testid=source")
            weight = ui.number(view.t("data.weight"), min=0.01, step=0.5, on_change=view.keep).bind_value(
                one, "weight"
            )
            weight.classes("w-24")
            ui.button(icon="close", on_click=lambda one=one: remove(view, one)).props(
                f'flat dense round aria-label="{view.t("remove")}"'
            )


def remove(view: View, one: Source) -> None:
    """Take a file out of the mixture; it stays on disk."""
    view.draft.sources.remove(one)
    view.keep()
    ui.navigate.reload()


async def dropped(view: View, event: Any, sources: Any) -> None:
    """Keep a dropped file, and take it."""
    path = view.studio.folders.free_file(event.file.name)
    await event.file.save(path)
    take(view, path, sources)


def add(view: View, given: ui.input, sources: Any) -> None:
    """Take a file that is named."""
    take(view, view.studio.folders.file(given.value or ""), sources)
    given.value = ""


def take(view: View, path: Path, sources: Any) -> None:
    """A file more in the mixture."""
    if str(path) not in [one.path for one in view.draft.sources]:
        view.draft.sources.append(Source(str(path)))
        view.keep()
    sources.refresh()


class Audit:
    """The audit, as it comes, and its rows."""

    def __init__(self, view: View) -> None:
        """Build it, with the newest audit."""
        self.view, self.number, self.filter, self.search = view, 1, "all", ""
        self.job: Job | None = view.studio.jobs.newest("inspect")
        self.found: Audited | None = None
        self.done = False
        self.shown = ui.refreshable(self._shown)
        self.paged = ui.refreshable(self._paged)
        with card(view.t("data.audit")):
            ui.button(view.t("data.inspect"), icon="fact_check", on_click=told(self.start)).props(
                "data-testid=inspect"
            )
            self.shown()
        ui.timer(1.0, self.follow)

    def start(self) -> None:
        """Start ``inspect``."""
        arguments = self.view.studio.inspect(self.view.draft)
        Path(arguments[-1]).unlink(missing_ok=True)
        self.job, self.found, self.done, self.number = self.view.start(arguments), None, False, 1
        self.shown.refresh()

    async def follow(self) -> None:
        """Read the audit once its command has ended."""
        if self.job is None or self.done:
            return
        if not self.job.alive:
            self.found = await run.io_bound(Audited.read, Path(self.job.arguments[-1]))
            self.done = True
        self.shown.refresh()

    def _shown(self) -> None:
        if self.job is None:
            ui.label(self.view.t("data.none"))
            return
        job_status(self.view, self.job)
        if self.found is None:
            log_of(self.job)
            return
        about, t = self.found.about, self.view.t
        with ui.row().classes("gap-4"):
            for key in ("train", "val", "tokens", "supervised", "steps", "masked"):
                with ui.column().classes("gap-0"):
                    ui.label(f"{about[key]:,}").classes("text-xl")
                    ui.label(t(f"audit.{key}")).classes("text-caption")
        ui.label(about["verdict"]).classes("font-medium").props("data-testid=verdict")
        with ui.expansion(t("audit.all")).classes("w-full"), ui.element("div").classes("log"):
            ui.label("\n".join(about["text"])).classes("mono")
        with ui.row().classes("w-full items-center"):
            ui.toggle({one: t(f"filter.{one}") for one in FILTERS}, value=self.filter, on_change=self.choose).props(
                "no-caps dense data-testid=filters"
            )
            ui.input(t("search"), value=self.search, on_change=self.look).props(
                "dense debounce=300 data-testid=search"
            )
        self.paged()

    def choose(self, event: Any) -> None:
        """Show the rows of another filter."""
        self.filter, self.number = event.value, 1
        self.paged.refresh()

    def look(self, event: Any) -> None:
        """Show the rows that hold a text."""
        self.search, self.number = event.value or "", 1
        self.paged.refresh()

    def turn(self, event: Any) -> None:
        """Show another page."""
        self.number = event.value
        self.paged.refresh()

    def _paged(self) -> None:
        assert self.found is not None
        rows = self.found.chosen(self.filter, self.search)
        ui.label(self.view.t("data.count", count=len(rows))).props("data-testid=count")
        for row in rows[PAGE * (self.number - 1) : PAGE * self.number]:
            self.row(row)
        pages = -(-len(rows) // PAGE)
        if pages > 1:
            ui.pagination(1, pages, direction_links=True, value=self.number, on_change=self.turn).props("max-pages=6")

    def row(self, row: Row) -> None:
        """One row, with what is trained of it marked."""
        with ui.card().classes("w-full").props("flat bordered data-testid=row"):
            with ui.row().classes("w-full items-center justify-between"):
                ui.label(f"{row.place} {row.note}").classes("text-caption")
                if row.pieces:
                    ui.label(self.view.t("data.tokens", tokens=row.tokens, trained=row.trained)).classes(
                        "text-caption"
                    )
                ui.button(self.view.t("edit"), on_click=told(lambda: self.edit(row))).props("flat dense no-caps")
            with ui.element("div").classes("marked"):
                for text, trained in row.pieces:
                    ui.label(text).classes("trained" if trained else "")

    def edit(self, row: Row) -> None:
        """Ask for the row put right."""
        _, _, line = source_line(self.view.studio.folders, row.place)
        with ui.dialog(value=True) as dialog, ui.card().classes("w-full"):
            text = ui.textarea(row.place, value=line).classes("w-full").props("autogrow data-testid=edited")

            def save() -> None:
                path = save_edited(self.view.studio.folders, row.place, text.value or "")
                old = source_line(self.view.studio.folders, row.place)[0]
                for one in self.view.draft.sources:
                    if Path(one.path) == old:
                        one.path = str(path)
                self.view.keep()
                dialog.close()
                ui.navigate.reload()

            ui.button(self.view.t("data.save_row"), on_click=told(save)).props("data-testid=save_row")
