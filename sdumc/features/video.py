"""Video features: one vector per picture from a vision model of transformers, of the whole picture or of the face."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from sdumc.data.ark import ShardWriter
from sdumc.data.kaldi_dir import KaldiDir, MediaSpan
from sdumc.data.media import read_frames
from sdumc.errors import UserError
from sdumc.features.faces import FaceDetector, crop, track_face
from sdumc.simulation.checkpoints import load_model, model_folder, read_model_config
from sdumc.simulation.jobs import Progress, ahead, halving

log = logging.getLogger("sdumc")

POOLINGS = ("pooler", "cls", "mean")


class VisionExtractor:
    """A vision model of transformers (ViT, CLIP, DINOv2, ...) with its image processor.

    Args:
        pooling: ``pooler`` the model's pooled output, ``cls`` the first token of the last layer, ``mean`` the mean of
            the patch tokens (of all positions in models without a class token).

    Raises:
        UserError: the folder is incomplete, no vision model, or has no weights for ``pooler``.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pooling: str = "cls",
        batch: int = 64,
    ):
        from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

        folder = model_folder(name)
        kind = read_model_config(folder)["model_type"]
        classes: dict[str, Any] = {"clip": CLIPVisionModel, "clip_vision_model": CLIPVisionModel}
        classes |= {"siglip": SiglipVisionModel, "siglip_vision_model": SiglipVisionModel}
        # A classifier's folder (a facial-expression ViT) has no pooler; its random one must not be used.
        optional = () if pooling == "pooler" else ("pooler.", "vision_model.post_layernorm", "vision_model.head")
        try:
            self.model: Any = load_model(classes.get(kind, AutoModel), folder, dtype, torch.device(device), optional)
        except UserError as e:
            if "pooler" in str(e):
                raise UserError(f"{folder}: has no pooler weights; use --pooling cls or mean") from None
            raise
        if getattr(self.model, "main_input_name", "") != "pixel_values":
            raise UserError(f"{folder}: a {kind} model does not take pictures")
        self.processor = _image_processor(folder)
        self.folder, self.device, self.dtype, self.pooling, self.batch = (
            folder,
            torch.device(device),
            dtype,
            pooling,
            batch,
        )
        self.dim: int = self.model.config.hidden_size
        self.has_cls = any("cls_token" in n or "class_embedding" in n for n, _ in self.model.named_parameters())
        if pooling == "cls" and not self.has_cls:
            raise UserError(f"{folder}: a {kind} model has no class token; use --pooling mean or pooler")

    def __call__(self, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """RGB uint8 pictures (H, W, 3) -> float32 (N, D); pictures are taken from the iterator batch by batch."""
        pictures, parts = iter(pictures), []
        while chunk := list(islice(pictures, self.batch)):
            parts += halving(chunk, self._vectors, lambda p: f"a picture of {p.shape[1]}x{p.shape[0]}")
        return np.stack(parts) if parts else np.zeros((0, self.dim), np.float32)

    @torch.no_grad()
    def _vectors(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        pixels = self.processor(
            images=list(pictures), return_tensors="pt", input_data_format="channels_last"
        ).pixel_values
        output = self.model(pixel_values=pixels.to(self.device, self.dtype))
        if self.pooling == "pooler":
            vectors = getattr(output, "pooler_output", None)
            if vectors is None:
                raise UserError(f"{self.folder}: this model has no pooled output; use --pooling cls or mean")
        elif self.pooling == "cls":
            vectors = output.last_hidden_state[:, 0]
        else:
            vectors = output.last_hidden_state[:, 1 if self.has_cls else 0 :].mean(1)
        return list(vectors.flatten(1).float().cpu().numpy())


def _image_processor(folder: Any) -> Any:
    """The folder's image processor, the PIL/numpy one: no torchvision is needed, and results do not depend on it."""
    from transformers import AutoImageProcessor

    for options in ({"backend": "pil"}, {"use_fast": False}):
        try:
            return AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, **options)
        except TypeError:
            continue  # the option's name depends on the transformers version
        except Exception as e:
            raise UserError(f"{folder}: its image processor cannot be loaded: {str(e).splitlines()[0]}") from None
    raise UserError(f"{folder}: its image processor cannot be loaded")


def extract_video(
    data: KaldiDir,
    utterances: Sequence[str],
    extractor: VisionExtractor,
    writer: ShardWriter,
    fps: float,
    detector: FaceDetector | None = None,
    margin: float = 1.3,
    min_seen: float = 0.05,
    bad_media: str = "stop",
) -> None:
    """Write (frames, D) of every utterance that ``writer`` does not have yet; commit each.

    With a ``detector``, the face is tracked through the clip and cut out; a clip in which it is seen in less than
    ``min_seen`` of the frames is absent, with the reason. Pictures are read twice then (to find the face, to cut it
    out) rather than kept: a long clip would fill the memory.

    Raises:
        UserError: a media file cannot be read to its end (unless ``bad_media`` is "absent").
    """
    progress = Progress(len(utterances), len(writer.done))
    todo = [[u] for u in utterances if u not in writer.done]

    def locate(batch: list[str]) -> tuple[np.ndarray | None, str, dict[str, str]]:
        """Runs while the model works on the clip before."""
        span = data.video_source(batch[0])
        if span is None:
            return None, "no video in the data directory", {}
        try:
            return locate_face(span, fps, detector, min_seen)
        except UserError as e:
            reason = _unless_absent(e, bad_media)
            return None, reason, {"bad_media": reason}

    for (utt,), (boxes, reason, notes) in ahead(todo, locate):
        features = None
        if not reason:
            try:
                features = extractor(cut_pictures(data.video_source(utt), fps, boxes, margin))
            except UserError as e:
                reason = notes["bad_media"] = _unless_absent(e, bad_media)
        if features is None:
            log.warning("%s: video taken as absent: %s", utt, reason)
            writer.absent(utt, reason, **notes)
        else:
            writer.write(utt, features, **notes)
        writer.commit()
        progress.step(1)


def _unless_absent(error: UserError, bad_media: str) -> str:
    if bad_media != "absent":
        raise UserError(f"{error} (or go on without it: --bad-media absent)") from None
    return str(error)


def locate_face(
    span: MediaSpan, fps: float, detector: FaceDetector | None, min_seen: float
) -> tuple[np.ndarray | None, str, dict[str, str]]:
    """Boxes of the face (N, 4), None without a ``detector``; or the reason for the clip's having none; and notes.

    Raises:
        UserError: the file cannot be read to its end.
    """
    if detector is None:
        return None, "", {}
    track = track_face([detector(picture) for _, picture in read_frames(span, fps)])
    if track is None or track.seen < min_seen:
        seen = 0.0 if track is None else track.seen
        return None, f"a face in {100 * seen:.0f}% of the pictures", {"face": f"{seen:.3f}"}
    return track.boxes, "", {"face": f"{track.seen:.3f}"}


def cut_pictures(span: MediaSpan | None, fps: float, boxes: np.ndarray | None, margin: float) -> Iterator[np.ndarray]:
    """The pictures of a clip at ``fps``, whole or cut to ``margin`` times the face's boxes."""
    assert span is not None
    for i, (_, picture) in enumerate(read_frames(span, fps)):
        yield picture if boxes is None else crop(picture, boxes[min(i, len(boxes) - 1)], margin)
