import pytest
import torch

from fed.numerics import joint_basis as space
from fed.numerics.weighted_mean import shares
from tests.conftest import near

SEEDS = [0, 1, 2]


def draw(seed, *shapes, dtype=torch.float64):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def orthonormal(seed, rows, columns):
    return torch.linalg.qr(draw(seed, (rows, columns))[0]).Q


def eye_error(u):
    return (u.T @ u - torch.eye(u.shape[1], dtype=u.dtype)).abs().max()


def projector(u):
    return u @ u.T


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(6, 9), (20, 3), (20, 10)])  # stack wide, tall, square
def test_joint_basis_is_the_left_basis_of_the_stack(seed, shape):
    mats, p = draw(seed, shape, shape), [0.3, 0.7]
    basis = space.joint_basis(mats, p)
    left, values, _ = torch.linalg.svd(
        torch.cat([w**0.5 * m for w, m in zip(p, mats, strict=True)], 1), full_matrices=False
    )
    assert basis.how == "exact"
    assert eye_error(basis.vectors) < 1e-12
    torch.testing.assert_close(basis.energies, values.square())
    torch.testing.assert_close(
        (basis.vectors * left).sum(0).abs(), torch.ones(len(values)).double()
    )
    assert basis.total == pytest.approx(float(values.square().sum()))
    for m in mats:  # every direction is kept
        torch.testing.assert_close(projector(basis.vectors) @ m, m)


@pytest.mark.parametrize("seed", SEEDS)
def test_energy_keeps_the_fewest_directions_that_hold_it(seed):
    mats, p = draw(seed, (12, 8), (12, 8), (12, 8)), [0.2, 0.3, 0.5]
    whole = space.joint_basis(mats, p)
    for energy in (0.1, 0.5, 0.9, 0.999):
        basis = space.joint_basis(mats, p, energy=energy)
        kept = basis.energies.sum() / basis.total
        assert kept >= energy > kept - basis.energies[-1] / basis.total
        torch.testing.assert_close(basis.energies, whole.energies[: len(basis.energies)])
    assert space.joint_basis(mats, p, energy=0.9, rank=2).vectors.shape == (12, 2)
    assert space.joint_basis(mats, p, rank=100).vectors.shape == (12, 12)


def test_nothing_moved():
    for shape in [(4, 9), (9, 2)]:
        basis = space.joint_basis([torch.zeros(shape)] * 2, [0.5, 0.5], energy=0.9)
        assert basis.total == 0
        assert basis.vectors.shape[1] == 1
        assert eye_error(basis.vectors) < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_range_finder_finds_the_leading_directions(seed):
    left = orthonormal(seed, 200, 60)
    decay = 0.8 ** torch.arange(60).double()
    mats = [left * decay @ m for m in draw(seed, (60, 90), (60, 90))]
    exact = space.joint_basis(mats, [0.5, 0.5], rank=8)
    fast = space.joint_basis(mats, [0.5, 0.5], rank=8, how="randomised")
    assert fast.how == "randomised"
    assert eye_error(fast.vectors) < 1e-12
    torch.testing.assert_close(fast.energies, exact.energies, rtol=1e-6, atol=0)
    torch.testing.assert_close(projector(fast.vectors), projector(exact.vectors), atol=1e-4, rtol=0)
    again = space.joint_basis(mats, [0.5, 0.5], rank=8, how="randomised")
    assert torch.equal(fast.vectors, again.vectors)


def test_how_is_chosen_by_size():
    wide = [torch.randn(1100, 1200)]
    assert space.joint_basis(wide, [1.0], rank=16).how == "randomised"
    small = [torch.randn(100, 1200)]
    assert space.joint_basis(small, [1.0], rank=16).how == "exact"


def test_random_numbers_elsewhere_are_untouched():
    torch.manual_seed(5)
    space.joint_basis([torch.ones(30, 30)], [1.0], rank=2, how="randomised")
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("seed", SEEDS)
def test_polar_is_the_nearest_orthonormal(seed):
    (m,) = draw(seed, (9, 4))
    u = space.polar(m)
    assert eye_error(u) < 1e-12
    stretch = u.T @ m
    torch.testing.assert_close(stretch, stretch.T)
    assert torch.linalg.eigvalsh(stretch).min() > 0
    assert eye_error(space.polar(m.T).T) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_procrustes_undoes_a_rotation_within_the_span(seed):
    u = orthonormal(seed, 10, 4)
    torch.testing.assert_close(space.align(u @ orthonormal(seed + 9, 4, 4), u, "procrustes"), u)


@pytest.mark.parametrize("seed", SEEDS)
def test_signs_undo_order_and_signs_and_no_more(seed):
    u = orthonormal(seed, 10, 5)
    shuffled = u[:, torch.randperm(5)] * torch.tensor([1, -1, -1, 1, -1])
    torch.testing.assert_close(space.align(shuffled, u, "signs"), u)
    other = orthonormal(seed + 9, 10, 5)
    aligned = space.align(other, u, "signs")
    same = (other.T @ aligned).abs()
    torch.testing.assert_close(same.sum(0), torch.ones(5).double())
    assert (same > 1e-9).sum() == 5
    assert ((aligned * u).sum(0) >= 0).all()


def test_signs_pair_the_nearest_first():
    cosines = torch.tensor([[0.9, -0.95, 0.1], [0.8, 0.1, 0.0], [0.7, 0.9, -0.3]])
    found = space.align(torch.eye(3), cosines, "signs")  # with the identity, U is its own cosines
    assert found.tolist() == [[0, -1, 0], [1, 0, 0], [0, 0, -1]]


@pytest.mark.parametrize("how", ["procrustes", "signs"])
def test_alignment_of_another_rank(how):
    u = orthonormal(0, 10, 5)
    more = space.align(u, u[:, :3], how)
    torch.testing.assert_close(more, u[:, :3])
    fewer = space.align(u[:, :3], u, how)
    torch.testing.assert_close(fewer, torch.cat([u[:, :3], 0 * u[:, 3:]], 1))


def test_shares_and_mean():
    assert shares([1, 3, 0]) == near([0.25, 0.75, 0])
    mats = draw(0, (4, 3), (4, 3))
    expected = 0.25 * mats[0] + 0.75 * mats[1]
    torch.testing.assert_close(space.mean_matrix(mats, [0.25, 0.75]), expected)
