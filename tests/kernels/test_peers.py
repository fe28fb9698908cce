"""Agreement with the peers' fused losses where options overlap: TRL's chunked divergence and Liger Kernel's JSDs."""

import pytest
import torch
from _helpers import leaf, problem, relative

import opsd_kernels

N, H, V = 24, 16, 515
TOLERANCE = 2e-4  # float32 on both sides; theirs subtracts nearly equal numbers
BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl")
    return pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction


@pytest.fixture(scope="module")
def liger_chunked():
    return pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss


@pytest.fixture(scope="module")
def liger():
    if not torch.cuda.is_available():
        pytest.skip("its row kernel is Triton's alone: it needs a GPU")
    return pytest.importorskip("liger_kernel.ops.fused_linear_jsd").LigerFusedLinearJSDFunction


def inputs(device="cpu"):
    student, teacher, weight = (t.to(device) for t in problem(N, H, V, gap=0.5, dtype=torch.float32))
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1)).to(device)
    return student, teacher, weight, bias


def agree(ours, theirs, tolerance=TOLERANCE):
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.7}, {"logit_scale": 0.8, "softcap": 12.0}, {"teacher_logit_scale": 0.9}],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("beta", BETAS)
def test_trl(trl, beta, options, trainable):
    """Per-token losses under different upstream gradients, with a bias, and the student's entropy."""
    student, teacher, weight, bias = inputs()
    upstream = torch.linspace(-1, 2, N)

    def leaves():
        head = [leaf(weight), leaf(bias)] if trainable else [weight, bias]
        return leaf(student), *head

    x, w, b = leaves()
    losses, stats = opsd_kernels.jsd_loss(
        x, teacher, w, bias=b, beta=beta, reduction="none", return_stats=True, **options
    )
    losses.backward(upstream)
    ours = [losses, stats.student_entropy, *(t.grad for t in (x, w, b) if t.requires_grad)]

    x, w, b = leaves()
    scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
    losses, entropy = trl.apply(
        x, w, b, teacher, w.detach(), b.detach(), beta, options.get("temperature", 1.0),
        scale, cap, options.get("teacher_logit_scale", scale), cap,
    )  # fmt: skip
    losses.backward(upstream)
    agree(ours, [losses, entropy, *(t.grad for t in (x, w, b) if t.requires_grad)])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("beta", BETAS)
def test_liger_chunked(liger_chunked, beta, temperature, with_bias):
    """The mean over tokens whose label is not ignored, without its cross-entropy; it always returns dW."""
    student, teacher, weight, bias = inputs()
    mask = torch.arange(N) % 3 != 1
    labels = torch.where(mask, 0, -100)

    def leaves():
        return leaf(student), leaf(weight), leaf(bias) if with_bias else None

    x, w, b = leaves()
    loss = opsd_kernels.jsd_loss(x, teacher, w, bias=b, beta=beta, temperature=temperature, mask=mask)
    assert isinstance(loss, torch.Tensor)
    (3 * loss).backward()
    ours = [loss, *(t.grad for t in (x, w, b) if t is not None)]

    x, w, b = leaves()
    constant = None if b is None else b.detach()
    peer = liger_chunked(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False,
                         chunk_size=8)  # fmt: skip
    loss = peer(x, w, teacher, w.detach(), labels, b, constant)
    (3 * loss).backward()
    agree(ours, [loss, *(t.grad for t in (x, w, b) if t is not None)])


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("beta", BETAS)
def test_liger(liger, beta, temperature, trainable):
    student, teacher, weight, _ = inputs("cuda")
    x, w = leaf(student), leaf(weight).requires_grad_(trainable)
    loss = opsd_kernels.jsd_loss(x, teacher, w, beta=beta, temperature=temperature)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    ours = [loss, *(t.grad for t in (x, w) if t.requires_grad)]
    x, w = leaf(student), leaf(weight).requires_grad_(trainable)
    loss = liger.apply(x, w, teacher, w.detach(), None, beta, -100, temperature)
    loss.backward()
    agree(ours, [loss, *(t.grad for t in (x, w) if t.requires_grad)])
