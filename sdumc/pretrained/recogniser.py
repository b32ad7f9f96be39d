"""Speech recognisers: a CTC model folder or a Whisper folder of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.pretrained.cache import call_with_cache, new_encoder_decoder_cache
from sdumc.pretrained.folders import load_model, load_tokenizer, model_folder, read_model_config
from sdumc.pretrained.media_trial import attempt, try_clips
from sdumc.pretrained.quality import find_loop
from sdumc.pretrained.speech_encoder import MIN_SAMPLES, RATE, WaveInput, whisper_spectrogram

_WINDOW = 30 * RATE  # samples of Whisper's input: 30 s
_SEARCH = 5 * RATE  # a longer clip is cut at the quietest moment of a window's last 5 s
_HOP = RATE // 50


def load_recogniser(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    language: str = "en",
    max_new_tokens: int = 200,
) -> CtcRecogniser | WhisperRecogniser:
    """The recogniser in a model folder: Whisper if its ``model_type`` says so, else a ``...ForCTC`` model.

    Raises:
        UserError: neither of the two, incomplete, or without a tokenizer.
    """
    folder = model_folder(name)
    config = read_model_config(folder)
    if config["model_type"] == "whisper":
        return WhisperRecogniser(folder, dtype, device, language, max_new_tokens)
    if any(str(a).endswith("ForCTC") for a in config.get("architectures") or []):
        return CtcRecogniser(folder, dtype, device)
    raise UserError(
        f"{folder}: a {config['model_type']} model ({config.get('architectures')}) is no recogniser; give a folder of "
        "Whisper or of a ...ForCTC model"
    )


class CtcRecogniser:
    """Greedy decoding of a model with a CTC head: of a waveform (WavLM, wav2vec 2.0, HuBERT) or of a spectrogram.

    A model that reads spectrograms (wav2vec2-BERT, Parakeet) gets them from its own feature extractor, one clip at a
    time. The others are tried on three short clips, and get one clip at a time if a batch changes what they give.

    Raises:
        UserError: the folder is incomplete, or the model fails the trial.
    """

    kind = "ctc"

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str):
        from transformers import AutoModelForCTC

        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        self.tokenizer = load_tokenizer(folder)
        self.model: Any = load_model(AutoModelForCTC, folder, dtype, self.device)
        kind = self.model.config.model_type
        refusal = f"{folder}: this {kind} model cannot be used as a recogniser"
        self.features = None
        num_frames = None
        if self.model.main_input_name == "input_values":
            normalised = _preprocessor(folder).get("do_normalize", True)
            self.input = WaveInput(self.model, normalised, dtype, self.device)
            num_frames = self._num_frames
        else:
            self.features = _feature_extractor(folder, kind)
        self.one_by_one, _ = try_clips(self._scores, num_frames, dtype, refusal)
        _check_joins_repeats(self.tokenizer, folder)

    def _num_frames(self, num_samples: int) -> int:
        return int(self.model._get_feat_extract_output_lengths(max(num_samples, MIN_SAMPLES)))

    @torch.no_grad()
    def _scores(self, waves: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Clips (T_i,) -> (frames_i, V): the scores of all tokens at each frame."""
        if self.features is not None:
            return [self._scores_of_spectrogram(wave) for wave in waves]
        arguments, lengths = self.input(waves)
        logits = self.model(**arguments).logits
        if len(lengths) == 1:
            return [logits[0]]
        return [x[: self._num_frames(n)] for x, n in zip(logits, lengths, strict=True)]

    def _scores_of_spectrogram(self, wave: np.ndarray) -> torch.Tensor:
        assert self.features is not None
        wave = np.pad(np.asarray(wave, np.float32), (0, max(0, MIN_SAMPLES - len(wave))))
        inputs = self.features([wave], sampling_rate=RATE, return_tensors="pt")
        arguments = {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
        return self.model(**arguments).logits[0]

    def __call__(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Clips (T_i,) at 16 kHz -> transcripts."""
        scores = [self._scores([w])[0] for w in waves] if self.one_by_one else self._scores(waves)
        texts = (self.tokenizer.decode(x.argmax(-1).tolist()) for x in scores)
        return [" ".join(t.replace("<s>", "").replace("</s>", "").split()) for t in texts]


def _feature_extractor(folder: Path, kind: str) -> Any:
    from transformers import AutoFeatureExtractor

    return attempt(
        lambda: AutoFeatureExtractor.from_pretrained(str(folder), local_files_only=True),
        f"{folder}: a {kind} model reads spectrograms, and its feature extractor cannot be loaded",
    )


def _check_joins_repeats(tokenizer: Any, folder: Path) -> None:
    """Raise a :class:`UserError` if decoding keeps each repetition of a token: then it is no tokenizer for CTC."""
    special = set(tokenizer.all_special_ids)
    for token in (t for t in range(len(tokenizer)) if t not in special):
        if (once := tokenizer.decode([token])).strip():
            if tokenizer.decode([token, token]) != once:
                raise UserError(f"{folder}: its tokenizer, a {type(tokenizer).__name__}, is not one for CTC")
            return


class WhisperRecogniser:
    """Greedy decoding of Whisper, window by window, with the language and task fixed.

    The forced start tokens come from the tokenizer and the suppressed ones from ``generation_config.json`` as it is on
    disk: what `generate()` makes of that file differs between transformers versions.
    """

    kind = "whisper"

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device | str, language: str, max_new_tokens: int
    ):
        from transformers import WhisperForConditionalGeneration

        self.folder, self.dtype, self.device = folder, dtype, torch.device(device)
        self.tokenizer = load_tokenizer(folder)
        self.spectrogram = whisper_spectrogram(folder)
        self.model: Any = load_model(WhisperForConditionalGeneration, folder, dtype, self.device, ("proj_out",))
        settings = _json(folder / "generation_config.json") or read_model_config(folder)
        self.start = self._start_tokens(settings, language)
        self.eos = self._token("<|endoftext|>")
        self.suppress = [t for t in settings.get("suppress_tokens") or [] if t >= 0]
        self.suppress_first = [t for t in settings.get("begin_suppress_tokens") or [] if t >= 0]
        room = self.model.config.max_target_positions - len(self.start)
        self.max_new_tokens = min(max_new_tokens, room)

    def _token(self, text: str) -> int:
        token = self.tokenizer.convert_tokens_to_ids(text)
        if token is None or (token == self.tokenizer.unk_token_id and text != self.tokenizer.unk_token):
            raise UserError(f"{self.folder}: the tokenizer does not know {text}; is this Whisper's own tokenizer?")
        return int(token)

    def _start_tokens(self, settings: dict, language: str) -> list[int]:
        vocabulary = self.model.config.vocab_size
        multilingual = settings.get("is_multilingual", vocabulary >= 51865)
        start = [self._token("<|startoftranscript|>")]
        if multilingual:
            start += [self._token(f"<|{language}|>"), self._token("<|transcribe|>")]
        elif language != "en":
            raise UserError(f"{self.folder}: an English-only Whisper; --language {language} needs a multilingual one")
        return [*start, self._token("<|notimestamps|>")]

    @torch.no_grad()
    def __call__(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Clips (T_i,) at 16 kHz -> transcripts."""
        pieces = [(i, piece) for i, wave in enumerate(waves) for piece in windows(np.asarray(wave, np.float32))]
        texts: list[list[str]] = [[] for _ in waves]
        for start in range(0, len(pieces), len(waves)):  # a long clip gives several windows; the batch stays as large
            part = pieces[start : start + len(waves)]
            for (i, _), text in zip(part, self._decode([p for _, p in part]), strict=True):
                texts[i].append(text)
        return [" ".join(" ".join(t).split()) for t in texts]

    def _decode(self, pieces: list[np.ndarray]) -> list[str]:
        features = self.spectrogram(pieces, sampling_rate=RATE, return_tensors="pt").input_features
        encoded = self.model.get_encoder()(features.to(self.device, self.dtype))
        tokens = torch.tensor([self.start] * len(pieces), device=self.device)
        done = torch.zeros(len(pieces), dtype=torch.bool, device=self.device)
        cache, given, produced = new_encoder_decoder_cache(), tokens, []
        for step in range(self.max_new_tokens):
            output = call_with_cache(self.model, cache, encoder_outputs=encoded, decoder_input_ids=given)
            logits = output.logits[:, -1].float()
            banned = self.suppress + (self.suppress_first if step == 0 else [])
            if banned:
                logits[:, banned] = -torch.inf
            best = torch.where(done, self.eos, logits.argmax(-1))
            done |= best == self.eos
            produced.append(best)
            if bool(done.all()):
                break
            given = best[:, None]
        rows = torch.stack(produced, dim=1).tolist()
        return [self._text(row[: row.index(self.eos)] if self.eos in row else row) for row in rows]

    def _text(self, ids: list[int]) -> str:
        loop = find_loop(ids)  # Whisper may repeat a pattern without end on noise; it is kept once
        return self.tokenizer.decode(ids[:loop], skip_special_tokens=True).strip()


def windows(wave: np.ndarray) -> list[np.ndarray]:
    """Cut a clip into parts of at most 30 s, each cut made at the quietest 20 ms of the window's last 5 s."""
    parts = []
    while len(wave) > _WINDOW:
        tail = wave[_WINDOW - _SEARCH : _WINDOW].reshape(-1, _HOP)
        cut = _WINDOW - _SEARCH + int(np.argmin((tail**2).mean(1))) * _HOP + _HOP // 2
        parts.append(wave[:cut])
        wave = wave[cut:]
    return [*parts, wave]


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "fetch the model again", absent={})


def _preprocessor(folder: Path) -> dict[str, Any]:
    """Settings of the feature extractor; transformers 5 writes them into ``processor_config.json``."""
    nested = _json(folder / "processor_config.json").get("feature_extractor")
    return _json(folder / "preprocessor_config.json") or (nested if isinstance(nested, dict) else {})
