"""The clients' data sets in the resident driver's process, each checked whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from fed.clients.clients_yaml import ClientSpec, named
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.data import LazySupervisedDataset
from llava.train.session import Session
from llava.train.train import prepare


def load_clients_data(
    specs: Sequence[ClientSpec],
    data_args: DataArguments,
    client_args: Sequence[tuple[DataArguments, TrainingArguments]],
    session: Session,
) -> list[LazySupervisedDataset]:
    """Every client's data set, checked whole, with its features in the cache."""
    datasets = [
        _dataset(spec, data_args, own_data_args, session)
        for spec, (own_data_args, _) in zip(specs, client_args, strict=True)
    ]
    for spec, (_, args), dataset in zip(specs, client_args, datasets, strict=True):
        # The cache holds features of one processing of the pictures; another one goes without.
        ratio = session.sample_format.image_aspect_ratio
        same = dataset.sample_format.image_aspect_ratio == ratio
        cache = session.feature_cache if same else None
        with named(spec):
            prepare(dataset, f"client {spec.name}", cache, args.world_size)
    return datasets


def _dataset(
    spec: ClientSpec, data_args: DataArguments, own: DataArguments, session: Session
) -> LazySupervisedDataset:
    image_folder = spec.image_folder or data_args.image_folder
    sample_format = dataclasses.replace(
        session.sample_format, image_aspect_ratio=own.image_aspect_ratio
    )
    with named(spec):
        return LazySupervisedDataset(
            spec.data_path,
            session.tokenizer,
            dataclasses.replace(own, image_folder=image_folder),
            sample_format=sample_format,
        )


def pool(
    datasets: Sequence[LazySupervisedDataset], data_args: DataArguments, session: Session
) -> LazySupervisedDataset:
    """All clients' samples in one data set, under the command line's own arguments."""
    records = []
    for dataset in datasets:
        for i, record in enumerate(dataset.records):
            paths = [os.path.abspath(path) for path in dataset.paths(i)]
            records.append({**record, "image": paths} if paths else record)
    return LazySupervisedDataset(
        records, session.tokenizer, data_args, session.feature_cache, session.sample_format
    )
