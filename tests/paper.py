"""The paper's algorithm and equations, transcribed literally: what the tests hold the fast ones against."""

import torch


def algorithm_1(model, samples, optimizer, E, K, tau, judge=lambda output: output.loss):
    """arXiv 2506.12384, Algorithm 1, line by line. Returns the (epoch, sample, step) of every update."""
    updates = []
    for epoch in range(E):
        for i, sample in enumerate(samples):
            for k in range(K):
                output = model(**sample)
                if judge(output) < tau:
                    break
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
                updates.append((epoch, i, k))
    return updates


def reference_mask(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The round(density * numel) largest entries; a stable sort keeps the lower index first among equal ones."""
    order = delta.double().abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order[: round(density * delta.numel())]] = True
    return mask.view(delta.shape)


def reference_merge(base, edited, weights, densities) -> torch.Tensor:
    merged = base.double()
    for tensor, weight, density in zip(edited, weights, densities, strict=True):
        delta = tensor.double() - base.double()
        if delta.ndim >= 2:
            delta = delta * reference_mask(delta, density)
        merged = merged + weight * delta
    return merged


def assert_within_one_rounding(result, base, edited, weights, densities) -> None:
    """At most half a unit in the last place of the result's dtype off, plus the noise of a float32 sum."""
    exact = reference_merge(base, edited, weights, densities)
    unit = torch.finfo(result.dtype).eps * torch.exp2(exact.abs().clamp(min=2**-14).log2().floor())
    scale = torch.stack([base.double().abs(), *(tensor.double().abs() for tensor in edited)]).amax(0)
    noise = 4 * len(edited) * torch.finfo(torch.float32).eps * scale
    assert ((result.double() - exact).abs() <= unit / 2 + noise).all()
