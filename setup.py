"""Compiles csrc/ with pybind11: potstill._cpp always, potstill._cuda where nvcc is. Needs no torch.

csrc/*_isa.cpp are compiled once per instruction set, with POTSTILL_ISA naming it; other sources once.
Objects are named by the hash of all that went into them, so that a second build compiles only what changed.

CXX, CXXFLAGS, LDFLAGS    as everywhere
POTSTILL_CUDA             1: build _cuda or stop; 0: never; unset: when nvcc is found
POTSTILL_CUDA_ARCHS       default "80 90a 100"
POTSTILL_ISAS             which of base, avx2, avx512 to compile; default all that the processor family has
POTSTILL_COMPILE_JOBS     how many files are compiled at once, default 2
POTSTILL_CSRC_INCLUDE     a folder whose files take the place of those of the same name in csrc/
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
COMPILE_JOBS = int(os.environ.get("POTSTILL_COMPILE_JOBS", "2"))  # a translation unit of templates takes about 1 GB
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -pthread -DNDEBUG -Wall".split()
NVCC_FLAGS = "-O3 -std=c++17 --expt-relaxed-constexpr -t2 -Xcompiler=-fPIC,-fvisibility=hidden".split()
CUDA_ARCHS = "80 90a 100"
CUDA_PACKAGE = "cuda-toolkit[nvcc,cccl,cudart,crt,nvvm]==13.0.2"
X86_ISAS = {
    "base": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}


class Job(NamedTuple):
    """One object to compile."""

    command: list[str]
    source: Path
    label: str


def stop(sentence: str) -> NoReturn:
    sys.exit(f"potstill: {sentence}")


def find_isas() -> dict[str, str]:
    """Instruction set -> compiler flags; base is always among them."""
    known = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"base": ""}
    wanted = os.environ.get("POTSTILL_ISAS", " ".join(known)).replace(",", " ").split()
    if strange := [isa for isa in wanted if isa not in known]:
        stop(f"POTSTILL_ISAS names {', '.join(strange)}; this machine's compiler knows {', '.join(known)}.")
    return {isa: flags for isa, flags in known.items() if isa in wanted or isa == "base"}


def find_cxx() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    sought = f"CXX={named[0]} is not there" if named else "none of c++, g++, clang++ is on PATH"
    stop(
        f"building needs a C++17 compiler; {sought}. "
        "Install one (Debian: apt-get install g++; macOS: xcode-select --install)."
    )


def find_headers() -> tuple[list[str], str]:
    """Include flags of Python and pybind11, and their versions."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        stop(f"building needs Python's headers; {include} has no Python.h. Install them (Debian: python3-dev).")
    try:
        import pybind11
    except ImportError:
        stop("building needs pybind11. Install it: pip install pybind11 (pip install . does so itself).")
    return [f"-I{include}", f"-I{pybind11.get_include()}"], f"{sys.version} {pybind11.__version__}"


