"""`potstill doctor`: what was built, what the machine has, what each backend says to each kind of tensor."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from potstill import __version__

PACKAGE = Path(__file__).parent
# extension -> (what is lost without it, whether a complete installation may lack it)
EXTENSIONS = {
    "_cpp": (
        "not built; CPU losses and top-k run in plain torch. Install again with a C++17 compiler",
        False,
    ),
    "_rust": ("not built; there is no cache. Install again with Rust", False),
    "_cuda": (
        "not built; found no CUDA toolkit. POTSTILL_CUDA=1 and CUDA_HOME at install time demand it",
        True,
    ),
}
# optional package -> the extra that brings it
EXTRAS = {
    "transformers": "hf",
    "accelerate": "hf",
    "gguf": "hf",
    "trl": "trl",
    "pyarrow": "arrow",
    "datasets": "arrow",
    "obstore": "remote",
    "ray": "ray",
    "matplotlib": "bench",
}
PACKAGES = ("numpy", "torch", "triton", "tqdm", "click", *EXTRAS)
CPU_FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "amx_bf16",
)
DTYPES = ("float32", "float64", "bfloat16", "float16")
COLUMNS, K = 49152, 64  # an ordinary vocabulary and cache, for backends that ask


def report(as_json: bool = False, reasons: bool = False) -> int:
    """Prints the findings, `reasons` with what every backend answered; returns 0 when nothing is wrong, else 1."""
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else "\n".join(lines(facts, reasons)))
    return 1 if facts["problems"] else 0


def collect() -> dict[str, Any]:
    """All findings: version, built, machine, packages, backends, notes, and problems (empty: all is well)."""
    built = {name: extension(name) for name in EXTENSIONS}
    problems = [f"{name}: {found['detail']}" for name, found in built.items() if found["wrong"]]
    versions = packages()
    facts: dict[str, Any] = {
        "version": __version__,
        "built": built,
        "machine": machine(),
        "packages": versions,
    }
    facts["notes"] = notes(versions)
    try:
        import torch
    except ImportError as error:
        return {**facts, "backends": [], "problems": [*problems, f"torch does not import: {error}"]}
    facts["machine"] |= devices(torch)
    facts["backends"] = backends(torch)
    has_cuda = torch.cuda.is_available()
    for row in facts["backends"]:
        if row["serves"] is None and (row["device"] == "cpu" or has_cuda):
            problems.append(f"{row['op']}: no backend serves {row['dtype']} on {row['device']}")
    return {**facts, "problems": problems}


def extension(name: str) -> dict[str, Any]:
    """Whether a native module loads; `detail` says what it holds, or why it does not load."""
    missing, optional = EXTENSIONS[name]
    try:
        module = importlib.import_module(f"potstill.{name}")
    except ImportError as error:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        files = sorted(file.name for file in PACKAGE.glob(f"{name}.*.so"))
        if not files:
            return {"present": False, "wrong": not optional, "detail": missing}
        if f"{name}{suffix}" not in files:
            detail = f"built for another Python: {', '.join(files)}; this one loads {name}{suffix}. Install again"
        else:
            detail = f"does not load: {error}"
        return {"present": False, "wrong": True, "detail": detail}
    detail = Path(module.__file__ or "").name
    if name == "_cpp":
        detail += f", compiled for {', '.join(module.compiled_isas())}; this processor gets {module.isa()}"
    return {"present": True, "wrong": False, "detail": detail}


def machine() -> dict[str, Any]:
    """Python, system, processor, cores this process may use, instruction sets."""
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{model}, {cores} core{'s' if cores > 1 else ''}",
        "instructions": " ".join(flag for flag in CPU_FLAGS if flag in flags) or "not known",
    }


def devices(torch: Any) -> dict[str, Any]:
    """Threads and CUDA devices as torch sees them."""
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            found.append(f"{card.name} (sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB)")
        cuda = "; ".join(found)
    elif torch.version.cuda:
        cuda = f"no device; torch was built for CUDA {torch.version.cuda}"
    else:
        cuda = "no device; torch was built without CUDA"
    return {"threads": torch.get_num_threads(), "cuda": cuda}


def packages() -> dict[str, str | None]:
    """The versions of what potstill uses; None where a package is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def notes(versions: dict[str, str | None]) -> list[str]:
    """Known combinations that hurt."""
    numpy, triton = versions["numpy"], versions["triton"]
    if numpy and triton and number(numpy) >= (2, 4) and number(triton) <= (3, 6):
        return [f"Triton {triton}'s interpreter needs numpy < 2.4, here is {numpy}: TRITON_INTERPRET=1 will fail"]
    return []


