"""CMU-MOSEI in small: the three forms in which people hold it, in exactly their layouts, with made-up content.

Video ids are of the real kinds: eleven characters that can begin with a hyphen and have underscores, and numbers.
"""

from __future__ import annotations

import csv
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from mini.clips import write_clip
from mini.face import draw_face, draw_looks

RATE, FPS, SIZE = 16000, 8, 96
_FACES = (1, 6, 9, 11, 12, 14, 16)  # looks in which the detector finds the face

HYPHEN, UNDERSCORE, LOST, NUMBER, FACELESS, OTHER, STRAY = (
    "-3g5yACwYnA",
    "a_b__c_9xZ_",
    "gone1234567",
    "100178",
    "-_zQ0--abcd",
    "Zz-8__qq_q1",
    "straydeadbf",
)
FOLDS = {"train": [HYPHEN, UNDERSCORE, LOST], "valid": [NUMBER], "test": [FACELESS, OTHER]}


@dataclass
class Line:
    """A clip of a transcript; ``answers`` are its annotators', none for a clip without label."""

    video: str
    clip: str
    start: float
    end: float
    text: str
    answers: tuple[float, ...]


LINES = [
    Line(HYPHEN, "0", -0.2, 1.1, "i really liked the film", (2, 3)),
    Line(HYPHEN, "10", 1.1, 2.3, "it was good ___ very good", (1, 2)),
    Line(HYPHEN, "2", 2.3, 3.4, "not bad", (0, 1)),
    Line(HYPHEN, "3", 3.5, 4.7, "the film was so bad", (-2, -3)),
    Line(UNDERSCORE, "0", 0.1, 1.2, "i liked it so much", (3, 2)),
    Line(UNDERSCORE, "1", 1.0, 2.2, "and it was bad", (-1, -1)),  # overlaps the clip before
    Line(UNDERSCORE, "2", 2.5, 3.6, "hm", (0, 0)),  # silence
    Line(LOST, "0", 0.0, 1.0, "the video of this is gone", (1, 1)),
    Line(NUMBER, "0", 0.0, 1.2, "it was very good", (2, 1)),
    Line(NUMBER, "1", 1.2, 2.4, "the film was not good", (-1, -2)),
    Line(NUMBER, "2", 2.4, 3.6, "so so", (0, 0)),
    Line(NUMBER, "7", 3.6, 4.0, "nobody has judged this", ()),
    Line(FACELESS, "0", 0.0, 1.2, "really bad", (-3, -2)),
    Line(FACELESS, "1", 1.2, 2.4, "i liked the film", (2, 2)),
    Line(OTHER, "2", 0.0, 1.2, "and it was not so bad", (0, 1)),
    Line(OTHER, "4", 1.2, 2.4, "the film was very very good", (3, 3)),
    Line(STRAY, "0", 0.0, 1.0, "of no fold", (1, 1)),
]


def labels() -> dict[tuple[str, str], float]:
    """Mean answer by (video, clip)."""
    return {(line.video, line.clip): sum(line.answers) / len(line.answers) for line in LINES if line.answers}


# -------------------------------------------------------------------------------------------------------------- raw


def make_raw(folder: Path, label_form: str = "csv", segmented: bool = False, wav: bool = True) -> Path:
    """The raw distribution below ``folder``/Raw, with folds beside it as the CMU SDK has them and as text."""
    raw = folder / "Raw"
    for video in dict.fromkeys(line.video for line in LINES):
        if video != LOST:
            make_video(raw, video, segmented, wav)
    transcripts = raw / "Transcript/Segmented/Combined"
    transcripts.mkdir(parents=True)
    for video in dict.fromkeys(line.video for line in LINES):
        lines = [line for line in LINES if line.video == video]
        rows = [f"{e.video}___{e.clip}___{e.start}___{e.end}___{e.text}\n" for e in lines]
        (transcripts / f"{video}.txt").write_text("".join(rows))
    (make_csv_labels if label_form == "csv" else make_csd_labels)(raw)
    make_folds(folder)
    return folder


