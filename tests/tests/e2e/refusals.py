"""A server of HTTP/2 that refuses requests, or breaks off: refusals.py PORT WHAT...

What it does with the first request, the second one and so on, whatever connection they come on:

    answer      200
    refuse      REFUSED_STREAM
    go          GOAWAY, whose last stream is the one before; the connection stays
    finish      GOAWAY, whose last stream is this one, and then 200
    break       GOAWAY, whose last stream is this one, and the end of the connection
    reset       the stream is reset for an error
    end         the end of the connection

An answer says the number of the connection, of the request, and the bytes of its body. Each request is printed when it has come.
"""

import itertools
import socket
import struct
import sys
import threading

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
NO_ERROR, INTERNAL_ERROR, REFUSED_STREAM = 0, 2, 7
# The eighth entry of HPACK's static table.
STATUS_200 = b"\x88"

numbers = itertools.count(1)
acts = iter(sys.argv[2:])


def serve(port):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    for connection in itertools.count(1):
        client, _ = listener.accept()
        threading.Thread(target=converse, args=(client, connection), daemon=True).start()


def converse(client, connection):
    reader = client.makefile("rb")

    def say(kind, flags, stream, payload=b""):
        client.sendall(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    reader.read(24)
    say(SETTINGS, 0, 0)
    bodies = {}
    while len(header := reader.read(9)) == 9:
        kind, flags, stream = struct.unpack(">BBI", header[3:])
        payload = reader.read(int.from_bytes(header[:3], "big"))
        if kind == SETTINGS and not flags & ACK:
            say(SETTINGS, ACK, 0)
        elif kind == PING and not flags & ACK:
            say(PING, ACK, 0, payload)
        elif kind in (HEADERS, DATA):
            if kind == DATA and payload:
                bodies[stream] = bodies.get(stream, 0) + len(payload)
                say(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload)))
                say(WINDOW_UPDATE, 0, stream, struct.pack(">I", len(payload)))
            if flags & END_STREAM and not act(say, stream, connection, bodies.get(stream, 0)):
                break
    # Whatever it has not read yet: the end is one in order.
    client.shutdown(socket.SHUT_RDWR)
    client.close()


def act(say, stream, connection, body):
    number, what = next(numbers), next(acts, "answer")
    print(number, what, flush=True)
    last = {"go": stream - 2, "finish": stream, "break": stream}.get(what)
    if last is not None:
        say(GOAWAY, 0, 0, struct.pack(">II", max(last, 0), NO_ERROR))
    if what in ("refuse", "reset"):
        say(RST_STREAM, 0, stream, struct.pack(">I", REFUSED_STREAM if what == "refuse" else INTERNAL_ERROR))
    if what in ("answer", "finish"):
        say(HEADERS, END_HEADERS, stream, STATUS_200)
        say(DATA, END_STREAM, stream, f"connection {connection}, request {number}, {body} bytes".encode())
    return what not in ("break", "end")


serve(int(sys.argv[1]))
