"""Every recipe's loss of each token written like its formula: all logits at once, plain torch in float64.

`s` is the student's log-probabilities (N, V) with a gradient, other lower-case letters those of constant contexts.
`y` are the sampled tokens (N,), `seq` the sequence of each, tokens of a sequence in order. Each returns losses (N,).
"""

import math

import torch

# -- parts ------------------------------------------------------------------------------------------------------------


def log_p(stream):
    """log softmax of softcap·tanh(scale·(h·Wᵀ + b)/softcap)/T, (N, V), padding columns −inf."""
    z = stream.hidden.double() @ stream.weight.double().T
    if stream.bias is not None:
        z = z + stream.bias.double()
    z = z * stream.logit_scale
    if stream.softcap is not None:
        z = stream.softcap * torch.tanh(z / stream.softcap)
    if stream.valid_vocab is not None:
        z = z.masked_fill(torch.arange(z.shape[-1]) >= stream.valid_vocab, -math.inf)
    return torch.log_softmax(z / stream.temperature, -1)


def at(logp, y):
    return logp.gather(-1, y[:, None])[:, 0]


def entropy(logp):
    return -torch.where(logp == -math.inf, 0.0, logp.exp() * logp).sum(-1)


def support(s, t, k, by, tail):
    """Both restricted to the top k of `by`, renormalised or with one more entry for the rest."""
    ids = (t if by == "teacher" else s).detach().topk(k, -1).indices

    def kept(logp):
        inside = logp.gather(-1, ids)
        if tail:
            inside = torch.cat([inside, logp.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)], -1)
        return torch.log_softmax(inside, -1)

    return kept(s), kept(t)


def div(s, t, beta, *, entry_clip=None, token_clip=None, top_k=None, by="teacher", tail=False):
    """KL(t‖s) for beta 0, KL(s‖t) for 1, the generalised JSD between; both have the same padding columns."""
    t = t.detach()
    if top_k is not None and (top_k < s.shape[-1] or tail):
        s, t = support(s, t, min(top_k, s.shape[-1]), by, tail)
    padding = (s == -math.inf) | (t == -math.inf)
    s, t = s.masked_fill(padding, 0.0), t.masked_fill(padding, 0.0)
    if beta == 0:
        terms = t.exp() * (t - s)
    elif beta == 1:
        terms = s.exp() * (s - t)
    else:
        m = ((1 - beta) * s.exp() + beta * t.exp()).log()
        terms = beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)
    terms = terms.masked_fill(padding, 0.0)
    if entry_clip is not None:
        terms = terms.clamp(max=entry_clip)
    loss = terms.sum(-1)
    return loss if token_clip is None else loss.clamp(max=token_clip)


def mixture(linear=(), residual=(), *, scale=1.0, clip=None, tanh=None, centre=False, arithmetic=()):
    """normalise(Σ a·log p + g(Σ b·log p [− its mean over v])), or log Σ w·p; pairs of (number or (N,), (N, V))."""

    def total(pairs):
        return sum(torch.as_tensor(a, dtype=torch.float64).reshape(-1, 1) * p for a, p in pairs)

    if arithmetic:
        return total([(w, p.exp()) for w, p in arithmetic]).log()
    padding = [*linear, *residual][0][1] == -math.inf
    z = total([(a, p.masked_fill(padding, 0.0)) for a, p in linear])
    if residual:
        x = total([(b, p.masked_fill(padding, 0.0)) for b, p in residual])
        if centre:
            x = x - x.masked_fill(padding, 0.0).sum(-1, keepdim=True) / (~padding).sum(-1, keepdim=True)
        if clip is not None:
            x = x.clamp(-clip, clip)
        if tanh is not None:
            x = tanh * torch.tanh(x / tanh)
        z = z + scale * x
    return torch.log_softmax(z.masked_fill(padding, -math.inf), -1)


def pg(w, s, y):
    return -w.detach() * at(s, y)


def clip1(w, e):
    return w.clamp(1 - e, 1 + e)


def later(x, seq):
    """The sum over the strictly later tokens of the same sequence."""
    return torch.stack(
        [sum((x[j] for j in range(i + 1, len(x)) if seq[j] == seq[i]), x.new_zeros(())) for i in range(len(x))]
    )


def unit(x):
    """Scaled so that the 5 % quantile is 0 and the 95 % one 1, and kept within."""
    low, high = torch.quantile(x, 0.05), torch.quantile(x, 0.95)
    return torch.zeros_like(x) if high - low < 1e-12 else ((x - low) / (high - low)).clamp(0, 1)


def top_entropy(logp, k):
    return entropy(torch.log_softmax(logp.topk(k, -1).values, -1))


