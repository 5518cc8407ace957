"Words and pictures as they come from strangers."
import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageFile

from imecd.content import (MOST_PIXELS, PICTURE_KINDS, find_pictures, item_text, light_image, light_text, light_vector, load_items,
                           plot_pictures, read_picture, text_fields)
from imecd.core import ImecdError, rng
from imecd.features import join_features

DATA = Path(os.environ.get('IMECD_DATA', 'data'))
RED = Image.new('RGB', (60, 40), 'red')
NOISE = rng(0, 'noise').integers(256, size=(40, 60, 3), dtype=np.uint8)


def as_bytes(im, kind, **kw):
    "A picture in memory."
    out = io.BytesIO(); im.save(out, kind, **kw)
    return out.getvalue()


def png(width, height, bits=8, colour=2):
    "A PNG that claims a size and holds next to nothing."
    chunk = lambda b: struct.pack('>I', len(b)-4) + b + struct.pack('>I', zlib.crc32(b))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR'+struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)) + chunk(b'IDAT'+zlib.compress(b'0')) + chunk(b'IEND')


def exif(orientation):
    "Metadata with a way up."
    e = Image.Exif(); e[0x0112] = orientation
    return e


def half(mode):
    "Left half opaque red, right half fully transparent."
    x = np.zeros((40, 60, 4), np.uint8); x[:, :, 0] = 255; x[:, :30, 3] = 255
    return Image.fromarray(x).convert(mode)


