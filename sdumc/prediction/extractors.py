"""A recipe's own extractors on single clips: what stages 2 and 3 do to a set, with the recorded settings.

Training copies the record, ``extractors.yaml``, from ``dump/<train set>/<feature>.yaml``. It has the models' paths as
they were given to the extraction commands, usually relative to the recipe's folder. A model counts as found only if
its weights are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdumc.conditions import NO_SPEECH
from sdumc.data.tables import MediaSpan
from sdumc.errors import UserError
from sdumc.extraction.faces import FaceDetector
from sdumc.extraction.features import PictureReader, TextEncoder, hear, status_of
from sdumc.extraction.simulation import Search, Simulated, simulate
from sdumc.files import read_yaml
from sdumc.machine import halve_when_out_of_memory
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.loading import DTYPES
from sdumc.pretrained.projector import projector_file
from sdumc.pretrained.quality import LIKELIHOOD, SOUND, Sounds
from sdumc.pretrained.recogniser import CtcRecogniser, Heard, WhisperRecogniser, load_recogniser
from sdumc.pretrained.speech import SpeechEncoder, SpeechReader, load_whole
from sdumc.pretrained.vision import VisionExtractor
from sdumc.training.checkpoint import RECORD

# By feature: the settings that name a model, each with the role of the model.
_MODELS = {
    "audio": (("model", "audio"),),
    "text": (("encoder", "encoder"), ("projector", "projector"), ("model", "llm")),
    "text_sim": (("encoder", "encoder"), ("projector", "projector"), ("model", "llm"), ("rescorer", "asr")),
    "text_asr": (("encoder", "encoder"), ("projector", "projector"), ("model", "llm")),
    "asr": (("model", "asr"),),
    "video": (("model", "vision"),),
}
# By feature: the settings without which a new clip cannot be treated in the same way.
_NEEDED = {
    "audio": ("model", "layers", "normalise", "dtype"),
    "text": ("model", "layers", "first_state", "prompt", "context", "dtype"),
    "text_sim": ("encoder", "projector", "model", "layers", "first_state", "prompt", "beam", "max_new_tokens", "dtype"),
    "text_asr": ("model", "layers", "first_state", "prompt", "context", "dtype", "asr"),
    "video": ("model", "pooling", "frame_rate", "detector", "face_margin", "min_face", "dtype"),
}


@dataclass
class ModelUse:
    """A place of the record that names a model: ``settings[key]``; ``role`` says what the model is for."""

    settings: dict[str, Any]
    key: str
    role: str

    @property
    def name(self) -> str:
        """The model as recorded: a path, or its name on the hub."""
        return str(self.settings[self.key])

    @property
    def hash(self) -> str | None:
        """The fingerprint of its weights when the features were made."""
        return self.settings.get(f"{self.key}_hash")


@dataclass
class Record:
    """The settings of each feature's extractor, by feature: audio, text, text_sim or text_asr, video.

    ``left_out`` has the reason for each feature whose extractor is not known.
    """

    folder: Path
    features: dict[str, dict[str, Any]]
    left_out: dict[str, str] = field(default_factory=dict)

    def models(self) -> Iterator[ModelUse]:
        """Every use of a model, the recogniser's (inside ``text_sim`` or ``text_asr``) included."""
        for name, settings in self.features.items():
            parts = [(name, settings)]
            if isinstance(settings.get("asr"), dict):
                parts.append(("asr", settings["asr"]))
            for part, values in parts:
                for key, role in _MODELS[part]:
                    if values.get(key):
                        yield ModelUse(values, key, role)


