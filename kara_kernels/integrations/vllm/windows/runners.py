"""vLLM's two model runners with Kara: where their lengths, slots and copies of block tables are."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from .runner import KaraRunner


class KaraRunnerV1(KaraRunner):
    """Extends vLLM's V1 model runner, used on CPUs, and on GPUs with VLLM_USE_V2_MODEL_RUNNER=0."""

    def kara_init(self) -> None:
        super().kara_init()
        self.kara_group, self.kara_alone = 0, True
        self.kara_shifted = False
        """Whether lengths of the last step are left in the buffer."""
        self.kara_dropped = self._make_buffer(self.max_num_reqs, dtype=torch.int32)

    def _kara_adopt(self, group: int, count: int) -> None:
        self.kara_group, self.kara_alone = group, count == 1
        if not self.kara_alone:
            # Captured graphs read lengths from a fixed address.
            self.kara_lengths = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=self.device)
            for attention in self.attn_groups[group]:
                for name in ("build_metadata", "build_metadata_for_cudagraph_capture"):
                    setattr(attention, name, self._with_physical_lengths(getattr(attention, name)))

    def _with_physical_lengths(self, build: Any) -> Any:
        """Builds the metadata of full attention, beside groups whose lengths stay logical."""

        def built(metadata: Any, *args: Any, **kwargs: Any) -> Any:
            n, metadata = metadata.num_reqs, copy.copy(metadata)
            lengths = self.kara_lengths[:n]
            metadata.seq_lens = torch.sub(metadata.seq_lens, self.kara_dropped.gpu[:n], out=lengths)
            if metadata.seq_lens_cpu_upper_bound is not None:
                metadata.seq_lens_cpu_upper_bound = metadata.seq_lens_cpu_upper_bound - self.kara_dropped.cpu[:n]
            return build(metadata, *args, **kwargs)

        return built

    def _kara_kernel_blocks(self) -> list[int]:
        return self._kernel_block_sizes

    def _update_states(self, scheduler_output: Any) -> Any:
        # Not earlier: by now vLLM has waited for the last step's copy of its block tables to the GPU.
        self._kara_forget_freed()
        return super()._update_states(scheduler_output)

    def _kara_forget_blocks(self, request_id: str, kept: int) -> None:
        del self.requests[request_id].block_ids[self.kara_group][kept:]
        row = self.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            table = self.input_batch.block_table[self.kara_group]
            table.block_table.np[row, kept : table.num_blocks_per_row[row]] = 0
            table.num_blocks_per_row[row] = kept

    def _prepare_inputs(
        self, scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any
    ) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        batch, n = self.input_batch, len(num_scheduled_tokens)
        self._kara_prepare(
            batch.req_ids[:n], batch.num_prompt_tokens[:n], batch.num_computed_tokens_cpu[:n], num_scheduled_tokens
        )
        if self.kara_step.dropped or self.kara_shifted:
            self._kara_shift(n, int(num_scheduled_tokens.sum()))
        return prepared

    def _kara_shift(self, num_reqs: int, num_tokens: int) -> None:
        """Converts lengths and slots from logical to physical. Positions stay logical."""
        dropped = self.kara_dropped
        dropped.np[:num_reqs] = [self.kara_step.dropped.get(name, 0) for name in self.input_batch.req_ids[:num_reqs]]
        dropped.np[num_reqs:] = 0
        dropped.copy_to_gpu()
        self.kara_shifted = not self.kara_alone and bool(self.kara_step.dropped)
        if self.kara_alone:
            self.optimistic_seq_lens_cpu[:num_reqs] -= dropped.cpu[:num_reqs]  # an upper bound, used for kernel grids
            self.seq_lens[:num_reqs] -= dropped.gpu[:num_reqs]
        rows = self.req_indices.gpu[:num_tokens]
        self.input_batch.block_table[self.kara_group].compute_slot_mapping(
            num_reqs,
            self.query_start_loc.gpu[: num_reqs + 1],
            self.positions[:num_tokens] - dropped.gpu[rows],
        )


class KaraRunnerV2(KaraRunner):
    """Extends vLLM's V2 model runner, the default on GPUs."""

    def kara_init(self) -> None:
        super().kara_init()
        self.kara_dropped: tuple[Tensor, Tensor] | None = None
        """Tokens that the requests of this step have lost, on the device and on the host."""

    def _kara_adopt(self, group: int, count: int) -> None:
        if count != 1:
            raise ValueError(
                f"kara: expected full attention in all layers with vLLM's V2 model runner (VLLM_USE_V2_MODEL_RUNNER=0 "
                f"chooses V1), got {count} KV cache groups"
            )

    def _kara_kernel_blocks(self) -> list[int]:
        return self.kernel_block_sizes

    def update_requests(self, scheduler_output: Any) -> None:
        self._kara_forget_freed()
        super().update_requests(scheduler_output)

    def _kara_forget_blocks(self, request_id: str, kept: int) -> None:
        row = self.req_states.req_id_to_index.get(request_id)
        if row is not None:
            # The next blocks are appended there. The count reaches the device with vLLM's own staged writes.
            self.block_tables.num_blocks.np[0, row] = kept

    def prepare_attn(self, input_batch: Any) -> Any:
        counts = input_batch.num_scheduled_tokens
        prompts = self.req_states.prompt_len.np[input_batch.idx_mapping_np]
        self._kara_prepare(input_batch.req_ids, prompts, input_batch.num_computed_tokens_np, counts)
        self.kara_dropped = None
        if not self.kara_step.dropped:
            return super().prepare_attn(input_batch)
        dropped = np.array([self.kara_step.dropped.get(name, 0) for name in input_batch.req_ids], dtype=np.int32)
        self.kara_dropped = async_tensor_h2d(dropped, device=self.device), torch.from_numpy(dropped)
        self._kara_lengthen(input_batch, -1)
        logical = input_batch.positions
        # vLLM computes slots from positions. The model must then see logical positions again.
        input_batch.positions = logical.clone()
        of_tokens = np.repeat(dropped, counts)
        input_batch.positions[: len(of_tokens)] -= async_tensor_h2d(of_tokens, device=self.device)
        try:
            return super().prepare_attn(input_batch)
        finally:
            input_batch.positions = logical

    def sample(self, hidden_states: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM samples no token while a prefill goes on, that is while a request is shorter than its text. Recomputed
        # text is a prefill, and once it is compressed its physical length never gets there.
        if self.kara_dropped is not None:
            self._kara_lengthen(input_batch, 1)
        return super().sample(hidden_states, input_batch, *args, **kwargs)

    def _kara_lengthen(self, input_batch: Any, sign: int) -> None:
        """Converts lengths from logical to physical (-1), for attention, and back (1)."""
        assert self.kara_dropped is not None
        on_device, on_host = self.kara_dropped
        input_batch.seq_lens[: len(on_host)] += sign * on_device
        input_batch.seq_lens_cpu_upper_bound[: len(on_host)] += sign * on_host
