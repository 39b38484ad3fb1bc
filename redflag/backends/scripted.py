"""A backend that plays a script: the test double for everything that consumes steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from redflag.backends import Sampling, refuse_earlier, room_for
from redflag.errors import RedflagError
from redflag.trace import Step

Script = Sequence[Step] | Callable[[Sequence[int], Sampling], Iterable[Step]]
Measured = Callable[[Sequence[int], Sequence[tuple[int, int]]], Sequence[Sequence[Sequence[float]]]]
Watched = Callable[[Sequence[int], Sampling, Sequence[int]], Iterable[Step]]


class ScriptedBackend:
    """Yields given steps, without a model.

    Attributes:
        upper_bound: Whether the script's probabilities count as upper bounds.
        prompts: The token ids of every stream that was started, in order.
        open_streams: Streams started and not yet ended, closed or failed; 0 shows that a consumer cleaned up.
        closed_early: Streams closed by their consumer before the script was over.

    Example:
        >>> backend = ScriptedBackend([Step(5, (0.1,)), Step(2, (0.9,))], eos_ids={2})
        >>> [step.token_id for step in backend.stream([1], Sampling())]
        [5, 2]
    """

    def __init__(
        self,
        script: Script,
        eos_ids: Iterable[int] = (),
        *,
        fail_at: int | None = None,
        error: BaseException | None = None,
        context_length: int | None = None,
        watched: Watched | None = None,
        earlier: Measured | None = None,
    ) -> None:
        """Takes the script.

        Args:
            script: The steps, or a function of prompt and sampling that returns them (possibly endless).
            fail_at: Number of steps after which `error` is raised, as if the engine was lost; None never fails.
            error: The exception to raise; None = a `ConnectionError`.
            context_length: Maximum number of prompt and response tokens together; None = no limit.
            watched: Steps of a stream that measures other ids than the flags; None plays the script.
            earlier: A function of prompt and spans that returns the spans' probabilities; None measures none.
        """
        self.logprob_mode = "raw"
        self.upper_bound = False
        self._watched = watched
        self._earlier = earlier
        self.measures_earlier = earlier is not None
        self._script = script
        self.eos_ids = frozenset(eos_ids)
        self._fail_at = fail_at
        self._error = error if error is not None else ConnectionError("the scripted engine was lost")
        self._context_length = context_length
        self.prompts: list[tuple[int, ...]] = []
        self.open_streams = 0
        self.closed_early = 0

    def stream(self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()) -> Iterator[Step]:
        """Plays the script; see `redflag.backends.Backend.stream`."""
        room = room_for(len(token_ids), sampling, self._context_length)
        if sampling.grammar is not None:
            raise RedflagError("grammar is not supported by a script. Leave it out.")
        if self._earlier is None:
            refuse_earlier(sampling)
        steps: Iterable[Step]
        if watch and self._watched is not None:
            steps = self._watched(token_ids, sampling, watch)
        else:
            steps = self._script(token_ids, sampling) if callable(self._script) else self._script
        return self._play(tuple(token_ids), steps, room, sampling.earlier)

    def _play(
        self, token_ids: tuple[int, ...], steps: Iterable[Step], room: int, spans: tuple[tuple[int, int], ...]
    ) -> Iterator[Step]:
        self.prompts.append(token_ids)
        self.open_streams += 1
        try:
            for index, step in enumerate(steps):
                if index == room:
                    return
                if index == self._fail_at:
                    raise self._error
                if index == 0 and spans and self._earlier is not None:
                    measured = self._earlier(token_ids, spans)
                    step = step._replace(earlier=tuple(tuple(map(tuple, span)) for span in measured))
                yield step
                if step.token_id in self.eos_ids:
                    return
            if self._fail_at is not None:
                raise self._error
        except GeneratorExit:
            self.closed_early += 1
            raise
        finally:
            self.open_streams -= 1
