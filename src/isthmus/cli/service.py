"""How a command that serves is run: until SIGTERM or SIGINT; of several errors at once, the one that we can explain."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

from isthmus.model.errors import IsthmusError


def run_service(serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run ``serve(stop)`` to its end; a signal sets ``stop``. An IsthmusError within an exception group is raised."""

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(stop)

    try:
        asyncio.run(run())
    except BaseExceptionGroup as group:
        known = next((error for error in _leaves(group) if isinstance(error, IsthmusError)), None)
        if known is not None:
            raise known from group
        raise


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
