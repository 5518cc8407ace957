"Equal rows are found exactly, whatever the hash says; sums are never in less than single precision."
import contextlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from imecd import core
from imecd.core import same_rows, twins, whole, whole_folder, wide


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


@pytest.mark.parametrize('hand', [whole, whole_folder])
def test_an_interrupt_at_any_instruction_leaves_nothing_or_everything(hand, tmp_path):
    "Between the making of a temporary name and the block that removes it, Ctrl-C once left it behind."
    made, ours = tmp_path/'made', hand.__wrapped__.__code__

    def written(n):
        "Whether all was written before the n-th instruction."
        left = [n]
        def step(frame, event, _):
            left[0] -= event == 'opcode'
            if left[0] < 0: raise KeyboardInterrupt
            return step
        def enter(frame, *_):
            if frame.f_code is not ours and frame.f_code.co_filename != contextlib.__file__: return None
            frame.f_trace_opcodes = True; return step
        before = sys.gettrace(); sys.settrace(enter)
        try:
            with hand(made) as part: (part if hand is whole else part/'told').write_text('all')
        except KeyboardInterrupt: return False
        finally: sys.settrace(before)
        return True

    ends = []
    for n in range(10_000):
        done = written(n); found = [*tmp_path.iterdir()]; ends.append(len(found)); assert found in ([], [made]) and (found or not done), n
        for path in found: file = path if hand is whole else path/'told'; assert file.read_text() == 'all'; file.unlink(); hand is whole or path.rmdir()
        if done: break
    assert done and n > 100 and 0 in ends[1:-1]


def test_numpys_random_numbers_are_there_before_work_begins():
    "Numpy loads them when they are first asked for, and an interrupt in that moment was swallowed: a shop was made in spite of Ctrl-C."
    subprocess.run([sys.executable, '-c', "import sys, imecd.core; sys.exit('numpy.random' not in sys.modules)"], check=True)
