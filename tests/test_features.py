"Features: what is refused, what is kept, and the real matrices and codes."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imecd.core import ImecdError, rng
from imecd.features import (CODE_WIDTH, Vectors, code_columns, describe, from_codes, from_npy, join_features, load_array, load_codes,
                            plot_map, plot_missing, project, reduce_width, save_features)

DATA = Path(os.environ.get('IMECD_DATA', 'data'))


def real(name):
    "A real data folder, or a skip that says why."
    if not (DATA/name/'items.parquet').exists(): pytest.skip(f'$IMECD_DATA/{name} is not here')
    return DATA/name


def source(n=6, width=4, **kw):
    "A source of random rows."
    return Vectors(rng(0, n, width).normal(size=(n, width)).astype(kw.pop('dtype', np.float32)), np.ones(n, bool), describe('random', **kw))


IDS = [f'i{k}' for k in range(6)]


@pytest.mark.parametrize('dtype', ['<f2', '<f4', '<f8', '>f4'])
def test_any_float_becomes_float32(dtype):
    f = join_features(IDS, source(dtype=dtype))
    assert f.text.dtype == np.float32 and f.text.shape == (7, 4) and not f.text[0].any() and not f.present[0].any()
    assert f.image is None and not f.present[:, 1].any() and f.manifest['image'] is None


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 1e300])
def test_a_row_that_is_not_finite_is_named(value):
    s = source(); x = s.values.astype(np.float64); x[3, 1] = value
    with pytest.raises(ImecdError, match=r"row 3 \(item 'i3'\)"): join_features(IDS, s._replace(values=x))
    mask = np.ones(6, bool); mask[3] = False
    f = join_features(IDS, s._replace(values=x, present=mask))
    assert not f.text[4].any() and not f.present[4, 0] and f.manifest['text']['missing'] == 1


@pytest.mark.parametrize('x', [np.zeros((6, 0)), np.zeros(6), np.zeros((6, 4), int), np.zeros((6, 4), complex), np.zeros((6, 2, 2)),
                               np.full((6, 4), 'x'), np.zeros(6, dtype=[('a', 'f4')])])
def test_other_shapes_and_kinds_are_refused(x):
    with pytest.raises(ImecdError, match='floats of shape'): join_features(IDS, Vectors(x, np.ones(6, bool), describe('odd')))


def test_counts_masks_and_zero_rows():
    with pytest.raises(ImecdError, match='has 5 rows, items.parquet has 6'): join_features(IDS, source(5))
    for mask in (np.ones(5, bool), np.ones(6, int), np.ones((6, 1), bool)):
        with pytest.raises(ImecdError, match='mask'): join_features(IDS, source()._replace(present=mask))
    s = source(); s.values[2] = 0
    assert join_features(IDS, s).present[:, 0].tolist() == [False, True, True, False, True, True, True]


def test_hash_knows_ids_order_numbers_and_mask():
    base = join_features(IDS, source()).hash
    assert base == join_features(list(IDS), source()).hash
    mask = np.ones(6, bool); mask[5] = False
    others = [join_features(IDS[::-1], source()), join_features(IDS, None, source()), join_features(IDS, source()._replace(present=mask)),
              join_features(IDS, source()._replace(values=np.nextafter(source().values, 9)))]
    assert len({base, *(f.hash for f in others)}) == 5


def test_saved_and_read_back(tmp_path):
    mask = np.ones(6, bool); mask[1] = False
    f = join_features(IDS, source(), source(width=3)._replace(present=mask))
    save_features(f, tmp_path/'f')
    g = join_features(IDS, *(from_npy(tmp_path/'f', m, IDS) for m in ('text', 'image')))
    assert g.hash == f.hash and (g.image == f.image).all() and (g.present == f.present).all() and g.manifest['text']['encoder'] == 'random'
    assert json.loads((tmp_path/'f'/'features.json').read_text())['items']['ids'] == IDS
    first = {p.name: p.read_bytes() for p in (tmp_path/'f').iterdir()}
    save_features(f, tmp_path/'f')
    assert {p.name: p.read_bytes() for p in (tmp_path/'f').iterdir()} == first
    save_features(join_features(IDS, source()), tmp_path/'f')
    assert sorted(p.name for p in (tmp_path/'f').iterdir()) == ['features.json', 'text_features.npy', 'text_present.npy']