def find_cuda() -> Path | None:
    """The root of a CUDA toolkit that can compile, or None; stops when POTSTILL_CUDA=1 and there is none."""
    wish = os.environ.get("POTSTILL_CUDA", "")
    if wish not in ("", "0", "1"):
        stop(f"POTSTILL_CUDA={wish!r} is unknown; give 1 (build _cuda or stop), 0 (never) or unset it.")
    if wish == "0":
        return None
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parent.parent)
    roots.append(Path("/usr/local/cuda"))
    site = {*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    roots += [Path(folder, "nvidia", "cu13") for folder in sorted(site)]
    roots = [root.resolve() for root in roots if (root / "bin/nvcc").exists()]
    # a wrapper called nvcc on PATH has no cicc beside it; taken where _cuda is demanded and there is no other
    for root in [*(root for root in roots if (root / "nvvm/bin/cicc").exists()), *(roots if wish == "1" else [])]:
        return root
    if wish == "1":
        stop(
            "POTSTILL_CUDA=1, but no CUDA toolkit was found in CUDA_HOME, on PATH, in /usr/local/cuda or in "
            f"site-packages/nvidia/cu13. Install one (pip install '{CUDA_PACKAGE}') and set CUDA_HOME."
        )
    return None


class BuildNative(build_ext):
    """Calls the compilers itself: setuptools knows neither instruction sets nor nvcc."""

    def build_extension(self, ext: Extension) -> None:
        self.cxx = find_cxx()
        self.sources = self.overlay()
        self.shared = sorted(file for kind in ("h", "cuh", "inc") for file in self.sources.glob(f"*.{kind}"))
        own_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.headers, self.versions = find_headers()
        flags = [*CXX_FLAGS, f"-I{self.sources}", *self.headers, *own_flags]
        jobs, libraries = self.cuda_jobs(flags) if ext.name.endswith("._cuda") else self.cpp_jobs(flags)
        with ThreadPoolExecutor(COMPILE_JOBS) as pool:
            objects = list(pool.map(self.compile, jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        inputs = [*map(str, objects), *libraries, *shlex.split(os.environ.get("LDFLAGS", ""))]
        self.call([*self.cxx, *mode, "-pthread", *inputs, "-o", str(target)], target.name)

    def overlay(self) -> Path:
        """csrc/, or a copy of it with the files of POTSTILL_CSRC_INCLUDE on top."""
        extra = os.environ.get("POTSTILL_CSRC_INCLUDE")
        if not extra:
            return CSRC
        copy = Path(self.build_temp).resolve() / "csrc"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(CSRC, copy)
        shutil.copytree(extra, copy, dirs_exist_ok=True)
        return copy

    def cpp_jobs(self, flags: list[str]) -> tuple[list[Job], list[str]]:
        jobs = []
        isas = find_isas()
        have = [f"-DPOTSTILL_HAVE_{isa.upper()}" for isa in isas if isa != "base"]
        for source in sorted(self.sources.glob("*.cpp")):
            if "cuda" in source.name:
                continue
            command = [*self.cxx, *flags, *have, "-c", str(source)]
            if not source.stem.endswith("_isa"):
                jobs.append(Job(command, source, source.name))
                continue
            for isa, isa_flags in isas.items():
                defines = [f"-DPOTSTILL_ISA={isa}", f"-DPOTSTILL_ISA_{isa.upper()}=1"]
                jobs.append(Job([*command, *isa_flags.split(), *defines], source, f"{source.name} [{isa}]"))
        return jobs, []

    def cuda_jobs(self, flags: list[str]) -> tuple[list[Job], list[str]]:
        root = find_cuda()
        assert root is not None  # the extension is listed only then
        archs = os.environ.get("POTSTILL_CUDA_ARCHS", CUDA_ARCHS).replace(",", " ").replace(";", " ").split()
        numbers = [arch.removeprefix("sm_") for arch in archs]
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
        nvcc = [str(root / "bin/nvcc"), *NVCC_FLAGS, *codes, f"-ccbin={self.cxx[0]}", f"-I{self.sources}"]
        jobs = [
            Job([*nvcc, "-c", str(source)], source, f"{source.name} [{' '.join(numbers)}]")
            for source in sorted(self.sources.glob("*.cu"))
        ]
        bindings = self.sources / "cuda_bindings.cpp"
        jobs.append(Job([*self.cxx, *flags, f"-I{root}/include", "-c", str(bindings)], bindings, bindings.name))
        # the static runtime looks for the driver when first called, so that _cuda imports without one
        return jobs, [f"-L{root}/lib64", f"-L{root}/lib", "-lcudart_static", "-ldl", "-lrt"]

    def compile(self, job: Job) -> Path:
        # an isolated build has its headers in another folder every time: their versions count
        parts = [part for part in job.command if part not in self.headers]
        digest = hashlib.sha256("\0".join([self.versions, *parts]).encode())
        for file in [job.source, *self.shared]:
            digest.update(file.name.encode() + file.read_bytes())
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target = objects / f"{job.source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.o")
            self.call([*job.command, "-o", str(part)], job.label)
            part.replace(target)
        return target

    def call(self, command: list[str], label: str) -> None:
        sys.stdout.write(f"potstill: {label}\n")  # one write: two jobs print at once
        sys.stdout.flush()
        if subprocess.run(command).returncode:
            stop(f"this command failed while building {label}: {shlex.join(command)}")


if os.name != "posix":
    stop(f"the extensions build on Linux and macOS; this is {platform.system()}. On Windows use WSL 2.")
extensions = [Extension("potstill._cpp", [])]
if list(CSRC.glob("*.cu")) and find_cuda() is not None:
    extensions.append(Extension("potstill._cuda", []))
setup(
    packages=["potstill"],
    package_dir={"": "python"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
)
