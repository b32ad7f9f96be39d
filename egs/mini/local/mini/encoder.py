"""The speech encoder: a WavLM trained with a character CTC."""

from __future__ import annotations

import json
import logging
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor, WavLMConfig, WavLMForCTC

from mini import corpus, speech
from mini.plan import PRETRAIN
from mini.training import batches, optimise, save_whole, seed_everything
from sdumc.data import media

log = logging.getLogger("sdumc")


@dataclass(frozen=True)
class EncoderSettings:
    """Size and training of the encoder; steps come in batches of ``batch_size`` clips."""

    seed: int = 1
    front_steps: int = 150  # of the convolutions alone
    steps: int = 800
    batch_size: int = 8
    lr: float = 4e-3
    warmup: int = 60
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 384
    speed_change: float = 0.1  # clips are played up to this much faster or slower


CTC_LETTERS = "|'" + string.ascii_lowercase  # "|" stands between words, as in wav2vec 2.0's vocabularies
_BANDS = 40
_KERNELS, _STRIDES = (400, 3, 3), (160, 2, 2)  # 25 ms windows every 10 ms, then two layers that halve the rate
_TARGET_BANDS, _TARGET_FFT = 64, 512


def _mel_edges(bands: int) -> np.ndarray:
    """Edges of ``bands`` overlapping bands, equally wide on the mel scale from 60 to 7800 Hz: (bands + 2,) in Hz."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (60, 7800))
    return 700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1)


def _filterbank(waves: Sequence[np.ndarray]) -> Tensor:
    """Start of the first convolution: (160, 1, 400), 40 mel bands in four phases each.

    Learning such filters from random weights would take hours; cf. Zeghidour et al. 2018, "Learning filterbanks from
    raw speech". Each band is scaled to the same mean magnitude on ``waves``, as high bands have little energy.
    """
    edges = _mel_edges(_BANDS)
    time = (np.arange(_KERNELS[0]) - _KERNELS[0] / 2) / speech.RATE
    centre, width = edges[1:-1, None], (edges[2:] - edges[:-2])[:, None] / 2
    # A Gaussian window: the wider the band, the shorter, and never longer than the kernel.
    sigma = np.minimum(0.2 / width, _KERNELS[0] / speech.RATE / 5)
    window = np.exp(-0.5 * (time / sigma) ** 2)
    cosine, sine = window * np.cos(2 * np.pi * centre * time), window * np.sin(2 * np.pi * centre * time)
    filters = torch.tensor(np.stack([cosine, sine], 1), dtype=torch.float32)  # (40, 2, 400)
    magnitude = torch.zeros(_BANDS)
    for wave in waves:
        x = torch.from_numpy(wave)[None, None]
        response = nn.functional.conv1d(x, filters.reshape(-1, 1, _KERNELS[0]), stride=_STRIDES[0])
        magnitude += response.reshape(_BANDS, 2, -1).square().sum(1).sqrt().mean(1)
    filters = filters / (magnitude / len(waves))[:, None, None]
    return torch.cat([filters, -filters], 1).reshape(-1, 1, _KERNELS[0])


class _LogMel:
    """Log mel spectrum, each band with mean 0 and variance 1 over the clips given to the constructor."""

    def __init__(self, waves: Sequence[np.ndarray]):
        edges = _mel_edges(_TARGET_BANDS) / speech.RATE * _TARGET_FFT
        low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        k = np.arange(_TARGET_FFT // 2 + 1)[None]
        triangles = np.maximum(0, np.minimum((k - low) / (mid - low), (high - k) / (high - mid)))
        triangles /= np.maximum(triangles.sum(1, keepdims=True), 1e-3)
        self._triangles = torch.tensor(triangles, dtype=torch.float32)
        self._mean, self._std = torch.zeros(_TARGET_BANDS), torch.ones(_TARGET_BANDS)
        frames = torch.cat([self(torch.from_numpy(w)[None], _STRIDES[0])[0] for w in waves])
        self._mean, self._std = frames.mean(0), frames.std(0) + 1e-3

    def __call__(self, waves: Tensor, hop: int) -> Tensor:
        """(B, samples) -> (B, frames, 64), windows of 512 samples every ``hop``."""
        window = torch.hann_window(_KERNELS[0])
        spectrum = torch.stft(
            waves, _TARGET_FFT, hop, _KERNELS[0], window, center=False, return_complex=True
        )  # (B, 257, frames)
        mel = (self._triangles @ spectrum.abs().square() + 0.1).log().transpose(1, 2)
        return (mel - self._mean) / self._std


def _train_front(
    model: nn.Module, waves: list[np.ndarray], settings: EncoderSettings, rng: np.random.Generator
) -> None:
    """Train the convolutions on the log mel spectrum: each output frame predicts two frames of it linearly.

    This takes some seconds and saves CTC many steps. It also keeps pitch and loudness in the features, which CTC alone
    would not learn.
    """
    mel = _LogMel(waves)
    hop = math.prod(_STRIDES)
    field = 1
    for kernel, stride in zip(_KERNELS[::-1], _STRIDES[::-1], strict=True):
        field = (field - 1) * stride + kernel
    starts = [(field - _TARGET_FFT) // 2 + offset for offset in (-hop // 4, hop // 4)]
    both = nn.ModuleList([model, nn.Linear(settings.hidden_size, 2 * _TARGET_BANDS)])

    def loss_at(step: int) -> Tensor:
        pieces = []
        for i in rng.integers(len(waves), size=16):
            start = rng.integers(0, max(1, len(waves[i]) - speech.RATE))
            piece = waves[i][start : start + speech.RATE]
            pieces.append(torch.from_numpy(np.pad(piece, (0, speech.RATE - len(piece)))))
        x = torch.stack(pieces)
        predicted = both[1](model(x).transpose(1, 2))  # (16, frames, 128)
        targets = [mel(x[:, start:], hop) for start in starts]
        frames = min(predicted.shape[1], *(t.shape[1] for t in targets))
        target = torch.cat([t[:, :frames] for t in targets], 2)
        return nn.functional.mse_loss(predicted[:, :frames], target)

    log.info("encoder: convolutions")
    optimise(both, settings.front_steps, 4e-3, 20, loss_at, weight_decay=0.0)


def _normalise(wave: np.ndarray) -> np.ndarray:
    return ((wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)).astype(np.float32)


def _change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play ``factor`` times as fast, by linear interpolation: pitch moves too."""
    return np.interp(np.arange(0, len(wave) - 1, factor), np.arange(len(wave)), wave).astype(np.float32)


