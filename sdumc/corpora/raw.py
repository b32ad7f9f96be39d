"""The raw distributions of CMU-MOSEI and CMU-MOSI: videos, transcripts, labels and official folds."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sdumc.corpora.folds import read_folds
from sdumc.corpora.labels import Labels, find_labels, match_times, read_labels
from sdumc.corpora.media_files import MediaFiles, find_media, locate, raw_root
from sdumc.corpora.sets import Corpus, Fold, utterance_id
from sdumc.corpora.transcripts import Transcripts, give_times, read_transcripts

log = logging.getLogger("sdumc")


def read_raw(corpus_dir: str, folds: str, labels: str | None = None, media: str = "auto") -> Corpus:
    """Read a raw distribution.

    Args:
        corpus_dir: the folder that holds Raw/, or Raw itself.
        folds: see :func:`sdumc.corpora.folds.read_folds`.
        labels: file or folder of the labels; by default what :func:`find_labels` finds.
        media: ``auto``, ``full`` or ``segmented``, see :func:`find_media`.

    Raises:
        UserError: a part of the corpus is missing or not of the expected form.
    """
    root = raw_root(corpus_dir)
    videos_of = read_folds(folds)
    all_labels = read_labels(labels or find_labels(root))
    transcripts = read_transcripts(root)
    give_times(transcripts, all_labels.times)
    files = find_media(root, media)
    log.info("%s: %d transcripts, %d videos", root, len(transcripts.clips), len(files.video))
    result = Corpus([collect_fold(name, videos, transcripts, all_labels, files) for name, videos in videos_of.items()])
    result.notes = [all_labels.note, f"media: {files.how}"]
    if not files.video:
        result.notes.append("media: only sound; there is no folder of videos")
    assigned = {video for videos in videos_of.values() for video in videos}
    result.unused = outside_of_folds(assigned, transcripts, all_labels, files)
    return result


def collect_fold(name: str, videos: Iterable[str], transcripts: Transcripts, labels: Labels, media: MediaFiles) -> Fold:
    """Bring together what belongs to the videos of one fold.

    Every labelled clip ends up among the fold's utterances, or in ``left_out`` with its reason; clips with a transcript
    but no label in ``unlabelled``, and videos of the fold of which there is nothing at all in ``left_out``.
    """
    fold = Fold(name)
    for video in videos:
        _collect_video(fold, video, transcripts, labels, media)
    if labels.by_time and not fold.utterances and any(labels.by_time.get(video) for video in videos):
        log.warning("%s: not one label row has the times of a transcript clip", name)
    return fold


def _collect_video(fold: Fold, video: str, transcripts: Transcripts, labels: Labels, media: MediaFiles) -> None:
    clips = transcripts.clips.get(video, {})
    refused = {**transcripts.refused.get(video, {}), **labels.refused.get(video, {})}
    values = labels.by_clip.get(video, {})
    if labels.by_time:
        values, unmatched = match_times(clips, labels.by_time.get(video, []))
        refused.update(unmatched)
    if not clips and not values and not refused:
        fold.left_out[video] = "a video of the fold without transcript and labels"
        return
    for clip, reason in refused.items():
        fold.left_out[utterance_id(video, clip)] = reason
    for clip, value in values.items():
        utt = utterance_id(video, clip)
        if utt in fold.left_out:
            continue
        line = clips.get(clip)
        source = locate(line, video, clip, media)
        if line is None:
            fold.left_out[utt] = "label without a transcript"
        elif not line.text:
            fold.left_out[utt] = f"empty transcript ({line.where})"
        elif isinstance(source, str):
            fold.left_out[utt] = source
        else:
            fold.add(utt, video, value, line.text, source)
    for clip in clips:
        if clip not in values and clip not in refused:
            fold.unlabelled[utterance_id(video, clip)] = "transcript without a label"


def outside_of_folds(assigned: set[str], transcripts: Transcripts, labels: Labels, media: MediaFiles) -> dict[str, str]:
    """Videos and media files that belong to no utterance of a fold: name -> what they are.

    Args:
        assigned: the videos of all folds.
    """
    found = dict.fromkeys(transcripts.clips, "a transcript of a video in no fold")
    found.update(dict.fromkeys(media.unused, "a media file not used"))
    found.update(dict.fromkeys(labels.videos, "labels of a video in no fold"))
    return {name: reason for name, reason in found.items() if name not in assigned}
