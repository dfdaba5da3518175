"""Compiles every GPU kernel for sm_80, sm_90 and sm_100 without a GPU, and holds it to its register limits.

    python bench/compile_gpu.py [--jobs 2] [--only TEXT]

Triton kernels (each divergence, dense and sparse, bf16 and fp32, and the rarer options once) become cubins,
whose resources cuobjdump reads; csrc/*.cu goes through nvcc with -Xptxas -v. A kernel fails that spills,
keeps a stack, or takes more registers than let two of its blocks share a multiprocessor.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRITON_ARCHS = (80, 90, 100)
NVCC_ARCHS = ("80", "90a", "100")
REGISTERS = 65536  # of a multiprocessor, on each of these architectures


@dataclass(frozen=True)
class Result:
    """What one kernel takes on one architecture; `error` when it did not compile."""

    kernel: str
    variant: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    threads: int = 256
    error: str = ""

    @property
    def limit(self) -> int:
        return min(255, REGISTERS // (2 * self.threads))

    @property
    def verdict(self) -> str:
        if self.error:
            return self.error
        found = {"spills": self.spills, "stack": self.stack, "registers": max(0, self.registers - self.limit)}
        return ", ".join(f"{name} over by {value}" for name, value in found.items() if value) or "ok"


def triton_variants() -> list[tuple[str, str, str, str, tuple[tuple[str, object], ...]]]:
    """(kernel, divergence, dtype, what is special, constexprs that differ from the ordinary ones)."""
    from potstill import divergences

    variants = []
    for name in divergences.names():
        for dtype in ("bf16", "fp32"):
            variants.append(("dense", name, dtype, "", ()))
            variants.append(("sparse", name, dtype, "bucket", ()))
    for name in divergences.names("estimator"):
        variants.append(("sparse", name, "bf16", "sampled", (("TAIL", "sampled"),)))
    for name in divergences.names("metric"):
        variants.append(("dense", name, "bf16", "no gradient", (("GRAD", False), ("CE", False))))
    capped = (("STUDENT_CAP", True), ("TEACHER_CAP", True))
    variants.append(("dense", "jsd", "bf16", "softcap", capped))
    variants.append(("dense", "jsd", "fp16", "", ()))
    variants.append(("dense", "jsd", "bf16", "no gradient", (("GRAD", False),)))
    variants.append(("sparse", "jsd", "bf16", "bucket softcap", (("SOFTCAP", True),)))
    variants.append(("sparse", "jsd", "bf16", "bucket K=1023", (("ENTRIES", 1024),)))
    variants.append(("sparse", "jsd", "bf16", "renormalize", (("TAIL", "renormalize"),)))
    variants.append(("sparse", "jsd", "bf16", "drop", (("TAIL", "drop"),)))
    for dtype in ("bf16", "fp16", "fp32"):
        variants.append(("topk", "", dtype, "k=64", ()))
    variants.append(("topk", "", "bf16", "k=1024", (("LIST", 2048),)))
    variants.append(("topk", "", "bf16", "k=64 softcap", (("SOFTCAP", True),)))
    variants.append(("more", "", "bf16", "ids, T", ()))
    variants.append(("chunk sums", "", "fp32", "", ()))
    variants.append(("chunk sums, backward", "", "fp32", "", ()))
    return variants


def parameter_type(name: str, dtype: str, values: int) -> str | tuple[str, ...]:
    """The type of a kernel's parameter in Triton's words, by its name."""
    exact: dict[str, str | tuple[str, ...]] = {"values": ("fp32",) * values, "p_labels": "*i64", "p_tokens": "*i64"}
    exact |= dict.fromkeys(("p_ids", "p_sorted", "p_list", "p_ranks", "p_chunk"), "*i32")
    exact |= dict.fromkeys(("p_starts", "p_ends"), "*i64")
    if name in exact:
        return exact[name]
    if name in ("p_student", "p_teacher", "p_grad", "p_logits"):
        return f"*{dtype}"
    if name.startswith("p_"):
        return "*fp32"
    return "i32" if name in ("columns", "vocab", "k", "count", "tokens") or name.endswith("_stride") else "fp32"


def compile_triton(job: tuple[str, str, str, str, tuple[tuple[str, object], ...], int]) -> list[Result]:
    kernel, name, dtype, special, different, arch = job
    import triton
    from potstill import divergences
    from potstill.kernels import triton_chunks, triton_rows, triton_topk
    from potstill.kernels.triton_formula import device_function
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    entry = divergences.TABLE[name or "forward_kl"]
    function, shape = {
        "dense": (triton_rows.dense_kernel, triton_rows.launch_shape(151936, triton_rows.DENSE_BLOCK)),
        "sparse": (triton_rows.sparse_kernel, triton_rows.launch_shape(151936, triton_rows.SPARSE_BLOCK)),
        "topk": (triton_topk.topk_kernel, triton_topk.launch_shape(151936, 64)),
        "more": (triton_topk.more_kernel, triton_topk.launch_shape(151936, 64)),
        "chunk sums": (triton_chunks.sums_kernel, dict(triton_chunks.LAUNCH)),
        "chunk sums, backward": (triton_chunks.gather_kernel, dict(triton_chunks.LAUNCH)),
    }[kernel]
    options = {name: shape.pop(name) for name in ("num_warps", "maxnreg")}
    constants = {
        "FORMULA": device_function(entry.formula), "OUTER": entry.outer and device_function(entry.outer),
        "TEMPERED": True, "CE": True, "GRAD": True,
        "STUDENT_CAP": False, "TEACHER_CAP": False, "SOFTCAP": False, "TAIL": "bucket", "ENTRIES": 128,
        "TOKENS": True, "REST": True,
    } | shape | dict(different)  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    signature = {
        p: "constexpr" if p in constants else parameter_type(p, dtype, len(entry.values)) for p in function.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, p in enumerate(function.arg_names)
        if p.startswith("p_") or p.endswith("_stride")
    }
    variant, sm = " ".join(filter(None, (name, dtype, special))), f"sm_{arch}"
    try:
        source = ASTSource(function, signature, constants, aligned)
        done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(done.asm["cubin"])
            file.flush()
            cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            command = [cuobjdump, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except Exception as error:  # one kernel that does not compile must not hide the others
        return [Result(f"triton {kernel}", variant, sm, error=f"{type(error).__name__}: {error}"[:2000])]
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage).groups())
    return [Result(f"triton {kernel}", variant, sm, registers, stack, local, 32 * options["num_warps"])]


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), f"{sysconfig.get_path('purelib')}/nvidia/cu13", "/usr/local/cuda"]
    for path in (*(f"{home}/bin/nvcc" for home in homes if home), shutil.which("nvcc")):
        # a wrapper called nvcc on PATH has no cicc beside it
        if path and (Path(path).resolve().parent.parent / "nvvm/bin/cicc").exists():
            return Path(path)
    return None


def named(mangled: str) -> tuple[str, str, int]:
    """(kernel, variant, threads where the name says) of a kernel in csrc/."""
    if found := re.search(r"\d([a-z]+)_rows_kernel\w*?\d+([a-z_]+)_functor", mangled):
        return found[1], found[2], 0
    if found := re.search(r"topk_kernelI(\w+?)Lb([01])ELi(\d+)E", mangled):
        dtype = next(name for mark, name in (("bfloat16", "bf16"), ("half", "fp16"), ("f", "fp32")) if mark in found[1])
        return "topk", f"{dtype}{'' if found[2] == '1' else ' softcap, ids, T'}", int(found[3])
    return "", mangled, 0


def compile_nvcc(job: tuple[str, str]) -> list[Result]:
    source, arch = job
    label, nvcc = f"nvcc {Path(source).name}", find_nvcc()
    if nvcc is None:
        need = "pip install 'cuda-toolkit[nvcc,cccl,cudart,crt,nvvm]==13.0.2', or set CUDA_HOME"
        return [Result(label, "all", f"sm_{arch}", error=f"no CUDA toolkit was found; {need}")]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", source, "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [Result(label, "all", f"sm_{arch}", error=done.stderr[-2000:])]
    threads = int(re.search(r"kThreads = (\d+)", Path(source).read_text()).group(1))
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    results = []
    for mangled, stack, stores, loads, registers in found:
        kernel, variant, of = named(mangled)
        spills = int(stores) + int(loads)
        resources = (int(registers), int(stack), spills, of or threads)
        results.append(Result(f"{label} {kernel}", variant, f"sm_{arch}", *resources))
    return results or [Result(label, "all", f"sm_{arch}", error="ptxas reported no kernel")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--only", default="", help="only kernels whose line holds this text")
    options = parser.parse_args()
    start = time.perf_counter()
    jobs: list[tuple[Callable[..., list[Result]], tuple]] = [
        (compile_nvcc, (str(source), arch)) for source in sorted(ROOT.glob("csrc/*.cu")) for arch in NVCC_ARCHS
    ]
    jobs += [(compile_triton, (*variant, arch)) for variant in triton_variants() for arch in TRITON_ARCHS]
    jobs = [job for job in jobs if options.only in f"{job[0].__name__} {job[1]}"]
    with tempfile.TemporaryDirectory() as cache:  # a compile, not a look-up
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            pending = [pool.submit(function, job) for function, job in jobs]
            results = [result for future in pending for result in future.result()]
    numbers = f"{'regs':>5} {'limit':>6} {'stack':>6} {'spills':>7}"
    print(f"{'kernel':22} {'variant':26} {'arch':8} {numbers}  verdict")
    for r in sorted(results, key=lambda r: (r.kernel, r.variant)):
        numbers = f"{r.registers:5} {r.limit:6} {r.stack:6} {r.spills:7}"
        print(f"{r.kernel:22} {r.variant:26} {r.arch:8} {numbers}  {r.verdict}")
    failed = sum(r.verdict != "ok" for r in results)
    print(f"{len(results)} kernels in {time.perf_counter() - start:.0f} s with {options.jobs} processes")
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
