"""Both ends of CONNECT, of which the server agrees to anything and goes on with HTTP.

    connect.py serve PORT              answers 200 to each head, and prints its first line
    connect.py get ADDRESS PORT        asks by CONNECT and then for /admin, and prints the statuses of the answers
    connect.py hold ADDRESS PORT       asks by CONNECT, prints the status, and "ended" when the connection is
"""

import socket
import sys
import threading

LIMIT = 10
CONNECT = b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"
GET = b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n"


def serve(port):
    listener = socket.create_server(("", port))
    while True:
        client, _ = listener.accept()
        threading.Thread(target=answer, args=(client,), daemon=True).start()


def answer(client):
    with client, client.makefile("rb") as lines:
        for line in lines:
            if b" HTTP/1" in line:
                print(line.split(b" HTTP/")[0].decode(), flush=True)
            if line == b"\r\n":
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def status(lines):
    status = next(lines).split()[1].decode()
    length = 0
    while (line := next(lines)) != b"\r\n":
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    lines.read(length)
    return status


def get(host, port):
    with socket.create_connection((host, port), LIMIT) as client, client.makefile("rb") as lines:
        client.sendall(CONNECT)
        first = status(lines)
        client.sendall(GET)
        print(first, status(lines))


def hold(host, port):
    with socket.create_connection((host, port), LIMIT) as client, client.makefile("rb") as lines:
        client.sendall(CONNECT)
        print(status(lines), flush=True)
        client.settimeout(None)
        try:
            client.recv(1)
        except ConnectionError:
            pass
        print("ended", flush=True)


role, *args = sys.argv[1:]
{"serve": serve, "get": get, "hold": hold}[role](*args[:-1], int(args[-1]))