def test_strangers_files_and_ids(tmp_path):
    np.save(tmp_path/'text_features.npy', source().values)
    f = join_features(IDS, from_npy(tmp_path, 'text', IDS))
    assert f.manifest['text']['encoder'] == 'unknown' and f.manifest['text']['file'] == 'text_features.npy'
    with pytest.raises(ImecdError, match='would be overwritten'): save_features(f, tmp_path)
    save_features(f, tmp_path/'f')
    for ids, row, found in ((['i0', 'x', *IDS[2:]], 1, "'i1'"), (IDS[:4], 4, "'i4'"), ([*IDS, 'new'], 6, 'the end')):
        with pytest.raises(ImecdError, match=f'row {row}: expected .* found {found}'): from_npy(tmp_path/'f', 'text', ids)
    np.save(tmp_path/'f'/'text_features.npy', source().values + 1)
    with pytest.raises(ImecdError, match='not the file that features.json describes'): join_features(IDS, from_npy(tmp_path/'f', 'text', IDS))
    for text in ('[]', '{"text": {"width": 3}}', '{', '{"schema": 1, "text": 3, "items": {"ids": []}}', '{"schema": 2, "items": {"ids": []}}'):
        (tmp_path/'f'/'features.json').write_text(text)
        with pytest.raises(ImecdError, match='features.json is no'): from_npy(tmp_path/'f', 'text', IDS)
        with pytest.raises(ImecdError, match='features.json is no'): save_features(f, tmp_path/'f')


def test_masks_beside_the_matrix(tmp_path):
    np.save(tmp_path/'image_features.npy', source().values)
    np.save(tmp_path/'image_present.npy', np.array([1, 1, 0, 1, 1, 1], bool))
    assert from_npy(tmp_path, 'image', IDS).present.sum() == 5
    for wrong in (np.ones(5, bool), np.ones(6, np.int8), np.ones((6, 2), bool)):
        np.save(tmp_path/'image_present.npy', wrong)
        with pytest.raises(ImecdError, match='image_present.npy is'): from_npy(tmp_path, 'image', IDS)


@pytest.mark.parametrize('data', [b'', b'hello', b'\x93NUMPY', b'PK\x03\x04junk', b'\x80\x04K\x01.'])
def test_files_that_are_no_arrays(tmp_path, data):
    (tmp_path/'x.npy').write_bytes(data)
    with pytest.raises(ImecdError, match='x.npy is not a numpy array'): load_array(tmp_path/'x.npy')


