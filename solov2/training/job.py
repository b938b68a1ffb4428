"""A training run before it starts: its checks, the data that is found for it, and the settings proposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from solov2 import distributed
from solov2.checkpoint import Checkpoint
from solov2.config import DEFAULT_MODEL, Config, load_config, override_config
from solov2.data.build import locate_data, segments_of, split_paths
from solov2.outputs import check_cleared_folder
from solov2.proposal.files import check_data_folder, data_folder, file_contents
from solov2.proposal.find import (
    FoundData,
    absolute_paths,
    class_names,
    find_data,
    folder_to_search,
    read_datasets,
    user_datasets,
)
from solov2.proposal.propose import data_facts, proposal_lines
from solov2.proposal.propose import propose as propose_settings
from solov2.training.folder import check_folder, is_restart
from solov2.training.resume import check_resumable
from solov2.weights import apply_weight_metadata, find_checkpoint


@dataclass
class Job:
    """A run that has passed every check that needs neither data nor a device."""

    config: Config
    folder: Path
    initial_weights: Checkpoint | None  # to fine-tune
    resume_from: Checkpoint | None
    clear_folder: bool = False
    data_folder: Path | None = None  # for `files`
    files: dict[str, str] = field(default_factory=dict)  # name -> content, of data in another layout
    notes: list[str] = field(default_factory=list)  # what was found and is proposed
    sources: dict[str, Dataset] = field(default_factory=dict)  # "train", "val" -> a user's dataset, with the images


def prepare_job(
    name_or_config: str | Path | Config | None,
    *,
    data: str | Path | Dataset | Mapping[str, str | Path | Dataset] | None = None,
    weights: str | Path | Checkpoint | None = None,
    output: str | Path | None = None,
    resume: bool | str | Path | None = False,
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
    propose: bool = False,
    processes: int | None = None,
    writes: bool = True,
) -> Job:
    """Check everything about a run that can be checked before data is read and processes are started.

    The arguments are those of `train`; `overrides` also accepts keys of the form "section.key". With `writes` False (a
    dry run) the run folder is not checked. `processes` is the number that will train; default: those of the launch.

    Raises:
        InputError: the model name, a setting, the run folder, the weights or the checkpoint is invalid.
    """
    sources = user_datasets(data)
    located: Any = None if sources else data

    def override(config: Config) -> Config:
        return locate_data(override_config(config, overrides or {}), located, chosen=overrides or {})

    resume = False if resume is None else resume
    recipe = _load(name_or_config or DEFAULT_MODEL)
    config = override(recipe)
    folder = Path(output or f"runs/{config.name}")
    checkpoint = check_folder(folder, resume, overwrite) if writes or resume is not False else None
    if checkpoint is not None and name_or_config is None:
        stored = checkpoint.configuration()
        config = config if stored is None else override(stored)
    search = folder_to_search(config, located)
    if checkpoint is not None:
        if (search or sources) and (stored := checkpoint.configuration()) is not None:
            config, search = override_config(stored, overrides or {}), None  # the data and the proposal of its start
        check_resumable(config, checkpoint)
    initial = find_checkpoint(weights, config) if checkpoint is None else None
    source = checkpoint or initial  # a resumed run keeps the metadata of the weights it started from
    if source is not None:
        config = replace(config, model=apply_weight_metadata(config.model, source))
    # --overwrite applies only to the first start of a launch, and never deletes the checkpoint to resume from.
    inside = checkpoint is not None and Path(checkpoint.source).parent.resolve() == folder.resolve()
    clear = overwrite and not inside and not is_restart(folder)
    if clear and writes:
        inputs = [path for split in splits_of(config) for path in split_paths(config.data, split)]
        inputs += [path for split in splits_of(config) if (path := segments_of(config.data, split)) is not None]
        if source is not None:
            inputs.append(Path(source.source))
        if isinstance(name_or_config, (str, Path)) and Path(name_or_config).is_file():  # and not the name of a model
            inputs.append(Path(name_or_config))
        check_cleared_folder(folder, inputs)
    job = Job(config, folder, initial, checkpoint, clear, sources=sources)
    place, found = data_folder(folder), None
    if search is not None:
        found = find_data(search)
    elif sources and checkpoint is None:
        check_data_folder(place)  # before every item is asked for
        found = read_datasets(sources, place, config, divide=not isinstance(data, Mapping))
    if found is None:
        return job
    check_data_folder(place)
    if clear and writes:
        check_cleared_folder(folder, [*found.files.values(), *(() if sources else found.images.values())])
    job.data_folder, job.notes = place, list(found.notes)
    paths = {f"data.{key}": path for key, path in absolute_paths(found, place).items()}
    job.config = override_config(config, {"data.shapes": False, **paths})
    if propose:
        job.notes += _use_proposal(job, found, recipe, overrides or {}, processes or distributed.launched_world_size())
    written = {part: content for part, content in found.contents.items() if part not in found.files}
    base = name_or_config or DEFAULT_MODEL if propose else None  # of proposal.yaml
    job.files = file_contents(written, None if isinstance(base, Config) else base, recipe, job.config)
    return job


def _use_proposal(
    job: Job, found: FoundData, recipe: Config, overrides: Mapping[str, Any], processes: int
) -> list[str]:
    """Give a job the settings proposed for its data; returns the lines that state them."""
    facts = data_facts(found.contents, job.config)
    source = None if job.initial_weights is None else job.initial_weights.source
    job.config, changes = propose_settings(
        recipe, job.config, facts, chosen=overrides, weights=source is not None, processes=processes
    )
    return proposal_lines(job.config, changes, weights=source, classes=class_names(found), processes=processes)


def splits_of(config: Config) -> tuple[str, ...]:
    """The splits that a run reads: "train", and "val" if it evaluates."""
    return ("train", "val") if config.train.evaluate_every else ("train",)


def _load(name_or_config: str | Path | Config) -> Config:
    return name_or_config if isinstance(name_or_config, Config) else load_config(name_or_config)
