"""The small "pretrained" models of the mini recipe, trained from nothing on the train clips of the mini corpus.

Each is a real class of transformers, written with save_pretrained; what follows loads them as it loads WavLM-large,
Vicuna and any ViT. Step counts, not seconds, say how long they train, so that a seed gives the same weights again on
the same machine.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mini import corpus, face, speech
from sdumc.data import media

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
    """Train what is not frozen of ``model`` with AdamW: linear warm-up, cosine to zero, gradient norm at most 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    start, running = time.perf_counter(), 0.0
    model.train()
    for step in range(steps):
        rise, fall = min(1.0, (step + 1) / max(1, warmup)), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rise * fall
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            count = step % 100 + 1
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
_KERNELS, _STRIDES = (400, 3, 3), (160, 2, 2)  # 25 ms windows every 10 ms, then twice half as many
_TARGET_BANDS, _TARGET_FFT = 64, 512


def _mel_edges(bands: int) -> np.ndarray:
    """Edges of ``bands`` overlapping bands, equally wide on the mel scale from 60 to 7800 Hz: (bands + 2,) in Hz."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (60, 7800))
    return 700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1)


def _filterbank(waves: Sequence[np.ndarray]) -> Tensor:
    """Start of the first convolution: (160, 1, 400), 40 mel bands in four phases each.

    From random filters a spectrum would take hours to emerge, cf. Zeghidour et al. 2018, "Learning filterbanks from raw
    speech". Each band is scaled to the same mean magnitude on ``waves``, so that high ones count too.
    """
    edges = _mel_edges(_BANDS)
    time = (np.arange(_KERNELS[0]) - _KERNELS[0] / 2) / speech.RATE
    centre, width = edges[1:-1, None], (edges[2:] - edges[:-2])[:, None] / 2
    # A Gaussian window as short as the band's width asks, but one that the kernel holds.
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
    """Log mel spectrum, each band with mean 0 and variance 1 over the clips given at first."""

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
    """Teach the convolutions to show the log mel spectrum: each output frame predicts two moments of it linearly.

    A few seconds of this spare CTC the search for a front end, and keep pitch and loudness in the features, which CTC
    alone has no use for.
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
    """Train WavLM with a character CTC on the train clips; write ``ctc`` (WavLMForCTC) and ``encoder`` (WavLMModel).

    Frames of 40 ms at 16 kHz (released WavLMs: 20 ms; with half as many, CTC learns in half the time). Both folders
    hold a feature extractor, ``ctc`` a tokenizer as well.

    Raises:
        UserError: the corpus is missing or cannot be read.
    """
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor, WavLMConfig, WavLMForCTC

    rng = seed_everything(settings.seed)
    rows = corpus.read_corpus(corpus_dir, "train")
    waves = [media.read_audio(str(row.clip), speech.RATE) for row in rows]
    letter_ids = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CTC_LETTERS])}
    targets = [torch.tensor([letter_ids[c] for c in row.text.replace(" ", "|")]) for row in rows]
    config = WavLMConfig(
        vocab_size=len(letter_ids),
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
    model = WavLMForCTC(config)
    front = model.wavlm.feature_extractor
    normalised = [_normalise(wave) for wave in waves]
    with torch.no_grad():
        first: Any = front.conv_layers[0]
        first.conv.weight.copy_(_filterbank(normalised[:40]))
        first.layer_norm.weight.fill_(2.0)
    _train_front(front, normalised, settings, rng)
    model.freeze_feature_encoder()
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


# ---- the LLM: Llama, on text and on noisy spellings of it


@dataclass(frozen=True)
class LanguageSettings:
    """Size and training of the LLM."""

    seed: int = 1
    steps: int = 500
    batch_size: int = 24
    lr: float = 2e-3
    warmup: int = 60
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 256
    plain: float = 0.17  # share of steps on text without a spelling before it
    slot: float = 0.2  # seconds of speech that one slot of a spelling stands for
    letters_per_second: float = 16.0
    deletions: float = 0.06
    substitutions: float = 0.04
    noise: float = 0.3  # of slots, in root mean squares of the embeddings
    joined: tuple[float, ...] = (0.1, 0.3, 0.3, 0.3)  # shares of sentences as they are, and joined from 2, 3, 4


PROMPT = "Transcribe speech to text. "
CHAT = f"USER: {PROMPT}\n ASSISTANT:"


def build_tokenizer(texts: Sequence[str]):
    """A byte-fallback BPE like Llama's, learned from ``texts`` and the chat prompt: a PreTrainedTokenizerFast.

    Every word of ``texts`` is one token; other words fall apart into letters and other characters into bytes, so that
    any text can be encoded. Text is lower-cased. ``<unk>``, ``<s>``, ``</s>`` and ``<pad>`` are 0, 1, 2 and 3.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]

    def arrange(tokenizer: Tokenizer) -> Tokenizer:
        tokenizer.normalizer = normalizers.Lowercase()
        # Marks stand alone: words are the same tokens after "ASSISTANT:" as anywhere else.
        marks = pre_tokenizers.Split(Regex(r"[^\w\s']|\n"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [marks, pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
        )
        return tokenizer

    learner = arrange(Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)))
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=list("▁'" + string.ascii_lowercase),
        show_progress=False,
    )
    learner.train_from_iterator([*texts, CHAT], trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    pieces = special + bytes_ + pieces[len(special) :]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = arrange(
        Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def spell(text: str, letter_ids: dict[str, int], rng: np.random.Generator, settings: LanguageSettings) -> np.ndarray:
    """A noisy, time-stretched spelling: weights (slots, vocabulary letters) of each slot's letters, rows summing to 1.

    Letters last a random time; a slot is the overlap-weighted mean of those that fall into it, as a projector's output
    for a group of frames would be. Some letters are left out or exchanged for others.
    """
    letters = []
    for letter in " " + text + " ":
        if rng.random() < settings.deletions:
            continue
        if rng.random() < settings.substitutions:
            letter = str(rng.choice(list(letter_ids)))
        letters.append(letter_ids.get(letter, letter_ids[" "]))
    rate = settings.letters_per_second * rng.uniform(0.85, 1.2)
    ends = np.cumsum(rng.gamma(4.0, 0.25 / rate, len(letters))) + rng.uniform(0, settings.slot)
    starts = np.concatenate([[0.0], ends[:-1]])
    slots = max(1, int(ends[-1] / settings.slot))
    edges = settings.slot * np.arange(slots + 1)
    overlap = np.minimum(ends[None], edges[1:, None]) - np.maximum(starts[None], edges[:-1, None])
    weights = np.zeros((slots, len(letter_ids)), np.float32)
    for column, index in enumerate(letters):
        weights[:, index] += np.maximum(overlap[:, column], 0)
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-6)


def train_llm(corpus_dir: Path, models_dir: Path, settings: LanguageSettings) -> None:
    """Train a Llama with its tokenizer on the train transcripts; write ``llm``.

    Behind the chat prompt it learns to write the sentence whose noisy spelling stands before it,
    ``[spelling][BOS]"USER: ...\\n ASSISTANT:"sentence[EOS]``: what a projector's output will mean to it. An LLM that
    saw plain text only cannot be driven by so small a projector. Most sentences are joined from parts of
    several, so that it has to read and cannot recite.

    Raises:
        UserError: the corpus is missing.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    rng = seed_everything(settings.seed)
    texts = [row.text for row in corpus.read_corpus(corpus_dir, "train")]
    tokenizer = build_tokenizer(texts)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    embedding: Any = model.get_input_embeddings()
    # As large as what the layers add, so that hidden states keep saying which word they stand on.
    nn.init.normal_(embedding.weight)
    letters = {c: i for i, c in enumerate(" " + string.ascii_lowercase)}
    letter_tokens = torch.tensor(tokenizer.convert_tokens_to_ids(["▁", *string.ascii_lowercase]))
    chat = tokenizer(CHAT)["input_ids"]

    def draw_text() -> str:
        words = texts[rng.integers(len(texts))].split()
        for _ in range(rng.choice(4, p=settings.joined)):
            other = texts[rng.integers(len(texts))].split()
            here = rng.integers(1, len(words))
            there = int(np.clip(here + rng.integers(-2, 3), 1, len(other) - 1))
            words = words[:here] + other[there:]
        return " ".join(words)

    def loss_at(step: int) -> Tensor:
        plain = rng.random() < settings.plain
        chatting = not plain or rng.random() < 0.5
        rows, labels = [], []
        for _ in range(settings.batch_size):
            text = draw_text()
            answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            head = chat if chatting else [tokenizer.bos_token_id]
            row = embedding(torch.tensor([*head, *answer]))
            before = len(head)
            if not plain:
                slots = torch.from_numpy(spell(text, letters, rng, settings)) @ embedding(letter_tokens)
                level = settings.noise * embedding(letter_tokens).detach().square().mean().sqrt()
                row = torch.cat([slots + level * torch.randn_like(slots), row])
                before += len(slots)
            rows.append(row)
            labels.append(torch.tensor([-100] * before + answer))
        lengths = torch.tensor([len(r) for r in rows])
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        # Padding is on the right, where no real token sees it.
        mask = (torch.arange(x.shape[1])[None] < lengths[:, None]).long()
        hidden = model.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = targets[:, 1:] != -100
        return nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[:, 1:][wanted])

    log.info("LLM: %d sentences, %d tokens in the vocabulary", len(texts), len(tokenizer))
    optimise(model, settings.steps, settings.lr, settings.warmup, loss_at)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save_whole(models_dir / "llm", save)


