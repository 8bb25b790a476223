"""HTML pages from the templates in ``templates/``: words that stand in data or configuration never become markup."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, **values: Any) -> str:
    """A whole page.

    Args:
        name: of a file in ``templates/``.
        values: what the template asks for; all of it is escaped where the template does not say otherwise.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["figure"] = figure
    return environment.get_template(name).render(**values)


def figure(value: float) -> str:
    """A number of a table: whole numbers and large ones in groups of thousands, others in four digits."""
    whole = isinstance(value, int) or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.4g}"
