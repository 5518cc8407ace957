"Equal rows are found exactly, whatever the hash says; sums are never in less than single precision."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from imecd import core
from imecd.core import same_rows, twins, wide


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 8), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]), st.integers(0, 9))
def test_same_rows_are_those_that_sorting_finds(n, kinds, width, dtype, seed):
    g = torch.Generator().manual_seed(seed); x = torch.randn(kinds, width, generator=g).to(dtype)[torch.randint(0, kinds, (n,), generator=g)]
    v, group = same_rows(x); w, other = x.unique(dim=0, return_inverse=True)
    assert torch.equal(v[group], x) and len(v) == len(w) and torch.equal(group[:, None] == group, other[:, None] == other)
    seen, wanted = {}, []
    for i, k in enumerate(other.tolist()): wanted += [(i, seen[k])] if k in seen else []; seen.setdefault(k, i)
    assert [*zip(*(t.tolist() for t in twins(x)))] == wanted and torch.equal(v, x[[*seen.values()]])


def test_signs_of_zero_are_no_difference(): v, group = same_rows(torch.tensor([[0., 1.], [-0., 1.], [0., -1.]])); assert group[0] == group[1] != group[2] and len(v) == 2


def test_rows_that_differ_are_given_back_as_they_are(): x = torch.randn(50, 3); assert same_rows(x)[0] is x and same_rows(x)[1].tolist() == [*range(50)] and same_rows(x[:0])[0].shape == (0, 3)


def test_a_hash_that_errs_is_found_out(monkeypatch):
    "With equal multipliers the hash is blind for order: all these rows collide. They are compared, so the answer stays exact."
    class Blind:
        def integers(self, high, size): return torch.zeros(size, dtype=torch.long).numpy()
    monkeypatch.setattr(core, 'rng', lambda *_: Blind()); one = torch.randn(5); x = torch.stack([one[torch.randperm(5)] for _ in range(200)])
    v, group = same_rows(x); assert torch.equal(v[group], x) and len(v) == len(x.unique(dim=0)) > 50


def test_a_row_of_nan_equals_no_other(): x = torch.tensor([[1., torch.nan], [1., torch.nan], [1., 2.]]); v, group = same_rows(x); assert len(v) == 3 == len(set(group.tolist()))


@pytest.mark.parametrize('dtype, wanted', [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_wide(dtype, wanted): assert wide(torch.ones(2, dtype=dtype)).dtype == wanted
