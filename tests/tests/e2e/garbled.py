"""Both ends of messages that are no good HTTP.

    garbled.py serve PORT RECORD               answers 200 to each whole request, and appends it to the file as it came
    garbled.py say ADDRESS PORT RECORD CASES   sends what is left of `=>` in each line, and prints the line with what came of it

What an answer of the mesh's own is followed by does not matter; what a server's is followed by is one more request, which must be
taken for one.
"""

import contextlib
import os
import re
import socket
import sys
import threading

LIMIT = 10

# Says that a connection is as it should be: what is taken for it, or for a part of it, is seen.
END = b"GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
END_SEEN = b"GET /end HTTP/1.1\r\nHost: a\r\n\r\n"


def serve(port, record):
    out = open(record, "ab", buffering=0)
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=answer, args=(client, out), daemon=True).start()


def answer(client, out):
    """Reads as strictly as it can: what follows a request belongs to the next one."""
    got = b""
    with client, contextlib.suppress(ConnectionError):
        while True:
            while (end := whole(got)) is None:
                more = client.recv(65536)
                if not more:
                    return
                got += more
            request, got = got[:end], got[end:]
            out.write(request)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            if request == END:
                return


def whole(got):
    """Where the first request ends, if all of it is there."""
    head = re.match(rb"(?s)\s*.*?\r?\n\r?\n", got)
    if not head:
        return None
    head, body = head[0], got[head.end() :]
    length = re.search(rb"\ncontent-length: *(\d+)", head, re.I)
    if re.search(rb"\ntransfer-encoding: *chunked", head, re.I):
        end = re.match(rb"(?s)(?:.*?\r\n)?0\r\n(?:[^\r\n]+\r\n)*\r\n", body)
        return len(head) + end.end() if end else None
    end = len(head) + (int(length[1]) if length else 0)
    return end if end <= len(got) else None


def say(host, port, record, cases):
    for line in open(cases, encoding="ascii"):
        sent, _, expected = line.rstrip("\n").partition(" => ")
        answers = len(expected.split(" => ")[0].split())
        print(sent, "=>", came_of(read(sent), (host, int(port)), record, answers))


def came_of(sent, to, record, answers):
    """The answers' statuses, then what the server got, if anything; both without the request at the end, if that is what it should be."""
    before = os.path.getsize(record)
    said = b""
    with socket.create_connection(to, LIMIT) as client:
        client.settimeout(LIMIT)
        try:
            client.sendall(sent)
            while len(statuses(said)) < answers and (more := client.recv(65536)):
                said += more
            if statuses(said)[-1:] == ["200"]:
                client.sendall(END)
            else:
                client.shutdown(socket.SHUT_WR)
            while more := client.recv(65536):
                said += more
        except TimeoutError:
            said += b"HTTP/1.1 nothing"
        except OSError:
            # A connection that is closed with bytes left in it is reset, whatever was answered.
            said += b"" if statuses(said) else b"HTTP/1.1 reset"
    with open(record, "rb") as file:
        file.seek(before)
        got = file.read()
    found = statuses(said)
    end = next((end for end in (END, END_SEEN) if got.endswith(end)), None)
    if end and found[-1:] == ["200"]:
        got, found = got.removesuffix(end), found[:-1]
    return f"{' '.join(found)} => {shown(got)}" if got else " ".join(found)


def statuses(said):
    return [status.decode() for status in re.findall(rb"HTTP/1\.[01] (\d{3}|reset|nothing)", said)]


def read(text):
    return text.encode().decode("unicode_escape").encode("latin1")


def shown(data):
    return data.decode("latin1").encode("unicode_escape").decode()


{"serve": lambda port, record: serve(int(port), record), "say": say}[sys.argv[1]](*sys.argv[2:])
