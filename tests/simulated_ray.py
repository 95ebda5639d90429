"""A simulated Ray cluster: `answer` gives the result of every actor call, and nothing waits."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any


class PendingError(Exception):
    """Raised by `answer`: this call has not ended. `answer` is called again whenever the call is
    waited for."""


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class RayActorError(RayError):
    pass


class Call:
    def __init__(self, ask: Callable[[], Any]):
        self._ask, self.ended = ask, False
        self.look()

    def look(self) -> bool:
        if not self.ended:
            try:
                self.result = self._ask()
            except PendingError:
                return False
            except RayError as error:
                self.result = error
            self.ended = True
        return True


class Actor:
    """`actor.METHOD.remote(...)`, and `actor.METHOD.options(...).remote(...)`."""

    def __init__(self, ray: "SimulatedRay", number: int):
        self._ray, self._number = ray, number

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any, **_: Any) -> Call:
            return Call(lambda: self._ray.answer(self._number, name, *arguments))

        method = SimpleNamespace(remote=remote)
        method.options = lambda **_: method
        return method


class SimulatedRay:
    """Replaces the module `ray`. Actors are numbered from 0, in the order in which they start.

    answer: called with the number of an actor, the name of the method, and its arguments. It
        returns the result, raises an error of Ray as the call's, or raises PendingError if the
        call has not ended.
    nodes: the resources of each node.
    on_wait: called whenever the driver waits for any of several calls.
    """

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayTaskError=RayTaskError,
        RayActorError=RayActorError,
        ActorUnavailableError=RayActorError,
    )

    def __init__(
        self,
        answer: Callable[..., Any],
        nodes: Sequence[dict[str, float]],
        on_wait: Callable[[], object] = lambda: None,
    ):
        self.answer, self.on_wait, self.num_actors = answer, on_wait, 0
        self._nodes = nodes

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": str(number), "Alive": True, "Resources": node}
            for number, node in enumerate(self._nodes)
        ]

    def cluster_resources(self) -> dict[str, float]:
        names = {name for node in self._nodes for name in node}
        return {name: sum(node.get(name, 0) for node in self._nodes) for name in names}

    def remote(self, **_: Any) -> Callable[[type], Any]:
        actor_class = SimpleNamespace(remote=self._start)
        actor_class.options = lambda **_: actor_class
        return lambda cls: actor_class

    def _start(self, *_: Any) -> Actor:
        self.num_actors += 1
        return Actor(self, self.num_actors - 1)

    def wait(
        self, calls: list[Call], *, timeout: float, num_returns: int | None = None
    ) -> tuple[list[Call], list[Call]]:
        if num_returns is not None:
            self.on_wait()
        ended = [call for call in calls if call.look()]
        return ended, [call for call in calls if call not in ended]

    def get(self, call: Call) -> Any:
        if isinstance(call.result, RayError):
            raise call.result
        return call.result

    def kill(self, actor: Actor) -> None:
        pass
