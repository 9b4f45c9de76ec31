"""asyncio's streams over two contexts: a server at home in one IOThread, its client in another."""

import asyncio
import threading

import homeloop


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write(b"%b, from %b\n" % (line.strip(), threading.current_thread().name.encode()))
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def listen() -> asyncio.Server:
    return await asyncio.start_server(answer, "127.0.0.1", 0)


async def ask(address: tuple[str, int]) -> str:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"asked by %b\n" % threading.current_thread().name.encode())
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return line.decode().strip()


async def close(server: asyncio.Server) -> None:
    server.close()
    await server.wait_closed()


async def main() -> None:
    with homeloop.IOThread("server") as there, homeloop.IOThread("client") as here:
        server = await there.run(listen())
        address = server.sockets[0].getsockname()
        print(await here.run(ask(address)))
        print(await ask(address))
        await there.run(close(server))          # who made it closes it: its methods are for its home


homeloop.run(main())
