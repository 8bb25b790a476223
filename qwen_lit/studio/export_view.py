"""The view of the export: which checkpoint, merged or not, GGUF; the verdict; commands that serve; the hub."""

from pathlib import Path
from typing import Any

from nicegui import run as background
from nicegui import ui

from qwen_lit.errors import UserError
from qwen_lit.names import HUB_NAME
from qwen_lit.run import Run
from qwen_lit.studio import runs
from qwen_lit.studio.exports import serving, verdict, written
from qwen_lit.studio.studio import gguf_kinds
from qwen_lit.studio.widgets import View, card, job_status, log_of, told


def export_view(view: View) -> None:
    """Build it."""
    Exporting(view)


class Exporting:
    """One run, and what is made of it."""

    def __init__(self, view: View) -> None:
        """Build it, with the newest run that has something to export."""
        self.view, self.curves = view, dict[str, Any]()
        found = [one for one in runs.find_runs(view.studio.folders) if runs.checkpoints(one)]
        self.all = {str(one.output_dir): one for one in found}
        self.running: bool | None = None
        self.shown = ui.refreshable(self._shown)
        with card(view.t("export.title")):
            if not self.all:
                ui.label(view.t("export.none"))
                return
            names = {one: view.studio.folders.shown(Path(one)) for one in self.all}
            with ui.row().classes("w-full items-center"):
                self.select = ui.select(names, label=view.t("run.run"), value=next(iter(names)), on_change=self.reset)
                self.select.classes("grow")
                self.checkpoint = ui.select(
                    self.checkpoints(), label=view.t("export.checkpoint"), value="last"
                ).classes("w-56")
            with ui.row().classes("w-full items-center"):
                self.merge = ui.switch(view.t("field.merge"), value=True)
                self.gguf = ui.select({"": view.t("export.no_gguf"), **{one: one for one in gguf_kinds()}}, value="")
                self.gguf.props("label=GGUF").classes("w-40")
                ui.button(view.t("export.start"), icon="inventory_2", on_click=told(self.start)).props(
                    "data-testid=export"
                )
            with ui.row().classes("w-full items-center"):
                self.repository = ui.input(view.t("export.repository")).classes("grow").props("data-testid=repository")
                ui.button(view.t("export.push"), icon="cloud_upload", on_click=told(self.confirm)).props(
                    "outline data-testid=push"
                )
            self.shown()
        ui.timer(1.0, self.follow)

    @property
    def run(self) -> Run:
        """The one that is exported."""
        return self.all[str(self.select.value)]

    def checkpoints(self) -> dict[str, str]:
        """What can be exported of the run."""
        names = {"last": self.view.t("export.last")}
        if self.run.best.is_file():
            names["best"] = self.view.t("export.best")
        return names | {str(one): one.name for one in runs.checkpoints(self.run) if one.name.startswith("step=")}

    def reset(self) -> None:
        """Show another run."""
        self.checkpoint.set_options(self.checkpoints(), value="last")
        self.running = None

    def start(self, repository: str = "") -> None:
        """Start ``export``."""
        arguments = self.view.studio.export(
            self.run, str(self.checkpoint.value), bool(self.merge.value), str(self.gguf.value), repository
        )
        self.view.start(arguments, self.run.output_dir)
        self.running = None

    def confirm(self) -> None:
        """Upload only once the repository was typed again."""
        name = (self.repository.value or "").strip()
        if not HUB_NAME.match(name):
            raise UserError(self.view.t("export.no_repository"))
        with ui.dialog(value=True) as dialog, ui.card():
            ui.label(self.view.t("export.confirm", repository=name)).props("data-testid=confirm")
            typed = ui.input(self.view.t("export.type_again")).classes("w-full")

            def push() -> None:
                if (typed.value or "").strip() != name:
                    raise UserError(self.view.t("export.differs"))
                dialog.close()
                self.start(name)

            with ui.row():
                ui.button(self.view.t("export.push"), on_click=told(push))
                ui.button(self.view.t("cancel"), on_click=dialog.close).props("flat")

    async def follow(self) -> None:
        """Show what the newest export says while it runs, and what it has left."""
        jobs = [one for one in self.view.studio.jobs.of_run(self.run.output_dir) if one.kind == "export"]
        running = bool(jobs) and jobs[0].alive
        if running or running != self.running:
            self.running = running
            self.job = jobs[0] if jobs else None
            self.curves = await background.io_bound(self.view.studio.curves.of, self.run.logs) or {}
            self.shown.refresh()

    def _shown(self) -> None:
        if self.running is None:
            return
        t = self.view.t
        if self.job is not None:
            job_status(self.view, self.job)
            log_of(self.job)
        lines = verdict(self.curves)
        if lines:
            columns = [
                {"name": one, "label": t(f"verdict.{one}"), "field": one, "align": "left"}
                for one in ("name", "loss", "kl", "same_top")
            ]
            ui.table(rows=lines, columns=columns, title=t("verdict.title")).classes("w-full").props(
                "flat bordered data-testid=verdict_table"
            )
        for folder in (self.run.merged, self.run.adapter):
            if folder.is_dir():
                with ui.expansion(self.view.studio.folders.shown(folder), icon="folder").classes("w-full"):
                    for name, size in written(folder):
                        ui.label(f"{name}  {size / 1e6:,.1f} MB").classes("mono")
                    for commands in serving(folder):
                        with ui.row().classes("w-full no-wrap items-start"):
                            ui.label(commands).classes("mono grow log")
                            ui.button(
                                icon="content_copy", on_click=lambda commands=commands: ui.clipboard.write(commands)
                            ).props(f'flat dense round aria-label="{t("copy")}"')
