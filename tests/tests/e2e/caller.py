"""A caller of the tunnel's port who keeps to no rule. HTTP/2 by hand: a test wants to say what no library lets one say.

    caller.py ADDRESS [--certificate PEM] [--alpn NAME] [--tls12] WHAT [ARGUMENT...]

With --plain PORT it speaks to that port, without TLS, and asks for pages. Prints one line: how the other side took it.
"""

import argparse
import random
import socket
import ssl
import struct
import time

PORT = 15008
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ACK = END_STREAM = 1
END_HEADERS = 4
# By its place in the static table; the others are written out.
STATUS = {0x88: "200", 0x8C: "400"}
WRITTEN_STATUS = 0x48


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(index, value):
    """A literal header field without indexing, its name from the static table (RFC 7541, 6.2.2)."""
    return bytes([index, len(value)]) + value.encode()


def named(name, value):
    """A literal header field without indexing, whose name is in no table."""
    return bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def connect_request(stream, authority, flags=END_HEADERS):
    return frame(HEADERS, flags, stream, literal(2, "CONNECT") + literal(1, authority))


def page_request(stream, authority, flags=END_HEADERS):
    """GET / over http, by the static table."""
    return frame(HEADERS, flags | END_STREAM, stream, bytes([0x82, 0x84, 0x86]) + literal(1, authority))


def dial(args):
    return socket.create_connection((args.address, args.plain or PORT), timeout=10)


def shake(args):
    """The handshake. In TLS 1.3 the server refuses a client only after it: the next read tells."""
    if args.plain:
        return dial(args)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if args.alpn:
        context.set_alpn_protocols([args.alpn])
    if args.tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if args.certificate:
        context.load_cert_chain(args.certificate)
    return context.wrap_socket(dial(args))


def exactly(tls, count):
    data = b""
    while len(data) < count:
        more = tls.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def read_frame(tls):
    head = exactly(tls, 9)
    return head[3], int.from_bytes(head[5:9], "big"), exactly(tls, int.from_bytes(head[:3], "big"))


def error_of(payload):
    return "error %d" % int.from_bytes(payload[-4:], "big")


def digits(text):
    """A string of digits, as it is or by their Huffman code (RFC 7541, 5.2 and appendix B): 0 to 2 have five bits, 3 to 9 have six."""
    said = text[1 : 1 + (text[0] & 0x7F)]
    if not text[0] & 0x80:
        return said.decode()
    bits, read = "".join(format(byte, "08b") for byte in said), ""
    while len(bits) >= 5 and not bits.startswith("11111"):
        length = 5 if int(bits[:5], 2) < 3 else 6
        code, bits = int(bits[:length], 2), bits[length:]
        read += str(code if length == 5 else code - 0b011001 + 3)
    return read


def verdict(tls):
    """What ends the connection, or else what the first stream gets."""
    while True:
        kind, _, payload = read_frame(tls)
        if kind == HEADERS:
            # The table size may be set before the first field (RFC 7541, 6.3).
            at = next(at for at, byte in enumerate(payload) if byte & 0xE0 != 0x20)
            if payload[at] == WRITTEN_STATUS:
                return digits(payload[at + 1 :])
            return STATUS.get(payload[at], payload.hex())
        if kind == RST_STREAM:
            return "reset " + error_of(payload)
        if kind == GOAWAY:
            return "goaway error %d" % int.from_bytes(payload[4:8], "big")


def ask(args):
    """One request: METHOD AUTHORITY. Prints the status of the answer."""
    method, authority = args.arguments
    tls = shake(args)
    headers = literal(2, method) + literal(1, authority)
    if method != "CONNECT":
        headers += literal(4, "/") + literal(6, "https")
    tls.sendall(PREFACE + frame(SETTINGS) + frame(HEADERS, END_HEADERS, 1, headers))
    return verdict(tls)


def claim(args):
    """A CONNECT: AUTHORITY FORWARDED, and a name that is not ours. Prints our own end of the connection, and the line that the
    application says."""
    authority, forwarded = args.arguments
    tls = shake(args)
    headers = literal(2, "CONNECT") + literal(1, authority) + named("forwarded", forwarded)
    headers += named("baggage", "k8s.namespace.name=bank,k8s.deployment.name=teller,service.name=teller")
    tls.sendall(PREFACE + frame(SETTINGS) + frame(HEADERS, END_HEADERS, 1, headers))
    status = verdict(tls)
    said = b""
    while status == "200" and not said.endswith(b"\n"):
        kind, stream, payload = read_frame(tls)
        said += payload if kind == DATA and stream == 1 else b""
    own = tls.getsockname()
    return "%s %s" % (("[%s]:%d" if ":" in own[0] else "%s:%d") % own[:2], said.decode().strip() or status)


def hello(args):
    """Nothing but a handshake and the first frames."""
    tls = shake(args)
    tls.sendall(PREFACE + frame(SETTINGS))
    kind, _, _ = read_frame(tls)
    return "welcome" if kind == SETTINGS else "frame %d" % kind


