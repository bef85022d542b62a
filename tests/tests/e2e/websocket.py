"""Both ends of a conversation by WebSocket, as `websockets` has them.

    websocket.py serve PORT       says back what it hears, sends of its own when it is told to, and prints how each conversation ended
    websocket.py talk ADDRESS PORT PATH   says all kinds of things, and prints what came of each, as JSON
"""

import asyncio
import json
import sys

import websockets

BIG = 5_000_000
MANY = 300


async def serve(port):
    async def converse(socket, path):
        try:
            await hear(socket)
        except websockets.ConnectionClosed:
            pass
        print(path, socket.subprotocol, socket.close_code, socket.close_reason, flush=True)

    async with websockets.serve(converse, None, port, subprotocols=["chat.v2"], max_size=None, ping_interval=None):
        await asyncio.Future()


async def hear(socket):
    async for message in socket:
        if message == "leave":
            await socket.close(4001, "as you wish")
        elif message == "flood":
            # While it goes on hearing and answering.
            asyncio.ensure_future(flood(socket, "s"))
        else:
            await socket.send(message)


async def flood(socket, whose):
    for number in range(MANY):
        await socket.send(f"{whose}{number}:" + "x" * 10_000)


async def talk(host, port, path):
    host = f"[{host}]" if ":" in host else host
    url = f"ws://{host}:{port}{path}"
    options = {"subprotocols": ["chat.v1", "chat.v2"], "max_size": None, "ping_interval": None, "open_timeout": 20}
    found = {}
    async with websockets.connect(url, **options) as socket:
        found["subprotocol"] = socket.subprotocol
        found["compressed"] = [extension.name for extension in socket.extensions]

        async def echoed(name, message, whole=None):
            await socket.send(message)
            found[name] = await socket.recv() == (message if whole is None else whole)

        await echoed("text", "grüße 🌍")
        await echoed("empty", "")
        await echoed("binary", bytes(range(256)))
        await echoed("big", "ä" * (BIG // 2))
        await echoed("big binary", bytes(BIG))
        # A message in three frames.
        await echoed("in pieces", ["one ", "two ", "three"], "one two three")
        await asyncio.wait_for(await socket.ping(b"are you there"), 20)
        found["ping"] = True
        found["both ways"] = await both_ways(socket)
        await socket.close(3007, "enough")
        found["closed"] = [socket.close_code, socket.close_reason]
    async with websockets.connect(url, compression=None, **options) as socket:
        await socket.send(bytes(BIG))
        found["uncompressed"] = await socket.recv() == bytes(BIG)
        await socket.send("leave")
        try:
            await socket.recv()
        except websockets.ConnectionClosed as closed:
            found["left"] = [closed.rcvd.code, closed.rcvd.reason]
    print(json.dumps(found))


async def both_ways(socket):
    """Each side's messages in their order, while both send."""
    await socket.send("flood")
    sending = asyncio.ensure_future(flood(socket, "c"))
    heard = {"c": [], "s": []}
    for _ in range(2 * MANY):
        message = await asyncio.wait_for(socket.recv(), 20)
        heard[message[0]].append(int(message[1:].split(":")[0]))
    await sending
    return all(numbers == list(range(MANY)) for numbers in heard.values())


arguments = sys.argv[2:]
asyncio.run(serve(int(arguments[0])) if sys.argv[1] == "serve" else talk(*arguments))
