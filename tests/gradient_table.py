"""How near every gradient comes to the exact one, on an easy and on a hard map.

``python -m tests.gradient_table`` prints the tables of docs/gradients_table.md: of the
official golden weights where they are there, otherwise of the project's own.
"""

from functools import cache, partial

import torch

from mdeq_mm.implicit import (
    BroydenSolver,
    Equation,
    ImplicitGradient,
    PhantomGradient,
    ReversibleGradient,
    SharedInverseGradient,
    UnrolledGradient,
    spectral_radius,
)
from tests.helpers import (
    SHARED,
    cosine,
    official_classifier,
    official_golden,
    pack,
    project_classifier,
    project_golden,
    relative,
)

#: f(z* + factor (z - z*)) has the Jacobian factor J at z*.
FACTORS = (1.0, 2.0)

#: What f computes in; the state of a reversible iteration is float64 in any case.
PRECISIONS = ('float64', 'float32', 'bfloat16')

TIGHT = partial(BroydenSolver, max_steps=300)


def golden_names():
    """The goldens that are there, by name."""
    there = (SHARED / 'golden' / 'golden_cls.pt').exists()
    return ('official', 'project') if there else ('project',)


class Golden:
    """Maps made of golden weights, in evaluation mode, with their equilibrium.

    Args:
        name (str): ``'official'`` or ``'project'``.

    Attributes:
        value (Tensor): z*, (N, D).
        cotangent (Tensor): The gradient dL/df(z*) that is passed on, random.
    """

    def __init__(self, name):
        official = name == 'official'
        golden = official_golden() if official else project_golden()
        model = official_classifier()[0] if official else project_classifier()
        self._layer = model.backbone.equilibrium
        with torch.no_grad():
            images = golden['input'].double()
            self._injection = model.backbone.injection(model.backbone.stem(images))
        found = golden['eval']['equilibrium'] if official else golden['equilibrium']
        self._maps = [m.double() for m in found]
        # The file has twelve digits.
        solution = TIGHT(tol=1e-15).solve(self._equation('float64'), pack(found))
        assert solution.residual.max() < 1e-13
        self.value = solution.value
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(
            3, *self.value.shape, dtype=torch.float64, generator=generator
        )
        self.cotangent = draws[0]
        # The hard map of the project's golden has more than one equilibrium.
        near = {1.0: 0.0, 2.0: 0.0 if official else 0.9}
        self._starts = {
            factor: (share * self.value, *(draws[1:] * self.value.std()))
            for factor, share in near.items()
        }

    def _equation(self, precision):
        """f with the model's own tensors, as it computes in a precision."""
        single = torch.float64 if precision == 'float64' else torch.float32
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
            equation = self._layer.equation(self._maps, self._injection)
        return equation.bind([t.detach().to(single) for t in equation.tensors])

    def equation(self, factor=1.0, precision='float64', count=None):
        """f(z* + factor (z - z*)), whose weights and inputs all take gradients.

        Args:
            factor (float): 1 is the map itself.
            precision (str): One of PRECISIONS.
            count (dict, optional): Is told of each evaluation, ``count['f']``, and
                of each product with a transposed Jacobian, ``count['products']``.
        """
        inner = self._equation(precision)
        leaves = [t.detach().requires_grad_() for t in inner.tensors]

        def function(z, tensors):
            *tensors, value = tensors
            fz = inner(value + factor * (z - value), tensors)
            if count is not None:
                count['f'] += 1
                if fz.requires_grad:
                    fz.register_hook(
                        lambda _: count.update(products=count['products'] + 1)
                    )
                    # The hook sits in front of f, not behind what follows.
                    fz = fz.view_as(fz)
            return fz

        return Equation(function, (*leaves, self.value), (*inner.per_sample, True))

    def gradient(self, gradient, solver=None, factor=1.0, precision='float64', start=0):
        """The gradient of all of the equation's tensors.

        Args:
            gradient (Gradient | Callable): Or ``(equation, start) -> out``.
            solver (Solver, optional): Of the forward pass. Default: the equilibrium
                is given.
            factor (float): As of :meth:`equation`.
            precision (str): As of :meth:`equation`.
            start (int): Where solver or iteration begins: 0 is where a model does,
                at zeros; 1 and 2 are random states.

        Returns:
            tuple[list[Tensor], Tensor, dict]: Gradients; the output; evaluations
            of f in the forward pass ``f``, again in the backward pass ``again``,
            and ``products``.
        """
        count = dict(f=0, products=0)
        equation = self.equation(factor, precision, count)
        start = self._starts[factor][start]
        if not hasattr(gradient, 'iterates'):
            out = gradient(equation, start)
        elif gradient.iterates:
            out, _ = gradient(equation, start)
        elif solver is None:
            out, _ = gradient(equation, self.value, BroydenSolver(1))
        else:
            gradient.check(solver)
            out, solution = gradient(equation, start, solver)
            assert relative(solution.value, self.value) < 10 * solver.tol
        forward = count['f']
        tensors = [t for t in equation.tensors if t.requires_grad]
        grads = torch.autograd.grad(out, tensors, self.cotangent)
        count.update(f=forward, again=count['f'] - forward)
        return list(grads), out.detach(), count


@cache
def golden(name):
    return Golden(name)


@cache
def exact(name, factor):
    """The gradient at the equilibrium, by implicit differentiation."""
    gradient = ImplicitGradient(TIGHT(tol=1e-13))
    return golden(name).gradient(gradient, factor=factor)[0]


