"""The only training loop. Read it from `train` down; what is learned is the objective's business, not its.

All counters are integers that a checkpoint keeps: `step` counts optimizer steps, `consumed` the training samples that
all processes have taken from each bucket. Data, noise and learning rate are functions of them, so a resumed run repeats
nothing, skips nothing, and ends in the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutoscope.build import build_encoder, build_trainee, model_io
from mutoscope.contradictions import validate
from mutoscope.data.buckets import Plan, iterate_once
from mutoscope.data.dataset import Clips, list_and_look
from mutoscope.data.flying_mnist import Split
from mutoscope.encoder import Encoder, Source, open_source
from mutoscope.export import save_trained
from mutoscope.models.ulysses import share_sequence
from mutoscope.pictures import like, write_grid
from mutoscope.randomness import Draw, seed_of
from mutoscope.recipe import Recipe
from mutoscope.report import write_report
from mutoscope.run import Run
from mutoscope.sample import Generator, inference, preview
from mutoscope.sample_cogvideox import Wanted, draw_wanted, read_wanted
from mutoscope.training.checkpoint import newest_checkpoint
from mutoscope.training.cpu_memory import keep_freed_memory
from mutoscope.training.deepspeed import DeepSpeedState
from mutoscope.training.engine import Engine
from mutoscope.training.log import Log
from mutoscope.training.offload import check_blocks, check_offload, place
from mutoscope.training.optimizers import cast_trained
from mutoscope.training.quantize import check_quantization, quantize_frozen
from mutoscope.training.quarantine import Quarantine
from mutoscope.training.saver import Saver
from mutoscope.training.signals import StopFlag, Stopped, stopping_softly
from mutoscope.training.state import TrainState, build_state
from mutoscope.training.watchdog import Watchdog
from mutoscope.types import Loss
from mutoscope.workers import worker_context

State = TrainState | DeepSpeedState
VALIDATION_CLIPS = 64
"""Clips of the val split, the first by id, that the validation loss is taken over."""


def train(recipe: Recipe, out: Path) -> Run:
    """Train a recipe in the run directory `out`, from where an earlier run of it stopped.

    Raises ValueError for whatever is wrong with the recipe, before anything expensive; Stopped after SIGTERM or
    SIGINT, with a checkpoint written; RuntimeError after too many non-finite steps in a row.
    """
    recipe = recipe.model.complete(recipe)
    validate(recipe)
    engine = Engine.start(recipe.parallel)
    if engine.device.type == "cpu":
        keep_freed_memory()
    run = Run(out)
    try:
        check_offload(recipe, engine.device)
        if recipe.activation_checkpointing or recipe.compile or engine.context:  # offload_blocks goes with the first
            with torch.device("meta"):
                shapes = recipe.model.build(model_io(recipe))
            check_blocks(shapes, recipe)
            share_sequence(shapes, engine.context)
        if recipe.quantize != "none":
            check_quantization(recipe.quantize, engine.device, recipe.compile)
        with run.locked() if engine.main else nullcontext(), stopping_softly() as stop:
            with engine.main_first():
                if engine.main:
                    run.prepare(recipe)
            with (
                Log(run, out.name, recipe.steps, recipe.wandb, enabled=engine.main) as log,
                Saver(run.checkpoints, engine, recipe.keep_last, recipe.keep_every) as saver,
                Watchdog(engine, run.folder) as watchdog,
            ):
                _train(recipe, run, engine, log, saver, watchdog, stop)
    finally:
        engine.stop()
    return run


def _train(
    recipe: Recipe, run: Run, engine: Engine, log: Log, saver: Saver, watchdog: Watchdog, stop: StopFlag
) -> None:
    # 1. Build. Order of initialisation: a checkpoint of this run > recipe.init_from > fresh weights
    encoder = build_encoder(recipe, engine.device)
    wanted = read_wanted(recipe, engine.device) if recipe.validation_file is not None else None
    sources = _open_sources(recipe, encoder, engine, log)
    quarantine = Quarantine(run, recipe.data.max_broken, engine, log)
    if engine.main:
        run.save_latent_stats(encoder.stats)
    model = build_trainee(recipe, encoder.spec)
    cast_trained(model, recipe.weights)
    if recipe.quantize != "none":
        quantize_frozen(model, recipe.quantize, engine.device)
    place(model, recipe, engine.device, move=not engine.sharded)
    state = build_state(model, recipe, engine)
    plan = Plan(pools=sources["train"].pools(recipe), seed=recipe.seed, accumulate=recipe.accumulate,
                rank=engine.data_rank, world=engine.data_world)  # fmt: skip
    newest = newest_checkpoint(run.checkpoints, engine, log.say)
    if newest is not None:
        numbers = state.load(newest)
        log.say(f"resuming from {newest}")
        if numbers["clips"] != len(sources["train"]):
            log.say(f"the data has changed: {numbers['clips']} train clips then, {len(sources['train'])} now")
        _check_batch(numbers, plan, log)
        state.consumed = tuple(numbers.get(f"consumed {pool.name}", 0) for pool in plan.pools)
    state.consumed = state.consumed or (0,) * len(plan.pools)
    engine.check_in_sync(model)
    clips = sources["train"].loader(plan.batches(state.consumed), recipe.data.workers)
    generator = Generator(recipe, model, encoder)

    # 2. What would fail at hour ten fails now
    log.start_at(state.step, sum(state.consumed))
    if state.step == 0:
        _validate(recipe, engine, state, sources["val"], encoder, log, due=True)
        _preview(recipe, run, engine, state, generator, sources["val"], wanted, due=True)

    # 3. Train
    bad_steps, first_step = 0, state.step
    while state.step < recipe.steps:
        watchdog.at(state.step, "waiting for clips")
        micro = [next(clips) for _ in range(recipe.accumulate)]
        samples = [sample for raw in micro for sample in raw.samples]
        if state.step == first_step:
            engine.check_apart(samples)
        engine.check_shared([i for raw in micro for i in raw.ids], samples)
        quarantine.add([b for raw in micro if isinstance(raw, Clips) for b in raw.broken], state.step + 1)
        watchdog.at(state.step, "in the forward and backward pass")
        losses = _forward_backward(recipe, engine, state, encoder, micro)
        watchdog.at(state.step, "taking the step")
        lr, norm = state.take_step(recipe.optim, recipe.steps)
        finite = math.isfinite(norm)  # the same on all processes: the norm is of the averaged gradients
        if not finite:
            suspects = _suspects(losses, engine)
            log.say(f"step {state.step}: the loss or its gradient is not finite; skipped. {suspects}")
        recipe.objective.after_step(model, engine.sum, skipped=not finite)
        bad_steps = 0 if finite else bad_steps + 1
        before, state.consumed = sum(state.consumed), plan.after(state.consumed)
        taken = sum(state.consumed)
        if taken // plan.epoch > before // plan.epoch:
            log.scalars(state.step, recipe.objective.after_epoch(model, before // plan.epoch, engine.sum))
        if finite:
            state.average()

        # 4. Log, validate, show, save, each on its schedule
        watchdog.at(state.step, "logging, evaluating or saving")
        last = state.step == recipe.steps
        stopping = engine.any(stop.signal_number != 0) or bad_steps >= recipe.optim.max_bad_steps
        if state.step % recipe.log_every == 0 or last:
            values = _mean_over_processes(losses, engine) | {"lr": lr, "grad_norm": norm}
            log.train(state.step, values | {"skipped": float(not finite)}, taken)
        _validate(recipe, engine, state, sources["val"], encoder, log, due=last)
        _preview(recipe, run, engine, state, generator, sources["val"], wanted, due=last)
        if state.step % recipe.save_every == 0 or last or stopping:
            numbers = {f"consumed {pool.name}": n for pool, n in zip(plan.pools, state.consumed, strict=True)}
            numbers |= {f"batch {pool.name}": plan.step_samples(b) for b, pool in enumerate(plan.pools)}
            numbers |= {"clips": len(sources["train"]), "world": plan.world}
            saver.save(state.step, state.tensors(), numbers)
            if last or stopping:
                saver.wait()
        if bad_steps >= recipe.optim.max_bad_steps:
            raise RuntimeError(f"{bad_steps} steps in a row were not finite; stopped. {_suspects(losses, engine)} "
                               "Lower optim.lr, or look at these clips.")  # fmt: skip
        if stopping and not last:
            raise Stopped(stop.signal_number, f"stopped at step {state.step}; the same command goes on from there")

    # 5. What the run is for
    with state.averaged(), state.whole():
        save_trained(model, recipe, run, write=engine.main)
    if engine.main:
        write_report(run.folder / "report.html", run.folder.name, {"Training": run})
        log.say(f"weights: {run.weights}; report: {run.folder / 'report.html'}")
    engine.barrier()


def _open_sources(recipe: Recipe, encoder: Encoder, engine: Engine, log: Log) -> dict[Split, Source]:
    """The clips to train and to validate on; what became of them goes to the log."""
    listing = None
    if recipe.data.workers:
        worker_context()  # which takes as long as the look at the clips
    if recipe.data.latents is None:
        with engine.main_first():  # process 0 looks at the files, the others at what it remembered of them
            listing = list_and_look(recipe.data, partial(log.ticker, "looking at clips"))
    sources: dict[Split, Source] = {split: open_source(recipe, encoder, split, listing) for split in ("train", "val")}
    for source in sources.values():
        for line in source.report():
            log.say(line)
    return sources


def _check_batch(numbers: dict[str, int], plan: Plan, log: Log) -> None:
    """Raise ValueError where an optimizer step sees another number of samples than before, unless there are other
    processes: then it is said."""
    for b, pool in enumerate(plan.pools):
        then, now = numbers.get(f"batch {pool.name}", plan.step_samples(b)), plan.step_samples(b)
        told = f"an optimizer step took {then} samples of {pool.name}, and would now take {now}"
        if then != now and numbers["world"] == plan.world:
            raise ValueError(f"{told}; batch_size × accumulate must be what it was")
        if then != now:
            log.say(f"{told}: {numbers['world']} processes, or groups of parallel.context, then, {plan.world} now. "
                    "To keep it, change batch_size or accumulate as well")  # fmt: skip


def _forward_backward(
    recipe: Recipe, engine: Engine, state: State, encoder: Encoder, clips: Sequence[Any]
) -> list[tuple[list[str], Loss]]:
    """The micro-steps of one optimizer step.

    Every micro-batch weighs alike and all have the same size, so the gradient is that of the mean over all samples.
    """
    state.trainee.train()
    # Dropout, where a model has it, is the one thing that draws from the global generator
    torch.manual_seed(seed_of(recipe.seed, "dropout", state.step, engine.rank))
    done = []
    for micro, raw in enumerate(clips):
        draw = Draw(recipe.seed, "train", raw.samples, engine.device)
        batch = replace(encoder.batch(raw, draw), gather=engine.gather_rows)
        with state.micro_step(last=micro == recipe.accumulate - 1):
            with torch.autocast(engine.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = recipe.objective.loss(state.trainee, batch, draw)
            state.backward(loss.total / recipe.accumulate)
        done.append((batch.ids, replace(loss, total=loss.total.detach())))  # lets go of the batch and of the graph
    return done


def _mean_over_processes(losses: list[tuple[list[str], Loss]], engine: Engine) -> dict[str, float]:
    rows = [{"loss": loss.total} | loss.parts for _, loss in losses]
    stacked = torch.stack([torch.stack([row[key].float() for row in rows]).mean() for key in rows[0]])
    return dict(zip(rows[0], engine.mean(stacked).tolist(), strict=True))


def _suspects(losses: list[tuple[list[str], Loss]], engine: Engine) -> str:
    """The clips of this step, on any process, whose own loss is not finite."""
    bad = [i for ids, loss in losses for i, x in zip(ids, loss.per_sample.tolist(), strict=True) if x - x != 0]
    bad = list(dict.fromkeys(engine.gather(bad)))
    return f"Clips with a non-finite loss: {', '.join(bad)}." if bad else "No single clip's loss is to blame."


def _validate(
    recipe: Recipe, engine: Engine, state: State, source: Source, encoder: Encoder, log: Log, due: bool
) -> None:
    """Log the averaged weights' loss over the val clips, with draws that are the same every time."""
    every = recipe.validate_every
    if not every or not (due or state.step % every == 0):
        return
    size = min(len(source), VALIDATION_CLIPS)
    if size < engine.data_world:
        raise ValueError(f"data: {size} val clips are too few for {engine.data_world} processes, or groups that share "
                         "their samples; recipe.validate_every = 0")  # fmt: skip
    totals: dict[str, Tensor] = {}
    count, rows = torch.zeros((), device=engine.device), torch.zeros(0, device=engine.device)
    state.model.eval()
    with torch.no_grad(), state.averaged():
        share = iterate_once(source.groups[:size], recipe.batch_size, engine.data_rank, engine.data_world)
        for raw, counts in engine.in_step(source.loader(share)):
            draw = Draw(recipe.seed, "validate", raw.samples, engine.device)
            batch = encoder.batch(raw, None)
            with torch.autocast(engine.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = recipe.objective.validation_loss(state.model, batch, draw)
            for key, value in ({"loss": loss.total} | loss.parts).items():
                totals[key] = totals.get(key, 0) + value.float() * len(batch.ids) * counts
            count += len(batch.ids) * counts
            if loss.rows is not None and counts:
                rows = rows if len(rows) else loss.rows.new_zeros(size, loss.rows.shape[1])
                rows[raw.samples] = loss.rows
    means = torch.stack(list(totals.values()))
    means = engine.sum(means) / engine.sum(count)
    figures = dict(zip(totals, means.tolist(), strict=True))
    if len(rows):
        figures |= {name: float(value) for name, value in recipe.objective.over_all(engine.sum(rows)).items()}
    log.scalars(state.step, {f"val_{name}": value for name, value in figures.items()})
    log.say(f"step {state.step}: validation loss {figures['loss']:.4f}")


def _preview(
    recipe: Recipe,
    run: Run,
    engine: Engine,
    state: State,
    generator: Generator,
    source: Source,
    wanted: Wanted | None,
    due: bool,
) -> None:
    """Write what the averaged weights draw: the rows of the validation file, divided over the copies of the model; or,
    without one, the conditions of the first val clips, by the first copy, below those clips themselves."""
    every = recipe.sample_every
    if not every or not (due or state.step % every == 0):
        return
    if wanted is not None:
        folder, share = run.samples / f"{state.step:08d}", (engine.replica, engine.replicas, engine.leads)
        with state.averaged(), inference(recipe, state.model):
            engine.at_hand(state.model, partial(draw_wanted, wanted, state.model, folder, *share))
        return engine.barrier()
    if engine.replica == 0:
        group = source.groups[0]  # samples are drawn at one shape; clips beside them are of one bucket
        shown = [i for i, g in enumerate(source.groups) if g == group][: recipe.num_samples]
        raw = next(iter(source.loader([[(i, i) for i in shown]])))
        with state.averaged():
            batch = generator.encoder.batch(raw, None)
            draw = Draw(recipe.seed, "preview", shown, engine.device)
            videos = engine.at_hand(state.model, partial(preview, generator, batch, draw))
        if engine.main:
            real = like(source.videos(shown), videos)
            write_grid(run.samples / f"{state.step:08d}", [list(real), list(videos)], recipe.data.fps or 8)
    engine.barrier()
