"""A small recipe folder as stages 1 to 5 leave it, made up but with the right shapes and the right order of scores."""

from __future__ import annotations

import json
from pathlib import Path

import kaldiio
import numpy as np
import yaml

from sdumc.conditions import CONDITIONS, modality
from sdumc.data.tables import read_table
from sdumc.files import write_json, write_text
from sdumc.pretrained.quality import summarise
from sdumc.scoring.attention import write_attention
from sdumc.scoring.decoding import Decoded, write_decoded
from sdumc.scoring.metrics import read_predictions, score

SPREADS = {"full": 0.35, "missing": 0.5, "asr": 0.55, "none": 0.95}  # spread of the error
DIMS = {"audio": 6, "text": 10, "text_sim": 10, "text_asr": 10, "video": 4}
WORDS = {-3: "dreadful", -2: "bad", -1: "dull", 0: "plain", 1: "nice", 2: "good", 3: "wonderful"}


def make_tree(
    root: Path,
    seeds: tuple[int, ...] = (1, 2, 3),
    sizes: dict[str, int] | None = None,
    epochs: int = 12,
    media: str = "clips/{utt}.mp4",
) -> None:
    """Write data/, dump/ and exp/train_seed<N>/ below ``root``."""
    rng = np.random.default_rng(7)
    labels = {}
    for name, size in (sizes or {"train": 60, "valid": 24, "test": 40}).items():
        labels[name] = _make_set(root, name, size, rng, media)
    for seed in seeds:
        _make_run(root / f"exp/train_seed{seed}", seed, labels["test"], epochs, np.random.default_rng(seed))


def _make_set(root: Path, name: str, size: int, rng: np.random.Generator, media: str) -> dict[str, float]:
    utts = [f"{name}{i % 5:02d}-{i:04d}" for i in range(size)]
    utts.sort()
    labels = {u: float(v) for u, v in zip(utts, np.round(rng.uniform(-3, 3, size) * 3) / 3, strict=True)}
    words = {u: f"the day was {WORDS[round(y)]} <b>& then</b> it went on" for u, y in labels.items()}
    simulated = {u: w.replace("day", "say") if i % 3 else w for i, (u, w) in enumerate(words.items())}
    simulated[utts[1]] = ""
    data, dump = root / "data" / name, root / "dump" / name
    for folder in (data, dump):
        _table(folder / "utt2label", {u: f"{y:.6f}" for u, y in labels.items()})
        _table(folder / "utt2spk", {u: u.split("-")[0] for u in utts})
    _table(data / "text", words)
    _table(data / "text_sim", simulated)
    _table(data / "text_asr", simulated)
    _table(data / "wav.scp", {u: media.format(utt=u) for u in utts})
    _table(data / "video.scp", {u: media.format(utt=u) for u in utts})
    (dump / "ark").mkdir(parents=True, exist_ok=True)
    for feature, dim in DIMS.items():
        noise = {"text": 0.5, "text_sim": 0.9, "text_asr": 1.0}.get(feature, 2.5)
        _feature(dump, feature, dim, labels, noise, rng)
    states = {u: "empty" if i == 1 else "repeat" if i == 2 else "ok" for i, u in enumerate(utts)}
    rows = [f"{u}\t{s}\tnone\t\n" for u, s in states.items()]
    write_text(dump / "text_sim.status.tsv", "utt_id\tstatus\tfallback\traw\n" + "".join(rows))
    fallbacks = {u: "asr" if s == "empty" else "cut" if s == "repeat" else "none" for u, s in states.items()}
    write_json(dump / "text_sim.quality.json", {"wer": 0.187, **summarise(states, fallbacks)})
    write_json(dump / "text_asr.quality.json", {"wer": 0.243, **summarise(dict.fromkeys(utts, "ok"), {})})
    return labels


def _table(path: Path, values: dict[str, str]) -> None:
    write_text(path, "".join(f"{k} {v}".rstrip() + "\n" for k, v in sorted(values.items())))


