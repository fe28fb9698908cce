"""The cluster kernel without a device: run on the host against float64, what nvcc makes of it, and who may use it.

The host runs the kernel itself, csrc/cluster_kernel.cuh, each of its threads as a coroutine, with exponentials and
logarithms made as coarse as a device's. What that cannot show is what depends on a device's memory and its order.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _helpers import close_divergence, close_pair, row_rms
from torch import Tensor

import opsd_kernels
from opsd_kernels import backends, native
from opsd_kernels.objective import Objective
from opsd_kernels.rows import Column, cluster_backend, torch_backend
from opsd_kernels.rows.native_backend import divergence_request

ROOT = Path(__file__).resolve().parents[2]
INF, NAN = math.inf, math.nan
BETAS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        compiler = native._compiler()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    library = tmp_path_factory.mktemp("cluster") / "host.so"
    source = Path(__file__).with_name("cluster_on_host.cpp")
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = ["-I", str(ROOT / "csrc")]
    subprocess.run([*compiler, *flags, *include, str(source), "-o", str(library)], check=True, timeout=300)
    return ctypes.CDLL(str(library))


def on_host(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    blocks: int = 1,
    clusters: int = 3,
    late: bool = True,
    targets: Tensor | None = None,
    dz: Tensor | None = None,
    row_scale: Tensor | None = None,
    columns: int = len(Column),
) -> tuple[Tensor, Tensor]:
    """The table and dz, as `clusters` of `blocks` compute them. late: bulk copies happen only when they are awaited."""
    n, vocab = student.shape
    table = torch.full((columns, n), NAN)
    dz = torch.full((n, vocab), NAN) if dz is None else dz
    targets = torch.arange(n) * 3 % vocab if targets is None else targets
    request = divergence_request(student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale)
    library.cluster_rows_on_host(ctypes.byref(request), blocks, clusters, late)
    return table, dz


def expected(student: Tensor, teacher: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The same from the torch backend in float64."""
    n, vocab = student.shape
    table, dz = torch.zeros(len(Column), n, dtype=torch.float64), torch.empty(n, vocab, dtype=torch.float64)
    targets = torch.arange(n) * 3 % vocab
    torch_backend.divergence_rows(
        student.double(), teacher.double(), objective, targets=targets, table=table, dz=dz, row_scale=None
    )
    return table, dz


