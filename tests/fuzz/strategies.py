"""Random valid configurations of a backbone, small enough for dense algebra."""

import math

from hypothesis import strategies as st

#: Most numbers in one sample's state.
MOST = 240

EXACT = dict(tol=1e-12)
GRADIENTS = (
    'ImplicitGradient',
    'PhantomGradient',
    'UnrolledGradient',
    'ReversibleGradient',
    'SharedInverseGradient',
)


def shares(least=0.3):
    """Numbers in (0, 1], of which 1 is a special case of most options."""
    return st.just(1.0) | st.floats(least, 1.0)


def seeds():
    return st.integers(0, 2**31 - 1)


# Solvers


def picard(**limits):
    return st.fixed_dictionaries(
        dict(type=st.just('PicardSolver'), damping=shares(0.6)) | limits
    )


def anderson(**limits):
    return st.fixed_dictionaries(
        dict(
            type=st.just('AndersonSolver'),
            memory=st.integers(1, 6),
            ridge=st.sampled_from([1e-10, 1e-6, 1e-3, 1.0]),
            mixing=shares(0.6),
        )
        | limits
    )


def broyden(**limits):
    return st.fixed_dictionaries(
        dict(type=st.just('BroydenSolver'), memory=st.none() | st.integers(1, 12))
        | limits
    )


def solvers(kinds=(picard, anderson, broyden), norms=('rel', 'abs')):
    """Forward solvers that may stop anywhere, at the limit or at the tolerance."""
    limits = dict(
        max_steps=st.integers(1, 25),
        tol=st.sampled_from([0, 1e-12, 1e-8, 1e-3, 1]),
        norm=st.sampled_from(norms),
        drop_finished=st.sampled_from([None, True, False]),
        check_every=st.integers(1, 5),
    )
    return st.one_of([kind(**limits) for kind in kinds])


def exact_solvers():
    """Solvers that go down to rounding on a contractive map."""
    limits = dict(
        max_steps=st.just(150),
        norm=st.just('rel'),
        drop_finished=st.sampled_from([None, False]),
        check_every=st.integers(1, 3),
    ) | {key: st.just(value) for key, value in EXACT.items()}
    return st.one_of(picard(**limits), anderson(**limits), broyden(**limits))


# Gradients


def implicit():
    return st.fixed_dictionaries(
        dict(
            type=st.just('ImplicitGradient'),
            solver=exact_solvers(),
            warm_start=st.booleans(),
        )
    )


def phantom(unroll=None):
    return st.fixed_dictionaries(
        dict(
            type=st.just('PhantomGradient'),
            steps=st.integers(1, 6),
            damping=shares(),
            unroll=st.booleans() if unroll is None else st.just(unroll),
        )
    )


def unrolled():
    return st.fixed_dictionaries(
        dict(
            type=st.just('UnrolledGradient'),
            steps=st.integers(1, 6),
            damping=shares(),
        )
    )


@st.composite
def reversible(draw, digits=9.0):
    """Up to the digits that may be lost."""
    beta = draw(st.floats(0.2, 0.95))
    most = int(digits / math.log10(1 / (1 - beta)))
    return dict(
        type='ReversibleGradient',
        steps=draw(st.integers(1, max(1, min(most, 12)))),
        beta=beta,
    )


def shared_inverse():
    return st.fixed_dictionaries(
        dict(
            type=st.just('SharedInverseGradient'),
            limit=st.sampled_from([1e-6, 0.01, 0.03, 0.06, 0.1, 0.2, 1.0]),
            fallback=exact_solvers() | st.none(),
        )
    )


# Architectures and images


