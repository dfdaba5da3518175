"""What the site takes from elsewhere: CONTRIBUTING.md, the command's help, the messages of errors."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "potstill"
OUTSIDE = {"../README.md": "index.md", "../CONTRIBUTING.md": "contributing.md"}
KINDS = ("ValueError", "TypeError", "RuntimeError", "FileNotFoundError", "NotImplementedError", "WrongCache")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, "contributing.md", content=(ROOT / "CONTRIBUTING.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    for there, here in OUTSIDE.items():
        markdown = markdown.replace(f"]({there}", f"]({here}")
    if page.file.src_uri == "contributing.md":
        markdown = markdown.replace("](docs/", "](")
    if page.file.src_uri == "errors.md":
        markdown += errors()
    if page.file.src_uri == "cli.md":
        markdown += commands()
    return markdown


def errors() -> str:
    """A table a module: the messages that it raises, values as {...}."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        if {"bench", "demo"} & set(file.parts):
            continue
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for kind, message in raised(ast.parse(file.read_text())):
            if (kind, message) not in found[module]:
                found[module].append((kind, message))
    parts = []
    for module, rows in found.items():
        if rows:
            lines = [f"| {kind} | {cell(message)} |" for kind, message in rows]
            parts += [f"\n## potstill.{module}\n", "| error | message |", "| --- | --- |", *lines]
    lines = [f"| {cell(when)} | {cell(message)} |" for when, message in of_the_cache()]
    parts += ["\n## Files of a cache\n", "| when | message |", "| --- | --- |", *lines]
    return "\n" + "\n".join(parts) + "\n"


def of_the_cache() -> Iterator[tuple[str, str]]:
    """(when, message) of each error that the Rust library has a sentence for."""
    source = (ROOT / "rust" / "core" / "src" / "error.rs").read_text()
    for when, message in re.findall(r'/// (.+)\n\s*#\[error\(\s*"((?:[^"\\]|\\[\s\S])*)"', source):
        message = re.sub(r"\{[^}]*\}", "{…}", re.sub(r"\\\n\s*", "", message))
        if len(message.replace("{…}", "").strip(" :,")) > 3:
            yield when.rstrip("."), message


def raised(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(class, message) of every `raise Class("...")` whose message is a literal, f-strings included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = ast.unparse(node.exc.func).rsplit(".", 1)[-1]
            message = text(node.exc.args[0])
            if name in KINDS and message and len(message) > 12:
                yield name, message


def text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join("{…}" if isinstance(part, ast.FormattedValue) else text(part) for part in node.values)
    return ""


def cell(message: str) -> str:
    return re.sub(r"\s+", " ", message).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def commands() -> str:
    """The help of every command, as the terminal shows it."""
    import click
    from potstill.cli import main

    context = click.Context(main, info_name="potstill")
    parts = []
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        shown = command.get_help(click.Context(command, info_name=f"potstill {name}"))
        parts.append(f"\n## potstill {name}\n\n```text\n{shown}\n```\n")
    return "\n".join(parts)
