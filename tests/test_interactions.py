"Bad input of many kinds: each ends in a clean table, asserted exactly, or in one line that names file, place and cure."
import gzip, json, os, random, re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from imecd.core import ImecdError, rng
from imecd.files import line_numbers, look, records_of
from imecd.interactions import Rejects, plot_lengths, plot_long_tail, read_events, read_items, to_atomic

T = 1_400_000_000


def write(folder, name, content):
    "A file of text or bytes, packed where its name says so."
    path = folder/name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if name.endswith('.gz') and not data.startswith(b'\x1f\x8b') else data)
    return path


def jl(*rows): return ''.join(json.dumps(r)+'\n' for r in rows)


HEAD = 'user,item,timestamp\n'
MANY = HEAD+''.join(f'u{i},i{i % 7},{T+i}\n' for i in range(5000))
PACKED = gzip.compress(MANY.encode())
JMANY = jl(*(dict(user=f'u{i}', item=f'i{i % 7}', timestamp=T+i) for i in range(5000)))
JPACKED = gzip.compress(JMANY.encode())

# name: (file, content, what the message must hold besides the file's name)
BROKEN = {
    'truncated gzip csv': ('e.csv.gz', PACKED[:-200], ['after line', 'cut off or damaged', 'fetch or copy']),
    'truncated gzip json': ('e.jsonl.gz', JPACKED[:-200], ['after line', 'cut off or damaged']),
    'gzip without its last bytes': ('e.csv.gz', PACKED[:-5], ['after line 5001', 'cut off or damaged']),
    'gzip cut in its head': ('e.csv.gz', PACKED[:6], ['after line 0', 'cut off or damaged']),
    'gzip with a garbage tail, csv': ('e.csv.gz', PACKED+b'garbage tail', ['after line 5001', 'cut off or damaged']),
    'gzip with a garbage tail, json': ('e.jsonl.gz', JPACKED+b'garbage tail', ['after line 5000', 'cut off or damaged']),
    'gzip with a wrong checksum': ('e.csv.gz', PACKED[:-8]+b'\0\0\0\0'+PACKED[-4:], ['cut off or damaged']),
    'gzip under a plain name': ('e.csv', PACKED, ['gzip, against its name', 'rename']),
    'broken line in the middle, csv': ('e.csv', MANY.replace('u2500,', 'u2500,x,'), ['line 2502', '4 fields where the header has 3', 'repair or delete']),
    'too few fields': ('e.csv', MANY.replace('u2500,', ''), ['line 2502', '2 fields where the header has 3']),
    'too many fields in columns not needed': ('e.csv', 'user,item,timestamp,a,b\nu,i,1400000000,x,y\nu,i,1400000001,x,y,z\n', ['line 3', '6 fields where the header has 5']),
    'comma unquoted in a title': ('e.csv', 'user,title,item,timestamp\nu,Heat,1,1400000000\nu,Me, Myself,2,1400000000\n', ['line 3', '5 fields where the header has 4']),
    'broken line in the middle, json': ('e.jsonl', JMANY.replace('"user": "u2500", ', '"user": "u25'), ['line 2501', 'not JSON', 'repair or delete']),
    'json cut in its last line': ('e.jsonl', JMANY[:-20], ['line 5000', 'not JSON']),
    'json with NaN': ('e.jsonl', '{"user": "a", "item": "b", "timestamp": NaN}\n', ['line 1', 'NaN is not JSON']),
    'json list in a line': ('e.jsonl', jl(dict(user='a', item='b', timestamp=T))+'[1, 2]\n', ['line 2', 'not an object']),
    'json list as a file': ('e.json', json.dumps([dict(user='a', item='b', timestamp=T)]), ['a JSON list', 'one {...} a line']),
    'json half a character': ('e.jsonl', jl(dict(user='a', item='b', timestamp=T))+'{"user": "\\ud800", "item": "b", "timestamp": 1}\n', ['line 2', 'not JSON']),
    'python literals': ('e.json', "{'user': 'a', 'item': 'b', 'timestamp': 1}\n", ['line 1', 'not JSON']),
    'utf-16': ('e.csv', (HEAD+'a,b,1400000000\n').encode('utf-16'), ['UTF-16', 'iconv']),
    'latin-1': ('e.csv', (HEAD+'ann,x,1400000000\nM\xfcller,x,1400000000\n').encode('latin-1'), ['line 3', '0xfc is not UTF-8', 'iconv']),
    'latin-1 in a column not needed': ('e.csv', ('user,item,timestamp,name,x\nann,x,1400000000,M\xfcller,1\n').encode('latin-1'), ['line 2', 'not UTF-8']),
    'latin-1 in json': ('e.jsonl', '{"user": "M\xfcller", "item": "b", "timestamp": 1}\n'.encode('latin-1'), ['line 1', 'not UTF-8']),
    'wrong delimiter': ('e.csv', 'user::item::timestamp\na::b::1400000000\n', ['line 1', 'one column only', 'separate the columns']),
    'delimiter changes after the header': ('e.csv', 'user,item,timestamp\na;b;1400000000\n', ['line 2', '1 fields where the header has 3']),
    'missing column': ('e.csv', 'user,timestamp\na,1400000000\n', ['no column looks like the item', "columns={'item': NAME}"]),
    'three missing columns': ('e.csv', 'who,what,when_exactly\na,b,1400000000\n', ['the user or the item, none like a time', '--column user=NAME --column item=NAME --column timestamp=NAME', 'name them']),
    'no header': ('e.csv', 'A1,B1,5.0,1400000000\nA2,B1,4.0,1400000000\n', ['no column looks like the user', 'header line']),
    'two user columns': ('e.csv', 'user_id,userId,item,timestamp\na,b,c,1400000000\n', ['user_id, userId', 'both look like the user', "columns={'user': 'user_id'}"]),
    'two item columns': ('e.csv', 'user,movieId,product_id,timestamp\na,b,c,1400000000\n', ['movieId, product_id', 'both look like the item']),
    'column twice': ('e.csv', 'user,item,item,timestamp\na,b,c,1400000000\n', ['line 1', "'item' stands there twice"]),
    'quotation mark in the header': ('e.csv', 'user,"the ""item""",timestamp\na,b,1400000000\n', ['line 1', 'quotation mark', 'rename']),
    'open quotation mark in the header': ('e.csv', 'user,"item,timestamp\na,b,1400000000\n', ['line 1', 'quotation mark', 'one line']),
    'first row short': ('e.csv', HEAD+'a,b\na,b,1400000000\n', ['line 2', '2 fields where the header has 3']),
    'empty file': ('e.csv', '', ['the file is empty']),
    'empty gzip': ('e.csv.gz', gzip.compress(b''), ['the file is empty']),
    'blank lines only': ('e.jsonl', '\n\n\n', ['the file is empty']),
    'header only': ('e.csv', HEAD, ['a header and no rows']),
    'all rows bad': ('e.csv', HEAD+'a,,1400000000\n,b,1400000000\na,b,never\n', ['none of its 3 rows', '1 no user', '1 no item', '1 timestamp unreadable', 'line 2']),
    '10 MB of one line, csv': ('e.csv', 'x'*10_000_000, ['line 1', '10,000,000 characters']),
    '10 MB of one line, csv row': ('e.csv', HEAD+'a,b,1400000000\n'+','*10_000_000+'\n', ['line 3', '10000001 fields']),
    '10 MB of one line, json': ('e.jsonl', '{"user": "'+'x'*10_000_000, ['line 1', 'not JSON', 'characters']),
    '10 MB of one line, json list': ('e.jsonl', '['+'1,'*5_000_000+'1]', ['a JSON list']),
    'open quotation mark': ('e.csv', HEAD+'a,b,1400000000\n"a,b,1400000000\n'+'c,d,1400000000\n'*3000, ['line 3', 'opened and never closed']),
    'stray quotation marks': ('e.csv', HEAD+'u"1,b,1400000000\nc,d,1400000000\nu"2,d,1400000000\n', ['line 2', 'stray quotation mark']),
    'not a parquet': ('e.parquet', 'PAR1 but not really', ['not a whole Parquet file', 'write it again']),
    'csv under a parquet name': ('e.parquet', MANY, ['looks like text', 'rename']),
    'parquet under a csv name': ('e.csv', b'PAR1\x00\x00PAR1', ['looks like a Parquet file']),
    'web page': ('e.csv', '<!DOCTYPE html><html><body>404</body></html>', ['a web page', 'fetch it again']),
    'json under a csv name': ('e.csv', JMANY, ['looks like JSON']),
    'unknown ending': ('e.xlsx', 'PK', ["'.xlsx'", '.csv', 'format=']),
    'no time and no order': ('e.csv', 'user,item\na,b\n', ['no column looks like a time or an order', "{'order': 'row'}"]),
    'bare carriage returns': ('e.csv', 'user,item,timestamp\ra,b,1400000000\r', ['line 1', 'carriage return']),
    'all timestamps are words': ('e.csv', HEAD+'a,b,yesterday\n', ['none of its 1 rows', '1 timestamp unreadable', "'yesterday' is no time that can be read", '2024-05-31 18:00']),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken(tmp_path, name):
    file, content, says = BROKEN[name]
    path = write(tmp_path, file, content)
    with pytest.raises(ImecdError) as e: read_events(path)
    text = str(e.value).replace(str(tmp_path), '')
    assert file in text and '\n' not in text and len(text) <= 330, text
    for part in says: assert part in text, text


A = ('ann', 'x', T)
# name: (file, content, rows of the table, rows dropped by reason, words of the notes)
CLEAN = {
    'plain': ('e.csv', HEAD+f'ann,x,{T}\n', [A], {}, []),
    'byte-order mark': ('e.csv', '\ufeff'+HEAD+f'ann,x,{T}\n', [A], {}, ['byte-order mark removed']),
    'byte-order mark, quoted header': ('e.csv', '\ufeff"user","item","timestamp"\n'+f'ann,x,{T}\n', [A], {}, ['byte-order mark removed']),
    'byte-order mark, json': ('e.jsonl', '\ufeff'+jl(dict(user='ann', item='x', timestamp=T)), [A], {}, ['byte-order mark removed']),
    'byte-order mark, json.gz': ('e.jsonl.gz', '\ufeff'+jl(dict(user='ann', item='x', timestamp=T)), [A], {}, ['byte-order mark removed']),
    'CRLF': ('e.csv', f'user,item,timestamp\r\nann,x,{T}\r\n', [A], {}, []),
    'CRLF, time not last': ('e.csv', f'user,timestamp,item\r\nann,{T},x\r\n', [A], {}, []),
    'no line break at the end': ('e.csv', HEAD+f'ann,x,{T}', [A], {}, []),
    'blank lines': ('e.csv', HEAD+f'\nann,x,{T}\n\n', [A], {'empty row': 2}, []),
    'blank lines, json': ('e.jsonl', '\n'+jl(dict(user='ann', item='x', timestamp=T))+'\n\n', [A], {}, []),
    'semicolon': ('e.csv', f'user;item;timestamp\nann;x;{T}\n', [A], {}, ["separator ';'"]),
    'tab in a csv': ('e.csv', f'user\titem\ttimestamp\nann\tx\t{T}\n', [A], {}, ["separator '\\t'"]),
    'bar': ('e.txt', f'user|item|timestamp\nann|x|{T}\n', [A], {}, ["separator '|'"]),
    'tsv': ('e.tsv', f'user\titem\ttimestamp\nann\tx\t{T}\n', [A], {}, []),
    'other names': ('e.csv', f'Time,MovieID,UserId\n{T},x,ann\n', [A], {}, ["user is column 'UserId'", "item is column 'MovieID'", "timestamp is column 'Time'"]),
    'index column of pandas': ('e.csv', f',user,item,timestamp\n0,ann,x,{T}\n', [A], {}, []),
    'null ids': ('e.jsonl', jl(dict(user=None, item='x', timestamp=T), dict(item='x', timestamp=T), dict(user='ann', item=None, timestamp=T), dict(user='ann', item='x', timestamp=T)),
                 [A], {'no user': 2, 'no item': 1}, []),
    'NaN ids': ('e.csv', HEAD+f'NaN,x,{T}\nann,nan,{T}\nann,x,{T}\nNULL,x,{T}\n', [A], {'no user': 2, 'no item': 1}, []),
    'empty-string ids': ('e.csv', HEAD+f'"",x,{T}\n,x,{T}\nann,"  ",{T}\nann,x,{T}\n', [A], {'no user': 2, 'no item': 1}, []),
    'negative timestamp': ('e.csv', HEAD+f'ann,x,-5\nann,x,{T}\n', [A], {'timestamp negative': 1}, []),
    'far timestamp': ('e.csv', HEAD+f'ann,x,5000000000\nann,x,{T}\nann,x,inf\nann,x,\n', [A],
                      {'no timestamp': 1, 'timestamp unreadable': 1, 'timestamp after 2100': 1}, []),
    'milliseconds': ('e.csv', HEAD+f'ann,x,{T}000\n', [A], {}, ['1 times converted from milliseconds']),
    'microseconds': ('e.csv', HEAD+f'ann,x,{T}000000\n', [A], {}, ['1 times converted from microseconds']),
    'nanoseconds': ('e.csv', HEAD+f'ann,x,{T}000000000\n', [A], {}, ['1 times converted from nanoseconds']),
    'float seconds': ('e.csv', HEAD+f'ann,x,{T}.0\nbob,x,1.4e9\n', [A, ('bob', 'x', T)], {}, []),
    'mixed units': ('e.csv', HEAD+f'ann,x,{T}\nbob,x,{T}000\n', [A, ('bob', 'x', T)], {}, ['1 times converted from milliseconds']),
    'ISO': ('e.csv', HEAD+'ann,x,2014-05-13T16:53:20Z\nbob,x,2014-05-13 16:53:20\ncyd,x,2014-05-13T18:53:20+02:00\n',
            [A, ('bob', 'x', T), ('cyd', 'x', T)], {}, ['3 times converted from dates']),
    'dates only': ('e.csv', 'user,item,date\nann,x,2014-05-13\nbob,x,2014/05/13\n', [('ann', 'x', 1399939200), ('bob', 'x', 1399939200)], {}, ['2 times converted from dates']),
    'mixed types': ('e.jsonl', '{"user": 7, "item": "x", "timestamp": 1400000000}\n{"user": "7", "item": 1.0, "timestamp": "1400000000"}\n'
                    '{"user": true, "item": 12345678901234567890, "timestamp": 1.4e9}\n',
                    [('7', 'x', T), ('7', '1', T), ('true', '12345678901234567890', T)], {}, []),
    'duplicate rows': ('e.csv', HEAD+f'ann,x,{T}\nann,x,{T}\nann,x,{T}\nann,x,{T+1}\n', [A, ('ann', 'x', T+1)], {'repeated event': 2}, []),
    'same item at one time, ratings differ': ('e.csv', f'user,item,timestamp,rating\nann,x,{T},3\nann,x,{T},\nann,x,{T},5\n', [(*A, 5.)], {'repeated event': 2}, []),
    'white space around ids': ('e.csv', HEAD+f' ann ,x\u00a0,{T}\nann,x,{T}\n', [A], {'repeated event': 1}, ['white space around ids removed in 1 rows']),
    'spaces inside ids': ('e.csv', HEAD+f'ann lee,the  x,{T}\n', [('ann lee', 'the  x', T)], {}, []),
    'quotes in ids': ('e.csv', HEAD+f'"ann ""the"" lee",x,{T}\n', [('ann "the" lee', 'x', T)], {}, []),
    'commas in ids': ('e.csv', HEAD+f'"lee, ann",x,{T}\n', [('lee, ann', 'x', T)], {}, []),
    'line breaks in ids': ('e.csv', HEAD+f'"ann\nlee",x,{T}\nann,x,{T}\n', [A], {'user unusable': 1}, []),
    'line breaks elsewhere': ('e.csv', f'user,item,text,timestamp\nann,x,"a\nb",{T}\n', [A], {}, []),
    'NUL byte in an id': ('e.csv', HEAD+f'a\0n,x,{T}\nann,x,{T}\nann,y\0,{T}\n', [A], {'user unusable': 1, 'item unusable': 1}, []),
    'NUL byte in a json id': ('e.jsonl', '{"user": "a\\u0000n", "item": "x", "timestamp": 1400000000}\n'+jl(dict(user='ann', item='x', timestamp=T)), [A], {'user unusable': 1}, []),
    'non-Latin script': ('e.csv', HEAD+f'Ольга,玩具 😀,{T}\n', [('Ольга', '玩具 😀', T)], {}, []),
    'long id': ('e.csv', HEAD+f'{"a"*900},x,{T}\n', [('a'*900, 'x', T)], {}, []),
    'too long an id': ('e.csv', HEAD+f'{"a"*2000},x,{T}\nann,x,{T}\n', [A], {'user unusable': 1}, []),
    '10 MB id': ('e.jsonl', jl(dict(user='a'*10_000_000, item='x', timestamp=T), dict(user='ann', item='x', timestamp=T)), [A], {'user unusable': 1}, []),
    'leading zeros and hashes': ('e.csv', HEAD+f'007,#1,{T}\n', [('007', '#1', T)], {}, []),
    'one user': ('e.csv', HEAD+''.join(f'ann,x{i},{T+i}\n' for i in range(5)), [('ann', f'x{i}', T+i) for i in range(5)], {}, []),
    'rating inf': ('e.csv', f'user,item,rating,timestamp\nann,x,inf,{T}\nann,x,4.5,{T}\nbob,x,good,{T}\ncyd,x,NaN,{T}\n', [(*A, 4.5), ('cyd', 'x', T, None)], {'rating unreadable': 2}, []),
    'order': ('e.csv', 'user,item,order\nann,x,2\nann,x,first\nann,y,1\nann,y,1.5\n', [('ann', 'x', 2), ('ann', 'y', 1)], {'order unreadable': 2}, []),
    'atomic': ('e.inter', f'user_id:token\titem_id:token\ttimestamp:float\nann\tx\t{T}\n', [A], {}, []),
    'atomic with lone quotes': ('e.inter', f'user_id:token\titem_id:token\ttimestamp:float\na"nn\t"x\t{T}\n', [('a"nn', '"x', T)], {}, []),
    'atomic without types': ('e.inter', f'user_id\titem_id\ttimestamp\nann\tx\t{T}\n', [A], {}, ['without RecBole types']),
    'atomic with float times': ('e.inter', 'user_id:token\titem_id:token\ttimestamp:float\nann\tx\t1.4E9\n', [A], {}, []),
    'csv.gz': ('e.csv.gz', HEAD+f'ann,x,{T}\n', [A], {}, []),
    'gzip in two members': ('e.csv.gz', gzip.compress((HEAD+f'ann,x,{T}\n').encode())+gzip.compress(f'bob,x,{T}\n'.encode()), [A, ('bob', 'x', T)], {}, []),
    'nested json in other keys': ('e.jsonl', jl(dict(user='ann', item='x', timestamp=T, style={'a': [1, {'b': 2}]}), dict(user='bob', item='x', timestamp=T, style='none')),
                                  [A, ('bob', 'x', T)], {}, []),
    'keys in another order': ('e.jsonl', jl(dict(user='ann', item='x', timestamp=T), dict(timestamp=T, item='x', user='bob')), [A, ('bob', 'x', T)], {}, []),
    'amazon 2014': ('reviews_Toys_5.json.gz', jl(dict(reviewerID='ann', asin='x', helpful=[0, 0], overall=5.0, unixReviewTime=T, reviewTime='05 13, 2014')), [(*A, 5.)], {}, ["'reviewerID'"]),
    'amazon 2023': ('Toys.jsonl.gz', jl(dict(rating=5.0, asin='variant', parent_asin='x', user_id='ann', timestamp=T*1000)), [(*A, 5.)], {}, ["'parent_asin'", 'milliseconds']),
}


@pytest.mark.parametrize('name', CLEAN)
def test_clean(tmp_path, name):
    file, content, rows, dropped, says = CLEAN[name]
    events = read_events(write(tmp_path, file, content))
    assert events.table.rows() == rows and events.dropped == dropped
    assert len(events.quarantine) == sum(dropped.values())
    for part in says: assert any(part in note for note in events.notes), events.notes
    if 'amazon' not in name and name not in ('other names', 'dates only') and 'atomic' not in name: assert len(events.notes) == len(says), events.notes
    assert events.table.schema['user'] == events.table.schema['item'] == pl.String


def test_enough_kinds(): assert len(BROKEN) >= 30 and len(CLEAN) >= 30


def test_places(tmp_path):
    with pytest.raises(ImecdError, match=r'a folder, not a file; name a file in it'): read_events(tmp_path)
    with pytest.raises(ImecdError, match=r'gone\.csv is not there'): read_events(tmp_path/'gone.csv')
    path = write(tmp_path, 'e.dat', HEAD+f'ann,x,{T}\n')
    assert read_events(path, format='csv').table.rows() == [A]
    with pytest.raises(ImecdError, match='format'): read_events(path, format='excel')


def test_told_columns(tmp_path):
    path = write(tmp_path, 'e.csv', f'buyer,thing,user,timestamp,rating\nann,x,{T-1},{T},3\n')
    assert read_events(path, {'user': 'buyer', 'item': 'thing', 'rating': None}).table.rows() == [A]
    assert read_events(path, {'user': 'buyer', 'item': 'thing', 'timestamp': 'user'}).table.rows() == [('ann', 'x', T-1, 3.)]
    with pytest.raises(ImecdError, match="no column 'byer'.*the nearest is buyer"): read_events(path, {'user': 'byer', 'item': 'thing'})
    with pytest.raises(ImecdError, match="'usr' is not one of.*did you mean user"): read_events(path, {'usr': 'buyer'})


def test_years_are_told_from_times(tmp_path):
    rows = ''.join(f'a,{i},{2000+i}\n' for i in range(4)); (tmp_path/'e.csv').write_text(f'user,item,timestamp\n{rows}')
    said = read_events(tmp_path/'e.csv').notes; assert len(said) == 1 and 'end at 2,003' in said[0] and "--column order='timestamp'" in said[0]
    assert read_events(tmp_path/'e.csv', {'order': 'timestamp'}).table.columns == ['user', 'item', 'order']
    (tmp_path/'e.csv').write_text('user,item,timestamp\na,b,2001\na,c,1400000000\n'); assert read_events(tmp_path/'e.csv').notes == []
    (tmp_path/'e.csv').write_text('user,item,timestamp\na,b,2001\n,c,1400000000\n'); assert 'end at 2,001' in read_events(tmp_path/'e.csv').notes[0]  # a row that is left out tells nothing
    for more, columns in (('order\na,b,2001,1\na,c,2002,2', None), ('x\na,b,2001.5,1\na,c,2002.25,2', None), ('x\na,b,2001,1\na,c,2002,2', {'order': 'row'})):  # no cure that would lose an order or cannot be followed
        (tmp_path/'e.csv').write_text(f'user,item,timestamp,{more}\n'); assert [n for n in read_events(tmp_path/'e.csv', columns).notes if n.startswith('numbers')][0].endswith('months')


def test_row_order(tmp_path):
    path = write(tmp_path, 'e.csv', 'user,item\nann,x\n,x\nann,y\nann,x\n')
    events = read_events(path, {'order': 'row'})
    assert events.table.columns == ['user', 'item', 'order'] and events.table['item'].to_list() == ['x', 'y', 'x']
    assert events.table['order'].is_sorted() and events.table['order'].n_unique() == 3 and events.dropped == {'no user': 1}


def test_parquet_types(tmp_path):
    from datetime import date, datetime, timezone
    path = tmp_path/'e.parquet'
    base = {'user': [1, 2], 'item': [7., None], 'timestamp': [T, T]}
    pl.DataFrame(base).write_parquet(path)
    assert read_events(path).table.rows() == [('1', '7', T)] and read_events(path).quarantine['line'].to_list() == [2]
    when = datetime.fromtimestamp(T, timezone.utc)
    for times, want in (([when], T), ([when.replace(tzinfo=None)], T), ([date(2014, 5, 13)], 1399939200), ([float(T)], T), ([T*1000], T)):
        pl.DataFrame({'user': ['ann'], 'item': ['x'], 'timestamp': times}).write_parquet(path)
        assert read_events(path).table['timestamp'].to_list() == [want]
    pl.DataFrame({'user': ['ann', 'bob'], 'item': ['x', 'x'], 'timestamp': [when, when]}).with_columns(pl.col('timestamp').dt.convert_time_zone('Asia/Tokyo')).write_parquet(path)
    assert read_events(path).table['timestamp'].to_list() == [T, T]
    pl.DataFrame({'user': pl.Series(['ann'], dtype=pl.Categorical), 'item': ['x'], 'timestamp': [T]}).write_parquet(path)
    assert read_events(path).table.rows() == [A]
    for bad, column in (({'item': [['x', 'y']]}, 'item'), ({'user': [{'a': 1}]}, 'user'), ({'timestamp': [[T]]}, 'timestamp'), ({'item': [when]}, 'item')):
        pl.DataFrame({'user': ['ann'], 'item': ['x'], 'timestamp': [T], **bad}).write_parquet(path)
        with pytest.raises(ImecdError, match=rf"e\.parquet: column '{column}'.* holds"): read_events(path)
    pl.DataFrame({'user': ['ann'], 'item': ['x'], 'timestamp': [T], 'tags': [['a']]}).write_parquet(path)
    assert read_events(path).table.rows() == [A]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ImecdError, match='not a whole Parquet file'): read_events(path)
    pl.DataFrame(base).clear().write_parquet(path)
    with pytest.raises(ImecdError, match='no rows'): read_events(path)


