import pytest
import torch

from mdeq_mm.implicit import Equation


@pytest.fixture
def equation():
    w, x = torch.randn(4, 4), torch.randn(3, 4)
    return Equation(lambda z, t: z @ t[0] + t[1], (w, x), (False, True))


def test_call(equation):
    z = torch.randn(3, 4)
    w, x = equation.tensors
    assert torch.equal(equation(z), z @ w + x)
    assert torch.equal(equation(z, (2 * w, x)), z @ (2 * w) + x)


@pytest.mark.parametrize(
    'index', [torch.tensor([2, 0]), torch.tensor([True, False, True])], ids=str
)
def test_take(equation, index):
    z = torch.randn(3, 4)
    part = equation.take(index)
    torch.testing.assert_close(part(z[index]), equation(z)[index])
    assert part.tensors[0] is equation.tensors[0]
    assert len(part.tensors[1]) == 2
    assert len(equation.tensors[1]) == 3


def test_bind_leaves_the_first_one_alone(equation):
    w, x = equation.tensors
    bound = equation.bind([w, -x])
    z = torch.zeros(3, 4)
    assert torch.equal(bound(z), -x)
    assert torch.equal(equation(z), x)


def test_finite(equation):
    assert equation.finite().tolist() == [True, True, True]
    equation.tensors[1][1, 2] = torch.nan
    equation.tensors[1][2, 0] = -torch.inf
    assert equation.finite().tolist() == [True, False, False]
    equation.tensors[0][0, 0] = torch.nan
    assert equation.finite().tolist() == [True, False, False]


def test_finite_takes_one_number_a_sample_and_integers():
    tensors = (torch.tensor([1.0, torch.nan]), torch.tensor([3, 4]))
    equation = Equation(lambda z, t: z + t[0][:, None], tensors, (True, True))
    assert equation.finite().tolist() == [True, False]


def test_finite_without_inputs_a_sample():
    assert Equation(lambda z, t: z, (torch.ones(2),)).finite() is None


def test_contained(equation):
    equation.tensors[1][1] = torch.nan
    healthy = torch.tensor([True, False, True])
    out = equation.contained(healthy)(torch.zeros(3, 4))
    assert out.isfinite().all()
    assert torch.equal(out[healthy], equation.tensors[1][healthy])


def test_per_sample_has_to_fit():
    with pytest.raises(ValueError, match='1 entries for 2 tensors'):
        Equation(lambda z, t: z, (torch.ones(1), torch.ones(1)), (True,))


def test_returns_the_type_of_the_state():
    equation = Equation(lambda z, t: z.bfloat16())
    assert equation(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


class TestAutocast:
    """The mode of the moment of construction is part of f."""

    def linear(self):
        seen = []

        def function(z, tensors):
            out = z @ tensors[0]
            seen.append(out.dtype)
            return out

        return function, (torch.randn(4, 4),), seen

    def test_mode_stays_where_it_was_on(self):
        function, tensors, seen = self.linear()
        with torch.autocast('cpu', torch.bfloat16):
            equation = Equation(function, tensors)
        assert equation(torch.ones(2, 4)).dtype == torch.float32
        assert seen == [torch.bfloat16]

    def test_mode_stays_where_it_was_off(self):
        function, tensors, seen = self.linear()
        equation = Equation(function, tensors)
        with torch.autocast('cpu', torch.bfloat16):
            equation(torch.ones(2, 4))
        assert seen == [torch.float32]

    def test_weights_cast_without_gradients_are_not_reused(self):
        weight = torch.randn(4, 4, requires_grad=True)
        with torch.autocast('cpu', torch.bfloat16):
            equation = Equation(lambda z, t: z @ t[0], (weight,))
            with torch.no_grad():
                equation(torch.ones(2, 4))
            equation(torch.ones(2, 4)).sum().backward()
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16])
def test_precision_is_that_of_the_coarsest_tensor(dtype):
    tensors = [torch.ones(2, 3).double(), torch.ones(2, dtype=dtype), torch.arange(2)]
    assert Equation(lambda z, t: z, tensors).precision == dtype


def test_precision_under_autocast_is_its_own_save_for_doubles():
    x = torch.ones(2, 3)
    assert Equation(lambda z, t: z).precision is None
    with torch.autocast('cpu', torch.bfloat16):
        assert Equation(lambda z, t: z, [x]).precision == torch.bfloat16
        assert Equation(lambda z, t: z, [x.double()]).precision == torch.float64
