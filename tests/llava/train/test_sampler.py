import json
from pathlib import Path

import pytest
import torch

from llava.train.sampler import LengthGroupedSampler, split_to_even_chunks

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/upstream_golden.json").read_text())
MODALITY = GOLDEN["modality_sampler"]


def sampler(lengths, **kwargs):
    return LengthGroupedSampler(MODALITY["batch_size"], MODALITY["world_size"], lengths, **kwargs)


def test_the_orders_are_upstreams():
    torch.manual_seed(MODALITY["torch_seed"])
    grouped = sampler(MODALITY["lengths"], group_by_modality=True)
    assert list(grouped) == MODALITY["indices"]
    assert len(grouped) == len(MODALITY["lengths"])
    torch.manual_seed(MODALITY["torch_seed"])
    assert list(sampler(GOLDEN["length_sampler"]["lengths"])) == GOLDEN["length_sampler"]["indices"]


def test_chunks_are_even():
    assert split_to_even_chunks([0, 1, 2, 3], [9, 7, 3, 1], 2) == GOLDEN["split_to_even_chunks"]
    assert split_to_even_chunks([0, 1, 2], [9, 7, 3], 2) == [[0, 2], [1]]


@pytest.mark.parametrize("by_modality", [False, True])
@pytest.mark.parametrize("lengths", [[3, 1, 2], [-3, -1, -2], list(range(1, 40)), [5, -1, 4], []])
def test_every_sample_comes_once(lengths, by_modality):
    grouped = sampler(lengths, group_by_modality=by_modality)
    assert sorted(grouped) == list(range(len(lengths)))


def test_a_generator_alone_decides():
    lengths = [(-1) ** i * (i + 1) for i in range(50)]

    def order(global_seed):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(3)
        return list(sampler(lengths, generator=generator, group_by_modality=True))

    # Upstream draws within a modality from the global generator even when one is given.
    assert order(0) == order(1)


def test_megabatches_are_of_one_kind():
    lengths = [5] * 9 + [-5] * 9
    torch.manual_seed(0)
    order = list(sampler(lengths, group_by_modality=True))
    kinds = [{lengths[i] > 0 for i in order[at : at + 4]} for at in range(0, 16, 4)]
    assert all(len(kind) == 1 for kind in kinds)