def test_order_below_a_second(tmp_path):
    path = write(tmp_path, 'e.csv', HEAD+f'ann,x,{T}250\nann,y,{T}100\nbob,x,{T}250\n')
    table = read_events(path).table
    assert table.columns == ['user', 'item', 'timestamp', 'order'] and set(table['timestamp']) == {T}
    assert table.filter(user='ann').sort('order')['item'].to_list() == ['y', 'x']
    path = write(tmp_path, 'e.csv', HEAD+f'ann,x,{T}250\nann,y,{T}250\nbob,x,{T}251\n')
    events = read_events(path)
    assert 'order' not in events.table.columns and any('2 events share a user and an instant' in n for n in events.notes)
    path = write(tmp_path, 'e.csv', HEAD+f'ann,x,{T}250\nann,x,{T}100\n')
    assert len(read_events(path).table) == 2


def test_quarantine(tmp_path):
    body = f'user,item,text,timestamp\nann,x,"a\nb",{T}\nann,x,c,never\n\n,y,d,{T}\nann,{"z"*5000},e,{T}\n'
    path = write(tmp_path, 'e.csv', body)
    events = read_events(path)
    assert events.quarantine.select('line', 'reason').rows() == [(4, 'timestamp unreadable'), (5, 'empty row'), (6, 'no user'), (7, 'item unusable')]
    assert events.quarantine['timestamp'][0] == 'never' and len(events.quarantine['item'][3]) == 200 and events.quarantine['file'][0] == str(path)
    events.rejects.save(tmp_path/'q'/'quarantine.csv')
    assert pl.read_csv(tmp_path/'q'/'quarantine.csv').shape == events.quarantine.shape
    assert isinstance(events.rejects, Rejects) and events.rejects.counts == events.dropped
    path = write(tmp_path, 'e.jsonl', '\n'+jl(dict(user='ann', item='x', timestamp=T))+'\n'+jl(dict(user='ann', item='x', timestamp='?')))
    assert read_events(path).quarantine['line'].to_list() == [4]


