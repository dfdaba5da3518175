"""VocabBytes: the bytes that every id of a tokenizer stands for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill._rust import Vocab

SPECIAL, BYTE_FALLBACK, UNKNOWN, CONTINUATION, LOSSY = 1, 2, 4, 8, 16
_ROLES = {"bos": ("bos", "cls"), "eos": ("eos", "sep"), "pad": ("pad",)}


class VocabBytes:
    """The bytes of ids 0..V-1 of a tokenizer, and what the tokenizer does to a text besides cutting it.

    Made by `from_tokenizer` (any of the forms below), `from_file` or `from_callback`. What the bytes are follows from
    the components that a file names (byte-level alphabet, SentencePiece spaces, byte fallback, WordPiece prefix), never
    from how tokens look; a kind that is not known is refused by name. Vocabularies made from the same file or tokenizer
    are one object inside; pickles carry the bytes, compressed.

    `vocab[id]` are an id's bytes (of a special token, those of its name); `flags` uint8 [V] is a sum of SPECIAL = 1,
    BYTE_FALLBACK = 2, UNKNOWN = 4 (the unknown token, and ids that nothing names), CONTINUATION = 8 (WordPiece `##`),
    LOSSY = 16 (bytes that encoding cannot be relied on to write).
    """

    def __init__(self, native: Vocab):
        self._native = native

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> VocabBytes:
        """From a transformers tokenizer, a `tokenizers.Tokenizer`, a tiktoken encoding, a path or {bytes: id}.

        Raises TypeError for anything else, naming its class.
        """
        if isinstance(tokenizer, VocabBytes):
            return tokenizer
        if isinstance(tokenizer, (str, PathLike)):
            return cls.from_file(tokenizer)
        if isinstance(tokenizer, Mapping):
            return cls(Vocab.from_ranks(dict(tokenizer), []))
        if hasattr(tokenizer, "_mergeable_ranks"):
            specials = list(getattr(tokenizer, "_special_tokens", {}).items())
            return cls(Vocab.from_ranks(tokenizer._mergeable_ranks, specials))
        backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        if backend is not None and hasattr(backend, "to_str"):
            return cls(Vocab.parse(backend.to_str().encode(), "json"))._with_roles_of(tokenizer)
        if hasattr(tokenizer, "to_str"):
            return cls(Vocab.parse(tokenizer.to_str().encode(), "json"))
        file = getattr(tokenizer, "vocab_file", None)
        if isinstance(file, str) and file.endswith(".model") and Path(file).is_file():
            return cls.from_file(file)._with_roles_of(tokenizer)
        raise TypeError(
            f"VocabBytes.from_tokenizer does not know {type(tokenizer).__module__}.{type(tokenizer).__qualname__}; "
            "it takes a fast transformers tokenizer, one with a SentencePiece vocab_file, a tokenizers.Tokenizer, a "
            "tiktoken encoding, a path or {bytes: id}. For others use VocabBytes.from_callback(size, id -> bytes)"
        )

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, specials: Mapping[str, int] | None = None) -> VocabBytes:
        """From tokenizer.json, a SentencePiece .model, tekken.json or a tiktoken rank file (told apart by content), or
        a folder with one of the first three. specials: special tokens (name to id) of a tiktoken file, which has none.
        """
        path = Path(path)
        if path.is_dir():
            names = ("tokenizer.json", "tekken.json", "tokenizer.model", "spiece.model")
            found = next((path / name for name in names if (path / name).is_file()), None)
            if found is None:
                raise ValueError(f"{path} has none of {', '.join(names)}; name the tokenizer's file")
            path = found
        content = path.read_bytes()
        head = content[:65536].lstrip()
        if head.startswith(b"{"):
            form = "tekken" if b'"default_num_special_tokens"' in head else "json"
        elif content[:1] == b"\n":  # protobuf's first field, a piece
            form = "spm"
        else:
            form = "tiktoken"
        if specials and form != "tiktoken":
            raise ValueError(f"specials are for tiktoken files; {path} names its own")
        return cls(Vocab.parse(content, form, list((specials or {}).items())))

    @classmethod
    def from_callback(
        cls, size: int, token_bytes: Callable[[int], bytes | None], *, specials: Iterable[int] = (),
        unknown: int | None = None, prefix_space: str = "never",
    ) -> VocabBytes:  # fmt: skip
        """From a function of an id in 0..size-1 that returns its bytes, or None where they are not known.

        specials: ids of special tokens; their bytes are their names.  prefix_space: "first" when the tokenizer puts a
        space before a text, "every" when also after special tokens.
        """
        tokens = [token_bytes(id) for id in range(size)]
        return cls(Vocab.from_given(tokens, list(specials), unknown, prefix_space))

    def with_roles(self, *, prefix_space: str | None = None, **roles: int) -> VocabBytes:
        """The same bytes with special tokens' roles set: `with_roles(bos=1, eos=2, turn_end=5)`. Roles of one name pair
        across tokenizers; "pad" and "unk" never do. prefix_space replaces what the tokenizer's files say."""
        bad = [id for id in roles.values() if not 0 <= id < len(self)]
        if bad:
            raise ValueError(f"role ids {bad} are outside 0..{len(self)}")
        return VocabBytes(self._native.with_rules(list(roles.items()), [], prefix_space))

    def _with_roles_of(self, tokenizer: Any) -> VocabBytes:
        roles, specials = {}, []
        for role, names in _ROLES.items():
            found = [getattr(tokenizer, f"{name}_token_id", None) for name in names]
            known = [id for id in found if id is not None]
            if known:
                roles[role] = known[0]
        for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
            if token.special and (id >= len(self) or not self.flags[id] & SPECIAL):
                specials.append((id, token.content))
        return VocabBytes(self._native.with_rules(list(roles.items()), specials, None, len(tokenizer)))

    def __len__(self) -> int:
        return len(self._native)

    def __getitem__(self, id: int) -> bytes:
        return self._native.token(id)

    @cached_property
    def flags(self) -> NDArray[np.uint8]:
        """uint8 [V], see the class; read-only."""
        found = self._native.flags()
        found.setflags(write=False)
        return found

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Bytes of every id, int32 [V]; read-only."""
        found = self._native.lengths()
        found.setflags(write=False)
        return found

    def word_starts(self, *, specials: bool = True) -> NDArray[np.bool_]:
        """bool [V]: ids that begin a word, so that a word before them has ended: content whose first byte is ASCII
        whitespace, and special tokens (a text or turn ends) unless told not to count. Their mass in a row is the
        probability that a word ends there; see `linear_alm_loss`."""
        space = np.isin(self._native.first_bytes(), np.frombuffer(b" \t\n\r\f\v", np.uint8))
        special = (self.flags & SPECIAL) != 0
        return np.where(special, specials, space & (self.lengths > 0) & ((self.flags & UNKNOWN) == 0))

    @property
    def rules(self) -> dict[str, Any]:
        """kind, prefix, drops_space, normal (steps of normalisation), roles."""
        return dict(json.loads(self._native.rules()))

    @property
    def roles(self) -> dict[str, int]:
        """Special tokens by role."""
        return dict(self.rules["roles"])

    @property
    def is_lossy(self) -> bool:
        """Whether the tokenizer changes text (NFKC, lower case, dropped whitespace)."""
        return self._native.is_lossy()

    def matched(self, other: VocabBytes) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids (own, other's), int32 [M] each, of content tokens with the same bytes, by own id; each once."""
        return self._native.matched(other._native)

    def projection(
        self, other: VocabBytes, k: int = 4, *, decay: float = 0.1
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """The sparse map [V, V_other] by tokenising each token's bytes: CSR row_ptr [V+1], columns, weights.

        A token with a twin of the same bytes maps to it. Another maps to the first k of the other's tokens that spell
        it, found by merging the pair of lowest id as byte-pair encoding does (longest token from the left for
        WordPiece), with weights in ratio 1 : decay : decay^2 ... that sum to 1; decay=0 keeps the first, the one to be
        predicted at that place. Special tokens have empty rows.
        """
        if k < 1 or not 0 <= decay <= 1:
            raise ValueError(f"projection takes k >= 1 and decay in 0..1, not k={k}, decay={decay}")
        return self._native.projection(other._native, k, decay)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (zlib.compress(self._native.to_bytes(), 6),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VocabBytes) and self._native.hash() == other._native.hash()

    def __hash__(self) -> int:
        return hash(self._native.hash())

    def __repr__(self) -> str:
        rules = self.rules
        return f"VocabBytes({len(self)} ids, {rules['kind']}, prefix={rules['prefix']}, normal={rules['normal']})"


def _unpickle(packed: bytes) -> VocabBytes:
    return VocabBytes(Vocab.parse(zlib.decompress(packed), "vocab"))
