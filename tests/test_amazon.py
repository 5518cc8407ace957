"The raw Amazon releases: item files in three dialects, and downloads that break off."
import gzip
import json
import threading
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from imecd.amazon import AMAZON, addresses, coverage, download, fetch_amazon, item_row, picture, plain_text, plot_coverage, plot_day, read_meta
from imecd.core import ImecdError, rng

BODY = gzip.compress(rng(0, 'body').bytes(200_000))


def pack(path, *lines):
    "A packed file of lines."
    with gzip.open(path, 'wt', encoding='utf-8') as f: f.writelines(line+'\n' for line in lines)
    return path


@contextmanager
def served(answer):
    "A server on this machine that answers with a function; yields its address and the list of requests."
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self): asked.append(self.headers.get('Range')); answer(self, len(asked))
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True); thread.start()
    try: yield f'http://127.0.0.1:{server.server_port}/f.json.gz', asked
    finally: server.shutdown(); server.server_close(); thread.join()


def send(handler, body=BODY, ranged=True, stop=None, length=True, code=200):
    "Answer with a body, or the rest of it, cut at `stop`."
    start = int((handler.headers.get('Range') or 'bytes=0-')[6:-1]) if ranged else 0
    if start >= len(body) and start:
        handler.send_response(416); handler.send_header('Content-Range', f'bytes */{len(body)}'); handler.send_header('Content-Length', '0'); handler.end_headers(); return
    handler.send_response(206 if start else code)
    if start: handler.send_header('Content-Range', f'bytes {start}-{len(body)-1}/{len(body)}')
    if length: handler.send_header('Content-Length', str(len(body)-start))
    handler.end_headers(); handler.wfile.write(body[start:stop])


def files(folder): return sorted(p.name for p in folder.iterdir())


def test_whole(tmp_path):
    path = tmp_path/'raw'/'f.json.gz'
    with served(lambda h, n: send(h)) as (url, asked):
        assert download(url, path) == path and path.read_bytes() == BODY
        assert download(url, path) == path and len(asked) == 1
    record = json.loads((path.parent/'f.json.gz.sha256.json').read_text())
    assert record['sha256'] == sha256(BODY).hexdigest() and record['bytes'] == len(BODY) and record['url'] == url and record['time'].endswith('Z')
    assert files(path.parent) == ['f.json.gz', 'f.json.gz.sha256.json']


def test_cut_half_way_and_resumed(tmp_path):
    path = tmp_path/'f.json.gz'
    with served(lambda h, n: send(h, stop=None if n == 3 else n*50_000)) as (url, asked):
        assert download(url, path).read_bytes() == BODY
    assert asked == [None, 'bytes=50000-', 'bytes=100000-'] and files(tmp_path) == ['f.json.gz', 'f.json.gz.sha256.json']


def test_resumed_in_another_session(tmp_path):
    path = tmp_path/'f.json.gz'
    with served(lambda h, n: send(h, stop=50_000 if n == 1 else None)) as (url, asked):
        with pytest.raises(ImecdError, match=r'ended after 50,000 of .*fetch it by hand and save it as .*f\.json\.gz'): download(url, path, tries=1)
        assert files(tmp_path) == ['f.json.gz.part'] and not path.exists()
        assert download(url, path).read_bytes() == BODY and asked[1] == 'bytes=50000-'


def test_complete_part_is_used(tmp_path):
    path = tmp_path/'f.json.gz'; (tmp_path/'f.json.gz.part').write_bytes(BODY)
    with served(lambda h, n: send(h)) as (url, asked): assert download(url, path).read_bytes() == BODY and len(asked) == 1


def test_part_longer_than_the_file(tmp_path):
    path = tmp_path/'f.json.gz'; (tmp_path/'f.json.gz.part').write_bytes(BODY+b'more')
    with served(lambda h, n: send(h)) as (url, asked): assert download(url, path).read_bytes() == BODY and len(asked) == 2


def test_server_without_range(tmp_path):
    path = tmp_path/'f.json.gz'; (tmp_path/'f.json.gz.part').write_bytes(BODY[:70_000])
    with served(lambda h, n: send(h, ranged=False)) as (url, asked): assert download(url, path).read_bytes() == BODY


def test_server_without_length(tmp_path):
    with served(lambda h, n: send(h, length=False)) as (url, asked): assert download(url, tmp_path/'f.json.gz').read_bytes() == BODY