def make_video(raw: Path, video: str, segmented: bool = False, wav: bool = True) -> None:
    """The media of one video: a face, or none in :data:`FACELESS`; clip 2 of :data:`UNDERSCORE` is silent."""
    import soundfile

    lines = [line for line in LINES if line.video == video]
    seconds = max(line.end for line in lines) + 0.3
    number = list(dict.fromkeys(line.video for line in LINES)).index(video)
    rng = np.random.default_rng(number)
    looks = draw_looks(np.random.default_rng(_FACES[number]))
    t = np.arange(int(seconds * RATE)) / RATE
    sound = 0.3 * np.sin(2 * np.pi * 170 * t * (1 + 0.1 * np.sin(5 * t))) + 0.03 * rng.standard_normal(len(t))
    if video == UNDERSCORE:
        sound[int(2.5 * RATE) : int(3.6 * RATE)] = 0.0

    def picture(i: int) -> np.ndarray:
        if video == FACELESS:
            return np.full((SIZE, SIZE, 3), 60 + 2 * (i % 30), np.uint8)
        mouth = 0.2 + 0.2 * np.sin(i)
        return draw_face(looks, np.array([0.2, 0.0, 0.7, mouth, 0.0]), SIZE)

    if segmented:
        for line in lines:
            start = max(line.start, 0.0)
            frames = [picture(i) for i in range(round((line.end - start) * FPS))]
            part = sound[int(start * RATE) : int(line.end * RATE)].astype(np.float32)
            write_clip(raw / f"Videos/Segmented/Combined/{video}_{line.clip}.mp4", frames, FPS, part, RATE, crf=30)
        return
    frames = [picture(i) for i in range(round(seconds * FPS))]
    write_clip(raw / f"Videos/Full/Combined/{video}.mp4", frames, FPS, sound.astype(np.float32), RATE, crf=30)
    if wav and video != NUMBER:  # of one video there is only the sound in the film
        (raw / "Audio/Full/WAV_16000").mkdir(parents=True, exist_ok=True)
        soundfile.write(raw / f"Audio/Full/WAV_16000/{video}.wav", sound.astype(np.float32), RATE)


def make_csv_labels(raw: Path) -> None:
    """Two files, an annotator each, rows out of order, with the columns around the ones that count."""
    (raw / "Labels").mkdir(parents=True, exist_ok=True)
    for annotator in range(2):
        with open(raw / f"Labels/batch_{annotator}.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(
                ["HITId", "WorkerId", "Input.VIDEO_ID", "Input.CLIP", "Answer.happiness", "Answer.sentiment"]
            )
            for i, line in enumerate(sorted(LINES, key=lambda e: crc32(f"{e.clip}{e.video}{annotator}".encode()))):
                if line.answers:
                    writer.writerow([f"H{i}", f"A{annotator}", line.video, line.clip, 0, line.answers[annotator]])


def make_csd_labels(raw: Path) -> None:
    """One HDF5 file of the CMU SDK's structure; rows out of time order, columns named in the metadata."""
    import h5py

    (raw / "Labels").mkdir(parents=True, exist_ok=True)
    with h5py.File(raw / "Labels/CMU_MOSEI_Labels.csd", "w") as f:
        root = f.create_group("All Labels")
        names = ["sentiment", "happy", "sad", "anger", "surprise", "disgust", "fear"]
        metadata = {"root name": "All Labels", "dimension names": names, "computational sequence version": "1.0"}
        for key, value in metadata.items():
            data = np.array([json.dumps(value)], dtype=object)
            root.create_dataset(f"metadata/{key}", data=data, dtype=h5py.string_dtype())
        for video in dict.fromkeys(line.video for line in LINES):
            lines = [line for line in LINES if line.video == video and line.answers][::-1]
            values = np.array([[sum(e.answers) / len(e.answers), *range(6)] for e in lines], dtype=np.float32)
            root.create_dataset(f"data/{video}/intervals", data=np.array([[e.start, e.end] for e in lines]))
            root.create_dataset(f"data/{video}/features", data=values)