GOOD = {
    'cmyk.jpg': (as_bytes(RED.convert('CMYK'), 'JPEG'), (255, 0, 0)),
    'palette.png': (as_bytes(RED.convert('P'), 'PNG'), (255, 0, 0)),
    'palette_clear.png': (as_bytes(RED.quantize(4), 'PNG', transparency=0), (255, 255, 255)),
    'grey.jpg': (as_bytes(RED.convert('L'), 'JPEG'), (76, 76, 76)),
    'grey_clear.png': (as_bytes(Image.new('LA', (60, 40), (9, 0)), 'PNG'), (255, 255, 255)),
    'one_bit.png': (as_bytes(Image.new('1', (60, 40), 1), 'PNG'), (255, 255, 255)),
    'sixteen.png': (as_bytes(Image.fromarray(np.full((40, 60), 40_000, np.uint16)), 'PNG'), (155, 155, 155)),
    'rgba.png': (as_bytes(Image.new('RGBA', (60, 40), (255, 0, 0, 0)), 'PNG'), (255, 255, 255)),
    'rgb_clear.png': (as_bytes(RED, 'PNG', transparency=(255, 0, 0)), (255, 255, 255)),
    'moving.gif': (as_bytes(RED, 'GIF', save_all=True, append_images=[Image.new('RGB', (60, 40), 'blue')]), (255, 0, 0)),
    'moving.webp': (as_bytes(RED, 'WEBP', lossless=True, save_all=True, append_images=[Image.new('RGB', (60, 40), 'blue')]), (255, 0, 0)),
    'flat.bmp': (as_bytes(RED, 'BMP'), (255, 0, 0)),
    'png_called.jpg': (as_bytes(RED, 'PNG'), (255, 0, 0)),
    'jpg_called.png': (as_bytes(RED, 'JPEG'), (254, 0, 0)),
    'progressive.jpg': (as_bytes(RED, 'JPEG', progressive=True), (254, 0, 0)),
    'bad_exif.jpg': (as_bytes(RED, 'JPEG', exif=b'Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x09garbage'), (254, 0, 0)),
    'two\nlines.png': (as_bytes(RED, 'PNG'), (255, 0, 0)),
}
PLAIN = as_bytes(Image.fromarray(NOISE), 'JPEG')
BAD = {
    'empty.jpg': b'', 'words.jpg': b'<html>404</html>', 'cut.jpg': PLAIN[:len(PLAIN)//2], 'head.jpg': PLAIN[:20], 'cut.png': as_bytes(Image.fromarray(NOISE), 'PNG')[:900],
    'cut.gif': as_bytes(RED, 'GIF')[:14], 'cut.webp': as_bytes(Image.fromarray(NOISE), 'WEBP')[:200], 'tiff_called.jpg': as_bytes(RED, 'TIFF'),
    'zeros.png': bytes(5000), 'bomb.png': png(100_000, 100_000), 'big.png': png(8000, 8000), 'no_pixels.png': png(60, 40), 'none_wide.png': png(0, 40),
    'script.eps': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
    'flipped.png': as_bytes(Image.fromarray(NOISE), 'PNG').replace(b'IDAT', b'IDOT'),
}


@pytest.mark.parametrize('name', GOOD)
def test_usable_pictures(tmp_path, name):
    data, colour = GOOD[name]
    (tmp_path/name).write_bytes(data)
    x = read_picture(tmp_path/name)
    assert isinstance(x, np.ndarray) and x.shape == (40, 60, 3) and x.dtype == np.uint8
    assert np.abs(x.reshape(-1, 3).astype(int) - colour).max() <= 2
    assert light_vector(x).shape == (251,)


@pytest.mark.parametrize('name', BAD)
def test_useless_pictures(tmp_path, name):
    (tmp_path/name).write_bytes(BAD[name])
    why = read_picture(tmp_path/name)
    assert isinstance(why, str) and 4 < len(why) < 200 and '\n' not in why
    if 'b' == name[0]: assert f'{MOST_PIXELS:,} pixels' in why


def test_other_failures(tmp_path):
    assert 'FileNotFoundError' in read_picture(tmp_path/'absent.jpg')
    assert isinstance(read_picture(tmp_path), str)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_turned_pictures(tmp_path, orientation):
    x = np.zeros((40, 60, 3), np.uint8); x[:20, :30] = 255
    Image.fromarray(x).save(tmp_path/'a.png', exif=exif(orientation))
    y = read_picture(tmp_path/'a.png')
    assert y.shape == ((60, 40, 3) if orientation > 4 else (40, 60, 3)) and not ImageFile.LOAD_TRUNCATED_IMAGES
    lit = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[orientation]
    assert y[lit].tolist() == [255]*3 and (y.mean((0, 1)) == 255/4).all()


def test_half_transparent(tmp_path):
    half('RGBA').save(tmp_path/'a.png')
    x = read_picture(tmp_path/'a.png')
    assert x[5, 5].tolist() == [255, 0, 0] and x[5, 55].tolist() == [255]*3


def test_a_large_jpeg_may_be_decoded_smaller(tmp_path):
    Image.new('RGB', (2000, 1600), 'red').save(tmp_path/'a.jpg')
    assert read_picture(tmp_path/'a.jpg').shape == (1600, 2000, 3)
    small = read_picture(tmp_path/'a.jpg', least=128)
    assert 128 <= min(small.shape[:2]) < 400


def test_bombs_are_refused_at_once(tmp_path):
    (tmp_path/'bomb.png').write_bytes(BAD['bomb.png']); start = time.perf_counter()
    read_picture(tmp_path/'bomb.png')
    assert time.perf_counter() - start < .5


def test_finding_pictures(tmp_path):
    (tmp_path/'images').mkdir(); (tmp_path/'images_small').mkdir(); (tmp_path/'secret.jpg').write_bytes(b'x')
    for name in ('images/a.JPG', 'images/b.png', 'images/b.jpg', 'images/c.d.webp', 'images_small/a.jpeg', 'images/e.txt', 'images/f', 'images/日本.gif'):
        (tmp_path/name).write_bytes(b'x')
    (tmp_path/'images'/'g.png').mkdir()
    got = find_pictures(tmp_path, ['a', 'b', 'c.d', 'c', 'e', 'f', 'g', '日本', '../secret', '..', '', '/etc/passwd', 'images/a', '*'])
    assert {k: v.relative_to(tmp_path).as_posix() for k, v in got.items()} == {
        'a': 'images_small/a.jpeg', 'b': 'images/b.jpg', 'c.d': 'images/c.d.webp', '日本': 'images/日本.gif'}
    assert find_pictures(tmp_path/'nowhere', ['a']) == {} and len(PICTURE_KINDS) == 6


def test_light_image_reports_by_file(tmp_path):
    place = tmp_path/'images'; place.mkdir()
    for name, data in {**{k: v[0] for k, v in GOOD.items()}, **BAD}.items(): (place/name).write_bytes(data)
    paths = [None, *sorted(place.iterdir())]
    s = light_image(paths)
    assert set(s.about['problems']) == {f'images/{name}' for name in BAD} and s.present.sum() == len(GOOD)
    assert np.allclose(np.linalg.norm(s.values[s.present], axis=1), 1, atol=1e-5) and not s.values[~s.present].any()
    f = join_features([str(k) for k in range(len(paths))], image=s)
    assert f.manifest['image']['problems'] == s.about['problems'] and f.manifest['image']['missing'] == 1+len(BAD)
    assert np.array_equal(light_image(paths).values, s.values)


@pytest.mark.parametrize('shape', [(1, 1), (1, 500), (3, 2), (64, 64), (65, 63)])
def test_any_shape_gives_a_vector(shape):
    for x in (np.zeros((*shape, 3), np.uint8), np.full((*shape, 3), 255, np.uint8), rng(0, *shape).integers(256, size=(*shape, 3), dtype=np.uint8)):
        v = light_vector(x)
        assert v.dtype == np.float32 and np.isfinite(v).all() and abs(np.linalg.norm(v)-1) < 1e-5


def test_contact_sheet():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plot_pictures([NOISE, None, 'a reason', NOISE[:, :9]], ['$a_b', 'x'*99, '', 'd'], marks=[1], columns=3)
    plot_pictures([NOISE]*3); plt.close('all')


def test_item_text():
    items = pl.DataFrame({'item': ['a', 'b', 'c', 'd'], 'title': ['A  lamp\n', None, '', ' '], 'description': [None, 'Warm\tlight', '', None],
                          'categories': [[['Home', 'Light'], ['Sale']], [[]], None, [None]], 'price': [1.5, None, 2., None], 'brand': ['Ö $x$', None, None, '']})
    assert item_text(items) == ['A lamp. Home, Light, Sale. Ö $x$', 'Warm light', '', '']
    assert item_text(items, ['price', 'title']) == ['1.5. A lamp', '', '2.0', '']
    assert item_text(items.select('item')) == ['']*4 and text_fields(items) == ['title', 'categories', 'brand', 'description']
    assert item_text(items.with_columns(pl.col('brand').cast(pl.Categorical)), ['brand'])[0] == 'Ö $x$'
    with pytest.raises(ImecdError, match="no column 'colour'"): item_text(items, ['colour'])


def test_light_text():
    texts = ['red oak table', 'Red OAK chair', '', 'unheard', 'naïve café', 'naive cafe', '日本 ランプ', '日本 ランプ 赤']
    s = light_text(texts)
    assert s.present.tolist() == [True, True, False, False, True, True, True, True]
    x = s.values
    assert np.allclose(x[4], x[5], atol=1e-5) and x[0] @ x[1] > .9 and abs(x[0] @ x[4]) < 1e-4 and np.array_equal(light_text(texts).values, x)
    for none in ([], [''], ['', ''], ['one'], ['a b', 'c d'], ['...', '!!!']):
        assert not light_text(none).present.any() and light_text(none).values.shape == (len(none), 1)
    many = light_text([f'w{k % 50} w{k % 7} w{k % 11}' for k in range(500)], width=16)
    assert many.values.shape == (500, 16) and many.present.all()
    later = light_text(texts, later=['red oak table', 'unheard', 'NAÏVE café']); assert np.allclose(later.values[:8], x) and np.allclose(later.values[8], x[0], atol=1e-4) and np.allclose(later.values[10], x[4], atol=1e-4) and not later.present[9]
    assert light_text(['a b', 'c d'], later=['a']).values.shape == (3, 1)


def test_catalogue(tmp_path):
    with pytest.raises(ImecdError, match='is not there'): load_items(tmp_path)
    path = tmp_path/'items.parquet'
    path.write_bytes(b'PAR1')
    with pytest.raises(ImecdError, match='not Parquet'): load_items(tmp_path)
    pl.DataFrame({'asin': ['a']}).write_parquet(path)
    with pytest.raises(ImecdError, match="no column 'item'"): load_items(tmp_path)
    pl.DataFrame({'item': ['a', None, None]}).write_parquet(path)
    with pytest.raises(ImecdError, match='row 1: no id'): load_items(tmp_path)
    pl.DataFrame({'item': ['a', 'b', 'x'*999, 'x'*999]}).write_parquet(path)
    with pytest.raises(ImecdError, match='row 3: an id that came before') as e: load_items(tmp_path)
    assert len(str(e.value)) < 300 + len(str(path))
    pl.DataFrame({'item': [3, 1]}).write_parquet(path)
    assert load_items(tmp_path)['item'].to_list() == ['3', '1']


@pytest.mark.real
def test_real_posters_and_plots():
    folder = DATA/'movielens_small'
    if not folder.exists(): pytest.skip('$IMECD_DATA/movielens_small is not here')
    items = load_items(folder); ids = items['item'].to_list()
    found = find_pictures(folder, ids)
    assert len(found) == 1849
    assert light_image([found[i] for i in ids[:100]]).present.all()
    text = light_text(item_text(items))
    assert text.present.all() and text.values.shape == (1849, 128)
    x = text.values; near = (x @ x.T - 2*np.eye(len(x))).argmax(1)
    kinds = [set(c.split(', ')) for c in items['categories']]
    share = lambda order: np.mean([len(kinds[a] & kinds[b])/len(kinds[a] | kinds[b]) for a, b in enumerate(order)])
    assert share(near) > 2*share(rng(0, 'order').permutation(len(x)))
