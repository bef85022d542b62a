"""Both ends of informational answers.

    informational.py serve PORT         says such answers ahead of others, as the path has it
    informational.py ask ADDRESS PORT   prints what came of each way to ask, as JSON

/ahead    says a hint, and answers once there was another request, for /go: who has not heard the hint by then waits in vain
/body     the same of a request whose client waits to send its body, and is told to go on after the other request
/upgrade  the same, and the answer is another protocol, that says back what is said
/flood    says more hints than anybody wants to hear
others    say a hint that names the path, and answer at once
"""

import json
import re
import socket
import sys
import threading

LIMIT = 10
FLOOD = 20000

go = threading.Semaphore(0)


def serve(port):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=answer_all, args=(client,), daemon=True).start()


def answer_all(client):
    with client:
        reader = client.makefile("rb")
        while request := head(reader):
            answer(client, reader, request.split()[1].decode())


def head(reader):
    """All of a head; nothing where the other end has ended."""
    lines = []
    while (line := reader.readline()) not in (b"", b"\r\n"):
        lines.append(line)
    return b"".join(lines)


def answer(client, reader, path):
    def say(status, *fields):
        client.sendall("".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *fields, "")).encode())

    def hint():
        # What is for one hop, or speaks of a body, is not for the client.
        say("103 Early Hints", f"Link: <{path}.css>", "X-Twice: a", "X-Twice: b", "Connection: x-mine", "X-Mine: 1", "Content-Length: 3")

    if path == "/go":
        go.release()
    elif path == "/flood":
        client.sendall(b"HTTP/1.1 103 Early Hints\r\nx-flood: 1\r\n\r\n" * FLOOD)
    else:
        hint()
    body = path
    if path in ("/ahead", "/body", "/upgrade"):
        body = f"{path} {go.acquire(timeout=LIMIT)}"
    if path == "/body":
        say("100 Continue")
        body += " " + reader.read(4).decode()
    if path == "/upgrade":
        say("101 Switching Protocols", "Connection: Upgrade", "Upgrade: echo")
        client.sendall(reader.read(4))
        return
    say("200 OK", f"Content-Length: {len(body)}")
    client.sendall(body.encode())


def ask(address, port):
    def connected():
        return socket.create_connection((address, port), LIMIT)

    def request(path, version="1.1", fields="", method="GET"):
        return f"{method} {path} HTTP/{version}\r\nHost: a\r\n{fields}\r\n".encode()

    def heard(reader):
        """The heads that come, to the one of an answer, and that one's body."""
        heads = []
        while not heads or heads[-1].startswith("HTTP/1.1 1"):
            heads.append(head(reader).decode())
        length = re.search(r"content-length: (\d+)", heads[-1], re.I)
        return heads, reader.read(int(length[1])).decode()

    def let_go():
        with connected() as other:
            other.sendall(request("/go"))
            heard(other.makefile("rb"))

    found = {}
    with connected() as client:
        reader = client.makefile("rb")
        client.sendall(request("/ahead"))
        hint = head(reader).decode()
        let_go()
        found["ahead"] = [hint, heard(reader)[1]]

        client.sendall(request("/body", method="POST", fields="Content-Length: 4\r\nExpect: 100-continue\r\n"))
        hint = head(reader).decode().splitlines()[0]
        let_go()
        go_on = head(reader).decode()
        client.sendall(b"body")
        found["body"] = [hint, go_on, heard(reader)[1]]

        client.sendall(b"".join(request(f"/{number}") for number in range(5)))
        in_turn = [heard(reader) for _ in range(5)]
        found["in turn"] = [[*re.findall(r"<.*>", heads[0]), len(heads), body] for heads, body in in_turn]

        client.sendall(request("/flood"))
        heads, body = heard(reader)
        found["flood"] = [len(heads) - 1, len(set(heads[:-1])), body]

        client.sendall(request("/upgrade", fields="Connection: Upgrade\r\nUpgrade: echo\r\n"))
        hint = head(reader).decode().splitlines()[0]
        let_go()
        switched = head(reader).decode().splitlines()[0]
        client.sendall(b"echo")
        found["upgrade"] = [hint, switched, reader.read(4).decode()]
    with connected() as client:
        client.sendall(request("/old", version="1.0"))
        found["old"] = [client.makefile("rb").readline().decode()]
    print(json.dumps(found))


if __name__ == "__main__":
    role, *args = sys.argv[1:]
    serve(int(args[0])) if role == "serve" else ask(args[0], int(args[1]))
