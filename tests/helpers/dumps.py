"""Dump folders made of numbers, for tests: features in which the label can be found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.data.tables import write_table

DIMS = {"audio": 6, "text": 10, "text_sim": 10, "text_asr": 10, "video": 5}
NOISE = {"audio": 2.0, "text": 0.3, "text_sim": 0.7, "text_asr": 0.5, "video": 2.0}


def make_dump(
    path: Path,
    count: int = 24,
    seed: int = 0,
    names: tuple[str, ...] = tuple(DIMS),
    absent: dict[str, set[int]] | None = None,
) -> Path:
    """Write ``count`` utterances; ``absent`` names, by feature, the numbers of those that lack it."""
    rng = np.random.default_rng(seed)
    ids = [f"spk{i % 4}-{i:03d}" for i in range(count)]
    labels = np.round(rng.uniform(-3, 3, count) * 3) / 3
    path.mkdir(parents=True)
    for name in names:
        dim = DIMS[name]
        direction = np.random.default_rng(len(name.split("_")[0])).normal(size=dim)
        writer = ShardWriter(path, name, 1, {"made": "up"})
        kept = []
        for i, (utt, label) in enumerate(sorted(zip(ids, labels, strict=True))):
            if absent and i in absent.get(name, ()):
                writer.absent(utt, "left out on purpose")
                continue
            frames = int(rng.integers(1, 12))
            noise = rng.normal(size=(frames, dim)) * NOISE[name]
            writer.write(utt, (label * direction + noise).astype(np.float32))
            kept.append(utt)
        writer.commit()
        writer.finish()
        merge_shards(path, name, 1, {"dim": dim, "extractor": "noise"}, sorted(ids))
    write_table(path / "utt2label", {u: f"{y:.4f}" for u, y in zip(ids, labels, strict=True)})
    return path