def sides(arch, size):
    """Height and width of each branch."""
    for _ in range(arch['downsample_times']):
        size = tuple(-(-side // 2) for side in size)
    found = []
    for _ in arch['channels']:
        found.append(size)
        size = tuple(-(-side // 2) for side in size)
    return found


def dimension(arch, size):
    """Numbers in one sample's state."""
    pairs = zip(arch['channels'], sides(arch, size), strict=True)
    return sum(c * height * width for c, (height, width) in pairs)


@st.composite
def arches(draw):
    branches = draw(st.integers(2, 4))
    groups = draw(st.sampled_from([2, 2, 4] if branches < 4 else [2]))
    several = st.lists(
        st.integers(1, 3 if branches < 4 else 2).map(lambda k: k * groups),
        min_size=branches,
        max_size=branches,
    )
    blocks = st.lists(st.integers(1, 2), min_size=branches, max_size=branches)
    return dict(
        channels=draw(several | several.map(tuple)),
        num_blocks=draw(st.none() | blocks),
        num_groups=groups,
        expansion=draw(st.integers(1, 2)),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.5])),
        injection=draw(st.sampled_from(['all', 'first'])),
        downsample_times=draw(st.integers(0, 3)),
        post_gn_affine=draw(st.booleans()),
        weight_norm=draw(st.booleans()),
    )


@st.composite
def sizes(draw, arch):
    """Odd and non-square ones too, down to the smallest of the architecture."""
    least = 2 ** (arch['downsample_times'] + len(arch['channels']) - 1)
    side = st.integers(least, least + max(6, least))
    size = draw(st.tuples(side, side))
    if dimension(arch, size) > MOST:
        size = (least, least)
    if arch['num_groups'] in arch['channels'] and max(size) == least:
        # The lowest resolution has one pixel: a norm of one number would be left.
        size = (least, least + 1)
    return size


@st.composite
def cases(draw, gradients, solver=None, eval_solver=None, contractive=True):
    """A backbone, the images of a training step, and the map they meet.

    Args:
        gradients (SearchStrategy): Config of the gradient.
        solver (SearchStrategy, optional): Config of the forward solver. Default:
            any.
        eval_solver (SearchStrategy, optional): Of the evaluation, beside none.
            Default: any.
        contractive (bool | None): Whether f is made contractive; None tries both.
    """
    arch = draw(arches())
    branches = len(arch['channels'])
    indices = st.lists(
        st.integers(0, branches - 1), min_size=1, max_size=branches, unique=True
    )
    if contractive is None:
        contractive = draw(st.booleans())
    gradient = draw(gradients)
    if gradient['type'] == 'ReversibleGradient' and not contractive:
        # The Jacobian of f multiplies errors on the way back too.
        gradient['steps'] = min(gradient['steps'], 3)
    # Where everything is frozen, the layer evaluates: it needs an equilibrium.
    frozen = [-1, -1, -1, 0, 1] + [2] * contractive
    size = draw(sizes(arch))
    # A batch norm of the lowest injection needs more than one number a channel.
    single = arch['injection'] == 'all' and sides(arch, size)[-1] == (1, 1)
    return dict(
        model=dict(
            arch=arch,
            in_channels=draw(st.integers(1, 4)),
            out_indices=draw(st.none() | indices | indices.map(tuple)),
            drop_rate=draw(st.sampled_from([None, None, 0.0, 0.3])),
            solver=draw(solvers() if solver is None else solver),
            eval_solver=draw(
                st.none() | (solvers() if eval_solver is None else eval_solver)
            ),
            gradient=gradient,
            norm_cfg=draw(
                st.sampled_from([dict(type='BN'), dict(type='GN', num_groups=2)])
            ),
            # Equilibria as they are, which is what plain algebra finds.
            out_norm_cfg=None,
            norm_eval=draw(st.booleans()),
            frozen_stages=draw(st.sampled_from(frozen)),
            with_cp=draw(st.booleans()),
        ),
        size=size,
        batch=draw(st.integers(2 if single else 1, 4)),
        contraction=draw(st.sampled_from([0.1, 0.3])) if contractive else None,
        channels_last=draw(st.booleans()),
        seed=draw(seeds()),
    )