def test_quarantine_is_bounded(tmp_path):
    path = write(tmp_path, 'e.csv', HEAD+''.join(f'u{i},,{T}\n' for i in range(25_000))+f'ann,x,{T}\n')
    events = read_events(path)
    assert events.dropped == {'no item': 25_000} and len(events.quarantine) == 10_000 and events.quarantine['line'][-1] == 10_001


@pytest.mark.parametrize('kind', ['csv', 'jsonl', 'parquet', 'inter'])
def test_shuffled_rows_give_the_same_set(tmp_path, kind):
    g = rng(0, 'shuffle')
    n = 3000
    rows = [(f'u{a}', f'i{b}', T+int(t), float(r)) for a, b, t, r in zip(g.integers(0, 40, n), g.integers(0, 30, n), g.integers(0, 20, n), g.integers(1, 6, n))]
    seen = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        path = tmp_path/f'e{seed}.{kind}'
        frame = pl.DataFrame(rows, schema=['user', 'item', 'timestamp', 'rating'], orient='row')
        if kind == 'csv': frame.write_csv(path)
        if kind == 'jsonl': frame.write_ndjson(path)
        if kind == 'parquet': frame.write_parquet(path)
        if kind == 'inter': _inter(frame, path)
        events = read_events(path)
        assert events.dropped['repeated event'] == n-len(events.table)
        seen.append(set(events.table.rows()))
    assert seen[0] == seen[1] == seen[2]
    best = {}
    for u, i, t, r in rows: best[u, i, t] = max(r, best.get((u, i, t), 0))
    assert seen[0] == {(*k, r) for k, r in best.items()}


