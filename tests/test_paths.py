"Paths: ranks, maps and pictures of what a sampler did, on plain data."
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from imecd.core import ImecdError
from imecd.paths import closest, cosines, effective_rank, fit_map, likeness, plot_pair, plot_ranks, plot_trajectory, ranks_by_step

few = settings(deadline=None, max_examples=15)


class Seen(NamedTuple):
    "As little of a step as the pictures need."
    t: int
    x_t: torch.Tensor
    x0: torch.Tensor


def walk(n, rows=3, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [Seen(n-i, torch.randn(rows, width, generator=g), torch.randn(rows, width, generator=g)) for i in range(n)]


def table(n=20, width=6):
    items = torch.randn(n+1, width, generator=torch.Generator().manual_seed(1)); items[0] = 0
    return items


@few
@given(st.integers(1, 5), st.integers(1, 6))
def test_ranks_are_those_of_a_sort(n, rows):
    items, steps = table(), walk(n, rows); targets = torch.randint(1, 21, (rows,), generator=torch.Generator().manual_seed(rows)); found = ranks_by_step(steps, items, targets)
    assert found.shape == (n, rows)
    for step, ranks in zip(steps, found):
        order = closest(step.x0, items, 20)
        assert ranks.tolist() == [order[r].tolist().index(int(y))+1 for r, y in enumerate(targets)]


def test_ties_take_the_middle_and_pad_never_ranks():
    items = torch.ones(11, 4); found = ranks_by_step([Seen(1, torch.ones(2, 4), torch.ones(2, 4))], items, torch.tensor([1, 10]))
    assert found.tolist() == [[5.5, 5.5]] and (cosines(torch.ones(2, 4), items)[:, 0] == -torch.inf).all()


def test_map_is_a_plane():
    x = table(200, 12)[1:]; view = fit_map(x); places = view.place(x)
    assert torch.allclose(view.axes.T@view.axes, torch.eye(2), atol=1e-5) and torch.allclose(places.mean(0), torch.zeros(2), atol=1e-5)
    assert places[:, 0].var() >= places[:, 1].var() and torch.allclose(places[:, 0]@places[:, 1], torch.tensor(0.), atol=1e-3)
    assert torch.allclose(fit_map(3*x).place(5*x), places, atol=1e-5) and fit_map(x, centred=False).centre.abs().sum() == 0
    assert torch.allclose(fit_map(x.flip(0)).place(x), places, atol=1e-4)


@few
@given(st.integers(2, 9), st.integers(1, 7), st.integers(0, 99))
def test_likeness_is_the_mean_over_pairs(rows, width, seed):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)); pairs = [float(F.cosine_similarity(x[i], x[j], dim=0)) for i in range(rows) for j in range(rows) if i != j]
    assert abs(likeness(x)-sum(pairs)/len(pairs)) < 1e-5 and 1-1e-6 <= effective_rank(x) <= min(rows, width)+1e-6


@pytest.mark.parametrize('call, cure', [(lambda: closest(torch.ones(1, 6), table(), 21), 'ask for 1 to 20'), (lambda: closest(torch.ones(1, 6), table(), 0), 'ask for 1 to 20'),
                                        (lambda: likeness(torch.ones(1, 3)), 'at least two'), (lambda: fit_map(torch.ones(1, 3)), 'at least two'), (lambda: fit_map(torch.ones(3, 1)), 'at least two')])
def test_mistakes_name_their_cure(call, cure):
    with pytest.raises(ImecdError) as e: call()
    assert cure in str(e.value)


@pytest.mark.parametrize('n', [1, 2, 8, 32])
def test_trajectory_of_any_length(n):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    items = table(); titles = ['', *(f'$item {i} with a name that goes on and on' for i in range(20))]
    for kw in ({}, {'titles': titles, 'row': 2, 'target': 5, 'view': fit_map(items[1:]), 'top': 3}):
        ax = plot_trajectory(walk(n), items, **kw); ax.figure.canvas.draw()
        told = [t.get_text() for t in ax.texts]; assert len(told) == min(n, 8) and told[0].startswith(f't = {n}:') and told[-1].startswith('t = 1:')
        assert all(len(line) < 100 for line in told)
    own = plt.subplots()[1]; assert plot_trajectory(walk(n), items, ax=own) is own; plt.close('all')


def test_other_pictures():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    for ax in (plot_ranks(torch.tensor([[1., 5.], [2., 2.]]), [2, 1], 20), plot_ranks(torch.ones(1, 1), [1], 20), plot_pair({'a': torch.zeros(3, 2), 'b': torch.ones(1, 2)}, torch.randn(9, 2))):
        assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc='left')
    plt.close('all')
