"""The runners as this worker reaches them: one channel to each, opened when first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpc import aio

from ashd.errors import Unavailable
from ashd.store.sessions import Location
from ashd.wire.channel import Metadata, bearer, open_channel
from ashd.wire.v1.runner_pb2_grpc import RunnerStub

if TYPE_CHECKING:
    from ashd.wire.v1.runner_pb2_grpc import RunnerAsyncStub  # a name of the stubs' only


class Fleet:
    """Channels to runners, by address. Bounded by the number of addresses runners ever registered with this worker's
    life.
    """

    def __init__(self, secret: str) -> None:
        self.metadata: Metadata = bearer(secret)
        self._channels: dict[str, tuple[aio.Channel, RunnerAsyncStub]] = {}

    def runner(self, address: str | None) -> RunnerAsyncStub:
        """The runner at an address. Raises Unavailable where the session has none."""
        if address is None:
            raise Unavailable("The session's runner is not registered now", code="runner.unregistered")
        if address not in self._channels:
            channel = open_channel(address)
            self._channels[address] = channel, RunnerStub(channel)
        return self._channels[address][1]

    async def keep_only(self, addresses: set[str]) -> None:
        """Closes channels to runners that are no longer there."""
        for address in self._channels.keys() - addresses:
            channel, _ = self._channels.pop(address)
            await channel.close(grace=1.0)

    async def close(self) -> None:
        await self.keep_only(set())


def is_live(location: Location) -> bool:
    """Whether a session has a sandbox that can be followed."""
    return location.status == "active" and location.runner_address is not None
