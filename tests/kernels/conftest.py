"""The CUDA kernels' logic as a module for the host."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def host_cuda(tmp_path_factory):
    """potstill._cuda with its kernels on the host: csrc/cuda_bindings.cpp, host_rows.cpp and host_topk.cpp."""
    import pybind11

    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("host_cuda")
    include = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = "-O0 -std=c++17 -fPIC -fvisibility=hidden -pthread".split() + [f"-I{path}" for path in include]
    sources = [ROOT / "csrc/cuda_bindings.cpp", *sorted((ROOT / "tests/kernels").glob("host_*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = [
        subprocess.Popen(["g++", *flags, "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    failed = [job.args[-3] for job in jobs if job.wait()]
    assert not failed, failed
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("potstill._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
