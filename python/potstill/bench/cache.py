"""The cache that `potstill demo` wrote, read back: bytes a token and decoding rate, beside Parquet and raw arrays."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np


def figures(path: Path, repeats: int = 5) -> list[dict[str, Any]]:
    """Rows of the table for the cache at `path`; Parquet is left out where pyarrow is not installed."""
    from potstill import cache

    opened = cache.open(path)
    keys = opened.keys()
    decoded = [opened.numpy(key) for key in keys]
    tokens, ids, log_probs, log_rest = (np.concatenate(x) for x in zip(*decoded, strict=True))
    n = len(tokens)
    readers: dict[str, Any] = {"potstill": lambda: [opened.numpy(key) for key in keys]}
    sizes = {"potstill": opened.num_bytes / n, "raw int32 + fp32 arrays": (4 + 8 * ids.shape[1] + 4)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            pass
        else:
            file = Path(folder) / "rows.parquet"
            columns = {
                "tokens": pa.array(tokens),
                "log_rest": pa.array(log_rest),
                "ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), ids.shape[1]),
                "log_probs": pa.FixedSizeListArray.from_arrays(pa.array(log_probs.ravel()), ids.shape[1]),
            }
            pq.write_table(
                pa.table(columns), file, compression="zstd", use_dictionary=False, use_byte_stream_split=True
            )
            sizes["Parquet, byte-stream-split + zstd"] = file.stat().st_size / n
            readers["Parquet, byte-stream-split + zstd"] = lambda: pq.read_table(file, use_threads=False)
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(repeats):
            for name, read in readers.items():
                start = time.perf_counter()
                read()
                seconds[name].append(time.perf_counter() - start)
    return [
        {
            "case": f"cache of {n:,} tokens, k={ids.shape[1]}",
            "variant": name,
            "bytes_per_token": size,
            "tokens_per_second": n / median(seconds[name]) if name in seconds else None,
        }
        for name, size in sizes.items()
    ]
