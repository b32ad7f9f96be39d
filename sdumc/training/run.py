"""A training run, top to bottom: set up, resume, train and validate each epoch, save.

The objective is a function of a whole global batch, so every rank computes it on the gathered outputs of all ranks and
differentiates it for its own rows; see :mod:`sdumc.training.distributed`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sdumc.cli import setup_logging
from sdumc.conditions import COMPLETE, MISSING, MODALITIES, in_words
from sdumc.data.batches import Batch, BatchLoader, GlobalBatchSampler, UtteranceDataset
from sdumc.data.dump import Dump
from sdumc.errors import EXIT_REQUEUE, UserError
from sdumc.files import json_ready, settings_hash, write_text
from sdumc.losses.objective import sdumc_objective
from sdumc.machine import StopSignal
from sdumc.model.network import SDUMC, empty_loss_inputs
from sdumc.scale import LabelScale
from sdumc.scoring.decoding import decode
from sdumc.scoring.metrics import doubts, median_mae, score
from sdumc.training.checkpoint import (
    AVERAGED,
    CHECKPOINT,
    VALID_BEST,
    TrainingState,
    average_best,
    choose,
    epoch_file,
    get_rng,
    keep_best,
    load_checkpoint,
    load_into,
    lock_folder,
    log_to,
    save_checkpoint,
    save_weights,
    set_rng,
    write_extractors,
)
from sdumc.training.data import (
    as_inputs,
    drop_modalities,
    load_sets,
    set_normalisation,
    train_shares,
    valid_conditions,
    with_dimensions,
)
from sdumc.training.distributed import Ranks, barrier, gather_objects, gather_rows, join, leave, sum_gradients
from sdumc.training.initial import parameter_groups, start_from
from sdumc.training.settings import (
    FREE_TO_CHANGE,
    as_dict,
    learning_rate,
    model_config,
    objective_weights,
    shares_in_words,
    write_config,
    write_train_sets,
)

log = logging.getLogger("sdumc")


def train(settings: Namespace, stop: StopSignal) -> int:
    """Train until the last epoch, or until a signal comes on any rank.

    Returns:
        Exit code: 0, or ``EXIT_REQUEUE`` when a signal stopped the run; the same call then goes on.
    """
    # --- set up -------------------------------------------------------------------------------------------------------
    ranks = join(settings.device)
    exp_dir = Path(settings.exp_dir)
    open_folder(exp_dir, settings.verbose, ranks)
    train_set, valid_set = load_sets(settings)
    settings = with_dimensions(settings, train_set)
    flows = (COMPLETE, MISSING) if settings.flows == "both" else (settings.flows,)

    torch.manual_seed(settings.seed)  # the same weights on every rank
    model = SDUMC(model_config(settings)).to(ranks.device)
    if settings.normalise_features:
        set_normalisation(model, train_set)
    network: Any = torch.compile(model, dynamic=True) if settings.compile else model
    loaded = start_from(model, settings, exp_dir, train_set, ranks.is_main) if settings.init else frozenset()
    groups = parameter_groups(model, loaded, settings.init_lr_factor)
    optimiser = torch.optim.Adam(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    weights = objective_weights(settings)
    torch.manual_seed(settings.seed + 1000 * (ranks.rank + 1))  # dropout differs between ranks
    sampler, loader = open_batches(train_set, settings, ranks)

    # --- resume -------------------------------------------------------------------------------------------------------
    state = TrainingState(model, optimiser)
    described = {**as_dict(settings), "train_labels": settings_hash(train_set.labels)}
    resumed = resume(state, exp_dir, described, ranks)
    if not resumed:
        report_beginning(model, settings, train_set, valid_set, flows, sampler, ranks)
    board = open_records(exp_dir, settings, train_set, state, resumed) if ranks.is_main else None

    # --- train --------------------------------------------------------------------------------------------------------
    stopped = False
    while state.epoch <= settings.epochs and not stopped:
        started = time.monotonic()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, state.epoch) * group["factor"]
        sampler.set_epoch(state.epoch)
        sampler.start_batch = state.batches_done
        model.train()
        for batch in loader:
            utterances = sampler.global_batch(state.batches_done)
            outputs, labels, has_text = global_outputs(
                network, batch, len(utterances), flows, train_set.scale, settings, ranks
            )
            terms = sdumc_objective(outputs.get(COMPLETE), outputs.get(MISSING), labels, has_text, weights)
            check_finite(terms, state, train_set, utterances)
            stopped = update(terms["loss"], model, optimiser, settings.clip_grad, stop.raised, ranks)
            state.finish_step(terms, len(utterances))
            if stopped:
                break
            if settings.save_every and state.step % settings.save_every == 0 and state.batches_done < len(sampler):
                save(state, exp_dir, described, ranks)

        if not stopped:
            scores = evaluate(model, valid_set, valid_conditions(flows, valid_set), ranks)
            record = epoch_record(state, scores, learning_rate(settings, state.epoch), sampler.draws)
            state.finish_epoch(record, settings.average_best)
            if board is not None:
                if record["epoch"] in state.best_epochs:
                    save_weights(epoch_file(exp_dir, record["epoch"]), model.state_dict())
                report_epoch(record, board, settings.epochs, state.best_epochs[0], time.monotonic() - started)
        save(state, exp_dir, described, ranks)
        stopped = stopped or any(gather_objects(stop.raised, ranks))

    # --- end ----------------------------------------------------------------------------------------------------------
    finished = state.epoch > settings.epochs
    if board is not None:
        board.close()
    if finished:
        finish(state, model, exp_dir, train_set, valid_set, flows, ranks)
    else:
        log.info("stopped by a signal at step %d; run the same command again to go on", state.step)
    leave(ranks)
    return 0 if finished else EXIT_REQUEUE


def open_folder(exp_dir: Path, verbose: bool, ranks: Ranks) -> None:
    """Set up the log; the main rank makes the folder, locks it, and logs to a file there too."""
    setup_logging(verbose, f"[rank {ranks.rank}] " if ranks.size > 1 else "")
    if not ranks.is_main:
        log.setLevel(logging.WARNING)
        return
    try:
        exp_dir.mkdir(parents=True, exist_ok=True)
        lock_folder(exp_dir)
        log_to(exp_dir / "train.log")
    except OSError as e:
        raise UserError(f"{exp_dir}: cannot be written to ({e.strerror}); give another --exp-dir") from None


def open_batches(train_set: Dump, settings: Namespace, ranks: Ranks) -> tuple[GlobalBatchSampler, BatchLoader]:
    """The sampler of global batches, and the loader of this rank's rows of them."""
    dataset = UtteranceDataset(train_set, [*train_set.features])
    sampler = GlobalBatchSampler(
        dataset.frames,
        settings.batch_size,
        settings.batch_frames or None,
        settings.seed,
        world_size=ranks.size,
        rank=ranks.rank,
        min_batches=settings.min_epoch_steps,
        parts=[(part["utterances"], part["share"]) for part in train_shares(settings, train_set)],
    )
    return sampler, BatchLoader(dataset, sampler, settings.num_workers, pin_memory=ranks.device.type == "cuda")


