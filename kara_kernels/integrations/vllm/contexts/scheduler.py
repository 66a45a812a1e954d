"""vLLM's scheduler with stored contexts among its prefix hits.

Rows out of a packet that lost something are not what the hash of their tokens promises. So a request that is admitted
with them leaves the prefix cache that it arrived in: its blocks get hashes that are salted with the packet's name, as
tenants get theirs from ``cache_salt``. Its later blocks, computed from those rows, get them too. Requests admitted from
the same packet find them there, and nobody else does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .manager import GPU

_Mixin: Any = Any if TYPE_CHECKING else object  # the class after the mixin is one of several classes of vLLM


def salt(request: Request, packet: str) -> None:
    """Moves a request into the prefix cache of a packet; an empty name: back into its own. A waiting request moves to
    and fro in every step, so hashes are kept."""
    if not hasattr(request, "kara_own_salt"):
        request.kara_own_salt, request.kara_packet, request.kara_hashes = request.cache_salt, "", {}
    request.kara_hashes[request.kara_packet] = list(request.block_hashes)
    own = request.kara_own_salt
    request.cache_salt = f"{own or ''}\0kara\0{packet}" if packet else own
    request.block_hashes[:] = request.kara_hashes.get(packet, ())
    request.kara_packet = packet
    request.update_block_hashes()


class WithContexts(_Mixin):
    """Mixed in before a scheduler of vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connector.bind_scheduler(self)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        half = self.connector.contexts
        half.leave(request)
        self.begin_without(request.request_id, 0)
        found = super()._get_local_prefix_cache_hit(request)
        admission = half.choose(request, found[1])
        if admission is None:
            return found
        if not admission.exact:
            salt(request, admission.packet)
            within = super()._get_local_prefix_cache_hit(request)
            if within[1] >= admission.place.tokens:  # another request was admitted from it, and its blocks are here
                half.admit(request, admission, GPU)
                return within
        half.admit(request, admission, admission.tier)
        self.begin_without(request.request_id, admission.dropped)
        return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False

    def begin_without(self, request_id: str, dropped: int) -> None:
        """A request begins with the rows of a packet, which are ``dropped`` fewer than its tokens. Only a scheduler
        that knows two lengths can do that, and others have no such packets."""
        assert not dropped

    def may_compress(self, request: Request) -> bool:
        """Whether windows may compress a request: it has not opted out of them."""
        return False

    def left_of(self, request_id: str, written: int, tokens: int) -> int | None:
        """How many of a request's first rows hold what windows left of its first ``tokens`` tokens, of which
        ``written`` have been computed. None: all of them have rows, or a window reaches further."""
        return None

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        if not drop_stale_output:  # else the rows are not to be used again: the model's weights may have changed
            self.connector.contexts.preempted(request)
        super()._preempt_request(request, timestamp, drop_stale_output)

    def update_from_output(self, *args: Any) -> Any:
        outputs = super().update_from_output(*args)
        for name in self.connector.contexts.let_go():
            self._free_blocks(self.requests[name])
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.new_token_ids:
                    self.connector.contexts.spoke(output.request_id)
        return outputs


class ContextScheduler(WithContexts, Scheduler):
    """Synchronous."""


class ContextAsyncScheduler(WithContexts, AsyncScheduler):
    """Asynchronous."""