def number(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def backends(torch: Any) -> list[dict[str, Any]]:
    """For each op, device and dtype: which backend serves, and what each of them says (None: it serves)."""
    from potstill import dispatch

    rows = []
    for op in dispatch.ops():
        for device in ("cpu", "cuda"):
            for dtype in DTYPES:
                facts = dispatch.Facts(op, torch.device(device), getattr(torch, dtype), columns=COLUMNS, k=K)
                answers = dispatch.explain(facts)
                serves = next((backend for backend, refusal in answers if refusal is None), None)
                rows.append({"op": op, "device": device, "dtype": dtype, "serves": serves, "answers": answers})
    return rows


def served(rows: list[dict[str, Any]]) -> list[str]:
    """A line an op: the backend for most dtypes on each device, others behind it with their dtypes."""
    cells: dict[str, dict[str, str]] = {}
    for op, device in dict.fromkeys((row["op"], row["device"]) for row in rows):
        by: dict[str, list[str]] = {}  # backend -> dtypes, those of fp32 first
        for row in rows:
            if (row["op"], row["device"]) == (op, device):
                by.setdefault(row["serves"] or "none", []).append(row["dtype"])
        first, *others = by
        rest = "; ".join(f"{', '.join(by[name])}: {name}" for name in others)
        cells.setdefault(op, {})[device] = first + (f" ({rest})" if rest else "")
    table = [["", "cpu", "cuda"], *([op, found["cpu"], found["cuda"]] for op, found in cells.items())]
    widths = [max(len(line[i]) for line in table) for i in range(2)]
    return [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in table]


def answers(rows: list[dict[str, Any]]) -> list[str]:
    """What every backend says to each op and device, dtypes with the same answers together."""
    said: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        said.setdefault((row["op"], row["device"], tuple(row["answers"])), []).append(row["dtype"])
    out = []
    for (op, device, given), dtypes in said.items():
        out.append(f"  {op}, {device}: {', '.join(dtypes)}")
        out += [f"    {backend:<7} {'serves' if refusal is None else 'no: ' + refusal}" for backend, refusal in given]
    return out


def lines(facts: dict[str, Any], reasons: bool = False) -> list[str]:
    """The findings as text."""
    out = [f"potstill {facts['version']}", "", "Built"]
    out += [f"  {name:<6} {found['detail']}" for name, found in facts["built"].items()]
    out += ["", "Machine"]
    out += [f"  {name:<13} {value}" for name, value in facts["machine"].items()]
    here = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    extras = sorted({EXTRAS[name] for name in EXTRAS if not facts["packages"][name]})
    out += ["", "Packages", f"  {', '.join(here)}"]
    if extras:
        out.append(f"  incomplete extras: {', '.join(extras)} (pip install 'potstill[{extras[0]}]')")
    out += [f"  note: {note}" for note in facts["notes"]]
    out += ["", "What serves (--reasons: and why not another)", *served(facts["backends"])]
    if reasons:
        out += ["", "Backends, best first", *answers(facts["backends"])]
    out.append("")
    out += [f"problem: {problem}" for problem in facts["problems"]] or ["all is well"]
    return out