def make_folds(folder: Path) -> None:
    """cmu_mosei_std_folds.py as in the SDK, and folds/<set>.txt."""
    script = "#!/usr/bin/env python3\nimport mmsdk\n"
    (folder / "folds").mkdir(exist_ok=True)
    for name, videos in FOLDS.items():
        script += f"standard_{name}_fold={videos!r}\n"
        (folder / "folds" / f"{name}.txt").write_text("".join(f"{v}\n" for v in videos))
    (folder / "cmu_mosei_std_folds.py").write_text(script)


# ---------------------------------------------------------------------------------------------------------- toolkit


def make_pickle(path: Path, aligned: bool = False, seed: int = 0) -> Path:
    """``unaligned_50.pkl`` or ``aligned_50.pkl``: padded arrays, -inf in the sound, a text of full length."""
    rng = np.random.default_rng(seed)
    content = {}
    frames = 50 if aligned else 500
    for name, videos in FOLDS.items():
        lines = [line for line in LINES if line.video in videos and line.answers]
        n = len(lines)
        audio = np.zeros((n, frames, 74))
        vision = np.zeros((n, frames, 35))
        text = np.zeros((n, 50, 768), dtype=np.float32)
        bert = np.zeros((n, 3, 50))
        lengths = {"audio": [], "vision": []}
        for i, line in enumerate(lines):
            tokens = 50 if line.clip == "10" else len(line.text.split()) + 2
            bert[i, 0, :tokens], bert[i, 1, :tokens] = rng.integers(1000, 2000, tokens), 1
            text[i, :tokens] = rng.standard_normal((tokens, 768))
            for key, array in (("audio", audio), ("vision", vision)):
                length = tokens if aligned else int(rng.integers(5, 40))
                array[i, :length] = rng.standard_normal((length, array.shape[2]))
                lengths[key].append(length)
        audio[0, 1, 3:6] = -np.inf
        if FACELESS in videos:
            vision[0] = 0.0
        content[name] = {
            "raw_text": np.array([line.text for line in lines]),
            "audio": audio,
            "vision": vision,
            "id": np.array([f"{line.video}$_${line.clip}" for line in lines]),
            "text": text,
            "text_bert": bert,
            "annotations": np.array(["Positive"] * n),
            "classification_labels": np.zeros(n),
            "regression_labels": np.array([sum(line.answers) / len(line.answers) for line in lines], dtype=np.float32),
        }
        if not aligned:
            content[name].update({f"{key}_lengths": value for key, value in lengths.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        pickle.dump(content, f, protocol=4)
    return path


# ---------------------------------------------------------------------------------------------------------- authors


def make_authors(folder: Path, dims: tuple[int, int, int] = (12, 20, 9), seed: int = 0) -> Path:
    """Feature folders under their released names (audio, text, video of ``dims``), labels and transcripts."""
    from sdumc.corpora.authors import CORPORA, FOLDERS

    rng = np.random.default_rng(seed)
    widths = dict(zip(("audio", "text", "video"), dims, strict=True)) | {"text_sim": dims[1]}
    corpora = {}
    rows = []
    for name, key in CORPORA.items():
        lines = [line for line in LINES if line.video in FOLDS[name] and line.answers]
        corpora[key] = {
            f"{e.video}_{e.clip}": {"emo": "neutral", "val": float(np.mean(e.answers))}
            for e in lines
            if e.video != LOST
        }
        for line in lines:
            if line.video == LOST:
                continue
            rows.append((f"{line.video}_{line.clip}", line.text))
            for feature, width in widths.items():
                target = folder / "features" / FOLDERS[feature]
                target.mkdir(parents=True, exist_ok=True)
                frames = rng.standard_normal((int(rng.integers(3, 12)), width))
                if feature == "audio" and line.clip == "2":
                    frames = frames[0]  # a single frame, stored as a vector
                np.save(
                    target / f"{line.video}_{line.clip}.npy", frames.astype(np.float32 if width % 2 else np.float64)
                )
    np.savez(folder / "label_official.npz", **{k: np.array(v, dtype=object) for k, v in corpora.items()})
    with open(folder / "transcription.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["name", "english"])
        writer.writerows(rows)
    return folder