def _inter(frame, path):
    "A frame as an atomic file."
    names = {'user': 'user_id:token', 'item': 'item_id:token', 'timestamp': 'timestamp:float', 'rating': 'rating:float'}
    frame.rename(names).write_csv(path, separator='\t', quote_style='never')


def test_rows_keep_the_order_of_the_file(tmp_path):
    path = write(tmp_path, 'e.csv', HEAD+''.join(f'u{i % 97},i{i % 53},{T+i}\n' for i in range(200_000)))
    table = read_events(path).table
    assert len(table) == 200_000 and table['timestamp'].is_sorted() and table['user'][12_345] == f'u{12_345 % 97}'


def test_slow_and_fast_reader_agree(tmp_path):
    g = rng(1, 'fuzz')
    marks = ['a', 'b', ',', '"', '\n', ' ', 'ü', '', "'", ';']
    for k in range(60):
        cells = [[''.join(g.choice(marks, int(g.integers(0, 5)))) for _ in range(3)] for _ in range(int(g.integers(1, 12)))]
        frame = pl.DataFrame({c: [r[j] for r in cells] for j, c in enumerate('xyz')})
        path = tmp_path/f'{k}.csv'
        frame.write_csv(path, quote_style='always')
        rows = [f for _, f in records_of(look(path)) if f][1:]
        assert rows == cells
        fast = pl.read_csv(path, infer_schema=False)
        assert [list(r) for r in fast.rows()] == cells
        starts = [n for n, _ in records_of(look(path))][1:]
        assert line_numbers(look(path), list(range(len(cells))), len(cells)) == starts