def union_kl(t, s, k):
    """KL(t‖s) on the union of the two top-k lists, each renormalised there."""
    out = []
    for row_t, row_s in zip(t, s, strict=True):
        ids = sorted({*row_t.topk(k).indices.tolist(), *row_s.topk(k).indices.tolist()})
        a, b = torch.log_softmax(row_t[ids], -1), torch.log_softmax(row_s[ids], -1)
        out.append((a.exp() * (a - b)).sum())
    return torch.stack(out)


def mass(t, s, k):
    return t.exp().gather(-1, s.topk(k, -1).indices).sum(-1)


# -- divergences ------------------------------------------------------------------------------------------------------


def opsd(s, t, *, beta, entry_clip=None):
    """Also gkd, rgsd (beta 0.5), sdft, vpd, pi_play (beta 1)."""
    return div(s, t, beta, entry_clip=entry_clip)


def sdpo(s, t, y, old, feedback, *, sampler=None, beta=0.5, top_k=100, limit=2.0):
    ratio = (at(s, y).detach() - old).exp().clamp(max=limit)
    if sampler is not None:
        ratio = ratio * (old - sampler).exp().clamp(max=limit)
    return div(s, t, beta, top_k=top_k, by="student", tail=True) * ratio * feedback


def purified(s, t, r, b, *, beta=0.5, limit=10.0):
    return div(s, mixture([(1, b)], [(1, t), (-1, r)], tanh=limit, centre=True), beta)


def ar_opd(s, full, part, *, coefficient=0.6, clip=5.0):
    return div(s, mixture([(1, part)], [(1, full), (-1, part)], scale=coefficient, clip=clip), 0)


def nca(s, t, s_c, *, coefficient, top_k=256):
    """`s_c` is the student under the context, with a gradient of its own."""
    return div(s, t, 1, top_k=top_k) + coefficient * div(s_c, s.detach(), 0, top_k=top_k)


def mad_opd(s, ts, confidence, *, beta=0.5, temperature=1.0, top_k=None):
    """Confidences (N, teachers) out of 100."""
    w = torch.softmax(confidence / 100 / temperature, -1)
    return sum(w[:, k] * div(s, t, beta, top_k=top_k) for k, t in enumerate(ts))


def rock(s, t, y, ids):
    return div(s, t, 1) * ~torch.isin(y, ids)


def msd(s, t, y, *, k=20):
    k = min(k, s.shape[-1])
    weight = (1 - top_entropy(t, k) / math.log(k)) * (1 - at(s, y).detach().exp())
    return div(s, t, 1) * weight


def distil(s, t, y, seq):
    ce = div(s, t, 0) + entropy(t)
    return ce + later(ce, seq).detach() * at(s, y)


def d_opsd(s, t, decoded, *, beta):
    return div(s, t, beta) * decoded


def tad(s, t, y, near):
    """`near` from 0 to 1."""
    return near * -at(s, y) + (1 - near) * div(s, t, 0)


def oprd(layers, seq, *, last=None):
    loss = sum(w * (a - b).square().sum(-1) / a.shape[-1] for a, b, w in layers) / len(layers)
    if last is None:
        return loss
    left = torch.tensor([sum(1 for j in range(i + 1, len(seq)) if seq[j] == seq[i]) for i in range(len(seq))])
    return loss * (left < last)


# -- sampled tokens ---------------------------------------------------------------------------------------------------


def lightning(s, y, l_t):
    return pg(l_t - at(s, y), s, y)


def opd_plus(s, t, y, *, beta=0.5):
    """p_S·g(ρ) has the weight ρ·g'(ρ) − g(ρ); of reverse KL less its baseline −1."""
    rho = (at(t, y) - at(s, y)).detach().exp()
    if beta == 0:
        return pg(rho, s, y)
    return pg(rho.log() - 1 if beta == 1 else (1 - beta) * ((1 - beta) + beta * rho).log(), s, y)


def edge_opd(s, t, b, y, *, t_plain=None, coefficient=0.05):
    """The teacher without its privilege is the student where the weights are live."""
    plain = at(s if t_plain is None else t_plain, y).detach()
    return pg((at(t, y) - at(s, y)) * (at(t, y) > plain), s, y) + coefficient * div(s, b, 1)


def ta_opd_kept(s, t, seq, *, fraction=0.05, k=16):
    """The best ⌈fraction·N⌉; a sequence without one keeps its best by the soft-or of entropy and divergence·mass."""
    k = min(k, s.shape[-1])
    d, c = union_kl(t, s, k), mass(t, s, k)
    score = unit(d) * unit(c)
    kept = torch.zeros(len(score), dtype=torch.bool)
    kept[sorted(range(len(score)), key=lambda i: (-score[i].item(), i))[: math.ceil(fraction * len(score))]] = True
    h, both = unit(top_entropy(s, k) / math.log(k)), unit(d * c)
    second = h + both - h * both
    for one in seq.unique():
        rows = (seq == one).nonzero()[:, 0].tolist()
        if not kept[rows].any():
            kept[max(rows, key=lambda i: (second[i].item(), -i))] = True
    return kept