def test_archive_pickle_missing_and_folder(tmp_path):
    np.savez(tmp_path/'x.npz', a=np.ones(3)); (tmp_path/'x.npz').rename(tmp_path/'x.npy')
    with pytest.raises(ImecdError, match='not a numpy array'): load_array(tmp_path/'x.npy')
    np.save(tmp_path/'y.npy', np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(ImecdError, match='not a numpy array'): load_array(tmp_path/'y.npy')
    with pytest.raises(ImecdError, match='is not there'): load_array(tmp_path/'z.npy')
    with pytest.raises(ImecdError): load_array(tmp_path)


def naive_columns(codes):
    "Levels, and prefixes that two items share, by a dictionary."
    n, levels = codes.shape
    keys = [{('level', j, c[j]) for j in range(levels) if c[j] >= 0} | {tuple(c[:j+1]) for j in range(1, levels) if (c[:j+1] >= 0).all()}
            for c in codes]
    count = {k: sum(k in s for s in keys) for k in set().union(*keys)}
    kept = sorted((k for k in count if k[0] == 'level' or count[k] > 1), key=str)
    return np.array([[k in s for k in kept] for s in keys], int)


def test_codes_equal_a_dictionary():
    codes = rng(0, 'codes').integers(-1, 4, size=(60, 4))
    x, y = from_codes(codes), naive_columns(codes)
    assert x.shape == y.shape and np.array_equal(x @ x.T, y @ y.T)
    assert np.array_equal(np.sort(x.sum(0)), np.sort(y.sum(0)))
    z = from_codes(codes, width=1000)
    assert np.allclose(z @ z.T, y @ y.T, atol=1e-3) and np.array_equal(z.any(1), (codes >= 0).any(1))


@pytest.mark.parametrize('codes', [np.zeros(4, int), np.zeros((3, 4)), np.full((3, 4), -1), np.full((2, 2), 'a'), np.zeros((0, 4), int)])
def test_codes_that_cannot_be_used(codes):
    with pytest.raises(ImecdError, match='codes'): from_codes(codes)


def test_codes_of_every_integer_type_agree(tmp_path):
    codes = rng(1, 'codes').integers(0, 9, size=(6, 4))
    same = {from_codes(codes.astype(t)).tobytes() for t in (np.int8, np.int16, np.int64, np.uint8, '>i4')}
    assert len(same) == 1
    np.save(tmp_path/'text_codes.npy', codes)
    assert load_codes(tmp_path, 'text', IDS).present.all()
    with pytest.raises(ImecdError, match='has 6 rows, items.parquet has 2'): load_codes(tmp_path, 'text', IDS[:2])
    np.save(tmp_path/'text_codes.npy', np.float32(3))
    with pytest.raises(ImecdError): load_codes(tmp_path, 'text', IDS[:1])


def test_reduction_is_repeatable_and_signed():
    x = rng(0, 'x').normal(size=(80, 30)).astype(np.float32)
    a, b = reduce_width(x, 8), reduce_width(x, 8)
    assert np.array_equal(a, b) and a.shape == (80, 8)
    assert np.allclose(reduce_width(-x, 8), -a, atol=1e-4) or np.allclose(reduce_width(-x, 8), a, atol=1e-4)
    assert np.allclose(np.linalg.svd(x, compute_uv=False)[:3], np.linalg.norm(reduce_width(x, 20), axis=0)[:3], rtol=1e-2)
    with pytest.raises(ImecdError, match='at least one'): reduce_width(x, 0)
    low = x[:, :6]@x[:6]; later = reduce_width(low, 6, later=low[:3]); assert np.array_equal(later[:80], reduce_width(low, 6)) and np.allclose(later[80:], later[:3], atol=1e-3)


def test_maps(monkeypatch):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    x = rng(0, 'map').normal(size=(40, 5))
    assert np.array_equal(project(x), project(x)) and project(x[:, :1]).shape == (40, 2) and not project(np.ones((5, 3))).any()
    for bad in (x[:2], x[0]):
        with pytest.raises(ImecdError, match='at least three'): project(bad)
    with pytest.raises(ImecdError, match='use pca or umap'): project(x, method='tsne')
    monkeypatch.setitem(__import__('sys').modules, 'umap', None)
    with pytest.raises(ImecdError, match='umap-learn'): project(x, method='umap')
    ax = plot_map(project(x), [f'$kind_{k % 12}' for k in range(40)])
    assert ax.get_legend().get_texts()[0].get_text() == '5 others'
    plot_map(project(x), [None]*40, plot_missing(np.zeros((7, 2), bool)))
    plot_missing(np.zeros((1, 2), bool)); plt.close('all')


@pytest.mark.real
@pytest.mark.parametrize('name, modality, items, columns', [('amazon18_instruments', 'text', 6250, 2678), ('amazon18_instruments', 'image', 6250, 2377),
                                                           ('amazon18_games', 'text', 16859, 5169)])
def test_real_codes(name, modality, items, columns):
    folder = real(name)
    assert code_columns(np.load(folder/f'{modality}_codes.npy').astype(int)).shape == (items, columns)
    s = load_codes(folder, modality, [str(k) for k in range(items)])
    assert s.values.shape == (items, CODE_WIDTH) and s.present.all() and np.isfinite(s.values).all()


@pytest.mark.real
@pytest.mark.parametrize('name, items, width', [('amazon14_toys', 11924, 384), ('amazon18_office', 2350, 384), ('ml1m', 3412, 384)])
def test_real_matrices(name, items, width):
    ids = [str(k) for k in range(items)]
    f = join_features(ids, from_npy(real(name), 'text', ids))
    assert f.text.shape == (items+1, width) and f.present[1:, 0].all()
    assert np.allclose(np.linalg.norm(f.text[1:], axis=1), 1, atol=1e-2)


@pytest.mark.parametrize('width', [16, 64])
def test_reduced_vectors_do_not_depend_on_threads(width):
    "A run that was trained on one thread is loaded on two: its features are known by their hash."
    code = f'import numpy as np; from imecd.core import digest; from imecd.features import from_codes; print(digest(from_codes(np.random.default_rng(0).integers(0, 40, (3000, 4)), width={width})))'
    told = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, **{k: str(n) for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS')}}).stdout for n in (1, 2)}
    assert len(told) == 1 and len(told.pop().strip()) == 64