def peaked(n: int, vocab: int, gap: float, std: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 logits, the student's the teacher's plus `gap` of noise."""
    g = torch.Generator().manual_seed(seed)
    teacher = std * torch.randn(n, vocab, generator=g)
    return teacher + gap * torch.randn(n, vocab, generator=g), teacher


def check(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    blocks: int = 1,
    dz_bound: float = 1e-5,
) -> None:
    """Loss to 1e-4 and dz to `dz_bound`, RMS over the tokens, and every column of the table."""
    want, want_dz = expected(student, teacher, objective)
    table, dz = on_host(library, student, teacher, objective, blocks=blocks)
    live = want_dz.norm(dim=-1) > 1e-12  # else the gradient is 0, which float64 may miss by as much
    assert (dz[~live].abs() < 1e-6).all()
    if live.any():
        assert row_rms(dz[live], want_dz[live]) < dz_bound
    finite = want[Column.LOSS].isfinite() & (want[Column.LOSS] != 0)
    if finite.any():
        assert row_rms(table[0][finite].unsqueeze(-1), want[0][finite].unsqueeze(-1)) < 1e-4
    torch.testing.assert_close(table.double(), want, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize(("std", "gap"), [(3.0, 1.0), (4.0, 0.05), (4.0, 1e-3), (5.0, 1e-3)])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("vocab", "blocks"), [(32003, 2), (50257, 2)])
@pytest.mark.thinned(4)
def test_peaked_logits_and_small_gaps(host, vocab, blocks, beta, std, gap):
    check(host, *peaked(32, vocab, gap, std), Objective.checked(beta=beta), blocks=blocks)


@pytest.mark.parametrize(("beta", "gap"), [(0.5, 1.0), (0.5, 1e-3), (0.0, 1e-3), (1.0, 0.05)])
@pytest.mark.exhaustive
def test_a_large_vocabulary_in_sixteen_blocks(host, beta, gap):
    check(host, *peaked(8, 151_936, gap), Objective.checked(beta=beta), blocks=16)


# where the student is the smaller, log(p_S / m) = log1p(v) + a is about beta times either: as many digits are lost
@pytest.mark.parametrize(("beta", "dz_bound"), [(0.01, 5e-5), (0.1, 1e-5), (0.9, 1e-5), (0.99, 1e-5)])
def test_any_mixture(host, beta, dz_bound):
    for gap in (1.0, 1e-3):
        check(host, *peaked(32, 4112, gap), Objective.checked(beta=beta), dz_bound=dz_bound)


@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 127, 128, 129, 515, 4112])
@pytest.mark.parametrize("blocks", [1, 2, 16])
@pytest.mark.thinned(3)
def test_more_parts_than_there_are_columns_for(host, blocks, vocab):
    student, teacher = peaked(5, vocab, 0.5)
    want, want_dz = expected(student, teacher, Objective.checked())
    table, dz = on_host(host, student, teacher, Objective.checked(), blocks=blocks)
    torch.testing.assert_close(table.double(), want, rtol=2e-5, atol=5e-6)
    torch.testing.assert_close(dz.double(), want_dz, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top", [14.0, 17.0, 22.0])  # a probability of about 0.99, and all but 1e-3 or 1e-6 of it
@pytest.mark.thinned(3)
def test_a_student_that_is_sure_of_a_token(host, top, beta, clip):
    """And a teacher that leans to it less, or is sure of another, or lacks it; in whichever part the token is."""
    vocab, objective = 5003, Objective.checked(beta=beta, entry_clip=clip)
    g = torch.Generator().manual_seed(2)
    student = 2 * torch.randn(32, vocab, generator=g)
    first, second = torch.randperm(vocab, generator=g)[:64].view(2, 32)
    first[:2] = torch.tensor([0, vocab - 1])
    each = torch.arange(32)
    student[each, first] = top
    teacher = student + 0.3 * torch.randn(32, vocab, generator=g)
    for other, blocks in ((top - 1, 1), (top + 8, 4), (top + 12, 1)):
        student[each, second], teacher[each, second] = top - 10, other
        check(host, student, teacher, objective, blocks=blocks)
    if beta < 1 or clip:  # else it is infinite
        teacher[each, first] = -INF
        check(host, student, teacher, objective)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("constant", [0.0, 41.3])  # between the models: of no consequence, but for its digits
@pytest.mark.parametrize("peak", [15.0, 22.0])
@pytest.mark.thinned(2)
def test_models_that_agree_on_a_sure_token(host, peak, constant, beta):
    for gap in (1e-3, 1e-2):
        student, teacher = close_pair(32, 4112, gap, peak)
        student, teacher = student + constant, teacher - constant
        table, dz = on_host(host, student, teacher, Objective.checked(beta=beta), blocks=2)
        assert row_rms(table[:1].T, close_divergence(student, teacher, beta).unsqueeze(-1)) < 1e-4
        assert row_rms(dz, expected(student, teacher, Objective.checked(beta=beta))[1]) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_divergence(host, beta):
    student, _ = peaked(4, 4112, 0.0)
    student[0, 7] = 30.0
    table, dz = on_host(host, student, student.clone(), Objective.checked(beta=beta))
    assert table[Column.LOSS].abs().max() < 1e-12
    assert dz.abs().max() < 1e-7 * student.softmax(-1).max()


@pytest.mark.parametrize("options", [{}, {"softcap": 8.0}, {"logit_scale": 0.8, "teacher_logit_scale": 0.9}], ids=str)
@pytest.mark.parametrize("clip", [None, 0.02])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.thinned(3)
def test_minus_infinity_in_every_pattern(host, beta, clip, options):
    student, teacher = peaked(10, 1031, 0.3)
    student[0, 3:9] = -INF
    teacher[1, 3:9] = -INF
    student[2, ::3] = teacher[2, ::3] = -INF
    student[3] = -INF
    teacher[4] = -INF
    student[5] = teacher[5] = -INF
    student[6, :1000] = -INF
    teacher[6, 3:] = -INF  # nothing in common
    student[7, 16:] = teacher[7, 16:] = -INF  # whole parts of nothing
    student[8, 0] = teacher[8, 7] = -INF
    student[9, 40] = teacher[9, 40] = torch.finfo(torch.float32).min  # how some mask
    check(host, student, teacher, Objective.checked(beta=beta, entry_clip=clip, **options), blocks=2)


OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.9, "logit_scale": 0.3, "entry_clip": 0.02},
    {"entry_clip": 0.002},
    {"token_clip": 0.05},
    {"entry_clip": 0.003, "token_clip": 0.06},
    {"softcap": 8.0},
    {"softcap": 30.0, "entry_clip": 0.002},
    {"softcap": 6.0, "teacher_softcap": INF, "temperature": 1.3, "entry_clip": 0.05},
    {"logit_scale": 0.8, "teacher_logit_scale": 0.9},
    {"logit_scale": 0.8, "teacher_logit_scale": 0.9, "teacher_softcap": 12.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.thinned(3)
def test_options(host, beta, options):
    check(host, *peaked(32, 4112, 0.5), Objective.checked(beta=beta, **options))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.thinned(2)
def test_small_gaps_under_a_temperature_or_a_cap_and_a_constant(host, beta, softcap):
    student, teacher = peaked(32, 4112, 1e-3)
    check(host, student, teacher, Objective.checked(beta=beta, temperature=0.8, softcap=softcap))
    check(host, student + 16, teacher + 16, Objective.checked(beta=beta, temperature=0.8, softcap=softcap))
    student, teacher = peaked(32, 4112, 0.3)
    check(host, student + 40, teacher - 40, Objective.checked(beta=beta))


@pytest.mark.parametrize("beta", BETAS)
def test_models_far_apart(host, beta):
    """Each is sure of a token that the other gives e^-60 or less."""
    student, teacher = peaked(8, 4112, 0.5)
    student[:, 11], teacher[:, 3000] = 60.0, 90.0
    check(host, student, teacher, Objective.checked(beta=beta), blocks=8)


def test_nan_stays_visible(host):
    for beta in BETAS:
        student, teacher = peaked(4, 1031, 0.5)
        student[1, 900], teacher[3, 3] = NAN, NAN
        table, dz = on_host(host, student, teacher, Objective.checked(beta=beta))
        assert table[Column.LOSS].isnan().tolist() == [False, True, False, True]
        assert dz.isnan().any(-1).tolist() == [False, True, False, True]


def test_row_weights(host):
    student, teacher = peaked(4, 1031, 0.5)
    scale = torch.tensor([1.0, 0.0, -2.0, 0.5])
    _, dz = on_host(host, student, teacher, Objective.checked(), row_scale=scale)
    _, plain = on_host(host, student, teacher, Objective.checked())
    torch.testing.assert_close(dz, plain * scale.unsqueeze(-1))


# a slice of a warp has no, one or two whole chunks of 128 quads, and a rest
@pytest.mark.parametrize(("vocab", "blocks"), [(4096, 1), (4097, 1), (9005, 1), (9008, 2)])
@pytest.mark.parametrize(("padding", "start"), [(0, 0), (1, 0), (3, 0), (4, 0), (4, 1), (2, 2)])
@pytest.mark.thinned(3)
def test_rows_of_any_stride_and_place(host, vocab, blocks, padding, start):
    """In bulk or word by word, copied early or late, dz in the student's place: the same bits, and none beside it."""
    student, teacher = peaked(5, vocab, 0.5)
    objective = Objective.checked(beta=0.3)
    want, want_dz = on_host(host, student, teacher, objective, blocks=blocks)
    for late in (False, True):
        wide = torch.full((5, vocab + padding + start), 7.0)
        place = wide[:, start : start + vocab]
        place.copy_(student)
        table, _ = on_host(host, place, teacher, objective, blocks=blocks, clusters=2, late=late, dz=place)
        assert torch.equal(place, want_dz)
        assert torch.equal(table, want)
        assert (wide[:, :start] == 7).all()
        assert (wide[:, start + vocab :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [4101, 9008])
def test_a_narrow_dz_is_the_wide_one_rounded(host, vocab, dtype):
    student, teacher = peaked(5, vocab, 0.5)
    for options in ({}, {"token_clip": 0.02}):
        objective = Objective.checked(**options)
        _, want = on_host(host, student, teacher, objective)
        _, dz = on_host(host, student, teacher, objective, dz=torch.full((5, vocab), NAN, dtype=dtype))
        assert torch.equal(dz, want.to(dtype))


def test_rows_do_not_depend_on_the_clusters_that_there_are(host):
    student, teacher = peaked(7, 1031, 0.5)
    results = [on_host(host, student, teacher, Objective.checked(), blocks=2, clusters=c) for c in (1, 2, 7)]
    for table, dz in results[1:]:
        assert torch.equal(table, results[0][0])
        assert torch.equal(dz, results[0][1])


def test_the_loss_alone_and_targets_outside_of_the_vocabulary(host):
    student, teacher = peaked(3, 1031, 0.5)
    objective = Objective.checked(entry_clip=0.01)
    targets = torch.tensor([-1, 1031, 1030])
    table, _ = on_host(host, student, teacher, objective, targets=targets)
    alone, _ = on_host(host, student, teacher, objective, columns=1)
    torch.testing.assert_close(alone[0], table[0])
    for column in (Column.STUDENT_LOGPROB, Column.TEACHER_LOGPROB):
        assert table[column].isnan().tolist() == [True, True, False]


# ------------------------------------------------------------------------------------------------ what nvcc makes of it

REGISTERS = 65536 // (2 * 256)  # a thread's, where two blocks of 256 share a multiprocessor
SHARED_PER_PROCESSOR, SHARED_PER_BLOCK, RESERVED = 228 << 10, 227 << 10, 1 << 10
KINDS = {"forward KL": "0", "reverse KL": "1", "JSD": "2"}
# Instructions per vocabulary entry in the loops over whole chunks, without clip, statistics or caps; found: 60, 58, 69
MOST_INSTRUCTIONS = {"forward KL": 63.0, "reverse KL": 61.0, "JSD": 71.0}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What ptxas reported, and the library."""
    try:
        cluster_backend._nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    library = tmp_path_factory.mktemp("nvcc") / "cluster.so"
    return cluster_backend.build(library, "-Xptxas", "-v"), library


@pytest.fixture(scope="session")
def binary(compiled: tuple[str, Path]) -> dict[str, list[Instruction]]:
    """The kernels' instructions, by the kernel's name."""
    aot = pytest.importorskip("_aot", reason="Triton is not installed, which ships the disassembler")
    if not aot.TOOL.exists():
        pytest.skip("this Triton ships no cuobjdump")
    text = subprocess.run([aot.TOOL, "-sass", compiled[1]], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for part in text.split("Function : ")[1:]:
        found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", part, re.MULTILINE)
        kernels[part.split()[0]] = [Instruction(int(address, 16), what) for address, what in found]
    return kernels


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str


def kernel_name(kind: str, *, clip: bool = False, statistics: bool = False, transformed: bool = False) -> str:
    """Of the instantiation <BETA, CLIP, STATISTICS, TRANSFORMED>."""
    return f"ILi{KINDS[kind]}ELb{clip:d}ELb{statistics:d}ELb{transformed:d}E"


def loops(code: list[Instruction]) -> list[list[str]]:
    """The bodies of all loops, shortest first: what lies between a branch and an earlier target of it."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    bodies = []
    for i, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction.text)
        start = index.get(int(target[1], 16), i + 1) if target else i + 1
        if start <= i:
            bodies.append([found.text for found in code[start : i + 1]])
    return sorted(bodies, key=len)


def count(body: list[str], what: str) -> int:
    return sum(what in text for text in body)


def instructions_per_entry(code: list[Instruction]) -> dict[str, float]:
    """By phase, of the loops over whole chunks; a 16-byte load of both models' logits is four entries."""
    phases: dict[str, float] = {}
    for body in loops(code):
        entries = 2 * count(body, "LDS.128")
        if entries == 16 and count(body, "MUFU.EX2") >= 32:
            phases.setdefault("A", len(body) / entries)
        elif entries == 4 and count(body, "STS.128") == 2:
            phases.setdefault("B", len(body) / entries)
        elif entries == 16 and count(body, "F2FP.BF16") == 8 and count(body, "STG.E.64") == 4:
            phases.setdefault("C", len(body) / entries)  # with the copies of the next row
    return phases


@pytest.mark.exhaustive
def test_every_kernel_leaves_room_for_two_blocks_and_spills_nothing(compiled):
    report, _ = compiled
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_90a'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(kernels) == 3 * 2 * 2 * 2
    assert "bytes smem" not in report  # all of it is the launch's
    for name, stack, stores, loads, registers in kernels:
        print(f"{name}: {registers} registers")
        assert (stack, stores, loads) == ("0", "0", "0"), name
        assert int(registers) <= REGISTERS, name


@pytest.mark.parametrize(("vocab", "fitting"), [(151_936, 2), (262_144, 1), (cluster_backend.MOST_COLUMNS, 1)])
@pytest.mark.exhaustive
def test_blocks_fit_a_multiprocessor(compiled, vocab, fitting):
    used = ctypes.CDLL(str(compiled[1])).opsd_cluster_shared_bytes(ctypes.c_int64(vocab), 16)
    assert used >= 8 * vocab / 16
    assert used <= SHARED_PER_BLOCK
    assert fitting * (used + RESERVED) <= SHARED_PER_PROCESSOR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.exhaustive
def test_instructions_per_entry(binary, kind):
    (code,) = (code for name, code in binary.items() if kernel_name(kind) in name)
    phases = instructions_per_entry(code)
    print(f"{kind}: {phases}, together {sum(phases.values()):.1f}")
    assert set(phases) == {"A", "B", "C"}
    assert sum(phases.values()) <= MOST_INSTRUCTIONS[kind]


@pytest.mark.exhaustive
def test_no_kernel_touches_local_memory_and_all_copy_in_bulk(binary):
    for name, code in binary.items():
        texts = [instruction.text for instruction in code]
        assert not count(texts, "LDL") + count(texts, "STL"), name
        assert count(texts, "UBLKCP"), name
        assert count(texts, "UCGABAR_WAIT") + count(texts, "BAR.SYNC") >= 5, name


# ------------------------------------------------------------------------------------------------------ who may use it


def test_it_is_used_by_name_alone_and_says_why_it_cannot_be():
    assert "cluster" in backends.NAMES
    assert not any("cluster" in names for names in backends.FASTEST.values())
    student, teacher = peaked(2, 9, 0.5)
    with pytest.raises(ValueError, match="got 'cluster': the device is cpu, not cuda"):
        opsd_kernels.jsd_loss_from_logits(student, teacher, backend="cluster")


@pytest.mark.parametrize(("capability", "reason"), [((8, 0), "8.0"), ((10, 0), "10.0"), ((9, 0), "")])
def test_it_needs_hopper(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cluster_backend, "_load", lambda: (object(), ""))
    there, why = cluster_backend.available("cuda")
    assert there == (not reason)
    assert reason in why


def test_it_needs_nvcc_or_a_library(monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", str(tmp_path / "none"))
    monkeypatch.delenv(cluster_backend.LIBRARY_VARIABLE, raising=False)
    library, reason = cluster_backend._load.__wrapped__()
    assert library is None
    assert "no nvcc found" in reason
    monkeypatch.setenv(cluster_backend.LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    library, reason = cluster_backend._load.__wrapped__()
    assert library is None
    assert "absent.so" in reason


@pytest.mark.exhaustive
def test_a_built_library_loads_and_names_its_errors(compiled, monkeypatch):
    monkeypatch.setenv(cluster_backend.LIBRARY_VARIABLE, str(compiled[1]))
    library, reason = cluster_backend._load.__wrapped__()
    assert library is not None, reason
    assert library.opsd_cluster_error(1).decode() == "invalid argument"


def test_what_the_kernel_does_not_serve_goes_to_the_next_backend():
    student, teacher = peaked(3, 1031, 0.5)
    want, want_dz = expected(student, teacher, Objective.checked())
    wide = student.double(), teacher.double()
    table, dz = torch.empty(len(Column), 3, dtype=torch.float64), torch.empty_like(wide[0])
    assert not cluster_backend.serves(*wide, table, dz)
    targets = torch.arange(3) * 3
    cluster_backend.divergence_rows(*wide, Objective.checked(), targets=targets, table=table, dz=dz, row_scale=None)
    torch.testing.assert_close(table, want)
    torch.testing.assert_close(dz, want_dz)
    narrow = torch.empty(3, cluster_backend.MOST_COLUMNS + 1, device="meta")
    assert not cluster_backend.serves(narrow, narrow, torch.empty(1, 3), None)
    assert cluster_backend.serves(student, teacher, torch.empty(1, 3), student.bfloat16())
