from __future__ import annotations

import json

import pytest

from labkit.errors import UserError
from labkit.link import Leg, Link
from labkit.link.edge import Edge

CLIENT_MS, ORIGIN_MS = 20.0, 60.0

ORIGIN = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def setup(self): super().setup(); self.connection.setsockopt(6, 1, 1)
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200)
        if self.path == "/stream":
            self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
            for piece in (b"one", b"two"): self.wfile.write(b"3\\r\\n" + piece + b"\\r\\n"); time.sleep(0.15)
            self.wfile.write(b"0\\r\\n\\r\\n")
        else:
            self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"ok")
server = http.server.ThreadingHTTPServer((sys.argv[1], 8000), Handler); print("ready", flush=True)
server.serve_forever()
"""
# Three answers over connections of their own, each timed from the beginning; then when the pieces of a stream came.
CLIENT = """
import http.client, json, ssl, sys, time
context = ssl.create_default_context(cafile=sys.argv[3]); cold = []
for _ in range(3):
    began = time.monotonic()
    connection = http.client.HTTPSConnection(sys.argv[1], int(sys.argv[2]), context=context, timeout=10)
    connection.request("GET", "/"); body = connection.getresponse().read(); cold.append(time.monotonic() - began)
    assert body == b"ok"
began = time.monotonic(); connection.request("GET", "/stream"); answer = connection.getresponse()
pieces = []
while piece := answer.read1(100): pieces.append((piece.decode(), time.monotonic() - began))
print(json.dumps({"cold_ms": min(cold) * 1e3, "pieces": pieces}))
"""


@pytest.mark.clock
def test_an_edge_ends_tls_near_the_client_and_keeps_its_connection_to_the_origin(open_link, python_in):
    with open_link(rtt_ms=CLIENT_MS, hosts=("client", "edge", "origin"), origin_leg=Leg(rtt_ms=ORIGIN_MS)) as link:
        python_in(link, "origin", ORIGIN, link.address("origin"), wait=False)
        with Edge(link, 8000) as edge:
            before = link.counters("edge")
            seen = json.loads(python_in(link, "client", CLIENT, *edge.endpoint, edge.certificate.certificate))
            grown = link.counters("edge") - before
    # TCP, TLS 1.3 and the request are three round trips to the edge, of which only the last goes on to the origin.
    expected = 3 * CLIENT_MS + ORIGIN_MS
    # The best of three, for a crowded machine adds to it.
    assert expected <= seen["cold_ms"] < expected + 40 < 3 * (CLIENT_MS + ORIGIN_MS)
    assert (grown.connections_opened, grown.connections_accepted) == (0, 3)
    (first, at), (second, later) = seen["pieces"]
    assert (first, second) == ("one", "two") and later - at == pytest.approx(0.15, abs=0.05)


def test_an_origin_that_is_not_there_is_named(open_link):
    with open_link(rtt_ms=1, hosts=("client", "edge", "origin"), origin_leg=Leg(rtt_ms=1)) as link:
        with pytest.raises(UserError, match="origin does not answer"), Edge(link, 8000):
            pass


def test_a_link_without_an_edge_is_refused():
    with Link(rtt_ms=1, mode="delay only") as link, pytest.raises(UserError, match="hosts="):
        Edge(link, 8000)