def ta_opd(s, t, y, seq, *, fraction=0.05, k=16):
    """Before the mean, which is over the kept tokens."""
    return pg(at(t, y) - at(s, y), s, y) * ta_opd_kept(s.detach(), t, seq, fraction=fraction, k=k)


def rlsd_weight(d, advantage, lam, clip):
    return advantage * ((1 - lam) + lam * clip1((advantage.sign() * d).exp(), clip))


def rlsd(s, t, y, advantage, *, lam=0.5, clip=0.2):
    return pg(rlsd_weight(at(t, y) - at(s, y), advantage, lam, clip), s, y)


def cepo(s, right, wrong, y, advantage, *, lam=0.5, clip=0.2):
    return pg(rlsd_weight(at(right, y) - at(wrong, y), advantage, lam, clip), s, y)


def rlrt(s, t, y, advantage, correct, *, lam=0.5, clip=1.0):
    reversed_ = rlsd_weight(at(s, y) - at(t, y), advantage, lam, clip)
    return pg(torch.where(correct, reversed_, advantage), s, y)


def egrsd(s, t, y, advantage, seq=None, *, coefficient=0.3, clip=0.2, floor=0.1, window=None):
    h = entropy(t)
    if window is not None:
        h = torch.stack(
            [min(h[j] for j in range(i, min(i + window, len(h))) if seq[j] == seq[i]) for i in range(len(h))]
        )
    conf = (1 - coefficient * h / h.max()).clamp(floor, 1)
    return pg(advantage * clip1((advantage.sign() * (at(t, y) - at(s, y))).exp(), clip) * conf, s, y)


def phi(d):
    return 0.5 * (torch.nn.functional.softplus(d) - math.log(2))


def anti_sd_plain(s, t, y, advantage, *, lam):
    return pg(advantage - lam * phi(at(t, y) - at(s, y)), s, y)


def anti_sd(s, t, y, seq, advantage, *, sigma, median, highest=3.0):
    """After the warm-up that measured sigma and the median of the teacher's perplexities."""
    limit = min(5.0, 2 * sigma)
    shape = -phi((at(t, y) - at(s, y)).detach().clamp(-limit, limit))
    w = advantage.clone()
    for one in seq.unique():
        rows = seq == one
        z = shape[rows] - shape[rows].mean()
        z = z / z.square().mean().sqrt() if z.abs().max() > 1e-12 else 0 * z  # where the clip has made all the same
        perplexity = math.exp(-at(t, y)[rows].mean())
        lam = min(max(0.1 * 2 * math.log(perplexity / (0.93 * median)), 0.0), 0.5) if perplexity <= highest else 0.0
        w[rows] += lam * z.clamp(-5, 5)
    return pg(w, s, y)


def credit(s, t, shuffled, y, *, lam=0.1):
    baseline = torch.stack([at(b, y) for b in shuffled]).mean(0)
    return pg(at(t, y) - at(s, y) + lam * (at(t, y) - baseline), s, y)


def copd(s, t, y, advantage, cross, *, coefficient):
    return pg(torch.where(cross, coefficient * (at(t, y) - at(s, y)), advantage), s, y)


def temporal(s, y, seq, advantage, *, share):
    """Only the last `share` of each sequence counts: positions whose percentile from the end is below it."""
    m = torch.zeros_like(advantage)
    for one in seq.unique():
        rows = (seq == one).nonzero()[:, 0]
        for i, row in enumerate(rows.flip(0).tolist()):
            m[row] = float((i + 0.5) / len(rows) < share)
    return pg(advantage * m, s, y)


def ratio_pg(s, y, advantage, old):
    """The mixed-policy form: with the ratio to what sampled, whose gradient is pg's at ratio 1."""
    return -advantage * (at(s, y) - old).exp()


def pbsd(s, y, preferred, reference, pairs, *, b=0.1):
    """The loss of a pair of sequences, spread evenly over its tokens."""
    gain = at(s, y) - reference
    losses = []
    for p in pairs:
        of_pair = pairs == p
        both = gain[of_pair & preferred].sum() - gain[of_pair & ~preferred].sum()
        losses.append(torch.nn.functional.softplus(-b * both) / of_pair.sum())
    return torch.stack(losses)


def spear(s, y, seq, correct):
    """Wrong sequences are unlearned at their last quarter, times the student's probability."""
    logp = at(s, y)
    tail = torch.zeros_like(correct)
    for one in seq.unique():
        rows = (seq == one).nonzero()[:, 0]
        tail[rows[len(rows) - len(rows) // 4 :]] = True
    return torch.where(correct, -logp, tail * logp.detach().exp() * -torch.log(-torch.expm1(logp)))