def load_record(folder: Path) -> Record:
    """Read ``extractors.yaml`` of an exp folder or of a packed model.

    Raises:
        UserError: there is none, or no feature in it was made by this project's commands.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"{path}: no such file; was {folder} written by training (stage 4) or by `sdumc pack`?")
    features, left_out = {}, {}
    for name, settings in read_yaml(path).items():
        if name not in _NEEDED:
            continue
        if not isinstance(settings, dict) or settings.get("imported") or "model" not in settings:
            left_out[name] = "its features were not made by this project's commands"
        elif missing := [key for key in _NEEDED[name] if key not in settings]:
            left_out[name] = f"{RECORD} does not say {', '.join(missing)}; make the features again"
        else:
            features[name] = settings
    if not features:
        raise UserError(
            f"{path}: does not say how a clip becomes features: those of the train set came from elsewhere. Predicting "
            "needs a model trained on features of this project's stages 2 and 3"
        )
    return Record(folder, features, left_out)


def find_model(use: ModelUse, folder: Path, model_dir: Path | None = None) -> Path:
    """The model that the record names: looked for in ``model_dir``, from ``folder`` and those above it, from the
    working directory, and in the local hub cache.

    Raises:
        UserError: it is nowhere, or what is there has other weights than the features were made with.
    """
    name = Path(use.name)
    places = [model_dir / name.name] if model_dir else []
    if name.is_absolute():
        places.append(name)
    else:
        # An exp folder may be a link to another disk: its models are beside the link or beside what it points to.
        above = [place for start in (folder.absolute(), folder.resolve()) for place in (start, *start.parents)]
        places += [place / name for place in (*above, Path.cwd())]
    different = []
    for place in dict.fromkeys(places):
        if place.exists():
            if use.hash in (None, fingerprint(place, use.role)):
                return place
            different.append(place)
    if different:
        raise UserError(
            f"{different[0]}: not the {use.role} model that the features were made with (fingerprint "
            f"{fingerprint(different[0], use.role)}, not {use.hash}); give its folder's parent with --model-dir"
        )
    where = f"looked in {model_dir}, " if model_dir else "looked in "
    problem = UserError(
        f"{use.name}: the {use.role} model is not there ({where}{folder} and the folders above it, {Path.cwd()}"
        f"{', the local hub cache' if _is_hub_name(use.name) else ''}). Give the folder that holds {name.name} with "
        f"--model-dir{f'; if that is its name on the hub: hf download {use.name}' if _is_hub_name(use.name) else ''}"
    )
    if not _is_hub_name(use.name):
        raise problem
    from sdumc.pretrained.loading import model_folder

    try:
        cached = model_folder(use.name)
    except UserError:
        raise problem from None
    if use.hash not in (None, fingerprint(cached, use.role)):
        raise UserError(f"{cached}: not the {use.role} model that the features were made with, but another version")
    return cached


def _is_hub_name(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


@lru_cache(maxsize=64)
def fingerprint(path: Path, role: str) -> str:
    """Short hash of a model's weights, as the extraction commands record it."""
    from sdumc.pretrained.loading import fingerprint as of
    from sdumc.pretrained.projector import projector_file

    return of(projector_file(path) if role == "projector" else path)


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

    def _encoder(
        self, s: dict[str, Any], key: str, role: str, layer: int, normalised: bool, window: str = "30s"
    ) -> SpeechEncoder:
        """A speech encoder; where audio features and simulated text have the same one, its weights are loaded once."""
        folder, dtype = str(self._place(s, key, role)), self._dtype(s)
        names = [u.hash for u in self.record.models() if u.role in ("audio", "encoder")]
        shared = len(set(names)) < len(names) and None not in names
        loaded = self._once(load_whole, folder, dtype, self.device) if shared else None
        return self._once(SpeechEncoder, folder, dtype, self.device, layer, normalised, loaded, window)

    def audio(self, waves: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Sound (T_i,) at 16 kHz -> audio features (frames_i, D) float32 on the CPU."""
        s = self.record.features["audio"]
        encoder = self._encoder(s, "model", "audio", s["layers"][0], bool(s["normalise"]))
        return [x.float().cpu() for x in halve_when_out_of_memory(list(waves), encoder, _describe)]

    # ---- words

    def _llm(self, s: dict[str, Any]) -> SpeechLLM:
        folder = str(self._place(s, "model", "llm"))
        template = s.get("prompt_template", "released")  # older records know no other
        return self._once(SpeechLLM, folder, self._dtype(s), self.device, s["prompt"], tuple(s["layers"]), template)

    def _reader(self, s: dict[str, Any]) -> SpeechReader:
        llm = self._llm(s)
        encoder = self._encoder(
            s, "encoder", "encoder", s.get("encoder_layer", -1), True, s.get("whisper_window", "30s")
        )
        projector = str(projector_file(self._place(s, "projector", "projector")))
        return self._once(SpeechReader.load, encoder, projector, llm, s.get("embedding_scale"))

    def simulated_text(self, waves: Sequence[np.ndarray]) -> list[Simulated]:
        """Sound -> transcript, status and hidden states (N_i, D). A refusal or an empty answer is replaced by the
        recogniser's transcript if that was done for the train set. Whisper, which can tell that nobody speaks, is asked
        before; a CTC model only where it is needed."""
        s = self.record.features["text_sim"]
        reader = self._reader(s)
        search = Search(s["beam"], s["max_new_tokens"], s.get("length_penalty", 1.0))
        if s.get("rescorer"):
            search = replace(search, rescorer=self._rescorer(s), rescore_weight=s["rescore_weight"])
        keep = s["first_state"] == "keep"

        def work(clips: Sequence[tuple[np.ndarray, Heard | None]]) -> list[Simulated]:
            texts = [heard.text if heard else None for _, heard in clips]
            mute = [heard is not None and heard.no_speech for _, heard in clips]
            options = {"no_speech": mute, "speech_test": s.get("speech_test", "level")}
            return simulate(reader, [w for w, _ in clips], texts, search, keep, **options)

        asked_before = s.get("asr", {}).get("recogniser") == "whisper"
        known = self._recognise(s["asr"], list(waves)) if asked_before else [None] * len(waves)
        results = halve_when_out_of_memory(list(zip(waves, known, strict=True)), work, lambda clip: _describe(clip[0]))
        failed = [i for i, r in enumerate(results) if r.fallback == "prompt" and r.status != NO_SPEECH]
        if failed and "asr" in s and not asked_before:
            heard = self._recognise(s["asr"], [waves[i] for i in failed])
            again = halve_when_out_of_memory(
                [(waves[i], h) for i, h in zip(failed, heard, strict=True)], work, lambda clip: _describe(clip[0])
            )
            for i, result in zip(failed, again, strict=True):
                results[i] = result
        return results

    def _rescorer(self, s: dict[str, Any]) -> CtcRecogniser | WhisperRecogniser:
        folder, most = str(self._place(s, "rescorer", "asr")), s.get("asr", {}).get("max_new_tokens", 200)
        return self._once(load_recogniser, folder, self._dtype(s), self.device, s["rescore_language"], most)

    def recognised_text(self, waves: Sequence[np.ndarray]) -> list[Simulated]:
        """Sound -> the recogniser's transcript, its status, and the LLM's hidden states (N_i, D) at its words."""
        s = self.record.features["text_asr"]
        heard = self._recognise(s["asr"], list(waves))
        states = self._given_text(s, [h.text for h in heard], waves)
        return [
            Simulated(x, h.text, h.text, status_of(h), "none", h.log_probability)
            for x, h in zip(states, heard, strict=True)
        ]

    def unlikely_below(self, feature: str) -> float | None:
        """The mean log-probability of a token below which the text of a clip is far less likely than that of the train
        set's clips: their first percentile. None where the record does not have it."""
        return self.record.features.get(feature, {}).get(LIKELIHOOD, {}).get("p1")

    def strange_sound(self, feature: str, sketch: np.ndarray | None) -> bool:
        """Whether a clip sounds otherwise than 99% of the train set's clips: their encoder frames are compared. False
        where the record does not say what those are like."""
        if sketch is None or SOUND not in self.record.features.get(feature, {}):
            return False
        return self._once(self._sounds, feature).strange(sketch)

    def _sounds(self, feature: str) -> Sounds:
        try:
            return Sounds.from_dict(self.record.features[feature][SOUND])
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            place = self.record.folder / RECORD
            raise UserError(f"{place}: `{SOUND}` of {feature} is damaged ({e}); take that entry out") from None

    def _recognise(self, s: dict[str, Any], waves: list[np.ndarray]) -> list[Heard]:
        recogniser = self._once(
            load_recogniser,
            str(self._place(s, "model", "asr")),
            self._dtype(s),
            self.device,
            s.get("language", "en"),
            s.get("max_new_tokens", 200),
        )
        test = s.get("speech_test", "level")
        return halve_when_out_of_memory(waves, lambda part: hear(recogniser, part, test), _describe)

    def real_text(self, texts: Sequence[str], waves: Sequence[np.ndarray | None]) -> list[torch.Tensor]:
        """Given words -> hidden states (N_i, D) float32 on the CPU. Where there is no sound (None), none stands before
        the words."""
        return self._given_text(self.record.features["text"], texts, waves)

    def _given_text(
        self, s: dict[str, Any], texts: Sequence[str], waves: Sequence[np.ndarray | None]
    ) -> list[torch.Tensor]:
        texts = [t.lower() if s.get("text_case") == "lower" else t for t in texts]
        reader = self._reader(s) if s["context"] == "audio+prompt" else None
        llm = reader.llm if reader is not None else self._llm(s)
        most = getattr(llm.base.config, "max_position_embeddings", None) or 32768
        for text in texts:
            # A token has few letters, so that short texts need not be counted.
            if len(text) > most and (count := len(llm.plain_ids(text))) > most:
                raise UserError(
                    f"a transcript of {count} tokens; the language model reads {most} at once. Give subtitles, whose "
                    "times cut it into utterances"
                )
        encoder = TextEncoder(llm, s["context"], s["first_state"] == "keep", reader)
        return [x.float().cpu() for x in encoder(texts, waves)]

    def tokens(self, feature: str, text: str, frames: int) -> list[tuple[int, int]]:
        """First character and end in ``text`` of what each of the ``frames`` states of a text stands for: tokens, or
        else words. (0, 0) is the state before the first token. Empty if neither is as many."""
        tokenizer = self._llm(self.record.features[feature]).tokenizer
        places = [m.span() for m in re.finditer(r"\S+", text)]
        if tokenizer.is_fast:
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            if len(found) + 1 == frames:
                found = [(0, 0), *found]
            if len(found) == frames:
                places = [(int(a), int(b)) for a, b in found]
        return places if len(places) == frames else []

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