def flood(args):
    """KIND COUNT AUTHORITY: as many frames of a kind as it takes until the other side ends the connection."""
    kind, count, authority = args.arguments[0], int(args.arguments[1]), args.arguments[2]
    request = page_request if args.plain else connect_request
    tls = shake(args)
    tls.sendall(PREFACE + frame(SETTINGS))
    if kind == "continuation":
        tls.sendall(request(1, authority, flags=0))
    if kind == "empty-data":
        tls.sendall(request(1, authority))
    one = {
        "settings": lambda n: frame(SETTINGS, payload=struct.pack(">HI", 4, 65535 + n % 2)),
        "ping": lambda n: frame(PING, payload=struct.pack(">Q", n)),
        "continuation": lambda n: frame(CONTINUATION, 0, 1, bytes([0x0F, 0, 100]) + b"x" * 100),
        "reset": lambda n: request(2 * n + 1, authority) + frame(RST_STREAM, 0, 2 * n + 1, struct.pack(">I", 8)),
        "empty-data": lambda n: frame(DATA, 0, 1),
        "window": lambda n: frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
        "streams": lambda n: request(2 * n + 1, authority),
    }[kind]
    sent = 0
    tls.settimeout(5)
    try:
        while sent < count:
            tls.sendall(b"".join(one(sent + n) for n in range(500)))
            sent += 500
    except socket.timeout:
        return "%s: stalled" % kind
    except OSError:
        pass
    try:
        while True:
            kind_of_frame, _, payload = read_frame(tls)
            if kind_of_frame == GOAWAY and payload[4:8] != bytes(4):
                return "%s: goaway %d" % (kind, int.from_bytes(payload[4:8], "big"))
    except socket.timeout:
        return "%s: taken" % kind
    except (OSError, EOFError):
        return "%s: closed" % kind


def silent(args):
    """COUNT SECONDS: connections that never shake hands; how many are closed at the end."""
    count, seconds = int(args.arguments[0]), float(args.arguments[1])
    sockets = [dial(args) for _ in range(count)]
    print("open", flush=True)
    time.sleep(seconds)
    closed = 0
    for each in sockets:
        each.setblocking(False)
        try:
            closed += each.recv(1) == b""
        except BlockingIOError:
            pass
        except OSError:
            closed += 1
    return "closed %d" % closed


def slow(args):
    """A handshake of which a byte comes every second: after how many it is ended."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        context.wrap_bio(incoming, outgoing).do_handshake()
    except ssl.SSLWantReadError:
        pass
    plain = dial(args)
    plain.settimeout(1)
    for seconds, byte in enumerate(outgoing.read()):
        try:
            plain.sendall(bytes([byte]))
            if plain.recv(1) == b"":
                return "closed after %d seconds" % seconds
        except socket.timeout:
            pass
        except OSError:
            return "closed after %d seconds" % seconds
    return "taken"


def garbage(args):
    """SEED COUNT AUTHORITY: connections whose bytes are garbled, below TLS and above it."""
    seed, count, authority = int(args.arguments[0]), int(args.arguments[1]), args.arguments[2]
    dice = random.Random(seed)
    request = PREFACE + frame(SETTINGS, payload=struct.pack(">HI", 4, 1 << 20)) + connect_request(1, authority)
    request += frame(DATA, 0, 1, b"hello") + frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)) + frame(PING, payload=bytes(8))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    outgoing = ssl.MemoryBIO()
    try:
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    except ssl.SSLWantReadError:
        pass
    client_hello = outgoing.read()
    for number in range(count):
        above = args.certificate and number % 2
        data = bytearray(request if above else client_hello)
        keep = len(PREFACE) if above and dice.random() < 0.8 else 0
        for _ in range(dice.choice((1, 2, 8, 64))):
            at = dice.randrange(keep, len(data))
            data[at] = dice.randrange(256)
        if dice.random() < 0.3:
            at = dice.randrange(keep, len(data))
            del data[at : at + dice.randrange(1, 16)]
        connection = shake(args) if above else dial(args)
        try:
            connection.sendall(data)
            connection.settimeout(0.02)
            connection.recv(65536)
        except OSError:
            pass
        connection.close()
    return "said %d" % count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--certificate")
    parser.add_argument("--alpn", default="h2")
    parser.add_argument("--tls12", action="store_true")
    parser.add_argument("--plain", type=int)
    whats = {what.__name__: what for what in (ask, claim, hello, flood, silent, slow, garbage)}
    parser.add_argument("what", choices=whats)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    try:
        print(whats[args.what](args))
    except ssl.SSLEOFError:
        print("closed")
    except ssl.SSLError as error:
        print("alert", error.reason or str(error).split(" (_ssl")[0])
    except EOFError:
        print("closed")
    except OSError as error:
        print("broken", error.errno)


main()
