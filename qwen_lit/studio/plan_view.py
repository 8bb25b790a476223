"""The view of the plan: the adapter, the batch, the card, and what memory goes where."""

import asyncio
from typing import Any

from nicegui import run, ui

from qwen_lit.studio.card import Card, cards
from qwen_lit.studio.jobs import Job
from qwen_lit.studio.plans import LISTED, budgets, parts, read_plan
from qwen_lit.studio.widgets import View, card, field, job_status, log_of, model_field, switch, text_field, told

COLOURS = ("#5470c6", "#91cc75", "#fac858", "#ee6666", "#73c0de", "#3ba272", "#fc8452", "#9a60b4", "#ea7ccc")
PAUSE = 0.8
"""Seconds after the last change until an estimate is asked for."""
SLIDERS = {"r": (4, 256, 4), "max_length": (256, 32768, 256), "batch_size": (1, 32, 1), "epochs": (1, 20, 1)}
"""Least, most and step."""


def plan_view(view: View) -> None:
    """Build it."""
    Plan(view)


class Plan:
    """The fields, and the plan that they make."""

    def __init__(self, view: View) -> None:
        """Build it, with the newest plan."""
        self.view, self.found, self.done = view, dict[str, Any](), False
        self.job: Job | None = view.studio.jobs.newest("plan")
        self.changes = 0
        self.shown = ui.refreshable(self._shown)
        with card(view.t("plan.model")):
            model_field(view)
            self.card_row = ui.row().classes("items-center")
            with ui.element("div").classes("w-full grid grid-cols-1 md:grid-cols-2 gap-x-8"):
                for name, (least, most, step) in SLIDERS.items():
                    self.slider(name, least, most, step)
            with ui.row().classes("w-full items-center"):
                field(view, "lora_alpha", min=1, step=8)
                field(view, "learning_rate", min=0, step=0.00005, format="%.2g")
                field(view, "accumulate", min=1, step=1)
                text_field(view, "memory_budget", "w-48")
                switch(view, "load_in_4bit")
        with card(view.t("plan.title")):
            with ui.row().classes("items-center"):
                ui.button(view.t("plan.estimate"), on_click=told(lambda: self.start(False))).props(
                    "data-testid=estimate"
                )
                self.measure = ui.button(view.t("plan.measure"), on_click=told(lambda: self.start(True)))
                self.measure.props("outline data-testid=measure").set_visibility(False)
                self.follows = ui.switch(view.t("plan.follow"))
            self.shown()
        ui.timer(1.0, self.follow)
        ui.timer(0.1, self.look_at_cards, once=True)

    def slider(self, name: str, least: int, most: int, step: int) -> None:
        """A number of the draft that moves the estimate."""
        with ui.column().classes("gap-0 w-full"):
            ui.label().bind_text_from(
                self.view.draft, name, lambda value: f"{self.view.t(f'field.{name}')}: {value:,}"
            )
            ui.slider(min=least, max=most, step=step, on_change=self.move).bind_value(self.view.draft, name).props(
                f"data-testid=slider_{name}"
            )

    async def move(self) -> None:
        """Keep the change; ask for an estimate once there are no more."""
        self.view.keep()
        self.changes += 1
        mine = self.changes
        await asyncio.sleep(PAUSE)
        if mine == self.changes and self.follows.value:
            await told(lambda: self.start(False))()

    def start(self, measured: bool) -> None:
        """Start ``plan``; one that is under way is stopped."""
        if self.job is not None:
            self.job.stop()
        self.job = self.view.start(self.view.studio.plan(self.view.draft, measured))
        self.done = False
        self.shown.refresh()

    def follow(self) -> None:
        """Read the plan once its command has ended."""
        if self.job is None or self.done:
            return
        if not self.job.alive:
            self.found, self.done = read_plan(self.job.output("out")) or {}, True
        self.shown.refresh()

    async def look_at_cards(self) -> None:
        """Name the cards of this machine; without one, nothing can be measured."""
        found: list[Card] = await run.io_bound(cards) or []
        with self.card_row:
            ui.icon("memory")
            for one in found:
                ui.label(f"{one.name}: {one.used / 1024:.1f} / {one.total / 1024:.1f} GiB")
            if not found:
                ui.label(self.view.t("plan.no_card"))
        self.measure.set_visibility(bool(found))

    def _shown(self) -> None:
        if self.job is None:
            ui.label(self.view.t("plan.none"))
            return
        job_status(self.view, self.job)
        if not self.found:
            log_of(self.job)
            return
        with ui.row().classes("gap-4"):
            for key in LISTED:
                if self.found.get(key) is not None:
                    value = self.found[key]
                    with ui.column().classes("gap-0"):
                        ui.label(f"{value:,}" if isinstance(value, int | float) else str(value)).classes("text-lg")
                        ui.label(self.view.t(f"plan.{key}")).classes("text-caption")
        for one in budgets(self.found):
            self.bar(one)
        for one in self.found.get("advice", []):
            ui.label(f"→ {one}")

    def bar(self, of_card: dict[str, Any]) -> None:
        """What memory of one card goes where."""
        taken, t = parts(of_card), self.view.t
        fits = t("plan.fits" if of_card.get("fits") else "plan.too_big")
        needs = t("plan.of", estimate=of_card["estimated_peak_gib"], budget=of_card["budget_gib"])
        with ui.column().classes("w-full gap-1").props("data-testid=memory"):
            ui.label(f"{needs}: {fits}").classes("font-medium")
            colours = dict(zip((name for name in taken if name), COLOURS * 3, strict=False))
            whole = sum(taken.values())
            with ui.element("div").classes("w-full flex rounded overflow-hidden").style("height: 1.4rem"):
                for name, size in taken.items():
                    colour = colours.get(name, "rgba(128,128,128,.25)")
                    with ui.element("div").style(f"width: {100 * size / whole:.2f}%; background: {colour}"):
                        ui.tooltip(f"{name or t('plan.left')}: {size:.2f} GiB")
            with ui.row().classes("gap-x-4 gap-y-0"):
                for name, colour in colours.items():
                    with ui.row().classes("items-center gap-1"):
                        ui.element("div").style(f"width: .8rem; height: .8rem; background: {colour}")
                        ui.label(f"{name} {taken[name]:.2f} GiB").classes("text-caption")
