"""Asks this library and others the same questions about known failures, and prints a table.

    python bench/parity.py [--only WORD] [--write-docs]

Each subject is called as its documentation says, on the same numbers, on the CPU in plain torch; GPU kernels are not
asked here. A package that is not installed is left out. `--write-docs` puts the table between the marks of
docs/correctness.md. torchtune 0.6.1 imports torchao, omegaconf, sentencepiece, tiktoken and blobfile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from parity_checks import CHECKS  # noqa: E402
from parity_contract import answer  # noqa: E402
from parity_subjects import SUBJECTS  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs" / "correctness.md"
MARKS = ("<!-- table: python bench/parity.py --write-docs -->", "<!-- end of table -->")


def table(only: str = "") -> str:
    """The table as Markdown, a row a failure class and a column a subject, and what each class asked."""
    asked = [s for s in SUBJECTS if s.version is not None]
    for s in SUBJECTS:
        if s.version is None:
            print(f"{s.name} left out: the package {s.package} is not installed", file=sys.stderr)
    chosen = [which for which in CHECKS if only in which.name]
    lines = [
        "| failure class | " + " | ".join(f"{s.name} {s.version}" for s in asked) + " |",
        "| --- " * (len(asked) + 1) + "|",
    ]
    for which in chosen:
        print(f"asking: {which.name}", file=sys.stderr)
        lines.append("| " + " | ".join([f"**{which.name}**", *(cell(*answer(s, which)) for s in asked)]) + " |")
    packages = dict.fromkeys(f"{s.package} {s.version}" for s in asked if s.package != "potstill")
    capability = torch.backends.cpu.get_cpu_capability()
    lines += ["", f"On the CPU ({capability}), one thread, torch {torch.__version__}, {', '.join(packages)}.", ""]
    lines += ["What each asked, what right is, and this library's test of it:", ""]
    lines += [f"- **{which.name}**: {which.inputs}. `{which.test.removeprefix('tests/')}`" for which in chosen]
    return "\n".join(lines)


def cell(verdict: str, said: str) -> str:
    said = said.replace("|", "/")
    if verdict not in ("", "right", "not offered"):
        return f"**{verdict}**: {said}"
    return f"{verdict}: {said}" if verdict else said


def write(text: str, file: Path = DOCS) -> None:
    """Replace what stands between the marks."""
    before, rest = file.read_text().split(MARKS[0], 1)
    file.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="failure classes whose name has this word")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = table(options.only)
    print(text)
    if options.write_docs:
        write(text)


if __name__ == "__main__":
    main()
