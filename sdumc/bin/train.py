"""Train SDUMC. One process per rank; start several with utils/ranks.py, torchrun or srun. Reads top to bottom."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from sdumc.cli import log, run, setup_logging
from sdumc.conditions import COMPLETE, MISSING, MODALITIES, VALID_CONDITIONS
from sdumc.errors import EXIT_REQUEUE, UserError
from sdumc.processes import die_with
from sdumc.training.settings import get_parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    stop = SignalFlag(signal.SIGTERM, signal.SIGUSR1)  # first of all: a signal while this starts must not end it
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's agent leaves its ranks behind when it is killed
        die_with(os.getppid())
    # Seeds and thread counts come first, torch after them: cuBLAS reads this once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from sdumc.data.dataset import UtteranceDataset
    from sdumc.data.loader import BatchLoader
    from sdumc.data.sampler import GlobalBatchSampler
    from sdumc.files import json_ready, write_text
    from sdumc.losses.objective import sdumc_objective
    from sdumc.model.network import SDUMC
    from sdumc.training import checkpoint as ckpt
    from sdumc.training import settings as st
    from sdumc.training.data import drop_modalities, load_sets, model_inputs, set_normalisation
    from sdumc.training.distributed import (
        barrier,
        gather_objects,
        gather_rows,
        join,
        leave,
        sum_gradients,
    )
    from sdumc.training.evaluation import evaluate

    if args.dry_run:
        return dry_run(args)
    for name in ("train_dir", "valid_dir", "exp_dir"):
        if not getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is not given")

    # --- ranks, data, model -------------------------------------------------------------------------------------------
    ranks = join(args.device)
    exp_dir = Path(args.exp_dir)
    setup_logging(args.verbose, f"[rank {ranks.rank}] " if ranks.size > 1 else "")
    if ranks.is_main:
        exp_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(exp_dir)  # noqa: F841 (held until this process ends)
        log_to(exp_dir / "train.log")
    else:
        log.setLevel(logging.WARNING)
    train, valid, names = load_sets(args)  # fills in the dimensions that the settings leave to the dump
    flows = (COMPLETE, MISSING) if args.flows == "both" else (COMPLETE,)

    torch.manual_seed(args.seed)  # the same weights on every rank
    model = SDUMC(st.model_config(args)).to(ranks.device)
    if args.normalise_features:
        set_normalisation(model, train)
    network = torch.compile(model, dynamic=True) if args.compile else model
    optimiser = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    weights = st.objective_weights(args)
    torch.manual_seed(args.seed + 1000 * (ranks.rank + 1))  # dropout of its own on every rank

    dataset = UtteranceDataset(train, names)
    sampler = GlobalBatchSampler(
        dataset.frames,
        args.batch_size,
        args.batch_frames or None,
        seed=args.seed,
        world_size=ranks.size,
        rank=ranks.rank,
    )
    loader = BatchLoader(dataset, sampler, args.num_workers, pin_memory=ranks.device.type == "cuda")
    best = ckpt.BestModels(exp_dir, args.average_best)

    # --- resume -------------------------------------------------------------------------------------------------------
    epoch, batches_done, step, history, sums = 1, 0, 0, [], {}
    settings = {**st.as_dict(args), "train_utterances": ckpt.settings_hash(train.labels)}
    state = ckpt.load_checkpoint(exp_dir / ckpt.CHECKPOINT)
    if state is not None:
        if changed := st.differences(state["settings"], settings):
            raise UserError(
                f"{exp_dir}: its checkpoint was made with other settings: {'; '.join(changed)}. Go on with the old "
                "ones, or give another --exp-dir (run.sh: --exp-tag), or remove the folder"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        epoch, batches_done, step = state["epoch"], state["batches_done"], state["step"]
        history, sums, best.ranking = state["history"], state["sums"], [tuple(entry) for entry in state["ranking"]]
        if len(state["rng"]) == ranks.size:
            set_rng(state["rng"][ranks.rank], ranks.device)
        else:
            log.warning("checkpoint of %d ranks goes on with %d: other dropout", len(state["rng"]), ranks.size)
        log.info("resuming at epoch %d, step %d", epoch, step)
    elif ranks.is_main:
        parameters = sum(p.numel() for p in model.parameters())
        log.info("%d parameters; %d train and %d valid utterances", parameters, len(dataset), len(valid.utterances))
        log.info("%d steps an epoch on %d x %s", len(sampler), ranks.size, ranks.device)
    if ranks.is_main:
        st.write_config(exp_dir, args)
        write_extractors(exp_dir, train)
        board = SummaryWriter(str(exp_dir / "tensorboard"), purge_step=epoch if state else None)
    else:
        board = None

    def save(epoch: int, batches_done: int) -> None:
        """Make all that the run is now safe on disk; every rank takes part."""
        rng = gather_objects(get_rng(ranks.device), ranks)
        if ranks.is_main:
            ckpt.save_checkpoint(
                exp_dir / ckpt.CHECKPOINT,
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "epoch": epoch,
                    "batches_done": batches_done,
                    "step": step,
                    "history": history,
                    "sums": sums,
                    "ranking": [list(entry) for entry in best.ranking],
                    "rng": rng,
                    "settings": settings,
                },
            )
            write_text(exp_dir / "metrics.jsonl", "".join(json.dumps(json_ready(record)) + "\n" for record in history))
            best.tidy()
        barrier(ranks)

    if ranks.is_main and state is not None:
        best.tidy()

    # --- epochs -------------------------------------------------------------------------------------------------------
    while epoch <= args.epochs:
        started = time.monotonic()
        for group in optimiser.param_groups:
            group["lr"] = st.learning_rate(args, epoch)
        sampler.set_epoch(epoch)
        sampler.start_batch = batches_done
        model.train()
        for batch in loader:
            total = len(sampler.global_batch(batches_done))
            batch = batch.to(ranks.device, non_blocking=True)
            optimiser.zero_grad(set_to_none=True)

            # Each flow's outputs for this rank's rows, then for the whole global batch.
            gathered: dict[str, dict] = {}
            if len(batch):
                features, lengths = model_inputs(batch, args.missing_text)
                lengths = drop_modalities(lengths, args.modality_dropout)
                with autocast(args.precision, ranks.device):
                    outputs = network(features, lengths, flows)
                local = {f: outputs[f].loss_inputs() for f in flows}
                nobody = torch.zeros(len(batch), dtype=torch.bool, device=ranks.device)
                has_text = lengths["text"] > 0 if "text" in lengths else nobody
            else:  # fewer utterances than ranks: take part in the exchange with nothing
                local = {f: empty_loss_tensors(model, ranks.device) for f in flows}
                has_text = torch.zeros(0, dtype=torch.bool, device=ranks.device)
            for f in flows:
                gathered[f] = {name: gather_rows(x.float(), total, ranks) for name, x in local[f].items()}
            labels = gather_rows(batch.labels.to(ranks.device), total, ranks)
            has_text = gather_rows(has_text.to(torch.uint8), total, ranks).bool()

            terms = sdumc_objective(gathered.get(COMPLETE), gathered.get(MISSING), labels, has_text, weights)
            if not bool(torch.isfinite(terms["loss"])):
                ids = [dataset.dump.utterances[i] for i in sampler.global_batch(batches_done)]
                values = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
                raise UserError(
                    f"epoch {epoch}, step {step + 1}: the loss is not finite ({values}). Utterances of the batch: "
                    f"{' '.join(ids)}. Look at their features, or lower --lr; the last checkpoint is sound"
                )
            if len(batch):
                terms["loss"].backward()
            stopping = sum_gradients(model.parameters(), stop.raised, ranks)
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimiser.step()
            step, batches_done = step + 1, batches_done + 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * total
            if stopping:
                save(epoch, batches_done)
                log.info("stopped by a signal at step %d; run the same command again to go on", step)
                leave(ranks)
                return EXIT_REQUEUE
            if args.save_every and step % args.save_every == 0 and batches_done < len(sampler):
                save(epoch, batches_done)

        # --- validate, record, save -----------------------------------------------------------------------------------
        scores = evaluate(model, valid, [VALID_CONDITIONS[flow] for flow in flows], ranks)
        choice = sum(s["mae"] for s in scores.values()) / len(scores)
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "lr": st.learning_rate(args, epoch),
            "train": {name: value / len(dataset) for name, value in sums.items()},
            "valid": scores,
            "choice": choice,
        }
        is_best = False
        if board is not None:
            history.append(record)
            is_best = best.offer(choice, epoch, model)
            for path, value in flatten(record):
                board.add_scalar(path, value, epoch)
            board.flush()
            maes = "  ".join(f"{c} {s['mae']:.4f}" for c, s in scores.items())
            log.info(
                "epoch %3d/%d  loss %.4f  valid MAE: %s%s  (%.1f s)",
                epoch,
                args.epochs,
                record["train"]["loss"],
                maes,
                "  best" if is_best else "",
                time.monotonic() - started,
            )
        epoch, batches_done, sums = epoch + 1, 0, {}
        save(epoch, batches_done)
        if any(gather_objects(stop.raised, ranks)) and epoch <= args.epochs:
            log.info("stopped by a signal after epoch %d; run the same command again to go on", epoch - 1)
            leave(ranks)
            return EXIT_REQUEUE

    # --- the end ------------------------------------------------------------------------------------------------------
    if board is not None:
        best.average()
        board.close()
        lowest, chosen = best.ranking[0]
        log.info("done: epoch %d is best on valid (mean MAE %.4f) -> %s", chosen, lowest, exp_dir / ckpt.VALID_BEST)
    leave(ranks)
    return 0


class SignalFlag:
    """Remember that a signal came, for the loop to act on between two steps."""

    def __init__(self, *signals: int):
        self.raised = False
        for number in signals:
            signal.signal(number, self._raise)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # utils/ranks.py holds SIGUSR1 back until now

    def _raise(self, number: int, frame) -> None:
        self.raised = True


def lock_folder(exp_dir: Path, patience: float = 60.0) -> IO | None:
    """Hold ``exp_dir`` for this run; the lock ends with the process, however that ends.

    A run whose recipe was killed saves its state before it goes, so the next one waits a little.

    Raises:
        UserError: another training still works there after ``patience`` seconds.
    """
    f = open(exp_dir / ".lock", "a")  # noqa: SIM115 (held)
    deadline, said = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return f
        except BlockingIOError:
            if time.monotonic() > deadline:
                f.close()
                raise UserError(f"{exp_dir}: another training works in this folder; wait for it or stop it") from None
            if not said:
                log.info("%s: another training works here; waiting for it to end", exp_dir)
                said = True
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return f


def log_to(path: Path) -> None:
    """Log to a file too; a run that goes on appends."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.getLogger().handlers[0].formatter)
    logging.getLogger().addHandler(handler)