@cache
def radius(name, factor):
    """The spectral radius of the map's Jacobian, the largest of all samples."""
    equation, z = golden(name).equation(factor), golden(name).value
    generator = torch.Generator().manual_seed(0)
    return spectral_radius(equation, z, 60, generator=generator).max().item()


@cache
def quality(name, row, factor):
    """Of a gradient of :func:`rows`, beside the exact one.

    Returns:
        tuple[float, float, dict]: Cosine, ratio of the norms, and counts as of
        :meth:`Golden.gradient`.
    """
    found, _, count = golden(name).gradient(*rows()[row], factor)
    expected = exact(name, factor)
    return cosine(found, expected), norm_of(found) / norm_of(expected), count


@cache
def error(name, row, factor, precision, reference=None, starts=(0, 1, 2)):
    """Of a gradient of :func:`iterations`, beside direct differentiation.

    That is autograd's gradient of the same iteration, recorded as a whole with a
    state in float64. What the way back loses shows in few numbers of a state that
    f rounds, or in none: the error is the largest from several starts.

    Args:
        name (str): Of the golden.
        row (str): Of the gradient.
        factor (float): Of the map.
        precision (str): What f computes in.
        reference (str, optional): What f of the reference computes in. Default:
            the same.
        starts (tuple[int]): As of :meth:`Golden.gradient`.
    """
    gradient, plain = iterations()[row]
    errors = []
    for start in starts:
        found, _, _ = golden(name).gradient(gradient, None, factor, precision, start)
        expected, _, _ = golden(name).gradient(
            plain, None, factor, reference or precision, start
        )
        pair = [[g.double() for g in grads] for grads in (found, expected)]
        errors.append(relative(*pair))
    return max(errors)


def norm_of(grads):
    return torch.cat([g.flatten() for g in grads]).norm().item()


def rows():
    """All gradients, and the solver of the forward pass where it matters.

    Returns:
        dict[str, tuple[Gradient, Solver | None]]: By the name in the table.
    """
    gradients = {
        'implicit, to 1e-12': ImplicitGradient(TIGHT(tol=1e-12)),
        'implicit, default (30, 1e-6)': ImplicitGradient(),
        'implicit, Broyden 8': ImplicitGradient(BroydenSolver(8, tol=0)),
        'phantom 1 (Jacobian-free)': PhantomGradient(1),
        'phantom 3': PhantomGradient(3),
        'phantom 5': PhantomGradient(5),
        'phantom 5, damping .5': PhantomGradient(5, damping=0.5),
        'phantom 3, unrolled': PhantomGradient(3, unroll=True),
    }
    found = {name: (gradient, None) for name, gradient in gradients.items()}
    for tol in (1e-3, 1e-6):
        solver = BroydenSolver(100, tol)
        name = f'shared inverse, solved to {tol:.0e}'.replace('e-0', 'e-')
        found[f'{name}, no fallback'] = SharedInverseGradient(fallback=None), solver
        found[name] = SharedInverseGradient(), solver
    for name, (gradient, _) in iterations().items():
        found[name] = gradient, None
    return found


def iterations():
    """Gradients of an iteration, and the same iteration recorded as a whole.

    Returns:
        dict[str, tuple[Gradient, Callable]]: By the name in the table.
    """
    found = {}
    for steps, beta in ((4, 0.8), (8, 0.5), (8, 0.8)):
        name = f'reversible {steps}, beta .{round(10 * beta)}'
        plain = partial(reversible, steps=steps, beta=beta)
        found[name] = ReversibleGradient(steps, beta), plain
    for steps in (5, 10):
        found[f'unrolled {steps}'] = (
            UnrolledGradient(steps),
            partial(unrolled, steps=steps),
        )
    return found


def reversible(equation, z, steps, beta):
    y = z
    for _ in range(steps):
        y = (1 - beta) * y + beta * equation(z)
        z = (1 - beta) * z + beta * equation(y)
    return z


def unrolled(equation, z, steps):
    for _ in range(steps):
        z = equation(z)
    return z


def _table(head, lines):
    rule = ['---', *['---:'] * (len(head) - 1)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (head, rule, *lines))


def quality_table(name):
    """Cosine and ratio of norms to the exact gradient, as markdown."""
    head = ['gradient']
    for factor in FACTORS:
        label = f'radius {radius(name, factor):.2f}'
        head += [f'{label}: cosine', 'norm', 'products']
    lines = []
    for row in rows():
        line = [row]
        for factor in FACTORS:
            angle, ratio, count = quality(name, row, factor)
            again = f' + {count["again"]} f' if count['again'] else ''
            line += [f'{angle:.4f}', f'{ratio:.3f}', f'{count["products"]}{again}']
        lines.append(line)
    return _table(head, lines)


def error_table(name):
    """Error against direct differentiation of the same iteration, as markdown."""
    head = ['gradient']
    for factor in FACTORS:
        first = f'radius {radius(name, factor):.2f}: float64'
        head += [first, 'float32', 'bfloat16', 'bfloat16, beside float64']
    lines = []
    for row in iterations():
        if row.startswith('unrolled'):
            # Autograd's gradient is what it would be compared with.
            continue
        line = [row]
        for factor in FACTORS:
            errors = [error(name, row, factor, p) for p in PRECISIONS]
            errors.append(error(name, row, factor, 'bfloat16', 'float64', (0,)))
            line += [
                f'{e:.0e}'.replace('e-0', 'e-').replace('0e+00', '0') for e in errors
            ]
        lines.append(line)
    return _table(head, lines)


def main():
    name = golden_names()[0]
    print(quality_table(name), error_table(name), sep='\n\n')


if __name__ == '__main__':
    main()
