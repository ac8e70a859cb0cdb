"""Mutation tests of the verifier: every planted fault is caught and named where it shows first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from verify_faults import FAULTS
from verify_plant import report_of

from minibeit.verify.report_text import verdict


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught_named_and_explained(fault):
    report = report_of(fault)
    assert not report.ok
    assert report.guilty is not None
    assert report.guilty.name == fault.guilty
    assert fault.says in report.guilty.note
    assert fault.guilty in verdict(report)
    before = [row for row in report.rows[: report.rows.index(report.guilty)]]
    assert all(row.ok for row in before)


def test_there_are_many_kinds():
    assert len(FAULTS) >= 40
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.task for fault in FAULTS} == {
        *("image_classification", "masked_image_modeling", "semantic_segmentation", "backbone")
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_faults_are_caught_on_other_weights(seed):
    for fault in FAULTS:
        guilty = report_of(fault, seed).guilty
        assert guilty is not None, (seed, fault.name)
        assert guilty.name == fault.guilty, (seed, fault.name, guilty.name, guilty.note)


@pytest.mark.live
def test_faults_are_caught_beside_pytorch():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from minibeit.verify.torch_runner import torch_source

    for fault in FAULTS:
        if fault.name == "positions shifted by one":  # transformers cannot resize the positions of 3x2 patches
            with pytest.raises(ValueError, match="transformers cannot run this model"):
                report_of(fault, yardstick=torch_source)
            continue
        # transformers reads the bias tables of grids that are not square in its own way
        square = dict(image_size=32) if fault.task == "semantic_segmentation" else dict(compat="transformers")
        square |= fault.settings or {}
        report = report_of(replace(fault, settings=square), yardstick=torch_source)
        assert report.guilty is not None, fault.name
        guilty = fault.guilty.replace("pools.1", "pools.2")  # on 4x4 cells those of 2x2 do not overlap anyway
        assert report.guilty.name == guilty, (fault.name, report.guilty.name, report.guilty.note)
        assert report.yardstick.startswith("PyTorch")
