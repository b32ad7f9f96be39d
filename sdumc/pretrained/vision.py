"""Vision models of transformers: one vector per picture."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.machine import halve_when_out_of_memory
from sdumc.pretrained.loading import (
    attempt,
    load_model,
    load_preprocessor,
    model_folder,
    passed,
    read_model_config,
    same,
    trial_pictures,
)

# Parameters that stand before the patches, as vectors of their own; the first is the class token.
_CLASS_TOKENS = ("embeddings.cls_token", "embeddings.class_embedding")
_OTHER_TOKENS = ("embeddings.distillation_token", "embeddings.register_tokens")
_SUPPORTED = "a model that reads single pictures, such as CLIP, SigLIP, ViT, DINOv2, Swin or ConvNeXt"


class VisionExtractor:
    """A vision model of transformers (ViT, CLIP, DINOv2, ResNet, ...) with its image processor.

    When it is loaded, the model is tried on three pictures: it must give one vector for each, the same at every call,
    and the same alone and together.

    Args:
        pooling: ``pooler`` the model's pooled output, ``cls`` the class token of the last layer, ``mean`` the mean of
            the patch tokens (without class, register and distillation tokens), or of all positions of a map.

    Attributes:
        dim: width D of a vector.

    Raises:
        UserError: the folder is incomplete, no vision model, has no weights for ``pooling``, or fails the trial.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pooling: str = "cls",
        batch: int = 64,
    ):
        self.folder = folder = model_folder(name)
        self.kind = kind = read_model_config(folder)["model_type"]
        self.device, self.dtype, self.pooling, self.batch = torch.device(device), dtype, pooling, batch
        self.model = _load(folder, kind, dtype, self.device, pooling)
        if getattr(self.model, "main_input_name", "") != "pixel_values":
            raise UserError(f"{folder}: a {kind} model does not take pictures")
        if (frames := getattr(self.model.config, "num_frames", 1)) > 1:
            raise UserError(f"{folder}: a {kind} model reads clips of {frames} pictures, not single ones")
        parameters = inspect.signature(type(self.model).forward).parameters
        self.takes = set(parameters)
        self.needs = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        self.needs = [n for n in self.needs if n not in ("self", "pixel_values")]
        self.processor = _image_processor(folder)
        shapes = {n: p.shape for n, p in self.model.named_parameters()}
        has_class = any(n.endswith(_CLASS_TOKENS) for n in shapes)
        others = sum(shape[1] for n, shape in shapes.items() if n.endswith(_OTHER_TOKENS))
        self.prefix = int(has_class) + others  # vectors before those of the patches
        if kind == "dinov3_convnext":  # the pooled map stands before the positions
            self.prefix = 1
        if pooling == "cls" and not has_class:
            raise UserError(f"{folder}: a {kind} model has no class token; use --pooling mean or pooler")
        if kind == "vit_mae":  # made to hide three patches of four at random
            self.model.config.mask_ratio = 0.0
        (self.dim,) = passed(folder, self.device, ("vision", dtype, pooling), lambda: [self._try()])

    def _try(self) -> int:
        """Try the model on three pictures; the width of its vectors."""
        pictures, refusal = trial_pictures(), f"{self.folder}: this {self.kind} model cannot be used for pictures"

        def vectors(pictures: Sequence[np.ndarray]) -> list[Tensor]:
            found = attempt(lambda: self._in_memory(pictures), refusal)
            if len(found) != len(pictures):
                raise UserError(f"{refusal}: it gives {len(found)} vectors for {len(pictures)} pictures")
            return [torch.from_numpy(v)[None] for v in found]

        def alone() -> list[Tensor]:
            return [vectors([p])[0] for p in pictures]

        first = alone()
        if not all(bool(torch.isfinite(v).all()) for v in first):
            raise UserError(f"{refusal}: its output is not finite in {str(self.dtype).removeprefix('torch.')}")
        if not same(first, alone(), self.dtype):
            raise UserError(f"{refusal}: the same picture gives another vector each time")
        if not same(first, vectors(pictures), self.dtype):
            raise UserError(f"{refusal}: a picture's vector depends on the other pictures")
        return int(first[0].shape[1])

    def __call__(self, pictures: Iterable[np.ndarray]) -> np.ndarray:
        """RGB uint8 pictures (H, W, 3) -> float32 (N, D); pictures are taken from the iterator batch by batch."""
        pictures, parts = iter(pictures), []
        while chunk := list(islice(pictures, self.batch)):
            parts += self._in_memory(chunk)
        return np.stack(parts) if parts else np.zeros((0, self.dim), np.float32)

    def _in_memory(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        return halve_when_out_of_memory(pictures, self._vectors, lambda p: f"a picture of {p.shape[1]}x{p.shape[0]}")

    @torch.no_grad()
    def _vectors(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        made = self.processor(images=list(pictures), return_tensors="pt", input_data_format="channels_last")
        pixels = made.pixel_values
        more = {k: v.to(self.device) for k, v in made.items() if k != "pixel_values" and k in self.takes}
        if self.kind == "vit_mae":  # it sorts the patches by this noise: they stay in their order
            order = torch.arange(self._patches(pixels) or 0, dtype=torch.float32, device=self.device)
            more["noise"] = order.expand(len(pictures), -1)
        if lacking := [k for k in self.needs if k not in more]:
            raise UserError(
                f"{self.folder}: a {self.kind} model wants more than pixels ({', '.join(lacking)}), which its image "
                f"processor does not make; give {_SUPPORTED}"
            )
        output = self.model(pixel_values=pixels.to(self.device, self.dtype), **more)
        return list(self._pooled(output, pixels, more).flatten(1).float().cpu().numpy())

    def _pooled(self, output: Any, pixels: Tensor, more: dict[str, Tensor]) -> Tensor:
        """(B, D), or (B, D, 1, 1), from a model's output for pictures (B, 3, H, W), or their patches (B, N, values)."""
        if self.pooling == "pooler":
            vectors = getattr(output, "pooler_output", None)
            if vectors is None:
                raise UserError(f"{self.folder}: this model has no pooled output; use --pooling cls or mean")
            return vectors
        states = output.last_hidden_state
        if states.ndim == 4:  # a map (B, D, rows, columns)
            return states.mean((2, 3))
        if pixels.ndim == 3 and (mask := more.get("pixel_attention_mask")) is not None:  # SigLIP 2: padded patches
            real = mask[..., None].to(states)
            return (states * real).sum(1) / real.sum(1)
        self._check_count(states.shape[1], pixels)
        return states[:, 0] if self.pooling == "cls" else states[:, self.prefix :].mean(1)

    def _patches(self, pixels: Tensor) -> int | None:
        """How many patches a picture of ``pixels`` (B, 3, H, W) has; None if the model's settings do not say."""
        size = getattr(self.model.config, "patch_size", None)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
        return (pixels.shape[-2] // height) * (pixels.shape[-1] // width)

    def _check_count(self, count: int, pixels: Tensor) -> None:
        """Raise a UserError where there are vectors of which it is not known what they stand for."""
        patches = self._patches(pixels)
        if patches is None and self.kind == "dinov3_convnext":
            return
        if patches is None:
            raise UserError(
                f"{self.folder}: this {self.kind} model does not say which of its {count} vectors are patches; use "
                "--pooling pooler, or another model"
            )
        if count == self.prefix + patches:
            return
        if count > patches or self.prefix:  # models in stages end with fewer, and have no class token
            raise UserError(
                f"{self.folder}: this {self.kind} model gives {count} vectors for a picture of {patches} patches, "
                f"where {self.prefix + patches} are expected; use --pooling pooler, or another model"
            )


def _model_class(kind: str) -> Any:
    """The class that reads pictures: of a model with two towers, as CLIP, that of the vision tower."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES as NAMES

    name = NAMES.get(kind)
    stem = name.removesuffix("Model") if isinstance(name, str) else ""
    try:
        tower = getattr(transformers, f"{stem}VisionModel", None)
        whole = getattr(transformers, str(name), None)
    except ImportError:  # a library that it needs: loading it says which
        return transformers.AutoModel
    takes_pictures = [getattr(c, "main_input_name", None) == "pixel_values" for c in (tower, whole)]
    return tower if takes_pictures == [True, False] else transformers.AutoModel


def _load(folder: Path, kind: str, dtype: torch.dtype, device: torch.device, pooling: str) -> Any:
    # A classifier's folder (a facial-expression ViT) has no pooler weights; random ones must not be used.
    optional = () if pooling == "pooler" else ("pooler.", "vision_model.post_layernorm", "vision_model.head")
    from transformers import AutoModel

    tower = _model_class(kind)
    try:
        return load_model(tower, folder, dtype, device, optional, _SUPPORTED)
    except UserError as e:
        if tower is not AutoModel and "incomplete model for" in str(e):  # its weights have other names than the whole's
            whole = load_model(AutoModel, folder, dtype, device, optional, _SUPPORTED)
            return getattr(whole, "vision_model", whole)
        if "pooler" in str(e):
            raise UserError(f"{folder}: has no pooler weights; use --pooling cls or mean") from None
        raise


def _image_processor(folder: Path) -> Any:
    """The folder's image processor, the PIL/numpy one: no torchvision is needed, and results do not depend on it."""
    import transformers

    # Versions with classes of that name take the first option; older ones ignore it, and warn without the second.
    option = {"backend": "pil"} if hasattr(transformers, "ViTImageProcessorPil") else {"use_fast": False}
    refusal = f"{folder}: its image processor cannot be loaded"
    plain = read_json(folder / "preprocessor_config.json", "fetch the model again", absent={})
    if "DINOv3" in str(plain.get("image_processor_type")):
        # It exists for torchvision only. ViT's takes the same settings; it rounds to 8 bits after resizing.
        return attempt(
            lambda: transformers.ViTImageProcessor.from_pretrained(str(folder), local_files_only=True), refusal
        )
    automatic = transformers.AutoImageProcessor.from_pretrained
    return load_preprocessor(
        folder, lambda: automatic(str(folder), local_files_only=True, trust_remote_code=False, **option), refusal
    )