def train_encoder(corpus_dir: Path, models_dir: Path, settings: EncoderSettings) -> None:
    """Train WavLM with a character CTC on the pretrain set; write ``ctc`` (WavLMForCTC) and ``encoder`` (WavLMModel).

    Frames of 40 ms at 16 kHz (released WavLMs: 20 ms; with half as many, CTC learns in half the time). Both folders
    hold a feature extractor, ``ctc`` a tokenizer as well.

    Raises:
        UserError: the corpus is missing or cannot be read.
    """
    rng = seed_everything(settings.seed)
    rows = corpus.read_corpus(corpus_dir, PRETRAIN)
    waves = [media.read_audio(str(row.clip), speech.RATE) for row in rows]
    letter_ids = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CTC_LETTERS])}
    targets = [torch.tensor([letter_ids[c] for c in row.text.replace(" ", "|")]) for row in rows]
    model = _build_model(len(letter_ids), settings)
    normalised = [_normalise(wave) for wave in waves]
    front = model.wavlm.feature_extractor
    with torch.no_grad():
        first: Any = front.conv_layers[0]
        first.conv.weight.copy_(_filterbank(normalised[:40]))
        first.layer_norm.weight.fill_(2.0)
    _train_front(front, normalised, settings, rng)
    model.freeze_feature_encoder()
    _train_ctc(model, waves, targets, settings, rng)
    _save(models_dir, model, letter_ids)


def _build_model(vocabulary: int, settings: EncoderSettings) -> WavLMForCTC:
    config = WavLMConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        conv_dim=(4 * _BANDS, settings.hidden_size, settings.hidden_size),
        conv_kernel=_KERNELS,
        conv_stride=_STRIDES,
        conv_bias=False,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=15,
        num_conv_pos_embedding_groups=4,
        num_buckets=64,
        max_bucket_distance=160,
        hidden_dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.1,
        layerdrop=0.0,
        mask_time_prob=0.06,
        mask_time_length=5,
        mask_feature_prob=0.0,
        initializer_range=0.08,  # 0.02 is for models ten times as wide
        ctc_zero_infinity=True,
        pad_token_id=0,  # also CTC's blank
        bos_token_id=1,
        eos_token_id=2,
    )
    return WavLMForCTC(config)


def _train_ctc(
    model: WavLMForCTC,
    waves: Sequence[np.ndarray],
    targets: Sequence[Tensor],
    settings: EncoderSettings,
    rng: np.random.Generator,
) -> None:
    """Train all but the convolutions: ``waves`` (T,) at changing speeds, ``targets`` the letters of each."""
    order = batches(rng, [len(w) for w in waves], settings.batch_size)

    def loss_at(step: int) -> Tensor:
        chosen = next(order)
        factors = 1 + settings.speed_change * rng.uniform(-1, 1, len(chosen))
        pieces = [_normalise(_change_speed(waves[i], f)) for i, f in zip(chosen, factors, strict=True)]
        lengths = torch.tensor([len(p) for p in pieces])
        x = nn.utils.rnn.pad_sequence([torch.from_numpy(p) for p in pieces], batch_first=True)
        mask = (torch.arange(x.shape[1])[None] < lengths[:, None]).long()
        hidden = model.wavlm(x, attention_mask=mask).last_hidden_state
        answers = [targets[i] for i in chosen]
        return nn.functional.ctc_loss(
            model.lm_head(model.dropout(hidden)).log_softmax(-1).transpose(0, 1),
            torch.cat(answers),
            model.wavlm._get_feat_extract_output_lengths(lengths),  # type: ignore[arg-type]  # says LongTensor
            torch.tensor([len(a) for a in answers]),
            zero_infinity=True,
        )

    log.info("encoder: CTC")
    optimise(model, settings.steps, settings.lr, settings.warmup, loss_at)


def _save(models_dir: Path, model: WavLMForCTC, letter_ids: dict[str, int]) -> None:
    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=speech.RATE, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )

    def save_ctc(folder: Path) -> None:
        vocabulary = folder / "vocab.json"
        vocabulary.write_text(json.dumps(letter_ids), encoding="utf-8")
        Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(vocabulary))).save_pretrained(folder)
        model.save_pretrained(folder)

    def save_encoder(folder: Path) -> None:
        extractor.save_pretrained(folder)
        model.wavlm.save_pretrained(folder)

    save_whole(models_dir / "encoder", save_encoder)
    save_whole(models_dir / "ctc", save_ctc)