def resume(state: TrainingState, exp_dir: Path, described: Mapping[str, Any], ranks: Ranks) -> bool:
    """Continue ``state`` from the folder's checkpoint, if there is one.

    Raises:
        UserError: the checkpoint is damaged, or was made with other settings.
    """
    saved = load_checkpoint(exp_dir / CHECKPOINT, described, FREE_TO_CHANGE, "another --exp-dir (run.sh: --exp-tag)")
    if saved is None:
        return False
    state.load_state_dict(saved)
    if len(state.rng) == ranks.size:
        set_rng(state.rng[ranks.rank], ranks.device)
    else:
        log.warning("the checkpoint is of %d ranks, this run has %d: dropout differs", len(state.rng), ranks.size)
    log.info("resuming at epoch %d, step %d", state.epoch, state.step)
    return True


def save(state: TrainingState, exp_dir: Path, described: Mapping[str, Any], ranks: Ranks) -> None:
    """Write the checkpoint, the records and the best weights; every rank takes part."""
    state.rng = gather_objects(get_rng(ranks.device), ranks)
    if ranks.is_main:
        save_checkpoint(exp_dir / CHECKPOINT, state.state_dict(), described)
        lines = [json.dumps(json_ready(record)) + "\n" for record in state.history]
        write_text(exp_dir / "metrics.jsonl", "".join(lines))
        keep_best(exp_dir, state.best_epochs)
    barrier(ranks)


# ---------------------------------------------------------------------------------------------------------------- steps

Rows = dict[str, dict[str, Tensor]]  # what the objective reads: by flow and name, a row per utterance


def global_outputs(
    network: Any,
    batch: Batch,
    total: int,
    flows: Sequence[str],
    scale: LabelScale,
    settings: Namespace,
    ranks: Ranks,
) -> tuple[Rows, Tensor, Tensor]:
    """Run this rank's rows of a global batch of ``total`` utterances, and gather those of all ranks.

    Returns:
        The outputs of each flow (total, ...), the labels (total,) on the network's scale, and which utterances have
        real text (total,), in the same order. Only this rank's rows carry a gradient.
    """
    batch = batch.to(ranks.device, non_blocking=True)
    own, has_text = own_outputs(network, batch, flows, settings, ranks.device)
    outputs = {f: {name: gather_rows(x.float(), total, ranks) for name, x in own[f].items()} for f in flows}
    labels = gather_rows(scale.to_network(batch.labels), total, ranks)
    return outputs, labels, gather_rows(has_text.to(torch.uint8), total, ranks).bool()