@pytest.mark.parametrize('code,words', [(404, 'Not Found'), (403, 'Forbidden'), (500, 'Internal Server Error')])
def test_refused(tmp_path, code, words):
    with served(lambda h, n: h.send_error(code)) as (url, asked):
        with pytest.raises(ImecdError) as e: download(url, tmp_path/'f.json.gz')
    assert f'the server answers {code}' in str(e.value) and words in str(e.value) and url in str(e.value) and str(tmp_path/'f.json.gz') in str(e.value)
    assert len(asked) == 1 and files(tmp_path) == []


def test_web_page_instead_of_gzip(tmp_path):
    with served(lambda h, n: send(h, b'<!DOCTYPE html><html>moved</html>')) as (url, asked):
        with pytest.raises(ImecdError, match='a web page arrived where a gzip file was expected.*by hand'): download(url, tmp_path/'f.json.gz')
    assert files(tmp_path) == []


@pytest.mark.parametrize('url', ['http://127.0.0.1:9/f.json.gz', 'http://no-such-host.invalid/f.json.gz'])
def test_no_network(tmp_path, url):
    with pytest.raises(ImecdError) as e: download(url, tmp_path/'f.json.gz', timeout=2, tries=1)
    assert url in str(e.value) and f'fetch it by hand and save it as {tmp_path/"f.json.gz"}' in str(e.value) and '\n' not in str(e.value)


def test_silent_server(tmp_path):
    wait = threading.Event()
    with served(lambda h, n: wait.wait(5)) as (url, asked):
        with pytest.raises(ImecdError, match='no answer'): download(url, tmp_path/'f.json.gz', timeout=.2, tries=2)
        wait.set()


def test_addresses():
    for year, release in AMAZON.items():
        for category in release.categories:
            reviews, meta = addresses(category, year)
            assert category in reviews and f'meta_{category}' in meta and reviews.endswith('.gz') and release.page.startswith('https://')
    assert addresses('grocery & gourmet food', 2014)[0].endswith('reviews_Grocery_and_Gourmet_Food_5.json.gz')
    with pytest.raises(ImecdError, match='did you mean Video_Games'): addresses('Vidoe Gams', 2018)
    with pytest.raises(ImecdError, match='There are Toys_and_Games'): addresses('zzzz', 2018)
    with pytest.raises(ImecdError, match='releases of 2014, 2018, 2023'): addresses('Toys_and_Games', 2020)


def test_fetch_uses_what_is_there(tmp_path):
    folder = tmp_path/'2018'; folder.mkdir()
    for name in ('Toys_and_Games_5.json.gz', 'meta_Toys_and_Games.json.gz'): (folder/name).write_bytes(BODY)
    assert [p.name for p in fetch_amazon('Toys & Games', 2018, tmp_path)] == ['Toys_and_Games_5.json.gz', 'meta_Toys_and_Games.json.gz']


def test_python_literals_and_json_mixed(tmp_path):
    path = pack(tmp_path/'meta.json.gz', repr(dict(asin='B1', title="it's", categories=[['a', 'b'], ['c']], imUrl='http://x.org/1.jpg')), json.dumps(dict(asin='B2', title='T')), '',
                repr(dict(asin='B3', title='naïve \u2028 line')))
    meta = read_meta(path, 2014)
    assert meta.items.rows() == [('B1', "it's", None, 'a > b > c', None, 'http://x.org/1.jpg'), ('B2', 'T', None, None, None, None), ('B3', 'naïve line', None, None, None, None)]
    assert meta.dropped == {}


@pytest.mark.parametrize('line', ["{'asin': open('/etc/passwd').read()}", "{'asin': 'B1'", '{"asin": "B1"', "{'asin': 1 if True else 2}", '['*5000, "{'a': "+'('*5000, 'x'*10_000_000, "{'asin': 'a'}{", '{'+'x'*1_000_000,
                                  '["B1"]', "{'B1'}"], ids=lambda t: t[:14])
def test_broken_line_is_named_and_nothing_runs(tmp_path, line):
    path = pack(tmp_path/'meta.json.gz', json.dumps(dict(asin='B0')), line)
    with pytest.raises(ImecdError) as e: read_meta(path, 2014)
    assert 'meta.json.gz, line 2: ' in str(e.value) and len(str(e.value).replace(str(tmp_path), '')) < 300 and '\n' not in str(e.value)