def test_damage_never_passes(tmp_path):
    "One byte of a good packed file is changed, many times: the result is an error or the same table."
    good = read_events(write(tmp_path, 'good.csv.gz', PACKED)).table
    g = rng(2, 'damage')
    for k in range(40):
        data = bytearray(PACKED); data[int(g.integers(10, len(data)))] ^= 1 << int(g.integers(0, 8))
        path = write(tmp_path, f'{k}.csv.gz', bytes(data[:2])+bytes(data[2:]))
        try: assert read_events(path).table.equals(good)
        except ImecdError as e: assert str(path) in str(e)


def test_items(tmp_path):
    body = 'movieId,name,genres,year\n1,"Heat, 1995",Crime|Drama,1995\n2,Alien,,1979\n'
    items = read_items(write(tmp_path, 'i.csv', body))
    assert items.columns == ['item', 'title', 'categories', 'year'] and items.rows() == [('1', 'Heat, 1995', 'Crime|Drama', '1995'), ('2', 'Alien', None, '1979')]
    pl.DataFrame({'item': [1, 2], 'title': ['a', 'b'], 'tags': [['x', 'y'], []], 'categories': [['x', 'y'], []], 'price': [1.5, None]}).write_parquet(tmp_path/'i.parquet')
    items = read_items(tmp_path/'i.parquet')
    assert items.columns == ['item', 'title', 'categories', 'price'] and items.rows() == [('1', 'a', 'x, y', 1.5), ('2', 'b', '', None)]
    items = read_items(write(tmp_path, 'i.jsonl', jl(dict(parent_asin='B1', title='"q"', description=['a', 'b"c'], images=[]), dict(parent_asin='B2', title=None))))
    assert items.rows() == [('B1', '"q"', 'a, b"c', None), ('B2', None, None, None)]
    assert read_items(tmp_path/'i.csv', {'title': 'genres'})['title'].to_list() == ['Crime|Drama', None]
    for name, content, says in (('twice.csv', 'item,title\na,x\nb,y\na,z\n', r"line 4: an item that stood there before \('a'\)"),
                                ('none.csv', 'item,title\na,x\n,y\n', 'line 3: no item id'), ('what.csv', 'name,title\na,x\n', 'no column looks like the item'),
                                ('short.csv', 'item,title\na,x\nb\n', 'line 3: 1 fields where the header has 2')):
        with pytest.raises(ImecdError, match=says): read_items(write(tmp_path, name, content))


