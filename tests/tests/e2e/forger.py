"""A pod with a raw socket, which says what no kernel would say for it. IPv4 and IPv6, over eth0.

    forger.py forge SOURCE PORT TARGET PORT         a connection in the name of another: what comes back goes there
    forger.py impersonate SOURCE TARGET PORT        takes another's address over, and connects from it
    forger.py inject TARGET PORT GATE               speaks on a connection of its own pod's, and once more when there is a file GATE
    forger.py serve PORT                            says which paths it is asked for, whoever asks

The first two print one line: how the other side took it.
"""

import argparse
import errno
import fcntl
import http.server
import ipaddress
import os
import random
import socket
import struct
import time

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
IP, ARP, IP6 = 0x0800, 0x0806, 0x86DD
SIOCGIFHWADDR = 0x8927


def checksum(data):
    total = sum(struct.unpack(">%dH" % ((len(data) + 1) // 2), data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def packet(source, target, protocol, payload, checksum_at):
    """An IP packet whose payload has its checksum there."""
    source, target = ipaddress.ip_address(source), ipaddress.ip_address(target)
    pseudo = source.packed + target.packed + struct.pack(">II", len(payload), protocol)
    payload = payload[:checksum_at] + struct.pack(">H", checksum(pseudo + payload)) + payload[checksum_at + 2 :]
    if source.version == 6:
        return struct.pack(">IHBB", 6 << 28, len(payload), protocol, 255) + source.packed + target.packed + payload
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + source.packed + target.packed
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def segment(source, target, flags, sequence, acknowledged, data=b""):
    ports = struct.pack(">HH", source[1], target[1])
    head = ports + struct.pack(">IIBBHHH", sequence % 2**32, acknowledged % 2**32, 5 << 4, flags, 65535, 0, 0)
    return packet(source[0], target[0], socket.IPPROTO_TCP, head + data, 16)


def link():
    """All that passes eth0, with its link-layer heads."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    raw.bind(("eth0", 3))
    return raw


def forge(args):
    """A handshake whose answer is not seen, data, and a reset: each as if it had been asked for."""
    source, target = (args.arguments[0], int(args.arguments[1])), (args.arguments[2], int(args.arguments[3]))
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    # The kernel finds the way; all of the packet is ours.
    raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    sequence = random.getrandbits(32)
    for flags, at, data in [
        (SYN, 0, b""),
        (ACK, 1, b""),
        (PSH | ACK, 1, b"forged\n"),
        (FIN | ACK, 8, b""),
        (RST, 9, b""),
    ]:
        raw.sendto(segment(source, target, flags, sequence + at, random.getrandbits(32), data), (target[0], 0))
        time.sleep(0.01)
    return "forged"


def announcement(address):
    """To everybody on the link: the address is ours now."""
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    own = fcntl.ioctl(plain, SIOCGIFHWADDR, struct.pack("256s", b"eth0"))[18:24]
    address = ipaddress.ip_address(address)
    if address.version == 4:
        arp = struct.pack(">HHBBH", 1, IP, 6, 4, 2) + own + address.packed + own + address.packed
        return b"\xff" * 6 + own + struct.pack(">H", ARP) + arp
    # An unsolicited neighbour advertisement that overrides (RFC 4861, 4.4), with our link-layer address.
    advertisement = struct.pack(">BBHI", 136, 0, 0, 0x20000000) + address.packed + struct.pack(">BB", 2, 1) + own
    neighbours = packet(address, "ff02::1", socket.IPPROTO_ICMPV6, advertisement, 2)
    return bytes.fromhex("333300000001") + own + struct.pack(">H", IP6) + neighbours


def impersonate(args):
    """The address is to be one of eth0's already. Tries until it hears something else than the one it pretends to be."""
    source, target = args.arguments[0], (args.arguments[1], int(args.arguments[2]))
    raw, frame = link(), announcement(source)
    for _ in range(50):
        client = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(0.2)
        client.bind((source, 0))
        raw.send(frame)
        try:
            client.connect(target)
            raw.send(frame)
            client.settimeout(5)
            said = client.recv(1024)
            return "served: " + said.decode() if said else "closed"
        except socket.timeout:
            continue
        except OSError as error:
            return errno.errorcode[error.errno]
    return "unheard"


def overheard(raw, target):
    """The next segment between this pod and the target: its head on the link, whose it is, both ends, numbers, data."""
    while True:
        frame, (_, _, kind, *_) = raw.recvfrom(65536)
        (family,) = struct.unpack(">H", frame[12:14])
        if family == IP and frame[23] == socket.IPPROTO_TCP:
            at, length, ends = 14 + (frame[14] & 15) * 4, 14 + struct.unpack(">H", frame[16:18])[0], frame[26:34]
        elif family == IP6 and frame[20] == socket.IPPROTO_TCP:
            at, length, ends = 54, 54 + struct.unpack(">H", frame[18:20])[0], frame[22:54]
        else:
            continue
        half = len(ends) // 2
        ends = [str(ipaddress.ip_address(end)) for end in (ends[:half], ends[half:])]
        if target not in ends:
            continue
        ports = struct.unpack(">HH", frame[at : at + 4])
        sequence, acknowledged, offset = struct.unpack(">IIB", frame[at + 4 : at + 13])
        data = frame[at + (offset >> 4) * 4 : length]
        is_ours = ends[1] == target and kind == socket.PACKET_OUTGOING
        yield frame[:14], is_ours, tuple(zip(ends, ports)), (sequence + len(data)) % 2**32, acknowledged, data


def inject(args):
    """Whoever sees the numbers of a connection can speak on it when its ends are silent. Tells what it has said."""
    target, port, gate = args.arguments
    raw = link()
    raw.settimeout(0.05)
    head = connection = None
    has_spoken = False
    print("hearing", flush=True)

    def say(path):
        request = f"GET {path} HTTP/1.1\r\nhost: forged\r\n\r\n".encode()
        raw.send(head + segment(*connection, PSH | ACK, sequence, acknowledged, request))
        print(path, flush=True)

    segments = overheard(raw, target)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            link_head, is_ours, ends, following, acknowledges, data = next(segments)
        except socket.timeout:
            segments = overheard(raw, target)
            if has_spoken and os.path.exists(gate):
                say("/forged/later")
                return "done"
            if connection and not has_spoken:
                say("/forged")
                has_spoken = True
            continue
        if connection is None and is_ours and data and ends[1][1] == int(port):
            head, connection = link_head, ends
        if ends == connection and not has_spoken:
            sequence, acknowledged = following, acknowledges
        elif connection and ends == connection[::-1]:
            # The other side says what it has got, and is told that its answer has come: it is not to ask the pod's own kernel for that.
            sequence, acknowledged = acknowledges, following
            if data and has_spoken:
                raw.send(head + segment(*connection, ACK, sequence, acknowledged))
    return "nobody spoke"


class Listed(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        print(self.path, flush=True)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True


def serve(args):
    Server(("::", int(args.arguments[0])), Listed).serve_forever()


def main():
    parser = argparse.ArgumentParser()
    whats = {what.__name__: what for what in (forge, impersonate, inject, serve)}
    parser.add_argument("what", choices=whats)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    print(whats[args.what](args))


main()