# ---- the vision model: a ViT that reads drawn faces


@dataclass(frozen=True)
class VisionSettings:
    """Size and training of the vision model."""

    seed: int = 1
    steps: int = 300
    batch_size: int = 32
    lr: float = 2e-3
    warmup: int = 30
    picture: int = 96  # pixels of a drawn picture
    image_size: int = 64  # pixels of what the model sees
    patch_size: int = 8
    hidden_size: int = 64
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 192


def train_vision(corpus_dir: Path, models_dir: Path, settings: VisionSettings) -> None:
    """Train a ViT to tell the drawn expression from pictures of the train speakers' faces; write ``vision``.

    The class token and the mean of the patches each predict :data:`mini.face.PARAMETERS` through a Linear that is
    thrown away. Colours and noise are varied, as other speakers have other colours.

    Raises:
        UserError: the corpus is missing.
    """
    from transformers import ViTConfig, ViTModel

    rng = seed_everything(settings.seed)
    looks = corpus.read_looks(corpus_dir, "train")
    model = ViTModel(
        ViTConfig(
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=settings.intermediate_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.08,
        ),
        add_pooling_layer=False,
    )
    processor = _image_processor(settings.image_size)
    count = len(face.PARAMETERS)
    low, high = np.array([-1, -1, 0, 0, -1]), np.array([1, 1, 1, 1, 1])
    heads = nn.ModuleList([nn.Linear(settings.hidden_size, count) for _ in range(2)])

    def loss_at(step: int) -> Tensor:
        values = rng.uniform(low, high, (settings.batch_size, count))
        pictures = []
        for row in values:
            drawn = face.draw_face(looks[rng.integers(len(looks))], row, settings.picture).astype(np.float32)
            picture = drawn * rng.uniform(0.8, 1.2, 3) + rng.uniform(-15, 15, 3) + rng.normal(0, 3, drawn.shape)
            pictures.append(np.clip(picture, 0, 255).astype(np.uint8))
        pixels = processor(images=pictures, return_tensors="pt", input_data_format="channels_last").pixel_values
        tokens = model(pixel_values=pixels).last_hidden_state
        target = torch.from_numpy((2 * (values - low) / (high - low) - 1).astype(np.float32))
        first, mean = heads[0](tokens[:, 0]), heads[1](tokens[:, 1:].mean(1))
        return nn.functional.mse_loss(first, target) + nn.functional.mse_loss(mean, target)

    log.info("vision model: %d faces", len(looks))
    optimise(nn.ModuleList([model, heads]), settings.steps, settings.lr, settings.warmup, loss_at)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    save_whole(models_dir / "vision", save)


def _image_processor(size: int):
    """ViT's image processor, the one that needs no torchvision."""
    import transformers

    # Before transformers 5 there was one class; the newer plain name asks for torchvision.
    name = "ViTImageProcessorPil" if hasattr(transformers, "ViTImageProcessorPil") else "ViTImageProcessor"
    kind = getattr(transformers, name)
    return kind(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
