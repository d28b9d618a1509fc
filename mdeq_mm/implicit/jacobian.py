"""Estimates about the Jacobian of f at a point."""

import torch
from torch import Tensor


def hutchinson(equation, z: Tensor, probe: Tensor | None = None, generator=None):
    """Hutchinson estimate of ||J||_F^2 / D, the Jacobian loss of Bai et al. 2021.

    Args:
        equation (Equation): f.
        z (Tensor): (N, D), where the Jacobian is taken. Gradients pass to the
            equation's tensors, not to z.
        probe (Tensor, optional): (N, D) normal random numbers, or (P, N, D) for
            the mean over P probes. Drawn where not given.
        generator (torch.Generator, optional): Used to draw the probe.

    Returns:
        Tensor: Scalar, ||v' J||^2 / (N D), averaged over probes.
    """
    if probe is None:
        probe = torch.empty_like(z).normal_(generator=generator)
    probes = probe if probe.dim() == 3 else probe[None]
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        fz = equation(z)
        total = z.new_zeros(())
        for count, v in enumerate(probes, 1):
            keep = create or count < len(probes)
            (product,) = torch.autograd.grad(
                fz, z, v, create_graph=create, retain_graph=keep
            )
            total = total + product.square().sum()
    return total / probes.numel()


def spectral_radius(equation, z: Tensor, iterations=50, generator=None):
    """Largest modulus among the eigenvalues of J, by the power method.

    Args:
        equation (Equation): f.
        z (Tensor): (N, D), where the Jacobian is taken.
        iterations (int): Number of products with J'.
        generator (torch.Generator, optional): Used to draw the start.

    Returns:
        Tensor: (N,), the growth a step, averaged geometrically over the second
        half of the iterations, so that complex pairs do not make it oscillate.
    """
    tiny = torch.finfo(z.dtype).tiny
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        fz = equation(point)
    v = torch.empty_like(z).normal_(generator=generator)
    logs = []
    for step in range(iterations):
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(tiny)
        (v,) = torch.autograd.grad(fz, point, v, retain_graph=step < iterations - 1)
        logs.append(torch.linalg.vector_norm(v, dim=1).clamp_min(tiny).log())
    return torch.stack(logs[iterations // 2 :]).mean(0).exp()
