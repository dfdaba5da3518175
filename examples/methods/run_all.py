"""Runs the miniatures one after another, and writes docs/methods-miniatures.md from what they found.

python examples/methods/run_all.py                       all that have no result yet (--force: all)
python examples/methods/run_all.py taid ddk --seeds 8    these
python examples/methods/run_all.py --write-docs          the pages and pictures, from the results there are
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
DOCS = HERE.parents[1] / "docs"
NAMES = (
    "taid", "teacher_hacking", "first", "distillspec", "miniplm", "ddk", "capacity_gap", "squarehead", "alm",
    "minitron",
)  # fmt: skip
BEGIN, END = "<!-- miniatures: python examples/methods/run_all.py --write-docs -->", "<!-- end of miniatures -->"
ROWS = {
    "taid": 1, "teacher_hacking": 3, "first": 6, "distillspec": 7, "miniplm": 26, "ddk": 8, "capacity_gap": 4,
    "squarehead": 16, "alm": 27, "minitron": 9,
}  # fmt: skip
INTRODUCTION = """# Miniatures of published headlines

Each script in `examples/methods/` asks for the direction of a paper's headline with this library, in a minute or two on
a CPU: a random network is the language, models of a few thousand weights read and learn it. They show that an objective
does what it is for, not how large its effect is elsewhere. A direction counts as shown when it is two standard errors
over seeds away from nothing; where it is not, this page says so.

`python examples/methods/run_all.py --force` runs them, `--write-docs` writes this page from their results, `--smoke` on
any of them runs a few steps.
"""


def page(found: list[dict]) -> str:
    """The Markdown of docs/methods-miniatures.md."""
    shown = sum(result["shows"] for result in found)
    lines = [INTRODUCTION, f"Shown: {shown} of {len(found)}.", ""]
    if missing := [f"`{name}`" for name in NAMES if name not in {r["name"] for r in found}]:
        lines += [f"Not run in full yet: {', '.join(missing)}.", ""]
    lines += ["| miniature | claim | direction | found | CPU seconds, seeds |", "| --- | --- | --- | --- | --- |"]
    for r in found:
        name, cost = f"[`{r['name']}`](#{r['name']})", f"{r['seconds']:.0f}, {r['seeds']}"
        said = "shows" if r["shows"] else "does not show"
        lines.append(f"| {name} | {r['claim']} | {said} | {r['sentence']} | {cost} |")
    for r in found:
        source = (HERE / f"{r['name']}.py").read_text().split('"""')[1].strip()
        lines += ["", f"## {r['name']}", "", source, "", f"![{r['claim']}](methods/{r['name']}.png)", ""]
        lines += ["| figure | mean | standard error |", "| --- | --- | --- |"]
        for name, (mean, error) in r["figures"].items():
            lines.append(f"| {name} | {mean:.4g} | {'' if error is None else f'{error:.2g}'} |")
    return "\n".join(lines) + "\n"


def table(found: list[dict]) -> str:
    """The section of docs/methods.md."""
    lines = ["| row | claim | direction | found | again with |", "| --- | --- | --- | --- | --- |"]
    for r in sorted(found, key=lambda r: ROWS[r["name"]]):
        said = "shows" if r["shows"] else "does not show"
        command = f"`python examples/methods/{r['name']}.py`"
        link = f"[{r['claim']}](methods-miniatures.md#{r['name']})"
        lines.append(f"| {ROWS[r['name']]} | {link} | {said} | {r['sentence']} | {command} |")
    return "\n".join(lines)


def write_docs(results: Path, docs: Path) -> None:
    files = [results / f"{name}.json" for name in NAMES]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    if not found:
        raise SystemExit(f"no results in {results}: run the miniatures first")
    if smoke := [r["name"] for r in found if r["smoke"]]:
        raise SystemExit(f"{', '.join(smoke)} in {results} are of --smoke runs; the page takes whole ones")
    (docs / "methods").mkdir(parents=True, exist_ok=True)
    for result in found:
        if (picture := results / f"{result['name']}.png").exists():  # results are kept, pictures only in docs
            shutil.copyfile(picture, docs / "methods" / picture.name)
    (docs / "methods-miniatures.md").write_text(page(found))
    text = (docs / "methods.md").read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    (docs / "methods.md").write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"Miniatures to run, of {', '.join(NAMES)}.")
    parser.add_argument("--force", action="store_true", help="Run those that have a result too.")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--write-docs", action="store_true", help="Only write the pages.")
    parser.add_argument("--docs", type=Path, default=DOCS)
    asked = parser.parse_args(argv)
    if asked.write_docs:
        return write_docs(asked.out, asked.docs)
    if unknown := [name for name in asked.names if name not in NAMES]:
        parser.error(f"no miniature is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    for name in asked.names or NAMES:
        if not asked.names and not asked.force and (asked.out / f"{name}.json").exists():
            continue
        options = ["--out", str(asked.out), *(["--smoke"] if asked.smoke else [])]
        options += ["--seeds", str(asked.seeds)] if asked.seeds else []
        importlib.import_module(name).main(options)


if __name__ == "__main__":
    main()