def test_atomic_round_trip(tmp_path):
    events = pl.DataFrame({'user': ['ann', 'bob "b"', 'Ольга'], 'item': ['x', '"y"', '# z'], 'timestamp': [T, T+1, T+2], 'order': [3, 1, 2], 'day_group': [1, 1, 2], 'rating': [1.5, None, 5.]})
    items = pl.DataFrame({'item': ['x', '"y"', '# z'], 'title': ['A "b" c', None, "it's"], 'categories': ['p, q', '', None], 'price': [1.25, None, 3.]})
    to_atomic(events, items, tmp_path/'out', 'shop')
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['shop.inter', 'shop.item']
    assert (tmp_path/'out'/'shop.inter').read_text().split('\n')[0] == 'user_id:token\titem_id:token\ttimestamp:float\torder:float\tday_group:float\trating:float'
    back = read_events(tmp_path/'out'/'shop.inter')
    assert back.table.equals(events) and back.dropped == {}
    assert read_items(tmp_path/'out'/'shop.item').equals(items.with_columns(categories=pl.Series(['p, q', None, None])))
    to_atomic(events, items.with_columns(title=pl.Series(['a\tb', 'c\r\nd', None])), tmp_path, 'tabs')
    assert read_items(tmp_path/'tabs.item')['title'].to_list() == ['a b', 'c d', None]
    with pytest.raises(ImecdError, match='holds a tab or a line break'): to_atomic(events.with_columns(user=pl.lit('a\tb')), None, tmp_path, 'bad')
    assert not list(tmp_path.glob('*bad*'))


def test_figures():
    import matplotlib.pyplot as plt
    ax = plot_long_tail(np.array([1, 1, 8]))
    assert ax.get_title(loc='left').startswith('1 of 3 items')
    assert plot_lengths([1, 2, 2, 5], ax) is ax
    plt.close('all')


@pytest.mark.real
def test_real_folders():
    root = Path(os.environ.get('IMECD_DATA', 'data'))
    folders = [f for f in sorted(root.glob('*')) if (f/'interactions.parquet').exists()]
    if not folders: pytest.skip(f'no data folders in {root}; set IMECD_DATA')
    for folder in folders:
        events, raw = read_events(folder/'interactions.parquet'), pl.read_parquet(folder/'interactions.parquet')
        assert len(events.table)+sum(events.dropped.values()) == len(raw) and set(events.dropped) <= {'repeated event'}, folder
        assert set(events.table['item'].unique()) <= set(read_items(folder/'items.parquet')['item'])
        assert not any(re.search('column', n) for n in events.notes), events.notes
