"""Rows of the catalog without a gradient from a teacher to a student, or a rule by which data are chosen: no recipe."""

from __future__ import annotations

from potstill.methods.papers import ABSTRACT, Row, enter

OUTSIDE = {
    71: (
        "CleanMAP",
        "arXiv:2504.10738",
        "It scores the confidence of map updates and fuses them; no student is trained by a loss.",
    ),
    72: ("LLaMP", "arXiv:2401.17244", "Agents that retrieve and compute; nothing is trained."),
    73: (
        "DROC",
        "arXiv:2311.10678",
        "It stores corrections of a robot as text and retrieves them; there is no gradient.",
    ),
    74: ("A survey on model compression for large language models", "arXiv:2308.07633", "A survey."),
    75: (
        "CompactifAI",
        "arXiv:2401.14109",
        "It factorises weights as tensor networks and heals by cross-entropy; there is no teacher.",
    ),
    76: ("Turbo", "arXiv:2312.07408", "It prunes tokens at inference; nothing is trained."),
    77: (
        "A survey on knowledge distillation of large language models",
        "arXiv:2402.13116",
        "A survey, a list of categories.",
    ),
}
for number, (paper, source, why) in OUTSIDE.items():
    enter(Row(number, paper, source, "E", "none", ABSTRACT, "out of scope", why))