def _feature(dump: Path, name: str, dim: int, labels: dict[str, float], noise: float, rng) -> None:
    direction = np.linspace(-1, 1, dim)
    arrays = {}
    for utt, y in labels.items():
        frames = int(rng.integers(4, 12))
        arrays[utt] = (y * direction + rng.normal(0, noise, dim) + rng.normal(0, 1, (frames, dim))).astype(np.float32)
    ark = dump / "ark" / f"{name}.1.ark"
    with kaldiio.WriteHelper(f"ark,scp:{ark},{dump / f'{name}.scp'}") as writer:
        for utt, array in arrays.items():
            writer(utt, array)
    _table(dump / f"{name}.frames", {u: str(len(a)) for u, a in arrays.items()})
    meta = {"extractor": f"extract_{name}", "model": f"models/{name}", "layers": [-4], "dim": dim, "frame_rate": 25.0}
    write_text(dump / f"{name}.yaml", yaml.safe_dump(meta))


def _make_run(exp: Path, seed: int, labels: dict[str, float], epochs: int, rng: np.random.Generator) -> None:
    sets = {"train-dir": "dump/train", "valid-dir": "dump/valid"}
    config = {
        **sets,
        "seed": seed,
        "exp-dir": str(exp),
        "compile": False,
        "lr": 1e-4,
        "batch-size": 96,
        "dim": 256,
    }
    write_text(exp / "config.yaml", yaml.safe_dump(config))
    _safetensors(exp / "model.valid-best.safetensors", {"a.weight": (3, 4), "a.bias": (3,)})
    lines = []
    for epoch in range(1, epochs + 1):
        fall = np.exp(-epoch / 4)
        terms = {"mse_full": 0.3, "mse_missing": 0.4, "distil_query": 0.1, "distil_content": 0.07, "similarity": 0.05}
        terms = {k: v * (0.3 + 3 * fall) * rng.uniform(0.9, 1.1) for k, v in terms.items()} | {"rnc": 4.0 + fall}
        valid = {
            c: {"mae": base + 0.9 * fall + 0.002 * epoch + rng.normal(0, 0.01), "corr": 0.8}
            for c, base in (("full", 0.35), ("missing", 0.45))
        }
        choice = (valid["full"]["mae"] + valid["missing"]["mae"]) / 2
        row = {"epoch": epoch, "step": epoch * 10, "lr": 1e-4, "train": {"loss": sum(terms.values()), **terms}}
        lines.append(json.dumps(row | {"valid": valid, "choice": choice}))
    write_text(exp / "metrics.jsonl", "\n".join(lines) + "\n")

    ids = sorted(labels)
    y = np.array([labels[u] for u in ids])
    direction = rng.normal(0, 1, (2, 256))
    for condition, deviation in SPREADS.items():
        folder = exp / "decode_test" / condition
        p = 0.9 * y + rng.normal(0, deviation, len(y))
        hidden = (y + rng.normal(0, deviation, len(y)))[:, None] * direction[:1] + direction[1:] * 2
        decoded = Decoded(
            ids,
            prediction=p,
            label=y,
            utterance_feature=hidden[:, :128].astype(np.float32),
            text_feature=(hidden + rng.normal(0, 1, hidden.shape)).astype(np.float32),
            modality_weights=rng.normal([0.4, 1.2 - deviation, 0.3], 0.1, (len(ids), 3)),
            query_weights=rng.normal(np.linspace(-0.5, 1, 7), 0.1, (len(ids), 7)),
            features=CONDITIONS[condition].features,
        )
        write_decoded(decoded, folder)
        table = read_predictions(folder / "predictions.tsv")
        write_json(folder / "score.json", score(table.predictions, table.labels))
        write_attention(_attention(ids, condition, root=exp.parents[1], rng=rng), folder)


def _attention(ids: list[str], condition: str, root: Path, rng: np.random.Generator) -> dict:
    """Attention of every utterance; the second one has no video."""
    features = {modality(f): f for f in CONDITIONS[condition].features}
    frames = {m: read_table(root / f"dump/test/{feature}.frames") for m, feature in features.items()}
    kept: dict[str, dict[str, np.ndarray]] = {}
    for i, utt in enumerate(ids):
        kept[utt] = {}
        for m in features:
            if i != 1 or m != "video":
                a = np.exp(rng.normal(0, 0.5, (7, int(frames[m][utt]))))
                kept[utt][m] = a / a.sum(axis=1, keepdims=True)
    return kept


def _safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.zeros(s, np.float32) for k, s in shapes.items()}, path)