def empty_loss_tensors(model, device) -> dict:
    """The same tensors for no utterance at all."""
    import torch

    c = model.config
    shapes = {"prediction": (0,), "utterance": (0, c.content_dim), "contrast": (0, 64)}
    if c.fusion == "umca":
        shapes.update(text_query=(0, c.dim), text_content=(0, 7, c.content_dim))
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


def autocast(precision: str, device):
    """bf16 matrix products where asked for; sums and losses stay in float32."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def get_rng(device) -> list:
    """State of this rank's random generators."""
    import torch

    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_rng(states: list, device) -> None:
    """Continue this rank's random generators from a saved state."""
    import torch

    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def write_extractors(exp_dir: Path, dump) -> None:
    """Keep how the features were made beside the model: a new clip must be treated in the same way."""
    import yaml

    from sdumc.files import write_text

    meta = {name: feature.meta for name, feature in dump.features.items() if feature.meta}
    write_text(exp_dir / "extractors.yaml", yaml.safe_dump(meta, sort_keys=True) if meta else "{}\n")


def flatten(record: dict, prefix: str = ""):
    """A nested record as (path, number) pairs for TensorBoard."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}{name}", value


def dry_run(args) -> int:
    """Check the settings without data: build the model, run one step on noise, print its size."""
    import torch

    from sdumc.losses.objective import sdumc_objective
    from sdumc.model.network import SDUMC
    from sdumc.training import settings as st

    config = st.model_config(args)
    dims = {m: getattr(config, f"{m}_dim") or 8 for m in MODALITIES}
    model = SDUMC(dataclasses.replace(config, audio_dim=dims["audio"], text_dim=dims["text"], video_dim=dims["video"]))
    dims["text_sim"] = dims["text"]
    features = {name: torch.randn(4, 3, d) for name, d in dims.items()}
    lengths = {name: torch.full((4,), 3) for name in dims}
    flows = (COMPLETE, MISSING) if args.flows == "both" else (COMPLETE,)
    outputs = {flow: out.loss_inputs() for flow, out in model(features, lengths, flows).items()}
    labels = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    terms = sdumc_objective(
        outputs[COMPLETE], outputs.get(MISSING), labels, torch.ones(4, dtype=torch.bool), st.objective_weights(args)
    )
    terms["loss"].backward()
    print(f"settings are sound: {sum(p.numel() for p in model.parameters())} parameters, terms {', '.join(terms)}")
    return 0


if __name__ == "__main__":
    run(main)
