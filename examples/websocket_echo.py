"""A websockets server in an IOThread, its client in another."""

import threading

from websockets.asyncio.client import connect
from websockets.asyncio.server import Server, ServerConnection, serve

import homeloop


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(f"{message} by {threading.current_thread().name}")


async def listen() -> Server:
    return await serve(echo, "127.0.0.1", 0)


async def close(server: Server) -> None:
    server.close()
    await server.wait_closed()


async def talk(port: int) -> list[str]:
    async with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
        await connection.send("echoed")
        return [threading.current_thread().name, str(await connection.recv())]


async def main() -> None:
    with homeloop.IOThread("echo") as there, homeloop.IOThread("caller") as here:
        server = await there.run(listen())
        port = next(iter(server.sockets)).getsockname()[1]
        print(*await here.run(talk(port)), sep=": ")
        await there.run(close(server))


homeloop.run(main())
