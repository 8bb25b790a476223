"""The view to try a model: the base, the adapter and the merge answer one question side by side."""

import asyncio
from pathlib import Path
from typing import Any

from nicegui import ui

from qwen_lit.errors import UserError
from qwen_lit.run import Run, is_adapter, is_model
from qwen_lit.studio import runs
from qwen_lit.studio.chats import Talk
from qwen_lit.studio.widgets import View, card, command_line, job_status, log_of, told


def try_view(view: View) -> None:
    """Build it."""
    Try(view)


def models_of(run: Run, view: View) -> dict[str, Path]:
    """What of a run can answer: its base where that is a folder here, its adapter, its merged model."""
    found = {}
    base = str(runs.facts(run).get("model.model_name_or_path", ""))
    if base:
        try:
            folder = view.studio.folders.inside(base)
        except UserError:
            folder = None
        if folder is not None and is_model(folder):
            found["base"] = folder
    if is_adapter(run.adapter):
        found["adapter"] = run.adapter
    if is_model(run.merged):
        found["merge"] = run.merged
    return found


class Try:
    """The conversations of one view."""

    def __init__(self, view: View) -> None:
        """Build it, with the newest run that can answer."""
        self.view, self.talks = view, dict[str, Talk]()
        self.columns: dict[str, Any] = {}
        self.all = {str(one.output_dir): one for one in runs.find_runs(view.studio.folders) if models_of(one, view)}
        with card(view.t("try.title")):
            if not self.all:
                ui.label(view.t("try.none")).props("data-testid=nothing_to_try")
                return
            names = {one: view.studio.folders.shown(Path(one)) for one in self.all}
            with ui.row().classes("w-full items-center"):
                self.select = ui.select(names, label=view.t("run.run"), value=next(iter(names)), on_change=self.reset)
                self.select.classes("grow")
                self.kinds = ui.row()
            self.system = ui.input(view.t("try.system")).classes("w-full").props("data-testid=system")
            self.think = ui.switch(view.t("try.think"), on_change=told(self.switch_thinking))
            self.think.set_visibility(False)
            self.grid = ui.element("div").classes("w-full grid grid-cols-1 md:grid-cols-3 gap-2")
            with ui.row().classes("w-full items-center"):
                self.question = ui.input(view.t("try.ask")).classes("grow").props("data-testid=question")
                self.question.on("keydown.enter", told(self.ask))
                ui.button(view.t("try.send"), icon="send", on_click=told(self.ask)).props("data-testid=send")
                ui.button(view.t("try.stop"), on_click=self.stop).props("outline data-testid=stop_answer")
                ui.button(view.t("try.again"), on_click=told(self.start_over)).props("outline")
        self.answer_file()
        self.offer()
        view.at_leave = self.close

    @property
    def run(self) -> Run:
        """The one that is tried."""
        return self.all[str(self.select.value)]

    async def close(self) -> None:
        """End the processes of this view."""
        for one in self.talks.values():
            await one.close()
        self.talks.clear()

    async def reset(self) -> None:
        """Try another run."""
        await self.close()
        self.offer()

    def offer(self) -> None:
        """Offer the models of the run."""
        self.kinds.clear()
        with self.kinds:
            self.chosen = {
                kind: ui.checkbox(self.view.t(f"try.{kind}"), value=True, on_change=self.lay_out).props(
                    f"data-testid=kind_{kind}"
                )
                for kind in models_of(self.run, self.view)
            }
        self.lay_out()

    def lay_out(self) -> None:
        """A column for each model that is chosen."""
        self.grid.clear()
        self.columns.clear()
        with self.grid:
            for kind, path in models_of(self.run, self.view).items():
                if self.chosen[kind].value:
                    with ui.card().classes("w-full").props(f"flat bordered data-testid=column_{kind}"):
                        ui.label(self.view.t(f"try.{kind}")).classes("font-medium")
                        command_line(self.view, ["chat", str(path)])
                        told_of = ui.label().classes("text-caption")
                        said = ui.column().classes("w-full")
                        ui.button(self.view.t("try.save"), on_click=told(lambda kind=kind: self.save(kind))).props(
                            "flat dense no-caps"
                        )
                        self.columns[kind] = (told_of, said)

    async def ask(self) -> None:
        """Ask all of them; one after the other loads, and they answer at once."""
        question = (self.question.value or "").strip()
        if not question:
            return
        self.question.value = ""
        await asyncio.gather(*(self.one(kind, question) for kind in list(self.columns)))

    async def one(self, kind: str, question: str) -> None:
        """Ask one, and show its answer as it comes."""
        told_of, said = self.columns[kind]
        with said:
            ui.label(question).classes("font-medium")
            answer = ui.label("…").style("white-space: pre-wrap").props(f"data-testid=answer_{kind}")
        try:
            talk = await self.talk(kind, told_of)
            text = ""
            async for piece in talk.ask(question):
                text += piece
                answer.set_text(text)
            answer.classes("answered")
        except UserError as error:
            answer.set_text(str(error))
            answer.classes("text-negative")

    async def talk(self, kind: str, told_of: ui.label) -> Talk:
        """The conversation with one of them, which is begun where there is none."""
        if kind not in self.talks:
            talk = Talk(models_of(self.run, self.view)[kind])
            told_of.set_text(self.view.t("try.loading"))
            await talk.start()
            self.talks[kind] = talk
            told_of.set_text(talk.told)
            if talk.thinks:
                self.think.set_visibility(True)
            if self.system.value:
                await talk.command("/system " + " ".join(self.system.value.split()))
        return self.talks[kind]

    async def switch_thinking(self) -> None:
        """Let those that can think first, or not."""
        for one in self.talks.values():
            if one.thinks:
                await one.command("/think")

    def stop(self) -> None:
        """End the answers where they are."""
        for one in self.talks.values():
            one.stop()

    async def start_over(self) -> None:
        """A new conversation, under the system prompt that is given."""
        words = " ".join((self.system.value or "").split())
        for kind, one in self.talks.items():
            await one.command(f"/system {words}".strip())
            self.columns[kind][1].clear()

    async def save(self, kind: str) -> None:
        """Add the conversation to a file of rows."""
        if kind not in self.talks:
            raise UserError(self.view.t("try.nothing"))
        path = self.view.studio.folders.free_file("conversations.jsonl", "conversations")
        ui.notify(await self.talks[kind].command(f"/save {path}"))

    def answer_file(self) -> None:
        """Answer the rows of a file into another."""
        view = self.view
        with card(view.t("try.file")):
            source = ui.input(view.t("data.path")).classes("w-full").props("data-testid=source_file")

            def predict() -> None:
                path = view.studio.folders.file(source.value or "")
                target = view.studio.folders.free_file(f"{path.stem}-answers.jsonl", "answers")
                view.start(view.studio.predict(self.run, path, target))
                shown.refresh()

            def status() -> None:
                if job := view.studio.jobs.newest("predict"):
                    job_status(view, job)
                    log_of(job)

            shown = ui.refreshable(status)
            ui.button(view.t("try.answer"), on_click=told(predict)).props("data-testid=predict")
            shown()
            ui.timer(2.0, shown.refresh)
