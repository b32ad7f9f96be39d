"""The small "pretrained" models of the mini recipe, trained from nothing on the train clips of the mini corpus.

Each is a real class of transformers, written with save_pretrained; what follows loads them as it loads WavLM-large,
Vicuna and any ViT. Step counts, not seconds, say how long they train, so that a seed gives the same weights again on
the same machine.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sdumc.data import media
from sdumc.mini import corpus, speech

log = logging.getLogger("sdumc")


# ---- what the three have in common


def seed_everything(seed: int) -> np.random.Generator:
    """Seed torch and numpy's global state (transformers draws SpecAugment masks from it); return a generator."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    return np.random.default_rng(seed)


def save_whole(folder: Path, save: Callable[[Path], None]) -> None:
    """Call ``save`` with a temporary folder and rename that to ``folder``: a model is there whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def optimise(
    model: nn.Module, steps: int, lr: float, warmup: int, loss_at: Callable[[int], Tensor], weight_decay: float = 0.01
) -> None:
    """Train all parameters of ``model`` with AdamW: linear warm-up, cosine to zero, gradient norm at most 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    start, running = time.perf_counter(), 0.0
    model.train()
    for step in range(steps):
        rise, fall = min(1.0, (step + 1) / max(1, warmup)), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rise * fall
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            count = step % 50 + 1
            log.info("step %d/%d loss %.4f, %.0f s", step + 1, steps, running / count, time.perf_counter() - start)
            running = 0.0
    model.eval()


