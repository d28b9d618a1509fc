import pytest
import torch

from mdeq_mm.implicit import Equation, hutchinson, spectral_radius
from tests.helpers import matrix, relative, tanh


def jacobians(equation, z):
    """The Jacobian of each sample, (N, D, D)."""
    full = torch.autograd.functional.jacobian(equation, z)
    return torch.stack([full[i, :, i] for i in range(len(z))])


@pytest.fixture
def equation():
    return tanh(3, 6)


@pytest.fixture
def z():
    return torch.randn(3, 6).double()


class TestHutchinson:
    def test_value(self, equation, z):
        probe = torch.randn(3, 6).double()
        j = jacobians(equation, z)
        expected = sum((probe[i] @ j[i]).square().sum() for i in range(3)) / 18
        found = hutchinson(equation, z, probe)
        torch.testing.assert_close(found, expected)
        assert found.shape == ()

    def test_several_probes_are_averaged(self, equation, z):
        probes = torch.randn(4, 3, 6).double()
        expected = torch.stack([hutchinson(equation, z, p) for p in probes]).mean()
        torch.testing.assert_close(hutchinson(equation, z, probes), expected)

    def test_estimates_the_frobenius_norm(self, equation, z):
        probes = torch.randn(20000, 3, 6).double()
        expected = jacobians(equation, z).square().sum() / z.numel()
        with torch.no_grad():
            found = hutchinson(equation, z, probes)
        assert found.item() == pytest.approx(expected.item(), rel=0.02)

    def test_gradient_of_the_tensors_at_a_fixed_point(self, equation, z):
        probe = torch.randn(3, 6).double()
        w, x = equation.tensors
        z.requires_grad_()
        found = torch.autograd.grad(
            hutchinson(equation, z, probe), (w, x, z), allow_unused=True
        )
        assert found[2] is None
        slope = 1 - torch.tanh(z.detach() @ w.T + x).square()
        product = (probe * slope) @ w
        expected = torch.autograd.grad(product.square().sum() / 18, (w, x))
        assert relative(found[0], expected[0]) < 1e-10
        assert relative(found[1], expected[1]) < 1e-10

    def test_without_gradients(self, equation, z):
        probe = torch.randn(2, 3, 6).double()
        with torch.no_grad():
            found = hutchinson(equation, z, probe)
        assert not found.requires_grad
        assert found.item() == pytest.approx(hutchinson(equation, z, probe).item())

    def test_probes_come_from_the_generator(self, equation, z):
        def draw(seed):
            return hutchinson(
                equation, z, generator=torch.Generator().manual_seed(seed)
            ).item()

        assert draw(1) == draw(1)
        assert draw(1) != draw(2)


class TestSpectralRadius:
    def test_of_a_matrix(self):
        a = matrix(5, 0.7)
        equation = Equation(lambda z, t: z @ a.T)
        found = spectral_radius(equation, torch.zeros(4, 5).double(), 400)
        assert found.tolist() == pytest.approx([0.7] * 4, rel=2e-2)

    def test_of_a_complex_pair(self):
        # A rotation: its eigenvalues are 0.8 exp(+-i).
        angle = torch.tensor(1.0).double()
        a = 0.8 * torch.stack(
            [
                torch.stack([angle.cos(), -angle.sin()]),
                torch.stack([angle.sin(), angle.cos()]),
            ]
        )
        equation = Equation(lambda z, t: z @ a.T)
        found = spectral_radius(equation, torch.zeros(2, 2).double())
        assert found.tolist() == pytest.approx([0.8, 0.8], rel=1e-6)

    def test_each_sample_has_its_own(self, equation, z):
        found = spectral_radius(equation, z, 600)
        largest = torch.linalg.eigvals(jacobians(equation, z)).abs().amax(1)
        assert found.tolist() == pytest.approx(largest.tolist(), rel=2e-2)

    def test_of_nothing(self):
        equation = Equation(lambda z, t: 0 * z)
        assert spectral_radius(equation, torch.ones(2, 3)).max() < 1e-30

    def test_records_nothing(self, equation, z):
        assert not spectral_radius(equation, z).requires_grad
        with torch.no_grad():
            assert spectral_radius(equation, z).isfinite().all()

    def test_very_few_iterations(self, equation, z):
        assert spectral_radius(equation, z, 1).isfinite().all()
