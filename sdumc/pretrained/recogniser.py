"""Speech recognisers: a CTC model folder or a Whisper folder of transformers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.pretrained.loading import (
    attempt,
    check_rate,
    load_model,
    load_preprocessor,
    load_tokenizer,
    model_folder,
    passed,
    preprocessor,
    quiet_transformers,
    read_model_config,
    trial_waves,
    try_clips,
    whisper_spectrogram,
)
from sdumc.pretrained.quality import find_loop
from sdumc.pretrained.speech import MIN_SAMPLES, RATE, WaveInput

_WINDOW = 30 * RATE  # samples of Whisper's input: 30 s
_SEARCH = 5 * RATE  # a longer clip is cut at the quietest moment of a window's last 5 s
_HOP = RATE // 50
_TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the attempts after the greedy one, as in OpenAI's program


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
    check_rate(folder, RATE)
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
        self.model: Any = load_model(
            AutoModelForCTC,
            folder,
            dtype,
            self.device,
            supported="Whisper, or a CTC model such as wav2vec 2.0 or WavLM",
        )
        kind = self.model.config.model_type
        refusal = f"{folder}: this {kind} model cannot be used as a recogniser"
        self.features = None
        self.shortest = MIN_SAMPLES
        num_frames, base = None, self.model.base_model
        if hasattr(self.model, "_get_feat_extract_output_lengths") and hasattr(base, "feature_extractor"):
            normalised = preprocessor(folder).get("do_normalize", True)
            self.input = WaveInput(self.model, normalised, dtype, self.device)
            num_frames = self._num_frames
        else:
            self.features = _feature_extractor(folder, kind)

        def trial() -> list:
            if self.features is not None:
                self.shortest = attempt(self._shortest, refusal)
            one_by_one, scores = try_clips(self._scores, num_frames, dtype, refusal)
            return [one_by_one, self.shortest, int(scores[0].shape[1])]

        self.one_by_one, self.shortest, outputs = passed(folder, self.device, ("ctc", dtype), trial)
        _check_joins_repeats(self.tokenizer, folder)
        _check_letters(self.tokenizer, outputs, folder)
        self.unknown = self.tokenizer.unk_token_id
        # Vocabularies of letters are often in one case.
        cases: tuple[Callable[[str], str], ...] = (str, str.lower, str.upper)
        self.case = min(cases, key=lambda case: self._unknown_in(case("A sample Text")))

    def _num_frames(self, num_samples: int) -> int:
        return int(self.model._get_feat_extract_output_lengths(max(num_samples, MIN_SAMPLES)))

    def _shortest(self) -> int:
        """Samples of the shortest clip that the model can read: strides and kernels need some."""
        for size in (MIN_SAMPLES, 2 * MIN_SAMPLES, 4 * MIN_SAMPLES):
            try:
                if len(self._scores_of_spectrogram(np.zeros(size, np.float32))):
                    return size
            except Exception:  # whatever its layers raise
                continue
        return 8 * MIN_SAMPLES

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
        wave = np.pad(np.asarray(wave, np.float32), (0, max(0, self.shortest - len(wave))))
        inputs = self.features([wave], sampling_rate=RATE, return_tensors="pt")
        arguments = {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
        return self.model(**arguments).logits[0]

    def hear(self, waves: Sequence[np.ndarray]) -> list[Heard]:
        """Clips (T_i,) at 16 kHz -> transcripts, and the log-probability of each given the sound, by its tokens."""
        found, blank = [], self.tokenizer.pad_token_id
        for frames in self._frames(waves):
            ids = [i for i, _ in itertools.groupby(frames.argmax(-1).tolist()) if i != blank]
            score = round(self._log_probability(frames, [ids])[0] / len(ids), 3) if ids else None
            found.append(Heard(self._text(frames), log_probability=score))
        return found

    def _frames(self, waves: Sequence[np.ndarray]) -> list[torch.Tensor]:
        return [self._scores([w])[0] for w in waves] if self.one_by_one else self._scores(waves)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _unknown_in(self, text: str) -> int:
        return self._ids(text).count(self.unknown)

    def log_probabilities(self, waves: Sequence[np.ndarray], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Of each clip's sound, the log-probability of each of its texts: -inf where a text does not fit into it.

        What the vocabulary does not have (punctuation, digits) does not count.
        """
        found = []
        for frames, candidates in zip(self._frames(waves), texts, strict=True):
            targets = [[i for i in self._ids(self.case(t)) if i != self.unknown] for t in candidates]
            found.append(self._log_probability(frames, targets))
        return found

    def _log_probability(self, frames: torch.Tensor, targets: Sequence[Sequence[int]]) -> list[float]:
        """Of the scores of a clip's frames (T, V), the log-probability of each sequence of tokens, over all paths."""
        lengths = torch.tensor([len(t) for t in targets])
        padded = torch.zeros(len(targets), max(1, int(lengths.max())), dtype=torch.long)
        for row, target in zip(padded, targets, strict=True):
            row[: len(target)] = torch.tensor(target, dtype=torch.long)
        log_probs = torch.log_softmax(frames.float().cpu(), dim=-1)[:, None].expand(-1, len(targets), -1)
        heard = torch.full_like(lengths, len(frames))
        blank = self.tokenizer.pad_token_id
        loss = torch.nn.functional.ctc_loss(log_probs, padded, heard, lengths, blank=blank, reduction="none")
        return (-loss).tolist()

    def __call__(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Clips (T_i,) at 16 kHz -> transcripts."""
        return [self._text(frames) for frames in self._frames(waves)]

    def _text(self, frames: torch.Tensor) -> str:
        text = self.tokenizer.decode(frames.argmax(-1).tolist())
        return " ".join(text.replace("<s>", "").replace("</s>", "").split())


def _feature_extractor(folder: Path, kind: str) -> Any:
    from transformers import AutoFeatureExtractor

    return load_preprocessor(
        folder,
        lambda: AutoFeatureExtractor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False),
        f"{folder}: a {kind} model reads spectrograms, and its feature extractor cannot be loaded",
    )


def _check_letters(tokenizer: Any, outputs: int, folder: Path) -> None:
    """Raise a :class:`UserError` if the tokenizer does not name the model's ``outputs``, or not their blank."""
    named = sum(
        t is not None and t != tokenizer.unk_token for t in tokenizer.convert_ids_to_tokens(list(range(outputs)))
    )
    if named < 0.9 * outputs:
        raise UserError(
            f"{folder}: its tokenizer has names for {named} of the model's {outputs} outputs; it is another model's"
        )
    blank = tokenizer.pad_token_id
    if blank is None or blank >= outputs:
        raise UserError(
            f"{folder}: its tokenizer's padding token, which stands for the blank of CTC, is {tokenizer.pad_token!r} "
            f"({blank}), none of the model's {outputs} outputs; correct pad_token in tokenizer_config.json"
        )


def _check_joins_repeats(tokenizer: Any, folder: Path) -> None:
    """Raise a :class:`UserError` if decoding keeps each repetition of a token: then it is no tokenizer for CTC."""
    special = set(tokenizer.all_special_ids)
    for token in (t for t in range(len(tokenizer)) if t not in special):
        if (once := tokenizer.decode([token])).strip():
            if tokenizer.decode([token, token]) != once:
                raise UserError(f"{folder}: its tokenizer, a {type(tokenizer).__name__}, is not one for CTC")
            return


@dataclass(frozen=True)
class Heard:
    """What a recogniser makes of a clip: the words, and how it came to them.

    ``no_speech``: its test found no speech. ``temperature``: 0 for the first, greedy, attempt; more where that one was
    too improbable or repeated itself. ``log_probability``: mean over the tokens of the accepted attempt; of a CTC
    model, that of all its tokens given the sound, divided by their number (None without any).
    """

    text: str
    no_speech: bool = False
    temperature: float = 0.0
    log_probability: float | None = None


@dataclass(frozen=True)
class _Attempt:
    """What ``generate`` decided about a window of 30 s at one temperature."""

    row: int
    temperature: float
    log_probability: float
    try_again: bool
    no_speech: bool


class WhisperRecogniser:
    """Whisper through ``generate`` of transformers, with its tests for speech, probability and repetition.

    A clip is transcribed greedily. Where the mean log-probability of the tokens is below -1, or they compress too well
    (a repetition), it is sampled again at temperatures 0.2 to 1.0, with a fixed seed and alone, so that a clip's
    transcript does not depend on its batch. Where the probability of no speech is above 0.6 as well, there is no
    transcript. A clip of more than 30 s is read window by window, each beginning at the last time stamp of the one
    before; a model without time stamps gets it cut at quiet moments.

    Raises:
        UserError: the folder is incomplete, or its tokenizer lacks the language.
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
        self.generation = self._generation_config(settings, language)
        # Four start tokens stand before the answer.
        self.generation.max_new_tokens = min(max_new_tokens, self.model.config.max_target_positions - 4)
        self.model.generation_config = self.generation
        self.model.config.forced_decoder_ids = None  # old folders name the start tokens here too
        # One time stamp for each 20 ms of 30 s stands at the vocabulary's end.
        self.has_time_stamps = self.model.config.vocab_size - self.generation.no_timestamps_token_id > 1500
        self._attempts: list[_Attempt] = []
        self._watch()
        passed(folder, self.device, ("whisper", dtype, language), self._try)

    def _try(self) -> list:
        """Write a few tokens for a short clip of noise: spectrogram, model and tokens must fit each other."""
        refusal, most = f"{self.folder}: this Whisper model cannot be used", self.generation.max_new_tokens

        def write() -> float:
            features = self.spectrogram(trial_waves()[:1], sampling_rate=RATE, return_tensors="pt").input_features
            return self._generate(features, 0.0)[1][0].log_probability

        self.generation.max_new_tokens = 3
        try:
            score = attempt(write, refusal)
        finally:
            self.generation.max_new_tokens = most
        if not np.isfinite(score):
            number = str(self.dtype).removeprefix("torch.")
            raise UserError(f"{refusal}: it computes NaN or infinity in {number}; use another --dtype (bf16 or fp32)")
        return []

    def _token(self, text: str) -> int:
        token = self.tokenizer.convert_tokens_to_ids(text)
        if token is None or (token == self.tokenizer.unk_token_id and text != self.tokenizer.unk_token):
            raise UserError(f"{self.folder}: the tokenizer does not know {text}; is this Whisper's own tokenizer?")
        return int(token)

    def _generation_config(self, settings: dict[str, Any], language: str) -> Any:
        """Settings of ``generate``, from plain values: transformers 5 drops some of those that a folder has."""
        from transformers import GenerationConfig

        more: dict[str, Any] = {}
        is_multilingual = settings.get("is_multilingual", self.model.config.vocab_size >= 51865)
        if is_multilingual:
            more = {"language": f"<|{language}|>", "task": "transcribe"}
            more["lang_to_id"] = {more["language"]: self._token(more["language"])}
            more["task_to_id"] = {"transcribe": self._token("<|transcribe|>")}
        elif language != "en":
            raise UserError(f"{self.folder}: an English-only Whisper; --language {language} needs a multilingual one")
        end = self._token("<|endoftext|>")
        suppressed = {
            name: [t for t in settings.get(name) or [] if t >= 0] or None
            for name in ("suppress_tokens", "begin_suppress_tokens")
        }
        return GenerationConfig(
            decoder_start_token_id=self._token("<|startoftranscript|>"),
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            no_timestamps_token_id=self._token("<|notimestamps|>"),
            max_initial_timestamp_index=50,
            is_multilingual=is_multilingual,
            **suppressed,
            **more,
        )

    def _watch(self) -> None:
        """Note what ``generate`` decides about each window: it returns the tokens alone."""
        decide = self.model._need_fallback

        def watched(tokens, outputs, row, processors, config, vocabulary, temperature):
            try_again, no_speech = decide(tokens, outputs, row, processors, config, vocabulary, temperature)
            average = self.model._retrieve_avg_logprobs(outputs[row]["scores"], tokens, temperature)
            self._attempts.append(_Attempt(row, temperature, float(average), bool(try_again), bool(no_speech)))
            return try_again, no_speech

        self.model._need_fallback = watched

    def __call__(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Clips (T_i,) at 16 kHz -> transcripts."""
        return [heard.text for heard in self.hear(waves)]

    def hear(self, waves: Sequence[np.ndarray]) -> list[Heard]:
        """Clips (T_i,) at 16 kHz -> transcripts, and how they came about."""
        waves = [np.asarray(w, np.float32) for w in waves]
        long = {i: self._hear_long(w) for i, w in enumerate(waves) if len(w) > _WINDOW}
        short = iter(self._hear_windows([w for w in waves if len(w) <= _WINDOW]))
        return [long[i] if i in long else next(short) for i in range(len(waves))]

    @torch.no_grad()
    def log_probabilities(self, waves: Sequence[np.ndarray], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Of each clip's sound, the log-probability of each of its texts. A clip of more than 30 s has all alike: 0."""
        found = []
        for wave, candidates in zip(waves, texts, strict=True):
            if len(wave) > _WINDOW:
                found.append([0.0] * len(candidates))
                continue
            features = self.spectrogram([wave], sampling_rate=RATE, return_tensors="pt").input_features
            states = self.model.model.encoder(features.to(self.device, self.dtype)).last_hidden_state
            found.append([self._log_probability(states, text) for text in candidates])
        return found

    def _log_probability(self, states: torch.Tensor, text: str) -> float:
        """Of the tokens of ``text`` and their end, read behind the start tokens of a transcript without time stamps."""
        config = self.generation
        start = [config.decoder_start_token_id]
        if config.is_multilingual:
            start += [config.lang_to_id[config.language], config.task_to_id["transcribe"]]
        start.append(config.no_timestamps_token_id)
        room = self.model.config.max_target_positions - len(start)
        answer = list(self.tokenizer(" " + text, add_special_tokens=False)["input_ids"])[:room]
        given = torch.tensor([[*start, *answer]], device=self.device)
        logits = self.model(encoder_outputs=(states,), decoder_input_ids=given).logits[0, len(start) - 1 :].float()
        wanted = torch.tensor([*answer, config.eos_token_id], device=self.device)
        return float(torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None]).sum())

    def _hear_windows(self, pieces: list[np.ndarray]) -> list[Heard]:
        """Clips of at most 30 s, padded to 30 s: greedily together, then those that need it alone."""
        if not pieces:
            return []
        features = self.spectrogram(pieces, sampling_rate=RATE, return_tensors="pt").input_features
        texts, attempts = self._generate(features, 0.0)
        found = {a.row: (text, a) for a, text in zip(attempts, texts, strict=True)}
        for row, (_, first) in list(found.items()):
            if first.try_again:
                (text,), attempts = self._generate(features[row : row + 1], _TEMPERATURES)
                found[row] = text, attempts[-1]
        return [_heard(*found[row]) for row in range(len(pieces))]

    def _hear_long(self, wave: np.ndarray) -> Heard:
        if not self.has_time_stamps:
            parts = self._hear_windows(windows(wave))
        else:
            features = self.spectrogram(
                [wave], sampling_rate=RATE, return_tensors="pt", truncation=False, padding="longest"
            ).input_features
            (text,), attempts = self._generate(features, (0.0, *_TEMPERATURES), return_timestamps=True)
            last = [a for a, b in zip(attempts, [*attempts[1:], None], strict=True) if not (b and b.temperature > 0)]
            parts = [_heard(text if i == 0 else "", a) for i, a in enumerate(last)]
        spoken = [p for p in parts if not p.no_speech]
        text = " ".join(" ".join(p.text for p in parts).split())
        scores = [p.log_probability for p in spoken if p.log_probability is not None]
        return Heard(
            text,
            not spoken,
            max((p.temperature for p in parts), default=0.0),
            float(np.mean(scores)) if scores else None,
        )

    @torch.no_grad()
    def _generate(
        self, features: torch.Tensor, temperature: float | tuple[float, ...], **more: Any
    ) -> tuple[list[str], list[_Attempt]]:
        """Spectrograms (B, mel, frames) -> a text for each row, and what was decided, in time order."""
        self._attempts = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), quiet_transformers():
            torch.manual_seed(0)
            tokens = self.model.generate(
                features.to(self.device, self.dtype),
                generation_config=copy.deepcopy(self.generation),
                temperature=temperature,
                compression_ratio_threshold=1.35,
                logprob_threshold=-1.0,
                no_speech_threshold=0.6,
                condition_on_prev_tokens=False,
                **more,
            )
        return [self._text(row) for row in tokens.long().tolist()], self._attempts

    def _text(self, ids: list[int]) -> str:
        special = set(self.tokenizer.all_special_ids)
        first = self.generation.no_timestamps_token_id  # time stamps stand behind it
        ids = [i for i in ids if i not in special and (i < first or not self.has_time_stamps)]
        loop = find_loop(ids)  # Whisper may repeat a pattern without end on noise; it is kept once
        return " ".join(self.tokenizer.decode(ids[:loop], skip_special_tokens=True).split())


def _heard(text: str, accepted: _Attempt) -> Heard:
    none = accepted.no_speech
    return Heard("" if none else text, none, accepted.temperature, round(accepted.log_probability, 3))


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
