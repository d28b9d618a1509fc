"""Products with the transposed Jacobians of f at a point."""

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


class Linearisation:
    """f recorded once at a point: products with its transposed Jacobians.

    Holds edges into the recorded graph rather than tensors: what is kept in
    memory is what autograd saved, which ``saved_tensors_hooks`` see.

    Args:
        equation (Equation): f.
        z (Tensor): (N, D), the point.
        tensors (Sequence[Tensor]): The equation's tensors.
        healthy (Tensor): (N,) bool; other samples are replaced.
        strays (Sequence[Tensor], optional): What f is differentiated by beside these
            (:func:`evaluate`); products with them follow those with the tensors.
            Default: what is found.
    """

    def __init__(self, equation, z, tensors, healthy, strays=None):
        wanted = [t.requires_grad for t in tensors]
        equation, z = replace_failed(equation.bind(tensors), z, healthy)
        out, z, leaves = _record(equation, z, wanted)
        self.value = out.detach()
        if strays is None:
            strays = _strays(out, (z, *leaves))
        self.strays = strays
        self._out = get_gradient_edge(out) if out.requires_grad else None
        self._z = get_gradient_edge(z)
        self._leaves = [
            get_gradient_edge(t) if t.requires_grad else None
            for t in (*leaves, *strays)
        ]
        self._per_sample = (*equation.per_sample, *[False] * len(strays))

    def product(self, y):
        """J' y, the product with the transposed Jacobian in z, (N, D)."""
        if self._out is None:
            return torch.zeros_like(y)
        (grad,) = torch.autograd.grad(
            self._out, self._z, y, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(y) if grad is None else grad

    def full_product(self, y):
        """Products with the transposed Jacobians in all tensors; frees the graph.

        Returns:
            list[Tensor | None]: In the order of the tensors.
        """
        return self._last_product(y, [])[1]

    def all_products(self, y):
        """J' y and the products in all tensors at once; frees the graph.

        Returns:
            tuple[Tensor, list[Tensor | None]]: As of :meth:`product` and
            :meth:`full_product`.
        """
        (product,), grads = self._last_product(y, [self._z])
        return torch.zeros_like(y) if product is None else product, grads

    def _last_product(self, y, first):
        wanted = [edge for edge in self._leaves if edge is not None]
        if self._out is None or not (first or wanted):
            return [None] * len(first), [None] * len(self._leaves)
        found = torch.autograd.grad(self._out, [*first, *wanted], y, allow_unused=True)
        self._out = None
        found, rest = found[: len(first)], iter(found[len(first) :])
        grads = [None if edge is None else next(rest) for edge in self._leaves]
        return found, [
            finite_samples(grad) if mine else grad
            for grad, mine in zip(grads, self._per_sample, strict=True)
        ]


def evaluate(equation, z, healthy):
    """Value of f at a point, and tensors that it depends on beside the equation's.

    Adapters that are hooked to a layer, or compiled into it, hold weights that are in
    no module of f. They are found in the graph, of which nothing is kept.

    Args:
        equation (Equation): f.
        z (Tensor): (N, D), the point.
        healthy (Tensor): (N,) bool; other samples are replaced.

    Returns:
        tuple[Tensor, list[Tensor]]: f(z), detached, and such tensors; none where
        gradients are off.
    """
    wanted = [t.requires_grad for t in equation.tensors]
    equation, z = replace_failed(equation, z, healthy)
    if not torch.is_grad_enabled():
        return equation(z), []
    with torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
        out, z, leaves = _record(equation, z, wanted)
    return out.detach(), _strays(out, (z, *leaves))


def _record(equation, z, wanted):
    """The graph of f at a point, apart from the graphs of its tensors.

    Returns:
        tuple[Tensor, Tensor, list[Tensor]]: f(z), and the leaves of the graph: z, and
        the equation's tensors, those with gradients that are wanted.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        leaves = [
            t.detach().requires_grad_(want)
            for t, want in zip(equation.tensors, wanted, strict=True)
        ]
        return equation(z, leaves), z, leaves


def _drop(tensor):
    return None


def _strays(out, known):
    """Leaves of a graph that are none of the known tensors."""
    known = {id(t) for t in known}
    found, seen, nodes = [], set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, 'variable', None)
        if leaf is not None and id(leaf) not in known:
            found.append(leaf)
        nodes += [following for following, _ in node.next_functions]
    return found


def finite_samples(grad: Tensor):
    """Set samples that are not finite to zero, (N, ...); None, for zero, stays."""
    if grad is None:
        return None
    finite = grad.isfinite()[:, None].flatten(1).all(1)
    finite = finite.view(-1, *[1] * (grad.dim() - 1))
    return torch.where(finite, grad, torch.zeros_like(grad))


def replace_failed(equation, z, healthy):
    """Put a healthy sample in the place of each failed one.

    A failed sample's adjoint is zero, but 0 * NaN would poison the gradients of
    the shared weights. No constant is safe in its place, since f may have an
    infinite derivative there; a point where f is known to be finite is.

    Args:
        equation (Equation): f.
        z (Tensor): (N, D).
        healthy (Tensor): (N,) bool.

    Returns:
        tuple[Equation, Tensor]: The same where all are healthy; of zeros where
        none is.
    """
    if healthy.all():
        return equation, z
    if not healthy.any():
        return equation.contained(healthy), torch.zeros_like(z)
    rows = torch.arange(len(healthy), device=healthy.device)
    index = torch.where(healthy, rows, healthy.int().argmax())
    return equation.take(index), z[index]
