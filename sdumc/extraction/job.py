"""What a command line of stages 2 and 3 means: the data and the shard of a job, its batches, its speech LLM."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdumc.data.kaldi_dir import KaldiDir, load_kaldi_dir, shard
from sdumc.data.shards import ShardWriter
from sdumc.device import pick_device
from sdumc.errors import UserError
from sdumc.extraction.loop import durations, make_batches
from sdumc.pretrained.folders import DTYPES, fingerprint
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.prompts import prompt_text
from sdumc.pretrained.recogniser import CtcRecogniser, WhisperRecogniser, load_recogniser
from sdumc.pretrained.speech_encoder import SpeechEncoder
from sdumc.pretrained.speech_reader import SpeechReader, check_projector_prompt, projector_file
from sdumc.processes import installed_versions


def load_job(args: argparse.Namespace) -> tuple[KaldiDir, list[str]]:
    """The data directory of a job and the utterances of its shard."""
    if args.batch_size < 1 or args.batch_seconds <= 0:
        raise UserError("--batch-size and --batch-seconds must be positive")
    data = load_kaldi_dir(args.data_dir)
    return data, shard(data.utterances, args.shard)


def open_shard(args: argparse.Namespace, settings: Mapping[str, Any], utterances: Sequence[str]) -> ShardWriter:
    """The writer of a job's shard; what an earlier run left is continued if settings and utterances are the same."""
    job = int(args.shard.split("/")[0])
    if getattr(args, "compress", "no") != "no":
        settings = {**settings, "compression": args.compress}
    return ShardWriter(args.dump_dir, args.name, job, settings, utterances, installed_versions())


def data_hash(data: KaldiDir, *files: str | os.PathLike) -> str:
    """A hash of where the media are and of further files: work of a killed job on other data is not continued."""
    digest = hashlib.sha256(repr((data.wav, data.video, data.segments)).encode())
    for file in files:
        path = Path(file)
        digest.update(path.read_bytes() if path.is_file() else b"absent")
    return digest.hexdigest()[:16]


def sound_batches(args: argparse.Namespace, data: KaldiDir, utterances: Sequence[str]) -> list[list[str]]:
    """The job's utterances in batches by the length of their sound."""
    return make_batches(durations(data, utterances), args.batch_size, args.batch_seconds)


def load_reader(args: argparse.Namespace) -> tuple[SpeechReader, dict[str, Any]]:
    """Encoder, projector and LLM of the command line, and the part of a feature's settings that describes them.

    Raises:
        UserError: a folder is incomplete, parts do not fit, or the projector was trained with another prompt.
    """
    if not args.encoder or not args.projector:
        raise UserError("this needs --encoder and --projector (or, for extract_text, another --context)")
    llm, settings = load_llm(args)
    projector = projector_file(args.projector)
    check_projector_prompt(str(projector), llm.prompt, llm.template)
    encoder = SpeechEncoder(args.encoder, DTYPES[args.dtype], pick_device(args.device), args.encoder_layer)
    settings |= {
        "encoder": args.encoder,
        "encoder_hash": fingerprint(encoder.folder),
        "encoder_layer": args.encoder_layer,
        "projector": args.projector,
        "projector_hash": fingerprint(projector),
    }
    reader = SpeechReader.load(encoder, str(projector), llm)
    if llm.scale_depends_on_version or reader.embedding_scale != 1:
        settings["embedding_scale"] = reader.embedding_scale
    return reader, settings


def load_rescorer(args: argparse.Namespace) -> tuple[CtcRecogniser | WhisperRecogniser | None, dict[str, Any]]:
    """The recogniser that helps to choose a hypothesis, if there is one, and the part of the settings about it."""
    if not args.rescorer:
        return None, {}
    rescorer = load_recogniser(args.rescorer, DTYPES[args.dtype], pick_device(args.device), args.rescore_language)
    return rescorer, {
        "rescorer": args.rescorer,
        "rescorer_hash": fingerprint(rescorer.folder),
        "rescore_weight": args.rescore_weight,
        "rescore_language": args.rescore_language,
    }


def load_llm(args: argparse.Namespace) -> tuple[SpeechLLM, dict[str, Any]]:
    """The LLM of the command line, and the part of a feature's settings that describes it."""
    prompt = prompt_text(args.prompt)
    llm = SpeechLLM(args.llm, DTYPES[args.dtype], pick_device(args.device), prompt, args.layers, args.prompt_template)
    return llm, {
        "model": args.llm,
        "model_hash": fingerprint(llm.folder),
        "layers": args.layers,
        "first_state": args.first_state,
        "prompt": prompt,
        "prompt_template": llm.template,
        "frame_rate": None,  # one frame per token
        "dtype": args.dtype,
    }
