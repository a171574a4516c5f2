"""The site's navigation: where `mkdocs.yml` names a folder, the pages in it, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


def filled(nav: Any) -> Any:
    """The navigation with each folder (a text that ends in ``/``) as the list of its pages.

    >>> filled([{"Reference": "reference/"}, {"Overview": "index.md"}])
    [{'Reference': ['reference/command-line.md', 'reference/recipe.md']}, {'Overview': 'index.md'}]
    """
    if isinstance(nav, list):
        return [filled(item) for item in nav]
    if isinstance(nav, dict):
        return {title: filled(item) for title, item in nav.items()}
    return [f"{nav}{page.name}" for page in sorted((DOCS / nav).glob("*.md"))] if nav.endswith("/") else nav


def on_config(config: Any) -> Any:
    """What mkdocs calls, as `hooks` in `mkdocs.yml` asks."""
    config["nav"] = filled(config["nav"])
    return config
