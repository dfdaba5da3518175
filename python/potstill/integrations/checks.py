"""Is this the cache that is meant? Asked before the first step, answered with a sentence that names the difference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from potstill.capture.models import tokenizer_hash

NAMES = ("teacher", "teacher_revision", "tokenizer", "chat_template")


class WrongCache(ValueError):
    """A cache whose vocabulary, teacher, revision, tokenizer, template or sequences are not the ones asked for."""


def template_hash(template: Any) -> str:
    """`blake2b:<32 hex>` of a chat template: its text, or a tokenizer that carries one; "" for none.

    A cache whose texts were rendered with a template names it:
    `Spec(..., extra={"chat_template": template_hash(tokenizer)})`.
    """
    text = template if isinstance(template, str) else getattr(template, "chat_template", None)
    if isinstance(text, Mapping):  # named templates
        text = "\n".join(f"{name}\n{text[name]}" for name in sorted(text))
    if not text:
        return ""
    return "blake2b:" + hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def check_cache(
    cache: Any, *, vocab_size: int | None = None, tokenizer: Any = None, expect: Mapping[str, str | None] | None = None
) -> None:
    """Raises WrongCache unless `cache` (`ps.cache.open`) is over `vocab_size`, this tokenizer and what `expect` names.

    tokenizer: the one of the training data. Its content is held against the cache's where the cache names one, and its
        chat template where the cache names one.
    expect: any of teacher, teacher_revision, tokenizer, chat_template -> the value in the cache's spec (for the last
        two a hash, a tokenizer, or a template's text). None for a name switches its comparison off. A cache that does
        not say what is expected is refused as well.
    """
    wanted: dict[str, Any] = dict(expect or {})
    if unknown := [name for name in wanted if name not in NAMES]:
        raise ValueError(f"expect names {unknown[0]!r}; known are {', '.join(NAMES)}")
    if vocab_size is not None and cache.spec.vocab_size != vocab_size:
        raise WrongCache(
            f"the cache is over a vocabulary of {cache.spec.vocab_size}, the student's head over {vocab_size}: teacher "
            "and student need one tokenizer; where only the head's matrix is padded, give "
            f"DistillConfig(vocab_size={cache.spec.vocab_size})"
        )
    has = _identity(cache)
    if tokenizer is not None and hasattr(tokenizer, "get_vocab"):
        for name in ("tokenizer", "chat_template"):
            if has[name]:
                wanted.setdefault(name, tokenizer)
    for name, sentence in differences(cache, wanted).items():
        raise WrongCache(
            f"{sentence}: build one with it, or say otherwise with expect={{{name!r}: ...}} (None switches this "
            "comparison off)"
        )


def differences(cache: Any, wanted: Mapping[str, Any]) -> dict[str, str]:
    """What of `wanted` (see `check_cache`'s expect) the cache is not, or does not say: name -> sentence."""
    has = _identity(cache)
    expected = {name: _hashed(name, value) for name, value in wanted.items() if value is not None}
    return {name: _sentence(name, has[name], value) for name, value in expected.items() if has[name] != value}


def _identity(cache: Any) -> dict[str, str]:
    """NAMES -> what the cache's spec says, "" where it says nothing."""
    has = {name: getattr(cache.spec, name) for name in NAMES[:3]}
    return has | {"chat_template": str(cache.spec.extra.get("chat_template", ""))}


def _hashed(name: str, value: Any) -> str:
    if name == "tokenizer" and not isinstance(value, str):
        return tokenizer_hash(value)
    if name == "chat_template" and not (isinstance(value, str) and value.startswith("blake2b:")):
        return template_hash(value)
    return str(value)


def _sentence(name: str, has: str, wanted: str) -> str:
    what = {
        "teacher": "teacher", "teacher_revision": "teacher's revision", "tokenizer": "tokenizer",
        "chat_template": "chat template",
    }[name]  # fmt: skip
    found = f"the cache was built with the {what} {has!r}" if has else f"the cache does not say which {what} it has"
    return f"{found}, {wanted!r} is expected"


def check_keys(cache: Any, dataset: Any, key: str = "key") -> None:
    """Raises WrongCache for examples without teacher rows, where a data set can be looked at cheaply.

    A list of mappings, or a `datasets.Dataset`; others are left to the collator, which names each as it comes.
    """
    for at, name in enumerate(_keys(dataset, key)):
        if name not in cache:
            raise WrongCache(
                f"the cache has no teacher rows for {name!r}, example {at} of the data set (it holds {len(cache)} "
                "sequences): build them, or leave it out"
            )


def _keys(dataset: Any, key: str) -> Iterable[Any]:
    if isinstance(dataset, Mapping):
        return [name for part in dataset.values() for name in _keys(part, key)]
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list) and hasattr(dataset, "__getitem__"):
        if key not in columns:
            raise WrongCache(
                f"the data set has no column {key!r} (it has {', '.join(columns)}): every example names its sequence "
                "in the cache"
            )
        return dataset[key]
    if isinstance(dataset, (list, tuple)) and all(isinstance(x, Mapping) and key in x for x in dataset):
        return [x[key] for x in dataset]
    return ()
