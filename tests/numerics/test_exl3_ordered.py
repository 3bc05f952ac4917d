"""Products and factors of the EXL3 search: the same bits with any number of threads, and those of linear algebra."""

import pytest
import torch
from gemma4q_kernels.exl3 import quantize_linear
from gemma4q_kernels.exl3.ordered import cholesky, product
from tolerances import EXL3_ORDERED


@pytest.fixture
def with_threads():
    """A function's result with that many threads of torch."""
    before = torch.get_num_threads()

    def call(count, function, *arguments):
        torch.set_num_threads(count)
        found = function(*arguments)
        assert torch.get_num_threads() == count
        return found

    yield call
    torch.set_num_threads(before)


def moments(size):
    inputs = torch.randn(size + 100, size)
    return inputs.T @ inputs / size


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (16, 100, 700), (128, 900, 1300)])
def test_product(with_threads, rows, inner, columns):
    left, right = torch.randn(inner, rows).T, torch.randn(inner, columns)
    one, *others = (with_threads(count, product, left, right) for count in (1, 2, 3))
    assert all(torch.equal(one, other) for other in others)
    exact = left.double() @ right.double()
    assert (one - exact).norm() < EXL3_ORDERED * exact.norm()
    assert (1.1 * one - exact).norm() > EXL3_ORDERED * exact.norm()


@pytest.mark.parametrize("size", [16, 512, 1200])
def test_factor(with_threads, size):
    matrix = moments(size)
    one, *others = (with_threads(count, cholesky, matrix.clone()) for count in (1, 2, 3))
    assert all(torch.equal(one, other) for other in others)
    assert torch.equal(one, one.tril())
    again, wrong = (root.double() @ root.double().T for root in (one, 1.1 * one))
    assert (again - matrix).norm() < EXL3_ORDERED * matrix.norm() < (wrong - matrix).norm()


@pytest.mark.parametrize("place", [0, 700])
def test_no_factor(with_threads, place):
    matrix = moments(1000)
    matrix[place, place] = -1
    assert with_threads(2, cholesky, matrix) is None


@pytest.mark.slow
def test_a_linear_is_the_same_with_any_number_of_threads(with_threads):
    """Errors that are reported, too: with torch's own products they were not at this size."""
    weight, hessian = torch.randn(128, 1024), moments(1024)
    found = [with_threads(count, quantize_linear, weight, hessian, 1) for count in (1, 3)]
    assert torch.equal(found[0].weight.trellis, found[1].weight.trellis)
    assert torch.equal(found[0].weight.suh, found[1].weight.suh)
    assert (found[0].nmse, found[0].proxy) == (found[1].nmse, found[1].proxy)
