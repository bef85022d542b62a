"""Asks for one stream of a tunnel, with a certificate of the mesh, and prints the status of the answer.

Arguments: certificate and key in PEM, address of the pod, method, authority. HTTP/2 by hand: a test wants to ask for
what no library lets one ask for.
"""

import socket
import ssl
import struct
import sys

certificate, address, method, authority = sys.argv[1:]


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(index, value):
    """A literal header field without indexing, its name from the static table (RFC 7541, 6.2.2)."""
    return bytes([index, len(value)]) + value.encode()


def exactly(tls, count):
    data = b""
    while len(data) < count:
        more = tls.recv(count - len(data))
        if not more:
            raise SystemExit("closed")
        data += more
    return data


context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
context.set_alpn_protocols(["h2"])
context.load_cert_chain(certificate)
tls = context.wrap_socket(socket.create_connection((address, 15008), timeout=10))

headers = literal(2, method) + literal(1, authority)
if method != "CONNECT":
    headers += literal(4, "/") + literal(6, "https")
END_HEADERS = 4
tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, END_HEADERS, 1, headers))
STATUS = {0x88: "200", 0x8C: "400", 0x48: "503"}
while True:
    head = exactly(tls, 9)
    payload = exactly(tls, int.from_bytes(head[:3], "big"))
    if head[3] == 1:
        # The table size may be set before the first field (RFC 7541, 6.3).
        first = next(byte for byte in payload if byte & 0xE0 != 0x20)
        print(STATUS.get(first, payload.hex()))
        break
    if head[3] in (3, 7):
        print("reset" if head[3] == 3 else "goaway", payload.hex())
        break
