"""Vision models of transformers: one vector per picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from sdumc.errors import UserError
from sdumc.pretrained.folders import load_model, model_folder, read_model_config
from sdumc.pretrained.memory import halve_when_out_of_memory


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
        # A classifier's folder (a facial-expression ViT) has no pooler weights; random ones must not be used.
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
            parts += halve_when_out_of_memory(chunk, self._vectors, lambda p: f"a picture of {p.shape[1]}x{p.shape[0]}")
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
    import transformers

    # Versions with classes of that name take the first option; older ones ignore it, and warn without the second.
    option = {"backend": "pil"} if hasattr(transformers, "ViTImageProcessorPil") else {"use_fast": False}
    try:
        return transformers.AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, **option)
    except Exception as e:
        raise UserError(f"{folder}: its image processor cannot be loaded: {str(e).splitlines()[0]}") from None
