"""A server on the tunnel's port that shakes hands as it should, and breaks off each connection at its first request.

    breaker.py PEM

Prints a line for each request. Every other connection is reset, and the rest end in order, as if the agent had ended.
"""

import socket
import ssl
import struct
import sys
import threading

PORT = 15008
PREFACE_LENGTH = 24
HEADERS, SETTINGS, PING = 1, 4, 6
ACK = 1


def frame(kind, flags, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, 0) + payload


def exactly(tls, count):
    data = b""
    while len(data) < count:
        more = tls.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def serve(context, plain, resets):
    try:
        with context.wrap_socket(plain, server_side=True) as tls:
            exactly(tls, PREFACE_LENGTH)
            tls.sendall(frame(SETTINGS, 0))
            while True:
                head = exactly(tls, 9)
                kind, flags, payload = head[3], head[4], exactly(tls, int.from_bytes(head[:3], "big"))
                if kind in (SETTINGS, PING) and not flags & ACK:
                    tls.sendall(frame(kind, ACK, payload if kind == PING else b""))
                if kind == HEADERS:
                    print("asked", flush=True)
                    if resets:
                        tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
    except (OSError, EOFError):
        pass


def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1])
    context.set_alpn_protocols(["h2"])
    listener = socket.create_server(("", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    resets = False
    while True:
        plain, _ = listener.accept()
        resets = not resets
        threading.Thread(target=serve, args=(context, plain, resets)).start()


main()
