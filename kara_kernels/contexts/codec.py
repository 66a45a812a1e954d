"""From a paged cache to a packet, and back."""

from __future__ import annotations

from torch import Tensor

from ..ops import dequantize_rows, gather_rows, quantize_rows, scatter_rows
from ..paged import PagedCache
from ..payload import PayloadLayout
from ..payload_arguments import Caches
from .packet import Header, Packet, seal


def encode(
    k_cache: Caches, v_cache: Caches | None, block_table: Tensor, tokens: int, *, model: str, context: str,
    rows: Tensor | None = None, form: str = "int8", scorer: str = "", channels: Tensor | None = None,
    exact_rows: int = -1, grade_rows: int = 0, sections: int | None = None, to_cpu: bool = True, backend: str = "auto",
) -> Packet:  # fmt: skip
    """One context out of a paged cache, as a packet.

    Args:
        k_cache, v_cache, block_table, channels, backend: as in :func:`kara_kernels.ops.gather_rows`.
        tokens: of the context, ``C``.
        model, context, scorer: see :class:`~kara_kernels.contexts.packet.Header`.
        rows: int32 ``[H, R]`` or ``[L, H, R]``, places best first; see :func:`kara_kernels.ops.rank_rows`. None: all
            tokens in order.
        form: ``"exact"``, ``"fp8"``, ``"int8"`` or ``"int4"``; see :class:`~kara_kernels.PayloadLayout`, also for
            ``exact_rows`` and ``grade_rows``.
        sections: keeps only so many, one of the header's steps; all of them by default. The result equals the whole
            packet cut to it, bit for bit.
        to_cpu: the packet comes into memory of the CPU, else it stays where the cache is.

    Returns:
        A packet. A GPU is waited for.

    Raises:
        TypeError, ValueError: naming argument, expected and got.
    """
    cache = PagedCache.of(*_listed(k_cache, v_cache))
    kept = None if channels is None else channels.shape[-1]
    layout = PayloadLayout(
        **PayloadLayout.shape_of(cache), tokens=tokens, rows=tokens if rows is None else rows.shape[-1], form=form,
        places=rows is not None, channels=kept, exact_rows=exact_rows, grade_rows=grade_rows,
    )  # fmt: skip
    header = Header(model, context, layout, scorer)
    gather = gather_rows if form == "exact" else quantize_rows
    payload = gather(k_cache, v_cache, block_table, rows, layout, channels=channels, backend=backend)
    packet = seal(header, payload)
    packet = packet if sections is None else packet.cut(sections)
    return Packet(header, packet.payload.cpu()) if to_cpu else packet


def decode(
    packet: Packet, k_cache: Caches, v_cache: Caches | None, block_table: Tensor, *, model: str | None = None,
    context: str | None = None, to: str = "places", backend: str = "auto",
) -> None:  # fmt: skip
    """A packet's rows into a paged cache.

    Args:
        packet: as :func:`~kara_kernels.contexts.packet.read_packet` returns it, which has verified its checksums.
        k_cache, v_cache, block_table, to, backend: as in :func:`kara_kernels.ops.scatter_rows`.
        model, context: what the packet must be of; None: anything.

    Raises:
        ForeignPacket: a packet of another model or context, or for a cache of another shape or dtype. Nothing is
            written.
        TypeError, ValueError: naming argument, expected and got. Nothing is written.
    """
    cache = PagedCache.of(*_listed(k_cache, v_cache))
    packet.require(model=model, context=context, cache=PayloadLayout.shape_of(cache))
    layout = packet.header.layout
    scatter = scatter_rows if layout.form == "exact" else dequantize_rows
    scatter(packet.payload.to(cache.k[0].device), layout, k_cache, v_cache, block_table, to=to, backend=backend)


def _listed(k_cache: Caches, v_cache: Caches | None) -> tuple[Caches, Caches | None]:
    """Caches of one layer as sequences of one."""
    if isinstance(k_cache, Tensor) and k_cache.dim() == 4:
        return [k_cache], None if v_cache is None else [v_cache]  # type: ignore[list-item]
    return k_cache, v_cache
