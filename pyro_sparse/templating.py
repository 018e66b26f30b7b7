"""Pages from the templates of this package, which lie in templates/."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2

__all__ = ["render"]


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pyro_sparse"),
        autoescape=jinja2.select_autoescape(["html"]),
        # A name that a template misspells is an error, and no hole in the page.
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


def render(template: str, **values: Any) -> str:
    """A page as text; in templates whose name ends in ``.html``, values are escaped.

    Args:
        template: name of the file in templates/.
        **values: what it names.
    """
    return _environment().get_template(template).render(**values)