def batches(rng: np.random.Generator, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of indices for ever: shuffled, of about equal lengths inside a batch."""
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), 8 * size):
            pool = sorted(order[start : start + 8 * size].tolist(), key=lambda i: lengths[i])
            pieces = [pool[i : i + size] for i in range(0, len(pool), size)]
            for i in rng.permutation(len(pieces)):
                yield pieces[i]


# ---- the speech encoder: WavLM with a character CTC


@dataclass(frozen=True)
class EncoderSettings:
    """Size and training of the encoder."""

    seed: int = 1
    steps: int = 340
    batch_size: int = 16
    lr: float = 2e-3
    warmup: int = 60
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 384
    speeds: tuple[float, float] = (0.88, 1.12)
    noise: float = 0.0  # more white noise, sd at most, in sd of the clip


CTC_LETTERS = "|'" + string.ascii_lowercase  # "|" stands between words, as in wav2vec 2.0's vocabularies
_BANDS = 40
_WINDOW, _HOP = 400, 160  # samples: 25 ms every 10 ms; the second convolution halves that to WavLM's 20 ms


def _filterbank(waves: list[np.ndarray]) -> Tensor:
    """Start of the first convolution: (160, 1, 400), 40 bands on the mel scale in four phases each.

    Random filters of this length would take hours to become a spectrum, cf. Zeghidour et al. 2018, "Learning filterbanks
    from raw speech". Each band is scaled to the same mean magnitude on ``waves``, so that high ones count too.
    """
    mel = np.linspace(_mel(60), _mel(7600), _BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    t = (np.arange(_WINDOW) - _WINDOW / 2) / speech.RATE
    centre, width = edges[1:-1, None], (edges[2:] - edges[:-2])[:, None] / 2
    # A Gaussian window as wide as the band asks, but no wider than the kernel.
    sigma = np.minimum(0.6 / (2 * np.pi * width) * 2, _WINDOW / speech.RATE / 5)
    window = np.exp(-0.5 * (t / sigma) ** 2)
    cosine, sine = window * np.cos(2 * np.pi * centre * t), window * np.sin(2 * np.pi * centre * t)
    filters = torch.tensor(np.stack([cosine, sine], 1), dtype=torch.float32)  # (40, 2, 400)
    magnitude = torch.zeros(_BANDS)
    for wave in waves:
        response = nn.functional.conv1d(torch.from_numpy(wave)[None, None], filters.reshape(-1, 1, _WINDOW), stride=_HOP)
        magnitude += response.reshape(_BANDS, 2, -1).square().sum(1).sqrt().mean(1)
    filters = filters / (magnitude / len(waves))[:, None, None]
    return torch.cat([filters, -filters], 1).reshape(-1, 1, _WINDOW)


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def _normalise(wave: np.ndarray) -> np.ndarray:
    return ((wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)).astype(np.float32)


def _change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play ``factor`` times as fast, by linear interpolation: pitch moves too."""
    positions = np.arange(0, len(wave) - 1, factor)
    return np.interp(positions, np.arange(len(wave)), wave).astype(np.float32)


def train_encoder(corpus_dir: Path, models_dir: Path, settings: EncoderSettings) -> None:
    """Train WavLM with a character CTC on the train clips; write ``ctc`` (WavLMForCTC) and ``encoder`` (WavLMModel).

    20 ms frames at 16 kHz, like every released WavLM; both folders hold a feature extractor, ``ctc`` a tokenizer too.

    Raises:
        UserError: the corpus is missing or cannot be read.
    """
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor, WavLMConfig, WavLMForCTC

    rng = seed_everything(settings.seed)
    rows = corpus.read_corpus(corpus_dir, "train")
    waves = [media.read_audio(str(row.clip), speech.RATE) for row in rows]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letter_ids = {c: i for i, c in enumerate([*special, *CTC_LETTERS])}
    targets = [torch.tensor([letter_ids[c] for c in row.text.replace(" ", "|")]) for row in rows]
    config = WavLMConfig(
        vocab_size=len(letter_ids),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        conv_dim=(4 * _BANDS, settings.hidden_size),
        conv_kernel=(_WINDOW, 3),
        conv_stride=(_HOP, 2),
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
        ctc_loss_reduction="sum",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = WavLMForCTC(config)
    first = model.wavlm.feature_extractor.conv_layers[0]
    with torch.no_grad():
        first.conv.weight.copy_(_filterbank([_normalise(w) for w in waves[:40]]))
        first.layer_norm.weight.fill_(2.0)
    order = batches(rng, [len(w) for w in waves], settings.batch_size)

    def loss_at(step: int) -> Tensor:
        chosen = next(order)
        pieces = []
        for i in chosen:
            wave = _change_speed(waves[i], rng.uniform(*settings.speeds))
            if settings.noise > 0:
                level = rng.uniform(0, settings.noise) * wave.std()
                wave = wave + level * rng.standard_normal(len(wave)).astype(np.float32)
            pieces.append(torch.from_numpy(_normalise(wave)))
        lengths = torch.tensor([len(p) for p in pieces])
        x = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        mask = (torch.arange(x.shape[1])[None] < lengths[:, None]).long()
        hidden = model.wavlm(x, attention_mask=mask).last_hidden_state
        log_probs = model.lm_head(model.dropout(hidden)).log_softmax(-1).transpose(0, 1)
        answers = [targets[i] for i in chosen]
        return nn.functional.ctc_loss(
            log_probs,
            torch.cat(answers),
            model.wavlm._get_feat_extract_output_lengths(lengths),
            torch.tensor([len(a) for a in answers]),
            zero_infinity=True,
        )

    optimise(model, settings.steps, settings.lr, settings.warmup, loss_at)

    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=speech.RATE, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )

    def save_ctc(folder: Path) -> None:
        import json

        vocab = folder / "vocab.json"
        vocab.write_text(json.dumps(letter_ids), encoding="utf-8")
        Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(vocab))).save_pretrained(folder)
        model.save_pretrained(folder)

    def save_encoder(folder: Path) -> None:
        extractor.save_pretrained(folder)
        model.wavlm.save_pretrained(folder)

    save_whole(models_dir / "encoder", save_encoder)
    save_whole(models_dir / "ctc", save_ctc)
