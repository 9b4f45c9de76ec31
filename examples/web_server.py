"""An aiohttp server in an IOThread, its client in another; a handler asks the main context."""

import threading

from aiohttp import ClientSession, web

import homeloop

visits = 0


async def count() -> int:
    global visits                               # the main context's own: no lock, whoever asks
    visits += 1
    return visits


async def hello(request: web.Request) -> web.Response:
    number = await homeloop.main_context().run(count())
    return web.Response(text=f"visit {number}, served by {threading.current_thread().name}")


async def start() -> tuple[web.AppRunner, int]:
    app = web.Application()
    app.router.add_get("/", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


async def get(port: int) -> str:
    async with ClientSession() as session, session.get(f"http://127.0.0.1:{port}/") as response:
        return await response.text()


async def main() -> None:
    with homeloop.IOThread("web") as web_thread, homeloop.IOThread("browser") as browser:
        runner, port = await web_thread.run(start())
        print(await browser.run(get(port)))
        print(await get(port))
        await web_thread.run(runner.cleanup())


homeloop.run(main())
