"""csrc/: how it is built and found, and its matrix products against float64."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from _helpers import check_product, operands, relative

import opsd_kernels
from opsd_kernels import gemm, native

ROOT = Path(__file__).resolve().parents[2]
needs_library = pytest.mark.skipif(not native.available()[0], reason=f"no native library: {native.available()[1]}")


@needs_library
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (37, 101, 77), (8, 48, 512), (9, 49, 513), (130, 1600, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_any_shape_layout_and_dtype(shape, dtype):
    for a, b in operands(*shape, dtype):
        check_product(a, b)


@needs_library
@pytest.mark.parametrize("shape", [(1100, 60, 70), (20, 3200, 30), (40, 50, 1700)])
def test_products_beyond_one_block_in_each_dimension(shape):
    for a, b in operands(*shape):
        check_product(a, b)


@needs_library
@pytest.mark.parametrize("k", [512, 4096, 30_000])
def test_long_sums_lose_few_digits(k):
    (a, b), *_ = operands(16, 96, k)
    out, exact = torch.empty(16, 96), a.double() @ b.double()
    native.multiply(out, a, b)
    assert relative(out, exact) < 2.5e-7  # 4e-7 where 512 products are added one after the other


@needs_library
def test_products_do_not_depend_on_the_number_of_threads():
    (a, b), *_ = operands(300, 500, 700)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.empty(300, 500))
            native.multiply(results[-1], a, b)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_library
def test_products_leave_what_lies_between_rows_alone_and_keep_what_is_not_finite():
    a, b = torch.randn(5, 20), torch.randn(20, 9)
    a[1, 3], a[2, 4], b[7, 2] = torch.inf, torch.nan, -torch.inf
    wide = torch.full((5, 12), 7.0)
    native.multiply(wide[:, :9], a, b)
    torch.testing.assert_close(wide[:, :9], a @ b, equal_nan=True)
    assert (wide[:, 9:] == 7).all()
    for m, k, n in ((0, 3, 2), (3, 0, 2), (3, 2, 0)):
        out = torch.ones(m, n)
        native.multiply(out, torch.ones(m, k), torch.ones(k, n), add=True)
        assert (out == 1).all()
        native.multiply(out, torch.ones(m, k), torch.ones(k, n))
        assert torch.equal(out, torch.ones(m, k) @ torch.ones(k, n))


@needs_library
@pytest.mark.parametrize("k", [1, 64])  # element by element, and by vectors
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_halves_at_the_ends_of_their_range(dtype, k):
    info = torch.finfo(dtype)
    values = [
        info.max,
        info.min,
        info.tiny,
        info.smallest_normal / 4,
        -info.eps,
        torch.inf,
        -torch.inf,
        torch.nan,
        -1.0,
    ]
    column = torch.tensor(values).to(dtype).unsqueeze(1)
    for position in {0, k // 2, k - 1}:
        a = torch.zeros(len(values), k, dtype=dtype)
        a[:, position : position + 1] = column
        for x in (a, a.t().contiguous().t()):
            out = torch.empty(len(values), 50)
            native.multiply(out, x, torch.ones(k, 50))
            assert torch.equal(out.nan_to_num(7.0), column.float().expand(-1, 50).nan_to_num(7.0))
            assert torch.equal(out.isinf(), column.float().expand(-1, 50).isinf())


@needs_library
@pytest.mark.parametrize(
    ("out", "a", "b", "message"),
    [
        (torch.empty(2, 3), torch.empty(2, 4), torch.empty(5, 3), r"\(m, k\) and \(k, n\)"),
        (torch.empty(3, 2), torch.empty(2, 4), torch.empty(4, 3), r"out \(3, 2\)"),
        (torch.empty(2, 3, dtype=torch.float64), torch.empty(2, 4), torch.empty(4, 3), "out must be float32"),
        (torch.empty(3, 2).t(), torch.empty(2, 4), torch.empty(4, 3), "dense rows"),
        (torch.empty(2, 3), torch.empty(2, 4, dtype=torch.float64), torch.empty(4, 3), "float64"),
        (torch.empty(2, 3), torch.empty(2, 4, device="meta"), torch.empty(4, 3), "meta"),
    ],
)
def test_products_of_anything_else_are_refused(out, a, b, message):
    with pytest.raises(ValueError, match=message):
        native.multiply(out, a, b)


@needs_library
@pytest.mark.parametrize("scratch", [torch.empty(10), torch.empty(native.GEMM_SCRATCH_BYTES, device="meta")])
def test_memory_to_work_in_that_is_none_is_refused(scratch):
    with pytest.raises(ValueError, match="scratch must be"):
        native.multiply(torch.empty(2, 3), torch.empty(2, 4), torch.empty(4, 3), scratch=scratch)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_loss_takes_them_where_they_are_faster_and_is_the_same(monkeypatch, dtype, trainable):
    calls = []
    multiply = native.multiply

    def counted(out, a, b, **options):
        calls.append((*a.shape, b.shape[1]))
        multiply(out, a, b, **options)

    monkeypatch.setattr(native, "multiply", counted)
    g = torch.Generator().manual_seed(0)
    x, t, w = (torch.randn(*shape, generator=g).to(dtype) for shape in ((40, 32), (40, 32), (700, 32)))
    results = []
    for faster in (True, False):
        monkeypatch.setattr(native, "outruns_torch", lambda faster=faster: (faster, ""))
        leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_(trainable)
        loss = opsd_kernels.jsd_loss(leaf, t, weight, backend="native")
        loss.backward()
        results.append([loss, leaf.grad, *([weight.grad] if trainable else [])])
    products = [(80, 32, 700), (40, 700, 32), *([(700, 40, 32)] if trainable else [])]
    assert calls == products
    for own, torch_s in zip(*results, strict=True):
        torch.testing.assert_close(
            own.float(), torch_s.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
        )


def test_a_small_budget_a_type_or_another_backend_leaves_the_products_to_torch(monkeypatch):
    monkeypatch.setattr(native, "outruns_torch", lambda: (True, ""))
    cpu, enough = torch.device("cpu"), gemm.NATIVE_SHARE * native.GEMM_SCRATCH_BYTES
    assert gemm.Products("native", cpu, torch.float32, enough).native
    assert not gemm.Products("native", cpu, torch.float32, enough - 1).native
    assert not gemm.Products("torch", cpu, torch.float32, enough).native
    assert not gemm.Products("native", cpu, torch.float64, enough).native
    monkeypatch.setattr(torch, "get_num_threads", lambda: native.MOST_THREADS + 1)
    assert not gemm.Products("native", cpu, torch.float32, enough).native
    assert not gemm.Products("triton", torch.device("cuda"), torch.float32, enough).native


@needs_library
def test_the_scratch_memory_of_a_product_is_within_what_the_plan_counts():
    needed = native.loaded().opsd_gemm_scratch
    sizes = (1, 8, 500, 513, 1000, 1025, 1537, 5000, 262_144)
    largest = max(needed(m, n, k) for m in sizes for n in sizes for k in sizes)
    assert native.GEMM_SCRATCH_BYTES // 4 < largest <= native.GEMM_SCRATCH_BYTES


@pytest.mark.parametrize(
    ("vendor", "family", "model", "lanes", "mkl", "faster"),
    [
        ("AuthenticAMD", "26", "2", 16, True, True),
        ("AuthenticAMD", "26", "68", 16, True, True),
        ("AuthenticAMD", "26", "36", 16, True, False),
        ("AuthenticAMD", "25", "17", 16, True, False),
        ("GenuineIntel", "6", "143", 16, True, False),
        ("AuthenticAMD", "26", "2", 8, True, False),
        ("AuthenticAMD", "26", "2", 16, False, False),
        ("AuthenticAMD", "unknown", "unknown", 16, True, False),
    ],
)
def test_who_multiplies_is_decided_by_what_the_cpu_is(monkeypatch, vendor, family, model, lanes, mkl, faster):
    library = mock.Mock(**{"opsd_vector_lanes.return_value": lanes})
    monkeypatch.setattr(native, "_loaded", (library, ""))
    monkeypatch.setattr(native, "_processor", lambda: {"vendor_id": vendor, "cpu family": family, "model": model})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert native.outruns_torch.__wrapped__()[0] is faster  # not the cached one


REPORT = """
from opsd_kernels import native
print(native.available())
print(native.available()[0])
"""


def report(**environment: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process says of the backend."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "XDG_CACHE_HOME")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**kept, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_without_a_compiler_it_says_so_once_and_does_not_raise(tmp_path):
    done = report(CXX="no-such-compiler", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.endswith("False\n")
    assert "no C++ compiler found" in done.stdout
    assert done.stderr.count("native library is not available") == 1
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_compiler_that_fails_is_no_error_either(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'cannot do that' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = report(CXX=str(broken), XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.endswith("False\n")
    assert "cannot do that" in done.stdout


@needs_library
def test_the_build_is_cached_and_an_unwritable_cache_is_replaced(tmp_path, monkeypatch):
    kept, spare = tmp_path / "cache", tmp_path / "tmp"
    assert report(XDG_CACHE_HOME=str(kept)).stdout.endswith("True\n")
    (library,) = (kept / "opsd_kernels").iterdir()  # nothing temporary stays behind

    def no_build(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(native, "_compile", no_build)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    assert native._built() == library

    blocked, directory = tmp_path / "a file", spare / f"opsd_kernels-{native._user()}"
    blocked.write_text("")
    directory.mkdir(mode=0o700, parents=True)
    moved = library.rename(directory / library.name)  # as if built there: only where it looks is tested
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    assert native._built() == moved

    directory.chmod(0o777)  # anyone might have put it there
    with pytest.raises(RuntimeError, match="writable by others"):
        native._built()
