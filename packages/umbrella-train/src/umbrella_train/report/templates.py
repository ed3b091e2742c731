"""The templates of HTML pages."""

from __future__ import annotations

import jinja2


def find_template(name: str) -> jinja2.Template:
    """A template of the package by its file name; texts are escaped, and a name without a value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("umbrella_train"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
