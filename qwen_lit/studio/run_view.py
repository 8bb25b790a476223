"""The view of the runs: start, stop, go on; curves, answers and the log as they come; several runs compared."""

from typing import Any

from nicegui import run as background
from nicegui import ui

from qwen_lit.lines import question
from qwen_lit.run import Run
from qwen_lit.studio import runs
from qwen_lit.studio.curves import Curve
from qwen_lit.studio.stopping import stop
from qwen_lit.studio.widgets import View, card, command_line, field, job_status, log_of, switch, text_field, told

EVERY = 1.0
"""Seconds between two looks at the files of a run."""
GRAPHS = {
    "loss": ("train/loss", "val/loss"),
    "lr": ("train/lr",),
    "speed": ("train/tokens_per_second",),
    "memory": ("train/memory_gib", "train/peak_memory_gib"),
}
"""Curves by graph."""
AXIS = {"splitLine": {"lineStyle": {"color": "rgba(128,128,128,.25)"}}, "axisLabel": {"color": "#888"}}
"""Seen on light and on dark."""


def run_view(view: View) -> None:
    """Build it."""
    Runs(view)


class Runs:
    """All runs of the folders, one of which is looked at, with others to compare it with."""

    def __init__(self, view: View) -> None:
        """Build it, with the newest run."""
        self.view, self.all = view, runs.find_runs(view.studio.folders)
        self.run: Run | None = self.all[0] if self.all else None
        self.beside: list[str] = []
        self.seen: object = None
        self.graphs: dict[str, ui.echart] = {}
        self.told = ui.refreshable(self._told)
        self.answers = ui.refreshable(self._answers)
        with card(view.t("run.start")):
            with ui.row().classes("w-full items-center"):
                text_field(view, "output_dir")
                field(view, "epochs", min=1, step=1)
                switch(view, "merge")
            ui.button(view.t("run.fit"), icon="play_arrow", on_click=told(self.fit)).props("data-testid=fit")
        with card(view.t("run.runs")):
            with ui.row().classes("w-full items-center"):
                self.select = ui.select({}, label=view.t("run.run"), on_change=self.choose).classes("grow")
                self.select.props("data-testid=runs")
                self.others = ui.select(
                    {}, label=view.t("run.compare"), multiple=True, on_change=self.compare
                ).classes("grow")
            self.progress = ui.linear_progress(0, show_value=False, size="14px").classes("w-full")
            self.told()
            with ui.element("div").classes("w-full grid grid-cols-1 md:grid-cols-2 gap-2"):
                for name in GRAPHS:
                    self.graphs[name] = graph(view.t(f"graph.{name}"))
            self.answers()
        self.list()
        ui.timer(EVERY, self.follow)
        ui.timer(5.0, self.find)

    def list(self) -> None:
        """Name the runs in the choices."""
        shown = self.view.studio.folders.shown
        names = {str(one.output_dir): shown(one.output_dir) for one in self.all}
        self.select.set_options(names, value=str(self.run.output_dir) if self.run else None)
        self.others.set_options(names, value=[one for one in self.beside if one in names])

    def find(self) -> None:
        """Look for runs, which a terminal may have started."""
        found = runs.find_runs(self.view.studio.folders)
        if [one.output_dir for one in found] != [one.output_dir for one in self.all]:
            self.all = found
            self.run = self.run or (found[0] if found else None)
            self.list()

    def choose(self, event: Any) -> None:
        """Look at another run."""
        chosen = [one for one in self.all if str(one.output_dir) == event.value]
        if chosen and (self.run is None or chosen[0].output_dir != self.run.output_dir):
            self.run, self.seen = chosen[0], None

    def compare(self, event: Any) -> None:
        """Show other runs beside it."""
        self.beside, self.seen = list(event.value or []), None

    def fit(self) -> None:
        """Start a run as the fields say."""
        arguments, folder = (
            self.view.studio.fit(self.view.draft),
            self.view.studio.folders.inside(self.view.draft.output_dir),
        )
        self.view.start(arguments, folder)
        self.look_at(Run(folder))

    def go_on(self) -> None:
        """Go on from the newest checkpoint."""
        assert self.run is not None
        self.view.start(self.view.studio.go_on(self.run), self.run.output_dir)
        self.seen = None

    def stop(self) -> None:
        """Ask the run to finish its step, save and end."""
        assert self.run is not None
        stop(self.run, self.view.studio.running(self.run))

    def look_at(self, run: Run) -> None:
        """Look at a run that may have left no file yet."""
        self.run, self.seen = run, None
        if run.output_dir not in [one.output_dir for one in self.all]:
            self.all = [run, *self.all]
        self.list()

    async def follow(self) -> None:
        """Show what has come since the last look."""
        run = self.run
        if run is None:
            return
        job, curves = self.view.studio.running(run), self.view.studio.curves
        state = "running" if job else runs.state(run)
        found = await background.io_bound(curves.of, run.logs) or {}
        others = {
            one: await background.io_bound(curves.of, Run(self.view.studio.folders.inside(one)).logs) or {}
            for one in self.beside
            if one != str(run.output_dir)
        }
        done = max((points[-1][0] for points in found.values() if points), default=0)
        written = len(job.output()) if job else 0
        seen = (run.output_dir, state, done, len(found), written, tuple(others), len(runs.samples(run)))
        if run is not self.run or seen == self.seen:
            return
        self.seen, self.state, self.done = seen, state, done
        self.draw(found, others)
        self.told.refresh()
        self.answers.refresh()

    def draw(self, found: dict[str, Curve], others: dict[str, dict[str, Curve]]) -> None:
        """Put the curves into the graphs; one without curves is hidden."""
        for name, tags in GRAPHS.items():
            lines = {self.view.t(f"curve.{tag}"): found[tag] for tag in tags if tag in found}
            for folder, curves in others.items():
                for tag in tags:
                    if tag in curves:
                        shown = self.view.studio.folders.shown(self.view.studio.folders.inside(folder))
                        lines[f"{shown}: {self.view.t(f'curve.{tag}')}"] = curves[tag]
            chart = self.graphs[name]
            chart.set_visibility(bool(lines))
            chart.options["series"] = [
                {"type": "line", "name": label, "data": points, "showSymbol": len(points) < 30}
                for label, points in lines.items()
            ]
            chart.update()

    def _told(self) -> None:
        run, t = self.run, self.view.t
        if run is None or self.seen is None:
            self.progress.set_value(0)
            ui.label(t("run.none"))
            return
        steps = runs.steps_of(run)
        self.progress.set_value(min(1.0, self.done / steps) if steps else 0)
        with ui.row().classes("items-center w-full"):
            ui.label(t(f"state.{self.state}")).classes("font-medium").props("data-testid=state")
            ui.label(t("run.step", step=self.done, steps=steps or "?")).props("data-testid=step")
            if self.state == "running":
                ui.button(t("run.stop"), icon="stop", on_click=told(self.stop)).props("outline data-testid=stop")
            elif runs.checkpoints(run) and run.config_file.is_file():
                ui.button(t("run.go_on"), icon="play_arrow", on_click=told(self.go_on)).props(
                    "outline data-testid=go_on"
                )
        jobs = [one for one in self.view.studio.jobs.of_run(run.output_dir) if one.kind == "fit"]
        if jobs:
            job_status(self.view, jobs[0])
            log_of(jobs[0])
        elif run.config_file.is_file():
            ui.label(t("run.elsewhere"))
            command_line(self.view, ["fit", "--config", str(run.config_file)])

    def _answers(self) -> None:
        if self.run is None or self.seen is None:
            return
        pairs = runs.before_and_after(self.run)
        if pairs:
            ui.label(self.view.t("run.samples")).classes("text-lg font-medium")
        for before, after in pairs:
            with ui.card().classes("w-full").props("flat bordered data-testid=sample"):
                ui.label(question(after.prompt)).classes("font-medium")
                with ui.element("div").classes("w-full grid grid-cols-1 md:grid-cols-3 gap-2"):
                    for words, text in (
                        (self.view.t("run.at", step=before.step), before.answer),
                        (self.view.t("run.at", step=after.step), after.answer),
                        (self.view.t("run.wanted"), after.wanted),
                    ):
                        if text is not None:
                            with ui.column().classes("gap-0"):
                                ui.label(words).classes("text-caption")
                                ui.label(text).style("white-space: pre-wrap")


def graph(title: str) -> ui.echart:
    """An empty graph over optimizer steps; what it names is drawn and never markup."""
    return ui.echart(
        {
            "title": {"text": title, "left": 0, "top": 0, "textStyle": {"fontSize": 13, "color": "#888"}},
            "tooltip": {"trigger": "axis", "renderMode": "richText"},
            "legend": {"top": 0, "right": 0, "left": "45%", "type": "scroll", "textStyle": {"color": "#888"}},
            "grid": {"left": 8, "right": 16, "top": 48, "bottom": 8, "containLabel": True},
            "xAxis": {"type": "value", "minInterval": 1, **AXIS},
            "yAxis": {"type": "value", "scale": True, **AXIS},
            "animation": False,
            "series": [],
        }
    ).classes("w-full h-64")