def own_outputs(
    network: Any, batch: Batch, flows: Sequence[str], settings: Namespace, device: torch.device
) -> tuple[Rows, Tensor]:
    """The outputs of each flow for this rank's utterances, and which of them have real text (B,)."""
    if not len(batch):  # fewer utterances than ranks: this one has nothing to contribute
        nothing = empty_loss_inputs(network.config, device)
        return dict.fromkeys(flows, nothing), torch.zeros(0, dtype=torch.bool, device=device)
    lengths = drop_modalities(as_inputs(batch.lengths), settings.modality_dropout)
    with torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext():
        outputs = network(as_inputs(batch.features), lengths, flows)
    has_text = lengths["text"] > 0 if "text" in lengths else torch.zeros(len(batch), dtype=torch.bool, device=device)
    return {f: outputs[f].loss_inputs() for f in flows}, has_text


def check_finite(terms: Mapping[str, Tensor], state: TrainingState, train_set: Dump, batch: Sequence[int]) -> None:
    """Stop the run before a loss that is NaN or infinite reaches the weights.

    Raises:
        UserError: naming the terms and the utterances of the global batch.
    """
    if bool(torch.isfinite(terms["loss"])):
        return
    places = [train_set.place(train_set.utterances[i]) for i in batch]
    utterances = [str(folder / utt) if train_set.origin else utt for folder, utt in places]
    values = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
    raise UserError(
        f"epoch {state.epoch}, step {state.step + 1}: the loss is not finite ({values}). Utterances of the batch: "
        f"{' '.join(utterances)}. Look at their features, or lower --lr; the last checkpoint is sound"
    )


def update(loss: Tensor, model: SDUMC, optimiser: torch.optim.Optimizer, clip: float, stop: bool, ranks: Ranks) -> bool:
    """One step of the optimiser on the gradients of all ranks; True if any rank says ``stop``."""
    if loss.requires_grad:  # a rank without rows has nothing to differentiate
        loss.backward()
    stopped = sum_gradients(model.parameters(), stop, ranks)
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)  # frees their memory for the next forward pass
    return stopped


# -------------------------------------------------------------------------------------------------------------- records


