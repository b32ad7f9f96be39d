"""A recipe's own extractors on single clips: what stages 2 and 3 do to a set, with the recorded settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdumc.data.spans import MediaSpan
from sdumc.errors import UserError
from sdumc.extraction.faces import FaceDetector
from sdumc.extraction.simulation import Search, Simulated, simulate
from sdumc.extraction.text import TextEncoder
from sdumc.extraction.video import PictureReader
from sdumc.prediction.record import ModelUse, Record, find_model
from sdumc.pretrained.folders import DTYPES
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.memory import halve_when_out_of_memory
from sdumc.pretrained.projector import projector_file
from sdumc.pretrained.recogniser import load_recogniser
from sdumc.pretrained.speech_encoder import SpeechEncoder
from sdumc.pretrained.speech_reader import SpeechReader
from sdumc.pretrained.vision import VisionExtractor


class Extractors:
    """Sound, words and pictures to features. Models are loaded when first needed, each once.

    Args:
        record: how the features were made.
        device: where the models run.
        dtype: fp32, bf16 or fp16; None is each model's recorded one.
        model_dir: a further place to look for models.

    Raises:
        UserError: when a model is first needed: it is not there, or not the one that the features were made with.
    """

    def __init__(
        self,
        record: Record,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        model_dir: Path | None = None,
    ):
        self.record, self.device, self.dtype, self.model_dir = record, torch.device(device), dtype, model_dir
        self._loaded: dict[tuple, Any] = {}

    def _place(self, settings: dict[str, Any], key: str, role: str) -> Path:
        return find_model(ModelUse(settings, key, role), self.record.folder, self.model_dir)

    def _dtype(self, settings: dict[str, Any]) -> torch.dtype:
        return DTYPES[self.dtype or settings["dtype"]]

    def _once(self, make, *key: Any) -> Any:
        """``make(*key)``, remembered: real and simulated text share a reader when their settings agree."""
        full = (make.__name__, *key)
        if full not in self._loaded:
            self._loaded[full] = make(*key)
        return self._loaded[full]

    def check(self) -> None:
        """Find every model without loading it; :class:`UserError` for the first that is not there, and for faces
        that are found in another way now."""
        for use in self.record.models():
            find_model(use, self.record.folder, self.model_dir)
        if self.record.features.get("video", {}).get("detector") == "opencv":
            raise UserError(
                f"{self.record.folder}: its faces were cut out with OpenCV's cascade, which is no longer used; run "
                "stages 3 to 5 again with `detector: yunet` in conf/video.yaml"
            )

    # ---- sound

    def audio(self, waves: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Sound (T_i,) at 16 kHz -> audio features (frames_i, D) float32 on the CPU."""
        s = self.record.features["audio"]
        encoder = self._once(
            SpeechEncoder,
            str(self._place(s, "model", "audio")),
            self._dtype(s),
            self.device,
            s["layers"][0],
            bool(s["normalise"]),
        )
        return [x.float().cpu() for x in halve_when_out_of_memory(list(waves), encoder, _describe)]

    # ---- words

    def _llm(self, s: dict[str, Any]) -> SpeechLLM:
        folder = str(self._place(s, "model", "llm"))
        template = s.get("prompt_template", "released")  # older records know no other
        return self._once(SpeechLLM, folder, self._dtype(s), self.device, s["prompt"], tuple(s["layers"]), template)

    def _reader(self, s: dict[str, Any]) -> SpeechReader:
        llm = self._llm(s)
        folder = str(self._place(s, "encoder", "encoder"))
        encoder = self._once(SpeechEncoder, folder, self._dtype(s), self.device, s.get("encoder_layer", -1))
        projector = str(projector_file(self._place(s, "projector", "projector")))
        return self._once(SpeechReader.load, encoder, projector, llm, s.get("embedding_scale"))

    def simulated_text(self, waves: Sequence[np.ndarray]) -> list[Simulated]:
        """Sound -> transcript, status and hidden states (N_i, D). A refusal or an empty answer is replaced by the
        recogniser's transcript if that was done for the train set."""
        s = self.record.features["text_sim"]
        reader = self._reader(s)
        search = Search(s["beam"], s["max_new_tokens"], s.get("length_penalty", 1.0))
        keep = s["first_state"] == "keep"

        def work(pairs: Sequence[tuple[np.ndarray, str | None]]) -> list[Simulated]:
            return simulate(reader, [w for w, _ in pairs], [t for _, t in pairs], search, keep)

        results = halve_when_out_of_memory([(w, None) for w in waves], work, lambda pair: _describe(pair[0]))
        failed = [i for i, r in enumerate(results) if r.fallback == "prompt"]
        if failed and "asr" in s:
            texts = self._recognise(s["asr"], [waves[i] for i in failed])
            again = halve_when_out_of_memory(
                [(waves[i], t) for i, t in zip(failed, texts, strict=True)], work, lambda pair: _describe(pair[0])
            )
            for i, result in zip(failed, again, strict=True):
                results[i] = result
        return results

    def _recognise(self, s: dict[str, Any], waves: list[np.ndarray]) -> list[str]:
        recogniser = self._once(
            load_recogniser,
            str(self._place(s, "model", "asr")),
            self._dtype(s),
            self.device,
            s.get("language", "en"),
            s.get("max_new_tokens", 200),
        )
        return halve_when_out_of_memory(waves, recogniser, _describe)

    def real_text(self, texts: Sequence[str], waves: Sequence[np.ndarray | None]) -> list[torch.Tensor]:
        """Given words -> hidden states (N_i, D) float32 on the CPU. Where there is no sound (None), none stands before
        the words."""
        s = self.record.features["text"]
        texts = [t.lower() if s.get("text_case") == "lower" else t for t in texts]
        reader = self._reader(s) if s["context"] == "audio+prompt" else None
        llm = reader.llm if reader is not None else self._llm(s)
        encoder = TextEncoder(llm, s["context"], s["first_state"] == "keep", reader)
        return [x.float().cpu() for x in encoder(texts, waves)]

    # ---- pictures

    def video(self, span: MediaSpan) -> tuple[torch.Tensor | None, str]:
        """Pictures of a span -> video features (frames, D) float32; or None and the reason.

        Raises:
            UserError: the file cannot be read to its end.
        """
        s = self.record.features["video"]
        detector = self._once(FaceDetector) if s["detector"] == "yunet" else None
        reader = PictureReader(s["frame_rate"], detector, s["face_margin"], s["min_face"])
        found = reader.locate(span)
        if found.absent:
            return None, found.absent
        folder = str(self._place(s, "model", "vision"))
        vision = self._once(VisionExtractor, folder, self._dtype(s), self.device, s["pooling"])
        return torch.from_numpy(vision(reader.pictures(span, found.boxes))), ""


def _describe(wave: np.ndarray) -> str:
    return f"an utterance of {len(wave) / 16000:.1f} s"