def test_counts_and_keep(tmp_path):
    rows = [dict(asin=f'B{i}', title=f't{i}') for i in range(25_000)]
    path = pack(tmp_path/'meta.json.gz', *(json.dumps(r) for r in rows), json.dumps(dict(title='no id')), json.dumps(dict(asin='B7', title='again')))
    meta = read_meta(path, 2018)
    assert len(meta.items) == 25_000 and meta.dropped == {'no id': 1, 'repeated item': 1} and meta.items['title'][7] == 't7'
    meta = read_meta(path, 2018, keep=['B7', 'B24999', 'absent'])
    assert meta.items['item'].to_list() == ['B7', 'B24999'] and meta.dropped == {'no id': 1, 'not kept': 24_998, 'repeated item': 1}
    assert len(read_meta(path, 2018, keep=[]).items) == 0


def test_meta_that_cannot_be_read(tmp_path):
    good = pack(tmp_path/'meta.json.gz', *(json.dumps(dict(asin=f'B{i}')) for i in range(5000)))
    (tmp_path/'cut.json.gz').write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ImecdError, match=r'cut\.json\.gz, after line \d+: cut off or damaged'): read_meta(tmp_path/'cut.json.gz', 2018)
    with pytest.raises(ImecdError, match='not there'): read_meta(tmp_path/'gone.json.gz', 2018)
    with pytest.raises(ImecdError, match='2014, 2018, 2023'): read_meta(good, 1999)
    with pytest.raises(ImecdError, match='empty'): read_meta(pack(tmp_path/'none.json.gz'), 2018)
    (tmp_path/'latin.json').write_bytes('{"asin": "M\xfc"}'.encode('latin-1'))
    with pytest.raises(ImecdError, match='line 1: byte 0xfc is not UTF-8'): read_meta(tmp_path/'latin.json', 2018)


def test_text_is_only_text():
    assert plain_text('<p>a</p><br/>b &lt;script&gt; &amp;amp; c<script>x()</script>') == 'a b <script> &amp; c'
    assert plain_text('x < 3 and y > 2') == 'x < 3 and y > 2' and plain_text('<3 this') == '<3 this'
    assert plain_text('<script>never closed') is None and plain_text('a<!-- b --> c') == 'a c' and plain_text('a\0b\x1b[31m') == 'a b [31m'
    assert plain_text(5) == '5' and plain_text({'a': 1}) is None and plain_text(None) is None and plain_text([None, ' ']) is None
    assert len(plain_text('<'*100_000)) == 100_000


def test_pictures():
    assert picture(dict(imUrl='http://x.org/a.jpg')) == 'http://x.org/a.jpg'
    assert picture(dict(imageURL=['http://x.org/s.jpg'], imageURLHighRes=['http://x.org/h.jpg'])) == 'http://x.org/h.jpg'
    assert picture(dict(images=[dict(large=None, thumb='http://x.org/t.jpg'), dict(large='http://x.org/l.jpg')])) == 'http://x.org/t.jpg'
    for odd in ({}, dict(images='x'), dict(images=[]), dict(imUrl='javascript:alert(1)'), dict(imUrl='file:///etc/passwd'), dict(imUrl=3), dict(imageURL='http')): assert picture(odd) is None


def test_three_releases_one_table():
    rows = [item_row(r) for r in (dict(asin='B', title='T', description='d', categories=[['c', 'e']], brand='b', imUrl='http://x.org/1.jpg'),
                                  dict(asin='B', title='T', description=['d'], category=['c', 'e'], brand='b', imageURLHighRes=['http://x.org/1.jpg']),
                                  dict(parent_asin='B', asin='variant', title='T', description=['d'], features=[], categories=['c', 'e'], store='b', images=[dict(large='http://x.org/1.jpg')]))]
    assert rows[0] == rows[1] == rows[2] == {'item': 'B', 'title': 'T', 'description': 'd', 'categories': 'c > e', 'brand': 'b', 'image_url': 'http://x.org/1.jpg'}


def test_figures():
    import matplotlib.pyplot as plt
    plot_coverage({'a': {'title': 1., 'brand': .5}, 'b': {'title': 0.}}); plot_day({'a': [0., 3600.], 'b': [1.]})
    plt.close('all')
    from polars import DataFrame
    assert coverage(DataFrame({'item': ['a', 'b'], 'title': ['x', None]})) == {'title': .5} and coverage(DataFrame({'item': [], 'title': []})) == {'title': 1.}
