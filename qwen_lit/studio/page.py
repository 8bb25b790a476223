"""The page: its frame, its languages, light and dark; a file for each view."""

from typing import Any

from fastapi import Request
from nicegui import ui

from qwen_lit.studio.data_view import data_view
from qwen_lit.studio.export_view import export_view
from qwen_lit.studio.plan_view import plan_view
from qwen_lit.studio.run_view import run_view
from qwen_lit.studio.studio import Studio
from qwen_lit.studio.texts import LANGUAGES, preferred
from qwen_lit.studio.try_view import try_view
from qwen_lit.studio.widgets import CSS, View

VIEWS = {"data": data_view, "plan": plan_view, "run": run_view, "try": try_view, "export": export_view}
ICONS = {"data": "table_rows", "plan": "memory", "run": "show_chart", "try": "forum", "export": "inventory_2"}
YEAR = 31_536_000
"""Seconds for which a browser keeps what was chosen."""


def build(studio: Studio) -> None:
    """Register the page.

    Args:
        studio: that it shows.
    """

    @ui.page("/")
    def page(request: Request, tab: str = "data") -> None:
        language = preferred(request.cookies.get("language"), request.headers.get("accept-language", ""))
        view = View(studio, language)
        ui.add_css(CSS)
        ui.colors(primary="#3f51b5")
        dark = ui.dark_mode(value={"dark": True, "light": False}.get(request.cookies.get("shade", "")))
        with ui.header().classes("items-center justify-between py-1"):
            ui.label("qwen-lit studio").classes("text-lg font-medium")
            with ui.row().classes("items-center gap-1"):
                for key, name in LANGUAGES.items():
                    chosen = " disable" if key == language else ""
                    ui.button(name, on_click=lambda key=key: remember("language", key, True)).props(
                        f"flat dense color=white no-caps data-testid=language_{key}{chosen}"
                    )
                ui.button(icon="contrast", on_click=lambda: turn(dark)).props(
                    f'flat dense round color=white aria-label="{view.t("shade")}" data-testid=shade'
                )
        shown = tab if tab in VIEWS else "data"
        tabs(view, shown)
        ui.context.client.on_delete(view.leave)


def tabs(view: View, shown: str) -> None:
    """The names of the views, and the one that is chosen; it is built anew each time, from the files as they are.

    Args:
        view: of the browser.
        shown: the first one.
    """

    async def choose(event: Any) -> None:
        await view.leave()
        place.clear()
        with place:
            VIEWS[event.value](view)
        # A reload shows it again.
        ui.run_javascript(f"history.replaceState(null, '', '/?tab={event.value}')")

    bar = ui.tabs(on_change=choose).classes("w-full").props("dense mobile-arrows outside-arrows no-caps")
    with bar:
        for name, icon in ICONS.items():
            ui.tab(name, label=view.t(f"tab.{name}"), icon=icon).props(f"data-testid=tab_{name}")
    place = ui.column().classes("w-full")
    bar.set_value(shown)


def remember(name: str, value: str, reload: bool = False) -> None:
    """Keep a choice in the browser."""
    again = "location.reload();" if reload else ""
    ui.run_javascript(f"document.cookie = '{name}={value}; path=/; max-age={YEAR}; samesite=strict'; {again}")


def turn(dark: Any) -> None:
    """From light to dark, and back."""
    dark.value = not dark.value
    remember("shade", "dark" if dark.value else "light")
