"The download of MovieLens against a real HTTP server on loopback: whole, stalled, cut short, corrupted, missing."
import hashlib, io, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from aerec_nb import data_import
from aerec_nb.configuration import AerecError


def archive():
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w') as z:
        z.writestr('ml-latest-small/ratings.csv', 'userId,movieId,rating,timestamp\r\n1,1,4.0,964982703\r\n1,3,4.0,964981247\r\n')
        z.writestr('ml-latest-small/movies.csv', 'movieId,title,genres\r\n1,Toy,Comedy\r\n3,Other,Drama\r\n')
        z.writestr('ml-latest-small/README.txt', 'terms')
    return data.getvalue()


@pytest.fixture
def server(monkeypatch):
    content, released = archive(), threading.Event()
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == '/missing': return self.send_error(404)
            if self.path == '/redirect':
                self.send_response(302); self.send_header('Location', '/whole'); self.end_headers(); return
            self.send_response(200); self.send_header('Content-Length', str(len(content))); self.end_headers()
            if self.path == '/stall': self.wfile.write(content[:10]); self.wfile.flush(); released.wait(10)
            elif self.path == '/short': self.wfile.write(content[:-20])
            elif self.path == '/corrupt': self.wfile.write(bytes([content[0] ^ 1]) + content[1:])
            else: self.wfile.write(content)
        def log_message(self, *args): pass
    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    def use(path): monkeypatch.setattr(data_import, '_LATEST', (f'http://127.0.0.1:{http.server_port}/{path}', hashlib.sha256(content).hexdigest()))
    yield use
    released.set(); http.shutdown(); http.server_close()


@pytest.mark.parametrize('path', ['whole', 'redirect'])
def test_a_whole_download_is_cached_and_used_without_the_network(path, server, tmp_path):
    server(path)
    source = data_import._named('ml-latest-small', tmp_path, 5.)
    assert data_import.load_ratings(source.ratings.parent).shape == (2, 4)
    server('missing')
    assert data_import._named('ml-latest-small', tmp_path, 5.).hashes() == source.hashes()


@pytest.mark.parametrize('path, said', [('stall', 'within 1 s'), ('short', 'IncompleteRead'), ('corrupt', 'checksum'), ('missing', 'Not Found')])
def test_a_bad_download_is_given_up_in_time_and_leaves_no_data(path, said, server, tmp_path):
    server(path)
    clock = time.monotonic()
    with pytest.raises(AerecError, match=said): data_import._named('ml-latest-small', tmp_path, 1.)
    assert time.monotonic()-clock < 5
    assert [p.name for p in (tmp_path/'.cache').iterdir()] == ['attempts.json']
