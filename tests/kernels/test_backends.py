"""Which backend is chosen, and what happens when one is missing or wrong."""

import subprocess
import sys

import pytest
import torch
from _helpers import problem

import opsd_kernels
from opsd_kernels import backends, native
from opsd_kernels.rows import native_backend, torch_backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    backends.self_check.cache_clear()
    backends._available.cache_clear()
    yield
    backends.self_check.cache_clear()
    backends._available.cache_clear()


def test_auto_takes_native_where_it_works():
    there, _ = native_backend.available()
    assert backends.chosen("auto", CPU, torch.float32) == ("native" if there else "torch")
    assert backends.chosen("auto", CPU, torch.float64) == "torch"
    assert backends.chosen("auto", CPU, torch.float32, "group") == "torch"


def test_a_missing_backend_gives_way_to_the_next(monkeypatch):
    monkeypatch.setattr(native_backend, "available", lambda device: (False, "no compiler"))
    assert backends.chosen("auto", CPU, torch.float32) == "torch"
    with pytest.raises(ValueError, match="backend must be one that can be used here, got 'native': no compiler"):
        backends.chosen("native", CPU, torch.float32)


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_backend_that_fails_its_self_check_is_not_used(monkeypatch, fault):
    monkeypatch.setattr(native_backend, "available", lambda device: (True, ""))

    def broken(student, teacher, objective, *, targets, table, dz, row_scale):
        if fault == "raises":
            raise RuntimeError("bad instruction")
        table.zero_()
        dz.zero_()

    monkeypatch.setattr(native_backend, "divergence_rows", broken)
    assert backends.chosen("auto", CPU, torch.float32) == "torch"
    assert "self-check" in backends.unfit("native", CPU, torch.float32)


@pytest.mark.parametrize("fault", ["the last columns", "narrow dz", "dz in place", "sure tokens"])
def test_the_self_check_reaches_what_is_used(monkeypatch, fault):
    """A backend that is wrong in one of the forms that a row pass has, and right in all others."""
    right = torch_backend.divergence_rows

    def broken(student, teacher, objective, *, targets, table, dz, row_scale):
        sure = student.amax(-1) > 24
        right(student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale)
        if fault == "the last columns":
            dz[:, 4096:] *= 1.1
        elif fault == "sure tokens":
            dz[sure] *= 1.1
        elif (fault == "narrow dz") == (dz.dtype == torch.bfloat16):
            dz *= 1.1

    monkeypatch.setattr(native_backend, "available", lambda device: (True, ""))
    monkeypatch.setattr(native_backend, "divergence_rows", broken)
    assert "self-check" in backends.unfit("native", CPU, torch.float32)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_nor_is_one_whose_products_are_wrong(monkeypatch, value):
    monkeypatch.setattr(native, "outruns_torch", lambda: (True, ""))
    monkeypatch.setattr(native, "multiply", lambda out, a, b, *, add=False: out.fill_(value))
    assert backends.chosen("auto", CPU, torch.float32) == "torch"


def test_asking_for_what_cannot_be_is_an_error_with_the_reason():
    student, teacher, weight = problem(3, 4, 9)
    with pytest.raises(ValueError, match="'native': it computes in float32"):
        opsd_kernels.jsd_loss(student, teacher, weight, backend="native")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend must be one that can be used here, got 'triton'"):
            opsd_kernels.jsd_loss(student.float(), teacher, weight, backend="triton")


def test_the_command_prints_the_choice_and_its_self_check():
    done = subprocess.run(
        [sys.executable, "-m", "opsd_kernels"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "backend " in done.stdout
    assert "torch: works" in done.stdout
    assert f"torch {torch.__version__.split('+')[0]}" in done.stdout


@pytest.mark.parametrize("failures", [1, 2, 50])
def test_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch, failures):
    from opsd_kernels import fused_linear

    student, teacher, weight = problem(16, 4, 200)
    want = opsd_kernels.jsd_loss(student, teacher, weight)
    sizes, left = [], [failures]
    sweep = fused_linear._Sweep._sweep

    def failing(self, plan, *buffers):
        sizes.append(plan.rows)
        if left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError("no memory")
        return sweep(self, plan, *buffers)

    monkeypatch.setattr(fused_linear._Sweep, "_sweep", failing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    if failures == 50:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            opsd_kernels.jsd_loss(student, teacher, weight)
        assert sizes == [16, 8, 4, 2, 1]
    else:
        assert opsd_kernels.jsd_loss(student, teacher, weight).item() == pytest.approx(want.item(), rel=1e-12)
        assert sizes == [16, 8, 4][: failures + 1]
