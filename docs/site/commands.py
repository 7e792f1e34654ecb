"""The options of every command behind the introduction in docs/command_line.md, from typer's own writer."""

import re

import typer
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from quantpress.cli import app

PAGE = "docs/command_line.md"


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Add the commands to their page."""
    return f"{markdown}\n{commands()}" if page.file.src_uri == PAGE else markdown


def commands() -> str:
    """Every command with its arguments, options and example, as Markdown."""
    command = typer.main.get_command(app)
    for one in command.commands.values():  # type: ignore[attr-defined]
        one.short_help = one.short_help or one.help  # whole in the list, too
    context = typer.Context(command, info_name="quantpress")
    text = get_docs_for_click(obj=command, ctx=context, indent=1, name="quantpress")
    return re.sub(r"^Example: (.*)$", r"```bash\n\1\n```", text, flags=re.MULTILINE)
