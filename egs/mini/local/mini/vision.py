"""The vision model: a ViT trained to read drawn faces."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from mini import corpus, face
from mini.plan import PRETRAIN
from mini.training import optimise, save_whole, seed_everything

log = logging.getLogger("sdumc")


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
    """Train a ViT to tell the drawn expression from pictures of the faces of pretrain's speakers; write ``vision``.

    The class token and the mean of the patches each predict :data:`mini.face.PARAMETERS` through a Linear that is
    thrown away. Colours and noise are varied, as other speakers have other colours.

    Raises:
        UserError: the corpus is missing.
    """
    rng = seed_everything(settings.seed)
    looks = corpus.read_looks(corpus_dir, PRETRAIN)
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
    # Before transformers 5 there was one class; the newer plain name asks for torchvision.
    name = "ViTImageProcessorPil" if hasattr(transformers, "ViTImageProcessorPil") else "ViTImageProcessor"
    kind = getattr(transformers, name)
    return kind(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