def evaluate(model: SDUMC, dump: Dump, conditions: Sequence[str], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Every measure by condition, the same on every rank."""
    scores = {}
    for condition in conditions:
        part = decode(model, dump, condition, ranks.device, (ranks.rank, ranks.size))
        mine = list(zip(part.ids, part.prediction, part.label, strict=True))
        rows = [row for rank in gather_objects(mine, ranks) for row in rank]
        rows.sort(key=lambda row: row[0])
        values = score(np.array([p for _, p, _ in rows]), np.array([y for _, _, y in rows]), scale=dump.scale)
        scores[condition] = {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
    return scores


def open_records(
    exp_dir: Path, settings: Namespace, train_set: Dump, state: TrainingState, resumed: bool
) -> SummaryWriter:
    """Write what describes the run, and open TensorBoard's file; points of epochs that are done again are removed."""
    write_config(exp_dir, settings)
    write_extractors(exp_dir, train_set)
    write_train_sets(exp_dir, train_shares(settings, train_set))
    train_set.scale.write(exp_dir)
    keep_best(exp_dir, state.best_epochs)
    folder = exp_dir / "tensorboard"
    if resumed:
        # TensorBoard reads the files by name, in which the second of a start comes first: not in the last one's second.
        made = max((path.stat().st_ctime for path in folder.glob("events.out.tfevents.*")), default=0.0)
        time.sleep(max(0.0, min(math.floor(made) + 1 - time.time(), 1.0)))
    return SummaryWriter(str(folder), purge_step=state.epoch if resumed else None)


def epoch_record(
    state: TrainingState, scores: dict[str, dict[str, float]], lr: float, utterances: int
) -> dict[str, Any]:
    """A finished epoch's line of metrics.jsonl; it saw so many ``utterances``, in all passes over the train set.

    ``choice`` is the mean MAE on valid; the best epoch has the lowest.
    """
    return {
        "epoch": state.epoch,
        "step": state.step,
        "lr": lr,
        "train": {name: value / utterances for name, value in state.sums.items()},
        "valid": scores,
        "choice": mean_mae(scores),
    }


def mean_mae(scores: Mapping[str, Mapping[str, float]]) -> float:
    """The mean MAE over the conditions on valid, by which epochs are chosen."""
    return sum(s["mae"] for s in scores.values()) / len(scores)


def report_beginning(
    model: SDUMC,
    settings: Namespace,
    train_set: Dump,
    valid_set: Dump,
    flows: Sequence[str],
    sampler: GlobalBatchSampler,
    ranks: Ranks,
) -> None:
    """Log what a run is about."""
    size, counts = sum(p.numel() for p in model.parameters()), [len(s.utterances) for s in (train_set, valid_set)]
    log.info("%d parameters; %d train and %d valid utterances", size, *counts)
    if len(shares := train_shares(settings, train_set)) > 1:
        for line in shares_in_words(shares):
            log.info("%s", line)
    log.info("labels from %s", train_set.scale.named_ends)
    chosen = " and ".join(valid_conditions(flows, valid_set))
    names = " and ".join(flows) + (" flows" if len(flows) > 1 else " flow alone")
    log.info("%s, of %s; the epoch is chosen under %s", names, in_words(train_set.features), chosen)
    passes = f" ({sampler.passes} passes over the train set)" if sampler.passes > 1 else ""
    log.info("%d steps an epoch%s on %d x %s", len(sampler), passes, ranks.size, ranks.device)


def report_epoch(record: dict[str, Any], board: SummaryWriter, epochs: int, best_epoch: int, seconds: float) -> None:
    """A line in the log and points on TensorBoard's curves."""
    epoch = record["epoch"]
    for path, value in numbers(record):
        board.add_scalar(path, value, epoch)
    board.flush()
    maes = "  ".join(f"{condition} {s['mae']:.4f}" for condition, s in record["valid"].items())
    best = "  best" if epoch == best_epoch else ""
    loss = record["train"]["loss"]
    log.info("epoch %3d/%d  loss %.4f  valid MAE: %s%s  (%.1f s)", epoch, epochs, loss, maes, best, seconds)


def finish(
    state: TrainingState,
    model: SDUMC,
    exp_dir: Path,
    train_set: Dump,
    valid_set: Dump,
    flows: Sequence[str],
    ranks: Ranks,
) -> None:
    """Choose between the best epoch and the average of the best ones; log that, and what speaks against the run."""
    if ranks.is_main:
        average_best(exp_dir, state.best_epochs)
    barrier(ranks)
    load_into(model, exp_dir / AVERAGED)
    scores = evaluate(model, valid_set, valid_conditions(flows, valid_set), ranks)
    if not ranks.is_main:
        return
    mae, epochs = choose(exp_dir, state.ranking, mean_mae(scores))
    best, epoch = state.ranking[0]
    what, weights = f"epoch {epoch} is", exp_dir / VALID_BEST
    if len(epochs) > 1:
        what = f"the average of the best {len(epochs)} epochs on valid ({', '.join(map(str, epochs))}) is"
    log.info("done: %s taken, mean MAE on valid %.4f (epoch %d alone: %.4f) -> %s", what, mae, epoch, best, weights)
    for doubt in doubts(epoch, state.epoch - 1, best, median_mae(train_set.labels.values(), valid_set.labels.values())):
        log.warning(doubt)


def numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """A nested record's finite numbers by path, ``valid/full/mae``."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}{name}", value


_DIM, _BATCH, _FRAMES = 8, 4, 3  # where the settings leave a dimension to the dump; and the size of the batch of noise


def dry_run(settings: Namespace) -> None:
    """Build the model, run one step on noise, print the number of parameters and the terms of the objective."""
    dims = {m: getattr(settings, f"{m}_dim") or _DIM for m in MODALITIES}
    model = SDUMC(model_config(Namespace(**{**vars(settings), **{f"{m}_dim": dim for m, dim in dims.items()}})))
    dims["text_sim"] = dims["text"]
    features = {name: torch.randn(_BATCH, _FRAMES, dim) for name, dim in dims.items()}
    lengths = {name: torch.full((_BATCH,), _FRAMES) for name in dims}
    flows = (COMPLETE, MISSING) if settings.flows == "both" else (settings.flows,)
    outputs = {flow: out.loss_inputs() for flow, out in model(features, lengths, flows).items()}
    labels, has_text = torch.linspace(-1, 2, _BATCH), torch.ones(_BATCH, dtype=torch.bool)
    terms = sdumc_objective(outputs.get(COMPLETE), outputs.get(MISSING), labels, has_text, objective_weights(settings))
    terms["loss"].backward()
    print(f"settings are sound: {sum(p.numel() for p in model.parameters())} parameters, terms {', '.join(terms)}")
